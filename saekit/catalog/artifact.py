"""A catalog in Weights & Biases: its files as an artifact of type `catalog`, and a table of its features to look through."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from saekit.catalog.card import public, score_summary
from saekit.catalog.publish import FILES, described
from saekit.catalog.tables import CATALOG
from saekit.errors import InvalidInput, first_line

if TYPE_CHECKING:
    from saekit.catalog.store import Catalog

COLUMNS: list[str | int] = ["index", "label", "explanation", "score", "density", "max"]
ROWS = 10_000  # what W&B shows of a logged table


def artifact(
    catalog: Catalog,
    *,
    name: str | None = None,
    project: str = "saekit",
    entity: str | None = None,
    run: Any = None,
) -> str | None:
    """Log a catalog as an artifact, and its features as the table `features`; returns the artifact's name, None where
    `WANDB_MODE` is `disabled`.

    name: of the artifact, by default after model and site. run: the W&B run to log to; by default one of its own, in
    project and entity, with what `WANDB_MODE` says (`online`, `offline`). The table has the 10,000 features of the highest
    score, then of the highest activation. As on the hub, paths of this machine are left out.
    Raises `InvalidInput` where W&B does not take it.
    """
    info = public(catalog.info)
    name = name or f"{info['model']['name']}-{info['site']}"
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:128]
    mode: Any = os.environ.get("WANDB_MODE") or None  # W&B itself reads it once in a process
    mode = {"off": "disabled", "dryrun": "offline", "run": "online"}.get(mode, mode)
    if run is None and mode == "disabled":
        return None
    import wandb

    own, failed = run is None, True
    try:
        if own:
            run = wandb.init(
                project=project,
                entity=entity,
                name=name,
                job_type="catalog",
                mode=mode,
                reinit="create_new",  # beside a run that the user has open
                save_code=False,
                settings=wandb.Settings(console="off", silent=True, disable_git=True, x_disable_stats=True),
            )
        if run.disabled:
            return None
        run.log({"features": wandb.Table(COLUMNS, summary_rows(catalog))})
        made = wandb.Artifact(name, type="catalog", metadata=_metadata(catalog, info))
        with made.new_file(CATALOG, "wb") as file:
            file.write(described(catalog))
        for other in FILES:
            if other != CATALOG:
                made.add_file(str(catalog._file(other)), name=other)
        run.log_artifact(made)
        failed = False
    except wandb.Error as error:
        raise InvalidInput(
            f"wandb did not take the catalog: {first_line(error)}. Log in with `wandb login`, or set WANDB_MODE=offline and "
            "`wandb sync` the run later"
        ) from error
    finally:
        if own and run is not None:
            run.finish(exit_code=int(failed))
    return name


def summary_rows(catalog: Catalog) -> list[list[Any]]:
    """A row of `COLUMNS` per feature, the best scored first, then the strongest; at most `ROWS`."""
    score, highest = catalog.score, catalog.max_activation
    order = np.lexsort((np.arange(len(catalog)), -highest, -np.nan_to_num(score, nan=-np.inf)))
    return [
        [f.index, f.label, f.explanation, f.score, f.density, f.max_activation]
        for f in (catalog[i] for i in order[:ROWS])
    ]


def _metadata(catalog: Catalog, info: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": info["model"],
        "site": info["site"],
        "corpus": info["corpus"],
        "features": len(catalog),
        "alive": int((catalog.density > 0).sum()),
        "scores": score_summary(catalog),
    }
