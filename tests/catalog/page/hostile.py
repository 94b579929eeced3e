"""A catalog whose tokens, labels and explanations try to leave their place in a page, a table or a terminal."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from saekit.catalog import Catalog
from saekit.catalog.tables import write_table

HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "javascript:alert(1)",
    "\u202eright to left\u2066",
    "line\u2028and paragraph\u2029",
    "\x1b[31mred\x1b[0m\x00",
    "&lt;b&gt;",
    "zero\u200bwidth\ufeff",
    "שלום 😀",
    "<svg onload=alert(1)><style>*{display:none}</style>",
    '"], "x": __proto__ //',
    "W" * 240,
]


def hostile_copy(catalog: Catalog, folder: Path) -> Catalog:
    """The catalog copied to a new folder, with a vocabulary, labels and explanations of such texts."""
    shutil.copytree(catalog.path, folder)
    n = catalog.table("vocabulary").num_rows
    tokens = [f"{HOSTILE[i % len(HOSTILE)]}{i}" for i in range(n)]
    write_table(folder, "vocabulary", {"token_id": np.arange(n), "token": tokens})
    features = catalog.table("features").to_pydict()
    features["label"] = [HOSTILE[i % len(HOSTILE)] for i in range(len(catalog))]
    write_table(folder, "features", features)
    n = len(catalog)
    said = {"feature": np.arange(n), "method": ["<b>judge</b>"] * n, "model": [""] * n, "prompt": [""] * n}
    write_table(folder, "explanations", {**said, "text": features["label"]})
    return Catalog.open(folder)
