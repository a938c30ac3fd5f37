"""What was computed once is not computed again: a tree of token blocks that any later prompt may start from.

A node holds what the layers remember of up to BLOCK tokens that follow its parent's: for layers that keep
something of every token (keys and values, latents), a block of the pool; for layers that keep one state a
sequence (lightning, gated delta), a snapshot of the state after its last token, where one was taken.
A prompt walks down the tree as far as its tokens agree. Layers of the first kind can go on from any token;
with layers of the second kind, from the deepest snapshot on the way.

    root ── system prompt ── question A ── answer A ── tool result ...
                         └── question B ── ...

Rows stay contiguous, so that attention reads memory in order: what is found is copied into a row, at the
speed of memory, some hundred times faster than it was computed. A node's references are its children; of the
nodes without any, the one that was used the longest ago goes first.

Left out: attention straight from the pool (paging), which saves the copy and costs a gather in every step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trivet.model.cache import LayerCache

BLOCK = 16  # tokens
FIRST_ENTRIES = 64  # of a pool, before it doubles
EVICTED_AT_ONCE = 0.125  # share of a full pool


@dataclass(eq=False)
class Node:
    tokens: tuple[int, ...]
    parent: Node | None
    children: dict[int, list[Node]] = field(default_factory=lambda: defaultdict(list))  # by their first token
    block: int = -1
    state: int = -1
    used: int = 0


@dataclass
class Hit:
    """A prompt's longest known start: its first `length` tokens, and where they lie."""

    length: int
    path: list[Node]
    seen: int  # tokens that the tree knows; more than `length` where no state was kept there


@dataclass
class PrefixStats:
    hits: int = 0  # prompts that started from something
    misses: int = 0
    hit_tokens: int = 0
    new_tokens: int = 0  # never seen at this place
    no_state_tokens: int = 0  # seen, but no snapshot stands there to go on from
    evicted_nodes: int = 0
    refused_nodes: int = 0  # no room, and nothing to evict


class Pool:
    """Storage of one kind for all layers: entries of `shapes`, growing up to `most`."""

    def __init__(self, like: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], most: int) -> None:
        self.most = most
        self.tensors = [t.new_zeros((0, *shape)) for t, shape in zip(like, shapes, strict=True)]
        self.free: list[int] = []
        self.size = 0

    def take(self) -> int:
        """A free entry, or -1."""
        if not self.free and self.size < self.most:
            grown = min(max(FIRST_ENTRIES, 2 * self.size), self.most)
            self.tensors = [torch.cat((t, t.new_zeros((grown - self.size, *t.shape[1:])))) for t in self.tensors]
            self.free = list(range(grown - 1, self.size - 1, -1))
            self.size = grown
        return self.free.pop() if self.free else -1

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


class PrefixStore:
    """The tree and its pools, at most `most_bytes` in all, for caches like these."""

    def __init__(self, caches: Sequence[LayerCache], most_bytes: int) -> None:
        self.kept = [i for i, c in enumerate(caches) if c.slot_dim is not None]
        self.states = [i for i, c in enumerate(caches) if c.slot_dim is None]
        self.stats = PrefixStats()
        like, shapes = [], []
        for i in self.kept:
            for t in caches[i].tensors:
                at = self._slot_dim(caches[i])
                like.append(t)
                shapes.append((*t.shape[1:at], BLOCK, *t.shape[at + 1 :]))
        state_like = [t for i in self.states for t in caches[i].tensors]
        state_shapes = [tuple(t.shape[1:]) for t in state_like]
        block_bytes = sum(t.element_size() * torch.Size(s).numel() for t, s in zip(like, shapes, strict=True))
        state_bytes = sum(
            t.element_size() * torch.Size(s).numel() for t, s in zip(state_like, state_shapes, strict=True)
        )
        # Half for each where there are both: one conversation's snapshots weigh as much as its tokens, or more.
        share = 2 if block_bytes and state_bytes else 1
        self.blocks = Pool(like, shapes, most_bytes // share // block_bytes if block_bytes else 0)
        self.snapshots = Pool(state_like, state_shapes, most_bytes // share // state_bytes if state_bytes else 0)
        self.root = Node((), None)
        self.clock = 0
        self.nodes: set[Node] = set()

    @staticmethod
    def _slot_dim(cache: LayerCache) -> int:
        assert cache.slot_dim is not None
        return cache.slot_dim

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes + self.snapshots.nbytes

    # --- reading -----------------------------------------------------------------------------------
    def find(self, tokens: Sequence[int]) -> Hit:
        """The longest start of `tokens` to go on from."""
        node, at, path = self.root, 0, list[Node]()
        best = (0, 0, self.root)  # tokens, nodes before the last, the last
        while at < len(tokens):
            next_node, most = None, 0
            for child in node.children.get(tokens[at], ()):
                common = _common(child.tokens, tokens, at)
                whole = common == len(child.tokens)
                usable = common if not self.states else common if whole and child.state >= 0 else 0
                if usable and at + usable > best[0]:
                    best = (at + usable, len(path), child)
                if common > most:
                    next_node, most = child, common
            at += most
            if next_node is None or most < BLOCK:
                break
            path.append(next_node)
            node = next_node
        length, before, last = best
        return Hit(length, [*path[:before], last] if length else [], max(at, length))

    def load(self, hit: Hit, caches: Sequence[LayerCache], row: int) -> None:
        """Copy what was found into a row of the caches."""
        self.clock += 1
        for node in hit.path:
            node.used = self.clock
        ids = torch.tensor([node.block for node in hit.path])
        tensors = iter(self.blocks.tensors)
        for i in self.kept:
            at = self._slot_dim(caches[i])
            for mine in caches[i].tensors:
                store = next(tensors)
                found = store[ids.to(store.device)].movedim(0, at - 1).flatten(at - 1, at)  # slots in order
                mine[row].narrow(at - 1, 0, hit.length).copy_(found.narrow(at - 1, 0, hit.length))
        states = iter(self.snapshots.tensors)
        for i in self.states:
            for mine in caches[i].tensors:
                mine[row] = next(states)[hit.path[-1].state]

    def count(self, hit: Hit, wanted: int) -> None:
        """Say of a prompt of `wanted` tokens what came of it."""
        s = self.stats
        s.hits, s.misses = s.hits + (hit.length > 0), s.misses + (hit.length == 0)
        s.hit_tokens += hit.length
        s.no_state_tokens += hit.seen - hit.length
        s.new_tokens += wanted - hit.seen

    # --- writing -----------------------------------------------------------------------------------
    def save(self, tokens: Sequence[int], caches: Sequence[LayerCache], row: int) -> None:
        """Keep what a row remembers of `tokens`: all that it has computed."""
        self.clock += 1
        node, at = self.root, 0
        new: list[tuple[Node, int]] = []  # and where its tokens start
        while at < len(tokens):
            part = tuple(tokens[at : at + BLOCK])
            family = node.children.get(part[0], ())
            child = next((c for c in family if c.tokens == part), None)
            if child is None and not self.states and any(c.tokens[: len(part)] == part for c in family):
                break  # the start of a longer block that is here: as good
            if child is None:
                child = Node(part, node)
                if self.kept and not self._room(child):
                    self.stats.refused_nodes += 1
                    break
                self._link(node, child)
                new.append((child, at))
            child.used = self.clock
            node, at = child, at + len(part)
        self._write(new, caches, row)
        if self.states and node is not self.root and at >= len(tokens) and node.state < 0:
            self._snapshot(node, caches, row)

    def _link(self, node: Node, child: Node) -> None:
        siblings = node.children[child.tokens[0]]
        if not self.states:  # a shorter block that is the start of this one is of no more use
            for other in [c for c in siblings if child.tokens[: len(c.tokens)] == c.tokens]:
                self._drop(other)
        node.children[child.tokens[0]].append(child)
        self.nodes.add(child)

    def _room(self, node: Node) -> bool:
        node.block = self.blocks.take()
        if node.block < 0 and self._evict():
            node.block = self.blocks.take()
        return node.block >= 0

    def _write(self, new: list[tuple[Node, int]], caches: Sequence[LayerCache], row: int) -> None:
        """Copy the row's slots of the new nodes into the pool: whole blocks in one go, the last may be short."""
        whole = [(n, at) for n, at in new if len(n.tokens) == BLOCK]
        tensors = iter(self.blocks.tensors)
        for i in self.kept:
            slot = self._slot_dim(caches[i])
            for mine in caches[i].tensors:
                store = next(tensors)
                if whole:  # new nodes follow one another
                    first, last = whole[0][1], whole[-1][1] + BLOCK
                    part = mine[row].narrow(slot - 1, first, last - first).unflatten(slot - 1, (-1, BLOCK))
                    ids = torch.tensor([n.block for n, _ in whole], device=store.device)
                    store[ids] = part.movedim(slot - 1, 0)
                for n, at in new[len(whole) :]:
                    size = len(n.tokens)
                    store[n.block].narrow(slot - 1, 0, size).copy_(mine[row].narrow(slot - 1, at, size))

    def _snapshot(self, node: Node, caches: Sequence[LayerCache], row: int) -> None:
        at = self.snapshots.take()
        if at < 0 and self._evict():
            at = self.snapshots.take()
        if at < 0:
            self.stats.refused_nodes += 1
            return
        node.state = at
        states = iter(self.snapshots.tensors)
        for i in self.states:
            for mine in caches[i].tensors:
                next(states)[at] = mine[row]

    def _evict(self) -> bool:
        """Give up the leaves that were used the longest ago; those of this very moment stay."""
        entries = max(self.blocks.size, self.snapshots.size)
        leaves = sorted((n for n in self.nodes if not n.children and n.used < self.clock), key=lambda n: n.used)
        gone = leaves[: max(1, int(entries * EVICTED_AT_ONCE))]
        for node in gone:
            self._drop(node)
        self.stats.evicted_nodes += len(gone)
        return bool(gone)

    def _drop(self, node: Node) -> None:
        """Give up a leaf, and with layers of states the nodes above it that lead to no other snapshot."""
        parent: Node | None = node.parent
        assert parent is not None
        siblings = parent.children[node.tokens[0]]
        siblings.remove(node)
        if not siblings:
            del parent.children[node.tokens[0]]
        self.nodes.remove(node)
        self._release(node)
        if self.states and parent is not self.root and not parent.children and parent.state < 0:
            if parent.used < self.clock:
                self._drop(parent)

    def _release(self, node: Node) -> None:
        for pool, entry in ((self.blocks, node.block), (self.snapshots, node.state)):
            if entry >= 0:
                pool.free.append(entry)

    def forget(self) -> None:
        """Give up everything: the weights have changed."""
        for node in self.nodes:
            self._release(node)
        self.nodes.clear()
        self.root = Node((), None)


def _common(block: tuple[int, ...], tokens: Sequence[int], at: int) -> int:
    """How many tokens from `at` on agree with a block's."""
    if block == tuple(tokens[at : at + len(block)]):
        return len(block)
    return next(
        (i for i, (a, b) in enumerate(zip(block, tokens[at : at + BLOCK], strict=False)) if a != b), len(tokens) - at
    )
