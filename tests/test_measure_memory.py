"""What training holds, on paper and in fact: autograd's saved tensors to 1%, a process's peak to 10%."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from test_cli_verbs import call
from test_house import run_python
from test_model_zoo import FFNS, MIXERS, PATTERNS, D, noisy, spec_of, tokens_of
from trivet.config import UserError
from trivet.hub import known_model
from trivet.measure import activations, memory, trial
from trivet.measure.activations import BUSY, KEPT, Setting
from trivet.measure.memory import (
    MATRICES,
    forward_kept,
    serving_bytes,
    training_memory,
)
from trivet.measure.plan import Question, devices, find_training, price, training_devices, training_setting
from trivet.measure.trial import FREED, ask, scale_down
from trivet.measure.trial_run import STATUS
from trivet.model import Routing, Transformer, attention, delta, ffn, linear
from trivet.spec import FFN, GQA, MLA, GatedDeltaNet, Lightning, Mixer, ModelSpec, MoE, Rope, SwiGLU
from trivet.train import losses, optim
from trivet.train.offload import Where, make_optimizer
from trivet.train.optim import Optimizer, newton_schulz


# ------------------------------------------------------------------------------- autograd's own count
def kept(spec: ModelSpec, s: Setting) -> int:
    """Bytes of all storages that a forward pass saves for the backward pass, weights not counted."""
    model = noisy(spec)
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t
        return t

    tokens, at = tokens_of(s.rows, s.length), torch.arange(s.length).expand(s.rows, -1).contiguous()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=s.precision == "bf16"),
    ):
        hidden = model(tokens, at, routing=Routing(), recompute=s.recompute)
        model.mtp_hidden(hidden, tokens, at, Routing(), s.recompute)
    return sum(t.untyped_storage().nbytes() for start, t in found.items() if start not in weights)


@pytest.mark.parametrize("name", PATTERNS)
def test_activations_are_what_autograd_saves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffn, "NEEDLESS", {})  # experts sorted, as they are wherever a step is worth planning
    spec = spec_of(PATTERNS[name], mtp=1 if name in ("mla", "hybrid") else 0)
    for rows, length in ((3, 48), (2, 200)):
        for precision in ("fp32", "bf16"):
            s = Setting(rows=rows, length=length, precision=precision, cpu=True)  # type: ignore[arg-type]
            assert forward_kept(spec, s) == pytest.approx(kept(spec, s), rel=0.012)
            assert forward_kept(spec, s) != pytest.approx(1.03 * kept(spec, s), rel=0.012)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_centred_norms_keep_what_others_keep(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffn, "NEEDLESS", {})
    spec = spec_of(PATTERNS["next"]).model_copy(update={"centred_norms": True})
    s = Setting(rows=2, length=200, precision=precision, cpu=True)
    assert forward_kept(spec, s) == pytest.approx(kept(spec, s), rel=0.012)


@pytest.mark.parametrize("name", ["gqa", "mla_q", "lightning", "dual"])
def test_recomputed_layers_keep_their_streams(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffn, "NEEDLESS", {})
    spec = spec_of(PATTERNS[name])
    s = Setting(rows=2, length=200, precision="fp32", recompute=True, cpu=True)
    assert forward_kept(spec, s) == pytest.approx(kept(spec, s), rel=0.15)  # what chooses experts is kept apart
    assert forward_kept(spec, s) < forward_kept(spec, s.model_copy(update={"recompute": False})) / 5


@pytest.mark.parametrize("kind", KEPT)
def test_a_formula_that_forgets_a_tensor_is_noticed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: one activation as wide as the model too few, in one layer of four, is more than 1%."""
    spec, s = (
        spec_of("gqa/dense mla/moe lightning/dense delta/dense"),
        Setting(rows=3, length=48, precision="fp32", cpu=True),
    )
    right = KEPT[kind]
    monkeypatch.setitem(KEPT, kind, lambda part, d, s: right(part, d, s) - s.wide * 2 * d)
    monkeypatch.setattr(ffn, "NEEDLESS", {})
    assert forward_kept(spec, s) != pytest.approx(kept(spec, s), rel=0.008)


def test_every_mixer_and_ffn_has_its_rows() -> None:
    kinds = {get_args(c.model_fields["kind"].annotation)[0] for u in (Mixer, FFN) for c in get_args(get_args(u)[0])}
    assert set(KEPT) == set(MATRICES) == set(BUSY) == set(trial.WIDTHS) == kinds


def test_matrices_are_what_the_spec_counts() -> None:
    for mixer in MIXERS.values():
        assert sum(m.numbers for m in MATRICES[mixer.kind](mixer, D)) == mixer.matmul_params(D)
    for part in FFNS.values():
        assert sum(m.numbers for m in MATRICES[part.kind](part, D)) == part.matrix_params(D)


@pytest.mark.parametrize("name", ["hybrid", "gated", "mla_q"])
def test_training_state_is_what_the_optimizer_holds(name: str) -> None:
    spec = spec_of(PATTERNS[name], mtp=1, tied=False)
    model = Transformer(spec)
    optimizer = Optimizer(model.optimizer_groups())
    said = training_memory(spec, Setting(length=16))
    assert said.weights == said.gradients == sum(p.nbytes for p in model.parameters())
    assert said.optimizer == sum(t.nbytes for t in optimizer.state_dict().values()) - 8  # the count of steps


@pytest.mark.parametrize("where", ["optimizer", "gradients"])
def test_host_memory_is_what_an_offloaded_optimizer_holds(where: Any) -> None:
    spec = spec_of(PATTERNS["hybrid"], mtp=1, tied=False)
    optimizer = make_optimizer(where, Transformer(spec).optimizer_groups(), 0.02, 3e-3, 0.0)
    held = sum(2 * p.nbytes for p in optimizer.parameters())  # copies and their gradients
    said = training_memory(spec, Setting(length=16, offload=where))
    assert said.host == held + sum(t.nbytes for t in optimizer.state_dict().values()) - 8
    assert said.optimizer == 0 and said.gradients == (said.weights if where == "optimizer" else 0)


def test_what_is_offloaded_is_not_on_the_device() -> None:
    """Of a model whose layers are small beside all of it, and whose rows are short."""
    spec, s = published("deepseek-v3"), Setting(rows=1, length=512, recompute=True, accumulate=2)
    none, optimizer, gradients = (
        training_memory(spec, s.model_copy(update={"offload": where})) for where in ("none", "optimizer", "gradients")
    )
    assert none.host == 0 and optimizer.host == gradients.host == none.weights + none.gradients + none.optimizer
    assert none.peak > none.weights + none.gradients + none.optimizer
    assert optimizer.weights + optimizer.gradients < optimizer.peak < none.peak - 0.9 * none.optimizer
    assert gradients.weights < gradients.peak < 1.1 * gradients.weights
    assert (
        max(optimizer.moments) == optimizer.moments.backward > optimizer.moments.update
    )  # gradients have left by then


# ------------------------------------------------------------------------------------------ by process
MODELS = {
    "dense": ("gqa/dense*4", {}),
    "mla_moe": ("mla/dense mla/moe*2", {"mtp": 1, "tie_embeddings": False}),
    "lightning": ("lightning/dense*2 gqa/dense", {}),
    "next": ("delta/dense*2 gate/dense", {"centred_norms": True}),
}


def trial_spec(name: str) -> ModelSpec:
    pattern, more = MODELS[name]
    return ModelSpec(
        vocab_size=8192, d_model=256, pattern=pattern, **more,  # type: ignore[arg-type]
        mixers={"gqa": GQA(heads=4, kv_heads=2, head_dim=64, rope=Rope(dims=64), qk_norm=True),
                "mla": MLA(heads=4, kv_rank=96, q_rank=128, nope_dim=48, v_dim=64, rope=Rope(dims=32)),
                "lightning": Lightning(heads=4, head_dim=64),
                "gate": GQA(heads=4, kv_heads=2, head_dim=64, rope=Rope(dims=16), qk_norm=True, out_gate=True),
                "delta": GatedDeltaNet(heads=4, key_heads=2, key_dim=64, value_dim=64)},
        ffns={"dense": SwiGLU(hidden=768), "moe": MoE(experts=16, top_k=4, hidden=192, shared_hidden=192)},
    )  # fmt: skip


TRIALS: list[tuple[str, dict[str, Any]]] = [
    ("dense", {}),
    ("dense", {"precision": "bf16", "rows": 6}),
    ("mla_moe", {}),
    ("mla_moe", {"recompute": True}),
    ("mla_moe", {"rows": 1, "length": 256}),  # where the update is the peak
    ("next", {"precision": "bf16"}),
    ("lightning", {}),
    ("lightning", {"recompute": True, "accumulate": 2}),
    ("mla_moe", {"rows": 1, "length": 256, "offload": "gradients"}),  # on a CPU the same memory, once more
    ("lightning", {"recompute": True, "accumulate": 2, "offload": "optimizer"}),
]
process = pytest.mark.skipif(not STATUS.is_file(), reason="a process's own peak is Linux's to say")


@process
@pytest.mark.parametrize(("name", "more"), TRIALS)
def test_a_training_step_takes_what_was_predicted(name: str, more: dict[str, Any]) -> None:
    spec, s = trial_spec(name), Setting(**{"rows": 4, "length": 512, "precision": "fp32", "cpu": True, **more})
    said, measured = training_memory(spec, s), ask("train", spec, s, "cpu", FREED, 1)["bytes"]
    assert said.peak == pytest.approx(measured, rel=0.1)
    state = said.weights + said.gradients + said.optimizer  # the twin: what most planners stop at
    assert state < measured / 1.4


@process
@pytest.mark.parametrize(("name", "precision"), [*((name, "fp32") for name in MODELS), ("dense", "bf16")])
def test_serving_takes_what_was_predicted(name: str, precision: Any) -> None:
    spec, s = trial_spec(name), Setting(rows=8, length=1024, precision=precision, cpu=True)
    measured = ask("serve", spec, s, "cpu", FREED, 1)["bytes"]
    assert serving_bytes(spec, s) == pytest.approx(measured, rel=0.1)
    assert s.wide * spec.num_params() < measured / 2  # the twin: weights alone


# ----------------------------------------------------------------------------------------------- shards
def published(name: str) -> ModelSpec:
    model = known_model(name)
    assert model is not None
    return model.spec


def test_fsdp_divides_everything_and_ep_the_experts() -> None:
    spec, s = published("deepseek-v3"), Setting(recompute=True)
    experts = 4 * 59 * 256 * 3 * 7168 * 2048  # bytes; 58 layers and the prediction module's
    one, eight = (training_memory(spec, s.model_copy(update={"shards": n})) for n in (1, 8))
    both = training_memory(spec, s.model_copy(update={"shards": 8, "expert_shards": 16}))
    for part in ("weights", "gradients"):
        whole = getattr(one, part)
        assert whole == pytest.approx(4 * spec.num_params(), rel=1e-6)  # but for the routers' biases
        assert getattr(eight, part) == pytest.approx(whole / 8)
        assert getattr(both, part) == pytest.approx((whole - experts + experts / 16) / 8)
    assert both.optimizer < eight.optimizer / 10 and both.activations == eight.activations == one.activations
    # a layer that is gathered: two layers' weights and one layer's gradient
    assert eight.moments.backward > eight.weights + eight.optimizer + 12 * 256 * 3 * 7168 * 2048
    assert both.moments.backward < eight.moments.backward / 2


def test_where_training_fits() -> None:
    spec, ask_ = published("qwen3-8b"), Question()
    s = training_setting(ask_)
    need = training_devices(spec, devices()["h100"], ask_, s)
    assert need is not None and need > 1
    half = s.model_copy(update={"shards": need // 2})
    whole = s.model_copy(update={"shards": need})
    assert training_memory(spec, whole).peak <= 0.9 * 80e9 < training_memory(spec, half).peak
    assert training_devices(spec, devices()["h100"], Question(shards=need // 2), s) is None
    assert training_devices(spec, devices()["cpu"], ask_, s) is None
    many = Question(rows=64, length=32_768)
    assert training_devices(spec, devices()["h100"], many, training_setting(many)) is None  # activations alone


def test_a_run_says_how_it_trains_and_the_command_line_more() -> None:
    run = {"rows": 8, "length": 512, "steps": 10, "recompute": True}
    assert training_setting(Question(), run) == Setting(rows=8, length=512, precision="fp32", recompute=True)
    assert training_setting(Question(), run | {"shards": 0}) == training_setting(Question(), run)
    divided = training_setting(Question(), run | {"shards": 2, "expert_shards": 2, "accumulate": 6})
    assert (divided.rows, divided.accumulate, divided.shards) == (4, 3, 2)  # of the run's 6 x 8 rows each has 12
    asked = Question(rows=2, precision="bf16", recompute=False)
    assert training_setting(asked, run) == Setting(rows=2, length=512)
    assert training_setting(Question(context=999)) == Setting(length=999)


def test_a_wrong_step_in_a_run_is_a_sentence(tmp_path: Path) -> None:
    run = tmp_path / "mine.toml"
    text = Path("configs/gsm8k.toml").read_text()
    run.write_text(text)
    assert find_training(str(run)) == {"rows": 8, "length": 512}
    run.write_text(text.replace("rows = 8", "rows = 0"))
    with pytest.raises(UserError, match=r"mine.toml \[train\].*rows"):
        find_training(str(run))
    assert find_training("qwen3-8b") is None


@pytest.mark.parametrize(
    ("name", "shards", "says"),
    [("qwen3-8b", 2, "qwen3-8b: --expert-shards 2 needs experts"),
     ("deepseek-v3", 7, "does not divide 256 experts; take one of 2, 4, 8")],
)  # fmt: skip
def test_impossible_shards_are_a_sentence(name: str, shards: int, says: str) -> None:
    model = known_model(name)
    assert model is not None
    with pytest.raises(UserError, match=says):
        price(name, model, Question(expert_shards=shards))


# ------------------------------------------------------------------------------------------- measuring
LAPTOP = {"flops": 3e11, "update_flops": 3e11, "bytes_per_second": 2e10, "memory": 16e9, "cuda": False}


def test_what_is_too_large_is_scaled_down_and_said() -> None:
    s = Setting(rows=2, length=4096, precision="fp32", cpu=True)
    for name, kinds in (("deepseek-v3", 2), ("minimax-m1-80k", 2), ("qwen3-next-80b-a3b", 2), ("qwen3-8b", 1)):
        small, setting, changes = scale_down(published(name), s, LAPTOP)
        assert training_memory(small, setting).peak <= 8e9
        assert len(small.layers) == kinds  # one of each kind stays
        assert changes[0] == f"layers {len(published(name).layers)} → {kinds}"
        assert small.layers[0].mixer.kind == published(name).layers[0].mixer.kind
    dense, short = trial_spec("dense"), Setting(rows=2, length=512, precision="fp32", cpu=True)
    assert scale_down(dense, short, LAPTOP) == (dense, short, [])
    less = scale_down(dense, short, LAPTOP | {"flops": 2e9})  # no patience for all of it
    assert less[2] and less[2][0].startswith("layers 4 → ")
    with pytest.raises(UserError, match="more than half of the 0.001 GB"):
        scale_down(dense, short, LAPTOP | {"memory": 1e6})


def scripted(what: str, spec: ModelSpec, s: Setting, device: str, allocator: dict[str, str], n: int) -> Any:
    """A machine on which every measurement is a round number."""
    size = 2e9 if allocator == trial.KEPT else 1e9
    return {"machine": LAPTOP, "train": {"train": 3.0, "bytes": size},
            "serve": {"prefill": 2.0, "decode": 1.0, "bytes": 5e8}}[what]  # fmt: skip


def test_what_is_not_predicted_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "ask", scripted)
    for name, precision, notes in (
        ("mla_moe", "bf16", [trial.COMPILED]),
        ("mla_moe", "fp32", []),
        ("dense", "bf16", []),
    ):
        assert trial.try_out(name, trial_spec(name), Setting(length=64, precision=precision))["notes"] == notes


@pytest.mark.parametrize("as_json", [True, False])
def test_predicted_stands_beside_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    monkeypatch.setattr(trial, "ask", scripted)
    code, out, _ = call(monkeypatch, capsys, "plan", "configs/gsm8k.toml", "--measure", *["--json"] * as_json)
    assert code == 0
    if not as_json:
        assert (
            "predicted" in out
            and "The whole model" in out
            and "8 × 512, fp32" in out
            and "keeps what it freed: 2 GB" in out
        )
        return
    (row,) = json.loads(out)
    assert row["memory"]["training step"]["measured"] == 1e9 and row["kept_bytes"] == 2e9
    for pair in (*row["memory"].values(), *row["seconds"].values()):
        assert pair["ratio"] == pytest.approx(pair["measured"] / pair["predicted"]) and pair["predicted"] > 0
    assert (
        row["seconds"]["train"]["predicted"]
        > row["seconds"]["prefill"]["predicted"]
        > row["seconds"]["decode"]["predicted"]
    )


def test_a_trial_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(monkeypatch, capsys, "plan", "configs/gsm8k.toml", "--measure", "--device", "nowhere")
    assert code == 1 and "the machine trial on 'nowhere' failed" in err
    code, _, err = call(monkeypatch, capsys, "plan", "qwen3-8b", "--measure", "--hardware", "h100")
    assert code == 1 and "this machine alone" in err


def test_a_plan_of_training_loads_no_torch() -> None:
    out = run_python("""
        import sys
        from trivet.cli import main
        sys.argv = ["trivet", "plan", "deepseek-v3", "--hardware", "h100", "--shards", "64", "--expert-shards", "8"]
        try:
            main()
        except SystemExit as e:
            assert e.code in (0, None), e.code
        print("loads torch:", "torch" in sys.modules)
    """)
    assert "at its peak" in out and "devices to train on" in out.replace("\n", " ") and out.endswith("torch: False\n")


def test_what_is_copied_from_rooms_with_torch_is_still_true() -> None:
    assert (activations.CHUNK, activations.DELTA_CHUNK, memory.LOGITS) == (linear.CHUNK, delta.CHUNK, losses.CHUNK)
    assert (activations.MOST_SCORES, activations.LONGEST) == (attention.MOST_SCORES, attention.LONGEST[torch.bfloat16])
    assert activations.GROUP == ffn.GROUP_MULTIPLE[("cpu", 2)]
    assert memory.STACK == optim.STACK
    assert get_args(Setting.model_fields["offload"].annotation) == get_args(Where)
    assert inspect.signature(newton_schulz).parameters["steps"].default == trial.NEWTON_SCHULZ
