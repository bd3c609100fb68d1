"""What `inspect` says of checkpoints that are not our own."""

import pytest
import torch

from latentsmith.checkpoints import match, open_checkpoint
from latentsmith.checkpoints.inspect import inspect_checkpoint
from latentsmith.files.errors import BadInput


def test_a_diffusers_folder(reference, reference_folder, shapes):
    lines = list(inspect_checkpoint(reference_folder))
    prediction = "epsilon" if reference.version == 1 else "v_prediction"
    assert lines[:2] == [
        f"{reference_folder}: diffusers folder",
        f"  model     sizes of its own, prediction {prediction} (scheduler_config.json)",
    ]
    for part, line in zip(("unet", "vae", "text_encoder"), lines[2:], strict=True):
        count = sum(torch.Size(shape).numel() for shape in shapes[part].values())
        dialect = "hf" if part == "text_encoder" else "diffusers"
        facts = f"{len(shapes[part])} tensors, {count:,} parameters, float32, {dialect} names"
        assert line == f"  {part:12} {facts}"


def test_missing_extra_ignored_and_unknown_keys(tmp_path):
    state = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3).half(), "betas": torch.ones(3)}
    state["who.knows"] = torch.ones(1)
    torch.save({"state_dict": state, "global_step": 5}, tmp_path / "m.ckpt")
    torch.save({}, tmp_path / "m-EMA.ckpt")
    lines = list(inspect_checkpoint(tmp_path / "m.ckpt"))
    assert lines[0] == f"{tmp_path / 'm.ckpt'}: LDM file" and "float16, LDM names" in lines[2]
    assert "  1 keys of no part (who.knows): nothing loads it as it is" in lines
    assert "  not used  1 schedule and scalars" in lines
    assert "  note      its moving average is m-EMA.ckpt" in lines
    assert any(line.startswith("  keys not checked: ") for line in lines)
    with pytest.raises(BadInput, match=r"1 keys of no known format \(who.knows\)"):
        match(open_checkpoint(tmp_path / "m.ckpt"), "unet", {})
