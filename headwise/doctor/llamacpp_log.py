"""The lines of llama.cpp (llama-server, llama-cli, and inside Ollama) that say something about attention, cache and memory.

Messages were read in llama.cpp 0c1e57098 (2026-10-01); older wordings stand beside them. llama-server shows most of them from
`-lv 4` on only.
"""

from __future__ import annotations

from headwise.doctor.scan import Row, row

_PRINT = r"(?:print_info|llm_load_print_meta): "
_CONTEXT = r"(?:llama_context|llama_new_context_with_model|llama_init_from_model): "

ROWS: tuple[Row, ...] = (
    # who and what
    row("process", "llama_server: initializing", opens="process"),
    row("process", "main: build", opens="process"),
    row("model_file", "load_model: loading model '", r"load_model: loading model '(?P<path>[^']+)'", opens="model"),
    row("metadata_file", "loaded meta data with", r"from (?P<path>.+?) \(version"),
    row("build", "build", r"\bbuild(?:: | = | )(?P<number>\d+) \((?P<commit>[0-9a-f]{7,})\)"),
    row("metadata", "general.name str", r"(?P<key>general\.name) str\s+= (?P<value>.*)"),
    row("metadata", "attention.sliding_window u32", r"(?P<key>[\w.-]+) u32\s+= (?P<value>\d+)"),
    row("model", " n_layer ", _PRINT + r"(?P<key>n_layer)\s+= (?P<value>\d+)"),
    row("model", " n_ctx_train ", _PRINT + r"(?P<key>n_ctx_train)\s+= (?P<value>\d+)"),
    row("model", " n_swa ", _PRINT + r"(?P<key>n_swa)\s+= (?P<value>\d+)"),
    row("model", " general.name ", _PRINT + r"(?P<key>general\.name)\s+= (?P<value>.+)"),
    # cards
    row("no_gpu", "no usable GPU found"),
    row("gpu_cuda", "compute capability", r"Device (?P<index>\d+): (?P<name>.+?), compute capability (?P<cc>[\d.]+)"),
    row("gpu_rocm", "gfx", r"Device (?P<index>\d+): (?P<name>.+?), (?P<gfx>gfx[0-9a-f]+)"),
    row("gpu_rocminfo", "  gfx", r"^\s*Name:\s+(?P<gfx>gfx[0-9a-f]+)\s*$"),
    row(
        "gpu_device",
        " MiB free)",
        r"-\s+(?P<device>[A-Za-z]+\d*)\s+: (?P<name>.+) \((?P<total>\d+) MiB, (?P<free>\d+) MiB free\)",
    ),
    row("gpu_using", "using device ", r"using device (?P<device>\w+) \((?P<name>.+?)\).* - (?P<free>\d+) MiB free"),
    row("gpu_metal", "GPU name:", r"GPU name:\s+(?P<name>.+)"),
    row("gpu_vulkan", "ggml_vulkan: ", r"ggml_vulkan: (?P<index>\d+) = (?P<name>.+?) \("),
    # where layers are
    row("offloaded", "offloaded ", r"offloaded (?P<done>\d+)/(?P<of>\d+) layers to GPU"),
    row(
        "layer_device",
        " assigned to device ",
        r"layer\s+(?P<layer>\d+) assigned to device (?P<device>\w+)(?:, is_swa = (?P<swa>\d))?",
    ),
    # flash attention: asked, probed, lost
    row("fa_request", "flash_attn ", _CONTEXT + r"flash_attn\s+= (?P<value>auto|enabled|disabled|-?[01])\b"),
    row(
        "fa_mismatch",
        "is assigned to device ",
        r"layer (?P<layer>\d+) is assigned to device (?P<device>\w+) but (?:the )?Flash Attention (?:tensor )?"
        r"is assigned to device (?P<fa_device>\w+)",
    ),
    row(
        "fa_probe", "Flash Attention ", r"Flash Attention (?:was auto, set to |not supported, set to )?(?P<value>enabled|disabled)"
    ),
    row("fa_forced_by_kv", "enabling flash_attn since it is required for quantized V cache"),
    row("fa_forced_by_split", "enabling flash_attn since it is required for SPLIT_MODE_TENSOR"),
    row("fa_forced_off", "forcing off", r"flash_attn is not compatible with (?P<model>\w+) - forcing off"),
    row(
        "fa_node",
        "(FLASH_ATTN",
        r"node #\s*\d+ \(FLASH_ATTN\w*\):.*?\[\s*(?P<device>[A-Za-z]\w*).*?cache_[kv]_l(?P<layer>\d+)",
    ),
    row(
        "softmax_node",
        "SOFT_MAX)",
        r"node #\s*\d+ \(\s*SOFT_MAX\):\s+kq_soft_max\S*-(?P<layer>\d+) .*?\[\s*(?P<device>[A-Za-z]\w*)",
    ),
    # the cache
    row("kv_refused", "quantized V cache requires flash_attn to be enabled"),
    row("kv_refused", "quantized V cache was requested, but this requires Flash Attention"),
    row("kv_refused", "V cache quantization requires flash_attn"),
    row(
        "kv_refused",
        "does not divide n_embd_head",
        r"(?P<tensor>[KV]) cache type (?P<type>\w+) with block size (?P<block>\d+) does not",
    ),
    row("kv_converted", "converting K and V to f16 instead", r"compiled for K/V types (?P<k>\w+)-(?P<v>\w+)"),
    row("kv_kind", "SWA KV cache, size = ", r"creating\s+(?P<kind>non-SWA|SWA) KV cache, size = (?P<cells>\d+) cells"),
    row(
        "kv_size",
        " cells, ",
        r"size =\s+(?P<mib>[\d.]+) MiB \(\s*(?P<cells>\d+) cells,\s*(?P<layers>\d+) "
        r"layers,\s*(?P<seqs>\d+)(?:/\s*(?P<streams>\d+))? "
        r"seqs\), K \((?P<k>\w+)\):\s*(?P<k_mib>[\d.]+) MiB, V \((?P<v>\w+)\):\s*(?P<v_mib>[\d.]+) MiB",
    ),
    row(
        "kv_size",
        "KV self size",
        r"KV self size\s+=\s+(?P<mib>[\d.]+) MiB, K \((?P<k>\w+)\):\s*(?P<k_mib>[\d.]+) MiB, V "
        r"\((?P<v>\w+)\):\s*(?P<v_mib>[\d.]+) MiB",
    ),
    row("kv_filtered", ": filtered", r"layer\s+(?P<layer>\d+): filtered"),
    row("swa_full", "using full-size SWA cache"),
    row("kv_buffer", "KV buffer size", r"(?P<device>[A-Za-z]\w*)(?:\[\S*\])? KV buffer size =\s+(?P<mib>[\d.]+) MiB"),
    row("v_padded", "padding V cache to", r"padding V cache to (?P<values>\d+)"),
    # memory and the graph
    row("model_buffer", "model buffer size", r"(?P<device>[A-Za-z]\w*)(?:\[\S*\])? model buffer size =\s+(?P<mib>[\d.]+) MiB"),
    row(
        "compute_buffer", "compute buffer size", r"(?P<device>[A-Za-z]\w*)(?:\[\S*\])? compute buffer size =\s+(?P<mib>[\d.]+) MiB"
    ),
    row("splits", "graph splits = ", r"graph splits = (?P<pp>\d+)(?: \(with bs=(?P<bs>\d+)\), (?P<tg>\d+) \(with bs=1\))?"),
    row("splits", ", splits = ", r"nodes = [\d /]+, splits = (?P<pp>\d+)(?: / (?P<tg>\d+))?"),
    row("fit", "MiB of device memory vs.", r"projected to use (?P<need>\d+) MiB of device memory vs\. (?P<free>\d+) MiB"),
    row("setting", "n_ctx", _CONTEXT + r"(?P<key>n_ctx\w*)\s+= (?P<value>\d+)"),
    row("setting", "n_ubatch", _CONTEXT + r"(?P<key>n_ubatch)\s+= (?P<value>\d+)"),
    row("setting", "n_seq_max", _CONTEXT + r"(?P<key>n_seq_max)\s+= (?P<value>\d+)"),
    row("unified", "kv_unified ", _CONTEXT + r"kv_unified\s+= (?P<value>\w+)"),
    row("slots", "n_slots = ", r"n_slots = (?P<slots>\d+), n_ctx_slot = (?P<context>\d+)(?:, kv_unified = '(?P<unified>\w+)')?"),
    row("rotation_off", "LLAMA_ATTN_ROT_DISABLE"),
    # what happened afterwards
    row(
        "progress",
        "prompt processing",
        r"task (?P<task>-?\d+) .*prompt processing(?: progress)?, n_tokens =\s+(?P<done>\d+),.* t =\s+(?P<seconds>[\d.]+) s",
    ),
    row("prompt_eval", "prompt eval time", r"prompt eval time =\s+(?P<ms>[\d.]+) ms /\s+(?P<tokens>\d+) tokens"),
    row("released", "stop processing: n_tokens", r"stop processing: n_tokens = (?P<tokens>\d+), truncated = (?P<truncated>\d)"),
    row(
        "too_long",
        "the available context size",
        r"request \((?P<tokens>\d+) tokens\) exceeds the available context size \((?P<context>\d+)",
    ),
    row("context_shift", "slot context shift"),
)
