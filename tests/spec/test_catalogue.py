import json
from importlib import resources
from typing import Any

import pytest

from headwise.errors import SpecError
from headwise.spec import catalogue
from headwise.spec.kv import k_values, v_values
from headwise.spec.layers import LayerSpec, ModelSpec
from headwise.spec.tensors import weight_tensors

# Counted from transformers' classes, or taken from published configs, without this code.
# layers, full ones: first and step, window, heads, KV heads sliding and full, head sizes, context
SHAPES: dict[str, tuple[int, int, int, int | None, int, int, int, int, int, int]] = {
    "gemma-4-e2b": (35, 4, 5, 512, 8, 1, 1, 256, 512, 131072),
    "gemma-4-e4b": (42, 5, 6, 512, 8, 2, 2, 256, 512, 131072),
    "gemma-4-12b": (48, 5, 6, 1024, 16, 8, 1, 256, 512, 262144),
    "gemma-4-26b-a4b": (30, 5, 6, 1024, 16, 8, 2, 256, 512, 262144),
    "gemma-4-31b": (60, 5, 6, 1024, 32, 16, 4, 256, 512, 262144),
    "gemma-3-270m": (18, 5, 6, 512, 4, 1, 1, 256, 256, 32768),
    "gemma-3-1b": (26, 5, 6, 512, 4, 1, 1, 256, 256, 32768),
    "gemma-3-4b": (34, 5, 6, 1024, 8, 4, 4, 256, 256, 131072),
    "gemma-3-12b": (48, 5, 6, 1024, 16, 8, 8, 256, 256, 131072),
    "gemma-3-27b": (62, 5, 6, 1024, 32, 16, 16, 128, 128, 131072),
    "qwen3-0.6b": (28, 0, 1, None, 16, 8, 8, 128, 128, 40960),
    "qwen3-1.7b": (28, 0, 1, None, 16, 8, 8, 128, 128, 40960),
    "qwen3-4b": (36, 0, 1, None, 32, 8, 8, 128, 128, 40960),
    "qwen3-8b": (36, 0, 1, None, 32, 8, 8, 128, 128, 40960),
    "qwen3-14b": (40, 0, 1, None, 40, 8, 8, 128, 128, 40960),
    "qwen3-32b": (64, 0, 1, None, 64, 8, 8, 128, 128, 40960),
    "qwen3-30b-a3b": (48, 0, 1, None, 32, 4, 4, 128, 128, 40960),
    "llama-3.2-3b": (28, 0, 1, None, 24, 8, 8, 128, 128, 131072),
    "exaone-4.0-32b": (64, 3, 4, 4096, 40, 8, 8, 128, 128, 131072),
    "exaone-4.0-1.2b": (30, 0, 1, None, 32, 8, 8, 64, 64, 65536),
    "mistral-small-3.2-24b": (40, 0, 1, None, 32, 8, 8, 128, 128, 131072),
    "gpt-oss-20b": (24, 1, 2, 128, 64, 8, 8, 64, 64, 131072),
}
# parameters in all, of the embedding, of the per-layer embeddings, of the experts
PARAMETERS = {
    "gemma-4-e2b": (4_628_569_344, 402_653_184, 2_348_810_240, 0),
    "gemma-4-e4b": (7_463_013_376, 671_088_640, 2_818_572_288, 0),
    "gemma-4-12b": (11_907_350_272, 1_006_632_960, 0, 0),
    "gemma-4-26b-a4b": (25_233_141_760, 738_197_504, 0, 22_837_985_280),
    "gemma-4-31b": (30_697_345_280, 1_409_286_144, 0, 0),
    "gemma-3-270m": (268_098_176, 167_772_160, 0, 0),
    "gemma-3-1b": (999_885_952, 301_989_888, 0, 0),
    "gemma-3-4b": (3_880_263_168, 671_252_480, 0, 0),
    "gemma-3-12b": (11_766_034_176, 1_006_878_720, 0, 0),
    "gemma-3-27b": (27_009_346_304, 1_409_630_208, 0, 0),
    "qwen3-0.6b": (596_049_920, 155_582_464, 0, 0),
    "qwen3-1.7b": (1_720_574_976, 311_164_928, 0, 0),
    "qwen3-4b": (4_022_468_096, 388_956_160, 0, 0),
    "qwen3-8b": (8_190_735_360, 622_329_856, 0, 0),
    "qwen3-14b": (14_768_307_200, 777_912_320, 0, 0),
    "qwen3-32b": (32_762_123_264, 777_912_320, 0, 0),
    "qwen3-30b-a3b": (30_532_122_624, 311_164_928, 0, 28_991_029_248),
    "llama-3.2-3b": (3_212_749_824, 394_002_432, 0, 0),
    "exaone-4.0-32b": (32_003_216_384, 524_288_000, 0, 0),
    "exaone-4.0-1.2b": (1_279_391_488, 209_715_200, 0, 0),
    "mistral-small-3.2-24b": (23_572_403_200, 671_088_640, 0, 0),
    "gpt-oss-20b": (20_914_757_184, 579_133_440, 0, 19_116_933_120),
}
# layers that own a cache (full, sliding); values per token in them, K and V apart; the full ones with one tensor for both
KV: dict[str, tuple[int, int, int, int, int]] = {
    "gemma-4-e2b": (3, 12, 3072, 6144, 3072),
    "gemma-4-e4b": (4, 20, 8192, 20480, 8192),
    "gemma-4-12b": (8, 40, 8192, 163840, 5120),
    "gemma-4-26b-a4b": (5, 25, 10240, 102400, 6400),
    "gemma-4-31b": (10, 50, 40960, 409600, 25600),
    "gemma-3-270m": (3, 15, 1536, 7680, 1536),
    "gemma-3-1b": (4, 22, 2048, 11264, 2048),
    "gemma-3-4b": (5, 29, 10240, 59392, 10240),
    "gemma-3-12b": (8, 40, 32768, 163840, 32768),
    "gemma-3-27b": (10, 52, 40960, 212992, 40960),
    "qwen3-0.6b": (28, 0, 57344, 0, 57344),
    "qwen3-1.7b": (28, 0, 57344, 0, 57344),
    "qwen3-4b": (36, 0, 73728, 0, 73728),
    "qwen3-8b": (36, 0, 73728, 0, 73728),
    "qwen3-14b": (40, 0, 81920, 0, 81920),
    "qwen3-32b": (64, 0, 131072, 0, 131072),
    "qwen3-30b-a3b": (48, 0, 49152, 0, 49152),
    "llama-3.2-3b": (28, 0, 57344, 0, 57344),
    "exaone-4.0-32b": (16, 48, 32768, 98304, 32768),
    "exaone-4.0-1.2b": (30, 0, 30720, 0, 30720),
    "mistral-small-3.2-24b": (40, 0, 81920, 0, 81920),
    "gpt-oss-20b": (12, 12, 12288, 12288, 12288),
}
LAYER_SCALARS = {"gemma-4-e2b": 35, "gemma-4-e4b": 42, "gemma-4-12b": 48, "gemma-4-26b-a4b": 30, "gemma-4-31b": 60}


@pytest.fixture(params=SHAPES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def spec(name: str) -> ModelSpec:
    return catalogue.spec(name)


def values(layers: tuple[LayerSpec, ...]) -> int:
    """K and V apart, as every other engine stores them."""
    return sum(2 * layer.n_kv_heads * layer.head_dim for layer in layers if layer.kv_source is None)


def test_the_catalogue_is_the_table() -> None:
    """A model without a row here is one that nobody checked."""
    assert set(catalogue.names()) == set(SHAPES) == set(PARAMETERS) == set(KV)
    assert set(catalogue.specs()) == set(SHAPES)


def test_every_layer_has_its_published_shape(name: str, spec: ModelSpec) -> None:
    """One full layer in the wrong place moves the plan by a tenth."""
    n, first, step, window, heads, kv_sliding, kv_full, dim_sliding, dim_full, context = SHAPES[name]
    full = set(range(first, n, step))

    assert spec.max_context == context
    assert [
        (layer.window, layer.n_heads, layer.n_kv_heads, layer.head_dim) for layer in spec.layers
    ] == [
        (None, heads, kv_full, dim_full) if i in full else (window, heads, kv_sliding, dim_sliding) for i in range(n)
    ]  # fmt: skip


def test_every_parameter_is_counted_once(name: str, spec: ModelSpec) -> None:
    """A forgotten norm is invisible in GiB and fatal at load."""
    total, embedding, per_layer, experts = PARAMETERS[name]
    sizes = {t.name: t.n_elements for t in weight_tensors(spec)}

    assert sum(sizes.values()) == total + LAYER_SCALARS.get(name, 0)
    assert sizes["embed"] == embedding
    assert sizes.get("ple.embed", 0) == per_layer
    assert sum(n for tensor, n in sizes.items() if ".experts_" in tensor and "norm" not in tensor) == experts


def test_the_cache_holds_the_published_values_per_token(name: str, spec: ModelSpec) -> None:
    """Charging layers that share a cache, or a window for the whole context, plans up to ten times too much."""
    n_full, n_sliding, full, sliding, one_tensor = KV[name]
    owners = {kind: tuple(x for x in spec.of_kind(kind) if x.kv_source is None) for kind in ("global", "sliding")}

    assert (len(owners["global"]), len(owners["sliding"])) == (n_full, n_sliding)
    assert (values(owners["global"]), values(owners["sliding"])) == (full, sliding)
    assert sum(x.n_kv_heads * (k_values(x) + v_values(x)) for x in owners["global"]) == one_tensor


@pytest.mark.parametrize(("model", "first", "sliding", "full"), [("gemma-4-e2b", 15, 13, 14), ("gemma-4-e4b", 24, 22, 23)])
def test_sharing_layers_read_the_last_owner_of_their_kind(model: str, first: int, sliding: int, full: int) -> None:
    """Layers before `first` own their cache; after, sliding layers read one of them and full layers another."""
    for layer in catalogue.spec(model).layers:
        expected = None if layer.index < first else (full if layer.kind == "global" else sliding)
        assert layer.kv_source == expected


def test_k_and_v_are_one_projection_in_full_layers_of_three_sizes(name: str, spec: ModelSpec) -> None:
    """12B, 26B-A4B and 31B; E2B and E4B have a V projection everywhere."""
    one = name in ("gemma-4-12b", "gemma-4-26b-a4b", "gemma-4-31b")

    assert [layer.k_eq_v for layer in spec.layers] == [one and layer.kind == "global" for layer in spec.layers]


def test_only_exaone_32b_has_layers_without_rope(name: str, spec: ModelSpec) -> None:
    """NoPE on its full layers; the 1.2B has no window and turns everywhere."""
    without = [layer.index for layer in spec.layers if layer.rope is None]

    assert without == (list(range(3, 64, 4)) if name == "exaone-4.0-32b" else [])


@pytest.mark.parametrize(
    ("model", "kind", "theta", "rope", "rotated"),
    [
        ("gemma-4-31b", "sliding", 1e4, "default", 256),
        ("gemma-4-31b", "global", 1e6, "proportional", 128),
        ("gemma-3-1b", "global", 1e6, "default", 256),
        ("gemma-3-27b", "global", 1e6, "linear", 128),
        ("gemma-3-27b", "sliding", 1e4, "default", 128),
        ("qwen3-8b", "global", 1e6, "default", 128),
        ("llama-3.2-3b", "global", 5e5, "llama3", 128),
        ("exaone-4.0-32b", "sliding", 1e6, "llama3", 128),
        ("mistral-small-3.2-24b", "global", 1e9, "default", 128),
        ("gpt-oss-20b", "sliding", 1.5e5, "yarn", 64),
        ("gpt-oss-20b", "global", 1.5e5, "yarn", 64),
    ],
)
def test_ropes_have_their_published_base(model: str, kind: Any, theta: float, rope: str, rotated: int) -> None:
    """A wrong theta is fluent up to a few hundred tokens."""
    found = catalogue.spec(model).of_kind(kind)[0].rope

    assert found is not None
    assert (found.theta, found.kind, found.rotated_dims) == (theta, rope, rotated)


@pytest.mark.parametrize(
    ("model", "scale"),
    [("gemma-4-31b", 1.0), ("gemma-3-27b", 168**-0.5), ("gemma-3-12b", 256**-0.5), ("exaone-4.0-1.2b", 64**-0.5)],
)
def test_attention_is_scaled_as_published(model: str, scale: float) -> None:
    """Gemma 4 does not scale at all; gemma-3-27b by 168, which is no head size."""
    assert {layer.scale for layer in catalogue.spec(model).layers} == {scale}


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("gemma4:26b", "gemma-4-26b-a4b"), ("gemma4:e4b", "gemma-4-e4b"), ("gemma4", "gemma-4-e4b"),
        ("gemma4:latest", "gemma-4-e4b"), ("gemma3:27b", "gemma-3-27b"), ("gemma3", "gemma-3-4b"),
        ("qwen3:30b", "qwen3-30b-a3b"), ("qwen3:30b-a3b", "qwen3-30b-a3b"), ("qwen3", "qwen3-8b"),
        ("llama3.2:3b", "llama-3.2-3b"), ("llama3.2", "llama-3.2-3b"), ("gpt-oss:20b", "gpt-oss-20b"),
        ("gpt-oss", "gpt-oss-20b"), ("mistral-small3.2:24b", "mistral-small-3.2-24b"),
        ("google/gemma-4-31B-it", "gemma-4-31b"), ("google/gemma-4-31b", "gemma-4-31b"),
        ("GOOGLE/GEMMA-4-31B-IT", "gemma-4-31b"), ("gemma-4-31B-it", "gemma-4-31b"), ("Gemma_4_31B", "gemma-4-31b"),
        ("Qwen/Qwen3-0.6B", "qwen3-0.6b"), ("meta-llama/Llama-3.2-3B-Instruct", "llama-3.2-3b"),
        ("Llama-3.2-3B", "llama-3.2-3b"), ("LGAI-EXAONE/EXAONE-4.0-32B", "exaone-4.0-32b"), ("EXAONE-4.0-1.2B", "exaone-4.0-1.2b"),
        ("mistralai/Mistral-Small-3.2-24B-Instruct-2506", "mistral-small-3.2-24b"), ("openai/gpt-oss-20b", "gpt-oss-20b"),
        ("  gemma-4-12b ", "gemma-4-12b"),
    ],
)  # fmt: skip
def test_every_real_spelling_finds_its_model(said: str, meant: str) -> None:
    """What people type is what `ollama list` or a model card shows them."""
    assert catalogue.find(said) == meant
    assert catalogue.spec(said).name == meant


@pytest.mark.parametrize(
    "said",
    [
        "gemma-43-1b", "gemma-5", "gemma4:9b", "unsloth/gemma-4-31B-it", "models/qwen3-8b", "gemma4:31b-it-q4_K_M",
        "exaone4:32b", "qwen3-8b-base", "Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-4b-instruct-2507",
        "", "-", "/", "x" * 5000, "gpt-oss-120b",
    ],
)  # fmt: skip
def test_what_is_another_model_is_not_found(said: str) -> None:
    """A copy, a tag with a type of its own, a mistyped path or a later release (2507) was taken for the original."""
    assert catalogue.find(said) is None
    with pytest.raises(SpecError) as caught:
        catalogue.spec(said)
    assert "the catalogue has: gemma-4-e2b" in caught.value.do
    assert len(caught.value.what) < 100


@pytest.mark.parametrize(
    ("said", "near"), [("gemma-4-32b", "gemma-4-31b"), ("qwen-3-9b", "qwen3-8b"), ("gpt-oss-120b", "gpt-oss-20b")]
)
def test_an_unknown_name_shows_the_nearest(said: str, near: str) -> None:
    """Nobody remembers whether it is 26b or 27b."""
    with pytest.raises(SpecError, match="nearest names are") as caught:
        catalogue.spec(said)

    assert near in caught.value.why


def test_a_repository_that_is_not_in_the_catalogue_is_offered_from_the_hub() -> None:
    """`unsloth/gemma-4-31B-it` without hf: is the most likely slip."""
    with pytest.raises(SpecError) as caught:
        catalogue.spec("unsloth/gemma-4-31B-it")

    assert caught.value.do.startswith("hf:unsloth/gemma-4-31B-it reads it from the Hub")
    assert "gemma-4-31b" in caught.value.why


def test_repositories_are_named_for_download(name: str) -> None:
    """The message to a user without weights pastes it after hf:."""
    repository = catalogue.repository(name)

    assert repository is not None and repository.count("/") == 1
    assert catalogue.find(repository) == name
    assert catalogue.repository("nothing") is None


def test_no_two_models_share_a_spelling_and_each_names_its_sources() -> None:
    """The first entry would have won in silence."""
    entries = json.loads(resources.files("headwise").joinpath("data/catalogue.json").read_text(encoding="utf-8"))

    for name, entry in entries.items():
        assert name == name.lower()
        assert set(entry) == {"repository", "ollama", "sources", "config"}
        assert len(entry["sources"]) > 20
        for spelling in (name, entry["repository"], *entry["ollama"]):
            assert catalogue.find(spelling) == name
