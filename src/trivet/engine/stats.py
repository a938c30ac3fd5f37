"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Stats:
    """What the engine did since it was made."""

    prompt_tokens: int = 0  # computed
    shared_tokens: int = 0  # prompt tokens that a copy of another row saved
    cached_tokens: int = 0  # prompt tokens that the prefix store saved
    decode_tokens: int = 0
    guessed_tokens: int = 0  # by a drafter
    right_tokens: int = 0  # of them
    seconds: float = 0.0
    peak_rows: int = 0
    cache_bytes: int = 0
    set_aside: int = 0  # requests that had to leave the batch and came back
    shrunk: int = 0  # times that memory ran out and the batch was made smaller

    @property
    def tokens_per_second(self) -> float:
        return self.decode_tokens / self.seconds if self.seconds else 0.0
