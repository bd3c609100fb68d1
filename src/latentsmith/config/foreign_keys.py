"""Keys of NeMo's and LDM's files that are no options here, each with its reason; their spellings in ours."""

from __future__ import annotations

import re
from typing import Any

from latentsmith.files.errors import BadInput

from .value_types import ValueType, flag, mapping, nullable, number, text

AT_MODEL = "adapters are options of the model: model.peft"
NO_MEGATRON = "there is no Megatron parallelism here; trainer.strategy=model_parallel shards the model"
NO_RANKING = "a diffusion loss does not rank checkpoints"
NO_CLASSES = "Stable Diffusion is conditioned on text"
NO_TRANSFORMER_ENGINE = "Transformer Engine is not used here"
NO_VLB = "only the simple loss is trained here"
NO_LOGVAR = "the per-timestep log-variance is not trained here"
PRECISION = "trainer.precision decides"
OWN_SOURCE = "each component has its own from_pretrained"
CONVERT = "`latentsmith convert --to nemo` writes one"
FOLDER = "a checkpoint is a folder named after its step"
LIGHTNING_DDP = "Lightning's DDP decides on its buckets"
SCALER = "Lightning's scaler has its own"
ONE_LOADER = "every sample is addressed by its position; a run repeats its set until max_steps or max_epochs"
TORCHRUN = "torchrun or srun shares the images"

IGNORED = {  # accepted, since shipped YAML files carry it; changes nothing
    "trainer.logger": "exp_manager chooses the loggers",
    "trainer.enable_checkpointing": "exp_manager decides on checkpoints",
    "trainer.use_distributed_sampler": "each process computes its share of the order from the sample's position",
    "trainer.enable_model_summary": "a run prints its parameter counts itself",
    "exp_manager.checkpoint_callback_params.every_n_epochs": "checkpoints are counted in steps",
    "exp_manager.checkpoint_callback_params.monitor": NO_RANKING,
    "exp_manager.checkpoint_callback_params.filename": FOLDER,
    "exp_manager.checkpoint_callback_params.mode": NO_RANKING,
    "exp_manager.checkpoint_callback_params.save_last": "the newest is always kept",
    "exp_manager.checkpoint_callback_params.save_nemo_on_train_end": CONVERT,
    "exp_manager.checkpoint_callback_params.always_save_nemo": CONVERT,
    "exp_manager.checkpoint_callback_params.save_best_model": NO_RANKING,
    "exp_manager.checkpoint_callback_params.postfix": FOLDER,
    "exp_manager.ema.validate_original_weights": "validation takes both",
    "peft.lora_tuning": AT_MODEL,
    "model._target_": "there is one class of the whole model",
    "model.precision": PRECISION,
    "model.channels": "first_stage_config.embed_dim decides",
    "model.personalization_config": "model.textual_inversion says what is trained",
    "model.fsdp_sharding_strategy": NO_MEGATRON,
    "model.fsdp_grad_reduce_dtype": NO_MEGATRON,
    "model.fsdp_sharded_checkpoint": "a checkpoint is one set of files",
    "model.fsdp_use_orig_params": NO_MEGATRON,
    "model.native_amp_init_scale": SCALER,
    "model.native_amp_growth_interval": SCALER,
    "model.hysteresis": SCALER,
    "model.v_posterior": "neither loss nor samplers use it",
    "model.log_every_t": "exp_manager.sample_images generates samples",
    "model.concat_mode": "conditioning_key is crossattn",
    "model.use_ema": "exp_manager.ema decides",
    "model.monitor": NO_RANKING,
    "model.fused_opt": "the optimizer is fused where it can be",
    "model.clip_denoised": "latents have no natural bounds to clip to",
    "model.capture_cudagraph_iters": "model.inductor_cudagraphs",
    "model.apex_transformer_log_level": "Apex is not used",
    "model.gradient_as_bucket_view": LIGHTNING_DDP,
    "model.ddp_overlap": LIGHTNING_DDP,
    "model.nsys_profile": "start nsys around the command",
    "model.show_prog_bar_metric": "the loss is always shown",
    "model.hparams_file": "a checkpoint is read by its keys",
    "model.unet_config.image_size": "the U-Net takes latents of any size",
    "model.unet_config.legacy": "with transformers it changes nothing",
    "model.unet_config.unet_precision": "trainer.precision decides for the whole model",
    "model.unet_config.enable_amp_o2_fp16": PRECISION,
    "model.unet_config.use_fp16": PRECISION,
    "model.unet_config.use_bf16": PRECISION,
    "model.unet_config.timesteps": "timesteps are embedded as they come",
    "model.unet_config.lora_network_alpha": "model.peft.alpha decides",
    "model.unet_config.offload_to_cpu": "NeMo does not read it either",
    "model.unet_config.num_heads_upsample": "the heads are the same both ways",
    "model.first_stage_config.monitor": "train-vae keeps the newest",
    "model.first_stage_config.ddconfig.attn_type": "PyTorch's fused kernel computes the same",
    "model.cond_stage_config.device": "the run's device, by trainer.accelerator",
    "model.cond_stage_config.use_fp16": PRECISION,
    "model.cond_stage_config.cache_dir": "the environment variable HF_HUB_CACHE",
    "model.cond_stage_config.capture_cudagraph_iters": "model.inductor compiles",
    "model.cond_stage_config.cfg": "the checkpoint's own sizes hold",
    "model.data.train.data_sharding": ONE_LOADER,
    "model.data.train.filterings.estimated_portion": "the images that are left are counted",
    "model.data.validation.data_path": "dataset_path alone decides",
    "model.data.webdataset.infinite_sampler": ONE_LOADER,
    "model.data.webdataset.chunk_size": "counted in the shards' index",
    "infer.down_factor": "the VAE's own factor holds",
    "infer.output_type": "generate writes PNGs; `Pipeline` returns images",
    "infer.save_to_file": "generate always does",
    "infer.devices": TORCHRUN,
    "fid.coco_images_path": "real images are not read for generating",
    "fid.nnodes_per_cfg": TORCHRUN,
    "fid.ntasks_per_node": TORCHRUN,
    "fid.local_task_id": TORCHRUN,
}

REFUSED: dict[str, tuple[Any, str]] = {  # accepted at this value only, since anything else would change what is trained
    "exp_manager.explicit_log_dir": (None, "exp_dir and name say where the run folder is"),
    "peft.peft_scheme": (None, AT_MODEL),
    "peft.restore_from_path": (None, AT_MODEL),
    "model.load_only_unet": (False, "unet_config.from_pretrained loads a U-Net alone"),
    "model.load_vae": (True, OWN_SOURCE),
    "model.load_unet": (True, OWN_SOURCE),
    "model.load_encoder": (True, OWN_SOURCE),
    "model.num_timesteps_cond": (1, "no noise is added to the text"),
    "model.ignore_keys": ([], "loading is strict"),
    "model.conditioning_key": ("crossattn", "Stable Diffusion attends to the text"),
    "model.cond_stage_forward": (None, "an encoder has one method"),
    "model.given_betas": (None, "a schedule has a name"),
    "model.use_positional_encodings": (False, "it never worked in NeMo"),
    "model.l_simple_weight": (1, NO_VLB),
    "model.original_elbo_weight": (0, NO_VLB),
    "model.learn_logvar": (False, NO_LOGVAR),
    "model.logvar_init": (0, NO_LOGVAR),
    "model.megatron_amp_O2": (False, "weights stay float32"),
    "model.fsdp": (False, NO_MEGATRON),
    "model.tensor_model_parallel_size": (1, NO_MEGATRON),
    "model.pipeline_model_parallel_size": (1, NO_MEGATRON),
    "model.sequence_parallel": (False, NO_MEGATRON),
    "model.unet_config.dims": (2, "images have two dimensions"),
    "model.unet_config.use_te_fp8": (False, NO_TRANSFORMER_ENGINE),
    "model.unet_config.use_te_dpa": (False, NO_TRANSFORMER_ENGINE),
    "model.unet_config.conv_resample": (True, "Stable Diffusion always resamples by convolution"),
    "model.unet_config.num_classes": (None, NO_CLASSES),
    "model.unet_config.adm_in_channels": (None, NO_CLASSES),
    "model.unet_config.use_scale_shift_norm": (False, "Stable Diffusion only adds the timestep's embedding"),
    "model.unet_config.resblock_updown": (False, "Stable Diffusion does not resample inside residual blocks"),
    "model.unet_config.use_new_attention_order": (False, "there is one order"),
    "model.unet_config.n_embed": (None, "latents are continuous here"),
    "model.unet_config.disable_self_attentions": (None, "Stable Diffusion has self-attention and cross-attention"),
    "model.unet_config.num_attention_blocks": (None, "every block of a level has attention"),
    "model.unet_config.disable_middle_self_attn": (False, "Stable Diffusion has self-attention in the middle"),
    "model.unet_config.transformer_depth_middle": (None, "it is that of the last level"),
    "model.first_stage_config.ddconfig.double_z": (True, "a KL autoencoder needs mean and log-variance"),
    "model.cond_stage_config.always_return_pooled": (False, "Stable Diffusion v1 and v2 use no pooled vector"),
    "model.cond_stage_config.enable_lora_finetune": (False, "model.peft.networks=[text_encoder] adapts it"),
    "model.cond_stage_config.layer_idx": (None, "only last and penultimate are in use"),
    "model.data.validation.filterings": ({}, "a validation takes its whole set"),
}

MOVED: dict[str, tuple[ValueType, str]] = {  # read as an option of ours
    "model.base_learning_rate": (
        nullable(number(0)),
        "LDM: model.optim.lr, where that is not given; not scaled by batch size as there",
    ),
    "model.scale_by_std": (flag(), "LDM: true is model.scale_factor=measured"),
    "model.scheduler_config": (mapping(), "LDM: its warm_up_steps, where model.optim.sched has none"),
    "model.peft.lora_tuning": (
        mapping(),
        "NeMo: its adapter_dim, network_alpha and adapter_dropout, where model.peft has none; targets are then nemo",
    ),
    "model.resume_from_checkpoint": (nullable(text(path=True)), "NeMo: exp_manager.resume_from_checkpoint"),
}

NO_COMPONENT = {  # what LDM writes in place of a component
    "__is_first_stage__": "the text is not encoded by the VAE; give a text encoder",
    "__is_unconditional__": "Stable Diffusion is conditioned on text; give a text encoder",
}
INSIDE_REFERENCE = re.compile(r"(?<=[\w.])\.params(?=\.[\w.]+\})")


def canonical_tree(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a config file in our spelling: `_target_` beside its arguments, no level `params`, nor in references."""
    tree = _canonical_references(tree)
    model = tree.get("model")
    if isinstance(model, dict):
        if not isinstance(model.get("params") or {}, dict):
            raise BadInput(f"model.params must be a mapping of options, not {model['params']!r}")
        tree["model"] = canonical_node({**model, **(model.pop("params", None) or {})})
    return tree


def canonical_node(node: Any) -> Any:
    """Rewrite `target:` + `params:` (LDM) and `cls:` (NeMo's precaching) as `_target_:` beside its arguments."""
    if isinstance(node, list):
        return [canonical_node(entry) for entry in node]
    if not isinstance(node, dict):
        return node
    flat = {str(key): canonical_node(value) for key, value in node.items()}
    spelling = next((name for name in ("target", "cls") if isinstance(flat.get(name), str)), None)
    if spelling is None or "_target_" in flat:
        return flat
    params = flat.pop("params", None) or {}
    if not isinstance(params, dict):
        raise BadInput(f"params of {flat[spelling]} must be a mapping of options, not {params!r}")
    return {"_target_": flat.pop(spelling), **flat, **params}


def canonical_key(key: str) -> str:
    """Return LDM's spelling of a dotted key (`model.params.x`, `model.unet_config.target`) in ours."""
    if not key.startswith("model."):
        return key
    return re.sub(r"\.target$", "._target_", re.sub(r"\.params(?=\.)", "", key))


def _canonical_references(node: Any) -> Any:
    """Take out the level `params` from interpolations of LDM's nested options (`${model.params.channels}`)."""
    if isinstance(node, dict):
        return {key: _canonical_references(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_canonical_references(value) for value in node]
    return INSIDE_REFERENCE.sub("", node) if isinstance(node, str) and "${" in node else node
