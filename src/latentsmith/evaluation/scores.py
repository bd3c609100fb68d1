"""Scores of generated images alone, or with their prompts: Inception score, CLIP score, R-precision, diversity."""

from __future__ import annotations

from typing import Any

import numpy as np

from latentsmith.files.errors import BadInput

from .features import Array, as_features
from .mmd import unit_rows


def inception_score(logits: Any, splits: int = 10) -> tuple[float, float]:
    """Return mean and standard deviation over `splits` parts, in order, of exp(mean KL(p(y|x) || p(y))).

    logits: (n, classes). Source: Salimans et al. 2016.
    """
    array = as_features(logits, "logits", 1)
    if not 1 <= splits <= len(array):
        raise BadInput(f"inception score: {splits} splits of {len(array)} images; take 1 to {len(array)}")
    shares = softmax(array)
    scores = [score_of(part, np.ones(len(part))) for part in np.array_split(shares, splits)]
    return float(np.mean(scores)), float(np.std(scores))


def score_of(shares: Array, weights: Array) -> float:
    """Return exp(mean KL) of class probabilities (n, classes), image i counted weights[i] times."""
    weights = weights / weights.sum()
    mean = weights @ shares
    logs = np.log(np.maximum(shares, np.finfo(np.float64).tiny)) - np.log(np.maximum(mean, np.finfo(np.float64).tiny))
    return float(np.exp(weights @ (shares * logs).sum(axis=1)))


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Array = powers / powers.sum(axis=1, keepdims=True)
    return shares


def clip_scores(image_embeddings: Any, text_embeddings: Any) -> Array:
    """Return the cosine of each image's embedding (n, d) and its prompt's, in [-1, 1].

    MLPerf's threshold of 0.15 is of this mean. Hessel et al. 2021 take 2.5 max(cos, 0), torchmetrics 100 max(cos, 0).
    """
    images, texts = (unit_rows(as_features(each, name, 1)) for each, name in
                     ((image_embeddings, "image embeddings"), (text_embeddings, "text embeddings")))  # fmt: skip
    if images.shape != texts.shape:
        raise BadInput(f"image embeddings {images.shape} and text embeddings {texts.shape} are not pairs")
    cosines: Array = (images * texts).sum(axis=1)
    return cosines


def r_precision(image_embeddings: Any, text_embeddings: Any, candidates: int = 100, seed: int = 0) -> Array:
    """Return for each image 1 if its own prompt is nearer to it than those of `candidates` - 1 others, else 0.

    The others are drawn from the prompts of other images; equal prompts are left out. An exact tie counts as wrong.
    Source: Park et al. 2021 (CLIP R-precision).
    """
    images, texts = unit_rows(as_features(image_embeddings)), unit_rows(as_features(text_embeddings))
    random = np.random.default_rng(seed)
    hits = np.zeros(len(images))
    for row, (image, text) in enumerate(zip(images, texts, strict=True)):
        others = random.permutation(len(texts))[:candidates]
        others = others[others != row][: candidates - 1]
        rivals = texts[others][(texts[others] != text).any(axis=1)]
        hits[row] = float((rivals @ image < text @ image).all())
    return hits
