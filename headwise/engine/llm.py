"""`LLM`: a model loaded by its plan, checked, and ready to continue text. What `headwise run` and programs use."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from headwise.attention.capability import CPU, DeviceKind
from headwise.attention.choose import LayerGroup, activation_type, choose_layers, forced_backends, group_layers, require_fused
from headwise.attention.verify import Check, check_all, default_cache_file
from headwise.engine.replay import own_stream
from headwise.engine.request import Sampling
from headwise.engine.runner import Runner, attend_functions
from headwise.engine.sample import Sampler
from headwise.errors import HeadwiseError, PlanError, SpecError, UsageError
from headwise.hardware.probe import cpu_memory
from headwise.model.arena import TORCH
from headwise.planner.memory import CPU_MARGIN_BYTES, DEFAULT_CHUNK, Plan, Target, Workload, plan
from headwise.planner.render import gib
from headwise.planner.residence import groups, planed
from headwise.spec.kv import KVFormat, kv_format
from headwise.spec.layers import Kind, ModelSpec
from headwise.spec.read import Source, open_model
from headwise.text.tokenizer import Tokenizer, read_tokenizer
from headwise.weights.listing import list_checkpoint
from headwise.weights.load import load_weights
from headwise.weights.names import match, skipped_by_reason

DEFAULT_CONTEXT = 8192
Progress = Callable[[str, int, int], None]  # what, done, of


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What ran where, and whether the plan held."""

    layers: int
    layers_fused: int
    backends: tuple[LayerGroup, ...]
    planned_bytes: int
    allocated_bytes: int
    peak_bytes: int
    prefill_tokens: int
    prefill_s: float
    decode_tokens: int
    decode_s: float

    @property
    def prefill_tok_s(self) -> float | None:
        return self.prefill_tokens / self.prefill_s if self.prefill_s else None

    @property
    def decode_tok_s(self) -> float | None:
        return self.decode_tokens / self.decode_s if self.decode_tokens else None

    def to_json(self) -> dict[str, object]:
        return {
            "layers": self.layers,
            "layers_fused": self.layers_fused,
            "backends": [
                {
                    "layers": list(g.layers),
                    "backend": g.choice.backend.name,
                    "head_dim": g.example.head_dim,
                    "window": g.example.window,
                    "kv": g.kv,
                }
                for g in self.backends
            ],
            "planned_bytes": self.planned_bytes,
            "allocated_bytes": self.allocated_bytes,
            "peak_bytes": self.peak_bytes,
            "prefill_tokens": self.prefill_tokens,
            "prefill_tok_s": self.prefill_tok_s,
            "decode_tok_s": self.decode_tok_s,
        }


@dataclass(frozen=True, slots=True)
class Piece:
    """One generated token and the text that became certain with it."""

    token: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    text: str
    tokens: list[int]
    report: Report
    finish: str  # stop (an end token), length (max_tokens or the context)


@dataclass(slots=True)
class _Timing:
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    finish: str = "length"
    tokens: list[int] = field(default_factory=list)


class LLM:
    """A model in memory.

    Args:
        source: what `headwise.read_model` takes; None is the embedded tiny-hybrid.
        context: tokens of prompt and answer that memory is planned for; default 8,192 or the model's maximum.
        kv: KV type of all layers, or {"global": ..., "sliding": ...}; default the activations' type.
        device: "cpu", "cuda" or "cuda:N"; default CUDA where there is one.
        dtype: of the activations: "f32" (default on CPU), "bf16" (default on CUDA) or "f16".
        chunk: most tokens of one prefill step.
        backend: of every layer, "X", or by kind, "sliding=X,global=Y" or a mapping; default the first row that refuses nothing.
        slots: sequences whose caches are held at once; `generate`, `stream` and `logits` use the first.
        allow_fallback: accept layers that do not run fused.
        check: run the start-up self-check.
        load: False stops before the weights, with a plan and what `check` needs.
    Raises:
        SpecError, PlanError, BackendError, UsageError: before the first tensor is read wherever that is possible.
    """

    def __init__(
        self,
        source: str | Path | None = None,
        *,
        context: int | None = None,
        kv: str | Mapping[str, str] | None = None,
        device: str | None = None,
        dtype: str | None = None,
        chunk: int = DEFAULT_CHUNK,
        backend: str | Mapping[str, str] | None = None,
        slots: int = 1,
        allow_fallback: bool = False,
        check: bool = True,
        load: bool = True,
        ignore_keys: Sequence[str] = (),
        tokenizer: Tokenizer | None = None,
        progress: Progress | None = None,
        on_warning: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.source = (
            source if isinstance(source, Source) else open_model(source, ignore_keys=ignore_keys, env=os.environ, weights=True)
        )
        if self.source.path is None:
            raise UsageError(
                f"{self.source.name} is a description without weights", why="the catalogue holds none", do="headwise run PATH"
            )
        self.spec = self.source.spec
        self.device = pick_device(device)
        kind = device_kind(self.device)
        dtype = activation_type(dtype, [kind])
        names = {"global": kv, "sliding": kv} if kv is None or isinstance(kv, str) else dict(kv)
        if unknown := set(names) - {"global", "sliding"}:
            raise UsageError(
                f"kv names {sorted(unknown)[0]!r}", why="a layer is global or sliding", do='kv={"global": T, "sliding": T}'
            )
        self.kv: dict[Kind, KVFormat] = {
            "global": kv_format(names.get("global") or dtype),
            "sliding": kv_format(names.get("sliding") or dtype),
        }
        self.choices = choose_layers(self.spec, kv=self.kv, dtype=dtype, device=kind, forced=forced_backends(backend))
        require_fused(self.spec, self.choices, allow_fallback=allow_fallback, device=kind)
        matched = match(self.spec, list_checkpoint(self.source.path))
        self.skipped = skipped_by_reason(matched)
        workload = Workload(
            context=min(DEFAULT_CONTEXT, self.spec.max_context) if context is None else context,
            chunk=chunk,
            slots=slots,
            kv=self.kv,
            dtype=dtype,
            cpu=self.device.type == "cpu",
            reads=frozenset(c.backend.reads for c in self.choices),
        )
        self.plan = plan(self.spec, matched.types, workload, [target_of(self.device)])
        require_fit(self.plan)
        self.groups = group_layers(self.spec, self.choices, self.kv)
        self.checks: list[Check] = []
        self.checks_cached = False
        if check:  # before the weights: a wrong kernel is found before a long load, and the two never hold memory at once
            self.check(cache_file=default_cache_file(os.environ), on_warning=on_warning)
        if not load:
            return
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        with own_stream(stream):
            before_bytes = before_loading(self.device)
        self.weights = load_weights(
            self.spec,
            self.source.path,
            resident=self.plan.resident,
            device=self.device,
            groups=groups(self.spec, self.plan.resident),
            planes=planed(self.spec, self.plan.resident) if self.plan.workload.fused else (),
            progress=None if progress is None else lambda done, total: progress("weights", done, total),
        )
        self.runner = Runner(self.plan, self.choices, self.weights, self.device, before_bytes=before_bytes, stream=stream)
        self._tokenizer = tokenizer
        self._timing = _Timing()

    def check(self, *, cache_file: Path | None = None, on_warning: Callable[[str], None] = lambda _: None) -> list[Check]:
        """Runs every backend in use against the reference; see `attention.verify`."""
        functions = attend_functions(self.choices)
        self.checks, self.checks_cached = check_all(
            self.groups,
            {g.layers[0]: functions[g.layers[0]] for g in self.groups},
            chunk=self.plan.workload.chunk,
            dtype=TORCH[self.plan.workload.dtype],
            device=self.device,
            cache_file=cache_file,
            on_warning=on_warning,
        )
        return self.checks

    @property
    def tokenizer(self) -> Tokenizer:
        """Read on first use: `logits` needs none."""
        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(self.source)
        return self._tokenizer

    def _tokenizer_or_none(self) -> Tokenizer | None:
        """For prompts of ids: without a tokenizer the tokens come without text."""
        try:
            return self.tokenizer
        except SpecError:
            return None

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, beginning with the model's BOS token where it wants one."""
        return self.tokenizer.encode(text)

    def logits(self, token_ids: Sequence[int], chunk: int | None = None) -> Tensor:
        """Logits at every position: (len(token_ids), vocab_size), fp32, on the CPU.

        Args:
            chunk: tokens per step, at most the planned chunk (default); 1 is token-by-token decode.
        """
        ids = self._checked(token_ids, room=0)
        step = self.plan.workload.chunk if chunk is None else chunk
        if not 1 <= step <= self.plan.workload.chunk:
            raise UsageError(
                f"chunk {step} makes no sense", why=f"1..{self.plan.workload.chunk} is planned", do="LLM(..., chunk=N)"
            )
        out = torch.empty(len(ids), self.spec.vocab_size)
        self.runner.reset()
        for start in range(0, len(ids), step):
            x = self.runner.step(ids[start : start + step])
            for row in range(x.shape[0]):  # one row at a time: the arena has room for one
                out[start + row] = self.runner.logits(x[row : row + 1])[0]
        return out

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Piece]:
        """Continues `prompt` token by token; ends at an end token, at `max_tokens`, or where the context ends."""
        sampler = Sampler(Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed))
        ids = self._checked(self.tokenize(prompt) if isinstance(prompt, str) else prompt, room=1)
        tokenizer = self.tokenizer if isinstance(prompt, str) else self._tokenizer_or_none()
        return self._generate(ids, sampler, max_tokens, tokenizer, progress)

    def _generate(
        self, ids: list[int], sampler: Sampler, max_tokens: int, tokenizer: Tokenizer | None, progress: Progress | None
    ) -> Iterator[Piece]:
        stop = frozenset(self.spec.eos_ids) | (tokenizer.eos_ids if tokenizer else frozenset())
        self.runner.reset()
        timing = self._timing = _Timing(prefill_tokens=len(ids))
        decoder = tokenizer.stream(continues=True) if tokenizer else None
        start = time.perf_counter()
        x = self.runner.prefill(ids, progress=None if progress is None else lambda done, total: progress("prompt", done, total))
        token = sampler.token(self.runner.logits(x)[0])
        timing.prefill_s = time.perf_counter() - start
        start = time.perf_counter()
        try:
            while True:
                timing.tokens.append(token)
                if token in stop:
                    timing.finish = "stop"
                    break
                if len(timing.tokens) > 1:
                    timing.decode_tokens += 1
                timing.decode_s = time.perf_counter() - start
                yield Piece(token, decoder.push(token) if decoder else "")
                if len(timing.tokens) >= max_tokens or self.runner.position >= self.plan.workload.context:
                    break
                token = sampler.token(self.runner.logits(self.runner.step([token]))[0])
        finally:
            timing.decode_s = time.perf_counter() - start
        if decoder and (rest := decoder.flush()):
            yield Piece(token, rest)

    def generate(self, prompt: str | Sequence[int], **settings: object) -> Result:
        """All of `stream` at once; takes the same settings."""
        text = "".join(piece.text for piece in self.stream(prompt, **settings))  # type: ignore[arg-type]
        return Result(text=text, tokens=list(self._timing.tokens), report=self.report(), finish=self._timing.finish)

    def report(self) -> Report:
        """Of the last generation."""
        t = self._timing
        return Report(
            layers=len(self.spec.layers),
            layers_fused=sum(c.fused for c in self.choices),
            backends=self.groups,
            planned_bytes=self.plan.total_bytes,
            allocated_bytes=self.runner.allocated_bytes,
            peak_bytes=self.runner.peak_bytes,
            prefill_tokens=t.prefill_tokens,
            prefill_s=t.prefill_s,
            decode_tokens=t.decode_tokens,
            decode_s=t.decode_s,
        )

    def _checked(self, ids: Sequence[int], *, room: int) -> list[int]:
        ids = list(ids)
        if not ids:
            raise UsageError("the prompt is empty", why="there is nothing to continue", do="-p TEXT")
        if (worst := max(ids)) >= self.spec.vocab_size or min(ids) < 0:
            bad = worst if worst >= self.spec.vocab_size else min(ids)
            raise UsageError(
                f"token id {bad} does not exist", why=f"the vocabulary has {self.spec.vocab_size}", do="check the tokenizer"
            )
        if len(ids) + room > self.plan.workload.context:
            raise prompt_too_long(len(ids), self.plan.workload.context, self.spec.max_context)
        return ids


def run_context(spec: ModelSpec, n_prompt: int, max_tokens: int) -> int:
    """The context `headwise run` plans for when none is given: room for the prompt and the answer, 8,192 at least."""
    return min(spec.max_context, max(DEFAULT_CONTEXT, n_prompt + max_tokens))


def prompt_too_long(n: int, context: int, most: int) -> HeadwiseError:
    do = f"--context {min(most, n + 256)}" if n < most else "a shorter prompt"
    return PlanError(
        f"the prompt has {n} tokens", why=f"the context is {context} of at most {most}, and an answer needs room", do=do
    )


def require_fit(p: Plan) -> None:
    """Raises PlanError, before anything is loaded, when the plan does not fit its one device."""
    share = p.shares[0]
    if share.fits:
        return
    t = share.target
    w = p.workload
    do = f"--context {p.max_context} fits" if p.max_context else "weights alone are too much: a smaller weight type or model"
    raise PlanError(
        f"{p.spec.name} with {w.context} tokens does not fit {t.name}",
        why=f"needs {gib(p.total_bytes)} (weights {gib(p.weights_bytes)}, KV {gib(p.kv_bytes)}, compute {gib(p.compute_bytes)}); "
        f"{gib(t.usable_bytes)} of {gib(t.total_bytes)} are usable, {gib(t.others_bytes)} are held by others",
        do=do,
    )


def tokenizer_of(source: Source) -> Tokenizer:
    assert source.path is not None
    return read_tokenizer(source.path if source.gguf is None else source.gguf)


def pick_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}", why=str(error).splitlines()[0], do="--device cpu or --device cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not supported", why="headwise runs on CPU and CUDA", do="--device cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device", why="PyTorch sees none", do="--device cpu")
    return device


def device_kind(device: torch.device) -> DeviceKind:
    if device.type == "cpu":
        return CPU
    return DeviceKind(
        "cuda" if torch.version.hip is None else "rocm",  # PyTorch calls both cuda
        torch.cuda.get_device_capability(device),
        torch.cuda.get_device_name(device),
        _triton_version(),
    )


def _triton_version() -> tuple[int, int] | None:
    try:
        major, minor = metadata.version("triton").split(".")[:2]
    except metadata.PackageNotFoundError:
        return None
    return int(major), int(minor)


def before_loading(device: torch.device) -> int:
    """Bytes this process holds on a GPU already, cuBLAS's workspaces included (the plan's margin covers them)."""
    if device.type != "cuda":
        return 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.ones(8, 8, dtype=dtype, device=device)
        torch.mm(x, x)
        torch.mv(x, x[0])
    del x
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def target_of(device: torch.device) -> Target:
    """`device` as it is now, to plan for."""
    if device.type == "cpu":
        total, available = cpu_memory()
        return Target(
            name="cpu", gpu=None, total_bytes=total, others_bytes=max(0, total - available), margin_bytes=CPU_MARGIN_BYTES
        )
    free, total = torch.cuda.mem_get_info(device)
    return Target(name=torch.cuda.get_device_name(device), gpu=None, total_bytes=total, others_bytes=total - free)
