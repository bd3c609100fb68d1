"""How a config's text encoder reads captions."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentsmith import load_config
from latentsmith.checkpoints.from_config import build_network, build_tokenizer, weights_of
from latentsmith.config import replaced
from latentsmith.models import UNetModel
from latentsmith.text.tokenizer import train_vocabulary
from latentsmith.text.vocabulary import _open_clip_file

NEMO = "nemo.collections.multimodal.modules.stable_diffusion.encoders.modules."


@pytest.mark.skipif(_open_clip_file() is None, reason="the open_clip package is not installed")
@pytest.mark.parametrize(
    ("preset", "keys", "cleaning", "pad_id"),
    [
        ("sd1", {}, "transformers", 49407),
        ("sd1", {"_target_": NEMO + "FrozenCLIPEmbedder"}, "transformers", 49407),
        ("sd2_base", {"_target_": NEMO + "FrozenOpenCLIPEmbedder"}, "open_clip", 0),
        ("sd2_base", {"arch": "ViT-H-14"}, "open_clip", 0),
        ("sd2_base", {"restore_from_path": "clip.nemo"}, "transformers", 49407),
    ],
)
def test_captions_are_read_as_each_embedder_reads_them(preset, keys, cleaning, pad_id):
    config = load_config(preset, [f"model.cond_stage_config.{key}={value}" for key, value in keys.items()])
    tokenizer = build_tokenizer(config)
    assert (tokenizer.cleaning, tokenizer.pad_id) == (cleaning, pad_id)


def test_the_tokenizer_of_a_model_is_found_from_any_of_its_paths(tmp_path, monkeypatch):
    """The whole folder, its text encoder, a file of that, the run around a checkpoint, a hub name."""
    texts = ["a red circle", "a blue square"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "hub" / "models--owner--sd" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    places = {
        str(tmp_path / "folder"): "folder",
        str(tmp_path / "folder" / "text_encoder"): "folder",
        str(tmp_path / "folder" / "text_encoder" / "model.safetensors"): "folder",
        str(tmp_path / "run"): "run",
        str(tmp_path / "run" / "checkpoints" / "step-2"): "run",
        str(tmp_path / "run" / "checkpoints" / "step-2" / "ema" / "text_encoder.safetensors"): "run",
        "owner/sd": str(snapshot.relative_to(tmp_path)),
    }
    for size, (given, folder) in enumerate(places.items(), 520):
        train_vocabulary(texts, size, tmp_path / folder / "tokenizer")
        file = tmp_path / folder / "text_encoder" / "model.safetensors"
        file.parent.mkdir(exist_ok=True)
        file.touch()
        if given != "owner/sd":
            path = Path(given)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch() if path.suffix else path.mkdir(exist_ok=True)
        else:
            (snapshot.parent.parent / "refs").mkdir()
            (snapshot.parent.parent / "refs" / "main").write_text(snapshot.name)
        tokenizer = build_tokenizer(load_config("sd1", [f"model.cond_stage_config.from_pretrained={given}"]))
        assert tokenizer.vocab_size == size, given


def test_raw_weights_can_be_started_from(tmp_path):
    unet = UNetModel(model_channels=32, channel_mult=[1], attention_resolutions=[1], num_res_blocks=1, num_heads=2,
                     context_dim=8)  # fmt: skip
    state = {f"model.diffusion_model.{name}": torch.full(t.shape, 1.0) for name, t in unet.state_dict().items()}
    average = {"model_ema." + key.replace(".", "").removeprefix("model"): t * 2 for key, t in state.items()}
    save_file(state | average, tmp_path / "m.safetensors")
    config = load_config("sd1", [f"model.unet_config.from_pretrained={tmp_path / 'm.safetensors'}"])
    sizes = dict(model_channels=32, channel_mult=(1,), attention_resolutions=(1,), num_res_blocks=1, num_heads=2)
    config = replaced(config, "model.unet_config", replace(config.model.unet_config, **sizes, context_dim=8))
    for weights, value in (("ema", 2.0), ("raw", 1.0)):
        network = build_network(replaced(config, "model.ckpt_weights", weights), "unet")
        assert all((tensor == value).all() for tensor in network.state_dict().values())


def test_a_version_names_published_weights():
    config = load_config("sd2_base", [f"model.cond_stage_config._target_={NEMO}FrozenOpenCLIPEmbedder"])
    assert weights_of(config, "text_encoder") == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert weights_of(replaced(config, "model.ckpt_path", "sd2.ckpt"), "text_encoder") == "sd2.ckpt"
