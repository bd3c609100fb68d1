"""`latentsmith generate`: pictures from prompts, each with what made it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentsmith.files.atomic import atomic_open
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import sha256_files
from latentsmith.files.images import read_image
from latentsmith.processes import process_of
from latentsmith.progress import progress

from . import Pipeline, SamplingStep
from .generation_model import GenerationModel
from .png import free_path, read_made, save_picture
from .sheets import axis_sheet, labelled_sheet

PREVIEWS = 5  # of a batch
AXES = {"guidance": "guidance_scale", "rescale": "guidance_rescale"} | {
    name: name for name in ("steps", "guidance_scale", "sampler", "seed", "eta", "strength", "spacing")
}
KINDS = {"steps": int, "seed": int, "sampler": str, "spacing": str}  # of an axis' values; all others are numbers


@dataclass(frozen=True)
class Wish:
    """One picture: what is written into it, and what the pipeline is called with."""

    prompt: str
    negative_prompt: str | None
    seed: int
    variation_seed: int
    number: int
    axes: tuple[tuple[str, Any], ...] = ()
    name: str | None = None

    @property
    def told(self) -> dict[str, Any]:
        """What the picture says of it."""
        texts = {"prompt": self.prompt, "negative_prompt": self.negative_prompt}
        return texts | {"seed": self.seed, "variation_seed": self.variation_seed}


def generate(
    source: str,
    prompts: Sequence[str],
    out: Path,
    *,
    negative_prompt: str | None = None,
    seed: int = 0,
    variation_seed: int = 0,
    count: int = 1,
    batch_size: int = 8,
    image: Path | None = None,
    mask: Path | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    weights: str = "ema",
    prediction_type: str | None = None,
    tokenizer: str | None = None,
    preview: Path | None = None,
    sheet: bool = False,
    grid: Sequence[str] = (),
    names: Sequence[str] | None = None,
    **options: Any,
) -> list[Path]:
    """Draw `count` pictures of every prompt into `out`; picture i of a prompt uses seed + i. Returns the PNGs.

    image, mask: files. preview: a PNG that shows the batch at hand, renewed as it is drawn. sheet: also one of all
    pictures. grid: axes such as "guidance=1,3,7", one or two, drawn against each other on a sheet for each prompt.
    names: of each prompt's one picture, NAME.png, made with seed + its place; those already drawn are not drawn again.
    options: height, width and the fields of SamplingOptions. Under torchrun or srun each process draws its share.
    """
    axes = checked_axes([parsed_axis(words) for words in grid], image)
    rank, processes = process_of()
    if processes > 1 and (sheet or axes):
        raise BadInput(f"a sheet shows all pictures, and {processes} processes draw a share each; draw it with one")
    if batch_size < 1 or count < 1:
        raise BadInput(f"batch_size {batch_size} and count {count} must be at least 1")
    given: dict[str, Any] = {"image": opened(image), "mask": opened(mask)}
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out}: is a file, not a folder to write pictures to")
    if preview is not None and preview.is_dir():
        raise BadInput(f"{preview}: is a folder; name a PNG for the preview")
    with GenerationModel(source, device, dtype, weights, prediction_type, tokenizer) as model:
        cells = product(*([(name, value) for value in values] for name, values in axes))
        wishes = [
            Wish(prompt, negative_prompt, dict(cell).get("seed", seed) + i, variation_seed + i, number, cell)
            for number, (cell, prompt, i) in enumerate(product(cells, prompts, range(count)))
        ]
        bases = {"image": described(image), "mask": described(mask)}
        paths: dict[Wish, Path] = {}
        if names is not None:
            named = enumerate(zip(wishes, names, strict=True))
            wishes = [replace(wish, name=name, seed=seed + i) for i, (wish, name) in named]
            paths = already_drawn(wishes[rank::processes], out, model, options)
        mine = [wish for wish in wishes[rank::processes] if wish not in paths]
        failures: list[tuple[Wish, str]] = []
        streams = planned(model.pipeline, mine, given | options, batch_size)
        if not paths:
            model.begin()
        try:
            for wish, picture, used in draw(model.pipeline, streams, len(mine), preview):
                if isinstance(picture, str):
                    failures.append((wish, picture))
                else:
                    paths[wish] = save_picture(picture, out, model.says(wish.told, used, bases), wish.name)
        except KeyboardInterrupt:
            print(f"{out}: {len(paths)} of {len(wishes[rank::processes])} pictures, kept")
            raise
    if (sheet or axes) and not failures:
        draw_sheets(out, wishes, paths, axes)
    share = f", share {rank + 1} of {processes}" if processes > 1 else ""
    print(f"{out}: {len(paths)} pictures{share}")
    if failed := [f'"{wish.prompt}" (seed {wish.seed}): {reason}' for wish, reason in failures]:
        raise BadInput(f"{len(failed)} of {len(mine)} pictures could not be made, the others are kept; {failed[0]}")
    return [paths[wish] for wish in wishes[rank::processes]]


def already_drawn(
    wishes: Sequence[Wish], out: Path, model: GenerationModel, options: Mapping[str, Any]
) -> dict[Wish, Path]:
    """The named pictures that lie in `out` and say that these options and this model drew them; BadInput for others."""
    there = {wish: path for wish in wishes if (path := out / f"{wish.name}.png").exists()}
    if there:
        model.begin()
        print(f"{out}: {len(there)} of {len(wishes)} pictures are drawn already")
    for wish, path in there.items():
        made = read_made(path)
        then = {**made["options"], **{name: made[name] for name in wish.told}, "model": made["model"]["hash"]}
        now = {**options, **wish.told, "model": model.hash.result()}
        if differs := [name for name, value in now.items() if then.get(name) != value]:
            raise BadInput(f"{path}: drawn before with another {differs[0]}; name a new folder, or move this one away")
    return there


Streams = list[tuple[list[Wish], Iterator[SamplingStep]]]


def planned(pipeline: Pipeline, wishes: Sequence[Wish], options: Mapping[str, Any], batch_size: int) -> Streams:
    """Wishes of equal options and how they will be drawn; BadInput, before the first is, for what cannot be."""
    groups: dict[tuple, list[Wish]] = {}
    for wish in wishes:
        groups.setdefault(tuple(pair for pair in wish.axes if pair[0] != "seed"), []).append(wish)
    return [
        (alike, pipeline.stream(
            [wish.prompt for wish in alike], [wish.negative_prompt for wish in alike],
            seed=[wish.seed for wish in alike], variation_seed=[wish.variation_seed for wish in alike],
            batch_size=batch_size, **{**options, **dict(axes)},
        ))
        for axes, alike in groups.items()
    ]  # fmt: skip


def draw(
    pipeline: Pipeline, streams: Streams, total: int, preview: Path | None
) -> Iterator[tuple[Wish, Image.Image | str, dict[str, Any]]]:
    """(wish, picture or why there is none, options used) as they are done."""
    drawn = 0
    with progress("drawing", "pictures") as tell:
        for alike, stream in streams:
            for drawing in stream:
                tell(drawn + len(drawing.numbers) * drawing.step // drawing.steps, total)
                if drawing.done:
                    drawn += len(drawing.numbers)
                    for number, picture in zip(drawing.numbers, pipeline.decode_or_error(drawing), strict=True):
                        yield alike[number], picture, asdict(drawing.options)
                elif preview and drawing.step % max(1, drawing.steps // PREVIEWS) == 0:
                    show(pipeline, drawing, preview)


def show(pipeline: Pipeline, drawing: SamplingStep, path: Path) -> None:
    """What a batch is expected to become, in one row."""
    try:
        row = np.concatenate([np.asarray(picture) for picture in pipeline.pictures(drawing)], axis=1)
    except BadInput:  # nothing to see yet
        return
    with atomic_open(path) as file:
        Image.fromarray(row).save(file, format="PNG")


def opened(path: Path | None) -> Image.Image | None:
    return None if path is None else read_image(path)


def described(path: Path | None) -> dict[str, str] | None:
    return None if path is None else {"file": str(path.resolve()), "hash": sha256_files([path])}


def checked_axes(axes: list[tuple[str, list[Any]]], image: Path | None) -> list[tuple[str, list[Any]]]:
    names = [name for name, _ in axes]
    if len(axes) > 2:
        raise BadInput(f"a grid has one or two axes, not {len(axes)}")
    if len(set(names)) < len(names):
        raise BadInput(f"a grid with {names[0]} on both axes; give each option once")
    if "strength" in names and image is None:
        raise BadInput("a grid of strength needs a picture to start from (--image)")
    return axes


def parsed_axis(words: str) -> tuple[str, list[Any]]:
    """ "guidance=1,3,7" as the option's name and its values; BadInput for anything else."""
    name, _, values = words.partition("=")
    if name not in AXES or not values:
        raise BadInput(f"--grid {words}: give NAME=VALUE,VALUE,..., NAME one of {', '.join(AXES)}")
    kind = KINDS.get(AXES[name], float)
    try:
        return AXES[name], [kind(value.strip()) for value in values.split(",")]
    except ValueError:
        raise BadInput(f"--grid {words}: {name} takes {'whole numbers' if kind is int else 'numbers'}") from None


def draw_sheets(
    out: Path, wishes: Sequence[Wish], paths: Mapping[Wish, Path], axes: Sequence[tuple[str, list[Any]]]
) -> None:
    """One sheet of all pictures, or one for each prompt and seed with the axes' values at its edges."""
    pictures = {wish: np.asarray(read_image(path)) for wish, path in paths.items()}
    if not axes:
        cells = [(pictures[wish], f"{wish.prompt} ({wish.seed})", False) for wish in wishes]
        write_sheet(labelled_sheet(cells, columns=min(8, len(cells)), zoom=1), out, "sheet")
        return
    across, down = axes[0], axes[1] if len(axes) > 1 else ("", [""])
    per_cell = len(wishes) // (len(across[1]) * len(down[1]))
    for number in range(per_cell):  # the wishes run over the axes first, the last of them fastest
        alike = wishes[number::per_cell]
        table = [[pictures[wish] for wish in alike[row :: len(down[1])]] for row in range(len(down[1]))]
        rows, columns = ([f"{name} {value}".strip() for value in values] for name, values in (down, across))
        write_sheet(axis_sheet(table, rows, columns, alike[0].prompt), out, "grid")


def write_sheet(sheet: Image.Image, out: Path, stem: str) -> None:
    path = free_path(out, stem)
    with atomic_open(path) as file:
        sheet.save(file, format="PNG")
    print(f"{path}: contact sheet")
