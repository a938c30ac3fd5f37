"""The answer that a text gives, found by form, and whether two answers are the same.

Where a text may name several candidates, what it declares beats what it merely mentions:

    1. the last \\boxed{...}     2. what follows the last "answer is", "Answer:", "<answer>" or "####"
    3. the last candidate in the text; of numbers, what follows the last `=` of the last line that has any

Forms: `text` the whole; `number` by the rule above, compared by value (1,000 = 1000.0 = $1000, 50% = 50, 1/2 = 0.5);
`aime` a whole number from 0 to 999, else as number; `gsm8k` what follows ####, as a number; `boxed` the first rule
only; `choice` the letter of an option, or its text in full. None: the text gives no answer of that form. Two
letters ("A or C") are none. Left out: numbers in words, decimal commas, and answers in other languages than English.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

Format = Literal["text", "number", "aime", "boxed", "gsm8k", "math", "choice"]
LETTERS = "ABCDEFGHIJ"

NUMBER = re.compile(
    r"(?<![\w.])[-+]?\s?\$?[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+\b|\s?/\s?\d+(?:\.\d+)?)?\s?%?"
)
IS = r"(?:is|are|was|equals|=|:|would be|will be|should be|must be|comes? (?:out )?to)"
DECLARED = re.compile(
    rf"####|<answer>|\banswer\b[\s*_]*(?:\([^()\n]*\))?(?: to (?:the|this) \w+| we want)?[\s*_]*{IS}(?![\w])?[\s:*_]*",
    re.IGNORECASE,
)
DRESS = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathit|operatorname|boldsymbol)\s*\{([^{}]*)\}")


def extract(text: str, form: Format) -> str | None:
    """The answer of a form that a text gives, or None. Not for `choice`, which needs the options."""
    text = plain(text)
    if form == "text":
        return text.strip() or None
    if form == "gsm8k":
        _, mark, tail = text.rpartition("####")
        return extract(tail, "number") if mark else None
    if form in ("boxed", "math"):
        return boxed(text)
    found = number(text)
    if form == "aime" and found is not None:
        value = as_number(found)
        if value is None or value.denominator != 1 or not 0 <= value <= 999:
            return None
    return found


def plain(text: str) -> str:
    """Typographic minus signs, spaces and LaTeX's thousands as ASCII."""
    text = re.sub(r"[\u2212\u2013\ufe63\uff0d](?=\s?[\d$.])", "-", text).replace("{,}", ",")
    return re.sub(r"(?<=\d)(?:[\u00a0\u202f\u2009]|\\[,;:!]|\s?\\ )(?=\d{3}\b)", "", text)


def boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} (or \\fbox) that is closed."""
    for start in reversed([m.end() for m in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]):
        depth = 1
        for end in range(start, len(text)):
            if text[end - 1] != "\\":
                depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start:end].strip()
    return None


def number(text: str) -> str | None:
    inside = boxed(text)
    if inside is not None:
        return inside if as_number(inside) is not None else _first(inside)
    for declared in _declared(text):
        clause = re.split(r",\s|;|\.\s|\.$|</answer>|\(|\b(?:because|since|as|for)\b", declared, maxsplit=1)[0]
        found = _first(clause)
        if found is not None:
            return found
    lines = [line for line in text.splitlines() if _numbers(line)]
    if not lines:
        return None
    return _first(lines[-1]) if "=" in lines[-1] else _numbers(lines[-1])[-1]


def _declared(text: str) -> list[str]:
    """The lines after the places where an answer is declared, the last place first."""
    tails = [text[m.end() :].lstrip(" *_:\n") for m in DECLARED.finditer(text)]
    return [tail.splitlines()[0] for tail in reversed(tails) if tail]


def _first(clause: str) -> str | None:
    """The first number after the last `=` (or its like) of a clause."""
    found = _numbers(re.split(r"=|\\approx|≈", clause)[-1]) or _numbers(clause)
    return found[0] if found else None


def _numbers(text: str) -> list[str]:
    text = re.sub(r"\\[dt]?frac\s*\{(-?[\d.]+)\}\s*\{(-?[\d.]+)\}", r" \1/\2", text).replace("\\$", "$")
    return [m.group().strip().rstrip(",") for m in NUMBER.finditer(text)]


def as_number(text: str) -> Fraction | None:
    """The value of a text that is nothing but a number, units of money, percent and degrees aside."""
    text = DRESS.sub(lambda m: m[1] if re.search(r"\d", m[1]) else "", text)
    text = re.sub(r"\\left|\\right|\\[,;:! ]|\^\{?\\circ\}?|°|[$€£,%\s*]|\\%|\\\$", "", text).rstrip(".")
    text = re.sub(r"^(-?)\\[dt]?frac\{?(-?[\d.]+)\}?\{?([\d.]+)\}?$", r"\1\2/\3", text)
    if not re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?(?:/\d+(?:\.\d+)?)?", text) or len(text) > 200:
        return None
    top, _, bottom = text.partition("/")
    try:
        return Fraction(top) / Fraction(bottom or 1)
    except ZeroDivisionError:
        return None


def same(given: str, reference: str) -> bool:
    """Equal as numbers where both are numbers, else as text without case, spaces around and LaTeX's fonts."""
    a, b = as_number(given), as_number(reference)
    if a is not None and b is not None:
        return a == b
    return _words(given) == _words(reference)


def _words(text: str) -> str:
    return " ".join(DRESS.sub(r"\1", text).casefold().split())


# -------------------------------------------------------------------------------------- multiple choice
WRAP = r"[\s*_`\"'“”\[({$]*"
CLOSE = r"[\s*_`\"'“”\])}$]*"


def choice(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a text settles on."""
    letters = LETTERS[: len(options)]
    inside = boxed(text)
    if inside is not None:
        return _letter(inside, letters) or _option(inside, options)
    bare = DRESS.sub(r"\1", text)
    one = rf"{WRAP}(?:(?:option|choice|letter)\b{WRAP})?([{letters}])(?![\w'’])"
    lower = rf"{WRAP}(?:(?:option|choice)\b{WRAP})?\(?([{letters.lower()}])(?:\)|[.*\s]*$)"
    before = rf"(?i:\b(?:answer|choice|option)\b[\s*_]*(?:\([^()\n]*\)\s*)?{IS}[\s:*_]*|<answer>\s*|####\s*|\b(?:choose|pick|select|go with)\b\s*:?)"
    after = rf"(?<![\w])\(?([{letters}])\)?{CLOSE}(?:is|would be|must be|seems)\s+(?:the\s+)?(?i:correct|right|best|true|answer)"
    found = [
        (m.start(), m)
        for pattern in (
            before + one,
            before + lower,
            after,
            rf"(?i:\b(?:option|choice))\s+\(?([{letters}])\b{CLOSE}\.?\s*$",
        )
        for m in re.finditer(pattern, bare, re.MULTILINE)
    ]
    if found:
        last = max(found, key=lambda pair: pair[0])[1]
        more = re.match(rf"{CLOSE}(?:,?\s*(?:or|and)\s+|/\s*|,\s*){WRAP}([{letters}])(?![\w'’])", bare[last.end(1) :])
        return None if more else last[1].upper()
    lines = [line for line in bare.splitlines() if line.strip()]
    for line in [*(tail for tail in _declared(bare)), *lines[-1:], *lines[:1]]:
        given = _letter(line, letters) or _option(line, options)
        if given is not None:
            return given
    return None


def _letter(text: str, letters: str) -> str | None:
    """The letter that a short text is, or starts with: `C`, `(c)`, `**C.**`, `C) 42`."""
    text = DRESS.sub(r"\1", text)
    m = re.fullmatch(
        rf"{WRAP}(?:(?i:option|choice|answer)\s*:?\s*)?{WRAP}([{letters}{letters.lower()}]){CLOSE}[.:)]?{CLOSE}", text
    )
    m = m or re.match(rf"{WRAP}([{letters}])\s*[).:\]]", text)
    return m[1].upper() if m else None


def _option(text: str, options: Sequence[str]) -> str | None:
    """The letter of the one option whose text this is."""
    given = text.strip(" .*_`\"'$\n").removesuffix("</answer>")
    hits = [letter for letter, option in zip(LETTERS, options, strict=False) if same(given, option.strip(" ."))]
    return hits[0] if len(hits) == 1 else None
