"""Every option of a config, each listed once: kind, default, meaning and fate. Messages and docs come from here.

Fates:
    used       read by a run under its own name
    mapped     NeMo's or LDM's key, read by a run as something of ours (the meaning says what)
    no effect  accepted, since shipped YAML files carry it; changes nothing, for the reason given
    refused    accepted at its default only; anything else is an error, for the reason given
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import cache
from typing import Any, Literal

from latentsmith.files.errors import BadInput

from .value_types import ValueType

Fate = Literal["used", "mapped", "no effect", "refused"]


@dataclass(frozen=True)
class Option:
    key: str
    kind: ValueType
    default: Any
    meaning: str
    fate: Fate = "used"
    reason: str = ""
    also: tuple[str, ...] = ()  # what people call it elsewhere; used only to suggest the right key
    optional: bool = False  # a step taken only if named, in the order of the names: never filled in

    @property
    def leaf(self) -> str:
        return self.key.rpartition(".")[2]

    @property
    def parent(self) -> str:
        return self.key.rpartition(".")[0]

    @property
    def filled(self) -> bool:
        """Whether the default is written into a composed config (keys without effect appear only if given)."""
        return self.fate in ("used", "mapped") and not self.optional

    def read(self, value: Any, source: str) -> Any:
        """The value as a run uses it. Raises BadInput for a wrong type or range, or a refused value."""
        if value is None and self.kind.nullable:
            return None
        try:
            result = self.kind.read(value)
        except (ValueError, TypeError, OverflowError):
            raise BadInput(f"{source}: {self.key} must be {self.kind.words}, not {value!r}") from None
        if self.fate == "refused" and result != self.default:
            default = json.dumps(self.default)
            raise BadInput(f"{source}: {self.key}={result} is refused: {self.reason}; leave it at {default}")
        return result


def used(
    key: str, kind: ValueType, default: Any, meaning: str, also: Iterable[str] = (), optional: bool = False
) -> Option:
    return Option(key, kind, default, meaning, also=tuple(also), optional=optional)


def mapped(key: str, kind: ValueType, default: Any, meaning: str) -> Option:
    return Option(key, kind, default, meaning, "mapped")


def no_effect(key: str, kind: ValueType, default: Any, meaning: str, reason: str) -> Option:
    return Option(key, kind, default, meaning, "no effect", reason)


def refused(key: str, kind: ValueType, default: Any, meaning: str, reason: str) -> Option:
    return Option(key, kind, default, meaning, "refused", reason)


def group(prefix: str, *options: Option) -> list[Option]:
    return [replace(option, key=f"{prefix}.{option.key}") for option in options]


@cache
def table() -> dict[str, Option]:
    """Every option by its full key, in the order of the docs."""
    from . import schema_data, schema_infer, schema_model, schema_run

    options = [*schema_run.OPTIONS, *schema_model.OPTIONS, *schema_data.OPTIONS, *schema_infer.OPTIONS]
    assert len({option.key for option in options}) == len(options)
    return {option.key: option for option in options}


@cache
def groups() -> frozenset[str]:
    """Every inner node: "model", "model.optim", ..."""
    parts = [key.split(".") for key in table()]
    return frozenset(".".join(part[:depth]) for part in parts for depth in range(1, len(part)))


def find(key: str) -> Option | None:
    """The option that `key` belongs to: its own, or the free mapping it lies in; None if there is neither."""
    options = table()
    if key in options:
        return options[key]
    while key := key.rpartition(".")[0]:
        if key in options:
            return options[key] if options[key].kind.free else None
    return None


def unknown_key(key: str, source: str) -> BadInput:
    if above := next((option for option in table().values() if key.startswith(f"{option.key}.")), None):
        return BadInput(f"{source}: {above.key} must be {above.kind.words}, not a mapping")
    hint = nearest(key)
    advice = f"did you mean {hint}?" if hint else "`latentsmith config explain` lists every option"
    return BadInput(f"{source}: {key} is not an option; {advice}")


def _ratio(first: str, second: str) -> float:
    return SequenceMatcher(None, first, second).ratio()


def nearest(key: str) -> str | None:
    """The known key most like this one in name and place; None where no name is like it."""
    parent, _, leaf = key.rpartition(".")

    def name_likeness(option: Option) -> float:
        elsewhere = max((_ratio(leaf.lower(), name) for name in option.also), default=0.0)
        return max(_ratio(leaf.lower(), option.leaf.lower()), 0.9 * elsewhere)

    alike = [(name_likeness(option), option) for option in table().values()]
    candidates = {option.key: name + 0.5 * _ratio(parent, option.parent) for name, option in alike if name >= 0.6}
    return max(candidates, key=candidates.__getitem__, default=None)
