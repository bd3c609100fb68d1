"""Read what weights do not show of a model, where each format says it: prediction type, schedule, null text."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentsmith.architectures import COMPONENTS
from latentsmith.diffusion.schedule import LDM_BETA_SCHEDULES
from latentsmith.files.errors import BadInput
from latentsmith.files.json import parse_json

from . import nemo
from .base import NULL_TEXT_KEY, SPEC_KEY, Checkpoint, ModelSpec
from .formats import FORMATS
from .sizes import V21_STEP, architecture, version_of

V2_STEPS = {875_000: "epsilon", V21_STEP: "v_prediction"}  # global_step of published v2 files: 2-base, 2.1


def spec_of(checkpoint: Checkpoint, prediction_type: str | None = None) -> ModelSpec:
    """Return the spec of a whole model. prediction_type, if given, overrides what the checkpoint says.

    Raises BadInput where the checkpoint lacks a part, or nothing tells its prediction type or head counts.
    """
    if missing := [part for part in COMPONENTS if part not in checkpoint.parts]:
        raise BadInput(f"{checkpoint.path}: no {missing[0]} inside; a whole model was expected")
    if SPEC_KEY in checkpoint.metadata:
        stored = _stored(checkpoint)
        return replace(stored, prediction_type=prediction_type) if prediction_type else stored
    found, source = prediction_of(checkpoint)
    prediction = prediction_type or found
    if prediction is None:
        raise BadInput(
            f"{checkpoint.path}: its weights do not show their prediction type ({source}); "
            "give prediction_type epsilon (as v2-base has) or v_prediction (v2 at 768)"
        )
    facts = _facts(checkpoint)
    facts.pop("prediction", None)
    if refused := facts.pop("refused", None):
        raise BadInput(f"{checkpoint.path}: {refused}")
    for note in facts.pop("notes", ()):
        warnings.warn(f"{checkpoint.path}: {note}", stacklevel=2)
    if facts.get("beta_schedule", "linear") not in LDM_BETA_SCHEDULES:
        raise BadInput(f"{checkpoint.path}: the beta_schedule {facts['beta_schedule']} of its config is not supported")
    v2_at_768 = prediction == "v_prediction" and version_of(checkpoint) == "v2"
    facts["image_size"] = facts.get("image_size") or (96 if v2_at_768 else 64)
    facts["scale_factor"] = facts.get("scale_factor") or ModelSpec.scale_factor
    if NULL_TEXT_KEY in checkpoint.metadata:
        facts["null_text"] = checkpoint.metadata[NULL_TEXT_KEY]
    for note in _beside(checkpoint.path):
        warnings.warn(f"{checkpoint.path}: {note}", stacklevel=2)
    configs = architecture(checkpoint)
    return ModelSpec(configs["unet"], configs["vae"], configs["text_encoder"], prediction, **facts)


def _beside(path: Path) -> list[str]:
    """Return a note for each file beside a single file that web UIs read with it, and that is not read here."""
    if not path.is_file():
        return []
    names = [path.with_suffix(ending).name for ending in (".yaml", ".vae.pt", ".vae.safetensors", ".vae.ckpt")]
    return [f"{name} beside it, which web UIs use, is not read" for name in names if path.with_name(name).is_file()]


def _stored(checkpoint: Checkpoint) -> ModelSpec:
    name = f"{checkpoint.path}: its metadata {SPEC_KEY}"
    try:
        return ModelSpec(**parse_json(checkpoint.metadata[SPEC_KEY], name, "the spec of a model"))
    except TypeError as error:
        raise BadInput(f"{name} is damaged or newer than this version ({error})") from None


def stated_spec(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what our own files say in their metadata: of a whole model, or of one part; {} for any other file."""
    keys = {component.config_key: f"latentsmith.{component.config_key}" for component in COMPONENTS.values()}
    metadata = checkpoint.metadata
    try:
        found = {key: json.loads(metadata[entry]) for key, entry in keys.items() if entry in metadata}
        spec = json.loads(metadata.get(SPEC_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return found | spec if isinstance(spec, dict) else {}


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the formats state of a model; the first in FORMATS that states a fact counts."""
    merged: dict[str, Any] = {}
    for format in FORMATS.values():
        for key, value in format.facts(checkpoint).items() if format.facts else ():
            merged[key] = value if merged.get(key) is None else merged[key]
    return merged


def prediction_of(checkpoint: Checkpoint) -> tuple[str | None, str]:
    """Return the prediction type, or None, and where it was read."""
    stated: tuple[str | None, str] | None = _facts(checkpoint).get("prediction")
    if stated:
        return stated
    version, step = version_of(checkpoint), checkpoint.extras.get("global_step")
    if version == "v1":
        return "epsilon", "v1 weights"
    if version == "v2" and isinstance(step, int) and checkpoint.format == "ldm":
        unheard_of = ", which no published file has" if step not in V2_STEPS else ""
        return V2_STEPS.get(step), f"global_step {step:,}{unheard_of}"
    return None, "nothing in the file tells"


def reads_as_open_clip(checkpoint: Checkpoint, spec: ModelSpec) -> bool:
    """Return whether captions were cleaned and padded as open_clip does: v2 in LDM's or NeMo's own training."""
    if checkpoint.format == "nemo":
        return str(nemo.stated_text(checkpoint).get("_target_", "")).endswith(".FrozenOpenCLIPEmbedder")
    return checkpoint.format == "ldm" and spec.open_clip


def padded_length(checkpoint: Checkpoint) -> int | None:
    """Return the length that a checkpoint of NeMo's own training was fed text embeddings of, filled up with zeros."""
    return nemo.PADDED_LENGTH if nemo.pads_text(nemo.stated_text(checkpoint)) else None
