"""What the layers keep: without a bound nothing changes; with one, attention is that of the plain rule, written down anew.

The definition is a mask on the training path: who may see whom. A cache that evicts must give what that mask gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from test_engine_generate import CHAT, SLOTS, differences, plain, requests, tags_often
from test_engine_prefix import ask, prompt_of
from test_model_zoo import PATTERNS, gap, noisy, spec_of, tokens_of
from trivet.config import UserError
from trivet.engine import Engine
from trivet.engine.calibrate import calibrate, written
from trivet.engine.policy import (
    Full,
    Int8,
    Layers,
    Place,
    Policy,
    RankByAge,
    SnapKV,
    Window,
    parse_policy,
)
from trivet.engine.speculate import NGram
from trivet.model import Transformer
from trivet.model.attention import attend_kept
from trivet.model.bounded import Ring, Voted
from trivet.model.cache import KVCache, LatentCache, LayerCache
from trivet.model.compressed import Basis, quantise, restore
from trivet.model.layers import Layout, added
from trivet.model.prefill import prefill
from trivet.model.prompt import Sparse

CPU = torch.device("cpu")
MODELS = {name: f"{name}/dense*3" for name in ("gqa", "mqa", "window", "mla", "mla_q")} | {
    "both": "gqa/dense mla/dense window/dense"
}
LATENT = ["mla", "mla_q", "both"]


def caches_of(model: Transformer, policy: Policy, rows: int, slots: int) -> list[LayerCache]:
    policy.check(model.spec)
    dtype, layers = model.embed.dtype, len(model.layers)
    return [
        policy.new_cache(layer.mixer, Place(i, layers, rows, slots, slots, dtype, CPU))  # type: ignore[arg-type]
        for i, layer in enumerate(model.layers)
    ]


def decode(model: Transformer, tokens: Tensor, caches: list[LayerCache], cuts: list[int]) -> Tensor:
    """Hidden states of tokens [B,T] fed in pieces that end at the cuts."""
    done = []
    for start, stop in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        at = torch.arange(start, stop).expand(len(tokens), -1)
        done.append(model(tokens[:, start:stop], at, caches, stop))
    return torch.cat(done, 1)


def unbounded(model: Transformer, longest: int, kind: str) -> Policy:
    """Each policy with a bound that nothing reaches."""
    if kind == "lowrank":
        policy = RankByAge(((longest, 3), (2 * longest, 1)))
        return policy.with_bases(calibrate(model, tokens_of(4, 30).tolist()))
    return {
        "window": Window(longest), "layers": Layers(longest, 2 * longest, 1), "snapkv": SnapKV(2 * longest + 64, 8),
        "full": Full(),
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["window", "layers", "snapkv", "lowrank"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_without_a_bound_it_is_the_full_cache(name: str, kind: str) -> None:
    if kind == "lowrank" and name not in LATENT:
        pytest.skip("no latent")
    model, tokens = noisy(spec_of(MODELS[name])).double(), tokens_of(3, 41)
    cuts = [8, 9, 10, 14, 16, 24, 32, 33, 40]
    want = model(tokens)
    policy = unbounded(model, 48, kind)
    assert gap(decode(model, tokens, caches_of(model, policy, 3, 48), cuts), want) < 1e-6
    bounded: dict[str, Policy] = {"window": Window(2, 1), "layers": Layers(3, 2, 1), "snapkv": SnapKV(16, 8)}
    if kind == "lowrank":
        bounded["lowrank"] = RankByAge(((1, 3), (40, 1))).with_bases(policy.bases)  # type: ignore[union-attr,arg-type]
        cuts = list(range(1, 41))
    lost = gap(decode(model, tokens, caches_of(model, bounded[kind], 3, 48), cuts), want)
    if (name, kind) == ("window", "snapkv"):
        assert lost < 1e-6  # a layer that sees 5 tokens keeps 5, which is all it needs
    else:
        assert lost > 1e-3  # the twin: with a bound something is lost


# --------------------------------------------------------------------------------- the rules, written down anew
PIECES = [[1, 2, 3, 7, 20], list(range(1, 33)), [], [32]]


def rules(policy: Policy, layers: int, length: int) -> list[Tensor]:
    """Who sees whom in each layer, bool [1,1,T,T]."""
    at = torch.arange(length)
    behind, found = at[:, None] - at, []
    for i in range(layers):
        window, sinks = policy.bound(i, layers)  # type: ignore[union-attr]
        found.append(((behind >= 0) & ((behind < window) | (at < sinks)))[None, None])
    return found


@pytest.mark.parametrize("policy", [Window(5, 2), Window(1, 0), Window(7, 4), Layers(11, 3, 2), Layers(2, 9, 0)])
@pytest.mark.parametrize("name", ["gqa", "mla_q"])
@torch.no_grad()
def test_a_ring_is_a_mask(name: str, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = noisy(spec_of(MODELS[name])).double(), tokens_of(2, 33)

    def masked(policy: Policy) -> Tensor:
        waiting = iter(rules(policy, 3, 33))
        with monkeypatch.context() as patch:
            patch.setattr(Layout, "mask", lambda self, window=None, dtype=None: added(next(waiting), torch.float64))
            return model(tokens)

    want = masked(policy)
    for cuts in PIECES:
        assert gap(decode(model, tokens, caches_of(model, policy, 2, 40), [c for c in cuts if c < 33]), want) < 1e-6
    assert gap(masked(Window(6, 2)), want) > 1e-3  # the twin: a token more or less is noticed


def vote_by_hand(q: Tensor, k: Tensor, v: Tensor, budget: int, block: int) -> tuple[Tensor, list[int]]:
    """One key head with its queries q [G,T,w], token by token -> [G,T,w], and which tokens are there at the end."""
    length, kept, out = len(k), list[int](), torch.zeros_like(q)
    votes: dict[int, float] = {}
    for t in range(length):
        if t % block == 0 and t:
            old = [p for p in kept if p < t - block]
            padded = [0.0] * 2 + [votes.get(p, 0.0) for p in old] + [0.0] * 2
            pooled = {p: sum(padded[i : i + 5]) / 5 for i, p in enumerate(old)}
            best = sorted(old, key=lambda p: -pooled[p])[: budget - 2 * block]
            kept, votes = sorted(best) + list(range(t - block, t)), {}
        kept.append(t)
        weights = (q[:, t] @ k[kept].T * q.shape[-1] ** -0.5).softmax(-1)  # [G,kept]
        out[:, t] = weights @ v[kept]
        for p, weight in zip(kept, weights.sum(0).tolist(), strict=True):
            votes[p] = votes.get(p, 0.0) + weight
    return out, kept


@pytest.mark.parametrize(
    "cuts", [[4, 8, 12, 16, 20, 24, 28, 32, 36], [*range(1, 37)], [2, 4, 5, 8, 9, 12, *range(14, 37, 2)]]
)
def test_votes_by_hand(cuts: list[int]) -> None:
    g = torch.Generator().manual_seed(0)
    lengths, heads, kv_heads, width, longest = (37, 30), 4, 2, 8, 37
    q, k, v = (
        2 * torch.randn(2, longest, h, width, generator=g, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)
    )
    cache = Voted(kv_heads, (width, width), 3, 12, 4, (torch.float64, CPU))
    got = torch.zeros(2, longest, heads, width, dtype=torch.float64)
    for start, stop in zip([0, *cuts], [*cuts, longest], strict=True):
        at = torch.arange(start, stop)
        positions = torch.stack([torch.where(at < n, at, -1) for n in lengths])
        part = slice(start, stop)
        read = cache.update((k[:, part], v[:, part]), positions, stop)
        layout = Layout(positions, 2, stop - start, CPU, stop)
        keys, values = (x.transpose(1, 2) for x in read)
        got[:, part] = attend_kept(q[:, part], keys, values, cache, layout, width**-0.5)
    for row, length in enumerate(lengths):
        for head in range(kv_heads):
            mine = slice(2 * head, 2 * head + 2)
            queries = q[row, :length, mine].transpose(0, 1)
            want, kept = vote_by_hand(queries, k[row, :length, head], v[row, :length, head], 12, 4)
            assert gap(got[row, :length, mine].transpose(0, 1), want) < 1e-6
            assert kept != list(range(length - len(kept), length))  # it is no window
            other, _ = vote_by_hand(queries, k[row, :length, head], v[row, :length, head], 16, 4)
            assert gap(other, want) > 1e-3  # the twin: another budget is noticed


@torch.no_grad()
def test_ranks_shrink_with_age() -> None:
    model = noisy(spec_of("mla/dense")).double()
    mixer = model.layers[0].mixer
    turn = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    policy = RankByAge(((6, 7), (40, 3)), (Basis(turn, turn.T),))
    latent = torch.randn(2, 110, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for cuts in ([32, 64, 96], list(range(1, 110)), [5, 32, 40, 41, 60, 64, 96, 100]):
        cache = policy.new_cache(mixer, Place(0, 1, 2, 120, 120, torch.float64, CPU))  # type: ignore[arg-type]
        for start, stop in zip([0, *cuts], [*cuts, 110], strict=True):
            at = torch.stack((torch.arange(start, stop), torch.full((stop - start,), -1)))
            read = cache.update(latent[:, start:stop], at, stop)[0]  # type: ignore[attr-defined]
            for p in range(stop):
                age = start // 32 * 32 - p
                rank = 10 if age <= 6 else 7 if age <= 40 else 3
                want = latent[0, p, :10] @ turn[:, :rank] @ turn[:, :rank].T
                assert torch.allclose(read[p, :10] @ turn.T, want) and torch.equal(read[p, 10:], latent[0, p, 10:])
    assert not torch.allclose(read[50, :10] @ turn.T, latent[0, 50, :10])  # the twin: it did lose something


@torch.no_grad()
def test_a_basis_loses_the_least_of_keys_and_values_that_so_many_numbers_can() -> None:
    model, texts = noisy(spec_of("mla/dense*2")), tokens_of(8, 40)
    bases = calibrate(model, texts.tolist())
    seen: list[Tensor] = []
    hook = model.layers[1].mixer.kv_norm.register_forward_hook(lambda m, a, out: seen.append(out.double()))  # type: ignore[union-attr]
    model(texts)
    hook.remove()
    up = model.layers[1].mixer.kv_up.weight.double()  # type: ignore[union-attr,operator]
    c, basis = seen[0].flatten(0, 1), bases[1]
    assert basis is not None

    def lost(into: Tensor, back: Tensor, rank: int) -> float:
        return float(((c @ into[:, :rank] @ back[:rank] - c) @ up.T).square().sum())

    singular = torch.linalg.svdvals(c @ up.T).square()
    for rank in range(11):
        assert abs(lost(*basis, rank) - float(singular[rank:10].sum())) < 1e-9 * lost(*basis, 0)  # Eckart and Young
    pca = torch.linalg.svd(c).Vh.T
    assert lost(pca, pca.T, 4) > 1.05 * lost(*basis, 4)  # the twin: the latents' own PCA is another basis


# ------------------------------------------------------------------------------------------------ eight bits
def test_eight_bits_are_right_to_half_a_step() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, 3, 16, generator=g) * 10 ** torch.randint(-3, 4, (5, 7, 3, 1), generator=g)
    x[0, 0, 0] = 0.0
    steps, scale = quantise(x)
    error = (restore(steps, scale, torch.float32) - x).abs()
    bound = x.abs().amax(-1, keepdim=True) / 127 * 0.5
    assert steps.dtype == torch.int8 and bool((error <= bound * 1.15 + 1e-6).all())
    assert bool((error > bound * 0.8).any())  # the twin: half a step is what is lost, not less


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_eight_bits_are_close(name: str) -> None:
    model, tokens = noisy(spec_of(MODELS[name])).double(), tokens_of(3, 41)
    want, cuts = model(tokens), [7, 8, 9, 30]
    assert 1e-5 < gap(decode(model, tokens, caches_of(model, Int8(), 3, 48), cuts), want) < 0.1


# ------------------------------------------------------------------------------------------------- the engine
def policies(model: Transformer) -> dict[str, Policy]:
    found: dict[str, Policy] = {
        "int8": Int8(), "window": Window(9, 2), "layers": Layers(13, 5, 1), "snapkv": SnapKV(16, 8),
    }  # fmt: skip
    if any(layer.mixer.kind == "mla" for layer in model.spec.layers):
        bases = calibrate(model, tokens_of(4, 30).tolist())
        found["lowrank"] = RankByAge(((3, 6), (20, 2)), tuple(bases))
    return found


@pytest.mark.parametrize("pattern", ["gqa/dense*2", "mla/dense*2", "lightning/dense window/dense mla/dense"])
def test_in_any_batch_a_request_gets_the_same(pattern: str) -> None:
    """Alone, among others that share its prompt, with a prefix store, set aside in the middle: the same tokens."""
    model, asked = tags_often(pattern), requests(8)
    with torch.inference_mode():
        exact = [plain(model, CHAT, r) for r in asked]
    for kind, policy in policies(model).items():
        want = Engine(model, CHAT, 1, SLOTS, policy=policy).generate(asked)
        assert differences(want, exact), kind  # the twin: it is not the full cache
        engine = Engine(model, CHAT, 12, SLOTS, policy=policy)
        assert differences(engine.generate(asked + asked[:4]), want + want[:4]) == [], kind
        assert engine.stats.shared_tokens > 0
        if policy.resumes:
            engine = Engine(model, CHAT, 5, SLOTS, prefix_bytes=2**22, policy=policy)
            assert differences(engine.generate(asked), want) == [], kind
            assert differences(engine.generate(asked), want) == [] and engine.stats.cached_tokens > 0, kind
        engine = Engine(model, CHAT, 5, SLOTS, policy=policy)
        ids = [engine.add(request) for request in asked]
        done, step = {}, 0
        while engine.busy:
            if step in (3, 11, 17):
                engine.set_aside(ids[step % 7])
            done, step = done | dict(engine.step()), step + 1
        assert engine.stats.set_aside and differences([done[i] for i in ids], want) == [], kind


@pytest.mark.parametrize("name", ["gqa", "mla"])
def test_a_long_prompt_and_growing_caches(name: str) -> None:
    """Columns double on the way; pieces of a prompt end where blocks do."""
    model = tags_often(PATTERNS[name])
    asked = [ask(prompt_of(length, length), length, 40) for length in (300, 251, 20)]
    for kind, policy in policies(model).items():
        alone = [Engine(model, CHAT, 1, 400, policy=policy).generate([request])[0] for request in asked]
        assert differences(Engine(model, CHAT, 3, 400, policy=policy).generate(asked), alone) == [], kind


@pytest.mark.parametrize("name", ["gqa", "mla"])
def test_guessing_changes_no_token(name: str) -> None:
    model, asked = tags_often(PATTERNS[name]), requests(8)
    for policy in (Window(9, 2), Int8(), Layers(13, 5, 1)):
        want = Engine(model, CHAT, 1, SLOTS, policy=policy).generate(asked)
        engine = Engine(model, CHAT, 8, SLOTS, policy=policy, drafter=NGram(3))
        assert differences(engine.generate(asked), want) == [] and engine.stats.guessed_tokens > 0


# ------------------------------------------------------------------------------------------ bytes, and refusals
@pytest.mark.parametrize("name", ["gqa", "mla_q", "window", "hybrid", "next"])
def test_bytes_are_as_told(name: str) -> None:
    model = noisy(spec_of(PATTERNS[name]))
    for policy in policies(model).values():
        for longest in (4, 17, 200):
            caches = caches_of(model, policy, 3, longest)
            spare = 0
            for cache in caches:
                slots = (
                    2 if isinstance(cache, Ring | Voted | KVCache) else 1 if isinstance(cache, LatentCache) else None
                )
                if slots is not None:
                    stores = cache.tensors[:-1] if isinstance(cache, Voted) else cache.tensors
                    spare += sum(t.nbytes // t.shape[slots] for t in stores)
            told = 3 * policy.row_bytes(model.spec, longest, 4)
            assert sum(c.nbytes for c in caches) - spare == told
            assert 3 * policy.row_bytes(model.spec, longest + 1, 4) >= told


def test_bounded_caches_do_not_grow() -> None:
    spec = spec_of("gqa/dense*2")
    full = Full().row_bytes(spec, 1000, 4)
    assert full == spec.cache_bytes_per_token(4) * 1000
    assert Window(96, 4).row_bytes(spec, 1000, 4) == Window(96, 4).row_bytes(spec, 9000, 4) == full // 10
    assert SnapKV(96, 32).row_bytes(spec, 9000, 4) < full // 9
    latent = spec_of("mla/dense*2")
    assert RankByAge(((1000, 3),)).row_bytes(latent, 500, 4) == Full().row_bytes(latent, 500, 4)  # 10 numbers and 4
    assert RankByAge(((0, 3),)).row_bytes(latent, 500, 4) == 2 * 4 * (500 * (3 + 4) + 32 * 7)
    assert Int8().row_bytes(spec, 1000, 2) < 0.63 * Full().row_bytes(spec, 1000, 2)  # heads of 8 numbers
    engine = Engine(tags_often("gqa/dense*2"), CHAT, 1, 400, policy=Window(12, 4))
    engine.generate([ask(prompt_of(300), new=20)])
    assert engine.stats.cache_bytes == 17 * spec.cache_bytes_per_token(4)


def test_policies_are_written_as_they_are_read() -> None:
    assert parse_policy("full") == Full() and parse_policy("int8") == Int8()
    assert parse_policy("window:252") == Window(252, 4) and parse_policy("window:252+0") == Window(252, 0)
    assert parse_policy("layers:512-128+3") == Layers(512, 128, 3)
    assert parse_policy("snapkv:512") == SnapKV(512, 32) and parse_policy("snapkv:64/16") == SnapKV(64, 16)
    assert parse_policy("lowrank:1024/256/8192/64") == RankByAge(((1024, 256), (8192, 64)))
    assert [Layers(10, 2).bound(i, 5)[0] for i in range(5)] == [10, 8, 6, 4, 2]


@pytest.mark.parametrize(
    "text",
    ["", "int4", "int8:3", "window", "window:0", "window:a", "window:-3", "layers:5", "snapkv:8/8", "snapkv:32/0",
     "lowrank:8", "lowrank:8/4/4/2", "lowrank:8/4/9/5", "lowrank:8/0", "full:1"],
)  # fmt: skip
def test_what_is_no_policy_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="[Cc]ache"):
        parse_policy(text)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda m: Engine(m["gqa"], CHAT, policy=RankByAge(((8, 2),))), "no MLA"),
        (lambda m: Engine(m["mla"], CHAT, policy=RankByAge(((8, 2),))), "calibrate"),
        (lambda m: Engine(m["mla"], CHAT, policy=RankByAge(((8, 10),))), "shortens no latent"),
        (lambda m: Engine(m["mla"], CHAT, policy=policies(m["mla"])["lowrank"], prefix_bytes=9), "prefix_bytes"),
        (lambda m: Engine(m["gqa"], CHAT, policy=SnapKV(16, 8), drafter=NGram(2)), "no drafter"),
        (lambda m: Engine(m["chunks"], CHAT, policy=SnapKV(16, 8)), "chunks"),
        (lambda m: Engine(m["chunks"], CHAT, policy=Window(16)), "chunks"),
        (lambda m: calibrate(m["gqa"], [[1, 2]]), "latents of MLA"),
        (lambda m: calibrate(m["mla"], []), "latents of MLA"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(make: Callable[[dict[str, Transformer]], Any], why: str) -> None:
    models = {name: tags_often(PATTERNS[name]) for name in ("gqa", "mla", "chunks")}
    with pytest.raises(UserError, match=why):
        make(models)


@torch.no_grad()
def test_a_call_across_blocks_and_sparse_prefill_are_refused() -> None:
    model, tokens = noisy(spec_of("mla/dense")), tokens_of(1, 60)
    for kind in ("snapkv", "lowrank"):
        caches = caches_of(model, policies(model)[kind], 1, 64)
        with pytest.raises(UserError, match="must not cross"):
            prefill(model, tokens, caches, 40)
    with pytest.raises(UserError, match="Sparse prefill"):
        prefill(model, tokens, caches_of(model, Window(8), 1, 64), 40, sparse=Sparse(8, 8, 1, 1))
    whole = prefill(model, tokens, caches_of(model, Window(64), 1, 64), 40).hidden
    assert gap(whole, model(tokens)[:, -1]) < 1e-5


def test_a_model_writes_what_it_is_calibrated_on() -> None:
    model = tags_often("mla/dense*2")
    texts = written(model, CHAT, ["1+1=", "2+3="], 12, SLOTS)
    assert len({len(text) for text in texts}) >= 1 and all(len(text) > 6 for text in texts) and texts[0] != texts[1]
    bases = calibrate(model, texts)
    assert len(bases) == 2 and all(basis is not None for basis in bases)
