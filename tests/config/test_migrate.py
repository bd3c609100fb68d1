"""A config of NeMo's or LDM's rewritten as ours means the same."""

from pathlib import Path

import pytest
import yaml

from latentsmith.cli import main
from latentsmith.config import compose, overrides, schema
from latentsmith.config.explain import migrated
from latentsmith.config.tree import to_plain

FILES = sorted((Path(__file__).parent / "yaml").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_migrated_file_means_the_same(path, tmp_path):
    first = compose(path)
    text = migrated(first, path.name)
    (tmp_path / "mine.yaml").write_text(text)
    again = compose(tmp_path / "mine.yaml")
    assert again.config == first.config
    assert not again.notes  # what has no effect is left out, and said in comments
    assert all(f"#   {note}" in text for note in first.notes)
    for key, value in overrides.leaves(yaml.safe_load(text)).items():
        option = schema.find(key)
        assert not option.filled or option.key != key or value != to_plain(option.default), f"{key} repeats its default"


def test_the_command(tmp_path, capsys):
    assert main(["config", "migrate", str(FILES[0]), "model.optim.lr=3e-5"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# Made from ") and yaml.safe_load(printed)["model"]["optim"]["lr"] == 3e-5
