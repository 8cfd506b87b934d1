"""What training reads: folders of images, which become folders of tokens, wholly or not at all."""

import concurrent.futures
import json
import os
import pathlib

import numpy as np
import pytest
import torch
from helpers import V, small_tokenizer, write_images
from PIL import Image

import common
import data
from data import ImageFiles, TokenFolder, encode_images, list_images, read_files, read_image


@pytest.fixture
def photos(tmp_path):
    return write_images(tmp_path / "photos", names=("dog", "cat"))


# ------------------------------------------------------------------------------------------------------------
# Folders of images


def test_classes_are_the_folders_in_alphabetical_order(tmp_path):
    folder = write_images(tmp_path / "photos", names=("dog", "Ant", "cat"), number=2)
    paths, labels, names = list_images(folder)
    assert names == ["Ant", "cat", "dog"] and labels.tolist() == [0, 0, 1, 1, 2, 2]
    expected = [folder / "Ant" / "0.png", folder / "Ant" / "1.png", folder / "cat" / "0.png"]
    assert [*map(os.fsdecode, paths[:3])] == [*map(str, expected)]


def test_images_may_lie_deeper_and_other_files_are_no_images(photos):
    (photos / "cat" / "more").mkdir()
    (photos / "cat" / "0.png").rename(photos / "cat" / "more" / "UPPER.PNG")
    (photos / "cat" / "notes.txt").write_text("no image")
    (photos / ".hidden").mkdir()
    paths, labels, names = list_images(photos)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1] and names == ["cat", "dog"]
    assert os.fsencode(photos / "cat" / "more" / "UPPER.PNG") in paths


def test_file_names_are_one_array_that_forked_workers_share(photos):
    (photos / "cat" / "ein Bär, très long.png").touch()
    paths, _, _ = list_images(photos)
    assert paths.dtype.kind == "S" and paths.shape == (7,) and paths.nbytes < 7 * 200
    assert all(os.path.isfile(path) for path in paths)


def test_a_folder_without_images_is_an_error_that_names_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere: give one of class folders"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no class folders: put the images of each class into a folder"):
        list_images(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "not_in_a_class.png")
    with pytest.raises(ValueError, match="has no class folders"):
        list_images(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="has class folders but no images in them .*png.*jpg"):
        list_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        list_images(tmp_path / "not_in_a_class.png")


# ------------------------------------------------------------------------------------------------------------
# Images


def test_an_image_is_its_centre_with_the_shorter_edge_resized(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = (0, 200, 0)  # the middle third is green, the rest black
    for name, picture in (("wide.png", pixels), ("tall.png", pixels.transpose(1, 0, 2))):
        Image.fromarray(picture).save(tmp_path / name)
        image = read_image(tmp_path / name, 10)
        assert image.shape == (10, 10, 3) and image.dtype == np.uint8
        assert abs(image[2:-2, 2:-2] - np.array([0, 200, 0])).max() < 8  # resizing softens the edges


def test_an_image_is_resized_by_antialiased_bicubic_interpolation(tmp_path):
    picture = Image.effect_noise((60, 40), 80).convert("RGB")
    picture.save(tmp_path / "a.png")
    expected = picture.resize((36, 24), Image.BICUBIC).crop((6, 0, 30, 24))
    assert abs(read_image(tmp_path / "a.png", 24).astype(int) - np.asarray(expected)).max() <= 1


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
    ("L", 90, (90, 90, 90)), ("RGBA", (10, 20, 30, 255), (10, 20, 30)), ("LA", (90, 255), (90, 90, 90)),
    ("1", 1, (255, 255, 255)), ("P", 0, None), ("CMYK", (255, 0, 0, 0), (0, 255, 255))])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, colour, expected):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (12, 12), colour).save(path)
    image = read_image(path, 8)
    assert image.shape == (8, 8, 3)
    assert expected is None or abs(image.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "gif"])
def test_a_damaged_image_is_an_oserror(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    Image.effect_noise((40, 40), 50).convert("RGB").save(path)
    content = path.read_bytes()
    for damaged in (b"", b"no image at all", content[:10], content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(OSError):
            read_image(path, 16)


def test_files_are_read_in_order_and_the_unreadable_ones_are_marked(tmp_path):
    folder = write_images(tmp_path / "photos", number=4)
    (folder / "cat" / "1.png").write_text("no image")
    (folder / "dog" / "2.png").write_bytes((folder / "dog" / "2.png").read_bytes()[:200])
    paths, _, _ = list_images(folder)
    batches = list(read_files(ImageFiles(paths, 8), batch_size=3, workers=2))
    assert [readable.tolist() for readable, _ in batches] == [[True, False, True], [True] * 3, [False, True]]
    good = np.concatenate([readable for readable, _ in batches])
    expected = np.stack([read_image(path, 8) for path in paths[good]])
    assert (np.concatenate([pixels for _, pixels in batches]) == expected).all()
    rest = list(read_files(ImageFiles(paths, 8), first=6, batch_size=3))
    assert len(rest) == 1 and rest[0][0].tolist() == [False, True] and (rest[0][1] == batches[2][1]).all()


def test_of_many_skipped_files_ten_are_named(capsys):
    data.report_skipped([f"{i}.png" for i in range(10, 40)], "unreadable image")
    said = capsys.readouterr().out
    assert said.startswith("skipped 30 unreadable images: 10.png, ") and said.endswith("19.png, ...\n")
    data.report_skipped([], "unreadable image")
    assert capsys.readouterr().out == ""


def test_all_images_at_once_are_an_array_without_the_unreadable_ones(photos, capsys):
    (photos / "cat" / "0.png").write_text("no image")
    assert data.read_all(list_images(photos)[0], 8).shape == (5, 8, 8, 3)
    assert f"skipped 1 unreadable image: {photos}/cat/0.png\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="none of the images is readable"):
        data.read_all(list_images(photos)[0][:1], 8)


# ------------------------------------------------------------------------------------------------------------
# From images to tokens


def encode(photos, out, **changes):
    """encode_images on a folder, as the commands call it; changes replace its arguments."""
    paths, labels, names = list_images(photos)
    arguments = dict(images=paths, labels=labels, class_names=names, source=photos, size=16,
                     tokenizer=small_tokenizer(), tokenizer_path="tok.pt", out=out)
    encode_images(**arguments | changes)


def test_a_token_folder_is_these_three_files(photos, tmp_path):
    encode(photos, tmp_path / "tokens")
    names = sorted(path.name for path in (tmp_path / "tokens").iterdir())
    assert names == ["labels.npy", "meta.json", "tokens.npy"]
    tokens, labels = (np.load(tmp_path / "tokens" / name) for name in ("tokens.npy", "labels.npy"))
    assert tokens.shape == (6, 2, 16) and tokens.dtype == np.uint16 and tokens.max() < V
    assert labels.dtype == np.int64 and labels.tolist() == [0, 0, 0, 1, 1, 1]
    meta = json.loads((tmp_path / "tokens" / "meta.json").read_text())
    assert meta.pop("settings")["crops"] == 2
    assert meta == {
        "grid": [4, 4], "codes": V, "classes": ["cat", "dog"], "images": str(photos),
        "tokenizer": str(pathlib.Path.cwd() / "tok.pt")}


def test_the_second_crop_is_the_mirror_image(photos, tmp_path):
    encode(photos, tmp_path / "tokens")
    tokens = torch.from_numpy(np.load(tmp_path / "tokens" / "tokens.npy").astype(np.int64))  # [n, crops, N]
    images = common.from_uint8(data.read_all(list_images(photos)[0], 16))
    assert (tokens[:, 0] == small_tokenizer().encode(images)).all()
    assert (tokens[:, 1] == small_tokenizer().encode(images.flip(3))).all()
    assert (tokens[:, 0] != tokens[:, 1]).any()
    encode(photos, tmp_path / "one_crop", crops=1)
    assert (np.load(tmp_path / "one_crop" / "tokens.npy") == tokens[:, :1].numpy()).all()


def test_pixels_in_memory_are_encoded_as_files_are(photos, tmp_path):
    encode(photos, tmp_path / "files")
    encode(photos, tmp_path / "pixels", images=data.read_all(list_images(photos)[0], 16))
    assert all((tmp_path / "files" / name).read_bytes() == (tmp_path / "pixels" / name).read_bytes()
               for name in ("tokens.npy", "labels.npy"))


def test_an_unreadable_image_keeps_its_row_which_is_no_image(photos, tmp_path, capsys):
    encode(photos, tmp_path / "all")
    (photos / "cat" / "1.png").write_text("no image")
    encode(photos, tmp_path / "some")
    assert f"skipped 1 unreadable image: {photos}/cat/1.png\n" in capsys.readouterr().out
    everything, some = TokenFolder(tmp_path / "all"), TokenFolder(tmp_path / "some")
    kept = [0, 2, 3, 4, 5]
    assert np.load(tmp_path / "some" / "labels.npy").tolist() == [0, -1, 0, 1, 1, 1]
    assert (some.tokens[1] == 0).all() and (some.tokens[kept] == everything.tokens[kept]).all()
    assert len(some) == 5 and some.rows.tolist() == kept and some.labels.tolist() == [0, 0, 1, 1, 1]
    tokens, labels = some.batch(0, 5)
    seen = {(tuple(row), label) for row, label in zip(tokens.tolist(), labels.tolist())}
    assert len(seen) == 5 and all((row, label) in {(tuple(crop), everything.labels[i]) for i in kept
                                                   for crop in everything.tokens[i].tolist()}
                                  for row, label in seen)


def test_without_a_readable_image_there_is_no_token_folder(photos, tmp_path):
    for path in photos.rglob("*.png"):
        path.write_text("no image")
    with pytest.raises(ValueError, match="none of the images is readable"):
        encode(photos, tmp_path / "tokens")
    assert list((tmp_path / "tokens").iterdir()) == []


@pytest.mark.parametrize("size, advice", [(18, 16), (3, 4), (0, 4), (-16, 4)])
def test_a_size_that_tokens_do_not_fill_is_an_error_with_one_that_they_do(photos, tmp_path, size, advice):
    with pytest.raises(ValueError, match=f"size {size} is not a multiple of 4.*: try {advice}$"):
        encode(photos, tmp_path / "tokens", size=size)
    assert not (tmp_path / "tokens").exists()


# ------------------------------------------------------------------------------------------------------------
# Reading tokens


@pytest.fixture
def folder(tmp_path):
    """A token folder of ten images in two crops: crop c of image i consists of the tokens 2 i + c."""
    tokens = np.arange(20, dtype=np.uint16).reshape(10, 2, 1).repeat(16, 2)
    np.save(tmp_path / "tokens.npy", tokens)
    np.save(tmp_path / "labels.npy", np.arange(10) % 3)
    meta = {"grid": [4, 4], "codes": V, "classes": ["a", "b", "c"], "tokenizer": "/some/tok.pt"}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return tmp_path


def test_a_token_folder_knows_what_it_holds(folder):
    tokens = TokenFolder(folder)
    assert len(tokens) == 10 and tokens.grid == (4, 4) and tokens.codes == V
    assert tokens.class_names == ["a", "b", "c"] and tokens.tokenizer == "/some/tok.pt"


def images_of(tokens, labels):
    """Which images of `folder` a batch holds, and in which crops."""
    assert tokens.dtype == labels.dtype == torch.int64 and tokens.shape == (len(labels), 16)
    assert (tokens == tokens[:, :1]).all() and (labels == tokens[:, 0] // 2 % 3).all()
    return (tokens[:, 0] // 2).tolist(), (tokens[:, 0] % 2).tolist()


def test_every_image_comes_once_in_an_epoch(folder):
    tokens = TokenFolder(folder)
    images = [image for number in range(15) for image in images_of(*tokens.batch(number, 4))[0]]
    epochs = [images[i : i + 10] for i in range(0, 60, 10)]  # the ends of epochs lie within batches
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6  # each in an order of its own


def test_a_batch_may_be_larger_than_the_folder(folder):
    images, _ = images_of(*TokenFolder(folder).batch(0, 30))
    assert sorted(images) == sorted([*range(10)] * 3)


def test_crops_are_drawn_at_random(folder):
    tokens = TokenFolder(folder)
    crops = [crop for number in range(100) for crop in images_of(*tokens.batch(number, 10))[1]]
    assert abs(sum(crops) - 500) < 80  # 5 standard deviations


def test_a_batch_depends_on_its_number_its_size_and_the_seed_only(folder):
    first, second = TokenFolder(folder), TokenFolder(folder)
    np.random.seed(1)
    expected = first.batch(7, 4, seed=3)
    np.random.seed(2)
    second.batch(0, 4, seed=3)  # what came before plays no part
    assert all(torch.equal(a, b) for a, b in zip(expected, second.batch(7, 4, seed=3)))
    assert not torch.equal(expected[0], second.batch(7, 4, seed=4)[0])
    assert not torch.equal(expected[0], second.batch(8, 4, seed=3)[0])


def test_a_training_that_an_earlier_version_began_sees_the_same_images(folder):
    assert images_of(*TokenFolder(folder).batch(2, 4, seed=3)) == ([3, 8, 4, 1], [1, 1, 1, 0])


@pytest.mark.parametrize("part", [slice(1, None, 3), slice(4, 8), slice(0, 1), slice(None), slice(0, 0)])
def test_a_part_of_a_batch_is_that_part_of_the_whole(folder, part):
    tokens = TokenFolder(folder)
    for number in (0, 1, 5):  # the second lies in two epochs
        whole, some = tokens.batch(number, 8, seed=1), tokens.batch(number, 8, seed=1, part=part)
        assert all(torch.equal(a[part], b) for a, b in zip(whole, some))


def test_threads_may_ask_for_batches_at_the_same_time(folder):
    tokens = TokenFolder(folder)
    expected = [tokens.batch(number, 7) for number in range(60)]
    data.epoch_order.cache_clear()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        batches = pool.map(lambda number: tokens.batch(number, 7), range(60))
        assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(expected, batches))


def test_the_order_of_an_epoch_is_drawn_once(folder, monkeypatch):
    data.epoch_order.cache_clear()
    tokens = TokenFolder(folder)
    for number in range(7):  # from the first epoch into the third
        tokens.batch(number, 4)
        tokens.batch(number, 4)
    assert data.epoch_order.cache_info().misses == 3


def test_the_tokens_stay_on_the_disk(folder):
    tokens = TokenFolder(folder).tokens
    assert isinstance(tokens, np.memmap) and tokens.mode == "r"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def without(key):
    def damage(folder):
        meta = json.loads((folder / "meta.json").read_text())
        del meta[key]
        (folder / "meta.json").write_text(json.dumps(meta))
    return damage


@pytest.mark.parametrize("damage, problem", [
    (lambda folder: (folder / "meta.json").unlink(), "no token folder, meta.json is missing: make one with"),
    (lambda folder: (folder / "tokens.npy").unlink(), "no token folder, tokens.npy is missing"),
    (lambda folder: (folder / "labels.npy").unlink(), "no token folder, labels.npy is missing"),
    (lambda folder: truncate(folder / "meta.json"), "is damaged"),
    (lambda folder: truncate(folder / "tokens.npy"), "is damaged"),
    (lambda folder: truncate(folder / "labels.npy"), "is damaged"),
    (lambda folder: (folder / "tokens.npy").write_bytes(b""), "is damaged"),
    (lambda folder: (folder / "labels.npy").write_text("no array"), "is damaged"),
    (lambda folder: (folder / "meta.json").write_text("[1, 2]"), "is damaged"),
    (lambda folder: (folder / "meta.json").write_bytes(b"\xff\xfe\x00"), "is damaged"),
    (without("grid"), "is damaged"), (without("codes"), "is damaged"), (without("classes"), "is damaged"),
    (lambda folder: np.save(folder / "tokens.npy", np.zeros((10, 16), np.uint16)), "contradicts itself"),
    (lambda folder: np.save(folder / "tokens.npy", np.zeros((10, 1, 15), np.uint16)), "contradicts itself"),
    (lambda folder: np.save(folder / "labels.npy", np.zeros(9, np.int64)), "9 labels of 3 classes"),
    (lambda folder: np.save(folder / "labels.npy", np.full(10, 3)), "contradicts itself"),
    (lambda folder: np.save(folder / "labels.npy", np.full(10, -1)), "contradicts itself"),  # none readable
    (lambda folder: np.save(folder / "labels.npy", np.arange(10) % 3 - 2), "contradicts itself"),
])
def test_a_damaged_token_folder_is_an_error_in_one_line(folder, damage, problem):
    damage(folder)
    with pytest.raises((FileNotFoundError, ValueError), match=problem) as error:
        TokenFolder(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
