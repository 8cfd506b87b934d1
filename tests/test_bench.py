"""The benchmark as a specification: what it measures, and the floor that it measures by; and the fast path,
compiled and in pieces, against the plain one."""

import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import N, V, inputs_of, seeded, small_model
from PIL import Image

import bench
import common
from randar import generation_order, step_sizes

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------------------
# What is measured


@pytest.mark.parametrize("steps", [1, 5, -1])
def test_decoding_without_a_cache_has_the_logits_of_cached_decoding(model, batch, steps):
    _, classes, order = batch
    made = list(model.decode(classes, order, steps, (1, 1), generator=seeded(0)))
    tokens, done = torch.zeros_like(order), 0
    for step in made:
        m = step.tokens.shape[1]
        logits = bench.uncached_logits(model, tokens, classes, order, done, m)
        assert torch.allclose(logits, step.logits, atol=1e-4)
        tokens.scatter_(1, step.positions, step.tokens)
        done += m
    assert done == N


def work_of_decoding(model, classes, order, steps):
    """[(sequences, new tokens, tokens that the last one sees, queries of the head)] of each step."""
    passes, in_head = [], inputs_of(model.output)
    model.layers[0].attention.register_forward_pre_hook(
        lambda _, inputs: passes.append((*inputs[0].shape[:2], inputs[3] + inputs[0].shape[1])))
    list(model.decode(classes, order, steps, cfg=(1, 1), generator=seeded(0)))
    return [(*sizes, x.shape[1]) for sizes, x in zip(passes, in_head, strict=True)]


@pytest.mark.parametrize("steps", [1, 5, -1])
def test_the_floor_counts_the_operations_that_decoding_makes(model, batch, steps):
    layers, d = len(model.layers), model.config.dim
    weights = sum(p.numel() for p in model.layers.parameters())
    operations = 0
    for b, n, length, m in work_of_decoding(model, *batch[1:], steps):
        seen = sum(range(length - n + 1, length + 1))  # by each of the new tokens, itself included
        operations += 2 * b * (n * weights + m * d * V + layers * 2 * d * seen)
    floor = bench.decoding_floor(model, len(batch[1]), steps, 4, rate=1.0, speed=math.inf)
    assert math.isclose(floor, operations, rel_tol=0.01)


@pytest.mark.parametrize("steps", [1, 5, -1])
def test_the_floor_reads_weights_keys_and_values_once_a_step_and_writes_the_new_ones(model, batch, steps):
    layers, d = len(model.layers), model.config.dim
    weights = sum(p.numel() for p in model.layers.parameters()) + model.output.weight.numel()
    numbers = sum(weights + b * layers * 2 * d * (length + n)
                  for b, n, length, _ in work_of_decoding(model, *batch[1:], steps))
    assert bench.decoding_floor(model, len(batch[1]), steps, 2, rate=math.inf, speed=1.0) == 2 * numbers


def test_cases_run_in_turn_until_the_time_is_up():
    calls = []
    cases = {name: lambda name=name: calls.append(name) for name in "ab"}
    assert bench.interleaved(cases, CPU, 100, "test").keys() == cases.keys() and calls == list("ab" * 5)
    calls.clear()
    bench.interleaved(cases, CPU, 0, "test")
    assert calls == list("ab")


def test_the_peak_is_that_of_each_case():
    cases = {"much": lambda: torch.ones(10**8), "little": lambda: None}
    peak = {name: gigabytes for name, (_, gigabytes) in bench.interleaved(cases, CPU, 0, "test").items()}
    if None in peak.values():
        pytest.skip("only Linux tells")
    assert 0.3 < peak["much"] - peak["little"] < 0.6


@pytest.mark.filterwarnings("ignore")
def test_the_command_writes_every_figure_and_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.SIZES, "toy", dict(dim=32, n_layer=1, n_head=2, dropout=0.0))
    monkeypatch.setattr(common, "matrix_rate", lambda device, precision, side: 1e11)
    monkeypatch.setattr(common, "can_compile", lambda device: False)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--batch-size", "2", "--seconds", "0", "--device", "cpu",
                                      "--out", str(tmp_path / "out")])
    bench.main()
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    precisions = 1 + (common.fast_precision(CPU) is not torch.float32)
    assert [len(written[name]) for name in ("training", "sampling", "scaling")] == [
        precisions, 2 * 2 * 2 * 3 + 2 * (precisions - 1), 4]
    assert {row["steps"] for row in written["sampling"]} == {64, 22, 12}
    assert all(row["seconds"] > 0 and row["times_floor"] > 0 for row in written["sampling"])
    assert [row["tokens"] for row in written["scaling"]] == [64, 256, 576, 1024]
    kept = [row["kept_GB"] / row["tokens"] for row in written["scaling"]]
    assert max(kept) < 1.2 * min(kept)  # memory of training grows as the tokens do, not as their square
    assert "uncached float32" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "bench.png").size == (1430, 550)


def test_a_batch_of_no_images_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--batch-size", "0"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "--batch-size must be at least 1, not 0" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# The fast path is the plain one


def loss_and_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


def test_the_loss_in_pieces_is_the_plain_loss_with_its_gradients():
    model = small_model(grid=(16, 16), vocab_size=16384, n_layer=1)
    order = generation_order("random", 10, (16, 16), seeded(0))
    tokens, classes = torch.randint(16384, (10, 256), generator=seeded(1)), torch.zeros(10, dtype=torch.int64)
    in_head = inputs_of(model.output)
    pieces = loss_and_gradients(model, model.loss(tokens, classes, order))
    assert [len(x) for x in in_head][:2] == [8, 2]  # images at a time
    logits = model(tokens, classes, order)
    targets = tokens.gather(1, order)
    plain = loss_and_gradients(model, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    assert torch.isclose(pieces[0], plain[0], rtol=1e-5)
    for gradient, expected in zip(pieces[1], plain[1], strict=True):
        assert (gradient - expected).norm() < 1e-4 * expected.norm()


def test_logits_are_not_kept_for_the_backward_pass(model, batch):
    model, kept = small_model(grid=(8, 8), vocab_size=4096, n_layer=1), []
    tokens, order = torch.zeros(4, 64, dtype=torch.int64), generation_order("random", 4, (8, 8))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        model.loss(tokens, torch.zeros(4, dtype=torch.int64), order)
    assert max(kept) < 4 * 64 * 4096


def test_a_cpu_attends_in_float32_where_the_rest_is_bfloat16(model, batch, attention_calls):
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(*batch)
    assert len(attention_calls) == 2 and all(q.dtype == torch.float32 for q, _, _, _ in attention_calls)
    assert torch.isclose(loss, model.loss(*batch), rtol=0.02)


def test_compiled_training_is_plain_training(model, batch):
    torch.compiler.reset()
    plain = loss_and_gradients(model, model.loss(*batch))
    compiled = loss_and_gradients(model, torch.compile(model.loss, backend="aot_eager")(*batch))
    assert torch.isclose(plain[0], compiled[0])
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(plain[1], compiled[1], strict=True))


def test_compiled_decoding_is_plain_decoding_in_few_graphs(model, batch):
    _, classes, order = batch
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    plain = list(model.decode(classes, order, 7, generator=seeded(0)))
    for layer in model.layers:
        layer.compile(dynamic=True, backend=backend)
    compiled = list(model.decode(classes, order, 7, generator=seeded(0)))
    for step, expected in zip(compiled, plain, strict=True):
        assert (step.tokens == expected.tokens).all()
        assert torch.allclose(step.logits, expected.logits, atol=1e-4)
    assert len(set(step_sizes(N, 7))) > 1 and 0 < len(graphs) <= 4  # for 2 layers and 7 steps
