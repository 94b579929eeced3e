"""repeng as a child of `benchmarks.speed`, in the peers' environment: generation with a control vector at one block."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.speed_process import Task

np.float_ = np.float64  # type: ignore[attr-defined]  # it asks for a numpy that still had this name
from repeng import ControlModel, ControlVector  # noqa: E402


def make(job: dict[str, Any], arrays: Mapping[str, Tensor]) -> Task:
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_pre", job["site"])
    assert found is not None, job["site"]
    block = int(found[1]) - 1  # what the block before puts out
    dtype = getattr(torch, job.get("dtype", "float32"))
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).eval()
    control = ControlModel(model, [block])
    control.set_control(ControlVector("gpt2", {block: arrays["direction"].numpy()}), 1.0)
    prompt = arrays["prompt"]
    options = {
        "max_new_tokens": job["new_tokens"],
        "min_new_tokens": job["new_tokens"],
        "do_sample": False,
        "pad_token_id": 0,
    }

    def once() -> None:
        with torch.no_grad():
            out = control.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
        assert out.shape[1] == prompt.shape[1] + job["new_tokens"]

    return Task(once)
