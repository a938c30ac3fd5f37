"""Terms of a reward that look at the episode alone. Each: its settings, then its formula and range.

    format      1 if the thought is closed and the answer is there and looks as asked, else 0
    language    words in the target script / words (DeepSeek-R1, arXiv 2501.12948)                         [0, 1]
    alphabet    characters of a given alphabet / characters, white space left out                          [0, 1]
    length      -min(1, tokens / limit)                                                                   [-1, 0]
    overlong    0 up to L - C tokens, then (L - C - tokens) / C, -1 past L (DAPO, arXiv 2503.14476)       [-1, 0]
    repetition  -(1 - different n-grams / n-grams)                                                        [-1, 0]
    schema      1 if the answer is JSON that fits a schema, else 0
    tools       calls that succeeded / calls; 0 with fewer than `least` or more than `most`                [0, 1]

Tokens are those that the model wrote or was made to write, in all its turns. A term that can't be computed has a
status, not a value. Left out: terms that compare an episode with its group (Kimi k1.5's length reward), because
an episode's reward would then change with its neighbours.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from trivet.agent.loop import Episode, ModelStep, ToolStep
from trivet.config import UserError
from trivet.messages import Score
from trivet.spec import Frozen
from trivet.tasks import Problem

Part = Literal["thinking", "answer", "all"]


@dataclass(frozen=True)
class Case:
    """What a term looks at."""

    problem: Problem
    episode: Episode


Term = Callable[[Sequence[Case]], Sequence[Score]]


def each(score: Callable[[Case], Score]) -> Term:
    """A term of single episodes. What one raises is its status."""

    def one(case: Case) -> Score:
        try:
            return score(case)
        except Exception as e:
            return Score(0.0, "error", detail=f"{type(e).__name__}: {e}")

    return lambda cases: [one(case) for case in cases]


def thinking(episode: Episode) -> str:
    turns = [step.message for step in episode.steps if isinstance(step, ModelStep)]
    return "\n".join(turn.reasoning for turn in turns if turn.reasoning)


def text_of(episode: Episode, part: Part) -> str:
    """The text of the last answer, of all thoughts, or both."""
    answer = episode.final.content
    return {"thinking": thinking(episode), "answer": answer, "all": f"{thinking(episode)}\n{answer}"}[part]


def tokens_of(episode: Episode, part: Part) -> int:
    thought, written = episode.reasoning_tokens, sum(len(c.tokens) for c in episode.completions)
    return {"thinking": thought, "answer": written - thought, "all": written}[part]


# ---------------------------------------------------------------------------------------------- format
class FormatConfig(Frozen):
    name: Literal["format"] = "format"
    thought: bool = Field(default=False, description="a thought is asked for, too")
    pattern: str | None = Field(default=None, description="regular expression that the whole answer must match")
    tags: tuple[str, ...] = Field(
        default=(), description="tags that must each stand in the answer once, in this order, e.g. think, answer"
    )

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as e:
            raise ValueError(f"{pattern!r} is no regular expression: {e}") from None
        return pattern


def format_term(config: FormatConfig) -> Term:
    """A thought that was never closed leaves no answer, so asking for the answer asks for both. A budget that
    closed the thought is not the model's fault. `tags` is R1-Zero's rule, for templates without a thinking token."""
    between = r"(?:(?!</?(?:{names})>).)+"
    names = "|".join(map(re.escape, config.tags))
    inside = between.format(names=names)
    tagged = re.compile(
        r"\s*" + r"\s*".join(f"<{re.escape(t)}>{inside}</{re.escape(t)}>" for t in config.tags) + r"\s*", re.S
    )

    def score(case: Case) -> Score:
        final = case.episode.final
        if not final.content.strip():
            return Score(0.0, detail="no answer")
        if config.thought and not thinking(case.episode).strip():
            return Score(0.0, detail="no thought")
        if config.tags and not tagged.fullmatch(final.content):
            return Score(0.0, detail="not tagged as asked")
        if config.pattern is not None and not re.fullmatch(config.pattern, final.content, re.S):
            return Score(0.0, detail="does not match the pattern")
        return Score(1.0)

    return each(score)


# -------------------------------------------------------------------------------------------- language
SCRIPTS = {  # first words of Unicode's names of letters
    "latin": ("LATIN",), "cyrillic": ("CYRILLIC",), "greek": ("GREEK",), "han": ("CJK",), "arabic": ("ARABIC",),
    "japanese": ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"), "hangul": ("HANGUL",), "hebrew": ("HEBREW",),
    "devanagari": ("DEVANAGARI",), "thai": ("THAI",),
}  # fmt: skip
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "THAI")  # each letter is counted as a word
NOT_PROSE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\\[A-Za-z]+|https?://\S+", re.S)


class LanguageConfig(Frozen):
    name: Literal["language"] = "language"
    script: str = Field(description=f"the target's script: {', '.join(SCRIPTS)}")
    words: str | None = Field(default=None, description="file of the language's words, one a line: others don't count")
    of: Part = Field(default="all", description="where: thinking, answer or all")

    @field_validator("script")
    @classmethod
    def _known(cls, script: str) -> str:
        if script not in SCRIPTS:
            raise ValueError(f"no script {script!r}; there are {', '.join(SCRIPTS)}")
        return script


def language_term(config: LanguageConfig) -> Term:
    """R1's language consistency. The script tells Chinese from English, not German from English: for that there is
    `words`, a list, against which inflected and rare words count as foreign. Code, LaTeX commands, addresses and
    single letters (variables) are no words. A text without words is consistent: 1."""
    wanted = SCRIPTS[config.script]
    known = None if config.words is None else _word_list(config.words)

    def score(case: Case) -> Score:
        found = list(words(text_of(case.episode, config.of)))
        if not found:
            return Score(1.0, detail="no words")
        right = sum(script in wanted and (known is None or word.casefold() in known) for script, word in found)
        return Score(right / len(found))

    return each(score)


def words(text: str) -> Iterator[tuple[str, str]]:
    """(script, word) of each word; letters of scripts without spaces one by one."""
    for run in re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", NOT_PROSE.sub(" ", text)):
        pieces: list[tuple[str, str]] = []
        for letter in run:
            script = unicodedata.name(letter, "UNKNOWN").split()[0]
            if (
                pieces
                and script not in UNSPACED
                and (pieces[-1][0] == script or script in ("APOSTROPHE", "RIGHT", "MODIFIER"))
            ):
                pieces[-1] = (pieces[-1][0], pieces[-1][1] + letter)
            else:
                pieces.append((script, letter))
        yield from (piece for piece in pieces if len(piece[1]) > 1 or piece[0] in UNSPACED)


def _word_list(path: str) -> frozenset[str]:
    try:
        return frozenset(line.strip().casefold() for line in Path(path).read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"reward 'language': words = {path!r} can't be read: {e}.") from None


# -------------------------------------------------------------------------------------------- alphabet
class AlphabetConfig(Frozen):
    name: Literal["alphabet"] = "alphabet"
    characters: str = Field(min_length=1, description="what may be written")
    of: Part = Field(default="thinking", description="where: thinking, answer or all")


def alphabet_term(config: AlphabetConfig) -> Term:
    """Consistency where a language is not a script: formulas, codes, notations. A text without characters is: 1."""
    allowed = set(config.characters)

    def score(case: Case) -> Score:
        found = [c for c in text_of(case.episode, config.of) if not c.isspace()]
        return Score(sum(c in allowed for c in found) / len(found) if found else 1.0)

    return each(score)


# ---------------------------------------------------------------------------------------------- length
class LengthConfig(Frozen):
    name: Literal["length"] = "length"
    limit: int = Field(gt=0, description="tokens at which the value is -1")
    of: Part = Field(default="all", description="of thinking, answer or all")


def length_term(config: LengthConfig) -> Term:
    return each(lambda case: Score(-min(1.0, tokens_of(case.episode, config.of) / config.limit)))


class OverlongConfig(Frozen):
    name: Literal["overlong"] = "overlong"
    limit: int = Field(gt=0, description="L: tokens past which the value is -1; DAPO: 20,480")
    cache: int = Field(gt=0, description="C: tokens before L on which it falls from 0 to -1; DAPO: 4,096")

    @model_validator(mode="after")
    def _room(self) -> OverlongConfig:
        if self.cache > self.limit:
            raise ValueError(f"cache ({self.cache}) is more than limit ({self.limit})")
        return self


def overlong_term(config: OverlongConfig) -> Term:
    return each(lambda case: Score(overlong(tokens_of(case.episode, "all"), config.limit, config.cache)))


def overlong(length: int, limit: int, cache: int) -> float:
    """DAPO's soft overlong punishment (its equation 13)."""
    if length <= limit - cache:
        return 0.0
    return (limit - cache - length) / cache if length <= limit else -1.0


# ------------------------------------------------------------------------------------------ repetition
class RepetitionConfig(Frozen):
    name: Literal["repetition"] = "repetition"
    n: int = Field(default=20, gt=0, description="tokens of an n-gram")


def repetition_term(config: RepetitionConfig) -> Term:
    def score(case: Case) -> Score:
        grams = [
            c.tokens[i : i + config.n] for c in case.episode.completions for i in range(len(c.tokens) - config.n + 1)
        ]
        return Score(len(set(grams)) / len(grams) - 1 if grams else 0.0)

    return each(score)


# ---------------------------------------------------------------------------------------------- schema
class SchemaConfig(Frozen):
    name: Literal["schema"] = "schema"
    schema_: dict[str, Any] = Field(alias="schema", description="a JSON schema, as a table")


def schema_term(config: SchemaConfig) -> Term:
    """The whole answer is JSON, perhaps in one ```json fence. Formats ("date") are not checked."""
    try:
        import jsonschema
    except ImportError:
        raise UserError("reward 'schema' needs jsonschema: pip install 'trivet[tasks]'") from None
    kind = jsonschema.validators.validator_for(config.schema_, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(config.schema_)
    except jsonschema.SchemaError as e:
        raise UserError(f"reward 'schema': the schema itself is wrong: {e.message}.") from None
    validator = kind(config.schema_)

    def score(case: Case) -> Score:
        text = case.episode.final.content.strip()
        fenced = re.fullmatch(r"```(?:json)?\n(.*)\n```", text, re.S)
        try:
            data = json.loads(fenced[1] if fenced else text)
        except (ValueError, RecursionError) as e:
            return Score(0.0, detail=f"not JSON: {e}")
        error = next(validator.iter_errors(data), None)
        return Score(1.0) if error is None else Score(0.0, detail=error.message[:200])

    return each(score)


# ----------------------------------------------------------------------------------------------- tools
class ToolsConfig(Frozen):
    name: Literal["tools"] = "tools"
    least: int = Field(default=1, ge=0, description="calls that are asked for")
    most: int | None = Field(default=None, ge=0, description="calls that are allowed; unset: any number")


def tools_term(config: ToolsConfig) -> Term:
    def score(case: Case) -> Score:
        results = [step.result for step in case.episode.steps if isinstance(step, ToolStep)]
        if len(results) < config.least or (config.most is not None and len(results) > config.most):
            return Score(0.0, detail=f"{len(results)} calls")
        return Score(sum(result.status == "ok" for result in results) / len(results) if results else 1.0)

    return each(score)
