"""The diffusion loss against the same arithmetic in float64, and what is trained and what is not."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from latentsmith.diffusion import NoiseSchedule
from latentsmith.training.metrics_log import read_rows
from latentsmith.training.objectives import DiffusionLoss, in_bands
from latentsmith.training.random_draws import PosteriorDraws
from latentsmith.training.train import measured_scale

POSITIONS = range(6)


def batch_of(toy_run):
    samples = toy_run.samples()
    return samples[POSITIONS]


def as64(tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def convolved(images: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A 3x3 convolution of zero-padded images (batch, channels, height, width), by its definition."""
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.einsum("bcyxij,ocij->boyx", windows, weight) + bias[:, None, None]


def expected_loss(objective, batch, prediction_type, loss_type, gamma, schedule) -> float:
    """The loss of a batch of cached samples, from Ho et al. 2020, Salimans & Ho 2022 and Hang et al. 2023."""
    mean, logvar = np.split(as64(batch["moments"]), 2, axis=1)
    latents = 0.5 * (mean + np.exp(0.5 * logvar) * as64(batch["posterior_noise"]))
    kept = as64(schedule.alphas_cumprod)[batch["timesteps"].numpy()][:, None, None, None]
    noise = as64(batch["noise"])
    noisy = np.sqrt(kept) * latents + np.sqrt(1 - kept) * noise
    unet = objective.networks["unet"]
    text = as64(batch["context"]).sum(axis=1) @ as64(unet.text.weight).T + as64(unet.text.bias)
    output = convolved(noisy, as64(unet.conv.weight), as64(unet.conv.bias)) + text[:, :, None, None]
    output += batch["timesteps"].numpy()[:, None, None, None] / 1000
    targets = {"epsilon": noise, "v_prediction": np.sqrt(kept) * noise - np.sqrt(1 - kept) * latents, "sample": latents}
    difference = np.abs(output - targets[prediction_type])
    huber = np.where(difference < 1, 0.5 * difference**2, difference - 0.5)
    losses = {"l2": difference**2, "l1": difference, "huber": huber}[loss_type].mean(axis=(1, 2, 3))
    if gamma:
        snr = (kept / (1 - kept)).ravel()
        divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": np.ones_like(snr)}[prediction_type]
        losses *= np.minimum(snr, gamma) / divisor
    return losses.mean()


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_loss_equals_float64(toy, prediction_type, loss_type, gamma):
    run = toy(loss=DiffusionLoss(prediction_type, loss_type, gamma, scale_factor=0.5))
    objective, batch = run.objective(), batch_of(run)
    loss, metrics = objective(batch)
    expected = expected_loss(objective, batch, prediction_type, loss_type, gamma, run.schedule)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert metrics["loss"] is loss


def test_zero_terminal_snr_has_a_finite_loss(toy):
    schedule = NoiseSchedule.from_config(timesteps=2).zero_terminal_snr()
    run = toy(loss=DiffusionLoss("v_prediction", min_snr_gamma=5.0), schedule=schedule)
    assert run.objective()(batch_of(run))[0].isfinite()


def test_images_are_encoded_and_sampled_with_their_own_noise(toy):
    run = toy(cached=False)
    objective, batch = run.objective().eval(), batch_of(run)
    mean, logvar = objective.networks["vae"].conv(batch["images"]).chunk(2, dim=1)
    expected = 0.5 * (mean + (0.5 * logvar).exp() * batch["posterior_noise"])
    latents = objective.latents(batch)
    torch.testing.assert_close(latents, expected)
    assert not latents.requires_grad


def test_caption_dropout_gives_the_empty_prompt(toy):
    for cached in (True, False):
        run = toy(cached=cached, caption_dropout_rate=0.5)
        objective, batch = run.objective(), batch_of(run)
        dropped, table = batch["empty_caption"], objective.networks["text_encoder"].table.weight
        assert 0 < dropped.sum() < len(dropped) and not batch["zero_embedding"].any()
        context = objective.context(batch)
        empty = torch.full_like(context[0], 0.25) if cached else table[0].expand_as(context[0])
        own = batch["context"].float() if cached else table[batch["token_ids"]]
        for row, is_dropped in enumerate(dropped):
            assert torch.equal(context[row], empty if is_dropped else own[row])


def test_embedding_dropout_gives_zeros(toy):
    for cached in (True, False):
        run = toy(cached=cached, text_embedding_dropout_rate=0.5)
        objective, batch = run.objective(), batch_of(run)
        dropped = batch["zero_embedding"]
        assert 0 < dropped.sum() < len(dropped) and not batch["empty_caption"].any()
        norms = objective.context(batch).abs().sum(dim=(1, 2))
        assert ((norms == 0) == dropped).all()


def test_a_cache_without_an_empty_prompt_needs_none(toy):
    run = toy()
    objective, batch = run.objective(), batch_of(run)
    objective.empty_embedding = None
    assert torch.equal(objective.context(batch), batch["context"].float())


def test_frozen_networks_stay_as_they_are(toy):
    run = toy(cached=False)
    objective = run.objective()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    training = run.train(objective, 3, every=3)
    for name, value in objective.state_dict().items():
        assert torch.equal(before[name], value) != name.startswith("networks.unet"), name
    assert all(p.grad is None for part in ("vae", "text_encoder") for p in objective.networks[part].parameters())
    state = training.state.optimizer.state_dict()["state"]
    assert len(state) == len(list(objective.networks["unet"].parameters()))
    assert not objective.networks["vae"].training and not objective.networks["vae"].dropout.training


def test_a_trained_text_encoder_moves(toy):
    run = toy(cached=False, trained=("unet", "text_encoder"), decay=0.5)
    objective = run.objective()
    before = objective.networks["text_encoder"].table.weight.detach().clone()
    run.train(objective, 2, every=2)
    assert not torch.equal(before, objective.networks["text_encoder"].table.weight)
    files = {path.name for path in (run.folder / "checkpoints" / "step-00000002").rglob("*.safetensors")}
    assert files == {"unet.safetensors", "text_encoder.safetensors", "optimizer.safetensors"}
    assert (run.folder / "checkpoints" / "step-00000002" / "ema" / "text_encoder.safetensors").is_file()


def test_gradients_are_clipped_to_their_global_norm(toy):
    """SGD with lr 1 moves by the gradient itself, so the step's length shows what was clipped."""
    lengths = []
    for limit in (None, 0.01):
        run = toy(options={"lr": 1.0}, optimizer="SGD")
        objective = run.objective()
        before = torch.cat([p.detach().flatten().clone() for p in objective.networks["unet"].parameters()])
        run.train(objective, 1, clip=limit)
        after = torch.cat([p.detach().flatten() for p in objective.networks["unet"].parameters()])
        lengths.append((after - before).norm().item())
        (row,) = read_rows(run.folder / "metrics.csv")
        assert row["grad_norm"] > 0.1  # what is recorded is the norm before clipping
    assert lengths[0] > 0.1 and lengths[1] == pytest.approx(0.01, rel=1e-3)


def test_loss_in_quarters_of_the_timesteps():
    losses, timesteps = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 249, 250, 999])
    bands = in_bands(losses, timesteps, 1000)
    assert {name: value.item() for name, value in bands.items() if value.isfinite()} == {
        "loss_t0": 1.5, "loss_t250": 4.0, "loss_t750": 8.0,
    }  # fmt: skip
    assert bands["loss_t500"].isnan()


def test_offset_noise_and_input_perturbation(toy):
    """The target is the noise with its offset; the perturbation is in the input alone; all else is drawn as without."""
    plain = toy()
    draws = [
        replace(plain.draws, **options)([7]) for options in ({}, {"offset_noise": 0.5}, {"input_perturbation": 0.1})
    ]
    shift = draws[1]["noise"] - draws[0]["noise"]
    assert (shift.amax((2, 3)) - shift.amin((2, 3))).max() < 1e-6 and shift.std() > 0.05
    assert torch.equal(draws[2]["noise"], draws[0]["noise"]) and "input_noise" not in draws[1]
    assert 0.05 < (draws[2]["input_noise"] - draws[2]["noise"]).std() < 0.2
    for name in ("timesteps", "posterior_noise", "empty_caption"):
        assert all(torch.equal(drawn[name], draws[0][name]) for drawn in draws)
    objective, batch = plain.objective(), batch_of(plain)
    perturbed = {**batch, "input_noise": batch["noise"] + 0.3}
    names = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
    scale, noise_scale = (batch[name][:, None, None, None] for name in names)
    noisy = scale * objective.latents(batch) + noise_scale * perturbed["input_noise"]
    output = objective.networks["unet"](noisy, batch["timesteps"], objective.context(batch))
    torch.testing.assert_close(objective(perturbed)[0], (output - batch["noise"]).square().mean())


@pytest.mark.parametrize("batch", [1, 4])
def test_the_measured_scale_is_that_of_an_encoder_without_dropout(toy, batch):
    """In batches, once, whatever mode the VAE is in: 1 / the deviation of the latents, in float64."""
    networks, calls = toy(cached=False).objective().train().networks, []
    images = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    opened = SimpleNamespace(count=10, sizes=[], latent_shape=(4, 4, 4), index=lambda position, seed: position)

    def read(indices, positions):
        calls.append(len(indices))
        return {"images": images[list(indices)]}

    found = measured_scale(read, opened, networks, SimpleNamespace(seed=3, micro_batch_size=batch), None)
    with torch.no_grad():
        mean, logvar = np.split(as64(networks["vae"].eval().encode(images)), 2, axis=1)
    noise = as64(PosteriorDraws(3, (4, 4, 4))(range(10))["posterior_noise"])
    assert found == pytest.approx(1 / (mean + np.exp(0.5 * logvar) * noise).std(ddof=1), rel=1e-4)
    assert calls == ([1] * 10 if batch == 1 else [4, 4, 2])
