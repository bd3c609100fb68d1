"""Metrics of feature arrays against closed forms and brute force in float64."""

import numpy as np
import pytest
import torch

from latentsmith.evaluation import (
    clip_scores,
    cmmd,
    density_coverage,
    fid,
    fid_infinity,
    inception_score,
    kid,
    precision_recall,
    r_precision,
)
from latentsmith.evaluation.frechet import FrechetToReference, Moments, frechet_distance, moments_of
from latentsmith.evaluation.intervals import bootstrap_weights, interval, mean_of
from latentsmith.evaluation.mmd import KernelResampler, cubic_kernel
from latentsmith.evaluation.neighbours import nearest_neighbours, self_distances
from latentsmith.files.errors import BadInput


def normal(n, d, seed=0, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).standard_normal((n, d)) * scale + shift


def with_moments(mean, covariance, n, seed):
    """Features whose sample moments are exactly these."""
    noise = normal(n, len(mean), seed)
    noise -= noise.mean(0)
    white = noise @ np.linalg.inv(np.linalg.cholesky(np.cov(noise, rowvar=False))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def rotated(values, seed):
    basis = np.linalg.qr(normal(len(values), len(values), seed))[0]
    return (basis * values) @ basis.T


# ---- Frechet distance ----


def test_fid_of_commuting_gaussians_is_the_closed_form():
    """C1 and C2 of one basis: |m1 - m2|^2 + sum (sqrt(l1) - sqrt(l2))^2."""
    one, other = np.linspace(0.1, 3, 16), np.linspace(2, 0.5, 16)
    left = with_moments(np.full(16, 0.25), rotated(one, 7), 500, 1)
    right = with_moments(np.zeros(16), rotated(other, 7), 400, 2)
    expected = 16 * 0.25**2 + ((np.sqrt(one) - np.sqrt(other)) ** 2).sum()
    assert fid(left, right) == pytest.approx(expected, rel=1e-10)


def test_fid_of_gaussians_in_two_dimensions_is_the_closed_form():
    """tr((C1 C2)^(1/2)) of 2 x 2 matrices is sqrt(tr(C1 C2) + 2 sqrt(det C1 det C2))."""
    one, other = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    left, right = with_moments(np.zeros(2), one, 50, 1), with_moments(np.zeros(2), other, 60, 2)
    root = np.sqrt(np.trace(one @ other) + 2 * np.sqrt(np.linalg.det(one) * np.linalg.det(other)))
    assert fid(left, right) == pytest.approx(np.trace(one + other) - 2 * root, rel=1e-10)


def test_fid_of_fewer_images_than_features_is_that_of_the_space_they_span():
    """Features of rank 3 in 64 dimensions: the distance is the one in those 3, closed form again."""
    one, other = np.array([3.0, 2.0, 1.0]), np.array([0.5, 1.0, 4.0])
    basis = np.linalg.qr(normal(64, 64, 3))[0][:3]
    left = with_moments(np.zeros(3), np.diag(one), 20, 1) @ basis
    right = with_moments(np.zeros(3), np.diag(other), 10, 2) @ basis
    expected = ((np.sqrt(one) - np.sqrt(other)) ** 2).sum()
    assert fid(left, right) == pytest.approx(expected, rel=1e-10)
    assert FrechetToReference(left, Moments.of(right))(np.ones(20)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("n", "d"), [(2, 1), (2, 64), (10, 64), (300, 64)])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_fid_of_equal_sets_is_exactly_zero(n, d, offset):
    features = normal(n, d, 5) + offset
    assert fid(features, features) == 0.0
    assert fid(features, features[::-1]) == 0.0


def test_fid_of_two_images_is_never_nan_or_negative():
    for seed in range(20):
        assert fid(normal(2, 32, seed), normal(2, 32, seed + 100)) > 0


def test_moments_merge_and_stream():
    features = normal(1000, 12, 1, shift=50)
    whole, parts = Moments.of(features), moments_of([features[:1], features[1:400], features[400:]])
    assert parts.count == 1000
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-14)
    np.testing.assert_allclose(parts.scatter, whole.scatter, rtol=1e-11, atol=1e-10)
    assert frechet_distance(whole, parts) == 0.0
    np.testing.assert_allclose(whole.covariance, np.cov(features, rowvar=False), rtol=1e-12)


def test_fid_with_weights_is_that_of_repeated_images():
    left, right = normal(40, 8, 1), normal(50, 8, 2, scale=1.3)
    weights = bootstrap_weights(40, 1, 3)[:, 0]
    repeated = np.repeat(left, weights.astype(int), axis=0)
    assert FrechetToReference(left, Moments.of(right))(weights) == pytest.approx(fid(repeated, right), rel=1e-9)


def test_fid_infinity_is_nearer_to_the_truth_than_fid():
    """Two equal Gaussians: 0, which 2,000 images overestimate."""
    left, reference = normal(2000, 64, 1), with_moments(np.zeros(64), np.eye(64), 4000, 2)
    assert abs(fid_infinity(left, reference)) < 0.1 * fid(left, reference)


# ---- MMD ----


def brute_kid(left, right):
    def mean(rows, columns, skip):
        values = [
            (x @ y / len(x) + 1) ** 3 for i, x in enumerate(rows) for j, y in enumerate(columns) if not skip or i != j
        ]
        return sum(values) / len(values)

    return mean(left, left, True) + mean(right, right, True) - 2 * mean(left, right, False)


@pytest.mark.parametrize(("n", "m", "d"), [(30, 20, 8), (2, 2, 16), (5, 40, 3)])
def test_kid_is_the_brute_force(n, m, d):
    left, right = normal(n, d, 1), normal(m, d, 2, shift=0.5)
    assert kid(left, right) == pytest.approx(brute_kid(left, right), rel=1e-12)
    assert kid(left, right, subsets=3, subset_size=2, seed=1) == kid(left, right, subsets=3, subset_size=2, seed=1)


def test_kid_of_one_subset_of_all_is_kid():
    left, right = normal(30, 8, 1), normal(30, 8, 2)
    assert kid(left, right, subsets=2, subset_size=30) == pytest.approx(kid(left, right), rel=1e-12)


def test_kid_is_unbiased():
    """Of equal distributions it is 0 on average, whatever the number of images: within 4 standard errors."""
    values = np.array([kid(normal(10, 4, seed), normal(12, 4, seed + 10_000)) for seed in range(1000)])
    assert abs(values.mean()) < 4 * values.std() / len(values) ** 0.5


def test_cmmd_is_the_brute_force_and_zero_for_equal_sets():
    left, right = normal(15, 8, 1), normal(12, 8, 2, shift=1)
    assert cmmd(left, left) == 0.0
    one, other = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (left, right))

    def mean(rows, columns):
        return np.mean([[np.exp(-((x - y) ** 2).sum() / 200) for y in columns] for x in rows])

    expected = 1000 * (mean(one, one) + mean(other, other) - 2 * mean(one, other))
    assert cmmd(left, right) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("unbiased", [True, False])
def test_mmd_of_unit_weights_is_mmd(unbiased):
    left, right = normal(9, 4, 1), normal(7, 4, 2)
    found = KernelResampler(left, right, cubic_kernel, unbiased=unbiased)(np.ones((9, 2)), np.ones((7, 2)))
    if unbiased:
        np.testing.assert_allclose(found, kid(left, right), rtol=1e-12)
    else:
        means = [np.mean((a @ b.T / 4 + 1) ** 3) for a, b in ((left, left), (right, right), (left, right))]
        np.testing.assert_allclose(found, means[0] + means[1] - 2 * means[2], rtol=1e-12)


# ---- Neighbours ----


def brute_prdc(left, right, k):
    def balls(rows):
        return [sorted(np.linalg.norm(rows - row, axis=1))[k] for row in rows]

    left_balls, right_balls = balls(left), balls(right)
    between = np.array([[np.linalg.norm(x - y) for y in right] for x in left])
    inside = between <= right_balls
    recall = (between <= np.array(left_balls)[:, None]).any(axis=0).mean()
    return inside.any(axis=1).mean(), recall, inside.sum() / k / len(left), inside.any(axis=0).mean()


@pytest.mark.parametrize(("n", "m", "k"), [(40, 30, 3), (30, 40, 5), (8, 9, 1)])
def test_precision_recall_density_coverage_are_the_brute_force(n, m, k):
    left, right = normal(n, 5, 1, scale=1.4), normal(m, 5, 2)
    found = (*precision_recall(left, right, k), *density_coverage(left, right, k))
    assert found == pytest.approx(brute_prdc(left, right, k), rel=1e-12)


@pytest.mark.parametrize("n", [4, 50])
def test_equal_sets_have_precision_and_recall_1_also_with_duplicates(n):
    features = normal(n, 6, 1, shift=100)
    doubled = np.concatenate([features] * 4)  # every radius is 0
    for each in (features, doubled):
        assert precision_recall(each, each) == (1.0, 1.0)
        assert density_coverage(each, each, 3)[1] == 1.0


def test_nearest_neighbours_find_copies():
    training = normal(60, 8, 1, shift=30)
    made = np.concatenate([normal(5, 8, 2, shift=30), training[[17]]])
    distances, indices = nearest_neighbours(made, training)
    brute = np.linalg.norm(made[:, None] - training[None], axis=-1)
    np.testing.assert_allclose(distances, brute.min(axis=1), rtol=1e-12)
    assert indices.tolist() == brute.argmin(axis=1).tolist()
    assert distances[-1] == 0.0 and indices[-1] == 17
    own = np.linalg.norm(training[:, None] - training[None], axis=-1) + np.diag([np.inf] * 60)
    np.testing.assert_allclose(self_distances(training), own.min(axis=1), rtol=1e-10)


# ---- Scores ----


def test_inception_score_of_known_probabilities():
    """Certain and evenly spread over c classes: c. Always the same: 1."""
    certain = np.tile(np.eye(4) * 1000, (10, 1))
    assert inception_score(certain, splits=1)[0] == pytest.approx(4, rel=1e-12)
    assert inception_score(np.zeros((20, 7)), splits=2) == pytest.approx((1, 0))
    shares = np.array([[0.7, 0.3], [0.2, 0.8]])
    mean = shares.mean(axis=0)
    expected = np.exp((shares * np.log(shares / mean)).sum(axis=1).mean())
    assert inception_score(np.log(shares), splits=1)[0] == pytest.approx(expected, rel=1e-12)


def test_clip_scores_and_r_precision():
    texts = normal(50, 16, 1)
    assert clip_scores(3 * texts, texts) == pytest.approx(np.ones(50))
    assert r_precision(texts, texts).mean() == 1.0
    assert r_precision(np.roll(texts, 1, axis=0), texts, candidates=50).mean() < 0.1
    assert r_precision(np.ones((4, 3)), np.ones((4, 3))).tolist() == [1, 1, 1, 1]  # one prompt alone has no rivals


# ---- Intervals ----


def test_the_interval_of_a_mean_is_the_closed_form():
    values = normal(2000, 1, 3)[:, 0]
    estimate = mean_of(values, 2000, 0).estimate()
    half = 1.96 * values.std() / 2000**0.5
    assert estimate.value == values.mean()
    assert estimate.high - estimate.value == pytest.approx(half, rel=0.1)
    assert estimate.value - estimate.low == pytest.approx(half, rel=0.1)


def test_an_interval_holds_its_value_though_resamples_are_biased():
    estimate = interval(1.0, 5 + normal(100, 1, 1)[:, 0])
    assert estimate.low < 1.0 < estimate.high


def test_resamples_do_not_depend_on_how_many_there_are():
    np.testing.assert_array_equal(bootstrap_weights(10, 5, 1)[:, :3], bootstrap_weights(10, 3, 1))
    assert (bootstrap_weights(10, 5, 1).sum(axis=0) == 10).all()


# ---- Inputs ----


def test_tensors_of_any_precision_are_taken():
    features = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    assert fid(features, features.bfloat16()) < 1e-3
    assert fid(features.numpy(), features.double()) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fid(normal(1, 4), normal(5, 4)), "1 images, at least 2 are needed"),
        (lambda: fid(normal(5, 4), normal(5, 3)), "features of 4 and 3 numbers do not compare"),
        (lambda: fid(np.full((5, 4), np.nan), normal(5, 4)), "5 of 5 rows are not finite"),
        (lambda: fid(np.zeros(4), normal(5, 4)), "an array of numbers (n, d) was expected"),
        (lambda: kid(normal(5, 4), normal(5, 4), subsets=10), "10 subsets of 1000 from 5 and 5 images"),
        (lambda: precision_recall(normal(3, 4), normal(9, 4)), "k=3 nearest neighbours need more than 3 images"),
        (lambda: cmmd(np.zeros((3, 4)), normal(9, 4)), "row 0 of the embeddings is zero"),
        (lambda: clip_scores(normal(3, 4), normal(9, 4)), "are not pairs"),
        (lambda: inception_score(normal(3, 4)), "10 splits of 3 images"),
        (lambda: moments_of([normal(1, 4)]), "1 images, at least 2"),
    ],
)
def test_bad_features_are_one_line(call, message):
    with pytest.raises(BadInput) as caught:
        call()
    assert message in str(caught.value) and "\n" not in str(caught.value)
