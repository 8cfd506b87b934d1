"""The benchmark as a specification: what it measures, and the floor that it measures by."""

import json
import math

import pytest
import torch
from helpers import N, V, inputs_of, seeded, small_model
from PIL import Image

from studies import bench

CPU = torch.device("cpu")
STEPS = pytest.mark.parametrize("steps", [1, 5, -1])


@STEPS
def test_decoding_without_a_cache_has_the_logits_of_cached_decoding(model, batch, steps):
    _, classes, order = batch
    tokens, done = torch.zeros_like(order), 0
    for step in model.decode(classes, order, steps, (1, 1), generator=seeded(0)):
        m = step.tokens.shape[1]
        logits = bench.uncached_logits(model, tokens, classes, order, done, m)
        assert torch.allclose(logits, step.logits, atol=1e-4)
        tokens.scatter_(1, step.positions, step.tokens)
        done += m
    assert done == N


def work_of_decoding(model, classes, order, steps):
    """[(sequences, new tokens, tokens that the last one sees, queries)] of each step."""
    passes, in_head = [], inputs_of(model.output)
    model.layers[0].attention.register_forward_pre_hook(
        lambda _, inputs: passes.append((*inputs[0].shape[:2], inputs[4] + inputs[0].shape[1])))
    list(model.decode(classes, order, steps, cfg=(1, 1), generator=seeded(0)))
    return [(*sizes, x.shape[1]) for sizes, x in zip(passes, in_head, strict=True)]


@STEPS
def test_the_floor_counts_the_operations_that_decoding_makes(model, batch, steps):
    layers, d = len(model.layers), model.config.dim
    weights = sum(p.numel() for p in model.layers.parameters())
    operations = 0
    for b, n, length, m in work_of_decoding(model, *batch[1:], steps):
        seen = sum(range(length - n + 1, length + 1))  # by each of the new tokens, itself included
        operations += 2 * b * (n * weights + m * d * V + layers * 2 * d * seen)
    floor = bench.decoding_floor(model, len(batch[1]), steps, rate=1.0, speed=math.inf)
    assert math.isclose(floor, operations, rel_tol=0.01)


@STEPS
def test_the_floor_reads_all_once_a_step_and_writes_new_keys_and_values(model, batch, steps):
    layers, d = len(model.layers), model.config.dim
    weights = sum(p.numel() for p in model.layers.parameters()) + model.output.weight.numel()
    numbers = sum(weights + b * layers * 2 * d * (length + n)
                  for b, n, length, _ in work_of_decoding(model, *batch[1:], steps))
    floor = bench.decoding_floor(model, len(batch[1]), steps, rate=math.inf, speed=1.0)
    assert floor == 4 * numbers  # bytes of float32


@STEPS
def test_products_and_attention_one_after_the_other_take_longer_and_twice_as_long_at_most(model, steps):
    for streams in (1, 64):
        floor, apart = (bench.decoding_floor(model, streams, steps, 1e12, 1e11, way) for way in (False, True))
        assert floor <= apart <= 2 * floor
    assert floor < apart  # attention reads a cache for each sequence, products their weights once for all


def test_a_training_step_costs_its_share_of_the_optimizer(model, monkeypatch):
    monkeypatch.setattr(bench, "interleaved", lambda cases, *_: {name: 1.0 for name in cases})
    rows = bench.training_rows(model, 2, rate=1e12, seconds=0, accumulated=4)
    assert [row["seconds"] for row in rows] == [1.25]


def test_cases_run_in_turn_until_the_time_is_up_and_the_first_round_does_not_count(monkeypatch):
    calls, clock = [], [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def case(name, slow=1):
        def run():
            calls.append(name)
            clock[0] += slow if calls.count(name) > 1 else 100  # to warm up takes long
        return run

    assert bench.interleaved({"a": case("a"), "b": case("b", 2)}, CPU, 1000, "") == {"a": 1, "b": 2}
    assert calls == list("ab" * 6)
    calls.clear()
    bench.interleaved({"a": case("a"), "b": case("b")}, CPU, 3, "")
    assert calls == list("ab" * 3)  # 4 seconds are over after two rounds that count


def test_exact_decoding_is_counted_and_timed_beside_the_paper_s(model, monkeypatch):
    monkeypatch.setattr(bench, "MANY", 2)  # images at a time
    rows = {(row["batch"], row["decoding"]): row for row in bench.exact_rows(model.eval(), 0)}
    assert len(rows) == 2 * 9 and all(row["seconds"] > 0 for row in rows.values())
    plain, exact = rows[1, "one token a step"], rows[1, "exact, 4 drafts"]
    assert (plain["passes"], plain["tokens_read"]) == (N, 2 * N)  # x and P of each turn
    assert exact["passes"] < N and exact["tokens_read"] > 2 * N  # fewer passes, more tokens


def test_rar_is_timed_to_tokens_and_to_pixels(run, capsys):
    run("studies/bench.py --rar tiny --batch-size 2 --seconds 0.001 --device cpu")
    header, tokens, pixels = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header[-2:] == ["seconds", "images_per_second"] and (tokens[3], pixels[3]) == ("tokens", "pixels")
    for line in (tokens, pixels):
        assert float(line[-1]) == pytest.approx(2 / float(line[-2]), rel=0.01)


@pytest.mark.filterwarnings("ignore")
def test_the_command_writes_every_figure_and_a_picture(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.SIZES, "toy", dict(dim=32, n_layer=1, n_head=2, dropout=0.0))
    monkeypatch.setattr(bench, "matrix_rate", lambda *_: 1e11)
    monkeypatch.setattr(bench, "default_steps", lambda num_tokens: 22)  # 352 take seconds
    monkeypatch.setattr(bench, "sustained", lambda function: 0.1)  # seconds; really, one or two
    monkeypatch.setattr(bench, "exact_rows", lambda *_: [dict(decoding="exact")])  # of a trained model
    run(f"studies/bench.py --batch-size 2 --seconds 0.001 --device cpu --out {tmp_path}/out")
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [len(written[name]) for name in ("training", "sampling")] == [1, 3 * 3]
    assert {row["steps"] for row in written["sampling"]} == {64, 22, 12}
    assert all(row["seconds"] > 0 and row["times_floor"] > 0 for row in written["sampling"])
    assert [row["tokens"] for row in written["sampling_by_tokens"]] == [64, 256, 576, 1024]
    assert "uncached" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "bench.png").size == (1300, 500)


def test_compiled_training_is_plain_training(batch):
    torch.compiler.reset()
    model, gradients = small_model(n_layer=1), []
    for network in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        loss = network(*batch)[1]
        loss.backward()
        gradients.append([loss, *(p.grad.clone() for p in model.parameters())])
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(*gradients, strict=True))
