"""Adapter files for other programs, written when a run ends."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from latentsmith.adapters import adapter_state, diffusers, kohya
from latentsmith.adapters.file import Header
from latentsmith.adapters.names import Layers, layers_of
from latentsmith.files.tensors import save_safetensors

from ..loop import Training
from . import Hook


class ExportAdapters(Hook):
    """Write the adapters, as their EMA where there is one, into `folder` at the end.

    NAME.safetensors as kohya and web UIs have it, and pytorch_lora_weights.safetensors for diffusers, if the scheme is
    one that it reads.
    """

    def __init__(self, folder: Path, header: Header):
        self.folder, self.header = folder, header

    def on_end(self, training: Training) -> None:
        if not training.fabric.is_global_zero:
            return
        networks = {name: training.state.networks[name] for name in training.state.trained}
        with training.state.for_evaluation(), training.state.averaged():
            parts = {name: adapter_state(network) for name, network in networks.items()}
            self.write(parts, layers_of(networks), training.state.global_step)

    def write(self, parts: Mapping[str, Mapping[str, Tensor]], layers: Layers, step: int) -> None:
        tensors = kohya.named(parts, layers)
        metadata = kohya.metadata(self.header, tensors) | {"ss_steps": str(step)}
        written = [self.folder / f"{self.header.name}.safetensors"]
        save_safetensors(written[0], tensors, metadata)
        if self.header.scheme in ("lora", "dora"):
            written.append(self.folder / diffusers.FILE_NAME)
            save_safetensors(written[1], diffusers.named(parts, layers), diffusers.metadata(parts, layers))
        count = len({key.rpartition(".")[0] for key in itertools.chain(*parts.values())})
        print(f"adapters of {count} layers: {' and '.join(map(str, written))}", flush=True)
