"""text/tokenizer.py against the library and transformers, from both file formats, on text chosen to break it."""

from __future__ import annotations

import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as Rust
from tokenizers.models import BPE
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from vocabularies import BYTE, CONTROL, NORMAL, ODD_TEXTS, UNKNOWN, USER_DEFINED, Pair

from headwise.errors import HeadwiseError, SpecError, UsageError
from headwise.text.from_gguf import vocabulary_from_gguf
from headwise.text.splits import SPLITS
from headwise.text.template import render_chat
from headwise.text.tokenizer import Tokenizer, read_tokenizer

Both = tuple[Tokenizer, Tokenizer]
CONTROL_PARTS = [
    "<",
    "|",
    ">",
    "/",
    "s",
    "<s>",
    "</s>",
    "<|im_end|>",
    "<|turn>",
    "<turn|>",
    "<|channel>",
    "<think>",
    "x",
    " ",
]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40)
TRICKY_TEXT = st.lists(st.sampled_from([*CONTROL_PARTS, "\n", "\r\n", "  ", "é", "e\u0301", "日本", "😀", "1", "<0x0A>"])).map(
    "".join
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def made(**fields: Any) -> Tokenizer:
    """A tokenizer from tokenizer.ggml.* fields, without a file."""
    return Tokenizer(vocabulary_from_gguf({f"tokenizer.ggml.{key}": value for key, value in fields.items()}))


def byte_level_fields(**changes: Any) -> dict[str, Any]:
    tokens = ["<s>", "</s>", *"abcd", "ab", "abc"]
    fields = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": [3, 3, 1, 1, 1, 1, 1, 1]}
    return {**fields, "merges": ["a b", "ab c"], "bos_token_id": 0, "eos_token_id": 1, **changes}


def sentencepiece_fields(pieces: dict[str, float], **changes: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *pieces]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces)]
    return {
        "model": "llama", "tokens": tokens, "token_type": types, "scores": [0.0] * 259 + [*pieces.values()],
        "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_space_prefix": False, **changes,
    }  # fmt: skip


# ids


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_both_formats_give_the_ids_of_the_library(pair: Pair, both: Both, text: str):
    """A GGUF vocabulary rebuilt with another split or merge order feeds the model ids it was not trained on."""
    expected = pair.rust.encode(text, add_special_tokens=False).ids

    for tokenizer in both:
        assert tokenizer.encode(text, add_bos=False, parse_special=True) == expected


@given(text=ANY_TEXT | TRICKY_TEXT)
@settings(max_examples=60, deadline=None)
def test_any_text_has_the_same_ids_in_both_formats_and_comes_back(pair: Pair, both: Both, text: str):
    """Plain text is what users send; whatever it is, no format may lose or change a character of it."""
    from_hf, from_gguf = both

    ids = from_hf.encode(text, add_bos=False)

    assert from_gguf.encode(text, add_bos=False) == ids
    if not pair.composes:
        assert from_hf.decode(ids) == from_gguf.decode(ids) == text


def test_ids_and_bos_are_those_of_transformers(pair: Pair, both: Both):
    """transformers adds BOS by flag or by post-processor; reading only one of them drops Llama's BOS."""
    theirs = transformers.AutoTokenizer.from_pretrained(pair.directory)

    for text in ODD_TEXTS:
        assert both[0].encode(text, parse_special=True) == theirs(text)["input_ids"]


@pytest.mark.parametrize("name", sorted(GGUF_PRE_TOKENIZER_SPLITS))
def test_the_splits_are_transformers_patterns(name: str):
    """One wrong character in a split pattern changes ids only on rare text, such as three digits or a slash."""
    assert SPLITS[name].patterns == (GGUF_PRE_TOKENIZER_SPLITS[name],)


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("llama-bpe", "dc", ["dc"]),  # a token to which no merge leads
        ("tekken", "dc", ["dc"]),
        ("gpt-4o", "dc", ["d", "c"]),
        ("gpt-2", "1212", ["1212"]),
        ("llama-bpe", "1212", ["12", "1", "2"]),  # threes
        ("gpt-4o", "1212", ["12", "1", "2"]),
        ("exaone", "1212", ["1", "2", "1", "2"]),
        ("exaone4", "1212", ["1212"]),
        ("qwen2", "1212", ["1", "2", "1", "2"]),
        ("tekken", "1212", ["1", "2", "1", "2"]),
        ("default", "1212", ["12", "1", "2"]),
        ("tekken", "aB", ["a", "B"]),
        ("qwen2", "aB", ["aB"]),
    ],
)
def test_each_split_cuts_in_its_own_way(pre: str, text: str, expected: list[str]):
    """The families differ in digits, capitals and whole words; with a neighbour's split a model still seems to work."""
    tokens = ["<s>", "</s>", *"abcdB12", "dc", "12", "1212", "aB"]
    fields = byte_level_fields(pre=pre, tokens=tokens, token_type=[3, 3, *[1] * 11], merges=["1 2", "12 12", "a B"])
    tokenizer = made(**fields)

    assert [tokenizer.token(i) for i in tokenizer.encode(text, add_bos=False)] == expected


def greedy_sentencepiece(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE by definition: while any two neighbours join to a piece, join the best, leftmost first."""
    parts = list(text)
    while True:
        joins = [(-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not joins:
            return parts
        _, i = min(joins)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@given(
    joined=st.lists(st.text("abc▁", min_size=2, max_size=4), unique=True, max_size=12),
    text=st.text("abc ", max_size=20),
)
@settings(max_examples=200, deadline=None)
def test_scores_give_the_pieces_of_sentencepiece(joined: list[str], text: str):
    """Merges in vocabulary order instead of score order, or only one split per piece, cut words elsewhere."""
    pieces = [t for t in joined if len(set(t)) == len(t)]  # of repeats the library takes the better cut, not the leftmost
    scores = {t: -float(i) for i, t in enumerate(pieces)} | dict.fromkeys("abc▁", -100.0)
    tokenizer = made(**sentencepiece_fields(scores))

    ids = tokenizer.encode(text, add_bos=False)

    reachable = greedy_sentencepiece(text.replace(" ", "▁"), scores)
    assert [tokenizer.token(i) for i in ids] == reachable


def test_runs_of_spaces_that_are_tokens_stay_whole():
    """Gemma 3 files list runs of spaces as user-defined tokens with real spaces; else code costs more tokens."""
    fields = sentencepiece_fields({"▁": -1.0, "a": -2.0, "▁a": -3.0, "  ": -1000.0, "    ": -1000.0})
    fields["token_type"][-2:] = [USER_DEFINED] * 2
    tokenizer = made(**fields)

    assert [tokenizer.token(i) for i in tokenizer.encode("a     a", add_bos=False)] == ["a", "    ", "▁a"]
    assert tokenizer.decode(tokenizer.encode("a     a")) == "a     a"


def test_of_duplicate_tokens_the_later_is_encoded_and_both_are_decoded():
    """Gemma 4 files hold '#', '//' and '<?' twice; an id without text would print as nothing."""
    tokenizer = made(**byte_level_fields(tokens=["<s>", "</s>", *"abcd", "ab", "a"], merges=["a b"]))

    assert tokenizer.encode("a", add_bos=False) == [7]
    assert tokenizer.decode([2, 7]) == "aa"
    assert tokenizer.vocab_size == 8


# control tokens


def test_text_from_outside_never_becomes_a_control_token(pair: Pair, both: Both):
    """A user who types <|im_end|> would end the turn and speak as the system."""
    for tokenizer in both:
        for token in pair.rust.get_added_tokens_decoder().values():
            for text in (token.content, f"a {token.content} b", token.content * 3):
                ids = tokenizer.encode(text, add_bos=False)

                assert tokenizer.id(token.content) not in ids
                assert tokenizer.decode(ids) == text


@given(parts=st.lists(st.sampled_from(CONTROL_PARTS)))
@settings(max_examples=60, deadline=None)
def test_no_mixture_of_control_token_parts_becomes_one(both: Both, parts: list[str]):
    """A guard that looks for whole tokens once can be passed by nesting them: <|im_<|im_end|>end|>."""
    for tokenizer in both:
        ids = tokenizer.encode("".join(parts), add_bos=False)

        assert not any(tokenizer.is_special(i) for i in ids)
        assert tokenizer.decode(ids) == "".join(parts)


def test_a_rendered_template_holds_control_tokens(pair: Pair, both: Both):
    """Encoded as text, a template's <|turn> is six tokens and the model sees no turn at all."""
    for tokenizer in both:
        for i, token in pair.rust.get_added_tokens_decoder().items():
            assert tokenizer.encode(token.content, add_bos=False, parse_special=True) == [i]


def test_a_visible_control_token_is_the_same_in_both_formats(pairs: dict[str, Pair]):
    """GGUF files mark <|channel> user-defined to make it visible; taken at their word, users could type it."""
    from_hf, from_gguf = read_tokenizer(pairs["gemma4"].directory), read_tokenizer(pairs["gemma4"].gguf)

    for tokenizer in (from_hf, from_gguf):
        channel = tokenizer.id("<|channel>")
        assert channel is not None
        assert channel not in tokenizer.encode("<|channel>")
        assert tokenizer.decode([channel]) == ""
        assert tokenizer.decode([channel], skip_special=False) == "<|channel>"


@pytest.mark.parametrize("kind", ["hf", "gguf", "gguf scores"])
def test_merges_that_spell_a_control_token_do_not_make_it(tmp_path: Path, kind: str):
    """Llama 2 has the pieces '</' and 's>': its merges turn a typed </s> into the end of the sequence."""
    pieces = ["<", "/", "s", ">", "</", "s>", "a"]
    merges = [("<", "/"), ("s", ">"), ("</", "s>")]
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *pieces]
    if kind == "hf":
        rust = Rust(BPE({t: i for i, t in enumerate(tokens)}, merges, byte_fallback=True, unk_token="<unk>"))
        rust.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens[:3]])
        rust.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        rust.save(str(tmp_path / "tokenizer.json"))
        tokenizer = read_tokenizer(tmp_path)
    elif kind == "gguf":
        fields = sentencepiece_fields(dict.fromkeys(pieces, 0.0), model="gemma4", merges=[" ".join(m) for m in merges])
        tokenizer = made(**fields)
    else:
        tokenizer = made(**sentencepiece_fields({t: -float(i) for i, t in enumerate(pieces)}))

    ids = tokenizer.encode("a</s>a", add_bos=False)

    assert 2 not in ids
    assert tokenizer.decode(ids) == "a</s>a"


class SlowSwitch:
    """The library's tokenizer, with time for another thread between its switch and its encoding."""

    def __init__(self, rust: Rust) -> None:
        self.__dict__["rust"] = rust

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.__dict__["rust"], name, value)
        time.sleep(0.001)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["rust"], name)


def test_two_threads_may_encode_at_once(pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch):
    """The library's switch for special tokens is shared: one request's template would let another's text inject."""
    tokenizer = read_tokenizer(pairs["gpt-2"].gguf)
    monkeypatch.setattr(tokenizer, "_rust", SlowSwitch(pairs["gpt-2"].rust))
    asked = [True, False] * 50

    with ThreadPoolExecutor(4) as pool:
        ids = pool.map(lambda special: tokenizer.encode("<|im_end|>", add_bos=False, parse_special=special), asked)

    assert [len(one) == 1 for one in ids] == asked


# beginning and end


def test_bos_is_added_once():
    """A template that writes <bos> and an encoder that adds it give two; Gemma's answers get worse."""
    tokenizer = made(**byte_level_fields(add_bos_token=True))

    assert tokenizer.encode("ab") == [0, 6]
    assert tokenizer.encode("<s>ab", parse_special=True) == [0, 6]
    assert tokenizer.encode("ab", add_bos=False) == [6]
    assert tokenizer.encode("") == [0]


@pytest.mark.parametrize(("pre", "add_bos"), [("llama-bpe", True), ("tekken", True), ("qwen2", False), ("gpt-4o", False)])
def test_without_a_flag_the_split_decides_about_bos(pre: str, add_bos: bool):
    """Llama 3 files made before the flag existed need BOS; Qwen has none."""
    assert made(**byte_level_fields(pre=pre)).add_bos is add_bos


def test_a_file_flag_against_bos_wins():
    """Reading the default instead of the flag gives such a model a token it never saw."""
    assert made(**byte_level_fields(pre="llama-bpe", add_bos_token=False)).encode("ab") == [6]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["<turn|>", "<|tool_response>", "<|tool_call>"], {"<turn|>", "<|tool_response>"}),
        (["<|end|>", "<|return|>", "<|call|>", "<|start|>"], {"<|return|>", "<|call|>"}),
        (["<|end|>", "<|user|>"], {"<|end|>"}),
        (["<|im_start|>", "<|im_end|>", "<|endoftext|>"], {"<|im_end|>", "<|endoftext|>"}),
        (["[|endofturn|]", "[|user|]"], {"[|endofturn|]"}),
        (["<start_of_turn>", "<end_of_turn>"], {"<end_of_turn>"}),
    ],
)
@pytest.mark.parametrize("mark", [CONTROL, USER_DEFINED, NORMAL])
def test_every_end_of_a_turn_ends_generation(names: list[str], expected: set[str], mark: int):
    """A file names one eos; the model ends its turn with another and talks on to itself."""
    fields = byte_level_fields()
    fields["tokens"] += names
    fields["token_type"] += [mark] * len(names)
    tokenizer = made(**fields)

    assert {tokenizer.token(i) for i in tokenizer.eos_ids} == {"</s>"} | expected


def test_the_ends_of_generation_config_count(tmp_path: Path, pairs: dict[str, Pair]):
    """Gemma 3's tokenizer_config names <eos>; only generation_config.json knows <end_of_turn>."""
    pairs["gpt-2"].rust.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 11}))

    assert read_tokenizer(tmp_path).eos_ids == {7, 9, 2}  # and <|im_end|>


def test_saved_training_settings_neither_cut_nor_fill_a_prompt(tmp_path: Path, pairs: dict[str, Pair]):
    """tokenizer.json may hold truncation to 512 and padding; a long prompt would lose its end without a word."""
    rust = Rust.from_file(str(pairs["gpt-2"].directory / "tokenizer.json"))
    rust.enable_truncation(3)
    rust.enable_padding(length=8)
    rust.save(str(tmp_path / "tokenizer.json"))

    assert read_tokenizer(tmp_path).encode("a b c d e f") == pairs["gpt-2"].rust.encode("a b c d e f").ids


# decoding


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_stream_gives_the_text_of_the_whole(both: Both, data: st.DataObject):
    """Half characters, byte tokens and the first space all cross the borders of tokens."""
    for tokenizer in both:
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=30))
        skip = data.draw(st.booleans())
        stream = tokenizer.stream(skip_special=skip)

        parts = [stream.push(i) for i in ids]

        assert "".join(parts) + stream.flush() == tokenizer.decode(ids, skip_special=skip)


@given(text=ANY_TEXT | TRICKY_TEXT)
@settings(max_examples=60, deadline=None)
def test_a_stream_never_shows_half_a_character(both: Both, text: str):
    """An emoji in four byte tokens would flicker as four replacement characters in the client."""
    for tokenizer in both:
        stream = tokenizer.stream()
        shown = ""
        for i in tokenizer.encode(text, add_bos=False):
            shown += stream.push(i)
            assert tokenizer.decode(tokenizer.encode(text, add_bos=False)).startswith(shown)
        assert stream.flush() == ""


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_decoding_is_the_librarys(pair: Pair, both: Both, data: st.DataObject):
    """Our own decoder must not drift from the one every other runtime uses."""
    byte_level = both[0].token_bytes(5) != b"\x05" and "▁" not in str(pair.rust.decoder)
    ids = data.draw(st.lists(st.integers(0, both[0].vocab_size - 1), max_size=20))
    if not byte_level:  # there the library spoils a whole run of byte tokens for one broken character
        ids = [i for i in ids if not both[0].token(i).startswith("<0x")]

    for tokenizer in both:
        assert tokenizer.decode(ids) == pair.rust.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special=False) == pair.rust.decode(ids, skip_special_tokens=False)


def test_a_broken_character_does_not_spoil_its_neighbours(pairs: dict[str, Pair]):
    """The library turns byte tokens for '日' plus one stray byte into four replacement characters."""
    tokenizer = read_tokenizer(pairs["gemma4"].gguf)
    ids = [tokenizer.id(f"<0x{byte:02X}>") or -1 for byte in [*"日".encode(), 0xFF]]

    assert tokenizer.decode(ids) == "日\ufffd"


def test_a_continued_text_keeps_its_first_space(pairs: dict[str, Pair]):
    """'The capital of France is' + '▁Paris' must not print as 'isParis'."""
    tokenizer = read_tokenizer(pairs["llama"].gguf)
    ids = tokenizer.encode("dog", add_bos=False)

    assert tokenizer.decode(ids) == "dog"
    assert tokenizer.stream(continues=True).push(*ids) == " dog"


def test_an_id_past_the_vocabulary_is_no_text(both: Both):
    """Embeddings are padded to a round number of rows, and a random or broken model samples them."""
    assert both[0].decode([both[0].vocab_size, 10**9]) == both[1].decode([both[1].vocab_size]) == ""


# errors


@pytest.mark.parametrize("text", ["\ud800", "abc\udfff", "\ude00\ud83d"])
def test_half_a_surrogate_pair_is_refused_with_its_place(both: Both, text: str):
    """JSON may carry half an emoji; the library answers 'TextInputSequence must be str'."""
    for tokenizer in both:
        with pytest.raises(UsageError, match="not valid Unicode") as caught:
            tokenizer.encode(text)
        place = next(i for i, character in enumerate(text) if 0xD800 <= ord(character) < 0xE000)
        assert f"at character {place}" in caught.value.why


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": None}, "tokenizer.ggml.model is missing"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"model": "t5"}, "'t5'"),
        ({"pre": "no-such-split"}, "'no-such-split'"),
        ({"pre": None}, "tokenizer.ggml.pre"),
        ({"token_type": [3, 3]}, "2 entries for 8 tokens"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["a b", "a x"]}, "`x` out of vocabulary"),
        ({"merges": ["b c"]}, "`bc` out of vocabulary"),
        ({"merges": ["ab"]}, "merge 0 is 'ab'"),
        ({"merges": 7}, "not an array"),
        ({"merges": [1, 2]}, "holds int"),
        ({"tokens": "abc"}, "not an array"),
        ({"bos_token_id": 8}, "bos_token_id = 8, and there are 8 tokens"),
        ({"eos_token_id": -1}, "eos_token_id = -1"),
        ({"bos_token_id": None, "add_bos_token": True}, "bos_token_id is missing"),
        ({"model": "llama", "scores": [0.0]}, "1 entries for 8 tokens"),
        ({"model": "llama"}, "tokenizer.ggml.scores is missing"),
    ],
)
def test_a_damaged_gguf_vocabulary_is_named(changes: dict[str, Any], named: str):
    """A Python traceback, or worse a tokenizer that half works, instead of what is wrong with the file."""
    fields = {key: value for key, value in byte_level_fields(**changes).items() if value is not None}

    with pytest.raises(SpecError) as caught:
        made(**fields)

    assert named in str(caught.value)
    assert caught.value.do


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("tokenizer.json", "{", "tokenizer.json is damaged"),
        ("tokenizer.json", "{}", "tokenizer.json is damaged"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json is damaged"),
        ("tokenizer_config.json", '{"bos_token": "<nope>"}', "'<nope>'"),
        ("tokenizer_config.json", '{"bos_token": {"content": "<nope>"}}', "'<nope>'"),
        ("tokenizer_config.json", '{"add_bos_token": true}', "bos_token is missing"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"3": {"content": "<s>"}}}', "'<s>' is token 0"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "added_tokens_decoder"),
        ("generation_config.json", '{"eos_token_id": 100000}', "100000"),
        ("generation_config.json", '{"eos_token_id": "</s>"}', "'</s>'"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja is damaged"),
        ("special_tokens_map.json", "null", "special_tokens_map.json is damaged"),
    ],
)
def test_a_damaged_directory_is_named(tmp_path: Path, pairs: dict[str, Pair], file: str, content: str | bytes, named: str):
    """A half-finished download must say which file to fetch again."""
    pairs["gpt-2"].rust.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(SpecError) as caught:
        read_tokenizer(tmp_path)

    assert named in str(caught.value)
    assert caught.value.do


def test_a_directory_without_a_tokenizer_says_so(tmp_path: Path):
    """Old repositories ship only tokenizer.model, which is not read."""
    with pytest.raises(HeadwiseError, match="holds no tokeniser"):
        read_tokenizer(tmp_path)

    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(HeadwiseError, match=r"there is tokenizer\.model"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##", "cleanup": True}])
def test_a_decoder_that_is_not_known_is_refused(tmp_path: Path, decoder: dict[str, Any] | None):
    """Decoding it some other way would print text with wrong spaces, silently."""
    state = json.loads(Rust(BPE({"a": 0}, [])).to_str()) | {"decoder": decoder}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))

    with pytest.raises(SpecError, match="joins tokens in a way"):
        read_tokenizer(tmp_path)


# templates


def test_the_chat_template_is_found_where_transformers_finds_it(tmp_path: Path, pairs: dict[str, Pair]):
    """Files disagree after edits; transformers reads chat_template.jinja first."""
    pairs["gpt-2"].rust.save(str(tmp_path / "tokenizer.json"))
    assert read_tokenizer(tmp_path).chat_template is None

    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "config list"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read_tokenizer(tmp_path).chat_template == "config list"

    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert read_tokenizer(tmp_path).chat_template == "json"

    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert read_tokenizer(tmp_path).chat_template == "jinja"


def test_the_gguf_template_is_found():
    """The server would refuse to chat with a model that can."""
    fields = {f"tokenizer.ggml.{key}": value for key, value in byte_level_fields().items()}

    assert Tokenizer(vocabulary_from_gguf(fields | {"tokenizer.chat_template": "x"})).chat_template == "x"


TINY = Path(__file__).parents[2] / "headwise" / "data" / "tiny-hybrid.gguf"


@pytest.mark.skipif(not TINY.exists(), reason="the tiny model is not built")
def test_the_tiny_model_chats():
    """The model that comes with headwise is the first that a newcomer runs."""
    tokenizer = read_tokenizer(TINY)
    bos, turn = tokenizer.token(tokenizer.bos_id or 0), tokenizer.id("<turn|>")

    prompt = render_chat(
        tokenizer.chat_template,
        [{"role": "user", "content": "Hello"}],
        bos_token=bos,
        eos_token=None,
        extra={},
    )
    ids = tokenizer.encode(prompt, parse_special=True)

    assert ids.count(tokenizer.bos_id or 0) == 1
    assert turn in tokenizer.eos_ids
    assert tokenizer.decode(ids, skip_special=False) == prompt == f"{bos}<|turn>user\nHello<turn|>\n<|turn>model\n"
