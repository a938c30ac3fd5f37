"""`trivet chat`: a conversation in the terminal.

Thoughts are dimmed while they stream and folded to one line when they end; tool calls and results
are shown; a last line counts tokens, thinking tokens, and speed. The loop is the same agent loop
that RL trains with, so what is seen here is what was learned.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rich.console import Console

from trivet.agent.loop import Episode, ModelStep, ToolStep, run_episode
from trivet.chat import SOFT_SWITCH, Chat
from trivet.config import UserError
from trivet.engine import PREFIX_BYTES, Engine, EngineModel
from trivet.engine.policy import RankByAge
from trivet.messages import Message, Sampling
from trivet.model import Transformer
from trivet.model.lora import adapter_parameters
from trivet.recipes.loading import Loading, drafter_of, ready_policy
from trivet.tools import get_tool

CALIBRATED_ON = ("1+1=", "12+30=", "7*8=", "95-14=")  # for a low-rank cache: what every tokenizer can write
CALIBRATED_SLOTS = 2048
FOLDED = 72  # characters of a thought that stay when it is folded


def converse(
    directory: Path,
    sampling: Sampling,
    tool_names: list[str],
    fold: bool,
    guess: str,
    how: Loading,
    cache: str = "full",
) -> None:
    """Read lines, answer them. Raises UserError where the model or a tool can't be had."""
    console = Console(highlight=False)
    model, chat = how.load(directory, console)
    tools = [get_tool(name) for name in tool_names]
    drafter = drafter_of(guess, model, how.device) if guess else None
    slots, thinking = model.spec.context_length, sampling.thinking
    policy = ready_policy(
        cache, model, chat, CALIBRATED_ON.__getitem__, len(CALIBRATED_ON), min(slots, CALIBRATED_SLOTS)
    )
    prefix = PREFIX_BYTES if policy.resumes else 0
    engine = Engine(model, chat, 1, slots, how.device, prefix_bytes=prefix, drafter=drafter, policy=policy)
    once = chat.markers.single_turn
    _greet(directory, model, chat, console)
    if isinstance(policy, RankByAge):
        console.print(
            f"The cache was calibrated on {len(CALIBRATED_ON)} texts that the model wrote, and it forgets: every turn "
            "reads the whole conversation anew.", style="dim",
        )  # fmt: skip
    history: list[Message] = []
    soft = SoftSwitch(chat, console)
    soft.note(thinking)
    while True:
        try:
            line = console.input("[bold]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line in ("/quit", "/exit"):
            return
        if line == "/new":
            history = []
            soft = SoftSwitch(chat, console)
            continue
        if line.startswith("/budget"):
            thinking = _budget(line, thinking, console)
            soft.note(thinking)
            continue
        line = soft.take(line, thinking)
        if not line:
            continue
        sampling = replace(sampling, thinking=chat.thinking_for(soft.said, thinking), seed=sampling.seed + 1)
        shown = _Shown(engine, chat, console, fold)
        try:
            episode = asyncio.run(run_episode(shown, [*history, Message("user", line)], tools, sampling))
        except UserError as e:
            console.print(str(e), style="red", markup=False)
            continue
        except KeyboardInterrupt:
            engine.cancel_all()
            console.print("\n[dim](stopped; this turn is forgotten)[/]")
            continue
        history = [] if once else list(episode.messages)
        shown.close(episode)


def _greet(directory: Path, model: Transformer, chat: Chat, console: Console) -> None:
    habit = "It was trained on single questions, so each starts anew." if chat.markers.single_turn else "/new forgets."
    extra = sum(p.numel() for p in adapter_parameters(model).values())
    size = f"{model.spec.num_params():,} parameters" + (f" and {extra:,} in its adapter" if extra else "")
    console.print(f"{directory}: {size}. {habit}", style="dim", markup=False, soft_wrap=True)
    switches = ", /no_think and /think switch thinking" if chat.thinks == "can" else ""
    console.print(
        f"Ctrl-D or /quit ends, /budget N sets the thinking budget (off, none){switches}.", style="dim", markup=False
    )


def _budget(line: str, now: int | Literal["off"] | None, console: Console) -> int | Literal["off"] | None:
    word = line.removeprefix("/budget").strip()
    if word == "off":
        return "off"
    if word in ("none", "unlimited"):
        return None
    if word.isdigit():
        return int(word)
    console.print(f"/budget wants a number, off or none; it stays {now}.", markup=False)
    return now


class SoftSwitch:
    """`/think` and `/no_think` as a person types them: in a question, or alone for the turns to come.

    A checkpoint was trained with these words, so they stay in the question, and one typed alone goes along with the
    next. Trivet's own models never saw them: there they are taken out.
    """

    def __init__(self, chat: Chat, console: Console) -> None:
        self.chat, self.console = chat, console
        self.said: list[Message] = []  # the lines with switches, as `Chat.thinking_for` reads them
        self.waiting = ""

    def take(self, line: str, thinking: int | Literal["off"] | None) -> str:
        """The question for the model, "" where there is none; says what has changed."""
        alone = not SOFT_SWITCH.sub("", line).strip()
        if SOFT_SWITCH.search(line):
            before = self.chat.thinking_for(self.said, thinking)
            self.said.append(Message("user", line))
            self._tell(before, self.chat.thinking_for(self.said, thinking), thinking)
        if self.chat.thinks != "can":
            return "" if alone else line
        if not self.chat.markers.transformers:
            return SOFT_SWITCH.sub("", line).strip()
        if alone:
            self.waiting = line or self.waiting
            return ""
        if not SOFT_SWITCH.search(line):
            line = f"{line} {self.waiting}".rstrip()
        self.waiting = ""
        return line

    def _tell(self, before: object, now: object, thinking: object) -> None:
        if self.chat.thinks != "can":
            why = "always thinks" if self.chat.thinks == "always" else "has no thinking tags"
            text = f"This model {why}: /think and /no_think switch nothing."
        elif thinking == "off":
            text = "Thinking is off by --no-think or /budget off, which overrides /think; /budget none allows it."
        elif before != now:
            text = f"Thinking is {'off' if now == 'off' else 'on'} from here on."
        else:
            return
        self.console.print(text, style="dim", markup=False)

    def note(self, thinking: int | Literal["off"] | None) -> None:
        if thinking == "off" and self.chat.thinks == "always":
            text = "This model always thinks: off closes its thought empty, which it was not trained for."
            self.console.print(text, style="dim", markup=False)


class _Shown:
    """A ChatModel that prints what it streams."""

    def __init__(self, engine: Engine, chat: Chat, console: Console, fold: bool) -> None:
        self.model, self.console, self.fold = EngineModel(engine, chat), console, fold
        self.began = time.perf_counter()

    async def complete(self, messages, tools, sampling) -> Message:  # type: ignore[no-untyped-def]
        if messages[-1].role == "tool":
            self.console.print(f"  = {messages[-1].content}", style="cyan", markup=False)
        thought, message, kind = "", None, ""
        async for event in self.model.stream(messages, tools, sampling):
            if event.kind == "done":
                message = event.message
                break
            if event.kind == "reasoning":
                thought += event.text
                self.console.print(event.text, style="dim italic", end="", markup=False)
            elif event.kind == "text":
                if kind == "reasoning":
                    self._end_thought(thought)
                self.console.print(event.text, end="", markup=False)
            elif event.kind == "tool_call":
                self.console.print(f"\n  tool {event.text}", style="cyan", end="", markup=False)
            kind = event.kind
        self.console.print()
        assert message is not None
        return message

    def _end_thought(self, thought: str) -> None:
        if self.fold and self.console.is_terminal and len(thought) > FOLDED:
            lines = (len(thought) - 1) // self.console.width
            self.console.file.write("\r" + "\x1b[1A" * lines + "\x1b[J")
            self.console.print(
                f"thought {len(thought)} characters ... {thought[-FOLDED // 2 :]}", style="dim italic", markup=False
            )
        else:
            self.console.print()

    def close(self, episode: Episode) -> None:
        seconds = time.perf_counter() - self.began
        done = [m.completion for m in episode.messages if m.completion is not None and _is_new(m, episode)]
        tokens = sum(len(c.tokens) for c in done)
        thought = sum(c.reasoning_tokens for c in done)
        calls = sum(isinstance(step, ToolStep) for step in episode.steps)
        note = f"{tokens} tokens, {thought} thinking" + (", budget hit" if any(c.budget_hit for c in done) else "")
        note += f", {calls} tool call{'s' * (calls > 1)}" if calls else ""
        stats = self.model.engine.stats
        if stats.guessed_tokens:
            note += f", {stats.right_tokens / stats.guessed_tokens:.0%} of guesses right so far"
        self.console.print(f"[dim]{note}, {tokens / seconds:,.0f} tok/s, ended by {episode.stop}[/]")


def _is_new(message: Message, episode: Episode) -> bool:
    return any(isinstance(step, ModelStep) and step.message is message for step in episode.steps)
