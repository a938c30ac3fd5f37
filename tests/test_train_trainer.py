"""The training loop: what a step's gradient is, what is logged, and how a run stops."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from test_model_zoo import noisy
from trivet.config import UserError
from trivet.disk import Journal
from trivet.model import Transformer
from trivet.spec import GQA, MLA, GatedDeltaNet, Lightning, ModelSpec, MoE, Rope, SwiGLU
from trivet.train.data import Batch, Document, lay_out, stable_hash
from trivet.train.loop import Interrupted
from trivet.train.step import backward
from trivet.train.trainer import TrainConfig, measure_peak, train

SPEC = ModelSpec(
    vocab_size=23,
    d_model=16,
    pattern="mla/moe*2",
    mixers={"mla": MLA(heads=2, kv_rank=8, nope_dim=4, v_dim=8, rope=Rope(dims=4))},
    ffns={"moe": MoE(experts=4, top_k=2, hidden=8, shared_hidden=8)},
    mtp=1,
)
CONFIG = TrainConfig(steps=6, rows=2, length=24, accumulate=2, tensorboard=False, save_every_seconds=1e9)


class Counting:
    """Short and long documents: count up from a random start; the first two tokens are given."""

    def __getitem__(self, index: int) -> Document:
        rng = random.Random(stable_hash(3, index))
        n, start = rng.choice([3, 4, 14]), rng.randrange(23)
        return Document([(start + i) % 23 for i in range(n)], [False, False] + [True] * (n - 2))


def busy_model() -> Transformer:
    """A new model is its embedding; give every weight a part in the output."""
    model = Transformer(SPEC, seed=1)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    return model


def step_gradients(batches: Sequence[Batch], step: Callable[..., Any] = backward) -> dict[str, torch.Tensor]:
    model = busy_model()
    step(model, batches, 0.3)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def cuts() -> list[list[Batch]]:
    """The same 24 documents, cut into rows and microbatches in four ways."""
    documents = [Counting()[i] for i in range(24)]

    def cut(size: int, a_row: int, length: int) -> list[Batch]:
        parts = [documents[i : i + size] for i in range(0, 24, size)]
        return [lay_out([p[i : i + a_row] for i in range(0, size, a_row)], length) for p in parts]

    return [cut(24, 1, 14), cut(24, 8, 120), cut(12, 3, 40), cut(1, 1, 14)]


def check_cut(step: Callable[..., Any]) -> None:
    first, *others = [step_gradients(batches, step) for batches in cuts()]
    assert len(first) == len(list(busy_model().parameters()))
    for other in others:
        for name, grad in first.items():
            torch.testing.assert_close(other[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_gradients_do_not_depend_on_how_documents_are_cut() -> None:
    """The prototype took a mean per batch: answers of 3 tokens then weighed as much as traces of 80."""
    check_cut(backward)


def test_a_mean_per_microbatch_is_noticed() -> None:
    def mean(model: Transformer, batches: Sequence[Batch], mtp_weight: float) -> None:
        for batch in batches:
            backward(model, [batch], mtp_weight / len(batches))
        for p in model.parameters():
            if p.grad is not None:
                p.grad /= len(batches)

    with pytest.raises(AssertionError):
        check_cut(mean)


def test_a_leak_between_packed_documents_is_noticed() -> None:
    def leaking(model: Transformer, batches: Sequence[Batch], mtp_weight: float) -> None:
        for_row = [torch.where(b.positions >= 0, torch.arange(b.tokens.shape[1]), -1) for b in batches]
        backward(model, [replace(b, positions=p) for b, p in zip(batches, for_row, strict=True)], mtp_weight)

    with pytest.raises(AssertionError):
        check_cut(leaking)


def test_loss_is_the_mean_over_target_tokens() -> None:
    batches = cuts()[2]
    model = busy_model()
    nll, ahead = [], []
    for batch in batches:
        hidden = model(batch.tokens, batch.positions)
        further = model.mtp_hidden(hidden, batch.tokens, batch.positions)[0]
        logp = model.logits(hidden).log_softmax(-1)
        logp_ahead = model.logits(further).log_softmax(-1)
        for b, t in (batch.targets != -100).nonzero().tolist():
            target = int(batch.targets[b, t])
            nll.append(-logp[b, t, target].item())
            if t and batch.positions[b, t] > 0:  # this target is also two ahead of the place before
                ahead.append(-logp_ahead[b, t - 1, target].item())
    sums = backward(model, batches, 0.3)
    assert sums.loss.item() == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert sums.mtp.item() == pytest.approx(sum(ahead) / len(ahead), rel=1e-5)
    filled = sum(b.filled for b in batches)
    assert [load.sum().item() for load in sums.loads] == [2 * filled] * 3  # top 2; two layers and the MTP module


def test_it_learns_and_says_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure_peak("cpu") > 0.1  # a machine that others use gives another figure every time
    monkeypatch.setattr("trivet.train.trainer.measure_peak", lambda device, precision: 50.0)
    config = CONFIG.model_copy(update={"steps": 60, "eval_every": 25, "log_every": 10})
    shown: list[dict[str, Any]] = []
    model = Transformer(SPEC, seed=1)
    first = model.layers[0].ffn.bias.clone()  # type: ignore[union-attr,operator]
    summary = train(
        model,
        Counting(),
        config,
        tmp_path,
        progress=shown.append,
        evaluate=lambda m: {"training": float(m.training), "norm": m.norm.weight.norm().item()},
    )
    lines = Journal(tmp_path / "metrics.jsonl").read()
    assert lines == shown and lines[-1] == summary
    assert [line["step"] for line in lines] == [10, 20, 25, 30, 40, 50, 60]
    assert [line["step"] for line in lines if "eval/norm" in line] == [25, 50, 60]
    assert summary["eval/training"] == 0.0 and model.training
    assert summary["loss"] < 0.3 < lines[0]["loss"]  # counting up is learnt
    assert summary["mtp_loss"] < lines[0]["mtp_loss"]
    assert 1 <= summary["expert_load"] <= 4
    assert summary["targets"] < summary["tokens"] <= summary["slots"] == 60 * 2 * 2 * 24
    assert 0 < summary["mfu"] < 1 and summary["gflops"] == pytest.approx(summary["mfu"] * 50.0)
    assert not torch.equal(model.layers[0].ffn.bias, first)  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize("pattern", ["mla/moe*2", "lightning/moe gqa/dense", "delta/moe gqa/dense"])
def test_bf16_products_leave_weights_routers_and_losses_in_fp32(pattern: str) -> None:
    mixers = {**SPEC.mixers, "lightning": Lightning(heads=2, head_dim=8),
              "delta": GatedDeltaNet(heads=2, key_heads=1, key_dim=8, value_dim=8),
              "gqa": GQA(heads=2, kv_heads=1, head_dim=8, rope=Rope(dims=4), qk_norm=True)}  # fmt: skip
    ffns = {**SPEC.ffns, "dense": SwiGLU(hidden=24)}
    spec = SPEC.model_copy(update={"pattern": pattern, "mixers": mixers, "ffns": ffns})
    model, batch = noisy(spec, std=0.08), cuts()[1][0]
    grads, losses = [], []
    for precision in ("fp32", "bf16"):
        losses.append(backward(model, [batch], 0.3, precision).loss)
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    assert losses[1].dtype == torch.float32 and losses[0] != losses[1]  # the twin: it does something
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.02)
    assert grads[0].keys() == grads[1].keys()
    for name, g in grads[1].items():
        assert g.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(g.flatten(), grads[0][name].flatten(), dim=0) > 0.97, name
    x, ffn = torch.randn(3, 16), model.layers[0].ffn
    with torch.autocast("cpu", torch.bfloat16):
        scores = ffn._scores(x)  # type: ignore[union-attr,operator]
    assert torch.equal(scores, ffn._scores(x))  # type: ignore[union-attr,operator]


def weights(model: Transformer) -> list[torch.Tensor]:
    return [t.clone() for t in model.state_dict().values()]


def test_saving_logging_and_evaluating_change_nothing(tmp_path: Path) -> None:
    results = []
    for name, update in {"a": {}, "b": {"save_every_seconds": 0.0, "log_every": 2, "eval_every": 1}}.items():
        model = Transformer(SPEC, seed=1)
        train(
            model,
            Counting(),
            CONFIG.model_copy(update=update),
            tmp_path / name,
            evaluate=lambda m: {"x": torch.rand(1).item()},
        )
        results.append(weights(model))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    other = Transformer(SPEC, seed=1)
    train(other, Counting(), CONFIG.model_copy(update={"muon_lr": 0.021}), tmp_path / "c")
    assert not all(torch.equal(a, b) for a, b in zip(results[0], weights(other), strict=True))


def test_ctrl_c_saves_at_the_end_of_the_step(tmp_path: Path) -> None:
    def at_step_3(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in a shell's background
    straight, model = Transformer(SPEC, seed=1), Transformer(SPEC, seed=1)
    train(straight, Counting(), CONFIG, tmp_path / "a")
    with pytest.raises(Interrupted, match="step 3 of 6 is saved .* same command") as caught:
        train(model, Counting(), CONFIG, tmp_path / "b", progress=at_step_3)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    again = Transformer(SPEC, seed=99)  # what it starts with must not matter
    first = train(again, Counting(), CONFIG, tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(again), strict=True))
    assert train(Transformer(SPEC, seed=5), Counting(), CONFIG, tmp_path / "b") == first  # finished: nothing to do


def test_another_config_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    train(Transformer(SPEC), Counting(), CONFIG, tmp_path)
    with pytest.raises(UserError, match=r"train\.rows = 2, now it is 3"):
        train(Transformer(SPEC), Counting(), CONFIG.model_copy(update={"rows": 3}), tmp_path)
    train(Transformer(SPEC), Counting(), CONFIG.model_copy(update={"save_every_seconds": 3.0}), tmp_path)


def test_a_broken_run_stops_and_keeps_its_last_good_state(tmp_path: Path) -> None:
    class Poison(Counting):
        def __getitem__(self, index: int) -> Document:
            if index == 30:
                with torch.no_grad():
                    model.embed[0] = float("inf")
            return super().__getitem__(index)

    model = Transformer(SPEC)
    config = CONFIG.model_copy(update={"log_every": 3, "save_every_seconds": 0.0, "steps": 50})
    with pytest.raises(UserError, match="(not finite|Training broke).* step"):
        train(model, Poison(), config, tmp_path)
    states = sorted((tmp_path / "resume").iterdir())
    assert states
    for state in states:
        assert all(t.isfinite().all() for t in load_file(state / "model.safetensors").values())


def test_missing_tensorboard_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.warns(UserWarning, match="TensorBoard is not installed") as seen:
        train(Transformer(SPEC), Counting(), CONFIG.model_copy(update={"tensorboard": True}), tmp_path)
    assert len([w for w in seen if "TensorBoard" in str(w.message)]) == 1


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(Transformer(SPEC), Counting(), CONFIG.model_copy(update={"tensorboard": True}), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    seen = [(e.step, e.value) for e in events.Scalars("loss")]
    lines = Journal(tmp_path / "metrics.jsonl").read()
    assert [s for s, _ in seen] == [line["step"] for line in lines]
    assert [v for _, v in seen] == pytest.approx([line["loss"] for line in lines])
