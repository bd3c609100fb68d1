"""Who may import whom, read from the syntax trees. Any other arrow between rooms fails."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "latentsmith"
ROOMS = ("files", "diffusion", "checkpoints", "models", "data", "evaluation", "inference", "training")
MAY_IMPORT = {
    "files": set(),
    "diffusion": set(),
    "checkpoints": {"files"},
    "models": {"checkpoints", "files"},
    "data": {"files"},
    "evaluation": {"files"},
    "inference": {"diffusion", "models", "checkpoints", "files"},
    "training": set(ROOMS),
    "config": set(ROOMS),
    "runs": {*ROOMS, "config"},
    "cli": {"config", "runs", "files"},
}
HEAVY = {"torch", "lightning", "numpy", "diffusers", "transformers"}


def modules(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py"))


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


def rooms_imported(path: Path) -> set[str]:
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


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_what_they_may(room):
    assert modules(room), f"no such room: {room}"
    for path in modules(room):
        wrong = rooms_imported(path) - MAY_IMPORT[room] - {room, "__version__"}
        assert not wrong, f"{path.relative_to(PACKAGE)} imports {wrong}; {room} may import {MAY_IMPORT[room]}"


def test_every_room_is_listed():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(MAY_IMPORT)


@pytest.mark.parametrize("room", ["diffusion", "models", "files", "checkpoints", "data", "inference"])
def test_only_training_and_runs_know_lightning(room):
    for path in modules(room):
        assert not any(name.startswith("lightning") for name in imports(path, ast.parse(path.read_text()))), path


@pytest.mark.parametrize("room", ["config", "cli"])
def test_config_and_cli_import_nothing_heavy(room):
    for path in [*modules(room), PACKAGE / "__init__.py"]:
        names = imports(path, runs_at_import(ast.parse(path.read_text())))
        assert not {name.split(".")[0] for name in names} & HEAVY, path
        ours = {name.split(".")[1] for name in names if name.startswith("latentsmith.")}
        assert ours <= {"config", "files", "cli"}, path


def test_the_reader_of_arrows_sees_them(tmp_path):
    """The test itself: absolute, relative and hidden imports are all found."""
    path = PACKAGE / "models" / "unet.py"
    tree = ast.parse("from ..training import ema\nimport latentsmith.runs.train\ndef f():\n    from .layers import x\n")
    found = imports(path, tree)
    assert found == {"latentsmith.training.ema", "latentsmith.runs.train", "latentsmith.models.layers.x"}
