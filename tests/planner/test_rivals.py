"""What other engines would allocate, against their own logs and their own arithmetic."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rival_models import MODELS, model, windowed_llama

from headwise.errors import PlanError, UsageError
from headwise.planner.rivals import GGML_KV, ollama_default_context, rival_plan
from headwise.spec.tensors import weight_tensors

KIB, MIB, GIB, GB = 2**10, 2**20, 2**30, 10**9


def kv_mib(engine, name, context, **settings):
    kv = rival_plan(engine, model(name), weights_bytes=0, context=context, **settings).kv
    return kv.global_bytes / MIB, kv.sliding_bytes / MIB


def item(plan, label):
    return next(i.n_bytes for i in plan.items if i.label == label)


# --- llama.cpp ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "context", "f16", "q8_0", "q4_0", "swa_full"),
    [
        ("gemma-4-31b", 8 * KIB, 1840, 977.5, 517.5, 7040),
        ("gemma-4-31b", 32 * KIB, 3760, 1997.5, 1057.5, 28160),
        ("gemma-4-31b", 128 * KIB, 11440, 6077.5, 3217.5, 112640),
        ("gemma-4-31b", 256 * KIB, 21680, 11517.5, 6097.5, 225280),
        ("gemma-4-26b-a4b", 32 * KIB, 940, 499.375, 264.375, 7040),
        ("gemma-4-26b-a4b", 256 * KIB, 5420, 2879.375, 1524.375, 56320),
        ("gemma-4-e4b", 128 * KIB, 2088, 1109.25, 587.25, 7168),
    ],
)
def test_llamacpp_holds_its_rings_and_its_whole_contexts(name, context, f16, q8_0, q4_0, swa_full):
    """Planners that charge all layers for the context, or halve Gemma's K=V layers, are 0.2x to 15x of the truth."""
    total = {kv: sum(kv_mib("llama.cpp", name, context, kv=kv)) for kv in ("f16", "q8_0", "q4_0")}

    assert total == {"f16": f16, "q8_0": q8_0, "q4_0": q4_0}
    assert sum(kv_mib("llama.cpp", name, context, swa_full=True)) == swa_full


def test_a_log_line_of_llamacpp_is_met_to_the_hundredth_of_a_mib():
    """`size = 3224.38 MiB (120064 cells, 10 layers, 1/1 seqs), K (q5_0): 1612.19 MiB, V (q5_0): 1612.19 MiB`."""
    base, _ = kv_mib("llama.cpp", "gemma-4-31b", 120_064, kv="q5_0")

    assert base == 3224.375


def test_llama_server_allocated_what_is_planned_for_26b():
    """Read from a llama-server on a GPU, 1 slot, ubatch 512, context 16,384: 320 + 300 MiB, where bindings take 350."""
    assert kv_mib("llama.cpp", "gemma-4-26b-a4b", 16_384) == (320, 300)


@pytest.mark.parametrize(
    ("name", "global_mib", "sliding_mib"),
    [
        ("gemma-4-31b", 2560, 1400),
        ("gemma-4-26b-a4b", 640, 350),
        ("gemma-4-12b", 512, 560),
        ("gemma-4-e4b", 512, 50),
        ("gemma-4-e2b", 192, 15),
        ("gemma-3-27b", 2560, 728),
    ],
)
def test_node_bindings_of_llamacpp_take_rings_of_768_more(name, global_mib, sliding_mib):
    """A real llama.cpp through node-llama-cpp at 32,768 took rings of 1792 and 1280 cells: window + 768, not + 512."""
    assert kv_mib("llama.cpp", name, 32 * KIB, ubatch=768) == (global_mib, sliding_mib)


def test_a_split_cache_repeats_both_parts_for_each_slot():
    """12B, four slots of 32k: 2048 + 2240 MiB in a real llama.cpp (rings of 1792 cells, one per slot)."""
    split = kv_mib("llama.cpp", "gemma-4-12b", 128 * KIB, slots=4, unified=False, ubatch=768)

    assert split == (4 * 512, 4 * 560)


def test_four_unified_slots_make_the_ring_four_windows():
    """llama-server's default: 4608 cells, 3600 MiB of sliding layers on 31B, where one slot takes 1200."""
    assert kv_mib("llama.cpp", "gemma-4-31b", 32 * KIB, slots=4) == (2560, 3600)


def test_a_larger_ubatch_widens_the_ring():
    """-ub 2048 makes 3072 cells of 1536; a plan which ignores it is 1200 MiB short on 31B."""
    assert kv_mib("llama.cpp", "gemma-4-31b", 32 * KIB, ubatch=2048) == (2560, 2400)
    assert kv_mib("llama.cpp", "gemma-4-31b", 32 * KIB, ubatch=300) == (2560, 1200)  # 1324 cells are 1536


@pytest.mark.parametrize(("context", "cells"), [(1, 256), (256, 256), (257, 512), (8191, 8192)])
def test_cells_come_in_256s_and_a_ring_never_exceeds_the_context(context, cells):
    """An unpadded context is 255 cells short at worst; a ring of 1536 cells in a context of 256 is never made."""
    base, sliding = kv_mib("llama.cpp", "gemma-4-31b", context)

    assert base * MIB == cells * 10 * 4 * 512 * 2 * 2
    assert sliding * MIB == min(cells, 1536) * 50 * 16 * 256 * 2 * 2


def test_layers_that_share_a_cache_allocate_nothing():
    """E2B has 35 layers and 15 caches; the log of E4B says 4 layers, 2048 MiB at 131,072 cells."""
    assert kv_mib("llama.cpp", "gemma-4-e4b", 128 * KIB)[0] == 2048
    notes = rival_plan("llama.cpp", model("gemma-4-e2b"), weights_bytes=0, context=4096).kv.notes
    assert "20 layers share another layer's cache and allocate nothing" in notes


def test_without_flash_attention_global_values_are_padded_to_the_sliding_width():
    """31B's V rows grow from 2048 to 4096 values when FA is off: 10 * 32,768 * 2048 * 2 B = 1280 MiB more."""
    on, off = (kv_mib("llama.cpp", "gemma-4-31b", 32 * KIB, flash_attention=fa) for fa in (True, False))

    assert (off[0] - on[0], off[1] - on[1]) == (1280, 0)
    assert kv_mib("llama.cpp", "llama-3.2-3b", 4096, flash_attention=False) == (28 * 2 * 8 * 128 * 2 * 4096 / MIB, 0)


def test_k_and_v_may_have_two_types():
    """Quantised K alone is legal, also without flash attention; charging both at one type is wrong by a quarter."""
    base, _ = kv_mib("llama.cpp", "qwen3-32b", 32 * KIB, kv="q8_0", kv_v="f16", flash_attention=False)

    assert base == 64 * 8 * 128 * (34 / 32 + 2) * 32 * KIB / MIB


def test_a_family_whose_window_llamacpp_does_not_know_is_cached_in_full():
    """Mistral 7B v0.1 has a window and llama.cpp's `llama` graph has none: planning a ring is 4x too little at 32k."""
    kv = rival_plan("llama.cpp", windowed_llama(), weights_bytes=0, context=32 * KIB).kv

    assert kv.sliding_bytes == 32 * 8 * 128 * 2 * 2 * 32 * KIB
    assert any("no window is known" in note for note in kv.notes)


def test_every_note_that_a_reader_needs_is_there():
    """A number without how it came about cannot be argued with."""
    text = " ".join(rival_plan("llama.cpp", model("gemma-4-31b"), weights_bytes=0, context=8192, slots=2).kv.notes)
    full = " ".join(rival_plan("llama.cpp", model("gemma-4-31b"), weights_bytes=0, context=8192, swa_full=True).kv.notes)

    assert "K and V of the 10 K=V layers are stored twice" in text
    assert "2560 cells = pad256(min(base, 1024 * 2 slots + ubatch 512))" in text
    assert "full-size sliding caches" in full


def test_llamacpp_refuses_quantised_values_without_flash_attention():
    """The engine exits at start; a plan that prints bytes sends the user into that."""
    with pytest.raises(PlanError, match="would not start") as error:
        kv_mib("llama.cpp", "qwen3-32b", 4096, kv="q8_0", flash_attention=False)
    assert "requires flash_attn" in error.value.why


def test_llamacpp_refuses_blocks_that_do_not_divide_a_head():
    """Head size 80 in blocks of 32 is refused by the engine for any layer."""
    with pytest.raises(PlanError, match="q8_0 for K") as error:
        rival_plan("llama.cpp", windowed_llama(head_dim=80), weights_bytes=0, context=4096, kv="q8_0")
    assert "head size 80" in error.value.why


def test_the_f16_copy_of_a_quantised_cache_is_two_gib_on_31b():
    """262,144 * (2048 + 2048) * 2: what a planner of caches alone misses; only above head size 256."""
    plan = rival_plan("llama.cpp", model("gemma-4-31b"), weights_bytes=0, context=256 * KIB, kv="q4_0")
    half = rival_plan("llama.cpp", model("gemma-4-31b"), weights_bytes=0, context=256 * KIB, kv="q4_0", kv_v="f16")
    small = rival_plan("llama.cpp", windowed_llama(head_dim=256), weights_bytes=0, context=256 * KIB, kv="q4_0")

    assert item(plan, "f16 copy of quantised KV") == 2 * GIB
    assert item(half, "f16 copy of quantised KV") == GIB
    assert all(i.label != "f16 copy of quantised KV" for i in small.items)


def test_scores_are_two_gib_without_flash_attention():
    """31B: 32 heads * 32,768 * 512 * 4 of one layer; with flash attention there are none."""
    off = rival_plan("llama.cpp", model("gemma-4-31b"), weights_bytes=0, context=32 * KIB, flash_attention=False)
    on = rival_plan("llama.cpp", model("gemma-4-31b"), weights_bytes=0, context=32 * KIB)

    assert item(off, "attention scores") == 2 * GIB
    assert all(i.label != "attention scores" for i in on.items)
    assert item(off, "attention masks") == 2 * item(on, "attention masks")  # f32 for f16


def test_masks_and_logits_have_their_formulas():
    """(32,768 + 1,536) cells * 512 * 2, four copies across two GPUs; 262,144 * 512 * 4 of logits."""
    one = rival_plan("llama.cpp", model("gemma-4-31b"), weights_bytes=7, context=32 * KIB)
    two = rival_plan("llama.cpp", model("gemma-4-31b"), weights_bytes=7, context=32 * KIB, n_gpus=2)

    assert item(one, "attention masks") == (32_768 + 1536) * 512 * 2
    assert item(two, "attention masks") == 4 * item(one, "attention masks")
    assert item(one, "logits") == 512 * MIB
    assert one.compute_bytes == item(one, "attention masks") + item(one, "logits")
    assert one.total_bytes == 7 + one.kv.n_bytes + one.compute_bytes
    assert one.own_estimate_bytes is None and "measures" in one.own_estimate_note


@pytest.mark.parametrize("kv", sorted(GGML_KV))
def test_every_type_of_the_flag_has_its_block(kv):
    """Sizes of ggml-common.h, per 32 values; Ollama's own estimator takes 32 for q8_0 and 16 for q4_0."""
    per_32 = {
        "f32": 128,
        "f16": 64,
        "bf16": 64,
        "q8_0": 34,
        "q4_0": 18,
        "q4_1": 20,
        "q5_0": 22,
        "q5_1": 24,
        "iq4_nl": 18,
    }

    base, _ = kv_mib("llama.cpp", "qwen3-32b", 256, kv=kv)

    assert base * MIB == 256 * 64 * 2 * 8 * 128 // 32 * per_32[kv]


@pytest.mark.parametrize(
    ("engine", "settings", "accepted"),
    [
        ("llama.cpp", {"kv": "fp8"}, "iq4_nl"),
        ("ollama", {"kv": "fp8"}, "iq4_nl"),
        ("ollama", {"kv": "q5_0", "version": "0.20.4"}, "f16, q8_0, q4_0"),
        ("vllm", {"kv": "q8_0"}, "fp8_e4m3"),
        ("vllm", {"kv_sliding": "q8_0"}, "fp8_e4m3"),
    ],
)
def test_an_unknown_kv_type_names_what_is_accepted(engine, settings, accepted):
    """Each engine has its own list; bytes planned for a type it does not have promise a server that will not start."""
    with pytest.raises(UsageError, match="no KV type") as error:
        kv_mib(engine, "qwen3-32b", 4096, **settings)
    assert accepted in error.value.why


@pytest.mark.parametrize(
    ("engine", "settings"),
    [
        ("llama.cpp", {"kv_sliding": "q8_0"}),
        ("ollama", {"kv": "q8_0", "kv_v": "f16"}),
        ("ollama", {"kv_sliding": "q8_0"}),
        ("ollama", {"swa_full": True}),
        ("ollama", {"unified": True}),
        ("vllm", {"kv": "fp8", "kv_v": "f16"}),
        ("vllm", {"unified": False}),
        ("vllm", {"flash_attention": False}),
    ],
)
def test_a_setting_the_engine_does_not_have_is_an_error(engine, settings):
    """Ignoring it would plan something that was not asked for."""
    with pytest.raises(UsageError):
        kv_mib(engine, "gemma-4-31b", 4096, **settings)


@pytest.mark.parametrize("bad", [{"context": 0}, {"slots": 0}, {"ubatch": -1}, {"n_gpus": 0}, {"weights_bytes": -1}])
def test_a_count_out_of_range_is_a_callers_bug(bad):
    """A negative slot count once made a negative cache."""
    with pytest.raises(ValueError, match="rival_plan"):
        rival_plan("llama.cpp", model("qwen3-32b"), **({"weights_bytes": 0, "context": 4096} | bad))


def test_more_slots_than_split_cells_is_refused():
    """llama.cpp throws `n_ctx_seq == 0`; the plan said 0 bytes and that it fits."""
    with pytest.raises(PlanError, match="257 slots"):
        kv_mib("llama.cpp", "qwen3-32b", 256, slots=257, unified=False)


def test_an_unknown_engine_is_named():
    """A misspelt engine must list the three there are."""
    with pytest.raises(UsageError, match="unknown engine"):
        rival_plan("exllama", model("qwen3-32b"), weights_bytes=0, context=1)


# --- Ollama ---------------------------------------------------------------------------------------------------------


def test_ollamas_own_engine_kept_4096_tokens_for_a_window_of_1024():
    """26B at 32,768 on 0.20: 640 + 900 MiB (log: "1.5 GiB"), 64 % more than llama.cpp's 940."""
    assert kv_mib("ollama", "gemma-4-26b-a4b", 32 * KIB, version="0.20.4") == (640, 900)


def test_ollamas_own_engine_on_e4b_meets_the_log():
    """0.20.0-rc1, E4B, 130,048 cells: `msg="kv cache" device=CUDA0 size="2.2 GiB"`."""
    total = sum(kv_mib("ollama", "gemma-4-e4b", 130_048, version="0.20.0-rc1"))

    assert total == 4 * 130_048 * 2 * 512 * 2 * 2 / MIB + 20 * 4608 * 2 * 256 * 2 * 2 / MIB
    assert round(total / KIB, 1) == 2.2


def test_gemma_3_in_ollamas_own_engine_keeps_its_window_and_a_batch():
    """window + batch, not 4096: (1024 + 512) cells * 52 layers * 16 heads * 128 * 2 * 2 B."""
    assert kv_mib("ollama", "gemma-3-27b", 32 * KIB, version="0.18.1")[1] == 1536 * 52 * 16 * 128 * 4 / MIB


def test_slots_of_ollamas_own_engine_share_one_ring_of_all_their_windows():
    """Two slots keep one token more each, for the stop token: pad256(2 * 1025 + 512) = 2816 cells."""
    two = kv_mib("ollama", "gemma-3-27b", 32 * KIB, version="0.18.1", slots=2)

    assert two == (2 * 2560, 2816 * 52 * 16 * 128 * 4 / MIB)


def test_a_context_within_the_ring_is_cached_in_full():
    """4096 tokens of gpt-oss: the ring would be 4608 cells, the whole context is 4096."""
    plan = rival_plan("ollama", model("gpt-oss-20b"), weights_bytes=0, context=4096, version="0.20.4")

    assert plan.kv.sliding_bytes == plan.kv.global_bytes == 12 * 4096 * 8 * 64 * 4
    assert any("full-size" in note for note in plan.kv.notes)


def test_cells_came_in_32s_without_flash_attention_before_0_13_2():
    """ml/backend/ggml CacheConfig: padding 32 with FA off, 256 with FA on; both 256 since 0.13.2."""
    cells = [
        rival_plan("ollama", model("gpt-oss-20b"), weights_bytes=0, context=1025, version=v, flash_attention=fa).kv.global_bytes
        // (12 * 8 * 64 * 4)
        for v, fa in (("0.13.0", False), ("0.13.0", True), ("0.13.2", False))
    ]

    assert cells == [1056, 1280, 1280]


def test_ollama_since_0_30_is_a_llama_server_with_a_split_cache():
    """`-c num_ctx*parallel -np parallel`: 31B, two slots of 4096: two caches, and batch 1024 for 8192 tokens."""
    one = kv_mib("ollama", "gemma-4-31b", 4096)
    two = kv_mib("ollama", "gemma-4-31b", 4096, slots=2)

    assert one == (320, 1200)
    assert two == (640, 2 * 2048 * 50 * 16 * 256 * 4 / MIB)


@pytest.mark.parametrize(
    ("context", "memory_gib", "fa", "cells"),
    [
        (4096, None, True, 1536),  # batch 512
        (8192, None, True, 2048),  # 1024
        (65_536, None, True, 3072),  # 2048
        (65_536, 180, True, 3072),
        (65_536, 40, True, 2048),  # 28.7 GiB predicted are over 60 % of 40 and under 75 %: 1024
        (65_536, 30, True, 1536),
        (65_536, 40, False, 1536),
        (65_536, 8, False, 1280),  # 256 on small cards
    ],
)
def test_ollama_widens_its_batch_with_the_context(context, memory_gib, fa, cells):
    """The batch is the ring's margin: planned at 512, a 64k context of 31B is 1200 MiB short of what is allocated."""
    plan = rival_plan(
        "ollama",
        model("gemma-4-31b"),
        weights_bytes=19 * GIB,
        context=context,
        flash_attention=fa,
        gpu_memory_bytes=memory_gib and memory_gib * GIB,
    )

    assert plan.kv.sliding_bytes == cells * 50 * 16 * 256 * 2 * 2


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("gemma-4-31b", 4.92),
        ("gemma-4-26b-a4b", 1.29),
        ("gemma-4-12b", 1.41),
        ("gemma-4-e4b", 3.28),
        ("gemma-4-e2b", 0.82),
        ("gemma-3-27b", 20.34),
    ],
)
def test_ollamas_prediction_since_0_30(name, gib):
    """PredictServerVRAM at 32,768, without the file: 1.3x the truth on 31B, 6x on E4B and Gemma 3 27B."""
    plan = rival_plan("ollama", model(name), weights_bytes=0, context=32 * KIB)

    assert plan.own_estimate_bytes is not None
    assert round(plan.own_estimate_bytes / GIB, 2) == gib


def test_ollamas_prediction_ignores_the_kv_type():
    """31B at 262,144: 42 GB predicted, 6.1 GiB real at q4_0."""
    f16, q4 = (rival_plan("ollama", model("gemma-4-31b"), weights_bytes=0, context=256 * KIB, kv=k) for k in ("f16", "q4_0"))

    assert f16.own_estimate_bytes == q4.own_estimate_bytes == 2 * 60 * 4 * (5376 // 32) * 256 * KIB * 2
    assert round((q4.own_estimate_bytes or 0) / GB) == 42


def test_ollama_since_0_30_passes_any_type_and_dies_with_flash_attention_off():
    """`OLLAMA_FLASH_ATTENTION=0 OLLAMA_KV_CACHE_TYPE=q8_0`, advised in articles, makes llama-server refuse to start."""
    assert sum(kv_mib("ollama", "qwen3-32b", 4096, kv="q5_1")) > 0
    with pytest.raises(PlanError, match="would not start"):
        kv_mib("ollama", "qwen3-32b", 4096, kv="q8_0", flash_attention=False)


def test_ollama_before_0_30_drops_a_quantised_type_without_flash_attention():
    """The same advice on 0.20: one warning, and a cache of f16, twice what was planned."""
    plan = rival_plan(
        "ollama",
        model("gemma-4-31b"),
        weights_bytes=0,
        context=8192,
        kv="q8_0",
        flash_attention=False,
        version="0.20.4",
    )
    f16 = rival_plan("ollama", model("gemma-4-31b"), weights_bytes=0, context=8192, flash_attention=False, version="0.20.4")

    assert plan.kv == f16.kv
    assert any("q8_0 is dropped" in note for note in plan.notes)


def test_ollama_cuts_the_context_to_what_the_model_was_trained_for():
    """num_ctx beyond the training context is clamped with a warning; the plan would hold bytes nobody allocates."""
    plan = rival_plan("ollama", model("qwen3-32b"), weights_bytes=0, context=10**12)

    assert plan.kv == rival_plan("ollama", model("qwen3-32b"), weights_bytes=0, context=40_960).kv
    assert any("40960" in note for note in plan.notes)


def test_ollamas_own_engine_measures_and_predicts_nothing():
    """Quoting GraphSize for Gemma 4 on 0.20 would blame an estimate that never ran."""
    for version, word in (("0.20.4", "measures"), ("0.12.0", "not modelled")):
        plan = rival_plan("ollama", model("qwen3-32b"), weights_bytes=0, context=4096, version=version)
        assert plan.own_estimate_bytes is None and word in plan.own_estimate_note


def test_the_estimate_of_llama_models_on_the_old_runner():
    """4 * batch * (1 + 4 * hidden + context * (1 + heads)) per GPU, and KV of every layer."""
    plan = rival_plan("ollama", model("llama-3.2-3b"), weights_bytes=2 * GB, context=8192, version="0.18.1")
    old = rival_plan("ollama", model("llama-3.2-3b"), weights_bytes=2 * GB, context=8192, version="0.9.6")

    graph = 4 * 512 * (1 + 4 * 3072 + 8192 * 25)
    assert plan.own_estimate_bytes == 2 * GB + 8192 * 28 * 2 * 8 * 128 * 2 + graph == old.own_estimate_bytes
    assert "457 MiB and one layer" in old.own_estimate_note


@pytest.mark.parametrize(
    ("version", "vram_gib", "expected"),
    [
        (None, 48, 262_144),
        (None, 47, 262_144),
        (None, 46.9, 32_768),
        (None, 24, 32_768),
        (None, 22.9, 4096),
        ("0.15.4", 80, 4096),
        ("0.6.6", 80, 2048),
    ],
)
def test_ollamas_default_context_by_release_and_memory(version, vram_gib, expected):
    """A 24 GB card got 4k in 2025 and gets 32k since 0.15.5: half of all "why so little context" questions."""
    assert ollama_default_context(version, vram_bytes=int(vram_gib * GIB), max_context=262_144) == expected
    assert ollama_default_context(version, vram_bytes=int(vram_gib * GIB), max_context=1000) == 1000


# --- EXAONE 4.0 32B on 12 + 24 GB, the figures that people quote ----------------------------------------------------

EXAONE = "exaone-4.0-32b"
Q4_K_M, Q5_K_M = round(19.3 * GB), round(22.7 * GB)


def exaone(weights_bytes, context, *, kv="q8_0", version="0.18.1"):
    return rival_plan("ollama", model(EXAONE), weights_bytes=weights_bytes, context=context, kv=kv, n_gpus=2, version=version)


def test_exaone_262144_bytes_per_token_counts_all_64_layers_as_global():
    """The quoted 262,144 B per token is f16 with 64 layers * 2 * 8 * 128; 48 of them see 4,096 tokens only.

    Deviation: with rings a token costs 65,536 B, beside a fixed ring of pad256(4096 + 512) cells. Ollama 0.18.1 did
    allocate the quoted figure, for its runner inherited full-size sliding caches.
    """
    quoted = exaone(0, 32 * KIB, kv="f16").kv
    ring = [rival_plan("llama.cpp", model(EXAONE), weights_bytes=0, context=c).kv for c in (32 * KIB, 33 * KIB)]

    assert quoted.n_bytes == 262_144 * 32 * KIB
    assert ring[1].n_bytes - ring[0].n_bytes == 65_536 * KIB
    assert ring[0].sliding_bytes == 4608 * 48 * 8 * 128 * 4


@pytest.mark.parametrize(
    ("weights", "context", "estimate_gb", "kv_gb", "used_gb"),
    [(Q4_K_M, 45 * KIB, 35.4, 6.42, 27), (Q5_K_M, 37 * KIB, 35.9, 5.28, 29)],
)
def test_exaone_35_gb_estimated_27_and_29_used(weights, context, estimate_gb, kv_gb, used_gb):
    """45K at Q4_K_M and 37K at Q5_K_M: Ollama said 35 GB, the cards held 27 and 29.

    Deviation: 10 GB of the 35 are a graph of heads/KV heads * KV / 6 for each of two GPUs (5 * 6.04 / 6 = 5.03 GB);
    flash attention never allocates it. q8_0 was on (in f16 the estimate would be 51.5 GB and could not have been "100 %
    GPU"), and takes 34/32 B where the estimator says 1. What was used: weights, 6.42 GB of cache with every sliding
    layer at full size, masks, logits, and 457 MiB of driver on each card.
    """
    plan = exaone(weights, context)

    assert plan.own_estimate_bytes is not None
    assert round(plan.own_estimate_bytes / GB, 1) == estimate_gb
    assert round(plan.kv.n_bytes / GB, 2) == kv_gb
    assert round(plan.total_bytes / GB) == used_gb
    assert any("full-size" in note for note in plan.kv.notes)
    assert "2 GPUs * 5 * KV / 6" in plan.own_estimate_note


def test_exaone_in_f16_would_have_been_estimated_at_51_and_49_gb():
    """The article says q8_0 fell back to f16; then no 36 GB of cards could have shown "100 % GPU"."""
    rows = [exaone(w, c, kv="f16").own_estimate_bytes for w, c in ((Q4_K_M, 45 * KIB), (Q5_K_M, 37 * KIB))]

    assert [round((row or 0) / GB, 1) for row in rows] == [51.5, 49.2]


@pytest.mark.parametrize(("weights", "context"), [(Q4_K_M, 90 * KIB), (Q5_K_M, 70 * KIB)])
def test_exaone_90k_and_70k_fit_all_along(weights, context):
    """ "About 90K and 70K with q8_0" is quoted as what one would gain; q8_0 was already on.

    Deviation: these contexts fit 12 + 24 GB as it was, even with full-size sliding caches; only the estimate, which
    said far more than 36 GB, kept them out. With rings the cache of 90K is 3.7 GB, not 12.8.
    """
    plan = exaone(weights, context)
    ring = rival_plan("llama.cpp", model(EXAONE), weights_bytes=weights, context=context, kv="q8_0", n_gpus=2)

    assert plan.total_bytes < 36 * GB < (plan.own_estimate_bytes or 0)
    assert ring.kv.n_bytes == (16 * context + 48 * 4608) * 8 * 128 * 2 * 34 // 32


def test_exaone_rings_would_have_taken_2_09_gb():
    """4.3 GB of the 6.42 were wasted by full-size sliding caches: 45K with rings is 2.09 GB at q8_0."""
    kv = rival_plan("llama.cpp", model(EXAONE), weights_bytes=0, context=45 * KIB, kv="q8_0").kv

    assert round(kv.n_bytes / GB, 2) == 2.09


# --- vLLM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "gib"), [(2048, 3.9), (8192, 13.3)])
def test_vllm_keeps_a_window_and_all_tokens_in_flight(batch, gib):
    """31B: 3.9 GiB of sliding KV per request at 2 * 2048 in flight, 13.3 at 2 * 8192, against 0.78 for bare windows."""
    _, sliding = kv_mib("vllm", "gemma-4-31b", 128 * KIB, ubatch=batch)

    pages = -(-(1023 + 2 * batch) // 16) + 1
    assert sliding * MIB == pages * 16 * 50 * 16 * 256 * 4
    assert round(sliding / KIB, 1) == gib


def test_vllm_pages_hold_16_tokens_and_a_short_request_needs_one_page_more():
    """100 tokens: 7 pages in a global layer, 8 in a sliding one, whose window may start within a page."""
    base, sliding = kv_mib("vllm", "gemma-4-31b", 100)

    assert base * MIB == 7 * 16 * 10 * 4 * 512 * 4
    assert sliding * MIB == 8 * 16 * 50 * 16 * 256 * 4


def test_vllm_stores_k_equals_v_twice_and_loads_its_weights_twice():
    """31B: 10 layers * 2048 * 5376 weights, 2 B each in bf16, on top of the file."""
    n_weights = sum(tensor.n_elements for tensor in weight_tensors(model("gemma-4-31b")))
    plan = rival_plan("vllm", model("gemma-4-31b"), weights_bytes=2 * n_weights, context=4096)
    plain = rival_plan("vllm", model("qwen3-32b"), weights_bytes=GB, context=4096)

    assert item(plan, "K weights, again") == 10 * 2048 * 5376 * 2
    assert "K and V of the 10 K=V layers are stored twice" in plan.kv.notes
    assert [i.label for i in plain.items] == ["weights", "KV, global layers"]


def test_vllm_without_its_hybrid_manager_caches_everything():
    """Sliding layers become full ones: 60 layers of 31B at 32k as llama.cpp's --swa-full, 28,160 MiB."""
    assert sum(kv_mib("vllm", "gemma-4-31b", 32 * KIB, swa_full=True)) == 28_160


def test_vllm_copies_a_kv_head_that_it_cannot_split():
    """12B's global layers have one KV head: two GPUs hold it twice, so the global cache doubles, no other."""
    one, two = (kv_mib("vllm", "gemma-4-12b", 32 * KIB, n_gpus=n) for n in (1, 2))

    assert two == (2 * one[0], one[1])


def test_vllm_types_by_kind_of_layer():
    """fp8 halves; `kv_cache_dtype_skip_layers` can leave the sliding layers at bf16."""
    bf16, fp8 = kv_mib("vllm", "gemma-4-31b", 32 * KIB), kv_mib("vllm", "gemma-4-31b", 32 * KIB, kv="fp8")

    assert fp8 == (bf16[0] / 2, bf16[1] / 2)
    assert kv_mib("vllm", "gemma-4-31b", 32 * KIB, kv="fp8", kv_sliding="auto") == (fp8[0], bf16[1])


def test_vllm_claims_its_share_of_the_card_whatever_the_model_needs():
    """0.92 of 80 GiB for a 1 GB model; before 0.26 which share was the default is not established."""
    llama = model("llama-3.2-3b")
    new = rival_plan("vllm", llama, weights_bytes=GB, context=4096, gpu_memory_bytes=100 * GIB, n_gpus=2)
    unsaid = rival_plan("vllm", llama, weights_bytes=GB, context=4096)
    old = rival_plan("vllm", llama, weights_bytes=GB, context=4096, gpu_memory_bytes=100 * GIB, version="0.19.0")

    assert new.own_estimate_bytes == 184 * GIB
    assert unsaid.own_estimate_bytes is None and old.own_estimate_bytes is None
    assert any("0.33.0" in note for note in old.notes)


# --- all engines ----------------------------------------------------------------------------------------------------

SETUPS = [
    ("llama.cpp", {}),
    ("llama.cpp", {"unified": False}),
    ("llama.cpp", {"flash_attention": False}),
    ("llama.cpp", {"kv": "q4_0"}),
    ("llama.cpp", {"swa_full": True}),
    ("ollama", {}),
    ("ollama", {"version": "0.20.4", "kv": "q8_0"}),
    ("ollama", {"version": "0.5.7"}),
    ("vllm", {"kv": "fp8"}),
]
counts = st.integers(1, 2**63)


@given(
    name=st.sampled_from(MODELS),
    setup=st.sampled_from(SETUPS),
    context=st.one_of(counts, st.sampled_from([1, 10**12, 2**63])),
    slots=st.one_of(st.integers(1, 64), st.just(2**63)),
    n_gpus=st.integers(1, 16),
    ubatch=st.one_of(st.none(), counts),
    weights=st.integers(0, 2**63),
)
def test_every_plan_is_exact_whole_bytes_that_sum_up(name, setup, context, slots, n_gpus, ubatch, weights):
    """10^12 tokens or 2^63 slots in floats lose bytes, and negative ones once fitted any card."""
    engine, settings = setup
    assume(settings != {"unified": False} or slots <= context)
    plan = rival_plan(
        engine,
        model(name),
        weights_bytes=weights,
        context=context,
        slots=slots,
        n_gpus=n_gpus,
        ubatch=ubatch,
        **settings,
    )

    sizes = [i.n_bytes for i in plan.items]
    assert all(type(n) is int and n >= 0 for n in [*sizes, plan.compute_bytes, plan.own_estimate_bytes or 0])
    assert plan.total_bytes == sum(sizes)
    assert plan.kv.n_bytes == plan.kv.global_bytes + plan.kv.sliding_bytes > 0
    assert plan.total_bytes >= weights + plan.kv.n_bytes + plan.compute_bytes


MONOTONE = [s for s in SETUPS if s[1] != {"unified": False}]  # a split context is padded per slot: 3 slots may beat 4


@given(
    name=st.sampled_from(MODELS),
    setup=st.sampled_from(MONOTONE),
    contexts=st.tuples(counts, counts),
    slots=st.tuples(st.integers(1, 99), st.integers(1, 99)),
)
def test_more_context_or_more_slots_never_take_less(name, setup, contexts, slots):
    """A plan that shrinks when the context grows sends the search for the largest context astray."""
    engine, settings = setup
    plans = {
        (c, s): rival_plan(engine, model(name), weights_bytes=0, context=c, slots=s, **settings).kv
        for c, s in itertools.product(sorted(contexts), sorted(slots))
    }

    small, large = (min(contexts), min(slots)), (max(contexts), max(slots))
    for middle in ((small[0], large[1]), (large[0], small[1])):
        assert plans[small].global_bytes <= plans[middle].global_bytes <= plans[large].global_bytes
        assert plans[small].sliding_bytes <= plans[middle].sliding_bytes <= plans[large].sliding_bytes
