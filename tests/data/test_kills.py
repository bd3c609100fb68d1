"""Imports and caches killed before each of their writes: the same command ends with the right folder, and no more."""

from itertools import count

import pytest

from latentsmith.data.cache_writer import write_cache
from latentsmith.data.ingest import import_dataset
from latentsmith.data.shards import ShardSet, ShardWriter, write_set_file
from latentsmith.files.errors import BadInput
from latentsmith.files.lock import locked_folder

from .test_cache import TRANSFORMS, encoders, everything


@pytest.fixture
def source(tmp_path, png):
    with ShardWriter(tmp_path / "set", samples_per_shard=2) as writer:
        for number in range(3):
            writer.write(f"{number:03}", {"png": png(seed=number), "txt": b"one", "json": b"{}"})
    write_set_file(tmp_path / "set", writer.finished)
    return ShardSet(tmp_path / "set")


def import_into(folder, source):
    import_dataset(folder.parent / "set", folder, samples_per_shard=2, keep_duplicates=False)


def cache_into(folder, source):
    write_cache(source, folder, TRANSFORMS, encoders())


def cache_with_two(folder, source):
    """Each process encodes one of the two shards; the one that comes last finishes the folder."""
    for rank in range(2):
        write_cache(source, folder, TRANSFORMS, encoders(), rank=rank, processes=2)


@pytest.mark.parametrize("fill", [import_into, cache_into, cache_with_two])
def test_killed_before_every_write(tmp_path, source, killed_at_write, fill):
    fill(tmp_path / "whole", source)
    whole = everything(tmp_path / "whole")
    assert {"set.json", "shard-000001.tar"} <= whole.keys() and not any("done" in name for name in whole)
    for number in count(1):
        folder = tmp_path / f"killed-{number}"
        killed = killed_at_write(lambda folder=folder: fill(folder, source), number)
        fill(folder, source)
        assert everything(folder) == whole, f"killed at write {number}"
        if not killed:
            break
    assert number > 30  # shards, indexes, records, set.json, then each marker


@pytest.mark.parametrize("fill", [import_into, cache_into, cache_with_two])
def test_another_start_is_refused_and_changes_nothing(tmp_path, source, fill):
    folder = tmp_path / "out"
    with locked_folder(folder):
        before = everything(folder)
        with pytest.raises(BadInput, match=r"out: process \d+ on .*, is writing here; wait until it ends, or stop it"):
            fill(folder, source)
        assert everything(folder) == before


def test_the_same_share_of_a_cache_is_not_made_twice(tmp_path, source):
    folder = tmp_path / "out"
    with locked_folder(folder, shared=True), locked_folder(folder, name=".lock-1"):
        write_cache(source, folder, TRANSFORMS, encoders(), rank=0, processes=2)
        with pytest.raises(BadInput, match="is writing here"):
            write_cache(source, folder, TRANSFORMS, encoders(), rank=1, processes=2)
    assert write_cache(source, folder, TRANSFORMS, encoders(), rank=1, processes=2) is not None
    assert not [name for name in everything(folder) if "lock" in name]
