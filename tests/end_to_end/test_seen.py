"""What a person sees of a training: its head, its line, its page, its logs."""

import re
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latentsmith.training.metrics_log import read_rows
from latentsmith.training.report import write_run_report

SAMPLES = (
    "exp_manager.sample_images.every_n_train_steps=2",
    "exp_manager.sample_images.prompts=[a red circle]",
    "exp_manager.sample_images.steps=2",
    "model.data.validation.dataset_path=ROOT/cache",
    "trainer.val_check_interval=2",
    "exp_manager.create_tensorboard_logger=true",
    "trainer.enable_progress_bar=true",
)


@pytest.fixture(scope="module")
def run(world):
    return world.train("cached", "seen", *SAMPLES)


def test_the_page(run):
    page = (run / "report.html").read_text()
    for heading in ("What is trained", "Loss", "Validation loss", "Samples", "Gradient norm", "Made by"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("class='chart'") == 6 and len(page) < 100_000
    for step in (2, 4):
        assert f"<h3>step {step}</h3>" in page and f"<img class='pixels' src='samples/step-{step:08d}.png'" in page
    assert page.count("<figcaption>a red circle</figcaption>") == 2
    assert "unet: 985,444 parameters, trained" in page and "memory of a process, about: " in page
    assert "22 samples held out for validation" in page and "command: " in page
    assert "http" not in page and (run / "plotly.min.js").stat().st_size > 2**20  # nothing is fetched to look at it


def test_a_page_of_an_empty_folder(tmp_path):
    assert "What is trained" in write_run_report(tmp_path, ["nothing yet"]).read_text()


def test_the_logs(run):
    rows = read_rows(run / "metrics.csv")
    assert {"loss", "lr", "grad_norm", "samples_per_second", "memory_gib", "data_wait", "skipped_steps"} <= rows[
        0
    ].keys()
    assert all(0 <= row["data_wait"] <= 1 and row["memory_gib"] > 0.05 for row in rows)
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    assert {"train/loss", "train/val_loss", "train/val_loss_ema", "train/memory_gib"} <= set(tags["scalars"])
    assert [image.step for image in events.Images("samples")] == [2, 4]
    held_out = read_rows(run / "validation.csv")
    assert [row["step"] for row in held_out] == [2, 4]
    assert [event.value for event in events.Scalars("train/val_loss")] == pytest.approx(
        [row["val_loss"] for row in held_out]
    )


def test_the_head_and_the_line(world, capsys):
    world.train("cached", "headed", *SAMPLES)
    printed = capsys.readouterr()
    assert (
        "22 samples in 3 shards (190 KiB), cached latents" in printed.out
        and "memory of a process, about: " in printed.out
    )
    line = r"training: 4 steps in .*, loss [\d.]+, lr [\d.e-]+, data wait \d+%, [\d.,]+ samples/s"
    assert re.search(line, printed.err)


def test_weights_and_biases_by_one_line(world, monkeypatch):
    sent, made = [], {}

    class Logger:
        def __init__(self, **options):
            made.update(options)

        def log_metrics(self, values, step):
            sent.append((step, values))

        def finalize(self, status):
            made["status"] = status

    monkeypatch.setattr("lightning.pytorch.loggers.WandbLogger", Logger)
    options = ("exp_manager.create_wandb_logger=true", "exp_manager.wandb_logger_kwargs={project: images}")
    run = world.train("cached", "watched", *options)
    assert made == {"save_dir": str(run), "project": "images", "name": "watched", "status": "success"}
    assert [step for step, _ in sent] == [1, 2, 3, 4]
    assert [values["train/loss"] for _, values in sent] == pytest.approx(world.losses(run))


def test_weights_and_biases_not_installed(world, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)

    def missing(**_):
        raise ModuleNotFoundError("wandb")

    monkeypatch.setattr("lightning.pytorch.loggers.WandbLogger", missing)
    assert world.call(*world.command("cached", "unwatched", "exp_manager.create_wandb_logger=true")) == 2
    assert "wandb is not installed; pip install wandb" in capsys.readouterr().err
