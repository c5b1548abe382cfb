"""Planned is allocated, streams behave, and bad input is refused before it costs anything."""

from __future__ import annotations

import pytest
import tiny
import torch
from checkpoints import load

from headwise import LLM
from headwise.attention.capability import DeviceKind
from headwise.engine import llm as llm_module
from headwise.engine.devices import slower
from headwise.engine.measure import allocated_bytes
from headwise.errors import BackendError, HeadwiseError, PlanError, SpecError, UsageError
from headwise.hardware.gpus import find_gpu
from headwise.spec.kv import KV_FORMATS

IDS = list(range(3, 60))


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize(("context", "chunk"), [(1, 64), (77, 5), (128, 64)])
def test_planned_is_allocated_to_the_byte(name: str, kv: str, context: int, chunk: int) -> None:
    try:
        llm = load(name, kv=kv, context=context, chunk=chunk)
    except UsageError as error:
        assert "do not divide" in str(error)
        assert KV_FORMATS[kv].quantised
        return

    assert llm.plan.total_bytes == allocated_bytes(llm.runner)


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("kv", ["f32", "f16"])
def test_the_plan_bounds_the_measured_peak_within_a_tenth_of_compute(name: str, kv: str) -> None:
    """An operator that allocates beside the arena, or a reserve for nothing, moves the ratio out of 0.9..1."""
    llm = load(name, kv=kv, context=128, chunk=96)
    llm.logits(list(range(1, 97)))
    held = llm.runner.peak_bytes - llm.plan.weights_bytes - llm.plan.kv_bytes

    assert 0.9 * llm.plan.compute_bytes <= held <= llm.plan.compute_bytes


@pytest.mark.parametrize("kv", ["f16", "bf16", "fp8", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["gemma4-31b", "qwen3", "gpt-oss"])
def test_a_cache_read_by_tiles_gives_the_same_at_every_chunk(name: str, kv: str) -> None:
    """Token by token, the whole cache is read in tiles of one chunk; a tile's mask or scale off by one shows here."""
    llm = load(name, kv=kv, chunk=16)
    whole = llm.logits(IDS, chunk=16)

    for chunk in (1, 5):  # a value on the edge of two codes may round either way: the mean, not the largest
        assert (llm.logits(IDS, chunk=chunk) - whole).abs().mean() < 0.02


@pytest.mark.parametrize("kv", ["f32", "f16", "fp8", "q8_0", "q4_0"])
@pytest.mark.parametrize(("context", "chunk"), [(1, 64), (77, 5), (128, 96)])
def test_v_alone_is_planned_as_it_is_allocated(kv: str, context: int, chunk: int) -> None:
    """Keys are made a tile at a time: their room and their angles are of the arena, and the peak stays in the plan."""
    llm, stored = (load("gemma4-31b", kv=kv, kv_layout=x, context=context, chunk=chunk) for x in ("v", None))
    llm.logits(list(range(1, context + 1)))
    held = llm.runner.peak_bytes - llm.plan.weights_bytes - llm.plan.kv_bytes

    assert llm.plan.total_bytes == allocated_bytes(llm.runner)
    assert llm.plan.kv_global_bytes * 96 == stored.plan.kv_global_bytes * 64  # 64 values, and 16 rotated ones padded to 32
    assert held <= llm.plan.compute_bytes
    assert chunk < 96 or 0.9 * llm.plan.compute_bytes <= held


@pytest.mark.parametrize("kind", ["global", "sliding"])
@pytest.mark.parametrize("kv", ["bf16", "fp8", "q8_0"])
def test_one_kind_alone_is_stored_in_another_type(kind: str, kv: str) -> None:
    """A global layer's row (640 values) was carved from the scratch that a sliding layer's (2 x 256) had been planned for."""
    llm = LLM(kv={kind: kv}, device="cpu", context=64, chunk=16, check=False)
    whole = LLM(device="cpu", context=64, chunk=16, check=False).logits(IDS)

    assert 0 < (llm.logits(IDS) - whole).abs().mean() < 0.2
    assert llm.plan.total_bytes == allocated_bytes(llm.runner)


def test_greedy_tokens_are_the_arg_max_of_the_logits() -> None:
    llm = load("qwen3")
    tokens = llm.generate(IDS[:20], max_tokens=5).tokens

    for i, token in enumerate(tokens):
        assert int(llm.logits(IDS[:20] + tokens[:i])[-1].argmax()) == token


def test_a_seed_repeats_and_another_differs() -> None:
    llm = load("llama")

    def draw(seed: int) -> list[int]:
        return llm.generate(IDS[:9], max_tokens=12, temperature=1.5, seed=seed).tokens

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_an_abandoned_stream_leaves_the_model_usable() -> None:
    """Ctrl-C in the middle of an answer must not leave half a sequence behind."""
    llm = load("gemma3")
    expected = llm.generate(IDS[:30], max_tokens=6).tokens
    stream = llm.stream(IDS[:40], max_tokens=50)
    next(stream)
    stream.close()

    assert llm.generate(IDS[:30], max_tokens=6).tokens == expected


def test_an_answer_ends_where_the_context_ends() -> None:
    llm = load("mistral", context=20)
    result = llm.generate(IDS[:15], max_tokens=100)

    assert len(result.tokens) == 6  # 5 more fit; the last token needs no slot
    assert result.finish == "length"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m.generate(list(range(1, 130))), PlanError, "the context is 128"),
        (lambda m: m.generate([]), UsageError, "empty"),
        (lambda m: m.logits([3, 320]), UsageError, "320"),
        (lambda m: m.logits([-1]), UsageError, "-1"),
        (lambda m: m.logits([3], chunk=65), UsageError, "1..64"),
        (lambda m: m.generate([3], max_tokens=0), UsageError, "max-tokens"),
        (lambda m: m.generate([3], temperature=-1.0), UsageError, "temperature"),
        (lambda m: m.generate([3], top_p=0.0), UsageError, "top-p"),
        (lambda m: m.generate("text"), SpecError, "tokenizer"),
    ],
)
def test_bad_requests_are_refused_in_words(call: object, error: type[HeadwiseError], words: str) -> None:
    with pytest.raises(error, match=words):
        call(load("llama"))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"context": 10**6}, PlanError),
        ({"context": 0}, UsageError),
        ({"context": -5}, UsageError),
        ({"kv": "q9"}, UsageError),
        ({"kv": {"globl": "f16"}}, UsageError),
        ({"dtype": "f64"}, UsageError),
        ({"device": "tpu"}, UsageError),
    ],
)
def test_bad_settings_are_refused_before_loading(
    settings: dict[str, object], error: type[HeadwiseError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headwise.engine.llm.load_weights", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(error):
        load("llama", **settings)


def test_a_forced_backend_is_refused_before_the_weights_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.engine.llm.list_checkpoint", lambda path: pytest.fail("opened"))

    with pytest.raises(BackendError, match="headwise-hopper: runs on cuda, not on cpu"):
        LLM(device="cpu", backend="headwise-hopper")
    with pytest.raises(BackendError, match="not chosen: reference is forced"):
        LLM(device="cpu", backend={"global": "reference"})


def test_a_forced_reference_gives_what_the_chosen_backend_gives() -> None:
    forced = LLM(device="cpu", context=64, chunk=16, backend="global=reference", allow_fallback=True)
    chosen = LLM(device="cpu", context=64, chunk=16)

    assert [g.choice.backend.name for g in forced.groups] == ["torch-flash-cpu", "reference"]
    assert (forced.logits(IDS) - chosen.logits(IDS)).abs().max() < 1e-3


def test_a_model_too_large_for_memory_is_refused_before_its_first_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.engine.devices.cpu_memory", lambda: (2**30, 2**29))
    monkeypatch.setattr("headwise.engine.llm.load_weights", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(PlanError, match="does not fit"):
        load("llama")


def test_a_softcap_has_no_fused_backend_and_strict_mode_says_so(tmp_path: object) -> None:
    """A layer without a kernel must stop the start, and run by the reference only when allowed."""
    import json
    import shutil
    from pathlib import Path

    from checkpoints import folder

    copy = Path(str(tmp_path)) / "capped"
    shutil.copytree(folder("gemma3"), copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"attn_logit_softcapping": 20.0}))

    with pytest.raises(BackendError, match="softcap 20"):
        LLM(copy, context=64, device="cpu", check=False)
    slow = LLM(copy, context=64, device="cpu", allow_fallback=True)
    (copy / "config.json").write_text(json.dumps(config | {"attn_logit_softcapping": 1e6}))
    uncapped = LLM(copy, context=64, device="cpu", allow_fallback=True)

    assert (uncapped.logits(IDS) - tiny.logits("gemma3", IDS)).abs().max() < 1e-4
    assert (slow.logits(IDS) - uncapped.logits(IDS)).abs().max() > 1e-3
    assert slow.report().layers_fused == 0


def test_the_embedded_model_knows_python() -> None:
    """The shipped file, its tokenizer and its weights belong together: held-out source costs under a bit per byte."""
    from headwise.text.demo import demo_prompt

    llm = LLM(device="cpu", context=1100, check=False)
    text = demo_prompt()[:3000]
    ids = llm.tokenize(text)
    nats = torch.nn.functional.cross_entropy(llm.logits(ids)[:-1], torch.tensor(ids[1:]), reduction="sum")

    assert llm.tokenizer.decode(ids) == text
    assert nats / 0.6931 / len(text.encode()) < 1.0


@pytest.mark.parametrize(
    ("kind", "dtype", "why"),
    [
        (DeviceKind("cuda", (9, 0), "H200"), "bf16", None),
        (DeviceKind("cuda", (8, 6), "RTX 3090"), "f16", None),
        (DeviceKind("cuda", (9, 0), "H200", triton=(3, 7)), "bf16", "there is triton 3.7: pip install 'torch==2.11.*'"),
        (DeviceKind("cuda", (9, 0), "H200", triton=None), "bf16", "there is no triton"),
        (DeviceKind("cuda", (8, 6), "RTX 3090", triton=(3, 7)), "f16", "there is triton 3.7: pip install 'torch==2.11.*'"),
        (DeviceKind("cuda", (9, 0), "H200"), "f32", "takes bf16 and f16, not f32"),
        (DeviceKind("cuda", (7, 5), "RTX 2080"), "f16", "compute capability 8.0"),
        (DeviceKind("rocm", (11, 0), "RX 7900"), "f16", "NVIDIA"),
    ],
)
def test_slower_products_are_said_with_the_cure(kind: DeviceKind, dtype: str, why: str | None) -> None:
    """pip's newest PyTorch brings another triton: everything ran, and nothing told why so slowly."""
    said = [*slower(kind, dtype, wide=True, quantised=True)]

    assert len(said) == bool(why) + (why is not None and kind.triton != (3, 6))
    assert all(str(why) in words for words in said)
    assert [*slower(kind, dtype, wide=True, quantised=False)] == said[:-1]
    assert len([*slower(kind, dtype, wide=False, quantised=False)]) == (len(said) == 2 and kind.capability == (9, 0))


def test_a_known_card_takes_longer_steps_and_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner was told of the card and the engine was not: another plan than was shown."""
    usual = llm_module.card_of
    monkeypatch.setattr(llm_module, "card_of", lambda seat, **rest: usual(seat, **rest)._replace(gpu=find_gpu("h200")))
    long = LLM(device="cpu", context=3000, check=False)
    monkeypatch.undo()
    short = LLM(device="cpu", context=3000, check=False)
    ids = [2, *(i * 7919 % 6000 for i in range(2500))]

    assert (long.plan.workload.chunk, short.plan.workload.chunk) == (3000, 512)  # 4,096 of a longer context
    last = []
    for llm in (long, short):
        for start in range(0, len(ids), llm.plan.workload.chunk):
            x = llm.runner.step(ids[start : start + llm.plan.workload.chunk])
        last.append(llm.runner.logits(x[-1:])[0].clone())
    assert torch.allclose(*last, atol=1e-3)
