"""What the other scripts do not measure: the machine itself, the VAE, checkpointing, start-up, curves, two processes.

    python benchmarks/machine.py WORK_FOLDER [--rows ceiling,vae,...] [--json FILE]

ceiling        float32 matrix products and 3x3 convolutions (GFLOP/s) and copying (GB/s), as PyTorch makes them here
vae            Stable Diffusion's VAE at 256 px and diffusers', in turns, same weights; 1024 px whole and in tiles
checkpointing  forward and backward of the full U-Net at 512 px, activations recomputed, a process each
startup        `--help`, the import, loading a small pipeline and one image, a first step beside a bare Lightning fit
ldm            forward and backward of the full U-Net, 32 x 32 latents, and of the one that LDM published, where
               `pip install --no-deps --target WORK_FOLDER/ldm stable-diffusion-sdkit einops` installed it
compile        first step of a small U-Net: its blocks, the same from the cache, diffusers' whole one (10 minutes)
curves         a step against batch, latents and width, plotted log-log as WORK_FOLDER/curves.svg
ranks          samples a second of one process with two threads, and of two with one each
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

SMALL = dict(model_channels=64, channel_mult=[1, 2, 4, 4], num_heads=8, context_dim=768)
DIFFUSERS_SMALL = dict(block_out_channels=[64, 128, 256, 256], attention_head_dim=8, cross_attention_dim=768)
ROWS = ("ceiling", "vae", "checkpointing", "ldm", "startup", "compile", "curves", "ranks")


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turns(peers: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each peer, after one round that warms up."""
    found: dict[str, list[float]] = {name: [] for name in peers}
    for number in range(rounds + 1):
        for name in list(peers)[:: 1 if number % 2 else -1]:
            spent = seconds(peers[name])
            if number:
                found[name].append(spent)
    return {name: median(spans) for name, spans in found.items()}


def child(code: str, *arguments: str, **environment: str) -> dict:
    """Run code in a process of its own; return the JSON it prints last, with its seconds and largest memory (GiB)."""
    tail = "\npeak = int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 2**20"
    tail += "\nprint(json.dumps(result | {'peak': peak}))"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", "import json, sys, time\n" + code + tail, *arguments],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1]) | {"whole": time.perf_counter() - start}


def ceiling(work: Path) -> dict:
    import torch
    import torch.nn.functional as F

    a, b, out = (torch.randn(2048, 2048) for _ in range(3))
    image, weight = torch.randn(1, 320, 64, 64), torch.randn(320, 320, 3, 3)
    source, target = torch.ones(100_000_000), torch.zeros(100_000_000)
    found = in_turns(
        {
            "product": lambda: torch.mm(a, b, out=out),
            "convolution": lambda: F.conv2d(image, weight, padding=1),
            "copy": lambda: target.copy_(source),
        },
        9,
    )
    flops = {"product": 2 * 2048**3, "convolution": 2 * 9 * 320 * 320 * 64 * 64}
    return {f"{name}, GFLOP/s": flops[name] / found[name] / 1e9 for name in flops} | {
        "copy, read and written, GB/s": 0.8 / found["copy"]
    }


VAE = """
import torch
from functools import partial
peer, folder, pixels, tiling = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "True"
torch.set_grad_enabled(False)
if peer == "latentsmith":
    from latentsmith.cpu.allocator import ask_for_huge_pages
    ask_for_huge_pages()
    from latentsmith import Pipeline
    pipeline = Pipeline.from_pretrained(folder)
    encode, decode = pipeline.vae.encode, pipeline.vae.decode
    if tiling: encode, decode = (partial(run, tiling=True) for run in (pipeline.encode, pipeline.decode))
else:
    import diffusers
    vae = diffusers.AutoencoderKL.from_pretrained(folder + "/vae")
    if tiling: vae.enable_tiling()
    encode, decode = (lambda x: vae.encode(x).latent_dist.parameters), (lambda z: vae.decode(z).sample)
generator = torch.Generator().manual_seed(0)
images = torch.rand(1, 3, pixels, pixels, generator=generator) * 2 - 1
latents = torch.randn(1, 4, pixels // 8, pixels // 8, generator=generator)
result = {}
for name, run, tensor in (("encode", encode, images), ("decode", decode, latents)):
    spans = []
    for _ in range(int(sys.argv[5])):
        start = time.perf_counter()
        out = run(tensor)
        spans.append(time.perf_counter() - start)
    result[name] = sorted(spans)[len(spans) // 2]
    result[name + " norm"] = float(out.double().norm())
    result[name + " sum"] = float(out.double().abs().sum())
"""


def vae(work: Path) -> dict:
    """Needs the folder that `sampling.py --size full` makes."""
    runs: dict[str, list[dict]] = {"latentsmith": [], "diffusers": []}
    for number in range(4):
        for peer in list(runs)[:: 1 if number % 2 else -1]:
            runs[peer].append(child(VAE, peer, str(work / "full"), "256", "False", "5"))
    ours, theirs = runs["latentsmith"], runs["diffusers"]
    for name in ("encode norm", "decode norm", "decode sum"):
        assert math.isclose(ours[0][name], theirs[0][name], rel_tol=1e-4), (name, ours[0], theirs[0])
    result = {
        f"{name}, s": {peer: median(one[name] for one in runs[peer]) for peer in runs} for name in ("encode", "decode")
    }
    for name in ("encode", "decode"):
        result[f"{name}, ratio"] = median(b[name] / a[name] for a, b in zip(ours, theirs, strict=True))
    for peer in runs:
        for tiling in ("False", "True"):
            large = child(VAE, peer, str(work / "full"), "1024", tiling, "1")
            result[f"1024 px, {peer}, tiled {tiling}"] = {name: large[name] for name in ("encode", "decode", "peak")}
    return result


CHECKPOINTING = """
import torch, torch.nn.functional as F
peer, folder, latents = sys.argv[1], sys.argv[2], int(sys.argv[3])
if peer != "diffusers":
    from latentsmith.cpu.allocator import ask_for_huge_pages, keep_freed_memory
    ask_for_huge_pages()
    keep_freed_memory()
if peer == "latentsmith":
    from latentsmith import UNetModel
    from latentsmith.checkpoints.load import load_component
    from latentsmith.cpu import optimize_for_cpu
    unet = UNetModel(num_heads=8, context_dim=768, use_checkpoint=True)
    load_component(unet, folder, "unet")
    optimize_for_cpu(unet)
    predict = unet
else:
    import diffusers
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder)
    unet.enable_gradient_checkpointing()
    predict = lambda *inputs: unet(*inputs).sample
unet.train()
generator = torch.Generator().manual_seed(0)
x, noise = (torch.randn(1, 4, latents, latents, generator=generator) for _ in range(2))
text, spans = torch.randn(1, 77, 768, generator=generator), []
for _ in range(3):
    start = time.perf_counter()
    loss = F.mse_loss(predict(x, torch.tensor([500]), text), noise)
    loss.backward()
    spans.append(time.perf_counter() - start)
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in unet.parameters()]))
    result = {"step": min(spans), "loss": loss.item(), "norm": norm}
    unet.zero_grad()
"""


def checkpointing(work: Path) -> dict:
    """Needs the folder that `training.py --size full` makes."""
    peers = ("latentsmith", "diffusers", "diffusers, tuned", "latentsmith")
    runs = [(peer, child(CHECKPOINTING, peer, str(work / "unet-full"), "64")) for peer in peers]
    assert math.isclose(runs[0][1]["loss"], runs[1][1]["loss"], rel_tol=1e-4), runs
    return {peer: found for peer, found in runs}


LDM = """
import torch, torch.nn.functional as F
peer, folder = sys.argv[1:3]
if peer != "ldm":
    from latentsmith.cpu.allocator import ask_for_huge_pages, keep_freed_memory
    ask_for_huge_pages()
    keep_freed_memory()
if peer == "latentsmith":
    from latentsmith import UNetModel
    from latentsmith.cpu import optimize_for_cpu
    unet = UNetModel(num_heads=8, context_dim=768)
    optimize_for_cpu(unet)
else:
    sys.path[:0] = [folder]
    from ldm.modules.diffusionmodules.openaimodel import UNetModel
    unet = UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=320, attention_resolutions=[4, 2, 1],
        num_res_blocks=2, channel_mult=[1, 2, 4, 4], num_heads=8, use_spatial_transformer=True, context_dim=768,
        use_checkpoint=False, legacy=False,
    )
generator = torch.Generator().manual_seed(0)
with torch.no_grad():
    for name, parameter in sorted(unet.named_parameters()):
        if parameter.dim() > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(float(name.endswith("weight")))  # norms' scales at 1, biases at 0
x, noise = (torch.randn(1, 4, 32, 32, generator=generator) for _ in range(2))
text, spans = torch.randn(1, 77, 768, generator=generator), []
for _ in range(5):
    start = time.perf_counter()
    loss = F.mse_loss(unet(x, torch.tensor([500]), text), noise)
    loss.backward()
    spans.append(time.perf_counter() - start)
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in unet.parameters()]))
    result = {"step": sorted(spans[1:] or spans)[len(spans) // 2 - 1], "loss": loss.item(), "norm": norm}
    unet.zero_grad()
"""


def ldm(work: Path) -> dict:
    peers = ("latentsmith", "ldm", "ldm, tuned", "ldm, tuned", "ldm", "latentsmith")
    runs = [(peer, child(LDM, peer, str(work / "ldm"))) for peer in peers]
    for name in ("loss", "norm"):
        assert all(math.isclose(found[name], runs[0][1][name], rel_tol=1e-4) for _, found in runs), runs
    steps = {peer: [found["step"] for one, found in runs if one == peer] for peer in peers}
    return {peer: {"steps": steps[peer], "peak": max(f["peak"] for one, f in runs if one == peer)} for peer in steps}


GENERATE = """
start = time.perf_counter()
if sys.argv[1] == "latentsmith":
    from latentsmith import Pipeline
    Pipeline.from_pretrained(sys.argv[2])("a red circle", height=64, width=64, num_inference_steps=1)
else:
    import diffusers
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(sys.argv[2], safety_checker=None)
    pipeline("a red circle", height=64, width=64, num_inference_steps=1)
result = {"generated": time.perf_counter() - start}
"""
BARE_FIT = """
import torch, lightning as L
class One(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
    def training_step(self, batch, number): return self.layer(batch).mean()
    def configure_optimizers(self): return torch.optim.AdamW(self.parameters())
loader = torch.utils.data.DataLoader(torch.randn(8, 4), 4)
options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
L.Trainer(max_steps=1, **options).fit(One(), loader)
result = {}
"""
LATENTSMITH = str(Path(sys.executable).with_name("latentsmith"))


def startup(work: Path) -> dict:
    """Needs the folder that `sampling.py --size small` makes."""
    rows: dict[str, list[float]] = {}

    def note(name: str, spent: float) -> None:
        rows.setdefault(name, []).append(spent)

    options = [
        "train",
        "--config",
        "demo",
        "model.data.train.dataset_path=null",
        "model.data.synthetic_data=True",
    ]
    for number in range(4):
        found = {
            "--help": seconds(lambda: subprocess.run([LATENTSMITH, "--help"], capture_output=True)),
            "import torch": child("result = {}\nimport torch")["whole"],
            "import latentsmith and torch": child("result = {}\nimport torch, latentsmith")["whole"],
            "generates, latentsmith": child(GENERATE, "latentsmith", str(work / "small"))["generated"],
            "generates, diffusers": child(GENERATE, "diffusers", str(work / "small"))["generated"],
            "bare Lightning fit": child(BARE_FIT)["whole"],
        }
        folder = work / "first-step"
        command = [LATENTSMITH, *options, "trainer.max_steps=1", f"exp_manager.exp_dir={folder}",
                   f"exp_manager.name=run{number}-{os.getpid()}"]  # fmt: skip
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        found["one step of the demo's U-Net, saved"] = time.perf_counter() - start
        for name, spent in found.items():
            if number:
                note(name, spent)
    return {name: median(spans) for name, spans in rows.items()}


COMPILE = """
import torch
from latentsmith.cpu.allocator import ask_for_huge_pages, keep_freed_memory
ask_for_huge_pages()
keep_freed_memory()
torch.manual_seed(0)
if sys.argv[1] == "latentsmith":
    from latentsmith import UNetModel
    from latentsmith.cpu import optimize_for_cpu
    unet = UNetModel(**json.loads(sys.argv[2]))
    optimize_for_cpu(unet)
    unet.compile_blocks()
    predict = unet
else:
    import diffusers
    unet = diffusers.UNet2DConditionModel(**json.loads(sys.argv[2]))
    unet.compile()
    predict = lambda *inputs: unet(*inputs).sample
spans = []
for _ in range(4):
    start = time.perf_counter()
    predict(torch.randn(8, 4, 32, 32), torch.arange(8), torch.randn(8, 77, 768)).square().mean().backward()
    unet.zero_grad()
    spans.append(time.perf_counter() - start)
result = {"first": spans[0], "later": min(spans[1:])}
"""


def compile(work: Path) -> dict:
    result = {}
    for name, peer, sizes, cache in (
        ("blocks", "latentsmith", SMALL, "ours"),
        ("blocks, from the cache", "latentsmith", SMALL, "ours"),
        ("diffusers, whole", "diffusers", DIFFUSERS_SMALL, "theirs"),
    ):
        folder = str(work / f"inductor-{cache}-{os.getpid()}")
        result[name] = child(COMPILE, peer, json.dumps(sizes), TORCHINDUCTOR_CACHE_DIR=folder)
        print(name, result[name], flush=True)
    return result


CURVE = """
import torch
from latentsmith.cpu.allocator import ask_for_huge_pages, keep_freed_memory
ask_for_huge_pages()
keep_freed_memory()
from latentsmith import UNetModel
from latentsmith.cpu import optimize_for_cpu
width, latents, batch = map(int, sys.argv[1:4])
unet, spans = UNetModel(model_channels=width, num_heads=8, context_dim=768), []
optimize_for_cpu(unet)
for _ in range(4):
    start = time.perf_counter()
    x, text = torch.randn(batch, 4, latents, latents), torch.randn(batch, 77, 768)
    unet(x, torch.arange(batch), text).square().mean().backward()
    unet.zero_grad()
    spans.append(time.perf_counter() - start)
result = {"step": sorted(spans[1:])[1]}
"""
CURVES = {
    "batch (64 wide, 16 x 16)": [(64, 16, batch) for batch in (1, 2, 4, 8, 16)],
    "latents (64 wide, batch 1)": [(64, side, 1) for side in (8, 16, 32, 64)],
    "width (16 x 16, batch 1)": [(width, 16, 1) for width in (32, 64, 128, 256)],
}


def curves(work: Path) -> dict:
    result = {}
    for number, (name, points) in enumerate(CURVES.items()):
        axis = (2, 1, 0)[number]
        result[name] = [(point[axis], child(CURVE, *map(str, point))) for point in points]
        print(name, [(at, round(found["step"], 3)) for at, found in result[name]], flush=True)
    (work / "curves.svg").write_text(
        log_log({name: [(at, f["step"]) for at, f in row] for name, row in result.items()})
    )
    return result


def log_log(lines: dict[str, list[tuple[float, float]]]) -> str:
    """An SVG of lines in decades: seconds of a step against what grows, both axes from the smallest value."""
    colours, left, bottom, unit = ("#0072b2", "#d55e00", "#009e73"), 60, 320, 110
    low_x, low_y = 0.0, math.floor(math.log10(min(y for line in lines.values() for _, y in line)))
    size = 'width="640" height="380"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">']
    parts.append(f'<rect {size} fill="white"/>')

    def at(x: float, y: float) -> tuple[float, float]:
        return left + unit * 2 * (math.log10(x) - low_x), bottom - unit * (math.log10(y) - low_y)

    for decade in range(3):
        y = 10.0 ** (low_y + decade)
        parts.append(
            f'<path d="M{left} {at(1, y)[1]}H620" stroke="#ddd"/><text x="8" y="{at(1, y)[1] + 4}">{y:g} s</text>'
        )
    for x in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        parts.append(f'<path d="M{at(x, 1)[0]} 20V{bottom}" stroke="#eee"/>')
        parts.append(f'<text x="{at(x, 1)[0]}" y="{bottom + 18}" text-anchor="middle">{x}</text>')
    for number, (name, line) in enumerate(lines.items()):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colours[number]}" stroke-width="2"/>')
        parts.append(f'<text x="{left + 200 * number}" y="365" fill="{colours[number]}">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def ranks(work: Path) -> dict:
    from latentsmith.training.metrics_log import read_rows

    result = {}
    for devices, threads in ((1, 2), (1, 1), (2, 1)):
        name, folder = f"{devices} x {threads} threads", work / "ranks"
        options = ["train", "--config", "demo", "model.data.train.dataset_path=null", "trainer.accelerator=cpu",
                   "model.data.synthetic_data=True", "trainer.max_steps=40", f"trainer.devices={devices}",
                   "model.global_batch_size=32", f"model.micro_batch_size={32 // devices}",
                   f"exp_manager.exp_dir={folder}", f"exp_manager.name={devices}-{threads}-{os.getpid()}"]  # fmt: skip
        done = subprocess.run([LATENTSMITH, *options], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": str(threads)})  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        (metrics,) = folder.rglob(f"{devices}-{threads}-{os.getpid()}/**/metrics.csv")
        result[name] = read_rows(metrics)[-1]["samples_per_second"]
    return result | {"efficiency": result["2 x 1 threads"] / 2 / result["1 x 1 threads"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    result = {}
    for row in options.rows.split(","):
        result[row] = globals()[row](options.work)
        print(row, json.dumps(result[row], indent=1), flush=True)
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
