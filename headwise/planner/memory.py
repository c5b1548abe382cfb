"""Does it fit, where, and how far: the plan that `run` allocates by, before a single tensor is read.

Weights by `residence`, KV by `spec.kv`, compute by `workspace`: the same functions size the allocations, so planned bytes
are allocated bytes. All arithmetic is on exact integers; nothing is allocated to find out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from headwise.errors import PlanError, UsageError
from headwise.hardware.gpus import Gpu
from headwise.planner.residence import FLOAT_TYPES, multiplied, planed, resident_types, weight_bytes
from headwise.planner.workspace import Buffer, arena_bytes, workspace
from headwise.spec.kv import KVFormat, check_format, kv_bytes
from headwise.spec.layers import Kind, ModelSpec
from headwise.spec.tensors import weight_tensors

MIB = 2**20
GPU_MARGIN_BYTES = 768 * MIB  # driver context, cuBLAS workspace and allocator rounding of one process on one GPU
CPU_MARGIN_BYTES = 512 * MIB  # the Python process with PyTorch loaded
DEFAULT_CHUNK = 512
MAX_TOKENS = 2**63 - 1


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the model is to hold at once."""

    context: int  # tokens of prompt and answer of one sequence
    slots: int = 1  # sequences at once, each with its own context
    chunk: int = DEFAULT_CHUNK  # most tokens of one prefill step
    kv: Mapping[Kind, KVFormat]
    dtype: str  # of the activations
    cpu: bool = False
    reads: frozenset[str] = frozenset({"tiles"})  # what the layers' backends need beside the cache, see `workspace`

    @property
    def fused(self) -> bool:
        """Whether every layer reads its cache by slots: then our kernels also do what stands between the products."""
        return self.reads == {"slots"}

    def at(self, context: int) -> Workload:
        """This work with another context; a prefill step is never longer than that."""
        return replace(self, context=context, chunk=min(self.chunk, context))


@dataclass(frozen=True, slots=True)
class Share:
    """What one device gets."""

    target: Target
    planned_bytes: int
    layers: tuple[int, ...]

    @property
    def fits(self) -> bool:
        return self.planned_bytes <= self.target.usable_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Labelled bytes. `fits` is None where no device is known; `max_context` then too."""

    spec: ModelSpec
    workload: Workload
    stored: Mapping[str, str]
    resident: Mapping[str, str]
    buffers: tuple[Buffer, ...]
    weights_bytes: int
    kv_global_bytes: int
    kv_sliding_bytes: int
    compute_bytes: int
    shares: tuple[Share, ...] = ()
    fits: bool | None = None
    max_context: int | None = None
    notes: tuple[str, ...] = field(default=())

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
    for name, value, most in (("context", w.context, MAX_TOKENS), ("slots", w.slots, 2**31), ("ubatch", w.chunk, 2**31)):
        if not 1 <= value <= most:
            raise UsageError(
                f"--{name} {value} makes no sense", why=f"it must lie from 1 to {most}", do=f"--{name} {min(4096, most)}"
            )
    if limit and w.context > spec.max_context:
        raise PlanError(
            f"{w.context} tokens are more than {spec.name} can attend to",
            why=f"its config says {spec.max_context}",
            do=f"--context {spec.max_context}",
        )
    for layer in spec.kv_layers:
        check_format(layer, w.kv[layer.kind])


def kv_total(spec: ModelSpec, w: Workload, kind: Kind) -> int:
    return w.slots * sum(
        kv_bytes(layer, n_tokens=w.context, chunk=w.chunk, fmt=w.kv[kind]) for layer in spec.kv_layers if layer.kind == kind
    )


def plan(spec: ModelSpec, stored: Mapping[str, str], w: Workload, targets: Sequence[Target] = ()) -> Plan:
    """The plan for `w` on `targets`.

    Args:
        stored: our tensor name -> the type its weights are stored in (`quantise.weight_types`, `weights.names`).
    Raises:
        UsageError, PlanError: a number that makes no sense, a context beyond the model's maximum, a KV type that does
            not fit a head. Not fitting is no error: `fits` says so.
    """
    check_workload(spec, w)
    asked, w = w, w.at(w.context)
    resident = resident_types(spec, stored, cpu=w.cpu, dtype=w.dtype)
    sizes = weight_bytes(spec, resident)
    quantised = _quantised(spec, w, resident)
    buffers = _buffers(spec, w, quantised)
    shares, notes = _split(spec, sizes, w, quantised, targets)
    return Plan(
        spec=spec,
        workload=w,
        stored=stored,
        resident=resident,
        buffers=buffers,
        weights_bytes=sum(sizes.values()),
        kv_global_bytes=kv_total(spec, w, "global"),
        kv_sliding_bytes=kv_total(spec, w, "sliding"),
        compute_bytes=arena_bytes(buffers),
        shares=shares,
        fits=all(s.fits for s in shares) if shares else None,
        max_context=max_context(spec, sizes, asked, resident, targets) if targets else None,
        notes=notes,
    )


class _Quantised(NamedTuple):
    """What the products with weights that stay quantised need of `workspace`; the same for every context."""

    block_weights: bool
    plane_values: int
    plain_experts: bool
    fused_experts: bool


def _quantised(spec: ModelSpec, w: Workload, resident: Mapping[str, str]) -> _Quantised:
    planes = planed(spec, resident) if w.fused else frozenset()
    fused = multiplied(spec, resident) if w.fused else frozenset()
    with_experts = {layer.index for layer in spec.layers if layer.mlp.moe}
    return _Quantised(
        block_weights=any(t not in FLOAT_TYPES for name, t in resident.items() if name not in planes),
        plane_values=max((t.n_elements for t in weight_tensors(spec) if t.name in planes and t.role != "table"), default=0),
        plain_experts=not with_experts <= fused,
        fused_experts=bool(fused),
    )


def _buffers(spec: ModelSpec, w: Workload, quantised: _Quantised) -> tuple[Buffer, ...]:
    return workspace(
        spec,
        n_tokens=w.context,
        chunk=w.chunk,
        dtype=w.dtype,
        kv=w.kv,
        cpu=w.cpu,
        reads=w.reads,
        **quantised._asdict(),
    )


def max_context(
    spec: ModelSpec, sizes: Mapping[str, int], w: Workload, resident: Mapping[str, str], targets: Sequence[Target]
) -> int:
    """The largest context, up to the model's own, that fits `targets`; 0 where not even one token does."""

    quantised = _quantised(spec, w, resident)

    def fits(context: int) -> bool:
        shares, _ = _split(spec, sizes, w.at(context), quantised, targets)
        return all(s.fits for s in shares)

    low, high = 0, spec.max_context  # fits(low) holds, or nothing fits
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _split(
    spec: ModelSpec, sizes: Mapping[str, int], w: Workload, quantised: _Quantised, targets: Sequence[Target]
) -> tuple[tuple[Share, ...], tuple[str, ...]]:
    """Whole layers in order over the devices, each filled to the same fraction of what it can use."""
    if not targets:
        return (), ()
    compute = arena_bytes(_buffers(spec, w, quantised))
    layer_bytes = [0] * len(spec.layers)
    outer_first = outer_last = 0
    for name, n in sizes.items():
        if name.startswith("layers."):
            layer_bytes[int(name.split(".")[1])] += n
        elif name in ("norm", "head"):
            outer_last += n
        else:
            outer_first += n
    for layer in spec.kv_layers:
        layer_bytes[layer.index] += w.slots * kv_bytes(layer, n_tokens=w.context, chunk=w.chunk, fmt=w.kv[layer.kind])
    if len(targets) == 1:
        total = compute + outer_first + outer_last + sum(layer_bytes)
        return (Share(targets[0], total, tuple(range(len(spec.layers)))),), ()
    if spec.tied:
        outer_last += sizes["embed"]  # looked up on the first card, multiplied on the last
    fixed = [compute + (outer_first if i == 0 else 0) + (outer_last if i == len(targets) - 1 else 0) for i in range(len(targets))]
    placed = spread(spec, layer_bytes, fixed, targets)
    shares = tuple(Share(t, fixed[i] + sum(layer_bytes[n] for n in placed[i]), tuple(placed[i])) for i, t in enumerate(targets))
    return shares, ("several cards are planned here; `headwise run` uses one card until running over several is built",)


def spread(spec: ModelSpec, layer_bytes: Sequence[int], fixed: Sequence[int], targets: Sequence[Target]) -> list[list[int]]:
    """The layers of each device, in order, every device filled to the same fraction of what it can use.

    Where they do not fit, each device but the last takes what it holds, and the last the rest.

    Args:
        layer_bytes: of each layer, weights and cache.
        fixed: what each device holds beside its layers.
    """
    runs = _runs(spec)
    low, high = 0, 2**20  # fraction of usable bytes, in 2**-20; the smallest that places every layer
    if _place(runs, layer_bytes, fixed, targets, high) is None:
        low = high
    while low < high:
        middle = (low + high) // 2
        if _place(runs, layer_bytes, fixed, targets, middle) is None:
            low = middle + 1
        else:
            high = middle
    return _place(runs, layer_bytes, fixed, targets, high) or _place(runs, layer_bytes, fixed, targets, None) or []


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
) -> list[list[int]] | None:
    """Fills the devices in order up to `fraction` (2**-20) of usable; None where layers are left. No fraction: all go."""
    placed: list[list[int]] = [[] for _ in targets]
    device, used = 0, fixed[0]
    for run in runs:
        need = sum(layer_bytes[i] for i in run)
        while fraction is not None and used + need > targets[device].usable_bytes * fraction >> 20:
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
        return placed if all(ends) else None
    return placed
