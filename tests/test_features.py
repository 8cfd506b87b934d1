"""What features are good for: PCK, a linear probe, pairs of pictures, the table by layer.

The features themselves are tested in test_apps.py.
"""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import seeded, small_model, small_tokenizer
from PIL import Image

from randar import load_randar, save_randar
from studies import features
from studies.features import correct, linear_probe, pck
from support import border, toy
from tokenizer import load_tokenizer, save_tokenizer


def test_a_point_is_right_within_a_tenth_of_the_side():
    truth = torch.tensor([[10.0, 10.0]]).expand(4, 2)
    found = truth + torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.1], [2.2, 2.2]])
    assert correct(found, truth, side=30).tolist() == [True, True, False, False]


def test_pck_per_image_weighs_pairs_equally_and_per_point_points():
    right = [torch.tensor([True]), torch.tensor([True, False, False, False])]
    assert pck(right) == pytest.approx(((1 + 0.25) / 2, 2 / 5))


def test_a_linear_probe_reads_off_what_is_there_and_nothing_else():
    x, classes = torch.randn(400, 8, generator=seeded(0)), torch.arange(400) % 8
    top_1, top_5 = linear_probe(x[:200], classes[:200], x[200:], classes[200:])
    assert top_1 < 0.4 and top_1 < top_5
    x += 8 * F.one_hot(classes, 8)
    assert linear_probe(x[:200], classes[:200], x[200:], classes[200:]) == (1, 1)


def test_a_toy_pair_shows_one_class_twice_with_the_same_parts_in_the_same_order():
    pairs = features.toy_pairs(20, seed=3)
    assert [pair.name for pair in pairs] == [name for name in toy.CLASSES for _ in range(2)]
    for pair in pairs[:2]:  # faces: the first two points are eyes
        assert pair.name == "face" and not torch.equal(pair.source, pair.target)
        here, there = pair.source_points, pair.target_points
        for picture, points in ((pair.source, here), (pair.target, there)):
            assert all(picture[:, int(y), int(x)].max() < -0.3 for x, y in points[:2])
        assert (here[0, 0] < here[1, 0]) == (there[0, 0] < there[1, 0])  # left stays left


def test_in_a_toy_pair_the_same_place_is_never_right():
    pairs = features.toy_pairs(50, seed=3)
    right = [correct(pair.source_points, pair.target_points, pair.side) for pair in pairs]
    assert pck(right) == (0, 0)


def write_spair(folder):
    """A folder of SPair-71k's form: two categories, each with an image, paired with itself."""
    (folder / "PairAnnotation" / "test").mkdir(parents=True)
    points = ((20, 10), (25, 17))
    for i, category in enumerate(("cat", "bus")):
        (folder / "JPEGImages" / category).mkdir(parents=True)
        pixels = np.random.default_rng(i).integers(256, size=(24, 40, 3), dtype=np.uint8)
        name = f"2008_{i}.jpg"
        Image.fromarray(pixels).save(folder / "JPEGImages" / category / name)
        pair = {"category": category, "src_imname": name, "trg_imname": name,
                "trg_bndbox": [20, 10, 22, 14], "src_kps": points, "trg_kps": points}
        name = f"{i:06}-2008_{i}-2008_{i}:{category}.json"
        (folder / "PairAnnotation" / "test" / name).write_text(json.dumps(pair))
    return folder


def test_spair_points_are_middles_of_pixels_and_the_side_is_that_of_the_targets_box(tmp_path):
    paths = write_spair(tmp_path).glob("PairAnnotation/test/*.json")
    cat, bus = map(features.spair_pair, sorted(paths))
    assert (cat.name, bus.name) == ("cat", "bus") and cat.side == 4
    assert cat.target_points.tolist() == [[20.5, 10.5], [25.5, 17.5]]
    assert bus.source.shape == (3, 24, 40)


# ------------------------------------------------------------------------------------------------
# The shipped model, and the command


def test_the_second_round_helps_the_shipped_model():
    model = load_randar(border.CHECKPOINTS / "randar_toy.pt")
    tokenizer = load_tokenizer(border.CHECKPOINTS / "tokenizer.pt")
    pairs = features.toy_pairs(30, seed=0)
    right, examples = features.match_pairs(model, tokenizer, pairs, 30, [3], "random", seeded(0))
    (first, _), (second, _) = pck(right[3, 1]), pck(right[3, 2])
    assert second > first + 0.05 and first > 0.5 and len(examples) == 4


def test_the_table_has_the_figures_of_each_layer_and_round(model):
    table = features.table_by_layer(model, small_tokenizer(), 2, seed=0, order="raster")
    pairs, grid = features.toy_pairs(2, seed=0), seeded(0)
    right, _ = features.match_pairs(model, small_tokenizer(), pairs, 2, [1, 2], "raster", grid)
    assert table.shape == (2, 2, 4) and ((table >= 0) & (table <= 1)).all()
    for layer, r in right:
        expected = torch.tensor(pck(right[layer, r]))
        torch.testing.assert_close(table[layer - 1, r - 1, :2], expected)


def test_the_encoder_finds_every_point_of_the_same_picture():
    pair = features.toy_pairs(1, seed=0)[0]
    same = pair._replace(target=pair.source, target_points=pair.source_points)
    network = small_tokenizer()  # its tokens are a few pixels wide: within 0.1 of 32
    assert features.encoder_pck(network, [same]) == (1, 1)
    assert features.encoder_pck(network, [pair])[0] < 1


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder: a small model of raster order, a tokenizer and an SPair folder in it."""
    monkeypatch.chdir(tmp_path)
    model = small_model()
    model.order = "raster"
    save_randar(model, "randar.pt")
    save_tokenizer(small_tokenizer(), "tokenizer.pt")
    return write_spair(tmp_path / "SPair-71k").parent


def test_spair_is_measured_in_pixels_of_the_original_picture(folder, run, capsys):
    run("studies/features.py --ckpt randar.pt --data SPair-71k")  # within 0.4 pixels
    said = capsys.readouterr().out
    assert said.count("100.0% per image, 100.0% per point") == 2
    assert "2 pairs, features after layer 1 of 2, raster order" in said
    assert Image.open("features.png").width > 1000


def test_a_row_for_each_layer_is_printed_and_all_are_drawn(folder, run, capsys):
    run("studies/features.py --ckpt randar.pt randar.pt --number 2 --order random --out table.jpg")
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if line.startswith("layer")]
    assert [row[1] for row in rows] == ["1", "2", "1", "2"] and {len(row) for row in rows} == {10}
    assert said.count("randar.pt, random order") == 2 and Image.open("table.jpg").format == "JPEG"


@pytest.mark.parametrize("line, message", [
    ("--number 0", "--number"), ("--out pairs.txt", "ends in .png"),
    ("--data SPair-71k --layer 3", "layer must be from 1"),
    ("--data nowhere", "give SPair-71k's folder"), ("--data SPair-71k --ckpt a b", "one --ckpt")])
def test_a_mistake_is_one_line_and_nothing_is_written(folder, run, capsys, line, message):
    before = set(folder.iterdir())
    with pytest.raises(SystemExit) as stop:
        run(f"studies/features.py --ckpt randar.pt {line}")
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(said) == 1 and message in said[0]
    assert set(folder.iterdir()) == before
