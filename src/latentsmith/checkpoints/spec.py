"""Read what weights do not show of a model, where each format says it: prediction type, schedule, null text."""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from math import isfinite
from pathlib import Path
from typing import Any

from latentsmith.architectures import COMPONENTS
from latentsmith.diffusion.schedule import LDM_BETA_SCHEDULES, TIMESTEP_SPACINGS, NoiseSchedule
from latentsmith.files.errors import BadInput
from latentsmith.files.json import parse_json

from . import nemo
from .base import NULL_TEXT_KEY, SPEC_KEY, Checkpoint, ModelSpec, shown
from .formats import FORMATS
from .sizes import V21_STEP, architecture, version_of

OBJECTIVE = ("prediction_type", "beta_schedule", "linear_start", "linear_end", "timesteps", "trained_betas",
             "zero_terminal_snr", "scale_factor")  # fmt: skip
GUESSED = "v1 weights"  # where the prediction type of a file that does not state it comes from


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _is_whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


_BOOL = ("true or false", lambda value: isinstance(value, bool))
_BETA = ("a number above 0 and below 1", lambda value: _is_number(value) and 0 < value < 1)
_ABOVE_0 = ("a number above 0", lambda value: _is_number(value) and value > 0)
_MAPPING = ("a mapping", lambda value: isinstance(value, Mapping))
FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # of ModelSpec -> what a value must be, and whether it is
    "unet_config": _MAPPING, "first_stage_config": _MAPPING, "cond_stage_config": _MAPPING,
    "prediction_type": (
        "epsilon, v_prediction or sample",
        lambda value: isinstance(value, str) and value in ("epsilon", "v_prediction", "sample"),
    ),
    "image_size": ("a whole number from 1 to 8,192", _is_whole(1, 8192)),
    "scale_factor": _ABOVE_0, "linear_start": _BETA, "linear_end": _BETA,
    "timesteps": ("a whole number from 1 to 100,000", _is_whole(1, 100_000)),
    "zero_terminal_snr": _BOOL, "karras_sigmas": _BOOL, "set_alpha_to_one": _BOOL, "clip_sample_range": _ABOVE_0,
    "beta_schedule": (
        f"one of {', '.join(LDM_BETA_SCHEDULES)}",
        lambda value: isinstance(value, str) and value in LDM_BETA_SCHEDULES,
    ),
    "cosine_s": ("a number from 0 on", lambda value: _is_number(value) and value >= 0),
    "timestep_spacing": (
        f"one of {', '.join(TIMESTEP_SPACINGS)}", lambda value: isinstance(value, str) and value in TIMESTEP_SPACINGS
    ),
    "steps_offset": ("a whole number from 0 to 100,000", _is_whole(0, 100_000)),
    "null_text": ("empty or zero", lambda value: value in ("empty", "zero")),
    "trained_betas": (
        "a list of numbers", lambda value: isinstance(value, list | tuple) and all(map(_is_number, value))
    ),
}  # fmt: skip
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
    check_fields(facts, str(checkpoint.path))
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
    stored = parse_json(checkpoint.metadata[SPEC_KEY], name, "the spec of a model")
    check_fields(stored, name)
    try:
        return ModelSpec(**stored)
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


def check_fields(fields: Mapping[str, Any], name: str) -> None:
    """Raise BadInput for a value that a field of ModelSpec cannot have; None is "not stated". name: the source's."""
    for key, value in fields.items():
        if value is not None and key in FIELDS and not FIELDS[key][1](value):
            raise BadInput(f"{name}: {key} is {shown(value)}; it must be {FIELDS[key][0]}")
    try:
        if not isinstance(betas := fields.get("trained_betas"), type(None)):
            NoiseSchedule.from_betas(betas)
    except ValueError as error:
        raise BadInput(f"{name}: trained_betas: {error}") from None


def objective_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint itself states of how its U-Net was trained: the fields in OBJECTIVE, those stated."""
    facts = dict(_facts(checkpoint))
    if SPEC_KEY in checkpoint.metadata:
        facts = asdict(_stored(checkpoint))
    elif (found := prediction_of(checkpoint))[1] != GUESSED:
        facts["prediction_type"] = found[0]
    check_fields(facts, str(checkpoint.path))
    return {key: facts[key] for key in OBJECTIVE if facts.get(key) is not None}


def notes_of(checkpoint: Checkpoint) -> list[str]:
    """Return what a checkpoint states of sampling and is done only in part; first what refuses it."""
    facts = _facts(checkpoint)
    return [*([f"refused: {facts['refused']}"] if facts.get("refused") else []), *facts.get("notes", ())]


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
        return "epsilon", GUESSED
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
