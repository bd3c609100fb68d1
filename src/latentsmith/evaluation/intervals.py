"""Intervals of confidence by the bootstrap over images: images are drawn again with replacement (Efron 1979)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .features import Array

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number and the interval that holds it in `LEVEL` of all repetitions, as the bootstrap estimates it.

    low, high: None where there was no bootstrap.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        around = "" if self.low is None else f" ({self.low:.4g} to {self.high:.4g})"
        return f"{self.value:.4g}{around}"


@dataclass(frozen=True, eq=False)
class Sampled:
    """A number and its values for resampled images, in the order of the resamples."""

    value: float
    spread: Array | None = None

    def __sub__(self, other: Sampled) -> Sampled:
        """Return the difference of two numbers whose resamples draw the same images: a paired comparison."""
        both = self.spread is not None and other.spread is not None
        return Sampled(self.value - other.value, self.spread - other.spread if both else None)  # type: ignore[operator]

    def estimate(self) -> Estimate:
        return Estimate(self.value) if self.spread is None else interval(self.value, self.spread)


def bootstrap_weights(count: int, resamples: int, seed: int) -> Array:
    """Return (count, resamples): how often each of `count` images is drawn in each resample."""
    draws = (np.random.default_rng([seed, number]).integers(0, count, count) for number in range(resamples))
    return np.stack([np.bincount(drawn, minlength=count) for drawn in draws], axis=1).astype(np.float64)


def interval(value: float, resampled: Array) -> Estimate:
    """Return the estimate with quantiles of the resamples, moved so that their median is the value.

    A distance of resampled images is biased upwards, as that of fewer images is: without the move the interval of FID
    would often not hold FID itself.
    """
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled - np.median(resampled), [tail, 1 - tail])
    return Estimate(value, value + float(low), value + float(high))


def mean_of(values: Array, resamples: int, seed: int) -> Sampled:
    """Return the mean of one number per image."""
    weights = bootstrap_weights(len(values), resamples, seed)
    return Sampled(float(values.mean()), values @ weights / len(values))


def resampled(statistic: Callable[[Array], float], count: int, resamples: int, seed: int) -> Array:
    """Return the statistic, a function of the weights of images, of each resample."""
    weights = bootstrap_weights(count, resamples, seed)
    return np.array([statistic(column) for column in weights.T])
