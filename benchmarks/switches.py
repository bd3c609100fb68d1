"""Memory and time of an optimizer step with each switch of training, one process each.

    python benchmarks/switches.py [--small] [--latents 32] [--steps 3]

The U-Net of Stable Diffusion v1 (859,520,964 parameters), or with --small a cut of 37 million, on random cached
latents, through the trainer that `latentsmith train` uses: forward, backward, gradient norm, fused AdamW. Prints a
table: seconds of the median step after the first, of the first, the process' largest memory, and how far loss and
gradient norm of the last step are from the plain ones.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

SMALL = ["model.unet_config.model_channels=64", "model.unet_config.channel_mult=[1,2,4,4]",
         "model.unet_config.num_heads=8", "model.unet_config.num_head_channels=-1"]  # fmt: skip
BASE = ["trainer.precision=32", "model.channels_last=False", "exp_manager.ema.enable=False", "trainer.accelerator=cpu",
        "model.optim.sched.warmup_steps=0"]  # fmt: skip
SWITCHES = {
    "plain": [],
    "activation checkpointing": ["model.unet_config.use_checkpoint=True"],
    "without fused attention": ["model.unet_config.use_flash_attention=False"],
    "channels last": ["model.channels_last=True"],
    "averages (EMA)": ["exp_manager.ema.enable=True"],
    "8-bit moments": ["model.optim.name=adamw8bit"],
    "bfloat16": ["trainer.precision=bf16"],
    "compiled blocks": ["model.inductor=True"],
}
SLOW_ON_CPU = ("bfloat16", "compiled blocks")  # minutes a step at full size on a processor without bfloat16 units


def child(size: int, batch: int, steps: int, changes: list[str]) -> None:
    """Train `steps` steps and print what they took."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does
    import torch

    from latentsmith import load_config
    from latentsmith.checkpoints.from_config import build_network
    from latentsmith.cpu import optimize_for_cpu
    from latentsmith.data.loader import RunSamples, collated
    from latentsmith.training import setup
    from latentsmith.training.hooks import Hook
    from latentsmith.training.loop import train_loop
    from latentsmith.training.objectives import DiffusionLoss, DiffusionObjective, EmptyPrompt
    from latentsmith.training.random_draws import DiffusionDraws
    from latentsmith.training.train import lay_out

    own = [f"model.micro_batch_size={batch}", f"trainer.max_steps={steps}"]
    config = load_config("sd1", [*BASE, *changes, *own])
    shape = (4, size, size)
    networks = {"unet": build_network(config, "unet")}
    if setup.on_cpu(config):
        optimize_for_cpu(networks["unet"])
    lay_out(networks, config.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # fresh networks have layers of zeros, behind which differences would not show
        for parameter in networks["unet"].parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3 * fan_in**-0.5)
    objective = DiffusionObjective(networks, ("unet",), DiffusionLoss(), EmptyPrompt())

    def read(index: int, position: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        moments = torch.randn(8, size, size, generator=generator)
        return {"keys": str(index), "moments": moments, "context": torch.randn(77, 768, generator=generator)}

    class Clock(Hook):
        times, facts = [], []

        def on_start(self, training):
            self.times.append(time.monotonic())

        def after_step(self, training, step):
            self.facts.append({name: float(step.metrics[name]) for name in ("loss", "grad_norm")})
            self.times.append(time.monotonic())

    clock, averages = Clock(), config.exp_manager.ema
    plan = setup.training_plan(config, 64)
    training = setup.start(setup.launch(config), objective, plan, averages if averages.enable else None)
    samples = RunSamples(collated(read), DiffusionDraws(0, shape, setup.noise_schedule(config.model)), 64, 0)
    train_loop(training, setup.batches_of(training, samples), [clock])
    spans = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    parameters = sum(parameter.numel() for parameter in networks["unet"].parameters())
    peak = int(status["VmHWM"].split()[0]) / 2**20
    device_peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    result = {"device_peak": device_peak}
    result |= {"first": spans[0], "step": statistics.median(spans[1:]), "peak": peak, "parameters": parameters}
    print("RESULT " + json.dumps(result | clock.facts[-1]), flush=True)


def measured(size: int, batch: int, steps: int, changes: list[str]) -> dict:
    command = [sys.executable, __file__, "--child", str(size), str(batch), str(steps), *changes]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(lines[-1].removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--latents", type=int, default=32)
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", nargs="*", default=None, help="names of switches")
    options = parser.parse_args()
    batch = options.batch or (8 if options.small else 1)
    plain = None
    print("| switch | step, s | first step, s | memory, GiB | loss differs | gradient norm differs |")
    print("|---|---|---|---|---|---|", flush=True)
    for name, changes in SWITCHES.items():
        if (options.only and name not in options.only) or (
            not options.small and name in SLOW_ON_CPU and not options.only
        ):
            continue
        found = measured(options.latents, batch, options.steps, [*(SMALL if options.small else []), *changes])
        plain = plain or found
        apart = [f"{abs(found[key] / plain[key] - 1):.1e}" for key in ("loss", "grad_norm")]
        row = [name, f"{found['step']:.1f}", f"{found['first']:.1f}", f"{found['peak']:.1f}", *apart]
        print(f"| {' | '.join(row)} |", flush=True)
    print(f"\n{plain['parameters']:,} parameters, latents {options.latents} x {options.latents}, batch {batch}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
    else:
        main()
