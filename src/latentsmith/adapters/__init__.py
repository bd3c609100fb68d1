"""Adapters: LoRA and its kin, on the linear layers and convolutions of plain networks.

    spec = AdapterSpec(scheme="lora", rank=16, alpha=8, targets="transformer")   # or dora, loha, lokr, oft
    layers = inject(unet, spec, seed=0)      # freezes the network, adds parameters LAYER.adapters.default.NAME
    state = adapter_state(unet)              # LAYER.NAME -> tensor; alpha is among them
    load_adapter_state(unet, state)          # fills adapters that are there, or makes them
    set_weight(unet, "default", 0.8)         # 0: the base, bit for bit
    remove(unet)                             # the base, bit for bit
    base_state(unet)                         # the state dict without adapters

Base parameters keep their names and values, and CPU kernels, compilation, activation checkpointing and EMA work as on
any network. Several adapters at once, each under its name, add up: every change is one of the base's own weight.
"""

from .inject import Adapter, adapter_state, adapters_of, base_state, inject, load_adapter_state, remove, set_weight
from .spec import TARGETS, AdapterSpec, target_ranks

__all__ = [
    "TARGETS",
    "Adapter",
    "AdapterSpec",
    "adapter_state",
    "adapters_of",
    "base_state",
    "inject",
    "load_adapter_state",
    "remove",
    "set_weight",
    "target_ranks",
]
