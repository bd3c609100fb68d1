"""Adapters of a run: put on its networks as the config says, and described."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from latentsmith.adapters import AdapterSpec, inject, load_adapter_state
from latentsmith.adapters.file import Header
from latentsmith.adapters.names import layers_of
from latentsmith.adapters.read import read_adapter
from latentsmith.adapters.spec import adaptable
from latentsmith.checkpoints import ModelSpec
from latentsmith.config import Config
from latentsmith.config.peft_options import PeftConfig
from latentsmith.files.errors import BadInput

from .hooks import Hook
from .hooks.adapters import ExportAdapters

BASE_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def adapter_spec(peft: PeftConfig) -> AdapterSpec:
    """Return the adapters that model.peft asks for. Raises BadInput for values that cannot be."""
    try:
        return AdapterSpec(
            scheme=peft.peft_scheme or "lora",
            rank=peft.adapter_dim,
            alpha=peft.alpha,
            conv_rank=peft.conv_dim,
            conv_alpha=peft.conv_alpha,
            dropout=peft.adapter_dropout,
            targets=peft.targets,
            exclude=peft.exclude,
            ranks=peft.ranks,
            factor=peft.factor,
        )
    except (ValueError, TypeError) as error:
        raise BadInput(f"model.peft: {error}") from None


def add_adapters(config: Config, networks: Mapping[str, nn.Module]) -> list[str]:
    """Put the adapters of model.peft on networks, and return lines that say what they are; nothing without a scheme.

    Their first values are a function of model.seed.
    """
    peft = config.model.peft
    if peft.peft_scheme is None:
        return []
    spec, lines = adapter_spec(peft), []
    for name in peft.networks:
        try:
            layers = inject(networks[name], spec, seed=config.model.seed)
        except ValueError as error:
            raise BadInput(f"model.peft: {error}") from None
        if peft.restore_from_path:
            start_from(peft.restore_from_path, networks, name)
        dtype = BASE_DTYPES[peft.base_precision]
        for layer in adaptable(networks[name]).values() if dtype != torch.float32 else ():
            for parameter in layer.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
        lines.append(f"{name}: {spec.scheme} on {len(layers)} layers, rank {spec.rank}, {scale_line(spec, peft)}")
    return lines


def start_from(path: str, networks: Mapping[str, nn.Module], name: str) -> None:
    """Fill the fresh adapters of a network from a file, whose layers, ranks and alphas have to be theirs."""
    file = read_adapter(path, layers_of(networks))
    try:
        load_adapter_state(networks[name], file.parts.get(name, {}))
    except ValueError as error:
        raise BadInput(f"{path}: does not start the adapters of model.peft: {name}.{error}") from None


def scale_line(spec: AdapterSpec, peft: PeftConfig) -> str:
    """Return what alpha is and why, since programs differ in its default."""
    if spec.scheme == "oft":
        return f"rotations limited to {spec.alpha} * outputs" if spec.alpha else "rotations without a limit"
    alpha = spec.alpha_of(spec.rank, kernel=False)
    origin = "as model.peft.alpha says" if peft.alpha is not None else "the rank, as in diffusers; kohya's default is 1"
    return f"alpha {alpha:g} ({origin}), scale {alpha / spec.rank:g}"


def export_hooks(config: Config, model: ModelSpec, folder: Path, samples: int) -> list[Hook]:
    """Return the hook that writes a run's adapters for other programs; none where the run has none."""
    if config.model.peft.peft_scheme is None:
        return []
    spec, optim = adapter_spec(config.model.peft), config.model.optim
    height, width = (8 * model.image_size,) * 2
    metadata = {
        "ss_learning_rate": str(optim.lr),
        "ss_text_encoder_lr": str(optim.text_encoder_lr),
        "ss_optimizer": optim.name,
        "ss_seed": str(config.model.seed),
        "ss_resolution": f"({width}, {height})",
        "ss_num_train_images": str(samples),
        "ss_sd_model_name": Path(config.model.ckpt_path or config.model.unet_config.from_pretrained or "").name,
    }
    header = Header(
        name=Path(config.exp_manager.name).name,
        scheme=spec.scheme,
        rank=spec.rank,
        alpha=spec.alpha_of(spec.rank, kernel=False),
        base="SD2" if model.open_clip else "SD1",
        v_prediction=model.prediction_type == "v_prediction",
        metadata=metadata,
    )
    return [ExportAdapters(folder, header)]


def rate_factor(config: Config) -> Callable[[str], float]:
    """Return the function parameter's name (network first) -> its learning rate over model.optim.lr."""
    optim, ratio = config.model.optim, config.model.peft.lora_plus_ratio
    text = 1.0 if optim.text_encoder_lr is None or not optim.lr else optim.text_encoder_lr / optim.lr
    token = config.model.textual_inversion.lr
    of_token = 1.0 if token is None or not optim.lr else token / optim.lr

    def factor(name: str) -> float:
        if name.endswith(".token_embedding.learned"):
            return of_token
        of_network = text if name.startswith("text_encoder.") else 1.0
        return of_network * (ratio if name.endswith(".lora_up") else 1.0)

    return factor
