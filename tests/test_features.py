"""Features, correspondences and attention as a specification: what sees what, and where it is found."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import C, N, V, inputs_of, seeded, small_model, small_tokenizer
from PIL import Image

import common
import features
import toy
from features import (attention_maps, correct, correspond, encode_features, features_by_layer, linear_probe,
                      nearest_points, pck)
from randar import KeyValueCache, load_randar, save_randar
from vqgan import load_tokenizer, save_tokenizer

# ------------------------------------------------------------------------------------------------------------
# Bi-directional encoding


def in_turns(x, order):
    """[b, N, d] in raster order -> in the order given."""
    return x.gather(1, order[:, :, None].expand_as(x))


def changed(model, batch, turn, rounds):
    """Bool [b, N]: whose features, in their turns, change with the token of one turn."""
    tokens, classes, order = batch
    place = order[:, turn : turn + 1]
    other = tokens.scatter(1, place, (tokens.gather(1, place) + 1) % V)
    one, two = (encode_features(model, x, classes, rounds, 2, order) for x in (tokens, other))
    return in_turns(abs(one - two), order).amax(-1) > 1e-6


def test_predictions_are_made_of_the_first_round_features_of_the_last_layer(model, batch):
    tokens, classes, order = batch
    states = in_turns(encode_features(model, tokens, classes, rounds=1, layer=2, order=order), order)
    logits = model.output(model.norm(states))
    torch.testing.assert_close(logits, model(tokens, classes, order), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_second_round_is_a_second_pass_with_the_cache_of_the_first(model, batch):
    tokens, classes, order = batch
    x, rotation = model.sequence(tokens, classes, order)
    caches = [KeyValueCache(3, 2, 1 + 4 * N, 16, x.dtype, x.device) for _ in model.layers]
    model.hidden_states(x, rotation, caches)
    second = model.hidden_states(x[:, 1:], rotation[:, 1:], caches, place=1 + 2 * N)  # the class came once
    states = in_turns(encode_features(model, tokens, classes, rounds=2, layer=2, order=order), order)
    torch.testing.assert_close(states, second[:, ::2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("turn", range(N))
def test_in_the_second_round_every_feature_depends_on_every_token(model, batch, turn):
    assert changed(model, batch, turn, rounds=2).all()


@pytest.mark.parametrize("turn", range(N))
def test_in_the_first_round_a_feature_depends_on_the_tokens_before_it_and_no_others(model, batch, turn):
    change = changed(model, batch, turn, rounds=1)
    assert not change[:, : turn + 1].any() and change[:, turn + 1 :].all()


def test_all_features_depend_on_the_class(model, batch):
    tokens, classes, order = batch
    one, two = (encode_features(model, tokens, c, 1, 1, order) for c in (classes, (classes + 1) % C))
    assert (abs(one - two).amax(-1) > 1e-6).all()


def test_one_pass_gives_every_layer_and_every_round(model, batch):
    tokens, classes, order = batch
    for layer, states in enumerate(features_by_layer(model, tokens, classes, 3, order), start=1):
        assert states.shape == (3, 3, N, 32) and not states.requires_grad
        for turn in (1, 2, 3):
            alone = encode_features(model, tokens, classes, turn, layer, order)
            torch.testing.assert_close(states[:, turn - 1], alone, atol=1e-5, rtol=1e-5)


def test_features_of_an_image_do_not_depend_on_the_others(model, batch):
    together = encode_features(model, *batch[:2], order=batch[2])
    alone = encode_features(model, *(x[1:2] for x in batch[:2]), order=batch[2][1:2])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)


def test_no_layer_after_the_one_asked_for_is_computed(model, batch):
    seen = inputs_of(model.layers[1])
    encode_features(model, batch[0], layer=1)
    assert not seen


def test_by_default_nobody_says_the_class_and_the_order_is_that_of_training(model, batch):
    tokens, null = batch[0], torch.full((3,), C)
    model.order = "raster"
    raster = torch.arange(N).expand(3, -1)
    assert torch.equal(encode_features(model, tokens), encode_features(model, tokens, null, 2, 1, raster))
    random = [encode_features(model, tokens, order="random", generator=seeded(s)) for s in (0, 0, 1)]
    assert torch.equal(random[0], random[1]) and not torch.equal(random[0], random[2])


@pytest.mark.parametrize("depth, layer", [(36, 24), (24, 16), (48, 32), (4, 3), (2, 1), (1, 1)])
def test_by_default_features_come_from_two_thirds_of_the_depth(depth, layer):
    assert features.checked_layer(small_model(n_layer=depth, dim=8), None) == layer


def test_images_of_another_grid_than_that_of_training_have_features_too(model):
    tokens = torch.randint(V, (2, 15), generator=seeded(0))
    assert encode_features(model, tokens, grid=(3, 5)).shape == (2, 15, 32)
    maps, to_class = attention_maps(model, tokens, 1, 0, grid=(3, 5))
    assert maps.shape == (2, 2, 15, 2, 3, 5) and to_class.shape == (2, 2, 15)


@pytest.mark.parametrize("wrong, message", [
    (dict(layer=0), "layer must be from 1 to 2"), (dict(layer=3), "layer must be from 1 to 2"),
    (dict(rounds=0), "rounds must be at least 1"), (dict(order="spirl"), "unknown order"),
    (dict(classes=torch.tensor([0, 1, C + 1])), "classes must be from 0 to 5"),
    (dict(classes=torch.tensor([0])), r"expected tokens \[b, 16\]"),
    (dict(order=torch.zeros(3, N, dtype=torch.int64)), "position is twice"),
    (dict(grid=(3, 5)), r"expected tokens \[b, 15\]"), (dict(tokens=torch.full((3, N), V)), "tokens must be"),
])
def test_what_does_not_fit_is_refused(model, batch, wrong, message):
    with pytest.raises(ValueError, match=message):
        encode_features(model, **dict(tokens=batch[0]) | wrong)


# ------------------------------------------------------------------------------------------------------------
# Correspondence


def feature_map(h=4, w=4, seed=0):
    return torch.randn(h, w, 32, generator=seeded(seed))


def pixel_middles(height, width, border):
    """All (x, y) at least `border` pixels inside a picture: [k, 2]."""
    y, x = torch.meshgrid(torch.arange(border, height - border), torch.arange(border, width - border),
                          indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1) + 0.5


def test_every_pixel_of_an_image_corresponds_to_itself():
    points = pixel_middles(20, 20, border=3)  # 5 pixels a token: nearer to the border, features are constant
    assert torch.equal(nearest_points(feature_map(), feature_map(), points, (20, 20), (20, 20)), points)


def test_token_middles_correspond_to_themselves_in_a_picture_of_any_size():
    middles = pixel_middles(4, 6, border=1)  # (x, y) in tokens; those at the border are constant outwards
    found = nearest_points(feature_map(4, 6), feature_map(4, 6), middles * 4, (16, 24), (28, 66))
    assert torch.equal(found, middles * torch.tensor([11, 7]))  # 11 by 7 pixels a token


def test_what_moved_is_found_where_it_moved_to():
    source = feature_map()
    points = pixel_middles(20, 20, border=3)
    points = points[points[:, 0] < 12]
    found = nearest_points(source, source.roll(1, dims=1), points, (20, 20), (20, 20))
    assert torch.equal(found, points + torch.tensor([5, 0]))


def test_the_length_of_features_does_not_matter():
    lengths = torch.rand(4, 4, 1, generator=seeded(1)) + 0.1
    middles = pixel_middles(4, 4, border=1) * 5
    found = nearest_points(feature_map(), feature_map() * lengths, middles, (20, 20), (20, 20))
    assert torch.equal(found, middles)


def test_a_picture_corresponds_to_itself(model):
    picture, points = torch.rand(3, 16, 16, generator=seeded(0)) * 2 - 1, pixel_middles(16, 16, border=2)
    tokenizer = small_tokenizer()
    assert torch.equal(correspond(model, tokenizer, picture, picture, points, order="raster"), points)
    larger = F.interpolate(picture[None], (40, 24))[0]
    found = correspond(model, tokenizer, picture, larger, points, order="raster", rounds=1, layer=2)
    assert found.shape == points.shape and (found <= torch.tensor([24, 40])).all() and found[:, 1].max() > 20


def test_pictures_are_stretched_to_the_size_that_the_model_knows_and_left_alone_if_they_have_it():
    tokenizer, picture = small_tokenizer(), torch.rand(3, 16, 16, generator=seeded(0)) * 2 - 1
    one, two = features.tokens_of([picture, torch.rand(3, 9, 30)], tokenizer, (4, 4))
    assert torch.equal(one[None], tokenizer.encode(picture[None])) and two.shape == (N,)


@pytest.mark.parametrize("shapes, message", [
    (((1, 3, 16, 16), (3, 16, 16), (4, 2)), "expected two pictures"),
    (((3, 16, 16), (4, 16, 16), (4, 2)), "expected two pictures"),
    (((3, 16, 16), (3, 16, 16), (4, 3)), "expected two pictures"),
    (((3, 8, 16), (3, 16, 16), (4, 2)), "y from 0 to 8"),
])
def test_pictures_and_points_that_do_not_fit_are_refused(model, shapes, message):
    source, target, points = (torch.full(shape, 8.5 * (len(shape) == 2)) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        correspond(model, small_tokenizer(), source, target, points)


def test_a_point_is_right_within_a_tenth_of_the_side():
    truth = torch.tensor([[10.0, 10.0]]).expand(4, 2)
    found = truth + torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.1], [2.2, 2.2]])
    assert correct(found, truth, side=30).tolist() == [True, True, False, False]


def test_pck_per_image_weighs_pairs_equally_and_per_point_points():
    right = [torch.tensor([True]), torch.tensor([True, False, False, False])]
    assert pck(right) == pytest.approx(((1 + 0.25) / 2, 2 / 5))


# ------------------------------------------------------------------------------------------------------------
# Linear probing


def test_a_linear_probe_reads_off_what_is_linearly_separable():
    x, classes = torch.randn(200, 8, generator=seeded(0)), torch.arange(200) % 4
    x[:, :4] += 8 * F.one_hot(classes, 4)
    assert linear_probe(x[:100], classes[:100], x[100:], classes[100:]) == 1


def test_a_linear_probe_cannot_read_off_what_is_not_there():
    x, classes = torch.randn(400, 8, generator=seeded(0)), torch.arange(400) % 4
    assert linear_probe(x[:200], classes[:200], x[200:], classes[200:]) < 0.4


# ------------------------------------------------------------------------------------------------------------
# Attention


def in_sequence(maps, to_class, order):
    """The maps of one head as weights of the whole sequence, [b, 1 + 2 N, 1 + 2 N]."""
    b = len(order)
    places = (1 + 2 * order.argsort(dim=1)[:, None] + torch.arange(2)[None, :, None]).flatten(1)  # [b, 2 N]
    weights = torch.zeros(b, 1 + 2 * N, 1 + 2 * N)
    weights[:, 0, 0] = 1  # the class sees itself only
    for i in range(b):
        weights[i, places[i][:, None], places[i]] = maps[i].reshape(2 * N, 2 * N)
        weights[i, places[i], 0] = to_class[i].flatten()
    return weights


@pytest.mark.parametrize("layer, head", [(1, 0), (2, 1)])
def test_the_maps_are_the_weights_that_attention_uses(model, batch, attention_calls, layer, head):
    tokens, classes, order = batch
    weights = in_sequence(*attention_maps(model, tokens, layer, head, classes, order), order)
    attention_calls.clear()
    model(tokens, classes, order)
    q, k, v, options = attention_calls[layer - 1]
    used = F.scaled_dot_product_attention(q, k, v, **options)[:, head]
    torch.testing.assert_close(weights[:, : 2 * N, : 2 * N] @ v[:, head], used, atol=1e-5, rtol=1e-4)


def test_the_weights_of_a_token_sum_to_one_and_are_zero_for_later_tokens_only(model, batch):
    tokens, classes, order = batch
    maps, to_class = attention_maps(model, tokens, 2, 0, classes, order)
    assert torch.allclose(maps.sum((3, 4, 5)) + to_class, torch.ones(3, 2, N)) and (to_class > 0).all()
    weights = in_sequence(maps, to_class, order)
    assert (weights.triu(1) == 0).all() and (weights + torch.ones(33, 33).triu(1) > 0).all()


@pytest.mark.parametrize("layer, head, message", [
    (0, 0, "layer must be from 1 to 2"), (3, 0, "layer"), (1, -1, "head must be from 0"), (1, 2, "head")])
def test_a_layer_or_head_out_of_range_is_refused(model, batch, layer, head, message):
    with pytest.raises(ValueError, match=message):
        attention_maps(model, batch[0], layer, head)


# ------------------------------------------------------------------------------------------------------------
# Pictures whose points are known


def test_a_toy_pair_shows_one_class_twice_with_the_same_parts_in_the_same_order():
    pairs = features.toy_pairs(20, seed=3)
    assert [pair.name for pair in pairs] == [name for name in toy.CLASSES for _ in range(2)]
    for pair in pairs[:2]:  # faces: the first two points are eyes
        assert pair.name == "face" and not torch.equal(pair.source, pair.target)
        for picture, points in ((pair.source, pair.source_points), (pair.target, pair.target_points)):
            assert all(picture[:, int(y), int(x)].max() < -0.3 for x, y in points[:2])
        here, there = pair.source_points, pair.target_points
        assert (here[0, 0] < here[1, 0]) == (there[0, 0] < there[1, 0])  # left stays left


def test_in_a_toy_pair_the_same_place_is_never_right():
    pairs = features.toy_pairs(50, seed=3)
    assert pck([correct(pair.source_points, pair.target_points, pair.side) for pair in pairs]) == (0, 0)


def write_spair(folder, points=((20, 10), (25, 17)), size=(40, 24)):
    """A folder of SPair-71k's form: two categories, each with an image and a pair of it with itself."""
    (folder / "PairAnnotation" / "test").mkdir(parents=True)
    for i, category in enumerate(("cat", "bus")):
        (folder / "JPEGImages" / category).mkdir(parents=True)
        pixels = np.random.default_rng(i).integers(256, size=(*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "JPEGImages" / category / f"2008_{i}.jpg")
        name = f"2008_{i}.jpg"
        pair = {"pair_id": i, "category": category, "src_imname": name, "trg_imname": name,
                "src_imsize": [*size, 3], "trg_imsize": [*size, 3], "src_bndbox": [0, 0, 9, 9],
                "trg_bndbox": [20, 10, 22, 14], "src_kps": points, "trg_kps": points, "kps_ids": ["0", "3"]}
        name = f"{i:06}-2008_{i}-2008_{i}:{category}.json"
        (folder / "PairAnnotation" / "test" / name).write_text(json.dumps(pair))
    return folder


def test_spair_points_are_middles_of_pixels_and_the_side_is_that_of_the_targets_box(tmp_path):
    cat, bus = features.spair_pairs(write_spair(tmp_path))
    assert (cat.name, bus.name) == ("cat", "bus") and cat.side == 4
    assert cat.target_points.tolist() == [[20.5, 10.5], [25.5, 17.5]]
    assert common.read_picture(bus.source).shape == (3, 24, 40)


@pytest.mark.parametrize("path, content, error, message", [
    ("PairAnnotation", None, FileNotFoundError, "give the folder of SPair-71k"),
    ("JPEGImages/bus/2008_1.jpg", None, FileNotFoundError, "2008_1.jpg is missing"),
    ("PairAnnotation/test/x.json", "{", ValueError, "x.json is no pair"),
    ("PairAnnotation/test/x.json", "[]", ValueError, "x.json is no pair"),
    ("PairAnnotation/test/x.json", '{"category": "cat"}', ValueError, "x.json is no pair"),
    ("PairAnnotation/test/x.json", '{"category": "cat", "src_imname": "a", "trg_imname": "b", "src_kps": [], '
     '"trg_kps": [], "trg_bndbox": [0, 0, 1, 1]}', ValueError, "x.json is no pair"),
])
def test_a_damaged_spair_folder_is_named_before_work_starts(tmp_path, path, content, error, message):
    path = write_spair(tmp_path) / path
    if content is None:
        path.rename(tmp_path / "elsewhere")
    else:
        path.write_text(content)
    with pytest.raises(error, match=message):
        features.spair_pairs(tmp_path)


# ------------------------------------------------------------------------------------------------------------
# The commands


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Type a command, in a folder with a small model of raster order, a tokenizer and an SPair folder."""
    monkeypatch.chdir(tmp_path)
    save_randar(small_model(), "randar.pt", order="raster")
    save_tokenizer(small_tokenizer(), "tokenizer.pt")
    write_spair(tmp_path / "SPair-71k")
    parser = common.command_line("")
    features.add_commands(parser.add_subparsers())

    def run(line):
        args = parser.parse_args(line.split())
        with common.one_line_errors():
            args.run(args)

    return run


def test_correspond_measures_spair_in_pixels_of_the_original_picture(run, capsys):
    run("correspond --ckpt randar.pt --data SPair-71k")  # within 0.4 pixels, though the model saw 16 x 16
    said = capsys.readouterr().out
    assert said.count("100.0% per image, 100.0% per point") == 2
    assert "2 pairs, features after layer 1 of 2, raster order" in said
    assert Image.open("correspond.png").width > 1000


def test_features_prints_a_row_for_each_layer_and_draws_them(run, capsys):
    run("features --ckpt randar.pt randar.pt --number 2 --order random --out table.jpg")
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if line.split()[0].isdecimal()]
    assert [row[0] for row in rows] == ["1", "2", "1", "2"] and {len(row) for row in rows} == {7}
    assert said.count("randar.pt, random order") == 2 and Image.open("table.jpg").format == "JPEG"


@pytest.mark.parametrize("line, message", [
    ("correspond --number 0", "--number must be at least"), ("correspond --layer 3", "layer must be from 1"),
    ("correspond --order spirl", "unknown order"), ("correspond --out pairs.txt", "ends in .png"),
    ("correspond --data nowhere", "give the folder of SPair-71k"), ("features --ckpt no.pt", "no.pt"),
    ("features --number -1", "--number must be at least 1"), ("features --device gpu", "cannot use device")])
def test_a_mistake_is_one_line_and_nothing_is_written(run, tmp_path, capsys, line, message):
    before = set(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        run(line if "--ckpt" in line else f"{line} --ckpt randar.pt")
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(said) == 1 and message in said[0]
    assert set(tmp_path.iterdir()) == before


def test_an_unreadable_picture_is_named(run, tmp_path, capsys):
    (tmp_path / "SPair-71k" / "JPEGImages" / "bus" / "2008_1.jpg").write_text("no image")
    with pytest.raises(SystemExit):
        run("correspond --ckpt randar.pt --data SPair-71k")
    assert "unreadable image SPair-71k/JPEGImages/bus/2008_1.jpg" in capsys.readouterr().err.splitlines()[-1]


def test_the_second_round_helps_the_shipped_model():
    model = load_randar(common.CHECKPOINTS / "randar_toy.pt")
    tokenizer = load_tokenizer(common.CHECKPOINTS / "tokenizer.pt")
    pairs = features.toy_pairs(30, seed=0)
    right, examples = features.match_pairs(model, tokenizer, pairs, 30, [3], "random", seeded(0))
    (first, _), (second, _) = pck(right[3, 1]), pck(right[3, 2])
    assert second > first + 0.05 and first > 0.5 and len(examples) == 4
