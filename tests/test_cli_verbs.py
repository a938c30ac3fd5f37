"""The command line as a person uses it: what helps, what it prints, and what it says to mistakes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trivet.cli import main
from trivet.engine import EngineModel, Request
from trivet.messages import Message

ROOT = Path(__file__).parents[1]
DEMO = str(ROOT / "configs/demo.toml")
SMALL = """
[model]
d_model = 16
context_length = 96
pattern = "gqa/dense"
mixers = { gqa = { kind = "gqa", heads = 2, kv_heads = 1, head_dim = 8, rope = { dims = 8 } } }
ffns = { dense = { kind = "swiglu", hidden = 16 } }
[[tasks]]
name = "chain"
max_steps = 3
[train]
steps = 3
rows = 2
length = 64
tensorboard = false
"""


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `trivet WORDS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["trivet", *words])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as e:
        main()
    out, err = capsys.readouterr()
    code = e.value.code
    if isinstance(code, str):  # sys.exit(text) prints it only when the interpreter ends
        code, err = 1, err + code
    return code or 0, out, err


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory, made by the real command."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "small.toml").write_text(SMALL)
    program = "from trivet.cli import main; main()"
    words = ["train", str(folder / "small.toml"), "--out", str(folder / "m"), "--device", "cpu"]
    subprocess.run([sys.executable, "-c", program, *words], check=True, capture_output=True, timeout=60)
    return folder / "m"


VERBS = ("run", "train", "rl", "eval", "chat", "export", "plan")


def test_help_needs_no_manual(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(monkeypatch, capsys, "--help")
    assert code == 0 and all(f"\n  {verb} " in out for verb in VERBS) and "trivet run configs/demo.toml" in out
    for verb in VERBS:
        code, out, _ = call(monkeypatch, capsys, verb, "--help")
        options = [line for line in out.splitlines() if line.strip().startswith("-")]
        assert code == 0 and options and all(len(line.split("  ")) > 1 for line in options)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run", "configs/demmo.toml"), "No file 'configs/demmo.toml'. Did you mean 'demo.toml'?"),
        (("run", DEMO, "stages.sft.train.stepz=3"), "unknown key 'stages.sft.train.stepz'. Did you mean 'steps'?"),
        (("run", DEMO, "stages.sft.train.steps=lots"), "'stages.sft.train.steps': input should be a valid integer"),
        (("run", DEMO, "stages.sft.train.steps=-1"), "greater than 0, not -1"),
        (("run", DEMO, "stages.rl.rl.objective=grpp"), "Did you mean 'grpo'?"),
        (("run", DEMO, "stages.sft.model.pattern=mla/moee*3"), "did you mean 'moe'?"),
        (("run", DEMO, "nonsense"), "should read key=value"),
        (("run", DEMO, "--device", "gpu9"), "--device 'gpu9' can't be used"),
        (("rl", DEMO), "unknown key"),
        (("chat", "nowhere"), "'nowhere' is no model directory"),
        (("eval", "nowhere", "--task", "chain"), "'nowhere' is no model directory"),
        (("plan", "nowhere"), "No model 'nowhere'"),
        (("plan", "pyproject.toml"), "describes no model"),
    ],
)
def test_mistakes_get_one_sentence(
    words: tuple[str, ...],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(ROOT)
    out = ("--out", str(tmp_path / "out")) if words[0] in ("run", "rl") else ()
    code, _, err = call(monkeypatch, capsys, *words, *out)
    assert code == 1 and err.startswith("trivet: ") and says in err, err
    assert err.strip().count("\n") == 0 and not (tmp_path / "out").exists()


def test_mistakes_in_front_of_a_model(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, says in (
        (("eval", str(model), "--task", "chian"), "Did you mean 'chain'?"),
        (("eval", str(model), "--task", "chain", "--set", "max_stepz=3"), "Did you mean 'max_steps'?"),
        (("eval", str(model), "--task", "chain", "--set", "max_steps"), "KEY=VALUE"),
        (("eval", str(model), "--task", "chain", "--budgets", "3,many"), "'many' is no budget"),
        (("chat", str(model), "--tools", "calculater"), "Did you mean 'calculator'?"),
    ):
        code, _, err = call(monkeypatch, capsys, *words)
        assert code == 1 and says in err and "Traceback" not in err, err


def test_eval_prints_a_table_or_json(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("eval", str(model), "--task", "chain", "--set", "max_steps=3", "--count", "8", "--budgets", "0,4,none")
    code, out, _ = call(monkeypatch, capsys, *words)
    rows = [line.split() for line in out.splitlines() if line.strip() and line.split()[0] in ("0", "4", "unlimited")]
    assert code == 0 and [row[0] for row in rows] == ["0", "4", "unlimited"]
    code, out, _ = call(monkeypatch, capsys, *words, "--json")
    points = json.loads(out)
    assert [p["thinking"] for p in points] == [0, 4, None] and all(p["questions"] == 8 for p in points)
    assert [f"{p['accuracy']['mean']:.3f}" for p in points] == [row[1] for row in rows]


def test_eval_sweeps_cache_policies(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("eval", str(model), "--task", "chain", "--set", "max_steps=3", "--count", "8", "--cache")
    code, out, _ = call(monkeypatch, capsys, *words, "full,int8,window:12+2", "--json")
    points = json.loads(out)
    assert code == 0 and [p["cache"] for p in points] == ["full", "int8", "window:12+2"]
    whole, eight, window = (p["cache_bytes"] for p in points)
    assert whole == 96 * 2 * 8 * 4 and eight == 96 * (2 * 8 + 2 * 2) and window == whole * 14 // 96
    code, out, _ = call(monkeypatch, capsys, *words, "full,snapkv:16/8")
    assert code == 0 and "snapkv:16/8" in out and f"{whole:,}" in out
    for cache, says in (("int4", "no cache policy"), ("lowrank:8/2", "no MLA layer")):
        code, _, err = call(monkeypatch, capsys, *words, cache)
        assert code == 1 and says in err and "Traceback" not in err


@pytest.mark.parametrize("cache", ["int8", "window:12+2", "snapkv:16/8", "lowrank:8/2"])
def test_chat_takes_a_cache_policy(
    model: Path, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if cache.startswith("lowrank"):
        mla = 'mla = { kind = "mla", heads = 2, kv_rank = 6, nope_dim = 4, v_dim = 4, rope = { dims = 4 } }'
        text = SMALL.replace("gqa/dense", "mla/dense").replace("mixers = { ", f"mixers = {{ {mla}, ")
        (tmp_path / "latent.toml").write_text(text)
        model = tmp_path / "m"
        assert call(monkeypatch, capsys, "train", str(tmp_path / "latent.toml"), "--out", str(model))[0] == 0
    lines = iter(["7+3=", "9-2=", "/quit"])
    monkeypatch.setattr("builtins.input", lambda *a: next(lines))
    code, out, err = call(monkeypatch, capsys, "chat", str(model), "--max-tokens", "12", "--cache", cache)
    assert code == 0 and out.count("tok/s, ended by") == 2, err
    assert ("was calibrated on 4 texts" in out) == cache.startswith("lowrank")


def test_chat_streams_and_counts(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["/budget 3", "7+3=", "", "/budget lots", "7+3=", "/new", "<think>9-2=", "é", "/quit"])
    monkeypatch.setattr("builtins.input", lambda *a: next(lines))
    code, out, err = call(monkeypatch, capsys, "chat", str(model), "--max-tokens", "12", "--tools", "calculator")
    assert code == 0 and "Traceback" not in err
    assert out.count("tok/s, ended by") == 3 and "/budget wants a number" in out
    assert "The tokenizer has no 'é'" in out  # said, and the conversation goes on
    first, second = (answer.lstrip("> ") for answer in re.findall(r"\n(.*)\n\d+ tokens", out)[:2])
    assert first == second and "each starts anew" in out  # as its training was: one question a conversation


def test_a_model_of_conversations_remembers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "m")
    config = tmp_path / "m" / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"single_turn": true', '"single_turn": false'))
    seen: list[int] = []
    real = EngineModel.request

    def request(self: EngineModel, messages: list[Message], *rest: Any) -> Request:
        seen.append(len(messages))
        return real(self, messages, *rest)

    monkeypatch.setattr(EngineModel, "request", request)
    for directory, lengths in ((tmp_path / "m", [1, 3, 1]), (model, [1, 1, 1])):
        lines = iter(["7+3=", "7+3=", "/new", "1+1=", "/quit"])
        monkeypatch.setattr("builtins.input", lambda *a, lines=lines: next(lines))
        seen.clear()
        code, _, _ = call(monkeypatch, capsys, "chat", str(directory), "--max-tokens", "6")
        assert code == 0 and seen == lengths


def test_soft_switches_are_said_and_kept(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, Any]] = []
    real = EngineModel.request

    def request(self: EngineModel, messages: list[Message], tools: Any, sampling: Any) -> Request:
        asked.append((messages[-1].content, sampling.thinking))
        return real(self, messages, tools, sampling)

    monkeypatch.setattr(EngineModel, "request", request)
    lines = iter(["1+1=", "/no_think", "2+2=", "3+3= /think", "4+4= /no_think", "/budget off", "5+5= /think", "/budget 9",
                  "6+6=", "/no_think", "/new", "7+7=", "/quit"])  # fmt: skip
    monkeypatch.setattr("builtins.input", lambda *a: next(lines))
    code, out, err = call(monkeypatch, capsys, "chat", str(model), "--max-tokens", "6", "--budget", "7")
    assert code == 0, err
    # The model never saw the words; the last one typed counts until /new, and a hard off stays off.
    assert asked == [
        ("1+1=", 7),
        ("2+2=", "off"),
        ("3+3=", 7),
        ("4+4=", "off"),
        ("5+5=", "off"),
        ("6+6=", 9),
        ("7+7=", 9),
    ]
    assert out.count("Thinking is off from here on") == 3 and out.count("Thinking is on from here on") == 1
    assert "overrides /think" in out


def test_plan_prices_without_weights(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(monkeypatch, capsys, "plan", DEMO, "--json", "--context", "512")
    (row,) = json.loads(out)
    from trivet.chat import tiny_chat
    from trivet.config import read_toml
    from trivet.spec import ModelSpec

    table = read_toml(Path(DEMO))["stages"]["sft"]["model"]
    spec = ModelSpec(vocab_size=tiny_chat().vocab_size, **table)
    assert code == 0 and row["total_params"] == spec.num_params() and row["context"] == 512
    assert row["cache_bytes_per_token"] == spec.cache_bytes_per_token(2)
    code, out, _ = call(monkeypatch, capsys, "plan", DEMO)
    assert code == 0 and f"{spec.num_params():,}" in out
