"""`latentsmith train`: the U-Net, on images or on their cache."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn

from latentsmith.architectures import COMPONENTS
from latentsmith.checkpoints import ModelSpec
from latentsmith.checkpoints.from_config import (
    build_networks,
    build_tokenizer,
    check_objective,
    is_encoded,
    with_padding,
)
from latentsmith.config import Config, replaced, require_config
from latentsmith.config.model_options import ModelConfig
from latentsmith.config.network_arguments import network_arguments
from latentsmith.cpu import optimize_for_cpu
from latentsmith.data import dataset
from latentsmith.data.loader import Reader, RunSamples
from latentsmith.data.preflight import preflight
from latentsmith.data.reader import reader
from latentsmith.data.synthetic import SyntheticSet
from latentsmith.diffusion import canonical_prediction_type
from latentsmith.files.cache_folder import user_cache
from latentsmith.files.errors import BadInput
from latentsmith.inference import Pipeline, SamplingOptions
from latentsmith.progress import progress
from latentsmith.text.tokenizer import Tokenizer

from . import setup
from .adapters import add_adapters, export_hooks
from .dry_run import dry_run as describe
from .dry_run import header, memory
from .hooks import Hook
from .hooks.metrics import Metrics
from .hooks.samples import SampleImages
from .hooks.validation import VALIDATION_SEED, HeldOut, Validation, ValidationDraws
from .identity import content_of
from .loop import Plan
from .objectives import DiffusionLoss, DiffusionObjective, EmptyPrompt, vae_latents
from .random_draws import DiffusionDraws, PosteriorDraws
from .run_folder import Resume, locked_run_folder, open_run_folder, resume_together, run_folder
from .sharding import on_first_process
from .textual_inversion import ExportEmbedding, add_trained_token

MEASURED_SAMPLES = 1024  # whose latents' deviation gives scale_factor: measured


def train(config: Config, *, dry_run: bool = False) -> Path:
    """Train as the config says, from its newest checkpoint if there is one; return the run folder.

    dry_run: check everything that training would, print what would be trained, and stop.
    """
    require_config(config, "train")
    setup.check_device(config)
    folder = run_folder(config)
    if dry_run:
        print("\n".join(describe(config, trained_networks(config))))
        return folder
    config = with_padding(config)
    fabric = setup.launch(config)
    with locked_run_folder(config, fabric):
        resume = resume_together(config, fabric, trained_networks(config))
        ready = prepared(config, fabric, resume)
        if fabric.is_global_zero:
            print(*ready.head, sep="\n", flush=True)
        log = setup.metrics_of(config, folder)
        hooks = [log, *validation(config, ready, folder, log), *sample_images(config, ready, folder, log)]
        hooks += export_hooks(config, ready.spec, folder, ready.set.count)
        if token := config.model.textual_inversion.token:
            hooks.append(ExportEmbedding(folder, token))
        on_first_process(fabric, lambda: open_folder_of(config, ready, resume))
        metadata = {"latentsmith.spec": ready.spec.to_json()}
        setup.run(
            config, fabric, ready.objective, ready.samples, ready.plan, folder, resume, hooks,
            metadata=metadata, head=ready.head,
        )  # fmt: skip
    return folder


def open_folder_of(config: Config, ready: "Ready", resume: Resume | None) -> None:
    """Write what defines the run into its folder. Raises BadInput, before that, if the folder holds another run."""
    networks, trained = ready.networks, ready.objective.trained
    content = content_of(networks, trained, ready.tokenizer, ready.set, ready.plan.global_batch)
    if config.model.has_frozen_base:  # it stays where it is
        open_run_folder(config, resume, trained, content, {}, None)
        return
    frozen = {name: network for name, network in networks.items() if name not in trained}
    open_run_folder(config, resume, trained, content, frozen, ready.tokenizer)


@dataclass(frozen=True)
class Ready:
    """All that a training is made of, before anything is written.

    tokenizer: None where captions are cached. head: lines that say what is trained, on what, at what cost.
    """

    networks: dict[str, nn.Module]
    tokenizer: Tokenizer | None
    set: dataset.TrainingSet
    held_out: HeldOut | None
    samples: RunSamples
    objective: DiffusionObjective
    spec: ModelSpec
    plan: Plan
    head: list[str]


def trained_networks(config: Config) -> tuple[str, ...]:
    """Return the names of the networks that are trained, whole or by adapters."""
    model = config.model
    if model.has_frozen_base:
        with_token = ("text_encoder",) if model.textual_inversion.token is not None else ()
        return tuple(name for name in COMPONENTS if name in (*model.adapted_networks, *with_token))
    return ("unet", "text_encoder") if config.model.cond_stage_trainable else ("unet",)


def prepared(config: Config, fabric: Fabric | None = None, resume: Resume | None = None) -> Ready:
    """Return the networks, samples and objective of a config. Raises BadInput for what does not fit together.

    fabric: of the run, for what is measured on its device by one process for all. resume: a checkpoint that says
    what was measured.
    """
    check_objective(config)
    config = with_padding(config)
    batch, trained = setup.global_batch(config), trained_networks(config)
    networks = build_networks(config)
    for network in networks.values() if setup.on_cpu(config) else ():
        optimize_for_cpu(network)
    tokenizer = build_tokenizer(config) if "text_encoder" in networks else None
    opened = dataset.open_dataset(config, networks, tokenizer, global_batch=batch)
    if opened.pad_to:
        config = replaced(config, "model.cond_stage_config.pad_to", opened.pad_to)
    check_whole_steps(opened, batch, resume)
    model, plan = config.model, setup.training_plan(config, opened.count)
    for_captions = None if is_encoded(model.cond_stage_key) else tokenizer
    read = reader(opened, model.seed, for_captions)
    scale = model.scale_factor if model.scale_factor != "measured" else resume.scale_factor() if resume else None
    if scale is None:
        scale = measured_scale(read, opened, networks, model, fabric)
    if "vae" in networks:
        networks["vae"].scale_factor = scale  # type: ignore[assignment]
    adapters = [*add_adapters(config, networks), *add_trained_token(config, networks, tokenizer)]
    lay_out(networks, model)
    loss = DiffusionLoss(
        canonical_prediction_type(model.parameterization), model.loss_type, model.min_snr_gamma, scale, model.timesteps
    )
    objective = DiffusionObjective(networks, trained, loss, empty_prompt(opened, for_captions))
    samples = RunSamples(read, draws(model, opened), opened.count, model.seed, opened.order)
    held_out = held_out_samples(config, networks, tokenizer, opened)
    head = [*header(networks, trained), *adapters, *preflight(opened, for_captions, plan.max_steps, batch)]
    if held_out is not None:
        head.append(f"{held_out.draw.count:,} samples held out for validation")
    head += [memory(config, networks, trained), *setup.rounded_steps(config, networks, trained)]
    spec = spec_of_run(model, scale, opened.latent_shape[-1])
    return Ready(networks, tokenizer, opened, held_out, samples, objective, spec, plan, head)


def check_whole_steps(opened: dataset.TrainingSet, batch: int, resume: Resume | None) -> None:
    """Raise BadInput for a resume in the middle of a step, whose images have one size where there are several."""
    if opened.sizes and resume and (done := resume.counters["consumed_samples"]) % batch:
        raise BadInput(
            f"{resume.path}: {done:,} samples are no whole number of steps of {batch}, and the images of a step have "
            "one size; set model.global_batch_size to what it was"
        )


def draws(model: ModelConfig, opened: dataset.TrainingSet) -> DiffusionDraws:
    return DiffusionDraws(
        model.seed,
        opened.latent_shape,
        setup.noise_schedule(model),
        model.caption_dropout_rate,
        model.text_embedding_dropout_rate,
        model.offset_noise,
        model.input_perturbation,
    )


def empty_prompt(opened: dataset.TrainingSet, tokenizer: Tokenizer | None) -> EmptyPrompt:
    """Return the empty prompt as this run's batches hold it. tokenizer: None where captions are cached."""
    if tokenizer is not None:
        return EmptyPrompt(token_ids=tokenizer([""]))
    if isinstance(opened.shards, SyntheticSet):
        return EmptyPrompt(embedding=torch.zeros(opened.shards.text_shape))
    assert opened.cache is not None
    if opened.cache.empty_prompt is None:  # of NeMo's, where nothing asks for it
        return EmptyPrompt()
    return EmptyPrompt(embedding=torch.from_numpy(opened.cache.empty_prompt.copy()).float())


def lay_out(networks: Mapping[str, nn.Module], model: ModelConfig) -> None:
    """Arrange and compile networks as model.channels_last, inductor and inductor_cudagraphs say."""
    for name in ("unet", "vae"):
        if model.channels_last and name in networks:
            networks[name].to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if model.inductor:
        if Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "torchinductor_")).name.startswith("torchinductor_"):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(user_cache("inductor"))  # not torch's own in /tmp
        unet: Any = networks["unet"]
        unet.compile_blocks(cuda_graphs=model.inductor_cudagraphs)


def measured_scale(
    read: Reader,
    opened: dataset.TrainingSet,
    networks: Mapping[str, nn.Module],
    model: ModelConfig,
    fabric: Fabric | None,
) -> float:
    """Return 1 / the standard deviation of the latents of the run's samples, which gives them unit variance.

    The first process measures it, on the run's device, for all.
    """
    device = fabric.device if fabric else torch.device("cpu")

    @torch.no_grad()
    def measure() -> float:
        vae: Any = networks["vae"].to(device).eval() if "vae" in networks else None
        apart, found = max(1, opened.count // MEASURED_SAMPLES), []  # steps of one size follow one another
        positions = range(0, apart * min(MEASURED_SAMPLES, opened.count), apart)
        size = 1 if opened.sizes else model.micro_batch_size
        with progress("measuring the latents' scale", "samples") as bar:
            for at in range(0, len(positions), size):
                batch = list(positions[at : at + size])
                record = read([opened.index(position, model.seed) for position in batch], batch)
                shape = record.get("latent_shape", opened.latent_shape)
                record |= PosteriorDraws(model.seed, shape)(batch)
                record = {name: value.to(device) if torch.is_tensor(value) else value for name, value in record.items()}
                found.append(vae_latents(record, vae).flatten().cpu())
                bar(at + len(batch), len(positions))
        return float(f"{1 / torch.cat(found).double().std().item():.5g}")

    return on_first_process(fabric, measure) if fabric else measure()


# ---- Validation and sample images ----


def held_out_samples(
    config: Config, networks: Mapping[str, nn.Module], tokenizer: Tokenizer | None, training: dataset.TrainingSet
) -> HeldOut | None:
    """Return what model.data.validation and trainer.limit_val_batches say to validate on, if anything."""
    model, limit = config.model, config.trainer.limit_val_batches
    if not model.data.validation.dataset_path or not limit:
        return None
    opened = dataset.open_dataset(config, networks, tokenizer, "validation")
    if opened.latent_shape != training.latent_shape:
        raise BadInput(
            f"{model.data.validation.dataset_path}: latents of {opened.latent_shape}, but training has "
            f"{training.latent_shape}; give model.data.validation.augmentations of the same size"
        )
    length = len(opened.shards)
    processes = setup.process_count(config)
    wanted = limit * length if isinstance(limit, float) else limit * model.micro_batch_size * processes
    count = max(1, min(length, int(wanted)))
    read = reader(opened, VALIDATION_SEED, None if is_encoded(model.cond_stage_key) else tokenizer)
    draw = ValidationDraws(opened.latent_shape, setup.noise_schedule(model), count)
    return HeldOut(read, draw, length, 1 if opened.sizes else model.micro_batch_size)


def validation(config: Config, ready: Ready, folder: Path, log: Metrics) -> list[Hook]:
    if ready.held_out is None:
        return []
    every = config.trainer.val_check_interval
    if isinstance(every, float):
        every = every * ready.set.count / ready.plan.global_batch
    return [Validation(ready.held_out, folder, max(1, round(every)), log)]


def sample_images(config: Config, ready: Ready, folder: Path, log: Metrics) -> list[Hook]:
    """Return the hook that samples images, if the config asks for them and the run has the networks; or say why not."""
    wanted, networks = config.exp_manager.sample_images, ready.networks
    if not (wanted.every_n_train_steps and wanted.prompts):
        return []
    if missing := [part for part in COMPONENTS if part not in networks]:
        key = f"model.{COMPONENTS[missing[0]].config_key}.from_pretrained"
        print(f"no sample images: the run has no {missing[0]}; set {key}")
        return []
    parts: Any = {**networks, "tokenizer": ready.tokenizer}
    pipeline, prompts = Pipeline(spec=ready.spec, **parts), list(wanted.prompts)
    pipeline.completed(SamplingOptions(num_inference_steps=wanted.steps, sampler=wanted.sampler))
    hook = SampleImages(
        pipeline,
        folder / "samples",
        wanted.every_n_train_steps,
        log,
        prompts=prompts,
        averaged=wanted.weights == "ema",
        negative_prompt=wanted.negative_prompt,
        num_inference_steps=wanted.steps,
        guidance_scale=wanted.guidance_scale,
        sampler=wanted.sampler,
        seed=wanted.seed,
    )
    return [hook]


def spec_of_run(model: ModelConfig, scale_factor: float, latent_size: int) -> ModelSpec:
    """Return what the weights of this run do not show, kept in their metadata."""
    zeroed = model.text_embedding_dropout_rate > 0 and not model.caption_dropout_rate
    return ModelSpec(
        network_arguments(model.unet_config),
        network_arguments(model.first_stage_config),
        {key: value for key, value in network_arguments(model.cond_stage_config).items() if key != "freeze"},
        canonical_prediction_type(model.parameterization),
        image_size=latent_size,
        scale_factor=scale_factor,
        linear_start=model.linear_start,
        linear_end=model.linear_end,
        timesteps=model.timesteps,
        beta_schedule=model.beta_schedule,
        cosine_s=model.cosine_s,
        zero_terminal_snr=model.zero_terminal_snr,
        timestep_spacing="trailing" if model.zero_terminal_snr else None,  # the only one that starts from pure noise
        null_text="zero" if zeroed else "empty",
    )
