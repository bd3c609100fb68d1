"""Files of diffusers and peft: `unet.down_blocks.0...attn1.to_q.lora_A.weight`, and the spellings before it.

Alpha stands in the metadata `lora_adapter_metadata` or adapter_config.json; without either it is the rank.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latentsmith.files.errors import BadInput
from latentsmith.files.json import parse_json
from latentsmith.files.lazy import LazyTensor
from latentsmith.files.tensors import TensorFile

from .file import Found, Source
from .names import TEXT, Layers, Names, spellings

METADATA_KEY = "lora_adapter_metadata"
FILE_NAME = "pytorch_lora_weights.safetensors"
SUFFIXES = {  # end of a key -> name of the tensor in SCHEMES, the one that is written first
    "lora_A.weight": "lora_down",
    "lora_B.weight": "lora_up",
    "lora_magnitude_vector": "dora_scale",
    **{f"{way}.{end}.weight": f"lora_{end}" for way in ("lora", "lora_linear_layer") for end in ("down", "up")},
    "lora_A.default.weight": "lora_down",
    "lora_B.default.weight": "lora_up",
    "lora_magnitude_vector.weight": "dora_scale",
    "lora_magnitude_vector.default.weight": "dora_scale",
    "alpha": "alpha",
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
ENDINGS = {"lora_down": "lora_A.weight", "lora_up": "lora_B.weight", "dora_scale": "lora_magnitude_vector"}
ALIASES = {"to_out_lora": "to_out.0", "to_q_lora": "to_q", "to_k_lora": "to_k", "to_v_lora": "to_v"}  # 2023's
TEXT_ALIASES = {"to_q_lora": "q_proj", "to_k_lora": "k_proj", "to_v_lora": "v_proj", "to_out_lora": "out_proj"}
PREFIXES = {"unet": ("unet.", "", "base_model.model."), "text_encoder": ("text_encoder.", "", "base_model.model.")}


def recognises(file: TensorFile) -> bool:
    """Return whether keys are diffusers' or peft's."""
    marks = re.compile(
        r"\.(lora_[AB]|lora_magnitude_vector|hada_w1_a|lokr_w[12]|oft_R)\b|[._]lora\.(down|up)\.|_layer\.(down|up)\."
    )
    return any("." in key and marks.search(key) and "adapter_layer" not in key for key in file.entries)


def read(source: Source, layers: Layers) -> Found:
    """Return the tensors by layer, in LyCORIS' shapes and with alpha, and the keys that no layer has."""
    names = _names(layers)
    found = Found()
    for key, tensor in source.file.entries.items():
        module, name = _split(key)
        if name and module in names:
            found.add(key, *names[module], name, tensor)
        else:
            found.unused.append(key)
    for layer, tensors in found.layers.items():
        if "dora_scale" in tensors:
            tensors["dora_scale"] = _rows(tensors["dora_scale"], len(layers[layer[0]][layer[1]]))
    _add_alphas(source, found, {layer: name for name, layer in reversed(names.items())})
    return found


def _names(layers: Layers) -> Names:
    names: Names = {}
    for (part, layer), every in spellings(layers).items():
        for name in every:
            parent, _, last = name.rpartition(".")
            old = [f"{name.removesuffix('.to_out.0')}.processor.to_out_lora"] if name.endswith(".to_out.0") else []
            old += [f"{parent}.processor.{last}_lora"] if last in ("to_q", "to_k", "to_v") else []
            old += [f"{parent}.{alias}" for alias, ours in TEXT_ALIASES.items() if last == ours]
            for prefix in PREFIXES[part]:
                names |= {prefix + each: (part, layer) for each in (name, *old)}
    return names


def _split(key: str) -> tuple[str, str | None]:
    """Return the module of a key and the name of its tensor."""
    for suffix, name in SUFFIXES.items():
        if key.endswith(f".{suffix}"):
            return key.removesuffix(f".{suffix}"), name
    if match := re.fullmatch(r"(.+_lora)\.(down|up)\.weight", key):
        return match[1], f"lora_{match[2]}"
    return key, None


def _rows(scale: LazyTensor, dims: int) -> LazyTensor:
    """Return norms of outputs in LyCORIS' shape (out, 1, ...). dims: of the weight."""
    return scale.reshape((math.prod(scale.shape), *[1] * (dims - 1)))


def _add_alphas(source: Source, found: Found, names: Mapping[tuple[str, str], str]) -> None:
    stated = _stated(source)
    for (part, layer), tensors in found.layers.items():
        config = stated.get(part) or stated.get("")
        if config is None or "alpha" in tensors:
            continue
        path = f"{source.path}: its adapter config"
        if config.get("peft_type", "LORA") not in ("LORA", "LOHA", "LOKR"):
            raise BadInput(f"{path} is of {config['peft_type']}, which is not supported")
        module = names[part, layer].removeprefix(f"{part}.")
        rank = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
        alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", config.get("alpha")))
        if not all(isinstance(each, int | float) and not isinstance(each, bool) for each in (rank, alpha)):
            raise BadInput(f"{path} gives r {rank!r} and lora_alpha {alpha!r}; both are numbers")
        if rank and config.get("use_rslora"):
            alpha *= rank**0.5
        if {"lokr_w1", "lokr_w2"} <= tensors.keys():  # peft scales whole factors too, LyCORIS does not
            scale = alpha / max(rank, 1)
            tensors["lokr_w2"] = _scaled(tensors["lokr_w2"], scale)
        tensors["alpha"] = LazyTensor.of(torch.tensor(float(alpha)))


def _scaled(tensor: LazyTensor, factor: float) -> LazyTensor:
    return tensor.changed(tensor.shape, lambda read: read * factor)


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """Return the value of the pattern that a module's name ends in, as peft looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _stated(source: Source) -> dict[str, dict[str, Any]]:
    """Return peft's config of each part, "" for all; {} if the file has none."""
    if source.config:
        return {"": dict(source.config)}
    text = source.file.metadata.get(METADATA_KEY)
    if text is None:
        return {}
    configs: dict[str, dict[str, Any]] = {}
    for key, value in parse_json(text, f"{source.path}: its {METADATA_KEY}", "peft's config").items():
        part, _, option = key.partition(".")
        configs.setdefault(part, {})[option] = value
    return configs


def named(parts: Mapping[str, Mapping[str, Tensor]], layers: Layers) -> dict[str, Tensor]:
    """Return the tensors of parts, as `adapter_state` names them, under peft's keys; alpha goes into the metadata.

    Raises BadInput for tensors that diffusers does not load.
    """
    every, tensors = spellings(layers), {}
    for part, state in parts.items():
        for key, tensor in state.items():
            layer, _, name = key.rpartition(".")
            if name == "alpha":
                continue
            if name not in ENDINGS:
                raise BadInput(f"{layer} has {name}, and diffusers loads LoRA and DoRA alone; write kohya's format")
            shape = layers[part][layer]
            if name == "dora_scale":
                if tensor.shape[0] == 1 and shape[0] != 1:
                    raise BadInput(f"{layer}: DoRA over inputs, and diffusers loads that over outputs alone")
                tensor = tensor.flatten() if len(shape) == 2 else tensor.reshape(1, -1, 1, 1)
            elif name == "lora_down":
                tensor = tensor.reshape(len(tensor), *shape[1:])
            else:
                tensor = tensor.reshape(*tensor.shape[:2], *[1] * (len(shape) - 2))
            # transformers 5 loads a text encoder's norms under this name alone, peft a U-Net's under both.
            ending = ".weight" if name == "dora_scale" and part == "text_encoder" else ""
            tensors[f"{part}.{every[part, layer][0]}.{ENDINGS[name]}{ending}"] = tensor
    return tensors


def metadata(parts: Mapping[str, Mapping[str, Tensor]], layers: Layers) -> dict[str, str]:
    """Return the header that diffusers reads rank, alpha and targets from."""
    every = spellings(layers)
    config: dict[str, Any] = {}
    for part, state in parts.items():
        ranks = {key.rpartition(".")[0]: len(t) for key, t in state.items() if key.endswith(".lora_down")}
        given = {key.rpartition(".")[0]: float(t) for key, t in state.items() if key.endswith(".alpha")}
        alphas = {layer: given.get(layer) or float(rank) for layer, rank in ranks.items()}
        rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
        # Ends of names, which peft matches: transformers has text_model in some versions and not in others.
        names = {layer: every[part, layer][0].removeprefix(TEXT) for layer in ranks}
        own: dict[str, Any] = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": _whole(alpha),
            "target_modules": sorted(names.values()),
            "rank_pattern": {names[layer]: each for layer, each in ranks.items() if each != rank},
            "alpha_pattern": {names[layer]: _whole(each) for layer, each in alphas.items() if each != alpha},
            "use_dora": any(key.endswith(".dora_scale") for key in state),
            "use_rslora": False,
            "lora_bias": False,
        }
        config |= {f"{part}.{key}": value for key, value in own.items()}
    return {"format": "pt", METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}


def _commonest(values: Any) -> Any:
    values = list(values)
    return max(values, key=values.count)


def _whole(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha
