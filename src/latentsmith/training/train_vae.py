"""`latentsmith train-vae`: an autoencoder from pictures, for who has none to start from."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from latentsmith.checkpoints.from_config import build_network
from latentsmith.checkpoints.load import build, meta_weights
from latentsmith.config import Config
from latentsmith.config.network_arguments import network_arguments
from latentsmith.cpu import optimize_for_cpu
from latentsmith.data.dataset import open_images, reader
from latentsmith.data.loader import RunSamples
from latentsmith.files.errors import BadInput

from . import setup
from .dry_run import check_folder, header
from .fitting import fit_as_configured
from .random_draws import PosteriorDraws
from .run_folder import open_run_folder, run_folder
from .vae_module import VaeTraining


def train_vae(config: Config, *, dry_run: bool = False) -> Path:
    """Train model.first_stage_config by its lossconfig on the pictures of the training set; returns the run folder.

    dry_run: check everything that training would, print what would be trained, and stop.
    """
    setup.check_device(config)
    first_stage = config.model.first_stage_config
    loss = build(first_stage.lossconfig)
    if isinstance(loss, torch.nn.Identity):
        target = "latentsmith.training.losses.ReconstructionLoss"
        raise BadInput(
            f"first_stage_config.lossconfig is torch.nn.Identity, which trains nothing; set _target_: {target}"
        )
    samples = open_images(config)
    batch, seed = setup.global_batch(config, setup.process_count(config)), config.model.seed
    max_steps = setup.step_limit(config, samples.count, batch)
    with meta_weights() if dry_run else nullcontext():
        vae: Any = build_network(config, "vae")
    if setup.on_cpu(config):
        optimize_for_cpu(vae)
    optimisation = setup.optimisation(config, batch, max_steps)
    epochs = max_steps * batch / samples.count
    head = header({"vae": vae}, ("vae",))
    head.append(f"{samples.count:,} pictures; {max_steps:,} steps of {batch}: {epochs:.1f} epochs")
    print(*head, sep="\n", flush=True)
    if dry_run:
        check_folder(config)
        return run_folder(config)
    if config.model.channels_last:
        vae.to(memory_format=torch.channels_last)
    run = RunSamples(
        read=reader(samples, seed, None),
        draw=PosteriorDraws(seed, samples.latent_shape),
        length=samples.count,
        seed=seed,
        order=samples.order,
    )
    folder = open_run_folder(config)
    fit_as_configured(
        config,
        VaeTraining(vae, loss, optimisation),
        run,
        max_steps,
        folder,
        head=head,
        metadata={"latentsmith.first_stage_config": json.dumps(network_arguments(first_stage))},
    )
    return folder
