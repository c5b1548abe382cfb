"""Every check that the doctor makes: what it is called, what people believe about it, and what is true.

The ids are stable: programs read them from `doctor --json`, and each has a page in docs/checks/ that is made from this table.
"""

from __future__ import annotations

from dataclasses import dataclass

from headwise.doctor.finding import Severity


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One row: `believed` and `true` are the page's text."""

    id: str
    title: str
    severity: Severity
    looks_at: str
    believed: str
    true: str
    cure: str
    sources: str


CHECKS: tuple[Check, ...] = (
    Check(
        id="attention-on-cpu",
        title="Attention of some layers runs on the CPU",
        severity="problem",
        looks_at="the device of each layer, of its cache and of its attention node; graph splits; the CPU's compute buffer",
        believed="Flash attention hangs: the GPU is at 0 %, the prompt freezes from 3,000 or 4,000 tokens on, a deadlock.",
        true="It computes, on the CPU. Where a backend has no kernel for a layer (Gemma 4's head size 512 in engines of early "
        "April "
        "2026, or a KV type like iq4_nl today), ggml's scheduler gives that node to the CPU and ships K, V and mask there "
        "for every batch. Each batch takes longer than the one before; a client's time limit makes a freeze of it.",
        cure="A newer engine, a KV type with a kernel, all layers on the GPU; else flash attention off.",
        sources="ollama#15350, #15237, #15634; llama.cpp #24485, #27109, #27150, #28456; llama.cpp ggml-backend.cpp",
    ),
    Check(
        id="attention-materialised",
        title="Attention runs without a fused kernel",
        severity="problem",
        looks_at="the automatic probe's answer, or a setting that turns flash attention off",
        believed="`flash_attn = auto` or `enabled` in the log means that it is on.",
        true="That line repeats the request. The probe's answer comes later; one layer without a kernel turns it off for all. Then "
        "every batch stores its scores, queries times keys times heads, and V may not be quantised.",
        cure="Cure the layer that the log names: a newer engine, another KV type, or all layers on one kind of device.",
        sources="llama.cpp src/llama-context.cpp:506-558; Ollama v0.20.4 llm/server.go",
    ),
    Check(
        id="probe-skipped",
        title="Nobody checked where attention runs",
        severity="warning",
        looks_at="flash attention forced on by the user or by a quantised V cache",
        believed="Forcing it on is safer than auto.",
        true="auto builds the graph and looks at the device of every attention node. `on` looks at nothing, and a quantised V "
        "turns auto into on. What has no kernel then runs on the CPU without a word.",
        cure="Look at the graph splits in a log of -lv 4, or measure: headwise probe URL.",
        sources="llama.cpp src/llama-context.cpp:3840-3843, PR #26553 (open)",
    ),
    Check(
        id="graph-splits",
        title="The graph is cut more often than a healthy one",
        severity="problem",
        looks_at="`splits = N` where all layers are offloaded",
        believed="A technical number.",
        true="One split is the input, one each GPU's work: 2 on one card. Each attention node on the CPU adds two.",
        cure="As for attention-on-cpu.",
        sources="llama.cpp src/llama-context.cpp:754; measured on an H200 with an iq4_nl cache: 62 splits, f16: 2",
    ),
    Check(
        id="kv-type-without-kernel",
        title="No kernel on this card reads this KV type",
        severity="warning",
        looks_at="the types of K and V against the kernels of this backend and version",
        believed="What the flag accepts, the card can do.",
        true="llama.cpp accepts nine types; CUDA and HIP kernels read eight of them (not iq4_nl), before September 2026 four, "
        "and only "
        "with K and V alike. Metal wants K and V alike. What is accepted without a kernel runs on the CPU.",
        cure="--cache-type-k q8_0 --cache-type-v q8_0",
        sources="llama.cpp ggml-cuda/fattn.cu:541-720, ggml-metal-device.m:1727, #28079",
    ),
    Check(
        id="kv-type-ignored",
        title="The KV type that was asked for is not in use",
        severity="problem",
        looks_at="Ollama's warnings; the types in the cache's own line",
        believed="OLLAMA_KV_CACHE_TYPE=q8_0 halves the cache.",
        true="Ollama before 0.30 drops it with one warning where flash attention is off or the type is not q8_0 or q4_0, and keeps "
        "f16. (q8_0 is 34/32 bytes a value: 53 % of f16.)",
        cure="OLLAMA_FLASH_ATTENTION=1 with q8_0 or q4_0, or Ollama 0.30 or newer.",
        sources="Ollama v0.20.2 llm/server.go:228-258",
    ),
    Check(
        id="kv-type-refused",
        title="The engine refuses to start with this KV type",
        severity="problem",
        looks_at="`quantized V cache requires flash_attn`, `does not divide n_embd_head`",
        believed="OLLAMA_FLASH_ATTENTION=0 OLLAMA_KV_CACHE_TYPE=q8_0 is the safe setting for Gemma 4.",
        true="A quantised V needs flash attention. Ollama up to 0.24 ignored the type, from 0.30 on the model does not load.",
        cure="Flash attention auto or on, or an f16 cache.",
        sources="llama.cpp src/llama-context.cpp:3845-3870; Ollama fb3076099 llm/llama_server.go:394; ollama#15043",
    ),
    Check(
        id="kv-empty-type",
        title="A false alarm: no KV type was asked for",
        severity="note",
        looks_at='`kv cache type not supported by model type=""`',
        believed="The model does not support the cache.",
        true="Ollama 0.5.7 to 0.12 say so when no type was asked for at all.",
        cure="Nothing to do.",
        sources="ollama#9730; Ollama v0.5.7 llm/server.go",
    ),
    Check(
        id="kv-converted",
        title="K and V are converted to f16 for each use",
        severity="warning",
        looks_at="`no FlashAttention vector kernel compiled for K/V types ...`",
        believed="Any KV type is as fast as another.",
        true="Without a compiled pair the whole cache of a layer is converted to f16 each step. Slow, but on the GPU.",
        cure="K and V both q8_0, or both q4_0, or a build with that pair in GGML_CUDA_FA_QUANTS.",
        sources="llama.cpp ggml-cuda/fattn.cu:505, #28079",
    ),
    Check(
        id="kv-f16-scratch",
        title="A quantised cache at head size 512 needs f16 scratch",
        severity="note",
        looks_at="a quantised cache on CUDA with layers of head size 512",
        believed="A quantised cache costs what its bytes are.",
        true="ggml's vector kernel ends at head size 256; for 512 every step converts K and V of the layer to f16. That scratch is "
        "part of the compute buffer: 2 GiB for Gemma 4 31B at 262,144 tokens.",
        cure="Count it; headwise reads quantised caches in the kernel.",
        sources="llama.cpp ggml-cuda/fattn.cu:737-755, fattn-common.cuh:53",
    ),
    Check(
        id="kv-in-host-memory",
        title="The cache lies in host memory",
        severity="problem",
        looks_at="KV buffers on the CPU where layers are on a GPU",
        believed="--no-kv-offload saves VRAM at little cost.",
        true="With flash attention the node stays on the GPU, and K and V of every layer are copied there at each step, over PCIe; "
        "without it, attention is computed on the CPU.",
        cure="Leave out --no-kv-offload; a quantised cache or fewer slots save memory better.",
        sources="llama.cpp src/llama-graph.cpp build_attn_mha; benchmarks/doctor_matrix.py",
    ),
    Check(
        id="swa-full",
        title="Sliding layers hold the whole context",
        severity="problem",
        looks_at="`using full-size SWA cache`, or a sliding cache with as many cells as the global one",
        believed="Gemma 4's cache needs petabytes; a bug that was fixed.",
        true="A sliding layer reads its window only. --swa-full (the default of the library, not of llama-server) keeps every "
        "token "
        "in every layer: 28,160 in place of 3,760 MiB for the 31B at 32K in f16.",
        cure="Leave out --swa-full; in a front end, turn full-size SWA off.",
        sources="llama.cpp #14123, #21277, #21332; src/llama-kv-cache-iswa.cpp:76; LM Studio #1740",
    ),
    Check(
        id="slots-times-window",
        title="Every slot holds its own window",
        severity="warning",
        looks_at="the number of slots and the sliding cache's size",
        believed="Slots cost nothing until they are used.",
        true="The sliding cache is window times slots plus one batch: llama-server's default of 4 slots makes 4,608 cells of "
        "Gemma 4's "
        "1,536.",
        cure="-np 1 for a single user.",
        sources="llama.cpp src/llama-kv-cache-iswa.cpp",
    ),
    Check(
        id="layers-on-cpu",
        title="Not all layers are on the GPU",
        severity="problem",
        looks_at="`offloaded n/N layers to GPU`, Ollama's share of CPU",
        believed="A few layers on the CPU slow it down a little.",
        true="Each token waits for them, at the speed of the machine's memory: one layer in ten on the CPU often halves the speed.",
        cure="A smaller context or weight type, a quantised cache, or fewer slots, until all layers fit.",
        sources="llama.cpp src/llama-model.cpp:1911-1924",
    ),
    Check(
        id="no-gpu",
        title="There is no GPU backend at all",
        severity="problem",
        looks_at="`no usable GPU found`, a list of devices that is the CPU alone, `library=cpu`",
        believed="The engine uses the card that nvidia-smi or rocminfo shows.",
        true="A build without CUDA, HIP, Metal or Vulkan, or a driver that it cannot open, runs on the CPU and says so in one "
        "line.",
        cure="Install the build for your card; in a container, pass the device.",
        sources="llama.cpp common/arg.cpp:2800; Ollama discover/gpu.go",
    ),
    Check(
        id="several-gpus",
        title="The model is split over several cards",
        severity="note",
        looks_at="buffers of more than one device",
        believed="Two cards are twice as fast.",
        true="A split by layers runs one card after the other: it adds memory, not speed.",
        cure="One card, if the plan fits it.",
        sources="llama.cpp --split-mode layer",
    ),
    Check(
        id="estimate-off",
        title="The engine's estimate is not what is needed",
        severity="warning",
        looks_at="the estimate in the log against the sum of what it allocates, or against the planner",
        believed="What does not fit the estimate does not fit the card.",
        true="Ollama's older estimate charges every layer for the whole context and adds a graph of gqa times a sixth of the "
        "cache per "
        "card, flash attention or not: 35 GB where 27 are used, with room for 90K tokens.",
        cure="Compare with headwise plan; set num_ctx yourself.",
        sources="Ollama v0.18.1 fs/ggml/ggml.go GraphSize; ollama#5022, #6160, #10128, #10359, #14909",
    ),
    Check(
        id="context-in-use",
        title="The context is smaller than the model's, or than you asked for",
        severity="note",
        looks_at="n_ctx, the context of a slot, num_ctx",
        believed="A model of 128K tokens takes 128K tokens.",
        true="Ollama's default is 4,096 on a small card; llama-server divides its context by the slots unless they share one "
        "cache.",
        cure="num_ctx or OLLAMA_CONTEXT_LENGTH; -c.",
        sources="Ollama server/routes.go, envconfig; llama.cpp src/llama-context.cpp:304",
    ),
    Check(
        id="prompt-truncated",
        title="Prompts were cut or refused",
        severity="problem",
        looks_at="`truncating input prompt`, `exceeds the available context size`, `truncated = 1`, context shifts",
        believed="The model forgot the instructions.",
        true="It never saw them: Ollama drops the middle of a prompt that is longer than num_ctx.",
        cure="A larger context, or shorter prompts.",
        sources="Ollama runner; llama.cpp tools/server/server-context.cpp:3188",
    ),
    Check(
        id="prefill-slope",
        title="Each batch of a prompt takes longer than the one before, far more than attention on a GPU would",
        severity="problem",
        looks_at="the times of prompt processing in the log",
        believed="Long prompts are slow.",
        true="On a GPU attention is a small part of a batch, and its time hardly grows. Batches whose time grows in step with "
        "their "
        "position have their attention on the CPU.",
        cure="As for attention-on-cpu.",
        sources="ollama#15350: eight batches fit 2.64 s times their number",
    ),
    Check(
        id="vllm-one-backend",
        title="vLLM runs one backend for every kind of layer",
        severity="note",
        looks_at="`heterogeneous head dimensions`, `Forcing TRITON_ATTN`",
        believed="Forcing Triton is why Gemma 4 is slow, and PR #38891 fixed it.",
        true="Triton's kernel is a flash kernel too. Measured on Ampere, FlashAttention at 256 beside Triton at 512 decodes 8 "
        "to 12 % "
        "slower than Triton alone, and changes answers; the PR was never merged. On Hopper, 0.33 runs FlashAttention 4 on both.",
        cure="Nothing to do; to try a mix: --attention-config with backend_per_kind.",
        sources="vllm#38887, #38891, #48114, #42175, #48012",
    ),
    Check(
        id="vllm-average-rates",
        title="Average rates in a log are no measurement",
        severity="note",
        looks_at="`Avg prompt throughput: ...`",
        believed="9 tokens/s in the log is the speed.",
        true="It is the mean over ten seconds, idle ones included.",
        cure="headwise probe URL measures a request.",
        sources="vLLM v1/metrics/loggers.py",
    ),
    Check(
        id="vllm-refused",
        title="vLLM refused a setting or the context",
        severity="problem",
        looks_at="`Selected backend ... is not valid`, `larger than the available KV cache memory`",
        believed="vLLM falls back.",
        true="It raises, and names the reason.",
        cure="Leave --attention-backend out, or lower --max-model-len.",
        sources="vLLM platforms/cuda.py, v1/core/kv_cache_utils.py",
    ),
    Check(
        id="known-fault",
        title="This version is known to run this model's attention on the CPU",
        severity="warning",
        looks_at="version, model, settings",
        believed="No fix is in sight.",
        true="Head size 512 came to Ollama with 0.20.4 (2026-04-07), to llama.cpp with b8609.",
        cure="Update.",
        sources="ollama#15378; llama.cpp PR #20998",
    ),
    Check(
        id="environment-differs",
        title="The service does not have the environment of your shell",
        severity="warning",
        looks_at="the environment of the running process against this shell's",
        believed="export OLLAMA_FLASH_ATTENTION=1 in a terminal changes the server.",
        true="A service has the environment of its unit, a container its own, the macOS app that of launchctl.",
        cure="systemctl edit ollama, then systemctl restart ollama.",
        sources="Ollama docs/faq: How do I configure Ollama server",
    ),
    Check(
        id="setting-that-slows",
        title="A debugging setting slows every kernel",
        severity="problem",
        looks_at="AMD_SERIALIZE_KERNEL, HIP_LAUNCH_BLOCKING, CUDA_LAUNCH_BLOCKING in the server's environment",
        believed="AMD_SERIALIZE_KERNEL=3 is needed for flash attention on AMD.",
        true="It waits before and after every kernel. Nothing in the engines' attention reads it.",
        cure="Unset it.",
        sources="ROCm documentation: debugging; ggml source",
    ),
    Check(
        id="setting-without-effect",
        title="A setting that does nothing here",
        severity="note",
        looks_at="HSA_OVERRIDE_GFX_VERSION and the card's gfx name; flags of other versions",
        believed="HSA_OVERRIDE_GFX_VERSION turns flash attention on.",
        true="It makes ROCm load another card's kernels: useful where a card has none of its own, harmful or void otherwise. "
        "Attention does not read it.",
        cure="Unset it unless the card's gfx name is missing from the build.",
        sources="ROCm; Ollama docs/gpu.md",
    ),
    Check(
        id="ps-is-no-proof",
        title="`100% GPU` is no proof",
        severity="note",
        looks_at="`ollama ps`, size_vram",
        believed="100% GPU in ollama ps: everything is on the GPU.",
        true="It says that all layers' weights are. In the broken versions it said so with attention on the CPU: the CPU's "
        "compute graph "
        "was counted as the GPU's.",
        cure="headwise doctor on the log, or headwise probe URL.",
        sources="ollama#15237, #15395; Ollama llm/server.go MemorySize",
    ),
    Check(
        id="log-too-quiet",
        title="The log does not say",
        severity="note",
        looks_at="which of the lines that prove something are missing",
        believed="No warning, no problem.",
        true="llama-server's default verbosity since 2026 prints neither the probe's answer nor the graph; Ollama never "
        "prints a kernel.",
        cure="llama-server -lv 4; Ollama: OLLAMA_DEBUG=1; or measure: headwise probe URL.",
        sources="llama.cpp common/log; Ollama envconfig",
    ),
    Check(
        id="what-fits",
        title="What these cards would hold",
        severity="note",
        looks_at="the model's layers, the weights and the cards in the log",
        believed="EXAONE 4.0 32B holds 45K tokens on 12 + 24 GB.",
        true="The estimate of that engine charged every layer for the whole context and 10 GB for a graph that needs 0.9. "
        "With rings for the "
        "sliding layers and a q8_0 cache the same cards hold several times as much.",
        cure="headwise llama-flags or ollama-env writes the settings.",
        sources="ollama#14909; planner",
    ),
    Check(
        id="plan-beside",
        title="What the planner says",
        severity="note",
        looks_at="the model's layers, the cache in the log and the cards",
        believed="An engine knows best what fits.",
        true="The cache is exact arithmetic: the same numbers can be had before anything is loaded.",
        cure="headwise plan",
        sources="planner",
    ),
)


def _probe(id: str, title: str, severity: Severity, looks_at: str, believed: str, true: str, cure: str) -> Check:
    return Check(
        id=f"probe.{id}", title=title, severity=severity, looks_at=looks_at, believed=believed, true=true, cure=cure,
        sources="headwise/doctor/probe.py; docs/probe.md",
    )  # fmt: skip


PROBE_CHECKS: tuple[Check, ...] = (
    _probe(
        "failed",
        "A prompt was not answered",
        "problem",
        "the answer's status, its end, the context",
        "A server that starts, works.",
        "Short prompts work with settings that long ones break: memory, context, a proxy's time limit.",
        "The server's error is the evidence; a larger context, or the log through headwise doctor.",
    ),
    _probe(
        "stuck",
        "No progress",
        "problem",
        "chunks, slots, metrics and tokens, within --stall seconds",
        "It hangs after so many tokens.",
        "Slow and stuck differ by progress, not by time: a prompt that moves is never called stuck.",
        "headwise doctor --url URL says what it does; a larger --stall where one batch takes longer.",
    ),
    _probe(
        "slow",
        "Slower with depth than fused attention is",
        "problem",
        "time per token against the position in the prompt",
        "Long prompts are slow.",
        "On a GPU a token's time grows little with depth. Time that grows in step with it is attention on the CPU.",
        "headwise doctor on the log; see attention-on-cpu.",
    ),
    _probe(
        "gpu-idle",
        "The GPU does nothing while the prompt is read",
        "problem",
        "nvidia-smi or rocm-smi during prefill, on the server's machine",
        "100% GPU in ollama ps.",
        "0 % during prefill beside a busy CPU is attention, or everything, on the CPU.",
        "See attention-on-cpu and no-gpu.",
    ),
    _probe(
        "counts",
        "The server counts other tokens than were sent",
        "warning",
        "prompt tokens sent against those it reports",
        "What was sent was read.",
        "A template, a cut prompt or a cache changes the count; speeds are then of something else.",
        "Look for truncation: prompt-truncated.",
    ),
    _probe(
        "cached",
        "A prompt never sent before came from a cache",
        "warning",
        "cached tokens, and times faster than a card can",
        "Prefill is this fast.",
        "A prefix cache answered; the speed says nothing of attention.",
        "Probe with other prompts, or without the cache.",
    ),
    _probe(
        "recall",
        "A fact planted at the beginning is lost at this length",
        "warning",
        "the answer to a question about it",
        "A long context is a used context.",
        "A context that is cut, or a cache that is too coarse, loses the beginning first.",
        "Compare with an f16 cache, and look for prompt-truncated.",
    ),
    _probe(
        "waited",
        "Most of the time until the first token was not prefill",
        "note",
        "the server's own prefill time",
        "Time to first token is prefill.",
        "A queue, a model being loaded or a slow network is part of it.",
        "Probe an idle, loaded server.",
    ),
    _probe(
        "busy",
        "The machine or the server had other work",
        "warning",
        "other requests, and the CPU before the probe",
        "A measurement is a measurement.",
        "Shared cores and batches halve speeds.",
        "Again, when it is idle.",
    ),
    _probe(
        "ceiling",
        "Far below what the card allows",
        "warning",
        "prefill speed against the card's matrix rate, model and card known",
        "It runs on the GPU, so it is fast.",
        "A twentieth of the ceiling is not a GPU at work on a whole batch.",
        "See layers-on-cpu, attention-on-cpu, small micro-batches.",
    ),
    _probe(
        "reload",
        "Ollama loaded the model again for a longer context",
        "note",
        "load times between lengths",
        "The first long prompt is slow because it is long.",
        "num_ctx changed, so the model was loaded anew.",
        "Set OLLAMA_CONTEXT_LENGTH once.",
    ),
)
BY_ID = {c.id: c for c in (*CHECKS, *PROBE_CHECKS)}
