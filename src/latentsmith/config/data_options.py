"""Options of the data: sets, what is done to their images, the latent cache."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from .option import option
from .value_types import either, list_of, nullable, size, text


@dataclass(frozen=True)
class AspectBucketsConfig:
    """Sizes of several aspect ratios, in place of one size."""

    given_only: ClassVar[bool] = True
    resolution: int | None = option(
        None,
        "in place of a resize and a crop: each image in the nearest of several sizes of so many pixels squared",
        at_least=1,
        aliases=("enable_bucket", "bucketing"),
    )
    step: int | None = option(
        None, "the sides are multiples of this; 64 by default", at_least=1, aliases=("bucket_reso_steps",)
    )
    max_aspect: float | None = option(None, "the longer side over the shorter, at most; 2 by default", at_least=1)


@dataclass(frozen=True)
class AugmentationsConfig:
    """Steps from an image to what is trained on, applied in the order in which a config names them."""

    given_only: ClassVar[bool] = True
    resize_smallest_side: int | None = option(
        None, "pixels; bicubic with antialiasing", at_least=1, aliases=("resolution",)
    )
    center_crop_h_w: tuple[int, int] | None = option(
        None, "cut this out of the middle", type=size(), aliases=("center_crop",)
    )
    random_crop_h_w: tuple[int, int] | None = option(
        None, "cut this out at a random position, a function of seed and sample", type=size(), aliases=("random_crop",)
    )
    horizontal_flip: bool | None = option(None, "mirror half of the images", aliases=("random_flip", "flip"))
    aspect_buckets: AspectBucketsConfig | None = None
    order: tuple[str, ...] = ()  # names of the steps as the config lists them

    def steps(self) -> dict[str, Any]:
        """Return the steps that are set, {name: value}, in their order; aspect_buckets as a mapping."""
        named = [field.name for field in fields(self) if field.name != "order"]
        values = {name: getattr(self, name) for name in dict.fromkeys([*self.order, *named])}
        if self.aspect_buckets is not None:
            buckets = {field.name: getattr(self.aspect_buckets, field.name) for field in fields(self.aspect_buckets)}
            values["aspect_buckets"] = {name: value for name, value in buckets.items() if value is not None}
        return {name: value for name, value in values.items() if value is not None}

    def __bool__(self) -> bool:
        return bool(self.steps())


@dataclass(frozen=True)
class ResolutionFilterConfig:
    """Selection of images by their size."""

    given_only: ClassVar[bool] = True
    method: Literal["larger", "smaller"] | None = option(None, "which images are taken; larger by default")
    value: int | None = option(None, "larger: both sides at least so many pixels; smaller: at most", at_least=1)


@dataclass(frozen=True)
class FilteringsConfig:
    """Selection of images."""

    given_only: ClassVar[bool] = True
    resolution: ResolutionFilterConfig = ResolutionFilterConfig()


@dataclass(frozen=True)
class CaptionsConfig:
    """What is done to captions as they are read; not with those of a cache."""

    prompt: str | tuple[str, ...] | None = option(
        None,
        "in place of every caption; a list has one for each set of dataset_path",
        type=nullable(either(list_of(text(), min_length=1), text())),
        aliases=("instance_prompt", "class_tokens"),
    )
    prefix: str = option("", "before every caption, such as a trigger word", aliases=("caption_prefix", "trigger"))
    suffix: str = option("", "after every caption", aliases=("caption_suffix",))
    wildcards: bool = option(
        False, "one line of a caption, and one of the choices of {a|b}", aliases=("enable_wildcard",)
    )
    shuffle_tags: bool = option(False, "put tags into a random order", aliases=("shuffle_caption",))
    keep_tags: int = option(0, "first tags that are neither shuffled nor dropped", at_least=0, aliases=("keep_tokens",))
    tag_dropout: float = option(
        0.0, "chance of each tag to be left out", at_least=0, at_most=1, aliases=("caption_tag_dropout_rate",)
    )
    separator: str = option(",", "between tags", aliases=("caption_separator",))


@dataclass(frozen=True)
class DatasetConfig:
    """The set that is trained on."""

    dataset_path: str | tuple[str, ...] | None = option(
        None,
        "shards or cache, tars, wdinfo.pkl; here or at s3://...",
        aliases=("path",),
        path=True,
    )
    weights: tuple[float, ...] | None = option(
        None,
        "how often each set of dataset_path is sampled, in proportion; null: all samples alike",
        at_least=0,
        min_length=1,
        aliases=("mix", "proportions"),
    )
    repeats: tuple[int, ...] | None = option(
        None,
        "how often each sample of each set of dataset_path is sampled, in proportion",
        at_least=1,
        min_length=1,
        aliases=("num_repeats",),
    )
    loss_weights: tuple[float, ...] | None = option(
        None,
        "weight of the loss for each set of dataset_path, as of class images in prior preservation",
        at_least=0,
        min_length=1,
        aliases=("prior_loss_weight",),
    )
    captions: CaptionsConfig = CaptionsConfig()
    augmentations: AugmentationsConfig = AugmentationsConfig()
    filterings: FilteringsConfig = FilteringsConfig()


@dataclass(frozen=True)
class ValidationDatasetConfig:
    """The set that is validated on."""

    dataset_path: str | tuple[str, ...] | None = option(
        None,
        "a set held out from training, for validation; null for none",
        path=True,
    )
    augmentations: AugmentationsConfig = AugmentationsConfig()


@dataclass(frozen=True)
class RemoteConfig:
    """Copies of sets at an address such as s3://bucket/folder."""

    cache_dir: str | None = option(None, "copies of remote shards; null: in the user's cache folder", path=True)
    cache_gib: float = option(50.0, "their size at most; a set that is larger is read in ranges of bytes", at_least=0)


@dataclass(frozen=True)
class CacheConfig:
    """Content of a latent cache, for precache; training reads it from the cache itself."""

    latents: Literal["moments", "mean"] = option("moments", "mean: half as large, the same latent every time")
    crops: int = option(1, "random crops kept of each image; training takes one of them each time", at_least=1)
    flipped: bool = option(False, "every image mirrored as well, where horizontal_flip mirrors half of them")
    share_captions: bool = option(False, "equal captions of a shard are encoded and stored once")


@dataclass(frozen=True)
class WebdatasetConfig:
    """Folder that relative paths start from."""

    local_root_path: str | None = option(None, "folder that a relative dataset_path starts from", path=True)


@dataclass(frozen=True)
class DataConfig:
    """The data of a run."""

    num_workers: int = option(0, "processes that read and decode, on each device", at_least=0, aliases=("workers",))
    synthetic_data: bool = option(False, "noise instead of a set, to measure a training without its data")
    synthetic_data_length: int = option(10000, "samples of that noise", at_least=1)
    accept_unfingerprinted: bool = option(False, "train on encodings of NeMo or MLPerf, which name no VAE or encoder")
    train: DatasetConfig = DatasetConfig()
    validation: ValidationDatasetConfig = ValidationDatasetConfig()
    remote: RemoteConfig = RemoteConfig()
    cache: CacheConfig = CacheConfig()
    webdataset: WebdatasetConfig = WebdatasetConfig()
