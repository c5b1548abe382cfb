"""The command line's words: each verb with its arguments; `options` has those that a file may give too."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from headwise import __version__, options
from headwise.errors import UsageError
from headwise.options import KV_TYPES, add_options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        raise UsageError(message, do=f"{self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """Of all verbs; what is wrong raises UsageError. Options of the table are absent where they are not given."""
    made = _Parser(prog="headwise", description="Run, plan and explain hybrid-attention models.")
    made.add_argument("--version", action="version", version=f"headwise {__version__}")
    verbs = made.add_subparsers(dest="verb", required=True, parser_class=_Parser, metavar="VERB")
    _run_parser(verbs.add_parser("run", help="continue text with a model"))
    _plan_parser(verbs.add_parser("plan", help="memory to the byte, before anything is loaded"))
    _explain_parser(verbs.add_parser("explain", help="which backend each layer would run on, and why"))
    _verify_parser(verbs.add_parser("verify", help="check every backend in use against the reference"))
    _doctor_parser(verbs.add_parser("doctor", help="what the log of Ollama, llama.cpp or vLLM proves about attention and cache"))
    _codex_parser(verbs.add_parser("codex-config", help="the configuration of Codex for a server on this machine"))
    _settings_parser(
        verbs.add_parser("ollama-env", help="the environment of Ollama that fits a model and cards"), "--engine-version", "0.20.4"
    )
    _settings_parser(verbs.add_parser("llama-flags", help="the flags of llama-server that fit"), "--version", "b10600, 2026-10-01")
    _settings_parser(verbs.add_parser("vllm-args", help="the arguments of vLLM that fit"), "--version", "0.33.0")
    _probe_parser(verbs.add_parser("probe", help="a running server at production-length prompts: speed, slope, slow or stuck"))
    _serve_parser(verbs.add_parser("serve", help="answer OpenAI, Anthropic and Ollama clients"))
    _list_parser(verbs.add_parser("list", help="the models that this machine has"))
    _pull_parser(verbs.add_parser("pull", help="download a model from the Hub"))
    _ps_parser(verbs.add_parser("ps", help="the models that a running server has loaded"))
    _stop_parser(verbs.add_parser("stop", help="let a running server unload a model"))
    _bench_parser(verbs.add_parser("bench", help="measure the kernels on this card"))
    _config_parser(verbs.add_parser("config", help="every option that can be set once, with its value and who set it"))
    _completion_parser(verbs.add_parser("completion", help="the completion script of a shell"))
    return made


def _common(p: argparse.ArgumentParser, verb: str) -> None:
    p.add_argument(
        "model",
        nargs="?",
        help="a directory, a .gguf file, ollama:NAME, hf:ORG/NAME, or a catalogue name (plan, explain); "
        "without it: the embedded tiny-hybrid",
    )
    p.add_argument("--json", action="store_true", help="one JSON object on standard output")
    p.add_argument("--ignore-key", action="append", default=[], metavar="K", help="go on although nobody reads config key K")
    add_options(p, verb)


def _run_parser(p: argparse.ArgumentParser) -> None:
    _common(p, "run")
    p.add_argument("-p", "--prompt", metavar="TEXT", help="text to continue; without any: a module of the standard library")
    p.add_argument("--file", metavar="F", help="a file with the prompt; - is standard input")
    p.add_argument("stdin", nargs="?", choices=["-"], metavar="-", help="read the prompt from standard input")
    p.add_argument("--chat-template", metavar="F", help="a jinja file to use in place of the model's own; implies --chat")
    p.add_argument("--chat", action="store_true", help="the prompt is a user's turn in the model's own chat template")
    p.add_argument("--no-check", action="store_true", help="skip the start-up self-check")


def _plan_parser(p: argparse.ArgumentParser) -> None:
    _common(p, "plan")
    p.add_argument("--weights", metavar="bf16|fp8|q8_0|q4_k_m|...", help="count this weight type")
    p.add_argument("--gpu", action="append", default=[], metavar="NAME[:GiB],NAME", help="the cards that share the layers")
    p.add_argument("--device", choices=("cpu",), help="plan for this machine's CPU")
    p.add_argument("--engine", default="headwise", metavar="headwise|llama.cpp|ollama|vllm[@version]")
    p.add_argument("--swa-full", action="store_true", help="llama.cpp's --swa-full")


def _explain_parser(p: argparse.ArgumentParser) -> None:
    _common(p, "explain")
    p.add_argument("--gpu", metavar="NAME", help="a card of the table, or cpu; default: what is here")
    p.add_argument("--engine", default="headwise", metavar="headwise|llama.cpp|ollama|vllm[@version]")


def _verify_parser(p: argparse.ArgumentParser) -> None:
    _common(p, "verify")
    p.add_argument("--against", metavar="URL", help="compare greedy tokens and log-probabilities with a running server")


def _doctor_parser(p: argparse.ArgumentParser) -> None:
    p.add_argument("log", nargs="?", metavar="LOG", help="a log file; - is standard input; without any: what runs here")
    p.add_argument("--systemd", metavar="UNIT", help="the log of a service, from journald")
    p.add_argument("--ollama", action="store_true", help="the log of this machine's Ollama")
    p.add_argument("--url", metavar="URL", help="a running server; its log too, where it runs here")
    p.add_argument("--html", metavar="FILE", help="write the report as one HTML file")
    p.add_argument("--gpu", action="append", default=[], metavar="NAME", help="the server's card, where its log does not name it")
    p.add_argument("--model", metavar="MODEL", help="whose log it is: a .gguf file, a directory, ollama:NAME or a catalogue name")
    p.add_argument("--json", action="store_true", help="one object on standard output")


def _codex_parser(p: argparse.ArgumentParser) -> None:
    p.add_argument("--port", type=int, default=7433, metavar="N", help="of the server; default 7433")
    p.add_argument("--model", metavar="NAME", help="as the server names it; default: the embedded tiny-hybrid")
    p.add_argument("--context", type=int, metavar="N", help="tokens that the server was started with; default: all the model's")
    p.add_argument("--write", type=Path, metavar="DIR", help="write the files there; nothing is overwritten")
    p.add_argument("--json", action="store_true", help="one object on standard output")


def _settings_parser(p: argparse.ArgumentParser, version: str, example: str) -> None:
    p.add_argument("model", help="a directory, a .gguf file, ollama:NAME, hf:ORG/NAME, or a catalogue name")
    p.add_argument("--gpu", action="append", default=[], metavar="NAME[:GiB]", help="a card, or cpu; repeat for several cards")
    p.add_argument("--context", type=int, metavar="N", help="tokens of one sequence; default: the most that fit")
    p.add_argument(version, dest="version", metavar="V", help=f"of the engine, e.g. {example}; default: the newest known")
    p.add_argument("--weights", metavar="q8_0|q4_k_m|...", help="count this weight type")
    p.add_argument("--ignore-key", action="append", default=[], metavar="K", help="go on although nobody reads config key K")
    p.add_argument("--json", action="store_true", help="one object on standard output")


def _lengths(text: str) -> list[int]:
    try:
        return [int(n) for n in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of token counts, such as 512,2048") from None


def _probe_parser(p: argparse.ArgumentParser) -> None:
    p.add_argument("url", metavar="URL", help="of llama-server, Ollama, vLLM, or any OpenAI-compatible server")
    p.add_argument("--lengths", type=_lengths, metavar="N,N", help="prompt tokens; default those of 512,2048,8192,32768 that fit")
    p.add_argument("--engine", choices=("ollama", "llama.cpp", "vllm", "openai"), help="default: whichever answers")
    p.add_argument("--model", metavar="NAME", help="which of the server's models; default the running or first one")
    p.add_argument("--compare", metavar="URL2", help="probe a second server too, and print the ratio per length")
    p.add_argument("--gate", action="store_true", help="exit 1 also where a length is slow: a readiness check")
    p.add_argument("--stall", type=float, metavar="SECONDS", help="stuck after so long without progress; default 60 or more")
    p.add_argument("--limit", type=float, metavar="SECONDS", help="the most for one prompt, whatever happens; default 900")
    p.add_argument("--model-source", metavar="MODEL", help="the served model as a file, ollama:NAME or catalogue name, to compare")
    p.add_argument("--gpu", action="append", default=[], metavar="NAME", help="the server's card; default this machine's")
    p.add_argument("--api-key-env", metavar="VAR", help="environment variable that holds the server's key")
    p.add_argument("--html", metavar="FILE", help="write the report as one HTML file")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output")


def _serve_parser(p: argparse.ArgumentParser) -> None:
    _common(p, "serve")
    p.add_argument(
        "further_models",
        nargs="*",
        default=argparse.SUPPRESS,
        metavar="MODEL",
        help="further models, loaded when a request names them",
    )


def _list_parser(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="one object on standard output")


def _pull_parser(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="hf:ORG/NAME[:TYPE]", help="a repository; TYPE is one GGUF of it, such as Q4_K_M")
    p.add_argument("--json", action="store_true", help="one object on standard output")


def _server(p: argparse.ArgumentParser) -> None:
    p.add_argument("--url", default="http://127.0.0.1:7433", metavar="URL", help="of the server; default http://127.0.0.1:7433")
    p.add_argument("--api-key-env", default="HEADWISE_API_KEY", metavar="VAR", help="environment variable that holds its key")
    p.add_argument("--json", action="store_true", help="one object on standard output")


def _ps_parser(p: argparse.ArgumentParser) -> None:
    _server(p)


def _stop_parser(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", help="as the server names it")
    _server(p)


def _bench_parser(p: argparse.ArgumentParser) -> None:
    p.add_argument("what", choices=("attention", "engine"))
    p.add_argument("models", nargs="*", metavar="MODEL", help="engine: catalogue names; default gemma-4-31b")
    p.add_argument("--lengths", default="512,4096,31744", metavar="N,N", help="engine: prompts of so many tokens")
    p.add_argument("--weights", default="bf16", metavar="bf16|fp8|q8_0|q4_k_m|...", help="engine: weight type")
    p.add_argument("--kv", default="bf16", metavar=KV_TYPES, help="engine: KV type of all layers")
    p.add_argument("--ubatch", type=int, default=2048, metavar="N", help="engine: most tokens of one prefill step")
    p.add_argument("--svg", metavar="FILE", help="draw there: attention the roofline, engine prefill over prompt length")
    p.add_argument("--json", action="store_true", help="one object on standard output")


def _config_parser(p: argparse.ArgumentParser) -> None:
    p.add_argument("of", nargs="?", choices=options.VERBS, metavar="VERB", help="|".join(options.VERBS) + "; default: all")
    p.add_argument("--json", action="store_true", help="one object on standard output")


def _completion_parser(p: argparse.ArgumentParser) -> None:
    p.add_argument("shell", choices=("bash", "zsh", "fish"))
