import pytest

from latentsmith.config import explain, load_config, schema
from latentsmith.files.errors import BadInput


@pytest.mark.parametrize("option", schema.table().values(), ids=lambda option: option.key)
def test_each_option_is_whole(option):
    """Explained, and its own default is one of its values (interpolated defaults apart)."""
    assert option.meaning and option.value_type.words
    interpolated = isinstance(option.default, str) and "${" in option.default
    if option.default is None:
        assert option.value_type.nullable or not option.filled
    elif not interpolated:
        assert option.value_type.read(option.default) == option.default


def test_no_option_is_also_a_group():
    assert not set(schema.table()) & schema.groups()


def test_every_other_name_leads_to_its_option():
    for option in schema.table().values():
        for name in option.aliases:
            assert schema.nearest(f"{option.parent}.{name}".strip(".")) in {
                found.key for found in schema.table().values() if name in (*found.aliases, found.leaf)
            }


def test_find():
    assert schema.find("exp_manager.wandb_logger_kwargs.project").key == "exp_manager.wandb_logger_kwargs"
    assert schema.find("model.optim.lr.x") is None and schema.find("model.optim") is None


def test_refused_takes_its_default_alone():
    option = schema.table()["model.learn_logvar"]
    assert option.read(False, "f") is False
    with pytest.raises(BadInput, match=r"f: model.learn_logvar=True is refused: .*; leave it at false"):
        option.read(True, "f")


def test_explain():
    assert explain.explain("model.optim.lr").splitlines() == [
        "model.optim.lr",
        "  meaning  learning rate after warm-up (NeMo's null was 1e-3)",
        "  value    a number of at least 0",
        "  default  0.0001",
        "  status   used",
    ]
    assert "model.optim.sched.min_lr=0.0" in explain.explain("model.optim")
    assert len(explain.explain().splitlines()) == len(schema.table())
    with pytest.raises(BadInput, match=r"did you mean model\.optim\.lr"):
        explain.explain("model.optim.learning_rate")


def test_reference_page_lists_every_option_once():
    rows = [line for line in explain.reference_page().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(schema.table())
    widths = {option.key: 3 if option.status == "used" else 2 for option in schema.table().values()}
    assert all(row.count(" | ") == widths[row.split("`")[1]] for row in rows)


def test_diff():
    lines = explain.diff(load_config("sd1"), load_config("sd1", ["model.optim.lr=1"]))
    assert lines == ["model.optim.lr: 0.0001 -> 1.0"]
