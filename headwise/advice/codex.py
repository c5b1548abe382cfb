"""The configuration with which Codex talks to a server on this machine: config.toml and a catalogue of one model.

Codex 0.169.0 speaks the Responses API only, and no longer reads `[profiles.NAME]` from config.toml. An unknown model
gets fallback metadata, with a context window that is not the server's; the catalogue says the true one.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from headwise.advice.setting import Advice, Block, Setting
from headwise.errors import HeadwiseError, PlanError, UsageError
from headwise.spec.read import EMBEDDED, open_model

TRIED = "0.169.0"  # the Codex that ran with these files
PORT = 7433
CONFIG, MODELS = "config.toml", "headwise-models.json"
FIRST_PROMPT = 4_400  # tokens of Codex's first request with short instructions: its tools and environment
LEAST_CONTEXT = 8_192
IDLE_MS = 900_000
CODEX = f"openai/codex {TRIED}"
# Names at which Codex switches to protocols of OpenAI's own servers; gpt-oss is not among them.
_OPENAI = re.compile(r"(gpt-\d|o\d|codex|chatgpt)", re.IGNORECASE)

INSTRUCTIONS = """\
You are a coding agent that works in the user's workspace through a shell.
- Read before you write: find files with `rg --files`, search with `rg`, look at the code around what you change.
- Run commands with exec_command. Run the tests that cover a change, and read what they print.
- Edit files by running apply_patch through exec_command:
apply_patch <<'EOF'
*** Begin Patch
*** Update File: path/to/file.py
@@
-old line
+new line
*** End Patch
EOF
  (`*** Add File: path` with lines that begin with +, `*** Delete File: path`.)
- Change no more than the task asks. Say in a few sentences what you changed and how you checked it.
"""


def codex_config(*, model: str | None = None, port: int = PORT, context: int | None = None, env: Mapping[str, str]) -> Advice:
    """The two files, in `Advice.blocks`, and a reason for each setting.

    Args:
        model: the name that the server serves; default the embedded model.
        port: of the server, on this machine.
        context: tokens that the server was started with; None = all that the model has, where it is known.
        env: the environment, for the places of Ollama's store.
    Raises:
        UsageError: a name, port or context that makes no sense; PlanError: a context that Codex's own prompt fills.
    """
    name = EMBEDDED if model is None else model
    if not name.strip() or not name.isprintable():
        raise UsageError(f"{name!r} is no model name", why="it is empty or has characters that cannot be seen", do="--model NAME")
    if _OPENAI.match(name.rsplit("/", 1)[-1]):
        raise UsageError(
            f"{name} is a name of OpenAI's own models",
            why="Codex sends those another form of request, which local servers do not know",
            do="serve the model under its own name, and give that to --model",
        )
    if not 0 < port < 65_536:
        raise UsageError(f"--port {port} makes no sense", why="it must lie from 1 to 65535", do=f"--port {PORT}")
    window, known = _window(name, context, env)
    files = {CONFIG: _config(name, port), MODELS: _models(name, window)}
    return Advice(
        engine="codex",
        version=TRIED,
        model=name,
        weights=None,
        context=window,
        kv=None,
        total_bytes=None,
        cards=(),
        settings=_settings(name, port, window),
        blocks=(Block(CONFIG, files[CONFIG]), Block(MODELS, files[MODELS])),
        notes=tuple(_notes(window, context, known)),
    )


def _window(name: str, context: int | None, env: Mapping[str, str]) -> tuple[int, int | None]:
    """The context window to state, and the model's own where it is known."""
    known = None
    for source in (name, f"ollama:{name}"):
        try:
            known = open_model(source, env=env).spec.max_context
            break
        except HeadwiseError:
            continue
    if context is None and known is None:
        raise UsageError(
            f"the context of {name} is not known here",
            why="it is no path, no catalogue name and not in Ollama's store, and Codex must be told the true one",
            do="--context N, the number of tokens that the server was started with",
        )
    window = known if context is None else context
    assert window is not None
    if context is not None and context < 1:
        raise UsageError(f"--context {context} makes no sense", why="it is a number of tokens", do="--context 32768")
    if known is not None and window > known:
        raise UsageError(f"{window} tokens are more than {name} can attend to", why=f"it has {known}", do=f"--context {known}")
    if window < LEAST_CONTEXT:
        raise PlanError(
            f"{window} tokens are too few for Codex",
            why=f"its first request holds about {FIRST_PROMPT:,} tokens before the task, and it keeps its whole history",
            do=f"a server with {LEAST_CONTEXT} tokens at least; 32768 is comfortable",
        )
    return window, known


def _config(name: str, port: int) -> str:
    return f"""\
model = {json.dumps(name, ensure_ascii=False)}
model_provider = "headwise"
model_catalog_json = "{MODELS}"
web_search = "disabled"

[model_providers.headwise]
name = "headwise"
base_url = "http://127.0.0.1:{port}/v1"
wire_api = "responses"
stream_idle_timeout_ms = {IDLE_MS}
"""


def _models(name: str, window: int) -> str:
    entry = {
        "slug": name,
        "display_name": name,
        "context_window": window,
        "shell_type": "unified_exec",
        "base_instructions": INSTRUCTIONS,
        "supported_reasoning_levels": [],
        "support_verbosity": False,
        "truncation_policy": {"mode": "bytes", "limit": 10_000},
        "experimental_supported_tools": [],
        "visibility": "list",
        "supported_in_api": True,
        "priority": 0,
    }
    return json.dumps({"models": [entry]}, indent=1, ensure_ascii=False) + "\n"


def _settings(name: str, port: int, window: int) -> tuple[Setting, ...]:
    return tuple(
        Setting(name=key, value=value, reason=reason, source=source)
        for key, value, reason, source in (
            ("model", name, "the name the server serves; never one of OpenAI's, for which Codex changes its requests", CODEX),
            ("model_provider", "headwise", "the table below; `provider` is no key", CODEX),
            ("profiles", None, "[profiles.NAME] in config.toml is an error at start: a profile is NAME.config.toml now", CODEX),
            ("model_catalog_json", MODELS, "without it the model gets fallback metadata; a path relative to this file", CODEX),
            ("web_search", "disabled", "no server on this machine searches the web, and the tool costs prompt", CODEX),
            (
                "base_url",
                f"http://127.0.0.1:{port}/v1",
                "Codex posts to /responses below it, and asks for no list of models",
                CODEX,
            ),
            ("wire_api", "responses", "the only one: chat is an error at start", f"{CODEX}; discussion 7782"),
            (
                "stream_idle_timeout_ms",
                str(IDLE_MS),
                "a long prompt is read for minutes before the first token; comments in the stream are no sign of life to it",
                f"{CODEX}; #31539",
            ),
            ("context_window", str(window), "what the server serves: Codex compacts its history by this number", CODEX),
            ("shell_type", "unified_exec", "the shell tool that 0.169.0 sends; there is no `shell` tool any more", CODEX),
            (
                "apply_patch_tool_type",
                None,
                "patches go through the shell tool: llama.cpp and Ollama know no custom tools",
                "llama.cpp #23041; Ollama fb3076099",
            ),
            (
                "base_instructions",
                "short",
                "Codex's own are about 3,500 tokens more, which a local model reads at every start",
                CODEX,
            ),
        )
    )


def _notes(window: int, context: int | None, known: int | None) -> list[str]:
    notes = [f"tried with Codex {TRIED}: `codex exec --strict-config` takes both files and completes a turn"]
    if context is None:
        notes.append(f"{window:,} tokens are all that the model has: give --context if the server was started with fewer")
    elif known is None:
        notes.append("the model is not known here, so its context was not checked")
    return notes


def write(advice: Advice, directory: Path) -> tuple[str, ...]:
    """Writes the blocks as files into `directory`, all or none, and says what was done; nothing is overwritten.

    Raises:
        UsageError: a file is there and differs, or the directory cannot be written.
    """
    done = []
    try:
        for block in advice.blocks:
            path = directory / block.title
            if path.exists() and path.read_bytes() != block.text.encode():
                raise UsageError(
                    f"{path} exists and differs",
                    why="it may hold settings of your own, and nothing is overwritten",
                    do=f"--write {shlex.quote(str(_free(directory)))}, then CODEX_HOME set to it; or move that file away",
                )
        directory.mkdir(parents=True, exist_ok=True)
        for block in advice.blocks:
            path = directory / block.title
            if path.exists():
                done.append(f"{path} is there already, the same")
            else:
                with path.open("xb") as file:
                    file.write(block.text.encode())
                done.append(f"wrote {path}")
    except OSError as error:
        raise UsageError(f"{directory} cannot be written", why=str(error), do="--write another directory") from error
    return (*done, f"CODEX_HOME={shlex.quote(str(directory.resolve()))} codex")


def _free(directory: Path) -> Path:
    """A directory beside `directory` that does not exist."""
    n = 1
    while (found := directory / f"headwise{n if n > 1 else ''}").exists():
        n += 1
    return found
