"""A language model by name, folder or hub id → `TransformerBridge`, with its tokenizer checked.

The bridge wraps the Hugging Face model and names its inner places as TransformerLens does. Nothing here
folds or centres weights: activations are those of the model as published.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saekit import embedded
from saekit.errors import FileMissing, InvalidInput, first_line
from saekit.files import existing, read_json

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # processor flags: x86-64 with AVX-512 or AMX, 64-bit Arm
BF16_GAIN = 1.5  # bf16 has to be this much faster than fp32 before we give up mantissa bits for it


def load_model(name: str | Path, *, dtype: str | None = None, device: str | None = None) -> TransformerBridge:
    """Load a language model.

    name: `"tiny"` (ships with saekit), a local Hugging Face folder, or a hub id.
    dtype: `"float32"`, `"bfloat16"`, `"float16"`; by default bf16 where this machine multiplies it
        natively, else fp32.
    device: `"cpu"`, `"cuda"`, …; by default a GPU when there is one.

    Raises `FileMissing` for a folder without a model or tokenizer, `InvalidInput` for one that is broken,
    and whatever the hub raises, wrapped with the name that was asked for.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is not None and dtype not in DTYPES:
        raise InvalidInput(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    chosen = DTYPES[dtype] if dtype else fast_dtype(device)
    place = locate(name)
    with quiet_loading():
        from transformer_lens.model_bridge import TransformerBridge

        try:
            model = TransformerBridge.boot_transformers(str(place), device=device, dtype=chosen)
        except Exception as error:  # hub, config and weight files fail in a dozen ways of their own
            raise InvalidInput(
                f"model {str(name)!r} could not be loaded: {first_line(error).rstrip('. ')}. "
                'Expected "tiny", a Hugging Face folder, or the id of a causal language model on the hub'
            ) from error
    model.eval()
    _fuse_gelu(model)
    model.cfg.model_name = str(name)
    _check_tokenizer(model, str(name))
    return model


def _fuse_gelu(model: TransformerBridge) -> None:
    """GPT-2's GELU in one pass over memory instead of eight: the same function, and in bf16 rounded once, not eight times."""
    from transformers.activations import ACT2FN, NewGELUActivation

    for module in model.original_model.modules():
        for name, inner in list(module.named_children()):
            if isinstance(inner, NewGELUActivation):
                setattr(module, name, ACT2FN["gelu_pytorch_tanh"])


def locate(name: str | Path) -> str | Path:
    """The embedded folder, a local one that holds a model and a tokenizer, or a hub id as it is. Raises `FileMissing`."""
    if str(name) == embedded.NAME and not Path(name).is_dir():
        return embedded.folder("model")
    looks_like_path = (
        isinstance(name, Path) or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1
    )
    path = Path(name).expanduser()
    if not looks_like_path and not path.is_dir():
        return str(name)
    existing(path, "model folder")
    config = path / "config.json"
    if not config.is_file():
        raise FileMissing(f"model folder {path}: no config.json; expected the Hugging Face layout")
    read_json(config)
    if not any((path / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise FileMissing(
            f"model folder {path}: no tokenizer.json. A model without its own tokenizer would be read "
            "with an empty one; save it with tokenizer.save_pretrained(folder)"
        )
    return path


def _check_tokenizer(model: TransformerBridge, name: str) -> None:
    tokenizer = model.tokenizer
    if tokenizer is None or len(tokenizer) < 2:
        raise InvalidInput(f"model {name!r}: its tokenizer is missing or empty")
    ids = tokenizer("The cat sat.", add_special_tokens=False)["input_ids"]
    if len(set(ids)) < 2 or max(ids) >= model.cfg.d_vocab:
        raise InvalidInput(
            f"model {name!r}: its tokenizer gives ids {ids} for 'The cat sat.', which do not fit a "
            f"vocabulary of {model.cfg.d_vocab}; was it saved beside another model?"
        )


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence the loader's progress bar; a user sees saekit's own lines only."""
    with warnings.catch_warnings():  # where a notebook has no widgets, of the bars that are not shown
        warnings.filterwarnings("ignore", message="IProgress not found")
        from transformers.utils import logging

        importlib.import_module("tqdm.auto")

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


@functools.cache
def fast_dtype(device: str = "cpu") -> torch.dtype:
    """bf16 where `device` multiplies it natively, else fp32.

    Linux says what its processor can do; elsewhere a product in each is timed once (~20 ms), and bf16 has to be at least
    1.5 × as fast.
    """
    if torch.device(device).type != "cpu":
        native = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(False)
        return torch.bfloat16 if native else torch.float32
    about = Path("/proc/cpuinfo")
    if about.exists():
        return torch.bfloat16 if NATIVE_BF16 & set(about.read_text().split()) else torch.float32
    times = {dtype: _matmul_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    gain = times[torch.float32] / times[torch.bfloat16]
    return torch.bfloat16 if gain >= BF16_GAIN else torch.float32


def _matmul_seconds(dtype: torch.dtype, n: int = 512) -> float:
    a, b = torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype)
    best = float("inf")
    for _ in range(4):  # the first one warms up; the best of the rest is the least disturbed
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return best


def special_ids(model: TransformerBridge) -> tuple[int, ...]:
    """Ids of BOS, EOS and pad: attention sinks, excluded from training and from every average."""
    tokenizer = model.tokenizer
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return tuple(sorted({i for i in ids if i is not None}))


def separator_id(model: TransformerBridge) -> int | None:
    """The id put before every document and at the start of every context: BOS, else EOS, else none."""
    tokenizer = model.tokenizer
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary: equal for tokenizers that give the same ids the same strings."""
    entries = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(entries.encode()).hexdigest()


def to_logits(model: TransformerBridge, rows: Tensor) -> Tensor:
    """[n, V] what directions [n, D] of the residual stream add to the logits, but for the final norm's division; float32."""
    return through_final_norm(model, rows) @ model.W_U.detach().float()


def through_final_norm(model: TransformerBridge, rows: Tensor) -> Tensor:
    """[n, D] directions as the unembedding sees them: centred for LayerNorm, times the norm's gain; float32.

    The norm's division, which depends on the rest of the stream, is left out.
    """
    W_U = model.W_U
    rows = rows.detach().to(W_U.device, torch.float32)
    if model.cfg.normalization_type in ("LN", "LNPre"):
        rows = rows - rows.mean(-1, keepdim=True)
    gain = getattr(model.ln_final, "weight", None)
    if gain is None:
        return rows
    offset = (
        1.0 if getattr(model.cfg, "rmsnorm_uses_offset", False) else 0.0
    )  # Gemma stores its difference from 1
    return rows * (gain.detach().float() + offset)


def model_hash(model: TransformerBridge, samples: int = 256) -> str:
    """A fingerprint of the weights that does not depend on the dtype they were loaded in.

    Each parameter gives its shape and up to `samples` evenly spaced values rounded to bf16.
    """
    digests = []
    for parameter in model.original_model.parameters():
        flat = parameter.detach().flatten()
        picked = flat[:: max(1, flat.numel() // samples)].to("cpu", torch.bfloat16).view(torch.int16)
        head = f"{tuple(parameter.shape)}".encode()
        digests.append(hashlib.sha256(head + picked.numpy().tobytes()).hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def token_strings(tokenizer: Any, ids: list[int]) -> list[str]:
    """Each id as the text it stands for, spaces kept (`" Jedi"`, not `"ĠJedi"` or `"Jedi"`)."""
    pieces = tokenizer.convert_ids_to_tokens(ids)
    strings = []
    for i, piece in zip(ids, pieces, strict=True):
        string = tokenizer.decode([i], clean_up_tokenization_spaces=False)
        # SentencePiece decoders swallow the space of a first token
        opens = isinstance(piece, str) and piece.startswith("▁") and not string.startswith(" ")
        strings.append(f" {string}" if opens else string)
    return strings
