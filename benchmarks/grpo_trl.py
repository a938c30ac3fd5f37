"""TRL's side of grpo.py: one run of its GRPOTrainer, in a process and an environment of its own (pip install trl==1.16.0).

    python benchmarks/grpo_trl.py '{"model": ..., "problems": ..., ...}'      # grpo.py starts it: see Job there

Imports nothing of Trivet, so that its memory is what a script of TRL's needs.
"""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl import __version__ as version

from grpo_watch import Watch, memory


def main(job: dict[str, Any]) -> None:
    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    watch, last = Watch(job), {}

    def reward(completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        """What the task's grader says: the text after the thought is the answer."""
        said = []
        for ids in completion_ids:
            text = tokenizer.decode(ids)
            before, opened, thought = text.partition("<think>")
            said.append(before + thought.partition("</think>")[2] if opened else text)
        values = [float(s.removesuffix("<end>").strip() == a) for s, a in zip(said, answer, strict=True)]
        last.update(ids=completion_ids, answers=answer, rewards=values)
        return values

    class Stop(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            tokens = sum(map(len, last["ids"]))
            control.should_training_stop = watch.step(sum(last["rewards"]) / len(last["rewards"]), tokens)

    config = GRPOConfig(
        output_dir=job["out"], max_steps=job["steps"], per_device_train_batch_size=job["problems"] * job["group"],
        num_generations=job["group"], max_completion_length=job["max_tokens"], temperature=1.0, beta=0.0,
        loss_type="dapo", epsilon=0.2, epsilon_high=0.28, learning_rate=job["lr"], lr_scheduler_type="constant",
        adam_beta2=0.95, max_grad_norm=1.0, weight_decay=0.0, bf16=job["precision"] == "bf16", use_cpu=True,
        gradient_checkpointing=job["recompute"], shuffle_dataset=False, seed=job["seed"],
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = [json.loads(line) for line in Path(job["asked"]).read_text().splitlines()]
    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, callbacks=[Stop()],
    )  # fmt: skip
    trainer._generate = watch.around(trainer._generate)
    before = memory("VmRSS")
    trainer.train()
    peak = memory("VmHWM")
    if job["keep"]:
        trainer.save_model(job["out"])
    result = {
        "steps": watch.steps, "peak": peak, "before": before, "settings": len(fields(GRPOConfig)), "last": last,
        "prompt": tokenizer(rows[0]["prompt"])["input_ids"], "version": f"trl {version}, torch {torch.__version__}",
    }  # fmt: skip
    Path(job["out"], "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
