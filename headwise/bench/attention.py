"""How fast attention is on this card, beside what the card can do and what PyTorch has for the same shape.

Every candidate is compared with the formula in fp64 before it is timed: ours, PyTorch's operators and the attention libraries that
are installed; a rival that fails or is wrong is reported, not timed. They are timed in turn, median of the rounds: TIMED_MS of
launches behind SOAK_MS of untimed ones of the same. Decode: launches over caches in rotation, so that the second-level cache is
cold, replayed as one graph; rivals have a tensor each for K and V, and no more keys than a window. Ceilings are measured in the
same way: the best matrix product of several sizes, and reading a gibibyte.
Operations are useful ones only: 4 * heads * head_dim for each query and each key it sees.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

ROUNDS = 9
SOAK_MS = 160.0  # an H200 holds its power limit over 120 ms: until then a kernel is as fast as what ran before has left it
TIMED_MS = 10.0
GRAPH_MS = 40.0
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
_SLIDING = Shape(name="Gemma 4 31B sliding", head_dim=256, heads=32, kv_heads=16, window=1024, length=32768)
_PAIR = Shape(name="Gemma 4 E4B global", head_dim=512, heads=8, kv_heads=2, length=32768)
BYTES = ("fp8", "q8_0", "q4_0")
SHAPES = (
    _SLIDING,
    Shape(name="causal 256", head_dim=256, heads=32, kv_heads=16, length=16384),
    *(replace(_GLOBAL, length=n, decode=False) for n in (8192, 32768)),
    _PAIR,
    Shape(name="Llama, Qwen3, EXAONE", head_dim=128, heads=32, kv_heads=8, length=16384),
    *(replace(_GLOBAL, kv=kv, length=32768, decode=False) for kv in BYTES),
    *(replace(_PAIR, kv=kv) for kv in BYTES),
    *(replace(_SLIDING, kv=kv) for kv in BYTES),
    replace(_SLIDING, decode=True),
    *(replace(_GLOBAL, length=n) for n in (8192, 32768, 131072)),
    *(replace(_GLOBAL, kv=kv) for kv in BYTES),
)  # fmt: skip


Attend = Callable[[int], Tensor]
"""One launch over the cache of that number; its result, (T, H, D)."""
Keys = Sequence[tuple[Tensor, Tensor]]
"""K and V of each cache, (S, G, D)."""


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

    def __call__(self, i: int = 0) -> Tensor:
        self.attend(self.q, self.caches[i], self.span, scale=self.layer.scale, scratch=self.scratch, out_THD=self.out)
        return self.out

    def held(self, i: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of a cache as floats, in order of position (the last ones it holds); keys of V alone in fp64."""
        cache, n = self.caches[i], self.shape.length
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


def each(kv: Iterable[tuple[Tensor, Tensor]], make: Callable[[Tensor], Tensor]) -> Keys:
    return [(make(k), make(v)) for k, v in kv]


def rivals(ours: Ours) -> Iterator[tuple[str, Attend]]:
    """Those that take the shape, over two tensors of the same keys. K as the model computes it has head_dim values: the same work
    as one tensor's, other numbers."""
    shape, q = ours.shape, ours.q[..., : ours.shape.head_dim].contiguous()
    seen = shape.length
    if shape.decode and shape.window is not None:
        seen, shape = shape.window, replace(shape, length=shape.window, window=None)
    kv = each((ours.held(i) for i in range(len(ours.caches))), lambda x: x[-seen:, :, : shape.head_dim].contiguous())
    return chain(operators(q, kv, shape, ours.layer.scale), libraries(q, kv, shape, ours.layer.scale, ours.kind))


def operators(q_THD: Tensor, kv: Keys, shape: Shape, scale: float) -> Iterator[tuple[str, Attend]]:
    """PyTorch's."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = q_THD.transpose(0, 1)[None]
    heads = each(kv, lambda x: x.transpose(0, 1)[None].contiguous())
    if shape.head_dim <= 256 or shape.decode:  # a prefill at 512 is out of shared memory
        yield "FlexAttention", flex(q, heads, shape, scale)
    if shape.window is not None:  # the others know none
        return
    group = shape.heads // shape.kv_heads
    for name, backend, expand in (
        ("torch flash", SDPBackend.FLASH_ATTENTION, False),
        ("torch cuDNN", SDPBackend.CUDNN_ATTENTION, False),
        ("torch efficient", SDPBackend.EFFICIENT_ATTENTION, True),
    ):
        held = each(heads, lambda x: x.repeat_interleave(group, 1)) if expand else heads

        def run(i: int, held: Keys = held, backend: Any = backend, gqa: bool = not expand) -> Tensor:
            with sdpa_kernel(backend):
                k, v = held[i]
                causal = not shape.decode  # one query sees all keys
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=gqa)
            return out[0].transpose(0, 1)

        yield name, run


def libraries(q: Tensor, kv: Keys, shape: Shape, scale: float, kind: DeviceKind) -> Iterator[tuple[str, Attend]]:
    """Those installed, by the limits of their rows in the table of backends; those that are no backend by their documentation.

    Source: ffpa-attn 0.2.4 ffpa_attn_func: head_dim over 256, causal, no window; its CuTe kernels of SM90 up to 512. vLLM 0.26.0
    vllm_flash_attn/cute/interface.py: its branch of flash-attn-4, on SM90 head_dim 8 to 512. FlashInfer 0.7.2 flashinfer/decode.py
    single_decode_with_kv_cache; any head_dim that it can compile, at 512 too.
    """
    need = need_for(layer_of(replace(shape, one=False)), kv=KV_FORMATS["bf16"], dtype="bf16", device=kind)
    for backend in BACKENDS:
        if backend.package and backend.refusal(need) is None and (backend.name, shape.decode) != ("flashinfer", True):
            yield backend.name, lambda i, call=CALLS[backend.name]: call(q, *kv[i], scale, shape.window, None)[0]
    if here("flashinfer-python"):
        if shape.decode:
            for name, dense in (("flashinfer", False), ("flashinfer tensor cores", True)):

                def decode(i: int, dense: bool = dense) -> Tensor:
                    from flashinfer import single_decode_with_kv_cache  # type: ignore[import-not-found]

                    return single_decode_with_kv_cache(q[0], *kv[i], sm_scale=scale, use_tensor_cores=dense)[None]

                yield name, decode
        elif shape.head_dim > 256:  # beyond its row: it compiles more than its wheel holds
            yield "flashinfer", lambda i: CALLS["flashinfer"](q, *kv[i], scale, shape.window, None)[0]
    if here("ffpa-attn") and 256 < shape.head_dim <= 512 and shape.window is None:
        for how in ("triton", "cutedsl"):

            def run(i: int, how: str = how) -> Tensor:
                from ffpa_attn import ffpa_attn_func  # type: ignore[import-not-found]

                theirs = (x.transpose(0, 1)[None] for x in (q, *kv[i]))
                out = ffpa_attn_func(*theirs, is_causal=not shape.decode, scale=scale, enable_gqa=True, forward_backend=how)
                return out[0].transpose(0, 1)

            yield f"ffpa-attn {how}", run
    if here("vllm") and kind.capability == (9, 0):

        def branch(i: int) -> Tensor:
            from vllm.vllm_flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]

            call = partial(flash_attn_func, num_splits=0) if shape.decode else flash_attn_func  # as many as it thinks right
            return by_flash_attn_4(call, q, *kv[i], scale, shape.window, None)[0]

        yield "vLLM's flash-attn-4", branch


def flex(q: Tensor, heads: Keys, shape: Shape, scale: float) -> Attend:
    """FlexAttention, compiled, with the blocks that its mask leaves empty skipped."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n, window, mask = shape.length, shape.window or shape.length, None
    if not shape.decode:
        mask = create_block_mask(lambda b, h, i, j: (j <= i) & (j > i - window), None, None, n, n, device=str(q.device))
    compiled = torch.compile(flex_attention)
    return lambda i: compiled(q, *heads[i], block_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def timed(call: Callable[[], Any], n: int = 1) -> float:
    """Microseconds of one of `n` calls, by device events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(n):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / n


def in_turn(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Microseconds of each call, once each round, behind untimed ones of the same call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    first: dict[str, float] = {}
    for name, call in calls.items():
        call()
        first[name] = timed(call)
    for _ in range(rounds):
        for name, call in calls.items():
            for _ in range(round(1e3 * SOAK_MS / first[name])):
                call()
            times[name].append(timed(call, max(1, round(1e3 * TIMED_MS / first[name]))))
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


def recorded(call: Callable[[int], Any], n: int) -> tuple[Callable[[], None], int]:
    """One graph of launches over `n` caches in rotation, and how many they are: fewer of one that takes long."""
    call(0)
    us = timed(lambda: call(0))
    repeats = max(1, round(min(24.0, 1e3 * GRAPH_MS / us) / n))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for i in range(n):
                call(i)
    return graph.replay, repeats * n


def graph_times(ours: Ours, rounds: int) -> list[float]:
    """Microseconds of one decode launch, caches in rotation, replayed as one graph."""
    replay, launches = recorded(ours, len(ours.caches))
    return [t / launches for t in in_turn({"": replay}, rounds)[""]]


def cache_bytes(shape: Shape) -> int:
    """What one decode launch reads."""
    layer, fmt = layer_of(shape), KV_FORMATS[shape.kv]
    keys = min(shape.length, shape.window or shape.length)
    return keys * shape.kv_heads * (fmt.row_bytes(k_values(layer)) + fmt.row_bytes(v_values(layer)))


def words_of(failure: Exception) -> str:
    return (str(failure).strip() or type(failure).__name__).splitlines()[0]


def taken(theirs: Iterable[tuple[str, Attend]], want: Tensor) -> tuple[dict[str, Attend], dict[str, float], dict[str, str]]:
    """The rivals whose last results are those wanted, each one's error, and why the others are not among them."""
    calls: dict[str, Attend] = {}
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, call in theirs:
        try:
            error = relative(call(0)[-len(want) :], want)
        except Exception as failure:  # whatever another library raises is its row
            refused[name] = words_of(failure)
            continue
        if error < ERROR:
            calls[name], errors[name] = call, error
        else:
            refused[name] = f"wrong: relative error {error:.1e}"
    return calls, errors, refused


def measure(shape: Shape, device: torch.device, ceiling: tuple[float, float]) -> tuple[list[Row], list[Refused]]:
    n_caches = max(3, -(-(2**28) // cache_bytes(shape))) if shape.decode else 1
    ours = Ours(shape, device, n_caches, prefill=False)  # whoever is ahead of it is timed beside it
    n = min(CHECKED, ours.q.shape[0])
    k, v = ours.held()
    want = formula(ours.q[-n:], k, v, shape, ours.layer.scale)
    error = relative(ours()[-n:], want)
    if not error < ERROR:
        raise RuntimeError(f"{ours.name} is wrong at {shape}: relative error {error:.1e}; nothing is timed")
    calls: dict[str, Attend] = {ours.name: ours}
    errors, refused = {ours.name: error}, dict[str, str]()
    two = replace(shape, one=False)
    if shape.kv == "bf16":  # nobody else reads blocks
        if shape.one:
            q, k, v = (x[..., : shape.head_dim] for x in (ours.q[-n:], k, v))
            want = formula(q, k, v, shape, ours.layer.scale)
        others, theirs, refused = taken(rivals(ours), want)
        calls, errors = calls | others, errors | theirs
    launches: dict[str, Callable[[], Any]] = {name: partial(call, 0) for name, call in calls.items()}
    many = dict.fromkeys(calls, 1)
    for name, call in calls.items() if shape.decode else ():
        try:
            launches[name], many[name] = recorded(call, n_caches)
        except Exception as failure:
            if name == ours.name:
                raise
            del launches[name]
            refused[name] = f"not recorded in a graph: {words_of(failure)}"
    work = 4 * shape.heads * shape.head_dim * pairs(shape.length, shape.window)
    out = []
    for name, us in in_turn(launches, ROUNDS).items():
        low, middle, high = (t / many[name] for t in (min(us), statistics.median(us), max(us)))
        read = cache_bytes(shape if name == ours.name else two)
        rate = (read if shape.decode else work) / middle / 1e6
        out.append(Row(
            shape=shape, who=name, us=middle, low_us=low, high_us=high, tflops=None if shape.decode else rate,
            tb_s=rate if shape.decode else None, fraction=rate / ceiling[shape.decode], error=errors[name],
        ))  # fmt: skip
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
