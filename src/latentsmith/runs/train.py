"""`latentsmith train`: the U-Net, on pictures or on their cache."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from latentsmith.diffusion import canonical_prediction_type
from latentsmith.inference import Pipeline
from latentsmith.inference.tokenizer import Tokenizer
from latentsmith.models import AutoencoderKL
from latentsmith.training.diffusion_module import DiffusionTraining, EmptyPrompt, Objective
from latentsmith.training.draws import DiffusionDraws, generator_at
from latentsmith.training.fit import Checkpointing, Data, fit
from latentsmith.training.sample_log import SampleLog
from latentsmith.training.samples import RunSamples

from . import pieces, sets
from .folder import CHECKPOINTS, checkpoint_to_resume, open_run_folder, run_folder
from .networks import build_networks, build_tokenizer, is_encoded, save_frozen, spec_of_run

MEASURED_SAMPLES = 1024  # whose latents' deviation gives scale_factor: measured


def train(config: DictConfig, *, dry_run: bool = False) -> Path:
    """Train as the config says, from its newest checkpoint if there is one; returns the run folder.

    dry_run: check everything that training would, print what would be trained, and stop.
    """
    model, processes = config.model, pieces.process_count(config)
    networks = build_networks(config)
    words = build_tokenizer(config) if "text_encoder" in networks else None
    samples = sets.open_set(config, networks, words)
    batch = pieces.global_batch(config, processes)
    max_steps = pieces.step_limit(config, len(samples.shards), batch)
    optimisation = pieces.optimisation(config, processes, max_steps)
    trained = ("unet", "text_encoder") if model.cond_stage_trainable else ("unet",)
    print_header(networks, trained, samples, max_steps, batch)
    if dry_run:
        return run_folder(config)
    raw_captions = not is_encoded(model.cond_stage_key)
    read = sets.reader(samples, model.seed, words if raw_captions else None)
    scale_factor = measured_scale(read, samples, networks, model.seed) if model.scale_factor == "measured" else None
    objective = Objective(
        canonical_prediction_type(model.parameterization),
        model.loss_type,
        model.min_snr_gamma,
        scale_factor or model.scale_factor,
    )
    module = DiffusionTraining(
        arranged(networks, model.channels_last, model.inductor),
        trained,
        optimisation,
        objective,
        empty_prompt(samples, words, raw_captions),
    )
    ema = config.exp_manager.ema
    if ema.enable:
        module.keep_averages(ema.decay, every_n_steps=ema.every_n_steps, cpu_offload=ema.cpu_offload)
    folder = open_run_folder(config)
    if model.save_frozen:
        save_frozen(folder, networks, trained, words)
    spec = spec_of_run(config, objective.scale_factor, samples.latent_shape[-1])
    draws = DiffusionDraws(
        model.seed,
        samples.latent_shape,
        pieces.noise_schedule(config),
        model.caption_dropout_rate,
        model.text_embedding_dropout_rate,
    )
    params, wanted = config.exp_manager.checkpoint_callback_params, config.exp_manager.sample_images
    callbacks = []
    if wanted.every_n_train_steps and {"vae", "text_encoder"} <= networks.keys() and words:
        pipeline = Pipeline(networks["unet"], networks["vae"], networks["text_encoder"], words, spec)  # type: ignore[arg-type]
        callbacks.append(SampleLog(pipeline, folder / "samples", wanted.every_n_train_steps, **sampling(wanted)))
    fit(
        module,
        Data(RunSamples(read, draws, len(samples.shards), model.seed), model.micro_batch_size, model.data.num_workers),
        max_steps,
        folder,
        Checkpointing(
            folder / CHECKPOINTS,
            params.every_n_train_steps,
            params.save_top_k,
            {"latentsmith.spec": spec.to_json()},
            checkpoint_to_resume(config, folder),
        ),
        log_every_n_steps=config.trainer.log_every_n_steps,
        tensorboard=config.exp_manager.create_tensorboard_logger,
        progress_bar=config.trainer.enable_progress_bar,
        callbacks=callbacks,
        **pieces.trainer_options(config, processes),
    )
    return folder


def arranged(networks: dict[str, nn.Module], channels_last: bool, inductor: bool) -> dict[str, nn.Module]:
    """The same networks, laid out and compiled as model.channels_last and model.inductor say."""
    for name in ("unet", "vae"):
        if channels_last and name in networks:
            networks[name].to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if inductor:
        networks["unet"].compile_blocks()  # type: ignore[operator]
    return networks


def empty_prompt(samples: sets.TrainingSet, words: Tokenizer | None, raw_captions: bool) -> EmptyPrompt:
    """The empty prompt as this run's batches would hold it."""
    if raw_captions:
        assert words is not None
        return EmptyPrompt(token_ids=words([""]))
    assert samples.cache is not None and samples.cache.empty_prompt is not None
    return EmptyPrompt(embedding=torch.from_numpy(samples.cache.empty_prompt.copy()).float())


def sampling(wanted: DictConfig) -> dict[str, Any]:
    """The sample pictures' own keys, in the words of the pipeline."""
    return dict(
        prompts=list(wanted.prompts),
        negative_prompts=wanted.negative_prompt,
        steps=wanted.steps,
        guidance_scale=wanted.guidance_scale,
        sampler=wanted.sampler,
        seed=wanted.seed,
    )


@torch.no_grad()
def measured_scale(read: sets.Reader, samples: sets.TrainingSet, networks: dict[str, nn.Module], seed: int) -> float:
    """1 / the standard deviation of the latents of the first samples of the set: they then have unit variance."""
    vae: Any = networks.get("vae")
    drawn = []
    for index in range(min(MEASURED_SAMPLES, len(samples.shards))):
        record = read(index, index)
        moments = record["moments"].float()[None] if "moments" in record else vae.encode(record["images"][None])
        noise = torch.randn(1, *samples.latent_shape, generator=generator_at(seed, index))
        drawn.append(AutoencoderKL.sample(moments, noise))
    deviation = torch.cat(drawn).double().std().item()
    return float(f"{1 / deviation:.5g}")


def print_header(
    networks: dict[str, nn.Module], trained: tuple[str, ...], samples: sets.TrainingSet, steps: int, batch: int
) -> None:
    """What will be trained, on what, for how long."""
    for name, network in networks.items():
        size = sum(parameter.numel() for parameter in network.parameters())
        print(f"{name}: {size:,} parameters, {'trained' if name in trained else 'frozen'}")
    print(
        f"{sets.summary(samples)}; {steps:,} steps of {batch}: {steps * batch / len(samples.shards):.1f} epochs",
        flush=True,
    )
