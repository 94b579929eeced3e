"""The compiled twin of the kernels: `native.cpp`, built once by the machine's own C++ compiler, and kept.

Where there is no compiler, or it fails, `library()` is None and plain torch does the work: slower, and equal to rounding.
`SAEKIT_NATIVE=0` asks for that. The built file lies in the user's cache folder under a name made from the source, the
compiler and the processor, so that a change of any of them builds anew.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.cpp")
PORTABLE = "-O3 -fno-math-errno -std=c++17 -shared -fPIC -pthread".split()
FLAGS = [*PORTABLE, "-march=native", "-mprefer-vector-width=512"]  # not every compiler knows the last two
SECONDS = 120  # for a build

# What each function takes before the number of threads: a pointer, a whole number, a float
KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "t": ctypes.c_int}
SIGNATURES = {
    "top_k_f32": "pipiiipp",
    "top_k_bf16": "pipiiipp",
    "above_f32": "pippiipppp",
    "above_bf16": "pippiipppp",
    "jump_f32": "pppfiipp",
    "jump_bf16": "pppfiipp",
    "jump_back_f32": "ppppffiipppp",
    "jump_back_bf16": "ppppffiipppp",
    "gate_f32": "ppppiippp",
    "gate_bf16": "ppppiippp",
    "gate_back_f32": "ppppppiipppp",
    "gate_back_bf16": "ppppppiipppp",
    "kth_largest_of": "piip",
    "by_latent": "ppiippp",
    "linear_f32": "piipipp",
    "linear_bf16": "piipipp",
    "conv1d_f32": "piipipp",
    "conv1d_bf16": "piipipp",
    "segment_sum": "ppppipip",
    "segment_total": "pppip",
    "pair_dots": "ppippip",
    "decode_error": "pppipipppp",
    "row_products": "ppiippp",
    "adam_rows": "pppppiifffffff",
}


def library() -> ctypes.CDLL | None:
    """The compiled kernels, built on first use (some seconds); None where that cannot be."""
    return None if os.environ.get("SAEKIT_NATIVE") == "0" else _built()


def usable(*tensors: Tensor) -> bool:
    """Whether there are compiled kernels and they can take these tensors: on the CPU, contiguous, float32 or int64."""
    fit = all(
        t.device.type == "cpu" and t.is_contiguous() and t.dtype in (torch.float32, torch.int64)
        for t in tensors
    )
    return fit and library() is not None


def call(function: str, *arguments: Tensor | int | float | None) -> None:
    """Call a kernel, its last argument, the number of threads, added. Tensors go as pointers, None as a null one."""
    lib = _built()
    assert lib is not None, "ask library() first"
    given = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
    getattr(lib, function)(*given, torch.get_num_threads())


@functools.cache
def _built() -> ctypes.CDLL | None:
    command = shlex.split(os.environ.get("CXX") or "c++")
    if not command or shutil.which(command[0]) is None:
        return None
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, check=True, timeout=SECONDS)
        made_of = [
            SOURCE.read_bytes(),
            version.stdout,
            " ".join([*command, *FLAGS, *_openmp()]).encode(),
            _processor().encode(),
        ]
        name = f"native-{hashlib.sha256(b'|'.join(made_of)).hexdigest()[:16]}.so"
        try:
            return _loaded(command, _cache() / name)
        except OSError:  # a home that cannot be written: build for this process alone
            with tempfile.TemporaryDirectory(prefix="saekit-") as own:
                return _loaded(command, Path(own) / name)
    except (OSError, subprocess.SubprocessError):
        return None


def _loaded(command: list[str], path: Path) -> ctypes.CDLL:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as building:
            made = Path(building) / path.name
            for flags in (FLAGS + _openmp(), FLAGS, PORTABLE):
                done = subprocess.run(
                    [*command, str(SOURCE), "-o", str(made), *flags], capture_output=True, timeout=SECONDS
                )
                if done.returncode == 0:
                    break
            done.check_returncode()
            made.replace(path)  # whole or not at all, whoever else builds it now
    library = ctypes.CDLL(str(path))
    for name, kinds in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [KINDS[kind] for kind in f"{kinds}t"], None
    return library


def _openmp() -> list[str]:
    """Flags that link the OpenMP library that torch has loaded, and so share its threads; none where it is not known."""
    maps = Path("/proc/self/maps")
    loaded = [line.split()[-1] for line in maps.read_text().splitlines()] if maps.exists() else []
    library = next((path for path in loaded if "libgomp" in Path(path).name), None)
    return [] if library is None else [library, "-fopenmp"]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saekit"


def _processor() -> str:
    """What the processor can do: a home folder may be shared by machines that differ."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
