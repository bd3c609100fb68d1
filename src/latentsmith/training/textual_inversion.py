"""Textual inversion (Gal et al. 2022): vectors of a new token are trained, and nothing else of the text encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentsmith.adapters.embeddings import Embedding, save_embedding
from latentsmith.config import Config
from latentsmith.files.errors import BadInput
from latentsmith.text.tokenizer import Tokenizer

from .hooks import Hook
from .loop import Training


class TokenEmbedding(nn.Embedding):
    """A token embedding whose last ids are rows of a parameter of their own, `learned` (count, width).

    The other rows have no gradient, so that no optimizer or weight decay touches them.
    """

    learned: nn.Parameter

    def forward(self, token_ids: Tensor) -> Tensor:
        rows = self.num_embeddings
        known = F.embedding(token_ids.clamp(max=rows - 1), self.weight)
        own = F.embedding((token_ids - rows).clamp(min=0), self.learned).to(known.dtype)
        return torch.where((token_ids >= rows)[..., None], own, known)


def table_of(text_encoder: Any) -> Any:
    return text_encoder.text_model.embeddings.token_embedding


def add_trained_token(config: Config, networks: Mapping[str, nn.Module], tokenizer: Tokenizer | None) -> list[str]:
    """Give model.textual_inversion's token vectors to train, and return a line that says so; nothing without a token.

    tokenizer: it learns the token; None where only shapes are of interest. Call it after adapters are added.
    """
    options = config.model.textual_inversion
    if options.token is None:
        return []
    encoder, count = networks["text_encoder"], options.vectors
    table = table_of(encoder)
    if "text_encoder" not in config.model.adapted_networks:
        encoder.requires_grad_(False)
    ids = tokenizer.encode(options.initializer) if tokenizer and options.initializer else []
    if tokenizer is not None:
        if options.initializer and not ids:
            raise BadInput(f"model.textual_inversion.initializer={options.initializer!r} has no token")
        if count > tokenizer.max_length - 2:
            raise BadInput(
                f"model.textual_inversion.vectors={count}: a prompt has {tokenizer.max_length - 2} tokens in all"
            )
        tokenizer.add_token(options.token, range(table.num_embeddings, table.num_embeddings + count))
    table.__class__ = TokenEmbedding
    table.learned = nn.Parameter(first_vectors(table.weight.detach().float(), ids, count, config.model.seed))
    origin = f"from {options.initializer!r}" if ids else "at random"
    return [f"text_encoder: {count} vectors of the token {options.token}, begun {origin}; captions have to name it"]


def first_vectors(rows: Tensor, ids: list[int], count: int, seed: int) -> Tensor:
    """Return the vectors to begin with: the rows of initializer words, repeated or cut, or noise of the rows' size."""
    if ids:
        return rows[[ids[number % len(ids)] for number in range(count)]].clone()
    noise = torch.randn(count, rows.shape[1], generator=torch.Generator().manual_seed(seed), device="cpu")
    return noise.to(rows.device) * (0.01 if rows.is_meta else float(rows.std()))


class ExportEmbedding(Hook):
    """Write the token's vectors, as their EMA where there is one, into `folder` at the end, as diffusers has them."""

    def __init__(self, folder: Path, token: str):
        self.folder, self.token = folder, token

    def on_end(self, training: Training) -> None:
        if not training.fabric.is_global_zero:
            return
        path = self.folder / f"{re.sub(r'[^0-9A-Za-z_-]+', '', self.token) or 'token'}.embedding.safetensors"
        with training.state.for_evaluation(), training.state.averaged():
            vectors = table_of(training.state.networks["text_encoder"]).learned.detach().float().cpu()
            save_embedding(path, Embedding(self.token, vectors))
        print(f"token {self.token}: {path}", flush=True)
