"""The kinds of values an option can take: what to call them in a message, and how to read one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ValueType:
    """words: what the value must be, as in "must be <words>". read: value as given -> value as used, or ValueError."""

    words: str
    read: Callable[[Any], Any]
    nullable: bool = False  # null is a value of its own; elsewhere null means "not set", so the default
    literal: bool = False  # on the command line, text outside Hydra's grammar is taken as it stands
    free: bool = False  # keys inside it are not ours to name


def _refuse() -> Any:
    raise ValueError


def _as_number(value: Any) -> float | int:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    return float(value) if isinstance(value, str) else value


def _range_words(noun: str, low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"{noun} from {low:,} to {high:,}"
    return noun if low is None else f"{noun} of at least {low:,}"


def _within(value: Any, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def number(low: float | None = None, high: float | None = None) -> ValueType:
    """A float between two bounds, both included."""

    def read(value: Any) -> float:
        result = float(_as_number(value))
        return result if math.isfinite(result) and _within(result, low, high) else _refuse()

    return ValueType(_range_words("a number", low, high), read)


def whole(low: int | None = None, high: int | None = None) -> ValueType:
    """An int between two bounds; 1e5 counts as one."""

    def read(value: Any) -> int:
        given = _as_number(value)
        return int(given) if given == int(given) and _within(given, low, high) else _refuse()

    return ValueType(_range_words("a whole number", low, high), read)


def count_or_share() -> ValueType:
    """An int of at least 0, or a float from 0.0 to 1.0, as Lightning tells 1 (one) from 1.0 (all)."""

    def read(value: Any) -> int | float:
        if isinstance(value, float) and 0 <= value <= 1:
            return value
        given = _as_number(value)
        return int(given) if given == int(given) and given >= 0 else _refuse()

    return ValueType("a whole number of at least 0, or a share such as 0.5 or 1.0", read)


def text() -> ValueType:
    """A string; a bare YAML number (`name: 2024`) is read as its digits."""

    def read(value: Any) -> str:
        return str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else _refuse()

    return ValueType("text", read, literal=True)


def flag() -> ValueType:
    return ValueType("true or false", lambda value: value if isinstance(value, bool) else _refuse())


def choice(*names: str, aliases: dict[str, str] | None = None) -> ValueType:
    """One of `names`; `aliases` are other spellings (compared as text, so 16 and "16" are the same)."""
    spellings = (aliases or {}) | {name: name for name in names}
    return ValueType("one of " + ", ".join(names), lambda value: spellings.get(str(value)) or _refuse(), literal=True)


def list_of(item: ValueType, length: int | None = None, *, least: int = 0) -> ValueType:
    def read(value: Any) -> list[Any]:
        if not isinstance(value, (list, tuple)) or length not in (None, len(value)) or len(value) < least:
            raise ValueError
        return [item.read(entry) for entry in value]

    count = "a list" if length is None else f"a list of {length}"
    return ValueType(f"{count}, each {item.words}", read, literal=item.literal)


def either(*kinds: ValueType) -> ValueType:
    """The first kind that can read the value."""

    def read(value: Any) -> Any:
        for kind in kinds:
            try:
                return kind.read(value)
            except (ValueError, TypeError, OverflowError):
                continue
        raise ValueError

    return ValueType(" or ".join(kind.words for kind in kinds), read, literal=any(kind.literal for kind in kinds))


def nullable(kind: ValueType) -> ValueType:
    def read(value: Any) -> Any:
        return None if value is None else kind.read(value)

    return ValueType(f"{kind.words}, or null", read, nullable=True, literal=kind.literal)


def size() -> ValueType:
    """[height, width] in pixels from 512, "512, 512" (NeMo's spelling) or [512, 512]."""

    def read(value: Any) -> list[int]:
        if isinstance(value, bool):
            raise ValueError
        parts = value.split(",") if isinstance(value, str) and "," in value else value
        numbers = [int(part) for part in parts] if isinstance(parts, (list, tuple)) else [int(parts)] * 2
        return numbers if len(numbers) == 2 and min(numbers) >= 1 else _refuse()

    return ValueType('pixels as one number, [height, width] or "height, width"', read, literal=True)


def mapping() -> ValueType:
    """A free mapping whose keys we do not name."""
    return ValueType("a mapping", lambda value: value if isinstance(value, dict) else _refuse(), free=True)


def anything() -> ValueType:
    return ValueType("anything", lambda value: value, nullable=True, literal=True, free=True)
