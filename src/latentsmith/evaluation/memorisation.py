"""Whether generated images repeat training images: nearest neighbours among features."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .collect import collect
from .extractors import Extractor
from .features import Array
from .images import Images
from .intervals import Sampled, mean_of
from .neighbours import nearest_neighbours, self_distances

QUANTILE = 0.01  # of the training images' distances to each other, below which a generated image counts as a copy


@dataclass(frozen=True, eq=False)
class Memorisation:
    """For each generated image its nearest training image and their distance. threshold: see QUANTILE."""

    training: Images
    distances: Array
    nearest: npt.NDArray[np.intp]
    threshold: float

    def share(self, resamples: int, seed: int) -> Sampled:
        """Return the share of generated images within the threshold of a training image."""
        return mean_of((self.distances <= self.threshold).astype(np.float64), resamples, seed)


def memorisation(images: Images, training: Images, extractor: Extractor, cache: Path) -> Memorisation:
    """Compare generated images with training images.

    Of images like those that trained the model, QUANTILE would be below the threshold by chance: more is memorisation.
    Duplicates in the training set lower the threshold, to 0 if there are many: exact copies still count.
    """
    made, trained = (collect(each, extractor, cache).all() for each in (images, training))
    distances, nearest = nearest_neighbours(made, trained)
    return Memorisation(training, distances, nearest, float(np.quantile(self_distances(trained), QUANTILE)))
