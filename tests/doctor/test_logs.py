"""Real logs, and lines composed from the engines' own format strings: the verdict, and the line that it stands on."""

from __future__ import annotations

import gzip
import io
import json
import re
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.cli import main
from headwise.doctor import look
from headwise.doctor.checks import BY_ID, CHECKS
from headwise.doctor.diagnose import ROWS, Diagnosis, diagnose
from headwise.doctor.facts import amounts, pairs
from headwise.doctor.rules import slope
from headwise.doctor.scan import plain
from headwise.doctor.verdicts import flags
from headwise.hardware.gpus import find_gpu
from headwise.spec import catalogue

LOGS = Path(__file__).parent / "logs"


def of(text: str | bytes, model: str | None = None) -> Diagnosis:
    data = text if isinstance(text, bytes) else text.encode()
    return diagnose(io.BytesIO(data), "log", model=catalogue.spec(model) if model else None)


def layers(d: Diagnosis) -> list[tuple[str, int | None, str]]:
    return [(v.kind, v.count, v.verdict) for v in d.layers]


def ids(d: Diagnosis) -> set[str]:
    return {f.id for f in d.findings}


# file: engine, layers, lines of their evidence, (KV type, verdict), checks that must be found, exit status
WANTED = {
    "llamacpp_2026-04_gemma4_e4b_three_gpu_kv": (
        "llama.cpp", [("sliding", None, "unproven"), ("global", 4, "unproven")], set(), ("f16", "honoured"), {"log-too-quiet"}, 0),
    "llamacpp_2026-10_messages_from_source": (
        "llama.cpp", [("sliding", 50, "materialised"), ("global", 10, "materialised")], {15, 16}, (None, "refused"),
        {"attention-materialised", "kv-type-refused", "swa-full", "kv-converted"}, 1),
    "llamacpp_2026_fa_auto_disabled_layer_mismatch": (
        "llama.cpp", [("all", 61, "materialised")], {8, 9}, ("f16", "honoured"), {"attention-materialised"}, 1),
    "llamacpp_2026_gemma4_fit_lines": (
        "llama.cpp", [("all", None, "unproven")], set(), (None, "unproven"), {"log-too-quiet"}, 0),
    "llamacpp_2026_quantV_noFA_fatal": (
        "llama.cpp", [("all", None, "unproven")], {3}, (None, "refused"), {"kv-type-refused"}, 1),
    "ollama_0.17_grok_kv_quant_panic": (
        "ollama", [("all", None, "materialised")], {2}, (None, "refused"), {"attention-materialised", "kv-type-refused"}, 1),
    "ollama_0.1x_warns_from_source": (
        "ollama", [("all", None, "materialised")], {2}, ("f16", "ignored"), {"attention-materialised", "kv-type-ignored"}, 1),
    "ollama_0.20.7_gemma4_31b_v100_two_gpu": (
        "ollama", [("all", 60, "unproven")], {4}, (None, "unproven"), {"several-gpus", "log-too-quiet"}, 0),
    "ollama_0.20_gemma4_e4b_130k_fa_cpu_fallback": (
        "ollama", [("sliding", 35, "unproven"), ("global", 7, "offloaded")], {4, 6}, ("f16", "honoured"), {"attention-on-cpu"}, 1),
    "ollama_0.6_gemma3_empty_kv_type_warn": (
        "ollama", [("all", None, "unproven")], set(), (None, "unproven"), {"kv-empty-type"}, 0),
    "ollama_0.9_offload_line": (
        "ollama", [("all", None, "unproven")], set(), (None, "unproven"), {"layers-on-cpu"}, 1),
    "ollama_ps_gemma4_claims_100pct_gpu": (
        "ollama", [("sliding", 25, "unproven"), ("global", 5, "unproven")], set(), (None, "unproven"), {"ps-is-no-proof"}, 0),
    "vllm_0.19.0_gemma4_e4b_rtx4090": (
        "vllm", [("sliding", None, "fused"), ("global", None, "fused")], {5}, (None, "unproven"),
        {"vllm-one-backend", "vllm-average-rates"}, 0),
    "vllm_0.33.0_messages_from_source": (
        "vllm", [("sliding", None, "fused"), ("global", None, "fused")], {6, 8}, (None, "unproven"), {"vllm-one-backend"}, 0),
    # a real llama-server (0c1e570, CPU build) with the embedded model
    "llamacpp_cpu_healthy": (
        "llama.cpp", [("sliding", 8, "offloaded"), ("global", 2, "offloaded")], {5}, ("f16", "honoured"),
        {"no-gpu", "slots-times-window", "context-in-use"}, 1),
    "llamacpp_cpu_fa_off": (
        "llama.cpp", [("sliding", 8, "materialised"), ("global", 2, "materialised")], {161}, ("f16", "honoured"),
        {"attention-materialised"}, 1),
    "llamacpp_cpu_q8": (
        "llama.cpp", [("sliding", 8, "offloaded"), ("global", 2, "offloaded")], {5}, ("q8_0", "honoured"), {"no-gpu"}, 1),
    "llamacpp_cpu_q8_off": ("llama.cpp", [("all", 10, "unproven")], {151}, (None, "refused"), {"kv-type-refused"}, 1),
    "llamacpp_cpu_swafull": (
        "llama.cpp", [("all", None, "offloaded")], {1}, (None, "unproven"), {"no-gpu", "swa-full", "prompt-truncated"}, 1),
    "llamacpp_cpu_default": ("llama.cpp", [("all", None, "unproven")], set(), (None, "unproven"), {"log-too-quiet"}, 0),
    "llamacpp_cpu_graph_dump": (
        "llama.cpp", [("sliding", 8, "offloaded"), ("global", 2, "offloaded")], {254, 258}, ("f16", "honoured"),
        {"attention-on-cpu"}, 1),
}  # fmt: skip


def test_every_log_has_an_expectation() -> None:
    assert {p.stem for p in LOGS.glob("*.txt")} == set(WANTED)


@pytest.mark.parametrize("name", WANTED)
def test_a_log_gives_its_verdict(name: str) -> None:
    engine, kinds, lines, (in_use, state), found, status = WANTED[name]
    with (LOGS / f"{name}.txt").open("rb") as file:
        d = diagnose(file, name)

    assert (d.engine, layers(d), (d.kv.in_use, d.kv.verdict)) == (engine, kinds, (in_use, state))
    assert lines <= {e.line for v in d.layers for e in v.evidence}
    assert found <= ids(d)
    assert int(d.wrong) == status


@pytest.mark.parametrize("name", WANTED)
def test_evidence_quotes_the_line_it_names(name: str) -> None:
    text = (LOGS / f"{name}.txt").read_text(errors="replace").split("\n")
    with (LOGS / f"{name}.txt").open("rb") as file:
        d = diagnose(file, name)
    for e in [*(e for v in d.layers for e in v.evidence), *d.kv.evidence, *(e for f in d.findings for e in f.evidence)]:
        assert e.line is not None and e.text[:60] in text[e.line - 1]


@pytest.mark.parametrize("name", WANTED)
@pytest.mark.parametrize("frame", ["journald", "compose", "docker", "colour", "windows", "utf-16", "gzip"])
def test_a_frame_around_the_lines_changes_nothing(name: str, frame: str) -> None:
    """Logs come through journald, Docker, terminals and PowerShell."""
    raw = (LOGS / f"{name}.txt").read_bytes().decode(errors="replace")
    bare = "\n".join(plain(line)[1] for line in raw.split("\n"))
    framed = {
        "journald": lambda s: f"Nov 21 10:00:00 host llama-server[77]: {s}",
        "compose": lambda s: f"model-1  | {s}",
        "docker": lambda s: json.dumps({"log": s + "\n", "stream": "stderr", "time": "2026-11-21T10:00:00Z"}),
        "colour": lambda s: f"\x1b[32m{s}\x1b[0m",
    }.get(frame, lambda s: s)
    text = ("\r\n" if frame == "windows" else "\n").join(framed(line) for line in bare.split("\n"))
    data = text.encode()
    if frame == "utf-16":
        data = b"\xff\xfe" + text.encode("utf-16-le")
    if frame == "gzip":
        data = gzip.compress(data)
    d, want = of(data), of(bare)

    assert (layers(d), d.kv.verdict, ids(d)) == (layers(want), want.kv.verdict, ids(want))


# --- composed from format strings of llama.cpp 0c1e57098 ---

GPU = """llama_server: initializing ...
load_model: loading model 'gemma-4-31b.gguf'
llama_context: n_ctx                 = 32768
llama_context: n_ubatch              = 512
llama_context: flash_attn            = {asked}
load_tensors: offloaded {done}/61 layers to GPU
load_tensors:        CUDA0 model buffer size = 17000.00 MiB
llama_kv_cache_iswa: creating non-SWA KV cache, size = 32768 cells
llama_kv_cache:      {kv_device} KV buffer size =  2560.00 MiB
llama_kv_cache: size = 2560.00 MiB ( 32768 cells,  10 layers,  1/1 seqs), K ({k}): 1280.00 MiB, V ({v}): 1280.00 MiB
llama_kv_cache_iswa: creating     SWA KV cache, size = {swa} cells
llama_kv_cache:      {kv_device} KV buffer size =  1200.00 MiB
llama_kv_cache: size = 1200.00 MiB ( {swa} cells,  50 layers,  1/1 seqs), K ({k}): 600.00 MiB, V ({v}): 600.00 MiB
{probe}
sched_reserve:      CUDA0 compute buffer size =   522.50 MiB
sched_reserve:  CUDA_Host compute buffer size =    90.00 MiB
sched_reserve: graph: nodes = 2250, splits = {splits}, input objects = 8, input tensors = 12
"""


PROBED = "resolve_fused_ops: Flash Attention enabled"


def start(
    asked: str = "auto",
    *,
    done: int = 61,
    k: str = "f16",
    v: str | None = None,
    swa: int = 1536,
    splits: int = 2,
    probe: str = PROBED,
    kv_device: str = "CUDA0",
) -> str:
    """The log of Gemma 4 31B on one card."""
    return GPU.format(asked=asked, done=done, k=k, v=v or k, swa=swa, splits=splits, probe=probe, kv_device=kv_device)


def gpu(asked: str = "auto", **settings: object) -> Diagnosis:
    return of(start(asked, **settings))  # type: ignore[arg-type]


BOTH = [("sliding", 50), ("global", 10)]


def test_a_probe_that_enabled_it_is_proof() -> None:
    d = gpu()

    assert layers(d) == [(*kind, "fused") for kind in BOTH]
    assert (d.kv.in_use, d.kv.verdict, d.kv.global_bytes, d.kv.sliding_bytes) == ("f16", "honoured", 2560 * 2**20, 1200 * 2**20)
    assert not d.wrong


def test_on_is_no_proof_but_healthy_splits_are() -> None:
    """`-fa on` with attention on the CPU printed the same line as a healthy start."""
    healthy = gpu("enabled", probe="")

    assert layers(healthy) == [(*kind, "fused") for kind in BOTH]
    without = of(start("enabled", probe="").rsplit("sched", 1)[0])
    assert layers(without) == [(*kind, "unproven") for kind in BOTH]
    assert "probe-skipped" in ids(without)


@pytest.mark.parametrize(
    ("splits", "want"),
    [
        (22, ["unproven", "offloaded"]),
        (122, ["offloaded", "offloaded"]),
        (4, ["unproven", "unproven"]),
        (3, ["unproven", "unproven"]),
    ],
)
def test_splits_count_the_layers_on_the_cpu(splits: int, want: list[str]) -> None:
    """Two more for each: 10 global layers of Gemma 4 31B make 22, all 60 make 122."""
    d = gpu("enabled", k="iq4_nl", splits=splits, probe="")

    assert [v.verdict for v in d.layers] == want
    assert "graph-splits" in ids(d)
    assert ("attention-on-cpu" in ids(d)) == ("offloaded" in want)


def test_a_second_gpu_has_a_split_of_its_own() -> None:
    text = start("enabled", splits=3, probe="")
    d = of(
        text.replace(
            "sched_reserve:  CUDA_Host", "sched_reserve:      CUDA1 compute buffer size =   500.00 MiB\nsched_reserve:  CUDA_Host"
        )
    )

    assert [v.verdict for v in d.layers] == ["fused", "fused"]
    assert "several-gpus" in ids(d)


def test_a_cache_in_host_memory_is_its_own_fault() -> None:
    """The attention node stays on the GPU; its K and V cross the bus at each step."""
    d = gpu(kv_device="CPU")

    assert {v.verdict for v in d.layers} == {"fused"}
    assert "kv-in-host-memory" in ids(d) and d.wrong
    assert {v.verdict for v in gpu("enabled", kv_device="CPU", splits=122, probe="").layers} == {"unproven"}


def test_layers_of_unknown_kind_are_not_called_fused() -> None:
    """6 of 11 on the GPU, and a log that does not say which: all were called fused."""
    text = "\n".join(x for x in start(done=41).replace("gemma-4-31b", "any").splitlines() if "KV buffer" not in x)

    assert layers(of(text.replace("offloaded", "print_info: n_layer = 60\noffloaded"))) == [
        ("all", 20, "offloaded"), ("all", 40, "fused")]  # fmt: skip


def test_buffers_say_which_layers_are_on_the_cpu() -> None:
    """17 of 50 sliding and 3 of 10 global layers."""
    text = start(done=41)
    for mib, share in ((2560, 0.3), (1200, 0.34)):
        line = f"llama_kv_cache:      CUDA0 KV buffer size =  {mib}.00 MiB\n"
        halves = [("CPU", mib * share), ("CUDA0", mib * (1 - share))]
        text = text.replace(line, "".join(f"llama_kv_cache: {device} KV buffer size = {n:.2f} MiB\n" for device, n in halves))

    assert layers(of(text)) == [
        ("sliding", 17, "offloaded"),
        ("sliding", 33, "fused"),
        ("global", 3, "offloaded"),
        ("global", 7, "fused"),
    ]


def test_layers_left_on_the_cpu_are_counted() -> None:
    d = of(start(done=41), "gemma-4-31b")

    # 61 - 41 = 20 of the 60 layers, the first: every sixth of them is global
    assert layers(d) == [("sliding", 17, "offloaded"), ("sliding", 33, "fused"), ("global", 3, "offloaded"), ("global", 7, "fused")]
    assert "layers-on-cpu" in ids(d)


def test_no_layer_offloaded_is_the_cpu() -> None:
    d = gpu(done=0, kv_device="CPU")

    assert {v.verdict for v in d.layers} == {"offloaded"}
    assert "no-gpu" in ids(d)


def test_a_quantised_v_skips_the_probe() -> None:
    d = gpu(
        "enabled", k="q8_0", splits=3, probe="llama_init_from_model: enabling flash_attn since it is required for quantized V cache"
    )

    assert {"probe-skipped", "graph-splits"} <= ids(d)
    assert {v.verdict for v in d.layers} == {"unproven"}


def test_a_full_sliding_cache_is_found_by_its_size() -> None:
    d = gpu(swa=32768)

    assert "swa-full" in ids(d) and d.wrong


def test_kv_types_without_a_kernel() -> None:
    assert "kv-type-without-kernel" in ids(gpu(k="iq4_nl"))
    assert "kv-type-without-kernel" not in ids(gpu(k="q5_1"))
    metal = start(k="q8_0", probe="", kv_device="MTL0", v="f16").replace("CUDA0", "MTL0")
    assert "kv-type-without-kernel" in ids(of(metal))


@pytest.mark.parametrize(("build", "found"), [("b9000", True), ("b99999", False)])
def test_kernels_are_those_of_the_version(build: str, found: bool) -> None:
    """Before September 2026 default builds had four KV types, with K and V alike."""
    text = f"build: {build[1:]} (0123456)\n  Device 0: NVIDIA GeForce RTX 4090, compute capability 8.9, VMM: yes\n" + start(
        k="q5_1"
    )
    d = of(text, "gemma-4-31b")

    assert d.version == build and [g.name for g in d.gpus] == ["rtx4090"]
    assert ("kv-type-without-kernel" in ids(d)) == found


def test_the_scratch_of_a_quantised_cache_at_512() -> None:
    """32,768 cells, 4 KV heads of 512, K and V, 2 bytes: 256 MiB."""
    text = start(k="q8_0")
    (found,) = [f for f in of(text, "gemma-4-31b").findings if f.id == "kv-f16-scratch"]

    assert "256 MiB" in found.what


def test_the_planner_stands_beside_the_cache() -> None:
    (found,) = [f for f in of(start(), "gemma-4-31b").findings if f.id == "plan-beside"]

    assert "3.67 GiB is what the planner says" in found.what


def test_the_latest_start_counts() -> None:
    """A server that was cured is not accused for its past."""
    bad = start("disabled", probe="")
    good = start()

    assert {v.verdict for v in of(bad + good).layers} == {"fused"}
    assert {v.verdict for v in of(good + bad).layers} == {"materialised"}


def test_a_draft_model_does_not_speak_for_the_model() -> None:
    draft = """load_model: loading model 'draft.gguf'
llama_context: flash_attn            = disabled
llama_kv_cache: size =   10.00 MiB (   512 cells,  4 layers,  1/1 seqs), K (f16): 5.00 MiB, V (f16): 5.00 MiB
"""
    command = 'time=x level=INFO msg="starting llama-server" cmd="llama-server --model gemma.gguf --cache-type-k f16"\n'
    good = start()

    assert layers(of(command + good + draft)) == [(*kind, "fused") for kind in BOTH]


def test_processes_whose_lines_alternate_are_kept_apart() -> None:
    """Two services in one journal: one healthy, one not."""
    good = start().splitlines()
    bad = start("disabled", probe="").splitlines()
    mixed = "\n".join(
        f"Nov 21 10:00:00 host llama-server[{pid}]: {line}"
        for pair in zip(bad, good, strict=True)
        for pid, line in zip((1, 2), pair, strict=True)
    )

    assert {v.verdict for v in of(mixed).layers} == {"fused"}  # process 2 spoke last


# --- Ollama, composed ---

REQUEST = 'msg=load request="{{Operation:commit Parallel:1 BatchSize:512 {} NumThreads:8}}"'


@pytest.mark.parametrize(
    ("line", "verdict"),
    [
        (
            REQUEST.format("FlashAttention:Enabled KvSize:32768 KvCacheType:q8_0"),
            "unproven",
        ),
        (
            REQUEST.format("FlashAttention:Disabled KvSize:32768 KvCacheType:"),
            "materialised",
        ),
        ('msg="flash attention enabled but not supported by model"', "materialised"),
        ('msg="enabling flash attention"', "unproven"),
        ('msg="inference compute" id=cpu library=cpu compute="" driver=0.0', "offloaded"),
    ],
)
def test_what_ollama_says_of_flash_attention(line: str, verdict: str) -> None:
    """`FlashAttention:Enabled` stood in exactly the broken runs."""
    d = of(f"time=2026-04-05T10:00:00.000Z level=INFO source=x.go:1 {line}\n")

    assert (d.engine, {v.verdict for v in d.layers}) == ("ollama", {verdict})


def test_the_identity_of_the_26b() -> None:
    """ollama#15634: 192.0 MiB at 32,768 tokens."""
    d = of(
        'level=INFO msg=load request="{Operation:commit LoraPath:[] Parallel:1 BatchSize:512 FlashAttention:Enabled KvSize:32768 '
        'KvCacheType: NumThreads:8}"\n'
        'level=INFO msg="kv cache" device=CUDA0 size="1.5 GiB"\n'
        'level=INFO msg="compute graph" device=CPU size="192.0 MiB"\n'
    )

    assert layers(d) == [("sliding", 25, "unproven"), ("global", 5, "offloaded")]
    assert of('level=INFO msg="compute graph" device=CPU size="193.0 MiB"\n').layers[0].verdict == "unproven"


def test_settings_of_the_service_are_judged() -> None:
    d = of(
        'time=x level=INFO source=routes.go:1 msg="server config" env="map[AMD_SERIALIZE_KERNEL:3 HSA_OVERRIDE_GFX_VERSION:10.3.0 '
        'OLLAMA_FLASH_ATTENTION:true OLLAMA_KV_CACHE_TYPE:q8_0 OLLAMA_ORIGINS:[http://localhost https://localhost]]"\n'
    )

    assert {"setting-that-slows", "setting-without-effect"} <= ids(d)
    assert d.kv.requested == "q8_0" and d.kv.verdict == "unproven"


def test_a_known_fault_is_likely_not_proven() -> None:
    d = of(
        'msg="Listening on 127.0.0.1:11434 (version 0.20.2)"\n'
        'msg="inference compute" id=GPU-1 library=CUDA compute=8.9 name=CUDA0 description="NVIDIA GeForce RTX 4090" '
        'total="24.0 GiB"\n'
        'msg=load request="{Operation:commit Parallel:1 BatchSize:512 FlashAttention:Enabled KvSize:32768 KvCacheType: X}"\n',
        "gemma-4-31b",
    )
    (found,) = [f for f in d.findings if f.id == "known-fault"]

    assert (found.sure, found.severity, d.version) == ("likely", "warning", "0.20.2")
    assert {v.verdict for v in d.layers} == {"unproven"}


def test_an_estimate_far_above_the_need() -> None:
    """EXAONE 4.0 32B in Ollama 0.18.1: weights 19.3, cache 6.0, and a graph of 10 GB that 0.9 would do."""
    d = of(
        "level=INFO source=server.go:168 msg=offload library=cuda layers.requested=-1 layers.model=65 layers.offload=65 "
        'layers.split="21,44" memory.available="[11.6 GiB 23.3 GiB]" memory.gpu_overhead="0 B" memory.required.full="33.0 GiB" '
        'memory.required.partial="33.0 GiB" memory.required.kv="5.6 GiB" memory.required.allocations="[11.0 GiB 22.0 GiB]" '
        'memory.weights.total="18.0 GiB" memory.weights.repeating="17.5 GiB" memory.weights.nonrepeating="525.0 MiB" '
        'memory.graph.full="9.4 GiB" memory.graph.partial="9.4 GiB"\n'
    )

    assert "estimate-off" in ids(d)


def test_what_fits_is_said_beside_an_estimate() -> None:
    """45K tokens were believed to be all that 12 + 24 GB hold."""
    d = of(
        "level=INFO source=server.go:168 msg=offload library=cuda layers.requested=-1 layers.model=65 layers.offload=65 "
        'layers.split="21,44" memory.available="[11.6 GiB 23.3 GiB]" memory.gpu_overhead="0 B" memory.required.full="33.0 GiB" '
        'memory.required.partial="33.0 GiB" memory.required.kv="5.6 GiB" memory.required.allocations="[11.0 GiB 22.0 GiB]" '
        'memory.weights.total="18.0 GiB" memory.weights.repeating="17.5 GiB" memory.weights.nonrepeating="525.0 MiB" '
        'memory.graph.full="9.4 GiB" memory.graph.partial="9.4 GiB"\n',
        "exaone-4.0-32b",
    )
    (found,) = [f for f in d.findings if f.id == "what-fits"]

    assert int(found.what.split(" ")[0].replace(",", "")) >= 90_000
    assert "12 + 23 GiB; the engine reserves 9.4 GiB for a graph that needs" in found.what


def test_a_cut_prompt_is_a_problem() -> None:
    d = of('level=WARN source=runner.go:1 msg="truncating input prompt" limit=4096 prompt=18233 keep=4 new=4096\n')

    assert "prompt-truncated" in ids(d) and d.wrong


# --- vLLM, composed ---


@pytest.mark.parametrize(
    ("line", "verdict"),
    [
        ("Using FLASH_ATTN attention backend out of potential backends: ['FLASH_ATTN']", "fused"),
        ("Using Flash Attention backend on V1 engine.", "fused"),
        ("Using CPU_ATTN backend.", "offloaded"),
        ("Automatically detected platform cpu.", "offloaded"),
        ("Using NO_SUCH_THING backend.", "unproven"),
        ("GPU KV cache size: 1,024 tokens", "unproven"),
    ],
)
def test_what_vllm_says(line: str, verdict: str) -> None:
    assert {v.verdict for v in of(f"INFO 11-21 10:00:00 [x.py:1] {line}\n").layers} == {verdict}


def test_vllm_kv_types() -> None:
    d = of(
        "INFO [core.py:1] Initializing a V1 LLM engine (v0.33.0) with config: model='google/gemma-4-31B-it', max_seq_len=131072, "
        "tensor_parallel_size=1, kv_cache_dtype=fp8,\nINFO Using fp8 data type to store kv cache. It reduces the memory footprint\n"
        "INFO Using TRITON_ATTN backend.\n"
    )

    assert (d.kv.requested, d.kv.in_use, d.kv.verdict) == ("fp8", "fp8", "honoured")
    assert (d.version, layers(d)) == ("0.33.0", [("sliding", 50, "fused"), ("global", 10, "fused")])
    refused = of(
        "ValueError: Selected backend FLASHINFER is not valid for this configuration. Reason: ['head_size not supported']\n"
    )
    assert "vllm-refused" in ids(refused)


def test_what_vllm_takes_on_a_card_stands_beside_what_it_says() -> None:
    """0.19 forces Triton everywhere; its log names no card."""
    with (LOGS / "vllm_0.19.0_gemma4_e4b_rtx4090.txt").open("rb") as file:
        text = b"INFO vLLM API server version 0.19.0\n" + file.read()
    d = diagnose(io.BytesIO(text), "log", model=catalogue.spec("gemma-4-e4b"), gpus=[find_gpu("rtx4090")])
    (found,) = [f for f in d.findings if f.id == "vllm-one-backend"]

    assert "0.19.0 takes TRITON_ATTN on" in found.why


def test_rocminfo_says_whose_kernels_are_replaced() -> None:
    """rocminfo's output may stand before a log in one pipe."""
    d = of(
        "  Name:                    gfx1100                            \n"
        'msg="server config" env="map[HSA_OVERRIDE_GFX_VERSION:10.3.0]"\n'
    )
    (found,) = [f for f in d.findings if f.id == "setting-without-effect"]

    assert "on gfx1100" in found.why


def test_every_finding_has_a_page() -> None:
    source = "".join(p.read_text() for p in (Path(look.__file__).parent).glob("*.py") if p.stem != "checks")
    used = set(re.findall(r'"(probe\.[a-z-]+)"', source)) | {c.id for c in CHECKS}
    emitted = set(re.findall(r'_finding\(\s*"([a-z-]+)"', source)) | set(re.findall(r'\bid="([a-z-]+)",\n\s+severity', source))

    assert used | emitted <= set(BY_ID)


# --- whatever comes ---


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=2000))
def test_rubbish_is_passed_over(data: bytes) -> None:
    assert {v.verdict for v in of(data).layers} == {"unproven"}


LINES = [line for p in LOGS.glob("*.txt") for line in p.read_text(errors="replace").split("\n") if line][:1500]


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(LINES), st.integers(0, 400), st.binary(max_size=6)), max_size=40))
def test_half_lines_and_lines_in_any_order_are_never_fatal(parts: list[tuple[str, int, bytes]]) -> None:
    data = b"\n".join(line.encode()[:cut] + junk for line, cut, junk in parts)
    d = of(data)

    assert json.loads(json.dumps(d.to_json()))["layers"]


@settings(deadline=None, max_examples=100)
@given(st.sampled_from([r for r in ROWS if r.pattern.groups]), st.text(max_size=60), st.integers(0, 10**30))
def test_absurd_numbers_in_known_lines_are_never_fatal(row: object, words: str, number: int) -> None:
    literal = row.literal.decode()  # type: ignore[attr-defined]
    of(f"{words}{literal}{number} {words}\n{number}{literal} {number} MiB\nlayer {number}{literal}{number}/{number} layers\n")


def test_a_large_log_takes_constant_memory() -> None:
    """200 MB in 10 s is 20 MB/s; this one is a server's small talk with a start in its middle."""
    talk = (LOGS / "llamacpp_cpu_healthy.txt").read_bytes().split(b"\n", 240)[-1]
    begin = start().encode()
    noise = b"srv  log_server_r: done request: POST /v1/chat/completions 127.0.0.1 200\n" * 40
    half = (talk + b"\n" + noise) * (8_000_000 // (len(talk) + len(noise)))
    data = half + begin + half
    tracemalloc.start()
    began = time.perf_counter()
    d = diagnose(io.BytesIO(data), "log")
    took = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert {v.verdict for v in d.layers} == {"fused"}
    assert peak < 40e6
    assert took < len(data) / 2e6  # tracemalloc slows it tenfold


def test_one_endless_line_is_cut() -> None:
    d = of(b"x" * 9_000_000 + b" offloaded 61/61 layers to GPU")

    assert {v.verdict for v in d.layers} == {"unproven"}


# --- small parts ---


def test_the_slope_of_a_prompt() -> None:
    cpu = [(0.0, 0.0)]
    for i in range(1, 9):  # ollama#15350: batch i takes 2.64 s times i
        cpu.append((512.0 * i, cpu[-1][1] + 2.64 * i))
    gpu_ = [(512.0 * i, 0.2 * i + 0.0005 * i * i) for i in range(9)]
    found, fine = slope(cpu), slope(gpu_)

    assert found is not None and found[1] > 0.9 and found[0] == pytest.approx(8)
    assert fine is not None and fine[1] < 0.1
    assert slope(cpu[:4]) is None


def test_amounts_know_their_last_digit() -> None:
    assert amounts("651.0 MiB") == (651 * 2**20, 0.05 * 2**20)
    assert amounts("12 GB") == (12e9, 0.5e9)
    with pytest.raises(ValueError, match="no amount"):
        amounts("many")


def test_flags_and_environments_are_read() -> None:
    assert flags("llama-server --model a.gguf -fa on --port=80 -ngl -1 --verbose") == {
        "model": "a.gguf",
        "fa": "on",
        "port": "80",
        "ngl": "-1",
        "verbose": "1",
    }
    assert dict(pairs("A:1 B: C:[http://x https://y] D:e")) == {"A": "1", "B": "", "C": "[http://x https://y]", "D": "e"}


# --- the command ---


def test_the_command_reads_a_file_and_a_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bad = LOGS / "ollama_0.20_gemma4_e4b_130k_fa_cpu_fallback.txt"

    assert main(["doctor", str(bad), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [x["verdict"] for x in found["layers"]] == ["unproven", "offloaded"]
    assert {"engine", "version", "model", "layers", "kv", "findings"} == set(found)
    assert main(["doctor", str(bad)]) == 1
    assert "runs on the CPU" in capsys.readouterr().out

    class Stdin:
        buffer = io.BytesIO(b"hello\n")

    monkeypatch.setattr("sys.stdin", Stdin())
    assert main(["doctor", "-"]) == 0
    assert "unproven" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["doctor", "nowhere.log"], ["doctor", "x", "--systemd", "y"], ["doctor", "."]])
def test_usage_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert "do:" in capsys.readouterr().err
