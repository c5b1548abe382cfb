"""Choosing is a pure function over rows, and every refusal quotes both numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headwise.attention.capability import BACKENDS, CPU, DeviceKind, need_for
from headwise.attention.choose import choose, choose_layers, forced_backends, group_layers, require_fused
from headwise.attention.torch_fused import OPERATORS
from headwise.errors import BackendError, UsageError
from headwise.hardware.gpus import find_gpu
from headwise.spec import catalogue
from headwise.spec.kv import KV_FORMATS

BF16 = {"global": KV_FORMATS["bf16"], "sliding": KV_FORMATS["bf16"]}
LAYER = catalogue.spec("gemma-4-31b").layers[5]
ROWS = {b.name: b for b in BACKENDS}
NEED = need_for(LAYER, kv=KV_FORMATS["bf16"], dtype="bf16", device=DeviceKind("cuda", (9, 0), "H200"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "head_dim 512 not in 8..256, multiples of 8"),
        ({"head_dim": 128, "key_dim": 128, "window": 128}, "window 128: it takes no window"),
        ({"capability": (7, 5)}, "compute capability 7.5, needs at least 8.0"),
        ({"capability": None}, "compute capability unknown, needs at least 8.0"),
        ({"api": "metal"}, "runs on cuda, not on metal"),
        ({"head_dim": 128, "key_dim": 128, "softcap": 20.0}, "softcap 20: it has none"),
        ({"head_dim": 128, "key_dim": 128, "dtype": "f32"}, "activations in f32, takes f16, bf16"),
        ({"head_dim": 128, "key_dim": 320}, "one-tensor key size 320 not in 8..256"),
    ],
)
def test_flash_attn_2_refuses_with_the_numbers(changes: dict[str, object], reason: str) -> None:
    refusal = ROWS["flash-attn-2"].refusal(replace(NEED, **changes))  # type: ignore[arg-type]

    assert refusal is not None
    assert reason in refusal


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"capability": (10, 0)}, "compute capability 10.0, made for at most 9.0"),
        ({"triton": (3, 8)}, "triton 3.8 installed, made for 3.6"),
        ({"triton": None}, "triton none installed"),
        ({"key_dim": 544}, "keys of 544 values for head_dim 512"),
        ({"head_dim": 96, "key_dim": 96}, "head_dim 96 not in 64, 128, 256, 512"),
        ({"kv": "f32"}, "KV type f32 not in f16, bf16, fp8, q8_0, q4_0"),
        ({"kv": "f16"}, "KV type f16, reads floats of the activations' type bf16 only"),
        ({"softcap": 20.0}, "softcap 20: it has none"),
    ],
)
def test_the_hopper_kernels_refuse_with_the_numbers(changes: dict[str, object], reason: str) -> None:
    assert ROWS["headwise-hopper"].refusal(NEED) is None
    assert reason in str(ROWS["headwise-hopper"].refusal(replace(NEED, **changes)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes", [{"softcap": 20.0}, {"kv": "f16"}, {"triton": (3, 8)}, {"key_dim": 544}, {"capability": (8, 6)}]
)
def test_what_the_hopper_kernels_refuse_the_portable_one_takes(changes: dict[str, object]) -> None:
    assert choose(replace(NEED, **changes)).backend.name == "headwise-triton"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gpu", "model", "backend"),
    [
        ("h200", "qwen3-8b", "headwise-hopper"),
        ("h200", "gemma-4-31b", "headwise-hopper"),
        ("rtx3090", "gemma-4-31b", "headwise-triton"),
        ("t4", "llama-3.2-3b", "torch-efficient"),
    ],
)
def test_cards_get_the_first_row_that_refuses_nothing(gpu: str, model: str, backend: str) -> None:
    choices = choose_layers(catalogue.spec(model), kv=BF16, dtype="bf16", device=DeviceKind.of(find_gpu(gpu)))

    assert {c.backend.name for c in choices} == {backend}
    assert all(c.fused for c in choices)


def test_a_card_without_a_fused_backend_is_refused_with_what_would_help() -> None:
    spec = catalogue.spec("gemma-4-e2b")
    device = DeviceKind.of(find_gpu("rx7900xtx"))
    choices = choose_layers(spec, kv=BF16, dtype="bf16", device=device)

    with pytest.raises(BackendError) as caught:
        require_fused(spec, choices, allow_fallback=False, device=device)
    assert "35 of 35 layers" in caught.value.what
    assert "runs on cuda, not on rocm" in caught.value.why
    assert "--allow-fallback" in caught.value.do
    require_fused(spec, choices, allow_fallback=True, device=device)


def test_a_forced_backend_is_taken_and_the_rows_above_say_so() -> None:
    choice = choose(NEED, forced="torch-efficient")
    reasons = {r.backend: r.reason for r in choice.refusals if not ROWS[r.backend].by_name}

    assert choice.backend is ROWS["torch-efficient"]
    assert reasons == {
        "headwise-hopper": "not chosen: torch-efficient is forced",
        "headwise-triton": "not chosen: torch-efficient is forced",
        "flash-attn-2": "head_dim 512 not in 8..256, multiples of 8",
        "torch-flash-cpu": "runs on cpu, not on cuda",
    }


def test_forcing_what_is_chosen_anyway_changes_nothing() -> None:
    assert choose(NEED, forced="headwise-hopper") == choose(NEED)


@pytest.mark.parametrize(("dim", "taken"), [(8, True), (256, True), (264, False)])
def test_a_row_can_be_forced_at_its_edges_and_not_beyond(dim: int, taken: bool) -> None:
    need = replace(NEED, head_dim=dim, key_dim=dim)
    if taken:
        assert choose(need, forced="flash-attn-2").backend.name == "flash-attn-2"
        return
    with pytest.raises(BackendError) as caught:
        choose(need, forced="flash-attn-2")
    assert f"flash-attn-2: head_dim {dim} not in 8..256" in caught.value.why
    advice = caught.value.do.split()
    assert choose(need, forced=advice[1]).backend.name == advice[1]  # the advice was tried


@pytest.mark.parametrize(("capability", "taken"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_forced_backend_is_held_to_the_card(capability: tuple[int, int], taken: bool) -> None:
    spec, device = catalogue.spec("llama-3.2-3b"), DeviceKind("cuda", capability, "the card")
    kv = {"global": KV_FORMATS["f16"], "sliding": KV_FORMATS["f16"]}
    if taken:
        choices = choose_layers(spec, kv=kv, dtype="f16", device=device, forced={"global": "headwise-triton"})
        assert {c.backend.name for c in choices} == {"headwise-triton"}
        return
    with pytest.raises(BackendError) as caught:
        choose_layers(spec, kv=kv, dtype="f16", device=device, forced={"global": "headwise-triton"})
    assert "layer 0 of llama-3.2-3b on the card" in caught.value.what
    assert "compute capability 7.5, needs at least 8.0" in caught.value.why
    assert caught.value.do == "--backend global=torch-efficient"


def test_each_kind_is_forced_alone() -> None:
    spec, device = catalogue.spec("gemma-4-31b"), DeviceKind.of(find_gpu("h200"))
    choices = choose_layers(spec, kv=BF16, dtype="bf16", device=device, forced=forced_backends("sliding=torch-efficient"))

    assert {(layer.kind, c.backend.name) for layer, c in zip(spec.layers, choices, strict=True)} == {
        ("sliding", "torch-efficient"), ("global", "headwise-hopper"),
    }  # fmt: skip


def test_what_no_fused_row_takes_is_left_to_the_reference_in_words() -> None:
    device = DeviceKind.of(find_gpu("rx7900xtx"))
    with pytest.raises(BackendError) as caught:
        choose_layers(catalogue.spec("qwen3-8b"), kv=BF16, dtype="bf16", device=device, forced={"global": "headwise-triton"})

    assert caught.value.do == "no fused backend does: --backend global=reference --allow-fallback"


def test_a_forced_reference_is_not_fused() -> None:
    spec = catalogue.spec("gemma-4-e2b")
    choices = choose_layers(spec, kv=BF16, dtype="bf16", device=CPU, forced=forced_backends("reference"))

    with pytest.raises(BackendError) as caught:
        require_fused(spec, choices, allow_fallback=False, device=CPU)
    assert "torch-flash-cpu: not chosen: reference is forced" in caught.value.why
    require_fused(spec, choices, allow_fallback=True, device=CPU)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("flash-attn-3", "one of: headwise-hopper, headwise-triton, flash-attn-2"),
        ("sliding=,global=reference", "unknown backend ''"),
        ("windowed=reference", "--backend names 'windowed'"),
        ("global=reference,global=flash-attn-2", "--backend names global twice"),
        ("sliding=reference,", "--backend names ''"),
        ({"all": "reference"}, "--backend names 'all'"),
    ],
)
def test_a_backend_that_is_no_row_is_refused_with_the_list(asked: str | dict[str, str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        forced_backends(asked)
    assert words in str(caught.value)


def test_a_kind_that_the_model_lacks_is_not_forced_in_silence() -> None:
    with pytest.raises(UsageError, match="has no sliding layers"):
        choose_layers(catalogue.spec("llama-3.2-3b"), kv=BF16, dtype="bf16", device=CPU, forced={"sliding": "reference"})


def test_a_rocm_build_of_pytorch_is_not_taken_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says cuda and capability 11.0 on a gfx1100: kernels that no AMD card has run would have been chosen."""
    from headwise.engine.llm import device_kind

    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (11, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "AMD Radeon RX 7900 XTX")
    kind = device_kind(torch.device("cuda"))

    assert kind.api == "rocm"
    assert choose(replace(NEED, api=kind.api, capability=kind.capability, head_dim=128, key_dim=128)).backend.name == "reference"


def test_groups_hold_every_layer_once() -> None:
    spec = catalogue.spec("gemma-4-e2b")
    choices = choose_layers(spec, kv=BF16, dtype="bf16", device=CPU)
    groups = group_layers(spec, choices, BF16)

    assert sorted(i for g in groups for i in g.layers) == list(range(35))
    assert [len(g.layers) for g in groups] == [28, 7]


def test_the_last_row_takes_everything() -> None:
    assert choose(replace(NEED, api="sycl", capability=None, softcap=30.0)).backend.name == "reference"


@pytest.mark.parametrize("dim", [2, 3, 80, 511, 512, 640, 1024])
def test_the_cpu_row_runs_at_the_edges_it_claims(dim: int) -> None:
    """A claimed head size that the operator gets wrong would be chosen and never doubted."""
    row = next(b for b in BACKENDS if b.name == "torch-flash-cpu")
    assert dim in row.head_dims
    g = torch.Generator().manual_seed(dim)
    q, k, v = (torch.randn(n, s, dim, generator=g) for n, s in ((4, 5), (2, 9), (2, 9)))
    out, lse = OPERATORS[row.name](q, k, v, None, False, 0.2)
    scores = (q.double() @ k.repeat_interleave(2, 0).double().transpose(1, 2)) * 0.2

    assert (out - scores.softmax(-1) @ v.repeat_interleave(2, 0).double()).abs().max() < 1e-4
    assert (lse - scores.logsumexp(-1)).abs().max() < 1e-4
