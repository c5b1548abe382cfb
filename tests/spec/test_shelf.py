"""What this machine has: the embedded model, Ollama's store, the Hub's cache; and a pull that fills the cache, broken off once."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from headwise.errors import SpecError
from headwise.spec.read import open_model
from headwise.spec.shelf import find, held, hub_name, nearest, shelf

EMBEDDED = Path(str(open_model(None, env={}).path))
DIGEST = hashlib.sha256(EMBEDDED.read_bytes()).hexdigest()


def cache(tmp_path: Path) -> dict[str, str]:
    return {"HF_HUB_CACHE": str(tmp_path / "hub"), "OLLAMA_MODELS": str(tmp_path / "ollama"), "HOME": str(tmp_path)}


def cached_repository(tmp_path: Path, repository: str, files: dict[str, bytes]) -> Path:
    """A repository as huggingface_hub stores it."""
    folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    for name, data in files.items():
        blob = folder / "blobs" / hashlib.sha256(data + name.encode()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    return snapshot


def ollama_model(tmp_path: Path, name: str, tag: str, size: int | None = None) -> None:
    blobs = tmp_path / "ollama" / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    if not (blobs / f"sha256-{DIGEST}").exists():
        (blobs / f"sha256-{DIGEST}").symlink_to(EMBEDDED)
    layer = {
        "mediaType": "application/vnd.ollama.image.model",
        "digest": f"sha256:{DIGEST}",
        "size": size or EMBEDDED.stat().st_size,
    }
    manifest = tmp_path / "ollama" / "manifests" / "registry.ollama.ai" / "library" / name / tag
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"layers": [layer]}))


def test_the_shelf_holds_what_every_place_has_and_says_what_is_broken(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    ollama_model(tmp_path, "tiny", "latest")
    ollama_model(tmp_path, "short", "1b", size=5)
    index = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}).encode()
    half = {"config.json": b"{}", "model.safetensors.index.json": index, "model-00001-of-00002.safetensors": b"x"}
    cached_repository(tmp_path, "org/half", half)
    cached_repository(tmp_path, "org/whole", half | {"model-00002-of-00002.safetensors": b"yy"})
    ggufs = {
        "m-Q4_K_M.gguf": EMBEDDED.read_bytes(),
        "mmproj-F16.gguf": b"x",
        "Q8_0/m-Q8_0-00001-of-00002.gguf": b"x",
        "README.md": b"",
    }
    snapshot = cached_repository(tmp_path, "org/many-GGUF", ggufs)
    cached_repository(tmp_path, "org/data", {"README.md": b""})
    found = {m.name: m for m in shelf(cache(tmp_path)) if (m.path and m.path.is_relative_to(tmp_path)) or m.origin == "embedded"}

    assert {n: m.problem is None for n, m in found.items()} == {
        "tiny-hybrid": True, "tiny:latest": True, "short:1b": False, "org/half": False, "org/whole": True,
        "org/many-GGUF:Q4_K_M": True, "org/many-GGUF:Q8_0": False,
    }  # fmt: skip
    assert found["org/whole"].n_bytes == len(index) + 2 + 3
    assert "1 of 2 weight files are not here: headwise pull org/half" in str(found["org/half"].problem)
    assert "1 of 2 parts are here" in str(found["org/many-GGUF:Q8_0"].problem)
    assert "the manifest states 5" in str(found["short:1b"].problem)
    opened = found["org/many-GGUF:Q4_K_M"].open({})
    assert (opened.name, opened.path, opened.spec.family) == ("org/many-GGUF:Q4_K_M", snapshot / "m-Q4_K_M.gguf", "gemma4")
    assert found["tiny:latest"].open(cache(tmp_path)).spec.n_layers == 10 if hasattr(opened.spec, "n_layers") else True
    with pytest.raises(SpecError, match="cannot be run"):
        found["org/half"].open({})


def test_names_are_found_as_ollama_and_the_hub_spell_them(tmp_path: Path) -> None:
    ollama_model(tmp_path, "gemma4", "26b")
    ollama_model(tmp_path, "tiny", "latest")
    named = held(str(EMBEDDED), open_model(EMBEDDED, env={}), ("mine",))
    models = [named, *(m for m in shelf(cache(tmp_path)) if m.origin == "ollama")]

    for name, wanted in [("tiny", "tiny:latest"), ("Gemma4:26B", "gemma4:26b"), ("ollama:tiny", "tiny:latest"),
                         ("mine:latest", named.name), (str(EMBEDDED), named.name)]:  # fmt: skip
        assert (found := find(models, name)) is not None, name
        assert found.name == wanted
    for name in ("gemma4", "tiny:1b", "", str(EMBEDDED).upper(), "../" + EMBEDDED.name):
        assert find(models, name) is None
    assert nearest(models, "gemma4:27b")[0] == "gemma4:26b"


@pytest.mark.parametrize(
    ("name", "repository"),
    [("hf:org/name", "org/name"), ("hf.co/org/name:Q4_K_M", "org/name:Q4_K_M"), ("https://huggingface.co/org/name", "org/name"),
     ("org/name", "org/name"), ("gemma4:26b", None), ("/etc/passwd", None), ("./a/b", None), ("a/b/c", None), ("", None)],
)  # fmt: skip
def test_a_hub_name_is_told_from_others(name: str, repository: str | None) -> None:
    assert hub_name(name) == repository


# --- a Hub on this machine ---


@dataclass
class FakeHub:
    url: str
    data: bytes
    cut_at: int | None = None  # break the connection off after so many bytes, once
    ranges: list[str] = field(default_factory=list[str])


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    pytest.importorskip("huggingface_hub")
    fake = FakeHub("", EMBEDDED.read_bytes())
    tag = hashlib.sha256(fake.data).hexdigest()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def _json(self, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if re.fullmatch(r"/api/models/tiny/hybrid/(tree|revision)/\w+", path) or path == "/api/models/tiny/hybrid":
                file = {"type": "file", "path": "t-Q8_0.gguf", "rfilename": "t-Q8_0.gguf", "size": len(fake.data), "oid": "0" * 40}
                self._json([file] if "/tree/" in path else {"id": "tiny/hybrid", "sha": "a" * 40, "siblings": [file]})
                return
            if not path.endswith("/t-Q8_0.gguf"):
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = 0
            if asked := self.headers.get("Range"):
                start = int(asked.removeprefix("bytes=").split("-")[0])
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(fake.data) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(fake.data) - 1}/{len(fake.data)}")
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("ETag", f'"{tag}"')
            self.end_headers()
            if self.command == "HEAD":
                return
            fake.ranges.append(asked or "")
            if fake.cut_at is not None:
                self.wfile.write(fake.data[start : start + fake.cut_at])
                self.wfile.flush()
                self.connection.close()
                return
            self.wfile.write(fake.data[start:])

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield fake
    server.shutdown()


def headwise(tmp_path: Path, hub: FakeHub, *words: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | cache(tmp_path) | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    return subprocess.run([sys.executable, "-m", "headwise", *words], capture_output=True, text=True, env=env, timeout=120)


def test_a_pull_whose_connection_breaks_goes_on_and_a_second_one_has_nothing_to_do(tmp_path: Path, hub: FakeHub) -> None:
    """17 GB from the start again, for one lost connection."""
    hub.cut_at = len(hub.data) - 1_000_000  # huggingface_hub writes whole chunks of 10 MB
    pulled = headwise(tmp_path, hub, "pull", "hf.co/tiny/hybrid:Q8_0", "--json")

    assert pulled.returncode == 0, pulled.stderr
    assert hub.ranges == ["", "bytes=10485760-"]
    path = Path(json.loads(pulled.stdout)["path"])
    assert path.read_bytes() == hub.data
    (model,) = [m for m in json.loads(headwise(tmp_path, hub, "list", "--json").stdout)["models"] if m["source"] == "hub"]
    assert (model["name"], model["bytes"], model["problem"]) == ("tiny/hybrid:Q8_0", len(hub.data), None)
    for url in (hub.url, "http://127.0.0.1:9"):  # here already: no byte again, nor any need of the Hub
        hub.url = url
        again = headwise(tmp_path, hub, "pull", "hf:tiny/hybrid:q8_0", "--json")
        assert json.loads(again.stdout)["path"] == str(path), again.stderr
    assert len(hub.ranges) == 2


def test_progress_is_told_in_bytes_and_can_end_a_download(tmp_path: Path, hub: FakeHub) -> None:
    code = (
        "import sys, json; from headwise.spec.hub import fetch\n"
        "told = []\n"
        "def tell(*said):\n"
        "    told.append(said)\n"
        "    if len(sys.argv) > 1 and said[1]: raise KeyError('enough')\n"
        "try: fetch('tiny/hybrid', weights=True, progress=tell)\n"
        "except KeyError: told.append('ended')\n"
        "print(json.dumps(told))"
    )
    env = os.environ | cache(tmp_path) | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    runs = [subprocess.run([sys.executable, "-c", code, *more], capture_output=True, text=True, env=env) for more in (["x"], [])]
    ended, told = (json.loads(done.stdout) for done in runs)
    size = len(hub.data)

    assert ended[-1] == "ended"
    assert ended[-2][1] < size
    assert told[-1] == ["t-Q8_0.gguf", size, size]
    assert [t[1] for t in told] == sorted(t[1] for t in told)
    assert len(told) >= 3
    assert {t[2] for t in told} == {size}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf:tiny/nothing", "no repository"),
        ("gemma4:26b", "names no repository"),
        ("hf:tiny/hybrid:Q4_K_M", "no GGUF file of type"),
    ],
)
def test_a_pull_of_what_is_not_there_says_so(tmp_path: Path, hub: FakeHub, name: str, said: str) -> None:
    done = headwise(tmp_path, hub, "pull", name, "--json")

    assert done.returncode == 2
    assert said in json.loads(done.stdout)["error"]["what"]


def test_a_pull_without_a_network_is_refused_in_a_sentence(tmp_path: Path, hub: FakeHub) -> None:
    hub.url = "http://127.0.0.1:9"
    done = headwise(tmp_path, hub, "pull", "hf:tiny/hybrid", "--json")

    assert done.returncode == 2
    assert "the Hub cannot be reached" in json.loads(done.stdout)["error"]["what"]
    assert "Traceback" not in done.stderr
