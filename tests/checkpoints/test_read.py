"""Every dialect of every format loads to the same canonical tensors, against mappings written independently of ours.

diffusers' own LDM and OpenCLIP converters are the judge where they exist; NeMo's and Megatron's grammars are written
out here from their documented rules.
"""

import io
import json
import re
import tarfile

import pytest
import safetensors.torch
import torch
import yaml
from diffusers.loaders import single_file_utils as theirs

from latentsmith.checkpoints import match, open_checkpoint
from latentsmith.checkpoints.run import check_sums
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import hash_file

PARTS = ("unet", "vae", "text_encoder")


def read_part(path, part, shapes, *, weights="ema", from_nemo=None):
    found = match(open_checkpoint(path, weights), part, shapes, from_nemo)
    return {name: tensor.read() for name, tensor in found.items()}


@pytest.fixture(scope="session")
def canonical(reference_folder, shapes):
    return {part: read_part(reference_folder, part, shapes[part]) for part in PARTS}


def equal(left, right):
    assert set(left) == set(right), sorted(set(left) ^ set(right))[:6]
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def load(path, shapes, part, **options):
    return read_part(path, part, shapes[part], **options)


def ldm_state(canonical, open_clip, extras=True):
    """A whole LDM state dict, written out by its rules."""
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in canonical["unet"].items()}
    state |= {f"first_stage_model.{name}": tensor for name, tensor in canonical["vae"].items()}
    state |= {
        f"cond_stage_model.{name}": tensor for name, tensor in text_ldm(canonical["text_encoder"], open_clip).items()
    }
    if extras:
        state |= {
            "betas": torch.ones(1000),
            "alphas_cumprod": torch.ones(1000),
            "model_ema.decay": torch.tensor(0.9999),
        }
        state |= {"model_ema.num_updates": torch.tensor(7), "control_model.x": torch.ones(1)}
    return state


def text_ldm(text, open_clip):
    return open_clip_of(text) if open_clip else {f"transformer.{name}": tensor for name, tensor in text.items()}


def open_clip_of(text, prefix="model."):
    """OpenCLIP's names, with the layer, projection and temperature that diffusion leaves unused."""
    state = {}
    layers = 1 + max(int(match[1]) for name in text if (match := re.search(r"layers\.(\d+)", name)))
    for i in range(layers + 1):
        ours, block = f"text_model.encoder.layers.{min(i, layers - 1)}.", f"{prefix}transformer.resblocks.{i}."
        for suffix in ("weight", "bias"):
            state[f"{block}attn.in_proj_{suffix}"] = torch.cat(
                [text[f"{ours}self_attn.{p}_proj.{suffix}"] for p in "qkv"]
            )
            for old, new in (("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"),
                             ("mlp.fc2", "mlp.c_proj"), ("self_attn.out_proj", "attn.out_proj")):  # fmt: skip
                state[f"{block}{new}.{suffix}"] = text[f"{ours}{old}.{suffix}"]
    state[f"{prefix}token_embedding.weight"] = text["text_model.embeddings.token_embedding.weight"]
    state[f"{prefix}positional_embedding"] = text["text_model.embeddings.position_embedding.weight"]
    for suffix in ("weight", "bias"):
        state[f"{prefix}ln_final.{suffix}"] = text[f"text_model.final_layer_norm.{suffix}"]
    return state | {f"{prefix}text_projection": torch.ones(32, 32), f"{prefix}logit_scale": torch.tensor(1.0)}


def nemo_unet(unet, fused=True, moved=True, engine=False):
    """NeMo's U-Net names, one documented substitution after the other."""
    state = {}
    for name, tensor in unet.items():
        parts = name.split(".")
        if fused and "in_layers" in parts and parts[-2] == "2":
            parts[-2] = "1"
        if fused and "out_layers" in parts and parts[-2] == "3":
            parts[-2] = "2"
        if fused and parts[:2] == ["out", "2"]:
            parts[1] = "1"
        path = ".".join(parts)
        if moved and "transformer_blocks" in parts:
            if ".ff.net.2." in path:
                path = path.replace(".ff.net.2.", ".ff.net.3.")
            elif ".ff.net.0.proj" in path:
                path = path.replace(".ff.net.0.", ".ff.net.1.")
            for old, new in ((".norm1.", ".attn1.norm."), (".norm2.", ".attn2.norm."), (".norm3.", ".ff.net.0.")):
                path = path.replace(old, new)
        state[transformer_engine(path) if engine else path] = tensor
    return state


def transformer_engine(path):
    head, suffix = path.rsplit(".", 1)
    for attention in ("attn1", "attn2"):
        if head.endswith(f"{attention}.norm"):
            return f"{head}_to_q.layer_norm_{suffix}"
        if head.endswith(f"{attention}.to_q"):
            return f"{head.removesuffix('to_q')}norm_to_q.{suffix}"
    for old, new in (("ff.net.0", "ff.net.layer_norm"), ("ff.net.1.proj", "ff.net.fc1"), ("ff.net.3", "ff.net.fc2")):
        if head.endswith(old):
            return f"{head.removesuffix(old)}{new}_{suffix}"
    return path


def megatron_of(text, heads=None, core=False):
    """Megatron's CLIP text tower. heads: interleave q, k, v per head; None: one after the other."""

    def fused(layer, suffix):
        q, k, v = (text[f"{layer}.self_attn.{p}_proj.{suffix}"] for p in "qkv")
        if heads is None:
            return torch.cat([q, k, v])
        return torch.cat([torch.cat([t.chunk(heads)[head] for t in (q, k, v)]) for head in range(heads)])

    state, base = {}, "" if core else "language_model."
    for i in range(3):
        ours = f"text_model.encoder.layers.{i}"
        block = f"decoder.layers.{i}." if core else f"language_model.encoder.layers.{i}."
        for suffix in ("weight", "bias"):
            attention = "self_attention.linear_qkv" if core else "self_attention.query_key_value"
            state[f"{block}{attention}.{suffix}"] = fused(ours, suffix)
            rows = (
                [("layer_norm1", f"self_attention.linear_qkv.layer_norm_{suffix}"),
                 ("layer_norm2", f"mlp.linear_fc1.layer_norm_{suffix}"), ("mlp.fc1", f"mlp.linear_fc1.{suffix}"),
                 ("mlp.fc2", f"mlp.linear_fc2.{suffix}"),
                 ("self_attn.out_proj", f"self_attention.linear_proj.{suffix}")]
                if core else
                [("layer_norm1", f"input_layernorm.{suffix}"), ("layer_norm2", f"post_attention_layernorm.{suffix}"),
                 ("mlp.fc1", f"mlp.dense_h_to_4h.{suffix}"), ("mlp.fc2", f"mlp.dense_4h_to_h.{suffix}"),
                 ("self_attn.out_proj", f"self_attention.dense.{suffix}")]
            )  # fmt: skip
            state |= {block + new: text[f"{ours}.{old}.{suffix}"] for old, new in rows}
    final = "final_layernorm" if core else "language_model.encoder.final_layernorm"
    state |= {f"{final}.{suffix}": text[f"text_model.final_layer_norm.{suffix}"] for suffix in ("weight", "bias")}
    state[f"{base}embedding.word_embeddings.weight"] = text["text_model.embeddings.token_embedding.weight"]
    position = "position_embeddings.weight" if core else "position_embeddings"
    state[f"{base}embedding.{position}"] = text["text_model.embeddings.position_embedding.weight"]
    return state | {"head.weight": torch.ones(32, 32)}


def write_nemo(path, state, config, mode="w"):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with tarfile.open(path, mode) as archive:
        for name, data in {
            "model_config.yaml": yaml.safe_dump(config).encode(),
            "model_weights.ckpt": buffer.getvalue(),
        }.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


# --- diffusers


def test_unet_names_agree_with_diffusers_own_converter(reference, canonical):
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in canonical["unet"].items()}
    converted = theirs.convert_ldm_unet_checkpoint(state, dict(reference.unet.config))
    equal(converted, reference.unet.state_dict())


def test_vae_names_agree_with_diffusers_own_converter(reference, canonical):
    state = {f"first_stage_model.{name}": tensor for name, tensor in canonical["vae"].items()}
    converted = theirs.convert_ldm_vae_checkpoint(state, dict(reference.vae.config))
    equal(converted, reference.vae.state_dict())


def test_text_names_are_transformers(reference, canonical):
    state = {name.removeprefix("text_model."): tensor for name, tensor in canonical["text_encoder"].items()}
    own = {name.removeprefix("text_model."): tensor for name, tensor in reference.text_encoder.state_dict().items()}
    equal(state, {name: tensor for name, tensor in own.items() if not name.endswith("position_ids")})


def test_component_folders_files_and_bins(tmp_path, reference, reference_folder, canonical, shapes):
    for part in PARTS:
        equal(load(reference_folder / part, shapes, part), canonical[part])
        for file in (reference_folder / part).glob("*.safetensors"):
            equal(load(file, shapes, part), canonical[part])
    torch.save(reference.unet.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    equal(load(tmp_path, shapes, "unet"), canonical["unet"])


def test_sharded_and_variants(tmp_path, reference, canonical, shapes):
    reference.unet.save_pretrained(tmp_path / "sharded" / "unet", max_shard_size="500KB")
    assert list((tmp_path / "sharded" / "unet").glob("*.index.json"))
    equal(load(tmp_path / "sharded", shapes, "unet"), canonical["unet"])
    index = next((tmp_path / "sharded" / "unet").glob("*.index.json"))
    index.rename(index.with_name(index.name.replace(".index.json", ".index.fp16.json")))  # as transformers names it
    equal(load(tmp_path / "sharded", shapes, "unet"), canonical["unet"])
    half = {name: tensor.half() for name, tensor in canonical["unet"].items()}
    state = {name: tensor.half() for name, tensor in reference.unet.state_dict().items()}
    (tmp_path / "half").mkdir()
    safetensors.torch.save_file(state, tmp_path / "half" / "diffusion_pytorch_model.fp16.safetensors")
    equal(load(tmp_path / "half", shapes, "unet"), half)


def test_non_ema_variant_is_the_raw_weights(tmp_path, reference, canonical, shapes):
    reference.unet.save_pretrained(tmp_path / "unet")
    raw = {name: tensor + 1 for name, tensor in reference.unet.state_dict().items()}
    safetensors.torch.save_file(raw, tmp_path / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    equal(load(tmp_path, shapes, "unet"), canonical["unet"])
    equal(load(tmp_path, shapes, "unet", weights="raw"), {n: t + 1 for n, t in canonical["unet"].items()})


def test_old_vae_attention_names(tmp_path, reference, canonical, shapes):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in reference.vae.state_dict().items():
        for new, old in names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        quirk = name.endswith("proj_attn.weight")  # an old converter wrote three dimensions here
        state[name] = tensor.unsqueeze(-1) if quirk else tensor
    torch.save(state, tmp_path / "vae.bin")
    equal(load(tmp_path / "vae.bin", shapes, "vae"), canonical["vae"])


# --- LDM


@pytest.mark.parametrize("container", ["safetensors", "ckpt", "flat"])
def test_ldm_single_file(tmp_path, reference, canonical, shapes, container):
    state = {name: tensor.contiguous() for name, tensor in ldm_state(canonical, reference.version == 2).items()}
    path = tmp_path / "model.ckpt"
    if container == "safetensors":
        safetensors.torch.save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    else:
        torch.save({"state_dict": state, "global_step": 1} if container == "ckpt" else state, path)
    for part in PARTS:
        equal(load(path, shapes, part), canonical[part])
        for from_nemo in (True, False):
            equal(load(path, shapes, part, from_nemo=from_nemo), canonical[part])


def test_openclip_agrees_with_diffusers_own_converter(reference, canonical):
    text = reference.text_encoder
    converted = theirs.convert_open_clip_checkpoint(text, open_clip_of(canonical["text_encoder"], "m."), prefix="m.")
    flat = {name.removeprefix("text_model."): tensor for name, tensor in converted.items()}
    own = {name.removeprefix("text_model."): tensor for name, tensor in text.state_dict().items()}
    for name, tensor in own.items():
        if "layers" in name:  # theirs drops layer 23 by number, and reads widths from the model
            assert torch.equal(flat[name], tensor), name


@pytest.mark.parametrize("prefix", ["", "model.", "cond_stage_model.model."])
def test_openclip_files(tmp_path, canonical, shapes, prefix):
    torch.save(open_clip_of(canonical["text_encoder"], prefix), tmp_path / "open_clip_pytorch_model.bin")
    equal(load(tmp_path / "open_clip_pytorch_model.bin", shapes, "text_encoder"), canonical["text_encoder"])


def test_text_model_left_out_and_position_ids(tmp_path, canonical, shapes):
    short = {name.removeprefix("text_model."): tensor for name, tensor in canonical["text_encoder"].items()}
    short["embeddings.position_ids"] = torch.arange(16.0)[None]
    torch.save({f"cond_stage_model.transformer.{name}": tensor for name, tensor in short.items()}, tmp_path / "a.ckpt")
    torch.save(short, tmp_path / "b.bin")
    for name in ("a.ckpt", "b.bin"):
        equal(load(tmp_path / name, shapes, "text_encoder"), canonical["text_encoder"])


def test_a_whole_clip_model(tmp_path, canonical, shapes):
    state = canonical["text_encoder"] | {"logit_scale": torch.tensor(1.0), "text_projection.weight": torch.ones(8, 32)}
    state |= {"vision_model.embeddings.class_embedding": torch.ones(8), "visual_projection.weight": torch.ones(8, 8)}
    torch.save(state, tmp_path / "clip.bin")
    equal(load(tmp_path / "clip.bin", shapes, "text_encoder"), canonical["text_encoder"])


def test_ema_is_taken_by_its_flattened_names(tmp_path, reference, canonical, shapes):
    state = ldm_state(canonical, reference.version == 2)
    average = {name: tensor * 2 for name, tensor in canonical["unet"].items()}
    flat = {f"model_ema.{('diffusion_model.' + name).replace('.', '')}": tensor for name, tensor in average.items()}
    torch.save({"state_dict": state | flat}, tmp_path / "m.ckpt")
    equal(load(tmp_path / "m.ckpt", shapes, "unet"), average)
    equal(load(tmp_path / "m.ckpt", shapes, "unet", weights="raw"), canonical["unet"])
    flat.popitem()
    torch.save({"state_dict": state | flat}, tmp_path / "m.ckpt")
    with pytest.raises(BadInput, match=r"no moving average of 1 U-Net tensors .*; take its raw weights"):
        read_part(tmp_path / "m.ckpt", "unet", shapes["unet"])
    flat |= {"model_ema.diffusion_modelodd": torch.ones(1), "model_ema.more": torch.ones(1)}
    equal(load(tmp_path / "m.ckpt", shapes, "unet", weights="raw"), canonical["unet"])


# --- NeMo


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("norms", ["kept", "moved", "engine"])
def test_every_nemo_unet_dialect(tmp_path, canonical, shapes, fused, norms):
    state = nemo_unet(canonical["unet"], fused, norms != "kept", norms == "engine")
    state["input_blocks.1.1.transformer_blocks.0.attn1._extra_state"] = torch.ones(1)
    torch.save({f"model.model.diffusion_model.{name}": tensor for name, tensor in state.items()}, tmp_path / "m.ckpt")
    equal(load(tmp_path / "m.ckpt", shapes, "unet"), canonical["unet"])
    equal(load(tmp_path / "m.ckpt", shapes, "unet", from_nemo=True), canonical["unet"])


@pytest.mark.parametrize("prefix", [
    "model.model.diffusion_model.", "model.diffusion_model.", "model.model.diffusion_model._orig_mod.",
    "model._orig_mod.diffusion_model.", "model.model._orig_mod.diffusion_model.", "model.module.model.diffusion_model.",
    "model.module.model.diffusion_model._orig_mod.", "model.unet.", "",
])  # fmt: skip
def test_every_unet_prefix(tmp_path, canonical, shapes, prefix):
    torch.save({prefix + name: t for name, t in nemo_unet(canonical["unet"]).items()}, tmp_path / "m.ckpt")
    equal(load(tmp_path / "m.ckpt", shapes, "unet"), canonical["unet"])


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("dreambooth", [False, True])
def test_whole_nemo_archive(tmp_path, reference, canonical, shapes, mode, dreambooth):
    names = (
        ("unet", "vae", "text_encoder")
        if dreambooth
        else ("model.diffusion_model", "first_stage_model", "cond_stage_model")
    )
    parts = (
        nemo_unet(canonical["unet"]),
        canonical["vae"],
        text_ldm(canonical["text_encoder"], reference.version == 2),
    )
    state = {f"model.{name}.{key}": t for name, part in zip(names, parts, strict=True) for key, t in part.items()}
    state |= {"model.noise_scheduler.betas": torch.ones(3)} if dreambooth else {"model.betas": torch.ones(3)}
    path = write_nemo(tmp_path / "m.nemo", state, {}, mode)
    for part in PARTS:
        equal(load(path, shapes, part), canonical[part])


@pytest.mark.parametrize("prefix", ["model.cond_stage_model.model.", "model.text_encoder."])
@pytest.mark.parametrize("layout", ["legacy", "interleaved", "core"])
def test_megatron_clip(tmp_path, canonical, shapes, prefix, layout):
    state = megatron_of(canonical["text_encoder"], None if layout == "legacy" else 2, layout == "core")
    padded = next(name for name in state if name.endswith("word_embeddings.weight"))
    state[padded] = torch.cat([state[padded], torch.zeros(128, 32)])  # Megatron pads the vocabulary
    whole = {prefix + name: tensor for name, tensor in state.items()}
    whole |= {"model.vision_encoder.head.weight": torch.ones(2), "model.logit_scale": torch.tensor(1.0)}
    text = {"megatron_legacy": layout == "legacy", "num_attention_heads": 2}
    config = {"text": text} if "text_encoder" in prefix else {"cond_stage_config": {"cfg": {"text": text}}}
    path = write_nemo(tmp_path / "clip.nemo", whole, config)
    equal(load(path, shapes, "text_encoder"), canonical["text_encoder"])


# --- ours


def test_own_folders(tmp_path, canonical, shapes):
    step = tmp_path / "run" / "checkpoints" / "step-00000020"
    older = tmp_path / "run" / "checkpoints" / "step-00000003"
    for folder, factor in ((step, 1), (older, 5)):
        (folder / "ema").mkdir(parents=True)
        for file, scale in (("unet", factor), ("ema/unet", factor * 2)):
            scaled = {name: tensor * scale for name, tensor in canonical["unet"].items()}
            safetensors.torch.save_file(scaled, folder / f"{file}.safetensors")
        (folder / "state.json").write_text("{}")
    (step.parent / "step-00000030.INCOMPLETE").mkdir()
    (step.parent / "step-00000030.INCOMPLETE" / "unet.safetensors").write_bytes(b"half")
    for part in ("vae", "text_encoder"):
        safetensors.torch.save_file(canonical[part], tmp_path / "run" / f"{part}.safetensors")
    for path in (tmp_path / "run", step):
        equal(load(path, shapes, "unet", weights="raw"), canonical["unet"])
        equal(load(path, shapes, "unet"), {name: tensor * 2 for name, tensor in canonical["unet"].items()})
        equal(load(path, shapes, "vae"), canonical["vae"])
        equal(load(path, shapes, "text_encoder"), canonical["text_encoder"])
    equal(load(step / "unet.safetensors", shapes, "unet"), canonical["unet"])


def test_unfinished_and_damaged_steps_are_never_taken(tmp_path, canonical, shapes):
    run = tmp_path / "run"
    good = run / "checkpoints" / "step-00000010"
    for name in ("step-00000010", "step-00000020.DAMAGED", "step-00000020.DAMAGED-2", "step-00000030", "old-40"):
        folder = run / "checkpoints" / name
        folder.mkdir(parents=True)
        factor = 1 if folder == good else 2
        scaled = {key: tensor * factor for key, tensor in canonical["unet"].items()}
        safetensors.torch.save_file(scaled, folder / "unet.safetensors")
        if name != "step-00000030":  # killed before its state was written
            checksums = {"unet.safetensors": hash_file(folder / "unet.safetensors")}
            (folder / "state.json").write_text(json.dumps({"checksums": checksums}))
    equal(load(run, shapes, "unet"), canonical["unet"])
    with pytest.raises(BadInput, match="an unfinished or damaged checkpoint; take another of the run"):
        open_checkpoint(run / "checkpoints" / "step-00000020.DAMAGED")
    check_sums(good / "unet.safetensors")
    data = bytearray((good / "unet.safetensors").read_bytes())
    data[-1] ^= 1  # a flipped bit leaves a file that reads well
    (good / "unet.safetensors").write_bytes(data)
    with pytest.raises(BadInput, match=r"unet\.safetensors: damaged since it was written; take another checkpoint"):
        check_sums(open_checkpoint(run).parts["unet"].path)


def test_shard_indices_name_only_neighbours(tmp_path, shapes):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x"}}))
    with pytest.raises(BadInput, match="must be a plain file name"):
        read_part(tmp_path, "unet", shapes["unet"])
