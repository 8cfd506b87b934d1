"""Training for real: the recipe, stopped and killed and resumed, on many processes, and what it reports."""

import json
import math
import os
import random
import signal
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import SMALL, V, run_typed, small_model, small_tokenizer, typed

import common
import data
import toy
import train
from randar import RandAR, load_randar
from vqgan import save_tokenizer

# ------------------------------------------------------------------------------------------------------------
# The recipe


def test_the_learning_rate_is_constant_for_five_sixths_and_then_falls_linearly():
    rates = [train.learning_rate(step, 600, peak=4e-4) for step in range(600)]
    assert set(rates[:501]) == {4e-4}
    falls = [a - b for a, b in zip(rates[500:], rates[501:])]
    assert all(math.isclose(fall, (4e-4 - 1e-5) / 100, rel_tol=1e-6) for fall in falls)
    assert math.isclose(train.learning_rate(600, 600, peak=4e-4), 1e-5)


def test_weight_decay_is_for_matrices_only(model):
    decayed, kept = train.make_optimizer(model, 1e-3).param_groups
    assert decayed["weight_decay"] == 0.05 and kept["weight_decay"] == 0
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in kept["params"]} == {1}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("line, expected", [
    ("", dict(steps=1200, batch_size=64, learning_rate=3e-3, dropout=0.0)),
    ("--size L", dict(steps=360_000, batch_size=1024, micro_batch=32, learning_rate=4e-4,
                      last_learning_rate=1e-5, descent=1 / 6, weight_decay=0.05, clip=1.0, dropout=0.1,
                      class_dropout=0.1, order="random", checkpoint_activations=False)),
    ("--size XXL --batch-size 256 --dropout 0", dict(steps=360_000, batch_size=256, dropout=0.0)),
])
def test_a_size_sets_the_papers_recipe_and_any_of_it_can_be_overridden(tmp_path, run, monkeypatch, line,
                                                                       expected):
    monkeypatch.chdir(tmp_path)  # where no training is in the way
    asked = []
    monkeypatch.setattr(train, "train", asked.append)
    run(f"train.py {line}")
    assert {name: getattr(asked[0], name) for name in expected} == expected


def batch_of(step, order="random", part=slice(None), **changes):
    """A training batch of 64 made-up images: tokens, classes, orders, hidden."""
    folder = SimpleNamespace(grid=(4, 4), batch=lambda number, size, seed, part: ("tokens", "classes"))
    settings = dict(seed=0, batch_size=64, class_dropout=0.1, order=order, anneal=None)
    args = SimpleNamespace(**settings | changes)
    return train.training_batch(folder, step, args, part)


def test_every_image_of_every_step_gets_an_order_of_its_own():
    rows = torch.cat([batch_of(step)[2] for step in range(3)])
    assert (rows.sort(dim=1).values == torch.arange(16)).all()
    assert len({tuple(row) for row in rows.tolist()}) == 3 * 64


def test_raster_training_is_the_counterpart_of_the_paper():
    assert (batch_of(0, order="raster")[2] == torch.arange(16)).all()


def test_one_class_in_ten_is_hidden_in_training():
    hidden = torch.cat([batch_of(step)[3] for step in range(100)])
    assert abs(hidden.float().mean() - 0.1) < 0.015


def test_the_parts_of_a_batch_make_up_the_whole():
    for whole, first, second in zip(*(batch_of(7, part=part)[2:] for part in (
            slice(None), slice(0, 32), slice(32, 64)))):
        assert torch.equal(whole, torch.cat([first, second]))


def test_the_operations_of_a_training_step_are_counted_as_they_happen():
    """By hand for the model of the tests, whose layers have 4 d^2 + 3 d h weights in their matrices."""
    model, n, d, h, layers, v = small_model(), 16, 32, 256, 2, 32
    in_matrices = layers * (4 * d * d + 3 * d * h) * 2 * n + d * v * n
    in_attention = layers * d * sum(range(2 * n)) * 2  # each of the 2 n tokens: those before it, twice
    flops = train.training_flops(model)
    assert math.isclose(flops, 6 * (in_matrices + in_attention), rel_tol=0.02)


def test_the_rate_of_matrix_products_is_that_of_this_machine():
    slow, fast = (common.matrix_rate(torch.device("cpu"), torch.float32, side=side) for side in (8, 512))
    assert 1e6 < slow < fast < 1e14


# ------------------------------------------------------------------------------------------------------------
# The same gradients for less memory, or from more processes


def test_checkpointed_activations_change_no_gradient(batch):
    gradients = []
    for checkpointed in (False, True):
        model = small_model().train()
        model.checkpoint_activations = checkpointed
        torch.manual_seed(0)  # dropout, too, must be the same when a layer is computed a second time
        model.loss(*batch).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_two_processes_learn_what_one_learns(here, run):
    """On the same global batch; each has its own share, in micro-batches that synchronise only in the end."""
    line = f"train.py --data tokens --steps 4 {SMALL} --micro-batch 1"
    run(f"{line} --out alone")
    said = run_typed(f"{line} --out together", here, processes=2)
    assert losses(here / "together") == pytest.approx(losses(here / "alone"), rel=1e-3)
    assert said.count("parameters, on") == 1 and said.count("for more pictures") == 1
    alone, together = (load_randar(here / name / "randar.pt") for name in ("alone", "together"))
    for a, b in zip(alone.parameters(), together.parameters()):
        assert (a - b).abs().max() < 0.02 * a.abs().max() + 1e-4


def test_a_mistake_of_many_processes_is_said_once(here):
    line = "train.py --batch-size 3 --data tokens --steps 1 --out new"
    process = subprocess.run(**typed(line, here, processes=2), timeout=120)
    assert process.returncode != 0 and not (here / "new").exists()
    assert process.stderr.count("--batch-size 3 cannot be shared by 2 processes") == 1


@pytest.fixture
def one_of_two(monkeypatch):
    """This process believes that it is the first of two: the real machinery, without the second."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    monkeypatch.setattr(common, "join_processes", lambda name: (0, 2, torch.device("cpu")))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("micro_batch", [2, 1])
def test_gradients_are_sent_once_a_step_however_many_micro_batches_it_has(here, run, monkeypatch, one_of_two,
                                                                          micro_batch):
    sent, wrap = [], train.DistributedDataParallel

    def counted(*inputs, **options):
        def send(state, bucket):
            sent.append(len(bucket.parameters()))
            return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])
        wrapped = wrap(*inputs, **options)
        wrapped.register_comm_hook(None, send)
        return wrapped

    monkeypatch.setattr(train, "DistributedDataParallel", counted)
    run(f"train.py --data tokens --steps 3 {SMALL} --micro-batch {micro_batch} --out new")
    assert sum(sent) == 3 * len(list(load_randar("new/randar.pt").parameters()))


def test_images_become_tokens_before_many_processes_start(here, run, one_of_two, capsys):
    with pytest.raises(SystemExit):
        run("train.py --data photos --tokenizer tok.pt --steps 1 --out new")
    assert "photos holds images: turn them into tokens first" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# Steps that are not finite


def spoil(monkeypatch, steps):
    """Make the loss of these steps infinite."""
    loss, calls = RandAR.loss, iter(range(10**6))
    monkeypatch.setattr(RandAR, "loss", lambda *inputs: loss(*inputs) * (
        math.inf if next(calls) in steps else 1))


def test_a_step_without_a_finite_gradient_is_skipped_and_said(here, run, monkeypatch, capsys):
    spoil(monkeypatch, steps=[1])
    run(f"train.py --data tokens --steps 3 {SMALL} --out spoilt")
    assert "step 2 skipped: loss inf, norm of the gradient nan" in capsys.readouterr().out
    assert [line["step"] for line in common.load("spoilt/training.pt")["log"]] == [1, 3]
    assert all(p.isfinite().all() for p in load_randar("spoilt/randar.pt").parameters())


def test_ten_such_steps_in_a_row_end_the_training_but_not_its_last_checkpoint(here, run, monkeypatch, capsys):
    spoil(monkeypatch, steps=[*range(2, 11), *range(12, 50)])  # nine in a row are too few
    with pytest.raises(SystemExit) as stop:
        run(f"train.py --data tokens --steps 100 --picture-every 12 {SMALL} --out spoilt")
    assert stop.value.code == 2
    assert "not finite in 10 steps in a row, up to step 22: start, or --resume" in capsys.readouterr().err
    assert common.load("spoilt/training.pt")["step"] == 12


# ------------------------------------------------------------------------------------------------------------
# Interrupted and resumed


def test_an_interrupted_and_resumed_training_is_the_one_that_went_straight_on(here, run, monkeypatch, capsys):
    monkeypatch.setattr(train, "TOY_IMAGES", 500)
    batch = data.TokenFolder.batch

    def press_ctrl_c_in_the_second_step(self, number, *rest):
        if number == 1:
            signal.raise_signal(signal.SIGINT)
        return batch(self, number, *rest)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(data.TokenFolder, "batch", press_ctrl_c_in_the_second_step)
        run(f"train.py --steps 4 {SMALL} --out stopped")  # with no --data: the toy world
    assert stop.value.code == 130
    assert "saved step 2; to go on: python train.py --resume --out stopped" in capsys.readouterr().out
    assert common.load("stopped/training.pt")["step"] == 2
    run("train.py --resume --out stopped")
    run(f"train.py --data stopped/tokens --steps 4 {SMALL} --out straight")
    stopped, straight = (common.load(f"{folder}/training.pt") for folder in ("stopped", "straight"))
    assert stopped["step"] == straight["step"] == 4 and stopped["class_names"] == toy.CLASSES
    assert [line["loss"] for line in stopped["log"]] == [line["loss"] for line in straight["log"]]
    assert all(torch.equal(stopped["model"][name], x) for name, x in straight["model"].items())
    for number, state in straight["optimizer"]["state"].items():
        assert all(torch.equal(stopped["optimizer"]["state"][number][name], x) for name, x in state.items())


@pytest.mark.parametrize("stopped_after", [1, 2, 3, 4, 5])
def test_stopped_after_any_step_the_log_goes_on_as_if_nothing_had_happened(here, run, monkeypatch,
                                                                           stopped_after):
    """A line of the log is the mean of three steps; each must be right, wherever the stop came."""
    line = "train.py --data tokens --steps 6 --batch-size 4 --report 3"
    run(f"{line} --out straight")
    schedule, rate = [], train.learning_rate

    def stop_there(*inputs):
        schedule.append(1)
        if len(schedule) == stopped_after:
            signal.raise_signal(signal.SIGTERM)
        return rate(*inputs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "learning_rate", stop_there)
        run(f"{line} --out stopped")
    assert common.load("stopped/training.pt")["step"] == stopped_after
    run("train.py --resume --out stopped")
    assert losses(here / "stopped") == losses(here / "straight")


def started(line, folder, after=0.0):
    """A training in a new process, as soon as it has written a checkpoint, and `after` more seconds."""
    checkpoint = folder / line.split("--out ")[1] / "training.pt"
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
    process, end = subprocess.Popen(**typed(line, folder)), time.time() + 90
    while process.poll() is None and time.time() < end:
        if checkpoint.exists() and checkpoint.stat().st_mtime_ns != before:
            time.sleep(after)
            break
        time.sleep(0.02)
    return process


def test_a_clusters_preemption_is_obeyed_and_says_how_to_go_on(here, run):
    process = started(f"train.py --data tokens --steps 100000 --picture-every 1 {SMALL} --out stopped", here)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors and "stopping after this step" in errors
    step = common.load("stopped/training.pt")["step"]
    assert f"saved step {step}; to go on: python train.py --resume --out stopped" in out
    assert not list(here.rglob("*.partial"))
    run(f"train.py --resume --out stopped --steps {step + 1}")
    assert common.load("stopped/training.pt")["step"] == step + 1


def test_killed_at_any_moment_it_goes_on_from_a_complete_checkpoint_to_the_same_end(here, run):
    """SIGKILL leaves no time for anything; each step saves, so that most kills hit a save or a picture."""
    settings, resumed = f"--descent 0 {SMALL}", "train.py --resume --out killed"
    first, step = f"train.py --data tokens --steps 500 --picture-every 1 {settings} --out killed", 0
    for line in (first, resumed):
        process = started(line, here, after=random.random())
        process.kill()
        process.communicate(timeout=60)
        assert common.load("killed/training.pt")["step"] > step
        step = common.load("killed/training.pt")["step"]
    run(f"{resumed} --steps {step + 2}")
    run(f"train.py --data tokens --steps {step + 2} {settings} --out straight")
    assert losses(here / "killed") == losses(here / "straight")


def test_killed_in_the_middle_of_a_save_the_last_complete_file_is_there(tmp_path):
    """Thirty times for real: the killed process does nothing but save."""
    def save(step):
        model = torch.from_numpy(np.full(10**6, step))  # not torch.full: its threads do not survive a fork
        common.save({"step": step, "model": model}, tmp_path / "a.pt")

    began, latest, cut_short = time.time(), 0, 0
    save(latest)
    seconds = time.time() - began
    for _ in range(30):
        child = os.fork()
        if not child:
            for step in range(latest + 1, 10**6):
                save(step)
        time.sleep(random.uniform(0.5, 4) * seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        cut_short += (tmp_path / "a.pt.partial").exists()
        content = common.load(tmp_path / "a.pt")
        assert content["step"] >= latest and (content["model"] == content["step"]).all()
        latest = content["step"]
    assert cut_short > 3 and latest > 0  # or nothing was tested


def test_more_steps_can_be_asked_for_when_all_are_done(here, run):
    run("train.py --resume --out trained --steps 5")
    assert len((here / "trained" / "log.jsonl").read_text().splitlines()) == 5


def test_resuming_uses_the_tokenizer_that_was_copied_at_the_start(here, run):
    run("tokenizer.py encode --images photos --out own_tokens --tokenizer tok.pt")
    run(f"train.py --data own_tokens --steps 4 {SMALL} --out started")
    save_tokenizer(small_tokenizer(codes=V - 1), "tok.pt")  # trained anew in the meantime
    copied = (here / "started" / "tokenizer.pt").read_bytes()
    run("train.py --resume --out started --steps 5")
    assert (here / "started" / "tokenizer.pt").read_bytes() == copied


