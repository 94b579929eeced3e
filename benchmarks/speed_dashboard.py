"""SAEDashboard as a child of `benchmarks.speed`, in the peers' environment: the data of every feature, and its page.

One step is `SaeVisRunner.run` over all features and tokens with its default layout and minibatches, and
`save_feature_centric_vis` of what it found.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sae_lens
from sae_dashboard.data_writing_fns import save_feature_centric_vis
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from torch import Tensor

from benchmarks.speed_process import Task
from benchmarks.speed_saelens import hooked


def make(job: dict[str, Any], arrays: Mapping[str, Tensor]) -> Task:
    model = hooked(job["model"])
    bytes_written = 0

    def once() -> None:
        nonlocal bytes_written
        sae = sae_lens.SAE.load_from_disk(job["sae"])  # the runner folds its norms in place
        config = SaeVisConfig(hook_point=job["site"], features=range(sae.cfg.d_sae), device="cpu")
        data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=arrays["ids"][: job["rows"]])
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "page.html"
            save_feature_centric_vis(data, page)
            bytes_written = page.stat().st_size

    return Task(once, lambda: {"disk_mb": round(bytes_written / 2**20, 2)})
