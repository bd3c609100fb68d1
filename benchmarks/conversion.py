"""Time and memory of converting a full-size Stable Diffusion v1 in every direction.

    python benchmarks/conversion.py WORK_FOLDER

Makes a model of random weights with diffusers' and transformers' own classes, saves it with them, and runs
`latentsmith convert` on it as a user would. Memory is the largest RssAnon of the process: what it holds itself, mapped
files aside. Prints a table; needs 20 GB of disk.
"""

import subprocess
import sys
import time
from pathlib import Path

ROUTES = (
    ("model", "model.safetensors", "ldm"),
    ("model.safetensors", "model.nemo", "nemo"),
    ("model.nemo", "back", "diffusers"),
    ("model", "direct.nemo", "nemo"),
    ("model.nemo", "from-nemo.safetensors", "ldm"),
    ("model.safetensors", "from-ldm", "diffusers"),
    ("model.safetensors", "half.safetensors", "ldm", "--dtype", "fp16"),
)
MAKE = """
import sys, diffusers, transformers
vae = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
           up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4)
text = transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                   num_attention_heads=12, hidden_act="quick_gelu")
diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64).save_pretrained(sys.argv[1] + "/unet")
diffusers.AutoencoderKL(**vae).save_pretrained(sys.argv[1] + "/vae")
transformers.CLIPTextModel(text).save_pretrained(sys.argv[1] + "/text_encoder")
diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                        skip_prk_steps=True).save_pretrained(sys.argv[1] + "/scheduler")
"""


def measured(command: list[str]) -> tuple[float, float]:
    """(seconds, largest RssAnon in MiB) of a command that must succeed."""
    started, peak = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.01)
    if process.wait():
        raise SystemExit(f"failed: {' '.join(command)}")
    return time.monotonic() - started, peak / 1024


def main() -> None:
    work = Path(sys.argv[1])
    if not (work / "model" / "unet").exists():
        subprocess.run([sys.executable, "-c", MAKE, str(work / "model")], check=True)
    _, empty = measured([sys.executable, "-c", "import torch"])
    print(f"a process that only imports torch: {empty:.0f} MiB of anonymous memory")
    print("| from | to | options | seconds | RssAnon |\n|---|---|---|---|---|")
    for source, target, format, *options in ROUTES:
        command = [sys.executable, "-c", "import sys; from latentsmith.cli import main; sys.exit(main())", "convert"]
        seconds, peak = measured([*command, str(work / source), str(work / target), "--to", format, *options])
        print(f"| {source} | {target} | {' '.join(options)} | {seconds:.1f} | {peak:.0f} MiB |", flush=True)


if __name__ == "__main__":
    main()
