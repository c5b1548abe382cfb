"""A GGUF header becomes a ModelSpec, equal to the one its Hugging Face config gives.

What no key says is in the tensors: which layers have a V projection, biases, experts or an output matrix of their own,
the vocabulary's size, and the rope factors (`rope_freqs`). Keys under the architecture's name are read, listed here as
harmless, or an error; llama.cpp reads no others. Files made by Ollama spell some keys differently; both are read.
Source: llama.cpp convert_hf_to_gguf.py (writing) and src/models/*.cpp (reading); ollama
llama/compat/llama-ollama-compat.cpp (Ollama's spellings).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from headwise.errors import SpecError
from headwise.spec.config import MAX_LAYERS, Config
from headwise.spec.gguf import GgufArray, GgufFile, GgufTensor
from headwise.spec.hf import checked_layer
from headwise.spec.layers import Activation, LayerSpec, MlpSpec, ModelSpec, MoeSpec, PleSpec
from headwise.spec.rope import RopeSpec, default_rope, factors_rope, linear_rope, yarn_rope

_MAX_HEAD_DIM = 1 << 14
_LEAST_THETA = 2.0  # a rope base; 1 would make every frequency the same
_HARMLESS = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")
_ENCODERS = ("vision.", "audio.", "mm.")  # other modalities, which Ollama keeps in the same file
_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id", "eos_token_ids")


def spec_from_gguf(file: GgufFile, *, ignore_keys: Collection[str] = ()) -> ModelSpec:
    """The ModelSpec that a GGUF header describes; its `name` is general.name, or the file's.

    Args:
        ignore_keys: full names (`gemma4.some.key`) of unknown keys to go on without.
    Raises:
        SpecError: no model, an unknown architecture, or a missing, unknown, negative or huge value; it names the key.
    """
    where = str(file.paths[0])
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise SpecError(
            f"{where} holds no language model",
            why=f"its general.type is {str(kind)[:40]!r}",
            do="give the model's own file; an mmproj or an adapter lies beside it",
        )
    arch = str(file.metadata.get("general.architecture"))[:60]
    if arch not in _FAMILIES:
        raise SpecError(
            f"{where}: architecture {arch!r} is not supported",
            why="no family here has its maths",
            do=f"architectures: {', '.join(sorted(_FAMILIES))}",
        )
    header = _Header(file, arch)
    spec = _FAMILIES[arch](header)
    header.config.refuse_unread(harmless=[f"{arch}.{key}" for key in _HARMLESS], ignore=ignore_keys)
    return spec


def _decimal(value: float) -> float:
    """The shortest decimal that an f32 stands for: 1e-06, not 9.99999997e-07; another float as it is."""
    for digits in range(1, 9):
        short = float(f"{value:.{digits}g}")
        try:
            if struct.unpack("<f", struct.pack("<f", short))[0] == value:
                return short
        except OverflowError:
            break
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return _decimal(value)
    if isinstance(value, GgufArray) and len(value) <= MAX_LAYERS:
        return [_plain(v) for v in value.read()]
    return value


@dataclass(frozen=True, slots=True)
class _Attention:
    """What one layer's tensors say about its attention."""

    has_k: bool
    has_v: bool
    qkv_bias: bool
    o_bias: bool


class _Header:
    """One file's keys without the architecture's name, and what every family spells alike, read once."""

    def __init__(self, file: GgufFile, arch: str) -> None:
        self.file, self.arch, self.where = file, arch, str(file.paths[0])
        prefix = arch + "."
        self.values = {
            key: _plain(value)
            for key, value in file.metadata.items()
            if key.startswith(prefix) and not key.removeprefix(prefix).startswith(_ENCODERS)
        }
        self.config = Config(self.values, where=self.where)
        self.n_layers = self.integer("block_count", most=MAX_LAYERS)
        self.hidden = self.integer("embedding_length")
        self.max_context = self.integer("context_length")
        self.n_heads = self.per_layer("attention.head_count")
        self.n_kv_heads = self.per_layer("attention.head_count_kv", self.n_heads)
        self.vocab_size = self.tensor("token_embd.weight").shape[0]
        self.skip("attention.causal", True)
        self.skip("nextn_predict_layers", 0)

    # keys

    def key(self, name: str) -> str:
        return f"{self.arch}.{name}"

    def __contains__(self, name: str) -> bool:
        return self.key(name) in self.config

    def integer(self, name: str, default: int | None = None, *, least: int = 1, most: int = 2**31 - 1) -> int:
        return self.config.integer(self.key(name), default, least=least, most=most)

    def number(self, *names: str, default: float | None = None, least: float = 1e-30) -> float:
        """The first of several spellings that is there."""
        found = next((n for n in names if n in self), names[0])
        return self.config.number(self.key(found), default, least=least)

    def skip(self, name: str, *neutral: Any) -> None:
        """Counts a key as read where its value changes nothing; another value stays unread, and is an error."""
        if self.value(name) in neutral:
            self.config.raw(self.key(name))

    def value(self, name: str) -> Any:
        """As it stands, and not counted as read."""
        return self.values.get(self.key(name))

    def per_layer(self, name: str, default: list[int] | None = None) -> list[int]:
        """One whole number per layer, from an array or from a single value."""
        value = self.value(name)
        if not isinstance(value, list):
            if value is None and default is not None:
                return default
            return [self.integer(name)] * self.n_layers
        self.config.raw(self.key(name))
        if len(value) != self.n_layers:
            raise SpecError(
                f"{self.where}: {self.key(name)} has {len(value)} values",
                why=f"it needs one for each of the {self.n_layers} layers",
                do="check the file against its source",
            )
        each = Config({f"{self.key(name)}[{i}]": v for i, v in enumerate(value)}, where=self.where)
        return [each.integer(f"{self.key(name)}[{i}]") for i in range(self.n_layers)]

    def head_dim(self, suffix: str = "") -> int:
        """Keys and values have the same size in every family here."""
        default = None if suffix else max(1, self.hidden // self.n_heads[0])
        dim = self.integer(f"attention.key_length{suffix}", default, most=_MAX_HEAD_DIM)
        self.config.only(self.key(f"attention.value_length{suffix}"), dim)
        self.skip(f"rope.dimension_count{suffix}", dim)
        return dim

    def sliding(self, *, period: int | None) -> list[bool]:
        """Which layers have a window: an array (true = window), or every `period`-th layer has none."""
        name = "attention.sliding_window_pattern"
        value = self.value(name)
        if isinstance(value, list):
            self.config.raw(self.key(name))
            if len(value) != self.n_layers or any(v not in (0, 1) for v in value):
                raise SpecError(
                    f"{self.where}: {self.key(name)} has {len(value)} values",
                    why=f"it needs true or false for each of the {self.n_layers} layers",
                    do="check the file against its source",
                )
            return [bool(v) for v in value]
        period = self.integer(name, period, most=MAX_LAYERS)
        return [(i + 1) % period != 0 for i in range(self.n_layers)]

    # tensors

    def tensor(self, name: str) -> GgufTensor:
        if name not in self.file.tensors:
            raise SpecError(
                f"{self.where} has no tensor {name}",
                why=f"architecture {self.arch} needs it; the file has {len(self.file.tensors)} tensors",
                do="check the file against its source",
            )
        found = self.file.tensors[name]
        if not found.shape:
            raise SpecError(f"{self.where}: tensor {name} has no dims", why="it is a matrix", do="download it again")
        return found

    def has(self, i: int, *names: str) -> bool:
        return any(f"blk.{i}.{name}" in self.file.tensors for name in names)

    def attention(self, i: int) -> _Attention:
        return _Attention(
            has_k=self.has(i, "attn_k.weight", "attn_qkv.weight"),
            has_v=self.has(i, "attn_v.weight", "attn_qkv.weight"),
            qkv_bias=self.has(i, "attn_q.bias", "attn_qkv.bias"),
            o_bias=self.has(i, "attn_output.bias", "attn_out.bias"),
        )

    def k_eq_v(self, i: int, *, k_eq_v_allowed: bool = False) -> bool:
        """Whether layer `i`, which owns its cache, projects K and V as one; raises SpecError where one is missing."""
        found = self.attention(i)
        if not found.has_k or not (found.has_v or k_eq_v_allowed):
            self.tensor(f"blk.{i}.attn_{'v' if found.has_k else 'k'}.weight")
        return not found.has_v

    def factors(self, head_dim: int) -> list[float] | None:
        """The divisors of `rope_freqs.weight`, one per pair of dims; None where the file has no such tensor."""
        if "rope_freqs.weight" not in self.file.tensors:
            return None
        values = self.tensor("rope_freqs.weight").read_f32()
        if len(values) != head_dim // 2 or not all(math.isfinite(v) and v > 0 for v in values):
            raise SpecError(
                f"{self.where}: rope_freqs.weight does not fit head_dim {head_dim}",
                why=f"it has {len(values)} values; needed are {head_dim // 2}, finite and > 0",
                do="download the file again",
            )
        return [_decimal(v) for v in values]

    def rope(self, head_dim: int, theta: float, *, truncate: bool = True, kind: str = "none") -> RopeSpec:
        """The rope that `rope.scaling.*` and `rope_freqs` describe; `kind` is the scaling where no key names one."""
        config, factors = self.config, self.factors(head_dim)
        kind = config.choice(self.key("rope.scaling.type"), ("none", "linear", "yarn"), kind)
        for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor", "extrapolation_factor"):
            self.skip(f"rope.scaling.{name}", 1.0)
        if kind != "none" and factors:
            raise SpecError(
                f"{self.where}: rope is scaled twice",
                why=f"by rope_freqs.weight and by {self.key('rope.scaling.type')} = {kind}",
                do="check the file against its source",
            )
        if factors:
            return factors_rope(head_dim, theta, factors)
        if kind == "none":
            self.skip("rope.scaling.factor", 1.0)
            return default_rope(head_dim, theta)
        factor = self.number("rope.scaling.factor")
        if kind == "linear":
            return linear_rope(head_dim, theta, factor=factor)
        attention_factor = None
        for name in ("rope.scaling.yarn_log_multiplier", "rope.scaling.mscale_all_dim"):
            self.skip(name, 0.0)
            if self.value(name):  # YaRN's magnitude over a second one of the same form; they cancel at 1
                grown = 0.1 * math.log(max(factor, 1.0))
                attention_factor = (grown + 1) / (self.number(name) * grown + 1)
        return yarn_rope(
            head_dim,
            theta,
            factor=factor,
            original_context=self.integer("rope.scaling.original_context_length", self.max_context),
            beta_fast=self.number("rope.scaling.yarn_beta_fast", "rope.scaling.beta_fast", default=32.0),
            beta_slow=self.number("rope.scaling.yarn_beta_slow", "rope.scaling.beta_slow", default=1.0),
            truncate=truncate,
            attention_factor=attention_factor,
        )

    def theta(self) -> float:
        return self.number("rope.freq_base", "rope.global.freq_base", default=10_000.0, least=_LEAST_THETA)

    # the result

    def moe(self, i: int, *, activation: Activation, **more: Any) -> MoeSpec:
        n_experts = self.integer("expert_count")
        self.skip("expert_gating_func", 1)
        self.skip("expert_weights_scale", 0.0, 1.0)
        if "expert_feed_forward_length" in self:
            width = self.integer("expert_feed_forward_length")
        else:  # early files of Ollama; (experts, width, hidden)
            width = self.tensor(f"blk.{i}.ffn_gate_exps.weight").shape[-2:][0]
        n_active = self.integer("expert_used_count", most=n_experts)
        return MoeSpec(n_experts=n_experts, n_active=n_active, width=width, activation=activation, **more)

    def token_ids(self, *keys: str) -> tuple[int, ...]:
        names = [f"tokenizer.ggml.{key}" for key in keys]
        config = Config({n: _plain(self.file.metadata.get(n)) for n in names}, where=self.where)
        return tuple(dict.fromkeys(i for n in names for i in config.ids(n)))

    def model(self, family: str, layers: list[LayerSpec], *, eps: float | None = None, **more: Any) -> ModelSpec:
        bos = self.token_ids("bos_token_id")
        named = self.file.metadata.get("general.name")
        return ModelSpec(
            name=named if isinstance(named, str) and named.strip() else self.file.paths[0].stem,
            family=family,
            layers=tuple(checked_layer(layer, self.where) for layer in layers),
            vocab_size=self.vocab_size,
            hidden=self.hidden,
            max_context=self.max_context,
            rms_eps=self.number("attention.layer_norm_rms_epsilon", default=eps),
            tied="output.weight" not in self.file.tensors,
            bos_id=bos[0] if bos else None,
            eos_ids=self.token_ids(*_EOS_KEYS),
            **more,
        )

    def final_softcap(self) -> float | None:
        return self.config.optional_number(self.key("final_logit_softcapping"))


def _gemma4(h: _Header) -> ModelSpec:
    sliding = h.sliding(period=None)
    window = h.integer("attention.sliding_window")
    dims = {True: h.head_dim("_swa"), False: h.head_dim()}
    theta = h.number("rope.freq_base", least=_LEAST_THETA)
    h.tensor("rope_freqs.weight")  # of full layers alone; without it all 512 dims would rotate
    ropes = {
        True: default_rope(dims[True], h.number("rope.freq_base_swa", default=10_000.0, least=_LEAST_THETA)),
        False: h.rope(dims[False], theta),
    }
    first_shared = h.n_layers - h.integer("attention.shared_kv_layers", 0, least=0, most=h.n_layers - 1)
    owners = {kind: i for i, kind in enumerate(sliding[:first_shared])}  # the last owner of each kind wins
    k_eq_v = [h.k_eq_v(i, k_eq_v_allowed=not sliding[i]) for i in range(first_shared)]
    widths = h.per_layer("feed_forward_length")
    moe = None
    if h.integer("expert_count", 0, least=0):
        moe = h.moe(0, activation="gelu_tanh", selection="softmax_topk", renormalise=True, beside_dense=True)
    else:
        h.skip("expert_used_count", 0)
        h.skip("expert_feed_forward_length", 0)
    layers = []
    for i, kind in enumerate(sliding):
        if kind not in owners:
            raise SpecError(
                f"{h.where}: layer {i} shares the cache of a {'sliding' if kind else 'full'} layer, and none owns one",
                why=f"{h.key('attention.shared_kv_layers')} is {h.n_layers - first_shared} of {h.n_layers}",
                do="check the file against its source",
            )
        source = i if i < first_shared else owners[kind]
        attention = h.attention(i)
        layers.append(
            LayerSpec(
                index=i,
                n_heads=h.n_heads[i],
                n_kv_heads=h.n_kv_heads[i],
                head_dim=dims[kind],
                window=window if kind else None,
                kv_source=None if source == i else source,
                k_eq_v=k_eq_v[source],
                rope=ropes[kind],
                scale=1.0,
                qk_norm=True,
                v_norm=True,
                qkv_bias=attention.qkv_bias,
                o_bias=attention.o_bias,
                mlp=MlpSpec(width=widths[i], activation="gelu_tanh", moe=moe),
            )
        )
    ple_dim = h.integer("embedding_length_per_layer_input", 0, least=0)
    ple = PleSpec(dim=ple_dim, vocab_size=h.tensor("per_layer_token_embd.weight").shape[0]) if ple_dim else None
    return h.model(
        "gemma4",
        layers,
        norms="sandwich",
        embed_scale=h.hidden**0.5,
        final_softcap=h.final_softcap(),
        ple=ple,
        layer_scalar=h.has(0, "layer_output_scale.weight"),
    )


def _gemma3(h: _Header) -> ModelSpec:
    head_dim = h.head_dim()
    window = h.config.optional_integer(h.key("attention.sliding_window"))
    sliding = h.sliding(period=6) if window else [False] * h.n_layers
    theta = h.number("rope.freq_base", "rope.global.freq_base", default=1_000_000.0, least=_LEAST_THETA)
    local = h.number("rope.freq_base_swa", "rope.local.freq_base", default=10_000.0, least=_LEAST_THETA)
    if _made_by_ollama(h) and "rope.scaling.type" not in h and h.max_context >= 131_072:
        wide = linear_rope(head_dim, theta, factor=8.0)  # Ollama's converter drops it; the 1B (32,768) has none
    else:
        wide = h.rope(head_dim, theta)
    ropes = {True: default_rope(head_dim, local), False: wide}
    # query_pre_attn_scalar has no key: it is head_dim, but for the 27B (62 layers), hidden / heads
    scalar = h.hidden // h.n_heads[0] if h.n_layers == 62 else head_dim
    widths = h.per_layer("feed_forward_length")
    layers = [
        _layer(
            h,
            i,
            head_dim=head_dim,
            window=window if kind else None,
            rope=ropes[kind],
            mlp=MlpSpec(width=widths[i], activation="gelu_tanh"),
            scale=scalar**-0.5,
            qk_norm=True,
        )
        for i, kind in enumerate(sliding)
    ]
    embed_scale = h.hidden**0.5
    return h.model("gemma3", layers, eps=1e-6, norms="sandwich", embed_scale=embed_scale, final_softcap=h.final_softcap())


def _made_by_ollama(h: _Header) -> bool:
    """Ollama's Gemma 3 files have an encoder inside, nested rope keys, or no epsilon; llama.cpp's have none of that."""
    return (
        "attention.layer_norm_rms_epsilon" not in h
        or "rope.local.freq_base" in h
        or "rope.global.freq_base" in h
        or h.key("mm.tokens_per_image") in h.file.metadata
        or any(name.startswith(("v.", "mm.")) for name in h.file.tensors)
    )


def _exaone4(h: _Header) -> ModelSpec:
    head_dim = h.head_dim()
    window = h.config.optional_integer(h.key("attention.sliding_window"))
    patterned = "attention.sliding_window_pattern" in h or h.n_layers == 64  # the 32B, whose first files lack the pattern
    hybrid = window is not None and patterned
    sliding = h.sliding(period=4) if hybrid else [False] * h.n_layers
    rope = h.rope(head_dim, h.theta())
    widths = h.per_layer("feed_forward_length")
    layers = [
        _layer(
            h,
            i,
            head_dim=head_dim,
            window=window if kind else None,
            rope=rope if kind or not hybrid else None,  # full layers of a hybrid have no rope
            mlp=MlpSpec(width=widths[i], activation="silu"),
            qk_norm=True,
        )
        for i, kind in enumerate(sliding)
    ]
    return h.model("exaone4", layers, norms="post")


def _llama(h: _Header, family: str = "llama", *, qk_norm: bool = False) -> ModelSpec:
    """Llama, and what differs from it by a norm or a name; Mistral 7B and Small are stored as `llama` too."""
    head_dim = h.head_dim()
    h.skip("attention.head_dim", head_dim)  # Ollama's older spelling
    h.skip("attention.temperature_scale", 0.0)
    h.skip("expert_count", 0)
    h.skip("expert_used_count", 0)
    rope = h.rope(head_dim, h.theta())
    widths = h.per_layer("feed_forward_length")
    layers = [
        _layer(
            h,
            i,
            head_dim=head_dim,
            window=None,
            rope=rope,
            mlp=MlpSpec(width=widths[i], activation="silu", bias=h.has(i, "ffn_up.bias")),
            qk_norm=qk_norm,
        )
        for i in range(h.n_layers)
    ]
    return h.model(family, layers, norms="pre")


def _qwen3moe(h: _Header) -> ModelSpec:
    head_dim = h.head_dim()
    rope = h.rope(head_dim, h.theta())
    widths = h.per_layer("feed_forward_length", [0] * h.n_layers)
    flags = [h.config.flag(h.key(name), True) for name in ("expert_weights_norm", "norm_top_k_prob")]
    routed = [i for i in range(h.n_layers) if h.has(i, "ffn_gate_inp.weight")]
    if not routed:
        h.tensor("blk.0.ffn_gate_inp.weight")
    moe = h.moe(routed[0], activation="silu", selection="softmax_topk", renormalise=all(flags))
    layers = []
    for i in range(h.n_layers):
        if i in routed:
            mlp = MlpSpec(width=0, activation="silu", moe=moe)
        else:
            h.tensor(f"blk.{i}.ffn_gate.weight")
            mlp = MlpSpec(width=widths[i], activation="silu")
        layers.append(_layer(h, i, head_dim=head_dim, window=None, rope=rope, mlp=mlp, qk_norm=True))
    return h.model("qwen3_moe", layers, norms="pre")


def _gpt_oss(h: _Header) -> ModelSpec:
    head_dim = h.head_dim()
    window = h.integer("attention.sliding_window")
    # Trained with YaRN's ramp not rounded to whole dims; no key says so, and llama.cpp rounds it.
    rope = h.rope(head_dim, h.theta(), truncate=False, kind="yarn" if "rope.scaling.factor" in h else "none")
    h.per_layer("feed_forward_length", [0] * h.n_layers)
    moe = h.moe(0, activation="swiglu_clamped", selection="topk_softmax", renormalise=False, bias=h.has(0, "ffn_gate_inp.bias"))
    layers = [
        _layer(
            h,
            i,
            head_dim=head_dim,
            window=window if kind else None,
            rope=rope,
            mlp=MlpSpec(width=0, activation="swiglu_clamped", moe=moe),
            sinks=True,
        )
        for i, kind in enumerate(h.sliding(period=2))
    ]
    return h.model("gpt_oss", layers, norms="pre")


def _layer(
    h: _Header,
    i: int,
    *,
    head_dim: int,
    window: int | None,
    rope: RopeSpec | None,
    mlp: MlpSpec,
    scale: float | None = None,
    **more: Any,
) -> LayerSpec:
    """A layer that owns its cache, with K and V projected apart."""
    h.k_eq_v(i)
    attention = h.attention(i)
    return LayerSpec(
        index=i,
        n_heads=h.n_heads[i],
        n_kv_heads=h.n_kv_heads[i],
        head_dim=head_dim,
        window=window,
        kv_source=None,
        k_eq_v=False,
        rope=rope,
        scale=head_dim**-0.5 if scale is None else scale,
        qkv_bias=attention.qkv_bias,
        o_bias=attention.o_bias,
        mlp=mlp,
        **more,
    )


def _mistral3(h: _Header) -> ModelSpec:
    h.skip("rope.scaling_beta", 0.0)  # Ollama's spelling of attention.temperature_scale
    for name in ("spatial_merge_size", "image_token_index"):
        h.config.raw(h.key(name))
    return _llama(h, "mistral")


def _qwen3(h: _Header) -> ModelSpec:
    return _llama(h, "qwen3", qk_norm=True)


_FAMILIES: Mapping[str, Callable[[_Header], ModelSpec]] = {
    "exaone4": _exaone4,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "gpt-oss": _gpt_oss,
    "gptoss": _gpt_oss,  # Ollama's first files
    "llama": _llama,
    "mistral3": _mistral3,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
}
