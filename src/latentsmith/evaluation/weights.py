"""Fill a network of an extractor strictly from a file of weights."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from latentsmith.files.errors import BadInput
from latentsmith.files.regular import open_regular
from latentsmith.files.tensors import open_tensors

BEFORE_1_6 = b"\x80"  # first byte of torch's older files; the published Inception weights are such


def named_file(path: Path, names: Sequence[str]) -> Path:
    """Return the path, or in a folder the first file there of the names. Raises BadInput where there is none."""
    if not path.is_dir():
        return path
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        raise BadInput(f"{path}: holds none of {', '.join(names)}")
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a file, by name. Objects of no tensor type are never made. Raises BadInput."""
    try:
        with open_regular(path) as file:
            first = file.read(1)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    if first != BEFORE_1_6:
        return dict(open_tensors(path))
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes it raise struct.error, UnpicklingError, EOFError and more
        raise BadInput(f"{path}: is damaged, or holds more than tensors ({str(error)[:60]})") from None
    if not isinstance(loaded, Mapping):
        raise BadInput(f"{path}: holds a {type(loaded).__name__}, not a dictionary of tensors")
    return {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}


def fill(network: nn.Module, tensors: Mapping[str, Tensor], path: Path, unused: str = "$^") -> None:
    """Load tensors of the network's names and shapes, in float32. unused: regular expression of names to leave.

    Raises BadInput for a missing or an unknown name and another shape.
    """
    wanted = network.state_dict()
    given = {name: tensor for name, tensor in tensors.items() if not re.match(unused, name)}
    optional = {name for name in wanted if name.endswith("num_batches_tracked")}
    missing, unknown = wanted.keys() - given.keys() - optional, given.keys() - wanted.keys()
    other = [name for name in wanted.keys() & given.keys() if wanted[name].shape != given[name].shape]
    for names, what in ((missing, "missing"), (unknown, "not the network's"), (other, "of another shape")):
        if names:
            first = min(names)
            raise BadInput(f"{path}: wrong weights: {len(names)} tensors are {what}, such as {first}")
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in given.items()}
    network.load_state_dict(floats, strict=False)
