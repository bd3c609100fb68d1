"""What `inspect` says of each sort of path, and that --verify names the damaged file."""

import json

import numpy as np
import pytest
import torch

from latentsmith.checkpoints import ModelSpec, export_ldm
from latentsmith.cli import main
from latentsmith.data.cache_writer import Encoders, write_cache
from latentsmith.data.ingest import import_data
from latentsmith.data.shards import ShardSet
from latentsmith.data.transforms import Transforms
from latentsmith.demo.scenes import write_scenes
from latentsmith.files.hashing import hash_file
from latentsmith.files.tensors import open_tensors, save_safetensors
from latentsmith.models import AutoencoderKL, ClipTextEncoder, UNetModel

UNET = dict(model_channels=32, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[1], num_heads=2)
UNET |= dict(context_dim=32)
VAE = dict(embed_dim=4, ddconfig=dict(z_channels=4, ch=32, ch_mult=[1, 2], num_res_blocks=1))
TEXT = dict(width=32, layers=2, heads=2, intermediate_size=64, activation="quick_gelu", vocab_size=520, max_length=16)
SPEC = ModelSpec(UNET, VAE, TEXT, "v_prediction", image_size=8)


@pytest.fixture(scope="module")
def networks():
    return {"unet": UNetModel(**UNET), "vae": AutoencoderKL(**VAE), "text_encoder": ClipTextEncoder(**TEXT)}


@pytest.fixture
def ldm_file(tmp_path, networks):
    path = tmp_path / "m.safetensors"
    export_ldm({name: dict(network.state_dict()) for name, network in networks.items()}, path, SPEC)
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder / "images", 6, 0)
    import_data(folder / "images", folder / "shards", samples_per_shard=4)
    return folder / "shards"


@pytest.fixture
def run(tmp_path, networks):
    """A run folder as training leaves it: two checkpoints, the frozen parts once."""
    folder = tmp_path / "run"
    for step in (5, 10):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        metadata = {"latentsmith.spec": SPEC.to_json()}
        for name in ("unet", "ema/unet"):
            save_safetensors(checkpoint / f"{name}.safetensors", dict(networks["unet"].state_dict()), metadata)
        checksums = {name: hash_file(checkpoint / name) for name in ("unet.safetensors", "ema/unet.safetensors")}
        state = {"global_step": step, "consumed_samples": 8 * step, "ema_updates": {"unet": step}}
        (checkpoint / "state.json").write_text(json.dumps({**state, "checksums": checksums}))
    for name in ("vae", "text_encoder"):
        save_safetensors(folder / f"{name}.safetensors", dict(networks[name].state_dict()))
    (folder / "config.yaml").write_text("name: little\ntrainer: {max_steps: 20}\n")
    (folder / "metrics.csv").write_text("step,loss\n5,0.5\n10,0.25\n")
    return folder


def inspected(capsys, path, *options):
    code = main(["inspect", str(path), *options])
    return code, capsys.readouterr().out.splitlines()


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_whole_model(capsys, ldm_file, networks):
    code, lines = inspected(capsys, ldm_file, "--verify")
    assert code == 0 and lines[0] == f"{ldm_file}: LDM file"
    assert lines[1] == "  model     sizes of its own, prediction v_prediction (its own metadata)"
    for name, line in zip(("unet", "vae", "text_encoder"), lines[2:5], strict=True):
        count = sum(parameter.numel() for parameter in networks[name].parameters())
        tensors = len(networks[name].state_dict()) + (name == "text_encoder")  # LDM stores position_ids, too
        assert line.split()[0] == name and f" {tensors} tensors, {count:,} parameters, float32" in line
    text = "\n".join(lines)
    assert "  not used  12 schedule" in text and "modelspec.prediction_type v" in text
    assert "missing" not in text and "unknown" not in text
    assert lines[-1].startswith("verified: ") and lines[-1].endswith(" tensors are finite")


def test_keys_that_lack_or_exceed_are_named(capsys, tmp_path, ldm_file):
    file = open_tensors(ldm_file)
    tensors = dict(file)
    tensors["model.diffusion_model.out.2.weight_2"] = tensors.pop("model.diffusion_model.out.2.weight")
    save_safetensors(tmp_path / "odd.safetensors", tensors, file.metadata)
    _, lines = inspected(capsys, tmp_path / "odd.safetensors")
    assert "  unet: 1 keys missing (out.2.weight)" in lines
    assert "  unet: 1 keys unknown (model.diffusion_model.out.2.weight_2)" in lines


def test_sizes_that_nobody_states_are_said_to_be_unchecked(capsys, tmp_path, ldm_file):
    save_safetensors(tmp_path / "bare.safetensors", dict(open_tensors(ldm_file)))
    _, lines = inspected(capsys, tmp_path / "bare.safetensors")
    assert any(line.startswith("  keys not checked: ") and "head counts" in line for line in lines)
    assert "prediction unknown (nothing in the file tells)" in lines[1]


def test_values_that_are_not_finite_are_damage(capsys, tmp_path, ldm_file):
    file = open_tensors(ldm_file)
    tensors = {name: tensor.clone() for name, tensor in file.items()}
    tensors["first_stage_model.quant_conv.bias"][2] = torch.nan
    save_safetensors(tmp_path / "nan.safetensors", tensors, file.metadata)
    code, lines = inspected(capsys, tmp_path / "nan.safetensors", "--verify")
    assert code == 1
    assert any("damaged: " in line and "first_stage_model.quant_conv.bias holds values" in line for line in lines)


def test_a_set_of_shards(capsys, shards):
    code, lines = inspected(capsys, shards, "--verify")
    assert code == 0 and lines[0].startswith(f"{shards}: 6 samples in 2 shards, ")
    assert {"txt", "json"} < set(lines[1].replace(",", "").split())
    caption = ShardSet(shards)[0].text("txt")
    assert lines[2] == f"  captions  {caption}"
    assert lines[-2:] == ["  set aside 0 at import", "verified: 2 files"]


def test_a_damaged_shard_is_named(capsys, tmp_path, shards):
    for file in shards.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    flip(tmp_path / "shard-000001.tar", 600)
    code, lines = inspected(capsys, tmp_path, "--verify")
    assert code == 1
    assert f"damaged: {tmp_path / 'shard-000001.tar'}: not as it was written" in lines
    assert lines[-1] == "verified: 2 files, 1 damaged"


def test_one_tar_and_a_pattern(capsys, shards):
    for path, count in ((shards / "shard-000001.tar", 2), (shards / "shard-{000000..000001}.tar", 6)):
        code, lines = inspected(capsys, path, "--verify")
        assert code == 0 and f": {count} samples in " in lines[0]
        assert lines[-1] == "verified: nothing, there are no checksums without set.json"


@pytest.mark.parametrize("with_tars", [True, False])
def test_a_remote_json_found_in_data_deletes_and_fetches_nothing(capsys, tmp_path, shards, with_tars):
    """A folder from elsewhere whose remote.json claims to be a local copy of a remote set, beside a user's set."""
    mine, hostile = tmp_path / "mine", tmp_path / "hostile"
    mine.mkdir()
    hostile.mkdir()
    for file in shards.iterdir():
        (mine / file.name).write_bytes(file.read_bytes())
    if with_tars:
        for name in ("shard-000001.tar", "shard-000001.index.npy"):
            (hostile / name).write_bytes((shards / name).read_bytes())
    sizes = {path.name: 1 for path in shards.glob("*.tar")}
    about = {"url": f"file://{shards}", "sizes": sizes, "whole": True, "limit": 0}
    (hostile / "remote.json").write_text(json.dumps(about))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, lines = inspected(capsys, hostile)
    assert (code, bool(lines)) == ((0, True) if with_tars else (2, False))
    assert not with_tars or lines[0].startswith(f"{hostile}: 2 samples in 1 shards, ")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["../../../secret", "/etc/hostname"])
def test_a_state_json_names_files_of_its_checkpoint_alone(capsys, run, name):
    state_file = run / "checkpoints" / "step-00000010" / "state.json"
    state = json.loads(state_file.read_text())
    state_file.write_text(json.dumps({**state, "checksums": {name: "0" * 32}}))
    assert main(["inspect", str(run), "--verify"]) == 2
    assert f"names '{name}', which is not a file of this checkpoint" in capsys.readouterr().err


def test_a_latent_cache(capsys, tmp_path, shards):
    encoders = Encoders(
        images=lambda images: np.zeros((len(images), 8, 4, 4), np.float32),
        captions=lambda texts: np.zeros((len(texts), 16, 32), np.float32),
        fingerprints={"vae": "abc"},
        versions={"torch": "9"},
    )
    write_cache(ShardSet(shards), tmp_path / "cache", Transforms(center_crop_h_w=(32, 32)), encoders)
    code, lines = inspected(capsys, tmp_path / "cache", "--verify")
    assert code == 0 and lines[0].startswith(f"{tmp_path / 'cache'}: latent cache, 6 samples in 2 shards, ")
    assert lines[1:3] == ["  image_encoded (8, 4, 4) float16", "  captions_encoded (16, 32) float16"]
    assert "  made with vae abc" in lines and lines[-1] == "verified: 2 files"


def test_a_run_folder(capsys, run):
    code, lines = inspected(capsys, run, "--verify")
    assert code == 0 and lines[:3] == [
        f"{run}: run little, 2 checkpoints",
        "  last row  step 10, loss 0.25",
        "  newest    step-00000010: step 10 of 20, 80 samples seen, averages of unet",
    ]
    assert "prediction v_prediction (its own metadata)" in lines[3]
    assert [line.split()[0] for line in lines[4:7]] == ["unet", "vae", "text_encoder"]
    assert lines[-1] == "verified: 4 files"


def test_damage_and_loss_in_a_run_are_named(capsys, run):
    old, new = (run / "checkpoints" / f"step-{step:08d}" for step in (5, 10))
    flip(old / "unet.safetensors", -9)
    (new / "ema" / "unet.safetensors").unlink()
    code, lines = inspected(capsys, run, "--verify")
    assert code == 1 and lines[-3:] == [
        f"damaged: {old / 'unet.safetensors'}: not as it was written",
        f"damaged: {new / 'ema' / 'unet.safetensors'}: missing",
        "verified: 4 files, 2 damaged",
    ]
    code, lines = inspected(capsys, new, "--verify")
    assert code == 1 and lines[-1] == "verified: 2 files, 1 damaged"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", "is empty"), (b"hello, this is no checkpoint", "is neither safetensors nor")],
)
def test_what_is_none_of_these_is_bad_input(capsys, tmp_path, content, message):
    path = tmp_path / "x.bin"
    if content is not None:
        path.write_bytes(content)
    assert main(["inspect", str(path)]) == 2
    assert message in capsys.readouterr().err
