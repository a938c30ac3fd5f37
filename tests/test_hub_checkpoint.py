"""Checkpoints as transformers writes them: same logits, same decoding, same gradients, and back bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from test_hub_configs import CONFIGS, random_config
from test_model_zoo import gap
from trivet.config import UserError
from trivet.hub.checkpoint import DERIVED, dequantised, load_checkpoint, save_checkpoint
from trivet.hub.names import FAMILY_NAMES, slots
from trivet.model import Transformer

transformers = pytest.importorskip("transformers")
from peers import gradients, randomise  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*every dimension of a head is rotated")


def peer(family: str, seed: int, folder: Path) -> Any:
    """transformers' model with random weights, saved in several shards."""
    config = random_config(family, seed)
    torch.manual_seed(seed)  # some vectors are drawn there
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model, seed)
    model.save_pretrained(folder, max_shard_size="100KB")
    return model


def tokens_of(model: Transformer, rows: int, length: int) -> Tensor:
    return torch.randint(0, model.spec.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_decoding_and_gradients(family: str, seed: int, tmp_path: Path) -> None:
    theirs = peer(family, seed, tmp_path)
    ours = load_checkpoint(tmp_path)
    length = 90  # past the original length of the rotations that are extended
    tokens = tokens_of(ours, 2, length)
    want, hidden = theirs(tokens, use_cache=False).logits, ours(tokens)
    got = ours.logits(hidden)
    assert 0.05 < want.std() < 50
    assert gap(got, want) < 1e-4
    with torch.inference_mode():
        caches, pieces, at = ours.new_caches(2, length), [], 0
        for size in (60, 7, *[1] * (length - 67)):
            positions = torch.arange(at, at + size).expand(2, -1)
            pieces.append(ours(tokens[:, at : at + size], positions, caches, span=at + size))
            at += size
        # Theirs in chunks and theirs token by token are 4e-4 apart: a norm a head enlarges what is almost zero.
        assert gap(ours.logits(torch.cat(pieces, 1)), want) < (3e-4 if family == "qwen3_next" else 1e-4)
    for logits in (want, got):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    expected = gradients(theirs, ours)
    tolerance = {"qwen3_next": 1e-3, "deepseek_v2": 2e-4, "deepseek_v3": 2e-4}.get(family, 1e-4)
    for name, p in ours.named_parameters():
        assert p.grad is not None and gap(p.grad, expected[name]) < tolerance, name
    with torch.no_grad():
        ours.layers[-1].mixer.o_proj.weight *= 1.01  # type: ignore[union-attr]
    assert gap(ours.logits(ours(tokens)), want) > 2e-4  # the twin


@pytest.mark.parametrize("family", CONFIGS)
@torch.inference_mode()
def test_64_greedy_tokens_are_the_same(family: str, tmp_path: Path) -> None:
    """Both write with their caches; a near tie may be broken the other way, and then the texts go on differently."""
    theirs = peer(family, 0, tmp_path)
    ours = load_checkpoint(tmp_path)
    prompt = tokens_of(ours, 2, 9)
    sampling = {"do_sample": False, "max_new_tokens": 64, "min_new_tokens": 64, "eos_token_id": None, "pad_token_id": 0}
    want = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **sampling)
    caches, fed, out, near = ours.new_caches(2, 80), prompt, prompt, []
    while out.shape[1] < want.shape[1]:
        at = torch.arange(out.shape[1] - fed.shape[1], out.shape[1]).expand(2, -1)
        logits = ours.logits(ours(fed, at, caches, span=out.shape[1])[:, -1])
        best = logits.topk(2).values
        near.append((best[:, 0] - best[:, 1]) < 1e-3)
        fed = logits.argmax(-1, keepdim=True)
        out = torch.cat((out, fed), 1)
    for row in range(2):
        differ = (out[row] != want[row]).nonzero()
        assert not len(differ) or near[int(differ[0]) - 9][row]
    assert (out != want).float().mean() < 0.5 and (out.roll(1, 0) != want).any()  # the twin: another prompt's text


@pytest.mark.parametrize("family", CONFIGS)
def test_written_back_bit_for_bit_and_loaded_by_transformers(family: str, tmp_path: Path) -> None:
    theirs = peer(family, 0, tmp_path / "a")
    (tmp_path / "b").mkdir()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    ours = load_checkpoint(tmp_path / "a")
    save_checkpoint(ours, tmp_path / "b", config, shard_bytes=40_000)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    before, after = (everything(tmp_path / name) for name in "ab")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32).eval()
    tokens = tokens_of(ours, 1, 20)
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)


def everything(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint but those that follow from its config."""
    found = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    return {name: t for name, t in found.items() if not name.endswith(DERIVED)}


# ------------------------------------------------------------------------------------------ V3's extras
def v3(folder: Path) -> dict[str, Tensor]:
    """A DeepSeek-V3 checkpoint with its prediction module, which transformers does not write."""
    peer("deepseek_v3", 1, folder)
    config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    tensors = everything(folder)
    for file in folder.iterdir():
        file.unlink()
    (folder / "config.json").write_text(json.dumps(config))
    layers, d = config["num_hidden_layers"], config["hidden_size"]
    last, extra = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    g = torch.Generator().manual_seed(0)
    tensors |= {extra + n.removeprefix(last): t + 0.01 for n, t in tensors.items() if n.startswith(last)}
    tensors |= {
        extra + n: torch.randn(d, generator=g) for n in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")
    }
    tensors[extra + "eh_proj.weight"] = torch.randn(d, 2 * d, generator=g)
    tensors[extra + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    tensors[extra + "shared_head.head.weight"] = tensors[head].clone()
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_the_prediction_module_is_read(tmp_path: Path) -> None:
    tensors = v3(tmp_path)
    model = load_checkpoint(tmp_path)
    extra = f"model.layers.{len(model.spec.layers)}."
    assert torch.equal(model.mtp[0].eh_proj.weight, tensors[extra + "eh_proj.weight"])  # type: ignore[union-attr,arg-type]
    assert torch.equal(model.mtp[0].layer.ffn.bias, tensors[extra + "mlp.gate.e_score_correction_bias"])  # type: ignore[union-attr,arg-type]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    assert not load_checkpoint(tmp_path).mtp  # not asked for: left where it is
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({k: t for k, t in tensors.items() if not k.startswith(extra)}, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="counts a prediction module, but none is stored"):
        assert not load_checkpoint(tmp_path).mtp
    tensors[extra + "embed_tokens.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="should be a copy of 'model.embed_tokens.weight' and differs"):
        load_checkpoint(tmp_path)


def test_qwen3_nexts_prediction_module_is_read_where_it_is_stored(tmp_path: Path) -> None:
    """Its config has no word for it, and transformers drops it; made here of transformers' own layers."""
    theirs = peer("qwen3_next", 1, tmp_path)
    code = transformers.models.qwen3_next.modeling_qwen3_next
    config, tensors = theirs.config, everything(tmp_path)
    d, last = config.hidden_size, config.num_hidden_layers - 1
    assert config.layer_types[last] == "full_attention"
    layer = code.Qwen3NextDecoderLayer(config, last).eval()
    norms = [code.Qwen3NextRMSNorm(d, eps=config.rms_norm_eps) for _ in range(3)]
    fc = torch.nn.Linear(2 * d, d, bias=False)
    for seed, module in enumerate((layer, *norms, fc), 5):
        randomise(module, seed)
    names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm", "fc")
    extra = {f"mtp.{n}.weight": m.weight.detach() for n, m in zip(names, (*norms, fc), strict=True)}
    for name, t in layer.state_dict().items():  # experts are stored one by one
        part = name.rpartition(".")[2]
        if part == "gate_up_proj":
            for e, (gate, up) in enumerate(w.chunk(2) for w in t):
                extra[f"mtp.layers.0.mlp.experts.{e}.gate_proj.weight"] = gate.clone()
                extra[f"mtp.layers.0.mlp.experts.{e}.up_proj.weight"] = up.clone()
        elif part == "down_proj":
            extra |= {f"mtp.layers.0.mlp.experts.{e}.down_proj.weight": w.clone() for e, w in enumerate(t)}
        else:
            extra[f"mtp.layers.0.{name}"] = t
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors | extra, tmp_path / "model.safetensors")
    ours = load_checkpoint(tmp_path)
    assert ours.spec.mtp == 1
    tokens = tokens_of(ours, 2, 30)
    hidden = theirs.model(tokens, use_cache=False).last_hidden_state
    (got,) = ours.mtp_hidden(ours(tokens), tokens)

    def by_hand(order: int) -> Tensor:
        pair = [norms[0](theirs.model.embed_tokens(tokens[:, 1:])), norms[1](hidden[:, :-1])][::order]
        at = torch.arange(29)[None]
        rotation = theirs.model.rotary_emb(pair[0], at)
        mask = torch.full((29, 29), -1e30).triu(1)[None, None]
        return norms[2](layer(fc(torch.cat(pair, -1)), rotation, attention_mask=mask, position_ids=at))

    assert gap(got[:, :-1], by_hand(1)) < 1e-4
    assert gap(got[:, :-1], by_hand(-1)) > 0.1  # the twin: the embedding comes first
    (tmp_path / "back").mkdir()
    save_checkpoint(ours, tmp_path / "back", json.loads((tmp_path / "config.json").read_text()))
    back = everything(tmp_path / "back")
    assert back.keys() == (tensors | extra).keys()
    assert all(torch.equal(t, back[name]) for name, t in (tensors | extra).items())
    save_file(tensors | {k: t for k, t in extra.items() if k != "mtp.fc.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="lacks the tensor 'mtp.fc.weight'"):
        load_checkpoint(tmp_path)


def test_parts_of_a_joint_tensor_must_fit(tmp_path: Path) -> None:
    peer("qwen3_next", 0, tmp_path)
    tensors, name = everything(tmp_path), "model.layers.0.linear_attn.in_proj_qkvz.weight"
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors | {name: torch.cat((tensors[name], tensors[name]))}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="in_proj_qkvz.weight' has shape"):
        load_checkpoint(tmp_path)


def test_fp8_weights_are_dequantised_block_by_block(tmp_path: Path) -> None:
    tensors = v3(tmp_path)
    name = "model.layers.0.self_attn.o_proj.weight"
    weight = tensors[name]
    scale = torch.rand(2, 1, generator=torch.Generator().manual_seed(3)) + 0.5  # rows 0..127 and 128..143
    tensors[name] = (weight / 2).to(torch.float8_e4m3fn)
    tensors[name + "_scale_inv"] = scale
    save_file(tensors, tmp_path / "model.safetensors")
    got = load_checkpoint(tmp_path).layers[0].mixer.o_proj.weight  # type: ignore[union-attr]
    want = tensors[name].float() * torch.cat([scale[:1].expand(128, 1), scale[1:].expand(16, 1)])
    assert weight.shape[0] == 144 and torch.equal(got, want)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="its scale has shape"):
        dequantised(tensors[name], scale.T, name)
    del tensors[name + "_scale_inv"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="the scale of an FP8 weight"):
        load_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------------ what is wrong
def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    peer("qwen3", 0, tmp_path / "whole")
    whole = everything(tmp_path / "whole")
    name = "model.layers.0.self_attn.q_proj.weight"

    def saved(tensors: dict[str, Tensor]) -> Path:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copy(tmp_path / "whole" / "config.json", folder)
        save_file(tensors, folder / "model.safetensors")
        return folder

    load_checkpoint(saved(whole | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))  # harmless
    for tensors, says in (
        ({k: v for k, v in whole.items() if k != name}, f"lacks the tensor '{name}'"),
        (whole | {"model.extra": torch.ones(2)}, "'model.extra' has no place in a qwen3 model"),
        (whole | {name: whole[name][:-1].clone()}, f"'{name}' has shape"),
    ):
        with pytest.raises(UserError, match=says):
            load_checkpoint(saved(tensors))
    path = saved(whole) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged, cut short"):
        load_checkpoint(path.parent)
    path.unlink()
    (path.parent / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="is a pickle"):
        load_checkpoint(path.parent)
    next((tmp_path / "whole").glob("model-00002*")).unlink()
    with pytest.raises(UserError, match="is missing: the checkpoint's index names it"):
        load_checkpoint(tmp_path / "whole")


def test_what_a_user_must_know_is_said(tmp_path: Path) -> None:
    peer("minimax", 0, tmp_path)
    with pytest.warns(UserWarning, match="every dimension of a head is rotated"):
        load_checkpoint(tmp_path)


def test_a_type_can_be_asked_for_and_balancing_biases_stay_exact(tmp_path: Path) -> None:
    peer("deepseek_v3", 0, tmp_path)
    model = load_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert model.embed.dtype == torch.bfloat16
    sparse = model.layers[-1].ffn
    assert sparse.bias.dtype == torch.float32 and sparse.gate_up.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_minimax_in_the_original_spelling_rotates_half_of_a_head(tmp_path: Path) -> None:
    """The same tensors under M1's own config: equal where no position matters, different after."""
    theirs = peer("minimax", 0, tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    kinds = [int(kind == "full_attention") for kind in data["layer_types"]]
    keep = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok", "rms_norm_eps",
            "tie_word_embeddings", "max_position_embeddings")  # fmt: skip
    original = {k: data[k] for k in keep} | {
        "model_type": "minimax_m1", "attn_type_list": kinds, "rotary_dim": data["head_dim"] // 2, "rope_theta": 1e6,
        "postnorm": True, "shared_intermediate_size": 0, "layernorm_full_attention_alpha": 1.3,
        "layernorm_linear_attention_beta": 0.7,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(original))
    ours = load_checkpoint(tmp_path)
    tokens = tokens_of(ours, 1, 30)
    want, got = theirs(tokens, use_cache=False).logits, ours.logits(ours(tokens))
    assert gap(got[:, :1], want[:, :1]) < 1e-4 < 1e-2 < gap(got, want)


@pytest.mark.parametrize("family", CONFIGS)
def test_slots_cover_the_model_once(family: str) -> None:
    from test_hub_configs import as_file
    from trivet.hub import read_config

    spec = read_config(as_file(random_config(family, 2)), "config.json").spec
    with torch.device("meta"):
        state = Transformer(spec, seed=None).state_dict()
    places = [(slot.ours, slot.at) for slot in slots(spec, FAMILY_NAMES[family])]
    assert len(set(places)) == len(places)
    assert sum(state[ours][at].numel() for ours, at in places) == sum(t.numel() for t in state.values())
