"""What `import saekit` costs, which way imports run, and which names are public."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import saekit

PACKAGE = Path(saekit.__file__).parent

# Each layer may import from those before it, and from its own.
LAYERS = [
    {"errors"},
    {"files", "embedded"},
    {"locks"},
    {"lm"},
    {"sites", "text", "unwrapped"},
    {"tokens"},
    {"activation_cache", "activations", "sae"},
    {"evaluation"},
    {"steering"},
    {"lens"},
    {"catalog"},
    {"training.config", "training.schedules", "training.checkpoint", "training.tracking"},
    {
        "training.control",
        "training.frame",
        "training.resample",
        "training.trainer",
        "training.optimizer",
        "training.parallel",
    },
    {"members", "recipe"},
    {
        "training.run",
        "training.report",
        "training.trainee",
        "training.origin",
        "training.dry_run",
        "training.shapes",
        "training.language_model",
        "training.sample",
    },
    {"experiments"},
    {"console", "display", "server"},
    {"demo"},
    {"cli", "__main__", "__init__"},
]


def layer(module: str) -> int:
    """The layer of a module such as `saekit.catalog.build`."""
    name = module.removeprefix("saekit.")
    for number, names in enumerate(LAYERS):
        if any(name == n or name.startswith(f"{n}.") for n in names):
            return number
    if name in ("saekit", "training", "catalog"):
        return 0
    raise AssertionError(f"{module} has no layer: put it where it belongs in {__file__}")


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """(module, inside a function or TYPE_CHECKING) of every saekit import in a file."""
    found = []
    tree = ast.parse(path.read_text("utf-8"))
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("saekit"):
            names = (
                [f"{node.module}.{a.name}" for a in node.names] if node.module == "saekit" else [node.module]
            )
            found += [(str(name), id(node) not in top) for name in names]
    return found


def test_imports_run_downward() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        if module == "saekit":
            continue
        for target, deferred in imports_of(path):
            if not deferred and layer(target) > layer(module):
                wrong.append(f"{module} imports {target}")
    assert not wrong


def test_catalog_steering_and_lenses_need_no_training_code() -> None:
    for part in ("catalog", "steering", "lens", "evaluation", "sae"):
        for path in (PACKAGE / part).rglob("*.py"):
            assert not [t for t, _ in imports_of(path) if t.startswith("saekit.training")], path


@pytest.mark.parametrize("heavy", ["sae_lens", "transformers", "wandb", "torch", "matplotlib"])
def test_import_saekit_pulls_in_nothing_heavy(heavy: str) -> None:
    code = f"import sys, saekit; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_import_saekit_takes_under_a_second() -> None:
    """Of its processor's time, start of Python included: what a neighbour takes is not counted."""
    code = "import saekit, time; print(time.process_time())"
    seconds = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3)]
    assert min(seconds) < 1.0


def test_public_names_resolve() -> None:
    for name in saekit.__all__:
        assert getattr(saekit, name) is not None
    assert set(saekit.__all__) <= set(dir(saekit))
    with pytest.raises(AttributeError, match="no attribute 'Catalogue'"):
        _ = saekit.Catalogue
