import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import webdataset

from latentsmith.data.cache_writer import CacheOptions, Encoders, write_cache
from latentsmith.data.dataset import TrainingSet
from latentsmith.data.ingest import import_dataset
from latentsmith.data.latent_cache import LatentCache
from latentsmith.data.reader import reader
from latentsmith.data.resumable_output import ResumableOutput
from latentsmith.data.sample_io import caption_of, npy_array, npy_bytes
from latentsmith.data.shards import ShardSet, ShardWriter, write_set_file
from latentsmith.data.shuffle import CROPS, integer_below, sample_seed
from latentsmith.data.tar_index import load_index
from latentsmith.data.transforms import Transforms
from latentsmith.files.errors import BadInput

TRANSFORMS = Transforms(resize_smallest_side=16, center_crop_h_w="16, 16")
FINGERPRINTS = {"vae": "aaaa", "text_encoder": "bbbb", "layer": "last", "tokenizer": "cccc"}


def encode_images(images):
    """Stands in for a VAE of factor 4 and z = 2: means of 4x4 blocks, and a constant."""
    means = images[:, :2].reshape(len(images), 2, 4, 4, 4, 4).mean((3, 5))
    return np.concatenate([means, np.full_like(means, -3.0)], 1)


def encode_captions(captions):
    """Stands in for a text encoder of length 5 and width 3."""
    codes = [[len(text), sum(map(ord, text)) % 97, index] for text in captions for index in range(5)]
    return np.array(codes, dtype=np.float32).reshape(len(captions), 5, 3) / 7


def encoders(**changes):
    return Encoders(
        **{"images": encode_images, "captions": encode_captions, "fingerprints": FINGERPRINTS, "versions": {}} | changes
    )


@pytest.fixture
def source(tmp_path, png):
    with ShardWriter(tmp_path / "set", samples_per_shard=4) as writer:
        for number in range(10):
            members = {"png": png(seed=number), "txt": f"caption {number}".encode(), "json": b"{}"}
            writer.write(f"{number:03}", members)
    write_set_file(tmp_path / "set", writer.finished)
    return ShardSet(tmp_path / "set")


def expected(source, index):
    sample = source[index]
    image = TRANSFORMS.decode(sample.members["png"])
    return {
        "image_encoded": encode_images(image[None])[0].astype(np.float16),
        "captions_encoded": encode_captions([sample.text("txt")])[0].astype(np.float16),
    }


def same(a, b):
    return a.keys() == b.keys() and all((a[key] == b[key]).all() and a[key].dtype == b[key].dtype for key in a)


def everything(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_holds_what_the_encoders_make(tmp_path, source):
    seen = []
    cache = write_cache(
        source, tmp_path / "c", TRANSFORMS, encoders(), batch_size=3, progress=lambda *a: seen.append(a)
    )
    assert len(cache) == 10 and cache.encoded == ["image_encoded", "captions_encoded"]
    assert all(same(cache[i], expected(source, i)) for i in range(10))
    assert (cache.empty_prompt == encode_captions([""])[0].astype(np.float16)).all()
    assert caption_of(cache.shards[7]) == "caption 7"
    assert seen[-1] == (10, 10) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert [path.name for path in cache.shards.paths] == [path.name for path in source.paths]
    info = json.loads((tmp_path / "c" / "cache.json").read_text())
    assert info["samples"] == 10 and info["members"]["image_encoded"] == {"shape": [4, 4, 4], "dtype": "float16"}
    assert info["fingerprints"]["source"] == source.fingerprint() and info["fingerprints"]["vae"] == "aaaa"


def test_samples_are_views(tmp_path, source):
    cache = write_cache(source, tmp_path / "c", TRANSFORMS, encoders())
    view = cache[0]["image_encoded"]
    assert not view.flags.owndata and not view.flags.writeable and view.flags.aligned
    with pytest.raises(IndexError):
        cache[10]


def test_reading_keeps_no_more_shards_open_than_allowed(tmp_path, png, monkeypatch):
    """However many it is read from: each holds file descriptors."""
    with ShardWriter(tmp_path / "set", samples_per_shard=1) as writer:
        for number in range(12):
            writer.write(f"{number:03}", {"png": png(seed=number), "txt": b"one"})
    write_set_file(tmp_path / "set", writer.finished)
    write_cache(ShardSet(tmp_path / "set"), tmp_path / "c", TRANSFORMS, encoders())
    monkeypatch.setattr("latentsmith.data.shards.OPEN_SHARDS", 3)
    cache = LatentCache(tmp_path / "c")
    before = len(os.listdir("/proc/self/fd"))
    read = reader(TrainingSet(cache.shards, cache, None, (2, 4, 4)), 0, None)
    for index in range(12):
        assert read([index], [index])["moments"].shape == (1, 4, 4, 4)
        assert len(os.listdir("/proc/self/fd")) <= before + 3 * (3 + 1)  # tar, its map, its index


@pytest.mark.parametrize(
    "transforms", [TRANSFORMS, Transforms(aspect_buckets={"resolution": 16, "step": 4}, horizontal_flip=True)]
)
def test_batch_size_and_workers_change_nothing(tmp_path, png, transforms):
    """And no worker is left behind."""
    with ShardWriter(tmp_path / "set", samples_per_shard=7) as writer:
        for number in range(10):
            size = (16, 16 + 8 * (number % 3))
            writer.write(f"{number:03}", {"png": png(size, number), "txt": f"caption {number}".encode()})
    source, encode = ShardSet(tmp_path / "set"), encoders(images=lambda images: images[:, :, ::4, ::4])
    for batch_size, num_workers in ((1, 0), (3, 2), (7, 1)):
        out = tmp_path / str(batch_size)
        write_cache(source, out, transforms, encode, batch_size=batch_size, num_workers=num_workers, seed=3)
    assert everything(tmp_path / "1") == everything(tmp_path / "3") == everything(tmp_path / "7")
    assert not multiprocessing.active_children()


def test_an_image_gone_bad_is_named_by_workers_too(tmp_path, png):
    with ShardWriter(tmp_path / "set") as writer:
        writer.write("0", {"png": png(), "txt": b"x"})
        writer.write("1", {"png": png()[:300], "txt": b"x"})
    with pytest.raises(
        BadInput, match=r"^\S+shard-000000\.tar: sample '1': truncated PNG image .* import the set again$"
    ):
        write_cache(ShardSet(tmp_path / "set"), tmp_path / "c", TRANSFORMS, encoders(), num_workers=2)
    assert not multiprocessing.active_children()


def test_real_webdataset_reads_a_cache(tmp_path, source):
    cache = write_cache(source, tmp_path / "c", TRANSFORMS, encoders())
    urls = [str(path) for path in cache.shards.paths]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [f"{i:03}" for i in range(10)]
    for index, sample in enumerate(read):
        assert (np.load(io.BytesIO(sample["image_encoded.npy"])) == cache[index]["image_encoded"]).all()
        assert sample["txt"] == f"caption {index}".encode()


@pytest.mark.parametrize("part", ["images", "captions"])
def test_one_part_alone(tmp_path, source, part):
    other = {"images": "captions", "captions": "images"}[part]
    cache = write_cache(source, tmp_path / "c", TRANSFORMS, encoders(**{other: None}))
    name = {"images": "image_encoded", "captions": "captions_encoded"}[part]
    assert cache.encoded == [name] and (cache[3][name] == expected(source, 3)[name]).all()
    assert ("png" in cache.shards[3].members) == (part == "captions")
    assert (cache.empty_prompt is None) == (part == "images") and caption_of(cache.shards[3]) == "caption 3"


def test_images_of_their_own_shapes(tmp_path, png):
    with ShardWriter(tmp_path / "set") as writer:
        for number, size in enumerate([(16, 16), (16, 16), (16, 32), (16, 16)]):
            writer.write(f"{number}", {"png": png(size, number), "txt": b"x"})
    shapes = []

    def encode(images):
        shapes.append(images.shape)
        return images[:, :, ::4, ::4]

    cache = write_cache(ShardSet(tmp_path / "set"), tmp_path / "c", Transforms(), encoders(images=encode))
    assert shapes == [(3, 3, 16, 16), (1, 3, 32, 16)]
    assert cache.info["members"]["image_encoded"]["shape"] == [3, None, 4]
    assert cache[2]["image_encoded"].shape == (3, 8, 4)


def test_means_are_the_first_half_of_moments(tmp_path, source):
    whole = write_cache(source, tmp_path / "moments", TRANSFORMS, encoders())
    means = write_cache(source, tmp_path / "means", TRANSFORMS, encoders(), options=CacheOptions("mean"))
    assert means.holds_means and not whole.holds_means
    assert all((means[i]["image_encoded"] == whole[i]["image_encoded"][:2]).all() for i in range(10))
    means.check_shapes(2)
    with pytest.raises(BadInput, match="in_channels wants 3"):
        means.check_shapes(3)


def test_variants_are_crops_and_their_mirror_images(tmp_path, source):
    crops = Transforms(resize_smallest_side=20, random_crop_h_w="16, 16", horizontal_flip=True)
    cache = write_cache(source, tmp_path / "c", crops, encoders(), options=CacheOptions(crops=3, flipped=True), seed=9)
    assert cache.variants == 6 and cache.info["members"].keys() == {"image_encoded", "captions_encoded"}
    plain = Transforms(resize_smallest_side=20, random_crop_h_w="16, 16")
    for index in (0, 7):
        for variant in range(6):
            image = plain.decode(source[index].members["png"], sample_seed(9, index, variant // 2))
            wanted = encode_images((image[:, :, ::-1] if variant % 2 else image)[None])[0].astype(np.float16)
            held = cache.encodings(cache.shards[index], cache.encoded, variant)
            assert (held["image_encoded"] == wanted).all()
    read = reader(TrainingSet(cache.shards, cache, None, (2, 4, 4)), 5, None)
    positions = range(40)
    drawn = [integer_below(6, sample_seed(5, position, CROPS)) for position in positions]
    assert set(drawn) == set(range(6))
    for variant, moments in zip(drawn, read([7] * 40, positions)["moments"], strict=True):
        assert (moments.numpy() == cache.encodings(cache.shards[7], ["image_encoded"], variant)["image_encoded"]).all()
    cache.check({"transforms": crops.describe()})


@pytest.mark.parametrize(
    ("options", "message"),
    [(CacheOptions(crops=2), "random_crop_h_w"), (CacheOptions(flipped=True), "horizontal_flip=true")],
)
def test_variants_that_would_be_alike_are_refused(tmp_path, source, options, message):
    with pytest.raises(BadInput, match=message):
        write_cache(source, tmp_path / "c", TRANSFORMS, encoders(), options=options)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("options", "part", "message"),
    [
        (CacheOptions("mean"), "images", "only captions are encoded"),
        (CacheOptions(share_captions=True), "captions", "only images are encoded"),
    ],
)
def test_options_of_what_is_not_encoded_are_refused(tmp_path, source, options, part, message):
    with pytest.raises(BadInput, match=message):
        write_cache(source, tmp_path / "c", TRANSFORMS, encoders(**{part: None}), options=options)


def test_equal_captions_are_stored_once(tmp_path, png):
    captions = ["a cat", "a dog", "a cat", "a cat", "a dog", "a cat"]
    with ShardWriter(tmp_path / "set", 4) as writer:
        for number, caption in enumerate(captions):
            writer.write(f"{number}", {"png": png(seed=number), "txt": caption.encode()})
    seen = []

    def encode(texts):
        seen.extend(texts)
        return np.repeat(encode_captions(texts), 300, 1)  # large beside an image's

    source = ShardSet(tmp_path / "set")
    apart = write_cache(source, tmp_path / "apart", TRANSFORMS, encoders(captions=encode))
    seen.clear()
    options = CacheOptions(share_captions=True)
    cache = write_cache(source, tmp_path / "c", TRANSFORMS, encoders(captions=encode), options=options, batch_size=2)
    assert sorted(seen) == ["", "", "a cat", "a cat", "a dog", "a dog"]  # the empty prompt aside, once in each shard
    assert all(same(cache[i], apart[i]) for i in range(6))
    sizes = [sum(record.bytes for record in one.shards.records) for one in (cache, apart)]
    assert sizes[0] < 0.8 * sizes[1]
    assert all(load_index(path, path.read_bytes()) is not None for path in cache.shards.paths)


def test_random_transforms_follow_seed_and_index(tmp_path, source):
    flips = Transforms(resize_smallest_side=16, center_crop_h_w="16, 16", horizontal_flip=True)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_cache(source, tmp_path / name, flips, encoders(), batch_size=1 + (name == "b"), seed=seed)
    a, b, c = (everything(tmp_path / name)["shard-000000.tar"] for name in "abc")
    assert a == b != c


def test_check_names_the_difference_and_compares_only_what_is_stated(tmp_path, source):
    cache = write_cache(source, tmp_path / "c", TRANSFORMS, encoders())
    cache.check({**FINGERPRINTS, "transforms": TRANSFORMS.describe(), "source": None})
    cache.check({"vae": None})
    cache.check({})
    with pytest.raises(BadInput, match=r"c: made with vae 'aaaa', but this run has 'zzzz'; run precache again"):
        cache.check({**FINGERPRINTS, "vae": "zzzz"})
    with pytest.raises(BadInput, match=r"made with lora None, but this run has 'x'"):
        cache.check({"lora": "x"})
    with pytest.raises(BadInput, match=r"made with transforms .*16.*, but this run has .*32"):
        cache.check({"transforms": Transforms(resize_smallest_side=32, center_crop_h_w="16, 16").describe()})


def test_check_shapes(tmp_path, source):
    cache = write_cache(source, tmp_path / "c", TRANSFORMS, encoders())
    cache.check_shapes(latent_channels=2, context_dim=3)
    cache.check_shapes()
    with pytest.raises(
        BadInput, match=r"image_encoded has shape \(4, 4, 4\), and unet_config.in_channels wants 8 at axis 0"
    ):
        cache.check_shapes(latent_channels=4)
    with pytest.raises(BadInput, match=r"captions_encoded has shape \(5, 3\), and unet_config.context_dim wants 768"):
        cache.check_shapes(context_dim=768)


def test_other_weights_do_not_go_on_with_a_cache(tmp_path, source):
    write_cache(source, tmp_path / "c", TRANSFORMS, encoders())
    before = everything(tmp_path / "c")
    other = encoders(fingerprints={**FINGERPRINTS, "text_encoder": "dddd"})
    with pytest.raises(BadInput, match=r'fingerprints\.text_encoder "bbbb", and now it is "dddd"'):
        write_cache(source, tmp_path / "c", TRANSFORMS, other)
    assert everything(tmp_path / "c") == before


def test_rerun_of_a_finished_cache_encodes_nothing(tmp_path, source):
    write_cache(source, tmp_path / "c", TRANSFORMS, encoders())
    assert len(write_cache(source, tmp_path / "c", TRANSFORMS, encoders(images=pytest.fail))) == 10


def test_values_beyond_float16_are_refused(tmp_path, source):
    for bad in (1e6, np.nan):
        broken = encoders(captions=lambda texts, bad=bad: np.full((len(texts), 5, 3), bad if texts != [""] else 0))
        with pytest.raises(BadInput, match=r"shard-000000\.tar: 000: its encoding is not finite in float16"):
            write_cache(source, tmp_path / str(bad), TRANSFORMS, broken)
        with pytest.raises(BadInput, match="unfinished"):
            LatentCache(tmp_path / str(bad))


def test_image_gone_bad_stops_with_shard_and_key(tmp_path, png):
    with ShardWriter(tmp_path / "set") as writer:
        writer.write("0", {"png": png(), "txt": b"x"})
        writer.write("1", {"png": png()[:300], "txt": b"x"})
    with pytest.raises(BadInput, match=r"shard-000000\.tar: sample '1': truncated PNG image .* import the set again"):
        write_cache(ShardSet(tmp_path / "set"), tmp_path / "c", TRANSFORMS, encoders())


def test_what_is_no_cache(tmp_path, source):
    with pytest.raises(BadInput, match=r"no cache\.json here, so this is not a latent cache"):
        LatentCache(source.paths[0].parent)
    write_cache(source, tmp_path / "c", TRANSFORMS, encoders())
    (tmp_path / "c" / "cache.json").write_text("[]")
    with pytest.raises(BadInput, match="is not what precache writes"):
        LatentCache(tmp_path / "c")


def test_what_is_no_plain_array_is_refused():
    for version in ((1, 0), (2, 0)):
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.arange(6, dtype=np.float16).reshape(2, 3), version)
        assert (npy_array(memoryview(buffer.getvalue())) == np.arange(6).reshape(2, 3)).all()
    objects, fortran = io.BytesIO(), io.BytesIO()
    np.save(objects, np.array([{}], dtype=object), allow_pickle=True)
    np.save(fortran, np.asfortranarray(np.ones((2, 3))))
    short = npy_bytes(np.ones(9))[:-1]
    for data in (b"garbage", b"", objects.getvalue(), fortran.getvalue(), short):
        with pytest.raises(ValueError):
            npy_array(memoryview(data))


def test_killed_precache_goes_on_where_it_stopped(tmp_path, png):
    (tmp_path / "in").mkdir()
    for number in range(30):
        (tmp_path / "in" / f"{number:02}.png").write_bytes(png(seed=number))
        (tmp_path / "in" / f"{number:02}.txt").write_text(f"caption {number}")
    import_dataset(tmp_path / "in", tmp_path / "set", samples_per_shard=4)
    program = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from test_cache import *\n"
        "def pause(done, total):\n"
        "    if done == 10:\n"
        "        print('paused', flush=True); sys.stdin.read()\n"
        "write_cache(ShardSet(sys.argv[1]), sys.argv[2], TRANSFORMS, encoders(), batch_size=2, progress=pause)\n"
    )
    out = tmp_path / "c"
    command = [sys.executable, "-c", program, str(tmp_path / "set"), str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline().strip() == b"paused"
        assert (out / "shard-000001.done.json").exists()
        process.send_signal(signal.SIGKILL)
    with pytest.raises(BadInput, match="unfinished; run the command"):
        LatentCache(out)
    encoded = []
    counting = encoders(images=lambda images: (encoded.append(len(images)), encode_images(images))[1])
    cache = write_cache(ShardSet(tmp_path / "set"), out, TRANSFORMS, counting, batch_size=2)
    assert sum(encoded) == 30 - 8 and len(cache) == 30
    write_cache(ShardSet(tmp_path / "set"), tmp_path / "reference", TRANSFORMS, encoders(), batch_size=2)
    assert everything(out) == everything(tmp_path / "reference")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_processes_share_the_shards_and_the_last_one_finishes(tmp_path, source, order):
    alone = write_cache(source, tmp_path / "alone", TRANSFORMS, encoders(), seed=1)
    first, second = order
    reported = []
    share = dict(seed=1, processes=2, progress=lambda done, total: reported.append((done, total)))
    assert write_cache(source, tmp_path / "two", TRANSFORMS, encoders(), rank=first, **share) is None
    with pytest.raises(BadInput, match="unfinished"):
        LatentCache(tmp_path / "two")
    together = write_cache(source, tmp_path / "two", TRANSFORMS, encoders(), rank=second, **share)
    assert everything(tmp_path / "two") == everything(tmp_path / "alone")
    assert len(together) == len(alone) and reported[-1] == (10, 10) and reported == sorted(reported)


def test_a_lost_process_loses_its_open_shard_alone(tmp_path, source):
    class Lost(Exception):
        pass

    def fails(images):
        raise Lost

    out = tmp_path / "out"
    with pytest.raises(Lost):
        write_cache(source, out, TRANSFORMS, encoders(images=fails), rank=1, processes=2)
    assert write_cache(source, out, TRANSFORMS, encoders(), rank=0, processes=2) is None
    counted = []

    def counts(images):
        counted.append(len(images))
        return encode_images(images)

    assert len(write_cache(source, out, TRANSFORMS, encoders(images=counts))) == 10  # one process, another time
    assert sum(counted) == 4 and everything(out) == everything(
        write_cache(source, tmp_path / "alone", TRANSFORMS, encoders()).folder
    )


def test_only_one_finishes(tmp_path):
    first, second = (ResumableOutput(tmp_path / "x", {"a": 1}, shared=True) for _ in range(2))
    with first.finishing() as first_does, second.finishing() as second_does:
        assert (first_does, second_does) == (True, False)
    with second.finishing() as second_does:
        assert second_does
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["unfinished.json"]


def test_another_process_file_under_way_is_left_alone(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / ".unfinished.json.1234.INCOMPLETE").write_text("{")
    ResumableOutput(folder, {"a": 1}, shared=True)
    ResumableOutput(folder, {"a": 1}, shared=True)
    assert (folder / ".unfinished.json.1234.INCOMPLETE").exists()
    ResumableOutput(folder, {"a": 1})
    assert not (folder / ".unfinished.json.1234.INCOMPLETE").exists()


def test_buckets_belong_to_the_tars_beside_them(tmp_path, source):
    """A buckets.npy of another cache of as many samples would train on batches of mixed sizes."""

    def encode(images):
        return np.zeros((len(images), 4, images.shape[2] // 4, images.shape[3] // 4), np.float32)

    several = Transforms(aspect_buckets={"resolution": 16, "step": 4})
    cache = write_cache(source, tmp_path / "cache", several, encoders(images=encode))
    numbers, _ = cache.buckets()
    np.save(tmp_path / "cache" / "buckets.npy", numbers + 1)
    with pytest.raises(BadInput, match=r"buckets\.npy: not of the tars beside it, as cache\.json says; precache again"):
        cache.buckets()
