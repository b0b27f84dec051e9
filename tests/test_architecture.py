"""The floors of the house, kept over the import statements of the package.

Each rule takes the modules of the package and returns its complaints. The rules run
twice: over the package, where they must be silent, and over a small house with one
planted fault each, where they must not be.

A new module in `_nn` or `_engine` needs no line here. A new room, beside `supervised`
and `density`, needs a row in `MAY_IMPORT`.
"""

import ast
import re
import sys
import tomllib
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "skode"

# A room is a module or a package right under `skode`; "skode" itself is the face.
_FRONT = {
    "_nn",
    "_border",
    "_conditions",
    "_marginals",
    "_parameters",
    "_training",
    "_training_series",
    "_training_table",
    "_conditioning",
    "_units",
    "_series",
    "exceptions",
}
MAY_IMPORT = {
    "skode": {
        "supervised",
        "density",
        "forecast",
        "display",
        "odeint",
        "exceptions",
    },
    "supervised": _FRONT,
    "density": _FRONT,
    "forecast": _FRONT,
    "display": {"_border"},
    "odeint": {"_engine", "_odeint", "exceptions"},
    "_odeint": {"_engine", "exceptions"},
    "_border": {"exceptions"},
    "_conditions": {"_border"},
    "_marginals": set(),
    "_series": {"exceptions"},
    "_parameters": {"_border", "_nn", "_training"},
    "_training": {"exceptions"},
    "_training_series": {"_nn", "_parameters", "_series", "_units"},
    "_training_table": {"_border", "_nn", "_parameters"},
    "_conditioning": {"_series"},
    "_units": {"_border", "_series"},
    "_nn": {"_engine", "exceptions"},
    "_engine": {"exceptions"},
    "exceptions": set(),
}
# One module may do what its room may not.
MAY_ALSO_IMPORT = {
    f"skode._nn.{name}": {"_series"}
    for name in ("latent", "latent_training", "recognition", "backtest")
}

# Inside a package, from the top floor down. What stands on one floor does not know its
# neighbours. A module that is not named may stand anywhere, as long as no chain of
# imports through it leads up or sideways.
FLOORS = {
    "_engine": [
        {"solve"},
        {"adjoint", "reversible", "borrowed"},
        {"loop", "pair_loop"},
        {"step", "control", "dense"},
        {"tableau", "solution"},
    ],
    "_marginals": [{"preprocessing"}, {"column"}, {"mixture"}],
    "_series": [
        {"layout", "batch"},
        {"history", "places", "target"},
        {"clock"},
        {"columns"},
    ],
    "_odeint": [
        {"discrete", "theirs"},
        {"call", "failure", "kept"},
        {"layout"},
    ],
    "_nn": [
        {"flow_training", "latent_training", "backtest"},
        {"ode_net", "flow", "latent"},
        {"flow_field", "recognition", "baseline"},
        {"residual"},
        {"divergence", "fields", "integration"},
    ],
}

# The modules of a room that other rooms may import; all, where it has no line.
DOORS = {
    "_engine": {"solve", "solution", "kernel", "layers", "observer", "grid"},
    "_marginals": {"preprocessing"},
    "_series": {"layout", "history", "batch"},
}

_ARRAYS = {"numpy", "pandas", "polars", "scipy", "sklearn"}
STRANGERS = {
    "_engine": {*_ARRAYS, "torch.nn", "tqdm"},
    "_nn": _ARRAYS,
    "_odeint": _ARRAYS,
    "odeint": _ARRAYS,
    "_training": _ARRAYS,
    "_marginals": {"torch", "pandas", "sklearn"},
    "_series": {"torch.nn", "torch.optim"},
    "exceptions": {*_ARRAYS, "torch"},
}

# What may be missing, and who has it at hand if it is there itself.
OPTIONAL = {
    "matplotlib": "matplotlib",
    "triton": "skode._engine.tiles",
    "skode._engine.tiles": "skode._engine.tiles",
}

NAMES_THAT_SAY_NOTHING = {"utils", "misc", "helpers", "common", "base"}


@dataclass(frozen=True)
class Import:
    importer: str  # the module in which the statement stands
    module: str  # `a.b` in `import a.b` and in `from a.b import c`; dots if relative
    name: str  # `c` in `from a.b import c`, else empty
    line: int
    late: bool  # inside a function

    @property
    def target(self) -> str:
        """The longest path that the statement spells."""
        return f"{self.module}.{self.name}" if self.name else self.module

    def __str__(self) -> str:
        what = f"{self.name} from {self.module}" if self.name else self.module
        return f"{self.importer}, line {self.line}, imports {what}"


@dataclass(frozen=True)
class House:
    trees: dict[str, ast.Module]  # by the module's full name

    @property
    def imports(self) -> list[Import]:
        return [
            found
            for module, tree in self.trees.items()
            for found in imports_below(tree, module)
        ]

    @property
    def inner(self) -> list[tuple[Import, str]]:
        """The imports of the package's own modules, each with the module's name."""
        pairs = []
        for found in self.imports:
            if within(found.module, PACKAGE):
                is_module = found.target in self.trees
                pairs.append((found, found.target if is_module else found.module))
        return pairs

    @property
    def graph(self) -> dict[str, set[str]]:
        graph: dict[str, set[str]] = {module: set() for module in self.trees}
        for found, target in self.inner:
            graph[found.importer].add(target)
        return graph


def imports_below(node: ast.AST, importer: str, late: bool = False) -> list[Import]:
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                found.append(Import(importer, alias.name, "", child.lineno, late))
        elif isinstance(child, ast.ImportFrom):
            module = "." * child.level + (child.module or "")
            for alias in child.names:
                found.append(Import(importer, module, alias.name, child.lineno, late))
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        found += imports_below(child, importer, late or inside)
    return found


def read_house() -> House:
    trees = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[module] = ast.parse(path.read_text(encoding="utf-8"))
    return House(trees)


def within(module: str, parent: str) -> bool:
    return module == parent or module.startswith(f"{parent}.")


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else PACKAGE


def every_room_is_in_the_plan(house: House) -> list[str]:
    rooms = {room_of(module) for module in house.trees}
    return [f"{room} has no row in MAY_IMPORT" for room in rooms - MAY_IMPORT.keys()]


def imports_point_down(house: House) -> list[str]:
    complaints = []
    for found, target in house.inner:
        here, there = room_of(found.importer), room_of(target)
        allowed = MAY_IMPORT.get(here, set()) | MAY_ALSO_IMPORT.get(
            found.importer, set()
        )
        if there not in {here, *allowed}:
            complaints.append(f"{found}; {here} may import {sorted(allowed)}")
    return complaints


def rooms_are_entered_by_the_door(house: House) -> list[str]:
    complaints = []
    for found, target in house.inner:
        room = room_of(target)
        doors = {f"{PACKAGE}.{room}.{door}" for door in DOORS.get(room, ())}
        if doors and room != room_of(found.importer) and target not in doors:
            complaints.append(f"{found}; the doors are {sorted(doors)}")
    return complaints


def no_circles(house: House) -> list[str]:
    try:
        TopologicalSorter(house.graph).prepare()
    except CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def floors_inside_a_package(house: House) -> list[str]:
    graph = house.graph
    complaints = []
    for package, floors in FLOORS.items():
        height = {
            f"{PACKAGE}.{package}.{name}": -depth
            for depth, names in enumerate(floors)
            for name in names
        }
        complaints += [
            f"{upper} reaches {lower}, which does not stand below it"
            for upper in height.keys() & graph.keys()
            for lower in reachable(graph, upper) & height.keys() - {upper}
            if height[lower] >= height[upper]
        ]
    return complaints


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    front = {start}
    while front:
        front = {there for here in front for there in graph.get(here, ())} - seen
        seen |= front
    return seen


def strangers_stay_out(house: House) -> list[str]:
    return [
        f"{found}; {room_of(found.importer)} must not know {stranger}"
        for found in house.imports
        for stranger in STRANGERS.get(room_of(found.importer), ())
        if within(found.target, stranger)
    ]


def only_declared_packages(house: House) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = project["dependencies"] + extras["plot"] + extras["gpu"]
    names = {re.match(r"[\w.-]+", requirement)[0] for requirement in declared}
    known = {name.replace("scikit-learn", "sklearn") for name in names}
    known |= {*sys.stdlib_module_names, PACKAGE}
    return [
        f"{found}, which pyproject.toml does not declare"
        for found in house.imports
        if not found.module.startswith(".") and found.module.split(".")[0] not in known
    ]


def private_sklearn_enters_through_the_border(house: House) -> list[str]:
    return [
        str(found)
        for found in house.imports
        if within(found.module, "sklearn") and room_of(found.importer) != "_border"
        if re.search(r"\._(?!_)", found.target)
    ]


def imports_are_absolute_and_named(house: House) -> list[str]:
    return [
        str(found)
        for found in house.imports
        if found.module.startswith(".") or found.name == "*"
    ]


def only_what_is_optional_comes_late(house: House) -> list[str]:
    """It must come late, since it may be missing; nothing else has a reason to.

    `tiles` needs triton, so that only its own modules import it at their top.
    """
    return [
        f"{found}, {'late' if found.late else 'at the top of the module'}"
        for found in house.imports
        if found.late
        != any(
            within(found.target, optional) and not within(found.importer, room)
            for optional, room in OPTIONAL.items()
        )
    ]


def inner_packages_have_empty_faces(house: House) -> list[str]:
    packages = {module.rpartition(".")[0] for module in house.trees} - {"", PACKAGE}
    return [
        f"{package}/__init__.py holds more than a docstring"
        for package in packages & house.trees.keys()
        if house.trees[package].body[
            ast.get_docstring(house.trees[package]) is not None :
        ]
    ]


def names_say_something(house: House) -> list[str]:
    return [
        module
        for module in house.trees
        if module.rpartition(".")[2].strip("_") in NAMES_THAT_SAY_NOTHING
    ]


RULES = [
    every_room_is_in_the_plan,
    imports_point_down,
    rooms_are_entered_by_the_door,
    no_circles,
    floors_inside_a_package,
    strangers_stay_out,
    only_declared_packages,
    private_sklearn_enters_through_the_border,
    imports_are_absolute_and_named,
    only_what_is_optional_comes_late,
    inner_packages_have_empty_faces,
    names_say_something,
]


@pytest.fixture(scope="module")
def house():
    return read_house()


def test_the_package_is_found(house):
    assert {"skode", "skode._engine.solve", "skode._nn.fields"} <= house.trees.keys()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule, house):
    assert rule(house) == []


SOUND = {
    "skode": "from skode.supervised import ODEClassifier",
    "skode.supervised": "from sklearn.base import BaseEstimator\n"
    "from skode import _border\n"
    "from skode._nn.ode_net import ODENet",
    "skode.display": "def plot():\n    import matplotlib.pyplot as plt",
    "skode._border": "import numpy, torch\n"
    "from sklearn.utils._param_validation import Interval\n"
    "from skode.exceptions import SolverError",
    "skode._nn": '"""Fields and nets."""',
    "skode._nn.ode_net": "from torch import nn\n"
    "from skode._engine.solve import solve\n"
    "from skode._nn.fields import MLPField",
    "skode._nn.fields": "from torch import nn",
    "skode._engine": "",
    "skode._engine.solve": "from skode._engine import loop, tableau",
    "skode._engine.loop": "from skode._engine.step import step",
    "skode._engine.norm": "import torch",
    "skode._engine.step": "from skode._engine.tableau import Tableau",
    "skode._engine.control": "from skode._engine.norm import rms",
    "skode._engine.tableau": "from dataclasses import dataclass",
    "skode.exceptions": "",
}


def build(sources: dict[str, str]) -> House:
    return House({module: ast.parse(source) for module, source in sources.items()})


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_sound_house_keeps_the_rule(rule):
    assert rule(build(SOUND)) == []


@pytest.mark.parametrize(
    ("rule", "module", "fault"),
    [
        (every_room_is_in_the_plan, "skode.attic", ""),
        (imports_point_down, "skode._engine.step", "import skode._nn.fields"),
        (imports_point_down, "skode._nn.fields", "from skode import ODEClassifier"),
        (imports_point_down, "skode._nn.fields", "from skode import _series"),
        (imports_point_down, "skode.density", "from skode.supervised import x"),
        (imports_point_down, "skode._training", "from skode._engine.solve import x"),
        (
            rooms_are_entered_by_the_door,
            "skode._nn.fields",
            "from skode._engine import loop",
        ),
        (no_circles, "skode._engine.tableau", "from skode._engine import step"),
        (no_circles, "skode._engine.tableau", "from skode._engine.tableau import a"),
        (
            floors_inside_a_package,
            "skode._engine.control",
            "import skode._engine.step",
        ),
        (
            floors_inside_a_package,
            "skode._engine.norm",
            "def rms():\n    from skode._engine import step",
        ),
        (strangers_stay_out, "skode._engine.step", "from torch import nn"),
        (strangers_stay_out, "skode._engine.step", "import torch.nn.functional as F"),
        (strangers_stay_out, "skode._nn.fields", "import numpy as np"),
        (strangers_stay_out, "skode._training", "from sklearn.utils import shuffle"),
        (only_declared_packages, "skode.density", "import polars"),
        (
            private_sklearn_enters_through_the_border,
            "skode.density",
            "from sklearn.base import _fit_context",
        ),
        (
            private_sklearn_enters_through_the_border,
            "skode.density",
            "import sklearn.utils._tags",
        ),
        (imports_are_absolute_and_named, "skode._nn.fields", "from . import flow"),
        (imports_are_absolute_and_named, "skode._nn.fields", "from math import *"),
        (only_what_is_optional_comes_late, "skode.display", "import matplotlib"),
        (
            only_what_is_optional_comes_late,
            "skode._border",
            "class A:\n    def f(self):\n        if 1:\n            import math",
        ),
        (inner_packages_have_empty_faces, "skode._nn", '"""Nets."""\nimport math'),
        (names_say_something, "skode._engine.utils", ""),
    ],
)
def test_the_rule_sees_a_planted_fault(rule, module, fault):
    planted = {**SOUND, module: f"{SOUND.get(module, '')}\n{fault}"}
    assert rule(build(planted))
