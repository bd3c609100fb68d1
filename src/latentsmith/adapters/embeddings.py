"""Textual inversion: words whose vectors were trained, read from every common file and added to a text encoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentsmith.files.errors import BadInput
from latentsmith.files.lazy import LazyTensor
from latentsmith.files.tensors import open_tensors, save_safetensors
from latentsmith.files.torch_zip import read_torch_zip
from latentsmith.models import ClipTextEncoder
from latentsmith.text.tokenizer import Tokenizer

KOHYA_KEY = "emb_params"
TWO_ENCODERS = {"clip_l", "clip_g"}


@dataclass(frozen=True)
class Embedding:
    """A trained word. token: what the file calls it, else its name. vectors: (count, width), float32."""

    token: str
    vectors: Tensor


def read_embedding(path: str | Path) -> Embedding:
    """Read an embedding of diffusers, kohya or web UIs, in safetensors or a .pt without foreign objects.

    Raises BadInput for a file that holds none, or one of a model with two text encoders.
    """
    path = Path(path)
    tensors = _tensors(path)
    if len(tensors) != 1:
        if tensors.keys() <= TWO_ENCODERS:
            raise BadInput(f"{path}: is of SDXL, with vectors for two text encoders")
        raise BadInput(f"{path}: holds {len(tensors)} tensors; an embedding is one ({', '.join([*tensors][:3])})")
    (key, lazy), stem = next(iter(tensors.items())), path.stem
    return embedding(stem if key in (KOHYA_KEY, "*", *TWO_ENCODERS) else key, lazy.read(), str(path))


def embedding(token: str, vectors: Tensor, name: str) -> Embedding:
    """Return vectors (count, width) or (width,) as an embedding. Raises BadInput, with `name`, for what is none."""
    vectors = vectors[None] if vectors.dim() == 1 else vectors
    if vectors.dim() != 2 or not vectors.numel() or not vectors.is_floating_point():
        raise BadInput(f"{name}: holds {vectors.dtype} of the shape {tuple(vectors.shape)}, not vectors of a token")
    if not vectors.isfinite().all():
        raise BadInput(f"{name}: holds values that are not finite")
    return Embedding(token, vectors.float())


def _tensors(path: Path) -> Mapping[str, LazyTensor]:
    """Return the tensors of a file by key; web UIs' stand in a dictionary inside."""
    if path.is_file() and path.open("rb").read(4) == b"PK\x03\x04":
        loaded: Any = read_torch_zip(path)
        inner = loaded.get("string_to_param") if isinstance(loaded, dict) else None
        if isinstance(inner, dict):
            return {str(key): value for key, value in inner.items() if isinstance(value, LazyTensor)}
    return open_tensors(path).entries


def add_embedding(text_encoder: ClipTextEncoder, tokenizer: Tokenizer, embedding: Embedding) -> list[int]:
    """Let `embedding.token` stand for its vectors, as new rows of the token embedding, and return their ids.

    All other rows stay bit for bit. Raises BadInput for vectors of another width and a token that is known already.
    """
    table = text_encoder.text_model.embeddings.token_embedding
    rows, width = table.weight.shape
    if embedding.vectors.shape[1] != width:
        widths = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "SDXL"}
        theirs = embedding.vectors.shape[1]
        whose = f" ({widths[theirs]})" if theirs in widths else ""
        raise BadInput(f"{embedding.token}: its vectors have {theirs} numbers{whose}, this text encoder's have {width}")
    if len(embedding.vectors) > tokenizer.max_length - 2:
        raise BadInput(f"{embedding.token}: has {len(embedding.vectors)} vectors, a prompt {tokenizer.max_length - 2}")
    ids = list(range(rows, rows + len(embedding.vectors)))
    tokenizer.add_token(embedding.token, ids)
    _replace(table, torch.cat([table.weight.detach(), embedding.vectors.to(table.weight)]))
    return ids


def remove_embedding(text_encoder: ClipTextEncoder, tokenizer: Tokenizer, token: str) -> None:
    """Undo add_embedding; other added tokens move up. Raises BadInput for a token that was not added."""
    before = dict(tokenizer.added)
    tokenizer.remove_token(token)
    (name,) = before.keys() - tokenizer.added.keys()
    start, end = before[name][0], before[name][-1] + 1
    for other, ids in tokenizer.added.items():
        tokenizer.added[other] = tuple(index - (end - start) if index >= end else index for index in ids)
    table = text_encoder.text_model.embeddings.token_embedding
    weight = table.weight.detach()
    _replace(table, torch.cat([weight[:start], weight[end:]]))


def _replace(table: nn.Embedding, weight: Tensor) -> None:
    trained = table.weight.requires_grad
    table.weight = nn.Parameter(weight, requires_grad=trained)
    table.num_embeddings = len(weight)


def save_embedding(path: str | Path, embedding: Embedding, format: str = "diffusers") -> None:
    """Write an embedding. format: "diffusers" (its key is the token) or "kohya" (the file's name is the token)."""
    key = embedding.token if format == "diffusers" else KOHYA_KEY
    save_safetensors(path, {key: embedding.vectors.detach()}, {"format": "pt"})
