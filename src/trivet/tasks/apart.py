"""Graders that may hang or crash run apart: in worker processes with a hard limit of wall-clock time.

    grade_apart("trivet.tasks.symbolic:same_math", reference, text)  ->  Score
    call_apart("module:maker [1, 2]", 3)                             ->  what maker(1, 2)(3) gives, as JSON, or a Score

What a model writes can keep sympy busy for ever (`9**9**9`), and a library's own SIGALRM works only in
the main thread: in others it fails, and every score becomes a silent 0. So the clock is the parent's.
A worker that does not answer in time is killed with all its children and replaced ("timeout"); one that
dies is replaced ("error"); what its function raises is an "error", too. None of these is a 0.

A worker is `python -m trivet.tasks.worker`: it starts when a grading finds all others busy, imports what
it needs before its clock runs, and ends with this process. It may be used from any thread, from coroutines
(which it blocks), from spawned and from forked processes: each process has workers of its own.
Left out: Windows (no process groups), and protection against a grader that means harm.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from trivet.config import UserError
from trivet.messages import Score

SECONDS = 1.5  # for one grading; a usual one takes a hundredth
START_SECONDS = 120.0  # for a worker to import its libraries, on a machine that is busy
WORKERS = min(8, os.cpu_count() or 1)
LARGEST = 1 << 20  # bytes of an answer; more means a worker out of its mind


class _Dead(Exception):
    """The worker ended by itself."""


class Worker:
    """One process that answers one request at a time, JSON lines both ways."""

    def __init__(self, functions: Collection[str] = ()) -> None:
        path = os.pathsep.join(p for p in sys.path if p)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trivet.tasks.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
        )  # fmt: skip
        self.loaded: dict[str, str | None] = {}  # functions that were asked for, and why one can't be had
        self.loading: list[str] = []  # asked for, not yet answered
        self.unread = b""  # of its answers: two may have come at once
        for function in functions:
            self.load(function)

    def load(self, function: str) -> None:
        self.send({"load": function})
        self.loading.append(function)

    def ask(self, function: str, args: tuple[Any, ...], seconds: float) -> Any:
        """Raises TimeoutError and _Dead, after which the worker is of no more use."""
        if function not in {*self.loaded, *self.loading}:
            self.load(function)
        while self.loading:
            answer = self.receive(time.monotonic() + START_SECONDS)
            self.loaded[self.loading.pop(0)] = answer["raised"]
        problem = self.loaded[function]
        if problem is not None:
            raise UserError(problem)
        deadline = time.monotonic() + seconds
        self.send({"call": function, "args": args, "seconds": seconds})
        answer = self.receive(deadline)
        return Score(**answer["score"]) if "score" in answer else answer["value"]

    def send(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise _Dead from None

    def receive(self, deadline: float) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.read_line(deadline))
        return answer

    def read_line(self, deadline: float) -> bytes:
        assert self.process.stdout is not None
        found = select.poll()
        found.register(self.process.stdout, select.POLLIN | select.POLLHUP)
        while b"\n" not in self.unread:
            left = deadline - time.monotonic()
            if left <= 0 or not found.poll(left * 1000):
                raise TimeoutError
            piece = os.read(self.process.stdout.fileno(), 1 << 16)
            self.unread += piece
            if not piece or len(self.unread) > LARGEST:
                raise _Dead
        line, _, self.unread = self.unread.partition(b"\n")
        return line

    def end(self) -> str:
        """Kill it and its children; says how it had ended, if it had."""
        try:
            code = self.process.wait(0.05)
        except subprocess.TimeoutExpired:
            code = None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what was not yet written is of no interest
                pipe.close()
        return "killed" if code is None else f"exit code {code}"


class Pool:
    """Workers of this process. `counts`: graded, timeout, crashed, replaced."""

    def __init__(self, size: int = WORKERS) -> None:
        self.counts: Counter[str] = Counter()
        self._idle: list[Worker] = []
        self._all: list[Worker] = []
        self._room = threading.Semaphore(size)
        self._lock = threading.Lock()

    def call(self, function: str, args: tuple[Any, ...], seconds: float) -> Any:
        with self._room:
            worker = self._take()
            try:
                answer = worker.ask(function, args, seconds)
                self._give(worker, "graded")
                return answer
            except UserError:  # a library is missing; the worker is well
                self._give(worker, "refused")
                raise
            except TimeoutError:
                self._replace(worker, "timeout")
                return Score(0.0, "timeout", detail=f"{function}: no answer in {seconds:g} s")
            except _Dead:
                how = self._replace(worker, "crashed")
                return Score(0.0, "error", detail=f"{function}: its process ended, {how}")
            except BaseException:  # an interrupt: what the worker will say belongs to nobody
                self._replace(worker, "interrupted")
                raise

    def _take(self) -> Worker:
        with self._lock:
            if not self._idle:
                self._all.append(Worker())
                return self._all[-1]
            return self._idle.pop()

    def _give(self, worker: Worker, what: str) -> None:
        with self._lock:
            self.counts[what] += 1
            self._idle.append(worker)

    def _replace(self, worker: Worker, what: str) -> str:
        """End it and start another one, which loads while others work."""
        how = worker.end()
        with self._lock:
            self.counts.update((what, "replaced"))
            self._all.remove(worker)
            self._all.append(Worker(worker.loaded))
            self._idle.insert(0, self._all[-1])  # the last to be taken
        return how

    def close(self) -> None:
        with self._lock:
            for worker in self._all:
                worker.end()
            self._all.clear()
            self._idle.clear()


_pool: Pool | None = None
_making = threading.Lock()


def pool() -> Pool:
    """This process's workers; none runs before the first grading."""
    global _pool
    with _making:
        if _pool is None:
            _pool = Pool()
            atexit.register(_pool.close)
        return _pool


def _forked() -> None:
    """A forked child must not talk to its parent's workers."""
    global _pool, _making
    if _pool is not None:
        atexit.unregister(_pool.close)
    _pool, _making = None, threading.Lock()


os.register_at_fork(after_in_child=_forked)


def call_apart(function: str, *args: Any, seconds: float = SECONDS) -> Any:
    """`module:function` called with JSON values in a worker: what it returns, JSON or a Score.

    Where it fails, takes too long or dies that is a Score that is not ok. "module:maker [...]" is what the maker
    returns for these JSON arguments, made once in each worker and not timed with the calls.
    Raises UserError where the function can't be loaded: a library is missing.
    """
    return pool().call(function, args, seconds)


def grade_apart(function: str, *args: Any, seconds: float = SECONDS) -> Score:
    """`call_apart` of a function that returns a Score."""
    score = call_apart(function, *args, seconds=seconds)
    if not isinstance(score, Score):
        raise TypeError(f"{function} returned no Score but {score!r:.80}")
    return score
