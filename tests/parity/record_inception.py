"""Print what torch-fidelity's Inception makes of an image, with the weights that test_inception.py uses.

Run by hand: python tests/parity/record_inception.py SITE_PACKAGES_WITH_TORCH_FIDELITY
torch-fidelity imports torchvision, which its Inception does not use: it is replaced by an empty module.
"""

import sys
import tempfile
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from latentsmith.models.inception import TAPS, FidInception

PARTS = ("", ".datasets", ".transforms", ".transforms.functional", ".models")
NAMES = ("CIFAR10", "CIFAR100", "STL10", "Compose", "Normalize", "Resize", "CenterCrop", "InterpolationMode")


def weights() -> dict[str, torch.Tensor]:
    """Weights of every tensor's own random numbers, such that activations keep their size through the network."""
    state = {}
    for number, (name, tensor) in enumerate(FidInception().state_dict().items()):
        noise = np.random.default_rng(number).standard_normal(tuple(tensor.shape)).astype(np.float32)
        match name.rsplit(".", 1)[1]:
            case "running_var":
                noise = 0.5 + np.abs(noise)
            case "weight" if ".bn." in name:
                noise = 1 + 0.1 * noise
            case "weight":
                noise = noise * np.float32((2 / tensor[0].numel()) ** 0.5)
            case "num_batches_tracked":
                noise = np.zeros((), np.int64)
            case _:
                noise = 0.1 * noise
        state[name] = torch.from_numpy(np.asarray(noise))
    return state


def image() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 120, 200), dtype=np.uint8))


def summary(activations: torch.Tensor) -> list[float]:
    """Three numbers that any change of a tensor moves: norm, first value, product with fixed noise."""
    values = activations.double().flatten()
    noise = torch.from_numpy(np.random.default_rng(1).standard_normal(len(values)))
    return [float(values.norm()), float(values[0]), float(values @ noise)]


def main(site_packages: str) -> None:
    sys.path.append(site_packages)
    for part in PARTS:
        module = ModuleType(f"torchvision{part}")
        module.__spec__, module.__path__ = ModuleSpec(module.__name__, None), []
        for name in NAMES:
            setattr(module, name, object)
        sys.modules[module.__name__] = module
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(weights(), path)
        theirs = import_module("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
        for name, tap in zip(TAPS, theirs("inception", list(TAPS), str(path))(image()), strict=True):
            print(f'    "{name}": {summary(tap)},')


if __name__ == "__main__":
    main(sys.argv[1])
