"""What a training step costs, and what makes it cheaper: support/speed.py."""

import math
import time

import pytest
import torch
import torch.nn.functional as F
from helpers import V, seeded
from torch.utils.flop_counter import FlopCounterMode

from rar import KINDS
from support import border, speed


def small(kind, n_layer=2):
    """A model of each kind, in training mode, none of whose weights is zero."""
    torch.manual_seed(0)
    model_class, config_class = KINDS[kind]
    model = model_class(config_class((4, 4), V, 5, dim=32, n_layer=n_layer, n_head=2))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape)
    return model.train()


@pytest.mark.parametrize("kind", KINDS)
def test_the_operations_of_a_training_step_are_those_that_torch_counts(batch, kind):
    model = small(kind)
    with FlopCounterMode(display=False) as counted:
        model(*batch)[1].backward()
    assert math.isclose(3 * speed.training_flops(model), counted.get_total_flops(), rel_tol=0.15)


def test_the_rate_of_matrix_products_counts_multiplications_and_additions(monkeypatch):
    monkeypatch.setattr(speed, "sustained", lambda product: 0.5)  # seconds
    rate = speed.matrix_rate.__wrapped__(torch.device("cpu"), torch.float32, side=8)
    assert rate == 2 * 8**3 / 0.5


def test_a_function_takes_as_long_as_it_takes():
    assert 0.02 <= speed.sustained(lambda: time.sleep(0.02)) < 0.04


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_activations_change_neither_loss_nor_gradients(batch, kind):
    results = []
    for checkpointed in (False, True):
        model = small(kind)
        if checkpointed:
            speed.checkpoint_activations(model)
        torch.manual_seed(0)  # dropout, too, must be the same when a layer is computed again
        _, loss = model(*batch)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_attention_of_short_sequences_on_a_cpu_is_computed_in_float32():
    q, k, v = torch.randn(3, 1, 2, 8, 4, generator=seeded(0)).bfloat16()  # [b, heads, n, D] each
    with torch.autocast("cpu", torch.bfloat16):
        y = speed.causal_attention(q, k, v)
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected.bfloat16())


class OnAGPU(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("n, length", [(1, 7), (3, 7), (7, 7)])
def test_a_gpu_takes_the_kernel_without_a_mask_for_what_the_mask_says_elsewhere(monkeypatch, n, length):
    def flash(q, k, v, dropout, is_causal):
        """What PyTorch's operator computes: causal from the last row and column on."""
        scores = q.float() @ k.float().mT / q.shape[-1] ** 0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
        calls.append(is_causal)
        return (scores.masked_fill(later, -torch.inf).softmax(-1) @ v.float()).to(q.dtype), None

    calls, generator = [], seeded(0)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", flash)
    q = torch.randn(2, 3, n, 8, generator=generator).bfloat16()  # [b, heads, n, D]
    k, v = torch.randn(2, 2, 3, length, 8, generator=generator).bfloat16()
    expected = speed.causal_attention(q, k, v)
    assert calls == []
    y = speed.causal_attention(q.as_subclass(OnAGPU), k, v)
    assert torch.allclose(y.float(), expected.float(), atol=0.02)
    assert calls == ([True] if n < length else [])


@pytest.mark.parametrize("device, compiler", [("cpu", "C++ compiler"), ("cuda", "C compiler")])
def test_where_a_compiler_is_missing_one_line_says_so_and_nothing_is_compiled(monkeypatch, capsys,
        device, compiler):
    monkeypatch.setattr(border.shutil, "which", lambda name: None)
    assert not border.can_compile(torch.device(device))
    said = capsys.readouterr().err
    assert compiler in said and said.count("\n") == 1


@pytest.mark.parametrize("kind", ["rope", "rar"])
def test_layers_compiled_for_decoding_draw_the_same_tokens(kind, monkeypatch):
    torch.compiler.reset()
    classes, drawn = torch.arange(5), []
    order = torch.arange(3).expand(5, -1)  # a part of the image: what is compiled depends on the step
    for compiled in (False, True):
        model = small(kind, n_layer=1).eval()
        if compiled:
            compile_one = torch.nn.Module.compile
            monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **options: compile_one(
                layer, backend="eager", **options))  # no kernels: quick
            speed.compile_layers(model)
        drawn.append(model.generate(classes, order, steps=-1, generator=seeded(0)))
    assert torch.equal(*drawn)
