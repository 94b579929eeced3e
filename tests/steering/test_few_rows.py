"""Layers by kernels for a few rows: the same numbers, hooks that act, nothing left changed, and nothing touched that is not ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import saekit
from saekit.sae import kernels, native
from saekit.steering.few_rows import FewRows

compiled = pytest.mark.skipif(native.library() is None, reason="no C++ compiler: plain torch is all there is")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.last = nn.Linear(40, 70), Conv1D(30, 70), nn.Linear(30, 90, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.down(self.up(x)))
        return y


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels as they are called."""
    names: list[str] = []
    call = native.call

    def noted(name: str, *arguments: Any) -> None:
        names.append(name)
        call(name, *arguments)

    monkeypatch.setattr(native, "call", noted)
    return names


def changed(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if "forward" in module.__dict__]


@compiled
@torch.inference_mode()
def test_up_to_a_few_rows_go_by_the_kernels(taken) -> None:
    net, x = Net(), torch.randn(2, kernels.FEW, 40)
    for rows in (1, kernels.FEW):
        plain = net(x[:1, :rows])
        with FewRows(net):
            torch.testing.assert_close(net(x[:1, :rows]), plain)
        assert taken == ["linear_f32", "conv1d_f32", "linear_f32"]
        taken.clear()
    plain = net(x)
    with FewRows(net):
        assert torch.equal(net(x), plain)
    assert not taken
    net(x[:1])
    assert not taken, "only while it is open"


@compiled
@torch.inference_mode()
def test_hooks_on_the_layers_act(taken) -> None:
    net, x = Net(), torch.randn(3, 40)
    net.down.register_forward_pre_hook(lambda _, given: given[0].flip(-1))
    net.down.register_forward_hook(lambda *given: given[2] * 2)
    plain = net(x)
    with FewRows(net):
        torch.testing.assert_close(net(x), plain)
    assert len(taken) == 3


@compiled
def test_ctrl_c_while_it_opens_leaves_nothing_changed() -> None:
    class Interrupted(dict[str, Any]):
        def __setitem__(self, *_: Any) -> None:
            raise KeyboardInterrupt

    net = Net()
    products = FewRows(net)
    object.__setattr__(net.last, "__dict__", Interrupted(net.last.__dict__))
    with pytest.raises(KeyboardInterrupt), products:
        pass
    assert not changed(net)


@compiled
def test_everything_is_put_back_and_it_opens_again() -> None:
    net = Net()
    products = FewRows(net)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), products:
            assert changed(net) == ["up", "down", "last"]
            raise KeyboardInterrupt
        assert not changed(net)
    with products, products:  # the inner one finds nothing left to change, and the outer one what it changed
        assert changed(net)
    assert not changed(net)


@compiled
@torch.inference_mode()
def test_weights_that_change_are_used(taken) -> None:
    net, x = Net(), torch.randn(1, 40)
    products = FewRows(net)
    net.up.weight = nn.Parameter(torch.randn(70, 40))
    net.last.weight.mul_(3)
    net.bfloat16()
    plain = net(x.bfloat16())
    with products:
        torch.testing.assert_close(net(x.bfloat16()), plain, rtol=0.02, atol=0.02)
    assert taken == ["linear_bf16", "conv1d_bf16", "linear_bf16"]


@torch.inference_mode()
def test_layers_of_others_are_left_alone(taken) -> None:
    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    net, x = Net(), torch.randn(1, 40)
    net.up = Own(40, 70)
    net.last = torch.nn.utils.parametrizations.weight_norm(net.last)
    net.down.forward = lambda x: x[..., :30]
    theirs, plain = net.down.forward, net(x)
    with FewRows(net):
        assert changed(net) == ["down"]
        assert torch.equal(net(x), plain)
    assert net.down.forward is theirs
    assert not taken


@torch.inference_mode()
def test_under_autocast_and_without_a_compiler_torch_does_it(monkeypatch, taken) -> None:
    net, x = Net(), torch.randn(1, 40)
    with torch.autocast("cpu", torch.bfloat16), FewRows(net):
        assert net(x).dtype == torch.bfloat16
    monkeypatch.setenv("SAEKIT_NATIVE", "0")
    with FewRows(net):
        assert not changed(net)
    assert not taken


@compiled
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_embedded_model_generates_by_them(dtype, taken) -> None:
    """Every layer of every step but the prompt's, which has more rows; and a text of a batch is the text alone."""
    model = saekit.load_model("tiny", dtype=dtype, device="cpu")
    layers = 4 * model.cfg.n_layers + 1
    prompt = "The king of the old town said that he would never again go to the"
    assert model.to_tokens(prompt).shape[1] > kernels.FEW
    (alone,) = saekit.generate(model, [prompt], 12, seed=5)
    assert len(taken) == 12 * layers - (layers - 1), "of the prompt's layers the head alone sees a single row"
    taken.clear()
    together = saekit.generate(model, [prompt] * 3, 12, seed=[4, 5, 6])
    assert len(taken) == 12 * layers - (layers - 1)
    assert together[1].text == alone.text or dtype == "bfloat16"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SAEKIT_NATIVE", "0")
        (plain,) = saekit.generate(model, [prompt], 12, seed=5)
    assert dtype == "bfloat16" or plain.text == alone.text
    assert not changed(model.original_model)
