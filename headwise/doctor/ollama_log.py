"""The lines of Ollama's own server. What its runner prints besides is llama.cpp's.

Messages were read in ollama v0.5.7, v0.18.1, v0.20.2, v0.20.4 and fb3076099 (0.33.0-rc): match on msg=, never on source=.
"""

from __future__ import annotations

from headwise.doctor.scan import Row, row

ROWS: tuple[Row, ...] = (
    row("version", "Listening on ", r"Listening on \S+ \(version (?P<version>[\w.+-]+)\)"),
    row("ollama_env", 'msg="server config"', r'env="map\[(?P<env>.*)\]"'),
    row("gpu_ollama", 'msg="inference compute"', r"library=(?P<library>\w+).*?compute=(?P<compute>\S*)"),
    row("command", 'msg="starting llama-server"', r'cmd="(?P<command>.*?)"(?: |$)', opens="process"),
    row("command", 'msg="starting llama server"', r'cmd="(?P<command>.*?)"(?: |$)', opens="process"),
    row("command", 'msg="starting runner"', r'cmd="(?P<command>.*?)"(?: |$)', opens="process"),
    # flash attention
    row(
        "ol_request",
        "FlashAttention:",
        r"FlashAttention:(?P<fa>\w+) KvSize:(?P<kv_size>\d+) KvCacheType:(?P<kv>\w*)",
    ),
    row("ol_batch", "BatchSize:", r"Parallel:(?P<slots>\d+) BatchSize:(?P<batch>\d+)"),
    row("ol_fa_on", 'msg="enabling flash attention"', opens="prelude"),
    row("ol_fa_no_gpu", "flash attention enabled but not supported by gpu", opens="prelude"),
    row("ol_fa_no_model", "flash attention enabled but not supported by model", opens="prelude"),
    row(
        "ol_fa_pre_turing",
        "disabling flash attention for gemma4 on pre-Turing GPU",
        r"compute=(?P<compute>[\d.]+)|pre-Turing",
        opens="prelude",
    ),
    # the KV type
    row(
        "ol_kv_dropped",
        "quantized kv cache requested but flash attention disabled",
        r"disabled\"? type=(?P<type>\S*)|disabled",
        opens="prelude",
    ),
    row(
        "ol_kv_dropped",
        "must be enabled to use a quantized OLLAMA_KV_CACHE_TYPE",
        r"TYPE\"? type=(?P<type>\S*)|TYPE",
        opens="prelude",
    ),
    row("ol_kv_dropped", "unsupported OLLAMA_KV_CACHE_TYPE", r"TYPE\"? type=(?P<type>\S*)|TYPE", opens="prelude"),
    row("ol_kv_dropped", "kv cache type not supported by model", r"model\"? type=(?P<type>\S*)|model", opens="prelude"),
    # memory: the Ollama engine measures, the old runner estimates
    row(
        "ol_memory",
        " device=",
        r'msg="(?P<what>kv cache|model weights|compute graph)" device=(?P<device>\S+) size="(?P<size>[^"]+)"',
    ),
    row("ol_total", 'msg="total memory"', r'size="(?P<size>[^"]+)"'),
    row(
        "ol_estimate",
        "memory.required.full",
        r"layers\.model=(?P<of>\d+) layers\.offload=(?P<done>\d+).*?memory\.available=\"\[(?P<available>[^\]]*)\]\".*?"
        r"memory\.required\.full=\"(?P<full>[^\"]+)\".*?memory\.required\.kv=\"(?P<kv>[^\"]+)\""
        r".*?memory\.weights\.total=\"(?P<weights>[^\"]+)\".*?memory\.graph\.full=\"(?P<graph>[^\"]+)\"",
    ),
    row("truncated_prompt", "truncating input prompt", r"limit=(?P<limit>\d+) prompt=(?P<tokens>\d+)"),
    row("ol_default_context", "default_num_ctx", r"default_num_ctx=(?P<context>\d+)"),
    # `ollama ps`, which people paste
    row(
        "ol_ps",
        " GPU ",
        r"(?P<model>\S+:\S+)\s+(?P<id>[0-9a-f]{12})\s+(?P<size>[\d.]+ [KMGT]B)\s+(?P<where>[\d%/]+ "
        r"(?:CPU/)?GPU)\s+(?P<context>\d+)?",
    ),
    row(
        "ol_ps",
        "% CPU ",
        r"(?P<model>\S+:\S+)\s+(?P<id>[0-9a-f]{12})\s+(?P<size>[\d.]+ [KMGT]B)\s+(?P<where>100% CPU)\s+(?P<context>\d+)?",
    ),
)
