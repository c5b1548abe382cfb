"""Grammars of tools and schemas: what a model was trained to write passes, what breaks the schema does not."""

from __future__ import annotations

import os
from typing import Any

import pytest

from headwise.spec.read import open_model
from headwise.text.grammar import ToolShape, json_grammar, tool_grammar
from headwise.text.parse import DIALECTS
from headwise.text.tokenizer import Tokenizer, read_tokenizer

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "cmd": {"type": "string"},
        "mode": {"enum": ["a", "b", 3, None, "", [1, "x"]]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1},
        "deep": {"$ref": "#/$defs/deep"},
        "maybe": {"type": ["integer", "null"]},
        "we ird": {"anyOf": [{"type": "boolean"}, {"type": "number"}]},
        "free": {},
    },
    "required": ["cmd", "deep"],
    "$defs": {
        "deep": {"type": "object", "properties": {"x": {"$ref": "#/$defs/deep"}, "y": {"type": "boolean"}}, "required": ["y"]}
    },
}
TOOLS = [ToolShape(name="ls", parameters=SCHEMA), ToolShape(name="any.thing", parameters={})]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    gguf = open_model(None, env=os.environ).gguf
    assert gguf is not None
    return read_tokenizer(gguf)


def accepts(tokenizer: Tokenizer, lark: str, text: str) -> bool:
    pytest.importorskip("llguidance")
    from headwise.engine.constrain import Constrainer
    from headwise.engine.request import Grammar

    matcher: Any = Constrainer(tokenizer).start(Grammar(lark), 100)._matcher
    ids = tokenizer.encode(text, add_bos=False, parse_special=True)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


Q = '<|"|>'


@pytest.mark.parametrize(
    ("call", "passes"),
    [
        (f"call:ls{{cmd:{Q}a\n{{b}}{Q},deep:{{x:{{y:true}},y:false}}}}", True),
        (f"call:ls{{cmd:{Q}{Q},deep:{{y:true}},free:[1,{{k:{Q}v{Q}}}],maybe:null,mode:[1,{Q}x{Q}],tags:[{Q}abc{Q},{Q}{Q}]}}", True),
        (f"call:ls{{cmd:{Q}a{Q},deep:{{y:true}},mode:{Q}{Q},{Q}we ird{Q}:-2.5}}", True),
        (f"call:any.thing{{key:{Q}v{Q},n:4}}", True),
        ("call:any.thing{}", True),
        ("call:ls{deep:{y:true}}", False),  # a required argument is missing
        (f"call:ls{{cmd:{Q}a{Q},deep:{{y:1}}}}", False),
        (f"call:ls{{cmd:{Q}a{Q},deep:{{y:true}},mode:{Q}c{Q}}}", False),
        (f"call:ls{{cmd:{Q}a{Q},deep:{{y:true}},tags:[{Q}abcd{Q}]}}", False),
        (f"call:ls{{cmd:{Q}a{Q},deep:{{y:true}},tags:[]}}", False),
        (f"call:ls{{cmd:{Q}a{Q},deep:{{y:true}},other:1}}", False),
        ("call:rm{}", False),
    ],
)
def test_calls_in_gemmas_syntax(tokenizer: Tokenizer, call: str, passes: bool) -> None:
    made = tool_grammar(TOOLS, DIALECTS["gemma4"], tokenizer.id, required=False, parallel=True, thinks=False)

    assert made is not None
    assert made[1] == tokenizer.id("<|tool_call>")
    assert accepts(tokenizer, made[0], f"{call}<tool_call|>") is passes


def test_a_required_call_may_follow_a_thought_and_another_call(tokenizer: Tokenizer) -> None:
    one, thought = "<|tool_call>call:any.thing{}<tool_call|>", "<|channel>thought\nhm\n<channel|>"

    def made(**how: bool) -> str:
        settings = {"required": True, "parallel": True, "thinks": False, **how}
        found = tool_grammar(TOOLS, DIALECTS["gemma4"], tokenizer.id, **settings)
        assert found is not None
        assert found[1] is None
        return found[0]

    assert accepts(tokenizer, made(), one + one)
    assert not accepts(tokenizer, made(parallel=False), one + one)
    assert not accepts(tokenizer, made(), thought + one)
    assert accepts(tokenizer, made(thinks=True), thought + one)
    assert not accepts(tokenizer, made(), "I will.")


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        ("tags", '<tool_call>\n{"name": "any.thing", "arguments": {"x": 1}}\n</tool_call>'),
        ("llama3", '{"name": "ls", "parameters": {"cmd": "x", "deep": {"y": true}}}'),
        ("json", '{"name": "any.thing", "parameters": {}}'),
    ],
)
def test_calls_in_json(tokenizer: Tokenizer, dialect: str, text: str) -> None:
    """These marks are no tokens of this vocabulary: spelt out, they are text."""
    made = tool_grammar(TOOLS, DIALECTS[dialect], tokenizer.id, required=True, parallel=True, thinks=False)

    assert made is not None
    assert accepts(tokenizer, made[0], text)
    assert DIALECTS[dialect].read(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    assert tool_grammar(TOOLS, DIALECTS[dialect], tokenizer.id, required=False, parallel=True, thinks=False) is None


def test_an_answer_is_json_or_a_call(tokenizer: Tokenizer) -> None:
    """`codex exec --output-schema` sends tools and a schema: the schema must not forbid the tools."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
    alone = json_grammar(schema, DIALECTS["gemma4"], tokenizer.id, thinks=True)
    both = tool_grammar(TOOLS, DIALECTS["gemma4"], tokenizer.id, required=True, parallel=True, thinks=False, schema=schema)

    assert alone is not None
    assert both is not None
    assert accepts(tokenizer, alone, '<|channel>thought\nhm<channel|>{"n": 4}')
    for lark in (alone, both[0]):
        assert accepts(tokenizer, lark, '{"n": 4}')
        assert not accepts(tokenizer, lark, '{"n": "4"}')
    assert accepts(tokenizer, both[0], "<|tool_call>call:any.thing{}<tool_call|>")
    assert json_grammar(schema, DIALECTS["harmony"], tokenizer.id, thinks=False) is None


def test_a_freeform_tool_follows_its_own_grammar(tokenizer: Tokenizer) -> None:
    patch = ToolShape(name="patch", parameters={}, lark='start: "*** Begin" LF /[a-z]+/\n%import common.LF')
    made = tool_grammar([patch], DIALECTS["gemma4"], tokenizer.id, required=False, parallel=True, thinks=False)

    assert made is not None
    assert accepts(tokenizer, made[0], f"call:patch{{input:{Q}*** Begin\nabc{Q}}}<tool_call|>")
    assert not accepts(tokenizer, made[0], f"call:patch{{input:{Q}*** Start\nabc{Q}}}<tool_call|>")
