"""The table of metrics: which features each needs, and how it becomes a number with an interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from latentsmith.files.errors import BadInput

from .collect import Features
from .features import Array
from .frechet import FrechetToReference, Moments, fid_infinity, frechet_distance, moments_of
from .intervals import Sampled, bootstrap_weights, mean_of, resampled
from .mmd import CMMD_SCALE, KernelResampler, cmmd, cubic_kernel, gaussian_kernel, kid, unit_rows
from .neighbours import manifolds
from .scores import clip_scores, inception_score, r_precision, score_of, softmax

LARGEST_RESAMPLED = 20_000  # images; above, features are streamed and distances have no interval
EXTRAPOLATIONS = 5  # of FID-infinity, each with other subsets


@dataclass(frozen=True, eq=False)
class Measured:
    """What metrics compute from, of one extractor.

    generated, reference: features of images. statistics: of a reference of which nothing else is known.
    texts: embeddings of the generated images' prompts. resamples, seed: of the bootstrap.
    """

    generated: Features
    reference: Features | None = None
    statistics: Moments | None = None
    texts: Array | None = None
    resamples: int = 100
    seed: int = 0
    notes: list[str] = field(default_factory=list)

    @cached_property
    def features(self) -> Array:
        return self.generated.all()

    @cached_property
    def reference_features(self) -> Array:
        if self.reference is None:
            raise BadInput("it compares single images: name the reference's images, not their statistics")
        return self.reference.all()

    @cached_property
    def moments(self) -> Moments:
        if self.statistics is not None:
            return self.statistics
        assert self.reference is not None
        return moments_of(self.reference.chunks())

    @property
    def prompts(self) -> Array:
        if self.texts is None:
            raise BadInput("it needs prompts: give --prompts, or put a .txt beside each image")
        return self.texts

    def resampling(self, name: str) -> bool:
        """Return whether there are few enough images for an interval, and note it where there are not."""
        counts = [self.generated.count, *([self.reference.count] if self.reference else [])]
        if few := max(counts) <= LARGEST_RESAMPLED:
            return few
        self.notes.append(f"{name}: no interval for more than {LARGEST_RESAMPLED:,} images")
        return few


Found = dict[str, Sampled]


def _fid(given: Measured) -> Found:
    value = frechet_distance(moments_of(given.generated.chunks()), given.moments)
    if not given.resampling("fid"):
        return {"fid": Sampled(value)}
    distance = FrechetToReference(given.features, given.moments)
    return {"fid": Sampled(value, resampled(distance, given.generated.count, given.resamples, given.seed))}


def _fid_infinity(given: Measured) -> Found:
    seeds = range(given.seed, given.seed + EXTRAPOLATIONS)
    values = np.array([fid_infinity(given.features, given.moments, seed) for seed in seeds])
    return {"fid_infinity": Sampled(float(values.mean()), values)}


def _kid(given: Measured) -> Found:
    left, right = given.features, given.reference_features
    value = kid(left, right)
    if not given.resampling("kid"):
        return {"kid": Sampled(value)}
    return {"kid": Sampled(value, _resampled_mmd(given, KernelResampler(left, right, cubic_kernel, unbiased=True)))}


def _cmmd(given: Measured) -> Found:
    left, right = unit_rows(given.features), unit_rows(given.reference_features)
    value = cmmd(left, right)
    if not given.resampling("cmmd"):
        return {"cmmd": Sampled(value)}
    sample = KernelResampler(left, right, gaussian_kernel, unbiased=False)
    return {"cmmd": Sampled(value, CMMD_SCALE * _resampled_mmd(given, sample))}


def _resampled_mmd(given: Measured, sample: KernelResampler) -> Array:
    assert given.reference is not None
    sides = enumerate((given.generated.count, given.reference.count))
    left, right = (bootstrap_weights(count, given.resamples, given.seed + side) for side, count in sides)
    return sample(left, right)


def _precision_recall(given: Measured) -> Found:
    found = manifolds(given.features, given.reference_features, 3)
    return _means(given, {"precision": found.precise, "recall": found.recalled})


def _density_coverage(given: Measured) -> Found:
    found = manifolds(given.features, given.reference_features, 5)
    return _means(given, {"density": found.dense, "coverage": found.covered})


def _means(given: Measured, values: Mapping[str, Array]) -> Found:
    return {name: mean_of(each, given.resamples, given.seed) for name, each in values.items()}


def _inception_score(given: Measured) -> Found:
    if not given.generated.has("logits"):
        raise BadInput("the extractor gives no class probabilities; take inception")
    logits = given.generated.all("logits")
    shares, (value, _) = softmax(logits), inception_score(logits, splits=1)
    spread = resampled(lambda weights: score_of(shares, weights), len(shares), given.resamples, given.seed)
    return {"inception_score": Sampled(value, spread)}


def _fd_dinov2(given: Measured) -> Found:
    return {"fd_dinov2": _fid(given)["fid"]}


def _clip_score(given: Measured) -> Found:
    return _means(given, {"clip_score": clip_scores(given.features, given.prompts)})


def _r_precision(given: Measured) -> Found:
    return _means(given, {"r_precision": r_precision(given.features, given.prompts, seed=given.seed)})


@dataclass(frozen=True)
class Metric:
    """One name of --metrics.

    role: which extractor it takes: "features" (Inception unless another is named), "clip" or "dinov2".
    compares: with a reference. lower: whether a lower value is better.
    """

    role: str
    measure: Callable[[Measured], Found]
    compares: bool = True
    lower: bool = True


METRICS: Mapping[str, Metric] = {
    "fid": Metric("features", _fid),
    "fid_infinity": Metric("features", _fid_infinity),
    "kid": Metric("features", _kid),
    "precision_recall": Metric("features", _precision_recall, lower=False),
    "density_coverage": Metric("features", _density_coverage, lower=False),
    "inception_score": Metric("features", _inception_score, compares=False, lower=False),
    "fd_dinov2": Metric("dinov2", _fd_dinov2),
    "cmmd": Metric("clip", _cmmd),
    "clip_score": Metric("clip", _clip_score, compares=False, lower=False),
    "r_precision": Metric("clip", _r_precision, compares=False, lower=False),
}
OTHER_NAMES = {  # of values that are only called so for Inception's features
    "fid": "frechet_distance",
    "fid_infinity": "frechet_distance_infinity",
    "kid": "kernel_distance",
    "inception_score": "class_score",
}


def check_metrics(names: Sequence[str], has_reference: bool) -> None:
    """Raise BadInput for an unknown metric, and one that needs a reference where there is none."""
    for name in names:
        if name not in METRICS:
            raise BadInput(f"metrics {name}: is not one of {', '.join(METRICS)}")
        if METRICS[name].compares and not has_reference:
            raise BadInput(f"metrics {name}: compares with real images; name them with --reference")
    if not names:
        raise BadInput(f"no metric was asked for; choose from {', '.join(METRICS)}")


def measure(name: str, given: Measured, extractor: str) -> Found:
    """Return a metric's values by name. Raises BadInput, which names the metric."""
    try:
        found = METRICS[name].measure(given)
    except BadInput as error:
        raise BadInput(f"metrics {name}: {error}") from None
    other = {} if extractor == "inception" else OTHER_NAMES
    return {f"{other[each]} ({extractor})" if each in other else each: value for each, value in found.items()}
