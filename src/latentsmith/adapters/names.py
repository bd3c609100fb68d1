"""What other programs call the modules of our networks."""

from collections.abc import Iterable

from latentsmith.checkpoints.diffusers import unet_names


def diffusers_names(modules: Iterable[str]) -> dict[str, str]:
    """Return module name -> diffusers' for the modules of one network; a text encoder's are the same."""
    modules = list(modules)
    if any(name.startswith("text_model.") for name in modules):
        return {name: name for name in modules}
    return {
        name.removesuffix(".weight"): theirs.removesuffix(".weight")
        for name, theirs in unet_names(f"{name}.weight" for name in modules).items()
    }
