"""The networks of a run, and the spec that travels with its weights."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from latentsmith.checkpoints import ModelSpec, open_checkpoint
from latentsmith.checkpoints.spec import NEMO_LENGTH, pads_text, stated_text
from latentsmith.config.build import arguments, build
from latentsmith.diffusion import canonical_prediction_type
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_tensors
from latentsmith.files.hub import published
from latentsmith.files.tensors import save_safetensors
from latentsmith.text.tokenizer import Tokenizer
from latentsmith.text.vocabulary import own_vocabulary

SOURCES = ("_target_", "from_pretrained", "from_NeMo", "restore_from_path", "monitor", "lossconfig", "device")
PARTS = {"unet": "unet_config", "vae": "first_stage_config", "text_encoder": "cond_stage_config"}


def is_encoded(key: str) -> bool:
    """Whether a stage key means cached encodings: NeMo's `image_encoded`, `captions_encoded`, `images_moments`."""
    return key.endswith(("encoded", "moments"))


def weights_of(config: DictConfig, part: str) -> str | None:
    """Where the weights of a part come from: its own key, else model.ckpt_path for all three, else the published
    `version` that a text encoder's config names."""
    return stated_weights(config, part) or published(config.model[PARTS[part]].get("version"))


def stated_weights(config: DictConfig, part: str) -> str | None:
    """The file or folder that the config itself gives for a part."""
    node = config.model[PARTS[part]]
    return node.from_pretrained or node.get("restore_from_path") or config.model.ckpt_path


def settle_padding(config: DictConfig) -> None:
    """Fill in cond_stage_config.pad_to, if it is null, from the weights that the U-Net starts with."""
    start, node = stated_weights(config, "unet"), config.model.cond_stage_config
    if start and node.pad_to is None and pads_text(stated_text(open_checkpoint(start))):
        OmegaConf.update(config, "model.cond_stage_config.pad_to", NEMO_LENGTH, force_add=True)
        print(f"{start}: trained by NeMo with text embeddings filled up to {NEMO_LENGTH}, and used so here (pad_to)")


def build_networks(config: DictConfig) -> dict[str, nn.Module]:
    """The networks that this training needs or keeps, by name; BadInput where a frozen one has no weights.

    The U-Net always; the VAE if pictures have to be encoded or a file of it is given; so the text encoder, and if it
    is trained. Fresh weights are a function of model.seed.
    """
    model = config.model
    needed = {
        "unet": True,
        "vae": not is_encoded(model.first_stage_key),
        "text_encoder": not is_encoded(model.cond_stage_key) or model.cond_stage_trainable,
    }
    networks = {}
    for part, key in PARTS.items():
        given = weights_of(config, part)
        fresh_allowed = part == "unet" or (part == "text_encoder" and model.cond_stage_trainable)
        if needed[part] and not given and not fresh_allowed:
            raise BadInput(f"model.{key}.from_pretrained is not set: the {part} is frozen and would stay random")
        if needed[part] or stated_weights(config, part):
            networks[part] = build_network(config, part)
    return networks


def build_network(config: DictConfig, part: str) -> nn.Module:
    """One network with its weights, or with fresh ones that are a function of model.seed."""
    torch.manual_seed(config.model.seed)
    filled = {"from_pretrained": weights_of(config, part)}
    return build(OmegaConf.merge(config.model[PARTS[part]], filled), weights=config.model.ckpt_weights)  # type: ignore[arg-type]


def build_tokenizer(config: DictConfig) -> Tokenizer:
    """The tokenizer of the text encoder: its `tokenizer` key, or the files beside its weights.

    An OpenCLIP encoder without files of its own reads captions as open_clip does; NeMo's Megatron CLIP does not.
    """
    node, weights = config.model.cond_stage_config, weights_of(config, "text_encoder")
    of_open_clip = (node.activation or {"ViT-H-14": "gelu"}.get(node.arch)) == "gelu" and not node.restore_from_path
    as_open_clip = of_open_clip and not own_vocabulary(weights)
    words = Tokenizer.find(node.tokenizer, weights, node.max_length, cleaning="open_clip" if as_open_clip else None)
    if words.vocab_size > node.vocab_size:
        raise BadInput(
            f"the tokenizer has {words.vocab_size} tokens, cond_stage_config.vocab_size is {node.vocab_size}"
        )
    return words


def spec_of_run(config: DictConfig, scale_factor: float, latent_size: int) -> ModelSpec:
    """What the weights of this run do not show, kept in their metadata."""
    model = config.model
    zeroed = model.text_embedding_dropout_rate > 0 and not model.caption_dropout_rate
    return ModelSpec(
        keywords(model.unet_config),
        keywords(model.first_stage_config),
        {k: v for k, v in keywords(model.cond_stage_config).items() if k not in ("tokenizer", "freeze")},
        canonical_prediction_type(model.parameterization),
        image_size=latent_size,
        scale_factor=scale_factor,
        linear_start=model.linear_start,
        linear_end=model.linear_end,
        timesteps=model.timesteps,
        beta_schedule=model.beta_schedule,
        cosine_s=model.cosine_s,
        zero_terminal_snr=model.zero_terminal_snr,
        timestep_spacing="trailing" if model.zero_terminal_snr else None,  # the only one that starts from pure noise
        null_text="zero" if zeroed else "empty",
    )


def keywords(node: DictConfig) -> dict[str, Any]:
    """The constructor keywords that shape a network."""
    return {key: value for key, value in arguments(node).items() if key not in SOURCES}


def fingerprint(network: nn.Module) -> str:
    return fingerprint_tensors(network.state_dict())


def layer_of(config: DictConfig) -> str:
    """What a cache records of the text encoder's output beside its weights: the layer, and padding if there is any."""
    node = config.model.cond_stage_config
    return node.layer + (f", padded to {node.pad_to}" if node.pad_to else "")


def save_frozen(
    folder: Path, networks: dict[str, nn.Module], trained: tuple[str, ...], words: Tokenizer | None
) -> None:
    """Put what is not trained into the run folder, once, so that the folder is a whole model."""
    for name, network in networks.items():
        path = folder / f"{name}.safetensors"
        if name not in trained and not path.exists():
            save_safetensors(path, dict(network.state_dict()))
    if words is not None:
        words.save(folder / "tokenizer")
