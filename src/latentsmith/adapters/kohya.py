"""kohya's and LyCORIS' files: `lora_unet_down_blocks_0_...to_q.lora_down.weight`, dots of the module's name as
underscores. Written with the metadata and hashes that web UIs read."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from latentsmith.files.lazy import LazyTensor
from latentsmith.files.tensors import TensorFile, safetensors_header, stored_order

from .file import Found, Header, Source
from .names import Layers, Names, spellings

PREFIXES = {  # part -> prefixes of its layers, the one that is written first
    "unet": ("lora_unet_", "lycoris_", "oft_unet_"),
    "text_encoder": ("lora_te_", "lora_te1_", "lycoris_"),
}
SUFFIXES = {  # of a key -> name of the tensor in SCHEMES
    **{f"{name}.weight": name for name in ("lora_down", "lora_up", "lora_mid", "a1", "a2", "b1", "b2")},
    **{name: name for name in ("alpha", "dora_scale", "oft_blocks", "rescale", "weight", "on_input", "diff")},
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
ENDINGS = {name: suffix for suffix, name in SUFFIXES.items()}
BUNDLE = "bundle_emb."
LEGACY_START, LEGACY_BYTES = 0x100000, 0x10000  # what kohya's old hash covers


def recognises(file: TensorFile) -> bool:
    """Return whether keys are kohya's."""
    prefixes = (*PREFIXES["unet"], *PREFIXES["text_encoder"], "lora_te2_", BUNDLE)
    return any(key.startswith(prefixes) for key in file.entries)


def read(source: Source, layers: Layers) -> Found:
    """Return the tensors by layer, and the keys that no layer has."""
    names: Names = {
        prefix + name.replace(".", "_"): layer
        for layer, every in spellings(layers).items()
        for name in every
        for prefix in PREFIXES[layer[0]]
    }
    found = Found()
    for key, tensor in source.file.entries.items():
        module, _, suffix = key.partition(".")
        if key.startswith(BUNDLE):
            found.bundled[key.removeprefix(BUNDLE)] = tensor
        elif module in names and suffix in SUFFIXES:
            found.add(key, *names[module], SUFFIXES[suffix], tensor)
        else:
            found.unused.append(key)
    for layer, tensors in found.layers.items():
        theirs = any(key.startswith("oft_unet_") for key in found.keys[layer])
        if theirs and "alpha" in tensors and float(tensors["alpha"].read()) == 0:  # kohya's limit of 0 stops all turns
            tensors["oft_blocks"] = LazyTensor.zeros(tensors["oft_blocks"].shape, torch.float32)
    return found


def named(parts: Mapping[str, Mapping[str, Tensor]], layers: Layers) -> dict[str, Tensor]:
    """Return the tensors of parts, as `adapter_state` names them, under kohya's keys."""
    every = spellings(layers)
    tensors = {}
    for part, state in parts.items():
        for key, tensor in state.items():
            layer, _, name = key.rpartition(".")
            module = PREFIXES[part][0] + every[part, layer][0].replace(".", "_")
            tensors[f"{module}.{ENDINGS[name]}"] = tensor
    return tensors


def metadata(header: Header, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return what web UIs read of a file: kohya's ss_ keys, ModelSpec's, and kohya's two hashes."""
    v2 = header.base != "SD1"
    plain = header.scheme == "lora"
    found = {
        "ss_v2": str(v2),
        "ss_base_model_version": {"SD1": "sd_v1", "SD2": "sd_v2_v" if header.v_prediction else "sd_v2"}[header.base],
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": str(header.rank),
        "ss_network_alpha": str(header.alpha),
        **({} if plain else {"ss_network_args": json.dumps(header.network_args())}),
        "ss_output_name": header.name,
        **header.kept("ss_"),
    }
    architecture = {"SD1": "stable-diffusion-v1", "SD2": "stable-diffusion-v2-512"}[header.base]
    if v2 and header.v_prediction:
        architecture = "stable-diffusion-v2-768-v"
    spec = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": header.name,
        "modelspec.resolution": "768x768" if header.v_prediction else "512x512",
        "modelspec.prediction_type": "v" if header.v_prediction else "epsilon",
        **({"modelspec.trigger_phrase": ", ".join(header.trigger_words)} if header.trigger_words else {}),
        **header.kept("modelspec."),
    }
    return {**found, **spec, **hashes(tensors, found)}


def hashes(tensors: Mapping[str, Tensor], ss_metadata: Mapping[str, str]) -> dict[str, str]:
    """Return kohya's hashes of a file: of all tensors' bytes, and of the second MiB with the ss_ metadata alone."""
    lazy = {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}
    data = b"".join(bytes(lazy[name].to_bytes()) for name in stored_order(lazy))
    start = LEGACY_START - len(safetensors_header(lazy, ss_metadata))
    return {
        "sshs_model_hash": hashlib.sha256(data).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(data[start : start + LEGACY_BYTES]).hexdigest()[:8],
    }
