"""What a step of RL holds, on paper and in fact: the engine's caches to the byte, a process's peak to 10%."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from test_cli_verbs import call
from test_house import run_python
from test_measure_memory import process, trial_spec
from test_model_zoo import PATTERNS, noisy, spec_of
from trivet.chat import tiny_chat
from trivet.config import UserError
from trivet.engine import Engine, filling, rows, sampling
from trivet.measure import memory_rl
from trivet.measure.memory_rl import BLOCK, COLUMNS, PIECE, SPAN, TABLES, cache_bytes, outgrown, rl_memory, setting
from trivet.measure.plan import find_model, plan_rl
from trivet.measure.plan_rl import rl_stages
from trivet.measure.trial import FREED
from trivet.rl.config import RLConfig

RL = {
    "steps": 1, "problems": 1, "group": 8, "rows": 8, "length": 200, "max_tokens": 6, "tensorboard": False,
    "thinking": "off", "mismatch_limit": 10.0, "share_prompts": False,
}  # fmt: skip
MANY = {"problems": 24, "rows": 1, "group": 16}  # whose sampling is the peak
SHARED = {"share_prompts": True, "problems": 1, "group": 32, "max_tokens": 50, "rows": 10}  # one line, 32 strands
STEPS: list[tuple[str, dict[str, Any], str]] = [
    ("dense", {}, "update's backward"),
    ("dense", {"precision": "bf16"}, "update's backward"),
    ("mla_moe", {"objective": "grpo", "rows": 4}, "update's forward"),  # in two parts
    ("next", {"recompute": True, "max_tokens": 30}, "update's backward"),
    ("dense", {**SHARED}, "update's backward"),
    ("mla_moe", {**SHARED, "length": 150, "max_tokens": 70, "rows": 16}, "update's backward"),
    ("lightning", {**SHARED}, "update's backward"),
    ("next", {**SHARED, "max_tokens": 30}, "update's backward"),
    ("dense", {**MANY, "length": 300}, "sampling"),
    ("mla_moe", {**MANY, "temperature": 0.9, "replay": "sampler"}, "sampling"),
    ("lightning", {**MANY, "top_p": 0.9, "max_tokens": 2}, "sampling"),
]


@process
@pytest.mark.parametrize(("name", "more", "where"), STEPS)
def test_a_step_of_rl_takes_what_was_predicted(name: str, more: dict[str, Any], where: str) -> None:
    spec, config = trial_spec(name), RLConfig(**{**RL, **more})
    asked = json.dumps({"spec": spec.model_dump(mode="json"), "rl": config.model_dump(mode="json")})
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("rl_memory_run.py"))],
        input=asked, capture_output=True, text=True, env=os.environ | FREED,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured, said = json.loads(done.stdout)["bytes"], rl_memory(spec, config, cpu=True)
    assert said.peak == pytest.approx(measured, rel=0.1) and said.row()["peak_in"] == where
    state = 2 * said.weights + said.optimizer + said.reference  # the twin: without caches and logits, or activations
    assert (said.peak - said.caches - said.logits if where == "sampling" else state) < 0.75 * measured


@pytest.mark.parametrize("name", PATTERNS)
def test_caches_are_those_of_the_engine(name: str) -> None:
    spec, config = spec_of(PATTERNS[name]), RLConfig(steps=1, problems=3, group=2, length=90, max_rows=5)
    engine = Engine(noisy(spec), tiny_chat(), 5, config.length + 1)
    engine.rows.columns = 0  # as if it had grown to what it may need
    engine.rows.reserve(5, config.length + 1, 5)
    said = cache_bytes(spec, config, setting(config, cpu=True)) - 5 * TABLES * (config.length + 1)
    assert said == engine.rows.nbytes == 5 * (said // 5)


def test_what_the_settings_change() -> None:
    spec = trial_spec("mla_moe")

    def said(**more: Any) -> memory_rl.Learning:
        return rl_memory(spec, RLConfig(**{**RL, **more}))

    plain = said()
    assert said(objective="grpo").reference == plain.weights and plain.reference == 0
    assert said(objective="dapo", overrides={"kl": 0.1}).peak > plain.peak + 0.9 * plain.weights
    assert said(max_rows=4).caches == plain.caches / 2 and said(max_rows=4).update == plain.update
    assert said(precision="bf16").caches < 0.6 * plain.caches and plain.sampler == 0
    head = spec.vocab_size * spec.d_model  # untied, so an fp32 head is shared
    assert said(precision="bf16", fp32_head=False).sampler - said(precision="bf16").sampler == 2 * head
    many, few = said(problems=8, rows=16).update.backward, said(problems=8, rows=4).update.backward
    assert many > 1.5 * few and said(rows=64).update == said(rows=8).update  # a batch of eight fills no more
    assert said(top_p=0.9).logits > said(temperature=0.5).logits > plain.logits
    assert rl_memory(spec, RLConfig(**RL), cpu=True).episodes > plain.episodes  # the host's objects


# -------------------------------------------------------------------------------------- files and tables
TOML = """
start = "qwen3-8b"
[[tasks]]
name = "chain"
[rl]
steps = 3
length = 1024
"""


def test_a_plan_of_a_run_shows_its_stages_of_rl(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, _ = call(monkeypatch, capsys, "plan", "configs/demo.toml", "--json")
    (row,) = json.loads(out)
    assert code == 0 and list(row["rl"]) == ["rl", "tool"]  # tool starts from rl, which starts from sft's [model]
    config = rl_stages(Path("configs/demo.toml"))[0].config
    said = rl_memory(find_model("configs/demo.toml").spec, config)
    assert row["rl"]["rl"]["peak"] == said.peak and row["rl"]["rl"]["at_once"] == 512
    (tmp_path / "mine.toml").write_text(TOML)
    code, out, _ = call(monkeypatch, capsys, "plan", str(tmp_path / "mine.toml"))
    assert code == 0 and "RL: episodes × slots" in out and "512 × 1,025" in out and "32.8 GB" in out  # 4 x 8.19e9
    code, out, _ = call(monkeypatch, capsys, "plan", "configs/gsm8k.toml")
    assert code == 0 and "RL:" not in out


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("length = 1024", "lenght = 1024", r"mine.toml \[rl\]: unknown key 'lenght'. Did you mean 'length'"),
        ("steps = 3", "steps = 3\nobjective = 'ppo'", "objective 'ppo' is not one of"),
        ('"qwen3-8b"', '"qwen3-9b"', "No model 'qwen3-9b'.*Did you mean 'qwen3-8b'"),
        ("start", "begin", "no .model. is found"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TOML.replace(old, new))
    with pytest.raises(UserError, match=says):
        plan_rl(str(path))


def test_adapters_and_circles(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("lora = { rank = 4 }\n" + TOML)
    stages, notes = plan_rl(str(path))
    assert "trains adapters" in notes[0] and list(stages) == ["mine"]
    path.write_text("[stages.a]\nstart = 'b'\nrl = {steps = 1}\n[stages.b]\nstart = 'a'")
    with pytest.raises(UserError, match="from the `start` of stage 'a' on"):
        plan_rl(str(path))


def test_a_plan_of_rl_loads_no_torch() -> None:
    out = run_python("""
        import sys
        from trivet.cli import main
        sys.argv = ["trivet", "plan", "configs/r1/tiny.toml"]
        try:
            main()
        except SystemExit as e:
            assert e.code in (0, None), e.code
        print("loads torch:", "torch" in sys.modules)
    """)
    assert "RL: episodes × slots" in out and out.endswith("torch: False\n")


def test_what_is_copied_from_rooms_with_torch_is_still_true() -> None:
    assert (PIECE, COLUMNS, SPAN) == (filling.PIECE_TOKENS, rows.FIRST_COLUMNS, rows.SPAN_STEP)
    assert sampling.BLOCK == BLOCK


@pytest.mark.parametrize(("prompt", "length"), [(10, 90), (10, 256), (10, 400), (250, 700), (300, 3000), (600, 900)])
def test_slots_grow_as_the_engines_do(prompt: int, length: int) -> None:
    config = RLConfig(steps=1, length=length, max_tokens=length - prompt)
    engine = Engine(noisy(spec_of("gqa/dense")), tiny_chat(), 2, length + 1)
    seen = [0]
    for known in range(prompt, length + 1):
        columns = engine.rows.columns
        engine.rows.reserve(2, known + rows.SPAN_STEP if known == prompt else known + 1, 2)
        if engine.rows.columns > columns and known > prompt:
            seen.append(columns)
    assert outgrown(config) == seen[-1] and engine.rows.columns >= min(length + 1, COLUMNS)
