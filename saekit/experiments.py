"""Experiments that a recipe describes: run, and what came of them in the run's folder.

checkpoints/<name>/  recipe.yaml · additions.json · additions.png
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from saekit.files import staged
from saekit.lm import load_model
from saekit.recipe import AdditionsRecipe, write_recipe
from saekit.steering.additions import Additions, activation_additions, read_text

FOLDER = Path("checkpoints")


def run_additions(
    recipe: AdditionsRecipe, folder: Path = FOLDER, progress: Callable[[str], object] | None = None
) -> tuple[Additions, Path]:
    """Run the activation-additions experiment; its folder, whole or not there, replaces an earlier one of the name.

    Raises `FileMissing` for a text that is not there, and what `activation_additions` raises.
    """
    wanted = recipe.activation_additions
    topic, other = read_text(wanted.topic), read_text(wanted.other)
    model = load_model(recipe.model, dtype=recipe.dtype, device=recipe.device)
    found = activation_additions(
        model,
        topic,
        other,
        positive=wanted.positive,
        negative=wanted.negative,
        sites=wanted.sites,
        coefficients=wanted.coefficients,
        progress=progress,
    )
    place = folder / recipe.name
    with staged(place) as building:
        write_recipe(building / "recipe.yaml", recipe)
        (building / "additions.json").write_text(json.dumps(asdict(found), indent=2) + "\n", "utf-8")
        found.figure().savefig(building / "additions.png", dpi=150)
    return found, place
