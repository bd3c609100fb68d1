"""From a checkpoint and prompts to pictures."""

from .pipeline import Pipeline
from .tokenizer import Tokenizer

__all__ = ["Pipeline", "Tokenizer"]
