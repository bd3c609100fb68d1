"""The command line in this process, with the functions it calls replaced; and, for its speed, in another."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

from latentsmith.cli import main
from latentsmith.files.errors import BadInput

COMMANDS = ["demo", "train", "train-vae", "precache", "generate", "convert", "inspect"] + [
    f"{group} {name}"
    for group, names in (("data", "import scenes vocabulary"), ("config", "show validate explain diff"))
    for name in names.split()
]


@pytest.fixture
def call(monkeypatch):
    """call(module, function) replaces latentsmith.MODULE.FUNCTION and returns the list of its calls."""

    def replace(module: str, function: str, error: BaseException | None = None) -> list:
        calls = []

        def recorded(*positional, **keywords):
            calls.append((positional, keywords))
            if error is not None:
                raise error

        mirror = types.ModuleType(f"latentsmith.{module}")
        setattr(mirror, function, recorded)
        monkeypatch.setitem(sys.modules, mirror.__name__, mirror)
        return calls

    return replace


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert "Examples:" in out and f"latentsmith {command}" in out


def test_help_needs_no_torch():
    script = (
        "import sys; from latentsmith.cli import main; main(['--help']); main(['train', '--help']);"
        "print(sorted({'torch', 'lightning', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_config_commands_need_no_torch():
    script = (
        "import sys; from latentsmith.cli import main; assert main(['config', 'validate', 'sd1']) == 0;"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "latentsmith", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0.1.0\n")


def test_train(call):
    calls = call("training.train", "train")
    arguments = ["train", "--config", "sd1", "trainer.precision=bf16", "--init", "a.ckpt", "~model.optim.weight_decay"]
    assert main([*arguments, "--dry-run"]) == 0
    ((config,), keywords) = calls[0]
    assert keywords == {"dry_run": True}
    assert config.trainer.precision == "bf16-mixed" and config.model.ckpt_path == "a.ckpt"
    assert config.model.optim.weight_decay == 0


def test_train_vae_and_precache(call):
    vae, cache = call("training.train_vae", "train_vae"), call("data.precache", "precache")
    assert main(["train-vae", "--config", "demo_vae", "model.seed=1"]) == 0
    assert vae[0][0][0].model.seed == 1
    assert main(["precache", "--config", "demo", "--out", "cache"]) == 0
    assert cache[0][0][1] == Path("cache")


def test_data(tmp_path, capsys):
    scenes, shards = str(tmp_path / "scenes"), str(tmp_path / "shards")
    assert main(["data", "scenes", scenes, "--count", "5", "--seed", "7", "--doodles", "0.5"]) == 0
    assert main(["data", "import", scenes, shards, "--samples-per-shard", "2", "--no-duplicates"]) == 0
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 3
    assert main(["data", "vocabulary", shards, str(tmp_path / "tokenizer"), "--size", "520"]) == 0
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()
    assert main(["data", "import", scenes, str(tmp_path / "large"), "--min-size", "4096", "--max-bad", "3"]) == 2
    assert "4096" in capsys.readouterr().err


def test_generate(call, tmp_path):
    (tmp_path / "prompts.txt").write_text("two\n\n three \n")
    calls = call("inference.generate", "generate")
    arguments = ["generate", "--from", "run", "--out", "o", "--prompts-file", str(tmp_path / "prompts.txt"), "one"]
    assert main([*arguments, "--negative", "blurry", "--height", "64", "--seed", "3"]) == 0
    positional, keywords = calls[0]
    assert positional == ("run", ["one", "two", "three"], Path("o"))
    assert keywords == {"negative_prompt": "blurry", "height": 64, "seed": 3}
    sys.modules["latentsmith.inference.generate"].AXES = {"guidance": "", "steps": ""}
    assert main([*arguments, "--grid", "guidance=1,3", "steps=2", "--vae-tiling", "--prompt-syntax", "webui"]) == 0
    assert calls[1][0] == positional
    assert calls[1][1] == {"grid": ["guidance=1,3", "steps=2"], "vae_tiling": True, "prompt_syntax": "webui"}


def test_convert_inspect_demo(call):
    calls = call("checkpoints.convert", "convert")
    assert main(["convert", "a", "b", "--to", "ldm", "--weights", "raw"]) == 0
    options = {"weights": "raw", "dtype": None, "prediction_type": None, "tokenizer": None, "verify": False}
    assert calls == [((Path("a"), Path("b"), "ldm"), options)]
    assert main(["convert", "a", "b", "--to", "ldm", "--dtype", "bf16", "--prediction-type", "v", "--verify"]) == 0
    assert calls[1][1] == {"weights": "ema", "dtype": "bf16", "prediction_type": "v", "tokenizer": None, "verify": True}
    calls = call("checkpoints.inspect", "inspect")
    assert main(["inspect", "a", "--verify"]) == 0
    assert calls == [(("a",), {"weights": "ema", "verify": True})]
    calls = call("demo.demo", "demo")
    assert main(["demo", "--from-scratch"]) == 0
    assert calls == [((Path("runs/demo"),), {"from_scratch": True})]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (BadInput("a.ckpt: is empty;\n give another"), 2, "latentsmith: a.ckpt: is empty; give another"),
        (RuntimeError("lost\nthe GPU"), 1, "latentsmith: RuntimeError: lost the GPU (--debug shows where)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_one_line_and_a_code(call, capsys, error, code, line):
    call("checkpoints.inspect", "inspect", error)
    assert main(["inspect", "x"]) == code
    assert capsys.readouterr().err == line + "\n"


def test_requeue_passes_through(call):
    call("training.train", "train", SystemExit(75))
    with pytest.raises(SystemExit) as caught:
        main(["train", "--config", "demo"])
    assert caught.value.code == 75


@pytest.mark.parametrize("place", ["first", "last"])
def test_debug_shows_the_traceback(call, capsys, place):
    call("checkpoints.inspect", "inspect", BadInput("wrong"))
    arguments = ["--debug", "inspect", "x"] if place == "first" else ["inspect", "x", "--debug"]
    assert main(arguments) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("train", "--config is missing"),
        ("trian", "No such command 'trian'"),
        ("train --config sd1 --lr 3", "No such option"),
        ("train --config nothing", "nothing: neither a config file nor a preset"),
        ("train --config sd1 model.optim.learing_rate=1", "did you mean model.optim.lr?"),
        ("convert a b --to onnx", "'onnx' is not one of 'diffusers', 'ldm', 'nemo'"),
        ("generate --from run --out o", "no prompt: give one in quotes"),
        ("generate --from run --out o --steps 0 x", "Invalid value for '--steps'"),
        ("generate --from run --out o --prompts-file nowhere.txt", "--prompts-file nowhere.txt: "),
        ("data import", "Missing argument"),
        ("config explain model.optim.learning_rate", "did you mean model.optim.lr?"),
    ],
)
def test_bad_input_is_one_line_and_code_2(capsys, command, expected):
    assert main(command.split()) == 2
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1


def test_config_show_is_yaml_that_gives_the_same_config(capsys, tmp_path):
    from latentsmith.config import load_config

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


def test_options_without_effect_are_named_once_when_training(call, capsys):
    call("training.train", "train")
    assert main(["train", "--config", "demo", "model.use_ema=True"]) == 0
    assert capsys.readouterr().err.endswith("says why): model.use_ema\n")
