"""NeMo's inference files (`sd_infer.yaml`, `sd_fid_images.yaml`) in the words of `latentsmith generate`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from latentsmith.files.errors import BadInput
from latentsmith.image_request import options_from_nemo

from .compose import compose, say_notes

KEYWORDS = {"num_images_per_prompt": "count", "batch_size": "batch_size", "out_path": "out", "prompts": "prompts"}
DTYPES = {"16-mixed": "fp16", "16-true": "fp16", "bf16-mixed": "bf16", "bf16-true": "bf16"}  # else generate's own
FID = ("classifier_free_guidance", "coco_captions_path", "num_images_to_eval", "save_path")


def read_infer(path: str | Path, changes: Iterable[str] = ()) -> dict[str, Any]:
    """The keywords of `inference.generate.generate` (and "source", "prompts", "out", "fid") that such a file gives.

    fid: the options of its section `fid`, if it has one. Raises BadInput as `compose`, and for a file without `infer`.
    """
    composed = compose(path, changes)
    say_notes(str(path), composed)
    if not composed.draws:
        raise BadInput(f"{path}: has no section `infer`; see docs/sampling.md for what generate reads")
    tree: Any = OmegaConf.to_container(composed.config)
    infer, model = tree.get("infer") or {}, tree.get("model") or {}
    found = options_from_nemo(infer) | {ours: infer[theirs] for theirs, ours in KEYWORDS.items() if theirs in infer}
    if model.get("restore_from_path"):
        found["source"] = model["restore_from_path"]
    if isinstance(found.get("prompts"), str):
        found["prompts"] = [found["prompts"]]
    if (precision := (tree.get("trainer") or {}).get("precision")) in DTYPES:
        found["dtype"] = DTYPES[precision]
    if fid := tree.get("fid"):
        found["fid"] = _checked(fid, path)
    return found


def _checked(fid: dict[str, Any], path: str | Path) -> dict[str, Any]:
    for key in ("classifier_free_guidance", "coco_captions_path", "save_path"):
        if fid.get(key) is None:
            raise BadInput(f"{path}: fid.{key} is missing; give it there")
    scales = fid["classifier_free_guidance"]
    fid = {key: fid[key] for key in FID if key in fid}
    return {**fid, "classifier_free_guidance": scales if isinstance(scales, list) else [scales]}
