"""Where the model, SAE, catalog and token shards that ship with saekit lie: `tiny`.

In a checkout they are `checkpoints/tiny`; a wheel carries the same files inside the package.
"""

from __future__ import annotations

from pathlib import Path

from saekit.errors import FileMissing

NAME = "tiny"


def folder(part: str) -> Path:
    """The folder of `part`: `model`, `sae`, `catalog`, `tokens` or `recipes`.

    Raises `FileMissing` where the installation lacks it.
    """
    package = Path(__file__).parent
    inside, beside = package / "embedded_files", package.parent
    if part == "recipes":
        places = [inside / "recipes", beside / "recipes"]
    else:
        places = [inside / NAME / part, beside / "checkpoints" / NAME / part]
    for place in places:
        if place.is_dir():
            return place
    raise FileMissing(f"the embedded {part} is missing from this installation: looked in {places}")
