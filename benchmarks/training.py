"""Seconds of an optimizer step and peak memory against diffusers: same weights, same batches, same loss.

    python benchmarks/training.py WORK_FOLDER [--size full|small] [--rounds 2] [--steps 4] [--json FILE]

A step is forward, backward, clipping to norm 1, AdamW and averages (EMA). full: Stable Diffusion v1's U-Net, 32 x 32
latents, batch 1. small: a cut of 37 million parameters (channels 64, 128, 256, 256, 8 heads), batch 8. Peers:

latentsmith        through the trainer of `latentsmith train`, with the command line's settings of the allocator
diffusers          the loop of its train_text_to_image.py: torch's AdamW and EMAModel as they come
diffusers, tuned   the same U-Net with our optimizer (fused), averages and allocator, so that the model's part shows

Each is a process of its own; they take turns, in both orders. Losses are compared before anything is believed.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

SIZES = {
    "full": dict(widths=[320, 640, 1280, 1280], batch=1),
    "small": dict(widths=[64, 128, 256, 256], batch=8),
}
PEERS = ("latentsmith", "diffusers", "diffusers, tuned")
LATENTS, TEXT = 32, (77, 768)


def make_weights(folder: Path, widths: list[int]) -> None:
    """Random weights whose last layers are not zero, as diffusers saves them."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    UNet2DConditionModel(
        block_out_channels=widths, attention_head_dim=8, layers_per_block=2, cross_attention_dim=768, sample_size=64
    ).save_pretrained(folder)


def batches(batch: int):
    """The batch of every step: noisy latents, the noise in them, and the text."""
    import torch

    from latentsmith.diffusion import NoiseSchedule

    schedule = NoiseSchedule.from_config()
    step = 0
    while True:
        generator = torch.Generator().manual_seed(step)
        latents, noise = (torch.randn(batch, 4, LATENTS, LATENTS, generator=generator) for _ in range(2))
        timesteps = torch.randint(1000, (batch,), generator=generator)
        context = torch.randn(batch, *TEXT, generator=generator)
        yield latents, noise, timesteps, context, schedule
        step += 1


def with_diffusers(folder: Path, batch: int, steps: int, tuned: bool) -> list[tuple[float, float]]:
    import torch
    import torch.nn.functional as F
    from diffusers import UNet2DConditionModel
    from diffusers.training_utils import EMAModel

    from latentsmith.training.ema import Ema

    unet = UNet2DConditionModel.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, weight_decay=1e-2, fused=tuned or None)
    averages = Ema(unet, 0.9999) if tuned else EMAModel(unet.parameters(), model_cls=UNet2DConditionModel)
    rows, source = [], batches(batch)
    for number in range(steps):
        latents, noise, timesteps, context, schedule = next(source)
        start = time.perf_counter()
        noisy = schedule.add_noise(latents, noise, timesteps)
        loss = F.mse_loss(unet(noisy, timesteps, context).sample.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        averages.update(unet, number + 1, torch.tensor(True)) if tuned else averages.step(unet.parameters())
        rows.append((time.perf_counter() - start, loss.item()))
    return rows


def with_latentsmith(folder: Path, batch: int, steps: int, widths: list[int]) -> list[tuple[float, float]]:
    import torch

    from latentsmith import load_config
    from latentsmith.checkpoints.from_config import build_network
    from latentsmith.cpu import optimize_for_cpu
    from latentsmith.data.loader import RunSamples
    from latentsmith.training import setup
    from latentsmith.training.hooks import Hook
    from latentsmith.training.loop import train_loop
    from latentsmith.training.objectives import DiffusionLoss, DiffusionObjective, EmptyPrompt

    shape = [f"model.unet_config.model_channels={widths[0]}", "model.unet_config.channel_mult=[1,2,4,4]",
             "model.unet_config.num_heads=8", "model.unet_config.num_head_channels=-1"]  # fmt: skip
    config = load_config(
        "sd1",
        [*shape, f"model.unet_config.from_pretrained={folder}", "model.unet_config.from_NeMo=false",
         "trainer.precision=32", "model.channels_last=False", "trainer.accelerator=cpu", "trainer.gradient_clip_val=1",
         "model.optim.lr=1e-5", "model.optim.weight_decay=0.01", "model.optim.betas=[0.9,0.999]",
         "model.optim.sched.warmup_steps=0", f"trainer.max_steps={steps}", "exp_manager.ema.decay=0.9999",
         f"model.micro_batch_size={batch}"],
    )  # fmt: skip
    unet = build_network(config, "unet")
    optimize_for_cpu(unet)
    objective = DiffusionObjective({"unet": unet}, ("unet",), DiffusionLoss(scale_factor=1.0), EmptyPrompt())
    rows: list[tuple[float, float]] = []
    held: dict[int, tuple] = {}

    def batch_at(positions: list[int]) -> tuple:
        step = positions[0] // batch
        if step not in held:
            held.clear()
            source = batches(batch)
            held[step] = next(row for number, row in enumerate(source) if number == step)
        return held[step]

    def read(indices: list[int], positions: list[int]) -> dict:
        latents, _, _, context, _ = batch_at(positions)
        moments = torch.cat([latents, torch.full_like(latents, -30.0)], dim=1)
        return {"keys": list(map(str, positions)), "moments": moments, "context": context}

    def draw(positions: list[int], latent_shape=None) -> dict:
        latents, noise, timesteps, _, schedule = batch_at(positions)
        names = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
        scales = dict(zip(names, schedule.coefficients(timesteps), strict=True))
        no = torch.zeros(batch, dtype=torch.bool)
        return {"timesteps": timesteps, **scales, "noise": noise,
                "posterior_noise": torch.zeros_like(latents), "empty_caption": no, "zero_embedding": no}  # fmt: skip

    class Clock(Hook):
        def on_start(self, training):
            self.last = time.perf_counter()

        def after_step(self, training, step):
            now = time.perf_counter()
            rows.append((now - self.last, float(step.metrics["loss"])))
            self.last = time.perf_counter()

    plan = setup.training_plan(config, 10**6)
    training = setup.start(setup.launch(config), objective, plan, config.exp_manager.ema)
    samples = RunSamples(read, draw, 10**6, 0, order=lambda position: position)
    train_loop(training, setup.batches_of(training, samples), [Clock()])
    return rows


def child(peer: str, size: str, folder: Path, steps: int) -> None:
    if peer != "diffusers":
        from latentsmith.cpu.allocator import ask_for_huge_pages, keep_freed_memory

        ask_for_huge_pages()
        keep_freed_memory()
    batch, widths = SIZES[size]["batch"], SIZES[size]["widths"]
    if peer == "latentsmith":
        rows = with_latentsmith(folder, batch, steps, widths)
    else:
        rows = with_diffusers(folder, batch, steps, tuned=peer.endswith("tuned"))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    result = {"seconds": [row[0] for row in rows[1:]], "losses": [row[1] for row in rows], "first": rows[0][0]}
    print("RESULT " + json.dumps(result | {"peak": int(status["VmHWM"].split()[0]) / 2**20}), flush=True)


def measured(peer: str, size: str, folder: Path, steps: int) -> dict:
    command = [sys.executable, __file__, "--child", peer, size, str(folder), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(lines[-1].removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = options.work / f"unet-{options.size}"
    if not folder.exists():
        subprocess.run([sys.executable, __file__, "--make", options.size, str(folder)], check=True)
    found: dict[str, list[dict]] = {peer: [] for peer in PEERS}
    for number in range(options.rounds):
        for peer in PEERS if number % 2 == 0 else reversed(PEERS):
            found[peer].append(measured(peer, options.size, folder, options.steps))
            print(f"  round {number + 1}, {peer}: {median(found[peer][-1]['seconds']):.3f} s a step", flush=True)
    first = found["latentsmith"][0]["losses"]
    for peer in PEERS[1:]:
        apart = max(abs(a / b - 1) for a, b in zip(first, found[peer][0]["losses"], strict=True))
        print(f"losses of {peer} and ours differ by {apart:.1e} at most")
        assert apart < 1e-3, (first, found[peer][0]["losses"])
    report(found, options)


def report(found: dict[str, list[dict]], options: argparse.Namespace) -> None:
    seconds = {peer: median(one for run in runs for one in run["seconds"]) for peer, runs in found.items()}
    peaks = {peer: median(run["peak"] for run in runs) for peer, runs in found.items()}
    ours = seconds["latentsmith"]
    print("\n| peer | step, s | against ours | peak memory, GiB |\n|---|---|---|---|")
    for peer in PEERS:
        print(f"| {peer} | {seconds[peer]:.3f} | {seconds[peer] / ours:.2f} | {peaks[peer]:.2f} |")
    if options.json:
        options.json.write_text(
            json.dumps({"size": options.size, "seconds": seconds, "peaks": peaks, "runs": found}, indent=1)
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], Path(sys.argv[4]), int(sys.argv[5]))
    elif sys.argv[1:2] == ["--make"]:
        make_weights(Path(sys.argv[3]), SIZES[sys.argv[2]]["widths"])
    else:
        main()
