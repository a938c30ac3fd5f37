"""The engine against the plainest loop there is: one request at a time, the whole text anew for every token."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from test_model_zoo import PATTERNS, noisy, spec_of
from trivet.agent.loop import run_episode
from trivet.chat import Chat, tiny_chat
from trivet.config import UserError
from trivet.engine import Engine, EngineModel, Request, filling
from trivet.engine import rows as tables
from trivet.engine.sampling import Settings, sample
from trivet.messages import Completion, Event, Message, Sampling, StopReason
from trivet.model import Routing, Transformer, blocks
from trivet.model.prompt import Prompt
from trivet.tools import get_tool

CHAT = tiny_chat()
SLOTS = 72


def tags_often(pattern: str = "gqa/dense", seed: int = 0) -> Transformer:
    """A random model that opens and closes thoughts and ends its turn much more often than by chance."""
    spec = spec_of(pattern, tied=False).model_copy(update={"vocab_size": CHAT.vocab_size, "context_length": SLOTS})
    model = noisy(spec, seed=seed)
    assert model.head is not None
    with torch.no_grad():
        direction = torch.randn(spec.d_model, generator=torch.Generator().manual_seed(9))
        model.norm.weight.copy_(direction.sign() * model.norm.weight.abs())
        for token, pull in ((CHAT.think_open_id, 0.3), (CHAT.think_close_id, 0.2), (CHAT.end_id, 0.1)):
            model.head[token] = pull * torch.randn(spec.d_model, generator=torch.Generator().manual_seed(token))
    return model.eval()


def plain(model: Transformer, chat: Chat, request: Request, slots: int = SLOTS) -> Completion:
    """What a request must give, written down a second time and as simply as possible."""
    s, out, sampled, logprobs, raws = request.sampling, [], [], [], []
    room = min(s.max_tokens, slots - len(request.prompt))
    thinking, thought, hit = chat.thinking_open(request.prompt), 0, False
    budget = {None: 10**9, "off": 0}.get(s.thinking, s.thinking)
    assert isinstance(budget, int)
    closing = chat.closing_ids
    last = room - len(closing) - s.answer_reserve
    last = last if last >= 0 else max(room - len(closing) - 1, 0)
    row = [torch.tensor([v]) for v in (s.temperature, s.top_p, s.top_k, s.min_p, s.seed)]
    stop = None
    while stop is None:
        logits = model.logits(model(torch.tensor([[*request.prompt, *out]])))[:, -1]
        drawn = sample(logits, Settings(*row), torch.tensor([len(out)]))
        token, logprob, raw = (t.item() for t in drawn)
        if (
            thinking
            and token != chat.think_close_id
            and (thought >= max(budget - request.reasoning_used, 0) or len(out) >= last)
        ):
            forced = closing[-min(len(closing), room - len(out)) :]
            out, sampled = out + forced, sampled + [False] * len(forced)
            logprobs, raws = logprobs + [0.0] * len(forced), raws + [0.0] * len(forced)
            thinking, hit = False, True
        else:
            thought += thinking and token != chat.think_close_id
            thinking = token == chat.think_open_id or (thinking and token != chat.think_close_id)
            out, sampled, logprobs, raws = [*out, token], [*sampled, True], [*logprobs, logprob], [*raws, raw]
        if out[-1] == chat.end_id:
            stop = StopReason.END
        elif request.stop_on_tool and out[-1] == chat.tool_close_id:
            stop = StopReason.TOOL_CALL
        elif len(out) >= room:
            stop = StopReason.LENGTH
    return Completion(
        chat.decode(out), tuple(out), tuple(sampled), tuple(logprobs), tuple(raws), stop, request.prompt, thought, hit
    )


def requests(count: int, **changes: object) -> list[Request]:
    """Requests that differ in everything: prompts of several lengths, greedy and sampled, budgets."""
    found = []
    for i in range(count):
        prompt = CHAT.render([Message("user", f"{i % 5}+{'1' * (i % 4)}=")], generate=True).ids
        if i % 3 == 1:
            prompt = [*prompt, CHAT.think_open_id]
        sampling = Sampling(
            temperature=(0.0, 1.0, 0.7)[i % 3], top_p=(1.0, 0.9)[i % 2], top_k=(0, 20)[i // 2 % 2], seed=i,
            max_tokens=(24, 9, 40)[i % 3], thinking=(None, 5, 0, "off")[i % 4], answer_reserve=4,  # type: ignore[arg-type]
        )  # fmt: skip
        found.append(Request(tuple(prompt), replace(sampling, **changes)))  # type: ignore[arg-type]
    return found


def differences(ours: list[Completion], theirs: list[Completion]) -> list[int]:
    def close(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return len(a) == len(b) and bool(np.allclose(a, b, atol=1e-4))

    return [
        i
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True))
        if replace(a, logprobs=(), raw_logprobs=()) != replace(b, logprobs=(), raw_logprobs=())
        or not close(a.logprobs, b.logprobs)
        or not close(a.raw_logprobs, b.raw_logprobs)
    ]


@pytest.mark.parametrize("name", PATTERNS)
def test_a_batch_is_the_plain_loop(name: str) -> None:
    model, asked = tags_often(PATTERNS[name]), requests(12)
    with torch.inference_mode():
        want = [plain(model, CHAT, r) for r in asked]
    for rows in (12, 5, 1):  # all at once, in turns, one by one
        assert differences(Engine(model, CHAT, rows, SLOTS).generate(asked), want) == []
    assert {c.stop for c in want} >= {StopReason.LENGTH} and any(c.budget_hit for c in want)
    assert any(False in c.sampled for c in want) and sum(len(c.tokens) for c in want) > 100


@pytest.mark.parametrize("name", PATTERNS)
def test_long_prompts_go_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of two or three tokens by themselves and in blocks of two queries, shorter ones together."""
    for module in (tables, filling):
        monkeypatch.setattr(module, "ALONE", 2)
    monkeypatch.setattr(filling, "LONGEST_PIECE", 3)
    monkeypatch.setattr(blocks, "BLOCK", 2)
    model, asked, pieces = tags_often(PATTERNS[name]), requests(12), list[Prompt]()
    with torch.inference_mode():
        want = [plain(model, CHAT, r) for r in asked]
    monkeypatch.setattr(tables, "Prompt", lambda *how: pieces.append(Prompt(*how)) or pieces[-1])
    assert differences(Engine(model, CHAT, 5, SLOTS).generate(asked), want) == []
    assert {p.real[0] for p in pieces} == {2, 3} and {p.start for p in pieces} > {0}


def test_another_model_gives_other_tokens() -> None:
    """The twin: the comparison above can fail."""
    asked = requests(12)
    other = Engine(tags_often(seed=1), CHAT, 12, SLOTS).generate(asked)
    assert len(differences(Engine(tags_often(), CHAT, 12, SLOTS).generate(asked), other)) > 6


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_budgets_are_kept_to_the_token(data: st.DataObject) -> None:
    """Any budget, room, reserve, place of the prompt: the plain loop's tokens, and what is promised of them."""
    model = MODEL
    asked = []
    for i in range(3):
        body = CHAT.render([Message("user", "7+3=")], generate=True).ids
        opened = data.draw(st.booleans())
        sampling = Sampling(
            temperature=data.draw(st.sampled_from([0.0, 1.0])), seed=data.draw(st.integers(0, 10**6)),
            max_tokens=data.draw(st.integers(3, 40)), thinking=data.draw(st.sampled_from([None, "off", 0, 1, 2, 7])),
            answer_reserve=data.draw(st.sampled_from([0, 3, 16])),
        )  # fmt: skip
        used = data.draw(st.sampled_from([0, 0, 2])) if opened else 0
        asked.append(Request((*body, *([CHAT.think_open_id] * opened)), sampling, used, stop_on_tool=i % 2 == 0))
    done = Engine(model, CHAT, 2, SLOTS).generate(asked)
    with torch.inference_mode():
        assert differences(done, [plain(model, CHAT, r) for r in asked]) == []
    for request, c in zip(asked, done, strict=True):
        check_promises(request, c)


MODEL = tags_often("gqa/dense mla/dense")


def check_promises(request: Request, c: Completion) -> None:
    s = request.sampling
    assert len(c.tokens) <= s.max_tokens
    if s.thinking is not None:
        assert c.reasoning_tokens <= max((0 if s.thinking == "off" else s.thinking) - request.reasoning_used, 0)
    inside, thought, at = CHAT.thinking_open(request.prompt), 0, 0
    while at < len(c.tokens):
        if not c.sampled[at]:  # the engine speaks: the whole closing message, or its end where there is no room
            run = next((k for k in range(at, len(c.tokens)) if c.sampled[k]), len(c.tokens))
            assert list(c.tokens[at:run]) == CHAT.closing_ids[-(run - at) :] and inside and c.budget_hit
            inside, at = False, run
            continue
        thought += inside and c.tokens[at] != CHAT.think_close_id
        inside = c.tokens[at] == CHAT.think_open_id or (inside and c.tokens[at] != CHAT.think_close_id)
        at += 1
    assert thought == c.reasoning_tokens
    room = min(s.max_tokens, SLOTS - len(request.prompt))
    if inside and c.stop is StopReason.LENGTH:  # a thought that nobody closed: only one opened by the last token
        assert c.tokens[-1] == CHAT.think_open_id
    cut_first = c.budget_hit and CHAT.think_close_id not in c.tokens[: c.sampled.index(False)]
    if cut_first and room >= len(CHAT.closing_ids) + s.answer_reserve and CHAT.thinking_open(request.prompt):
        assert c.sampled.index(False) <= room - len(CHAT.closing_ids) - s.answer_reserve  # room for the answer is left


def test_a_thought_that_ends_at_the_budget_was_not_cut() -> None:
    """Greedy thoughts of n tokens: a budget of n leaves them alone, n - 1 cuts them."""
    model, checked = tags_often(), 0
    for seed in range(40):
        prompt = (*CHAT.render([Message("user", "1=")], generate=True).ids, CHAT.think_open_id)
        free = Sampling(temperature=1.0, seed=seed, max_tokens=40)
        engine = Engine(model, CHAT, 4, SLOTS)
        (c,) = engine.generate([Request(prompt, free)])
        if CHAT.think_close_id not in c.tokens or c.budget_hit:
            continue
        n = c.tokens.index(CHAT.think_close_id)
        if n == 0 or CHAT.think_open_id in c.tokens[n:]:
            continue
        exact, less = engine.generate([Request(prompt, replace(free, thinking=k)) for k in (n, n - 1)])
        assert exact.tokens == c.tokens and not exact.budget_hit and exact.reasoning_tokens == n
        assert less.budget_hit and less.reasoning_tokens == n - 1 and less.tokens[: n - 1] == c.tokens[: n - 1]
        checked += 1
    assert checked > 5


# ------------------------------------------------------------------------------------ what comes along
@pytest.mark.parametrize("pattern", ["gqa/moe mla/grouped", "lightning/moe gqa/moe", "delta/moe gqa/moe"])
def test_logprobs_and_experts_are_those_of_the_training_pass(pattern: str) -> None:
    model = tags_often(pattern)
    asked = requests(8, temperature=1.0, top_p=1.0, top_k=0)
    for c in Engine(model, CHAT, 8, SLOTS, record_experts=True).generate(asked):
        routing, start = Routing(), len(c.prompt_tokens)
        ids = torch.tensor([[*c.prompt_tokens, *c.tokens]])
        with torch.inference_mode():
            logp = model.logits(model(ids, routing=routing)).log_softmax(-1)[0, start - 1 : -1]
        want = logp.gather(-1, ids[0, start:, None]).squeeze(-1)
        mine = torch.tensor(c.sampled)
        torch.testing.assert_close(torch.tensor(c.raw_logprobs)[mine], want[mine], atol=1e-5, rtol=1e-5)
        assert c.logprobs == c.raw_logprobs and not any(p for p, s in zip(c.logprobs, c.sampled, strict=True) if not s)
        assert c.experts is not None and len(c.experts) == 2
        for chosen, layer in zip(c.experts, routing.experts, strict=True):
            np.testing.assert_array_equal(np.sort(chosen), np.sort(layer[0, :-1].numpy()))


def test_a_group_computes_its_prompt_once() -> None:
    model = tags_often("gqa/dense lightning/dense delta/dense")
    prompt = tuple(CHAT.render([Message("user", "8?1?7?5=9")], generate=True).ids)
    group = [Request(prompt, Sampling(temperature=1.0, seed=s, max_tokens=20)) for s in range(6)]
    engine = Engine(model, CHAT, 6, SLOTS)
    shared = engine.generate(group)
    assert engine.stats.prompt_tokens == len(prompt) - 1 and engine.stats.shared_tokens == 5 * (len(prompt) - 1)
    alone = [Engine(model, CHAT, 1, SLOTS).generate([r])[0] for r in group]
    assert differences(shared, alone) == [] and len({c.tokens for c in shared}) > 3


def test_stop_strings_may_span_tokens() -> None:
    model = tags_often()
    free = requests(20, temperature=1.0, max_tokens=30, thinking=None)
    for request, c in zip(free, Engine(model, CHAT, 20, SLOTS).generate(free), strict=True):
        if len(c.tokens) < 8 or not all(c.sampled):
            continue
        stop = CHAT.decode(c.tokens[4:6])
        (cut,) = Engine(model, CHAT, 1, SLOTS).generate(
            [replace(request, sampling=replace(request.sampling, stop=(stop,)))]
        )
        assert cut.stop is StopReason.STOP_STRING and stop in cut.text
        assert cut.tokens == c.tokens[: len(cut.tokens)] and stop not in CHAT.decode(cut.tokens[:-1])


# -------------------------------------------------------------------------------- things that go wrong
def test_cancelling_frees_and_disturbs_nobody() -> None:
    model, asked = tags_often(), requests(9, max_tokens=30)
    want = Engine(model, CHAT, 9, SLOTS).generate(asked)
    engine = Engine(model, CHAT, 4, SLOTS)
    ids = [engine.add(r) for r in asked]
    engine.cancel(ids[8])  # before the first step, still waiting
    done: dict[int, Completion] = {}
    for step in range(400):
        done |= engine.step()
        if step == 3:
            engine.cancel(ids[1])
            engine.cancel(ids[1])  # twice is once
        if not engine.busy:
            break
    done |= engine.step()
    assert set(done) == set(ids) and not engine.busy
    assert done[ids[8]].stop is StopReason.CANCELLED and done[ids[8]].tokens == ()
    cut = done[ids[1]]
    assert cut.stop is StopReason.CANCELLED and cut.tokens == want[1].tokens[: len(cut.tokens)] and len(cut.tokens) == 4
    rest = [i for i in range(9) if i not in (1, 8)]
    assert differences([done[ids[i]] for i in rest], [want[i] for i in rest]) == []


def test_a_poisoned_row_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = tags_often(), requests(6, max_tokens=20)
    want = Engine(model, CHAT, 6, SLOTS).generate(asked)
    engine, real, calls = Engine(model, CHAT, 6, SLOTS), Transformer.logits, [0]

    def logits(self: Transformer, hidden: torch.Tensor) -> torch.Tensor:
        out = real(self, hidden)
        calls[0] += 1
        if calls[0] == 3:
            out[0] = float("nan")
        return out

    monkeypatch.setattr(Transformer, "logits", logits)
    done = engine.generate(asked)
    bad = [i for i, c in enumerate(done) if c.stop is StopReason.ERROR]
    assert len(bad) == 1 and "not finite" in (done[bad[0]].error or "") and len(done[bad[0]].tokens) == 2
    rest = [i for i in range(6) if i not in bad]
    assert differences([done[i] for i in rest], [want[i] for i in rest]) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"min_p": 2.0}, "min_p"), ({"top_k": -1}, "top_k"),
     ({"max_tokens": 0}, "max_tokens"), ({"thinking": -5}, "thinking"), ({"thinking": "on"}, "thinking")],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Engine(MODEL, CHAT, 1, SLOTS).add(requests(1, **change)[0])


def test_prompts_without_room_are_refused() -> None:
    engine, one = Engine(MODEL, CHAT, 1, SLOTS), Sampling(max_tokens=1)
    with pytest.raises(UserError, match="at least one prompt token"):
        engine.add(Request((), one))
    with pytest.raises(UserError, match=f"holds {SLOTS}"):
        engine.add(Request((5,) * SLOTS, one))
    with pytest.raises(UserError, match="too few to close"):
        engine.add(Request((5, CHAT.think_open_id), one))


# ------------------------------------------------------------------------------------- as a ChatModel
def collect(model: EngineModel, messages: list[Message], sampling: Sampling) -> list[tuple[int, Event]]:
    """Events, each with the number of engine steps that had been made when it came."""
    steps, real = [0], model.engine.step

    def step() -> list[tuple[int, Completion]]:
        steps[0] += 1
        return real()

    async def run() -> list[tuple[int, Event]]:
        return [(steps[0], event) async for event in model.stream(messages, (), sampling)]

    model.engine.step = step  # type: ignore[method-assign]
    return asyncio.run(run())


def test_a_stream_comes_as_it_is_made() -> None:
    messages, sampling = [Message("user", "7+3=")], Sampling(temperature=1.0, seed=4, max_tokens=30, answer_reserve=2)
    events = collect(EngineModel(Engine(tags_often(), CHAT, 1, SLOTS), CHAT), messages, sampling)
    done = events[-1][1].message
    assert done is not None and done.completion is not None
    for kind, text in (("text", done.content), ("reasoning", done.reasoning or "")):
        assert "".join(e.text for _, e in events if e.kind == kind) == text
    arrived = [step for step, e in events[:-1]]
    assert arrived[0] <= 3 and len(set(arrived)) > 10, "everything came at once: that is no stream"


def test_neither_stream_nor_message_shows_a_stop_string() -> None:
    messages, plain = [Message("user", "7+3=")], Sampling(temperature=1.0, seed=4, max_tokens=30, answer_reserve=2)
    model = EngineModel(Engine(tags_often(), CHAT, 1, SLOTS), CHAT)
    free = asyncio.run(model.complete(messages, (), plain))
    said, kind = max((free.content, "text"), (free.reasoning or "", "reasoning"), key=lambda pair: len(pair[0]))
    stop = said[3:5]
    stopping = replace(plain, stop=(stop,))
    whole = asyncio.run(model.complete(messages, (), stopping))
    events = [event for _, event in collect(model, messages, stopping)]
    assert whole.completion is not None and whole.completion.stop is StopReason.STOP_STRING
    assert stop in whole.completion.text  # the exact tokens stay
    assert "".join(e.text for e in events if e.kind == kind) == said[: said.index(stop)]
    assert (whole.content if kind == "text" else whole.reasoning) == said[: said.index(stop)]
    assert events[-1].message == whole


def greedy(model: EngineModel) -> Callable[[str], Message]:
    async def one(text: str) -> Message:
        return await model.complete([Message("user", text)], (), Sampling(temperature=0.0, max_tokens=20))

    return lambda text: asyncio.run(one(text))


def test_many_conversations_share_one_batch() -> None:
    model = tags_often()
    engine = Engine(model, CHAT, 8, SLOTS)
    shared = EngineModel(engine, CHAT)
    prompts = [f"{i}+{i}=" for i in range(8)]
    together = shared.run(
        [shared.complete([Message("user", p)], (), Sampling(temperature=0.0, max_tokens=20)) for p in prompts]
    )
    assert engine.stats.peak_rows == 8
    alone = greedy(EngineModel(Engine(model, CHAT, 1, SLOTS), CHAT))
    assert [m.content for m in together] == [alone(p).content for p in prompts]


def test_a_failing_conversation_ends_the_run_and_leaves_nothing_behind() -> None:
    engine = Engine(tags_often(), CHAT, 4, SLOTS)
    shared = EngineModel(engine, CHAT)

    async def bad() -> Message:
        raise ZeroDivisionError("a tool's own bug")

    good = shared.complete([Message("user", "1+1=")], (), Sampling(max_tokens=20))
    with pytest.raises(ZeroDivisionError):
        shared.run([good, bad()])
    assert not engine.busy


def test_an_episode_whose_tools_fill_the_room_ends_by_length() -> None:
    """The end of an episode, not an error: the model asked for it. A first prompt without room is refused."""
    chat_model = EngineModel(Engine(MODEL, CHAT, 1, 40), CHAT)
    call = CHAT.parse(CHAT.tokenizer.encode("<tool_call>2**90</tool_call>", add_special_tokens=False).ids)
    assert call.tool_calls

    class Calling:
        async def complete(self, messages, tools, sampling) -> Message:  # type: ignore[no-untyped-def]
            if messages[-1].role == "tool":
                return await chat_model.complete(messages, tools, sampling)
            return replace(call, completion=None)

    episode = asyncio.run(
        run_episode(Calling(), [Message("user", "9" * 25)], [get_tool("calculator")], Sampling(max_tokens=8))
    )
    assert episode.stop is StopReason.LENGTH and episode.final.content == ""
    with pytest.raises(UserError, match="holds 40"):
        asyncio.run(chat_model.complete([Message("user", "9" * 50)], (), Sampling(max_tokens=8)))
