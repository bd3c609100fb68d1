"""The networks and the tokenizer that a config asks for, filled from the files that it names."""

import math
from typing import Any

import torch
from torch import nn

from latentsmith.architectures import COMPONENTS, is_open_clip
from latentsmith.config import Config, replaced
from latentsmith.diffusion import canonical_prediction_type
from latentsmith.files.errors import BadInput
from latentsmith.files.hub import published
from latentsmith.text.tokenizer import Tokenizer
from latentsmith.text.vocabulary import own_vocabulary

from .base import shown
from .load import build
from .open import open_checkpoint
from .spec import OBJECTIVE, objective_of, padded_length

PARAMETERIZATIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def is_encoded(key: str) -> bool:
    """Return whether a stage key means cached encodings (`image_encoded`, `captions_encoded`, `images_moments`)."""
    return key.endswith(("encoded", "moments"))


def weights_of(config: Config, part: str) -> str | None:
    """Return the source of a part's weights: its own key, else model.ckpt_path, else the published `version` that a
    text encoder's config names."""
    return stated_weights(config, part) or published(getattr(node_of(config, part), "version", None))


def stated_weights(config: Config, part: str) -> str | None:
    """Return the file or folder that the config itself gives for a part."""
    node = node_of(config, part)
    return node.from_pretrained or getattr(node, "restore_from_path", None) or config.model.ckpt_path


def node_of(config: Config, part: str) -> Any:
    """Return the config of "unet", "vae" or "text_encoder"."""
    return getattr(config.model, COMPONENTS[part].config_key)


def with_padding(config: Config) -> Config:
    """Return the config with cond_stage_config.pad_to, if it is null, as the U-Net's first weights were trained."""
    start = stated_weights(config, "unet")
    if not start or config.model.cond_stage_config.pad_to is not None:
        return config
    length = padded_length(open_checkpoint(start))
    if length is None:
        return config
    print(f"{start}: trained by NeMo with text embeddings filled up to {length}, and used so here (pad_to)")
    return replaced(config, "model.cond_stage_config.pad_to", length)


def check_objective(config: Config) -> None:
    """Compare what the U-Net's first weights were trained for with what the config trains.

    Raises BadInput for a difference, unless model.change_objective allows it; then it is printed.
    """
    start = stated_weights(config, "unet")
    if not start:
        return
    stated = objective_of(open_checkpoint(start))
    asked = {key: getattr(config.model, key, None) for key in OBJECTIVE} | {
        "prediction_type": canonical_prediction_type(config.model.parameterization)
    }
    if asked["scale_factor"] == "measured":
        stated.pop("scale_factor", None)
    if stated.get("beta_schedule") == "cosine":  # which has neither
        stated = {key: value for key, value in stated.items() if key not in ("linear_start", "linear_end")}
    differing = [key for key, value in stated.items() if not _same(asked[key], value)]
    if not differing:
        return
    key = differing[0]
    ours, theirs = shown(asked[key]), shown(stated[key])
    if not config.model.change_objective:
        option = "parameterization" if key == "prediction_type" else key
        value = PARAMETERIZATIONS.get(stated[key], stated[key]) if key == "prediction_type" else theirs
        fix = "no option gives it" if key == "trained_betas" else f"set model.{option}={value}"
        raise BadInput(
            f"{start}: was trained with {key} {theirs}, the config trains it with {ours}; {fix}, or "
            "model.change_objective=true to train it as something else"
        )
    print(f"{start}: was trained with {key} {theirs}, and is trained with {ours} from here on (change_objective)")


def _same(asked: Any, stated: Any) -> bool:
    if isinstance(asked, float) and isinstance(stated, int | float):
        return math.isclose(asked, stated, rel_tol=1e-4)
    return bool(asked == stated)


def build_networks(config: Config) -> dict[str, nn.Module]:
    """Build the networks that a training needs or keeps, by name. Raises BadInput where a frozen one has no weights.

    The U-Net always; the VAE if images have to be encoded or a file of it is given; so the text encoder, and if it
    is trained. Fresh weights are a function of model.seed.
    """
    model = config.model
    needed = {
        "unet": True,
        "vae": not is_encoded(model.first_stage_key),
        "text_encoder": not is_encoded(model.cond_stage_key) or model.cond_stage_trainable,
    }
    networks = {}
    for part, component in COMPONENTS.items():
        fresh_allowed = (part == "unet" and not model.has_frozen_base) or (
            part == "text_encoder" and model.cond_stage_trainable
        )
        if needed[part] and not weights_of(config, part) and not fresh_allowed:
            raise BadInput(
                f"model.{component.config_key}.from_pretrained is not set: the {part} is frozen and would stay random"
            )
        if needed[part] or stated_weights(config, part):
            networks[part] = build_network(config, part)
    return networks


def build_network(config: Config, part: str) -> nn.Module:
    """Build one network with its weights, or with fresh ones that are a function of model.seed."""
    torch.manual_seed(config.model.seed)
    node, source = node_of(config, part), weights_of(config, part)
    network: nn.Module = build(node, weights=config.model.ckpt_weights, from_pretrained=source)
    return network


def build_tokenizer(config: Config) -> Tokenizer:
    """Return the tokenizer of the text encoder: its `tokenizer` key, or the files beside its weights.

    An OpenCLIP encoder without files of its own reads captions as open_clip does; NeMo's Megatron CLIP does not.
    """
    node, weights = config.model.cond_stage_config, weights_of(config, "text_encoder")
    of_open_clip = is_open_clip(node.arch, node.activation) and not node.restore_from_path
    as_open_clip = of_open_clip and not own_vocabulary(weights)
    cleaning = "open_clip" if as_open_clip else None
    tokenizer = Tokenizer.find(node.tokenizer, weights, node.max_length, cleaning=cleaning)
    if tokenizer.vocab_size > node.vocab_size:
        raise BadInput(
            f"the tokenizer has {tokenizer.vocab_size} tokens, cond_stage_config.vocab_size is {node.vocab_size}"
        )
    return tokenizer
