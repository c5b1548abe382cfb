"""The lines of vLLM. Messages were read in the wheels of 0.19.0 and 0.33.0."""

from __future__ import annotations

from headwise.doctor.scan import Row, row

ROWS: tuple[Row, ...] = (
    row("vl_version", "vLLM API server version ", r"API server version (?P<version>[\w.+]+)", opens="process"),
    row(
        "vl_engine",
        "Initializing a V1 LLM engine",
        r"engine \(v(?P<version>[^)]+)\)(?:.*?model='(?P<model>[^']*)')?(?:.*?max_seq_len=(?P<context>\d+))?"
        r"(?:.*?tensor_parallel_size=(?P<tp>\d+))?(?:.*?kv_cache_dtype=(?P<kv>\w+))?",
        opens="model",
    ),
    row("vl_heads", "heterogeneous head dimensions", r"dimensions (?P<heads>\{[^}]*\}|\([^)]*\))\.?(?P<then>.*)"),
    row("vl_forced", "orcing TRITON_ATTN backend"),
    row("vl_backend", " backend", r"Using (?:AttentionBackendEnum\.)?(?P<backend>[A-Z][A-Z0-9_]{3,})(?: attention)? backend"),
    row("vl_backend", " backend on V1", r"Using (?P<words>Flash Attention|Triton|FlashInfer|Torch SDPA) backend on V1"),
    row("vl_fa_version", "Using FlashAttention version", r"FlashAttention version (?P<version>\d)"),
    row(
        "vl_fa_upgrade", "upgrading FlashAttention", r"head_size=(?P<head>\d+).*upgrading FlashAttention (?P<old>\d) -> (?P<new>\d)"
    ),
    row("vl_fa_default", "defaulting to FA version", r"defaulting to FA version (?P<version>\d)"),
    row(
        "vl_refused", "is not valid for this configuration", r"Selected backend (?P<backend>\S+) is not valid.*?Reason: (?P<why>.*)"
    ),
    row("vl_kv_fp8", "data type to store kv cache", r"Using (?P<type>\w+) data type to store kv cache"),
    row("vl_kv_request", "kv_cache_dtype", r"['\"]?kv_cache_dtype['\"]?[=:] ?['\"]?(?P<type>\w+)"),
    row("vl_kv_memory", "KV cache memory", r"Available KV cache memory: (?P<gib>[\d.]+) GiB"),
    row("vl_kv_tokens", "GPU KV cache size", r"GPU KV cache size: (?P<tokens>[\d,]+) tokens"),
    row("vl_concurrency", "Maximum concurrency for", r"for (?P<context>[\d,]+) tokens per request: (?P<times>[\d.]+)x"),
    row("vl_platform", "detected platform", r"detected platform (?P<platform>\w+)"),
    row(
        "vl_rates",
        "Avg prompt throughput",
        r"Avg prompt throughput: (?P<prompt>[\d.]+) tokens/s(?:,\s*Avg generation throughput: (?P<generation>[\d.]+) tokens/s)?"
        r"(?:,\s*Running: (?P<running>\d+))?",
    ),
    row("vl_refused_context", "is larger than the maximum number of tokens that can be stored in KV cache"),
    row("vl_refused_context", "than the available KV cache memory", r"needed, which is larger than the available KV cache memory"),
)
