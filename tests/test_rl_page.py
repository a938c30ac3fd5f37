"""Episodes to read: every token with its kind and numbers, on a page that nothing in them can break."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from test_cli_verbs import call
from test_rl_learner import CHAT, Calls, Digits, config, eager_caller, make, play_some
from trivet.chat import bpe_chat
from trivet.config import UserError
from trivet.disk import Journal
from trivet.rl.learner import TIMES, _Run, learn
from trivet.rl.page import LINES, kinds, pieces, write_page


def shown(page: Path) -> Any:
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert data is not None
    return json.loads(data[1])


def test_reading_along_changes_nothing(tmp_path: Path) -> None:
    """The same run with and without: the same metrics, and lines of every second step only."""
    logged = {}
    for every in (0, 2):
        settings = config(steps=5, page_every=every)
        last = learn(make("gqa/moe", noise=0.3), CHAT, [(Calls(), 1.0)], settings, tmp_path / str(every))
        logged[every] = {k: v for k, v in last.items() if k not in TIMES}
    assert logged[0] == logged[2] and not (tmp_path / "0" / LINES).exists()
    lines = Journal(tmp_path / "2" / LINES).read()
    assert [line["step"] for line in lines] == [2] * 16 + [4] * 16
    assert {line["group"] for line in lines} == {0, 1, 2, 3}
    for line in lines:
        wrote = line["kinds"].count("m")
        assert len(line["kinds"]) == len(line["ids"]) == len(line["text"])
        assert wrote == len(line["logprob"]) == len(line["ratio"]) == len(line["entropy"]) > 0
        assert all(abs(ratio - 1) < 1e-3 for ratio in line["ratio"])
        assert all(0 <= h <= torch.tensor(CHAT.vocab_size).log() for h in line["entropy"])
    by_group = [sum(e["advantage"] or 0 for e in lines if (e["step"], e["group"]) == (2, g)) for g in range(4)]
    assert by_group == pytest.approx([0] * 4, abs=1e-3) and any(line["advantage"] for line in lines)


def test_numbers_stand_at_their_tokens(tmp_path: Path) -> None:
    """Against log-probabilities computed one episode at a time, by weights that are not the sampler's any more."""
    model = eager_caller()
    attempts = play_some(model)[:12]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    run = _Run(model, CHAT, [(Calls(), 1.0)], config(group=4, rows=4, length=100), tmp_path, "cpu")
    run.record(attempts, 0)
    lines = Journal(tmp_path / LINES).read()
    away = []
    for attempt, line in zip(attempts, lines, strict=True):
        ids = torch.tensor([attempt.row.ids])
        logp = model.logits(model(ids)[0, :-1]).float().log_softmax(-1)
        at = [i for i, kind in enumerate(line["kinds"]) if kind == "m"]
        for k, i in enumerate(at):
            p = logp[i - 1]
            assert line["logprob"][k] == pytest.approx(attempt.row.logprobs[i], abs=1e-4)
            assert line["ratio"][k] == pytest.approx((p[ids[0, i]] - attempt.row.logprobs[i]).exp().item(), rel=1e-2)
            assert line["entropy"][k] == pytest.approx(-(p.exp() * p).sum().item(), abs=1e-2)
            away.append(abs(line["ratio"][k] - 1))
    assert max(away) > 0.05  # the twin: other weights are seen


def test_kinds_tell_who_wrote() -> None:
    attempts = play_some(eager_caller())
    found = {kind for attempt in attempts for kind in kinds(attempt)}
    assert found == {"p", "t", "f", "m"}
    for attempt in attempts:
        line = kinds(attempt)
        assert [kind == "m" for kind in line] == list(attempt.row.trained)
        first = attempt.episode.completions[0]
        assert line.startswith("p" * len(first.prompt_tokens)) and line.count("p") == len(first.prompt_tokens)


def test_pieces_join_to_the_text() -> None:
    text = 'naïve 漢字 and 👩‍👩‍👧 "quotes"\n' * 3
    chat = bpe_chat(["some other text, so that these characters are bytes"] * 4, 280)
    ids = chat.encode_text(text)
    found = pieces(chat, ids)
    assert len(found) == len(ids) > len(text) and "".join(found) == text
    assert "".join(chat.decode([i]) for i in ids) != text  # the twin: token by token, characters are lost
    assert "".join(pieces(chat, ids[:-30])) == chat.decode(ids[:-30])
    assert pieces(CHAT, CHAT.encode_text("12+3=")) == list("12+3=")


def test_page_holds_what_was_written_and_nothing_runs(tmp_path: Path) -> None:
    attack = "</script><script>alert(1)</script><!-- & ' \" {{ 7*7 }}"

    class Attack(Digits):
        name = attack

    run = tmp_path / "<b>x"
    learn(make(noise=0.3), CHAT, [(Attack(), 1.0)], config(steps=3, page_every=1), run)
    lines = Journal(run / LINES).read()
    page = write_page(run, last=2)
    assert shown(page) == [line for line in lines if line["step"] > 1]
    text = page.read_text()
    assert attack not in text and text.count("</script>") == 2
    assert "<b>x" not in text and "http" not in text  # escaped, and from nowhere
    assert shown(write_page(run, 9, tmp_path / "all.html")) == lines


def test_no_lines_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set rl\.page_every"):
        write_page(tmp_path, 1)


def test_the_verb_says_where_the_page_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(monkeypatch, capsys, "rollouts", str(tmp_path))
    assert code == 1 and "set rl.page_every" in err
    learn(make(noise=0.3), CHAT, [(Digits(), 1.0)], config(steps=1, page_every=1), tmp_path)
    code, out, _ = call(monkeypatch, capsys, "rollouts", str(tmp_path), "--last", "1")
    assert code == 0 and out.strip() == str(tmp_path / "rollouts.html") and len(shown(Path(out.strip()))) == 16
