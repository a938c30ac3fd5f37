"""Episodes played by Ray actors on two nodes: the same bits as in one process, whoever plays and whoever dies."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from test_rl_learner import CHAT, Calls, Digits, config, make
from trivet.config import UserError
from trivet.messages import Message, Score
from trivet.rl import workers
from trivet.rl.learner import TIMES, learn
from trivet.rl.rewards import make_rewards
from trivet.rl.sampler import Batch, Sampler
from trivet.rl.workers import Workers
from trivet.tasks import Problem
from trivet.train.loop import Interrupted

ray = pytest.importorskip("ray", reason="episodes elsewhere need the extra: pip install 'trivet[ray]'")


from ray._private.state import actors  # noqa: E402


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one processor each, as a machine sees them."""
    from ray.cluster_utils import Cluster

    here = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", here)  # the tasks of tests/ are to be found there, too
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        size = {"num_cpus": 1, "object_store_memory": 80_000_000}
        cluster = Cluster(initialize_head=True, head_node_args=size)
        cluster.add_node(**size)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def address(cluster: Any) -> str:
    return str(cluster.address)


TASKS = [(Digits(), 1.0), (Calls(), 1.0)]


def run(
    folder: Path, pattern: str = "gqa/dense mla/moe", **changes: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    logged: list[dict[str, Any]] = []
    model = make(pattern, noise=0.3)
    settings = config(**{"steps": 3, "problems": 5, "muon_lr": 0.02, **changes})
    terms = make_rewards([{"name": "length", "limit": 16, "weight": 0.1}])
    learn(model, CHAT, TASKS, settings, folder, rewards=terms, progress=logged.append)
    return [{k: v for k, v in line.items() if k not in TIMES} for line in logged], model.state_dict()


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def facts(batch: Batch) -> list[Any]:
    return [(a.job.problem, a.job.sampling, a.score, *((c.tokens, c.logprobs) for c in a.episode.completions))
            for a in batch.attempts]  # fmt: skip


def test_a_run_has_the_bits_of_one_process(address: str, tmp_path: Path) -> None:
    here, weights = run(tmp_path / "here", top_p=0.9)
    there, same = run(tmp_path / "there", top_p=0.9, workers=2, ray_address=address)
    assert [line.pop("workers/restarted") for line in there] == [0, 0, 0]
    assert there == here and equal(same, weights) and here[0]["reward/length"] < 0
    assert not equal(run(tmp_path / "other", top_p=0.9, seed=1)[1], weights)  # the twin


def test_recurrent_layers_and_another_number_of_workers_after_a_stop(address: str, tmp_path: Path) -> None:
    _, weights = run(tmp_path / "here", "delta/dense")
    run_until(1, tmp_path / "there", workers=2, ray_address=address)
    _, same = run(tmp_path / "there", "delta/dense", workers=1, ray_address=address)
    assert equal(same, weights)


def run_until(step: int, folder: Path, **changes: Any) -> None:
    """A run that is stopped after a step."""
    model = make("delta/dense", noise=0.3)

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == step:
            signal.raise_signal(signal.SIGINT)

    terms = make_rewards([{"name": "length", "limit": 16, "weight": 0.1}])
    settings = config(steps=3, problems=5, muon_lr=0.02, **changes)
    with pytest.raises(Interrupted):
        learn(model, CHAT, TASKS, settings, folder, rewards=terms, progress=stop)


class Once(Digits):
    """Whoever grades it dies in the middle of its share, if it is the first."""

    name = "once"

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def grade(self, problem: Problem, message: Message) -> Score:
        if not self.mark.exists():
            self.mark.touch()
            os._exit(1)
        return super().grade(problem, message)


def test_one_that_dies_is_started_again_and_its_share_played_once_more(address: str, tmp_path: Path) -> None:
    tasks = [(Once(tmp_path / "died"), 1.0), (Calls(), 1.0)]
    (tmp_path / "died").touch()
    want = [Sampler(make(noise=0.3), CHAT, tasks, config(dynamic=2), "cpu").sample(step) for step in range(2)]
    sampler = Workers(make(noise=0.3), CHAT, tasks, config(dynamic=2, workers=2, ray_address=address), "cpu")
    try:
        assert len({actor["Address"]["NodeID"] for actor in actors().values() if actor["State"] == "ALIVE"}) == 2
        (tmp_path / "died").unlink()
        first, second = sampler.sample(0), sampler.sample(1)
        assert facts(first) == facts(want[0]) and facts(second) == facts(want[1]) != facts(want[0])
        assert [batch.counts["workers/restarted"] for batch in (first, second)] == [1, 0]
    finally:
        sampler.close()


def test_ahead_on_workers_is_ahead(address: str, tmp_path: Path) -> None:
    here, weights = run(tmp_path / "here", lag=1)
    there, same = run(tmp_path / "there", lag=1, workers=2, ray_address=address)
    assert [line.pop("workers/restarted") for line in there] == [0, 0, 0]
    assert there == here and equal(same, weights) and there[1]["stale/share"] == 1


class Deadly(Digits):
    """Whoever grades it dies."""

    name = "deadly"

    def grade(self, problem: Problem, message: Message) -> Score:
        os._exit(1)


def test_episodes_that_kill_every_worker_stop_the_run(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "TRIES", 2)
    sampler = Workers(make(), CHAT, [(Deadly(), 1.0)], config(workers=1, ray_address=address), "cpu")
    try:
        with pytest.raises(UserError, match="2 workers died of the same episodes"):
            sampler.sample(0)
    finally:
        sampler.close()


def test_what_ray_has_no_room_for_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="rl.workers = 3 of 1 CPU each need 3, and Ray has 2"):
        Workers(make(), CHAT, TASKS, config(workers=3, ray_address=address), "cpu")
    with pytest.raises(UserError, match="rl.ray_address = '127.0.0.1:9': no Ray there"):
        Workers(make(), CHAT, TASKS, config(workers=1, ray_address="127.0.0.1:9"), "cpu")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'trivet\[ray\]'"):
        Workers(make(), CHAT, TASKS, config(workers=1), "cpu")
    with pytest.raises(ValueError, match="`partial` cuts the batch of one engine"):
        config(workers=2, partial=0.5)


def test_a_node_that_is_gone_leaves_its_share_to_the_others(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last test of this file, for it takes a node away."""
    sampler = Workers(make(noise=0.3), CHAT, TASKS, config(workers=2, ray_address=cluster.address), "cpu")
    try:
        first = sampler.sample(0)
        cluster.remove_node(next(node for node in cluster.list_all_nodes() if node is not cluster.head_node))
        monkeypatch.setattr(workers, "READY", 3.0)
        with pytest.warns(UserWarning, match="no room to start a worker again: 1 play on"):
            again = sampler.sample(0)
        assert facts(again) == facts(first) and again.counts["workers/restarted"] == 1
    finally:
        sampler.close()
