"""Training on CUDA devices: images a second, memory and share of the device's peak (MFU), beside published figures.

    python benchmarks/gpu.py [--peak-tflops 989] [--batches 8,32] [--steps 20] [--json FILE]

Each row is a process: Stable Diffusion v1's U-Net at 512 px on random cached latents, bfloat16, fused AdamW, averages
off, through the trainer of `latentsmith train`. --peak-tflops: the device's dense bfloat16 peak (H100 SXM 989, A100
312). Without a CUDA device it says "not measured", and prints the published figures alone.
"""

import argparse
import json
from pathlib import Path

from switches import measured

PUBLISHED = (
    ("NeMo, one A100-80GB, ControlNet: baseline; all switches; batch 32", "11.7; 21.5; 27.2"),
    ("MosaicML, SD2-base at 512 px, 8 A100, latents precomputed", "290 (36 a device)"),
    ("MLPerf 4.1, NeMo, H100, 512 px", "137 a device"),
)
ROWS = {
    "plain": ["model.unet_config.use_flash_attention=False"],
    "flash attention": [],
    "channels last": ["model.channels_last=True"],
    "compiled blocks": ["model.channels_last=True", "model.inductor=True"],
}
CUDA = ["trainer.accelerator=gpu", "trainer.precision=bf16"]


def flops_of_a_sample(latents: int) -> int:
    """Of forward and backward, counted on the meta device."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from latentsmith import UNetModel

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unet = UNetModel(num_heads=8, context_dim=768)
        out = unet(torch.empty(1, 4, latents, latents), torch.empty(1), torch.empty(1, 77, 768))
        out.sum().backward()
    return counter.get_total_flops()


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--batches", default="8,32")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--latents", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    flops, rows = flops_of_a_sample(options.latents), []
    print(f"{flops / 1e12:.2f} TFLOP a sample, forward and backward, {options.latents} x {options.latents} latents")
    print("| | batch | images/s | memory, GiB | MFU |\n|---|---|---|---|---|")
    for batch in map(int, options.batches.split(",")):
        for name, changes in ROWS.items():
            if not torch.cuda.is_available():
                print(f"| {name} | {batch} | not measured | not measured | not measured |")
                continue
            found = measured(options.latents, batch, options.steps, [*CUDA, *changes])
            rate = batch / found["step"]
            share = rate * flops / options.peak_tflops / 1e12
            rows.append({"row": name, "batch": batch, "images_per_second": rate, "mfu": share, **found})
            print(f"| {name} | {batch} | {rate:.1f} | {found['device_peak']:.1f} | {share:.0%} |", flush=True)
    for name, rate in PUBLISHED:
        print(f"| published: {name} | | {rate} | | |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
