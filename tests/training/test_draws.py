"""Everything random in training is addressed by (seed, position), whatever process, worker or batch computes it."""

import itertools

import pytest
import torch

from latentsmith.data.order import index_at
from latentsmith.diffusion import NoiseSchedule
from latentsmith.training.draws import DiffusionDraws, PosteriorDraws
from latentsmith.training.samples import RunPositions, collate, run_loader

DRAWS = DiffusionDraws(5, (4, 6, 8), NoiseSchedule.from_config(), 0.3, 0.0)


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_draws_depend_on_seed_and_position_alone():
    before = DRAWS(11)
    torch.manual_seed(1)
    torch.rand(7)
    DRAWS(12)
    assert same(before, DRAWS(11))
    other_position = DRAWS(12)
    other_seed = DiffusionDraws(6, (4, 6, 8), NoiseSchedule.from_config(), 0.3, 0.0)(11)
    for other in (other_position, other_seed):
        assert not torch.equal(before["noise"], other["noise"])
    assert torch.equal(
        PosteriorDraws(5, (4, 2, 2))(3)["posterior_noise"], PosteriorDraws(5, (4, 2, 2))(3)["posterior_noise"]
    )


def test_draws_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    DRAWS(3)
    assert torch.equal(before, torch.random.get_rng_state())


def test_draws_are_distributed_as_the_loss_assumes():
    draws = [DRAWS(position) for position in range(2000)]
    timesteps = torch.stack([draw["timesteps"] for draw in draws])
    assert timesteps.min() < 10 and timesteps.max() > 989
    assert abs(timesteps.double().mean() - 499.5) < 4 * 288.7 / 2000**0.5
    noise = torch.stack([draw["noise"] for draw in draws]).double()
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5 and abs(noise.var() - 1) < 4 * (2 / noise.numel()) ** 0.5
    together = (noise * torch.stack([draw["posterior_noise"] for draw in draws])).mean()
    assert abs(together) < 4 / noise.numel() ** 0.5  # the two noises are independent
    dropped = torch.stack([draw["empty_caption"] for draw in draws]).double().mean()
    assert abs(dropped - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5
    assert not any(draw["zero_embedding"] for draw in draws)


def test_coefficients_are_those_of_the_timestep():
    for position in range(20):
        draw = DRAWS(position)
        kept = DRAWS.schedule.alphas_cumprod[int(draw["timesteps"])]
        assert draw["signal"].dtype == torch.float32
        assert draw["signal"] == kept.sqrt().float() and draw["noise_level"] == (1 - kept).sqrt().float()


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
        sample = samples[position]
        assert sample["keys"] == str(index_at(3, position, 10))
        assert torch.equal(sample["noise"], toy().draws(position)["noise"])
    assert samples[4]["dropout_seed"] == samples[4]["dropout_seed"] != samples[5]["dropout_seed"]


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
