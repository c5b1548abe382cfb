import pytest

from headwise.errors import SpecError
from headwise.spec.config import MAX_INT, Config, shown


def config(**values: object) -> Config:
    return Config(values, where="config.json")


@pytest.mark.parametrize("wrong", [-1, 0, True, 1.0, "3", [3], {}, MAX_INT + 1, 10**4000])
def test_a_count_that_is_no_whole_number_in_range_names_its_key_and_value(wrong: object) -> None:
    """True is an int to Python, and 10**4000 layers are a loop without end."""
    with pytest.raises(SpecError) as caught:
        config(n=wrong).integer("n")

    assert caught.value.what.startswith("config.json: n = ")
    assert len(caught.value.what) < 100
    assert "whole number from 1 to 2147483647" in caught.value.why


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0, 0, False, "1e-6", None])
def test_a_number_that_is_none_or_not_finite_is_refused(wrong: object) -> None:
    """json.loads takes NaN and Infinity, and every comparison with NaN is false."""
    with pytest.raises(SpecError, match="eps"):
        config(eps=wrong).number("eps")


@pytest.mark.parametrize("edge", [1, 7, MAX_INT])
def test_both_edges_of_a_range_are_in_it(edge: int) -> None:
    """An off-by-one at a limit refuses real files."""
    assert config(n=edge).integer("n") == edge
    with pytest.raises(SpecError):
        config(n=8).integer("n", most=7)


def test_null_is_absent_and_takes_the_default() -> None:
    """Hugging Face writes null for "not set"; it must not become a zero."""
    c = config(n=None)

    assert c.integer("n", 5) == 5
    assert c.optional_integer("n") is None
    assert c.optional_number("n") is None
    assert "n" not in c


def test_a_missing_key_points_at_the_nearest_one() -> None:
    """`num_hidden_layer` (a typo) was reported as missing without a hint."""
    with pytest.raises(SpecError, match="nearest key there is 'num_hidden_layer'"):
        config(num_hidden_layer=3).integer("num_hidden_layers")


@pytest.mark.parametrize("read", [Config.integer, Config.number])
def test_a_missing_key_without_a_default_is_an_error(read) -> None:
    """A default that nobody chose is a wrong model."""
    with pytest.raises(SpecError, match="width is missing"):
        read(config(), "width")


def test_a_choice_outside_its_options_is_refused_whatever_its_type() -> None:
    """An unhashable value broke the look-up with a TypeError."""
    for wrong in ("cubic", ["linear"], {"linear": 1}, 3):
        with pytest.raises(SpecError, match="one of linear, yarn"):
            config(kind=wrong).choice("kind", {"yarn": 1, "linear": 2})
    with pytest.raises(SpecError, match="missing"):
        config().choice("kind", ("linear",))
    assert config(kind="yarn").choice("kind", ("linear", "yarn")) == "yarn"


@pytest.mark.parametrize("wrong", [["a"], ["a", "c"], ["a", "b", "a"], "ab", ["a", ["b"]], ["a", None]])
def test_a_list_of_the_wrong_length_or_kind_is_refused(wrong: object) -> None:
    """A layer list one short shifts every layer after it."""
    with pytest.raises(SpecError, match="a list of 2 out of a, b"):
        config(types=wrong).strings("types", options={"a", "b"}, length=2)


@pytest.mark.parametrize("wrong", [[-1], ["2"], [True], 1.5, {"a": 1}, [2**40]])
def test_token_ids_are_small_whole_numbers(wrong: object) -> None:
    """An end token that is no token never ends a reply."""
    with pytest.raises(SpecError, match="eos"):
        config(eos=wrong).ids("eos")


def test_one_token_id_and_a_list_of_them_read_alike() -> None:
    """Both spellings are in published configs."""
    assert config(eos=3).ids("eos") == (3,)
    assert config(eos=[3, 0]).ids("eos") == (3, 0)
    assert config().ids("eos") == ()


@pytest.mark.parametrize("wrong", [1, "true", []])
def test_a_flag_is_true_or_false(wrong: object) -> None:
    """The string "false" is true to Python."""
    with pytest.raises(SpecError, match="true or false"):
        config(tied=wrong).flag("tied")


@pytest.mark.parametrize("wrong", [[], "x", 3])
def test_a_section_is_an_object(wrong: object) -> None:
    """rope_scaling: [] crashed with an AttributeError."""
    with pytest.raises(SpecError, match="an object"):
        config(rope=wrong).section("rope")


def test_only_the_values_with_maths_here_pass() -> None:
    """A value of a key that is read but not built must not pass as if it were the built one."""
    config().only("act", "silu")
    config(act="silu").only("act", "silu", "gelu")
    with pytest.raises(SpecError, match="'silu' or 'gelu'"):
        config(act=["silu"]).only("act", "silu", "gelu")


def test_every_unread_key_is_named_and_each_can_be_ignored() -> None:
    """The advice named one key of three, and the next run failed at the second."""
    c = config(a=1, b=2, c=None, d=4, e=5)
    c.raw("a")

    with pytest.raises(SpecError) as caught:
        c.refuse_unread(harmless=("d",))

    assert caught.value.what == "config.json: key 'b' = 2 is not known"
    assert "also e" in caught.value.why
    assert caught.value.do.startswith("--ignore-key b --ignore-key e ")
    c.refuse_unread(harmless=("d",), ignore=("b", "e"))


def test_a_long_unknown_value_is_shown_short() -> None:
    """One key of an adapter's config printed 40 kB to the terminal."""
    with pytest.raises(SpecError) as caught:
        config(a="x" * 5000).refuse_unread(harmless=())

    assert len(caught.value.what) < 120


def test_the_advice_can_be_pasted_whatever_a_key_is_called() -> None:
    """A config from the Hub could have put a command of its own, or colours, into the line that we tell people to paste."""
    with pytest.raises(SpecError) as caught:
        config(**{"a b": 1, "z; rm -rf ~": 2, "\x1b[31mred": 3, "\ud800": 4}).refuse_unread(harmless=())

    assert "--ignore-key 'a b' " in caught.value.do and "--ignore-key 'z; rm -rf ~' " in caught.value.do
    assert str(caught.value).isascii() and "\x1b" not in str(caught.value)


def test_a_thousand_unknown_keys_are_named_by_twenty() -> None:
    """A dictionary of weights under the name of a config filled the terminal twice."""
    with pytest.raises(SpecError) as caught:
        config(**{f"k{i:04}": i for i in range(1000)}).refuse_unread(harmless=())

    assert caught.value.why.endswith("k0019, ...") and "k0001" in caught.value.why


def test_a_value_nested_deeper_than_python_prints_is_described() -> None:
    """The error about a wrong value was a RecursionError about printing it."""
    value: list[object] = []
    for _ in range(100_000):
        value = [value]

    assert shown(value) == "a list nested without end"
    assert shown("x" * 59) == repr("x" * 59)[:57] + "..." and shown("x" * 58) == repr("x" * 58)


def test_an_ignored_key_is_ignored_in_sections_too() -> None:
    """The message gave --ignore-key for a key of rope_scaling, and the flag changed nothing there."""
    outer = Config({"rope": {"x": 1}}, where="config.json", ignore=("x",))

    outer.section("rope").refuse_unread(harmless=())

    with pytest.raises(SpecError, match=r"config\.json rope: key 'x'"):
        config(rope={"x": 1}).section("rope").refuse_unread(harmless=())
