"""NeMo's inference files (`sd_infer.yaml`) in the words of `latentsmith generate`."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from latentsmith.config.kinds import either, list_of, number, text, whole
from latentsmith.files.errors import BadInput

INFER = {
    "unconditional_guidance_scale": ("guidance_scale", number()),
    "num_images_per_prompt": ("count", whole(1)),
    "batch_size": ("batch_size", whole(1)),
    "height": ("height", whole(1)),
    "width": ("width", whole(1)),
    "inference_steps": ("steps", whole(1, 1000)),
    "sampler_type": ("sampler", text()),
    "eta": ("eta", number(0, 1)),
    "out_path": ("out", text()),
    "seed": ("seed", whole(0)),
    "prompts": ("prompts", either(text(), list_of(text()))),
    "sampler_parallelism": ("parallelism", whole(1)),
    "sampler_tolerance": ("tolerance", number(0)),
}
NO_EFFECT = {"down_factor", "output_type", "save_to_file", "devices"}  # the model's, always PNGs, torchrun's
MODEL = {"restore_from_path", "precision", "peft", "unet_config", "hparams_file"}
TRAINER = {"devices", "num_nodes", "accelerator", "precision", "logger", "enable_checkpointing",
           "use_distributed_sampler"}  # fmt: skip
SECTIONS = {"infer", "trainer", "model", "name"}
DTYPES = {"16": "fp16", "bf16": "bf16", "32": "fp32"}


def read_infer(path: str | Path) -> dict[str, Any]:
    """The keywords of `runs.generate.generate` (and "source", "prompts", "out") that such a file gives.

    Raises BadInput for a file that cannot be read, and for keys that are not NeMo's or ask for what is not done here.
    """
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(tree, Mapping) or not isinstance(tree.get("infer"), Mapping):
        raise BadInput(f"{path}: has no section `infer`; see docs/sampling.md for what generate reads")
    check_keys(path, tree, SECTIONS, "")
    check_keys(path, tree["infer"], {*INFER, *NO_EFFECT}, "infer.")
    found = {}
    for theirs, (ours, kind) in INFER.items():
        if (value := tree["infer"].get(theirs)) is not None:
            try:
                found[ours] = kind.read(value)
            except (ValueError, TypeError, OverflowError):
                raise BadInput(f"{path}: infer.{theirs} must be {kind.words}, not {value!r}") from None
    model, trainer = (tree.get(name) or {} for name in ("model", "trainer"))
    for name, node, known in (("model", model, MODEL), ("trainer", trainer, TRAINER)):
        if not isinstance(node, Mapping):
            raise BadInput(f"{path}: {name} must be a mapping of options, not {node!r}")
        check_keys(path, node, known, f"{name}.")
    for key in ("peft", "unet_config"):
        node = model.get(key) or {}
        if not isinstance(node, Mapping) or any(value is not None for value in node.values()):
            raise BadInput(f"{path}: model.{key} is not read here; merge it into the checkpoint first")
    if model.get("restore_from_path"):
        found["source"] = str(model["restore_from_path"])
    if isinstance(found.get("prompts"), str):
        found["prompts"] = [found["prompts"]]
    if (precision := str(trainer.get("precision") or model.get("precision") or "").split("-")[0]) in DTYPES:
        found["dtype"] = DTYPES[precision]
    return found


def check_keys(path: str | Path, node: Mapping[str, Any], known: set[str], place: str) -> None:
    for key in node:
        if key not in known:
            near = get_close_matches(key, known, 1)
            hint = f"; did you mean {place}{near[0]}?" if near else ""
            raise BadInput(f"{path}: {place}{key} is not an option of an inference file{hint}")
