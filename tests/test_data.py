"""What training reads: folders of images become folders of tokens, whatever interrupts it."""

import io
import json
import os
import signal

import numpy as np
import pytest
import torch
from helpers import V, files_of, small_tokenizer, write_images
from PIL import EpsImagePlugin, Image

import tokenizer
from support import data
from support.border import UserError
from support.data import TokenFolder, crops_of, encode_images, list_images, read_image
from support.pictures import from_uint8
from tokenizer import load_tokenizer, save_tokenizer


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder: six images of two classes, of which one is damaged, and a tokenizer."""
    write_images(tmp_path / "photos", names=("bee", "ant"), number=3, size=(24, 20))
    (tmp_path / "photos" / "ant" / "1.png").write_text("no image")
    save_tokenizer(small_tokenizer(), tmp_path / "tok.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "SHARD", 2)
    return tmp_path


ENCODE = "tokenizer.py encode --images photos --tokenizer tok.pt --batch-size 2"


# --------------------------------------------------------------------------------------------------
# Folders of images


def test_classes_are_the_folders_in_alphabetical_order(tmp_path):
    folder = write_images(tmp_path / "photos", names=("dog", "Ant", "cat"), number=2)
    paths, labels, names = list_images(folder)
    assert names == ["Ant", "cat", "dog"] and labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert paths[:2] == [str(folder / "Ant" / "0.png"), str(folder / "Ant" / "1.png")]
    assert labels.dtype == np.int64


def test_images_may_lie_deeper_and_other_files_are_no_images(here):
    (here / "photos" / "ant" / "more").mkdir()
    (here / "photos" / "ant" / "0.png").rename(here / "photos" / "ant" / "more" / "UPPER.PNG")
    (here / "photos" / "ant" / "notes.txt").write_text("no image")
    (here / "photos" / ".hidden").mkdir()
    paths, labels, names = list_images("photos")
    assert labels.tolist() == [0, 0, 0, 1, 1, 1] and names == ["ant", "bee"]
    assert "photos/ant/more/UPPER.PNG" in paths


def test_a_folder_without_images_is_an_error_that_names_the_remedy(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "not_in_a_class.png")
    for folder in (tmp_path / "nowhere", tmp_path, tmp_path / "not_in_a_class.png"):
        with pytest.raises(UserError, match="give a folder with a folder for each class"):
            list_images(folder)


def test_a_class_folder_that_is_a_link_to_its_parent_is_an_error(here):
    os.symlink(".", here / "photos" / "cat")
    with pytest.raises(UserError, match="photos/cat is a link to a folder that it lies in: remove it"):
        list_images("photos")


def test_an_image_is_its_centre_with_the_shorter_edge_resized(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = (0, 200, 0)  # the middle third is green, the rest black
    for name, picture in (("wide.png", pixels), ("tall.png", pixels.transpose(1, 0, 2))):
        Image.fromarray(picture).save(tmp_path / name)
        image = read_image(tmp_path / name, 10)
        assert image.shape == (10, 10, 3) and image.dtype == np.uint8
        assert abs(image[2:-2, 2:-2] - np.array([0, 200, 0])).max() < 8  # resizing softens edges


def test_a_large_image_is_halved_first_by_means_of_four_pixels_as_adm_does(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    means = pixels.reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert abs(read_image(tmp_path / "a.png", 16) - means).max() <= 1


def test_a_camera_held_upside_down_is_put_right(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[8:] = 255  # dark above, bright below
    orientation = Image.Exif()
    orientation[0x0112] = 3  # "turn it by 180 degrees"
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", exif=orientation)
    image = read_image(tmp_path / "photo.jpg", 16)
    assert image[:4].min() > 250 and image[-4:].max() < 5


@pytest.mark.parametrize("mode, colour, expected", [
    ("L", 90, (90, 90, 90)), ("RGBA", (10, 20, 30, 255), (10, 20, 30)), ("1", 1, (255, 255, 255)),
    ("CMYK", (255, 0, 0, 0), (0, 255, 255)), ("I;16", 128 * 257, (128, 128, 128)),
    ("RGBA", (10, 20, 30, 0), (255, 255, 255)), ("LA", (0, 51), (204, 204, 204))])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, colour, expected):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (12, 12), colour).save(path)
    assert abs(read_image(path, 8).astype(int) - expected).max() <= 1


def test_a_picture_that_is_a_program_is_not_run(tmp_path, monkeypatch):
    picture = Image.new("RGB", (40, 40))
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: picture.im)  # not everywhere installed
    picture.save(tmp_path / "evil.jpg", format="EPS")
    assert read_image(tmp_path / "evil.jpg", 16) is None
    picture.save(tmp_path / "good.jpg", format="TIFF")  # it is the content that counts
    assert read_image(tmp_path / "good.jpg", 16) is not None


def test_from_a_named_pipe_nothing_is_read(tmp_path):
    os.mkfifo(tmp_path / "a.png")  # to open it would wait for ever
    assert read_image(tmp_path / "a.png", 16) is None and data.read_tokens(tmp_path / "a.png", V) is None


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_a_damaged_image_is_none(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    Image.effect_noise((40, 40), 50).convert("RGB").save(path)
    content = path.read_bytes()
    for damaged in (b"", b"no image at all", content[:10], content[: len(content) // 2]):
        path.write_bytes(damaged)
        assert read_image(path, 16) is None


# --------------------------------------------------------------------------------------------------
# From images to tokens


def test_ten_crops_are_corners_and_centre_of_a_larger_square_and_their_mirror_images():
    images = torch.arange(2 * 3 * 281 * 281).view(2, 3, 281, 281)
    views = crops_of(images, 256, 10)
    assert len(views) == 10 and all(view.shape == (2, 3, 256, 256) for view in views)
    for view, (row, column) in zip(views, [(0, 0), (0, -1), (-1, 0), (-1, -1)]):
        assert (view[..., row, column] == images[..., row, column]).all()  # a shared corner
    assert (views[4] == images[..., 12:268, 12:268]).all()  # 12 pixels before, 13 after
    assert all((mirror == view.flip(3)).all() for view, mirror in zip(views[:5], views[5:]))


@pytest.mark.parametrize("crops, side", [(1, 16), (2, 16), (10, 17)])
def test_the_tokens_are_those_of_the_crops(here, run, crops, side):
    run(f"{ENCODE} --crops {crops} --out tokens")
    folder, paths = TokenFolder("tokens"), list_images("photos")[0]
    tokens, tok = np.concatenate(folder.shards), load_tokenizer("tok.pt")
    assert tokens.shape == (6, crops, 16) and tokens.dtype == np.uint16 and folder.crops == crops
    for i in (0, 2, 3, 4, 5):
        views = crops_of(from_uint8(np.stack([read_image(paths[i], side)])), 16, crops)
        assert tokens[i].tolist() == [tok.encode(view)[0].tolist() for view in views]


def test_a_token_folder_is_shards_labels_and_what_is_known_of_them(here, run, capsys):
    run(f"{ENCODE} --out tokens")
    names = ["labels.npy", "meta.json", *(f"tokens-000{i}.npy" for i in range(3))]
    assert sorted(os.listdir("tokens")) == names
    assert np.load("tokens/labels.npy").tolist() == [0, -1, 0, 1, 1, 1]
    meta = json.loads((here / "tokens" / "meta.json").read_text())
    assert meta["grid"] == [4, 4] and meta["codes"] == V and meta["classes"] == ["ant", "bee"]
    assert meta["tokenizer"] == str(here / "tok.pt") and meta["images"] == str(here / "photos")
    said = capsys.readouterr().out
    assert "wrote tokens: 5 images, 2 classes" in said
    assert "skipped 1 unreadable: photos/ant/1.png\n" in said


def test_pixels_in_memory_are_encoded_as_files_are(here):
    (here / "photos" / "ant" / "1.png").unlink()
    paths, labels, names = list_images("photos")
    for out, images in (("files", paths), ("pixels", data.read_all(paths, 16))):
        encode_images(images, labels, names, small_tokenizer(), "tok.pt", out, crops=1)
    files, pixels = ([*files_of(here / name).values()] for name in ("files", "pixels"))
    assert files[:1] + files[2:] == pixels[:1] + pixels[2:]  # all but meta.json, which lists the files


def test_without_a_readable_image_there_is_no_token_folder(here):
    with pytest.raises(UserError, match="none of the 1 files is readable: delete tokens"):
        encode_images(["photos/ant/1.png"], [0], ["ant"], small_tokenizer(), "tok.pt", "tokens")
    assert not os.path.exists("tokens/labels.npy")


# --------------------------------------------------------------------------------------------------
# Interrupted


@pytest.fixture
def whole(here, run):
    """All of a token folder that nobody interrupted, the contents of its files."""
    run(f"{ENCODE} --out whole")
    return [*files_of(here / "whole").values()]


@pytest.fixture
def stop_after(monkeypatch):
    """A function that lets a command encode some batches and then be sent a signal, once."""

    def stop_after(batches, number):
        def encode(self, images, original=tokenizer.Tokenizer.encode, calls=[]):
            calls.append(images)
            if len(calls) == 2 * batches + 1:  # two crops a batch
                signal.raise_signal(number)
            return original(self, images)

        monkeypatch.setattr(tokenizer.Tokenizer, "encode", encode)

    return stop_after


@pytest.mark.parametrize("batches, number", [
    (0, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM)])
def test_started_again_it_goes_on(here, run, whole, stop_after, batches, number):
    stop_after(batches, number)
    with pytest.raises(SystemExit, match="130"):
        run(f"{ENCODE} --out tokens")
    kept = sorted((here / "tokens").glob("tokens-*"))
    assert [path.name for path in kept] == [f"tokens-000{i}.npy" for i in range(batches)]
    times = [path.stat().st_mtime_ns for path in kept]
    run(f"{ENCODE} --out tokens")
    assert [*files_of(here / "tokens").values()] == whole
    assert times == [path.stat().st_mtime_ns for path in kept]


@pytest.mark.parametrize("name", ["meta.json", "tokens-0000.npy", "tokens-0002.npy", "labels.npy"])
def test_killed_while_a_file_is_written_it_goes_on_too(here, run, whole, monkeypatch, name):
    def killed(source, target, replace=os.replace):
        if os.path.basename(target) == name:
            raise SystemExit
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(os, "replace", killed)
        run(f"{ENCODE} --out tokens")
    (here / "tokens" / f"{name}.partial").write_bytes(b"half of it")
    with pytest.raises(UserError, match="no token folder|not finished"):
        TokenFolder("tokens")
    run(f"{ENCODE} --out tokens")
    assert [*files_of(here / "tokens").values()] == whole


def test_a_shard_that_was_damaged_meanwhile_is_named_in_one_line(here, run, whole, capsys):
    run(f"{ENCODE} --out tokens")
    (here / "tokens/labels.npy").unlink()
    (here / "tokens/tokens-0001.npy").write_bytes(b"no array")
    with pytest.raises(SystemExit, match="2"):
        run(f"{ENCODE} --out tokens")
    assert "tokens is damaged: delete it and encode again" in capsys.readouterr().err


def test_what_is_complete_is_neither_made_again_nor_replaced(here, run, whole, monkeypatch, capsys):
    monkeypatch.setattr(data, "read_image", lambda path, size: 1 / 0)  # nothing is read
    run(f"{ENCODE} --out whole")
    assert "whole is complete already" in capsys.readouterr().out
    assert [*files_of(here / "whole").values()] == whole


@pytest.mark.parametrize("change", [
    "--crops 10", "--image-size 24", "--images others", "another tokenizer", "a file more",
    "a file replaced"])
def test_other_settings_do_not_destroy_what_was_begun(here, run, stop_after, capsys, change):
    write_images(here / "others", names=("ant", "bee"), number=3)
    stop_after(1, signal.SIGTERM)
    with pytest.raises(SystemExit):
        run(f"{ENCODE} --out tokens")
    if change == "a file more":
        (here / "photos" / "ant" / "9.png").touch()
    if change == "a file replaced":  # as many as before
        Image.new("RGB", (24, 20)).save(here / "photos" / "bee" / "2.png")
    if change == "another tokenizer":  # of the same name
        torch.manual_seed(1)
        save_tokenizer(tokenizer.Tokenizer(small_tokenizer().config), "tok.pt")
    before = files_of(here / "tokens")
    with pytest.raises(SystemExit, match="2"):
        run(f"{ENCODE} --out tokens {change if change[0] == '-' else ''}")
    said = capsys.readouterr().err
    assert "\nerror: tokens was begun with other settings or files, see its meta" in said
    assert files_of(here / "tokens") == before


# --------------------------------------------------------------------------------------------------
# The released tokens


@pytest.fixture
def released(here):
    """Three images in ten crops, of the classes 2 and 10; image i consists of the tokens i."""
    for i, (label, name) in enumerate([("10", "a"), ("10", "b"), ("2", "c")]):
        (here / "released" / label).mkdir(parents=True, exist_ok=True)
        dtype = (np.int64, np.int32, np.uint16)[i]
        np.save(here / "released" / label / f"{name}.npy", np.full((10, 16), i, dtype))
    return here / "released"


PACK = "tokenizer.py pack --tokens released --tokenizer tok.pt --out tokens"


def test_packed_tokens_are_the_released_ones_with_class_numbers_as_names(released, run):
    run(PACK)
    folder = TokenFolder("tokens")
    tokens = np.concatenate(folder.shards)
    assert tokens.dtype == np.uint16 and tokens.shape == (3, 10, 16)
    assert tokens[:, 0, 0].tolist() == [0, 1, 2] and folder.labels.tolist() == [10, 10, 2]
    assert folder.class_names == [str(i) for i in range(11)] and folder.grid == (4, 4)
    assert folder.codebook_size == V and folder.tokenizer == os.path.abspath("tok.pt")


def array(*shape, dtype=np.int64, value=0):
    with io.BytesIO() as file:
        np.save(file, np.full(shape, value, dtype))
        return file.getvalue()


UNUSABLE = {
    "no array": b"no array", "empty": b"", "cut": array(10, 16)[:-8], "other crops": array(9, 16),
    "other tokens": array(10, 25), "one axis": array(160), "three axes": array(1, 10, 16),
    "fractions": array(10, 16, dtype=np.float32), "objects": array(10, 16, dtype=object, value={}),
    "a code too high": array(10, 16, value=V), "a negative code": array(10, 16, value=-1)}


def test_unusable_token_files_are_skipped_counted_and_named(released, run, capsys):
    for name, content in UNUSABLE.items():
        (released / "2" / f"{name}.npy").write_bytes(content)
    run(PACK)
    folder, said = TokenFolder("tokens"), capsys.readouterr().out
    assert np.concatenate(folder.shards).shape == (3 + len(UNUSABLE), 10, 16)
    assert sorted(folder.labels[folder.labels >= 0]) == [2, 10, 10]
    assert f"skipped {len(UNUSABLE)} unreadable: released/2/a code too high.npy, " in said


@pytest.mark.parametrize("folder, problem", [
    ("photos", "no files .npy in photos/CLASS"),
    ("named", "named has folders that are no class numbers"),
    ("dated", "dated has folders that are no class numbers"),
    ("high", "high/0/a.npy holds no tokens of square images: expected integers")])
def test_a_folder_without_tokens_is_one_line(here, run, capsys, folder, problem):
    for place in ("high/0", "named/cat", "dated/20240131"):
        (here / place).mkdir(parents=True)
        np.save(here / place / "a.npy", np.full((10, 16), V))
    with pytest.raises(SystemExit, match="2"):
        run(PACK.replace("released", folder))
    error, = capsys.readouterr().err.splitlines()
    assert problem in error and not (here / "tokens").exists()


# --------------------------------------------------------------------------------------------------
# Reading tokens


def write_tokens(folder, n, shards=4):
    """n images in two crops: crop c of image i consists of tokens 2 i + c; classes 0, 1, 2, 0, 1"""
    tokens = np.arange(2 * n, dtype=np.uint16).reshape(n, 2, 1).repeat(4, 2)
    size = -(-n // shards)
    for i in range(shards):
        np.save(folder / f"tokens-000{i}.npy", tokens[i * size : (i + 1) * size])
    np.save(folder / "labels.npy", np.arange(n) % 3)
    meta = {"grid": [2, 2], "codes": max(V, 2 * n), "classes": ["a", "b", "c"], "tokenizer": "/some/tok.pt"}
    (folder / "meta.json").write_text(json.dumps(meta))
    return TokenFolder(folder)


@pytest.fixture
def folder(tmp_path):
    """Eleven images, of which one is held out."""
    return write_tokens(tmp_path, 11)


def images_of(tokens, labels):
    """Which images a batch holds, and in which crops."""
    assert tokens.dtype == labels.dtype == torch.int64 and tokens.shape == (len(labels), 4)
    assert (tokens == tokens[:, :1]).all() and (labels == tokens[:, 0] // 2 % 3).all()
    return (tokens[:, 0] // 2).tolist(), (tokens[:, 0] % 2).tolist()


def test_a_token_folder_knows_what_it_holds(folder):
    assert len(folder) == 10 and folder.grid == (2, 2) and folder.codebook_size == V
    assert folder.class_names == ["a", "b", "c"] and folder.tokenizer == "/some/tok.pt"
    assert all(isinstance(shard, np.memmap) and shard.mode == "r" for shard in folder.shards)


def test_a_folder_of_the_first_version_has_all_its_tokens_in_one_file(folder, tmp_path):
    expected = folder.batch(3, 7)
    np.save(tmp_path / "tokens.npy", np.concatenate(folder.shards))
    for path in tmp_path.glob("tokens-*.npy"):
        path.unlink()
    assert all(torch.equal(a, b) for a, b in zip(TokenFolder(tmp_path).batch(3, 7), expected))


def test_every_image_but_the_held_out_ones_comes_once_in_an_epoch(folder):
    images = [image for number in range(15) for image in images_of(*folder.batch(number, 4))[0]]
    epochs = [images[i : i + 10] for i in range(0, 60, 10)]  # the ends of epochs lie within batches
    held_out, _ = images_of(*folder.held_out())
    assert all(sorted(epoch + held_out) == list(range(11)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6  # each in an order of its own


@pytest.mark.parametrize("n, number", [(1, 0), (2, 1), (99, 1), (250, 2), (1000, 10)])
def test_one_percent_is_held_out_and_one_image_at_least_remains(tmp_path, n, number):
    folder = write_tokens(tmp_path, n, shards=1)
    images, crops = images_of(*folder.held_out())
    assert len(images) == number and len(folder) == n - number and not any(crops)
    assert (images_of(*folder.held_out(3))[0]) == images[:3]  # always the same ones
    np.save(tmp_path / "labels.npy", np.zeros(n, np.int64))
    assert (TokenFolder(tmp_path).held_out()[0][:, 0] // 2).tolist() == images  # the size decides


def test_a_batch_depends_on_its_number_its_size_and_the_seed_only(folder, tmp_path):
    expected = folder.batch(7, 4, seed=3)
    again = TokenFolder(tmp_path)
    again.batch(0, 4, seed=3)  # what came before plays no part
    assert all(torch.equal(a, b) for a, b in zip(expected, again.batch(7, 4, seed=3)))
    assert not torch.equal(expected[0], again.batch(7, 4, seed=4)[0])
    assert not torch.equal(expected[0], again.batch(8, 4, seed=3)[0])


@pytest.mark.parametrize("part", [slice(1, None, 3), slice(4, 8), slice(0, 1), slice(0, 0)])
def test_a_part_of_a_batch_is_that_part_of_the_whole(folder, part):
    for number in (0, 1, 5):  # the second lies in two epochs
        whole, some = folder.batch(number, 8, seed=1), folder.batch(number, 8, seed=1, part=part)
        assert all(torch.equal(a[part], b) for a, b in zip(whole, some))


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("damage", [
    lambda path: (path / "meta.json").write_text("[1, 2]"),
    lambda path: rewrite(path / "meta.json", grid=[4, 5]),
    lambda path: rewrite(path / "meta.json", classes=[["cat"], "dog"]),
    lambda path: rewrite(path / "meta.json", tokenizer=5),
    lambda path: np.save(path / "labels.npy", np.zeros(11)),  # floats
    lambda path: np.save(path / "labels.npy", np.full(11, 3)),  # more classes than names
    lambda path: (path / "tokens-0001.npy").unlink(),
    lambda path: (path / "tokens-0001.npy").write_bytes(b"no array"),
    lambda path: np.save(path / "tokens-0001.npy", np.full((3, 2, 4), V, np.uint16)),  # beyond the codes
    lambda path: np.save(path / "tokens-0001.npy", np.zeros((3, 2, 4)))])
def test_a_damaged_token_folder_is_an_error_in_one_line(folder, tmp_path, damage):
    damage(tmp_path)
    with pytest.raises(UserError, match="is damaged: delete it and encode again") as error:
        TokenFolder(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
