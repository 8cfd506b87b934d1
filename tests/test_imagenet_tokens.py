"""ImageNet becomes tokens: ten crops of each image, hours of work that nothing can destroy, and the released
tokens instead of one's own."""

import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from helpers import V, files_of, small_tokenizer, write_images

import common
import data
import tokenizer
from data import TokenFolder, crops_of, square_side
from vqgan import save_tokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder: six images, of which one is damaged, and a tokenizer."""
    write_images(tmp_path / "photos", names=("ant", "bee"), number=3, size=(24, 20))
    (tmp_path / "photos" / "ant" / "1.png").write_text("no image")
    save_tokenizer(small_tokenizer(), tmp_path / "tok.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(monkeypatch):
    """A function that runs `python tokenizer.py ...` in this process."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(line):
        monkeypatch.setattr(sys, "argv", ["tokenizer.py", *line.split()])
        tokenizer.main()

    yield run
    signal.signal(signal.SIGTERM, handler)


ENCODE = "encode --images photos --tokenizer tok.pt --batch-size 2 --workers 0"


# ------------------------------------------------------------------------------------------------------------
# Crops


def test_ten_crops_come_from_a_square_a_tenth_larger():
    assert square_side(256, 10) == 281 and square_side(256, 1) == square_side(256, 2) == 256


def test_ten_crops_are_corners_and_centre_and_their_mirror_images():
    images = torch.arange(2 * 3 * 281 * 281).view(2, 3, 281, 281)
    views = crops_of(images, 256, 10)
    assert len(views) == 10 and all(view.shape == (2, 3, 256, 256) for view in views)
    for view, (row, column) in zip(views, [(0, 0), (0, -1), (-1, 0), (-1, -1)]):
        assert (view[..., row, column] == images[..., row, column]).all()  # a corner that both share
    assert (views[4] == images[..., 12:268, 12:268]).all()  # 12 pixels before, 13 after
    assert all((mirror == view.flip(3)).all() for view, mirror in zip(views[:5], views[5:]))


def test_one_crop_is_the_image_and_two_are_it_and_its_mirror_image():
    image = torch.arange(3 * 16 * 16).view(1, 3, 16, 16)
    assert [view.tolist() for view in crops_of(image, 16, 1)] == [image.tolist()]
    assert [view.tolist() for view in crops_of(image, 16, 2)] == [image.tolist(), image.flip(3).tolist()]


def test_the_tokens_are_those_of_the_ten_crops(here, run):
    run(f"{ENCODE} --crops 10 --out tokens")
    folder, paths = TokenFolder("tokens"), data.list_images("photos")[0]
    assert folder.tokens.shape == (6, 10, 16) and len(folder) == 5
    for i in folder.rows:
        image = common.from_uint8(np.stack([data.read_image(paths[i], 17)]))
        expected = [small_tokenizer().encode(view)[0].tolist() for view in crops_of(image, 16, 10)]
        assert folder.tokens[i].tolist() == expected


# ------------------------------------------------------------------------------------------------------------
# Interrupted


@pytest.fixture
def whole(here, run):
    """All of a token folder that nobody interrupted, {name: content}."""
    run(f"{ENCODE} --out whole")
    return {path.name: content for path, content in files_of(here / "whole").items()}


@pytest.fixture
def stop_after(monkeypatch):
    """A function that lets a command work for some batches and then raises an error in it, once."""
    def stop_after(batches, error):
        def encode(self, images, original=tokenizer.Tokenizer.encode, calls=[]):
            calls.append(images)
            if len(calls) == 2 * batches + 1:  # two crops a batch
                raise error
            return original(self, images)
        monkeypatch.setattr(tokenizer.Tokenizer, "encode", encode)
    return stop_after


def contents(folder):
    return {path.name: content for path, content in files_of(folder).items()}


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_started_again_it_goes_on_where_ctrl_c_stopped_it(here, run, whole, stop_after, capsys, batches):
    stop_after(batches, KeyboardInterrupt)
    with pytest.raises(SystemExit) as stop:
        run(f"{ENCODE} --out tokens")
    assert stop.value.code == 130
    assert f"{2 * batches} of 6 images are kept: the same command goes on" in capsys.readouterr().out
    encoded = []
    with pytest.MonkeyPatch.context() as patch:
        original = data.crops_of
        patch.setattr(data, "crops_of", lambda images, *rest:
                      encoded.append(len(images)) or original(images, *rest))
        run(f"{ENCODE} --out tokens")
    assert sum(encoded) == {0: 5, 1: 4, 2: 2}[batches]  # of two images the first batch could read one
    assert contents(here / "tokens") == whole
    assert "skipped 1 unreadable image: photos/ant/1.png\n" in capsys.readouterr().out


def test_a_full_disk_or_any_other_error_keeps_what_there_is_as_well(here, run, whole, stop_after, capsys):
    stop_after(2, OSError(28, "No space left on device"))
    with pytest.raises(SystemExit):
        run(f"{ENCODE} --out tokens")
    assert capsys.readouterr().err.splitlines()[-1] == "error: No space left on device"
    assert json.loads((here / "tokens" / "progress.json").read_text())["done"] == 4
    run(f"{ENCODE} --out tokens")
    assert contents(here / "tokens") == whole


def test_what_lies_beyond_the_last_save_is_made_again(here, run, whole, stop_after):
    stop_after(1, KeyboardInterrupt)
    with pytest.raises(SystemExit):
        run(f"{ENCODE} --out tokens")
    with open("tokens/tokens.npy.partial", "ab") as file:
        file.write(b"half a row, or many rows" * 100)
    run(f"{ENCODE} --out tokens")
    assert contents(here / "tokens") == whole


SLOWLY = """
import sys, time
sys.path.insert(0, {root!r})
import data, tokenizer
data.SECONDS_BETWEEN_SAVES = 0
crops_of = data.crops_of
data.crops_of = lambda *arguments: time.sleep(0.1) or crops_of(*arguments)
tokenizer.main()
"""


def test_killed_it_goes_on_and_the_result_is_the_same_to_the_last_bit(here, run):
    write_images(here / "many", number=32)
    line = "encode --images many --tokenizer tok.pt --batch-size 4 --crops 10 --workers 2 --out"
    command = [sys.executable, "-c", SLOWLY.format(root=str(ROOT)), *line.split(), "killed"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    progress, done, end = here / "killed" / "progress.json", 0, time.time() + 60
    while done < 8 and process.poll() is None and time.time() < end:
        time.sleep(0.02)
        done = json.loads(progress.read_text())["done"] if progress.is_file() else 0
    process.kill()
    process.communicate(timeout=30)  # its output ends when the processes that read its files have ended, too
    assert process.returncode == -signal.SIGKILL and 8 <= done < 64  # in the middle of its work
    run(f"{line} killed")
    run(f"{line} whole")
    assert contents(here / "killed") == contents(here / "whole")


def test_killed_while_the_files_get_their_names_it_goes_on_too(here, run, whole, monkeypatch):
    replace = os.replace
    for moment in range(5):  # progress.json, tokens.npy, labels.npy, meta.json, and after all
        out, moves = here / f"new{moment}", []

        def killed(source, target):
            moves.append(target)
            if len(moves) > moment:
                raise SystemExit
            replace(source, target)

        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(os, "replace", killed)
            patch.setattr(pathlib.Path, "unlink", lambda path, **_: killed("", path) if path.name ==
                          "progress.json" else os.path.exists(path) and os.unlink(path))
            run(f"{ENCODE} --out {out}")
        if (out / "meta.json").exists():  # then it is whole
            assert TokenFolder(out).tokens.shape == (6, 2, 16)
        run(f"{ENCODE} --out {out}")
        assert contents(out) == whole


def test_what_is_complete_is_neither_made_again_nor_replaced(here, run, whole, monkeypatch, capsys):
    run(f"{ENCODE} --out tokens")
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_files", None)  # nothing is read a second time
        run(f"{ENCODE} --out tokens")
        assert "tokens is complete already" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            run(f"{ENCODE} --out tokens --crops 1")
        assert "other settings (crops: 2 then, 1 now): give another --out" in capsys.readouterr().err
    assert contents(here / "tokens") == whole


@pytest.mark.parametrize("change, difference", [
    ("--crops 10", "crops: 2 then, 10 now"), ("--image-size 24", "image size: 16 then, 24 now"),
    ("--images others", "images: .*photos then, .*others now"),
    ("--tokenizer other.pt", r"tokenizer: tok.pt \(\w+\) then, other.pt \(\w+\) now"),
    ("a file more", r"files: 6 \(\w+\) then, 7 \(\w+\) now"),
    ("another name", r"files: 6 \(\w+\) then, 6 \(\w+\) now")])
def test_other_settings_do_not_destroy_what_was_begun(here, run, stop_after, capsys, change, difference):
    write_images(here / "others", names=("ant", "bee"), number=3)
    save_tokenizer(small_tokenizer(code_dim=3), "other.pt")
    stop_after(1, KeyboardInterrupt)
    with pytest.raises(SystemExit):
        run(f"{ENCODE} --out tokens")
    if change == "a file more":
        (here / "photos" / "ant" / "9.png").touch()
    elif change == "another name":
        (here / "photos" / "ant" / "0.png").rename(here / "photos" / "ant" / "00.png")
    before = contents(here / "tokens")
    with pytest.raises(SystemExit) as stop:
        run(f"{ENCODE} --out tokens {change if change[0] == '-' else ''}")
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert re.search(f"^error: tokens was begun with other settings .{difference}", error)
    assert "another --out, or delete tokens/progress.json to start anew" in error
    assert contents(here / "tokens") == before
    (here / "tokens" / "progress.json").unlink()
    run(f"{ENCODE} --out tokens {change if change[0] == '-' else ''}")


def test_a_disk_that_is_too_small_is_an_error_before_the_work(here, run, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=6 * 2 * 16 * 2 - 1))
    with pytest.raises(SystemExit):
        run(f"{ENCODE} --out tokens")
    assert "error: tokens needs 0.0 GB, 0.0 GB are free: give another place" in capsys.readouterr().err
    assert list((here / "tokens").iterdir()) == []


# ------------------------------------------------------------------------------------------------------------
# The released tokens


@pytest.fixture
def released(here):
    """Three images in ten crops, of the classes 2 and 10; image i consists of the tokens i."""
    for i, (label, name) in enumerate([("10", "a"), ("10", "b"), ("2", "c")]):
        (here / "released" / label).mkdir(parents=True, exist_ok=True)
        dtype = (np.int64, np.int32, np.uint16)[i]
        np.save(here / "released" / label / f"{name}.npy", np.full((10, 16), i, dtype))
    return here / "released"


PACK = "pack --tokens released --tokenizer tok.pt --out tokens"


def test_packed_tokens_are_the_released_ones_with_class_numbers_as_names(released, run, capsys):
    run(PACK)
    folder = TokenFolder("tokens")
    assert folder.tokens.dtype == np.uint16 and folder.tokens.shape == (3, 10, 16)
    assert folder.tokens[:, 0, 0].tolist() == [0, 1, 2] and folder.labels.tolist() == [10, 10, 2]
    assert folder.class_names == [str(i) for i in range(11)] and folder.codes == V and folder.grid == (4, 4)
    assert folder.tokenizer == os.path.abspath("tok.pt")
    assert "3 images of 11 classes, 10 crops each, 4 x 4 tokens" in capsys.readouterr().out


def array(*shape, dtype=np.int64, value=0):
    with io.BytesIO() as file:
        np.save(file, np.full(shape, value, dtype))
        return file.getvalue()


UNUSABLE = {
    "no array": b"no array", "empty": b"", "cut": array(10, 16)[:-8], "another number of crops": array(9, 16),
    "another number of tokens": array(10, 25), "one axis": array(160), "three axes": array(1, 10, 16),
    "fractions": array(10, 16, dtype=np.float32), "objects": array(10, 16, dtype=object, value={}),
    "a code too high": array(10, 16, value=V), "a negative code": array(10, 16, value=-1)}


def test_unusable_token_files_are_skipped_counted_and_named(released, run, capsys):
    for name, content in UNUSABLE.items():
        (released / "2" / f"{name}.npy").write_bytes(content)
    run(PACK)
    folder, said = TokenFolder("tokens"), capsys.readouterr().out
    assert len(folder) == 3 and folder.tokens.shape == (3 + len(UNUSABLE), 10, 16)
    assert sorted(zip(folder.tokens[folder.rows, 0, 0], folder.labels)) == [(0, 10), (1, 10), (2, 2)]
    assert f"skipped {len(UNUSABLE)} unusable token files: released/2/a code too high.npy, " in said


@pytest.mark.parametrize("content", [content for name, content in UNUSABLE.items() if "another" not in name])
def test_the_first_usable_file_decides_the_shape(released, run, content):
    (released / "10" / "0.npy").write_bytes(content)
    run(PACK)
    assert TokenFolder("tokens").tokens.shape == (4, 10, 16) and len(TokenFolder("tokens")) == 3


def test_packing_goes_on_where_it_was(released, run, monkeypatch, capsys):
    run(PACK.replace("--out tokens", "--out whole"))
    monkeypatch.setattr(data, "read_files", lambda files, first, _, workers, read=data.read_files:
                        read(files, first, 1, workers))  # in batches of one
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        asarray, calls = np.asarray, []

        def stopped(array, *rest):
            calls.append(array)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return asarray(array, *rest)

        patch.setattr(data, "write_tokens", lambda files, convert, *rest, write=data.write_tokens:
                      write(files, stopped, *rest))
        run(PACK)
    assert "1 of 3 images are kept" in capsys.readouterr().out
    run(PACK)
    assert contents(released.parent / "tokens") == contents(released.parent / "whole")


@pytest.mark.parametrize("prepare, line, problem", [
    (lambda here: None, PACK.replace("released", "nowhere"), "no folder nowhere: give one of class folders"),
    (lambda here: (here / "released" / "cat").mkdir(), PACK, "released/cat is no class number: expected"),
    (lambda here: (here / "released" / "-1").mkdir(), PACK, "released/-1 is no class number"),
    (lambda here: None, PACK.replace("released", "photos"), "photos has class folders but no token files"),
    (lambda here: save_tokenizer(small_tokenizer(codes=1), here / "tok.pt"), PACK.replace("released", "high"),
     "high/0/a.npy and those after it are no tokens: expected .* below 1, the codes of the --tok"),
    (lambda here: None, "pack --tokens released --out tokens", "required: --tokenizer"),
    (lambda here: None, f"{PACK} --workers -1", "--workers must be at least 0, not -1"),
    (lambda here: None, f"{ENCODE} --out tokens --batch-size 0", "--batch-size must be at least 1, not 0"),
])
def test_a_mistake_is_one_line_and_nothing_is_written(here, released, run, capsys, prepare, line, problem):
    (here / "high" / "0").mkdir(parents=True)
    np.save(here / "high" / "0" / "a.npy", np.full((10, 16), 1))
    prepare(here)
    before = files_of(here)
    with pytest.raises(SystemExit) as stop:
        run(line)
    errors = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(errors) == 1 and re.search(problem, errors[0])
    assert files_of(here) == before
