"""What training reads: a batch is its samples, whichever way the set is kept."""

import pytest
import torch

from latentsmith import load_config
from latentsmith.training.train import prepared

from .conftest import RECIPES

AUGMENTATIONS = "model.data.train.augmentations"
CROPS = (f"{AUGMENTATIONS}.center_crop_h_w=null", f"{AUGMENTATIONS}.random_crop_h_w='8, 8'")


@pytest.mark.parametrize(("recipe", "more"), [("cached", ()), ("text", ()), ("images", ()), ("images", CROPS)])
def test_a_batch_is_its_samples(world, recipe, more):
    """Bit for bit, in any order, one sample taken twice: random crops go by the position, not by the batch."""
    overrides = [word.replace("ROOT", str(world.root)) for word in (*RECIPES[recipe], *more)]
    samples = prepared(load_config(str(world.root / "tiny.yaml"), overrides)).samples
    places = [(3, 8), (0, 30), (21, 2), (3, 9)]
    whole = samples.read([index for index, _ in places], [position for _, position in places])
    for row, (index, position) in enumerate(places):
        alone = samples.read([index], [position])
        assert alone.keys() == whole.keys() and alone["keys"] == [whole["keys"][row]]
        for name in alone.keys() - {"keys"}:
            assert torch.equal(alone[name][0], whole[name][row]), name
    if more:
        assert not torch.equal(whole["images"][0], whole["images"][3])
