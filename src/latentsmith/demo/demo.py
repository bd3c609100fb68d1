"""`latentsmith demo`: the whole story on synthetic scenes, from captioned pictures to pictures from captions."""

import resource
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from latentsmith.inference import Pipeline
from latentsmith.inference.sheets import labelled_sheet
from latentsmith.progress import progress
from latentsmith.training.metrics_log import METRICS_FILE, read_rows
from latentsmith.training.report import noisy_chart, sample_images
from latentsmith.training.train import train
from latentsmith.training.train_vae import train_vae
from latentsmith.units import duration

from . import scenes
from .adherence import Adherence, SceneReader

SCENES, PICTURES = 5000, 12000  # drawn for the U-Net; for a VAE from scratch
RANDOM_PROMPTS, HELD_OUT_PROMPTS, SHOWN = 200, 100, (28, 12)  # measured; shown of each
STEPS, GUIDANCE, BATCH = 12, 1.5, 50  # of drawing
PROMPT_SEED = 2024  # unlike the seed of the training scenes


@dataclass
class Stages:
    """What each stage took, for the report."""

    rows: list[tuple[str, float, float]] = field(default_factory=list)  # name, seconds, peak GiB up to its end

    @contextmanager
    def stage(self, name: str):
        print(f"\n== {name}", flush=True)
        started = time.monotonic()
        yield
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.rows.append((name, time.monotonic() - started, peak))

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds, _ in self.rows)


def demo(out: Path, *, from_scratch: bool = False) -> Path:
    """Draw scenes, import and cache them, train, draw pictures for random prompts and read them back.

    from_scratch: train the VAE and the text encoder too, instead of taking those that come with the package.
    Returns report.html in the folder `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    stages, commands = Stages(), Commands(out)
    with stages.stage("drawing scenes and importing them"):
        commands.scenes(SCENES)
    frozen = from_nothing(out, stages, commands) if from_scratch else []
    with stages.stage("caching latents and text embeddings"):
        commands.precache(frozen)
    with stages.stage("training the U-Net on the cache"):
        run = commands.train(frozen)
    pipeline = Pipeline.from_pretrained(run)
    with stages.stage("drawing pictures and reading them back"):
        asked, held_out = prompts(None, RANDOM_PROMPTS), prompts(True, HELD_OUT_PROMPTS)
        pictures = draw(pipeline, [*asked, *held_out])
        reader = SceneReader(**scenes.vocabulary())
        scores = (
            ("random prompts", reader.adherence(pictures[: len(asked)], asked)),
            ("held-out combinations", reader.adherence(pictures[len(asked) :], held_out)),
        )
        save_grid(out / "grid.png", pictures, asked, held_out)
        save_reconstructions(out / "reconstructions.png", pipeline, out / "shards")
    page = write_page(out, run, stages, commands, scores)
    print()
    for name, score in scores:
        print(f"{name}: {score}")
    print(f"{stages.seconds / 60:.1f} minutes, peak memory {stages.rows[-1][2]:.2f} GiB")
    print(f"pictures: {out / 'grid.png'}\nreport:   {page}")
    return page


@dataclass
class Commands:
    """The stages as functions, and as the commands that do the same by hand."""

    out: Path
    lines: list[str] = field(default_factory=list)

    def scenes(self, count: int) -> None:
        self.said(
            f"data scenes {self.out / 'scenes'} --count {count}",
            f"data import {self.out / 'scenes'} {self.out / 'shards'}",
        )
        if not (self.out / "shards" / "set.json").exists():
            scenes.write_pictures(self.out / "scenes", count, 0, doodles=0.0)
            import_data(self.out / "scenes", self.out / "shards")

    def precache(self, overrides: Sequence[str]) -> None:
        keys = [f"model.data.train.dataset_path={self.out / 'shards'}", *overrides]
        self.said(f"precache --config demo --out {self.out / 'cache'} {' '.join(keys)}")
        precache(load_config("demo", keys), self.out / "cache")

    def train(self, overrides: Sequence[str]) -> Path:
        keys = [f"model.data.train.dataset_path={self.out / 'cache'}", f"exp_manager.exp_dir={self.out}", *overrides]
        self.said(f"train --config demo {' '.join(keys)}")
        return train(load_config("demo", keys))

    def said(self, *lines: str) -> None:
        self.lines += [f"latentsmith {line}" for line in lines]


def from_nothing(out: Path, stages: Stages, commands: Commands) -> list[str]:
    """Train a VAE, then a text encoder; returns the overrides that make the demo use them."""
    shards, exp_dir = f"model.data.train.dataset_path={out / 'pictures-shards'}", f"exp_manager.exp_dir={out}"
    with stages.stage("training the VAE"):
        commands.said(
            f"data scenes {out / 'pictures'} --count {PICTURES} --seed 1 --doodles 0.5",
            f"data import {out / 'pictures'} {out / 'pictures-shards'}",
            f"train-vae --config demo_vae {shards} {exp_dir}",
        )
        scenes.write_pictures(out / "pictures", PICTURES, 1, doodles=0.5)
        import_data(out / "pictures", out / "pictures-shards")
        vae = train_vae(load_config("demo_vae", [shards, exp_dir]))
    with stages.stage("training the text encoder"):
        words = [f"model.cond_stage_config.tokenizer={out / 'tokenizer'}"]
        keys = [f"model.first_stage_config.from_pretrained={vae}", *words]
        scenes_set = f"model.data.train.dataset_path={out / 'shards'}"
        latents = f"model.data.train.dataset_path={out / 'latents'}"
        commands.said(
            f"data vocabulary {out / 'shards'} {out / 'tokenizer'} --size 616",
            f"precache --config demo_text --out {out / 'latents'} {scenes_set} {' '.join(keys)}",
            f"train --config demo_text {latents} {exp_dir} {' '.join(keys)}",
        )
        train_vocabulary(out / "shards", out / "tokenizer", size=616)
        precache(load_config("demo_text", [scenes_set, *keys]), out / "latents")
        text = train(load_config("demo_text", [latents, exp_dir, *keys]))
    return [*keys, f"model.cond_stage_config.from_pretrained={text}"]


def prompts(held_out: bool | None, count: int) -> list[scenes.Scene]:
    """Scenes to ask for, drawn at random: of every combination, or of those that training never saw."""
    return scenes.sample_scenes(count, PROMPT_SEED, held_out)


def draw(pipeline: Pipeline, asked: Sequence[scenes.Scene]) -> list[np.ndarray]:
    """One picture for each scene's caption, uint8 (height, width, 3)."""
    texts, pictures = [scenes.caption(scene) for scene in asked], []
    with progress("drawing", "pictures") as tell:
        for start in range(0, len(texts), BATCH):
            seeds = list(range(start, start + len(texts[start : start + BATCH])))
            made = pipeline(
                texts[start : start + BATCH],
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                seed=seeds,
                batch_size=BATCH,
            ).images
            pictures += [np.asarray(picture) for picture in made]
            tell(len(pictures), len(texts))
    return pictures


def save_grid(
    path: Path, pictures: Sequence[np.ndarray], asked: Sequence[scenes.Scene], held_out: Sequence[scenes.Scene]
) -> None:
    """A sheet of pictures under their prompts, those of held-out combinations marked."""
    shown = list(zip(pictures, asked, strict=False))[: SHOWN[0]]
    marked = list(zip(pictures[len(asked) :], held_out, strict=True))[: SHOWN[1]]
    cells = [(picture, scenes.caption(scene), False) for picture, scene in shown]
    cells += [(picture, scenes.caption(scene), True) for picture, scene in marked]
    with atomic_open(path) as file:
        labelled_sheet(cells).save(file, format="PNG")


def save_reconstructions(path: Path, pipeline: Pipeline, shards: Path, count: int = 10) -> None:
    """A row of pictures of the set above what the VAE makes of them."""
    samples, transforms = ShardSet(shards), Transforms(center_crop_h_w=(pipeline.image_size,) * 2)
    images = torch.from_numpy(np.stack([transforms.decode(image_member(samples[i])[1]) for i in range(count)]))
    with torch.no_grad():
        decoded = pipeline.vae.decode(pipeline.vae.mode(pipeline.vae.encode(images))).clamp(-1, 1)
    rows = torch.cat([torch.cat(list(images), dim=2), torch.cat(list(decoded), dim=2)], dim=1)
    pixels = ((rows.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    with atomic_open(path) as file:
        Image.fromarray(pixels).save(file, format="PNG")


def write_page(
    out: Path, run: Path, stages: Stages, commands: Commands, scores: Sequence[tuple[str, Adherence]]
) -> Path:
    """report.html, and the same figures as adherence.txt."""
    page = out / "report.html"
    lines = [f"{name}: {score}" for name, score in scores]
    write_text(out / "adherence.txt", "\n".join(lines) + "\n")
    rows = [(name, duration(seconds), f"{peak:.2f} GiB") for name, seconds, peak in stages.rows]
    samples = "".join(sample_images(path, page) for path in sorted((run / "samples").glob("step-*.png")))
    grid = html_report.image(out / "grid.png", page, "A red frame marks held-out combinations.")
    reconstructions = html_report.image(out / "reconstructions.png", page)
    sections = [
        ("Images for random prompts", grid),
        ("Read back from the pixels", "".join(html_report.paragraph(line) for line in lines)),
        ("The same prompts while training", samples),
        ("Loss", noisy_chart(read_rows(run / METRICS_FILE), "loss", "loss")),
        ("The VAE: images above, reconstructions below", reconstructions),
        ("Time and peak memory", html_report.table(("stage", "time", "peak memory so far"), rows)),
        ("The same by hand", html_report.code(commands.lines)),
    ]
    html_report.write_report(page, "latentsmith demo", sections)
    return page
