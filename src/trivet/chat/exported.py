"""A tokenizer and its chat template as files that transformers reads too."""

from __future__ import annotations

import json

from trivet.chat.builtin import ROLES, TEMPLATE
from trivet.chat.chat import Chat
from trivet.chat.template import TemplateChat
from trivet.config import UserError

# builtin.TEMPLATE with what transformers passes: calls and tools in OpenAI's shape, `enable_thinking`.
FOR_TRANSFORMERS = (
    """\
{%- set shut = enable_thinking is defined and not enable_thinking -%}
{%- if tools and JSON -%}
<system>You may call these tools, one JSON object a call between <tool_call> and </tool_call>:
{% for tool in tools %}{{ tool.function | tojson }}
{% endfor %}
{%- endif -%}
"""
    + ROLES
    + """\
{%- if shut and loop.last -%}<think></think>{%- endif -%}
{%- generation -%}
{%- if m.reasoning_content is defined and m.reasoning_content is not none -%}
{%- if loop.first or messages[loop.index0 - 1].role != "tool" -%}<think>{%- endif -%}
{{ m.reasoning_content }}
{%- if not m.tool_calls -%}</think>{%- endif -%}
{%- endif -%}
{{ m.content or "" }}
{%- for call in m.tool_calls or [] -%}<tool_call>{{ CALL }}</tool_call>{%- endfor -%}
{%- if not m.tool_calls -%}<end>{%- endif -%}
{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and shut and not (messages and messages[-1].role == "tool") -%}<think></think>{%- endif -%}
"""
)
CALLS = {
    "json": '{"name": call.function.name, "arguments": call.function.arguments} | tojson',
    "bare": 'call.function.arguments.values() | join(" ")',
}


def tokenizer_files(chat: Chat) -> dict[str, str]:
    """Files, by name, from which transformers makes the same tokenizer and template as `Chat.load` does.

    transformers takes chat_template.jinja; Chat.load goes on with the template in tokenizer_config.json, which
    splices a model's own ids and keeps what was typed apart from tags. Raises UserError for another template.
    """
    special = {"pad_token": "<pad>", "unk_token": "<unk>"}
    known = {key: tag for key, tag in special.items() if chat.tokenizer.token_to_id(tag) is not None}
    config = chat.config() if isinstance(chat, TemplateChat) else chat.config() | known
    files = {
        "tokenizer.json": chat.tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=1, ensure_ascii=False) + "\n",
    }
    if isinstance(chat, TemplateChat):
        return files
    if chat.template != TEMPLATE:
        raise UserError("This model's chat template is not the one of this version, so transformers can't be given it.")
    syntax = chat.markers.tool_syntax
    template = FOR_TRANSFORMERS.replace("JSON", str(syntax == "json").lower(), 1).replace("CALL", CALLS[syntax], 1)
    return files | {"chat_template.jinja": template}
