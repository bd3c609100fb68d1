import pytest

from latentsmith.config import load_config
from latentsmith.files.errors import BadInput

CONTRADICTIONS = [
    (["model.unet_config.num_heads=0"], "give at least 1"),
    (["model.unet_config.num_heads=7"], "7 heads do not divide a level of 1280 channels"),
    (["model.unet_config.num_head_channels=48"], "heads of 48 do not divide a level of"),
    (["model.unet_config.model_channels=48"], "resblock_gn_groups: 32 groups do not divide a level of 48 channels"),
    (["model.unet_config.model_channels=48", "model.unet_config.resblock_gn_groups=16"], "needs a multiple of 32"),
    (["model.unet_config.num_res_blocks=[2,2]"], "num_res_blocks has 2 entries for the 4 levels of channel_mult"),
    (["model.unet_config.transformer_depth=[1,1,1]"], "transformer_depth has 3 entries for the 4 levels"),
    (["model.unet_config.attention_resolutions=[3]"], "3 is never reached; the levels have [1, 2, 4, 8]"),
    (["model.unet_config.context_dim=null"], "context_dim and use_spatial_transformer go together"),
    (["model.unet_config.use_spatial_transformer=false"], "context_dim and use_spatial_transformer go together"),
    (
        ["model.unet_config.context_dim=1024", "model.cond_stage_config.arch=ViT-L-14"],
        "context_dim is 1024, but model.cond_stage_config gives embeddings of 768 features",
    ),
    (["model.unet_config.in_channels=9"], "the channels of the latents disagree"),
    (["model.first_stage_config.embed_dim=8"], "model.first_stage_config.embed_dim=8, model.unet_config.in_chann"),
    (["model.first_stage_config.ddconfig.ch=100"], "32 groups do not divide a level of 100 channels"),
    (["model.cond_stage_config.arch=null", "model.cond_stage_config.width=768"], "layers, heads, intermediate_size"),
    (
        ["model.caption_dropout_rate=0.1", "model.text_embedding_dropout_rate=0.1"],
        "both above 0: a model has one meaning of no text",
    ),
    (
        ["model.cond_stage_trainable=True", "model.cond_stage_key=captions_encoded"],
        "needs captions, not model.cond_stage_key=captions_encoded",
    ),
    (
        ["trainer.devices=4", "model.micro_batch_size=4", "model.global_batch_size=24"],
        "model.global_batch_size=24 is no multiple of the 16 images of one pass (micro_batch_size 4, devices 4",
    ),
    (
        ["trainer.devices=1", "model.global_batch_size=64", "trainer.accumulate_grad_batches=2"],
        "makes steps of 32 images, but model.global_batch_size=64",
    ),
    (["model.optim.name=sgd", "model.optim.betas=[0.9,0.99]"], "means nothing to model.optim.name=SGD; drop it"),
    (["model.optim.name=sgd", "model.optim.eps=1e-6"], "model.optim.eps=1e-06 means nothing"),
    (["model.linear_start=0.1"], "model.linear_start=0.1 is above model.linear_end=0.012"),
    (["model.optim.sched.name=CosineAnnealing", "trainer.max_steps=-1"], "needs an end: give trainer.max_steps"),
]


@pytest.mark.parametrize(("overrides", "expected"), CONTRADICTIONS, ids=lambda value: str(value)[:50])
def test_contradictions_are_named(overrides, expected):
    with pytest.raises(BadInput) as caught:
        load_config("sd1", overrides)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.unet_config.num_heads=8", "model.unet_config.num_head_channels=-1"],
        ["model.unet_config.use_spatial_transformer=false", "model.unet_config.context_dim=null"],
        ["trainer.devices=2", "model.micro_batch_size=4", "model.global_batch_size=24"],
        ["trainer.devices=-1", "model.global_batch_size=48"],
        ["trainer.accelerator=gpu", "trainer.precision=bf16"],
    ],
)
def test_what_does_not_contradict_passes(overrides):
    load_config("sd1", overrides)
