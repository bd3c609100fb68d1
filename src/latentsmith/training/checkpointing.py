"""Checkpoints of a run: written by steps and minutes, in the background where memory allows, read, and removed.

step-00001000/unet.safetensors   the trained weights, one file for each trained network
              ema/unet.safetensors   their averages, if there are any
              optimizer.safetensors  the optimizer's state, by parameter number
              state.json             counters, and a checksum of every file above

A checkpoint is a folder written under another name, synced and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentsmith.files.atomic import INCOMPLETE, sync_folder, write_text
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import hash_file
from latentsmith.files.json import check_types, read_json
from latentsmith.files.memory import available_bytes
from latentsmith.files.tensors import open_tensors, save_safetensors

from .clipping import parameters_of
from .hooks import Hook
from .optimizers import STATE_VALUES, group_numbers
from .sharding import copy_whole, is_sharded, on_first_process, split_like, whole
from .state import TrainingState, file_name, trained_parameters, trained_state

if TYPE_CHECKING:  # `latentsmith inspect` reads checkpoints too, and needs no Fabric
    from .loop import Step, Training

STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
REPLACED = f".REPLACED{INCOMPLETE}"  # suffix of a checkpoint while another is put in its place
MARGIN = 1.25  # of a snapshot's size, that memory has to have free for a save in the background
TRAINED = "trained"  # in the optimizer's file: a weight that a schedule-free optimizer trains
GIB = 2**30

# ---- Snapshots ----


@dataclass(frozen=True)
class Snapshot:
    """The whole state of a training at one step.

    files: tensors by file and name. state: the counters. owned: whether nothing else changes the tensors.
    """

    files: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    owned: bool = False

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensors in self.files.values() for tensor in tensors.values())

    def copied(self) -> Snapshot:
        """Return the same in the memory of the CPU, where nothing changes it."""
        if self.owned:
            return self
        copies = {
            file: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for file, tensors in self.files.items()
        }
        return Snapshot(copies, self.state, owned=True)


def take_snapshot(state: TrainingState, *, first_process: bool = True) -> Snapshot | None:
    """Return the state's tensors, not copied unless they are shards; None in all processes but the first.

    All processes have to ask: the shards of each tensor come together, one tensor after the other.
    """
    files = _gathered(_tensors(state), keep=first_process) if state.sharded else None
    if not first_process:
        return None
    counters = {
        "global_step": state.global_step,
        "consumed_samples": state.consumed_samples,
        "skipped_steps": int(state.skipped_steps),
        **({"scaler": state.scaler.state_dict()} if state.scaler else {}),
        "ema_updates": {name: int(average.updates) for name, average in state.ema.items()},
        "optimizer": state.optimizer_name,
        **({"optimizer_groups": numbers} if (numbers := group_numbers(state.optimizer)) else {}),
    }
    return Snapshot(files or _tensors(state), counters, owned=files is not None)


def _tensors(state: TrainingState) -> dict[str, dict[str, Tensor]]:
    """Return everything of a training that has to be kept, as tensors by file name.

    Weights are those to evaluate with; the optimizer's file has the trained ones, where they are others.
    """
    with state.for_evaluation() as trained:
        files = {file_name(name, state.networks[name]): trained_state(state.networks[name]) for name in state.trained}
        if trained is not None:
            files = {file: {name: t.detach().clone() for name, t in tensors.items()} for file, tensors in files.items()}
    for name, average in state.ema.items():
        files[f"ema/{file_name(name, state.networks[name])}"] = average.state_dict()
    rows = [state.optimizer.state.get(parameter, {}) for parameter in parameters_of(state.optimizer)]
    files[OPTIMIZER_FILE] = {
        f"{i}.{key}": torch.as_tensor(value) for i, row in enumerate(rows) for key, value in row.items()
    }
    files[OPTIMIZER_FILE] |= {f"{i}.{TRAINED}": weight for i, weight in enumerate(trained or [])}
    return files


def _gathered(files: dict[str, dict[str, Tensor]], keep: bool) -> dict[str, dict[str, Tensor]]:
    """Return the whole tensors in the memory of the CPU, where `keep` is true; all processes take part."""
    found: dict[str, dict[str, Tensor]] = {}
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            together = whole(tensor)
            if keep:
                found.setdefault(file, {})[name] = together.cpu()
    return found


def checkpoint_bytes(state: TrainingState) -> int:
    """Return the size of a checkpoint before the optimizer has a state."""
    files = {name: trained_state(state.networks[name]) for name in state.trained}
    averages = sum(average.nbytes for ema in state.ema.values() for average in ema.averages)
    moved = sum(p.numel() for p in trained_parameters(state.networks, state.trained))
    return Snapshot(files, {}).bytes + averages + int(4 * STATE_VALUES.get(state.optimizer_name, 2) * moved)


# ---- Files ----


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the finished checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE_FILE).is_file() and path.suffix == "")


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
            save_safetensors(aside / name, tensors, metadata)
        checksums = {str(p.relative_to(aside)): hash_file(p) for p in sorted(aside.rglob("*")) if p.is_file()}
        write_text(aside / STATE_FILE, json.dumps({**snapshot.state, "checksums": checksums}, indent=1) + "\n")
        sync_folder(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _put_in_place(aside, final)
    sync_folder(folder)
    for old in checkpoints_in(folder)[:-keep] if keep > 0 else []:
        _remove(old)
    return final


def _put_in_place(aside: Path, final: Path) -> None:
    """Rename a folder; one that stands in its place is kept under another name until then."""
    replaced = final.with_name(f"{final.name}{REPLACED}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    os.rename(aside, final)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove(path: Path) -> None:
    """Delete a checkpoint; half of one never looks whole. One that cannot be deleted stays until the next time."""
    with suppress(OSError):
        going = path.with_name(f"{path.name}{INCOMPLETE}")
        path.rename(going)
        shutil.rmtree(going)


def restore_replaced(folder: Path) -> None:
    """Put back checkpoints whose process was killed before another took their place."""
    for left in folder.glob(f"step-*{REPLACED}"):
        final = left.with_name(left.name.removesuffix(REPLACED))
        if not final.exists():
            left.rename(final)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left of checkpoints that were being written, replaced or deleted."""
    restore_replaced(folder)
    for left in folder.glob(f"step-*{INCOMPLETE}"):
        shutil.rmtree(left, ignore_errors=True)


STATE_TYPES: dict[str, type | UnionType] = {
    "global_step": int, "consumed_samples": int, "checksums": dict, "ema_updates": dict | None,
    "optimizer": str | None,
}  # fmt: skip


def read_state(path: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint. Raises BadInput unless all its files are as they were written."""
    file, what = path / STATE_FILE, "the state of a checkpoint"
    try:
        state = read_json(file, what)
        check_types(state, STATE_TYPES, file, what)
        checksums = state["checksums"]
        check_types(checksums, dict.fromkeys(checksums, str), file, what)
    except BadInput as error:
        raise BadInput(f"{path}: not a checkpoint of a run ({error})") from None
    for name, checksum in checksums.items():
        if not (path / name).is_file() or hash_file(path / name) != checksum:
            raise BadInput(f"{path / name}: damaged or missing; go on from another checkpoint of the run")
    return state


# ---- Loading ----


def load_checkpoint(path: Path, counters: Mapping[str, Any], state: TrainingState) -> None:
    """Put a training back to the checkpoint in `path`. Raises BadInput where it does not fit.

    counters: its state.json, as `read_state` returned it.
    """
    check_fits(path, counters, state.trained, state.optimizer_name, bool(state.ema))
    for name in state.trained:
        load_network(state.networks[name], path / file_name(name, state.networks[name]))
    for name, average in state.ema.items():
        average.load_state_dict(
            open_tensors(path / "ema" / file_name(name, state.networks[name])), counters["ema_updates"][name]
        )
    _load_optimizer(state.optimizer, path / OPTIMIZER_FILE)
    for group, numbers in zip(state.optimizer.param_groups, counters.get("optimizer_groups", ()), strict=False):
        group.update(numbers)
    state.global_step, state.consumed_samples = counters["global_step"], counters["consumed_samples"]
    state.skipped_steps.fill_(counters.get("skipped_steps", 0))
    if state.scaler and counters.get("scaler"):
        state.scaler.load_state_dict(counters["scaler"])


def check_fits(
    path: Path, counters: Mapping[str, Any], trained: Sequence[str], optimizer: str, has_averages: bool
) -> None:
    """Raise BadInput unless a checkpoint holds what a training needs: the same networks, optimizer and averages.

    counters: its state.json. trained, optimizer: of the training. has_averages: whether it keeps an EMA.
    """
    afresh = "or name a new run that starts from these weights with model.ckpt_path"
    held = {name.partition(".")[0] for name in counters["checksums"] if Path(name).parent == Path()} - {"optimizer"}
    if held != set(trained):
        fix = f"set model.cond_stage_trainable={str('text_encoder' in held).lower()}, " if "unet" in held else ""
        raise BadInput(
            f"{path}: trains {' and '.join(sorted(held))}, and this config trains {' and '.join(sorted(trained))}; "
            f"{fix}{afresh}"
        )
    if missing := [name for name in trained if has_averages and name not in counters["ema_updates"]]:
        raise BadInput(
            f"{path}: holds no averages of {missing[0]}; set exp_manager.ema.enable=false, or name a new run"
        )
    saved = counters.get("optimizer")
    if saved not in (None, optimizer):
        raise BadInput(
            f"{path}: its optimizer is {saved}, and model.optim.name is {optimizer}; set that to {saved}, {afresh}"
        )


def load_network(network: torch.nn.Module, path: Path) -> None:
    """Load one file of a checkpoint, strictly. BadInput names the file and the first name that does not fit."""
    state, kept = network.state_dict(), trained_state(network)
    frozen = {name: tensor for name, tensor in state.items() if name not in kept}
    saved = {name: split_like(tensor, state.get(name, tensor)) for name, tensor in open_tensors(path).items()}
    try:
        network.load_state_dict(frozen | saved)
    except RuntimeError as error:
        raise BadInput(f"{path}: does not fit this config ({str(error).splitlines()[1].strip()})") from None


def _load_optimizer(optimizer: Any, path: Path) -> None:
    """Load an optimizer's state, each tensor in the memory order of its parameter.

    Fused kernels read both side by side, whatever their strides say.
    """
    if hasattr(optimizer, "init_state"):
        return _load_bitsandbytes(optimizer, path)
    parameters = parameters_of(optimizer)
    rows: dict[int, dict[str, Tensor]] = {}
    for key, value in open_tensors(path).items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        if name == TRAINED:
            copy_whole(parameter, value)
            continue
        like = parameter if value.shape == parameter.shape else value
        device = None if is_sharded(like) else "cpu"
        ordered = torch.empty_like(like, dtype=value.dtype, device=device)
        copy_whole(ordered, value)
        rows.setdefault(int(number), {})[name] = ordered
    optimizer.load_state_dict({"state": rows, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def _load_bitsandbytes(optimizer: Any, path: Path) -> None:
    """Do the same for an optimizer of bitsandbytes, into memory that it allocates: what it loads is never paged."""
    saved, number = open_tensors(path), 0
    for i, group in enumerate(optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            if f"{number}.step" in saved:
                optimizer.init_state(group, parameter, i, j)
                row = optimizer.state[parameter]
                for key, value in row.items():
                    row[key] = _filled(value, saved.get(f"{number}.{key}"), f"{path}: {number}.{key}")
            number += 1


def _filled(value: Any, saved: Tensor | None, name: str) -> Any:
    """Return a tensor filled with the saved one, or the saved number. Raises BadInput where shape or dtype differ."""
    like = torch.as_tensor(value)
    if saved is None or saved.shape != like.shape or saved.dtype != like.dtype:
        raise BadInput(f"{name} is not as this bitsandbytes keeps it; install the version that wrote it")
    return value.copy_(saved) if isinstance(value, Tensor) else saved.item()


# ---- When ----


@dataclass(frozen=True)
class CheckpointPlan:
    """Folder of the checkpoints, their interval (0: the last step only), how many stay (-1: all), metadata.

    every_n_minutes: also so long after the one before; None or 0 for steps alone.
    """

    folder: Path
    every_n_steps: int
    keep: int
    metadata: Mapping[str, str] = field(default_factory=dict)
    every_n_minutes: float | None = None


class SaveCheckpoints(Hook):
    """Saves at optimizer-step boundaries, and after the last step.

    A snapshot in the memory of the CPU is written by another thread while training goes on, where there is room for
    one; else training waits. A checkpoint that cannot be written (a full disk) leaves the last one as it is and is
    reported; only the one of the end has to succeed.
    """

    def __init__(self, plan: CheckpointPlan, clock: Callable[[], float] = time.monotonic):
        self.plan, self.clock = plan, clock
        self.under_way: Future[None] | None = None
        self.reported_blocking = False

    def on_start(self, training: Training) -> None:
        self.saved_at = self.clock()
        on_first_process(training.fabric, lambda: self._prepare(training))

    def _prepare(self, training: Training) -> None:
        remove_leftovers(self.plan.folder)
        check_disk(self.plan, training.state, training.plan.max_steps)

    def after_step(self, training: Training, step: Step) -> None:
        every, minutes = self.plan.every_n_steps, self.plan.every_n_minutes
        due = bool(every) and training.state.global_step % every == 0
        if minutes and not due:
            due = training.fabric.broadcast(self.clock() - self.saved_at >= 60 * minutes)
        if due:
            self.save(training)

    def on_end(self, training: Training) -> None:
        self.wait()
        newest = checkpoints_in(self.plan.folder)
        saved = bool(newest) and newest[-1].name == f"step-{training.state.global_step:08d}"
        if training.fabric.broadcast(saved):  # all processes have to take a snapshot, or none
            return
        if snapshot := take_snapshot(training.state, first_process=training.fabric.is_global_zero):
            write_checkpoint(self.plan.folder, snapshot, self.plan.keep, self.plan.metadata)

    def close(self) -> None:
        self.wait()

    def save(self, training: Training) -> None:
        """Write a checkpoint of the present state, at once or in the background."""
        self.wait()
        self.saved_at = self.clock()
        snapshot = take_snapshot(training.state, first_process=training.fabric.is_global_zero)
        if snapshot is None:
            return
        size = snapshot.bytes
        if available_bytes() > MARGIN * size:
            # A thread that has run a tensor operation owns OpenMP threads, and while it lives all of them outnumber the
            # cores, so that those of training sleep between operations: 1.8 times slower. It ends with its file.
            pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self.under_way = pool.submit(self._write, snapshot.copied())
            pool.shutdown(wait=False)
            return
        if not self.reported_blocking:
            print(f"no room in memory for a copy of {size / GIB:.1f} GiB: training waits while it saves", flush=True)
            self.reported_blocking = True
        self._write(snapshot)

    def wait(self) -> None:
        """Wait until no checkpoint is being written."""
        if self.under_way is not None:
            self.under_way.result()
            self.under_way = None

    def _write(self, snapshot: Snapshot) -> None:
        try:
            write_checkpoint(self.plan.folder, snapshot, self.plan.keep, self.plan.metadata)
        except OSError as error:
            last = checkpoints_in(self.plan.folder)
            newest = f"{last[-1].name} is the last one" if last else "there is none yet"
            reason = error.strerror or str(error)
            line = f"checkpoint of step {snapshot.state['global_step']:,} not written ({reason})"
            print(f"{line}: training goes on, {newest}", file=sys.stderr, flush=True)


def check_disk(plan: CheckpointPlan, state: TrainingState, max_steps: int) -> None:
    """Raise BadInput if the disk cannot hold the checkpoints that will stay, and one more while it is written."""
    stay = -(-max_steps // plan.every_n_steps) if plan.every_n_steps else 1
    stay = stay if plan.keep < 0 else plan.keep if plan.every_n_minutes else min(plan.keep, stay)
    size = checkpoint_bytes(state)
    plan.folder.mkdir(parents=True, exist_ok=True)
    files = [file for checkpoint in checkpoints_in(plan.folder) for file in checkpoint.rglob("*") if file.is_file()]
    present = sum(file.stat().st_size for file in files)
    free = shutil.disk_usage(plan.folder).free
    needed = (stay + 1) * size - present
    if free < needed:
        raise BadInput(
            f"{plan.folder}: {free / GIB:.1f} GiB are free, and {stay} checkpoints of {size / GIB:.1f} GiB, and one "
            f"more while it is written, need {needed / GIB:.1f}; free some, or lower "
            "exp_manager.checkpoint_callback_params.save_top_k"
        )
