from collections import Counter
from fractions import Fraction
from typing import Any

import pytest

from headwise.errors import UsageError
from headwise.planner.quantise import SCHEMES, weight_types
from headwise.planner.residence import weight_bytes
from headwise.spec import catalogue
from headwise.spec.hf import spec_from_config
from headwise.spec.layers import ModelSpec
from headwise.spec.tensors import weight_tensors

# Parameters, and the bytes of a Q8_0 and a Q4_K_M file, counted from transformers' classes without this code.
COUNTED = {
    "gemma-4-e2b": (4_628_569_344, 4_918_694_912, 3_400_201_216),
    "gemma-4-e4b": (7_463_013_376, 7_931_097_088, 5_284_759_552),
    "gemma-4-12b": (11_907_350_272, 12_653_820_928, 7_357_447_168),
    "gemma-4-26b-a4b": (25_233_141_760, 26_844_035_072, 16_774_244_352),
    "gemma-4-31b": (30_697_345_280, 32_619_840_512, 18_682_582_016),
    "gemma-3-270m": (268_098_176, 285_018_624, 197_672_704),
    "gemma-3-1b": (999_885_952, 1_062_773_248, 668_429_824),
    "gemma-3-4b": (3_880_263_168, 4_123_860_992, 2_483_352_832),
    "gemma-3-12b": (11_766_034_176, 12_503_660_544, 7_294_226_304),
    "gemma-3-27b": (27_009_346_304, 28_701_409_280, 16_540_125_824),
    "qwen3-0.6b": (596_049_920, 633_495_552, 390_753_280),
    "qwen3-1.7b": (1_720_574_976, 1_828_474_880, 1_101_457_408),
    "qwen3-4b": (4_022_468_096, 4_274_448_384, 2_491_323_904),
    "qwen3-8b": (8_190_735_360, 8_703_561_728, 5_021_827_072),
    "qwen3-14b": (14_768_307_200, 15_692_574_720, 8_995_793_920),
    "qwen3-32b": (32_762_123_264, 34_811_744_256, 19_756_174_336),
    "qwen3-30b-a3b": (30_532_122_624, 32_440_999_936, 18_550_716_416),
    "llama-3.2-3b": (3_212_749_824, 3_414_061_056, 2_011_539_456),
    "exaone-4.0-32b": (32_003_216_384, 34_005_405_696, 19_339_595_776),
    "exaone-4.0-1.2b": (1_279_391_488, 1_359_731_712, 808_229_888),
    "mistral-small-3.2-24b": (23_572_403_200, 25_046_896_640, 14_326_026_240),
    "gpt-oss-20b": (20_914_757_184, 22_248_903_936, 12_771_132_096),
}
# What that count leaves out or takes another way; each is right here by llama.cpp's own text.
# layer scalars are buffers, not parameters
LAYER_SCALARS = {"gemma-4-e2b": 35, "gemma-4-e4b": 42, "gemma-4-12b": 48, "gemma-4-26b-a4b": 30, "gemma-4-31b": 60}
PLE_PROJ = {"gemma-4-e2b": 35 * 256 * 1536, "gemma-4-e4b": 42 * 256 * 2560}  # stays bf16; counted as Q8_0
ROUTERS = {"qwen3-30b-a3b": 48 * 128 * 2048}  # stay f32; counted as Q8_0
Q8_0, Q4_K, Q5_0, Q6_K = Fraction(34, 32), Fraction(144, 256), Fraction(22, 32), Fraction(210, 256)  # bytes per value
# V projections at Q6_K: counted over all layers, where llama.cpp counts the tensors named attn_v, which K=V layers lack
V_AT_Q6_K = {
    "gemma-4-12b": (4, 8 * 256 * 3840),
    "gemma-4-26b-a4b": (4, 8 * 256 * 2816),
    "gemma-4-31b": (-2, 16 * 256 * 5376),
}
ROWS_OF_NO_WHOLE_BLOCKS = ("gemma-3-270m", "gemma-3-1b", "gpt-oss-20b")  # 640, 1152 and 2880 columns; counted as if they were


def n_bytes(spec: ModelSpec, scheme: str) -> int:
    return sum(weight_bytes(spec, weight_types(spec, scheme)).values())


def vectors(name: str) -> int:
    """Values kept in f32 (norms, biases), out of the counted Q8_0 size: total * 34/32 + vectors * (4 - 34/32)."""
    total, q8_0, _ = COUNTED[name]
    count = (q8_0 - total * Q8_0) / (4 - Q8_0)
    assert count.denominator == 1
    return int(count) + ROUTERS.get(name, 0)


def plain(n_layers: int = 32, **more: Any) -> ModelSpec:
    config = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": n_layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "hidden_act": "silu",
    }  # fmt: skip
    return spec_from_config(config | more, name="plain")


def where(spec: ModelSpec, scheme: str, part: str, kind: str) -> list[int]:
    types = weight_types(spec, scheme)
    return [layer.index for layer in spec.layers if types.get(f"layers.{layer.index}.{part}") == kind]


@pytest.fixture(params=COUNTED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_catalogue_model_has_a_count() -> None:
    """A model added without its bytes is a model whose plan nobody checked."""
    assert set(COUNTED) == set(catalogue.names())


def test_bf16_bytes_are_two_per_value_and_four_per_vector(name: str) -> None:
    """A GGUF keeps norms, biases and routers in f32 under every scheme."""
    expected = 2 * COUNTED[name][0] + 2 * vectors(name) + 4 * LAYER_SCALARS.get(name, 0)

    assert n_bytes(catalogue.spec(name), "bf16") == expected


def test_q8_0_bytes_agree_with_the_independent_count(name: str) -> None:
    """per_layer_model_proj (bf16) and routers (f32) are left alone; quantising them loses 37 MB on qwen3-30b-a3b."""
    expected = COUNTED[name][1] + 4 * LAYER_SCALARS.get(name, 0)
    expected += PLE_PROJ.get(name, 0) * (2 - Q8_0) + ROUTERS.get(name, 0) * (4 - Q8_0)

    assert n_bytes(catalogue.spec(name), "q8_0") == expected


def test_q4_k_m_bytes_agree_with_the_independent_count(name: str) -> None:
    """Every rule at once: one wrong layer of one tensor moves the sum."""
    spec = catalogue.spec(name)
    more, v_values = V_AT_Q6_K.get(name, (0, 0))
    expected = COUNTED[name][2] + 4 * LAYER_SCALARS.get(name, 0) + more * v_values * (Q6_K - Q4_K)
    if name in ROWS_OF_NO_WHOLE_BLOCKS:
        types = weight_types(spec, "q4_k_m")
        by_type = Counter[str]()
        for tensor in weight_tensors(spec):
            by_type[types[tensor.name]] += tensor.n_elements
        expected += by_type["q5_0"] * (Q5_0 - Q4_K) + by_type["q8_0"] * (Q8_0 - Q6_K)

    assert n_bytes(spec, "q4_k_m") == expected


@pytest.mark.parametrize(("model", "gib", "bpw"), [("gemma-4-12b", "6.86", "4.95"), ("gemma-4-26b-a4b", "15.63", "5.32")])
def test_q4_k_m_is_the_size_that_llama_cpp_prints(model: str, gib: str, bpw: str) -> None:
    """`print_info: file size` of two published files (zackshen/gguf#21, scrya-com/rotorquant#9)."""
    spec = catalogue.spec(model)
    size, values = n_bytes(spec, "q4_k_m"), sum(t.n_elements for t in weight_tensors(spec))

    assert f"{size / 2**30:.2f}" == gib
    assert f"{8 * size / values:.2f}" == bpw


def test_e2b_is_within_a_few_percent_of_a_file_with_its_maker_s_overrides() -> None:
    """animehacker/llama-turboquant#3 prints 3.21 GiB, with 70 tensors at Q5_K, a type that no rule of Q4_K_M gives.

    Beside those, the file carries 18,874,368 dead K and V values of the layers that share a cache.
    """
    size = n_bytes(catalogue.spec("gemma-4-e2b"), "q4_k_m")

    assert 0.98 < (size + 18_874_368 * Q6_K) / (3.21 * 2**30) < 1


@pytest.mark.parametrize(
    ("model", "printed"),
    [
        # scrya-com/rotorquant#9; gate and up of the experts are one tensor there, two here: 30 more at q4_K
        ("gemma-4-26b-a4b", {"f32": 392 - 1, "q5_0": 32, "q8_0": 28, "q4_k": 192 + 30, "q6_k": 14}),
        # rjmalagon/ollama-linux-amd-apu#19
        ("llama-3.2-3b", {"f32": 58 - 1, "q4_k": 168, "q6_k": 29}),
    ],
)
def test_q4_k_m_gives_as_many_tensors_of_each_type_as_llama_cpp_prints(model: str, printed: dict[str, int]) -> None:
    """`llama_model_loader: - type q4_K: 192 tensors`; minus one f32, which is rope_freqs and no weight."""
    assert Counter(weight_types(catalogue.spec(model), "q4_k_m").values()) == printed


def test_mxfp4_is_the_size_of_gpt_oss_as_published() -> None:
    """openai/gpt-oss-20b, model.safetensors.index.json: total_size 13761264768, with biases and norms in bf16."""
    size = n_bytes(catalogue.spec("gpt-oss-20b"), "mxfp4")

    assert size - 2 * vectors("gpt-oss-20b") == 13_761_264_768


def test_mxfp4_of_a_model_without_experts_is_refused() -> None:
    """It would have planned bf16 under the name of four bits."""
    with pytest.raises(UsageError, match="mxfp4 does not fit"):
        weight_types(plain(), "mxfp4")


def test_an_unknown_scheme_lists_the_known_ones() -> None:
    """`--weights q4km` was a KeyError."""
    with pytest.raises(UsageError) as caught:
        weight_types(plain(), "q4km")

    assert "q4_k_m" in caught.value.do


def test_schemes_are_named_in_either_case() -> None:
    """GGUF files are named Q4_K_M."""
    assert weight_types(plain(), "Q4_K_M") == weight_types(plain(), "q4_k_m")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_tensor_has_a_type_and_every_vector_is_f32(scheme: str) -> None:
    """A tensor without a type is a KeyError in the plan."""
    spec = catalogue.spec("gpt-oss-20b")
    types = weight_types(spec, scheme)

    assert list(types) == [t.name for t in weight_tensors(spec)]
    assert {types[t.name] for t in weight_tensors(spec) if t.role == "vector"} == {"f32"}


@pytest.mark.parametrize("scheme", ["q4_k_m", "q5_k_m"])
def test_v_and_down_get_more_bits_at_both_ends_and_in_every_third_layer(scheme: str) -> None:
    """32 layers: the first 4, the last 4, and from 4 on every third beginning with the third."""
    more = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]

    assert where(plain(), scheme, "v", "q6_k") == more
    assert where(plain(), scheme, "down", "q6_k") == more
    assert where(plain(), scheme, "k", "q6_k") == []


def test_q4_k_s_gives_five_bits_to_four_vs_and_the_first_eighth_of_downs() -> None:
    """The small mix has them too; without them it came out 0.5 % short."""
    assert where(plain(40), "q4_k_s", "v", "q5_k") == [0, 1, 2, 3]
    assert where(plain(40), "q4_k_s", "down", "q5_k") == [0, 1, 2, 3, 4]
    assert set(weight_types(plain(40), "q4_k_s").values()) == {"f32", "q4_k", "q5_k", "q6_k"}


def test_vs_are_counted_where_they_are() -> None:
    """Gemma 4's K=V layers have no attn_v, so every third V is in another layer than every third `down`.

    60 layers, 50 with V: the 7th V at Q6_K (i = 8) is in layer 9, after the K=V layer 5.
    """
    spec = catalogue.spec("gemma-4-31b")

    assert where(spec, "q4_k_m", "v", "q6_k")[:8] == [0, 1, 2, 3, 4, 6, 9, 13]
    assert where(spec, "q4_k_m", "down", "q6_k")[:8] == [0, 1, 2, 3, 4, 5, 6, 9]


@pytest.mark.parametrize(
    ("scheme", "tied", "embed", "head"),
    [
        ("q4_k_m", True, "q6_k", None), ("q4_k_m", False, "q4_k", "q6_k"), ("q4_k_s", False, "q4_k", "q6_k"),
        ("q5_k_m", True, "q6_k", None), ("q4_0", True, "q6_k", None), ("q4_0", False, "q4_0", "q6_k"),
        ("q6_k", False, "q6_k", "q6_k"), ("q8_0", True, "q8_0", None), ("bf16", False, "bf16", "bf16"),
    ],
)  # fmt: skip
def test_the_output_is_q6_k_and_a_tied_embedding_is_the_output(scheme: str, tied: bool, embed: str, head: str | None) -> None:
    """A fifth of gemma-3-1b is its embedding."""
    types = weight_types(plain(tie_word_embeddings=tied), scheme)

    assert (types["embed"], types.get("head")) == (embed, head)


def test_per_layer_embeddings_count_as_output_when_tied() -> None:
    """Half of an E2B file: llama.cpp takes per_layer_token_embd for a token embedding, and those are tied."""
    types = weight_types(catalogue.spec("gemma-4-e2b"), "q4_k_m")

    assert types["ple.embed"] == "q6_k"
    assert types["layers.0.ple_gate"] == types["layers.0.ple_proj"] == "q4_k"


@pytest.mark.parametrize(("scheme", "kind"), [("q4_k_m", "bf16"), ("q8_0", "bf16"), ("f16", "f16"), ("f32", "f32")])
def test_per_layer_model_proj_is_never_quantised(scheme: str, kind: str) -> None:
    """It is left as the unquantised file has it."""
    assert weight_types(catalogue.spec("gemma-4-e2b"), scheme)["ple.proj"] == kind


@pytest.mark.parametrize(
    ("hidden", "scheme", "q", "head"),
    [
        (96 * 4, "q4_k_m", "q5_0", "q8_0"), (96 * 4, "q5_k_m", "q5_1", "q8_0"), (96 * 4, "q6_k", "q8_0", "q8_0"),
        (96 * 4, "q4_0", "q4_0", "q8_0"), (100, "q4_k_m", "f16", "f16"), (100, "q8_0", "f16", "f16"), (100, "q4_0", "f16", "f16"),
    ],
)  # fmt: skip
def test_rows_that_are_no_whole_blocks_fall_back(hidden: int, scheme: str, q: str, head: str) -> None:
    """384 columns are 1.5 blocks of 256 and 12 of 32; 100 are whole blocks of neither."""
    types = weight_types(plain(hidden_size=hidden, head_dim=64), scheme)

    assert (types["layers.1.q"], types["head"]) == (q, head)


def test_a_down_projection_falls_back_from_what_its_layer_would_get() -> None:
    """26B-A4B: 704 and 2112 columns; Q6_K becomes Q8_0, Q4_K becomes Q5_0."""
    types = weight_types(catalogue.spec("gemma-4-26b-a4b"), "q4_k_m")

    assert [types[f"layers.{i}.down"] for i in (0, 3)] == ["q8_0", "q5_0"]
    assert [types[f"layers.{i}.experts_down"] for i in (0, 3)] == ["q8_0", "q5_0"]


def test_eight_experts_have_rules_of_their_own() -> None:
    """Mixtral: K and V at Q8_0, the output projection at Q5_K, where 7 or 9 experts have neither."""
    moe = {
        "model_type": "qwen3_moe", "num_experts_per_tok": 2, "moe_intermediate_size": 256, "head_dim": 128,
        "num_key_value_heads": 2,
    }  # fmt: skip
    eight, nine = plain(**moe, num_experts=8), plain(**moe, num_experts=9)

    for scheme, o in (("q4_k_m", "q5_k"), ("q4_k_s", "q5_k"), ("q5_k_m", "q5_k"), ("q6_k", "q6_k"), ("q4_0", "q4_0")):
        types = weight_types(eight, scheme)
        assert (types["layers.5.k"], types["layers.5.v"], types["layers.5.o"]) == ("q8_0", "q8_0", o)
    assert weight_types(eight, "bf16")["layers.5.k"] == "bf16"
    assert [weight_types(nine, "q4_k_m")[f"layers.5.{part}"] for part in "kvo"] == ["q4_k", "q4_k", "q4_k"]


def test_v_of_a_llama_70b_has_at_least_five_bits() -> None:
    """80 layers and fewer KV heads than heads; 80 layers with as many (65B), or 79, have no such rule."""
    assert "q4_k" not in {weight_types(plain(80), "q4_k_m")[f"layers.{i}.v"] for i in range(80)}
    assert weight_types(plain(80), "q4_k_m")["layers.10.v"] == "q5_k"
    assert weight_types(plain(79), "q4_k_m")["layers.10.v"] == "q4_k"
    assert weight_types(plain(80, num_key_value_heads=4), "q4_k_m")["layers.10.v"] == "q4_k"
