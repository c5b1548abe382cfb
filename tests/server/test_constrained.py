"""Whatever a model would like to write: under its grammar every answer is read as valid calls, or as JSON by its schema.

Tokens are drawn at random among those that the grammar allows, so what holds here holds for any model of the dialect.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from headwise.engine.request import Finish, Grammar, Token
from headwise.server import responses
from headwise.server.answer import Served, _Reader, prepare, served
from headwise.server.ask import Ask, Text, Thought, Tool, ToolCall, custom_input
from headwise.spec.read import open_model
from headwise.text.tokenizer import Tokenizer, read_tokenizer

pytest.importorskip("llguidance")
jsonschema_rs = pytest.importorskip("jsonschema_rs")

from headwise.engine.constrain import Constrainer  # noqa: E402 (it needs llguidance)

MESSAGES = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
NO_THOUGHT = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
OPEN_THOUGHT = "{% if enable_thinking | default(true) %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A model's way to write: its template's end as published, and which of its marks are control or ordinary tokens."""

    dialect: str
    template: str
    special: tuple[str, ...]
    ordinary: tuple[str, ...] = ()


KINDS = {
    "qwen3": Kind(
        dialect="tags",
        template=f"{{# <tool_call> #}}{MESSAGES}<|im_start|>assistant\n{NO_THOUGHT}",
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        ordinary=("<think>", "</think>", "<tool_call>", "</tool_call>"),
    ),
    "exaone4": Kind(
        dialect="tags",
        template=f"{{# <tool_call> #}}{MESSAGES}[|assistant|]\n{OPEN_THOUGHT}",
        special=("[|endofturn|]", "[|assistant|]", "<|im_start|>", "<|im_end|>"),
        ordinary=("<think>", "</think>", "<tool_call>", "</tool_call>"),
    ),
    "tags as letters": Kind(
        dialect="tags",
        template=f"{{# <tool_call> #}}{MESSAGES}<|im_start|>assistant\n{OPEN_THOUGHT}",
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    ),
    "gpt-oss": Kind(
        dialect="harmony",
        template="{# <|channel|> reasoning_effort #}{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>"
        "{% endfor %}<|start|>assistant",
        special=("<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|call|>"),
    ),
    "llama3": Kind(
        dialect="llama3",
        template="{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
    ),
    "json": Kind(
        dialect="json",
        template="{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}",
        special=("<s>", "<|im_end|>"),
    ),
}


def tokenizer_of(kind: Kind, path: Path) -> Tokenizer:
    """A byte-level vocabulary of about 700 tokens, trained on code and JSON, with the kind's marks."""
    rust = tokenizers.Tokenizer(BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = [Path(json.__file__).read_text(), json.dumps({"name": "ls", "arguments": {"text": 'a\n\t"b" \\n é'}}, indent=1)] * 2
    rust.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False))
    rust.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in kind.special])
    rust.add_tokens([AddedToken(t, special=False, normalized=False) for t in kind.ordinary])
    path.mkdir()
    rust.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": kind.template, "tokenizer_class": "X"}))
    (path / "config.json").write_text("{}")
    return read_tokenizer(path)


SOURCE = open_model(None, env=os.environ)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Served, Constrainer]]:
    path = tmp_path_factory.mktemp("kinds")
    found = {name: tokenizer_of(kind, path / name) for name, kind in KINDS.items()}
    found["gemma4"] = read_tokenizer(SOURCE.gguf)  # type: ignore[arg-type]
    return {name: (served(SOURCE, t, 4096), Constrainer(t)) for name, t in found.items()}


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},  # as a call's first key in JSON without marks
        "label": {"enum": ["bug", 'a "quoted" one', "line\nbreak", 3, None]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "minItems": 2, "maxItems": 3},
        "deep": {"$ref": "#/$defs/deep"},
    },
    "required": ["name", "label", "deep"],
    "additionalProperties": False,
    "$defs": {"deep": {"type": "object", "properties": {"x": {"anyOf": [{"$ref": "#/$defs/deep"}, {"type": "null"}]}},
                       "required": ["x"], "additionalProperties": False}},
}  # fmt: skip
OTHER = {**SCHEMA, "$defs": {"deep": {"type": "integer"}}}  # the same words for something else
PATCH = """
start: "*** Begin\\n" line+ "*** End"
line: "+" TEXT "\\n" | "(" line* ")\\n"
TEXT: /[^\\n]*/
"""
REGEX = r'[a-z]{1,5}/"[0-9]\\\t[0-9]\.py"'
TOOLS = [
    {"type": "function", "name": "first", "parameters": SCHEMA},
    {"type": "function", "name": "second", "parameters": OTHER},
    {"type": "namespace", "name": "space", "tools": [{"type": "function", "name": "any", "parameters": {"type": "object"}}]},
    {"type": "custom", "name": "patch", "format": {"type": "grammar", "syntax": "lark", "definition": PATCH}},
    {"type": "custom", "name": "open", "format": {"type": "grammar", "syntax": "regex", "definition": REGEX}},
    {"type": "custom", "name": "say"},
]


def is_patch(text: str) -> bool:
    """Whether PATCH describes the text."""

    def lines(at: int) -> int:
        while at < len(text):
            if text[at] == "+" and (end := text.find("\n", at)) > 0:
                at = end + 1
            elif text[at] == "(" and text.startswith(")\n", end := lines(at + 1)):
                at = end + 2
            else:
                break
        return at

    head = "*** Begin\n"
    end = lines(len(head))
    return text.startswith(head) and end > len(head) and text[end:] == "*** End"


def is_valid(tool: Tool, arguments: str) -> bool:
    if tool.wire == "patch":
        return is_patch(custom_input(arguments))
    if tool.wire == "open":
        return re.fullmatch(REGEX, custom_input(arguments)) is not None
    return jsonschema_rs.is_valid(dict(tool.schema), json.loads(arguments))


@dataclass(frozen=True, kw_only=True)
class Asked:
    choice: str
    parallel: bool
    schema: str | None
    thinks: bool | None

    def __str__(self) -> str:
        thinks = "thinks" if self.thinks is None else "quick"
        return f"{self.choice}-{'many' if self.parallel else 'one'}-{self.schema}-{thinks}"

    def ask(self) -> Ask:
        form = {None: None, "object": {"type": "json_object"}, "schema": {"type": "json_schema", "name": "s", "schema": SCHEMA}}
        body: dict[str, Any] = {"input": "Go", "tools": [] if self.choice == "no tools" else TOOLS}
        body |= {"parallel_tool_calls": self.parallel, "text": {"format": form[self.schema]} if self.schema else {}}
        if self.choice in ("auto", "none", "required"):
            body["tool_choice"] = self.choice
        elif self.choice != "no tools":
            body["tool_choice"] = {"type": "custom" if self.choice in ("patch", "open", "say") else "function", "name": self.choice}
        return replace(responses.parse(body), thinking=self.thinks)


SEEDS = int(os.environ.get("HEADWISE_TEST_SEEDS", "2"))
ASKED = [
    Asked(choice=c, parallel=p, schema=s, thinks=t)
    for c, p, s, t in itertools.product(
        ["no tools", "auto", "required", "none", "first", "patch", "open"], [True, False], [None, "object", "schema"], [None, False]
    )
    if not (c in ("no tools", "none") and (s is None or not p))
    and not (c in ("first", "patch", "open") and (s or p))
    and not (c == "required" and s)
]


def drawn(model: Served, constrainer: Constrainer, grammar: Grammar, seed: int, most: int) -> Iterator[int]:
    """Tokens of an answer, at random but for a liking of control tokens, and for what a call begins with."""
    draw, constraint, tokenizer = random.Random(seed), constrainer.start(grammar, most), model.tokenizer
    lead = tokenizer.encode('{"name": "', add_bos=False) if seed % 2 else []
    marks = [i for t in tokenizer.guarded_texts if (i := tokenizer.id(t)) is not None]
    for _ in range(most):
        mask = constraint.allowed()
        ids = list(range(tokenizer.vocab_size)) if mask is None else mask.nonzero()[:, 0].tolist()
        assert ids, "the grammar allows nothing"
        liked = [i for i in marks if mask is None or mask[i]] if draw.random() < 0.4 else []
        token = draw.choice(liked or ids)
        if lead and (first := lead.pop(0)) in ids:
            token = first
        else:
            lead = []
        if token in tokenizer.eos_ids:
            return
        yield token
        constraint.take(token)
    assert constraint.complete or constraint.free, "the answer is cut off"


def answered(model: Served, ask: Ask, constrainer: Constrainer, seed: int, most: int) -> tuple[list[int], str, str, list[ToolCall]]:
    prepared = prepare(ask, model)
    grammar = prepared.requests[0].grammar
    assert grammar is not None
    ids = list(drawn(model, constrainer, grammar, seed, most))
    reader = _Reader(0, prepared, model)
    out = [h for i in ids for h in reader.read(Token(1, i))] + reader.read(Finish(request=1, reason="stop", tokens=len(ids)))
    said = "".join(h.text for h in out if isinstance(h, Text))
    return ids, said, "".join(h.text for h in out if isinstance(h, Thought)), [h for h in out if isinstance(h, ToolCall)]


@pytest.mark.parametrize("asked", ASKED, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "gemma4"])
def test_what_is_drawn_under_a_grammar_is_valid(models: Any, kind: str, asked: Asked) -> None:
    """A call that a client cannot read, an answer that is not by its schema, a second call where one was allowed."""
    model, constrainer = models[kind]
    ask = asked.ask()
    for seed in range(SEEDS):
        ids, said, _, calls = answered(model, ask, constrainer, seed, most=(250, 120)[seed % 2])
        shown = f"seed {seed}: {model.tokenizer.decode(ids, skip_special=False)!r}"
        for call in calls:
            tool = ask.tool(call.name)
            assert tool is not None, shown
            assert is_valid(tool, call.arguments), (shown, call.arguments)
            assert asked.choice in ("auto", "required", tool.wire), shown
        assert asked.parallel or len(calls) <= 1, shown
        if asked.choice not in ("auto", "none", "no tools"):
            assert calls, shown
            assert not said.strip(), shown
        elif asked.schema and not calls:
            assert jsonschema_rs.is_valid(SCHEMA if asked.schema == "schema" else {"type": "object"}, json.loads(said)), shown
        begun = -1 if model.dialect.call is None else model.tokenizer.id(model.dialect.call) or -1
        assert ids.count(begun) in (0, len(calls)), shown  # a call that has begun is one


@pytest.mark.parametrize("kind", [*KINDS, "gemma4"])
def test_a_continued_text_by_a_schema_has_no_marks(models: Any, kind: str) -> None:
    """gpt-oss's channel would stand in front of the JSON, for nobody to take it away."""
    model, constrainer = models[kind]
    for seed in range(SEEDS):
        _, said, thought, _ = answered(model, Ask(prompt="x", schema=SCHEMA), constrainer, seed, most=200)
        assert jsonschema_rs.is_valid(SCHEMA, json.loads(said)), said
        assert not thought
