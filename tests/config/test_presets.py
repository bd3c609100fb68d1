import pytest
from omegaconf import OmegaConf

from latentsmith.config import overrides, schema
from latentsmith.config.compose import PRESETS, compose, presets, read
from latentsmith.config.tree import to_plain


def test_which_there_are():
    assert {"demo", "demo_vae", "demo_text", "sd1", "sd2_base", "sd2_v"} <= set(presets())


@pytest.mark.parametrize("name", presets())
def test_preset_composes_and_says_what_it_is_for(name):
    composed = compose(name)
    assert not composed.notes, "a preset gives no option without effect"
    assert composed.config.name == name
    first = (PRESETS / f"{name}.yaml").read_text().splitlines()[:2]
    assert first[0].startswith("# latentsmith ") and first[1].startswith("#")


@pytest.mark.parametrize("name", presets())
def test_preset_repeats_no_default(name):
    own = OmegaConf.to_container(OmegaConf.load(PRESETS / f"{name}.yaml"))
    below: dict = {}
    for base in own.pop("defaults", []):
        overrides.merge(below, read(PRESETS / f"{base}.yaml")[0])
    for key, value in overrides.leaves(own).items():
        if key not in overrides.leaves(below):
            assert value != to_plain(schema.table()[key].default), f"{name}: {key}={value} is the default"
