"""Processes side by side: what they say, how they fail, and that nothing of them is left behind."""

import os
import signal
import threading
import time
from functools import partial
from typing import Any

import pytest

from trivet.config import UserError
from trivet.recipes.workers import Tell, side_by_side
from trivet.train.loop import Deferred, Interrupted


def count(upto: int, tell: Tell) -> int:
    for i in range(upto):
        tell(i)
    return upto


def work_in_steps(tell: Tell) -> None:
    """As training does: an interrupt is heard between two steps, and there is something to say of it."""
    with Deferred() as asked:
        tell(os.getpid())
        while not asked.stop:
            time.sleep(0.01)
    raise Interrupted("step 7 is saved")


def sleep(tell: Tell) -> None:
    tell(os.getpid())
    time.sleep(100)


def fail(error: Any, tell: Tell) -> None:
    raise error


def fail_oddly(tell: Tell) -> None:
    class Local(Exception):
        pass

    raise Local("no other process knows this class")


def die(tell: Tell) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def result_that_cannot_travel(tell: Tell) -> Any:
    return lambda: 1


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_more_jobs_than_workers() -> None:
    heard: dict[str, list[int]] = {}
    jobs = {f"job {n}": partial(count, n) for n in range(5)}
    done = dict(side_by_side(jobs, 2, 1, lambda name, message: heard.setdefault(name, []).append(message)))
    assert done == {f"job {n}": n for n in range(5)}
    assert heard == {f"job {n}": list(range(n)) for n in range(1, 5)}, "every message, in order, before the result"


def interrupted(jobs: Any, after: int) -> tuple[BaseException, list[int]]:
    """Send this process a Ctrl-C once `after` messages came; what was raised, and the pids that were told."""
    pids: list[int] = []

    def hear(name: str, message: int) -> None:
        pids.append(message)
        if len(pids) == after:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt) as raised:
        list(side_by_side(jobs, len(jobs), 1, hear))
    return raised.value, pids


def test_an_interrupt_with_one_worker_idle() -> None:
    """The idle one must not drag down the one that is saving, nor be waited for."""
    began = time.monotonic()
    said, pids = interrupted({"idle": partial(count, 0), "busy": work_in_steps}, after=1)
    assert isinstance(said, Interrupted) and str(said) == "step 7 is saved"
    assert not any(map(alive, pids)) and time.monotonic() - began < 60


def test_an_interrupt_while_workers_start() -> None:
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        list(side_by_side({"a": work_in_steps, "b": sleep}, 2, 1, lambda *_: None))
    timer.join()


def test_an_interrupt_ends_a_job_that_keeps_no_state() -> None:
    said, pids = interrupted({"a": sleep, "b": work_in_steps}, after=2)
    assert str(said) == "step 7 is saved" and len(pids) == 2 and not any(map(alive, pids))


def test_one_that_fails_stops_the_others() -> None:
    pids: list[int] = []
    with pytest.raises(UserError, match=r"^mend this$"):
        jobs = {"good": sleep, "bad": partial(fail, UserError("mend this"))}
        list(side_by_side(jobs, 2, 1, lambda name, message: pids.append(message)))
    assert not any(map(alive, pids))
    with pytest.raises(ZeroDivisionError) as raised:
        list(side_by_side({"bad": partial(fail, ZeroDivisionError("x"))}, 1, 1, lambda *_: None))
    assert "test_recipes_workers.py" in "".join(raised.value.__notes__)
    with pytest.raises(RuntimeError, match="no other process knows this class"):
        list(side_by_side({"bad": fail_oddly}, 1, 1, lambda *_: None))
    with pytest.raises(Exception, match="lambda"):
        list(side_by_side({"bad": result_that_cannot_travel}, 1, 1, lambda *_: None))


def test_a_worker_that_is_killed_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"worked on bad died \(exit code -9\)"):
        list(side_by_side({"good": sleep, "bad": die}, 2, 1, lambda *_: None))


def test_who_stops_listening_leaves_nothing_behind() -> None:
    pids: list[int] = []
    running = side_by_side({"long": sleep, "short": partial(count, 1)}, 2, 1, lambda name, pid: pids.append(pid))
    assert next(running) == ("short", 1)
    running.close()  # type: ignore[attr-defined]
    assert not any(alive(pid) for pid in pids if pid > 1)
