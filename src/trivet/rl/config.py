"""How to learn from rewards, as a table in TOML: `[rl]`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from trivet.config import UserError
from trivet.rl.objectives import find_objective
from trivet.spec import Free, Frozen
from trivet.train.config import RunConfig, Where


class ServerConfig(Frozen):
    """A server that plays the episodes: see remote.py."""

    url: str = Field(description="where it is, without /v1: http://127.0.0.1:8000")
    like: str = Field(description="the checkpoint that it was started with: an export of `start`")
    folder: str = Field(description="folder that it can read, too: each step's weights are put into `weights` there")
    push: Literal["vllm"] | tuple[str, ...] = Field(
        default="vllm", description="how it is told to read them: vLLM's endpoints, or a command with {path}"
    )
    model: str | None = Field(default=None, description="the model's name there; unset: the only one that it lists")
    key: str | None = Field(default=None, description="environment variable that holds the server's key")
    seconds: float = Field(default=600.0, gt=0, description="that one answer may take")


class RLConfig(RunConfig):
    """How to learn from rewards. Nothing here says which tasks."""

    steps: int = Field(gt=0, description="batches of episodes, each learnt from once it is graded")
    problems: int = Field(default=32, gt=0, description="problems of a batch")
    group: int = Field(default=16, ge=2, description="episodes of each problem")
    dynamic: int = Field(
        default=1, gt=0, description="rounds at most: groups whose rewards agree are replaced by new problems (DAPO)"
    )
    partial: float = Field(
        default=1.0, gt=0, le=1, description="stop a step at this share of its episodes; the others go on in the next"
    )
    lag: int = Field(
        default=0, ge=0, le=1, description="1: a process samples each batch while the one before is learnt from"
    )
    workers: Free[int] = Field(
        default=0, ge=0, description="Ray actors that play the episodes, see workers.py; 0: this process"
    )
    ray_address: Free[str | None] = Field(
        default=None, description="a running Ray's address; unset: one on this machine only"
    )
    server: Free[ServerConfig | None] = Field(
        default=None, description="a server that plays the episodes, see remote.py"
    )
    temperature: float = Field(default=1.0, gt=0, description="of sampling, and of the probabilities trained")
    top_p: float = Field(default=1.0, gt=0, le=1, description="draw from the likeliest tokens that reach this share")
    top_k: int = Field(default=0, ge=0, description="draw from so many of the likeliest tokens; 0: from all")
    min_p: float = Field(default=0.0, ge=0, le=1, description="draw from tokens with this share of the best's chance")
    max_tokens: int = Field(default=256, gt=0, description="tokens the model may write in an episode")
    thinking: int | Literal["off"] | None = Field(
        default=None, description="thinking budget in tokens; unset: unlimited; 'off': no thinking"
    )
    answer_reserve: int = Field(
        default=16, ge=0, description="tokens of max_tokens that thinking leaves to the answer, whatever its budget"
    )
    halt_repeating: int = Field(
        default=0, ge=0, description="end an answer after so many tokens in a row of probability > 0.99; 0: never"
    )
    max_turns: int = Field(default=8, gt=0, description="completions of an episode, tool calls between them")
    max_rows: int = Field(default=512, gt=0, description="episodes that are generated at the same time")
    objective: str = Field(default="dapo", description="reinforce, rloo, grpo, dr_grpo, dapo, cispo or gspo")
    overrides: dict[str, Any] = Field(default_factory=dict, description="choices of the objective to change")
    epochs: int = Field(default=1, gt=0, description="times that each batch is gone through")
    minibatches: int = Field(default=1, gt=0, description="optimizer steps of an epoch, each on its share of the batch")
    replay: Literal["none", "trainer", "sampler"] = Field(
        default="trainer",
        description="whose choice of experts is replayed, see epochs.py: of its first pass, the engine's",
    )
    correction: Literal["none", "tis"] | None = Field(
        default=None,
        description="tis: weigh tokens by min(p in the trainer / p in the engine, cap); unset: with a server",
    )
    correction_cap: float = Field(default=2.0, gt=0, description="cap of `correction`")
    muon_lr: float = Field(default=0.003, ge=0, description="learning rate of the matrices")
    adam_lr: float = Field(default=3e-4, ge=0, description="learning rate of everything else")
    decay_share: float = Field(
        default=0.0, ge=0, le=1, description="last share of the run, in which the rate falls to 0"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled; spares vectors")
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient; inf: never clip")
    rows: int = Field(default=16, gt=0, description="longest episodes that a microbatch of the update has room for")
    length: int = Field(default=256, gt=0, description="tokens of the longest episode")
    share_prompts: bool = Field(default=True, description="compute a group's prompt once in the update, see update.py")
    recompute: Free[bool] = Field(default=False, description="activation checkpointing in the update, see TrainConfig")
    shards: Free[int] = Field(
        default=1,
        ge=0,
        description="processes that divide the policy (FSDP); 1: each holds all of it; 0: as many as there are",
    )
    offload: Free[Where] = Field(default="none", description="optimizer or gradients in host memory, see TrainConfig")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="of products, in sampler and update; weights and optimizer stay fp32"
    )
    fp32_head: bool = Field(default=True, description="with bf16: the head's product stays fp32 on both sides")
    seed: int = Field(default=0, description="problems and episodes are hashes of it")
    mismatch_limit: float | None = Field(
        default=None, gt=0,
        description="stop when KL(engine || trainer) a token exceeds this; unset: 1e-3, with bf16 1e-2 (flipped experts)",
    )  # fmt: skip
    not_ok_limit: float = Field(
        default=0.02, ge=0, le=1, description="stop when more than this share of a batch could not be graded"
    )
    eval_every: int = Field(default=0, ge=0, description="steps between evaluations; 0: only at the end")
    page_every: Free[int] = Field(
        default=0, ge=0, description="write every n-th step's episodes, for `trivet rollouts`; 0: none"
    )

    @model_validator(mode="after")
    def _objective_exists(self) -> RLConfig:
        try:
            find_objective(self.objective, self.overrides)
        except UserError as e:
            raise ValueError(str(e).rstrip(".")) from None
        return self

    @model_validator(mode="after")
    def _one_way_to_sample(self) -> RLConfig:
        if self.partial < 1 and self.dynamic > 1:
            raise ValueError("a step that is cut off has no further rounds: give either `partial` or `dynamic`")
        if self.partial < 1 and self.lag:
            raise ValueError("`partial` and `lag` are two ways not to wait for the last answer: give one of them")
        if self.workers and self.server is not None:
            raise ValueError("`workers` and `server` both play the episodes: give one of them")
        if self.partial < 1 and (self.workers or self.server is not None):
            raise ValueError("`partial` cuts the batch of one engine here: leave it out, or `workers` and `server`")
        return self

    @property
    def most_mismatch(self) -> float:
        return self.mismatch_limit or {"fp32": 1e-3, "bf16": 1e-2}[self.precision]

    @property
    def corrects(self) -> bool:
        """Whether the difference between engine and trainer is weighed."""
        return self.correction == "tis" or (self.correction is None and self.server is not None)
