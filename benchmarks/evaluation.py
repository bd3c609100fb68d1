"""Distances of real images as they are damaged more and more, and images a second through FID's Inception.

    python examples/openmoji/make_images.py EMOJI --size 128 --limit 600
    python benchmarks/evaluation.py WORK_FOLDER --emoji EMOJI [--other FOLDER] [--rows distances,speed,root]

distances: emoji against themselves damaged and against the same emoji of another font (a folder whose files have the
same names, such as 1f600.webp), and crops of scikit-image's and scikit-learn's photographs against themselves damaged;
features of efficientnet-lite0. speed: one folder of images through our path and through torchmetrics', the same network
with random weights in both, in turns. root: the Frechet distance at 2,048 features against scipy's sqrtm. Every figure
depends on what else the machine does: run it alone.
"""

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import scipy.linalg
import skimage.data
import torch
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images
from torchmetrics.image.fid import FrechetInceptionDistance

from latentsmith.evaluation.collect import collect
from latentsmith.evaluation.extractors import Extractor, run_inception
from latentsmith.evaluation.frechet import Moments, frechet_distance, moments_of
from latentsmith.evaluation.images import Images, open_images
from latentsmith.evaluation.resize import to_tensor
from latentsmith.evaluation.run import Evaluator, Settings
from latentsmith.models.inception import FidInception

METRICS = ("fid", "kid", "precision_recall", "density_coverage")
CROP, CROPS = 160, 600


def noisy(image: Image.Image, level: float) -> Image.Image:
    pixels = np.asarray(image) + level * np.random.default_rng(0).standard_normal((*image.size[::-1], 3))
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def blurred(image: Image.Image, radius: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def compressed(image: Image.Image, quality: float) -> Image.Image:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=int(quality))
    return Image.open(file, formats=("JPEG",)).convert("RGB")


DAMAGES: dict[str, tuple[Callable[[Image.Image, float], Image.Image], tuple[float, ...]]] = {
    "noise, deviation of 255": (noisy, (5, 15, 30, 60)),
    "blur, radius in pixels": (blurred, (0.5, 1, 2, 4)),
    "JPEG, quality": (compressed, (80, 40, 15, 5)),
}


def photographs() -> list[Image.Image]:
    """Return CROPS random crops of nine photographs."""
    names = ("astronaut", "chelsea", "coffee", "rocket", "immunohistochemistry", "retina", "hubble_deep_field")
    found = [getattr(skimage.data, name)() for name in names[:5]] + list(load_sample_images().images)
    random, crops = np.random.default_rng(0), []
    for number in range(CROPS):
        whole = found[number % len(found)]
        top, left = (int(random.integers(0, length - CROP)) for length in whole.shape[:2])
        crops.append(Image.fromarray(whole[top : top + CROP, left : left + CROP]))
    return crops


def distances(work: Path, emoji: Path, other: Path | None) -> None:
    opened = open_images(emoji)
    drawn = [opened.read(number) for number in range(len(opened))]
    for title, images in (("emoji", drawn), ("photographs", photographs())):
        half = len(images) // 2
        evaluator = Evaluator(Settings(METRICS, "efficientnet-lite0", resamples=20), images[:half], work)
        rows = {"other images of the same kind": images[half:]}
        if title == "emoji" and other:
            rows["the same emoji of another font"] = same_names(opened, half, other)
        for name, (damage, levels) in DAMAGES.items():
            rows |= {f"{name} {level:g}": [damage(image, level) for image in images[:half]] for level in levels}
        for number, (name, each) in enumerate(rows.items()):
            values = evaluator(each).values
            if not number:
                print(f"\n| {title} | {' | '.join(values)} |\n|{'---|' * (len(values) + 1)}")
            print(f"| {name} | {' | '.join(f'{value.value:.4g}' for value in values.values())} |", flush=True)


def same_names(images: Images, count: int, folder: Path) -> list[Image.Image]:
    files = {path.stem.lower().replace("-fe0f", ""): path for path in folder.rglob("*.*")}
    names = [Path(name).stem.lower().replace("-fe0f", "") for name in images.names[:count]]
    found = [files[name] for name in names if name in files]
    opened = Images("other", [path.name for path in found], lambda number: open_images(found[number]).read(0), str)
    return [opened.read(number) for number in range(len(found))]


def speed(work: Path, emoji: Path, rounds: int = 3, count: int = 128) -> None:
    torch.manual_seed(0)
    plain, folded = FidInception(), FidInception()
    folded.load_state_dict(plain.state_dict())
    folded.fold()
    images = open_images(emoji).first(count)

    class Network(torch.nn.Module):
        num_features = 2048

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            resized = torch.nn.functional.interpolate(pixels.float(), (299, 299), mode="bilinear")
            return plain((resized - 128) / 128)["2048"]

    def ours(number: int) -> None:
        def network(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            return run_inception(folded, pixels)

        extractor = Extractor("inception", network, 299, "pytorch-bilinear", f"{number}{time.time()}")
        moments_of(collect(images, extractor, work).chunks())

    def torchmetrics(number: int) -> None:
        metric = FrechetInceptionDistance(Network(), input_img_size=(3, 299, 299))
        with torch.inference_mode():
            for start in range(0, count, 64):
                batch = [to_tensor(images.read(each)) for each in range(start, min(count, start + 64))]
                metric.update(torch.stack(batch).byte(), real=True)

    rates: dict[str, list[float]] = {"ours": [], "torchmetrics": []}
    for number in range(rounds):
        for name, path in (("ours", ours), ("torchmetrics", torchmetrics)):
            start = time.perf_counter()
            path(number)
            rates[name].append(count / (time.perf_counter() - start))
    left, right = (median(each) for each in rates.values())
    print(f"Inception, {torch.get_num_threads()} threads: ours {left:.1f}, torchmetrics {right:.1f} images/s: "
          f"{left / right:.2f} times")  # fmt: skip


def root() -> None:
    random = np.random.default_rng(0)
    left, right = (Moments.of(random.standard_normal((4000, 2048)) * scale) for scale in (1.0, 1.3))
    start = time.perf_counter()
    ours = frechet_distance(left, right)
    between = time.perf_counter()
    product = scipy.linalg.sqrtm(left.covariance @ right.covariance)
    theirs = ((left.mean - right.mean) ** 2).sum() + np.trace(left.covariance + right.covariance - 2 * product.real)
    end = time.perf_counter()
    print(f"2,048 features: ours {between - start:.1f} s, scipy's sqrtm {end - between:.1f} s, {ours:.6f} {theirs:.6f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--emoji", type=Path, required=True)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--rows", default="distances,speed,root")
    given = parser.parse_args()
    rows = given.rows.split(",")
    if "speed" in rows:
        speed(given.work, given.emoji)
    if "root" in rows:
        root()
    if "distances" in rows:
        distances(given.work, given.emoji, given.other)


if __name__ == "__main__":
    main()
