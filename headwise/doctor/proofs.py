"""Which evidence proves which verdict, for which engine: the table that decides, and that docs/doctor.md prints.

A flag that an engine prints is what it was asked, never proof. What no row proves is unproven.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["fused", "materialised", "offloaded", "unproven"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """One row.

    Args:
        sees: what must stand in the log.
        why: how that follows.
        source: where the engine's behaviour was read or measured.
    """

    id: str
    engines: str
    verdict: Verdict
    sees: str
    why: str
    source: str


_LC = "llama.cpp 0c1e57098 (2026-10-01)"
PROOFS: tuple[Proof, ...] = (
    Proof(
        id="graph-dump",
        engines="llama.cpp, Ollama from 0.30 (GGML_SCHED_DEBUG=2 and -v)",
        verdict="fused",
        sees="`node # (FLASH_ATTN)` of each layer with its device; `SOFT_MAX` nodes where there is none",
        why="the scheduler's own list of which node runs where: on a GPU fused, on the CPU offloaded, a softmax materialised",
        source=f"{_LC} ggml/src/ggml-backend.cpp:1000-1035",
    ),
    Proof(
        id="probe-disabled",
        engines="llama.cpp (-fa auto), Ollama from 0.30",
        verdict="materialised",
        sees="`Flash Attention was auto, set to disabled`, `Flash Attention not supported, set to disabled`, or the layer that "
        "is `assigned to device CUDA0 but Flash Attention is assigned to device CPU`",
        why="one layer without a kernel turns flash attention off for every layer",
        source=f"{_LC} src/llama-context.cpp:506-558",
    ),
    Proof(
        id="off",
        engines="all",
        verdict="materialised",
        sees="`flash_attn = disabled` (or 0), `forcing off`; Ollama: `FlashAttention:Disabled`, `flash attention enabled but not "
        "supported by gpu` (or `model`), `disabling flash attention for gemma4 on pre-Turing GPU`",
        why="a request to turn it off is always followed",
        source=f"{_LC} src/llama-context.cpp:3816; Ollama v0.20.4 llm/server.go:195-222",
    ),
    Proof(
        id="no-gpu",
        engines="llama.cpp, Ollama",
        verdict="offloaded",
        sees="`no usable GPU found`, `offloaded 0/N layers`, devices that are the CPU alone, or cache and compute buffers on "
        "the CPU "
        "alone",
        why="attention runs where its layer and its cache are",
        source=f"{_LC} common/arg.cpp:2800, src/llama-model.cpp:1911-1924",
    ),
    Proof(
        id="layers-on-cpu",
        engines="llama.cpp, Ollama",
        verdict="offloaded",
        sees="`offloaded n/N layers to GPU` with n < N",
        why="the first layers stay on the CPU, and their attention with them",
        source=f"{_LC} src/llama-model.cpp:1604, 1911-1924",
    ),
    Proof(
        id="probe-enabled",
        engines="llama.cpp (-fa auto), Ollama from 0.30",
        verdict="fused",
        sees="`Flash Attention enabled` or `Flash Attention was auto, set to enabled`, and layers known to be on a GPU",
        why="the probe builds the graph and compares the device of every layer's flash attention node with its layer's",
        source=f"{_LC} src/llama-context.cpp:506-558",
    ),
    Proof(
        id="healthy-splits",
        engines="llama.cpp, Ollama from 0.30",
        verdict="fused",
        sees="flash attention on, all layers offloaded, and at most one graph split more than there are GPUs",
        why="each attention node on the CPU cuts the graph twice more; with one split for the input and one per GPU there is none",
        source=f"{_LC} src/llama-context.cpp:754; measured: 62 splits with 30 layers' attention on the CPU, 2 without",
    ),
    Proof(
        id="extra-splits",
        engines="llama.cpp, Ollama from 0.30",
        verdict="offloaded",
        sees="flash attention on, all layers offloaded, and two splits too many for each layer, or for each global layer",
        why="each attention node on the CPU cuts the graph twice more",
        source=f"{_LC} src/llama-context.cpp:754; measured: 62 splits with 30 layers' attention on the CPU, 2 without",
    ),
    Proof(
        id="cpu-graph-identity",
        engines="Ollama 0.20 (its own engine)",
        verdict="offloaded",
        sees="`compute graph device=CPU` equal to the copies of one global layer: K, V, mask, queries and result",
        why="those bytes are only there when the scheduler ships that layer's attention to the CPU; for a cache that is not a "
        "multiple of 256 tokens, or of another size, the sum does not come out",
        source="Ollama v0.20.2 fattn.cu (no head size 512); ollama#15634: 192.0 MiB, #15237: 651.0 MiB, both exact",
    ),
    Proof(
        id="vllm-backend",
        engines="vLLM",
        verdict="fused",
        sees="`Using X backend` with X a fused backend: TRITON_ATTN, FLASH_ATTN, TRITON_FLASH_ATTN, FLASHINFER, "
        "FLEX_ATTENTION, ...",
        why="vLLM raises where a backend cannot serve a layer; it has no fallback to the CPU. Its Triton kernel is a flash kernel: "
        "online softmax over the paged cache, no score matrix",
        source="vLLM 0.33.0 platforms/cuda.py:448-508, v1/attention/ops/triton_unified_attention.py",
    ),
    Proof(
        id="vllm-cpu",
        engines="vLLM",
        verdict="offloaded",
        sees="`Using CPU_ATTN backend`, `Torch SDPA`, or the platform cpu",
        why="the whole engine runs on the CPU",
        source="vLLM 0.33.0 platforms/cpu.py",
    ),
)
BY_ID = {p.id: p for p in PROOFS}
