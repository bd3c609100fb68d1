"""Training on a set that lies behind fsspec."""

import fsspec
import pytest

from latentsmith import load_config
from latentsmith.data.mirrors import RemoteFile
from latentsmith.training.checkpointing import read_state
from latentsmith.training.metrics_log import read_rows
from latentsmith.training.train import prepared

from .conftest import RECIPES


@pytest.mark.parametrize("gib", [1, 0.00001], ids=["whole", "ranges"])
def test_a_cache_from_afar_trains_as_one_from_here(world, tmp_path, gib, capsys):
    memory = fsspec.filesystem("memory")
    memory.put(str(world.root / "cache"), "/bucket/cache", recursive=True)
    far = ("model.data.train.dataset_path=memory://bucket/cache", f"model.data.remote.cache_dir={tmp_path}")
    made = world.train("cached", f"far-{gib}", *far, f"model.data.remote.cache_gib={gib}", "model.data.num_workers=2")
    here = world.root / "runs" / "cached"
    assert read_rows(made / "metrics.csv") == read_rows(here / "metrics.csv")
    assert read_state(world.newest(made)) == read_state(world.newest(here))
    assert bool(list(tmp_path.glob("*/*.tar"))) == (gib == 1)
    other = "model.data.train.augmentations.center_crop_h_w='12, 12'"
    assert world.call(*world.command("cached", f"far-stale-{gib}", *far, other)) == 2
    assert "made with transforms" in capsys.readouterr().err
    memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize("recipe", ["cached", "text", "images"])
def test_a_sample_is_asked_for_once(world, tmp_path, monkeypatch, recipe):
    """Image, latents and caption in one request, where samples are read in ranges."""
    memory = fsspec.filesystem("memory")
    folder = {"cached": "cache", "text": "latents", "images": "shards"}[recipe]
    memory.put(str(world.root / folder), "/bucket/set", recursive=True)
    given = [word.replace("ROOT", str(world.root)) for word in RECIPES[recipe]]
    far = ["model.data.train.dataset_path=memory://bucket/set", f"model.data.remote.cache_dir={tmp_path}"]
    config = load_config(str(world.root / "tiny.yaml"), [*given, *far, "model.data.remote.cache_gib=0.00001"])
    samples, asked, read = prepared(config).samples, [], RemoteFile.__getitem__
    samples[[0, 1, 2, 3]]  # the shards are open now
    monkeypatch.setattr(RemoteFile, "__getitem__", lambda self, index: asked.append(index) or read(self, index))
    batch = samples[[0, 1, 2, 3]]
    assert len(asked) == len(batch["keys"]) == 4
    memory.rm("/bucket", recursive=True)


def test_a_set_from_afar_is_inspected(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LATENTSMITH_DATA_CACHE", str(tmp_path))
    memory = fsspec.filesystem("memory")
    for name in ("shards", "cache"):
        memory.put(str(world.root / name), f"/bucket/{name}", recursive=True)
    for name, wanted in (("shards", "22 samples in 3 shards"), ("cache", "latent cache, 22 samples in 3 shards")):
        assert world.call("inspect", f"memory://bucket/{name}") == 0
        assert wanted in capsys.readouterr().out
    assert world.call("inspect", "memory://bucket/cache", "--verify") == 2
    assert "run it where the files lie" in capsys.readouterr().err
    assert world.call("inspect", "memory://bucket/nothing") == 2
    assert "memory://bucket/nothing: no set.json and no .tar shards here" in capsys.readouterr().err
    memory.rm("/bucket", recursive=True)
