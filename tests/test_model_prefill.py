"""A prompt in pieces is the whole prompt, in memory that does not grow with it; sparse lines are what they claim."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from test_model_zoo import MIXERS, PATTERNS, gap, noisy, spec_of, tokens_of
from trivet.config import UserError
from trivet.model import LayerCache, Routing, Transformer, blocks, linear, mla, sparse
from trivet.model.blocks import Reach
from trivet.model.prefill import prefill
from trivet.model.prompt import Kept, Prompt, Sparse
from trivet.spec import DualChunks

T = 41


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "CHUNK", 4)
    monkeypatch.setattr(blocks, "BLOCK", 6)
    monkeypatch.setattr(blocks, "SCORES", 64)
    monkeypatch.setattr(blocks, "WHOLE", 150)  # the first blocks in one softmax, later ones in several
    monkeypatch.setattr(mla, "EXPANDED", 500)  # a head or two at a time
    monkeypatch.setattr(sparse, "BLOCK", 8)
    monkeypatch.setattr(sparse, "KEYS", 4)


@torch.no_grad()
def go_on(model: Transformer, caches: list[LayerCache], tokens: Tensor, at: list[int], steps: int) -> Tensor:
    """Decode the next `steps` tokens of rows of different lengths: what the caches hold must be right everywhere."""
    rows = torch.arange(len(at))
    out = []
    for i in range(steps):
        now = torch.tensor(at) + i
        out.append(model(tokens[rows, now].unsqueeze(1), now.unsqueeze(1), caches))
    return torch.cat(out, 1)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("chunk", [1, 7, 100])
@torch.no_grad()
def test_pieces_of_uneven_prompts_are_the_whole(name: str, chunk: int) -> None:
    model, tokens = noisy(spec_of(PATTERNS[name])), tokens_of(3, T)
    want, lengths = model(tokens), [36, 9, 23]
    caches = model.new_caches(3, T)
    done = prefill(model, tokens[:, :36], caches, chunk, lengths)
    for row, n in enumerate(lengths):
        assert gap(done.hidden[row], want[row, n - 1]) < 1e-5
    got = go_on(model, caches, tokens, lengths, 4)
    for row, n in enumerate(lengths):
        assert gap(got[row], want[row, n : n + 4]) < 1e-5
    assert done.kept.share == 1.0 and done.kept.recovered is None


@pytest.mark.parametrize("name", PATTERNS)
@torch.no_grad()
def test_a_prompt_goes_on_where_another_ended(name: str) -> None:
    model, tokens = noisy(spec_of(PATTERNS[name])), tokens_of(2, T)
    want, caches = model(tokens), model.new_caches(2, T)
    prefill(model, tokens[:, :11], caches, 4)
    assert gap(prefill(model, tokens[:, 11:], caches, 8, start=11).hidden, want[:, -1]) < 1e-5
    prefill(model, tokens[:, :11], caches, 4)
    prefill(model, tokens_of(2, 3, seed=1), caches, 4, start=8)  # the twin: three other tokens before it
    assert gap(prefill(model, tokens[:, 11:13], caches, 8, start=11).hidden, want[:, 12]) > 1e-3


@torch.no_grad()
def test_experts_are_recorded_over_all_pieces() -> None:
    model, tokens = noisy(spec_of("gqa/moe mla/moe")), tokens_of(2, T)
    whole = Routing()
    model(tokens, routing=whole)
    done = prefill(model, tokens, model.new_caches(2, T), 9, record_experts=True)
    assert done.experts is not None and len(done.experts) == 2
    for got, want in zip(done.experts, whole.experts, strict=True):
        assert torch.equal(got, want) and not torch.equal(got.roll(1, 1), want)


@pytest.mark.parametrize(
    "wrong", [{"chunk": 0}, {"start": -1}, {"lengths": [3]}, {"lengths": [3, 9]}, {"lengths": [0, 3]}]
)
def test_impossible_prompts_are_refused(wrong: dict[str, object]) -> None:
    model = Transformer(spec_of("gqa/dense"))
    with pytest.raises(UserError, match="prefill takes"):
        prefill(model, tokens_of(2, 8), model.new_caches(2, 8), **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [None, 5])
@torch.no_grad()
def test_forms_of_a_piece_are_the_definition(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, w, generator=g) for h, n, w in ((4, 9, 8), (2, 23, 8), (2, 23, 6)))
    distance = torch.arange(14, 23)[:, None] - torch.arange(23)
    unseen = (distance < 0) | (distance >= (window or 23))
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.4).masked_fill(unseen, -math.inf)
    want = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    for whole in (0, 2**20):
        monkeypatch.setattr(blocks, "WHOLE", whole)
        assert gap(blocks.attend_blocks(q[None], k, v, 0.4, Reach(window)), want) < 1e-5
        assert gap(blocks.attend_blocks(q[None], k, v, 0.4, Reach(4)), want) > 1e-3  # the twin


# ------------------------------------------------------------------------------------------- memory
class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation made, those that lie in the caches not counted."""

    def __init__(self, caches: list[LayerCache]) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for c in caches for t in c.tensors}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, t.nbytes)
        return out


@torch.no_grad()
def largest(name: str, length: int, pieces: bool) -> int:
    model, tokens = Transformer(spec_of(f"{name}/dense")), tokens_of(1, length)
    caches = model.new_caches(1, length)
    prefill(model, tokens, caches, 64)  # the tokens themselves are no working memory
    with Largest(caches) as seen:
        prefill(model, tokens, caches, 64) if pieces else model(tokens, tokens.new_tensor(range(length))[None], caches)
    return seen.bytes


@pytest.mark.parametrize("name", ["gqa", "window", "chunks", "mla", "lightning"])
def test_memory_does_not_grow_with_the_prompt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 64)
    monkeypatch.setattr(blocks, "SCORES", 2**14)
    monkeypatch.setattr(blocks, "WHOLE", 2**14)
    monkeypatch.setattr(linear, "CHUNK", 64)
    short, long = largest(name, 256, True), largest(name, 1024, True)
    head = 4 * 1024 * (MIXERS["mla"].nope_dim + MIXERS["mla"].v_dim + 4) if name == "mla" else 0  # type: ignore[union-attr]
    assert long <= max(short, head, 4 * 2**14)  # MLA: one head's keys or values at a time
    assert largest(name, 1024, False) > 2 * long  # the twin


# ------------------------------------------------------------------------------------------- sparse
ALL = Sparse(vertical=10**6, slash=10**6)


@pytest.mark.parametrize("name", ["gqa", "mqa", "chunks", "mla", "hybrid"])
@torch.no_grad()
def test_all_lines_are_exact_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by way of the exact form: here every block gathers its keys, which happen to be all of them."""
    model, tokens = noisy(spec_of(PATTERNS[name])), tokens_of(2, T)
    want = model(tokens)[:, -1]
    assert gap(prefill(model, tokens, model.new_caches(2, T), 16, sparse=ALL).hidden, want) < 1e-5
    almost = Sparse(vertical=1, slash=T - 1, sinks=0, local=T - 1, last=5, measure=True)
    done = prefill(model, tokens, model.new_caches(2, T), T, sparse=almost)
    assert gap(done.hidden, want) < 1e-5
    assert done.kept.share == 1.0 and done.kept.recovered == pytest.approx(1.0, abs=1e-5)
    few = Sparse(vertical=2, slash=3, sinks=1, local=2, last=5, measure=True)
    done = prefill(model, tokens, model.new_caches(2, T), 16, sparse=few)
    assert gap(done.hidden, want) > 1e-4  # the twin: with few lines it is not
    assert 0 < done.kept.share < 1 and done.kept.recovered is not None and 0 < done.kept.recovered < 1


def heads_with_lines(seed: int = 0, length: int = 64) -> tuple[Tensor, Tensor, Tensor, list[int], list[int]]:
    """One head whose attention lies on columns 9 and 30, another's on the diagonals at distances 0 and 21."""
    g = torch.Generator().manual_seed(seed)
    dim = length + 8
    k = torch.zeros(2, length, dim)
    k[0, [9, 30], 0] = 9.0
    q = torch.zeros(1, 2, length, dim)
    q[0, 0, :, 0] = 1.0
    k[1, torch.arange(length), torch.arange(length)] = 9.0  # key j says "j"
    for distance in (0, 21):
        at = torch.arange(distance, length)
        q[0, 1, at, at - distance] = 1.0
    return q, k, torch.randn(2, length, 5, generator=g), [9, 30], [0, 21]


def test_lines_are_found_where_they_are() -> None:
    q, k, _, columns, distances = heads_with_lines()
    wanted = Sparse(vertical=2, slash=2, sinks=0, local=1, last=16)
    first, second = sparse.find_lines(q[:, :, -16:], k, 1.0, Reach(), wanted)
    assert first[0].tolist() == columns and second[1].tolist() == distances
    q[0, 0, :, 0] = 0.0  # the twin: a head that looks nowhere in particular
    assert sparse.find_lines(q[:, :, -16:], k, 1.0, Reach(), wanted)[0][0].tolist() != columns


def test_what_is_computed_is_what_is_counted_and_measured() -> None:
    """Against attention with a mask of the chosen pairs, written out."""
    q, k, v, _, _ = heads_with_lines()
    wanted = Sparse(vertical=2, slash=2, sinks=0, local=1, last=16, measure=True)
    kept = Kept()
    prompt = Prompt(0, (64,), wanted, kept)
    got = sparse.attend_prompt(q[:, None], k[None], v[None], 1.0, Reach(), prompt)[0]
    chosen = sparse.find_lines(q[:, :, -16:], k, 1.0, Reach(), wanted)
    pairs, masses = 0, []
    for head in range(2):
        mask = torch.zeros(64, 64, dtype=torch.bool)
        for start in range(0, 64, sparse.BLOCK):
            keys = sparse.chosen_keys(chosen[head], start, start + sparse.BLOCK)
            mask[start : start + sparse.BLOCK, keys] = True
            lines = chosen[head][0].tolist() + [
                i - d for i in range(start, start + 8) for d in chosen[head][1].tolist()
            ]
            assert {j for j in lines if 0 <= j < start + 8} <= set(keys.tolist())
        mask &= torch.ones(64, 64, dtype=torch.bool).tril()
        scores = q[0, head] @ k[head].T
        want = scores.masked_fill(~mask, -math.inf).softmax(-1) @ v[head]
        assert gap(got[head], want) < 1e-5
        pairs += int(mask.sum())
        full = scores.masked_fill(torch.ones(64, 64, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
        masses += [float((full[i] * mask[i]).sum()) for i in range(4, 64, 8)]
    assert (kept.pairs, kept.possible) == (pairs, 2 * 64 * 65 // 2) and pairs < kept.possible / 2
    assert kept.recovered == pytest.approx(sum(masses) / len(masses), abs=1e-5)
    assert kept.recovered > 0.97  # of less than half of the pairs
    exact = scores.masked_fill(torch.ones(64, 64, dtype=torch.bool).triu(1), -math.inf).softmax(-1) @ v[1]
    assert gap(got[1], exact) < 0.2 and gap(got[1], exact) > 1e-5


@torch.no_grad()
def test_a_padded_row_finds_its_own_lines() -> None:
    """The lines of a short row come from its own last tokens: beside a longer one it computes what it does alone."""
    model, tokens = noisy(spec_of(PATTERNS["gqa"])), tokens_of(2, T)
    few = Sparse(vertical=2, slash=3, sinks=1, local=2, last=5)
    both = prefill(model, tokens, model.new_caches(2, T), T, [T, 30], sparse=few)
    alone = prefill(model, tokens[1:, :30], model.new_caches(1, T), T, sparse=few)
    assert gap(both.hidden[1], alone.hidden[0]) < 1e-5
    assert gap(both.hidden[0], alone.hidden[0]) > 1e-3


def test_windows_stay_exact_and_are_counted() -> None:
    model, tokens = noisy(spec_of("window/dense")), tokens_of(1, T)
    done = prefill(model, tokens, model.new_caches(1, T), 16, sparse=Sparse(vertical=1, slash=1, sinks=0, local=1))
    assert done.kept.share == 1.0
    assert done.kept.possible == 4 * sum(min(i + 1, 5) for i in range(T))


@pytest.mark.parametrize("wrong", [{"vertical": 0}, {"last": 0}, {"vertical": 10}, {"slash": 50}])
def test_impossible_lines_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="Sparse attention needs"):
        Sparse(**wrong)


def test_ranges_of_chunks_cover_every_key_once() -> None:
    reach = Reach(chunks=DualChunks(chunk_size=7, local_size=3))
    for start, end in reach.blocks(0, 50, 3):
        ranges = reach.ranges(start, end)
        assert [lo for _, lo, _ in ranges][1:] == [hi for _, _, hi in ranges][:-1]
        assert ranges[0][1] == 0 and ranges[-1][2] == end and start // 4 == (end - 1) // 4
