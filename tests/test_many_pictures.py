"""Many pictures in one file, drawn by one process or by several: which, in which order, and nothing else."""

import signal
import subprocess
import weakref

import numpy as np
import pytest
import torch
from helpers import C, seeded, small_model, small_tokenizer, typed

import common
import sample
from randar import save_randar
from vqgan import load_tokenizer, save_tokenizer

SAMPLE = "sample.py --ckpt weights/randar.pt --steps 3 --batch-size 4 --npz drawn.npz"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a small model of 5 classes and 16 x 16 pixels, and its tokenizer."""
    monkeypatch.chdir(tmp_path)
    save_randar(small_model(), "weights/randar.pt")
    save_tokenizer(small_tokenizer(), "weights/tokenizer.pt")
    return tmp_path


def content():
    with np.load("drawn.npz") as file:
        return dict(file)


@pytest.fixture
def drawn(folder, run):
    """A function that draws with these options of sample.py, and returns what is in the file then."""
    return lambda options: run(f"{SAMPLE} {options}") or content()


# ------------------------------------------------------------------------------------------------------------
# What is in the file


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
    assert (file["arr_0"] == common.to_uint8(tokenizer.decode(tokens))).all()


def test_batches_differ_and_do_not_depend_on_how_many_there_are(drawn):
    few, more = drawn("--number 8 --classes 2")["arr_0"], drawn("--number 11 --classes 2")["arr_0"]
    assert (few == more[:8]).all()
    assert (more[:4] != more[4:8]).any() and (more[:3] != more[8:]).any()


def test_the_picture_has_at_most_ten_classes_up_to_twelve_times(drawn, monkeypatch):
    save_randar(small_model(num_classes=30), "weights/randar.pt")
    grids, draw_grid = [], sample.draw_grid
    monkeypatch.setattr(sample, "draw_grid", lambda pixels, classes, *rest:
                        grids.append((pixels, classes)) or draw_grid(pixels, classes, *rest))
    file = drawn("--number 400 --batch-size 64 --steps 1")
    (pixels, classes), = grids
    assert sorted(classes) == sorted(list(range(0, 30, 3)) * 12)
    for label in (0, 27):
        expected = file["arr_0"][file["arr_1"] == label][:12]
        assert (pixels[np.equal(classes, label)] == expected).all()


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


# ------------------------------------------------------------------------------------------------------------
# Interrupted


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_ended_midway_it_leaves_the_folder_as_it_was(folder, run, monkeypatch, kind):
    (folder / "drawn.npz").write_text("of an earlier run")
    before, calls, to_uint8 = sorted(folder.rglob("*")), [], common.to_uint8

    def end_in_the_second_batch(images):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(kind)
        return to_uint8(images)

    monkeypatch.setattr(common, "to_uint8", end_in_the_second_batch)
    with pytest.raises(SystemExit, match="130"):
        run(f"{SAMPLE} --number 12")
    assert len(calls) == 2 and sorted(folder.rglob("*")) == before
    assert (folder / "drawn.npz").read_text() == "of an earlier run"


# ------------------------------------------------------------------------------------------------------------
# Several processes


def test_two_processes_draw_what_one_does(folder, drawn):
    options = "--number 18 --gif --device cpu"  # five batches, the last of two
    alone = drawn(options)
    pictures = [(folder / name).read_bytes() for name in ("samples.png", "samples.gif")]
    (folder / "drawn.npz").unlink()
    process = subprocess.run(**typed(f"{SAMPLE} {options}", folder, processes=2), timeout=240)
    assert process.returncode == 0, process.stderr
    assert all((content()[name] == alone[name]).all() for name in ("arr_0", "arr_1"))
    assert [(folder / name).read_bytes() for name in ("samples.png", "samples.gif")] == pictures
    assert process.stdout.count("drew 18 pictures") == 1 and process.stderr.count(" 0/18 ") == 1
