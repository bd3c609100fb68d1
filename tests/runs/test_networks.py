"""How a config's text encoder reads captions."""

import pytest

from latentsmith import load_config
from latentsmith.inference.vocabulary import _open_clip_file
from latentsmith.runs.networks import build_tokenizer, weights_of

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
    words = build_tokenizer(config)
    assert (words.cleaning, words.pad_id) == (cleaning, pad_id)


def test_a_version_names_published_weights():
    config = load_config("sd2_base", [f"model.cond_stage_config._target_={NEMO}FrozenOpenCLIPEmbedder"])
    assert weights_of(config, "text_encoder") == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    config.model.ckpt_path = "sd2.ckpt"
    assert weights_of(config, "text_encoder") == "sd2.ckpt"
