"""Before the first token: every backend in use, on this machine, against the formula.

For each distinct (backend, shape, window, KV type) fresh random data of the model's own shape goes through the real cache
and the real adapter, prefill and decode, at lengths around the window and past a wrap of the ring. Spans that another row
takes of a layer (`attention.prefill`) come on top. The reference, in float64, attends to what the cache holds (read back), so
an error is the kernel's; what the KV type itself loses is measured beside it. Anything not finite fails.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.attention.capability import Capability, here
from headwise.attention.choose import LayerGroup
from headwise.attention.reference import attend as formula
from headwise.attention.reference import turned, visible
from headwise.cache.storage import LayerCache, Place, Scratch, Span, alone, slot_positions
from headwise.errors import BackendError
from headwise.kernels.turn import Turn
from headwise.planner.workspace import RECORDED_TOKENS, partial_values, turn_values
from headwise.spec.kv import KV_FORMATS, k_values, q_values, turned_pairs, v_values
from headwise.spec.layers import LayerSpec

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}  # relative error of the output
STORE_TOLERANCE = {"f32": 0.0, "f16": 1e-3, "bf16": 4e-3, "fp8": 4e-2, "q8_0": 8e-3, "q4_0": 0.12}  # of the values, normal data
MIN_CORRELATION = 0.999
# Of a prefill case, in turn: few queries go to another kernel than many. Odd, so that masks and tails are exercised.
QUERIES, MANY = 7, 37
PREFILLED = ((RECORDED_TOKENS + 3, 0), (RECORDED_TOKENS + 130, 437))  # queries for a row that takes prefill, and keys before them
COMPARED = 48  # of so many queries those at both ends and in the middle


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One case: `error` is ||out - reference|| / ||reference||, `store_error` the same for what the cache holds."""

    backend: str
    head_dim: int
    window: int | None
    kv: str
    phase: str  # prefill or decode
    length: int  # keys written
    error: float
    correlation: float
    store_error: float
    ok: bool


def lengths_for(layer: LayerSpec, n_slots: int) -> tuple[int, ...]:
    """Lengths at which a mask, a ring or a page can go wrong."""
    if layer.window is None:
        return (QUERIES, 64, 65, 700)
    w = layer.window
    return tuple(sorted({max(QUERIES, w - 1), max(QUERIES, w), w + QUERIES + 1, w + 512, n_slots + w // 2 + 3}))


def check_group(
    group: LayerGroup, attend: Callable[..., None], *, chunk: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> list[Check]:
    """Runs one group's cases."""
    layer, fmt = group.example, KV_FORMATS[group.kv]
    ring = LayerCache(layer, fmt, n_tokens=2**31, chunk=chunk, device=torch.device("meta")).n_slots if layer.window else 0
    lengths = lengths_for(layer, ring)
    total = 1 + max([lengths[-1], *(n + before for n, before in PREFILLED if group.choice.prefill)])
    cache = LayerCache(layer, fmt, n_tokens=total, chunk=chunk, device=device)
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    k = random(total, layer.n_kv_heads, k_values(layer))
    v = random(total, layer.n_kv_heads, v_values(layer)) if v_values(layer) else None
    k_room, v_room = (
        torch.empty(chunk * layer.n_kv_heads * n, dtype=dtype, device=device) for n in (q_values(layer), max(1, v_values(layer)))
    )
    count = torch.zeros(layer.n_kv_heads, dtype=torch.int32, device=device)
    partial, turn = torch.empty(partial_values(layer), device=device), torch.empty(turn_values(layer, chunk), device=device)
    scratch = Scratch(k_room, v_room, partial, count, chunk, turn)
    writing = torch.empty(chunk * layer.n_kv_heads * k_values(layer), dtype=torch.float32, device=device)
    seen_k, seen_v = (None if x is None else _stored(x, fmt.name, device, dtype) for x in (k, v))
    store_error = max(_relative(a.double(), b.double()) for a, b in ((seen_k, k), (seen_v, v)) if a is not None and b is not None)
    if turned_pairs(layer) and layer.rope is not None and seen_k is not None:
        freq = torch.tensor([f for f in layer.rope.inv_freq if f], dtype=torch.float32, device=device)
        cache.turn = Turn(random(layer.head_dim), freq, layer.rope.magnitude)
        seen_k = turned(seen_k, torch.arange(total, device=device), cache.turn, q_values(layer))
    sinks = random(layer.n_heads).float() if layer.sinks else None
    checks, written = [], 0

    def write(stop: int) -> None:
        nonlocal written
        while written < stop:
            n = min(chunk, stop - written)
            part = slice(written, written + n)
            cache.write(Place(), written, k[part], None if v is None else v[part], writing)
            written += n

    def query(n: int, stop: int, phase: str, row: Capability = group.choice.backend) -> None:
        start = stop - n
        q = random(n, layer.n_heads, q_values(layer))
        if layer.k_eq_v and layer.rope is not None:  # one tensor: nothing meets the values that rotate, see spec.kv
            half, pairs = layer.head_dim // 2, layer.rope.rotated_dims // 2
            q[..., :pairs] = 0
            q[..., half : half + pairs] = 0
        positions = torch.arange(start, stop, device=device)
        mask = None
        if layer.window is not None and n > 1:
            held = slot_positions(cache.n_slots, stop, device)
            mask = torch.zeros(n, cache.n_slots, dtype=dtype, device=device)
            mask.masked_fill_(~visible(positions, held, layer.window), float("-inf"))
            mask = mask[:, : min(cache.n_slots, stop)]
        out = torch.full((n, layer.n_heads, layer.head_dim), float("nan"), dtype=dtype, device=device)
        scale = q_values(layer) ** -0.5
        attend(
            q,
            cache,
            Span(start, n, mask, alone(n, stop, layer.window, device)),
            scale=scale,
            softcap=layer.softcap,
            sinks_H=sinks,
            scratch=scratch,
            out_THD=out,
        )
        first = 0 if layer.window is None else max(0, start - layer.window + 1)
        keys = seen_k[first:stop].double() if seen_k is not None else torch.empty(0)
        values = keys if seen_v is None else seen_v[first:stop].double()
        compared = torch.arange(n, device=device)
        if n > 3 * COMPARED:
            compared = torch.cat([compared[:COMPARED], compared[n // 2 :][:COMPARED], compared[-COMPARED:]])
        expected, _ = formula(
            q[compared].double(),
            keys,
            values,
            visible(positions[compared], torch.arange(first, stop, device=device), layer.window),
            scale=scale,
            softcap=layer.softcap,
            sinks_H=None if sinks is None else sinks.double(),
        )
        expected = expected[..., : layer.head_dim]
        got = out[compared].double()
        error, correlation = _relative(got, expected), _correlation(got, expected)
        finite = bool(torch.isfinite(out).all())
        ok = finite and error <= TOLERANCE[dtype] and correlation >= MIN_CORRELATION and store_error <= STORE_TOLERANCE[group.kv]
        checks.append(
            Check(
                backend=row.name,
                head_dim=layer.head_dim,
                window=layer.window,
                kv=group.kv,
                phase=phase,
                length=stop,
                error=error if finite else float("inf"),
                correlation=correlation if finite else 0.0,
                store_error=store_error,
                ok=ok,
            )
        )

    if (row := group.choice.prefill) is not None:  # before a ring wraps
        for n, before in PREFILLED:
            write(before + n + 1)  # and a key after them
            try:
                query(n, before + n, "prefill", row)
            except Exception as error:  # whatever another library raises
                why = f"{type(error).__name__}: {error}".strip().splitlines()[0]
                raise BackendError(f"{row.name} does not run on this machine", why=why, do=_without(group)) from error
    for i, length in enumerate(lengths):
        n = min(length, MANY if i % 2 and chunk >= MANY else QUERIES)
        write(length - n)
        write(length)
        query(n, length, "prefill")
        write(length + 1)
        query(1, length + 1, "decode")
    return checks


def _without(group: LayerGroup) -> str:
    return f"--backend {group.example.kind}={group.choice.backend.name} takes no other row for prefill"


def _stored(x: Tensor, kv: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`x` after a round trip through a KV format, written and read by the cache's own code, in one flat run."""
    from headwise.cache.storage import Values

    values = Values(x.shape[0], x.shape[1], x.shape[2], KV_FORMATS[kv], device)
    values.write(0, x, torch.empty_like(x, dtype=torch.float32))
    return values.read(0, x.shape[0], None if values.native(dtype) else torch.empty_like(x)).clone()


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])


def check_all(
    groups: Sequence[LayerGroup],
    attends: Mapping[int, Callable[..., None]],
    *,
    chunk: int,
    dtype: torch.dtype,
    device: torch.device,
    cache_file: Path | None,
    on_warning: Callable[[str], None] = lambda _: None,
) -> tuple[list[Check], bool]:
    """Every group's checks, from the cache file where the same machine and code passed them before.

    Returns:
        The checks, and whether all of them came from the file.
    Raises:
        BackendError: a backend is wrong here; the message carries the numbers.
    """
    known = _read(cache_file)
    checks: list[Check] = []
    fresh = False
    for group in groups:
        key = _key(group, chunk, dtype, device)
        if key in known:
            try:
                checks += [Check(**c) for c in known[key]]
                continue
            except TypeError:
                pass  # written by another version: run it again
        with torch.inference_mode():
            found = check_group(group, attends[group.layers[0]], chunk=chunk, dtype=dtype, device=device)
        for bad in (c for c in found if not c.ok):
            raise BackendError(
                f"{bad.backend} gives wrong results on this machine",
                why=f"head_dim {bad.head_dim}, window {bad.window}, KV {bad.kv}, {bad.phase} at {bad.length} keys: relative "
                f"error {bad.error:.1e} (at most {TOLERANCE[dtype]:.0e}), correlation {bad.correlation:.4f}, stored values off by "
                f"{bad.store_error:.1e} (at most {STORE_TOLERANCE[bad.kv]:.0e})",
                do="headwise verify shows every case; --allow-fallback runs the reference in its place"
                if bad.backend == group.choice.backend.name
                else _without(group),
            )
        checks += found
        known[key] = [asdict(c) for c in found]
        fresh = True
    if fresh and cache_file is not None:
        _write(cache_file, known, on_warning)
    return checks, not fresh


def _key(group: LayerGroup, chunk: int, dtype: torch.dtype, device: torch.device) -> str:
    """Hardware, driver, library versions, the source of the code under test, and the case."""
    layer = group.example
    rows = (group.choice.backend, group.choice.prefill)
    case = (
        group.choice.names,
        *(metadata.version(row.package) for row in rows if row and row.package and here(row.package)),
        layer.head_dim,
        q_values(layer),
        k_values(layer),
        layer.window,
        layer.n_heads,
        layer.n_kv_heads,
        layer.sinks,
        group.kv,
    )
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine = f"{properties.name} {properties.major}.{properties.minor} {torch.version.cuda} {torch.backends.cudnn.version()}"
    else:
        machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()}"
    text = f"{case} {chunk} {dtype} {machine} {torch.__version__} {platform.python_version()} {_source_digest()}"
    return hashlib.sha256(text.encode()).hexdigest()


def _source_digest() -> str:
    here = Path(__file__).parent
    files = sorted([*here.glob("*.py"), *(here.parent / "cache").glob("*.py"), *(here.parent / "kernels").glob("*.py")])
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def default_cache_file(env: Mapping[str, str]) -> Path:
    base = Path(env.get("XDG_CACHE_HOME") or Path(env.get("HOME", "~")).expanduser() / ".cache")
    return base / "headwise" / "checks.json"


def _read(path: Path | None) -> dict[str, list[dict[str, Any]]]:
    """What was checked before; a missing or damaged file means nothing was."""
    if path is None:
        return {}
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(path: Path, known: Mapping[str, object], on_warning: Callable[[str], None]) -> None:
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(known))
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True) if path.parent.exists() else None
        on_warning(f"the self-check's result could not be kept in {path} ({error.strerror or error}): the next start checks again")
