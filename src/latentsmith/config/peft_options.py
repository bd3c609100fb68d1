"""Options of adapters: LoRA and its kin, trained beside a frozen model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .option import option
from .value_types import choice, either, list_of, text

SCHEMES = {"sdlora": "lora", "locon": "lora"}
TARGETS = ("attention", "nemo", "transformer", "conv", "full")


@dataclass(frozen=True)
class PeftConfig:
    """Adapters to train in place of the model's own weights."""

    peft_scheme: Literal["lora", "dora", "loha", "lokr", "oft"] | None = option(
        None, "what is trained beside the frozen model; null: its own weights", spellings=SCHEMES, aliases=("lora",)
    )
    networks: tuple[Literal["unet", "text_encoder"], ...] = option(
        ("unet",), "networks that get adapters; the others are frozen", min_length=1, aliases=("train_text_encoder",)
    )
    adapter_dim: int = option(
        16, "rank; of oft the largest block", at_least=1, aliases=("rank", "network_dim", "lora_rank")
    )
    alpha: float | None = option(
        None,
        "the change is scaled by alpha / adapter_dim; null: adapter_dim, so by 1, as in diffusers (kohya's is 1)",
        at_least=0,
        aliases=("network_alpha", "lora_alpha"),
    )
    adapter_dropout: float = option(
        0.0, "share of inner values dropped, of lora and dora", at_least=0, at_most=1, aliases=("network_dropout",)
    )
    targets: str | tuple[str, ...] = option(
        "transformer",
        "layers: attention (128 of SD1's U-Net), nemo (160), transformer (192), conv (278), full (282), or patterns of "
        "names such as [attn2.to_k, attn2.to_v]",
        type=either(choice(*TARGETS), list_of(text(), min_length=1)),
        aliases=("target_modules",),
    )
    exclude: tuple[str, ...] = option((), "patterns of layers left out")
    ranks: Mapping[str, Any] = option({}, "pattern of layers -> rank, where it is another; 0 for none")
    conv_dim: int | None = option(None, "rank of kernels above 1x1; null: adapter_dim", at_least=1)
    conv_alpha: float | None = option(None, "alpha of kernels above 1x1; null: alpha", at_least=0)
    factor: int = option(
        -1, "lokr: the most rows and columns of the small factor; -1: as square as can be", at_least=-1
    )
    lora_plus_ratio: float = option(
        1.0, "LoRA+: learning rate of lora_up over that of lora_down", at_least=0, aliases=("loraplus_lr_ratio",)
    )
    base_precision: Literal["float32", "bf16", "fp16"] = option(
        "float32", "the frozen layers' weights; bf16 and fp16 need trainer.precision of the same, mixed"
    )
    restore_from_path: str | None = option(None, "adapter file to start from: kohya's, diffusers' or NeMo's", path=True)


@dataclass(frozen=True)
class TextualInversionConfig:
    """A new token whose vectors are trained; with model.peft together with adapters (pivotal tuning)."""

    token: str | None = option(
        None, "the word to train, such as <cat-toy>; captions name it", aliases=("placeholder_token", "token_string")
    )
    vectors: int = option(1, "vectors of the token", at_least=1, aliases=("num_vectors", "num_vectors_per_token"))
    initializer: str = option(
        "", "word or words that the vectors begin as; empty: noise", aliases=("initializer_token", "init_word")
    )
    lr: float | None = option(None, "learning rate of the vectors; null: model.optim.lr", at_least=0)
