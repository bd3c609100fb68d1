"""Compose and check the config of a run: options, presets, overrides."""

from .compose import Composed, compose, load_config, presets, require_config
from .run_options import Config
from .tree import replaced, to_tree, to_yaml

__all__ = [
    "Composed",
    "Config",
    "compose",
    "load_config",
    "presets",
    "replaced",
    "require_config",
    "to_tree",
    "to_yaml",
]
