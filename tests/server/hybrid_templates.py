"""Chat templates with the habits of Qwen3.5 and its successors, each habit switched on by a word; written here, shorter than
any published one."""

from __future__ import annotations

_MACROS = """
{%- macro reasoning_of(m) -%}{{ m.reasoning_content if m.reasoning_content is string else '' }}{%- endmacro -%}
{%- macro call(c) -%}
{%- set f = c.function if c.function is defined else c -%}
{%- if STRICT and f.arguments is not mapping -%}{{ raise_exception('arguments must be an object') }}{%- endif -%}
<tool_call>
<function={{ f.name }}>
{% for name, value in f.arguments | items -%}
<parameter={{ name }}>
{{ value if value is string else value | tojson }}
</parameter>
{% endfor -%}
</function>
</tool_call>
{%- endmacro -%}
"""

_EFFORT = """
{%- set effort = reasoning_effort if reasoning_effort is defined else 'xhigh' -%}
{%- if effort not in ['xhigh', 'medium', 'low'] -%}{{ raise_exception('reasoning_effort: ' ~ effort) }}{%- endif -%}
{%- set sentence = {'xhigh': 'Think long.', 'low': 'Think little.', 'medium': ''}[effort] -%}
"""

_BODY = """
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- if STRICT and ns.last < 0 -%}{{ raise_exception('No user query found.') }}{%- endif -%}
{%- if sentence or tools -%}
<|im_start|>system
{{ sentence or '' }}
{%- if tools %}<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>{% endif -%}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}<|im_end|>
{% endif -%}
{%- for m in messages -%}
{%- if m.role == 'system' -%}
{%- if not loop.first -%}{{ raise_exception('System message must be at the beginning.') }}{%- endif -%}
{%- if not (sentence or tools) -%}<|im_start|>system
{{ m.content }}<|im_end|>
{% endif -%}
{%- elif m.role == 'assistant' -%}
<|im_start|>assistant
{% if (PRESERVE if preserve_thinking is undefined else preserve_thinking) or loop.index0 > ns.last -%}
<think>
{{ reasoning_of(m) }}
</think>

{% endif -%}
{{ m.content if m.content is string else '' }}
{%- for c in m.tool_calls or [] %}{{ call(c) }}{% endfor %}<|im_end|>
{% elif m.role == 'tool' -%}
<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% else -%}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if ALWAYS and enable_thinking is defined and not enable_thinking -%}
{{ raise_exception('this model always thinks') }}
{%- elif (THINKS if enable_thinking is undefined else enable_thinking) or ALWAYS -%}
<think>
{% else -%}
<think>

</think>

{% endif -%}
{%- endif -%}
"""


def template(
    *,
    thinks: bool = True,
    always: bool = False,
    preserve: bool | None = None,
    effort: bool = False,
    strict: bool = False,
) -> str:
    """``thinks`` unless told otherwise; ``preserve``: keeps the reasoning of old turns unless told otherwise, None: has no
    such switch."""
    body = _MACROS + (_EFFORT if effort else "{%- set sentence = '' -%}") + _BODY
    if preserve is None:
        body = body.replace("(PRESERVE if preserve_thinking is undefined else preserve_thinking) or ", "")
    words = {"STRICT": strict, "PRESERVE": bool(preserve), "THINKS": thinks, "ALWAYS": always}
    for word, value in words.items():
        body = body.replace(word, str(value).lower())
    return body


SMALL = template(thinks=False)  # Qwen3.5-0.8B and 2B
LARGE = template()  # 4B and up
PRESERVING = template(preserve=False)  # 3.6
WITH_EFFORT = template(preserve=True, effort=True, strict=True)  # 3.8-27B
ALWAYS = template(always=True, preserve=True, effort=True, strict=True)  # 3.8-2.4T
