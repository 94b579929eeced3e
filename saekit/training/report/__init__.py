"""What a finished run says of itself: `report.html` and `report.png`, beside the SAE's rows.

    rows        metrics.jsonl, thinned to what a picture can show
    features    ten latents drawn by number, and where they fire in held-out text: one short pass
    panels      losses, L0 against explained variance, firing rates, dead latents
    words       the recipe and the last evaluation, as sentences
    page        all of it as one file: no script, nothing fetched; light, dark and narrow

The page holds nothing of the clock, of speeds and of folders: the same recipe gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from saekit.evaluation import Evaluation
from saekit.files import replace_text, replacing
from saekit.members import Member
from saekit.recipe import Recipe
from saekit.sae import SAE
from saekit.tokens import Tokens
from saekit.training.report.features import examples
from saekit.training.report.page import page
from saekit.training.report.panels import save_picture
from saekit.training.report.rows import History
from saekit.training.tracking import read_rows

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

HTML, PNG = "report.html", "report.png"


def write_report(
    folder: Path,
    recipe: Recipe,
    member: Member,
    model: TransformerBridge,
    sae: SAE,
    held_out: Tokens | Tensor,
    evaluation: Evaluation,
) -> Path:
    """Write both files into an SAE's folder, each whole or not at all. Returns the page's path.

    member: what the recipe says of this SAE. sae: as it was evaluated. evaluation: the last one, on `held_out`.
    """
    history = History.of(read_rows(folder))
    shown = examples(model, sae, held_out, evaluation)
    html = page(recipe, member, sae, history, evaluation, shown)
    with replacing(folder / PNG) as building:
        save_picture(building, recipe.name, member, history, evaluation, shown)
    replace_text(folder / HTML, html)
    return folder / HTML
