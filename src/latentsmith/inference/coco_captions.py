"""An image for each line of a folder of captions, at several guidance scales: what FID and CLIP scores need."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentsmith.files.errors import BadInput
from latentsmith.files.regular import PROMPTS
from latentsmith.files.text import read_lines

from .generate import generate


def generate_for_captions(source: str, fid: Mapping[str, Any], **options: Any) -> list[Path]:
    """Write `<save_path>/<scale>/imageNNNNNN.png`, image i from caption i with seed + i; otherwise as `generate`.

    fid: classifier_free_guidance (list), coco_captions_path, save_path and maybe num_images_to_eval. Images that exist
    are kept. In a SLURM array the index of the job takes one scale of the list.
    """
    captions = read_captions(Path(fid["coco_captions_path"]), fid.get("num_images_to_eval"))
    options.pop("guidance_scale", None)
    if options.pop("count", 1) != 1:
        raise BadInput("infer.num_images_per_prompt must be 1 for a folder of captions: a name stands for one image")
    names = [f"image{number:06d}" for number in range(len(captions))]
    paths = []
    for scale in scales_of_job(fid["classifier_free_guidance"]):
        out = Path(fid["save_path"]) / f"{scale:g}"
        paths += generate(source, captions, out, guidance_scale=scale, names=names, **options)
    return paths


def read_captions(folder: Path, count: int | None) -> list[str]:
    """Return the first `count` lines of a folder's text files, ordered by name. Raises BadInput for fewer."""
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise BadInput(f"{folder}: holds no text files with captions; name the folder in fid.coco_captions_path")
    captions: list[str] = []
    for file in files:
        try:
            captions += read_lines(file, PROMPTS)
        except OSError as error:
            raise BadInput(f"{file}: cannot be read as captions ({error})") from None
        if count is not None and len(captions) >= count:
            return captions[:count]
    if count is not None:
        raise BadInput(f"{folder}: holds {len(captions)} captions, fewer than fid.num_images_to_eval={count}")
    return captions


def scales_of_job(scales: list[float]) -> list[float]:
    index = os.environ.get("SLURM_ARRAY_TASK_ID")
    if index is None:
        return scales
    if not 0 <= int(index) < len(scales):
        raise BadInput(f"SLURM_ARRAY_TASK_ID is {index}, but fid.classifier_free_guidance has {len(scales)} scales")
    return [scales[int(index)]]
