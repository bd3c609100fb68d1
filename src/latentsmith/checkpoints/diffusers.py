"""diffusers' layout: a folder for each part with a config.json, which `StableDiffusionPipeline.from_pretrained` opens.

Key tables are computed forwards from the canonical names that a network has, so block counts, depths and widths are
whatever they are, and the same tables serve to read and to write.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentsmith.architectures import COMPONENTS
from latentsmith.files.atomic import atomic_folder, write_bytes
from latentsmith.files.errors import BadInput
from latentsmith.files.lazy import LazyTensor
from latentsmith.files.tensors import TensorFile, open_tensors, save_safetensors

from .base import (
    NULL_TEXT_KEY,
    PAD_KEY,
    Contents,
    Dialect,
    Format,
    ModelSpec,
    Parts,
    Written,
    lost_padding,
    packed,
    renamed,
    require_whole,
)
from .diffusers_config import WEIGHTS_FILE, facts, sizes, written_configs, written_tokenizer

KEY_RULES = (
    ("unet", r"(?=(down_blocks|mid_block|up_blocks|time_embedding|conv_in|conv_out|conv_norm_out)\.)"),
    ("vae", r"(?=(encoder|decoder)\.(down_blocks|up_blocks|mid_block|conv_norm_out)\.)"),
)

# ---- Names of the U-Net ----

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
OUTER = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
MODULE = re.compile(r"(input_blocks\.(?!0\.)\d+\.\d+|output_blocks\.\d+\.\d+|middle_block\.\d+)\.")
SIDES = {"input_blocks": ("down_blocks", "downsamplers.0.conv"), "output_blocks": ("up_blocks", "upsamplers.0.conv")}


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """Return canonical name -> diffusers' for every name of one U-Net."""
    names = list(names)
    modules = dict(_modules(_classes(names)))
    table = {}
    for name in names:
        if module := MODULE.match(name):
            path, _, tensor = name.removeprefix(module[0]).rpartition(".")
            inner = "" if path in ("op", "conv") else f".{RESNET.get(path, path)}"  # a resampler has one convolution
            table[name] = f"{modules[module[1]]}{inner}.{tensor}"
        else:
            outer, _, tensor = name.rpartition(".")
            table[name] = f"{OUTER.get(outer, outer)}.{tensor}"
    return table


def _classes(names: Iterable[str]) -> dict[str, str]:
    """Return module ("input_blocks.4.0") -> "resnets", "attentions" or "sampler", by block and index within it."""
    inners = {path.split(".")[0]: "resnets" for path in RESNET} | {"op": "sampler", "conv": "sampler"}
    found = {}
    for name in names:
        if module := MODULE.match(name):
            found[module[1]] = inners.get(name.removeprefix(module[0]).split(".")[0], "attentions")
    return dict(sorted(found.items(), key=lambda item: [int(number) for number in re.findall(r"\d+", item[0])]))


def _modules(classes: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield module -> diffusers' name. On each side, a resampler closes its level, and resnets count within theirs."""
    for side, (theirs, sampler) in SIDES.items():
        level, resnet = 0, -1
        for module, cls in classes.items():
            if not module.startswith(f"{side}."):
                continue
            if cls == "sampler":
                yield module, f"{theirs}.{level}.{sampler}"
                level, resnet = level + 1, -1
                continue
            if cls == "resnets":
                resnet += 1
            yield module, f"{theirs}.{level}.{cls}.{resnet}"
    counts = {"resnets": 0, "attentions": 0}
    for module, cls in classes.items():
        if module.startswith("middle_block."):
            yield module, f"mid_block.{cls}.{counts[cls]}"
            counts[cls] += 1


# ---- Names of the VAE ----

ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_ATTENTION = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}
VAE_ATTENTION = re.compile(r"\.(mid\.attn_1|attn\.\d+)\.(norm|q|k|v|proj_out)\.")


def vae_names(names: Iterable[str], attention: Mapping[str, str] = ATTENTION) -> dict[str, str]:
    """Return canonical name -> diffusers' for every name of one VAE. attention: names inside attention blocks."""
    names = list(names)
    levels = 1 + max((int(match[1]) for name in names if (match := re.match(r"decoder\.up\.(\d+)\.", name))), default=0)
    return {name: _vae_name(name, levels, attention) for name in names}


def _vae_name(name: str, levels: int, attention: Mapping[str, str]) -> str:
    name = VAE_ATTENTION.sub(lambda match: f".{match[1]}.{attention[match[2]]}.", name)
    name = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1.", name)
    # LDM counts the decoder's levels by resolution, diffusers in the order they run.
    name = re.sub(r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.up_blocks.{levels - 1 - int(match[1])}.", name)
    name = re.sub(r"\.block\.(\d+)\.", r".resnets.\1.", name)
    name = re.sub(r"_blocks\.(\d+)\.attn\.(\d+)\.", r"_blocks.\1.attentions.\2.", name)
    name = re.sub(r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv.", name)
    name = re.sub(r"\.mid\.block_([12])\.", lambda match: f".mid_block.resnets.{int(match[1]) - 1}.", name)
    name = name.replace(".mid.attn_1.", ".mid_block.attentions.0.")
    return name.replace(".nin_shortcut.", ".conv_shortcut.").replace(".norm_out.", ".conv_norm_out.")


def _dialect(title: str, names: Any) -> Dialect:
    return Dialect("diffusers", title, lambda ours: renamed(names(ours)), lambda keys: {key: key for key in keys})


UNET = _dialect("diffusers", unet_names)
VAE = _dialect("diffusers", vae_names)
OLD_VAE = _dialect("diffusers-old", partial(vae_names, attention=OLD_ATTENTION))


def unet_dialect(entries: Mapping[str, Any], config: Mapping[str, Any]) -> Dialect | None:
    """Recognise diffusers' names of a U-Net."""
    pattern = re.compile(r"(down_blocks|up_blocks|mid_block|conv_in|time_embedding)\.")
    return UNET if any(pattern.match(key) for key in entries) else None


def vae_dialect(entries: Mapping[str, Any], config: Mapping[str, Any]) -> Dialect | None:
    """Recognise diffusers' names of a VAE, with today's attention names or the old ones (query, key, proj_attn)."""
    if not any(".mid_block." in key or "_blocks." in key for key in entries):
        return None
    return OLD_VAE if any(re.search(r"\.(query|proj_attn)\.", key) for key in entries) else VAE


# ---- Reading ----


def open_folder(path: Path, weights: str) -> Contents | None:
    """Open a folder of parts, or the folder of one part."""
    if not path.is_dir():
        return None
    parts = [part for part in COMPONENTS if (path / COMPONENTS[part].folder).is_dir()]
    if not parts:
        return Contents({None: _open_component(path, weights)})
    return Contents({part: _open_component(path / COMPONENTS[part].folder, weights) for part in parts}, "diffusers")


def _open_component(folder: Path, weights: str) -> TensorFile:
    """Open the weights of one part: safetensors before pickles, full precision before half."""
    matches = [(match, file) for file in sorted(folder.iterdir()) if (match := WEIGHTS_FILE.fullmatch(file.name))]
    wanted = (["non_ema"] if weights == "raw" else []) + [None, "ema", "fp16", "bf16", "non_ema"]

    def rank(item: tuple[re.Match[str], Path]) -> tuple[int, bool, str]:
        match, file = item
        variant = match["variant"] or match["index_variant"]
        preference = wanted.index(variant) if variant in wanted else len(wanted)
        return preference, match["type"] != "safetensors", file.name

    if not matches:
        raise BadInput(
            f"{folder}: holds no weights (diffusion_pytorch_model.safetensors, model.safetensors, *.bin, ...)"
        )
    return open_tensors(min(matches, key=rank)[1])


# ---- Writing ----


def export_diffusers(
    parts: Parts, out: str | Path, spec: ModelSpec, *, tokenizer: Mapping[str, bytes],
    dtype: torch.dtype | None = None, written: Written | None = None,
) -> None:  # fmt: skip
    """Write the folder `out`, streamed; it takes its name once it is complete.

    tokenizer: file name -> content for `tokenizer/` (vocab.json and merges.txt at least).
    dtype: of every floating-point weight; None keeps each.
    Raises BadInput if `out` exists and is not an empty folder, or the model is one diffusers' classes cannot express.
    """
    require_whole(parts)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out}: exists already; name another folder or move it away")
    contents = written_configs(parts, spec) | written_tokenizer(tokenizer, parts, spec)
    # diffusers' configs have no key for what "unconditional" means, nor for padded text.
    own = {NULL_TEXT_KEY: spec.null_text} if spec.null_text != "empty" else {}
    own |= {PAD_KEY: str(pad)} if (pad := spec.cond_stage_config.get("pad_to")) else {}
    with atomic_folder(out) as folder:
        for name, data in contents.items():
            write_bytes(folder / name, data)
        text = {name: LazyTensor.of(tensor).to(dtype, name) for name, tensor in parts["text_encoder"].items()}
        for name, tensors, metadata in (
            ("unet/diffusion_pytorch_model", packed(parts["unet"], UNET, dtype), own),
            ("vae/diffusion_pytorch_model", _vae(parts["vae"], dtype), {}),
            ("text_encoder/model", text, {}),
        ):
            save_safetensors(folder / f"{name}.safetensors", tensors, {"format": "pt"} | metadata, written=written)


def _vae(tensors: Mapping[str, Tensor | LazyTensor], dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """Return the VAE in diffusers' names; its attention is Linear, LDM's a 1x1 convolution with two dimensions more."""
    flat = {
        name: LazyTensor.of(tensor).reshape(tuple(tensor.shape[:2]))
        for name, tensor in tensors.items()
        if VAE_ATTENTION.search(name) and len(tensor.shape) == 4
    }
    return packed({**tensors, **flat}, VAE, dtype)


FORMAT = Format(
    name="diffusers",
    title="diffusers folder",
    key_rules=KEY_RULES,
    dialects={"unet": unet_dialect, "vae": vae_dialect},
    open=open_folder,
    sizes=sizes,
    facts=facts,
    write=export_diffusers,
    needs_tokenizer=True,
    loses=lost_padding,
)
