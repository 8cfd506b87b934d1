"""The commands as users type them: from images to pictures, and mistyped."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from helpers import SMALL, V, files_of, small_model, small_tokenizer, typed, write_images
from PIL import Image

import data
import sample
import train
from randar import load_randar, save_randar
from vqgan import load_tokenizer, save_tokenizer

# ------------------------------------------------------------------------------------------------------------
# From a folder of images to pictures


def test_encode_makes_a_token_folder_and_names_what_it_could_not_read(workshop, said):
    tokens = data.TokenFolder(workshop / "tokens")
    assert tokens.tokens.shape == (8, 2, 16) and tokens.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert tokens.class_names == ["cat", "dog"] and tokens.tokenizer == str(workshop / "tok.pt")
    assert "skipped 1 unreadable image: photos/cat/0.png" in said["encode"]
    assert "7 images of 2 classes, 2 crops each, 4 x 4 tokens" in said["encode"]


def test_train_leaves_these_files_and_says_what_to_do_with_them(workshop, said):
    assert {path.name for path in (workshop / "trained").iterdir()} == {
        "randar.pt", "training.pt", "tokenizer.pt", "samples.png", "loss.png", "log.jsonl"}
    assert "on 7 images of 4 x 4 tokens" in said["train"]
    assert "python sample.py --ckpt trained/randar.pt" in said["train"]


def test_the_checkpoint_is_a_randar_of_these_tokens_and_knows_its_classes(workshop):
    model = load_randar(workshop / "trained" / "randar.pt")
    assert model.config.grid == (4, 4) and model.config.vocab_size == V
    assert model.class_names == ["cat", "dog"]
    assert (workshop / "trained" / "tokenizer.pt").read_bytes() == (workshop / "tok.pt").read_bytes()


def test_the_log_has_one_json_object_a_line(workshop):
    lines = [json.loads(line) for line in (workshop / "trained" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["images"] for line in lines] == [4, 8, 12, 16]
    for line in lines:
        assert line.keys() == {"step", "images", "loss", "learning_rate", "images_per_second",
                               "tokens_per_second"}
        assert 2 < line["loss"] < 5  # of an untrained model: ln 32 = 3.5
        assert line["learning_rate"] > 0 and line["images_per_second"] > 0


@pytest.mark.parametrize("name", ["trained/loss.png", "trained/samples.png", "pictures/drawn.png"])
def test_pictures_are_pngs_with_something_in_them(workshop, name):
    picture = Image.open(workshop / name)
    assert picture.format == "PNG" and min(picture.size) > 100
    assert len(picture.convert("RGB").getcolors(maxcolors=10**6)) > 20


def test_sample_says_what_it_drew(said):
    assert "drew 16 pictures, wrote up to 12 of each class to pictures/drawn.png; 5 steps, " in said["sample"]
    assert "wrote pictures/drawn.gif" in said["sample"]


def test_the_gif_shows_nothing_and_then_every_step(workshop):
    animation = Image.open(workshop / "pictures" / "drawn.gif")
    assert animation.format == "GIF" and animation.n_frames == 5 + 1
    grey = []
    for frame in range(6):
        animation.seek(frame)
        pixels = np.asarray(animation.convert("RGB")).astype(int)
        grey.append((abs(pixels - sample.UNDECODED).max(-1) < 3).mean())
    assert grey == sorted(grey, reverse=True) and grey[0] > 0.5 and grey[5] < 0.05


def test_train_encodes_a_folder_of_images_first(here, run, capsys):
    run(f"train.py --data photos --tokenizer tok.pt --steps 1 {SMALL} --out new_training")
    ours, theirs = (data.TokenFolder(folder) for folder in ("new_training/tokens", "tokens"))
    assert (ours.tokens == theirs.tokens).all() and (ours.labels == theirs.labels).all()
    assert "skipped 1 unreadable image: photos/cat/0.png" in capsys.readouterr().out
    assert load_randar("new_training/randar.pt").class_names == ["cat", "dog"]


def test_images_are_encoded_again_only_if_they_or_the_tokenizer_changed(here, monkeypatch):
    write_images(here / "others", names=("cat", "dog"), number=3)
    save_tokenizer(small_tokenizer(codes=V - 1), "other_tok.pt")
    encoded, encode = [], data.encode_images
    monkeypatch.setattr(data, "encode_images", lambda *a, **more: encoded.append(1) or encode(*a, **more))
    for times, photos, tok in ((1, "photos", "tok.pt"), (1, "photos", "tok.pt"), (2, "others", "tok.pt"),
                               (3, "others", "other_tok.pt"), (4, "photos", "other_tok.pt")):
        tokens, path = train.open_tokens(photos, tok, here / "new_training", torch.device("cpu"))
        assert len(encoded) == times and len(tokens) == {"photos": 7, "others": 6}[photos]
        assert str(path) == tok and tokens.codes == load_tokenizer(tok).config.codes


# ------------------------------------------------------------------------------------------------------------
# Pictures as asked for


SAMPLE = "sample.py --ckpt trained/randar.pt"


def below_the_title(path):
    return np.asarray(Image.open(path))[28:]


def test_the_same_seed_draws_the_same_pictures_and_another_draws_others(here, run):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(f"{SAMPLE} --seed {seed} --number 4 --steps 4 --out {name}.png")
    assert (below_the_title("a.png") == below_the_title("b.png")).all()
    assert (below_the_title("a.png") != below_the_title("c.png")).any()


@pytest.fixture
def drawn(monkeypatch):
    """A list to which each grid that sample.py draws adds its classes."""
    grids, draw_grid = [], sample.draw_grid
    monkeypatch.setattr(sample, "draw_grid", lambda pixels, classes, *rest:
                        grids.append(classes) or draw_grid(pixels, classes, *rest))
    return grids


@pytest.mark.parametrize("options, expected", [
    ("", [0] * 8 + [1] * 8), ("--number 3", [0, 0, 1]), ("--classes dog --number 2", [1, 1]),
    ("--classes 1 cat --number 5", [1, 1, 1, 0, 0]), ("--classes 0", [0] * 8), ("--number 1", [0])])
def test_classes_are_names_or_numbers_and_number_is_that_of_all_pictures(here, run, drawn, options, expected):
    run(f"{SAMPLE} --steps 2 {options}")
    assert drawn == [expected] and (here / "samples.png").is_file()


@pytest.mark.parametrize("steps, used", [(1, 1), (16, 16), (17, 16), (1000, 16), (-1, 16)])
def test_more_steps_than_tokens_are_one_token_a_step(here, run, capsys, steps, used):
    run(f"{SAMPLE} --number 2 --steps {steps}")
    assert f"; {used} steps, " in capsys.readouterr().out


def test_all_that_decoding_can_do_can_be_asked_for(here, run, capsys):
    run(f"{SAMPLE} --number 2 --order spiral-in --cfg 3 3 --scg 1.2 --temperature 0.9 --top-k 5 --top-p 0.9 "
        "--device cpu --tokenizer tok.pt --out drawn.jpg")
    assert "order spiral-in, cfg 3 to 3, scg 1.2" in capsys.readouterr().out
    assert Image.open("drawn.jpg").format == "JPEG"


def test_the_shipped_model_draws_what_it_is_asked_for(tmp_path, monkeypatch, run, capsys):
    monkeypatch.chdir(tmp_path)
    run("sample.py --number 100")
    said = capsys.readouterr().out
    share = float(said.split("class asked for in ")[1].split("%")[0])
    assert "22 steps" in said and share >= 95
    assert Image.open("samples.png").height > 900  # ten rows


# ------------------------------------------------------------------------------------------------------------
# Mistyped: one line that names the problem and the remedy, exit code 2, and nothing written


@pytest.fixture(scope="module")
def muddle(workshop, tmp_path_factory):
    """The workshop, and much that cannot be used."""
    folder = tmp_path_factory.mktemp("muddle")
    shutil.copytree(workshop, folder, dirs_exist_ok=True)
    (folder / "empty").mkdir()
    (folder / "no_images" / "cat").mkdir(parents=True)
    shutil.copytree(folder / "photos" / "dog", folder / "no_classes")
    shutil.copytree(folder / "tokens", folder / "half_tokens")
    (folder / "half_tokens" / "tokens.npy").unlink()
    (folder / "file.txt").write_text("no folder")
    save_tokenizer(small_tokenizer(codes=V - 1), folder / "other_tok.pt")
    save_randar(small_model(), folder / "alone" / "randar.pt")
    (folder / "alone" / "training.pt").write_bytes((folder / "trained" / "randar.pt").read_bytes())
    (folder / "cut").mkdir()
    for source, name in (("tok.pt", "tok.pt"), ("trained/randar.pt", "randar.pt"),
                         ("trained/training.pt", "training.pt")):
        content = (folder / source).read_bytes()
        (folder / "cut" / name).write_bytes(content[: len(content) // 2])
    paths, labels, names = data.list_images(folder / "photos")
    data.encode_images(paths, labels, names, "photos", small_tokenizer(), folder / "tok.pt",
                       folder / "tokens_2x2", size=8)
    return folder


ENCODE, TRAIN = "tokenizer.py encode --images", "train.py --data tokens"
MISTAKES = {
    f"{ENCODE} nowhere --out new": "no folder nowhere: give one of class folders",
    f"{ENCODE} empty --out new": "empty has no class folders: put the images",
    f"{ENCODE} no_classes --out new": "no_classes has no class folders",
    f"{ENCODE} no_images --out new": "no_images has class folders but no images",
    f"{ENCODE} photos --out new --tokenizer nowhere.pt": "no checkpoint at nowhere.pt",
    f"{ENCODE} photos --out new --tokenizer cut/tok.pt": "may be truncated",
    f"{ENCODE} photos --out new --tokenizer trained/randar.pt": "holds no tokenizer",
    f"{ENCODE} photos --out new --image-size 18": "not a multiple of 4.*: try 16",
    f"{ENCODE} photos --out new --crops 3": "choose from 1, 2",
    f"{ENCODE} photos --out file.txt/tokens": "cannot write into file.txt/tokens .*--out",
    f"{ENCODE} photos --out new --device nonsense": "device 'nonsense' .*--device cpu",
    f"{ENCODE} photos": "required: --out",
    "tokenizer.py": "required: train|encode",
    "tokenizer.py train --data nowhere --out new/tok.pt": "no folder nowhere",
    "tokenizer.py train --data empty --out new/tok.pt": "empty has no class folders",
    "tokenizer.py train --steps 0 --out new/tok.pt": "--steps must be at least 1, not 0",
    "tokenizer.py train --image-size 64 --out new/tok.pt": "--image-size must be .* 32, not 64",
    "tokenizer.py train --data photos --image-size 30 --out new/tok.pt": "must be a multiple of 4",
    "tokenizer.py train --data photos --out file.txt/tok.pt": "cannot write into file.txt .*--out",
    "train.py --data nowhere": "no folder nowhere: give a token folder, or one of class folders",
    "train.py --data empty": "empty has no class folders: put the images",
    "train.py --data no_classes --tokenizer tok.pt": "no_classes has no class folders",
    "train.py --data no_images --tokenizer tok.pt": "no_images has class folders but no images",
    "train.py --data file.txt": "no folder file.txt",
    "train.py --data half_tokens": "half_tokens is no token folder, tokens.npy is missing: make one with",
    "train.py --data photos": "photos holds images: give the --tokenizer that shall turn them into tokens",
    "train.py --data photos --tokenizer nowhere.pt": "no checkpoint at nowhere.pt",
    "train.py --data photos --tokenizer cut/tok.pt": "may be truncated",
    f"{TRAIN} --tokenizer nowhere.pt": "the tokenizer nowhere.pt is missing: .* with --tokenizer",
    f"{TRAIN} --tokenizer other_tok.pt": "31 codes, but the tokens were made with 32: give --tok",
    f"{TRAIN} --size M": "'M' .*choose from '?tiny'?, '?toy'?, '?L'?, '?XL'?, '?XXL",
    f"{TRAIN} --steps 0": "--steps must be above 0, not 0",
    f"{TRAIN} --steps -3": "--steps must be above 0, not -3",
    f"{TRAIN} --steps many": "--steps: invalid int value: 'many'",
    f"{TRAIN} --learning-rate nan": "--learning-rate must be above 0, not nan",
    f"{TRAIN} --batch-size 0": "--batch-size must be above 0, not 0",
    f"{TRAIN} --out file.txt/out": "cannot write into file.txt/out .*--out",
    "train.py --out file.txt/out": "cannot write into file.txt/out/tokens .*--out",
    f"{TRAIN} --device nonsense": "cannot use device 'nonsense' .*: try --device cpu",
    f"{TRAIN} --out trained": "trained holds a training already: add --resume .*--out",
    "train.py --out trained": "trained holds a training already",
    "train.py --resume --out nowhere": "nowhere holds no training to go on with",
    "train.py --resume --out cut": "cut/training.pt is not a readable checkpoint, it may be truncated",
    "train.py --resume --out trained": "trained holds 4 steps already: ask for more with --steps",
    "train.py --resume --out trained --steps 3": "trained holds 4 steps already",
    "train.py --resume --out trained --steps 9 --data tokens_2x2": "not a --size toy model of these tokens",
    "train.py --resume --out alone --data tokens --tokenizer tok.pt": "not a --size toy model of these",
    "sample.py --ckpt nowhere.pt": "no checkpoint at nowhere.pt: give a file that train.py",
    "sample.py --ckpt cut/randar.pt": "cut/randar.pt is not a readable checkpoint, it may be truncated",
    "sample.py --ckpt file.txt": "file.txt is not a readable checkpoint",
    "sample.py --ckpt tok.pt": "tok.pt holds no RandAR weights",
    "sample.py --ckpt alone/randar.pt": "needs its tokenizer, .* no alone/tokenizer.pt: give --tokenizer the",
    f"{SAMPLE} --tokenizer cut/tok.pt": "may be truncated",
    f"{SAMPLE} --tokenizer other_tok.pt": "knows 32 codes, the tokenizer has 31: give --tokenizer",
    f"{SAMPLE} --classes 2": "no class '2': give a number from 0 to 1 or a name .cat, dog",
    f"{SAMPLE} --classes -1": "no class '-1'",
    f"{SAMPLE} --classes cat bird": "no class 'bird': give a number from 0 to 1 or a name",
    f"{SAMPLE} --classes do": "no class 'do': give a number from 0 to 1 or a name .cat, dog.$",
    f"{SAMPLE} --number 0": "--number must be at least 1, not 0",
    f"{SAMPLE} --batch-size 0": "--batch-size must be at least 1, not 0",
    f"{SAMPLE} --steps 0 --out new/a.png": "steps must be at least 1 .*not 0",
    f"{SAMPLE} --steps -2": "steps must be at least 1 .*not -2",
    f"{SAMPLE} --order zigzag --out new/a.png": "unknown order 'zigzag': choose from random, raster, ",
    f"{SAMPLE} --cfg 1": "--cfg: expected 2 arguments",
    f"{SAMPLE} --temperature 0": "temperature must be above 0, not 0.0: top_k=1",
    f"{SAMPLE} --top-p 1.5": "top_p must be above 0 and at most 1, not 1.5",
    f"{SAMPLE} --out file.txt/a.png": "cannot write into file.txt .*--out",
    f"{SAMPLE} --out a.bmp": "cannot write a picture as a.bmp: give a name that ends in .png or .gif",
    f"{SAMPLE} --out photos": "cannot write a picture as photos",
    f"{SAMPLE} --npz new/drawn": "cannot write pictures as new/drawn: give a name that ends in .npz",
    f"{SAMPLE} --npz file.txt/a.npz": "cannot write into file.txt .*give another place, --npz",
    f"{SAMPLE} --number 1000000000000 --npz a.npz": "pictures need 768000.0 GB, and .* GB are free in",
    f"{SAMPLE} --device nonsense": "cannot use device 'nonsense' .*: try --device cpu",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_with_exit_code_two_and_no_trace(muddle, run, monkeypatch, capsys, line):
    monkeypatch.chdir(muddle)
    before = files_of(muddle)
    with pytest.raises(SystemExit) as stop:
        run(line)
    out, errors = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert len(errors.splitlines()) == 1 and errors.startswith(("error: ", line.split()[0]))
    assert re.search(MISTAKES[line], errors), errors
    assert files_of(muddle) == before


def test_a_mistake_typed_for_real_is_no_traceback(muddle):
    process = subprocess.run(**typed("train.py --data nowhere --out new", muddle), timeout=120)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr == ("error: no folder nowhere: give a token folder, or one of class folders of "
                              "images, with --data\n")


@pytest.mark.parametrize("line", ["tokenizer.py encode --images damaged --out new_tokens",
                                  "train.py --data damaged --tokenizer tok.pt --out new_training",
                                  "tokenizer.py train --data damaged --out new_tok.pt"])
def test_a_folder_of_unreadable_images_is_an_error_once_they_have_been_read(here, run, capsys, line):
    for i in range(3):
        (here / "damaged" / "cat").mkdir(parents=True, exist_ok=True)
        (here / "damaged" / "cat" / f"{i}.png").write_text("no image")
    with pytest.raises(SystemExit) as stop:
        run(line)
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: none of the images is readable")  # after the bar
    assert not [path for path in here.rglob("*") if "new_" in str(path) and path.is_file()]
