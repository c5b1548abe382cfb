import pytest
import tiny
import torch

from headwise.spec import catalogue
from headwise.spec.hf import spec_from_config
from headwise.spec.layers import ModelSpec
from headwise.spec.tensors import TensorSpec, weight_tensors

EXPERTS = ("experts_gate", "experts_up", "experts_down")


def spec_of(name: str) -> ModelSpec:
    return spec_from_config(tiny.model_config(name).to_diff_dict(), name=name)


def layer_names(spec: ModelSpec, layer: int) -> str:
    prefix = f"layers.{layer}."
    return " ".join(t.name.removeprefix(prefix) for t in weight_tensors(spec) if t.name.startswith(prefix))


def shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    return {t.name: t.shape for t in weight_tensors(spec)}


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_the_tensors_hold_as_many_values_as_transformers_model(name: str) -> None:
    """A norm or a bias that is not listed is not loaded, and the decoder runs without it.

    transformers' parameters, and Gemma 4's layer scalars, which are buffers there. It fuses some matrices, so sums are
    what both have in common; a tied head counts once.
    """
    net = tiny.model(name)
    theirs = sum(p.numel() for p in net.parameters())
    theirs += sum(b.numel() for key, b in net.named_buffers() if key.endswith("layer_scalar"))

    assert sum(t.n_elements for t in weight_tensors(spec_of(name))) == theirs


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_the_shapes_are_those_of_transformers_model(name: str) -> None:
    """Rows and columns swapped give the right sum; every matrix here is (out, in)."""
    ours = sorted(t.shape for t in weight_tensors(spec_of(name)) if t.role in ("matrix", "table"))
    theirs = sorted(
        tuple(m.weight.shape)
        for key, m in tiny.model(name).named_modules()
        if isinstance(m, (torch.nn.Linear, torch.nn.Embedding)) and "router" not in key
        if not (key == "lm_head" and spec_of(name).tied)
    )

    assert ours == theirs


LAYERS = {  # the order of a forward pass
    ("gemma4-31b", 0): "attn_norm q k v q_norm k_norm o attn_post_norm mlp_norm gate up down mlp_post_norm layer_scalar",
    ("gemma4-31b", 2): "attn_norm q k q_norm k_norm o attn_post_norm mlp_norm gate up down mlp_post_norm layer_scalar",
    ("gemma4-26b-a4b", 1): "attn_norm q k q_norm k_norm o attn_post_norm mlp_norm gate up down router router_scale "
    "expert_scale mlp_post_norm_1 experts_norm experts_post_norm experts_gate experts_up experts_down mlp_post_norm "
    "layer_scalar",
    ("gemma4-e2b", 0): "attn_norm q k v q_norm k_norm o attn_post_norm mlp_norm gate up down mlp_post_norm "
    "ple_gate ple_proj ple_post_norm layer_scalar",
    ("gemma4-e2b", 9): "attn_norm q q_norm o attn_post_norm mlp_norm gate up down mlp_post_norm "
    "ple_gate ple_proj ple_post_norm layer_scalar",
    ("gemma3", 0): "attn_norm q k v q_norm k_norm o attn_post_norm mlp_norm gate up down mlp_post_norm",
    ("exaone4", 3): "q k v q_norm k_norm o attn_post_norm gate up down mlp_post_norm",
    ("qwen3", 0): "attn_norm q k v q_norm k_norm o mlp_norm gate up down",
    ("qwen3-moe", 0): "attn_norm q k v q_norm k_norm o mlp_norm router experts_gate experts_up experts_down",
    ("qwen3-moe", 1): "attn_norm q k v q_norm k_norm o mlp_norm gate up down",
    ("llama", 0): "attn_norm q k v o mlp_norm gate up down",
    ("mistral", 0): "attn_norm q k v o mlp_norm gate up down",
    ("gpt-oss", 0): "attn_norm q q_bias k k_bias v v_bias sinks o o_bias mlp_norm router router_bias "
    "experts_gate experts_gate_bias experts_up experts_up_bias experts_down experts_down_bias",
}


@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_a_layer_has_the_tensors_of_its_family(name: str, layer: int) -> None:
    """A K=V layer has no v; one that reads another's cache has no k, v or k_norm, though checkpoints carry dead ones."""
    assert layer_names(spec_of(name), layer) == LAYERS[name, layer]


@pytest.mark.parametrize(
    ("name", "around"),
    [
        ("gemma4-e2b", ["embed", "ple.embed", "ple.proj", "ple.norm", "norm"]),
        ("gemma4-31b", ["embed", "norm"]),
        ("llama", ["embed", "norm"]),
        ("qwen3", ["embed", "norm", "head"]),
        ("gpt-oss", ["embed", "norm", "head"]),
    ],
)
def test_a_tied_model_has_no_head_of_its_own(name: str, around: list[str]) -> None:
    """Counted twice, the embedding of gemma-3-1b is another 30 % of the model."""
    assert [t.name for t in weight_tensors(spec_of(name)) if not t.name.startswith("layers.")] == around


def test_gemma_4_e2b_has_its_published_shapes() -> None:
    """One row of per-layer embeddings is 35 * 256 = 8960 values; layers 15 to 34 have an MLP of twice the width."""
    e2b = shapes(catalogue.spec("gemma-4-e2b"))

    assert e2b["ple.embed"] == (262_144, 8960) and e2b["ple.proj"] == (8960, 1536) and e2b["ple.norm"] == (256,)
    assert e2b["layers.14.gate"] == (6144, 1536) and e2b["layers.15.gate"] == (12_288, 1536)
    assert e2b["layers.15.down"] == (1536, 12_288)
    assert e2b["layers.4.q"] == (8 * 512, 1536) and e2b["layers.4.k"] == (512, 1536) and e2b["layers.4.k_norm"] == (512,)
    assert e2b["layers.0.q"] == (8 * 256, 1536) and e2b["layers.0.o"] == (1536, 8 * 256)
    assert "layers.15.k" not in e2b and e2b["layers.15.q_norm"] == (256,)
    assert e2b["layers.0.ple_gate"] == (256, 1536) and e2b["layers.0.ple_proj"] == (1536, 256)


def test_experts_are_stacks_and_routers_stay_whole() -> None:
    """26B-A4B: 128 experts of 704 beside a dense MLP of 2112; a router in four bits picks other experts."""
    tensors = {t.name: t for t in weight_tensors(catalogue.spec("gemma-4-26b-a4b"))}

    assert [tensors[f"layers.0.{name}"].shape for name in EXPERTS] == [(128, 704, 2816)] * 2 + [(128, 2816, 704)]
    assert {tensors[f"layers.0.{name}"].role for name in EXPERTS} == {"experts"}
    assert tensors["layers.0.gate"].shape == (2112, 2816)
    assert (tensors["layers.0.router"].shape, tensors["layers.0.router"].role) == ((128, 2816), "vector")
    assert tensors["layers.0.expert_scale"].shape == (128,) and tensors["layers.0.router_scale"].shape == (2816,)


def test_gpt_oss_has_a_bias_for_each_expert() -> None:
    """32 experts of 2880: biases of gate and up have the width of the expert, those of down the width of the stream."""
    gpt_oss = shapes(catalogue.spec("gpt-oss-20b"))

    assert gpt_oss["layers.0.experts_gate_bias"] == gpt_oss["layers.0.experts_down_bias"] == (32, 2880)
    assert gpt_oss["layers.0.q_bias"] == (64 * 64,) and gpt_oss["layers.0.k_bias"] == (8 * 64,)
    assert gpt_oss["layers.0.o_bias"] == (2880,) and gpt_oss["layers.0.sinks"] == (64,)
    narrow = shapes(spec_from_config(tiny.model_config("gpt-oss", intermediate_size=32).to_diff_dict(), name="m"))
    assert [narrow[f"layers.0.{name}_bias"] for name in EXPERTS] == [(5, 32), (5, 32), (5, 64)]


def test_an_mlp_with_biases_has_three() -> None:
    """Llama's mlp_bias: two of the MLP's width, one of the stream's."""
    config = tiny.model_config("llama", mlp_bias=True, attention_bias=True).to_diff_dict()
    spec = spec_from_config(config, name="m")

    assert layer_names(spec, 0) == "attn_norm q q_bias k k_bias v v_bias o o_bias mlp_norm gate gate_bias up up_bias down down_bias"
    assert [shapes(spec)[f"layers.0.{name}_bias"] for name in ("gate", "up", "down", "q", "v")] == [
        (160,), (160,), (96,), (96,), (32,),
    ]  # fmt: skip


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_tensor_is_named_once_and_each_role_has_its_dimensions(name: str) -> None:
    """The loader fills them by name, the planner chooses a type by role."""
    tensors = weight_tensors(spec_of(name))

    assert len({t.name for t in tensors}) == len(tensors)
    assert {t.role: len(t.shape) for t in tensors if t.role != "vector"}.items() <= {"table": 2, "matrix": 2, "experts": 3}.items()
    assert [t.name for t in tensors if t.role == "table"] == ["embed"] + ["ple.embed"] * (name == "gemma4-e2b")


def test_a_tensor_s_values_are_counted_exactly() -> None:
    """2**31 rows of 2**31 are more than an int64 of a tensor library holds in one product of three."""
    assert TensorSpec("x", (2**31, 2**31, 3), "experts").n_elements == 3 * 2**62
    assert TensorSpec("x", (1,), "vector").n_elements == 1
