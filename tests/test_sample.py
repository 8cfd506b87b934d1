"""sample.py as a specification: what is drawn, what becomes of it, what is refused."""

import re
import signal
import subprocess
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (C, V, files_of, inputs_of, seeded, small_model, small_model_of, small_tokenizer,
                     typed)
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
from randar import save_randar
from support import pictures
from tokenizer import load_tokenizer, save_tokenizer

SAMPLE = "sample.py --ckpt weights/randar.pt --steps 3 --batch-size 4"
NAMES = ["cat", "dog", "cow", "hen", "pig"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a small model of 5 classes and 16 x 16 pixels, and its tokenizer."""
    monkeypatch.chdir(tmp_path)
    model = small_model()
    model.class_names = NAMES
    save_randar(model, "weights/randar.pt")
    save_tokenizer(small_tokenizer(), "weights/tokenizer.pt")
    return tmp_path


def content():
    with np.load("drawn.npz") as file:
        return dict(file)


@pytest.fixture
def drawn(folder, run):
    """A function that draws with these options, and returns what the file holds then."""
    def drawn(options):
        (folder / "drawn.npz").unlink(missing_ok=True)
        run(f"{SAMPLE} --npz drawn.npz {options}")
        return content()

    return drawn


@pytest.fixture
def grids(monkeypatch):
    """A list to which each grid that is drawn adds its pictures and their labels."""
    grids, picture_grid = [], pictures.picture_grid

    def spy(rows, title):
        grids.append((np.concatenate([row for _, row in rows]), [name for name, row in rows for _ in row]))
        return picture_grid(rows, title)

    monkeypatch.setattr(pictures, "picture_grid", spy)
    return grids


# ------------------------------------------------------------------------------------------------
# The picture


@pytest.mark.parametrize("options, expected", [
    ("", [i for i in range(5) for _ in range(8)]), ("--number 3", [0, 1, 2]), ("--number 1", [0]),
    ("--classes dog --number 2", [1, 1]), ("--classes 1 cat --number 5", [1, 1, 1, 0, 0]),
    ("--classes 0", [0] * 8)])
def test_classes_are_names_or_numbers(folder, run, grids, options, expected):
    run(f"{SAMPLE} {options}")
    assert grids[0][1] == [NAMES[i] for i in expected] and (folder / "samples.png").is_file()


def below_the_title(path):
    return np.asarray(Image.open(path))[28:]


def test_the_same_seed_draws_the_same_pictures_and_another_draws_others(folder, run):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(f"{SAMPLE} --seed {seed} --number 4 --out {name}.png")
    assert (below_the_title("a.png") == below_the_title("b.png")).all()
    assert (below_the_title("a.png") != below_the_title("c.png")).any()


@pytest.mark.parametrize("steps, used", [(1, 1), (16, 16), (1000, 16), (-1, 16), (None, 6)])
def test_more_steps_than_tokens_are_one_token_a_step(folder, run, capsys, steps, used):
    flag = "" if steps is None else f"--steps {steps}"
    run(f"sample.py --ckpt weights/randar.pt --number 2 {flag}")
    assert f"; {used} steps, " in capsys.readouterr().out


def test_all_that_decoding_can_do_can_be_asked_for(folder, run, capsys):
    run(f"{SAMPLE} --number 2 --order spiral-in --cfg 3 3 --power 2 --scg 1.2 --temperature 0.9 "
        "--top-k 5 --top-p 0.9 --device cpu --tokenizer weights/tokenizer.pt --out drawn.jpg")
    assert "order spiral-in, cfg 3 to 3, scg 1.2, seed 0" in capsys.readouterr().out
    assert Image.open("drawn.jpg").format == "JPEG"


def test_exact_decoding_can_be_asked_for(folder, run, capsys):
    run("sample.py --ckpt weights/randar.pt --number 3 --drafts 3 --gif")
    assert 3 < int(re.search(r"; (\d+) steps, ", capsys.readouterr().out)[1]) < 16


def test_isolated_queries_draw_other_pictures(drawn):
    causal, isolated = (drawn(f"--number 4 --queries {name}")["arr_0"] for name in ("causal", "isolated"))
    assert (causal != isolated).any()


def test_the_step_of_a_token_is_the_first_that_decodes_it():
    model, classes = small_model(), torch.arange(C)
    _, steps = sample.draw_batch(model, small_tokenizer(), classes, seeded(0), drafts=4, cfg=(1, 1))
    last = steps.reshape(C, -1).max(1)
    assert steps.min() == 0 and len(set(last)) > 1  # an image that is ahead repeats its last token


def test_the_gif_shows_nothing_and_then_every_step(folder, run):
    run(f"{SAMPLE} --steps 5 --gif --out new/drawn.png")
    animation = Image.open("new/drawn.gif")
    assert animation.format == "GIF" and animation.n_frames == 5 + 1
    grey = []
    for frame in range(6):
        animation.seek(frame)
        pixels = np.asarray(animation.convert("RGB")).astype(int)
        grey.append((abs(pixels - pictures.UNDECODED).max(-1) < 3).mean())
    assert grey == sorted(grey, reverse=True) and grey[0] > 0.4 and grey[5] < 0.05


@pytest.mark.parametrize("kind", ["dense", "merge", "rar"])
def test_models_of_other_kinds_are_drawn_from_as_they_can(folder, run, capsys, kind):
    model = small_model_of(kind)
    save_randar(model, "weights/randar.pt")
    run("sample.py --ckpt weights/randar.pt --number 2 --power 1.5")
    steps = 6 if kind == "dense" else 16  # the others decode one token a step
    assert f"{steps} steps, order {model.order}" in capsys.readouterr().out


def test_the_shipped_model_draws_what_it_is_asked_for(tmp_path, monkeypatch, run, capsys):
    monkeypatch.chdir(tmp_path)
    run("sample.py --number 40")
    said = capsys.readouterr().out
    share = float(said.split("judge ")[1].split("%")[0])
    assert "22 steps" in said and share >= 95 and "Frechet" in said
    assert Image.open("samples.png").height > 900  # ten rows


# ------------------------------------------------------------------------------------------------
# Many pictures in one file


def test_the_file_is_adms_all_classes_in_turn(drawn):
    file = drawn("--number 11")
    assert file.keys() == {"arr_0", "arr_1"}
    assert file["arr_0"].shape == (11, 16, 16, 3) and file["arr_0"].dtype == np.uint8
    assert file["arr_1"].tolist() == [i % C for i in range(11)] and file["arr_1"].dtype == np.int64


def test_each_image_is_of_its_label(drawn):
    file = drawn("--number 3 --classes 3 1 --seed 5")
    assert file["arr_1"].tolist() == [3, 1, 3]
    model, tokenizer = small_model(), load_tokenizer("weights/tokenizer.pt")
    tokens = model.generate(torch.tensor([3, 1, 3]), steps=3, generator=seeded(5))
    assert (file["arr_0"] == pictures.to_uint8(tokenizer.decode(tokens))).all()


def test_batches_differ_and_do_not_depend_on_how_many_there_are(drawn):
    few, more = drawn("--number 8 --classes 2")["arr_0"], drawn("--number 11 --classes 2")["arr_0"]
    assert (few == more[:8]).all()
    assert (more[:4] != more[4:8]).any() and (more[:3] != more[8:]).any()


def test_the_picture_has_at_most_ten_classes_up_to_twelve_times(drawn, grids):
    save_randar(small_model(num_classes=30), "weights/randar.pt")
    file = drawn("--number 400 --batch-size 64 --steps 1")
    [(pixels, labels)] = grids
    assert sorted(labels) == sorted([f"class {i}" for i in range(0, 30, 3)] * 12)
    for label in (0, 27):
        expected = file["arr_0"][file["arr_1"] == label][:12]
        assert (pixels[np.equal(labels, f"class {label}")] == expected).all()


def test_a_batch_leaves_the_memory_while_the_next_one_is_drawn(tmp_path):
    earlier = []

    def batches():
        for i in range(5):
            assert all(batch() is None for batch in earlier[:-1])
            pixels = np.full((2, 4, 6, 3), i, np.uint8)
            earlier.append(weakref.ref(pixels))
            yield pixels
            del pixels

    sample.write_npz(tmp_path / "a.npz", batches(), [0] * 10, 4, 6)
    with np.load(tmp_path / "a.npz") as content:
        assert content["arr_0"].shape == (10, 4, 6, 3)
        assert content["arr_0"][:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_ended_midway_it_leaves_the_folder_as_it_was(folder, run, monkeypatch, kind):
    run(SAMPLE)  # its picture stays, too
    before, calls, to_uint8 = files_of(folder), [], pictures.to_uint8

    def end_in_the_second_batch(images):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(kind)
        return to_uint8(images)

    monkeypatch.setattr(pictures, "to_uint8", end_in_the_second_batch)
    with pytest.raises(SystemExit, match="130"):
        run(f"{SAMPLE} --npz drawn.npz --number 12")
    assert len(calls) == 2 and files_of(folder) == before


def test_two_processes_draw_what_one_does(folder, drawn):
    options = "--number 18 --gif --device cpu"  # five batches, the last of two
    alone = drawn(options)
    written = [(folder / name).read_bytes() for name in ("samples.png", "samples.gif")]
    (folder / "drawn.npz").unlink()
    line = f"{SAMPLE} --npz drawn.npz {options}"
    process = subprocess.run(**typed(line, folder, processes=2), timeout=240)
    assert process.returncode == 0, process.stderr
    assert all((content()[name] == alone[name]).all() for name in ("arr_0", "arr_1"))
    assert [(folder / name).read_bytes() for name in ("samples.png", "samples.gif")] == written
    assert process.stdout.count("drawn.npz: 18 pictures") == 1
    assert process.stderr.count(" 0/3 ") == 1


class Tape(TorchDispatchMode):
    """In place of a CUDA graph: records operations, and does them again in the same memory."""

    def __init__(self):
        super().__init__()
        self.calls, self.generator = [], None

    def register_generator_state(self, generator):
        self.generator = generator

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert "generator" not in kwargs or self.generator  # CUDA wants it registered
        out = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, out))
        return out

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs))):
                if old.data_ptr() != new.data_ptr():  # neither a view nor changed in place
                    old.copy_(new)


@pytest.mark.parametrize("kind, options", [
    ("rope", dict(steps=5)), ("rope", dict(steps=5, scg=2.0, queries="isolated", order="raster")),
    ("rope", dict(steps=-1, cfg=(1, 1), top_k=9, top_p=0.8)), ("rar", dict(power=2.0))])
def test_a_recorded_decoding_draws_what_the_loop_draws(monkeypatch, kind, options):
    nothing = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = dict(CUDAGraph=Tape, graph=lambda tape, stream: tape, stream=nullcontext,
                     Stream=lambda device: nothing, current_stream=lambda device: nothing)
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    model = small_model() if kind == "rope" else small_model_of(kind)
    calls = inputs_of(model.layers[0])

    def batches(**more):
        classes = [0, 1, 2, 3, 4, 4, 1, 0, 2, 0]  # two batches and a half
        return list(sample.sample_batches(model, small_tokenizer(), classes, 3, 4, **options, **more))

    plain = batches()
    loop = len(calls) // 3
    recorded = batches(graph=True)
    assert len(plain) == len(recorded) == 3
    assert all(np.array_equal(x, y) for pair in zip(plain, recorded) for x, y in zip(*pair))
    assert len(calls) == 6 * loop  # of the recorded: to make ready, to record, for the half batch


# ------------------------------------------------------------------------------------------------
# Mistyped: one line that names the problem and the remedy, exit code 2, and nothing written

MISTAKES = {
    "sample.py --ckpt alone/randar.pt": "needs its tokenizer, .* no alone/tokenizer.pt: give",
    f"{SAMPLE} --tokenizer other.pt": "tokenizer has 31 codes: give .* the one of 32 codes",
    "sample.py --ckpt marked.pt --tokenizer weights/tokenizer.pt": "another one, with as many codes: give",
    f"{SAMPLE} --graph": "--graph is for a GPU .* not with --drafts: leave --graph out",
    f"{SAMPLE} --power -1": "power must be 0 .constant guidance. or more, not -1",
    f"{SAMPLE} --out a.bmp": "cannot write a picture as a.bmp: give a name that ends in .png",
    f"{SAMPLE} --npz file.txt/a.npz": "cannot write into file.txt .*--npz",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_no_trace(folder, run, capsys, line):
    save_tokenizer(small_tokenizer(codebook_size=V - 1), "other.pt")
    save_randar(small_model(), "alone/randar.pt")
    save_randar(small_model(), "marked.pt", fingerprint="of another tokenizer")
    (folder / "file.txt").write_text("no folder")
    before = files_of(folder)
    with pytest.raises(SystemExit) as stop:
        run(line)
    out, errors = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert len(errors.splitlines()) == 1 and errors.startswith(("error: ", "sample.py"))
    assert re.search(MISTAKES[line], errors), errors
    assert files_of(folder) == before
