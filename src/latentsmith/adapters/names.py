"""What other programs call the layers of our networks: tables from their names to ours, never parsed underscores."""

from collections.abc import Iterable, Mapping

from torch import nn

from latentsmith.checkpoints.diffusers import unet_names

TEXT = "text_model."
Shape = tuple[int, ...]
Layers = Mapping[str, Mapping[str, Shape]]  # part -> layer -> shape of its weight
Names = dict[str, tuple[str, str]]  # another program's name of a layer -> (part, our name)


def layers_of(networks: Mapping[str, nn.Module]) -> dict[str, dict[str, Shape]]:
    """Return the layers that adapters can be on. networks: part ("unet", "text_encoder") -> network."""
    return {
        part: {
            name: tuple(module.weight.shape)
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }
        for part, network in networks.items()
    }


def diffusers_names(modules: Iterable[str]) -> dict[str, str]:
    """Return module name -> diffusers' for the modules of one network; a text encoder's are the same."""
    modules = list(modules)
    if any(name.startswith(TEXT) for name in modules):
        return {name: name for name in modules}
    return {
        name.removesuffix(".weight"): theirs.removesuffix(".weight")
        for name, theirs in unet_names(f"{name}.weight" for name in modules).items()
    }


def spellings(layers: Layers) -> dict[tuple[str, str], list[str]]:
    """Return every dotted name of each (part, layer), the one that is written first.

    The U-Net's are diffusers' and LDM's, a text encoder's are Hugging Face's with and without text_model.
    """
    found = {}
    for part, names in layers.items():
        for name, theirs in diffusers_names(names).items():
            other = name.removeprefix(TEXT) if part == "text_encoder" else name
            found[part, name] = list(dict.fromkeys([theirs, other]))
    return found
