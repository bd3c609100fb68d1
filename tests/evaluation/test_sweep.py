"""`latentsmith evaluate` from a tiny model to results: generation, guidance, comparison, files, resuming."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import latentsmith
from latentsmith.checkpoints import ModelSpec, export_diffusers
from latentsmith.cli import main
from latentsmith.data.ingest import import_data
from latentsmith.demo.scenes import write_scenes
from latentsmith.evaluation.adherence import scene_of
from latentsmith.evaluation.curve import curve_image
from latentsmith.evaluation.prompts import read_prompts
from latentsmith.files.errors import BadInput
from latentsmith.text.tokenizer import train_vocabulary

SIZES = {
    "unet_config": dict(model_channels=32, channel_mult=[1], num_res_blocks=1, attention_resolutions=[1], num_heads=2,
                        context_dim=32),
    "first_stage_config": dict(embed_dim=4, ddconfig=dict(z_channels=4, ch=32, ch_mult=[1, 2], num_res_blocks=1)),
    "cond_stage_config": dict(width=32, layers=1, heads=2, intermediate_size=64, vocab_size=520, max_length=16,
                              activation="quick_gelu"),
}  # fmt: skip
MODULE = """
import torch
torch.set_num_threads(1)
class Small(torch.nn.Module):
    image_size = 16
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.project = torch.nn.Linear(3 * 16 * 16, 12)
    def forward(self, pixels):
        return self.project(pixels.flatten(1) / 255)
"""
OWN = ["--features", "my_small:Small", "--trust", "--resamples", "10"]


def write_model(folder, seed):
    torch.manual_seed(seed)
    networks = {
        "unet": latentsmith.UNetModel(**SIZES["unet_config"]),
        "vae": latentsmith.AutoencoderKL(**SIZES["first_stage_config"]),
        "text_encoder": latentsmith.ClipTextEncoder(**SIZES["cond_stage_config"]),
    }
    for network in networks.values():  # zero layers would make all prompts one image
        for parameter in network.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    train_vocabulary(["a red circle"], 518, folder.parent / "words")
    words = {file.name: file.read_bytes() for file in (folder.parent / "words").iterdir()}
    parts = {name: dict(network.state_dict()) for name, network in networks.items()}
    export_diffusers(parts, folder, ModelSpec(*SIZES.values(), "epsilon", image_size=8), tokenizer=words)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`model` and `other`, tiny; `scenes`, images with captions; `shards`, the same as a set."""
    folder = tmp_path_factory.mktemp("sweep")
    write_model(folder / "model", 0)
    write_model(folder / "other", 1)
    write_scenes(folder / "scenes", 12, 0)
    import_data(folder / "scenes", folder / "shards")
    (folder / "my_small.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def evaluated(place, out, *words, source="model", metrics="fid,kid"):
    fast = ["--steps", "2", "--sampler", "euler", "--count", "4", "--prompts", str(place / "shards")]
    command = ["evaluate", str(place / source), "--reference", str(place / "shards"), "--out", str(out), *OWN]
    assert main([*command, "--metrics", metrics, *fast, *words]) == 0
    return json.loads((out / "results.json").read_text())


def test_a_sweep_continues_and_gives_the_same_bytes(place, tmp_path, capsys):
    first = evaluated(place, tmp_path, "--guidance", "1,3")
    assert [row["guidance"] for row in first["results"]] == [1, 3]
    assert first["extractors"]["features"]["resize"] == "clean" and first["settings"]["count"] == 4
    names = [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*.png"))]
    assert "images/1/image000003.png" in names and "images/3/image000000.png" in names
    written = (tmp_path / "results.json").read_bytes()
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("image*.png")}
    (tmp_path / "images/3/image000002.png").unlink()
    for chunk in list(tmp_path.rglob("chunk-*.safetensors"))[:2]:
        chunk.unlink()
    evaluated(place, tmp_path, "--guidance", "1,3")
    assert (tmp_path / "results.json").read_bytes() == written
    again = {path: path.stat().st_mtime_ns for path in made}
    assert sum(made[path] != again[path] for path in made) == 1
    page = (tmp_path / "report.html").read_text()
    assert "Values by guidance" in page and "sheets/guidance-3-random.png" in page
    rows = (tmp_path / "results.csv").read_text().splitlines()
    assert rows[0] == "model,guidance,images,metric,value,low,high" and len(rows) == 5
    assert "report.html" in capsys.readouterr().out


def test_two_models_are_compared_on_the_same_prompts_and_seeds(place, tmp_path):
    found = evaluated(place, tmp_path, "--compare", str(place / "other"), metrics="kid")
    ours, theirs = (found[key][0]["values"] for key in ("results", "compared_results"))
    for name, difference in found["differences"][0].items():
        assert difference["value"] == pytest.approx(ours[name]["value"] - theirs[name]["value"])
        assert difference["low"] <= difference["value"] <= difference["high"]
    same = evaluated(place, tmp_path / "same", "--compare", str(place / "model"), metrics="kid")
    assert all(set(each.values()) == {0} for each in same["differences"][0].values())


def test_a_folder_of_images_and_memorised_ones(place, tmp_path):
    """The training images themselves are memorised; all their attributes are right."""
    found = evaluated(place, tmp_path, "--training", str(place / "scenes"), source="scenes", metrics="fid,adherence")
    values = {name: each["value"] for name, each in found["results"][0]["values"].items()}
    assert values["memorised_share"] == 1 and values["adherence"] == values["adherence_colour"] == 1
    assert (tmp_path / "sheets" / "images-memorised.png").exists()


@pytest.mark.slow
def test_two_processes_make_what_one_makes(place, tmp_path):
    one = evaluated(place, tmp_path / "one", metrics="fid")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from latentsmith.cli import main; sys.exit(main(sys.argv[2:]))"
    )
    command = ["evaluate", str(place / "model"), "--reference", str(place / "shards"), "--out", str(tmp_path / "two"),
               *OWN, "--metrics", "fid", "--steps", "2", "--sampler", "euler", "--count", "4",
               "--prompts", str(place / "shards")]  # fmt: skip
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(place), *command],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=600) for process in running] == [0, 0]
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    for name, each in one["results"][0]["values"].items():
        np.testing.assert_allclose(list(two["results"][0]["values"][name].values()), list(each.values()), rtol=1e-10)


def test_nemos_file_runs_to_the_number(place, tmp_path):
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "a.txt").write_text("a red circle\na blue square\na green ring\n")
    nemo = {
        "infer": {"num_images_per_prompt": 1, "height": 16, "width": 16, "inference_steps": 2, "sampler_type": "DDIM"},
        "fid": {"classifier_free_guidance": [1.5, 2], "coco_captions_path": str(tmp_path / "captions"),
                "num_images_to_eval": 3, "save_path": str(tmp_path / "images")},
        "model": {"restore_from_path": str(place / "model")},
    }  # fmt: skip
    (tmp_path / "sd_fid_images.yaml").write_text(yaml.safe_dump(nemo))
    command = ["evaluate", "--config", str(tmp_path / "sd_fid_images.yaml"), "--reference", str(place / "shards")]
    assert main([*command, "--out", str(tmp_path / "out"), *OWN]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["guidance"], row["images"]) for row in found["results"]] == [(1.5, 3), (2, 3)]
    assert (tmp_path / "images" / "1.5" / "image000002.png").exists()


def test_prompts_of_every_source(place, tmp_path):
    (tmp_path / "lines.txt").write_text("one\n\ntwo\n")
    rows = [dict(image_id=9, id=5, caption="later"), dict(image_id=2, id=7, caption=" second\nof 2 "),
            dict(image_id=2, id=3, caption="first of 2")]  # fmt: skip
    (tmp_path / "coco.json").write_text(json.dumps({"annotations": rows}))
    assert read_prompts(tmp_path / "lines.txt") == ["one", "two"]
    assert read_prompts(tmp_path / "coco.json") == ["first of 2", "later"]
    assert read_prompts(place / "shards") == read_prompts(place / "scenes")
    assert len(read_prompts(place / "shards", 5)) == 5
    (tmp_path / "bad.json").write_text('{"annotations": [{"image_id": 1}]}')
    for source, message in (("bad.json", "is not COCO's captions"), ("none", "no such file or folder of prompts")):
        with pytest.raises(BadInput, match=message):
            read_prompts(tmp_path / source)
    with pytest.raises(BadInput, match="holds 2 prompts, 3 are asked for"):
        read_prompts(tmp_path / "lines.txt", 3)


def test_captions_of_the_demo_are_read_back(place):
    prompts = read_prompts(place / "scenes")
    assert len({scene_of(prompt) for prompt in prompts}) > 1
    with pytest.raises(BadInput, match="is no caption of the demo's scenes"):
        scene_of("a photo of a cat")


def test_a_curve_is_drawn_through_its_points():
    image = np.asarray(curve_image([(0.2, 30), (0.25, 20), (0.3, 24)], "CLIP score", "fid"))
    assert (image == (194, 65, 12)).all(axis=-1).sum() > 500
    assert curve_image([(1, 1), (1, 1)], "x", "y").size == (720, 480)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--from is missing"),
        (["{place}/model", "--from", "x"], "give one source"),
        (["{place}/model", "--reference", "{place}/shards"], "a checkpoint generates from prompts"),
        (["{place}/scenes", "--reference", "{place}/shards", "--guidance", "2"], "leave --guidance out"),
        (["{place}/scenes", "--guidance", "a"], "--guidance a: give numbers"),
        (["{place}/scenes", "--preset", "x"], "--preset x: there is one, mlperf"),
        (["{place}/scenes", "--preset", "mlperf", "--reference", "{place}/shards"], "clip: name the model"),
        (["{place}/scenes"], "metrics fid: compares with real images"),
        (["{place}/scenes", "--metrics", "adherence", "--training", "{place}/scenes"], "--training compares features"),
    ],
)
def test_bad_input_is_one_line(place, tmp_path, capsys, words, message):
    given = [word.format(place=place) for word in words]
    assert main(["evaluate", *given, "--out", str(tmp_path / "out"), *OWN]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_grey_images_alone_have_no_prompts(place, tmp_path, capsys):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    assert main(["evaluate", str(tmp_path), "--metrics", "adherence", "--out", str(tmp_path / "out")]) == 2
    assert "a.png has no prompt; give --prompts" in capsys.readouterr().err
