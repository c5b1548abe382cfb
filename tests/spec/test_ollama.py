import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from gguf_bytes import small_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headwise.errors import SpecError
from headwise.spec.gguf import read_gguf
from headwise.spec.ollama import default_roots, find_ollama, list_ollama

IMAGE = "application/vnd.ollama.image."
LIST_TYPE = "application/vnd.ollama.manifest.list.v2+json"


class Store:
    """An Ollama store in a temporary directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "blobs").mkdir(parents=True)

    def blob(self, raw: bytes) -> str:
        hexed = hashlib.sha256(raw).hexdigest()
        (self.root / "blobs" / f"sha256-{hexed}").write_bytes(raw)
        return "sha256:" + hexed

    def layer(self, kind: str, raw: bytes) -> dict[str, Any]:
        return {"mediaType": IMAGE + kind, "digest": self.blob(raw), "size": len(raw)}

    def manifest(self, layers: list[dict[str, Any]]) -> dict[str, Any]:
        return {"schemaVersion": 2, "config": {"digest": self.blob(b"{}"), "size": 2}, "layers": layers}

    def install(self, path: str, document: Any, layout: str = "manifests") -> Path:
        target = self.root / layout / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
        return target

    def gguf(self, path: str = "registry.ollama.ai/library/gemma4/latest", *more: dict[str, Any], **kw: Any) -> Path:
        return self.install(path, self.manifest([self.layer("model", small_model()), *more]), **kw)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models")


def refused(name: str, roots: list[Path], *words: str) -> None:
    with pytest.raises(SpecError) as caught:
        find_ollama(name, roots)
    assert caught.value.why and caught.value.do
    for word in words:
        assert word in str(caught.value)


def test_a_model_gives_its_gguf_and_its_settings(store):
    """num_ctx in the manifest decides how much memory Ollama asks for; losing it misplans."""
    more = [
        store.layer("template", "{{ .Prompt }}é".encode()),
        store.layer("system", b"Be brief."),
        store.layer("params", b'{"num_ctx": 8192, "stop": ["<end>"]}'),
        store.layer("projector", b"GGUF mmproj"),
        store.layer("license", b"Apache"),
    ]
    manifest = store.gguf("registry.ollama.ai/library/gemma4/31b", *more)

    model = find_ollama("gemma4:31b", [store.root])

    assert model.name == "gemma4:31b" and model.manifest == manifest
    assert len(read_gguf(model.gguf).tensors) == 3
    assert model.params == {"num_ctx": 8192, "stop": ["<end>"]}
    assert (model.template, model.system) == ("{{ .Prompt }}é", "Be brief.")
    assert model.projector is not None and model.projector.read_bytes() == b"GGUF mmproj"
    assert model.draft is None


def test_of_two_layers_of_a_kind_the_last_counts(store):
    """A model made from another keeps its parameters in front of its own."""
    store.gguf("registry.ollama.ai/me/m/v1", store.layer("params", b'{"num_ctx": 1}'), store.layer("params", b'{"num_ctx": 2}'))

    assert find_ollama("me/m:v1", [store.root]).params == {"num_ctx": 2}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("gemma4", "registry.ollama.ai/library/gemma4/latest"),
        ("GEMMA4", "registry.ollama.ai/library/gemma4/latest"),
        ("gemma4:Q4_K_M", "registry.ollama.ai/library/gemma4/q4_k_m"),
        ("library/gemma4", "registry.ollama.ai/library/gemma4/latest"),
        ("me/Mine:V1", "registry.ollama.ai/me/mine/v1"),
        ("registry.ollama.ai/me/mine:v1", "registry.ollama.ai/me/mine/v1"),
        ("ollama.com/library/gemma4", "registry.ollama.ai/library/gemma4/latest"),
        ("hf.co/unsloth/gemma-4-GGUF:Q8_0", "hf.co/unsloth/gemma-4-GGUF/Q8_0"),
        ("registry.example:5000/ns/m:t", "registry.example:5000/ns/m/t"),
        ("https://registry.example/ns/m", "registry.example/ns/m/latest"),
    ],
)
def test_a_name_is_filled_in_and_compared_as_ollama_does(store, name, path):
    """`gemma4`, `Gemma4:latest` and `library/gemma4` are one model to Ollama."""
    manifest = store.gguf(path)

    assert find_ollama(name, [store.root]).manifest == manifest


def test_of_two_models_that_differ_in_case_the_exact_one_is_taken(store):
    """Both can lie in one store on Linux."""
    lower, upper = store.gguf("registry.ollama.ai/me/m/v1"), store.gguf("registry.ollama.ai/me/M/v1")

    assert find_ollama("me/m:v1", [store.root]).manifest == lower
    assert find_ollama("me/M:v1", [store.root]).manifest == upper


@pytest.mark.parametrize(
    "name",
    [
        "",
        ":",
        "a:",
        "/a",
        "a//b",
        "../../etc/passwd",
        "a/../b",
        "a:../../x",
        "a:b/c:d/e",
        "a b",
        "a\0b",
        "é",
        "a/b/c/d",
    ],
)
def test_a_name_that_could_leave_the_store_is_refused(store, name):
    """A name becomes a path; `..` in it must not."""
    refused(name, [store.root], "not the name of an Ollama model")


def test_a_model_that_is_not_there_lists_what_is(store):
    """ "not found" sends the user to another terminal to look the name up."""
    store.gguf("registry.ollama.ai/library/gemma4/31b")
    store.gguf("registry.ollama.ai/library/qwen3/8b")

    refused("gemma4:32b", [store.root], "gemma4:31b", "ollama pull gemma4:32b", str(store.root))
    refused("gemma4", [store.root], "use gemma4:31b")
    refused("zzz", [store.root], "gemma4:31b, qwen3:8b")


def test_a_store_that_is_not_there_is_said_to_be_empty(tmp_path):
    """No store at all must not look like a missing model."""
    refused("gemma4", [tmp_path / "no", tmp_path / "none"], "no models in", str(tmp_path / "none"))


def test_the_list_has_every_model_once_and_the_first_root_wins(store, tmp_path):
    """$OLLAMA_MODELS comes before the home directory."""
    first = store.gguf("registry.ollama.ai/library/gemma4/latest")
    other = Store(tmp_path / "other")
    other.gguf("registry.ollama.ai/library/gemma4/latest")
    second = other.gguf("hf.co/u/r/Q8_0")
    other.install("registry.ollama.ai/stray-file", b"")
    other.gguf("registry.ollama.ai/library/llamacpp/" + "a" * 64)  # Ollama's anchor for a converted model

    assert list_ollama([store.root, other.root]) == {"gemma4:latest": first, "hf.co/u/r:Q8_0": second}
    assert find_ollama("gemma4", [store.root, other.root]).manifest == first


def test_default_roots_follow_ollama():
    """The service's home is not the user's."""
    home, service = Path("/home/me/.ollama/models"), Path("/usr/share/ollama/.ollama/models")

    assert default_roots({"HOME": "/home/me", "OLLAMA_MODELS": ' "/data/m" '}) == (Path("/data/m"), home, service)
    assert default_roots({"HOME": "/home/me", "OLLAMA_MODELS": str(service)}) == (service, home)
    assert default_roots({}) == (service,)


# the layout since 2026


def test_a_v2_manifest_is_found_and_preferred(store):
    """Current Ollama removes the old manifest when it writes the new one: every fresh pull would be invisible."""
    store.gguf("registry.ollama.ai/library/gemma4/latest")
    newer = store.gguf("ollama.com/library/gemma4/latest", layout="manifests-v2")

    assert find_ollama("gemma4", [store.root]).manifest == newer
    assert list_ollama([store.root]) == {"gemma4:latest": newer}


def test_a_dangling_v2_entry_falls_back_to_the_old_manifest(store):
    """An older Ollama may have pruned the blob the link points to."""
    older = store.gguf("registry.ollama.ai/library/gemma4/latest")
    link = store.root / "manifests-v2/ollama.com/library/gemma4/latest"
    link.parent.mkdir(parents=True)
    link.symlink_to(store.root / "blobs" / "sha256-gone")

    assert find_ollama("gemma4", [store.root]).manifest == older


def test_of_a_manifest_list_the_gguf_child_is_taken(store):
    """The first child is often the MLX one."""
    child = store.manifest([store.layer("model", small_model())])
    document = {
        "mediaType": LIST_TYPE,
        "manifests": [
            {"runner": "mlx", "format": "safetensors", "digest": "sha256:" + "0" * 64},
            {"runner": "llamacpp", "format": "gguf", "digest": store.blob(json.dumps(child).encode())},
        ],
    }
    store.install("ollama.com/library/gemma4/latest", document, layout="manifests-v2")

    assert len(read_gguf(find_ollama("gemma4", [store.root]).gguf).tensors) == 3


def test_a_manifest_list_without_its_gguf_says_so(store):
    """Only the MLX child was pulled, or the child's blob was pruned."""
    mlx = {"runner": "mlx", "format": "safetensors", "digest": "sha256:" + "0" * 64}
    gone = {"runner": "llamacpp", "format": "gguf", "digest": "sha256:" + "1" * 64}
    for tag, manifests, word in (
        ("mlx", [mlx], "MLX"),
        ("gone", [mlx, gone], "is missing"),
        ("none", [], "no weights"),
    ):
        document = {"mediaType": LIST_TYPE, "manifests": manifests}
        store.install(f"ollama.com/library/gemma4/{tag}", document, layout="manifests-v2")
        refused(f"gemma4:{tag}", [store.root], word)


# damage


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        b"null",
        b'{"layers": 7}',
        b'{"layers": [7]}',
        b'{"layers": {"a": 1}}',
    ],
)
def test_a_damaged_manifest_is_a_spec_error(store, document):
    """A full disk leaves an empty manifest behind."""
    path = store.install("registry.ollama.ai/library/gemma4/latest", document)
    refused("gemma4", [store.root], str(path), "ollama pull gemma4:latest")


@pytest.mark.parametrize(
    "digest",
    ["sha256:../../../etc/passwd", "../../etc/passwd", "sha256:" + "a" * 63, "sha256:" + "g" * 64, "", None, 7, ["a"]],
)
def test_a_digest_cannot_name_a_file_outside_the_blobs(store, digest):
    """A manifest comes from a registry; a digest in it becomes a path."""
    layer = {"mediaType": IMAGE + "model", "digest": digest, "size": 1}
    store.install("registry.ollama.ai/library/gemma4/latest", store.manifest([layer]))
    refused("gemma4", [store.root], "is no sha256 digest")


def test_a_missing_or_short_blob_is_a_spec_error(store):
    """A pull that was interrupted, or blobs pruned by hand."""
    layer = store.layer("model", small_model())
    store.install("registry.ollama.ai/library/gemma4/latest", store.manifest([layer]))
    blob = store.root / "blobs" / layer["digest"].replace(":", "-")

    blob.write_bytes(b"GGUF")
    refused("gemma4", [store.root], "4 bytes; the manifest states")
    blob.unlink()
    refused("gemma4", [store.root], "model file is missing")


def test_models_that_are_no_single_gguf_are_refused_with_the_reason(store):
    """An MLX model, a cloud model, a LoRA and a split model all look like "no GGUF" otherwise."""
    model = store.layer("model", small_model())
    for tag, layers, word in (
        ("mlx", [store.layer("tensor", b"x"), store.layer("json", b"{}")], "MLX"),
        ("cloud", [store.layer("license", b"x")], "cloud"),
        ("lora", [model, store.layer("adapter", b"x")], "LoRA"),
        ("split", [model, store.layer("model", b"x")], "split"),
    ):
        store.install(f"registry.ollama.ai/library/gemma4/{tag}", store.manifest(layers))
        refused(f"gemma4:{tag}", [store.root], word)


def test_damaged_parameters_are_a_spec_error_not_a_default(store):
    """Ignoring them would plan for another context length than Ollama's."""
    store.gguf("registry.ollama.ai/library/gemma4/latest", store.layer("params", b"[1]"))
    refused("gemma4", [store.root], "parameters")


@pytest.mark.parametrize("locked", ["manifests", "manifests/registry.ollama.ai/library/gemma4/latest", "blobs"])
def test_a_store_of_another_user_says_how_to_get_in(store, monkeypatch, locked):
    """The Linux service's store belongs to the user `ollama`. (The system calls fail here: root may read everything.)"""
    store.gguf()
    inside = str(store.root / locked)

    def forbidding(real):
        def call(path, *args, **more):
            if str(path).startswith(inside):
                raise PermissionError(13, "Permission denied")
            return real(path, *args, **more)

        return call

    monkeypatch.setattr(Path, "iterdir", forbidding(Path.iterdir))
    monkeypatch.setattr(Path, "open", forbidding(Path.open))
    if locked == "blobs":
        monkeypatch.setattr(os, "stat", forbidding(os.stat))

    refused("gemma4", [store.root], "may not be read", "usermod -aG ollama")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from([LIST_TYPE, IMAGE + "model"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["layers", "manifests", "mediaType", "digest", "size", "runner", "format"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JSON)
def test_any_json_in_a_manifest_gives_a_spec_error(store, document):
    """Whatever a registry sends, the user gets a message."""
    store.install("registry.ollama.ai/library/gemma4/latest", document)
    refused("gemma4", [store.root])
