"""A resolved config: frozen dataclasses with tuples, copied to change, written and read back."""

import copy
import pickle
from dataclasses import FrozenInstanceError, fields, is_dataclass

import pytest

from latentsmith.config import load_config, presets, replaced, to_tree, to_yaml
from latentsmith.files.errors import BadInput


def sections(section):
    yield section
    for field in fields(section):
        if is_dataclass(value := getattr(section, field.name)):
            yield from sections(value)


def test_nothing_can_be_written():
    for section in sections(load_config("demo")):
        for field in fields(section):
            with pytest.raises(FrozenInstanceError):
                setattr(section, field.name, None)
            assert not isinstance(getattr(section, field.name), list)


@pytest.mark.parametrize("name", presets())
def test_what_is_written_reads_back_equal(name, tmp_path):
    config = load_config(name)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_a_config_travels_to_other_processes():
    config = load_config("sd1", ["exp_manager.wandb_logger_kwargs={project: a}"])
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)


def test_replaced_leaves_the_given_config_alone():
    config = load_config("demo")
    changed = replaced(config, "model.unet_config.channel_mult", [1, 2])
    assert changed.model.unet_config.channel_mult == (1, 2)
    assert config == load_config("demo") and changed.trainer is config.trainer
    section = changed.model.unet_config
    assert replaced(config, "model.unet_config", section).model.unet_config is section


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("model.optim.lr", "fast", "config: model.optim.lr must be a number of at least 0, not 'fast'"),
        ("model.optim.learning_rate", 1, "model.optim.learning_rate is not an option; did you mean model.optim.lr?"),
        ("model.optim.lr.x", 1, "model.optim.lr must be a number of at least 0, not a mapping"),
        ("model.use_ema", True, "model.use_ema has status no effect: exp_manager.ema decides"),
    ],
)
def test_replaced_refuses(key, value, line):
    with pytest.raises(BadInput) as caught:
        replaced(load_config("demo"), key, value)
    assert line in str(caught.value)


def test_a_tree_holds_augmentations_that_are_set_in_their_order():
    crop = "model.data.train.augmentations={horizontal_flip: true, aspect_buckets: {resolution: 512}}"
    tree = to_tree(load_config("sd1", ["~model.data.train.augmentations", crop]))
    assert tree["model"]["data"]["train"]["augmentations"] == {
        "horizontal_flip": True,
        "aspect_buckets": {"resolution": 512},
    }
    assert list(tree["model"]["data"]["train"]["augmentations"]) == ["horizontal_flip", "aspect_buckets"]
    assert tree["model"]["unet_config"]["channel_mult"] == [1, 2, 4, 4]
