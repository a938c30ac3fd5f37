"""`trivet export`: nothing that a checkpoint stores is lost on the way, and our own models speak transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from test_cli_verbs import call
from test_hub_checkpoint import peer, v3
from test_hub_configs import CONFIGS
from test_hub_write import NEXT
from test_model_zoo import gap
from trivet.chat import Chat, bpe_chat, tiny_chat
from trivet.chat.exported import tokenizer_files
from trivet.config import UserError
from trivet.hub import read_config_file
from trivet.hub.checkpoint import load_any, load_checkpoint, load_pair, save_checkpoint
from trivet.hub.write import write_config
from trivet.messages import Message, ToolCall, ToolSpec
from trivet.model import Transformer, save_model
from trivet.recipes.export import export
from trivet.spec import GQA, ModelSpec, Rope, SwiGLU

transformers = pytest.importorskip("transformers")
from peers import randomise  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*every dimension of a head is rotated"),
    pytest.mark.filterwarnings("ignore:.*weights are stored in fp8"),
]


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# --------------------------------------------------------------------------------- like a checkpoint
@pytest.mark.parametrize("family", CONFIGS)
def test_every_stored_tensor_comes_back(family: str, tmp_path: Path) -> None:
    """Tables that follow from the config (MiniMax stores its decays; we add a rotation) included."""
    peer(family, 0, tmp_path / "a")
    whole = stored(tmp_path / "a") | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.0)}
    for file in (tmp_path / "a").glob("model*"):
        file.unlink()
    if read_config_file(tmp_path / "a" / "config.json").spec.tie_embeddings:
        whole["lm_head.weight"] = whole["model.embed_tokens.weight"].clone()
    save_file(whole, tmp_path / "a" / "model.safetensors")
    export(tmp_path / "a", tmp_path / "b")
    assert same(stored(tmp_path / "a"), stored(tmp_path / "b"))
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert before == after


def test_second_copies_follow_the_model_and_the_rest_stays(tmp_path: Path) -> None:
    tensors = v3(tmp_path / "a")
    export(tmp_path / "a", tmp_path / "b")
    assert same(tensors, stored(tmp_path / "b"))
    model = load_checkpoint(tmp_path / "a")
    with torch.no_grad():
        model.embed.mul_(2.0)
    (tmp_path / "run").mkdir()
    save_model(model, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "c", like=tmp_path / "a")
    after = stored(tmp_path / "c")
    assert after.keys() == tensors.keys()
    copy = next(name for name in tensors if name.endswith("embed_tokens.weight") and ".layers." in name)
    assert torch.equal(after[copy], 2 * tensors[copy]) and not torch.equal(after[copy], tensors[copy])
    load_checkpoint(tmp_path / "c")


def test_a_module_that_the_config_does_not_count_is_kept(tmp_path: Path) -> None:
    tensors = v3(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    assert not load_checkpoint(tmp_path / "a").mtp
    export(tmp_path / "a", tmp_path / "b")
    assert same(tensors, stored(tmp_path / "b"))


def test_a_module_that_no_config_counts_goes_where_its_model_goes(tmp_path: Path) -> None:
    """Qwen3-Next's: its names are held against transformers' layers in test_hub_checkpoint."""
    model = Transformer(NEXT.model_copy(update={"mtp": 1}))
    randomise(model)
    for name in ("a", "run", "plain"):
        (tmp_path / name).mkdir()
    save_checkpoint(model, tmp_path / "a", write_config(model.spec))
    tensors = stored(tmp_path / "a")
    assert "mtp.layers.0.self_attn.q_proj.weight" in tensors
    export(tmp_path / "a", tmp_path / "b")
    assert same(tensors, stored(tmp_path / "b"))
    export(tmp_path / "a", tmp_path / "words", family="qwen3_next")
    assert same(tensors, stored(tmp_path / "words"))
    export(tmp_path / "a", tmp_path / "few", experts="0:3,4")
    few, tokens = load_checkpoint(tmp_path / "few"), torch.arange(40)[None]
    part = load_checkpoint(tmp_path / "a", experts=[0, 1, 2, 4])
    assert torch.equal(few.mtp_hidden(few(tokens), tokens)[0], part.mtp_hidden(part(tokens), tokens)[0])
    assert gap(few.mtp_hidden(few(tokens), tokens)[0], model.mtp_hidden(model(tokens), tokens)[0]) > 1e-3
    export(tmp_path / "a", tmp_path / "short", layers="1:3")
    assert not load_checkpoint(tmp_path / "short").mtp and "mtp.fc.weight" not in stored(tmp_path / "short")
    with torch.no_grad():
        model.mtp[0].eh_proj.weight.mul_(2.0)  # type: ignore[union-attr,operator]
    save_model(model, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "trained", like=tmp_path / "a")
    after = stored(tmp_path / "trained")
    assert torch.equal(after.pop("mtp.fc.weight"), 2 * tensors["mtp.fc.weight"])
    assert same(after, {name: tensors[name] for name in tensors if name != "mtp.fc.weight"})
    plain = Transformer(NEXT)  # trained without: what was stored would guess for another model
    save_model(plain, tmp_path / "plain")
    export(tmp_path / "plain", tmp_path / "without", like=tmp_path / "a")
    assert not load_checkpoint(tmp_path / "without").mtp


def test_fp8_is_written_as_what_was_computed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = v3(tmp_path / "a")
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors = {k: t if k.endswith("correction_bias") else t.bfloat16() for k, t in tensors.items()}
    tensors |= {name: tensors[name].to(torch.float8_e4m3fn), name + "_scale_inv": torch.full((2, 1), 0.5)}
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    path = tmp_path / "a" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    export(tmp_path / "a", tmp_path / "b")
    assert "in bfloat16, which was quantized" in capsys.readouterr().out
    after, config = stored(tmp_path / "b"), json.loads((tmp_path / "b" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert after.keys() == tensors.keys() - {name + "_scale_inv"}
    assert torch.equal(after[name], (tensors[name].float() / 2).bfloat16())
    ours, again = load_checkpoint(tmp_path / "a"), load_checkpoint(tmp_path / "b")
    assert all(torch.equal(x, y) for x, y in zip(ours.state_dict().values(), again.state_dict().values(), strict=True))


def test_another_shape_is_refused(tmp_path: Path) -> None:
    peer("qwen3", 0, tmp_path / "a")
    peer("qwen3", 1, tmp_path / "b")
    with pytest.raises(UserError, match=r"is no model of .*/b's shape: its vocab_size is \d+ and not \d+"):
        export(tmp_path / "a", tmp_path / "c", like=tmp_path / "b")
    with pytest.raises(UserError, match="leave --family out"):
        export(tmp_path / "a", tmp_path / "c", like=tmp_path / "b", family="qwen3")
    assert not (tmp_path / "c").exists()


# ------------------------------------------------------------------------------------ a model of ours
CALCULATOR = ToolSpec("calculator", "Computes.", {"type": "object", "properties": {"text": {"type": "string"}}})
TALK = [
    Message("system", "Be brief."),
    Message("user", "2+2=?"),
    Message("assistant", "", "I ask. ", (ToolCall("1", "calculator", {"text": "2+2"}),)),
    Message("tool", "4"),
    Message("assistant", "It is 4.", " So 4."),
    Message("user", "And 1+1=?"),
]


def in_their_words(messages: list[Message]) -> list[dict[str, Any]]:
    said = []
    for m in messages:
        view: dict[str, Any] = {"role": m.role, "content": m.content}
        if m.reasoning is not None:
            view["reasoning_content"] = m.reasoning
        if m.tool_calls:
            calls = [{"name": c.name, "arguments": dict(c.arguments)} for c in m.tool_calls]
            view["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        said.append(view)
    return said


def own(folder: Path, chat: Chat, **traits: Any) -> Transformer:
    gqa = GQA(heads=4, kv_heads=2, head_dim=8, rope=Rope(dims=8), qk_norm=True, **traits)
    spec = ModelSpec(
        vocab_size=chat.vocab_size, d_model=24, pattern="g/d*2", mixers={"g": gqa}, ffns={"d": SwiGLU(hidden=32)}
    )
    model = Transformer(spec)
    randomise(model)
    folder.mkdir()
    save_model(model, folder)
    chat.save(folder)
    return model


@pytest.mark.parametrize("syntax", ["bare", "json"])
def test_our_own_model_is_one_of_transformers(syntax: str, tmp_path: Path) -> None:
    chat = tiny_chat() if syntax == "bare" else bpe_chat(["two and two is four, says the calculator"] * 3, 300)
    model = own(tmp_path / "run", chat)
    export(tmp_path / "run", tmp_path / "out")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(theirs).__name__ == "Qwen3ForCausalLM" and not any(info.values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.eos_token_id == theirs.config.eos_token_id == chat.end_id and tokenizer.pad_token == "<pad>"
    for messages in (TALK, TALK[1:2], TALK[:4], TALK[:5]):
        for thinking in (True, False):
            if messages[-1].role == "assistant" and not thinking:
                continue
            generate = messages[-1].role != "assistant"
            ids = tokenizer.apply_chat_template(
                in_their_words(messages), tokenize=True, add_generation_prompt=generate, enable_thinking=thinking,
                tools=[{"type": "function", "function": CALCULATOR.__dict__}], return_dict=True,
            )["input_ids"]  # fmt: skip
            want = chat.render(messages, [CALCULATOR], thinking, generate)
            assert ids == want.ids
            assert chat.render([*messages, Message("user", "x")], [CALCULATOR], thinking).ids != ids  # the twin
    masked = tokenizer.apply_chat_template(
        in_their_words(TALK), return_assistant_tokens_mask=True, return_dict=True, tokenize=True
    )
    assert [bool(m) for m in masked["assistant_masks"]] == chat.render(TALK).mask
    tokens = torch.tensor([chat.render(TALK).ids])
    assert gap(theirs(tokens).logits, model.logits(model(tokens))) < 1e-4
    back, same_chat = load_pair(tmp_path / "out")  # and Trivet reads it as its own
    assert torch.equal(back(tokens), model(tokens)) and same_chat.render(TALK).ids == chat.render(TALK).ids
    assert same_chat.markers == chat.markers


def test_a_family_can_be_asked_for_and_what_it_lacks_is_named(tmp_path: Path) -> None:
    own(tmp_path / "run", tiny_chat())
    with pytest.raises(UserError, match="A llama config can't say this model: layer 0's mixer.qk_norm is True and not"):
        export(tmp_path / "run", tmp_path / "out", family="llama")
    own(tmp_path / "windows", tiny_chat(), window=4)
    with pytest.raises(UserError, match="No family's config can say this model.*but .*window"):
        export(tmp_path / "windows", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(tmp_path / "run", tmp_path / "out", family="qwen3", dtype="bf16")
    assert load_any(tmp_path / "out").embed.dtype == torch.bfloat16
    changed = Chat(tiny_chat().tokenizer, "{{ messages }}", tiny_chat().markers)
    with pytest.raises(UserError, match="chat template is not the one of this version"):
        tokenizer_files(changed)


def test_the_command_line_says_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peer("qwen3_moe", 0, tmp_path / "a")
    words = ("export", str(tmp_path / "a"), "--layers", "1", "--experts", "0:3,4", "--dtype", "bf16")
    code, out, err = call(monkeypatch, capsys, *words, "--out", str(tmp_path / "b"))
    assert code == 0 and "qwen3_moe, 1 layer, " in out and "parameters in bfloat16." in out, err
    for more, says in (
        (("--layers", "9:12"), "layers: [9, 10, 11] asked for; there are 0 to"),
        (("--layers", "x"), "--layers 'x' should read N (the first N), A:B"),
        (("--family", "qwen4"), "No family 'qwen4'"),
    ):
        code, _, err = call(monkeypatch, capsys, "export", str(tmp_path / "a"), "--out", str(tmp_path / "c"), *more)
        assert code == 1 and err.startswith("trivet: ") and says in err and err.strip().count("\n") == 0, err
