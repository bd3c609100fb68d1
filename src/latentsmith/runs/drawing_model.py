"""The model that draws, and what its pictures say of it."""

import os
import platform
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
from latentsmith.inference import Pipeline

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class DrawingModel:
    """A pipeline and what a picture says of it. Its files are hashed meanwhile; leaving waits for that."""

    def __init__(
        self, source: str, device: str, dtype: str, weights: str, prediction_type: str | None, tokenizer: str | None
    ):
        if dtype not in DTYPES:
            raise BadInput(f"dtype {dtype} is not one of {', '.join(DTYPES)}")
        local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
        if device == "auto" and local and torch.cuda.is_available():
            device = f"cuda:{local}"
        checkpoint = open_checkpoint(source, weights)
        self.pipeline = Pipeline.from_pretrained(
            source, device=device, dtype=DTYPES[dtype], weights=weights, prediction_type=prediction_type,
            tokenizer=tokenizer,
        )  # fmt: skip
        self.facts = {
            "from": source,
            "weights": weights,
            "averaged": weights == "ema" and averaged(checkpoint),
            "prediction_type": self.pipeline.spec.prediction_type,
            "config": fingerprint_text(self.pipeline.spec.to_json()),
            "dtype": dtype,
            "device": str(self.pipeline.device),
        }
        self.pool = ThreadPoolExecutor(1)
        self.hash: Future[str] = self.pool.submit(sha256_files, weight_files(checkpoint))

    def __enter__(self) -> "DrawingModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def says(self, wish: Mapping[str, Any], options: Mapping[str, Any], bases: Mapping[str, Any]) -> dict[str, Any]:
        """All that a picture needs to be made again. wish: prompt, negative_prompt, seed, variation_seed."""
        return {
            **wish,
            "sampler": canonical_sampler(options["sampler"], SAMPLERS)[0],
            **bases,
            "options": dict(options),
            "model": {**self.facts, "hash": self.hash.result()},
            "versions": {"latentsmith": latentsmith.__version__, "torch": torch.__version__,
                         "python": platform.python_version()},
        }  # fmt: skip


def averaged(checkpoint: Checkpoint) -> bool:
    """Whether the U-Net's weights are a moving average."""
    unet = checkpoint.parts["unet"]
    return checkpoint.has_ema or unet.path.parent.name == "ema"


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """The files that the parts of a checkpoint lie in."""
    files: dict[Path, None] = {}
    for part in checkpoint.parts.values():
        inside = [part.path] if part.path.is_file() else sorted(part.path.rglob("*"))
        files |= dict.fromkeys(f for f in inside if f.suffix in (".safetensors", ".bin", ".ckpt", ".nemo", ".pt"))
    return list(files)
