"""`latentsmith evaluate`: generate what is missing, measure at every guidance scale, compare models, write results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import latentsmith
from latentsmith.files.errors import BadInput
from latentsmith.files.images import BadImage
from latentsmith.inference.generate import generate
from latentsmith.inference.png import read_metadata
from latentsmith.processes import process_of

from .adherence import adherence_of
from .collect import wait_for
from .images import Images, open_images
from .intervals import Estimate, Sampled
from .memorisation import Memorisation, memorisation
from .run import Evaluation, Evaluator, Settings

ADHERENCE = "adherence"  # a metric of the demo's scenes, which takes no extractor


@dataclass(frozen=True, eq=False)
class Row:
    """What was measured of one model at one guidance scale; scale None for images that were there before."""

    scale: float | None
    folder: Path
    images: Images
    prompts: Sequence[str] | None
    found: Evaluation
    sampled: Mapping[str, Sampled]
    memorised: Memorisation | None = None

    @property
    def values(self) -> dict[str, Estimate]:
        return {name: each.estimate() for name, each in self.sampled.items()}


@dataclass(frozen=True, eq=False)
class Results:
    """All rows of a model, those of the model that it is compared with, and the paired differences by row."""

    source: str
    rows: Sequence[Row]
    settings: Settings
    reference: str
    other: str = ""
    other_rows: Sequence[Row] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def differences(self) -> list[dict[str, Estimate]]:
        """Return source minus other for every row: both resample the same images."""
        return [
            {
                name: (row.sampled[name] - other.sampled[name]).estimate()
                for name in row.sampled
                if name in other.sampled
            }
            for row, other in zip(self.rows, self.other_rows, strict=False)
        ]

    def to_json(self) -> dict[str, Any]:
        first = self.rows[0].found
        return {
            "from": self.source,
            "reference": self.reference,
            "results": [row_json(row) for row in self.rows],
            "compared_with": self.other or None,
            "compared_results": [row_json(row) for row in self.other_rows],
            "differences": [{name: asdict(each) for name, each in row.items()} for row in self.differences()],
            "extractors": {role: dict(each) for role, each in first.identity.items()},
            "settings": asdict(self.settings),
            "sampling": dict(self.options),
            "notes": sorted({note for row in (*self.rows, *self.other_rows) for note in row.found.notes}),
            "version": latentsmith.__version__,
        }


def row_json(row: Row) -> dict[str, Any]:
    values = {name: asdict(each) for name, each in row.values.items()}
    return {"guidance": row.scale, "images": row.found.images, "folder": str(row.folder), "values": values}


def run_sweep(
    source: str,
    reference: Any,
    out: Path,
    settings: Settings,
    *,
    prompts: Sequence[str] | None = None,
    scales: Sequence[float] = (),
    compare: str | None = None,
    training: Any = None,
    images_folder: Path | None = None,
    **options: Any,
) -> Results:
    """Measure a checkpoint, a run or a folder of images, and write results.json, results.csv and report.html to `out`.

    prompts, scales: what a checkpoint generates, image i from prompt i with seed + i; images that exist are kept.
    compare: another source, measured with the same prompts and seeds. training: images that may have been memorised.
    images_folder: where generated images go, by default `out`/images. options: of `generate`.
    """
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out}: is a file, not a folder to write results to")
    own = ADHERENCE in settings.metrics
    evaluator = evaluator_of(settings, reference, out / "features")
    named = {"images": source, **({"compared-images": compare} if compare else {})}
    measured: dict[str, list[Row]] = {}
    for folder, each in named.items():
        place = images_folder if images_folder and folder == "images" else out / folder
        made = generated(each, place, prompts, scales, settings.count, options)
        measured[folder] = [row_of(images, evaluator, own, training, settings) for images in made]
    results = Results(
        source=source,
        rows=measured["images"],
        settings=settings,
        reference=str(reference or ""),
        other=compare or "",
        other_rows=measured.get("compared-images", []),
        options=options,
    )
    if process_of()[0] == 0:
        from .report import write_results

        write_results(results, out)
    return results


class NoExtractor:
    """Measures nothing but adherence."""

    def __call__(self, images: Any, prompts: Sequence[str] | None = None) -> Evaluation:
        return Evaluation({}, len(images), {})


def evaluator_of(settings: Settings, reference: Any, cache: Path) -> Evaluator | NoExtractor:
    names = tuple(name for name in settings.metrics if name != ADHERENCE)
    if not names and settings.metrics:
        return NoExtractor()
    return Evaluator(Settings(**{**asdict(settings), "metrics": names}), reference, cache)


@dataclass(frozen=True, eq=False)
class Generated:
    """Images to measure. prompts: of each, where they are known."""

    scale: float | None
    folder: Path
    images: Images
    prompts: Sequence[str] | None


def generated(
    source: str,
    folder: Path,
    prompts: Sequence[str] | None,
    scales: Sequence[float],
    count: int | None,
    options: Mapping[str, Any],
) -> list[Generated]:
    """Return the images of a source at each scale, generating those that are missing."""
    if holds_images(Path(source)):
        if scales:
            raise BadInput(
                f"{source}: holds images, which have the guidance that they were made with; leave --guidance out"
            )
        images = open_images(source).first(count)
        return [Generated(None, Path(source), images, prompts or recorded_prompts(images))]
    if not prompts:
        raise BadInput(f"{source}: a checkpoint generates from prompts: name a file or a set with --prompts")
    used = list(prompts[:count])
    made = []
    for scale in scales or (7.5,):
        place = folder / f"{scale:g}"
        names = [f"image{number:06d}" for number in range(len(used))]
        generate(source, used, place, names=names, guidance_scale=scale, **options)
        wait_for([place / f"{name}.png" for name in names], f"images of {place}")
        made.append(Generated(scale, place, open_images(place).first(len(used)), used))
    return made


def holds_images(path: Path) -> bool:
    """Return whether a path is a folder of images or a set of shards, and no checkpoint."""
    if not path.is_dir() or any((path / name).exists() for name in ("checkpoints", "model_index.json", "state.json")):
        return False
    try:
        open_images(path)
    except BadInput:
        return False
    return True


def recorded_prompts(images: Images) -> list[str] | None:
    """Return the prompts that `generate` records in its PNGs; None where one has none: captions are looked for then."""
    folder = Path(images.title)
    try:
        return [str(read_metadata(folder / name)["prompt"]) for name in images.names] if folder.is_dir() else None
    except (BadInput, BadImage):
        return None


def row_of(
    made: Generated, evaluator: Evaluator | NoExtractor, adherence: bool, training: Any, settings: Settings
) -> Row:
    found = evaluator(made.images, made.prompts)
    sampled = dict(found.sampled)
    if adherence:
        sampled |= adherence_of(made.images, made.prompts, settings.resamples, settings.seed)
    memorised = None
    if training is not None:
        if isinstance(evaluator, NoExtractor) or "features" not in evaluator.extractors:
            raise BadInput("--training compares features: ask for a metric of them too, such as fid or kid")
        memorised = memorisation(made.images, open_images(training), evaluator.extractors["features"], evaluator.cache)
        sampled["memorised_share"] = memorised.share(settings.resamples, settings.seed)
    return Row(made.scale, made.folder, made.images, made.prompts, found, sampled, memorised)
