"""A Hugging Face `config.json` becomes a ModelSpec.

One function per family, each reading every key it uses; what is left must be listed as harmless or is an error. Both
forms of a multimodal config (text values at the top, or under `text_config`) are read.
Source of every rule: transformers 5.23, models/<family>/{configuration,modeling}_<family>.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from headwise.errors import SpecError
from headwise.spec.config import MAX_HEAD_DIM, MAX_LAYERS, Config, shown
from headwise.spec.layers import Activation, LayerSpec, MlpSpec, ModelSpec, MoeSpec, Norms, PleSpec
from headwise.spec.rope import RopeSpec, default_rope, linear_rope, llama3_rope, proportional_rope, yarn_rope

FULL, SLIDING = "full_attention", "sliding_attention"
_MAX_HEAD_SIZES = 64  # of one model; real ones have two
_FP8_BLOCK = (128, 128)  # values that share a scale
_LEAST_THETA = 2.0  # 1 would make every frequency the same, and YaRN divide by zero

# Keys that change nothing in a forward pass: training, bookkeeping, generation defaults, other modalities.
_HARMLESS = frozenset(
    """
    _name_or_path _attn_implementation _sliding_window_pattern add_cross_attention architectures attention_dropout
    attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward
    cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label
    initializer_range
    is_decoder is_encoder_decoder label2id length_penalty loss_type max_length min_length no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_router_logits output_scores
    pad_token_id prefix pretraining_tp problem_type pruned_heads remove_invalid_values repetition_penalty
    resid_pdrop return_dict return_dict_in_generate router_aux_loss_coef sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()
)
_HARMLESS_AROUND = _HARMLESS | frozenset(  # beside text_config: the other modalities, which this runtime skips by name
    """
    audio_config audio_ms_per_token audio_token_id audio_token_index boa_token_id boa_token_index boi_token_id
    boi_token_index eoa_token_id eoa_token_index eoi_token_id eoi_token_index image_token_id
    image_token_index mm_tokens_per_image multimodal_projector_bias projector_hidden_act
    spatial_merge_size video_token_id vision_config vision_feature_layer
    vision_soft_tokens_per_image vocab_size
    """.split()
)


# What transformers assumes for a key that is absent. A config inside another one leaves out every value that is such a
# default; one that stands alone writes the sizes (_ALWAYS_WRITTEN) in any case, and is damaged where one is missing.
_GEMMA: Mapping[str, Any] = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
_GEMMA4: Mapping[str, Any] = {
    **_GEMMA, "vocab_size": 262_144, "num_hidden_layers": 30, "sliding_window": 512, "global_head_dim": 512,
    "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262_144,
}  # fmt: skip
_GEMMA4_UNIFIED = {k: v for k, v in _GEMMA4.items() if "per_layer" not in k}  # this family has no per-layer embeddings
_GEMMA3: Mapping[str, Any] = {
    **_GEMMA, "vocab_size": 262_208, "num_hidden_layers": 26, "sliding_window": 4096, "query_pre_attn_scalar": 256,
}  # fmt: skip
_MISTRAL: Mapping[str, Any] = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6,
    "sliding_window": 4096, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EXAONE4 = {"num_key_value_heads": 32, "rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4}
_QWEN3 = {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096}
_QWEN3_MOE = {"num_key_value_heads": 4, "sliding_window": 4096}
_GPT_OSS: Mapping[str, Any] = {
    "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5, "sliding_window": 128, "attention_bias": True,
}  # fmt: skip
_ALWAYS_WRITTEN = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip


def spec_from_config(
    values: Mapping[str, Any], *, name: str, where: str = "config.json", ignore_keys: Collection[str] = ()
) -> ModelSpec:
    """The ModelSpec that a parsed config.json describes.

    Raises:
        SpecError: an unknown model_type, a missing, unknown, negative or huge value; it names the key.
    """
    outer = Config(values, where=where, ignore=ignore_keys)
    inside = "text_config" in outer
    text = outer.section("text_config").values if inside else values
    family = outer.raw("model_type")
    if inside:
        family = text.get("model_type") or family
        if "quantization_config" in outer:
            _check_stored_format(outer)
    if not isinstance(family, str) or family not in _FAMILIES:
        raise SpecError(
            f"{where}: model_type {shown(family)} is not supported",
            why="no family here has its maths",
            do=f"families: {', '.join(sorted({f.removesuffix('_text') for f in _FAMILIES}))}",
        )
    read, assumed = _FAMILIES[family]
    given = {**text}
    if inside:
        for key in ("tie_word_embeddings", "vocab_size"):  # some repositories write these beside text_config alone
            given.setdefault(key, outer.raw(key))
        given = {key: value for key, value in given.items() if value is not None or key in text}
    else:
        assumed = {key: value for key, value in assumed.items() if key not in _ALWAYS_WRITTEN}
    config = Config({**assumed, **given}, where=f"{where} text_config" if inside else where, ignore=ignore_keys)
    config.raw("model_type")
    spec = read(config, name)
    config.refuse_unread(harmless=_HARMLESS)
    if inside:
        spec = replace(spec, eos_ids=tuple(dict.fromkeys(spec.eos_ids + outer.ids("eos_token_id"))))
        outer.refuse_unread(harmless=_HARMLESS_AROUND)
    return spec


def read_hf(folder: Path, *, ignore_keys: Collection[str] = ()) -> ModelSpec:
    """The ModelSpec of a Hugging Face directory; `name` is the folder's."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(
            f"{folder} has no config.json",
            why="a Hugging Face directory carries one",
            do="give the directory that holds config.json, or a .gguf file",
        ) from None
    except PermissionError as error:
        raise SpecError(f"{path} may not be read", why=str(error), do=f"ls -l {folder}") from error
    except (OSError, ValueError, RecursionError) as error:  # a ValueError also for a number of 5,000 digits
        raise SpecError(f"{path} cannot be read", why=str(error), do="download it again") from error
    if not isinstance(values, dict):
        raise SpecError(f"{path} is not a model config", why="it holds no JSON object", do="download it again")
    return spec_from_config(values, name=folder.resolve().name, where=str(path), ignore_keys=ignore_keys)


def _check_stored_format(config: Config) -> None:
    """Weights packed by another tool are refused here, where the message can name the format; MXFP4 and FP8 are read."""
    quant = config.section("quantization_config")
    method = quant.raw("quant_method", "unknown")
    packed = None if method == "mxfp4" else _not_fp8(method, quant)
    if packed:
        raise SpecError(
            f"{config.where}: the weights are packed as {packed}",
            why="safetensors are read as f32, f16, bf16, MXFP4, or FP8: e4m3 with a scale a matrix, a row or 128 by 128 values",
            do="use the unquantised repository, its FP8 in one of those forms, or a GGUF of this model",
        )


def _not_fp8(method: object, quant: Config) -> str | None:
    """What the weights are packed as, where that is no FP8 that is read; which tensors are in FP8 their own types say.

    Activations are quantised or not by our own rule, so scales measured for them ahead, and for a KV cache, are not read.
    Source: transformers 5.23 FineGrainedFP8Config; compressed-tensors QuantizationScheme, formats "float-quantized" and, of older
    files, "naive-quantized".
    """
    if method == "fp8":
        block, kind = quant.raw("weight_block_size"), quant.raw("fmt", "e4m3")
        if block is not None and block != list(_FP8_BLOCK):
            return f"fp8 with weight_block_size {shown(block)}"
        return None if kind in ("e4m3", "float8_e4m3fn") else f"fp8 of fmt {shown(kind)}"
    if method != "compressed-tensors":
        return shown(method)
    kind, groups = quant.raw("format", "unknown"), quant.raw("config_groups")
    if kind not in ("float-quantized", "naive-quantized"):
        return f"compressed-tensors of format {shown(kind)}"
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(g, Mapping) for g in groups.values()):
        return f"compressed-tensors with config_groups {shown(groups)}"
    for group in groups.values():
        weights = group.get("weights")
        if not isinstance(weights, Mapping) or weights.get("num_bits") != 8 or weights.get("type") != "float":
            return f"compressed-tensors with weights {shown(weights)}"
        strategy, block = weights.get("strategy"), weights.get("block_structure")
        if strategy not in ("tensor", "channel", "block") or (strategy == "block" and block != list(_FP8_BLOCK)):
            return f"compressed-tensors with {shown(strategy)} scales of block_structure {shown(block)}"
    sparse = quant.raw("sparsity_config")
    if isinstance(sparse, Mapping) and sparse.get("format", "dense") != "dense":
        return f"compressed-tensors with sparsity {shown(sparse.get('format'))}"
    return None


class _Common:
    """What every family spells alike, read once."""

    def __init__(self, config: Config, *, activation_key: str = "hidden_act") -> None:
        if "quantization_config" in config:
            _check_stored_format(config)
        self.config = config
        self.n_layers = config.integer("num_hidden_layers", most=MAX_LAYERS)
        self.hidden = config.integer("hidden_size")
        self.n_heads = config.integer("num_attention_heads")
        self.n_kv_heads = config.integer("num_key_value_heads", self.n_heads)
        self.head_dim = config.integer("head_dim", max(1, self.hidden // self.n_heads), most=MAX_HEAD_DIM)
        self.width = config.integer("intermediate_size")
        self.bias = config.flag("attention_bias")
        self.eps = config.number("rms_norm_eps", 1e-6)
        config.only(activation_key, "silu", "gelu_pytorch_tanh")
        self.activation: Activation = "gelu_tanh" if config.raw(activation_key) == "gelu_pytorch_tanh" else "silu"

    def layer_types(self, default: Callable[[int], str]) -> list[str]:
        listed = self.config.strings("layer_types", options=(FULL, SLIDING), length=self.n_layers)
        return listed or [default(i) for i in range(self.n_layers)]

    def layer(self, index: int, *, window: int | None, rope: RopeSpec | None, mlp: MlpSpec, **more: Any) -> LayerSpec:
        """A layer with a cache of its own, scale head_dim ** -0.5 where `more` names no other."""
        return LayerSpec(
            index=index,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            window=window,
            kv_source=None,
            k_eq_v=False,
            rope=rope,
            mlp=mlp,
            **{"scale": self.head_dim**-0.5, **more},
        )

    def model(self, name: str, family: str, layers: list[LayerSpec], norms: Norms, **more: Any) -> ModelSpec:
        config = self.config
        bos = config.ids("bos_token_id")
        return ModelSpec(
            name=name,
            family=family,
            layers=tuple(checked_layer(layer, config.where) for layer in layers),
            vocab_size=config.integer("vocab_size"),
            hidden=self.hidden,
            max_context=config.integer("max_position_embeddings"),
            rms_eps=self.eps,
            norms=norms,
            tied=config.flag("tie_word_embeddings"),
            bos_id=bos[0] if bos else None,
            eos_ids=config.ids("eos_token_id"),
            **more,
        )


def checked_layer(layer: LayerSpec, where: str) -> LayerSpec:
    """Refuses shapes no kernel and no maths here could run, with both numbers."""
    if layer.n_heads % layer.n_kv_heads:
        raise SpecError(
            f"{where}: layer {layer.index} has {layer.n_heads} query heads for {layer.n_kv_heads} KV heads",
            why="every KV head serves a whole number of query heads",
            do="check the file against its source",
        )
    if layer.head_dim % 2:
        raise SpecError(
            f"{where}: layer {layer.index} has head_dim {layer.head_dim}",
            why="rotary pairs need an even head size",
            do="check the file against its source",
        )
    return layer


def _rope(config: Config, head_dim: int, *, theta: float | None = None, max_context: int | None = None) -> RopeSpec:
    """One set of rope parameters, in either spelling (`rope_parameters` or the older `rope_scaling`)."""
    kind = config.raw("rope_type", config.raw("type", "default"))
    theta = config.number("rope_theta", theta, least=_LEAST_THETA)
    original = max_context if kind in ("llama3", "yarn") else None
    if kind == "default":
        rope = default_rope(head_dim, theta)
    elif kind == "proportional":
        partial = config.number("partial_rotary_factor", 1.0, most=1.0)
        rope = proportional_rope(head_dim, theta, partial=partial)
    elif kind == "linear":
        rope = linear_rope(head_dim, theta, factor=config.number("factor"))
    elif kind == "llama3":
        rope = llama3_rope(
            head_dim,
            theta,
            factor=config.number("factor"),
            low_freq_factor=config.number("low_freq_factor"),
            high_freq_factor=config.number("high_freq_factor"),
            original_context=config.integer("original_max_position_embeddings", original),
        )
    elif kind == "yarn":
        attention_factor = config.optional_number("attention_factor")
        if "mscale" in config and "mscale_all_dim" in config:  # two magnitudes of one form, which cancel at 1
            config.only("mscale", 1.0)
            config.only("mscale_all_dim", 1.0)
            attention_factor = attention_factor or 1.0
        for key in ("mscale", "mscale_all_dim"):  # one alone changes nothing
            config.raw(key)
        rope = yarn_rope(
            head_dim,
            theta,
            factor=config.number("factor"),
            original_context=config.integer("original_max_position_embeddings", original),
            beta_fast=config.number("beta_fast", 32.0),
            beta_slow=config.number("beta_slow", 1.0),
            truncate=config.flag("truncate", True),
            attention_factor=attention_factor,
        )
    else:
        raise SpecError(
            f"{config.where}: rope_type {shown(kind)} is not supported",
            why="its frequencies are not built here",
            do="known: default, proportional, linear, llama3, yarn",
        )
    if kind != "proportional":
        config.only("partial_rotary_factor", 1.0)
    config.refuse_unread(harmless=())
    return rope


def _single_rope(common: _Common, *, default_theta: float = 10_000.0) -> RopeSpec:
    """The rope of a family that has the same one on every layer that has any."""
    config = common.config
    theta = config.number("rope_theta", default_theta, least=_LEAST_THETA)
    max_context = config.integer("max_position_embeddings")
    new, old = config.raw("rope_parameters"), config.raw("rope_scaling")
    if new is not None and old is not None and new != old:
        raise _two_ropes(config)
    key = "rope_scaling" if new is None else "rope_parameters"
    return _rope(config.section(key), common.head_dim, theta=theta, max_context=max_context)


def _two_ropes(config: Config) -> SpecError:
    return SpecError(
        f"{config.where}: rope_parameters and rope_scaling contradict each other",
        why="both describe the rope, and they differ",
        do="remove the one that is wrong; rope_scaling is the older spelling",
    )


def _ropes_by_type(
    config: Config, heads: Collection[tuple[str, int]], defaults: Mapping[str, Mapping[str, Any]]
) -> dict[tuple[str, int], RopeSpec]:
    """(type of layer, head size) -> rope, of a family with one rope for sliding and one for full layers."""
    given = config.section("rope_parameters") if "rope_parameters" in config else Config(defaults, where=config.where)
    ropes = {(kind, dim): _rope(given.section(kind), dim, theta=defaults[kind]["rope_theta"]) for kind, dim in heads}
    given.refuse_unread(harmless=(FULL, SLIDING))
    return ropes


def _gemma4(config: Config, name: str) -> ModelSpec:
    c = _Common(config, activation_key="hidden_activation")
    config.only("use_bidirectional_attention", "vision")  # text tokens stay causal; "all" is another model
    types = c.layer_types(lambda i: FULL if (i + 1) % 6 == 0 else SLIDING)
    types = [*types[:-1], FULL]
    window = config.integer("sliding_window")
    k_eq_v = config.flag("attention_k_eq_v")
    global_dim = config.integer("global_head_dim", 512, most=MAX_HEAD_DIM)
    global_kv = config.optional_integer("num_global_key_value_heads")
    heads = {
        SLIDING: (c.head_dim, c.n_kv_heads),
        FULL: (global_dim, global_kv if k_eq_v and global_kv else c.n_kv_heads),
    }
    per_layer = config.section("per_layer_config")
    key_of = {key.lstrip("0") or "0": key for key in per_layer.values if key}  # written with leading zeros: 05, 11
    overrides = []
    for i, kind in enumerate(types):
        own = per_layer.section(key_of.get(str(i), str(i)))
        dim, n_kv = heads[kind] if "per_layer_config" not in config else (c.head_dim, c.n_kv_heads)
        overrides.append((own.integer("head_dim", dim, most=MAX_HEAD_DIM), own.integer("num_key_value_heads", n_kv)))
        own.refuse_unread(harmless=())
    per_layer.refuse_unread(harmless=())
    sizes = {dim for dim, _ in overrides}
    if len(sizes) > _MAX_HEAD_SIZES:
        raise SpecError(
            f"{config.where}: per_layer_config gives the layers {len(sizes)} head sizes",
            why=f"each is a table of frequencies; at most {_MAX_HEAD_SIZES} are built",
            do="check the file against its source",
        )
    ropes = _ropes_by_type(
        config,
        {(kind, dim) for kind, (dim, _) in zip(types, overrides, strict=True)},
        {
            SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
            FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
        },
    )
    n_shared = config.integer("num_kv_shared_layers", 0, least=0, most=c.n_layers - 1)
    first_shared = c.n_layers - n_shared
    owners = {kind: i for i, kind in enumerate(types[:first_shared])}  # the last owner of each kind wins
    double_wide = config.flag("use_double_wide_mlp")
    moe = None
    if config.flag("enable_moe_block"):
        moe = MoeSpec(
            n_experts=config.integer("num_experts"),
            n_active=config.integer("top_k_experts", most=config.integer("num_experts")),
            width=config.integer("moe_intermediate_size"),
            selection="softmax_topk",
            renormalise=True,
            activation=c.activation,
            beside_dense=True,
        )
    else:
        for key in ("num_experts", "top_k_experts", "moe_intermediate_size"):
            config.raw(key)
    layers = []
    for i, (kind, (head_dim, n_kv)) in enumerate(zip(types, overrides, strict=True)):
        shared = i >= first_shared
        if shared and kind not in owners:
            raise SpecError(
                f"{config.where}: layer {i} shares the cache of a {kind} layer, and none owns one",
                why=f"num_kv_shared_layers is {n_shared} of {c.n_layers}",
                do="check the file against its source",
            )
        layers.append(
            LayerSpec(
                index=i,
                n_heads=c.n_heads,
                n_kv_heads=n_kv,
                head_dim=head_dim,
                window=window if kind == SLIDING else None,
                kv_source=owners[kind] if shared else None,
                k_eq_v=k_eq_v and kind == FULL,
                rope=ropes[kind, head_dim],
                scale=1.0,
                qk_norm=True,
                v_norm=True,
                qkv_bias=c.bias,
                o_bias=c.bias,
                mlp=MlpSpec(width=c.width * (2 if double_wide and shared else 1), activation=c.activation, moe=moe),
            )
        )
    ple_dim = config.integer("hidden_size_per_layer_input", 0, least=0)
    ple_vocab = config.integer("vocab_size_per_layer_input", 262_144, least=1 if ple_dim else 0)  # the 12B writes 0
    return c.model(
        name,
        "gemma4",
        layers,
        "sandwich",
        embed_scale=c.hidden**0.5,
        final_softcap=config.optional_number("final_logit_softcapping"),
        ple=PleSpec(dim=ple_dim, vocab_size=ple_vocab) if ple_dim else None,
        layer_scalar=True,
    )


def _gemma3(config: Config, name: str) -> ModelSpec:
    c = _Common(config, activation_key="hidden_activation")
    config.only("use_bidirectional_attention", False)
    pattern = config.integer("sliding_window_pattern", 6)
    types = c.layer_types(lambda i: FULL if (i + 1) % pattern == 0 else SLIDING)
    window = config.integer("sliding_window")
    local = config.number("rope_local_base_freq", 10_000.0, least=_LEAST_THETA)
    theta = config.number("rope_theta", 1_000_000.0, least=_LEAST_THETA)
    kinds = {(kind, c.head_dim) for kind in (SLIDING, FULL)}
    if "rope_parameters" in config:
        if config.raw("rope_scaling") is not None:
            raise _two_ropes(config)
        ropes = _ropes_by_type(config, kinds, {SLIDING: {"rope_theta": local}, FULL: {"rope_theta": theta}})
    else:
        scaled = _rope(config.section("rope_scaling"), c.head_dim, theta=theta)
        ropes = {(SLIDING, c.head_dim): default_rope(c.head_dim, local), (FULL, c.head_dim): scaled}
    scale = config.number("query_pre_attn_scalar") ** -0.5
    softcap = config.optional_number("attn_logit_softcapping")
    layers = [
        c.layer(
            i,
            window=window if kind == SLIDING else None,
            rope=ropes[kind, c.head_dim],
            scale=scale,
            softcap=softcap,
            qk_norm=True,
            qkv_bias=c.bias,
            o_bias=c.bias,
            mlp=MlpSpec(width=c.width, activation=c.activation),
        )
        for i, kind in enumerate(types)
    ]
    return c.model(
        name,
        "gemma3",
        layers,
        "sandwich",
        embed_scale=c.hidden**0.5,
        final_softcap=config.optional_number("final_logit_softcapping"),
    )


def _exaone4(config: Config, name: str) -> ModelSpec:
    c = _Common(config)
    window = config.optional_integer("sliding_window")
    pattern = config.raw("sliding_window_pattern", 4)
    if isinstance(pattern, str):  # "LLLG": local and global layers in turn, and the last is global
        if not pattern or set(pattern) - {"L", "G"}:
            raise SpecError(
                f"{config.where}: sliding_window_pattern = {pattern[:60]!r}",
                why="it must be letters L (local) and G (global), or a whole number",
                do="check the file against its source",
            )
        full = {i for i in range(c.n_layers) if pattern[i % len(pattern)] == "G"} | {c.n_layers - 1}
    else:
        period = config.integer("sliding_window_pattern", 4, least=0 if window is None else 1, most=MAX_LAYERS)
        full = {i for i in range(c.n_layers) if period and (i + 1) % period == 0}
    types = c.layer_types(lambda i: FULL if window is None or i in full else SLIDING)
    rope = _single_rope(c)
    layers = [
        c.layer(
            i,
            window=window if kind == SLIDING else None,
            rope=rope if window is None or kind == SLIDING else None,  # full layers of a hybrid have no rope
            qk_norm=True,
            mlp=MlpSpec(width=c.width, activation=c.activation),
        )
        for i, kind in enumerate(types)
    ]
    return c.model(name, "exaone4", layers, "post")


def _window_if_used(config: Config) -> int | None:
    """Qwen writes a window into every config and says beside it whether it is used."""
    window = config.optional_integer("sliding_window")
    return window if config.flag("use_sliding_window") else None


def _qwen3(config: Config, name: str) -> ModelSpec:
    c = _Common(config)
    window = _window_if_used(config)
    first = config.integer("max_window_layers", 28, least=0)
    types = c.layer_types(lambda i: SLIDING if window and i >= first else FULL)
    mlp = MlpSpec(width=c.width, activation=c.activation)
    layers = _plain_layers(c, [window if kind == SLIDING else None for kind in types], [mlp] * c.n_layers, qk_norm=True)
    return c.model(name, "qwen3", layers, "pre")


def _qwen3_moe(config: Config, name: str) -> ModelSpec:
    c = _Common(config)
    window = _window_if_used(config)
    config.raw("max_window_layers")
    n_experts = config.integer("num_experts", config.raw("num_local_experts"))
    moe = MoeSpec(
        n_experts=n_experts,
        n_active=config.integer("num_experts_per_tok", most=n_experts),
        width=config.integer("moe_intermediate_size"),
        selection="softmax_topk",
        renormalise=config.flag("norm_topk_prob"),
        activation=c.activation,
    )
    step = config.integer("decoder_sparse_step", 1)
    dense = set(config.ids("mlp_only_layers"))
    mlps = [
        MlpSpec(width=0, activation=c.activation, moe=moe)
        if i not in dense and (i + 1) % step == 0
        else MlpSpec(width=c.width, activation=c.activation)
        for i in range(c.n_layers)
    ]
    return c.model(name, "qwen3_moe", _plain_layers(c, [window] * c.n_layers, mlps, qk_norm=True), "pre")


def _llama(config: Config, name: str) -> ModelSpec:
    c = _Common(config)
    mlp = MlpSpec(width=c.width, activation=c.activation, bias=config.flag("mlp_bias"))
    return c.model(name, "llama", _plain_layers(c, [None] * c.n_layers, [mlp] * c.n_layers), "pre")


def _mistral(config: Config, name: str) -> ModelSpec:
    c = _Common(config)
    window = config.optional_integer("sliding_window")
    mlp = MlpSpec(width=c.width, activation=c.activation)
    return c.model(name, "mistral", _plain_layers(c, [window] * c.n_layers, [mlp] * c.n_layers), "pre")


def _gpt_oss(config: Config, name: str) -> ModelSpec:
    c = _Common(config)
    config.only("swiglu_limit", 7.0)
    config.only("swiglu_alpha", 1.702)
    config.raw("initial_context_length")  # the older spelling of rope's original context, which rope carries too
    window = config.optional_integer("sliding_window")
    types = c.layer_types(lambda i: FULL if i % 2 else SLIDING)
    n_experts = config.integer("num_local_experts", config.raw("num_experts"))
    active = config.raw("experts_per_token")
    moe = MoeSpec(
        n_experts=n_experts,
        n_active=config.integer("num_experts_per_tok", active, most=n_experts),
        width=c.width,
        selection="topk_softmax",
        renormalise=False,
        activation="swiglu_clamped",
        bias=True,
    )
    mlp = MlpSpec(width=0, activation="swiglu_clamped", moe=moe)
    windows = [window if kind == SLIDING else None for kind in types]
    layers = _plain_layers(c, windows, [mlp] * c.n_layers, sinks=True, default_theta=150_000.0)
    return c.model(name, "gpt_oss", layers, "pre")


def _plain_layers(
    c: _Common,
    windows: list[int | None],
    mlps: list[MlpSpec],
    *,
    qk_norm: bool = False,
    sinks: bool = False,
    default_theta: float = 10_000.0,
) -> list[LayerSpec]:
    """Layers of the Llama kind: pre-norm, one rope, scale head_dim ** -0.5."""
    rope = _single_rope(c, default_theta=default_theta)
    return [
        c.layer(i, window=window, rope=rope, mlp=mlp, sinks=sinks, qk_norm=qk_norm, qkv_bias=c.bias, o_bias=c.bias)
        for i, (window, mlp) in enumerate(zip(windows, mlps, strict=True))
    ]


_FAMILIES: Mapping[str, tuple[Callable[[Config, str], ModelSpec], Mapping[str, Any]]] = {  # reader, absent values
    "gemma4": (_gemma4, _GEMMA4),
    "gemma4_text": (_gemma4, _GEMMA4),
    "gemma4_unified": (_gemma4, _GEMMA4_UNIFIED),
    "gemma4_unified_text": (_gemma4, _GEMMA4_UNIFIED),
    "gemma3_text": (_gemma3, _GEMMA3),
    "gemma3": (_gemma3, _GEMMA3),
    "exaone4": (_exaone4, _EXAONE4),
    "qwen3": (_qwen3, _QWEN3),
    "qwen3_moe": (_qwen3_moe, _QWEN3_MOE),
    "llama": (_llama, {}),
    "mistral": (_mistral, _MISTRAL),
    "gpt_oss": (_gpt_oss, _GPT_OSS),
}
