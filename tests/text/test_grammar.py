"""Grammars of tools and schemas: what a model was trained to write passes, what breaks the schema does not."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from headwise.spec.read import open_model
from headwise.text.grammar import Grammar, ToolShape, answer_grammar
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


def made(tokenizer: Tokenizer, dialect: str, tools: list[ToolShape] | None = None, **how: Any) -> Grammar:
    grammar = answer_grammar(DIALECTS[dialect], tokenizer, tools=TOOLS if tools is None else tools, **how)
    assert grammar is not None
    return grammar


def accepts(tokenizer: Tokenizer, grammar: Grammar, *texts: str) -> bool:
    """Whether a whole answer passes; after the trigger where the grammar has one. No token spans two of the texts."""
    pytest.importorskip("llguidance")
    from headwise.engine.constrain import Constrainer

    constraint = Constrainer(tokenizer).start(Grammar(grammar.lark, texts=grammar.texts), 4000)
    for token in [i for text in texts for i in tokenizer.encode(text, add_bos=False, parse_special=True)]:
        mask = constraint.allowed()
        assert mask is not None
        if not mask[token]:
            return False
        constraint.take(token)
    return constraint.complete


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
    grammar = made(tokenizer, "gemma4")

    assert grammar.trigger == tokenizer.id("<|tool_call>")
    assert accepts(tokenizer, grammar, f"{call}<tool_call|>") is passes


def test_a_required_call_may_follow_a_thought_and_another_call(tokenizer: Tokenizer) -> None:
    one, thought = "<|tool_call>call:any.thing{}<tool_call|>", "<|channel>thought\nhm\n<channel|>"

    def required(**how: Any) -> Grammar:
        return made(tokenizer, "gemma4", required=True, **how)

    assert accepts(tokenizer, required(), one + one)
    assert not accepts(tokenizer, required(parallel=False), one + one)
    assert not accepts(tokenizer, required(), thought + one)
    assert accepts(tokenizer, required(thinks=True), thought + one)
    assert not accepts(tokenizer, required(thinks=True), thought.replace("thought\n", "") + one)  # it would be read as content
    assert not accepts(tokenizer, required(), "I will.")


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        ("tags", '<tool_call>\n{"name": "any.thing", "arguments": {"x": 1}}\n</tool_call>'),
        ("llama3", '{"name": "ls", "parameters": {"cmd": "x", "deep": {"y": true}}}'),
        ("json", '{"name": "any.thing", "parameters": {}}'),
        ("harmony", '<|channel|>commentary to=functions.any.thing <|constrain|>json<|message|>{"x": 1}'),
        ("harmony", ' to=functions.any.thing<|channel|>commentary json<|message|>{"x":1}'),
        ("harmony", "<|channel|>commentary to=functions.any.thing code<|message|>{}"),
    ],
)
def test_calls_in_json(tokenizer: Tokenizer, dialect: str, text: str) -> None:
    """These marks are no tokens of this vocabulary: spelt out, they are text."""
    grammar = made(tokenizer, dialect, required=True)

    assert accepts(tokenizer, grammar, text)
    assert not accepts(tokenizer, grammar, text.replace("thing", "one").replace('"ls"', '"rm"'))
    assert DIALECTS[dialect].read(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))


def test_an_answer_is_json_or_a_call(tokenizer: Tokenizer) -> None:
    """`codex exec --output-schema` sends tools and a schema: the schema must not forbid the tools."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
    alone = made(tokenizer, "gemma4", [], schema=schema, thinks=True)
    both = made(tokenizer, "gemma4", schema=schema)

    assert accepts(tokenizer, alone, '<|channel>thought\nhm<channel|>{"n": 4}')
    for grammar in (alone, both):
        assert accepts(tokenizer, grammar, '{"n": 4}')
        assert not accepts(tokenizer, grammar, '{"n": "4"}')
    assert accepts(tokenizer, both, "<|tool_call>call:any.thing{}<tool_call|>")
    messages = made(tokenizer, "harmony", schema=schema, thinks=True)
    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    assert accepts(tokenizer, messages, f'{thought}<|channel|>final<|message|>{{"n":4}}')
    assert accepts(tokenizer, messages, '<|channel|>final <|constrain|>json<|message|>{"n": 4}')
    assert not accepts(tokenizer, messages, f'{thought}<|channel|>commentary<|message|>{{"n": 4}}')
    assert not accepts(tokenizer, messages, f'{thought}<|channel|>final<|message|>{{"n": "4"}}')


# As Codex 0.169 sends it.
APPLY_PATCH = r"""
start: begin_patch hunk+ end_patch
begin_patch: "*** Begin Patch" LF
end_patch: "*** End Patch" LF?

hunk: add_hunk | delete_hunk | update_hunk
add_hunk: "*** Add File: " filename LF add_line+
delete_hunk: "*** Delete File: " filename LF
update_hunk: "*** Update File: " filename LF change_move? change?

filename: /(.+)/
add_line: "+" /(.*)/ LF -> line

change_move: "*** Move to: " filename LF
change: (change_context | change_line)+ eof_line?
change_context: ("@@" | "@@ " /(.+)/) LF
change_line: ("+" | "-" | " ") /(.*)/ LF
eof_line: "*** End of File" LF

%import common.LF
"""
GOOD = [
    '*** Begin Patch\n*** Add File: a b.py\n+print("hi\\n")\n+\n+\t# é \\ \x1b\n*** End Patch',
    "*** Begin Patch\n*** Update File: x\n@@ def f():\n-a = '\\\"'\n+a = 1\n b\n*** End of File\n*** Delete File: y\n"
    "*** End Patch\n",
]


@pytest.mark.parametrize(
    ("dialect", "before", "after"),
    [
        ("gemma4", f"<|tool_call>call:apply_patch{{input:{Q}", f"{Q}}}<tool_call|>"),
        ("tags", '<tool_call>\n{"name": "apply_patch", "arguments": {"input": "', '"}}\n</tool_call>'),
        ("llama3", '{"name": "apply_patch", "parameters": {"input": "', '"}}'),
        ("harmony", '<|channel|>commentary to=functions.apply_patch <|constrain|>json<|message|>{"input":"', '"}'),
    ],
)
def test_a_patch_follows_codexs_grammar_wherever_it_stands(tokenizer: Tokenizer, dialect: str, before: str, after: str) -> None:
    """In a JSON string a line ends with `\\n`, where a lexer that reads on past the backslash finds no way back."""
    grammar = made(tokenizer, dialect, [ToolShape(name="apply_patch", parameters={}, lark=APPLY_PATCH)], required=True)

    def written(patch: str) -> list[str]:
        if dialect == "gemma4":
            return [before + patch + after]
        return [before, *json.dumps(patch, ensure_ascii=False)[1:-1], after[0], after[1:]]

    for patch in GOOD:
        assert accepts(tokenizer, grammar, *written(patch)), patch
        assert not accepts(tokenizer, grammar, *written(patch.replace("*** End Patch", "*** The End")))
        assert not accepts(tokenizer, grammar, *written(patch.replace("\n+", "\n?", 1)))
