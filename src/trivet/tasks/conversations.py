"""Conversations to imitate, one JSON object a line: {"messages": [...], "mode": "think"}.

A message has `role` and `content`; an assistant's may have `reasoning` (or `reasoning_content`) and `tool_calls`, as
OpenAI writes them or short, {"name": ..., "arguments": {...}}. `mode` says what is learnt of the last turn's thinking:

    mode       thinking in the prompt                 loss on
    think      the model's to open                    thought, its tags, answer, tool calls
    no_think   shut, as --no-think renders it         answer and tool calls; the shut block belongs to the prompt
    keep       as the line has it: the thought where  answer and tool calls only: no token of a thought, so that
               there is one, else shut                how the model thinks is left as it is

Without a mode, a line whose last turn has a thought is `think`, any other `no_think`. Earlier turns of the assistant are
learnt, too, each as it stands. The same function renders for training and for serving. One line in eight is held out by
a hash of its first question. Such conversations have no grader: they are for training only.
"""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator

from trivet.config import UserError, explain
from trivet.messages import Message, Role, Score, ToolCall
from trivet.spec import Frozen
from trivet.tasks.base import Demo, Problem, Split, is_test, shuffled

Mode = Literal["think", "no_think", "keep"]


class _Call(BaseModel):
    model_config = ConfigDict(extra="ignore")
    name: str
    arguments: dict[str, Any]

    @field_validator("arguments", mode="before")
    @classmethod
    def _parsed(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value  # OpenAI sends a string


class _Turn(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Role
    content: str | None = None
    reasoning: str | None = Field(default=None, validation_alias=AliasChoices("reasoning", "reasoning_content"))
    tool_calls: list[_Call] = []
    tool_call_id: str | None = None

    @field_validator("tool_calls", mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return [call.get("function", call) if isinstance(call, dict) else call for call in value or []]


class Line(BaseModel):
    """One conversation as it stands in the file. Keys besides these two are a matter of whoever wrote it."""

    model_config = ConfigDict(extra="ignore")
    messages: list[_Turn] = Field(min_length=2)
    mode: Mode | None = None

    def conversation(self) -> tuple[Message, ...]:
        made, calls = [], 0
        for turn in self.messages:
            asked = tuple(ToolCall(f"call-{calls + i}", c.name, c.arguments) for i, c in enumerate(turn.tool_calls))
            calls += len(asked)
            made.append(Message(turn.role, turn.content or "", turn.reasoning, asked, turn.tool_call_id))
        return tuple(made)


class ConversationsConfig(Frozen):
    name: Literal["conversations"] = "conversations"
    path: str = Field(description="the file, or a `sample` stage whose data it is")
    mode: Mode | None = Field(default=None, description="think, no_think or keep for all lines; unset: what they say")
    tools: tuple[str, ...] = Field(default=(), description="tools that the prompts list")
    bad_share: float = Field(default=0.01, ge=0, le=1, description="unreadable lines that are put up with")


class Conversations:
    levels: tuple[int, ...] = (0,)

    def __init__(self, config: ConversationsConfig) -> None:
        self.config = config
        self.name: str = config.name
        self.tools = config.tools
        lines = read_lines(Path(config.path), config.bad_share)
        self.lines = {s: [x for x in lines if _held_out(x) == (s == "test")] for s in ("train", "test")}
        for split, found in self.lines.items():
            if not found:
                raise UserError(f"{config.path} leaves no {split} conversations ({len(lines)} in all): give more.")

    def problem(self, split: Split, index: int, level: int | None = None) -> Problem:
        lines = self.lines[split]
        lap, at = divmod(index, len(lines))
        at = shuffled(len(lines), f"{len(lines)} {lap}")[at] if split == "train" else at
        return Problem(f"conversations-{split}-{at}", _question(lines[at]), "", 0, {"line": lines[at]})

    def demonstrate(self, problem: Problem, rng: random.Random) -> Demo:
        line: Line = problem.meta["line"]
        messages = line.conversation()
        thought = messages[-1].reasoning is not None
        mode = self.config.mode or line.mode or ("think" if thought else "no_think")
        if mode == "no_think":
            *before, last = messages
            return Demo((*before, Message(last.role, last.content, None, last.tool_calls)), thinking=False)
        if mode == "keep":
            return Demo(messages, thinking=thought, learn_thoughts=False)
        if not thought:
            raise UserError(
                f"A conversation of mode 'think' has no reasoning in its last turn: {problem.prompt[:60]!r}."
            )
        return Demo(messages)

    def grade(self, problem: Problem, message: Message) -> Score:
        raise UserError("Conversations can be imitated, not graded: give another task to RL and evaluation.")


def read_lines(path: Path, bad_share: float) -> list[Line]:
    """All lines that can be used; too many that can't are an error, a few are counted in a warning."""
    try:
        texts = [text for text in path.read_text().splitlines() if text.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"The conversations in {str(path)!r} can't be read: {e}.") from None
    lines, bad = [], []
    for number, text in enumerate(texts, 1):
        try:
            line = Line.model_validate(json.loads(text))
            if line.messages[-1].role != "assistant":
                raise ValueError("the last message is not the assistant's")
            lines.append(line)
        except ValidationError as e:
            bad.append(f"line {number}: {explain(e, Line)}")
        except ValueError as e:
            bad.append(f"line {number}: {e}.")
    if len(bad) > bad_share * len(texts):
        raise UserError(f"{path}: {len(bad)} of {len(texts)} lines can't be used; {bad[0]}")
    if bad:
        warnings.warn(f"{path}: {len(bad)} of {len(texts)} lines can't be used, first {bad[0]}", stacklevel=3)
    return lines


def _held_out(line: Line) -> bool:
    """By a hash of its own: the questions of a `sample` stage are all from its task's training split."""
    return is_test(f"conversation: {_question(line)}")


def _question(line: Line) -> str:
    return next((turn.content or "" for turn in line.messages if turn.role == "user"), "")
