"""Options of NeMo's inference files (`sd_infer.yaml`, `sd_fid_images.yaml`), which `latentsmith generate` reads."""

from .schema import Option, group, no_effect, used
from .value_types import anything, either, flag, list_of, nullable, number, text, whole

TORCHRUN = "torchrun or srun shares the pictures"


def given(key: str, kind, meaning: str) -> Option:
    """An option of drawing: it is there only if a file says it, and then `generate` reads it."""
    return used(key, kind, None, meaning, optional=True)


INFER = group(
    "infer",
    given("unconditional_guidance_scale", number(), "generate --guidance-scale"),
    given("num_images_per_prompt", whole(1), "generate --count"),
    given("batch_size", whole(1), "generate --batch-size"),
    given("height", whole(1), "generate --height"),
    given("width", whole(1), "generate --width"),
    given("inference_steps", whole(1, 1000), "generate --steps"),
    given("sampler_type", text(), "generate --sampler"),
    given("eta", number(0, 1), "generate --eta"),
    given("out_path", text(), "generate --out"),
    given("seed", whole(0), "generate --seed"),
    given("prompts", either(text(), list_of(text())), "what to draw, where the command line says nothing"),
    given("sampler_parallelism", whole(1), "generate --parallelism"),
    given("sampler_tolerance", number(0), "generate --tolerance"),
    no_effect("down_factor", whole(1), 8, "pixels of a latent", "the VAE's own factor holds"),
    no_effect("output_type", text(), "pil", "pictures or arrays", "generate writes PNGs; `Pipeline` returns arrays"),
    no_effect("save_to_file", flag(), True, "write files", "generate always does"),
    no_effect("devices", anything(), 1, "processes of PARA_DDIM", TORCHRUN),
)

FID = group(
    "fid",
    given(
        "classifier_free_guidance",
        either(number(), list_of(number(), least=1)),
        "guidance scales, a folder of pictures for each; in a SLURM array its index takes one of them",
    ),
    given("coco_captions_path", text(), "folder of text files, in the order of their names; a picture for each line"),
    given("num_images_to_eval", whole(1), "pictures of each scale: the first so many lines; fewer is an error"),
    given("save_path", text(), "where <scale>/imageNNNNNN.png go"),
    no_effect("coco_images_path", nullable(text()), None, "real pictures", "drawing does not read them"),
    no_effect("nnodes_per_cfg", whole(1), 1, "machines of one scale", TORCHRUN),
    no_effect("ntasks_per_node", whole(1), 8, "processes of a machine", TORCHRUN),
    no_effect("local_task_id", anything(), None, "which of them this is", TORCHRUN),
)

DRAWN_WITH = group(
    "model",
    given("restore_from_path", text(), "in an inference file generate --from, in a training model.ckpt_path"),
    no_effect("hparams_file", nullable(text()), None, "config of a .ckpt", "a checkpoint is read by its keys"),
)

OPTIONS = [*INFER, *FID, *DRAWN_WITH]
