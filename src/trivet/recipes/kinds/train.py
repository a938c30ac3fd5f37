"""Stages that learn from documents: pretraining and supervised fine-tuning."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from trivet.chat import Chat, bpe_chat, tiny_chat
from trivet.config import UserError, explain
from trivet.messages import Message
from trivet.model import Transformer
from trivet.model.lora import LoRA
from trivet.recipes.adapted import save_result
from trivet.recipes.kinds.base import Context, StageBase, load_start, load_tasks
from trivet.spec import ModelSpec
from trivet.tasks import Climber, Split, Task, tools_for
from trivet.train.data import Documents, Mixture, PackedBatches, TaskDocuments, TextDocuments
from trivet.train.losses import head_loss
from trivet.train.parallel import gathered
from trivet.train.trainer import TrainConfig, train


class TrainStage(StageBase):
    """Pretraining or supervised fine-tuning: from a new model, or from an earlier stage or directory."""

    kind: Literal["train"] = "train"
    start: str | None = Field(default=None, description="stage or model directory to go on from; else `model`")
    model: dict[str, Any] | None = Field(default=None, description="a ModelSpec; vocab_size comes from the tokenizer")
    lora: LoRA | None = Field(default=None, description="train adapters of `start`, not its weights")
    tokenizer: str = Field(default="tiny", description="'tiny', 'bpe:SIZE' (trained on the data), or a directory")
    tasks: tuple[dict[str, Any], ...] = Field(default=(), description="tasks to imitate: name, weight, settings")
    text: str | None = Field(default=None, description="a plain-text file to pretrain on, instead of tasks")
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

    def inputs(self) -> set[str]:
        paths = {task["path"] for task in self.tasks if isinstance(task.get("path"), str)}
        return paths | ({self.start} if self.start is not None else set())

    def reseeded(self, seed: int) -> Self:
        return self.model_copy(update={"train": self.train.model_copy(update={"seed": self.train.seed + seed})})


def run(stage: TrainStage, context: Context) -> dict[str, Any]:
    tasks = load_tasks(stage.tasks, context)
    if any(isinstance(task, Climber) for task, _ in tasks):
        raise UserError(
            "A curriculum rises with rewards, and this stage imitates: leave `curriculum` to a stage of RL."
        )
    for task, _ in tasks:
        if never_thinks(task):
            context.say(
                f"{task.name}: its examples answer without a thought, so that is what is learnt. Talk and evaluate with "
                "--no-think, or give the examples a `reasoning`."
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
    whole = gathered(model)
    if whole is not None:
        save_result(whole, chat, context.out, start)
    return summary


def never_thinks(task: Task, looked_at: int = 32) -> bool:
    """Whether its examples all have the thinking block shut."""
    return not any(task.demonstrate(task.problem("train", i), random.Random(i)).thinking for i in range(looked_at))


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
