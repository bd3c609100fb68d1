"""The dialect of AUTOMATIC1111's web UI: /sdapi/v1/txt2img, img2img and what their clients ask beside them."""

import json
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image, ImageFilter, ImageOps

from latentsmith.diffusion import SAMPLERS
from latentsmith.files.errors import BadInput
from latentsmith.image_request import LONGEST_SIDE
from latentsmith.inference.png import parameters_text

from .jobs import Job
from .masked_region import MaskedRegion, masked_region
from .models import Busy
from .openai_api import json_object
from .service import Service, client_of, decoded_image, encoded, image_bytes

DEFAULTS: dict[str, Any] = {  # of the web UI; whatever else is sent must have the value that asks for nothing
    "prompt": "", "negative_prompt": "", "seed": -1, "subseed": -1, "subseed_strength": 0, "sampler_name": None,
    "sampler_index": None, "scheduler": None, "batch_size": 1, "n_iter": 1, "steps": 50, "cfg_scale": 7.0,
    "width": 512, "height": 512, "denoising_strength": 0.75, "eta": None, "init_images": None, "mask": None,
    "mask_blur": 4, "mask_blur_x": None, "mask_blur_y": None, "inpainting_mask_invert": 0, "inpaint_full_res": True,
    "inpaint_full_res_padding": 0, "override_settings": None,
    "send_images": True,
}  # fmt: skip
# Fields and the values that ask for nothing; None stands for any value.
WITHOUT_EFFECT: dict[str, tuple[Any, ...] | None] = {
    "styles": ([],), "seed_resize_from_h": (0, -1), "seed_resize_from_w": (0, -1), "restore_faces": (False,),
    "tiling": (False,), "do_not_save_samples": None, "do_not_save_grid": None, "s_churn": (0,), "s_tmax": None,
    "s_tmin": (0,), "s_noise": (1,), "override_settings_restore_afterwards": None, "script_name": ("",),
    "script_args": ([],), "save_images": (False,), "alwayson_scripts": ({},), "enable_hr": (False,), "hr_scale": None,
    "hr_upscaler": None, "hr_second_pass_steps": None, "hr_resize_x": None, "hr_resize_y": None,
    "hr_checkpoint_name": None, "hr_sampler_name": None, "hr_scheduler": None, "hr_prompt": None,
    "hr_negative_prompt": None, "firstphase_width": (0,), "firstphase_height": (0,), "refiner_checkpoint": ("",),
    "refiner_switch_at": None, "disable_extra_networks": None, "comments": ({},), "include_init_images": None,
    "resize_mode": (0, 1), "inpainting_fill": (1, 0), "image_cfg_scale": None,
    "initial_noise_multiplier": (1, 1.0), "latent_mask": (), "force_task_id": None,
    "infotext": (),
}  # fmt: skip
NONE_OFFERED = (
    "sd-vae", "loras", "upscalers", "latent-upscale-modes", "hypernetworks", "face-restorers", "realesrgan-models",
    "prompt-styles",
)  # fmt: skip
SCHEDULES = {"automatic": "", "uniform": "", "normal": "", "simple": "", "karras": " Karras"}


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/sdapi/v1")
    current: dict[str, Any] = {"model": service.shelf.default, "job": None}

    async def run(request: Request, *, from_image: bool) -> dict[str, Any]:
        given = read_fields(await json_object(request))
        model = (given["override_settings"] or {}).get("sd_model_checkpoint") or current["model"]
        options = options_of(given)
        region = None
        if from_image:
            started, region = start_images(given)
            options |= started
        job = service.job(
            model, given["prompt"], given["negative_prompt"], options, client=client_of(request), wants_previews=True
        )
        current["job"] = job
        job = await service.finish(job, request)
        return answer(job, given, region)

    @router.post("/txt2img")
    async def txt2img(request: Request) -> dict[str, Any]:
        return await run(request, from_image=False)

    @router.post("/img2img")
    async def img2img(request: Request) -> dict[str, Any]:
        return await run(request, from_image=True)

    @router.get("/samplers")
    def samplers() -> list[dict[str, Any]]:
        return [
            {"name": each.title, "aliases": [name, *each.aliases], "options": {}} for name, each in SAMPLERS.items()
        ]

    @router.get("/schedulers")
    def schedulers() -> list[dict[str, Any]]:
        return [{"name": name, "label": name.title(), "aliases": None} for name in ("automatic", "uniform", "karras")]

    @router.get("/sd-models")
    def models() -> list[dict[str, Any]]:
        return [{"title": name, "model_name": name, "filename": name, "hash": None} for name in service.shelf.names]

    @router.get("/options")
    def options() -> dict[str, Any]:
        return {"sd_model_checkpoint": current["model"], "sd_vae": "Automatic", "samples_format": "png"}

    @router.post("/options")
    async def set_options(request: Request) -> None:
        given = await json_object(request)
        if other := [name for name in given if name not in ("sd_model_checkpoint", "sd_vae", "samples_format")]:
            raise BadInput(f"option {other[0][:60]!r} is not offered; sd_model_checkpoint is")
        name = given.get("sd_model_checkpoint", current["model"])
        service.shelf.check(name)
        if name != current["model"] and service.runner.running:
            raise Busy("images are being made; switch the model when they are done")
        current["model"] = name

    @router.get("/progress")
    def progress() -> dict[str, Any]:
        return progress_of(current["job"])

    @router.post("/interrupt")
    @router.post("/skip")
    def interrupt() -> dict[str, Any]:
        if current["job"] is not None:
            current["job"].cancel()
        return {}

    @router.post("/png-info")
    async def png_info(request: Request) -> dict[str, Any]:
        image = decoded_image((await json_object(request)).get("image"), "image")
        text = image.info.get("parameters")
        return {"info": text if isinstance(text, str) else "", "items": {}, "parameters": {}}

    @router.get("/memory")
    def memory() -> dict[str, Any]:
        loaded = {name: each.bytes for name, each in service.shelf.loaded.items()}
        return {"ram": {"used": sum(loaded.values()), "models": loaded}, "cuda": {}}

    @router.get("/cmd-flags")
    def flags() -> dict[str, Any]:
        return {"api": True, "device": service.shelf.device, "precision": service.shelf.dtype}

    for name in NONE_OFFERED:
        router.add_api_route(f"/{name}", none_of_them, methods=["GET"])

    @router.get("/embeddings")
    def embeddings() -> dict[str, Any]:
        return {"loaded": {}, "skipped": {}}

    @router.get("/scripts")
    def scripts() -> dict[str, Any]:
        return {"txt2img": [], "img2img": []}

    @router.post("/refresh-checkpoints")
    def refresh() -> None:
        return None

    return router


def none_of_them() -> list[Any]:
    return []


def progress_of(job: Job | None) -> dict[str, Any]:
    """Return how far a job is, in the web UI's words."""
    state: dict[str, Any] = {"skipped": False, "interrupted": False, "job": "", "job_count": 0}
    state |= {"sampling_step": 0, "sampling_steps": 0}
    if job is None or job.is_over:
        return {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}
    state |= {"interrupted": job.cancelled, "job": job.id, "job_count": 1}
    state |= {"sampling_step": job.steps_done, "sampling_steps": job.steps}
    preview = job.preview
    return {
        "progress": job.steps_done / job.steps if job.steps else 0.0,
        "eta_relative": job.seconds_left or 0.0,
        "state": state,
        "current_image": None if preview is None else encoded(image_bytes(preview, {}, "jpeg")),
        "textinfo": None,
    }


def read_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with the web UI's defaults. Raises BadInput for one that asks for what is not offered."""
    for name, value in given.items():
        if name in DEFAULTS or value is None:
            continue
        if name not in WITHOUT_EFFECT:
            raise BadInput(f"{name[:60]!r} is not a field that this server knows")
        allowed = WITHOUT_EFFECT[name]
        if allowed is not None and value not in allowed:
            raise BadInput(f"{name} is not offered; leave it out")
    fields = {name: given.get(name) if given.get(name) is not None else default for name, default in DEFAULTS.items()}
    if other := [name for name in fields["override_settings"] or {} if name != "sd_model_checkpoint"]:
        raise BadInput(f"override_settings: {str(other[0])[:60]!r} is not offered; sd_model_checkpoint is")
    return fields


def options_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return keywords of Pipeline.stream for the web UI's fields."""
    counts = [given["batch_size"], given["n_iter"]]
    if not all(type(each) is int and 1 <= each <= 1000 for each in counts):
        raise BadInput("batch_size and n_iter must be whole numbers, at least 1")
    title = str(given["sampler_name"] or given["sampler_index"] or "DPM++ 2M")
    schedule = str(given["scheduler"] or "automatic").lower()
    if schedule not in SCHEDULES:
        raise BadInput(f"scheduler {schedule[:40]!r} is not one of {', '.join(SCHEDULES)}")
    varied = given["subseed_strength"] or 0
    return {
        "sampler": sampler_of(title) + SCHEDULES[schedule],
        "num_images_per_prompt": counts[0] * counts[1],
        "seed": given["seed"],
        "variation_seed": max(0, given["subseed"]) if varied and isinstance(given["subseed"], int) else None,
        "variation_strength": varied or None,
        "num_inference_steps": given["steps"],
        "guidance_scale": given["cfg_scale"],
        "width": given["width"],
        "height": given["height"],
        "prompt_syntax": "webui",
    }


def sampler_of(title: str) -> str:
    """Return a sampler's name for its title in web UIs; other names go on as they are."""
    karras = " Karras" if title.lower().endswith(" karras") else ""
    plain = title[: len(title) - len(karras)]
    return next((name for name, each in SAMPLERS.items() if each.title.lower() == plain.lower()), plain) + karras


def start_images(given: Mapping[str, Any]) -> tuple[dict[str, Any], MaskedRegion | None]:
    """Return the image to start from, its mask and the strength, and the region that they are of. Raises BadInput."""
    listed = given["init_images"]
    if not isinstance(listed, list) or len(listed) != 1:
        raise BadInput("init_images must hold one image in base64")
    image = decoded_image(listed[0], "init_images[0]")
    strength = {"strength": given["denoising_strength"]}
    if given["mask"] is None:
        return {"image": image, **strength}, None
    mask = web_ui_mask(decoded_image(given["mask"], "mask"), image, given)
    if not given["inpaint_full_res"]:
        return {"image": image, "mask_image": mask, **strength}, None
    size, padding = (given["width"], given["height"]), given["inpaint_full_res_padding"]
    if not all(type(each) is int and 0 < each <= LONGEST_SIDE for each in (*size, padding + 1)):
        raise BadInput(f"width, height and inpaint_full_res_padding must be whole numbers, at most {LONGEST_SIDE}")
    region = masked_region(image, mask, padding, size)
    cropped, mask = region.cropped(size)
    return {"image": cropped, "mask_image": mask, **strength}, region


def web_ui_mask(mask: Image.Image, image: Image.Image, given: Mapping[str, Any]) -> Image.Image:
    """Return the mask with the web UI's blur and inversion, resized to its image as there."""
    plain = mask.convert("L")
    plain = plain if plain.size == image.size else plain.resize(image.size)
    plain = ImageOps.invert(plain) if given["inpainting_mask_invert"] else plain
    blur = given["mask_blur"]
    if not isinstance(blur, int | float) or not 0 <= blur <= 64:
        raise BadInput("mask_blur must be a number between 0 and 64")
    return plain.filter(ImageFilter.GaussianBlur(blur)) if blur else plain


def answer(job: Job, given: Mapping[str, Any], region: MaskedRegion | None) -> dict[str, Any]:
    files, texts = [], []
    for image, metadata in zip(job.images, job.metadata, strict=True):
        if image is None:  # interrupted: those that are done are answered
            continue
        files.append(encoded(image_bytes(region.paste(image) if region else image, metadata)))
        texts.append(parameters_text(metadata, image.size) or "")
    seeds = [request.seed for request in job.requests]
    info = {
        **{name: given[name] for name in ("prompt", "negative_prompt", "steps", "cfg_scale")},
        "all_prompts": [given["prompt"]] * len(seeds),
        "seed": seeds[0],
        "all_seeds": seeds,
        "infotexts": texts,
        "width": job.options.width,
        "height": job.options.height,
        "sampler_name": job.options.sampler,
        "sd_model_name": job.model,
        "index_of_first_image": 0,
    }
    shown = {name: value for name, value in given.items() if name not in ("init_images", "mask")}
    return {"images": files if given["send_images"] else [], "parameters": shown, "info": json.dumps(info)}
