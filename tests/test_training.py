"""Training for real: the recipe, stopped, killed and resumed, on many processes."""

import json
import math
import random
import re
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import SMALL, N, V, files_of, run_typed, small_tokenizer, typed
from PIL import Image

import train
from randar import RandAR, generation_order, load_randar
from rar import KINDS
from support import border, data, toy
from tokenizer import Tokenizer, load_tokenizer, save_tokenizer


@pytest.fixture
def no_pictures(monkeypatch):
    """Half of the time of short trainings goes into them."""
    monkeypatch.setattr(train, "draw_samples", lambda *inputs, title: None)
    monkeypatch.setattr(train, "draw_loss", lambda log, path: None)


TRAIN = f"train.py --data tokens --size tiny {SMALL}"


def log_of(folder):
    return [json.loads(line) for line in open(f"{folder}/log.jsonl")]


def losses(folder):
    return [line["loss"] for line in log_of(folder)]


# --------------------------------------------------------------------------------------------------
# The recipe


def test_the_learning_rate_is_constant_for_five_sixths_and_then_falls_linearly():
    rates = [train.learning_rate(step, 600, peak=4e-4) for step in range(600)]
    assert set(rates[:501]) == {4e-4}
    falls = [a - b for a, b in zip(rates[500:], rates[501:])]
    assert all(math.isclose(fall, (4e-4 - 1e-5) / 100, rel_tol=1e-6) for fall in falls)
    assert math.isclose(train.learning_rate(600, 600, peak=4e-4), 1e-5)


def test_rars_learning_rate_rises_for_a_quarter_and_falls_along_a_cosine():
    rates = [train.learning_rate(step, 400, 4e-4, 1e-5, 3 / 4, 1 / 4, cosine=True)
             for step in range(401)]
    rises, falls = ([b - a for a, b in zip(part, part[1:])] for part in (rates[:101], rates[100:]))
    assert 0 < rates[0] < 4e-6 + 1e-9 and rates[100] == 4e-4 and math.isclose(rates[400], 1e-5)
    assert all(math.isclose(rise, 4e-4 / 101, rel_tol=1e-6) for rise in rises)
    assert max(falls) < 0 and min(falls) == min(falls[149:151])  # steepest in the middle
    assert math.isclose(rates[250], (4e-4 + 1e-5) / 2)


def test_weight_decay_is_for_matrices_only(model):
    decayed, kept = train.make_optimizer(model, 1e-3).param_groups
    assert decayed["weight_decay"] == 0.05 and kept["weight_decay"] == 0
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in kept["params"]} == {1}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("line, expected", [
    ("", dict(steps=1200, batch_size=64, learning_rate=3e-3, dropout=0.0, token_dropout=0.0)),
    ("--size fine --data fine", dict(steps=6000, batch_size=32, token_dropout=0.1, dropout=0.0)),
    ("--size L --data tokens", dict(
        steps=360_000, batch_size=1024, micro_batch=32, learning_rate=4e-4, min_lr=1e-5,
        descent=1 / 6, weight_decay=0.05, grad_clip=1.0, dropout=0.1, token_dropout=0.1,
        class_dropout=0.1, order="random", anneal=None, checkpoint_activations=False)),
    ("--size S --data tokens", dict(steps=200_000, batch_size=256, dropout=0.1, token_dropout=0.1)),
    ("--model rar --size B --data tokens", dict(
        steps=250_000, batch_size=2048, learning_rate=4e-4, warm_up=0.25, descent=0.75, beta2=0.96,
        schedule="cosine", weight_decay=0.03, order="raster", anneal=[0.5, 0.75])),
    ("--model rar", dict(steps=1200, batch_size=64, schedule="linear", warm_up=0, beta2=0.95)),
    ("--anneal 0 1 --order spiral-in", dict(order="spiral_in", anneal=[0, 1])),
    ("--size XXL --data tokens --dropout 0", dict(
        steps=360_000, batch_size=1024, micro_batch=16, dropout=0.0)),
])
def test_a_size_sets_the_papers_recipe_and_any_of_it_can_be_overridden(here, run, monkeypatch, line,
        expected):
    asked = []
    monkeypatch.setattr(train, "train", asked.append)
    run(f"train.py {line}")
    assert {name: getattr(asked[0], name) for name in expected} == expected


def batch_of(step, part=slice(None), **changes):
    """A training batch of 64 made-up images: tokens, classes, orders, drop_class."""
    folder = SimpleNamespace(grid=(4, 4), batch=lambda *_: ("tokens", "classes"))
    settings = dict(seed=0, batch_size=64, class_dropout=0.1, order="random", anneal=None, steps=4)
    return train.training_batch(folder, step, SimpleNamespace(**settings | changes), part)


def test_every_image_of_every_step_gets_an_order_of_its_own():
    rows = torch.cat([batch_of(step)[2] for step in range(3)])
    assert (rows.sort(dim=1).values == torch.arange(16)).all()
    assert len({tuple(row) for row in rows.tolist()}) == 3 * 64


def test_one_class_in_ten_is_hidden_in_training():
    hidden = torch.cat([batch_of(step)[3] for step in range(100)])
    assert abs(hidden.float().mean() - 0.1) < 0.015


@pytest.mark.parametrize("order", ["raster", "spiral_in"])
@pytest.mark.parametrize("step, share", [(0, 1), (1, 0.75), (3, 0.25), (4, 0)])
def test_annealing_shuffles_that_share_of_the_images_and_leaves_the_others_in_order(step, share,
        order):
    orders = batch_of(step, order=order, anneal=(0, 1), batch_size=1000)[2]
    shuffled = (orders != generation_order(order, 1, (4, 4))).any(1)
    assert abs(shuffled.float().mean() - share) < 0.06
    assert (orders.sort(dim=1).values == torch.arange(N)).all()
    assert len(set(map(tuple, orders[shuffled].tolist()))) == shuffled.sum()


@pytest.mark.parametrize("anneal", [None, (0, 1)])
def test_the_parts_of_a_batch_make_up_the_whole(anneal):
    parts = slice(None), slice(0, 32), slice(32, 64)
    for whole, *halves in zip(*[batch_of(2, part, anneal=anneal)[2:] for part in parts]):
        assert torch.equal(whole, torch.cat(halves))


# --------------------------------------------------------------------------------------------------
# What it leaves, and says


def test_training_leaves_these_files_and_says_what_to_do_with_them(here, run, capsys):
    run(f"{TRAIN} --steps 2 --picture-every 1 --out new")
    assert {path.name for path in (here / "new").iterdir()} == {
        "randar.pt", "training.pt", "tokenizer.pt", "samples.png", "loss.png", "log.jsonl"}
    assert "python sample.py --ckpt new/randar.pt" in capsys.readouterr().err
    model = load_randar("new/randar.pt")
    assert model.config.grid == (4, 4) and model.config.vocab_size == V
    assert model.class_names == ["cat", "dog"] and model.order == "random"
    assert model.fingerprint == data.facts_of(load_tokenizer("new/tokenizer.pt"), "")["fingerprint"]
    assert (here / "new/tokenizer.pt").read_bytes() == (here / "tok.pt").read_bytes()
    for name in ("loss.png", "samples.png"):
        assert len(Image.open(here / "new" / name).convert("RGB").getcolors(maxcolors=10**6)) > 20


def test_the_log_has_a_line_for_each_report_and_held_out_loss_at_checkpoints_and_the_end(
        here, run, no_pictures, capsys):
    run(f"{TRAIN} --steps 5 --picture-every 2 --out new")
    log, bar = log_of("new"), capsys.readouterr().err
    assert "held-out loss 3." in bar and "loss=3." in bar and "learning_rate=0.003" in bar
    assert [(line["step"], line["images"]) for line in log] == [(i, 4 * i) for i in range(1, 6)]
    assert ["held_out_loss" in line for line in log] == [False, True, False, True, True]
    for line in log:
        assert line.keys() - {"held_out_loss"} == {"step", "images", "loss", "learning_rate",
                                                   "images_per_second", "tokens_per_second"}
        assert 2 < line["loss"] < 5  # of an untrained model: ln 32 = 3.5


def test_the_held_out_loss_is_of_fixed_images_and_orders_and_free_of_chance(here, run, no_pictures,
        monkeypatch):
    """That of the saved weights, the class given and nothing dropped."""
    seen, measure = [], train.held_out_loss
    monkeypatch.setattr(train, "held_out_loss", lambda model, *inputs: seen.append((
        measure(model, *inputs), measure(model, *inputs), model.training)) or seen[-1][0])
    run(f"{TRAIN} --steps 2 --dropout 0.5 --class-dropout 0.9 --out new")
    (first, second, training), = seen
    assert first == second == log_of("new")[-1]["held_out_loss"] and training

    model = load_randar("new/training.pt")
    tokens, classes = data.TokenFolder("tokens").held_out()
    order = generation_order("random", len(tokens), (4, 4), torch.Generator().manual_seed(0))
    assert model(tokens, classes, order)[1].item() == pytest.approx(first, rel=1e-2)  # bfloat16


@pytest.mark.parametrize("options, kind, file, order", [
    ("--model rar", "rar", "rar.pt", "raster"), ("--position dense", "dense", "randar.pt", "random"),
    ("--position merge --order spiral_in", "merge", "randar.pt", "spiral_in")])
def test_every_model_is_trained_by_the_same_command(here, run, options, kind, file, order):
    run(f"{TRAIN} {options} --steps 2 --out new")
    model = load_randar(f"new/{file}")
    assert type(model) is KINDS[kind][0] and model.order == order
    assert Image.open("new/samples.png").format == "PNG"


def test_samples_are_drawn_by_a_copy_in_the_precision_of_sampling_and_training_goes_on(here, run,
        monkeypatch):
    """Of checkpointed layers, too, whose forward is not a method: it must be the copy's."""
    types, logits = [], RandAR.logits
    monkeypatch.setattr(train, "decoding_precision", lambda device: torch.bfloat16)
    monkeypatch.setattr(RandAR, "logits", lambda self, x: types.append((
        self.output.weight.dtype, self.training)) or logits(self, x))
    run(f"{TRAIN} --steps 2 --picture-every 1 --checkpoint-activations --out new")
    learns, draws = types.index((torch.float32, True)), types.index((torch.bfloat16, False))
    assert learns < draws < len(types) - 1 - types[::-1].index((torch.float32, True))


# --------------------------------------------------------------------------------------------------
# Many processes


def test_two_processes_learn_what_one_learns(here, run):
    """On the same global batch; each has its own share, in micro-batches."""
    line = f"{TRAIN} --steps 3 --micro-batch 1"
    run(f"{line} --out alone")
    run_typed(f"{line} --out together", here, processes=2)
    assert losses("together") == pytest.approx(losses("alone"), rel=1e-3)
    alone, together = (load_randar(f"{name}/randar.pt") for name in ("alone", "together"))
    for a, b in zip(alone.parameters(), together.parameters()):
        assert (a - b).abs().max() < 0.02 * a.abs().max() + 1e-4


@pytest.mark.parametrize("rank, lines", [(0, 1), (1, 0)])
def test_a_mistake_of_many_processes_is_said_once(here, run, monkeypatch, capsys, rank, lines):
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(border, "join_processes", lambda name: (rank, 2, torch.device("cpu")))
    with pytest.raises(SystemExit, match="2"):
        run("train.py --batch-size 3 --data tokens --steps 1 --out new")
    said = capsys.readouterr().err
    assert said.count("--batch-size 3 cannot be shared by 2 processes") == said.count("\n") == lines
    assert not (here / "new").exists()


@pytest.mark.parametrize("micro_batch", [2, 1])
def test_gradients_are_sent_once_a_step_however_many_micro_batches_it_has(here, run, no_pictures,
        monkeypatch, micro_batch):
    """This process believes that it is the first of two: the real machinery, without the second."""
    def join(name):
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        return 0, 2, torch.device("cpu")

    sent, wrap = [], train.DistributedDataParallel

    def counted(*inputs, **options):
        def send(state, bucket):
            sent.append(len(bucket.parameters()))
            sum_up = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
            return sum_up.then(lambda future: future.value()[0])

        wrapped = wrap(*inputs, **options)
        wrapped.register_comm_hook(None, send)
        return wrapped

    monkeypatch.setattr(border, "join_processes", join)
    monkeypatch.setattr(train, "DistributedDataParallel", counted)
    run(f"{TRAIN} --steps 3 --micro-batch {micro_batch} --out new")
    assert sum(sent) == 3 * len(list(load_randar("new/randar.pt").parameters()))


# --------------------------------------------------------------------------------------------------
# Steps that are not finite


def spoil(monkeypatch, steps):
    """Make the loss of these training steps infinite."""
    forward, calls = RandAR.forward, iter(range(10**6))

    def spoilt(self, *inputs):
        logits, loss = forward(self, *inputs)
        if self.training and next(calls) in steps:
            loss = loss * math.inf
        return logits, loss

    monkeypatch.setattr(RandAR, "forward", spoilt)


def test_a_step_without_a_finite_gradient_is_skipped_and_ten_in_a_row_end_the_training(
        here, run, no_pictures, monkeypatch, capsys):
    spoil(monkeypatch, steps=[*range(1, 10), *range(11, 50)])  # nine in a row are too few
    with pytest.raises(SystemExit, match="2"):
        run(f"{TRAIN} --steps 100 --picture-every 11 --out spoilt")
    said = capsys.readouterr().err
    assert "step 2 skipped: the norm of its gradient is nan" in said
    assert "the last 10 steps were skipped: lower the --learning-rate" in said
    assert [line["step"] for line in log_of("spoilt")] == [1, 11]
    assert all(p.isfinite().all() for p in load_randar("spoilt/randar.pt").parameters())


def test_while_steps_are_skipped_the_last_good_checkpoint_stays(here, run, no_pictures, monkeypatch):
    spoil(monkeypatch, steps=range(2, 50))
    with pytest.raises(SystemExit, match="2"):
        run(f"{TRAIN} --steps 100 --picture-every 1 --out spoilt")
    assert border.load("spoilt/training.pt")["step"] == border.load("spoilt/randar.pt")["step"] == 2


# --------------------------------------------------------------------------------------------------
# Interrupted and resumed


def stop_in_step(monkeypatch, number, name=signal.SIGTERM):
    """As if the signal came in the `number`-th training step from now."""
    calls, rate = [], train.learning_rate

    def stop_there(*inputs):
        calls.append(1)
        if len(calls) == number:
            signal.raise_signal(name)
        return rate(*inputs)

    monkeypatch.setattr(train, "learning_rate", stop_there)


def content_of(folder):
    """All of a training.pt but what measures speed."""
    content = border.load(f"{folder}/training.pt")
    tensors = [*content["model"].values()]
    tensors += [x for state in content["optimizer"]["state"].values() for x in state.values()]
    numbers = ("step", "loss", "held_out_loss", "learning_rate")
    log = [[line.get(name) for name in numbers] for line in content["log"]]
    return [x.tolist() for x in tensors], log, content["step"]


def test_ctrl_c_saves_and_the_resumed_training_of_the_toy_world_is_the_same(here, run, no_pictures,
        monkeypatch, capsys):
    monkeypatch.setitem(train.DRAWN, "plain", 64)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        stop_in_step(patch, 2, signal.SIGINT)
        run(f"train.py --size tiny --steps 4 {SMALL} --out stopped")  # with no --data
    said = capsys.readouterr()
    assert "saved step 2; to go on: python train.py --resume --out stopped" in said.out
    assert "stopping after this step" in said.err and not list(here.rglob("*.partial"))
    assert border.load("stopped/training.pt")["step"] == 2
    run("train.py --resume --out stopped")
    run(f"{TRAIN} --data stopped/tokens --steps 4 --out straight")
    assert content_of("stopped") == content_of("straight")
    assert load_randar("stopped/randar.pt").class_names == toy.CLASSES


@pytest.mark.parametrize("options, stopped_after", [
    ("", 3), ("--dropout 0.1", 4), ("--checkpoint-activations", 5),
    ("--model rar --anneal 0 0.9 --dropout 0.1", 2)])
def test_stopped_after_any_step_it_goes_on_as_if_nothing_had_happened(
        here, run, no_pictures, monkeypatch, options, stopped_after):
    """A line of the log is the mean of three steps; each must be right, wherever the stop came."""
    line = f"{TRAIN} --steps 6 --report 3 {options}"
    run(f"{line} --out straight")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in_step(patch, stopped_after)
        run(f"{line} --out stopped")
    assert border.load("stopped/training.pt")["step"] == stopped_after
    run("train.py --resume --out stopped")
    assert content_of("stopped") == content_of("straight")


def test_killed_at_any_moment_it_goes_on_from_a_complete_checkpoint_to_the_same_end(here, run,
        no_pictures):
    """SIGKILL leaves no time for anything; each step saves, so that most kills hit a save."""
    line = f"{TRAIN} --descent 0 --steps 500 --picture-every 1 --out killed"
    process, end = subprocess.Popen(**typed(line, here)), time.time() + 90
    while not (here / "killed" / "training.pt").exists() and time.time() < end:
        time.sleep(0.02)
    time.sleep(random.random() / 2)
    process.kill()
    process.communicate(timeout=60)
    step = border.load("killed/training.pt")["step"]
    assert 0 < step < 500
    run(f"train.py --resume --out killed --steps {step + 2}")
    run(f"{TRAIN} --descent 0 --steps {step + 2} --out straight")
    assert losses("killed") == losses("straight")


def test_a_save_that_is_cut_short_leaves_the_last_complete_file(tmp_path):
    def cut_short(partial):
        partial.write_bytes(b"half of it")
        raise KeyboardInterrupt

    border.save({"step": 1}, tmp_path / "a.pt")
    with pytest.raises(KeyboardInterrupt):
        border.write_safely(tmp_path / "a.pt", cut_short)
    assert files_of(tmp_path).keys() == {tmp_path / "a.pt"}
    assert border.load(tmp_path / "a.pt") == {"step": 1}


def test_the_fine_world_is_drawn_in_its_own_size(here, run, no_pictures, monkeypatch):
    monkeypatch.setitem(train.DRAWN, "fine", 8)
    tokenizer = border.CHECKPOINTS / "tokenizer.pt"
    run(f"train.py --size fine --data fine --tokenizer {tokenizer} --steps 1 {SMALL} --out new")
    config = load_randar("new/randar.pt").config
    assert config.grid == (16, 16) and (config.token_dropout, config.dropout) == (0.1, 0.0)


def test_a_training_of_an_earlier_version_goes_on(here, run, no_pictures):
    """Its file does not say some of what ours do."""
    run(f"{TRAIN} --steps 4 --grad-clip 0.5 --out straight")
    run(f"{TRAIN} --steps 2 --grad-clip 0.5 --descent 0 --out old")
    content = border.load("old/training.pt")
    for facts, name in ((content, "kind"), (content, "seconds"), (content["config"], "token_dropout"),
                        (content["settings"], "token_dropout")):
        del facts[name]
    border.save(content, "old/training.pt")
    run(f"train.py --resume --steps 4 --descent {1 / 6} --out old")
    assert losses("old") == losses("straight")


def test_resuming_uses_the_tokenizer_that_was_copied_at_the_start(here, run, no_pictures):
    save_tokenizer(small_tokenizer(), "own.pt")
    run(f"{TRAIN} --tokenizer own.pt --steps 1 --out new")
    save_tokenizer(small_tokenizer(codebook_size=V - 1), "own.pt")  # trained anew in the meantime
    copied = (here / "new" / "tokenizer.pt").read_bytes()
    run("train.py --resume --out new --steps 2")
    assert (here / "new" / "tokenizer.pt").read_bytes() == copied and len(losses("new")) == 2


# --------------------------------------------------------------------------------------------------
# Mistakes: one line that names the remedy, exit code 2, nothing written


MISTAKES = {
    "--data photos": "python tokenizer.py encode --images photos --out tokens --tokenizer "
                     "llamagen, then add --data tokens",
    "--size L": "--size L needs tokens of your images: python tokenizer.py encode",
    "--data tokens --tokenizer as_many.pt": "as_many.pt did not make the tokens: give --tokenizer",
    "--data tokens --size B": "--model randar has the sizes tiny, toy, fine, S, M, L, XL, XXL",
    "--data tokens --model rar --position dense": "rar no --position",
    "--data tokens --out trained": "trained holds a training: add --resume",
    "--resume --out nowhere": "no checkpoint at nowhere/training.pt",
    "--resume --out trained": "trained holds 4 steps already: ask for more --steps",
    "--resume --out trained --steps 5 --batch-size 8": "another training: leave its flags",
    "--resume --out trained --steps 5 --position dense": "another training: leave its flags",
    "--resume --out trained --steps 5 --size toy": "trained holds another training",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_is_one_line_with_exit_code_two_and_no_trace(here, run, capsys, options):
    torch.manual_seed(1)
    save_tokenizer(Tokenizer(small_tokenizer().config), "as_many.pt")  # codes, but others
    before = files_of(here)
    with pytest.raises(SystemExit, match="2"):
        run(f"train.py {options}")
    out, errors = capsys.readouterr()
    assert out == "" and len(errors.splitlines()) == 1
    assert re.search(MISTAKES[options], errors), errors
    assert files_of(here) == before
