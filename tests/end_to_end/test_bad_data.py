"""Data that goes bad after its import: one line that names shard and key, never a hang."""

import errno
import multiprocessing
import shutil

import pytest

from latentsmith.data import cache_writer
from latentsmith.data.latent_cache import LatentCache

from .conftest import TEXT, VAE


@pytest.fixture
def copy(world, tmp_path):
    """copy("shards") -> a copy of a set of the world, and the option that trains on it."""

    def make(name):
        shutil.copytree(world.root / name, tmp_path / name)
        return tmp_path / name, f"model.data.train.dataset_path={tmp_path / name}"

    return make


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("recipe", ["cached", "images"])
def test_a_shard_that_vanishes_stops_the_run_with_its_name(world, copy, capsys, recipe, workers):
    folder, data = copy({"cached": "cache", "images": "shards"}[recipe])
    (folder / "shard-000001.tar").unlink()
    name = f"vanished-{recipe}-{workers}"
    given = (data, "trainer.max_steps=12", f"model.data.num_workers={workers}")
    assert world.call(*world.command(recipe, name, *given)) == 2
    output = capsys.readouterr().err
    assert "shard-000001.tar: No such file or directory; has the shard been moved or deleted?" in output
    assert output.strip().count("\n") == 0, output
    assert not multiprocessing.active_children()  # they leave signals to training: its exit would wait for ever


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_has_gone_bad_is_named(world, copy, capsys, workers):
    folder, data = copy("shards")
    tar = folder / "shard-000001.tar"
    damaged = bytearray(tar.read_bytes())
    at = damaged.index(b"IDAT")
    damaged[at + 4 : at + 60] = bytes(56)
    tar.write_bytes(damaged)
    given = (data, "trainer.max_steps=12", f"model.data.num_workers={workers}")
    assert world.call(*world.command("images", f"gone-bad-{workers}", *given)) == 2
    output = capsys.readouterr().err
    assert "shard-000001.tar: sample '000000008'" in output and "corrupt" in output
    assert output.strip().count("\n") == 0, output


def test_a_full_disk_while_precaching_keeps_what_is_done(world, copy, tmp_path, capsys, monkeypatch):
    _, data = copy("shards")
    out, write, written = tmp_path / "cache", cache_writer.ShardWriter.write, []

    def full(self, key, members):
        written.append(key)
        if len(written) == 12:  # in the second shard of eight
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, key, members)

    arguments = ("precache", "--config", "ROOT/tiny.yaml", "--out", out, data, VAE, TEXT)
    with monkeypatch.context() as patched:
        patched.setattr(cache_writer.ShardWriter, "write", full)
        assert world.call(*arguments) == 2
    output = capsys.readouterr().err
    assert "the disk is full; free some space and run the command again" in output and output.strip().count("\n") == 0
    assert [path.name for path in sorted(out.glob("*.tar"))] == ["shard-000000.tar"]
    assert not (out / "set.json").exists()
    assert world.call(*world.command("cached", "half", f"model.data.train.dataset_path={out}")) == 2
    assert "unfinished" in capsys.readouterr().err
    assert world.call(*arguments) == 0 and len(LatentCache(out)) == 22
    whole = LatentCache(world.root / "cache")
    assert [r.checksum for r in LatentCache(out).shards.records] == [r.checksum for r in whole.shards.records]
