"""Prompts to pictures: text encoder, guided U-Net, sampler, VAE."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentsmith.checkpoints import Checkpoint, ModelSpec, match, open_checkpoint, reads_as_open_clip, spec_of
from latentsmith.diffusion import (
    SAMPLERS,
    Denoiser,
    GuidedDenoiser,
    NoiseSchedule,
    SamplingGrid,
    Step,
    canonical_sampler,
    sample,
    sampling_grid,
)
from latentsmith.files.errors import BadInput
from latentsmith.models import AutoencoderKL, ClipTextEncoder, UNetModel

from .scaling import to_vae_latents
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class SamplingOptions:
    """How pictures are drawn. Sizes are in pixels; steps and sampler as `diffusion.sampling_grid` takes them."""

    height: int
    width: int
    steps: int = 25
    guidance_scale: float = 7.5
    sampler: str = "dpmsolver++"


class Pipeline:
    """A whole model, ready to draw: `pipeline(["a red circle"])` gives pictures.

    Parts can be replaced: unet, vae, text_encoder, tokenizer, schedule; spec says what else the model is.
    """

    def __init__(
        self, unet: UNetModel, vae: AutoencoderKL, text_encoder: ClipTextEncoder, tokenizer: Tokenizer, spec: ModelSpec
    ):
        self.unet, self.vae, self.text_encoder, self.tokenizer, self.spec = unet, vae, text_encoder, tokenizer, spec
        self.schedule = NoiseSchedule.from_config(
            spec.linear_start, spec.linear_end, spec.beta_schedule, spec.timesteps
        )
        if spec.zero_terminal_snr:
            self.schedule = self.schedule.zero_terminal_snr()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        prediction_type: str | None = None,
        weights: str = "ema",
        tokenizer: str | Path | None = None,
        pad_to: int | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Pipeline":
        """Open a run folder, a diffusers folder, a single file, a .nemo or a hub name ("owner/name").

        prediction_type: overrides what the checkpoint says. weights: "ema" or "raw". tokenizer: a folder or file to
        use in place of the checkpoint's own. pad_to: length up to which text embeddings are filled with zeros, as NeMo
        trains v1 with 80; 0: not at all; None: as the checkpoint was trained. device: "auto" (cuda, mps, cpu) by
        default. dtype: float32 by default.
        Raises BadInput for a file that cannot be read or is not a whole model.
        """
        checkpoint = open_checkpoint(path, weights)
        spec = spec_of(checkpoint, prediction_type)
        if pad_to is not None:
            spec = replace(spec, cond_stage_config={**spec.cond_stage_config, "pad_to": pad_to or None})
        networks = {
            "unet": loaded(UNetModel, spec.unet_config, checkpoint, "unet"),
            "vae": loaded(AutoencoderKL, spec.first_stage_config, checkpoint, "vae"),
            "text_encoder": loaded(ClipTextEncoder, spec.cond_stage_config, checkpoint, "text_encoder"),
        }
        length = networks["text_encoder"].max_length
        open_clip = reads_as_open_clip(checkpoint, spec)
        words = Tokenizer.find(tokenizer, checkpoint.path, length, cleaning="open_clip" if open_clip else None)
        place, kind = torch.device(pick_device(device)), dtype or torch.float32
        for network in networks.values():
            network.to(place, kind).eval().requires_grad_(False)
        return cls(tokenizer=words, spec=spec, **networks)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def image_size(self) -> int:
        """Side in pixels of the pictures that the model was made for."""
        return self.spec.image_size * self.vae.downsampling

    def __call__(
        self,
        prompts: str | Sequence[str],
        negative_prompts: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        steps: int = 25,
        guidance_scale: float = 7.5,
        sampler: str = "dpmsolver++",
        seed: int | Sequence[int] = 0,
        latents: Tensor | None = None,
        batch_size: int = 8,
    ) -> list[Image.Image]:
        """One picture for each prompt.

        negative_prompts: one for all or one each; None uses the null text that the model was trained with, "" always
        encodes the empty prompt. seed: of the noise; one for all, or one each. latents: noise of unit variance
        (prompts, channels, height / f, width / f) to start from in place of the seeds'. batch_size: pictures at a time.
        Raises BadInput for sizes that VAE and U-Net cannot halve, unknown samplers, steps out of range.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        options = SamplingOptions(height or self.image_size, width or self.image_size, steps, guidance_scale, sampler)
        self.check(prompts, options)
        seeds = one_each("seeds", seed, len(prompts))
        negatives = one_each("negative prompts", negative_prompts, len(prompts))
        noise = self.noise(seeds, options)
        if latents is not None and latents.shape != noise.shape:
            raise BadInput(
                f"latents are {tuple(latents.shape)}; {len(prompts)} pictures of {options.height}x{options.width} "
                f"start from {tuple(noise.shape)}"
            )
        noise = noise if latents is None else latents
        pictures: list[Image.Image] = []
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            *_, last = self.stream(prompts[part], negatives[part], noise[part], seeds[part], options)
            pictures += to_pictures(self.decode(last.latents))
        return pictures

    @torch.no_grad()
    def stream(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str | None],
        noise: Tensor,
        seeds: Sequence[int],
        options: SamplingOptions,
    ) -> Iterator[Step]:
        """Every step of one batch, so that the caller owns progress, previews and stopping; the last Step's latents
        are the result, scaled. noise: (prompts, channels, height / f, width / f), unit variance."""
        grid = self.grid(options)
        denoiser = Denoiser(self.unet, self.schedule, self.spec.prediction_type, timestep_at=grid.timestep_at)
        context = {"context": self.embed(prompts)}
        null = {"context": self.embed_null(negatives)} if options.guidance_scale != 1 else None
        guided = GuidedDenoiser(denoiser, context, null, options.guidance_scale)
        draws = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        shape = noise.shape[1:]
        for generator in draws:  # the start took the first draw of each seed
            torch.randn(shape, generator=generator)

        def noise_at(step: int) -> Tensor:
            return torch.stack([torch.randn(shape, generator=g) for g in draws]).to(self.device)

        yield from sample(options.sampler, guided, noise.to(self.device), grid, noise_at=noise_at)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings (prompts, length, context_dim); a prompt that comes again is encoded once."""
        distinct = list(dict.fromkeys(prompts))
        embedded = self.text_encoder(self.tokenizer(distinct).to(self.device))
        return embedded[[distinct.index(prompt) for prompt in prompts]]

    def embed_null(self, negatives: Sequence[str | None]) -> Tensor:
        """What guidance steers away from: each negative prompt, or the model's own null text where it is None."""
        embedded = self.embed([negative or "" for negative in negatives])
        if self.spec.null_text == "zero":
            given = torch.tensor([negative is not None for negative in negatives], device=embedded.device)
            embedded = embedded * given[:, None, None]
        return embedded

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (batch, 3, height, width) in [-1, 1] of scaled latents."""
        dtype = next(self.vae.parameters()).dtype
        return self.vae.decode(to_vae_latents(latents, self.spec.scale_factor).to(dtype)).float().clamp(-1, 1)

    def noise(self, seeds: Sequence[int], options: SamplingOptions) -> Tensor:
        """The start of each picture, (seeds, channels, height / f, width / f): a function of its own seed alone."""
        factor = self.vae.downsampling
        shape = (self.unet.in_channels, options.height // factor, options.width // factor)
        return torch.stack([torch.randn(shape, generator=torch.Generator("cpu").manual_seed(s)) for s in seeds])

    def grid(self, options: SamplingOptions) -> SamplingGrid:
        """The noise levels to visit, laid as the checkpoint's scheduler config says; ValueError if they cannot be."""
        spec = self.spec
        return sampling_grid(
            self.schedule,
            options.sampler,
            options.steps,
            spacing=spec.timestep_spacing,
            steps_offset=spec.steps_offset,
            set_alpha_to_one=spec.set_alpha_to_one,
        )

    def check(self, prompts: Sequence[str], options: SamplingOptions) -> None:
        """Raise BadInput, in one line, for what cannot be drawn."""
        factor = self.vae.downsampling * self.unet.downsampling
        if not prompts:
            raise BadInput("no prompt to draw")
        if options.height % factor or options.width % factor:
            raise BadInput(
                f"pictures of {options.height}x{options.width} do not divide by {factor}, what VAE and U-Net reduce by"
            )
        try:
            canonical_sampler(options.sampler, SAMPLERS)
            self.grid(options)
        except ValueError as error:
            raise BadInput(str(error)) from None


def one_each(name: str, given: Any, count: int) -> list[Any]:
    """One of what is `given` for each of `count` prompts, of one for all or a sequence; BadInput for another count."""
    several = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given] * count
    if len(several) != count:
        raise BadInput(f"{len(several)} {name} for {count} prompts; give one, or one each")
    return several


def loaded(kind: Any, config: Any, checkpoint: Checkpoint, part: str) -> Any:
    """A network of `config` filled, strictly, from a part of the checkpoint, without initialising it first."""
    with torch.device("meta"):
        module = kind(**config)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    tensors = {name: tensor.read() for name, tensor in match(checkpoint, part, shapes).items()}
    module.load_state_dict(tensors, assign=True)
    return module


def pick_device(device: str | None) -> str:
    """The device to run on: the one named, or the first there is of cuda, mps and cpu."""
    if device not in (None, "auto"):
        return str(device)
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Images (batch, 3, height, width) in [-1, 1] as pictures of 8 bits; BadInput where a value is not finite."""
    if not images.isfinite().all():
        raise BadInput("the pictures hold values that are not finite; with float16 try float32")
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in pixels]
