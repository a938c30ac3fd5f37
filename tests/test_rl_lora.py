"""RL of adapters: it learns, its base stays, and the base is the reference of the KL term without a second copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from test_rl_learner import CHAT, Digits, config, make
from trivet.disk import Journal
from trivet.model import Transformer
from trivet.model.lora import Size, adapter_parameters, attach, merge, places
from trivet.rl.learner import TIMES, learn
from trivet.rl.reference import Reference


def adapted(pattern: str = "gqa/dense", noise: float = 0.3) -> Transformer:
    model = make(pattern, noise=noise)
    attach(model, dict.fromkeys(places(model), Size(4, 8, False)))
    return model


def move(model: Transformer, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter_parameters(model).values():
            p += 0.1 * torch.randn(p.shape, generator=g)


def test_it_learns_and_the_base_stays(tmp_path: Path) -> None:
    logged: list[dict[str, Any]] = []
    model, base = adapted("gqa/dense", 0.5), make("gqa/dense", noise=0.5)
    learning = config(steps=24, problems=8, group=8, adam_lr=0.03, objective="grpo")
    learn(model, CHAT, [(Digits(), 1.0)], learning, tmp_path, progress=logged.append)
    rewards = [line["reward"] for line in logged]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2, rewards
    assert all(line["ratio/max_abs_log"] == 0 and line["mismatch/max_abs_log"] < 1e-4 for line in logged)
    assert logged[0]["kl"] == 0 < logged[-1]["kl"]
    assert all(torch.equal(model.state_dict()[name], t) for name, t in base.state_dict().items())


def test_the_reference_is_the_start_and_no_copy() -> None:
    """Also where the adapter had learned before; a whole model's reference is a frozen copy as ever."""
    model = adapted("lightning/moe mla/dense gqa/dense")
    move(model, 1)
    tokens = torch.arange(40).view(2, 20) % CHAT.vocab_size
    start = model(tokens).detach()
    reference = Reference(model)
    assert reference.model is model and sum(t.numel() for t in reference.adapters.values()) < 5000
    move(model, 2)
    here = model(tokens)  # with a graph, through which no later pass may reach
    assert torch.equal(reference(tokens), start) and torch.equal(reference(tokens, recompute=True), start)
    assert (here - start).abs().max() > 1e-3  # the twin: the adapters of now are another policy
    here.square().sum().backward()
    expected = {n: p.grad.clone() for n, p in adapter_parameters(model).items() if p.grad is not None}
    model.zero_grad()
    model(tokens).square().sum().backward()
    assert len(expected) == len(adapter_parameters(model))
    assert all(torch.equal(p.grad, expected[n]) for n, p in adapter_parameters(model).items() if p.grad is not None)
    merge(model)
    whole = Reference(model)
    before = model(tokens).detach()
    with torch.no_grad():
        model.norm.weight += 0.5
    assert whole.model is not model and torch.equal(whole(tokens), before) and not torch.equal(model(tokens), before)


def test_a_stopped_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    learning = config(steps=5, objective="grpo", epochs=2, adam_lr=0.01, save_every_seconds=0)

    class Stopped(Exception):
        pass

    def stop(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 4:  # before it is saved
            raise Stopped

    def end(name: str) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        last = max((tmp_path / name / "resume").iterdir())
        lines = [
            {k: v for k, v in m.items() if k not in TIMES} for m in Journal(tmp_path / name / "metrics.jsonl").read()
        ]
        return load_file(last / "model.safetensors") | load_file(last / "optimizer.safetensors"), lines

    start = adapted("mla/dense gqa/dense")
    move(start, 3)
    factors = {n: p.detach().clone() for n, p in adapter_parameters(start).items()}
    for name, shows in (("straight", None), ("stopped", stop), ("stopped", None)):
        model = adapted("mla/dense gqa/dense")
        model.load_state_dict(factors, strict=False)
        if shows:
            with pytest.raises(Stopped):
                learn(model, CHAT, [(Digits(), 1.0)], learning, tmp_path / name, progress=shows)
        else:
            learn(model, CHAT, [(Digits(), 1.0)], learning, tmp_path / name)
    (straight, lines), (stopped, again) = end("straight"), end("stopped")
    assert straight.keys() == stopped.keys() and all(torch.equal(t, stopped[n]) for n, t in straight.items())
    assert lines == again and [line["step"] for line in lines] == [1, 2, 3, 4, 5] and lines[-1]["kl"] > 0
    learn(
        adapted("mla/dense gqa/dense"), CHAT, [(Digits(), 1.0)], learning, tmp_path / "other"
    )  # the twin: another start
    assert end("other")[1] != lines
