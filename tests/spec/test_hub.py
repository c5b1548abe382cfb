import builtins
import errno
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from headwise.errors import HeadwiseError, SpecError, UsageError
from headwise.spec.hub import fetch

HTTP_ERROR = next(base for base in errors.HfHubHTTPError.__bases__ if base is not OSError)  # of whichever client is in use


class Hub:
    """huggingface_hub with its network replaced: `files` are on the Hub, downloads land in `folder`."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder, self.files = folder, files
        self.asked: dict[str, Any] = {}
        self.downloaded: list[str] = []
        self.snapshot_fails: BaseException | None = None
        self.listing_fails: BaseException | None = None
        self.cached: list[str] = []

    def snapshot_download(self, repository: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        from huggingface_hub.utils import filter_repo_objects

        if self.snapshot_fails:
            raise self.snapshot_fails
        self.asked = {"repository": repository, "allow": allow_patterns}
        for file in filter_repo_objects(self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            self._write(file)
        return str(self.folder)

    def model_info(self, repository: str) -> Any:
        if self.listing_fails:
            raise self.listing_fails
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in self.files])

    def hf_hub_download(self, repository: str, file: str) -> str:
        return self._write(file)

    def scan_cache_dir(self) -> Any:
        files = [SimpleNamespace(file_path=self.folder / f) for f in self.cached]
        revision = SimpleNamespace(snapshot_path=self.folder, files=files)
        repos = [SimpleNamespace(repo_type="model", repo_id="org/name", revisions=[revision])] if self.cached else []
        return SimpleNamespace(repos=[SimpleNamespace(repo_type="dataset", repo_id="org/name", revisions=[]), *repos])

    def _write(self, file: str) -> str:
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        self.downloaded.append(file)
        return str(path)


def hub_with(monkeypatch: pytest.MonkeyPatch, folder: Path, files: list[str]) -> Hub:
    hub = Hub(folder, files)
    for name in ("snapshot_download", "model_info", "hf_hub_download", "scan_cache_dir"):
        monkeypatch.setattr(huggingface_hub, name, getattr(hub, name))
    return hub


def http_error(kind: type[errors.HfHubHTTPError], message: str) -> BaseException:
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


SAFETENSORS = [
    "config.json", "generation_config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "README.md",
    "model-00002-of-00002.safetensors", "model.safetensors.index.json", "original/model.safetensors", "metal/model.bin",
    "consolidated.safetensors", "pytorch_model.bin", "chat_template.jinja",
]  # fmt: skip
GGUFS = [
    "m-BF16.gguf", "m-F16.gguf", "m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "mmproj-F16.gguf", "README.md",
    "Q8_0/m-00-Q8_0-00001-of-00002.gguf", "Q8_0/m-00-Q8_0-00002-of-00002.gguf", "m-UD-IQ2_M.gguf",
]  # fmt: skip


def test_a_plan_downloads_config_json_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer of 33 MB was fetched to print a table."""
    hub = hub_with(monkeypatch, tmp_path, SAFETENSORS)

    assert fetch("org/name", weights=False) == tmp_path
    assert hub.downloaded == ["config.json"]
    assert hub.asked["repository"] == "org/name"


def test_a_run_downloads_the_weights_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt-oss-20b holds its weights three times, Mistral twice: 27 GB instead of 13."""
    hub = hub_with(monkeypatch, tmp_path, SAFETENSORS)

    fetch("org/name", weights=True)

    assert set(hub.downloaded) == {
        "config.json", "generation_config.json", "tokenizer.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja",
    }  # fmt: skip


def test_a_repository_of_other_weights_says_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pytorch_model.bin is code that runs when it is loaded; it is not read."""
    hub_with(monkeypatch, tmp_path, ["config.json", "pytorch_model.bin"])

    with pytest.raises(SpecError, match="has no safetensors"):
        fetch("org/name", weights=True)
    assert fetch("org/name", weights=False) == tmp_path


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("Q4_K_M", "m-Q4_K_M.gguf"), ("q4_k_m", "m-Q4_K_M.gguf"), ("F16", "m-F16.gguf"), ("bf16", "m-BF16.gguf"),
        ("Q8_0", "Q8_0/m-00-Q8_0-00001-of-00002.gguf"), ("IQ2_M", "m-UD-IQ2_M.gguf"), ("UD-IQ2_M", "m-UD-IQ2_M.gguf"),
    ],
)  # fmt: skip
def test_a_type_picks_its_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, file: str) -> None:
    """F16 is in the name of BF16, and an encoder's file is no model."""
    hub = hub_with(monkeypatch, tmp_path, GGUFS)

    assert fetch(f"org/name:{kind}", weights=False) == tmp_path / file
    assert len(hub.downloaded) == (2 if "-of-" in file else 1)


@pytest.mark.parametrize(
    ("kind", "what"), [("Q4_K", "2 GGUF files of type Q4_K"), ("Q3_K_M", "no GGUF file of type Q3_K_M"), ("", "5 GGUF files")]
)
def test_a_type_that_is_none_or_two_lists_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, what: str
) -> None:
    """The wrong one of two is 10 GB of download."""
    hub = hub_with(monkeypatch, tmp_path, GGUFS)

    with pytest.raises(SpecError) as caught:
        fetch(f"org/name:{kind}" if kind else "org/name", weights=False)

    assert what.replace("5", "6") in caught.value.what
    assert "m-Q4_K_M" in caught.value.why or kind == "Q4_K"
    advised = caught.value.do.removeprefix("hf:")
    assert fetch(advised, weights=False).suffix == ".gguf"  # the advice works
    assert "mmproj" not in str(caught.value)
    assert hub.downloaded


def test_the_only_gguf_of_a_repository_needs_no_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository without config.json and with one model has one meaning."""
    hub_with(monkeypatch, tmp_path, ["m-q4_0.gguf", "mmproj.gguf", "README.md"])

    assert fetch("org/name", weights=False) == tmp_path / "m-q4_0.gguf"


def test_an_empty_repository_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither config nor GGUF."""
    hub_with(monkeypatch, tmp_path, ["README.md"])

    with pytest.raises(SpecError, match=r"no GGUF file and no config\.json"):
        fetch("org/name", weights=False)


@pytest.mark.parametrize(
    "name", ["", "name", "/", "org/", "/name", "a/b/c", "org/name:", "org/na me", "../x/y", "org/name\n", "ö/x"]
)
def test_what_is_no_repository_is_refused_before_the_network(name: str) -> None:
    """huggingface_hub answers with an exception of its own."""
    with pytest.raises(UsageError, match="names no repository"):
        fetch(name, weights=False)


@pytest.mark.parametrize(
    ("error", "what", "do"),
    [
        (http_error(errors.RepositoryNotFoundError, "401 Client Error.\nNot Found"), "has no repository org/name", "HF_TOKEN"),
        (http_error(errors.GatedRepoError, "403"), "org/name is gated", "https://huggingface.co/org/name"),
        (http_error(errors.HfHubHTTPError, "503 Server Error"), "the Hub refused org/name", "later"),
        (errors.LocalEntryNotFoundError("\ncannot find"), "cannot be reached", "catalogue"),
        (errors.OfflineModeIsEnabled(""), "cannot be reached", "catalogue"),
        (HTTP_ERROR("connection refused"), "cannot be reached", "catalogue"),
        (ConnectionResetError("reset"), "cannot be reached", "connect"),
        (OSError(errno.ENOSPC, "No space left on device"), "no room on disk", "HF_HOME"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no room on disk", "HF_HOME"),
        (RuntimeError("CAS service error : IO Error: No space left on device (os error 28)"), "no room on disk", "HF_HOME"),
        (RuntimeError("Data processing error: CAS service error"), "broke off", "HF_HUB_DISABLE_XET"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be stored", "HF_HOME"),
        (errors.HFValidationError("Repo id must ..."), "names no repository", "hf:"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else "",
)
def test_every_failure_of_the_hub_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, what: str, do: str
) -> None:
    """Its HTTP client's errors are not OSErrors, and a message may be empty."""
    hub_with(monkeypatch, tmp_path, SAFETENSORS).snapshot_fails = error

    with pytest.raises(HeadwiseError) as caught:
        fetch("org/name", weights=True)

    assert what in caught.value.what
    assert caught.value.why and "\n" not in caught.value.why
    assert do in caught.value.do


def test_a_cached_gguf_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of files came from the network alone."""
    hub = hub_with(monkeypatch, tmp_path, GGUFS)
    hub.listing_fails = HTTP_ERROR("no route to host")
    hub.cached = ["m-Q4_K_M.gguf"]

    assert fetch("org/name:Q4_K_M", weights=True) == tmp_path / "m-Q4_K_M.gguf"


@pytest.mark.parametrize("cache", ["empty", "absent"])
def test_a_gguf_that_is_not_cached_needs_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    """The error of the network was hidden by that of the cache."""

    def no_cache() -> None:
        raise errors.CacheNotFound("no cache", cache_dir=tmp_path)

    hub_with(monkeypatch, tmp_path, GGUFS).listing_fails = HTTP_ERROR("no route to host")
    if cache == "absent":
        monkeypatch.setattr(huggingface_hub, "scan_cache_dir", no_cache)

    with pytest.raises(SpecError) as caught:
        fetch("org/name:Q4_K_M", weights=True)

    assert "cannot be reached" in caught.value.what and "no route to host" in caught.value.why


def test_a_refused_listing_is_not_an_absent_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gated GGUF was reported as "cannot be reached"."""
    hub_with(monkeypatch, tmp_path, GGUFS).listing_fails = http_error(errors.GatedRepoError, "403")

    with pytest.raises(SpecError, match="is gated"):
        fetch("org/name:Q4_K_M", weights=True)


def test_without_huggingface_hub_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an extra; a plan works without it."""
    real = builtins.__import__

    def refuse(name: str, *args: Any, **more: Any) -> Any:
        if name.startswith("huggingface_hub"):
            raise ImportError("No module named 'huggingface_hub'")
        return real(name, *args, **more)

    for name in [n for n in sys.modules if n.startswith("huggingface_hub")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)

    with pytest.raises(SpecError, match="needs the package huggingface_hub") as caught:
        fetch("org/name", weights=False)

    assert "pip install" in caught.value.do
