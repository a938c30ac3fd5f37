"""A checkpoint's own tokenizer and chat template, as transformers' `apply_chat_template` would use them.

Same text, same ids, with three differences that training and safety need:

* a user who types `<|im_end|>` sends the plain characters, in any part of the conversation;
* what a model wrote stays its own ids: the conversation so far is the completion's prompt and tokens, and
  only what comes after it is rendered (many templates drop earlier reasoning; here the model saw it);
* the template's switch for thinking is used where there is one, else an empty thought is appended.

What the template takes, and how it writes tool calls, is found out by `probe.look`. A tag that is no token of
the vocabulary is looked for in the text. A loss belongs to what the last message says, since templates in this
form do not mark what the assistant wrote.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from trivet.chat.chat import Chat, Markers, Rendered, Thinks
from trivet.chat.probe import Found, Jinja, dress, look, view
from trivet.chat.syntax import SYNTAXES
from trivet.config import UserError, validate
from trivet.messages import Message, ToolCall, ToolSpec

GAP = "\ue006"  # stands inside a tag that somebody typed, so that it is none
# Qwen3's own words for an ended thought (its documentation, "thinking budget").
CLOSING = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
)
MARK = "\ue007"  # where an earlier answer stood
OURS = re.compile(f"[{GAP}{MARK}]")


class TemplateChat(Chat):
    """`named`: the special tokens that templates refer to, such as bos_token."""

    strips = True

    def __init__(self, tokenizer: Tokenizer, template: str, markers: Markers, named: dict[str, str]) -> None:
        self._tag_ids = {t.content: id for id, t in tokenizer.get_added_tokens_decoder().items()}
        longest_first = sorted(self._tag_ids, key=len, reverse=True)
        self._tags = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.named = named
        super().__init__(tokenizer, template, markers)
        self.jinja = Jinja(self._compiled, named)
        self.found: Found = look(self.jinja, markers.end)

    @classmethod
    def read(cls, directory: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> TemplateChat:
        """From tokenizer.json and tokenizer_config.json. Raises UserError where the template is missing or mute."""
        file = Path(directory) / "chat_template.jinja"
        template = file.read_text() if file.is_file() else config.get("chat_template")
        if not isinstance(template, str):
            raise UserError(f"{str(directory)!r} has no chat template, so a conversation can't be written for it.")
        named = {}
        for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = config.get(key)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                named[key] = text
        if "eos_token" not in named:
            raise UserError(f"{str(directory)!r}: tokenizer_config.json names no eos_token, so no turn would end.")
        if "trivet" in config:
            return cls(tokenizer, template, validate(config["trivet"], Markers, f"{directory} trivet"), named)
        bare = Markers(end=named["eos_token"], closing_message=CLOSING, tool_open="", tool_close="", tool_syntax="json",
                       transformers=True)  # fmt: skip
        chat = cls(tokenizer, template, bare, named)
        if not chat.found.shows:
            raise UserError(f"The chat template of {str(directory)!r} does not show what is said to the model.")
        if chat.found.syntax is not None:
            row = SYNTAXES[chat.found.syntax]
            tags = {"tool_syntax": chat.found.syntax, "tool_open": row.open, "tool_close": row.close}
            chat.use(bare.model_copy(update=tags))
        return chat

    def config(self) -> dict[str, Any]:
        return super().config() | self.named

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.tokenizer, self.template, self.markers, self.named)

    def environment(self) -> ImmutableSandboxedEnvironment:
        return dress(super().environment())

    def _one(self, marker: str) -> int:
        """Its id; -1 where the vocabulary has no such token, and the tag is looked for in the text."""
        id = self.tokenizer.token_to_id(marker) if marker else None
        if id is None and marker == self.markers.end:
            raise UserError(f"The eos_token {marker!r} is no token of the vocabulary, so no turn would end.")
        return -1 if id is None else id

    @property
    def thinks(self) -> Thinks:
        """A prompt that opens a thought, whatever it is asked for, is of a model that always thinks."""
        if self.think_close_id < 0:
            return "never"
        return "always" if self._opens(self.found.prompt) and not self.found.switch else "can"

    # --- conversation -> ids ---------------------------------------------------------------------
    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
        thinking: bool = True,
        generate: bool = False,
    ) -> Rendered:
        """See Chat.render. Raises UserError where the template refuses, or can't offer tools."""
        if tools and not self.markers.tool_open:
            raise UserError(
                "This checkpoint's chat template writes tool calls in no syntax that is known, so it can't be offered tools."
            )
        if tools and not self.found.tells_tools:
            raise UserError(
                "This checkpoint's chat template leaves out the tools it is given, so the model would not know of them; "
                "put a chat_template.jinja that lists them into its directory."
            )
        wrote = [i for i, m in enumerate(messages) if m.completion is not None]
        if wrote:
            return self._continued(messages, wrote[-1], tools, thinking, generate)
        text = self.text(messages, tools, thinking, generate)
        if generate or not messages or messages[-1].role != "assistant":
            ids = self._ids(text)
            return Rendered(ids, [False] * len(ids))
        asked = self.text(messages[:-1], tools, thinking, generate=True)
        if text.startswith(asked):
            answer, end, after = text[len(asked) :].rpartition(self.markers.end)
        else:  # the prompt opens a thought that the template drops from what is past: written as the model would
            answer, end, after = self._written(messages[-1], asked, text).rpartition(self.markers.end)
        if not end:
            raise UserError(
                f"The chat template closes an answer without the eos_token {self.markers.end!r}, so no model would learn to "
                "stop; let eos_token in tokenizer_config.json be the tag that ends a turn."
            )
        prompt, said, rest = self._ids(asked), self._ids(answer + end), self._ids(after)
        return Rendered([*prompt, *said, *rest], [False] * len(prompt) + [True] * len(said) + [False] * len(rest))

    def _continued(
        self, messages: Sequence[Message], at: int, tools: Sequence[ToolSpec], thinking: bool, generate: bool
    ) -> Rendered:
        """After the last message that a model wrote: its prompt and tokens as they were, then the new turns."""
        completion = messages[at].completion
        assert completion is not None
        before = self.render(messages[:at], tools, thinking, generate=True)
        known = before.ids == list(completion.prompt_tokens)
        mask = [*(before.mask if known else [False] * len(completion.prompt_tokens)), *completion.sampled]
        ids = [*completion.prompt_tokens, *completion.tokens]
        after = self._after(messages, at, tools, thinking, generate)
        if completion.tokens[-1:] == (self.end_id,):
            after = after.removeprefix(self.markers.end)
        new = self._ids(after)
        return Rendered([*ids, *new], [*mask, *[False] * len(new)])

    def _after(
        self, messages: Sequence[Message], at: int, tools: Sequence[ToolSpec], thinking: bool, generate: bool
    ) -> str:
        """What the template writes after message `at`, in whose place a stand-in is rendered."""
        later = self._views(messages)[at + 1 :]
        stand_ins = [Message("assistant", MARK)]
        if messages[at].tool_calls and later and later[0]["role"] == "tool":  # some refuse a result without a call
            call = messages[at].tool_calls[-1]
            stand_ins.insert(0, Message("assistant", tool_calls=(ToolCall(call.id, call.name or "?", {MARK: MARK}),)))
        for stand_in in stand_ins:
            earlier = [Message("user", "?"), stand_in]
            views = [view(earlier, i, self.found.form, lambda text: text) for i in range(2)]
            text = self._prompt([*views, *later], tools, thinking, generate)
            _, marked, after = text.rpartition(MARK)
            if marked and stand_in.tool_calls:
                close = self.markers.tool_close
                _, marked, after = after.partition(close or self.markers.end)
                after = after if close else self.markers.end + after
            if marked:
                return after
        raise UserError("This chat template drops earlier turns, so a conversation can't go on token by token.")

    def text(self, messages: Sequence[Message], tools: Sequence[ToolSpec], thinking: bool, generate: bool) -> str:
        """The conversation as text, in which typed tags have a gap."""
        return self._prompt(self._views(messages), tools, thinking, generate)

    def _prompt(
        self, views: Sequence[dict[str, Any]], tools: Sequence[ToolSpec], thinking: bool, generate: bool
    ) -> str:
        text = self.jinja.text(views, tools, thinking, generate)
        if generate and not thinking and not self.found.switch and self.think_open_id >= 0:
            m = self.markers
            if self._opens(text):
                return f"{text}\n{m.think_close}\n\n"
            if not views or views[-1]["role"] != "tool":  # after a result its turn goes on, and was shut when it began
                return f"{text}{m.think_open}\n\n{m.think_close}\n\n"
        return text

    def _opens(self, text: str) -> bool:
        return text.rstrip("\n").endswith(self.markers.think_open)

    def _written(self, m: Message, asked: str, text: str) -> str:
        """What stands in `text` after the question, with the thought in front that the prompt `asked` opens."""
        opening, closing = self.markers.think_open, self.markers.think_close
        question, opened, line = asked.rpartition(opening)
        if not opened or line.strip("\n") or not text.startswith(question):
            raise UserError("This chat template writes a question otherwise before its answer than with it.")
        answer = text[len(question) :].removeprefix(closing)  # DeepSeek-V3.1 leaves the closing tag
        thought = self._typed(m.reasoning or "")
        return f"{thought}\n{closing}\n\n{answer}" if line else f"{thought}{closing}{answer}"

    def _views(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        return [view(messages, i, self.found.form, self._typed) for i in range(len(messages))]

    def _typed(self, value: Any) -> Any:
        """A text, or what is made of texts, in which no tag is one."""
        if isinstance(value, dict):
            return {self._typed(k): self._typed(v) for k, v in value.items()}
        if isinstance(value, list):
            return [self._typed(v) for v in value]
        if not isinstance(value, str):
            return value
        return self._tags.sub(lambda tag: tag[0][0] + GAP + tag[0][1:], OURS.sub("", value))

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        at = 0
        for tag in self._tags.finditer(text):
            ids += self._between(text[at : tag.start()])
            ids.append(self._tag_ids[tag[0]])
            at = tag.end()
        return ids + self._between(text[at:])

    def _between(self, text: str) -> list[int]:
        return [token for piece in text.split(GAP) for token in self._encode(self._literal, piece)]
