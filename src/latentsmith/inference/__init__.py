"""Prompts to images: `Pipeline`, and the commands around it."""

from latentsmith.image_request import ImageRequest, SamplingOptions
from latentsmith.text.tokenizer import Tokenizer

from .pipeline import Pipeline
from .requests import GeneratedImages, SamplingStep, sampler_name

__all__ = [
    "GeneratedImages",
    "ImageRequest",
    "Pipeline",
    "SamplingOptions",
    "SamplingStep",
    "Tokenizer",
    "sampler_name",
]
