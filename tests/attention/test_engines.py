"""What other engines' attention does, against what was read in their source and seen in their logs."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rival_models import MODELS, model

from headwise.attention import engines
from headwise.attention.engines import CARDS_WITH_FLASH_ATTENTION, engine_choice, explain_engine
from headwise.errors import UsageError
from headwise.hardware.gpus import GPUS, find_gpu

LAYERS = {"global": model("gemma-4-31b").layers[5], "sliding": model("gemma-4-31b").layers[0]}
HEAD_512, HEAD_256 = LAYERS["global"], LAYERS["sliding"]
CPU = "ggml CPU flash (silent)"


def ask(engine, card, layer=HEAD_512, kv="f16", *, family="gemma4", mixed_heads=True, **settings):
    name, _, version = engine.partition("@")
    gpu = find_gpu(card)
    return engine_choice(name, version or None, layer, gpu, kv, family=family, mixed_heads=mixed_heads, **settings)


def explain(engine, card, name="gemma-4-31b", kv="f16", **settings):
    engine, _, version = engine.partition("@")
    return explain_engine(engine, version or None, model(name), find_gpu(card), kv, **settings)


def verdicts(explanation):
    """One word where all layers agree, else those of a sliding and a global layer of Gemma 4."""
    found = {choice.verdict for choice in explanation.choices}
    return found.pop() if len(found) == 1 else (explanation.choices[0].verdict, explanation.choices[5].verdict)


# --- llama.cpp ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "backend_512", "backend_256"),
    [
        ("gtx1080ti", "ggml-cuda tile, vec", "ggml-cuda tile, vec"),
        ("p40", "ggml-cuda tile, vec", "ggml-cuda tile, vec"),
        ("v100-pcie-32gb", "ggml-cuda vec, tile, mma", "ggml-cuda vec, tile, mma"),
        ("t4", "ggml-cuda mma", "ggml-cuda mma, vec"),
        ("rtx3090", "ggml-cuda mma", "ggml-cuda mma, vec"),
        ("rtx4090", "ggml-cuda mma", "ggml-cuda mma, vec"),
        ("rtx5090", "ggml-cuda mma", "ggml-cuda mma, vec"),
        ("rx6800xt", "ggml-hip tile, vec", "ggml-hip tile, vec"),
        ("rx7900xtx", "ggml-hip tile, vec", "ggml-hip tile, vec"),
        ("m4-max:64", "ggml-metal", "ggml-metal"),
    ],
)
def test_llamacpp_today_has_a_fused_kernel_on_cards_said_to_have_none(card, backend_512, backend_256):
    """Articles deny Pascal, Volta, Turing, RDNA2, RDNA3 and Metal any flash attention; all have kernels, 512 too."""
    for layer, backend in ((HEAD_512, backend_512), (HEAD_256, backend_256)):
        choice = ask("llama.cpp", card, layer)
        assert (choice.verdict, choice.backend) == ("fused", backend)
    assert explain("llama.cpp", card).proven_fused


def test_before_b8609_forced_flash_attention_runs_the_512_layers_on_the_cpu():
    """The "freeze" of Gemma 4: ten layers of 31B on the CPU, nothing said, fifty on the card."""
    told = explain("llama.cpp@b8608", "rtx4090", fa="on")

    assert verdicts(told) == ("fused", "offloaded")
    assert [choice.verdict for choice in told.choices].count("offloaded") == 10
    assert told.choices[5].backend == CPU and not told.proven_fused
    assert explain("llama.cpp@b8609", "rtx4090", fa="on").proven_fused


def test_auto_is_all_or_nothing():
    """The probe turns flash attention off for fifty layers that have a kernel because ten do not."""
    told = explain("llama.cpp@b8608", "rtx4090", fa="auto")

    assert verdicts(told) == "materialised"
    assert "layer 5 decides for all 60 layers" in told.notes[-1]
    assert ask("llama.cpp@b8608", "rtx4090", HEAD_256).verdict == "fused"


def test_a_layer_not_known_to_have_a_kernel_decides_for_all_under_auto():
    """Metal's 512 kernel came at an unknown build: "fused" for the other fifty layers would be a guess."""
    assert verdicts(explain("llama.cpp@b8609", "m4-max:64")) == "unknown"
    assert verdicts(explain("llama.cpp@b8609", "m4-max:64", fa="on")) == ("fused", "unknown")
    assert verdicts(explain("llama.cpp@b9452", "m4-max:64")) == "fused"
    assert verdicts(explain("llama.cpp@2026-03-15", "rtx4090")) == "unknown"


def test_off_stores_scores_and_refuses_quantised_values():
    """Quantised K alone is legal without flash attention; quantised V stops the context from being made."""
    assert ask("llama.cpp", "rtx4090", fa="off").verdict == "materialised"
    assert ask("llama.cpp", "rtx4090", kv="q8_0", kv_v="f16", fa="off").verdict == "materialised"
    assert ask("llama.cpp", "rtx4090", kv="f16", kv_v="q8_0", fa="off").verdict == "refused"
    told = explain("llama.cpp", "rtx4090", kv="q8_0", fa="off")
    assert verdicts(told) == "refused" and "stops the whole model" in told.notes[-1]


@pytest.mark.parametrize("fa", ["on", "auto"])
@pytest.mark.parametrize(("k", "v"), [("q8_0", "q4_0"), ("q5_0", "q5_0"), ("q5_1", "q4_1"), ("bf16", "f16")])
def test_all_pairs_of_types_run_on_cuda_since_september_2026(k, v, fa):
    """Before #28079 a mixed pair ran on the CPU: 11250 -> 379 t/s in #27150, 1511 -> 197 in #28456."""
    assert ask("llama.cpp@2026-10-01", "rtx4090", kv=k, kv_v=v, fa=fa).verdict == "fused"
    before = ask("llama.cpp@b10488", "rtx4090", kv=k, kv_v=v, fa="on")
    assert (before.verdict, before.backend) == ("offloaded", CPU)
    assert ask("llama.cpp@b10600", "rtx4090", kv=k, kv_v=v, fa="on").verdict == "unknown"


@pytest.mark.parametrize("kv", ["f16", "bf16", "q8_0", "q4_0"])
def test_plain_pairs_always_had_their_cuda_kernel(kv):
    """Refusing q8_0 with q8_0 on an older build sends people back to twice the cache for nothing."""
    assert ask("llama.cpp@b8609", "rtx4090", kv=kv, fa="on").verdict == "fused"


def test_iq4_nl_is_accepted_and_runs_on_the_cpu():
    """The flag takes it, neither CUDA nor Metal has a kernel, and with `auto` the quantised V skips the probe."""
    for card in ("rtx4090", "rx7900xtx", "m4-max:64"):
        assert ask("llama.cpp", card, kv="iq4_nl", fa="on").verdict == "offloaded"
    auto = explain("llama.cpp", "rtx4090", kv="iq4_nl")
    assert verdicts(auto) == "offloaded"
    assert any("skips the device probe" in note for note in auto.choices[0].notes)


def test_auto_with_quantised_values_is_on_or_refused_and_the_build_decides():
    """Where #25871 is not established, neither a silent CPU run nor a refusal may be promised."""
    assert ask("llama.cpp@b10488", "rtx4090", kv="q5_0").verdict == "unknown"
    assert ask("llama.cpp@b10488", "rtx4090", kv="q8_0").verdict == "fused"


def test_metal_wants_keys_and_values_of_one_type():
    """K q8_0 with V f16 saves memory on CUDA and moves every layer to the CPU on a Mac."""
    assert ask("llama.cpp", "m4-max:64", kv="q8_0", kv_v="f16", fa="on").verdict == "offloaded"
    assert verdicts(explain("llama.cpp", "m4-max:64", kv="q8_0", kv_v="f16")) == "materialised"
    assert ask("llama.cpp", "m4-max:64", kv="q8_0").verdict == "fused"


@pytest.mark.parametrize(("n_heads", "n_kv_heads", "verdict"), [(8, 8, "offloaded"), (8, 4, "fused"), (3, 1, "fused")])
def test_head_size_512_needs_grouped_queries(n_heads, n_kv_heads, verdict):
    """`gqa_opt_applies`: one query head per KV head has no 512 kernel on CUDA."""
    layer = dataclasses.replace(HEAD_512, n_heads=n_heads, n_kv_heads=n_kv_heads)

    assert ask("llama.cpp", "rtx4090", layer, fa="on").verdict == verdict


@pytest.mark.parametrize(("group", "verdict"), [(8, "fused"), (4, "fused"), (2, "refused"), (6, "refused")])
def test_volta_aborts_above_256_unless_4_divides_the_group(group, verdict):
    """`fatal error` in switch_ncols2: a crash at the first prompt, not a slow answer."""
    layer = dataclasses.replace(HEAD_512, n_heads=group, n_kv_heads=1)

    assert ask("llama.cpp", "v100-pcie-32gb", layer, fa="on").verdict == verdict
    assert ask("llama.cpp", "t4", layer, fa="on").verdict == "fused"


def test_one_refused_layer_stops_the_model():
    """Fifty layers shown as fused on a server that aborts at the first prompt."""
    spec = model("gemma-4-31b")
    odd = [dataclasses.replace(layer, n_heads=24) if layer.kind == "global" else layer for layer in spec.layers]
    told = explain_engine("llama.cpp", None, dataclasses.replace(spec, layers=tuple(odd)), find_gpu("v100-pcie-32gb"), "f16")

    assert verdicts(told) == "refused" and told.notes == ("layer 5 stops the whole model",)


def test_a_quantised_512_layer_is_converted_at_every_step():
    """Fused, yet each step copies the whole layer's cache to f16: 2 GiB on 31B at 262,144."""
    assert any("f16" in note for note in ask("llama.cpp", "rtx4090", kv="q8_0").notes)
    assert not any("f16" in note for note in ask("llama.cpp", "rtx4090", HEAD_256, kv="q8_0").notes)
    assert not ask("llama.cpp", "rtx4090").notes


def test_forced_on_always_says_that_nothing_checks_it():
    """`flash_attn = 1` in a log is a request; a note keeps the reader from taking it as proof."""
    assert any("skips the device probe" in note for note in ask("llama.cpp", "rtx4090", fa="on").notes)


@pytest.mark.parametrize(
    ("head_dim", "card", "verdict"),
    [
        (192, "rtx4090", "offloaded"),
        (320, "rtx4090", "offloaded"),
        (192, "m4-max:64", "fused"),
        (320, "m4-max:64", "unknown"),
        (24, "m4-max:64", "offloaded"),
        (640, "m4-max:64", "offloaded"),
    ],
)
def test_a_head_size_outside_the_list_is_no_kernel_or_not_known(head_dim, card, verdict):
    """CUDA's list is closed; of Metal's only the ends and the usual sizes were read."""
    layer = dataclasses.replace(HEAD_256, head_dim=head_dim)

    assert ask("llama.cpp", card, layer, fa="on").verdict == verdict


def test_blocks_that_do_not_divide_a_head_are_refused():
    """Head size 80 in blocks of 32: the engine stops at start."""
    layer = dataclasses.replace(HEAD_256, head_dim=80)

    assert ask("llama.cpp", "rtx4090", layer, kv="q8_0").verdict == "refused"
    assert ask("llama.cpp", "rtx4090", layer, kv="f16").verdict == "fused"


def test_what_was_not_read_is_unknown():
    """ggml's SYCL backend, and a card without a compute capability: no guess."""
    nameless = dataclasses.replace(find_gpu("rtx4090"), capability=None)

    assert ask("llama.cpp", "arc-a770:16", fa="on").verdict == "unknown"
    assert engine_choice("llama.cpp", None, HEAD_512, nameless, "f16").verdict == "unknown"
    assert engine_choice("vllm", None, HEAD_512, nameless, "bf16").verdict == "unknown"


@pytest.mark.parametrize(("head_dim", "verdict"), [(512, "fused"), (60, "offloaded")])
def test_vulkan_takes_any_head_that_8_divides_and_all_types(head_dim, verdict):
    """Of all backends only Vulkan reads iq4_nl."""
    gpu = dataclasses.replace(find_gpu("rx7900xtx"), api="vulkan")
    layer = dataclasses.replace(HEAD_512, head_dim=head_dim)
    kv = "iq4_nl" if head_dim == 512 else "f16"

    assert engine_choice("llama.cpp", None, layer, gpu, kv, fa="on").verdict == verdict
    assert engine_choice("ollama", "0.20.4", layer, gpu, "f16", fa="on", family="gemma4").verdict == "unknown"


# --- Ollama ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.20.1", "0.20.2", "0.20.3"])
@pytest.mark.parametrize("card", ["rtx5090", "v100-pcie-32gb", "m4-max:64", "rx7900xtx"])
def test_gemma_4_on_early_ollama_froze_only_where_it_was_asked_to(version, card):
    """#15350, #15237, #15634: OLLAMA_FLASH_ATTENTION=1 put the 512 layers on the CPU; unset, scores on the card."""
    assert verdicts(explain(f"ollama@{version}", card, fa="on")) == ("fused", "offloaded")
    assert verdicts(explain(f"ollama@{version}", card)) == "materialised"
    assert verdicts(explain(f"ollama@{version}", card, fa="off")) == "materialised"


@pytest.mark.parametrize("version", ["0.20.4", "0.24.0"])
def test_0_20_4_runs_gemma_4_fused_from_turing_on_and_on_metal(version):
    """The fix of 2026-04-07; V100 and Pascal lose flash attention even when they ask for it (#15641)."""
    for card in ("t4", "rtx3090", "rtx5090", "m4-max:64", "rx7900xtx"):
        assert explain(f"ollama@{version}", card).proven_fused
    odd = dataclasses.replace(HEAD_512, n_heads=3, n_kv_heads=1)  # its 512 kernel wants an even group
    assert ask(f"ollama@{version}", "rtx3090", odd).verdict == "offloaded"
    for card in ("v100-pcie-32gb", "gtx1080ti"):
        for fa in ("auto", "on"):
            told = explain(f"ollama@{version}", card, fa=fa)
            assert verdicts(told) == "materialised"
            assert "older than Turing" in told.choices[0].why
    assert explain(f"ollama@{version}", "v100-pcie-32gb", "gemma-3-27b").proven_fused


def test_ollama_before_0_30_drops_a_quantised_type_without_flash_attention():
    """Slope measured on 0.20.3: 12.00 KiB/token with q8_0 asked and no flash attention: f16."""
    choice = ask("ollama@0.20.3", "rtx4090", kv="q8_0")

    assert choice.verdict == "materialised"
    assert any("q8_0 is dropped" in note for note in choice.notes)
    probed = ask("ollama@0.20.4", "rtx4090", kv="q8_0", family="llama")  # on the runner, where auto decides
    assert probed.notes == ("q8_0 is dropped, with one warning: the cache is f16",)
    assert not any("dropped" in note for note in ask("ollama@0.20.4", "rtx4090", kv="q8_0").notes)


@pytest.mark.parametrize(
    ("name", "before", "since"),
    [
        ("gpt-oss-20b", "0.11.7", "0.13.0"),
        ("qwen3-32b", "0.12.3", "0.13.0"),
        ("gemma-3-27b", "0.12.5", "0.13.0"),
    ],
)
def test_a_family_is_on_by_default_from_its_release(name, before, since):
    """The list only sets the default; families came to it one by one in 2025."""
    assert verdicts(explain(f"ollama@{before}", "rtx4090", name)) == "materialised"
    assert explain(f"ollama@{since}", "rtx4090", name).proven_fused


def test_exaone_runs_by_llamacpps_auto_and_quantised_only_when_forced():
    """EXAONE was never on the list, and flash attention was on all the same: the runner passes auto since 0.13.4."""
    assert explain("ollama@0.18.1", "rtx3090", "exaone-4.0-32b", kv="q8_0", fa="on").proven_fused
    auto = explain("ollama@0.18.1", "rtx3090", "exaone-4.0-32b", kv="q8_0")
    assert auto.proven_fused and any("q8_0 is dropped" in note for note in auto.choices[0].notes)
    assert verdicts(explain("ollama@0.13.3", "rtx3090", "exaone-4.0-32b")) == "materialised"


def test_the_old_runners_auto_probes_too():
    """A head size without a kernel in its bundled llama.cpp: off on the card, not on the CPU."""
    layer = dataclasses.replace(model("exaone-4.0-32b").layers[0], head_dim=192)

    assert ask("ollama@0.18.1", "rtx3090", layer, family="exaone4").verdict == "materialised"
    assert ask("ollama@0.18.1", "rtx3090", layer, family="exaone4", fa="on").verdict == "offloaded"


@pytest.mark.parametrize(
    ("card", "layer_of", "kv", "verdict"),
    [
        ("gtx1080ti", "llama-3.2-3b", "q8_0", "fused"),
        ("rtx3090", "llama-3.2-3b", "f16", "fused"),
        ("rtx3090", "gpt-oss-20b", "f16", "fused"),
        ("rtx3090", "gpt-oss-20b", "q8_0", "offloaded"),
        ("m4-max:64", "llama-3.2-3b", "f16", "unknown"),
    ],
)
def test_0_5_7_with_the_flag_set(card, layer_of, kv, verdict):
    """Its CUDA code has 64 and 256 in f16, 128 in all types, and any size in f16 from Volta; nothing runs unasked."""
    told = [explain("ollama@0.5.7", card, layer_of, kv=kv, fa=fa) for fa in ("on", "auto")]

    assert verdicts(told[0]) == verdict
    assert verdicts(told[1]) == "materialised"


def test_releases_whose_kernels_were_not_read_are_unknown():
    """0.6 to 0.12 carry ggml copies that nobody here opened."""
    assert verdicts(explain("ollama@0.9.6", "rtx3090", "llama-3.2-3b", fa="on")) == "unknown"


@pytest.mark.parametrize(
    ("version", "gpu", "driver", "gate"),
    [
        ("0.5.7", {}, 6, "CUDA driver 6"),
        ("0.5.7", {"api": "vulkan"}, None, "not vulkan"),
        ("0.18.1", {"capability": (7, 2)}, None, "7.2"),
        ("0.33.0", {"capability": (7, 2)}, None, "7.2"),
        ("0.33.0", {"capability": (5, 2)}, None, "older than 6"),
        ("0.33.0", {"api": "sycl"}, None, "not sycl"),
        ("0.33.0", {}, 6, "CUDA driver 6"),
    ],
)
def test_ollamas_test_of_the_card(version, gpu, driver, gate):
    """Driver 7, compute capability 6 but not 7.2, any ROCm, any Metal; from 0.30 only where the variable is not set."""
    card = dataclasses.replace(find_gpu("rtx3090"), **gpu)
    fa = "auto" if version == "0.33.0" else "on"

    choice = engine_choice(
        "ollama", version, model("gemma-3-27b").layers[0], card, "f16", fa=fa, family="gemma3", driver_major=driver
    )

    assert choice.verdict == "materialised"
    assert gate in choice.why + " ".join(choice.notes)


def test_maxwell_passes_the_old_gate_and_the_new_one_is_skipped_by_the_variable():
    """With OLLAMA_FLASH_ATTENTION=1 nothing tests the card any more (0.30 and later)."""
    maxwell = dataclasses.replace(find_gpu("gtx1080ti"), capability=(5, 2))
    layer = model("gemma-3-27b").layers[0]

    assert engine_choice("ollama", "0.33.0", layer, maxwell, "f16", fa="on", family="gemma3").verdict == "fused"


@pytest.mark.parametrize(
    ("fa", "kv", "verdict"),
    [
        ("auto", "f16", "fused"),
        ("auto", "q8_0", "fused"),
        ("on", "q8_0", "fused"),
        ("off", "f16", "materialised"),
        ("off", "q8_0", "refused"),
        ("on", "q5_0", "offloaded"),
        ("auto", "q5_0", "unknown"),
        ("on", "iq4_nl", "offloaded"),
    ],
)
def test_ollama_since_0_30_is_its_pinned_llama_server(fa, kv, verdict):
    """The KV type goes through unchecked: q5_0 means a CPU run on b10488, and `off` with q8_0 does not start at all."""
    told = explain("ollama@0.32.15", "rtx4090", kv=kv, fa=fa)

    assert verdicts(told) == verdict
    assert any("b10488" in note for note in told.choices[0].notes)


def test_every_release_since_0_30_has_its_pin():
    """Asking b10488 about Ollama 0.30.0 credits it with three months of kernels."""
    pins = [ask(f"ollama@{v}", "rtx4090").notes[-1].split()[1] for v in ("0.30.0-rc1", "0.30.12", "0.31.2", "0.32.1", "0.40")]

    assert pins == ["b9452", "b9781", "b9840", "b9888", "b10488"]


# --- vLLM --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", ["t4", "a100-sxm4-80gb", "rtx3090", "rtx4090", "h100-sxm", "b200", "rtx5090"])
def test_vllm_0_19_forces_triton_for_every_layer_of_gemma_4(card):
    """Its log: "Forcing TRITON_ATTN backend to prevent mixed-backend numerical divergence". Flash-style all the same."""
    told = explain("vllm@0.19.0", card, kv="auto")

    assert {choice.backend for choice in told.choices} == {"TRITON_ATTN"} and told.proven_fused


@pytest.mark.parametrize("version", ["0.25.1", "0.33.0"])
@pytest.mark.parametrize("card", ["t4", "a100-sxm4-80gb", "rtx3090", "rtx4090", "rtx5090"])
def test_consumer_cards_still_get_triton_for_every_layer(version, card):
    """FA4 wants compute capability 9, 10 or 11; the 256 layers lose FA2 too."""
    assert {c.backend for c in explain(f"vllm@{version}", card, kv="bf16").choices} == {"TRITON_ATTN"}


@pytest.mark.parametrize(
    ("kv", "multimodal", "backends"),
    [
        ("bf16", False, ("FLASH_ATTN (FA4)", "FLASH_ATTN (FA4)")),
        ("bf16", True, ("TRITON_FLASH_ATTN", "TRITON_FLASH_ATTN")),
        ("fp8", False, ("FLASH_ATTN (FA3)", "FLASH_ATTN (FA4)")),
        ("fp8_e4m3", True, ("TRITON_ATTN", "TRITON_ATTN")),
    ],
)
def test_hopper_in_0_33(kv, multimodal, backends):
    """One backend for all layers, but for fp8: FA3 at 256 and FA4 at 512, refused with image masks."""
    told = explain("vllm@0.33.0", "h200", kv=kv, multimodal=multimodal)

    assert (told.choices[0].backend, told.choices[5].backend) == backends and told.proven_fused


@pytest.mark.parametrize(
    ("engine", "card", "name", "word"),
    [
        ("vllm@0.19.1", "h200", "gemma-4-31b", "which release changed it"),
        ("vllm@0.25.1", "h200", "gemma-4-31b", "which release changed it"),
        ("vllm@0.33.0", "b200", "gemma-4-31b", "not traced"),
        ("vllm@0.33.0", "v100-pcie-32gb", "gemma-4-31b", "was not read"),
        ("vllm@0.33.0", "mi300x", "gemma-4-31b", "NVIDIA"),
        ("vllm@0.33.0", "rtx4090", "qwen3-32b", "two head sizes only"),
    ],
)
def test_what_vllm_does_elsewhere_was_not_established(engine, card, name, word):
    """Hopper between two releases, Blackwell's 512 route, Volta, AMD, models with one head size: no guess."""
    told = explain(engine, card, name, kv="bf16")

    assert verdicts(told) == "unknown"
    assert word in told.choices[0].why


@pytest.mark.parametrize(
    ("card", "kind", "backend", "verdict"),
    [
        ("rtx4090", "sliding", "FLASH_ATTN", "fused"),
        ("rtx4090", "global", "FLASH_ATTN", "refused"),
        ("rtx4090", "global", "triton_attn", "fused"),
        ("h200", "global", "FLASH_ATTN", "fused"),
        ("t4", "sliding", "FLASH_ATTN", "refused"),
        ("b200", "global", "FLASH_ATTN", "unknown"),
        ("rtx4090", "global", "FLASHINFER", "unknown"),
        ("mi300x", "global", "TRITON_ATTN", "unknown"),
    ],
)
def test_a_backend_asked_for_by_kind_works_or_is_an_error(card, kind, backend, verdict):
    """#48012 is the only way to mix; a backend that cannot do 512 raises, it never falls back."""
    choice = ask("vllm", card, LAYERS[kind], "bf16", backend_per_kind={kind: backend})

    assert choice.verdict == verdict


def test_backend_per_kind_before_0_33_is_not_established():
    """The merge is known, the release is not."""
    assert ask("vllm@0.27.1", "rtx4090", kv="bf16", backend_per_kind={"global": "TRITON_ATTN"}).verdict == "unknown"
    other_kind = ask("vllm@0.27.1", "rtx4090", kv="bf16", backend_per_kind={"sliding": "FLASH_ATTN"})
    assert other_kind.backend == "TRITON_ATTN"


# --- all ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "kv", "settings"),
    [
        ("llama.cpp", "fp8", {}),
        ("ollama", "fp8", {}),
        ("ollama@0.20.4", "q5_0", {"fa": "on"}),
        ("vllm", "q8_0", {}),
        ("ollama", "q8_0", {"kv_v": "f16"}),
        ("vllm", "fp8", {"kv_v": "bf16"}),
        ("vllm", "bf16", {"fa": "off"}),
        ("llama.cpp", "f16", {"backend_per_kind": {"global": "TRITON_ATTN"}}),
        ("exllama", "f16", {}),
    ],
)
def test_what_an_engine_does_not_have_is_a_usage_error(engine, kv, settings):
    """An answer about a setting that does not exist is worse than none."""
    with pytest.raises(UsageError):
        ask(engine, "rtx4090", kv=kv, **settings)


def test_an_assumed_version_is_said_in_every_answer():
    """`@main` is answered with the newest rules, and says so, once per answer."""
    told = explain("llama.cpp@main", "rtx4090")

    assert "2026-10-01" in told.notes[0]
    assert told.choices[0].notes[0] == told.notes[0]


def test_the_cards_that_have_flash_attention_are_six_with_sources():
    """The list exists to answer articles: each entry needs the claim, the truth and where it is read."""
    assert len(CARDS_WITH_FLASH_ATTENTION) == 6
    for entry in CARDS_WITH_FLASH_ATTENTION:
        assert entry.claim and entry.truth and ("llama.cpp" in entry.source or "Ollama" in entry.source)
    for word in ("Pascal", "Volta", "Turing", "RDNA2", "RDNA3", "Metal"):
        assert any(word in entry.cards for entry in CARDS_WITH_FLASH_ATTENTION)


def test_every_table_ends_in_a_rule_that_always_holds():
    """A case that no rule takes would be a StopIteration in the user's face."""
    for table in (engines._GGML_CUDA, engines._GGML_METAL, engines._GGML_VULKAN, engines._VLLM_MIXED):
        assert table[-1].when(None)  # type: ignore[arg-type]


VERSIONS = {
    "llama.cpp": ["b8608", "b8609", "b10488", "b10600", "2026-03-15", "2026-10-01", "main"],
    "ollama": ["0.5.7", "0.9.6", "0.12.6", "0.13.4", "0.20.2", "0.20.4", "0.24.0", "0.30.0", "0.33.0-rc1", "1.0"],
    "vllm": ["0.19.0", "0.26.0", "0.33.0", "0.40.0"],
}
KV = {"llama.cpp": ["f16", "q8_0", "iq4_nl", "q5_1"], "ollama": ["f16", "q8_0", "q4_0"], "vllm": ["auto", "fp8"]}


@given(data=st.data(), name=st.sampled_from(MODELS), gpu=st.sampled_from(GPUS))
def test_every_card_model_and_release_has_an_answer_with_its_reason(data, name, gpu):
    """No card of the table may crash the explanation, and no verdict may come without a reason and a source."""
    engine = data.draw(st.sampled_from(sorted(VERSIONS)))
    version, kv = data.draw(st.sampled_from(VERSIONS[engine])), data.draw(st.sampled_from(KV[engine]))
    fa = "auto" if engine == "vllm" else data.draw(st.sampled_from(["on", "off", "auto"]))

    told = explain_engine(engine, version, model(name), gpu, kv, fa=fa)

    assert len(told.choices) == len(model(name).layers)
    for choice in told.choices:
        assert choice.verdict in ("fused", "materialised", "offloaded", "refused", "unknown")
        assert choice.backend and choice.why and choice.source and "{" not in choice.why
    if fa == "auto" and engine == "llama.cpp" and kv == "f16":
        assert len({choice.verdict for choice in told.choices}) == 1  # all or nothing
