"""Prompts to pictures: text encoder, guided U-Net, sampler, VAE."""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentsmith.checkpoints import Checkpoint, ModelSpec, match, open_checkpoint, reads_as_open_clip, spec_of
from latentsmith.checkpoints.load import without_weights
from latentsmith.cpu.packing import pack_convolutions
from latentsmith.diffusion import (
    Denoiser,
    GuidedDenoiser,
    NoiseSchedule,
    SamplingSchedule,
    canonical_prediction_type,
    inpainting_denoiser,
    sample,
    sampling_schedule,
)
from latentsmith.files.errors import BadInput
from latentsmith.models import AutoencoderKL, ClipTextEncoder, UNetModel
from latentsmith.text.prompts import EncodedPrompt, embed_prompt, encode_prompt
from latentsmith.text.tokenizer import Tokenizer

from .images import Base, based_on, tiled, to_picture
from .noise import mixed_noise, noise_of
from .options import SamplingOptions, one_each
from .scaling import to_latents, to_vae_latents

TILE, OVERLAP = 64, 16  # latents
AT_ONCE = 512 * 512  # pixels decoded at a time, where there is more than one picture
OTHER_KINDS = {9: "an inpainting model: ", 8: "an instruct-pix2pix model: ", 5: "a depth model: "}  # by input channels


@dataclass(frozen=True, eq=False)
class SamplingStep:
    """A batch of pictures after one step; `Pipeline.pictures` shows it.

    numbers: which of the prompts they are of. step: done, from 1, of `steps`. latents: as they are; after the last
    step the result. denoised: what they are expected to become. Both scaled, (batch, channels, height / f, width / f).
    bases: what each picture started from, if anything.
    """

    numbers: tuple[int, ...]
    step: int
    steps: int
    latents: Tensor
    denoised: Tensor
    bases: tuple[Base | None, ...]
    options: SamplingOptions

    @property
    def done(self) -> bool:
        return self.step == self.steps


@dataclass(frozen=True, eq=False)
class Order:
    """One picture to draw. null: away from the null text of the training, rather than from a negative prompt.
    noise: in place of the seed's."""

    number: int
    prompt: EncodedPrompt
    negative: EncodedPrompt
    null: bool
    guidance_scale: float
    seed: int
    variation_seed: int
    noise: Tensor | None
    base: Base | None

    @property
    def chunks(self) -> int:
        """Stretches of text that both prompts are filled up to; without guidance the negative one plays no part."""
        own = len(self.prompt.chunks)
        return own if self.guidance_scale == 1 else max(own, len(self.negative.chunks))


class Pipeline:
    """A whole model, ready to draw: `pipeline(["a red circle"])` gives pictures.

    Parts can be replaced: unet, vae, text_encoder, tokenizer, schedule; spec says what else the model is.
    """

    def __init__(
        self, unet: UNetModel, vae: AutoencoderKL, text_encoder: ClipTextEncoder, tokenizer: Tokenizer, spec: ModelSpec
    ):
        self.unet, self.vae, self.text_encoder, self.tokenizer, self.spec = unet, vae, text_encoder, tokenizer, spec
        if unet.in_channels != vae.embed_dim:
            raise BadInput(
                f"{OTHER_KINDS.get(unet.in_channels, '')}the U-Net takes {unet.in_channels} channels, the VAE's "
                f"latents have {vae.embed_dim}; only models that draw from text alone can be run"
            )
        self.schedule = NoiseSchedule.from_config(
            spec.linear_start, spec.linear_end, spec.beta_schedule, spec.timesteps, cosine_s=spec.cosine_s
        )
        if spec.zero_terminal_snr:
            self.schedule = self.schedule.zero_terminal_snr()

    @classmethod
    def from_pretrained(
        cls,
        path: "str | Path | Checkpoint",
        *,
        prediction_type: str | None = None,
        weights: str = "ema",
        tokenizer: str | Path | None = None,
        pad_to: int | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Pipeline":
        """Open a run folder, a diffusers folder, a single file, a .nemo or a hub name ("owner/name"), or take an opened
        checkpoint.

        prediction_type: overrides what the checkpoint says. weights: "ema" or "raw". tokenizer: a folder or file to
        use in place of the checkpoint's own. pad_to: length up to which text embeddings are filled with zeros, as NeMo
        trains v1 with 80; 0: not at all; None: as the checkpoint was trained. device: "auto" (cuda, mps, cpu) by
        default. dtype: float32 by default.
        Raises BadInput for a file that cannot be read or is not a whole model.
        """
        checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path, weights)
        try:
            spec = spec_of(checkpoint, canonical_prediction_type(prediction_type) if prediction_type else None)
        except ValueError as error:
            raise BadInput(str(error)) from None
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
        known = networks["text_encoder"].vocab_size
        if words.vocab_size > known:
            raise BadInput(
                f"{checkpoint.path}: the tokenizer found has {words.vocab_size:,} tokens, its text encoder knows "
                f"{known:,}; give the model's own tokenizer"
            )
        place, kind = torch.device(pick_device(device)), dtype or torch.float32
        for network in networks.values():
            network.to(place, kind).eval().requires_grad_(False)
            pack_convolutions(network)
        return cls(tokenizer=words, spec=spec, **networks)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def image_size(self) -> int:
        """Side in pixels of the pictures that the model was made for."""
        return self.spec.image_size * self.vae.downsampling

    def __call__(
        self, prompts: str | Sequence[str], negative_prompts: str | Sequence[str] | None = None, **keywords: Any
    ) -> list[Image.Image]:
        """One picture for each prompt; the keywords are those of `stream`."""
        pictures: dict[int, Image.Image] = {}
        for drawing in self.stream(prompts, negative_prompts, **keywords):
            if drawing.done:
                pictures |= zip(drawing.numbers, self.pictures(drawing), strict=True)
        return [pictures[number] for number in sorted(pictures)]

    def stream(
        self,
        prompts: str | Sequence[str],
        negative_prompts: str | Sequence[str | None] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] = 0,
        variation_seed: int | Sequence[int] = 0,
        latents: Tensor | None = None,
        image: Image.Image | Sequence[Image.Image] | None = None,
        mask: Image.Image | Sequence[Image.Image] | None = None,
        batch_size: int = 8,
        **options: Any,
    ) -> Iterator[SamplingStep]:
        """Every step of every batch, so that the caller owns progress, previews and stopping.

        negative_prompts: one for all or one each; None uses the null text that the model was trained with, "" always
        encodes the empty prompt. height, width: in pixels; by default the picture's to start from, else image_size.
        seed: of the noise; one for all, or one each. variation_seed: see variation_strength. latents: noise of unit
        variance (prompts, channels, height / f, width / f) to start from in place of the seeds'.
        image: a picture to start from, one for all or one each, cropped to height and width if these are given.
        mask: of the picture's size, white where to redraw; the rest stays as it is, pixel for pixel.
        batch_size: pictures at a time, which changes none of them. options: the fields of SamplingOptions.
        Raises BadInput, at once, for what cannot be drawn; warns of prompts that are cut.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        count = len(prompts)
        if batch_size < 1:
            raise BadInput(f"batch_size is {batch_size}; it must be at least 1")
        bases = based_on(image, mask, count, height, width, self.vae.downsampling)
        side = bases[0].size if bases and bases[0] else (self.image_size, self.image_size)
        wanted = SamplingOptions(side[0] if height is None else height, side[1] if width is None else width, **options)
        self.check(prompts, wanted)
        if image is not None and int(wanted.steps * wanted.strength) < 1:
            raise BadInput(f"strength {wanted.strength} of {wanted.steps} steps leaves none; give more of either")
        if latents is not None and latents.shape != (count, *self.latent_shape(wanted)):
            raise BadInput(
                f"latents are {tuple(latents.shape)}; {count} pictures of {wanted.height}x{wanted.width} "
                f"start from {(count, *self.latent_shape(wanted))}"
            )
        negatives = one_each("negative prompts", negative_prompts, count)
        read = partial(
            encode_prompt, tokenizer=self.tokenizer, syntax=wanted.prompt_syntax, long_prompts=wanted.long_prompts
        )
        encoded = {text: read(text) for text in dict.fromkeys([*prompts, *(text or "" for text in negatives)])}
        columns = zip(
            prompts,
            negatives,
            one_each("guidance scales", wanted.guidance_scale, count),
            one_each("seeds", seed, count),
            one_each("variation seeds", variation_seed, count),
            [None] * count if latents is None else latents,
            bases,
            strict=True,
        )
        orders = [
            Order(number, encoded[prompt], encoded[negative or ""], negative is None, *rest)
            for number, (prompt, negative, *rest) in enumerate(columns)
        ]
        return self._draw(orders, wanted, batch_size)

    def _draw(self, orders: Sequence[Order], options: SamplingOptions, batch_size: int) -> Iterator[SamplingStep]:
        grid, known = self.grid(options), dict[tuple[EncodedPrompt, int], Tensor]()
        for batch in batches(orders, batch_size):
            yield from self._draw_batch(batch, options, grid, known)

    @torch.no_grad()
    def _draw_batch(
        self,
        orders: Sequence[Order],
        options: SamplingOptions,
        grid: SamplingSchedule,
        known: dict[tuple[EncodedPrompt, int], Tensor],
    ) -> Iterator[SamplingStep]:
        denoiser = Denoiser(self.unet, self.schedule, self.spec.prediction_type, timestep_at=grid.timestep_at)
        denoise: Any = GuidedDenoiser(
            denoiser,
            *self.conditionings(orders, known),
            scale_of([order.guidance_scale for order in orders]),
            rescale=options.guidance_rescale,
            one_batch=not options.split_guidance,
        )
        draws = [torch.Generator("cpu").manual_seed(order.seed) for order in orders]
        start = torch.stack([self.noise(order, options, draw) for order, draw in zip(orders, draws, strict=True)])
        start = start.to(self.device)
        bases, mask = tuple(order.base for order in orders), None
        if orders[0].base is not None:
            grid = grid.from_step(grid.steps - int(grid.steps * options.strength))
            clean = self.encode(torch.stack([base.image for base in bases if base]), tiling=options.vae_tiling)
            start = (clean + grid.sigmas[0].item() * start) / grid.start_scale
            if any(base.mask is not None for base in bases if base):
                mask = torch.stack([base.latent_mask for base in bases if base]).to(self.device)
                denoise = inpainting_denoiser(denoise, mask, clean)

        def noise_sampler(step: int) -> Tensor:
            return torch.stack([noise_of(draw, start.shape[1:]) for draw in draws]).to(self.device)

        numbers = tuple(order.number for order in orders)
        for step in sample(
            options.sampler, denoise, start, grid, noise_sampler=noise_sampler, **options.sampler_options
        ):
            latents = step.latents
            if mask is not None and step.index + 1 == grid.steps:  # grids may end a little above sigma 0
                latents = clean + mask * (latents - clean)
            yield SamplingStep(numbers, step.index + 1, grid.steps, latents, step.denoised, bases, options)

    def conditionings(
        self, orders: Sequence[Order], known: dict[tuple[EncodedPrompt, int], Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """What the U-Net takes besides, with the prompts and without. Each distinct prompt is encoded once, and kept in
        `known` for the next batch."""
        chunks = orders[0].chunks
        guided = any(order.guidance_scale != 1 for order in orders)
        distinct = dict.fromkeys(prompt for order in orders for prompt in (order.prompt, order.negative)[: 1 + guided])
        found = {
            prompt: known[prompt, chunks]
            if (prompt, chunks) in known
            else embed_prompt(prompt, chunks, self.tokenizer, self.text_encoder)
            for prompt in distinct
        }
        known.clear()
        known.update({(prompt, chunks): embedded for prompt, embedded in found.items()})
        context = {"context": torch.stack([found[order.prompt] for order in orders])}
        if not guided:
            return context, None
        zeroed = self.spec.null_text == "zero"
        null = [found[order.negative] * (not (order.null and zeroed)) for order in orders]
        return context, {"context": torch.stack(null)}

    def pictures(self, drawing: SamplingStep) -> list[Image.Image]:
        """The pictures of a batch: the result after its last step, before that what is expected."""
        decode_or_error = self.decode_or_error(drawing)
        if failed := [picture for picture in decode_or_error if isinstance(picture, str)]:
            raise BadInput(failed[0])
        return decode_or_error  # type: ignore[return-value]

    def decode_or_error(self, drawing: SamplingStep) -> list[Image.Image | str]:
        """As `pictures`, but for one that cannot be shown the reason in its place, so that the others are not lost."""
        images = self.decode(drawing.latents if drawing.done else drawing.denoised, tiling=drawing.options.vae_tiling)
        pairs = zip(drawing.bases, images.cpu(), strict=True)
        return [to_picture(base.around(image) if base else image) for base, image in pairs]

    @torch.no_grad()
    def decode(self, latents: Tensor, *, tiling: bool = False) -> Tensor:
        """Images (batch, 3, height, width) of scaled latents, float32, about in [-1, 1].

        A VAE in float16 whose values overflow is used once more in float32, with a warning. tiling: see
        SamplingOptions.vae_tiling.
        """
        return self._with_vae(partial(self._decoded, latents=latents, tiling=tiling), latents)

    def _with_vae(self, run: Callable[[AutoencoderKL], Tensor], given: Tensor) -> Tensor:
        """What `run` makes of a finite `given` with the VAE, once more in float32 where float16 overflows."""
        found = run(self.vae)
        half = next(self.vae.parameters()).dtype == torch.float16
        if half and not found.isfinite().all() and given.isfinite().all():
            warnings.warn("the VAE overflows in float16 and is used in float32 instead", stacklevel=3)
            found = run(copy.deepcopy(self.vae).float())
        return found

    def _decoded(self, vae: AutoencoderKL, latents: Tensor, tiling: bool) -> Tensor:
        given = to_vae_latents(latents, self.spec.scale_factor).to(next(vae.parameters()).dtype)
        at_once = max(1, AT_ONCE // (given.shape[2] * given.shape[3] * vae.downsampling**2))

        def run(piece: Tensor) -> Tensor:
            return torch.cat([vae.decode(part) for part in piece.split(at_once)])

        if not tiling:
            return run(given).float()
        return tiled(run, given, Fraction(vae.downsampling), tile=TILE, overlap=OVERLAP).float()

    @torch.no_grad()
    def encode(self, images: Tensor, *, tiling: bool = False) -> Tensor:
        """Scaled latents of images (batch, 3, height, width) in [-1, 1]: the means, float32."""
        return self._with_vae(partial(self._encoded, images=images, tiling=tiling), images)

    def _encoded(self, vae: AutoencoderKL, images: Tensor, tiling: bool) -> Tensor:
        factor = vae.downsampling
        given = images.to(self.device, next(vae.parameters()).dtype)

        def run(piece: Tensor) -> Tensor:
            return torch.cat([vae.mode(vae.encode(part)) for part in piece.split(1)])

        sizes = dict(tile=TILE * factor, overlap=OVERLAP * factor)
        found = tiled(run, given, Fraction(1, factor), **sizes) if tiling else run(given)
        return to_latents(found.float(), self.spec.scale_factor)

    def latent_shape(self, options: SamplingOptions) -> tuple[int, int, int]:
        factor = self.vae.downsampling
        return self.unet.in_channels, options.height // factor, options.width // factor

    def noise(self, order: Order, options: SamplingOptions, generator: torch.Generator) -> Tensor:
        """The start of a picture, a function of its own seeds alone; the first draw of the generator."""
        shape = self.latent_shape(options)
        own = noise_of(generator, shape)
        if options.variation_strength:
            other = noise_of(torch.Generator("cpu").manual_seed(order.variation_seed), shape)
            own = mixed_noise(own, other, options.variation_strength)
        return own if order.noise is None else order.noise.cpu()

    def grid(self, options: SamplingOptions) -> SamplingSchedule:
        """The noise levels to visit, laid as the checkpoint's scheduler config says; ValueError if they cannot be."""
        spec = self.spec
        return sampling_schedule(
            self.schedule,
            options.sampler,
            options.steps,
            spacing=options.spacing or spec.timestep_spacing,
            steps_offset=spec.steps_offset,
            set_alpha_to_one=spec.set_alpha_to_one,
        )

    def check(self, prompts: Sequence[str], options: SamplingOptions) -> None:
        """Raise BadInput, in one line, for what cannot be drawn."""
        factor = self.vae.downsampling
        if not prompts:
            raise BadInput("no prompt to draw")
        if options.height % factor or options.width % factor:
            raise BadInput(f"pictures of {options.height}x{options.width} do not divide by {factor}, the VAE's factor")
        try:
            self.grid(options)
        except ValueError as error:
            raise BadInput(str(error)) from None


def batches(orders: Sequence[Order], size: int) -> Iterator[list[Order]]:
    """At most `size` pictures at a time, all with prompts of as many chunks, so that none depends on the others."""
    by_length: dict[int, list[Order]] = {}
    for order in orders:
        by_length.setdefault(order.chunks, []).append(order)
    for alike in by_length.values():
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def scale_of(scales: Sequence[float]) -> Tensor | float:
    """One number where all are the same."""
    return scales[0] if len(set(scales)) == 1 else torch.tensor(scales)


def loaded(kind: Any, config: Any, checkpoint: Checkpoint, part: str) -> Any:
    """A network of `config` filled, strictly, from a part of the checkpoint, without initialising it first."""
    with without_weights():
        module = kind(**config)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    tensors = {name: tensor.read() for name, tensor in match(checkpoint, part, shapes).items()}
    module.load_state_dict(tensors, assign=True)
    return module


def pick_device(device: str | None) -> str:
    """The device to run on: the one named, or the first there is of cuda, mps and cpu."""
    if device not in (None, "auto"):
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise BadInput(f"device {device}: {str(error).splitlines()[0]}") from None
        return str(device)
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
