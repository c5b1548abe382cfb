"""Checkpoint names -> our names: one table for Hugging Face, one for GGUF; what matches no row is an error.

A row says where one of our tensors comes from: the stored name, which rows of it, and what was done to it when it was
stored. Rows are data; `match` checks them against a listing and hands out `Part`s, `load.py` copies what the parts say.
Sources: transformers 5.23 models/*/modeling_*.py and conversion_mapping.py (Hugging Face); llama.cpp 0c1e57098
gguf-py/gguf/constants.py, conversion/*.py and src/models/*.cpp (GGUF).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from headwise.errors import SpecError
from headwise.planner.residence import FP8_BLOCK, FP8_TYPES
from headwise.spec.layers import LayerSpec, ModelSpec
from headwise.spec.tensors import TensorSpec, weight_tensors
from headwise.weights.listing import Listing, StoredTensor

FLOAT_TYPES = ("f32", "bf16", "f16")

# Which rows of a fused tensor are ours: all, the first or second half, every other one, or our share of q, k, v.
Share = Literal["all", "first", "second", "even", "odd", "q", "k", "v"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Rows of one stored tensor that fill one of ours, or one expert of ours."""

    stored: str
    scales: str | None = None  # `stored` holds MXFP4 nibbles of safetensors, this its exponents; or e4m3 and its scales
    expert: int | None = None  # fills only this expert of ours
    first: int = 0  # the first row taken,
    step: int = 1  # then every step-th (2: gate and up alternate),
    rows: int  # this many
    copy_at: int | None = None  # rows from here on must hold the same bytes (a K=V layer stored with both)
    axis: Literal[-1, -2] = -2  # where rows lie: -1 for vectors and biases
    transposed: bool = False  # stored (in, out)
    pairs_of: int = 0  # > 0: this many heads, each stored with its rotary pairs adjacent; ours are half a head apart
    add: float = 0.0  # stored less this much


@dataclass(frozen=True, slots=True)
class Matched:
    """Where every tensor of ours comes from, and why the others are not read."""

    parts: Mapping[str, tuple[Part, ...]]
    types: Mapping[str, str]  # of ours, as stored; see `stored_types`
    skipped: Mapping[str, str]  # stored name -> why nothing reads it


@dataclass(frozen=True, slots=True)
class _Row:
    """One way a checkpoint can spell one of our tensors; `{e}` in the name = one stored tensor per expert."""

    name: str
    share: Share = "all"
    transposed: bool = False
    mxfp4: bool = False  # the name is followed by _blocks and _scales


def _dense(stem: str, kinds: Mapping[str, str]) -> dict[str, tuple[_Row, ...]]:
    """Matrices with a bias: ours "q" and "q_bias" are stored as q_proj.weight and q_proj.bias."""
    rows: dict[str, tuple[_Row, ...]] = {}
    for ours, stored in kinds.items():
        rows[ours] = (_Row(f"{stem}{stored}.weight"),)
        rows[f"{ours}_bias"] = (_Row(f"{stem}{stored}.bias"),)
    return rows


def _apart(kind: str) -> tuple[_Row, ...]:
    """Gemma 4's experts as tools that quantise them store them, one by one.

    Source: vLLM 001cabc1b vllm/model_executor/models/gemma4.py `load_weights`; sglang #22929 for the second.
    """
    return _Row(f"experts.{{e}}.{kind}.weight"), _Row(f"moe.experts.{{e}}.{kind}.weight")


_HF_MODEL: Mapping[str, tuple[_Row, ...]] = {
    "embed": (_Row("{body}embed_tokens.weight"),),
    "norm": (_Row("{body}norm.weight"),),
    "head": (_Row("{head}lm_head.weight"),),
    "ple.embed": (_Row("{body}embed_tokens_per_layer.weight"),),
    "ple.proj": (_Row("{body}per_layer_model_projection.weight"),),
    "ple.norm": (_Row("{body}per_layer_projection_norm.weight"),),
}
_HF_NORMS: Mapping[str, Mapping[str, str]] = {  # the same four names mean different places, by where the norms stand
    "pre": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "post": {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
    "sandwich": {
        "attn_norm": "input_layernorm",
        "attn_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}
_HF_LAYER: Mapping[str, tuple[_Row, ...]] = {
    **_dense("self_attn.", {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}),
    **_dense("mlp.", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
    "q_norm": (_Row("self_attn.q_norm.weight"),),
    "k_norm": (_Row("self_attn.k_norm.weight"),),
    "sinks": (_Row("self_attn.sinks"),),
    "ple_gate": (_Row("per_layer_input_gate.weight"),),
    "ple_proj": (_Row("per_layer_projection.weight"),),
    "ple_post_norm": (_Row("post_per_layer_input_norm.weight"),),
    "layer_scalar": (_Row("layer_scalar"),),
}
_HF_EXPERTS: Mapping[str, Mapping[str, tuple[_Row, ...]]] = {
    "gemma4": {
        "router": (_Row("router.proj.weight"),),
        "router_scale": (_Row("router.scale"),),
        "expert_scale": (_Row("router.per_expert_scale"),),
        "mlp_post_norm_1": (_Row("post_feedforward_layernorm_1.weight"),),
        "experts_norm": (_Row("pre_feedforward_layernorm_2.weight"),),
        "experts_post_norm": (_Row("post_feedforward_layernorm_2.weight"),),
        "experts_gate": (_Row("experts.gate_up_proj", "first"), *_apart("gate_proj")),
        "experts_up": (_Row("experts.gate_up_proj", "second"), *_apart("up_proj")),
        "experts_down": (_Row("experts.down_proj"), *_apart("down_proj")),
    },
    "qwen3_moe": {
        "router": (_Row("mlp.gate.weight"),),
        "experts_gate": (_Row("mlp.experts.{e}.gate_proj.weight"), _Row("mlp.experts.gate_up_proj", "first")),
        "experts_up": (_Row("mlp.experts.{e}.up_proj.weight"), _Row("mlp.experts.gate_up_proj", "second")),
        "experts_down": (_Row("mlp.experts.{e}.down_proj.weight"), _Row("mlp.experts.down_proj")),
    },
    "gpt_oss": {
        "router": (_Row("mlp.router.weight"),),
        "router_bias": (_Row("mlp.router.bias"),),
        "experts_gate": (
            _Row("mlp.experts.gate_up_proj", "even", mxfp4=True),
            _Row("mlp.experts.gate_up_proj", "even", transposed=True),
        ),
        "experts_up": (
            _Row("mlp.experts.gate_up_proj", "odd", mxfp4=True),
            _Row("mlp.experts.gate_up_proj", "odd", transposed=True),
        ),
        "experts_down": (_Row("mlp.experts.down_proj", mxfp4=True), _Row("mlp.experts.down_proj", transposed=True)),
        "experts_gate_bias": (_Row("mlp.experts.gate_up_proj_bias", "even"),),
        "experts_up_bias": (_Row("mlp.experts.gate_up_proj_bias", "odd"),),
        "experts_down_bias": (_Row("mlp.experts.down_proj_bias"),),
    },
}
# (before the body, before lm_head): ForCausalLM, ForConditionalGeneration in both orders, and a bare body.
_HF_PREFIXES = (
    ("model.", ""),
    ("model.language_model.", ""),
    ("language_model.model.", "language_model."),
    ("language_model.", ""),
    ("", ""),
)

_GGUF_MODEL: Mapping[str, tuple[_Row, ...]] = {
    "embed": (_Row("token_embd.weight"),),
    "norm": (_Row("output_norm.weight"),),
    "head": (_Row("output.weight"),),
    "ple.embed": (_Row("per_layer_token_embd.weight"),),
    "ple.proj": (_Row("per_layer_model_proj.weight"),),
    "ple.norm": (_Row("per_layer_proj_norm.weight"),),
}
_GGUF_LAYER: Mapping[str, tuple[_Row, ...]] = {
    **{name: (_Row(f"attn_{name}.weight"), _Row("attn_qkv.weight", name)) for name in ("q", "k", "v")},
    **{f"{name}_bias": (_Row(f"attn_{name}.bias"), _Row("attn_qkv.bias", name)) for name in ("q", "k", "v")},
    **_dense("", {"o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down", "router": "ffn_gate_inp"}),
    **_dense("", {f"experts_{name}": f"ffn_{name}_exps" for name in ("gate", "up", "down")}),
    "experts_gate": (_Row("ffn_gate_exps.weight"), _Row("ffn_gate_up_exps.weight", "first")),
    "experts_up": (_Row("ffn_up_exps.weight"), _Row("ffn_gate_up_exps.weight", "second")),
    "experts_gate_bias": (_Row("ffn_gate_exps.bias"), _Row("ffn_gate_up_exps.bias", "first")),
    "experts_up_bias": (_Row("ffn_up_exps.bias"), _Row("ffn_gate_up_exps.bias", "second")),
    "attn_norm": (_Row("attn_norm.weight"),),
    "attn_post_norm": (_Row("post_attention_norm.weight"),),
    "mlp_norm": (_Row("ffn_norm.weight"),),
    "mlp_post_norm": (_Row("post_ffw_norm.weight"),),
    "q_norm": (_Row("attn_q_norm.weight"),),
    "k_norm": (_Row("attn_k_norm.weight"),),
    "sinks": (_Row("attn_sinks.weight"),),
    "router_scale": (_Row("ffn_gate_inp.scale"),),
    "expert_scale": (_Row("ffn_down_exps.scale"),),
    "mlp_post_norm_1": (_Row("post_ffw_norm_1.weight"),),
    "experts_norm": (_Row("pre_ffw_norm_2.weight"),),
    "experts_post_norm": (_Row("post_ffw_norm_2.weight"),),
    "ple_gate": (_Row("inp_gate.weight"),),
    "ple_proj": (_Row("proj.weight"),),
    "ple_post_norm": (_Row("post_norm.weight"),),
    "layer_scalar": (_Row("layer_output_scale.weight"),),
}
# Ollama's own conversion of gpt-oss: the checkpoint's order of gate and up, and names of its own.
# Source: ollama convert/convert_gptoss.go `Replacements`, model/models/gptoss/model.go (the `gguf:` tags and `GateUp`).
_GPTOSS_LAYER: Mapping[str, tuple[_Row, ...]] = {
    "o": (_Row("attn_out.weight"), _Row("attn_output.weight")),
    "o_bias": (_Row("attn_out.bias"), _Row("attn_output.bias")),
    "sinks": (_Row("attn_sinks"), _Row("attn_sinks.weight")),
    "mlp_norm": (_Row("ffn_norm.weight"), _Row("post_attention_norm.weight")),
    "experts_gate": (_Row("ffn_gate_exps.weight"), _Row("ffn_gate_up_exps.weight", "even")),
    "experts_up": (_Row("ffn_up_exps.weight"), _Row("ffn_gate_up_exps.weight", "odd")),
    "experts_gate_bias": (_Row("ffn_gate_exps.bias"), _Row("ffn_gate_up_exps.bias", "even")),
    "experts_up_bias": (_Row("ffn_up_exps.bias"), _Row("ffn_gate_up_exps.bias", "odd")),
}
_GGUF_PAIRED = ("llama", "mistral3")  # architectures whose converter permutes q and k: LlamaModel.permute and its heirs

# Stored names that nothing here reads, whatever the model, and why; no reason for rotary frequencies, known from the header.
_SKIPPED: Mapping[str, tuple[tuple[re.Pattern[str], str], ...]] = {
    "hf": (
        (re.compile(r"(model\.)?(vision_\w+|embed_vision|multi_modal_projector)\."), "vision"),
        (re.compile(r"(model\.)?(audio_\w+|embed_audio)\."), "audio"),
        (re.compile(r"mtp\."), "multi-token prediction"),
        (re.compile(r".*\.input_scale$"), "static scales of activations, which are measured token by token here"),
        (re.compile(r".*\.([qkv]_scale|prob_scale|[qkv]_proj\.output_scale)$"), "scales of a KV cache in fp8; --kv says ours"),
        (re.compile(r".*\brotary_emb\.inv_freq$"), ""),
    ),
    "gguf": (
        (re.compile(r"(v|mm)\."), "vision"),
        (re.compile(r"a\."), "audio"),
        (re.compile(r"(mtp\.|blk\.\d+\.nextn\.)"), "multi-token prediction"),
        (re.compile(r"(blk\.\d+\.)?rope_freqs\.weight$"), ""),
    ),
}


def match(spec: ModelSpec, listing: Listing) -> Matched:
    """Finds every tensor of `spec` in `listing`, checks shapes, and accounts for every other stored tensor.

    Raises:
        SpecError: a tensor is missing, has another shape or an unread type, or nothing here knows what it is for.
    """
    table = _Table(spec, listing)
    parts: dict[str, tuple[Part, ...]] = {}
    types: dict[str, str] = {}
    for ours in weight_tensors(spec):
        parts[ours.name] = table.parts(ours)
        types[ours.name] = _type(ours, parts[ours.name], listing)
    used = {name for found in parts.values() for part in found for name in (part.stored, part.scales) if name}
    skipped: dict[str, str] = {}
    unknown = []
    for name in listing.tensors:
        if name not in used:
            why = table.skip_reason(name)
            if why is None:
                unknown.append(name)
            else:
                skipped[name] = why
    if unknown:
        more = f", and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        shape = list(listing.tensors[unknown[0]].shape)
        raise SpecError(
            f"{listing.where}: nothing reads the tensor {unknown[0]} {shape}{more}",
            why=f"{spec.family} has no such part here, and leaving weights out changes the answers",
            do="check the file against its source; a tensor, unlike a config key, cannot be ignored",
        )
    return Matched(parts, types, skipped)


def stored_types(spec: ModelSpec, listing: Listing) -> dict[str, str]:
    """Our name -> the type it is stored in: "f32", "bf16", "q4_k", ..., and "mxfp4" for every spelling of MXFP4."""
    return dict(match(spec, listing).types)


def skipped_by_reason(matched: Matched) -> dict[str, int]:
    """How many stored tensors are not read, by reason."""
    return dict(Counter(filter(None, matched.skipped.values())))


def gguf_name(ours: str) -> str:
    """What llama.cpp's converter calls a tensor of ours."""
    if not ours.startswith("layers."):
        return _GGUF_MODEL[ours][0].name
    _, index, local = ours.split(".", 2)
    return f"blk.{index}.{_GGUF_LAYER[local][0].name}"


def row_axis(ours: TensorSpec) -> Literal[-1, -2]:
    """The axis that counts a tensor's outputs: the last of a vector or a bias, else the last but one."""
    return -1 if len(ours.shape) == 1 or ours.name.endswith("_bias") else -2


class _Table:
    """The rows that apply to one checkpoint."""

    def __init__(self, spec: ModelSpec, listing: Listing) -> None:
        self.spec, self.listing = spec, listing
        self.body, self.head = "model.", ""
        if listing.style == "hf":
            for body, head in _HF_PREFIXES:
                if f"{body}embed_tokens.weight" in listing.tensors:
                    self.body, self.head = body, head
                    break
            layer_rows = {**_HF_LAYER, **_HF_EXPERTS.get(spec.family, {})}
            layer_rows |= {ours: (_Row(f"{name}.weight"),) for ours, name in _HF_NORMS[spec.norms].items()}
            self.model_rows, self.layer_rows, self.layer_stem = _HF_MODEL, layer_rows, f"{self.body}layers."
        else:
            layer_rows = dict(_GGUF_LAYER)
            if listing.architecture == "gptoss":
                layer_rows |= _GPTOSS_LAYER
            elif spec.family == "gpt_oss":  # the norm before the MLP bears the name of its place after attention
                layer_rows["mlp_norm"] = (_Row("post_attention_norm.weight"), _Row("ffn_norm.weight"))
            self.model_rows, self.layer_rows, self.layer_stem = _GGUF_MODEL, layer_rows, "blk."

    def parts(self, ours: TensorSpec) -> tuple[Part, ...]:
        """The first spelling that the checkpoint has in full."""
        rows, layer, names = self._rows(ours.name)
        n_experts = ours.shape[0] if ours.role == "experts" else 0
        expected: list[str] = []
        for row, name in zip(rows, names, strict=True):
            wanted = [name.format(e=e) for e in range(n_experts)] if "{e}" in name else [name]
            if row.mxfp4:
                wanted = [f"{name}_blocks", f"{name}_scales"]
            if all(stored in self.listing.tensors for stored in wanted):
                return tuple(self._part(ours, layer, row, wanted))
            expected.append(next(stored for stored in wanted if stored not in self.listing.tensors))
        raise SpecError(
            f"{self.listing.where} lacks the tensor {expected[0]}",
            why=f"{self.spec.family} needs it as {ours.name} {list(ours.shape)}"
            + "".join(f"; {name} is not there either" for name in expected[1:]),
            do="finish the download, or check the file against its source",
        )

    def _rows(self, name: str) -> tuple[tuple[_Row, ...], LayerSpec | None, list[str]]:
        if not name.startswith("layers."):
            rows = self.model_rows[name]
            return rows, None, [row.name.format(body=self.body, head=self.head) for row in rows]
        _, index, local = name.split(".", 2)
        if local not in self.layer_rows:
            raise SpecError(
                f"{self.listing.where}: {self.spec.family} checkpoints of this kind have no {name}",
                why="no row of the name table says how it is stored",
                do="check the model's config against its source",
            )
        rows = self.layer_rows[local]
        return rows, self.spec.layers[int(index)], [f"{self.layer_stem}{index}.{row.name}" for row in rows]

    def _part(self, ours: TensorSpec, layer: LayerSpec | None, row: _Row, wanted: list[str]) -> Iterator[Part]:
        """The parts of one row, shapes checked."""
        local = ours.name.rsplit(".", 1)[-1]
        axis = row_axis(ours)
        vector, n_rows = axis == -1, ours.shape[axis]
        part = Part(stored="", rows=n_rows, axis=axis, transposed=row.transposed)
        total = n_rows
        if row.share in ("first", "second", "even", "odd"):
            total = 2 * n_rows
            first = {"first": 0, "second": n_rows, "even": 0, "odd": 1}[row.share]
            part = replace(part, first=first, step=2 if row.share in ("even", "odd") else 1)
        elif row.share != "all":
            assert layer is not None
            part, total = self._share_of_qkv(part, layer, row.share, self.listing.tensors[wanted[0]], vector)
        if self.listing.style == "gguf":
            base = local.removesuffix("_bias")
            if self.listing.architecture in _GGUF_PAIRED and base in ("q", "k"):
                assert layer is not None
                part = replace(part, pairs_of=layer.n_heads if base == "q" else layer.n_kv_heads)
        elif self.spec.family == "gemma3" and local.endswith("norm"):
            part = replace(part, add=1.0)  # Gemma 3 multiplies by 1 + w
        lead = ours.shape[:-1] if vector else ours.shape[:-2]
        shape = (*lead, total) if vector else (*lead, total, ours.shape[-1])
        if row.mxfp4:
            blocks = (*lead, total, ours.shape[-1] // 32)
            self._check(wanted[0], (*blocks, 16), ours)
            self._check(wanted[1], blocks, ours)
            yield replace(part, stored=wanted[0], scales=wanted[1])
            return
        if row.transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        if "{e}" in row.name:
            for e, stored in enumerate(wanted):
                self._check(stored, shape[1:], ours)
                yield replace(part, stored=stored, scales=self._scales(stored, row), expert=e)
            return
        self._check(wanted[0], shape, ours)
        yield replace(part, stored=wanted[0], scales=self._scales(wanted[0], row))

    def _scales(self, name: str, row: _Row) -> str | None:
        """Where the scales of a tensor in e4m3 lie, if it is one that is read and has any."""
        stored = self.listing.tensors[name]
        if stored.type != "f8_e4m3" or row.transposed or len(stored.shape) < 2:
            return None
        return next((n for n in (f"{name}_scale_inv", f"{name}_scale") if n in self.listing.tensors), None)

    def _share_of_qkv(self, part: Part, layer: LayerSpec, share: Share, stored: StoredTensor, vector: bool) -> tuple[Part, int]:
        """Our rows of a fused q, k, v. A K=V layer may be stored with its V rows, which then repeat its K rows."""
        q, kv = layer.n_heads * layer.head_dim, layer.n_kv_heads * layer.head_dim
        total = q + 2 * kv
        stored_rows = stored.shape[0] if stored.shape else 0
        if layer.kv_source is not None and stored_rows == q:
            total = q
        elif layer.k_eq_v and stored_rows == q + kv:
            total = q + kv
        elif layer.k_eq_v and share == "k":
            part = replace(part, copy_at=q + kv)
        return replace(part, first={"q": 0, "k": q, "v": q + kv}[share]), total

    def _check(self, stored: str, shape: tuple[int, ...], ours: TensorSpec) -> None:
        found = self.listing.tensors[stored].shape
        if found != shape:
            raise SpecError(
                f"{self.listing.where}: {stored} has shape {list(found)}, not {list(shape)}",
                why=f"{self.spec.family} reads it for {ours.name} {list(ours.shape)}",
                do="check that weights and config belong to the same model",
            )

    def skip_reason(self, name: str) -> str | None:
        """Why nothing reads this stored tensor; None if nobody knows it."""
        for pattern, why in _SKIPPED[self.listing.style]:
            if pattern.match(name):
                return why
        if name.endswith((".weight_scale", ".weight_scale_inv")):  # goes with its weight
            name = name[: name.rindex("_scale")]
        if self.spec.tied and name in {row.name.format(head=self.head) for row in self.model_rows["head"]}:
            return "the output projection of a tied model is its embedding"
        if not name.startswith(self.layer_stem):
            return None
        index, _, local = name.removeprefix(self.layer_stem).partition(".")
        if not index.isdigit() or int(index) >= len(self.spec.layers):
            return None
        layer = self.spec.layers[int(index)]

        def names(*ours: str) -> set[str]:
            return {row.name for key in ours for row in self.layer_rows[key]}

        if layer.kv_source is not None and local in names("k", "k_bias", "v", "v_bias", "k_norm"):
            return "K and V of a layer that shares another's cache"
        if layer.k_eq_v and self.listing.style == "hf" and local in names("v", "v_bias"):
            return "V of a layer whose K is its V"
        return None


def _fp8_type(stored: StoredTensor, scales: StoredTensor, listing: Listing) -> str:
    """By the shape of the scales: fp8, one or one a row; fp8_block, one for each 128 by 128 values, several a row."""
    *lead, N, K = stored.shape
    blocks = (*lead, -(-N // FP8_BLOCK), -(-K // FP8_BLOCK))
    n = math.prod(scales.shape)
    if scales.type in FLOAT_TYPES and (n == 1 or scales.shape in ((*lead, N, 1), (*lead, N))):
        return "fp8"
    if scales.type in FLOAT_TYPES and scales.shape == blocks:
        return "fp8" if K <= FP8_BLOCK else "fp8_block"
    raise SpecError(
        f"{listing.where}: {scales.name} is {scales.type} {list(scales.shape)}",
        why=f"of {stored.name} {list(stored.shape)} one float is read, one a row, or one for each 128 by 128: {list(blocks)}",
        do="use the unquantised repository, or a GGUF of this model",
    )


def _type(ours: TensorSpec, parts: tuple[Part, ...], listing: Listing) -> str:
    """The one type all parts of a tensor are stored in."""

    def type_of(part: Part) -> str:
        stored = listing.tensors[part.stored]
        if part.scales is None:
            return stored.type.removesuffix("_raw")
        return "mxfp4" if stored.type != "f8_e4m3" else _fp8_type(stored, listing.tensors[part.scales], listing)

    found = {type_of(part) for part in parts}
    tensors = [listing.tensors[part.stored] for part in parts]
    if len(found) == 1:
        (type_name,) = found
        if type_name in FP8_TYPES or type_name in FLOAT_TYPES or tensors[0].block > 1:
            return type_name
        if parts[0].scales and tensors[0].type == "u8" and listing.tensors[parts[0].scales].type == "u8":
            return type_name
        type_name = tensors[0].type
    elif found <= set(FLOAT_TYPES):
        return "f32"
    else:
        type_name = " and ".join(sorted(found))
    raise SpecError(
        f"{listing.where}: {parts[0].stored} is stored as {type_name}",
        why=f"{ours.name} can be read from {', '.join(FLOAT_TYPES)}, e4m3 with scales, MXFP4 or GGUF's quantised types",
        do="use the unquantised repository, or a GGUF of this model",
    )
