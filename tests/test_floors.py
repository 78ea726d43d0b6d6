"""Imports point down only, and heavy libraries stay where the map says."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "pipeline"
FLOORS = {
    0: [
        "episode",
        "functional",
        "inner",
        "solvers",
        "annotations",
        "errors",
        "paired",
        "calibration",
    ],
    1: [
        "blocks",
        "backbones",
        "pretrained",
        "engine",
        "heads.*",
        "metrics",
        "figures",
        "inside_figures",
        "plots",
        "data.pool",
        "data.episodes",
        "data.transforms",
    ],
    2: ["data.loaders", "data.datamodule", "data.regression"],
    3: ["learners.*", "progress"],
    4: [
        "compose",
        "processes",
        "signature",
        "keys",
        "trainer",
        "config",
        "checkpoints",
        "sources",
        "scoreboard",
        "tables",
        "seen",
        "stored",
        "trained",
        "classifier",
        "adapted",
        "adapted_pictures",
        "serving",
        "serving_learner",
        "onnx_export",
        "reporting",
        "inside",
        "tested",
        "leaderboard",
        "sections",
        "html",
        "pages",
        "contact_sheet",
        "trial",
        "uploads",
        "plan",
        "overview",
        "tracking.*",
    ],
    5: [
        "train",
        "sweep",
        "study.*",
        "evaluate",
        "adapt",
        "register",
        "report",
        "survey",
        "demo",
        "demo_page",
        "ui",
        "cli",
        "__main__",
    ],
}
ALLOWED = {  # library -> the floors or modules that may import it
    "mlflow": {"tracking"},
    "optuna": {"study"},
    "hydra": {"compose", "config", "sources", "plan", "overview", "stored"},
    "omegaconf": {4, 5},
    "pytorch_lightning": {2, 3, 4, 5},
    "matplotlib": {"figures", "inside_figures"},
    "plotly": {"plots", "pages"},
    "scipy": {"paired"},
    "gradio": {"demo", "demo_page"},
}
LIGHT = ["train", "sweep", "evaluate", "adapt", "register", "report", "survey", "demo", "ui", "cli", "compose", "processes", "__main__",
         "__init__"]  # fmt: skip


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {
    module_name(p): p for p in ROOT.rglob("*.py") if not module_name(p).endswith(".__init__")
}


def floor(module: str) -> int:
    for number, names in FLOORS.items():
        if module in names or f"{module.partition('.')[0]}.*" in names:
            return number
    if module.startswith("data."):
        return 1  # one data set a file
    raise AssertionError(f"pipeline/{module}.py stands on no floor: give it one")


def imports(path: Path, top_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    checking = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in tree.body if top_only else ast.walk(tree):
        if node in checking:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name.removeprefix("pipeline.") in MODULES}
    return found


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"__init__"}))
def test_imports_point_down(module):
    for name in imports(MODULES[module]):
        if name.startswith("pipeline.") and name.removeprefix("pipeline.") in MODULES:
            other = name.removeprefix("pipeline.")
            assert floor(other) <= floor(module), f"{module} imports {other} from a floor above"
        library = name.partition(".")[0]
        if library in ALLOWED:
            places = ALLOWED[library]
            where = {module, module.partition(".")[0], floor(module)}
            assert where & places, f"{module} imports {library}"


@pytest.mark.parametrize("module", LIGHT)
def test_commands_start_light(module):
    heavy = {"torch", "torchvision", "pytorch_lightning", "mlflow", "pandas", "matplotlib", "numpy"}
    top = imports(MODULES[module] if module in MODULES else ROOT / f"{module}.py", top_only=True)
    assert not {name.partition(".")[0] for name in top} & heavy
    reached = {n.removeprefix("pipeline.") for n in top if n.startswith("pipeline.")}
    assert reached <= {*LIGHT, "errors"}


def test_no_learner_imports_another_but_its_parent():
    parents = {"learners.base", "learners.embedding", "learners.gradient"}
    for module, path in MODULES.items():
        if module.startswith("learners.") and module != "learners.evaluation":
            used = {n.removeprefix("pipeline.") for n in imports(path)}
            assert {n for n in used if n.startswith("learners.")} <= parents
