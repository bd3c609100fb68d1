"""What is imported is declared in pyproject.toml, and what is declared is imported."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from latentsmith.config.model_options import LIBRARY_OPTIMIZERS

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "tests", "examples", "benchmarks")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
DISTRIBUTIONS = {  # of modules whose distribution has another name
    "PIL": "pillow",
    "hydra": "hydra-core",
    "lycoris": "lycoris-lora",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
IMPORTED_BY_OTHERS = {"tensorboard": "torch.utils.tensorboard"}  # needed by this module, which the package imports
READS_FORMS = {"python-multipart"}  # of starlette
PLUGINS = {"s3fs", "gcsfs", "aiohttp"}  # fsspec finds them by an address's protocol
TOOLS = {"ruff", "mypy", "pytest-cov", "pytest-xdist", "types-pyyaml"}  # of the Makefile


def normalised(name: str) -> str:
    return name.lower().replace("_", "-")


def declared(*extras: str) -> set[str]:
    """Return the distributions of these extras; without any, those that the package needs."""
    optional = PROJECT["optional-dependencies"]
    requirements = [line for extra in extras for line in optional[extra]] if extras else PROJECT["dependencies"]
    return {normalised(re.match(r"[A-Za-z0-9_.-]+", requirement)[0]) for requirement in requirements}


def modules_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [node.module]
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
        return [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
    return []


def imported(folder: str) -> set[str]:
    """Return the distributions whose modules are imported, wherever in a file."""
    own = {path.stem for folder in FOLDERS[1:] for path in (ROOT / folder).rglob("*.py")} | {"latentsmith"}
    nodes = (node for path in (ROOT / folder).rglob("*.py") for node in ast.walk(ast.parse(path.read_text("utf-8"))))
    found = {module.split(".")[0] for node in nodes for module in modules_of(node)}
    return {DISTRIBUTIONS.get(name, normalised(name)) for name in found - sys.stdlib_module_names - own}


def test_the_package_declares_what_it_imports():
    assert imported("src") - declared() == declared("parquet", "evaluation", "serve") - READS_FORMS
    assert declared("remote") == PLUGINS
    assert declared("optimizers") == {package for _, package in LIBRARY_OPTIMIZERS.values()}


def test_the_package_imports_what_it_declares():
    assert declared() - imported("src") == set(IMPORTED_BY_OTHERS)
    sources = "".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py"))
    assert all(module in sources for module in IMPORTED_BY_OTHERS.values())


@pytest.mark.parametrize("folder", FOLDERS[1:])
def test_the_rest_imports_what_is_declared(folder):
    assert imported(folder) <= declared() | declared("dev") | declared("remote")


def test_what_is_declared_for_development_is_used():
    assert declared("dev") - set().union(*map(imported, FOLDERS)) == TOOLS | READS_FORMS
