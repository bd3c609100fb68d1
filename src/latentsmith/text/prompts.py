"""Prompts as people write them: with weights, and longer than a text encoder's context."""

import re
import warnings
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from latentsmith.files.errors import BadInput

from .tokenizer import Tokenizer

EMPHASIS = 1.1  # of one pair of brackets, as in web UIs
LONGEST_PROMPT = 20_000  # characters; 60 chunks of a text encoder's 77 tokens hold about as many
LARGEST_WEIGHT = 100.0
SMALLEST_MEAN = 0.01  # of the root mean square: below it a mean is rounding, and a ratio of means is noise
MARKS = re.compile(  # possessive throughout, so that no input makes it try again
    r"\\(?P<literal>[()\[\]\\])|(?P<open>[(\[])|:\s*+(?P<weight>[+-]?(?:\d++(?:\.\d*+)?|\.\d++))\s*+\)|(?P<close>[)\]])"
    r"|(?P<text>[^\\()\[\]:]++|.)",
    re.DOTALL,
)
EXPLICIT = re.compile(r":\s*+[+-]?[\d.]++\s*+\)")
LORA = re.compile(r"<(?:lora|lyco):([^<>]{1,200})>")
TAGS = re.compile(  # what web UIs obey and this package does not
    r"<(?:lora|lyco|hypernet):[^<>]{1,200}>|\b(?:BREAK|AND)\b|\[[^\[\]]{0,200}(?::[^\[\]:]{0,200}:\s*+[\d.]++\s*+|\|[^\[\]]{0,200})\]"
)


@dataclass(frozen=True)
class LoraTag:
    """A tag <lora:name:weight> of a prompt. weight, text_weight: on the U-Net and on the text encoder."""

    name: str
    weight: float
    text_weight: float


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as tokens. chunks: (token id, weight) of each token without start and end, at most max_length - 2 in a
    chunk; at least one chunk. loras: its tags. skip: layers of the text encoder that are left out."""

    chunks: tuple[tuple[tuple[int, float], ...], ...]
    loras: tuple[LoraTag, ...] = ()
    skip: int = 0

    @property
    def plain(self) -> bool:
        """Return whether every token has weight 1."""
        return all(weight == 1 for chunk in self.chunks for _, weight in chunk)


def encode_prompt(
    prompt: str, tokenizer: Tokenizer, *, syntax: str = "plain", long_prompts: str = "chunks"
) -> EncodedPrompt:
    """Return the tokens and weights of a prompt. syntax, long_prompts: as in SamplingOptions.

    Warns of what is cut, of a plain prompt that looks weighted and of web UIs' other tags, which are text here.
    Raises BadInput for a prompt that is too long or has a weight beyond LARGEST_WEIGHT.
    """
    if len(prompt) > LONGEST_PROMPT:
        raise BadInput(f'"{shortened(prompt)}" has {len(prompt):,} characters; a prompt has {LONGEST_PROMPT:,} at most')
    text, loras = lora_tags(prompt) if syntax == "webui" else (prompt, ())
    if tags := web_ui_tags(text):
        note = f"has {', '.join(tags[:3])}, which web UIs obey; here {'it is' if len(tags) == 1 else 'they are'} text"
        warnings.warn(f'"{shortened(prompt)}" {note}', stacklevel=2)
    if syntax == "plain" and "(" in prompt and EXPLICIT.search(prompt):
        note = "has weights, which are taken as text; prompt_syntax webui reads them as weights"
        warnings.warn(f'"{shortened(prompt)}" {note}', stacklevel=2)
    parts = weighted_parts(text) if syntax == "webui" else [(prompt, 1.0)]
    if heaviest := [weight for _, weight in parts if abs(weight) > LARGEST_WEIGHT]:
        raise BadInput(f'"{shortened(prompt)}" has weight {heaviest[0]:g}; weights lie within {LARGEST_WEIGHT:g}')
    tokens = [(token, weight) for text, weight in parts for token in tokenizer.encode(text)]
    room = tokenizer.max_length - 2
    if long_prompts == "cut" and len(tokens) > room:
        rest = tokenizer.decode(token for token, _ in tokens[room:])
        warnings.warn(f'"{shortened(prompt)}" has {len(tokens)} tokens, {room} fit; cut: "{rest}"', stacklevel=2)
        tokens = tokens[:room]
    starts = range(0, max(len(tokens), 1), room)
    return EncodedPrompt(tuple(tuple(tokens[start : start + room]) for start in starts), loras)


def lora_tags(prompt: str) -> tuple[str, tuple[LoraTag, ...]]:
    """Return a prompt without its tags <lora:name>, <lora:name:weight> and <lora:name:text encoder:U-Net>, and these.

    Raises BadInput for a tag whose weight is no number.
    """
    tags = []
    for match in LORA.finditer(prompt):
        name, *weights = match[1].split(":")
        try:
            numbers = [float(weight) for weight in weights] or [1.0]
        except ValueError:
            numbers = []
        if not name or not 1 <= len(numbers) <= 2 or max(abs(number) for number in numbers) > LARGEST_WEIGHT:
            raise BadInput(f"{shortened(match[0])}: give <lora:name:weight>, or <lora:name:text encoder:U-Net>")
        tags.append(LoraTag(name, numbers[-1], numbers[0]))
    return LORA.sub("", prompt), tuple(tags)


def web_ui_tags(prompt: str) -> list[str]:
    """Return the tags of a prompt that web UIs obey: <lora:...>, BREAK, AND, [a:b:0.5], [a|b]; each once, shortened."""
    return list(dict.fromkeys(shortened(tag) for tag in TAGS.findall(prompt)))


def shortened(prompt: str, length: int = 40) -> str:
    return prompt if len(prompt) <= length else prompt[: length - 3] + "..."


def weighted_parts(prompt: str) -> list[tuple[str, float]]:
    """Parse a prompt in web UIs' syntax to texts and their weights.

    (text) has weight 1.1, (text:1.3) 1.3, [text] 1 / 1.1; nested brackets multiply, a backslash makes a bracket a
    character, and a bracket that is not closed holds to the end.
    """
    texts: list[str] = []
    open_brackets: list[tuple[str, int]] = []  # bracket, and the text that follows it
    factors: list[tuple[int, int, float]] = []  # start and end of the texts that a pair of brackets weighs

    def close(factor: float | None = None) -> None:
        bracket, start = open_brackets.pop()
        factors.append(
            (start, len(texts), factor if factor is not None else EMPHASIS if bracket == "(" else 1 / EMPHASIS)
        )

    for mark in MARKS.finditer(prompt):
        if mark["open"]:
            open_brackets.append((mark["open"], len(texts)))
        elif mark["weight"] and open_brackets and open_brackets[-1][0] == "(":
            close(float(mark["weight"]))
        elif mark["close"] and open_brackets and open_brackets[-1][0] == {")": "(", "]": "["}[mark["close"]]:
            close()
        else:
            texts.append(mark["literal"] or mark[0])
    while open_brackets:
        close()
    weights, ends = [], [(len(texts), 1.0)]  # pairs nest: the innermost one's end and the product of all around it
    outer_first = iter([*sorted(factors, key=lambda each: (each[0], -each[1])), (len(texts), 0, 1.0)])
    start, end, factor = next(outer_first)
    for index in range(len(texts)):
        while ends[-1][0] <= index:
            ends.pop()
        while start <= index:
            if end > start:
                ends.append((end, ends[-1][1] * factor))
            start, end, factor = next(outer_first)
        weights.append(ends[-1][1])
    return joined(list(zip(texts, weights, strict=True)))


def joined(parts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Join neighbours of equal weight, so that words cut by the syntax are encoded whole."""
    return [("".join(text for text, _ in group), weight) for weight, group in groupby(parts, lambda part: part[1])]


def embed_prompt(prompt: EncodedPrompt, chunks: int, tokenizer: Tokenizer, text_encoder: nn.Module) -> Tensor:
    """Return (chunks * length, context_dim): each chunk encoded by itself, padded with empty ones to `chunks`.

    Weights multiply the embeddings of their tokens; each chunk's mean is then restored, as web UIs do. Where the mean
    is too near 0 for that, or would change the chunk more than twofold, its root mean square is restored instead.
    """
    filled = [*prompt.chunks, *[()] * (chunks - len(prompt.chunks))]
    device = next(text_encoder.parameters()).device
    rows = torch.tensor([tokenizer.frame([token for token, _ in chunk]) for chunk in filled], device=device)
    embedded: Tensor = text_encoder(rows, skip=prompt.skip) if prompt.skip else text_encoder(rows)
    if not prompt.plain:
        weights = torch.ones(embedded.shape[:2], dtype=embedded.dtype)
        for row, chunk in enumerate(filled):
            weights[row, 1 : len(chunk) + 1] = torch.tensor([weight for _, weight in chunk])
        weighted = embedded * weights.to(device)[:, :, None]
        embedded = weighted * restoring_factor(embedded.float(), weighted.float()).to(weighted)
    return embedded.flatten(0, 1)


def restoring_factor(before: Tensor, after: Tensor) -> Tensor:
    """Return what each chunk is multiplied by after weighting, (chunks, 1, 1); always finite and above 0.

    before, after: embeddings (chunks, length, context_dim). The start token has weight 1, so `after` is never all 0.
    """
    axes = (1, 2)
    size = before.square().mean(axes, keepdim=True).sqrt()
    mean = before.mean(axes, keepdim=True)
    ratio = mean / after.mean(axes, keepdim=True)
    sound = (mean.abs() >= SMALLEST_MEAN * size) & (ratio >= 0.5) & (ratio <= 2)
    return torch.where(sound, ratio, size / after.square().mean(axes, keepdim=True).sqrt())
