"""Every key of the JSON files in a diffusers folder, and what becomes of it.

What `diffusers_config` reads is obeyed. Of the others, FIXED and SOLVER have the values with which our networks and
samplers compute the same: another value in FIXED is refused, in SOLVER it is named, as the sampler that is asked for
decides. OTHER are without effect, or shown by the weights. A key of none of them is named.
"""

from typing import Any

_LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
_NARROW = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}
_CLIPPING = {**_LINEAR, "clip_sample": True}
SCHEDULERS: dict[str, dict[str, Any]] = {  # class -> its defaults, which hold for keys that a config leaves out
    "PNDMScheduler": {**_LINEAR, "skip_prk_steps": False},
    "DDIMScheduler": _CLIPPING, "DDPMScheduler": _CLIPPING, "DEISMultistepScheduler": _LINEAR,
    "DPMSolverMultistepScheduler": _LINEAR, "DPMSolverSinglestepScheduler": _LINEAR, "DPMSolverSDEScheduler": _NARROW,
    "EulerAncestralDiscreteScheduler": _LINEAR, "EulerDiscreteScheduler": _LINEAR, "HeunDiscreteScheduler": _NARROW,
    "KDPM2AncestralDiscreteScheduler": _NARROW, "KDPM2DiscreteScheduler": _NARROW, "LMSDiscreteScheduler": _LINEAR,
    "UniPCMultistepScheduler": _LINEAR,
    "LCMScheduler": {**_NARROW, "beta_schedule": "scaled_linear"},
}  # fmt: skip
# part -> keys of its config.json and the only values with which our networks compute the same
FIXED: dict[str, dict[str, Any]] = {
    "unet": {
        "act_fn": ("silu", "swish"), "center_input_sample": (False,), "flip_sin_to_cos": (True,), "freq_shift": (0,),
        "downsample_padding": (1,), "mid_block_scale_factor": (1,), "norm_eps": (1e-5,), "class_embed_type": (None,),
        "only_cross_attention": (False,), "dual_cross_attention": (False,), "addition_embed_type": (None,),
        "resnet_time_scale_shift": ("default",), "encoder_hid_dim_type": (None,), "attention_type": ("default",),
        "num_class_embeds": (None,), "time_embedding_type": ("positional",), "timestep_post_act": (None,),
        "time_embedding_act_fn": (None,), "resnet_skip_time_act": (False,), "resnet_out_scale_factor": (1,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",), "mid_block_only_cross_attention": (None, False),
        "cross_attention_norm": (None,), "conv_in_kernel": (3,), "conv_out_kernel": (3,),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "vae": {
        "act_fn": ("silu", "swish"), "shift_factor": (None, 0), "latents_mean": (None,), "latents_std": (None,),
        "mid_block_add_attention": (True,), "use_quant_conv": (True,), "use_post_quant_conv": (True,),
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
    },
    "text_encoder": {"layer_norm_eps": (1e-5,), "hidden_act": ("quick_gelu", "gelu")},
    "scheduler": {
        "thresholding": (False,), "use_flow_sigmas": (False,), "use_dynamic_shifting": (False,),
        "timestep_type": ("discrete",), "shift_terminal": (None,),
    },
}  # fmt: skip
SOLVER: dict[str, tuple[Any, ...]] = {
    "skip_prk_steps": (True,), "variance_type": (None, "fixed_small"), "solver_order": (2,),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"), "solver_type": ("midpoint", "bh2", "logrho"),
    "lower_order_final": (True,), "euler_at_final": (False,), "final_sigmas_type": ("zero",), "predict_x0": (True,),
    "disable_corrector": ([],), "solver_p": (None,), "interpolation_type": ("linear",), "sigma_min": (None,),
    "sigma_max": (None,), "lambda_min_clipped": (float("-inf"), "-Infinity"), "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,), "use_lu_lambdas": (False,),
}  # fmt: skip
# key of a config.json -> (what it must be, the types of it or of a list's entries); numbers lie above 0
TYPES: dict[str, tuple[str, tuple[type, ...]]] = dict.fromkeys(
    ("sample_size", "block_out_channels", "attention_head_dim", "num_attention_heads"),
    ("a whole number above 0, or a list of them", (int,)),
) | dict.fromkeys(("norm_num_groups", "num_hidden_layers"), ("a whole number above 0", (int,))) | {
    "scaling_factor": ("a number above 0", (int, float)), "upcast_attention": ("true or false", (bool,)),
    "hidden_act": ("a text", (str,)), "_class_name": ("a text", (str,)), "beta_schedule": ("a text", (str,)),
    "prediction_type": ("a text", (str,)),
}  # fmt: skip
READ = {
    "unet": {"sample_size", "block_out_channels", "norm_num_groups", "attention_head_dim", "num_attention_heads",
             "upcast_attention"},
    "vae": {"norm_num_groups", "scaling_factor"},
    "text_encoder": {"num_hidden_layers", "num_attention_heads"},
    "scheduler": {
        "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "set_alpha_to_one",
        "prediction_type", "timestep_spacing", "steps_offset", "clip_sample", "clip_sample_range",
        "rescale_betas_zero_snr", "use_karras_sigmas",
    },
}  # fmt: skip
OTHER = {
    "unet": {
        "in_channels", "out_channels", "layers_per_block", "cross_attention_dim", "transformer_layers_per_block",
        "reverse_transformer_layers_per_block", "encoder_hid_dim", "use_linear_projection", "time_embedding_dim",
        "time_cond_proj_dim",  # shown by the weights, as all up to here
        "addition_time_embed_dim", "projection_class_embeddings_input_dim", "class_embeddings_concat",
        "addition_embed_type_num_heads",  # read by embeddings that FIXED excludes
        "dropout",  # of training
    },
    "vae": {
        "in_channels", "out_channels", "block_out_channels", "layers_per_block", "latent_channels", "sample_size",
        "force_upcast",  # read by pipelines of other models
    },
    "text_encoder": {
        "vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "projection_dim",
        "bos_token_id", "eos_token_id", "pad_token_id",  # the tokenizer has them
        "attention_dropout", "initializer_range", "initializer_factor",  # of training
    },
    "scheduler": {
        "dynamic_thresholding_ratio", "sample_max_value",  # of thresholding
        "flow_shift", "time_shift_type",  # of use_flow_sigmas and use_dynamic_shifting
        "original_inference_steps", "timestep_scaling",  # of LCM's own sampler
    },
}  # fmt: skip
