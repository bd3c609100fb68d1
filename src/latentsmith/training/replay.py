"""`latentsmith train --replay FILE`: run the samples of a skipped step again and report what is not finite in them."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from latentsmith.config import Config
from latentsmith.data.loader import to_device
from latentsmith.files.errors import BadInput
from latentsmith.files.regular import JSON, read_regular
from latentsmith.precision import half_precision

from .checkpointing import checkpoints_in, load_network
from .hooks.nonfinite import first_bad
from .objectives import Objective
from .run_folder import CHECKPOINTS, find_resume
from .state import file_name
from .train import prepared


def replay(file: Path, config: Config) -> bool:
    """Run the micro batch that a file in `nonfinite/` of a run names; return whether all is finite.

    With the weights beside the file, or else those of the newest checkpoint before the step. Prints a line for each
    sample and what comes out. config: of the run. Raises BadInput for a file that is none of these.
    """
    description = read_description(file)
    resume = find_resume(config) if config.model.scale_factor == "measured" else None
    ready = prepared(config, resume=resume)
    objective, device = ready.objective, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{file}: step {description['step']:,}, with {load_weights(objective, file, description)}")
    objective.to(device).train()
    batch = to_device(ready.samples[description["positions"]], device)
    half = half_precision(config.trainer.precision)
    with torch.autocast(device.type, half, enabled=half is not None):
        found = first_bad(objective, batch)
    for index, (key, position) in enumerate(zip(found["keys"], description["positions"], strict=True)):
        timestep = f", timestep {found['timesteps'][index]}" if found["timesteps"] else ""
        print(f"  sample {key} at position {position}{timestep}")
    good = math.isfinite(found["loss"]) and found["first_bad"] is None
    print(f"loss {found['loss']:.6g}; " + ("all is finite" if good else f"first not finite: {found['first_bad']}"))
    return good


def config_file(file: Path) -> Path:
    """Return the config.yaml of the run in whose folder the file lies."""
    path = file.parent.parent / "config.yaml"
    if not path.is_file():
        raise BadInput(f"{file}: does not lie in nonfinite/ of a run; there is no {path}")
    return path


def read_description(file: Path) -> dict[str, Any]:
    try:
        description = json.loads(read_regular(file, JSON))
        return {"step": int(description["step"]), "positions": [int(number) for number in description["positions"]],
                "weights": description.get("weights")}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{file}: not a file that training wrote of a skipped step ({error})") from None


def load_weights(objective: Objective, file: Path, description: dict[str, Any]) -> str:
    """Load the trained networks as near to the step as there are any; return which they are."""
    beside = file.parent / description["weights"] if description["weights"] else None
    if beside is None or not beside.is_dir():
        found = checkpoints_in(file.parent.parent / CHECKPOINTS)
        before = [each for each in found if int(each.name.removeprefix("step-")) < description["step"]]
        if not before:
            return "the weights that the run started from"
        beside = before[-1]
    for name in objective.trained:
        load_network(objective.networks[name], beside / file_name(name, objective.networks[name]))
    return f"the weights in {beside}"
