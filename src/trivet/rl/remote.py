"""Episodes played by a server elsewhere that speaks OpenAI's completions and gives token ids and log-probabilities.

    POST {url}/v1/completions   prompt = [ids], logprobs = 0, return_token_ids = true
    of the answer:              choices[0].token_ids, .logprobs.token_logprobs, .finish_reason, .prompt_token_ids

These are vLLM's fields (tried with 0.32). Prompts are sent and answers read as ids, so nothing is tokenised twice; a
server that leaves ids or log-probabilities out is refused. They must be of the distribution that was drawn from: with
`rl.temperature` other than 1 vLLM has to be started with `--logprobs-mode processed_logprobs`.

A budget of thinking can't be left to a foreign server, so it is kept from here, to the token and by the engine's rule
(`engine/request.py`): an answer is asked for in pieces that end at a thinking tag or one token past the budget; if
that token would go on thinking it is dropped, the closing message takes its place, and the next piece goes on after
it. The pieces' prompts begin alike, which is what a server's prefix cache is for.

Weights are written to a folder that both sides see, in the format of the checkpoint that the server was started with,
before each step. Then `push = "vllm"` calls vLLM's development endpoints (VLLM_SERVER_DEV_MODE=1):
/collective_rpc with reload_weights, and /reset_prefix_cache, because its keys and values are of older weights. Any other
server: `push = ["command", "{path}"]`, which is to return when the weights are in use.

A server samples in other kernels than ours, so engine and trainer differ by more than rounding: see `correction` in
epochs.py. It needn't give the same tokens twice, so a run that resumes is sound but has not the same bits.

Left out: streaming, truncated sampling (vLLM does not say from which tokens it drew), weights over NCCL.
"""

from __future__ import annotations

import asyncio
import copy
import math
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from trivet.agent.loop import Episode
from trivet.chat import Chat
from trivet.config import UserError
from trivet.disk import atomic_dir
from trivet.engine import Request
from trivet.engine.chat_model import as_message, as_request, out_of_room
from trivet.engine.request import Limits, NoRoom
from trivet.hub import read_config_file
from trivet.hub.checkpoint import save_checkpoint
from trivet.hub.pairs import in_pairs
from trivet.hub.write import differences
from trivet.messages import Completion, Message, Sampling, StopReason, ToolSpec
from trivet.model import Transformer
from trivet.model.lora import adapter_parameters, merge
from trivet.rl.client import Client, Failed
from trivet.rl.config import RLConfig, ServerConfig
from trivet.rl.rewards import Reward
from trivet.rl.rollout import Attempt, Job, begin, grade_all
from trivet.rl.sampler import Batch, Player, Sampler
from trivet.tasks import Task
from trivet.train.data import stable_hash

ASKED = {"temperature", "seed", "max_tokens", "thinking", "budget_for", "answer_reserve", "keep_sets"}
SEEDS = 2**31  # that every server takes


@dataclass(frozen=True)
class Piece:
    """What the server wrote, and whether it says that its room was used up."""

    tokens: list[int]
    logprobs: list[float]
    full: bool


# ---------------------------------------------------------------------------------------- the server
class Server(Client):
    """The HTTP side."""

    def __init__(self, config: ServerConfig, connections: int) -> None:
        super().__init__("rl.server", config.url, config.key, config.seconds, connections)
        self.name = config.model

    async def find(self) -> None:
        """What the model is called there, where the settings don't say it."""
        if self.name is None:
            try:
                names = [str(model["id"]) for model in (await self.ask("GET", "/v1/models"))["data"]]
            except (Failed, KeyError, TypeError) as e:
                raise UserError(f"rl.server: no list of models: {e}") from None
            if len(names) != 1:
                raise UserError(f"rl.server.model: say which of {', '.join(names) or 'no models'}.")
            self.name = names[0]

    async def go_on(
        self, prompt: Sequence[int], most: int, stop_ids: Iterable[int], temperature: float, seed: int
    ) -> Piece:  # fmt: skip
        """At most so many tokens after a prompt, up to and with one of `stop_ids`."""
        body = {
            "model": self.name, "prompt": list(prompt), "max_tokens": most, "temperature": temperature, "seed": seed,
            "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,  # not what a generation_config.json says
            "stop_token_ids": sorted(stop_ids), "ignore_eos": True,
            "logprobs": 0, "return_token_ids": True,
        }  # fmt: skip
        answer = await self.ask("POST", "/v1/completions", body)
        return self._read(answer, prompt)

    def _read(self, answer: Any, prompt: Sequence[int]) -> Piece:
        try:
            choice = answer["choices"][0]
            tokens, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        except (KeyError, IndexError, TypeError, AttributeError) as e:
            raise UserError(f"{self.url}: the answer is no completion ({type(e).__name__}: {e}).") from None
        if tokens is None:
            raise UserError(
                f"{self.url} returns no token ids (`return_token_ids`), and text is never tokenised again here: "
                "take a server that does, as vLLM does."
            )
        if logprobs is None or len(logprobs) != len(tokens) or None in logprobs:
            raise UserError(
                f"{self.url} returns no log-probability for each of its tokens (`logprobs`), without which "
                "nothing tells how far it is from the trainer: take a server that does, as vLLM does."
            )
        if choice.get("prompt_token_ids", list(prompt)) != list(prompt):
            raise UserError(f"{self.url} changes prompts (it adds or cuts tokens): switch that off.")
        return Piece(list(tokens), [float(p) for p in logprobs], choice.get("finish_reason") == "length")


# ------------------------------------------------------------------------------------------ ChatModel
@dataclass
class Answer:
    """A completion that is being written. thought: its reasoning tokens so far."""

    thinking: bool
    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    thought: int = 0
    hit: bool = False

    def add(self, tokens: Sequence[int], logprobs: Sequence[float] | None) -> None:
        """What was sampled; without log-probabilities: what is forced."""
        self.tokens += tokens
        self.sampled += [logprobs is not None] * len(tokens)
        self.logprobs += [0.0] * len(tokens) if logprobs is None else logprobs


class RemoteModel:
    """messages.ChatModel over a server, for what RL asks of one. slots: tokens of a sequence at most."""

    def __init__(self, server: Server, chat: Chat, slots: int) -> None:
        self.server, self.chat, self.slots = server, chat, slots

    async def complete(self, messages: Sequence[Message], tools: Sequence[ToolSpec], sampling: Sampling) -> Message:
        extra = [
            f.name for f in fields(Sampling) if f.name not in ASKED and getattr(sampling, f.name) != f.default
        ]  # fmt: skip
        if extra:
            raise UserError(f"A server is not asked for {', '.join(extra)}: leave it out, or leave out rl.server.")
        request = as_request(self.chat, messages, tools, sampling)
        if request.stop_on_tool and self.chat.tool_close_id < 0 and self.chat.markers.tool_close:
            raise UserError(
                f"A server can't be told to stop at {self.chat.markers.tool_close!r}, which is several tokens in this "
                "vocabulary: leave out tasks with tools, or rl.server."
            )
        try:
            limits = Limits.of(request, self.chat, self.slots)
        except NoRoom:
            if messages[-1].role != "tool":
                raise
            return as_message(self.chat, request, out_of_room(request), tools)
        return as_message(self.chat, request, await self._write(request, limits), tools)

    async def _write(self, request: Request, limits: Limits) -> Completion:
        answer, error = Answer(limits.open), None
        try:
            stop = await self._next(request, limits, answer, 0)
            number = 1
            while stop is None:
                stop = await self._next(request, limits, answer, number)
                number += 1
        except Failed as e:
            stop, error = StopReason.ERROR, str(e)
        alike = request.sampling.temperature == 1
        return Completion(
            self.chat.decode(answer.tokens), tuple(answer.tokens), tuple(answer.sampled), tuple(answer.logprobs),
            tuple(p if alike or not s else math.nan for p, s in zip(answer.logprobs, answer.sampled, strict=True)),
            stop, request.prompt, answer.thought, answer.hit, error=error,
        )  # fmt: skip

    async def _next(self, request: Request, limits: Limits, answer: Answer, number: int) -> StopReason | None:
        """Add the piece of this number; the reason where it was the last one."""
        chat, s = self.chat, request.sampling
        room = min(s.max_tokens, self.slots - len(request.prompt)) - len(answer.tokens)
        thought = max(min(limits.budget - answer.thought, limits.last_thought - len(answer.tokens)), 0)
        most = min(thought + 1, room) if answer.thinking else room  # the token more shows whether it would have closed
        tag = chat.think_close_id if answer.thinking else chat.think_open_id
        called = chat.tool_close_id if request.stop_on_tool else -1
        piece = await self.server.go_on(
            (*request.prompt, *answer.tokens), most, {id for id in (chat.end_id, tag, called) if id >= 0},
            s.temperature, stable_hash(s.seed, number) % SEEDS,
        )  # fmt: skip
        tokens, logprobs = piece.tokens, piece.logprobs
        if not tokens:
            return StopReason.LENGTH if piece.full else StopReason.STOP_STRING
        if answer.thinking and len(tokens) > thought and tokens[thought] != tag:  # it would go on
            answer.add(tokens[:thought], logprobs[:thought])
            answer.add(chat.closing_ids[-(room - thought) :], None)
            answer.thought += thought
            answer.thinking, answer.hit = False, True
            return StopReason.LENGTH if len(chat.closing_ids) >= room - thought else None
        answer.add(tokens, logprobs)
        answer.thought += sum(token != tag for token in tokens) if answer.thinking else 0
        if tokens[-1] == chat.end_id:
            return StopReason.END
        if tokens[-1] == called:
            return StopReason.TOOL_CALL
        if len(tokens) == room:
            return StopReason.LENGTH
        if tokens[-1] == tag:
            answer.thinking = not answer.thinking
            return None
        return StopReason.LENGTH if piece.full else StopReason.STOP_STRING  # a limit, or an end, of the server's own


# -------------------------------------------------------------------------------------------- Sampler
class Remote(Sampler):
    """A Sampler whose episodes are played by a server."""

    def __init__(
        self, model: Transformer, chat: Chat, tasks: Sequence[tuple[Task, float]], config: RLConfig,
        device: torch.device | str, rewards: tuple[Reward, ...] = (),
    ):  # fmt: skip
        super().__init__(model, chat, tasks, config, device, rewards)
        assert config.server is not None
        self.where, self.failed = config.server, 0
        if config.replay == "sampler":
            raise UserError(
                "rl.replay = 'sampler' needs the sampler's experts, which a server does not say: 'trainer'."
            )
        described = read_config_file(Path(self.where.like) / "config.json")
        if described.config.get("quantization_config"):
            raise UserError(
                f"rl.server.like: {self.where.like} is quantized, and what is learnt is not: serve a plain one."
            )
        self._config = dict(described.config) | {"dtype": str(model.embed.dtype).removeprefix("torch.")}
        for what in differences(
            in_pairs(_plain(model)).spec, described.spec.model_copy(update={"mtp": model.spec.mtp})
        ):
            raise UserError(f"rl.server.like: {self.where.like} is no model of this shape: {what}.")

    def sample(self, step: int) -> Batch:
        before = self.failed
        batch = super().sample(step)
        return replace(batch, counts=batch.counts | {"server/failed": self.failed - before})

    def _player(self) -> Player:
        path = self.write_weights()
        if self.where.push == "vllm":
            asyncio.run(self._push(path))
        else:
            self._command([part.replace("{path}", str(path)) for part in self.where.push])

        def play_all(jobs: Sequence[Job]) -> list[Attempt]:
            episodes = asyncio.run(self._play_all(jobs))  # over before the grading, in which a judge has its own loop
            return [Attempt(*done) for done in zip(jobs, episodes, grade_all(jobs, episodes), strict=True)]

        return play_all

    async def _play_all(self, jobs: Sequence[Job]) -> list[Episode]:
        c = self.config
        async with Server(self.where, c.max_rows) as server:
            await server.find()
            model = RemoteModel(server, self.chat, c.length + 1)
            episodes: list[Episode] = await asyncio.gather(*(begin(model, job, c.max_turns) for job in jobs))
            self.failed += server.failed
        return episodes

    # --- weights ------------------------------------------------------------------------------------
    @torch.no_grad()
    def write_weights(self) -> Path:
        """Where they are now: in a folder of their own, for what was there is replaced."""
        path = Path(self.where.folder).absolute() / "weights"
        with atomic_dir(path) as aside:
            save_checkpoint(in_pairs(_plain(self.model)), aside, self._config)
        return path

    def _command(self, command: Sequence[str]) -> None:
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as e:
            raise UserError(f"rl.server.push: {command[0]} can't be run: {e.strerror}.") from None
        if done.returncode:
            raise UserError(f"rl.server.push: {command[0]} failed ({done.returncode}): {done.stderr.strip()[-300:]}")

    async def _push(self, path: Path) -> None:
        try:
            async with Server(self.where, 1) as server:
                body = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
                await server.ask("POST", "/collective_rpc", body)
                emptied = await server.ask("POST", "/reset_prefix_cache")
        except Failed as e:
            raise UserError(f"rl.server: the weights could not be handed over: {e}") from None
        if emptied is not None and not emptied.get("success", True):
            raise UserError(
                "rl.server: its prefix cache could not be emptied, someone else is using it: give it to RL alone."
            )


def _plain(model: Transformer) -> Transformer:
    """An ordinary model: adapters are merged into a copy."""
    if not adapter_parameters(model):
        return model
    merged = copy.deepcopy(model)
    merge(merged)
    return merged
