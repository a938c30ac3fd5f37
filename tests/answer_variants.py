"""Ways in which models write answers, each with what it should be read as. Written by hand.

A row is (form, reference, text, right). `{}` stands for the answer in phrasings that hold for many answers.
"""

from __future__ import annotations

from collections.abc import Iterator

OPTIONS = ("12 kJ", "the mitochondrion", "Paris", "It doubles")

PHRASES = (
    "{}", "{}.", "**{}**", "The answer is {}.", "The answer is: {}", "Answer: {}", "**Answer:** {}", "**Answer: {}**",
    "Final answer: {}", "Final Answer: **{}**", "The final answer is {}.", "So the answer is {}", "Therefore, the final answer is **{}**.",
    "### Final Answer\n\\boxed{{{}}}", "\\boxed{{{}}}", "$\\boxed{{{}}}$", "$$\\boxed{{{}}}$$", "Thus we get \\boxed{{{}}}.",
    "The final answer is $\\boxed{{{}}}$. I hope it is correct.", "#### {}", "<answer>{}</answer>", "<answer> {} </answer>",
    "Let me check with 3 and 7 first. Both fail.\n\nAnswer: {}", "We tried 5 and then 6.\nThe answer is {}.\n", "ANSWER: {}",
    "Hence the correct answer is {}.", "The answer to the question is {}.", "Step 1: 4 things.\nStep 2: 9 things.\n\n\\[\n\\boxed{{{}}}\n\\]",
    "I first thought \\boxed{{999}}, but that is wrong: \\boxed{{{}}}", "The answer should be {}.",
)  # fmt: skip

NUMBERS = (  # (reference, as written): for phrases that declare an answer
    ("42", "42"), ("42", "42.0"), ("1000", "1,000"), ("1000", "$1,000"), ("1000", "\\$1,000"), ("-5", "-5"), ("-5", "−5"),
    ("0.5", "0.5"), ("0.5", ".5"), ("0.5", "1/2"), ("50", "50%"), ("50", "50\\%"), ("12", "12 apples"), ("12000", "12{,}000"),
    ("3.75", "$3.75"),
)  # fmt: skip

HAND = (
    # numbers: what is declared beats what is mentioned
    ("number", "42", "The answer is 42, not 43.", True),
    ("number", "42", "The answer is 42 because 6 * 7 = 42 and 7 > 6.", True),
    ("number", "5", "The answer is 2 + 3 = 5.", True),
    ("number", "5", "The answer is x = 5, since y = 3.", True),
    ("number", "18", "Janet makes 9 * 2 = $18 every day.", True),
    ("number", "18", "She sells 9 eggs at $2, so she makes 18 dollars.", True),
    ("number", "70000", "The profit is 200,000 - 130,000 = $70,000", True),
    ("number", "624", "He runs 624 meters", True),
    ("number", "7", "It takes seven days.", False),
    ("number", "7", "7 days were enough; 8 would be too many", False),
    ("number", "3", "between 5-3", True),
    ("number", "0.5", "\\boxed{\\frac{1}{2}}", True),
    ("number", "0.5", "\\boxed{\\dfrac12}", True),
    ("number", "12", "\\boxed{12\\text{ cm}}", True),
    ("number", "12", "\\boxed{x = 12}", True),
    ("number", "90", "\\boxed{90^\\circ}", True),
    ("number", "1234567", "\\boxed{1\\,234\\,567}", True),
    ("number", "1234567", "The answer is 1 234 567.", True),
    ("number", "43", "The answer is 42, not 43.", False),
    ("number", "42", "The answer is 4.2", False),
    ("number", "42", "The answer is -42", False),
    ("number", "42", "The answer is 420", False),
    ("number", "42", "", False),
    ("number", "42", "I can't answer that.", False),
    ("number", "1e6", "The answer is 1000000", True),
    ("number", "1000000", "The answer is 1e6.", True),
    ("number", "20", "**Total = $20**", True),
    ("number", "20", "Total cost: 4 * 5 = <<4*5=20>>20", True),
    ("number", "6", "The answer (in cm) is 6.", True),
    ("number", "6", "The answer, I believe, is 6.", True),
    ("number", "15", "Answer:\n15", True),
    ("number", "15", "**Final Answer**\n\n15", True),
    ("gsm8k", "5", "#### 5", True),
    ("gsm8k", "5", "so it is\n#### $5.00", True),
    # AIME
    ("aime", "42", "\\boxed{042}", True),
    ("aime", "42", "The answer is 042.", True),
    ("aime", "0", "\\boxed{0}", True),
    ("aime", "999", "m + n = 991 + 8 = \\boxed{999}", True),
    ("aime", "42", "\\boxed{42.5}", False),
    ("aime", "42", "\\boxed{1042}", False),
    ("aime", "42", "\\boxed{-42}", False),
    ("aime", "42", "\\boxed{\\frac{84}{2}}", True),
    ("aime", "204", "The answer is \\textbf{(204)}.", True),
    # boxed, compared as numbers or text
    ("boxed", "x+1", "\\boxed{x+1}", True),
    ("boxed", "\\frac{1}{2}", "so \\boxed{\\frac{1}{2}} it is", True),
    ("boxed", "\\{1,2\\}", "\\boxed{\\{1,2\\}}", True),
    ("boxed", "Tuesday", "\\boxed{\\text{tuesday}}", True),
    ("boxed", "Tuesday", "It is Tuesday.", False),
    ("boxed", "5", "\\boxed{5", False),
    ("boxed", "5", "\\boxed{4} \\boxed{5", False),
    ("boxed", "5", "\\fbox{5}", True),
    # choices: C is "Paris"
    ("choice", "C", "C", True), ("choice", "C", "(C)", True), ("choice", "C", "C.", True), ("choice", "C", "**C**", True),
    ("choice", "C", "c", True), ("choice", "C", "(c)", True), ("choice", "C", "C) Paris", True), ("choice", "C", "C. Paris", True),
    ("choice", "C", "(C) Paris", True), ("choice", "C", "**C) Paris**", True), ("choice", "C", "[C]", True),
    ("choice", "C", "Paris", True), ("choice", "C", "paris.", True), ("choice", "C", "The answer is Paris.", True),
    ("choice", "C", "\\boxed{C}", True), ("choice", "C", "\\boxed{\\text{C}}", True), ("choice", "C", "\\boxed{(C)}", True),
    ("choice", "C", "\\boxed{\\textbf{(C) } Paris}", True), ("choice", "C", "\\boxed{C) Paris}", True),
    ("choice", "C", "\\boxed{Paris}", True), ("choice", "C", "$\\boxed{\\mathrm{C}}$", True),
    ("choice", "C", "Answer: C", True), ("choice", "C", "Answer: (C)", True), ("choice", "C", "Answer: **C**", True),
    ("choice", "C", "**Answer: C**", True), ("choice", "C", "**Answer:** C", True), ("choice", "C", "ANSWER: C", True),
    ("choice", "C", "Answer: c", True), ("choice", "C", "answer is c.", True), ("choice", "C", "Answer: $C$", True),
    ("choice", "C", "Answer: C) Paris", True), ("choice", "C", "Answer: C. Paris", True), ("choice", "C", "Answer: option C", True),
    ("choice", "C", "Answer: \\boxed{C}", True), ("choice", "C", "Answer:\nC", True), ("choice", "C", "Final Answer: C", True),
    ("choice", "C", "The answer is C", True), ("choice", "C", "The answer is (C).", True), ("choice", "C", "The answer is **C**.", True),
    ("choice", "C", "The answer is C: Paris.", True), ("choice", "C", "The answer is C, because B is in Spain.", True),
    ("choice", "C", "The correct answer is (C) Paris.", True), ("choice", "C", "the correct answer is: C", True),
    ("choice", "C", "The correct option is C.", True), ("choice", "C", "The best choice is option C.", True),
    ("choice", "C", "The correct choice is **(C)**", True), ("choice", "C", "So the answer must be C.", True),
    ("choice", "C", "Therefore, C is correct.", True), ("choice", "C", "Option C is the correct answer.", True),
    ("choice", "C", "(C) is right.", True), ("choice", "C", "Thus, **C** is the best answer.", True),
    ("choice", "C", "I would choose C.", True), ("choice", "C", "I'd go with (C).", True), ("choice", "C", "I pick option C", True),
    ("choice", "C", "A is wrong, B is wrong, D is wrong.\nThat leaves option C.", True),
    ("choice", "C", "At first the answer is B? No: the answer is C.", True),
    ("choice", "C", "A) is too small. B) is a cell. So\n\nC", True),
    ("choice", "C", "<answer>C</answer>", True), ("choice", "C", "<answer>(C)</answer>", True), ("choice", "C", "#### C", True),
    ("choice", "C", "The answer is $\\text{C}$.", True), ("choice", "C", "The answer is “C”.", True), ("choice", "C", "Answer - C\nC", True),
    ("choice", "A", "The answer is a mitochondrion, B.", False),
    ("choice", "B", "\\boxed{the mitochondrion}", True), ("choice", "D", "It doubles.", True), ("choice", "D", "Answer: It doubles", True),
    ("choice", "A", "\\boxed{12\\text{ kJ}}", True), ("choice", "A", "The answer is 12 kJ.", True),
    ("choice", "C", "B", False), ("choice", "C", "The answer is B.", False), ("choice", "C", "\\boxed{D}", False),
    ("choice", "C", "C or D", False), ("choice", "C", "The answer is C or D.", False), ("choice", "C", "Answer: C, D", False),
    ("choice", "C", "Answer: B and C", False), ("choice", "C", "", False), ("choice", "C", "Canada", False),
    ("choice", "C", "Consider each option in turn.", False), ("choice", "A", "A lot can be said about this.", False),
    ("choice", "A", "The answer is a hard one to find.", False), ("choice", "C", "The answer is E.", False),
    ("choice", "C", "None of them.", False), ("choice", "B", "The answer is Paris.", False),
)  # fmt: skip

MATH = (  # graded in symbols
    ("\\frac{1}{2}", "\\boxed{0.5}", True), ("\\frac{1}{2}", "\\boxed{1/2}", True), ("\\frac{1}{2}", "$\\boxed{\\dfrac{1}{2}}$", True),
    ("\\frac{1}{2}", "The answer is $\\frac{1}{2}$.", True), ("\\frac{1}{2}", "The final answer is $\\frac{2}{4}$.", True),
    ("\\frac{1}{2}", "\\boxed{\\frac{1}{3}}", False), ("x^2+2x+1", "\\boxed{(x+1)^2}", True), ("x^2+2x+1", "\\boxed{x^2+1+2x}", True),
    ("x^2+2x+1", "\\boxed{(x-1)^2}", False), ("2\\sqrt{2}", "\\boxed{\\sqrt{8}}", True), ("2\\sqrt{2}", "\\boxed{2\\sqrt2}", True),
    ("2\\sqrt{2}", "\\boxed{2.828}", False), ("(1,2)", "\\boxed{(1, 2)}", True), ("(1,2)", "\\boxed{(2,1)}", False),
    ("[0,1)", "\\boxed{[0,1)}", True), ("[0,1)", "\\boxed{(0,1)}", False), ("\\{1,2\\}", "\\boxed{\\{2,1\\}}", True),
    ("1,2", "\\boxed{1, 2}", True), ("1,2", "\\boxed{2, 1}", True), ("\\pi", "\\boxed{\\pi}", True), ("\\pi", "\\boxed{3}", False),
    ("30^\\circ", "\\boxed{30^\\circ}", True), ("30^\\circ", "\\boxed{30}", True), ("5", "\\boxed{x=5}", True), ("x=5", "\\boxed{5}", True),
    ("10\\%", "\\boxed{10\\%}", True), ("1000", "\\boxed{1,000}", True), ("\\frac{3}{4}", "\\boxed{0.75}", True),
    ("-\\frac{1}{3}", "\\boxed{\\frac{-1}{3}}", True), ("e^{2}", "\\boxed{e^2}", True), ("\\log 2", "\\boxed{\\log 2}", True),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\boxed{\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}}", True),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\boxed{\\begin{pmatrix} 1 & 2 \\\\ 3 & 5 \\end{pmatrix}}", False),
    ("\\infty", "\\boxed{\\infty}", True), ("42", "no answer here", False), ("42", "\\boxed{}", False), ("3+4i", "\\boxed{4i+3}", True),
    ("x \\le 3", "\\boxed{x \\leq 3}", True), ("\\frac{\\sqrt{3}}{3}", "\\boxed{\\frac{1}{\\sqrt{3}}}", True), ("7", "\\boxed{6+1}", True),
)  # fmt: skip


def variants() -> Iterator[tuple[str, str, str, bool]]:
    for phrase in PHRASES:
        yield "number", "42", phrase.format("42"), True
        yield "number", "43", phrase.format("42"), False
        yield "aime", "204", phrase.format("204"), True
        yield "choice", "C", phrase.format("C"), True
        yield "choice", "C", phrase.format("(C)"), True
        yield "choice", "C", phrase.format("B"), False
        if "\\boxed" in phrase:
            yield "boxed", "\\frac{a}{b}", phrase.format("\\frac{a}{b}"), True
    for reference, written in NUMBERS:
        for phrase in (
            "The answer is {}.",
            "Answer: {}",
            "\\boxed{{{}}}",
            "So we have {} in all, 3 more than before.\nFinal answer: **{}**",
        ):
            yield "number", reference, phrase.format(written, written), True
    yield from HAND
    yield from (("math", reference, text, right) for reference, text, right in MATH)
