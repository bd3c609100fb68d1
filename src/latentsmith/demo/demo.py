"""`latentsmith demo`: from captioned images of synthetic scenes to images generated from captions."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from latentsmith import html_report
from latentsmith.config import load_config
from latentsmith.data.ingest import import_data, train_vocabulary
from latentsmith.data.precache import precache
from latentsmith.data.sample_io import image_member
from latentsmith.data.shards import ShardSet
from latentsmith.data.transforms import Transforms
from latentsmith.files.atomic import atomic_open, write_text
from latentsmith.files.memory import peak_bytes
from latentsmith.inference import Pipeline
from latentsmith.inference.sheets import labelled_sheet
from latentsmith.progress import progress
from latentsmith.training.hooks.samples import save_row
from latentsmith.training.metrics_log import METRICS_FILE, read_rows
from latentsmith.training.report import captioned_row, noisy_chart, sample_images
from latentsmith.training.train import train
from latentsmith.training.train_vae import train_vae
from latentsmith.units import duration

from . import scenes
from .adherence import ATTRIBUTES, Adherence, SceneReader

SCENES, VAE_IMAGES = 5000, 12000  # drawn for the U-Net; for a VAE from scratch
RANDOM_PROMPTS, HELD_OUT_PROMPTS, SHOWN = 200, 100, (28, 12)  # measured; shown of each
STEPS, GUIDANCE, BATCH = 12, 1.5, 50  # of sampling
PROMPT_SEED = 2024  # unlike the seed of the training scenes


@dataclass
class Stages:
    """Time and memory of each stage, for the report."""

    rows: list[tuple[str, float, float]] = field(default_factory=list)  # name, seconds, peak GiB up to its end

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        print(f"\n== {name}", flush=True)
        started = time.monotonic()
        yield
        self.rows.append((name, time.monotonic() - started, peak_bytes() / 2**30))


def demo(out: Path, *, from_scratch: bool = False) -> Path:
    """Draw scenes, import and cache them, train, generate images for random prompts and measure how they follow them.

    from_scratch: train the VAE and the text encoder too, instead of taking those that come with the package.
    Returns report.html in the folder `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    stages, commands = Stages(), Commands(out)
    with stages.stage("drawing scenes and importing them"):
        commands.scenes(SCENES)
    overrides = train_vae_and_text_encoder(out, stages, commands) if from_scratch else []
    with stages.stage("caching latents and text embeddings"):
        commands.precache(overrides)
    with stages.stage("training the U-Net on the cache"):
        run = commands.train(overrides)
    pipeline = Pipeline.from_pretrained(run)
    with stages.stage("generating images and measuring them"):
        results = [
            Result("random prompts", scenes.sample_scenes(RANDOM_PROMPTS, PROMPT_SEED)),
            Result("held-out combinations", scenes.sample_scenes(HELD_OUT_PROMPTS, PROMPT_SEED, held_out=True)),
        ]
        generate(pipeline, results)
        save_images(out, results)
        save_reconstructions(out / "reconstructions.png", pipeline, out / "shards")
    page = write_page(out, run, stages, commands, results)
    print("", *(f"{result.name}: {result.score}" for result in results), sep="\n")
    seconds = sum(row[1] for row in stages.rows)
    print(f"{seconds / 60:.1f} minutes, peak memory {stages.rows[-1][2]:.2f} GiB")
    print(f"images:  {out / 'grid.png'}\nreport:  {page}\ntry it:  latentsmith serve {out / 'demo'}")
    return page


@dataclass
class Commands:
    """The stages as functions, and as the commands that do the same by hand."""

    out: Path
    lines: list[str] = field(default_factory=list)

    def scenes(self, count: int) -> None:
        self.record(
            f"data scenes {self.out / 'scenes'} --count {count}",
            f"data import {self.out / 'scenes'} {self.out / 'shards'}",
        )
        if not (self.out / "shards" / "set.json").exists():
            scenes.write_scenes(self.out / "scenes", count)
            import_data(self.out / "scenes", self.out / "shards")

    def precache(self, overrides: Sequence[str]) -> None:
        keys = [f"model.data.train.dataset_path={self.out / 'shards'}", *overrides]
        self.record(f"precache --config demo --out {self.out / 'cache'} {' '.join(keys)}")
        precache(load_config("demo", keys), self.out / "cache")

    def train(self, overrides: Sequence[str]) -> Path:
        keys = [f"model.data.train.dataset_path={self.out / 'cache'}", f"exp_manager.exp_dir={self.out}", *overrides]
        self.record(f"train --config demo {' '.join(keys)}")
        return train(load_config("demo", keys))

    def record(self, *lines: str) -> None:
        self.lines += [f"latentsmith {line}" for line in lines]


def train_vae_and_text_encoder(out: Path, stages: Stages, commands: Commands) -> list[str]:
    """Train a VAE, then a text encoder; return the overrides that make the demo use them."""
    shards, exp_dir = f"model.data.train.dataset_path={out / 'vae-shards'}", f"exp_manager.exp_dir={out}"
    with stages.stage("training the VAE"):
        commands.record(
            f"data scenes {out / 'vae-images'} --count {VAE_IMAGES} --seed 1 --doodles 0.5",
            f"data import {out / 'vae-images'} {out / 'vae-shards'}",
            f"train-vae --config demo_vae {shards} {exp_dir}",
        )
        scenes.write_scenes(out / "vae-images", VAE_IMAGES, 1, doodles=0.5)
        import_data(out / "vae-images", out / "vae-shards")
        vae = train_vae(load_config("demo_vae", [shards, exp_dir]))
    with stages.stage("training the text encoder"):
        keys = [
            f"model.first_stage_config.from_pretrained={vae}",
            f"model.cond_stage_config.tokenizer={out / 'tokenizer'}",
        ]
        scenes_set = f"model.data.train.dataset_path={out / 'shards'}"
        latents = f"model.data.train.dataset_path={out / 'latents'}"
        commands.record(
            f"data vocabulary {out / 'shards'} {out / 'tokenizer'} --size 616",
            f"precache --config demo_text --out {out / 'latents'} {scenes_set} {' '.join(keys)}",
            f"train --config demo_text {latents} {exp_dir} {' '.join(keys)}",
        )
        train_vocabulary(out / "shards", out / "tokenizer", size=616)
        precache(load_config("demo_text", [scenes_set, *keys]), out / "latents")
        text_encoder = train(load_config("demo_text", [latents, exp_dir, *keys]))
    return [*keys, f"model.cond_stage_config.from_pretrained={text_encoder}"]


@dataclass
class Result:
    """Images generated for the captions of scenes, uint8 (height, width, 3), and how well they follow them."""

    name: str
    scenes: list[scenes.Scene]
    images: list[np.ndarray] = field(default_factory=list)

    @property
    def prompts(self) -> list[str]:
        return [scenes.caption(scene) for scene in self.scenes]

    @cached_property
    def score(self) -> Adherence:
        return SceneReader().adherence(self.images, self.scenes)


def generate(pipeline: Pipeline, results: Sequence[Result]) -> None:
    """Generate an image for each prompt of all results."""
    prompts, images = [prompt for result in results for prompt in result.prompts], []
    with progress("generating", "images") as bar:
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            made = pipeline(
                batch,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                seed=list(range(start, start + len(batch))),
                batch_size=BATCH,
            ).images
            images += [np.asarray(image) for image in made]
            bar(len(images), len(prompts))
    for result in results:
        result.images, images = images[: len(result.scenes)], images[len(result.scenes) :]


def save_images(out: Path, results: Sequence[Result]) -> None:
    """Save the first images of each result as a row for the page, and of both as a sheet, grid.png."""
    cells = []
    for result, count in zip(results, SHOWN, strict=True):
        images, prompts = result.images[:count], result.prompts[:count]
        save_row(np.concatenate(images, axis=1), prompts, row_file(out, result))
        cells += [(image, text, result is results[1]) for image, text in zip(images, prompts, strict=True)]
    with atomic_open(out / "grid.png") as file:
        labelled_sheet(cells).save(file, format="PNG")


def row_file(out: Path, result: Result) -> Path:
    return out / f"{result.name.replace(' ', '-')}.png"


def save_reconstructions(path: Path, pipeline: Pipeline, shards: Path, count: int = 10) -> None:
    """Save a row of images of the set above their reconstructions by the VAE."""
    samples, transforms = ShardSet(shards), Transforms(center_crop_h_w=(pipeline.image_size,) * 2)
    images = torch.from_numpy(np.stack([transforms.decode(image_member(samples[i])[1]) for i in range(count)]))
    with torch.no_grad():
        decoded = pipeline.vae.decode(pipeline.vae.mode(pipeline.vae.encode(images))).clamp(-1, 1)
    rows = torch.cat([torch.cat(list(images), dim=2), torch.cat(list(decoded), dim=2)], dim=1)
    pixels = ((rows.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    with atomic_open(path) as file:
        Image.fromarray(pixels).save(file, format="PNG")


def write_page(out: Path, run: Path, stages: Stages, commands: Commands, results: Sequence[Result]) -> Path:
    """Write report.html, and its figures of adherence as adherence.txt; return the page."""
    page = out / "report.html"
    write_text(out / "adherence.txt", "".join(f"{result.name}: {result.score}\n" for result in results))
    measured = ("all_right", *ATTRIBUTES)
    scores = [[result.name, *(f"{getattr(result.score, name):.1%}" for name in measured)] for result in results]
    rows = [(name, duration(seconds), f"{peak:.2f} GiB") for name, seconds, peak in stages.rows]
    samples = "".join(sample_images(path, page) for path in sorted((run / "samples").glob("step-*.png")))
    sections = [
        ("How well images follow their prompts", html_report.table(["prompts", "all right", *ATTRIBUTES], scores)),
        *((f"Images for {result.name}", captioned_row(row_file(out, result), page)) for result in results),
        ("Sample images while training", samples),
        ("Loss", noisy_chart(read_rows(run / METRICS_FILE), "loss", "loss")),
        ("The VAE: images above, reconstructions below", html_report.image(out / "reconstructions.png", page)),
        ("Time and peak memory", html_report.table(("stage", "time", "peak memory so far"), rows)),
        ("The same by hand", html_report.code(commands.lines)),
    ]
    html_report.write_report(page, "latentsmith demo", sections)
    return page
