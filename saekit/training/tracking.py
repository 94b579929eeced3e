"""Every logged row goes to `metrics.jsonl`, always; Weights & Biases shows the same rows when it is on.

W&B is a view of a run, never its record. It gets the resolved recipe (an allow-list by construction: nothing
from the environment is in it), the rows, the pictures and the report of the end, and the final SAE as an artifact of type
`model`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

from saekit.errors import InvalidInput
from saekit.files import fsync, replace_text

ROWS = "metrics.jsonl"
SAMPLES = "details/n_training_samples"  # the x-axis: resumed runs line up, whatever their step count
Mode = Literal["online", "offline", "disabled"]


class WandbConfig(BaseModel):
    """The `wandb` section of a recipe. The environment's `WANDB_MODE` has the last word on `mode`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Mode = "disabled"
    project: str = "saekit"
    entity: str | None = None
    group: str | None = None  # None: a sweep's name; of a single SAE, none
    tags: tuple[str, ...] = ()

    def resolved_mode(self) -> Mode:
        mode = os.environ.get("WANDB_MODE") or self.mode
        mode = {"off": "disabled", "dryrun": "offline", "run": "online"}.get(mode, mode)
        for known in get_args(Mode):
            if mode == known:
                return known
        raise InvalidInput(f"WANDB_MODE: {mode!r}; expected one of {', '.join(get_args(Mode))}")


class Tracker:
    """Writes the rows of one SAE. Several live side by side in one process.

    run: its folder. group: of W&B runs that belong together. wandb_id: of the W&B run to continue, from the checkpoint.
    step: rows beyond it are dropped, because the steps that wrote them will be taken again.

    A row's number in the file is its step in W&B, so a resumed W&B run, which drops steps that it has, holds every row
    once: those dropped are, the resume being exact, the same.
    """

    def __init__(
        self,
        run: Path,
        name: str,
        config: Mapping[str, Any],
        wandb: WandbConfig,
        *,
        wandb_id: str | None,
        step: int,
        group: str | None = None,
    ) -> None:
        self._path = run / ROWS
        self._rows = _drop_rows_beyond(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")
        self._wandb = None
        mode = wandb.resolved_mode()
        if mode != "disabled":
            self._wandb = _start_wandb(run, name, config, wandb, group, mode, wandb_id)
        self.wandb_id: str | None = self._wandb.id if self._wandb else wandb_id

    def log(self, row: Mapping[str, float | int]) -> None:
        """One row; it carries `step` and the number of samples seen."""
        self._file.write(json.dumps(dict(row)) + "\n")
        self._file.flush()
        if self._wandb:
            self._wandb.log(dict(row), step=self._rows, commit=True)
        self._rows += 1

    def checkpointed(self) -> None:
        """Make the rows as durable as the checkpoint just written."""
        fsync(self._path)

    @property
    def places(self) -> list[str]:
        """Where the rows go, as people are told."""
        if not self._wandb:
            return [str(self._path)]
        return [str(self._path), f"W&B {'offline' if self._wandb.offline else self._wandb.url}"]

    def show(self, name: str, file: Path) -> None:
        """Put a picture or a page into the W&B run's summary; its history stays that of the rows."""
        if self._wandb:
            import wandb

            html = file.suffix == ".html"
            media = wandb.Html(file, inject=False) if html else wandb.Image(str(file))
            self._wandb.summary[name] = media

    def publish(self, folder: Path, name: str, metadata: Mapping[str, Any]) -> None:
        """Send a folder as an artifact of type `model`."""
        if self._wandb:
            import wandb

            artifact = wandb.Artifact(name.replace("/", "_"), type="model", metadata=dict(metadata))
            artifact.add_dir(str(folder))
            self._wandb.log_artifact(artifact)

    def close(self, *, failed: bool = False) -> None:
        self._file.close()
        if self._wandb:
            self._wandb.finish(exit_code=int(failed))


def _start_wandb(
    run: Path,
    name: str,
    config: Mapping[str, Any],
    wandb_config: WandbConfig,
    group: str | None,
    mode: Mode,
    run_id: str | None,
) -> Any:
    import wandb

    started = wandb.init(
        dir=str(run),
        id=run_id,
        resume="allow" if run_id and mode == "online" else None,
        reinit="create_new",  # beside the runs that are open in this process, the user's own among them
        project=wandb_config.project,
        entity=wandb_config.entity,
        group=group,
        tags=list(wandb_config.tags),
        name=name,
        config=dict(config),
        mode=mode,
        save_code=False,
        settings=wandb.Settings(console="off", silent=True, disable_git=True, x_disable_stats=True),
    )
    started.define_metric(SAMPLES)
    started.define_metric("*", step_metric=SAMPLES)
    return started


def _drop_rows_beyond(path: Path, step: int) -> int:
    """Keep the rows of steps up to `step` → their number; a row cut short by a kill goes too."""
    if not path.exists():
        return 0
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row.get("step", 0) <= step:
            kept.append(line)
    replace_text(path, "".join(f"{line}\n" for line in kept))
    return len(kept)


def read_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of a run, oldest first."""
    return [json.loads(line) for line in (run / ROWS).read_text("utf-8").splitlines()]
