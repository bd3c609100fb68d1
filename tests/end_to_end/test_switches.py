"""Each switch of training is really on where it is asked for, and gradients agree with the plain float32 model."""

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import nn

from latentsmith.config import load_config
from latentsmith.training import setup
from latentsmith.training.hooks import Hook
from latentsmith.training.loop import train_loop
from latentsmith.training.train import prepared

from .conftest import RECIPES

FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"
SWITCHES = {  # the override, and how far a gradient may be from the plain one, as a share of the largest
    "plain": ((), 0.0),
    "activation checkpointing": (("model.unet_config.use_checkpoint=True",), 0.0),
    "without fused attention": (("model.unet_config.use_flash_attention=False",), 1e-5),
    "channels last": (("model.channels_last=True",), 1e-5),
    "bfloat16": (("trainer.precision=bf16",), 0.03),
    "weights in bfloat16": (("trainer.precision=bf16-true",), 0.05),
}


class Look(Hook):
    """What happens inside the one step of a training: a profile from its start to the optimizer's step."""

    def __init__(self, unet: nn.Module):
        self.blocks, self.dtypes, self.last, self.operators = Counter(), set(), set(), set()
        self.unet, self.gradients, self.images_last = unet, {}, set()
        for name, module in unet.named_modules():
            if module in unet.repeated_blocks():
                module.register_forward_pre_hook(lambda _, given, name=name: self.blocks.update([name]))
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                module.register_forward_hook(self.see)

    def see(self, layer, given, output):
        self.dtypes.add(output.dtype)
        if min(output.shape[1:]) > 1:  # else both orders are the same; in float32 a CPU's images are always so
            self.last.add(layer.weight.is_contiguous(memory_format=torch.channels_last))
            self.images_last.add(output.is_contiguous(memory_format=torch.channels_last))

    def on_start(self, training):
        self.profile = torch.autograd.profiler.profile(use_cpu=True)
        self.profile.__enter__()
        training.state.optimizer.register_step_pre_hook(self.before_optimizer_step)

    def before_optimizer_step(self, optimizer, *_):
        self.gradients = {name: p.grad.float().clone() for name, p in self.unet.named_parameters()}
        self.weight_dtypes = {p.dtype for p in self.unet.parameters()}
        self.profile.__exit__(None, None, None)
        self.operators = {event.key for event in self.profile.key_averages()}


def looked_into(world, *changes):
    """One training step of the world's tiny model, from weights that are not zero anywhere."""
    given = [word.replace("ROOT", str(world.root)) for word in (*RECIPES["cached"], *changes, "trainer.max_steps=1")]
    config = load_config(world.root / "tiny.yaml", given)
    ready = prepared(config)
    generator = torch.Generator().manual_seed(0)
    unet = ready.networks["unet"]
    with torch.no_grad():
        for parameter in unet.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
            parameter.add_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    look = Look(unet)
    training = setup.start(setup.launch(config), ready.objective, ready.plan)
    train_loop(training, setup.batches_of(training, ready.samples), [look])
    return look


@pytest.fixture(scope="module")
def plain(world):
    return looked_into(world)


@pytest.mark.parametrize("name", SWITCHES)
def test_it_is_on_and_gradients_agree(world, plain, name):
    changes, tolerance = SWITCHES[name]
    look = looked_into(world, *changes)
    recomputed = name == "activation checkpointing"
    assert set(look.blocks.values()) == {2 if recomputed else 1}
    assert look.images_last == {name not in ("bfloat16", "weights in bfloat16")}
    assert (FUSED in look.operators) == (name != "without fused attention")
    assert look.last == ({True} if name == "channels last" else {False})
    half = "bfloat16" in name
    assert look.dtypes == ({torch.bfloat16} if half else {torch.float32})
    assert look.weight_dtypes == ({torch.bfloat16} if name == "weights in bfloat16" else {torch.float32})
    largest = max(gradient.abs().max() for gradient in plain.gradients.values())
    apart = max((look.gradients[key] - plain.gradients[key]).abs().max() for key in plain.gradients)
    assert apart <= tolerance * largest, f"{apart / largest:.2e}"
    assert half <= (apart > 0)  # half precision that changes nothing was not used


@pytest.mark.parametrize("recipe", ["cached", "images"])
def test_half_precision_rounds_no_noise_and_no_target(world, recipe):
    """A fresh U-Net predicts 0, so that its first loss is the target's mean square: the same in every precision."""
    first = {}
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        options = (f"trainer.precision={precision}", "model.min_snr_gamma=5", "trainer.max_steps=1")
        first[precision] = world.losses(world.train(recipe, f"target-{recipe}-{precision}", *options))[0]
    encoded = 3e-3 if recipe == "images" else 1e-6  # a VAE in bfloat16 rounds its own latents
    assert first["bf16-true"] == pytest.approx(first["32-true"], rel=encoded)
    assert first["bf16-mixed"] == pytest.approx(first["32-true"], rel=encoded)


def test_steps_that_half_precision_rounds_away_are_reported(world, capsys):
    """bfloat16 has 8 bits: a step below 2^-9 of a weight changes nothing, and 0.999 of a moment is the moment."""
    half, once = "trainer.precision=bf16-true", "trainer.max_steps=1"
    weights, moments = "is lost to rounding in", "0.999 is rounded to 1"
    cases = {  # overrides -> what is reported
        (half, "model.optim.lr=1e-5"): {weights, moments},
        (half, "model.optim.lr=0.1"): {moments},
        (half, "model.optim.lr=0.1", "model.optim.betas=[0.9,0.99]"): set(),
        (half, "model.optim.lr=0.1", "model.optim.name=RMSprop"): set(),
        ("model.optim.lr=1e-5",): set(),
    }
    for number, (options, expected) in enumerate(cases.items()):
        world.train("cached", f"rounded-{number}", *options, once)
        printed = capsys.readouterr().out
        assert {line for line in (weights, moments) if line in printed} == expected, options


COMPILED = """
import sys, torch
from torch._dynamo.utils import counters
from latentsmith.cli import main
code = main(sys.argv[1:])
from torch._inductor.metrics import generated_kernel_count
hits = counters["inductor"]["fxgraph_cache_hit"]
print("COMPILED", counters["stats"]["unique_graphs"], hits, counters["inductor"]["fxgraph_cache_miss"])
sys.exit(code)
"""


@pytest.mark.slow
def test_compiled_blocks_are_compiled_once_and_kept(world, tmp_path):
    """The same losses to 1e-5; another start takes every kernel from the cache on disk."""
    plain = world.losses(world.train("cached", "not-compiled"))
    (tmp_path / "compiled.py").write_text(COMPILED)
    counts = []
    for name in ("compiled", "compiled-again"):
        arguments = [
            word.replace("ROOT", str(world.root)) for word in world.command("cached", name, "model.inductor=True")
        ]
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
        done = subprocess.run(
            [sys.executable, tmp_path / "compiled.py", *arguments], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        counts.append([int(word) for word in done.stdout.splitlines()[-1].split()[1:]])
        assert world.losses(world.root / "runs" / name) == pytest.approx(plain, rel=1e-5)
    (graphs, *_), (again, hits, missed) = counts
    assert graphs == again > 3 and hits > 3 and missed == 0, counts
    assert (tmp_path / "cache" / "latentsmith" / "inductor").is_dir()
