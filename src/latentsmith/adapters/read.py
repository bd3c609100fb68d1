"""Open an adapter file of any format: every key is used, or the file is refused with the reason."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from latentsmith.files.archives import is_archive, open_nemo
from latentsmith.files.errors import BadInput
from latentsmith.files.json import read_json
from latentsmith.files.lazy import LazyTensor
from latentsmith.files.tensors import TensorFile, open_tensors

from . import diffusers, kohya, nemo
from .file import BASE_TITLES, BASES, AdapterFile, Found, Source
from .names import Layers
from .schemes import change_of, scheme_of

FOLDER_FILES = {  # of a folder -> the config beside it
    diffusers.FILE_NAME: None,
    "pytorch_lora_weights.bin": None,
    "adapter_model.safetensors": "adapter_config.json",
    "adapter_model.bin": "adapter_config.json",
}
OF_CONTEXT = ("lora_down.weight", "lora_A.weight", "lora.down.weight", "linear_in.weight", "hada_w1_b")
NOT_READ = {  # end of a key -> what it is
    (".w_norm", ".b_norm"): "changes norms (train_norm), which is not supported",
    (".diff_b",): "changes biases, which is not supported",
    ("lambda_layer", "q_layer.weight"): "is of T-LoRA, which is not supported",
    (".oft_R.weight",): "is of peft's OFT, which turns inputs and is not supported",
}


@dataclass(frozen=True)
class Format:
    """A format of adapter files. recognises: whether a file is of it. read: its tensors by layer."""

    name: str
    title: str
    recognises: Callable[[TensorFile], bool]
    read: Callable[[Source, Layers], Found]


FORMATS = (
    Format("kohya", "kohya / LyCORIS", kohya.recognises, kohya.read),
    Format("nemo", "NeMo", nemo.recognises, nemo.read),
    Format("diffusers", "diffusers / peft", diffusers.recognises, diffusers.read),
)


def read_adapter(path: str | Path, layers: Layers) -> AdapterFile:
    """Read an adapter for the networks whose `layers_of` is given.

    Raises BadInput, one line, for a file that cannot be read, is for another model, or has a key that is not used.
    """
    source = open_source(Path(path))
    format = adapter_format(source.file)
    if format is None:
        raise BadInput(f"{path}: no adapter; its keys, such as {next(iter(source.file), '')}, are of no known format")
    found = format.read(source, layers)
    base = base_of(source, found)
    if found.unused:
        raise BadInput(f"{path}: {_unused(source, found, layers, base)}")
    if found.twice:
        raise BadInput(f"{path}: {found.twice[0]} gives a tensor that is there already under another name")
    _check_base(path, base, layers)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    checked: list[tuple[str, int, float]] = []  # scheme, rank, alpha
    for (part, layer), lazy in found.layers.items():
        try:
            tensors, alpha, rank, scheme = _checked(lazy, layers[part][layer])
        except ValueError as error:
            raise BadInput(f"{path}: {found.keys[part, layer][0].partition('.lora')[0]}: {error}") from None
        checked.append((scheme, rank, float(rank) if alpha is None else alpha))
        own = parts.setdefault(part, {})
        own |= {f"{layer}.{name}": tensor for name, tensor in tensors.items()}
        if alpha is not None:
            own[f"{layer}.alpha"] = torch.tensor(alpha)
    embeddings = _bundled(path, found.bundled)
    if not parts:
        raise BadInput(f"{path}: holds no adapter of a layer")
    schemes, ranks, alphas = zip(*checked, strict=True)
    scheme = "+".join(sorted(set(schemes)))
    return AdapterFile(Path(path), format.name, parts, scheme, ranks, alphas, base, source.file.metadata, embeddings)


def adapter_format(file: TensorFile) -> Format | None:
    """Return the format of an adapter file, None if it is none."""
    return next((each for each in FORMATS if each.recognises(file)), None)


def open_source(path: Path) -> Source:
    """Open the tensors at a path, which may be a folder of diffusers or peft or a .nemo. Raises BadInput."""
    if path.is_dir():
        for name, config in FOLDER_FILES.items():
            if (path / name).is_file():
                stated = read_json(path / config, "peft's config") if config and (path / config).is_file() else {}
                return Source(path, open_tensors(path / name), stated)
        raise BadInput(f"{path}: holds no adapter ({', '.join(FOLDER_FILES)})")
    if path.is_file() and is_archive(path):
        return Source(path, *open_nemo(path))
    return Source(path, open_tensors(path), _beside(path))


def _beside(path: Path) -> Mapping[str, Any]:
    config = path.with_name("adapter_config.json")
    return read_json(config, "peft's config") if path.stem == "adapter_model" and config.is_file() else {}


def _checked(lazy: Mapping[str, LazyTensor], shape: tuple[int, ...]) -> tuple[dict[str, Any], float | None, int, str]:
    """Return tensors, alpha, rank and scheme of one layer's adapter. Raises ValueError for one that cannot be."""
    tensors = {name: tensor.read() for name, tensor in lazy.items()}
    alpha_tensor = tensors.pop("alpha", None)
    if alpha_tensor is not None and alpha_tensor.numel() != 1:
        raise ValueError(f"its alpha has the shape {tuple(alpha_tensor.shape)}, not one number")
    alpha = None if alpha_tensor is None else float(alpha_tensor)
    if alpha is not None and not 0 <= alpha < float("inf"):
        raise ValueError(f"its alpha is {alpha}; it must be at least 0")
    scheme = scheme_of(set(tensors))
    for name, tensor in tensors.items():
        if not tensor.numel():
            raise ValueError(f"{name} is empty: a rank of 0")
        if not tensor.is_floating_point() and name != "on_input":
            raise ValueError(f"{name} is {tensor.dtype}, not numbers of a weight")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
    meta = {name: t if name == "on_input" else t.to("meta") for name, t in tensors.items()}
    change_of(torch.empty(shape, device="meta"), meta, alpha)
    dora = scheme.name == "lora" and "dora_scale" in tensors
    return tensors, alpha, scheme.rank(tensors), "dora" if dora else scheme.name


def base_of(source: Source, found: Found) -> str | None:
    """Return the model that a file is for: by the width of the text its layers take, else as its metadata say."""
    keys = list(source.file.entries)
    if any(key.startswith(("lora_te2_", "text_encoder_2.")) for key in keys):
        return "SDXL"
    widths = [
        source.file.entries[key].shape[1]
        for key in keys
        if "attn2" in key and ("to_k" in key or "to_v" in key) and key.endswith(OF_CONTEXT)
    ]
    if widths and widths[0] in BASES:
        return BASES[widths[0]]
    metadata = source.file.metadata
    version = metadata.get("ss_base_model_version", "") + metadata.get("modelspec.architecture", "")
    if "xl" in version:
        return "SDXL"
    if version.startswith("sd_v2") or "diffusion-v2" in version or metadata.get("ss_v2") == "True":
        return "SD2"
    return "SD1" if version.startswith("sd_v1") or "diffusion-v1" in version else None


def model_base(layers: Layers) -> str | None:
    """Return which published model the layers of a U-Net are of: by the width of the text it takes."""
    widths = {shape[1] for name, shape in layers.get("unet", {}).items() if name.endswith("attn2.to_k")}
    return BASES.get(widths.pop()) if len(widths) == 1 else None


def _check_base(path: str | Path, base: str | None, layers: Layers) -> None:
    ours = model_base(layers)
    if base and ours and base != ours:
        raise BadInput(f"{path}: is for {BASE_TITLES[base]}, and this model is {BASE_TITLES[ours]}")


def _unused(source: Source, found: Found, layers: Layers, base: str | None) -> str:
    """Return why keys are not used."""
    _check_base(source.path, base, layers)
    if base == "SDXL":
        return "is for SDXL, which is not supported"
    key, count = found.unused[0], len(found.unused)
    for endings, reason in NOT_READ.items():
        for each in found.unused:
            if each.endswith(endings):
                return f"{each} {reason}"
    return f"{key} is of no layer of this model, or of no known scheme ({count} of {len(source.file)} keys are not)"


def _bundled(path: str | Path, bundled: Mapping[str, LazyTensor]) -> dict[str, torch.Tensor]:
    """Return the vectors of each bundled token. Keys are NAME.string_to_param.* or NAME.emb_params."""
    found = {}
    for key, tensor in bundled.items():
        name, _, rest = key.partition(".")
        if rest not in ("string_to_param.*", "emb_params", "*"):
            raise BadInput(f"{path}: the bundled embedding {key} is not of a model with one text encoder")
        found[name] = tensor.read()
    return found


@cache
def published_layers(base: str) -> Layers:
    """Return the layers of Stable Diffusion 1 or 2."""
    from latentsmith.checkpoints.load import meta_weights
    from latentsmith.models import ClipTextEncoder, UNetModel

    from .names import layers_of

    unet: dict[str, Any] = {"num_heads": 8, "context_dim": 768}
    text: dict[str, Any] = {"arch": "ViT-L-14"}
    if base == "SD2":
        unet = {"num_head_channels": 64, "context_dim": 1024, "use_linear_in_transformer": True}
        text = {"arch": "ViT-H-14", "layer": "penultimate"}
    with meta_weights():
        return layers_of({"unet": UNetModel(**unet), "text_encoder": ClipTextEncoder(**text)})
