from pathlib import Path

import pytest

from latentsmith.config import compose, load_config
from latentsmith.config.overrides import leaves, merge, parse
from latentsmith.files.errors import BadInput

SEED = [
    "model.unet_config.use_checkpoint=True",
    "trainer.precision=bf16",
    "model.unet_config.use_flash_attention=True",
    "model.channels_last=True",
    "model.inductor=True",
    "model.first_stage_key=image_encoded",
    "model.cond_stage_key=captions_encoded",
]


@pytest.mark.parametrize("mark", ["", "+", "++"])
def test_the_documented_overrides(mark):
    config = load_config("sd1", [mark + override for override in SEED])
    assert config.model.unet_config.use_checkpoint is True and config.model.unet_config.use_flash_attention is True
    assert config.trainer.precision == "bf16-mixed"
    assert config.model.channels_last is True and config.model.inductor is True
    assert (config.model.first_stage_key, config.model.cond_stage_key) == ("image_encoded", "captions_encoded")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("exp_manager.exp_dir=~/data", str(Path.home() / "data")),
        ("name=~/data", "~/data"),
        ("exp_manager.exp_dir=a=b", "a=b"),
        ("exp_manager.exp_dir=/data (copy)/x", "/data (copy)/x"),
        ("exp_manager.exp_dir='quoted, too'", "quoted, too"),
        ("exp_manager.exp_dir=2024", "2024"),
        ("exp_manager.exp_dir=1e3", "1e3"),
        ("exp_manager.exp_dir=null", None),
        ("model.data.train.dataset_path=shard-{000..010}.tar", "shard-{000..010}.tar"),
        ("model.data.train.dataset_path=[a.tar,b.tar]", ("a.tar", "b.tar")),
        ("model.data.train.augmentations.center_crop_h_w=512,256", (512, 256)),
        ("model.data.train.augmentations.center_crop_h_w=512", (512, 512)),
        ("model.optim.betas=[0.5,0.9]", (0.5, 0.9)),
        ("model.optim.name=adam", "Adam"),
        ("name=${model.parameterization}-${.model.seed}", "eps-1234"),
    ],
)
def test_values(override, value):
    node = load_config("sd1", [override])
    for name in override.split("=")[0].split("."):
        node = getattr(node, name)
    assert node == value


def test_deleting_goes_back_to_the_default():
    assert load_config("demo", ["~model.optim.lr"]).model.optim.lr == 1e-4
    assert load_config("demo", ["~exp_manager.ema"]).exp_manager.ema.enable is False
    assert load_config("demo", ["model.seed=3", "~model.seed=3"]).model.seed == 1234


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["~model.cosine_s"], "~model.cosine_s: nothing in the config sets model.cosine_s; remove the override"),
        (["model.seed=3", "~model.seed=4"], "~model.seed=4: model.seed is 3, so it is not dropped"),
    ],
)
def test_nothing_to_delete(changes, line):
    with pytest.raises(BadInput) as caught:
        load_config("demo", changes)
    assert line in str(caught.value)


def test_a_mapping_is_merged():
    optim = load_config("demo", ["model.optim={lr: 1, sched: {name: constant}}"]).model.optim
    assert (optim.lr, optim.sched.name, optim.sched.warmup_steps) == (1, "constant", 50)
    (note,) = compose("demo", ["model.optim.sched={name: constant, hold_steps: null, min_lr: 0}"]).notes
    assert note.startswith("model.optim.sched.warmup_steps has no effect here: model.optim.sched.name=constant is one")


def test_later_overrides_win():
    assert load_config("demo", ["model.seed=1", "model.seed=2"]).model.seed == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.optim.learing_rate=3", "command line: model.optim.learing_rate is not an option; did you mean model"),
        ("+model.optim.learing_rate=3", "did you mean model.optim.lr?"),
        ("~model.optim.learing_rate", "did you mean model.optim.lr?"),
        ("model.optim.lr", "command line: 'model.optim.lr' is not an override; write key=value"),
        ("=3", "is not an override"),
        (
            "model.optim.lr=1,2",
            "model.optim.lr=1,2 is a sweep: write lists as [1,2], or ask for one run each (--multirun)",
        ),
        ("trainer.max_steps=range(1,3)", "is a sweep"),
        (f"model.seed={'9' * 5000}", "command line: model.seed is a number of more than 20 digits"),
        ("trainer.max_steps=(", "trainer.max_steps=( is outside Hydra's grammar"),
        ("model={optim: {lrr: 1}}", "command line: model.optim.lrr is not an option"),
        ("model.optim=3", "command line: model.optim must be a mapping of options, not 3"),
        ("trainer.devices=two", "command line: trainer.devices must be a whole number of at least -1 or a list"),
    ],
)
def test_what_is_wrong_is_named(override, expected):
    with pytest.raises(BadInput) as caught:
        load_config("demo", [override])
    assert expected in str(caught.value)


def test_parse():
    assert parse("++model.seed=3") == (False, "model.seed", 3)
    assert parse("~model.seed") == (True, "model.seed", None)


def test_merge_and_leaves():
    base = {"model": {"seed": 1, "optim": {"lr": 1}}}
    merge(base, {"model": {"optim": {"eps": 2}}, "name": "x"})
    assert leaves(base) == {"model.seed": 1, "model.optim.lr": 1, "model.optim.eps": 2, "name": "x"}
    kwargs = {"exp_manager": {"wandb_logger_kwargs": {"project": "p"}}}
    assert leaves(kwargs) == {"exp_manager.wandb_logger_kwargs": {"project": "p"}}
