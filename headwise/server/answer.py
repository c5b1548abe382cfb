"""An Ask → requests of the engine → happenings: the template, the grammar, text from tokens, stop texts, usage."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from headwise.engine.request import Event, Finish, Prefill, Request, Sampling, Token
from headwise.errors import HeadwiseError, sentence
from headwise.server.ask import (
    Ask,
    Done,
    Failed,
    Happening,
    Logprob,
    Refusal,
    Text,
    Thought,
    Tool,
    ToolCall,
    Usage,
    Waiting,
    bad,
    new_id,
)  # fmt: skip
from headwise.spec.read import Source
from headwise.text.chat import encode_chat
from headwise.text.grammar import MOST_TEXTS, Grammar, ToolShape, answer_grammar
from headwise.text.parse import DIALECTS, Channel, Dialect, Parser, Part, dialect_of
from headwise.text.tokenizer import Tokenizer, TooManyTokens

HEARTBEAT_S = 8.0  # Codex gives up after 300 s without a data event, other clients sooner
PROGRESS_S = 1.0  # progress is told no more often
_SUGGESTED = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}


class Engine(Protocol):
    """What the server needs of the engine; `engine.process.EngineProcess` is one."""

    def ask(self, request: Request) -> AsyncGenerator[Event, None]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model as a request meets it, without its weights.

    Args:
        context: tokens of prompt and answer that the request may have.
        max_tokens: of answers whose request sets no limit; None: all that the context holds.
        suggested: sampling settings that the model's files suggest.
    """

    name: str
    source: Source
    tokenizer: Tokenizer
    context: int
    dialect: Dialect
    max_tokens: int | None = None
    suggested: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def thinks(self) -> bool:
        """Whether the template has a switch for thinking."""
        return any(word in (self.tokenizer.chat_template or "") for word in ("enable_thinking", "reasoning_effort", "<think>"))


def served(source: Source, tokenizer: Tokenizer, context: int, max_tokens: int | None = None) -> Served:
    """What the server knows of a model before, and while, its weights are loaded."""
    return Served(
        name=source.name,
        source=source,
        tokenizer=tokenizer,
        context=context,
        dialect=dialect_of(tokenizer.chat_template),
        max_tokens=max_tokens,
        suggested=suggested(source),
    )


def suggested(source: Source) -> dict[str, float]:
    """The sampling that a model's own files suggest: Ollama's parameters, GGUF keys, or generation_config.json."""
    found: dict[str, Any] = {}
    if source.gguf is not None:
        found = {ours: source.gguf.metadata.get(f"general.sampling.{theirs}") for ours, theirs in _SUGGESTED.items()}
    elif source.path is not None and source.path.is_dir():
        import json

        with contextlib.suppress(OSError, ValueError):
            read = json.loads((Path(source.path) / "generation_config.json").read_text(encoding="utf-8"))
            found = {key: read.get(key) for key in _SUGGESTED} if isinstance(read, dict) else {}
    found |= {key: source.params[key] for key in _SUGGESTED if key in source.params}
    return {k: round(float(v), 6) for k, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool) and v >= 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """An ask as the engine takes it; choices differ in their seed."""

    ask: Ask
    requests: tuple[Request, ...]
    channel: Channel  # where the prompt leaves the model

    @property
    def prompt_tokens(self) -> int:
        return len(self.requests[0].prompt)


def prompt_ids(ask: Ask, model: Served, most: int | None = None) -> list[int]:
    """The prompt's token ids: the template's, or the text's to continue.

    Args:
        most: as `Tokenizer.encode` takes it.
    Raises:
        Refusal: the template refuses the messages, or there is none; far more tokens than `most`.
    """
    try:
        if ask.prompt is None:
            extra: dict[str, Any] = {}
            if ask.thinking is not None:
                extra["enable_thinking"] = ask.thinking
            if ask.effort is not None:
                extra["reasoning_effort"] = ask.effort
            tools = [t.for_template() for t in ask.tools] if ask.choice != "none" else []
            return encode_chat(model.tokenizer, ask.messages, tools=tools or None, extra=extra, most=most)
        if isinstance(ask.prompt, str):
            return model.tokenizer.encode(ask.prompt, most=most)
    except TooManyTokens as error:
        raise _too_long(f"more than {error.n}", ask, model) from error
    except HeadwiseError as error:
        raise bad(sentence((error.what, error.why))) from error
    ids = list(ask.prompt)
    if any(not 0 <= i < model.source.spec.vocab_size for i in ids):
        raise bad(f"a token id is not below {model.source.spec.vocab_size}", "prompt")
    return ids


def _too_long(n: str, ask: Ask, model: Served) -> Refusal:
    message = f"the prompt has {n} tokens and the context is {model.context}; an answer needs room"
    return Refusal(400, "context_length_exceeded", message, param="messages" if ask.prompt is None else "prompt")


def prepare(ask: Ask, model: Served) -> Prepared:
    """Raises Refusal: a prompt that cannot be made or is too long, a grammar that is none."""
    ids = prompt_ids(ask, model, most=model.context)
    if not ids:
        raise bad("the prompt is empty", "prompt")
    if len(ids) >= model.context:
        raise _too_long(str(len(ids)), ask, model)
    room = model.context - len(ids)
    chosen = {"temperature": 1.0, **model.suggested, **ask.sampling}
    chosen["max_tokens"] = min(int(chosen.get("max_tokens") or model.max_tokens or room), room)
    chosen["top_k"] = max(0, int(chosen.get("top_k", 0)))
    chosen["top_p"] = max(1e-6, chosen.get("top_p", 1.0))
    if isinstance(seed := chosen.get("seed"), int):
        chosen["seed"] = seed % 2**63
    sampling = Sampling(**chosen)
    channel = _channel(ids, model)
    request = Request(
        id=0,
        prompt=tuple(ids),
        sampling=sampling,
        client=ask.client,
        grammar=_grammar(ask, model, channel),
        top_logprobs=ask.logprobs,
    )
    seeds = [None if sampling.seed is None else (sampling.seed + i) % 2**63 for i in range(ask.n)]
    return Prepared(ask=ask, channel=channel, requests=tuple(replace(request, sampling=replace(sampling, seed=s)) for s in seeds))


def _channel(ids: list[int], model: Served) -> Channel:
    """Where the prompt leaves the model: in a thought, or at a message's header, that its template has begun."""
    end = model.tokenizer.decode(ids[-8:], skip_special=False).rstrip()
    if model.dialect.name == "harmony":
        return "header" if end.endswith("<|start|>assistant") else "content"
    return "reasoning" if model.dialect.name == "tags" and end.endswith("<think>") else "content"


def _grammar(ask: Ask, model: Served, channel: Channel) -> Grammar | None:
    """The grammar of the answer. A tool whose schema no grammar can be made of takes any arguments, if nobody counts on it.

    Raises:
        Refusal: a schema of the answer, a grammar or a strict tool's schema that cannot be followed.
    """
    tools = ask.tools if ask.choice != "none" else ()
    required = bool(tools) and ask.choice != "auto"
    where = "tool_choice" if required else "response_format"
    if ask.schema is None and not tools:
        return None
    if sum(t.lark is not None for t in tools) > MOST_TEXTS:
        raise bad(f"no more than {MOST_TEXTS} tools may have a grammar", "tools")

    def make(*shapes: ToolShape) -> Grammar | None:
        return answer_grammar(
            model.dialect if ask.prompt is None else DIALECTS["json"],  # a text that is continued has no marks
            model.tokenizer,
            tools=shapes,
            schema=ask.schema,
            required=required,
            parallel=ask.parallel,
            thinks=model.thinks and ask.thinking is not False,
            opened=channel == "reasoning",
        )

    if not tools:
        made = make()
        if made is not None and (error := _invalid(made)) is not None:
            raise bad(f"the schema cannot be followed: {error}", where)
        return made
    offered = [t for t in tools if ask.choice in ("auto", "required", t.name)]
    made = make(*(t.shape() for t in offered))
    error = made and _invalid(made)
    if error:
        made = make(*(_followed(t, make(t.shape())) for t in offered))
        error = made and _invalid(made)
    if error:
        if required or ask.schema is not None:
            raise bad(f"answers of this model cannot be held to {'calls' if required else 'this schema'} here: {error}", where)
        return None
    return made


def _followed(tool: Tool, alone: Grammar | None) -> ToolShape:
    """The tool as its calls are held to it: with its schema, or with any arguments where `alone` cannot be followed."""
    error = alone and _invalid(alone)
    if not error:
        return tool.shape()
    if tool.lark is not None or tool.strict:
        what = "grammar" if tool.lark is not None else "strict schema"
        raise bad(f"the {what} of tool {tool.name} cannot be followed: {error}", "tools")
    return ToolShape(name=tool.name, parameters={})


def _invalid(grammar: Grammar) -> str | None:
    """What is wrong with a grammar; None for nothing. Without llguidance nothing can be held to one."""
    try:
        from llguidance import LLMatcher
    except ImportError:
        return "llguidance is not installed: pip install 'headwise[serve]'"
    for lark in (grammar.opening or grammar.lark, grammar.lark, *grammar.texts):
        error, said = LLMatcher.validate_grammar_with_warnings(lark)
        if error:
            return said[0].splitlines()[0]
    return None


async def happenings(prepared: Prepared, model: Served, engine: Engine) -> AsyncGenerator[Happening, None]:
    """Everything that happens to the ask, the choices side by side; a Waiting at least every HEARTBEAT_S seconds.

    Closing the iterator cancels what still runs.
    """
    queue: asyncio.Queue[Happening | BaseException] = asyncio.Queue()
    latest = {i: Waiting(i, "queue", 0, prepared.prompt_tokens, 0) for i in range(len(prepared.requests))}

    async def follow(index: int, request: Request) -> None:
        reader = _Reader(index, prepared, model)
        events = engine.ask(request)
        try:
            async for event in events:
                for happening in reader.read(event):
                    queue.put_nowait(happening)
                if reader.ended:
                    break
        except Exception as error:  # a bug: it must end the answer, not leave the client waiting
            queue.put_nowait(error)
        finally:
            await events.aclose()

    tasks = [asyncio.create_task(follow(i, request)) for i, request in enumerate(prepared.requests)]
    left, shown = len(tasks), -math.inf
    try:
        while left:
            try:
                happening = await asyncio.wait_for(queue.get(), HEARTBEAT_S)
            except TimeoutError:
                yield latest[min(latest)]
                continue
            if isinstance(happening, BaseException):
                raise happening
            if isinstance(happening, Waiting):
                latest[happening.choice] = happening
                if time.monotonic() - shown < PROGRESS_S:
                    continue
                shown = time.monotonic()
            elif not isinstance(happening, Failed):
                latest[happening.choice] = replace(latest[happening.choice], stage="decode")
            if isinstance(happening, Done):
                left -= 1
                del latest[happening.choice]
            yield happening
            if isinstance(happening, Failed):
                return
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Reader:
    """Events of one request → happenings."""

    def __init__(self, index: int, prepared: Prepared, model: Served) -> None:
        ask = prepared.ask
        self.index, self.ask, self.tokenizer = index, ask, model.tokenizer
        self.chat = ask.prompt is None
        self.speaks = functools.cache(model.dialect.speaks)
        self.parser = Parser(
            model.dialect,
            tools=bool(ask.tools) and ask.choice != "none",
            channel=prepared.channel if self.chat else "content",
            names=[t.name for t in ask.tools],
            schema=ask.schema is not None,
        )
        self.stream = model.tokenizer.stream(skip_special=not self.chat, continues=True)
        self.held = ""  # text that may be the beginning of a stop text
        self.logprobs: list[Logprob] = []
        self.usage = Usage(prompt_tokens=prepared.prompt_tokens)
        self.calls = 0
        self.thoughts = self.tokens = 0
        self.ended = False
        self.began: float | None = None

    def read(self, event: Event) -> list[Happening]:
        match event:
            case Prefill():
                self.usage = replace(self.usage, cached_tokens=event.cached)
                return [Waiting(self.index, "prefill", event.done, event.total, event.cached)]
            case Token():
                return self._token(event)
            case Finish():
                return self._finish(event)

    def _token(self, event: Token) -> list[Happening]:
        self.tokens += 1
        self.thoughts += self.parser.channel == "reasoning"
        if event.logprob is not None:
            self.logprobs.append(self._logprob(event))
        if self.tokenizer.is_special(event.token) and not self.speaks(self.tokenizer.token(event.token)):
            return []
        return self._text(self.stream.push(event.token))

    def _text(self, text: str, *, final: bool = False) -> list[Happening]:
        if not self.chat:
            return self._shown([Part("content", text, text)] if text else [], final)
        return self._shown([*self.parser.push(text), *(self.parser.flush() if final else [])], final)

    def _shown(self, parts: list[Part], final: bool) -> list[Happening]:
        out: list[Happening] = []
        for part in parts:
            if part.channel == "reasoning":
                out.append(Thought(self.index, part.text))
            elif part.calls:
                out += self._release(out, final=True)
                for call in part.calls:
                    self.calls += 1
                    out.append(ToolCall(self.index, new_id("call_"), call.name, call.arguments))
            elif part.text:
                self.held += part.text
                out += self._release(out, final=False)
            if self.ended:
                return out
        if final:
            out += self._release(out, final=True)
        return out

    def _release(self, before: list[Happening], *, final: bool) -> list[Happening]:
        """The held text up to a stop text, where there is one; else what cannot become one."""
        found = [(at, s) for s in self.ask.stop if (at := self.held.find(s)) >= 0]
        if found:
            at, stop = min(found)
            text, self.held, self.ended = self.held[:at], "", True
            usage = replace(self.usage, tokens=self.tokens, reasoning_tokens=self.thoughts)
            return [*self._said(text), Done(self.index, "calls" if self.calls else "stop", usage, stop)]
        keep = 0
        if not final:
            for s in self.ask.stop:
                lengths = range(min(len(s) - 1, len(self.held)), 0, -1)
                keep = max(keep, next((n for n in lengths if s.startswith(self.held[-n:])), 0))
        cut = len(self.held) - keep
        text, self.held = self.held[:cut], self.held[cut:]
        return self._said(text)

    def _said(self, text: str) -> list[Happening]:
        if not text:
            return []
        logprobs, self.logprobs = tuple(self.logprobs), []
        return [Text(self.index, text, logprobs)]

    def _logprob(self, event: Token) -> Logprob:
        def spelt(i: int) -> tuple[str, bytes]:
            data = self.tokenizer.token_bytes(i)
            return data.decode(errors="replace"), data

        assert event.logprob is not None
        top = tuple((i, *spelt(i), max(p, -9999.0)) for i, p in event.top)
        return Logprob(event.token, *spelt(event.token), event.logprob if math.isfinite(event.logprob) else -9999.0, top)

    def _finish(self, event: Finish) -> list[Happening]:
        if event.reason in ("error", "cancelled"):
            self.ended = True
            return [Failed(sentence(event.error or ("the request was cancelled",)), event.retry)]
        out = self._text(self.stream.flush(), final=True)
        if self.ended:  # a stop text came with the last letters
            return out
        self.ended = True
        usage = Usage(
            prompt_tokens=event.prompt_tokens,
            cached_tokens=event.cached_tokens,
            tokens=event.tokens,
            reasoning_tokens=self.thoughts,
            queue_s=event.queue_s,
            prefill_s=event.prefill_s,
            decode_s=event.decode_s,
        )
        return [*out, Done(self.index, "calls" if self.calls else "length" if event.reason == "length" else "stop", usage)]
