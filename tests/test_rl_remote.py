"""Episodes by a server elsewhere: the same rules as in the engine, weights that arrive, and a difference that is weighed."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from test_rl_epochs import some_rows, updates_of
from test_rl_learner import CHAT, Calls, Digits, config, make
from test_rl_objectives import LOGP, loss_of, row
from trivet.agent.loop import Episode
from trivet.config import UserError
from trivet.engine import Engine, EngineModel
from trivet.messages import ChatModel, Sampling, Score, StopReason
from trivet.model import Transformer, save_model
from trivet.model.lora import Size, adapter_parameters, attach, places
from trivet.recipes.export import export
from trivet.rl import client, remote
from trivet.rl.config import ServerConfig
from trivet.rl.epochs import Seen
from trivet.rl.learner import learn
from trivet.rl.remote import RemoteModel, Server
from trivet.rl.rewards import Reward
from trivet.rl.rollout import Job, begin
from trivet.spec import GQA, ModelSpec, Rope, SwiGLU

pytest.importorskip("httpx2", reason="a server elsewhere needs the extra: pip install 'trivet[remote]'")


def qwen(seed: int = 0) -> Transformer:
    """A Qwen3, to others."""
    gqa = GQA(heads=2, kv_heads=1, head_dim=8, rope=Rope(dims=8), qk_norm=True)
    spec = ModelSpec(
        vocab_size=CHAT.vocab_size, d_model=16, pattern="gqa/dense*2", mixers={"gqa": gqa},
        ffns={"dense": SwiGLU(hidden=16)}, tie_embeddings=False, context_length=128,
    )  # fmt: skip
    model = Transformer(spec, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return model


def talker() -> Transformer:
    """One that opens and closes thoughts, calls and its turn often."""
    model = qwen(10)
    with torch.no_grad():
        assert model.head is not None
        model.head[[CHAT.think_open_id, CHAT.tool_open_id, CHAT.tool_close_id, CHAT.end_id]] *= 2.5
        model.head[CHAT.think_close_id] *= 1.2
    return model


def saved(model: Transformer, folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_model(model, folder)
    CHAT.save(folder)
    return folder


def serve(directory: Path) -> Iterator[str]:
    program = [sys.executable, str(Path(__file__).with_name("completion_server.py")), str(directory)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerConfig]:
    folder = tmp_path_factory.mktemp("server")
    like = folder / "like"
    export(saved(qwen(), folder / "own"), like)
    for url in serve(like):
        yield ServerConfig(url=url, like=str(like), folder=str(folder))


# ---------------------------------------------------------------------------------------- the same rules
def test_budgets_are_kept_to_the_token(tmp_path: Path) -> None:
    """Greedily, server and engine write the same tokens; what was forced, thought and why it ended, too."""
    model = talker().eval()
    seen: set[Any] = set()
    for url in serve(saved(model, tmp_path / "own")):
        place = ServerConfig(url=url, like="", folder="", model="tiny")
        for thinking in (None, "off", 0, 3, 9):
            sampling = Sampling(temperature=0.0, max_tokens=24, thinking=thinking)
            jobs = [Job(Calls(), Calls().problem("train", i), sampling, i % 2 == 0) for i in range(12)]  # type: ignore[arg-type]
            engine = EngineModel(Engine(model, CHAT, 16, 65), CHAT)
            want = engine.run([begin(engine, job, 4) for job in jobs])
            for ours, theirs in zip(asyncio.run(over(place, jobs)), want, strict=True):
                assert facts(ours) == facts(theirs)
                seen |= {(theirs.stop, theirs.budget_hit, theirs.reasoning_tokens > 3, len(theirs.completions) > 1)}
    assert {stop for stop, *_ in seen} >= {StopReason.END, StopReason.LENGTH}
    assert all({case[i] for case in seen} == {True, False} for i in (1, 2, 3)), seen


async def over(place: ServerConfig, jobs: list[Job]) -> list[Episode]:
    async with Server(place, 8) as server:
        await server.find()
        model: ChatModel = RemoteModel(server, CHAT, 65)
        return list(await asyncio.gather(*(begin(model, job, 4) for job in jobs)))


def facts(episode: Episode) -> list[Any]:
    return [episode.stop, *(
        (c.tokens, c.sampled, c.stop, c.reasoning_tokens, c.budget_hit, c.prompt_tokens, c.text)
        for c in episode.completions
    )]  # fmt: skip


# ------------------------------------------------------------------------------------------- learning
def test_it_learns_from_a_server(place: ServerConfig, tmp_path: Path) -> None:
    logged: list[dict[str, Any]] = []
    asked = config(steps=3, muon_lr=0.02, thinking=4, temperature=0.8, server=place)
    learn(qwen(), CHAT, [(Digits(), 1.0), (Calls(), 1.0)], asked, tmp_path / "a", progress=logged.append)
    assert len(logged) == 3
    for line in logged:  # the weights of each step were there, or they would disagree
        assert line["server/failed"] == 0
        assert 0 < line["mismatch/max_abs_log"] < 1e-4 and line["ratio/max_abs_log"] == 0
        assert line["tis/mean"] == pytest.approx(1, abs=1e-4) and line["tis/capped"] == 0
    assert logged[0]["budget_hit"] > 0


def test_adapters_reach_the_server_merged(place: ServerConfig, tmp_path: Path) -> None:
    logged: list[dict[str, Any]] = []
    model = qwen()
    attach(model, dict.fromkeys(places(model), Size(4, 8, False)))
    asked = config(steps=3, adam_lr=0.05, server=place)
    learn(model, CHAT, [(Digits(), 1.0)], asked, tmp_path, progress=logged.append)
    assert all(line["mismatch/max_abs_log"] < 1e-4 for line in logged)
    assert max(p.abs().max() for name, p in adapter_parameters(model).items() if name.endswith(".b")) > 0.05


def test_a_batch_ahead_from_a_server(place: ServerConfig, tmp_path: Path) -> None:
    logged: list[dict[str, Any]] = []
    asked = config(steps=2, lag=1, server=place)
    learn(qwen(), CHAT, [(Digits(), 1.0)], asked, tmp_path, progress=logged.append)
    assert logged[0]["mismatch/max_abs_log"] < 1e-4 and logged[0]["tis/mean"] == pytest.approx(1, abs=1e-4)
    assert logged[1]["stale/share"] == 1 and logged[1]["tis/mean"] == 1


def test_a_judge_may_have_an_event_loop_of_its_own(place: ServerConfig, tmp_path: Path) -> None:
    async def opinion() -> Score:
        return Score(0.5)

    judge = Reward("judge", 1.0, lambda cases: [asyncio.run(opinion()) for _ in cases])
    told = learn(qwen(), CHAT, [(Digits(), 1.0)], config(steps=1, server=place), tmp_path, rewards=(judge,))
    assert told["not_ok"] == 0 and told["reward/judge"] == 0.5


def test_weights_that_do_not_arrive_stop_the_run(place: ServerConfig, tmp_path: Path) -> None:
    """The twin, and the other way to push."""
    learning = {"steps": 3, "muon_lr": 0.02, "problems": 8}
    elsewhere = place.model_copy(update={"push": ("touch", str(tmp_path / "pushed"), "{path}/model.safetensors")})
    with pytest.raises(UserError, match="at step [01]: engine and trainer disagree.* See that the server takes"):
        once = place.model_copy(update={"push": ("true",)})
        learn(qwen(), CHAT, [(Digits(), 1.0)], config(**learning, server=once), tmp_path / "a")
    with pytest.raises(UserError, match="engine and trainer disagree"):
        learn(qwen(), CHAT, [(Digits(), 1.0)], config(**learning, server=elsewhere), tmp_path / "b")
    assert (tmp_path / "pushed").exists() and (Path(place.folder) / "weights/model.safetensors").exists()
    with pytest.raises(UserError, match=r"rl.server.push: false failed \(1\)"):
        no = place.model_copy(update={"push": ("false",)})
        learn(qwen(), CHAT, [(Digits(), 1.0)], config(**learning, server=no), tmp_path / "c")


def test_a_server_that_is_gone(place: ServerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "WAITS", (0.0, 0.0))
    gone = place.model_copy(update={"url": "http://127.0.0.1:9", "model": "tiny", "push": ("true",)})
    with pytest.raises(UserError, match=r"could not be graded \(16 error\).*generation: http://127.0.0.1:9/v1/comp"):
        learn(qwen(), CHAT, [(Digits(), 1.0)], config(server=gone), tmp_path)


def test_one_that_is_busy_is_asked_again(place: ServerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def asked() -> tuple[remote.Piece, int]:
        async with Server(place.model_copy(update={"model": "tiny"}), 1) as server:
            await server.ask("POST", "/be_busy")
            return await server.go_on((5, 6, 7), 4, (), 1.0, 3), server.failed

    monkeypatch.setattr(client, "WAITS", (0.0, 0.0))
    piece, failed = asyncio.run(asked())
    assert failed == 1 and len(piece.tokens) == len(piece.logprobs) == 4 and piece.full
    monkeypatch.setattr(client, "WAITS", (0.0,))
    with pytest.raises(remote.Failed, match="503: .*busy"):
        asyncio.run(asked())


# ------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"token_ids": None}, "returns no token ids"),
        ({"logprobs": None}, "returns no log-probability for each"),
        ({"logprobs": {"token_logprobs": [-1.0]}}, "returns no log-probability for each"),
        ({"logprobs": {"token_logprobs": [-1.0, None]}}, "returns no log-probability for each"),
        ({"prompt_token_ids": [0, 7, 8]}, "changes prompts"),
    ],
)
def test_what_an_answer_must_hold(change: dict[str, Any], says: str) -> None:
    server = Server(ServerConfig(url="http://x", like="", folder=""), 1)
    choice = {
        "token_ids": [3, 4], "logprobs": {"token_logprobs": [-1.0, -2.0]}, "finish_reason": "stop",
        "prompt_token_ids": [7, 8],
    }  # fmt: skip
    piece = server._read({"choices": [choice]}, (7, 8))
    assert (piece.tokens, piece.logprobs, piece.full) == ([3, 4], [-1.0, -2.0], False)
    with pytest.raises(UserError, match=says):
        server._read({"choices": [choice | change]}, (7, 8))
    with pytest.raises(UserError, match="is no completion"):
        server._read({"error": "?"}, (7, 8))


def test_what_can_not_be_asked_for(place: ServerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for change, says in (
        ({"top_p": 0.9}, "not asked for top_p"),
        ({"halt_repeating": 30}, "not asked for halt_repeating"),
        ({"replay": "sampler"}, "which a server does not say"),
        ({"server": place.model_copy(update={"model": "other"})}, "refused: 404"),
        ({"server": place.model_copy(update={"push": ("no-such-command",)})}, "no-such-command can't be run"),
        ({"server": place.model_copy(update={"key": "NO_SUCH_KEY"})}, "no environment variable 'NO_SUCH_KEY'"),
    ):
        with pytest.raises(UserError, match=says):
            learn(qwen(), CHAT, [(Digits(), 1.0)], config(**{"server": place} | change), tmp_path / says[:9])
    with pytest.raises(UserError, match="is no model of this shape"):
        learn(make("gqa/moe"), CHAT, [(Digits(), 1.0)], config(server=place), tmp_path / "z")
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(UserError, match=r"pip install 'trivet\[remote\]'"):
        Server(place, 1)
    with pytest.raises(ValueError, match="both play the episodes"):
        config(server=place, workers=2)


# ----------------------------------------------------------------------------- truncated importance sampling
def test_the_weight_multiplies_the_surrogate_and_not_the_kl_term() -> None:
    scale = torch.tensor([0.5, 2.0, 1.0, 1.5, 9.0, 0.25], dtype=torch.float64)
    # dapo by hand: 2.56 0.5 + 2 2 + 1 1 = 6.28 and -0.8 1.5 - 2 0.25 = -1.7; over 5 tokens: 4.58 / 5
    assert loss_of(row("dapo"), scale=scale)[0].item() == pytest.approx(-0.916)
    grpo = [loss_of(row("grpo", kl=kl), scale=scale, logp_ref=LOGP + math.log(2))[0].item() for kl in (0.04, 0.0)]
    assert grpo[0] - grpo[1] == pytest.approx(0.04 * (2 - math.log(2) - 1))


def test_tokens_are_weighed_by_what_trainer_and_engine_think_of_them() -> None:
    """An engine that says p / e^0.5 everywhere has its tokens count e^0.5 times; e^1 times is cut to 2."""
    model = qwen()
    rows = [r for r in some_rows(model) if any(r.trained)]
    advantage = torch.linspace(-1, 1, len(rows))

    def gradient(shift: float, **changes: Any) -> tuple[torch.Tensor, dict[str, float]]:
        moved = [
            replace(r, logprobs=tuple(p - shift * t for p, t in zip(r.logprobs, r.trained, strict=True))) for r in rows
        ]
        updates, seen = updates_of(model, **changes), Seen()
        updates.backward(updates.minibatch(moved, range(len(rows)), advantage), seen)
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        updates.optimizer.zero_grad()
        return found, seen.metrics

    plain, none = gradient(0.5)
    assert plain.abs().max() > 1e-3 and "tis/mean" not in none
    for shift, weight, capped in ((0.5, math.exp(0.5), 0), (-0.7, math.exp(-0.7), 0), (1.0, 2.0, 1)):
        weighed, metrics = gradient(shift, correction="tis")
        torch.testing.assert_close(weighed, weight * plain, rtol=1e-3, atol=1e-6)
        assert metrics["tis/mean"] == pytest.approx(weight, rel=1e-4) and metrics["tis/capped"] == capped
