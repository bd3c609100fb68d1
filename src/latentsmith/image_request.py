"""Define what an image is made from. Every option's name, default, bounds, help and spellings are stated here, once.

`ImageRequest` holds what each image has for itself, `SamplingOptions` what the images of a batch share. From their
fields follow the keywords of `Pipeline`, the options of `latentsmith generate`, NeMo's `infer` keys and PNG metadata.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from latentsmith.files.errors import BadInput

if TYPE_CHECKING:
    import torch
    from PIL import Image

LAST_SEED = 2**63 - 1
DISTINCT_SEEDS = 2**32  # torch's generator on a CPU takes the lower 32 bits of a seed
LONGEST_SIDE = 16_384  # pixels
MAX_PIXELS = 2**25  # of one image; its float32 pixels are 400 MB
TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


@dataclass(frozen=True)
class Option:
    """Description of an option.

    help: one line. low, high: bounds, both allowed. choices: the only values. flags: spellings on the command line, the
    documented one first. nemo: its key in NeMo's `infer`. aliases: keywords of other libraries, for error messages.
    axis: whether a contact sheet can run over it.
    """

    type: type
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    nemo: str | None = None
    aliases: tuple[str, ...] = ()
    axis: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raise BadInput, in one line, for a value that cannot be."""
        abstract: Any = {int: Integral, float: Real, str: str, bool: bool}[self.type]
        if not isinstance(value, abstract) or (isinstance(value, bool) and self.type is not bool):
            raise BadInput(f"{name} is {value!r}; it must be {TYPE_NAMES[self.type]}")
        if self.type is float and not math.isfinite(value):
            raise BadInput(f"{name} is {value}; it must be a finite number")
        if self.choices and value not in self.choices:
            raise BadInput(f"{name} {value!r} is not one of {', '.join(self.choices)}")
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            limits = f"at least {self.low}" if self.high is None else f"between {self.low} and {self.high}"
            raise BadInput(f"{name} is {value}; it must be {limits}")


def described(default: Any, description: Any) -> Any:
    """Return a dataclass field with a description, which `descriptions` finds."""
    default = {"default_factory": dict} if isinstance(default, dict) else {"default": default}
    return field(**default, metadata={"description": description})


def descriptions(cls: Any) -> dict[str, Any]:
    """Return the descriptions of the described fields of a dataclass by name."""
    return {each.name: each.metadata["description"] for each in fields(cls) if "description" in each.metadata}


def option(type: type, default: Any, help: str, **more: Any) -> Any:
    """Return a dataclass field that is described by an Option."""
    return described(default, Option(type, default, help, **more))


def check_options(checked: Any) -> None:
    for name, each in descriptions(checked).items():
        if (value := getattr(checked, name)) is not None:
            each.check(name, value)


def check_pixels(height: int, width: int) -> None:
    """Raise BadInput for an image of more than MAX_PIXELS."""
    if height * width > MAX_PIXELS:
        raise BadInput(f"an image of {height}x{width} has {height * width:,} pixels; at most {MAX_PIXELS:,} are made")


@dataclass(frozen=True, eq=False)
class ImageRequest:
    """One image to make.

    negative_prompt: None is the null text that the model was trained with, "" the encoded empty prompt.
    image: to start from. mask_image: of the image's size, white where to repaint; the rest is kept pixel for pixel.
    latents: noise of unit variance (channels, height / f, width / f) in place of the seed's.
    generator: draws the noise in place of the seed; several requests may share one, as in diffusers, and then an image
        depends on those before it.
    Raises BadInput, in one line, for values that cannot be.
    """

    prompt: str
    negative_prompt: str | None = option(
        str, None, "What to steer away from.", flags=("--negative", "--negative-prompt")
    )
    guidance_scale: float = option(
        float, 7.5, "How strongly the prompt counts; 1 is off.", nemo="unconditional_guidance_scale", axis=True,
        flags=("--guidance-scale", "--guidance", "--cfg"), aliases=("cfg_scale", "cfg", "scale"),
    )  # fmt: skip
    seed: int = option(
        int,
        0,
        "Image i of a prompt uses seed + i; generate takes -1 for a random one, which it prints.",
        low=0,
        high=LAST_SEED,
        flags=("--seed",),
        nemo="seed",
        axis=True,
    )
    variation_seed: int = option(
        int, 0, "Seed of the noise to vary towards.", low=0, high=LAST_SEED, flags=("--variation-seed",)
    )
    variation_strength: float = option(
        float, 0.0, "0 to 1: how far towards it.", low=0, high=1, flags=("--variation-strength",), axis=True
    )
    image: Image.Image | None = None
    mask_image: Image.Image | None = None
    latents: torch.Tensor | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise BadInput(f"prompt is {self.prompt!r}; it must be a text")
        if self.mask_image is not None and self.image is None:
            raise BadInput("a mask without an image: give the image that it is of")
        check_options(self)

    def metadata(self) -> dict[str, Any]:
        """Return what a PNG records: the prompt and every described field."""
        return {"prompt": self.prompt, **{name: getattr(self, name) for name in descriptions(ImageRequest)}}


@dataclass(frozen=True)
class SamplingOptions:
    """Options that the images of a batch are sampled with.

    height, width: in pixels; None: of the image to start from, else what the model was made for.
    timestep_spacing: "leading", "trailing" or "linspace"; None: as the checkpoint's scheduler config says.
    guidance_rescale: how far strong guidance is kept from overexposing. split_guidance: prompt and null text in two
        calls of the U-Net: slower, half the memory.
    eta: share of random noise, of samplers that can do without (ddim, euler, dpmsolver++).
    strength: of an image to start from: how much of it is repainted; 1 is all.
    prompt_syntax: "plain", or "webui" for (word:1.2), (word), [word] and <lora:name:0.8> as web UIs read them.
    long_prompts: what does not fit the text encoder is encoded in "chunks" of its length, or "cut", with a warning.
    clip_skip: the text encoder's last layer that is used, counted from the end of those that the model has: 1 is its
        usual output. As kohya and web UIs count; diffusers' clip_skip is 1 less.
    vae_tiling: decode and encode in overlapping tiles: bounded memory at any size, seams blended, not quite the same.
    parallelism, tolerance: of para_ddim.
    Raises BadInput, in one line, for values that cannot be.
    """

    height: int | None = option(
        int,
        None,
        "Pixels; by default what the model was trained at.",
        low=1,
        high=LONGEST_SIDE,
        flags=("--height", "-H"),
        nemo="height",
    )
    width: int | None = option(
        int,
        None,
        "Pixels; by default what the model was trained at.",
        low=1,
        high=LONGEST_SIDE,
        flags=("--width", "-W"),
        nemo="width",
    )
    num_inference_steps: int = option(
        int, 25, "Sampling steps.", low=1, nemo="inference_steps", axis=True,
        flags=("--steps", "--num-inference-steps"), aliases=("steps", "sampling_steps", "ddim_steps"),
    )  # fmt: skip
    sampler: str = option(
        str, "dpmsolver++", "dpmsolver++, ddim, euler, ...; Karras after it.", nemo="sampler_type", axis=True,
        flags=("--sampler",), aliases=("scheduler", "sampler_name", "sampler_type"),
    )  # fmt: skip
    timestep_spacing: str | None = option(
        str, None, "Of the timesteps: leading, trailing or linspace; by default as the model says.", axis=True,
        flags=("--spacing", "--timestep-spacing"), aliases=("spacing",),
    )  # fmt: skip
    eta: float = option(
        float, 0.0, "0 to 1: share of random noise in ddim.", low=0, high=1, flags=("--eta",), nemo="eta", axis=True
    )
    guidance_rescale: float = option(
        float, 0.0, "0 to 1: keeps strong guidance from overexposing.", low=0, high=1, axis=True,
        flags=("--guidance-rescale", "--rescale"),
    )  # fmt: skip
    split_guidance: bool = option(
        bool, False, "Prompt and null text one after the other: half the memory.", flags=("--split-guidance",)
    )
    strength: float = option(
        float, 0.75, "0 to 1: how much of the image to start from is repainted.", low=0, high=1, axis=True,
        flags=("--strength",), aliases=("denoising_strength",),
    )  # fmt: skip
    prompt_syntax: str = option(
        str,
        "plain",
        "webui reads (word:1.2) as a weight, <lora:name:0.8> as an adapter.",
        choices=("plain", "webui"),
        flags=("--prompt-syntax",),
    )
    long_prompts: str = option(
        str, "chunks", "Over 77 tokens: in chunks, or cut.", choices=("chunks", "cut"), flags=("--long-prompts",)
    )
    clip_skip: int = option(
        int, 1, "Last layer of the text encoder that is used, from its end, as web UIs count: 1, 2.", low=1,
        flags=("--clip-skip",), axis=True,
    )  # fmt: skip
    vae_tiling: bool = option(bool, False, "Decode in tiles: any size in bounded memory.", flags=("--vae-tiling",))
    parallelism: int = option(
        int, 8, "Steps at a time in para_ddim.", low=1, flags=("--parallelism",), nemo="sampler_parallelism"
    )
    tolerance: float = option(
        float, 0.1, "When para_ddim takes a step as done.", low=0, flags=("--tolerance",), nemo="sampler_tolerance"
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.height and self.width:
            check_pixels(self.height, self.width)

    @property
    def steps_from_image(self) -> int:
        """Return the steps done from an image: strength times the steps, rounded down, but for errors of floats."""
        return int(self.num_inference_steps * self.strength + 1e-9)

    @property
    def size(self) -> tuple[int, int]:
        """Return height and width of options that a pipeline has completed."""
        assert self.height is not None and self.width is not None
        return self.height, self.width


OPTIONS: dict[str, Option] = descriptions(ImageRequest) | descriptions(SamplingOptions)
AXES = {flag.lstrip("-").replace("-", "_"): name for name, each in OPTIONS.items() if each.axis for flag in each.flags}


def options_from_nemo(infer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ImageRequest and SamplingOptions that a section `infer` of NeMo's gives."""
    return {name: infer[each.nemo] for name, each in OPTIONS.items() if each.nemo and infer.get(each.nemo) is not None}


ELSEWHERE = {  # what keywords of diffusers' pipelines ask for, and what does it here
    "callback_on_step_end": "iterate over pipe.stream(prompt), which yields every step",
    "prompt_embeds": "give them to pipe.sample, and its latents to pipe.decode",
    "negative_prompt_embeds": "give them to pipe.sample, and its latents to pipe.decode",
}


def unknown_keyword(name: str, keywords: Mapping[str, Any]) -> str:
    """Return an error message for a keyword that is none of `keywords`, with the nearest one or what others call it."""
    spellings = {alias: keyword for keyword, each in OPTIONS.items() for alias in (*each.aliases, keyword)}
    spellings |= {keyword: keyword for keyword in keywords}
    near = get_close_matches(name, spellings, n=1, cutoff=0.75) or [k for k in spellings if k.startswith(f"{name}_")]
    hint = f"did you mean {spellings[near[0]]}?" if near else f"choose from {', '.join(keywords)}"
    hint = ELSEWHERE.get(name, hint)
    return f"unknown keyword {name!r}; {hint}"
