"""The table of metrics: which features each needs, and how it becomes a number with an interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from latentsmith.files.errors import BadInput

from .features import Array
from .frechet import FrechetToReference, Moments, fid_infinity, frechet_distance
from .intervals import Estimate, bootstrap_weights, interval, mean_estimate, resampled
from .mmd import (
    CMMD_SCALE,
    KernelResampler,
    cmmd,
    cubic_kernel,
    gaussian_kernel,
    kid,
    unit_rows,
)
from .neighbours import manifolds
from .scores import clip_scores, inception_score, r_precision, score_of, softmax

PAIRS_MOST = 20_000  # images from which on a kernel's bootstrap is not made: its products grow with the square


@dataclass(frozen=True, eq=False)
class Measured:
    """What metrics compute from, of one extractor.

    generated, reference: features (n, d). moments: of the reference, which may be all that is known of it.
    logits: of the generated images. texts: embeddings of their prompts. resamples: of the bootstrap.
    """

    generated: Array
    moments: Moments | None = None
    reference: Array | None = None
    logits: Array | None = None
    texts: Array | None = None
    resamples: int = 100
    seed: int = 0
    notes: list[str] = field(default_factory=list)

    def reference_features(self) -> Array:
        if self.reference is None:
            raise BadInput("this metric compares with each reference image; name the images, not their statistics")
        return self.reference

    def prompts(self) -> Array:
        if self.texts is None:
            raise BadInput("this metric needs prompts: --prompts FILE, or a caption beside each image")
        return self.texts


Found = dict[str, Estimate]


def _fid(given: Measured) -> Found:
    assert given.moments is not None
    value = frechet_distance(Moments.of(given.generated), given.moments)
    distance = FrechetToReference(given.generated, given.moments)
    spread = resampled(distance, len(given.generated), given.resamples, given.seed)
    return {"fid": interval(value, spread)}


def _fid_infinity(given: Measured) -> Found:
    assert given.moments is not None
    seeds = range(given.seed, given.seed + 5)
    values = np.array([fid_infinity(given.generated, given.moments, seed) for seed in seeds])
    return {"fid_infinity": Estimate(float(values.mean()), float(values.min()), float(values.max()))}


def _mmd(given: Measured, name: str) -> Found:
    left, right = given.generated, given.reference_features()
    if name == "cmmd":
        left, right = unit_rows(left), unit_rows(right)
    value = kid(left, right) if name == "kid" else cmmd(left, right)
    if max(len(left), len(right)) > PAIRS_MOST:
        given.notes.append(f"{name}: no interval for over {PAIRS_MOST:,} images")
        return {name: Estimate(value, float("nan"), float("nan"))}
    kernel, scale = (cubic_kernel, 1.0) if name == "kid" else (gaussian_kernel, CMMD_SCALE)
    sample = KernelResampler(left, right, kernel, unbiased=name == "kid")
    weights = [bootstrap_weights(len(each), given.resamples, given.seed + side) for side, each in
               enumerate((left, right))]  # fmt: skip
    return {name: interval(value, scale * sample(*weights))}


def _neighbours(given: Measured, k: int, names: tuple[str, str]) -> Found:
    found = manifolds(given.generated, given.reference_features(), k)
    values = {"precision": found.precise, "recall": found.recalled, "density": found.dense, "coverage": found.covered}
    return {name: mean_estimate(values[name], given.resamples, given.seed) for name in names}


def _inception_score(given: Measured) -> Found:
    if given.logits is None:
        raise BadInput("inception_score: the extractor gives no class probabilities; take inception")
    shares = softmax(given.logits)
    value, _ = inception_score(given.logits, splits=1)
    spread = resampled(lambda weights: score_of(shares, weights), len(shares), given.resamples, given.seed)
    return {"inception_score": interval(value, spread)}


def _clip_score(given: Measured) -> Found:
    scores = clip_scores(given.generated, given.prompts())
    return {"clip_score": mean_estimate(scores, given.resamples, given.seed)}


def _r_precision(given: Measured) -> Found:
    hits = r_precision(given.generated, given.prompts(), seed=given.seed)
    return {"r_precision": mean_estimate(hits, given.resamples, given.seed)}


@dataclass(frozen=True)
class Metric:
    """One name of --metrics.

    role: which extractor it takes. compares: with a reference. lower: whether a lower value is better.
    """

    role: str
    measure: Callable[[Measured], Found]
    compares: bool = True
    lower: bool = True


METRICS: Mapping[str, Metric] = {
    "fid": Metric("features", _fid),
    "fid_infinity": Metric("features", _fid_infinity),
    "kid": Metric("features", lambda given: _mmd(given, "kid")),
    "precision_recall": Metric("features", lambda given: _neighbours(given, 3, ("precision", "recall")), lower=False),
    "density_coverage": Metric("features", lambda given: _neighbours(given, 5, ("density", "coverage")), lower=False),
    "inception_score": Metric("features", _inception_score, compares=False, lower=False),
    "fd_dinov2": Metric("dinov2", lambda given: {"fd_dinov2": _fid(given)["fid"]}),
    "cmmd": Metric("clip", lambda given: _mmd(given, "cmmd")),
    "clip_score": Metric("clip", _clip_score, compares=False, lower=False),
    "r_precision": Metric("clip", _r_precision, compares=False, lower=False),
}
INCEPTIONS_OWN = ("fid", "fid_infinity", "kid")  # names that stand for Inception's features


def result_name(name: str, extractor: str) -> str:
    """Return the name of a value: FID and KID of other features than Inception's are called otherwise."""
    if name not in INCEPTIONS_OWN or extractor == "inception":
        return name
    other = {"fid": "frechet_distance", "fid_infinity": "frechet_distance_infinity", "kid": "kernel_distance"}[name]
    return f"{other} ({extractor})"
