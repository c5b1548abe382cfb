"""What a KV type costs in quality: next-token distributions against an f32 cache, and the output of one attention layer.

    python benchmarks/kv_quality.py [--tokens 4096] [OUT.json]

**Whole model.** tiny-hybrid in fp32 on the CPU reads the four modules of the standard library that its training left out
(tools/tiny_hybrid/corpus.py, HELD_OUT_MODULES), each up to `--tokens` tokens. At every position the distribution of the next
token is held to that of the f32 cache: KL divergence in nats (mean, 99th percentile) and how often the likeliest token is the
same. KV types of the engine run in the engine. What it lacks (rotation before 4 bits, other types for K than for V, V stored alone)
is simulated: an f32 cache to which every value goes through the type and back. That the two ways agree is checked first.

**K=V.** The same model with K and V of its global layers stored apart: the same projection twice.

**Layers of Gemma 4 31B's shapes.** Random: V = norm(u), K = RoPE(w * norm(u')) with u' = u in a global layer, q alike. Real
checkpoints were not at hand; three kinds of u and w stand for what is reported of them. plain: Gaussian, w = 1. keys: one channel
in 64 of w is 8 (the outliers of keys that stay in their channel, KIVI, arXiv 2402.02750). both: one channel in 64 of u is 8
times the others, so that K and V have outliers. Channels are drawn for each KV head. Scores are scaled to a standard deviation of
2. Attention in fp64 over values that went through the type; the error is ||o - o'|| / ||o||.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import about
import torch
from torch import Tensor

from headwise import LLM
from headwise.attention.capability import CPU
from headwise.attention.choose import choose_layers
from headwise.attention.reference import attend, visible
from headwise.cache.storage import Values
from headwise.engine.runner import Runner
from headwise.engine.stage import Stage
from headwise.model import heads as decoder_heads
from headwise.planner.memory import plan
from headwise.spec.kv import KV_FORMATS, kv_format

MODULES = ("calendar", "statistics", "ipaddress", "shlex")
TYPES = ("bf16", "f16", "fp8", "q8_0", "q4_0")
ROTATIONS = (32, 128)  # values that one Hadamard matrix mixes
CHUNK = 512
SEEDS = 3
Store = Callable[[Tensor], Tensor]


def hadamard(n: int) -> Tensor:
    """Sylvester's matrix over sqrt(n): symmetric, its own inverse."""
    h = torch.ones(1, 1)
    while h.shape[0] < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h / math.sqrt(n)


def through(kind: str, rotate: int = 1) -> Store:
    """Values as a cache of type `kind` gives them back; rotated before and after in runs of `rotate`."""
    fmt, h = KV_FORMATS[kind], hadamard(rotate)

    def turned(x: Tensor) -> Tensor:
        return (x.unflatten(-1, (-1, rotate)) @ h.to(x.dtype)).flatten(-2) if rotate > 1 else x

    def store(x: Tensor) -> Tensor:
        x = turned(x.float()).contiguous()
        values = Values(x.shape[0], x.shape[1], x.shape[2], fmt, x.device)
        values.write(0, x, torch.empty_like(x))
        return turned(values.read(0, x.shape[0], torch.empty_like(x)))

    return store


def runner_of(llm: LLM, *, kv: dict[str, str], apart: bool = False) -> Runner:
    """A sequence over the weights of `llm` with other KV types; `apart` stores K and V of K=V layers in two tensors."""
    spec, stored, weights = llm.spec, dict(llm.plan.stored), dict(llm.runner.stages[0].weights)
    if apart:
        spec = replace(spec, layers=tuple(replace(x, k_eq_v=False, v_norm=True) if x.k_eq_v else x for x in spec.layers))
        for x in llm.spec.layers:
            if x.k_eq_v:
                at = f"layers.{x.index}."
                stored[f"{at}v"], weights[f"{at}v"] = stored[f"{at}k"], weights[f"{at}k"]
                weights[f"{at}qkv"] = torch.cat([weights[f"{at}{n}"] for n in "qkv"])  # type: ignore[arg-type]
    formats = {kind: kv_format(kv.get(kind, "f32")) for kind in ("global", "sliding")}
    workload = replace(llm.plan.workload, kv=formats)
    choices = choose_layers(spec, kv=formats, dtype="f32", device=CPU)  # type: ignore[arg-type]
    p = plan(spec, stored, workload)
    return Runner(p, [Stage(p, 0, choices, weights, torch.device("cpu"))])


def simulate(runner: Runner, k: Store, v: Store, *, kinds: Sequence[str] = ("global", "sliding")) -> Runner:
    """Sends what is written to the f32 caches of `kinds` through `k` and `v`; one tensor for both goes through `k`."""
    for index, cache in runner.caches.items():
        if runner.spec.layers[index].kind in kinds:
            for values, store in ((cache.k, k), (cache.v, v)):
                if values is not None:
                    values.write = _between(values.write, store)  # type: ignore[method-assign]
    return runner


def _between(write: Callable[..., None], store: Store) -> Callable[..., None]:
    return lambda start, x, scratch: write(start, store(x), scratch)


def v_alone(runner: Runner, store: Store) -> Runner:
    """K=V layers that store V only: K's rotated dims come from the stored V, as a kernel that rotates would make them."""
    one, mine = decoder_heads._store_one, {id(cache) for cache in runner.caches.values()}

    def store_one(shape: Any, w: Any, cache: Any, step: Any, v: Tensor) -> None:
        one(shape, w, cache, step, store(v) if id(cache) in mine else v)

    decoder_heads._store_one = store_one
    return runner


def logits_of(runner: Runner, ids: Sequence[int]) -> Tensor:
    out = torch.empty(len(ids), runner.spec.vocab_size)
    runner.reset()
    for start in range(0, len(ids), CHUNK):
        x = runner.step(ids[start : start + CHUNK])
        runner.logits(x, out=out[start : start + CHUNK])
    return out


def compare(base: Tensor, other: Tensor, ids: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """KL(base || other) in nats, whether the likeliest token is the same, and -log p of the true next token; by position."""
    kl, nll = [], []
    for start in range(0, len(ids), 512):
        p, q = (x[start : start + 512].double().log_softmax(-1) for x in (base, other))
        kl.append((p.exp() * (p - q)).sum(-1))
        nll.append(-q[: len(ids) - 1 - start].gather(1, torch.tensor(ids[start + 1 : start + 513])[:, None])[:, 0])
    return torch.cat(kl), base.argmax(-1) == other.argmax(-1), torch.cat(nll)


def model_part(n_tokens: int) -> dict[str, Any]:
    llm = LLM(device="cpu", context=n_tokens, chunk=CHUNK)
    texts = {name: llm.tokenize(inspect.getsource(import_module(name)))[:n_tokens] for name in MODULES}
    base = {name: logits_of(runner_of(llm, kv={}), ids) for name, ids in texts.items()}

    def measured(runner: Runner, **what: object) -> dict[str, object]:
        parts = {name: compare(base[name], logits_of(runner, ids), ids) for name, ids in texts.items()}
        kl, same, nll = (torch.cat(x) for x in zip(*parts.values(), strict=True))
        row = what | {
            "kl_mean": float(kl.mean()), "kl_p99": float(kl.quantile(0.99)), "top1": float(same.double().mean()),
            "nll": float(nll.mean()), "kl_mean_by_file": {name: float(p[0].mean()) for name, p in parts.items()},
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        return row

    ids = texts["shlex"]
    ours = logits_of(runner_of(llm, kv={"global": "q4_0", "sliding": "q4_0"}), ids)
    again = logits_of(simulate(runner_of(llm, kv={}), through("q4_0"), through("q4_0")), ids)
    # later chunks sum their tiles in another order, and a value that then rounds to the other nibble is a visible difference
    torch.testing.assert_close(again[:CHUNK], ours[:CHUNK], rtol=0, atol=1e-3)

    types = [measured(runner_of(llm, kv={}), sliding="f32", **{"global": "f32"})]
    for kinds in (("global",), ("sliding",), ("global", "sliding")):
        for t in TYPES:
            kv = dict.fromkeys(kinds, t)
            types.append(measured(runner_of(llm, kv=kv), **({"global": "f32", "sliding": "f32"} | kv)))  # type: ignore[arg-type]
        for n in ROTATIONS:
            store = through("q4_0", n)
            named = dict.fromkeys(kinds, f"q4_0, rotated by {n}")
            runner = simulate(runner_of(llm, kv={}), store, store, kinds=kinds)
            types.append(measured(runner, **({"global": "f32", "sliding": "f32"} | named)))  # type: ignore[arg-type]

    glob = next(x for x in llm.spec.layers if x.k_eq_v)
    dims, tail = glob.head_dim, glob.rope.rotated_dims if glob.rope else 0

    def row_bytes(kind: str, n: int) -> int:
        return KV_FORMATS[kind].row_bytes(n)

    one = []
    for t in ("f32", "bf16", "q8_0", "q4_0"):
        one.append(measured(runner_of(llm, kv={"global": t}), store="one tensor", k=t, v=t, bytes=row_bytes(t, dims + tail)))
        apart = runner_of(llm, kv={"global": t}, apart=True)
        one.append(measured(apart, store="two tensors", k=t, v=t, bytes=2 * row_bytes(t, dims)))
        if t in ("q8_0", "q4_0"):
            alone = v_alone(runner_of(llm, kv={}), through(t))
            one.append(measured(alone, store="V alone (simulated)", k=t, v=t, bytes=row_bytes(t, dims)))
    for k, v in (("q8_0", "q4_0"), ("q4_0", "q8_0"), ("q4_0", "f32"), ("f32", "q4_0")):
        runner = simulate(runner_of(llm, kv={}, apart=True), through(k), through(v), kinds=("global",))
        n = row_bytes(k, dims) + row_bytes(v, dims)
        one.append(measured(runner, store="two tensors (simulated)", k=k, v=v, bytes=n))
    apart32 = logits_of(runner_of(llm, kv={}, apart=True), ids)
    return {
        "files": {name: len(ids) for name, ids in texts.items()},
        "types": types,
        "one_tensor": one,
        "one_tensor_largest_logit_difference_f32": float((apart32 - base["shlex"]).abs().max()),
    }


def rope_tables(n: int, pairs: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the first `pairs` of head_dim / 2 pairs, (n, pairs)."""
    angles = torch.arange(n)[:, None].double() * theta ** (-2 * torch.arange(pairs).double() / head_dim)[None]
    return angles.cos(), angles.sin()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of (n, heads, D): pairs (i, i + D / 2)."""
    half, pairs = x.shape[-1] // 2, cos.shape[-1]
    out, a, b = x.clone(), x[..., :pairs], x[..., half : half + pairs]
    out[..., :pairs] = a * cos[:, None] - b * sin[:, None]
    out[..., half : half + pairs] = b * cos[:, None] + a * sin[:, None]
    return out


def normed(x: Tensor) -> Tensor:
    return x * x.square().mean(-1, keepdim=True).rsqrt()


def layer_part() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    shapes = (("global", 32, 4, 512, None, 4096, 64, 1e6), ("sliding", 32, 16, 256, 1024, 1024 + 15, 128, 1e4))
    for name, heads, kv_heads, dim, window, n, pairs, theta in shapes:
        for kind in ("plain", "keys", "both"):
            errors: dict[tuple[str, str], list[float]] = {}
            keys_seen = []
            for seed in range(SEEDS):
                case = random_layer(kind, heads, kv_heads, dim, n, pairs, theta, one=window is None, seed=seed)
                q, k, v, w, cos, sin = case
                seen = visible(torch.arange(n - 16, n), torch.arange(n), window)
                raw = torch.einsum("tgrd,sgd->tgrs", q.unflatten(1, (kv_heads, -1)), k)
                scale = float(2 / raw.masked_select(seen[:, None, None]).std())
                want, lse = attend(q, k, v, seen, scale=scale)
                p = (raw.flatten(1, 2) * scale - lse[..., None]).masked_fill(~seen[:, None], float("-inf"))
                keys_seen.append(float((-(p.exp() * p.nan_to_num(neginf=0.0)).sum(-1)).exp().mean()))
                for t in TYPES:
                    for turned in (1, *ROTATIONS) if t in ("q8_0", "q4_0") else (1,):
                        s = through(t, turned)
                        label = t if turned == 1 else f"{t}, rotated by {turned}"
                        stores = {"two tensors": (s(k), s(v))}
                        if window is None:
                            half = dim // 2
                            tail = s(torch.cat((k[..., :pairs], k[..., half : half + pairs]), -1)).double()
                            kept = s(v).double()
                            keys = kept * w
                            keys[..., :pairs], keys[..., half : half + pairs] = tail[..., :pairs], tail[..., pairs:]
                            stores |= {"one tensor": (keys, kept), "V alone": (turn(kept * w, cos, sin), kept)}
                        for store, (ks, vs) in stores.items():
                            got, _ = attend(q, ks.double(), vs.double(), seen, scale=scale)
                            errors.setdefault((store, label), []).append(float((got - want).norm() / want.norm()))
            for (store, label), found in errors.items():
                row = {"layer": name, "data": kind, "store": store, "kv": label, "error": sum(found) / SEEDS,
                       "bytes": row_bytes_of(store, label.split(",")[0], dim, 2 * pairs),
                       "keys_attended": sum(keys_seen) / SEEDS}  # fmt: skip
                print(json.dumps(row), flush=True)
                rows.append(row)
    return rows


def row_bytes_of(store: str, kind: str, dim: int, rotated: int) -> int:
    """Of one token and KV head."""
    values = {"two tensors": 2 * dim, "one tensor": dim + rotated, "V alone": dim}[store]
    return KV_FORMATS[kind].row_bytes(values)


def random_layer(
    kind: str, heads: int, kv_heads: int, dim: int, n: int, pairs: int, theta: float, *, one: bool, seed: int
) -> tuple[Tensor, ...]:
    """q of the last 16 tokens, k, v, w, cosines, sines; fp64."""
    g = torch.Generator().manual_seed(seed)

    def gains() -> Tensor:
        out = torch.ones(kv_heads, dim, dtype=torch.float64)
        for head in range(kv_heads):
            out[head, torch.randperm(dim, generator=g)[: dim // 64]] = 8.0
        return out

    plain = torch.ones(kv_heads, dim, dtype=torch.float64)
    gain, w = gains() if kind == "both" else plain, gains() if kind == "keys" else plain
    u, other = (normed(torch.randn(n, kv_heads, dim, generator=g).double() * gain) for _ in range(2))
    cos, sin = rope_tables(n, pairs, dim, theta)
    q = turn(torch.randn(16, heads, dim, generator=g).double(), cos[-16:], sin[-16:])
    return q, turn((u if one else other) * w, cos, sin), u, w, cos, sin


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096, help="of each file, at most")
    parser.add_argument("out", nargs="?")
    args = parser.parse_args()
    commit = about.commit()
    head = {"date": time.strftime("%Y-%m-%d"), "commit": commit, "torch": torch.__version__, "python": platform.python_version(),
            "seeds": SEEDS}  # fmt: skip
    result = head | {"layers": layer_part()} | model_part(args.tokens)
    print(json.dumps(result))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
