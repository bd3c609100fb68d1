"""A tiny random model as a diffusers folder, and a server of it in this process."""

import json
import threading

import diffusers
import pytest
import torch
import transformers
import uvicorn

from latentsmith.inference import Pipeline
from latentsmith.server.app import Server, build_app
from latentsmith.server.limits import Limits
from latentsmith.server.listen import bound
from latentsmith.text.tokenizer import train_vocabulary

TEXTS = ["a red circle above a small blue square", "a cat on a mat"]
LIMITS = Limits(pixels=64 * 64, steps=40, count=8, queued_images=16, body_bytes=2**20)


def save_model(folder, seed=0):
    """Write a random model whose images have contrast."""
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=2, sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32), layers_per_block=1, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=560,
        max_position_embeddings=16, hidden_act="quick_gelu",
    ))  # fmt: skip
    for name, part in {"unet": unet, "vae": vae, "text_encoder": text}.items():
        for parameter in part.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
        part.save_pretrained(folder / name)
    diffusers.DDIMScheduler(beta_schedule="scaled_linear").save_pretrained(folder / "scheduler")
    train_vocabulary(TEXTS, 560, folder / "tokenizer")
    classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel",
               "tokenizer": "CLIPTokenizer", "scheduler": "DDIMScheduler"}  # fmt: skip
    index = {name: ["transformers" if "CLIP" in each else "diffusers", each] for name, each in classes.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **index}))
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def pipeline(model_folder):
    return Pipeline.from_pretrained(str(model_folder))


@pytest.fixture(scope="session")
def running(model_folder, tmp_path_factory):
    """A server of two models at a port of this machine; its address and itself."""
    other = save_model(tmp_path_factory.mktemp("models") / "other", seed=1)
    server = Server([str(model_folder), str(other)], limits=LIMITS, at_once=4)
    server.load()
    listener = bound("127.0.0.1", 0)
    http = uvicorn.Server(uvicorn.Config(build_app(server), log_level="error", ws="none"))
    thread = threading.Thread(target=http.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
    http.should_exit = True
    thread.join()
    listener.close()
