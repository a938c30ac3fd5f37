"""Jobs side by side, in processes of their own: small models gain more from a second process than a second thread.

A job is a picklable call that gets `tell`, by which it sends messages while it works. Ctrl-C and SIGTERM
are passed on as one SIGTERM, after which training saves its state and stops; when this process dies,
whatever of, the workers die with it.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import torch

from trivet.config import UserError
from trivet.recipes.memory import keep_freed_memory
from trivet.train.loop import Deferred

R = TypeVar("R")
Tell = Callable[[Any], None]


class Worker:
    """A process, the pipe to it, and the name of the job that it works on."""

    def __init__(self, threads: int):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_work, args=(theirs, threads), daemon=True)
        self.process.start()
        theirs.close()  # so that its death is an end of file here
        self.job: str | None = None

    def begin(self, name: str, job: Callable[[Tell], Any]) -> None:
        self.job = name
        with suppress(BrokenPipeError):  # it died: the next `hear` says so
            self.pipe.send(job)

    def hear(self) -> tuple[str, Any]:
        """The next of ("told", message), ("result", value), ("raised", exception), ("died", exit code)."""
        try:
            kind, value = self.pipe.recv()
        except (EOFError, OSError):  # also in the middle of a message
            self.process.join()
            kind, value = "died", self.process.exitcode
        if kind != "told":
            self.job = None
        return kind, value


def side_by_side(
    jobs: Mapping[str, Callable[[Tell], R]], workers: int, threads: int, hear: Callable[[str, Any], None]
) -> Iterator[tuple[str, R]]:
    """Yield (name, result) as jobs end; `hear(name, message)` gets what they tell.

    The first job that raises stops the others; so does an interrupt, which is raised when all have stopped.
    """
    waiting = list(jobs)
    crew = [Worker(threads) for _ in range(min(workers, len(jobs)))]
    try:
        with Deferred() as asked:
            while True:
                for worker in crew:
                    if worker.job is None and waiting:
                        worker.begin(name := waiting.pop(0), jobs[name])
                busy = {worker.pipe: worker for worker in crew if worker.job is not None}
                if not busy:
                    return
                for pipe in wait(list(busy), timeout=0.1):
                    worker = busy[pipe]  # type: ignore[index]
                    name = worker.job or ""
                    kind, value = worker.hear()
                    if kind == "told":
                        hear(name, value)
                    elif kind == "result":
                        yield name, value
                    elif kind == "raised":
                        raise value
                    else:
                        raise UserError(
                            f"The process that worked on {name} died (exit code {value}): out of memory, or killed. "
                            "The same command goes on from the last saved state."
                        )
                if asked.stop:
                    raise KeyboardInterrupt
    except BaseException:
        said = _stop(crew)
        if said is not None:
            raise said from None
        raise
    finally:
        for worker in crew:
            worker.pipe.close()  # an idle worker reads the end of its work
        for worker in crew:
            worker.process.join()


def _stop(crew: list[Worker]) -> BaseException | None:
    """Ask those at work to stop, wait until they have, and return what the first one said of it."""
    said: BaseException | None = None
    busy = [worker for worker in crew if worker.job is not None]
    for worker in busy:
        worker.process.terminate()  # a job that keeps no state simply ends
    for worker in busy:
        while worker.job is not None:
            kind, value = worker.hear()
            if kind == "raised" and str(value):  # loop.Interrupted, with the step that it saved
                said = said or value
    return said


# ------------------------------------------------------------------------------------- in the worker
def _work(pipe: Connection, threads: int) -> None:
    """Do what comes through the pipe until it is closed."""
    with suppress(OSError):
        os.setpgid(0, 0)  # a terminal's Ctrl-C reaches the parent only, which passes it on once
    keep_freed_memory()
    torch.set_num_threads(threads)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("result", job(lambda message: pipe.send(("told", message)))))
        except BaseException as e:
            pipe.send(("raised", _portable(e)))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _portable(error: BaseException) -> BaseException:
    """The exception with its traceback as a note, or one that tells it, where it can't be sent."""
    text = "".join(traceback.format_exception(error))
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))  # what the pipe does, here and there
    except Exception as e:
        return RuntimeError(f"{text}(told as text, for it can't be sent: {e})")
    if not isinstance(error, UserError | KeyboardInterrupt):
        error.add_note(text)
    return error
