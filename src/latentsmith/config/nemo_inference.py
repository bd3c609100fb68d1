"""NeMo's inference files (`sd_infer.yaml`, `sd_fid_images.yaml`) as options of `latentsmith generate`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from latentsmith.files.errors import BadInput
from latentsmith.image_request import options_from_nemo

from .compose import compose, print_notes
from .inference_options import FidConfig, InferenceConfig
from .tree import to_tree

KEYWORDS = {"num_images_per_prompt": "count", "batch_size": "batch_size", "out_path": "out", "prompts": "prompts"}
DTYPES = {"16-mixed": "fp16", "16-true": "fp16", "bf16-mixed": "bf16", "bf16-true": "bf16"}  # else generate's own


def read_infer(path: str | Path, changes: Iterable[str] = ()) -> dict[str, Any]:
    """Return the keywords of `inference.generate.generate` (and source, prompts, out, fid) that such a file gives.

    fid: the options of its section `fid`, if it has one. Raises BadInput as `compose`, and for a file without `infer`.
    """
    composed = compose(path, changes)
    print_notes(str(path), composed)
    config = composed.config
    if not isinstance(config, InferenceConfig):
        raise BadInput(f"{path}: has no section `infer`; see docs/sampling.md for what generate reads")
    infer = to_tree(config.infer)
    found = options_from_nemo(infer) | {ours: infer[theirs] for theirs, ours in KEYWORDS.items() if theirs in infer}
    if config.model.restore_from_path:
        found["source"] = config.model.restore_from_path
    if isinstance(found.get("prompts"), str):
        found["prompts"] = [found["prompts"]]
    found["negative_prompt"] = ""  # NeMo has no key for it and always encodes the empty prompt
    if config.trainer.precision in DTYPES:
        found["dtype"] = DTYPES[config.trainer.precision]
    if config.fid != FidConfig():
        found["fid"] = _checked(to_tree(config.fid), path)
    return found


def _checked(fid: dict[str, Any], path: str | Path) -> dict[str, Any]:
    for key in ("classifier_free_guidance", "coco_captions_path", "save_path"):
        if fid.get(key) is None:
            raise BadInput(f"{path}: fid.{key} is missing; give it there")
    scales = fid["classifier_free_guidance"]
    return {**fid, "classifier_free_guidance": scales if isinstance(scales, list) else [scales]}
