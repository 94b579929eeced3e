"""A recipe and an evaluation as sentences. Folders stay out: of a path its last part is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from saekit.members import Member
from saekit.recipe import Recipe
from saekit.sae import SAE
from saekit.sae.architectures import ARCHITECTURES

KINDS = {
    "standard": "ReLU (L1)",
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "matryoshka": "Matryoshka",
    "jumprelu": "JumpReLU",
    "gated": "gated",
}
HEADLINE = ("L0", "explained variance", "CE recovered")


class Measured(NamedTuple):
    """A figure of the last evaluation."""

    name: str
    value: str
    interval: str  # 95 %, or nothing
    meaning: str


def opening(recipe: Recipe, member: Member, sae: SAE) -> str:
    """What was trained, in one sentence."""
    k = f", {sae.k} of them for a token" if sae.k else ""
    if member.is_crosscoder:
        what, where = "crosscoder", f"reads and writes {_listed(member.sites)}"
    elif member.target_site is not None:
        what = f"{'skip ' * member.section.skip}transcoder"
        where = f"reads {member.sites[0]} and writes {member.target_site}"
    else:
        what, where = "SAE", f"reads {member.sites[0]}"
    what = f"{KINDS[member.architecture]} {what}"
    widths = f"width {sae.d_in:,}" if sae.d_in == sae.d_out else f"widths {sae.d_in:,} and {sae.d_out:,}"
    return f"A {what} of {sae.d_sae:,} latents{k}, which {where} of {_base(recipe.model)} ({widths})."


def sentences(recipe: Recipe, member: Member, tokens: int) -> dict[str, str]:
    """The recipe by subject. tokens: seen in training."""
    data, training = recipe.data, member.training
    texts = _texts(data.text)
    apart = (
        f"{_percent(data.held_out)} of the documents are held out"
        if data.held_out_text is None
        else f"held out is {_texts(data.held_out_text)}"
    )
    lr = f"{training.lr:g}"
    if training.lr_warmup:
        lr += f", after a rise over the first {_percent(training.lr_warmup)} of the run"
    if training.lr_schedule != "constant" and training.lr_decay:
        lr += f"; {training.lr_schedule} decay over its last {_percent(training.lr_decay)}"
    told = {
        "Text": f"{texts}, in contexts of {data.context_size} tokens{', documents shuffled' if data.shuffle else ''}; {apart}.",
        "Length": f"{tokens:,} tokens in {training.steps:,} steps of {training.batch_size:,}.",
        "Learning rate": f"{lr}.",
        "Sparsity": _sparsity(member),
        "Dead latents": _dead(member),
        "Scale": {
            "expected_norm": "Activations are divided so that their mean square norm is the width, while training.",
            "whiten": "Activations are whitened while training.",
            "none": "Activations are taken as they are.",
        }[training.normalize],
        "Numbers": f"The model ran in {recipe.dtype or 'its own dtype'}; seed {member.seed}.",
    }
    return {subject: text for subject, text in told.items() if text}


def measured(figures: Mapping[str, float]) -> list[Measured]:
    """The figures of an evaluation that people ask for, each with what it means; what was not measured is left out."""
    meanings = {
        "l0": ("L0", "latents that fire on a token, on average", "{:.2f}"),
        "explained_variance": ("explained variance", "share of the activations' variance that comes back", "{:.4f}"),
        "mse": ("MSE", "mean squared length of what does not come back", "{:.4g}"),
        "cosine": ("cosine", "between activations and their reconstruction, on average", "{:.4f}"),
        "norm_ratio": ("norm ratio", "length of the reconstruction over that of the activations", "{:.4f}"),
        "ce_recovered": ("CE recovered", "share of the model's loss that the reconstruction saves, against zeros", "{:.4f}"),
        "kl_recovered": ("KL recovered", "the same of the distance to the model's own predictions", "{:.4f}"),
        "ce_clean": ("CE of the model", "nats per token", "{:.4f}"),
        "ce_sae": ("CE with the reconstruction", "nats per token", "{:.4f}"),
        "dead_latents": ("silent latents", "that fired on none of these tokens", "{:,.0f}"),
        "tokens": ("tokens", "evaluated, held out from training", "{:,.0f}"),
        "documents": ("documents", "they come from", "{:,.0f}"),
    }  # fmt: skip
    found = []
    for key, (name, meaning, form) in meanings.items():
        if key in figures:
            low, high = figures.get(f"{key}_low"), figures.get(f"{key}_high")
            interval = "" if low is None or high is None else f"{form.format(low)} … {form.format(high)}"
            found.append(Measured(name, form.format(figures[key]), interval, meaning))
    return found


def _sparsity(member: Member) -> str:
    training = member.training
    if (k := getattr(member.section, "k", None)) is not None:
        each = "each token" if member.architecture == "topk" else "a token, on average over the batch"
        start = f"; K starts at {training.k_start}" if training.k_start else ""
        prefixes = getattr(member.section, "prefixes", None)
        nested = f"; nested at {_listed([f'{n:,}' for n in prefixes])} latents" if prefixes else ""
        return f"The {k} largest latents of {each}{start}{nested}."
    if training.target_l0 is not None:
        return f"The penalty is steered until L0 is {training.target_l0:g}."
    name = "L0" if member.architecture == "jumprelu" else "L1"
    coefficient = training.l0_coefficient if name == "L0" else training.l1_coefficient
    return f"{name} penalty with coefficient {coefficient:g}."


def _dead(member: Member) -> str:
    training = member.training
    how = {
        "auxk": "revived by an auxiliary loss",
        "resample": f"started anew at {_listed([_percent(share) for share in training.resample_at])} of the run",
        "none": "left alone",
    }[training.dead_latents or ARCHITECTURES[member.architecture].dead_latents]
    return f"Dead after {training.dead_after:,} tokens without firing; {how}."


def _texts(text: str | tuple[str, ...] | None) -> str:
    return _listed([_base(part) for part in ([text] if isinstance(text, str) else text or [])])


def _base(name: str) -> str:
    """A hub's name as it is, of a path its last part."""
    return (
        name
        if name.count("/") <= 1 and not name.startswith(("/", ".", "~"))
        else name.rstrip("/").rpartition("/")[2]
    )


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _listed(parts: list[str] | tuple[str, ...]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
