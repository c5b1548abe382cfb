"""The docs say what is: links lead somewhere, generated parts are current, nothing speaks of one machine."""

from __future__ import annotations

import argparse
import html
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import headwise
from headwise import arguments
from headwise.attention.docs import markdown
from headwise.doctor.docs import pages
from headwise.hardware.gpus import GPUS
from headwise.spec.catalogue import specs

ROOT = Path(__file__).parents[2]
# Flags of other programs that the pages speak of.
THEIRS = {"--swa-full", "--fit", "--no-kv-offload", "--output-schema", "--oss", "--local-provider", "--no-show-model-warnings",
          "--yes-always", "--map-tokens", "--no-check-update", "--analytics-disable", "--message"}  # fmt: skip
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tools").rglob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target


def test_the_backends_page_is_current() -> None:
    assert (ROOT / "docs/backends.md").read_text() == markdown()


def test_the_doctors_pages_are_current() -> None:
    made = pages(ROOT / "docs")
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, f"python -m headwise.doctor.docs docs: {path.name}"
    assert {*(ROOT / "docs/checks").glob("*.md")} <= set(made)


def _pictures() -> tuple[dict[str, str], dict[str, str]]:
    """Commands that are drawn, and what the measurements draw."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from make_pictures import PICTURES, drawn
    finally:
        sys.path.pop(0)
    return PICTURES, drawn()


def test_the_readme_table_is_what_the_planner_says() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from make_pictures import table
    finally:
        sys.path.pop(0)
    shown = (ROOT / "README.md").read_text().split("<!-- table -->\n")[1].split("<!-- end table -->")[0]

    assert shown == table() == (ROOT / "docs/gemma4-table.md").read_text()


def test_tables_are_what_the_results_say() -> None:
    """A number in a page that no result holds."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from make_tables import TABLES, marked
    finally:
        sys.path.pop(0)
    for name, (page, make) in TABLES.items():
        text = (ROOT / page).read_text()
        assert f"<!-- {name} -->" in text
        assert marked(text, name, make()) == text, "python docs/make_tables.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_tables_have_one_cell_a_column(page: Path) -> None:
    """A cell left out puts every later number under the wrong head, and the last column reads as empty."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for lines in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, *rows = (len(re.findall(r"(?<!\\)\|", line)) for line in lines.splitlines())
        assert {*rows} == {head}, lines


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_shown_parses(page: Path) -> None:
    """A flag that was renamed stays in the README for years."""
    text = page.read_text()
    lines = [line for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    lines += [code for code in re.findall(r"`(headwise [^`]+)`", text) if "|" not in code and "@VERSION" not in code]
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["headwise"] and words[1:]:
            arguments.parser().parse_args(words[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_script_and_flag_shown_exists(page: Path) -> None:
    """`--max-token` in a text is a reader's wasted minute."""
    text = page.read_text()
    for script in re.findall(r"`(?:python )?((?:benchmarks|docs|tools|tests|headwise)/[\w/.]+\.\w+)", text):
        assert (ROOT / script).exists(), script
    known = {flag for parser in _parsers(arguments.parser()) for action in parser._actions for flag in action.option_strings}
    for span in re.findall(r"`(--[a-z][^`]*)`", text):
        if page.parts[-2] != "tiny_hybrid" and page.name != "tiny-hybrid.md":  # those speak of their scripts' flags
            assert span.split()[0].split("=")[0] in known | THEIRS, span


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.parent in (ROOT, ROOT / "docs") and "```python" in p.read_text()], ids=lambda p: p.name
)
def test_python_shown_runs(page: Path) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)

    assert done.returncode == 0, done.stderr


def test_the_counts_in_the_readme_are_the_tables() -> None:
    text = (ROOT / "README.md").read_text()

    assert re.findall(r"(\d+) cards", text) == [str(len(GPUS))]
    assert re.findall(r"(\d+) models", text) == [str(len(specs()))]


def test_the_readme_quotes_the_benchmark() -> None:
    """A ratio in the README is the newest result's, rounded down: nobody retypes it better."""
    newest = max((ROOT / "benchmarks/results").glob("cpu_decode_*.json"))
    engines = json.loads(newest.read_text())["engines"]
    ours, theirs = engines["headwise"], engines["transformers"]
    text = " ".join((ROOT / "README.md").read_text().split())
    for word in ("decode", "prefill"):
        said = float(re.findall(rf"{word} (\d+\.\d) times", text)[0])
        assert 0 <= ours[f"{word}_tok_s"]["median"] / theirs[f"{word}_tok_s"]["median"] - said < 0.1, word
    cuda = json.loads(max((ROOT / "benchmarks/results").glob("cuda_check_*.json")).read_text())
    (said_cuda,) = re.findall(r"The embedded model decodes at (\d+) tok/s", text)
    assert round(cuda["embedded"][0]["decode_tok_s"]) == int(said_cuda)
    assert max(e["peak"] - e["planned"] for e in cuda["embedded"]) <= 1.0e6  # "up to 1.0 MB above it"
    engine = json.loads(max((ROOT / "benchmarks/results").glob("engine_h200_*.json")).read_text())
    vllm = json.loads(max((ROOT / "benchmarks/results").glob("vllm_engine_h200_*.json")).read_text())
    found = [r for r in engine["rows"] + vllm["rows"] if r["model"] == "gemma-4-31b" and r["tokens"] == 31744]
    rows = {(r["who"], r["weights"]): r for r in found}
    order = (("headwise", "bf16"), ("vLLM", "bf16"), ("transformers", "bf16"), ("headwise", "q4_k_m"), ("llama.cpp", "q4_k_m"),
             ("headwise", "fp8"))  # fmt: skip
    said = re.findall(
        r"31K tokens at ([\d,]+) tok/s \(vLLM ([\d,]+), transformers ([\d,]+)\) and decodes after them at ([\d.]+) \(([\d.]+), "
        r"([\d.]+)\), (\d+) % .*? as they are, ([\d,]+) and ([\d.]+) \(llama.cpp ([\d,]+) and ([\d.]+)\)\. .*? "
        r"In FP8 it is ([\d,]+) and ([\d.]+)\.", text
    )[0]  # fmt: skip
    assert [f"{rows[key]['prefill_tok_s']:,.0f}" for key in order] == [*said[:3], *said[7::2]]
    assert [f"{rows[key]['decode_tok_s']:.1f}" for key in order] == [*said[3:6], *said[8::2]]
    assert f"{100 * rows[order[0]]['decode_of_card']:.0f}" == said[6]
    attention = json.loads(max((ROOT / "benchmarks/results").glob("attention_h200_*.json")).read_text())
    at = {(r["who"], r["shape"]["one"], r["shape"]["kv"]): r for r in attention["rows"]
          if r["shape"]["head_dim"] == 512 and r["shape"]["length"] == 32768 and not r["shape"]["decode"]}  # fmt: skip
    said = re.findall(
        r"run at (\d+) TFLOP/s with one tensor, where ffpa-attn reaches (\d+), vLLM.s branch of flash-attn-4 (\d+), PyTorch.s "
        r"fused operator (\d+) and FlashInfer (\d+); with two tensors at (\d+), ffpa-attn at (\d+)\.", text
    )[0]  # fmt: skip
    who = ("headwise-hopper", "ffpa-attn cutedsl", "vLLM's flash-attn-4", "torch efficient", "flashinfer")
    rates = [round(at[name, one, "bf16"]["tflops"]) for one, names in ((True, who), (False, who[:2])) for name in names]
    assert rates == [int(x) for x in said]
    decode = {r["shape"]["kv"]: r["us"] for r in attention["rows"] if r["shape"]["length"] == 131072 and "headwise" in r["who"]}
    one = {kv: at["headwise-hopper", True, kv]["us"] for kv in ("bf16", "fp8", "q4_0", "q8_0")}
    said = re.findall(r"in fp8 such a prompt takes ([\d.]+) times bf16's time, in q4_0 ([\d.]+), in q8_0 (\d\.\d+)", text)[0]
    assert [f"{one[kv] / one['bf16']:.2f}" for kv in ("fp8", "q4_0", "q8_0")] == list(said)
    assert f"with q8_0 it takes {decode['q8_0'] / decode['bf16']:.2f} of bf16's time" in text
    consumer = [json.loads(max((ROOT / "benchmarks/results").glob(f"consumer_cards_{card}_h200_*.json")).read_text())
                for card in ("sm86", "sm89")]  # fmt: skip
    times = {kv: [r["efficient_us"] / r["us"] for c in consumer for r in c["rows"] if not r["decode"] and r["kv"] == kv]
             for kv in ("bf16", "q8_0")}  # fmt: skip
    said = re.findall(r"prefills ([\d.]+) to ([\d.]+) times .*? over q8_0 ([\d.]+) to ([\d.]+) times", text)[0]
    assert [f"{f(times[kv]):.2f}" if f is min else f"{f(times[kv]):.1f}" for kv in times for f in (min, max)] == list(said)
    assert max(max(f["max_abs_error"].values()) for f in cuda["families"]) < 2e-5
    streams = json.loads(max((ROOT / "benchmarks/results").glob("streams_h200_*.json")).read_text())
    together = {(r["model"], r["streams"]): r["decode_tok_s"] for r in streams["rows"]}
    assert re.findall(r"Sixteen streams of it decode at ([\d,]+) tok/s", text) == [f"{together['gemma-4-31b', 16]:,.0f}"]


def test_explain_quotes_the_benchmark_of_mixed_backends() -> None:
    from headwise.attention.measured import ARRANGEMENTS, POSITIONS, WHERE

    found = json.loads(max((ROOT / "benchmarks/results").glob("mixed_backends_h200_*.json")).read_text())
    rows = [
        (row["sliding"], row["global"], *(round(row[key]["median"]) for key in ("prefill_tok_s", "decode_tok_s")),
         row["flipped_from_default"])
        for row in found["rows"]
    ]  # fmt: skip

    assert rows == [(a.sliding, a.full, a.prefill_tok_s, a.decode_tok_s, a.flipped) for a in ARRANGEMENTS]
    assert found["rows"][0]["positions"] == POSITIONS and found["model"] in WHERE and found["date"] in WHERE
    assert ARRANGEMENTS[0] == max(ARRANGEMENTS, key=lambda a: a.decode_tok_s)  # the default is what measures best


def test_backends_taken_by_name_quote_the_benchmark() -> None:
    """`explain` told rates of two runs ago, and of one whose result nobody had."""
    from headwise.attention.capability import BACKENDS

    found = json.loads(max((ROOT / "benchmarks/results").glob("attention_h200_*.json")).read_text())
    rates = {
        ("causal 256 at 16K" if r["shape"]["window"] is None else "window 1024 at 32K", r["who"]): round(r["tflops"])
        for r in found["rows"]
        if r["shape"]["head_dim"] == 256 and r["shape"]["kv"] == "bf16" and not r["shape"]["decode"]
    }
    names = {"torch-cudnn": "torch cuDNN", "flash-attn-4": "flash-attn-4", "flex-attention": "FlexAttention"}
    words = {b.name: " ".join([b.by_name or "", *(a.why for a in b.ahead)]) for b in BACKENDS}
    said = {name: words for name, words in words.items() if re.search(r"\d (TFLOP|TB)/s", words)}

    assert said.keys() == names.keys()
    for name, words in said.items():
        found = re.findall(r"(\d+) TFLOP/s where headwise-hopper has (\d+) \(([^,]+), one H200\)", words)
        assert len(found) == words.count("TFLOP/s")
        for theirs, ours, where in found:
            assert (int(theirs), int(ours)) == (rates[where, names[name]], rates[where, "headwise-hopper"]), name


def test_the_advice_on_kv_types_follows_from_the_result() -> None:
    """A new measurement that turns the order of the types round must turn the advice too."""
    found = json.loads(max((ROOT / "benchmarks/results").glob("kv_quality_*.json")).read_text())
    both = {r["global"]: r for r in found["types"] if r["global"] == r["sliding"]}
    kl = {kv: row["kl_mean"] for kv, row in both.items()}
    stored = {(r["store"], r["k"], r["v"]): r for r in found["one_tensor"]}
    text = " ".join((ROOT / "docs/kv-quality.md").read_text().split())

    assert "seven times the divergence of a bf16 cache" in text and round(kl["q8_0"] / kl["bf16"]) == 7
    assert "33 times the divergence of q8_0" in text and round(kl["fp8"] / kl["q8_0"]) == 33
    assert "four positions in a hundred" in text and round(100 * (1 - both["q4_0"]["top1"])) == 4
    assert "a fifth off" in text and 0.15 < 1 - kl["q4_0, rotated by 128"] / kl["q4_0"] < 0.25
    assert "two hundred times" in text and round(kl["q4_0, rotated by 128"] / kl["q8_0"], -2) == 200
    one, two = stored["one tensor", "q8_0", "q8_0"], stored["two tensors", "q4_0", "q4_0"]
    assert "one 290th" in text and round(two["kl_mean"] / one["kl_mean"], -1) == 290
    assert f"is {one['bytes']} bytes and q4_0 in two is {two['bytes']}" in text
    assert found["one_tensor_largest_logit_difference_f32"] < 1e-4


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_every_page_can_be_reached_from_the_index(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s#]+)", (ROOT / "docs/index.md").read_text())

    assert page.name in [*links, "index.md", "gemma4-table.md"]


def test_pictures_are_complete_and_made_of_commands_that_parse() -> None:
    made, drawn = _pictures()
    assert {p.stem for p in (ROOT / "docs/img").glob("*.svg")} == {*made, *drawn, "tiny-hybrid-loss"}
    for name, command in made.items():
        arguments.parser().parse_args(command.split()[1:])
        drawn = html.unescape((ROOT / f"docs/img/{name}.svg").read_text()).replace("\xa0", " ")
        assert command in drawn


def test_measurements_are_drawn_from_the_newest_result() -> None:
    for name, picture in _pictures()[1].items():
        assert (ROOT / f"docs/img/{name}.svg").read_text() == picture, "python docs/make_pictures.py"


def test_one_version() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == headwise.__version__


TEXT = {".py", ".md", ".toml", ".sh", ".json", ".jsonl", ".txt", ".jinja", ".svg", ".cfg", ".yml", ""}
# An absolute path of one machine, an address inside one network, a package mirror that only one network has.
PRIVATE = re.compile(
    r"(?<![\w.])/(?:work|root|opt|mnt|workspace|home/(?!me/)\w+)/\w"
    r"|\b(?:10\.\d{1,3}|192\.168|172\.(?:1[6-9]|2\d|3[01]))(?:\.\d{1,3}){2}\b"
    r"|https?://[\w.-]*(?:\.internal|\.local|:8081|artifactory|nexus)\b"
    r"|--(?:extra-)?index-url[= ](?!https://download\.pytorch\.org)"
)


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        return []  # an unpacked archive
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).suffix in TEXT and path.is_file()]


def test_tracked_text_names_no_machine() -> None:
    """A path, an address or a mirror of one machine helps nobody."""
    found = [
        f"{path.relative_to(ROOT)}: {hit[0]}"
        for path in tracked()
        if path != Path(__file__) and (hit := PRIVATE.search(path.read_text(errors="replace")))
    ]
    assert not found


@pytest.mark.parametrize(
    "text",
    ["see /root/notes.md", "in /work/main/x", "http://192.168.0.4/simple", "--index-url http://mirror/simple", "/home/ann/x",
     "https://pkgs.corp.internal/a"],
)  # fmt: skip
def test_a_private_name_is_found(text: str) -> None:
    assert PRIVATE.search(text)


@pytest.mark.parametrize("text", ["a/work/b", "/home/me/models", "10.8 GiB", "https://download.pytorch.org/whl/cu126", "opt/x"])
def test_an_ordinary_text_is_let_through(text: str) -> None:
    assert not PRIVATE.search(text)
