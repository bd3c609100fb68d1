"""`latentsmith train --dry-run`: what a config would train, on what, at what cost, without training or loading it."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from latentsmith.checkpoints.from_config import (
    build_network,
    build_networks,
    build_tokenizer,
    check_objective,
    is_encoded,
    with_padding,
)
from latentsmith.checkpoints.load import meta_weights
from latentsmith.config import Config, replaced
from latentsmith.config.network_arguments import network_arguments
from latentsmith.data import dataset
from latentsmith.data.preflight import preflight
from latentsmith.files.errors import BadInput
from latentsmith.inference import SamplingOptions, sampler_name
from latentsmith.models import UNetModel
from latentsmith.precision import half_precision
from latentsmith.units import BYTES, OPERATIONS, scaled

from . import setup
from .adapters import add_adapters
from .optimizers import STATE_VALUES
from .run_folder import checked_resume, run_folder
from .textual_inversion import add_trained_token

CPU_ATTENTION = {  # which the counter does not know
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
        query, key, value
    )
}


def dry_run(config: Config, trained: tuple[str, ...]) -> list[str]:
    """Check the config against its files, its data and this machine, and return lines on what it would train.

    Networks are built on the meta device and checkpoints are read to their headers; only a cache's fingerprints need
    the weights of the frozen networks. Raises BadInput, one line, for all that training would refuse before its first
    step.
    """
    check_objective(config)
    config = with_padding(config)
    model, batch = config.model, setup.global_batch(config)
    with meta_weights():
        networks = build_networks(config)
    tokenizer = build_tokenizer(config) if "text_encoder" in networks else None
    cached = is_encoded(model.first_stage_key) or is_encoded(model.cond_stage_key)
    frozen = {name: build_network(config, name) for name in networks if cached and name not in trained}
    samples = dataset.open_dataset(config, frozen, tokenizer, global_batch=batch)
    if samples.pad_to:
        config = replaced(config, "model.cond_stage_config.pad_to", samples.pad_to)
        model = config.model
    steps = setup.training_plan(config, samples.count).max_steps
    if model.data.validation.dataset_path and config.trainer.limit_val_batches:
        dataset.open_dataset(config, frozen, tokenizer, "validation")
    adapters = [*add_adapters(config, networks), *add_trained_token(config, networks, tokenizer)]
    check_folder(config, trained)
    if (wanted := config.exp_manager.sample_images).every_n_train_steps and wanted.prompts:
        sampler_name(SamplingOptions(num_inference_steps=wanted.steps, sampler=wanted.sampler))
    return [
        *header(networks, trained),
        *adapters,
        *preflight(samples, tokenizer, steps, batch),
        *cost(config, networks, trained, samples.latent_shape, batch),
    ]


def check_folder(config: Config, trained: tuple[str, ...]) -> None:
    """Raise BadInput for a checkpoint that is none or of another run, and for a folder that cannot be made."""
    folder = run_folder(config)
    resume = checked_resume(config, trained)
    for _, reason in resume.damaged if resume else ():
        print(f"{reason}: passed over", flush=True)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise BadInput(f"{folder}: cannot be made in {existing}; give another exp_manager.exp_dir")


def header(networks: dict[str, nn.Module], trained: tuple[str, ...]) -> list[str]:
    """Return a line for each network."""
    lines = []
    for name, network in networks.items():
        total = sum(parameter.numel() for parameter in network.parameters())
        moving = moving_parameters(network) if name in trained else 0
        what = "trained" if moving == total else f"{moving:,} of them trained" if moving else "frozen"
        lines.append(f"{name}: {total:,} parameters, {what}")
    return lines


def moving_parameters(network: nn.Module) -> int:
    """Return how many parameters of a network have gradients."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def cost(
    config: Config,
    networks: dict[str, nn.Module],
    trained: tuple[str, ...],
    latent_shape: tuple[int, int, int],
    batch: int,
) -> list[str]:
    """Return lines on the arithmetic of a step and the memory of one process, counted on tensors without data."""
    flops, activations = unet_forward(config, latent_shape)
    processes = setup.process_count(config)
    per_step = 3 * flops * batch / config.model.micro_batch_size
    return [
        f"U-Net arithmetic: {scaled(per_step, OPERATIONS, 1000)} a step of {batch} (forward, and twice that backward), "
        f"{scaled(per_step / processes, OPERATIONS, 1000)} on each of {processes} processes",
        memory(config, networks, trained, {"U-Net activations": activations}),
    ]


def memory(
    config: Config, networks: dict[str, nn.Module], trained: tuple[str, ...], more: dict[str, int] | None = None
) -> str:
    """Return a line on what one process holds of weights and all that follows from them, and `more` bytes by name."""
    counts = {name: sum(parameter.numel() for parameter in network.parameters()) for name, network in networks.items()}
    moving = sum(moving_parameters(networks[name]) for name in trained)
    sizes = {
        "weights": 4 * sum(counts.values()),
        "gradients": 4 * moving,
        "optimizer": int(4 * STATE_VALUES.get(config.model.optim.name, 2) * moving),
        "averages": 4 * moving * (config.exp_manager.ema.enable and not config.exp_manager.ema.cpu_offload),
        **(more or {}),
    }
    listed = ", ".join(f"{name} {scaled(size, BYTES, 1024)}" for name, size in sizes.items() if size)
    aside = "" if more else "; activations come on top, --dry-run counts them"
    return f"memory of a process, about: {scaled(sum(sizes.values()), BYTES, 1024)} ({listed}{aside})"


def unet_forward(config: Config, latent_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Return (floating-point operations, bytes kept for the backward pass) of the U-Net on one micro batch."""
    model, saved_bytes = config.model, {}
    half = half_precision(config.trainer.precision)
    with FakeTensorMode():
        sizes: Any = network_arguments(model.unet_config)
        unet = UNetModel(**sizes)
        owned = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in owned:
                saved_bytes[storage._cdata] = storage.nbytes()
            return tensor

        micro, text = model.micro_batch_size, model.cond_stage_config
        latents, timesteps = torch.empty(micro, *latent_shape), torch.empty(micro)
        width = sizes.get("context_dim")
        context = None if width is None else torch.empty(micro, text.pad_to or text.max_length, width)
        counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
        saved = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with torch.autocast("cpu", half, enabled=half is not None), counter, saved:
            unet(latents, timesteps, context)
    return counter.get_total_flops(), sum(saved_bytes.values())
