"""What an episode is worth besides its task's grade: `[[rewards]]`, a table of terms with weights.

    reward = task's score + sum over terms of weight * term's value

A term is a function of episodes alone, a batch at a time (a judge or a reward model wants many at once), and
gives a Score to each: a value in the range that its row of `TERMS` states, and a status. One term that is not
ok makes the whole reward not ok: masked and counted, never a 0 (DeepSeek-R1 and MiniMax-M1 say nothing about
graders that fail; their users do). Values stay apart in `Score.parts`, unweighted, with the task's as "task".

Terms that need a model are rows that the caller adds: `make_rewards(tables, TERMS | {"judge": (JudgeConfig, ...)})`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trivet.agent.loop import Episode
from trivet.config import UserError, nearest, validate
from trivet.messages import Score
from trivet.rl import terms
from trivet.rl.terms import Case, Term
from trivet.spec import Frozen

Row = tuple[type[Frozen], Callable[[Any], Term]]

TERMS: dict[str, Row] = {
    "format": (terms.FormatConfig, terms.format_term),
    "language": (terms.LanguageConfig, terms.language_term),
    "alphabet": (terms.AlphabetConfig, terms.alphabet_term),
    "length": (terms.LengthConfig, terms.length_term),
    "overlong": (terms.OverlongConfig, terms.overlong_term),
    "repetition": (terms.RepetitionConfig, terms.repetition_term),
    "schema": (terms.SchemaConfig, terms.schema_term),
    "tools": (terms.ToolsConfig, terms.tools_term),
}


@dataclass(frozen=True)
class Reward:
    """A term in use. `label` is its name in metrics (`reward/<label>`).

    tasks: names of those that it is for; none: all. instead: it stands in place of the task's grade, which stays
    in `parts` to be watched and counts for nothing.
    """

    label: str
    weight: float
    term: Term
    tasks: tuple[str, ...] = ()
    instead: bool = False


def rewards_of(rewards: Sequence[Reward], task: str) -> tuple[Reward, ...]:
    """Those that are for a task."""
    return tuple(reward for reward in rewards if not reward.tasks or task in reward.tasks)


def make_rewards(tables: Sequence[Mapping[str, Any]], known: Mapping[str, Row] = TERMS) -> tuple[Reward, ...]:
    """Terms from their tables in a config: `name`, `weight`, perhaps `label`, `tasks`, `instead`, and their own settings."""
    made: list[Reward] = []
    for table in tables:
        settings = dict(table)
        name, weight = str(settings.get("name")), settings.pop("weight", None)
        label = settings.pop("label", name)
        tasks, instead = settings.pop("tasks", ()), settings.pop("instead", False)
        if name not in known:
            raise UserError(f"No reward {name!r}; there are {', '.join(known)}.{nearest(name, known)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise UserError(f"reward {name!r}: weight must be a number, not {weight!r}.")
        if not isinstance(label, str) or label == "task" or label in (r.label for r in made):
            raise UserError(f"reward {name!r}: another label than {label!r} is needed, because that one is taken.")
        if isinstance(tasks, str) or not all(isinstance(task, str) for task in tasks) or not isinstance(instead, bool):
            raise UserError(f"reward {name!r}: tasks must be a list of names and instead true or false.")
        schema, build = known[name]
        term = build(validate(settings, schema, f"reward {name!r}"))
        made.append(Reward(label, float(weight), term, tuple(tasks), instead))
    return tuple(made)


def add_rewards(cases: Sequence[Case], scores: Sequence[Score], rewards: Sequence[Reward]) -> list[Score]:
    """The tasks' scores with the terms added. What a task could not grade is not asked about."""
    result = list(scores)
    asked = [i for i, score in enumerate(scores) if score.ok]
    graded = not any(reward.instead for reward in rewards)
    for i in asked if rewards else []:
        parts = {"task": scores[i].value, **scores[i].parts}
        result[i] = Score(scores[i].value if graded else 0.0, "ok", parts, scores[i].detail)
    for reward in rewards:
        given = _all(reward, [cases[i] for i in asked])
        for i, score in zip(asked, given, strict=True):
            result[i] = add(result[i], reward, score)
    return result


def add(total: Score, reward: Reward, score: Score) -> Score:
    if not score.ok:
        first = total if not total.ok else Score(0.0, score.status, detail=f"reward {reward.label!r}: {score.detail}")
        return Score(0.0, first.status, total.parts, first.detail)
    parts = {**total.parts, reward.label: score.value}
    return Score(total.value + reward.weight * score.value if total.ok else 0.0, total.status, parts, total.detail)


def _all(reward: Reward, cases: Sequence[Case]) -> Sequence[Score]:
    """The term's scores; one that fails as a whole is counted for every episode, and stops the run."""
    try:
        given = reward.term(cases)
    except Exception as e:
        return [Score(0.0, "error", detail=f"{type(e).__name__}: {e}")] * len(cases)
    if len(given) != len(cases):
        return [Score(0.0, "error", detail=f"{len(given)} scores for {len(cases)} episodes")] * len(cases)
    return given


__all__ = ["TERMS", "Case", "Episode", "Reward", "Term", "add_rewards", "make_rewards"]
