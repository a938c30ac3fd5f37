"""Training states: exact, refused under another config, whole after a crash or a full disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from trivet.config import UserError
from trivet.model import io
from trivet.train.checkpoint import first_difference, load_latest, save_state
from trivet.train.optim import Optimizer

CONFIG: dict[str, Any] = {"train": {"steps": 10, "muon_lr": 0.02}, "spec": {"d_model": 8}}


def pair(seed: int) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(seed)
    first, second = nn.Linear(5, 3), nn.Linear(3, 2)
    model = nn.Sequential(first, second).to(torch.bfloat16)
    model.register_buffer("bias", torch.randn(4))  # fp32 beside bf16
    optimizer = Optimizer({"matrices": {"a": first.weight}, "others": {"b": second.bias}})
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return model, optimizer


def save(folder: Path, step: int, **extra: Any) -> None:
    save_state(folder, step, *pair(seed=step), CONFIG, extra)


def test_a_state_comes_back_exactly(tmp_path: Path) -> None:
    save(tmp_path, 7, document=123, loss=0.1 + 0.2)
    state = load_latest(tmp_path, CONFIG)
    assert state is not None
    assert (state.step, state.extra) == (7, {"document": 123, "loss": 0.1 + 0.2})
    model, optimizer = pair(seed=1)
    state.apply(model, optimizer)
    want_model, want_optimizer = pair(seed=7)
    for mine, want in ((model, want_model), (optimizer, want_optimizer)):
        for name, tensor in want.state_dict().items():
            assert mine.state_dict()[name].dtype == tensor.dtype
            assert torch.equal(mine.state_dict()[name], tensor), name
    assert optimizer.steps == 1


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    assert load_latest(tmp_path, CONFIG) is None
    for step in (9, 10, 100):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    state = load_latest(tmp_path, CONFIG)
    assert state is not None and state.step == 100


def test_a_half_written_state_is_ignored_and_removed(tmp_path: Path) -> None:
    save(tmp_path, 5)
    half = tmp_path / ".step-00000006.partial"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    state = load_latest(tmp_path, CONFIG)
    assert state is not None and state.step == 5
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_state_is_an_error_that_says_what_to_do(tmp_path: Path, name: str) -> None:
    save(tmp_path, 5)
    save(tmp_path, 6)
    file = tmp_path / "step-00000006" / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"step-00000006 is damaged .* to continue from step-00000005"):
        load_latest(tmp_path, CONFIG)


def test_another_config_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, 5)
    other = {"train": {"steps": 10, "muon_lr": 0.03}, "spec": {"d_model": 9}}
    with pytest.raises(UserError, match=r"made with train\.muon_lr = 0\.02, now it is 0\.03"):
        load_latest(tmp_path, other)
    with pytest.raises(UserError, match=r"spec\.d_model = 8, now it is 'not there'"):
        load_latest(tmp_path, {"train": CONFIG["train"], "spec": {}})


def test_a_setting_may_be_infinite(tmp_path: Path) -> None:
    """`clip = inf` means never: it must not be what a run dies of when it first saves."""
    model, optimizer = pair(0)
    save_state(tmp_path, 1, model, optimizer, {"clip": float("inf")}, {})
    state = load_latest(tmp_path, {"clip": float("inf")})
    assert state is not None and state.config == {"clip": float("inf")}
    with pytest.raises(UserError, match="clip"):
        load_latest(tmp_path, {"clip": 1.0})


def test_first_difference() -> None:
    a = {"x": {"y": [1, 2], "z": 1.5}, "w": None}
    assert first_difference(a, {"w": None, "x": {"z": 1.5, "y": [1, 2]}}) is None
    assert first_difference(a, {"x": {"y": [1, 3], "z": 2}, "w": None}) == ("x.y", "[1, 2]", "[1, 3]")
    assert first_difference(a, a | {"new": 1}) == ("new", "'not there'", "1")


def test_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 5)
    state = load_latest(tmp_path, CONFIG)
    assert state is not None
    model = nn.Linear(2, 2)
    with pytest.raises(UserError, match="does not belong to this model"):
        state.apply(model, Optimizer({"matrices": {}, "others": {}}))


def test_a_full_disk_keeps_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What safetensors raised on a full 1 MB tmpfs, at the second file of the state."""
    save(tmp_path, 5)
    real = io.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path, **options: object) -> None:
        if path.name == "optimizer.safetensors":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        real(tensors, path, **options)

    with monkeypatch.context() as m:
        m.setattr(io, "save_file", full)
        with pytest.raises(UserError, match="No space left on device.*MB are free.*resumes"):
            save(tmp_path, 6)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]
    state = load_latest(tmp_path, CONFIG)
    assert state is not None and state.step == 5
