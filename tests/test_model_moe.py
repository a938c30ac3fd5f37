"""MoE: the two forms against a loop over tokens written from the published equations; routing records."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from test_model_zoo import FFNS, MIXERS, VOCAB, D, gap, next_token_loss, noisy, spec_of, tokens_of
from trivet.model import Routing, Transformer, ffn
from trivet.model.ffn import MoEFFN, fused, pick_form, sorted_
from trivet.spec import ModelSpec, MoE, SwiGLU

SPECS = {
    "v3": MoE(experts=8, top_k=3, hidden=8, shared_hidden=10, groups=4, top_groups=2, scale=2.5),
    "v2": MoE(experts=8, top_k=3, hidden=8, shared_hidden=10, groups=4, top_groups=2, scale=16.0, score="softmax",
              norm_topk=False, group_score="max", selection_bias=False),
    "v2-lite": MoE(experts=8, top_k=3, hidden=8, shared_hidden=12, score="softmax", norm_topk=False,
                   selection_bias=False),
    "qwen": MoE(experts=8, top_k=3, hidden=8, score="softmax", selection_bias=False),
    "qwen2": MoE(experts=8, top_k=3, hidden=8, shared_hidden=12, shared_gate=True, score="softmax", norm_topk=False,
                 selection_bias=False),
    "sigmoid, one expert": MoE(experts=5, top_k=1, hidden=8, norm_topk=False),
    "all experts": MoE(experts=4, top_k=4, hidden=8, score="softmax", selection_bias=True),
}  # fmt: skip


def layer_of(spec: MoE, seed: int = 0) -> MoEFFN:
    layer, g = MoEFFN(spec, D), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5)
        if spec.selection_bias:
            layer.bias.copy_(torch.randn(spec.experts, generator=g) * 0.3)
    return layer


def inputs(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def as_published(layer: MoEFFN, x: Tensor, use_bias: bool = True) -> tuple[Tensor, list[list[int]]]:
    """DeepSeek-V2 eq. 20-31 / V3 eq. 12-20, token by token: (y [N,D], chosen experts)."""
    s, ys, chosen = layer.spec, [], []
    for h in x:
        logits = layer.router @ h
        affinity = logits.sigmoid() if s.score == "sigmoid" else logits.softmax(0)
        select = (affinity + layer.bias if s.selection_bias and use_bias else affinity).tolist()
        size = s.experts // s.groups
        groups = [list(range(i * size, (i + 1) * size)) for i in range(s.groups)]

        def group_score(members: list[int], select: list[float] = select) -> float:
            best = sorted((select[i] for i in members), reverse=True)
            return best[0] if s.group_score == "max" else sum(best[:2])

        if s.groups > 1:
            groups = sorted(groups, key=group_score, reverse=True)[: s.top_groups]
        picked = sorted((i for g in groups for i in g), key=lambda i: select[i], reverse=True)[: s.top_k]
        total = sum(affinity[i] for i in picked) if s.norm_topk else 1.0
        y = torch.zeros_like(h)
        for i in picked:
            gate, up = layer.gate_up[i]
            y = y + affinity[i] / total * s.scale * (layer.down[i].T @ (F.silu(gate @ h) * (up @ h)))
        if layer.shared is not None:
            gate, up = layer.shared.gate_up
            always = layer.shared.down @ (F.silu(gate @ h) * (up @ h))
            y = y + (always if layer.shared_gate is None else (layer.shared_gate[0] @ h).sigmoid() * always)
        ys.append(y)
        chosen.append(sorted(picked))
    return torch.stack(ys), chosen


@pytest.mark.parametrize("form", [fused, sorted_])
@pytest.mark.parametrize("name", SPECS)
def test_both_forms_are_the_published_loop(
    name: str, form: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ffn, "pick_form", lambda *a: form)
    layer, x = layer_of(SPECS[name]), inputs(19)
    direction = inputs(19, seed=3)

    def with_gradients(y: Tensor, leaf: Tensor) -> list[Tensor]:
        grads = torch.autograd.grad((y * direction).sum(), [leaf, *layer.parameters()])
        return [y, *grads]

    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    routing = Routing()
    got = with_gradients(layer(a.unsqueeze(0), routing=routing)[0], a)
    y, chosen = as_published(layer, b)
    for mine, theirs in zip(got, with_gradients(y, b), strict=True):
        assert gap(mine, theirs) < 1e-5
    assert [sorted(row) for row in routing.experts[0][0].tolist()] == chosen
    with torch.no_grad():
        layer.down[chosen[0][0], 0] += 0.05
    assert gap(layer(x.unsqueeze(0))[0], y) > 1e-4


def test_selection_bias_selects_but_does_not_weigh() -> None:
    layer, x = layer_of(SPECS["v3"]), inputs(40)
    y, chosen = as_published(layer, x)
    plain, other = as_published(layer, x, use_bias=False)
    assert chosen != other and gap(plain, y) > 0.01
    same = [i for i in range(40) if chosen[i] == other[i]]
    assert same and gap(plain[same], y[same]) < 1e-6


@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
def test_forms_agree_when_experts_get_no_token(tokens: int) -> None:
    spec = MoE(experts=16, top_k=2, hidden=8)
    layer = layer_of(spec)
    chosen = torch.stack((torch.zeros(tokens, dtype=torch.long), torch.arange(tokens) % 3 + 5), 1)
    gates = torch.rand(tokens, 2, generator=torch.Generator().manual_seed(2))
    results = []
    for form in (fused, sorted_):
        leaves = [inputs(tokens).requires_grad_(), gates.clone().requires_grad_(), layer.gate_up, layer.down]
        y = form(leaves[0], chosen, *leaves[1:])
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert gap(a, b) < 1e-5
    assert gap(sorted_(inputs(tokens), chosen.flip(1), gates, layer.gate_up, layer.down), results[0][0]) > 0.01


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_filling_groups_up_changes_nothing(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CPU does in bf16: groups of whole multiples, whose idle rows touch no result and no gradient."""
    layer = layer_of(MoE(experts=16, top_k=3, hidden=8, selection_bias=False))
    chosen = torch.rand(tokens, 16, generator=torch.Generator().manual_seed(4)).topk(3).indices
    gates = torch.rand(tokens, 3, generator=torch.Generator().manual_seed(2))
    results = []
    for multiple in (1, 4, 16):
        monkeypatch.setattr(ffn, "GROUP_MULTIPLE", {("cpu", 4): multiple})
        leaves = [inputs(tokens).requires_grad_(), gates.clone().requires_grad_(), layer.gate_up, layer.down]
        y = sorted_(leaves[0], chosen, *leaves[1:])
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        pair, slot, ends = ffn._slots(chosen.flatten(), 16, multiple)
        assert torch.equal(pair[slot], torch.arange(3 * tokens)) and not (ends % multiple).any()
        assert ((torch.searchsorted(ends, slot.to(ends.dtype), right=True)) == chosen.flatten()).all()
    for filled in results[1:]:
        for a, b in zip(filled, results[0], strict=True):
            assert gap(a, b) < 1e-6


def test_the_form_follows_from_the_needless_work() -> None:
    """Tiny experts are fused for few tokens; large ones never; bf16 fuses more, its calls cost more."""
    tiny, large = MoE(experts=8, top_k=2, hidden=112), MoE(experts=32, top_k=4, hidden=256)
    assert pick_form(tiny, 128, 4, 4) is fused and pick_form(tiny, 128, 4096, 4) is sorted_
    assert pick_form(large, 512, 1, 4) is sorted_ and pick_form(large, 512, 1, 2) is sorted_
    assert pick_form(tiny, 128, 64, 2) is fused and pick_form(tiny, 128, 64, 4) is sorted_
    everyone = MoE(experts=4, top_k=4, hidden=4096)
    assert pick_form(everyone, 4096, 1000, 4) is fused  # all experts chosen: nothing is needless


# ------------------------------------------------------------------------------------- routing records
def padded(tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
    positions[0, 9:] = -1
    positions[1, :3], positions[1, 3:] = -1, torch.arange(tokens.shape[1] - 3)
    return positions


def test_records_count_real_tokens_only_and_leave_the_output_alone() -> None:
    model, tokens = noisy(spec_of("gqa/moe mla/grouped lightning/moe", mtp=1)), tokens_of(3, 14)
    positions, routing = padded(tokens), Routing()
    hidden = model(tokens, positions, routing=routing)
    assert torch.equal(hidden, model(tokens, positions))
    model.mtp_hidden(hidden, tokens, positions, routing)
    moes = [m.spec for m in model.modules() if isinstance(m, MoEFFN)]
    assert len(routing.experts) == len(routing.loads) == len(moes) == 4
    real = positions >= 0
    for spec, experts, load in zip(moes, routing.experts, routing.loads, strict=True):
        assert experts.shape == (3, 14, spec.top_k)
        assert torch.equal(load, torch.bincount(experts[real].flatten(), minlength=spec.experts).float())
        assert not torch.equal(load, torch.bincount(experts.flatten(), minlength=spec.experts).float())
    model.update_router_bias(routing.loads)  # one load a MoE layer, MTP's last


def test_replay_reproduces_the_outputs_and_carries_gradients() -> None:
    model, tokens = noisy(spec_of("gqa/moe lightning/grouped mla/moe")), tokens_of(2, 12)
    first = Routing()
    want = model(tokens, routing=first)
    with torch.no_grad():  # the biases move on, as they do between rollout and update
        for module in model.modules():
            if isinstance(module, MoEFFN) and module.spec.selection_bias:
                module.bias += torch.linspace(-1, 1, module.spec.experts)
    again = Routing(replay=first.experts)
    got = model(tokens, routing=again)
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(first.experts, again.experts, strict=True))
    assert gap(model(tokens), want) > 1e-3  # without replay other experts answer
    got.square().sum().backward()
    assert model.layers[0].ffn.router.grad.abs().max() > 0


def test_replay_follows_cached_steps() -> None:
    """Decode one token at a time, record, and replay the stack of records in one training forward."""
    model, tokens = noisy(spec_of("gqa/moe mla/moe")), tokens_of(2, 9)
    caches, outs, steps = model.new_caches(2, 9), [], []
    with torch.no_grad():
        for t in range(9):
            steps.append(Routing())
            outs.append(model(tokens[:, t : t + 1], torch.full((2, 1), t), caches, t + 1, steps[-1]))
    replay = [torch.cat([s.experts[i] for s in steps], 1) for i in range(2)]
    assert gap(model(tokens, routing=Routing(replay=replay)), torch.cat(outs, 1)) < 1e-5


def balance_as_published(layer: MoEFFN, x: Tensor, real: Tensor) -> Tensor:
    """V3 eq. 17-20 for each sequence on its own, mean over sequences."""
    s, losses = layer.spec, []
    for row, ok in zip(x, real, strict=True):
        kept = row[ok]
        f, p = torch.zeros(s.experts), torch.zeros(s.experts)
        for h, picked in zip(kept, as_published(layer, kept)[1], strict=True):
            logits = layer.router @ h
            score = logits.sigmoid() if s.score == "sigmoid" else logits.softmax(0)
            p = p + score / score.sum() / len(kept)
            f[picked] += s.experts / (s.top_k * len(kept))
        losses.append(s.balance * (f * p).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("name", ["v3", "v2-lite"])
def test_balance_loss_is_the_published_one_per_sequence(name: str) -> None:
    spec = SPECS[name].model_copy(update={"balance": 0.3})
    layer, x = layer_of(spec), inputs(3 * 11).view(3, 11, D)
    positions = torch.arange(11).repeat(3, 1)
    positions[1, 6:] = -1
    from trivet.model.layers import Layout

    routing = Routing()
    layer(x, Layout(positions, 3, 11, x.device), routing)
    want = balance_as_published(layer, x, positions >= 0)
    assert isinstance(routing.balance, Tensor) and gap(routing.balance, want) < 1e-5
    a, b = (torch.autograd.grad(loss, layer.router)[0] for loss in (routing.balance, want))
    assert gap(a, b) < 1e-5
    assert gap(balance_as_published(layer, x, positions >= -1), want) > 1e-4  # padding would count


def test_bias_rule_evens_out_a_skewed_stream() -> None:
    """Tokens share a direction, so a few experts get nearly all; the rule brings max/mean below 1.5."""
    spec = MoE(experts=8, top_k=2, hidden=8, bias_rate=0.01)
    layer, g = layer_of(spec), torch.Generator().manual_seed(7)
    with torch.no_grad():
        layer.bias.zero_()
    common = torch.randn(D, generator=g)

    def load() -> Tensor:
        routing = Routing()
        with torch.no_grad():
            layer(torch.randn(1, 256, D, generator=g) * 0.7 + common, routing=routing)
        return routing.loads[0]

    def skew(load: Tensor) -> float:
        return float(load.max() / load.mean())

    before = skew(load())
    for _ in range(150):
        layer.update_bias(load())
    after = skew(sum(load() for _ in range(4)))  # type: ignore[arg-type]
    assert before > 2.0 and after < 1.5, (before, after)
    step, old = load(), layer.bias.clone()
    layer.update_bias(step)
    for i in range(8):
        want = 0.01 if step[i] < step.mean() else -0.01 if step[i] > step.mean() else 0.0
        assert float(layer.bias[i] - old[i]) == pytest.approx(want, abs=1e-6)


def test_model_updates_each_layer_with_its_own_load() -> None:
    model = noisy(spec_of("gqa/moe*2"))
    biases = [layer.ffn.bias.clone() for layer in model.layers]
    loads = [torch.tensor([9.0, 0, 0, 0, 0, 0]), torch.tensor([0.0, 0, 0, 0, 0, 9])]
    model.update_router_bias(loads)
    for layer, old, hot in zip(model.layers, biases, (0, 5), strict=True):
        down = (layer.ffn.bias - old < 0).nonzero().flatten().tolist()
        assert down == [hot]
    with pytest.raises(ValueError):
        model.update_router_bias(loads[:1])


def test_experts_learn_only_from_their_tokens_and_padding_teaches_nobody() -> None:
    """The loss of a padded batch is that of its rows alone, for MoE layers too."""
    model, tokens = noisy(spec_of("gqa/moe mla/grouped")), tokens_of(3, 14)
    positions = padded(tokens)
    next_token_loss(model, tokens, positions).backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for row, at in zip(tokens, positions, strict=True):
        next_token_loss(model, row[at >= 0][None]).backward()
    assert max(gap(got[n], p.grad) for n, p in model.named_parameters()) < 2e-5


def test_a_moe_whose_experts_are_all_chosen_alike_is_a_dense_ffn() -> None:
    """E experts with equal gates 1/E and scale E are one SwiGLU of E times the width."""
    moe, hidden = MoE(experts=4, top_k=4, hidden=8, scale=4.0, selection_bias=False, score="softmax"), 32
    spec = ModelSpec(vocab_size=VOCAB, d_model=D, pattern="g/moe", mixers={"g": MIXERS["gqa"]},
                     ffns={"moe": moe, "dense": SwiGLU(hidden=hidden)})  # fmt: skip
    a, b = noisy(spec), Transformer(spec.model_copy(update={"pattern": "g/dense"}))
    state = {k: v for k, v in a.state_dict().items() if ".ffn." not in k}
    with torch.no_grad():
        a.layers[0].ffn.router.zero_()
    gate_up, down = a.layers[0].ffn.gate_up, a.layers[0].ffn.down
    state["layers.0.ffn.gate_up"] = gate_up.transpose(0, 1).reshape(2, hidden, D).detach()
    state["layers.0.ffn.down"] = down.reshape(hidden, D).T.detach()
    b.load_state_dict(state)
    tokens = tokens_of(2, 8)
    assert gap(a(tokens), b(tokens)) < 1e-5
    a.layers[0].ffn.spec = moe.model_copy(update={"scale": 3.9})
    assert gap(a(tokens), b(tokens)) > 1e-4


def test_routing_is_a_plain_record() -> None:
    assert [f.name for f in dataclasses.fields(Routing)] == ["replay", "own", "experts", "loads", "balance"]
    assert FFNS["moe"].kind == "moe" and Routing().balance == 0.0
