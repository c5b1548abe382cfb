"""Compiles every row of the table for its cards; a JSON line each. A program of its own: it stands in for the driver.

    python -m kernels.compile_rows        each configuration once: its cards and quantised types take turns, as CI has time for
    python -m kernels.compile_rows all    for each of its cards and types
"""

from __future__ import annotations

import json
import sys
from itertools import product

import torch
from kernels.compiling import Compiled

import headwise.kernels.attend as portable
from headwise.kernels.configs import CROSSED, TABLE, Config, Row
from headwise.kernels.stored import Sequences, Slots, Stored
from headwise.kernels.turn import Turn

CARDS = {"ampere": (80, 86, 89), "hopper": (90,), "rdna3": ("gfx1100",)}
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, "gfx1100": 64 * 1024}
LEAST = SHARED | {80: SHARED[86]}  # a row is one for all cards of its architecture
BLOCKS = {"q8_0": (torch.int8, 1), "q4_0": (torch.uint8, 2)}
STORED = ("fp8", *BLOCKS)


def ints(*x: int) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.int32)


def cache(width: int, kv: str) -> Stored:
    if kv == "bf16":
        return Stored(torch.empty(1024, 4, width, dtype=torch.bfloat16))
    if kv == "fp8":
        return Stored(torch.empty(1024, 4, width, dtype=torch.float8_e4m3fn))
    kind, packed = BLOCKS[kv]
    return Stored(torch.empty(1024, 4, width // packed, dtype=kind), torch.empty(1024, 4, width // 32, dtype=torch.float16))


def compile_one(
    kernel: object, capability: int | str, phase: str, D: int, one: bool, kv: str, config: Config, turned: bool
) -> dict[str, object]:
    compiled = Compiled(kernel, capability)
    portable._attend, portable.merge = compiled, lambda *args, **options: None
    E, T = D + 128 * one, 1 if phase == "decode" else 128
    q, out = torch.empty(T, 32, E, dtype=torch.bfloat16), torch.empty(T, 32, D, dtype=torch.bfloat16)
    k, v = cache(D if turned else E, kv), None if one else cache(D, kv)
    turn = Turn(torch.empty(D, dtype=torch.bfloat16), torch.empty(64)) if turned else None
    portable.attend(
        q, k, v, out, Sequences(ints(0, T), ints(512), T, 512), Slots(ints(0)), scale=1.0, n_splits=4 if phase == "decode" else 1,
        scratch=torch.empty(10**6), config=config, turn=turn,
    )  # fmt: skip
    r = compiled.reports[0]
    return {
        "card": capability, "phase": phase, "head_dim": D, "one": one, "turned": turned, "kv": kv, "config": str(config),
        "registers": r.registers, "spill_bytes": r.spill_bytes, "shared_bytes": r.shared_bytes, "shared_limit": LEAST[capability],
        "wmma": "v_wmma" in r.ptx,
    }  # fmt: skip


def config(row: Row, kv: str, turned: bool) -> Config:
    return row.floats if kv == "bf16" else row.turned or row.blocks if turned else row.blocks


def hopper(capability: int = 90) -> list[dict[str, object]]:
    """The Gluon kernels, in the shapes of Gemma 4, Llama and gpt-oss."""
    import headwise.kernels.attend_hopper as prefill
    import headwise.kernels.attend_packed as bytes_prefill
    import headwise.kernels.decode_hopper as decode
    import headwise.kernels.decode_packed as packed
    from headwise.attention.own_kernels import packed_takes

    out = []

    def compiled(module: object, name: str, launch: object, label: str) -> None:
        original = getattr(module, name)
        stand_in = Compiled(original, capability)
        setattr(module, name, stand_in)
        launch()  # type: ignore[operator]
        setattr(module, name, original)
        r = stand_in.reports[0]
        out.append({"kernel": label, "registers": r.registers, "spill_bytes": r.spill_bytes, "shared_bytes": r.shared_bytes,
                    "wgmma": "wgmma.mma_async" in r.ptx})  # fmt: skip

    decode.merge = packed.merge = lambda *args, **options: None
    seqs, flat = Sequences(ints(0, 128), ints(512), 128, 512), Slots(ints(0))

    def tensors(H: int, E: int, D: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty(T, H, E, dtype=torch.bfloat16), torch.empty(T, H, D, dtype=torch.bfloat16)

    q, o = tensors(32, 640, 512, 128)
    compiled(prefill, "_one512", lambda: prefill.attend_one512(q, cache(640, "bf16"), o, seqs, flat, scale=1.0), "one tensor, 512")
    pair, k512 = tensors(32, 512, 512, 128), cache(512, "bf16")
    compiled(prefill, "_pair512", lambda: prefill.attend_pair512(pair[0], k512, k512, pair[1], seqs, flat, scale=1.0), "pair, 512")
    for kv, (label, E) in product(STORED, (("one tensor", 640), ("pair", 512))):
        (q2, o2), k, v = tensors(32, E, 512, 128), cache(E, kv), cache(512, kv) if E == 512 else None
        compiled(bytes_prefill, "_attend", lambda q=q2, o=o2, k=k, v=v: bytes_prefill.attend_packed(
            q, k, v, o, seqs, flat, scale=1.0), f"{label}, 512, {kv}")  # fmt: skip
    for kv, D, (window, ring) in product(STORED, (64, 128, 256), ((1024, 1600), (None, 0))):
        (q2, o2), k, slots = tensors(32, D, D, 128), cache(D, kv), Slots(ints(0), ring)
        compiled(bytes_prefill, "_two", lambda q=q2, o=o2, k=k, s=slots, w=window: bytes_prefill.attend_packed_two(
            q, k, k, o, seqs, s, scale=1.0, window=w), f"two tensors, {D}, {kv}, window {window}")  # fmt: skip
    for D, window, ring in ((64, 128, 700), (128, 4096, 5000), (128, None, 0), (256, 1024, 1600), (256, None, 0)):
        q2, o2 = tensors(32, D, D, 128)
        k, slots = cache(D, "bf16"), Slots(ints(0), ring)
        compiled(prefill, "_two", lambda q=q2, o=o2, k=k, s=slots, w=window: prefill.attend_two(q, k, k, o, seqs, s, scale=1.0,
        window=w),
                 f"two tensors, {D}, window {window}")  # fmt: skip
    scratch = torch.empty(10**6)
    shapes = (
        (512, True, None, 1), (512, True, None, 2), (512, False, None, 1), (256, False, 1024, 1), (128, False, None, 1),
        (64, False, 128, 1),
    )  # fmt: skip
    of_v = Turn(torch.empty(512, dtype=torch.bfloat16), torch.empty(64))
    for T in (1, 2):
        q1, o1 = tensors(32, 640, 512, T)
        few = Sequences(ints(0, T), ints(512), T, 512)
        compiled(decode, "_decode", lambda q=q1, o=o1, k=k512, f=few: decode.attend_decode(
            q, k, None, o, f, flat, scale=1.0, n_splits=4, scratch=scratch, turn=of_v), f"decode, V alone, {8 * T}")  # fmt: skip
    for H, n in ((8, 6), (16, 12), (16, 99)):  # the last program merges: all shares at once, or row by row
        qm, om = tensors(H, 256, 256, 1)
        few, k, zeros = Sequences(ints(0, 1), ints(512), 1, 512), cache(256, "bf16"), ints(0, 0, 0, 0)
        compiled(decode, "_decode", lambda q=qm, o=om, k=k, f=few, n=n, c=zeros: decode.attend_decode(
            q, k, k, o, f, flat, scale=1.0, n_splits=n, scratch=scratch, count=c), f"decode, merges {n}")  # fmt: skip
    for D, one, window, T in shapes:
        for kv in ("bf16", *STORED):
            E = D + 128 * one
            q1, o1 = tensors(32, E, D, T)
            k, v, slots = cache(E, kv), None if one else cache(D, kv), Slots(ints(0), 1600 if window else 0)
            if (not one and D == 512) if kv == "bf16" else not packed_takes(D, 8 * T):
                continue  # the portable kernel's
            module, run = (decode, decode.attend_decode) if kv == "bf16" else (packed, packed.attend_packed)
            few = Sequences(ints(0, T), ints(512), T, 512)
            compiled(module, "_decode", lambda r=run, q=q1, o=o1, k=k, v=v, f=few, s=slots, w=window: r(
                q, k, v, o, f, s, scale=1.0, window=w, n_splits=4, scratch=scratch), f"decode, {D}, {kv}, {8 * T}")  # fmt: skip
    return out


def crossed(every: bool = False) -> list[dict[str, object]]:
    """The Gluon kernel of `mma.sync`, and how many products a warp has of a tile beside how many it needs."""
    import headwise.kernels.attend_mma as mma

    kernel, out = mma._attend, []
    jobs = [
        (card, arch, D, R, kv, how)
        for i, ((arch, D, R, floats), how) in enumerate(CROSSED.items())
        for j, kv in enumerate(("bf16",) if floats else STORED)
        for n, card in enumerate(CARDS[arch])
        if every or floats or (i + j) % 3 == n
    ]
    for card, arch, D, R, kv, how in jobs:
        compiled = Compiled(kernel, card)
        mma._attend = compiled  # type: ignore[assignment]
        q, o = torch.empty(128, 32, D + R, dtype=torch.bfloat16), torch.empty(128, 32, D, dtype=torch.bfloat16)
        seqs, k = Sequences(ints(0, 128), ints(512), 128, 512), cache(D + R, kv)
        mma.attend_mma(q, k, None if R else k, o, seqs, Slots(ints(0)), how, scale=1.0)
        r = compiled.reports[0]
        out.append({"crossed": [arch, D, R, kv == "bf16"], "card": card, "kv": kv, "registers": r.registers,
                    "spill_bytes": r.spill_bytes, "shared_bytes": r.shared_bytes, "shared_limit": LEAST[card],
                    "products": r.ptx.count("mma.sync"),
                    "needed": how.rows * how.keys * (2 * D + R) // (16 * 8 * 16) // 8})  # fmt: skip
    mma._attend = kernel
    return out


def main(every: bool) -> None:
    kernel = portable._attend
    rows = [(arch, *row) for arch, rows in TABLE.items() for row in rows.items()]
    jobs = [
        (card, phase, D, one, kv, config(row, kv, turned), turned)
        for i, (arch, (phase, D, one), row) in enumerate(rows)
        for turned in ((False, True) if one else (False,))
        for j, card in enumerate(CARDS[arch])
        for k, kv in enumerate(("bf16", *STORED))
        if every or ((i + bool(k)) % len(CARDS[arch]) == j and k in (0, 1 + (i + turned) % 3))
    ]
    for found in hopper():
        print(json.dumps(found | {"shared_limit": SHARED[90]}), flush=True)
    for found in crossed(every):
        print(json.dumps(found), flush=True)
    for job in jobs:
        print(json.dumps(compile_one(kernel, *job)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] == ["all"])
