"""LoRA and textual inversion on a pipeline: loaded, weighed, taken off again."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentsmith.adapters import load_adapter_state, remove, set_weight
from latentsmith.adapters.embeddings import Embedding, add_embedding, embedding, read_embedding, remove_embedding
from latentsmith.adapters.file import AdapterFile
from latentsmith.adapters.names import layers_of
from latentsmith.adapters.read import read_adapter
from latentsmith.files.errors import BadInput
from latentsmith.models import ClipTextEncoder, UNetModel
from latentsmith.text.prompts import LoraTag
from latentsmith.text.tokenizer import Tokenizer

Steps = Iterator[Any]


@dataclass
class Lora:
    """A loaded adapter. key: its name in the networks. weight, text_weight: on U-Net and text encoder."""

    name: str
    key: str
    file: AdapterFile
    weight: float
    text_weight: float

    @property
    def names(self) -> set[str]:
        """Return the names that prompts may call it by."""
        return {self.name, self.file.path.stem, self.file.metadata.get("ss_output_name", self.name)}


class HasAdapters:
    """The methods of Pipeline that load adapters and trained tokens."""

    unet: UNetModel
    text_encoder: ClipTextEncoder
    tokenizer: Tokenizer

    def __init__(self) -> None:
        self.loras: dict[str, Lora] = {}
        self.embeddings: dict[str, Path] = {}  # token -> its file
        self._loaded_loras = 0

    def load_lora(
        self,
        path: str | Path,
        weight: float = 1.0,
        name: str | None = None,
        *,
        text_encoder_weight: float | None = None,
    ) -> str:
        """Load an adapter (LoRA, LoHa, LoKr, DoRA, OFT, ...) of any known format and return its name.

        Several add up; each is a change of the base's own weights. weight: what its change is multiplied by; 0 is off.
        text_encoder_weight: that on the text encoder; None: the same. name: by default the file's.
        Raises BadInput, one line, for a file that cannot be read or is for another model; then nothing is changed.
        """
        path = Path(path)
        name = name or path.stem
        if name in self.loras:
            raise BadInput(f"{path}: a LoRA {name!r} is loaded already; give this one another name")
        self._check(name, weight, text_encoder_weight)
        networks = {"unet": self.unet, "text_encoder": self.text_encoder}
        file, key = read_adapter(path, layers_of(networks)), f"lora_{self._loaded_loras}"
        added: list[str] = []
        try:
            for token, vectors in file.embeddings.items():
                self._add(embedding(token, vectors, f"{path}: {token}"), path)
                added.append(token)
        except BadInput:
            for token in added:
                self.unload_embedding(token)
            raise
        for part, state in file.parts.items():
            load_adapter_state(networks[part], state, key)
        self._loaded_loras += 1
        self.loras[name] = Lora(name, key, file, weight, weight)
        self.set_lora_weight(name, weight, text_encoder_weight=text_encoder_weight)
        return name

    def set_lora_weight(self, name: str, weight: float, *, text_encoder_weight: float | None = None) -> None:
        """Multiply the change of a loaded adapter by `weight`, from the next image on; 0 is the base, bit for bit."""
        lora = self._loaded(name)
        self._check(name, weight, text_encoder_weight)
        lora.weight, lora.text_weight = weight, weight if text_encoder_weight is None else text_encoder_weight
        self._weigh(lora, lora.weight, lora.text_weight)

    def unload_lora(self, name: str) -> None:
        """Take an adapter off; without any the networks are the base, bit for bit."""
        lora = self._loaded(name)
        for part in lora.file.parts:
            remove(getattr(self, part), lora.key)
        for token in lora.file.embeddings:
            self.unload_embedding(token)
        del self.loras[name]

    def load_embedding(self, path: str | Path, token: str | None = None) -> str:
        """Load a textual inversion and return the word that stands for it in prompts.

        token: that word; by default the file's own, or its name. Raises BadInput for vectors of another model's width.
        """
        read = read_embedding(path)
        return self._add(Embedding(token or read.token, read.vectors), Path(path))

    def unload_embedding(self, token: str) -> None:
        """Forget a word that load_embedding added."""
        remove_embedding(self.text_encoder, self.tokenizer, token)
        self.embeddings.pop(token, None)

    def _add(self, new: Embedding, path: Path) -> str:
        try:
            add_embedding(self.text_encoder, self.tokenizer, new)
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from None
        self.embeddings[new.token] = path
        return new.token

    def _loaded(self, name: str) -> Lora:
        if name not in self.loras:
            raise BadInput(f"no LoRA {name!r} is loaded; those are {', '.join(self.loras) or 'none'}")
        return self.loras[name]

    def _check(self, name: str, *weights: float | None) -> None:
        for weight in weights:
            if weight is not None and not math.isfinite(weight):
                raise BadInput(f"the weight of LoRA {name!r} is {weight}; it must be a finite number")

    def _weigh(self, lora: Lora, weight: float, text_weight: float) -> None:
        set_weight(self.unet, lora.key, weight)
        set_weight(self.text_encoder, lora.key, text_weight)

    def lora_of(self, tag: LoraTag) -> Lora:
        """Return the adapter that a prompt names. Raises BadInput if none of that name is loaded."""
        for lora in self.loras.values():
            if tag.name in lora.names:
                return lora
        hint = f"loaded are {', '.join(self.loras)}" if self.loras else "load its file first (--lora FILE)"
        raise BadInput(f"<lora:{tag.name}>: no LoRA of that name is loaded; {hint}")

    @contextmanager
    def lora_tags(self, tags: Sequence[LoraTag]) -> Iterator[None]:
        """Weigh adapters as a prompt's tags say inside the context; tags of one adapter add up."""
        sums: dict[str, tuple[float, float]] = {}
        for tag in tags:
            name = self.lora_of(tag).name
            weight, text_weight = sums.get(name, (0.0, 0.0))
            sums[name] = weight + tag.weight, text_weight + tag.text_weight
        for name, weights in sums.items():
            self._weigh(self.loras[name], *weights)
        try:
            yield
        finally:
            for name in sums:
                self._weigh(self.loras[name], self.loras[name].weight, self.loras[name].text_weight)


def each_inside(steps: Steps, context: Callable[[], AbstractContextManager[None]]) -> Steps:
    """Yield the steps, each made inside a context of its own, so that the caller runs outside it."""
    while True:
        with context():
            try:
                step = next(steps)
            except StopIteration:
                return
        yield step
