"""Training on a set that lies behind fsspec."""

import fsspec
import pytest

from latentsmith.training.checkpoint import read_state
from latentsmith.training.log import read_rows


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
