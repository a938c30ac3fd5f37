"""Tasks: disjoint splits, worked examples that grade as right, graders on hand-made answers."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from trivet.chat import tiny_chat
from trivet.config import UserError
from trivet.messages import Message
from trivet.tasks import Task, make_task
from trivet.tasks.extract import extract, same

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"
NAMES = ["chain", "search", "arithmetic", "hunt"]


@pytest.fixture(params=NAMES)
def task(request: pytest.FixtureRequest) -> Task:
    return make_task({"name": request.param})


def test_no_test_problem_is_ever_drawn_for_training(task: Task) -> None:
    test = {task.problem("test", i).prompt for i in range(300)}
    train = {
        make_task({"name": task.name, "seed": seed}).problem("train", i).prompt for seed in (0, 7) for i in range(600)
    }
    assert len(test) > 100 and not test & train


def test_two_seeds_do_draw_the_same_test_problems() -> None:
    """The twin of the above: where problems are few and the split is the same, seeds meet."""
    few = {"name": "chain", "min_steps": 1, "max_steps": 1}
    one, other = ({make_task(few | {"seed": seed}).problem("test", i).prompt for i in range(300)} for seed in (0, 7))
    assert one & other


def test_problems_are_pure_functions_of_their_index(task: Task) -> None:
    again = make_task({"name": task.name})
    assert [task.problem("train", i) for i in range(20)] == [again.problem("train", i) for i in range(20)]
    assert len({task.problem("train", i).prompt for i in range(200)}) > 150


def test_worked_examples_are_right_and_can_be_written(task: Task) -> None:
    chat = tiny_chat()
    for i in range(200):
        problem = task.problem("train", i)
        demo = task.demonstrate(problem, random.Random(i))
        assert task.grade(problem, demo.messages[-1]).value == 1.0
        rendered = chat.render(demo.messages, thinking=demo.thinking)
        assert any(rendered.mask) and chat.decode(rendered.ids).endswith("<end>")


def test_wrong_answers_are_zero_and_ok(task: Task) -> None:
    problem = task.problem("test", 1)
    for text in ("", "wrong", problem.answer + "1"):
        score = task.grade(problem, Message("assistant", text))
        assert score.value == 0.0 and score.ok


def test_levels_are_balanced_and_can_be_fixed() -> None:
    chain = make_task({"name": "chain", "min_steps": 3, "max_steps": 6})
    assert [chain.problem("test", i).level for i in range(8)] == [3, 4, 5, 6, 3, 4, 5, 6]
    assert chain.problem("test", 0, level=11).prompt.count("=") == 1
    assert sum(c in "+-*" for c in chain.problem("test", 0, level=11).prompt) == 11


def test_chain_by_hand() -> None:
    chain = make_task({"name": "chain"})
    for i in range(50):
        problem = chain.problem("test", i)
        start, *steps = re.findall(r"^\d|[-+*]\d+", problem.prompt)
        value = int(start)
        for step in steps:
            value = {"+": value + int(step[1:]), "-": value - int(step[1:]), "*": value * int(step[1:])}[step[0]] % 10
        assert len(steps) == problem.level and str(value) == problem.answer
        thought = "".join(problem.meta["thought"])
        assert re.sub(r"=\d", "", thought) == problem.prompt and thought.endswith(f"={value}=")


def test_a_chain_is_never_worked_out_further_than_it_may_be_shown() -> None:
    chain = make_task({"name": "chain", "min_steps": 2, "max_steps": 8, "shown": 5})
    results, cut = set(), set()
    for i in range(1000):
        problem = chain.problem("train", i)
        answer = chain.demonstrate(problem, random.Random(i)).messages[-1]
        if answer.reasoning is not None:
            assert answer.reasoning == "".join(problem.meta["thought"])[: len(answer.reasoning)]
            results.add(len(re.findall(r"=\d", answer.reasoning)))
            assert answer.cut or problem.level <= 5
            assert not (answer.cut and answer.reasoning.endswith("=")), (
                "`=` without its result is no token of a thought"
            )
            cut.add((problem.level, answer.cut))
    assert results == {0, 1, 2, 3, 4, 5} and {(8, True), (6, True), (5, True), (5, False)} <= cut
    free = make_task({"name": "chain", "min_steps": 8, "max_steps": 8})  # the twin
    shown = [
        free.demonstrate(free.problem("train", i), random.Random(i)).messages[-1].reasoning or "" for i in range(50)
    ]
    assert max(len(re.findall(r"=\d", t)) for t in shown) == 8


def test_search_takes_any_right_operators_and_no_other_digits() -> None:
    search = make_task({"name": "search"})
    problem = search.problem("test", 0)
    digits, target = problem.meta["digits"], problem.meta["target"]
    right = 0
    for a in "+-*":
        for b in "+-*":
            for c in "+-*":
                text = f"{digits[0]}{a}{digits[1]}{b}{digits[2]}{c}{digits[3]}"
                value = eval(f"(({digits[0]}{a}{digits[1]}){b}{digits[2]}){c}{digits[3]}") % 10
                assert search.grade(problem, Message("assistant", text)).value == float(value == target)
                right += value == target
    assert right >= 1
    other = problem.answer[:-1] + str((digits[3] + 1) % 10)
    assert search.grade(problem, Message("assistant", other)).value == 0.0


def test_wrong_settings_name_the_nearest() -> None:
    for settings, message in (
        ({"name": "chian"}, "Did you mean 'chain'"),
        ({"name": "chain", "min_step": 3}, "Did you mean 'min_steps'"),
        ({"name": "chain", "min_steps": 5, "max_steps": 3}, "below min_steps"),
        ({"name": "gym:leg_count"}, "Did you mean 'leg_counting'"),
    ):
        with pytest.raises(UserError, match=message):
            make_task(settings)


def test_reasoning_gym_by_name() -> None:
    gym = make_task({"name": "gym:leg_counting"})
    problem = gym.problem("test", 3)
    assert gym.grade(problem, Message("assistant", problem.answer)).value == 1.0
    assert gym.grade(problem, Message("assistant", "no idea")).value < 1.0
    assert not {gym.problem("train", i).prompt for i in range(30)} & {gym.problem("test", i).prompt for i in range(30)}


# -------------------------------------------------------------------------------------------- JSONL
def test_extraction_by_format() -> None:
    assert extract("so 3 apples, then 1,234.50.", "number") == "1,234.50"
    assert extract("a <<1+1=2>>\n#### -5", "gsm8k") == "-5"
    assert extract(r"thus \boxed{\frac{1}{2}} it is", "boxed") == r"\frac{1}{2}"
    assert (
        extract("none here", "number") is None
        and extract("2", "gsm8k") is None
        and extract(r"\boxed{2", "boxed") is None
    )


def test_numbers_are_compared_by_value() -> None:
    assert same("1,000", "1000.0") and same("$5", "5") and same("50%", "50") and same(" Yes ", "yes")
    assert not same("1000", "100") and not same("no", "yes")


def lines(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_a_users_file(tmp_path: Path) -> None:
    rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i), "why": f"{i} twice"} for i in range(64)]
    task = make_task(
        {"name": "jsonl", "path": lines(tmp_path / "a.jsonl", *rows), "format": "number", "reasoning": "why"}
    )
    train = {task.problem("train", i).prompt for i in range(200)}
    test = {task.problem("test", i).prompt for i in range(200)}
    assert len(train) + len(test) == 64 and not train & test
    problem = task.problem("train", 0)
    assert task.grade(problem, Message("assistant", f"It is {problem.answer}.")).value == 1.0
    thoughts = {task.demonstrate(task.problem("train", i), random.Random(i)).messages[-1].reasoning for i in range(50)}
    assert None in thoughts and len(thoughts) > 20  # a share answers without thinking


def test_bad_lines_are_named_or_counted(tmp_path: Path) -> None:
    good = [{"question": f"q{i}", "answer": i} for i in range(300)]
    with pytest.raises(UserError, match=r"line 1: no key 'question'\. Did you mean 'questions'"):
        make_task({"name": "jsonl", "path": lines(tmp_path / "b.jsonl", {"questions": "x", "answer": "y"})})
    with pytest.warns(UserWarning, match="1 of 301 lines can't be used, first line 301: not valid JSON"):
        make_task({"name": "jsonl", "path": lines(tmp_path / "c.jsonl", *good, "{broken")})
    with pytest.raises(UserError, match="can't be read"):
        make_task({"name": "jsonl", "path": str(tmp_path / "nothing.jsonl")})


def test_symbolic_grading_has_statuses(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": r"\boxed{\frac{1}{2}}"} for i in range(40)]
    task = make_task({"name": "jsonl", "path": lines(tmp_path / "m.jsonl", *rows), "format": "math"})
    problem = task.problem("train", 0)
    assert task.grade(problem, Message("assistant", r"\boxed{0.5}")).value == 1.0
    assert task.grade(problem, Message("assistant", r"\boxed{2}")).value == 0.0


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not at ../shared/data/gsm8k")
def test_gsm8k_labels_are_read_and_graded() -> None:
    task = make_task(
        {"name": "jsonl", "format": "gsm8k", "path": str(GSM8K / "train.jsonl"), "test_path": str(GSM8K / "test.jsonl")}
    )
    right = 0
    for i in range(1319):
        problem = task.problem("test", i)
        score = task.grade(problem, Message("assistant", f"The answer is {problem.answer}."))
        right += score.ok and score.value == 1.0
        assert task.grade(problem, Message("assistant", problem.answer + "9")).value == 0.0
    assert right == 1319
