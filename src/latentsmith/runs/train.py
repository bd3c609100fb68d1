"""`latentsmith train`: the U-Net, on pictures or on their cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from latentsmith.checkpoints import ModelSpec
from latentsmith.diffusion import canonical_prediction_type
from latentsmith.inference import Pipeline
from latentsmith.inference.options import SamplingOptions
from latentsmith.inference.tokenizer import Tokenizer
from latentsmith.models import AutoencoderKL
from latentsmith.training.diffusion_module import DiffusionTraining, EmptyPrompt, Objective
from latentsmith.training.draws import DiffusionDraws, generator_at
from latentsmith.training.sample_log import SampleLog
from latentsmith.training.samples import RunSamples

from . import pieces, sets
from .dry_run import dry_run as what_would_be_trained
from .dry_run import header
from .fitting import fit_as_configured
from .folder import open_run_folder, run_folder
from .networks import PARTS, build_networks, build_tokenizer, is_encoded, save_frozen, settle_padding, spec_of_run

MEASURED_SAMPLES = 1024  # whose latents' deviation gives scale_factor: measured


def train(config: DictConfig, *, dry_run: bool = False) -> Path:
    """Train as the config says, from its newest checkpoint if there is one; returns the run folder.

    dry_run: check everything that training would, print what would be trained, and stop.
    """
    pieces.check_device(config)
    trained = ("unet", "text_encoder") if config.model.cond_stage_trainable else ("unet",)
    if dry_run:
        print("\n".join(what_would_be_trained(config, trained)))
        return run_folder(config)
    model, batch = config.model, pieces.global_batch(config, pieces.process_count(config))
    settle_padding(config)
    networks = build_networks(config)
    words = build_tokenizer(config) if "text_encoder" in networks else None
    samples = sets.open_set(config, networks, words)
    max_steps = pieces.step_limit(config, len(samples.shards), batch)
    optimisation = pieces.optimisation(config, batch, max_steps)
    epochs = max_steps * batch / len(samples.shards)
    print(*header(networks, trained), sep="\n")
    print(f"{sets.summary(samples)}; {max_steps:,} steps of {batch}: {epochs:.1f} epochs", flush=True)
    raw_captions = not is_encoded(model.cond_stage_key)
    read = sets.reader(samples, model.seed, words if raw_captions else None)
    goal = objective(config, measured_scale(read, samples, networks, model.seed))
    folder = open_run_folder(config)
    if model.save_frozen:
        save_frozen(folder, networks, trained, words)
    spec = spec_of_run(config, goal.scale_factor, samples.latent_shape[-1])
    empty = empty_prompt(samples, words, raw_captions)
    fit_as_configured(
        config,
        DiffusionTraining(arranged(networks, model.channels_last, model.inductor), trained, optimisation, goal, empty),
        RunSamples(read, draws(config, samples), len(samples.shards), model.seed),
        max_steps,
        folder,
        metadata={"latentsmith.spec": spec.to_json()},
        callbacks=sample_log(config, networks, words, spec, folder),
    )
    return folder


def objective(config: DictConfig, measured: Callable[[], float]) -> Objective:
    """What the U-Net learns, by the config; `measured` is asked for the scale of the latents if it is not given."""
    model = config.model
    scale = measured() if model.scale_factor == "measured" else model.scale_factor
    prediction = canonical_prediction_type(model.parameterization)
    return Objective(prediction, model.loss_type, model.min_snr_gamma, scale, model.timesteps)


def draws(config: DictConfig, samples: sets.TrainingSet) -> DiffusionDraws:
    model = config.model
    return DiffusionDraws(
        model.seed,
        samples.latent_shape,
        pieces.noise_schedule(config),
        model.caption_dropout_rate,
        model.text_embedding_dropout_rate,
        model.offset_noise,
        model.input_perturbation,
    )


def sample_log(
    config: DictConfig, networks: dict[str, nn.Module], words: Tokenizer | None, spec: ModelSpec, folder: Path
) -> list[SampleLog]:
    """Pictures while training, if the config asks for them and the run has what draws them; a line if it has not."""
    wanted = config.exp_manager.sample_images
    if not (wanted.every_n_train_steps and wanted.prompts):
        return []
    if missing := [part for part in PARTS if part not in networks]:
        print(f"no sample pictures: the run has no {missing[0]}; set model.{PARTS[missing[0]]}.from_pretrained")
        return []
    pipeline = Pipeline(tokenizer=words, spec=spec, **networks)  # type: ignore[arg-type]
    size = pipeline.image_size
    pipeline.check(wanted.prompts, SamplingOptions(size, size, wanted.steps, wanted.guidance_scale, wanted.sampler))
    return [SampleLog(pipeline, folder / "samples", wanted.every_n_train_steps, **sampling(wanted))]


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
    assert samples.cache is not None
    if samples.cache.empty_prompt is None:  # of NeMo's, where nothing asks for it
        return EmptyPrompt()
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


def measured_scale(
    read: sets.Reader, samples: sets.TrainingSet, networks: dict[str, nn.Module], seed: int
) -> Callable[[], float]:
    """Measures 1 / the standard deviation of the latents of the set's first samples: it gives them unit variance."""
    vae: Any = networks.get("vae")

    @torch.no_grad()
    def measure() -> float:
        drawn = []
        for index in range(min(MEASURED_SAMPLES, len(samples.shards))):
            record = read(index, index)
            moments = record["moments"].float()[None] if "moments" in record else vae.encode(record["images"][None])
            noise = torch.randn(1, *samples.latent_shape, generator=generator_at(seed, index))
            drawn.append(AutoencoderKL.sample(moments, noise))
        return float(f"{1 / torch.cat(drawn).double().std().item():.5g}")

    return measure
