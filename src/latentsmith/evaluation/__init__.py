"""Numbers that say how good images are: metrics of features, extractors of features, and reports."""

from .frechet import fid, fid_infinity
from .mmd import cmmd, kid
from .neighbours import density_coverage, precision_recall
from .run import evaluate
from .scores import clip_scores, inception_score, r_precision

__all__ = [
    "clip_scores", "cmmd", "density_coverage", "evaluate", "fid", "fid_infinity", "inception_score", "kid",
    "precision_recall", "r_precision",
]  # fmt: skip
