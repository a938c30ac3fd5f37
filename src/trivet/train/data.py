"""What a model is trained on: endless documents, packed into rows of one length.

A document is a pure function of its index, so the place in the data is one integer: resuming is
exact and mixtures need no bookkeeping. Packing is first fit: consecutive documents go into the
first row with room, and the first that fits nowhere opens the next batch, so nothing is reordered
by length. Documents in a row are told apart by positions that restart at 0. The last token of a
document is only ever a target, so it takes no place in the row.

Several processes each make all documents of a step, because where one lies depends on the lengths of
those before it, and keep the rows that are theirs (`share`): so the step is the same, however many they are.

Left out: shuffling a finite set without replacement (draw by index instead).
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from trivet.config import UserError
from trivet.messages import ToolSpec

if TYPE_CHECKING:
    from trivet.chat import Chat
    from trivet.tasks import Split, Task

IGNORE = -100  # a target without loss
PADDING = -1  # the position of a slot without a token


@dataclass(frozen=True)
class Document:
    """Token ids, and for each whether the model should learn to write it.

    shared: so many at the start are those of the last document that shared none, which lies before it in the row. They
    take no place there again; none of the tokens that follow them directly may be learnt twice.
    """

    ids: list[int]
    mask: list[bool]
    shared: int = 0


class Documents(Protocol):
    """Endless and pure: the same index always gives the same document."""

    def __getitem__(self, index: int) -> Document: ...


def stable_hash(*numbers: int) -> int:
    """64 bits that are the same in every process and Python version."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")


# ------------------------------------------------------------------------------------------ sources
class Mixture:
    """Sources interleaved at random in exact shares, each read in order and without gaps.

    Every BLOCK documents hold the same number of each source in an order of their own, so where a
    source stands is arithmetic on the index, and a finite data set is seen evenly.
    """

    BLOCK = 1024

    def __init__(self, sources: Sequence[Documents], weights: Sequence[float], seed: int = 0):
        if len(sources) != len(weights) or not sources:
            raise UserError(f"A mixture needs one weight a source: {len(sources)} sources, {len(weights)} weights.")
        if min(weights) < 0 or sum(weights) <= 0:
            raise UserError(f"The weights of a mixture must be >= 0 and not all 0, got {list(weights)}.")
        self.sources, self.seed = sources, seed
        ends = [round(self.BLOCK * sum(weights[: i + 1]) / sum(weights)) for i in range(len(weights))]
        self.shares = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        for weight, share in zip(weights, self.shares, strict=True):
            if weight > 0 and share == 0:
                raise UserError(f"A weight of {weight} in {list(weights)} is less than 1 document in {self.BLOCK}.")
        self._order: tuple[int, list[tuple[int, int]]] = (-1, [])

    def pick(self, index: int) -> tuple[int, int]:
        """(source, place in that source) of document `index`."""
        block, at = divmod(index, self.BLOCK)
        if self._order[0] != block:
            order = [(s, block * share + i) for s, share in enumerate(self.shares) for i in range(share)]
            random.Random(stable_hash(self.seed, block)).shuffle(order)
            self._order = (block, order)
        return self._order[1][at]

    def __getitem__(self, index: int) -> Document:
        source, place = self.pick(index)
        return self.sources[source][place]


class TaskDocuments:
    """Worked examples of a task, rendered as the conversation that the model will see.

    `tools` are what the prompt lists, the same as at rollouts; the bare call syntax lists none.
    """

    def __init__(self, task: Task, chat: Chat, seed: int = 0, tools: Sequence[ToolSpec] = (), split: Split = "train"):
        if task.tools and chat.markers.tool_syntax != "bare" and {t.name for t in tools} != set(task.tools):
            raise UserError(
                f"Task {task.name!r} calls {', '.join(task.tools)}, but its prompts would list "
                f"{', '.join(t.name for t in tools) or 'no tool'}: the model would learn another prompt."
            )
        self.task, self.chat, self.seed, self.tools, self.split = task, chat, seed, tools, split

    def __getitem__(self, index: int) -> Document:
        rng = random.Random(stable_hash(self.seed, index))
        demo = self.task.demonstrate(self.task.problem(self.split, index), rng)
        rendered = self.chat.render(demo.messages, self.tools, thinking=demo.thinking)
        mask = rendered.mask if demo.learn_thoughts else without_thoughts(rendered.ids, rendered.mask, self.chat)
        return Document(rendered.ids, mask)


def without_thoughts(ids: Sequence[int], mask: Sequence[bool], chat: Chat) -> list[bool]:
    """The mask without what each of the assistant's turns wrote up to the end of its last thought."""
    kept, start = list(mask), 0
    for i, wrote in enumerate(mask):
        if not wrote:
            start = i + 1
        elif ids[i] == chat.think_close_id:
            kept[start : i + 1] = [False] * (i + 1 - start)
    return kept


class TextDocuments:
    """Random windows of a stream of tokens, as nanoGPT: `length` inputs and their next tokens."""

    def __init__(self, tokens: Tensor | Sequence[int], length: int, seed: int = 0):
        self.tokens = torch.as_tensor(tokens)
        self.length, self.seed = length, seed
        self.mask = [True] * (length + 1)
        if len(self.tokens) <= length:
            raise UserError(f"The text has {len(self.tokens)} tokens, too few for windows of {length} + 1.")

    def __getitem__(self, index: int) -> Document:
        start = stable_hash(self.seed, index) % (len(self.tokens) - self.length)
        return Document(self.tokens[start : start + self.length + 1].tolist(), self.mask)


# ------------------------------------------------------------------------------------------ packing
@dataclass(frozen=True)
class Batch:
    """Rows of packed documents. All [B, T] int64."""

    tokens: Tensor
    positions: Tensor  # restart at 0 with each document; PADDING where there is no token
    targets: Tensor  # the next token of the same document; IGNORE where there is no loss
    count: int  # targets with loss
    filled: int  # slots with a token
    context: int  # tokens seen by all tokens together, for the count of FLOPs
    state: int  # index of the first document after this batch

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
        )

    def some(self, rows: slice) -> Batch:
        """These rows alone."""
        tokens, positions, targets = self.tokens[rows], self.positions[rows], self.targets[rows]
        real = positions[positions != PADDING]
        count, context = int((targets != IGNORE).sum()), int((real + 1).sum())
        return Batch(tokens, positions, targets, count, len(real), context, self.state)

    def targets_ahead(self, k: int) -> Tensor:
        """Targets of a module that looks `k` tokens further: [B, T], IGNORE past the document's end."""
        ahead = torch.full_like(self.targets, IGNORE)
        if k < self.targets.shape[1]:
            same = self.positions[:, k:] == self.positions[:, :-k] + k
            same &= self.positions[:, :-k] != PADDING
            ahead[:, :-k] = torch.where(same, self.targets[:, k:], IGNORE)
        return ahead


class PackedBatches:
    """Endless batches of `rows` x `length`. `state` is the index of the next document."""

    def __init__(
        self,
        documents: Documents,
        rows: int,
        length: int,
        start: int = 0,
        overflow: Literal["error", "cut"] = "error",
    ):
        self.documents, self.rows, self.length, self.overflow = documents, rows, length, overflow
        self.state = start
        self.cut = 0  # documents that lost their end
        self._waiting: tuple[int, Document] | None = None  # made, but it did not fit any more

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        rows: list[list[Document]] = [[] for _ in range(self.rows)]
        free = [self.length] * self.rows
        index = self.state
        while any(free):
            document = self._document(index)
            need = len(document.ids) - 1
            row = next((r for r, room in enumerate(free) if room >= need), None)
            if row is None:
                break
            rows[row].append(document)
            free[row] -= need
            index += 1
        self.state = index
        return lay_out(rows, self.length, index)

    def _document(self, index: int) -> Document:
        if self._waiting is not None and self._waiting[0] == index:
            return self._waiting[1]
        document = self.documents[index]
        if len(document.ids) != len(document.mask):
            raise ValueError(f"document {index}: {len(document.ids)} ids, {len(document.mask)} mask entries")
        if not any(document.mask[1:]):
            raise UserError(f"Document {index} has no token to learn from ({len(document.ids)} tokens).")
        most = self.length + 1
        if len(document.ids) > most:
            if self.overflow == "error":
                raise UserError(
                    f"Document {index} has {len(document.ids)} tokens, more than a row takes "
                    f"({most}): raise the length, or set overflow to 'cut'."
                )
            self.cut += 1
            document = Document(document.ids[:most], document.mask[:most])
        self._waiting = (index, document)
        return document


def share(batches: Sequence[Batch], rank: int, world: int) -> list[Batch]:
    """What one of `world` processes computes of a step: whole microbatches as far as they go round, else rows of each.

    Every process gets as many microbatches, of as many rows. Raises UserError where that can't be.
    """
    turns = math.gcd(len(batches), world)
    apart = world // turns  # processes that share a microbatch
    rows, left = divmod(len(batches[0].tokens), apart)
    if left:
        raise UserError(
            f"train.rows = {len(batches[0].tokens)} and train.accumulate = {len(batches)} can't be divided evenly over "
            f"{world} processes: let accumulate, or rows, be a multiple of {world}."
        )
    if apart == 1:
        return list(batches[rank::world])
    first = rank // turns * rows
    return [batch.some(slice(first, first + rows)) for batch in batches[rank % turns :: turns]]


def first_fit(needs: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of documents in rows of `room` slots: the longest first, each into the first row with room for it."""
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(needs)), key=lambda i: (-needs[i], i)):
        row = next((k for k, left in enumerate(free) if left >= needs[i]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            free.append(room)
        rows[row].append(i)
        free[row] -= needs[i]
    return rows


def lay_out(rows: Sequence[Sequence[Document]], length: int, state: int = 0) -> Batch:
    """The tensors of documents that were given their rows. A row must not exceed `length`."""
    tokens, positions, targets = [], [], []
    count = filled = context = 0
    for documents in rows:
        ids: list[int] = []
        places: list[int] = []
        wanted: list[int] = []
        for document in documents:
            n, shared = len(document.ids) - 1, document.shared
            ids += document.ids[shared:-1]
            places += range(shared, n)
            own = zip(document.ids[shared + 1 :], document.mask[shared + 1 :], strict=True)
            wanted += [token if learn else IGNORE for token, learn in own]
            count += sum(document.mask[shared + 1 :])
            context += (n * (n + 1) - shared * (shared + 1)) // 2
        filled += len(ids)
        rest = length - len(ids)
        tokens.append(ids + [0] * rest)
        positions.append(places + [PADDING] * rest)
        targets.append(wanted + [IGNORE] * rest)
    return Batch(torch.tensor(tokens), torch.tensor(positions), torch.tensor(targets), count, filled, context, state)
