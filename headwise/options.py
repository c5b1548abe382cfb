"""What can be set once: the options of run, serve, plan, verify and explain that a file or the environment may give.

One table. The command line makes its flags from it, a file its keys, the environment its names (`HEADWISE_` and the key in
capitals). A flag goes before the environment, that before `headwise.toml` of the working directory, that before the user's
own file, that before the default. `HEADWISE_CONFIG` names one file in place of both.

In a file a key at the top counts for every verb that has it, one in a table `[serve]` for that verb only.
"""

from __future__ import annotations

import argparse
import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from headwise.errors import UsageError

Value = str | int | float | bool | list[str] | None
VERBS = ("run", "serve", "plan", "explain", "verify")
KV_TYPES = "f32|f16|bf16|fp8|q8_0|q4_0"
FILE = "headwise.toml"
_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_KINDS = {"text": "a text", "whole": "a whole number", "number": "a number", "switch": "true or false", "list": "a list of texts"}


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Args:
        name: as attribute, key of a file, and with dashes as flag.
        verbs: whose flag it is.
        default: where nobody says anything; `defaults` has those of single verbs that differ.
        secret: its value is not printed.
        unset: what happens where nobody says anything and there is no default to name.
    """

    name: str
    kind: Literal["text", "whole", "number", "switch", "list"]
    verbs: tuple[str, ...]
    help: str
    metavar: str | None = None
    default: Value = None
    defaults: Mapping[str, Value] = field(default_factory=dict[str, Value])
    secret: bool = False
    unset: str = ""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "HEADWISE_" + self.name.upper()

    def default_of(self, verb: str) -> Value:
        found = self.defaults.get(verb, self.default)
        return list(found) if isinstance(found, list) else found


_LOADING = ("run", "serve", "verify")
_KV = ("run", "serve", "plan", "explain", "verify")
MODEL = Option("model", "text", ("run", "serve"), "a directory, a .gguf file, ollama:NAME, hf:ORG/NAME")
FURTHER_MODELS = Option("further_models", "list", ("serve",), "further models, loaded when a request names them", default=[])
POSITIONAL = (MODEL, FURTHER_MODELS)  # on the command line they have no flag
OPTIONS = (
    *POSITIONAL,
    Option("kv", "text", _KV, "KV type of all layers", KV_TYPES),
    Option("kv_global", "text", _KV, "KV type of the global layers", "T"),
    Option("kv_sliding", "text", _KV, "KV type of the sliding layers", "T"),
    Option("kv_layout", "text", _KV, "where K and V are one tensor: V and K's rotated values, or V alone", "v+rotated|v",
           unset="v+rotated"),
    Option("context", "whole", (*_LOADING, "plan"), "tokens of prompt and answer to plan memory for", "N"),
    Option("ubatch", "whole", (*_LOADING, "plan"), "most tokens of one prefill step", "N",
           unset="up to 4,096, what a card that is known computes in half a second, and as fits; else 512"),
    Option("device", "text", _LOADING, "default: CUDA where there is one, as few cards as hold the model", "cpu|cuda[:N]"),
    Option("gpu", "text", _LOADING, "the cards that share the layers, e.g. 0,1, or with limits 0:12,1:24", "N[:GiB],N"),
    Option("weights", "text", ("run", "serve"), "make the layers' matrices and experts, in floats, fp8 at load, on a GPU", "fp8"),
    Option("dtype", "text", (*_LOADING, "plan"), "type of the activations", "f32|bf16|f16"),
    Option("backend", "text", (*_LOADING, "explain"), "force backends, where their rows take the layers", "X|sliding=X,global=Y"),
    Option("allow_fallback", "switch", _LOADING, "accept layers that do not run fused", default=False),
    Option("slots", "whole", ("serve", "plan"), "sequences at once; serve: default up to 4, without a shorter context", "N",
           unset="serve: up to 4, as many as fit without a shorter context, because agents make parallel calls"),
    Option("pool", "whole", ("serve", "plan"), "tokens that global layers hold of all sequences; default a context each", "N",
           unset="a context for each slot; with slots unset too, as many as fit"),
    Option("deterministic", "switch", ("serve",), "answers do not depend on what else runs", default=False),
    Option("speculate", "switch", ("run", "serve"), "draft tokens from what a text repeats, where that pays", default=True),
    Option("max_tokens", "whole", ("run", "serve"), "of an answer, default 128; serve: of those whose request sets none",
           "N", defaults={"run": 128}),
    Option("temperature", "number", ("run",), "0, the default, is greedy; without any prompt 0.8", "T"),
    Option("top_p", "number", ("run",), "default 1.0; without any prompt 0.95", "P"),
    Option("top_k", "whole", ("run",), "0 is off", "K", 0),
    Option("seed", "whole", ("run",), "the same seed gives the same tokens", "S"),
    Option("host", "text", ("serve",), "default: this machine only", "ADDRESS", "127.0.0.1"),
    Option("port", "whole", ("serve",), "default 7433; 0 takes a free one", "N", 7433),
    Option("ollama_compat", "switch", ("serve",), "also on 127.0.0.1:11434, where clients look for Ollama", default=False),
    Option("api_key", "text", ("serve",), "what clients must send; default: none", "KEY", secret=True),
    Option("alias", "list", ("serve",), "a further name of the first model; repeat for several", "NAME", default=[]),
    Option("keep_alive", "text", ("serve",), "how long an idle model stays; default: for ever if named at start, else 5m", "10m"),
    Option("only", "switch", ("serve",), "serve none but the models named", default=False),
    Option("max_body", "whole", ("serve",), "largest request", "MIB", 32),
    Option("stall_seconds", "number", ("serve",), "restart an engine that makes no progress", "S", 120.0),
)  # fmt: skip
BY_NAME = {option.name: option for option in OPTIONS}


def add_options(parser: argparse.ArgumentParser, verb: str, *names: str) -> None:
    """The flags of `verb`; those named, or all. What is not given is absent: `fill` knows where else to look."""
    for option in OPTIONS:
        if verb not in option.verbs or option in POSITIONAL or (names and option.name not in names):
            continue
        if option.kind == "switch":
            made = parser.add_argument(option.flag, action=argparse.BooleanOptionalAction)
        elif option.kind == "list":
            made = parser.add_argument(option.flag, action="append")
        else:
            made = parser.add_argument(option.flag, type={"whole": int, "number": float}.get(option.kind, str))
        made.default, made.help, made.metavar = argparse.SUPPRESS, option.help, option.metavar


@dataclass(frozen=True, slots=True)
class Setting:
    """The value of an option for a verb, and who said it."""

    option: Option
    verb: str
    value: Value
    source: str


def fill(args: argparse.Namespace, verb: str, env: Mapping[str, str], directory: Path) -> None:
    """Gives `args` the options of `verb` that were not on the command line.

    Raises:
        UsageError: a file or the environment says something that is not known or makes no sense.
    """
    for setting in settings(verb, env, directory):
        if getattr(args, setting.option.name, None) is None:
            setattr(args, setting.option.name, setting.value)


def settings(verb: str, env: Mapping[str, str], directory: Path) -> list[Setting]:
    """Every option of `verb` as it is without a command line. Raises UsageError as `fill` does."""
    _no_near_miss(env)
    read = [(path, _read(path)) for path in _files(env, directory)]
    return [_setting(option, verb, env, read) for option in OPTIONS if verb in option.verbs]


def _setting(option: Option, verb: str, env: Mapping[str, str], read: Sequence[tuple[Path, Mapping[str, object]]]) -> Setting:
    if said := env.get(option.variable):  # an empty one is none, as everywhere
        return Setting(option, verb, _from_text(option, said), option.variable)
    for path, content in read:
        table = content.get(verb)
        if isinstance(table, Mapping) and option.name in table:
            return Setting(option, verb, _from_toml(option, table[option.name], path), f"{path} [{verb}]")
        if option.name in content:
            return Setting(option, verb, _from_toml(option, content[option.name], path), str(path))
    return Setting(option, verb, option.default_of(verb), "default")


def _files(env: Mapping[str, str], directory: Path) -> Iterator[Path]:
    """The files to read, the one that counts first."""
    if named := env.get("HEADWISE_CONFIG"):
        if not (path := Path(named)).is_file():
            raise UsageError(f"{named} is no file", why="HEADWISE_CONFIG names it", do="unset HEADWISE_CONFIG, or name a TOML file")
        yield path
        return
    base = env.get("XDG_CONFIG_HOME") or (Path(env["HOME"]) / ".config" if env.get("HOME") else None)
    for path in (directory / FILE, Path(base) / "headwise/config.toml" if base else None):
        if path is not None and path.is_file():
            yield path


def _read(path: Path) -> Mapping[str, object]:
    """A file's content, every key of it known."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read", why=str(error), do="headwise config shows what each option is") from error
    for key, value in content.items():
        if isinstance(value, Mapping) and key in VERBS:
            known = [o.name for o in OPTIONS if key in o.verbs]
            for inner in value:
                _known(inner, known, path, f" in [{key}]")
        else:
            _known(key, [*BY_NAME, *(() if key in BY_NAME else VERBS)], path, "")
    return content


def _known(key: str, known: Sequence[str], path: Path, where: str) -> None:
    if key not in known or key in VERBS:
        near = difflib.get_close_matches(key.replace("-", "_").lower(), known, n=1, cutoff=0.5)
        do = f"{near[0]} is one" if near and near[0] != key else f"known are {', '.join(known)}"
        why = "it is a table, with keys of its own" if key in VERBS else "no option has that name"
        raise UsageError(f"{path}: the key {key}{where} is not known", why=why, do=do)


def _no_near_miss(env: Mapping[str, str]) -> None:
    """Refuses a name that is almost one of ours; others that begin so are none of our business (a service's address, say)."""
    known = ["HEADWISE_CONFIG", *(o.variable for o in OPTIONS)]
    for name in sorted(env):
        if name.startswith("HEADWISE_") and name not in known:
            ends = [k.removeprefix("HEADWISE_") for k in known]
            if near := difflib.get_close_matches(name.removeprefix("HEADWISE_"), ends, n=1, cutoff=0.8):
                do = f"HEADWISE_{near[0]} is one"
                raise UsageError(f"the variable {name} is not known", why="no option has that name", do=do)


def _from_text(option: Option, said: str) -> Value:
    try:
        match option.kind:
            case "whole":
                return int(said)
            case "number":
                return float(said)
            case "switch":
                return _WORDS[said.strip().lower()]
            case "list":
                return [part.strip() for part in said.split(",") if part.strip()]
            case "text":
                return said
    except (ValueError, KeyError):
        shown = "" if option.secret else f"; it says {said!r}"
        raise _wrong(option, option.variable, shown) from None


def _from_toml(option: Option, value: object, path: Path) -> Value:
    match option.kind, value:
        case "switch", bool():
            return value
        case _, bool():
            pass
        case "whole", int():
            return value
        case "number", int() | float():
            return float(value)
        case "list", list() if all(isinstance(v, str) for v in value):
            return list(value)
        case "text", str():
            return value
    raise _wrong(option, f"{path}: {option.name}", "" if option.secret else f"; it is {value!r}")


def _wrong(option: Option, where: str, shown: str) -> UsageError:
    example = {"text": '"..."', "whole": "8", "number": "0.5", "switch": "true", "list": '["a", "b"]'}[option.kind]
    do = f"{option.name} = {example}" if ":" in where else f"{where}={'a,b' if option.kind == 'list' else example.strip(chr(34))}"
    return UsageError(f"{where} must be {_KINDS[option.kind]}", why=f"{option.flag}: {option.help}{shown}", do=do)


def settings_view(found: Sequence[Setting]) -> RenderableType:
    """A row an option and value, with who said it and the verbs that it holds for."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for head in ("option", "value", "said by", "for"):
        table.add_column(head, overflow="fold")
    rows: dict[tuple[str, str, str], list[str]] = {}
    for s in found:
        unset = f"({s.option.unset})" if s.option.unset else ""
        value = "(hidden)" if s.option.secret and s.value else unset if s.value is None else json.dumps(s.value)
        rows.setdefault((s.option.name, value, s.source), []).append(s.verb)
    order = [o.name for o in OPTIONS]
    for (name, value, source), whose in sorted(rows.items(), key=lambda row: order.index(row[0][0])):
        table.add_row(name, Text(value), Text(source), ", ".join(whose), style=None if source != "default" else "dim")
    return table


def settings_json(found: Sequence[Setting]) -> dict[str, object]:
    return {
        "options": [
            {
                "name": s.option.name,
                "verb": s.verb,
                "value": "(hidden)" if s.option.secret and s.value else s.value,
                "source": s.source,
                "flag": None if s.option in POSITIONAL else s.option.flag,
                "variable": s.option.variable,
            }
            for s in found
        ]
    }
