import json
from pathlib import Path
from typing import Any

import pytest

import headwise
from headwise.errors import HeadwiseError, SpecError, UsageError
from headwise.spec import read as door
from headwise.spec.read import open_model

LLAMA = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512, "hidden_act": "silu",
}  # fmt: skip
EMBEDDED = Path(headwise.__file__).parent / "data" / "tiny-hybrid.gguf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "my-model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA))
    return path


def opened(source: Any, **more: Any) -> door.Source:
    return open_model(source, env={}, **more)


@pytest.mark.parametrize("name", [None, "tiny-hybrid", "Tiny-Hybrid"])
def test_no_name_is_the_embedded_model(name: str | None) -> None:
    """`headwise run` works before anything is downloaded, and with its weights."""
    source = opened(name, weights=True)

    assert (source.name, source.kind, source.path) == ("tiny-hybrid", "gguf", EMBEDDED)
    assert source.gguf is not None and source.spec.layers


@pytest.mark.parametrize("spelling", ["str", "Path", "slash", "config.json", "link"])
def test_a_directory_is_read_as_hugging_face_s(folder: Path, spelling: str) -> None:
    """Every way of pointing at it is the same model."""
    link = folder.parent / "link"
    link.symlink_to(folder)
    said: dict[str, str | Path] = {
        "str": str(folder), "Path": folder, "slash": f"{folder}/", "config.json": folder / "config.json", "link": link,
    }  # fmt: skip

    source = opened(said[spelling])

    assert (source.name, source.kind, source.spec.name) == ("my-model", "hf", "my-model")
    assert source.path is not None and source.path.resolve() == folder
    assert source.gguf is None and source.params == {}


def test_a_home_directory_may_be_written_as_a_tilde(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quoted in a script, the shell does not expand it."""
    monkeypatch.setenv("HOME", str(folder.parent))

    assert opened("~/my-model").spec.name == "my-model"


def test_a_gguf_path_is_read_as_gguf(tmp_path: Path) -> None:
    """By its content: a link of any name works."""
    link = tmp_path / "blob"
    link.symlink_to(EMBEDDED)

    for path in (EMBEDDED, link, str(link)):
        source = opened(path)
        assert source.kind == "gguf" and source.gguf is not None and source.path == Path(path)
        assert source.spec == opened(None).spec


def test_a_directory_of_ggufs_names_them(tmp_path: Path) -> None:
    """"has no config.json" sent people to look for a file that belongs to another format."""
    (tmp_path / "m-Q4_K_M.gguf").write_bytes(b"")
    (tmp_path / "m-Q8_0.gguf").write_bytes(b"")

    with pytest.raises(SpecError, match="2 GGUF files") as caught:
        opened(tmp_path)

    assert caught.value.do == str(tmp_path / "m-Q4_K_M.gguf")


def test_ignored_keys_reach_every_kind_of_file(folder: Path) -> None:
    """The flag worked for directories only."""
    (folder / "config.json").write_text(json.dumps(LLAMA | {"new_key": 1}))

    with pytest.raises(SpecError, match="new_key"):
        opened(folder)
    assert opened(folder, ignore_keys=["new_key"]).spec.family == "llama"


@pytest.mark.parametrize("source", ["gemma-4-31b", "gemma4:31b", "google/gemma-4-31B-it"])
def test_a_bare_name_is_the_catalogue(source: str) -> None:
    """Ollama's store is `ollama:`; a bare name needs no disk at all."""
    found = opened(source)

    assert (found.name, found.kind, found.path, found.gguf) == ("gemma-4-31b", "catalogue", None, None)


def test_the_catalogue_has_no_weights_and_says_where_they_are() -> None:
    """`run gemma-4-31b` failed later, inside the loader."""
    with pytest.raises(SpecError) as caught:
        opened("gemma4:31b", weights=True)

    assert "hf:google/gemma-4-31B-it" in caught.value.do and "ollama:" in caught.value.do


def test_a_directory_of_a_catalogue_name_wins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies there is what was meant."""
    folder.rename(folder.parent / "qwen3-8b")
    monkeypatch.chdir(folder.parent)

    assert opened("qwen3-8b").kind == "hf"


@pytest.mark.parametrize("source", ["./gemma-4-31b", "models/x.gguf", "/nowhere/at/all", "x.GGUF", "~/nothing", "gemma-4-31b/"])
def test_a_path_that_is_not_there_is_no_unknown_name(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped path printed the catalogue."""
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SpecError, match="does not exist") as caught:
        opened(source)

    assert "catalogue" not in str(caught.value)


def test_a_path_object_is_always_a_path() -> None:
    """Path("gemma-4-31b") does not mean the catalogue."""
    with pytest.raises(SpecError, match="does not exist"):
        opened(Path("gemma-4-31b"))


def test_a_mistyped_file_shows_the_nearest_and_a_mistyped_directory_itself(tmp_path: Path) -> None:
    """The first part that is wrong is what one wants to know."""
    (tmp_path / "gemma-Q4_K_M.gguf").write_bytes(b"")

    with pytest.raises(SpecError) as near:
        opened(tmp_path / "gemma-Q4_K_N.gguf")
    with pytest.raises(SpecError) as far:
        opened(tmp_path / "modles" / "deep" / "x.gguf")

    assert near.value.do == str(tmp_path / "gemma-Q4_K_M.gguf")
    assert far.value.why == f"there is no directory {tmp_path / 'modles'}"


def test_a_file_in_place_of_a_directory_is_named(folder: Path) -> None:
    """NotADirectoryError reached the terminal."""
    with pytest.raises(SpecError, match="does not exist"):
        opened(folder / "config.json" / "x.gguf")


@pytest.mark.parametrize(
    "source", ["a" * 5000, "a\0b", "~nobody-of-that-name/x.gguf", "/" + "a/" * 3000, "unknown-model", "\ud800"]
)
def test_a_name_that_no_file_can_have_is_an_error_of_ours(source: str) -> None:
    """ENAMETOOLONG, a NUL and a user without a home each raised something else."""
    with pytest.raises(HeadwiseError):
        opened(source)


@pytest.mark.parametrize("source", ["", "  "])
def test_an_empty_name_is_not_the_working_directory(source: str) -> None:
    """Path("") is "."; an unset variable in a script read whatever lay there."""
    with pytest.raises(UsageError, match="no name"):
        opened(source)


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    """A blob that was removed; the name exists and the file does not."""
    link = tmp_path / "m.gguf"
    link.symlink_to(tmp_path / "gone")

    with pytest.raises(SpecError, match=r"m\.gguf") as caught:
        opened(link)

    assert "holds no" not in caught.value.why


def test_a_hub_directory_is_named_by_its_repository(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder in the cache is a commit's hash, which the plan printed as the model's name."""
    asked = []
    monkeypatch.setattr(door, "fetch", lambda name, weights: asked.append((name, weights)) or folder)

    source = opened("hf:org/the-model", weights=True)

    assert asked == [("org/the-model", True)]
    assert (source.name, source.kind, source.spec.name, source.path) == ("org/the-model", "hub", "the-model", folder)


def test_a_hub_gguf_keeps_the_name_in_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository holds many; the file says which it is."""
    monkeypatch.setattr(door, "fetch", lambda name, weights: EMBEDDED)

    source = opened("hf:org/name-GGUF:Q8_0")

    assert (source.kind, source.spec, source.path) == ("hub", opened(None).spec, EMBEDDED)
    assert source.gguf is not None


def test_an_ollama_name_brings_its_file_and_its_parameters(tmp_path: Path) -> None:
    """num_ctx of the Modelfile decides how much `ollama run` allocates."""
    blobs, manifests = tmp_path / "blobs", tmp_path / "manifests" / "registry.ollama.ai" / "library" / "tiny"
    blobs.mkdir()
    manifests.mkdir(parents=True)
    (blobs / ("sha256-" + "a" * 64)).symlink_to(EMBEDDED)
    (blobs / ("sha256-" + "b" * 64)).write_text(json.dumps({"num_ctx": 777}))
    layers = [
        {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:" + "a" * 64},
        {"mediaType": "application/vnd.ollama.image.params", "digest": "sha256:" + "b" * 64},
    ]
    (manifests / "latest").write_text(json.dumps({"schemaVersion": 2, "layers": layers}))

    source = open_model("ollama:tiny", env={"OLLAMA_MODELS": str(tmp_path)}, weights=True)

    assert (source.kind, source.params["num_ctx"]) == ("ollama", 777)
    assert source.spec.layers == opened(None).spec.layers


def test_read_model_is_the_same_door(folder: Path) -> None:
    """The public name and the command line must not drift apart."""
    assert headwise.read_model(folder) == opened(folder).spec
    assert headwise.read_model() == opened(None).spec
