from dataclasses import replace
from typing import Any

import pytest

from headwise.planner.memory import Workload, plan
from headwise.planner.quantise import weight_types
from headwise.planner.residence import FLOAT_TYPES, KEPT_TYPES, groups, multiplied, planed, resident_types, weight_bytes
from headwise.spec import catalogue
from headwise.spec.ggml import GGML_TYPES, by_name
from headwise.spec.hf import spec_from_config
from headwise.spec.kv import KVFormat, kv_format
from headwise.spec.layers import Kind, ModelSpec
from headwise.spec.tensors import weight_tensors
from headwise.weights.blocks import BLOCK_TYPES

E2B = catalogue.spec("gemma-4-e2b")
QWEN = catalogue.spec("qwen3-8b")  # its head is not its embedding
GPT_OSS = catalogue.spec("gpt-oss-20b")


def small(**more: Any) -> ModelSpec:
    config: dict[str, Any] = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "hidden_act": "silu",
    }  # fmt: skip
    return spec_from_config(config | more, name="small")


def resident(spec: ModelSpec, stored: str, *, cpu: bool, dtype: str = "bf16") -> dict[str, str]:
    """All tensors stored as `stored`, but for vectors."""
    types = {t.name: "f32" if t.role == "vector" else stored for t in weight_tensors(spec)}
    return resident_types(spec, types, cpu=cpu, dtype=dtype)


def of_role(spec: ModelSpec, types: dict[str, str], *roles: str) -> set[str]:
    return {types[t.name] for t in weight_tensors(spec) if t.role in roles}


def test_what_the_planner_keeps_is_what_the_loader_can_expand() -> None:
    """A type planned as kept and expanded at load needs seven times its planned bytes."""
    assert KEPT_TYPES == BLOCK_TYPES
    assert all(by_name(kind).quantised for kind in KEPT_TYPES)
    assert not KEPT_TYPES & FLOAT_TYPES
    assert not any(by_name(kind).quantised for kind in FLOAT_TYPES)


@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("spec", [E2B, QWEN, GPT_OSS], ids=lambda spec: spec.name)
def test_vectors_are_fp32_everywhere(spec: ModelSpec, dtype: str, cpu: bool) -> None:
    """Norms, biases, sinks and routers are a thousandth of a model and most of its accuracy."""
    for stored in ("f32", "bf16", "q4_k"):
        types = resident_types(spec, {t.name: stored for t in weight_tensors(spec)}, cpu=cpu, dtype=dtype)
        assert of_role(spec, types, "vector") == {"f32"}


@pytest.mark.parametrize("stored", sorted(KEPT_TYPES))
def test_a_gpu_keeps_quantised_weights_as_they_are_stored(stored: str) -> None:
    """Expanded, a 16 GiB file of gemma-4-31b is 57 GiB."""
    for spec in (E2B, QWEN, GPT_OSS):
        assert of_role(spec, resident(spec, stored, cpu=False), "matrix", "experts", "table") == {stored}


@pytest.mark.parametrize("stored", ["q4_k", "q8_0", "mxfp4"])
def test_a_cpu_expands_what_is_multiplied_and_keeps_what_is_looked_up(stored: str) -> None:
    """Half of E2B is a table of which a token reads one row; PyTorch multiplies floats only."""
    e2b, qwen, gpt_oss = (resident(spec, stored, cpu=True, dtype="f32") for spec in (E2B, QWEN, GPT_OSS))

    assert e2b["ple.embed"] == stored and e2b["embed"] == "f32"  # tied: it is the output projection too
    assert qwen["embed"] == gpt_oss["embed"] == stored
    assert qwen["head"] == "f32"
    assert of_role(E2B, e2b, "matrix") == of_role(QWEN, qwen, "matrix") == of_role(GPT_OSS, gpt_oss, "matrix", "experts") == {"f32"}


@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize("stored", sorted(FLOAT_TYPES))
@pytest.mark.parametrize("dtype", sorted(FLOAT_TYPES))
def test_floats_take_the_activations_type(dtype: str, stored: str, cpu: bool) -> None:
    """A product of bf16 and f16 is an error in PyTorch, and an fp32 file need not double the memory."""
    for spec in (E2B, QWEN, GPT_OSS):
        assert of_role(spec, resident(spec, stored, cpu=cpu, dtype=dtype), "matrix", "experts", "table") == {dtype}


@pytest.mark.parametrize("stored", sorted({t.name for t in GGML_TYPES.values()} - KEPT_TYPES - FLOAT_TYPES))
def test_a_type_that_no_kernel_reads_is_planned_as_expanded(stored: str) -> None:
    """IQ4_XS planned at 4 bits and held at 16 is the plan that ends in out-of-memory."""
    assert of_role(QWEN, resident(QWEN, stored, cpu=False), "matrix", "table") == {"bf16"}


def test_every_tensor_has_a_home_and_no_other_does() -> None:
    """A tensor of the file that the model does not read (a dead K of a sharing layer) is not planned for."""
    stored = weight_types(E2B, "q4_k_m") | {"layers.15.k": "q4_k", "vision.patch": "f16"}

    assert list(resident_types(E2B, stored, cpu=False, dtype="bf16")) == [t.name for t in weight_tensors(E2B)]
    with pytest.raises(KeyError, match="embed"):
        resident_types(E2B, {}, cpu=False, dtype="bf16")


def test_bytes_are_values_times_the_bits_of_their_type() -> None:
    """512 * 512 values: 144 bytes per 256 in Q4_K, 18 per 32 in Q4_0, 2 each in bf16."""
    spec = small()
    types = {t.name: "f32" for t in weight_tensors(spec)} | {
        "embed": "q4_k", "layers.0.q": "q4_0", "layers.0.o": "bf16", "layers.0.k": "q6_k", "layers.0.down": "q8_0",
    }  # fmt: skip

    sizes = weight_bytes(spec, types)

    assert list(sizes) == [t.name for t in weight_tensors(spec)]
    assert sizes["embed"] == 512 * 512 // 256 * 144
    assert sizes["layers.0.q"] == 512 * 512 // 32 * 18
    assert sizes["layers.0.o"] == 512 * 512 * 2
    assert sizes["layers.0.k"] == 256 * 512 // 256 * 210
    assert sizes["layers.0.down"] == 512 * 1024 // 32 * 34
    assert sizes["norm"] == 512 * 4 and sizes["head"] == 512 * 512 * 4


def test_a_type_that_does_not_divide_a_tensor_is_a_caller_s_bug() -> None:
    """48 * 100 values are 18.75 blocks of 256."""
    spec = small(hidden_size=100, head_dim=64)

    with pytest.raises(ValueError, match="not whole blocks of 256"):
        weight_bytes(spec, {t.name: "q4_k" for t in weight_tensors(spec)})


def test_matrices_of_one_input_and_one_type_lie_together() -> None:
    """One product for q, k and v instead of three: at batch 1, a third of the launches of attention."""
    spec = small()
    types = dict.fromkeys((t.name for t in weight_tensors(spec)), "bf16")

    assert groups(spec, types) == {
        "layers.0.qkv": ("layers.0.q", "layers.0.k", "layers.0.v"),
        "layers.0.gate_up": ("layers.0.gate", "layers.0.up"),
    }


def test_matrices_of_two_types_lie_apart() -> None:
    """Q4_K_M gives every third V six bits: a row of another length in the same allocation."""
    spec = small()
    types = dict.fromkeys((t.name for t in weight_tensors(spec)), "q4_k") | {"layers.0.v": "q6_k", "layers.0.up": "q5_k"}

    assert groups(spec, types) == {}


def test_groups_hold_what_a_layer_has() -> None:
    """K=V layers have no v, layers that read another's cache only q, and experts no dense MLP."""
    for name, first, second in (("gemma-4-31b", 0, 5), ("gemma-4-e2b", 0, 15)):
        spec = catalogue.spec(name)
        types = dict.fromkeys((t.name for t in weight_tensors(spec)), "bf16")
        found = groups(spec, types)
        assert found[f"layers.{first}.qkv"] == tuple(f"layers.{first}.{x}" for x in "qkv")
        assert found.get(f"layers.{second}.qkv") == (("layers.5.q", "layers.5.k") if second == 5 else None)
        assert sum(key.endswith(".gate_up") for key in found) == len(spec.layers)
    types = dict.fromkeys((t.name for t in weight_tensors(GPT_OSS)), "bf16")
    assert {key.rsplit(".", 1)[-1] for key in groups(GPT_OSS, types)} == {"qkv", "experts_gate_up"}


def test_experts_of_a_layer_are_re_tiled_all_or_none() -> None:
    """Half a layer on kernels needs both forms' buffers and neither's arithmetic; Q5_K_M gives 26B-A4B down projections in Q5_1."""
    a4b = catalogue.spec("gemma-4-26b-a4b")
    experts = {t.name for t in weight_tensors(a4b) if t.role == "experts"}

    def types(scheme: str) -> dict[str, str]:
        return resident_types(a4b, weight_types(a4b, scheme), cpu=False, dtype="bf16")

    assert types("q4_k_m")["layers.0.experts_down"] == "q8_0" and types("q4_k_m")["layers.3.experts_down"] == "q5_0"
    assert experts <= planed(a4b, types("q4_k_m")) and len(multiplied(a4b, types("q4_k_m"))) == 30
    assert types("q5_k_m")["layers.3.experts_down"] == "q5_1"
    whole = multiplied(a4b, types("q5_k_m"))
    assert 0 in whole and 3 not in whole
    assert {n for n in planed(a4b, types("q5_k_m")) & experts if n.startswith("layers.3.")} == set()
    for scheme in ("bf16", "fp8"):
        assert len(multiplied(a4b, types(scheme))) == 30 and not planed(a4b, types(scheme))
    for other in ("fp8_block", "bf16"):  # up under scales of another form than gate's, or floats
        assert set(range(30)) - multiplied(a4b, types("fp8") | {"layers.3.experts_up": other}) == {3}
    assert 3 in multiplied(a4b, types("fp8") | {"layers.3.experts_down": "fp8_block"})


def test_a_router_of_more_experts_than_ours_takes_is_left_to_pytorch() -> None:
    layer = GPT_OSS.layers[0]
    assert layer.mlp.moe
    for n, kept in ((256, {0}), (257, set())):
        one = replace(GPT_OSS, layers=(replace(layer, mlp=replace(layer.mlp, moe=replace(layer.mlp.moe, n_experts=n))),))
        assert multiplied(one, dict.fromkeys((t.name for t in weight_tensors(one)), "bf16")) == kept


def test_a_model_of_no_quantised_weights_needs_what_its_file_needs() -> None:
    """bf16 on disk, bf16 activations: the plan is the file, and its vectors in fp32."""
    types = resident_types(QWEN, weight_types(QWEN, "bf16"), cpu=False, dtype="bf16")
    vectors = sum(t.n_elements for t in weight_tensors(QWEN) if t.role == "vector")

    assert vectors == 36 * (2 * 4096 + 2 * 128) + 4096
    assert sum(weight_bytes(QWEN, types).values()) == 2 * 8_190_735_360 + 2 * vectors


def test_tying_moves_a_cpu_s_embedding_between_the_rules() -> None:
    """The same tensor is a look-up in one model and the largest product of the other."""
    for tied in (True, False):
        spec = replace(small(), tied=tied)
        assert resident(spec, "q4_k", cpu=True)["embed"] == ("bf16" if tied else "q4_k")


def test_a_matrix_in_e4m3_is_a_byte_a_value_and_four_a_scale() -> None:
    """A block's scale lies on disk once, in memory with each of its rows."""
    spec = small(intermediate_size=1040)
    for kind, scales_of_gate, scales_of_down in (("fp8", 1040, 512), ("fp8_block", 1040 * 4, 512 * 9)):
        held = resident(spec, kind, cpu=False)
        sizes = weight_bytes(spec, held)
        assert sizes["layers.0.gate"] == 1040 * 512 + 4 * scales_of_gate
        assert sizes["layers.0.down"] == 512 * 1040 + 4 * scales_of_down
        assert groups(spec, held)["layers.0.qkv"] == ("layers.0.q", "layers.0.k", "layers.0.v")
    for spec in (small(), GPT_OSS):
        assert of_role(spec, resident(spec, "fp8", cpu=False), "table") == {"bf16"}
        assert of_role(spec, resident(spec, "fp8", cpu=True, dtype="f32"), "table", "matrix", "experts") <= {"f32"}


@pytest.mark.parametrize(
    ("kind", "dtype", "reads", "rounded"),
    [
        ("fp8", "bf16", "slots", True),
        ("fp8", "f16", "slots", False),
        ("fp8", "bf16", "tiles", False),
        ("fp8_block", "bf16", "slots", False),
    ],
)
def test_a_plan_says_when_activations_are_rounded_too_and_has_room_for_them(
    kind: str, dtype: str, reads: str, rounded: bool
) -> None:
    spec = small(max_position_embeddings=4096)
    kv: dict[Kind, KVFormat] = {"global": kv_format(dtype), "sliding": kv_format(dtype)}
    stored = {t.name: kind if t.role == "matrix" else "bf16" for t in weight_tensors(spec)}
    p = plan(spec, stored, Workload(context=4096, chunk=4096, kv=kv, dtype=dtype, reads=frozenset({reads})))

    (note,) = p.notes
    assert ("more than 64 tokens" in note) is rounded
    assert ("stay as they are" in note) is not rounded
    (tile,) = (b for b in p.stages[0].buffers if b.name == "weight.tile")
    if rounded:
        assert tile.n_bytes == 4096 * (1024 + 4)  # the widest rows, and a scale each


def test_a_plan_says_what_in_fp8_is_kept_and_what_is_expanded() -> None:
    kv: dict[Kind, KVFormat] = {"global": kv_format("bf16"), "sliding": kv_format("bf16")}
    stored = {t.name: "bf16" if t.role == "vector" else "fp8_block" for t in weight_tensors(GPT_OSS)}
    kept, expanded = plan(GPT_OSS, stored, Workload(context=64, kv=kv, dtype="bf16", reads=frozenset({"slots"}))).notes
    (all_expanded,) = plan(GPT_OSS, stored, Workload(context=64, kv=kv, dtype="bf16", cpu=True)).notes

    assert kept == "matrices and experts are kept in fp8 (e4m3); activations stay as they are"
    assert expanded == "tables stored in fp8 are expanded at load: 1 tensors"
    assert all_expanded == f"experts and matrices and tables stored in fp8 are expanded at load: {72 + 4 * 24 + 2} tensors"


def test_experts_in_e4m3_need_no_room_to_be_expanded_and_leave_activations_as_they_are() -> None:
    """Only matrices make e4m3 of activations; a tile of a stack, and room for integers, are 140 MB that nothing writes."""
    kv: dict[Kind, KVFormat] = {"global": kv_format("bf16"), "sliding": kv_format("bf16")}
    stored = {t.name: "fp8" if t.role == "experts" else "bf16" for t in weight_tensors(GPT_OSS)}
    p = plan(GPT_OSS, stored, Workload(context=4096, chunk=4096, kv=kv, dtype="bf16", reads=frozenset({"slots"})))

    assert p.notes == ("experts are kept in fp8 (e4m3); activations stay as they are",)
    sizes = {b.name: b.n_bytes for b in p.stages[0].buffers}
    assert "expert.words" not in sizes
    assert sizes["weight.tile"] == 2 * 2880 * 2880  # a matrix, should PyTorch multiply one
