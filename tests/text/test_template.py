"""text/template.py against transformers' apply_chat_template, and against templates that mean harm."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from headwise.errors import SpecError, UsageError
from headwise.text import template as module
from headwise.text.template import render_chat

LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == 'ipython' or message.role == 'tool' %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}" }}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
            {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- elif message.role == "user" or not tools %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

GEMMA = """{%- macro arg(value) -%}
    {%- if value is string -%}<|"|>{{ value }}<|"|>
    {%- elif value is boolean -%}{{ 'true' if value else 'false' }}
    {%- elif value is mapping -%}{
        {%- for key, item in value | dictsort -%}{{ key }}:{{ arg(item) }}{{ ',' if not loop.last }}{%- endfor -%}}
    {%- elif value is sequence -%}[{%- for item in value -%}{{ arg(item) }}{{ ',' if not loop.last }}{%- endfor -%}]
    {%- else -%}{{ value }}{%- endif -%}
{%- endmacro -%}
{{ bos_token }}
{%- set ns = namespace(open=false) -%}
{%- if tools or enable_thinking or messages[0].role in ['system', 'developer'] -%}
<|turn>system
{% if enable_thinking %}<|think|>
{% endif %}
    {%- if messages[0].role in ['system', 'developer'] -%}{{ messages[0].content | trim }}{%- endif -%}
    {%- for tool in tools or [] -%}
        <|tool>declaration:{{ tool.function.name }}{{ arg(tool.function.parameters) }}<tool|>
    {%- endfor -%}<turn|>
{% endif -%}
{%- for message in messages -%}
    {%- if message.role in ['system', 'developer'] -%}{%- continue -%}{%- endif -%}
    {%- if message.role == 'tool' -%}
        <|tool_response>response:{{ message.name }}{value:{{ arg(message.content) }}}<tool_response|>
    {%- else -%}
        {{ '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
        {%- generation -%}
        {%- if message.reasoning_content and message.tool_calls -%}<|channel>thought
{{ message.reasoning_content }}
<channel|>{%- endif -%}
        {{ message.content or '' }}
        {%- for call in message.tool_calls or [] -%}
            <|tool_call>call:{{ call.function.name }}{{ arg(call.function.arguments) }}<tool_call|>
        {%- endfor -%}
        {%- endgeneration -%}
        {%- if not message.tool_calls -%}<turn|>
{% endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|turn>model
{% if not enable_thinking %}<|channel>thought
<channel|>{% endif %}{%- endif -%}"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Wetter für <Ort> & 'more' \"quotes\"",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "enum": [1, 2.5, None, True]}},
                "required": ["city"],
            },
        },
    }
]
CALL = {"function": {"name": "get_weather", "arguments": {"city": "Köln", "deep": {"b": [1, "x"], "a": False}}}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "  Hi <b>there</b> & you\n"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüß Gott 😀"}],
    "turns": [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n2"},
        {"role": "user", "content": "3"},
    ],
    "tool": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "thinking": "I need a tool", "tool_calls": [CALL]},
        {"role": "tool", "name": "get_weather", "content": '{"sky": "blau"}'},
    ],
}


def ours(template: str, chat: list[dict[str, Any]], **extra: Any) -> str:
    tools, prompt = extra.pop("tools", None), extra.pop("add_generation_prompt", True)
    return render_chat(template, chat, tools=tools, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>", extra=extra)


def theirs(template: str, chat: list[dict[str, Any]], **variables: Any) -> str:
    variables = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"} | variables
    rendered, _ = render_jinja_template(conversations=[chat], chat_template=template, **variables)
    return rendered[0]


@pytest.mark.parametrize("template", [LLAMA, QWEN, GEMMA], ids=["llama", "qwen", "gemma"])
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS.keys())
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize(
    "extra", [{}, {"enable_thinking": True}, {"enable_thinking": False}, {"add_generation_prompt": False}], ids=str
)
def test_a_chat_renders_as_in_transformers(
    template: str, chat: list[dict[str, Any]], tools: list[dict[str, Any]] | None, extra: dict[str, Any]
):
    """A lost newline or an HTML-escaped tool is a prompt the model was not trained on: it answers, but worse."""
    assert ours(template, chat, tools=tools, **extra) == theirs(template, chat, tools=tools, **extra)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(value=JSON)
@settings(max_examples=100, deadline=None)
def test_any_json_value_prints_as_in_transformers(value: Any):
    """jinja's own tojson escapes <, >, & and every letter outside ASCII."""
    template = "{{ messages[0].content | tojson }}|{{ messages[0].content }}|{{ tools | tojson(indent=2) }}"
    chat = [{"role": "user", "content": value}]

    assert ours(template, chat, tools=[{"x": value}]) == theirs(template, chat, tools=[{"x": value}])


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% break %}{% endfor %}x",
        "{{ dict(a=1, b=2) }}{{ dict.fromkeys(['k']) }}",
        "{% set ns = namespace(self=1, x=2) %}{% set ns.x = ns.x + 1 %}{{ ns.x }}",
        "  {% if true %}\n  y\n  {% endif %}\n\nz\n",
        "{{ strftime_now('%Y') }}",
        "{{ undefined_name }}{{ eos_token }}",
        "{{ 'ab' * 3 }}{{ 2 ** 10 }}{{ [0] * 2 }}",
        "{{ messages[0].thinking }}|{{ messages[0].reasoning_content }}",
        "{% for x in messages recursive %}{{ x.role }}{% if x.kids %}{{ loop(x.kids) }}{% endif %}{% else %}-{% endfor %}",
        "{% macro m(a, b=2) %}{{ a }}{{ b }}{{ caller() }}{% endmacro %}{% call m(1) %}c{% endcall %}",
    ],
)
def test_each_part_of_the_language_does_as_in_transformers(template: str):
    """Templates use loop controls, namespaces and strftime_now, which plain jinja lacks."""
    chat = [{"role": "user", "content": "a", "reasoning": "r", "kids": [{"role": "kid"}]}]

    assert ours(template, chat) == theirs(template, chat)


def test_messages_are_not_changed():
    """A server renders the same list again to look up its prefix."""
    chat = [{"role": "assistant", "content": "x", "thinking": "y", "tool_calls": [{"id": "1"}]}]

    with pytest.raises(UsageError):
        ours("{{ messages.append(1) }}", chat)
    ours(QWEN, [{"role": "user", "content": "a"}])

    assert chat == [{"role": "assistant", "content": "x", "thinking": "y", "tool_calls": [{"id": "1"}]}]


def test_a_call_with_a_thought_and_a_text_is_rendered():
    """gpt-oss's template refuses such a message, which a model itself writes: every turn after it would be an error."""
    gpt_oss = (
        "{% for m in messages %}{% if m.content and m.thinking %}{{ raise_exception('Cannot pass both content and thinking') }}"
        "{% endif %}[{{ m.content or m.thinking }}]{% endfor %}"
    )
    call = {"role": "assistant", "reasoning_content": "hm", "tool_calls": [{"id": "1"}]}

    assert ours(gpt_oss, [{**call, "content": "I look."}, {**call, "content": ""}]) == "[I look.][hm]"
    assert ours("{{ messages[0].reasoning_content }}", [{**call, "content": "I look."}]) == "hm"


def test_a_refusal_is_the_templates_own_words():
    """'Conversation roles must alternate' is the user's to mend; a traceback hides it."""
    with pytest.raises(UsageError, match="refuses these messages") as caught:
        ours("{{ raise_exception('roles must alternate') }}", CHATS["one"])

    assert caught.value.why == "roles must alternate"
    assert caught.value.do


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content + 1 }}",
        "{{ messages[9].content.x }}",
        "{{ none.x.y }}",
        "{{ 1 // 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{% set ns = namespace(_x=1) %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ range(10**9) }}",
    ],
)
def test_what_fails_in_a_template_is_our_error(template: str):
    """A server must answer 400 and live; jinja lets TypeError, RecursionError and more through."""
    with pytest.raises(UsageError):
        ours(template, CHATS["one"])


@pytest.mark.parametrize("template", ["{% if %}", "{{ x", "{% nosuchtag %}", "{{ x | nosuchfilter }}", "{{ '" + "a" * 3])
def test_a_broken_template_names_its_line(template: str):
    """The user must know that the file is at fault and not the chat."""
    with pytest.raises(SpecError, match="not valid jinja") as caught:
        ours("\n\n" + template, CHATS["one"])

    assert "line 3" in caught.value.why


def test_a_model_without_a_template_points_to_raw_continuation():
    """Guessing a template for a base model gives nonsense which looks like a bad model."""
    with pytest.raises(SpecError, match="no chat template") as caught:
        render_chat(None, CHATS["one"], bos_token=None, eos_token=None, extra={})

    assert "raw continuation" in caught.value.do


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{{ 'x' * 10**9 }}",
        "{{ [1] * 10**9 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{% set ns = namespace(x=7) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{% set ns = namespace(x='abcdefgh') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='abcdefgh') %}"
        + "{% for i in range(40) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
        "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns = namespace(x='abcdefgh') %}"
        + "{% for i in range(40) %}{% set ns.x = m(ns.x) %}{% endfor %}",
        "{% for a in range(99999) %}" + "literal " * 1000 + "{% endfor %}",
    ],
)
def test_a_template_cannot_hold_the_server(template: str):
    """Templates come with downloaded models; an endless loop without output is stopped by no limit on output."""
    started = time.monotonic()

    with pytest.raises(UsageError, match="does not come to an end"):
        ours(template, CHATS["one"])

    assert time.monotonic() - started < 60


def test_output_is_limited(monkeypatch: pytest.MonkeyPatch):
    """Output kept in memory until the end would end the server first."""
    monkeypatch.setattr(module, "MAX_CHARACTERS", 1000)
    template = "{% for i in range(101) %}{{ '123456789-' }}{% endfor %}"

    with pytest.raises(UsageError, match="does not come to an end"):
        ours(template, CHATS["one"])

    assert len(ours(template.replace("101", "100"), CHATS["one"])) == 1000


def test_a_template_may_use_every_name_of_ours():
    """Were the count of steps an ordinary variable, a template could reset it, or clash with it by chance."""
    assert ours("{% set count_step = 5 %}{% for i in [1, 2] %}{{ count_step }}{% endfor %}", CHATS["one"]) == "55"


def test_what_is_not_json_is_a_callers_bug():
    """An object with methods in the messages would hand them to the template."""
    with pytest.raises(ValueError, match="JSON values"):
        ours("{{ messages }}", [{"role": "user", "content": object()}])
