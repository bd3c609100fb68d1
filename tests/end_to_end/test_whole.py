"""The main job through the command line, from captioned images to images from captions."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from latentsmith import load_config
from latentsmith.data.latent_cache import LatentCache
from latentsmith.files.tensors import open_tensors
from latentsmith.inference import Pipeline
from latentsmith.training.setup import process_count

NOT_MOVING = ("model.optim.lr=0", "model.micro_batch_size=1", "trainer.max_steps=22", "model.caption_dropout_rate=0.2")
PROMPTS = ("a small red circle", "a large blue square on a white background", "a star")


def test_every_run_is_whole(world):
    for name in ("vae", "text", "cached"):
        run = world.root / "runs" / name
        assert len(world.losses(run)) == 4
        assert [path.name for path in (run / "checkpoints").iterdir()].count("step-00000004") == 1
        assert json.loads((run / "versions.json").read_text()).keys() == {"python", "torch", "command"}
        assert (run / "config.yaml").is_file()
    assert np.isfinite(world.losses(world.root / "runs" / "cached")).all()


def test_cache_holds_what_the_networks_give(world):
    images, both = LatentCache(world.root / "latents"), LatentCache(world.root / "cache")
    assert images.encoded == ["image_encoded"] and sorted(both.encoded) == ["captions_encoded", "image_encoded"]
    assert both[0]["image_encoded"].shape == (8, 8, 8) and both[0]["captions_encoded"].shape == (40, 32)
    assert both.empty_prompt.shape == (40, 32)
    for index in range(len(both)):
        assert np.array_equal(both[index]["image_encoded"], images[index]["image_encoded"])


def test_joint_training_moved_the_text_encoder_and_cached_training_did_not(world):
    text, cached = world.root / "runs" / "text", world.root / "runs" / "cached"
    steps = [text / "checkpoints" / f"step-0000000{step}" / "text_encoder.safetensors" for step in (2, 4)]
    first, second = map(open_tensors, steps)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert not list((cached / "checkpoints").rglob("text_encoder.safetensors"))
    frozen, trained = (
        open_tensors(cached / "text_encoder.safetensors"),
        open_tensors(text / "checkpoints" / "step-00000004" / "ema" / "text_encoder.safetensors"),
    )
    assert all(torch.equal(frozen[name], trained[name]) for name in frozen)


def test_cache_and_images_give_the_same_losses_sample_for_sample(world):
    """A U-Net that has learnt something, standing still: each step's loss is that of one sample."""
    unet = "model.unet_config.from_pretrained=ROOT/runs/text"
    cached = world.losses(world.train("cached", "still-cached", unet, *NOT_MOVING))
    images = world.losses(world.train("images", "still-images", unet, *NOT_MOVING))
    assert len(cached) == 22 and max(cached) > 1.5 * min(cached)
    assert cached == pytest.approx(images, rel=2e-3)
    assert cached != images  # float16 has rounded: these were two ways, not one


def test_training_on_images_moves(world):
    run = world.train("images", "images")
    assert len(world.losses(run)) == 4 and (run / "vae.safetensors").is_file()


def generate(world, out, *options):
    run = world.root / "runs" / "cached"
    given = ("generate", "--from", run, "--out", out, "--steps", 3, "--seed", 5, "--count", 2)
    assert world.call(*given, *options, *PROMPTS) == 0
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(out.glob("*.png"))}


def test_generate_writes_images_that_say_how_they_were_made(world, tmp_path):
    images = generate(world, tmp_path, "--sampler", "ddim", "--guidance-scale", 2, "--negative", "blurry")
    assert len(images) == 6 and all(image.shape == (16, 16, 3) for image in images.values())
    with Image.open(tmp_path / "a-small-red-circle-seed6.png") as image:
        made = json.loads(image.text["latentsmith"])
        text = image.text["parameters"]
    expected = {"prompt": PROMPTS[0], "negative_prompt": "blurry", "seed": 6, "sampler": "ddim"}
    assert all(made[name] == value for name, value in expected.items()) and made["guidance_scale"] == 2
    settings = "Steps: 3, Sampler: DDIM, Schedule type: Uniform, CFG scale: 2.0, Seed: 6, Size: 16x16"
    assert text.startswith(f"a small red circle\nNegative prompt: blurry\n{settings}")
    assert not np.array_equal(images["a-star-seed5.png"], images["a-star-seed6.png"])


def test_a_seed_draws_the_same_image_at_any_batch_size(world, tmp_path):
    alone, together = (generate(world, tmp_path / size, "--batch-size", size) for size in ("1", "4"))
    assert alone.keys() == together.keys() and len(alone) == 6
    for name, image in alone.items():
        assert np.abs(image - together[name]).max() <= 1  # of 255: sums of other lengths round otherwise


def test_generate_uses_the_averaged_weights(world):
    run = world.root / "runs" / "cached"
    unet = Pipeline.from_pretrained(run).unet.state_dict()
    averaged = open_tensors(world.newest(run) / "ema" / "unet.safetensors")
    raw = open_tensors(world.newest(run) / "unet.safetensors")
    assert all(torch.equal(unet[name], averaged[name]) for name in averaged)
    assert any(not torch.equal(unet[name], raw[name]) for name in raw)


def test_a_run_starts_from_a_whole_run(world):
    """model.ckpt_path fills all three networks; with a learning rate of 0 they stay what they were."""
    source = world.root / "runs" / "cached"
    still = ("model.optim.lr=0", "trainer.max_steps=1", "exp_manager.name=from-run")
    keys = ("model.first_stage_key=image_encoded", "model.cond_stage_key=captions_encoded")
    given = ("--init", source, *still, *keys, "model.data.train.dataset_path=ROOT/cache")
    assert world.call("train", "--config", "ROOT/tiny.yaml", *given) == 0
    run = world.root / "runs" / "from-run"
    begun, averaged = (
        open_tensors(path)
        for path in (world.newest(run) / "unet.safetensors", world.newest(source) / "ema" / "unet.safetensors")
    )
    assert all(torch.equal(begun[name], averaged[name]) for name in averaged)
    for part in ("vae", "text_encoder"):
        ours, theirs = (open_tensors(folder / f"{part}.safetensors") for folder in (run, source))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_lists_of_devices_and_of_one_cache(world):
    """As NeMo's files write them."""
    cache = "model.data.train.dataset_path=[ROOT/cache]"
    listed = world.train("cached", "listed", cache, "trainer.devices=1", "trainer.max_steps=1")
    joined = ("model.data.train.dataset_path=[cache]", "model.data.webdataset.local_root_path=ROOT")
    assert world.losses(world.train("cached", "joined", *joined, "trainer.max_steps=1")) == world.losses(listed)
    assert process_count(load_config("sd1", ["trainer.devices=[0,3]", "trainer.num_nodes=2"])) == 4


def test_dry_run_trains_nothing(world, capsys):
    assert world.call(*world.command("cached", "dry"), "--dry-run") == 0
    out = capsys.readouterr().out
    assert "unet: " in out and "trained" in out and "22 samples in 3 shards" in out and "4 steps of 4" in out
    assert not (world.root / "runs" / "dry").exists()


def test_sample_images_while_training(world):
    wanted = "exp_manager.sample_images"
    asked = (f"{wanted}.every_n_train_steps=2", f"{wanted}.prompts=[a circle, a star]", f"{wanted}.steps=2")
    run = world.train("cached", "sampled", *asked)
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-00000002.png", "step-00000004.png"]
    with Image.open(run / "samples" / "step-00000004.png") as row:
        assert row.size == (32, 16)
    assert world.losses(run) == world.losses(world.root / "runs" / "cached")


def test_a_finished_run_says_so(world, capsys):
    world.train("cached", "finished", "trainer.max_steps=2")
    before = sorted((world.root / "runs" / "finished").rglob("*"))
    capsys.readouterr()
    world.train("cached", "finished", "trainer.max_steps=2")
    assert "already at step 2 of 2; nothing to do" in capsys.readouterr().out
    assert sorted((world.root / "runs" / "finished").rglob("*")) == before
