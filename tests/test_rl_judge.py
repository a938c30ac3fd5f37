"""A judge over HTTP: a real server on this machine answers well, badly, late or not at all, and each is counted."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from test_rl_learner import CHAT, Digits, config
from test_rl_learner import make as make_model
from test_rl_rewards import case
from trivet.config import UserError
from trivet.messages import Score
from trivet.recipes.judging import known_rewards
from trivet.recipes.kinds.rl import RLStage
from trivet.rl import client
from trivet.rl.learner import learn
from trivet.rl.rewards import Reward, make_rewards

pytest.importorskip("httpx2", reason="a judge over HTTP needs the extra: pip install 'trivet[remote]'")
KEY = "a-secret-of-the-test"


class Judge(ThreadingHTTPServer):
    """Does what the answer that it is shown says."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.now, self.most = threading.Lock(), 0, 0
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []


class Handler(BaseHTTPRequestHandler):
    server: Judge
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        judge, asked = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with judge.lock:
            judge.now += 1
            judge.most = max(judge.most, judge.now)
            judge.asked.append(asked)
            judge.keys.append(self.headers["Authorization"])
        try:
            assert self.path == "/v1/chat/completions"
            self.behave(asked["messages"][0]["content"])
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # whoever asked has gone
        finally:
            with judge.lock:
                judge.now -= 1

    def behave(self, what: str) -> None:
        if what == "500" or (what == "500 once" and what not in self.seen()[:-1]):
            self.say("out of order", 500)
        elif what == "401":
            self.say(f"wrong key: {self.headers['Authorization']}", 401)
        elif what == "slow":
            time.sleep(1.5)
            self.say(answer("Score: 10"))
        elif what == "drips":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(15):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
        elif what == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [{"mess')
            self.close_connection = True
        else:
            time.sleep(0.04)
            said = {"no JSON": "<html>", "no choice": "{}", "a list": "[1]", "no text": answer(None)}
            said |= {
                "half": answer("Score: 1", "length"),
                "babble": answer("fine"),
                "more": answer("Score: 1.", "length"),
            }
            self.say(said.get(what, answer(f"Well.\nScore: {what}")))

    def seen(self) -> list[str]:
        return [asked["messages"][0]["content"] for asked in self.server.asked]

    def say(self, text: str, code: int = 200) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""


def answer(text: str | None, why: str = "stop") -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": why}]})


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    monkeypatch.setattr(client, "WAITS", (0.0, 0.0))
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = Judge()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def term(judge: Judge, **more: Any) -> tuple[Reward, ...]:
    server = {"url": f"http://127.0.0.1:{judge.server_port}/v1", "key": "JUDGE_KEY", "seconds": 20.0, **more}
    table = {"name": "judge", "weight": 0.5, "model": "any", "template": "{answer}", "server": server}
    return make_rewards([table], known_rewards(Path, torch.device("cpu")))


def scores(judge: Judge, *answers: str, **more: Any) -> Sequence[Score]:
    (reward,) = term(judge, **more)
    return reward.term([case(text) for text in answers])


def test_a_servers_opinion_is_the_score(judge: Judge) -> None:
    found = scores(judge, "10", "5.5", "1", body={"temperature": 0.2, "top_p": 1.0})
    assert [(s.status, s.value) for s in found] == [("ok", 1.0), ("ok", 0.5), ("ok", 0.0)]
    assert set(judge.keys) == {f"Bearer {KEY}"}
    assert sorted(asked["messages"][0]["content"] for asked in judge.asked) == ["1", "10", "5.5"]
    assert {k: v for k, v in judge.asked[0].items() if k != "messages"} == {
        "model": "any", "temperature": 0.2, "max_tokens": 512, "top_p": 1.0,
    }  # fmt: skip
    scores(judge, "1", body={"max_completion_tokens": 9})
    assert "max_tokens" not in judge.asked[-1] and judge.asked[-1]["max_completion_tokens"] == 9


@pytest.mark.parametrize(
    ("what", "status", "detail", "times"),
    [
        ("500", "error", "500: out of order", 2),
        ("500 once", "unparsed", "outside", 2),  # asked again, and then it answers: "Score: 500 once"
        ("401", "error", "refused: 401: wrong key: Bearer ***", 1),
        ("slow", "timeout", "no answer in 1 s", 2),
        ("drips", "timeout", "no answer in 1 s", 2),
        ("cut", "error", "ProtocolError", 2),
        ("no JSON", "error", "no JSON: <html>", 1),
        ("no choice", "error", "no chat completion", 1),
        ("a list", "error", "no chat completion", 1),
        ("no text", "error", "has no text", 1),
        ("babble", "unparsed", "wrote no score", 1),
        ("half", "unparsed", "cut off in its score", 1),
        ("more", "ok", "", 1),
        ("11", "unparsed", "outside 1..10", 1),
    ],
)
def test_whatever_the_server_does_the_others_are_graded(
    judge: Judge, what: str, status: str, detail: str, times: int
) -> None:
    one, bad, two = scores(judge, "10", what, "1", seconds=1.0 if status == "timeout" else 20.0)
    assert (one.value, two.value, one.status, two.status) == (1.0, 0.0, "ok", "ok")
    assert (bad.status, bad.value) == (status, 0.0) and detail in bad.detail, bad
    assert [asked["messages"][0]["content"] for asked in judge.asked].count(what) == times
    assert KEY not in bad.detail


def test_no_more_at_once_than_was_said_and_who_waits_is_not_late(judge: Judge) -> None:
    assert all(s.ok for s in scores(judge, *["10"] * 90, at_once=3))
    assert judge.most == 3
    assert all(s.ok for s in scores(judge, *["10"] * 60, at_once=20))
    assert judge.most > 3  # the twin


def test_a_server_that_is_gone(judge: Judge) -> None:
    judge.shutdown()
    judge.server_close()
    assert [s.status for s in scores(judge, "10", "1")] == ["error", "error"]


def test_rl_counts_what_the_judge_failed_at(judge: Judge, tmp_path: Path) -> None:
    """Digits are the texts here: some are scores, others are none."""
    told = learn(
        make_model(noise=0.3), CHAT, [(Digits(), 1.0)], config(steps=1, not_ok_limit=1.0), tmp_path,
        rewards=term(judge),
    )  # fmt: skip
    assert len(judge.asked) == 16 and 0 < told["not_ok/unparsed"] <= 16
    with pytest.raises(UserError, match=r"could not be graded \(16 error\).*reward 'judge': judge: Failed: http.*500"):
        (reward,) = term(judge)
        always = Reward("judge", 0.5, lambda cases: reward.term([case("500") for _ in cases]))
        learn(make_model(), CHAT, [(Digits(), 1.0)], config(), tmp_path / "b", rewards=(always,))


def test_settings(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"name": "judge", "weight": 1.0, "model": "gpt", "server": {"url": "http://x"}}
    stage = RLStage.model_validate({"start": "s", "tasks": [{"name": "chain"}], "rewards": [table], "rl": {"steps": 1}})
    assert stage.inputs() == {"s"}
    del table["server"]
    assert stage.model_copy(update={"rewards": (table,)}).inputs() == {"s", "gpt"}  # the twin: a directory
    with pytest.raises(UserError, match="servers differ in how"):
        make_rewards(
            [{**table, "thinking": 4, "server": {"url": "http://x"}}], known_rewards(Path, torch.device("cpu"))
        )
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(UserError, match=r"judge.server.key: there is no environment variable 'JUDGE_KEY'"):
        term(judge)
