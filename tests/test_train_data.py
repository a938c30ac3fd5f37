"""Documents are pure functions of an index; packing keeps every one of them, once, in order."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from trivet.chat import bpe_chat, tiny_chat
from trivet.config import UserError
from trivet.messages import ToolSpec
from trivet.tasks import make_task
from trivet.train.data import (
    IGNORE,
    PADDING,
    Batch,
    Document,
    Mixture,
    PackedBatches,
    TaskDocuments,
    TextDocuments,
    stable_hash,
)


class Random:
    """Documents of 2..longest tokens that name their index, with a random mask."""

    def __init__(self, longest: int = 9, seed: int = 0):
        self.longest, self.seed = longest, seed

    def __getitem__(self, index: int) -> Document:
        rng = random.Random(stable_hash(self.seed, index))
        n = rng.randint(2, self.longest)
        ids = [1000 * self.seed + index] + [rng.randrange(50) for _ in range(n - 1)]
        return Document(ids, [False] + [rng.random() < 0.6 for _ in range(n - 2)] + [True])


def unpack(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """(inputs, targets) of each document of a batch, in the order of their first token."""
    found = []
    for tokens, positions, targets in zip(batch.tokens, batch.positions, batch.targets, strict=True):
        starts = [i for i, p in enumerate(positions.tolist()) if p == 0]
        ends = [*starts[1:], int((positions != PADDING).sum())]
        for start, end in zip(starts, ends, strict=True):
            assert positions[start:end].tolist() == list(range(end - start))
            found.append((tokens[start:end].tolist(), targets[start:end].tolist()))
        assert (positions[ends[-1] :] == PADDING).all() and (targets[ends[-1] :] == IGNORE).all()
    return sorted(found)


def expected(document: Document) -> tuple[list[int], list[int]]:
    targets = [t if learn else IGNORE for t, learn in zip(document.ids[1:], document.mask[1:], strict=True)]
    return document.ids[:-1], targets


def test_packing_keeps_every_document_once() -> None:
    source = Random()
    batches = PackedBatches(source, rows=3, length=16)
    at = 0
    for _ in range(20):
        batch = next(batches)
        assert unpack(batch) == [expected(source[i]) for i in range(at, batch.state)]
        assert batch.count == int((batch.targets != IGNORE).sum())
        assert batch.filled == int((batch.positions != PADDING).sum())
        assert batch.context == int((batch.positions + 1).sum())
        at = batch.state
    assert at > 100


def test_packing_is_first_fit_and_dense() -> None:
    class Sizes:
        sizes = (5, 4, 3, 2, 7, 5)  # inputs; into rows of 8: 5+3, 4+2, then 7 fits nowhere

        def __getitem__(self, index: int) -> Document:
            n = self.sizes[index] + 1
            return Document([index] * n, [True] * n)

    batches = PackedBatches(Sizes(), rows=2, length=8)
    first = next(batches)
    assert first.tokens.tolist() == [[0, 0, 0, 0, 0, 2, 2, 2], [1, 1, 1, 1, 3, 3, 0, 0]]
    assert first.positions[1].tolist() == [0, 1, 2, 3, 0, 1, PADDING, PADDING]
    assert first.state == 4


@pytest.mark.parametrize("cut", [1, 2, 7])
def test_resuming_by_one_integer(cut: int) -> None:
    straight = PackedBatches(Random(), rows=3, length=16)
    before = [next(straight) for _ in range(cut)]
    resumed = PackedBatches(Random(), rows=3, length=16, start=before[-1].state)
    for _ in range(5):
        a, b = next(straight), next(resumed)
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)
        assert torch.equal(a.positions, b.positions) and a.state == b.state


def test_a_long_document_is_an_error_or_counted() -> None:
    class Long:
        def __getitem__(self, index: int) -> Document:
            n = 30 if index == 3 else 5
            return Document(list(range(n)), [True] * n)

    with pytest.raises(UserError, match=r"Document 3 has 30 tokens, more than a row takes \(17\)"):
        next(PackedBatches(Long(), rows=4, length=16))
    batches = PackedBatches(Long(), rows=4, length=16, overflow="cut")
    batch = next(batches)
    assert batches.cut == 1
    assert (list(range(16)), list(range(1, 17))) in unpack(batch)


def test_a_document_without_targets_is_an_error() -> None:
    class Empty:
        def __getitem__(self, index: int) -> Document:
            return Document([1, 2, 3], [True, False, False])  # the first token is never predicted

    with pytest.raises(UserError, match="Document 0 has no token to learn from"):
        next(PackedBatches(Empty(), rows=1, length=8))


def test_targets_of_multi_token_prediction_stay_in_their_document() -> None:
    source = Random()
    batch = next(PackedBatches(source, rows=3, length=16))
    for k in (1, 2):
        ahead = batch.targets_ahead(k)
        shifted = Batch(batch.tokens, batch.positions, ahead, 0, 0, 0, 0)
        for (ids, targets), (_, further) in zip(unpack(batch), unpack(shifted), strict=True):
            assert further == (targets[k:] + [IGNORE] * k)[: len(ids)]
    assert (batch.targets_ahead(1) != IGNORE).any()
    assert (batch.targets_ahead(99) == IGNORE).all()


def test_mixture_keeps_its_shares_and_skips_nothing() -> None:
    sources = [Random(seed=s) for s in (1, 2, 3)]
    mixture = Mixture(sources, [1, 0, 3], seed=5)
    picks = [mixture.pick(i) for i in range(5000)]
    for source, share in ((0, 0.25), (2, 0.75)):
        places = [place for s, place in picks if s == source]
        assert abs(len(places) / 5000 - share) < 0.01
        whole = len(places) - 1024  # all but the unfinished last block
        assert set(range(whole)) <= set(places) and len(set(places)) == len(places)
    assert {s for s, _ in picks} == {0, 2}
    changes = sum(a[0] != b[0] for a, b in pairwise(picks))
    assert abs(changes / 5000 - 2 * 0.25 * 0.75) < 0.03  # well mixed: neighbours differ as often as by chance


def test_mixture_is_a_pure_function_of_seed_and_index() -> None:
    sources = [Random(seed=s) for s in (1, 2)]
    mixture, again = Mixture(sources, [1, 3], seed=5), Mixture(sources, [1, 3], seed=5)
    forth = [mixture.pick(i) for i in range(3000)]
    assert [again.pick(i) for i in reversed(range(3000))] == forth[::-1]
    assert forth != [Mixture(sources, [1, 3], seed=6).pick(i) for i in range(3000)]
    source, place = forth[2000]
    assert mixture[2000] == sources[source][place]


def test_mixture_refuses_senseless_weights() -> None:
    with pytest.raises(UserError, match="one weight a source"):
        Mixture([Random()], [1, 2])
    with pytest.raises(UserError, match="not all 0"):
        Mixture([Random()], [0])
    with pytest.raises(UserError, match="less than 1 document in 1024"):
        Mixture([Random(), Random()], [1, 1e-5])


def test_text_windows_are_pieces_of_the_text() -> None:
    text = list(range(500))
    documents = TextDocuments(text, length=16, seed=3)
    starts = set()
    for i in range(200):
        ids = documents[i].ids
        assert ids == list(range(ids[0], ids[0] + 17)) and all(documents[i].mask)
        starts.add(ids[0])
    assert len(starts) > 120  # 200 draws from 484 places: 164 expected
    batch = next(PackedBatches(documents, rows=4, length=16))
    assert batch.state == 4 and batch.count == 64  # a window fills its row
    with pytest.raises(UserError, match="too few"):
        TextDocuments(text, length=500)


@pytest.mark.parametrize("name", ["chain", "search", "arithmetic"])
def test_task_documents_teach_what_the_assistant_wrote(name: str) -> None:
    task, chat = make_task({"name": name}), tiny_chat()
    documents, again = TaskDocuments(task, chat, seed=1), TaskDocuments(task, chat, seed=1)
    other = TaskDocuments(task, chat, seed=2)
    differ = 0
    for index in range(40):
        document = documents[index]
        assert document == again[index]
        differ += document != other[index]
        prompt = chat.render(task.problem("train", index).messages, generate=True).ids
        n = len(prompt)
        assert document.ids[:n] == prompt and not any(document.mask[:n])
        assert document.ids[-1] == chat.end_id and document.mask[-1]
        text = chat.decode([t for t, learn in zip(document.ids, document.mask, strict=True) if learn])
        assert "<tool_response>" not in text and "<user>" not in text
    assert differ > 5  # the seed draws other demonstrations of the same problems


def test_a_task_whose_tools_the_prompt_does_not_list_is_refused() -> None:
    task = make_task({"name": "arithmetic"})
    chat = bpe_chat(["12+34"], 300)
    with pytest.raises(UserError, match="would list no tool"):
        TaskDocuments(task, chat)
    tools = [ToolSpec(name, "computes", {}) for name in task.tools]
    assert any(TaskDocuments(task, chat, tools=tools)[0].mask)


def test_stable_hash_never_changes() -> None:
    """Stored runs depend on it: a new value would silently resume on other data."""
    assert stable_hash(0, 1) == 18035787800520607725
