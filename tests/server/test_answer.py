"""Stop texts, history and settings, without an engine: what goes in is what the template and the sampler get."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.engine.request import Finish, Token
from headwise.server import anthropic, chat, ollama, responses
from headwise.server.answer import _Reader, prepare, served
from headwise.server.ask import Ask, Done, Refusal, Text, Thought
from headwise.spec.read import open_model
from headwise.text.grammar import Grammar
from headwise.text.parse import DIALECTS
from headwise.text.tokenizer import Tokenizer, read_tokenizer

SOURCE = open_model(None, env=os.environ)
MODEL = served(SOURCE, read_tokenizer(SOURCE.gguf), 512)  # type: ignore[arg-type]


@given(text=st.text("ab\n", max_size=30), stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_what_is_shown_ends_before_the_first_stop_text(text: str, stops: list[str]) -> None:
    """A stop text that comes in two tokens, or after a false start, is seen too."""
    ask = Ask(prompt="x", stop=tuple(stops), sampling={"max_tokens": 99})
    reader = _Reader(0, prepare(ask, MODEL), MODEL)
    out: list[Any] = []
    ids = [MODEL.tokenizer.id({"\n": "Ċ"}.get(c, c)) for c in text]
    for token in ids:
        if not reader.ended:
            assert token is not None
            out += reader.read(Token(1, token))
    if not reader.ended:
        out += reader.read(Finish(request=1, reason="stop", tokens=len(ids)))
    first = len(text)
    for end in range(len(text) + 1):  # of several the one that is complete first
        if found := [text.find(s) for s in stops if s in text[:end]]:
            first = min(found)
            break

    assert "".join(h.text for h in out if isinstance(h, Text)) == text[:first]
    assert [type(h) for h in out].count(Done) == 1
    assert isinstance(out[-1], Done)
    assert (out[-1].stop is not None) == any(s in text for s in stops)


def test_control_tokens_that_say_nothing_are_not_shown() -> None:
    """A small model that begins a second prompt inside its answer: `<bos><|turn>user` in front of the user."""
    ask = Ask(messages=({"role": "user", "content": "x"},), sampling={"max_tokens": 9})
    reader = _Reader(0, prepare(ask, MODEL), MODEL)
    ids = MODEL.tokenizer.encode("a<bos><|turn>b<|channel>thought\nc<channel|>d", add_bos=False, parse_special=True)
    out = [h for i in ids for h in reader.read(Token(1, i))]

    assert "".join(h.text for h in out if isinstance(h, Text)) == "abd"
    assert "".join(h.text for h in out if isinstance(h, Thought)) == "c"


HISTORY = {
    "chat": chat.parse({
        "messages": [
            {"role": "system", "content": "One."}, {"role": "developer", "content": "Two."}, {"role": "user", "content": "Go"},
            {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "ls", "arguments": '{"p": "."}'}}]},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "a.py"}]},
        ],
    }),
    "responses": responses.parse({
        "instructions": "One.",
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Two."}]},
            {"role": "user", "content": "Go"},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": None},
            {"type": "function_call", "call_id": "c1", "name": "ls", "arguments": '{"p": "."}'},
            {"type": "unheard_of", "x": 1},
            {"type": "function_call_output", "call_id": "c1", "output": "a.py"},
        ],
    }),
    "anthropic": anthropic.parse({
        "system": [{"type": "text", "text": "One.\n\nTwo.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "Go"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "tool_use", "id": "c1", "name": "ls", "input": {"p": "."}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "a.py"}]},
        ],
    }),
    "ollama": ollama.parse_chat({
        "messages": [
            {"role": "system", "content": "One."}, {"role": "system", "content": "Two."}, {"role": "user", "content": "Go"},
            {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [
                {"id": "c1", "function": {"name": "ls", "arguments": {"p": "."}}}]},
            {"role": "tool", "tool_name": "ls", "tool_call_id": "c1", "content": "a.py"},
        ],
    }),
}  # fmt: skip


@pytest.mark.parametrize("protocol", HISTORY)
def test_one_conversation_is_one_prompt_in_every_protocol(protocol: str) -> None:
    """A protocol whose history renders differently loses the cache, and may lose a tool's result."""
    request = prepare(HISTORY[protocol], MODEL).requests[0]
    expected = (
        "<bos><|turn>system\nOne.\n\nTwo.<turn|>\n<|turn>user\nGo<turn|>\n<|turn>model\n<|channel>thought\nhm\n<channel|>"
        '<|tool_call>call:ls{p:<|"|>.<|"|>}<tool_call|><|tool_response>response:ls{value:<|"|>a.py<|"|>}<tool_response|>'
    )

    assert MODEL.tokenizer.decode(request.prompt, skip_special=False) == expected


def test_the_models_own_suggestion_is_the_default() -> None:
    given_ = prepare(Ask(prompt="x", sampling={"temperature": 0.0}), MODEL).requests[0].sampling
    default = prepare(Ask(prompt="x"), MODEL).requests[0].sampling

    assert (default.temperature, default.top_p, default.top_k) == (0.8, 0.95, 64)  # general.sampling.* of the file
    assert (given_.temperature, given_.top_p) == (0.0, 0.95)
    assert default.max_tokens == 512 - 2  # all the room there is: the prompt is <bos> and x
    limited = replace(MODEL, max_tokens=7)
    assert prepare(Ask(prompt="x"), limited).requests[0].sampling.max_tokens == 7
    assert prepare(Ask(prompt="x", sampling={"max_tokens": 9}), limited).requests[0].sampling.max_tokens == 9


def test_choices_differ_in_their_seed() -> None:
    seeds = [r.sampling.seed for r in prepare(Ask(prompt="x", n=3, sampling={"seed": -1}), MODEL).requests]

    assert len(set(seeds)) == 3


@pytest.mark.parametrize("protocol", ["responses", "chat", "anthropic"])
def test_what_cannot_be_followed_is_refused_where_it_was_promised(protocol: str) -> None:
    """A patch that is no patch, or arguments that a client's strict schema rules out, with nobody told."""
    pytest.importorskip("llguidance")
    broken = {"type": "object", "properties": {"a": {"type": "nothing"}}}
    model = replace(MODEL, dialect=DIALECTS["json"])  # Gemma's own syntax takes a type that it does not know as any

    def grammar(name: str, **more: Any) -> Grammar | None:
        tool: dict[str, Any] = {"name": name, **more}
        said = [{"role": "user", "content": "x"}]
        if protocol == "responses":
            ask = responses.parse({"input": "x", "tools": [{"type": "function"} | tool]})
        elif protocol == "chat":
            kind = tool.pop("type", "function")
            ask = chat.parse({"messages": said, "tools": [{"type": kind, kind: tool}]})
        else:
            tool["input_schema"] = tool.pop("parameters")
            ask = anthropic.parse({"messages": said, "max_tokens": 9, "tools": [tool]})
        return prepare(ask, model).requests[0].grammar

    free = grammar("g", parameters=broken)
    assert free is not None
    assert "nothing" not in free.lark
    with pytest.raises(Refusal, match="strict schema of tool g cannot be followed"):
        grammar("g", parameters=broken, strict=True)
    if protocol != "anthropic":
        with pytest.raises(Refusal, match="grammar of tool g cannot be followed"):
            grammar("g", type="custom", format={"syntax": "lark", "definition": "("})


def test_a_schema_that_is_none_is_refused() -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(Refusal, match="schema cannot be followed"):
        prepare(Ask(prompt="x", schema={"type": "nothing"}), MODEL)


def test_thinking_follows_the_effort() -> None:
    def prompt(effort: str | None) -> str:
        ask = chat.parse({"messages": [{"role": "user", "content": "x"}], "reasoning_effort": effort})
        return MODEL.tokenizer.decode(prepare(ask, MODEL).requests[0].prompt, skip_special=False)

    assert "<|think|>" in prompt("low")
    assert "<|think|>" not in prompt("none")
    assert prompt(None) == prompt("minimal")


@pytest.mark.parametrize("ask", [Ask(prompt="word " * 4000), Ask(messages=({"role": "user", "content": "word " * 4000},))])
def test_a_prompt_far_longer_than_the_context_is_not_read_to_its_end(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading takes memory in proportion, and the allocator keeps it: a body of 32 MB took gigabytes."""
    read: list[int] = []
    whole = Tokenizer.encode

    def encode(self: Tokenizer, text: str, **how: Any) -> list[int]:
        ids = whole(self, text, **how)
        read.append(len(text))
        return ids

    monkeypatch.setattr(Tokenizer, "encode", encode)
    with pytest.raises(Refusal, match=r"has more than \d+ tokens and the context is 512") as refused:
        prepare(ask, MODEL)
    assert refused.value.code == "context_length_exceeded"
    assert max(read) <= 8 * 512


def test_a_prompt_of_long_tokens_is_counted_whole() -> None:
    """Its beginning has few tokens; what is refused names the exact number where it is known."""
    spaces = prepare(Ask(prompt="x" + " " * 5000), replace(MODEL, context=600)).prompt_tokens
    assert spaces < 600
    with pytest.raises(Refusal, match=r"has 5\d\d tokens and the context is 512"):
        prepare(Ask(prompt=" word" * 550), MODEL)
