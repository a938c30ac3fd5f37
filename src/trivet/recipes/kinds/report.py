"""The demo's last stage: what it all was worth."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from trivet.recipes.kinds.base import Context, StageBase


class ReportStage(StageBase):
    """The demo's evaluation: thinking, budgets, RL, tool, and the dense twin, as results.json and HTML."""

    kind: Literal["report"] = "report"
    cold: str = Field(description="the stage before RL")
    final: str = Field(description="the stage after RL")
    dense: str | None = Field(default=None, description="the dense twin of `cold`")
    count: int = Field(default=512, gt=0, description="problems a point")
    short_chains: tuple[int, int] = Field(description="steps of the chains for thinking and budgets, from and to")
    longer_chains: tuple[int, int] = Field(description="steps of chains longer than any that SFT showed")
    seed: int = 1

    def inputs(self) -> set[str]:
        return {name for name in (self.cold, self.final, self.dense) if name is not None}


def run(stage: ReportStage, context: Context) -> dict[str, Any]:
    from trivet.recipes.demo import report  # matplotlib comes with it

    return report(stage, context)
