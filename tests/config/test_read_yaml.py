"""Files that are small on disk and large in memory are refused before they are built; so is the environment."""

import pytest

from latentsmith.config import load_config, to_yaml
from latentsmith.files.errors import BadInput

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (BOMB, "my.yaml: more than 20,000 keys and values, those of aliases counted each time"),
        ("name: [" + "x, " * 30_000 + "x]", "my.yaml: more than 20,000 keys and values"),
        ("model: " + "[" * 2000 + "]" * 2000, "my.yaml: more than 50 levels of nesting"),
        ("model: {seed: " + "9" * 30_000 + "}", "my.yaml: 99999999999999999999... is a number of more than 20 digits"),
        ("model: {seed: 0x" + "f" * 40 + "}", "is a number of more than 20 digits"),
        ("a: &a [*a]", "my.yaml: *a refers to nothing before it, or to what it is inside"),
    ],
)
def test_more_than_a_config_can_need(tmp_path, text, line):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(BadInput) as caught:
        load_config(tmp_path / "my.yaml")
    assert line in str(caught.value) and len(str(caught.value)) < 200


def test_long_text_of_digits_is_text(tmp_path):
    (tmp_path / "my.yaml").write_text(f"name: '{'7' * 40}'")
    assert load_config(tmp_path / "my.yaml").name == "7" * 40


def test_aliases_are_fine(tmp_path):
    (tmp_path / "my.yaml").write_text(
        "model: {data: {train: {augmentations: &a {center_crop_h_w: 64}}, validation: {augmentations: *a}}}"
    )
    data = load_config(tmp_path / "my.yaml").model.data
    assert data.validation.augmentations == data.train.augmentations


@pytest.mark.parametrize(
    "text",
    [
        "name: ${oc.env:SECRET}",
        "name: run-${oc.env:SECRET,none}",
        "name: ${oc.${model.monitor}:SECRET}\nmodel: {monitor: env}",
        "name: ${oc.decode:${oc.env:SECRET}}",
        "model: {optim: '${oc.env:SECRET}'}",
    ],
)
def test_the_environment_stays_out_of_a_config(tmp_path, monkeypatch, text):
    monkeypatch.setenv("SECRET", "token-123")
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(BadInput, match=r"\$\{oc\.env:\.\.\.\} is refused: it would write the environment") as caught:
        load_config(tmp_path / "my.yaml")
    assert "token-123" not in str(caught.value) and "\n" not in str(caught.value)


def test_other_code_still_has_its_resolver(monkeypatch):
    from omegaconf import OmegaConf

    monkeypatch.setenv("SECRET", "token-123")
    load_config("demo")
    assert OmegaConf.create({"a": "${oc.env:SECRET}"}).a == "token-123"


def test_text_that_looks_like_a_number_keeps_its_spelling(tmp_path):
    """YAML reads 1.10 as 1.1, so that a run would resume another one's folder."""
    (tmp_path / "my.yaml").write_text(
        "name: 1.10\n"
        "trainer: {max_time: 10:12:00:00, precision: 16, max_steps: 1_000}\n"
        "exp_manager: {exp_dir: 0x10}\n"
        "model: {scale_factor: 1e-1, data: {train: {dataset_path: [2024.50, a]}},\n"
        "  first_stage_config: {target: ldm.models.autoencoder.AutoencoderKL, params: {from_pretrained: 007}}}"
    )
    config = load_config(tmp_path / "my.yaml")
    assert (config.exp_manager.name, config.exp_manager.exp_dir) == ("1.10", "0x10")
    assert (config.trainer.max_time, config.trainer.precision, config.trainer.max_steps) == (
        "10:12:00:00",
        "16-mixed",
        1000,
    )
    assert config.model.data.train.dataset_path == ("2024.50", "a") and config.model.scale_factor == 0.1
    assert config.model.first_stage_config.from_pretrained == "007"
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
