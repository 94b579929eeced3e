from __future__ import annotations

import shutil

import pytest
import torch

import saekit
from saekit import embedded
from saekit.errors import FileMissing, InvalidInput
from saekit.lm import (
    fast_dtype,
    load_model,
    locate,
    model_hash,
    separator_id,
    special_ids,
    token_strings,
    tokenizer_hash,
)


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(embedded.folder("model"), tmp_path / "model")
    return tmp_path / "model"


def test_the_embedded_model_loads_by_name_and_folder(model, copy) -> None:
    again = load_model(copy, dtype="float32")
    ids = torch.tensor([[0, 5, 9]])
    assert torch.equal(again(ids), model(ids))
    assert model_hash(again) == model_hash(model)
    assert tokenizer_hash(again.tokenizer) == tokenizer_hash(model.tokenizer)
    assert special_ids(model) == (0,)
    assert separator_id(model) == 0


def test_the_hash_sees_weights_but_not_the_dtype(model) -> None:
    assert model_hash(load_model("tiny", dtype="bfloat16")) == model_hash(model)
    other = load_model("tiny", dtype="float32")
    with torch.no_grad():
        next(iter(other.original_model.parameters())).mul_(1.5)
    assert model_hash(other) != model_hash(model)


def test_dtype_is_chosen_or_overridden(model) -> None:
    assert model.cfg.dtype == torch.float32
    assert saekit.load_model("tiny").cfg.dtype == fast_dtype("cpu")
    assert fast_dtype("cpu") in (torch.float32, torch.bfloat16)
    with pytest.raises(InvalidInput, match=r"dtype: 'int8' is not one of float32"):
        load_model("tiny", dtype="int8")


def test_a_folder_without_a_tokenizer_is_refused(copy) -> None:
    # The bridge alone would go on with an empty tokenizer.
    (copy / "tokenizer.json").unlink()
    with pytest.raises(FileMissing, match=r"no tokenizer\.json"):
        load_model(copy)


def test_what_is_no_model_is_one_clear_error(tmp_path, copy) -> None:
    with pytest.raises(FileMissing, match="does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(FileMissing, match=r"no config\.json"):
        load_model(tmp_path)
    (copy / "model.safetensors").write_bytes(b"1234567")
    with pytest.raises(InvalidInput, match="could not be loaded"):
        load_model(copy)
    with pytest.raises(InvalidInput, match="could not be loaded"):
        load_model("no-such-model-anywhere")


def test_token_strings_keep_spaces(model, llama) -> None:
    ids = model.tokenizer(" Jedi Jedi", add_special_tokens=False)["input_ids"]
    assert set(token_strings(model.tokenizer, ids)) == {" Jedi"}
    ids = llama.tokenizer("a cat sat", add_special_tokens=False)["input_ids"]
    assert "".join(token_strings(llama.tokenizer, ids)) == " a cat sat"


def test_the_fused_activation_is_the_published_one(model) -> None:
    """GPT-2's GELU takes one pass here; the model gives what Hugging Face's own gives."""
    from transformers import AutoModelForCausalLM
    from transformers.activations import NewGELUActivation

    plain = AutoModelForCausalLM.from_pretrained(locate("tiny"), dtype=torch.float32).eval()
    assert any(isinstance(module, NewGELUActivation) for module in plain.modules())
    assert not any(isinstance(module, NewGELUActivation) for module in model.original_model.modules())
    ids = torch.arange(10, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids), plain(ids).logits, rtol=1e-4, atol=1e-4)
