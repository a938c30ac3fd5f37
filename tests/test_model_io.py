"""A model on disk comes back bit for bit; what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from test_model_zoo import PATTERNS, noisy, spec_of, tokens_of
from trivet.config import UserError
from trivet.model import load_model, save_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    model = noisy(spec_of(PATTERNS["hybrid"], mtp=1, tied=False)).to(dtype)
    save_model(model, tmp_path)
    back = load_model(tmp_path)
    assert back.spec == model.spec
    a, b = model.state_dict(), back.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    tokens = tokens_of(2, 9)
    assert torch.equal(back(tokens), model(tokens))
    other = load_model(tmp_path, dtype=torch.bfloat16 if dtype == torch.float32 else torch.float32)
    assert other.embed.dtype != dtype and not torch.equal(other(tokens).to(dtype), model(tokens))


def rewritten(path: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(path) | {k.replace("__", "."): v for k, v in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


def test_misfits_are_named(tmp_path: Path) -> None:
    model = noisy(spec_of("gqa/moe"))

    def loading(match: str) -> None:
        with pytest.raises(UserError, match=match):
            load_model(tmp_path)
        save_model(model, tmp_path)

    loading("no config.json")
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    rewritten(weights, norm__weight=None)
    loading(r"'norm.weight' is missing")
    rewritten(weights, stranger=torch.ones(2))
    loading(r"'stranger' is not part of the model")
    rewritten(weights, norm__weight=torch.ones(3))
    loading(r"'norm.weight' has shape \(3,\)")
    weights.write_bytes(weights.read_bytes()[:-9])
    loading("damaged")
    weights.unlink()
    loading("no model.safetensors")
    config.write_text("{")
    loading("not valid JSON")
    config.write_text(json.dumps({"model_type": "llama"}))
    loading("'llama'")
    load_model(tmp_path)
