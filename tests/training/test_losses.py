import math

import pytest
import torch

from latentsmith.training.losses import ReconstructionLoss, edge_difference, psnr


def test_reconstruction_loss_in_closed_form():
    images = torch.zeros(2, 3, 4, 4)
    decoded = torch.full_like(images, 0.5)
    moments = torch.cat([torch.full((2, 4, 2, 2), 2.0), torch.full((2, 4, 2, 2), math.log(3.0))], dim=1)
    losses = ReconstructionLoss(l1_weight=1.0, l2_weight=2.0, edge_weight=5.0, kl_weight=0.1)(images, decoded, moments)
    kl = 16 * 0.5 * (2.0**2 + 3.0 - 1 - math.log(3.0))  # nats per image: 16 latent values alike
    assert losses["l1"].item() == 0.5 and losses["l2"].item() == 0.25
    assert losses["kl"].item() == pytest.approx(kl)
    assert losses["loss"].item() == pytest.approx(0.5 + 2 * 0.25 + 0.1 * kl)  # a flat difference has no edges


def test_standard_normal_latents_cost_nothing():
    losses = ReconstructionLoss(kl_weight=1.0)(*[torch.ones(1, 3, 4, 4)] * 2, torch.zeros(1, 8, 2, 2))
    assert losses["loss"].item() == 0


def test_edges_are_counted_both_ways():
    difference = torch.zeros(1, 1, 2, 3)
    difference[0, 0, 0, 1] = 3.0  # two steps of 3 among four across, one of 3 among three down
    assert edge_difference(difference).item() == pytest.approx(6 / 4 + 3 / 3)
    loss = ReconstructionLoss(l1_weight=0, kl_weight=0, edge_weight=2.0)
    got = loss(torch.zeros(1, 1, 2, 3), difference, torch.zeros(1, 8, 1, 1))["loss"]
    assert got.item() == pytest.approx(2 * (6 / 4 + 3 / 3))


def test_psnr_of_each_image():
    images = torch.zeros(3, 3, 4, 4)
    decoded = torch.stack([torch.full((3, 4, 4), value) for value in (0.2, 0.02, 5.0)])
    # the peak of [-1, 1] is 2: 20 log10(2 / error); what is out of range counts as at its end
    expected = [20 * math.log10(2 / error) for error in (0.2, 0.02, 1.0)]
    assert psnr(images, decoded).tolist() == pytest.approx(expected, rel=1e-5)
    assert psnr(images, images).isfinite().all()
