import io
import os
import pickle
import resource
import subprocess
import tarfile
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import webdataset
from PIL import Image

from latentsmith.data.image_sizes import image_sizes
from latentsmith.data.shards import (
    UNFINISHED_FILE,
    Shard,
    ShardSet,
    ShardWriter,
    expand_braces,
    read_set_file,
    write_set_file,
)
from latentsmith.data.tar_index import index_path
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import hash_file


def members_of(number: int) -> dict[str, bytes]:
    random = np.random.default_rng(number)
    return {
        "txt": f"caption {number}".encode(),
        "image_encoded.npy": random.bytes(512 * (number % 3)),  # none, one and two whole blocks
        "json": random.bytes(number + 1),
    }


@pytest.fixture
def folder(tmp_path):
    with ShardWriter(tmp_path / "set", samples_per_shard=10) as writer:
        for number in range(25):
            writer.write(f"{number:06d}", members_of(number))
    write_set_file(tmp_path / "set", writer.finished)
    return tmp_path / "set"


def contents(shards) -> list[tuple[str, dict[str, bytes]]]:
    return [(sample.key, {name: bytes(data) for name, data in sample.members.items()}) for sample in shards]


EXPECTED = [(f"{number:06d}", members_of(number)) for number in range(25)]


def test_round_trip(folder):
    shards = ShardSet(folder)
    assert len(shards) == 25 and shards.counts == [10, 10, 5]
    assert contents(shards) == EXPECTED
    assert contents([shards[i] for i in (24, 0, 10, 9)]) == [EXPECTED[i] for i in (24, 0, 10, 9)]
    with pytest.raises(IndexError):
        shards[25]


def test_real_webdataset_reads_our_shards(folder):
    urls = [str(path) for path in ShardSet(folder).paths]
    read = [
        (sample["__key__"], {name: data for name, data in sample.items() if not name.startswith("__")})
        for sample in webdataset.WebDataset(urls, shardshuffle=False)
    ]
    assert read == EXPECTED


def test_we_read_what_webdataset_writes(tmp_path):
    """In place, with nested folders, long names that need extra headers, and samples of differing members."""
    samples = [
        ("a/b.c/0001", {"jpg": b"x" * 700, "seg.png": b"y"}),
        ("a/b.c/0002", {"jpg": b"z"}),
        ("long/" * 30 + "ünï", {"JPG": b"w" * 512, "txt": b""}),
    ]
    with webdataset.TarWriter(str(tmp_path / "w.tar"), encoder=False) as writer:
        for key, members in samples:
            writer.write({"__key__": key, **members})
    expected = [(key, {name.lower(): data for name, data in members.items()}) for key, members in samples]
    assert contents(ShardSet(tmp_path)) == expected
    assert contents(ShardSet(tmp_path / "w.tar")) == expected  # now with the index that the first reading left
    assert index_path(tmp_path / "w.tar").exists()


def test_stored_index_equals_the_rebuilt_one(folder):
    stored = Shard(folder / "shard-000001.tar").index.copy()
    index_path(folder / "shard-000001.tar").unlink()
    rebuilt = Shard(folder / "shard-000001.tar").index
    assert (stored == rebuilt).all() and stored.dtype == rebuilt.dtype


@pytest.mark.parametrize("damage", [b"", b"garbage", b"\x93NUMPY\x01\x00 but not quite"])
def test_damaged_index_is_rebuilt(folder, damage):
    index_path(folder / "shard-000000.tar").write_bytes(damage)
    assert contents(ShardSet(folder)) == EXPECTED


def test_index_of_another_tar_is_rebuilt(folder):
    os.replace(index_path(folder / "shard-000002.tar"), index_path(folder / "shard-000000.tar"))
    assert contents(ShardSet(folder)) == EXPECTED


def test_index_is_mapped_not_loaded(folder):
    index = Shard(folder / "shard-000000.tar").index
    assert not index.flags.owndata and not index.flags.writeable


def test_travels_to_workers_without_its_maps(folder):
    shards = ShardSet(folder)
    assert shards[3].key == "000003"
    copy = pickle.loads(pickle.dumps(shards))
    assert not copy._open and contents(copy) == EXPECTED


def test_equal_samples_give_equal_bytes_and_checksums(folder, tmp_path):
    with ShardWriter(tmp_path / "again", samples_per_shard=10) as writer:
        for key, members in EXPECTED:
            writer.write(key, members)
    for record in read_set_file(folder):
        assert (tmp_path / "again" / record.file).read_bytes() == (folder / record.file).read_bytes()
        assert record.checksum == hash_file(folder / record.file)
        assert record.bytes == (folder / record.file).stat().st_size
    write_set_file(tmp_path / "again", writer.finished)
    assert ShardSet(tmp_path / "again").fingerprint() == ShardSet(folder).fingerprint()
    writer.finished.pop()
    write_set_file(tmp_path / "again", writer.finished)
    assert ShardSet(tmp_path / "again").fingerprint() != ShardSet(folder).fingerprint()


def test_an_error_discards_the_open_shard(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, samples_per_shard=2) as writer:
        for number in range(3):
            writer.write(f"{number}", {"txt": b"x"})
        raise RuntimeError
    assert sorted(os.listdir(tmp_path)) == ["shard-000000.index.npy", "shard-000000.tar"]


@pytest.mark.parametrize("keep", [100, 512, 5000, 10_240, 20_000])
def test_truncated_tar_is_refused_with_its_byte(folder, keep):
    path = folder / "shard-000000.tar"
    os.truncate(path, keep)
    with pytest.raises(BadInput, match=r"shard-000000\.tar: .*truncated.* byte [\d,]+.*again"):
        Shard(path)
    with pytest.raises(BadInput, match=r"shard-000000\.tar"):
        ShardSet(folder)[0]


def test_garbage_is_refused_with_its_byte(folder, tmp_path):
    path = folder / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    header_of_second = data.index(b"000001.txt")
    data[header_of_second : header_of_second + 200] = os.urandom(200)
    path.write_bytes(data)
    index_path(path).unlink()
    with pytest.raises(BadInput, match=rf"garbage instead of a tar header at byte {header_of_second:,}"):
        Shard(path)
    for content, message in (
        (b"", "0 bytes"),
        (os.urandom(3000), "garbage"),
        (b"\x1f\x8b" * 1000, "compressed with gzip"),
    ):
        (tmp_path / "bad.tar").write_bytes(content)
        with pytest.raises(BadInput, match=rf"bad\.tar: .*{message}"):
            Shard(tmp_path / "bad.tar")


def test_two_members_of_one_name_are_refused(tmp_path):
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for data in (b"1", b"2"):
            header = tarfile.TarInfo("0001.txt")
            header.size = 1
            tar.addfile(header, io.BytesIO(data))
    with pytest.raises(BadInput, match=r"two members named '0001.txt', the second at byte 1,536"):
        ShardSet(tmp_path)


def test_vanished_changed_and_unfinished_sets_are_refused(folder):
    shards = ShardSet(folder)
    (folder / "shard-000001.tar").unlink()
    assert shards[0].key == "000000"
    with pytest.raises(BadInput, match=r"shard-000001\.tar: No such file.*moved or deleted"):
        shards[10]
    os.replace(folder / "shard-000002.tar", folder / "shard-000001.tar")
    with pytest.raises(BadInput, match=r"5 in [\d,]+, but set\.json counted 10 samples"):
        shards[10]
    (folder / UNFINISHED_FILE).write_text("{}")
    with pytest.raises(BadInput, match="unfinished; run the command that filled it again"):
        ShardSet(folder)


def test_nothing_there(tmp_path):
    with pytest.raises(BadInput, match="no such folder or tar"):
        ShardSet(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"no \.tar shards here"):
        ShardSet(tmp_path)
    (tmp_path / "set.json").write_text('{"shards": [{"file": 1}]}')
    with pytest.raises(BadInput, match=r"set\.json: is not a listing"):
        ShardSet(tmp_path)


def test_patterns_and_lists(folder):
    whole = contents(ShardSet(folder))
    assert contents(ShardSet(f"{folder}/shard-*.tar")) == whole
    assert contents(ShardSet(f"{folder}/shard-{{000000..000002}}.tar")) == whole
    assert contents(ShardSet([f"{folder}/shard-000002.tar", folder / "shard-000000.tar"])) == whole[20:] + whole[:10]
    assert expand_braces("a{08..10}{x,y}") == ["a08x", "a08y", "a09x", "a09y", "a10x", "a10y"]


def test_a_hundred_million_samples_cost_nothing_until_they_are_touched(tmp_path):
    """10,000 shards of 10,000 samples, all hard links to one."""
    samples, shards = 10_000, 10_000
    with ShardWriter(tmp_path / "one", samples) as writer:
        for number in range(samples):
            writer.write(f"{number:09}", {"txt": f"{number}".encode()})
    record, one = writer.finished[0], tmp_path / "one" / "shard-000000.tar"
    (tmp_path / "set").mkdir()
    for number in range(shards):
        os.link(one, tmp_path / "set" / f"shard-{number:06}.tar")
        os.link(one.with_suffix(".index.npy"), tmp_path / "set" / f"shard-{number:06}.index.npy")
    write_set_file(tmp_path / "set", [replace(record, file=f"shard-{number:06}.tar") for number in range(shards)])
    tracemalloc.start()
    whole = ShardSet(tmp_path / "set")
    assert len(whole) == 10**8 and not whole._open
    assert [whole[index].text("txt") for index in (0, 54_321_987, 10**8 - 1)] == ["0", "1987", "9999"]
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 20 * 2**20  # of the shards' names and counts; nothing of the samples
    assert len(pickle.dumps(whole)) < 4 * 2**20  # what a worker gets


def test_more_shards_than_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr("latentsmith.data.shards.OPEN_SHARDS", 3)
    with ShardWriter(tmp_path, samples_per_shard=1) as writer:
        for number in range(10):
            writer.write(f"{number}", {"txt": b"%d" % number})
    shards = ShardSet(tmp_path)
    first = shards[0].members["txt"]
    assert [bytes(sample.members["txt"]) for sample in shards] == [b"%d" % number for number in range(10)]
    assert len(shards._open) == 3 and bytes(first) == b"0"  # a view outlives its shard's place among the open ones


def test_shards_kept_open_fit_into_the_limit_of_file_descriptors(tmp_path, monkeypatch):
    with ShardWriter(tmp_path, samples_per_shard=1) as writer:
        for number in range(80):
            writer.write(f"{number}", {"txt": b"%d" % number})
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, before[1]))
    try:
        shards = ShardSet(tmp_path)
        assert [sample.text("txt") for sample in shards] == [str(number) for number in range(80)]
        assert 1 <= len(shards._open) < 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_file_of_somebody_else_beside_a_tar_is_not_replaced(tmp_path, png):
    """Neither where an index belongs nor where sizes do: an array of another form, or no array at all."""
    with ShardWriter(tmp_path / "set") as writer:
        writer.write("a", {"png": png(), "txt": b"one"})
    tar = tmp_path / "set" / "shard-000000.tar"
    np.save(tar.with_suffix(".index.npy"), np.arange(4))
    tar.with_suffix(".sizes.npy").write_text("my notes")
    before = {path.name: path.read_bytes() for path in tar.parent.iterdir()}
    shards = ShardSet(tar)
    assert shards[0].text("txt") == "one" and image_sizes(shards).tolist() == [[30, 40]]
    assert {path.name: path.read_bytes() for path in tar.parent.iterdir()} == before


def make_tar(path, *members, **options):
    """members: (name, bytes), or (name, type, name of the target)."""
    with tarfile.open(path, "w", **options) as tar:
        for name, *content in members:
            header = tarfile.TarInfo(name)
            if len(content) == 2:
                header.type, header.linkname = content
                tar.addfile(header)
            else:
                header.size = len(content[0])
                tar.addfile(header, io.BytesIO(content[0]))
    return path


OLD = [("0.png", b"p" * 900), ("0.txt", b"a red cat"), ("1.png", b"q" * 700), ("1.txt", b"two dogs, no cat")]


@pytest.mark.parametrize(
    "new",
    [
        [OLD[0], ("0.txt", b"a red catamaran on the sea"), ("7.png", b"q" * 600), ("7.txt", b"no dog")],
        [*OLD[:2], ("7.png", b"q" * 700), ("7.txt", OLD[3][1])],  # other keys alone
        [*OLD[:2], ("1.jpg", b"q" * 700), OLD[3]],  # another extension alone
        [OLD[0], ("0.txt", b"a cat"), *OLD[2:]],  # another size within the same block
        [*OLD, ("2.png", b"r"), ("2.txt", b"three")],
    ],
)
@pytest.mark.parametrize("in_set", [False, True])
def test_index_of_a_tar_made_anew_under_the_same_name(tmp_path, new, in_set):
    """Also where it is older than the index, as when it was moved there."""
    tar = make_tar(tmp_path / "a.tar", *OLD)
    assert len(ShardSet(tmp_path)) == 2
    make_tar(tar, *new)
    os.utime(tar, (0, 0))
    if in_set:
        Shard(tar, checksum="of a set")
    expected = {}
    for name, data in new:
        expected.setdefault(name[0], {})[name[2:]] = data
    assert contents(ShardSet(tmp_path)) == list(expected.items())


def test_sizes_of_a_tar_made_anew_under_the_same_name(tmp_path):
    """Images of the same number of bytes and another shape."""
    for size in ((4, 8), (8, 4)):
        image = io.BytesIO()
        Image.new("RGB", size).save(image, "BMP")
        make_tar(tmp_path / "a.tar", ("0.bmp", image.getvalue()), ("0.txt", b"a"))
        assert image_sizes(ShardSet(tmp_path)).tolist() == [list(reversed(size))]


@pytest.mark.parametrize("style", ["gnu", "pax", "oldgnu"])
def test_sparse_members_are_refused_by_name(tmp_path, style):
    with open(tmp_path / "0.npy", "wb") as file:
        file.seek(200_000)
        file.write(b"toto")
        file.truncate(400_000)
    (tmp_path / "0.txt").write_text("a")
    names = ["0.npy", "0.txt"]
    subprocess.run(["tar", f"--format={style}", "-cSf", "a.tar", *names], cwd=tmp_path, check=True)
    with pytest.raises(BadInput, match=r"a\.tar: member '0\.npy' at byte \d+ is stored sparse; .*without --sparse"):
        ShardSet(tmp_path)


def test_tars_put_together_are_read_to_the_end(tmp_path):
    first, second = make_tar(tmp_path / "p", *OLD), make_tar(tmp_path / "q", ("9.txt", b"nine"))
    tar = tmp_path / "a.tar"
    tar.write_bytes(first.read_bytes())
    assert len(ShardSet(tar)) == 2
    tar.write_bytes(first.read_bytes() + second.read_bytes())
    assert contents(ShardSet(tar))[2:] == [("9", {"txt": b"nine"})]  # the index of the first alone is not taken
    end = len(first.read_bytes())
    tar.write_bytes(first.read_bytes() + b"x" * 600)
    with pytest.raises(BadInput, match=rf"garbage.* byte {end:,}"):
        ShardSet(tar)
    tar.write_bytes(first.read_bytes() + bytes(100_000))
    assert len(ShardSet(tar)) == 2


def test_links_in_a_tar(tmp_path):
    links = [("1.png", tarfile.LNKTYPE, "0.png"), ("1.txt", tarfile.SYMTYPE, "../0.txt")]
    tar = make_tar(tmp_path / "a.tar", *OLD[:2], (links[0][0], *links[0][1:]), ("1.txt", tarfile.SYMTYPE, "./0.txt"))
    for _ in range(2):
        one, other = contents(ShardSet(tar))
        assert one[1] == other[1] == {"png": OLD[0][1], "txt": OLD[1][1]}
    make_tar(tar, *OLD[:2], links[1])
    with pytest.raises(BadInput, match=r"member '1\.txt' is a link to '\.\./0\.txt', which is not in the tar"):
        ShardSet(tar)


@pytest.mark.parametrize("name", ["gz", "bz2", "xz"])
def test_compressed_tars_are_named(tmp_path, name):
    with tarfile.open(tmp_path / "a.tar", f"w:{name}") as tar:
        tar.addfile(tarfile.TarInfo("0.txt"), io.BytesIO())
    with pytest.raises(BadInput, match=r"a\.tar: a tar compressed with (gzip|bzip2|xz)"):
        ShardSet(tmp_path)
