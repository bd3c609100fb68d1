"""Metrics against torchmetrics, with an extractor of our own passed in: 1e-4 relative (it casts to float32 between)."""

import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from latentsmith.evaluation import fid, inception_score, kid


class Extractor(nn.Module):
    """Random features of images, 48 numbers."""

    num_features = 48

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(3 * 8 * 8, 48)

    def forward(self, images):
        return self.project(images.to(self.project.weight.dtype).flatten(1) / 255).tanh()


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    dark = torch.randint(0, 200, (150, 3, 8, 8), generator=generator, dtype=torch.uint8)
    light = torch.randint(50, 255, (120, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return dark, light


@pytest.fixture(scope="module")
def extractor():
    torch.manual_seed(1)
    return Extractor().eval().requires_grad_(False)


def measured(metric, images):
    generated, reference = images
    metric.update(generated, real=False)
    metric.update(reference, real=True)
    return metric.compute()


def test_fid_is_torchmetrics(images, extractor):
    theirs = measured(FrechetInceptionDistance(extractor, input_img_size=(3, 8, 8)).set_dtype(torch.float64), images)
    assert fid(*map(extractor, images)) == pytest.approx(float(theirs), rel=1e-4)


def test_kid_is_torchmetrics(images, extractor):
    """One subset of all images: what it draws does not matter."""
    generated, reference = images[0][:120], images[1]
    theirs, _ = measured(KernelInceptionDistance(extractor, subsets=1, subset_size=120), (generated, reference))
    assert kid(extractor(generated), extractor(reference)) == pytest.approx(float(theirs), rel=1e-4)


@pytest.mark.filterwarnings("ignore:std")
def test_inception_score_is_torchmetrics(images, extractor):
    metric = InceptionScore(extractor, splits=1)
    metric.update(images[0])
    assert inception_score(extractor(images[0]), splits=1)[0] == pytest.approx(float(metric.compute()[0]), rel=1e-4)
