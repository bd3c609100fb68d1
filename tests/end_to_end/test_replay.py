"""A sample that makes a step not finite is named in the run folder, and `train --replay` runs it again."""

import json
import shutil
import tarfile
from io import BytesIO

import numpy as np
import pytest

from latentsmith.data.sample_io import npy_bytes
from latentsmith.data.shards import ShardSet, read_set_file, write_set_file
from latentsmith.data.tar_index import index_path
from latentsmith.files.hashing import hash_file
from latentsmith.training.metrics_log import read_rows


@pytest.fixture(scope="module")
def poisoned(world):
    """A copy of the cache in which one sample's moments hold an infinity, and that sample's key."""
    folder = world.root / "poisoned"
    shutil.copytree(world.root / "cache", folder)
    records = read_set_file(folder)
    path = folder / records[0].file
    samples = [(s.key, {name: bytes(data) for name, data in s.members.items()}) for s in ShardSet(path)]
    key, members = samples[2]
    moments = np.zeros((8, 8, 8), np.float16)
    moments[0, 0, 0] = np.inf
    members["image_encoded.npy"] = npy_bytes(moments)
    index_path(path).unlink()
    with tarfile.open(path, "w") as tar:
        for name, held in samples:
            for extension, data in held.items():
                header = tarfile.TarInfo(f"{name}.{extension}")
                header.size = len(data)
                tar.addfile(header, BytesIO(data))
    first = type(records[0])(path.name, records[0].samples, path.stat().st_size, hash_file(path))
    write_set_file(folder, [first, *records[1:]])
    return folder, key


def test_skipped_described_and_run_again(world, poisoned, capsys):
    folder, key = poisoned
    run = world.train("cached", "with-poison", f"model.data.train.dataset_path={folder}", "trainer.max_steps=8")
    files = sorted((run / "nonfinite").glob("*.json"))
    rows = read_rows(run / "metrics.csv")
    assert 1 <= len(files) == rows[-1]["skipped_steps"] < 8
    described = json.loads(files[0].read_text())
    assert key in described["keys"] and described["first_bad"] == "input:moments"
    capsys.readouterr()
    for file in files:
        assert world.call("train", "--replay", file) == 1
        output = capsys.readouterr().out
        assert f"sample {key} at position " in output and "loss nan; first not finite: input:moments" in output
    repaired = f"model.data.train.dataset_path={world.root}/cache"
    assert world.call("train", "--replay", files[0], "--config", run / "config.yaml", repaired) == 0
    assert "all is finite" in capsys.readouterr().out


def test_it_ends_where_nothing_is_finite(world, capsys):
    options = ("model.optim.lr=1e30", "trainer.max_steps=40", "exp_manager.nonfinite_limit=4")
    command = world.command("cached", "exploding", *options)
    assert world.call(*command) == 1
    assert "4 steps in a row without a finite gradient: stopped" in capsys.readouterr().err


def test_what_is_no_such_file(world, tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    assert world.call("train", "--replay", tmp_path / "x.json") == 2
    assert "does not lie in nonfinite/ of a run" in capsys.readouterr().err
    assert world.call("train", "--replay", tmp_path / "x.json", "--config", "ROOT/tiny.yaml") == 2
    assert "not a file that training wrote of a skipped step" in capsys.readouterr().err
