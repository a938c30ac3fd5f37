"""The engine: many requests, one batch, one forward pass a step.

One rule drives it: *computed catches up with wanted*. A row wants the tokens of its prompt, those it
has sampled, and those that were forced on it; its cache holds the first `computed` of them. Rows that
have much to catch up with (a new prompt, a request that was set aside and comes back) do it in pieces of
bounded size (`filling.py`); all others are fed one token a step, and where that was the last one known, sample
another (`decoding.py`). So prompts, forced tokens, prefixes that were found and interrupted requests need no code of
their own. Here is how requests come and go.

Python touches a single request only when it starts, ends, or has its thought cut.

Left out: paging (rows are contiguous).
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Literal

import torch

from trivet.chat import Chat
from trivet.config import UserError
from trivet.engine.decoding import Decoding
from trivet.engine.filling import Filling
from trivet.engine.policy import Full, Policy
from trivet.engine.prefix import PrefixStats, PrefixStore
from trivet.engine.request import Limits, Live, Request, Saved
from trivet.engine.rows import SPAN_STEP, Rows
from trivet.engine.speculate import Drafter
from trivet.engine.stats import Stats
from trivet.engine.writing import Writer
from trivet.messages import Completion, StopReason
from trivet.model import Transformer

PREFIX_BYTES = 2**28  # a fair store for conversations
IDLE_SHARE = 0.25  # finished rows beyond this share of the batch are removed


class Engine:
    """Continuous batching over at most `max_rows` sequences of at most `slots` tokens each.

    prefix_bytes: room for prefixes to start from, 0 for none (questions that are asked once share nothing).
    They are forgotten when the weights change. drafter: guesses tokens ahead, which changes the speed only.
    policy: what the layers keep (`policy.py`); everything by default. Raises UserError where these don't go together.
    """

    def __init__(
        self,
        model: Transformer,
        chat: Chat,
        max_rows: int = 256,
        slots: int = 512,
        device: torch.device | str | None = None,
        record_experts: bool = False,
        prefix_bytes: int = 0,
        drafter: Drafter | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.model, self.chat = model, chat
        self.policy = policy or Full()
        self.policy.check(model.spec)
        if prefix_bytes and not self.policy.resumes:
            raise UserError(
                f"Cache {self.policy.name} forgets, so no later prompt can go on from it: prefix_bytes = 0."
            )
        if drafter is not None and self.policy.block:
            raise UserError(f"Cache {self.policy.name} works block by block and can't take guesses back: no drafter.")
        self.max_rows, self.slots = max_rows, slots
        self.device = torch.device(device) if device is not None else model.embed.device
        self.record_experts = record_experts
        self.stats = Stats()
        self.drafter, self.prefix_bytes = drafter, prefix_bytes
        self.writer = Writer(model, chat)
        self._begin()
        self._next_id = 0
        self._waiting: deque[Live] = deque()
        self._by_id: dict[int, Live] = {}
        self._ended: list[tuple[int, Completion]] = []  # since the last step returned

    def _begin(self) -> None:
        """With an empty batch, and no prefixes."""
        extra = self.drafter.mixers if self.drafter is not None else ()
        self.rows = Rows(self.model, self.device, self.slots, self.record_experts, extra, self.policy)
        self.filling = Filling(self.rows, self.writer, self.drafter, self.stats, self.prefix_bytes)
        self.decoding = Decoding(self.rows, self.writer, self.drafter, self.stats)

    # --- requests ----------------------------------------------------------------------------------
    def add(self, request: Request) -> int:
        """Queue a request. Raises UserError where it asks for what can't be kept."""
        live = Live(self._next_id, request, Limits.of(request, self.chat, self.slots))
        if request.so_far is not None:
            live.saved = Saved.of(request, request.so_far, live.limits, self.chat)
            live.take_sets(request.so_far)
        self.writer.prepare(live)
        self._next_id += 1
        self._waiting.append(live)
        self._by_id[live.id] = live
        return live.id

    @torch.inference_mode()
    def cancel(self, id: int) -> None:
        """End a request now, with what it has so far; the next step returns it."""
        live = self._by_id.get(id)
        if live is None:
            return
        if live.row < 0:
            self._waiting.remove(live)
        self._finish(live, StopReason.CANCELLED)

    def set_budget(self, id: int, thinking: int | Literal["off"] | None) -> None:
        """Give a request that waits or runs another thinking budget; what it has thought so far counts.

        Raises UserError for one that contradicts its minimum.
        """
        live = self._by_id.get(id)
        if live is None:
            return
        sampling = replace(live.request.sampling, thinking=thinking)
        request = replace(live.request, sampling=sampling)
        live.request, live.limits = request, Limits.of(request, self.chat, self.slots)
        if live.row >= 0:
            self.rows.budget[live.row] = live.limits.budget
        elif live.saved is not None:
            live.saved.known["budget"] = live.limits.budget

    def cancel_all(self) -> None:
        for id in list(self._by_id):
            self.cancel(id)

    @property
    def busy(self) -> bool:
        return bool(self._by_id)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Run requests to their end; completions in the order of the requests."""
        done = {self.add(request): None for request in requests}
        results: dict[int, Completion] = {}
        while len(results) < len(done):
            results |= {id: c for id, c in self.step() if id in done}
        return [results[id] for id in done]

    def so_far(self, id: int) -> tuple[int, ...]:
        """Tokens that a running request has produced."""
        return tuple(self.rows.written(self._by_id[id]))

    @property
    def prefixes(self) -> PrefixStore | None:
        return self.filling.prefixes

    @property
    def prefix_stats(self) -> PrefixStats:
        return self.prefixes.stats if self.prefixes is not None else PrefixStats()

    # --- one step ----------------------------------------------------------------------------------
    @torch.inference_mode()
    def step(self) -> list[tuple[int, Completion]]:
        """Admit what fits, let prompts catch up by a piece, feed every other row one token; returns what ended."""
        began = time.perf_counter()
        try:
            self._admit()
            self.filling.fill()
            for row, reason, error in self.decoding.step():
                self._finish(self.rows.live[row], reason, error)
            self.decoding.guess()
        except (torch.OutOfMemoryError, RuntimeError) as e:
            if not _out_of_memory(e):
                raise
            self._shrink(e)
        self.stats.cache_bytes = max(self.stats.cache_bytes, self.rows.nbytes)
        self.rows.compact(IDLE_SHARE)
        self.stats.seconds += time.perf_counter() - began
        ended, self._ended = self._ended, []
        return ended

    def _admit(self) -> None:
        """First come, first served."""
        rows = self.rows
        new = list(islice(self._waiting, max(self.max_rows - len(rows), 0)))
        if not new:
            return
        rows.reserve(len(rows) + len(new), max(live.known for live in new) + SPAN_STEP, self.max_rows)
        for _ in new:  # only now: there may have been no memory
            self._waiting.popleft()
        self.filling.admit(new)
        self.stats.peak_rows = max(self.stats.peak_rows, len(rows))

    def _finish(self, live: Live | None, reason: StopReason, error: str | None = None) -> None:
        assert live is not None
        self.filling.pass_on(live)
        row, start = live.row, len(live.request.prompt)
        known = self.rows.read(live)
        tokens, sampled, logprobs, raw = (
            tuple(known[name][start:].tolist()) for name in ("tokens", "sampled", "logprobs", "raw_logprobs")
        )
        experts = [t[:-1] for t in known["experts"]] if self.record_experts else None
        done = Completion(
            self.chat.decode(tokens), tokens, sampled, logprobs, raw, reason, live.request.prompt,
            int(known["thought"]), bool(known["hit"]), experts, error, live.reported_tops(len(tokens)),
            tuple(live.prompt_logprobs) if live.request.sampling.prompt_logprobs else None,
            live.reported_sets(len(tokens)),
        )  # fmt: skip
        if row >= 0:
            if reason is StopReason.ERROR:
                self.rows.clear(row)  # what is not finite must not meet the row's next request, even masked
            else:
                self.filling.keep(row)
            self.rows.stop(row)
        del self._by_id[live.id]
        self.writer.forget(live)
        self._ended.append((live.id, done))

    # --- setting aside -----------------------------------------------------------------------------
    @torch.inference_mode()
    def set_aside(self, id: int) -> None:
        """Take a running request out of the batch, to go on behind those that wait, as if nothing had happened."""
        live = self._by_id.get(id)
        if live is None or live.row < 0:
            return
        self.filling.pass_on(live)
        self.filling.keep(live.row)
        self._waiting.append(self.rows.take_out(live.row))
        self.stats.set_aside += 1

    def _shrink(self, why: Exception) -> None:
        """Memory ran out: all start over from their tokens, half as many at a time. One alone fails."""
        running = [live for live in self.rows.live if live is not None]
        if len(running) <= 1 and self.max_rows == 1:
            for live in running or [self._waiting.popleft()]:
                self._finish(live, StopReason.ERROR, f"memory ran out with one request of {live.known} tokens: {why}")
            running = []
        for live in running:
            live.followers = []
        self._waiting.extendleft(self.rows.take_out(live.row) for live in reversed(running))
        self.max_rows = max(1, min(self.max_rows, max(len(running), len(self.rows))) // 2)
        self._begin()
        self.stats.set_aside, self.stats.shrunk = self.stats.set_aside + len(running), self.stats.shrunk + 1
        warnings.warn(
            f"Memory ran out: the batch is now at most {self.max_rows} requests, and prefixes are forgotten.",
            stacklevel=3,
        )


def _out_of_memory(e: Exception) -> bool:
    """A GPU has a type for it, a CPU only words."""
    return isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e) or "not enough memory" in str(e)
