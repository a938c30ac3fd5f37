"""The running requests as arrays: one row each, dense, so that a step's bookkeeping is array arithmetic.

A row wants the tokens of its prompt, those it has sampled and those that were forced on it (`wanted` of
them); its cache row holds the first `computed`. Rows that ended idle until they are worth removing.

Memory grows with what runs: rows and columns (slots of a sequence) double when they are short, layer by
layer, so that a step never needs more than one layer twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from trivet.engine.policy import Full, Place, Policy
from trivet.engine.request import UNLIMITED, Live, Saved
from trivet.engine.sampling import Settings
from trivet.model import Routing, Transformer
from trivet.model.cache import LayerCache
from trivet.model.prompt import Kept, Prompt

SPAN_STEP = 16  # cache slots are read in multiples of this
FIRST_COLUMNS = 256  # slots a sequence to begin with
ALONE = 512  # tokens from which a row's piece is a call of its own: without a mask, in blocks of queries (blocks.py)


class Rows:
    """Arrays [rows, columns] of tokens and [rows] of everything else, and the caches of the layers."""

    def __init__(
        self,
        model: Transformer,
        device: torch.device,
        most_columns: int,
        record_experts: bool,
        extra: Sequence[nn.Module] = (),
        policy: Policy | None = None,
    ) -> None:
        """extra: mixers of a drafter, whose caches stand behind the model's and keep everything."""
        self.model, self.device, self.most_columns = model, device, most_columns
        self.policy = policy or Full()
        self._mixers = [layer.mixer for layer in model.layers] + list(extra)
        self.live: list[Live | None] = []  # row -> request, None where it has ended
        self.columns = min(FIRST_COLUMNS, most_columns)
        self.capacity = self.nbytes = 0
        self.caches: list[LayerCache] = []
        moe = [layer.ffn.top_k for layer in model.spec.layers if layer.ffn.kind == "moe"]
        self.experts = [np.zeros((0, self.columns, k), np.int32) for k in moe] if record_experts else []
        shape = (0, self.columns)
        self.tokens = np.zeros(shape, np.int64)
        self.sampled = np.zeros(shape, bool)
        self.logprobs, self.raw_logprobs = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.computed, self.wanted, self.prompt_length, self.most = (np.zeros(0, np.int64) for _ in range(4))
        self.budget, self.last_thought, self.thought = (np.full(0, UNLIMITED) for _ in range(3))
        self.alive, self.thinking, self.hit, self.stops_on_tool = (np.zeros(0, bool) for _ in range(4))
        # filling: still computing what it brought along; follows: waits for another row to compute its prompt.
        self.filling, self.follows = np.zeros(0, bool), np.zeros(0, bool)
        # least: thinking tokens below which a thought goes on; waited: forced tokens that count for it.
        self.least, self.waited = np.zeros(0, np.int64), np.zeros(0, np.int64)
        # sure: sampled tokens in a row that were all but certain; most_sure: how many end the request.
        self.sure, self.most_sure = np.zeros(0, np.int64), np.zeros(0, np.int64)
        # guessed: tokens behind the wanted ones that are a guess; drafted: how many a draft model has read.
        self.guessed, self.drafted = np.zeros(0, np.int64), np.zeros(0, np.int64)
        kinds = (torch.float32, torch.float32, torch.long, torch.float32, torch.long)
        self.settings = Settings(*(torch.zeros(0, dtype=kind, device=device) for kind in kinds))

    def __len__(self) -> int:
        return len(self.live)

    @property
    def states(self) -> list[LayerCache]:
        """Of the model's caches those that can't take back a token."""
        return [cache for cache in self.caches[: len(self.model.layers)] if cache.slot_dim is None]

    @property
    def extra(self) -> list[LayerCache]:
        return self.caches[len(self.model.layers) :]

    def read_on(
        self, part: slice, start: np.ndarray, counts: np.ndarray, shift: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Tokens and positions [n,T] of counts[i] tokens from start[i] on, for a forward pass, and its span.

        shift: the token that many places further on stands at each position.
        """
        offset = np.arange(max(int(counts.max()), 1))
        at = start[:, None] + offset
        real = offset < counts[:, None]
        index = np.arange(part.start, part.stop)[:, None]
        tokens = np.where(real, self.tokens[index, np.where(real, at + shift, 0)], 0)
        positions = np.where(real, at, -1)
        span = min(-(-(int(positions.max()) + 1) // SPAN_STEP) * SPAN_STEP, self.columns)
        return torch.from_numpy(tokens).to(self.device), torch.from_numpy(positions).to(self.device), max(span, 1)

    def feed(self, part: slice, counts: np.ndarray) -> torch.Tensor:
        """Compute the next counts[i] tokens of each row of a part of the batch -> hidden [n,T,D]."""
        start = self.computed[part].copy()
        tokens, positions, span = self.read_on(part, start, counts)
        prompt = None
        if len(counts) == 1 and counts[0] >= ALONE and self.device.type == "cpu":
            span = int(start[0] + counts[0])
            prompt = Prompt(int(start[0]), (int(counts[0]),), None, Kept())
        caches = self.caches if part.start == 0 else [cache.view(part) for cache in self.caches]
        routing = Routing() if self.experts else None
        hidden: torch.Tensor = self.model(tokens, positions, caches, span, routing, prompt=prompt)
        if routing is not None:
            real = np.arange(tokens.shape[1]) < counts[:, None]
            row, column = np.nonzero(real)
            for table, chosen in zip(self.experts, routing.experts, strict=True):
                table[row + part.start, start[row] + column] = chosen.cpu().numpy()[real]
        self.computed[part] += counts
        return hidden

    # --- rows come and go --------------------------------------------------------------------------
    def start(self, live: Live) -> None:
        """Give a request the next row: as it is new, or as it was when it was taken out."""
        row = live.row = len(self.live)
        self.live.append(live)
        self.sampled[row] = False
        self.logprobs[row] = self.raw_logprobs[row] = 0.0
        for table in self.experts:
            table[row] = -1
        s, prompt = live.request.sampling, live.request.prompt
        self.tokens[row, : len(prompt)] = prompt
        self.wanted[row], self.prompt_length[row] = len(prompt), len(prompt)
        self.most[row] = min(s.max_tokens, self.most_columns - len(prompt))
        self.budget[row], self.last_thought[row] = live.limits.budget, live.limits.last_thought
        self.least[row], self.waited[row] = s.min_thinking, 0
        self.sure[row], self.most_sure[row] = 0, s.halt_repeating or UNLIMITED
        self.thinking[row], self.thought[row], self.hit[row] = live.limits.open, 0, False
        self.stops_on_tool[row] = live.request.stop_on_tool
        values = (s.temperature, s.top_p, s.top_k, s.min_p, s.seed & (2**63 - 1))
        for setting, number in zip(vars(self.settings).values(), values, strict=True):
            setting[row] = number
        if live.saved is not None:
            self._restore(row, live.saved)
            live.saved = None
        self.computed[row] = self.guessed[row] = self.drafted[row] = 0
        self.alive[row] = self.filling[row] = True
        self.follows[row] = False

    def _restore(self, row: int, saved: Saved) -> None:
        for name, table in self._tables():
            if name in saved.known:
                value = saved.known[name]
                table[(row, slice(len(value))) if table.ndim > 1 else row] = value
        for table, value in zip(self.experts, saved.known["experts"], strict=False):  # none, or of every layer
            table[row, : len(value)] = value
        for setting, value in zip(vars(self.settings).values(), saved.settings, strict=False):
            setting[row] = value

    def read(self, live: Live) -> dict[str, Any]:
        """All that is known of a request, by name: running, waiting, or taken out."""
        if live.saved is not None:
            return live.saved.known
        if live.row < 0:
            none: dict[str, Any] = {
                name: np.zeros((0, *table.shape[2:]), table.dtype) if table.ndim > 1 else 0
                for name, table in self._tables()
            }
            return none | {"experts": [np.zeros((0, table.shape[2]), table.dtype) for table in self.experts]}
        row, known = live.row, int(self.wanted[live.row])
        found: dict[str, Any] = {n: t[row, :known].copy() if t.ndim > 1 else t[row].copy() for n, t in self._tables()}
        return found | {"experts": [table[row, :known].copy() for table in self.experts]}

    def written(self, live: Live) -> list[int]:
        """The tokens after its prompt."""
        start, row = len(live.request.prompt), live.row
        tokens = self.tokens[row, : self.wanted[row]] if row >= 0 else self.read(live)["tokens"]
        found: list[int] = tokens[start:].tolist()
        return found

    def clear(self, row: int) -> None:
        for cache in self.caches:
            for tensor in cache.tensors:
                tensor[row] = 0

    def stop(self, row: int) -> None:
        self.live[row] = None
        self.alive[row] = self.filling[row] = self.follows[row] = False

    def take_out(self, row: int) -> Live:
        """Stop a row so that it can be started again later, elsewhere."""
        live = self.live[row]
        assert live is not None
        live.saved = Saved(self.read(live), [setting[row].clone() for setting in vars(self.settings).values()])
        live.row = -1
        self.stop(row)
        return live

    def compact(self, idle_share: float) -> None:
        """Give up idle rows once there are enough of them: a step costs what its rows cost."""
        kept = [row for row, live in enumerate(self.live) if live is not None]
        idle, n = len(self.live) - len(kept), len(kept)
        if idle == 0 or (kept and idle < idle_share * len(self.live)):
            return
        if n:
            source, target = torch.tensor(kept, device=self.device), torch.arange(n, device=self.device)
            for cache in self.caches:
                cache.copy_rows(source, target)
            for setting in vars(self.settings).values():
                setting[:n] = setting[source]
            for table in [table for _, table in self._tables()] + self.experts:
                table[:n] = table[kept]
        self.alive[n:] = self.filling[n:] = self.follows[n:] = False
        self.live = [self.live[row] for row in kept]
        for row, live in enumerate(self.live):
            assert live is not None
            live.row = row

    # --- memory ------------------------------------------------------------------------------------
    def reserve(self, rows: int, columns: int, most_rows: int = 0) -> None:
        """Room for `rows` sequences of `columns` tokens; what is there stays. It grows ahead, up to `most_rows`."""
        if rows <= self.capacity and min(columns, self.most_columns) <= self.columns:
            return
        if rows > self.capacity:
            rows = max(rows, min(most_rows, 2 * self.capacity))
        rows = max(rows, self.capacity)
        if columns > self.columns:
            columns = min(self.most_columns, max(columns, 2 * self.columns))
        columns = max(columns, self.columns)
        used = len(self.live)
        for i, mixer in enumerate(self._mixers):
            layers, dtype = len(self.model.layers), self.model.embed.dtype
            place = Place(i, layers, rows, columns, self.most_columns, dtype, self.device)
            grown = (self.policy if i < layers else Full()).new_cache(mixer, place)  # type: ignore[arg-type]
            if i < len(self.caches):
                grown.copy_from(self.caches[i], used)
                self.caches[i] = grown
            else:
                self.caches.append(grown)
        for name, table in self._tables():
            setattr(self, name, _grown(table, rows, columns))
        self.experts = [_grown(table, rows, columns) for table in self.experts]
        settings = vars(self.settings)
        for name, setting in settings.items():
            settings[name] = torch.cat((setting, setting.new_zeros(rows - len(setting))))
        self.capacity, self.columns = rows, columns
        self.nbytes = sum(cache.nbytes for cache in self.caches)

    def _tables(self) -> list[tuple[str, np.ndarray]]:
        return [(name, table) for name, table in vars(self).items() if isinstance(table, np.ndarray)]


def _grown(table: np.ndarray, rows: int, columns: int) -> np.ndarray:
    shape = (rows, *((columns,) if table.ndim > 1 else ()), *table.shape[2:])
    new = np.zeros(shape, table.dtype)
    new[tuple(slice(n) for n in table.shape)] = table
    return new
