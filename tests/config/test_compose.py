import re
import textwrap

import pytest

from latentsmith.checkpoints.load import build
from latentsmith.config import Config, compose, load_config, schema, to_yaml
from latentsmith.config.compose import print_notes
from latentsmith.files.errors import BadInput


def write(folder, text, name="my.yaml"):
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def message(path, *overrides):
    """The one line that a wrong config gives."""
    with pytest.raises(BadInput) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_file_over_defaults(tmp_path):
    config = load_config(write(tmp_path, "model: {optim: {lr: 2e-5}}"))
    assert isinstance(config, Config)
    assert config.model.optim.lr == 2e-5 and config.model.optim.weight_decay == 0
    assert config.model.unet_config.num_heads == 8  # neither head key given
    assert config.model.cond_stage_config.arch == "ViT-L-14"  # as wide as context_dim


def test_interpolations_absolute_relative_and_of_defaults(tmp_path):
    path = write(
        tmp_path,
        """
        name: mine
        exp_manager: {resume_from_checkpoint: "${model.resume_from_checkpoint}"}
        model:
          resume_from_checkpoint: runs/old
          micro_batch_size: 4
          global_batch_size: ${.micro_batch_size}
          optim: {sched: {max_steps: "${trainer.max_steps}"}}
        trainer: {max_steps: 1e3}
        """,
    )
    config = load_config(path, ["model.micro_batch_size=8"])
    assert config.exp_manager.name == "mine" and config.exp_manager.resume_from_checkpoint == "runs/old"
    assert config.model.global_batch_size == 8 and config.model.optim.sched.max_steps == 1000


def test_origins_and_notes(tmp_path):
    path = write(tmp_path, "model: {optim: {lr: 1e-5}, use_ema: true}")
    composed = compose(path, ["model.seed=3"])
    assert composed.origins["model.optim.lr"] == "my.yaml"
    assert composed.origins["model.seed"] == "command line"
    assert "model.optim.eps" not in composed.origins
    assert composed.notes == ["model.use_ema has no effect here: exp_manager.ema decides"]


def test_order_of_augmentations_is_the_files(tmp_path):
    text = "model: {data: {train: {augmentations: {horizontal_flip: true, center_crop_h_w: '64, 48'}}}}"
    augmentations = load_config(write(tmp_path, text)).model.data.train.augmentations
    assert list(augmentations.steps().items()) == [("horizontal_flip", True), ("center_crop_h_w", (64, 48))]


def test_defaults_list(tmp_path):
    write(tmp_path, "name: base\nmodel: {seed: 1, optim: {lr: 1}}", "base.yaml")
    path = write(tmp_path, "defaults: [sd1, base.yaml]\nmodel: {seed: 2}")
    composed = compose(path)
    assert (composed.config.name, composed.config.model.seed, composed.config.model.optim.lr) == ("base", 2, 1)
    assert composed.config.model.optim.weight_decay == 0.01  # sd1's
    assert composed.origins["model.optim.lr"] == "base.yaml" and composed.origins["model.seed"] == "my.yaml"
    path = write(tmp_path, "defaults: [_self_, base.yaml]\nmodel: {seed: 2}")
    assert load_config(path).model.seed == 1


def test_null_means_not_set_unless_it_is_a_value(tmp_path):
    config = load_config(write(tmp_path, "model: {seed: null, optim: null, global_batch_size: null}\npeft: null"))
    assert config.model.seed == 1234 and config.model.optim.lr == 1e-4 and config.model.global_batch_size is None


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("16", "16-mixed"),
        ("bf16", "bf16-mixed"),
        ("32", "32-true"),
        ("'32'", "32-true"),
        ("bf16-mixed", "bf16-mixed"),
        ("fp16", "16-mixed"),
        ("fp32", "32-true"),
    ],
)
def test_precision_takes_lightnings_name(tmp_path, given, used):
    assert load_config(write(tmp_path, f"trainer: {{precision: {given}}}")).trainer.precision == used


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "model: {optim: {learing_rate: 1}}",
            "my.yaml: model.optim.learing_rate is not an option; did you mean model.optim.lr?",
        ),
        (
            "model: {optim: {learning_rate: 1}}",
            "my.yaml: model.optim.learning_rate is not an option; did you mean model.optim.lr?",
        ),
        ("model: {unet_config: {contxt_dim: 1}}", "did you mean model.unet_config.context_dim?"),
        ("trainer: {max_step: 1}", "did you mean trainer.max_steps?"),
        ("max_steps: 1", "did you mean trainer.max_steps?"),
        ("model: {optim: {xyzzy: 1}}", "`latentsmith config explain` lists every option"),
        ("model: {optim: 3}", "my.yaml: model.optim must be a mapping of options, not 3"),
        ("model: {optim: {lr: {a: 1}}}", "my.yaml: model.optim.lr must be a number of at least 0, not a mapping"),
        ("model: {optim: {lr: fast}}", "my.yaml: model.optim.lr must be a number of at least 0, not 'fast'"),
        ("model: {optim: {lr: -1}}", "model.optim.lr must be a number of at least 0, not -1"),
        ("model: {optim: {betas: [0.9]}}", "model.optim.betas must be a list of 2, each a number from 0 to 1"),
        ("trainer: {max_steps: 1.5}", "trainer.max_steps must be a whole number of at least -1, not 1.5"),
        ("trainer: {max_steps: .inf}", "trainer.max_steps must be a whole number of at least -1, not inf"),
        (
            "trainer: {precision: 8}",
            "must be one of 32-true, bf16-mixed, 16-mixed, bf16-true, 16-true, not 8",
        ),
        ("model: {channels_last: maybe}", "model.channels_last must be true or false, not 'maybe'"),
        ("model: {data: {train: {augmentations: {center_crop_h_w: '1, 2, 3'}}}}", 'or "height, width"'),
        ("model: {conditioning_key: concat}", "model.conditioning_key=concat is refused: Stable Diffusion attends"),
        ("model:\n  seed: ???", "model.seed is mandatory (???): give it as model.seed=VALUE"),
        ("model: {seed: '${nothing}'}", "model.seed cannot be resolved: Interpolation key 'nothing' not found"),
        ("- 1\n- 2", "my.yaml: a config is a mapping of options, not a list"),
        ("a: [1", "my.yaml: not readable as YAML"),
        ("name: a\nname: b", "my.yaml: not readable as YAML"),
        ("name: !!python/object/apply:os.getcwd []", "my.yaml: not readable as YAML"),
        ("defaults: [my.yaml]", "my.yaml: is among its own defaults; take it out of my.yaml"),
        ("defaults: [nothing]", "nothing: neither a config file nor a preset (demo, "),
        ("model: {unet_config: {_target_: os.system}}", "model.unet_config._target_: 'os.system' is not among"),
        ("model: {first_stage_config: {lossconfig: {target: evil.Loss}}}", "'evil.Loss' is not among the classes"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, expected):
    assert expected in message(write(tmp_path, text))


def test_missing_file(tmp_path):
    assert "nowhere.yaml: neither a config file nor a preset" in message(tmp_path / "nowhere.yaml")


def test_wrong_value_on_the_command_line_is_called_that():
    assert message("sd1", "model.optim.lr=fast").startswith("command line: model.optim.lr must be a number")


def test_old_spellings_are_carried_over(tmp_path):
    text = "model: {base_learning_rate: 3e-5, scale_by_std: true, cond_stage_trainable: true}"
    model = load_config(write(tmp_path, text)).model
    assert (model.optim.lr, model.scale_factor, model.cond_stage_config.freeze) == (3e-5, "measured", False)
    both = load_config(write(tmp_path, "model: {base_learning_rate: 3e-5, optim: {lr: 1}}"))
    assert both.model.optim.lr == 1


def test_ldms_rate_is_taken_unscaled_and_said_so(tmp_path, capsys):
    path = write(tmp_path, "model: {base_learning_rate: 3e-5, use_ema: true}")
    composed = compose(path)
    assert composed.config.model.optim.lr == 3e-5
    (note,) = [note for note in composed.notes if "base_learning_rate" in note]
    assert "batch size" in note and "--scale_lr" in note and "has no effect" not in note
    print_notes("my.yaml", composed)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"my.yaml: {note}" and lines[1].endswith(": model.use_ema") and len(lines) == 2
    assert compose(path, ["model.optim.lr=1e-4", "~model.use_ema"]).notes == []


@pytest.mark.parametrize("heads", [8, 0, -1, None])
def test_num_head_channels_decides_over_num_heads(tmp_path, heads):
    given = "null" if heads is None else heads
    path = write(tmp_path, f"model: {{unet_config: {{num_heads: {given}, num_head_channels: 64}}}}")
    composed = compose(path)
    unet = composed.config.model.unet_config
    assert (unet.num_heads, unet.num_head_channels) == (-1, 64)
    named = [note.startswith("model.unet_config.num_heads has no effect here: ") for note in composed.notes]
    assert named == [True] * (heads in (8, 0))


def test_composed_config_composes_again(tmp_path):
    first = load_config("sd2_v", ["exp_manager.exp_dir=1e3", "exp_manager.wandb_logger_kwargs={project: a}"])
    (tmp_path / "again.yaml").write_text(to_yaml(first))
    assert load_config(tmp_path / "again.yaml") == first


def test_a_bare_name_is_a_preset_and_build_is_exported():
    assert load_config("demo").name == "demo" and callable(build)


def test_defaults_of_groups(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "small.yaml").write_text("unet_config: {model_channels: 64}\nseed: 5")
    path = tmp_path / "mine.yaml"
    path.write_text("defaults: [sd1, {model: small}, optional nothing, {optional model: nothing}]\nname: x")
    composed = compose(path)
    assert composed.config.model.unet_config.model_channels == 64 and composed.config.model.seed == 5
    assert composed.origins["model.seed"] == "small.yaml" and composed.config.name == "x"
    wrong = {"{model: gone}": "there is no", "[1]": "is neither a preset", "mine": "among its own defaults",
             "override model: small": "is neither a preset"}  # fmt: skip
    for entry, line in wrong.items():
        path.write_text(f"defaults: [{entry}]")
        with pytest.raises(BadInput, match=line):
            compose(path)


def test_ldms_spelling_of_keys(tmp_path):
    path = tmp_path / "ldm.yaml"
    path.write_text(
        "model: {target: ldm.models.diffusion.ddpm.LatentDiffusion, params: {channels: 4, unet_config: {target: "
        "ldm.modules.diffusionmodules.openaimodel.UNetModel, params: {in_channels: '${model.params.channels}'}}, "
        "scheduler_config: {target: ldm.lr_scheduler.LambdaLinearScheduler, params: {warm_up_steps: [10000]}}}}"
    )
    text = "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder"
    changes = [f"model.params.cond_stage_config.target={text}", "model.unet_config.params.context_dim=1024"]
    model = compose(path, changes).config.model
    assert model.unet_config.in_channels == 4 and model.cond_stage_config.arch == "ViT-H-14"
    assert (model.optim.sched.name, model.optim.sched.warmup_steps) == ("WarmupPolicy", 10000)
    assert compose(path, [*changes, "model.optim.sched.warmup_steps=5"]).config.model.optim.sched.warmup_steps == 5


@pytest.mark.parametrize(
    "text", ["trainer: {}", "model: {}", "model: {optim: {}}", "model: {data: {train: {augmentations: {}}}}"]
)
def test_an_empty_node_is_all_defaults(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text("")
    assert compose(tmp_path / "a.yaml").config == compose(tmp_path / "b.yaml").config


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: []", "model must be a mapping of options"),
        ("model: {optim: [a]}", "model.optim must be a mapping"),
        ("3", "a config is a mapping of options|not readable as YAML"),
        ("exp_manager: {name: ''}", "does not name a folder"),
        ("exp_manager: {name: ../../x}", "does not name a folder"),
        ("trainer: {max_steps: 0}", "nothing to train"),
        (
            "model: {scheduler_config: {warm_up_steps: [10], f_max: [1.0], f_min: [0.1]}}",
            "write it as model.optim.sched",
        ),
        ("model: {scale_by_std: true, scale_factor: 0.18215}", "drop one of them"),
        ("model: {unet_config: {_target_: nemo.collections.multimodal.UNetModle}}", "is not among the classes"),
    ],
)
def test_faults_of_whole_nodes(tmp_path, text, line):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(BadInput, match=line):
        compose(tmp_path / "a.yaml")


def test_a_tilde_in_a_path_is_the_home_folder(tmp_path, monkeypatch):
    """No shell expands it behind key= or in a file: ~/runs became a folder named ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text(
        "exp_manager: {exp_dir: ~/runs}\nmodel: {data: {train: {dataset_path: [~/a, ~b]}}}\n"
    )
    config = load_config(str(tmp_path / "own.yaml"), ["model.ckpt_path=~/m", "name=~/n"])
    assert config.exp_manager.exp_dir == f"{tmp_path}/runs"
    assert config.model.data.train.dataset_path == (f"{tmp_path}/a", "~b")
    assert (config.model.ckpt_path, config.name) == (f"{tmp_path}/m", "~/n")


def test_every_option_that_is_a_path_takes_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    named = re.compile(r"(_path|_dir|from_pretrained|\.tokenizer|\.version|resume_from_checkpoint)$")
    used = (key for key, option in schema.table().items() if option.status in ("used", "mapped"))
    paths = [key for key in used if named.search(key)]
    assert len(paths) > 12
    for key in paths:
        assert schema.table()[key].value_type.read("~/x") == f"{tmp_path}/x", key
