"""Other people's clients as oracles: their strict types read every field of ours."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime
from typing import Any

import pytest

TOOL = {
    "name": "list_files",
    "description": "List the files of a directory.",
    "parameters": {
        "type": "object",
        "properties": {"path": {"type": "string", "maxLength": 20}, "depth": {"type": "integer"}},
        "required": ["path"],
        "additionalProperties": False,
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"label": {"enum": ["bug", "feature", "question"]}, "reason": {"type": "string"}},
    "required": ["label", "reason"],
    "additionalProperties": False,
}
ASKED = [{"role": "user", "content": "Which files are there?"}]


@pytest.fixture(scope="module")
def openai_client(live: Any) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def anthropic_client(live: Any) -> Any:
    anthropic = pytest.importorskip("anthropic")
    return anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def ollama_client(live: Any) -> Any:
    ollama = pytest.importorskip("ollama")
    return ollama.Client(host=live.url, timeout=60)


def test_openai_lists_the_model(openai_client: Any) -> None:
    assert [m.id for m in openai_client.models.list()][:2] == ["tiny-hybrid", "other-name"]
    assert openai_client.models.retrieve("tiny-hybrid").id == "tiny-hybrid"


def test_openai_chat_streams_what_it_answers_whole(openai_client: Any) -> None:
    """A stream that drops a piece, or an answer that does not end."""
    settings = {"model": "tiny-hybrid", "messages": ASKED, "max_tokens": 24, "temperature": 0}
    whole = openai_client.chat.completions.create(**settings)
    chunks = list(openai_client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))

    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1  # the same prompt again


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "list_files"}}])
def test_openai_chat_calls_a_tool(openai_client: Any, choice: Any) -> None:
    settings = {"model": "tiny-hybrid", "messages": ASKED, "tools": [{"type": "function", "function": TOOL}], "tool_choice": choice}
    with openai_client.chat.completions.stream(**settings, max_completion_tokens=80, seed=1) as stream:
        final = stream.get_final_completion()
    (call, *_) = final.choices[0].message.tool_calls
    arguments = json.loads(call.function.arguments)

    assert final.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "list_files"
    assert set(arguments) - {"depth"} == {"path"}
    again = openai_client.chat.completions.create(
        model="tiny-hybrid",
        messages=[
            *ASKED,
            {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
            {"role": "tool", "tool_call_id": call.id, "content": "a.py"},
        ],
        tools=[{"type": "function", "function": TOOL}],
        max_tokens=8,
    )
    assert again.choices[0].finish_reason in ("stop", "length", "tool_calls")


@pytest.mark.parametrize("most", [40, 200])
def test_openai_parses_a_schema(openai_client: Any, most: int) -> None:
    answer = openai_client.chat.completions.create(
        model="tiny-hybrid",
        messages=[{"role": "user", "content": "Classify: it crashes"}],
        response_format={"type": "json_schema", "json_schema": {"name": "label", "strict": True, "schema": SCHEMA}},
        max_tokens=most,
        seed=most,
    )
    found = json.loads(answer.choices[0].message.content)

    assert found["label"] in ("bug", "feature", "question")
    assert set(found) == {"label", "reason"}


def test_openai_chat_has_choices_stops_and_logprobs(openai_client: Any) -> None:
    answer = openai_client.chat.completions.create(
        model="other-name", messages=ASKED, n=2, max_tokens=12, seed=4, logprobs=True, top_logprobs=2, stop=["zzzz"]
    )

    assert [c.index for c in answer.choices] == [0, 1]
    for choice in answer.choices:
        shown = b"".join(bytes(t.bytes) for t in choice.logprobs.content)
        assert shown.decode() == choice.message.content
        assert all(len(t.top_logprobs) == 2 and t.logprob <= 0 for t in choice.logprobs.content)


def test_openai_completion_stops_before_its_stop_text(openai_client: Any) -> None:
    prompt = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a"
    free = openai_client.completions.create(model="tiny-hybrid", prompt=prompt, max_tokens=24, temperature=0, logprobs=1)
    text = free.choices[0].text
    stop = text[4:7]
    cut = openai_client.completions.create(model="tiny-hybrid", prompt=prompt, max_tokens=24, temperature=0, stop=stop)
    streamed = openai_client.completions.create(
        model="tiny-hybrid", prompt=prompt, max_tokens=24, temperature=0, stop=stop, stream=True
    )

    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert "".join(c.choices[0].text for c in streamed) == cut.choices[0].text
    assert "".join(free.choices[0].logprobs.tokens) == text


def test_openai_responses_streams_and_repeats_its_history(openai_client: Any) -> None:
    """The item that a turn gives out must be one that the next turn takes in."""
    with openai_client.responses.stream(model="tiny-hybrid", input="hello", max_output_tokens=30, temperature=0) as stream:
        events = list(stream)
    final = events[-1].response
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert [e.type for e in events][:2] == ["response.created", "response.in_progress"]
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == final.output[0].content[0].text
    assert (final.status, final.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    again = openai_client.responses.create(
        model="tiny-hybrid",
        input=[{"role": "user", "content": "hello"}, *[o.model_dump() for o in final.output], {"role": "user", "content": "and?"}],
        max_output_tokens=5,
    )
    assert again.usage.input_tokens_details.cached_tokens > 0
    assert again.usage.total_tokens == again.usage.input_tokens + again.usage.output_tokens


def test_openai_responses_calls_tools_of_every_kind(openai_client: Any) -> None:
    """A namespace's tool is flat for the model and split again for the client; unknown kinds are no error."""
    function = {"type": "function", "strict": False, **TOOL}
    tools = [
        {"type": "web_search", "external_web_access": False},
        {"type": "brand_new", "x": 1},
        {"type": "namespace", "name": "agents", "description": "d", "tools": [function]},
        {
            "type": "custom",
            "name": "patch",
            "description": "d",
            "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin" LF /[a-z]{1,9}/\n%import common.LF'},
        },
    ]
    called = openai_client.responses.create(
        model="tiny-hybrid",
        input="go",
        tools=tools,
        tool_choice={"type": "function", "name": "list_files"},
        parallel_tool_calls=False,
        max_output_tokens=80,
    )
    (call,) = called.output
    patched = openai_client.responses.create(
        model="tiny-hybrid",
        input=[
            {"role": "user", "content": "go"},
            call.model_dump(),
            {"type": "function_call_output", "call_id": call.call_id, "output": "x"},
        ],
        tools=tools,
        tool_choice={"type": "custom", "name": "patch"},
        parallel_tool_calls=False,
        max_output_tokens=80,
    )
    (patch,) = patched.output

    assert (call.type, call.name, call.namespace) == ("function_call", "list_files", "agents")
    assert "path" in json.loads(call.arguments)
    assert (patch.type, patch.name) == ("custom_tool_call", "patch")
    assert patch.input.startswith("*** Begin\n")


def test_openai_chat_calls_custom_tools(openai_client: Any) -> None:
    """A tool that takes a text comes back as `custom`, held to its regular expression, and into the history again."""
    grammar = {"type": "grammar", "grammar": {"syntax": "regex", "definition": r"[a-z]{1,5}/\d\d\.py"}}
    tool = {"type": "custom", "custom": {"name": "open", "description": "d", "format": grammar}}
    asked: list[Any] = [{"role": "user", "content": "go"}]
    settings: dict[str, Any] = {"model": "tiny-hybrid", "tools": [tool], "max_tokens": 80, "parallel_tool_calls": False,
                                "tool_choice": {"type": "custom", "custom": {"name": "open"}}}  # fmt: skip
    message = openai_client.chat.completions.create(messages=asked, **settings).choices[0].message
    (call,) = message.tool_calls
    chunks = openai_client.chat.completions.create(messages=asked, stream=True, **settings)
    streamed = [t for c in chunks for t in c.choices[0].delta.model_dump().get("tool_calls") or ()]
    asked += [message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "done"}]
    del settings["tool_choice"], settings["parallel_tool_calls"]
    after = openai_client.chat.completions.create(messages=asked, **settings | {"max_tokens": 3})

    assert (call.type, call.custom.name) == ("custom", "open")
    assert re.fullmatch(r"[a-z]{1,5}/\d\d\.py", call.custom.input)
    assert [t["type"] for t in streamed[:1]] == ["custom"]
    assert re.fullmatch(r"[a-z]{1,5}/\d\d\.py", streamed[1]["custom"]["input"])
    assert after.usage.prompt_tokens > 10


def test_embeddings_are_refused_with_the_reason(openai_client: Any, live: Any) -> None:
    """A 404 reads as a wrong address."""
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError, match="no model here makes embeddings"):
        openai_client.embeddings.create(model="tiny-hybrid", input="x")


def test_openai_errors_are_openais(openai_client: Any) -> None:
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.NotFoundError) as unknown:
        openai_client.responses.create(model="gpt-9", input="hi")
    assert unknown.value.code == "model_not_found"
    for ask in (
        lambda: openai_client.responses.create(model="tiny-hybrid", input="word " * 9000),
        lambda: openai_client.chat.completions.create(model="tiny-hybrid", messages=[{"role": "user", "content": "word " * 9000}]),
    ):
        with pytest.raises(openai.BadRequestError) as long:
            ask()
        assert long.value.code == "context_length_exceeded"
        assert "4096" in str(long.value)


def test_anthropic_streams_calls_and_counts(anthropic_client: Any) -> None:
    tools = [{"name": TOOL["name"], "description": "d", "input_schema": TOOL["parameters"]}]
    settings: dict[str, Any] = {"model": "tiny-hybrid", "messages": ASKED, "tools": tools, "system": "Be brief."}
    counted = anthropic_client.messages.count_tokens(**settings).input_tokens
    with anthropic_client.messages.stream(**settings, max_tokens=90, tool_choice={"type": "tool", "name": TOOL["name"]}) as stream:
        final = stream.get_final_message()
    use = final.content[-1]

    assert (final.stop_reason, use.type, use.name) == ("tool_use", "tool_use", TOOL["name"])
    assert isinstance(use.input["path"], str)
    assert final.usage.input_tokens + final.usage.cache_read_input_tokens == counted
    again = anthropic_client.messages.create(
        **{**settings, "messages": [
            *ASKED,
            {"role": "assistant", "content": [use.model_dump()]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "a.py"}]},
                {"type": "text", "text": "?"},
            ]},
        ]},
        max_tokens=6,
        thinking={"type": "disabled"},
    )  # fmt: skip
    assert again.stop_reason in ("max_tokens", "end_turn")


def test_anthropic_names_its_stop_sequence(anthropic_client: Any) -> None:
    settings: dict[str, Any] = {"model": "tiny-hybrid", "messages": ASKED, "max_tokens": 30, "extra_body": {"temperature": 0}}
    said = anthropic_client.messages.create(**settings).content[0].text
    cut = anthropic_client.messages.create(**settings, stop_sequences=[said[3:5]])

    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", said[3:5])
    assert "".join(b.text for b in cut.content) == said[: said.index(said[3:5])]


def test_anthropic_errors_are_anthropics(anthropic_client: Any) -> None:
    anthropic = pytest.importorskip("anthropic")
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        anthropic_client.messages.create(model="tiny-hybrid", messages=[{"role": "user", "content": "word " * 9000}], max_tokens=9)


def test_ollama_talks_lists_and_shows(ollama_client: Any) -> None:
    listed, *_ = ollama_client.list().models
    shown = ollama_client.show("tiny-hybrid")
    chunks = list(ollama_client.chat("tiny-hybrid:latest", ASKED, stream=True, options={"num_predict": 10, "temperature": 0}))
    whole = ollama_client.chat("tiny-hybrid", ASKED, options={"num_predict": 10, "temperature": 0})

    assert listed.model == "tiny-hybrid"
    assert "tools" in shown.capabilities
    assert "".join(c.message.content or "" for c in chunks) == whole.message.content
    assert (chunks[-1].done, chunks[-1].done_reason, chunks[-1].eval_count) == (True, "length", 10)
    assert ollama_client.ps().models[0].context_length == 4096
    assert ollama_client.generate("tiny-hybrid", "import os\n", raw=True, options={"num_predict": 4}).eval_count <= 4
    assert ollama_client.generate("tiny-hybrid").done_reason == "load"


def test_ollama_calls_a_tool_and_keeps_a_format(ollama_client: Any) -> None:
    found = ollama_client.chat("tiny-hybrid", ASKED, format=SCHEMA, options={"num_predict": 60})
    assert json.loads(found.message.content)["label"] in ("bug", "feature", "question")
    turn = {"role": "assistant", "tool_calls": [{"function": {"name": "list_files", "arguments": {"path": "."}}}]}
    told = [*ASKED, turn, {"role": "tool", "tool_name": "list_files", "content": "a.py"}]
    answer = ollama_client.chat("tiny-hybrid", told, tools=[{"type": "function", "function": TOOL}], options={"num_predict": 5})
    assert answer.eval_count <= 5


def test_ollama_unloads_loads_and_asks_for_a_context(ollama_client: Any, live: Any) -> None:
    ollama = pytest.importorskip("ollama")
    assert ollama_client.generate("tiny-hybrid", keep_alive=0).done_reason == "unload"
    for _ in range(200):
        if not ollama_client.ps().models:
            break
        time.sleep(0.05)
    assert not live.models.loaded
    few = {"num_predict": 2}
    assert ollama_client.chat("tiny-hybrid", ASKED, options=few, keep_alive="10m").load_duration > 0
    (loaded,) = ollama_client.ps().models
    assert loaded.context_length == 4096
    left = (loaded.expires_at - datetime.now(UTC)).total_seconds()
    assert 500 < left < 601
    ollama_client.chat("tiny-hybrid", ASKED, options={**few, "num_ctx": 1024})
    assert ollama_client.ps().models[0].context_length == 4096  # the loaded one is enough
    with pytest.raises(ollama.ResponseError, match=r"the prompt has \d+ tokens and the context is 8"):
        ollama_client.chat("tiny-hybrid", ASKED, options={**few, "num_ctx": 8})
    ollama_client.chat("tiny-hybrid", ASKED, options={**few, "num_ctx": 5000}, keep_alive=-1)
    (loaded,) = ollama_client.ps().models
    assert (loaded.context_length, loaded.expires_at.year) == (5000, 9999)
    with pytest.raises(ollama.ResponseError, match="num_ctx 99999999 is more than the 65536 tokens"):
        ollama_client.generate("tiny-hybrid", "x", options={"num_ctx": 99_999_999})
    with pytest.raises(ollama.ResponseError, match="no duration"):
        ollama_client.generate("tiny-hybrid", "x", keep_alive="soon")
    ollama_client.generate("tiny-hybrid", keep_alive=0)  # the next test finds it with its usual context
    for _ in range(200):
        if not ollama_client.ps().models:
            break
        time.sleep(0.05)
    assert ollama_client.generate("tiny-hybrid", keep_alive=-1).done_reason == "load"
    assert ollama_client.ps().models[0].context_length == 4096


def test_ollama_pulls_from_the_hub(ollama_client: Any, live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The download is another test's; here its progress becomes Ollama's lines, and its error one."""
    ollama = pytest.importorskip("ollama")
    from headwise.errors import SpecError
    from headwise.spec import hub

    asked: list[str] = []

    def fetch(name: str, *, weights: bool, progress: Any) -> None:
        asked.append(name)
        for done in (0, 50, 100):
            progress("a.gguf", done, 100)
        if name == "org/gone":
            raise SpecError("it is gone", why="a test", do="nothing")

    monkeypatch.setattr(hub, "fetch", fetch)
    told = list(ollama_client.pull("hf.co/org/name:Q4_K_M", stream=True))
    assert [t.completed for t in told if t.status == "pulling a.gguf"] == [0, 50, 100]
    assert (told[0].status, told[-1].status, told[1].total) == ("pulling manifest", "success", 100)
    assert ollama_client.pull("org/name").status == "success"
    with pytest.raises(ollama.ResponseError, match="it is gone"):
        ollama_client.pull("org/gone")
    assert ollama_client.pull("tiny-hybrid:latest").status == "success"
    assert asked == ["org/name:Q4_K_M", "org/name", "org/gone"]


def test_ollama_is_told_what_is_not_here(ollama_client: Any) -> None:
    ollama = pytest.importorskip("ollama")
    with pytest.raises(ollama.ResponseError, match="not on this machine; the nearest names are tiny-hybrid"):
        ollama_client.pull("tiny-hibrid")
    with pytest.raises(ollama.ResponseError, match="not supported"):
        ollama_client.copy("a", "b")
    with pytest.raises(ollama.ResponseError, match="not supported"):
        ollama_client.delete("a")
    with pytest.raises(ollama.ResponseError, match="no model here makes embeddings"):
        ollama_client.embed("tiny-hybrid", "text")


@pytest.mark.parametrize("provider", ["openai", "ollama_chat", "anthropic"])
def test_litellm_speaks_three_protocols(live: Any, provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """litellm is large, and no package that the tests ask for: run where it is installed."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network for prices
    litellm = pytest.importorskip("litellm")
    base = live.url + ("/v1" if provider == "openai" else "")
    settings: dict[str, Any] = {"model": f"{provider}/tiny-hybrid", "api_base": base, "api_key": "none", "messages": ASKED}
    whole = litellm.completion(**settings, max_tokens=20, temperature=0)
    chunks = list(litellm.completion(**settings, max_tokens=20, temperature=0, stream=True))

    text = whole.choices[0].message.content
    assert text
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert whole.usage.prompt_tokens > 5
    assert whole.usage.completion_tokens == 20
    if provider == "openai":
        form = {"type": "json_schema", "json_schema": {"name": "label", "strict": True, "schema": SCHEMA}}
        answer = litellm.completion(**settings, response_format=form, max_tokens=80)
        assert json.loads(answer.choices[0].message.content)["label"] in ("bug", "feature", "question")
        with pytest.raises(litellm.NotFoundError, match="nearest names are"):
            litellm.completion(**{**settings, "model": "openai/tiny-hybird"})
