"""Inference files of NeMo are configs like any other: composed, validated, explained and migrated by one table."""

from pathlib import Path

import pytest

from latentsmith.cli import main
from latentsmith.config import compose, load_config
from latentsmith.config.explain import explain, migrated
from latentsmith.config.nemo_inference import read_infer
from latentsmith.files.errors import BadInput

FILES = sorted((Path(__file__).parent / "yaml_infer").glob("*.yaml"))
FID, INFER, LORA = FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_composes_and_migrates(path, tmp_path):
    first = compose(path)
    assert first.is_inference and all(" has no effect here: " in note for note in first.notes)
    (tmp_path / "mine.yaml").write_text(migrated(first, path.name))
    assert not compose(tmp_path / "mine.yaml").notes
    assert read_infer(tmp_path / "mine.yaml") == read_infer(path)
    assert main(["config", "validate", str(path)]) == 0


def test_what_generate_reads():
    found = read_infer(INFER, ["model.restore_from_path=sd.nemo"])
    assert found.pop("prompts") == ["a red circle", "a blue square"]
    assert found == {
        "guidance_scale": 7.5, "count": 4, "batch_size": 8, "height": 512, "width": 512, "num_inference_steps": 25,
        "sampler": "DPM",
        "negative_prompt": "", "eta": 0, "out": "stable-diffusion", "seed": 123, "source": "sd.nemo", "dtype": "fp16",
    }  # fmt: skip
    fid = read_infer(FID)
    assert fid["fid"]["classifier_free_guidance"] == [1.5, 2, 8] and fid["out"] == "output"
    assert "guidance_scale" not in fid and "prompts" not in fid
    assert read_infer(LORA)["prompts"] == ["a red circle"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("infer.inference_steps=0", "infer.inference_steps must be a whole number of at least 1, not 0"),
        ("infer.inferense_steps=3", "did you mean infer.inference_steps?"),
        ("model.optim.lr=1", "model.optim.lr has no effect on generating; the checkpoint decides. Drop it"),
        ("model.peft.restore_from_path=a.nemo", "model.peft.restore_from_path=a.nemo is refused"),
        ("model.unet_config.from_pretrained=a.ckpt", "model.unet_config.from_pretrained is not read for generating"),
        ("~fid.save_path", "fid.save_path is missing; give it there"),
    ],
)
def test_what_it_refuses(change, line):
    with pytest.raises(BadInput) as caught:
        read_infer(FID if "fid" in change else INFER, ["infer.out_path=x", change])
    assert line in str(caught.value)


def test_only_generate_takes_them():
    with pytest.raises(BadInput, match="is an inference file; generate with it: latentsmith generate"):
        load_config(INFER)
    with pytest.raises(BadInput, match="has no section `infer`"):
        read_infer("demo")
    assert "generate --guidance-scale" in explain("infer")


def test_a_training_starts_from_nemos_restore_from_path():
    assert load_config("sd1", ["model.restore_from_path=a.nemo"]).model.ckpt_path == "a.nemo"
    text = migrated(compose("sd1", ["model.restore_from_path=a.nemo"]), "x")
    assert "ckpt_path: a.nemo" in text and "restore_from_path" not in text


def test_a_node_can_be_another(tmp_path):
    path = tmp_path / "a.yaml"
    node = "{train: {augmentations: {resize_smallest_side: 64}}, validation: {augmentations: NODE}}"
    path.write_text("model: {data: " + node.replace("NODE", "'${model.data.train.augmentations}'") + "}")
    composed = compose(path, ["model.data.train.augmentations.horizontal_flip=true"])
    augmentations = composed.config.model.data.validation.augmentations
    assert augmentations.steps() == {"resize_smallest_side": 64, "horizontal_flip": True}
    assert composed.origins["model.data.validation.augmentations.horizontal_flip"] == "a.yaml"
    with pytest.raises(BadInput, match=r"augmentations is .* as a whole; change that, or give all of it"):
        compose(path, ["model.data.validation.augmentations.horizontal_flip=true"])
    path.write_text("model: {data: " + node.replace("NODE", "'${model.data.nothing}'") + "}")
    with pytest.raises(BadInput, match=r"a.yaml: model.data.validation.augmentations cannot be resolved"):
        compose(path)
