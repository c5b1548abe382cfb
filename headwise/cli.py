"""The command line: argument -> call -> print. No logic lives here.

Exit status: 0 fine, 1 a blocking problem, 2 usage, 130 interrupted. Every verb takes --json.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from headwise import options
from headwise.arguments import parser
from headwise.errors import HeadwiseError, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, runs, and turns our errors into messages; anything else is a bug and shows its traceback."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a pipe whose encoding has no block characters is no reason to stop
            stream.reconfigure(errors="replace")
    try:
        args = parser().parse_args(argv)
        if args.verb == "run" and args.model == "-":  # alone it is no model but standard input
            args.model, args.stdin = None, "-"
        if args.verb in options.VERBS:
            options.fill(args, args.verb, os.environ, Path.cwd())
        status = _VERBS[args.verb](args)
        sys.stdout.flush()
        return status
    except HeadwiseError as error:
        return _fail(error, as_json="--json" in argv)
    except KeyboardInterrupt:
        sys.stdout.flush()
        _stderr().show_cursor()  # a bar that was just being drawn leaves it hidden
        print("\ninterrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        if error.errno == errno.EPIPE:  # the reader of a pipe went away
            return 0
        return _fail(HeadwiseError("standard output cannot be written", why=str(error), do="make room where it goes"))


def _fail(error: HeadwiseError, *, as_json: bool = False) -> int:
    if as_json:
        print(json.dumps({"error": error.to_json()}))
    console = _stderr()
    console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)  # commands stay whole
    return error.exit_code


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        raise  # rich calls this where it caught the error; its own way out is exit code 1


def _stderr() -> Console:
    return _Console(stderr=True)


def _stdout() -> Console:
    return _Console()


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Bars on standard error, one per kind of work; nothing where that is no terminal."""
    with Progress(
        TextColumn("{task.description:>8}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn(),
        console=_stderr(), transient=True, disable=not sys.stderr.isatty(),
    ) as bars:  # fmt: skip
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


def _kv(args: argparse.Namespace) -> dict[str, str] | str | None:
    if args.kv_global or args.kv_sliding:
        return {k: v for k, v in (("global", args.kv_global or args.kv), ("sliding", args.kv_sliding or args.kv)) if v}
    return args.kv


def _device(args: argparse.Namespace) -> list[str] | str | None:
    if args.gpu is None:
        return args.device
    if args.device is not None:
        raise UsageError("--device and --gpu both name devices", why="--gpu 0,1 is cuda:0 and cuda:1", do="leave one out")
    return [f"cuda:{card}" for card in args.gpu.split(",")]


def _open(args: argparse.Namespace, *, weights: bool = False) -> Any:
    from headwise.spec.read import open_model

    return open_model(args.model, ignore_keys=args.ignore_key, env=os.environ, weights=weights)


def _prompt(args: argparse.Namespace) -> str:
    """The prompt of `run`."""
    if args.stdin == "-":
        args.file = "-" if args.file is None else args.file
    if args.prompt is not None and args.file is not None:
        raise UsageError("two prompts are given", why="-p, --file and - each name one", do="leave one out")
    if args.prompt is not None:
        return args.prompt
    if args.file is not None:
        return _text_file(args.file)
    from headwise.text.demo import demo_prompt

    return demo_prompt()


def _text_file(name: str) -> str:
    """The text of a file, or of standard input for `-`."""
    try:
        return (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{'standard input' if name == '-' else name} cannot be read", why=str(error), do="name a UTF-8 text file"
        ) from error


def _run(args: argparse.Namespace) -> int:
    text = _prompt(args)
    demo = args.prompt is None and args.file is None
    start = time.perf_counter()
    source = _open(args, weights=True)
    from headwise.engine.llm import LLM, prompt_too_long, run_context, tokenizer_of
    from headwise.engine.sample import Sampling
    from headwise.text.chat import encode_chat

    console = _stderr()
    tokenizer = tokenizer_of(source)
    template = None if args.chat_template is None else _text_file(args.chat_template)
    if args.chat or template:
        prompt = encode_chat(tokenizer, [{"role": "user", "content": text}], template=template)
    else:
        prompt = tokenizer.encode(text)
    if demo:  # a small model repeats itself when greedy: its own suggested sampling, with a seed so that it repeats
        settings = {"temperature": 0.8, "top_p": 0.95, "seed": 7}
    else:
        settings = {}
    names = ("max_tokens", "temperature", "top_p", "top_k", "seed")
    settings |= {name: value for name in names if (value := getattr(args, name)) is not None}
    Sampling(**settings)  # what makes no sense is refused before a long load, as is a prompt without room
    settings["speculate"] = args.speculate
    context = run_context(source.spec, len(prompt), args.max_tokens) if args.context is None else args.context
    if 0 < context <= min(len(prompt), source.spec.max_context):
        raise prompt_too_long(len(prompt), context, source.spec.max_context)
    with _progress() as progress:
        llm = LLM(
            source,
            context=context,
            tokenizer=tokenizer,
            kv=_kv(args),
            kv_layout=args.kv_layout,
            device=_device(args),
            weights=args.weights,
            dtype=args.dtype,
            chunk=args.ubatch,
            backend=args.backend,
            allow_fallback=args.allow_fallback,
            check=not args.no_check,
            progress=progress,
            on_warning=lambda line: console.print(f"warning: {line}", style="yellow", highlight=False),
        )
    ready_s = time.perf_counter() - start
    for note in llm.plan.notes:
        console.print(f"note: {note}", style="dim", highlight=False)
    if not all(c.fused for c in llm.choices):
        slow = [str(i) for i, c in enumerate(llm.choices) if not c.fused]
        console.print(f"warning: layers {', '.join(slow)} do not run fused (--allow-fallback)", style="yellow")
    if args.json:
        result = llm.generate(prompt, **settings)
        print(
            json.dumps({"text": result.text, "tokens": result.tokens, "finish": result.finish, "report": result.report.to_json()})
        )
        return 0
    if demo:
        shown = text[-1500:]
        console.print(f"[dim]... {len(prompt):,} tokens of {_demo_name()}, of which the end:[/]")
        console.print(shown, style="dim", markup=False, highlight=False, end="")
    with _progress() as progress:
        pieces = llm.stream(prompt, progress=progress, **settings)
        first = next(pieces, None)
    try:
        if first is not None:
            print(first.text, end="", flush=True)
        for piece in pieces:
            print(piece.text, end="", flush=True)
    finally:
        print(flush=True)
        if llm.report().prefill_s:
            from headwise.engine.render import report_view

            console.print(report_view(llm, ready_s))
    return 0


def _demo_name() -> str:
    return "calendar.py of this Python"


def _plan(args: argparse.Namespace) -> int:
    from headwise import api
    from headwise.planner.ceiling import ceiling
    from headwise.planner.render import plan_view

    if args.model is None and args.gpu:
        return _rank(args)
    source = _open(args)
    if args.engine != "headwise":
        return _plan_rival(args, source)
    asked = partial(
        api.plan,
        source,
        context=args.context,
        kv=args.kv,
        kv_global=args.kv_global,
        kv_sliding=args.kv_sliding,
        kv_layout=args.kv_layout,
        pool=args.pool,
        ubatch=args.ubatch,
        weights=args.weights,
        gpus=args.gpu,
        device=args.device,
        dtype=args.dtype,
    )
    p = asked(slots=1 if args.slots is None else args.slots)
    served = asked(slots=None) if args.slots is None and p.fits else None
    ceilings = [ceiling(p, s.target.gpu) if s.target.gpu else None for s in p.shares]
    if args.json:
        speed = [None if c is None else {"decode_tok_s": c.decode_tok_s, "prefill_tok_s": c.prefill_tok_s} for c in ceilings]
        print(json.dumps(api.plan_json(p) | {"ceilings": speed, "serve": None if served is None else api.serve_json(served)}))
    else:
        _stdout().print(plan_view(p, ceilings, served))
    return 1 if p.fits is False else 0


def _plan_rival(args: argparse.Namespace, source: Any) -> int:
    from headwise import api
    from headwise.planner.render import rival_view

    answer = api.plan_rival(
        args.engine,
        source,
        context=args.context,
        kv=args.kv_global or args.kv,
        kv_sliding=args.kv_sliding,
        slots=1 if args.slots is None else args.slots,
        ubatch=args.ubatch,
        weights=args.weights,
        gpus=args.gpu,
        swa_full=args.swa_full,
    )
    if args.json:
        print(json.dumps(api.rival_json(answer)))
    else:
        _stdout().print(rival_view(source.spec.name, answer.context, answer.plan, answer.fits, answer.max_context))
    return 1 if answer.fits is False else 0


def _rank(args: argparse.Namespace) -> int:
    from headwise import api
    from headwise.planner.rank import rank
    from headwise.planner.render import rank_view
    from headwise.spec.catalogue import specs

    targets = api.targets_for(args.gpu, None)
    fits = rank(specs(), targets)
    if args.json:
        keys = ("model", "weights", "kv", "weights_bytes", "max_context")
        print(json.dumps({"gpus": [t.name for t in targets], "fits": [{k: getattr(f, k) for k in keys} for f in fits]}))
    else:
        _stdout().print(rank_view(fits, [t.name for t in targets]))
    return 0


def _explain(args: argparse.Namespace) -> int:
    from headwise import api
    from headwise.attention.choose import group_layers
    from headwise.attention.render import engine_view, explain_view
    from headwise.spec.kv import laid_out

    source = _open(args)
    if args.engine != "headwise":
        if args.backend:
            raise UsageError(f"--backend chooses among ours, not in {args.engine}", why="its choice is its own", do="leave it out")
        gpu, answer = api.explain_rival(args.engine, source, gpu=args.gpu, kv=args.kv)
        if args.json:
            print(json.dumps(api.explain_rival_json(source.spec, args.engine, answer)))
        else:
            _stdout().print(engine_view(source.spec, args.engine, gpu.label, answer))
        return 0 if answer.proven_fused else 1
    source = replace(source, spec=laid_out(source.spec, args.kv_layout))
    device, formats, choices = api.explain(
        source, gpu=args.gpu, kv=args.kv, kv_global=args.kv_global, kv_sliding=args.kv_sliding, backend=args.backend
    )
    if args.json:
        print(json.dumps(api.explain_json(source.spec, choices) | {"device": device.label}))
    else:
        _stdout().print(explain_view(source.spec, choices, group_layers(source.spec, choices, formats), device.label))
    return 0 if all(c.fused for c in choices) else 1


def _verify(args: argparse.Namespace) -> int:
    source = _open(args, weights=True)
    from headwise.engine.llm import LLM
    from headwise.engine.render import checks_view

    with _progress() as progress:
        llm = LLM(
            source,
            context=args.context,
            kv=_kv(args),
            kv_layout=args.kv_layout,
            device=_device(args),
            dtype=args.dtype,
            chunk=args.ubatch,
            backend=args.backend,
            allow_fallback=args.allow_fallback,
            check=False,
            load=args.against is not None,
            progress=progress,
        )
    if args.against:
        from headwise.engine.against import compare

        return compare(llm, args.against, as_json=args.json, console=_stdout())
    checks = llm.check()
    if args.json:
        from dataclasses import asdict

        print(json.dumps({"model": source.spec.name, "device": llm.where, "checks": [asdict(c) for c in checks]}))
    else:
        _stdout().print(checks_view(checks))
    return 0 if all(c.ok for c in checks) else 1


def _probe(args: argparse.Namespace) -> int:
    from headwise.doctor.diagnosis_page import probe_html
    from headwise.doctor.look import beside
    from headwise.doctor.probe import probe_json
    from headwise.doctor.probe_view import live, probe_view
    from headwise.doctor.visit import visit

    with live(_stderr(), enabled=not args.json) as progress:
        first, second = visit(
            args.url,
            lengths=args.lengths,
            engine=args.engine,
            model=args.model,
            compare=args.compare,
            stall_s=args.stall,
            limit_s=args.limit,
            model_source=args.model_source,
            gpus=args.gpu,
            api_key_env=args.api_key_env,
            progress=progress,
        )
    if args.html:
        _write(args.html, probe_html(first, second, beside(first.server, os.environ)))
    if args.json:
        print(json.dumps(probe_json(first, second)))
    else:
        _stdout().print(probe_view(first, second))
    bad = {"stuck", "failed"} | ({"slow"} if args.gate else set())
    return 1 if any(p.verdict in bad for p in (first, second) if p) else 0


def _write(name: str, text: str) -> None:
    try:
        Path(name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{name} cannot be written", why=str(error), do="name a file in a directory of yours") from error


def _serve(args: argparse.Namespace) -> int:
    from headwise.planner.memory import DEFAULT_CHUNK
    from headwise.server.serve import Options, serve
    from headwise.spec.read import open_model

    names = [args.model, *args.further_models]
    sources = [(name, open_model(name, ignore_keys=args.ignore_key, env=os.environ, weights=True)) for name in names]
    source = sources[0][1]
    settings = {
        "context": args.context,
        "slots": args.slots,
        "pool": args.pool,
        "deterministic": args.deterministic,
        "speculate": args.speculate,
        "kv": _kv(args),
        "kv_layout": args.kv_layout,
        "device": _device(args),
        "weights": args.weights,
        "dtype": args.dtype,
        # what is computed in whole steps from a prompt's first token on is all that --deterministic finds again
        "chunk": DEFAULT_CHUNK if args.ubatch is None and args.deterministic else args.ubatch,
        "backend": args.backend,
        "allow_fallback": args.allow_fallback,
        "ignore_keys": args.ignore_key,
    }
    options = Options(
        host=args.host,
        port=args.port,
        ollama_compat=args.ollama_compat,
        api_key=args.api_key or None,
        aliases=tuple(args.alias),
        keep_alive=args.keep_alive,
        only=args.only,
        max_tokens=args.max_tokens,
        body_bytes=args.max_body * 1024 * 1024,
        stall_s=args.stall_seconds,
    )

    def ready(urls: Sequence[str], engine: Any) -> None:
        w = engine.facts["plan"]
        if args.json:
            told = {"url": urls[0], "urls": urls, "model": source.name} | {k: w[k] for k in ("context", "slots", "notes")}
            print(json.dumps(told), flush=True)
            return
        fused = "fused on every layer" if engine.facts["fused"] else "NOT fused on every layer (--allow-fallback)"
        slots = f"{w['slots']} slot{'s' * (w['slots'] > 1)}"
        _stderr().print(
            f"{source.name} is served at {' and '.join(urls)} on {engine.facts['device']} "
            f"({w['context']:,} tokens of context, {slots}, {fused})",
            highlight=False,
            soft_wrap=True,
        )
        for note in w["notes"]:
            _stderr().print(f"note: {note}", style="dim", highlight=False, soft_wrap=True)

    serve(sources, settings, options, env=os.environ, on_ready=ready)
    return 0


def _list(args: argparse.Namespace) -> int:
    from headwise.server.shelf_view import shelf_json, shelf_view
    from headwise.spec.shelf import shelf

    found = shelf(os.environ)
    if args.json:
        print(json.dumps(shelf_json(found)))
    else:
        _stdout().print(shelf_view(found))
    return 0


def _pull(args: argparse.Namespace) -> int:
    from headwise.spec.hub import fetch
    from headwise.spec.shelf import hub_name

    name = hub_name(args.model)
    if name is None:
        raise UsageError(
            f"{args.model} names no repository of the Hub",
            why="headwise pulls from there; what Ollama has pulled is found in its store",
            do="headwise pull hf:ORG/NAME, or hf:ORG/NAME:TYPE for one GGUF; or ollama pull NAME",
        )
    with _progress() as progress:
        path = fetch(name, weights=True, progress=progress)
    print(json.dumps({"model": f"hf:{name}", "path": str(path)}) if args.json else f"hf:{name} is at {path}")
    return 0


def _ps(args: argparse.Namespace) -> int:
    from headwise.server.remote import loaded
    from headwise.server.shelf_view import ps_view

    found = loaded(args.url, os.environ.get(args.api_key_env))
    if args.json:
        print(json.dumps({"models": found}))
    else:
        _stdout().print(ps_view(found))
    return 0


def _stop(args: argparse.Namespace) -> int:
    from headwise.server.remote import unload

    said = unload(args.url, os.environ.get(args.api_key_env), args.model)
    print(
        json.dumps(said)
        if args.json
        else f"{said['model']}: " + ("it goes when its requests have ended" if said["requests"] else "unloaded")
    )
    return 0


def _bench(args: argparse.Namespace) -> int:
    def say(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    if args.svg and not Path(args.svg).parent.is_dir():
        raise UsageError(f"{args.svg} cannot be written", why="its directory does not exist", do=f"--svg {args.what}.svg")
    if args.what == "attention":
        from headwise.bench import attention, roofline

        found = attention.bench(as_json=args.json, say=say)
        if args.svg:
            _write(args.svg, roofline.svg(found))
        return 0
    from headwise.bench import engine, prefill_line

    models = args.models or ["gemma-4-31b"]
    lengths = [int(x) for x in args.lengths.split(",") if x.strip().isdigit()]
    if not lengths or min(lengths) < 1:
        raise UsageError(f"--lengths {args.lengths} names no length", why="numbers of tokens", do="--lengths 4096,31744")
    found = engine.bench(
        models,
        lengths=lengths,
        weights=args.weights,
        kv=args.kv,
        ubatch=args.ubatch,
        as_json=args.json,
        say=say,
    )
    if args.svg:
        _write(args.svg, prefill_line.svg(found | {"model": ", ".join(models)}))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from headwise.doctor import look
    from headwise.doctor.diagnose import diagnose
    from headwise.doctor.diagnosis_page import html
    from headwise.doctor.report import view
    from headwise.hardware.gpus import find_gpu
    from headwise.spec.read import open_model

    model = open_model(args.model, env=os.environ).spec if args.model else None
    gpus = [find_gpu(g) for g in args.gpu]
    if args.url:
        found = [look.at_url(args.url, os.environ, model=model, gpus=gpus)]
    elif args.log is None and args.systemd is None and not args.ollama:
        if model or gpus:
            raise UsageError(
                "--model and --gpu describe one log or server", why="none is named", do="headwise doctor LOG, or --url URL"
            )
        found = look.around(os.environ)
    else:
        with look.log_of(args.log, unit=args.systemd, ollama=args.ollama, env=os.environ) as (file, name):
            found = [diagnose(file, name, model=model, env=os.environ, gpus=gpus)]
    if args.html:
        _write(args.html, html(found[0]))
    if args.json:
        others = {"others": [d.to_json() for d in found[1:]]} if found[1:] else {}
        print(json.dumps(found[0].to_json() | others))
    else:
        for diagnosis in found:
            _stdout().print(view(diagnosis), soft_wrap=True)
    return 1 if any(d.wrong for d in found) else 0


def _codex_config(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from headwise.advice.codex import codex_config, write

    advice = codex_config(model=args.model, port=args.port, context=args.context, env=os.environ)
    if args.write:
        advice = replace(advice, notes=(*advice.notes, *write(advice, args.write)))
    return _advised(args, advice if args.json or not args.write else replace(advice, blocks=()))


def _ollama_env(args: argparse.Namespace) -> int:
    from headwise.advice.ollama import ollama_env

    return _fitted(args, ollama_env)


def _llama_flags(args: argparse.Namespace) -> int:
    from headwise.advice.llama_cpp import llama_flags

    return _fitted(args, llama_flags)


def _vllm_args(args: argparse.Namespace) -> int:
    from headwise.advice.vllm import vllm_args

    return _fitted(args, vllm_args)


def _fitted(args: argparse.Namespace, advise: Callable[..., Any]) -> int:
    advice = advise(_open(args), gpus=args.gpu, context=args.context, version=args.version, weights=args.weights)
    return _advised(args, advice)


def _advised(args: argparse.Namespace, advice: Any) -> int:
    from headwise.advice.setting import text

    print(json.dumps(advice.to_json()) if args.json else text(advice))
    return 0


def _config(args: argparse.Namespace) -> int:
    verbs = [args.of] if args.of else options.VERBS
    found = [s for verb in verbs for s in options.settings(verb, os.environ, Path.cwd())]
    if args.json:
        print(json.dumps(options.settings_json(found)))
        return 0
    _stdout().print(options.settings_view(found))
    return 0


def _completion(args: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError as error:
        raise UsageError("no completion can be written", why="shtab is not installed", do="pip install shtab") from error
    print(shtab.complete(parser(), args.shell))
    return 0


_VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "plan": _plan,
    "explain": _explain,
    "verify": _verify,
    "probe": _probe,
    "serve": _serve,
    "list": _list,
    "pull": _pull,
    "ps": _ps,
    "stop": _stop,
    "bench": _bench,
    "doctor": _doctor,
    "codex-config": _codex_config,
    "ollama-env": _ollama_env,
    "llama-flags": _llama_flags,
    "vllm-args": _vllm_args,
    "config": _config,
    "completion": _completion,
}
