"""Chat templates for tests: ours, short, after the structure of the published ones.

What is kept: the tags, where a call and its result stand, what the template takes (text or parts, object or
JSON, None or ""), what it refuses, and what becomes of earlier thoughts. What is left out: the long instructions.
"""

from __future__ import annotations

from dataclasses import dataclass

from trivet.chat.syntax import Name

LIST = "{%- for tool in tools %}{{ tool | tojson }}\n{% endfor %}"

QWEN3 = r"""
{%- if tools %}{{- '<|im_start|>system\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
{{- "# Tools\n\n<tools>" }}{%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
{{- '\n</tools>\n\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(looking=true, last=messages|length - 1) %}
{%- for m in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}
{%- if ns.looking and m.role == 'user' and not(m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}
{%- set ns.looking = false %}{%- set ns.last = index %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}{%- set content = m.content %}{%- set thought = '' %}
{%- if m.reasoning_content is defined and m.reasoning_content is not none %}{%- set thought = m.reasoning_content %}
{%- elif '</think>' in content %}{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or thought) %}{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}{{- content }}{%- endif %}
{%- for call in m.tool_calls or [] %}{%- if (loop.first and content) or not loop.first %}{{- '\n' }}{%- endif %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}
"""

QWEN_CODER = r"""
{%- if tools %}{{- '<|im_start|>system\n<tools>\n' }}{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}
{{- '</tools>\n<tool_call>\n<function=example>\n<parameter=key>\nvalue\n</parameter>\n</function>\n</tool_call><|im_end|>\n' }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls %}{{- '<|im_start|>assistant' }}
{%- if m.content is string and m.content | trim %}{{- '\n' + m.content | trim + '\n' }}{%- endif %}
{%- for call in m.tool_calls %}{%- set call = call.function %}{{- '\n<tool_call>\n<function=' + call.name + '>\n' }}
{%- for key, value in call.arguments|items %}{{- '<parameter=' + key + '>\n' }}{{- value if value is string else value | string }}{{- '\n</parameter>\n' }}{%- endfor %}
{{- '</function>\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response>\n<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

# Arguments are added to text, so they must be text; a message that only calls must have no content.
R1 = (
    r"""{{- bos_token }}{% for m in messages if m.role == 'system' %}{{- m.content }}{% endfor %}{% if tools %}"""
    + LIST
    + r"""{{- '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>' }}{% endif %}
{%- set ns = namespace(is_tool=false, first=true) %}{%- for m in messages %}
{%- if m.role == 'user' %}{%- set ns.is_tool = false %}{{- '<｜User｜>' + m.content }}{%- endif %}
{%- if m.role == 'assistant' and m.tool_calls %}{{- '<｜Assistant｜><｜tool▁calls▁begin｜>' }}
{%- for call in m.tool_calls %}{{- '\n' if not loop.first }}{{- '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name + '\n```json\n' + call.function.arguments + '\n```<｜tool▁call▁end｜>' }}{%- endfor %}
{{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}{%- endif %}
{%- if m.role == 'assistant' and m.content is not none %}{%- if ns.is_tool %}{{- '<｜tool▁outputs▁end｜>' + m.content + '<｜end▁of▁sentence｜>' }}{%- set ns.is_tool = false %}
{%- else %}{{- '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endif %}
{%- if m.role == 'tool' %}{%- if not ns.is_tool %}{{- '<｜tool▁outputs▁begin｜>' }}{%- else %}{{- '\n' }}{%- endif %}{%- set ns.is_tool = true %}
{{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}{%- endif %}{%- endfor %}
{%- if ns.is_tool %}{{- '<｜tool▁outputs▁end｜>' }}{%- endif %}
{%- if add_generation_prompt and not ns.is_tool %}{{- '<｜Assistant｜><think>\n' }}{%- endif %}
"""
)

# Its switch is called `thinking` and is off unless given.
V31 = (
    r"""{%- if thinking is not defined %}{%- set thinking = false %}{%- endif %}{{- bos_token }}{% for m in messages if m.role == 'system' %}{{- m.content }}{% endfor %}{% if tools %}"""
    + LIST
    + r"""{{- '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>' }}{% endif %}
{%- set ns = namespace(asked=false, is_tool=false) %}{%- for m in messages %}
{%- if m.role == 'user' %}{%- set ns.asked = true %}{%- set ns.is_tool = false %}{{- '<｜User｜>' + m.content }}{%- endif %}
{%- if m.role == 'assistant' %}{%- if ns.asked %}{{- '<｜Assistant｜></think>' }}{%- endif %}{%- set ns.asked = false %}{%- set ns.is_tool = false %}
{{- m.content.split('</think>', 1)[-1] }}
{%- if m.tool_calls %}{{- '<｜tool▁calls▁begin｜>' }}{%- for call in m.tool_calls %}{{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments + '<｜tool▁call▁end｜>' }}{%- endfor %}{{- '<｜tool▁calls▁end｜>' }}{%- endif %}
{{- '<｜end▁of▁sentence｜>' }}{%- endif %}
{%- if m.role == 'tool' %}{%- set ns.asked = false %}{%- set ns.is_tool = true %}{{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt and ns.asked and not ns.is_tool %}{{- '<｜Assistant｜>' }}{{- '<think>' if thinking else '</think>' }}{%- endif %}
"""
)

# Content is a list of parts; a string would be left out without a word. Its tags are no tokens.
M1 = (
    r"""{{- '<begin_of_document>' }}{%- if tools %}{{- '<beginning_of_sentence>system tool_setting=tools\n<tools>\n' }}"""
    + LIST
    + r"""{{- '</tools>\n\n<tool_calls>\n{"name": <tool-name>, "arguments": <args-json-object>}\n...\n</tool_calls><end_of_sentence>\n' }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'system' %}{{- '<beginning_of_sentence>system ai_setting=assistant\n' }}{%- for c in m.content %}{{- c.text }}{%- endfor %}
{%- elif m.role == 'user' %}{{- '<beginning_of_sentence>user name=user\n' }}{%- for c in m.content %}{{- c.text }}{%- endfor %}
{%- elif m.role == 'assistant' %}{{- '<beginning_of_sentence>ai name=assistant\n' }}{%- for c in m.content %}{{- c.text }}{%- endfor %}
{%- if m.tool_calls %}{{- '<tool_calls>\n' }}{%- for call in m.tool_calls %}{{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}\n' }}{%- endfor %}{{- '</tool_calls>' }}{%- endif %}
{%- elif m.role == 'tool' %}{{- '<beginning_of_sentence>tool name=tools\n' }}{%- for c in m.content %}{{- 'tool name: ' + c.name + '\ntool result: ' + c.text + '\n\n' }}{%- endfor %}{%- endif %}
{{- '<end_of_sentence>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<beginning_of_sentence>ai name=assistant\n' }}{%- endif %}
"""
)

# Refuses a result without a call before it; a thought is kept until the next question.
M2 = (
    r"""{{- ']~!b[' }}{%- if tools %}{{- ']~b]system\n<tools>\n' }}"""
    + LIST
    + r"""{{- '</tools>\n<minimax:tool_call>\n<invoke name="tool">\n<parameter name="key">value</parameter>\n</invoke>\n</minimax:tool_call>[e~[\n' }}{%- endif %}
{%- set ns = namespace(last=-1, called=false) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{- ']~b]ai\n' }}{%- if m.reasoning_content and loop.index0 > ns.last %}{{- '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{%- endif %}
{{- m.content }}{%- set ns.called = m.tool_calls %}
{%- if m.tool_calls %}{{- '\n<minimax:tool_call>\n' }}{%- for call in m.tool_calls %}{{- '<invoke name="' + call.function.name + '">\n' }}
{%- for key, value in call.function.arguments|items %}{{- '<parameter name="' + key + '">' }}{{- value if value is string else value | tojson }}{{- '</parameter>\n' }}{%- endfor %}
{{- '</invoke>\n' }}{%- endfor %}{{- '</minimax:tool_call>' }}{%- endif %}{{- '[e~[\n' }}
{%- elif m.role == 'tool' %}{%- if not ns.called %}{{- raise_exception('a result, but no call') }}{%- endif %}{{- ']~b]tool\n<response>' + m.content + '</response>[e~[\n' }}
{%- else %}{{- ']~b]' + m.role + '\n' + m.content + '[e~[\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- ']~b]ai\n<think>\n' }}{%- endif %}
"""
)

# One call a message, without a tag; its result is JSON again.
LLAMA31 = r"""{{- bos_token }}{%- if tools %}{{- '<|start_header_id|>system<|end_header_id|>\n\nRespond in the format {"name": function name, "parameters": dictionary}.\n' }}{%- for t in tools %}{{- t | tojson(indent=4) + '\n\n' }}{%- endfor %}{{- '<|eot_id|>' }}{%- endif %}
{%- for m in messages %}
{%- if m.tool_calls %}{%- if m.tool_calls|length > 1 %}{{- raise_exception('only one call at once') }}{%- endif %}
{%- set call = m.tool_calls[0].function %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
{%- elif m.role == 'tool' %}{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}{{- m.content | tojson }}{{- '<|eot_id|>' }}
{%- else %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""

# Refuses ids that are not nine letters or digits.
MISTRAL = r"""{{- bos_token }}{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}{%- for m in messages %}
{%- if m.role == 'user' %}{%- if tools and m == asked[-1] %}{{- '[AVAILABLE_TOOLS]' }}{{- tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}{%- endif %}{{- '[INST]' + m.content + '[/INST]' }}
{%- elif m.tool_calls %}{{- '[TOOL_CALLS][' }}{%- for call in m.tool_calls %}{%- if call.id|length != 9 %}{{- raise_exception('ids have nine characters') }}{%- endif %}
{{- (call.function|tojson)[:-1] + ', "id": "' + call.id + '"}' }}{{- ', ' if not loop.last }}{%- endfor %}{{- ']' + eos_token }}
{%- elif m.role == 'tool' %}{%- if m.tool_call_id|length != 9 %}{{- raise_exception('ids have nine characters') }}{%- endif %}
{{- '[TOOL_RESULTS]{"content": ' + m.content|tojson + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- elif m.role == 'assistant' %}{{- m.content + eos_token }}{%- endif %}{%- endfor %}
"""
MISTRAL_ARGS = MISTRAL.replace(
    """{{- '[TOOL_CALLS][' }}""", ""
).replace(
    """{{- (call.function|tojson)[:-1] + ', "id": "' + call.id + '"}' }}{{- ', ' if not loop.last }}{%- endfor %}{{- ']' + eos_token }}""",
    """{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments|tojson }}{%- endfor %}{{- eos_token }}""",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A template with the tags that are tokens of its vocabulary; the first ends a turn."""

    template: str
    tags: tuple[str, ...]
    syntax: Name
    thinks: str
    many: bool = True  # several calls in a message


THINK = ("<think>", "</think>")
CHATML = ("<|im_end|>", "<|im_start|>")
DEEPSEEK = ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", *(
    f"<｜tool▁{what}｜>" for what in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep", "outputs▁begin",
                                    "outputs▁end", "output▁begin", "output▁end")))  # fmt: skip
FAMILIES = {
    "qwen3": Family(QWEN3, (*CHATML, *THINK, "<tool_call>", "</tool_call>"), "json", "can"),
    "qwen-coder": Family(QWEN_CODER, (*CHATML, "<tool_call>", "</tool_call>"), "qwen-xml", "never"),
    "deepseek-r1": Family(R1, (*DEEPSEEK, *THINK), "deepseek", "always"),
    "r1-distill": Family(R1, (*DEEPSEEK[:4], *THINK, "<tool_call>", "</tool_call>"), "deepseek", "always"),
    "deepseek-v3.1": Family(V31, (*DEEPSEEK, *THINK), "deepseek-v3.1", "can"),
    "minimax-m1": Family(M1, ("<end_of_sentence>", "<beginning_of_sentence>", "<begin_of_document>"), "minimax-lines", "never"),
    "minimax-m2": Family(M2, ("[e~[", "]~b]", "]~!b[", *THINK, "<minimax:tool_call>", "</minimax:tool_call>"), "minimax-xml", "always"),
    "llama-3.1": Family(LLAMA31, ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"), "llama", "never", many=False),
    "mistral": Family(MISTRAL, ("</s>", "<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"), "mistral", "never"),
    "mistral-args": Family(MISTRAL_ARGS, ("</s>", "<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]"), "mistral-args", "never"),
}  # fmt: skip
