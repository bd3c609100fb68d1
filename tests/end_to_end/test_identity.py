"""A run folder is resumed as the run it is, or refused in one line before any of its files changes."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from latentsmith.config import load_config
from latentsmith.files.lock import locked_folder
from latentsmith.files.tensors import open_tensors

from .conftest import VAE


@pytest.fixture(scope="module")
def begun(world):
    """Two runs of two steps: one of images, one of the cache, which begins with given weights. And other parts to
    try: `vae-2`, a copy of the shards, and shards of other samples."""
    init = f"model.unet_config.from_pretrained={world.root}/runs/text"
    made = {
        "images": world.train("images", "begun-images", "trainer.max_steps=2"),
        "cached": world.train("cached", "begun-cached", "trainer.max_steps=2", init),
    }
    world.train("vae", "vae-2", "model.seed=9", "trainer.max_steps=2")
    shutil.copytree(world.root / "shards", world.root / "moved-shards")
    assert world.call("data", "scenes", "ROOT/other-scenes", "--count", 9, "--seed", 5) == 0
    assert world.call("data", "import", "ROOT/other-scenes", "ROOT/other-shards") == 0
    return made


@pytest.fixture
def run(world, begun, request):
    """run(recipe): a copy of a run to resume, under a name of its own."""

    def copy(recipe="images"):
        name = f"{request.node.name.partition('[')[0][5:40]}-{len(list((world.root / 'runs').iterdir()))}"
        shutil.copytree(begun[recipe], world.root / "runs" / name)
        return world.root / "runs" / name

    return copy


def files(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def resume(world, recipe, folder, *overrides):
    init = (f"model.unet_config.from_pretrained={world.root}/runs/text",) if recipe == "cached" else ()
    return world.call(*world.command(recipe, folder.name, "trainer.max_steps=3", *init, *overrides))


def refused(world, capsys, recipe, folder, *overrides):
    """What is printed where a resume is refused, which has to leave every file as it was."""
    before = files(folder)
    capsys.readouterr()
    assert resume(world, recipe, folder, *overrides) == 2
    assert files(folder) == before
    return capsys.readouterr().err


OTHER = [
    ("cached", "model.parameterization=eps", "model.parameterization=v (now eps)"),
    ("cached", "model.scale_factor=0.25", "model.scale_factor=0.5 (now 0.25)"),
    ("cached", "model.linear_end=0.02", "model.linear_end=0.012 (now 0.02)"),
    ("cached", "model.caption_dropout_rate=0.5", "model.caption_dropout_rate=0.25 (now 0.5)"),
    ("cached", "model.seed=8", "model.seed=7 (now 8)"),
    ("cached", "model.min_snr_gamma=5", "model.min_snr_gamma=null (now 5.0)"),
    ("cached", "model.unet_config.dropout=0.1", "model.unet_config.dropout=0.0 (now 0.1)"),
    ("cached", "model.unet_config.channel_mult=[1,1]", "model.unet_config.channel_mult=[1, 2] (now [1, 1])"),
    ("cached", "model.unet_config.from_pretrained=ROOT/runs/cached",
     "model.unet_config.from_pretrained=ROOT/runs/text (now ROOT/runs/cached)"),
    ("images", "model.unet_config.from_pretrained=ROOT/runs/cached",
     "model.unet_config.from_pretrained=null (now ROOT/runs/cached)"),
    ("images", "model.first_stage_config.from_pretrained=ROOT/runs/vae-2",
     "model.first_stage_config.from_pretrained=ROOT/runs/vae (now ROOT/runs/vae-2)"),
    ("images", "model.cond_stage_config.from_pretrained=ROOT/runs/joint", "model.cond_stage_config.from_pretrained="),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "override", "difference"), OTHER, ids=[override for _, override, _ in OTHER])
def test_what_makes_it_another_run_is_refused_by_name(world, run, capsys, recipe, override, difference):
    if "joint" in override:
        world.train("text", "joint", "model.seed=3", "trainer.max_steps=2")
    folder = run(recipe)
    said = refused(world, capsys, recipe, folder, override)
    assert f"{folder}: this run has {difference}".replace("ROOT", str(world.root)) in said and said.count("\n") == 1
    assert f"name a new run (exp_manager.name), which may start from these weights with --init {folder}" in said


def test_what_may_change_is_said_and_done(world, run, capsys):
    folder = run("cached")
    options = ("model.optim.lr=5e-4", "model.micro_batch_size=2", "model.data.num_workers=1")
    assert resume(world, "cached", folder, *options) == 0
    said = capsys.readouterr().out
    assert f"{folder}: resumes with trainer.max_steps=2 (now 3), model.micro_batch_size=4 (now 2), " in said
    assert "model.optim.lr=0.001 (now 0.0005), model.data.num_workers=0 (now 1) and 1 more" in said
    assert f"resuming {folder} at step 2" in said
    assert json.loads((folder / "identity.json").read_text())["options"]["model.optim.lr"] == 5e-4
    capsys.readouterr()
    assert resume(world, "cached", folder, *options, "trainer.max_steps=4", "trainer.precision=bf16") == 0
    said = capsys.readouterr().out
    assert f"{folder}: resumes with trainer.precision=32-true (now bf16-mixed), trainer.max_steps=3 (now 4)\n" in said


def test_other_data_need_a_word(world, run, capsys):
    folder = run()
    assert resume(world, "images", folder, "model.data.train.dataset_path=ROOT/moved-shards") == 0
    other = "model.data.train.dataset_path=ROOT/other-shards"
    said = refused(world, capsys, "images", folder, other)
    assert f"{folder}: this run's data have model.data.train.dataset_path={world.root}/moved-shards (now " in said
    assert "; set it back, or set exp_manager.allow_data_change=true to resume with other data" in said
    said = refused(world, capsys, "images", folder, "model.data.train.augmentations.horizontal_flip=true")
    assert "model.data.train.augmentations.horizontal_flip=null (now true)" in said
    allowed = (other, "exp_manager.allow_data_change=true", "trainer.max_steps=4")
    assert resume(world, "images", folder, *allowed) == 0
    assert f"{folder}: resumes with model.data.train.dataset_path={world.root}/" in capsys.readouterr().out
    assert not load_config(folder / "config.yaml").exp_manager.allow_data_change  # the next start asks again
    assert "this run's data have" in refused(world, capsys, "images", folder, "trainer.max_steps=5")


def test_data_of_the_same_name_and_other_content(world, run, capsys):
    folder, shards = run(), world.root / "shards"
    shards.rename(world.root / "kept-shards")
    try:
        shutil.copytree(world.root / "other-shards", shards)
        said = refused(world, capsys, "images", folder)
        assert f"model.data.train.dataset_path={shards} (now with other content)" in said
        shutil.rmtree(shards)
    finally:
        (world.root / "kept-shards").rename(shards)


def test_an_edited_config_is_no_way_around(world, run, capsys):
    folder = run("cached")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("parameterization: v\n", "parameterization: eps\n"))
    before = files(folder)
    assert world.call("train", "--resume", folder, "trainer.max_steps=3") == 2
    assert files(folder) == before and "this run has model.parameterization=v (now eps)" in capsys.readouterr().err


def test_dry_runs_look_too(world, run, capsys):
    folder = run("cached")
    before = files(folder)
    for command, code in ((("--dry-run",), 0), (("--dry-run", "model.seed=8"), 2)):
        with locked_folder(folder):  # a run is under way
            given = world.command("cached", folder.name, "model.unet_config.from_pretrained=ROOT/runs/text")
            assert world.call(*given, *command) == code
    assert "this run has model.seed=7 (now 8)" in capsys.readouterr().err and files(folder) == before


def test_folders_from_before_the_record(world, run, capsys):
    folder = run()
    (folder / "identity.json").unlink()
    said = refused(world, capsys, "images", folder, "model.seed=8")
    assert "this run has model.seed=7 (now 8)" in said
    said = refused(world, capsys, "images", folder, "model.first_stage_config.from_pretrained=ROOT/runs/vae-2")
    assert "this run has model.first_stage_config.from_pretrained=" in said
    said = refused(world, capsys, "images", folder, "model.data.train.dataset_path=ROOT/other-shards")
    assert "this run's data have model.data.train.dataset_path=" in said
    shutil.copytree(world.root / "tokenizer", world.root / "moved-tokenizer", dirs_exist_ok=True)
    moved = "model.cond_stage_config.tokenizer=ROOT/moved-tokenizer"
    assert resume(world, "images", folder, moved) == 0
    said = capsys.readouterr().out
    assert f"{folder}: has no identity.json, so it was compared by config.yaml and its networks; taken as the " in said
    assert f"same: model.cond_stage_config.tokenizer={world.root}/tokenizer (now" in said
    assert (folder / "identity.json").exists()


def test_a_record_that_is_none_is_named(world, run, capsys):
    folder = run()
    for text, message in (("[]", "holds a list"), ('{"options": 1}', "not the record of a run")):
        (folder / "identity.json").write_text(text)
        assert message in refused(world, capsys, "images", folder)


def test_a_start_without_a_checkpoint_replaces_what_an_earlier_one_left(world, run):
    folder = run()
    shutil.rmtree(folder / "checkpoints")
    assert resume(world, "images", folder, "model.first_stage_config.from_pretrained=ROOT/runs/vae-2") == 0
    kept, given = (
        open_tensors(path)
        for path in (folder / "vae.safetensors", world.newest(world.root / "runs" / "vae-2") / "ema/vae.safetensors")
    )
    assert all((kept[name] == given[name]).all() for name in given)


def test_a_branch_says_how_it_differs(world, begun, capsys):
    start = f"exp_manager.resume_from_checkpoint={begun['images']}/checkpoints/step-00000002"
    world.train("images", "branch-of-begun", start, "trainer.max_steps=3", "model.caption_dropout_rate=0.5")
    said = capsys.readouterr().out
    assert f"begins at a checkpoint of {begun['images']}, which has model.caption_dropout_rate=0.25 (now 0.5), " in said


def test_only_one_process_trains_in_a_folder(world, run, capsys):
    folder = run("cached")
    with locked_folder(folder):
        assert "is writing here; wait until it ends" in refused(world, capsys, "cached", folder)
    assert resume(world, "cached", folder) == 0 and not (folder / ".lock").exists()


@pytest.mark.parametrize("name", ["/proc/x", "ROOT/tiny.yaml/runs"])
def test_a_folder_that_cannot_be_made(world, capsys, name):
    assert world.call(*world.command("cached", "nowhere", f"exp_manager.exp_dir={name}")) == 2
    said = capsys.readouterr().err
    assert f"{name}/nowhere: the folder cannot be made".replace("ROOT", str(world.root)) in said


# ---- What a checkpoint has to hold ----


def without_records(folder):
    """Let a checkpoint alone decide, as one does that a new run begins at."""
    (folder / "identity.json").unlink()
    (folder / "config.yaml").unlink()
    return folder


def test_more_and_fewer_trained_parts(world, run, begun, capsys):
    folder = without_records(run())
    said = refused(world, capsys, "images", folder, "model.cond_stage_trainable=true")
    assert "trains unet, and this config trains text_encoder and unet; set model.cond_stage_trainable=false" in said
    start = "exp_manager.resume_from_checkpoint=ROOT/runs/text/checkpoints/step-00000004"
    assert world.call(*world.command("images", "fewer", start, "trainer.max_steps=6")) == 2
    said = capsys.readouterr().err
    assert "trains text_encoder and unet, and this config trains unet; set model.cond_stage_trainable=true" in said
    assert not (world.root / "runs" / "fewer").exists()


def test_averages_off_and_on(world, run, capsys):
    folder = run("cached")
    assert resume(world, "cached", folder, "exp_manager.ema.enable=false") == 0
    assert "exp_manager.ema.enable=true (now false)" in capsys.readouterr().out
    assert not (folder / "checkpoints" / "step-00000003" / "ema").exists()
    said = refused(world, capsys, "cached", folder, "trainer.max_steps=4")
    assert "holds no averages of unet; set exp_manager.ema.enable=false" in said


def test_another_optimizer(world, run, capsys):
    said = refused(world, capsys, "cached", run("cached"), "model.optim.name=SGD", "model.optim.betas=null")
    assert "its optimizer is fused_adam, and model.optim.name is SGD; set that to fused_adam" in said


def test_another_batch_where_buckets_are_ordered_by_it(world, tmp_path, capsys):
    for number in range(12):
        size = (40, 40) if number % 3 else (60, 30)
        Image.fromarray(np.full((*size[::-1], 3), 20 * number, np.uint8)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"a small red circle {number}")
    assert world.call("data", "import", tmp_path, tmp_path / "shards") == 0
    augmentations = "{aspect_buckets: {resolution: 16, step: 4, max_aspect: 4}, resize_smallest_side: null}"
    options = (
        f"model.data.train.dataset_path={tmp_path}/shards",
        f"model.data.train.augmentations={augmentations}",
        "model.data.train.augmentations.center_crop_h_w=null",
    )
    folder = world.train("images", "batch-of-buckets", *options, "model.micro_batch_size=2", "trainer.max_steps=3")
    smaller = ("model.micro_batch_size=1", "model.global_batch_size=2")
    assert resume(world, "images", folder, *options, *smaller, "trainer.max_steps=4") == 0
    said = refused(world, capsys, "images", folder, *options, "model.micro_batch_size=4", "trainer.max_steps=8")
    assert "samples of a step, by which aspect buckets and filterings are ordered, 2 (now 4); set it back" in said
    said = refused(world, capsys, "images", without_records(folder), *options, "model.micro_batch_size=3",
                   "trainer.max_steps=8")  # fmt: skip
    assert "8 samples are no whole number of steps of 3" in said


def test_the_vae_is_a_run_too(world, capsys):
    folder = world.train("vae", "vae-identity", "trainer.max_steps=1")
    said = refused(world, capsys, "vae", folder, "model.seed=8")
    assert f"{folder}: this run has model.seed=7 (now 8)" in said
    said = refused(world, capsys, "cached", folder, VAE)
    assert "trains vae, and this config trains unet; or name a new run that starts" in said
    assert resume(world, "vae", folder, "trainer.max_steps=2") == 0
