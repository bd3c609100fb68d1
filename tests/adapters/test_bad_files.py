# ruff: noqa: E501  (one case on a line)
"""Forty files that are no adapter for the model: one line each, which names the file, and nothing is changed."""

import io
import json
import tarfile

import pytest
import torch
from safetensors.torch import save_file

from latentsmith.adapters.names import layers_of
from latentsmith.adapters.read import published_layers, read_adapter
from latentsmith.files.errors import BadInput
from latentsmith.files.tensors import save_safetensors

Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
PEFT = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
NEMO = "model.model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.adapter_layer"
CONFIG = {"unet.r": 2, "unet.lora_alpha": 2}


def good():
    return {
        f"{Q}.lora_down.weight": torch.ones(2, 32),
        f"{Q}.lora_up.weight": torch.ones(32, 2),
        f"{Q}.alpha": torch.tensor(1.0),
    }


def peft_pair():
    return {f"{PEFT}.lora_A.weight": torch.ones(2, 32), f"{PEFT}.lora_B.weight": torch.ones(32, 2)}


def having(**changed):
    """The good file with tensors of the layer replaced, or dropped where None; __ stands for a dot."""
    tensors = good() | {f"{Q}.{name.replace('__', '.')}": tensor for name, tensor in changed.items()}
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


def sdxl():
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"
    return {f"{stem}.lora_down.weight": torch.ones(2, 2048), f"{stem}.lora_up.weight": torch.ones(640, 2)}


def loha(**changed):
    names = {"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 32)}
    return {f"{Q}.{name}": changed.get(name, torch.ones(shape)) for name, shape in names.items()}


NAN = torch.full((32, 2), float("nan"))
FILES = {
    "rank 0": (having(lora_down__weight=torch.ones(0, 32), lora_up__weight=torch.ones(32, 0)), "is empty: a rank of 0"),
    "negative alpha": (having(alpha=torch.tensor(-1.0)), "its alpha is -1.0; it must be at least 0"),
    "nan alpha": (having(alpha=torch.tensor(float("nan"))), "its alpha is nan"),
    "alpha of two": (having(alpha=torch.ones(2)), "its alpha has the shape (2,), not one number"),
    "nan weights": (having(lora_up__weight=NAN), "lora_up holds values that are not finite"),
    "infinite": (having(lora_up__weight=NAN.nan_to_num(float("inf"))), "not finite"),
    "integers": (having(lora_up__weight=torch.ones(32, 2, dtype=torch.int64)), "lora_up is torch.int64"),
    "no up": (having(lora_up__weight=None), "lora_down: not the tensors of any scheme"),
    "no down": (having(lora_down__weight=None), "lora_up: not the tensors of any scheme"),
    "two schemes": (good() | loha(), "not the tensors of any scheme"),
    "ranks differ": (having(lora_up__weight=torch.ones(32, 3)), "its tensors do not fit each other"),
    "another width": (having(lora_down__weight=torch.ones(2, 48)), "it changes a weight of (32, 48), the model's has (32, 32)"),
    "another height": (having(lora_up__weight=torch.ones(48, 2)), "it changes a weight of (48, 32)"),
    "a kernel": (having(lora_down__weight=torch.ones(2, 32, 3, 3)), "it changes a weight of (32, 288)"),
    "dora of another width": (having(dora_scale=torch.ones(48, 1)), "its dora_scale has the shape (48, 1)"),
    "another suffix": (having(lora_upper__weight=torch.ones(2)), f"{Q}.lora_upper.weight is of no layer of this model"),
    "another layer": ({key.replace("to_q", "to_x"): t for key, t in good().items()}, "to_x.alpha is of no layer"),
    "another block": ({key.replace("blocks_0_att", "blocks_9_att"): t for key, t in good().items()}, "(3 of 3 keys are not)"),
    "one key too many": (good() | {"lora_unet_x.alpha": torch.tensor(1.0)}, "lora_unet_x.alpha is of no layer of this model, or of no known scheme (1 of 4"),
    "twice": (good() | {key.replace("lora_unet_", "lycoris_"): t + 1 for key, t in good().items()}, "gives a tensor that is there already"),
    "norms": (having(w_norm=torch.ones(32)), "changes norms (train_norm), which is not supported"),
    "biases": (having(diff_b=torch.ones(32)), "changes biases, which is not supported"),
    "t-lora": (having(q_layer__weight=torch.ones(32)), "is of T-LoRA, which is not supported"),
    "loha of another rank": (loha(hada_w1_b=torch.ones(3, 32)), "its tensors do not fit each other"),
    "lokr that does not divide": ({f"{Q}.lokr_w1": torch.ones(3, 3), f"{Q}.lokr_w2": torch.ones(10, 10)}, "it changes a weight of (30, 30)"),
    "oft of another size": ({f"{Q}.oft_blocks": torch.ones(5, 4, 4)}, "its tensors do not fit each other"),
    "only alphas": ({f"{Q}.alpha": torch.tensor(1.0)}, "nothing: not the tensors of any scheme"),
    "peft's oft": ({f"{PEFT}.oft_R.weight": torch.ones(4, 28)}, "is of peft's OFT, which turns inputs and is not supported"),
    "peft without b": ({f"{PEFT}.lora_A.weight": torch.ones(2, 32)}, "not the tensors of any scheme"),
    "peft of another layer": ({key.replace("to_q", "to_x"): t for key, t in peft_pair().items()}, "is of no layer of this model"),
    "peft without numbers": ((peft_pair(), json.dumps(CONFIG | {"unet.lora_alpha": "two"})), "gives r 2 and lora_alpha 'two'"),
    "peft of another type": ((peft_pair(), json.dumps(CONFIG | {"unet.peft_type": "VERA"})), "is of VERA, which is not supported"),
    "damaged config": ((peft_pair(), "{"), "lora_adapter_metadata"),
    "megatron": ({NEMO.replace("diffusion_model", "cond_stage_model.language_model") + ".parallel_linear_adapter.linear_in.weight": torch.ones(2, 2)},
                 "is of Megatron's CLIP, whose adapters are not supported"),
    "bundle of sdxl": (good() | {"bundle_emb.cat.clip_g": torch.ones(1, 1280)}, "the bundled embedding cat.clip_g is not of a model"),
    "an embedding": ({"emb_params": torch.ones(2, 24)}, "no adapter; its keys, such as emb_params"),
    "a model": ({"model.diffusion_model.out.2.bias": torch.ones(4)}, "no adapter; its keys"),
}  # fmt: skip


def refused(path, layers, message):
    with pytest.raises(BadInput) as caught:
        read_adapter(path, layers)
    assert message in str(caught.value), str(caught.value)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_files_that_do_not_fit(models, tmp_path, name):
    content, message = FILES[name]
    tensors, metadata = content if isinstance(content, tuple) else (content, None)
    path = tmp_path / "bad.safetensors"
    save_safetensors(path, tensors, {"lora_adapter_metadata": metadata} if metadata else None)
    refused(path, models[1].layers, message)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"<html>", "is a web page"),
        (b"version https://git-lfs\n", "is a git-lfs pointer"),
        (None, "no such file"),
    ],
)
def test_files_that_cannot_be_read(models, tmp_path, data, message):
    path = tmp_path / "bad.safetensors"
    if data is not None:
        path.write_bytes(data)
    refused(path, models[1].layers, message)


def test_truncated_folders_and_pickles_with_code(models, tmp_path):
    save_file(good(), tmp_path / "a.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "a.safetensors").read_bytes()[:-8])
    refused(cut, models[1].layers, "damaged or truncated")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", models[1].layers, "holds no adapter (pytorch_lora_weights.safetensors")

    class Code:
        def __reduce__(self):
            return (print, ("run",))

    torch.save(good() | {"x": Code()}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", models[1].layers, "print")


def test_nemo_with_a_config_of_no_number(models, tmp_path):
    weights = io.BytesIO()
    torch.save({f"{NEMO}.parallel_linear_adapter.linear_in.weight": torch.ones(2, 32)}, weights)
    path = tmp_path / "bad.nemo"
    with tarfile.open(path, "w") as archive:
        for name, data in (
            ("model_config.yaml", b"peft: {lora_tuning: {network_alpha: much}}"),
            ("model_weights.ckpt", weights.getvalue()),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    refused(path, models[1].layers, "network_alpha is 'much', not a number")


@pytest.mark.parametrize("ours", ["SD1", "SD2"])
@pytest.mark.parametrize("theirs", ["SD1", "SD2", "SDXL", "SDXL by its text encoder", "SD2 by its metadata"])
def test_an_adapter_for_another_model_is_one_clear_line(tmp_path, ours, theirs):
    path, width = tmp_path / "a.safetensors", {"SD1": 768, "SD2": 1024}.get(theirs)
    tensors, metadata = sdxl(), None
    if width:
        tensors = {f"{K}.lora_down.weight": torch.ones(2, width), f"{K}.lora_up.weight": torch.ones(320, 2)}
    if theirs.endswith("text encoder"):
        stem = "lora_te2_text_model_encoder_layers_31_mlp_fc1"
        tensors = {f"{stem}.lora_down.weight": torch.ones(2, 1280), f"{stem}.lora_up.weight": torch.ones(5120, 2)}
    if theirs.endswith("metadata"):
        tensors, metadata = (
            having(lora_down__weight=torch.ones(2, 320), lora_up__weight=torch.ones(320, 2)),
            {"ss_v2": "True"},
        )
    save_file(tensors, path, metadata)
    if theirs.split()[0] == ours:
        assert read_adapter(path, published_layers(ours)).base == ours
        return
    titles = {"SD1": "Stable Diffusion 1", "SD2": "Stable Diffusion 2", "SDXL": "SDXL"}
    refused(path, published_layers(ours), f"is for {titles[theirs.split()[0]]}, and this model is {titles[ours]}")


def test_nothing_is_changed_by_a_file_that_is_refused(models, tmp_path):
    pipeline = models[1].pipeline()
    before, layers = dict(pipeline.unet.state_dict()), layers_of({"unet": pipeline.unet})
    for tensors in (
        good() | {"lora_unet_x.alpha": torch.tensor(1.0)},
        good() | {"bundle_emb.a.emb_params": torch.ones(1, 24)},
    ):
        save_file(tensors, tmp_path / "bad.safetensors")
        with pytest.raises(BadInput):
            pipeline.load_lora(tmp_path / "bad.safetensors")
    assert pipeline.unet.state_dict().keys() == before.keys() and not pipeline.loras and not pipeline.tokenizer.added
    assert layers_of({"unet": pipeline.unet}) == layers
