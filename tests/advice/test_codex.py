"""The files for Codex parse, say what the server is, and never replace a file that is there."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from headwise.advice.codex import codex_config, write
from headwise.cli import main
from headwise.errors import PlanError, UsageError

ENTRY = {  # what Codex 0.169.0 wants of a model at least
    "slug", "display_name", "supported_reasoning_levels", "shell_type", "visibility", "supported_in_api", "priority",
    "support_verbosity", "truncation_policy", "experimental_supported_tools", "base_instructions",
}  # fmt: skip


def files(**kwargs: object) -> tuple[dict, dict]:
    advice = codex_config(env={}, **kwargs)  # type: ignore[arg-type]
    config, models = (block.text for block in advice.blocks)
    return tomllib.loads(config), json.loads(models)


@pytest.mark.parametrize("name", ["tiny-hybrid", "gemma4:26b", 'odd "name" \\ here', "Größe/模型:7b"])
def test_the_files_parse_and_name_one_model(name: str) -> None:
    config, models = files(model=name, context=16_384, port=11434)
    (entry,) = models["models"]
    provider = config["model_providers"][config["model_provider"]]

    assert config["model"] == entry["slug"] == name
    assert provider["base_url"] == "http://127.0.0.1:11434/v1"
    assert provider["wire_api"] == "responses"  # chat is an error at start
    assert "profiles" not in config and "profile" not in config  # so is a legacy profile
    assert set(entry) >= ENTRY
    assert entry["context_window"] == 16_384


def test_the_context_is_the_models_own_unless_the_server_has_fewer() -> None:
    assert files()[1]["models"][0]["context_window"] == 65_536
    assert files(model="gemma4:26b")[1]["models"][0]["context_window"] == 262_144
    assert files(model="gemma4:26b", context=50_000)[1]["models"][0]["context_window"] == 50_000
    assert "7433" in files()[0]["model_providers"]["headwise"]["base_url"]


@pytest.mark.parametrize("name", ["gpt-5.5", "o3", "codex-mini", "openai/gpt-4o", "GPT-6.1-sol"])
def test_a_name_of_openai_is_refused(name: str) -> None:
    """At such a name Codex sends requests that no local server knows."""
    with pytest.raises(UsageError, match="OpenAI"):
        codex_config(model=name, context=32_768, env={})
    assert codex_config(model="gpt-oss:20b", env={}).context == 131_072


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"model": "nobody-knows-it"}, UsageError),
        ({"model": ""}, UsageError),
        ({"model": "a\nb", "context": 32_768}, UsageError),
        ({"port": 0}, UsageError),
        ({"port": 65_536}, UsageError),
        ({"context": 0}, UsageError),
        ({"context": 65_537}, UsageError),
        ({"context": 4096}, PlanError),
    ],
)
def test_what_makes_no_sense_is_refused(kwargs: dict, error: type[Exception]) -> None:
    with pytest.raises(error):
        codex_config(env={}, **kwargs)


def test_files_are_written_once_and_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A config.toml holds a user's own settings; one command must not lose them."""
    there = tmp_path / "new"
    assert main(["codex-config", "--write", str(there)]) == 0
    out = capsys.readouterr().out
    before = {p.name: p.read_bytes() for p in there.iterdir()}
    assert set(before) == {"config.toml", "headwise-models.json"}
    assert f"wrote {there / 'config.toml'}" in out and f"CODEX_HOME={there} codex" in out

    assert main(["codex-config", "--write", str(there)]) == 0
    assert "already, the same" in capsys.readouterr().out
    assert main(["codex-config", "--write", str(there), "--port", "8080"]) == 2
    assert f"--write {there / 'headwise'}" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in there.iterdir()} == before


def test_nothing_is_written_where_one_of_two_files_differs(tmp_path: Path) -> None:
    (tmp_path / "headwise-models.json").write_text("{}")
    with pytest.raises(UsageError, match="differs"):
        write(codex_config(env={}), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["headwise-models.json"]
    with pytest.raises(UsageError, match="cannot be written"):
        write(codex_config(env={}), tmp_path / "headwise-models.json" / "x")
