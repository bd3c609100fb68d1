"""Noise instead of a set: every combination of encoded and raw trains, with no set at hand."""

import pytest

NOISE = ("model.data.synthetic_data=true", "model.data.synthetic_data_length=50", "model.data.train.dataset_path=null")


@pytest.mark.parametrize("recipe", ["cached", "images", "text"])
def test_trains(world, recipe, capsys):
    run = world.train(recipe, f"noise-{recipe}", *NOISE, "trainer.max_steps=2")
    assert "50 samples of noise, latents [4, 8, 8]" in capsys.readouterr().out
    again = world.train(recipe, f"noise-{recipe}-again", *NOISE, "trainer.max_steps=2")
    assert world.losses(run) == world.losses(again) and len(world.losses(run)) == 2


def test_dry_run_and_size_without_crops(world, capsys):
    more = ("model.data.train.augmentations=null", "model.image_size=16")
    assert world.call(*world.command("cached", "noise-dry", *NOISE, *more), "--dry-run") == 0
    assert "latents [4, 16, 16]" in capsys.readouterr().out


def test_there_is_nothing_to_precache(world, tmp_path, capsys):
    assert world.call("precache", "--config", "ROOT/tiny.yaml", "--out", tmp_path / "out", *NOISE[:2]) == 2
    assert "needs no cache" in capsys.readouterr().err and not (tmp_path / "out").exists()
