"""Aspect buckets: sizes, the nearest of them, and an order that drops and repeats nothing."""

from collections import Counter
from math import log

import numpy as np
import pytest
from PIL import Image

from latentsmith.data.buckets import LEFT_OUT, BucketOrder, Buckets, MixedBuckets, listing
from latentsmith.data.image_sizes import image_sizes, sizes_path
from latentsmith.data.shards import ShardSet, ShardWriter
from latentsmith.data.shuffle import INTERLEAVE_BLOCK
from latentsmith.data.transforms import Transforms
from latentsmith.files.errors import BadInput

COUNTS = (37, 500, 3, 64, 396)  # of samples, by bucket: one smaller than a step of 8


@pytest.fixture
def numbers():
    """The buckets of 1,000 samples, shuffled."""
    return np.random.default_rng(1).permutation(np.repeat(np.arange(5, dtype=np.uint8), COUNTS))


@pytest.mark.parametrize(("resolution", "step", "aspect"), [(512, 64, 2.0), (768, 64, 2.5), (64, 8, 3.0), (512, 8, 1)])
def test_sizes_are_all_that_there_are(resolution, step, aspect):
    sides = range(step, 4 * resolution, step)
    fits = {
        (a, b)
        for a in sides
        for b in sides
        if a * b <= resolution**2 < a * (b + step) and max(a, b) <= aspect * min(a, b)
    }
    assert set(Buckets(resolution, step, aspect).sizes) == fits | {(b, a) for a, b in fits}


@pytest.mark.parametrize(("given", "message"), [((63, 64), "no such size"), ((512, 1, 9.0), "take a larger step")])
def test_sizes_that_are_none_or_too_many(given, message):
    with pytest.raises(BadInput, match=message):
        Buckets(*given)


def test_the_nearest_aspect():
    buckets = Buckets(512, 64, 2.5)
    images = np.random.default_rng(0).integers(1, 3000, (500, 2))
    for (height, width), number in zip(images, buckets.numbers_of(images), strict=True):
        distances = [abs(log(h / w) - log(height / width)) for h, w in buckets.sizes]
        assert distances[number] == min(distances)
        assert buckets.number_of(height, width) == number


def test_the_middle_of_the_image_fills_its_bucket():
    pixels = np.random.default_rng(0).integers(0, 256, (90, 240, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    made = Transforms(aspect_buckets={"resolution": 64, "step": 16, "max_aspect": 2})
    height, width = made.buckets.sizes[0]
    assert (height, width) == (48, 80) and made.size is None
    middle = image.resize((128, 48), Image.Resampling.BICUBIC).crop((24, 0, 104, 48))
    wanted = np.asarray(middle, np.float32).transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(made(image) - wanted).max() <= 2 / 127.5 + 1e-6


@pytest.mark.parametrize("other", ["resize_smallest_side", "center_crop_h_w", "random_crop_h_w"])
def test_no_other_size_beside_buckets(other):
    with pytest.raises(BadInput, match="aspect_buckets resizes and crops"):
        Transforms(**{"aspect_buckets": {"resolution": 64}, other: "32" if "side" in other else "32, 32"})


@pytest.mark.parametrize("batch", [1, 8, 50])
def test_every_step_is_of_one_bucket_and_every_sample_comes_once_an_epoch(numbers, batch):
    order = BucketOrder(numbers, 5, batch)
    drawn = [order(position) for position in range(sum(6 * count // batch * batch for count in COUNTS))]
    steps = [numbers[drawn[at : at + batch]] for at in range(0, len(drawn), batch)]
    assert all(len(set(step)) == 1 for step in steps)
    times = Counter(drawn)
    for bucket, count in enumerate(COUNTS):
        seen = [times[int(index)] for index in np.flatnonzero(numbers == bucket)]
        assert max(seen) - min(seen) <= 1  # within its own epochs
        assert abs(sum(seen) - 6 * count) <= 2 * batch  # a share of the run in proportion, but for what a step holds


def test_nothing_but_the_position_matters(numbers):
    order = BucketOrder(numbers, 5, 8)
    drawn = [order(position) for position in range(4000)]
    again = BucketOrder(numbers, 5, 8)
    for position in np.random.default_rng(2).permutation(4000)[:500].tolist():
        assert again(position) == drawn[position]
    other = BucketOrder(numbers, 6, 8)
    assert [other(position) for position in range(100)] != drawn[:100]
    firsts = [[numbers[drawn[at]] for at in range(start, start + 1000, 8)] for start in (0, 1000, 2000)]
    assert firsts[0] != firsts[1] != firsts[2]  # the buckets, too, come in another order


def test_samples_left_out_never_come(numbers):
    kept = np.where(np.arange(1000) % 3 == 0, numbers, LEFT_OUT).astype(np.uint8)
    order = BucketOrder(kept, 5, 8)
    assert len(order) == 334
    assert {order(position) for position in range(3000)} == set(range(0, 1000, 3))
    with pytest.raises(BadInput, match="filterings leaves all of them out"):
        BucketOrder(np.full(10, LEFT_OUT, np.uint8), 5, 8)


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.1, 0.7)])
def test_sets_mixed_by_weight_within_buckets(numbers, weights):
    lengths, batch, steps = (700, 300), 8, 6000
    kept = np.where(np.arange(1000) % 4 == 1, LEFT_OUT, numbers).astype(np.uint8)
    order = MixedBuckets(kept, 5, batch, lengths, weights)
    drawn = np.array([order(position) for position in range(steps * batch)])
    assert (kept[drawn].reshape(steps, batch) == kept[drawn[::batch], None]).all()  # one bucket a step
    times = np.bincount(drawn, minlength=1000)
    for (first, last), weight in zip(((0, 700), (700, 1000)), weights, strict=True):
        own = kept[first:last] != LEFT_OUT
        wanted = len(drawn) * weight / sum(weights) / own.sum()  # the same of every sample of a set
        assert not times[first:last][~own].any()
        for bucket in range(5):
            among = times[first:last][kept[first:last] == bucket]
            # all of them come before any comes again, but for the shuffle of a block
            assert not len(among) or max(among) - min(among) <= max(2, 2 * INTERLEAVE_BLOCK * batch / len(among))
            assert abs(among.sum() - wanted * len(among)) <= 3 * batch
    again = MixedBuckets(kept, 5, batch, lengths, weights)
    for position in (0, 7, 8, 47_999, 12_345, 3):
        assert again(position) == drawn[position]


def test_every_sample_of_a_mixture_comes_in_its_turn(numbers):
    order = MixedBuckets(numbers, 5, 8, (700, 300), (2, 1))
    for bucket in range(5):
        members = np.flatnonzero(numbers == bucket)
        for among in (members[members < 700], members[members >= 700]):
            own = [order.samples[bucket][order._within(bucket, at)] for at in range(12 * len(members))]
            counts = Counter(index for index in own if index in set(among.tolist()))
            assert len(counts) == len(among)


@pytest.mark.parametrize("left", [(0, 700), (700, 1000)])
def test_a_set_of_a_mixture_of_which_nothing_is_left(numbers, left):
    gone = numbers.copy()
    gone[slice(*left)] = LEFT_OUT
    with pytest.raises(BadInput, match=f"left of set {1 + (left[0] > 0)}"):
        MixedBuckets(gone, 5, 8, (700, 300), (1, 1))


def test_listing_names_what_is_small(numbers):
    order = BucketOrder(numbers, 5, 8)
    lines = listing([(i, i) for i in range(1, 6)], order.counts, 8)
    assert lines[0].startswith("5 aspect buckets") and "2x2: 500" in lines[0]
    assert lines[1].endswith("repeats them: 3x3")


def test_sizes_of_images_are_read_once(tmp_path, png, monkeypatch):
    turned = Image.new("RGB", (40, 30))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    with ShardWriter(tmp_path, 2) as writer:
        writer.write("a", {"png": png((40, 30)), "txt": b"x"})
        writer.write("b", {"jpg": (tmp_path / "turned.jpg").read_bytes(), "txt": b"x"})
        writer.write("c", {"png": png((7, 9)), "txt": b"x"})
    wanted = [[30, 40], [40, 30], [9, 7]]
    assert image_sizes(ShardSet(tmp_path)).tolist() == wanted
    with monkeypatch.context() as patched:
        patched.setattr("PIL.Image.open", None)
        assert image_sizes(ShardSet(tmp_path)).tolist() == wanted
    first = ShardSet(tmp_path).paths[0]
    first.with_suffix(".index.npy").unlink()
    first.unlink()
    with ShardWriter(tmp_path) as writer:  # another tar in its place, and of as many samples
        for key in "ab":
            writer.write(key, {"png": png((8, 8)), "txt": b"another"})
    assert sizes_path(first).exists() and image_sizes(ShardSet(tmp_path)).tolist() == [[8, 8], [8, 8], [9, 7]]


def test_a_sample_without_an_image_is_named(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.write("a", {"txt": b"x"})
    with pytest.raises(BadInput, match="sample 'a': no image"):
        image_sizes(ShardSet(tmp_path))
