"""The command line: one short file per command. Help needs nothing heavy, so commands import what they run."""

from .main import main

__all__ = ["main"]
