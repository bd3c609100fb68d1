"""What a run is made of: the table of options, presets, composition with overrides, checks."""

from .compose import Composed, compose, load_config
from .typed import Config, replaced

__all__ = ["Composed", "Config", "compose", "load_config", "replaced"]
