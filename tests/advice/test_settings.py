"""Settings are held to what the planner, the table of kernels and the engines' own rules say, computed here again."""

from __future__ import annotations

import configparser
import ctypes
import re
import shlex
from dataclasses import replace
from functools import cache
from itertools import product

import pytest

from headwise.advice.fit import by_free_memory
from headwise.advice.llama_cpp import llama_flags
from headwise.advice.ollama import ollama_env
from headwise.advice.setting import Advice, text
from headwise.advice.vllm import vllm_args
from headwise.api import stored_weights
from headwise.attention.engines import explain_engine
from headwise.errors import PlanError, UsageError
from headwise.hardware.gpus import find_gpu
from headwise.planner.residence import weight_bytes
from headwise.planner.rivals import OLLAMA_OLD_KV, RivalPlan, rival_plan
from headwise.spec.read import Source, open_model

GIB, MIB = 2**30, 2**20
# Of `llama-server --help`, build 0c1e57098 (2026-10-01); what is not here must be looked up there first.
ACCEPTED = {"-m", "-ngl", "-c", "-np", "-fa", "-ctk", "-ctv", "-ub", "-sm", "-ts", "-mg", "--swa-full"}
MODELS = ("gemma-4-31b", "gemma-4-26b-a4b", "gemma-4-e2b", "exaone-4.0-32b", "gpt-oss-20b", "qwen3-8b")
CARDS = (("rtx4090",), ("rtx3060:12",), ("gtx1080ti",), ("m4-max:64",), ("v100:16",), ("h200",), ("rtx3060:12", "rtx3090"))
ENGINES = {
    "llama.cpp": (llama_flags, (None, "b8000", "b10600")),
    "ollama": (ollama_env, (None, "0.5.7", "0.20.2", "0.20.4")),
    "vllm": (vllm_args, (None, "0.19.0")),
}
FEW = {"gemma-4-31b", "gpt-oss-20b", "qwen3-8b"}  # of releases before the newest
CASES = [
    (e, v, m, c) for e, (_, versions) in ENGINES.items() for v, m, c in product(versions, MODELS, CARDS) if v is None or m in FEW
]


@cache
def source(name: str) -> Source:
    return open_model(name, env={})


@cache
def advised(engine: str, version: str | None, model: str, cards: tuple[str, ...], context: int | None = None) -> Advice | None:
    """None where nothing fits, or where the engine does not know the device."""
    try:
        return ENGINES[engine][0](source(model), gpus=cards, version=version, context=context)
    except (PlanError, UsageError):
        return None


def flash_attention(advice: Advice, cards: tuple[str, ...]) -> bool:
    """What the advice asks for, and the table of kernels says is fused on every card."""
    if advice.engine == "vllm":
        return True
    fa = (
        advice.value("-fa")
        if advice.engine == "llama.cpp"
        else {"1": "on", "0": "off"}.get(advice.value("OLLAMA_FLASH_ATTENTION") or "")
    )
    answers = [explain(advice, gpu, fa or "auto") for gpu in cards]
    return fa != "off" and all(answers)


def explain(advice: Advice, gpu: str, fa: str) -> bool:
    kv = advice.kv or "f16"
    return explain_engine(advice.engine, advice.version, source(advice.model).spec, find_gpu(gpu), kv, fa=fa).proven_fused  # type: ignore[arg-type]


@cache
def sizes(model: str, weights: str | None) -> int:
    return sum(weight_bytes(source(model).spec, stored_weights(source(model), weights)).values())


def planned(advice: Advice, context: int, cards: tuple[str, ...]) -> RivalPlan:
    """The planner's own answer for the printed settings."""
    model = source(advice.model)
    ubatch = {"llama.cpp": int(advice.value("-ub") or 512), "vllm": int(advice.value("--max-num-batched-tokens") or 0)}
    return rival_plan(
        advice.engine,
        model.spec,
        weights_bytes=sizes(advice.model, advice.weights),
        context=context,
        kv=advice.kv or "f16",
        slots=int(advice.value("--max-num-seqs") or 1),
        ubatch=ubatch.get(advice.engine),
        flash_attention=flash_attention(advice, cards),
        n_gpus=len(advice.cards),
        gpu_memory_bytes=min(c.target.total_bytes for c in advice.cards),
        version=advice.version,
    )


@pytest.mark.parametrize(("engine", "version"), sorted({(e, v or "") for e, v, _, _ in CASES}))
def test_the_printed_context_fits_and_no_larger_one_does(engine: str, version: str) -> None:
    """A context that the engine cannot hold is an answer that costs an evening."""
    n_fit = n_grown = 0
    for _, v, model, cards in (case for case in CASES if case[:2] == (engine, version or None)):
        advice = advised(engine, v, model, cards)
        if advice is None:
            continue
        n_fit += 1
        spec = source(model).spec
        share = 0.92 if engine == "vllm" else 1
        kept = {c.target.name: c.target.total_bytes * share - GIB for c in advice.cards}
        if engine == "vllm":  # equal parts
            usable = min(kept.values()) * len(advice.cards)
        else:
            usable = sum(kept[c.target.name] for c in advice.cards)
        assert planned(advice, advice.context, cards).total_bytes <= usable, (model, cards)
        assert all(c.planned_bytes <= kept[c.target.name] for c in advice.cards)
        assert sum(c.planned_bytes for c in advice.cards) >= planned(replace_slots(advice), advice.context, cards).total_bytes
        assert 4096 <= advice.context <= spec.max_context
        if advice.context < spec.max_context and len(cards) == 1 and (engine != "llama.cpp" or advice.value("-ub") == "512"):
            n_grown += 1
            assert planned(replace_slots(advice), advice.context + 256, cards).total_bytes > usable - 1, (model, cards)
    assert n_fit >= 5
    assert n_grown >= 1


def replace_slots(advice: Advice) -> Advice:
    """The same for one sequence: vLLM's number of sequences fills what is left."""
    return replace(advice, settings=tuple(s for s in advice.settings if s.name != "--max-num-seqs"))


@pytest.mark.parametrize(("engine", "version"), sorted({(e, v or "") for e, v, _, _ in CASES}))
def test_a_quantised_cache_is_advised_only_where_every_layer_runs_fused(engine: str, version: str) -> None:
    """q8_0 with flash attention off: refused from Ollama 0.30 on, dropped in silence before."""
    quantised = 0
    for _, v, model, cards in (case for case in CASES if case[:2] == (engine, version or None)):
        for context in (None, 100_000) if model in FEW else (None,):
            advice = advised(engine, v, model, cards, context)
            if advice is None:
                continue
            if engine == "ollama":
                fa, kv = advice.value("OLLAMA_FLASH_ATTENTION"), advice.value("OLLAMA_KV_CACHE_TYPE")
                assert kv is None or (fa == "1" and kv == advice.kv)
                assert not version.startswith("0.2") or advice.kv in OLLAMA_OLD_KV
            if engine == "llama.cpp":
                assert advice.value("-ctk") == advice.value("-ctv") == advice.kv
                assert advice.kv == "f16" or advice.value("-fa") == "on"
            if advice.kv not in ("f16", "auto"):
                quantised += 1
                used = [c.target.gpu.name for c in advice.cards if c.target.gpu]
                assert all(explain(advice, gpu, "auto" if engine == "vllm" else "on") for gpu in used), (model, cards)
    assert quantised or (engine, version) in {("vllm", ""), ("vllm", "0.19.0"), ("ollama", "0.5.7")}


def test_flash_attention_is_off_where_a_layer_has_no_kernel() -> None:
    """Ollama 0.20.2, forced on: Gemma 4's layers of head size 512 ran on the CPU, and nothing said so."""
    advice = ollama_env(source("gemma-4-26b-a4b"), gpus=["rtx4090"], version="0.20.2")

    assert (advice.value("OLLAMA_FLASH_ATTENTION"), advice.value("OLLAMA_KV_CACHE_TYPE")) == ("0", None)
    assert ollama_env(source("gemma-4-26b-a4b"), gpus=["rtx4090"], version="0.20.4").value("OLLAMA_FLASH_ATTENTION") is None


def test_without_a_kernel_no_quantised_cache_is_offered() -> None:
    """llama.cpp b8000 has no kernel of head size 512: with q8_0 those layers would run on the CPU."""
    with pytest.raises(PlanError, match="does not fit") as caught:
        llama_flags(source("gemma-4-31b"), gpus=["rtx4090"], version="b8000", context=100_000)

    assert "tokens of f16 are the most" in caught.value.why


def test_two_uneven_cards_get_the_layers_that_they_hold() -> None:
    """12 + 24 GB by free memory alone: the smaller card also holds its own masks, and is full first."""
    for model, cards in product(("gemma-4-31b", "exaone-4.0-32b"), (["rtx3060:12", "rtx3090"], ["rtx3090", "rtx3060:12"])):
        advice = llama_flags(source(model), gpus=cards)
        counts = [int(n) for n in (advice.value("-ts") or "").split(",")]
        n = len(source(model).spec.layers)
        assert sum(counts) == n + 1
        assert [len(c.layers) for c in advice.cards] == [sum(d == i for d in llama_cpp_devices(counts, n)[:-1]) for i in (0, 1)]
        assert all(c.planned_bytes <= c.target.total_bytes - GIB for c in advice.cards)
        assert advice.value("-sm") == "layer"
        assert advice.value("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"


def llama_cpp_devices(split: list[int], n_layers: int) -> list[int]:
    """src/llama-model.cpp load_tensors, in its float arithmetic: the device of each layer and of the output."""
    f32 = lambda x: ctypes.c_float(x).value  # noqa: E731
    total, ends = 0.0, []
    for part in split:
        total = f32(total + part)
        ends.append(total)
    ends = [f32(e / total) for e in ends]
    return [next(d for d, end in enumerate(ends) if end > f32(layer / (n_layers + 1))) for layer in range(n_layers + 1)]


@pytest.mark.parametrize("free", [[24, 24], [12, 24], [24, 12, 8], [80, 8], [11.2, 23.5]])
def test_layers_without_a_split_lie_where_llama_cpp_puts_them(free: list[float]) -> None:
    n_bytes = [int(f * GIB) for f in free]

    placed = by_free_memory(60, n_bytes)

    assert [d for d, layers in enumerate(placed) for _ in layers] == llama_cpp_devices(n_bytes, 60)[:-1]


def test_a_model_that_one_card_holds_stays_on_it() -> None:
    cards = ["rtx3060:12", "rtx4090"]
    flags = llama_flags(source("gemma-4-e2b"), gpus=cards)
    env = ollama_env(source("gemma-4-e2b"), gpus=cards)
    args = vllm_args(source("gemma-4-e2b"), gpus=cards)

    assert (flags.value("-sm"), flags.value("-mg"), flags.value("-ts")) == ("none", "1", None)
    assert (env.value("CUDA_VISIBLE_DEVICES"), env.value("OLLAMA_SCHED_SPREAD")) == ("1", None)
    assert (args.value("CUDA_VISIBLE_DEVICES"), args.value("--tensor-parallel-size")) == ("1", "1")
    assert ollama_env(source("gemma-4-31b"), gpus=cards).value("OLLAMA_SCHED_SPREAD") == "1"


def test_a_larger_micro_batch_only_where_it_still_fits() -> None:
    """-ub 2048 widens every sliding ring: on a card that is full it would cost the context."""
    tight = llama_flags(source("gemma-4-31b"), gpus=["rtx4090"])
    roomy = llama_flags(source("gemma-4-31b"), gpus=("h200",))

    assert tight.value("-ub") == "512"
    assert (roomy.value("-ub"), roomy.context) == ("2048", 262_144)
    for model, cards in product(MODELS, CARDS):
        if (advice := advised("llama.cpp", None, model, cards)) and advice.value("-ub") != "512":
            spare = {"2048": 2048 * MIB, "1024": 768 * MIB}[advice.value("-ub") or ""]
            assert all(c.planned_bytes + spare <= c.usable_bytes for c in advice.cards), (model, cards)
    assert roomy.total_bytes == planned(roomy, 262_144, ("h200",)).total_bytes


def test_llama_server_knows_every_flag_and_the_command_parses() -> None:
    for model, cards in product(MODELS, CARDS):
        advice = advised("llama.cpp", None, model, cards)
        if advice is None:
            continue
        words = shlex.split(advice.blocks[0].text)
        flags = {w for w in words if re.match(r"-+[a-z]", w)}
        assert flags <= ACCEPTED
        assert flags == {s.name for s in advice.settings if s.value is not None and s.name.startswith("-")}
        assert words[words.index("-c") + 1] == str(advice.context)
        assert "--swa-full" not in flags


def test_the_blocks_of_ollama_are_a_shell_and_a_systemd_text() -> None:
    advice = ollama_env(source("gemma-4-31b"), gpus=["rtx4090"])
    shell, unit = (block.text for block in advice.blocks)
    given = dict(shlex.split(line)[1].split("=", 1) for line in shell.splitlines() if line.startswith("export "))
    unset = {line.split()[1] for line in shell.splitlines() if line.startswith("unset ")}
    service = configparser.ConfigParser(strict=False, interpolation=None)
    service.optionxform = str  # type: ignore[assignment]
    service.read_string(unit)

    assert given["OLLAMA_CONTEXT_LENGTH"] == str(advice.context)
    assert unset == {"OLLAMA_FLASH_ATTENTION", "OLLAMA_KV_CACHE_TYPE"} == set(service["Service"]["UnsetEnvironment"].split())
    assert dict(re.findall(r'^Environment="(\w+)=(\w+)"$', unit, re.MULTILINE)) == given


def test_a_models_own_num_ctx_needs_a_modelfile() -> None:
    """num_ctx in the Modelfile wins over OLLAMA_CONTEXT_LENGTH, and the user never learns why nothing changed."""
    own = replace(source("gemma-4-e2b"), params={"num_ctx": 8192}, kind="ollama", name="mine:latest")

    advice = ollama_env(own, gpus=["rtx4090"], weights="q4_k_m")

    assert advice.blocks[-1].text == f"FROM mine:latest\nPARAMETER num_ctx {advice.context}"
    assert any("num_ctx 8192" in note for note in advice.notes)
    old = ollama_env(source("gemma-3-4b"), gpus=["rtx4090"], version="0.5.7")
    assert old.value("num_ctx") == str(old.context)
    assert "num_ctx" not in old.blocks[0].text
    assert f"num_ctx {old.context}" in old.blocks[-1].text


def test_the_command_of_vllm_names_the_repository() -> None:
    words = shlex.split(vllm_args(source("gemma-4-31b"), gpus=("h200",)).blocks[0].text)

    assert words[:3] == ["vllm", "serve", "google/gemma-4-31B-it"]
    assert len(words[3:]) % 2 == 0


def test_vllm_gets_no_fp8_cache_below_ada() -> None:
    """Triton has no fp8e4nv below compute capability 8.9: vLLM stops at the first request (vllm#26431)."""
    with pytest.raises(PlanError):
        vllm_args(source("gemma-4-12b"), gpus=["rtx3090:28"], context=200_000)
    assert vllm_args(source("gemma-4-12b"), gpus=["rtx4090:28"], context=200_000).kv == "fp8"


def test_memory_that_others_hold_is_not_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    from headwise.advice import fit
    from headwise.planner.memory import Target

    gpu = find_gpu("h200")
    held = Target(name="h200", gpu=gpu, total_bytes=gpu.memory_bytes, others_bytes=gpu.memory_bytes // 2)
    monkeypatch.setattr(fit, "targets_for", lambda gpus, device: [held])

    args = vllm_args(source("gemma-4-31b"))

    assert args.value("--gpu-memory-utilization") == "0.48"
    assert planned(args, args.context, ("h200",)).total_bytes <= held.total_bytes * 0.48 - GIB


def test_without_a_card_it_is_the_cpu_and_an_unknown_card_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that the table does not know was taken for the CPU."""
    from headwise import api
    from headwise.hardware.probe import Device

    monkeypatch.setattr(api, "detect", list)
    cpu = llama_flags(source("tiny-hybrid"))
    assert (cpu.value("-ngl"), cpu.value("-c"), cpu.value("-fa")) == (None, "65536", "auto")
    assert ollama_env(source("tiny-hybrid"), gpus=["cpu"]).kv == "f16"
    with pytest.raises(UsageError, match="vLLM"):
        vllm_args(source("tiny-hybrid"))
    unknown = Device(index=0, gpu=None, seen="Voodoo 5", total_bytes=64 * MIB, used_bytes=0, driver="")
    monkeypatch.setattr(api, "detect", lambda: [unknown])
    with pytest.raises(UsageError, match="Voodoo 5"):
        llama_flags(source("tiny-hybrid"))


@pytest.mark.parametrize(("engine", "context"), [("llama.cpp", 262_144), ("llama.cpp", None), ("ollama", 200_000), ("vllm", None)])
def test_what_is_said_to_fit_instead_fits(engine: str, context: int | None) -> None:
    """Advice that was not tried sends people from one error to the next."""
    advise = ENGINES[engine][0]
    card = ["rtx4090"] if context else ["rtx3060:12"]
    with pytest.raises(PlanError) as caught:
        advise(source("gemma-4-31b"), gpus=card, context=context)

    cures = re.findall(r"--(context|gpu|weights) ([\w.-]+)", caught.value.do.split("(`headwise plan")[0])
    assert cures
    for what, value in cures:
        changed = {
            "context": {"context": int(value)} if what == "context" else {},
            "gpu": {"gpus": [value]},
            "weights": {"weights": value},
        }
        assert advise(source("gemma-4-31b"), **({"gpus": card, "context": context} | changed[what]))


def test_a_context_beyond_the_model_is_refused() -> None:
    for advise, _ in ENGINES.values():
        with pytest.raises(PlanError, match="can attend to"):
            advise(source("gemma-4-e2b"), gpus=["h200"], context=10**7)
        with pytest.raises(UsageError, match="makes no sense"):
            advise(source("gemma-4-e2b"), gpus=["h200"], context=0)
        with pytest.raises(UsageError, match="weight type"):
            advise(source("gemma-4-e2b"), gpus=["h200"], weights="q3")


def test_every_setting_says_why_and_whose_rule_it_is() -> None:
    for engine, model in product(ENGINES, ("gemma-4-31b", "qwen3-8b")):
        advice = advised(engine, None, model, ("h200",))
        assert advice
        lines = text(advice).splitlines()
        for s in advice.settings:
            assert s.reason and s.source
            assert sum(line.startswith(f"{s.name} ") and s.reason in line for line in lines) == 1
