"""A log in, a diagnosis out."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from headwise.doctor import llamacpp_log, ollama_log, vllm_log
from headwise.doctor.facts import Load, loads, principal
from headwise.doctor.finding import Finding, worst_first
from headwise.doctor.rules import Case, find, gpus_of, memory_of, version_of
from headwise.doctor.scan import scan
from headwise.doctor.verdicts import KvVerdict, LayerVerdict, flags, judge, judge_kv
from headwise.errors import HeadwiseError
from headwise.hardware.gpus import Gpu
from headwise.spec import catalogue
from headwise.spec.layers import ModelSpec
from headwise.spec.read import open_model

ROWS = (*llamacpp_log.ROWS, *ollama_log.ROWS, *vllm_log.ROWS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What is proven about one engine and one model. `engine` is None where no known line was found."""

    engine: str | None
    version: str | None
    model: str | None
    layers: tuple[LayerVerdict, ...]
    kv: KvVerdict
    findings: tuple[Finding, ...]
    gpus: tuple[Gpu, ...] = ()
    spec: ModelSpec | None = None
    memory: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = ()  # device: labelled bytes, as the log allocates them

    @property
    def wrong(self) -> bool:
        return any(f.severity == "problem" for f in self.findings)

    def to_json(self) -> dict[str, object]:
        return {
            "engine": self.engine,
            "version": self.version,
            "model": self.model,
            "layers": [
                {
                    "kind": v.kind,
                    "count": v.count,
                    "verdict": v.verdict,
                    "proof": v.proof,
                    "evidence": [e.to_json() for e in v.evidence],
                }
                for v in self.layers
            ],
            "kv": {
                "requested": self.kv.requested,
                "in_use": self.kv.in_use,
                "verdict": self.kv.verdict,
                "global_bytes": self.kv.global_bytes,
                "sliding_bytes": self.kv.sliding_bytes,
                "evidence": [e.to_json() for e in self.kv.evidence],
            },
            "findings": [f.to_json() for f in self.findings],
        }


def diagnose(
    file: BinaryIO, source: str, *, model: ModelSpec | None = None, env: Mapping[str, str] | None = None, gpus: Sequence[Gpu] = ()
) -> Diagnosis:
    """The diagnosis of a log.

    Args:
        file: bytes; anything in it that is no known line is passed over.
        source: how to call it in evidence, e.g. the file's name.
        model: its description, where the reader of the log knows it; else the log's own words are looked up.
        env: where models may be found (Ollama's store); None looks at no file.
        gpus: the server's cards, where the log does not name them.
    """
    found = loads(scan(file, ROWS), source)
    load = principal(found)
    if load is None:
        return nothing(source)
    return of_load(load, model=model, env=env, gpus=gpus)


def nothing(source: str) -> Diagnosis:
    """No line of an engine that is known."""
    said = Finding(
        id="log-too-quiet",
        severity="note",
        what=f"{source} holds no line of llama.cpp, Ollama or vLLM that says something about attention",
        why="unproven is not fine: nothing was seen at all",
        cure="give the server's own log from its start on; llama-server needs -lv 4",
    )
    layers = (LayerVerdict(kind="all", count=None, verdict="unproven"),)
    kv = KvVerdict(requested=None, in_use=None, verdict="unproven")
    return Diagnosis(engine=None, version=None, model=None, layers=layers, kv=kv, findings=(said,))


def of_load(
    load: Load,
    *,
    model: ModelSpec | None = None,
    env: Mapping[str, str] | None = None,
    more: Sequence[Finding] = (),
    gpus: Sequence[Gpu] = (),
) -> Diagnosis:
    name = model_name(load)
    spec = model or _described(load, name, env)
    layers, kv = tuple(judge(load, spec)), judge_kv(load, spec)
    case = Case(load=load, version=version_of(load), spec=spec, gpus=gpus_of(load) or tuple(gpus), layers=layers, kv=kv)
    return Diagnosis(
        engine=load.engine,
        version=case.version,
        model=name or (spec.name if spec else None),
        layers=layers,
        kv=kv,
        findings=worst_first((*more, *find(case))),
        gpus=case.gpus,
        spec=spec,
        memory=tuple(memory_of(load)),
    )


def model_name(load: Load) -> str | None:
    """What the log calls the model."""
    if engine := load.last("vl_engine"):
        return engine.text("model") or None
    for f in load.all("metadata"):
        if f.text("key") == "general.name":
            return f.text("value")
    for f in load.all("model"):
        if f.text("key") == "general.name":
            return f.text("value")
    if f := load.last("ol_ps"):
        return f.text("model")
    path = _path(load)
    return Path(path.replace("\\", "/")).name if path and "sha256-" not in path else None


def _path(load: Load) -> str | None:
    if command := load.last("command"):
        given = flags(command.text("command"))
        if path := given.get("model") or given.get("m"):
            return path
    for name in ("model_file", "metadata_file"):
        if f := load.last(name):
            return f.text("path")
    return None


def _described(load: Load, name: str | None, env: Mapping[str, str] | None) -> ModelSpec | None:
    """The model's layers: from its file, where it is on this machine, else by its name; and only if the log does not contradict."""
    spec: ModelSpec | None = None
    if env is not None and (path := _path(load)) and Path(path).is_file():
        try:
            spec = open_model(Path(path), env=env).spec
        except (HeadwiseError, OSError):
            spec = None
    if spec is None and name:
        plain = re.sub(r"[\s_]+", "-", name.removesuffix(".gguf").rpartition("/")[2])
        short = re.sub(r"(?i)[-.:](ud|i?q\d\w*|bf16|f16|it|instruct|qat|gguf)\b.*$", "", plain)  # gemma-4-31b-it-Q4_K_M.gguf
        for spelling in (name, plain, short):
            if canonical := catalogue.find(spelling):
                spec = catalogue.spec(canonical)
                break
    if spec is None and name and env is not None and load.engine == "ollama":
        with contextlib.suppress(HeadwiseError, OSError):  # of another name than the catalogue's: the store has its file
            spec = open_model(f"ollama:{name}", env=env).spec
    if spec is None:
        return None
    for f in load.all("model"):
        if f.text("key") == "n_layer" and f.whole("value") != len(spec.layers):
            return None
    offloaded = load.last("offloaded")
    if offloaded is not None and offloaded.whole("of") - 1 != len(spec.layers):
        return None
    return spec
