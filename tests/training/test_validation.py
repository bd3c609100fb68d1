"""The validation loss is a number that only the networks change."""

import pytest
import torch

from latentsmith.data.loader import collated
from latentsmith.training.hooks import evaluating
from latentsmith.training.hooks.validation import HeldOut, Validation, ValidationDraws
from latentsmith.training.metrics_log import read_rows
from latentsmith.training.objectives import DiffusionLoss

from .conftest import SAMPLES, SIZE, record


def held_out(run, count=SAMPLES, batch_size=4):
    def read(index, position):
        return {name: value for name, value in record(index, position).items() if name not in ("images", "token_ids")}

    return HeldOut(collated(read), ValidationDraws(SIZE, run.schedule, count), SAMPLES, batch_size)


def trained(run, steps=4, every=2, objective=None, resume=None, **options):
    held = held_out(run, **options)
    run.train(objective, steps, resume=resume, hooks=[lambda log: Validation(held, run.folder, every, log)])
    return read_rows(run.folder / "validation.csv")


def test_timesteps_are_stratified_and_nothing_is_dropped(toy):
    draw = ValidationDraws(SIZE, toy().schedule, 40)
    drawn = draw(range(40))
    timesteps = drawn["timesteps"].tolist()
    assert sorted(timesteps) == [12 + 25 * stratum for stratum in range(40)] and timesteps != sorted(timesteps)
    assert not drawn["empty_caption"].any() and not drawn["zero_embedding"].any()
    scale, noise_scale = draw.schedule.coefficients(torch.tensor(timesteps))
    assert torch.equal(drawn["sqrt_alphas_cumprod"], scale)
    assert torch.equal(drawn["sqrt_one_minus_alphas_cumprod"], noise_scale)
    many = ValidationDraws(SIZE, draw.schedule, 3000)
    assert set(many(range(3000))["timesteps"].tolist()) == set(range(1000))


def test_it_is_the_mean_error_of_the_prediction(toy):
    """Against the same sum written out, in float64."""
    run = toy(unet_dropout=0.5)
    objective = run.objective()
    rows = trained(run, steps=2, every=2, objective=objective)
    held, errors = held_out(run), []
    objective.eval()
    for number in range(SAMPLES):
        batch = held[[number]]
        with torch.no_grad():
            latents, context = objective.latents(batch), objective.context(batch)
            noisy = batch["sqrt_alphas_cumprod"] * latents + batch["sqrt_one_minus_alphas_cumprod"] * batch["noise"]
            output = objective.networks["unet"](noisy, batch["timesteps"], context)
        errors.append((output.double() - batch["noise"].double()).square().mean())
    assert rows[-1]["val_loss"] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-6)


def test_neither_batches_nor_dropout_nor_the_loss_of_training_enter(toy):
    def loss(batch_size=4, **fields):
        run = toy(options={"lr": 0.0}, **fields)
        return trained(run, steps=1, every=1, batch_size=batch_size)[-1]["val_loss"]

    first = loss()
    assert loss(batch_size=3) == pytest.approx(first, rel=1e-6)
    assert loss(unet_dropout=0.9) == first
    assert loss(caption_dropout_rate=0.9) == first
    assert loss(loss=DiffusionLoss(loss_type="l1", min_snr_gamma=5.0, scale_factor=0.5)) == first


def test_raw_and_averaged(toy):
    run = toy(decay=0.9)
    rows = trained(run, steps=6, every=3)
    assert [row["step"] for row in rows] == [3, 6]
    assert all(row["val_loss"] != row["val_loss_ema"] for row in rows)
    training = run.training(resume=run.folder / "checkpoints" / "step-00000006")
    with training.state.averaged(), evaluating(training.objective):
        assert Validation(held_out(run), run.folder, 1, None).loss(training) == rows[-1]["val_loss_ema"]


def test_training_goes_on_as_if_it_had_not_been_validated(toy):
    with_it, without = toy(unet_dropout=0.3), toy(unet_dropout=0.3)
    trained(with_it, steps=5, every=1)
    without.train(steps=5)
    assert with_it.losses() == without.losses()


def test_after_a_resume_and_at_the_end(toy):
    run, whole = toy(), toy()
    trained(run, steps=3, every=2)
    assert [row["step"] for row in read_rows(run.folder / "validation.csv")] == [2, 3]
    rows = trained(run, steps=6, every=2, resume=run.folder / "checkpoints" / "step-00000003")
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    expected = trained(whole, steps=6, every=1)
    assert rows == [row for row in expected if row["step"] in (2, 3, 4, 6)]


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_processes_share_the_samples(toy, processes):
    """Each has as many batches; together every sample counts once."""
    held = held_out(toy(), count=10, batch_size=2)
    counted, batches = [], set()
    for rank in range(processes):
        mine = list(held.batches(rank, processes))
        batches.add(len(mine))
        counted += [key for batch in mine for key, weight in zip(batch["keys"], batch["weight"], strict=True) if weight]
    assert len(batches) == 1 and sorted(counted) == sorted(str(index) for index in range(10))
