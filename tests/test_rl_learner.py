"""The RL loop on a toy task: it learns, it is exact, and it stops when something is wrong."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from trivet.agent.loop import Row
from trivet.chat import tiny_chat
from trivet.config import UserError
from trivet.engine import Engine
from trivet.messages import Message, Sampling, Score
from trivet.model import Transformer
from trivet.rl.config import RLConfig
from trivet.rl.epochs import Seen
from trivet.rl.learner import TIMES, _Run, learn
from trivet.rl.rollout import Job, draw_problems, play
from trivet.rl.update import deal, pack
from trivet.spec import GQA, MLA, GatedDeltaNet, Lightning, ModelSpec, MoE, Rope, SwiGLU
from trivet.tasks import Problem
from trivet.tasks.base import Demo

CHAT = tiny_chat()
ROPE = Rope(dims=4)
MIXERS = {
    "gqa": GQA(heads=2, kv_heads=1, head_dim=8, rope=ROPE, qk_norm=True),
    "mla": MLA(heads=2, kv_rank=8, nope_dim=4, v_dim=8, rope=ROPE),
    "lightning": Lightning(heads=2, head_dim=8),
    "delta": GatedDeltaNet(heads=2, key_heads=1, key_dim=8, value_dim=8),
}
FFNS = {"dense": SwiGLU(hidden=16), "moe": MoE(experts=4, top_k=2, hidden=8, shared_hidden=8)}


def make(pattern: str = "gqa/dense", noise: float = 0.0, mtp: int = 0) -> Transformer:
    """A tiny model; with noise, one whose output projections are not zero."""
    spec = ModelSpec(
        vocab_size=CHAT.vocab_size, d_model=16, pattern=pattern, mixers=MIXERS, ffns=FFNS, mtp=mtp,
        tie_embeddings=False, context_length=128,
    )  # fmt: skip
    model = Transformer(spec, seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += noise * torch.randn(p.shape, generator=generator)
    return model


class Digits:
    """Reward: the share of digits in the text, of which a new model writes few."""

    name, tools, levels = "digits", (), (1,)

    def problem(self, split: str, index: int, level: int | None = None) -> Problem:
        return Problem(f"d{index}", f"{index % 97}+1=", "1", 1)

    def demonstrate(self, problem: Problem, rng: random.Random) -> Demo:
        raise NotImplementedError

    def grade(self, problem: Problem, message: Message) -> Score:
        text = message.content + (message.reasoning or "")
        return Score(sum(c.isdigit() for c in text) / max(len(text), 6))


class Calls(Digits):
    """The same with a calculator on offer."""

    name, tools = "calls", ("calculator",)


class Broken(Digits):
    name = "broken"

    def grade(self, problem: Problem, message: Message) -> Score:
        if len(message.content) % 2:
            raise ZeroDivisionError("a grader's own bug")
        return Score(0.5)


def config(**changes: Any) -> RLConfig:
    values = {"steps": 2, "problems": 4, "group": 4, "max_tokens": 8, "rows": 4, "length": 64, "tensorboard": False}
    return RLConfig(**{**values, **changes})


def test_it_learns(tmp_path: Path) -> None:
    logged: list[dict[str, Any]] = []
    learning = config(steps=24, problems=8, group=8, muon_lr=0.02, adam_lr=0.05)
    last = learn(make(), CHAT, [(Digits(), 1.0)], learning, tmp_path, progress=logged.append)
    rewards = [line["reward"] for line in logged]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3, rewards
    assert last["step"] == 24 and last["reward/digits"] == last["reward"]
    frozen: list[dict[str, Any]] = []  # the twin: without updates the same run does not improve
    learn(make(), CHAT, [(Digits(), 1.0)], config(steps=4, problems=8, group=8, muon_lr=0, adam_lr=0), tmp_path / "0",
          progress=frozen.append)  # fmt: skip
    assert abs(frozen[-1]["reward"] - frozen[0]["reward"]) < 0.1


def test_disagreement_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: an engine that samples at another temperature than it says is found out at once."""
    from trivet.rl import sampler

    def hot(engine: Engine, jobs: list[Job], turns: int) -> Any:
        from dataclasses import replace

        return play(engine, [replace(j, sampling=replace(j.sampling, temperature=1.5)) for j in jobs], turns)

    monkeypatch.setattr(sampler, "play", hot)
    with pytest.raises(UserError, match="engine and trainer disagree"):
        learn(make(noise=0.3), CHAT, [(Digits(), 1.0)], config(), tmp_path)


def test_temperature_is_applied_on_both_sides(tmp_path: Path) -> None:
    last = learn(make(noise=0.3), CHAT, [(Digits(), 1.0)], config(temperature=0.7), tmp_path)
    assert last["ratio/max_abs_log"] == 0.0 and last["mismatch/max_abs_log"] < 1e-4


def test_later_updates_move_the_ratio(tmp_path: Path) -> None:
    for objective in ("grpo", "gspo", "cispo"):
        more = config(epochs=3, objective=objective, muon_lr=0.01)
        last = learn(make("gqa/moe", noise=0.3), CHAT, [(Digits(), 1.0)], more, tmp_path / objective)
        assert last["ratio/max_abs_log"] == 0.0 and last["ratio/last_max_abs_log"] > 1e-3
        assert last["clip_share"] > 0 or objective == "cispo"
        assert last.get("kl", 1.0) > 0  # grpo's reference: the second step is no longer at it


def play_some(model: Transformer, tools: bool = True) -> list[Any]:
    sampling = [Sampling(temperature=1.0, max_tokens=60, seed=s, thinking=6) for s in range(40)]
    jobs = [Job(Calls(), Calls().problem("train", s), sampling[s], tools) for s in range(40)]  # type: ignore[arg-type]
    return play(Engine(model.eval(), CHAT, 16, 100), jobs, 6)


def eager_caller() -> Transformer:
    """A model that opens and closes tool calls often, malformed ones included, and writes many `=`."""
    model = make("gqa/moe", noise=0.2)
    with torch.no_grad():
        direction = model.norm.weight * torch.randn(16, generator=torch.Generator().manual_seed(5))
        for token in (CHAT.tool_open_id, CHAT.tool_close_id, CHAT.think_open_id, *CHAT.encode_text("=")):
            assert model.head is not None
            model.head[token] = 0.7 * direction
    return model


def test_what_is_trained_is_what_was_sampled() -> None:
    attempts = play_some(eager_caller())
    rows = [a.row for a in attempts]
    assert sum(a.calls_tool for a in attempts) > 3 and any(len(a.episode.completions) > 2 for a in attempts)
    for attempt, row in zip(attempts, rows, strict=True):
        sampled = [(t, p) for c in attempt.episode.completions
                   for t, s, p in zip(c.tokens, c.sampled, c.logprobs, strict=True) if s]  # fmt: skip
        assert [(i, p) for i, t, p in zip(row.ids, row.trained, row.logprobs, strict=True) if t] == sampled
    parts = pack(rows, 4, 100)
    found: dict[int, list[int]] = {}
    for part in parts:
        for sequence, target in zip(part.sequence.tolist(), part.targets.tolist(), strict=True):
            found.setdefault(sequence, []).append(target)
    assert found == {i: [t for t, trained in zip(r.ids, r.trained, strict=True) if trained] for i, r in enumerate(rows)}
    cut = [len(p.tokens[0]) for p in parts]
    assert max(len(r.ids) for r in rows) > 101 >= max(cut), (
        "no tool result outgrew the cache, so trimming was not tested"
    )
    again = [CHAT.tokenizer.encode(CHAT.decode(r.ids), add_special_tokens=False).ids for r in rows]
    assert [list(r.ids) for r in rows] != again, "the twin: ids made from text must differ, or this test shows nothing"
    closing = [i for a, i in zip(attempts, range(40), strict=True) if a.episode.budget_hit]
    assert closing, "no budget was hit, so forced tokens were not tested"


def test_packing_changes_nothing_in_the_update() -> None:
    """One row a line in many microbatches, or all packed into one: the same gradient."""
    rows = [a.row for a in play_some(eager_caller())][:12]
    advantage = torch.linspace(-1, 1, 12)

    def gradient(lines: int, length: int, objective: str) -> torch.Tensor:
        model = eager_caller()
        run = _Run(
            model,
            CHAT,
            [(Digits(), 1.0)],
            config(rows=lines, length=length, objective=objective),
            Path("nowhere"),
            "cpu",
        )
        batch, seen = run.updates.minibatch(rows, range(12), advantage), Seen()
        run.updates.backward(batch, seen)
        assert seen.worst < 1e-4
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    longest = 100
    for objective in ("dapo", "grpo", "gspo", "dr_grpo"):
        tight, loose = gradient(1, longest, objective), gradient(8, 100, objective)
        torch.testing.assert_close(tight, loose, rtol=1e-4, atol=1e-6)
        assert tight.norm() > 1e-3
    a, b = gradient(8, 100, "dapo"), gradient(8, 100, "grpo")  # the twin: another normaliser is another gradient
    assert (a - b).norm() > 0.05 * a.norm()


def test_pack_keeps_every_row_once_and_refuses_long_ones() -> None:
    rng = random.Random(0)
    rows = []
    for _ in range(30):
        n = rng.randint(2, 20)
        rows.append(Row(tuple(rng.randrange(50) for _ in range(n)), (False,) + (True,) * (n - 1), (0.0,) * n))
    parts = pack(rows, 3, 20)
    assert sum(len(p.targets) for p in parts) == sum(len(r.ids) - 1 for r in rows)
    assert sum(int((p.positions == 0).sum()) for p in parts) == 30
    used = sum(int((p.positions >= 0).sum()) for p in parts)
    assert used / sum(p.positions.numel() for p in parts) > 0.85  # that is what packing is for
    with pytest.raises(UserError, match="raise rl.length"):
        pack(rows, 3, max(len(r.ids) for r in rows) - 2)


def test_the_longest_row_is_trained_first() -> None:
    """So that what doesn't fit fails in the first seconds of a step, and not in its last."""
    rng = random.Random(1)
    for minibatches in (1, 3):
        lengths = [rng.randint(2, 60) for _ in range(40)]
        rows = [Row((1,) * n, (False,) + (True,) * (n - 1), (0.0,) * n) for n in lengths]
        first = deal(rows, minibatches)[0]
        parts = pack([rows[i] for i in first], 2, 64)
        longest = [int(part.positions.max()) for part in parts]
        assert longest[0] == max(lengths) - 2 and longest == sorted(longest, reverse=True) and len(parts) > 2
        drawn = pack([rows[i] for i in first[::-1]], 2, 64)  # whatever the order in which they come
        assert [int(part.positions.max()) for part in drawn] == longest


def test_a_failing_grader_is_counted_and_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be graded.*grader of 'broken': ZeroDivisionError"):
        learn(make(), CHAT, [(Broken(), 1.0)], config(), tmp_path)
    logged: list[dict[str, Any]] = []
    learn(make(), CHAT, [(Broken(), 1.0)], config(not_ok_limit=1.0), tmp_path / "b", progress=logged.append)
    assert logged[0]["not_ok"] == logged[0]["not_ok/error"] > 0
    assert logged[0]["reward"] == 0.5  # of those that are ok: a failed grader is no zero
    assert logged[0]["no_spread"] == 1.0 and "grad_norm" not in logged[0]  # nothing to learn from


def test_problems_are_a_pure_function_and_keep_their_shares() -> None:
    tasks: Any = [(Digits(), 3.0), (Calls(), 1.0), (Broken(), 0.0)]
    for step in range(20):
        drawn = draw_problems(tasks, 7, step, 32)
        names = [task.name for task, _ in drawn]
        assert names.count("digits") in (23, 24, 25) and names.count("broken") == 0
        assert [p for _, p in drawn] == [p for _, p in draw_problems(tasks, 7, step, 32)]
    assert [p for _, p in draw_problems(tasks, 7, 0, 32)] != [p for _, p in draw_problems(tasks, 8, 0, 32)]


def test_routers_keep_their_bias(tmp_path: Path) -> None:
    """RL sees few kinds of problems: balancing on these alone would move experts away from what they know."""
    model = make("gqa/moe", noise=0.3, mtp=1)
    biases = {name: b for name, b in model.named_buffers() if name.endswith("bias")}
    before = {name: b.fill_(0.25).clone() for name, b in biases.items()}
    last = learn(model, CHAT, [(Digits(), 1.0)], config(), tmp_path)
    assert len(biases) == 2 and all(torch.equal(b, before[name]) for name, b in biases.items())
    assert last["expert_load"] > 1  # uneven, so there was something to balance


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'grpo'"):
        config(objective="grop")
    with pytest.raises(UserError, match="context_length"):
        learn(make(), CHAT, [(Digits(), 1.0)], config(length=129), tmp_path)
    learn(make(), CHAT, [(Digits(), 1.0)], config(), tmp_path / "a")
    with pytest.raises(UserError, match="rl.group = 4, now it is 5"):
        learn(make(), CHAT, [(Digits(), 1.0)], config(group=5), tmp_path / "a")


def test_same_seed_same_run_other_seed_other_run(tmp_path: Path) -> None:
    def lines(seed: int, name: str) -> dict[str, Any]:
        last = learn(make(noise=0.3), CHAT, [(Digits(), 1.0)], config(seed=seed), tmp_path / name)
        return {k: v for k, v in last.items() if k not in TIMES}

    assert lines(1, "a") == lines(1, "b") != lines(2, "c")
