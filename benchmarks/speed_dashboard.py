"""SAEDashboard as a child of `benchmarks.speed`, in the peers' environment: the data of every feature, and its pages.

One step is `SaeVisRunner.run` with its default layout and minibatches, and `save_feature_centric_vis` of what it found, for `PAGE`
features at a time: all of them at once would be kept in memory as Python objects until the last one is done.
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

PAGE = 256  # its own default for features that go through the model together


def make(job: dict[str, Any], arrays: Mapping[str, Tensor]) -> Task:
    model = hooked(job["model"])
    bytes_written = 0

    def once() -> None:
        nonlocal bytes_written
        bytes_written = 0
        d_sae = sae_lens.SAE.load_from_disk(job["sae"]).cfg.d_sae
        for first in range(0, d_sae, PAGE):
            sae = sae_lens.SAE.load_from_disk(job["sae"])  # the runner folds its norms in place
            features = range(first, min(first + PAGE, d_sae))
            config = SaeVisConfig(hook_point=job["site"], features=features, device="cpu")
            data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=arrays["ids"][: job["rows"]])
            with tempfile.TemporaryDirectory() as folder:
                page = Path(folder) / "page.html"
                save_feature_centric_vis(data, page)
                bytes_written += page.stat().st_size

    return Task(once, lambda: {"disk_mb": round(bytes_written / 2**20, 2)})
