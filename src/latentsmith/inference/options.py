"""How pictures are drawn, as one value, and what is wrong with it."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from latentsmith.diffusion import SAMPLERS, TIMESTEP_SPACINGS, canonical_sampler
from latentsmith.files.errors import BadInput

SYNTAXES = ("plain", "webui")
LONG_PROMPTS = ("chunks", "cut")
FRACTIONS = ("eta", "guidance_rescale", "variation_strength", "strength")


@dataclass(frozen=True)
class SamplingOptions:
    """How pictures are drawn.

    height, width: in pixels. steps, sampler: as `diffusion.sampling_schedule` takes them. spacing: of its timesteps,
        "leading", "trailing" or "linspace"; None: as the checkpoint's scheduler config says.
    guidance_scale: one for all, or one each. guidance_rescale: in [0, 1], how far strong guidance is kept from
        overexposing. split_guidance: prompt and null text in two calls of the U-Net: slower, half the memory.
    eta: in [0, 1], share of random noise, of samplers that can do without (ddim, euler, dpmsolver++).
    strength: in (0, 1], of a picture to start from: how much of it is redrawn; 1 is all.
    variation_strength: in [0, 1], how far the start goes from the seeds' noise to that of the variation seeds.
    prompt_syntax: "plain", or "webui" for (word:1.2), (word), [word] as web UIs read them.
    long_prompts: what does not fit the text encoder is read in "chunks" of their own, or "cut", with a warning.
    vae_tiling: decode and encode in overlapping tiles: bounded memory at any size, seams blended, not quite the same.
    parallelism, tolerance: of para_ddim.
    Raises BadInput, in one line, for values that cannot be.
    """

    height: int
    width: int
    steps: int = 25
    guidance_scale: float | Sequence[float] = 7.5
    sampler: str = "dpmsolver++"
    spacing: str | None = None
    eta: float = 0.0
    guidance_rescale: float = 0.0
    split_guidance: bool = False
    strength: float = 0.75
    variation_strength: float = 0.0
    prompt_syntax: str = "plain"
    long_prompts: str = "chunks"
    vae_tiling: bool = False
    parallelism: int = 8
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        for name in ("height", "width", "steps", "parallelism"):
            if not isinstance(value := getattr(self, name), int) or isinstance(value, bool):
                raise BadInput(f"{name} is {value!r}; it must be a whole number")
        if self.height < 1 or self.width < 1:
            raise BadInput(f"pictures of {self.height}x{self.width}: both sides must be above 0")
        for name in ("guidance_scale", *FRACTIONS, "tolerance"):
            given = getattr(self, name)
            several = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
            if not all(isinstance(one, int | float) for one in several):
                raise BadInput(f"{name} is {given!r}; it must be a number")
        scales = self.guidance_scale if isinstance(self.guidance_scale, Sequence) else [self.guidance_scale]
        if not all(math.isfinite(scale) for scale in scales):
            raise BadInput(f"guidance_scale is {self.guidance_scale}; it must be a finite number")
        for name in FRACTIONS:
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"{name} is {getattr(self, name)}; it must be between 0 and 1")
        choices = {"spacing": TIMESTEP_SPACINGS, "prompt_syntax": SYNTAXES, "long_prompts": LONG_PROMPTS}
        for name, known in choices.items():
            if (value := getattr(self, name)) is not None and value not in known:
                raise BadInput(f"{name} {value!r} is not one of {', '.join(known)}")
        if self.eta > 0 and not self.takes_eta:
            raise BadInput(f"eta {self.eta}: {self.sampler} has no share of noise to choose; ddim has")
        if self.parallelism < 1 or not self.tolerance >= 0:
            raise BadInput(f"parallelism {self.parallelism} must be at least 1, tolerance {self.tolerance} at least 0")

    @property
    def sampler_name(self) -> str:
        """The sampler's own name; BadInput for an unknown one."""
        try:
            return canonical_sampler(self.sampler, SAMPLERS)[0]
        except ValueError as error:
            raise BadInput(str(error)) from None

    @property
    def takes_eta(self) -> bool:
        chosen = SAMPLERS[self.sampler_name]
        return not chosen.random and "eta" in inspect.signature(chosen.solve).parameters

    @property
    def sampler_options(self) -> dict[str, Any]:
        """What the sampler's function takes besides."""
        if self.sampler_name == "para_ddim":
            return {"parallelism": self.parallelism, "tolerance": self.tolerance}
        return {"eta": self.eta} if self.eta > 0 else {}


def one_each(name: str, given: Any, count: int) -> list[Any]:
    """One of what is `given` for each of `count` prompts, of one for all or a sequence; BadInput for another count."""
    several = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given] * count
    if len(several) != count:
        raise BadInput(f"{len(several)} {name} for {count} prompts; give one, or one each")
    return several
