"""Versions of other engines: order, what is read as what, and what is said when nothing is known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.errors import UsageError
from headwise.planner.versions import engine_version, split_engine


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("0.9.6", "0.20.2"),
        ("0.20.2", "0.20.4"),
        ("v0.33.0-rc1", "0.33.0"),
        ("0.33.0-rc1", "0.33.0rc2"),
        ("0.33.0.dev12+gabcdef", "0.33.0-rc0"),
        ("0.20", "0.20.1"),
        ("0.33.0", "0.33.0.post1"),
    ],
)
def test_releases_compare_as_numbers_and_a_candidate_precedes_its_release(earlier, later):
    """Compared as text, 0.9.6 is newer than 0.20.2 and every Ollama of 2025 gets the rules of 2026."""
    assert engine_version("ollama", earlier).before(engine_version("ollama", later))
    assert not engine_version("ollama", later).before(engine_version("ollama", earlier))


def test_a_release_candidate_carries_what_its_release_brought():
    """Reading 0.30.0-rc1 as older than 0.30.0 plans Ollama's own engine for a build that no longer has it."""
    assert engine_version("ollama", "0.30.0-rc1").at_least(0, 30, 0)
    assert not engine_version("ollama", "0.24.0").at_least(0, 30, 0)


def test_builds_and_days_of_llamacpp_are_read_and_do_not_mix():
    """Comparing b8609 with 2026-10-01 by any made-up calendar decides whether head size 512 has a kernel."""
    build, day = engine_version("llama.cpp", "b8609"), engine_version("llama.cpp", "2026-10-01")

    assert build.build == 8609 and day.day == "2026-10-01"
    assert build.before(engine_version("llama.cpp", "8610"))
    assert day.before(engine_version("llama.cpp", "2026-10-02"))
    with pytest.raises(ValueError, match="one is a build"):
        build.before(day)
    with pytest.raises(ValueError, match="different engines"):
        build.before(engine_version("ollama"))


def test_a_known_commit_is_its_day():
    """A commit hash that happens to be printed by --version fell through to "newest"."""
    assert engine_version("llama.cpp", "0c1e57098").day == "2026-10-01"


@pytest.mark.parametrize(
    ("version", "feature", "expected"),
    [
        ("b8608", "head_512_cuda", False),
        ("b8609", "head_512_cuda", True),
        ("2026-04-02", "head_512_cuda", True),
        ("2026-03-15", "head_512_cuda", None),
        ("2025-06-01", "head_512_cuda", False),
        ("b8609", "head_512_metal", None),
        ("b9452", "head_512_metal", True),
        ("b10488", "all_kv_pairs", False),
        ("b10489", "all_kv_pairs", None),
        ("2026-08-31", "all_kv_pairs", False),
        ("2026-09-15", "all_kv_pairs", None),
        ("2026-10-01", "all_kv_pairs", True),
        ("b10488", "quantised_v_forces_fa", None),
        ("2026-10-01", "quantised_v_forces_fa", True),
    ],
)
def test_a_feature_is_there_absent_or_not_established(version, feature, expected):
    """A guess between two known points was printed as fact; None must stay None."""
    assert engine_version("llama.cpp", version).has(feature) is expected


@pytest.mark.parametrize("engine", ["llama.cpp", "ollama", "vllm"])
@pytest.mark.parametrize("text", ["main", "", "latest?", "0..1", "b", "0.5.0?", "9" * 40, "1.2.3.4.5"])
def test_an_unreadable_version_is_the_newest_known_and_says_so(engine, text):
    """`@main` crashed; silently taking the newest would be no better."""
    version, newest = engine_version(engine, text), engine_version(engine)

    assert (version.release, version.build, version.day) == (newest.release, newest.build, newest.day)
    assert "are used" in version.notes[0] and not newest.notes


def test_a_semantic_tag_of_llamacpp_is_not_placed():
    """llama.cpp also has tags like v0.5.0; read as build 5 it had no kernels at all."""
    version = engine_version("llama.cpp", "v0.5.0")

    assert version.day == "2026-10-01" and "v0.5.0" in version.notes[0]


@pytest.mark.parametrize(
    ("engine", "text", "word"),
    [
        ("vllm", "0.40.1", "newer"),
        ("ollama", "1.0", "newer"),
        ("llama.cpp", "2027-01-01", "newer"),
        ("vllm", "0.11.0", "older"),
        ("ollama", "0.3.14", "older"),
    ],
)
def test_a_version_outside_what_was_read_says_so(engine, text, word):
    """vLLM 0.40 may have changed everything; the rules of 0.33 must not pass as its own."""
    assert word in engine_version(engine, text).notes[0]


def test_engine_and_version_come_in_one_word():
    """`explain --engine ollama@0.20.2` names both."""
    assert str(split_engine("ollama@v0.20.2")) == "ollama 0.20.2"
    assert split_engine("vLLM").release == (0, 33, 0)
    with pytest.raises(UsageError, match="unknown engine 'exllama'"):
        split_engine("exllama@1")


@given(engine=st.sampled_from(["llama.cpp", "ollama", "vllm"]), text=st.text(max_size=30))
def test_any_text_is_some_version(engine, text):
    """A version comes from a log or a command line: no text may raise anything."""
    version = engine_version(engine, text)

    assert version.engine == engine
    assert not version.before(version)


@pytest.mark.parametrize(("engine", "text"), [("vllm", "0.33.0"), ("ollama", "v0.33.0"), ("vllm", "0.19.0")])
def test_the_first_and_the_last_version_that_were_read_need_no_note(engine, text):
    """A note on every plan is a note that nobody reads."""
    assert engine_version(engine, text).notes == ()
