"""From a checkpoint and prompts to pictures."""

from latentsmith.text.tokenizer import Tokenizer

from .options import SamplingOptions
from .pipeline import Pipeline, SamplingStep

__all__ = ["Pipeline", "SamplingOptions", "SamplingStep", "Tokenizer"]
