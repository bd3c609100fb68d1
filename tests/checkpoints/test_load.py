"""Networks without numbers: made at once, as they would be made with them."""

import subprocess
import sys

import pytest

from latentsmith import AutoencoderKL, ClipTextEncoder, UNetModel
from latentsmith.checkpoints.load import meta_weights

UNET = dict(model_channels=32, channel_mult=[1, 2], num_heads=2, context_dim=16)
VAE = dict(embed_dim=4, ddconfig=dict(ch=32, ch_mult=[1, 2], num_res_blocks=1, z_channels=4))
TEXT = dict(width=16, layers=1, heads=2, intermediate_size=32, activation="gelu", vocab_size=50)


@pytest.mark.parametrize(("kind", "options"), [(UNetModel, UNET), (AutoencoderKL, VAE), (ClipTextEncoder, TEXT)])
def test_shapes_are_those_of_the_filled_network(kind, options):
    filled = kind(**options).state_dict()
    with meta_weights():
        empty = kind(**options).state_dict()
    assert {name: tensor.shape for name, tensor in empty.items()} == {n: tensor.shape for n, tensor in filled.items()}
    assert all(tensor.is_meta for tensor in empty.values())
    assert not any(tensor.is_meta for tensor in kind(**options).state_dict().values())


def test_the_compiler_is_not_imported():
    """A second of the start of every command that draws."""
    code = (
        "import sys, latentsmith, latentsmith.models, latentsmith.checkpoints.load as loading\n"
        f"with loading.meta_weights(): latentsmith.AutoencoderKL(**{VAE}), latentsmith.ClipTextEncoder(**{TEXT})\n"
        f"with loading.meta_weights(): latentsmith.UNetModel(**{UNET})\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
