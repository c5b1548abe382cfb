"""The room itself: spellings that a whole model seldom meets, groups, residence, progress, memory."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
from checkpoints import folder
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file

from headwise.errors import SpecError
from headwise.planner.residence import groups, planed, resident_types
from headwise.spec.gguf import read_gguf
from headwise.spec.gguf_model import spec_from_gguf
from headwise.spec.hf import read_hf
from headwise.spec.layers import ModelSpec
from headwise.spec.tensors import weight_tensors
from headwise.weights.blocks import BlockTensor, Weight, dequantise
from headwise.weights.listing import list_checkpoint
from headwise.weights.load import load_weights
from headwise.weights.names import match, skipped_by_reason, stored_types

Arrays = dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]
F32 = gguf.GGMLQuantizationType.F32


def load(spec: ModelSpec, path: Path, kind: str = "f32", **more: Any) -> dict[str, Weight]:
    return load_weights(spec, path, resident={t.name: kind for t in weight_tensors(spec)}, device="cpu", **more)


def changed(name: str, to: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """A copy of a checkpoint whose tensors went through `change`."""
    to.mkdir()
    shutil.copy(folder(name) / "config.json", to)
    tensors = change(load_file(folder(name) / "model.safetensors"))
    save_file({k: v.contiguous() for k, v in tensors.items()}, to / "model.safetensors")
    return to


def rewritten(source: Path, to: Path, change: Callable[[Arrays], None], *, arch: str | None = None, **more: Any) -> Path:
    """A copy of a GGUF file whose tensors, by name, went through `change`; metadata as it was."""
    reader = gguf.GGUFReader(source)
    old = reader.fields["general.architecture"].contents()
    w = gguf.GGUFWriter(to, arch or old, **more)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            name = re.sub(rf"^{re.escape(old)}\.", f"{arch or old}.", field.name)
            w.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    tensors = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
    change(tensors)
    for name, (data, kind) in tensors.items():
        w.add_tensor(name, data, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return to


def same(a: dict[str, Weight], b: dict[str, Weight]) -> None:
    assert a.keys() == b.keys()
    for name, weight in a.items():
        other = b[name]
        assert isinstance(weight, torch.Tensor) and isinstance(other, torch.Tensor)
        assert torch.equal(weight, other), name


# Hugging Face


def test_experts_in_one_tensor_load_as_experts_one_by_one(tmp_path: Path) -> None:
    """transformers saves Qwen3's experts apart and holds them joined; both are in circulation."""
    held = {k: v for k, v in tiny.model("qwen3-moe").state_dict().items() if not k.endswith("inv_freq")}
    assert "model.layers.0.mlp.experts.gate_up_proj" in held
    joined = changed("qwen3-moe", tmp_path / "joined", lambda _: held)
    spec = read_hf(joined)

    same(load(spec, joined), load(spec, folder("qwen3-moe")))


@pytest.mark.parametrize("kind", ["f32", "mxfp4"])
def test_mxfp4_of_safetensors_is_what_transformers_reads(kind: str, tmp_path: Path) -> None:
    """gpt-oss ships its experts so. Elements 2i and 2i + 1 share a byte there, i and i + 16 in GGUF."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    theirs: dict[str, torch.Tensor] = {}

    def pack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for key in [k for k in tensors if k.endswith(("gate_up_proj", "down_proj"))]:
            e, columns, rows = tensors.pop(key).shape
            blocks = torch.randint(0, 256, (e, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(100, 140, (e, rows, columns // 32), dtype=torch.uint8, generator=generator)
            tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
            theirs[key] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)  # (e, rows, columns)
        return tensors

    path = changed("gpt-oss", tmp_path / "m", pack)
    spec = read_hf(path)
    stored = stored_types(spec, list_checkpoint(path))
    resident = {name: kind if stored[name] == "mxfp4" else "f32" for name in stored}
    weights = load_weights(spec, path, resident=resident, device="cpu")

    assert [name for name in stored if stored[name] == "mxfp4"] == [t.name for t in weight_tensors(spec) if t.role == "experts"]
    for i in range(len(spec.layers)):
        gate_up, down = (theirs[f"model.layers.{i}.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
        for name, expected in (("gate", gate_up[:, ::2]), ("up", gate_up[:, 1::2]), ("down", down)):
            ours = weights[f"layers.{i}.experts_{name}"]
            assert isinstance(ours, BlockTensor) == (kind == "mxfp4")
            floats = dequantise(ours.data, "mxfp4", torch.float32) if isinstance(ours, BlockTensor) else ours
            assert torch.equal(floats, expected)
    if kind == "mxfp4":
        re_tiled_are_the_blocks(spec, path)


def re_tiled_are_the_blocks(spec: ModelSpec, path: Path) -> None:
    """Every weight that our kernels read, loaded as planes and as blocks: the same bytes."""
    from headwise.weights.retile import empty, retile

    resident = resident_types(spec, stored_types(spec, list_checkpoint(path)), cpu=False, dtype="f32")
    together, names = groups(spec, resident), planed(spec, resident)
    blocks = load_weights(spec, path, resident=resident, device="cpu", groups=together)
    ours = load_weights(spec, path, resident=resident, device="cpu", groups=together, planes=names)
    experts = [n for n in names if ".experts_" in n]
    assert len(experts) == 3 * len(spec.layers)
    for name in names:
        held = blocks[name]
        assert isinstance(held, BlockTensor)
        want = empty(held.type, held.shape, "cpu")
        retile(held.data, held.type, want)
        for plane in ("low", "high", "head"):
            a, b = getattr(ours[name], plane), getattr(want, plane)
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), (name, plane)


@pytest.mark.parametrize("quant", ["mxfp4", "q8_0", "q5_0"])
@pytest.mark.parametrize("values", [4 << 20, 2 * 64 * 64, 64 * 16])
def test_experts_are_re_tiled_at_load(quant: str, values: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts several at a time, the last fewer than the others; or one by one, rows at a time."""
    monkeypatch.setattr("headwise.weights.load.RETILED_VALUES", values)
    write_gguf("gpt-oss", tmp_path / "m.gguf", quant=quant)
    header = read_gguf(tmp_path / "m.gguf")

    re_tiled_are_the_blocks(spec_from_gguf(header), tmp_path / "m.gguf")


def test_dead_tensors_are_skipped_and_counted(tmp_path: Path) -> None:
    """Published Gemma 4 E2B holds K, V and k_norm for 20 layers that read another layer's cache."""

    def add(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        dead = {
            f"model.layers.{i}.self_attn.{name}": torch.ones(2, 2)
            for i in range(5, 10)
            for name in ("k_proj.weight", "v_proj.weight", "k_norm.weight")
        }
        other = {name: torch.ones(2) for name in ("lm_head.weight", "model.vision_tower.a.b", "model.layers.0.rotary_emb.inv_freq")}
        return tensors | dead | other

    path = changed("gemma4-e2b", tmp_path / "m", add)
    spec = read_hf(path)

    assert skipped_by_reason(match(spec, list_checkpoint(path))) == {
        "K and V of a layer that shares another's cache": 15,
        "the output projection of a tied model is its embedding": 1,
        "vision": 1,
    }
    same(load(spec, path), load(spec, folder("gemma4-e2b")))


def test_a_v_projection_of_a_layer_whose_k_is_its_v_is_skipped(tmp_path: Path) -> None:
    path = changed("gemma4-31b", tmp_path / "m", lambda t: t | {"model.layers.2.self_attn.v_proj.weight": torch.ones(2)})

    assert skipped_by_reason(match(read_hf(path), list_checkpoint(path))) == {"V of a layer whose K is its V": 1}


def test_a_layer_beyond_the_config_is_refused(tmp_path: Path) -> None:
    """A config that says 4 layers beside weights of 5 would answer with the fifth left out."""
    path = changed("qwen3", tmp_path / "m", lambda t: t | {"model.layers.4.self_attn.q_proj.weight": torch.ones(2, 2)})

    with pytest.raises(SpecError, match=r"model\.layers\.4\.self_attn\.q_proj\.weight"):
        match(read_hf(path), list_checkpoint(path))


def header(entries: dict[str, Any], data: bytes = bytes(64), pad: int = 0) -> bytes:
    text = json.dumps(entries).encode() + b" " * pad
    return struct.pack("<Q", len(text)) + text + data


def f32(*shape: int, at: tuple[int, int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": list(at)}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"a": f32(4, at=(0, 16)), "b": f32(4, at=(12, 28))}, "a and b overlap"),
        ({"a": f32(4, at=(0, 12))}, "12 bytes for shape"),
        ({"a": f32(-4, at=(0, -16))}, "negative"),
        ({"a": f32(32, at=(0, 128))}, "ends at byte"),
        ({"a": {"dtype": "F4"}}, "tensor a"),
        ({"a": [1]}, "tensor a"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(entries: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(header(entries))

    with pytest.raises(SpecError, match=words):
        list_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [({"a": "../m.safetensors"}, "points at"), ({"b": "m.safetensors"}, "lacks the tensor b"), ([1], "index")],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(weight_map: Any, words: str, tmp_path: Path) -> None:
    """A file name out of an index is a path a stranger chose."""
    (tmp_path / "m.safetensors").write_bytes(header({"a": f32(4, at=(0, 16))}))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    with pytest.raises(SpecError, match=words):
        list_checkpoint(tmp_path)


def test_tensors_that_are_not_aligned_load(tmp_path: Path) -> None:
    """Writers pad the header to 8 bytes; the format does not ask for it."""
    whole = (folder("llama") / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    shutil.copytree(folder("llama"), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(
        struct.pack("<Q", size + 3) + whole[8 : 8 + size] + b"   " + whole[8 + size :]
    )
    spec = read_hf(folder("llama"))

    same(load(spec, tmp_path / "m"), load(spec, folder("llama")))


# GGUF


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_gguf_holds_the_tensors_of_its_checkpoint(name: str, tmp_path: Path) -> None:
    """Exact, where logits have a tolerance: every name, permutation and offset, for every family."""
    write_gguf(name, tmp_path / "m.gguf")
    spec = read_hf(folder(name))

    same(load(spec, tmp_path / "m.gguf"), load(spec, folder(name)))


def test_a_split_gguf_loads_as_a_whole_one(tmp_path: Path) -> None:
    write_gguf("qwen3", tmp_path / "m.gguf")
    rewritten(tmp_path / "m.gguf", tmp_path / "s.gguf", lambda _: None, split_max_tensors=17)
    spec = read_hf(folder("qwen3"))

    same(load(spec, tmp_path / "s-00002-of-00003.gguf"), load(spec, tmp_path / "m.gguf"))


def fuse(tensors: Arrays, names: list[str], into: str) -> None:
    parts = [tensors.pop(name) for name in names]
    tensors[into] = (np.concatenate([p[0] for p in parts], axis=-2 if parts[0][0].ndim > 1 else -1), parts[0][1])


@pytest.mark.parametrize(("name", "quant"), [("llama", "f32"), ("qwen3", "q8_0"), ("gpt-oss", "f32"), ("gemma4-e2b", "q4_0")])
def test_fused_q_k_v_load_as_separate_ones(name: str, quant: str, tmp_path: Path) -> None:
    """Also where the file's q and k rows are permuted, biased, or dead."""
    write_gguf(name, tmp_path / "m.gguf", quant=quant)

    def change(tensors: Arrays) -> None:
        for i in range(len(read_hf(folder(name)).layers)):
            for suffix in ("weight", "bias"):
                if f"blk.{i}.attn_k.{suffix}" in tensors:
                    fuse(tensors, [f"blk.{i}.attn_{x}.{suffix}" for x in "qkv"], f"blk.{i}.attn_qkv.{suffix}")

    rewritten(tmp_path / "m.gguf", tmp_path / "fused.gguf", change)
    spec = spec_from_gguf(read_gguf(tmp_path / "m.gguf"))

    assert spec_from_gguf(read_gguf(tmp_path / "fused.gguf")).layers == spec.layers
    same(load(spec, tmp_path / "fused.gguf"), load(spec, tmp_path / "m.gguf"))


@pytest.mark.parametrize("copies", [0, 1])
def test_a_fused_layer_whose_k_is_its_v_loads_its_k(copies: int, tmp_path: Path) -> None:
    write_gguf("gemma4-31b", tmp_path / "m.gguf")
    k = "blk.2.attn_k.weight"

    def change(tensors: Arrays) -> None:
        tensors["v"] = (tensors[k][0].copy(), F32)
        if not copies:
            tensors["v"] = (tensors["v"][0][:0], F32)
        fuse(tensors, ["blk.2.attn_q.weight", k, "v"], "blk.2.attn_qkv.weight")

    rewritten(tmp_path / "m.gguf", tmp_path / "fused.gguf", change)
    spec = read_hf(folder("gemma4-31b"))

    same(load(spec, tmp_path / "fused.gguf"), load(spec, tmp_path / "m.gguf"))


def test_a_fused_layer_whose_v_is_not_its_k_is_refused(tmp_path: Path) -> None:
    """Keeping K alone would lose V without a word."""
    write_gguf("gemma4-31b", tmp_path / "m.gguf")

    def change(tensors: Arrays) -> None:
        v = tensors["blk.2.attn_k.weight"][0].copy()
        v[-1, -1] += 1
        tensors["v"] = (v, F32)
        fuse(tensors, ["blk.2.attn_q.weight", "blk.2.attn_k.weight", "v"], "blk.2.attn_qkv.weight")

    rewritten(tmp_path / "m.gguf", tmp_path / "fused.gguf", change)

    with pytest.raises(SpecError, match=r"V rows of blk\.2\.attn_qkv\.weight differ"):
        load(read_hf(folder("gemma4-31b")), tmp_path / "fused.gguf")


def test_experts_with_gate_and_up_apart_load_as_fused_ones(tmp_path: Path) -> None:
    """llama.cpp fuses Gemma 4's, Ollama splits them."""
    write_gguf("gemma4-26b-a4b", tmp_path / "m.gguf")

    def change(tensors: Arrays) -> None:
        for i in range(4):
            fused, kind = tensors.pop(f"blk.{i}.ffn_gate_up_exps.weight")
            for name, half in zip(("gate", "up"), np.split(fused, 2, axis=1), strict=True):
                tensors[f"blk.{i}.ffn_{name}_exps.weight"] = (np.ascontiguousarray(half), kind)

    rewritten(tmp_path / "m.gguf", tmp_path / "split.gguf", change)
    spec = read_hf(folder("gemma4-26b-a4b"))

    same(load(spec, tmp_path / "split.gguf"), load(spec, tmp_path / "m.gguf"))


@pytest.mark.parametrize("fused", [False, True])
def test_ollamas_own_gpt_oss_files_load(fused: bool, tmp_path: Path) -> None:
    """Other names, gate and up row by row, MXFP4 in the checkpoint's nibble order under a type code of its own."""
    write_gguf("gpt-oss", tmp_path / "m.gguf", quant="mxfp4")
    experts = ("ffn_gate_up_exps", "ffn_down_exps") if fused else ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")

    def change(tensors: Arrays) -> None:
        for i in range(4):
            for old, new in (
                ("attn_output.weight", "attn_out.weight"),
                ("attn_output.bias", "attn_out.bias"),
                ("attn_sinks.weight", "attn_sinks"),
                ("post_attention_norm.weight", "ffn_norm.weight"),
            ):
                tensors[f"blk.{i}.{new}"] = tensors.pop(f"blk.{i}.{old}")
            for suffix in ("weight", "bias") if fused else ():
                (gate, kind), (up, _) = (tensors.pop(f"blk.{i}.ffn_{x}_exps.{suffix}") for x in ("gate", "up"))
                both = np.empty((gate.shape[0], 2 * gate.shape[1], *gate.shape[2:]), gate.dtype)
                both[:, ::2], both[:, 1::2] = gate, up
                tensors[f"blk.{i}.ffn_gate_up_exps.{suffix}"] = (both, kind)
            for name in experts:
                data, kind = tensors[f"blk.{i}.{name}.weight"]
                blocks = data.reshape(*data.shape[:-1], -1, 17)
                elements = np.concatenate((blocks[..., 1:] & 15, blocks[..., 1:] >> 4), axis=-1)
                raw = np.concatenate((blocks[..., :1], elements[..., ::2] | (elements[..., 1::2] << 4)), axis=-1)
                tensors[f"blk.{i}.{name}.weight"] = (raw.reshape(data.shape), kind)

    rewritten(tmp_path / "m.gguf", tmp_path / "ollama.gguf", change, arch="gptoss")
    data = bytearray((tmp_path / "ollama.gguf").read_bytes())
    for name in (f"blk.{i}.{x}.weight".encode() for i in range(4) for x in experts):
        at = data.index(name) + len(name) + 4 + 3 * 8
        assert data[at : at + 4] == struct.pack("<I", 39)
        data[at : at + 4] = struct.pack("<I", 4)
    (tmp_path / "ollama.gguf").write_bytes(data)
    spec = spec_from_gguf(read_gguf(tmp_path / "m.gguf"))

    stored = stored_types(spec, list_checkpoint(tmp_path / "ollama.gguf"))
    assert stored == stored_types(spec, list_checkpoint(tmp_path / "m.gguf"))
    assert stored["layers.0.experts_up"] == "mxfp4"
    same(load(spec, tmp_path / "ollama.gguf"), load(spec, tmp_path / "m.gguf"))
    kept = [load_weights(spec, tmp_path / f, resident=stored, device="cpu") for f in ("ollama.gguf", "m.gguf")]
    for a, b in zip(*(w.values() for w in kept), strict=True):
        assert torch.equal(*(w.data if isinstance(w, BlockTensor) else w for w in (a, b)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("blk.1.ffn_up.weight"), "lacks the tensor blk.1.ffn_up.weight"),
        (lambda t: t.update({"blk.1.ffn_sub_norm.weight": (np.ones(96, np.float32), F32)}), "reads the tensor blk.1.ffn_sub_norm"),
        (lambda t: t.update({"blk.1.attn_norm.weight": (np.ones(95, np.float32), F32)}), r"\[95\], not \[96\]"),
    ],
)
def test_a_gguf_that_is_not_this_model_is_refused_by_name(change: Callable[[Arrays], None], words: str, tmp_path: Path) -> None:
    write_gguf("llama", tmp_path / "m.gguf")
    rewritten(tmp_path / "m.gguf", tmp_path / "c.gguf", change)

    with pytest.raises(SpecError, match=words):
        load(read_hf(folder("llama")), tmp_path / "c.gguf")


# Residence


@pytest.mark.parametrize("quant", ["f32", "q8_0"])
def test_members_of_a_group_are_views_of_one_allocation(quant: str, tmp_path: Path) -> None:
    """A second copy of q, k and v would double attention's weights."""
    write_gguf("qwen3-wide", tmp_path / "m.gguf", quant=quant)
    spec = read_hf(folder("qwen3-wide"))
    members = tuple(f"layers.0.{x}" for x in "qkv")
    resident = stored_types(spec, list_checkpoint(tmp_path / "m.gguf"))

    alone = load_weights(spec, tmp_path / "m.gguf", resident=resident, device="cpu")
    joined = load_weights(spec, tmp_path / "m.gguf", resident=resident, device="cpu", groups={"layers.0.qkv": members})

    def data(weight: Weight) -> torch.Tensor:
        return weight.data if isinstance(weight, BlockTensor) else weight

    whole = data(joined["layers.0.qkv"])
    assert torch.equal(whole, torch.cat([data(alone[m]) for m in members]))
    assert {data(joined[m]).untyped_storage().data_ptr() for m in members} == {whole.untyped_storage().data_ptr()}


def test_a_group_of_two_types_is_the_planners_bug() -> None:
    spec = read_hf(folder("qwen3"))
    resident = {t.name: "bf16" if t.name == "layers.0.k" else "f32" for t in weight_tensors(spec)}

    with pytest.raises(ValueError, match=r"layers\.0\.qkv are kept as bf16 and f32"):
        load_weights(spec, folder("qwen3"), resident=resident, device="cpu", groups={"layers.0.qkv": ("layers.0.q", "layers.0.k")})


def test_a_float_weight_cannot_be_kept_quantised() -> None:
    spec = read_hf(folder("qwen3"))
    resident = {t.name: "q8_0" if t.name == "layers.0.q" else "f32" for t in weight_tensors(spec)}

    with pytest.raises(ValueError, match=r"layers\.0\.q is stored as f32 and cannot be kept as q8_0"):
        load_weights(spec, folder("qwen3"), resident=resident, device="cpu")


@pytest.mark.parametrize(("name", "quant"), [("gpt-oss", "mxfp4"), ("llama", "f32"), ("gemma4-26b-a4b", "q8_0")])
def test_tiles_of_any_size_give_the_same_weights(name: str, quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors fit one tile; real ones are cut inside an expert, inside a head, at the last odd row."""
    write_gguf(name, tmp_path / "m.gguf", quant=quant)
    spec = read_hf(folder(name))
    whole = [load(spec, path) for path in (folder(name), tmp_path / "m.gguf")]
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr("headwise.weights.load.TILE_BYTES", 5000)

    cut = [load(spec, path, progress=lambda *x: seen.append(x)) for path in (folder(name), tmp_path / "m.gguf")]

    for a, b in zip(whole, cut, strict=True):
        same(a, b)
    total = sum(4 * t.n_elements for t in weight_tensors(spec))
    assert len(seen) > 2 * len(whole[0]) and {n for _, n in seen} == {total}
    assert [done for done, _ in seen].count(total) == 2 and max(done for done, _ in seen) == total


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["f16", "q4_0"])
def test_loading_holds_one_tile_beside_the_weights(kind: str, tmp_path: Path) -> None:
    """Mapped pages count as resident: without giving them back, the peak is the model twice."""
    rows, columns = 1 << 19, 256
    item = {"f16": (256 * 2, gguf.GGMLQuantizationType.F16), "q4_0": (256 // 32 * 18, gguf.GGMLQuantizationType.Q4_0)}
    row_bytes, code = item[kind]
    name = b"token_embd.weight"
    start = struct.pack("<4sIQQ", b"GGUF", 3, 1, 1)
    start += struct.pack("<Q20sIQ5s", 20, b"general.architecture", 8, 5, b"llama")
    start += struct.pack(f"<Q{len(name)}sIQQIQ", len(name), name, 2, columns, rows, code, 0)
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        file.write(start + bytes(-len(start) % 32))
        file.truncate(len(start) + -len(start) % 32 + rows * row_bytes)  # a hole: zeros that take no disk
    program = f"""
import headwise.weights.load as room
from headwise.spec.tensors import TensorSpec
from headwise.weights.names import Matched, Part
from pathlib import Path
room.weight_tensors = lambda *_: (TensorSpec("embed", ({rows}, {columns}), "table"),)
room.match = lambda *_: Matched({{"embed": (Part(stored="token_embd.weight", rows={rows}),)}}, {{"embed": "{kind}"}}, {{}})

def kib(key):
    return int(next(x for x in open("/proc/self/status") if x.startswith(key)).split()[1])

before = kib("VmRSS")
room.load_weights(None, Path({str(path)!r}), resident={{"embed": "f16"}}, device="cpu")
print(kib("VmHWM") - before)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    grown = int(out.stdout) * 1024
    assert rows * columns * 2 <= grown <= rows * columns * 2 + (64 + 24) * 2**20
