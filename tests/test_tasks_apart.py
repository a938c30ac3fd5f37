"""Graders in processes of their own: what hangs, crashes or lies is a status, and the next one is graded."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trivet.agent.loop import Episode, ModelStep
from trivet.config import UserError
from trivet.messages import Completion, Message, Sampling, Score, StopReason
from trivet.rl import rollout
from trivet.rl.rollout import Job, grade_all
from trivet.tasks import Problem, apart, graded_apart, make_task
from trivet.tasks.apart import Pool, Worker, grade_apart
from trivet.tasks.symbolic import grade_math

RIGHT, WRONG, HANGS = r"\boxed{0.5}", r"\boxed{0.25}", "$9^{9^9}$"


# ------------------------------------------------------------------ graders, called by name in a worker
def right() -> Score:
    return Score(1.0, parts={"a": 0.25}, detail="fine")


def sleeps() -> Score:
    time.sleep(60)
    return Score(1.0)


def hangs_in_c() -> Score:
    return Score(float(len(str(9 ** (9**9)))))


def has_a_child(path: str) -> Score:
    child = subprocess.Popen(["sleep", "60"])
    Path(path).write_text(str(child.pid))
    time.sleep(60)
    return Score(1.0)


def dies() -> Score:
    os.kill(os.getpid(), signal.SIGSEGV)
    return Score(1.0)


def raises() -> Score:
    raise ValueError("no")


def prints() -> Score:
    print('{"value": 7}', flush=True)
    os.write(1, b"noise\n")
    return Score(1.0)


def not_a_number() -> Score:
    return Score(float("nan"))


def eats_memory() -> Score:
    return Score(float(len(bytearray(1 << 40))))


HERE = f"{__name__}:"


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    """One worker, so that a second grading meets what the first left behind."""
    mine = Pool(1)
    monkeypatch.setattr(apart, "_pool", mine)
    return mine


def test_two_answers_that_come_at_once_are_two_answers(pool: Pool) -> None:
    worker = Worker([HERE + "right", HERE + "hangs_in_c"])
    time.sleep(1.0)  # both are loaded before anyone reads
    assert worker.ask(HERE + "right", (), 5.0).value == 1.0
    worker.end()


@pytest.mark.parametrize(
    ("function", "status", "detail"),
    [
        ("sleeps", "timeout", "no answer in 0.3 s"),
        ("hangs_in_c", "timeout", "no answer"),
        ("dies", "error", "exit code -11"),
        ("raises", "error", "ValueError: no"),
        ("not_a_number", "error", "not a finite score: nan"),
        ("eats_memory", "error", "MemoryError"),
        ("prints", "ok", ""),
    ],
)
def test_whatever_a_grader_does_the_next_one_is_graded(pool: Pool, function: str, status: str, detail: str) -> None:
    assert grade_apart(HERE + "right") == Score(
        1.0, parts={"a": 0.25}, detail="fine"
    )  # loaded, so only the call is timed
    began = time.perf_counter()
    score = grade_apart(HERE + function, seconds=0.3)
    assert score.status == status and detail in score.detail and time.perf_counter() - began < 2
    assert score.value == (1.0 if status == "ok" else 0.0)
    assert grade_apart(HERE + "right").value == 1.0
    assert pool.counts["replaced"] == (status == "timeout" or function == "dies")
    pool.close()


def test_a_workers_children_end_with_it(pool: Pool, tmp_path: Path) -> None:
    assert grade_apart(HERE + "has_a_child", str(tmp_path / "pid"), seconds=1).status == "timeout"
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child of a killed worker still runs")
    pool.close()


def test_what_cannot_be_loaded_is_said_and_costs_no_worker(pool: Pool) -> None:
    for name, message in (("trivet.nothing:f", "No module named"), (HERE + "nothing", "KeyError: 'nothing'")):
        with pytest.raises(UserError, match=message):
            grade_apart(name)
    assert grade_apart(HERE + "right").value == 1.0 and pool.counts["replaced"] == 0
    pool.close()


# ------------------------------------------------------------------------------------------ mathematics
def marks(_: object = None) -> list[tuple[float, str]]:
    return [(s.value, s.status) for s in (grade_math(r"\frac{1}{2}", text) for text in (RIGHT, WRONG, "none"))]


EXPECTED = [(1.0, "ok"), (0.0, "ok"), (0.0, "ok")]


def test_mathematics_from_threads_and_coroutines() -> None:
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(marks, range(8))) == [EXPECTED] * 8

    async def all_of_them() -> list[list[tuple[float, str]]]:
        return [marks(), *await asyncio.gather(*(asyncio.to_thread(marks) for _ in range(4)))]

    assert asyncio.run(all_of_them()) == [EXPECTED] * 5


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_mathematics_from_other_processes(method: str) -> None:
    """A forked child inherits open pipes to its parent's workers, and must not use them."""
    assert marks() == EXPECTED
    with multiprocessing.get_context(method).Pool(1) as processes:
        assert processes.map(marks, [0]) == [EXPECTED]
        assert marks() == EXPECTED


def test_a_power_tower_is_a_timeout_and_soon_over() -> None:
    grade_math("1", RIGHT)
    began = time.perf_counter()
    assert grade_math(r"\frac{1}{2}", HANGS).status == "timeout"
    assert time.perf_counter() - began < 2
    assert marks() == EXPECTED


def test_alarms_of_the_library_fail_in_threads_which_is_why() -> None:
    """The twin: called as its documentation shows, in a thread, math-verify grades nothing."""
    from math_verify import parse

    seen: list[object] = []

    def in_a_thread() -> None:
        try:
            seen.append(parse(RIGHT, raise_on_error=True))
        except ValueError as e:
            seen.append(e)

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert isinstance(seen[0], ValueError)


def test_a_reference_that_is_no_mathematics_is_unparsed() -> None:
    assert grade_math("", RIGHT).status == "unparsed"


def test_workers_end_with_their_process() -> None:
    code = (
        "from trivet.tasks.symbolic import grade_math\nfrom trivet.tasks.apart import pool\n"
        f"grade_math('1', {RIGHT!r})\nprint(pool()._all[0].process.pid)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


# ------------------------------------------------------------------------------------------ side by side
class Slow:
    """Grades a number by itself, slowly; how many do so at once is counted."""

    name, tools, levels = "slow", (), (0,)

    def __init__(self) -> None:
        self.lock, self.now, self.most = threading.Lock(), 0, 0

    def problem(self, split: str, index: int, level: int | None = None) -> Problem:
        return Problem(str(index), "?", str(index))

    def grade(self, problem: Problem, message: Message) -> Score:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.01 * (5 - int(problem.id) % 5))  # later ones are done first
        with self.lock:
            self.now -= 1
        if problem.id == "7":
            raise ValueError("no")
        return Score(float(problem.answer))


@pytest.mark.parametrize("apart_", [True, False])
def test_graders_in_processes_work_side_by_side_and_scores_keep_their_order(
    apart_: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "graded_apart", lambda task: apart_)
    monkeypatch.setattr(rollout, "WORKERS", 3)
    task = Slow()
    jobs = [Job(task, task.problem("test", i), Sampling()) for i in range(20)]  # type: ignore[arg-type]
    done = Completion("1", (), (), (), (), StopReason.END, ())
    episode = Episode((), (ModelStep(Message("assistant", "1", completion=done)),), StopReason.END)
    scores = grade_all(jobs, [episode] * 20)
    assert [s.value for s in scores] == [float(i) if i != 7 else 0.0 for i in range(20)]
    assert [i for i, s in enumerate(scores) if not s.ok] == [7] and "ValueError: no" in scores[7].detail
    assert task.most == (3 if apart_ else 1)  # the twin: other graders are not asked from threads


def test_who_is_graded_apart(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"question": "{i}", "answer": "{i}"}}\n' for i in range(40)))
    rows = {"name": "jsonl", "path": str(tmp_path / "a.jsonl")}
    levels = {"name": "gym:leg_counting", "levels": 2, "curriculum": True}
    apart_ = [make_task(t) for t in ({"name": "gym:leg_counting"}, levels, {**rows, "format": "math"})]
    here = [make_task(t) for t in ({"name": "chain"}, {**rows, "format": "number"})]
    assert all(map(graded_apart, apart_)) and not any(map(graded_apart, here))
