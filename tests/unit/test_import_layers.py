"""Who may import whom. Lazy imports inside functions count, and so do importlib.import_module("…") calls."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_srpo.algorithms.section import NAMES

PACKAGE = "megatron_srpo"
ROOT = Path(__file__).resolve().parents[2] / PACKAGE

EVERYTHING = None
BASE = {"core", "config", "families"}
# Rooms (a module or a folder directly under the package) and what they may import; all others, future ones included,
# may import BASE and what is in their own folder.
ALLOWED = {
    "core": set(),
    "algorithms": {"core"},
    "families": {"core"},
    "config": {"core", "algorithms", "families"},
    "losses": BASE | {"algorithms"},
    "batching": BASE | {"algorithms"},
    "observe": BASE | {"algorithms"},
    "plan": BASE | {"algorithms"},
    "trainer": BASE | {"batching", "observe"},
    "conversion": BASE | {"bridge", "mcore", "checkpoints"},  # Hugging Face's names in Megatron's files
    "comparison": BASE | {"batching", "bridge", "mcore", "rollout"},
    "environments": BASE | {"data", "rollout"},  # conversations are token streams, and engines continue them
    "rollout": BASE | {"bridge"},  # engines load and verify what the bridge exports
    "run": EVERYTHING,  # builds the parts and starts them
    "api": BASE | {"conversion", "observe", "run"},
    "entry": {"core", "run"},  # the beginning of every program
    "commands": BASE | {"bridge", "comparison", "conversion", "data", "observe", "rewards", "run"},  # programs
    "torchrun": {"entry"},  # the name by which users start it
    "__main__": {"entry"},
}
# Foreign packages that only these places may import; everything else is tested without them.
FOREIGN = {
    "megatron": ("mcore/",),
    "vllm": ("rollout/vllm/",),
    "wandb": ("observe/",),
}


def imported_modules(source: str, module: str, *, is_package: bool) -> set[str]:
    """Dotted names of everything that `source`, the module `module`, imports anywhere; absolute."""
    found: set[str] = set()
    base = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = base[: len(base) - node.level + 1] if node.level else []
            origin = ".".join([*parts, *([node.module] if node.module else [])])
            # `from package import name`: the name may be a module.
            found.update({f"{origin}.{alias.name}" for alias in node.names} | {origin})
        elif isinstance(node, ast.Call) and _is_dynamic_import(node.func) and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                found.add(name.value)
    return found


def _is_dynamic_import(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("import_module", "__import__")


def violations(path: str, source: str) -> list[str]:
    """What the file at `path`, relative to the package, imports and may not."""
    parts = Path(path).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join([PACKAGE, *(parts[:-1] if is_package else parts)])
    unit = parts[0]
    allowed = ALLOWED.get(unit, BASE)
    problems = []
    for name in sorted(imported_modules(source, module, is_package=is_package)):
        top, _, rest = name.partition(".")
        sibling = rest.partition(".")[0]
        if top == PACKAGE and sibling and (ROOT / sibling).with_suffix(".py").exists() | (ROOT / sibling).is_dir():
            if allowed is not EVERYTHING and sibling != unit and sibling not in allowed:
                problems.append(f"{path} imports {name}; {unit} may import {sorted(allowed) or 'no sibling'}")
        elif top in FOREIGN and not path.startswith(FOREIGN[top]):
            problems.append(f"{path} imports {name}; only {' and '.join(FOREIGN[top])} may")
    return problems


FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES)
def test_a_module_imports_only_what_its_layer_may(path):
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_the_package_itself_imports_nothing_heavy():
    source = (ROOT / "__init__.py").read_text(encoding="utf-8")
    heavy = {"torch", "megatron", "vllm", "transformers", "wandb", PACKAGE}
    tops = {name.partition(".")[0] for name in imported_modules(source, PACKAGE, is_package=True)}
    assert not tops & heavy


@pytest.mark.parametrize(
    ("path", "source", "offender"),
    [
        ("routing.py", "from megatron_srpo.batching.packing import plan_batch", "packing"),
        ("algorithms/routing.py", "from megatron_srpo import trainer", "trainer"),
        ("core/records.py", "import megatron_srpo.config", "no sibling"),
        ("trainer.py", "def f():\n    from megatron_srpo.mcore.step import x", "mcore"),
        ("bridge/export.py", "from ..algorithms.routing import route", "algorithms"),
        ("observe/__init__.py", "from .. import batching", "batching"),
        ("trainer.py", "def f():\n    import megatron.core.optimizer", "megatron.core"),
        ("mcore/step.py", "import vllm", "vllm"),
        ("bridge/rules.py", "from vllm import LLM", "vllm"),
        ("rollout/fleet.py", "from vllm import LLM", "vllm"),
        ("families/llama.py", "import megatron_srpo.config", "config"),
        ("algorithms/routing.py", "import importlib\nimportlib.import_module('wandb')", "wandb"),
        ("trainer.py", "class A:\n    def f(self):\n        if 1:\n            import wandb.sdk", "wandb.sdk"),
    ],
)
def test_a_forbidden_import_is_found(path, source, offender):
    assert any(offender in problem for problem in violations(path, source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "algorithms/routing.py",
            "import torch\nfrom megatron_srpo.core.records import Prompt\nfrom megatron_srpo.algorithms import base",
        ),
        ("observe/observer.py", "from megatron_srpo.observe.metrics import JsonlWriter\nfrom . import report"),
        ("trainer.py", "from megatron_srpo.batching.passes import BatchPasses"),
        ("run/launch.py", "from megatron_srpo.mcore.policy import Policy"),
        ("mcore/step.py", "from megatron.core import parallel_state"),
        ("rollout/vllm/weight_loader.py", "import vllm"),
        ("observe/trackers.py", "def f():\n    import wandb"),
        ("config/schema.py", "from megatron_srpo import __version__"),
    ],
)
def test_an_allowed_import_is_not_found(path, source):
    assert violations(path, source) == []


@pytest.mark.parametrize("path", [path for path in FILES if not path.startswith("rollout/")])
def test_engines_are_imported_from_the_package_rollout_alone(path):
    """So that another engine beside vLLM is the work of one room."""
    parts = Path(path).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join([PACKAGE, *(parts[:-1] if is_package else parts)])
    found = imported_modules((ROOT / path).read_text(encoding="utf-8"), module, is_package=is_package)
    assert not [name for name in found if name.startswith(f"{PACKAGE}.rollout.vllm")]


def test_the_configuration_is_read_without_torch():
    """A wrong configuration is refused in the first second."""
    code = "import sys, megatron_srpo.config, megatron_srpo.families; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent).returncode == 0


def algorithm_names(source: str) -> list[str]:
    """Texts in `source` that are the name of an algorithm."""
    texts = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return [text for text in texts if text in NAMES]


@pytest.mark.parametrize("path", [path for path in FILES if not path.startswith("algorithms/")])
def test_nothing_outside_the_algorithms_asks_for_an_algorithms_name(path):
    found = algorithm_names((ROOT / path).read_text(encoding="utf-8"))
    # The name of a run is the project's by default.
    assert found == (["srpo"] if path == "config/schema.py" else []), f"{path} names {found}"


def test_a_name_of_an_algorithm_is_found():
    assert algorithm_names("if algorithm.name != 'grpo':\n    pass") == ["grpo"]


def test_one_room_alone_may_import_everything():
    assert [room for room, allowed in ALLOWED.items() if allowed is EVERYTHING] == ["run"]


def test_few_parameters_have_the_type_any():
    """Autograd's context and Megatron's and vLLM's untyped objects. `object` is better for what is only passed on."""
    found = [
        f"{path}:{node.lineno} {node.name}({argument.arg})"
        for path in FILES
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if isinstance(argument.annotation, ast.Name) and argument.annotation.id == "Any"
    ]
    assert len(found) < 30, "\n".join(found)


def test_the_loop_is_short_enough_to_be_read_at_once():
    assert (ROOT / "trainer.py").read_text(encoding="utf-8").count("\n") < 150
