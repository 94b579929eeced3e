"""sparsify (https://github.com/EleutherAI/sparsify): `cfg.json` and `sae.safetensors`, in a folder per hook point.

    f = TopK(ReLU(W (x − b_dec) + b)),  x̂ = f W_dec + b_dec          b_dec is not subtracted by a transcoder
    with a skip connection              x̂ += x W_skipᵀ

A skip connection of one that is no transcoder becomes a transcoder onto its own site: W (x − b_dec) + b is
W x + (b − W b_dec). `multi_topk` was a term of the loss, and changes nothing here.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saekit.errors import InvalidInput, SaekitError
from saekit.files import read_json, read_tensors
from saekit.sae.foreign.parts import Parts, Shape, check_shapes, flag, known, width
from saekit.sae.model import SAEConfig

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
DEFAULTS = {"k": 32, "expansion_factor": 32}  # of its configuration class
HOOK_POINT = re.compile(r"(?:layers|h)[._](?P<layer>\d+)(?:\.(?P<part>mlp|attn|attention|self_attn))?")


def read(folder: Path) -> Parts:
    """The SAE or transcoder in the folder. Raises `InvalidInput` for what is not understood."""
    where = folder / CONFIG
    cfg = read_json(where)
    if (activation := cfg.get("activation", "topk")) != "topk":
        raise InvalidInput(f"{where}: activation: {activation!r:.80} is not supported, only 'topk' is")
    if flag(cfg, "signed", where):
        raise InvalidInput(f"{where}: signed: latents below zero are not supported")
    transcode, skip = flag(cfg, "transcode", where), flag(cfg, "skip_connection", where)
    D, k = width(cfg, "d_in", where), width(cfg, "k", where, DEFAULTS["k"])
    S = D * width(cfg, "expansion_factor", where, DEFAULTS["expansion_factor"])
    if cfg.get("num_latents"):  # 0 stands for d_in times the factor
        S = width(cfg, "num_latents", where)

    path = folder / WEIGHTS
    tensors = read_tensors(path)
    expected: dict[str, Shape] = {
        "encoder.weight": (S, D),
        "encoder.bias": (S,),
        "W_dec": (S, D),
        "b_dec": (D,),
    }
    if skip:
        expected["W_skip"] = (D, D)
    check_shapes(tensors, expected, path)
    weights = {
        "W_enc": tensors["encoder.weight"].t(),
        "b_enc": tensors["encoder.bias"],
        **{name: tensor for name, tensor in tensors.items() if not name.startswith("encoder.")},
    }
    if skip and not transcode:
        weights["b_enc"] = weights["b_enc"] - weights["b_dec"] @ weights["W_enc"]
    try:
        config = SAEConfig(
            "topk",
            D,
            S,
            k=k,
            d_out=D if transcode or skip else None,
            skip=skip,
            apply_b_dec_to_input=not (transcode or skip),
            dtype=str(weights["W_enc"].dtype).removeprefix("torch."),
            metadata=_metadata(folder, transcode=transcode, skip=skip),
        )
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from None
    return Parts(config, weights, path)


def _metadata(folder: Path, *, transcode: bool, skip: bool) -> dict[str, Any]:
    """What the folder's name and the run's `config.json` beside it tell; nothing where they do not."""
    folder = folder.absolute()
    place = folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder
    read, written = _sites(place.name, transcode=transcode)
    run: Mapping[str, Any] = {}
    with contextlib.suppress(SaekitError):  # a neighbour, and not what was asked for
        run = read_json(place.parent / "config.json")
    model, context = run.get("model"), run.get("ctx_len")
    ours = "sae" in run and isinstance(model, str)
    return known(
        {
            "model_name": model if ours else None,
            "context_size": context if ours and isinstance(context, int) else None,
            "hook_name": read,
            "hook_name_out": written if transcode or skip else None,
        }
    )


def _sites(hook_point: str, *, transcode: bool) -> tuple[str | None, str | None]:
    """(read, written) of a hook point, which is a module of the model; SAEs read its output, transcoders its input."""
    found = HOOK_POINT.fullmatch(hook_point)
    if found is None:
        return None, None
    block = f"blocks.{int(found['layer'])}"
    if found["part"] is None:
        before, after = f"{block}.hook_resid_pre", f"{block}.hook_resid_post"
    else:
        part = "mlp" if found["part"] == "mlp" else "attn"
        before, after = f"{block}.{part}.hook_in", f"{block}.{part}.hook_out"
    return (before if transcode else after), after
