"""A part of a checkpoint: the tensors of the whole, read from their shards alone, and transformers agrees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from test_hub_checkpoint import everything, peer, tokens_of, v3
from test_hub_configs import CONFIGS
from test_model_zoo import gap, spec_of
from trivet.config import UserError
from trivet.hub import known_model, read_config, read_config_file
from trivet.hub.checkpoint import DERIVED, load_checkpoint
from trivet.hub.part import cut, parse_numbers
from trivet.hub.write import rewrite_config
from trivet.model import Transformer, save_model
from trivet.recipes.export import export
from trivet.spec import Lightning, MoE

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*every dimension of a head is rotated"),
    pytest.mark.filterwarnings("ignore:.*decays by depth"),
]


def sparse(family: str) -> bool:
    return family not in ("llama", "qwen2", "qwen3")


@pytest.mark.parametrize("family", CONFIGS)
def test_a_part_is_written_and_loaded_by_transformers(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer(family, 1, tmp_path / "whole")
    depth = len(read_config_file(tmp_path / "whole" / "config.json").spec.layers)
    kept = [0, depth - 1] if depth > 2 else [depth - 1]
    experts = {"deepseek_v2": "0:4,6:8", "deepseek_v3": "2:6"}.get(family, "0:3,4")
    text = ",".join(f"{i}:{i + 1}" for i in kept)
    export(tmp_path / "whole", tmp_path / "part", layers=text, experts=experts if sparse(family) else None)
    assert f"{family}, {len(kept)} layer" in capsys.readouterr().out
    ours = load_checkpoint(tmp_path / "part")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "part", output_loading_info=True, dtype=torch.float32
    )
    assert all(name.endswith(DERIVED) for names in info.values() for name in names), info  # tables are made again
    tokens = tokens_of(ours, 2, 40)
    assert gap(ours.logits(ours(tokens)), theirs.eval()(tokens, use_cache=False).logits) < 1e-4
    before, after = everything(tmp_path / "whole"), everything(tmp_path / "part")
    old, new = (f"model.layers.{i}.input_layernorm.weight" for i in (depth - 1, len(kept) - 1))
    assert torch.equal(before[old], after[new]) and len(after) < len(before)
    with torch.no_grad():
        theirs.get_output_embeddings().weight *= 1.01
    assert gap(ours.logits(ours(tokens)), theirs(tokens, use_cache=False).logits) > 1e-4  # the twin


def test_a_part_is_the_whole_where_nothing_is_left_out(tmp_path: Path) -> None:
    """All layers but the last: its input is what the whole gives it. And a router's rows are the experts'."""
    peer("qwen3_moe", 1, tmp_path)
    whole = load_checkpoint(tmp_path)
    depth = len(whole.spec.layers)
    part = load_checkpoint(tmp_path, layers=depth - 1)
    assert len(part.layers) == depth - 1
    for a, b in zip(part.layers, whole.layers, strict=False):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    some = load_checkpoint(tmp_path, experts=[1, 3, 4])
    a, b = some.layers[0].ffn.state_dict(), whole.layers[0].ffn.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(a[name], b[name][[1, 3, 4]]) for name in a)
    assert not torch.equal(a["router"], b["router"][[1, 3, 5]])  # the twin


def test_shards_that_a_part_does_not_need_may_be_absent(tmp_path: Path) -> None:
    peer("qwen3", 0, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    last = len(read_config_file(tmp_path / "config.json").spec.layers) - 1
    needed = {file for name, file in index.items() if not name.startswith("model.layers.") or ".layers.0." in name}
    assert len(needed) < len(set(index.values())) and last > 0
    for file in set(index.values()) - needed:
        (tmp_path / file).unlink()
    assert len(load_checkpoint(tmp_path, layers=1).layers) == 1
    with pytest.raises(UserError, match="is missing: the checkpoint's index names it"):
        load_checkpoint(tmp_path)


def test_v3_loses_its_prediction_module_with_its_layers(tmp_path: Path) -> None:
    v3(tmp_path / "whole")
    assert load_checkpoint(tmp_path / "whole", experts=4).mtp
    export(tmp_path / "whole", tmp_path / "part", layers="1")
    config = json.loads((tmp_path / "part" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0 and config["num_hidden_layers"] == 1
    assert not load_checkpoint(tmp_path / "part").mtp


def test_real_models_are_cut_on_paper() -> None:
    """V3's first layers are dense, M1's are linear; the parts keep what their config needs to say."""
    v3_model, m1 = known_model("deepseek-v3"), known_model("minimax-m1-80k")
    assert v3_model is not None and m1 is not None
    spec, part = cut(v3_model.spec, 4, 64, "v3")
    moe = spec.layers[3].ffn
    assert spec.pattern == "mla/dense*3 mla/moe" and spec.mtp == 0 and part.experts == tuple(range(64))
    assert isinstance(moe, MoE) and (moe.groups, moe.top_groups, moe.experts) == (2, 2, 64)
    spec, part = cut(m1.spec, [6, 7, 8], None, "m1")
    assert [isinstance(layer.mixer, Lightning) for layer in spec.layers] == [True, False, True]
    assert part.layers == (6, 7, 8) and part.experts is None


@pytest.mark.parametrize("name", ["qwen3-next-80b-a3b", "minimax-m2", "minimax-m1-80k", "deepseek-v3", "qwen3-30b-a3b"])
def test_published_configs_say_their_parts(name: str) -> None:
    """As they are published: Qwen3-Next's has no list of its layers' kinds until one is needed."""
    described = known_model(name)
    assert described is not None
    before, config = described.spec, dict(described.config)
    for layers in (4, [2, 3, 4], [7]):
        after, _ = cut(before, layers, 32, name)
        written = rewrite_config(config, before, after)
        assert read_config(written, name).spec.layers == after.layers
        assert read_config(written | {"num_experts_per_tok": 1}, name).spec.layers != after.layers  # the twin
        changed = {key for key in written if written[key] != config.get(key)}
        if name == "qwen3-next-80b-a3b":  # its first layers follow the same rule
            assert changed == {"num_hidden_layers", "num_experts"} | ({"layer_types"} if layers != 4 else set())


@pytest.mark.parametrize(
    ("layers", "experts", "says"),
    [
        ([0, 9], None, r"layers: \[0, 9\] asked for; there are 0 to 1"),
        (0, None, "layers: .* asked for"),
        (None, [8], r"experts: \[8\] asked for; there are 0 to 7"),
        (None, 3, r"are \[2, 1, 0, 0\] of the 4 groups; each group that is kept needs equally many"),
        (None, 2, "a token chooses 3 experts in 1 of 1 groups; 2 are too few"),
    ],
)
def test_parts_that_are_no_model_are_refused(layers: object, experts: object, says: str) -> None:
    spec = spec_of("gqa/grouped*2").model_copy(update={"ffns": {"grouped": spec_of("gqa/grouped").ffns["grouped"]}})
    cut(spec, 1, 4, "here")
    with pytest.raises(UserError, match=says):
        cut(spec, layers, experts, "here")  # type: ignore[arg-type]


def test_numbers_as_a_person_writes_them() -> None:
    assert parse_numbers("4", "--layers") == 4
    assert parse_numbers("0:4", "--layers") == [0, 1, 2, 3] and parse_numbers("0:2,7", "--layers") == [0, 1, 7]
    for text in ("", "a", "0:", ":4", "1,,2", "-1"):
        with pytest.raises(UserError, match="--layers .* should read N"):
            parse_numbers(text, "--layers")


def test_a_part_of_an_adapter_is_refused(tmp_path: Path) -> None:
    from trivet.hub.checkpoint import load_any

    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="export this adapter merged, then a part of it"):
        load_any(tmp_path, layers=1)


def test_a_model_of_our_own_has_no_parts(tmp_path: Path) -> None:
    from trivet.hub.checkpoint import load_any

    save_model(Transformer(spec_of("gqa/dense*2")), tmp_path)
    with pytest.raises(UserError, match="parts are taken of a family's checkpoint; export this model first"):
        load_any(tmp_path, layers=1)
