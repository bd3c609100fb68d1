"""Interpolations that double at every step are refused before one is resolved."""

import pytest
import yaml

from latentsmith.config import load_config
from latentsmith.config.interpolation_limits import check_interpolations
from latentsmith.files.errors import BadInput

KWARGS = "exp_manager.wandb_logger_kwargs"


def use(key):
    """The interpolation of a key."""
    return "${" + key + "}"


def chain(form, length=40):
    """A mapping of which each value uses the next one, in the given form."""
    links = {f"k{index}": form(f"{KWARGS}.k{index + 1}", f"k{index + 1}") for index in range(length)}
    return links | {f"k{length}": "x"}


def load(tmp_path, kwargs):
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({"exp_manager": {"wandb_logger_kwargs": kwargs}}))
    return load_config(tmp_path / "my.yaml").exp_manager.wandb_logger_kwargs


@pytest.mark.parametrize(
    "form",
    [
        lambda key, _: use(key) + use(key),
        lambda _, name: use(f".{name}") + "-" + use(f".{name}"),
        lambda key, _: [use(key), use(key)],
        lambda key, _: {"a": use(key), "b": use(key)},
        lambda key, _: use(f"oc.select:{key}") + use(f"oc.select:'{key}'"),
        lambda key, _: use(f"{key}.{use('.last')}") * 2,
    ],
    ids=["absolute", "relative", "list", "mapping", "resolver", "nested"],
)
def test_doubling_is_refused_in_one_line(tmp_path, form):
    with pytest.raises(BadInput, match=r"my\.yaml: .* its interpolations stand for more than 20,000 values") as caught:
        load(tmp_path, chain(form))
    assert "\n" not in str(caught.value)


def test_long_chains_are_refused_and_short_ones_resolved(tmp_path):
    with pytest.raises(BadInput, match="more than 50 interpolations refer to each other"):
        load(tmp_path, chain(lambda key, _: use(key), 2000))
    assert load(tmp_path, chain(lambda key, _: use(key) * 2, 4))["k0"] == "x" * 16


def test_each_use_counts_what_it_uses():
    many = {"a": list(range(5000)), "b": ["${a}"] * 2}
    check_interpolations(many, "f")
    with pytest.raises(BadInput, match=r"f: b: its interpolations"):
        check_interpolations(many | {"b": ["${a}"] * 4}, "f")


def test_long_texts_count_by_their_length():
    with pytest.raises(BadInput, match="f: b: its interpolations"):
        check_interpolations({"a": "x" * 1_000_000, "b": "${a}" * 20}, "f")


def test_circles_are_named_as_before(tmp_path):
    with pytest.raises(BadInput, match="cannot be resolved"):
        load(tmp_path, {"a": "${.b}", "b": "${.a}"})
