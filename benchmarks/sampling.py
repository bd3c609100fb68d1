"""Seconds a image and peak memory against diffusers' StableDiffusionPipeline: same weights, noise, sampler and steps.

    python benchmarks/sampling.py WORK_FOLDER [--size full|small] [--steps N] [--rounds 3] [--json FILE]

full: Stable Diffusion v1 at 256 px, 4 steps. small: a 37M-parameter cut at 256 px, 10 steps, 4 images. Random
weights, saved by diffusers. The peers alternate as processes of their own, in both orders; each loads, samples once
unmeasured, then once measured. latentsmith runs as its command line does, with huge pages asked for; diffusers as its
users run it, and once more with the same. Memory is the process' largest resident set. Images are compared first.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

SIZES = {
    "full": dict(widths=(320, 640, 1280, 1280), vae=(128, 256, 512, 512), pixels=256, steps=4, images=1),
    "small": dict(widths=(64, 128, 256, 256), vae=(32, 64, 128, 128), pixels=256, steps=10, images=4),
}
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
PEERS = {"latentsmith": HUGE_PAGES, "diffusers": {}, "diffusers, huge pages": HUGE_PAGES}
MAKE = """
import json, sys, diffusers, torch, transformers
from latentsmith.text.tokenizer import Tokenizer
size, folder = json.loads(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, hidden_act="quick_gelu"))
Tokenizer.find().save(folder + "-tokenizer")
vae = diffusers.AutoencoderKL(block_out_channels=size["vae"], layers_per_block=2, latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
unet = diffusers.UNet2DConditionModel(block_out_channels=size["widths"], attention_head_dim=8,
    layers_per_block=2, cross_attention_dim=768, sample_size=64)
scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
    clip_sample=False, set_alpha_to_one=False)
diffusers.StableDiffusionPipeline(
    unet=unet, vae=vae, text_encoder=text, tokenizer=transformers.CLIPTokenizer.from_pretrained(folder + "-tokenizer"),
    scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
).save_pretrained(folder)
"""
GENERATE = """
import json, resource, sys, time, numpy as np, torch
peer, size, folder, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
started = time.perf_counter()
prompts = ["a red circle above a small blue square"] * size["images"]
side = size["pixels"] // 8
latents = torch.randn(len(prompts), 4, side, side, generator=torch.Generator().manual_seed(1))
if peer.startswith("diffusers"):
    import diffusers
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    generate = lambda steps: pipeline(prompts, latents=latents, height=size["pixels"], width=size["pixels"],
                                  num_inference_steps=steps, guidance_scale=7.5).images
else:
    from latentsmith import Pipeline
    pipeline = Pipeline.from_pretrained(folder)
    generate = lambda steps: pipeline(prompts, latents=latents, height=size["pixels"], width=size["pixels"],
                                  num_inference_steps=steps, guidance_scale=7.5, sampler="ddim").images
loaded = time.perf_counter() - started
generate(1)
started = time.perf_counter()
images = generate(size["steps"])
seconds = (time.perf_counter() - started) / len(prompts)
np.save(out, np.stack([np.asarray(image) for image in images]))
print(json.dumps({"seconds": seconds, "loading": loaded,
                  "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
"""


def measured(peer: str, size: dict, folder: Path) -> dict:
    """Run one peer in a process of its own; return what it measured."""
    command = [
        sys.executable,
        "-c",
        GENERATE,
        peer,
        json.dumps(size),
        str(folder),
        str(folder.with_suffix(f".{peer}.npy")),
    ]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **PEERS[peer], "HF_HUB_OFFLINE": "1"}
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    import numpy as np

    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    size, folder = dict(SIZES[options.size]), options.work / options.size
    size["steps"] = options.steps or size["steps"]
    if not folder.exists():
        subprocess.run([sys.executable, "-c", MAKE, json.dumps(size), str(folder)], check=True)
    rows: dict[str, list[dict]] = {peer: [] for peer in PEERS}
    for number in range(options.rounds):
        for peer in list(rows)[:: 1 if number % 2 else -1]:
            rows[peer].append(measured(peer, size, folder))
        images = [np.load(folder.with_suffix(f".{peer}.npy")).astype(int) for peer in list(rows)[:2]]
        print(f"round {number + 1}: images differ by {abs(images[0] - images[1]).max()} of 255 at most", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print("| | seconds a image | loading, s | peak memory, GiB |\n|---|---|---|---|")
    for peer, found in rows.items():
        print(f"| {peer} | " + " | ".join(f"{median(one[name] for one in found):.2f}" for name in found[0]) + " |")
    for peer in list(rows)[1:]:
        for name in ("seconds", "loading", "memory"):
            ratios = [theirs[name] / ours[name] for ours, theirs in zip(rows["latentsmith"], rows[peer], strict=True)]
            print(f"{name}: {peer} over latentsmith {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
