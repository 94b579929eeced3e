"""What a recipe would do, before it does anything: sizes, steps, and what can be checked without a network.

A model that is here is loaded, and its widths are its own. Of one that is not, the figures follow from its shape where
that is known (`training.shapes`), and the dry run says that they are not checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saekit import embedded
from saekit.errors import InvalidInput
from saekit.members import Member
from saekit.recipe import NO_TRAINING, AnyRecipe, LanguageModelRecipe, Recipe
from saekit.sae.architectures import ARCHITECTURES
from saekit.text import documents, place
from saekit.training.shapes import Shape, known_shape, shape_of

ADAM_BYTES = 16  # fp32 weight, gradient and two moments
FINAL_BYTES, CHECKPOINT_BYTES = 4, 12  # on disk, per parameter: fp32 weight; and two moments
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SUSTAINED = 50e12  # FLOP/s that hours are told at: an assumption, to be replaced by what a GPU really gives


def describe(recipe: AnyRecipe) -> dict[str, Any]:
    """Figures of the run, with `text` for people. Raises what the run itself would raise at its start."""
    if isinstance(recipe, LanguageModelRecipe):
        return _language_model(recipe)
    if not isinstance(recipe, Recipe):
        raise InvalidInput(f"recipe {recipe.name} {NO_TRAINING}")
    return _sae(recipe)


def _sae(recipe: Recipe) -> dict[str, Any]:
    training = recipe.training
    found: dict[str, Any] = {
        "name": recipe.name,
        "steps": training.steps,
        "tokens": training.steps * training.batch_size,
        "saes": [_told(member) for member in recipe.members],
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
    sites = [f"site {site}" for site in recipe.sites]
    if local:
        _measure(recipe, found)
        found["checked"] += [f"model {recipe.model}", *sites]
    else:
        found["not_checked"] += [f"model {recipe.model} (on the hub)", *sites]
        _estimate(recipe, found)
    return found | {"text": "\n".join(_lines(recipe, found))}


def _told(member: Member) -> dict[str, Any]:
    """What the recipe alone says of an SAE."""
    told: dict[str, Any] = {"name": member.name} if member.name else {}
    told |= {"architecture": member.architecture, "d_sae": member.section.d_sae, "sites": list(member.sites)}
    if (k := getattr(member.section, "k", None)) is not None:
        told["k"] = k
    if member.target_site is not None:
        told |= {"target_site": member.target_site, "skip": member.section.skip}
    return told


def _measure(recipe: Recipe, found: dict[str, Any]) -> None:
    """Figures with the widths of the model itself."""
    from saekit.lm import load_model
    from saekit.sites import site_width

    model = load_model(recipe.model, dtype=recipe.dtype, device=recipe.device)
    widths = {site: site_width(model, site) for site in recipe.sites}
    _figures(recipe, found, shape_of(model), widths, model.cfg.dtype.itemsize)


def _estimate(recipe: Recipe, found: dict[str, Any]) -> None:
    """Figures with the shape of a model that is not here, where it is known; none where it is not."""
    shape = known_shape(recipe.model)
    widths = {site: shape.width_at(site) for site in recipe.sites} if shape else {}
    if shape is None or None in widths.values():
        found["not_checked"].append("parameters, memory and FLOP: they need the widths of the sites")
        return
    _figures(recipe, found, shape, widths, ITEM_BYTES[recipe.dtype or "float32"])
    found["not_checked"].append(
        f"width {shape.width} and {shape.blocks} blocks of {recipe.model} ({shape.source}), behind all figures"
    )


def _figures(
    recipe: Recipe, found: dict[str, Any], shape: Shape, widths: dict[str, Any], item_bytes: int
) -> None:
    """Parameters, memory, disk and FLOP, of each SAE and together."""
    for member, told in zip(recipe.members, found["saes"], strict=True):
        D = E = told["d_in"] = sum(widths[site] for site in member.sites)
        S, skip = member.section.d_sae, member.section.skip
        if member.target_site is not None:
            E = told["d_out"] = widths[member.target_site]
        vectors = len(ARCHITECTURES[member.architecture].vectors)
        parameters = D * S + S * E + E + vectors * S + (D * E if skip else 0)
        told |= {
            "parameters": parameters,
            "training_bytes": parameters * ADAM_BYTES,
            "flops_per_token": flops_per_token(D, S, E, skip=skip),
        }
    training = recipe.training
    rows = max(training.ring, training.batch_size)
    ring_bytes = 2 if recipe.data.cache else item_bytes
    found["ring_bytes"] = rows * sum(widths.values()) * ring_bytes
    found["cache_bytes"] = 2 * (found["tokens"] + rows) * sum(widths.values()) if recipe.data.cache else 0
    for key in ("parameters", "training_bytes", "flops_per_token"):
        found[key] = sum(told[key] for told in found["saes"])
    checkpoints = training.keep_checkpoints if training.checkpoint_every else 1
    found["disk_bytes"] = found["parameters"] * (FINAL_BYTES + checkpoints * CHECKPOINT_BYTES)
    found["model_bytes"] = shape.parameters * item_bytes
    found["forward_flops_per_token"] = shape.forward_flops(recipe.sites, recipe.data.context_size)
    found["flops"] = found["tokens"] * (found["forward_flops_per_token"] + found["flops_per_token"])
    if not recipe.is_sweep:
        found["d_in"] = found["saes"][0]["d_in"]


def flops_per_token(D: int, S: int, E: int, *, skip: bool = False) -> int:
    """Of one dense training step: 2 per weight for x W_enc and its gradient, for f W_dec and its two gradients.

    4·D·S + 6·E·S, which is 10·D·S for an autoencoder; a sparse decoder (the TopK family) takes less. A skip adds 4·D·E.
    D = d_in, S = d_sae, E = d_out.
    """
    return 4 * D * S + 6 * E * S + (4 * D * E if skip else 0)


def _lines(recipe: Recipe, found: dict[str, Any]) -> Iterator[str]:
    saes = found["saes"]
    if recipe.is_sweep:
        yield f"{recipe.name}: {len(saes)} SAEs over one forward of {recipe.model}"
    for told in saes:
        reads, writes = " + ".join(told["sites"]), told.get("target_site")
        where = f"from {reads} to {writes}{' with a skip' * told['skip']}" if writes else f"at {reads}"
        k = f", k = {told['k']}" if "k" in told else ""
        what = f"{told['architecture']}, {told['d_sae']:,} latents{k} {where}"
        yield f"  {told['name']}: {what}" if recipe.is_sweep else f"{recipe.name}: {what} of {recipe.model}"
        if "parameters" in told and recipe.is_sweep:
            yield f"    {_size(told)}"
    yield (f"  {found['tokens']:,} activations in {found['steps']:,} steps of {recipe.training.batch_size:,}")
    if "parameters" in found:
        together = ", together" if recipe.is_sweep else ""
        yield f"  {_size(found)}{together}; {found['ring_bytes'] / 2**20:,.0f} MiB of rings"
        yield (
            f"  a model of at least {found['model_bytes'] / 2**20:,.0f} MiB, "
            f"{found['forward_flops_per_token'] / 1e6:,.1f} MFLOP a token; "
            f"up to {found['disk_bytes'] / 2**20:,.0f} MiB on disk"
        )
        if found["cache_bytes"]:
            yield f"  up to {found['cache_bytes'] / 2**20:,.0f} MiB of activations in {recipe.data.cache}"
        yield from _processes(recipe, found)
        hours = found["flops"] / SUSTAINED / 3600
        yield f"  {found['flops']:.2g} FLOP in all: {hours:,.2g} h where {SUSTAINED / 1e12:.0f} TFLOP/s are sustained"
    yield from (f"  checked      {item}" for item in found["checked"])
    yield from (f"  not checked  {item}" for item in found["not_checked"])


def _processes(recipe: Recipe, found: dict[str, Any]) -> Iterator[str]:
    """How `parallel` would share the run; nothing where one process does all of it."""
    data, latents = recipe.parallel.data, recipe.parallel.latents
    if (data or 1) * latents == 1:
        return
    rows = f", some {recipe.training.batch_size // data:,} rows of each batch" if data else ""
    yield (
        f"  in {'any number of' if data is None else data} × {latents} processes, each with 1/{latents} of the latents: "
        f"{found['training_bytes'] / latents / 2**20:,.0f} MiB{rows}"
    )


def _size(told: dict[str, Any]) -> str:
    return (
        f"{told['parameters']:,} parameters, {told['training_bytes'] / 2**20:,.0f} MiB with Adam's state, "
        f"{told['flops_per_token'] / 1e6:,.1f} MFLOP a token"
    )


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
