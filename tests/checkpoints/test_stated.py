"""What a checkpoint states of how it is run is obeyed, named in a note, or refused by its key."""

import collections
import datetime
import inspect
import json
import pathlib
import shutil
import struct
import warnings
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from latentsmith.checkpoints import architecture, ldm, nemo, open_checkpoint, prediction_of, spec_of, verify
from latentsmith.checkpoints.convert import convert, tokenizer_files
from latentsmith.checkpoints.diffusers_config import model_index, scheduler_config
from latentsmith.checkpoints.diffusers_keys import FIXED, OTHER, READ, SCHEDULERS, SOLVER
from latentsmith.checkpoints.formats import FORMATS
from latentsmith.checkpoints.from_config import check_objective
from latentsmith.checkpoints.load import network_shapes
from latentsmith.checkpoints.match import match
from latentsmith.checkpoints.spec import _beside, objective_of
from latentsmith.config import load_config
from latentsmith.files.archives import _parse_config
from latentsmith.files.errors import BadInput
from latentsmith.files.tensors import open_tensors
from latentsmith.text.tokenizer import train_vocabulary
from latentsmith.text.vocabulary import read_vocabulary

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
    with pytest.warns(UserWarning, match="clip_sample true: ddim, para_ddim and ddpm clip"):
        spec = with_scheduler(folder, _class_name="DDIMScheduler")
    assert (spec.linear_end, spec.clip_sample_range) == (0.02, 1.0)
    spec = with_scheduler(folder, **SCALED)  # by hand, without a class
    assert (spec.linear_start, spec.beta_schedule) == (0.00085, "linear")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", **SCALED}, "_class_name 'FlowMatch.*' is not one of PNDM"),
        ({"num_train_timesteps": 1000}, "_class_name None is not one of"),
        ({"_class_name": "PNDMScheduler", "trained_betas": [0.1, 2]}, "trained_betas: betas must be numbers above 0"),
        ({"_class_name": "PNDMScheduler", "trained_betas": "many"}, "trained_betas is 'many'; it must be a list"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding True; only False is supported"),
        (
            {"_class_name": "HeunDiscreteScheduler", "timestep_spacing": "log"},
            "timestep_spacing is 'log'; it must be one",
        ),
        ({"_class_name": "EulerDiscreteScheduler", "prediction_type": "flow_prediction"}, "says 'flow_prediction'"),
    ],
)
def test_schedulers_refused(folder, config, message):
    with pytest.raises(BadInput, match=message):
        with_scheduler(folder, **config)


def test_what_a_scheduler_says_of_sigmas_is_named(folder):
    config = {"_class_name": "EulerDiscreteScheduler", **SCALED}
    with pytest.warns(UserWarning, match="use_karras_sigmas true: samplers that have them in diffusers use them"):
        assert with_scheduler(folder, use_karras_sigmas=True, **config).karras_sigmas
    for key, value in {
        "use_beta_sigmas": True,
        "final_sigmas_type": "sigma_min",
        "interpolation_type": "log_linear",
    }.items():
        with pytest.warns(UserWarning, match=f"{key} {value!r} is left to the sampler that is asked for"):
            with_scheduler(folder, **config | {key: value})
    with pytest.warns(UserWarning, match="a_new_key not known here, and without effect"):
        with_scheduler(folder, a_new_key=3, **config)
    with pytest.warns(UserWarning, match="unet/config.json: a_new_key not known here"):
        with_key(folder, "unet", a_new_key=3)
    with_key(folder, "unet", a_new_key=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_scheduler(folder, **config | {"use_karras_sigmas": False, "prediction_type": "V-prediction"})


def keys_of(cls):
    """The keys of a class's config: its constructor's parameters."""
    named = {name: each for name, each in inspect.signature(cls.__init__).parameters.items() if name != "self"}
    return {name for name, each in named.items() if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)}


GENERIC = {  # of every config of transformers, read by its own training and generation code
    "transformers_version", "architectures", "output_hidden_states", "return_dict", "dtype", "chunk_size_feed_forward",
    "is_encoder_decoder", "id2label", "label2id", "problem_type", "_name_or_path", "model_type", "output_attentions",
}  # fmt: skip


def test_every_key_of_a_folders_configs_has_one_fate():
    keys = {
        "unet": keys_of(diffusers.UNet2DConditionModel),
        "vae": keys_of(diffusers.AutoencoderKL),
        "text_encoder": set(transformers.CLIPTextConfig().to_dict()) - GENERIC,
        "scheduler": set().union(*(keys_of(getattr(diffusers, name)) for name in SCHEDULERS)),
    }
    for part, names in keys.items():
        fates = [set(FIXED[part]), READ[part], OTHER[part], set(SOLVER if part == "scheduler" else ())]
        assert not (without := names - set().union(*fates)), (part, without)
        assert sum(map(len, fates)) == len(set().union(*fates)), part


def test_trained_betas_are_the_schedule(folder, tmp_path):
    betas = np.linspace(1e-4, 0.03, 50).tolist()
    with_scheduler(folder, _class_name="PNDMScheduler", **SCALED)
    spec = with_scheduler(folder, _class_name="PNDMScheduler", trained_betas=betas, **SCALED)
    assert torch.equal(
        spec.noise_schedule().alphas_cumprod, torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0)
    )
    for written in conversions(folder, spec, tmp_path).values():
        assert list(spec_of(open_checkpoint(written)).trained_betas) == betas


def conversions(folder, spec, tmp_path):
    """The model in each format; a diffusers folder by its configs, as tiny vocabularies make no tokenizer."""
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler_config(spec)))
    written = {to: convert(folder, tmp_path / f"m{FORMATS[to].ending}", to) for to in ("ldm", "nemo")}
    return {"diffusers": folder, **written}


def test_karras_sigmas_and_clipping_arrive_or_are_named(folder, tmp_path, capsys):
    config = {"_class_name": "DDIMScheduler", "use_karras_sigmas": True, "clip_sample_range": 0.5, **SCALED}
    written = conversions(folder, with_scheduler(folder, **config), tmp_path)
    assert capsys.readouterr().out.count("Karras sigmas, which its scheduler uses") == 2
    for path in written.values():
        spec = spec_of(open_checkpoint(path))
        assert spec.karras_sigmas and spec.clip_sample_range == 0.5


def test_unusual_betas_of_a_single_file_are_read(tmp_path, make_shapes):
    shapes = make_shapes(1)["unet"]
    state = {f"model.diffusion_model.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    usual = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    for name, betas, read in (("usual", usual.half(), False), ("other", torch.linspace(1e-4, 2e-2, 1000), True)):
        torch.save(state | {"betas": betas}, tmp_path / f"{name}.ckpt")
        assert ("trained_betas" in objective_of(open_checkpoint(tmp_path / f"{name}.ckpt"))) == read


@pytest.mark.parametrize("layout", ["ldm", "nemo"])
def test_averages_alone_are_a_unet(tmp_path, make_shapes, layout):
    """`model_ema.*` without the raw weights: names without dots, told by the words that they are made of."""
    shapes = make_shapes(1, unet={"num_res_blocks": 4, "channel_mult": [1, 2, 2, 2]})["unet"]  # output_blocks.10 to 19
    table = {"ldm": ldm.DIALECT, "nemo": nemo.V2_UNET}[layout].table(shapes)
    state = {f"model_ema.{ldm.ema_key(table[name].key)}": torch.zeros(shape) for name, shape in shapes.items()}
    state |= {f"model_ema.{name}": torch.ones(()) for name in ("decay", "num_updates")}
    torch.save(state, tmp_path / "m.ckpt")
    checkpoint = open_checkpoint(tmp_path / "m.ckpt")
    assert {name: tensor.shape for name, tensor in match(checkpoint, "unet", shapes).items()} == shapes
    torch.save(state | {"model_ema.diffusion_modelnobodyknows": torch.ones(2)}, tmp_path / "m.ckpt")
    with pytest.raises(BadInput, match="diffusion_modelnobodyknows is of no known tensor"):
        open_checkpoint(tmp_path / "m.ckpt")


def test_a_vae_with_averages_of_its_own_loads_its_weights(tmp_path, make_shapes):
    shapes = make_shapes(1)["vae"]
    state = {name: torch.ones(shape) for name, shape in shapes.items()}
    state |= {f"model_ema.{name.replace('.', '')}": torch.zeros(shape) for name, shape in shapes.items()}
    for prefix in ("", "first_stage_model."):
        torch.save({f"{prefix}{key}": value for key, value in state.items()}, tmp_path / "m.ckpt")
        found = match(open_checkpoint(tmp_path / "m.ckpt"), "vae", shapes)
        assert found.keys() == shapes.keys() and found["encoder.conv_in.weight"].read().min() == 1


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


# --- what a file is


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight", "a LoRA"),
        ("model.diffusion_model.input_blocks.1.1.proj_in.scale_weight", "scaled fp8"),
        ("control_model.input_hint_block.0.weight", "a ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", "an SDXL model"),
        ("add_embedding.linear_1.weight", "an SDXL model"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "a diffusion transformer"),
        ("emb_params", "a textual inversion embedding"),
    ],
)
def test_foreign_weights_are_named_as_what_they_are(tmp_path, key, message):
    safetensors.torch.save_file({key: torch.ones(2, 2)}, tmp_path / "m.safetensors")
    with pytest.raises(BadInput, match=f"m.safetensors: .*{message}.*(not supported|give (it|that) with --)"):
        open_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize("wrap", [("model",), ("module",), ("state_dict", "state_dict"), ("model", "module")])
def test_a_state_dict_is_found_under_its_wrappers(tmp_path, wrap):
    state = {"conv_in.weight": torch.arange(3.0)}
    for key in wrap:
        state = {key: state, "epoch": 3}
    torch.save(state, tmp_path / "m.ckpt")
    file = open_tensors(tmp_path / "m.ckpt")
    assert list(file) == ["conv_in.weight"] and file.extras["epoch"] == 3


def test_harmless_objects_of_a_pickle_are_placeholders(tmp_path):
    harmless = [
        pathlib.PurePosixPath("a"), collections.Counter("ab"), collections.deque([1]), datetime.datetime(2024, 1, 2),
        datetime.timedelta(1), torch.device("cpu"), torch.float16, torch.Size([2]), np.arange(3), np.float64(2),
        np.random.RandomState(0).get_state(), torch.get_rng_state(),
    ]  # fmt: skip
    torch.save({"state_dict": {"conv_in.weight": torch.ones(2)}, "rest": harmless}, tmp_path / "m.ckpt")
    assert list(open_tensors(tmp_path / "m.ckpt")) == ["conv_in.weight"]


def test_null_metadata_and_rare_dtypes(tmp_path):
    header = json.dumps({"__metadata__": None, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "null.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<f", 2))
    assert open_tensors(tmp_path / "null.safetensors")["a"].item() == 2
    rare = {name: torch.ones(2).to(getattr(torch, name)) for name in ("uint16", "uint32", "uint64", "complex64")}
    rare["float8_e8m0fnu"] = torch.ones(2).to(torch.float8_e8m0fnu)
    safetensors.torch.save_file(rare, tmp_path / "rare.safetensors")
    file = open_tensors(tmp_path / "rare.safetensors")
    assert {name: str(file[name].dtype) for name in file} == {name: f"torch.{name}" for name in rare}


def test_files_beside_a_single_file_are_named(tmp_path, folder):
    for name in ("m.safetensors", "m.yaml", "m.vae.pt"):
        (tmp_path / name).write_bytes(b"x")
    assert [note.split()[0] for note in _beside(tmp_path / "m.safetensors")] == ["m.yaml", "m.vae.pt"]


# --- NeMo's model configs


def with_config(tmp_path, shapes, **config):
    state = {f"model.text_encoder.{name}": torch.zeros(shape) for name, shape in shapes["text_encoder"].items()}
    torch.save(state | {"model.scale_factor": torch.tensor(0.7543)}, tmp_path / "m.ckpt")
    return replace(open_checkpoint(tmp_path / "m.ckpt"), config=config)


def test_nemo_keys(tmp_path, shapes):
    checkpoint = with_config(tmp_path, shapes, scale_factor=1.0, cosine_s=0.01, beta_schedule="cosine")
    facts = nemo.facts(checkpoint)
    assert facts["scale_factor"] == pytest.approx(0.7543) and facts["cosine_s"] == 0.01
    text = {"num_attention_heads": 4, "activation": "quick-gelu", "layernorm_epsilon": "1e-5"}
    checkpoint = with_config(tmp_path, shapes, cond_stage_config={"cfg": {"text": text}})
    sizes = architecture(checkpoint)["text_encoder"]
    assert (sizes["heads"], sizes["activation"]) == (4, "quick_gelu")
    for layer in ("hidden", "pooled"):
        with pytest.raises(BadInput, match=f"cond_stage_config.layer '{layer}' is not supported"):
            architecture(with_config(tmp_path, shapes, cond_stage_config={"layer": layer}))
    both = {"unet_config": {"num_heads": 8, "num_head_channels": 64}}
    part = checkpoint.parts["text_encoder"]
    assert nemo.sizes(replace(checkpoint, config=both), replace(part, name="unet")) == {"num_head_channels": 64}


def test_numbers_of_yaml_are_numbers(tmp_path):
    found = _parse_config(tmp_path, b"{linear_start: 85e-5, scale_factor: 1e0, a: 1e-5, name: e5, version: 1e}")
    assert found == {"linear_start": 85e-5, "scale_factor": 1.0, "a": 1e-5, "name": "e5", "version": "1e"}


# --- tokenizers


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", {"do_lower_case": False}, "do_lower_case false is not supported"),
        ("tokenizer.json", {"normalizer": None}, "its normalizer does not lower-case"),
        ("added_tokens.json", {"<cat>": 520}, "adds the token '<cat>'"),
    ],
)
def test_tokenizers_that_would_read_otherwise(tmp_path, file, content, message):
    train_vocabulary(["a red circle"], 516, tmp_path)
    whole = json.loads((tmp_path / file).read_text()) if (tmp_path / file).is_file() else {}
    (tmp_path / file).write_text(json.dumps(whole | content))
    with pytest.raises(BadInput, match=message):
        read_vocabulary(tmp_path)


def test_the_pad_token_of_a_folder_is_kept(tmp_path, folder):
    """A folder of v2 that pads with the end token is not turned into one that pads with "!"."""
    train_vocabulary(["a"], 516, tmp_path / "tokens")
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        (tmp_path / "tokens" / file).unlink(missing_ok=True)
    checkpoint = open_checkpoint(folder)
    tensors = {"text_model.embeddings.token_embedding.weight": torch.zeros(600, 32)}
    files = tokenizer_files(checkpoint, tensors, spec_of(checkpoint), tmp_path / "tokens")
    assert json.loads(files["special_tokens_map.json"])["pad_token"] == "<|endoftext|>"


@pytest.mark.parametrize(
    ("inputs", "name"),
    [(4, "StableDiffusionPipeline"), (8, "StableDiffusionInstructPix2PixPipeline"),
     (9, "StableDiffusionInpaintPipeline")],
)  # fmt: skip
def test_the_pipeline_that_a_folder_names(folder, inputs, name):
    spec = spec_of(open_checkpoint(folder))
    spec = replace(spec, unet_config={**spec.unet_config, "in_channels": inputs})
    assert model_index(spec)["_class_name"] == name
    assert hasattr(diffusers, name)


def test_no_pipeline_is_named_for_depth_models(folder):
    spec = spec_of(open_checkpoint(folder))
    with pytest.raises(BadInput, match="a U-Net of 5 input channels, a depth model: no diffusers folder"):
        model_index(replace(spec, unet_config={**spec.unet_config, "in_channels": 5}))


def test_depths_of_transformers_are_told_by_level(tmp_path, make_shapes):
    shapes = make_shapes(1, unet={"transformer_depth": [1, 2, 2]})["unet"]
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "m.ckpt")
    config = {"unet_config": {"num_heads": 2}}
    found = architecture(replace(open_checkpoint(tmp_path / "m.ckpt"), config=config))["unet"]
    assert found["transformer_depth"] == [1, 2, 2] and network_shapes("unet", found) == shapes


def test_a_nemo_config_has_the_keys_that_restore_from_reads(folder):
    checkpoint = open_checkpoint(folder)
    spec = spec_of(checkpoint)
    parts = {"text_encoder": checkpoint.parts["text_encoder"].entries}
    keys = (
        "optim num_timesteps_cond scale_by_std ignore_keys clip_denoised log_every_t use_positional_encodings inductor "
        "inductor_cudagraphs ckpt_path v_posterior original_elbo_weight l_simple_weight given_betas cosine_s loss_type "
        "learn_logvar logvar_init concat_mode cond_stage_forward fused_opt"
    )
    assert set(keys.split()) <= nemo.nemo_config(parts, spec).keys()


def test_verifying_a_conversion_shows_a_lost_setting(folder, tmp_path, monkeypatch):
    """Both sides are run with their own specs: other heads, activation or schedule than the source's are seen."""
    with_scheduler(folder, _class_name="PNDMScheduler", skip_prk_steps=True, **SCALED)
    lines = {}
    for name in ("whole", "lost"):
        if name == "lost":
            monkeypatch.setattr(verify, "spec_of", lambda checkpoint: changed_spec(spec_of(checkpoint)))
        spec = spec_of(open_checkpoint(folder))
        path = convert(folder, tmp_path / f"{name}.nemo", "nemo")
        parts = {part: match(open_checkpoint(folder), part, network_shapes(part, spec.config_of(part)))
                 for part in ("unet", "vae", "text_encoder")}  # fmt: skip
        shapes = {part: network_shapes(part, spec.config_of(part)) for part in parts}
        lines[name] = list(verify.verify_conversion(parts, folder, open_checkpoint(path), spec, shapes, None))
    assert "schedule: the same sigmas and timesteps at 4 steps" in lines["whole"]
    assert all("became" not in line for line in lines["whole"])
    assert sum("its output 0," in line for line in lines["whole"]) == 3
    assert "linear_end: 0.012 became 0.02" in lines["lost"]
    assert "schedule: other sigmas and timesteps at 4 steps" in lines["lost"]
    assert sum("its output 0," in line for line in lines["lost"]) == 2


def changed_spec(spec):
    return replace(spec, linear_end=0.02, cond_stage_config={**spec.cond_stage_config, "heads": 4})


# --- training from a checkpoint


def test_training_compares_its_objective_with_that_of_its_first_weights(folder, capsys):
    """A model trained with v-prediction is not trained as one of noise without a word; nor with other betas."""
    source = folder / "unet"  # whose scheduler lies beside it
    with_scheduler(folder, _class_name="DDIMScheduler", prediction_type="v_prediction", clip_sample=False, **SCALED)
    start = f"model.unet_config.from_pretrained={source}"
    with pytest.raises(BadInput, match="trained with prediction_type 'v_prediction', the config trains it with 'epsil"):
        check_objective(load_config("sd1", [start]))
    check_objective(load_config("sd1", [start, "model.parameterization=v"]))
    assert not capsys.readouterr().out
    check_objective(load_config("sd1", [start, "model.change_objective=true"]))
    assert "and is trained with 'epsilon' from here on (change_objective)" in capsys.readouterr().out
    with_scheduler(folder, _class_name="PNDMScheduler", **SCALED | {"beta_end": 0.02})
    with pytest.raises(BadInput, match=r"trained with linear_end 0.02, .* with 0.012; set model.linear_end=0.02, or"):
        check_objective(load_config("sd1", [start]))
    with_key(folder, "vae", scaling_factor=0.13)
    start = f"model.ckpt_path={folder}"
    with pytest.raises(BadInput, match=r"trained with scale_factor 0.13, .*; set model.scale_factor=0.13"):
        check_objective(load_config("sd1", [start, "model.linear_end=0.02"]))
    check_objective(load_config("sd1", [start, "model.linear_end=0.02", "model.scale_factor=measured"]))
    with_scheduler(folder, _class_name="PNDMScheduler", trained_betas=[0.1, 0.2])
    with pytest.raises(BadInput, match=r"trained_betas .*; no option gives it, or model.change_objective"):
        check_objective(load_config("sd1", [start, "model.scale_factor=0.13", "model.linear_start=1e-4",
                                            "model.linear_end=0.02", "model.beta_schedule=sqrt_linear"]))  # fmt: skip
