"""A config that remembers which of its keys were read, so that none is dropped in silence.

Shared by the two doors (`hf.py`: config.json, `gguf_model.py`: GGUF metadata): take every key that you use, then call
`refuse_unread`.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Collection, Mapping
from typing import Any

from headwise.errors import SpecError

MAX_INT = 2**31 - 1  # no real size, count or id is larger; a larger one is a damaged file
MAX_LAYERS = 4096
MAX_HEAD_DIM = 16_384


def shown(value: object) -> str:
    """`value` as an error shows it: escaped, and short."""
    try:
        text = repr(value)
    except RecursionError:  # nested deeper than Python prints
        text = f"a {type(value).__name__} nested without end"
    return text if len(text) <= 60 else text[:57] + "..."


class Config:
    """Typed, bounded reads of `values`; every failure is a SpecError that names the key, its value and `where`.

    Args:
        ignore: keys that may stay unread, here and in every section: what the user gave as --ignore-key.
    """

    def __init__(self, values: Mapping[str, Any], *, where: str, ignore: Collection[str] = ()) -> None:
        self.values, self.where = values, where
        self._unread, self._ignore = set(values), ignore

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def raw(self, key: str, default: Any = None) -> Any:
        """The value as it stands; null counts as absent."""
        self._unread.discard(key)
        value = self.values.get(key)
        return default if value is None else value

    def _wrong(self, key: str, value: object, wanted: str) -> SpecError:
        return SpecError(f"{self.where}: {key} = {shown(value)}", why=f"must be {wanted}", do="check the file against its source")

    def missing(self, key: str) -> SpecError:
        near = difflib.get_close_matches(key, self.values, n=1)
        hint = f"; the nearest key there is {near[0]!r}" if near else ""
        return SpecError(
            f"{self.where}: {key} is missing", why=f"this family needs it{hint}", do="check the file against its source"
        )

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = MAX_INT) -> int:
        value = self.raw(key, default)
        if value is None:
            raise self.missing(key)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._wrong(key, value, f"a whole number from {least} to {most}")
        return value

    def optional_integer(self, key: str, *, least: int = 1) -> int | None:
        return self.integer(key, least=least) if key in self else self.raw(key)

    def number(self, key: str, default: float | None = None, *, least: float = 1e-30, most: float = 1e30) -> float:
        value = self.raw(key, default)
        if value is None:
            raise self.missing(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise self._wrong(key, value, f"a number from {least:g} to {most:g}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return self.number(key) if key in self else self.raw(key)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.raw(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def choice(self, key: str, options: Collection[str], default: str | None = None) -> str:
        value = self.raw(key, default)
        if value is None:
            raise self.missing(key)
        if not isinstance(value, str) or value not in options:
            raise self._wrong(key, value, f"one of {', '.join(sorted(options))}")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """The maths here covers these values and no other; absent is fine."""
        value = self.raw(key)
        if value is not None and value not in allowed:
            raise self._wrong(key, value, f"{' or '.join(repr(a) for a in allowed)} (nothing else is built here)")

    def section(self, key: str) -> Config:
        value = self.raw(key, {})
        if not isinstance(value, Mapping):
            raise self._wrong(key, value, "an object")
        return Config(value, where=f"{self.where} {key}", ignore=self._ignore)

    def strings(self, key: str, *, options: Collection[str], length: int) -> list[str] | None:
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != length or any(not isinstance(v, str) or v not in options for v in value):
            raise self._wrong(key, value, f"a list of {length} out of {', '.join(sorted(options))}")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """A token id or a list of them."""
        value = self.raw(key, [])
        listed = value if isinstance(value, list) else [value]
        if any(isinstance(v, bool) or not isinstance(v, int) or not 0 <= v <= MAX_INT for v in listed):
            raise self._wrong(key, value, "a token id or a list of token ids")
        return tuple(listed)

    def refuse_unread(self, *, harmless: Collection[str], ignore: Collection[str] = ()) -> None:
        """Raises SpecError for a key that was neither read nor is known to change nothing."""
        known = {*harmless, *ignore, *self._ignore}
        left = sorted(k for k in self._unread if k not in known and self.values[k] is not None)
        if left:
            more = [key if key.isprintable() and len(key) <= 60 else shown(key) for key in left[1:20]] + ["..."] * (len(left) > 20)
            flags = [f"--ignore-key {shlex.quote(key if key.isprintable() else shown(key))}" for key in left]
            raise SpecError(
                f"{self.where}: key {shown(left[0])} = {shown(self.values[left[0]])} is not known",
                why="a key that nobody reads may change the maths" + (f"; also {', '.join(more)}" if more else ""),
                do=" ".join(flags) + "   to go on without",
            )
