"""`latentsmith train`: the U-Net, on pictures or on their cache."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentsmith.architectures import COMPONENTS
from latentsmith.checkpoints import ModelSpec
from latentsmith.checkpoints.from_config import build_networks, build_tokenizer, is_encoded, with_padding
from latentsmith.config.network_arguments import network_arguments
from latentsmith.config.typed import Config, SampleImagesConfig, replaced
from latentsmith.cpu import optimize_for_cpu
from latentsmith.data import dataset
from latentsmith.data.loader import Reader, RunSamples
from latentsmith.diffusion import canonical_prediction_type
from latentsmith.files.errors import BadInput
from latentsmith.inference import Pipeline, SamplingOptions
from latentsmith.models import AutoencoderKL
from latentsmith.text.tokenizer import Tokenizer

from . import setup
from .diffusion_module import DiffusionTraining, EmptyPrompt, Objective
from .dry_run import dry_run as what_would_be_trained
from .dry_run import header, memory
from .fitting import fit_as_configured
from .random_draws import VALIDATION, DiffusionDraws, PosteriorDraws, ValidationDraws
from .run_folder import open_run_folder, run_folder, save_frozen, scale_so_far
from .sample_images import SampleLog
from .validation import HeldOut, Validation

MEASURED_SAMPLES = 1024  # whose latents' deviation gives scale_factor: measured


def train(config: Config, *, dry_run: bool = False) -> Path:
    """Train as the config says, from its newest checkpoint if there is one; returns the run folder.

    dry_run: check everything that training would, print what would be trained, and stop.
    """
    setup.check_device(config)
    if dry_run:
        print("\n".join(what_would_be_trained(config, trained_parts(config))))
        return run_folder(config)
    config = with_padding(config)
    ready = prepared(config)
    head = head_of(config, ready)
    print(*head, sep="\n", flush=True)
    folder = run_folder(config)
    pictures = sample_log(config, ready.networks, ready.words, ready.spec, folder)
    open_run_folder(config)
    if config.model.save_frozen:
        save_frozen(folder, ready.networks, ready.module.trained, ready.words)
    fit_as_configured(
        config,
        ready.module,
        ready.samples,
        ready.max_steps,
        folder,
        metadata={"latentsmith.spec": ready.spec.to_json()},
        head=head,
        callbacks=[*validation(config, ready, folder), *pictures],
    )
    return folder


def head_of(config: Config, ready: "Ready") -> list[str]:
    """What is trained, on what, at what cost, in lines."""
    batch, trained = ready.module.optimisation.global_batch, ready.module.trained
    words = None if is_encoded(config.model.cond_stage_key) else ready.words
    lines = [*header(ready.networks, trained), *dataset.preflight(ready.set, words, ready.max_steps, batch)]
    if ready.held_out is not None:
        lines.append(f"{ready.held_out.draw.count:,} samples held out for validation")
    return [*lines, memory(config, ready.networks, trained)]


@dataclass(frozen=True)
class Ready:
    """All that a training is made of, before anything is written. words: None where captions are cached."""

    networks: dict[str, nn.Module]
    words: Tokenizer | None
    set: dataset.TrainingSet
    held_out: HeldOut | None
    samples: RunSamples
    module: DiffusionTraining
    spec: ModelSpec
    max_steps: int


def trained_parts(config: Config) -> tuple[str, ...]:
    return ("unet", "text_encoder") if config.model.cond_stage_trainable else ("unet",)


def prepared(config: Config) -> Ready:
    """The networks, samples and objective of a config. Raises BadInput for what does not fit together."""
    model, batch = config.model, setup.global_batch(config, setup.process_count(config))
    config = with_padding(config)
    model = config.model
    networks = build_networks(config)
    for network in networks.values() if setup.on_cpu(config) else ():
        optimize_for_cpu(network)
    words = build_tokenizer(config) if "text_encoder" in networks else None
    samples = dataset.open_dataset(config, networks, words, global_batch=batch)
    if samples.pad_to:
        config = replaced(config, "model.cond_stage_config.pad_to", samples.pad_to)
        model = config.model
    max_steps = setup.step_limit(config, samples.count, batch)
    optimisation = setup.optimisation(config, batch, max_steps)
    raw_captions = not is_encoded(model.cond_stage_key)
    read = dataset.reader(samples, model.seed, words if raw_captions else None)
    begun = scale_so_far(config, run_folder(config)) if model.scale_factor == "measured" else None
    goal = objective(config, measured_scale(read, samples, networks, model.seed, begun))
    if "vae" in networks:
        networks["vae"].scale_factor = goal.scale_factor  # type: ignore[assignment]
    spec = spec_of_run(config, goal.scale_factor, samples.latent_shape[-1])
    empty = empty_prompt(samples, words, raw_captions)
    arranged(networks, model.channels_last, model.inductor, model.inductor_cudagraphs)
    module = DiffusionTraining(networks, trained_parts(config), optimisation, goal, empty)
    run = RunSamples(read, draws(config, samples), samples.count, model.seed, samples.order)
    held = held_out(config, networks, words, samples)
    return Ready(networks, words, samples, held, run, module, spec, max_steps)


def held_out(
    config: Config, networks: dict[str, nn.Module], words: Tokenizer | None, training: dataset.TrainingSet
) -> HeldOut | None:
    """What model.data.validation and trainer.limit_val_batches say to validate on; BadInput if it does not fit."""
    model, limit = config.model, config.trainer.limit_val_batches
    if not model.data.validation.dataset_path or not limit:
        return None
    samples = dataset.open_dataset(config, networks, words, "validation")
    if samples.latent_shape != training.latent_shape:
        raise BadInput(
            f"{model.data.validation.dataset_path}: latents of {samples.latent_shape}, but training has "
            f"{training.latent_shape}; give model.data.validation.augmentations of the same size"
        )
    length = len(samples.shards)
    wanted = (
        limit * length if isinstance(limit, float) else limit * model.micro_batch_size * setup.process_count(config)
    )
    count = max(1, min(length, int(wanted)))
    read = dataset.reader(samples, VALIDATION, words if not is_encoded(model.cond_stage_key) else None)
    draw = ValidationDraws(samples.latent_shape, setup.noise_schedule(config), count)
    return HeldOut(read, draw, length, 1 if samples.sizes else model.micro_batch_size)


def validation(config: Config, ready: Ready, folder: Path) -> list[Validation]:
    if ready.held_out is None:
        return []
    every = config.trainer.val_check_interval
    if isinstance(every, float):
        every = every * ready.set.count / ready.module.optimisation.global_batch
    return [Validation(ready.held_out, folder, max(1, round(every)), ready.max_steps)]


def objective(config: Config, measured: Callable[[], float]) -> Objective:
    """What the U-Net learns, by the config; `measured` is asked for the scale of the latents if it is not given."""
    model = config.model
    scale = measured() if model.scale_factor == "measured" else model.scale_factor
    prediction = canonical_prediction_type(model.parameterization)
    return Objective(prediction, model.loss_type, model.min_snr_gamma, scale, model.timesteps)


def draws(config: Config, samples: dataset.TrainingSet) -> DiffusionDraws:
    model = config.model
    return DiffusionDraws(
        model.seed,
        samples.latent_shape,
        setup.noise_schedule(config),
        model.caption_dropout_rate,
        model.text_embedding_dropout_rate,
        model.offset_noise,
        model.input_perturbation,
    )


def sample_log(
    config: Config, networks: dict[str, nn.Module], words: Tokenizer | None, spec: ModelSpec, folder: Path
) -> list[SampleLog]:
    """Pictures while training, if the config asks for them and the run has what draws them; a line if it has not."""
    wanted = config.exp_manager.sample_images
    if not (wanted.every_n_train_steps and wanted.prompts):
        return []
    if missing := [part for part in COMPONENTS if part not in networks]:
        key = f"model.{COMPONENTS[missing[0]].config_key}.from_pretrained"
        print(f"no sample pictures: the run has no {missing[0]}; set {key}")
        return []
    pipeline = Pipeline(tokenizer=words, spec=spec, **networks)  # type: ignore[arg-type]
    pipeline.completed(SamplingOptions(num_inference_steps=wanted.steps, sampler=wanted.sampler))
    return [SampleLog(pipeline, folder / "samples", wanted.every_n_train_steps, **sampling(wanted))]


def arranged(
    networks: dict[str, nn.Module], channels_last: bool, inductor: bool, cuda_graphs: bool = False
) -> dict[str, nn.Module]:
    """The same networks, laid out and compiled as model.channels_last, inductor and inductor_cudagraphs say."""
    for name in ("unet", "vae"):
        if channels_last and name in networks:
            networks[name].to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if inductor:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        if Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "torchinductor_")).name.startswith("torchinductor_"):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "latentsmith" / "inductor")  # not torch's own in /tmp
        networks["unet"].compile_blocks(cuda_graphs=cuda_graphs)  # type: ignore[operator]
    return networks


def empty_prompt(samples: dataset.TrainingSet, words: Tokenizer | None, raw_captions: bool) -> EmptyPrompt:
    """The empty prompt as this run's batches would hold it."""
    if raw_captions:
        assert words is not None
        return EmptyPrompt(token_ids=words([""]))
    if isinstance(samples.shards, dataset.SyntheticSet):
        return EmptyPrompt(embedding=torch.zeros(samples.shards.text_shape))
    assert samples.cache is not None
    if samples.cache.empty_prompt is None:  # of NeMo's, where nothing asks for it
        return EmptyPrompt()
    return EmptyPrompt(embedding=torch.from_numpy(samples.cache.empty_prompt.copy()).float())


def sampling(wanted: SampleImagesConfig) -> dict[str, Any]:
    """The sample pictures' own keys, in the words of the pipeline."""
    return dict(
        prompts=list(wanted.prompts),
        negative_prompt=wanted.negative_prompt,
        num_inference_steps=wanted.steps,
        guidance_scale=wanted.guidance_scale,
        sampler=wanted.sampler,
        averaged=wanted.weights == "ema",
        seed=wanted.seed,
    )


def measured_scale(
    read: Reader,
    samples: dataset.TrainingSet,
    networks: dict[str, nn.Module],
    seed: int,
    begun: float | None,
) -> Callable[[], float]:
    """Measures 1 / the standard deviation of the latents of the run's samples: it gives them unit variance.

    begun: the scale of a run that goes on, which is not measured again.
    """
    vae: Any = networks.get("vae")

    @torch.no_grad()
    def measure() -> float:
        if begun is not None:
            return begun
        drawn = []
        apart = max(1, samples.count // MEASURED_SAMPLES)  # steps of one size follow one another
        for position in range(0, apart * min(MEASURED_SAMPLES, samples.count), apart):
            one = read([samples.index(position, seed)], [position])
            if "vae_latents" in one:
                drawn.append(one["vae_latents"].float().flatten())
                continue
            moments = one["moments"].float() if "moments" in one else vae.encode(one["images"])
            noise = PosteriorDraws(seed, one.get("latent_shape", samples.latent_shape))([position])["posterior_noise"]
            drawn.append(AutoencoderKL.sample(moments, noise).flatten())
        return float(f"{1 / torch.cat(drawn).double().std().item():.5g}")

    return measure


def spec_of_run(config: Config, scale_factor: float, latent_size: int) -> ModelSpec:
    """Return what the weights of this run do not show, kept in their metadata."""
    model = config.model
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
