"""What a log says, sorted into the loads of a model, each fact with the line it stands in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from headwise.doctor.finding import Evidence
from headwise.doctor.scan import Hit

Engine = Literal["llama.cpp", "ollama", "vllm"]
Value = str | int | float
SHOWN = 400  # characters of a line that are quoted
KEPT = 512  # facts of one name per load: a server's log repeats some lines for months
# These belong to the process, and to every model that it loads.
OF_THE_PROCESS = frozenset(
    "version build ollama_env gpu_ollama gpu_cuda gpu_rocm gpu_rocminfo gpu_device "
    "gpu_using gpu_metal gpu_vulkan no_gpu command engine".split()
)


@dataclass(frozen=True, slots=True)
class Fact:
    name: str
    value: Mapping[str, Value]
    where: Evidence

    def text(self, key: str, default: str = "") -> str:
        return str(self.value.get(key, default))

    def number(self, key: str, default: float = 0) -> float:
        found = self.value.get(key, default)
        return found if isinstance(found, int | float) else default

    def whole(self, key: str, default: int = 0) -> int:
        return int(self.number(key, default))


@dataclass(slots=True)
class Load:
    """One model being loaded by one process, and what came after it."""

    stream: str
    family: Literal["ggml", "vllm"]
    facts: dict[str, list[Fact]] = field(default_factory=dict)
    first_line: int = 0
    last_line: int = 0

    def add(self, fact: Fact) -> None:
        same = self.facts.setdefault(fact.name, [])
        if fact.name in _DISTINCT and any(f.value == fact.value for f in same):
            return
        if len(same) >= KEPT:
            del same[KEPT // 2]  # the first and the latest say most
        same.append(fact)
        self.last_line = fact.where.line or self.last_line

    def all(self, name: str) -> list[Fact]:
        return self.facts.get(name, [])

    def first(self, name: str) -> Fact | None:
        return self.facts[name][0] if self.facts.get(name) else None

    def last(self, name: str) -> Fact | None:
        return self.facts[name][-1] if self.facts.get(name) else None

    def has(self, *names: str) -> bool:
        return any(self.facts.get(n) for n in names)

    @property
    def engine(self) -> Engine:
        if self.family == "vllm":
            return "vllm"
        return (
            "ollama"
            if self.stream.startswith("ollama")
            or any(name.startswith(("ol_", "ollama")) or name == "gpu_ollama" for name in self.facts)
            else "llama.cpp"
        )

    @property
    def weight(self) -> int:
        """How much this load says about the model itself: a server's small talk after a load says nothing."""
        return sum(len(same) for name, same in self.facts.items() if name not in OF_THE_PROCESS and name not in _TALK)


_DISTINCT = frozenset("fa_node softmax_node layer_device metadata model".split())
_TALK = frozenset("prompt_eval eval progress released truncated_prompt vl_rates".split())
_NUMBER = re.compile(r"-?\d+")
_DECIMAL = re.compile(r"-?\d+\.\d+")


def fact(hit: Hit, source: str) -> Fact:
    value: dict[str, Value] = {}
    for key, text in hit.match.groupdict().items():
        if text is not None:
            text = text.strip()[:SHOWN] if key != "env" else text
            value[key] = (
                (int(text) if len(text) < 19 else text)
                if _NUMBER.fullmatch(text)
                else (float(text) if _DECIMAL.fullmatch(text) and len(text) < 19 else text)
            )
    return Fact(hit.row.name, value, Evidence(source, hit.number, hit.text.strip()[:SHOWN]))


def loads(hits: Iterable[Hit], source: str) -> list[Load]:
    """Every load that the lines tell of, in order of their last line.

    Lines of different processes (journald's or compose's name before them) are kept apart; so are a model loaded after
    another. Only the latest dozen of loads is kept: a server restarted a thousand times is diagnosed by its last starts.
    """
    open_: dict[tuple[str, str], Load] = {}
    done: list[Load] = []
    for hit in hits:
        family: Literal["ggml", "vllm"] = "vllm" if hit.row.name.startswith("vl_") else "ggml"
        key = (hit.stream, family)
        load = open_.get(key)
        if load is None or (hit.row.opens and load.has(*_BEGUN)):
            new = Load(hit.stream, family, first_line=hit.number)
            if load is not None:
                done.append(load)
                del done[:-12]
                for name in OF_THE_PROCESS & load.facts.keys():
                    if name != "command" or hit.row.opens == "model":  # a draft model is of the same command
                        new.facts[name] = list(load.facts[name])
            open_[key] = load = new
        load.add(fact(hit, source))
    return sorted((*done, *open_.values()), key=lambda x: x.last_line)


# A load that has one of these has begun: a line that opens a process, a model or Ollama's prelude to one starts the next.
_BEGUN = ("model_file", "metadata_file", "kv_size", "ol_memory", "ol_request", "vl_engine", "vl_backend", "offloaded", "fa_request")


def principal(found: list[Load]) -> Load | None:
    """The load to speak of: the latest model; of one process's models (a draft model is another) that with the largest cache."""
    telling = [x for x in found if x.weight]
    if not telling:
        return found[-1] if found else None
    latest = telling[-1]
    command = latest.last("command")
    beside = [x for x in telling if x.stream == latest.stream and x.family == latest.family and x.last("command") is command]
    if command is None:
        return latest
    return max(beside, key=lambda x: (_kv_mib(x), x.last_line))


def _kv_mib(load: Load) -> float:
    return sum(f.number("mib") for f in load.all("kv_size"))


def amounts(text: str) -> tuple[float, float]:
    """(bytes, half of the last digit shown) of "5.2 GiB", "651.0 MiB", "12 GB".

    Raises:
        ValueError: it is no amount.
    """
    found = re.fullmatch(r"([\d.]+) ?([KMGT]?)(i?)B", text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no amount of bytes")
    unit = (1024 if found[3] else 1000) ** " KMGT".index(found[2] or " ")
    digits = len(found[1].partition(".")[2])
    return float(found[1]) * unit, 0.5 * 10**-digits * unit


def evidence(*facts: Fact | None) -> tuple[Evidence, ...]:
    return tuple(f.where for f in facts if f is not None)


def pairs(env: str) -> Iterator[tuple[str, str]]:
    """Names and values of Go's `map[A:1 B:x y C:]`."""
    found = list(re.finditer(r"(?:(?<=\s)|^)([A-Za-z_][A-Za-z0-9_]*):(?!//)", env))
    for this, after in zip(found, [*found[1:], None], strict=True):
        yield this[1], env[this.end() : after.start() if after else len(env)].strip()
