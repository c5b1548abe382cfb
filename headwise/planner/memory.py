"""Does it fit, where, and how far: the plan that `run` allocates by, before a single tensor is read.

Weights by `residence`, KV by `spec.kv`, compute by `workspace`: the same functions size the allocations, so planned bytes
are allocated bytes. All arithmetic is on exact integers; nothing is allocated to find out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

from headwise.errors import PlanError, UsageError
from headwise.hardware.gpus import Gpu
from headwise.planner.residence import FLOAT_TYPES, FP8_TYPES, multiplied, planed, resident_types, weight_bytes
from headwise.planner.workspace import SKINNY_ROWS, Buffer, arena_bytes, workspace
from headwise.spec.kv import PAGE_TOKENS, KVFormat, check_format, kv_bytes
from headwise.spec.layers import Kind, LayerSpec, ModelSpec
from headwise.spec.tensors import layer_of, outer_tensors, weight_tensors

MIB = 2**20
GPU_MARGIN_BYTES = 768 * MIB  # driver context, cuBLAS workspace and allocator rounding of one process on one GPU
CPU_MARGIN_BYTES = 512 * MIB  # the Python process with PyTorch loaded
DEFAULT_CHUNK = 512
BACK_TOKENS = 512  # beyond its window in a copy of a ring: it serves prompts that part from it so far before its end
MAX_TOKENS = 2**63 - 1
SERVE_SLOTS = 4  # most that a server takes unasked: agents make parallel calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One device to plan for; `gpu` None is the CPU."""

    name: str
    gpu: Gpu | None
    total_bytes: int
    others_bytes: int = 0  # held by other processes now
    margin_bytes: int = GPU_MARGIN_BYTES

    @property
    def usable_bytes(self) -> int:
        return max(0, self.total_bytes - self.others_bytes - self.margin_bytes)


class Room(NamedTuple):
    """Sequences at once, the tokens that global layers hold of them together (None: a context each), those of a prefill step."""

    slots: int
    pool: int | None
    chunk: int = DEFAULT_CHUNK


def rooms(context: int, slots: int | None, pool: int | None, chunks: Sequence[int]) -> tuple[Room, ...]:
    """What may be taken: the first of these that fits.

    Every sequence may always have the whole context, so a user alone loses nothing. Sequences come before pages: one more costs
    rings only, and where pages run short the youngest waits. Longer steps come last: they make rings longer.

    Args:
        slots: None: up to `SERVE_SLOTS`, for a server that is not told how many sequences it is to serve at once.
        chunks: that a prefill step may have, the best first; see `ceiling.step_sizes`.
    """
    whole = -(-context // PAGE_TOKENS) * PAGE_TOKENS
    if slots is not None:
        seats = [(slots, pool)]
    elif pool is not None:
        seats = [(n, pool) for n in range(SERVE_SLOTS, 0, -1)]
    else:
        seats = [(n, None if k == n else k * whole) for n in range(SERVE_SLOTS, 0, -1) for k in range(n, 0, -1)]
    return tuple(Room(n, pages, chunk) for n, pages in seats for chunk in chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the model is to hold at once."""

    context: int  # tokens of prompt and answer of one sequence
    slots: int = 1  # sequences at once
    pool: int | None = None  # tokens that the global layers hold of all sequences together; None: `context` of each
    chunk: int = DEFAULT_CHUNK  # most tokens of one prefill step
    rooms: tuple[Room, ...] = ()  # in place of these three: the first that fits, else the last; in a plan it and those after
    by_default: bool = False  # nobody said how many slots: the plan says why it has so many
    kv: Mapping[Kind, KVFormat]
    dtype: str  # of the activations
    cpu: bool = False
    reads: frozenset[str] = frozenset({"tiles"})  # what the layers' backends need beside the cache, see `workspace`

    @property
    def fused(self) -> bool:
        """Whether every layer reads its cache by slots: then our kernels also do what stands between the products."""
        return self.reads == {"slots"}

    @property
    def pool_tokens(self) -> int:
        """Tokens of whole pages in the global layers, of all sequences together."""
        each = -(-self.context // PAGE_TOKENS) * PAGE_TOKENS
        return self.slots * each if self.pool is None else -(-self.pool // PAGE_TOKENS) * PAGE_TOKENS

    @property
    def back_tokens(self) -> int:
        """In place of the step's in a copy of a ring."""
        return min(self.chunk, BACK_TOKENS)

    def layer_bytes(self, layer: LayerSpec) -> int:
        """Bytes that `layer` holds: a ring for each sequence, or pages for all; what `cache.storage` allocates."""
        fmt = self.kv[layer.kind]
        if layer.window is None:
            return kv_bytes(layer, n_tokens=self.pool_tokens, chunk=self.chunk, fmt=fmt)
        return self.slots * kv_bytes(layer, n_tokens=self.context, chunk=self.chunk, fmt=fmt)

    def at(self, context: int) -> Workload:
        """This work with another context; a prefill step is never longer than that, nor the pool smaller."""
        pool = None if self.pool is None else max(self.pool, context)
        return replace(self, context=context, chunk=min(self.chunk, context), pool=pool)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """A run of layers, and every byte that the device which runs them allocates."""

    layers: range
    buffers: tuple[Buffer, ...]
    weights_bytes: int
    kv_global_bytes: int
    kv_sliding_bytes: int

    @property
    def compute_bytes(self) -> int:
        return arena_bytes(self.buffers)

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_global_bytes + self.kv_sliding_bytes + self.compute_bytes


class Share(NamedTuple):
    """What one device gets."""

    target: Target
    stage: StagePlan

    @property
    def planned_bytes(self) -> int:
        return self.stage.total_bytes

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.stage.layers)

    @property
    def fits(self) -> bool:
        return self.planned_bytes <= self.target.usable_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Labelled bytes, a stage a device; one stage where no device is known, and `fits` and `max_context` are None then."""

    spec: ModelSpec
    workload: Workload
    stored: Mapping[str, str]
    resident: Mapping[str, str]
    stages: tuple[StagePlan, ...]
    targets: tuple[Target, ...] = ()  # of the stages
    max_context: int | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def shares(self) -> tuple[Share, ...]:
        return tuple(Share(t, s) for t, s in zip(self.targets, self.stages, strict=True)) if self.targets else ()

    @property
    def fits(self) -> bool | None:
        return all(s.fits for s in self.shares) if self.targets else None

    @property
    def weights_bytes(self) -> int:
        return sum(s.weights_bytes for s in self.stages)

    @property
    def kv_global_bytes(self) -> int:
        return sum(s.kv_global_bytes for s in self.stages)

    @property
    def kv_sliding_bytes(self) -> int:
        return sum(s.kv_sliding_bytes for s in self.stages)

    @property
    def n_copies(self) -> int:
        """Of rings, kept in host memory by a server for prompts to come: one a slot, and one for what prompts begin with."""
        return self.workload.slots + 1

    @property
    def copy_bytes(self) -> int:
        """Of one: the window, and as much before it as a later prompt may go back."""
        w, windowed = self.workload, (x for x in self.spec.kv_layers if x.window is not None)
        return sum(kv_bytes(x, n_tokens=w.context, chunk=w.back_tokens, fmt=w.kv[x.kind]) for x in windowed)

    @property
    def kept_bytes(self) -> int:
        """Host memory of those copies; not part of `total_bytes`: `run` makes none."""
        return self.n_copies * self.copy_bytes

    @property
    def compute_bytes(self) -> int:
        return sum(s.compute_bytes for s in self.stages)

    @property
    def kv_bytes(self) -> int:
        return self.kv_global_bytes + self.kv_sliding_bytes

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes


def check_workload(spec: ModelSpec, w: Workload, *, limit: bool = True) -> None:
    """Refuses what no plan can answer; the largest legal numbers are answered exactly.

    Args:
        limit: refuse a context beyond the model's maximum.
    """
    numbers = [("context", w.context, MAX_TOKENS), ("slots", w.slots, 2**31), ("ubatch", w.chunk, 2**31)]
    if w.pool is not None:
        numbers.append(("pool", w.pool, MAX_TOKENS))
    for name, value, most in numbers:
        if not 1 <= value <= most:
            raise UsageError(
                f"--{name} {value} makes no sense", why=f"it must lie from 1 to {most}", do=f"--{name} {min(4096, most)}"
            )
    if w.pool is not None and w.pool < w.context:
        raise UsageError(
            f"--pool {w.pool} makes no sense", why=f"one sequence may have {w.context} tokens", do=f"--pool {w.context} at least"
        )
    if limit and w.context > spec.max_context:
        raise PlanError(
            f"{w.context} tokens are more than {spec.name} can attend to",
            why=f"its config says {spec.max_context}",
            do=f"--context {spec.max_context}",
        )
    for layer in spec.kv_layers:
        check_format(layer, w.kv[layer.kind])


def plan(spec: ModelSpec, stored: Mapping[str, str], w: Workload, targets: Sequence[Target] = ()) -> Plan:
    """The plan for `w` on `targets`.

    `max_context` is that of the last of its rooms, where it has several.

    Args:
        stored: our tensor name -> the type its weights are stored in (`quantise.weight_types`, `weights.names`).
    Raises:
        UsageError, PlanError: a number that makes no sense, a context beyond the model's maximum, a KV type that does
            not fit a head. Not fitting is no error: `fits` says so.
    """
    tries = [
        replace(w, slots=room.slots, pool=room.pool, chunk=room.chunk, rooms=w.rooms[i:]) for i, room in enumerate(w.rooms)
    ] or [w]
    check_workload(spec, tries[-1])
    resident = resident_types(spec, stored, cpu=w.cpu, dtype=w.dtype)
    sizes = weight_bytes(spec, resident)
    quantised = _quantised(spec, w, resident)

    def planned(w: Workload) -> Plan:
        w = w.at(w.context)
        stages, used = _split(spec, sizes, w, quantised, targets)
        left_out = (f"{t.name} is left out: it gets no layer" for t in targets if not any(t is u for u in used))
        notes = (*left_out, *_fp8_words(spec, w, stored, resident))
        return Plan(spec=spec, workload=w, stored=stored, resident=resident, stages=stages, targets=used, notes=notes)

    if not targets:
        return planned(tries[-1])
    found = next((p for t in tries[:-1] if _holds_copies(p := planned(t))), None) or planned(tries[-1])
    notes = (_room_words(found), *found.notes) if w.by_default else found.notes
    return replace(found, notes=notes, max_context=max_context(spec, sizes, tries[-1], resident, targets))


def _holds_copies(p: Plan) -> bool:
    """Whether it fits, on the CPU with the copies of rings, which lie in the same memory."""
    free = sum(s.target.usable_bytes - s.planned_bytes for s in p.shares)
    return bool(p.fits) and (not p.workload.cpu or p.kept_bytes <= free)


def _room_words(p: Plan) -> str:
    """Why a server that was not told how many slots to take has so many."""
    w = p.workload
    if w.slots == 1:
        return f"1 slot by default: the rings of a second sequence do not fit beside {w.context:,} tokens of context"
    most = "" if w.slots == SERVE_SLOTS else f", of {SERVE_SLOTS} at most"
    pages = "pages for all of it each" if w.pool_tokens >= w.slots * w.context else f"{w.pool_tokens:,} tokens of pages together"
    return f"{w.slots} slots by default{most}: agents make parallel calls; each may have the whole context, and there are {pages}"


def _fp8_words(spec: ModelSpec, w: Workload, stored: Mapping[str, str], resident: Mapping[str, str]) -> Iterator[str]:
    """Which tensors in e4m3 stay so, which do not, and when activations become e4m3 too."""
    names = {"matrix": "matrices", "experts": "experts", "table": "tables", "vector": "routers"}
    kept = {names[t.role] for t in weight_tensors(spec) if resident[t.name] in FP8_TYPES}
    if kept:
        yield f"{' and '.join(sorted(kept, reverse=True))} are kept in fp8 (e4m3); activations " + (
            f"of steps of more than {SKINNY_ROWS} tokens are rounded to e4m3 too before matrices, on cards that multiply it "
            f"(compute capability 8.9 and up): about 2.7 % of error a product"
            if _scaled_rows(spec, w, resident)
            else "stay as they are"
        )
    expanded = [names[t.role] for t in weight_tensors(spec) if stored[t.name] in FP8_TYPES and resident[t.name] not in FP8_TYPES]
    if expanded:
        yield f"{' and '.join(sorted(set(expanded)))} stored in fp8 are expanded at load: {len(expanded)} tensors"


def _scaled_rows(spec: ModelSpec, w: Workload, resident: Mapping[str, str]) -> bool:
    """Whether activations may become e4m3, as `model.linear` has it, on a card that can."""
    fused = multiplied(spec, resident)
    alone = (t for t in weight_tensors(spec) if t.role != "experts" or layer_of(t.name) not in fused)
    return w.fused and w.dtype == "bf16" and any(resident[t.name] == "fp8" for t in alone)


class _Quantised(NamedTuple):
    """What the products with weights that stay quantised need of `workspace`; the same for every context."""

    block_weights: bool
    plane_values: int
    plain_experts: bool
    fused_experts: bool
    plane_experts: bool
    scaled_rows: bool


def _quantised(spec: ModelSpec, w: Workload, resident: Mapping[str, str]) -> _Quantised:
    planes = planed(spec, resident) if w.fused else frozenset[str]()
    ours = planes | {name for name, t in resident.items() if t in FP8_TYPES and w.fused}
    products = [t for t in weight_tensors(spec) if t.name in ours and t.role != "table"]
    fused = multiplied(spec, resident) if w.fused else frozenset()
    with_experts = {layer.index for layer in spec.layers if layer.mlp.moe}
    return _Quantised(
        block_weights=any(t not in FLOAT_TYPES for name, t in resident.items() if name not in ours),
        plane_values=max((t.n_elements if t.name in planes else prod(t.shape[-2:]) for t in products), default=0),
        plain_experts=not with_experts <= fused,
        fused_experts=bool(fused),
        plane_experts=any(t.role == "experts" and t.name in planes for t in products),
        scaled_rows=_scaled_rows(spec, w, resident),
    )


def _buffers(spec: ModelSpec, w: Workload, quantised: _Quantised, *, first: bool, last: bool) -> tuple[Buffer, ...]:
    return workspace(
        spec,
        n_tokens=w.context,
        chunk=w.chunk,
        dtype=w.dtype,
        kv=w.kv,
        cpu=w.cpu,
        slots=w.slots,
        reads=w.reads,
        first=first,
        last=last,
        **quantised._asdict(),
    )


def max_context(
    spec: ModelSpec, sizes: Mapping[str, int], w: Workload, resident: Mapping[str, str], targets: Sequence[Target]
) -> int:
    """The largest context, up to the model's own, that fits `targets`; 0 where not even one token does."""

    quantised = _quantised(spec, w, resident)

    def fits(context: int) -> bool:
        stages, used = _split(spec, sizes, w.at(context), quantised, targets)
        return all(Share(t, s).fits for t, s in zip(used, stages, strict=True))

    low, high = 0, spec.max_context  # fits(low) holds, or nothing fits
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _split(
    spec: ModelSpec, sizes: Mapping[str, int], w: Workload, quantised: _Quantised, targets: Sequence[Target]
) -> tuple[tuple[StagePlan, ...], tuple[Target, ...]]:
    """A stage for each device that gets a layer, and those devices: whole layers in order, see `spread`."""
    n = len(spec.layers)

    def stage(layers: range) -> StagePlan:
        outer = [t for tensors in outer_tensors(spec, layers) for t in tensors]
        return StagePlan(
            layers=layers,
            buffers=_buffers(spec, w, quantised, first=layers.start == 0, last=layers.stop == n),
            weights_bytes=sum(weights[i] for i in layers) + sum(sizes[t.name] for t in outer),
            kv_global_bytes=sum(kv[i] for i in layers if spec.layers[i].kind == "global"),
            kv_sliding_bytes=sum(kv[i] for i in layers if spec.layers[i].kind == "sliding"),
        )

    weights, kv = [0] * n, [0] * n
    for name, n_bytes in sizes.items():
        if name.startswith("layers."):
            weights[layer_of(name)] += n_bytes
    for layer in spec.kv_layers:
        kv[layer.index] = w.layer_bytes(layer)
    if len(targets) < 2:
        return (stage(range(n)),), tuple(targets)
    without_layers = [range(0), *[range(n, 0)] * (len(targets) - 2), range(n, n)]  # of the first, those between, the last
    fixed = [stage(layers).total_bytes for layers in without_layers]
    placed = spread(spec, [a + b for a, b in zip(weights, kv, strict=True)], fixed, targets, every=True)
    used = [t for t, layers in zip(targets, placed, strict=True) if layers]
    if 0 < len(used) < len(targets):  # where it does not fit, all of them are in the plan that says so
        fewer = _split(spec, sizes, w, quantised, used)
        if all(Share(t, s).fits for s, t in zip(*fewer, strict=True)):
            return fewer
    ranges = [range(p[0], p[-1] + 1) if p else none for p, none in zip(placed, without_layers, strict=True)]
    return tuple(map(stage, ranges)), tuple(targets)


def fewest(targets: Sequence[Target], plan_on: Callable[[Sequence[int]], Plan]) -> tuple[Plan, Sequence[int]]:
    """The plan on the first device that holds it, else on the fewest, the roomiest first; on all where it does not fit.

    Args:
        plan_on: the plan for some of `targets`, by their indices in order.
    """
    by_room = sorted(range(len(targets)), key=lambda i: -targets[i].usable_bytes)
    tries = [[i] for i in range(len(targets))] + [sorted(by_room[:n]) for n in range(2, len(targets) + 1)]
    for some in tries[:-1]:
        if (p := plan_on(some)).fits:
            return p, some
    return plan_on(tries[-1]), tries[-1]


def spread(
    spec: ModelSpec, layer_bytes: Sequence[int], fixed: Sequence[int], targets: Sequence[Target], *, every: bool = False
) -> list[list[int]]:
    """The layers of each device, in order, every device filled to the same fraction of what it can use.

    Where they do not fit, each device but the last takes what it holds, and the last the rest.

    Args:
        layer_bytes: of each layer, weights and cache.
        fixed: what each device holds beside its layers.
        every: no device without a layer, where they fit so.
    """
    runs = _runs(spec)
    for each in (True, False) if every else (False,):
        if _place(runs, layer_bytes, fixed, targets, 2**20, each) is None:
            continue
        low, high = 0, 2**20  # fraction of usable bytes, in 2**-20; the smallest that places every layer
        while low < high:
            middle = (low + high) // 2
            if _place(runs, layer_bytes, fixed, targets, middle, each) is None:
                low = middle + 1
            else:
                high = middle
        return _place(runs, layer_bytes, fixed, targets, high, each) or []
    return _place(runs, layer_bytes, fixed, targets, None, False) or []


def _runs(spec: ModelSpec) -> list[tuple[int, ...]]:
    """Layers that must stay together: everything from a cache's owner to the last layer that reads it."""
    last_reader = {layer.index: layer.index for layer in spec.layers}
    for layer in spec.layers:
        if layer.kv_source is not None:
            last_reader[layer.kv_source] = layer.index
    runs: list[tuple[int, ...]] = []
    start = 0
    while start < len(spec.layers):
        stop = start
        i = start
        while i <= stop:
            stop = max(stop, last_reader[i])
            i += 1
        runs.append(tuple(range(start, stop + 1)))
        start = stop + 1
    return runs


def _place(
    runs: Sequence[tuple[int, ...]],
    layer_bytes: Sequence[int],
    fixed: Sequence[int],
    targets: Sequence[Target],
    fraction: int | None,
    every: bool,
) -> list[list[int]] | None:
    """Fills the devices in order up to `fraction` (2**-20) of usable; None where layers are left. No fraction: all go.

    Args:
        every: each device takes a run at least; None where one cannot.
    """
    placed: list[list[int]] = [[] for _ in targets]
    device, used = 0, fixed[0]
    for at, run in enumerate(runs):
        need = sum(layer_bytes[i] for i in run)
        if every and placed[device] and len(runs) - at < len(targets) - device:  # the devices after it take one each
            device += 1
            used = fixed[device]
        while fraction is not None and used + need > targets[device].usable_bytes * fraction >> 20:
            if every and not placed[device]:
                return None
            device += 1
            if device == len(targets):
                return None
            used = fixed[device]
        if fraction is None and device + 1 < len(targets) and used + need > targets[device].usable_bytes:
            device += 1
            used = fixed[device]
        placed[device] += run
        used += need
    if fraction is not None:  # a device with no layers still holds its fixed part
        ends = (fixed[i] <= t.usable_bytes * fraction >> 20 for i, t in enumerate(targets))
        return placed if all(ends) and (all(placed) or not every) else None
    return placed
