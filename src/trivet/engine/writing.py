"""From hidden states to tokens: draw, keep to the budgets, and see what has ended.

All rows of a step at once, in arrays. Only rows that ask for more (penalties, a grammar, stop strings, the
likeliest tokens) are looked at one by one.
"""

from __future__ import annotations

from math import log

import numpy as np
import torch
from torch import Tensor

from trivet.chat import Chat
from trivet.config import UserError
from trivet.engine.grammar import Grammars
from trivet.engine.request import SURE, Live
from trivet.engine.rows import Rows
from trivet.engine.sampling import sample
from trivet.engine.steer import steer, steers
from trivet.messages import StopReason
from trivet.model import Transformer

PROMPT_LOGITS = 128  # prompt positions whose logits are there at a time


class Writer:
    """Writes the next token of every row that needs one."""

    def __init__(self, model: Transformer, chat: Chat) -> None:
        self.model, self.chat = model, chat
        self._grammars: Grammars | None = None
        self._steered: dict[int, Live] = {}
        self._watched: dict[int, Live] = {}  # whose text says whether they go on
        self._topped: dict[int, Live] = {}
        self._sets: dict[int, Live] = {}  # who wants to know what its tokens were drawn from

    def prepare(self, live: Live) -> None:
        """Note what a new request asks for. Raises UserError for a grammar or a token that there isn't."""
        s, size = live.request.sampling, self.model.spec.vocab_size
        for what, ids in (("logit_bias", [token for token, _ in s.logit_bias]), ("stop_ids", s.stop_ids)):
            wrong = [token for token in ids if not 0 <= token < size]
            if wrong:
                raise UserError(f"Sampling: {what} names token {wrong[0]}, and the vocabulary has {size}.")
        if s.keep_sets and (s.temperature == 0 or steers(s)):
            raise UserError(
                "Sampling: keep_sets needs a temperature above 0 and no penalties, biases or grammar, which change more "
                "than the set that is drawn from; leave one of them out."
            )
        if s.grammar is not None:
            if self._grammars is None:
                self._grammars = Grammars(self.chat, size)
            live.matcher = self._grammars.start(s.grammar)
        for table, wanted in (
            (self._steered, steers(s)),
            (self._watched, bool(s.stop or s.stop_ids) or (live.request.stop_on_tool and self._reads_calls)),
            (self._topped, s.top_logprobs > 0),
            (self._sets, live.keeps_sets),
        ):
            if wanted:
                table[live.id] = live

    def forget(self, live: Live) -> None:
        for table in (self._steered, self._watched, self._topped, self._sets):
            table.pop(live.id, None)

    def read_prompts(self, rows: Rows, part: slice, counts: np.ndarray, hidden: Tensor) -> None:
        """After a piece of prompts, hidden [B,T,D]: what the model thought of the tokens that followed."""
        for i, row in enumerate(range(part.start, part.stop)):
            live = rows.live[row]
            if live is None or not live.request.sampling.prompt_logprobs:
                continue
            first, stop = (
                int(rows.computed[row] - counts[i]),
                min(int(rows.computed[row]), len(live.request.prompt) - 1),
            )
            seen = len(live.prompt_logprobs)  # it may come back, and be computed once more; its answer is none of this
            follow = torch.from_numpy(rows.tokens[row, seen + 1 : stop + 1]).to(hidden.device)
            states = hidden[i, seen - first : max(stop, seen) - first]
            for piece, ids in zip(states.split(PROMPT_LOGITS), follow.split(PROMPT_LOGITS), strict=True):
                logp = self.model.logits(piece).float().log_softmax(-1)
                live.prompt_logprobs += logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1).tolist()

    def extend(self, rows: Rows, which: np.ndarray, hidden: Tensor) -> list[tuple[int, str]]:
        """Sample one token for each of the rows `which`, hidden [len(which),D] -> (row, error) where that failed."""
        r, chat = rows, self.chat
        produced = r.wanted[which] - r.prompt_length[which]
        logits = self.model.logits(hidden)
        failed = self._failing(which, logits)
        broken = np.isin(which, list(failed))
        logits = torch.nan_to_num(logits) if failed else logits
        place = (
            dict(zip(which[~broken].tolist(), np.flatnonzero(~broken).tolist(), strict=True)) if self._asking else {}
        )
        lives = [live for live in self._steered.values() if live.row in place]
        thinks = [self._may_think(r, live) for live in lives]
        known = [r.tokens[live.row, : r.wanted[live.row]] for live in lives]
        steered = steer(logits, lives, [place[v.row] for v in lives], known, self._grammars, thinks) if lives else None
        index = torch.from_numpy(produced).to(logits.device)
        sets: list[Tensor] | None = [] if self._sets else None
        drawn = sample(logits, r.settings[torch.from_numpy(which).to(logits.device)], index, steered, sets)
        token, logprob, raw = (t.cpu().numpy() for t in drawn)
        thinking = r.thinking[which]
        stays = thinking & (token != chat.think_close_id) & ~broken
        spent = (r.thought[which] >= r.budget[which]) | (produced >= r.last_thought[which])
        cut = stays & spent
        for row in which[cut]:
            self._close(r, int(row))
        opens, closes = token == chat.think_open_id, token == chat.think_close_id
        early = ~broken & self._early(r, which, produced, thinking, opens, closes)
        for row in which[early]:
            self._go_on(r, int(row))
        writes = ~broken & ~cut & ~early
        for live in self._topped.values():
            if live.row in place and writes[place[live.row]]:
                self._report(live, int(produced[place[live.row]]), logits[place[live.row]])
        for could in sets or []:
            self._keep_sets(r, which, produced, writes, could)
        bound = [
            live
            for live, may in zip(lives, thinks, strict=True)
            if live.matcher is not None and may > -2 and token[place[live.row]] != may and writes[place[live.row]]
        ]
        if self._grammars is not None and bound:
            self._grammars.advance([live.matcher for live in bound], [int(token[place[live.row]]) for live in bound])
        rows_w, at_w = which[writes], r.wanted[which[writes]]
        r.tokens[rows_w, at_w], r.sampled[rows_w, at_w] = token[writes], True
        r.logprobs[rows_w, at_w], r.raw_logprobs[rows_w, at_w] = logprob[writes], raw[writes]
        r.wanted[rows_w] += 1
        r.sure[which] = np.where(writes & (raw > log(SURE)), r.sure[which] + 1, 0)
        r.thought[which] += stays & ~cut
        r.thinking[rows_w] = (thinking & ~closes | opens)[writes]
        return list(failed.items())

    def _failing(self, which: np.ndarray, logits: Tensor) -> dict[int, str]:
        """Those of the rows `which` that can't go on, and why."""
        extremes = torch.stack((logits.amin(-1), logits.amax(-1)))  # [2,B]; not a number wins both
        bad = ~torch.isfinite(extremes).all(0).cpu().numpy()
        failed = dict.fromkeys(which[bad].tolist(), "the model's logits are not finite")
        if self._grammars is not None:
            rows = set(which.tolist())
            bound = [live for live in self._steered.values() if live.matcher is not None and live.row in rows]
            for live, mistake in zip(bound, self._grammars.mistakes([live.matcher for live in bound]), strict=True):
                if mistake is not None:
                    failed[live.row] = f"the grammar can't go on: {mistake}"
        return failed

    @property
    def _asking(self) -> bool:
        return bool(self._steered or self._topped)

    def _may_think(self, rows: Rows, live: Live) -> int:
        """The token that may open a thought here; -1: it is too late for one; -2: one is open."""
        if rows.thinking[live.row]:
            return -2
        first = rows.wanted[live.row] == rows.prompt_length[live.row]
        return self.chat.think_open_id if first and live.request.sampling.thinking != "off" else -1

    def _report(self, live: Live, number: int, logits: Tensor) -> None:
        """Note the likeliest tokens where they were asked for."""
        best = logits.float().log_softmax(-1).topk(live.request.sampling.top_logprobs)
        live.tops[number] = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    def _keep_sets(
        self, rows: Rows, which: np.ndarray, produced: np.ndarray, writes: np.ndarray, could: Tensor
    ) -> None:
        """Note which tokens could be drawn, could [len(which),V], where that was asked for and one was."""
        asks = np.array([(live := rows.live[row]) is not None and live.keeps_sets for row in which])
        at = np.flatnonzero(asks & writes)
        row, ids = (t.cpu().numpy() for t in could[torch.from_numpy(at).to(could.device)].nonzero(as_tuple=True))
        parts = np.split(ids.astype(np.int32), np.searchsorted(row, np.arange(1, len(at))))
        for i, part in zip(at, parts, strict=bool(len(at))):
            self._sets[rows.live[which[i]].id].sets[int(produced[i])] = part

    def _early(
        self,
        rows: Rows,
        which: np.ndarray,
        produced: np.ndarray,
        thinking: np.ndarray,
        opens: np.ndarray,
        closes: np.ndarray,
    ) -> np.ndarray:
        """Rows whose thought would close before its minimum, or not be opened, while there is room for more."""
        r = rows
        if not r.least[which].any():
            return np.zeros(len(which), bool)
        short = (r.thought[which] + r.waited[which] < r.least[which]) & (r.thought[which] < r.budget[which])
        room = produced + len(self.chat.continuing_ids) < r.last_thought[which]
        return short & room & ((thinking & closes) | (~thinking & ~opens & (produced == 0)))

    def _go_on(self, rows: Rows, row: int) -> None:
        """Open a thought, or write the continuing message in one that would have closed."""
        r, thinks = rows, bool(rows.thinking[row])
        ids = self.chat.continuing_ids if thinks else [self.chat.think_open_id]
        at = r.wanted[row]
        r.tokens[row, at : at + len(ids)] = ids
        r.wanted[row] += len(ids)
        r.waited[row] += len(ids) if thinks else 0
        r.thinking[row] = True

    def _close(self, rows: Rows, row: int) -> None:
        """Write the closing message and tag where the thought would have gone on."""
        r, ids = rows, self.chat.closing_ids
        at, room = r.wanted[row], r.prompt_length[row] + r.most[row] - r.wanted[row]
        ids = ids[-room:] if room < len(ids) else ids
        r.tokens[row, at : at + len(ids)] = ids
        r.wanted[row] += len(ids)
        r.thinking[row], r.hit[row] = False, True

    def ended(self, rows: Rows, which: np.ndarray) -> list[tuple[int, StopReason]]:
        """Those of the rows `which` that end with their newest token, or for want of room, and why."""
        r, chat = rows, self.chat
        newest = r.tokens[which, r.wanted[which] - 1]
        produced = r.wanted[which] - r.prompt_length[which]
        reasons = {}
        new = set(which[produced > 0].tolist()) if self._watched else set()
        for live in self._watched.values():
            if live.row in new and self._stops(r, live):
                reasons[live.row] = StopReason.STOP_STRING
            elif live.row in new and live.request.stop_on_tool and chat.closes_call(r.written(live)):
                reasons[live.row] = StopReason.TOOL_CALL
        ends, called = newest == chat.end_id, (newest == chat.tool_close_id) & r.stops_on_tool[which]
        halts = r.sure[which] >= r.most_sure[which]
        for i in np.flatnonzero((produced > 0) & (ends | called | halts | (produced >= r.most[which]))):
            last = StopReason.REPETITION if halts[i] else StopReason.LENGTH
            reason = StopReason.END if ends[i] else StopReason.TOOL_CALL if called[i] else last
            if reason is not last or int(which[i]) not in reasons:
                reasons[int(which[i])] = reason
        return list(reasons.items())

    @property
    def _reads_calls(self) -> bool:
        """Whether a tool call closes with a tag that is no token, and must be found in the text."""
        return self.chat.tool_close_id < 0 and bool(self.chat.markers.tool_close)

    def _stops(self, rows: Rows, live: Live) -> bool:
        s = live.request.sampling
        if int(rows.tokens[live.row, rows.wanted[live.row] - 1]) in s.stop_ids:
            return True
        if not s.stop:
            return False
        # A stop string that is new ends in the newest token, and a token is at least a byte of text; those of a
        # closing message may come several at once.
        tail = max(len(stop.encode()) for stop in s.stop) + len(self.chat.closing_ids)
        text = self.chat.decode(rows.written(live)[-tail:])
        return any(stop in text for stop in s.stop)
