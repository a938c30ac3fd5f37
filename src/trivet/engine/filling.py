"""What a row brings along, computed in pieces: prompts, requests that come back, long texts that were forced on a row.

A prompt is computed once: what earlier requests computed is found in the prefix store, and of requests with
the same prompt that wait for each other one computes it and the others copy its row. Neighbours are computed
together, as many as a piece holds. The last token that a row wants is not computed here: it is a step's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trivet.engine.prefix import PrefixStore
from trivet.engine.request import Live
from trivet.engine.rows import ALONE, Rows
from trivet.engine.speculate import Drafter
from trivet.engine.stats import Stats
from trivet.engine.writing import Writer

PIECE_TOKENS = 16_384  # padded prompt tokens of one call
LONGEST_PIECE = 2_048  # of one row: bounds what a layer holds at a time
FORCED_PIECE = 8  # forced tokens that are worth a call of their own however many rows there are
SNAPSHOT_EVERY = 512  # prompt tokens, where layers keep states: a later prompt may go on from there


class Filling:
    """Rows that have much to catch up with, until they are ready for a step like all others.

    prefix_bytes: room for prefixes to start from. They are forgotten when the weights change.
    """

    def __init__(self, rows: Rows, writer: Writer, drafter: Drafter | None, stats: Stats, prefix_bytes: int) -> None:
        self.rows, self.writer, self.drafter, self.stats = rows, writer, drafter, stats
        self.prefix_bytes = prefix_bytes
        self.ahead = drafter.ahead if drafter is not None else 0
        self.prefixes: PrefixStore | None = None
        self._weights = 0  # their version when the prefixes were computed

    def admit(self, new: Sequence[Live]) -> None:
        """Start requests, for which there is room. Those with one prompt start together: the first computes it for all."""
        rows, first = self.rows, dict[tuple[int, ...], Live]()
        new = sorted(new, key=lambda live: -live.known)  # neighbours are of a length; the order of equals stays
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

    def _prepare_prefixes(self) -> None:
        """A store that belongs to the weights as they are."""
        if not self.prefix_bytes:
            return
        weights = sum(p._version for p in self.rows.model.parameters())
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

    def fill(self) -> None:
        """Let rows with much to catch up with compute a piece: neighbours together, as many as a piece holds."""
        rows, n = self.rows, len(self.rows)
        left = rows.wanted[:n] - 1 - rows.computed[:n]
        # Forced tokens go one by one with the others' steps where that is cheaper: a call costs what a row of eight
        # steps does, so that n rows wait for a piece of their neighbour's only if it saves the neighbour n steps.
        rows.filling[:n] |= rows.alive[:n] & ~rows.follows[:n] & (left >= max(min(n, FORCED_PIECE), 1 + self.ahead))
        left = np.where(rows.filling[:n], left, 0)
        room = PIECE_TOKENS
        for first in np.flatnonzero(left):
            if left[first] == 0:
                continue  # went with a neighbour
            stop, width = int(first), 0
            while stop < n and left[stop]:
                wider = max(width, min(int(left[stop]), LONGEST_PIECE))
                if stop > first and (wider * (stop + 1 - first) > room or max(left[first], left[stop]) >= ALONE):
                    break
                stop, width = stop + 1, wider
            part = slice(int(first), stop)
            start, counts = rows.computed[part].copy(), np.minimum(left[part], width)
            if self.prefixes is not None and self.prefixes.states:
                counts = np.minimum(counts, SNAPSHOT_EVERY - start % SNAPSHOT_EVERY)
            if self.rows.policy.block:
                counts = np.minimum(counts, self.rows.policy.block - start % self.rows.policy.block)
            hidden = rows.feed(part, counts)
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
        whole = (
            not rows.filling[row] and computed < rows.prompt_length[row]
        )  # what was forced is kept when the row ends
        if store is not None and (whole or (store.states and computed % SNAPSHOT_EVERY == 0)):
            store.save(rows.tokens[row, :computed].tolist(), rows.caches, row)
        if rows.filling[row] or not live.followers:
            return
        targets = [other.row for other in live.followers]
        source = torch.full((len(targets),), row, device=self.rows.device)
        for cache in rows.caches:
            cache.copy_rows(source, torch.tensor(targets, device=self.rows.device))
        for table in rows.experts:
            table[targets, :computed] = table[row, :computed]
        rows.computed[targets], rows.follows[targets] = computed, False
        live.followers = []
        self.stats.shared_tokens += computed * len(targets)

    def keep(self, row: int) -> None:
        """What a row that leaves has computed stays, for later requests."""
        computed = int(self.rows.computed[row])
        if self.prefixes is not None and computed:
            self.prefixes.save(self.rows.tokens[row, :computed].tolist(), self.rows.caches, row)

    def pass_on(self, live: Live) -> None:
        """A request leaves while others wait for the prompt that it fills: the first of them fills it now."""
        if live.followers:
            heir, *rest = live.followers
            heir.followers, live.followers = rest, []
            self.rows.follows[heir.row], self.rows.filling[heir.row] = False, True
        elif live.row >= 0 and self.rows.follows[live.row]:
            for other in self.rows.live:
                if other is not None and live in other.followers:
                    other.followers.remove(live)
