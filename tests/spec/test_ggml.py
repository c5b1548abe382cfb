import gguf
import pytest

from headwise.spec.ggml import GGML_TYPES, by_name, n_bytes


def test_every_type_of_gguf_py_has_its_name_and_its_block():
    """One wrong block size shifts every tensor behind it and misplans the model by gigabytes."""
    ours = {t.code: (t.name, t.block, t.block_bytes) for t in GGML_TYPES.values()}

    theirs = {int(q): (q.name.lower(), *size) for q, size in gguf.GGML_QUANT_SIZES.items()}

    assert {code: ours[code] for code in theirs} == theirs
    assert set(ours) - set(theirs) <= {4, 42}  # Ollama's raw MXFP4, and Q2_0, which gguf-py 0.19 does not have yet


def test_bytes_are_exact_past_two_to_the_fifty_third():
    """A float in the arithmetic loses the last bytes of a huge tensor."""
    assert n_bytes(by_name("Q6_K"), 256 * (2**52 + 1)) == 210 * (2**52 + 1)


@pytest.mark.parametrize("n_elements", [1, 255, 257, -256])
def test_part_of_a_block_is_refused(n_elements):
    """Rounding 257 values down to one block reads a tensor that lacks its last value."""
    with pytest.raises(ValueError, match="whole blocks of 256"):
        n_bytes(by_name("q4_k"), n_elements)
