"""A step without a finite gradient changes nothing, is described, and ends a run only if it does not end itself."""

import json
import math

import pytest
import torch
from torch import nn

from latentsmith.data.loader import RunSamples
from latentsmith.training.hooks import Hook
from latentsmith.training.hooks.nonfinite import DescribeNonFinite, TooManyNonFinite, first_bad
from latentsmith.training.metrics_log import read_rows

BAD = "7"  # the key of a sample of the set


class Poisoned:
    """The toy's samples, one of them with a NaN among its moments."""

    def __init__(self, toy, keys=(BAD,)):
        self.toy, self.keys = toy, keys

    def __call__(self):
        samples = type(self.toy).samples(self.toy)

        def read(indices, positions):
            batch = samples.read(indices, positions)
            for key, moments in zip(batch["keys"], batch["moments"], strict=True):
                if key in self.keys:
                    moments[0, 0, 0] = float("nan")
            return batch

        return RunSamples(read, samples.draw, samples.length, samples.seed)


def poisoned(toy, keys=(BAD,), **fields):
    run = toy(**fields)
    run.samples = Poisoned(run, keys)
    return run


def weights(objective):
    return {name: value.clone() for name, value in objective.networks["unet"].state_dict().items()}


class Look(Hook):
    """Keeps the weights and averages before the first step and after each."""

    def __init__(self):
        self.weights, self.averages = [], []

    def on_start(self, training):
        self.weights.append(weights(training.objective))
        self.averages.append([average.clone() for average in training.state.ema["unet"].averages])

    def after_step(self, training, step):
        self.on_start(training)


@pytest.mark.parametrize("name", ["adamw", "SGD"], ids=["fused", "looped"])
def test_the_step_is_skipped_and_described(toy, name):
    run, look = poisoned(toy, optimizer=name, decay=0.9), Look()
    training = run.train(steps=6, hooks=[look])
    rows = read_rows(run.folder / "metrics.csv")
    skipped = [row["step"] for row in rows if not math.isfinite(row.get("grad_norm", math.nan))]
    assert skipped and len(skipped) < 6
    assert rows[-1]["skipped_steps"] == len(skipped) == int(training.state.skipped_steps)
    assert training.state.ema["unet"].updates == 6 - len(skipped)
    for step in range(1, 7):
        before, after = look.weights[step - 1 : step + 1]
        assert all(torch.equal(before[key], after[key]) for key in after) == (step in skipped)
        before, after = look.averages[step - 1 : step + 1]
        assert all(map(torch.equal, before, after)) == (step in skipped)
    assert all(torch.isfinite(value).all() for value in [*look.weights[-1].values(), *look.averages[-1]])
    files = sorted((run.folder / "nonfinite").glob("*.json"))
    assert [int(file.stem[5:]) for file in files] == skipped
    described = json.loads(files[0].read_text())
    assert BAD in described["keys"] and described["first_bad"] == "input:moments" and described["losses"] == ["nan"]
    assert len(described["positions"]) == len(described["timesteps"]) == 4 and described["weights"] == files[0].stem
    assert (files[0].with_suffix("") / "unet.safetensors").is_file()


def test_the_bad_micro_batch_is_the_one_described(toy):
    run = poisoned(toy)
    run.train(steps=3, micro_batch=1)
    described = json.loads(min((run.folder / "nonfinite").glob("*.json")).read_text())
    assert described["keys"] == [BAD] and sorted(described["losses"])[-1] == "nan" and len(described["losses"]) == 4


def test_training_goes_on_as_if_it_had_not_been_looked_into(toy, monkeypatch):
    """Describing a step runs it once more; what follows is bit for bit the same without that."""
    runs = []
    for _ in range(2):
        run = poisoned(toy, unet_dropout=0.3)
        run.train(steps=6, micro_batch=2)
        runs.append([row["loss"] for row in read_rows(run.folder / "metrics.csv") if "loss" in row])
        monkeypatch.setattr(DescribeNonFinite, "describe", lambda *_: None)
    assert runs[0] == runs[1] and len(runs[0]) == 6


def test_what_cannot_be_described_does_not_end_the_run(toy, capsys):
    run = poisoned(toy)
    (run.folder / "nonfinite").write_text("in the way of the folder")
    assert run.train(steps=6).state.global_step == 6
    assert "skipped, and not described" in capsys.readouterr().out


def test_it_stops_after_so_many_in_a_row_with_good_weights_kept(toy):
    run = poisoned(toy, keys=[str(index) for index in range(10)])
    objective = run.objective()
    before = weights(objective)
    with pytest.raises(TooManyNonFinite, match="3 steps in a row without a finite gradient"):
        run.train(objective, steps=20, limit=3)
    assert all(torch.equal(value, before[name]) for name, value in weights(objective).items())
    assert (run.folder / "checkpoints" / "step-00000003").is_dir()


def test_now_and_then_is_no_reason_to_stop(toy):
    run = poisoned(toy)
    run.train(steps=12, limit=3)
    assert len(list((run.folder / "nonfinite").glob("*.json"))) >= 4


def test_counted_on_after_a_resume(toy):
    whole, halves = poisoned(toy), poisoned(toy)
    whole.train(steps=8)
    halves.train(steps=4)
    halves.train(steps=8, resume=halves.folder / "checkpoints" / "step-00000004")
    assert read_rows(halves.folder / "metrics.csv")[-1] == read_rows(whole.folder / "metrics.csv")[-1]


@pytest.mark.parametrize("layer", ["conv", "text"])
def test_the_first_bad_layer_is_found(toy, layer):
    run = toy()
    objective = run.objective()
    with torch.no_grad():
        objective.networks["unet"].get_submodule(layer).weight.view(-1)[0] = float("inf")
    assert looked_into(run, objective) == f"forward:unet.{layer}"


class InfiniteSlope(nn.Module):
    def forward(self, values):
        return values + (values * 0).sqrt()


def test_and_where_only_its_gradient_is_bad(toy):
    run = toy()
    objective = run.objective()
    objective.networks["unet"].dropout = InfiniteSlope()
    assert looked_into(run, objective) in ("backward:unet.conv", "backward:unet.text")


def test_nothing_is_found_where_all_is_well(toy):
    run = toy()
    assert looked_into(run, run.objective()) is None


def looked_into(run, objective):
    found = first_bad(objective.train(), run.samples()[[0, 1]])
    assert all(p.grad is None for p in objective.parameters())
    return found["first_bad"]
