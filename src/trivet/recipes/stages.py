"""A recipe is a list of stages; a stage reads a directory and writes a directory.

    runs/demo/sft/   config.json  model.safetensors  tokenizer.json  tokenizer_config.json   the model
                     adapter_config.json  adapter_model.safetensors   with `lora`, in place of the first two
                     stage.json                      what was asked for, defaults filled in
                     metrics.jsonl  tensorboard/     one line a step
                     resume/                         the last two training states
                     done.json                       written last: the stage is complete

Running a recipe again skips complete stages and resumes the one that was stopped, so Ctrl-C, kill -9
and a full disk all have the same cure: the same command. A stage whose settings changed since it ran
is refused, never silently reused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator

from trivet.config import UserError
from trivet.disk import write_atomic
from trivet.recipes.kinds import compare, distil, preference, report, rl, sample, train
from trivet.recipes.kinds.base import Context, Progress
from trivet.recipes.kinds.compare import CompareStage
from trivet.recipes.kinds.distil import DistilStage
from trivet.recipes.kinds.preference import PreferenceStage
from trivet.recipes.kinds.report import ReportStage
from trivet.recipes.kinds.rl import RLStage
from trivet.recipes.kinds.sample import SampleStage
from trivet.recipes.kinds.train import TrainStage
from trivet.recipes.workers import Tell, side_by_side
from trivet.spec import Frozen
from trivet.train.checkpoint import first_difference
from trivet.train.parallel import Ranks, first, ranks_of

Stage = Annotated[
    TrainStage | RLStage | SampleStage | PreferenceStage | DistilStage | CompareStage | ReportStage,
    Field(discriminator="kind"),
]
RUNNERS: dict[str, Callable[[Any, Context], dict[str, Any]]] = {
    "train": train.run, "rl": rl.run, "sample": sample.run, "preference": preference.run, "distil": distil.run, "compare": compare.run, "report": report.run,
}  # fmt: skip


TOGETHER = ("train", "rl")  # what the processes that torchrun started do together


class Recipe(Frozen):
    """Stages in the order in which they run."""

    name: str
    seed: int = Field(default=0, description="added to the seed of every stage that trains")
    threads: int = Field(default=0, ge=0, description="CPU threads; 0: PyTorch's choice")
    stages: dict[str, Stage]

    @model_validator(mode="after")
    def _names(self) -> Recipe:
        bad = [name for name in self.stages if not name.replace("-", "").replace("_", "").isalnum()]
        if bad:
            raise ValueError(f"a stage's name becomes a folder, so {bad[0]!r} must be letters, digits, - and _")
        return self


def run_recipe(
    recipe: Recipe,
    run: Path,
    device: torch.device,
    watch: Callable[[str, Stage], Progress | None],
    say: Callable[[str], None],
) -> None:
    """Run all stages of a recipe. `watch(name, stage)` gives each stage its progress display.

    Stages that wait for nothing run side by side as far as the recipe's threads go, on one process. How many threads a
    stage has is its own setting and not a matter of what runs beside it, so its result isn't either.
    """
    stages = {name: stage.reseeded(recipe.seed) for name, stage in recipe.stages.items()}
    ranks = ranks_of(1, 1)
    for wave in waves(stages, recipe.threads if device.type == "cpu" and ranks.world == 1 else 0):
        shows = {name: watch(name, stages[name]) for name in wave}
        contexts = {name: Context(run / name, run, recipe, device, shows[name], say) for name in wave}
        if len(wave) > 1:
            _run_beside({name: stages[name] for name in wave}, contexts)
        else:
            torch.set_num_threads(stages[wave[0]].threads or recipe.threads or torch.get_num_threads())
            _run_together(stages[wave[0]], contexts[wave[0]], ranks)


def waves(stages: Mapping[str, Stage], threads: int) -> list[list[str]]:
    """The stages in the order in which they run, those of a wave side by side: equal threads, `threads` in all."""
    left, found = list(stages), []
    while left:
        ready = [name for name in left if not stages[name].inputs() & set(left)] or left[:1]
        first = ready[0]
        each = stages[first].threads
        room = threads // each if each else 1
        wave = [name for name in ready if stages[name].threads == each][: max(room, 1)]
        left = [name for name in left if name not in wave]
        found.append(wave)
    return found


def _run_together(stage: Stage, context: Context, ranks: Ranks) -> None:
    """On several processes: one of a kind that can't share out its work is the first one's, and the others wait for it."""
    failed: BaseException | None = None
    if stage.kind in TOGETHER:
        run_stage(stage, context)
    elif ranks.first:
        try:
            run_stage(stage, context)
        except (UserError, KeyboardInterrupt) as e:  # which the others are to hear of
            failed = e
    if ranks.any(failed is not None)[0]:  # nobody goes on before all that it wrote is there
        raise failed or SystemExit  # what went wrong, the first one says


def _run_beside(stages: Mapping[str, Stage], contexts: Mapping[str, Context]) -> None:
    """Stages of equal threads, each in a process of its own."""
    silent = {name: replace(context, progress=None, say=print) for name, context in contexts.items()}
    jobs = {name: partial(_in_a_worker, stage, silent[name]) for name, stage in stages.items()}

    def show(name: str, metrics: dict[str, Any]) -> None:
        progress = contexts[name].progress
        if progress is not None:
            progress(metrics)

    (threads,) = {stage.threads for stage in stages.values()}
    for name, notes in side_by_side(jobs, len(jobs), threads, show):
        for note in notes:
            contexts[name].say(note)


def _in_a_worker(stage: Stage, context: Context, tell: Tell) -> list[str]:
    """`run_stage`, telling its progress and returning what it has to say."""
    said: list[str] = []
    run_stage(stage, replace(context, progress=tell, say=said.append))
    return said


def run_stage(stage: Stage, context: Context) -> dict[str, Any]:
    """Run, resume or skip one stage; returns the summary that done.json holds."""
    out = context.out
    resolved = json.loads(stage.model_dump_json())
    asked = out / "stage.json"
    if asked.exists() and any(p != asked for p in out.iterdir()):  # else it failed before it began
        later = {key: f.default for key, f in type(stage).model_fields.items() if not f.is_required()}
        was_asked = later | json.loads(asked.read_text())  # a setting may be newer than the run
        changed = first_difference(stage.without_free(was_asked), stage.without_free(resolved))
        if changed is not None:
            key, was, now = changed
            raise UserError(
                f"{out} was run with {key} = {was}, now it is {now}: set it back, or give this run another --out."
            )
    if (out / "done.json").exists():
        context.say(f"{out}: complete, skipped")
        return json.loads((out / "done.json").read_text())
    if first():
        write_atomic(asked, json.dumps(resolved, indent=1))
    summary = RUNNERS[stage.kind](stage, context)
    if first():
        write_atomic(out / "done.json", json.dumps(summary, indent=1))
    return summary
