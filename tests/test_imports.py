"""Who may import whom, read from the syntax trees. Any other import between packages fails."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "latentsmith"
MAY_IMPORT = {
    "files": set(),
    "models": {"architectures"},
    "diffusion": set(),
    "cpu": set(),
    "text": {"files"},
    "config": {"files", "architectures", "precision", "image_request"},
    "checkpoints": {"files", "models", "text", "config", "architectures", "precision", "diffusion", "progress"},
    "adapters": {"files", "models", "text", "checkpoints", "architectures", "precision", "diffusion", "progress"},
    "data": {
        "files",
        "models",
        "text",
        "config",
        "architectures",
        "precision",
        "diffusion",
        "checkpoints",
        "cpu",
        "progress",
        "units",
        "processes",
    },
    "inference": {
        "files",
        "models",
        "diffusion",
        "checkpoints",
        "adapters",
        "text",
        "config",
        "cpu",
        "precision",
        "processes",
        "progress",
        "architectures",
        "image_request",
    },
    "evaluation": {
        "files",
        "models",
        "checkpoints",
        "text",
        "config",
        "data",
        "inference",
        "demo",
        "architectures",
        "precision",
        "processes",
        "progress",
        "html_report",
        "image_request",
    },
    "training": {
        "adapters",
        "files",
        "models",
        "diffusion",
        "checkpoints",
        "text",
        "config",
        "cpu",
        "data",
        "inference",
        "evaluation",
        "precision",
        "processes",
        "progress",
        "units",
        "html_report",
        "architectures",
    },
    "server": {"files", "diffusion", "checkpoints", "inference", "image_request"},
    "demo": {
        "files",
        "models",
        "diffusion",
        "checkpoints",
        "text",
        "config",
        "cpu",
        "data",
        "inference",
        "training",
        "evaluation",
        "processes",
        "progress",
        "units",
        "html_report",
    },
    "cli": {
        "files",
        "config",
        "models",
        "checkpoints",
        "adapters",
        "data",
        "inference",
        "training",
        "demo",
        "evaluation",
        "server",
        "cpu",
        "text",
        "precision",
        "progress",
        "image_request",
    },
}
HEAVY = {"torch", "lightning", "numpy", "diffusers", "transformers"}


def modules(package: str) -> list[Path]:
    return sorted((PACKAGE / package).rglob("*.py"))


def imports(path: Path, tree: ast.AST) -> set[str]:
    """Full names of what is imported anywhere under `tree`; relative imports are resolved."""
    package = path.relative_to(PACKAGE.parent).parent.parts
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{stem}.{alias.name}" for alias in node.names}
    return found


def packages_imported(path: Path) -> set[str]:
    names = imports(path, ast.parse(path.read_text()))
    return {name.split(".")[1] for name in names if name.startswith("latentsmith.")}


def runs_at_import(tree: ast.Module) -> ast.Module:
    """The module without the bodies of its functions and without `if TYPE_CHECKING`."""
    kept = [
        node
        for node in tree.body
        if not isinstance(node, ast.FunctionDef)
        and not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    ]
    return ast.Module(kept, [])


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_they_may(package):
    assert modules(package), f"no such package: {package}"
    for path in modules(package):
        wrong = packages_imported(path) - MAY_IMPORT[package] - {package, "__version__"}
        assert not wrong, f"{path.relative_to(PACKAGE)} imports {wrong}; {package} may import {MAY_IMPORT[package]}"


def test_every_package_is_listed():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(MAY_IMPORT)


@pytest.mark.parametrize("package", ["diffusion", "models", "files", "inference"])
def test_only_training_and_runs_know_lightning(package):
    for path in modules(package):
        assert not any(name.startswith("lightning") for name in imports(path, ast.parse(path.read_text()))), path


@pytest.mark.parametrize("package", ["config", "cli"])
def test_config_and_cli_import_nothing_heavy(package):
    for path in [*modules(package), PACKAGE / "__init__.py"]:
        names = imports(path, runs_at_import(ast.parse(path.read_text())))
        assert not {name.split(".")[0] for name in names} & HEAVY, path
        ours = {name.split(".")[1] for name in names if name.startswith("latentsmith.")}
        assert ours <= {"config", "files", "cli", "architectures", "precision", "image_request", "cpu"}, path


def test_imports_of_every_form_are_found(tmp_path):
    """The test itself: absolute, relative and hidden imports are all found."""
    path = PACKAGE / "models" / "unet.py"
    tree = ast.parse("from ..training import ema\nimport latentsmith.cli.train\ndef f():\n    from .layers import x\n")
    found = imports(path, tree)
    assert found == {"latentsmith.training.ema", "latentsmith.cli.train", "latentsmith.models.layers.x"}
