"""LoRA against peft on transformers' models: same logits and gradients, read and written; what isn't computed is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from test_hub_checkpoint import peer, tokens_of
from test_hub_configs import CONFIGS
from test_model_zoo import gap
from trivet.config import UserError
from trivet.hub.adapter import PREFIX, WEIGHTS, choose, modules, save_adapter
from trivet.hub.base import CONFIG, family_of
from trivet.hub.checkpoint import load_any, load_checkpoint
from trivet.model import Transformer
from trivet.model.lora import LoRA, adapter_parameters, adapters, attach, merge

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*every dimension of a head is rotated")


def fill(model: torch.nn.Module, mark: str, seed: int = 5) -> None:
    """Numbers in every factor, B included, which starts at zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if mark in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.15)


def ours_on(base: Path, lora: LoRA | None = None) -> Transformer:
    model = load_checkpoint(base)
    attach(model, choose(model, family_of(base), lora or LoRA(rank=3, alpha=5)))
    fill(model, ".lora.")
    return model


def peft_adapter(family: str, folder: Path, **settings: Any) -> Any:
    """A peft model with random factors on transformers' model in folder/base; the adapter is in folder/adapter."""
    theirs = peer(family, 0, folder / "base")
    theirs.name_or_path = str(folder / "base")
    targets = sorted(
        {m.rpartition(".")[2] for m in modules(load_checkpoint(folder / "base"), family_of(folder / "base"))}
    )
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": targets} | settings)
    model = peft.get_peft_model(theirs, config).eval()
    fill(model, "lora_")
    model.save_pretrained(folder / "adapter")
    return model


@pytest.mark.parametrize("family", CONFIGS)
def test_an_adapter_of_peft_is_read(family: str, tmp_path: Path) -> None:
    theirs = peft_adapter(family, tmp_path)
    plain, ours = load_checkpoint(tmp_path / "base"), load_any(tmp_path / "adapter")
    tokens = tokens_of(ours, 2, 40)
    want, got = theirs(input_ids=tokens, use_cache=False).logits, ours.logits(ours(tokens))
    assert gap(got, want) < 1e-4 < 1e-2 < gap(plain.logits(plain(tokens)), want)  # the twin: without its adapter
    with torch.inference_mode():
        caches, pieces, at = ours.new_caches(2, 40), [], 0
        for size in (30, *[1] * 10):  # MLA absorbed, lightning recurrent
            positions = torch.arange(at, at + size).expand(2, -1)
            pieces.append(ours(tokens[:, at : at + size], positions, caches, span=at + size))
            at += size
        assert gap(ours.logits(torch.cat(pieces, 1)), want) < 1e-4
    for logits in (want, got):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert {n for n, p in ours.named_parameters() if p.grad is not None} == set(adapter_parameters(ours))
    expected = {
        name.removeprefix(PREFIX).replace(".default", ""): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    mine, held = {}, adapters(ours)
    for module, parts in modules(ours, family_of(tmp_path / "base")).items():
        here = [held[slot.ours, slot.at] for slot in parts]  # where they are several, all read the same A
        mine[f"{module}.lora_A.weight"] = torch.stack([adapter.a.grad for adapter in here]).sum(0)  # type: ignore[misc]
        mine[f"{module}.lora_B.weight"] = torch.cat([adapter.b.grad for adapter in here])  # type: ignore[misc]
    assert mine.keys() == expected.keys()
    for name, gradient in mine.items():
        assert 0 < float(gradient.norm()) == pytest.approx(float(expected[name].norm()), rel=1e-3), name


@pytest.mark.parametrize(
    "settings", [LoRA(rank=3, alpha=5), LoRA(rank=4, alpha=6, rslora=True)], ids=["plain", "rslora"]
)
@pytest.mark.parametrize("family", CONFIGS)
def test_an_adapter_of_ours_is_loaded_by_peft(family: str, settings: LoRA, tmp_path: Path, recwarn: Any) -> None:
    theirs = peer(family, 0, tmp_path / "base")
    ours = ours_on(tmp_path / "base", settings)
    (tmp_path / "adapter").mkdir()
    save_adapter(ours, tmp_path / "adapter", tmp_path / "base", family_of(tmp_path / "base"))
    tokens = tokens_of(ours, 2, 40)
    plain = theirs(tokens, use_cache=False).logits
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert not [w for w in recwarn if "missing" in str(w.message).lower()]
    want, got = adapted(input_ids=tokens, use_cache=False).logits, ours.logits(ours(tokens))
    assert gap(got, want) < 1e-4 < 1e-2 < gap(plain, want)
    again = load_any(tmp_path / "adapter")
    assert all(torch.equal(p, adapter_parameters(ours)[n]) for n, p in adapter_parameters(again).items())
    assert adapter_parameters(again).keys() == adapter_parameters(ours).keys()
    with torch.no_grad():
        next(iter(adapter_parameters(again).values())).mul_(1.05)
    assert gap(again.logits(again(tokens)), want) > 2e-4  # the twin


@pytest.mark.parametrize("family", CONFIGS)
def test_merging_changes_nothing_but_the_weights(family: str, tmp_path: Path) -> None:
    peer(family, 0, tmp_path / "base")
    model, plain = ours_on(tmp_path / "base"), load_checkpoint(tmp_path / "base")
    tokens = tokens_of(model, 2, 30)
    want = model.logits(model(tokens))
    merge(model)
    assert gap(model.logits(model(tokens)), want) < 1e-4 < 1e-2 < gap(plain.logits(plain(tokens)), want)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())


def test_ranks_and_alphas_by_pattern_and_parts_of_the_layers(tmp_path: Path) -> None:
    theirs = peft_adapter(
        "llama", tmp_path, rank_pattern={"q_proj": 5, r"layers\.1\.mlp\.(up|down)_proj": 2},
        alpha_pattern={"v_proj": 9}, use_rslora=True, layers_to_transform=[1],
    )  # fmt: skip
    ours = load_any(tmp_path / "adapter")
    assert all(".1." in name for name in adapter_parameters(ours))
    tokens = tokens_of(ours, 2, 20)
    want = theirs(input_ids=tokens, use_cache=False).logits
    assert gap(ours.logits(ours(tokens)), want) < 1e-4
    path = tmp_path / "adapter" / CONFIG
    config = json.loads(path.read_text())
    config |= {"target_modules": r".*\.1\..*_proj", "layers_to_transform": None}  # a regular expression says the same
    path.write_text(json.dumps(config))
    assert gap(load_any(path.parent).logits(load_any(path.parent)(tokens)), want) < 1e-4
    path.write_text(json.dumps(config | {"target_modules": r".*_proj"}))
    with pytest.raises(UserError, match="targets 'model.layers.0.self_attn.q_proj' but lacks"):
        load_any(path.parent)
    path.write_text(json.dumps(config | {"alpha_pattern": {}}))
    ours = load_any(tmp_path / "adapter")
    assert gap(ours.logits(ours(tokens)), want) > 1e-3  # the twin


def test_targets_are_the_familys_names(tmp_path: Path) -> None:
    peer("deepseek_v3", 1, tmp_path / "base")
    model, there = load_checkpoint(tmp_path / "base"), family_of(tmp_path / "base")
    chosen = choose(model, there, LoRA(targets=("kv_a_proj_with_mqa", "layers.0.self_attn.o_proj")))
    assert {name.split(".", 2)[2] for name, _ in chosen} == {"mixer.kv_down.weight", "mixer.o_proj.weight"}
    assert sum("o_proj" in name for name, _ in chosen) == 1
    attach(model, chosen)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", tmp_path / "base", there)
    targets = json.loads((tmp_path / "adapter" / CONFIG).read_text())["target_modules"]
    assert "model.layers.0.self_attn.o_proj" in targets and "o_proj" not in targets  # not those of other layers
    with pytest.raises(
        UserError, match=r"no projection of this model is called 'k_proj'; there are .*kv_b_proj.*Routed experts"
    ):
        choose(model, there, LoRA(targets=("k_proj",)))


def test_matrices_that_are_stored_as_one_are_adapted_as_one(tmp_path: Path) -> None:
    """Qwen3-Next's in_proj_qkvz and in_proj_ba, and q_proj with its gate: four and twice two of ours."""
    peer("qwen3_next", 0, tmp_path / "base")
    model, there = load_checkpoint(tmp_path / "base"), family_of(tmp_path / "base")
    chosen = choose(model, there, LoRA(rank=3, targets=("in_proj_qkvz", "in_proj_ba", "q_proj")))
    assert Counter(name.split(".")[3] for name, _ in chosen if ".0." in name) == dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "gate", "beta_proj", "decay_proj"), 1
    )
    attach(model, chosen)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", tmp_path / "base", there)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    ranks = {name.split(".")[-3]: len(t) for name, t in tensors.items() if "lora_A" in name}
    assert ranks == {"in_proj_qkvz": 12, "in_proj_ba": 6, "q_proj": 6}
    name = f"{PREFIX}model.layers.0.linear_attn.in_proj_qkvz.lora_B.weight"
    save_file(tensors | {name: tensors[name][:-2]}, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(UserError, match=r"in_proj_qkvz' has shapes .*; this base and a rank of 12 need"):
        load_any(tmp_path / "adapter")
    conv = f"{PREFIX}model.layers.0.linear_attn.conv1d.lora_A.weight"
    save_file(tensors | {conv: torch.ones(3, 5)}, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(UserError, match="conv1d.lora_A.weight' adapts nothing that can be adapted"):
        load_any(tmp_path / "adapter")


# ------------------------------------------------------------------------------------------ what is wrong
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_dora": True}, "use_dora = true would change the maths"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \[\"lm_head\"\]"),
        ({"bias": "all"}, 'bias = "all"'),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"a_key_of_tomorrow": 3}, "a_key_of_tomorrow"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": "many"}, "'r' should be a number"),
        ({"r": 4}, "has shapes"),
        ({"base_model_name_or_path": "some/where"}, "write the path of that model into base_model_name_or_path"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    peft_adapter("qwen3", tmp_path)
    path = tmp_path / "adapter" / CONFIG
    load_any(tmp_path / "adapter")  # the twin
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=says):
        load_any(tmp_path / "adapter")


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    peft_adapter("qwen3", tmp_path)
    path = tmp_path / "adapter" / WEIGHTS
    whole = load_file(path)
    name = f"{PREFIX}model.layers.1.mlp.up_proj.lora_A.weight"
    lacking = {k: t for k, t in whole.items() if k != name}
    for tensors, says in (
        (lacking, "targets 'model.layers.1.mlp.up_proj' but lacks"),
        (
            whole | {PREFIX + "lm_head.lora_A.weight": torch.ones(2, 2)},
            r"'base_model.model.lm_head.lora_A.weight' adapts nothing",
        ),
        (whole | {name.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(2)}, "adapts nothing"),
    ):
        save_file(tensors, path)
        with pytest.raises(UserError, match=says):
            load_any(tmp_path / "adapter")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="damaged"):
        load_any(tmp_path / "adapter")
    path.unlink()
    with pytest.raises(UserError, match="no adapter_model.safetensors"):
        load_any(tmp_path / "adapter")


def test_an_adapter_knows_its_weights(tmp_path: Path) -> None:
    peer("llama", 0, tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    save_adapter(ours_on(tmp_path / "base"), tmp_path / "adapter", tmp_path / "base", family_of(tmp_path / "base"))
    load_any(tmp_path / "adapter", dtype=torch.bfloat16)  # the same weights, rounded
    shutil.rmtree(tmp_path / "base")
    peer("llama", 0, tmp_path / "base")
    for file in (tmp_path / "base").glob("*.safetensors"):
        save_file({name: t + 0.01 for name, t in load_file(file).items()}, file)
    with pytest.raises(UserError, match="was trained on other weights than"):
        load_any(tmp_path / "adapter")
