"""A checkpoint's own template: ids equal to transformers' `apply_chat_template`, and what Trivet adds to it.

The templates are ours, written after the rules that Qwen3, DeepSeek-R1 and Llama 3 publish; the tokenizer is
a byte-level BPE with their tags.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from chat_templates import QWEN3
from test_cli_verbs import call
from test_hub_configs import random_config
from trivet.agent.loop import run_episode
from trivet.chat import Chat
from trivet.chat.template import TemplateChat
from trivet.config import UserError
from trivet.engine import Engine, EngineModel, Request
from trivet.hub.checkpoint import load_any, load_pair
from trivet.messages import Completion, Message, Sampling, StopReason, ToolCall, ToolSpec
from trivet.recipes.terminal import SoftSwitch

transformers = pytest.importorskip("transformers")
R1 = r"""{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user{{ m.content }}{% elif m.role == 'assistant' %}<|im_start|>assistant{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<think>
{% endif %}"""
LLAMA3 = r"""{{- bos_token }}{%- for m in messages %}{%- if m.role not in ['system', 'user', 'assistant'] %}{{- raise_exception('no such role: ' + m.role) }}{%- endif %}{{- '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n\n' }}{%- endif %}"""
TEMPLATES = {"qwen3": QWEN3, "r1": R1, "llama3": LLAMA3}
TAGS = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
PLUS = ToolSpec("plus", "Add two numbers.", {"type": "object", "properties": {"a": {"type": "integer"}}})


def folder_of(path: Path, template: str, tags: Sequence[str] = TAGS, end: str = "<|im_end|>",
              bos: str = "<|begin|>") -> Path:  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the user asks and the assistant answers the user"] * 5, trainer)
    tokenizer.add_tokens([AddedToken(t, special=not t.strip("</>").isidentifier(), normalized=False) for t in tags])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": end,
              "chat_template": template}  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(params=TEMPLATES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[TemplateChat, Any]:
    folder = folder_of(tmp_path / request.param, TEMPLATES[request.param])
    chat = Chat.load(folder)
    assert isinstance(chat, TemplateChat)
    return chat, transformers.AutoTokenizer.from_pretrained(folder)


CONVERSATIONS = [
    [Message("user", "the user asks")],
    [Message("system", "be kind"), Message("user", " 1+1 ?\n"), Message("assistant", "2"), Message("user", "and 2+2?")],
    [Message("user", "äöü 🙂"), Message("assistant", "hello", reasoning="the user greets")],
]


def theirs(messages: list[Message]) -> list[dict[str, Any]]:
    found = []
    for m in messages:
        view: dict[str, Any] = {"role": m.role, "content": m.content}
        if m.reasoning is not None:
            view["reasoning_content"] = m.reasoning
        if m.tool_calls:
            view["tool_calls"] = [{"type": "function", "id": c.id, "function": {"name": c.name, "arguments": dict(c.arguments)}}
                                  for c in m.tool_calls]  # fmt: skip
        found.append(view)
    return found


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("generate", [True, False])
def test_ids_are_those_of_transformers(pair: tuple[TemplateChat, Any], messages: list[Message], generate: bool) -> None:
    chat, tokenizer = pair
    if messages[-1].role == "assistant" and (generate or chat.template == R1):  # R1's answers: below
        messages = [*messages, Message("user", "more")]
    want = tokenizer.apply_chat_template(theirs(messages), add_generation_prompt=generate, return_dict=False)
    assert chat.render(messages, generate=generate).ids == want
    assert (
        chat.render([*messages[:-1], replace(messages[-1], content="else")], generate=generate).ids != want
    )  # the twin


def test_tools_and_their_results_are_those_of_transformers(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, QWEN3)
    chat, tokenizer = Chat.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    call = ToolCall("call-0", "plus", {"a": 1, "b": "ä"})
    messages = [
        Message("user", "1+1?"),
        Message("assistant", "", reasoning="ask", tool_calls=(call,)),
        Message("tool", "2", tool_call_id="call-0"),
    ]
    tools = [
        {
            "type": "function",
            "function": {"name": "plus", "description": PLUS.description, "parameters": dict(PLUS.parameters)},
        }
    ]
    want = tokenizer.apply_chat_template(theirs(messages), tools=tools, add_generation_prompt=True, return_dict=False)
    assert chat.render(messages, [PLUS], generate=True).ids == want
    written = chat.parse(
        chat.render(messages[:2], [PLUS]).ids[len(chat.render(messages[:1], [PLUS], generate=True).ids) :]
    )
    assert (written.reasoning, written.tool_calls, written.content) == ("ask", (call,), "")


# ------------------------------------------------------------------------------------- thinking or not
def test_qwen3s_switch_closes_the_thought(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, QWEN3)
    chat, tokenizer = Chat.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    shut = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}], add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    rendered = chat.render([Message("user", "?")], thinking=False, generate=True)
    assert rendered.ids == shut and chat.decode(shut).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert (
        not chat.thinking_open(rendered.ids) and rendered.ids != chat.render([Message("user", "?")], generate=True).ids
    )


def test_r1_opens_the_thought_itself_and_can_be_told_not_to(tmp_path: Path) -> None:
    chat = Chat.load(folder_of(tmp_path, R1))
    opened = chat.render([Message("user", "?")], generate=True)
    assert chat.decode(opened.ids).endswith("<think>\n") and chat.thinking_open(opened.ids)
    shut = chat.render([Message("user", "?")], thinking=False, generate=True)
    assert chat.decode(shut.ids).endswith("<think>\n\n</think>\n\n") and not chat.thinking_open(shut.ids)
    learned = chat.render([Message("user", "?"), Message("assistant", "so", reasoning="why")])
    assert learned.ids[: len(opened.ids)] == opened.ids and not any(learned.mask[: len(opened.ids)])
    assert chat.decode(learned.ids[len(opened.ids) :]) == "why\n</think>\n\nso<|im_end|>"
    message = chat.parse(
        [*chat.encode_text("why\n"), chat.think_close_id, *chat.encode_text("\n\nso"), chat.end_id], thinking=True
    )
    assert (message.reasoning, message.content) == ("why", "so")


def test_a_model_without_tags_neither_thinks_nor_calls(tmp_path: Path) -> None:
    chat = Chat.load(folder_of(tmp_path, LLAMA3, tags=TAGS[:3]))
    assert (chat.think_open_id, chat.tool_open_id, chat.closing_ids) == (-1, -1, [])
    assert chat.render([Message("user", "?")], thinking=False, generate=True) == chat.render(
        [Message("user", "?")], generate=True
    )
    with pytest.raises(UserError, match="no syntax that is known"):
        chat.render([Message("user", "?")], [PLUS], generate=True)
    with pytest.raises(UserError, match="no such role: tool"):
        chat.render([Message("user", "?"), Message("tool", "2")], generate=True)


# ------------------------------------------------------------------------------------------ what is added
@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*TAGS, "a", " ", "\n", "<", "|>", "</", "ä"]), max_size=8))
def test_typed_tags_are_characters(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    chat = QWEN_CHAT(tmp_path_factory)
    text = "".join(parts)
    ids = chat.render([Message("user", f"x{text}x")], generate=True).ids
    assert chat.decode(ids) == f"<|im_start|>user\nx{text}x<|im_end|>\n<|im_start|>assistant\n"
    assert [i for i in ids if i in chat._tag_ids.values()] == [
        chat._tag_ids[t] for t in ("<|im_start|>", "<|im_end|>", "<|im_start|>")
    ]


_CACHE: dict[str, TemplateChat] = {}


def QWEN_CHAT(factory: pytest.TempPathFactory) -> TemplateChat:
    if "qwen" not in _CACHE:
        chat = Chat.load(folder_of(factory.mktemp("qwen"), QWEN3))
        assert isinstance(chat, TemplateChat)
        _CACHE["qwen"] = chat
    return _CACHE["qwen"]


def test_the_loss_is_on_the_answer_and_its_end(pair: tuple[TemplateChat, Any]) -> None:
    chat, _ = pair
    messages = [Message("user", "1+1?"), Message("assistant", "two")]
    rendered = chat.render(messages)
    said = chat.decode([i for i, m in zip(rendered.ids, rendered.mask, strict=True) if m])
    assert said.endswith("two<|im_end|>") and "1+1" not in said
    assert not any(chat.render(messages[:1], generate=True).mask)


def test_what_a_model_wrote_stays_its_own_ids(tmp_path: Path) -> None:
    """Also where the template would drop its reasoning from the next turn on."""
    chat = Chat.load(folder_of(tmp_path, QWEN3))
    question = [Message("user", "1+1?")]
    prompt = chat.render(question, generate=True).ids
    odd = [*chat.encode_text("a"), *chat.encode_text("n"), *chat.encode_text("d")]  # not how a tokenizer would write it
    tokens = (chat.think_open_id, *odd, chat.think_close_id, *chat.encode_text("\n\n2"), chat.end_id)
    wrote = Completion("", tokens, (True,) * len(tokens), (), (), StopReason.END, tuple(prompt))
    answer = replace(chat.parse(tokens), completion=wrote)
    assert (answer.reasoning, answer.content) == ("and", "2")
    conversation = [*question, answer, Message("user", "and 2+2?")]
    rendered = chat.render(conversation, generate=True)
    assert rendered.ids[: len(prompt) + len(tokens)] == [*prompt, *tokens]
    assert [i for i, m in zip(rendered.ids, rendered.mask, strict=True) if m] == list(tokens)
    assert (
        chat.decode(rendered.ids[len(prompt) + len(tokens) :])
        == "\n<|im_start|>user\nand 2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    cut = replace(answer, completion=replace(wrote, tokens=tokens[:-1], sampled=(True,) * (len(tokens) - 1)))
    after = chat.render([*question, cut, Message("user", "so?")], generate=True).ids[len(prompt) + len(tokens) - 1 :]
    assert chat.decode(after).startswith("<|im_end|>\n<|im_start|>user")
    second = Completion("", (chat.end_id,), (True,), (), (), StopReason.END, tuple(rendered.ids))
    longer = chat.render([*conversation, Message("assistant", "", completion=second)])
    assert sum(longer.mask) == len(tokens) + 1  # both turns are the model's


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    chat = Chat.load(folder_of(tmp_path / "a", R1))
    (tmp_path / "b").mkdir()
    chat.save(tmp_path / "b")
    again = Chat.load(tmp_path / "b")
    assert isinstance(again, TemplateChat) and again.markers == chat.markers
    messages = [Message("user", "x"), Message("assistant", "y"), Message("user", "z")]
    assert again.render(messages, generate=True) == chat.render(messages, generate=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"chat_template": None}, "has no chat template"), ({"eos_token": None}, "names no eos_token"),
     ({"chat_template": "{% if %}"}, "can't be read")],
)  # fmt: skip
def test_what_is_missing_is_said(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    folder = folder_of(tmp_path, QWEN3)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=says):
        Chat.load(folder)


def test_a_template_can_not_reach_the_host(tmp_path: Path) -> None:
    chat = Chat.load(folder_of(tmp_path, "{{ messages.__class__.__mro__[1].__subclasses__() }}"))
    with pytest.raises(UserError, match="can't render"):
        chat.render([Message("user", "?")])


def test_a_checkpoint_of_transformers_thinks_to_its_budget(tmp_path: Path) -> None:
    """The whole road: model and tokenizer as transformers saves them, the engine, a second turn."""
    folder = folder_of(tmp_path, QWEN3)
    config = random_config("qwen3", 0)
    config.vocab_size, config.max_position_embeddings = 400, 256
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model, chat = load_any(folder).eval(), Chat.load(folder)
    engine = Engine(model, chat, max_rows=2, slots=256)
    prompt = [*chat.render([Message("user", "?")], generate=True).ids, chat.think_open_id]
    (done,) = engine.generate([Request(tuple(prompt), Sampling(max_tokens=120, thinking=5, answer_reserve=4, seed=1))])
    assert done.budget_hit and done.reasoning_tokens == 5
    assert list(done.tokens[5 : 5 + len(chat.closing_ids)]) == chat.closing_ids
    talk = [Message("user", "?")]
    for turn in range(2):
        episode = asyncio.run(run_episode(EngineModel(engine, chat), talk, [], Sampling(max_tokens=8, seed=turn)))
        talk = [*episode.messages, Message("user", "and?")]
    wrote = [m.completion for m in talk if m.completion]
    assert len(wrote) == 2 and wrote[1].prompt_tokens[: len(wrote[0].prompt_tokens)] == wrote[0].prompt_tokens


def test_soft_switches_of_a_checkpoint_stay_in_its_questions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft = SoftSwitch(Chat.load(folder_of(tmp_path / "a", QWEN3)), Console())
    lines = ["hi", "/no_think", "one", "two", "three /think", "four"]
    assert [soft.take(line, 5) for line in lines] == ["hi", "", "one /no_think", "two", "three /think", "four"]
    assert capsys.readouterr().out.splitlines() == ["Thinking is off from here on.", "Thinking is on from here on."]
    for name, template, tags, why in (
        ("b", R1, TAGS, "always thinks"),
        ("c", LLAMA3, TAGS[:3], "has no thinking tags"),
    ):
        soft = SoftSwitch(Chat.load(folder_of(tmp_path / name, template, tags)), Console())
        soft.note("off")
        assert [soft.take(line, None) for line in ("/no_think", "so /no_think")] == ["", "so /no_think"]
        said = capsys.readouterr().out
        assert said.count(f"This model {why}: /think and /no_think switch nothing.") == 2
        assert ("closes its thought empty" in said) == (name == "b")


# ------------------------------------------------------------------------------------- the command line
def test_a_checkpoint_is_evaluated_trained_talked_to_and_written_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = folder_of(tmp_path / "start", QWEN3)
    config = random_config("qwen3", 0)
    config.vocab_size, config.max_position_embeddings = 400, 256
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.save_pretrained(start)
    toml = tmp_path / "more.toml"
    toml.write_text(
        f'''start = "{start}"
        [[tasks]]
        name = "chain"
        [train]
        steps = 2
        rows = 2
        length = 128
        '''
    )
    code, _, err = call(monkeypatch, capsys, "train", str(toml), "--out", str(tmp_path / "run"), "--device", "cpu")
    assert code == 0, err
    code, out, err = call(
        monkeypatch, capsys, "eval", str(tmp_path / "run"), "--task", "chain", "-n", "4", "--max-tokens", "24", "--json"
    )  # fmt: skip
    assert code == 0 and json.loads(out)[0]["questions"] == 4, err
    toml.write_text(
        f'''start = "{tmp_path / "run"}"
        [[tasks]]
        name = "chain"
        [rl]
        steps = 1
        problems = 2
        group = 2
        max_tokens = 12
        length = 128
        '''
    )
    code, _, err = call(monkeypatch, capsys, "rl", str(toml), "--out", str(tmp_path / "rl"), "--device", "cpu")
    assert code == 0 and isinstance(Chat.load(tmp_path / "rl"), TemplateChat), err
    lines = iter(["hello", "and?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    code, out, err = call(monkeypatch, capsys, "chat", str(start), "--max-tokens", "8")
    assert code == 0 and "parameters" in out, err
    code, _, err = call(
        monkeypatch, capsys, "export", str(tmp_path / "run"), "--like", str(start), "--out", str(tmp_path / "back")
    )
    assert code == 0, err
    code, out, err = call(monkeypatch, capsys, "export", str(tmp_path / "run"), "--out", str(tmp_path / "alone"))
    assert code == 0 and "qwen3, " in out, err  # without the checkpoint it came from: the same model, other words
    again, alone = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("back", "alone"))
    assert torch.equal(again(torch.arange(3, 40)[None]).logits, alone(torch.arange(3, 40)[None]).logits)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "alone").chat_template == QWEN3
    trained = load_any(tmp_path / "run")
    tokens = torch.arange(3, 40)[None]
    torch.testing.assert_close(again(tokens).logits, trained.logits(trained(tokens)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(again(tokens).logits, theirs(tokens).logits, atol=1e-3)  # it was trained
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == QWEN3
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(UserError, match="its model only 100"):
        load_pair(start)
    (start / "config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    with pytest.raises(UserError, match="has shape"):
        load_pair(start)
    (start / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_file(str(start / "tokenizer.json"))
    tokenizer.add_tokens([f"<more {i}>" for i in range(300)])
    tokenizer.save(str(start / "tokenizer.json"))
    with pytest.raises(UserError, match=r"its tokenizer knows \d+ tokens, its model only 400"):
        load_pair(start)
    for args, says in (
        (["--out", str(tmp_path / "back")], "exists already"),
        (
            ["--out", str(tmp_path / "new"), "--like", str(folder_of(tmp_path / "empty", QWEN3))],
            "config.json can't be read",
        ),
    ):
        code, _, err = call(monkeypatch, capsys, "export", str(tmp_path / "run"), "--like", str(start), *args)
        assert code == 1 and says in err
