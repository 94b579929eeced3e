"""Files that an accumulator puts aside: written once, never changed, so that a saved state may share them.

A state works in a folder of its own. What is saved, loaded or merged shares the files by hard links, or copies them where the
file system has none.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from saekit.files import existing


class Spill:
    """Numbered files `<kind>-<number>` of one accumulator, in the state's folder."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.files: list[Path] = []
        self._next = 0

    def new(self) -> Path:
        """A path for the next file. Whatever a killed process left under its name goes."""
        path = self.folder / f"{self.kind}-{self._next}"
        self._next += 1
        path.unlink(missing_ok=True)
        self.files.append(path)
        return path

    def drop(self, paths: Iterable[Path]) -> None:
        """These files are no longer needed; where a saved state shares them, it keeps them."""
        for path in list(paths):
            self.files.remove(path)
            path.unlink(missing_ok=True)

    def share(self, folder: Path) -> list[str]:
        """Put all files into another folder; returns their names."""
        for path in self.files:
            link(path, folder / path.name)
        return [path.name for path in self.files]

    def take(self, paths: Iterable[Path]) -> list[Path]:
        """Take files of another folder in, under new names, in the order given."""
        taken = []
        for path in paths:
            taken.append(self.new())
            link(existing(path, "file of a catalog's state"), taken[-1])
        return taken


def link(source: Path, target: Path) -> None:
    """The same content under another name, which must be free."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
