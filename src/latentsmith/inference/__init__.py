"""From a checkpoint and prompts to pictures."""

from .options import SamplingOptions
from .pipeline import Drawing, Pipeline
from .tokenizer import Tokenizer

__all__ = ["Drawing", "Pipeline", "SamplingOptions", "Tokenizer"]
