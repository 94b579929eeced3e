"""What an evaluation leaves in a folder, whole or not at all.

metrics.json      the figures of one SAE, flat;   evaluation.json   of several, by name
density.png       how often latents fire
pareto.png        of several: L0 against what they keep
probes.json       where texts with labels were probed: every concept of every set
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from saekit.errors import InvalidInput
from saekit.evaluation.density import density_figure
from saekit.evaluation.front import pareto, save_figure
from saekit.evaluation.measure import Evaluation
from saekit.evaluation.probing import Probe
from saekit.files import staged, write_json

FILES = {"metrics.json", "evaluation.json", "density.png", "pareto.png", "probes.json"}

Probes = Mapping[str, Mapping[str, Sequence[Probe]]]  # SAE → set of texts → concepts


def check_report_folder(folder: str | Path) -> Path:
    """The folder, if a report may take its place: it is new, empty, or an older report. Else `InvalidInput`."""
    folder = Path(folder)
    if folder.is_dir():
        if others := sorted({path.name for path in folder.iterdir()} - FILES):
            raise InvalidInput(
                f"out: {folder} holds {', '.join(others[:3])}{' …' if others[3:] else ''}, which an evaluation would "
                "replace; name a new folder"
            )
    elif folder.exists():
        raise InvalidInput(f"out: {folder} is a file; name a new folder")
    return folder


def write_report(folder: str | Path, evaluations: Mapping[str, Evaluation], probes: Probes) -> Path:
    """Write the files above for one or several SAEs by name. Raises `InvalidInput` for a folder of something else."""
    folder = check_report_folder(folder)
    figures = {name: evaluation.figures for name, evaluation in evaluations.items()}
    with staged(folder) as building:
        if len(figures) == 1:
            write_json(building / "metrics.json", next(iter(figures.values())))
        else:
            write_json(building / "evaluation.json", figures)
            save_figure(pareto(figures), building / "pareto.png")
        densities = {name: evaluation.density for name, evaluation in evaluations.items()}
        save_figure(density_figure(densities), building / "density.png")
        if probes:
            write_json(
                building / "probes.json",
                {
                    sae: {texts: [asdict(concept) for concept in found] for texts, found in sets.items()}
                    for sae, sets in probes.items()
                },
            )
    return folder


def distinct_names(sources: Sequence[str]) -> list[str]:
    """Short names for SAEs given by path: without the parts that all share, and without a run's `final`.

    Raises `InvalidInput` when one is given twice.
    """
    paths = [Path(source).parts for source in sources]
    paths = [parts[:-1] if len(parts) > 1 and parts[-1] == "final" else parts for parts in paths]
    shared = 0
    while len(paths) > 1 and all(len(parts) > shared + 1 for parts in paths):
        if len({parts[shared] for parts in paths}) > 1:
            break
        shared += 1
    names = [str(Path(*parts[shared:])) for parts in paths]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidInput(f"SAE: {twice} is given twice")
    return names
