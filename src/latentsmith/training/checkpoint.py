"""Checkpoints of a run: a folder of safetensors for each, written aside, synced and renamed.

step-00001000/unet.safetensors   the trained weights, one file for each trained part
              ema/unet.safetensors   their averages, if there are any
              optimizer.safetensors  the optimizer's state, by parameter number
              state.json             counters, and a checksum of every file above
"""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentsmith.files.atomic import INCOMPLETE, sync_folder, write_text
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import hash_file
from latentsmith.files.tensors import open_tensors, save_safetensors

from .module import Progress, TrainingModule
from .sharding import copy_whole, is_sharded, split_like, whole

STATE_FILE = "state.json"
MOMENTS = {  # values in float32 that an optimizer keeps for a weight, where not two
    "SGD": 0, "RMSprop": 1, "Adagrad": 1, "adamw8bit": 0.5, "paged_adamw8bit": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """The whole state of a training at one step. files: its tensors by file and name; state: its counters; owned:
    whether nothing else changes the tensors."""

    files: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    owned: bool = False

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensors in self.files.values() for tensor in tensors.values())

    def copied(self) -> "Snapshot":
        """The same in the memory of the CPU, where nothing changes it."""
        if self.owned:
            return self
        copies = {
            file: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for file, tensors in self.files.items()
        }
        return Snapshot(copies, self.state, owned=True)


def take_snapshot(module: TrainingModule) -> Snapshot | None:
    """The state of `module`, its tensors not copied unless they are shards of one; None on all processes but the first.

    All processes have to ask: the shards of each tensor come together, one tensor after the other.
    """
    files = gathered(parts_of(module), keep=module.trainer.is_global_zero) if module.sharded else None
    if not module.trainer.is_global_zero:
        return None
    state = {**asdict(module.progress), "skipped_steps": int(module.skipped_steps)}
    if scaler := scaler_of(module):
        state["scaler"] = scaler.state_dict()
    state |= {"ema_updates": {name: ema.updates for name, ema in module.ema.items()}}
    return Snapshot(
        files or parts_of(module), {**state, "optimizer": module.optimisation.name}, owned=files is not None
    )


def gathered(files: dict[str, dict[str, Tensor]], keep: bool) -> dict[str, dict[str, Tensor]]:
    """The whole tensors in the memory of the CPU; of the processes, which all take part, those that `keep` them."""
    found: dict[str, dict[str, Tensor]] = {}
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            together = whole(tensor)
            if keep:
                found.setdefault(file, {})[name] = together.cpu()
    return found


def scaler_of(module: TrainingModule) -> Any:
    """What scales the loss in float16, if anything does."""
    return getattr(module.trainer.precision_plugin, "scaler", None)


def size_of(module: TrainingModule) -> int:
    """Bytes of a checkpoint, before the optimizer has a state: its moments are as large as the weights."""
    files = {name: dict(module.parts[name].state_dict()) for name in module.trained}
    weights = Snapshot(files, {}).bytes
    averages = sum(average.nbytes for ema in module.ema.values() for average in ema.averages)
    moved = sum(p.numel() for name in module.trained for p in module.parts[name].parameters() if p.requires_grad)
    return weights + averages + int(4 * MOMENTS.get(module.optimisation.name, 2) * moved)


def write_checkpoint(folder: Path, snapshot: Snapshot, keep: int, metadata: Mapping[str, str]) -> Path:
    """Write a snapshot into `folder/step-N` and remove all but the newest `keep` (-1 for all).

    metadata: kept in the header of every file of weights, so that each says what it is. An error (OSError, of a full
    disk) leaves the folder as it was.
    """
    final = folder / f"step-{snapshot.state['global_step']:08d}"
    aside = folder / f"{final.name}{INCOMPLETE}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        for name, tensors in snapshot.files.items():
            save_safetensors(aside / f"{name}.safetensors", tensors, metadata)
        checksums = {str(p.relative_to(aside)): hash_file(p) for p in sorted(aside.rglob("*")) if p.is_file()}
        write_text(aside / STATE_FILE, json.dumps({**snapshot.state, "checksums": checksums}, indent=1) + "\n")
        sync_folder(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(final, ignore_errors=True)
    os.rename(aside, final)
    sync_folder(folder)
    for old in checkpoints_in(folder)[:-keep] if keep > 0 else []:
        remove(old)
    return final


def remove(path: Path) -> None:
    """Delete a checkpoint; half of one never looks whole. One that cannot be deleted stays until the next time."""
    with suppress(OSError):
        going = path.with_name(f"{path.name}{INCOMPLETE}")
        path.rename(going)
        shutil.rmtree(going)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left of checkpoints that were being written or deleted."""
    for left in folder.glob(f"step-*{INCOMPLETE}"):
        shutil.rmtree(left, ignore_errors=True)


def parts_of(module: TrainingModule) -> dict[str, dict[str, Tensor]]:
    """Everything of a training that has to be kept, as tensors by file name."""
    files = {name: dict(module.parts[name].state_dict()) for name in module.trained}
    files |= {f"ema/{name}": average.state_dict() for name, average in module.ema.items()}
    optimizer: Any = module.optimizers(use_pl_optimizer=False)
    rows = [optimizer.state.get(parameter, {}) for parameter in parameters_of(optimizer)]
    files["optimizer"] = {
        f"{i}.{key}": torch.as_tensor(value) for i, row in enumerate(rows) for key, value in row.items()
    }
    return files


def parameters_of(optimizer: Any) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def load_checkpoint(path: Path, module: TrainingModule) -> None:
    """Put `module`, its averages and its optimizer back to the state in `path`; BadInput if it does not fit."""
    state = read_state(path)
    for name in module.trained:
        fill(module.parts[name], path / f"{name}.safetensors")
    for name, average in module.ema.items():
        if name not in state["ema_updates"]:
            raise BadInput(f"{path}: holds no averages of {name}; set exp_manager.ema.enable=false, or name a new run")
        average.load_state_dict(open_tensors(path / "ema" / f"{name}.safetensors"), state["ema_updates"][name])
    check_optimizer(path, state.get("optimizer"), module.optimisation.name)
    fill_optimizer(module.optimizers(use_pl_optimizer=False), path / "optimizer.safetensors")
    module.progress = Progress(state["global_step"], state["consumed_samples"])
    module.skipped_steps.fill_(state.get("skipped_steps", 0))
    if (scaler := scaler_of(module)) and state.get("scaler"):
        scaler.load_state_dict(state["scaler"])


def check_optimizer(path: Path, saved: str | None, wanted: str) -> None:
    """BadInput if the state in a checkpoint is of another optimizer than the config's."""
    if saved not in (None, wanted):
        raise BadInput(
            f"{path}: its optimizer is {saved}, and model.optim.name is {wanted}; set that to {saved}, or name a new "
            "run that starts from these weights with model.ckpt_path"
        )


def fill_optimizer(optimizer: Any, path: Path) -> None:
    """Load an optimizer's state, each tensor in the memory order of its parameter: fused kernels read them side by
    side, whatever their strides say."""
    if hasattr(optimizer, "init_state"):
        return fill_bitsandbytes(optimizer, path)
    parameters = parameters_of(optimizer)
    rows: dict[int, dict[str, Tensor]] = {}
    for key, value in open_tensors(path).items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        like = parameter if value.shape == parameter.shape else value
        laid_out = (
            torch.empty_like(like, dtype=value.dtype)
            if is_sharded(like)
            else torch.empty_like(like, dtype=value.dtype, device="cpu")
        )
        copy_whole(laid_out, value)
        rows.setdefault(int(number), {})[name] = laid_out
    optimizer.load_state_dict({"state": rows, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def fill_bitsandbytes(optimizer: Any, path: Path) -> None:
    """The same for one of bitsandbytes, in the memory that it asks for itself: what it loads would never be paged."""
    saved, number = open_tensors(path), 0
    for i, group in enumerate(optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            if f"{number}.step" in saved:
                optimizer.init_state(group, parameter, i, j)
                row = optimizer.state[parameter]
                for key, value in row.items():
                    row[key] = filled(value, saved.get(f"{number}.{key}"), f"{path}: {number}.{key}")
            number += 1


def filled(value: Any, saved: Tensor | None, what: str) -> Any:
    """A tensor filled with the saved one, or the saved number; BadInput where it is of another kind."""
    like = torch.as_tensor(value)
    if saved is None or saved.shape != like.shape or saved.dtype != like.dtype:
        raise BadInput(f"{what} is not as this bitsandbytes keeps it; install the version that wrote it")
    return value.copy_(saved) if isinstance(value, Tensor) else saved.item()


def fill(module: torch.nn.Module, path: Path) -> None:
    """Load a part of a checkpoint, strictly; BadInput names the file and the first name that does not fit."""
    state = module.state_dict()
    try:
        module.load_state_dict({name: split_like(t, state.get(name, t)) for name, t in open_tensors(path).items()})
    except RuntimeError as error:
        raise BadInput(f"{path}: does not fit this config ({str(error).splitlines()[1].strip()})") from None


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint whose files are all as they were written; BadInput says which is not."""
    try:
        state = json.loads((path / STATE_FILE).read_text("utf-8"))
        checksums = dict(state["checksums"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{path}: not a checkpoint of a run ({type(error).__name__}: {error})") from None
    for name, checksum in checksums.items():
        if not (path / name).is_file() or hash_file(path / name) != checksum:
            raise BadInput(f"{path / name}: damaged or missing; go on from another checkpoint of the run")
    return state


def checkpoints_in(folder: Path) -> list[Path]:
    """The finished checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE_FILE).is_file() and path.suffix == "")
