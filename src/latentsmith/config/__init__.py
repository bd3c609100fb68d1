"""What a run is made of: the table of options, presets, composition with overrides, checks, config -> objects."""

from latentsmith.config.build import build
from latentsmith.config.compose import Composed, compose, load_config

__all__ = ["Composed", "build", "compose", "load_config"]
