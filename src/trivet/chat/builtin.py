"""Trivet's own tokenizers, their tags and the one template that both share."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from trivet.chat.chat import Chat, Markers
from trivet.config import UserError

SPECIAL = (
    "<pad> <unk> <end> <system> <user> <assistant> <think> </think> <tool_call> </tool_call> "
    "<tool_response> </tool_response>"
).split()

# Who speaks, up to the assistant's part: the same in the template that transformers gets (exported.py).
ROLES = """\
{%- for m in messages -%}
{%- if m.role == "system" -%}<system>{{ m.content }}
{%- elif m.role == "user" -%}<user>{{ m.content }}<assistant>
{%- elif m.role == "tool" -%}<tool_response>{{ m.content }}</tool_response>
{%- else -%}
"""

TEMPLATE = (
    """\
{%- if tools -%}
<system>You may call these tools, one JSON object a call between {{ tool_open }} and {{ tool_close }}:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}
{%- endif -%}
"""
    + ROLES
    + """\
{%- if m.shut -%}<think></think>{%- endif -%}
{%- generation -%}
{%- if m.spliced -%}{{ m.spliced }}
{%- elif m.reasoning is not none -%}
{%- if m.opens -%}<think>{%- endif -%}{{ m.reasoning }}
{%- endif -%}
{%- endgeneration -%}
{%- if m.cut and not m.spliced -%}{{ closing_message }}</think>{%- endif -%}
{%- generation -%}
{%- if not m.spliced -%}
{%- if m.closes and not m.cut -%}</think>{%- endif -%}
{{ m.content }}
{%- for call in m.calls -%}<tool_call>{{ call }}</tool_call>{%- endfor -%}
{%- if not m.calls -%}<end>{%- endif -%}
{%- endif -%}
{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if shut -%}<think></think>{%- endif -%}
"""
)

ALPHABET = [*(chr(code) for code in range(32, 127)), "…", "\n", *(f"={digit}" for digit in range(10))]


def tiny_chat() -> Chat:
    """The demo's alphabet: one token a printable ASCII character, and one for each `=0` .. `=9`."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"=\d|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return Chat(tokenizer, TEMPLATE, Markers(single_turn=True))


def bpe_chat(texts: Iterable[str], vocab_size: int) -> Chat:
    """A byte-level BPE trained on the user's own texts: every text can be written with it."""
    least = 256 + len(SPECIAL)
    if vocab_size < least:
        raise UserError(f"A byte-level tokenizer needs at least {least} tokens, got {vocab_size}.")
    specials = [t for t in SPECIAL if t != "<unk>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    markers = Markers(closing_message="\nTime is up, so I answer now.\n", tool_syntax="json", single_turn=True)
    return Chat(tokenizer, TEMPLATE, markers)
