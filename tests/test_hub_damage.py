"""What can be wrong with a checkpoint's files, and the sentence for each; the whole one loads before and after."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from test_hub_checkpoint import peer
from test_model_zoo import noisy, spec_of
from trivet.chat import tiny_chat
from trivet.config import UserError
from trivet.hub.checkpoint import INDEX, load_any, load_checkpoint, load_pair
from trivet.model import load_model, save_model

NAME = "model.layers.0.self_attn.q_proj.weight"
FIRST = "model-00001-of-"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "whole"
    peer("qwen3", 0, folder)
    return folder


def index_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def reindexed(folder: Path, **changes: object) -> None:
    index = {**index_of(folder), **{name.replace("__", "."): file for name, file in changes.items()}}
    (folder / INDEX).write_text(json.dumps({"weight_map": {k: v for k, v in index.items() if v is not None}}))


def shard_of(folder: Path, name: str = NAME) -> Path:
    return folder / index_of(folder)[name]


def stored_as(folder: Path, dtype: torch.dtype) -> None:
    tensors = load_file(shard_of(folder))
    save_file(tensors | {NAME: tensors[NAME].to(dtype)}, shard_of(folder))


def without(folder: Path) -> None:
    save_file({k: v for k, v in load_file(shard_of(folder)).items() if k != NAME}, shard_of(folder))


def beside(folder: Path) -> None:
    save_file(load_file(shard_of(folder)) | {"stranger": torch.ones(2)}, shard_of(folder))


def cut_short(folder: Path, left: int) -> None:
    shard_of(folder).write_bytes(shard_of(folder).read_bytes()[:left])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json can't be read: No such file"),
    "config cut short": (lambda f: (f / "config.json").write_text('{"model_type": "qwe'), "is not valid JSON"),
    "missing": (lambda f: reindexed(f, **{NAME.replace(".", "__"): None}), f"lacks the tensor '{NAME}'"),
    "unknown": (lambda f: reindexed(f, model__extra=FIRST), "'model.extra' has no place in a qwen3 model"),
    "scale of nothing": (lambda f: reindexed(f, x_scale_inv=FIRST), "'x_scale_inv' has no place in a qwen3 model"),
    "not where the index says": (without, f"lacks '{NAME}', which its index says is there"),
    "not in the index": (beside, "has 'stranger', which its index does not name"),
    "file missing": (lambda f: shard_of(f).unlink(), "is missing: the checkpoint's index names it"),
    "file elsewhere": (lambda f: reindexed(f, model__norm__weight="../x"), "in '../x', which is no file beside it"),
    "index cut short": (lambda f: (f / INDEX).write_text('{"weight_map": {'), "is damaged: it has no weight_map"),
    "index of something else": (lambda f: (f / INDEX).write_text("[1]"), "is damaged: it has no weight_map"),
    "empty": (lambda f: cut_short(f, 0), "is damaged, cut short, or not a safetensors file"),
    "header cut short": (lambda f: cut_short(f, 20), "is damaged, cut short, or not a safetensors file"),
    "tensors cut short": (lambda f: cut_short(f, -4), "is damaged, cut short, or not a safetensors file"),
    "an error page": (
        lambda f: shard_of(f).write_text("<!doctype html><html>404 Not Found</html>"),
        "is damaged, cut short, or not a safetensors file",
    ),
    "a pointer of git lfs": (
        lambda f: shard_of(f).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"),
        "is damaged, cut short, or not a safetensors file",
    ),
    "int8": (lambda f: stored_as(f, torch.int8), f"'{NAME}' is stored as int8, a quantised form"),
    "fp8 of another kind": (lambda f: stored_as(f, torch.float8_e5m2), "is stored as float8_e5m2, a quantised form"),
    "fp8 without scale": (lambda f: stored_as(f, torch.float8_e4m3fn), "the scale of an FP8 weight"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_one_sentence(what: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    load_checkpoint(folder)  # the twin
    damage, says = DAMAGE[what]
    damage(folder)
    with pytest.raises(UserError) as e:
        load_checkpoint(folder)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_names_are_checked_before_weights_are_read(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    for file in folder.glob("*.safetensors"):
        file.write_bytes(b"")
    reindexed(folder, model__extra=FIRST)
    with pytest.raises(UserError, match="has no place"):
        load_checkpoint(folder)


def test_a_missing_tokenizer_is_noticed_before_weights_are_read(whole: Path, tmp_path: Path) -> None:
    shutil.copy(whole / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        load_pair(tmp_path)
    tiny_chat().save(tmp_path)
    with pytest.raises(UserError, match=r"its tokenizer knows \d+ tokens, its model only \d+"):
        load_pair(tmp_path)
    with pytest.raises(UserError, match=r"has no model\.safetensors"):  # the twin: without a tokenizer to be wanted
        load_any(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [('{"model_type": "trivet"}', "vocab_size"), ("[]", "holds a list, not an object"), ("{", "not valid JSON")],
)
def test_a_model_of_our_own_says_what_is_wrong_with_its_config(text: str, says: str, tmp_path: Path) -> None:
    save_model(noisy(spec_of("gqa/dense")), tmp_path)
    load_model(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=says):
        load_model(tmp_path)
