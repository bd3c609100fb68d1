"""Images on disk to numbers: sources, the cache of features, processes, statistics, what is refused."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from latentsmith.data.ingest import import_data
from latentsmith.evaluation import evaluate, fid, kid, precision_recall
from latentsmith.evaluation.collect import CHUNK, chunk_file, collect
from latentsmith.evaluation.extractors import Extractor
from latentsmith.evaluation.images import open_images
from latentsmith.evaluation.run import Evaluator, Settings
from latentsmith.files.errors import BadInput

METRICS = ("fid", "kid", "precision_recall", "density_coverage")
MODULE = """
import torch
torch.set_num_threads(1)
class Small(torch.nn.Module):
    image_size = 16
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.project = torch.nn.Linear(3 * 16 * 16, 24)
    def forward(self, pixels):
        return self.project(pixels.flatten(1) / 255)
"""


def write_images(folder, count, seed, shift=0):
    random = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(count):
        pixels = (random.integers(0, 200, (20, 24, 3)) + shift).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")
        (folder / f"{number:04d}.txt").write_text(f"image {number}")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders `made` and `real`, and a module my_extractor on the path."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_images(folder / "made", CHUNK + 20, 1)
    write_images(folder / "real", CHUNK + 40, 2, shift=20)
    (folder / "my_extractor.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def measured(place, cache=None, images="made", reference="real", **options):
    own = {"features": "my_extractor:Small", "trust": True, "metrics": METRICS, "resamples": 10, **options}
    named = place / reference if isinstance(reference, str) else reference
    return evaluate(place / images if isinstance(images, str) else images, named, cache=cache, **own)


def plain(found):
    return {name: (each.value, each.low, each.high) for name, each in found.values.items()}


def features(place, name):
    made = Evaluator(Settings(features="my_extractor:Small", trust=True), place / "real", place / "c").extractors
    opened = open_images(place / name)
    return collect(opened, made["features"], place / "c").all()


def test_numbers_are_those_of_the_functions(place):
    found = plain(measured(place))
    left, right = features(place, "made"), features(place, "real")
    assert left.shape == (CHUNK + 20, 24)
    assert found["frechet_distance (my_extractor:Small)"][0] == pytest.approx(fid(left, right), rel=1e-12)
    assert found["kernel_distance (my_extractor:Small)"][0] == kid(left, right)
    assert (found["precision"][0], found["recall"][0]) == precision_recall(left, right)
    assert all(low <= value <= high for value, low, high in found.values())


def test_folder_set_memory_and_tensor_are_the_same_images(place, tmp_path):
    import_data(place / "made", tmp_path / "set")
    opened = open_images(place / "made")
    listed = [opened.read(number) for number in range(len(opened))]
    tensor = torch.from_numpy(np.stack([np.asarray(image) for image in listed])).permute(0, 3, 1, 2)
    expected = plain(measured(place))
    for source in (tmp_path / "set", listed, tensor, tensor / 127.5 - 1):
        assert plain(measured(place, images=source)) == expected
    assert open_images(tmp_path / "set").caption(3) == opened.caption(3) == "image 3"


def test_features_are_made_once_and_kept_by_what_made_them(place, tmp_path, monkeypatch):
    first = plain(measured(place, tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("latentsmith.evaluation.collect.outputs", lambda *_: pytest.fail("made again"))
        assert plain(measured(place, tmp_path)) == first
        with pytest.raises(BaseException, match="made again"):
            measured(place, tmp_path, resize="legacy-tensorflow")
    assert plain(measured(place, tmp_path, resize="legacy-tensorflow")) != first


def test_a_killed_run_continues_bit_for_bit(place, tmp_path):
    expected = plain(measured(place))
    measured(place, tmp_path)
    for chunk in tmp_path.rglob("chunk-000001.safetensors"):  # as if killed before these
        chunk.unlink()
        (chunk.parent / f".{chunk.name}.00000000.INCOMPLETE").write_bytes(b"half")
    assert plain(measured(place, tmp_path)) == expected


def test_two_processes_are_one(place, tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from latentsmith.evaluation import evaluate\n"
        "found = evaluate(sys.argv[1] + '/made', sys.argv[1] + '/real', metrics=('fid', 'kid'), resamples=10,\n"
        "                 features='my_extractor:Small', trust=True, cache=sys.argv[2])\n"
        "print(*[repr(v) for each in found.values.values() for v in (each.value, each.low, each.high)])"
    )
    command = [sys.executable, "-c", script, str(place), str(tmp_path / "cache")]
    environments = [os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
    running = [subprocess.Popen(command, env=each, stdout=subprocess.PIPE, text=True) for each in environments]
    printed = [process.communicate(timeout=600)[0] for process in running]
    one = [v for each in plain(measured(place, metrics=("fid", "kid"))).values() for v in each]
    for text in printed:
        np.testing.assert_allclose([float(word) for word in text.split()], one, rtol=1e-10)


def test_statistics_are_kept_and_read(place, tmp_path):
    expected = plain(measured(place, tmp_path, metrics="fid"))
    kept = [file for file in tmp_path.rglob("statistics.npz")]
    assert len(kept) == 1
    name = "frechet_distance (my_extractor:Small)"
    found = plain(measured(place, reference=kept[0], metrics="fid"))[name]
    assert found == pytest.approx(expected[name], rel=1e-9)
    with pytest.raises(BadInput, match="made with resize clean, not none"):
        measured(place, reference=kept[0], metrics="fid", resize="none")
    with pytest.raises(BadInput, match="metrics kid: it compares single images"):
        measured(place, reference=kept[0], metrics="kid")
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(24), sigma=np.eye(24))
    with pytest.raises(BadInput, match="statistics without an extractor are taken as Inception's"):
        measured(place, reference=tmp_path / "foreign.npz", metrics="fid")
    np.savez(tmp_path / "other.npz", a=np.zeros(24))
    with pytest.raises(BadInput, match="holds a; statistics have mu and sigma"):
        measured(place, reference=tmp_path / "other.npz", metrics="fid")


def test_images_of_any_mode_are_measured(place, tmp_path):
    folder = write_images(tmp_path / "modes", 3, 5)
    image = Image.open(folder / "0000.png")
    for mode, name in (("L", "grey.png"), ("CMYK", "cmyk.jpg"), ("RGBA", "alpha.png"), ("P", "palette.gif")):
        image.convert(mode).save(folder / name)
    assert measured(place, images=folder, metrics="fid").images == 7


def test_bad_input_is_one_line(place, tmp_path):
    (tmp_path / "empty").mkdir()
    one, mixed, broken = (write_images(tmp_path / name, 1, 1) for name in ("one", "mixed", "broken"))
    (mixed / "shard-000000.tar").write_bytes(b"")
    (broken / "zzz.png").write_bytes((broken / "0000.png").read_bytes()[:300])
    for options, message in (
        ({"images": tmp_path / "none"}, "no such folder of images or set of shards"),
        ({"images": tmp_path / "empty"}, "holds no images"),
        ({"images": mixed}, "holds both shards and image files"),
        ({"images": one}, "1 images, at least 2 are needed"),
        ({"images": broken}, "zzz.png: cannot be read as an image"),
        ({"images": one, "count": 5}, "holds 1 images, 5 are asked for"),
        ({"resize": "none"}, "0000.png: resize none: an image of 24x20, the extractor takes 16x16"),
        ({"metrics": "fit"}, "metrics fit: is not one of fid"),
        ({"metrics": "fid", "reference": None}, "metrics fid: compares with real images"),
        ({"metrics": "inception_score"}, "the extractor gives no class probabilities"),
        ({"images": [np.zeros((4, 4))]}, "uint8 (height, width, 3) was expected"),
    ):
        with pytest.raises(BadInput) as caught:
            measured(place, **options)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_an_extractor_gives_is_checked(place, tmp_path):
    good = Extractor("mine", lambda pixels: {"features": pixels.mean((2, 3))}, 16, "clean", "0")
    images = open_images(place / "made").first(4)
    for network, message in (
        (lambda pixels: {"features": pixels}, "the shape"),
        (lambda pixels: {"features": pixels.mean((2, 3)) / 0}, "are not finite"),
    ):
        with pytest.raises(BadInput, match=message):
            collect(images, replace(good, network=network), tmp_path)
    made = collect(images, good, tmp_path)
    assert chunk_file(made.folder, 0).exists() and made.all().shape == (4, 3)
