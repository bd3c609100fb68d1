"""Prompts to images: text encoder, guided U-Net, sampler, VAE."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentsmith.architectures import UNET_INPUTS
from latentsmith.checkpoints import Checkpoint, ModelSpec, open_checkpoint, reads_as_open_clip, spec_of
from latentsmith.checkpoints.load import mapped_network
from latentsmith.cpu import optimize_for_cpu
from latentsmith.diffusion import (
    SAMPLERS,
    Denoiser,
    GuidedDenoiser,
    SamplingSchedule,
    canonical_prediction_type,
    inpainting_denoiser,
    sample,
    sampling_schedule,
)
from latentsmith.files.errors import BadInput
from latentsmith.image_request import ImageRequest, SamplingOptions
from latentsmith.models import AutoencoderKL, ClipTextEncoder, UNetModel
from latentsmith.precision import dtype_of
from latentsmith.processes import pick_device
from latentsmith.text.prompts import EncodedPrompt, embed_prompt, encode_prompt
from latentsmith.text.tokenizer import Tokenizer

from .adapters import HasAdapters, each_inside
from .images import InitImage, decode, encode, prepare_init_images, to_image, to_unit_range
from .requests import (
    CALL_KEYWORDS,
    KEYWORDS,
    OF_TEXT,
    OUTPUT_TYPES,
    GeneratedImages,
    PreparedRequest,
    PromptCache,
    SamplingStep,
    batches,
    call_signature,
    check_seeds,
    embed_batch,
    image_requests,
    noise_generator,
    parse_call,
    sampler_keywords,
    sampler_name,
    start_noise,
    unit_noise,
)

EARLIEST_START = (
    0.75  # share of the schedule: below it, "leading" timesteps of 1 to 3 steps tell the network of an image
)


class Pipeline(HasAdapters):
    """A whole model, ready to make images: `pipeline("a red circle").images`.

    Parts can be replaced: unet, vae, text_encoder, tokenizer, schedule; spec says what else the model is.
    """

    def __init__(
        self, unet: UNetModel, vae: AutoencoderKL, text_encoder: ClipTextEncoder, tokenizer: Tokenizer, spec: ModelSpec
    ):
        super().__init__()
        self.unet, self.vae, self.text_encoder, self.tokenizer, self.spec = unet, vae, text_encoder, tokenizer, spec
        if unet.in_channels != vae.embed_dim:
            purpose = f"{UNET_INPUTS[unet.in_channels]}: " if unet.in_channels in UNET_INPUTS else ""
            channels = f"the U-Net takes {unet.in_channels} channels, the VAE's latents have {vae.embed_dim}"
            raise BadInput(f"{purpose}{channels}; only models that sample from text alone can be run")
        try:
            self.schedule = spec.noise_schedule()
        except ValueError as error:
            raise BadInput(str(error)) from None

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
        dtype: "torch.dtype | str" = "auto",
        torch_dtype: "torch.dtype | str | None" = None,
    ) -> "Pipeline":
        """Open a run folder, a diffusers folder, a single file, a .nemo or a hub name ("owner/name"), or take an opened
        checkpoint.

        prediction_type: overrides what the checkpoint says. weights: "ema" or "raw". tokenizer: a folder or file to
        use in place of the checkpoint's own. pad_to: length up to which text embeddings are filled with zeros, as NeMo
        trains v1 with 80; 0: not at all; None: as the checkpoint was trained. device: "auto" (cuda, mps, cpu) by
        default. dtype, or torch_dtype as in diffusers: "auto" is float32; or a torch.dtype, or a name that --dtype has.
        Raises BadInput for a file that cannot be read or is not a whole model.
        """
        checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path, weights)
        try:
            spec = spec_of(checkpoint, canonical_prediction_type(prediction_type) if prediction_type else None)
        except ValueError as error:
            raise BadInput(str(error)) from None
        if pad_to is not None:
            spec = replace(spec, cond_stage_config={**spec.cond_stage_config, "pad_to": pad_to or None})
        vae = {**spec.first_stage_config, "scale_factor": spec.scale_factor}
        networks = {
            "unet": mapped_network("unet", spec.unet_config, checkpoint),
            "vae": mapped_network("vae", vae, checkpoint),
            "text_encoder": mapped_network("text_encoder", spec.cond_stage_config, checkpoint),
        }
        length, vocab_size = networks["text_encoder"].max_length, networks["text_encoder"].vocab_size
        cleaning = "open_clip" if reads_as_open_clip(checkpoint, spec) else None
        found = Tokenizer.find(tokenizer, checkpoint.path, length, cleaning=cleaning)
        if found.vocab_size > vocab_size:
            raise BadInput(
                f"{checkpoint.path}: the tokenizer found has {found.vocab_size:,} tokens, its text encoder "
                f"{vocab_size:,}; give the model's own tokenizer"
            )
        for network in networks.values():
            network.eval().requires_grad_(False)
        pipeline = cls(tokenizer=found, spec=spec, **networks)
        dtype = torch_dtype or dtype
        return pipeline.to(pick_device(device), "fp32" if dtype == "auto" else dtype)

    def to(
        self, device: "str | torch.device | torch.dtype | None" = None, dtype: "torch.dtype | str | None" = None
    ) -> "Pipeline":
        """Move the networks, in place, and return this pipeline. As in diffusers a dtype may be given alone.

        dtype: or a name that --dtype has. Raises BadInput for a device that is not there.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        device = None if device is None else pick_device(device)
        dtype = dtype_of(dtype) if isinstance(dtype, str) else dtype
        for network in (self.unet, self.vae, self.text_encoder):
            network.to(device=device, dtype=dtype)
            if self.device.type == "cpu":
                optimize_for_cpu(network, pack_weights=True)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def image_size(self) -> int:
        """Return the side in pixels of the images that the model was made for."""
        return int(self.spec.image_size * self.vae.downsampling)

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str | None] | None = None,
        *,
        output_type: str = "pil",
        **keywords: Any,
    ) -> GeneratedImages:
        """Return the images of prompts; the other keywords are those of `stream`.

        output_type: "pil", "np", "pt" or "latent", as GeneratedImages says.
        """
        if output_type not in OUTPUT_TYPES:
            raise BadInput(f"output_type {output_type!r} is not one of {', '.join(OUTPUT_TYPES)}")
        requests, options, batch_size = parse_call(prompt, negative_prompt, keywords)
        images: dict[ImageRequest, Any] = {}
        for step in self.stream_requests(requests, options, batch_size):
            if step.done:
                images |= zip(step.requests, self._output(step, output_type), strict=True)
        ordered = [images[request] for request in requests]
        if output_type == "pil":
            return GeneratedImages(ordered)
        stacked = torch.stack(ordered)
        return GeneratedImages(stacked.permute(0, 2, 3, 1).numpy() if output_type == "np" else stacked)

    def stream(
        self, prompt: str | Sequence[str], negative_prompt: str | Sequence[str | None] | None = None, **keywords: Any
    ) -> Iterator[SamplingStep]:
        """Return the steps of every batch, so that the caller owns progress, previews and stopping.

        The keywords are the fields of ImageRequest, one value for all prompts or one for each (latents and generator:
        for each image), the fields of SamplingOptions, num_images_per_prompt, and batch_size: the images sampled
        together, which changes none of them.
        Raises BadInput, at once, for what cannot be made and TypeError for unknown keywords; warns of cut prompts.
        """
        return self.stream_requests(*parse_call(prompt, negative_prompt, keywords))

    def stream_requests(
        self, requests: Sequence[ImageRequest], options: SamplingOptions, batch_size: int = 8
    ) -> Iterator[SamplingStep]:
        """Do as `stream`, for requests that already exist."""
        if batch_size < 1:
            raise BadInput(f"batch_size is {batch_size}; it must be at least 1")
        options, prepared = self.prepare(requests, options)
        return self._stream(prepared, options, batch_size)

    def prepare(
        self, requests: Sequence[ImageRequest], options: SamplingOptions
    ) -> tuple[SamplingOptions, list[PreparedRequest]]:
        """Return the options with height and width, and the requests ready to sample. Raises BadInput."""
        if not requests:
            raise BadInput("no prompt: give at least one")
        check_seeds(requests)
        init_images = prepare_init_images(requests, options.height, options.width, self.vae.downsampling)
        options = self.completed(options, init_images[0])
        shape = self.latent_shape(options)
        for request in requests:
            if request.latents is not None and request.latents.shape != shape:
                found, size = tuple(request.latents.shape), f"{options.height}x{options.width}"
                raise BadInput(f"latents of an image are {found}; images of {size} start from {shape}")
        texts = [text or "" for request in requests for text in (request.prompt, request.negative_prompt)]
        encoded = {text: self._encode(text, options) for text in dict.fromkeys(texts)}
        prepared = []
        for request, init_image in zip(requests, init_images, strict=True):
            prompt, negative = encoded[request.prompt], encoded[request.negative_prompt or ""]
            negative = replace(negative, loras=prompt.loras)  # one pass of the networks: the prompt decides
            prepared.append(PreparedRequest(request, prompt, negative, init_image))
        return options, prepared

    def _encode(self, text: str, options: SamplingOptions) -> EncodedPrompt:
        encoded = encode_prompt(text, self.tokenizer, syntax=options.prompt_syntax, long_prompts=options.long_prompts)
        for tag in encoded.loras:
            self.lora_of(tag)
        return replace(encoded, skip=options.clip_skip - 1)

    def completed(self, options: SamplingOptions, init_image: InitImage | None = None) -> SamplingOptions:
        """Return the options with height and width. Raises BadInput, in one line, for what cannot be sampled."""
        height, width = init_image.size if init_image else (self.image_size, self.image_size)
        options = replace(options, height=options.height or height, width=options.width or width)
        factor = self.vae.downsampling
        if options.size[0] % factor or options.size[1] % factor:
            raise BadInput(f"images of {options.height}x{options.width} do not divide by {factor}, the VAE's factor")
        try:
            schedule = self.sampling_schedule(options)
        except ValueError as error:
            raise BadInput(str(error)) from None
        if shared := schedule.shared_timesteps:
            note = "share timesteps though their sigmas differ more than twofold: the noise schedule is too steep there"
            warnings.warn(f"{options.sampler}: {shared} of {schedule.steps} steps {note}", stacklevel=2)
        first, all_timesteps = schedule.timesteps[0].item(), self.schedule.timesteps
        if init_image is None and first < EARLIEST_START * all_timesteps:
            note = f"begin at timestep {first:.0f} of {all_timesteps}, but an image from noise begins at the last"
            hint = "take more steps or spacing trailing"
            warnings.warn(f"{options.sampler}: {schedule.steps} steps {note}; {hint}", stacklevel=2)
        if options.eta > 0 and "eta" not in sampler_keywords(options):
            raise BadInput(f"eta {options.eta}: {options.sampler} has no share of noise to choose; ddim has")
        if options.clip_skip > (layers := len(self.text_encoder.text_model.encoder.layers)):
            raise BadInput(f"clip_skip is {options.clip_skip}; this text encoder has {layers} layers")
        if init_image and options.steps_from_image < 1:
            raise BadInput(
                f"strength {options.strength} of {options.num_inference_steps} steps leaves none; give more of either"
            )
        return options

    def latent_shape(self, options: SamplingOptions) -> tuple[int, int, int]:
        factor = self.vae.downsampling
        return self.unet.in_channels, options.size[0] // factor, options.size[1] // factor

    def sampling_schedule(self, options: SamplingOptions) -> SamplingSchedule:
        """Return the sigmas to visit, spaced as the checkpoint's scheduler config says. Raises ValueError."""
        spec = self.spec
        return sampling_schedule(
            self.schedule,
            options.sampler,
            options.num_inference_steps,
            spacing=options.timestep_spacing or spec.timestep_spacing,
            steps_offset=spec.steps_offset,
            set_alpha_to_one=spec.set_alpha_to_one,
            karras=spec.karras_sigmas and not options.timestep_spacing and SAMPLERS[sampler_name(options)].karras,
        )

    def _stream(
        self, prepared: Sequence[PreparedRequest], options: SamplingOptions, batch_size: int
    ) -> Iterator[SamplingStep]:
        prompt_cache: PromptCache = {}
        for batch in batches(prepared, batch_size):
            inside = partial(self.lora_tags, batch[0].prompt.loras)
            with inside():
                embedded = self._embed(batch, batch[0].chunks, prompt_cache)
            yield from each_inside(self._sample_batch(batch, options, *embedded), inside)

    @torch.no_grad()
    def _embed(
        self, batch: Sequence[PreparedRequest], chunks: int, prompt_cache: PromptCache
    ) -> tuple[Tensor, Tensor | None]:
        def embed(prompt: EncodedPrompt) -> Tensor:
            return embed_prompt(prompt, chunks, self.tokenizer, self.text_encoder)

        return embed_batch(batch, chunks, embed, prompt_cache, zero_null=self.spec.null_text == "zero")

    @torch.no_grad()
    def _sample_batch(
        self,
        batch: Sequence[PreparedRequest],
        options: SamplingOptions,
        text_embeddings: Tensor,
        null_text_embeddings: Tensor | None,
    ) -> Iterator[SamplingStep]:
        schedule = self.sampling_schedule(options)
        denoise: Any = GuidedDenoiser(
            Denoiser(self.unet, self.schedule, self.spec.prediction_type, timestep_at=schedule.timestep_at),
            {"context": text_embeddings},
            None if null_text_embeddings is None else {"context": null_text_embeddings},
            torch.tensor([each.request.guidance_scale for each in batch]),
            rescale=options.guidance_rescale,
            one_batch=not options.split_guidance,
        )
        generators = [noise_generator(each.request) for each in batch]
        shape = self.latent_shape(options)
        pairs = zip(batch, generators, strict=True)
        start = torch.stack([start_noise(each.request, shape, generator).to(self.device) for each, generator in pairs])
        init_images, mask = [each.init_image for each in batch if each.init_image], None
        if init_images:
            schedule = schedule.from_step(schedule.steps - options.steps_from_image)
            clean = self.encode(torch.stack([each.image for each in init_images]), tiling=options.vae_tiling)
            start = (clean + schedule.sigmas[0].item() * start) / schedule.start_scale
            if any(each.mask is not None for each in init_images):
                mask = torch.stack([each.latent_mask for each in init_images]).to(self.device)
                denoise = inpainting_denoiser(denoise, mask, clean)

        def noise_sampler(step: int) -> Tensor:
            return torch.stack([unit_noise(generator, shape).to(self.device) for generator in generators])

        steps = sample(
            options.sampler, denoise, start, schedule, noise_sampler=noise_sampler,
            clip_sample_range=self.spec.clip_sample_range, **sampler_keywords(options),
        )  # fmt: skip
        for step in steps:
            latents = step.latents
            if mask is not None and step.index + 1 == schedule.steps:  # schedules may end a little above sigma 0
                latents = torch.where(mask > 0, latents, clean)  # latent masks are 0 or 1
            yield SamplingStep(tuple(batch), step.index + 1, schedule.steps, latents, step.denoised, options)

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str | None] | None = None,
        *,
        prompt_syntax: str = "plain",
        long_prompts: str = "chunks",
    ) -> tuple[Tensor, Tensor]:
        """Return text embeddings of prompts and of negative prompts (or the null text), for `sample`.

        Both (batch, tokens, context_dim), all as long as the longest prompt. Keywords: as in SamplingOptions.
        """
        options = SamplingOptions(prompt_syntax=prompt_syntax, long_prompts=long_prompts)
        _, prepared = self.prepare(image_requests(prompt, negative_prompt), options)
        if any(each.prompt.loras for each in prepared):
            raise BadInput(
                "<lora:...> weighs a whole image; with encode_prompt and sample call set_lora_weight instead"
            )
        text, null = self._embed(prepared, max(each.chunks for each in prepared), {})
        assert null is not None
        return text, null

    @torch.no_grad()
    def sample(self, text_embeddings: Tensor, null_text_embeddings: Tensor | None = None, **keywords: Any) -> Tensor:
        """Return scaled latents (batch, channels, height / f, width / f) sampled for text embeddings, for `decode`.

        text_embeddings, null_text_embeddings: as `encode_prompt` returns them; without the second guidance is off.
        keywords: those of `stream` that are not about text; seed i for embedding i is given as a list. With
        num_images_per_prompt the latents of one embedding follow one another.
        """
        if refused := [name for name in OF_TEXT if name in keywords]:
            raise TypeError(f"{refused[0]} is not a keyword of sample; prompts go to encode_prompt, in one batch")
        if null_text_embeddings is None:
            keywords = {"guidance_scale": 1.0} | keywords
        requests, options, _ = parse_call([""] * len(text_embeddings), None, keywords)
        options, batch = self.prepare(requests, options)
        if null_text_embeddings is None and any(each.request.guidance_scale != 1 for each in batch):
            raise BadInput("guidance_scale other than 1 needs null_text_embeddings")
        images = len(batch) // len(text_embeddings)  # of each embedding
        text = text_embeddings.repeat_interleave(images, 0)
        null = None if null_text_embeddings is None else null_text_embeddings.repeat_interleave(images, 0)
        *_, last = self._sample_batch(batch, options, text, null)
        return last.latents

    def images_of(self, step: SamplingStep) -> list[Image.Image]:
        """Return the images of a batch: the result after its last step, before that what is expected."""
        images = self.decode_or_error(step)
        if errors := [image for image in images if isinstance(image, str)]:
            raise BadInput(errors[0])
        return images  # type: ignore[return-value]

    def decode_or_error(self, step: SamplingStep) -> list[Image.Image | str]:
        """Do as `images_of`, with a reason in place of an image that cannot be shown: the others are not lost."""
        return [to_image(image) for image in self._decoded(step)]

    def _output(self, step: SamplingStep, output_type: str) -> Sequence[Any]:
        """Return the results of a batch after its last step, as `__call__` describes output_type."""
        if output_type == "pil":
            return self.images_of(step)
        return list(step.latents if output_type == "latent" else to_unit_range(self._decoded(step)))

    def _decoded(self, step: SamplingStep) -> Tensor:
        """Return the images of a batch (batch, 3, height, width), around the masks those that they started from."""
        images = self.decode(step.latents if step.done else step.denoised, tiling=step.options.vae_tiling).cpu()
        pairs = zip(step.batch, images, strict=True)
        return torch.stack([each.init_image.around(image) if each.init_image else image for each, image in pairs])

    @torch.no_grad()
    def decode(self, latents: Tensor, *, tiling: bool = False) -> Tensor:
        """Return images (batch, 3, height, width) of scaled latents, float32, about in [-1, 1]."""
        return decode(self.vae, self.vae.to_vae_latents(latents), tiling=tiling)

    @torch.no_grad()
    def encode(self, images: Tensor, *, tiling: bool = False) -> Tensor:
        """Return scaled latents of images (batch, 3, height, width) in [-1, 1]: the means, float32."""
        return self.vae.to_latents(encode(self.vae, images, tiling=tiling))


for _method, _keywords in ((Pipeline.__call__, CALL_KEYWORDS), (Pipeline.stream, KEYWORDS)):
    _method.__signature__ = call_signature(_keywords)  # type: ignore[union-attr]
