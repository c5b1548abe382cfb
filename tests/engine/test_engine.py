"""What is served is what the model says: interleaved, continued, rewound, constrained or cancelled."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from headwise import LLM
from headwise.engine.batch import Run as BatchRun
from headwise.engine.draft import SIZES, Costs
from headwise.engine.engine import Engine
from headwise.engine.measure import allocated_bytes
from headwise.engine.prefixes import BEFORE_TOKENS
from headwise.engine.request import Event, Finish, Grammar, Prefill, Request, Sampling, Token

CONTEXT, CHUNK = 1500, 96
NEVER_END = {1: -100.0, 6: -100.0, 11: -100.0}  # the model's end tokens
TIE = 1e-3  # between two logits that another chunking may exchange


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(context=CONTEXT, slots=3, chunk=CHUNK, device="cpu", check=False)


@pytest.fixture(scope="module")
def alone() -> LLM:
    return LLM(context=CONTEXT, chunk=CHUNK, device="cpu", check=False)


class Free(Costs):
    """Longer steps cost nothing more."""

    def of(self, answers: int) -> list[float]:
        return [1.0] * len(SIZES)


class Run:
    """An engine, and all that it said."""

    def __init__(self, llm: LLM, **how: bool) -> None:
        self.events: list[Event] = []
        self.engine = Engine(llm, self.events.append, **how)

    def submit(self, id_: int, prompt: Sequence[int], client: str = "", **more: object) -> None:
        settings = {k: more.pop(k) for k in list(more) if k not in ("grammar", "top_logprobs")}
        sampling = Sampling(**{"max_tokens": 8, **settings})  # type: ignore[arg-type]
        self.engine.submit(Request(id=id_, prompt=tuple(prompt), sampling=sampling, client=client, **more))  # type: ignore[arg-type]

    def drain(self) -> None:
        while self.engine.busy:
            self.engine.round()

    def tokens(self, id_: int) -> list[int]:
        return [e.token for e in self.events if isinstance(e, Token) and e.request == id_]

    def finish(self, id_: int) -> Finish:
        (found,) = [e for e in self.events if isinstance(e, Finish) and e.request == id_]
        return found


def same(alone: LLM, prompt: list[int], served: list[int]) -> bool:
    """Whether `served` is the greedy answer without an end, up to a tie that rounding may decide."""
    alone.runner.reset()
    x = alone.runner.prefill(prompt)
    for token in served:
        row = alone.runner.logits(x)[0].clone()
        row[list(NEVER_END)] = float("-inf")
        best = int(row.argmax())
        if token != best:
            return float(row[best] - row[token]) < TIE
        x = alone.runner.step([token])
    return True


def test_planned_is_allocated_with_several_slots(llm: LLM) -> None:
    assert llm.plan.total_bytes == allocated_bytes(llm.runner)


def test_interleaved_requests_answer_as_if_alone(llm: LLM, alone: LLM) -> None:
    """State that leaks from one slot into another changes somebody's answer."""
    run = Run(llm)
    draw = random.Random(3)
    prompts = [[2, *(draw.randrange(40, 6000) for _ in range(n))] for n in (700, 1, 97, 300, 5)]
    for i, prompt in enumerate(prompts):
        run.submit(i, prompt, client=str(i), max_tokens=20)
    run.drain()

    for i, prompt in enumerate(prompts):
        assert same(alone, prompt, run.tokens(i)), i
        assert run.finish(i).prompt_tokens == len(prompt)


def test_random_conversations_are_continued_and_rewound_truly(llm: LLM, alone: LLM) -> None:
    """A wrong prefix hit is the worst of errors: fluent, fast and about another conversation."""
    run = Run(llm)
    draw = random.Random(5)
    conversations = [[2, *(draw.randrange(40, 6000) for _ in range(60))] for _ in range(4)]
    hits = 0
    for i in range(16):
        which = draw.randrange(4)
        prompt = conversations[which]
        if draw.random() < 0.3:  # someone edits an earlier message
            prompt = prompt[: draw.randrange(2, len(prompt))]
        prompt = [*prompt, *(draw.randrange(40, 6000) for _ in range(draw.randrange(1, 120)))][: CONTEXT - 20]
        run.submit(i, prompt, client=str(which), max_tokens=draw.choice((8, 60)), logit_bias=NEVER_END)  # 60: rings are kept
        run.drain()
        answer = run.tokens(i)
        assert same(alone, prompt, answer[:8]), (i, run.finish(i))
        conversations[which] = [*prompt, *answer[: draw.choice((60, 3))]]
        hits += run.finish(i).cached_tokens
    assert hits > 1000


def test_the_next_turn_computes_only_what_is_new(llm: LLM) -> None:
    run = Run(llm)
    prompt = [2, *range(100, 900)]
    run.submit(1, prompt)
    run.drain()
    turn = [*prompt, *run.tokens(1), 50, 51, 52]
    run.submit(2, turn)
    run.drain()
    finish = run.finish(2)

    assert finish.cached_tokens == len(prompt) + 7  # the eighth token was said, but never computed
    assert [e.done for e in run.events if isinstance(e, Prefill) and e.request == 2] == [808, len(turn)]


@pytest.mark.parametrize("shorter", [0, BEFORE_TOKENS])
def test_a_turn_that_leaves_a_long_answer_keeps_its_prompt(llm: LLM, alone: LLM, shorter: int) -> None:
    """Thoughts are left out of the next turn's prompt: without kept rings every turn computes all turns again."""
    run = Run(llm)
    prompt = [2, *range(100, 900)]
    run.submit(1, prompt, max_tokens=160, logit_bias=NEVER_END)
    run.drain()
    turn = [*prompt[: len(prompt) - shorter], 50, *run.tokens(1)[60:100], 51, 52]
    run.submit(2, turn)
    run.drain()

    assert run.finish(2).cached_tokens == len(prompt) - shorter
    assert same(alone, turn, run.tokens(2))
    copies = [k.copies for k in run.engine.prefixes.kept]
    assert allocated_bytes(copies) == llm.plan.kv_sliding_bytes // 3 * len(copies)


def test_a_cancelled_request_ends_and_frees_its_slot(llm: LLM) -> None:
    run = Run(llm)
    for i in range(5):
        run.submit(i, [2, *range(50, 400)], max_tokens=400)
    run.engine.round()
    run.engine.cancel(4)  # waits
    run.engine.cancel(1)  # runs
    run.engine.cancel(77)
    for _ in range(20):
        run.engine.round()
    running = {r.request.id for r in run.engine.running}

    assert run.finish(4).reason == run.finish(1).reason == "cancelled"
    assert running == {0, 2, 3}


def test_a_prompt_without_room_is_an_error_of_its_own(llm: LLM) -> None:
    run = Run(llm)
    run.submit(1, [2] * CONTEXT)
    run.submit(2, [2, 50, 51])
    run.drain()

    assert run.finish(1).reason == "error"
    assert run.finish(1).error is not None
    assert str(CONTEXT) in run.finish(1).error[0]  # type: ignore[index]
    assert run.finish(2).reason in ("length", "stop")


def test_the_answer_ends_where_the_context_does(llm: LLM) -> None:
    run = Run(llm)
    run.submit(1, [2] * (CONTEXT - 3), max_tokens=50, logit_bias=NEVER_END)
    run.drain()

    assert (run.finish(1).reason, run.finish(1).tokens) == ("length", 4)  # the last one said is not stored


def test_a_schema_holds_even_when_the_tokens_run_out(llm: LLM) -> None:
    """A small model in a string never closes it: the answer is cut short but whole."""
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"label": {"enum": ["bug", "feature"]}, "why": {"type": "string"}, "n": {"type": "integer"}},
        "required": ["label", "why", "n"],
        "additionalProperties": False,
    }
    run = Run(llm)
    for i, most in enumerate((40, 60, 120, 200)):
        grammar = Grammar("start: %json " + json.dumps(schema | {"x-guidance": {"whitespace_flexible": False}}))
        run.submit(i, [2, *range(60, 90)], grammar=grammar, max_tokens=most, temperature=1.0, seed=i)
    run.drain()

    for i in range(4):
        found = json.loads(llm.tokenizer.decode(run.tokens(i)))
        assert found["label"] in ("bug", "feature")
        assert isinstance(found["n"], int)
        assert run.finish(i).reason == "stop"


def test_a_grammar_that_is_none_ends_its_request_only(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    run = Run(llm)
    run.submit(1, [2, 60], grammar=Grammar("start: nothing"))
    run.submit(2, [2, 61])
    run.drain()

    assert run.finish(1).reason == "error"
    assert run.finish(2).reason in ("length", "stop")


def test_biases_and_penalties_change_the_answer(llm: LLM) -> None:
    run = Run(llm)
    prompt = llm.tokenize("x = [1, 1, 1, 1, 1, 1, 1, 1,")
    run.submit(1, prompt, max_tokens=40)
    run.submit(2, prompt, max_tokens=40, frequency_penalty=2.0, presence_penalty=2.0)
    run.submit(3, prompt, max_tokens=5, logit_bias={77: 1000.0})
    run.drain()

    assert len(set(run.tokens(2))) > len(set(run.tokens(1)))
    assert run.tokens(3) == [77] * 5


def test_logprobs_are_of_the_model_not_of_the_sampler(llm: LLM, alone: LLM) -> None:
    run = Run(llm)
    prompt = [2, *range(300, 340)]
    run.submit(1, prompt, max_tokens=3, temperature=5.0, seed=1, top_logprobs=4)
    run.drain()
    said = [e for e in run.events if isinstance(e, Token)]
    logprobs = alone.logits([*prompt, *run.tokens(1)]).log_softmax(-1)

    for i, event in enumerate(said):
        row = logprobs[len(prompt) - 1 + i]
        assert event.logprob == pytest.approx(float(row[event.token]), abs=1e-3)
        assert [t for t, _ in event.top] == row.topk(4).indices.tolist()


def test_a_deterministic_answer_does_not_depend_on_what_else_ran(llm: LLM, alone: LLM) -> None:
    """Token for token what `headwise run` says, cold, beside others, and after every kind of prefix hit."""
    run = Run(llm, deterministic=True)
    draw = random.Random(11)
    talks = [[2, *(draw.randrange(40, 6000) for _ in range(n))] for n in (250, 100, 300)]
    sent: dict[int, list[int]] = {}
    for i in range(8):
        which = draw.randrange(3)
        prompt = sent[i] = [*talks[which], *(draw.randrange(40, 6000) for _ in range(draw.randrange(1, 40)))]
        run.submit(i, prompt, client=str(which), max_tokens=6)
        if i % 3 == 2:
            run.drain()
            talks[which] = [*prompt, *run.tokens(i)]
    run.drain()

    for i, prompt in sent.items():
        said = alone.generate(prompt, max_tokens=6, speculate=False).tokens
        assert run.tokens(i) == [t for t in said if t not in run.engine.stop], i
    assert sum(run.finish(i).cached_tokens for i in sent) > 300


def test_a_pool_too_small_for_all_loses_no_answer(alone: LLM) -> None:
    """The youngest gives its pages away in the middle of an answer and goes on where it was."""
    llm = LLM(context=640, slots=3, pool=704, chunk=CHUNK, device="cpu", check=False)
    run = Run(llm)
    draw = random.Random(7)
    prompts = [[2, *(draw.randrange(40, 6000) for _ in range(n))] for n in (240, 200, 170, 500)]
    for i, prompt in enumerate(prompts):
        run.submit(i, prompt, client=str(i), max_tokens=90, logit_bias=NEVER_END)
    waited = 0
    while run.engine.busy:
        run.engine.round()
        waited += any(w.again is not None for w in run.engine.waiting)
    pool = run.engine.prefixes.pool
    held = {page for x in (*run.engine.prefixes.slots.values(), *run.engine.prefixes.kept) for page in x.pages}

    assert waited
    for i, prompt in enumerate(prompts):
        assert same(alone, prompt, run.tokens(i)), i
        assert (run.finish(i).reason, run.finish(i).tokens) == ("length", 90)
    assert {page for page, users in enumerate(pool.users) if users} == held  # none is lost
    assert llm.plan.total_bytes == allocated_bytes(llm.runner)


def test_drafts_say_what_is_said_without_them_and_save_steps(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text that repeats itself: fewer steps, the same tokens; with a seed too."""
    monkeypatch.setattr(llm, "costs", Free())
    prompt = llm.tokenize("def add(a, b):\n    return a + b\n\n\n" * 8)
    for how in ({}, {"temperature": 0.7, "seed": 5}):
        told = {}
        for speculate in (True, False):
            run, steps, lengths = Run(llm, speculate=speculate), 0, set[int]()
            run.submit(1, prompt, max_tokens=60, **how)
            while run.engine.busy:
                run.engine.round()
                lengths |= {1 + len(r.draft) for r in run.engine.running if r.answers}
                steps += 1
            told[speculate] = (run.tokens(1), steps)
            assert (8 in lengths) == speculate, lengths  # the largest, whatever the slots
            finish = run.finish(1)
            assert (finish.drafted >= finish.accepted > 20) if speculate else finish.drafted == finish.accepted == 0

        assert told[True][0] == told[False][0]
        assert told[True][1] < 0.8 * told[False][1]


@pytest.mark.parametrize("speculate", [False, True])
def test_steps_launched_ahead_say_what_steps_say_that_wait(llm: LLM, monkeypatch: pytest.MonkeyPatch, speculate: bool) -> None:
    """The step behind an end token, a cancelled request's or a full slot's: its tokens are nobody's, its slot somebody's soon."""
    ahead = 0
    real = llm.runner.run

    def counted(runs: Sequence[Any], ids: Any = None) -> Any:
        nonlocal ahead
        ahead += ids is not None
        return real(runs, ids)

    monkeypatch.setattr(llm.runner, "run", counted)
    draw = random.Random(8)
    prompts = [[2, *(draw.randrange(40, 6000) for _ in range(n))] for n in (40, 130, 3, 64, 200)]
    prompts.append(llm.tokenize("def add(a, b):\n    return a + b\n\n\n" * 6))
    told = {}
    for early in (False, True):
        run = Run(llm, ahead=early, speculate=speculate)
        for i, prompt in enumerate(prompts):
            run.submit(i, prompt, max_tokens=(30, 7, 30, 1, 2, 40)[i], temperature=float(i % 2), top_k=40 * (i % 3 == 1), seed=i)
        run.drain()
        assert run.engine.prefixes.counts()["pages_lost"] == 0
        told[early] = [run.tokens(i) for i in range(6)]
        run.submit(6, [*prompts[0], *told[early][0], 77], max_tokens=9)  # goes on from what its slot holds
        run.drain()
        told[early] += [run.tokens(6), [run.finish(6).cached_tokens > 40]]

    assert told[True] == told[False]
    assert ahead > 20


def test_a_request_cancelled_with_a_step_on_its_way_leaves_its_slot_as_it_says(llm: LLM, alone: LLM) -> None:
    run = Run(llm, ahead=True, speculate=False)
    prompt = [2, *range(100, 300)]
    run.submit(0, prompt, max_tokens=200)
    while len(run.tokens(0)) < 60:
        run.engine.round()
    assert run.engine._flight is not None
    run.engine.cancel(0)
    said = run.tokens(0)
    held = max(run.engine.prefixes.slots.values(), key=lambda held: len(held.tokens))
    assert held.written == len(held.tokens) + 1
    run.submit(1, [*prompt, *said[:50], 5, 6, 7], max_tokens=20, logit_bias=NEVER_END)
    run.drain()

    assert run.finish(0).reason == "cancelled" and run.finish(0).tokens == len(said) == len(run.tokens(0))
    assert run.finish(1).cached_tokens >= len(prompt)
    assert same(alone, [*prompt, *said[:50], 5, 6, 7], run.tokens(1))


def test_ids_of_the_device_are_one_for_each_run(llm: LLM) -> None:
    """One for two runs would be taken as padding: the same token for both."""
    places = [held.place for held in Run(llm).engine.prefixes.slots.values()]
    for runs in ([BatchRun(place, 0, [0]) for place in places[:2]], [BatchRun(places[0], 0, [0, 0])]):
        with pytest.raises(ValueError, match="one for each run"):
            llm.runner.run(runs, torch.zeros(1, dtype=torch.int64))


def test_an_end_token_ends_its_answer_with_a_step_on_its_way(llm: LLM) -> None:
    prompts = [[2, *range(100 * i, 100 * i + 60)] for i in (3, 4)]
    whole = Run(llm, ahead=True)
    for i, prompt in enumerate(prompts):
        whole.submit(i, prompt, max_tokens=30)
    whole.drain()
    said = [whole.tokens(i) for i in range(2)]
    run = Run(llm, ahead=True)
    end = next(token for token in said[0][8:] if token not in said[0][:8] and token not in said[1])
    run.engine.stop = frozenset({end})
    for i, prompt in enumerate(prompts):
        run.submit(i, prompt, max_tokens=30)
    run.drain()

    assert run.tokens(0) == said[0][: said[0].index(end)] and run.finish(0).reason == "stop" and run.finish(0).end == end
    assert run.tokens(1) == said[1] and run.finish(1).reason == "length"


def test_answers_of_a_step_are_tried_as_far_as_each_other(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """One repeats itself and the other does not: what stands behind the other's next token is nobody's guess, and never said."""
    monkeypatch.setattr(llm, "costs", Free())
    prompts = [llm.tokenize("def add(a, b):\n    return a + b\n\n\n" * 8), llm.tokenize("import os\n")]
    shapes: set[tuple[int, ...]] = set()
    real = llm.runner.run

    def run_and_look(runs: Sequence[Any], *ids: Any) -> Any:
        shapes.add(tuple(r.n for r in runs if r.answers))
        return real(runs, *ids)

    monkeypatch.setattr(llm.runner, "run", run_and_look)
    told = {}
    for speculate in (True, False):
        run = Run(llm, speculate=speculate)
        for i, prompt in enumerate(prompts):
            run.submit(i, prompt, max_tokens=50)
        while run.engine.busy:
            run.engine.round()
        told[speculate] = [run.tokens(i) for i in range(2)]
        assert run.finish(1).drafted < 50

    assert told[True] == told[False]
    assert all(len(set(shape)) <= 1 for shape in shapes), shapes
    assert any(len(shape) == 2 and shape[0] > 1 for shape in shapes), shapes
