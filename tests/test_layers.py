"""The rooms of the house and who may call whom: each layer imports only from those above it."""

import ast
import re
import tomllib
from pathlib import Path

import fqdiff

ROOT = Path(fqdiff.__file__).parent
LAYERS = [
    {"errors"},
    {"groups"},
    {"rng", "digests", "configs", "memory", "methods"},
    {"diffusion"},
    {"models", "quant", "evidence"},
    {"values", "context", "distributed"},
    {"viz", "fisher", "preview", "sensitivity", "calibration"},
    {"planning"},
    {"stages"},
    {"store"},
    {"pipeline"},
    {"chains", "report", "treatment"},
    {"sweep"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports_of(path: Path) -> set[str]:
    """Dotted names of the fqdiff modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fqdiff":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "fqdiff"}
    return found


def module_files() -> dict[Path, str]:
    files = {p: p.relative_to(ROOT).parts[0].removesuffix(".py") for p in ROOT.rglob("*.py")}
    return {p: room for p, room in files.items() if room not in ("__init__", "__main__")}


def test_every_module_has_its_layer() -> None:
    assert set(module_files().values()) == LEVEL.keys()


def test_the_picture_of_the_house_has_these_rooms_in_this_order() -> None:
    page = (ROOT.parent / "docs" / "contributing.md").read_text()
    picture = page.partition("```text\n")[2].partition("```")[0]
    rows = [line.split("│") for line in picture.splitlines() if line.count("│") >= 3 or line.startswith("▲")]
    assert [set(row[-3].split()) for row in rows] == LAYERS
    listed = [set(re.findall(r"[a-z]+", row)) for row in re.findall(r"^\| `([a-z ]+)` \|", page, re.MULTILINE)]
    assert listed == LAYERS


def test_imports_go_upwards_only() -> None:
    wrong = []
    for path, room in module_files().items():
        for name in imports_of(path):
            other = name.split(".")[1] if "." in name else room
            if other in LEVEL and other != room and LEVEL[other] >= LEVEL[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_stages_never_import_each_other() -> None:
    for path in (ROOT / "stages").glob("*.py"):
        assert not [name for name in imports_of(path) if name.startswith("fqdiff.stages")], path


def test_only_the_store_opens_paths() -> None:
    """Stages and all above them get values; none of them names pathlib or calls open."""
    for path, room in module_files().items():
        if LEVEL[room] < LEVEL["store"]:
            tree = ast.parse(path.read_text())
            calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
            assert "open" not in calls, path
            assert "pathlib" not in path.read_text(), path


def test_only_the_command_line_prints() -> None:
    for path, room in module_files().items():
        if room != "cli":
            tree = ast.parse(path.read_text())
            assert not [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "print"], path


def test_nothing_unpickles() -> None:
    for path in module_files():
        text = path.read_text()
        assert "torch.load" not in text, path
        assert "pickle.load" not in text, path
        assert "import pickle" not in text, path
        assert "np.load(" not in text, path


def test_torchvision_is_imported_in_one_place() -> None:
    importing = [p.name for p in module_files() if "import torchvision" in p.read_text()]
    assert importing == ["torchvision.py"]


def test_every_package_is_installed() -> None:
    """Rejects a wheel without a folder that the source tree has: from a checkout nobody sees that it is missing."""
    listed = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT.parent) for path in ROOT.rglob("__init__.py")}
    assert {".".join(folder.parts) for folder in folders} | {"fqdiff.checkpoints"} == set(listed)
