"""`latentsmith generate`: images from prompts, each with what made it."""

import platform
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import latentsmith
from latentsmith.checkpoints import Checkpoint, open_checkpoint
from latentsmith.files.atomic import atomic_open
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_text, sha256_files
from latentsmith.files.images import read_image
from latentsmith.image_request import AXES, OPTIONS, ImageRequest, SamplingOptions
from latentsmith.processes import own_device, process_of
from latentsmith.progress import progress
from latentsmith.text.prompts import lora_tags

from .pipeline import Pipeline
from .png import free_path, read_metadata, save_image
from .requests import SamplingStep, sampler_name
from .sheets import axis_sheet, labelled_sheet

PREVIEWS = 5  # of a batch
ADAPTERS = ("loras", "embeddings")  # of an image's metadata
LORA_ENDINGS = (".safetensors", ".pt", ".ckpt")
Axis = tuple[str, list[Any]]  # an option and its values


@dataclass(frozen=True, eq=False)
class Job:
    """One image to write. name: it becomes NAME.png and is kept if it exists; None: a name made from the prompt."""

    request: ImageRequest
    options: SamplingOptions
    name: str | None = None


class GenerationModel:
    """A pipeline and what an image's metadata records of it. Its files are hashed in a thread until it is left."""

    def __init__(
        self,
        source: str,
        device: str,
        dtype: str,
        weights: str,
        prediction_type: str | None,
        tokenizer: str | None,
        loras: Sequence[tuple[Path, float]] = (),
        embeddings: Sequence[Path] = (),
    ):
        checkpoint = open_checkpoint(source, weights)
        self.pipeline = Pipeline.from_pretrained(
            checkpoint,
            device=own_device(device),
            dtype=dtype,
            prediction_type=prediction_type,
            tokenizer=tokenizer,
        )
        self.adapters = loaded_adapters(self.pipeline, loras, embeddings)
        self.facts = {
            "from": str(Path(source).resolve()) if Path(source).exists() else source,
            "weights": weights,
            "averaged": averaged(checkpoint, weights),
            "prediction_type": self.pipeline.spec.prediction_type,
            "karras_sigmas": self.pipeline.spec.karras_sigmas,
            "config": fingerprint_text(self.pipeline.spec.to_json()),
            "tokenizer": self.pipeline.tokenizer.fingerprint(),
            "dtype": dtype,
            "device": str(self.pipeline.device),
        }
        self.tokenizer = tokenizer and str(Path(tokenizer).resolve() if Path(tokenizer).exists() else tokenizer)
        self.files, self.pool, self.stop = weight_files(checkpoint), ThreadPoolExecutor(1), threading.Event()

    def start_hashing(self) -> None:
        self.hash: Future[str] = self.pool.submit(sha256_files, self.files, self.stop)

    def __enter__(self) -> "GenerationModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def metadata(self, request: ImageRequest, options: SamplingOptions, files: Mapping[str, Any]) -> dict[str, Any]:
        """Return all that an image needs to be made again. files: the image to start from and its mask, described."""
        return {
            **request.metadata(),
            "sampler": sampler_name(options),
            **files,
            "options": asdict(options),
            "tokenizer": self.tokenizer,
            **self.adapters,
            "model": {**self.facts, "hash": self.hash.result()},
            "versions": {"latentsmith": latentsmith.__version__, "torch": torch.__version__,
                         "python": platform.python_version()},
        }  # fmt: skip


def loaded_adapters(
    pipeline: Pipeline, loras: Sequence[tuple[Path, float]], embeddings: Sequence[Path]
) -> dict[str, list[dict[str, Any]]]:
    """Load adapters with their weights, and trained words; return what metadata records of them, {} of none."""
    words = [{"token": pipeline.load_embedding(path), **(described(path) or {})} for path in embeddings]
    named = [(pipeline.load_lora(path, weight), path, weight) for path, weight in loras]
    used = [{"name": name, "weight": weight, **(described(path) or {})} for name, path, weight in named]
    return {**({"loras": used} if used else {}), **({"embeddings": words} if words else {})}


def with_tagged(
    loras: Sequence[tuple[Path, float]], folder: Path | None, prompts: Sequence[str]
) -> list[tuple[Path, float]]:
    """Return the adapters, and off those of a folder that prompts name in tags <lora:name:weight>. Raises BadInput."""
    found = list(loras)
    for name in dict.fromkeys(tag.name for prompt in prompts for tag in lora_tags(prompt)[1]) if folder else ():
        files = [folder / f"{name}{ending}" for ending in LORA_ENDINGS if folder]
        there = [path for path in files if path.is_file() and path.parent == folder]
        if there:
            found.append((there[0], 0.0))
        elif name not in [path.stem for path, _ in loras]:
            raise BadInput(f"<lora:{name}>: no {name}.safetensors in {folder}")
    return found


def averaged(checkpoint: Checkpoint, weights: str) -> bool:
    """Return whether the U-Net's weights are a moving average, as far as its file says: NeMo keeps it in X-EMA.ckpt."""
    path = checkpoint.parts["unet"].path
    return (weights == "ema" and checkpoint.has_ema) or path.parent.name == "ema" or path.stem.endswith("-EMA")


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """Return the files that the parts of a checkpoint lie in."""
    return [each for file in checkpoint.files for each in ([file] if file.is_file() else sorted(file.rglob("*.ckpt")))]


def described(path: Path | None) -> dict[str, str] | None:
    """Return what metadata records of a file, or of a folder with files."""
    if path is None:
        return None
    files = [path] if path.is_file() else sorted(each for each in path.iterdir() if each.is_file())
    return {"file": str(path.resolve()), "hash": sha256_files(files)}


def generate(
    source: str,
    prompts: Sequence[str],
    out: Path,
    *,
    count: int = 1,
    batch_size: int = 8,
    image: Path | None = None,
    mask: Path | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    weights: str = "ema",
    prediction_type: str | None = None,
    tokenizer: str | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    lora_folder: Path | None = None,
    embeddings: Sequence[Path] = (),
    preview: Path | None = None,
    sheet: bool = False,
    grid: Sequence[str] = (),
    names: Sequence[str] | None = None,
    **options: Any,
) -> list[Path]:
    """Write `count` images of every prompt to the folder `out`; image i of a prompt uses seed + i. Return the PNGs.

    image, mask: files. preview: a PNG that shows the batch at hand, renewed as it is sampled. sheet: also one of all
    images. grid: axes such as "guidance=1,3,7", one or two, for a sheet for each prompt.
    loras: files of adapters and their weights. lora_folder: of those that prompts name in tags. embeddings: files of
    trained words. names: of each prompt's one image, NAME.png, made with seed + its index; those that exist already
    are kept.
    options: fields of ImageRequest and SamplingOptions. Under torchrun or srun each process makes its share.
    """
    axes = parse_axes(grid, image)
    rank, processes = process_of()
    if processes > 1 and (sheet or axes):
        raise BadInput(f"a sheet shows all images, and {processes} processes make a share each; use one process")
    if batch_size < 1 or count < 1:
        raise BadInput(f"batch_size {batch_size} and count {count} must be at least 1")
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out}: is a file, not a folder to write images to")
    if preview is not None and preview.is_dir():
        raise BadInput(f"{preview}: is a folder; name a PNG for the preview")
    if preview is not None and preview.suffix.lower() != ".png":
        raise BadInput(f"{preview}: a preview is a PNG; let its name end in .png")
    images = {"image": image and read_image(image), "mask_image": mask and read_image(mask)}
    jobs = jobs_of(prompts, count, axes, names, options | images)
    if processes > 1:
        print(f"share {rank + 1} of {processes}: the environment says that this is process {rank} of {processes}")
    if lora_folder is not None and options.get("prompt_syntax") != "webui":
        raise BadInput(f"--lora-folder {lora_folder} is for tags <lora:name:0.8>, which --prompt-syntax webui reads")
    loras = with_tagged(loras, lora_folder, prompts)
    with GenerationModel(source, device, dtype, weights, prediction_type, tokenizer, loras, embeddings) as model:
        files, mine = {"image": described(image), "mask": described(mask)}, jobs[rank::processes]
        paths = already_there(mine, out, model, files)
        left = [job for job in mine if job not in paths]
        for used in dict.fromkeys(job.options for job in left if image):
            print(f"strength {used.strength:g}: {used.steps_from_image} of {used.num_inference_steps} steps")
        streams = streams_of(model.pipeline, left, batch_size)
        if not paths:
            model.start_hashing()
        failures: list[tuple[Job, str]] = []
        try:
            for job, made, used in finished(model.pipeline, streams, left, preview):
                if isinstance(made, str):
                    failures.append((job, made))
                else:
                    paths[job] = save_image(made, out, model.metadata(job.request, used, files), job.name)
        except KeyboardInterrupt:
            print(f"{out}: {len(paths)} of {len(mine)} images, kept")
            raise
    if (sheet or axes) and not failures:
        write_sheets(out, jobs, paths, axes)
    share = f", share {rank + 1} of {processes}" if processes > 1 else ""
    print(f"{out}: {len(paths)} images{share}")
    if failed := [f'"{job.request.prompt}" (seed {job.request.seed}): {reason}' for job, reason in failures]:
        raise BadInput(f"{len(failed)} of {len(left)} images could not be made, the others are kept; {failed[0]}")
    return [paths[job] for job in mine]


def jobs_of(
    prompts: Sequence[str],
    count: int,
    axes: Sequence[Axis],
    names: Sequence[str] | None,
    options: Mapping[str, Any],
) -> list[Job]:
    """Return the images to make: for each cell of the axes, each prompt, `count` seeds. Raises BadInput."""
    shared = {each.name for each in fields(SamplingOptions)}
    jobs = []
    for cell in product(*([(name, value) for value in values] for name, values in axes)):
        chosen = {**options, **dict(cell)}
        used = SamplingOptions(**{name: value for name, value in chosen.items() if name in shared})
        own = {name: value for name, value in chosen.items() if name not in shared}
        seed, variation_seed = own.pop("seed", 0), own.pop("variation_seed", 0)
        for number, (prompt, i) in enumerate(product(prompts, range(count))):
            offset = number if names else i
            request = ImageRequest(prompt, seed=seed + offset, variation_seed=variation_seed + i, **own)
            jobs.append(Job(request, used, names[number] if names else None))
    return jobs


def already_there(jobs: Sequence[Job], out: Path, model: GenerationModel, files: Mapping[str, Any]) -> dict[Job, Path]:
    """Return the named images that exist and were made by these options and this model. Raises BadInput for others."""
    there = {job: path for job in jobs if job.name and (path := out / f"{job.name}.png").exists()}
    if there:
        model.start_hashing()
        print(f"{out}: {len(there)} of {len(jobs)} images exist already")
    for job, path in there.items():
        now, then = (
            comparable(each) for each in (model.metadata(job.request, job.options, files), read_metadata(path))
        )
        if differs := [name for name, value in now.items() if value is not None and then.get(name) != value]:
            raise BadInput(f"{path}: made before with another {differs[0]}; name a new folder, or move this one away")
    return there


def comparable(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides an image's pixels, by name."""
    own = {name: metadata.get(name) for name in OPTIONS}
    adapters = {
        key: [{name: value for name, value in each.items() if name != "file"} for each in metadata.get(key, [])]
        for key in ADAPTERS
    }
    return {**own, **metadata["options"], **adapters, "model": metadata["model"]["hash"]}


Streams = list[tuple[dict[ImageRequest, Job], Iterator[SamplingStep]]]


def streams_of(pipeline: Pipeline, jobs: Sequence[Job], batch_size: int) -> Streams:
    """Return a stream for the jobs of each set of options. Raises BadInput, before the first step."""
    alike: dict[SamplingOptions, dict[ImageRequest, Job]] = {}
    for job in jobs:
        alike.setdefault(job.options, {})[job.request] = job
    return [
        (by_request, pipeline.stream_requests(list(by_request), options, batch_size))
        for options, by_request in alike.items()
    ]


def finished(
    pipeline: Pipeline, streams: Streams, jobs: Sequence[Job], preview: Path | None
) -> Iterator[tuple[Job, Image.Image | str, SamplingOptions]]:
    """Yield (job, image or why there is none, options with height and width) as they are done."""
    done = 0
    with progress("generating", "images") as bar:
        for by_request, stream in streams:
            for step in stream:
                bar(done + len(step.batch) * step.step // step.steps, len(jobs))
                if step.done:
                    done += len(step.batch)
                    for request, image in zip(step.requests, pipeline.decode_or_error(step), strict=True):
                        yield by_request[request], image, step.options
                elif preview and step.step % max(1, step.steps // PREVIEWS) == 0:
                    write_preview(pipeline, step, preview)


def write_preview(pipeline: Pipeline, step: SamplingStep, path: Path) -> None:
    """Write what a batch is expected to become, in one row."""
    try:
        row = np.concatenate([np.asarray(image) for image in pipeline.images_of(step)], axis=1)
    except BadInput:  # nothing to see yet
        return
    with atomic_open(path) as file:
        Image.fromarray(row).save(file, format="PNG")


def parse_axes(grid: Sequence[str], image: Path | None) -> list[Axis]:
    """Parse "guidance=1,3,7" and the like to options and their values. Raises BadInput for anything else."""
    axes = [parse_axis(text) for text in grid]
    names = [name for name, _ in axes]
    if len(axes) > 2:
        raise BadInput(f"a grid has one or two axes, not {len(axes)}")
    if len(set(names)) < len(names):
        raise BadInput(f"a grid with {names[0]} on both axes; give each option once")
    if "strength" in names and image is None:
        raise BadInput("a grid of strength needs an image to start from (--image)")
    return axes


def parse_axis(text: str) -> Axis:
    name, _, values = text.partition("=")
    if name not in AXES or not values:
        spellings = ", ".join({field: spelling for spelling, field in reversed(AXES.items())}.values())
        raise BadInput(f"--grid {text}: give NAME=VALUE,VALUE,..., NAME one of {spellings}")
    value_type = OPTIONS[AXES[name]].type
    try:
        return AXES[name], [value_type(value.strip()) for value in values.split(",")]
    except ValueError:
        raise BadInput(f"--grid {text}: {name} takes {'whole numbers' if value_type is int else 'numbers'}") from None


def write_sheets(out: Path, jobs: Sequence[Job], paths: Mapping[Job, Path], axes: Sequence[Axis]) -> None:
    """Write one sheet of all images, or one for each prompt and seed with the axes' values at its edges."""
    images = {job: np.asarray(read_image(path)) for job, path in paths.items()}
    if not axes:
        cells = [(images[job], f"{job.request.prompt} ({job.request.seed})", False) for job in jobs]
        write_sheet(labelled_sheet(cells, columns=min(8, len(cells)), zoom=1), out, "sheet")
        return
    across, down = axes[0], axes[1] if len(axes) > 1 else ("", [""])
    per_cell = len(jobs) // (len(across[1]) * len(down[1]))
    for number in range(per_cell):  # jobs run over the axes first, the last of them fastest
        alike = jobs[number::per_cell]
        table = [[images[job] for job in alike[row :: len(down[1])]] for row in range(len(down[1]))]
        rows, columns = ([f"{name} {value}".strip() for value in values] for name, values in (down, across))
        write_sheet(axis_sheet(table, rows, columns, alike[0].request.prompt), out, "grid")


def write_sheet(sheet: Image.Image, out: Path, stem: str) -> None:
    path = free_path(out, stem)
    with atomic_open(path) as file:
        sheet.save(file, format="PNG")
    print(f"{path}: contact sheet")
