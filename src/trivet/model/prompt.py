"""What a call is told when it is a piece of a long prompt: where it stands, and which lines of attention to compute."""

from __future__ import annotations

from dataclasses import dataclass

from trivet.config import UserError


@dataclass(frozen=True)
class Sparse:
    """Lines of attention that a prompt's pieces compute (`sparse.py`), for each head.

    vertical, slash: how many columns and diagonals, of which the first `sinks` and the nearest `local` always.
    last: queries that the lines are found with. measure: also the recovered attention mass, on a query in 64.
    """

    vertical: int = 512
    slash: int = 512
    sinks: int = 30
    local: int = 100
    last: int = 64
    measure: bool = False

    def __post_init__(self) -> None:
        if min(self.vertical, self.slash, self.last) < 1 or self.sinks > self.vertical or self.local > self.slash:
            raise UserError(
                f"Sparse attention needs a column, a diagonal and a query at least, and no more of them fixed than "
                f"there are; got {self}."
            )


@dataclass
class Kept:
    """What was computed of a prompt's attention: pairs of a query and a key, over all heads, layers and pieces."""

    pairs: int = 0
    possible: int = 0
    mass: float = 0.0  # recovered, summed over the queries that it was measured on
    measured: int = 0

    @property
    def share(self) -> float:
        """Pairs computed of those that exact attention computes."""
        return self.pairs / self.possible if self.possible else 1.0

    @property
    def recovered(self) -> float | None:
        """Mean share of a query's attention mass that lies on what was computed; None: not measured."""
        return self.mass / self.measured if self.measured else None

    def add(self, pairs: int, possible: int, mass: float | None = None) -> None:
        self.pairs, self.possible = self.pairs + pairs, self.possible + possible
        if mass is not None:
            self.mass, self.measured = self.mass + mass, self.measured + 1


@dataclass(frozen=True)
class Prompt:
    """A call is one piece of a prompt: every row's tokens stand at start, start+1, ..., the first `real` of them."""

    start: int
    real: tuple[int, ...]
    sparse: Sparse | None
    kept: Kept
