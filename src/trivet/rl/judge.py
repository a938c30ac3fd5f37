"""A model's opinion as a reward: asked with a template, answered with a score that is parsed.

    value = (score - low) / (high - low)  in [0, 1]

A judge whose answer holds no score, or one outside of low..high, is "unparsed"; one that did not answer is an
"error", or a "timeout" where it was too slow. The model is any ChatModel: a local engine, or a server (`endpoint`).
The question and the answer are data to it, but a policy may learn to talk to it: look at what it rewards.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from trivet.messages import ChatModel, Message, Sampling, Score, StopReason
from trivet.rl.endpoint import EndpointConfig
from trivet.rl.terms import Case, Term
from trivet.spec import Frozen

TEMPLATE = """Rate how good the answer to the question is, from 1 (useless) to 10 (could not be better).
A reference answer is given where there is one. Say in one sentence why, then write a last line "Score: N".

<question>
{question}
</question>
<reference>
{reference}
</reference>
<answer>
{answer}
</answer>"""

Run = Callable[[Sequence[Coroutine[Any, Any, Message]]], Sequence[Message | BaseException]]


class JudgeConfig(Frozen):
    name: Literal["judge"] = "judge"
    model: str = Field(description="stage or model directory of the judge; with `server`: its name there")
    server: EndpointConfig | None = Field(default=None, description="a server that speaks OpenAI's chat completions")
    template: str = Field(default=TEMPLATE, description="what it is asked: {question}, {reference}, {answer}")
    pattern: str = Field(
        default=r"(?i)score\W{0,5}(-?\d+(?:\.\d+)?)", description="its last match's group 1 is the score"
    )
    low: float = Field(default=1.0, description="the worst score")
    high: float = Field(default=10.0, description="the best score")
    max_tokens: int = Field(default=512, gt=0, description="tokens that it may write")
    thinking: int | Literal["off"] | None = Field(default="off", description="its thinking budget, as in [rl]")

    @model_validator(mode="after")
    def _sound(self) -> JudgeConfig:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) is not below high ({self.high:g})")
        if "{answer}" not in self.template:
            raise ValueError("the template never shows {answer}")
        if re.compile(self.pattern).groups < 1:
            raise ValueError(f"pattern {self.pattern!r} has no group")
        if self.server is not None and "thinking" in self.model_fields_set:
            raise ValueError("servers differ in how they are told to think: leave `thinking` out, see server.body")
        return self


def side_by_side(asked: Sequence[Coroutine[Any, Any, Message]]) -> Sequence[Message | BaseException]:
    """All questions at once, for a model that answers over a network."""

    async def everything() -> list[Message | BaseException]:
        return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(everything())


def judge_term(config: JudgeConfig, model: ChatModel, run: Run = side_by_side) -> Term:
    """`run` drives the questions together: an engine's own, or `side_by_side`."""
    sampling = Sampling(temperature=0.0, max_tokens=config.max_tokens, thinking=config.thinking)

    def term(cases: Sequence[Case]) -> list[Score]:
        asked = [model.complete([Message("user", question(config, case))], (), sampling) for case in cases]
        return [verdict(config, answer) for answer in run(asked)]

    return term


def question(config: JudgeConfig, case: Case) -> str:
    """The template filled in one pass: braces in what a model wrote stay what they are."""
    values = {
        "{question}": case.problem.prompt, "{reference}": case.problem.answer, "{answer}": case.episode.final.content,
    }  # fmt: skip
    return re.sub("|".join(map(re.escape, values)), lambda m: values[m[0]], config.template)


def verdict(config: JudgeConfig, answer: Message | BaseException) -> Score:
    if isinstance(answer, BaseException):
        status: Literal["timeout", "error"] = "timeout" if isinstance(answer, TimeoutError) else "error"
        return Score(0.0, status, detail=f"judge: {type(answer).__name__}: {answer}")
    done = answer.completion
    if done is not None and done.stop in (StopReason.ERROR, StopReason.CANCELLED):
        return Score(0.0, "error", detail=f"judge: {done.error or done.stop}")
    *_, found = (None, *re.finditer(config.pattern, answer.content))
    cut = done is not None and done.stop is StopReason.LENGTH
    if cut and found is not None and found.end() == len(answer.content):  # "Score: 1" may have become 10
        return Score(0.0, "unparsed", detail=f"judge was cut off in its score: {answer.content[-80:]!r}")
    try:
        score = float((found and found[1]) or "none")
    except ValueError:
        return Score(0.0, "unparsed", detail=f"judge wrote no score: {answer.content[-80:]!r}")
    if not config.low <= score <= config.high:
        return Score(0.0, "unparsed", detail=f"judge's score {score:g} is outside {config.low:g}..{config.high:g}")
    return Score((score - config.low) / (config.high - config.low))
