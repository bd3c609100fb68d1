"""Models by name: loaded when first asked for, unloaded when others need the memory."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentsmith.files.errors import BadInput
from latentsmith.image_request import ImageRequest, SamplingOptions
from latentsmith.inference.generate import GenerationModel

from .serving import SharedPipeline
from .worker import DeviceWorker


class UnknownModel(Exception):
    """A name that no model of this server has."""


class Busy(Exception):
    """A model cannot be loaded while those that fill the memory are in use."""


@dataclass(eq=False)
class LoadedModel:
    """A model in memory. bytes: of its weights. users: requests and images that need it now."""

    name: str
    generation: GenerationModel
    pipeline: SharedPipeline
    bytes: int
    users: int = 0

    def metadata(self, request: ImageRequest, options: SamplingOptions) -> dict[str, Any]:
        """Return what a PNG records: as `latentsmith generate` does, with the model's name in place of its path."""
        sent = {"file": "sent to a server", "hash": ""}
        files = {"image": request.image and sent, "mask": request.mask_image and sent}
        found = self.generation.metadata(request, options, files)
        return {**found, "tokenizer": None, "model": {**found["model"], "from": self.name}}


class ModelShelf:
    """The models of a server.

    sources: paths or hub names, each once; a model's name is the last part of its own. limit_bytes: of the weights of
    all models in memory; None: all stay. The first model is the default.
    Raises BadInput for two models of one name.
    """

    def __init__(
        self,
        sources: Sequence[str],
        worker: DeviceWorker,
        *,
        device: str = "auto",
        dtype: str = "fp32",
        weights: str = "ema",
        limit_bytes: int | None = None,
    ):
        self.sources = dict(zip(map(model_name, sources), sources, strict=True))
        if len(self.sources) < len(sources):
            raise BadInput(f"two of {', '.join(sources)} have the same name; rename one")
        self.worker, self.device, self.dtype, self.weights = worker, device, dtype, weights
        self.limit_bytes = limit_bytes
        self.loaded: OrderedDict[str, LoadedModel] = OrderedDict()  # the least recently used first
        self.default = next(iter(self.sources))
        self._lock = threading.RLock()

    @property
    def names(self) -> list[str]:
        return [*self.sources]

    def check(self, name: Any) -> None:
        """Raise UnknownModel for a name that no model has."""
        if name not in self.sources:
            raise UnknownModel(f"no model {str(name)[:100]!r}; this server has {', '.join(self.sources)}")

    def take(self, name: str | None = None) -> LoadedModel:
        """Return a model, in memory until `give_back`; "" and None are the default. Raises UnknownModel, Busy."""
        name = name or self.default
        self.check(name)
        with self._lock:
            model = self.loaded.get(name) or self._load(name)
            self.loaded.move_to_end(name)
            model.users += 1
            return model

    def use(self, model: LoadedModel) -> None:
        with self._lock:
            model.users += 1

    def give_back(self, model: LoadedModel) -> None:
        with self._lock:
            model.users -= 1

    def close(self) -> None:
        with self._lock:
            for model in self.loaded.values():
                model.generation.__exit__()
            self.loaded.clear()

    def _load(self, name: str) -> LoadedModel:
        def load() -> LoadedModel:
            generation = GenerationModel(self.sources[name], self.device, self.dtype, self.weights, None, None)
            pipeline = generation.pipeline
            networks = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
            size = sum(each.numel() * each.element_size() for network in networks for each in network.parameters())
            return LoadedModel(name, generation, SharedPipeline(pipeline, self.worker), size)

        self._make_room(Path(self.sources[name]))
        model: LoadedModel = self.worker.run(load)
        model.generation.start_hashing()
        self.loaded[name] = model
        return model

    def _make_room(self, path: Path) -> None:
        """Unload what was used least recently until a model of this path's bytes fits. Raises Busy."""
        if self.limit_bytes is None:
            return
        needed = bytes_of(path)
        while self.loaded and sum(each.bytes for each in self.loaded.values()) + needed > self.limit_bytes:
            idle = next((each for each in self.loaded.values() if not each.users), None)
            if idle is None:
                raise Busy("the memory is full of models that are in use; try again later")
            self.loaded.pop(idle.name).generation.__exit__()


def model_name(source: str) -> str:
    path = Path(source)
    return path.stem if path.is_file() else path.name or path.resolve().name


def bytes_of(path: Path) -> int:
    """Return the bytes of a model's files: about those of its weights in memory."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files)
