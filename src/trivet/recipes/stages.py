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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator

from trivet.chat import Chat, bpe_chat, tiny_chat
from trivet.config import UserError, explain, nearest
from trivet.disk import write_atomic
from trivet.hub.checkpoint import load_pair
from trivet.messages import Message
from trivet.model import Transformer
from trivet.model.lora import LoRA
from trivet.recipes.adapted import prepare, save_result
from trivet.recipes.judging import known_rewards
from trivet.recipes.workers import Tell, side_by_side
from trivet.rl.config import RLConfig
from trivet.rl.learner import learn
from trivet.rl.rewards import make_rewards
from trivet.spec import Frozen, ModelSpec
from trivet.tasks import Climber, Split, Task, make_task, tools_for
from trivet.train.checkpoint import first_difference
from trivet.train.data import Documents, Mixture, PackedBatches, TaskDocuments, TextDocuments
from trivet.train.losses import head_loss
from trivet.train.trainer import TrainConfig, train

Progress = Callable[[dict[str, Any]], None]


# --------------------------------------------------------------------------------------------- schema
class TrainStage(Frozen):
    """Pretraining or supervised fine-tuning: from a new model, or from an earlier stage or directory."""

    kind: Literal["train"] = "train"
    start: str | None = Field(default=None, description="stage or model directory to go on from; else `model`")
    model: dict[str, Any] | None = Field(default=None, description="a ModelSpec; vocab_size comes from the tokenizer")
    lora: LoRA | None = Field(default=None, description="train adapters of `start`, not its weights")
    tokenizer: str = Field(default="tiny", description="'tiny', 'bpe:SIZE' (trained on the data), or a directory")
    tasks: tuple[dict[str, Any], ...] = Field(default=(), description="tasks to imitate: name, weight, settings")
    text: str | None = Field(default=None, description="a plain-text file to pretrain on, instead of tasks")
    threads: int = Field(default=0, ge=0, description="CPU threads; 0: the recipe's. Fewer let stages run side by side")
    train: TrainConfig

    @model_validator(mode="after")
    def _whole(self) -> TrainStage:
        if (self.start is None) == (self.model is None):
            raise ValueError("give either `start` (an earlier model) or `model` (a new one)")
        if self.lora is not None and self.start is None:
            raise ValueError("`lora` adapts an earlier model: give `start` instead of `model`")
        if (not self.tasks) == (self.text is None):
            raise ValueError("give either `tasks` or `text` to train on")
        if self.model is not None:
            try:
                ModelSpec.model_validate({"vocab_size": 1, **self.model})
            except ValidationError as e:
                raise ValueError(f"model: {explain(e, ModelSpec).rstrip('.')}") from None
        return self


class RLStage(Frozen):
    """Reinforcement learning with verifiable rewards, from a trained model."""

    kind: Literal["rl"] = "rl"
    start: str = Field(description="stage or model directory to start from")
    lora: LoRA | None = Field(default=None, description="train adapters of `start`, not its weights")
    tasks: tuple[dict[str, Any], ...] = Field(min_length=1, description="tasks to learn: name, weight, settings")
    rewards: tuple[dict[str, Any], ...] = Field(
        default=(), description="terms added to a task's grade: name, weight, label, settings"
    )
    threads: int = Field(default=0, ge=0, description="CPU threads; 0: the recipe's. Fewer let stages run side by side")
    rl: RLConfig


class ReportStage(Frozen):
    """The demo's evaluation: thinking, budgets, RL, tool, and the dense twin, as results.json and HTML."""

    kind: Literal["report"] = "report"
    cold: str = Field(description="the stage before RL")
    final: str = Field(description="the stage after RL")
    dense: str | None = Field(default=None, description="the dense twin of `cold`")
    count: int = Field(default=512, gt=0, description="problems a point")
    short_chains: tuple[int, int] = Field(description="steps of the chains for thinking and budgets, from and to")
    longer_chains: tuple[int, int] = Field(description="steps of chains longer than any that SFT showed")
    seed: int = 1
    threads: int = Field(default=0, ge=0, description="CPU threads, a process each; 0: the recipe's")


Stage = Annotated[TrainStage | RLStage | ReportStage, Field(discriminator="kind")]


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


# ---------------------------------------------------------------------------------------------- running
@dataclass(frozen=True)
class Context:
    """What a stage may look at besides its own settings."""

    out: Path  # the stage's own directory
    run: Path  # the recipe's directory, parent of all stages
    recipe: Recipe | None
    device: torch.device
    progress: Progress | None
    say: Callable[[str], None]


def run_recipe(
    recipe: Recipe,
    run: Path,
    device: torch.device,
    watch: Callable[[str, Stage], Progress | None],
    say: Callable[[str], None],
) -> None:
    """Run all stages of a recipe. `watch(name, stage)` gives each stage its progress display.

    Stages that wait for nothing run side by side as far as the recipe's threads go. How many threads a
    stage has is its own setting and not a matter of what runs beside it, so its result isn't either.
    """
    stages = {name: reseed(stage, recipe.seed) for name, stage in recipe.stages.items()}
    for wave in waves(stages, recipe.threads if device.type == "cpu" else 0):
        shows = {name: watch(name, stages[name]) for name in wave}
        contexts = {name: Context(run / name, run, recipe, device, shows[name], say) for name in wave}
        if len(wave) > 1:
            _run_beside({name: stages[name] for name in wave}, contexts)
        else:
            torch.set_num_threads(stages[wave[0]].threads or recipe.threads or torch.get_num_threads())
            run_stage(stages[wave[0]], contexts[wave[0]])


def waves(stages: Mapping[str, Stage], threads: int) -> list[list[str]]:
    """The stages in the order in which they run, those of a wave side by side: equal threads, `threads` in all."""
    left, found = list(stages), []
    while left:
        ready = [name for name in left if not inputs(stages[name]) & set(left)] or left[:1]
        first = ready[0]
        each = stages[first].threads
        room = threads // each if each else 1
        wave = [name for name in ready if stages[name].threads == each][: max(room, 1)]
        left = [name for name in left if name not in wave]
        found.append(wave)
    return found


def inputs(stage: Stage) -> set[str]:
    """Names of the stages that it reads from (or of directories)."""
    if stage.kind == "report":
        return {name for name in (stage.cold, stage.final, stage.dense) if name is not None}
    return {stage.start} if stage.start is not None else set()


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


def reseed(stage: Stage, seed: int) -> Stage:
    """The stage under another seed; evaluation stays on the same problems, so that seeds compare."""
    if stage.kind == "train":
        return stage.model_copy(update={"train": stage.train.model_copy(update={"seed": stage.train.seed + seed})})
    if stage.kind == "rl":
        return stage.model_copy(update={"rl": stage.rl.model_copy(update={"seed": stage.rl.seed + seed})})
    return stage


def run_stage(stage: Stage, context: Context) -> dict[str, Any]:
    """Run, resume or skip one stage; returns the summary that done.json holds."""
    out = context.out
    resolved = json.loads(stage.model_dump_json())
    asked = out / "stage.json"
    if asked.exists() and any(p != asked for p in out.iterdir()):  # else it failed before it began
        later = {key: f.default for key, f in type(stage).model_fields.items() if not f.is_required()}
        changed = first_difference(
            later | json.loads(asked.read_text()), resolved
        )  # a setting may be newer than the run
        if changed is not None:
            key, was, now = changed
            raise UserError(
                f"{out} was run with {key} = {was}, now it is {now}: set it back, or give this run another --out."
            )
    if (out / "done.json").exists():
        context.say(f"{out}: complete, skipped")
        return json.loads((out / "done.json").read_text())
    write_atomic(asked, json.dumps(resolved, indent=1))
    summary = RUNNERS[stage.kind](stage, context)
    write_atomic(out / "done.json", json.dumps(summary, indent=1))
    return summary


def _train(stage: TrainStage, context: Context) -> dict[str, Any]:
    tasks = load_tasks(stage.tasks)
    if any(isinstance(task, Climber) for task, _ in tasks):
        raise UserError(
            "A curriculum rises with rewards, and this stage imitates: leave `curriculum` to a stage of RL."
        )
    if stage.start is not None:
        start, model, chat = load_start(stage.start, stage.lora, stage.train.seed, context)
    else:
        start = None
        chat = make_chat(stage, [task for task, _ in tasks])
        spec = ModelSpec.model_validate({**(stage.model or {}), "vocab_size": chat.vocab_size})
        model = Transformer(spec, seed=stage.train.seed)
    documents = make_documents(stage, tasks, chat)
    _check_length(stage, model.spec)
    summary = train(
        model, documents, stage.train, context.out,
        progress=context.progress, evaluate=held_out_loss(stage, tasks, chat), device=context.device,
    )  # fmt: skip
    save_result(model, chat, context.out, start)
    return summary


def _rl(stage: RLStage, context: Context) -> dict[str, Any]:
    start, model, chat = load_start(stage.start, stage.lora, stage.rl.seed, context)
    tasks = load_tasks(stage.tasks)
    rewards = make_rewards(stage.rewards, known_rewards(stage_path(context), context.device))
    summary = learn(
        model, chat, tasks, stage.rl, context.out, rewards=rewards, progress=context.progress, device=context.device
    )
    save_result(model, chat, context.out, start)
    return summary


def _report(stage: ReportStage, context: Context) -> dict[str, Any]:
    from trivet.recipes.demo import report  # matplotlib comes with it

    return report(stage, context)


RUNNERS: dict[str, Callable[[Any, Context], dict[str, Any]]] = {"train": _train, "rl": _rl, "report": _report}


# ----------------------------------------------------------------------------------------------- parts
def load_start(start: str, lora: LoRA | None, seed: int, context: Context) -> tuple[Path | None, Transformer, Chat]:
    """An earlier stage of the same recipe by name, or any model directory by path."""
    path = stage_path(context)(start)
    model, chat = load_pair(path, context.device, torch.float32)  # learning needs exact weights
    prepare(model, lora, path, seed, context.say)
    return path, model, chat


def stage_path(context: Context) -> Callable[[str], Path]:
    """Where a stage's or a directory's model lies."""
    stages = list(context.recipe.stages) if context.recipe else []

    def path(name: str) -> Path:
        found = context.run / name if name in stages else Path(name)
        if not found.is_dir():
            raise UserError(f"{name!r} is neither a stage nor a directory.{nearest(name, stages)}")
        return found

    return path


def load_tasks(configs: tuple[dict[str, Any], ...]) -> list[tuple[Task, float]]:
    """(task, weight) of each table; every key but `weight` belongs to the task."""
    tasks = []
    for config in configs:
        settings = dict(config)
        weight = settings.pop("weight", 1.0)
        if not isinstance(weight, int | float) or weight < 0:
            raise UserError(f"task {config.get('name')!r}: weight must be a number >= 0, not {weight!r}.")
        tasks.append((make_task(settings), float(weight)))
    return tasks


def make_chat(stage: TrainStage, tasks: list[Task]) -> Chat:
    kind, _, size = stage.tokenizer.partition(":")
    if kind == "tiny" and not size:
        return tiny_chat()
    if kind == "bpe":
        if not size.isdigit():
            raise UserError(f"tokenizer = {stage.tokenizer!r} should give a size, for example 'bpe:2048'.")
        return bpe_chat(_sample_texts(stage, tasks), int(size))
    if Path(stage.tokenizer).is_dir():
        return Chat.load(Path(stage.tokenizer))
    raise UserError(f"tokenizer = {stage.tokenizer!r} is neither 'tiny', 'bpe:SIZE' nor a directory.")


def _sample_texts(stage: TrainStage, tasks: list[Task], examples: int = 2000) -> list[str]:
    """Text to train a tokenizer on: the text itself, or worked examples of the tasks."""
    import random

    if stage.text is not None:
        return [_read_text(stage.text)]
    texts = []
    for task in tasks:
        for i in range(examples):
            demo = task.demonstrate(task.problem("train", i), random.Random(i))
            texts += [part for m in demo.messages for part in _parts(m)]
    return texts


def _parts(message: Message) -> list[str]:
    return [text for text in (message.content, message.reasoning) if text]


def make_documents(stage: TrainStage, tasks: list[tuple[Task, float]], chat: Chat, split: Split = "train") -> Documents:
    """The stage's data, endless: worked examples by weight, or windows of the text's first 90% (or last 10%)."""
    seed, length = stage.train.seed, stage.train.length
    if stage.text is not None:
        ids = chat.encode_text(_read_text(stage.text))
        cut = int(len(ids) * 0.9)
        return TextDocuments(ids[:cut] if split == "train" else ids[cut:], length, seed)
    sources: list[Documents] = [
        TaskDocuments(task, chat, seed + i, [tool.spec for tool in tools_for(task, task.problem(split, 0))], split)
        for i, (task, _) in enumerate(tasks)
    ]
    return Mixture(sources, [weight for _, weight in tasks], seed)


def held_out_loss(
    stage: TrainStage, tasks: list[tuple[Task, float]], chat: Chat, batches: int = 8
) -> Callable[[Transformer], dict[str, float]]:
    """Mean loss a target token on examples of the test split, always the same ones."""

    def evaluate(model: Transformer) -> dict[str, float]:
        held = PackedBatches(
            make_documents(stage, tasks, chat, "test"), stage.train.rows, stage.train.length, overflow="cut"
        )
        total = count = 0.0
        for batch in (next(held).to(model.embed.device) for _ in range(batches)):
            hidden = model(batch.tokens, batch.positions).flatten(0, 1)
            loss, targets = head_loss(hidden, model.head_weight, batch.targets.flatten())
            total, count = total + loss.item(), count + targets
        return {"loss": total / count}

    return evaluate


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"text = {path!r} can't be read: {e}.") from None


def _check_length(stage: TrainStage, spec: ModelSpec) -> None:
    if stage.train.length > spec.context_length:
        raise UserError(
            f"train.length ({stage.train.length}) exceeds the model's context_length ({spec.context_length})."
        )
