"""Any JSON under any key gives a ModelSpec or a SpecError, soon and in little memory."""

import copy
import json
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_hf import CONFIGS
from test_hf_published import PUBLISHED

from headwise.errors import SpecError
from headwise.spec.hf import spec_from_config
from headwise.spec.layers import ModelSpec
from headwise.spec.tensors import weight_tensors

ALL = CONFIGS | PUBLISHED
WORDS = [
    "full_attention", "sliding_attention", "llama3", "yarn", "linear", "proportional", "default", "silu", "gelu_pytorch_tanh",
    "LLLG", "all", "vision", "mxfp4", "awq", "gemma4", "0", "05", "3", "text_config", "rope_theta", "factor", "head_dim",
    *sorted({key for config in CONFIGS.values() for key in config}),
]  # fmt: skip
NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, -1, 4096, 4097, 16_384, 2**31 - 1, 2**31, 2**63, -(2**63), 10**40]),
    st.integers(-3, 300),
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 1e-300, 1e30, 1e300, float("inf"), float("-inf"), float("nan")]),
)
LEAVES = st.none() | st.booleans() | NUMBERS | st.sampled_from(WORDS) | st.text(max_size=8)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=4), inner, max_size=4),
)


def places(config: dict[str, Any]) -> list[tuple[str, ...]]:
    """Every key of `config` and of the objects in it."""
    found: list[tuple[str, ...]] = []
    for key, value in config.items():
        found.append((key,))
        if isinstance(value, dict):
            found += [(key, *rest) for rest in places(value)]
    return found


def changed(config: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    inner: Any = config
    for key in place[:-1]:
        inner = inner.get(key) if isinstance(inner, dict) else None
    if isinstance(inner, dict):
        inner[place[-1]] = value
    return config


@st.composite
def damaged(draw: st.DrawFn) -> dict[str, Any]:
    config = ALL[draw(st.sampled_from(sorted(ALL)))]
    known = places(config)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(known) | st.sampled_from(WORDS).map(lambda word: (word,)))
        config = changed(config, place, draw(VALUES))
    return config


def check(config: dict[str, Any]) -> None:
    tracemalloc.start()
    start = time.perf_counter()
    try:
        spec = spec_from_config(config, name="m")
    except SpecError as error:
        assert error.what and error.why and error.do
        assert len(error.what) < 250
        return
    finally:
        seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert seconds < 5 and peak < 64 * 2**20, (seconds, peak)
    assert isinstance(spec, ModelSpec)
    assert all(tensor.n_elements > 0 for tensor in weight_tensors(spec))
    for layer in spec.layers:
        assert layer.group * layer.n_kv_heads == layer.n_heads and layer.head_dim % 2 == 0
        assert layer.rope is None or len(layer.rope.inv_freq) == layer.head_dim // 2
        assert layer.kv_source is None or (layer.kv_source < layer.index and spec.layers[layer.kv_source].kind == layer.kind)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(damaged())
def test_any_json_under_any_key_is_a_spec_or_an_error_of_ours(config: dict[str, Any]) -> None:
    """Each traceback that a damaged file gave was a field that nobody had thought of."""
    check(json.loads(json.dumps(config)))


@pytest.mark.parametrize("value", [None, True, -1, 0, 2**63, 1e30, float("nan"), "x", [], {}, [[0]], {"0": 0}, 10**4000], ids=repr)
@pytest.mark.parametrize("name", ALL)
def test_each_key_in_turn_with_each_kind_of_value(name: str, value: object) -> None:
    """Random search misses the one key that is read without a check."""
    for place in places(ALL[name]):
        check(changed(ALL[name], place, value))


@pytest.mark.parametrize(("n_sizes", "accepted"), [(64, True), (65, False), (4096, False)])
def test_the_largest_model_that_is_accepted_is_small_to_describe(n_sizes: int, accepted: bool) -> None:
    """4,096 layers, each with a head size of its own up to 16,384, are 800 MB of frequencies from a file of 200 kB."""
    sizes = {str(i): {"head_dim": 16_384 - 2 * (i % n_sizes)} for i in range(4096)}
    text = PUBLISHED["gemma-4-31b"]["text_config"] | {"num_hidden_layers": 4096, "layer_types": None, "per_layer_config": sizes}

    check(text)
    if accepted:
        assert len(spec_from_config(text, name="m").layers) == 4096
    else:
        with pytest.raises(SpecError, match=f"{n_sizes} head sizes"):
            spec_from_config(text, name="m")
