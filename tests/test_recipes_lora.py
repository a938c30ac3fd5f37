"""LoRA by the command line: a checkpoint of transformers' making, JSONL, train, rl, eval, chat, export; peft reads the end."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from test_chat_template import QWEN3, folder_of
from test_cli_verbs import call
from trivet.hub.checkpoint import load_any
from trivet.model.lora import adapter_parameters, merge

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

LORA = "lora = { rank = 8, alpha = 16 }"
TRAIN = "steps = 40\nrows = 4\nlength = 128\nadam_lr = 0.01\ntensorboard = false\n"
RL = "steps = 2\nproblems = 2\ngroup = 2\nmax_tokens = 12\nlength = 128\ntensorboard = false\n"


class Shop:
    """A folder with a base and questions, and the command line in it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        self.base = folder_of(folder / "base", QWEN3)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.2,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(self.base)
        rng = random.Random(0)
        pairs = [(rng.randrange(10), rng.randrange(10)) for _ in range(200)]
        lines = [{"question": f"{a} and {b}?", "answer": str(max(a, b))} for a, b in pairs]
        (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def stage(self, verb: str, start: Path, out: str, *lines: str, **settings: Any) -> tuple[int, str, str]:
        section = TRAIN if verb == "train" else RL
        text = f'start = "{start}"\n' + "\n".join(lines)
        text += f'\n[[tasks]]\nname = "jsonl"\npath = "{self.folder / "mine.jsonl"}"\nformat = "number"\n[{verb}]\n{section}'
        (self.folder / "run.toml").write_text(text)
        words = [f"{key}={value}" for key, value in settings.items()]
        return self(verb, str(self.folder / "run.toml"), *words, "--out", str(self.folder / out), "--device", "cpu")

    def __call__(self, *words: str) -> tuple[int, str, str]:
        return call(self.monkeypatch, self.capsys, *words)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shop:
    return Shop(tmp_path, monkeypatch, capsys)


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        if isinstance(model, torch.nn.Module) and "trivet" in type(model).__module__:
            return model.logits(model(tokens))  # type: ignore[operator,no-any-return]
        return model(input_ids=tokens).logits  # type: ignore[no-any-return]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_adapter_is_trained_used_and_handed_on(shop: Shop) -> None:
    code, _, err = shop.stage("train", shop.base, "sft", LORA)
    assert code == 0 and "parameters are trained" in err, err
    sft = shop.folder / "sft"
    learned = losses(sft)
    assert sum(learned[-5:]) < 0.5 * sum(learned[:5]), learned
    assert not (sft / "model.safetensors").exists() and not (sft / "config.json").exists()
    assert json.loads((sft / "adapter_config.json").read_text())["base_model_name_or_path"] == str(shop.base)
    words = (
        "--task",
        "jsonl",
        "--set",
        f"path={shop.folder / 'mine.jsonl'}",
        "-n",
        "8",
        "--max-tokens",
        "16",
        "--json",
    )
    code, out, err = shop("eval", str(sft), *words)
    assert code == 0 and json.loads(out)[0]["questions"] == 8, err
    answers = iter(["3 and 4?", "/quit"])
    shop.monkeypatch.setattr("builtins.input", lambda *_: next(answers))
    code, out, err = shop("chat", str(sft), "--max-tokens", "8")
    assert code == 0 and "in its adapter" in out, err

    code, _, err = shop.stage("rl", sft, "rl", LORA, **{"rl.objective": "grpo"})  # goes on with the adapter
    assert code == 0, err
    started, ended = (load_file(shop.folder / name / "adapter_model.safetensors") for name in ("sft", "rl"))
    assert started.keys() == ended.keys() and json.loads((shop.folder / "rl" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(shop.base)  # fmt: skip

    want = logits(load_any(sft))
    plain = transformers.AutoModelForCausalLM.from_pretrained(shop.base, dtype=torch.float32)
    assert (logits(plain) - want).abs().max() > 0.1  # the twin: without the adapter
    code, _, err = shop("export", str(sft), "--out", str(shop.folder / "whole"))
    assert code == 0, err
    whole = transformers.AutoModelForCausalLM.from_pretrained(shop.folder / "whole", dtype=torch.float32)
    torch.testing.assert_close(logits(whole), want, rtol=1e-4, atol=1e-4)
    code, _, err = shop("export", str(sft), "--adapter", "--out", str(shop.folder / "alone"))
    assert code == 0, err
    for folder in (sft, shop.folder / "alone"):
        again = transformers.AutoModelForCausalLM.from_pretrained(shop.base, dtype=torch.float32)
        torch.testing.assert_close(
            logits(peft.PeftModel.from_pretrained(again, folder).eval()), want, rtol=1e-4, atol=1e-4
        )


def test_from_an_adapter_the_whole_model_can_be_trained(shop: Shop) -> None:
    assert shop.stage("train", shop.base, "a", LORA, **{"train.steps": 3})[0] == 0
    code, _, err = shop.stage(
        "train", shop.folder / "a", "b", **{"train.steps": 1, "train.muon_lr": 0, "train.adam_lr": 0}
    )
    assert code == 0 and "its adapter is merged into the weights" in err, err
    model = load_any(shop.folder / "a")
    merge(model)
    trained = load_any(shop.folder / "b").state_dict()
    assert all(torch.equal(t, trained[name]) for name, t in model.state_dict().items())
    assert shop.stage("train", shop.folder / "b", "c", LORA, **{"train.steps": 3})[0] == 0  # its base is one of ours
    assert adapter_parameters(load_any(shop.folder / "c"))
    code, _, err = shop(
        "export", str(shop.folder / "c"), "--adapter", "--like", str(shop.base), "--out", str(shop.folder / "d")
    )
    assert code == 1 and "was trained on other weights than" in err  # the twin of the export above
    code, _, err = shop("export", str(shop.folder / "c"), "--adapter", "--out", str(shop.folder / "d"))
    assert code == 1 and f"{shop.folder / 'b'} has no family's format: give --like" in err  # the base of c is b
    (shop.folder / "c" / "tokenizer.json").unlink()  # an adapter of peft's has none: the base's is taken
    for name, how in {"d": ("--like", str(shop.base)), "e": (), "f": ("--family", "llama")}.items():
        code, _, err = shop("export", str(shop.folder / "c"), *how, "--out", str(shop.folder / name))
        assert code == 0, err
        assert (shop.folder / name / "tokenizer.json").is_file()
        again = transformers.AutoModelForCausalLM.from_pretrained(shop.folder / name, dtype=torch.float32)
        torch.testing.assert_close(logits(again), logits(load_any(shop.folder / "c")), rtol=1e-4, atol=1e-4)
    for how, says in (
        (("--family", "mixtral"), "mixtral"),
        (("--like", str(shop.folder / "b")), "model_type 'trivet' is"),
    ):
        code, _, err = shop("export", str(shop.folder / "c"), *how, "--out", str(shop.folder / "g"))
        assert code == 1 and says in err, err
    base = transformers.AutoModelForCausalLM.from_pretrained(shop.base, dtype=torch.float32)
    assert (logits(again) - logits(base)).abs().max() > 1e-2  # the twin: without what c learned


def test_mistakes_get_one_sentence(shop: Shop) -> None:
    few = {"train.steps": 1}
    for lines, says in (
        (
            "lora = { rank = 8, targets = ['q_prj'] }",
            "no projection of this model is called 'q_prj'; there are down_proj",
        ),
        ("lora = { ranc = 8 }", "unknown key 'lora.ranc'. Did you mean 'rank'?"),
        ("lora = { rank = 0 }", "'lora.rank': input should be greater than 0"),
        ("lora = { targets = [] }", "lora.targets"),
    ):
        code, _, err = shop.stage("train", shop.base, "x", lines, **few)
        assert code == 1 and says in err and "Traceback" not in err, err
    assert shop.stage("train", shop.base, "x", LORA, **few)[0] == 0  # what failed before it began is no run to protect
    assert shop.stage("train", shop.base, "a", "lora = { rank = 4, targets = ['q_proj', 'down_proj'] }", **few)[0] == 0
    assert len(adapter_parameters(load_any(shop.folder / "a"))) == 2 * 2 * 2  # layers, targets, factors
    for lines in (LORA, "lora = { rank = 4 }", "lora = { rank = 4, alpha = 8, targets = ['q_proj', 'down_proj'] }"):
        code, _, err = shop.stage("train", shop.folder / "a", "y" + lines[-9:-7], lines, **few)
        assert code == 1 and "holds an adapter of another rank, alpha or targets" in err, err
    code, _, err = shop(
        "export", str(shop.base), "--like", str(shop.base), "--adapter", "--out", str(shop.folder / "z")
    )
    assert code == 1 and "holds a whole model, no adapter" in err
    code, _, err = shop.stage("train", shop.base, "a", **few)
    assert code == 1 and "was run with lora" in err, err
