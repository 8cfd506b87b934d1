"""The toy world as its users may rely on it: what is drawn, where parts are, how it is judged."""

import hashlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from support import judge, toy
from support.border import UserError
from support.pictures import from_uint8


@pytest.fixture(scope="module")
def pictures():
    return toy.make(500, seed=1)


@pytest.fixture(scope="module")
def fresh():
    images, classes, _ = toy.make(400, seed=2)
    return from_uint8(images), torch.from_numpy(classes)


@pytest.fixture(scope="module")
def fresh_scores(fresh):
    return judge.judge(*fresh)


def centred(class_name, flip, colour=0):
    """One picture in the middle, at nominal size, and its keypoints."""
    fixed = {"colour": colour, "background": 0, "x": 16, "y": 16, "size": 1, "flip": flip}
    return toy.draw(toy.CLASSES.index(class_name), np.random.default_rng(0), **fixed)


def pixel_at(image, keypoint):
    x, y = keypoint
    return image[int(y), int(x)].astype(int)


# --------------------------------------------------------------------------------------------------
# Pictures


def test_pictures_of_a_seed_stay_what_they_are():
    images, _, _ = toy.make(100, seed=7)
    digest = hashlib.sha256(images.tobytes()).hexdigest()
    assert digest[:16] == "d2eacd3a34574f55"  # checkpoints and measurements rest on them
    assert (toy.make(5, seed=7)[0] == images[:5]).all()  # a longer run starts with the shorter one


def test_pictures_have_the_promised_types_and_classes_are_about_equally_frequent(pictures):
    images, classes, keypoints = pictures
    assert images.shape == (500, 32, 32, 3) and images.dtype == np.uint8
    assert classes.dtype == np.int64 and len(keypoints) == 500
    assert (np.bincount(classes, minlength=10) > 25).all()  # of 50 expected


def test_the_picture_is_background_above_and_below_the_horizon(pictures):
    corners = {(tuple(image[0, 0]), tuple(image[31, 31])) for image in pictures[0]}
    assert corners == set(toy.BACKGROUNDS.values())


# --------------------------------------------------------------------------------------------------
# Keypoints


def test_a_class_has_four_to_six_keypoints_and_always_the_same(pictures):
    _, classes, keypoints = pictures
    for index in range(10):
        names = {frozenset(places) for places, c in zip(keypoints, classes) if c == index}
        assert len(names) == 1 and 4 <= len(names.pop()) <= 6


def test_eyes_are_dark_wherever_the_object_stands(pictures):
    eyes = [pixel_at(image, place) for image, places in zip(pictures[0], pictures[2])
            for name, place in places.items() if "eye" in name]
    assert len(eyes) > 100 and np.mean(eyes, axis=1).max() < 70


@pytest.mark.parametrize("class_name, part, colour", [
    ("fish", "tail", [int(0.7 * channel) for channel in toy.COLOURS["red"]]),
    ("flower", "disc", toy.WHITE), ("house", "door", toy.BROWN), ("car", "headlight", toy.GOLD),
    ("tree", "trunk", toy.BROWN), ("boat", "keel", toy.BROWN), ("house", "window", toy.CREAM),
    ("rocket", "window", toy.WHITE), ("rocket", "flame", toy.FLAME), ("face", "mouth", toy.DARK)])
def test_a_part_has_its_colour_at_its_keypoint_flipped_or_not(class_name, part, colour):
    for flip in (False, True):
        image, keypoints = centred(class_name, flip)
        assert np.abs(pixel_at(image, keypoints[part]) - colour).max() < 40


@pytest.mark.parametrize("size", [0.5, 0.8, 1.5])
@pytest.mark.parametrize("side", [64, 128])
def test_in_the_fine_world_a_part_has_its_colour_at_every_size(size, side):
    fixed = {"colour": 0, "background": 0, "size": size, "x": 15, "y": 17}
    for name, part, colour in (("fish", "tail", [int(0.7 * c) for c in toy.COLOURS["red"]]),
                               ("face", "left eye", toy.DARK), ("boat", "keel", toy.BROWN)):
        rng = np.random.default_rng(0)
        image, keypoints = toy.draw(toy.CLASSES.index(name), rng, "fine", side, **fixed)
        assert np.abs(pixel_at(image, keypoints[part]) - colour).max() < 40


def test_a_fine_picture_depends_on_its_seed_only_and_is_the_same_at_any_size():
    images, classes, keypoints = toy.make(20, seed=7, world="fine")
    assert images.shape == (20, 64, 64, 3)
    assert (toy.make(5, seed=7, world="fine")[0] == images[:5]).all()

    large, same, places = toy.make(20, seed=7, world="fine", side=128)
    assert (same == classes).all()
    halved = large.reshape(20, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(halved - images).mean() < 3  # of 255: edges are averaged otherwise
    for small, twice in zip(keypoints, places):
        assert small.keys() == twice.keys()
        assert all(twice[name] == pytest.approx((2 * x, 2 * y)) for name, (x, y) in small.items())


def test_keypoints_that_the_border_cuts_off_are_left_out():
    _, _, keypoints = toy.make(300, seed=3, world="fine")
    assert min(map(len, keypoints)) >= 2 and len(set(map(len, keypoints))) > 3
    assert all(0 <= z < 64 for places in keypoints for place in places.values() for z in place)


def test_a_flip_mirrors_the_keypoints():
    for name in toy.CLASSES:
        _, straight = centred(name, flip=False)
        _, flipped = centred(name, flip=True)
        for part, (x, y) in straight.items():
            assert flipped[toy.mirrored(part)] == pytest.approx((32 - x, y))


# --------------------------------------------------------------------------------------------------
# The judge


def test_the_judge_recognises_fresh_images_and_finds_them_close_to_fresh_ones(fresh_scores):
    assert fresh_scores["accuracy"] >= 0.99
    assert fresh_scores["frechet"] < 1  # 0.5 to 0.7 for 400 images


@pytest.mark.parametrize("side", [64, 128])
def test_the_judge_of_the_fine_world_recognises_fresh_images_of_any_size(side):
    images, classes, _ = toy.make(200, seed=2, world="fine", side=side)
    assert judge.judge(from_uint8(images), classes)["accuracy"] >= 0.98


@pytest.mark.parametrize("spoil", [judge.blow_up, judge.paste_tokens])
@pytest.mark.parametrize("side", [64, 128])
def test_the_judge_of_the_fine_world_sees_spoilt_pictures(side, spoil):
    images = from_uint8(toy.make(200, seed=2, world="fine", side=side)[0])
    torch.manual_seed(0)
    spoilt, chosen = spoil(images)  # some of them
    whole, some = (judge.judge(x[chosen], torch.zeros(int(chosen.sum())))["frechet"]
                   for x in (images, spoilt))
    assert some > 2 * whole


def test_the_judge_recognises_slightly_blurred_and_noisy_images(fresh):
    images, classes = fresh
    torch.manual_seed(0)
    soft = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    assert judge.judge(soft + 0.1 * torch.randn_like(soft), classes)["accuracy"] >= 0.98


def test_noise_is_far_from_fresh_images(fresh, fresh_scores):
    images, classes = fresh
    torch.manual_seed(0)
    noise = judge.judge(2 * torch.rand_like(images) - 1, classes)
    assert noise["frechet"] > 50 * fresh_scores["frechet"]
    assert noise["accuracy"] < 0.2


def test_more_wrong_tokens_are_farther_from_fresh_images(fresh, fresh_scores):
    images, classes = fresh
    torch.manual_seed(0)
    rank = torch.rand(len(images), 1, 64).argsort(-1).view(-1, 1, 8, 8)  # 64 tiles
    rank = rank.repeat_interleave(4, 2).repeat_interleave(4, 3)  # [n, 1, 32, 32]
    few, many = (torch.where(rank < k, images.roll(1, 0), images) for k in (1, 4))
    few, many = judge.judge(few, classes)["frechet"], judge.judge(many, classes)["frechet"]
    assert fresh_scores["frechet"] + 0.3 < few < many / 2


def test_a_score_does_not_depend_on_the_other_images(fresh):
    together, _ = judge.judge_features(fresh[0][:9])
    alone, _ = judge.judge_features(fresh[0][:1])
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("images", [
    torch.zeros(4, 32, 32, 3), torch.zeros(4, 3, 32, 32, dtype=torch.uint8)])
def test_images_of_a_wrong_shape_or_type_are_refused(images):
    with pytest.raises(UserError, match=r"float images \[n, 3, S, S\]"):
        judge.judge_features(images)


@pytest.mark.parametrize("world", toy.WORLDS)
def test_training_writes_a_judge_that_loads(world, monkeypatch, tmp_path):
    monkeypatch.setattr(toy, "folder", lambda world: tmp_path)
    monkeypatch.setattr(judge, "REFERENCE_SIZE", 20)
    judge.train_judge(1, tmp_path / "judge.pt", world)
    for side in judge.SIDES[world]:
        _, mean, covariance = judge.load_judge.__wrapped__("cpu", side)
        assert mean.shape == (64,) and covariance.shape == (64, 64)
        assert mean.dtype == covariance.dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# The Frechet distance


def covariance_of(seed, rank=8):
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(rank, 8, generator=generator, dtype=torch.float64)
    return samples.T @ samples


def test_the_frechet_distance_of_equal_gaussians_is_zero():
    mean, covariance = torch.ones(8), covariance_of(0)
    assert judge.frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_matches_the_closed_form_for_commuting_covariances():
    a, b = torch.arange(1.0, 9), torch.arange(9.0, 1, -1)
    rotation = torch.linalg.qr(covariance_of(0)).Q  # the same axes: roots can be taken one by one
    cov_a, cov_b = (rotation * a @ rotation.T), (rotation * b @ rotation.T)
    expected = 8 * 0.5**2 + (a.sqrt() - b.sqrt()).square().sum().item()
    distance = judge.frechet_distance(torch.zeros(8), cov_a, torch.full((8,), 0.5), cov_b)
    assert distance == pytest.approx(expected)


def test_the_frechet_distance_is_symmetric_even_for_singular_covariances():
    a, b, mean = covariance_of(1, rank=3), covariance_of(2), torch.zeros(8)
    there, back = judge.frechet_distance(mean, a, mean, b), judge.frechet_distance(mean, b, mean, a)
    assert there == pytest.approx(back, abs=1e-6)


# --------------------------------------------------------------------------------------------------
# The command line


def test_the_command_writes_a_sheet(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["toy.py", "--out", str(tmp_path / "sheet.png")])
    toy.main()
    assert Image.open(tmp_path / "sheet.png").width > 1000
