"""`option(...)`: what a field of a config section may be, and what it means, beside the field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentsmith.image_request import described

from .value_types import ValueType, value_type


@dataclass(frozen=True)
class OptionField:
    """Hold what `option` records of a field; the schema adds its key and the type that its annotation gives."""

    default: Any
    meaning: str
    aliases: tuple[str, ...]
    constraints: Mapping[str, Any]
    own_type: ValueType | None

    def value_type(self, annotation: Any) -> ValueType:
        return self.own_type or value_type(annotation, **self.constraints)


def option(
    default: Any,
    meaning: str,
    *,
    aliases: tuple[str, ...] = (),
    type: ValueType | None = None,
    **constraints: Any,
) -> Any:
    """Return a dataclass field that is an option of the config.

    meaning: help, in one line. aliases: what people call it elsewhere; a message suggests the right key. type: where
    the annotation and the constraints do not say it all. constraints: keywords of `value_types.value_type`.
    """
    return described(default, OptionField(default, meaning, aliases, constraints, type))
