"""A model shared out over several devices computes what it computes on one, and each holds exactly what was planned for it."""

from __future__ import annotations

import pytest
import tiny
import torch
from checkpoints import load

from headwise import LLM
from headwise.cache.storage import Place
from headwise.engine import devices
from headwise.engine.batch import Run
from headwise.engine.measure import allocated_bytes
from headwise.errors import HeadwiseError, PlanError, UsageError

IDS = list(range(3, 60))
UNEVEN = ["cpu:2GiB", "cpu:4GiB"]


def held_by(llm: LLM) -> list[int]:
    return [allocated_bytes(stage) for stage in llm.runner.stages]


def planned_for(llm: LLM) -> list[int]:
    return [stage.total_bytes for stage in llm.plan.stages]


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("n", [2, 3])
def test_several_stages_give_the_logits_and_tokens_of_one(name: str, n: int) -> None:
    """Hidden states of another chunk, a slice of another layer's embedding, a norm left out at a seam: all show here."""
    one, several = load(name), load(name, device=["cpu"] * n)

    for chunk in (64, 7, 1):
        assert torch.equal(several.logits(IDS, chunk=chunk), one.logits(IDS, chunk=chunk))
    assert several.generate(IDS[:20], max_tokens=9).tokens == one.generate(IDS[:20], max_tokens=9).tokens
    assert len(several.devices) > 1
    assert [i for stage in several.runner.stages for i in stage.layers] == list(range(len(one.spec.layers)))


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("settings", [{"device": ["cpu"] * 3}, {"device": UNEVEN, "context": 77, "chunk": 5, "slots": 2}])
def test_every_stage_holds_what_was_planned_for_it_to_the_byte(name: str, settings: dict[str, object]) -> None:
    llm = load(name, **settings)
    llm.logits(IDS, chunk=5)

    assert held_by(llm) == planned_for(llm)
    assert [d.allocated_bytes for d in llm.report().devices] == planned_for(llm)
    assert all(d.peak_bytes <= d.planned_bytes for d in llm.report().devices)
    assert llm.plan.total_bytes == sum(planned_for(llm))


@pytest.mark.parametrize(("name", "outer"), [("llama", {"embed", "norm"}), ("qwen3", {"norm", "head"})])
def test_a_stage_holds_its_part_alone(name: str, outer: set[str]) -> None:
    """By hand: a tied embedding lies with the first and the last stage, the norm with the last, each cache with its layer."""
    llm = load(name, device=["cpu"] * 2)
    first, last = llm.plan.stages
    names = [set(stage.weights) for stage in llm.runner.stages]

    assert {n for n in names[0] if not n.startswith("layers.")} == {"embed"}
    assert {n for n in names[1] if not n.startswith("layers.")} == outer
    assert {int(n.split(".")[1]) for n in names[0] if n.startswith("layers.")} == set(first.layers)
    assert [set(stage.caches) for stage in llm.runner.stages] == [set(first.layers), set(last.layers)]
    assert [{b.name for b in s.buffers} & {"ids", "logits"} for s in (first, last)] == [{"ids"}, {"logits"}]
    assert first.weights_bytes + last.weights_bytes == load(name).plan.weights_bytes + 320 * 96 * 4 * ("embed" in outer)


def test_more_memory_gets_more_layers() -> None:
    sizes = [len(stage.layers) for stage in load("gemma3", device=UNEVEN).runner.stages]

    assert sizes[0] < sizes[1]


def test_layers_that_read_one_cache_stay_on_one_device() -> None:
    llm = load("gemma4-e2b", device=["cpu"] * 3)
    owners = [{x.kv_source for x in llm.spec.layers if x.index in s.layers} - {None} for s in llm.runner.stages]

    assert sum(map(len, owners)) == 2
    assert all(o <= set(stage.caches) for o, stage in zip(owners, llm.runner.stages, strict=True))


def test_a_device_without_a_layer_is_left_out() -> None:
    """Four layers cannot lie on six devices: the plan says who is left out, and nothing is allocated there."""
    llm = load("qwen3", device=["cpu"] * 6)

    assert 2 <= len(llm.runner.stages) <= 4
    assert len([n for n in llm.plan.notes if "left out" in n]) == 6 - len(llm.runner.stages)
    assert held_by(llm) == planned_for(llm)


def test_sequences_of_a_split_model_do_not_mix() -> None:
    """Two conversations in the same steps, each on its own rings and pages of both stages."""
    llm, alone = load("gemma3", device=["cpu"] * 2, slots=2), load("gemma3")
    prompts = [IDS[:17], IDS[20:50]]
    wanted = [alone.logits(p)[-1] for p in prompts]
    for at in range(30):
        due = [i for i, prompt in enumerate(prompts) if at < len(prompt)]
        x = llm.runner.run([Run(Place(i, ((i, 1),)), at, prompts[i][at : at + 1]) for i in due])
        for row, i in enumerate(due):
            if at == len(prompts[i]) - 1:
                assert (llm.runner.logits(x[row : row + 1])[0] - wanted[i]).abs().max() < 1e-4


@pytest.mark.parametrize("n", [2, 3])
def test_the_embedded_model_runs_over_several(n: int) -> None:
    one = LLM(device="cpu", context=256, chunk=64, check=False)
    several = LLM(device=["cpu"] * n, context=256, chunk=64, check=False)
    ids = one.tokenize("import os\n\n\ndef main(argv: list[str]) -> int:\n    ")

    assert torch.equal(several.logits(ids), one.logits(ids))
    assert several.generate(ids, max_tokens=12).tokens == one.generate(ids, max_tokens=12).tokens
    assert len(several.runner.stages) == n
    assert held_by(several) == planned_for(several)
    assert several.plan.kv_bytes == one.plan.kv_bytes


def test_devices_that_do_not_hold_it_together_are_refused_with_each_ones_numbers() -> None:
    """The process's margin of 512 MiB is half each one's: of 320 and 304 MiB remain 64 and 48, and the model takes 145."""
    with pytest.raises(PlanError, match="does not fit cpu and cpu") as caught:
        LLM(device=["cpu:320MiB", "cpu:304MiB"], context=8192, check=False)

    assert all(words in caught.value.why for words in ("cpu would hold ", "64.0 MiB of 320 MiB", "48.0 MiB of 304 MiB"))
    most = int(caught.value.do.split()[1])
    assert LLM(device=["cpu:320MiB", "cpu:304MiB"], context=most, check=False).plan.max_context == most
    with pytest.raises(PlanError):
        LLM(device=["cpu:320MiB", "cpu:304MiB"], context=most + 1, check=False)


class _Cards:
    """What torch.cuda would say of cards of these free GiB."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *gib: float) -> None:
        for name, value in {
            "is_available": lambda: True,
            "device_count": lambda: len(gib),
            "mem_get_info": lambda d: (int(gib[d.index] * 2**30), int(gib[d.index] * 2**30)),
            "get_device_name": lambda d: "A card",
            "get_device_capability": lambda d: (8, 6),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize(
    ("gib", "used"),
    [
        ((24, 24), ["cuda:0"]),  # the first that holds it
        ((0.7, 24), ["cuda:1"]),
        ((0.81, 0.81, 0.78), ["cuda:0", "cuda:1"]),  # none alone: as few as hold it, the roomiest
        ((0.78, 0.81, 0.81), ["cuda:1", "cuda:2"]),
    ],
)
def test_without_a_word_as_few_cards_as_hold_the_model_are_used(
    gib: tuple[float, ...], used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedded model takes 74 MiB at 8,192 tokens, twice 51 over two cards, beside a margin of 768 MiB each."""
    _Cards(monkeypatch, *gib)
    llm = LLM(context=8192, check=False, load=False)

    assert [str(d) for d in llm.devices] == used
    assert llm.plan.fits


def test_named_cards_are_all_used_within_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    _Cards(monkeypatch, 80, 80)
    llm = LLM(device=["cuda:1:24GiB", "cuda:0:12"], check=False, load=False)

    assert llm.where == "cuda:1 + cuda:0"
    assert [t.total_bytes for t in llm.plan.targets] == [24 * 2**30, 12 * 2**30]
    assert [s.layers for s in llm.plan.stages] == [range(9), range(9, 10)]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["cuda:0", "cuda:0"], "each named once"),
        (["cpu", "cuda:0"], "each named once"),
        ([], "each named once"),
        (["cuda:7"], "PyTorch sees 2"),
        (["cuda:rtx3060"], "cuda:N:12GiB"),
        (["cuda:0:12GB"], "cuda:N:12GiB"),
        ("cpu:1", "unknown device"),
        ("mps", "not supported"),
    ],
)
def test_devices_that_make_no_sense_are_refused_in_words(asked: object, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _Cards(monkeypatch, 80, 80)
    with pytest.raises(UsageError, match=words) as caught:
        devices.seats(asked)  # type: ignore[arg-type]
    assert isinstance(caught.value, HeadwiseError)
