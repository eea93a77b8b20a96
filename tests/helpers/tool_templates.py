"""Chat templates of our own in the manner of real families: tools, calls, results, reasoning."""

from __future__ import annotations

_CHATML_HEAD = """\
{% if tools %}<|im_start|>system
Tools:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}CALL_HINT<|im_end|>
{% endif %}{% for message in messages %}{% if message.role == 'tool' %}<|im_start|>user
<tool_response>{{ message.content }}</tool_response><|im_end|>
{% else %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>
{% endif %}{{ message.content }}{% for call in message.tool_calls %}
CALL{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
OPEN{% endif %}"""

_HERMES_CALL = """\
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>"""
_CODER_CALL = """\
<tool_call>
<function={{ call.function.name }}>
{% for key, value in call.function.arguments.items() %}<parameter={{ key }}>
{{ value }}
</parameter>
{% endfor %}</function>
</tool_call>"""
_GLM_CALL = """\
<tool_call>{{ call.function.name }}
{% for key, value in call.function.arguments.items() %}<arg_key>{{ key }}</arg_key>
<arg_value>{{ value }}</arg_value>
{% endfor %}</tool_call>"""


def _chatml(call: str, is_thinking: bool = False, is_open: bool = False) -> str:
    template = _CHATML_HEAD.replace("CALL_HINT", "Call them.").replace("CALL", call)
    if not is_thinking:
        template = template.replace("<think>{{ message.reasoning_content }}</think>", "{{ message.reasoning_content }}")
    closed = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    return template.replace("OPEN", "<think>\n" if is_open else closed if is_thinking else "")


_MISTRAL = """\
{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for message in messages %}\
{% if message.role == 'user' %}[INST]{{ message.content }}[/INST]{% elif message.role == 'tool' %}\
{% if message.tool_call_id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}\
[TOOL_RESULTS]{{ message.content }}[/TOOL_RESULTS]{% elif message.tool_calls %}{% for call in message.tool_calls %}\
{% if call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}\
[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}{% endfor %}{% else %}\
{{ message.content }}{% endif %}{% endfor %}"""

_LLAMA = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% if loop.first and tools %}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}{% if message.tool_calls %}{% set call = message.tool_calls[0].function %}\
{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}{% else %}{{ message.content }}{% endif %}\
<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

TEMPLATES = {
    "hermes": _chatml(_HERMES_CALL),
    "hermes_thinking": _chatml(_HERMES_CALL, is_thinking=True),
    "hermes_open": _chatml(_HERMES_CALL, is_thinking=True, is_open=True),
    "qwen3_coder": _chatml(_CODER_CALL),
    "glm": _chatml(_GLM_CALL),
    "mistral": _MISTRAL,
    "llama3": _LLAMA,
    "json": _LLAMA.replace('"parameters"', '"arguments"'),
}
"""By the form of calls in them; `_thinking`: with reasoning; `_open`: the prompt opens it."""
