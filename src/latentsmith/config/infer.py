"""NeMo's inference files (`sd_infer.yaml`) in the words of `latentsmith generate`."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from latentsmith.files.errors import BadInput

INFER = {
    "unconditional_guidance_scale": "guidance_scale",
    "num_images_per_prompt": "count",
    "batch_size": "batch_size",
    "height": "height",
    "width": "width",
    "inference_steps": "steps",
    "sampler_type": "sampler",
    "eta": "eta",
    "out_path": "out",
    "seed": "seed",
    "prompts": "prompts",
    "sampler_parallelism": "parallelism",
    "sampler_tolerance": "tolerance",
}
NO_EFFECT = {
    "down_factor",
    "output_type",
    "save_to_file",
    "devices",
}  # the model knows, PNGs are written, torchrun says
SECTIONS = {"infer", "trainer", "model", "name"}
DTYPES = {"16": "fp16", "bf16": "bf16", "32": "fp32"}


def read_infer(path: str | Path) -> dict[str, Any]:
    """The keywords of `runs.generate.generate` (and "source", "prompts", "out") that such a file gives.

    Raises BadInput for a file that cannot be read, and for keys that are not NeMo's or ask for what is not done here.
    """
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise BadInput(f"{path}: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, Mapping) or not isinstance(tree.get("infer"), Mapping):
        raise BadInput(f"{path}: has no section `infer`; see docs/sampling.md for what generate reads")
    check_keys(path, tree, SECTIONS, "")
    check_keys(path, tree["infer"], {*INFER, *NO_EFFECT}, "infer.")
    found = {ours: tree["infer"][theirs] for theirs, ours in INFER.items() if tree["infer"].get(theirs) is not None}
    if isinstance(found.get("prompts"), str):
        found["prompts"] = [found["prompts"]]
    model, trainer = tree.get("model") or {}, tree.get("trainer") or {}
    for key in ("peft", "unet_config"):
        if any(value is not None for value in (model.get(key) or {}).values()):
            raise BadInput(f"{path}: model.{key} is not read here; merge it into the checkpoint first")
    if model.get("restore_from_path"):
        found["source"] = model["restore_from_path"]
    if (precision := str(trainer.get("precision") or model.get("precision") or "").split("-")[0]) in DTYPES:
        found["dtype"] = DTYPES[precision]
    return found


def check_keys(path: str | Path, node: Mapping[str, Any], known: set[str], place: str) -> None:
    for key in node:
        if key not in known:
            near = get_close_matches(key, known, 1)
            hint = f"; did you mean {place}{near[0]}?" if near else ""
            raise BadInput(f"{path}: {place}{key} is not an option of an inference file{hint}")
