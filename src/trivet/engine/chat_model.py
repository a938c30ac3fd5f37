"""The engine as a ChatModel, shared by any number of conversations.

`run` drives many coroutines over one engine: all of them go on until each waits for the engine or is
done, then the engine steps until something ends. Nothing depends on timing, so the batches, and with
them the results, are the same every time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from trivet.chat import Chat
from trivet.engine.engine import Engine
from trivet.engine.request import NoRoom, Request
from trivet.messages import Completion, Event, Message, Sampling, StopReason, ToolSpec

R = TypeVar("R")


class EngineModel:
    """messages.ChatModel over an Engine."""

    def __init__(self, engine: Engine, chat: Chat) -> None:
        self.engine, self.chat = engine, chat
        self._futures: dict[int, asyncio.Future[Completion]] = {}
        self._driven = False

    async def complete(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec],
        sampling: Sampling,
        so_far: Completion | None = None,
    ) -> Message:
        """so_far: the answer's beginning, where it was written before (`Request`)."""
        request = replace(self.request(messages, tools, sampling), so_far=so_far)
        id = self._add(request, messages)
        if id is None:
            return self.message(request, out_of_room(request), tools)
        future = asyncio.get_running_loop().create_future()
        self._futures[id] = future
        while not self._driven and not future.done():
            self._advance()
        return self.message(request, await future, tools)

    async def stream(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], sampling: Sampling
    ) -> AsyncIterator[Event]:
        """The same completion, piece by piece; the last event is "done" and carries the message."""
        request = self.request(messages, tools, sampling)
        id = self._add(request, messages)
        splitter, seen = self.chat.splitter(self.chat.thinking_open(request.prompt), tools, sampling.stop), 0
        completion = out_of_room(request) if id is None else None
        while id is not None and completion is None:
            completion = dict(self.engine.step()).get(id)
            tokens = completion.tokens if completion is not None else self.engine.so_far(id)
            for event in splitter.push(tokens[seen:]):
                yield event
            seen = len(tokens)
        for event in splitter.finish():
            yield event
        assert completion is not None
        yield Event("done", message=self.message(request, completion, tools))

    def run(self, coroutines: Sequence[Coroutine[Any, Any, R]], enough: Callable[[list[bool]], bool] = all) -> list[R]:
        """Results of coroutines that all talk to this model, in their order.

        enough: told which are done, whether to stop. The others then get what was written so far, as CANCELLED, and
        are to end with it.
        """
        return asyncio.run(self._drive(coroutines, enough))

    async def _drive(
        self, coroutines: Sequence[Coroutine[Any, Any, R]], enough: Callable[[list[bool]], bool]
    ) -> list[R]:
        tasks = [asyncio.ensure_future(c) for c in coroutines]
        self._driven = True
        try:
            while not all(task.done() for task in tasks):
                for task in tasks:
                    if task.done():
                        task.result()  # whatever one raised ends all of them
                if len(self._futures) < sum(not task.done() for task in tasks):
                    await asyncio.sleep(0)  # some can go on by themselves
                else:
                    if enough([task.done() for task in tasks]):
                        self.engine.cancel_all()
                    self._advance()
                    await asyncio.sleep(0)
            return [task.result() for task in tasks]
        finally:
            self._driven = False
            for task in tasks:
                task.cancel()
            self.engine.cancel_all()
            self._futures.clear()

    def _advance(self) -> None:
        """Step the engine until a request ends."""
        ended: list[tuple[int, Completion]] = []
        while not ended:
            ended = self.engine.step()
        for id, completion in ended:
            future = self._futures.pop(id, None)
            if future is not None and not future.done():
                future.set_result(completion)

    def request(self, messages: Sequence[Message], tools: Sequence[ToolSpec], sampling: Sampling) -> Request:
        return as_request(self.chat, messages, tools, sampling)

    def _add(self, request: Request, messages: Sequence[Message]) -> int | None:
        """Queue a request; None where what its own tools answered has used up the room that was left."""
        try:
            return self.engine.add(request)
        except NoRoom:
            if messages[-1].role == "tool":
                return None
            raise

    def message(self, request: Request, completion: Completion, tools: Sequence[ToolSpec]) -> Message:
        return as_message(self.chat, request, completion, tools)


def as_request(chat: Chat, messages: Sequence[Message], tools: Sequence[ToolSpec], sampling: Sampling) -> Request:
    """A conversation as a request: its ids, and what its turn has already spent on thinking."""
    rendered = chat.render(messages, tools, thinking=sampling.thinking != "off", generate=True)
    used = 0
    for message in reversed(messages):
        if message.role == "user" and sampling.budget_for == "turn":
            break
        if message.completion is not None:
            used += message.completion.reasoning_tokens
    return Request(tuple(rendered.ids), sampling, used, stop_on_tool=bool(tools))


def as_message(chat: Chat, request: Request, completion: Completion, tools: Sequence[ToolSpec]) -> Message:
    inside, stops = chat.thinking_open(request.prompt), request.sampling.stop
    parsed = chat.parse(completion.tokens, inside, tools, stops)
    return replace(parsed, cut=completion.budget_hit, completion=completion)


def out_of_room(request: Request) -> Completion:
    """An episode that ends because nothing more fits: no tokens, and the reason."""
    return Completion("", (), (), (), (), StopReason.LENGTH, request.prompt)
