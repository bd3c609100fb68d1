"""Prompts as people write them: with weights, and longer than a text encoder's context."""

import re
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .tokenizer import Tokenizer

EMPHASIS = 1.1  # of one pair of brackets, as in web UIs
MARKS = re.compile(
    r"\\(?P<literal>[()\[\]\\])|(?P<open>[(\[])|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|(?P<close>[)\]])"
    r"|(?P<text>[^\\()\[\]:]+|.)",
    re.DOTALL,
)
EXPLICIT = re.compile(r"\([^()]+:\s*[\d.]+\s*\)")


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as tokens. chunks: (token id, weight) of each token without start and end, at most max_length - 2 in a
    chunk; at least one chunk."""

    chunks: tuple[tuple[tuple[int, float], ...], ...]

    @property
    def plain(self) -> bool:
        """Whether every token has weight 1."""
        return all(weight == 1 for chunk in self.chunks for _, weight in chunk)


def encode_prompt(
    prompt: str, tokenizer: Tokenizer, *, syntax: str = "plain", long_prompts: str = "chunks"
) -> EncodedPrompt:
    """Return the tokens and weights of a prompt. syntax, long_prompts: as in SamplingOptions.

    Warns of what is cut, and of a plain prompt that looks weighted.
    """
    if syntax == "plain" and EXPLICIT.search(prompt):
        note = "has weights, which are taken as text; prompt_syntax webui reads them as weights"
        warnings.warn(f'"{shortened(prompt)}" {note}', stacklevel=2)
    parts = weighted_parts(prompt) if syntax == "webui" else [(prompt, 1.0)]
    tokens = [(token, weight) for text, weight in parts for token in tokenizer.encode(text)]
    room = tokenizer.max_length - 2
    if long_prompts == "cut" and len(tokens) > room:
        rest = tokenizer.decode(token for token, _ in tokens[room:])
        warnings.warn(f'"{shortened(prompt)}" has {len(tokens)} tokens, {room} fit; cut: "{rest}"', stacklevel=2)
        tokens = tokens[:room]
    starts = range(0, max(len(tokens), 1), room)
    return EncodedPrompt(tuple(tuple(tokens[start : start + room]) for start in starts))


def shortened(prompt: str, length: int = 40) -> str:
    return prompt if len(prompt) <= length else prompt[: length - 3] + "..."


def weighted_parts(prompt: str) -> list[tuple[str, float]]:
    """Parse a prompt in web UIs' syntax to texts and their weights.

    (text) has weight 1.1, (text:1.3) 1.3, [text] 1 / 1.1; nested brackets multiply, a backslash makes a bracket a
    character, and a bracket that is not closed holds to the end.
    """
    parts: list[tuple[str, float]] = []
    open_brackets: list[tuple[str, int]] = []  # bracket, and the part that follows it

    def weigh(start: int, factor: float) -> None:
        parts[start:] = [(text, weight * factor) for text, weight in parts[start:]]

    for mark in MARKS.finditer(prompt):
        if mark["open"]:
            open_brackets.append((mark["open"], len(parts)))
        elif mark["weight"] and open_brackets and open_brackets[-1][0] == "(":
            weigh(open_brackets.pop()[1], float(mark["weight"]))
        elif mark["close"] and open_brackets and open_brackets[-1][0] == {")": "(", "]": "["}[mark["close"]]:
            bracket, start = open_brackets.pop()
            weigh(start, EMPHASIS if bracket == "(" else 1 / EMPHASIS)
        else:
            parts.append((mark["literal"] or mark[0], 1.0))
    for bracket, start in open_brackets:
        weigh(start, EMPHASIS if bracket == "(" else 1 / EMPHASIS)
    return joined(parts)


def joined(parts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Join neighbours of equal weight, so that words cut by the syntax are encoded whole."""
    whole: list[tuple[str, float]] = []
    for text, weight in parts:
        if whole and whole[-1][1] == weight:
            whole[-1] = (whole[-1][0] + text, weight)
        else:
            whole.append((text, weight))
    return whole


def embed_prompt(prompt: EncodedPrompt, chunks: int, tokenizer: Tokenizer, text_encoder: nn.Module) -> Tensor:
    """Return (chunks * length, context_dim): each chunk encoded by itself, padded with empty ones to `chunks`.

    Weights multiply the embeddings of their tokens; each chunk's mean is then restored, as web UIs do.
    """
    filled = [*prompt.chunks, *[()] * (chunks - len(prompt.chunks))]
    device = next(text_encoder.parameters()).device
    rows = torch.tensor([tokenizer.frame([token for token, _ in chunk]) for chunk in filled], device=device)
    embedded = text_encoder(rows)
    if not prompt.plain:
        weights = torch.ones(embedded.shape[:2], dtype=embedded.dtype)
        for row, chunk in enumerate(filled):
            weights[row, 1 : len(chunk) + 1] = torch.tensor([weight for _, weight in chunk])
        weighted = embedded * weights.to(device)[:, :, None]
        embedded = weighted * (embedded.mean((1, 2), keepdim=True) / weighted.mean((1, 2), keepdim=True))
    return embedded.flatten(0, 1)
