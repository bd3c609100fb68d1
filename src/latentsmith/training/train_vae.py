"""`latentsmith train-vae`: an autoencoder from images, where there is none to start from."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from latentsmith.checkpoints.from_config import build_network
from latentsmith.checkpoints.load import build, meta_weights
from latentsmith.config import Config
from latentsmith.config.network_arguments import network_arguments
from latentsmith.cpu import optimize_for_cpu
from latentsmith.data.dataset import TrainingSet, open_images
from latentsmith.data.loader import RunSamples
from latentsmith.data.preflight import repeated_in_a_step
from latentsmith.data.reader import reader
from latentsmith.files.errors import BadInput

from . import setup
from .dry_run import check_folder, header
from .identity import content_of
from .loop import Plan
from .losses import VaeObjective
from .random_draws import PosteriorDraws
from .run_folder import Resume, locked_run_folder, open_run_folder, resume_together, run_folder
from .sharding import on_first_process

TRAINED = ("vae",)


def train_vae(config: Config, *, dry_run: bool = False) -> Path:
    """Train model.first_stage_config by its lossconfig on the images of the training set; return the run folder.

    dry_run: check everything that training would, print what would be trained, and stop.
    """
    setup.check_device(config)
    folder = run_folder(config)
    loss = build(config.model.first_stage_config.lossconfig)
    if isinstance(loss, torch.nn.Identity):
        target = "latentsmith.training.losses.ReconstructionLoss"
        raise BadInput(
            f"first_stage_config.lossconfig is torch.nn.Identity, which trains nothing; set _target_: {target}"
        )
    opened = open_images(config)
    plan = setup.training_plan(config, opened.count)
    with meta_weights() if dry_run else nullcontext():
        vae: Any = build_network(config, "vae")
    epochs = plan.max_steps * plan.global_batch / opened.count
    head = header({"vae": vae}, ("vae",))
    head.append(f"{opened.count:,} images; {plan.max_steps:,} steps of {plan.global_batch}: {epochs:.1f} epochs")
    head += repeated_in_a_step(opened.count, plan.global_batch)
    if dry_run:
        print(*head, sep="\n", flush=True)
        check_folder(config, TRAINED)
        return folder
    head += setup.rounded_steps(config, {"vae": vae}, ("vae",))
    fabric = setup.launch(config)
    with locked_run_folder(config, fabric):
        resume = resume_together(config, fabric, TRAINED)
        content = content_of({"vae": vae}, TRAINED, None, opened, plan.global_batch)
        on_first_process(fabric, lambda: open_run_folder(config, resume, TRAINED, content, {}, None))
        if fabric.is_global_zero:
            print(*head, sep="\n", flush=True)
        _run(config, fabric, VaeObjective(vae, loss), opened, plan, resume, head)
    return folder


def _run(
    config: Config,
    fabric: Fabric,
    objective: VaeObjective,
    opened: TrainingSet,
    plan: Plan,
    resume: Resume | None,
    head: list[str],
) -> None:
    vae, seed, folder = objective.networks["vae"], config.model.seed, run_folder(config)
    if setup.on_cpu(config):
        optimize_for_cpu(vae)
    if config.model.channels_last:
        vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    samples = RunSamples(
        read=reader(opened, seed, None),
        draw=PosteriorDraws(seed, opened.latent_shape),
        length=opened.count,
        seed=seed,
        order=opened.order,
    )
    metadata = {"latentsmith.first_stage_config": json.dumps(network_arguments(config.model.first_stage_config))}
    setup.run(
        config, fabric, objective, samples, plan, folder, resume, [setup.metrics_of(config, folder)],
        metadata=metadata, head=head,
    )  # fmt: skip
