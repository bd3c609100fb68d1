"""Hub names: from the cache when there is no network, one line when there is neither."""

import os
import subprocess
import sys

import pytest

from latentsmith.files.errors import BadInput
from latentsmith.files.hub import local_or_hub, published


def snapshot(cache, name, files):
    """A repository as huggingface_hub's cache lays it out."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
    inside = folder / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    for file in files:
        (inside / file).parent.mkdir(parents=True, exist_ok=True)
        (inside / file).write_text("{}")
    return inside


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_name_is_its_cached_snapshot(cache):
    inside = snapshot(cache, "owner/sd", ["model_index.json", "unet/diffusion_pytorch_model.safetensors"])
    assert local_or_hub("owner/sd") == inside
    pickled = snapshot(cache, "owner/old", ["unet/diffusion_pytorch_model.bin"])
    assert local_or_hub("owner/old") == pickled


def test_a_cached_branch_that_stands_in_for_main_is_named(cache):
    inside = snapshot(cache, "owner/sd", ["unet/diffusion_pytorch_model.safetensors"])
    refs = inside.parent.parent / "refs"
    (refs / "main").rename(refs / "fp16")
    with pytest.warns(UserWarning, match="owner/sd: its main revision is not cached; using revision fp16"):
        assert local_or_hub("owner/sd") == inside
    (refs / "fp16").unlink()
    with pytest.warns(UserWarning, match="using revision 0123456789abcdef"):
        local_or_hub("owner/sd")


def test_halves_where_there_is_nothing_else(cache):
    inside = snapshot(cache, "owner/half", ["unet/diffusion_pytorch_model.fp16.safetensors"])
    assert local_or_hub("owner/half") == inside


def test_what_is_fetched(cache, monkeypatch):
    inside = snapshot(cache, "owner/sd", ["unet/diffusion_pytorch_model.safetensors"])
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: asked.append(how) or str(inside))
    for weights in ("ema", "raw"):
        local_or_hub("owner/sd", weights)
    averaged, raw = (how["ignore_patterns"] for how in asked)
    assert "*.fp16.*" in averaged and "*.fp16.*" in raw
    assert "*.non_ema.*" in averaged and "*.non_ema.*" not in raw


def test_paths_stay_paths(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/missing", "weights.ckpt", "some/model.nemo", "/a/b", "a/b/c", str(tmp_path)):
        assert str(local_or_hub(path)) == path


def test_what_is_not_there_is_one_line(cache):
    with pytest.raises(BadInput, match="nobody/nothing: no such file, and not on the hub or in"):
        local_or_hub("nobody/nothing")
    snapshot(cache, "owner/empty", ["config.json"])
    with pytest.raises(BadInput, match=r"owner/empty: its snapshot in .* has no weights of a known name"):
        local_or_hub("owner/empty")


@pytest.mark.parametrize(
    ("variables", "folder"),
    [({"HF_HUB_CACHE": "a"}, "a"), ({"HF_HOME": "b"}, "b/hub"), ({"XDG_CACHE_HOME": "c"}, "c/huggingface/hub")],
)
def test_the_cache_is_where_the_hubs_own_library_has_it(tmp_path, variables, folder):
    unset = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {name: str(tmp_path / value) for name, value in variables.items()}
    code = "from latentsmith.files.hub import hub_cache; print(hub_cache())"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(tmp_path / folder)


def test_versions_of_text_encoders(tmp_path):
    file = tmp_path / "open_clip_pytorch_model.bin"
    file.touch()
    assert published(str(file)) == str(file)
    assert published("laion2b_s32b_b79k") == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert published("openai/clip-vit-large-patch14") == "openai/clip-vit-large-patch14"
    assert published("a tag of mine") is None is published(None)
