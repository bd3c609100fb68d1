"""NeMo's and LDM's files train here, two steps at reduced width, and nothing of them goes unexplained."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

FILES = sorted((Path(__file__).parents[1] / "config" / "yaml").glob("*.yaml"))
UNET, VAE, TEXT, DATA = "model.unet_config", "model.first_stage_config", "model.cond_stage_config", "model.data.train"
REDUCED = [
    f"{UNET}.model_channels=32", f"{UNET}.channel_mult=[1,2]", f"{UNET}.attention_resolutions=[2]",
    f"{UNET}.num_res_blocks=1", f"{UNET}.num_heads=2", f"{UNET}.num_head_channels=-1", f"{UNET}.context_dim=32",
    f"{UNET}.resblock_gn_groups=8", f"{UNET}.from_pretrained=null",
    f"{VAE}.ddconfig={{ch: 8, ch_mult: [1, 2], num_res_blocks: 1, num_groups: 4, resolution: 16}}",
    f"{VAE}.from_pretrained=ROOT/runs/vae",
    f"{TEXT}.width=32", f"{TEXT}.layers=2", f"{TEXT}.heads=2", f"{TEXT}.intermediate_size=64",
    f"{TEXT}.activation=quick_gelu", f"{TEXT}.vocab_size=540", f"{TEXT}.max_length=40", f"{TEXT}.layer=last",
    f"{TEXT}.from_pretrained=ROOT/runs/text", f"{TEXT}.tokenizer=ROOT/tokenizer",
    f"{DATA}.dataset_path=ROOT/shards", f"{DATA}.augmentations={{resize_smallest_side: 16, center_crop_h_w: '16, 16'}}",
    "model.data.webdataset.local_root_path=null", "model.data.num_workers=0",
    "model.micro_batch_size=4", "model.global_batch_size=4", "model.inductor=False",
    "trainer.max_steps=2", "trainer.devices=1", "trainer.num_nodes=1", "trainer.accelerator=cpu",
    "trainer.precision=32",
    "trainer.log_every_n_steps=1", "exp_manager.exp_dir=ROOT/runs",
]  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("migrated", [False, True], ids=["as it is", "migrated"])
def test_two_steps(world, path, migrated, tmp_path, capsys):
    if migrated:
        assert world.call("config", "migrate", path) == 0
        path = tmp_path / path.name
        path.write_text(capsys.readouterr().out)
    name = f"{path.stem}-{migrated}"
    assert world.call("train", "--config", path, *REDUCED, f"exp_manager.name={name}") == 0
    printed = capsys.readouterr()
    run = world.root / "runs" / name
    assert len(world.losses(run)) == 2
    assert OmegaConf.load(run / "config.yaml").trainer.max_steps == 2
    assert ("without effect here" in printed.err) != migrated


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_run_can_be_used(world, path, tmp_path, capsys):
    """Drawn from, inspected, converted; and what the file says of the U-Net passes a dry run."""
    run = world.root / "runs" / f"{path.stem}-False"
    assert world.call("generate", "--from", run, "--out", tmp_path / "drawn", "--steps", 2, "a red circle") == 0
    assert world.call("inspect", run) == 0 and "not checked" not in capsys.readouterr().out
    for form, suffix in {"ldm": ".safetensors", "nemo": ".nemo"}.items():  # diffusers knows no 8 groups in a U-Net
        assert world.call("convert", run, tmp_path / f"converted{suffix}", "--to", form) == 0
    dry = (*REDUCED, "trainer.precision=bf16", "exp_manager.name=dry")
    assert world.call("train", "--config", path, *dry, "--dry-run") == 0


def test_a_migrated_run_is_the_same_run(world):
    """The same losses, so nothing that matters was lost on the way."""
    for path in FILES:
        first, second = (world.losses(world.root / "runs" / f"{path.stem}-{migrated}") for migrated in (False, True))
        assert first == second
