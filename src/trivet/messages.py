"""The nouns every room shares: messages, tools, sampling, completions, and the ChatModel protocol.

No logic and no torch. One rule makes agentic RL exact: an assistant message that a model wrote
carries its `completion`, and whoever renders the conversation again splices those token ids in
verbatim. Text is never tokenised twice on the training path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class ToolCall:
    """A call the model wrote, as `text`. `error` says why that could not be understood (then no run)."""

    id: str
    name: str
    arguments: Mapping[str, Any]
    error: str | None = None
    text: str = field(default="", compare=False)


@dataclass(frozen=True)
class ToolSpec:
    """What a model is told about a tool: `parameters` is a JSON schema object."""

    name: str
    description: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """One turn. `reasoning` is the text between the thinking tags, without them."""

    role: Role
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None  # on a tool message: the call it answers
    cut: bool = False  # thinking was ended by the budget: the closing message is not the model's own
    completion: Completion | None = None  # exact tokens, when a model wrote this message


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like: a JSON schema, a regular expression, or a grammar in Lark's EBNF."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str


@dataclass(frozen=True)
class Sampling:
    """How to sample one completion. Temperature 0 is greedy.

    repetition_penalty: logits of tokens seen in prompt or answer are divided by it (multiplied where negative;
    arXiv 1909.05858). presence_penalty, frequency_penalty: subtracted once, and once for each time, from logits of
    tokens in the answer. logit_bias: (token, added) pairs. stop: strings that end the completion, whose message ends
    before them while the completion keeps their tokens. stop_ids: tokens that end it, and stay in it.
    halt_repeating: end after so many sampled tokens in a row that the model's own distribution each gave more than 0.99.
    thinking: None = unlimited; "off" = the template's non-thinking prompt; N >= 0 = at most N
    reasoning tokens, then the closing message and the end-of-thinking tag are forced. What a person
    typed (/no_think) becomes one of these by Chat.thinking_for.
    min_thinking: a thought that would end before so many tokens is made to go on with the continuing message
    (s1, arXiv 2501.19393), and one is opened where the model would open none.
    budget_for: what a budget N is for, one turn (an answer and the tool calls before it) or the conversation.
    answer_reserve: tokens kept back from max_tokens so that a thinker can still answer.
    grammar: holds from where the answer starts.
    top_logprobs, prompt_logprobs: what Completion reports of the model's own distribution.
    keep_sets: report the tokens that each was drawn from, where top_p, top_k or min_p leave some out.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    halt_repeating: int = 0  # 0: off
    thinking: int | Literal["off"] | None = None
    min_thinking: int = 0
    budget_for: Literal["turn", "conversation"] = "turn"
    answer_reserve: int = 16
    grammar: Grammar | None = None
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    keep_sets: bool = False

    @property
    def truncates(self) -> bool:
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


class StopReason(StrEnum):
    END = "end"  # the model closed its turn
    TOOL_CALL = "tool_call"  # the model closed a tool call and waits for its result
    STOP_STRING = "stop_string"  # or one of stop_ids
    LENGTH = "length"  # max_tokens, or the cache is full
    REPETITION = "repetition"  # halt_repeating
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class Completion:
    """What a model wrote, exactly. All lists have one entry a token of `tokens`.

    sampled: False where the engine forced the token (closing message, end-of-thinking tag).
    logprobs: under the distribution sampled from (after grammar, penalties, temperature and truncation); 0 if forced.
    raw_logprobs: under the model's own distribution (T=1, nothing truncated); 0 if forced.
    experts: where recorded, per MoE layer, the expert ids [n-1, top_k] of every input position, prompt and tokens
        but the last; -1 where the position was not computed for this request but found.
    top_logprobs: where asked for, the likeliest (token, raw logprob) pairs of each token; () if forced.
    prompt_logprobs: where asked for, the raw logprob of every prompt token but the first.
    sets: where asked for, arrays (ids, offsets): token i was drawn from ids[offsets[i] : offsets[i + 1]], which is
        empty where it was forced.
    """

    text: str
    tokens: tuple[int, ...]
    sampled: tuple[bool, ...]
    logprobs: tuple[float, ...]
    raw_logprobs: tuple[float, ...]
    stop: StopReason
    prompt_tokens: tuple[int, ...]
    reasoning_tokens: int = 0
    budget_hit: bool = False
    experts: Any = None
    error: str | None = None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
    prompt_logprobs: tuple[float, ...] | None = None
    sets: tuple[Any, Any] | None = None


@dataclass(frozen=True)
class Event:
    """A piece of a completion as it streams. The texts of one kind concatenate to the field."""

    kind: Literal["reasoning", "text", "tool_call", "done"]
    text: str = ""
    message: Message | None = None  # on "done"


class ChatModel(Protocol):
    """Anything that answers: the local engine, a remote endpoint, a scripted fake."""

    async def complete(self, messages: Sequence[Message], tools: Sequence[ToolSpec], sampling: Sampling) -> Message:
        """The assistant's next message; `message.completion` holds the exact tokens."""
        ...


class World(Protocol):
    """What a model talks to where the other side is no list of tools: it answers every turn, and grades the whole.

    It keeps nothing between calls: all is in the transcript (prompt, the model's turns, its own replies), and to the
    same transcript it must say the same.
    """

    @property
    def specs(self) -> Sequence[ToolSpec]:
        """What the model is told that it may call."""
        ...

    def reply(self, transcript: Sequence[Message]) -> Sequence[Message] | Score:
        """What is said to the model's last turn: results of its calls, what a user says; nothing: it is over.

        A Score that is not ok says why there is no reply."""
        ...

    def grade(self, transcript: Sequence[Message]) -> Score: ...


@dataclass(frozen=True)
class Score:
    """The RL reward and the eval score are this one value. Not ok is masked and counted, never 0."""

    value: float
    status: Literal["ok", "unparsed", "timeout", "error"] = "ok"
    parts: Mapping[str, float] = field(default_factory=dict)
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.status == "ok"
