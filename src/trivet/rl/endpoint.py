"""A ChatModel behind any server that speaks OpenAI's chat completions: for a judge, of whom only the text is read.

    POST {url}/chat/completions   model, messages, temperature, max_tokens, and what `body` adds or replaces
    of the answer:                choices[0].message.content, .finish_reason

Text only: what it writes has no token ids here, so nothing can be trained on it (for that: remote.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from pydantic import Field

from trivet.messages import Completion, Message, Sampling, StopReason, ToolSpec
from trivet.rl.client import Client, Failed
from trivet.spec import Frozen


class EndpointConfig(Frozen):
    """A server, as its makers' own clients are told of it."""

    url: str = Field(description="with /v1, where there is one: http://127.0.0.1:8000/v1")
    key: str | None = Field(default=None, description="environment variable that holds the server's key")
    seconds: float = Field(default=60.0, gt=0, description="that one answer may take; it is asked four times")
    at_once: int = Field(default=16, gt=0, description="requests at the same time")
    body: dict[str, Any] = Field(
        default_factory=dict, description="more of a request: chat_template_kwargs = { enable_thinking = false }"
    )


class Endpoint(Client):
    """messages.ChatModel, without tools. Its coroutines are run by `run`."""

    def __init__(self, name: str, config: EndpointConfig, model: str) -> None:
        super().__init__(name, config.url, config.key, config.seconds, config.at_once)
        self.model, self.body = model, config.body

    def run(self, asked: Sequence[Coroutine[Any, Any, Message]]) -> Sequence[Message | BaseException]:
        """All questions, at most `at_once` at a time, in their order; what failed is its exception."""

        async def everything() -> list[Message | BaseException]:
            async with self:
                return await asyncio.gather(*asked, return_exceptions=True)

        return asyncio.run(everything())

    async def complete(self, messages: Sequence[Message], tools: Sequence[ToolSpec], sampling: Sampling) -> Message:
        body: dict[str, Any] = {
            "model": self.model, "messages": [{"role": m.role, "content": m.content} for m in messages],
            "temperature": sampling.temperature, "max_tokens": sampling.max_tokens, **self.body,
        }  # fmt: skip
        if "max_completion_tokens" in self.body:  # some take one of the two names, and refuse the other
            del body["max_tokens"]
        answer = await self.ask("POST", "/chat/completions", body)
        try:
            choice = answer["choices"][0]
            text, why = choice["message"]["content"], choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError) as e:
            raise Failed(f"{self.url}: the answer is no chat completion ({type(e).__name__}: {e})") from None
        if not isinstance(text, str):
            raise Failed(f"{self.url}: the answer has no text ({why})")
        stop = StopReason.LENGTH if why == "length" else StopReason.END
        return Message("assistant", text, completion=Completion(text, (), (), (), (), stop, ()))
