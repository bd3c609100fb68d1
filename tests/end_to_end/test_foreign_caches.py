"""NeMo's lists of tars and precached tars, and MLPerf's moments: read in place, to the same losses as our own cache."""

import io
import pickle
import tarfile

import numpy as np
import pytest

from latentsmith.data.foreign_cache import ForeignCache
from latentsmith.data.latent_cache import LatentCache
from latentsmith.data.sample_io import caption_of
from latentsmith.data.shards import ShardSet
from latentsmith.data.sources import read_wdinfo
from latentsmith.files.errors import BadInput
from latentsmith.files.pickles import load_arrays, load_plain
from latentsmith.inference import Pipeline

DATA = "model.data.train.dataset_path"
NO_DROPOUT = "model.caption_dropout_rate=0"
VOUCHED = "model.data.accept_unfingerprinted=true"


def nemo_pickle(moments, text, protocol=4):
    return {"pickle": pickle.dumps({"autoencoderkl_image": moments, "clip-vit-large-patch14_text": text}, protocol)}


def nemo_pyd(moments, text):
    return {"pyd": pickle.dumps({"image_embed": moments[None], "captions_embed": text})}


def mlperf(moments, caption):
    buffer = io.BytesIO()
    np.save(buffer, moments[None].astype(np.float32))
    return {"npy": buffer.getvalue(), "txt": caption.encode()}


@pytest.fixture(scope="module")
def tars(world, tmp_path_factory):
    """(a function that writes a copy of the world's cache with other members, the folder they go to)"""
    cache = LatentCache(world.root / "cache")

    def write(name, members_of):
        folder = world.root / "nemo" / name
        folder.mkdir(parents=True)
        index = 0
        for number, count in enumerate(cache.shards.counts):
            with tarfile.open(folder / f"t0_r0_{number}.tar", "w") as tar:
                for _ in range(count):
                    for extension, data in members_of(cache, index).items():
                        info = tarfile.TarInfo(f"{index:04d}.{extension}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
                    index += 1
        listing = {
            "tar_files": sorted(tar.name for tar in folder.glob("*.tar")),
            "chunk_size": 8,
            "total_key_count": 24,
        }
        (folder / "wdinfo.pkl").write_bytes(pickle.dumps(listing))
        return folder

    return write


def both(make):
    return lambda cache, index: make(cache[index]["image_encoded"], cache[index]["captions_encoded"])


@pytest.mark.parametrize("make", [nemo_pickle, nemo_pyd], ids=["pickle", "pyd"])
def test_same_losses_as_from_our_own_cache(world, tars, make):
    folder = tars(make.__name__, both(make))
    named = [f"{DATA}=[{folder}/wdinfo.pkl]", f"model.data.webdataset.local_root_path={folder}", VOUCHED, NO_DROPOUT]
    first = world.losses(world.train("cached", f"ours-{make.__name__}", NO_DROPOUT))
    assert world.losses(world.train("cached", make.__name__, *named)) == first


def test_mlperfs_moments_with_raw_captions(world, tars):
    folder = tars("mlperf", lambda cache, index: mlperf(cache[index]["image_encoded"], caption_of(cache.shards[index])))
    given = ["model.cond_stage_key=captions", "model.first_stage_key=images_moments"]
    first = world.losses(world.train("cached", "raw-captions", *given, f"{DATA}=ROOT/latents"))
    assert world.losses(world.train("cached", "mlperf", *given, f"{DATA}={folder}", VOUCHED)) == first


def test_padding_of_nemos_embedder_is_kept(world, tars, capsys):
    def padded(cache, index):
        text = np.pad(cache[index]["captions_encoded"], ((0, 3), (0, 0)))
        return nemo_pickle(cache[index]["image_encoded"], text, protocol=2)

    run = world.train("cached", "padded", f"{DATA}={tars('padded', padded)}", VOUCHED, NO_DROPOUT)
    assert "text embeddings filled up to 43" in capsys.readouterr().out
    assert Pipeline.from_pretrained(str(run)).spec.cond_stage_config["pad_to"] == 43


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ([], "encodings that do not say what made them"),
        ([VOUCHED], "holds no embedding of the empty prompt, which model.caption_dropout_rate needs"),
        ([VOUCHED, NO_DROPOUT, "model.unet_config.in_channels=5", "model.unet_config.out_channels=5",
          "model.first_stage_config.embed_dim=5", "model.first_stage_config.from_pretrained=null"],
         "image_encoded has shape (8, 8, 8), and unet_config.in_channels wants 10"),
    ],
)  # fmt: skip
def test_refused(world, tars, capsys, changes, line, request):
    folder = tars(f"refused-{request.node.callspec.id}"[:20], both(nemo_pickle))
    assert world.call(*world.command("cached", "wrong", f"{DATA}={folder}", *changes)) == 2
    assert line in capsys.readouterr().err


def test_a_sample_unlike_the_first(tars):
    def odd(cache, index):
        moments = cache[index]["image_encoded"]
        return nemo_pickle(moments[:, : 4 if index == 5 else None], cache[index]["captions_encoded"])

    cache = ForeignCache(ShardSet(tars("odd", odd)))
    assert cache[4]["image_encoded"].shape == (8, 8, 8)
    with pytest.raises(
        BadInput, match=r"t0_r0_0.tar: sample '0005': image_encoded is \[8, 4, 8\] float16, but \[8, 8, 8\]"
    ):
        cache[5]


class Harm:
    def __reduce__(self):
        return (print, ("harm",))


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_and_nothing_else(protocol, capsys):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    read = load_arrays(pickle.dumps({"a_image": array, "n": [1, "x"]}, protocol), "x")
    assert np.array_equal(read["a_image"], array) and read["n"] == [1, "x"]
    for data in (Harm(), {"a": np.array([Harm()])}, np.array([{}])):
        with pytest.raises(BadInput, match=r"x: cannot be read as a pickle of arrays"):
            load_arrays(pickle.dumps(data, protocol), "x")
    with pytest.raises(BadInput, match=r"numpy.*refused"):
        load_plain(pickle.dumps({"a": array}, protocol), "x")
    with pytest.raises(BadInput):
        load_arrays(pickle.dumps(array, protocol)[:-9], "x")
    assert "harm" not in capsys.readouterr().out


@pytest.mark.parametrize("held", [[], {"tar_files": []}, {"tar_files": [1]}, {"tars": ["a.tar"]}])
def test_what_is_no_list_of_tars(tmp_path, held):
    (tmp_path / "wdinfo.pkl").write_bytes(pickle.dumps(held))
    with pytest.raises(BadInput, match="it has no list tar_files of names"):
        read_wdinfo(tmp_path / "wdinfo.pkl")
