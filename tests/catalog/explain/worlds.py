"""Made-up texts and latents with a known meaning, as catalogs: what explanations of them have to say and to score."""

from __future__ import annotations

from pathlib import Path

import catalog.brute as brute
import numpy as np
import pytest
from catalog.brute import WORDS, Options, Seen

ROWS, T = 60, 32
DETECTOR, BEFORE, NOISE, SILENT = 0, 1, 2, 3  # fires on "Jedi"; before "ship"; on a word in ten; never
IDS = {word: 1 + i for i, word in enumerate(WORDS)}


def world(S: int = 8, seed: int = 0) -> Seen:
    """60 rows of two documents of 16 words; latents from 4 on are detectors of the words from the fourth on."""
    random = np.random.default_rng(seed)
    ids = random.integers(1, len(WORDS) + 1, (ROWS, T))
    ids[:, 0] = 0
    documents = np.repeat(np.arange(2 * ROWS).reshape(ROWS, 2), T // 2, axis=1)
    f = np.zeros((ROWS, T, S), np.float32)
    f[..., DETECTOR] = 4.0 * (ids == IDS["Jedi"])
    f[:, :-1, BEFORE] = 2.0 * (ids[:, 1:] == IDS["ship"]) * (documents[:, 1:] == documents[:, :-1])
    f[..., NOISE] = random.gamma(2.0, 1.0, ids.shape) * (random.random(ids.shape) < 0.1)
    for s in range(4, S):
        f[..., s] = 3.0 * (ids == s)
    f[ids == 0] = 0
    return Seen(ids, documents, np.ones(ids.shape, np.float32), f, special=(0,))


def written(folder: Path, seen: Seen, **options: int) -> Path:
    """A catalog of what was seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(brute, "made_up", lambda S, seed: seen)
        return brute.made(
            folder, S=seen.f.shape[2], options=Options(**{"window": 8, "sample_rows": 40, **options})
        )
