"""A row that is ahead in prefill alone takes the prefill, where it is installed, and nothing else.

The library needs a card: a module with its function computes the formula in its place, and counts what it is given.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from attention.test_optional import NEED, ROWS, flash_attn_4_forward, formula, layer
from checkpoints import load
from rich.console import Console
from torch import Tensor

from headwise import api
from headwise.attention import capability, optional, prefill, reference, verify
from headwise.attention.capability import DeviceKind
from headwise.attention.choose import Choice, LayerGroup, choose, choose_layers, forced_backends, group_layers
from headwise.attention.measured import mix_figures
from headwise.attention.prefill import Prefilled, many
from headwise.attention.render import explain_view
from headwise.attention.verify import check_all
from headwise.cache.storage import LayerCache, Place, Scratch, Span, alone
from headwise.cli import main
from headwise.engine import worker
from headwise.engine.batch import Run, Steps
from headwise.engine.stage import attend_functions
from headwise.errors import BackendError, UsageError
from headwise.model.arena import Arena
from headwise.planner.memory import Workload, plan
from headwise.planner.quantise import weight_types
from headwise.spec import catalogue
from headwise.spec.kv import KV_FORMATS, KVFormat
from headwise.spec.layers import Kind, ModelSpec

OURS, THEIRS = ROWS["headwise-hopper"], ROWS["flash-attn-4"]
CAUSAL = replace(NEED, head_dim=256, key_dim=256)
FIGURES = "in steps of more than 1,024 tokens, 665 TFLOP/s where headwise-hopper has 652 (causal 256 at 16K, one H200)"
IN_A_WINDOW = (
    "in steps of more than 1,024 tokens whose keys lie in a row of the ring, as in a prompt's first, 552 TFLOP/s where "
    "headwise-hopper has 509 (window 1024 at 32K, one H200)"
)
CPU = torch.device("cpu")
F16: dict[Kind, KVFormat] = {"global": KV_FORMATS["f16"], "sliding": KV_FORMATS["f16"]}
BF16: dict[Kind, KVFormat] = {"global": KV_FORMATS["bf16"], "sliding": KV_FORMATS["bf16"]}


FEW = 128


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer queries than on a card are many here."""
    monkeypatch.setattr(prefill, "RECORDED_TOKENS", FEW)
    monkeypatch.setattr(verify, "PREFILLED", ((131, 0), (259, 437)))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(queries, keys) of each call of the library's function."""
    found: list[tuple[int, int]] = []

    def forward(q: Tensor, k: Tensor, v: Tensor, **rest: object) -> None:
        found.append((q.shape[1], k.shape[1]))
        flash_attn_4_forward(q, k, v, **rest)  # type: ignore[arg-type]

    stand_in(monkeypatch, forward)
    return found


def stand_in(monkeypatch: pytest.MonkeyPatch, forward: object) -> None:
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["flash_attn.cute.interface"]._flash_attn_fwd = forward  # type: ignore[attr-defined]


@pytest.fixture
def installed_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if this Python had flash-attn-4."""
    monkeypatch.setattr(capability, "here", lambda package: package == "flash-attn-4")
    capability.installed.cache_clear()
    yield
    capability.installed.cache_clear()


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_the_row_that_is_ahead_takes_the_prefill_where_it_is_installed(dtype: str) -> None:
    choice = choose(replace(CAUSAL, kv=dtype, dtype=dtype))
    assert (choice.backend, choice.prefill) == (OURS, THEIRS)
    assert choice.names == "headwise-hopper, prefill by flash-attn-4"
    assert str(choice).splitlines()[:2] == ["headwise-hopper", f"  prefill by flash-attn-4: {FIGURES}"]
    assert "flash-attn-4" not in {r.backend for r in choice.refusals}

    windowed = choose(replace(CAUSAL, kv=dtype, dtype=dtype, window=1024))
    assert (windowed.backend, windowed.prefill, windowed.prefill_reason) == (OURS, THEIRS, IN_A_WINDOW)

    without = choose(replace(CAUSAL, kv=dtype, dtype=dtype, packages=frozenset({"flash-attn"})))
    assert (without.backend, without.prefill) == (OURS, None)
    assert "not flash-attn-4: flash-attn-4 is not installed" in str(without)


@pytest.mark.parametrize(
    ("changes", "backend"),
    [
        ({"window": 512}, "headwise-hopper"),
        ({"window": 4096}, "headwise-hopper"),
        ({"window": 1024, "head_dim": 128, "key_dim": 128}, "headwise-hopper"),
        ({"head_dim": 128, "key_dim": 128}, "headwise-hopper"),
        ({"head_dim": 512, "key_dim": 512}, "headwise-hopper"),
        ({"head_dim": 512, "key_dim": 640}, "headwise-hopper"),
        ({"kv": "fp8"}, "headwise-hopper"),
        ({"kv": "q8_0"}, "headwise-hopper"),
        ({"sinks": True}, "headwise-hopper"),
        ({"softcap": 20.0}, "headwise-triton"),
        ({"kv": "f16"}, "headwise-triton"),
        ({"triton": (3, 7)}, "headwise-triton"),  # nobody measured it against that one
        ({"capability": (8, 9)}, "headwise-triton"),
        ({"capability": (10, 0)}, "headwise-triton"),
    ],
)
def test_it_takes_no_prefill_beyond_what_was_measured(changes: dict[str, object], backend: str) -> None:
    choice = choose(replace(CAUSAL, **changes))  # type: ignore[arg-type]

    assert (choice.backend.name, choice.prefill) == (backend, None)
    assert "flash-attn-4" in {r.backend for r in choice.refusals}


def test_a_row_that_is_named_runs_its_layers_by_itself() -> None:
    ours, theirs, other = (choose(CAUSAL, forced=name) for name in ("headwise-hopper", "flash-attn-4", "headwise-triton"))

    assert (ours.backend, ours.prefill) == (OURS, None)
    assert "not flash-attn-4: not chosen: headwise-hopper is forced" in str(ours)
    assert (theirs.backend, theirs.prefill) == (THEIRS, None)
    assert (other.backend.name, other.prefill) == ("headwise-triton", None)


@pytest.mark.parametrize(("model", "reasons"), [("gemma-3-12b", (IN_A_WINDOW, FIGURES)), ("gemma-4-31b", (IN_A_WINDOW, None))])
def test_layers_with_another_prefill_are_a_group_of_their_own_and_are_shown(model: str, reasons: tuple[str, str | None]) -> None:
    """Gemma 4's globals keep our kernel alone, Gemma 3's have windowed layers' head size."""
    spec = catalogue.spec(model)
    device = DeviceKind("cuda", (9, 0), "H200", packages=frozenset({"flash-attn-4"}))
    choices = choose_layers(spec, kv=BF16, dtype="bf16", device=device)
    groups = group_layers(spec, choices, BF16)
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(explain_view(spec, choices, groups, device.label))
    layers = api.explain_json(spec, choices)["layers"]

    said = " ".join(console.export_text().split())
    by_kind = {layer.window is None: c.prefill for layer, c in zip(spec.layers, choices, strict=True)}
    assert by_kind == {False: THEIRS, True: reasons[1] and THEIRS}
    assert [g.choice.prefill_reason for g in groups] == list(reasons)
    assert all(f"headwise-hopper prefill by flash-attn-4: {why} not" in said for why in reasons if why)
    assert isinstance(layers, list)
    assert [(x["prefill"], x["prefill_reason"]) for x in (layers[0], layers[5])] == [(w and "flash-attn-4", w) for w in reasons]
    assert mix_figures(spec, choices) is None  # no such arrangement was measured
    forced = choose_layers(spec, kv=BF16, dtype="bf16", device=device, forced=forced_backends("headwise-hopper"))
    assert not any(c.prefill for c in forced)


def explained(capsys: pytest.CaptureFixture[str]) -> set[str | None]:
    main(["explain", "gemma-3-12b", "--gpu", "h200", "--json"])
    return {layer["prefill"] for layer in json.loads(capsys.readouterr().out)["layers"]}


def test_another_machine_s_card_is_not_given_what_is_not_installed_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert explained(capsys) == {None}


@pytest.mark.usefixtures("installed_here")
def test_a_card_is_explained_with_what_is_installed_here(capsys: pytest.CaptureFixture[str]) -> None:
    """And planned so: the bytes are the same, as neither row needs room for a result."""
    assert explained(capsys) == {"flash-attn-4"}
    spec, kind = catalogue.spec("gemma-3-12b"), DeviceKind("cuda", (9, 0))
    asked = {"context": 8192, "slots": 1, "chunk": 512, "kv": {"global": None, "sliding": None}, "dtype": None}
    both, ours = (api.work_on(spec, [kind], **asked, forced=forced)[0] for forced in ({}, forced_backends("headwise-hopper")))  # type: ignore[arg-type]
    assert both == ours
    assert both.fused


def steps(runs: list[Run]) -> list[Span]:
    """What attention is told of each part of a step, as the engine makes it."""
    one = replace(layer(256, None), index=0)
    spec = ModelSpec(
        name="one", family="one", layers=(one,), vocab_size=8, hidden=256, max_context=1024, rms_eps=1e-6, norms="pre", tied=True
    )
    w = Workload(context=512, slots=3, chunk=256, kv=F16, dtype="f16", cpu=True, reads=frozenset({"slots"}))
    p = plan(spec, weight_types(spec, "bf16"), w)
    made = Steps(p, Arena(p.stages[0].buffers, CPU), CPU, fused=True)
    made.fill(runs)
    return [part.span for part in made.step(runs).parts]


def prompt(start: int, n: int, *pages: tuple[int, int]) -> Run:
    return Run(Place(0, pages or None), start, [0] * n)


ANSWER = Run(Place(1, ((20, 1),)), 9, [0], 1)


@pytest.mark.parametrize(
    ("runs", "taken"),
    [
        ([prompt(0, FEW + 1)], [True]),
        ([prompt(0, FEW)], [False]),
        ([prompt(70, 200, (3, 5))], [True]),
        ([prompt(70, 200, (3, 2), (9, 3))], [False]),  # pages apart
        ([prompt(0, 129, (0, 3)), prompt(0, 127, (9, 2))], [False]),  # two sequences in one launch
        ([ANSWER, prompt(70, 200, (3, 5))], [False, True]),
        ([ANSWER], [False]),
        ([prompt(0, 8)._replace(wanted=8)], [False]),  # drafts
    ],
)
def test_spans_of_many_queries_of_one_sequence_in_a_row_go_to_the_row_that_is_ahead(runs: list[Run], taken: list[bool]) -> None:
    cache = LayerCache(layer(256, None), KV_FORMATS["f16"], n_tokens=512, chunk=256, device=CPU)
    went: list[str] = []
    both = Prefilled(lambda *_, **__: went.append("own"), lambda *_, **__: went.append("ahead"))
    q = torch.empty(0)
    spans = steps(runs)
    for span in spans:
        both(q, cache, span)

    assert [many(cache, span) for span in spans] == taken
    assert went == ["ahead" if t else "own" for t in taken]


@pytest.mark.parametrize(
    ("start", "n", "taken"),
    [
        (0, FEW + 1, True),
        (0, FEW, False),
        (0, 256, True),
        (72, 256, True),  # up to the ring's last slot
        (73, 256, False),
        (328 + 63, 256, True),  # from its first one on, the second time round
        (328 + 62, 256, False),
    ],
)
def test_in_a_window_keys_that_lie_in_a_row_of_the_ring_go_to_the_row_that_is_ahead(
    calls: list[tuple[int, int]], start: int, n: int, taken: bool
) -> None:
    """Wherever the ring is cut, and whoever's it is, the answer is the formula's."""
    one = layer(256, 64)
    cache = LayerCache(one, KV_FORMATS["f16"], n_tokens=2048, chunk=256, device=CPU, rings=3)
    assert cache.n_slots == 328
    torch.manual_seed(0)
    k, v = (torch.randn(start + n, 2, 256).half() for _ in range(2))
    place = Place(ring=2)
    for at in range(0, start + n, 41):
        cache.write(place, at, k[at : at + 41], v[at : at + 41], None)
    span = Span(start, n, None, alone(n, start + n, 64, CPU), place)
    q, out = torch.randn(n, 6, 256).half(), torch.full((n, 6, 256), float("nan")).half()
    own: list[Span] = []
    both = Prefilled(lambda q, cache, span, **_: own.append(span), partial(optional.attend, THEIRS.name))
    both(q, cache, span, scale=0.1, scratch=Scratch(None, None, None, None, 1), out_THD=out)

    first = max(0, start - 63)
    assert (calls, bool(own)) == ([(n, start + n - first)] if taken else [], not taken)
    if taken:
        torch.testing.assert_close(out, formula(q, k[first:], v[first:], 0.1, 63, 0.0)[0])


def test_a_span_is_read_where_it_lies_and_written_where_it_is_wanted(calls: list[tuple[int, int]]) -> None:
    """Keys of a sequence that begins in the fourth page, into a part of the step's result; nothing beside it is touched."""
    one = layer(256, None)
    cache = LayerCache(one, KV_FORMATS["f16"], n_tokens=512, chunk=512, device=CPU)
    torch.manual_seed(0)
    k, v = (torch.randn(270, 2, 256).half() for _ in range(2))
    (span,) = steps([prompt(70, 200, (3, 5))])
    cache.write(span.place, 0, k, v, None)
    q, out = torch.randn(200, 6, 256).half(), torch.full((203, 6, 256), 7.0).half()
    functions = attend_functions([Choice(ROWS["reference"], (), THEIRS)])
    functions[0](q, cache, span, scale=0.1, scratch=Scratch(None, None, None, None, 1), out_THD=out[1:201])

    assert calls == [(200, 270)]
    torch.testing.assert_close(out[1:201], formula(q, k, v, 0.1, -1, 0.0)[0])
    assert bool((out[:1] == 7).all()) and bool((out[201:] == 7).all())


def test_a_layer_with_sinks_is_scaled_by_the_log_sum_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call that writes into its argument gives none: a named row with sinks must take the other."""
    stand_in(monkeypatch, None)
    asked: list[bool] = []

    def call(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> tuple[Tensor, Tensor]:
        asked.append(True)
        return formula(q, k, v, scale, -1, 0.0)

    monkeypatch.setitem(optional.CALLS, "flash-attn-4", call)
    cache = LayerCache(layer(256, None), KV_FORMATS["f16"], n_tokens=64, chunk=64, device=CPU)
    q, out = torch.randn(5, 6, 256).half(), torch.empty(5, 6, 256).half()
    scratch = Scratch(None, None, None, None, 1)
    optional.attend("flash-attn-4", q, cache, Span(0, 5), scale=0.1, sinks_H=torch.zeros(6), scratch=scratch, out_THD=out)

    assert asked == [True]


def checked(own: object = None, file: Path | None = None, window: int | None = None) -> tuple[list[str], bool]:
    """The self-check of a layer that two rows run; the formula stands in for our kernel."""
    group = LayerGroup((0,), layer(256, window), "f16", Choice(OURS, (), THEIRS))
    attend = Prefilled(own or partial(reference.attend_cache, OURS.name), partial(optional.attend, THEIRS.name))  # type: ignore[arg-type]
    found, cached = check_all([group], {0: attend}, chunk=512, dtype=torch.float16, device=CPU, cache_file=file)
    assert all(c.ok for c in found)
    return [f"{c.backend} {c.phase} {c.length}" for c in found], cached


@pytest.mark.parametrize(("window", "keys", "ours"), [(None, 696, 8), (300, 558, 10)])
def test_the_self_check_runs_both_rows(calls: list[tuple[int, int]], window: int | None, keys: int, ours: int) -> None:
    """Ours with few queries and many, as those of several sequences come to it too; theirs from the number on that it will get."""
    found, _ = checked(window=window)

    assert calls == [(131, 131), (259, keys)]
    assert [x for x in found if x.startswith("flash-attn-4")] == ["flash-attn-4 prefill 131", "flash-attn-4 prefill 696"]
    assert len([x for x in found if x.startswith("headwise-hopper")]) == ours


def test_a_wrong_row_of_the_two_stops_the_start_with_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(q: Tensor, k: Tensor, v: Tensor, *, out: Tensor, **rest: object) -> None:
        flash_attn_4_forward(q, k, v, out=out, **rest)  # type: ignore[arg-type]
        out.copy_(out.roll(1, 1))

    stand_in(monkeypatch, shifted)
    with pytest.raises(BackendError, match="flash-attn-4 gives wrong results") as caught:
        checked()
    assert caught.value.do == "--backend global=headwise-hopper takes no other row for prefill"

    stand_in(monkeypatch, flash_attn_4_forward)

    def spoiled(*args: object, out_THD: Tensor, **rest: object) -> None:
        reference.attend_cache(OURS.name, *args, out_THD=out_THD, **rest)  # type: ignore[arg-type]
        if len(out_THD) > 7:
            out_THD.mul_(1.1)

    with pytest.raises(BackendError, match="headwise-hopper gives wrong results"):
        checked(spoiled)


def test_a_library_that_does_not_run_stops_the_start_with_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version has another signature, or its compiler is missing."""

    def other(q: Tensor, k: Tensor, v: Tensor) -> None: ...

    stand_in(monkeypatch, other)
    with pytest.raises(BackendError, match="flash-attn-4 does not run on this machine") as caught:
        checked()
    assert "unexpected keyword argument" in caught.value.why
    assert caught.value.do.startswith("--backend global=headwise-hopper ")


@pytest.mark.usefixtures("calls")
def test_another_version_of_the_library_is_checked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "checks.json"
    monkeypatch.setattr("headwise.attention.verify.here", lambda package: package == "flash-attn-4")
    for version, cached in (("4.0.0b36", False), ("4.0.0b36", True), ("4.0.0b37", False)):
        monkeypatch.setattr("headwise.attention.verify.metadata.version", lambda package, version=version: version)
        assert checked(file=file)[1] is cached


def test_what_the_library_compiles_is_kept_where_the_user_has_not_said_otherwise(tmp_path: Path) -> None:
    """Its own default is a folder under /tmp, which another user may have made."""
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    optional.keep_compiled(env)
    folder = tmp_path / "headwise" / "flash-attn-4"
    assert folder.is_dir()
    names = ("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")
    assert [env[name] for name in names] == ["1", str(folder)]

    said = {"XDG_CACHE_HOME": str(tmp_path), names[0]: "0", names[1]: "/elsewhere"}
    optional.keep_compiled(said)
    assert [said[name] for name in names] == ["0", "/elsewhere"]

    (tmp_path / "file").touch()
    nowhere = {"XDG_CACHE_HOME": str(tmp_path / "file")}
    optional.keep_compiled(nowhere)
    assert nowhere.keys() == {"XDG_CACHE_HOME"}


def test_a_deterministic_server_runs_one_row_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which pages a prompt gets depends on what else runs, so its rounding would."""
    plain = api.choose_layers

    def ahead(spec: ModelSpec, **rest: object) -> tuple[Choice, ...]:
        return tuple(replace(c, prefill=THEIRS) for c in plain(spec, **rest))  # type: ignore[arg-type]

    monkeypatch.setattr(api, "choose_layers", ahead)
    monkeypatch.setattr("headwise.engine.llm.RECORDED_TOKENS", 64)
    long: dict[str, Any] = {"chunk": 65}
    assert all(c.prefill for c in load("gemma3", load=False, **long).choices)
    alone = load("gemma3", load=False, deterministic=True, **long).choices
    assert not any(c.prefill for c in alone)
    assert "not flash-attn-4: what it gets depends on where keys lie" in str(alone[0])
    short = load("gemma3", load=False, chunk=64).choices
    assert not any(c.prefill for c in short)
    assert "not flash-attn-4: steps of 64 tokens at most (--ubatch)" in str(short[0])


def test_a_deterministic_server_s_model_is_loaded_so(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, object] = {}

    def llm(model: str | None, **settings: object) -> None:
        told.update(settings)
        raise UsageError("no model", why="a test", do="nothing")

    monkeypatch.setattr("headwise.engine.llm.LLM", llm)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    worker.main(SimpleNamespace(send=lambda _: None), None, None, {"context": 64, "deterministic": True, "speculate": False})  # type: ignore[arg-type]

    assert told.keys() == {"context", "deterministic", "progress"}
