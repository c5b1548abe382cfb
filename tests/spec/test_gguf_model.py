import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_bytes import ARRAY, BOOL, F32, I32, STRING, U32, gguf_bytes, tensor
from gguf_files import add_metadata
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headwise.errors import SpecError
from headwise.spec.gguf import GgufFile, read_gguf
from headwise.spec.gguf_model import spec_from_gguf
from headwise.spec.hf import spec_from_config
from headwise.spec.layers import LayerSpec, ModelSpec

FULL, SLIDING = "full_attention", "sliding_attention"
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
PLAIN = {
    "vocab_size": 40, "hidden_size": 48, "num_hidden_layers": 4, "intermediate_size": 80, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
GEMMA4 = {
    "model_type": "gemma4_text", "vocab_size": 40, "hidden_size": 48, "intermediate_size": 80,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32, "rms_norm_eps": 1e-6,
    "sliding_window": 13, "max_position_embeddings": 512, "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1,
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 40,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    },
}  # fmt: skip
K_EQ_V = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}

# case -> (GGUF architecture, Hugging Face config); several shapes of one family where real models differ in kind
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4-e2b": (
        "gemma4",
        GEMMA4
        | {
            "num_hidden_layers": 10, "layer_types": [SLIDING, SLIDING, SLIDING, SLIDING, FULL] * 2,
            "num_key_value_heads": 1, "num_kv_shared_layers": 5, "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "gemma4-31b": ("gemma4", GEMMA4 | K_EQ_V | {"num_hidden_layers": 6, "layer_types": [SLIDING, SLIDING, FULL] * 2}),
    "gemma4-26b-a4b": (
        "gemma4",
        GEMMA4
        | K_EQ_V
        | {
            "num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, "enable_moe_block": True, "num_experts": 7,
            "top_k_experts": 3, "moe_intermediate_size": 24,
        },
    ),
    "gemma3": (
        "gemma3",
        GEMMA4
        | {
            "model_type": "gemma3_text", "num_hidden_layers": 6, "layer_types": [SLIDING] * 5 + [FULL],
            "query_pre_attn_scalar": 16, "final_logit_softcapping": None, "global_head_dim": None,
            "hidden_size_per_layer_input": None, "vocab_size_per_layer_input": None,
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
                FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            },
        },
    ),
    "exaone4-32b": (
        "exaone4",
        PLAIN | {
            "model_type": "exaone4", "sliding_window": 13, "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
            "rope_parameters": LLAMA3,
        },
    ),
    "exaone4-1.2b": (
        "exaone4",
        PLAIN | {
            "model_type": "exaone4", "sliding_window": None, "layer_types": [FULL] * 4, "rope_parameters": LLAMA3,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("qwen3", PLAIN | {"model_type": "qwen3", "rope_theta": 1_000_000.0}),
    "qwen3-yarn": (
        "qwen3",
        PLAIN | {
            "model_type": "qwen3", "rope_theta": 1_000_000.0,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        },
    ),
    "qwen3-moe": (
        "qwen3moe",
        PLAIN | {
            "model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
            "norm_topk_prob": True, "mlp_only_layers": [1], "rope_theta": 1_000_000.0,
        },
    ),
    "llama": ("llama", PLAIN | {"model_type": "llama", "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-biases": ("llama", PLAIN | {"model_type": "llama", "attention_bias": True, "mlp_bias": True}),
    "mistral-as-llama": ("llama", PLAIN | {"model_type": "mistral", "rope_theta": 1e9, "sliding_window": None}),
    "mistral3": ("mistral3", PLAIN | {"model_type": "mistral", "rope_theta": 1e9, "sliding_window": None}),
    "gpt-oss": (
        "gpt-oss",
        PLAIN | {
            "model_type": "gpt_oss", "attention_bias": True, "sliding_window": 13, "num_local_experts": 5,
            "layer_types": [SLIDING, FULL] * 2, "num_experts_per_tok": 2, "intermediate_size": 48,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 150_000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "truncate": False, "original_max_position_embeddings": 64,
            },
        },
    ),
}  # fmt: skip


def write(path: Path, case: str) -> Path:
    """What llama.cpp's converter writes for a config: its keys through gguf-py, its tensors with zeros."""
    arch, config = CASES[case]
    w = gguf.GGUFWriter(path, arch)
    g = add_metadata(w, arch, config)
    w.add_token_list(["t"] * config["vocab_size"])
    n, hidden, n_heads = (config[k] for k in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    types, dims, kv_heads, widths, factors = g.types, g.dims, g.kv_heads, g.widths, g.factors
    n_shared, n_experts, expert_width = g.n_shared, g.n_experts, g.expert_width

    def add(name: str, *shape: int) -> None:
        w.add_tensor(name, np.zeros(shape, np.float16))

    add("token_embd.weight", config["vocab_size"], hidden)
    add("output_norm.weight", hidden)
    if not config["tie_word_embeddings"]:
        add("output.weight", config["vocab_size"], hidden)
    if factors:
        w.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    if ple := config.get("hidden_size_per_layer_input"):
        add("per_layer_token_embd.weight", config["vocab_size_per_layer_input"], ple * n)
    for i, (dim, kv, width) in enumerate(zip(dims, kv_heads, widths, strict=True)):
        owns = i < n - n_shared
        add(f"blk.{i}.attn_q.weight", n_heads * dim, hidden)
        if owns:
            add(f"blk.{i}.attn_k.weight", kv * dim, hidden)
        if owns and not (config.get("attention_k_eq_v") and types[i] == FULL):
            add(f"blk.{i}.attn_v.weight", kv * dim, hidden)
        add(f"blk.{i}.attn_output.weight", hidden, n_heads * dim)
        if config.get("attention_bias"):
            add(f"blk.{i}.attn_q.bias", n_heads * dim)
            add(f"blk.{i}.attn_output.bias", hidden)
        if arch == "gemma4":
            add(f"blk.{i}.layer_output_scale.weight", 1)
        if arch == "gpt-oss":
            add(f"blk.{i}.ffn_gate_inp.bias", n_experts)
        if n_experts and i not in config.get("mlp_only_layers", []):
            add(f"blk.{i}.ffn_gate_inp.weight", n_experts, hidden)
            add(f"blk.{i}.ffn_gate_exps.weight", n_experts, expert_width, hidden)
        if not n_experts or arch == "gemma4" or i in config.get("mlp_only_layers", []):
            add(f"blk.{i}.ffn_gate.weight", width, hidden)
            if config.get("mlp_bias"):
                add(f"blk.{i}.ffn_up.bias", width)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def without_rope(spec: ModelSpec) -> ModelSpec:
    return replace(spec, layers=tuple(replace(layer, rope=None) for layer in spec.layers))


def refused(file: GgufFile, *words: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        spec_from_gguf(file)
    assert caught.value.why and caught.value.do
    for word in words:
        assert word in str(caught.value)
    return caught.value


def changed(file: GgufFile, *, drop: Any = (), **keys: Any) -> GgufFile:
    """`file` with metadata keys set (`__` for a dot, the architecture's name in front) and keys or tensors dropped."""
    arch = file.metadata["general.architecture"]
    metadata = dict(file.metadata) | {f"{arch}.{k.replace('__', '.')}": v for k, v in keys.items()}
    return replace(
        file,
        metadata={k: v for k, v in metadata.items() if k not in drop and k.removeprefix(f"{arch}.") not in drop},
        tensors={k: v for k, v in file.tensors.items() if k not in drop},
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, GgufFile]:
    folder = tmp_path_factory.mktemp("gguf")
    return {case: read_gguf(write(folder / f"{case}.gguf", case)) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_a_gguf_and_a_hugging_face_config_of_one_model_give_one_spec(files, case):
    """Two doors that disagree plan two sizes for one model."""
    ours = spec_from_gguf(files[case])
    theirs = spec_from_config(copy.deepcopy(CASES[case][1]), name=case)
    if case == "mistral-as-llama":
        theirs = replace(theirs, family="llama")  # the file does not say that it is a Mistral

    assert without_rope(replace(ours, name=case)) == without_rope(theirs)
    for mine, its in zip(ours.layers, theirs.layers, strict=True):
        assert (mine.rope is None) == (its.rope is None)
        if mine.rope and its.rope:
            assert (mine.rope.theta, mine.rope.rotated_dims) == (its.rope.theta, its.rope.rotated_dims)
            assert mine.rope.inv_freq == pytest.approx(its.rope.inv_freq, rel=1e-6)  # factors are stored as f32
            assert mine.rope.magnitude == its.rope.magnitude


def test_numbers_are_the_decimals_that_the_config_had(files):
    """1e-6 stored as f32 reads 9.99999997e-07, and no two specs are ever equal."""
    spec = spec_from_gguf(files["gemma4-31b"])

    assert spec.rms_eps == 1e-6
    assert [layer.rope.theta for layer in spec.layers if layer.rope] == [1e4, 1e4, 1e6] * 2


def test_a_shared_layer_reads_the_last_owner_of_its_kind(files):
    """Gemma 4 E2B: charging the 5 sharing layers for a cache doubles the plan."""
    spec = spec_from_gguf(files["gemma4-e2b"])

    assert [layer.kv_source for layer in spec.layers] == [None] * 5 + [3, 3, 3, 3, 4]
    assert [layer.mlp.width for layer in spec.layers] == [80] * 5 + [160] * 5


def test_a_missing_v_projection_is_k_eq_v_in_full_layers_only(files):
    """No key says it: with V planned, 31B's full layers take 60 % more; in a sliding layer the file is damaged."""
    file = files["gemma4-31b"]

    assert [layer.k_eq_v for layer in spec_from_gguf(file).layers] == [False, False, True] * 2
    refused(changed(file, drop=("blk.1.attn_v.weight",)), "blk.1.attn_v.weight")
    refused(changed(file, drop=("blk.2.attn_k.weight",)), "blk.2.attn_k.weight")


@pytest.mark.parametrize("case", CASES)
def test_a_key_that_nobody_reads_is_an_error_that_names_it(files, case):
    """A new key of a new converter changes the maths; dropping it gives fluent nonsense."""
    file = changed(files[case], attention__surprise=2.5)
    key = f"{CASES[case][0]}.attention.surprise"

    error = refused(file, f"{key!r} = 2.5")

    assert error.do.startswith(f"--ignore-key {key}")
    assert spec_from_gguf(file, ignore_keys=[key]) == spec_from_gguf(files[case])


def test_keys_that_change_the_maths_are_refused_unless_neutral(files):
    """Each is read by llama.cpp, and not built here."""
    rows: list[tuple[str, str, Any, Any]] = [
        ("mistral3", "attention__temperature_scale", 0.0, 0.1),
        ("llama", "expert_count", 0, 8),
        ("llama", "attention__causal", True, False),
        ("exaone4-32b", "nextn_predict_layers", 0, 1),
        ("qwen3-yarn", "rope__scaling__yarn_attn_factor", 1.0, 1.2),
        ("qwen3-moe", "expert_gating_func", 1, 2),
    ]
    for case, key, neutral, active in rows:
        assert spec_from_gguf(changed(files[case], **{key: neutral})) == spec_from_gguf(files[case])
        refused(changed(files[case], **{key: active}), key.replace("__", "."))


@pytest.mark.parametrize(
    ("case", "keys", "says"),
    [
        ("llama", {"block_count": 2**40}, "llama.block_count = 1099511627776"),
        ("llama", {"block_count": 0}, "llama.block_count = 0"),
        ("llama", {"block_count": -1}, "llama.block_count = -1"),
        ("llama", {"block_count": True}, "llama.block_count = True"),
        ("llama", {"block_count": 5}, "blk.4.attn_k.weight"),
        ("llama", {"attention__head_count": 0}, "llama.attention.head_count = 0"),
        ("llama", {"attention__head_count": 5}, "5 query heads for 2 KV heads"),
        ("llama", {"attention__head_count_kv": "2"}, "llama.attention.head_count_kv = '2'"),
        ("llama", {"attention__key_length": 2**31 - 1}, "llama.attention.key_length"),
        ("llama", {"attention__key_length": 15, "attention__value_length": 15}, "rope_freqs.weight does not fit"),
        ("llama", {"attention__value_length": 32}, "llama.attention.value_length = 32"),
        ("llama", {"rope__dimension_count": 8}, "llama.rope.dimension_count"),
        ("llama", {"rope__freq_base": 1.0}, "llama.rope.freq_base = 1.0"),
        ("llama", {"rope__freq_base": float("nan")}, "llama.rope.freq_base = nan"),
        ("llama", {"rope__scaling__type": "longrope"}, "llama.rope.scaling.type = 'longrope'"),
        ("llama", {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0}, "rope is scaled twice"),
        ("llama", {"embedding_length": None}, "llama.embedding_length is missing"),
        ("llama", {"context_length": 2**63}, "llama.context_length"),
        ("gemma4-31b", {"attention__head_count_kv": [2, 2, 1]}, "gemma4.attention.head_count_kv has 3 values"),
        ("gemma4-31b", {"attention__head_count_kv": [2, 2, 0, 2, 2, 1]}, "gemma4.attention.head_count_kv[2] = 0"),
        ("gemma4-31b", {"attention__sliding_window_pattern": [True] * 7}, "sliding_window_pattern has 7 values"),
        ("gemma4-31b", {"attention__sliding_window_pattern": [True, 2] * 3}, "sliding_window_pattern"),
        ("gemma4-31b", {"attention__sliding_window_pattern": 0}, "sliding_window_pattern = 0"),
        ("gemma4-31b", {"attention__sliding_window": None}, "gemma4.attention.sliding_window is missing"),
        ("gemma4-31b", {"attention__key_length_swa": None}, "gemma4.attention.key_length_swa is missing"),
        ("gemma4-e2b", {"attention__shared_kv_layers": 10}, "gemma4.attention.shared_kv_layers = 10"),
        ("gemma4-e2b", {"attention__shared_kv_layers": 6}, "and none owns one"),
        ("gemma4-e2b", {"feed_forward_length": [80] * 9}, "gemma4.feed_forward_length has 9 values"),
        ("qwen3-moe", {"expert_used_count": 7}, "qwen3moe.expert_used_count = 7"),
        ("gpt-oss", {"expert_count": 0}, "gpt-oss.expert_count = 0"),
    ],
)
def test_absurd_values_are_refused_by_name(files, case, keys, says):
    """A damaged count must not become a list of 2^40 layers, or a division by zero."""
    refused(changed(files[case], **keys), says)


def test_an_unknown_architecture_lists_the_known_ones(files):
    """ "unsupported" without the list sends the user to the source."""
    file = changed(files["llama"])
    metadata = dict(file.metadata) | {"general.architecture": "mamba2"}
    refused(replace(file, metadata=metadata), "'mamba2'", "gemma4, gpt-oss")
    refused(replace(file, metadata={}), "is not supported")
    refused(replace(file, metadata=metadata | {"general.type": "mmproj"}), "no language model", "'mmproj'")


def test_a_missing_tensor_is_named(files):
    """A vocabulary-only file has every key and no model."""
    refused(changed(files["llama"], drop=("token_embd.weight",)), "token_embd.weight")
    refused(changed(files["gemma4-31b"], drop=("rope_freqs.weight",)), "rope_freqs.weight")
    refused(changed(files["gemma4-e2b"], drop=("per_layer_token_embd.weight",)), "per_layer_token_embd.weight")
    refused(changed(files["qwen3-moe"], drop=("blk.1.ffn_gate.weight",)), "blk.1.ffn_gate.weight")


def test_rope_factors_of_the_wrong_type_or_value_are_refused(tmp_path):
    """A zero divides, and a huge tensor would be read whole."""
    keys = {
        "general.architecture": (STRING, "llama"), "llama.block_count": (U32, 1), "llama.context_length": (U32, 9),
        "llama.embedding_length": (U32, 8), "llama.attention.head_count": (U32, 2),
        "llama.feed_forward_length": (U32, 8), "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
    }  # fmt: skip
    names = ["token_embd.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"]
    for code, dims, says in (
        (0, (2,), "finite and > 0"),
        (0, (3,), "3 values"),
        (1, (2,), "f16"),
        (0, (2**19,), "few"),
    ):
        rows = [tensor(name, (8, 2), 0, 64 * i) for i, name in enumerate(names)]
        rows.append(tensor("rope_freqs.weight", dims, code, 192))
        path = tmp_path / "m.gguf"
        path.write_bytes(gguf_bytes(keys, rows, bytes(192 + 4 * dims[0])))

        refused(read_gguf(path), says)


def test_gemma3_27b_scales_its_scores_by_hidden_over_heads(tmp_path):
    """query_pre_attn_scalar is 168 there and head_dim 128; no key says so, but 62 layers do."""
    names = ["token_embd.weight"] + [f"blk.{i}.attn_{x}.weight" for i in range(62) for x in "kv"]
    keys = {
        "general.architecture": (STRING, "gemma3"), "gemma3.block_count": (U32, 62), "gemma3.context_length": (U32, 9),
        "gemma3.embedding_length": (U32, 5376), "gemma3.attention.head_count": (U32, 32),
        "gemma3.attention.key_length": (U32, 128), "gemma3.attention.value_length": (U32, 128),
        "gemma3.feed_forward_length": (U32, 8), "gemma3.attention.layer_norm_rms_epsilon": (F32, 1e-6),
    }  # fmt: skip
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(keys, [tensor(name, (4,), 0, 32 * i) for i, name in enumerate(names)], bytes(32 * 125)))

    assert {layer.scale for layer in spec_from_gguf(read_gguf(path)).layers} == {168**-0.5}


def test_two_magnitudes_of_yarn_cancel(files):
    """Ministral 3 has both mscale and mscale_all_dim at 1: its cos and sin are not scaled, where YaRN's own are."""
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 16.0, "rope__scaling__original_context_length": 64}
    plain = changed(files["mistral3"], **yarn)
    both = changed(plain, rope__scaling__yarn_log_multiplier=1.0)

    magnitudes = [spec_from_gguf(f).layers[0].rope.magnitude for f in (plain, both)]  # type: ignore[union-attr]
    assert magnitudes == [0.1 * math.log(16) + 1, 1.0]


# files that Ollama made


def test_ollamas_gemma3_gets_the_scaling_that_its_converter_dropped(files):
    """Its 4B, 12B and 27B files lack the factor 8: right up to 16,384 tokens, and wrong beyond."""
    plain = changed(files["gemma3"], drop=("rope.scaling.type", "rope.scaling.factor"), context_length=131_072)

    ollama = changed(plain, mm__tokens_per_image=256, vision__block_count=27, rope__local__freq_base=10_000.0)

    wide = [spec_from_gguf(f).of_kind("global")[0].rope for f in (plain, ollama, changed(ollama, context_length=32_768))]
    assert [rope.inv_freq[0] for rope in wide if rope] == [1.0, 0.125, 1.0]


def test_ollamas_first_gpt_oss_files_are_read(files):
    """They call the architecture gptoss, and leave out two keys."""
    file = files["gpt-oss"]
    skip = ("gpt-oss.rope.scaling.type", "gpt-oss.expert_feed_forward_length")
    metadata = {k.replace("gpt-oss.", "gptoss."): v for k, v in file.metadata.items() if k not in skip}

    spec = spec_from_gguf(replace(file, metadata=metadata | {"general.architecture": "gptoss"}))

    assert spec == replace(spec_from_gguf(file), name=spec.name)


def test_the_name_is_the_files_own_or_the_files(files):
    """A blob of Ollama's has a digest for a name; general.name says more."""
    file = files["llama"]
    assert spec_from_gguf(file).name == "llama"
    assert spec_from_gguf(replace(file, metadata=dict(file.metadata) | {"general.name": "Tiny 1"})).name == "Tiny 1"


def test_every_id_that_ends_a_turn_is_an_eos(files):
    """Llama 3's eot, Gemma's end of turn: with eos alone the model talks on."""
    metadata = dict(files["llama"].metadata) | {
        "tokenizer.ggml.eot_token_id": 9,
        "tokenizer.ggml.eos_token_ids": [2, 7],
    }

    assert spec_from_gguf(replace(files["llama"], metadata=metadata)).eos_ids == (2, 9, 7)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64), st.floats(), st.text(max_size=4), st.integers(0, 64),
    st.lists(st.integers(-2, 70000) | st.booleans() | st.floats(), max_size=11),
)  # fmt: skip


@settings(max_examples=300, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(CASES)), st.data())
def test_any_value_of_any_key_gives_a_spec_or_a_spec_error(files, case, data):
    """Nothing in a header may raise anything else, or take a second."""
    file = files[case]
    keys = sorted(k for k in file.metadata if k.startswith(CASES[case][0]))
    damage = data.draw(st.dictionaries(st.sampled_from(keys), VALUES, min_size=1, max_size=3))

    try:
        spec = spec_from_gguf(replace(file, metadata=dict(file.metadata) | damage))
    except SpecError as error:
        assert error.what and error.why and error.do
    else:
        assert all(isinstance(layer, LayerSpec) and layer.n_heads > 0 for layer in spec.layers)


def test_arrays_of_the_header_are_decoded(tmp_path):
    """A pattern that stays in the file unread would look like a wrong type."""
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes({"general.architecture": (STRING, "gemma4"), "gemma4.block_count": (ARRAY, (I32, [1]))}))
    refused(read_gguf(path), "gemma4.block_count = [1]")
    path.write_bytes(gguf_bytes({"general.architecture": (STRING, "gemma4"), "gemma4.x": (ARRAY, (BOOL, [True] * 5000))}))
    refused(read_gguf(path), "gemma4.block_count is missing")
