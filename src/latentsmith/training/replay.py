"""`latentsmith train --replay FILE`: run the samples of a skipped step again and say what is not finite in them."""

import json
import math
from pathlib import Path

import torch

from latentsmith.config import Config, load_config
from latentsmith.files.errors import BadInput
from latentsmith.files.regular import JSON, read_regular

from .checkpoint import checkpoints_in, fill
from .module import TrainingModule
from .nonfinite import batch_of, first_bad
from .run_folder import CHECKPOINTS
from .train import prepared


def replay(file: Path, config: Config) -> bool:
    """Run the micro batch that a file in `nonfinite/` of a run names, with the weights beside it, or else those of the
    newest checkpoint before it. Prints a line for each sample and what comes out; returns whether all is finite.

    config: of the run. Raises BadInput for a file that is none of these.
    """
    described = read_description(file)
    training = prepared(config)
    module, device = training.module, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{file}: step {described['step']:,}, with {fill_weights(module, file, described)}")
    module.to(device)
    module.on_train_start()
    batch = batch_of(training.samples, described["positions"], device)
    half = {"bf16": torch.bfloat16, "16": torch.float16}.get(config.trainer.precision.partition("-")[0])
    with torch.autocast(device.type, half, enabled=half is not None):
        found = first_bad(module, batch)
    for place, (key, position) in enumerate(zip(found["keys"], described["positions"], strict=True)):
        timestep = f", timestep {found['timesteps'][place]}" if found["timesteps"] else ""
        print(f"  sample {key} at position {position}{timestep}")
    good = math.isfinite(found["loss"]) and found["first_bad"] is None
    print(f"loss {found['loss']:.6g}; " + ("all is finite" if good else f"first not finite: {found['first_bad']}"))
    return good


def config_of(file: Path) -> Config:
    """The config of the run in whose folder the file lies."""
    path = file.parent.parent / "config.yaml"
    if not path.is_file():
        raise BadInput(f"{file}: does not lie in nonfinite/ of a run; there is no {path}")
    return load_config(path)


def read_description(file: Path) -> dict:
    try:
        described = json.loads(read_regular(file, JSON))
        return {"step": int(described["step"]), "positions": [int(one) for one in described["positions"]],
                "weights": described.get("weights")}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{file}: not a file that training wrote of a skipped step ({error})") from None


def fill_weights(module: TrainingModule, file: Path, described: dict) -> str:
    """Load the trained parts as near to the step as there are any; says which."""
    beside = file.parent / described["weights"] if described["weights"] else None
    if beside is None or not beside.is_dir():
        found = checkpoints_in(file.parent.parent / CHECKPOINTS)
        before = [one for one in found if int(one.name.removeprefix("step-")) < described["step"]]
        if not before:
            return "the weights that the run started from"
        beside = before[-1]
    for name in module.trained:
        fill(module.parts[name], beside / f"{name}.safetensors")
    return f"the weights in {beside}"
