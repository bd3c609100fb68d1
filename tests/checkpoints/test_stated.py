"""What a checkpoint states of how it is run is obeyed, named in a note, or refused by its key."""

import json
import shutil
import warnings

import diffusers
import pytest
import safetensors.torch
import torch

from latentsmith.checkpoints import open_checkpoint, prediction_of, spec_of
from latentsmith.checkpoints.diffusers_config import SCHEDULERS, scheduler_config
from latentsmith.files.errors import BadInput

SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture
def folder(reference_folder, tmp_path):
    return shutil.copytree(reference_folder, tmp_path / "model")


def with_scheduler(folder, **config):
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return spec_of(open_checkpoint(folder))


def with_key(folder, part, **keys):
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return spec_of(open_checkpoint(folder))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_absent_keys_are_the_defaults_of_the_class(name):
    theirs = getattr(diffusers, name)
    if name != "DPMSolverSDEScheduler":  # needs torchsde
        config = theirs().config
        ours = SCHEDULERS[name]
        assert {key: config[key] for key in ours} == ours and config.get("clip_sample", False) == (
            "clip_sample" in ours
        )


def test_a_scheduler_that_leaves_keys_out(folder):
    spec = with_scheduler(folder, _class_name="PNDMScheduler", num_train_timesteps=500)
    stated = (spec.linear_start, spec.linear_end, spec.beta_schedule, spec.timesteps, spec.prediction_type)
    assert stated == (1e-4, 0.02, "sqrt_linear", 500, "epsilon")
    with pytest.warns(UserWarning, match="clip_sample true, which diffusers obeys"):
        assert with_scheduler(folder, _class_name="DDIMScheduler").linear_end == 0.02
    spec = with_scheduler(folder, **SCALED)  # by hand, without a class
    assert (spec.linear_start, spec.beta_schedule) == (0.00085, "linear")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", **SCALED}, "_class_name 'FlowMatch.*' is not one of PNDM"),
        ({"num_train_timesteps": 1000}, "_class_name None is not one of"),
        ({"_class_name": "PNDMScheduler", "trained_betas": [0.1, 0.2]}, "trained_betas, a schedule of its own"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding true is not supported"),
        ({"_class_name": "EulerDiscreteScheduler", "prediction_type": "flow_prediction"}, "says 'flow_prediction'"),
    ],
)
def test_schedulers_refused(folder, config, message):
    with pytest.raises(BadInput, match=message):
        with_scheduler(folder, **config)


def test_what_a_scheduler_says_of_sigmas_is_named(folder):
    config = {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, **SCALED}
    with pytest.warns(UserWarning, match="use_karras_sigmas true is left to the sampler"):
        with_scheduler(folder, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_scheduler(folder, **config | {"use_karras_sigmas": False, "prediction_type": "V-prediction"})


def test_ddim_made_from_a_folder_of_ours_does_not_clip(folder):
    config = scheduler_config(with_scheduler(folder, _class_name="PNDMScheduler", **SCALED))
    for name in ("DDIMScheduler", "DDPMScheduler"):
        assert not getattr(diffusers, name).from_config(config).config.clip_sample


@pytest.mark.parametrize(
    ("part", "keys"),
    [
        ("unet", {"act_fn": "gelu"}), ("unet", {"flip_sin_to_cos": False}), ("unet", {"norm_eps": 1e-6}),
        ("unet", {"only_cross_attention": [True, False]}), ("unet", {"resnet_time_scale_shift": "scale_shift"}),
        ("vae", {"shift_factor": 0.1}), ("vae", {"latents_mean": [0.1]}), ("text_encoder", {"layer_norm_eps": 1e-6}),
        ("text_encoder", {"hidden_act": "relu"}),
    ],
)  # fmt: skip
def test_keys_that_change_a_network_are_refused(folder, part, keys):
    with pytest.raises(BadInput, match=f"{part}/.*: its config.json says {next(iter(keys))} .*; only .* is supported"):
        with_key(folder, part, **keys)


def test_a_text_encoder_runs_as_many_layers_as_its_config_says(folder):
    spec = with_key(folder, "text_encoder", num_hidden_layers=2)
    assert (spec.cond_stage_config["layers"], spec.cond_stage_config["layer"]) == (3, "penultimate")
    for layers in (1, 4):
        with pytest.raises(BadInput, match=f"3 layers, num_hidden_layers {layers}: only 3 and 2 are supported"):
            with_key(folder, "text_encoder", num_hidden_layers=layers)


@pytest.mark.parametrize(
    ("metadata", "keys", "expected"),
    [
        ({"modelspec.prediction_type": "v-prediction"}, {}, "v_prediction"),
        ({"modelspec.prediction_type": "V"}, {}, "v_prediction"),
        ({"modelspec.predict_key": " Epsilon "}, {"v_pred"}, "epsilon"),
        ({"modelspec.prediction_type": "rectified"}, {}, None),
        ({}, {"v_pred"}, "v_prediction"),
    ],
)
def test_spellings_and_markers_of_v_prediction(tmp_path, make_shapes, metadata, keys, expected):
    shapes = make_shapes(1)["unet"]
    state = {f"model.diffusion_model.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    safetensors.torch.save_file(state | {key: torch.ones(0) for key in keys}, tmp_path / "m.safetensors", metadata)
    found, source = prediction_of(open_checkpoint(tmp_path / "m.safetensors"))
    assert found == expected and (expected or "rectified" in source)
