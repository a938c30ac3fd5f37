"""A step of decoding: every row that is not busy with its prompt reads the token that it lacks and writes another.

With a drafter a row reads its guesses as well and may write several. Guesses are checked by writing on as always:
a row goes on to its next position while what it wrote is what had been guessed there. So speculation changes no
token, whatever the settings.
"""

from __future__ import annotations

import numpy as np
import torch

from trivet.engine.rows import Rows
from trivet.engine.speculate import Drafter
from trivet.engine.stats import Stats
from trivet.engine.writing import Writer
from trivet.messages import StopReason

End = tuple[int, StopReason, str | None]  # row, why, and what went wrong


class Decoding:
    def __init__(self, rows: Rows, writer: Writer, drafter: Drafter | None, stats: Stats) -> None:
        self.rows, self.writer, self.drafter, self.stats = rows, writer, drafter, stats
        # Of the newest step: rows that took part, where they began, what has turned out to be right, hidden [B,T,D].
        self._newest: tuple[np.ndarray, np.ndarray, np.ndarray, torch.Tensor] | None = None

    def step(self) -> list[End]:
        """Feed every row that is ready what it lacks, and what is guessed to follow; write on. -> rows that end."""
        rows, n = self.rows, len(self.rows)
        ready = rows.alive[:n] & ~rows.filling[:n] & ~rows.follows[:n]
        if not ready.any():
            return []
        ahead = self.drafter.ahead if self.drafter is not None else 0
        forced = len(self.writer.chat.closing_ids)
        if rows.least[:n].any():
            forced = max(forced, len(self.writer.chat.continuing_ids))
        rows.reserve(n, int(rows.wanted[:n].max()) + 1 + ahead + forced)
        known, start = rows.wanted[:n].copy(), rows.computed[:n].copy()
        # A few forced tokens go one by one with the others; what a wrong guess made a state forget, all at once.
        lacking = np.where(ready, np.minimum(known - start, 1 + ahead), 0)
        guessed = np.where(ready & (lacking == known - start), rows.guessed[:n], 0)
        guesses = rows.tokens[np.arange(n)[:, None], np.minimum(known[:, None] + np.arange(ahead), rows.columns - 1)]
        before = [(cache, cache.view(slice(0, n)).copy()) for cache in rows.states] if guessed.any() else []
        hidden = rows.feed(slice(0, n), lacking + guessed)
        rows.computed[:n] -= guessed  # until they have turned out to be right
        going = np.flatnonzero(ready & (rows.computed[:n] == known))
        right, ends = self._write_on(going, hidden, lacking, known, guessed, guesses)
        self.stats.guessed_tokens += int(guessed.sum())
        self.stats.right_tokens += int(right.sum())
        rows.computed[:n] += right
        for cache, copy in before:  # what read a wrong guess starts again from before it
            wrong = torch.from_numpy(np.flatnonzero(right < guessed)).to(rows.device)
            cache.copy_rows(wrong, wrong, copy)
            rows.computed[:n] = np.where(right < guessed, start, rows.computed[:n])
        rows.guessed[:n] = 0
        self._newest = ready, start, lacking + right, hidden
        return ends

    def guess(self) -> None:
        """After a step, in the rows that it left alive."""
        if self.drafter is None or self._newest is None:
            return
        ready, start, certain, hidden = self._newest
        alive, n = self.rows.alive[: len(ready)], len(ready)
        certain = np.where(alive, certain, 0)
        goes_on = alive & ready & (self.rows.wanted[:n] == start + certain + 1)
        self.drafter.look_ahead(self.rows, slice(0, n), start, certain, hidden, goes_on)
        self._newest = None

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
