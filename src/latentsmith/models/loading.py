"""Filling a module from a checkpoint, strictly."""

from torch import nn


def load_pretrained(
    module: nn.Module, path: str | None, part: str, *, from_nemo: bool | None = None, weights: str = "ema"
) -> None:
    """Fill every parameter of `module` from the `part` of the checkpoint at `path`; nothing if `path` is None.

    part: "unet", "vae" or "text_encoder". weights: "ema" or "raw", where the checkpoint has both.
    On the meta device names and shapes are checked against the file's header and nothing is loaded. Raises BadInput
    naming the file and the first keys that do not fit.
    """
    if path is None:
        return
    from .. import checkpoints

    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if next(module.parameters()).is_meta:
        checkpoints.check_component(path, part, shapes, from_nemo=from_nemo, weights=weights)
        return
    module.load_state_dict(checkpoints.load_component(path, part, shapes, from_nemo=from_nemo, weights=weights))
