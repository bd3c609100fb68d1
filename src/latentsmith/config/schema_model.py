"""Options of the model, its three components, optimizer and data. Defaults are Stable Diffusion v1's."""

from latentsmith.config.kinds import (
    anything,
    choice,
    either,
    flag,
    list_of,
    mapping,
    nullable,
    number,
    size,
    text,
    whole,
)
from latentsmith.config.schema import Option, group, mapped, no_effect, refused, used

ONE_LOADER = "every sample is addressed by its position; a run repeats its set until max_steps or max_epochs"
NO_MEGATRON = "there is no Megatron parallelism here; trainer.strategy=model_parallel shards the model"
NOT_BUILT = "it is not built yet"
NO_LOGVAR = "the per-timestep log-variance is not trained here"
NO_VLB = "only the simple loss is trained here"
WITH_BETAS = ("fused_adam", "adamw", "AdamW", "Adam", "Adamax", "NAdam", "RAdam")
OPTIMIZERS = (*WITH_BETAS, "Adadelta", "Adagrad", "RMSprop", "SGD")
LIGHTNING_DDP = "Lightning's DDP decides on its buckets"


def from_pretrained(what: str) -> Option:
    return used("from_pretrained", nullable(text()), None, what, also=["ckpt_path", "weights", "pretrained"])


UNET = group(
    "model.unet_config",
    used("_target_", text(), "latentsmith.models.UNetModel", "class of the U-Net; NeMo's and LDM's paths mean ours"),
    from_pretrained("checkpoint to start from: LDM, diffusers or NeMo, one file or a folder"),
    used(
        "from_NeMo",
        nullable(flag()),
        None,
        "true: the file's names are NeMo's (or LDM's), false: diffusers'; null: the names themselves decide",
    ),
    used("in_channels", whole(1), 4, "channels of the noisy latents"),
    used("out_channels", whole(1), 4, "channels of the prediction"),
    used("model_channels", whole(1), 320, "width of the first level"),
    used("channel_mult", list_of(whole(1)), [1, 2, 4, 4], "width of each level over model_channels"),
    used("attention_resolutions", list_of(whole(1)), [4, 2, 1], "downsampling factors whose levels have attention"),
    used("num_res_blocks", either(whole(1), list_of(whole(1))), 2, "residual blocks of each level"),
    used("num_heads", whole(-1), -1, "heads of every attention; or give num_head_channels. Neither: 8 heads"),
    used("num_head_channels", whole(-1), -1, "channels of one head; or give num_heads", also=["head_dim"]),
    used("use_spatial_transformer", flag(), True, "transformers that attend to the text; else plain self-attention"),
    used("use_linear_in_transformer", flag(), False, "linear layers around a transformer (v2), not 1x1 convolutions"),
    used("transformer_depth", either(whole(1), list_of(whole(1))), 1, "transformer blocks of each attention"),
    used("context_dim", nullable(whole(1)), 768, "features of a text embedding", also=["cross_attention_dim"]),
    used(
        "use_checkpoint",
        flag(),
        False,
        "recompute activations in the backward pass: less memory, about a third slower",
        also=["gradient_checkpointing", "activation_checkpointing"],
    ),
    used("use_flash_attention", flag(), True, "PyTorch's fused attention kernels", also=["xformers", "flash"]),
    used("upcast_attention", flag(), False, "attention in float32 at any precision, as 2.1 needs it in float16"),
    used("resblock_gn_groups", whole(1), 32, "groups of the residual blocks' norms", also=["num_groups"]),
    used("dropout", number(0, 1), 0.0, "inside residual blocks and transformers"),
    no_effect("image_size", anything(), 32, "NeMo: required, unused", "the U-Net takes latents of any size"),
    no_effect("legacy", flag(), False, "head size of plain attention", "with transformers it changes nothing"),
    no_effect(
        "unet_precision",
        choice("fp32", "fp16", "fp16-mixed", "bf16"),
        "fp32",
        "arithmetic of the U-Net",
        "trainer.precision decides for the whole model",
    ),
    no_effect("use_fp16", flag(), False, "LDM: half-precision weights", "trainer.precision decides"),
    no_effect("timesteps", whole(1), 1000, "NeMo: rows of its sinusoid table", "timesteps are embedded as they come"),
    no_effect("lora_network_alpha", anything(), None, "set by NeMo's adapters", "adapters are not trained here"),
    no_effect("offload_to_cpu", flag(), False, "NeMo: stored, never read", "NeMo does not read it either"),
    no_effect("num_heads_upsample", whole(-1), -1, "heads on the way up", "the heads are the same both ways"),
    no_effect("dims", whole(2, 2), 2, "dimensions of the convolutions", "images have two"),
    refused("use_te_fp8", flag(), False, "8-bit floats by Transformer Engine", "Transformer Engine is not used here"),
    refused("use_te_dpa", flag(), False, "its attention", "Transformer Engine is not used here"),
    refused("conv_resample", flag(), True, "resample by convolution", "Stable Diffusion always does"),
    refused("num_classes", anything(), None, "class labels", "Stable Diffusion is told in words"),
    refused("adm_in_channels", anything(), None, "features of a class vector", "Stable Diffusion is told in words"),
    refused("use_scale_shift_norm", flag(), False, "scale and shift by the timestep", "Stable Diffusion only adds"),
    refused("resblock_updown", flag(), False, "resample inside residual blocks", "Stable Diffusion does not"),
    refused("use_new_attention_order", flag(), False, "order of q, k, v in plain attention", "there is one order"),
    refused("n_embed", anything(), None, "predict codebook indices", "latents are continuous here"),
    refused("disable_self_attentions", anything(), None, "cross-attention alone", "Stable Diffusion has both"),
    refused("num_attention_blocks", anything(), None, "attention in some blocks only", "every block of a level has it"),
    refused("disable_middle_self_attn", flag(), False, "no self-attention in the middle", "Stable Diffusion has it"),
    refused("transformer_depth_middle", anything(), None, "depth in the middle", "it is that of the last level"),
)

VAE = group(
    "model.first_stage_config",
    used("_target_", text(), "latentsmith.models.AutoencoderKL", "class of the VAE; NeMo's and LDM's paths mean ours"),
    from_pretrained("checkpoint of the VAE: LDM, diffusers or NeMo, one file or a folder"),
    used("embed_dim", whole(1), 4, "channels of the latents"),
    no_effect("monitor", nullable(text()), None, "metric of the best VAE", "train-vae keeps the newest"),
    *group(
        "ddconfig",
        refused("double_z", flag(), True, "mean and log-variance", "a KL autoencoder needs both"),
        used("z_channels", whole(1), 4, "channels between encoder and quant_conv"),
        used("in_channels", whole(1), 3, "channels of the images given"),
        used("out_ch", whole(1), 3, "channels of the images returned"),
        used("ch", whole(1), 128, "width of the first level"),
        used(
            "ch_mult", list_of(whole(1)), [1, 2, 4, 4], "width of each level over ch; all but the last halve the size"
        ),
        used("num_res_blocks", whole(1), 2, "residual blocks of each level"),
        used("attn_resolutions", list_of(whole(1)), [], "sizes, as `resolution` halves, whose levels have attention"),
        used("resolution", whole(1), 256, "only for matching attn_resolutions: the VAE takes images of any size"),
        used("dropout", number(0, 1), 0.0, "inside residual blocks"),
        used("num_groups", whole(1), 32, "groups of the norms"),
        no_effect("attn_type", text(), "vanilla", "LDM: attention kernel", "PyTorch's fused kernel computes the same"),
    ),
    *group(
        "lossconfig",
        used("_target_", text(), "torch.nn.Identity", "the loss of train-vae; torch.nn.Identity has none"),
        used("l1_weight", number(0), 1.0, "of the mean absolute error"),
        used("l2_weight", number(0), 0.0, "of the mean squared error"),
        used("edge_weight", number(0), 0.0, "of the mean absolute error of horizontal and vertical differences"),
        used("kl_weight", number(0), 1e-6, "of the KL divergence from the standard normal"),
    ),
)

TEXT = group(
    "model.cond_stage_config",
    used(
        "_target_",
        text(),
        "latentsmith.models.ClipTextEncoder",
        "class of the text encoder; NeMo's and LDM's embedders mean ours with their sizes",
    ),
    used(
        "arch",
        nullable(choice("ViT-L-14", "ViT-H-14")),
        None,
        "sets width, layers, heads, intermediate_size, activation; null without sizes: the one as wide as context_dim",
    ),
    used(
        "version",
        nullable(text()),
        None,
        "published weights to take from the Hugging Face hub or its cache where no file is given, or a file",
        also=["model_name"],
    ),
    used("width", nullable(whole(1)), None, "features of a token", also=["hidden_size"]),
    used("layers", nullable(whole(1)), None, "transformer layers in all", also=["num_layers", "num_hidden_layers"]),
    used("heads", nullable(whole(1)), None, "attention heads", also=["num_heads"]),
    used("intermediate_size", nullable(whole(1)), None, "width of the MLP"),
    used("activation", nullable(choice("quick_gelu", "gelu")), None, "of the MLP: v1 quick_gelu, v2 gelu"),
    used("vocab_size", whole(1), 49408, "tokens of the vocabulary"),
    used("max_length", whole(2), 77, "tokens of a caption, both ends included"),
    used("tokenizer", nullable(text()), None, "vocabulary file or folder, or a name; null: looked for as docs say"),
    used("layer", choice("last", "penultimate"), "last", "which layer's output; the final norm follows either way"),
    used("pad_to", nullable(whole(1)), None, "zero vectors up to this length: 80 for models that NeMo trained on v1"),
    used("freeze", flag(), True, "no gradients; model.cond_stage_trainable overrules it"),
    from_pretrained("checkpoint of the text encoder: a folder or one file"),
    used("restore_from_path", nullable(text()), None, "NeMo's name for it: a .nemo with a CLIP inside"),
    no_effect("device", nullable(text()), None, "where it runs", "the run's device, by trainer.accelerator"),
    no_effect("use_fp16", flag(), False, "half precision", "trainer.precision decides"),
    no_effect(
        "cache_dir", nullable(text()), None, "where weights are downloaded to", "the environment variable HF_HUB_CACHE"
    ),
    no_effect("capture_cudagraph_iters", whole(-1), -1, "CUDA graph of the encoder", "model.inductor compiles"),
    refused("always_return_pooled", flag(), False, "a pooled vector besides", "Stable Diffusion v1 and v2 use none"),
    refused("enable_lora_finetune", flag(), False, "adapters in the encoder", "adapters are not trained here"),
    refused("layer_idx", anything(), None, "a hidden layer by number", "only last and penultimate are in use"),
    no_effect("cfg", anything(), None, "NeMo: overrides for its .nemo", "the checkpoint's own sizes hold"),
)

OPTIM = group(
    "model.optim",
    used(
        "name",
        choice(*OPTIMIZERS, aliases={name.lower(): name for name in OPTIMIZERS}),
        "fused_adam",
        "fused_adam and adamw are AdamW, fused where it can be; else the class of torch.optim of that name",
        also=["optimizer"],
    ),
    used(
        "lr",
        number(0),
        1e-4,
        "learning rate after warm-up (NeMo's null was 1e-3)",
        also=["learning_rate", "base_lr", "rate"],
    ),
    used("weight_decay", number(0), 0.0, "decoupled: weights shrink by lr * weight_decay a step", also=["decay"]),
    used(
        "betas",
        nullable(list_of(number(0, 1), 2)),
        None,
        "decay of the two moments; null: the optimizer's own, 0.9 and 0.999",
        also=["adam_beta1"],
    ),
    used(
        "eps",
        nullable(number(0)),
        None,
        "added to the root of the second moment; null: the optimizer's own, 1e-8",
        also=["epsilon", "adam_epsilon"],
    ),
    *group(
        "sched",
        used(
            "name",
            choice("WarmupHoldPolicy", "WarmupPolicy", "CosineAnnealing", "linear", "constant"),
            "WarmupHoldPolicy",
            "how the learning rate goes on after warm-up",
            also=["lr_scheduler"],
        ),
        used("warmup_steps", whole(0), 0, "optimizer steps of linear rise", also=["warmup", "lr_warmup_steps"]),
        used("hold_steps", nullable(whole(0)), None, "steps at full rate before the fall; null: to the end"),
        used("min_lr", number(0), 0.0, "learning rate at the end"),
        used("max_steps", nullable(whole(1)), None, "where the fall ends; null: trainer.max_steps"),
    ),
)

AUGMENTATIONS = (  # applied in the order in which a config names them
    used("resize_smallest_side", whole(1), None, "pixels; bicubic with antialiasing", ["resolution"], optional=True),
    used("center_crop_h_w", size(), None, "cut this out of the middle", ["center_crop"], optional=True),
    used("random_crop_h_w", size(), None, "cut this out at an addressed random place", ["random_crop"], optional=True),
    used("horizontal_flip", flag(), False, "mirror half of the pictures", ["random_flip", "flip"], optional=True),
)
FILTERINGS = refused(
    "filterings", mapping(), {}, "leave pictures out by size", "`latentsmith data import` decides what enters a set"
)
PATHS = nullable(either(text(), list_of(text())))

DATA = group(
    "model.data",
    used("num_workers", whole(0), 0, "processes that read and decode, on each device", also=["workers"]),
    refused("synthetic_data", flag(), False, "random images and captions instead of a set", NOT_BUILT),
    no_effect("synthetic_data_length", whole(1), 10000, "samples of that set", "there is no synthetic set"),
    refused("accept_unfingerprinted", flag(), False, "a cache that does not say what made it", NOT_BUILT),
    *group(
        "train",
        used("dataset_path", PATHS, None, "folder of shards or cache, or WebDataset tars", also=["path"]),
        *group("augmentations", *AUGMENTATIONS),
        FILTERINGS,
        no_effect("data_sharding", flag(), True, "NeMo: tars by process", ONE_LOADER),
    ),
    *group(
        "validation",
        refused("dataset_path", PATHS, None, "as for training; null for no validation", NOT_BUILT),
        refused("data_path", PATHS, None, "NeMo's switch for validation", NOT_BUILT),
        *group("augmentations", *AUGMENTATIONS),
        FILTERINGS,
    ),
    *group(
        "webdataset",
        used("local_root_path", nullable(text()), None, "folder that a relative dataset_path starts from"),
        no_effect("infinite_sampler", flag(), False, "NeMo: shards drawn with replacement", ONE_LOADER),
        no_effect("chunk_size", whole(1), 1000, "samples of one tar", "counted in the shards' index"),
    ),
)

SCALARS = group(
    "model",
    no_effect("precision", anything(), "${trainer.precision}", "arithmetic of the model", "trainer.precision decides"),
    used("micro_batch_size", whole(1), 1, "images at a time on one device", also=["batch_size", "train_batch_size"]),
    used(
        "global_batch_size",
        nullable(whole(1)),
        None,
        "images of one optimizer step over all devices; null: micro batch * devices * accumulation",
    ),
    used("linear_start", number(0, 1), 0.00085, "first beta", also=["beta_start"]),
    used("linear_end", number(0, 1), 0.012, "last beta", also=["beta_end"]),
    used(
        "beta_schedule",
        choice("linear", "cosine", "sqrt_linear", "sqrt"),
        "linear",
        "linear is linear in the root of beta (diffusers' scaled_linear); sqrt_linear is linear in beta",
        also=["noise_schedule"],
    ),
    used("timesteps", whole(2), 1000, "steps of the noise schedule", also=["num_train_timesteps"]),
    used("cosine_s", number(0), 8e-3, "offset of the cosine schedule"),
    used(
        "parameterization",
        choice("eps", "v", "x0"),
        "eps",
        "what the U-Net predicts: noise, velocity or clean latents",
        also=["prediction_type"],
    ),
    used("loss_type", choice("l2", "l1", "huber"), "l2", "distance of prediction and target"),
    used("min_snr_gamma", nullable(number(0)), None, "min-SNR loss weighting; null for none", also=["snr_gamma"]),
    used("offset_noise", number(0), 0.0, "deviation of noise that is one number a channel", also=["noise_offset"]),
    used("input_perturbation", number(0), 0.0, "deviation of noise added to the U-Net's input but not to its target"),
    used(
        "zero_terminal_snr",
        flag(),
        False,
        "stretch the schedule until its last timestep is pure noise; needs parameterization v or x0",
        also=["rescale_betas_zero_snr"],
    ),
    used("first_stage_key", text(), "images", "images, or image_encoded for latents from a cache", also=["image_key"]),
    used(
        "cond_stage_key", text(), "captions", "captions, or captions_encoded for embeddings from a cache", also=["text"]
    ),
    used("cond_stage_trainable", flag(), False, "train the text encoder too", also=["train_text_encoder"]),
    used(
        "caption_dropout_rate",
        number(0, 1),
        0.0,
        "share of captions replaced by the empty prompt, for guidance",
        also=["ucg_rate", "proportion_empty_prompts"],
    ),
    used(
        "text_embedding_dropout_rate",
        number(0, 1),
        0.0,
        "share of text embeddings replaced by zeros, NeMo's way; sampling then takes zeros as the null text",
    ),
    used(
        "scale_factor",
        either(number(0), choice("measured")),
        0.18215,
        "latents are VAE samples times this; measured: 1 / their standard deviation",
        also=["scaling_factor"],
    ),
    no_effect("image_size", anything(), 64, "latent height and width", "the pictures' own size decides"),
    no_effect("channels", whole(1), 4, "channels of the latents", "first_stage_config.embed_dim decides"),
    used(
        "inductor",
        flag(),
        False,
        "compile the U-Net's repeated blocks with TorchInductor",
        also=["compile", "torch_compile"],
    ),
    used("channels_last", flag(), False, "memory order of image-like tensors; faster on most devices"),
    used("seed", whole(0), 1234, "of noise, timesteps, dropout, crops and order", also=["random_seed"]),
    used("ckpt_path", nullable(text()), None, "checkpoint of a whole model to start from, at step 0", also=["init"]),
    used("ckpt_weights", choice("ema", "raw"), "ema", "which to start from where a checkpoint has both", also=["ema"]),
    used("save_frozen", flag(), True, "keep VAE, text encoder and tokenizer in the run folder, once"),
    mapped("resume_from_checkpoint", nullable(text()), None, "read by exp_manager.resume_from_checkpoint"),
    mapped("base_learning_rate", nullable(number(0)), None, "LDM: model.optim.lr, where that is not given"),
    mapped("scale_by_std", flag(), False, "LDM: true is model.scale_factor=measured"),
    no_effect("target", nullable(text()), None, "class of the whole model", "there is one"),
    no_effect("scheduler_config", mapping(), {}, "LDM's learning rate schedule", "model.optim.sched is used"),
    no_effect("native_amp_init_scale", number(0), 65536, "first loss scale", "Lightning's scaler has its own"),
    no_effect("native_amp_growth_interval", whole(1), 1000, "loss scaling", "Lightning's scaler has its own"),
    no_effect("hysteresis", whole(1), 2, "loss scaling", "Lightning's scaler has its own"),
    no_effect("v_posterior", number(0, 1), 0.0, "variance of the posterior", "neither loss nor samplers use it"),
    no_effect("log_every_t", whole(1), 200, "LDM's picture strips", "exp_manager.sample_images draws samples"),
    no_effect("concat_mode", flag(), True, "read where conditioning_key is null", "conditioning_key is crossattn"),
    no_effect("use_ema", flag(), False, "LDM's average", "exp_manager.ema decides"),
    no_effect("monitor", nullable(text()), None, "metric of the best", "a diffusion loss does not rank checkpoints"),
    refused("load_only_unet", flag(), False, "part of ckpt_path", "unet_config.from_pretrained loads a U-Net alone"),
    refused("load_vae", flag(), True, "part of ckpt_path", "each component has its own from_pretrained"),
    refused("load_unet", flag(), True, "part of ckpt_path", "each component has its own from_pretrained"),
    refused("load_encoder", flag(), True, "part of ckpt_path", "each component has its own from_pretrained"),
    no_effect("fused_opt", flag(), True, "NeMo: stored, never read", "the optimizer is fused where it can be"),
    no_effect("clip_denoised", flag(), False, "clip the clean estimate", "latents have no natural bounds to clip to"),
    no_effect("inductor_cudagraphs", flag(), False, "CUDA graphs when compiling", "torch.compile decides"),
    no_effect("capture_cudagraph_iters", whole(-1), -1, "CUDA graph of a whole step", "model.inductor compiles"),
    no_effect("apex_transformer_log_level", whole(0), 30, "logging of Apex", "Apex is not used"),
    no_effect("gradient_as_bucket_view", flag(), True, "memory of DDP", LIGHTNING_DDP),
    no_effect("ddp_overlap", flag(), False, "overlap of DDP", LIGHTNING_DDP),
    no_effect("nsys_profile", mapping(), {}, "window of NVIDIA's profiler", "start nsys around the command"),
    no_effect("show_prog_bar_metric", flag(), True, "loss in the progress bar", "it is always shown"),
    refused("num_timesteps_cond", whole(1), 1, "noise on the conditioning", "the text is given as it is"),
    refused("ignore_keys", list_of(text()), [], "keys of ckpt_path to skip", "loading is strict"),
    refused("conditioning_key", text(), "crossattn", "how text enters", "Stable Diffusion attends to it"),
    refused("cond_stage_forward", nullable(text()), None, "method to call for encoding", "an encoder has one"),
    refused("given_betas", anything(), None, "betas one by one", "a schedule has a name"),
    refused("use_positional_encodings", flag(), False, "positions in the latents", "it never worked in NeMo"),
    refused("l_simple_weight", number(0), 1.0, "weight of the simple loss", NO_VLB),
    refused("original_elbo_weight", number(0), 0.0, "weight of the variational bound", NO_VLB),
    refused("learn_logvar", flag(), False, "train a log-variance", NO_LOGVAR),
    refused("logvar_init", number(), 0.0, "its first value", NO_LOGVAR),
    refused("megatron_amp_O2", flag(), False, "half-precision weights", "weights stay float32"),
    refused("fsdp", flag(), False, "NeMo's sharding", NO_MEGATRON),
    refused("tensor_model_parallel_size", whole(1), 1, "devices of one layer", NO_MEGATRON),
    refused("pipeline_model_parallel_size", whole(1), 1, "devices of one model", NO_MEGATRON),
    refused("sequence_parallel", flag(), False, "devices of one sequence", NO_MEGATRON),
)  # fmt: skip

OPTIONS = [*SCALARS, *UNET, *VAE, *TEXT, *OPTIM, *DATA]
