"""The engine: many requests, one batch, one forward pass a step.

One rule drives it: *computed catches up with wanted*. A row wants the tokens of its prompt, those it
has sampled, and those that were forced on it; its cache holds the first `computed` of them. Rows that
have much to catch up with (a new prompt, a request that was set aside and comes back) do it in pieces of
bounded size; all others are fed one token a step, and where that was the last one known, sample another.
So prompts, forced tokens, prefixes that were found and interrupted requests need no code of their own.

A prompt is computed once: what earlier requests computed is found in the prefix store, and of requests with
the same prompt that wait for each other one computes it and the others copy its row.

Python touches a single request only when it starts, ends, or has its thought cut.

Left out: paging (rows are contiguous).
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import numpy as np
import torch

from trivet.chat import Chat
from trivet.config import UserError
from trivet.engine.policy import Full, Policy
from trivet.engine.prefix import PrefixStats, PrefixStore
from trivet.engine.request import Limits, Live, Request, Saved
from trivet.engine.rows import SPAN_STEP, Rows
from trivet.engine.speculate import Drafter
from trivet.engine.writing import Writer
from trivet.messages import Completion, StopReason
from trivet.model import Routing, Transformer

PIECE_TOKENS = 16_384  # padded prompt tokens of one call
LONGEST_PIECE = 2_048  # of one row: bounds what a layer holds at a time
SNAPSHOT_EVERY = 512  # prompt tokens, where layers keep states: a later prompt may go on from there
PREFIX_BYTES = 2**28  # a fair store for conversations
IDLE_SHARE = 0.25  # finished rows beyond this share of the batch are removed


@dataclass
class Stats:
    """What the engine did since it was made."""

    prompt_tokens: int = 0  # computed
    shared_tokens: int = 0  # prompt tokens that a copy of another row saved
    cached_tokens: int = 0  # prompt tokens that the prefix store saved
    decode_tokens: int = 0
    guessed_tokens: int = 0  # by a drafter
    right_tokens: int = 0  # of them
    seconds: float = 0.0
    peak_rows: int = 0
    cache_bytes: int = 0
    set_aside: int = 0  # requests that had to leave the batch and came back
    shrunk: int = 0  # times that memory ran out and the batch was made smaller

    @property
    def tokens_per_second(self) -> float:
        return self.decode_tokens / self.seconds if self.seconds else 0.0


End = tuple[int, StopReason, str | None]  # row, why, and what went wrong


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
        self.drafter = drafter
        self.rows = self._no_rows()
        self.writer = Writer(model, chat)
        self.prefix_bytes = prefix_bytes
        self._weights = 0  # their version when the prefixes were computed
        self.prefixes: PrefixStore | None = None
        self._next_id = 0
        self._waiting: deque[Live] = deque()
        self._by_id: dict[int, Live] = {}
        self._ended: list[tuple[int, Completion]] = []  # since the last step returned

    def _no_rows(self) -> Rows:
        extra = self.drafter.mixers if self.drafter is not None else ()
        return Rows(self.model, self.device, self.slots, self.record_experts, extra, self.policy)

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
    def prefix_stats(self) -> PrefixStats:
        return self.prefixes.stats if self.prefixes is not None else PrefixStats()

    # --- one step ----------------------------------------------------------------------------------
    @torch.inference_mode()
    def step(self) -> list[tuple[int, Completion]]:
        """Admit what fits, let prompts catch up by a piece, feed every other row one token; returns what ended."""
        began = time.perf_counter()
        try:
            self._admit()
            self._fill()
            self._decode()
        except (torch.OutOfMemoryError, RuntimeError) as e:
            if not _out_of_memory(e):
                raise
            self._shrink(e)
        self.rows.compact(IDLE_SHARE)
        self.stats.seconds += time.perf_counter() - began
        ended, self._ended = self._ended, []
        return ended

    def _admit(self) -> None:
        """First come, first served. Requests with one prompt start together: the first computes it for all."""
        rows = self.rows
        new = list(islice(self._waiting, max(self.max_rows - len(rows), 0)))
        if not new:
            return
        self._reserve(len(rows) + len(new), max(live.known for live in new) + SPAN_STEP)
        for _ in new:
            self._waiting.popleft()
        new.sort(key=lambda live: -live.known)  # neighbours are of a length; the order of equals stays
        first: dict[tuple[int, ...], Live] = {}
        for live in new:
            fresh = live.known == len(live.request.prompt)  # nothing written yet
            rows.start(live)
            if fresh and not live.request.sampling.prompt_logprobs:
                leader = first.setdefault(live.request.prompt, live)
                if leader is not live:
                    leader.followers.append(live)
                    rows.follows[live.row], rows.filling[live.row] = True, False
        self._prepare_prefixes()
        for live in new:
            if not rows.follows[live.row]:
                self._look_up(live.row)
        self.stats.peak_rows = max(self.stats.peak_rows, len(rows))

    def _reserve(self, rows: int, columns: int) -> None:
        if self.rows.reserve(rows, min(columns, self.slots), self.max_rows):
            self.stats.cache_bytes = max(self.stats.cache_bytes, self.rows.nbytes)

    def _prepare_prefixes(self) -> None:
        """A store that belongs to the weights as they are."""
        if not self.prefix_bytes:
            return
        weights = sum(p._version for p in self.model.parameters())
        if self.prefixes is None:
            self.prefixes = PrefixStore(self.rows.caches, self.prefix_bytes)
        elif weights != self._weights:
            self.prefixes.forget()
        self._weights = weights

    def _look_up(self, row: int) -> None:
        """Start a row from what is known of its tokens; the last one is always fed, for its logits."""
        rows = self.rows
        body = rows.tokens[row, : rows.wanted[row] - 1].tolist()
        live = rows.live[row]
        assert live is not None
        if self.prefixes is not None and not live.request.sampling.prompt_logprobs:  # which need every token computed
            hit = self.prefixes.find(body)
            self.prefixes.count(hit, len(body))
            if hit.length:
                self.prefixes.load(hit, rows.caches, row)
                rows.computed[row] = rows.drafted[row] = hit.length
                self.stats.cached_tokens += hit.length
        if rows.computed[row] == len(body):
            self._filled(row)

    def _fill(self) -> None:
        """Let rows with much to catch up with compute a piece: neighbours together, as many as a piece holds."""
        rows, n = self.rows, len(self.rows)
        left = np.where(rows.filling[:n], rows.wanted[:n] - 1 - rows.computed[:n], 0)
        room = PIECE_TOKENS
        for first in np.flatnonzero(left):
            if left[first] == 0:
                continue  # went with a neighbour
            stop, width = int(first), 0
            while stop < n and left[stop]:
                wider = max(width, min(int(left[stop]), LONGEST_PIECE))
                if stop > first and wider * (stop + 1 - first) > room:
                    break
                stop, width = stop + 1, wider
            part = slice(int(first), stop)
            start, counts = rows.computed[part].copy(), np.minimum(left[part], width)
            if self.prefixes is not None and self.prefixes.states:
                counts = np.minimum(counts, SNAPSHOT_EVERY - start % SNAPSHOT_EVERY)
            if self.policy.block:
                counts = np.minimum(counts, self.policy.block - start % self.policy.block)
            hidden = self._feed(part, counts)
            self.writer.read_prompts(rows, part, counts, hidden)
            if self.drafter is not None:
                whole = rows.computed[part] == rows.wanted[part] - 1
                self.drafter.look_ahead(rows, part, start, counts, hidden, whole)
            self.stats.prompt_tokens += int(counts.sum())
            left[part] = 0
            for row in range(part.start, part.stop):
                self._filled(row)
            room -= width * (stop - int(first))
            if room <= 0:
                return

    def _filled(self, row: int) -> None:
        """After a piece: keep it for later requests; whoever waits for this prompt copies it once it is whole."""
        rows = self.rows
        live, computed = rows.live[row], int(rows.computed[row])
        assert live is not None
        rows.filling[row] = computed < rows.wanted[row] - 1
        store = self.prefixes
        if store is not None and (not rows.filling[row] or (store.states and computed % SNAPSHOT_EVERY == 0)):
            store.save(rows.tokens[row, :computed].tolist(), rows.caches, row)
        if rows.filling[row] or not live.followers:
            return
        targets = [other.row for other in live.followers]
        source = torch.full((len(targets),), row, device=self.device)
        for cache in rows.caches:
            cache.copy_rows(source, torch.tensor(targets, device=self.device))
        for table in rows.experts:
            table[targets, :computed] = table[row, :computed]
        rows.computed[targets], rows.follows[targets] = computed, False
        live.followers = []
        self.stats.shared_tokens += computed * len(targets)

    def _decode(self) -> None:
        """Feed every row that is not busy with its prompt what it lacks, and what is guessed to follow; write on.

        Guesses are checked by writing on as always: a row goes on to its next position while what it wrote is
        what had been guessed there. So speculation changes no token, whatever the settings.
        """
        rows, n = self.rows, len(self.rows)
        ready = rows.alive[:n] & ~rows.filling[:n] & ~rows.follows[:n]
        if not ready.any():
            return
        ahead = self.drafter.ahead if self.drafter is not None else 0
        forced = len(self.chat.closing_ids)
        if rows.least[:n].any():
            forced = max(forced, len(self.chat.continuing_ids))
        self._reserve(n, int(rows.wanted[:n].max()) + 1 + ahead + forced)
        known, start = rows.wanted[:n].copy(), rows.computed[:n].copy()
        # Forced tokens go one by one with the others; what a wrong guess made a state forget, all at once.
        lacking = np.where(ready, np.minimum(known - start, 1 + ahead), 0)
        guessed = np.where(ready & (lacking == known - start), rows.guessed[:n], 0)
        guesses = rows.tokens[np.arange(n)[:, None], np.minimum(known[:, None] + np.arange(ahead), rows.columns - 1)]
        before = [(cache, cache.view(slice(0, n)).copy()) for cache in rows.states] if guessed.any() else []
        hidden = self._feed(slice(0, n), lacking + guessed)
        rows.computed[:n] -= guessed  # until they have turned out to be right
        going = np.flatnonzero(ready & (rows.computed[:n] == known))
        right, ends = self._write_on(going, hidden, lacking, known, guessed, guesses)
        self.stats.guessed_tokens += int(guessed.sum())
        self.stats.right_tokens += int(right.sum())
        rows.computed[:n] += right
        for cache, copy in before:  # what read a wrong guess starts again from before it
            wrong = torch.from_numpy(np.flatnonzero(right < guessed)).to(self.device)
            cache.copy_rows(wrong, wrong, copy)
            rows.computed[:n] = np.where(right < guessed, start, rows.computed[:n])
        rows.guessed[:n] = 0
        for row, reason, error in ends:
            self._finish(rows.live[row], reason, error)
        if self.drafter is not None:
            certain = np.where(rows.alive[:n], lacking + right, 0)
            goes_on = rows.alive[:n] & ready & (rows.wanted[:n] == start + certain + 1)
            self.drafter.look_ahead(rows, slice(0, n), start, certain, hidden, goes_on)

    def _write_on(
        self,
        going: np.ndarray,
        hidden: torch.Tensor,
        fed: np.ndarray,
        known: np.ndarray,
        guessed: np.ndarray,
        guesses: np.ndarray,
    ) -> tuple[np.ndarray, list[End]]:
        """Write a token in the rows `going`, then another in those whose guess it was, and so on.

        -> how many of each row's guesses were right, and the rows that ended, with the reason.
        """
        rows, right, ends = self.rows, np.zeros(len(known), np.int64), list[End]()
        ahead = guesses.shape[1]
        for depth in range(1 + ahead):
            if not len(going):
                break
            self.stats.decode_tokens += len(going)
            failed = self.writer.extend(rows, going, hidden[going, fed[going] - 1 + depth])
            going = going[~np.isin(going, [row for row, _ in failed])]
            over = self.writer.ended(rows, going)
            ends += [(row, StopReason.ERROR, error) for row, error in failed] + [(*end, None) for end in over]
            going = going[~np.isin(going, [row for row, _ in over])]
            if depth == ahead:
                break
            going = going[depth < guessed[going]]
            at = known[going] + depth
            # Forced tokens may have come instead of one that was drawn: then the guesses are of no use any more.
            going = going[(rows.wanted[going] == at + 1) & (rows.tokens[going, at] == guesses[going, depth])]
            right[going] += 1
        return right, ends

    def _feed(self, part: slice, counts: np.ndarray) -> torch.Tensor:
        """Compute the next counts[i] tokens of each row of a part of the batch -> hidden [B,T,D]."""
        rows, start = self.rows, self.rows.computed[part].copy()
        tokens, positions, span = rows.read_on(part, start, counts)
        caches = rows.caches if part.start == 0 else [cache.view(part) for cache in rows.caches]
        routing = Routing() if self.record_experts else None
        hidden: torch.Tensor = self.model(tokens, positions, caches, span, routing)
        if routing is not None:
            real = np.arange(tokens.shape[1]) < counts[:, None]
            row, column = np.nonzero(real)
            for table, chosen in zip(rows.experts, routing.experts, strict=True):
                table[row + part.start, start[row] + column] = chosen.cpu().numpy()[real]
        rows.computed[part] += counts
        return hidden

    def _finish(self, live: Live | None, reason: StopReason, error: str | None = None) -> None:
        assert live is not None
        self._pass_on(live)
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
                self._keep(row)
            self.rows.stop(row)
        del self._by_id[live.id]
        self.writer.forget(live)
        self._ended.append((live.id, done))

    def _keep(self, row: int) -> None:
        computed = int(self.rows.computed[row])
        if self.prefixes is not None and computed:
            self.prefixes.save(self.rows.tokens[row, :computed].tolist(), self.rows.caches, row)

    def _pass_on(self, live: Live) -> None:
        """A request leaves while others wait for the prompt that it fills: the first of them fills it now."""
        if live.followers:
            heir, *rest = live.followers
            heir.followers, live.followers = rest, []
            self.rows.follows[heir.row], self.rows.filling[heir.row] = False, True
        elif live.row >= 0 and self.rows.follows[live.row]:
            for other in self._by_id.values():
                if live in other.followers:
                    other.followers.remove(live)

    # --- setting aside -----------------------------------------------------------------------------
    @torch.inference_mode()
    def set_aside(self, id: int) -> None:
        """Take a running request out of the batch, to go on behind those that wait, as if nothing had happened."""
        live = self._by_id.get(id)
        if live is None or live.row < 0:
            return
        self._pass_on(live)
        self._keep(live.row)
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
        self.rows = self._no_rows()
        self.prefixes = None
        self.stats.set_aside, self.stats.shrunk = self.stats.set_aside + len(running), self.stats.shrunk + 1
        warnings.warn(
            f"Memory ran out: the batch is now at most {self.max_rows} requests, and prefixes are forgotten.",
            stacklevel=3,
        )


def _out_of_memory(e: Exception) -> bool:
    """A GPU has a type for it, a CPU only words."""
    return isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e) or "not enough memory" in str(e)
