"""Files of other programs against a merge by hand in float64, and against LyCORIS' and peft's own modules."""

import io
import json
import tarfile

import lycoris
import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from latentsmith.adapters import adapters_of, load_adapter_state
from latentsmith.adapters.read import read_adapter

TOLERANCE = 1e-5


def theirs_text(name):
    return name if name.startswith("text_model.") else f"text_model.{name}"


def targets(network, convs=True):
    """diffusers' or transformers' modules by name, as kohya finds them."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) or (convs and isinstance(module, nn.Conv2d))
    }


def random_lora(weight, rank, *, tucker=False):
    out, columns = weight.flatten(1).shape
    if tucker and weight.dim() == 4 and weight.shape[2] > 1:
        mid = torch.randn(rank, rank, *weight.shape[2:]) / rank
        down, up = torch.randn(rank, weight.shape[1], 1, 1), torch.randn(out, rank, 1, 1)
        return down * 0.1, up * 0.1, mid
    down = torch.randn(rank, *weight.shape[1:]) / columns**0.5
    return down, torch.randn(out, rank, *[1] * (weight.dim() - 2)) * 0.3, None


def write_kohya(unet, text, path, *, dora=False, tucker=False):
    """The independent script: kohya's names and arithmetic from the facts alone. Merges into the given networks."""
    torch.manual_seed(5)
    tensors = {}
    for prefix, network in (("lora_unet_", unet), ("lora_te_", text)):
        for number, (name, module) in enumerate(targets(network).items()):
            key = prefix + (name if prefix == "lora_unet_" else theirs_text(name)).replace(".", "_")
            rank, alpha = 2 + number % 3, 1.0 + number % 2
            down, up, mid = random_lora(module.weight, rank, tucker=tucker)
            tensors |= {
                f"{key}.lora_down.weight": down,
                f"{key}.lora_up.weight": up,
                f"{key}.alpha": torch.tensor(alpha),
            }
            weight = module.weight.data.double()
            if mid is None:
                change = (up.double().flatten(1) @ down.double().flatten(1)).reshape(weight.shape) * alpha / rank
            else:
                tensors[f"{key}.lora_mid.weight"] = mid
                change = torch.einsum("or,rsxy,si->oixy", *(t.double() for t in (up[..., 0, 0], mid, down[..., 0, 0])))
                change = change * alpha / rank
            merged = weight + change
            if dora:
                shape = [len(weight), *[1] * (weight.dim() - 1)]
                norms = merged.flatten(1).norm(dim=1).reshape(shape)
                scale = 1 + 0.2 * torch.rand(shape)
                tensors[f"{key}.dora_scale"] = scale
                merged = merged * scale.double() / norms
            module.weight.data = merged
    save_file(tensors, path)


def loaded(model, path, dtype=torch.float32):
    """Our networks with the adapter of a file on them, unmerged."""
    pipeline = model.pipeline()
    file = read_adapter(path, model.layers)
    for part in file.parts:
        load_adapter_state(getattr(pipeline, part), file.parts[part], "style")
    return pipeline.unet.to(dtype), pipeline.text_encoder.to(dtype), file


def assert_same(ours, theirs, inputs, model, dtype=torch.float64):
    unet, text = ours
    given = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs]
    expected, plain = (network.to(dtype)(*given).sample for network in (theirs[0], model.unet()))
    assert (expected - plain).abs().max() > 0.05
    with torch.no_grad():
        scale = expected.abs().max()
        torch.testing.assert_close(
            (unet(*inputs) - expected).double() / scale, torch.zeros_like(expected).double(), atol=TOLERANCE, rtol=0
        )
        if text is not None:
            tokens = torch.arange(20).reshape(2, 10) + 300
            hidden = theirs[1].double()(tokens).last_hidden_state
            found = text(tokens).double() / hidden.abs().max()
            torch.testing.assert_close(found, hidden / hidden.abs().max(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"tucker": True}], ids=["locon", "dora", "tucker"])
def test_kohya_files_equal_a_merge_by_hand_in_float64(model, inputs, tmp_path, options):
    unet, text = model.unet(), model.text_encoder()
    write_kohya(unet, text, tmp_path / "a.safetensors", **options)
    ours = loaded(model, tmp_path / "a.safetensors")
    assert ours[2].layers == {"unet": len(targets(unet)), "text_encoder": len(targets(text))}
    assert_same(ours[:2], (unet, text), inputs, model)


ALGORITHMS = {
    "lora": dict(algo="lora", linear_dim=4, linear_alpha=2, conv_dim=2, conv_alpha=1),
    "dora": dict(algo="lora", linear_dim=4, linear_alpha=2, dora_wd=True),
    "tucker": dict(algo="lora", linear_dim=4, linear_alpha=2, use_tucker=True),
    "loha": dict(algo="loha", linear_dim=4, linear_alpha=2),
    "loha-tucker": dict(algo="loha", linear_dim=4, linear_alpha=2, use_tucker=True),
    "loha-dora": dict(algo="loha", linear_dim=4, linear_alpha=2, dora_wd=True),
    "lokr": dict(algo="lokr", linear_dim=2, linear_alpha=1, factor=4),
    "lokr-both": dict(algo="lokr", linear_dim=1, linear_alpha=3, factor=8, decompose_both=True),
    "lokr-full": dict(algo="lokr", linear_dim=10000, linear_alpha=3, factor=4),
    "lokr-tucker": dict(algo="lokr", linear_dim=2, linear_alpha=1, factor=4, use_tucker=True),
    "oft": dict(algo="diag-oft", linear_dim=4, linear_alpha=1),
    "oft-limited": dict(algo="diag-oft", linear_dim=4, linear_alpha=1, constraint=0.01, rescaled=True),
    "boft": dict(algo="boft", linear_dim=4, linear_alpha=1),
    "glora": dict(algo="glora", linear_dim=4, linear_alpha=2),
    "ia3": dict(algo="ia3", linear_dim=1, linear_alpha=1),
}


QUICK = ("dora", "loha", "lokr", "oft")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ALGORITHMS]
)
def test_files_saved_by_lycoris_equal_its_forward_pass(models, inputs, tmp_path, name):
    model, options = models[1], dict(ALGORITHMS[name])
    unet = model.unet()
    blocks = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]
    lycoris.LycorisNetwork.apply_preset({"target_module": blocks})
    torch.manual_seed(3)
    network = lycoris.create_lycoris(unet, 1.0, **options)
    network.apply_to()
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if parameter.is_floating_point() and "alpha" not in key:
                parameter.add_(torch.randn_like(parameter) * (0.02 if "diff" in key or "oft" in key else 0.1))
    path = tmp_path / "a.safetensors"
    network.save_weights(str(path), torch.float32, {})
    ours = loaded(model, path)
    dtype = torch.float32 if name == "glora" else torch.float64  # its module keeps a float32 copy of the weight
    assert_same((ours[0], None), (unet, None), inputs, model, dtype)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("spelling", ["peft", "folder", "scripts"])
def test_peft_files_equal_peft(model, inputs, tmp_path, dora, spelling):
    torch.manual_seed(4)
    unet = model.unet()
    names = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "conv1"]
    config = peft.LoraConfig(
        r=4, lora_alpha=2 if spelling != "scripts" else 4, target_modules=names, use_dora=dora,
        rank_pattern={"conv1": 2}, alpha_pattern={} if spelling != "scripts" else {"conv1": 2},
    )  # fmt: skip
    adapted = peft.get_peft_model(unet, config)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.add_(torch.rand_like(parameter) * 0.2)
    state = peft.get_peft_model_state_dict(adapted)
    path = tmp_path / "a.safetensors"
    if spelling == "folder":
        path = tmp_path / "adapter"
        adapted.save_pretrained(path)
    elif spelling == "peft":
        own = {f"unet.{key}": value for key, value in config.to_dict().items()}
        own["unet.target_modules"] = sorted(own["unet.target_modules"])
        header = {"lora_adapter_metadata": json.dumps(own, default=str)}
        save_file({f"unet.{k.removeprefix('base_model.model.')}": v for k, v in state.items()}, path, header)
    else:
        renamed = {}
        for key, tensor in state.items():
            key = key.removeprefix("base_model.model.")
            if ".attn" in key:
                key = key.replace("lora_A.weight", "lora.down.weight").replace("lora_B.weight", "lora.up.weight")
            renamed[f"unet.{key}"] = tensor
        save_file(renamed, path)
    ours = loaded(model, path)
    assert_same((ours[0], None), (adapted.base_model.model, None), inputs, model)


def test_peft_lokr_keeps_its_scale(models, inputs, tmp_path):
    """peft scales whole factors by alpha / r, where LyCORIS does not."""
    unet = models[1].unet()
    config = peft.LoKrConfig(r=64, alpha=96, target_modules=["to_q", "to_k"])
    adapted = peft.get_peft_model(unet, config)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lokr_" in key:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    adapted.save_pretrained(tmp_path / "a")
    ours = loaded(models[1], tmp_path / "a")
    assert ours[2].scheme == "lokr"
    assert_same((ours[0], None), (adapted.base_model.model, None), inputs, models[1])


def test_old_spellings_of_diffusers(models, tmp_path):
    """The attention processors of 2023, with and without `unet.`, and the text encoder's."""
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    base = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor"
    text = "text_encoder.text_model.encoder.layers.1.self_attn"
    for prefix in ("unet.", ""):
        tensors = {}
        for name in ("to_q_lora", "to_out_lora"):
            tensors |= {f"{prefix}{base}.{name}.down.weight": down, f"{prefix}{base}.{name}.up.weight": up}
        if prefix:
            tensors |= {
                f"{text}.to_k_lora.down.weight": down[:, :24].contiguous(),
                f"{text}.to_k_lora.up.weight": up[:24].contiguous(),
            }
            short = "text_encoder.encoder.layers.0.self_attn.q_proj.lora_linear_layer"
            tensors |= {f"{short}.down.weight": down[:, :24].contiguous(), f"{short}.up.weight": up[:24].contiguous()}
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "old.safetensors")
        file = read_adapter(tmp_path / "old.safetensors", models[1].layers)
        assert "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.lora_up" in file.parts["unet"]
        assert file.layers == ({"unet": 2, "text_encoder": 2} if prefix else {"unet": 2})


def test_nemo_files(models, tmp_path):
    """Names and arithmetic of section 5: A is linear_in, B linear_out, alpha of the model config."""
    block = "input_blocks.1.1.transformer_blocks.0"
    tensors = {}
    for name, shape in (
        (f"{block}.attn1.to_q", (32, 32)),
        (f"{block}.ff.net.1.proj", (256, 32)),
        (f"{block}.ff.net.3", (32, 128)),
    ):
        key = f"model.model.diffusion_model.{name}.adapter_layer.parallel_linear_adapter"
        tensors |= {
            f"{key}.linear_in.weight": torch.randn(4, shape[1]),
            f"{key}.linear_out.weight": torch.randn(shape[0], 4),
        }
    text = "model.cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1_lora"
    text += ".adapter_layer.parallel_linear_adapter"
    tensors |= {f"{text}.linear_in.weight": torch.randn(4, 24), f"{text}.linear_out.weight": torch.randn(48, 4)}
    config = b"peft:\n  peft_scheme: sdlora\n  lora_tuning:\n    adapter_dim: 4\n    network_alpha: 2\n"
    weights = io.BytesIO()
    torch.save(tensors, weights)
    with tarfile.open(tmp_path / "a.nemo", "w") as archive:
        for name, data in (("model_config.yaml", config), ("model_weights.ckpt", weights.getvalue())):
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    pipeline = models[1].pipeline()
    file = read_adapter(tmp_path / "a.nemo", models[1].layers)
    assert file.format == "nemo" and file.layers == {"unet": 3, "text_encoder": 1}
    load_adapter_state(pipeline.unet, file.parts["unet"])
    adapters = dict(adapters_of(pipeline.unet))
    q = f"{block}.attn1.to_q"
    stem = f"model.model.diffusion_model.{q}.adapter_layer.parallel_linear_adapter"
    expected = 2 / 4 * tensors[f"{stem}.linear_out.weight"] @ tensors[f"{stem}.linear_in.weight"]
    torch.testing.assert_close(adapters[q].change(pipeline.unet.get_submodule(q).weight), expected)
    assert f"{block}.ff.net.2" in adapters and f"{block}.ff.net.0.proj" in adapters
