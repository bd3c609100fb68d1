"""A config of another model or task says which one it is, not how its first unknown key might be spelled."""

import pytest
import yaml

from latentsmith.config import compose, schema
from latentsmith.config.foreign_files import KINDS
from latentsmith.files.errors import BadInput

TRAINER = {"trainer": {"devices": 1, "precision": 32, "logger": False}}
UNET_XL = {"unet_config": {"adm_in_channels": 2816, "num_classes": "sequential", "context_dim": 2048}}
EXPORT = {"infer": {"out_path": "x", "width": 1024}, "trt": {"static_batch": False}}
QUANTIZE = {"infer": {"num_samples": 4}, "sampling": {"base": {"steps": 20}}, "quantize": {"n_steps": 20}}
ENGINES = {"denoiser_config": {"num_idx": 1000}, "sampler": "EulerEDMSampler", "unet_xl": "unet_xl.plan"}
SDXL_INFER = {"infer": {"num_samples": 4, "prompt": ["a"]}, "sampling": {"base": {"steps": 40}}, "use_refiner": False}
CONTROL_INFER = {"infer": {"height": 512, "control": ["a.png"]}, "model": {"strength": 2.0, "guess_mode": False}}
DREAMBOOTH = {"model": {"image_size": 64, "with_prior_preservation": False}, "infer": {"height": 512}}
PIX2PIX = {"model": {"first_stage_key": "edited", "image_size": 32, "conditioning_key": "hybrid"}}


@pytest.mark.parametrize(
    ("file", "kind", "tell"),
    [
        ({"model": {"is_legacy": False, **UNET_XL}}, "an SDXL file", "model.is_legacy"),
        ({"model": UNET_XL}, "an SDXL file", "model.unet_config.num_classes=sequential"),
        ({"model": {"params": {"network_config": {"target": "a.B"}}}}, "an SDXL file", "model.network_config"),
        (SDXL_INFER, "an SDXL file", "sampling"),
        (EXPORT, "a file for export, quantization or TensorRT", "trt"),
        (QUANTIZE, "a file for export, quantization or TensorRT", "quantize"),
        (ENGINES, "a file for export, quantization or TensorRT", "unet_xl"),
        ({"model": {"control_stage_config": {"params": {"hint_channels": 3}}}}, "a ControlNet file", "control_stage"),
        (CONTROL_INFER, "a ControlNet file", "model.guess_mode"),
        ({"edit": {"resolution": 256}}, "an instruct-pix2pix file", "edit"),
        (PIX2PIX, "an instruct-pix2pix file", "model.first_stage_key=edited"),
        (DREAMBOOTH, "a file of NeMo's DreamBooth", "model.with_prior_preservation"),
        ({"model": {"params": {"depth_stage_config": {"target": "a.B"}}}}, "a depth2img file", "depth_stage"),
    ],
)
def test_files_of_other_models_are_named(tmp_path, file, kind, tell):
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(TRAINER | file))
    with pytest.raises(BadInput) as caught:
        compose(tmp_path / "theirs.yaml", ["model.no_such_key=1"])
    line = str(caught.value)
    assert line.startswith(f"theirs.yaml: is {kind}") and tell in line and "\n" not in line


def test_no_option_is_taken_for_another_models():
    keys = [tell for tells in KINDS.values() for tell in tells]
    assert len(set(keys)) == len(keys)
    assert not [key for key in keys if "=" not in key and (key in schema.groups() or schema.find(key))]


@pytest.mark.parametrize("precision", ["16", "bf16"])
def test_dreambooths_inference_files_are_like_any_other(tmp_path, precision):
    infer = {"inference_steps": 50, "sampler_type": "DDIM", "eta": 0, "prompts": ["a sks dog"], "down_factor": 8}
    model = {"precision": "${trainer.precision}", "peft": {"restore_from_path": None}}
    file = {
        "infer": infer,
        "trainer": {"precision": precision},
        "model": model | {"unet_config": {"from_pretrained": None}},
    }
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(file))
    assert compose(tmp_path / "theirs.yaml").is_inference
