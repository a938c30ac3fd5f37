"""Rotary positions as data, and the ways in which real models reach past the length they were trained at."""

from __future__ import annotations

from pydantic import Field, model_validator

from trivet.spec.frozen import Frozen


class Yarn(Frozen):
    """YaRN context extension (arXiv 2309.00071), with DeepSeek's two temperature settings.

    cos and sin are scaled by m(mscale)/m(mscale_all_dim) and MLA's softmax scale by
    m(mscale_all_dim)^2, where m(s) = 0.1 s ln(factor) + 1 (and m(0) = 1).
    """

    factor: float = Field(gt=1)
    original_length: int = Field(gt=0)
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


class Llama3Scaling(Frozen):
    """Llama 3.1's context extension: pairs that turn slowly are slowed by `factor`, fast ones stay.

    With w the wavelength and r = original_length / w the turns in the original length, a pair's frequency is
    divided by `factor` where r < low_freq_factor, kept where r > high_freq_factor, and blended in between.
    """

    factor: float = Field(gt=1)
    original_length: int = Field(gt=0)
    low_freq_factor: float
    high_freq_factor: float


class Rope(Frozen):
    """Rotary positions on the first `dims` numbers of a head (0: no positions at all)."""

    dims: int = Field(ge=0)
    theta: float = 10000.0
    interleaved: bool = False  # pairs (2i, 2i+1) as DeepSeek, instead of halves (i, i + dims/2)
    yarn: Yarn | None = None
    llama3: Llama3Scaling | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> Rope:
        if self.dims % 2:
            raise ValueError(f"rope.dims must be even, got {self.dims}")
        if self.yarn is not None and self.llama3 is not None:
            raise ValueError("a rope is extended by yarn or by llama3, not by both")
        return self


class DualChunks(Frozen):
    """Dual chunk attention (arXiv 2402.17463): positions are counted anew in every chunk, so that no distance is new.

    A chunk has n = chunk_size - local_size tokens. A key at j stands at j mod n; a query at i stands at i mod n for
    keys of its own chunk, at min(i mod n + n, chunk_size) for the chunk before, at chunk_size for all older ones (where
    local_size >= n, at 2n - 1). Up to position chunk_size that is plain attention; beyond it the local_size keys before
    a query keep their distance at least, and no distance exceeds chunk_size.

    original_length: logits of a query at position i are scaled by m^2, m = max(1, 0.1 ln((i+1)/original_length) + 1),
    YaRN's temperature (Qwen2.5-1M, arXiv 2501.15383). None: they are not.
    """

    chunk_size: int = Field(gt=0)
    local_size: int = Field(ge=0)
    original_length: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _leaves_a_chunk(self) -> DualChunks:
        if self.local_size >= self.chunk_size:
            raise ValueError(f"local_size ({self.local_size}) must be below chunk_size ({self.chunk_size})")
        return self

    @property
    def length(self) -> int:
        """n, the tokens of a chunk."""
        return self.chunk_size - self.local_size

    @property
    def farthest(self) -> int:
        """Where a query stands for all but the nearest two chunks."""
        return min(2 * self.length - 1, self.chunk_size)
