"""The command line in this process, on tiny fixtures: what commands print, write and return."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from latentsmith.cli import main
from latentsmith.cli.main import exit_code
from latentsmith.config import load_config
from latentsmith.files.errors import BadInput, Stopped

COMMANDS = ["demo", "train", "train-vae", "precache", "generate", "convert", "inspect"] + [
    f"{group} {name}"
    for group, names in (("data", "import scenes vocabulary"), ("config", "show validate explain migrate diff"))
    for name in names.split()
]
TINY = {  # a U-Net of 32 channels on noise: no files, no other networks
    "name": "tiny",
    "trainer": {"max_steps": 2, "accelerator": "cpu"},
    "model": {
        "first_stage_key": "image_encoded",
        "cond_stage_key": "captions_encoded",
        "image_size": 8,
        "unet_config": {
            "model_channels": 32,
            "channel_mult": [1],
            "attention_resolutions": [1],
            "num_res_blocks": 1,
            "context_dim": 768,
        },
        "data": {"synthetic_data": True, "synthetic_data_length": 8},
    },
}


@pytest.fixture
def tiny(tmp_path):
    """The path of a config that trains without any file; its runs go to `runs` beside it."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "exp_manager": {"exp_dir": str(tmp_path / "runs")}}))
    return str(path)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    assert main(["data", "scenes", str(folder / "scenes"), "--count", "5", "--seed", "7"]) == 0
    options = ["--samples-per-shard", "2", "--no-duplicates"]
    assert main(["data", "import", str(folder / "scenes"), str(folder / "shards"), *options]) == 0
    return folder / "shards"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert "Examples:" in out and f"latentsmith {command}" in out


@pytest.mark.parametrize("command", ["--help", "train --help", "config validate sd1", "config explain model"])
def test_what_runs_nothing_imports_nothing_heavy(command):
    script = (
        f"import sys; from latentsmith.cli import main; assert main({command.split()!r}) == 0;"
        "print(sorted({'torch', 'lightning', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "latentsmith", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0.1.0\n")


def test_train_dry_run(tiny, tmp_path, capsys):
    assert main(["train", "--config", tiny, "model.micro_batch_size=4", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "unet: " in out and "8 samples of noise" in out and "2 steps of 4" in out
    assert not (tmp_path / "runs").exists()


def test_the_first_word_can_be_the_config(tiny, capsys):
    assert main(["train", tiny, "model.micro_batch_size=4", "--dry-run"]) == 0
    assert "2 steps of 4" in capsys.readouterr().out
    assert main(["train", "sd1", "trainer.precision=fp16", "trainer.max_steps=", "--dry-run"]) == 2
    assert main(["train", "model.seed=1"]) == 2
    assert "--config is missing" in capsys.readouterr().err


def test_resume_continues_a_run_folder_that_has_moved(tiny, tmp_path, capsys):
    assert main(["train", tiny, "trainer.enable_progress_bar=false"]) == 0
    moved = (tmp_path / "runs" / "tiny").rename(tmp_path / "moved")
    keys = ["trainer.enable_progress_bar=false", "trainer.max_steps=3"]
    assert main(["train", "--resume", str(moved), *keys]) == 0
    assert sorted(path.name for path in (moved / "checkpoints").iterdir())[-1] == "step-00000003"
    assert load_config(moved / "config.yaml").trainer.max_steps == 3 and not (tmp_path / "runs" / "tiny").exists()
    for command, line in (
        (["--resume", str(tmp_path / "runs")], "is not a run folder; it has no config.yaml"),
        (["--resume", str(moved), "sd1"], "takes the run's own config; leave out sd1"),
    ):
        assert main(["train", *command]) == 2
        assert line in capsys.readouterr().err


def test_init_is_the_checkpoint_to_start_from(tiny, capsys):
    assert main(["train", "--config", tiny, "--init", "nowhere.ckpt", "--dry-run"]) == 2
    assert "nowhere.ckpt: no such file" in capsys.readouterr().err


def test_multirun_is_a_run_for_each_value(tiny, capsys):
    assert main(["train", "--config", tiny, "--multirun", "model.optim.lr=1e-3,1e-4", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("tiny")] == ["tiny-lr0.001:", "tiny-lr0.0001:"]


def test_train_vae_dry_run(shards, tmp_path, capsys):
    keys = [f"model.data.train.dataset_path={shards}", f"exp_manager.exp_dir={tmp_path}", "trainer.accelerator=cpu"]
    assert main(["train-vae", "--config", "demo_vae", *keys, "--dry-run"]) == 0
    assert "5 " in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_precache_asks_for_weights(shards, tmp_path, capsys):
    keys = [f"model.data.train.dataset_path={shards}", "model.first_stage_config.from_pretrained=null"]
    assert main(["precache", "--config", "demo", "--out", str(tmp_path / "cache"), *keys]) == 2
    assert "model.first_stage_config.from_pretrained is not set" in capsys.readouterr().err


def test_data(shards, tmp_path, capsys):
    assert len(list(shards.glob("*.tar"))) == 3
    assert main(["data", "vocabulary", str(shards), str(tmp_path / "tokenizer"), "--size", "520"]) == 0
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()
    scenes = str(shards.parent / "scenes")
    assert main(["data", "import", scenes, str(tmp_path / "large"), "--min-size", "4096", "--max-bad", "3"]) == 2
    assert "4096" in capsys.readouterr().err


def test_inspect_verifies(shards, tmp_path, capsys):
    assert main(["inspect", str(shards), "--verify"]) == 0
    out = capsys.readouterr().out
    assert "5 " in out and "verified: " in out
    first = min(shards.glob("*.tar"))
    whole = first.read_bytes()
    first.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    assert main(["inspect", str(shards), "--verify"]) == 1
    assert f"damaged: {first}" in capsys.readouterr().out
    first.write_bytes(whole)


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (BadInput("a.ckpt: is empty;\n give another"), 2, "latentsmith: a.ckpt: is empty; give another"),
        (RuntimeError("lost\nthe GPU"), 1, "latentsmith: RuntimeError: lost the GPU (--debug shows where)"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Stopped("asks to be queued again", 75), 75, "latentsmith: asks to be queued again"),
    ],
)
def test_errors_are_one_line_and_a_code(capsys, error, code, line):
    assert exit_code(raising(error)) == code
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize("position", ["first", "last"])
def test_debug_shows_the_traceback(capsys, position):
    arguments = ["--debug", "inspect", "nowhere"] if position == "first" else ["inspect", "nowhere", "--debug"]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("latentsmith: nowhere: ")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("train", "--config is missing"),
        ("trian", "No such command 'trian'"),
        ("train --config sd1 --zzz 3", "No such option"),
        ("train --config sd1 --learning_rate 1e-5", "--learning_rate: use model.optim.lr=1e-5"),
        ("train --config sd1 --batch-size=4", "--batch-size: use model.micro_batch_size=4"),
        ("train --config sd1 --gradient-checkpointing", "use model.unet_config.use_checkpoint=VALUE"),
        ("train-vae --config sd1 --max_train_steps 10", "--max_train_steps: use trainer.max_steps=10"),
        ("inspect x --lr 3", "No such option"),
        ("train --config nothing", "nothing: neither a config file nor a preset"),
        ("train --config sd1 model.optim.learing_rate=1", "did you mean model.optim.lr?"),
        ("convert a b --to onnx", "'onnx' is not one of diffusers, ldm, nemo"),
        ("generate --from run --out o", "no prompt: give one in quotes"),
        ("generate --from run --out o --steps 0 x", "Invalid value for '--steps'"),
        ("generate --from run --out o --prompts-file nowhere.txt", "--prompts-file nowhere.txt: "),
        ("inspect nowhere", "nowhere: "),
        ("data import", "Missing argument"),
        ("config explain model.optim.learning_rate", "did you mean model.optim.lr?"),
    ],
)
def test_bad_input_is_one_line_and_code_2(capsys, command, expected):
    assert main(command.split()) == 2
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1


def test_config_show_is_yaml_that_gives_the_same_config(capsys, tmp_path):
    assert main(["config", "show", "sd2_v", "model.seed=5", "exp_manager.exp_dir=~/x: #y"]) == 0
    out = capsys.readouterr().out
    (tmp_path / "shown.yaml").write_text(out)
    assert load_config(tmp_path / "shown.yaml") == load_config(
        "sd2_v", ["model.seed=5", "exp_manager.exp_dir='~/x: #y'"]
    )
    lines = dict(line.strip().split("  # ") for line in out.splitlines() if "  # " in line)
    assert lines["seed: 5"] == "command line" and lines["parameterization: v"] == "sd2_v.yaml"
    assert lines["context_dim: 1024"] == "sd2_base.yaml" and lines["beta_schedule: linear"] == "default"
    assert lines["arch: ViT-H-14"] == "follows from other options"


def test_config_validate_explain_diff(capsys):
    assert main(["config", "validate", "sd1", "model.use_ema=True", "trainer.accelerator=gpu"]) == 0
    assert capsys.readouterr().out == "model.use_ema has no effect here: exp_manager.ema decides\nsd1 is valid\n"
    assert main(["config", "explain", "model.optim.lr"]) == 0
    assert "default  0.0001" in capsys.readouterr().out
    assert main(["config", "diff", "sd1", "sd1"]) == 0
    assert capsys.readouterr().out == ""


def test_options_without_effect_are_named_once_when_training(tiny, capsys):
    assert main(["train", "--config", tiny, "model.use_ema=True", "--dry-run"]) == 0
    assert capsys.readouterr().err.endswith("says why): model.use_ema\n")


def run_process(*words, **options):
    return subprocess.run([sys.executable, "-m", "latentsmith", *map(str, words)], timeout=600, **options)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_log_that_cannot_be_written_does_not_end_a_training(tiny, tmp_path):
    with open("/dev/full", "w") as full:
        done = run_process("train", "--config", tiny, stdout=full, stderr=full)
        assert done.returncode == 0
        assert (tmp_path / "runs/tiny/checkpoints/step-00000002/state.json").exists()
        assert run_process("config", "show", "sd1", stdout=full, stderr=subprocess.PIPE).returncode == 1


def test_a_reader_that_has_gone_does_not_end_a_training(tiny, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    assert run_process("train", "--config", tiny, stdout=writer, stderr=writer).returncode == 0
    os.close(writer)
    assert (tmp_path / "runs/tiny/checkpoints/step-00000002/state.json").exists()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path, encoding):
    folder = tmp_path / "ü 日本"
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = run_process("data", "scenes", folder, "--count", "2", env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "\\u65e5\\u672c" in done.stdout.decode(encoding)
