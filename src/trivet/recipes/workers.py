"""Jobs side by side, in processes of their own: small models gain more from a second process than a second thread.

A job is a picklable call that gets `tell`, by which it sends messages while it works. Ctrl-C and SIGTERM
are passed on as one SIGTERM, after which training saves its state and stops; when this process dies,
whatever of, the workers die with it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

import torch

from trivet.train.trainer import Deferred

R = TypeVar("R")
Tell = Callable[[Any], None]
_messages: Any = None  # in a worker: the queue to the process that started it


def side_by_side(
    jobs: Mapping[str, Callable[[Tell], R]], workers: int, threads: int, hear: Callable[[str, Any], None]
) -> Iterator[tuple[str, R]]:
    """Yield (name, result) as jobs end; `hear(name, message)` gets what they tell.

    The first job that raises stops the others; so does an interrupt, which is raised when all have stopped.
    """
    context = multiprocessing.get_context("spawn")
    messages = context.SimpleQueue()
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _begin, (threads, messages))
    running: dict[Future[R], str] = {}
    try:
        with Deferred() as asked:
            running = {pool.submit(_call, name, job): name for name, job in jobs.items()}
            while running:
                done, _ = wait(running, timeout=0.1, return_when=FIRST_COMPLETED)
                while not messages.empty():
                    hear(*messages.get())
                for future in done:
                    yield running.pop(future), future.result()
                if asked.stop:
                    raise KeyboardInterrupt
    except BaseException:
        said = _stop(pool, list(running))
        if said is not None:
            raise said from None
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _stop(pool: ProcessPoolExecutor, running: list[Future[R]]) -> BaseException | None:
    """Ask the workers to stop, wait until they have, and return what an interrupted job said."""
    for future in running:
        future.cancel()
    for worker in list(pool._processes.values()):
        if worker.is_alive() and worker.pid is not None:
            os.kill(worker.pid, signal.SIGTERM)
    for future in running:
        try:
            future.result()
        except KeyboardInterrupt as e:  # trainer.Interrupted, with the step that it saved
            if str(e):
                return e
        except BrokenProcessPool:
            return None  # a job that keeps no state was simply ended
        except BaseException as e:
            return e
    return None


def _begin(threads: int, messages: Any) -> None:
    global _messages
    _messages = messages
    os.setpgid(0, 0)  # a terminal's Ctrl-C reaches the parent only, which passes it on once
    torch.set_num_threads(threads)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _call(name: str, job: Callable[[Tell], R]) -> R:
    return job(lambda message: _messages.put((name, message)))
