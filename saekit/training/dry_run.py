"""What a recipe would do, before it does anything: sizes, steps, and what can be checked without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saekit import embedded
from saekit.recipe import LanguageModelRecipe, Recipe
from saekit.text import documents, place

ADAM_BYTES = 16  # fp32 weight, gradient and two moments


def describe(recipe: Recipe | LanguageModelRecipe) -> dict[str, Any]:
    """Figures of the run, with `text` for people. Raises what the run itself would raise at its start."""
    if isinstance(recipe, LanguageModelRecipe):
        return _language_model(recipe)
    return _sae(recipe)


def _sae(recipe: Recipe) -> dict[str, Any]:
    training = recipe.training
    found: dict[str, Any] = {
        "name": recipe.name,
        "steps": training.steps,
        "tokens": training.steps * training.batch_size,
        "checked": [],
        "not_checked": [],
    }
    local = recipe.model == embedded.NAME or Path(recipe.model).is_dir()
    texts = [recipe.data.text] if isinstance(recipe.data.text, str) else list(recipe.data.text)
    on_hub = [
        text for text in texts if text != embedded.NAME and not Path(text).exists() and text.count("/") == 1
    ]
    for text in texts:
        if text not in on_hub:
            documents(place(text), field=recipe.data.field)
            found["checked"].append(f"text {text}")
    found["not_checked"] += [f"text {text} (a hub dataset)" for text in on_hub]
    if local:
        from saekit.lm import load_model
        from saekit.sites import site_width

        d_in = site_width(load_model(recipe.model, dtype=recipe.dtype, device=recipe.device), recipe.site)
        parameters = 2 * d_in * recipe.sae.d_sae + d_in + recipe.sae.d_sae
        found |= {"d_in": d_in, "parameters": parameters, "training_bytes": parameters * ADAM_BYTES}
        found["checked"] += [f"model {recipe.model}", f"site {recipe.site}"]
    else:
        found["not_checked"] += [f"model {recipe.model} (on the hub)", f"site {recipe.site}"]
    lines = [
        f"{recipe.name}: {recipe.sae.architecture}, {recipe.sae.d_sae:,} latents at {recipe.site} of {recipe.model}",
        f"  {found['tokens']:,} activations in {found['steps']:,} steps of {training.batch_size:,}",
    ]
    if local:
        lines.append(
            f"  {found['parameters']:,} parameters, {found['training_bytes'] / 2**20:,.0f} MiB with Adam's state"
        )
    lines += [f"  checked      {item}" for item in found["checked"]]
    lines += [f"  not checked  {item}" for item in found["not_checked"]]
    return found | {"text": "\n".join(lines)}


def _language_model(recipe: LanguageModelRecipe) -> dict[str, Any]:
    shape, training, data = recipe.language_model, recipe.training, recipe.data
    for text in (*data.text, data.held_out_text):
        documents(Path(text), field=data.field)
    parameters = (
        (shape.tokenizer.vocab_size + data.context_size) * shape.width
        + shape.blocks * (12 * shape.width**2 + 13 * shape.width)
        + 2 * shape.width
    )
    steps = training.tokens // (training.batch_size * data.context_size)
    text = (
        f"{recipe.name}: a language model of {parameters:,} parameters\n"
        f"  {training.tokens:,} tokens in {steps:,} steps of {training.batch_size} × {data.context_size}"
    )
    return {
        "name": recipe.name,
        "parameters": parameters,
        "steps": steps,
        "tokens": training.tokens,
        "text": text,
    }
