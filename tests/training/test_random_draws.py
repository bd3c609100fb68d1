"""Everything random in training is addressed by (seed, position), whatever process, worker or batch computes it."""

import itertools

import pytest
import torch

from latentsmith.data.loader import RunPositions, collate, run_loader
from latentsmith.data.shuffle import sample_seed, shuffled_index
from latentsmith.diffusion import NoiseSchedule
from latentsmith.training.hooks.validation import ValidationDraws
from latentsmith.training.random_draws import DiffusionDraws, PosteriorDraws

SCHEDULE = NoiseSchedule.from_config()
DRAWS = DiffusionDraws(5, (4, 6, 8), SCHEDULE, 0.3, 0.0)
EVERY = (
    DRAWS,
    DiffusionDraws(5, (4, 6, 8), SCHEDULE, 0.3, 0.0, offset_noise=0.2, input_perturbation=0.1),
    PosteriorDraws(5, (4, 6, 8)),
    ValidationDraws((4, 6, 8), SCHEDULE, 40),
)


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_draws_depend_on_seed_and_position_alone():
    before = DRAWS([11])
    torch.manual_seed(1)
    torch.rand(7)
    DRAWS([12])
    assert same(before, DRAWS([11]))
    other_position = DRAWS([12])
    other_seed = DiffusionDraws(6, (4, 6, 8), NoiseSchedule.from_config(), 0.3, 0.0)([11])
    for other in (other_position, other_seed):
        assert not torch.equal(before["noise"], other["noise"])


@pytest.mark.parametrize("draws", EVERY, ids=["diffusion", "with all options", "posterior", "validation"])
def test_a_batch_is_its_samples(draws):
    """Bit for bit, whatever else is in the batch and of whatever size the latents are."""
    for shape in (None, (4, 2, 2)):
        whole = draws([11, 3, 29], shape)
        alone = [draws([position], shape) for position in (11, 3, 29)]
        assert same(whole, {name: torch.cat([one[name] for one in alone]) for name in whole})


def test_draws_are_those_of_a_generator_of_their_own():
    """Written out with PyTorch's functions: uniform chances, timestep, noise, posterior noise, in this order."""
    drawn = DRAWS([8, 2])
    for row, position in enumerate((8, 2)):
        generator = torch.Generator().manual_seed(sample_seed(5, position, 1))
        chances = torch.rand(2, generator=generator)
        assert drawn["empty_caption"][row] == (chances[0] < 0.3)
        assert drawn["timesteps"][row] == torch.randint(1000, (), generator=generator)
        assert torch.equal(drawn["noise"][row], torch.randn(4, 6, 8, generator=generator))
        assert torch.equal(drawn["posterior_noise"][row], torch.randn(4, 6, 8, generator=generator))


def test_draws_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    DRAWS([3])
    assert torch.equal(before, torch.random.get_rng_state())


def test_draws_are_distributed_as_the_loss_assumes():
    drawn = DRAWS(range(2000))
    timesteps = drawn["timesteps"]
    assert timesteps.min() < 10 and timesteps.max() > 989
    assert abs(timesteps.double().mean() - 499.5) < 4 * 288.7 / 2000**0.5
    noise = drawn["noise"].double()
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5 and abs(noise.var() - 1) < 4 * (2 / noise.numel()) ** 0.5
    together = (noise * drawn["posterior_noise"]).mean()
    assert abs(together) < 4 / noise.numel() ** 0.5  # the two noises are independent
    assert abs(drawn["empty_caption"].double().mean() - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5
    assert not drawn["zero_embedding"].any()


def test_coefficients_are_those_of_the_timestep():
    drawn = DRAWS(range(20))
    kept = DRAWS.schedule.alphas_cumprod[drawn["timesteps"]]
    assert drawn["sqrt_alphas_cumprod"].dtype == torch.float32
    assert torch.equal(drawn["sqrt_alphas_cumprod"], kept.sqrt().float())
    assert torch.equal(drawn["sqrt_one_minus_alphas_cumprod"], (1 - kept).sqrt().float())


@pytest.mark.parametrize(("processes", "micro_batch"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2)])
def test_every_layout_covers_the_same_positions_in_every_global_batch(processes, micro_batch):
    steps, start, global_batch = 5, 16, 8
    micro_batches = global_batch // processes // micro_batch
    taken = []
    for rank in range(processes):
        positions = RunPositions(start, global_batch, micro_batch, rank, processes)
        taken.append(list(itertools.islice(positions, steps * micro_batches)))
    for step in range(steps):
        ours = [batches[step * micro_batches + i] for batches in taken for i in range(micro_batches)]
        expected = list(range(start + step * global_batch, start + (step + 1) * global_batch))
        assert sorted(itertools.chain(*ours)) == expected
        assert {len(batch) for batch in ours} == {micro_batch}


def test_samples_follow_the_order_and_carry_their_draws(toy):
    samples = toy().samples()
    for position in (0, 9, 10, 37):
        batch = samples[[position]]
        assert batch["keys"] == [str(shuffled_index(3, position, 10))]
        assert torch.equal(batch["noise"], toy().draws([position])["noise"])
    assert samples[[4]]["dropout_seed"] == samples[[4]]["dropout_seed"] != samples[[5]]["dropout_seed"]


def test_workers_change_nothing(toy):
    samples, positions = toy().samples(), RunPositions(start=8, global_batch=4, micro_batch=2)
    alone = itertools.islice(run_loader(samples, positions), 4)
    helped = itertools.islice(run_loader(samples, positions, num_workers=2), 4)
    for first, second in zip(alone, helped, strict=True):
        assert first["keys"] == second["keys"] and first["dropout_seed"] == second["dropout_seed"]
        assert torch.equal(first["noise"], second["noise"]) and torch.equal(first["moments"], second["moments"])


def test_collate_stacks_tensors_and_lists_the_rest():
    batch = collate([{"x": torch.ones(2), "name": "a"}, {"x": torch.zeros(2), "name": "b"}])
    assert batch["x"].shape == (2, 2) and batch["name"] == ["a", "b"]
