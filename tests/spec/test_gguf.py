import os
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_bytes import ARRAY, BOOL, F32, I32, STRING, U16, U32, gguf_bytes, small_model, string, tensor
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from headwise.errors import SpecError
from headwise.spec.gguf import GgufArray, GgufFile, read_gguf

ONE = {"general.architecture": (STRING, "llama")}


def refused(path: Path, *words: str) -> SpecError:
    """The SpecError of reading `path`: it names the file, and says why and what to do."""
    with pytest.raises(SpecError) as caught:
        read_gguf(path)
    error = caught.value
    assert error.what and error.why and error.do
    for word in words:
        assert word in str(error)
    return error


def written(tmp_path: Path, raw: bytes, name: str = "m.gguf") -> Path:
    path = tmp_path / name
    path.write_bytes(raw)
    return path


# what a good file says


def test_a_file_from_gguf_py_reads_the_same_as_gguf_py_reads_it(tmp_path):
    """A reader that only agrees with its own writer may have both wrong."""
    path = tmp_path / "m.gguf"
    w = gguf.GGUFWriter(path, "llama")
    w.add_uint8("k.u8", 255)
    w.add_int8("k.i8", -128)
    w.add_uint16("k.u16", 65535)
    w.add_int16("k.i16", -32768)
    w.add_uint32("k.u32", 2**32 - 1)
    w.add_int32("k.i32", -(2**31))
    w.add_float32("k.f32", 0.1)
    w.add_uint64("k.u64", 2**64 - 1)
    w.add_int64("k.i64", -(2**63))
    w.add_float64("k.f64", 0.1)
    w.add_bool("k.yes", True)
    w.add_bool("k.no", False)
    w.add_string("k.text", "naïve ▁ 漢字")
    w.add_array("k.ints", [1, -2, 3])
    w.add_array("k.floats", [0.5, 1.5])
    w.add_array("k.bools", [True, False])
    w.add_array("k.strings", ["", "a", "▁é"])
    w.add_tensor("f32", np.arange(6, dtype=np.float32).reshape(2, 3))
    w.add_tensor("f16", np.arange(7, dtype=np.float16))
    w.add_tensor("i8", np.arange(8, dtype=np.int8).reshape(2, 2, 2))
    w.add_tensor("q8", np.zeros((3, 68), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()

    ours, theirs = read_gguf(path), gguf.GGUFReader(path)

    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert {k: v.read() if isinstance(v, GgufArray) else v for k, v in ours.metadata.items()} == fields
    assert [(t.name, t.shape, t.type.code, t.offset, t.n_bytes) for t in ours.tensors.values()] == [
        (t.name, tuple(int(d) for d in reversed(t.shape)), int(t.tensor_type), t.data_offset, t.n_bytes) for t in theirs.tensors
    ]
    assert ours.version == 3 and ours.data_bytes == 24 + 14 + 8 + 204
    assert ours.tensors["q8"].shape == (3, 64)


@pytest.mark.parametrize("version", [2, 3])
def test_versions_two_and_three_are_read(tmp_path, version):
    """Version 2 has the same layout; refusing it would lose every model from 2023."""
    assert read_gguf(written(tmp_path, gguf_bytes(ONE, version=version))).version == version


def test_an_array_knows_its_length_and_type_before_it_is_read(tmp_path):
    """Decoding every array on opening costs 777,168 strings for a Gemma 4 file."""
    file = read_gguf(written(tmp_path, small_model()))

    tokens, pattern = file.metadata["tokenizer.ggml.tokens"], file.metadata["llama.pattern"]

    assert (len(tokens), tokens.element) == (4, "string")
    assert tokens.read() == ["<s>", "", "é", "▁the"] == list(tokens)
    assert pattern.read() == [True, False, True] and all(isinstance(v, bool) for v in pattern)
    assert file.metadata["empty"].read() == []


def test_token_bytes_that_are_no_utf8_survive(tmp_path):
    """A byte-level vocabulary decoded with replacement maps two tokens to one text."""
    path = written(tmp_path, gguf_bytes({"t": (ARRAY, (STRING, [b"\xff", b"\xfe"]))}))

    tokens = read_gguf(path).metadata["t"].read()

    assert [t.encode("utf-8", "surrogateescape") for t in tokens] == [b"\xff", b"\xfe"]


def test_a_larger_alignment_moves_the_tensors(tmp_path):
    """Taking 32 for granted reads every tensor from the wrong place."""
    raw = gguf_bytes({"general.alignment": (U32, 256)}, [tensor("a", (4,), 0, 256)], bytes(272), alignment=256)

    assert read_gguf(written(tmp_path, raw)).tensors["a"].offset == 256 + 256


def test_no_descriptor_stays_open(tmp_path):
    """A server that opens many models must not run out of descriptors."""
    path = written(tmp_path, small_model())
    before = len(os.listdir("/proc/self/fd"))

    files = [read_gguf(path) for _ in range(5)]
    for file in files:
        file.metadata["tokenizer.ggml.tokens"].read()

    assert len(os.listdir("/proc/self/fd")) == before


def test_an_array_of_a_file_that_changed_is_an_error_not_a_crash(tmp_path):
    """The array is decoded later than the header; the file may be gone or shorter by then."""
    path = written(tmp_path, small_model())
    tokens = read_gguf(path).metadata["tokenizer.ggml.tokens"]

    longer_last = small_model().replace(string("▁the"), struct.pack("<Q", 1 << 40) + "▁the".encode())
    for now in (b"GGUF", longer_last):
        path.write_bytes(now)
        with pytest.raises(SpecError, match="changed"):
            tokens.read()
    path.write_bytes(b"\xff" * 4096)
    with pytest.raises(SpecError, match="changed"):
        tokens.read()
    path.unlink()
    with pytest.raises(SpecError, match="does not exist"):
        tokens.read()


# a large vocabulary


def gemma_sized(path: Path) -> None:
    """262,144 tokens and 514,906 merges of Gemma's lengths."""
    with path.open("wb") as f:
        f.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 4))
        f.write(string("tokenizer.ggml.tokens") + struct.pack("<IIQ", ARRAY, STRING, 262_144))
        f.write(b"".join(struct.pack("<Q", n := 1 + i % 13) + b"a" * n for i in range(262_144)))
        f.write(string("tokenizer.ggml.merges") + struct.pack("<IIQ", ARRAY, STRING, 514_906))
        f.write(b"".join(struct.pack("<Q", n := 3 + i % 11) + b"b" * n for i in range(514_906)))
        f.write(string("tokenizer.ggml.scores") + struct.pack("<IIQ", ARRAY, F32, 262_144) + bytes(4 * 262_144))
        f.write(string("last") + struct.pack("<II", U32, 7))


def test_a_gemma_sized_header_opens_in_half_a_second(tmp_path):
    """gguf-py takes tens of seconds for this header: one numpy array per string."""
    path = tmp_path / "big.gguf"
    gemma_sized(path)

    file, seconds = read_gguf(path), []
    for _ in range(3):
        start = time.perf_counter()
        read_gguf(path)
        seconds.append(time.perf_counter() - start)

    assert file.metadata["last"] == 7
    assert len(file.metadata["tokenizer.ggml.merges"]) == 514_906
    assert min(seconds) < 0.5


def test_a_gemma_sized_header_needs_no_numpy_and_little_memory(tmp_path):
    """The planner runs on a laptop: no torch, no numpy, no copy of the vocabulary."""
    path = tmp_path / "big.gguf"
    gemma_sized(path)
    code = """if True:
        import re, sys
        from headwise.spec.gguf import read_gguf
        file = read_gguf(sys.argv[1])
        assert not {"numpy", "torch", "gguf"} & set(sys.modules), sorted(sys.modules)
        n_tokens = len(file.metadata["tokenizer.ggml.tokens"].read())
        print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1], n_tokens)
    """

    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout

    rss_kib, n_tokens = map(int, out.split())
    assert n_tokens == 262_144
    assert rss_kib < 150 * 1024


# what is not a GGUF file


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "empty"),
        (b"GG", "ends after 2 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 17\n", "git lfs pull"),
        (b"  <!DOCTYPE html><html>", "HTML page"),
        (b"PK\x03\x04" + bytes(60), "zip archive"),
        (struct.pack("<Q", 400) + b'{"__metadata__":{}}', "safetensors"),
        (b'{"error":"not found"}', "JSON"),
        (b"tjgg" + bytes(30), "GGJT"),
        (bytes(4096), "unfinished download"),
        (b"\x1f\x8b\x08" + bytes(30), "gzip"),
        (b"MZ\x90\x00 something else", "not with b'GGUF'"),
    ],
)
def test_another_kind_of_file_is_named(tmp_path, raw, says):
    """ "invalid magic" does not tell a user that the download saved a login page."""
    refused(written(tmp_path, raw), says, str(tmp_path))


def test_paths_that_cannot_be_read_are_spec_errors(tmp_path):
    """A traceback for a typing error in a path."""
    refused(tmp_path / "nothing.gguf", "does not exist")
    refused(tmp_path, "is a directory")
    refused(tmp_path / ("x" * 5000), "cannot be read")
    refused(Path("a\0b"), "cannot be read")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")


def test_a_forbidden_file_is_a_spec_error(tmp_path, monkeypatch):
    """Ollama's service owns its store; another user meets this first."""

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", forbidden)  # root may read everything
    refused(tmp_path / "model.gguf", "may not be read")


def test_a_big_endian_file_is_recognised(tmp_path):
    """Read as little-endian it would be "version 50331648"."""
    refused(written(tmp_path, b"GGUF" + struct.pack(">IQQ", 3, 0, 0)), "big-endian", "gguf-convert-endian")


@pytest.mark.parametrize("version", [0, 1, 4, 2**31])
def test_other_versions_are_refused(tmp_path, version):
    """Version 1 has 32-bit lengths; the same code would read rubbish."""
    refused(written(tmp_path, gguf_bytes(ONE, version=version)), "version")


# a damaged file


def test_a_file_cut_at_any_byte_is_refused_and_says_how_much_is_missing(tmp_path):
    """An interrupted download is the commonest damage of all."""
    whole = small_model()
    file = read_gguf(written(tmp_path, whole))
    data_start = min(t.offset for t in file.tensors.values())

    for n in range(1, len(whole)):
        error = refused(written(tmp_path, whole[:n]), str(tmp_path))
        if n >= data_start:
            assert f"{len(whole) - n} bytes are missing" in str(error)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (gguf_bytes(ONE, n_tensors=2**63), "9223372036854775808 tensors"),
        (gguf_bytes(ONE, n_keys=2**63), "9223372036854775808 keys"),
        (gguf_bytes(ONE, n_tensors=2**64 - 1, n_keys=2**64 - 1), "announces"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63) + bytes(64), "string of 9223372036854775808 bytes"),
        (
            gguf_bytes({"k": (STRING, "v")}).replace(struct.pack("<Q", 1) + b"v", struct.pack("<Q", 99) + b"v"),
            "99 bytes",
        ),
        (gguf_bytes([("k", (U32, 1)), ("k", (U32, 1))]), "twice"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string(b"\xff\xfe") + struct.pack("<II", U32, 1), "no UTF-8"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<IQ", 13, 0), "value type 13"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<IIQ", ARRAY, 77, 1), "element type 77"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1),
            "array of arrays",
        ),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<IIQ", ARRAY, F32, 2**62), "announces"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<IIQ", ARRAY, STRING, 2**61), "announces"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<IIQQQ", ARRAY, STRING, 2, 2**64 - 1, 0),
            "ends at byte",
        ),
        (
            gguf_bytes({"k": (ARRAY, (STRING, ["last"]))}).replace(b"\x04" + bytes(7) + b"last", b"\x40" + bytes(7) + b"last"),
            "ends at",
        ),
        (
            gguf_bytes({"k": (ARRAY, (F32, [0.0]))}).replace(struct.pack("<IQ", F32, 1), struct.pack("<IQ", F32, 99)),
            "99 f32 values",
        ),
        (gguf_bytes({"general.alignment": (U32, 0)}), "general.alignment"),
        (gguf_bytes({"general.alignment": (U32, 48)}), "power of two"),
        (gguf_bytes({"general.alignment": (STRING, "32")}), "power of two"),
        (gguf_bytes({"general.alignment": (BOOL, True)}), "power of two"),
        (gguf_bytes(ONE, [tensor("a", (4,), 0, 0)] * 2, bytes(64)), "twice"),
        (gguf_bytes(ONE, [tensor("a", (4, 0), 0, 0)], bytes(64)), "0 values"),
        (gguf_bytes(ONE, [tensor("a", (2**32, 2**31), 0, 0)], bytes(64)), "values"),
        (gguf_bytes(ONE, [tensor("a", (2**64 - 1,) * 4, 0, 0)], bytes(64)), "values"),
        (gguf_bytes(ONE, [tensor("a", (1,) * 5, 0, 0)], bytes(64)), "5 dims"),
        (gguf_bytes(ONE, [tensor("a", (4,), 5, 0)], bytes(64)), "type 5"),
        (gguf_bytes(ONE, [tensor("a", (4,), 2**31, 0)], bytes(64)), "not known here"),
        (gguf_bytes(ONE, [tensor("a", (257, 256), 12, 0)], bytes(65536)), "rows of 257 values"),
        (gguf_bytes(ONE, [tensor("a", (4,), 0, 4)], bytes(64)), "starts at 4"),
        (gguf_bytes(ONE, [tensor("a", (4,), 0, 2**63)], bytes(64)), "bytes are missing"),
        (gguf_bytes(ONE, [tensor("a", (16,), 0, 0), tensor("b", (16,), 0, 32)], bytes(96)), "overlaps"),
    ],
)
def test_a_damaged_header_is_refused_with_what_is_wrong(tmp_path, raw, says):
    """Each of these once crashed, hung or over-allocated in some GGUF reader."""
    refused(written(tmp_path, raw), says, str(tmp_path))


def outcome(path: Path) -> GgufFile | None:
    """The file and all its arrays, or None for a SpecError; nothing else may happen, in 1 s and 4 MB."""
    tracemalloc.start()
    start = time.perf_counter()
    try:
        file = read_gguf(path)
        for v in file.metadata.values():
            if isinstance(v, GgufArray):
                assert len(v.read()) == len(v)
        return file
    except SpecError as error:
        assert error.what and error.why and error.do
        str(error).encode()  # printable
        return None
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 << 20
        assert time.perf_counter() - start < 1


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(
    st.lists(st.tuples(st.integers(0, len(small_model()) - 1), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, len(small_model())),
)
@example([(7, 3), (4, 0)], len(small_model()))
def test_flipped_bytes_and_cuts_give_a_file_or_a_spec_error(tmp_path, flips, n):
    """One flipped bit in a length must not allocate, loop or raise anything else."""
    raw = bytearray(small_model())
    for at, byte in flips:
        raw[at] = byte

    outcome(written(tmp_path, bytes(raw[:n]) if n % 2 else bytes(raw)))


@FUZZ
@given(st.integers(0, len(small_model()) - 8), st.sampled_from([0, 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1]))
def test_a_huge_number_anywhere_gives_a_file_or_a_spec_error(tmp_path, at, number):
    """Random bytes seldom make 2^63; lengths, counts, dims and offsets must all bear it."""
    raw = bytearray(small_model())
    raw[at : at + 8] = struct.pack("<Q", number)

    outcome(written(tmp_path, bytes(raw)))


@FUZZ
@given(st.binary(max_size=300))
def test_random_bytes_behind_the_magic_give_a_file_or_a_spec_error(tmp_path, tail):
    """The counts come first, so that most of these reach the key reader."""
    outcome(written(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + tail))


# split files


def split(tmp_path: Path, n: int = 3, **changes: int) -> list[Path]:
    paths = []
    for i in range(n):
        keys = {"split.no": (U16, i), "split.count": (U16, n), "split.tensors.count": (I32, changes.get("total", n))}
        raw = gguf_bytes((ONE if i == 0 else {}) | keys, [tensor(f"blk.{i}", (8 + i,), 0, 0)], bytes(4 * (8 + i)))
        paths.append(written(tmp_path, raw, f"big-{i + 1:05d}-of-{n:05d}.gguf"))
    return paths


def test_any_part_of_a_split_file_opens_all_of_it(tmp_path):
    """A planner that sees only the first part calls a 400 GB model 40 GB."""
    paths = split(tmp_path)

    for path in paths:
        file = read_gguf(path)
        assert file.paths == tuple(paths)
        assert [(t.name, t.path, t.n_bytes) for t in file.tensors.values()] == [
            ("blk.0", paths[0], 32), ("blk.1", paths[1], 36), ("blk.2", paths[2], 40),
        ]  # fmt: skip
        assert file.metadata["general.architecture"] == "llama"
        assert file.data_bytes == 32 + 36 + 40


def test_a_missing_part_is_named(tmp_path):
    """The commonest fault of a large download: one part of nine."""
    paths = split(tmp_path)
    paths[1].unlink()
    refused(paths[0], "big-00002-of-00003.gguf", "download the missing parts")


def test_a_renamed_part_is_refused(tmp_path):
    """Without its number in the name the others cannot be found."""
    paths = split(tmp_path)
    refused(paths[0].rename(tmp_path / "model.gguf"), "one part of 3", "--merge")


def test_parts_in_the_wrong_order_are_refused(tmp_path):
    """Two files swapped by renaming would give the metadata of the wrong one."""
    paths = split(tmp_path)
    raw = [p.read_bytes() for p in paths]
    paths[0].write_bytes(raw[1])
    paths[1].write_bytes(raw[0])
    refused(paths[0], "is not part 1 of 3")


def test_a_tensor_in_two_parts_is_refused(tmp_path):
    """The later one would silently win."""
    paths = split(tmp_path)
    keys = {"split.no": (U16, 2), "split.count": (U16, 3)}
    paths[2].write_bytes(gguf_bytes(keys, [tensor("blk.0", (8,), 0, 0)], bytes(32)))
    refused(paths[0], "'blk.0' is in big-00001-of-00003.gguf too")


def test_parts_that_lack_a_tensor_are_refused(tmp_path):
    """A part from another upload with one tensor fewer is a different model."""
    refused(split(tmp_path, total=4)[0], "3 tensors", "says 4")


def test_a_damaged_part_is_named(tmp_path):
    """The user must know which of nine files to download again."""
    paths = split(tmp_path)
    paths[2].write_bytes(paths[2].read_bytes()[:-4])
    refused(paths[0], "big-00003-of-00003.gguf is cut short: 4 bytes")
