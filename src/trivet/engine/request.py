"""A request, and the rule of the thinking budget.

    thinking = "off"   the prompt shuts the thinking block; if the model opens one, it is shut at once
    thinking = N       at most N reasoning tokens in the whole turn, tool calls inside thinking included
    thinking = None    no limit but max_tokens, of which `answer_reserve` is kept back for the answer
    min_thinking = N   a thought that would close before N tokens goes on with the continuing message instead of the
                       tag; these tokens are forced as well, and count for the minimum only

Reasoning tokens are the sampled tokens strictly between the opening and the closing tag. When the
budget is spent and the model would go on thinking, the engine writes the closing message and the tag
itself: these tokens are forced, not sampled, and not counted. A model that closes its thought at
exactly N tokens was not cut. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite, log
from typing import Any, Literal

import numpy as np

from trivet.chat import Chat
from trivet.config import UserError
from trivet.messages import Completion, Sampling

UNLIMITED = 2**31
MOST_TOPS = 100  # likeliest tokens that are reported
SURE = 0.99  # a token of a larger probability counts for halt_repeating
NO_IDS = np.zeros(0, np.int32)


class NoRoom(UserError):
    """The sequence can't hold one more answer. In the middle of an episode that is its end, not a mistake."""


@dataclass(frozen=True)
class Request:
    """What to continue and how.

    reasoning_used: reasoning tokens that earlier completions of the same turn spent.
    stop_on_tool: end the completion when it closes a tool call (a tool is offered).
    so_far: what was written of it before, perhaps by other weights. It is computed anew and gone on with: token i is
    drawn as it would have been, and the completion holds both parts.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    reasoning_used: int = 0
    stop_on_tool: bool = False
    so_far: Completion | None = None


@dataclass
class Limits:
    """A request's limits in tokens of its own, worked out once.

    open: thinking is already open where the completion starts.
    budget: reasoning tokens that may still be sampled.
    last_thought: from this many produced tokens on, thinking must end to leave room for the answer.
    """

    open: bool
    budget: int
    last_thought: int

    @classmethod
    def of(cls, request: Request, chat: Chat, slots: int) -> Limits:
        """Raises UserError for what can't be kept: nothing about a budget is best effort."""
        s = request.sampling
        for name, value, good in (
            ("temperature", s.temperature, s.temperature >= 0),
            ("top_p", s.top_p, 0 < s.top_p <= 1),
            ("top_k", s.top_k, s.top_k >= 0),
            ("min_p", s.min_p, 0 <= s.min_p <= 1),
            ("repetition_penalty", s.repetition_penalty, s.repetition_penalty > 0),
            ("presence_penalty", s.presence_penalty, isfinite(s.presence_penalty)),
            ("frequency_penalty", s.frequency_penalty, isfinite(s.frequency_penalty)),
            ("top_logprobs", s.top_logprobs, 0 <= s.top_logprobs <= MOST_TOPS),
            ("halt_repeating", s.halt_repeating, s.halt_repeating >= 0),
            ("min_thinking", s.min_thinking, s.min_thinking >= 0),
            ("max_tokens", s.max_tokens, s.max_tokens >= 1),
            ("answer_reserve", s.answer_reserve, s.answer_reserve >= 0),
            ("thinking", s.thinking, s.thinking in (None, "off") or (isinstance(s.thinking, int) and s.thinking >= 0)),
        ):
            if not good:
                raise UserError(f"Sampling: {name} = {value!r} is out of range.")
        if s.min_thinking and (s.thinking == "off" or (s.thinking is not None and s.min_thinking > s.thinking)):
            raise UserError(f"min_thinking = {s.min_thinking} can't be kept with thinking = {s.thinking!r}.")
        if s.min_thinking and not (chat.continuing_ids and chat.think_open_id >= 0):
            raise UserError("min_thinking needs a model with thinking tags and a continuing message; leave it out.")
        if "" in s.stop:
            raise UserError("Sampling: a stop string is empty, and would stop everything.")
        if s.thinking is not None and chat.thinks == "never":
            raise UserError(
                f"thinking = {s.thinking!r} can't be kept: this model's vocabulary has no thinking tags, so nothing tells "
                "thought from answer. Leave the budget (and --no-think) out."
            )
        if request.so_far is not None and (s.grammar or s.min_thinking or s.top_logprobs or s.prompt_logprobs):
            raise UserError(
                "so_far keeps tokens and log-probabilities only: leave out grammar, min_thinking, top_logprobs and "
                "prompt_logprobs."
            )
        if not request.prompt:
            raise UserError("A request needs at least one prompt token.")
        if len(request.prompt) >= slots:
            raise NoRoom(
                f"The prompt has {len(request.prompt)} tokens, this engine holds {slots} a sequence, answer included."
            )
        budget = budget_of(s.thinking, request.reasoning_used)
        room = min(s.max_tokens, slots - len(request.prompt))
        opened = chat.thinking_open(request.prompt)
        last = room - len(chat.closing_ids) - s.answer_reserve
        if last < 0:  # a reserve larger than the room shrinks to what is left after closing
            last = max(room - len(chat.closing_ids) - 1, 0)
        if opened and room < len(chat.closing_ids):
            raise NoRoom(
                f"max_tokens leaves {room} tokens, too few to close the open thought ({len(chat.closing_ids)} tokens)."
            )
        return cls(opened, budget, last)


def budget_of(thinking: int | Literal["off"] | None, used: int) -> int:
    """Reasoning tokens that a completion may take when its turn has taken `used` already."""
    return UNLIMITED if thinking is None else 0 if thinking == "off" else max(thinking - used, 0)


@dataclass
class Saved:
    """What a row is to start with, by name: all that it held but for the cache, where it was taken out of the batch."""

    known: dict[str, Any]
    settings: list[Any]

    @classmethod
    def of(cls, request: Request, so_far: Completion, limits: Limits, chat: Chat) -> Saved:
        """Of a request that someone else began: what follows from its tokens; the rest is as it is for a new one."""
        before = np.zeros(len(request.prompt))
        tags = (chat.think_open_id, chat.think_close_id)
        last_tag = next((token for token in reversed(so_far.tokens) if token in tags), None)
        sure = np.array(so_far.sampled, bool) & (np.array(so_far.raw_logprobs) > log(SURE))
        known = {
            "tokens": np.array((*request.prompt, *so_far.tokens), np.int64),
            "sampled": np.concatenate((before > 0, np.array(so_far.sampled, bool))),
            "logprobs": np.concatenate((before, so_far.logprobs)).astype(np.float32),
            "raw_logprobs": np.concatenate((before, so_far.raw_logprobs)).astype(np.float32),
            "wanted": len(request.prompt) + len(so_far.tokens),
            "thinking": limits.open if last_tag is None else last_tag == chat.think_open_id,
            "thought": so_far.reasoning_tokens, "hit": so_far.budget_hit,
            "sure": int(sure[::-1].cumprod().sum()), "experts": [],
        }  # fmt: skip
        return cls(known, [])


@dataclass(eq=False)
class Live:
    """A request from when it is added until it ends: `row` is its place in the batch.

    followers: requests with the same prompt that wait for this one to compute it.
    """

    id: int
    request: Request
    limits: Limits
    row: int = -1
    saved: Saved | None = None
    followers: list[Live] = field(default_factory=list)
    matcher: Any = None  # where its grammar stands
    tops: dict[int, tuple[tuple[int, float], ...]] = field(default_factory=dict)  # by number of the token
    prompt_logprobs: list[float] = field(default_factory=list)
    sets: dict[int, np.ndarray] = field(default_factory=dict)  # what it was drawn from, by number of the token

    @property
    def known(self) -> int:
        """Tokens that it brings into the batch."""
        return len(self.saved.known["tokens"] if self.saved is not None else self.request.prompt)

    def reported_tops(self, tokens: int) -> tuple[tuple[tuple[int, float], ...], ...] | None:
        if not self.request.sampling.top_logprobs:
            return None
        return tuple(self.tops.get(i, ()) for i in range(tokens))

    def take_sets(self, so_far: Completion) -> None:
        if so_far.sets is not None:
            ids, ends = so_far.sets
            self.sets = {i: ids[a:b] for i, (a, b) in enumerate(pairwise(ends)) if b > a}

    def reported_sets(self, tokens: int) -> tuple[np.ndarray, np.ndarray] | None:
        if not self.keeps_sets:
            return None
        sets = [self.sets.get(i, NO_IDS) for i in range(tokens)]
        return np.concatenate([NO_IDS, *sets]), np.cumsum([0, *map(len, sets)])

    @property
    def keeps_sets(self) -> bool:
        return self.request.sampling.keep_sets and self.request.sampling.truncates
