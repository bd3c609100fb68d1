"""Keywords to requests, requests to batches, and what a batch becomes."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from inspect import Parameter, Signature, signature
from typing import Any

import torch
from torch import Tensor

from latentsmith.diffusion import SAMPLERS, canonical_sampler
from latentsmith.files.errors import BadInput
from latentsmith.image_request import DISTINCT_SEEDS, ImageRequest, SamplingOptions, unknown_keyword
from latentsmith.text.prompts import EncodedPrompt, LoraTag

from .images import InitImage

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
KEYWORDS = {  # of Pipeline.stream, with their defaults
    **{each.name: each.default for each in (*fields(ImageRequest), *fields(SamplingOptions)) if each.name != "prompt"},
    "num_images_per_prompt": 1,
    "batch_size": 8,
}
CALL_KEYWORDS = KEYWORDS | {"output_type": "pil"}
OF_TEXT = ("prompt", "negative_prompt", "prompt_syntax", "long_prompts", "batch_size")  # not of Pipeline.sample


def call_signature(keywords: Mapping[str, Any]) -> Signature:
    """Return the signature of a method that takes prompts and `keywords`, for help(pipeline) and notebooks."""
    return Signature(
        [
            *(Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", "prompt")),
            Parameter("negative_prompt", Parameter.POSITIONAL_OR_KEYWORD, default=None),
            *(Parameter(k, Parameter.KEYWORD_ONLY, default=v) for k, v in keywords.items() if k != "negative_prompt"),
        ]
    )


PromptCache = dict[tuple[EncodedPrompt, int], Tensor]  # (prompt, chunks) -> embedding


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """A request with its prompts as tokens and its image as tensors."""

    request: ImageRequest
    prompt: EncodedPrompt
    negative: EncodedPrompt
    init_image: InitImage | None

    @property
    def chunks(self) -> int:
        """Return the chunks that both prompts are filled up to; without guidance the negative prompt plays no part."""
        own = len(self.prompt.chunks)
        return own if self.request.guidance_scale == 1 else max(own, len(self.negative.chunks))


@dataclass(frozen=True)
class GeneratedImages:
    """images: one for each request, in their order.

    A list of PIL images; with output_type "np" an array (images, height, width, 3) and with "pt" a tensor
    (images, 3, height, width), float32 in [0, 1]; with "latent" scaled latents, a tensor for `Pipeline.decode`.
    """

    images: Any


@dataclass(frozen=True, eq=False)
class SamplingStep:
    """A batch after one step; `Pipeline.images_of` shows it.

    step: the number of steps done, from 1, of `steps`. latents: as they are; after the last step the result.
    denoised: the clean estimate. Both scaled, (batch, channels, height / f, width / f). options: with height and width.
    """

    batch: tuple[PreparedRequest, ...]
    step: int
    steps: int
    latents: Tensor
    denoised: Tensor
    options: SamplingOptions

    @property
    def done(self) -> bool:
        return self.step == self.steps

    @property
    def requests(self) -> tuple[ImageRequest, ...]:
        return tuple(each.request for each in self.batch)


def sampler_name(options: SamplingOptions) -> str:
    """Return the name that the sampler has in SAMPLERS. Raises BadInput for an unknown one."""
    try:
        return canonical_sampler(options.sampler)[0]
    except ValueError as error:
        raise BadInput(str(error)) from None


def sampler_keywords(options: SamplingOptions) -> dict[str, Any]:
    """Return the options that the sampler's own function takes."""
    sampler = SAMPLERS[sampler_name(options)]
    taken = signature(sampler.solve).parameters
    return {k: value for k, value in vars(options).items() if k in taken and not (k == "eta" and sampler.random)}


def parse_call(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str | None] | None, keywords: dict[str, Any]
) -> tuple[list[ImageRequest], SamplingOptions, int]:
    """Return the requests, the options and the batch size of a pipeline's call. Raises TypeError, BadInput."""
    for name in keywords:
        if name not in KEYWORDS:
            raise TypeError(unknown_keyword(name, CALL_KEYWORDS))
    shared = {each.name for each in fields(SamplingOptions)}
    options = SamplingOptions(**{name: value for name, value in keywords.items() if name in shared})
    own = {name: value for name, value in keywords.items() if name not in shared}
    batch_size = own.pop("batch_size", KEYWORDS["batch_size"])
    return image_requests(prompt, negative_prompt, **own), options, batch_size


def image_requests(
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str | None] | None = None,
    *,
    num_images_per_prompt: int = 1,
    seed: int | Sequence[int] = 0,
    variation_seed: int | Sequence[int] = 0,
    latents: Tensor | Sequence[Tensor] | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    **of_each_prompt: Any,
) -> list[ImageRequest]:
    """Return num_images_per_prompt requests for each prompt; image i of a prompt has its seeds plus i.

    latents, generator: one for each image; a single generator is shared by all. All others: one for all prompts, or
    one for each. of_each_prompt: guidance_scale, variation_strength, image and mask_image of ImageRequest.
    """
    if not isinstance(prompt, Iterable):
        raise BadInput(f"prompt is {prompt!r}; it must be a text or a list of texts")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if num_images_per_prompt < 1:
        raise BadInput(f"num_images_per_prompt is {num_images_per_prompt}; it must be at least 1")
    of_each_prompt |= {"negative_prompt": negative_prompt, "seed": seed, "variation_seed": variation_seed}
    columns = {name: one_each(name, value, len(prompts)) for name, value in of_each_prompt.items()}
    count = len(prompts) * num_images_per_prompt
    if latents is not None and len(latents) != count:
        raise BadInput(f"latents are for {len(latents)} images; {count} are asked for")
    generators = one_each("generator", generator, count, "images")
    requests = []
    for number in range(count):
        prompt_number, i = divmod(number, num_images_per_prompt)
        own = {name: column[prompt_number] for name, column in columns.items()}
        own |= {"seed": own["seed"] + i, "variation_seed": own["variation_seed"] + i, "generator": generators[number]}
        own["latents"] = None if latents is None else latents[number]
        requests.append(ImageRequest(prompts[prompt_number], **own))
    return requests


def one_each(name: str, value: Any, count: int, things: str = "prompts") -> list[Any]:
    """Return a list of `count` from a sequence of as many or from one value for all."""
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * count
    if len(values) != count:
        raise BadInput(f"{name} holds {len(values)} for {count} {things}; give one, or one each")
    return values


def batches(requests: Sequence[PreparedRequest], size: int) -> Iterator[list[PreparedRequest]]:
    """Yield at most `size` requests at a time, all of as many chunks of text and the same adapters: so no image depends
    on the others."""
    by_text: dict[tuple[int, tuple[LoraTag, ...]], list[PreparedRequest]] = {}
    for request in requests:
        by_text.setdefault((request.chunks, request.prompt.loras), []).append(request)
    for alike in by_text.values():
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def check_seeds(requests: Sequence[ImageRequest]) -> None:
    """Warn of a seed whose noise is that of a smaller one."""
    for request in requests:
        seeds = [request.seed] if request.generator is None else []
        seeds += [request.variation_seed] if request.variation_strength else []
        for seed in seeds:
            if seed >= DISTINCT_SEEDS:
                same = f"gives the noise of seed {seed % DISTINCT_SEEDS}: torch's generator on a CPU takes 32 bits"
                warnings.warn(f"seed {seed} {same}", stacklevel=3)
                return


def embed_batch(
    batch: Sequence[PreparedRequest],
    chunks: int,
    embed: Callable[[EncodedPrompt], Tensor],
    prompt_cache: PromptCache,
    *,
    zero_null: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return text embeddings for the conditional and unconditional passes, (batch, chunks * length, context_dim).

    embed: of one prompt. Each distinct prompt is encoded once, and kept in prompt_cache for the next batch.
    zero_null: whether zeros stand for a negative prompt that is None.
    """
    guided = any(each.request.guidance_scale != 1 for each in batch)
    negatives = [each.prompt if each.request.guidance_scale == 1 else each.negative for each in batch]
    prompts = dict.fromkeys([each.prompt for each in batch] + (negatives if guided else []))
    found = {p: prompt_cache[p, chunks] if (p, chunks) in prompt_cache else embed(p) for p in prompts}
    prompt_cache.clear()
    prompt_cache.update({(prompt, chunks): embedding for prompt, embedding in found.items()})
    text = torch.stack([found[each.prompt] for each in batch])
    if not guided:
        return text, None
    null = [
        torch.zeros_like(found[negative]) if zero_null and each.request.negative_prompt is None else found[negative]
        for each, negative in zip(batch, negatives, strict=True)
    ]
    return text, torch.stack(null)


def noise_generator(request: ImageRequest) -> torch.Generator:
    return request.generator or torch.Generator("cpu").manual_seed(request.seed)


def unit_noise(generator: torch.Generator, shape: Sequence[int]) -> Tensor:
    """Return the generator's next noise, float32 and drawn on its own device: by default the CPU, as diffusers does."""
    return torch.randn(tuple(shape), generator=generator, device=generator.device)


def start_noise(request: ImageRequest, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return the noise that an image starts from: a function of its own seeds, and the generator's first draw."""
    noise = unit_noise(generator, shape)
    if request.latents is not None:
        return request.latents
    if request.variation_strength:
        other = unit_noise(torch.Generator("cpu").manual_seed(request.variation_seed), shape).to(noise.device)
        return mixed_noise(noise, other, request.variation_strength)
    return noise


def mixed_noise(own: Tensor, other: Tensor, strength: float) -> Tensor:
    """Mix from `own` at strength 0 to `other` at 1 along the great circle between them, so that it stays unit noise.

    Source: Shoemake 1985, spherical linear interpolation.
    """
    cosine = (own.flatten() @ other.flatten() / (own.norm() * other.norm())).clamp(-1, 1).item()
    angle = math.acos(cosine)
    if math.sin(angle) < 1e-6:
        return own
    return (own * math.sin((1 - strength) * angle) + other * math.sin(strength * angle)) / math.sin(angle)
