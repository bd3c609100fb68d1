"""What one request may ask for, and the whole server hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from latentsmith.files.errors import BadInput
from latentsmith.image_request import ImageRequest, SamplingOptions


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    pixels: of one image. steps: of one image. count: images of one request. seconds_per_image: from its first step on.
    queued_images: that wait at one time. kept_seconds: a job's images, after its end. previews: of one image.
    body_bytes: of a request's body. retry_seconds: what a full queue asks clients to wait.
    """

    pixels: int = 2048 * 2048
    steps: int = 150
    count: int = 16
    seconds_per_image: float = 3600.0
    queued_images: int = 64
    kept_seconds: float = 600.0
    previews: int = 5
    body_bytes: int = 64 * 2**20
    retry_seconds: int = 10

    def check(self, requests: Sequence[ImageRequest], options: SamplingOptions) -> None:
        """Raise BadInput for a request above a limit."""
        self.check_count(len(requests))
        if options.num_inference_steps > self.steps:
            raise BadInput(f"{options.num_inference_steps} steps; this server takes at most {self.steps}")
        if options.height and options.width:
            self.check_size(options)
        for request in requests:
            if (
                request.image is not None
                and not options.height
                and request.image.width * request.image.height > self.pixels
            ):
                raise BadInput(
                    f"the image to start from has more than {self.pixels:,} pixels; give a size to crop it to"
                )

    def check_count(self, count: Any) -> None:
        """Raise BadInput for what is no number of images that one request may have."""
        if type(count) is not int or count < 1:
            raise BadInput(f"the number of images is {str(count)[:40]}; it must be a whole number, at least 1")
        if count > self.count:
            raise BadInput(f"{count} images in one request; this server makes at most {self.count}")

    def check_size(self, options: SamplingOptions) -> None:
        height, width = options.size
        if height * width > self.pixels:
            raise BadInput(f"an image of {width}x{height} pixels; this server makes at most {self.pixels:,} pixels")
