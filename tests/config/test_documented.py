"""Whole files of NeMo and LDM: every key is known, and means what it should."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from latentsmith.config import compose, overrides, schema

FILES = sorted((Path(__file__).parent / "yaml").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_composes(path):
    composed = compose(path)
    others = [note.split()[0] for note in composed.notes if " has no effect here: " not in note]
    assert others == ["model.base_learning_rate"] * path.stem.startswith("ldm")
    assert composed.config.model.scale_factor == 0.18215


def test_nemo_sd_train():
    config = compose(FILES[[path.stem for path in FILES].index("sd_train")]).config
    assert config.exp_manager.name == "stable-diffusion-train" and config.exp_manager.resume_from_checkpoint is None
    assert config.trainer.precision == "16-mixed" and config.trainer.max_epochs == 2
    assert config.model.cosine_s == 8e-3 and config.model.optim.sched.hold_steps == 10**13
    assert config.model.data.train.augmentations.center_crop_h_w == (512, 512)
    assert config.model.cond_stage_config.arch == "ViT-L-14"


def test_nemo_sd2_train():
    config = compose(FILES[[path.stem for path in FILES].index("sd2_train")]).config
    assert config.model.cond_stage_config.arch == "ViT-H-14" and config.model.cond_stage_config.layer == "penultimate"
    assert (config.model.micro_batch_size, config.model.global_batch_size) == (4, 16)


def test_ldm():
    config = compose(FILES[[path.stem for path in FILES].index("ldm_v2")]).config
    assert config.model.parameterization == "v" and config.model.optim.lr == 1e-4
    assert config.model.cond_stage_config.version == "laion2b_s32b_b79k"


@pytest.mark.parametrize("name", ["sd_train", "sd2_train"])
def test_a_typo_in_any_key_is_an_error_that_names_it(name):
    """Each key of NeMo's file with its last two letters swapped: refused, and the right key suggested."""
    path = FILES[[path.stem for path in FILES].index(name)]
    missed = []
    for key in overrides.leaves(OmegaConf.to_container(OmegaConf.load(path))):
        wrong = key[:-2] + key[-1] + key[-2]
        if schema.find(key) is None or wrong == key or schema.find(wrong):
            continue
        if schema.nearest(wrong) != key:
            missed.append((wrong, schema.nearest(wrong)))
    assert len(missed) <= 2, missed  # names of two letters ("lr") have nothing left to recognise
