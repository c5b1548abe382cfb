"""Options from flags, the environment, files and defaults: who wins, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from headwise.arguments import parser
from headwise.cli import main
from headwise.errors import UsageError
from headwise.options import BY_NAME, OPTIONS, VERBS, fill, settings
from headwise.planner.memory import SERVE_SLOTS


def resolved(verb: str, argv: list[str], env: dict[str, str], directory: Path) -> dict[str, object]:
    args = parser().parse_args([verb, *argv])
    fill(args, verb, env, directory)
    return vars(args)


@pytest.fixture
def layers(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A working directory and a home, with a file each."""
    home, work = tmp_path / "home", tmp_path / "work"
    (home / ".config/headwise").mkdir(parents=True)
    work.mkdir()
    (home / ".config/headwise/config.toml").write_text('context = 1\nslots = 1\nport = 1\nkv = "f16"\n[serve]\nubatch = 64\n')
    (work / "headwise.toml").write_text("context = 2\nslots = 2\nport = 2\n[serve]\nslots = 22\n")
    return work, {"HOME": str(home), "HEADWISE_CONTEXT": "3", "HEADWISE_PORT": "3"}


def test_a_flag_goes_before_the_environment_that_before_a_file_that_before_the_default(layers: tuple[Path, dict[str, str]]) -> None:
    work, env = layers
    found = resolved("serve", ["--port", "4"], env, work)

    assert (found["port"], found["context"], found["slots"], found["kv"], found["max_body"]) == (4, 3, 22, "f16", 32)
    assert found["ubatch"] == 64
    assert resolved("plan", [], env, work)["slots"] == 2  # a table is for its verb only
    assert resolved("plan", [], env, work)["ubatch"] is None
    sources = {s.option.name: s.source for s in settings("serve", env, work)}
    assert (sources["context"], sources["max_body"]) == ("HEADWISE_CONTEXT", "default")
    assert sources["slots"] == f"{work / 'headwise.toml'} [serve]"
    assert sources["kv"].endswith("headwise/config.toml")


def test_a_named_file_stands_in_place_of_both(layers: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    work, env = layers
    (tmp_path / "x.toml").write_text("slots = 9\n")
    found = resolved("serve", [], {**env, "HEADWISE_CONFIG": str(tmp_path / "x.toml")}, work)

    assert (found["slots"], found["kv"]) == (9, None)
    with pytest.raises(UsageError, match="is no file"):
        settings("serve", {"HEADWISE_CONFIG": str(tmp_path / "nowhere")}, work)


def test_the_xdg_directory_goes_before_the_home(tmp_path: Path) -> None:
    (tmp_path / "xdg/headwise").mkdir(parents=True)
    (tmp_path / "xdg/headwise/config.toml").write_text("slots = 5\n")
    env = {"HOME": str(tmp_path / "home"), "XDG_CONFIG_HOME": str(tmp_path / "xdg")}

    assert resolved("plan", [], env, tmp_path)["slots"] == 5


def test_further_models_are_named_once_or_at_each_start(tmp_path: Path) -> None:
    env = {"HEADWISE_MODEL": "a", "HEADWISE_FURTHER_MODELS": "b, c", "HEADWISE_KEEP_ALIVE": "10m", "HEADWISE_ONLY": "yes"}
    found = resolved("serve", [], env, tmp_path)

    assert (found["model"], found["further_models"], found["keep_alive"], found["only"]) == ("a", ["b", "c"], "10m", True)
    assert resolved("serve", ["x", "y"], env, tmp_path)["further_models"] == ["y"]
    assert resolved("serve", ["x"], {}, tmp_path)["further_models"] == []


def test_lists_are_replaced_and_switches_turned_off_by_flags(tmp_path: Path) -> None:
    """A flag that could only add, or only turn on, would not win."""
    env = {"HEADWISE_ALIAS": "a, b", "HEADWISE_ALLOW_FALLBACK": "on"}

    assert resolved("serve", [], env, tmp_path)["alias"] == ["a", "b"]
    assert resolved("serve", ["--alias", "c"], env, tmp_path)["alias"] == ["c"]
    assert resolved("serve", [], env, tmp_path)["allow_fallback"] is True
    assert resolved("serve", ["--no-allow-fallback"], env, tmp_path)["allow_fallback"] is False
    assert resolved("serve", [], {}, tmp_path)["alias"] == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("contxt = 5", "the key contxt is not known|context is one"),
        ("[serve]\nslot = 5", r"the key slot in \[serve\] is not known|slots is one"),
        ("[run]\nport = 5", r"the key port in \[run\] is not known"),
        ("[server]\nport = 5", "the key server is not known|serve is one"),
        ("serve = 5", "the key serve is not known|a table"),
        ("max-tokens = 5", "the key max-tokens is not known|max_tokens is one"),
        ('context = "5"', "context must be a whole number"),
        ("context = true", "context must be a whole number"),
        ("context = 5.5", "context must be a whole number"),
        ("allow_fallback = 1", "must be true or false"),
        ('alias = "a"', "must be a list of texts"),
        ("stall_seconds = 'x'", "must be a number"),
        ("[serve]\napi_key = 12345678", "api_key must be a text"),
        ("context = ", "cannot be read"),
        ("\x00", "cannot be read"),
    ],
)
def test_what_a_file_says_wrongly_is_refused_with_the_nearest_name(text: str, said: str, tmp_path: Path) -> None:
    """A misspelt key that is passed over is a setting that its owner believes in."""
    (tmp_path / "headwise.toml").write_text(text)
    with pytest.raises(UsageError) as caught:
        settings("serve", {}, tmp_path)
    for part in said.split("|"):
        assert re.search(part, str(caught.value)), str(caught.value)
    assert "headwise.toml" in str(caught.value)
    assert "12345678" not in str(caught.value)


def test_a_variable_is_refused_where_it_is_misspelt_and_let_be_where_it_is_none_of_ours(tmp_path: Path) -> None:
    """Kubernetes gives each process HEADWISE_SERVICE_HOST and HEADWISE_PORT_7433_TCP where a service is called headwise."""
    settings("serve", {"HEADWISE_SERVICE_HOST": "x", "HEADWISE_PORT_7433_TCP": "y", "HEADWISE_KV": ""}, tmp_path)
    for name, near in (
        ("HEADWISE_CONTXT", "HEADWISE_CONTEXT"),
        ("HEADWISE_APIKEY", "HEADWISE_API_KEY"),
        ("HEADWISE_SLOT", "HEADWISE_SLOTS"),
    ):
        with pytest.raises(UsageError, match=name) as caught:
            settings("serve", {name: "1"}, tmp_path)
        assert near in str(caught.value)
    with pytest.raises(UsageError, match="HEADWISE_CONTEXT must be a whole number"):
        settings("serve", {"HEADWISE_CONTEXT": "4k"}, tmp_path)
    with pytest.raises(UsageError, match="must be true or false"):
        settings("serve", {"HEADWISE_ALLOW_FALLBACK": "maybe"}, tmp_path)


@pytest.mark.parametrize("verb", VERBS)
def test_the_flags_are_the_table(verb: str) -> None:
    """A second list would drift."""
    names = {o.name for o in OPTIONS if verb in o.verbs}
    parsed = parser().parse_args([verb])
    action = next(a for a in parser()._actions if getattr(a, "choices", None) and verb in a.choices)
    flags = {a.dest for a in action.choices[verb]._actions}

    assert names <= flags
    assert not {n for n in names if getattr(parsed, n, None) is not None}  # nothing is set before `fill`


def test_headwise_config_says_who_said_what(tmp_path: Path) -> None:
    (tmp_path / "headwise.toml").write_text('slots = 3\napi_key = "sesame"\n')
    argv = [sys.executable, "-m", "headwise", "config"]
    env = {"HEADWISE_KV": "q8_0", "HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1]), "COLUMNS": "400"}
    shown = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=env)
    told = json.loads(subprocess.run([*argv, "serve", "--json"], capture_output=True, text=True, cwd=tmp_path, env=env).stdout)

    rows = {line.split()[0]: line for line in shown.stdout.splitlines()}
    assert "headwise.toml" in rows["slots"] and "serve, plan" in rows["slots"]
    assert "HEADWISE_KV" in rows["kv"]
    assert "default" in rows["port"]
    assert "sesame" not in shown.stdout + json.dumps(told)
    assert {o["name"]: o["value"] for o in told["options"]}["slots"] == 3


def test_a_wrong_file_stops_a_command_with_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "headwise.toml").write_text("slotz = 3\n")
    monkeypatch.chdir(tmp_path)

    assert main(["plan", "gemma-4-e2b", "--json"]) == 2
    assert "slots is one" in json.loads(capsys.readouterr().out)["error"]["do"]


def test_slots_that_nobody_sets_are_said_with_their_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The planner's number stands in the words of the option: an import would cost every start a fifth of a second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    assert main(["config", "serve"]) == 0
    assert "agents make parallel" in capsys.readouterr().out
    for words in (BY_NAME["slots"].help, BY_NAME["slots"].unset):
        assert f"up to {SERVE_SLOTS}" in words


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_verb_and_flag(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("serve", "doctor", "stall", "kv-global", "allow-fallback"):
        assert word in script
    if found := shutil.which(shell):
        checked = subprocess.run([found, "-n"], input=script, capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, "")


def test_bash_completes_a_verb_and_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    main(["completion", "bash"])
    script = capsys.readouterr().out

    def completed(*words: str) -> list[str]:
        ask = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _shtab_headwise; echo ${{COMPREPLY[@]}}"
        return subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True).stdout.split()

    assert completed("headwise", "ser") == ["serve"]
    assert completed("headwise", "serve", "--stall") == ["--stall-seconds"]
