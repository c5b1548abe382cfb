"""How fast attention is on this card, beside what the card can do and what PyTorch has for the same shape.

Every candidate is compared with the formula in fp64 before it is timed. Prefill: PyTorch's operators and the attention libraries
that are installed beside ours, in turn, one launch each round, median of the rounds; a rival that fails or is wrong is reported,
not timed. Decode: launches over caches in rotation, so that the second-level cache is cold, replayed as one graph.
Ceilings are measured in the same run: the best matrix product of several sizes, and reading a gibibyte.
Operations are useful ones only: 4 * heads * head_dim for each query and each key it sees.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from headwise.attention.capability import BACKENDS, PACKAGES, DeviceKind, here, need_for
from headwise.attention.choose import choose_layers, forced_backends
from headwise.attention.optional import CALLS, by_flash_attn_4
from headwise.attention.reference import turned
from headwise.cache.storage import LayerCache, Scratch, Span, alone
from headwise.engine.stage import attend_functions
from headwise.errors import UsageError
from headwise.kernels.turn import Turn
from headwise.planner.workspace import partial_values
from headwise.spec.kv import KV_FORMATS, k_values, q_values, turned_pairs, v_values
from headwise.spec.layers import KVLayout, LayerSpec, MlpSpec, ModelSpec
from headwise.spec.rope import proportional_rope

ROUNDS = 15
ERROR = 1e-2  # relative, bf16
CHECKED = 16  # last queries of a prefill that are held to the formula


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One row: a layer of a known model at one length."""

    name: str
    head_dim: int
    heads: int
    kv_heads: int
    window: int | None = None
    one: bool = False  # one tensor for K and V, 128 rotated dims
    length: int
    decode: bool = False
    kv: str = "bf16"
    layout: KVLayout = "v+rotated"  # of one tensor


_GLOBAL = Shape(name="Gemma 4 31B global", head_dim=512, heads=32, kv_heads=4, one=True, length=131072, decode=True)
SHAPES = (
    Shape(name="Gemma 4 31B sliding", head_dim=256, heads=32, kv_heads=16, window=1024, length=32768),
    Shape(name="causal 256", head_dim=256, heads=32, kv_heads=16, length=16384),
    Shape(name="Gemma 4 31B global", head_dim=512, heads=32, kv_heads=4, one=True, length=8192),
    Shape(name="Gemma 4 31B global", head_dim=512, heads=32, kv_heads=4, one=True, length=32768),
    Shape(name="Gemma 4 E4B global", head_dim=512, heads=8, kv_heads=2, length=32768),
    Shape(name="Llama, Qwen3, EXAONE", head_dim=128, heads=32, kv_heads=8, length=16384),
    Shape(name="Gemma 4 31B sliding", head_dim=256, heads=32, kv_heads=16, window=1024, length=32768, decode=True),
    *(replace(_GLOBAL, length=n) for n in (8192, 32768, 131072)),
    *(replace(_GLOBAL, kv=kv) for kv in ("fp8", "q8_0", "q4_0")),
)  # fmt: skip


Attend = Callable[[], Tensor]
"""One launch; its result, (T, H, D)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A rival that takes the shape by its own account, and why it is not timed."""

    shape: Shape
    who: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`tflops` of a prefill, `tb_s` of a decode; `fraction` of the measured ceiling."""

    shape: Shape
    who: str
    us: float
    low_us: float
    high_us: float
    tflops: float | None
    tb_s: float | None
    fraction: float
    error: float


def layer_of(shape: Shape) -> LayerSpec:
    rope = proportional_rope(shape.head_dim, 1e6, partial=0.25) if shape.one else None
    return LayerSpec(
        index=0, n_heads=shape.heads, n_kv_heads=shape.kv_heads, head_dim=shape.head_dim, window=shape.window, kv_source=None,
        k_eq_v=shape.one, kv_layout=shape.layout, rope=rope, scale=shape.head_dim**-0.5, mlp=MlpSpec(width=1, activation="silu"),
    )  # fmt: skip


def pairs(length: int, window: int | None) -> int:
    """Queries times the keys each sees, causal."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


class Ours:
    """A backend over caches of random keys: the one that is chosen for a shape, or the one named.

    Args:
        prefill: whether another row may take what it is ahead in.
    """

    def __init__(
        self, shape: Shape, device: torch.device, n_caches: int, backend: str | None = None, *, prefill: bool = True
    ) -> None:
        layer = layer_of(shape)
        spec = ModelSpec(
            name="bench", family="bench", layers=(layer,), vocab_size=1, hidden=1, max_context=shape.length, rms_eps=1e-6,
            norms="pre", tied=True,
        )  # fmt: skip
        kind = DeviceKind("cuda", torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))
        fmt = KV_FORMATS[shape.kv]
        self.kind = kind
        forced = forced_backends(None if backend is None else f"{layer.kind}={backend}")
        (choice,) = choose_layers(spec, kv={"global": fmt, "sliding": fmt}, dtype="bf16", device=kind, forced=forced)
        if not prefill:
            choice = choice.alone("our own is measured")
        self.name = choice.names
        (self.attend,) = attend_functions([choice])
        self.layer, self.shape = layer, shape
        n = 1 if shape.decode else shape.length
        chunk = 1 if shape.decode else shape.length
        self.caches = [LayerCache(layer, fmt, n_tokens=shape.length, chunk=chunk, device=device) for _ in range(n_caches)]
        for cache in self.caches:
            for values in (cache.k, cache.v):
                if values is not None:
                    room = torch.empty(4096, shape.kv_heads, values.n_values, device=device)
                    for start in range(0, cache.n_slots, 4096):
                        stop = min(start + 4096, cache.n_slots)
                        x = torch.randn(stop - start, shape.kv_heads, values.n_values, device=device, dtype=torch.bfloat16)
                        values.write(start, x, room[: stop - start])
        if turned_pairs(layer) and layer.rope is not None:
            freq = torch.tensor([f for f in layer.rope.inv_freq if f], dtype=torch.float32, device=device)
            norm = torch.randn(layer.head_dim, device=device, dtype=torch.bfloat16)
            for cache in self.caches:
                cache.turn = Turn(norm, freq, layer.rope.magnitude)
        self.q = torch.randn(n, shape.heads, q_values(layer), device=device, dtype=torch.bfloat16)
        if shape.one:  # as the decoder hands it over: the dims that rotate stand at the end
            self.q[..., :64] = 0
            self.q[..., 256:320] = 0
        self.out = torch.full((n, shape.heads, shape.head_dim), float("nan"), device=device, dtype=torch.bfloat16)
        self.span = Span(shape.length - n, n, None, alone(n, shape.length, shape.window, device))
        done = torch.zeros(shape.kv_heads, dtype=torch.int32, device=device)
        self.scratch = Scratch(None, None, torch.empty(partial_values(layer), device=device), done, chunk)

    def __call__(self, i: int = 0) -> None:
        self.attend(self.q, self.caches[i], self.span, scale=self.layer.scale, scratch=self.scratch, out_THD=self.out)

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the first cache as floats, in order of position (the last ones it holds); keys of V alone in fp64."""
        cache, n = self.caches[0], self.shape.length
        out = []
        for values in (cache.k, cache.v or cache.k):
            room = None
            if not values.native(torch.bfloat16):
                room = torch.empty(cache.n_slots, self.shape.kv_heads, values.n_values, device=self.q.device, dtype=torch.bfloat16)
            x = values.read(0, cache.n_slots, room)
            if cache.window is not None:
                x = x.roll(-(n % cache.n_slots), 0) if n > cache.n_slots else x[:n]
            out.append(x[-n:])
        if cache.turn is not None:
            out[0] = turned(out[0], torch.arange(n, device=out[0].device), cache.turn, self.q.shape[-1])
        return out[0], out[1][..., : self.shape.head_dim]


def formula(q: Tensor, k: Tensor, v: Tensor, shape: Shape, scale: float) -> Tensor:
    """The last queries in fp64, head by head."""
    T, n = q.shape[0], k.shape[0]
    at = torch.arange(n - T, n, device=q.device)[:, None]
    j = torch.arange(n, device=q.device)[None]
    seen = (j <= at) & (j > at - shape.window) if shape.window else j <= at
    group = shape.heads // shape.kv_heads
    out = torch.empty(T, shape.heads, shape.head_dim, dtype=torch.float64, device=q.device)
    for h in range(shape.heads):
        s = (q[:, h].double() @ k[:, h // group].double().T * scale).masked_fill(~seen, float("-inf"))
        out[:, h] = s.softmax(-1) @ v[:, h // group].double()
    return out


def rivals(ours: Ours) -> tuple[Tensor, Iterator[tuple[str, Attend]]]:
    """The formula's last results over two tensors of the same keys, and who computes them: those that take the shape."""
    shape, scale = ours.shape, ours.layer.scale
    k, v = ours.held()
    q = ours.q
    if shape.one:  # K as the model computes it has head_dim values: the same work, other numbers
        q, k = q[..., : shape.head_dim].contiguous(), k[..., : shape.head_dim].contiguous()
    v = v.contiguous()
    want = formula(q[-CHECKED:], k, v, shape, scale)
    return want, chain(operators(q, k, v, shape, scale), libraries(q, k, v, shape, scale, ours.kind))


def operators(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, shape: Shape, scale: float) -> Iterator[tuple[str, Attend]]:
    """PyTorch's."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = q_THD.transpose(0, 1)[None]
    k, v = (x.transpose(0, 1)[None].contiguous() for x in (k_SGD, v_SGD))
    if shape.head_dim <= 256:  # out of shared memory at 512
        yield "FlexAttention", flex(q, k, v, shape, scale)
    if shape.window is not None:  # the others know none
        return
    group = shape.heads // shape.kv_heads
    for name, backend, expand in (
        ("torch flash", SDPBackend.FLASH_ATTENTION, False),
        ("torch cuDNN", SDPBackend.CUDNN_ATTENTION, False),
        ("torch efficient", SDPBackend.EFFICIENT_ATTENTION, True),
    ):
        keys, values = (x.repeat_interleave(group, 1) if expand else x for x in (k, v))

        def run(keys: Tensor = keys, values: Tensor = values, backend: Any = backend, gqa: bool = not expand) -> Tensor:
            with sdpa_kernel(backend):
                out = torch.nn.functional.scaled_dot_product_attention(q, keys, values, is_causal=True, scale=scale, enable_gqa=gqa)
            return out[0].transpose(0, 1)

        yield name, run


def libraries(
    q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, shape: Shape, scale: float, kind: DeviceKind
) -> Iterator[tuple[str, Attend]]:
    """Those installed, by the limits of their rows in the table of backends; those that are no backend by their documentation.

    Source: ffpa-attn 0.2.4 ffpa_attn_func: head_dim over 256, causal, no window; its CuTe kernels of SM90 up to 512. vLLM 0.26.0
    vllm_flash_attn/cute/interface.py: its branch of flash-attn-4, on SM90 head_dim 8 to 512.
    """
    need = need_for(layer_of(replace(shape, one=False)), kv=KV_FORMATS["bf16"], dtype="bf16", device=kind)
    for backend in BACKENDS:
        if backend.package and backend.refusal(need) is None:
            call = partial(CALLS[backend.name], q_THD, k_SGD, v_SGD, scale, shape.window, None)
            yield backend.name, lambda call=call: call()[0]
    if here("ffpa-attn") and 256 < shape.head_dim <= 512 and shape.window is None:
        q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_SGD, v_SGD))
        for how in ("triton", "cutedsl"):

            def run(how: str = how) -> Tensor:
                from ffpa_attn import ffpa_attn_func  # type: ignore[import-not-found]

                out = ffpa_attn_func(q, k, v, is_causal=True, scale=scale, enable_gqa=True, forward_backend=how)
                return out[0].transpose(0, 1)

            yield f"ffpa-attn {how}", run
    if here("vllm") and kind.capability == (9, 0):

        def branch() -> Tensor:
            from vllm.vllm_flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]

            return by_flash_attn_4(flash_attn_func, q_THD, k_SGD, v_SGD, scale, shape.window, None)[0]

        yield "vLLM's flash-attn-4", branch


def flex(q: Tensor, k: Tensor, v: Tensor, shape: Shape, scale: float) -> Attend:
    """FlexAttention, compiled, with the blocks that its mask leaves empty skipped."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n, window = q.shape[2], shape.window or shape.length
    mask = create_block_mask(lambda b, h, i, j: (j <= i) & (j > i - window), None, None, n, n, device=str(q.device))
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Microseconds of each call, one launch each round, measured by device events."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3)
    return times


def ceilings(device: torch.device) -> tuple[float, float]:
    """TFLOP/s of the best bf16 product of three sizes, and TB/s of reading a gibibyte."""
    best = 0.0
    for n in (4096, 8192, 12288):
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        us = statistics.median(in_turn({"": lambda a=a, b=b: a @ b}, 12)[""])
        best = max(best, 2 * n**3 / us / 1e6)
    big = torch.empty(2**27, device=device, dtype=torch.int64).random_()
    us = statistics.median(in_turn({"": lambda: big.sum()}, 12)[""])
    return best, 2**30 / us / 1e6


def graph_times(ours: Ours, rounds: int) -> list[float]:
    """Microseconds of one decode launch, caches in rotation, replayed as one graph."""
    ours()
    torch.cuda.synchronize()
    repeats = max(1, 24 // len(ours.caches))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for i in range(len(ours.caches)):
                ours(i)
    n = repeats * len(ours.caches)
    return [t / n for t in in_turn({"": graph.replay}, rounds)[""]]


def cache_bytes(shape: Shape) -> int:
    """What one decode launch reads."""
    layer, fmt = layer_of(shape), KV_FORMATS[shape.kv]
    keys = min(shape.length, shape.window or shape.length)
    return keys * shape.kv_heads * (fmt.row_bytes(k_values(layer)) + fmt.row_bytes(v_values(layer)))


def taken(theirs: Iterable[tuple[str, Attend]], want: Tensor) -> tuple[dict[str, Attend], dict[str, float], dict[str, str]]:
    """The rivals whose last results are those wanted, each one's error, and why the others are not among them."""
    calls: dict[str, Attend] = {}
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, call in theirs:
        try:
            error = relative(call()[-len(want) :], want)
        except Exception as failure:  # whatever another library raises is its row
            refused[name] = (str(failure).strip() or type(failure).__name__).splitlines()[0]
            continue
        if error < ERROR:
            calls[name], errors[name] = call, error
        else:
            refused[name] = f"wrong: relative error {error:.1e}"
    return calls, errors, refused


def measure(shape: Shape, device: torch.device, ceiling: tuple[float, float]) -> tuple[list[Row], list[Refused]]:
    n_caches = max(3, -(-(2**28) // cache_bytes(shape))) if shape.decode else 1
    ours = Ours(shape, device, n_caches, prefill=False)  # whoever is ahead of it is timed beside it
    ours()
    torch.cuda.synchronize()
    k, v = ours.held()
    n = min(CHECKED, ours.q.shape[0])
    want = formula(ours.q[-n:], k, v, shape, ours.layer.scale)
    error = relative(ours.out[-n:], want)
    if not error < ERROR:
        raise RuntimeError(f"{ours.name} is wrong at {shape}: relative error {error:.1e}; nothing is timed")
    if shape.decode:
        us = graph_times(ours, ROUNDS)
        middle = statistics.median(us)
        tb_s = cache_bytes(shape) / middle / 1e6
        return [Row(shape=shape, who=ours.name, us=middle, low_us=min(us), high_us=max(us), tflops=None, tb_s=tb_s,
                    fraction=tb_s / ceiling[1], error=error)], []  # fmt: skip
    want, theirs = rivals(ours)
    others, errors, refused = taken(theirs, want)
    calls: dict[str, Callable[[], Any]] = {ours.name: ours, **others}
    errors[ours.name] = error
    work = 4 * shape.heads * shape.head_dim * pairs(shape.length, shape.window)
    out = []
    for name, us in in_turn(calls, ROUNDS).items():
        middle = statistics.median(us)
        tflops = work / middle / 1e6
        out.append(Row(shape=shape, who=name, us=middle, low_us=min(us), high_us=max(us), tflops=tflops, tb_s=None,
                       fraction=tflops / ceiling[0], error=errors[name]))  # fmt: skip
    return out, [Refused(shape=shape, who=who, why=why) for who, why in refused.items()]


def bench(*, as_json: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """The table, row by row as it is measured.

    Raises:
        UsageError: no NVIDIA card is here.
    """
    if not torch.cuda.is_available():
        raise UsageError("nothing to measure", why="PyTorch sees no NVIDIA card", do="run it on the machine with the card")
    device = torch.device("cuda")
    ceiling = ceilings(device)
    head = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
        "matrix_tflops": ceiling[0], "read_tb_s": ceiling[1],
        "libraries": {name: metadata.version(name) for name in (*PACKAGES, "ffpa-attn", "vllm") if here(name)},
    }  # fmt: skip
    say(f"{head['gpu']}: bf16 products {ceiling[0]:.0f} TFLOP/s, reads {ceiling[1]:.2f} TB/s")
    rows: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    for shape in SHAPES:
        phase, window = "decode" if shape.decode else "prefill", f" window {shape.window}" if shape.window else ""
        what = f"{phase:<8}{shape.name:<22}{shape.head_dim}{window:<12} {shape.length:>7} {shape.kv:<5}"
        timed, not_timed = measure(shape, device, ceiling)
        for row in timed:
            rows.append(asdict(row))
            rate = f"{row.tflops:.0f} TFLOP/s" if row.tflops else f"{row.tb_s:.2f} TB/s"
            say(f"{what}{row.who:<17}{row.us:>10.1f} us  {rate:>12}  {row.fraction:>4.0%}")
        for row in not_timed:
            refused.append(asdict(row))
            say(f"{what}{row.who:<17}refused: {row.why}")
        torch.cuda.empty_cache()
    result = head | {"rows": rows, "refused": refused}
    if as_json:
        print(json.dumps(result))
    return result
