import ast
import inspect
from pathlib import Path
from typing import get_type_hints

import pytest

from latentsmith.config import explain, load_config, nemo_inference, network_arguments, schema
from latentsmith.config.data_options import AspectBucketsConfig, AugmentationsConfig
from latentsmith.config.inference_options import InferConfig, InferenceConfig
from latentsmith.config.model_options import CondStageConfig, DDConfig, FirstStageConfig, LossConfig, UNetConfig
from latentsmith.config.run_options import Config
from latentsmith.data.buckets import Buckets
from latentsmith.data.transforms import APPLY
from latentsmith.files.errors import BadInput
from latentsmith.image_request import OPTIONS, descriptions
from latentsmith.models import AutoencoderKL, ClipTextEncoder, UNetModel
from latentsmith.models.autoencoder import VaeSizes
from latentsmith.training.losses import ReconstructionLoss

PACKAGE = Path(schema.__file__).parents[1]
KEYWORDS_OF = {  # sections that are passed as the keywords of a class
    UNetConfig: UNetModel,
    FirstStageConfig: AutoencoderKL,
    DDConfig: VaeSizes,
    LossConfig: ReconstructionLoss,
    CondStageConfig: ClipTextEncoder,
    AspectBucketsConfig: Buckets,
}
READ_BY_NAME = {  # sections that are read as mappings, and the tables of their keys
    AugmentationsConfig: set(APPLY),
    InferConfig: {*nemo_inference.KEYWORDS, *(option.nemo for option in OPTIONS.values())},
}
OF_NODES = {"_target_", *network_arguments.SOURCES}


@pytest.mark.parametrize("option", schema.table().values(), ids=lambda option: option.key)
def test_each_option_is_whole(option):
    """Explained, and its own default is one of its values (interpolated defaults apart)."""
    assert option.meaning and option.value_type.description
    interpolated = isinstance(option.default, str) and "${" in option.default
    if option.default is None:
        assert option.value_type.nullable or not option.filled
    elif not interpolated:
        assert option.value_type.read(option.default) == option.default


def sections(section):
    """Yield every section and those inside it."""
    yield section
    for annotation in get_type_hints(section).values():
        if inner := schema.section_of(annotation):
            yield from sections(inner)


def names_read():
    """Return the names that code outside config/ reads: attributes (not of `self`), and keys of mappings."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        nodes = () if path.is_relative_to(PACKAGE / "config") else ast.walk(ast.parse(path.read_text("utf-8")))
        for node in nodes:
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) != "self":
                names.add(node.attr)
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                names.add(node.slice.value)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("getattr", ".get")):
                names |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return names


def test_every_option_is_read():
    """An option that no code reads changes nothing, without a word."""
    names, unread = names_read(), []
    for section in {*sections(Config), *sections(InferenceConfig)}:
        read = READ_BY_NAME.get(section, names)
        if section in KEYWORDS_OF:
            read = read | OF_NODES | set(inspect.signature(KEYWORDS_OF[section]).parameters)
        unread += [f"{section.__name__}.{name}" for name in descriptions(section) if name not in read]
    assert not unread


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
