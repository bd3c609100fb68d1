"""A pipeline whose networks run on the device's thread, so that images of several requests share batches."""

from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from latentsmith.image_request import SamplingOptions
from latentsmith.inference import Pipeline
from latentsmith.inference.images import to_image
from latentsmith.inference.requests import PreparedRequest, PromptCache, SamplingStep

from .worker import DeviceWorker

PREVIEW_SIDE = 32  # latents of a preview's longer side: a quarter of a megapixel takes too long to decode every step


class SharedUNet:
    """A U-Net whose calls run together with those of other images; else as the network itself."""

    def __init__(self, network: Any, worker: DeviceWorker):
        self.network, self.worker = network, worker

    def __call__(self, noisy: Tensor, timesteps: Tensor, **conditioning: Tensor) -> Tensor:
        return self.worker.call(self.network, noisy, timesteps, conditioning)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)


class SharedPipeline(Pipeline):
    """The pipeline of a model that is served: safe to use from many threads at once."""

    def __init__(self, pipeline: Pipeline, worker: DeviceWorker):
        unet: Any = SharedUNet(pipeline.unet, worker)
        super().__init__(unet, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.spec)
        self.worker = worker

    def _embed(
        self, batch: Sequence[PreparedRequest], chunks: int, prompt_cache: PromptCache
    ) -> tuple[Tensor, Tensor | None]:
        return self.worker.run(partial(super()._embed, batch, chunks, prompt_cache))  # type: ignore[no-any-return]

    def encode(self, images: Tensor, *, tiling: bool = False) -> Tensor:
        return self.worker.run(partial(super().encode, images, tiling=tiling))  # type: ignore[no-any-return]

    def decode(self, latents: Tensor, *, tiling: bool = False) -> Tensor:
        return self.worker.run(partial(super().decode, latents, tiling=tiling))  # type: ignore[no-any-return]

    def preview(self, step: SamplingStep) -> Image.Image | None:
        """Return a small image of what the first of a batch is expected to become; None where it cannot be shown."""
        factor = -(-max(step.denoised.shape[2:]) // PREVIEW_SIDE)
        shown = to_image(self.decode(F.avg_pool2d(step.denoised[:1], factor))[0])
        return None if isinstance(shown, str) else shown

    def sample_one(self, prepared: PreparedRequest, options: SamplingOptions) -> Generator[SamplingStep]:
        """Yield the steps of one image, whose requests `prepare` has made ready."""
        with self.worker.image():
            yield from self._stream([prepared], options, 1)
