"""The model that draws, and what its pictures say of it."""

import platform
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import latentsmith
from latentsmith.checkpoints import Checkpoint, open_checkpoint
from latentsmith.diffusion import SAMPLERS, canonical_sampler
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_text, sha256_files
from latentsmith.processes import own_device

from . import Pipeline

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class GenerationModel:
    """A pipeline and what a picture says of it. `begin` starts to hash its files, meanwhile; leaving stops that."""

    def __init__(
        self, source: str, device: str, dtype: str, weights: str, prediction_type: str | None, tokenizer: str | None
    ):
        if dtype not in DTYPES:
            raise BadInput(f"dtype {dtype} is not one of {', '.join(DTYPES)}")
        device = own_device(device)
        self.checkpoint = open_checkpoint(source, weights)
        self.pipeline = Pipeline.from_pretrained(
            self.checkpoint, device=device, dtype=DTYPES[dtype], prediction_type=prediction_type, tokenizer=tokenizer
        )
        self.facts = {
            "from": str(Path(source).resolve()) if Path(source).exists() else source,
            "weights": weights,
            "averaged": averaged(self.checkpoint, weights),
            "prediction_type": self.pipeline.spec.prediction_type,
            "config": fingerprint_text(self.pipeline.spec.to_json()),
            "tokenizer": self.pipeline.tokenizer.fingerprint(),
            "dtype": dtype,
            "device": str(self.pipeline.device),
        }
        self.given_tokenizer = tokenizer and str(Path(tokenizer).resolve() if Path(tokenizer).exists() else tokenizer)
        self.pool, self.stop = ThreadPoolExecutor(1), threading.Event()

    def begin(self) -> None:
        self.hash: Future[str] = self.pool.submit(sha256_files, weight_files(self.checkpoint), self.stop)

    def __enter__(self) -> "GenerationModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def says(self, wish: Mapping[str, Any], options: Mapping[str, Any], bases: Mapping[str, Any]) -> dict[str, Any]:
        """All that a picture needs to be made again. wish: prompt, negative_prompt, seed, variation_seed."""
        return {
            **wish,
            "sampler": canonical_sampler(options["sampler"], SAMPLERS)[0],
            **bases,
            "options": dict(options),
            "tokenizer": self.given_tokenizer,
            "model": {**self.facts, "hash": self.hash.result()},
            "versions": {"latentsmith": latentsmith.__version__, "torch": torch.__version__,
                         "python": platform.python_version()},
        }  # fmt: skip


def averaged(checkpoint: Checkpoint, weights: str) -> bool:
    """Whether the U-Net's weights are a moving average, as far as its file says: NeMo keeps it in X-EMA.ckpt."""
    path = checkpoint.parts["unet"].path
    return (weights == "ema" and checkpoint.has_ema) or path.parent.name == "ema" or path.stem.endswith("-EMA")


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """The files that the parts of a checkpoint lie in."""
    return [each for file in checkpoint.files for each in ([file] if file.is_file() else sorted(file.rglob("*.ckpt")))]
