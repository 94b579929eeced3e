"""A process for each contender, asked over pipes one at a time, so that the others idle while one works.

Parent and child speak lines of JSON over the child's stdin and stdout:

    {"open": job}     make what is to be timed                  → {}
    {"steps": n}      do n steps                                → {"seconds": [n]}
    {"close": true}   let go of it                              → {"memory_mb": …, and the task's own figures}

or, where anything raised, `{"failed": "TypeError: …"}`. What libraries print goes to the child's log. Neither side of
this file needs saekit: children run in the peers' environment too.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MB = 2**20
FAINT = 0.2  # what half of all pre-activations are scaled by, where latents are to be dead


class Failed(Exception):
    """A contender could not do its job; the message is one line for the table."""


class Task(NamedTuple):
    """What is timed, and what is said of it afterwards."""

    step: Callable[[], Any]
    figures: Callable[[], dict[str, Any]] = dict


class Worker:
    """The parent's end: a child that runs `module` with `python`, on `threads` threads pinned to as many processors."""

    def __init__(self, python: Path | str, module: str, log: Path, threads: int) -> None:
        self._log = log
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "disabled",
            "TOKENIZERS_PARALLELISM": "false",
            "SPARSIFY_DISABLE_TRITON": "1",
            "PYTHONWARNINGS": "ignore",
        }
        with log.open("ab") as said:
            self._process = subprocess.Popen(
                [str(python), "-m", "benchmarks.speed_process", module],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
        if hasattr(os, "sched_setaffinity"):
            processors = sorted(os.sched_getaffinity(0))[:threads]
            with contextlib.suppress(OSError):  # a child that is already gone is noticed when it is asked
                os.sched_setaffinity(self._process.pid, processors)

    def ask(self, **request: Any) -> dict[str, Any]:
        """The child's answer. Raises `Failed` with its reason, or with the last line of its log if it is gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            said = self._log.read_text("utf-8", "replace").strip().splitlines() or ["nothing said"]
            raise Failed(f"its process ended with {code}: {said[-1][:200]}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer

    def stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve(module: str) -> None:
    """The child's end: answer requests until the parent hangs up.

    module: has make(job, arrays) → `Task`; `arrays` are the tensors of the safetensors file `job["arrays"]`, in memory
    before memory is measured.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print, when they are imported too
    make: Callable[[dict[str, Any], Mapping[str, Any]], Task] | None = None
    task: Task | None = None
    arrays: tuple[str | None, dict[str, Any]] = (None, {})
    before = 0
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if "open" in request:
                if make is None:
                    make = import_module(module).make
                    _settle()
                job, task = request["open"], None
                if job.get("arrays") != arrays[0]:
                    arrays = (job.get("arrays"), _read(job.get("arrays")))
                before = _start_of_memory()
                task = make(job, arrays[1])
            elif "steps" in request:
                assert task is not None
                answer["seconds"] = [seconds_of(task.step) for _ in range(request["steps"])]
            elif task is not None:
                answer["memory_mb"] = round((_peak() - before) / MB, 1)
                answer |= task.figures()
                task = None
        except Exception as error:
            traceback.print_exc()
            task = None
            text = str(error).strip().splitlines() or [""]
            answer = {"failed": f"{type(error).__name__}: {text[0][:200]}"}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


def _settle() -> None:
    """Load what torch loads with the first step of any optimizer, so that it counts as nobody's memory."""
    import torch

    weights = torch.nn.Parameter(torch.ones(8, 8))
    (weights @ weights).sum().backward()
    torch.optim.Adam([weights]).step()


def seconds_of(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _read(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _start_of_memory() -> int:
    """Give back what is free, begin a new peak, and say how much is in use (bytes)."""
    gc.collect()
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is in use
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    """Bytes of a field of this process' status; elsewhere than on Linux, the peak since it started."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    serve(sys.argv[1])
