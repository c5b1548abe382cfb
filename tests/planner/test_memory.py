"""The plan's numbers by arithmetic, its limits, and its answers to absurd questions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise import api
from headwise.errors import HeadwiseError, PlanError, UsageError
from headwise.hardware.gpus import find_gpu
from headwise.planner.ceiling import ceiling, step_sizes
from headwise.planner.memory import SERVE_SLOTS, Plan, Room, Target, Workload, plan, rooms
from headwise.planner.quantise import weight_types
from headwise.planner.rank import rank
from headwise.planner.workspace import arena_bytes, offsets, workspace
from headwise.spec import catalogue
from headwise.spec.kv import KV_FORMATS

GIB = 2**30
BF16 = {"global": KV_FORMATS["bf16"], "sliding": KV_FORMATS["bf16"]}
G31 = catalogue.spec("gemma-4-31b")
Q4 = weight_types(G31, "q4_k_m")


def workload(context: int, **more: object) -> Workload:
    return Workload(**({"context": context, "kv": BF16, "dtype": "bf16"} | more))  # type: ignore[arg-type]


def card(gib: float, *, others: int = 0) -> Target:
    return Target(name=f"{gib} GiB", gpu=None, total_bytes=int(gib * GIB), others_bytes=others)


def test_gemma_4_31b_by_hand() -> None:
    """10 global layers of 4 heads x (512 + 128 rotated) in one tensor; 50 rings of 1024 + 512 + 8 slots, K and V of 256."""
    p = plan(G31, Q4, workload(131_072))

    assert p.kv_global_bytes == 10 * 131_072 * 4 * (512 + 128) * 2
    assert p.kv_sliding_bytes == 50 * (1024 + 512 + 8) * 16 * (256 + 256) * 2
    assert p.total_bytes == p.weights_bytes + p.kv_bytes + p.compute_bytes
    assert p.fits is None
    assert p.max_context is None


def test_a_quantised_file_stays_quantised_on_a_gpu() -> None:
    """A Q4_K_M plan that counted bf16 would be 3.3 times too large; the norms are fp32."""
    p = plan(G31, Q4, workload(4096))

    assert p.resident["layers.0.q"] == "q4_k"
    assert p.resident["embed"] == "q6_k"
    assert 17.3 * GIB < p.weights_bytes < 17.5 * GIB


def test_layers_that_share_a_cache_cost_none() -> None:
    """Gemma 4 E2B: 35 layers, of which 3 global and 12 sliding own a cache."""
    spec = catalogue.spec("gemma-4-e2b")
    p = plan(spec, weight_types(spec, "bf16"), workload(8192))

    assert p.kv_global_bytes == 3 * 8192 * 1 * 2 * 512 * 2
    assert p.kv_sliding_bytes == 12 * (512 + 512 + 8) * 1 * 2 * 256 * 2


def test_the_largest_context_is_the_boundary() -> None:
    most = plan(G31, Q4, workload(4096), [card(24)]).max_context
    assert most is not None
    assert plan(G31, Q4, workload(most), [card(24)]).fits
    assert not plan(G31, Q4, workload(most + 1), [card(24)]).fits


def test_memory_of_other_processes_is_theirs() -> None:
    free = plan(G31, Q4, workload(4096), [card(24)]).max_context
    used = plan(G31, Q4, workload(4096), [card(24, others=2 * GIB)]).max_context

    assert free is not None
    assert used is not None
    # a token costs 10 layers x 4 heads x 640 values x 2 bytes, and a column of nothing else
    assert abs((free - used) - 2 * GIB / (10 * 4 * 640 * 2)) < 512


def test_uneven_cards_get_uneven_shares_of_whole_layers() -> None:
    p = api.plan("gemma-4-31b", context=65_536, kv="q8_0", weights="q4_k_m", gpus=["rtx3060:12", "rtx3090:24"])
    first, second = p.shares

    assert p.fits
    assert first.layers + second.layers == tuple(range(60))
    assert 0.35 < len(first.layers) / len(second.layers) < 0.6
    fill = [s.planned_bytes / s.target.usable_bytes for s in p.shares]
    assert abs(fill[0] - fill[1]) < 0.08
    assert not p.notes


def test_a_layer_stays_with_the_cache_it_reads() -> None:
    """E2B's last 20 layers read caches of layers 13 and 14: no card may hold one without the other."""
    p = api.plan("gemma-4-e2b", context=8192, gpus=["rtx3060:12", "rtx3090:24"])
    for share in p.shares:
        for i in share.layers:
            source = p.spec.layers[i].kv_source
            assert source is None or source in share.layers


def test_a_plan_that_does_not_fit_names_what_does() -> None:
    p = api.plan("gemma-4-31b", context=32_768, gpus=["rtx4090"])

    assert p.fits is False
    assert any("CPU are not planned for" in n for n in p.notes)
    named = next(n for n in p.notes if n.startswith("--weights"))
    assert "q4_k_m" in named
    assert api.plan("gemma-4-31b", context=32_768, gpus=["rtx4090"], weights="q4_k_m").fits


@pytest.mark.parametrize("context", [10**12, 2**63, 2**64, 0, -1, -(2**63)])
def test_absurd_contexts_are_refused_in_words(context: int) -> None:
    with pytest.raises(HeadwiseError, match=str(context)):
        api.plan("gemma-4-31b", context=context)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2**63 - 1), st.integers(1, 2**31), st.integers(1, 2**31), st.sampled_from(sorted(KV_FORMATS)))
def test_any_legal_number_is_answered_exactly(context: int, slots: int, chunk: int, kv: str) -> None:
    """No overflow, no float, nothing allocated: bytes are linear in tokens however many there are."""
    spec = replace(G31, max_context=2**63)
    fmt = KV_FORMATS[kv]
    p = plan(spec, Q4, workload(context, slots=slots, chunk=chunk, kv={"global": fmt, "sliding": fmt}))
    pages = -(-context // 64) * 64

    assert p.kv_global_bytes == slots * 10 * pages * 4 * fmt.row_bytes(640)
    assert p.kv_sliding_bytes == slots * 50 * min(1024 + chunk + 8, pages) * 16 * 2 * fmt.row_bytes(256)


@pytest.mark.parametrize(("name", "value"), [("slots", 0), ("slots", -1), ("chunk", 0), ("chunk", 2**40)])
def test_counts_that_make_no_sense_are_usage_errors(name: str, value: int) -> None:
    with pytest.raises(UsageError):
        plan(G31, Q4, workload(4096, **{name: value}))


def test_a_context_beyond_the_models_own_says_the_maximum() -> None:
    with pytest.raises(PlanError) as caught:
        plan(G31, Q4, workload(262_145))
    assert caught.value.do == "--context 262144"


def test_buffers_of_one_phase_never_overlap_and_stay_inside() -> None:
    buffers = workspace(
        catalogue.spec("gemma-4-26b-a4b"), n_tokens=4096, chunk=96, dtype="bf16", kv=BF16, cpu=False, block_weights=True
    )
    where = offsets(buffers)
    spans = [(where[b.name], where[b.name] + b.n_bytes, b.phase, b.name) for b in buffers if not b.reserved]
    end = arena_bytes(buffers) - sum(b.n_bytes for b in buffers if b.reserved)

    assert max(stop for _, stop, _, _ in spans) <= end
    for a_start, a_stop, a_phase, a in spans:
        for b_start, b_stop, b_phase, b in spans:
            if a < b and (a_phase == b_phase or "always" in (a_phase, b_phase)):
                assert a_stop <= b_start or b_stop <= a_start, (a, b)


def test_the_ceiling_is_bytes_over_bandwidth() -> None:
    """Qwen3 8B in bf16 at 4,096 tokens: all weights but the untied table, and 36 layers of cache, over 936 GB/s."""
    spec = catalogue.spec("qwen3-8b")
    p = api.plan("qwen3-8b", context=4096, gpus=["rtx3090:24"])
    table = 151_936 * 4096 * 2
    read = p.weights_bytes - table + table / 151_936 + 36 * 4096 * 8 * 2 * 128 * 2

    assert ceiling(p, find_gpu("rtx3090:24")).decode_tok_s == pytest.approx(936e9 / read, rel=0.01)
    assert spec.tied is False


def test_ranking_leaves_out_what_does_not_fit_and_prefers_better_weights() -> None:
    fits = {f.model: f for f in rank(catalogue.specs(), [card(24)])}

    assert fits["gemma-4-e4b"].weights == "bf16"
    assert fits["gemma-4-31b"].weights == "q4_k_m"
    assert "qwen3-32b" in fits
    assert rank(catalogue.specs(), [card(0.9)]) == []


def served(context: int, gib: float, **more: object) -> Plan:
    return plan(G31, Q4, workload(context, rooms=rooms(context, None, None, [512]), by_default=True, **more), [card(gib)])


@given(gib=st.integers(190, 420).map(lambda n: n / 10), context=st.integers(1, 100_000))
@settings(max_examples=25, deadline=None)
def test_a_server_takes_the_most_that_fits_and_a_user_alone_loses_nothing(gib: float, context: int) -> None:
    """More slots at the cost of the context would refuse prompts that were answered."""
    alone = plan(G31, Q4, workload(context), [card(gib)])
    p = served(context, gib)
    w, at = p.workload, rooms(context, None, None, [512]).index(Room(p.workload.slots, p.workload.pool))

    assert (p.fits, p.max_context) == (alone.fits, alone.max_context)
    assert w.pool_tokens >= context == w.context
    for better in rooms(context, None, None, [512])[:at]:
        assert not plan(G31, Q4, workload(context, slots=better.slots, pool=better.pool), [card(gib)]).fits


def test_slots_come_before_pages_and_the_reason_says_what_is_shared() -> None:
    """0.75 GiB margin, 17.72 weights and workspace, 1.18 a sequence's rings, 1.56 the pages of a context of 32,768."""
    found = [served(32_768, gib).workload for gib in (48, 27, 23, 22)]
    slots_and_contexts = [(w.slots, w.pool_tokens // 32_768) for w in found]

    assert slots_and_contexts == [(4, 4), (4, 2), (2, 1), (1, 1)]
    assert served(32_768, 48).notes[0].endswith("there are pages for all of it each")
    assert "65,536 tokens of pages together" in served(32_768, 27).notes[0]
    assert served(32_768, 23).notes[0].startswith("2 slots by default, of 4 at most")
    assert "do not fit beside 32,768 tokens" in served(32_768, 22).notes[0]


def test_a_step_is_what_the_card_computes_in_half_a_second() -> None:
    """31B: 58.6 billion operations a token; 989, 165 and 71 TFLOP/s make 8,400, 1,400 and 600 tokens in half a second."""
    for gpu, wanted in (("h200", (2048, 1024, 512)), ("rtx4090", (1024, 512)), ("rtx3090", (512,))):
        assert step_sizes(G31, [find_gpu(gpu)]) == wanted
    assert step_sizes(G31, [find_gpu("h200"), find_gpu("rtx3090")]) == (512,)
    assert step_sizes(G31, [None]) == step_sizes(G31, []) == (512,)  # a card that the table lacks, the CPU


def test_a_step_that_is_launched_more_slowly_than_it_runs_is_longer() -> None:
    """4,096 tokens of 26B-A4B, 6.1 billion operations each: 25 ms of an H200's rate, 153 of an RTX 4090's; of 12B 90."""
    a4b, dense = catalogue.spec("gemma-4-26b-a4b"), catalogue.spec("gemma-4-12b")

    assert step_sizes(a4b, [find_gpu("h200")]) == (4096, 2048, 1024, 512)
    assert step_sizes(a4b, [find_gpu("rtx4090")]) == step_sizes(dense, [find_gpu("h200")]) == (2048, 1024, 512)


@given(gib=st.integers(190, 420).map(lambda n: n / 10), context=st.integers(1, 100_000))
@settings(max_examples=25, deadline=None)
def test_longer_steps_cost_no_slot_no_page_and_no_context(gib: float, context: int) -> None:
    """Their rings are twice as long: 1.3 GB a sequence of 31B."""
    short = served(context, gib)
    p = plan(G31, Q4, workload(context, rooms=rooms(context, None, None, [2048, 1024, 512])), [card(gib)])

    assert (p.fits, p.max_context) == (short.fits, short.max_context)
    assert (p.workload.slots, p.workload.pool) == (short.workload.slots, short.workload.pool)
    assert p.kept_bytes == short.kept_bytes  # copies are as long as a later prompt goes back
    for longer in (2048, 1024):
        better = workload(context, slots=p.workload.slots, pool=p.workload.pool, chunk=longer)
        assert p.workload.chunk >= min(longer, context) or not plan(G31, Q4, better, [card(gib)]).fits


def test_a_pool_that_is_said_stays_so() -> None:
    p = plan(G31, Q4, workload(8192, rooms=rooms(8192, None, 20_000, [512])), [card(23)])

    assert (p.workload.slots, p.workload.pool) == (3, 20_000)
    assert SERVE_SLOTS == len(rooms(8192, None, 20_000, [512])) == 4


def test_on_a_cpu_copies_of_rings_fit_beside_the_slots() -> None:
    """They lie in the same memory; a slot more and no copy would make every agent's turn the first."""
    spec = catalogue.spec("gemma-4-e2b")
    stored = weight_types(spec, "bf16")
    four = plan(spec, stored, workload(8192, slots=4, cpu=True))

    def taken(n_bytes: int) -> Plan:
        target = Target(name="cpu", gpu=None, total_bytes=n_bytes, margin_bytes=0)
        return plan(spec, stored, workload(8192, cpu=True, rooms=rooms(8192, None, None, [512])), [target])

    assert taken(four.total_bytes + four.kept_bytes).workload.slots == 4
    assert taken(four.total_bytes + four.kept_bytes - 1).workload.pool_tokens < four.workload.pool_tokens
    assert four.kept_bytes == 5 * four.kv_sliding_bytes // 4


def test_what_a_server_hands_on_keeps_its_reason() -> None:
    """Its engine goes on from the rooms that are left: with one slot left it said no more why there is one."""
    first = served(32_768, 22)
    again = plan(G31, Q4, first.workload, [card(22)])

    assert again.notes == first.notes and "do not fit beside 32,768 tokens" in first.notes[0]
    assert plan(G31, Q4, workload(32_768, rooms=rooms(32_768, 1, None, [2048, 512])), [card(48)]).notes == ()
