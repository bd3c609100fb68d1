"""What a user gets wrong costs one line and exit code 2, before anything is trained or drawn."""

import shutil

import pytest

DATA = "model.data.train.dataset_path"
VAE, TEXT, UNET = "model.first_stage_config", "model.cond_stage_config", "model.unet_config"
SAMPLES, MANAGER = "exp_manager.sample_images", "exp_manager"
WRONG = {  # recipe, overrides, what the line says
    "unknown key": (
        "cached",
        ["model.optim.learning_rat=1"],
        "model.optim.learning_rat is not an option; did you mean model.optim.lr?",
    ),
    "wrong type": ("cached", ["trainer.max_steps=many"], "trainer.max_steps must be a whole number"),
    "no end": ("cached", ["trainer.max_steps=-1"], "trainer.max_steps and max_epochs are both unlimited"),
    "batch does not divide": ("cached", ["model.global_batch_size=6"], "model.global_batch_size=6"),
    "no GPU": ("cached", ["trainer.accelerator=cuda"], "trainer.accelerator=cuda: this machine has none"),
    "half precision on a CPU": ("cached", ["trainer.precision=16"], "trainer.precision=16-mixed needs a GPU"),
    "no set": ("cached", [f"{DATA}=null"], f"{DATA} is not set"),
    "set gone": ("cached", [f"{DATA}=ROOT/nowhere"], "nowhere: no such folder or tar"),
    "images for latents": ("cached", [f"{DATA}=ROOT/shards"], "shards: not a latent cache"),
    "latents for images": ("images", [f"{DATA}=ROOT/cache"], "holds no images; set model.first_stage_key=image_"),
    "captions not cached": ("cached", [f"{DATA}=ROOT/latents"], "holds no captions_encoded, only image_encoded"),
    "size does not divide": (
        "images",
        ['model.data.train.augmentations.center_crop_h_w="15, 16"'],
        "images of 15x16 do not divide by 2",
    ),
    "no VAE": ("images", [f"{VAE}.from_pretrained=null"], f"{VAE}.from_pretrained is not set"),
    "VAE gone": ("images", [f"{VAE}.from_pretrained=ROOT/gone"], "gone: no such file"),
    "VAE of another size": ("images", [f"{VAE}.ddconfig.ch=16"], "runs/vae"),
    "loss that trains nothing": ("vae", [f"{VAE}.lossconfig={{_target_: torch.nn.Identity}}"], "which trains nothing"),
    "no text encoder": ("images", [f"{TEXT}.from_pretrained=null"], f"{TEXT}.from_pretrained is not set"),
    "text encoder without sizes": ("text", [f"{TEXT}.heads=null"], "heads missing"),
    "text encoder learns, captions cached": (
        "cached",
        ["model.cond_stage_trainable=true"],
        "model.cond_stage_trainable=True needs captions",
    ),
    "tokenizer too large": ("text", [f"{TEXT}.vocab_size=530"], f"540 tokens, {TEXT[6:]}.vocab_size is 530"),
    "no such tokenizer": ("text", [f"{TEXT}.tokenizer=ROOT/nowhere"], "nowhere"),
    "no such sampler": (
        "cached",
        [f"{SAMPLES}.every_n_train_steps=2", f"{SAMPLES}.prompts=[x]", f"{SAMPLES}.sampler=eular"],
        "eular",
    ),
    "paged moments on a CPU": ("cached", ["model.optim.name=paged_adamw"], "without CUDA take fused_adam"),
    "8-bit moments, channels last": (
        "cached",
        ["model.optim.name=adamw8bit", "model.channels_last=true"],
        "set model.channels_last=false",
    ),
    "8-bit moments of shards": (
        "cached",
        ["model.optim.name=adamw8bit", "trainer.strategy=model_parallel"],
        "bitsandbytes knows no sharded weights",
    ),
    "CUDA graphs on a CPU": (
        "cached",
        ["model.inductor=true", "model.inductor_cudagraphs=true"],
        "model.inductor_cudagraphs=True works with model.inductor=True, on a CUDA GPU",
    ),
    "weights of one set": ("cached", ["model.data.train.weights=[1]"], "mixes the sets of a list"),
    "no such strategy": (
        "cached",
        ["trainer.strategy=bogus"],
        "trainer.strategy=bogus is not one to save and",
    ),
    "no such time": ("cached", ["trainer.max_time=soon"], "trainer.max_time=soon is not a time as DD:HH:MM:SS"),
    "NeMo's list of tars": ("cached", [f"{DATA}=[ROOT/wdinfo.pkl]"], "wdinfo.pkl: No such file"),
    "nothing to resume": ("cached", [f"{MANAGER}.resume_ignore_no_checkpoint=false"], "no checkpoint to resume from"),
    "resume from a set": ("cached", [f"{MANAGER}.resume_from_checkpoint=ROOT/shards"], "not a checkpoint of a run"),
    "start from a set": ("images", ["model.ckpt_path=ROOT/shards", f"{VAE}.from_pretrained=null"], "shards"),
}


def one_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.startswith("latentsmith: ") and err.count("\n") == 1 and len(err) < 500, err
    return err


@pytest.mark.parametrize("case", WRONG)
def test_training_says_what_is_wrong(world, capsys, case):
    recipe, overrides, expected = WRONG[case]
    assert world.call(*world.command(recipe, "wrong", *overrides)) == 2
    assert expected in one_line(capsys)
    assert not (world.root / "runs" / "wrong" / "metrics.csv").exists()
    assert not (world.root / "runs" / "wrong" / "checkpoints").exists()


@pytest.mark.parametrize("case", WRONG)
def test_a_dry_run_says_it_too(world, capsys, case):
    recipe, overrides, expected = WRONG[case]
    if recipe == "vae":
        pytest.skip("a VAE's training has no dry run")
    assert world.call(*world.command(recipe, "wrong-dry", *overrides), "--dry-run") == 2
    assert expected in one_line(capsys)


def test_eight_bit_moments_without_the_library(world, capsys, monkeypatch):
    monkeypatch.setattr("latentsmith.training.optimizers.find_spec", lambda name: None)
    assert world.call(*world.command("cached", "wrong", "model.optim.name=adamw8bit")) == 2
    assert "pip install 'latentsmith[optimizers]'" in one_line(capsys)


def test_a_cache_whose_latents_do_not_fit(world, capsys):
    """A VAE with 6 channels of latents, whose U-Net takes 6: the cache has moments of 4."""
    six = (
        "model.first_stage_config.embed_dim=6",
        "model.unet_config.in_channels=6",
        "model.unet_config.out_channels=6",
    )
    no_vae = "model.first_stage_config.from_pretrained=null"
    assert world.call(*world.command("cached", "wrong", *six, no_vae)) == 2
    line = one_line(capsys)
    assert "image_encoded has shape (8, 8, 8)" in line and "unet_config.in_channels wants 12 at axis 0" in line


def test_a_cache_whose_embeddings_do_not_fit(world, capsys):
    wide = (f"{UNET}.context_dim=64", f"{TEXT}.width=64", f"{TEXT}.from_pretrained=null")
    assert world.call(*world.command("cached", "wrong", *wide)) == 2
    line = one_line(capsys)
    assert "captions_encoded has shape (40, 32)" in line and "unet_config.context_dim wants 64 at axis 1" in line


def test_a_cache_made_by_another_vae(world, capsys):
    other = world.train("vae", "other-vae", "model.seed=8", "trainer.max_steps=1")
    capsys.readouterr()
    assert world.call(*world.command("cached", "wrong", f"{VAE}.from_pretrained={other}")) == 2
    line = one_line(capsys)
    assert "cache: made with vae" in line and "but this run has" in line and "precache again" in line


def test_a_cache_made_with_other_transforms(world, capsys):
    resized = "model.data.train.augmentations.resize_smallest_side=18"
    assert world.call(*world.command("cached", "wrong", resized)) == 2
    assert "cache: made with transforms" in one_line(capsys)


@pytest.mark.parametrize("recipe", ["images", "cached", "vae"])
def test_a_truncated_tar(world, capsys, tmp_path, recipe):
    source = world.root / ("cache" if recipe == "cached" else "shards")
    shutil.copytree(source, tmp_path / "copy")
    tar = tmp_path / "copy" / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-2000])
    where = f"{DATA}={tmp_path / 'copy'}"
    assert world.call(*world.command(recipe, "wrong", where)) == 2
    assert "shard-000001.tar" in one_line(capsys)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--from", "ROOT/shards"], "shards: "),
        (["--from", "ROOT/nowhere"], "nowhere: "),
        (["--from", "ROOT/runs/vae"], "vae"),
        (["--from", "ROOT/runs/cached", "--sampler", "eular"], "eular"),
        (["--from", "ROOT/runs/cached", "--height", "17"], "images of 17x16 do not divide by 2"),
        (["--from", "ROOT/runs/cached", "--steps", "0"], "--steps"),
    ],
    ids=["no checkpoint", "nothing", "no whole model", "sampler", "height", "steps"],
)
def test_generate_says_what_is_wrong(world, capsys, tmp_path, options, expected):
    assert world.call("generate", *options, "--out", tmp_path / "out", "a circle") == 2
    assert expected in one_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["first_stage_config", "cond_stage_config"])
def test_precache_wants_weights(world, capsys, tmp_path, part):
    kept = VAE if part == "cond_stage_config" else TEXT
    given = f"{kept}.from_pretrained=ROOT/runs/{'vae' if kept == VAE else 'text'}"
    assert world.call("precache", "--config", "ROOT/tiny.yaml", "--out", tmp_path / "cache", given) == 2
    assert f"model.{part}.from_pretrained is not set" in one_line(capsys)
    assert not (tmp_path / "cache").exists()
