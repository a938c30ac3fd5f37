"""LoRA in our model: W + scale B A in every form of every mixer, a frozen base, and what it costs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from test_model_zoo import PATTERNS, gap, noisy, spec_of, tokens_of
from test_train_trainer import CONFIG, Counting, busy_model
from trivet.config import UserError
from trivet.model import Transformer, mla
from trivet.model.lora import (
    Place,
    Size,
    adapter_parameters,
    adapters,
    attach,
    fingerprint,
    merge,
    places,
    training_flops_per_token,
)
from trivet.model.prefill import prefill
from trivet.spec import with_yarn
from trivet.train.trainer import train


def adapted(model: Transformer, size: Size, seed: int = 4) -> Transformer:
    """An adapter in every place, with no factor left at zero."""
    attach(model, dict.fromkeys(places(model), size), seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter_parameters(model).values():
            p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    return model


def by_hand(model: Transformer, adapted: Transformer, scale: float) -> Transformer:
    """The base with every weight replaced by W + scale B A, read off the factors' names."""
    factors = adapter_parameters(adapted)
    parts = {"gate": ("gate_up", 0), "up": ("gate_up", 1), "down": ("down", ())}
    with torch.no_grad():
        for name in [n for n in factors if n.endswith(".a")]:
            path, leaf = name.removesuffix(".a").split(".lora")
            weight, at = parts[leaf[1:]] if leaf else ("weight", ())
            model.get_parameter(f"{path}.{weight}")[at] += scale * factors[name[:-1] + "b"] @ factors[name]  # type: ignore[index]
    return model


def decoded(model: Transformer, tokens: Tensor, first: int) -> Tensor:
    """Logits by way of caches: `first` tokens at once, then one by one (absorbed MLA, recurrent lightning)."""
    rows, length = tokens.shape
    caches, pieces, at = model.new_caches(rows, length), [], 0
    for size in (first, *[1] * (length - first)):
        positions = torch.arange(at, at + size).expand(rows, -1)
        pieces.append(model(tokens[:, at : at + size], positions, caches, span=at + size))
        at += size
    return model.logits(torch.cat(pieces, 1))


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_every_form_computes_the_sum_of_both_matrices(pattern: str, rslora: bool) -> None:
    spec = spec_of(pattern)
    model = adapted(noisy(spec), Size(3, 2.0, rslora))
    same = by_hand(noisy(spec), model, 2 / (math.sqrt(3) if rslora else 3))
    other = by_hand(noisy(spec), model, 2 / (3 if rslora else math.sqrt(3)))
    tokens = torch.randint(0, spec.vocab_size, (2, 14), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want = same.logits(same(tokens))
        assert gap(model.logits(model(tokens)), want) < 2e-5
        assert gap(decoded(model, tokens, 9), want) < 2e-5
        assert gap(other.logits(other(tokens)), want) > 1e-3  # the twin: the other scale
    merge(model)
    assert all(torch.allclose(t, same.state_dict()[n], atol=1e-6) for n, t in model.state_dict().items())


@torch.no_grad()
def test_a_prompt_in_pieces_a_few_heads_at_a_time_is_adapted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla, "EXPANDED", 500)
    spec = spec_of("mla/dense mla_q/dense delta/dense out_gate/dense")
    model, plain, tokens = adapted(noisy(spec), Size(3, 2.0, False)), noisy(spec), tokens_of(2, 23)
    want = model(tokens)[:, -1]
    assert gap(prefill(model, tokens, model.new_caches(2, 23), 7).hidden, want) < 1e-5
    assert gap(prefill(plain, tokens, plain.new_caches(2, 23), 7).hidden, want) > 1e-2  # the twin: no adapters


@torch.no_grad()
def test_adapters_go_along_when_a_model_is_stretched() -> None:
    spec = spec_of("mla/dense gqa/moe")
    model, tokens = adapted(noisy(spec), Size(3, 2.0, False)), tokens_of(2, 23)
    longer, _ = with_yarn(spec, 2)
    merged = adapted(noisy(spec), Size(3, 2.0, False))
    merge(merged)
    want = merged.with_spec(longer)(tokens)
    assert gap(model.with_spec(longer)(tokens), want) < 2e-5 < 1e-2 < gap(model(tokens), want)


def test_a_new_adapter_changes_nothing_and_follows_its_seed() -> None:
    spec = spec_of("mla/dense gqa/moe")
    plain, model, other = noisy(spec), noisy(spec), noisy(spec)
    size: dict[Place, Size] = dict.fromkeys(places(model), Size(4, 8, False))
    attach(model, size, seed=1)
    attach(other, size, seed=2)
    tokens = torch.arange(10)[None]
    assert (
        gap(model(tokens), plain(tokens))
        < 1e-6
        < 1e-3
        < gap(adapted(noisy(spec), Size(4, 8, False))(tokens), plain(tokens))
    )
    a, b = (adapter_parameters(m)["layers.0.mixer.q_proj.0.lora.a"] for m in (model, other))
    assert not torch.equal(a, b) and a.abs().max() <= spec.d_model**-0.5 and a.std() > 0.5 * spec.d_model**-0.5
    assert model.state_dict().keys() - plain.state_dict().keys() == adapter_parameters(model).keys()


def test_only_adapters_learn_and_only_they_are_stored(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config = CONFIG.model_copy(update={"steps": 40, "adam_lr": 0.02, "save_every_seconds": 0})
    model, base = busy_model(), busy_model()
    attach(model, dict.fromkeys(places(model), Size(4, 8, False)))
    groups = model.optimizer_groups()
    assert not groups["matrices"] and groups["others"].keys() == adapter_parameters(model).keys()
    losses: list[float] = []
    train(model, Counting(), config, tmp_path, progress=lambda m: losses.append(m["loss"]))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
    assert all(torch.equal(model.state_dict()[name], t) for name, t in base.state_dict().items())  # router biases, too
    assert all(adapter.b.abs().max() > 0 for adapter in adapters(model).values())
    stored = load_file(max((tmp_path / "resume").iterdir()) / "model.safetensors")
    assert stored.keys() == adapter_parameters(model).keys() | {
        n for n, _ in model.named_buffers() if "slopes" not in n
    }
    full = busy_model()  # the twin: the same run without adapters moves everything
    train(full, Counting(), config.model_copy(update={"steps": 2}), tmp_path / "full")
    moved = {n for n, t in base.state_dict().items() if not torch.equal(full.state_dict()[n], t)}
    assert "embed" in moved and any(n.endswith("ffn.bias") for n in moved)


def test_a_state_belongs_to_its_base(tmp_path: Path) -> None:
    def run(change: float, steps: int = 2) -> None:
        model = busy_model()
        with torch.no_grad():
            model.embed += change
        attach(model, dict.fromkeys(places(model), Size(2, 4, False)))
        train(model, Counting(), CONFIG.model_copy(update={"steps": steps}), tmp_path)

    run(0)
    run(0)  # complete: nothing to do
    with pytest.raises(UserError, match=r"made with base = '\w+', now it is"):
        run(0.1)
    with pytest.raises(UserError, match="made with base = .*now it is 'not there'"):  # without an adapter
        train(busy_model(), Counting(), CONFIG.model_copy(update={"steps": 2}), tmp_path)


def test_a_fingerprint_is_of_the_base_and_survives_rounding() -> None:
    model = busy_model()
    before = fingerprint(model)
    attach(model, dict.fromkeys(places(model), Size(2, 4, False)))
    assert fingerprint(model) == before == fingerprint(busy_model().bfloat16())
    with torch.no_grad():
        model.layers[1].mixer.o_proj.weight[0] += 0.01  # type: ignore[union-attr,operator,index]
    assert fingerprint(model) != before


def test_the_count_of_flops_is_torchs() -> None:
    spec = spec_of("mha/dense*4", tied=False)
    counts, ours = [], []
    for rank in (0, 8):
        model = noisy(spec)
        if rank:
            attach(model, dict.fromkeys(places(model), Size(rank, 8, False)))
        tokens = torch.zeros(1, 32, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model.logits(model(tokens)).sum().backward()
        counts.append(counter.get_total_flops() / 32)
        ours.append(training_flops_per_token(model, 32))
    assert ours[0] == spec.training_flops_per_token(32) and ours[1] != ours[0]
    # Nothing before the first layer learns, so its q, k and v need no gradient of what they read. We count it.
    first = sum(
        2 * spec.d_model * (len(p.weight) + 8) for p in (model.get_submodule(f"layers.0.mixer.{n}_proj") for n in "qkv")
    )
    assert counts[0] - counts[1] == ours[0] - ours[1] + first
