"""What an adapter file is once it is read, and what a format works with."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from latentsmith.files.lazy import LazyTensor
from latentsmith.files.tensors import TensorFile

BASES = {768: "SD1", 1024: "SD2", 2048: "SDXL"}  # features of the text that a U-Net attends to -> model
BASE_TITLES = {"SD1": "Stable Diffusion 1", "SD2": "Stable Diffusion 2", "SDXL": "SDXL"}


@dataclass(frozen=True)
class Source:
    """An opened file. config: adapter_config.json or model_config.yaml beside the tensors."""

    path: Path
    file: TensorFile
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Found:
    """What a format found: tensors by (part, layer), the file's keys of each, keys of no layer, bundled embeddings."""

    layers: dict[tuple[str, str], dict[str, LazyTensor]] = field(default_factory=dict)
    keys: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    bundled: dict[str, LazyTensor] = field(default_factory=dict)

    def add(self, key: str, part: str, layer: str, name: str, tensor: LazyTensor) -> None:
        """Note the tensor of a key; one that is there already under another key is noted as given twice."""
        tensors = self.layers.setdefault((part, layer), {})
        if name in tensors:
            self.twice.append(key)
        tensors[name] = tensor
        self.keys.setdefault((part, layer), []).append(key)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter read from a file, every key of which was used.

    parts: part -> tensors as `adapter_state` names them. scheme, ranks, alphas: found in them; alpha is the rank where
    the file has none. base: SD1, SD2 or None where nothing shows it. embeddings: trained tokens bundled with it.
    """

    path: Path
    format: str
    parts: dict[str, dict[str, Tensor]]
    scheme: str
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    base: str | None
    metadata: Mapping[str, str]
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, int]:
        """Number of adapted layers of each part."""
        return {part: len({key.rpartition(".")[0] for key in state}) for part, state in self.parts.items()}

    @property
    def trigger_words(self) -> tuple[str, ...]:
        """Words that the metadata give to prompt for what was trained: ModelSpec's, else the commonest tags."""
        if phrase := self.metadata.get("modelspec.trigger_phrase"):
            return tuple(word.strip() for word in phrase.split(","))
        try:
            folders = json.loads(self.metadata.get("ss_tag_frequency", "{}"))
            counts: dict[str, int] = {}
            for tags in folders.values():
                for tag, count in tags.items():
                    counts[tag.strip()] = counts.get(tag.strip(), 0) + int(count)
        except (ValueError, AttributeError, TypeError):
            return ()
        return tuple(sorted(counts, key=lambda tag: -counts[tag])[:5])


@dataclass(frozen=True, kw_only=True)
class Header:
    """What is written about an adapter. base: SD1 or SD2. metadata: of the file it came from, or of its training."""

    name: str
    scheme: str
    rank: int
    alpha: float
    base: str
    v_prediction: bool = False
    trigger_words: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    def kept(self, prefix: str) -> dict[str, str]:
        """Return the given metadata of a prefix."""
        return {key: value for key, value in self.metadata.items() if key.startswith(prefix)}

    def network_args(self) -> dict[str, str]:
        """Return the config by which LyCORIS rebuilds the scheme."""
        algo = {"dora": "lora", "oft": "diag-oft"}.get(self.scheme, self.scheme)
        return {"algo": algo} | ({"dora_wd": "True"} if self.scheme == "dora" else {})
