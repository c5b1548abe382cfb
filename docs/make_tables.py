"""Tables of the docs from the results they report: `python docs/make_tables.py` writes them between their marks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from headwise.spec.kv import KV_FORMATS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"


def newest(name: str) -> dict[str, Any]:
    return json.loads(sorted(RESULTS.glob(f"{name}_*.json"))[-1].read_text())


def taken(found: dict[str, Any], *libraries: str) -> str:
    """On which card, when, and of what: a result's first words."""
    return ", ".join([found["gpu"], found["date"], *(f"{what} {found[what]}" for what in ("commit", *libraries))])


def number(x: object) -> str:
    return f"{x:.1e}" if isinstance(x, float) else str(x).split(": ", 1)[0]


def table(head: str, rows: Iterable[Sequence[str]], above: str = "") -> str:
    """`head`, a line of Markdown, and the cells of each row under it; `above` is a paragraph before them."""
    lines = [above, ""] if above else []
    lines += [head, "|" + "---|" * (head.count("|") - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)]) + "\n"


def converter() -> str:
    rows = []
    for row in newest("llamacpp_converter")["models"]:
        results = (row["converted, headwise"], row["converted, llama.cpp"], row["twin, llama.cpp"])
        rows.append((row["model"], *map(number, results), row["note"] or ""))
    return table("| model | converted, headwise | converted, llama.cpp | our file, llama.cpp | why not equal |", rows)


def attention() -> str:
    found = newest("attention_h200")
    above = f"{taken(found)}: bf16 products {found['matrix_tflops']:.0f} TFLOP/s, reads {found['read_tb_s']:.2f} TB/s."
    if found.get("libraries"):
        above += f" {', '.join(f'{name} {version}' for name, version in found['libraries'].items())}."
    rows = []
    for row in found["rows"] + found["refused"]:
        s = row["shape"]
        store = "one tensor" if s["one"] else "two tensors"
        what = f"{s['name']}: {s['head_dim']}, {s['heads']}/{s['kv_heads']} heads, {store}"
        what += f", window {s['window']}" if s["window"] else ""
        cells = ("decode" if s["decode"] else "prefill", what, f"{s['length']:,}", s["kv"], row["who"])
        if "why" in row:
            rows.append((*cells, "", f"refused: {row['why'].replace('|', '/')}", ""))
            continue
        rate = f"{row['tflops']:.0f} TFLOP/s" if row["tflops"] else f"{row['tb_s']:.2f} TB/s"
        rows.append((*cells, f"{row['us']:,.1f}", rate, f"{row['fraction']:.0%}"))
    return table("| | shape | tokens | KV | who | us | rate | of the card |", rows, above)


def soak() -> str:
    found = newest("soak_h200")
    marks = sorted({int(mark) for rates in found["tflops"].values() for mark in rates})
    rows = [(name, *(f"{rates[str(m)]:.0f}" if str(m) in rates else "" for m in marks)) for name, rates in found["tflops"].items()]
    return table(f"| TFLOP/s until | {' | '.join(f'{m} ms' for m in marks)} |", rows, f"{taken(found, 'torch')}.")


def mixed() -> str:
    found = newest("mixed_backends_h200")
    above = (
        f"{taken(found)}: tiny-hybrid, bf16, {found['rows'][0]['positions']:,} "
        f"positions of text it was not trained on; {found['rounds']} rounds."
    )
    rows = []
    for row in found["rows"]:
        speeds = (f"{row[key]['median']:,.0f}" for key in ("prefill_tok_s", "decode_tok_s"))
        flipped = (str(row[f"flipped_from_{other}"]) for other in ("f32", "default"))
        rows.append((row["sliding"], row["global"], *speeds, *flipped))
    head = "| sliding | global | prefill tok/s | decode tok/s | greedy tokens unlike f32's | unlike the first row's |"
    return table(head, rows, above)


def cpu() -> str:
    found = newest("cpu_decode")
    above = (
        f"{found['date']}, commit {found['commit']}, torch {found['torch']}, transformers {found['transformers']}, "
        f"{found['rounds']} rounds."
    )
    rows = []
    for who, speed in found["engines"].items():
        decode = speed["decode_tok_s"]
        spread = f"{decode['min']:.0f} to {decode['max']:.0f}"
        rows.append((who, f"{speed['prefill_tok_s']['median']:,.0f}", f"{decode['median']:.0f}", spread))
    return table("| | prefill tok/s | decode tok/s | decode, slowest to fastest |", rows, above)


def cuda() -> str:
    found = newest("cuda_check_h200")
    worst = max(max(f["max_abs_error"].values()) for f in found["families"])
    held = "all" if all(f["planned"] == f["allocated"] for f in found["families"]) else "not all"
    above = (
        f"{taken(found)}: {len(found['families'])} families, largest difference of a "
        f"logit {worst:.1e}; planned = allocated in {held}."
    )
    rows = []
    for row in found["embedded"]:
        same = f"{row['planned']:,}" if row["planned"] == row["allocated"] else f"{row['planned']:,} / {row['allocated']:,}"
        rows.append((row["dtype"], row["kv"], same, f"{max(0, row['peak'] - row['planned']):,} B", f"{row['ready_s']:.1f} s",
                     f"{row['prefill_tok_s']:,.0f}", f"{row['decode_tok_s']:.0f}"))  # fmt: skip
    head = "| activations | KV | planned = allocated | peak above it | first start, checked | prefill tok/s | decode tok/s |"
    return table(head, rows, above)


def speculation(result: str = "speculation_cpu") -> str:
    found = newest(result)
    above = (
        f"{found['date']}, commit {found['commit']}, {found['machine']}, torch {found['torch']}: {found['model']} in "
        f"{found['dtype']}, {found['rounds']} rounds."
    )
    rows = []
    for row in found["cases"]:
        speeds = (f"{row[f'{which}_tok_s']['median']:,.0f}" for which in ("off", "on"))
        rows.append((row["case"], f"{row['tokens']:,}", *speeds, f"{row['ratio']:.2f}", f"{row['reckoned']:.2f}",
                     f"{row['accepted']} of {row['drafted']}"))  # fmt: skip
    head = "| text | tokens | tok/s without | with drafts | with over without | at fixed costs | drafts accepted |"
    return table(head, rows, above)


def start(result: str = "start_cpu") -> str:
    found = newest(result)
    above = (
        f"{found['date']}, commit {found['commit']}, {found['machine']}, torch {found['torch']}: {found['model']} with "
        f"{found['context']:,} tokens of context{f' in {kv}' if (kv := found.get('kv')) else ''}; medians of "
        f"{len(found['rows']) // 2} starts."
    )
    if "device_used_bytes" in (r := found["rows"][-1]):
        same = "= allocated" if r["planned_bytes"] == r["allocated_bytes"] else f", allocated {r['allocated_bytes']:,}"
        above += (
            f" Planned {same} {r['planned_bytes']:,} bytes, at most {r['peak_bytes'] / r['planned_bytes'] - 1:.2%} more were held; "
            f"with CUDA's own context and libraries the card has {r['device_used_bytes']:,} in use."
        )
    rows = []
    for kind in ("cold", "warm"):
        told = [r for r in found["rows"] if r["caches"] == kind]
        seconds = (f"{median(r[f'{what}_s'] for r in told):.1f} s" for what in ("imported", "ready", "first_token"))
        beside = max(r["beside_model_bytes"] for r in told) / 2**20
        rows.append((kind, *seconds, f"{beside:,.0f} MiB"))
    return table("| caches | imported | ready | first token | host memory beside the model, most |", rows, above)


def tier0() -> str:
    found = newest("tier0_cpu")
    above = (
        f"{found['date']}, {found['model']} with {found['context']:,} tokens of context, torch {found['torch']}, "
        f"Codex {found['codex']['version']}, {found['machine']}."
    )
    rows = []
    for way in ("chat", "codex"):
        for job, row in found[way].items():
            if isinstance(row, dict):
                valid = f"{row['valid']} of {row['answers']}"
                rows.append((way, job, valid, f"{row['median_s']:.2f}", f"{row['least_s']:.2f} to {row['most_s']:.2f}"))
    return table("| by | job | valid | seconds, median | least to most |", rows, above)


def doctor() -> str:
    found = newest("doctor_matrix")
    above = (
        f"{found['date']}, commit {found['commit']}, llama-server {' '.join(found['server'])}: {len(found['cases'])} cases, "
        f"{found['false_fused']} layer kinds called fused that are not."
    )
    rows = []
    for row in found["cases"]:
        truth = "did not start" if row["truth"] is None else both(row["truth"])
        rows.append((row["case"], truth, both(row["verdict"]), row["kv"], ", ".join(row["checks"])))
    return table("| case | truth: sliding, global | verdict: sliding, global | KV type | problems and warnings |", rows, above)


def both(kinds: dict[str, str]) -> str:
    return kinds["sliding"] if kinds["sliding"] == kinds["global"] else f"{kinds['sliding']}, {kinds['global']}"


def probe() -> str:
    found = newest("probe_llamaserver_cpu")
    above = f"{found['date']}, llama-server {found['output']['server']['version']}, {found['machine']}."
    rows = [
        (f"{p['length']:,}", f"{p['ttft_s']:.3g} s", f"{p['prefill_tok_s']:,.0f}", f"{p['decode_tok_s']:,.0f}", p["verdict"])
        for p in found["output"]["points"]
    ]
    return table("| tokens | first token | prefill tok/s | decode tok/s | verdict |", rows, above)


def engine(*models: str) -> str:
    """Rows of `models`, with vLLM's where it ran."""
    found, vllm = newest("engine_h200"), newest("vllm_engine_h200")
    above = (
        f"{taken(found, 'torch', 'transformers')}, llama.cpp {found['llama_cpp']}, vllm {vllm['vllm']}; "
        f"random weights, bf16 cache; products {found['matrix_tflops']:.0f} TFLOP/s, reads {found['read_tb_s']:.2f} TB/s."
    )
    rows = []
    theirs = [r for r in vllm["rows"] if r["streams"] == 1]
    for row in [r for r in found["rows"] + theirs if r["model"] in models]:
        of = ["", ""] if "prefill_of_card" not in row else [f"{row[f'{what}_of_card']:.0%}" for what in ("prefill", "decode")]
        prefill, decode = (row[f"{what}_tok_s"] for what in ("prefill", "decode"))  # None: not measured at that length
        cells = ("" if prefill is None else f"{prefill:,.0f}", of[0], "" if decode is None else f"{decode:.1f}", of[1])
        rows.append((row["model"], row["weights"], row["who"], f"{row['tokens']:,}", *cells))
    return table("| model | weights | | prompt | prefill tok/s | of the card | decode tok/s | of the card |", rows, above)


def prefill_line() -> str:
    found = newest("prefill_line_h200")
    versions = [f"{who} {found[who.replace('.', '_')]}" for who in ("torch", "transformers", "llama.cpp")]
    above = (
        f"{taken(found)}, {', '.join(versions)}: {found['model']}, random weights, "
        f"chunks of {found['chunk']:,}; products {found['matrix_tflops']:.0f} TFLOP/s, reads {found['read_tb_s']:.2f} TB/s."
    )
    for s in found["stopped"]:
        above += f" {s['who']} ends before {s['tokens']:,} tokens: {s['why'].rstrip('.')}."
    by = {(r["who"], r["weights"], r["tokens"]): r for r in found["rows"]}
    engines = list(dict.fromkeys(key[:2] for key in by))
    behind = [f"{r['who']} {r['weights']} {r['decode_tok_s']:.0f} tok/s behind {r['tokens']:,}" for r in found.get("decode", [])]
    above += f" Decode: {', '.join(behind)}." if behind else ""
    rows = []
    for tokens in sorted({key[2] for key in by}):
        cells = [f"{tokens:,}"]
        cells += [f"{by[*engine, tokens]['prefill_tok_s']:,.0f}" if (*engine, tokens) in by else "" for engine in engines]
        for row in (by.get(("headwise", weights, tokens), {}) for weights in ("bf16", "q4_k_m")):
            cells += [f"{row['reckoned_s'] / row['prefill_s']:.0%}" if row else "", f"{row['off']:.2f}" if "off" in row else ""]
        rows.append(cells)
    head = f"| prompt | {' | '.join(' '.join(engine) for engine in engines)} | bf16 of the arithmetic | a doubling over the "
    return table(f"{head}arithmetic's | q4_k_m of the arithmetic | a doubling over the arithmetic's |", rows, above)


def short_prompts() -> str:
    """Milliseconds until the next token; of 26B-A4B also before its experts met 65 and more tokens on the tensor cores."""
    found, before = newest("short_prompts_h200"), newest("short_prompts_before_pairs_h200")
    ms: dict[tuple[str, str], dict[int, str]] = {}
    for result, when in ((before, ", before"), (found, "")):
        for r in result["rows"]:
            ms.setdefault((r["model"], r["weights"] + when), {})[r["tokens"]] = f"{r['recorded_ms'][1]:.1f}"
    lengths = sorted({r["tokens"] for r in found["rows"]})
    rows = [(*key, *(row[n] for n in lengths)) for key, row in sorted(ms.items())]
    above = f"{taken(found, 'torch')}: random weights, replayed; medians of {found['rounds']}."
    return table(f"| model | weights | {' | '.join(f'{n:,} tokens' for n in lengths)} |", rows, above)


def streams() -> str:
    found = newest("streams_h200")
    compared, wrong = (sum(a[what] for a in found["answers"]) for what in ("compared", "wrong"))
    above = (
        f"{taken(found, 'torch')}: prompts of 512 tokens, answers of 64, "
        f"bf16 cache, random weights; of {compared} tokens of tiny-hybrid in shared steps {wrong} are unlike those of the request "
        "alone, near ties aside."
    )
    rows = []
    for r in found["rows"]:
        held = f"{r['planned']:,}" if r["planned"] == r["allocated"] else f"{r['planned']:,} / {r['allocated']:,}"
        rates = (f"{r['prefill_tok_s']:,.0f}", f"{r['decode_tok_s']:,.0f}", f"{r['step_ms']:.1f} ms")
        rows.append((r["model"], r["weights"], str(r["streams"]), *rates, held))
    return table("| model | weights | streams | prefill tok/s | decode tok/s, all | a step | planned = allocated |", rows, above)


def profiles() -> str:
    """Of each run in the file the step and its largest kernels."""
    found = newest("step_profile_h200")
    rows = []
    for run in found["runs"]:
        for r in run["rows"]:
            largest = "; ".join(f"{k['kernel']} {k['launches']:.0f} x {k['us'] / k['launches']:.1f} us" for k in r["kernels"][:4])
            how = f"{run['commit']}{', launches apart' if run['apart'] else ''}"
            rows.append((r["model"], r["weights"], str(r["streams"]), how, f"{r['step_ms']:.2f} ms", largest))
    above = f"{found['runs'][0]['gpu']}, {found['runs'][0]['date']}, torch {found['runs'][0]['torch']}: 512 tokens in each stream."
    return table("| model | weights | streams | commit | a step | its largest kernels, launches and time of one |", rows, above)


def fp8() -> str:
    found = newest("fp8_matmul_h200")
    above = (
        f"{taken(found, 'torch')}: matrices of Gemma 4 31B, out of the cache; reads {found['read_tb_s']:.2f} TB/s. Microseconds."
    )
    by = {(r["shape"], r["N"], r["K"], r["T"], r["who"]): r["us"] for r in found["rows"]}
    whos = ("a scale a row", "rows to e4m3", "a scale for 128", "bf16 cuBLAS")
    rows = []
    for shape in dict.fromkeys(key[:4] for key in by):
        cells = (f"{by[*shape, who]:,.1f}" if (*shape, who) in by else "" for who in whos)
        rows.append((f"{shape[0]}: {shape[1]:,} by {shape[2]:,}", f"{shape[3]:,}", *cells))
    return table(f"| matrix | rows | {' | '.join(whos)} |", rows, above)


def consumer() -> str:
    """One card's code beside the other's; both beside PyTorch's operator in the same run."""
    cards = [newest(f"consumer_cards_{card}_h200") for card in ("sm86", "sm89")]
    most = max(c["shared_bytes"] for c in cards)
    above = f"{taken(cards[0], 'torch')}: {cards[0]['rows'][0]['length']:,} tokens; at most {most:,} bytes of shared memory."
    rows = []
    for each in zip(*(c["rows"] for c in cards), strict=True):
        row = each[0]
        what = f"{row['name']}: {row['head_dim']}, {row['heads']}/{row['kv_heads']} heads"
        what += f", window {row['window']}" if row["window"] else ""
        figures = (f for r in each for f in (f"{r['us']:,.1f}", f"{r['efficient_us'] / r['us']:.2f}"))
        rows.append(("decode" if row["decode"] else "prefill", what, row["kv"], *figures))
    heads = " | ".join(f"as {c['card']}, us | times the speed of memory-efficient" for c in cards)
    return table(f"| | shape | KV | {heads} |", rows, above)


def one_tensor() -> str:
    found = newest("one_tensor_h200")
    above = f"{taken(found, 'torch')}: a global layer of Gemma 4 31B, microseconds; each launch was compared with fp64 first."
    by: dict[tuple[bool, str, int], dict[tuple[str, str], float]] = {}
    for r in found["rows"]:
        by.setdefault((r["decode"], r["kv"], r["length"]), {})[r["layout"], r["backend"]] = r["us"]
    kinds = [(layout, name) for layout in ("v+rotated", "v") for name in ("headwise-hopper", "headwise-triton")]
    rows = [
        ("decode" if decode else "prefill", kv, f"{n:,}", *(f"{us[kind]:,.1f}" if kind in us else "" for kind in kinds))
        for (decode, kv, n), us in by.items()
    ]
    return table(f"| | KV | tokens | {' | '.join(f'{layout}, {name}' for layout, name in kinds)} |", rows, above)


def experts(result: str = "experts_h200") -> str:
    """The fastest launch of each product and number of tokens; bulk copies of weights (a fifth number) were tried, not kept."""
    found = newest(result)
    above = f"{taken(found, 'torch')}: one layer of Gemma 4 26B-A4B, its experts chosen at random; weights not in the cache."
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for row in found["rows"]:
        how, _, product = row["what"].partition(", ")
        key = (f"{how.split()[0]}, {product}" if product else how, row["tokens"])
        if row["how"].count(",") < 4 and row["us"] < best.get(key, row)["us"] + 1e-9:
            best[key] = row
    rows = []
    for (what, tokens), row in best.items():
        rates = (f"{row[name]:{form}}" if name in row else "" for name, form in (("tb_s", ".2f"), ("tflops", ".0f")))
        rows.append((what, f"{tokens:,}" if tokens else "", f"{row['us']:,.1f}", *rates))
    return table("| | tokens | us | TB/s | TFLOP/s |", rows, above)


def experts_fp8() -> str:
    """Both products of a layer together."""
    found = newest("experts_fp8_h200")
    above = (
        f"{taken(found, 'torch')}: gate, up and down of one layer, "
        "experts chosen at random, weights not in the cache. Microseconds."
    )
    forms = {"bf16": "bf16", "row": "a scale a row", "block": "a scale for 128", "row expanded": "a scale a row, expanded before"}
    by: dict[tuple[str, int], dict[str, float]] = {}
    for r in found["rows"]:
        us = by.setdefault((r["shape"], r["tokens"]), {})
        form = f"{r['form']} {r['how']}".strip()
        us[form] = us.get(form, 0.0) + r["us"]
    rows = [(shape, f"{n:,}", *(f"{us[f]:,.1f}" if f in us else "" for f in forms)) for (shape, n), us in by.items()]
    return table(f"| model | tokens | {' | '.join(forms.values())} |", rows, above)


def drawing() -> str:
    """Of the largest vocabulary; `peaked` as models' logits are."""
    found = newest("drawing_h200")
    drawn, differ, wrong = (sum(r[what] for r in found["rows"]) for what in ("drawn", "differ", "wrong"))
    above = (
        f"{taken(found, 'torch', 'triton')}: 262,144 "
        f"logits in bf16 and Gemma's cap, microseconds on the card. Of {drawn:,} tokens {differ} are unlike the operators', which "
        f"sum in another order; {wrong} are wrong."
    )
    some = [r for r in found["rows"] if r["V"] == 262144 and r["logits"] == "peaked"]
    kinds = list(dict.fromkeys(r["kind"] for r in some))
    us = {(r["rows"], r["kind"]): (r["kernels_us"], r["operators_us"]) for r in some}
    rows = [(str(n), *("{:,.0f} ({:,.0f})".format(*us[n, kind]) for kind in kinds)) for n in dict.fromkeys(r["rows"] for r in some)]
    return table(f"| rows | {' | '.join(kinds)} |", rows, above)


KINDS = {"globals": ("global",), "sliding": ("sliding",), "both": ("global", "sliding")}


def kv_types() -> str:
    found = newest("kv_quality")
    tokens = ", ".join(f"{name}.py {n:,}" for name, n in found["files"].items())
    above = f"{found['date']}, commit {found['commit']}, torch {found['torch']}, Python {found['python']}; tokens: {tokens}."
    rows = []
    for kv in dict.fromkeys(row["global"] for row in found["types"] if row["global"] != "f32"):
        cells = [kv, f"{float(8 * KV_FORMATS[kv.split(',')[0]].bytes_per_value):g}"]
        for kinds in KINDS.values():
            row = next(r for r in found["types"] if all(r[k] == (kv if k in kinds else "f32") for k in ("global", "sliding")))
            cells += [f"{row['kl_mean']:.1e}, {row['kl_p99']:.1e}", f"{row['top1']:.2%}"]
        rows.append(cells)
    columns = " | ".join(f"{kinds}: mean KL, 99 % below | same top token" for kinds in KINDS)
    return table(f"| KV type | bits a value | {columns} |", rows, above)


def kv_one() -> str:
    found = newest("kv_quality")
    difference = found["one_tensor_largest_logit_difference_f32"]
    rows = [
        (r["store"], r["k"], r["v"], f"{r['bytes']:,}", f"{r['kl_mean']:.1e}", f"{r['kl_p99']:.1e}", f"{r['top1']:.2%}")
        for r in sorted(found["one_tensor"], key=lambda r: -r["bytes"])
    ]
    head = "| stored | K | V | bytes a token and KV head | mean KL | 99 % below | same top token |"
    return table(head, rows, f"Largest difference of a logit between one f32 tensor and two: {difference:.1e}.")


def kv_layers() -> str:
    errors: dict[tuple[str, ...], dict[str, float]] = {}
    for r in newest("kv_quality")["layers"]:
        if r["kv"] == "f16" or r["kv"].endswith(" 32"):  # no surprise in either; the result holds them
            continue
        errors.setdefault((r["layer"], r["store"], r["kv"], f"{r['bytes']:,}"), {})[r["data"]] = r["error"]
    rows = [(*what, *(f"{by_data[data]:.1e}" for data in ("plain", "keys", "both"))) for what, by_data in errors.items()]
    return table("| layer | stored | KV type | bytes | plain | keys | both |", rows)


def in_transformers() -> str:
    found = newest("transformers_attention_h200")
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    above = (
        f"{taken(found)}, {versions}: six layers of Gemma 4 31B's shape, bf16; decode "
        f"of one sequence. Error against eager in fp32: sdpa {found['relative_error']['float32 whole']['sdpa']:.1e}, headwise "
        f"{found['relative_error']['float32 whole']['headwise']:.1e}."
    )
    rows = []
    for length, kinds in found["tokens_per_second"].items():
        for kind, speed in kinds.items():
            if isinstance(speed, dict) and "prefill_tok_s" in speed:
                rates = (speed[f"{what}_tok_s"]["median"] for what in ("prefill", "decode"))
                rows.append((f"{int(length):,}", kind, *(f"{r:,.0f}" for r in rates)))
    return table("| prompt | attention | prefill tok/s | decode tok/s |", rows, above)


def serve_load() -> str:
    results = [newest(name) for name in ("serve_load_cpu", "serve_load_shared_cpu")]
    first = results[0]
    above = (
        f"{first['date']}, commit {first['commit']}, torch {first['torch']}, uvicorn {first['uvicorn']}, {first['machine']}; "
        f"{first['slots']} slots, {first['context']:,} tokens of context, a pool of {first['pool_tokens']:,}."
    )
    rows = []
    for found in results:
        outcomes = found["outcomes"]
        died = sum(seen.get("the engine was killed", 0) for seen in outcomes.values())
        how = "`--deterministic`" if found["deterministic"] else "steps shared, drafts"
        memory, quiet = found["memory"], found["quiet"]
        rows.append((
            how, f"{found['requests']}, {found['seconds']:.0f} s", f"{found['ended']:,}", str(died), str(len(found["kills"])),
            f"{found['compared']:,}", str(quiet["pages_lost"] + quiet["slots_used"]),
            *(f"{memory[who]['grown_mib']:.1f} of {memory[who]['median_mib']:.0f}" for who in ("server", "engine")),
            f"{found['longest_silence_s']:.1f}", str(len(found["violations"])),
        ))  # fmt: skip
    head = (
        "| | clients, time | requests ended | by a killed engine | kills | compared with alone | pages and slots lost | MiB grown: "
        "server | engine | longest silence, s | violations |"
    )
    return table(head, rows, above)


def serve_latency() -> str:
    found = newest("serve_latency_cpu")
    rival = f"; llama-server {found['llama_server']}" if "llama_server" in found else ""
    above = f"{found['date']}, commit {found['commit']}, torch {found['torch']}, {found['machine']}{rival}."
    rivals = list(found["turns"])

    def row(what: str, of: str, cell: Callable[[dict[str, Any]], str], target: str = "") -> tuple[str, ...]:
        return (what, *(cell(found[of][who]) for who in rivals), target)

    prompt, other = (f"{found[of]['headwise']['prompt_tokens']:,.0f} tokens" for of in ("turns", "prefill"))
    rows = [
        row(f"first token, {prompt}", "turns", lambda f: f"{f['turn_1']['median_ms']:,.0f} ms"),
        row("the same in the conversation's second turn", "turns", lambda f: f"{f['turn_2']['median_ms']:,.0f} ms"),
        row("second turn over first", "turns", lambda f: f"{f['ratio']:.1%}", "10%"),
        row("cached of the second turn", "turns", lambda f: f"{f['turn_2_cached_tokens'] / f['turn_2_prompt_tokens']:.1%}"),
        row("a stream alone", "prefill", lambda f: f"{f['alone_tok_s']:.0f} tok/s"),
        row(f"beside a prompt of {other}", "prefill", lambda f: f"{f['during_tok_s']:.1f} tok/s"),
        row("its longest gap meanwhile", "prefill", lambda f: f"{f['longest_gap_ms']:,.0f} ms"),
        row("time of that prefill", "prefill", lambda f: f"{f['prefill_s']:.1f} s"),
        row("between two tokens of one stream", "tokens", lambda f: f"{f['median_ms']:.2f} ms"),
    ]  # fmt: skip
    blank = [""] * (len(rivals) - 1)
    rows.append(("of that, what the library alone does not take", f"{found['tokens']['overhead_ms']:.2f} ms", *blank, "1 ms"))
    cpu = found["tokens"]["cpu_ms"]
    rows.append(("a core's time per token, server's process", f"{cpu['server']:.2f} ms", *blank, ""))
    streams = found["streams"]
    rows.append((f"slowest of {streams['streams']} streams over the median", f"{streams['slowest_of_median']:.0%}", *blank, "50%"))
    rows.append(("first event of a server's first request", f"{found['first_request_ms']:.0f} ms", *blank, "100 ms"))
    for f in found["first"]:
        cell = f"{f['median_ms']:.0f} ms, at most {f['most_ms']:.0f}"
        rows.append((f"first event of a request beside {f['beside']} others", cell, *blank, "100 ms"))
        if "at_once_most_ms" in f:
            cell = f"{f['at_once_median_ms']:.0f} ms, at most {f['at_once_most_ms']:.0f}"
            rows.append((f"first event of {f['beside']} that come in the same instant", cell, *blank, ""))
    return table(f"| | {' | '.join(rivals)} | at most, or least |", rows, above)


def codex() -> str:
    found = newest("codex_cpu")
    above = (
        f"{found['date']}, commit {found['commit']}, Codex {found['codex']}, torch {found['torch']}, {found['machine']}; "
        f"{found['context']:,} tokens of context."
    )
    rows = []
    for name, case in found["cases"].items():
        last = case["attempts"][-1]
        used = last["usage"] or {}
        tokens = (f"{used[key]:,}" if key in used else "" for key in ("input_tokens", "cached_input_tokens", "output_tokens"))
        tries = f"{len(case['attempts'])}" if case["passed"] else f"none of {len(case['attempts'])}"
        rows.append((name, tries, f"{last['seconds']:.1f}", str(last["requests"]), *tokens))
    return table("| | attempt that passed | its seconds | requests | tokens read | of them cached | written |", rows, above)


TABLES = {
    "codex": ("docs/clients/codex.md", codex),
    "serve-load": ("docs/measurements.md", serve_load),
    "serve-latency": ("docs/measurements.md", serve_latency),
    "transformers": ("docs/transformers.md", in_transformers),
    "kv-types": ("docs/kv-quality.md", kv_types),
    "kv-one": ("docs/kv-quality.md", kv_one),
    "kv-layers": ("docs/kv-quality.md", kv_layers),
    "engine-31b": ("docs/measurements.md", partial(engine, "gemma-4-31b")),
    "engine": ("docs/measurements.md", partial(engine, "gemma-4-e4b", "llama-3.2-3b")),
    "streams": ("docs/measurements.md", streams),
    "prefill-line": ("docs/measurements.md", prefill_line),
    "engine-moe": ("docs/measurements.md", partial(engine, "gemma-4-26b-a4b")),
    "fp8": ("docs/measurements.md", fp8),
    "profiles": ("docs/measurements.md", profiles),
    "experts": ("docs/measurements.md", experts),
    "experts-arranged": ("docs/measurements.md", partial(experts, "experts_arranged_h200")),
    "experts-fp8": ("docs/measurements.md", experts_fp8),
    "drawing": ("docs/measurements.md", drawing),
    "one-tensor": ("docs/kernels.md", one_tensor),
    "consumer": ("docs/kernels.md", consumer),
    "matrix": ("docs/doctor.md", doctor),
    "probe": ("docs/probe.md", probe),
    "cpu": ("docs/measurements.md", cpu),
    "speculation": ("docs/measurements.md", speculation),
    "start": ("docs/measurements.md", start),
    "speculation-cuda": ("docs/measurements.md", partial(speculation, "speculation_h200")),
    "start-cuda": ("docs/measurements.md", partial(start, "start_h200")),
    "cuda": ("docs/measurements.md", cuda),
    "attention": ("docs/kernels.md", attention),
    "soak": ("docs/kernels.md", soak),
    "short-prompts": ("docs/measurements.md", short_prompts),
    "mixed": ("docs/kernels.md", mixed),
    "converter": ("docs/llamacpp.md", converter),
    "tier0": ("docs/tier0.md", tier0),
}


def marked(text: str, name: str, table: str) -> str:
    """`text` with the table between its marks."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)"
    return re.sub(pattern, lambda m: m[1] + table + m[2], text, flags=re.DOTALL)


if __name__ == "__main__":
    for name, (page, make) in TABLES.items():
        path = ROOT / page
        path.write_text(marked(path.read_text(), name, make()))
