"""A hundred configs with one thing wrong: each is refused in one line that names the key, with exit code 2."""

from itertools import islice

import pytest
import yaml

from latentsmith.cli import main
from latentsmith.config import compose, load_config, overrides, schema
from latentsmith.config.explain import migrated
from latentsmith.files.errors import BadInput

UNET, VAE, TEXT = "model.unet_config", "model.first_stage_config", "model.cond_stage_config"
BASE = {
    "name": "mine",
    "trainer": {"max_steps": 10},
    "model": {"data": {"train": {"dataset_path": "shards", "augmentations": {"center_crop_h_w": [64, 64]}}}},
}


def typos():
    """Options with a letter lost in the middle of their last name."""
    for key, option in schema.table().items():
        if option.status == "used" and len(option.leaf) > 7 and option.filled:
            middle = len(key) - len(option.leaf) // 2
            wrong = key[:middle] + key[middle + 1 :]
            if schema.find(wrong) is None:
                yield wrong, 1, key


def wrong_types():
    """Values of a type that the option cannot read."""
    bad = {"a whole number": "many", "a number": [1], "true or false": "perhaps", "one of": "another"}
    for key, option in schema.table().items():
        value = next(
            (value for message, value in bad.items() if option.value_type.description.startswith(message)), None
        )
        if option.status == "used" and value is not None:
            yield key, value, "must be"


CONTRADICTIONS = [
    (f"{UNET}.num_heads", 0, {}, "is 0"),
    (f"{UNET}.num_heads", 7, {}, "7 heads do not divide"),
    (f"{UNET}.num_head_channels", 48, {}, "heads of 48 do not divide"),
    (f"{UNET}.context_dim", 1024, {f"{TEXT}.arch": "ViT-L-14"}, "embeddings of 768 features"),
    (f"{UNET}.use_spatial_transformer", False, {}, "go together"),
    (f"{UNET}.attention_resolutions", [3], {}, "3 is never reached"),
    (f"{UNET}.num_res_blocks", [2, 2], {}, "has 2 entries for the 4 levels"),
    (f"{UNET}.transformer_depth", [1], {}, "has 1 entries for the 4 levels"),
    (f"{UNET}.resblock_gn_groups", 33, {}, "33 groups do not divide"),
    (f"{UNET}.model_channels", 40, {}, "groups do not divide a level of 40 channels"),
    (f"{UNET}.in_channels", 9, {}, "the channels of the latents disagree"),
    (f"{UNET}.use_te_fp8", True, {}, "is refused"),
    (f"{UNET}.num_classes", 10, {}, "is refused"),
    (f"{UNET}._target_", "os.system", {}, "is not among the classes a config may name"),
    (f"{VAE}._target_", "builtins.eval", {}, "is not among the classes a config may name"),
    (f"{VAE}._target_", "ldm.models.autoencoder.IdentityFirstStage", {}, "means diffusion on pixels"),
    ("model.target", "os.system", {}, "is not among the classes a config may name"),
    ("model.scheduler_config", {"target": "os.system"}, {}, "is not among the classes a config may name"),
    (TEXT, "__is_unconditional__", {}, "Stable Diffusion is conditioned on text"),
    (TEXT, "__is_first_stage__", {}, "not encoded by the VAE"),
    (f"{VAE}.embed_dim", 8, {}, "the channels of the latents disagree"),
    (f"{VAE}.ddconfig.num_groups", 24, {}, "groups do not divide a level of 128 channels"),
    (f"{TEXT}.width", 500, {f"{TEXT}.heads": 3, f"{TEXT}.layers": 2, f"{TEXT}.intermediate_size": 8,
                            f"{TEXT}.activation": "gelu", f"{UNET}.context_dim": 500}, "500"),
    ("model.caption_dropout_rate", 0.1, {"model.text_embedding_dropout_rate": 0.1}, "are both above 0"),
    ("model.cond_stage_trainable", True, {"model.cond_stage_key": "captions_encoded"}, "needs captions"),
    ("model.global_batch_size", 7, {"model.micro_batch_size": 2}, "is no multiple of the 2 images"),
    ("trainer.accumulate_grad_batches", 4, {"model.global_batch_size": 4, "model.micro_batch_size": 2,
                                            "trainer.devices": 1}, "makes steps of 8 images"),
    ("model.linear_start", 0.5, {}, "is above model.linear_end"),
    ("model.optim.sched.name", "CosineAnnealing", {"trainer.max_steps": -1}, "needs an end"),
    ("model.optim.betas", [0.9, 0.99], {"model.optim.name": "SGD"}, "means nothing to model.optim.name=SGD"),
    ("model.tensor_model_parallel_size", 2, {}, "is refused"),
    ("model.optim", "adam", {}, "must be a mapping of options"),
    ("model.scale_factor", "${model.nothing}", {}, "cannot be resolved"),
    ("model.micro_batch_size", "???", {}, "is mandatory"),
    ("model.cond_stage_key", "captions_encodd", {}, "must be one of captions, captions_encoded"),
    ("model.first_stage_key", "image_encode", {}, "must be one of images, image_encoded"),
    ("model.zero_terminal_snr", True, {}, "all noise; set parameterization"),
    ("model.scale_factor", 0, {}, "leaves nothing of the latents"),
    ("model.optim.lr", float("inf"), {}, "must be a number"),
    ("model.optim.betas", [1, 1], {}, "both lie below 1"),
    ("model.linear_start", 0, {"model.linear_end": 0}, "betas lie above 0"),
    ("trainer.devices", 0, {}, "give at least one"),
    ("trainer.devices", [], {}, "give at least one"),
    (f"{UNET}.channel_mult", [], {}, "channel_mult must be"),
    (f"{UNET}._target_", "latentsmith.models.AutoencoderKL", {}, "belongs elsewhere; here it is"),
    ("model.params", 3, {}, "model.params must be a mapping"),
    ("model.data.train.augmentations.center_crop_h_w", True, {}, "must be pixels"),
]  # fmt: skip
CASES = [
    *((key, value, {}, message) for key, value, message in islice(typos(), 40)),
    *((key, value, {}, message) for key, value, message in islice(wrong_types(), 40)),
    *CONTRADICTIONS,
]


def test_there_are_a_hundred():
    assert len({(key, str(value)) for key, value, *_ in CASES}) >= 100


def with_key(tree, key, value):
    *path, leaf = key.split(".")
    for name in path:
        tree = tree.setdefault(name, {})
    tree[leaf] = value


@pytest.mark.parametrize(
    ("key", "value", "others", "message"), CASES, ids=[f"{key}={value}" for key, value, *_ in CASES]
)
def test_one_helpful_line(key, value, others, message, tmp_path, capsys):
    tree = yaml.safe_load(yaml.safe_dump(BASE))
    for name, given in {**others, key: value}.items():
        with_key(tree, name, given)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    assert main(["config", "validate", str(tmp_path / "mine.yaml")]) == 2
    line = capsys.readouterr().err
    assert line.startswith("latentsmith: ") and line.count("\n") == 1 and len(line) < 400
    assert message in line, line


def test_the_base_itself_is_valid(tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(BASE))
    assert load_config(tmp_path / "mine.yaml").trainer.max_steps == 10


def test_keys_with_dots_are_not_lost(tmp_path):
    (tmp_path / "mine.yaml").write_text("trainer.precision: bf16\nmodel: {optim.lr: 3}\n")
    with pytest.raises(BadInput, match=r"trainer\.precision is one key with a dot in it; write it nested"):
        load_config(tmp_path / "mine.yaml")


def test_null_learning_rates_mean_what_they_mean_in_nemo(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {optim: {lr: null}}")
    assert load_config(tmp_path / "mine.yaml").model.optim.lr == 1e-3
    (tmp_path / "mine.yaml").write_text("model: {base_learning_rate: 5e-5, optim: {lr: null}}")
    assert load_config(tmp_path / "mine.yaml").model.optim.lr == 5e-5


def test_what_is_mapped_arrives(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {resume_from_checkpoint: here}\nexp_manager: {name: foo}\nname: bar")
    config = load_config(tmp_path / "mine.yaml")
    assert config.exp_manager.resume_from_checkpoint == "here" and config.exp_manager.name == "foo"
    text = migrated(compose(tmp_path / "mine.yaml"), "mine.yaml")
    assert yaml.safe_load(text)["exp_manager"] == {"name": "foo", "resume_from_checkpoint": "here"}


def test_defaults_lists(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text("model: {seed: 5}")
    (tmp_path / "mine.yaml").write_text("defaults: [base]\nname: mine")
    assert load_config(tmp_path / "mine.yaml").model.seed == 5
    (tmp_path / "a.yaml").write_text("defaults: [sub/b]")
    (tmp_path / "sub" / "b.yaml").write_text("defaults: [../a]")
    with pytest.raises(BadInput, match="is among its own defaults"):
        load_config(tmp_path / "a.yaml")


def test_cosine_may_end_with_the_epochs():
    load_config("sd1", ["model.optim.sched.name=CosineAnnealing", "trainer.max_steps=-1", "trainer.max_epochs=2"])


def test_sweeps():
    given = ["model.optim.lr=1e-3,1e-4", "model.data.train.dataset_path=a,b", "model.seed=choice(1,2)"]
    assert overrides.sweep(given) == [
        [f"model.optim.lr={lr}", given[1], f"model.seed={seed}"] for lr in ("0.001", "0.0001") for seed in (1, 2)
    ]
    assert overrides.sweep(["model.data.train.dataset_path=choice(a,b)"]) == [
        ["model.data.train.dataset_path=a"],
        ["model.data.train.dataset_path=b"],
    ]
    both = ["model.parameterization=eps"], ["model.parameterization=v"]
    assert overrides.sweep(["model.parameterization=eps,v"]) == [*both]
    with pytest.raises(BadInput, match="choice"):
        overrides.sweep(["name=choice(a"])
    assert overrides.sweep([]) == [[]] and overrides.sweep(["~model.seed"]) == [["~model.seed"]]
