"""Episodes for people to read: JSON lines that the learner writes, and one page that shows them.

    rollouts.jsonl   a line an episode of every `page_every`-th step, as the batch stood before its update
    rollouts.html    the lines of the last steps; loads nothing from anywhere

A line tells tokens apart by one letter each (`kinds`): p the prompt, t what tools and template put between
turns, f forced by the engine, m sampled by the model. `logprob`, `ratio` and `entropy` have one number for
each m, in order: what the sampler gave the token, what the trainer gave it over that, and how open the choice
was. On-policy the ratio is 1 but for rounding. Numbers are rounded; what is trained on are others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivet.config import UserError
from trivet.disk import Journal, write_atomic

if TYPE_CHECKING:
    from trivet.chat import Chat
    from trivet.rl.rollout import Attempt

LINES = "rollouts.jsonl"
HELD = 8  # tokens that may share a character, and then some


def describe_episode(
    attempt: Attempt, chat: Chat, group: int, advantage: float | None, logp: Sequence[float], entropy: Sequence[float]
) -> dict[str, Any]:
    """A line. advantage: None where it is not trained on. logp, entropy: the trainer's, of the sampled tokens."""
    from math import exp

    row, score = attempt.row, attempt.score
    sampled = [p for p, trained in zip(row.logprobs, row.trained, strict=True) if trained]
    return {
        "task": attempt.job.task.name, "problem": attempt.job.problem.id, "answer": attempt.job.problem.answer,
        "group": group, "advantage": None if advantage is None else round(advantage, 4),
        "score": round(score.value, 4), "status": score.status, "detail": score.detail,
        "parts": {name: round(value, 4) for name, value in score.parts.items()},
        "stop": str(attempt.episode.stop), "reasoning_tokens": attempt.episode.reasoning_tokens,
        "ids": list(row.ids), "text": pieces(chat, row.ids), "kinds": kinds(attempt),
        "logprob": [round(p, 4) for p in sampled],
        "ratio": [round(exp(p - q), 4) for p, q in zip(logp, sampled, strict=True)],
        "entropy": [round(h, 4) for h in entropy],
    }  # fmt: skip


def kinds(attempt: Attempt) -> str:
    """A letter for each token of the row."""
    found = ""
    for turn, completion in enumerate(attempt.episode.completions):
        found += ("t" if turn else "p") * (len(completion.prompt_tokens) - len(found))
        found += "".join("m" if sampled else "f" for sampled in completion.sampled)
    return found


def pieces(chat: Chat, ids: Sequence[int]) -> list[str]:
    """The text of each token. They join to the text of all; a character of several tokens stands with its last."""
    found: list[str] = []
    before = done = 0  # what is decoded begins one piece early, for some decoders drop a space at the beginning
    for end in range(1, len(ids) + 1):
        text = chat.decode(ids[before:end])[len(chat.decode(ids[before:done])) :]
        if text.endswith("\ufffd") and end - done < HELD and end < len(ids):
            found.append("")
        else:
            found.append(text)
            before, done = done, end
    return found


def write_page(run: Path, last: int, out: Path | None = None) -> Path:
    """The page of the last recorded steps of a run, `run`/rollouts.html unless `out` says where."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    lines = Journal(run / LINES).read()
    if not lines:
        raise UserError(
            f"{run} has no {LINES}: set rl.page_every, for example to 10, so that RL writes episodes there."
        )
    steps = sorted({line["step"] for line in lines})[-last:]
    environment = Environment(
        loader=PackageLoader("trivet.rl", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    shown = [line for line in lines if line["step"] in steps]
    out = out or run / "rollouts.html"
    page = environment.get_template("rollouts.html.jinja").render(name=run.name, episodes=shown)
    write_atomic(out, page)
    return out
