"""What a batch of episodes was like, before anything is learnt from it: the metrics of an RL step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from trivet.rl.rollout import Attempt


def describe(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Metrics of a batch before any update. Rewards are means over the scores that are ok."""
    n = len(attempts)
    ok = [a for a in attempts if a.score.ok]
    values: dict[str, Any] = {
        "reward": _mean([a.score.value for a in ok]),
        "accuracy": _mean([a.right for a in ok]),
    }
    for name in sorted({a.job.task.name for a in ok}):
        of_task = [a for a in ok if a.job.task.name == name]
        values[f"reward/{name}"] = _mean([a.score.value for a in of_task])
        values[f"accuracy/{name}"] = _mean([a.right for a in of_task])
        values[f"reasoning_tokens/{name}"] = _mean([a.episode.reasoning_tokens for a in of_task])
    for part in sorted({part for a in attempts for part in a.score.parts}):
        values[f"reward/{part}"] = _mean([a.score.parts[part] for a in ok if part in a.score.parts])
    values |= {
        "thinks": sum(a.thinks for a in attempts) / n,
        "calls_tool": sum(a.calls_tool for a in attempts) / n,
        "budget_hit": sum(a.episode.budget_hit for a in attempts) / n,
        "truncated": sum(a.truncated for a in attempts) / n,
        "repeats": sum(a.repeats for a in attempts) / n,
        "reasoning_tokens": sum(a.episode.reasoning_tokens for a in attempts) / n,
        "answer_tokens": sum(a.tokens - a.episode.reasoning_tokens for a in attempts) / n,
        "not_ok": n - len(ok),
    }
    for status, count in sorted(Counter(a.score.status for a in attempts if not a.score.ok).items()):
        values[f"not_ok/{status}"] = count
    return values


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
