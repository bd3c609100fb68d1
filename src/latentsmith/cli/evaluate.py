"""`latentsmith evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from latentsmith.files.errors import BadInput
from latentsmith.precision import Dtype

from .convert import Weights
from .generate import option

DEFAULT_OUT = Path("evaluation")
MLPERF = {"metrics": "fid,clip_score", "count": 30_000, "resize": "pytorch-bilinear"}  # MLPerf Training, SD v2
MLPERF_LIMITS = (("fid", "at most", 90.0), ("clip_score", "at least", 0.15))
METRICS_HELP = "Comma-separated: fid, fid_infinity, kid, precision_recall, density_coverage, inception_score, cmmd, "
METRICS_HELP += "clip_score, r_precision, fd_dinov2, adherence. [fid, and clip_score where --clip is given]"


def evaluate(
    source: Annotated[
        str | None, typer.Argument(metavar="SOURCE", help="A checkpoint, a run, or a folder of images.")
    ] = None,
    from_: Annotated[str | None, option("The source, as without the option.", "--from", "-m")] = None,
    reference: Annotated[
        str | None, option("Real images: a folder, a set of shards, or a .npz of statistics.", "--reference")
    ] = None,
    metrics: Annotated[str | None, option(METRICS_HELP)] = None,
    prompts: Annotated[
        Path | None, option("Lines of a file, COCO's captions (.json), a folder of .txt, or a set.", "--prompts")
    ] = None,
    count: Annotated[int | None, option("The first so many prompts or images. [all]", "--count", "-n", min=1)] = None,
    guidance: Annotated[str | None, option("Guidance scales, 1,1.5,3: a folder of images for each. [7.5]")] = None,
    out: Annotated[
        Path, option(f"Folder of results, images and features. [{DEFAULT_OUT}]", "--out", "-o")
    ] = DEFAULT_OUT,
    features: Annotated[
        str,
        option(
            "inception[:FILE], efficientnet-lite0, clip:PATH, dinov2:PATH; with --trust torchscript:FILE or "
            "MODULE:FUNCTION. [inception]"
        ),
    ] = "inception",
    clip: Annotated[str | None, option("CLIP for clip_score, r_precision, cmmd: a file, folder or hub name.")] = None,
    dinov2: Annotated[str | None, option("DINOv2 for fd_dinov2. [facebook/dinov2-large]")] = None,
    resize: Annotated[
        str | None, option("clean, legacy-tensorflow, pytorch-bilinear, center-crop or none. [the extractor's own]")
    ] = None,
    compare: Annotated[str | None, option("Another source, with the same prompts and seeds.", "--compare")] = None,
    training: Annotated[Path | None, option("Training images, to look for memorised ones.", "--training")] = None,
    config: Annotated[Path | None, option("NeMo's sd_fid_images.yaml; options given here go first.")] = None,
    preset: Annotated[str | None, option("mlperf: 30,000 images, FID at most 90 and CLIP score at least 0.15.")] = None,
    trust: Annotated[bool, option("Run code of others as features.", "--trust")] = False,
    resamples: Annotated[int, option("Of the bootstrap behind the intervals. [100]", min=2)] = 100,
    steps: Annotated[int | None, option("Sampling steps. [25]", "--steps", min=1)] = None,
    sampler: Annotated[str | None, option("As of generate.")] = None,
    negative: Annotated[str | None, option("Negative prompt.", "--negative")] = None,
    size: Annotated[str | None, option("WIDTHxHEIGHT of generated images.")] = None,
    seed: Annotated[int | None, option("Image i uses seed + i. [0]", min=0)] = None,
    batch_size: Annotated[int | None, option("Images at a time. [8]", min=1)] = None,
    weights: Annotated[Weights | None, option("The average or the trained weights. [ema]")] = None,
    dtype: Annotated[Dtype | None, option("Of the generating weights. [fp32]")] = None,
    device: Annotated[str | None, option("auto, cuda, mps or cpu. [auto]")] = None,
) -> int:
    """Measure how good images are; generate them first where the source is a model.

    Writes results.json, results.csv and report.html. Run again, it continues: no image and no feature is made twice.

    \b
    Examples:
      latentsmith evaluate images --reference photos
      latentsmith evaluate runs/sd1 --reference coco --prompts captions.json --count 5000 --clip openai/clip-vit-large-patch14
      latentsmith evaluate runs/sd1 --reference coco --prompts coco --guidance 1,1.5,2,3,5,7.5 --out sweep
      latentsmith evaluate runs/new --compare runs/old --reference coco --prompts coco --count 1000
      latentsmith evaluate runs/demo --reference shards --prompts shards --count 200 \\
          --features efficientnet-lite0 --metrics fid,kid,adherence
      torchrun --nproc-per-node 8 -m latentsmith evaluate runs/sd1 --reference coco --prompts coco
    """  # noqa: E501
    sampling: dict[str, Any] = {"num_inference_steps": steps, "sampler": sampler, "negative_prompt": negative}
    sampling |= {"seed": seed, "batch_size": batch_size, "device": device}
    sampling |= {"weights": weights and weights.value, "dtype": dtype and dtype.value}
    if size is not None:
        from .generate import width_and_height

        sampling |= width_and_height(size)
    given = {name: value for name, value in sampling.items() if value is not None}
    nemo: dict[str, Any] = {}
    if config is not None:
        nemo, given = _with_nemo(config, given)
    if preset not in (None, "mlperf"):
        raise BadInput(f"--preset {preset}: there is one, mlperf")
    if preset:
        metrics, count = metrics or str(MLPERF["metrics"]), count or int(str(MLPERF["count"]))
        resize = resize or str(MLPERF["resize"])
    found = source or from_ or nemo.get("source")
    if found is None or (source and from_):
        raise BadInput("--from is missing: a checkpoint, a run or a folder of images" if found is None else
                       f"{source} and --from {from_}: give one source")  # fmt: skip
    count = count or nemo.get("count")
    scales = _scales(guidance) or nemo.get("scales", [])
    named = metrics.split(",") if metrics else ["fid", *(["clip_score"] if clip else [])]
    from latentsmith.evaluation.prompts import read_prompts
    from latentsmith.evaluation.run import Settings
    from latentsmith.evaluation.sweep import run_sweep

    place = prompts or nemo.get("prompts")
    settings = Settings(
        tuple(name.strip() for name in named), features, clip or "", dinov2 or "", resize, count, resamples,
        seed or 0, device, trust
    )  # fmt: skip
    results = run_sweep(
        found,
        reference,
        out,
        settings,
        prompts=None if place is None else read_prompts(place, count),
        scales=scales,
        compare=compare,
        training=training,
        images_folder=nemo.get("images_folder"),
        **given,
    )
    for row in results.rows:
        print(f"{row.folder}: {', '.join(f'{name} {value}' for name, value in row.values.items())}")
    print(f"{out / 'report.html'}: {len(results.rows[0].values)} values, {results.rows[0].found.images:,} images")
    return _mlperf(results.rows[-1].values) if preset else 0


def _mlperf(values: dict[str, Any]) -> int:
    """Print whether MLPerf's rule is met; return 1 where it is not."""
    missed = [
        f"{name} {values[name].value:.4g} is not {word} {limit:g}"
        for name, word, limit in MLPERF_LIMITS
        if (values[name].value > limit if word == "at most" else values[name].value < limit)
    ]
    print("MLPerf's targets are met" if not missed else f"MLPerf's targets are missed: {'; '.join(missed)}")
    return 1 if missed else 0


def _scales(guidance: str | None) -> list[float]:
    if guidance is None:
        return []
    try:
        return [float(scale) for scale in guidance.split(",")]
    except ValueError:
        raise BadInput(f"--guidance {guidance}: give numbers, such as 1,1.5,3") from None


def _with_nemo(config: Path, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return source, prompts, scales, count and folder of images that NeMo's file names, and sampling options."""
    from latentsmith.config.nemo_inference import read_infer

    read = read_infer(config)
    fid = read.pop("fid", None)
    if fid is None:
        raise BadInput(f"{config}: has no section `fid`; it names scales, captions and the folder of images")
    nemo = {
        "source": read.pop("source", None),
        "prompts": fid["coco_captions_path"],
        "scales": fid["classifier_free_guidance"],
        "count": fid.get("num_images_to_eval"),
        "images_folder": Path(fid["save_path"]),
    }
    unused = ("out", "prompts", "count", "guidance_scale")
    return nemo, {name: value for name, value in read.items() if name not in unused} | given
