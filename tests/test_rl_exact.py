"""What is trained is what was sampled, and the trainer's first forward is the sampler's distribution.

Two halves. For every kind of layer: the ratio of a first update is 1 to the bit, engine and trainer differ by
rounding, and log-probabilities are those of a plain forward pass over one row. For every chat template and
syntax of tool calls: a hundred random episodes of up to six turns, whose tokens a script draws in the real
engine (thoughts over their budget, calls that are good, unknown, malformed or cut short); the tokens that carry
a loss are those that were drawn and kept, and no others.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trivet.engine.writing as writing
from chat_templates import FAMILIES
from test_rl_learner import CHAT, Calls, config, make
from trivet.agent.loop import Episode, Row, ToolStep, row, run_episode
from trivet.chat import Chat, bpe_chat, tiny_chat
from trivet.chat.builtin import TEMPLATE
from trivet.config import UserError
from trivet.engine import Engine, EngineModel
from trivet.messages import Message, Sampling, Score, StopReason, ToolCall
from trivet.model import Routing, Transformer
from trivet.rl.learner import _Run, learn
from trivet.rl.rollout import Attempt, Job, play
from trivet.rl.update import pack
from trivet.tools import Tool

# --------------------------------------------------------------------------------------- every kind of layer
LAYERS = {
    "gqa": "gqa/dense*2", "mla": "mla/dense*2", "moe": "gqa/moe*2", "lightning": "lightning/dense*2",
    "delta": "delta/dense*2", "hybrid": "lightning/moe delta/dense gqa/moe mla/moe",
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
def test_the_first_ratio_is_one_to_the_bit(kind: str, tmp_path: Path) -> None:
    last = learn(make(LAYERS[kind], noise=0.3), CHAT, [(Calls(), 1.0)], config(problems=8), tmp_path)
    assert last["ratio/max_abs_log"] == 0.0
    assert 0 < last["mismatch/max_abs_log"] < 1e-4  # not 0: cached and packed sums differ in their rounding
    assert 0 <= last["mismatch/kl"] < 1e-7
    assert last["no_spread"] < 1 and last["grad_norm"] > 0


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_logprobs_are_those_of_one_plain_row(kind: str) -> None:
    model = make(LAYERS[kind], noise=0.3)
    jobs: Any = [Job(Calls(), Calls().problem("train", s), Sampling(max_tokens=10, seed=s)) for s in range(6)]  # type: ignore[arg-type]
    rows = [attempt.row for attempt in play(Engine(model.eval(), CHAT, 6, 65), jobs, 3)]
    run = _Run(model, CHAT, [], config(temperature=0.8), Path("nowhere"), "cpu")
    for part in pack(rows, 2, 64):
        with torch.no_grad():
            got = run.updates.logprobs(model, part, Routing())[0]
        want = [plain(model, rows[s], 0.8) for s in sorted(set(part.sequence.tolist()))]
        by_row = [got[part.sequence == s] for s in sorted(set(part.sequence.tolist()))]
        for a, b in zip(by_row, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
            assert (a[1:] - b[:-1]).abs().max() > 0.1  # the twin: one token off is another number


@torch.no_grad()
def plain(model: Any, row: Row, temperature: float) -> Tensor:
    """log p of the trained tokens, with nothing packed, padded, cached or chunked."""
    logp = (model.logits(model(torch.tensor([row.ids[:-1]])))[0] / temperature).log_softmax(-1)
    trained = torch.tensor(row.trained[1:])
    return logp[torch.arange(len(logp)), torch.tensor(row.ids[1:])][trained]


# ------------------------------------------------------------------------------------- every template and syntax
def note(text: str, times: int = 1) -> str:
    """Write something down."""
    return f"noted {text!r} {times} times <think>"


NOTE = Tool(note)
TURNS, EPISODES = 6, 100


@cache
def chat_of(name: str) -> Chat:
    from test_chat_syntax import family

    if name in ("tiny", "bpe"):
        return tiny_chat() if name == "tiny" else bpe_chat(["hello world, 12+3=15. Thinking helps. "] * 40, 400)
    return family(name)


@dataclass
class Script:
    """Tokens that one episode's model will draw, turn by turn, and those that it drew: (turn, place) -> token."""

    turns: list[list[int]]
    turn: int = -1
    at: int = 0
    drawn: dict[tuple[int, int], int] = field(default_factory=dict)

    def draw(self, place: int) -> int:
        if place == 0:
            self.turn, self.at = self.turn + 1, 0
        said = self.turns[self.turn]
        token = said[min(self.at, len(said) - 1)]  # a turn that does not end goes on with its last token
        self.at += 1
        self.drawn[self.turn, place] = token
        return token


class Blind(Transformer):
    """It computes nothing: what is drawn is in a script, and the rules are the engine's."""

    def forward(self, tokens: Tensor, *args: Any, **more: Any) -> Tensor:
        return torch.zeros(*tokens.shape, self.spec.d_model)


def a_call(chat: Chat, name: str) -> list[int]:
    """How this model writes a call, tags included."""
    text = "11+1" if chat.markers.tool_syntax == "bare" else "x"
    talk = [Message("user", "?"), Message("assistant", tool_calls=(ToolCall("call-0", name, {"text": text}),))]
    rendered = chat.render(talk, [NOTE.spec])
    return [i for i, wrote in zip(rendered.ids, rendered.mask, strict=True) if wrote]


def a_turn(chat: Chat, rng: random.Random, calls: list[list[int]], last: bool) -> list[int]:
    tags = {*chat.tag_ids, *(t for t in [chat.tokenizer.token_to_id("<unk>")] if t is not None)}
    words = [i for i in range(chat.vocab_size) if i not in tags and not chat.decode([i]).startswith("<")]
    said: list[int] = []
    if chat.thinks != "never" and rng.random() < 0.6:
        said += [chat.think_open_id] * (rng.random() < 0.7) + rng.choices(words, k=rng.randint(0, 8))
        said += [chat.think_close_id] * (rng.random() < 0.8)
    said += rng.choices(words, k=rng.randint(1, 3)) if rng.random() < 0.2 else []
    call = list(rng.choice(calls))
    how = rng.random()
    if how < 0.1:
        del call[rng.randrange(len(call))]
    elif how < 0.2:
        call.insert(rng.randrange(len(call)), rng.choice(words))
    elif how < 0.25:
        call = call[: rng.randrange(len(call))]
    said += call if not last or rng.random() < 0.3 else []
    return [*said, chat.end_id]


def scripted_episodes(name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Script, Episode]]:
    chat, rng = chat_of(name), random.Random(name)
    calls = [a_call(chat, "note")] * 4 + [a_call(chat, "nope")]
    scripts = {
        seed: Script([a_turn(chat, rng, calls, last=turn == TURNS - 1) for turn in range(TURNS)])
        for seed in range(EPISODES)
    }

    def drawn(logits: Tensor, settings: Any, index: Tensor, steered: Any, sets: Any) -> tuple[Tensor, ...]:
        tokens = [scripts[s].draw(i) for s, i in zip(settings.seed.tolist(), index.tolist(), strict=True)]
        return torch.tensor(tokens), -torch.rand(len(tokens)), torch.zeros(len(tokens))

    monkeypatch.setattr(writing, "sample", drawn)
    slots = 3000
    spec = make().spec.model_copy(update={"vocab_size": chat.vocab_size, "context_length": slots})
    model = EngineModel(Engine(Blind(spec), chat, EPISODES, slots), chat)
    thinks = chat.thinks != "never"
    samplings = [
        Sampling(max_tokens=rng.choice((30 + len(chat.closing_ids), 1500)), thinking=rng.choice((None, 0, 5)) if thinks else None, seed=seed,
                 answer_reserve=4)
        for seed in scripts
    ]  # fmt: skip
    episodes = model.run([run_episode(model, [Message("user", "so?")], [NOTE], s, TURNS) for s in samplings])
    return list(zip(scripts.values(), episodes, strict=True))


@pytest.mark.parametrize("name", ["tiny", "bpe", *FAMILIES])
def test_ids_trained_are_ids_sampled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = chat_of(name)
    played = scripted_episodes(name, monkeypatch)
    rows = [row(episode) for _, episode in played]
    for (script, episode), r in zip(played, rows, strict=True):
        kept, forced = kept_and_forced(chat, script, episode)
        found = [(at, token) for at, (token, trained) in enumerate(zip(r.ids, r.trained, strict=True)) if trained]
        assert found == kept
        assert all((p < 0) == trained for p, trained in zip(r.logprobs, r.trained, strict=True))
        assert not forced & {at for at, _ in found}
    packed: dict[int, list[int]] = {}
    some = [i for i, r in enumerate(rows) if any(r.trained)]
    for part in pack([rows[i] for i in some], 4, 3000):
        for s, target in zip(part.sequence.tolist(), part.targets.tolist(), strict=True):
            packed.setdefault(some[s], []).append(target)
    assert packed == {i: [t for t, wrote in zip(rows[i].ids, rows[i].trained, strict=True) if wrote] for i in some}
    check_coverage(chat, [episode for _, episode in played])
    if name in ("bpe", *FAMILIES):  # the twin: ids made from the text again are others
        again = [chat.encode_text(chat.decode(r.ids)) for r in rows]
        assert sum(list(r.ids) != ids for r, ids in zip(rows, again, strict=True)) > EPISODES / 5


def kept_and_forced(chat: Chat, script: Script, episode: Episode) -> tuple[list[tuple[int, int]], set[int]]:
    """From what was drawn alone: which (place in the row, token) were kept, and the places that were forced.

    A token that was drawn where a thought had to end gave way to the closing message: then no other was drawn
    within its length.
    """
    kept, forced = [], set[int]()
    for turn, done in enumerate(episode.completions):
        start = len(done.prompt_tokens)
        places = sorted(place for t, place in script.drawn if t == turn)
        for place, following in pairwise([*places, len(done.tokens)]):
            if following == place + 1 and done.sampled[place]:
                kept.append((start + place, script.drawn[turn, place]))
            else:
                written = done.tokens[place:following]
                assert list(written) == chat.closing_ids[-len(written) :] and done.budget_hit
                forced |= set(range(start + place, start + following))
        assert places[:1] in ([], [0])
    return kept, forced


def check_coverage(chat: Chat, episodes: list[Episode]) -> None:
    """The hundred episodes hold what they are meant to hold."""
    results = [step for e in episodes for step in e.steps if isinstance(step, ToolStep)]
    bare = chat.markers.tool_syntax == "bare"
    assert sum(len(e.completions) == TURNS for e in episodes) >= 5
    assert sum(s.result.status == "ok" for s in results) > 50
    assert bare or any("no tool 'nope'" in s.result.text for s in results)
    untagged = bool(chat.syntax.start)  # then what can't be read as a call is an answer
    assert bare or untagged or any(s.call.error for s in results)
    assert any(e.stop is StopReason.LENGTH for e in episodes)
    assert chat.thinks == "never" or sum(e.budget_hit for e in episodes) >= 10


# ---------------------------------------------------------------------------------------------- the error
def test_a_template_that_changes_earlier_turns_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_chat()
    for template, fits in ((TEMPLATE, True), ("{{ messages | length }}" + TEMPLATE, False)):
        chat = Chat(tiny.tokenizer, template, tiny.markers)
        jobs: Any = [Job(Calls(), Calls().problem("train", 0), Sampling())]  # type: ignore[arg-type]
        call = a_call(chat, "")
        script = Script([call, [chat.end_id]])
        monkeypatch.setattr(
            writing, "sample",
            lambda logits, settings, index, steered, sets, s=script: (
                torch.tensor([s.draw(int(index[0]))]), torch.full((1,), -1.0), torch.zeros(1)),
        )  # fmt: skip
        model = EngineModel(Engine(Blind(make().spec), chat, 1, 120), chat)
        episode = asyncio.run(run_episode(model, [Message("user", "1+1=")], [NOTE], Sampling(max_tokens=50), 3))
        assert len(episode.completions) == 2
        attempt = Attempt(jobs[0], episode, Score(1.0))
        if fits:
            assert sum(attempt.row.trained) == sum(len(c.tokens) for c in episode.completions)
            continue
        with pytest.raises(UserError, match="chat template changes earlier turns.*use one that only appends"):
            _ = attempt.row
        lost = replace(episode, steps=episode.steps[:1])  # one turn alone is a row under any template
        assert sum(row(lost).trained) == len(episode.completions[0].tokens)
