"""Measure images: open, extract, compare. The one path behind `latentsmith evaluate`, training and Python."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentsmith.files.errors import BadInput
from latentsmith.processes import own_device, pick_device

from .collect import Features, collect
from .extractors import Extractor, open_extractor
from .features import Array
from .frechet import Moments, moments_of
from .images import Images, open_images
from .intervals import Estimate, Sampled
from .measure import METRICS, Measured, check_metrics, measure
from .statistics import is_statistics, load_statistics, save_statistics

TEXTS = 64  # prompts encoded at a time


@dataclass(frozen=True)
class Settings:
    """How images are measured; all of it is recorded in the result.

    metrics: names of METRICS. features, clip, dinov2: extractors by role, as `open_extractor` takes them. resize: a
    rule instead of the extractors' own. count: the first so many images; None for all. resamples, seed: of intervals.
    """

    metrics: tuple[str, ...] = ("fid",)
    features: str = "inception"
    clip: str = ""
    dinov2: str = ""
    resize: str | None = None
    count: int | None = None
    resamples: int = 100
    seed: int = 0
    device: str | None = None
    trust: bool = False


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was measured of one set of images.

    sampled: values by name, with their resamples. identity: of each extractor. images: how many; reference: of what.
    """

    sampled: dict[str, Sampled]
    images: int
    identity: Mapping[str, Mapping[str, str]]
    reference: str = ""
    notes: Sequence[str] = ()
    features: Mapping[str, Features] = field(default_factory=dict)
    reference_features: Mapping[str, Features] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Estimate]:
        """Return every value with its interval."""
        return {name: each.estimate() for name, each in self.sampled.items()}

    def __getitem__(self, name: str) -> Estimate:
        return self.values[name]


class Evaluator:
    """Measures several sets of images with one set of extractors against one reference.

    cache: a folder for features and statistics, which are then never made twice.
    """

    def __init__(self, settings: Settings, reference: Any, cache: Path):
        check_metrics(settings.metrics, reference is not None)
        if settings.resamples < 2:
            raise BadInput(f"resamples {settings.resamples}: an interval needs at least 2")
        self.settings, self.cache = settings, cache
        device = own_device(pick_device(settings.device))
        roles = dict.fromkeys(METRICS[name].role for name in settings.metrics)
        self.extractors = {role: self._open(role, device) for role in roles}
        self.statistics: Moments | None = None
        self.reference: Images | None = None
        self.notes: list[str] = []
        if is_statistics(reference):
            self._load_statistics(reference)
        elif reference is not None:
            self.reference = open_images(reference)

    def _open(self, role: str, device: str) -> Extractor:
        spec = getattr(self.settings, role)
        if role != "features":
            spec = f"{role}:{spec}" if spec else role
        return open_extractor(spec, resize=self.settings.resize, device=device, trust=self.settings.trust)

    def _load_statistics(self, path: Any) -> None:
        compared = [name for name in self.settings.metrics if METRICS[name].compares]
        if {METRICS[name].role for name in compared} != {"features"}:
            raise BadInput(
                f"{path}: statistics are of one extractor; {', '.join(compared)} need the reference's images"
            )
        self.statistics, note = load_statistics(path, self.extractors["features"].identity)
        self.notes.append(note)

    def reference_of(self, role: str) -> Features | None:
        """Return features of the reference, with their statistics beside them in the cache."""
        if self.reference is None or not any(
            METRICS[name].compares and METRICS[name].role == role for name in self.settings.metrics
        ):
            return None
        features = collect(self.reference, self.extractors[role], self.cache)
        path = features.folder / "statistics.npz"
        if not path.exists() and features.count > 1:
            identity = {**self.extractors[role].identity, "of": self.reference.title}
            save_statistics(path, moments_of(features.chunks()), identity)
        return features

    def __call__(self, images: Any, prompts: Sequence[str] | None = None) -> Evaluation:
        """Return what the settings ask for. prompts: one for each image; None takes the images' own captions."""
        opened = open_images(images).first(self.settings.count)
        features, references, notes = {}, {}, list(self.notes)
        sampled: dict[str, Sampled] = {}
        for role, extractor in self.extractors.items():
            features[role] = collect(opened, extractor, self.cache)
            reference = self.reference_of(role)
            if reference is not None:
                references[role] = reference
            names = [name for name in self.settings.metrics if METRICS[name].role == role]
            texts = self._texts(opened, extractor, prompts) if {"clip_score", "r_precision"} & set(names) else None
            given = Measured(features[role], reference, self.statistics, texts, self.settings.resamples,
                             self.settings.seed, notes)  # fmt: skip
            for name in names:
                sampled |= measure(name, given, extractor.name)
        identity = {role: each.identity for role, each in self.extractors.items()}
        of = self.reference.title if self.reference else ""
        return Evaluation(sampled, len(opened), identity, of, notes, features, references)

    def _texts(self, images: Images, extractor: Extractor, prompts: Sequence[str] | None) -> Array:
        """Return embeddings of the prompts; equal ones are encoded once."""
        texts = list(prompts) if prompts is not None else captions_of(images)
        if len(texts) != len(images):
            raise BadInput(f"{images.title}: {len(images)} images and {len(texts)} prompts; give one for each image")
        assert extractor.encode_texts is not None
        distinct = list(dict.fromkeys(texts))
        with torch.inference_mode():
            parts = [extractor.encode_texts(distinct[at : at + TEXTS]) for at in range(0, len(distinct), TEXTS)]
        rows = dict(zip(distinct, torch.cat(parts).double().cpu().numpy(), strict=True))
        return np.stack([rows[text] for text in texts])


def captions_of(images: Images) -> list[str]:
    """Return the caption of every image. Raises BadInput, naming the first without one."""
    captions = [images.caption(number) for number in range(len(images))]
    if (lost := next((number for number, text in enumerate(captions) if not text), None)) is not None:
        raise BadInput(
            f"{images.title}: {images.names[lost]} has no prompt; give --prompts, or a .txt beside each image"
        )
    return [str(text) for text in captions]


def evaluate(
    images: Any,
    reference: Any = None,
    *,
    prompts: Sequence[str] | None = None,
    cache: Path | None = None,
    **options: Any,
) -> Evaluation:
    """Return metrics of images, `evaluate(folder, reference, metrics=("fid", "kid"))["fid"].value`.

    images, reference: a folder of images, a set of shards, PIL images, arrays (height, width, 3) uint8, or a tensor
    (n, 3, height, width), uint8 or in [-1, 1]; the reference also a .npz of statistics. prompts: of each image, for
    CLIP. cache: a folder in which features are kept. options: fields of Settings.
    """
    if "metrics" in options:
        listed = options["metrics"]
        options["metrics"] = (listed,) if isinstance(listed, str) else tuple(listed)
    folder = nullcontext(str(cache)) if cache is not None else tempfile.TemporaryDirectory()
    with folder as place:
        found = Evaluator(Settings(**options), reference, Path(place))(images, prompts)
        return Evaluation(found.sampled, found.images, found.identity, found.reference, found.notes)
