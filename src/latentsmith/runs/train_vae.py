"""`latentsmith train-vae`: an autoencoder from pictures, for who has none to start from."""

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from latentsmith.config.build import build
from latentsmith.files.errors import BadInput
from latentsmith.training.draws import PosteriorDraws
from latentsmith.training.fit import Checkpointing, Data, fit
from latentsmith.training.samples import RunSamples
from latentsmith.training.vae_module import VaeTraining

from . import pieces
from .folder import CHECKPOINTS, checkpoint_to_resume, open_run_folder
from .networks import build_network, keywords


def train_vae(config: DictConfig) -> Path:
    """Train model.first_stage_config by its lossconfig on the pictures of the training set; returns the run folder."""
    first_stage = config.model.first_stage_config
    loss = build(first_stage.lossconfig)
    if isinstance(loss, torch.nn.Identity):
        target = "latentsmith.training.losses.ReconstructionLoss"
        raise BadInput(
            f"first_stage_config.lossconfig is torch.nn.Identity, which trains nothing; set _target_: {target}"
        )
    samples, transforms = pieces.training_set(config), pieces.transforms(config)
    assert transforms.size is not None
    processes, seed = pieces.process_count(config), config.model.seed
    max_steps = pieces.step_limit(config, len(samples), pieces.global_batch(config, processes))
    vae: Any = build_network(config, "vae")
    module = VaeTraining(vae, loss, pieces.optimisation(config, processes, max_steps))
    if config.model.channels_last:
        vae.to(memory_format=torch.channels_last)
    ema = config.exp_manager.ema
    if ema.enable:
        module.keep_averages(ema.decay, every_n_steps=ema.every_n_steps, cpu_offload=ema.cpu_offload)
    folder = open_run_folder(config)
    run = RunSamples(
        read=pieces.read_images(samples, transforms, seed),
        draw=PosteriorDraws(seed, pieces.latent_shape(config, transforms.size)),
        length=len(samples),
        seed=seed,
    )
    params = config.exp_manager.checkpoint_callback_params
    fit(
        module,
        Data(run, config.model.micro_batch_size, config.model.data.num_workers),
        max_steps,
        folder,
        Checkpointing(
            folder / CHECKPOINTS,
            params.every_n_train_steps,
            params.save_top_k,
            {"latentsmith.first_stage_config": json.dumps(keywords(first_stage))},
            checkpoint_to_resume(config, folder),
        ),
        log_every_n_steps=config.trainer.log_every_n_steps,
        tensorboard=config.exp_manager.create_tensorboard_logger,
        progress_bar=config.trainer.enable_progress_bar,
        **pieces.trainer_options(config, processes),
    )
    return folder
