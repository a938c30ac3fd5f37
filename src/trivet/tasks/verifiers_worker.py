"""The other side of `verifiers`: an environment in a worker process, which plays transcripts again.

    opened(name, args, path)("describe", folder)        its tools and rows
                            ("reply", data, row, turns)  what it says to the last turn; [] where it is over
                            ("grade", data, row, turns)  the Score of the whole

The environment's own `rollout` runs, as for any model, but the model's answers are read off the transcript. What it
asks the model with must be the transcript so far, to the letter, or nothing that was sampled would be what it scores.
At the end of the transcript it either is over by itself, or its next question holds the reply.

Its rubric turns what a function raises into 0.0, so its functions are watched from inside. One of weight 0 is only a
metric: it loses its part. Tried with 0.1.8, 0.1.9, 0.1.10, 0.1.12 and 0.1.14; from 0.3 on the package has other
environments.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trivet.config import UserError
from trivet.messages import Score

INSTALL = "pip install 'trivet[verifiers]'"
VERSIONS = ((0, 1, 8), (0, 2))  # from, below
OTHERS = {  # by class, wherever in the family: what does not fit
    "SandboxEnv": "it starts a sandbox elsewhere, and would for every turn that is played again",
    "EnvGroup": "it is a group: give each of its environments a [[tasks]] table of its own",
}
Turn = Mapping[str, Any]


class Asked(BaseException):
    """The transcript is at its end and the environment goes on: `said` is its reply. No Exception may catch it."""

    def __init__(self, said: list[dict[str, Any]]) -> None:
        self.said = said


class Differs(BaseException):
    """The environment does not say what the transcript has."""


def opened(name: str, args: dict[str, Any], path: str | None) -> Callable[..., Any]:
    """The functions of one environment. Raises UserError where it can't be had or does not fit."""
    load = loader()
    if path is not None:
        sys.path.insert(0, path)
    try:
        env = load(name, **args)
    except Exception as e:  # its own code, or what it needs: all of it is the user's to mend
        raise UserError(f"verifiers:{name} can't be loaded: {type(e).__name__}: {e}") from None
    why = misfit(env)
    if why is not None:
        raise UserError(f"verifiers:{name} can't be played here: {why}.")
    here = Environment(env)
    functions: dict[str, Callable[..., Any]] = {"describe": here.describe, "reply": here.reply, "grade": here.grade}
    return lambda what, *given: functions[what](*given)


def loader() -> Callable[..., Any]:
    try:
        found = version("verifiers")
    except PackageNotFoundError:
        raise UserError(f"Tasks named verifiers:... need the package of that name: {INSTALL}") from None
    number = tuple(int(part) for part in found.split(".")[:3] if part.isdigit())
    if not VERSIONS[0] <= number < VERSIONS[1]:
        raise UserError(f"verifiers {found} has other environments; this reads those of 0.1.8 to 0.1.14: {INSTALL}")
    from verifiers import load_environment

    return load_environment


def misfit(env: Any) -> str | None:
    """Why an environment can't be played here."""
    import verifiers as vf

    family = type(env).__mro__
    for kind in family:
        if kind.__name__ in OTHERS:
            return OTHERS[kind.__name__]
    if not isinstance(env, vf.MultiTurnEnv) or type(env).rollout is not vf.MultiTurnEnv.rollout:
        return "it has a rollout of its own"
    if type(env).get_model_response is not vf.Environment.get_model_response:
        return "it asks its model in a way of its own"
    if env.message_type != "chat":
        return "it is for raw completions, not for chat"
    functions = [(rubric, function) for rubric in rubrics(env.rubric) for function in rubric.funcs]
    if not functions:
        return "its rubric has no functions"
    for rubric, function in functions:
        if rubric._is_group_func(function):
            return f"its {function.__name__} compares several episodes, and here each is graded by itself"
    return None


def rubrics(rubric: Any) -> list[Any]:
    """A rubric, or those of a group."""
    parts = vars(rubric).get("rubrics")
    return [rubric] if parts is None else [leaf for part in parts for leaf in rubrics(part)]


class Environment:
    """One environment, its rows and what went wrong in its rubric."""

    def __init__(self, env: Any) -> None:
        self.env = env
        self.failed: list[tuple[str, float, str]] = []  # functions that raised: name, weight, what
        self.loop = asyncio.new_event_loop()  # one for all: clients of a judge belong to theirs
        for rubric in rubrics(env.rubric):
            rubric.funcs[:] = [self.watched(f, w) for f, w in zip(rubric.funcs, rubric.weights, strict=True)]

    def watched(self, function: Callable[..., Any], weight: float) -> Callable[..., Any]:
        """The same function, whose failures are written down."""
        name = function.__name__

        @functools.wraps(function)
        async def call(*args: Any, **kwargs: Any) -> Any:
            try:
                found = function(*args, **kwargs)
                found = await found if inspect.isawaitable(found) else found
                if not math.isfinite(float(found)):
                    raise ValueError(f"not a finite number: {found}")
                return found
            except Exception as e:
                self.failed.append((name, weight, f"{name}: {type(e).__name__}: {e}"))
                raise

        return call

    # --- what is asked --------------------------------------------------------------------------------
    def describe(self, folder: str) -> dict[str, Any]:
        """Write the rows into files `train` and `eval`; the same rows in both where there is only one data set."""
        import verifiers as vf

        for name in ("train", "eval"):
            try:
                rows = self.rows(name)
            except ValueError as e:
                if "is not set" not in str(e):
                    raise
                rows = []  # it has none
            try:
                lines = [json.dumps(self.line(name, place, row)) for place, row in enumerate(rows)]
            except UserError as e:
                return {"refused": str(e)}
            Path(folder, name).write_text("".join(f"{line}\n" for line in lines))
        return {
            "tools": self.tools(), "turns": self.env.max_turns, "thoughts": isinstance(self.env.parser, vf.ThinkParser),
        }  # fmt: skip

    def reply(self, data: str, row: int, turns: Sequence[Turn]) -> Any:
        try:
            self.play(data, row, turns)
        except Asked as asked:
            return asked.said
        except Differs as e:
            return Score(0.0, "error", detail=str(e))
        return []

    def grade(self, data: str, row: int, turns: Sequence[Turn]) -> Score:
        self.failed.clear()
        try:
            try:
                state = self.play(data, row, turns)
            except Asked:  # an episode that ended before the environment wanted it to
                state = self.play(data, row, turns, last=True)
        except Differs as e:
            return Score(0.0, "error", detail=str(e))
        if state.get("timed_out"):
            return Score(0.0, "timeout", detail="the environment's own limit of time")
        if state.get("error") is not None:
            return Score(0.0, "error", detail=f"the environment: {state['error']!r}"[:500])
        self.loop.run_until_complete(self.score(state))
        broken = [what for _, weight, what in self.failed if weight]
        if broken:
            return Score(0.0, "error", detail="; ".join(broken)[:500])
        lost = {name for name, _, _ in self.failed}
        parts = {name: float(value) for name, value in (state["metrics"] or {}).items() if name not in lost}
        return Score(float(state["reward"]), "ok", parts, "; ".join(what for *_, what in self.failed)[:500])

    async def score(self, state: Any) -> None:
        score = self.env.rubric.score_rollout
        bounded = "score_sem" in inspect.signature(score).parameters  # before 0.1.10
        await (score(state, asyncio.Semaphore()) if bounded else score(state))

    # --- playing --------------------------------------------------------------------------------------
    def play(self, data: str, row: int, turns: Sequence[Turn], last: bool = False) -> Any:
        """The state of the environment's rollout over a transcript. last: nothing comes after it.

        Raises Asked where it wants another answer, Differs where it says something else than the transcript.
        """
        first, given = len(self.rows(data)[row]["prompt"]), 0
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= first]

        async def respond(*args: Any, **kwargs: Any) -> Any:
            nonlocal given
            asked = [told(m) for m in next(a for a in (*args, *kwargs.values()) if isinstance(a, list))]
            at = answers[given] if given < len(answers) else len(turns)
            known = [key(turn) for turn in turns[:at]]
            if [key(turn) for turn in asked[:at]] != known or (given < len(answers) and len(asked) > at):
                raise Differs(f"before answer {given + 1} the environment does not say what it said when it was played")
            if given == len(answers):
                raise Asked(asked[at:])
            given += 1
            return response(turns[at])

        async def over(state: Any) -> bool:
            return last and len(state["trajectory"]) >= len(answers)

        env, conditions = self.env, self.env._stop_conditions
        env.get_model_response = respond
        env._stop_conditions = [*conditions, over]
        try:
            return self.loop.run_until_complete(env.rollout(self.rows(data)[row], nobody(), "trivet", {}))
        finally:
            env._stop_conditions = conditions

    # --- reading --------------------------------------------------------------------------------------
    def rows(self, data: str) -> Any:
        return self.env.get_dataset() if data == "train" else self.env.get_eval_dataset()

    def line(self, data: str, place: int, row: Mapping[str, Any]) -> dict[str, Any]:
        info = row.get("info") or {}
        info = json.loads(info) if isinstance(info, str) else info
        if info.get("tool_defs") or info.get("oai_tools"):
            raise UserError("rows with tools of their own (info) can't be played here")
        if not isinstance(row["prompt"], list):
            raise UserError(f"the prompt of row {place} of {data} is no list of messages")
        prompt = [told(m) for m in row["prompt"]]
        if not prompt or prompt[-1]["role"] != "user":
            raise UserError(f"the prompt of row {place} of {data} does not end with a user's message")
        return {"row": place, "prompt": prompt, "answer": str(row["answer"]) if row.get("answer") is not None else ""}

    def tools(self) -> list[dict[str, Any]]:
        """Name, description and parameters of each, in either of the forms that versions have."""
        said = vars(self.env)
        found = [as_dict(tool) for tool in said.get("tool_defs") or said.get("oai_tools") or []]
        found = [tool.get("function", tool) for tool in found]
        return [
            {"name": t["name"], "description": t.get("description", ""), "parameters": t["parameters"]} for t in found
        ]


# ------------------------------------------------------------------------------------------ messages
def as_dict(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else value.model_dump(exclude_none=True)


def told(m: Any) -> dict[str, Any]:
    """A message of either form (dict, pydantic) as the parent knows it. Raises UserError for pictures and the like."""
    said = as_dict(m)
    calls = [as_dict(call) for call in said.get("tool_calls") or []]
    flat = [{"id": c["id"], **as_dict(c.get("function", c))} for c in calls]
    return {
        "role": said["role"], "content": text(said.get("content")), "reasoning": said.get("reasoning_content"),
        "calls": [{"id": c["id"], "name": c["name"], "arguments": c["arguments"]} for c in flat],
        "call": said.get("tool_call_id"),
    }  # fmt: skip


def text(content: Any) -> str:
    """Content as text: a string, nothing, or parts that are all text."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = [as_dict(part) for part in content]
    other = next((part["type"] for part in parts if part["type"] != "text"), None)
    if other is not None:
        raise UserError(f"a message holds {other}, and only text can be read here")
    return "".join(part["text"] for part in parts)


def key(turn: Turn) -> tuple[Any, ...]:
    """What must be the same when a transcript is played again."""
    return (
        turn["role"],
        turn["content"],
        turn["call"],
        [(c["id"], c["name"], form(c["arguments"])) for c in turn["calls"]],
    )


def form(arguments: str) -> Any:
    """A call's arguments without how they were spaced."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def response(turn: Turn) -> Any:
    """A turn of the model as what this version's clients return."""
    calls, why = turn["calls"], "length" if turn["cut"] else "tool_calls" if turn["calls"] else "stop"
    try:
        from verifiers.types import Response
    except ImportError:  # before 0.1.11: OpenAI's own class
        from verifiers.types import ChatCompletion

        said: dict[str, Any] = {"role": "assistant", "content": turn["content"]}
        if calls:
            said["tool_calls"] = [
                {"id": c["id"], "type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}}
                for c in calls
            ]
        choice = {"index": 0, "finish_reason": why, "message": said, "logprobs": None}
        return ChatCompletion.model_validate(
            {"id": "trivet", "object": "chat.completion", "created": 0, "model": "trivet", "choices": [choice]}
        )
    said = {
        "content": turn["content"], "reasoning_content": turn["reasoning"], "tool_calls": calls or None,
        "finish_reason": why, "is_truncated": turn["cut"],
    }  # fmt: skip
    return Response.model_validate({"id": "trivet", "created": 0, "model": "trivet", "message": said})


def nobody() -> Any:
    """A client that is never asked; before 0.1.11 none is needed."""
    try:
        from verifiers.clients import Client
    except ImportError:
        return None
    return type("Nobody", (Client,), dict.fromkeys(Client.__abstractmethods__))(None)
