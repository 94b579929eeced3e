"""Fixtures: the embedded model, small real models from ../shared where there are any, and synthetic text.

Nothing here reaches a network; tests that need ../shared skip, saying why, where it is missing. A test's surroundings
are the same everywhere: no proxy, empty caches of the hub and of W&B, hypothesis with the same examples and no clock.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve their neighbours
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"  # servers of the tests are on 127.0.0.1

import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformer_lens.model_bridge import TransformerBridge

    from saekit.sae import SAE

# The same examples everywhere, however slow the machine; what was found once is worth an example of its own.
settings.register_profile(
    "everywhere", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("everywhere")

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
SITE = "blocks.3.hook_resid_pre"
NOUNS = [
    "cat",
    "dog",
    "ship",
    "tree",
    "king",
    "river",
    "stone",
    "lamp",
    "horse",
    "garden",
    "letter",
    "window",
]
VERBS = ["sees", "takes", "finds", "keeps", "follows", "leaves", "paints", "carries"]


def pytest_configure(config: pytest.Config) -> None:
    """Caches for the hub and for W&B, before either is imported: a home folder may be missing, or full of answers.

    Ctrl-C is a KeyboardInterrupt, as tests need it, also where the shell has the signal ignored (`nohup make test &`).
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    caches = tempfile.TemporaryDirectory(prefix="saekit-tests-", ignore_cleanup_errors=True)
    config.add_cleanup(caches.cleanup)
    for name in ("HF_HOME", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        os.environ[name] = caches.name


def sentences(n: int, seed: int = 0) -> list[str]:
    """n small documents of made-up sentences, all different."""
    import random

    draw = random.Random(seed)
    return [
        " ".join(
            f"The {draw.choice(NOUNS)} {draw.choice(VERBS)} a {draw.choice(NOUNS)} near number {i}-{j}."
            for j in range(draw.randint(2, 9))
        )
        for i in range(n)
    ]


@pytest.fixture(scope="session")
def model() -> TransformerBridge:
    """The embedded GPT-2-style model in float32."""
    import saekit

    return saekit.load_model("tiny", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def llama() -> TransformerBridge:
    """A real Llama-style model (RMSNorm, RoPE, grouped queries)."""
    import saekit

    folder = SHARED / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip(
            "../shared/models/stories260k is missing: the Llama-style model is not part of the repository"
        )
    return saekit.load_model(folder, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def sae() -> SAE:
    """The embedded SAE."""
    from saekit.sae import SAE

    return SAE.load("tiny")


@pytest.fixture
def no_leaked_hooks(model: TransformerBridge) -> Iterator[None]:
    """Fails a test that leaves a hook on the model."""
    yield
    assert not [name for name, point in model.hook_dict.items() if point.fwd_hooks or point.bwd_hooks]
    assert not model.original_model._forward_pre_hooks
