"""Samples a second from a latent cache, and images a second from JPEGs, against what others do.

    python benchmarks/data.py WORK_FOLDER [--samples 2048] [--rounds 5] [--rows cache,decode,open] [--json FILE]

cache: batches of 64 in random order as tensors, shapes of Stable Diffusion v1, from (a) our cache by its reader, and
by the loader of training, with and without the noise it draws, (b) webdataset over tars
of pickles as NeMo precaches them, (c) torch's loader over two .npy files a sample; and the machine's own reading of the
same bytes. decode: real JPEGs (scikit-image's and scikit-learn's) to 512 x 512, resized and cropped, by our transforms
and by webdataset + Pillow + the steps of NeMo's augmentations. open: a set of 100 million samples, made of
hard links. One process and one thread each; all files are in the page cache; the peers take turns, in both orders.
"""

import argparse
import io
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
import webdataset
from PIL import Image

from latentsmith.data.cache_writer import Encoders, write_cache
from latentsmith.data.dataset import TrainingSet
from latentsmith.data.latent_cache import LatentCache
from latentsmith.data.loader import RunPositions, RunSamples, run_loader
from latentsmith.data.reader import reader
from latentsmith.data.shards import ShardSet, ShardWriter, write_set_file
from latentsmith.data.shuffle import shuffled_index
from latentsmith.data.transforms import Transforms
from latentsmith.diffusion import NoiseSchedule
from latentsmith.training.random_draws import DiffusionDraws

MOMENTS, TEXT, BATCH = (8, 64, 64), (77, 768), 64
FOUND: dict[str, dict] = {}  # all that is measured, for --json


def compared(peers: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """The median rate of each peer over `rounds` in turns; each returns how much it has done."""
    rates: dict[str, list[float]] = {name: [] for name in peers}
    for number in range(rounds + 1):
        for name in list(peers) if number % 2 else reversed(peers):
            start = time.perf_counter()
            done = peers[name]()
            if number:  # the first round warms up
                rates[name].append(done / (time.perf_counter() - start))
    return {name: median(values) for name, values in rates.items()}


def table(title: str, unit: str, rates: dict[str, float]) -> None:
    FOUND[title] = {"unit": unit, **rates}
    ours = next(iter(rates.values()))
    print(f"\n{title}")
    for name, rate in rates.items():
        print(f"  {name:44} {rate:12,.0f} {unit}   ours is {ours / rate:.2f} times that")


def make_cache(folder: Path, samples: int) -> LatentCache:
    """A cache of random moments and embeddings, the same as NeMo's pickles in tars, and as .npy files."""
    if not (folder / "cache" / "set.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        generator = np.random.default_rng(0)
        with ShardWriter(folder / "source") as writer:
            for number in range(samples):
                writer.write(f"{number:06}", {"png": b"x", "txt": f"caption {number}".encode()})
        write_set_file(folder / "source", writer.finished)
        encoders = Encoders(
            images=None,
            captions=lambda texts: generator.standard_normal((len(texts), *TEXT), np.float32),
            fingerprints={},
            versions={},
        )
        write_cache(ShardSet(folder / "source"), folder / "texts", Transforms(), encoders, batch_size=64)
        add_moments(folder, generator)
    return LatentCache(folder / "cache")


def add_moments(folder: Path, generator: np.random.Generator) -> None:
    """Moments beside the embeddings of `texts`, in the three forms."""
    from latentsmith.data.sample_io import npy_bytes

    texts = LatentCache(folder / "texts")
    (folder / "npy").mkdir()
    with (
        ShardWriter(folder / "cache") as writer,
        webdataset.ShardWriter(f"{folder}/nemo-%06d.tar", 1000, verbose=0) as nemo,
    ):
        for index in range(len(texts)):
            moments = generator.standard_normal(MOMENTS, np.float32).astype(np.float16)
            text = texts[index]["captions_encoded"]
            members = {"image_encoded.npy": npy_bytes(moments), "captions_encoded.npy": npy_bytes(text), "txt": b"x"}
            writer.write(f"{index:06}", members)
            held = {"autoencoderkl_image": moments, "clip-vit-large-patch14_text": text}
            nemo.write({"__key__": f"{index:06}", "pickle": pickle.dumps(held)})
            np.save(folder / "npy" / f"{index}.image.npy", moments)
            np.save(folder / "npy" / f"{index}.text.npy", text)
    write_set_file(folder / "cache", writer.finished)
    for name in ("cache.json", "empty_prompt.npy"):
        shutil.copy(folder / "texts" / name, folder / "cache" / name)
    info = (folder / "cache" / "cache.json").read_text()
    member = '"members": {"image_encoded": {"shape": [8, 64, 64], "dtype": "float16"},'
    (folder / "cache" / "cache.json").write_text(info.replace('"members": {', member))


class NpyFiles(torch.utils.data.Dataset):
    def __init__(self, folder: Path, samples: int):
        self.folder, self.samples = folder, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.load(self.folder / f"{index}.image.npy"), np.load(self.folder / f"{index}.text.npy")


def cache_rows(work: Path, samples: int, rounds: int) -> None:
    folder = work / f"cache-{samples}"
    cache, turn = make_cache(folder, samples), iter(range(10**6))
    tars = sorted(map(str, folder.glob("nemo-*.tar")))
    buffer = bytearray(max(record.bytes for record in cache.shards.records))  # to memory, as the others do

    def ours() -> int:
        seed = next(turn)
        for at in range(0, samples - BATCH + 1, BATCH):
            _ = read(
                [shuffled_index(seed, position, samples) for position in range(at, at + BATCH)], range(at, at + BATCH)
            )
        return samples // BATCH * BATCH

    samples_of = TrainingSet(cache.shards, cache, None, (4, *MOMENTS[1:]))
    read = reader(samples_of, 0, None)

    def by_loader(draw: Callable) -> int:
        run = run_loader(
            RunSamples(read, draw, samples, 0), RunPositions(next(turn) * samples // BATCH * BATCH, BATCH, BATCH)
        )
        return sum(len(batch["moments"]) for batch in islice(run, samples // BATCH))

    def by_webdataset() -> int:
        stream = webdataset.WebDataset(tars, shardshuffle=100).shuffle(1000)
        pairs = stream.map(lambda sample: pickle.loads(sample["pickle"])).to_tuple(
            "autoencoderkl_image", "clip-vit-large-patch14_text"
        )
        return sum(len(torch.from_numpy(images)) for images, _ in pairs.batched(BATCH, partial=False))

    def by_files() -> int:
        loader = torch.utils.data.DataLoader(NpyFiles(folder / "npy", samples), BATCH, shuffle=True, drop_last=True)
        return sum(len(images) for images, _ in loader)

    def by_machine() -> int:
        for path in cache.shards.paths:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        return samples

    draws = DiffusionDraws(0, samples_of.latent_shape, NoiseSchedule.from_config())
    peers: dict[str, Callable[[], int]] = {
        "latentsmith's cache": ours,
        "the loader of training": lambda: by_loader(lambda *_: {}),
        "the loader of training, with noise": lambda: by_loader(draws),
        "webdataset + pickle": by_webdataset,
        "torch's loader over .npy": by_files,
        "the machine's read of the same bytes": by_machine,
    }
    rates = compared(peers, rounds)
    each = cache.shards.bytes / samples
    table(f"cached latents, {samples:,} samples of {each / 1024:.0f} KiB", "samples/s", rates)
    ours_bytes = rates["latentsmith's cache"] * (np.prod(MOMENTS) + np.prod(TEXT)) * 2
    print(f"  {ours_bytes / 2**30:.2f} GiB/s; the machine reads {rates[list(peers)[-1]] * each / 2**30:.2f} GiB/s")


def photographs() -> dict[str, bytes]:
    import skimage
    import sklearn

    folders = [Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images"]
    return {path.name: path.read_bytes() for folder in folders for path in sorted(folder.glob("*.jpg"))}


def like_nemo(data: bytes) -> torch.Tensor:
    """Resize the shorter side to 512, cut out the middle, to [-1, 1]: the steps of torchvision's transforms."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    short = min(image.size)
    width, height = (512 if side == short else int(512 * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    top, left = round((height - 512) / 2), round((width - 512) / 2)
    image = image.crop((left, top, left + 512, top + 512))
    pixels = torch.from_numpy(np.array(image, np.uint8)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div(255) * 2 - 1


def decode_rows(work: Path, rounds: int) -> None:
    images = {name: data for name, data in photographs().items() if min(Image.open(io.BytesIO(data)).size) >= 400}
    folder = work / "jpeg"
    with ShardWriter(folder) as writer:
        for number in range(60):
            name = list(images)[number % len(images)]
            writer.write(f"{number:06}", {"jpg": images[name], "txt": name.encode()})
    shards, made = ShardSet(folder), Transforms(resize_smallest_side=512, center_crop_h_w="512, 512")

    def ours() -> int:
        return len([torch.from_numpy(made.decode(sample.members["jpg"])) for sample in shards])

    def by_webdataset() -> int:
        stream = webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False)
        return len([like_nemo(sample["jpg"]) for sample in stream])

    sizes = ", ".join("{}x{}".format(*Image.open(io.BytesIO(data)).size) for data in images.values())
    table(
        f"JPEGs of {sizes} to 512x512",
        "images/s",
        compared({"latentsmith": ours, "webdataset + Pillow, as NeMo": by_webdataset}, rounds),
    )
    for name, data in images.items():
        difference = np.abs(made.decode(data) - like_nemo(data).numpy()).mean() * 127.5
        print(f"  {name}: mean difference {difference:.2f} of 255")


def open_rows(work: Path) -> None:
    folder, per_shard, shards = work / "hundred-million", 10_000, 10_000
    if not (folder / "set.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        with ShardWriter(folder / "one", per_shard) as writer:
            for number in range(per_shard):
                writer.write(f"{number:09}", {"txt": f"{number}".encode()})
        one, record = folder / "one" / "shard-000000.tar", writer.finished[0]
        for number in range(shards):
            os.link(one, folder / f"shard-{number:06}.tar")
            os.link(one.with_suffix(".index.npy"), folder / f"shard-{number:06}.index.npy")
        write_set_file(folder, [replace(record, file=f"shard-{number:06}.tar") for number in range(shards)])
    start = time.perf_counter()
    whole = ShardSet(folder)
    opened = time.perf_counter() - start
    start = time.perf_counter()
    for position in range(1000):
        _ = whole[shuffled_index(0, position, len(whole))]
    each = (time.perf_counter() - start) / 1000
    FOUND["open"] = {"samples": len(whole), "seconds": opened, "seconds a sample": each}
    print(f"\na set of {len(whole):,} samples: opened in {opened:.2f} s, a sample anywhere in {1e6 * each:.0f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", default="cache,decode,open")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = options.rows.split(",")
    if "cache" in rows:
        cache_rows(options.work, options.samples, options.rounds)
    if "decode" in rows:
        decode_rows(options.work, options.rounds)
    if "open" in rows:
        open_rows(options.work)
    if options.json:
        options.json.write_text(json.dumps(FOUND, indent=1) + "\n")


if __name__ == "__main__":
    main()
