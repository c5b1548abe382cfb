"""Chat messages → the text a model was trained to continue, by the model's own jinja template.

The environment is transformers' (5.23, utils/chat_template_utils.py): templates are written against it. Templates come
with the model from strangers, so they run in jinja's immutable sandbox and, unlike there, within limits: MAX_STEPS loop
turns and macro calls; MAX_CHARACTERS of output, written by `{{ … }}` (macros and kept blocks included) or made by one
operator. Filters and string methods are not limited: `center(10**9)` still takes its gigabyte.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headwise.errors import SpecError, UsageError

MAX_STEPS = 2_000_000  # seconds at most; 1,000 messages whose template looks up each tool call by a loop are 10^6
MAX_CHARACTERS = 64 * 1024 * 1024  # ten times the longest context window of any known model
_MAX_BITS = 4096
_BUDGET = "a template cannot spell this name"  # where one rendering keeps its count of steps, among its variables
_REASONING = ("reasoning_content", "thinking", "reasoning")  # one thing, named differently by templates and by clients
_TEMPLATE_CODE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


def render_chat(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    bos_token: str | None,
    eos_token: str | None,
    extra: Mapping[str, Any],
) -> str:
    """The prompt text for `messages`; encode it with `parse_special=True`.

    Args:
        messages, tools, extra: JSON values. `extra` are further variables, such as `enable_thinking`, for the template.
        bos_token, eos_token: as the vocabulary spells them; None leaves them undefined.
    Raises:
        SpecError: there is no template, or it is not valid jinja.
        UsageError: the template refuses the messages, fails on them, or passes a limit.
    """
    if template is None:
        raise SpecError(
            "this model has no chat template",
            why="its files bring none; it is likely a base model, which continues text and knows no turns",
            do="use raw continuation: the completions endpoint, or `headwise run` without --chat",
        )
    compiled = _compiled(template)
    special = {"bos_token": bos_token, "eos_token": eos_token}
    variables = {key: value for key, value in special.items() if value is not None} | {
        "messages": [_with_reasoning(message) for message in cast("list[dict[str, Any]]", _plain(messages))],
        "tools": _plain(tools),
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **cast("dict[str, Any]", _plain(extra)),
        _BUDGET: _Budget(MAX_STEPS, MAX_CHARACTERS),
    }
    parts: list[str] = []
    room = MAX_CHARACTERS
    try:
        for part in compiled.generate(variables):
            parts.append(part)
            room -= len(part)
            if room < 0:
                raise _Limit(f"its output passes {MAX_CHARACTERS} characters")
    except _Refusal as error:
        raise UsageError(
            "the model's chat template refuses these messages",
            why=str(error),
            do="change the messages as it says; roles and their order are the model's rule",
        ) from error
    except _Limit as error:
        raise UsageError(
            "the model's chat template does not come to an end",
            why=str(error),
            do="send a shorter chat; if a short one fails too, the template is broken: get another with --chat-template",
        ) from error
    except _TEMPLATE_CODE_ERRORS as error:
        raise UsageError(
            "the model's chat template fails on these messages",
            why=f"{type(error).__name__}: {error}",
            do="give each message a role and a text content; if it still fails, get another with --chat-template",
        ) from error
    return "".join(parts)


@dataclass(slots=True)
class _Budget:
    """What one rendering may still use."""

    steps: int
    characters: int


class _Refusal(jinja2.TemplateError):
    """The template's own raise_exception()."""


class _Limit(jinja2.TemplateError):
    """A limit of ours."""


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols], finalize=_count_output
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise SpecError(
            "the model's chat template is not valid jinja",
            why=f"line {error.lineno}: {error.message}",
            do="download the model again, or give a template of your own with --chat-template",
        ) from error
    except RecursionError as error:
        raise SpecError(
            "the model's chat template is not valid jinja",
            why="it is nested too deeply",
            do="download the model again, or give a template of your own with --chat-template",
        ) from error


class _CodeGenerator(CodeGenerator):
    """Writes the count of a step as a plain call: through the sandbox it would cost ten times as much."""

    def visit_EnvironmentAttribute(self, node: nodes.EnvironmentAttribute, frame: Frame) -> None:
        if node.name == "count_step":
            self.write("environment.count_step(context)")
        else:
            super().visit_EnvironmentAttribute(node, frame)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a count of steps compiled into every loop and macro, and limits on what operators make."""

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset(("+", "*", "**"))

    def _generate(self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False) -> str:
        for block in source.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            block.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("count_step"), lineno=block.lineno))
            if isinstance(block, nodes.For) and block.test is not None:  # it can drop every turn before the body
                block.test = nodes.And(nodes.EnvironmentAttribute("count_step"), block.test, lineno=block.lineno)
        source.set_environment(self)
        return super()._generate(source, name, filename, defer_init)

    @staticmethod
    def count_step(context: Context) -> bool:
        budget = cast("_Budget", context.parent[_BUDGET])
        budget.steps -= 1
        if budget.steps < 0:
            raise _Limit(f"it takes more than {MAX_STEPS} steps")
        return True

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _limit_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)


@jinja2.pass_context
def _count_output(context: Context, value: object) -> object:
    """Every `{{ … }}` passes here, also within a macro or a block that is kept in a variable."""
    if isinstance(value, str):
        budget = cast("_Budget", context.parent[_BUDGET])
        budget.characters -= len(value)
        if budget.characters < 0:
            raise _Limit(f"it writes more than {MAX_CHARACTERS} characters")
    return value


def _limit_operator(operator: str, left: object, right: object) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > _MAX_BITS:
            raise _Limit(f"it computes a number of more than {_MAX_BITS} bits")
    elif operator == "+" and isinstance(left, str) and isinstance(right, str):
        if len(left) + len(right) > MAX_CHARACTERS:
            raise _Limit(f"it makes a text of more than {MAX_CHARACTERS} characters")
    elif operator == "*":
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                _limit_repetition(cast("Sequence[object]", sequence), times)


def _limit_repetition(sequence: Sequence[object], times: int) -> None:
    if len(sequence) * times > MAX_CHARACTERS:
        raise _Limit(f"it repeats something {times} times")


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks what the model wrote, for training; here it shows its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja's interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_show"), [], [], body).set_lineno(line)

    def _show(self, caller: Macro) -> str:
        return caller()


class _Dict:
    """`dict(…)` without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(…)` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may say namespace(self=1)
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _reject_underscore(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _reject_underscore(name)
        super().__setitem__(name, value)


def _reject_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: it begins with an underscore")


def _raise_exception(message: str) -> None:
    raise _Refusal(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja's own escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message's reasoning under the name every template reads, and under `thinking` for gpt-oss.

    That one refuses a call with both a thought and a text, which it writes where the thought would stand: the text stays.
    """
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    if reasoning is None:
        return message
    if message.get("tool_calls") and message.get("content"):
        return {**{k: v for k, v in message.items() if k != "thinking"}, "reasoning_content": reasoning}
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: object) -> Any:
    """A copy made of JSON types only, whose methods the sandbox knows."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast("Sequence[object]", value)]
    raise ValueError(f"chat data must be JSON values, not {type(value).__name__}")
