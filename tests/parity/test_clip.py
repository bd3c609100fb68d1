"""The whole CLIP against transformers and open_clip, random weights."""

import importlib
import importlib.util
import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from latentsmith.evaluation.clip import load_clip, normalised
from latentsmith.evaluation.resize import RULES
from latentsmith.files.errors import BadInput
from latentsmith.text.tokenizer import train_vocabulary

TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"vocab_size": 518, "max_position_embeddings": 16, "eos_token_id": 517, "bos_token_id": 516}
IMAGE = {"hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 3}
IMAGE |= {"image_size": 28, "patch_size": 7}

REAL = [
    ("ViT-L-14", dict(width=1024, layers=24, heads=16), dict(width=768, layers=12, heads=12), 768),
    ("ViT-H-14", dict(width=1280, layers=32, heads=16), dict(width=1024, layers=24, heads=16), 1024),
]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    train_vocabulary(["a red circle"], 518, folder)
    return folder


def inputs(tokenizer):
    torch.manual_seed(1)
    images = torch.randint(0, 256, (3, 3, 28, 28)).float()
    return images, tokenizer(["a red circle", "a circle", "red red red red red red red red red red red"])


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_hugging_face(tmp_path, words, activation):
    torch.manual_seed(0)
    config = CLIPConfig(text_config=TEXT | {"hidden_act": activation}, vision_config=IMAGE | {"hidden_act": activation},
                        projection_dim=96)  # fmt: skip
    theirs = CLIPModel(config).eval()
    theirs.save_pretrained(tmp_path)
    for file in words.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    ours, tokenizer = load_clip(str(tmp_path))
    images, ids = inputs(tokenizer)
    with torch.no_grad():
        output = theirs(input_ids=ids, pixel_values=normalised(images))
    assert ours.activation == activation
    torch.testing.assert_close(ours.encode_images(normalised(images)), output.image_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.encode_texts(ids, tokenizer.end_id), output.text_embeds, rtol=0, atol=1e-6)


@pytest.fixture
def open_clip(monkeypatch):
    """open_clip's networks without the rest of the package, which needs torchvision."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("open_clip_torch is not installed")
    package, misc = ModuleType("open_clip"), ModuleType("torchvision.ops.misc")
    package.__path__, misc.FrozenBatchNorm2d = spec.submodule_search_locations, torch.nn.BatchNorm2d
    for name, module in (
        ("open_clip", package),
        ("torchvision", misc),
        ("torchvision.ops", misc),
        (misc.__name__, misc),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module("open_clip.transformer")
    for name in [name for name in sys.modules if name.startswith("open_clip.")]:
        del sys.modules[name]


def open_clip_model(networks, image, text, embed_dim, quick):
    """CLIP as open_clip puts it together: the text tower's tensors stand at the top."""
    activation = networks.QuickGELU if quick else torch.nn.GELU
    visual = networks.VisionTransformer(**image, mlp_ratio=4.0, output_dim=embed_dim, act_layer=activation).eval()
    tower = networks.TextTransformer(**text, output_dim=embed_dim, act_layer=activation).eval()
    state = {f"visual.{name}": tensor for name, tensor in visual.state_dict().items()} | tower.state_dict()
    return visual, tower, {name: tensor.contiguous() for name, tensor in state.items()}


@pytest.mark.parametrize("quick", [True, False])
def test_open_clip(tmp_path, words, quick, open_clip):
    torch.manual_seed(0)
    image = {"image_size": 28, "layers": 3, "width": 192, "patch_size": 7, "heads": 3}
    text = {"context_length": 16, "vocab_size": 518, "width": 128, "heads": 2, "layers": 2}
    visual, tower, state = open_clip_model(open_clip, image, text, 96, quick)
    save_file(state, tmp_path / "clip.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": quick}}))
    for file in words.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    ours, tokenizer = load_clip(str(tmp_path / "clip.safetensors"))
    images, ids = inputs(tokenizer)
    with torch.no_grad():
        image_embeds, text_embeds = (F.normalize(each, dim=-1) for each in (visual(normalised(images)), tower(ids)))
    torch.testing.assert_close(ours.encode_images(normalised(images)), image_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.encode_texts(ids, tokenizer.end_id), text_embeds, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "image", "text", "embed_dim"), REAL)
def test_open_clip_of_real_sizes(tmp_path, words, arch, image, text, embed_dim, open_clip):
    """4 GB for ViT-H-14."""
    torch.manual_seed(0)
    image, text = {"image_size": 224, "patch_size": 14, **image}, {"context_length": 77, "vocab_size": 49408, **text}
    visual, tower, state = open_clip_model(open_clip, image, text, embed_dim, False)
    save_file(state, tmp_path / "clip.safetensors")
    del state
    for file in words.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    ours, tokenizer = load_clip(str(tmp_path / "clip.safetensors"))
    images, ids = torch.randint(0, 256, (1, 3, 224, 224)).float(), tokenizer(["a red circle"])
    with torch.no_grad():
        image_embeds, text_embeds = (F.normalize(each, dim=-1) for each in (visual(normalised(images)), tower(ids)))
    torch.testing.assert_close(ours.encode_images(normalised(images)), image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.encode_texts(ids, tokenizer.end_id), text_embeds, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (100, 61), (40, 333)])
def test_center_crop_is_clips_own_preparation(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    ours = normalised(RULES["center-crop"](image, 28)[None])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_other_weights_are_one_line(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match="holds no CLIP with an image tower"):
        load_clip(str(tmp_path / "a.safetensors"))
    save_file({"visual.conv1.weight": torch.zeros(2, 3, 4, 4)}, tmp_path / "b.safetensors")
    with pytest.raises(BadInput, match=r"'visual\.positional_embedding' is missing"):
        load_clip(str(tmp_path / "b.safetensors"))
