"""What a model writes comes out whole: as reasoning, calls and content, and joined again as the text it was."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.text.parse import DIALECTS, Call, Parser, dialect_of, read_gemma4, read_json

GOLDEN = [
    ("gemma4", "<|channel>thought\nlook first\n<channel|>It is 3.", "look first", "It is 3.", []),
    (
        "gemma4",
        '<|channel>thought\nuse it<|tool_call>call:ls{path:<|"|>a "b", {c}<|"|>,n:42,deep:{x:[true,null,-1.5]}}<tool_call|>',
        "use it",
        "",
        [("ls", {"path": 'a "b", {c}', "n": 42, "deep": {"x": [True, None, -1.5]}})],
    ),
    ("gemma4", "<|tool_call>call:a{}<tool_call|><|tool_call>call:b{k:None}<tool_call|>", "", "", [("a", {}), ("b", {"k": None})]),
    ("gemma4", 'Hm <|tool_call>call:a{t:<|"|><tool_call|><|"|>}<tool_call|>', "", "Hm ", [("a", {"t": "<tool_call|>"})]),
    ("gemma4", "stray<channel|> marks<|channel>!", "", "stray marks!", []),
    ("tags", "<think>\nhm\n</think>\n\nhello", "hm", "hello", []),
    ("tags", 'ok <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', "", "ok ", [("f", {"x": 1})]),
    ("llama3", '{"name": "f", "parameters": {"x": "y"}}', "", "", [("f", {"x": "y"})]),
    ("llama3", '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', "", "", [("f", {}), ("g", {})]),
    ("json", '```json\n{"name": "f", "arguments": {}}\n```', "", "", [("f", {})]),
    (
        "harmony",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        '<|constrain|>json<|message|>{"x": 1}<|call|>',
        "hm",
        "",
        [("f", {"x": 1})],
    ),
    ("harmony", "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes", "hm", "yes", []),
    (
        "harmony",
        "<|channel|>commentary<|message|>First ls.<|end|><|start|>assistant to=functions.ls<|channel|>commentary json<|message|>{}",
        "",
        "First ls.",
        [("ls", {})],
    ),
    (
        "harmony",
        '<|channel|>commentary to=functions.f<|constrain|>json<|message|>{"a": "<|end|>\\\\\\""}<|end|><|start|>assistant'
        '<|channel|>commentary to=functions.ns.g <|constrain|>json<|message|>{"a": "\\\\"}<|call|>',
        "",
        "",
        [("f", {"a": '<|end|>\\"'}), ("ns.g", {"a": "\\"})],
    ),
    ("harmony", "<|channel|>final <|constrain|>json<|message|>{}<|return|>", "", "{}", []),
    (
        "tags",
        '<tool_call>{"name": "f", "arguments": {"x": "</tool_call>"}}</tool_call>\n<tool_call>{"name": "g"}</tool_call>',
        "",
        "",
        [("f", {"x": "</tool_call>"}), ("g", {})],
    ),
]
BROKEN = [
    ("gemma4", "<|tool_call>call:f{x:<tool_call|>"),
    ("gemma4", "<|tool_call>I do not know"),
    ("tags", '<tool_call>{"name": "f", "arg</tool_call>'),
    ("llama3", '{"answer": 42}'),
    ("json", '{"name": "f", "argum'),
    ("tags", '<tool_call>{"name": "f</tool_call>'),
    ("tags", '<tool_call>{"name": "f</tool_call> and "more'),
    ("harmony", "Hello, world"),
    ("harmony", "Hello"),
]


def parts(name: str, text: str, cuts: list[int], *, tools: bool = True, channel: str = "content") -> list:
    parser = Parser(DIALECTS[name], tools, channel)  # type: ignore[arg-type]
    edges = sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    out = [p for a, b in itertools.pairwise(edges) for p in parser.push(text[a:b])]
    return out + parser.flush()


def start_of(name: str) -> str:
    """The channel in which a template leaves the model."""
    return "header" if name == "harmony" else "content"


@pytest.mark.parametrize("cuts", [[], list(range(400))], ids=["whole", "by characters"])
@pytest.mark.parametrize(("name", "text", "reasoning", "content", "calls"), GOLDEN)
def test_a_golden_text_is_read(name: str, text: str, reasoning: str, content: str, calls: list, cuts: list[int]) -> None:
    """A mark that comes in two pieces is still a mark."""
    found = parts(name, text, cuts, channel=start_of(name))

    assert "".join(p.text for p in found if p.channel == "reasoning") == reasoning
    assert "".join(p.text for p in found if p.channel == "content") == content
    assert [(c.name, json.loads(c.arguments)) for p in found for c in p.calls] == calls
    assert "".join(p.raw for p in found) == text


@pytest.mark.parametrize(("name", "text"), BROKEN)
def test_a_broken_call_is_content(name: str, text: str) -> None:
    """An answer that vanishes because its JSON was cut off."""
    found = parts(name, text, [], channel=start_of(name))

    assert "".join(p.text for p in found) == text
    assert not any(p.calls for p in found)


CHANNELS = ["assistant", "analysis", "final", "commentary", " to=functions.f", " json"]
PIECES = st.sampled_from(
    [m for d in DIALECTS.values() for by in d.marks.values() for m in by]
    + [*DIALECTS["harmony"].marks["content"], *CHANNELS]
    + ['<|"|>', "call:f{", "}", ":", ",", "[", "]", '{"name": "f", "arguments": {', '"', "x", "\n", " ", "<", "<|", "é"]
)  # fmt: skip


@pytest.mark.parametrize("tools", [True, False])
@pytest.mark.parametrize("name", DIALECTS)
@given(pieces=st.lists(PIECES, max_size=25), cuts=st.lists(st.integers(0, 500), max_size=12))
def test_nothing_is_lost(name: str, tools: bool, pieces: list[str], cuts: list[int]) -> None:
    text = "".join(pieces)
    found = parts(name, text, cuts, tools=tools, channel=start_of(name))

    assert "".join(p.raw for p in found) == text
    assert all(p.text in p.raw for p in found)
    if not tools:
        assert not any(p.calls for p in found)


@given(pieces=st.lists(PIECES, max_size=20), cuts=st.lists(st.integers(0, 500), max_size=12))
@pytest.mark.parametrize("name", ["gemma4", "tags", "harmony"])
def test_where_a_text_is_cut_changes_nothing(name: str, pieces: list[str], cuts: list[int]) -> None:
    """Streaming must not decide what a mark is by where a piece happens to end."""
    text = "".join(pieces)

    def shown(found: list) -> dict:
        return {c: "".join(p.text for p in found if p.channel == c) for c in ("content", "reasoning")} | {
            "calls": [c for p in found for c in p.calls]
        }

    start = start_of(name)
    assert shown(parts(name, text, cuts, channel=start)) == shown(parts(name, text, [], channel=start))


def test_text_is_not_held_back() -> None:
    parser = Parser(DIALECTS["gemma4"])

    assert [p.text for p in parser.push("a < b and a <")] == ["a < b and a "]
    assert [p.text for p in parser.push(" c")] == ["< c"]


def test_a_prompt_may_leave_the_model_in_a_thought() -> None:
    parser = Parser(DIALECTS["tags"], channel="reasoning")
    found = parser.push("hm</think>\n\nyes") + parser.flush()

    assert [(p.channel, p.text) for p in found if p.text] == [("reasoning", "hm"), ("content", "yes")]


def test_words_that_are_no_literal_are_text() -> None:
    """A model that forgets the quotes has still made its call."""
    assert read_gemma4("call:ls{path:src/a.py,n:007}") == (Call("ls", '{"path": "src/a.py", "n": "007"}'),)
    assert read_json('[{"name": "f", "arguments": "{\\"x\\":1}"}]') == (Call("f", '{"x":1}'),)


@pytest.mark.parametrize(
    ("template", "name"),
    [("{{'<|tool_call>'}}", "gemma4"), ("<tool_call>", "tags"), ("<|start_header_id|>", "llama3"), ("<|channel|>", "harmony"),
     (None, "json")],
)  # fmt: skip
def test_the_template_names_the_dialect(template: str | None, name: str) -> None:
    assert dialect_of(template).name == name
