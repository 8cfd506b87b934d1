"""What training reads: folders of images, which become folders of tokens, wholly or not at all."""

import json
import pathlib

import numpy as np
import pytest
import torch
from helpers import V, files_of, small_tokenizer, write_images
from PIL import Image

import common
import data
from data import TokenFolder, encode_images, list_images, read_image


@pytest.fixture
def photos(tmp_path):
    return write_images(tmp_path / "photos", names=("dog", "cat"))


# ------------------------------------------------------------------------------------------------------------
# Folders of images


def test_classes_are_the_folders_in_alphabetical_order(tmp_path):
    folder = write_images(tmp_path / "photos", names=("dog", "Ant", "cat"), number=2)
    paths, labels, names = list_images(folder)
    assert names == ["Ant", "cat", "dog"] and labels == [0, 0, 1, 1, 2, 2]
    assert paths[:3] == [folder / "Ant" / "0.png", folder / "Ant" / "1.png", folder / "cat" / "0.png"]


def test_images_may_lie_deeper_and_other_files_are_no_images(photos):
    (photos / "cat" / "more").mkdir()
    (photos / "cat" / "0.png").rename(photos / "cat" / "more" / "UPPER.PNG")
    (photos / "cat" / "notes.txt").write_text("no image")
    (photos / ".hidden").mkdir()
    paths, labels, names = list_images(photos)
    assert labels == [0, 0, 0, 1, 1, 1] and names == ["cat", "dog"]
    assert photos / "cat" / "more" / "UPPER.PNG" in paths


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


def test_unreadable_images_are_skipped_counted_and_named(tmp_path, capsys):
    folder = write_images(tmp_path / "photos", number=4)
    (folder / "cat" / "1.png").write_text("no image")
    (folder / "dog" / "2.png").write_bytes((folder / "dog" / "2.png").read_bytes()[:200])
    paths, _, _ = list_images(folder)
    skipped = []
    batches = list(data.read_images(paths, 8, batch_size=3, skipped=skipped))  # by two workers
    assert [i for indices, _ in batches for i in indices] == [0, 2, 3, 4, 5, 7]  # in their order
    for indices, pixels in batches:
        assert all((image == read_image(paths[i], 8)).all() for i, image in zip(indices, pixels, strict=True))
    data.report_skipped(skipped)
    said = capsys.readouterr().out
    assert f"skipped 2 unreadable images: {folder}/cat/1.png, {folder}/dog/2.png" in said


def test_of_many_unreadable_images_ten_are_named(capsys):
    data.report_skipped([f"{i}.png" for i in range(10, 40)])
    said = capsys.readouterr().out
    assert said.startswith("skipped 30 unreadable images: 10.png, ") and said.endswith("19.png, ...\n")
    data.report_skipped([])
    assert capsys.readouterr().out == ""


def test_all_images_at_once_are_an_array_without_the_unreadable_ones(photos):
    (photos / "cat" / "0.png").write_text("no image")
    assert data.read_all(list_images(photos)[0], 8).shape == (5, 8, 8, 3)
    with pytest.raises(ValueError, match="none of the images is readable"):
        data.read_all([photos / "cat" / "0.png"], 8)


# ------------------------------------------------------------------------------------------------------------
# From images to tokens


def encode(photos, out, **changes):
    """encode_images on a folder, as the commands call it; changes replace its arguments."""
    paths, labels, names = list_images(photos)
    arguments = dict(batches=data.read_images(paths, 16), labels=labels, class_names=names, source=photos,
                     tokenizer=small_tokenizer(), tokenizer_path="tok.pt", out=out, size=16)
    encode_images(**arguments | changes)


def test_a_token_folder_is_these_three_files(photos, tmp_path):
    encode(photos, tmp_path / "tokens")
    names = sorted(path.name for path in (tmp_path / "tokens").iterdir())
    assert names == ["labels.npy", "meta.json", "tokens.npy"]
    tokens, labels = (np.load(tmp_path / "tokens" / name) for name in ("tokens.npy", "labels.npy"))
    assert tokens.shape == (6, 2, 16) and tokens.dtype == np.uint16 and tokens.max() < V
    assert labels.dtype == np.int64 and labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert json.loads((tmp_path / "tokens" / "meta.json").read_text()) == {
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


def test_without_the_unreadable_images_the_others_keep_their_classes(photos, tmp_path):
    encode(photos, tmp_path / "all")
    (photos / "cat" / "1.png").write_text("no image")
    encode(photos, tmp_path / "some")
    everything, some = TokenFolder(tmp_path / "all"), TokenFolder(tmp_path / "some")
    kept = [0, 2, 3, 4, 5]
    assert (some.tokens == everything.tokens[kept]).all() and (some.labels == everything.labels[kept]).all()


def interrupted(batches):
    """The first batch, and then Ctrl-C."""
    yield next(batches)
    raise KeyboardInterrupt


def test_what_fails_in_the_middle_leaves_nothing(photos, tmp_path):
    batches = data.read_images(list_images(photos)[0], 16, batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        encode(photos, tmp_path / "tokens", batches=interrupted(batches))
    assert list((tmp_path / "tokens").iterdir()) == []


def test_what_fails_in_the_middle_leaves_the_tokens_that_were_there(photos, tmp_path):
    encode(photos, tmp_path / "tokens", crops=1)
    before = files_of(tmp_path / "tokens")
    batches = data.read_images(list_images(photos)[0], 16, batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        encode(photos, tmp_path / "tokens", batches=interrupted(batches))
    assert files_of(tmp_path / "tokens") == before


def test_without_a_readable_image_there_is_no_token_folder(photos, tmp_path):
    with pytest.raises(ValueError, match="none of the images is readable"):
        encode(photos, tmp_path / "tokens", batches=iter([]))
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
    (lambda folder: np.save(folder / "labels.npy", np.full(10, -1)), "contradicts itself"),
])
def test_a_damaged_token_folder_is_an_error_in_one_line(folder, damage, problem):
    damage(folder)
    with pytest.raises((FileNotFoundError, ValueError), match=problem) as error:
        TokenFolder(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
