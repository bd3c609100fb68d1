"""Options of the model, its three components and its optimizer. Defaults are Stable Diffusion v1's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from latentsmith.architectures import COMPONENTS

from .data_options import DataConfig
from .option import option
from .peft_options import PeftConfig, TextualInversionConfig
from .value_types import choice, class_path, either

Weights = ("ckpt_path", "weights", "pretrained")  # what people call from_pretrained
LIBRARY_OPTIMIZERS = {  # name -> (class, the package that has it)
    "adamw8bit": ("bitsandbytes.optim.AdamW8bit", "bitsandbytes"),
    "adam8bit": ("bitsandbytes.optim.Adam8bit", "bitsandbytes"),
    "lion8bit": ("bitsandbytes.optim.Lion8bit", "bitsandbytes"),
    "paged_adamw": ("bitsandbytes.optim.PagedAdamW", "bitsandbytes"),
    "paged_adamw8bit": ("bitsandbytes.optim.PagedAdamW8bit", "bitsandbytes"),
    "lion": ("lion_pytorch.Lion", "lion-pytorch"),
    "prodigy": ("prodigyopt.Prodigy", "prodigyopt"),
    "adamw_schedulefree": ("schedulefree.AdamWScheduleFree", "schedulefree"),
    "radam_schedulefree": ("schedulefree.RAdamScheduleFree", "schedulefree"),
    "sgd_schedulefree": ("schedulefree.SGDScheduleFree", "schedulefree"),
}
BITSANDBYTES = tuple(name for name, (_, package) in LIBRARY_OPTIMIZERS.items() if package == "bitsandbytes")
WITH_BETAS = ("fused_adam", "adamw", "AdamW", "Adam", "Adamax", "NAdam", "RAdam", *LIBRARY_OPTIMIZERS)
WITHOUT_BETAS = ("Adadelta", "Adafactor", "Adagrad", "ASGD", "Muon", "RMSprop", "Rprop", "SGD")
WITHOUT_EPS = ("SGD", "ASGD", "Rprop", "Adafactor", "lion", "lion8bit", "sgd_schedulefree")  # Adafactor has two
OPTIMIZERS = (*WITH_BETAS, *WITHOUT_BETAS)
OPTIMIZER_SPELLINGS = {name.lower(): name for name in OPTIMIZERS} | {
    f"{kind}schedulefree": f"{kind}_schedulefree" for kind in ("adamw", "radam", "sgd")
}
IMAGE_KEYS = {"jpg": "images", "png": "images", "image": "images", "images_moments": "image_encoded"}
CAPTION_KEYS = {
    "txt": "captions",
    "caption": "captions",
    "text": "captions",
    "captions_clip_encoded": "captions_encoded",
}


@dataclass(frozen=True)
class UNetConfig:
    """The U-Net."""

    _target_: str = option(COMPONENTS["unet"].class_path, "class of the U-Net; NeMo's and LDM's paths mean ours")
    from_pretrained: str | None = option(
        None,
        "checkpoint to start from: LDM, diffusers or NeMo, one file or a folder",
        aliases=Weights,
        path=True,
    )
    from_NeMo: bool | None = option(
        None, "true: the file's names are NeMo's (or LDM's), false: diffusers'; null: the names themselves decide"
    )
    in_channels: int = option(4, "channels of the noisy latents", at_least=1)
    out_channels: int = option(4, "channels of the prediction", at_least=1)
    model_channels: int = option(320, "width of the first level", at_least=1)
    channel_mult: tuple[int, ...] = option(
        (1, 2, 4, 4), "width of each level over model_channels", at_least=1, min_length=1
    )
    attention_resolutions: tuple[int, ...] = option(
        (4, 2, 1), "downsampling factors whose levels have attention", at_least=1
    )
    num_res_blocks: int | tuple[int, ...] = option(2, "residual blocks of each level", at_least=1)
    num_heads: int = option(-1, "heads of every attention; or give num_head_channels. Neither: 8 heads", at_least=-1)
    num_head_channels: int = option(
        -1, "channels of one head; decides over num_heads", at_least=-1, aliases=("head_dim",)
    )
    use_spatial_transformer: bool = option(True, "transformers that attend to the text; else plain self-attention")
    use_linear_in_transformer: bool = option(False, "linear layers around a transformer (v2), not 1x1 convolutions")
    transformer_depth: int | tuple[int, ...] = option(1, "transformer blocks of each attention", at_least=1)
    context_dim: int | None = option(768, "features of a text embedding", at_least=1, aliases=("cross_attention_dim",))
    use_checkpoint: bool = option(
        False,
        "recompute activations in the backward pass: less memory, about a third slower",
        aliases=("gradient_checkpointing", "activation_checkpointing"),
    )
    use_flash_attention: bool = option(True, "PyTorch's fused attention kernels", aliases=("xformers", "flash"))
    upcast_attention: bool = option(False, "attention in float32 at any precision, as 2.1 needs it in float16")
    resblock_gn_groups: int = option(32, "groups of the residual blocks' norms", at_least=1, aliases=("num_groups",))
    dropout: float = option(0.0, "inside residual blocks and transformers", at_least=0, at_most=1)


@dataclass(frozen=True)
class DDConfig:
    """Sizes of the VAE's encoder and decoder."""

    z_channels: int = option(4, "channels between encoder and quant_conv", at_least=1)
    in_channels: int = option(3, "channels of the images given", at_least=1)
    out_ch: int = option(3, "channels of the images returned", at_least=1)
    ch: int = option(128, "width of the first level", at_least=1)
    ch_mult: tuple[int, ...] = option(
        (1, 2, 4, 4), "width of each level over ch; all but the last halve", at_least=1, min_length=1
    )
    num_res_blocks: int = option(2, "residual blocks of each level", at_least=1)
    attn_resolutions: tuple[int, ...] = option(
        (), "sizes, as `resolution` halves, whose levels have attention", at_least=1
    )
    resolution: int = option(256, "only for matching attn_resolutions: the VAE takes images of any size", at_least=1)
    dropout: float = option(0.0, "inside residual blocks", at_least=0, at_most=1)
    num_groups: int = option(32, "groups of the norms", at_least=1)


@dataclass(frozen=True)
class LossConfig:
    """The loss of train-vae."""

    _target_: str = option("torch.nn.Identity", "the loss of train-vae; torch.nn.Identity has none")
    l1_weight: float = option(1.0, "of the mean absolute error", at_least=0)
    l2_weight: float = option(0.0, "of the mean squared error", at_least=0)
    edge_weight: float = option(0.0, "of the mean absolute error of horizontal and vertical differences", at_least=0)
    kl_weight: float = option(1e-6, "of the KL divergence from the standard normal", at_least=0)


@dataclass(frozen=True)
class FirstStageConfig:
    """The VAE."""

    _target_: str = option(COMPONENTS["vae"].class_path, "class of the VAE; NeMo's and LDM's paths mean ours")
    from_pretrained: str | None = option(
        None,
        "checkpoint of the VAE: LDM, diffusers or NeMo, one file or a folder",
        aliases=Weights,
        path=True,
    )
    embed_dim: int = option(4, "channels of the latents", at_least=1)
    ddconfig: DDConfig = DDConfig()
    lossconfig: LossConfig = LossConfig()


@dataclass(frozen=True)
class CondStageConfig:
    """The text encoder."""

    _target_: str = option(
        COMPONENTS["text_encoder"].class_path,
        "class of the text encoder; NeMo's and LDM's embedders mean ours with their sizes",
    )
    arch: Literal["ViT-L-14", "ViT-H-14"] | None = option(
        None,
        "sets width, layers, heads, intermediate_size, activation; null without sizes: the one as wide as context_dim",
    )
    version: str | None = option(
        None,
        "published weights to take from the Hugging Face hub or its cache where no file is given, or a file",
        aliases=("model_name",),
        path=True,
    )
    width: int | None = option(None, "features of a token", at_least=1, aliases=("hidden_size",))
    layers: int | None = option(
        None, "transformer layers in all", at_least=1, aliases=("num_layers", "num_hidden_layers")
    )
    heads: int | None = option(None, "attention heads", at_least=1, aliases=("num_heads",))
    intermediate_size: int | None = option(None, "width of the MLP", at_least=1)
    activation: Literal["quick_gelu", "gelu"] | None = option(None, "of the MLP: v1 quick_gelu, v2 gelu")
    vocab_size: int = option(49408, "tokens of the vocabulary", at_least=1)
    max_length: int = option(77, "tokens of a caption, both ends included", at_least=2)
    tokenizer: str | None = option(
        None, "vocabulary file or folder, or a name; null: looked for as docs say", path=True
    )
    layer: Literal["last", "penultimate"] = option("last", "which layer's output; the final norm follows either way")
    pad_to: int | None = option(
        None, "zero vectors up to this length: 80 for models that NeMo trained on v1", at_least=1
    )
    freeze: bool = option(True, "no gradients; model.cond_stage_trainable overrules it")
    from_pretrained: str | None = option(
        None, "checkpoint of the text encoder: a folder or one file", aliases=Weights, path=True
    )
    restore_from_path: str | None = option(None, "NeMo's name for it: a .nemo with a CLIP inside", path=True)


@dataclass(frozen=True)
class SchedConfig:
    """The learning rate over the run."""

    name: Literal["WarmupHoldPolicy", "WarmupPolicy", "CosineAnnealing", "linear", "constant"] = option(
        "WarmupHoldPolicy", "what the learning rate does after warm-up", aliases=("lr_scheduler",)
    )
    warmup_steps: int = option(0, "optimizer steps of linear rise", at_least=0, aliases=("warmup", "lr_warmup_steps"))
    hold_steps: int | None = option(None, "steps at full rate before linear and cosine fall", at_least=0)
    min_lr: float = option(0.0, "learning rate at the end", at_least=0)
    max_steps: int | None = option(
        None, "where the fall, or a warm-up policy, is at min_lr; null: trainer.max_steps", at_least=1
    )


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer."""

    name: str = option(
        "fused_adam",
        "fused_adam and adamw are AdamW, fused where it can be; names ending in 8bit have moments in 8 bits, paged "
        "ones leave a full GPU for the CPU's memory; Muon moves matrices, and AdamW the rest; else the class of "
        "torch.optim of that name, or any installed one as package.module.Class",
        type=either(choice(*OPTIMIZERS, spellings=OPTIMIZER_SPELLINGS), class_path()),
        aliases=("optimizer", "optimizer_type"),
    )
    lr: float = option(
        1e-4,
        "learning rate after warm-up (NeMo's null was 1e-3)",
        at_least=0,
        aliases=("learning_rate", "base_lr", "rate"),
    )
    text_encoder_lr: float | None = option(
        None, "learning rate of a text encoder that is trained; null: lr", at_least=0
    )
    weight_decay: float = option(
        0.0, "decoupled: weights shrink by lr * weight_decay a step", at_least=0, aliases=("decay",)
    )
    betas: tuple[float, float] | None = option(
        None,
        "decay of the two moments; null: the optimizer's own, 0.9 and 0.999",
        at_least=0,
        at_most=1,
        aliases=("adam_beta1",),
    )
    eps: float | None = option(
        None,
        "added to the root of the second moment; null: the optimizer's own, 1e-8",
        at_least=0,
        aliases=("epsilon", "adam_epsilon"),
    )
    options: Mapping[str, Any] = option(
        {}, "other arguments of the optimizer's class, such as d_coef of prodigy", aliases=("optimizer_args",)
    )
    sched: SchedConfig = SchedConfig()


@dataclass(frozen=True)
class ModelConfig:
    """The model, and what it learns."""

    micro_batch_size: int = option(
        1, "images at a time on one device", at_least=1, aliases=("batch_size", "train_batch_size")
    )
    global_batch_size: int | None = option(
        None, "images of one optimizer step over all devices; null: micro batch * devices * accumulation", at_least=1
    )
    linear_start: float = option(0.00085, "first beta", at_least=0, at_most=1, aliases=("beta_start",))
    linear_end: float = option(0.012, "last beta", at_least=0, at_most=1, aliases=("beta_end",))
    beta_schedule: Literal["linear", "cosine", "sqrt_linear", "sqrt"] = option(
        "linear",
        "linear is linear in the root of beta (diffusers' scaled_linear); sqrt_linear is linear in beta",
        aliases=("noise_schedule",),
    )
    timesteps: int = option(
        1000, "steps of the noise schedule", at_least=2, at_most=100_000, aliases=("num_train_timesteps",)
    )
    cosine_s: float = option(8e-3, "offset of the cosine schedule", at_least=0)
    parameterization: Literal["eps", "v", "x0"] = option(
        "eps", "what the U-Net predicts: noise, velocity or clean latents", aliases=("prediction_type",)
    )
    loss_type: Literal["l2", "l1", "huber"] = option("l2", "distance of prediction and target")
    min_snr_gamma: float | None = option(
        None, "min-SNR loss weighting; null for none", at_least=0, aliases=("snr_gamma",)
    )
    offset_noise: float = option(
        0.0, "deviation of noise that is one number a channel", at_least=0, aliases=("noise_offset",)
    )
    input_perturbation: float = option(
        0.0, "deviation of noise added to the U-Net's input but not to its target", at_least=0
    )
    change_objective: bool = option(
        False, "train weights with another parameterization, schedule or scale than their checkpoint states"
    )
    zero_terminal_snr: bool = option(
        False,
        "stretch the schedule until its last timestep is pure noise; needs parameterization v or x0",
        aliases=("rescale_betas_zero_snr",),
    )
    first_stage_key: Literal["images", "image_encoded"] = option(
        "images", "images, or image_encoded for latents from a cache", spellings=IMAGE_KEYS, aliases=("image_key",)
    )
    cond_stage_key: Literal["captions", "captions_encoded"] = option(
        "captions",
        "captions, or captions_encoded for embeddings from a cache",
        spellings=CAPTION_KEYS,
        aliases=("text",),
    )
    cond_stage_trainable: bool = option(False, "train the text encoder too", aliases=("train_text_encoder",))
    caption_dropout_rate: float = option(
        0.0,
        "share of captions replaced by the empty prompt, for guidance",
        at_least=0,
        at_most=1,
        aliases=("ucg_rate", "proportion_empty_prompts"),
    )
    text_embedding_dropout_rate: float = option(
        0.0,
        "share of text embeddings replaced by zeros, NeMo's way; sampling then takes zeros as the null text",
        at_least=0,
        at_most=1,
    )
    scale_factor: float | Literal["measured"] = option(
        0.18215,
        "latents are VAE samples times this; measured: 1 / their standard deviation",
        at_least=0,
        aliases=("scaling_factor",),
    )
    image_size: int = option(64, "latent height and width of synthetic_data without a crop", at_least=1)
    inductor: bool = option(
        False, "compile the U-Net's repeated blocks with TorchInductor", aliases=("compile", "torch_compile")
    )
    inductor_cudagraphs: bool = option(False, "with model.inductor on a GPU: each block as one CUDA graph")
    channels_last: bool = option(False, "memory order of image-like tensors; faster on most devices")
    seed: int = option(1234, "of noise, timesteps, dropout, crops and order", at_least=0, aliases=("random_seed",))
    ckpt_path: str | None = option(
        None, "checkpoint of a whole model to start from, at step 0", aliases=("init",), path=True
    )
    ckpt_weights: Literal["ema", "raw"] = option(
        "ema", "which to start from where a checkpoint has both", aliases=("ema",)
    )
    save_frozen: bool = option(True, "keep VAE, text encoder and tokenizer in the run folder, once")
    unet_config: UNetConfig = UNetConfig()
    first_stage_config: FirstStageConfig = FirstStageConfig()
    cond_stage_config: CondStageConfig = CondStageConfig()
    optim: OptimConfig = OptimConfig()
    peft: PeftConfig = PeftConfig()  # noqa: RUF009, it is frozen
    textual_inversion: TextualInversionConfig = TextualInversionConfig()  # noqa: RUF009, it is frozen
    data: DataConfig = DataConfig()  # noqa: RUF009, it is frozen

    @property
    def adapted_networks(self) -> tuple[str, ...]:
        """Return the names of networks that get adapters."""
        return self.peft.networks if self.peft.peft_scheme is not None else ()

    @property
    def has_frozen_base(self) -> bool:
        """Return whether adapters or a token are trained in place of the model's own weights."""
        return bool(self.adapted_networks) or self.textual_inversion.token is not None
