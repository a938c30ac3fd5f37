"""The engine: many requests, one batch, one forward pass a step.

One rule drives it: *computed catches up with wanted*. A row wants the tokens of its prompt, those it
has sampled, and those that were forced on it; the cache holds the first `computed` of them. A step
feeds every row its next uncomputed token, and where that was the last one known, samples another. So
forced tokens need no code of their own, and a group of samples computes its prompt once: the prompt's
cache row is copied to every member.

Rows stay densely packed: finished rows idle (position -1) until enough of them are worth removing.
All bookkeeping of a step is array arithmetic; Python touches a single request only when it starts,
ends, or has its thought cut.

Left out: paging, prefix reuse between requests, preemption, speculation.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trivet.chat import Chat
from trivet.engine.request import UNLIMITED, Limits, Live, Request
from trivet.engine.sampling import Settings, sample
from trivet.messages import Completion, StopReason
from trivet.model import Routing, Transformer
from trivet.model.cache import LayerCache

PREFILL_TOKENS = 16_384  # padded prompt tokens of one prefill call
IDLE_SHARE = 0.25  # finished rows beyond this share of the batch are removed
SPAN_STEP = 16  # cache slots are read in multiples of this


@dataclass
class Stats:
    """What the engine did since it was made."""

    prompt_tokens: int = 0  # computed
    shared_tokens: int = 0  # prompt tokens that a fork saved
    decode_tokens: int = 0
    seconds: float = 0.0
    peak_rows: int = 0
    cache_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.decode_tokens / self.seconds if self.seconds else 0.0


class Engine:
    """Continuous batching over at most `max_rows` sequences of at most `slots` tokens each."""

    def __init__(
        self,
        model: Transformer,
        chat: Chat,
        max_rows: int = 256,
        slots: int = 512,
        device: torch.device | str | None = None,
        record_experts: bool = False,
    ) -> None:
        self.model, self.chat = model, chat
        self.max_rows, self.slots = max_rows, slots
        self.device = torch.device(device) if device is not None else model.embed.device
        self.record_experts = record_experts
        self.stats = Stats()
        self._next_id = 0
        self._waiting: deque[Live] = deque()
        self._rows: list[Live | None] = []  # dense: row -> request, None where it has ended
        self._by_id: dict[int, Live] = {}
        self._ended: list[tuple[int, Completion]] = []  # since the last step returned
        self._caches: list[LayerCache] = []
        self._capacity = 0
        self._allocate(0)

    # --- requests ----------------------------------------------------------------------------------
    def add(self, request: Request) -> int:
        """Queue a request. Raises UserError where it asks for what can't be kept."""
        live = Live(self._next_id, request, Limits.of(request, self.chat, self.slots))
        self._next_id += 1
        self._waiting.append(live)
        self._by_id[live.id] = live
        return live.id

    def cancel(self, id: int) -> None:
        """End a request now, with what it has so far; the next step returns it."""
        live = self._by_id.get(id)
        if live is None:
            return
        if live.row < 0:
            self._waiting.remove(live)
        self._finish(live, StopReason.CANCELLED)

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
        live = self._by_id[id]
        return tuple(self._written(live.row)) if live.row >= 0 else ()

    # --- one step ----------------------------------------------------------------------------------
    @torch.inference_mode()
    def step(self) -> list[tuple[int, Completion]]:
        """Admit what fits, feed every row one token; returns what ended."""
        began = time.perf_counter()
        self._admit()
        if any(self._rows):
            self._decode()
        self._compact()
        self.stats.seconds += time.perf_counter() - began
        ended, self._ended = self._ended, []
        return ended

    def _admit(self) -> None:
        free = self.max_rows - len(self._rows)
        new = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        if not new:
            return
        first = len(self._rows)
        self._allocate(first + len(new))
        groups: dict[tuple[int, ...], list[Live]] = {}
        for live in new:
            groups.setdefault(live.request.prompt, []).append(live)
        for members in groups.values():  # rows of a group lie together
            for live in members:
                live.row = len(self._rows)
                self._rows.append(live)
                self._start_row(live)
        prompts = sorted(groups, key=len, reverse=True)
        while prompts:
            count = max(1, PREFILL_TOKENS // len(prompts[0]))
            self._prefill([groups[p] for p in prompts[:count]])
            prompts = prompts[count:]
        self.stats.peak_rows = max(self.stats.peak_rows, len(self._rows))

    def _start_row(self, live: Live) -> None:
        s, row, prompt = live.request.sampling, live.row, live.request.prompt
        self.tokens[row, : len(prompt)] = prompt
        self.sampled[row] = False
        self.logprobs[row] = self.raw_logprobs[row] = 0.0
        self.wanted[row], self.prompt_length[row] = len(prompt), len(prompt)
        self.most[row] = min(s.max_tokens, self.slots - len(prompt))
        self.budget[row], self.last_thought[row] = live.limits.budget, live.limits.last_thought
        self.thinking[row], self.thought[row], self.hit[row] = live.limits.open, 0, False
        self.stops_on_tool[row] = live.request.stop_on_tool
        values = (s.temperature, s.top_p, s.top_k, s.min_p, s.seed & (2**63 - 1))
        for table, value in zip(vars(self.settings).values(), values, strict=True):
            table[row] = value

    def _prefill(self, groups: list[list[Live]]) -> None:
        """Compute each group's prompt once, all but its last token, and copy it to the members."""
        rows = torch.tensor([live.row for members in groups for live in members])
        self.computed[rows.numpy()] = np.array([len(g[0].request.prompt) - 1 for g in groups for _ in g])
        bodies = [(i, g[0].request.prompt[:-1]) for i, g in enumerate(groups) if len(g[0].request.prompt) > 1]
        if not bodies:
            return
        longest = max(len(body) for _, body in bodies)
        tokens = torch.zeros(len(bodies), longest, dtype=torch.long)
        positions = torch.full((len(bodies), longest), -1)
        for at, (_, body) in enumerate(bodies):
            tokens[at, : len(body)] = torch.tensor(body)
            positions[at, : len(body)] = torch.arange(len(body))
        scratch = self.model.new_caches(len(bodies), self.slots, device=self.device)
        routing = Routing() if self.record_experts else None
        self.model(tokens.to(self.device), positions.to(self.device), scratch, span=longest, routing=routing)
        source = torch.tensor([at for at, (i, _) in enumerate(bodies) for _ in groups[i]])
        target = torch.tensor([live.row for i, _ in bodies for live in groups[i]])
        for cache, prefilled in zip(self._caches, scratch, strict=True):
            cache.copy_rows(source.to(self.device), target.to(self.device), prefilled)
        if routing is not None:
            for table, chosen in zip(self.experts, routing.experts, strict=True):
                table[target.numpy(), :longest] = chosen.cpu().numpy()[source.numpy()]
        computed = sum(len(body) for _, body in bodies)
        self.stats.prompt_tokens += computed
        self.stats.shared_tokens += sum(len(body) * len(groups[i]) for i, body in bodies) - computed

    def _decode(self) -> None:
        n = len(self._rows)
        rows = np.arange(n)
        live = self.alive[:n]
        positions = np.where(live, self.computed[:n], -1)
        feed = torch.from_numpy(np.where(live, self.tokens[rows, self.computed[:n]], 0)).unsqueeze(-1)
        span = min(-(-(int(positions.max()) + 1) // SPAN_STEP) * SPAN_STEP, self.slots)
        routing = Routing() if self.record_experts else None
        hidden = self.model(
            feed.to(self.device), torch.from_numpy(positions).unsqueeze(-1).to(self.device), self._caches, span, routing
        )
        if routing is not None:
            for table, chosen in zip(self.experts, routing.experts, strict=True):
                table[rows, self.computed[:n]] = chosen[:, 0].cpu().numpy()
        self.computed[:n] += live
        need = live & (self.computed[:n] == self.wanted[:n])
        self.stats.decode_tokens += int(need.sum())
        if need.any():
            self._extend(need, hidden[:, 0])
        self._end_rows(live & (self.computed[:n] >= self.prompt_length[:n]))

    def _extend(self, need: np.ndarray, hidden: torch.Tensor) -> None:
        """Sample one token for each row that needs one, and keep to the thinking budgets."""
        n, chat = len(need), self.chat
        produced = self.wanted[:n] - self.prompt_length[:n]
        logits = self.model.logits(hidden)
        broken = need & ~torch.isfinite(logits).all(-1).cpu().numpy()
        for row in np.flatnonzero(broken):
            self._finish(self._rows[row], StopReason.ERROR, "the model's logits are not finite")
        logits = torch.nan_to_num(logits) if broken.any() else logits
        index = torch.from_numpy(produced).to(self.device)
        drawn = sample(logits, Settings(*(t[:n] for t in vars(self.settings).values())), index)
        token, logprob, raw = (t.cpu().numpy() for t in drawn)
        need = need & ~broken
        opens = (token == chat.think_open_id) & ~self.thinking[:n]
        stays = need & self.thinking[:n] & (token != chat.think_close_id)
        spent = (self.thought[:n] >= self.budget[:n]) | (produced >= self.last_thought[:n])
        cut = stays & spent
        for row in np.flatnonzero(cut):
            self._force(int(row))
        rows = np.flatnonzero(need & ~cut)
        at = self.wanted[rows]
        self.tokens[rows, at], self.sampled[rows, at] = token[rows], True
        self.logprobs[rows, at], self.raw_logprobs[rows, at] = logprob[rows], raw[rows]
        self.wanted[rows] += 1
        self.thought[:n] += stays & ~cut
        ends = self.thinking[:n] & (token == chat.think_close_id)
        self.thinking[rows] = (self.thinking[:n] & ~ends | opens)[rows]

    def _force(self, row: int) -> None:
        """Write the closing message and tag where the thought would have gone on."""
        at, room = self.wanted[row], self.prompt_length[row] + self.most[row] - self.wanted[row]
        ids = self.chat.closing_ids[-room:] if room < len(self.chat.closing_ids) else self.chat.closing_ids
        self.tokens[row, at : at + len(ids)] = ids
        self.wanted[row] += len(ids)
        self.thinking[row], self.hit[row] = False, True

    def _end_rows(self, rows: np.ndarray) -> None:
        """Finish the rows whose newest token, or length, says so."""
        n, chat = len(rows), self.chat
        newest = self.tokens[np.arange(n), np.maximum(self.wanted[:n] - 1, 0)]
        produced = self.wanted[:n] - self.prompt_length[:n]
        new = rows & self.alive[:n] & (produced > 0)
        ended = new & (newest == chat.end_id)
        called = new & (newest == chat.tool_close_id) & self.stops_on_tool[:n]
        full = new & (produced >= self.most[:n])
        for row in np.flatnonzero(ended | called | full):
            reason = StopReason.END if ended[row] else StopReason.TOOL_CALL if called[row] else StopReason.LENGTH
            self._finish(self._rows[row], reason)
        for live in self._watched:
            if live.row >= 0 and self.alive[live.row]:
                written = self._written(live.row)
                if live.request.stop_on_tool and chat.closes_call(written):
                    self._finish(live, StopReason.TOOL_CALL)
                elif stops := live.request.sampling.stop:
                    text = chat.decode(written)
                    if any(stop in text for stop in stops):
                        self._finish(live, StopReason.STOP_STRING)

    @property
    def _watched(self) -> list[Live]:
        """The rows whose text must be read to know whether they go on."""
        calls = self.chat.tool_close_id < 0 and bool(self.chat.markers.tool_close)
        asked = [live for live in self._rows if live is not None]
        return [live for live in asked if live.request.sampling.stop or (calls and live.request.stop_on_tool)]

    def _written(self, row: int) -> list[int]:
        return self.tokens[row, self.prompt_length[row] : self.wanted[row]].tolist()

    def _finish(self, live: Live | None, reason: StopReason, error: str | None = None) -> None:
        assert live is not None
        row, prompt = live.row, live.request.prompt
        if row < 0:  # never started
            done = Completion("", (), (), (), (), reason, prompt, error=error)
        else:
            part = slice(len(prompt), int(self.wanted[row]))
            tokens = tuple(self.tokens[row, part].tolist())
            experts = (
                [t[row, part.start - 1 : part.stop - 1].copy() for t in self.experts] if self.record_experts else None
            )
            done = Completion(
                self.chat.decode(tokens), tokens, tuple(self.sampled[row, part].tolist()),
                tuple(self.logprobs[row, part].tolist()), tuple(self.raw_logprobs[row, part].tolist()),
                reason, prompt, int(self.thought[row]), bool(self.hit[row]), experts, error,
            )  # fmt: skip
            self._rows[row] = None
            self.alive[row] = False
        del self._by_id[live.id]
        self._ended.append((live.id, done))

    # --- rows --------------------------------------------------------------------------------------
    def _compact(self) -> None:
        """Give up idle rows once there are enough of them: a step costs what its rows cost."""
        kept = [row for row, live in enumerate(self._rows) if live is not None]
        idle = len(self._rows) - len(kept)
        if idle == 0 or (kept and idle < IDLE_SHARE * len(self._rows)):
            return
        index = np.array(kept, dtype=np.int64)
        n = len(kept)
        if n:
            source, target = torch.from_numpy(index).to(self.device), torch.arange(n, device=self.device)
            for cache in self._caches:
                cache.copy_rows(source, target)
        for table in self._tables:
            table[:n] = table[index]
        for setting in vars(self.settings).values():
            setting[:n] = setting[torch.from_numpy(index).to(self.device)]
        self.alive[n:] = False
        self._rows = [self._rows[row] for row in kept]
        for row, live in enumerate(self._rows):
            assert live is not None
            live.row = row

    def _allocate(self, rows: int) -> None:
        """Room for `rows` sequences; what is there stays."""
        if rows <= self._capacity and self._capacity:
            self.alive[len(self._rows) : rows] = True
            return
        old, old_settings, old_caches, used = (
            self._tables if self._capacity else [],
            None,
            self._caches,
            len(self._rows),
        )
        if self._capacity:
            old_settings = self.settings
        capacity = min(self.max_rows, max(rows, 2 * self._capacity))
        with torch.inference_mode():
            self._new_tables(capacity)
            for new, previous in zip(self._tables, old, strict=False):
                new[:used] = previous[:used]
            if old_settings is not None:
                for new_s, previous_s in zip(vars(self.settings).values(), vars(old_settings).values(), strict=True):
                    new_s[:used] = previous_s[:used]
            if capacity:
                self._caches = self.model.new_caches(capacity, self.slots, device=self.device)
                kept = torch.arange(used, device=self.device)
                for cache, previous_c in zip(self._caches, old_caches, strict=False):
                    cache.copy_rows(kept, kept, previous_c)
        self._capacity = capacity
        self.alive[used:rows] = True
        self.stats.cache_bytes = sum(cache.nbytes for cache in self._caches)

    def _new_tables(self, rows: int) -> None:
        shape = (rows, self.slots)
        self.tokens = np.zeros(shape, np.int64)
        self.sampled = np.zeros(shape, bool)
        self.logprobs, self.raw_logprobs = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.computed, self.wanted, self.prompt_length, self.most = (np.zeros(rows, np.int64) for _ in range(4))
        self.budget, self.last_thought, self.thought = (np.full(rows, UNLIMITED) for _ in range(3))
        self.alive, self.thinking, self.hit, self.stops_on_tool = (np.zeros(rows, bool) for _ in range(4))
        self.experts = []
        if self.record_experts:
            widths = [layer.ffn.top_k for layer in self.model.spec.layers if layer.ffn.kind == "moe"]
            self.experts = [np.zeros((*shape, k), np.int32) for k in widths]
        kinds = (torch.float32, torch.float32, torch.long, torch.float32, torch.long)
        self.settings = Settings(*(torch.zeros(rows, dtype=kind, device=self.device) for kind in kinds))

    @property
    def _tables(self) -> list[np.ndarray]:
        return [
            self.tokens, self.sampled, self.logprobs, self.raw_logprobs, self.computed, self.wanted,
            self.prompt_length, self.most, self.budget, self.last_thought, self.thought, self.alive,
            self.thinking, self.hit, self.stops_on_tool, *self.experts,
        ]  # fmt: skip
