"""What measuring gives, as data: one point of an evaluation, a transcript, and a whole report.

No torch and no plots, so that results can be written, read and compared anywhere.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trivet.spec import Frozen

Budget = int | Literal["off"] | None  # thinking tokens; "off": no thinking block; None: unlimited


class Share(Frozen):
    """A mean of scores with its 95% interval."""

    mean: float
    low: float
    high: float
    count: int = Field(description="scores that are ok; the others are in `statuses`, never counted as wrong")


class Piece(Frozen):
    """One stretch of a transcript."""

    kind: Literal["thinking", "answer", "call", "result"]
    text: str


class Transcript(Frozen):
    prompt: str
    pieces: tuple[Piece, ...]
    expected: str
    score: float | None = Field(description="None: the grader's status was not ok")
    status: str = "ok"
    tokens: int
    budget_hit: bool = False


class Result(Frozen):
    """One point: a model, a task, a way of sampling."""

    task: str
    split: str
    level: int | None = None
    thinking: Budget = None
    temperature: float
    tools: bool = Field(description="whether the task's tools could be called")
    seed: int
    questions: int
    n: int = Field(default=1, description="answers a question")
    accuracy: Share
    statuses: dict[str, int] = Field(description="how many scores of each status")
    parts: dict[str, float] = Field(default_factory=dict, description="means of the parts of scores")
    thinks: float = Field(description="share of answers with a thought in them")
    calls_tool: float = Field(description="share of answers that called a tool")
    budget_hit: float = Field(description="share whose thought was cut by the budget")
    truncated: float = Field(description="share that ran into max_tokens or max_turns: they never answered")
    mean_tokens: float = Field(description="tokens the model wrote for an answer, thinking included")
    mean_reasoning_tokens: float
    tokens_per_second: float
    pass_at: dict[int, float] = Field(default_factory=dict, description="for n > 1: k -> unbiased pass@k")
    maj_at: dict[int, float] = Field(default_factory=dict, description="for n > 1: k -> maj@k")
    by_level: dict[int, Share] = Field(default_factory=dict)
    samples: tuple[Transcript, ...] = ()


# ------------------------------------------------------------------------------------------- a report
class Headline(Frozen):
    """One line of the table on top: a claim, and what was measured for it."""

    claim: str
    values: dict[str, Share] = Field(description="column -> measured; columns may differ from line to line")


class Curve(Frozen):
    """Accuracy against the thinking budget: points of one task and one model."""

    task: str
    model: str
    points: tuple[Result, ...]


class ToolBars(Frozen):
    task: str
    model: str
    with_tool: Result
    without: Result


class SamplingBars(Frozen):
    """What temperature hides: the same model, greedy and at T = 1."""

    task: str
    model: str
    greedy: Result
    sampled: Result


class ModelRow(Frozen):
    """One line of sparse against dense."""

    name: str
    params: int
    active_params: int
    cache_bytes_per_token: int
    loss: float | None = None
    accuracy: dict[str, Share] = Field(default_factory=dict, description="task -> measured")
    train_seconds: float | None = None
    train_tokens_per_second: float | None = None


class Samples(Frozen):
    model: str
    transcripts: tuple[Transcript, ...]


class ExpertLoad(Frozen):
    """Share of the tokens that each expert of each layer took: rows are layers. Even is 1/experts x k."""

    model: str
    top_k: int
    shares: tuple[tuple[float, ...], ...]


class Report(Frozen):
    """Everything that report.html shows besides the curves of metrics.jsonl. Empty parts are left out."""

    title: str
    intro: str = ""
    headline: tuple[Headline, ...] = ()
    budgets: tuple[Curve, ...] = ()
    tools: tuple[ToolBars, ...] = ()
    sampling: tuple[SamplingBars, ...] = ()
    experts: tuple[ExpertLoad, ...] = ()
    models: tuple[ModelRow, ...] = ()
    samples: tuple[Samples, ...] = ()
    notes: tuple[str, ...] = Field(default=(), description="what the numbers do not show")
    seconds: dict[str, float] = Field(default_factory=dict, description="stage -> wall time")
    about: dict[str, str] = Field(
        default_factory=dict, description="machine, versions, seed, commit: what to repeat it with"
    )
