"""Constrained decoding: only tokens that a grammar allows may be drawn (llguidance, github.com/guidance-ai/llguidance).

A grammar starts where the answer starts: while a thought is open, or may still be opened, it says nothing. Its mask is
one bit a token of the vocabulary, worked out in Rust for all rows of a step at once and applied to their logits.
That begins as soon as the token before is known, in a thread, and goes on while the model computes the next step.
When nothing more can follow, the only token that is left is the end of the turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trivet.chat import Chat
from trivet.config import UserError
from trivet.messages import Grammar

GRAMMARS = 64  # that are kept as they were read

LLMatcher = Any  # llguidance is an extra: its types are not at hand
LLTokenizer = Any


class Grammars:
    """The grammars of one tokenizer. Raises UserError where llguidance is missing or the tokenizer is of no use to it."""

    def __init__(self, chat: Chat, vocab_size: int) -> None:
        try:
            import llguidance
        except ImportError:
            raise UserError("A grammar needs llguidance: pip install 'trivet[grammar]'.") from None
        if chat.end_id < 0:
            raise UserError("A grammar needs a token that ends a turn, and this tokenizer has none.")
        self.vocab_size = vocab_size
        self.tokenizer = _tokenizer(chat, vocab_size)
        self._compilers: dict[str, Callable[[str], str]] = {
            "json_schema": llguidance.LLMatcher.grammar_from_json_schema,
            "regex": llguidance.LLMatcher.grammar_from_regex,
            "lark": llguidance.LLMatcher.grammar_from_lark,
        }
        self._matcher, self._executor = llguidance.LLMatcher, llguidance.LLExecutor()
        self._read = lru_cache(GRAMMARS)(self._compile)
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._coming: tuple[list[LLMatcher], Future[tuple[np.ndarray, list[str | None]]]] | None = None

    def start(self, grammar: Grammar) -> LLMatcher:
        """What says at every token which may follow. Raises UserError with the grammar's own mistake.

        A copy is made in a microsecond and shares what its siblings find out about the grammar; to read one takes 400.
        """
        return self._read(grammar).deep_copy()

    def _compile(self, grammar: Grammar) -> LLMatcher:
        try:
            matcher = self._matcher(self.tokenizer, self._compilers[grammar.kind](grammar.text), log_level=0)
        except (ValueError, TypeError) as e:
            raise UserError(f"The {grammar.kind} grammar can't be read: {e}.") from None
        if matcher.is_error():
            raise UserError(f"The {grammar.kind} grammar can't be read: {matcher.get_error().strip()}.")
        return matcher

    def advance(self, matchers: list[LLMatcher], tokens: list[int]) -> None:
        """Each takes the token that was drawn, and finds what may follow: in the thread, from now on."""
        self._known()  # nobody else may hold a matcher meanwhile
        self._coming = matchers, self._thread.submit(self._take, matchers, tokens)

    def mistakes(self, matchers: Sequence[LLMatcher]) -> list[str | None]:
        """What is wrong with the token that each took last."""
        known, _, errors = self._known()
        return [errors[known[id(matcher)]] if id(matcher) in known else None for matcher in matchers]

    def allowed(self, matchers: Sequence[LLMatcher], device: torch.device) -> Tensor:
        """[len(matchers), V] bool: which tokens may come next."""
        known, words, _ = self._known()
        at = [known.get(id(matcher), -1) for matcher in matchers]
        fresh = [matcher for matcher, row in zip(matchers, at, strict=True) if row < 0]
        if fresh:  # their first token, or they come back
            news = iter(range(len(words), len(words) + len(fresh)))
            at, words = [next(news) if row < 0 else row for row in at], np.concatenate((words, self._masks(fresh)))
        bits = torch.from_numpy(words[at].view(np.uint8)).to(device).unsqueeze(-1)  # [n,V/8,1], whole words
        return (bits >> torch.arange(8, device=device) & 1).bool().flatten(1)[:, : self.vocab_size]

    def _known(self) -> tuple[dict[int, int], np.ndarray, list[str | None]]:
        """-> the row of each matcher, by its id (which nobody else gets while it is in the list); masks; errors."""
        if self._coming is None:
            return {}, self._masks([]), []
        matchers, done = self._coming
        return {id(matcher): row for row, matcher in enumerate(matchers)}, *done.result()

    def _take(self, matchers: list[LLMatcher], tokens: list[int]) -> tuple[np.ndarray, list[str | None]]:
        taken = self._executor.consume_token_par(list(zip(matchers, tokens, strict=True)))
        errors = [None if ok else m.get_error().strip() for m, ok in zip(matchers, taken, strict=True)]
        return self._masks(matchers), errors

    def _masks(self, matchers: Sequence[LLMatcher]) -> np.ndarray:
        """[len(matchers), V/32]: a bit a token. Rust gives back Python's lock meanwhile."""
        words = np.zeros((len(matchers), -(-self.vocab_size // 32)), np.int32)
        if matchers:
            rows = [(matcher, i) for i, matcher in enumerate(matchers)]
            self._executor.unsafe_compute_mask_ptr(rows, words.ctypes.data, words.shape[1] * 4, len(matchers))
        return words


def _tokenizer(chat: Chat, vocab_size: int) -> LLTokenizer:
    """By the tokenizer's own file where its way of writing bytes is known, else by the text of each token."""
    import llguidance

    try:
        return llguidance.LLTokenizer(chat.tokenizer.to_str(), n_vocab=vocab_size, eos_token=chat.end_id)
    except ValueError:
        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Plain(chat)), n_vocab=vocab_size, eos_token=chat.end_id
        )


class _Plain:
    """A tokenizer whose tokens are the text that they stand for, as llguidance wants to see one."""

    bos_token_id: int | None = None

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self.eos_token_id = chat.end_id
        size = chat.tokenizer.get_vocab_size()
        self.tokens = [(chat.tokenizer.id_to_token(i) or "").encode() for i in range(size)]
        self.special_token_ids = [i for i, token in chat.tokenizer.get_added_tokens_decoder().items() if token.special]

    def __call__(self, text: Any) -> list[int]:
        return self._chat.encode_text(text.decode() if isinstance(text, bytes) else text)
