"""What is said to lie in the caches lies there: rings and pages of numbered tokens, checked after every move."""

from __future__ import annotations

import random
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch

from headwise.cache.storage import LayerCache
from headwise.engine import engine
from headwise.engine.prefixes import Prefixes, keep_after, whole
from headwise.spec import catalogue
from headwise.spec.kv import KV_FORMATS, PAGE_TOKENS
from headwise.spec.layers import LayerSpec

CHUNK, CONTEXT = 32, 640
LAYERS = {x.kind: x for x in catalogue.spec("gemma-4-e2b").kv_layers}


class Caches:
    """One global and one sliding layer whose stored value at a position is the hash of the tokens up to it."""

    def __init__(self, slots: int, pages: int, window: int, n_kept: int, chunk: int | None = None, back: int = CHUNK) -> None:
        from dataclasses import replace

        cpu, f32 = torch.device("cpu"), KV_FORMATS["f32"]
        sliding: LayerSpec = replace(LAYERS["sliding"], window=window, head_dim=64, n_kv_heads=1)
        whole_: LayerSpec = replace(LAYERS["global"], head_dim=64, n_kv_heads=1, rope=None, k_eq_v=False)
        self.caches: Mapping[int, LayerCache] = {
            0: LayerCache(sliding, f32, n_tokens=CONTEXT, chunk=CHUNK, device=cpu, rings=slots),
            1: LayerCache(whole_, f32, n_tokens=CONTEXT, chunk=CHUNK, device=cpu, pool_tokens=pages * PAGE_TOKENS),
        }
        self.rings = {window: self.caches[0].n_slots}
        self.copies = {window: min(window + back + 8, self.caches[0].n_slots)}
        self.prefixes = Prefixes(self.caches, self.rings, self.copies, slots=slots, pages=pages, n_kept=n_kept, chunk=chunk)

    def write(self, slot: int, tokens: list[int]) -> None:
        """As a step would: keys first, then the books."""
        held = self.prefixes.slots[slot]
        start = len(held.tokens)
        place = held.place
        values = torch.tensor([float(hash((*held.tokens, *tokens[: i + 1])) % 100_003) for i in range(len(tokens))])
        x = values[:, None, None].expand(-1, 1, 64)
        for cache in self.caches.values():
            cache.write(place, start, x, x, None)
        self.prefixes.wrote(slot, tokens)

    def check(self, slot: int) -> None:
        """Every position that the next token sees holds what its tokens say."""
        held = self.prefixes.slots[slot]
        n = len(held.tokens)
        for cache in self.caches.values():
            first = 0 if cache.window is None else max(0, n - cache.window + 1)
            for position in range(first, n):
                ((at, _, _),) = cache.slots(held.place, position, 1)
                assert float(cache.k.data_SGD[at, 0, 0]) == float(hash(tuple(held.tokens[: position + 1])) % 100_003), position


@pytest.mark.parametrize("chunk", [None, CHUNK])
@pytest.mark.parametrize("back", [5, CHUNK])
@pytest.mark.parametrize(("slots", "pages"), [(3, 30), (3, 13), (1, 10)])
def test_random_conversations_find_what_they_left(slots: int, pages: int, back: int, chunk: int | None) -> None:
    """A wrong prefix hit is the worst of errors: fluent, fast and about another conversation."""
    draw, hits = random.Random(slots * 100 + pages), 0
    c = Caches(slots, pages, window=48, n_kept=slots + 1, chunk=chunk, back=back)
    system = [draw.randrange(9) for _ in range(150)]
    talks = [system + [draw.randrange(100) for _ in range(40)] for _ in range(5)]
    running: list[tuple[int, list[int], int | None]] = []
    for _ in range(120):
        if c.prefixes.free and (not running or draw.random() < 0.5):
            talk = draw.choice(talks)
            prompt = (talk[: draw.randrange(1, len(talk) + 1)] if draw.random() < 0.3 else talk)[: CONTEXT - 80]
            prompt = [*prompt, *(draw.randrange(100) for _ in range(draw.randrange(1, 30)))]
            if not c.prefixes.has_room(len(prompt) + 64):
                continue
            slot, n, parting = c.prefixes.admit(prompt)
            assert n < len(prompt)
            assert c.prefixes.slots[slot].tokens == prompt[:n]
            c.check(slot)
            hits += n
            running.append((slot, prompt, parting))
            continue
        slot, prompt, parting = running.pop(draw.randrange(len(running)))
        n = len(c.prefixes.slots[slot].tokens)
        while n < len(prompt):
            step = prompt[n : n + CHUNK]
            if parting and n < parting:
                step = step[: parting - n]
            assert c.prefixes.grow(slot, n + len(step))
            c.write(slot, step)
            n += len(step)
            if n == parting:
                c.prefixes.keep(slot, parting=True)
        for i in range(draw.randrange(60)):
            assert c.prefixes.grow(slot, n + 1)
            c.write(slot, [draw.randrange(100)])
            n += 1
            if i == keep_after(c.copies) and chunk is None:
                c.prefixes.keep(slot)
        c.check(slot)
        talks[draw.randrange(len(talks))] = list(c.prefixes.slots[slot].tokens)
        c.prefixes.leave(slot)
        assert c.prefixes.counts()["pages_lost"] == 0
    for other, *_ in running:
        c.prefixes.leave(other)
    assert c.prefixes.counts()["slots_used"] == 0
    c.prefixes.pool.share([page for page, users in enumerate(c.prefixes.pool.users) if users][:1])
    assert c.prefixes.counts()["pages_lost"] == 1
    held = {page for x in (*c.prefixes.slots.values(), *c.prefixes.kept) for page in x.pages}
    assert {page for page, users in enumerate(c.prefixes.pool.users) if users} == held
    assert hits > (200 if chunk else 1500)


def test_what_prompts_begin_with_is_computed_twice_and_then_never() -> None:
    """An agent's first 8,000 tokens are alike in every conversation; a ring that has moved on had to compute them each time."""
    c = Caches(2, 20, window=48, n_kept=3)
    system = list(range(200))
    for i, cached in enumerate((0, 0, 192, 192, 192)):
        prompt = [*system, *range(1000 * i + 300, 1000 * i + 420)]
        slot, n, parting = c.prefixes.admit(prompt)
        assert n == cached
        while n < len(prompt):
            stop = min(n + CHUNK, parting if parting and n < parting else len(prompt))
            c.prefixes.grow(slot, stop)
            c.write(slot, prompt[n:stop])
            n = stop
            if n == parting:
                c.prefixes.keep(slot, parting=True)
        c.check(slot)
        c.prefixes.leave(slot)


def test_refused_drafts_have_gone_through_the_ring() -> None:
    rings = {10: 20}

    assert whole(30, 40, rings)  # the window before token 30 begins at 21; slots from 20 on are there
    assert not whole(30, 42, rings)
    c = Caches(1, 10, window=48, n_kept=0)
    slot, *_ = c.prefixes.admit([1, 2, 3])
    c.prefixes.grow(slot, 3)
    c.prefixes.wrote(slot, [1, 2], drafts=7)
    assert c.prefixes.slots[slot].written == 9


@pytest.mark.parametrize(("free_rings", "copies"), [(100.0, 5), (5.0, 5), (2.5, 2), (0.0, 0), (-3.0, 0)])
def test_a_host_with_room_for_some_copies_makes_some(monkeypatch: pytest.MonkeyPatch, free_rings: float, copies: int) -> None:
    """With room for four of five there was none, and every agent's turn was its first."""
    ring = 1 << 30
    monkeypatch.setattr(engine, "cpu_memory", lambda: (1 << 40, engine.CPU_MARGIN_BYTES + int(free_rings * ring)))
    plan = SimpleNamespace(workload=SimpleNamespace(context=4096), copy_bytes=ring, n_copies=5)

    assert engine._copies(SimpleNamespace(plan=plan, runner=SimpleNamespace(rings={256: 776}))) == copies  # type: ignore[arg-type]
