import pytest
import torch


@pytest.fixture(scope="session")
def randomise():
    """A function that fills a module with random weights of a sane scale, layers that start at zero among them."""

    @torch.no_grad()
    def randomise(module, seed=0):
        generator = torch.Generator().manual_seed(seed)
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            one_dimensional = parameter.dim() < 2  # biases and the scales of norms
            scale = 0.1 if one_dimensional else parameter[0].numel() ** -0.5
            centre = 1.0 if one_dimensional and (parameter == 1).all() else 0.0
            parameter.copy_(centre + scale * noise)
        return module

    return randomise
