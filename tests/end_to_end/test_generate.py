"""`latentsmith generate` as a user calls it: metadata of images, spellings, sheets, grids, --again, NeMo's file."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from latentsmith.diffusion import samplers
from latentsmith.inference import generate as module
from latentsmith.inference.png import parameters_text, read_metadata
from latentsmith.text.tokenizer import train_vocabulary


@pytest.fixture
def run_generate(world, tmp_path, capsys):
    """Runs the command; its exit code and what it printed."""

    def run(*arguments, out=True):
        given = ("--out", tmp_path / "out") if out else ()
        capsys.readouterr()
        code = world.call("generate", "--from", "ROOT/runs/cached", *given, "--steps", 3, *arguments)
        return code, capsys.readouterr()

    return run


def pixels(path):
    return np.asarray(Image.open(path), dtype=int)


def test_an_image_records_all_that_made_it(run_generate, tmp_path, world):
    assert (
        run_generate("--seed", 7, "--sampler", "DPM++ 2M Karras", "--negative", "blurry", "A Red/../Circle: café?")[0]
        == 0
    )
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == "a-red-circle-caf-seed7.png"
    made = read_metadata(path)
    assert (made["prompt"], made["negative_prompt"], made["seed"]) == ("A Red/../Circle: café?", "blurry", 7)
    assert made["options"]["sampler"] == "DPM++ 2M Karras" and made["sampler"] == "dpmsolver++"
    assert made["model"]["averaged"] and made["model"]["prediction_type"] == "v_prediction"
    assert len(made["model"]["hash"]) == 64 and made["versions"].keys() == {"latentsmith", "torch", "python"}
    lines = Image.open(path).info["parameters"].split("\n")
    assert lines[:2] == ["A Red/../Circle: café?", "Negative prompt: blurry"]
    assert lines[2].startswith(
        "Steps: 3, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 7, Size: 16x16, "
    )
    assert f"Model hash: {made['model']['hash'][:10]}" in lines[2]


def test_habits_of_other_programs(world, tmp_path, capsys, monkeypatch):
    """A model as first word, short and foreign spellings, a folder by default, a random seed that is printed."""
    monkeypatch.chdir(tmp_path)
    arguments = ("ROOT/runs/cached", "a red circle", "--steps", 2, "--cfg", 3, "-n", 2, "--size", "24x16", "--seed", -1)
    assert world.call("generate", *arguments, "--negative-prompt", "blurry", "--prompt", "a blue square") == 0
    printed = capsys.readouterr().out
    seed = int(printed.split("\n")[0].removeprefix("seed "))
    made = [read_metadata(path) for path in sorted((tmp_path / "images").iterdir())]
    assert sorted((one["prompt"], one["seed"]) for one in made) == [
        (prompt, seed + i) for prompt in ("a blue square", "a red circle") for i in (0, 1)
    ]
    assert {(one["guidance_scale"], one["negative_prompt"]) for one in made} == {(3.0, "blurry")}
    assert {(one["options"]["width"], one["options"]["height"]) for one in made} == {(24, 16)}
    arguments = (
        "--model",
        "ROOT/runs/cached",
        "--output",
        tmp_path / "o",
        "-W",
        24,
        "-H",
        16,
        "--num-inference-steps",
        2,
    )
    assert world.call("generate", *arguments, "a") == 0
    assert Image.open(tmp_path / "o" / "a-seed0.png").size == (24, 16)
    assert world.call("generate", "ROOT/runs/cached") == 2
    assert "no prompt" in capsys.readouterr().err
    assert world.call("generate", "ROOT/runs/cached", "a", "--size", "24") == 2
    assert "--size 24: give WIDTHxHEIGHT" in capsys.readouterr().err


def test_names_never_collide(run_generate, tmp_path):
    assert run_generate("a", "A", "a!", "--count", 2)[0] == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"a-seed{seed}{end}.png" for seed in (0, 1) for end in ("", "-2", "-3")] or len(set(names)) == 6


def test_again_is_the_same_image(run_generate, tmp_path, world, capsys):
    source, mask = Image.new("RGB", (16, 16), "teal"), Image.new("L", (16, 16))
    mask.paste(255, (4, 4, 16, 16))
    source.save(tmp_path / "source.png")
    mask.save(tmp_path / "mask.png")
    options = ("--image", tmp_path / "source.png", "--mask", tmp_path / "mask.png", "--strength", 0.7)
    options += ("--guidance-scale", 3, "--guidance-rescale", 0.5, "--variation-seed", 4, "--variation-strength", 0.3)
    assert run_generate(*options, "--sampler", "euler_a", "a red circle")[0] == 0
    (path,) = (tmp_path / "out").iterdir()
    assert (pixels(path)[:4, :4] == pixels(tmp_path / "source.png")[:4, :4]).all()
    code = world.call("generate", "--again", path, "--out", tmp_path / "again")
    assert code == 0 and "the same, pixel for pixel" in capsys.readouterr().out
    (tmp_path / "source.png").rename(tmp_path / "moved.png")
    moved = ("--image", tmp_path / "moved.png")
    assert world.call("generate", "--again", path, "--out", tmp_path / "again", *moved) == 0
    capsys.readouterr()
    assert world.call("generate", "--again", path, "--steps", 4) == 2
    assert "--again takes all from the image; --steps cannot be given with it" in capsys.readouterr().err
    # another checkpoint of the run: said, and the images differ
    steps = sorted((world.root / "runs" / "cached" / "checkpoints").iterdir())
    code = world.call("generate", "--again", path, "--out", tmp_path / "other", "--from", steps[0], *moved)
    printed = capsys.readouterr().out
    assert code == 1 and "model hash: " in printed and "of the pixels differ" in printed
    (tmp_path / "plain.png").write_bytes((tmp_path / "moved.png").read_bytes())
    assert world.call("generate", "--again", tmp_path / "plain.png") == 2
    assert "plain.png: does not record how it was made" in capsys.readouterr().err


def test_a_grid_has_labelled_axes(run_generate, tmp_path):
    code, printed = run_generate("--grid", "guidance=1,3,7", "steps=2,4", "a red circle")
    assert code == 0 and "grid.png: contact sheet" in printed.out
    made = [read_metadata(path) for path in (tmp_path / "out").glob("a-red*.png")]
    cells = sorted((one["guidance_scale"], one["options"]["num_inference_steps"]) for one in made)
    assert cells == [(scale, steps) for scale in (1.0, 3.0, 7.0) for steps in (2, 4)]
    sheet = np.asarray(Image.open(tmp_path / "out" / "grid.png"))
    assert sheet.shape[0] > 2 * 128 and sheet.shape[1] > 3 * 128
    where = {(one["guidance_scale"], one["options"]["num_inference_steps"]): path
             for path in (tmp_path / "out").glob("a-red*.png") for one in [read_metadata(path)]}  # fmt: skip
    last = Image.open(where[7.0, 4]).resize((128, 128), Image.Resampling.LANCZOS)
    corner = sheet[-136:-8]  # the lower right cell
    found = [x for x in range(corner.shape[1] - 128) if (corner[:, x : x + 128] == np.asarray(last)).all()]
    assert found and found[0] > 2 * 128


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--grid", "colour=1,2", "a"), "--grid colour=1,2: give NAME=VALUE,VALUE,..., NAME one of "),
        (("--grid", "steps=1.5", "a"), "steps takes whole numbers"),
        (("--grid", "steps=1", "guidance=1", "eta=0", "a"), "a grid has one or two axes, not 3"),
        (("--mask", "ROOT/tiny.yaml", "a"), "tiny.yaml: cannot be read as an image"),
        (("--guidance-scale", "nan", "a"), "guidance_scale is nan"),
        ((), "no prompt"),
        (("--dtype", "int8", "a"), "int8"),
        (("--device", "gpu", "a"), "device gpu: "),
        (("--prediction-type", "foo", "a"), "foo"),
        (("--seed", 2**64, "a"), "--seed"),
        (("--grid", "guidance=1", "guidance_scale=2", "a"), "give each option once"),
        (("--grid", "strength=0.5,0.7", "a"), "needs an image to start from"),
    ],
)
def test_what_is_wrong_is_one_line(run_generate, tmp_path, arguments, line):
    code, printed = run_generate(*arguments)
    assert code == 2 and line in printed.err and printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file(run_generate, tmp_path):
    (tmp_path / "out").write_text("mine")
    code, printed = run_generate("a")
    assert code == 2 and "out: is a file, not a folder to write images to" in printed.err
    assert (tmp_path / "out").read_text() == "mine"


def test_seeds_on_an_axis(run_generate, tmp_path):
    assert run_generate("--grid", "seed=1,5", "--count", 2, "a")[0] == 0
    assert {path.name for path in (tmp_path / "out").glob("a-*")} == {f"a-seed{n}.png" for n in (1, 2, 5, 6)}


def test_a_tokenizer_that_does_not_fit(run_generate, tmp_path):
    caption = "many different words, none of them shorter than those before, and more of them"
    train_vocabulary([caption], 700, tmp_path / "tokenizer")
    code, printed = run_generate("--tokenizer", tmp_path / "tokenizer", "a")
    assert code == 2 and "the tokenizer found has" in printed.err


def test_one_process_of_several_says_so(run_generate, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, printed = run_generate("a", "b", "c")
    assert code == 0 and "1 images, share 2 of 2" in printed.out
    assert "share 2 of 2: the environment says that this is process 1 of 2" in printed.out
    assert run_generate("--sheet", "a", "b")[0] == 2
    for rank, processes in [("2", "2"), ("-1", "2"), ("0", "0"), ("x", "2"), ("", "2")]:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", processes)
        code, printed = run_generate("a")
        assert code == 2 and f"RANK={rank}, WORLD_SIZE={processes}: " in printed.err
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("RANK", "1")
    assert run_generate("a")[0] == 2
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("SLURM_PROCID", "0")  # a batch script, not srun
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert "3 images\n" in run_generate("a", "b", "c")[1].out


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("batch_size", "0", "infer.batch_size must be a whole number of at least 1"),
        ("inference_steps", "2.5", "infer.inference_steps must be a whole number"),
        ("seed", "abc", "infer.seed must be a whole number"),
        ("unconditional_guidance_scale", "high", "infer.unconditional_guidance_scale must be a number"),
        ("prompts", "{a: b}", "infer.prompts must be"),
    ],
)
def test_values_of_an_inference_file(tmp_path, world, capsys, key, value, line):
    infer = {"out_path": "x", "prompts": "[a]", key: value}
    text = ", ".join(f"{name}: {given}" for name, given in infer.items())
    (tmp_path / "i.yaml").write_text(f"infer: {{{text}}}")
    assert world.call("generate", "--config", tmp_path / "i.yaml", "--from", "ROOT/runs/cached") == 2
    assert line in capsys.readouterr().err


def test_sheet_and_preview(run_generate, tmp_path):
    assert run_generate("--sheet", "--preview", tmp_path / "preview.png", "a", "b", "--count", 2)[0] == 0
    assert Image.open(tmp_path / "out" / "sheet.png").width > 4 * 16
    assert Image.open(tmp_path / "preview.png").size == (4 * 16, 16)
    code, printed = run_generate("--preview", tmp_path / "preview.jpg", "a")
    assert code == 2 and "preview.jpg: a preview is a PNG; let its name end in .png" in printed.err


def test_ctrl_c_keeps_what_is_done(run_generate, tmp_path, monkeypatch):
    save, saved = module.save_image, []

    def interrupted(*given):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(save(*given))
        return saved[-1]

    monkeypatch.setattr(module, "save_image", interrupted)
    code, printed = run_generate("a", "b", "c", "--batch-size", 1)
    assert code == 130 and "2 of 3 images, kept" in printed.out
    assert sorted((tmp_path / "out").iterdir()) == sorted(saved)


def test_nemos_inference_file(world, tmp_path, capsys):
    (tmp_path / "sd_infer.yaml").write_text(
        """
name: stable-diffusion-train
infer:
  unconditional_guidance_scale: 3
  num_images_per_prompt: 2
  batch_size: 8
  height: 16
  width: 16
  down_factor: 8
  inference_steps: 3
  sampler_type: 'DDIM'
  eta: 0.5
  output_type: 'pil'
  save_to_file: True
  out_path: OUT
  seed: 123
  prompts: ['a red circle', 'a blue square']
trainer: {devices: 1, num_nodes: 1, accelerator: gpu, precision: 32, logger: False}
model: {restore_from_path: RUN, precision: '${trainer.precision}'}
""".replace("OUT", str(tmp_path / "out")).replace("RUN", str(world.root / "runs" / "cached"))
    )
    assert world.call("generate", "--config", tmp_path / "sd_infer.yaml") == 0
    made = [read_metadata(path) for path in sorted((tmp_path / "out").iterdir())]
    assert sorted((one["prompt"], one["seed"]) for one in made) == [
        (prompt, seed) for prompt in ("a blue square", "a red circle") for seed in (123, 124)
    ]
    assert made[0]["options"]["eta"] == 0.5 and made[0]["sampler"] == "ddim"
    assert world.call("generate", "--config", tmp_path / "sd_infer.yaml", "--seed", 5, "--count", 1, "a cat") == 0
    assert (tmp_path / "out" / "a-cat-seed5.png").is_file()  # what is given goes first
    capsys.readouterr()
    changes = ["infer.seed=50", "infer.prompts=[a fox]", "infer.num_images_per_prompt=1"]
    assert world.call("generate", "--config", tmp_path / "sd_infer.yaml", *changes) == 0
    assert (tmp_path / "out" / "a-fox-seed50.png").is_file()
    assert "without effect here" in capsys.readouterr().err
    text = (tmp_path / "sd_infer.yaml").read_text()
    (tmp_path / "typo.yaml").write_text(text.replace("inference_steps", "inferense_steps"))
    capsys.readouterr()
    assert world.call("generate", "--config", tmp_path / "typo.yaml") == 2
    assert "infer.inferense_steps is not an option; did you mean infer.inference_steps?" in capsys.readouterr().err


def test_nemos_file_of_captions(world, tmp_path, capsys, monkeypatch):
    """A folder for each guidance scale; images that exist are kept, and refused if other options made them."""
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "b.txt").write_text("a blue square\n\na red square\n")
    (tmp_path / "captions" / "a.txt").write_text("a red circle\n")
    text = """
fid: {classifier_free_guidance: [1.5, 3], num_images_to_eval: COUNT, coco_captions_path: CAPTIONS, save_path: OUT}
infer: {inference_steps: 2, sampler_type: PLMS, seed: 7, batch_size: 2, out_path: '${fid.save_path}', prompts: null}
model: {restore_from_path: RUN}
"""
    for name, value in {"CAPTIONS": tmp_path / "captions", "OUT": tmp_path / "out", "RUN": "ROOT/runs/cached"}.items():
        text = text.replace(name, str(value).replace("ROOT", str(world.root)))
    file = tmp_path / "fid.yaml"
    file.write_text(text.replace("COUNT", "3"))
    assert world.call("generate", "--config", file) == 0
    images = sorted((tmp_path / "out").rglob("*.png"))
    assert [str(path.relative_to(tmp_path / "out")) for path in images] == [
        f"{scale}/image00000{number}.png" for scale in ("1.5", "3") for number in range(3)
    ]
    made = [read_metadata(path) for path in images]
    assert [(one["prompt"], one["seed"], one["guidance_scale"]) for one in made[:4]] == [
        ("a red circle", 7, 1.5), ("a blue square", 8, 1.5), ("a red square", 9, 1.5), ("a red circle", 7, 3),
    ]  # fmt: skip
    times = {path: path.stat().st_mtime_ns for path in images}
    images[1].unlink()
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    capsys.readouterr()
    assert world.call("generate", "--config", file) == 0
    assert "2 of 3 images exist already" in capsys.readouterr().out
    assert {path for path in images if path.stat().st_mtime_ns != times[path]} == {images[1]}
    assert world.call("generate", "--config", file, "--steps", 3) == 2
    assert "image000000.png: made before with another num_inference_steps" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert world.call("generate", "--config", file) == 2
    assert "has 2 scales" in capsys.readouterr().err
    file.write_text(text.replace("COUNT", "4"))
    assert world.call("generate", "--config", file) == 2
    assert "holds 3 captions, fewer than fid.num_images_to_eval=4" in capsys.readouterr().err


def test_processes_share_the_work(world, tmp_path):
    """Two processes make what one makes, and no image twice."""
    prompts = ["a red circle", "a blue square", "a red square"]
    arguments = [
        sys.executable,
        "-m",
        "latentsmith",
        "generate",
        "--from",
        str(world.root / "runs" / "cached"),
        "--steps",
        "2",
    ]
    runs = []
    for rank in (0, 1):
        env = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        runs.append(subprocess.Popen([*arguments, "--out", str(tmp_path / "two"), *prompts], env=env))
    assert [run.wait() for run in runs] == [0, 0]
    assert world.call(*arguments[3:], "--out", tmp_path / "one", *prompts) == 0
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir()) and len(names) == 3
    assert all(abs(pixels(tmp_path / "one" / name) - pixels(tmp_path / "two" / name)).max() <= 1 for name in names)


def test_parameters_of_any_prompt_survive(tmp_path):
    options = dict(
        num_inference_steps=1, sampler="ddim", strength=0.75, eta=0.0, prompt_syntax="plain", timestep_spacing=None,
        guidance_rescale=0.0,
    )  # fmt: skip
    made = dict(
        prompt="日本 🐈\nsecond (line)", negative_prompt=None, seed=1, guidance_scale=1.0,
        variation_strength=0.0, variation_seed=0, sampler="ddim", image=None,
        options=options, model={"hash": "ab" * 32, "from": "a,b.ckpt"}, versions={"latentsmith": "0"},
    )  # fmt: skip
    path = module.save_image(Image.new("RGB", (8, 8)), tmp_path, made)
    assert path.name == "second-line-seed1.png"
    assert Image.open(path).info["parameters"] == (
        "日本 🐈 second \\(line\\)\nSteps: 1, Sampler: DDIM, Schedule type: Uniform, CFG scale: 1.0, "
        'Seed: 1, Size: 8x8, Model hash: ababababab, Model: "a,b", RNG: CPU, Version: latentsmith 0'
    )
    assert json.loads(Image.open(path).info["latentsmith"]) == made
    made["options"]["prompt_syntax"] = "webui"
    assert parameters_text(made | {"prompt": "(a:1.2)"}, (8, 8)).startswith("(a:1.2)\n")
    for name, value in [
        ("prompt", "a cat\nSteps: 5, Seed: 1"), ("prompt", "Negative prompt: a"), ("prompt", "a BREAK b"),
        ("negative_prompt", "x\nNegative prompt:"), ("negative_prompt", "<lora:x:1>"),
    ]:  # fmt: skip
        with pytest.warns(UserWarning, match="is not written for web UIs, which would misread it"):
            path = module.save_image(Image.new("RGB", (8, 8)), tmp_path, made | {name: value})
        assert "parameters" not in Image.open(path).info and "latentsmith" in Image.open(path).info


def test_a_sampler_added_as_contributing_says_is_saved(run_generate, tmp_path):
    register = samplers.register("mine", samplers.EVERY_SIGMA, "Mine", ["k_mine"])
    register(samplers.sample_euler)
    try:
        assert run_generate("--sampler", "k_mine", "a")[0] == 0
    finally:
        del samplers.SAMPLERS["mine"]
    (path,) = (tmp_path / "out").iterdir()
    assert read_metadata(path)["sampler"] == "mine" and "Sampler: Mine," in Image.open(path).info["parameters"]
