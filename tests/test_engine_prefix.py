"""Prefixes that are found against prefixes that are computed: the same tokens and numbers, and nothing leaks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from test_engine_generate import CHAT, differences, plain, requests, tags_often
from test_model_zoo import PATTERNS
from trivet.engine import Engine, Request
from trivet.engine.prefix import BLOCK, PrefixStore
from trivet.messages import Completion, Sampling, StopReason
from trivet.model import Transformer

SLOTS = 400
KINDS = ["gqa", "window", "chunks", "mla_q", "lightning", "delta", "hybrid"]  # every kind of cache
ROOM = 2**24


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    """Tokens without a meaning, and none that open a thought or end a turn."""
    numbers = torch.randint(20, CHAT.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))
    return tuple(numbers.tolist())


def ask(prompt: tuple[int, ...], seed: int = 0, new: int = 9) -> Request:
    return Request(prompt, Sampling(temperature=1.0, seed=seed, max_tokens=new, answer_reserve=1))


def conserved(store: PrefixStore) -> None:
    """Every entry of a pool belongs to one node of the tree, or is free; the tree and the set of nodes agree."""
    found, stack = [], [store.root]
    while stack:
        family = [child for siblings in stack.pop().children.values() for child in siblings]
        found += family
        stack += family
    assert set(found) == store.nodes and len(found) == len(store.nodes)
    for pool, used in (
        (store.blocks, [n.block for n in found if n.block >= 0]),
        (store.snapshots, [n.state for n in found if n.state >= 0]),
    ):
        assert sorted(used + pool.free) == list(range(pool.size)) and pool.size <= pool.most


def gap(a: Completion, b: Completion) -> float:
    assert a.tokens == b.tokens
    return max(abs(x - y) for x, y in zip(a.raw_logprobs, b.raw_logprobs, strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_ten_turns_compute_what_is_new_and_no_more(name: str) -> None:
    model = tags_often(PATTERNS[name])
    engine, bare = Engine(model, CHAT, 2, SLOTS, prefix_bytes=ROOM), Engine(model, CHAT, 2, SLOTS)
    history: tuple[int, ...] = prompt_of(40)
    known = 0
    for turn in range(10):
        request = ask(history, seed=turn)
        before = engine.stats.prompt_tokens
        (found,), (computed,) = engine.generate([request]), bare.generate([request])
        assert gap(found, computed) < 1e-5
        assert engine.stats.prompt_tokens - before <= len(history) - known + BLOCK
        known = len(history) + len(found.tokens) - 1  # the last token was never fed
        history = (*history, *found.tokens, *prompt_of(7, seed=100 + turn))
    assert engine.stats.cached_tokens > 500 and bare.stats.prompt_tokens > 3 * engine.stats.prompt_tokens
    assert engine.prefixes is not None
    conserved(engine.prefixes)
    assert engine.prefix_stats.hits == 9 and engine.prefix_stats.misses == 1


@pytest.mark.parametrize("name", KINDS)
def test_appended_branched_edited_and_cut_prompts_are_as_if_computed(name: str) -> None:
    model = tags_often(PATTERNS[name])
    base = prompt_of(90)
    engine = Engine(model, CHAT, 2, SLOTS, prefix_bytes=ROOM)
    engine.generate([ask(base)])
    engine.generate([ask((*base, *prompt_of(13, 5)))])
    cases = {
        "same": base,
        "append": (*base, *prompt_of(20, 1)),
        "branch": (*base[:57], *prompt_of(30, 2)),
        "edit": (*base[:33], 21 if base[33] != 21 else 22, *base[34:]),
        "cut": base[:70],
        "cut at a block": base[:64],
        "other": prompt_of(50, 3),
    }
    for case, prompt in cases.items():
        for seed in range(2):  # the second time from what the first one kept
            (found,) = engine.generate([ask(prompt, seed)])
            (computed,) = Engine(model, CHAT, 1, SLOTS).generate([ask(prompt, seed)])
            assert gap(found, computed) < 1e-5, case
    assert engine.prefixes is not None
    conserved(engine.prefixes)
    if not engine.prefixes.states:  # attention goes on from any token
        assert engine.prefix_stats.hit_tokens >= 2 * (89 + 90 + 57 + 33 + 69 + 63)
    assert engine.prefix_stats.new_tokens > 0


@pytest.mark.parametrize("name", ["gqa", "lightning", "hybrid"])
def test_a_spoilt_store_is_noticed(name: str) -> None:
    """The twin: were what is found not what was computed, the comparisons above would fail."""
    model = tags_often(PATTERNS[name])
    engine = Engine(model, CHAT, 1, SLOTS, prefix_bytes=ROOM)
    request = ask(prompt_of(60))
    engine.generate([request])
    (found,) = engine.generate([request])
    assert engine.prefixes is not None
    with torch.inference_mode():
        for tensor in (*engine.prefixes.blocks.tensors, *engine.prefixes.snapshots.tensors):
            tensor += 1.0
    (spoilt,) = engine.generate([request])
    assert spoilt.tokens != found.tokens or gap(spoilt, found) > 1e-3


def test_states_are_kept_on_the_way_through_a_long_prompt() -> None:
    """A hybrid can go on in the middle of a prompt only where a snapshot stands: every 512 tokens."""
    model = tags_often("lightning/dense gqa/dense")
    engine = Engine(model, CHAT, 1, 1400, prefix_bytes=ROOM)
    base = prompt_of(1200)
    engine.generate([ask(base)])
    other = (*base[:1100], *prompt_of(40, 7))
    before = engine.stats.prompt_tokens
    (found,) = engine.generate([ask(other)])
    (computed,) = Engine(model, CHAT, 1, 1400).generate([ask(other)])
    assert gap(found, computed) < 1e-5
    assert engine.stats.prompt_tokens - before == len(other) - 1 - 1024
    assert engine.prefix_stats.no_state_tokens == 1100 - 1024


def test_new_weights_forget_old_prefixes() -> None:
    model, request = tags_often(), ask(prompt_of(60))
    engine = Engine(model, CHAT, 1, SLOTS, prefix_bytes=ROOM)
    (old,) = engine.generate([request])
    with torch.no_grad():
        model.layers[0].mixer.k_proj.weight.mul_(-1.0)  # type: ignore[union-attr,operator]
    (new,) = engine.generate([request])
    (fresh,) = Engine(model, CHAT, 1, SLOTS).generate([request])
    assert gap(new, fresh) < 1e-5 and (old.tokens != new.tokens or gap(old, new) > 1e-3)
    assert engine.prefix_stats.hits == 0


@pytest.mark.parametrize("name", KINDS)
def test_a_small_store_evicts_and_stays_right(name: str) -> None:
    model = tags_often(PATTERNS[name])
    big = Engine(model, CHAT, 4, SLOTS, prefix_bytes=ROOM)
    big.generate([ask(prompt_of(60))])
    assert big.prefixes is not None
    few = 12 * sum(p.nbytes // max(p.size, 1) for p in (big.prefixes.blocks, big.prefixes.snapshots))
    engine = Engine(model, CHAT, 4, SLOTS, prefix_bytes=few)
    asked = [ask((*prompt_of(50, i % 3), *prompt_of(20, i)), seed=i) for i in range(24)]
    assert differences(engine.generate(asked), Engine(model, CHAT, 4, SLOTS).generate(asked)) == []
    assert engine.prefixes is not None and engine.prefixes.nbytes <= few
    assert engine.prefix_stats.evicted_nodes > 0
    conserved(engine.prefixes)


@pytest.mark.parametrize("name", ["gqa", "hybrid", "dual"])
def test_requests_that_are_set_aside_go_on_as_if_nothing_had_happened(name: str) -> None:
    model, asked = tags_often(PATTERNS[name]), requests(8, max_tokens=24)
    want = [plain(model, CHAT, r) for r in asked]
    for room in (0, ROOM):
        engine = Engine(model, CHAT, 4, 72, prefix_bytes=room)
        ids = [engine.add(r) for r in asked]
        done: dict[int, Completion] = {}
        for step in range(400):
            done |= engine.step()
            if step % 3 == 1 and engine.busy:
                engine.set_aside(ids[step % 8])
            if not engine.busy:
                break
        done |= engine.step()
        assert differences([done[i] for i in ids], want) == [] and engine.stats.set_aside > 3


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_anything_may_happen_and_nothing_leaks(data: st.DataObject) -> None:
    """Requests come, share starts, are cancelled, set aside and run short of memory: those that end are right."""
    name = data.draw(st.sampled_from(["gqa/dense", "lightning/dense mla/dense", "window/dense lightning/dense"]))
    model = MODELS.setdefault(name, tags_often(name))
    room = data.draw(st.sampled_from([0, 60_000, ROOM]))
    engine = Engine(model, CHAT, data.draw(st.integers(1, 5)), 72, prefix_bytes=room)
    asked: dict[int, Request] = {}
    done: dict[int, Completion] = {}
    pool = requests(12)
    for _ in range(data.draw(st.integers(5, 40))):
        what = data.draw(st.sampled_from(["add", "add", "step", "step", "step", "cancel", "set aside", "no memory"]))
        if what == "add":
            request = data.draw(st.sampled_from(pool))
            asked[engine.add(replace(request, sampling=replace(request.sampling, max_tokens=12)))] = request
        elif what == "step":
            done |= engine.step()
        elif asked and what in ("cancel", "set aside"):
            id = data.draw(st.sampled_from(sorted(asked)))
            engine.cancel(id) if what == "cancel" else engine.set_aside(id)
        elif what == "no memory" and engine.rows.live and engine.max_rows > 1:
            with pytest.warns(UserWarning, match="Memory ran out"):
                engine._shrink(RuntimeError("can't allocate memory"))
    for _ in range(3000):
        done |= engine.step()
        if not engine.busy:
            break
    done |= engine.step()
    assert set(done) == set(asked) and not engine.busy and not engine.rows.alive.any()
    for id, completion in done.items():
        request = replace(asked[id], sampling=replace(asked[id].sampling, max_tokens=12))
        if (name, request) not in PLAIN:
            PLAIN[name, request] = plain(model, CHAT, request)
        want = PLAIN[name, request]
        if completion.stop is StopReason.CANCELLED:
            assert completion.tokens == want.tokens[: len(completion.tokens)]
        else:
            assert differences([completion], [want]) == []
    if engine.prefixes is not None:
        conserved(engine.prefixes)


MODELS: dict[str, Transformer] = {}
PLAIN: dict[tuple[str, Request], Completion] = {}


def test_running_out_of_memory_makes_the_batch_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = tags_often("lightning/dense gqa/dense"), requests(8, max_tokens=20)
    want = [plain(model, CHAT, r) for r in asked]
    engine, real = Engine(model, CHAT, 8, 72), type(model).forward

    def forward(self: object, tokens: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        out = real(self, tokens, *args, **kwargs)  # type: ignore[arg-type]
        if len(tokens) > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return out

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.warns(UserWarning, match="Memory ran out: the batch is now at most"):
        done = engine.generate(asked)
    assert differences(done, want) == [] and engine.max_rows <= 3 and engine.stats.shrunk >= 1


def test_one_request_too_large_for_memory_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tags_often()
    small, large = ask(prompt_of(20)), ask(prompt_of(200))
    engine, real = Engine(model, CHAT, 4, SLOTS), type(model).forward

    def forward(self: object, tokens: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if tokens.numel() > 150:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return real(self, tokens, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.warns(UserWarning, match="Memory ran out"):
        bad, good = engine.generate([large, small])
    assert bad.stop is StopReason.ERROR and "memory ran out" in (bad.error or "")
    assert differences([good], [Engine(model, CHAT, 1, SLOTS).generate([small])[0]]) == []
