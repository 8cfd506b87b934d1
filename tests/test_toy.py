"""The toy world as its users may rely on it: what is drawn, where its parts are, and how the judge judges."""

import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import common
import toy

@pytest.fixture(scope="module")
def pictures():
    return toy.make(500, seed=1)


@pytest.fixture(scope="module")
def fresh():
    images, classes, _ = toy.make(1000, seed=2)
    return common.from_uint8(images), torch.from_numpy(classes)


@pytest.fixture(scope="module")
def fresh_scores(fresh):
    return toy.judge(*fresh)


def centred(class_name, flip, colour=0):
    """One picture in the middle, at nominal size, and its keypoints."""
    fixed = {"colour": colour, "background": 0, "x": 16, "y": 16, "size": 1, "flip": flip}
    return toy.draw(toy.CLASSES.index(class_name), np.random.default_rng(0), **fixed)


def pixel_at(image, keypoint):
    x, y = keypoint
    return image[int(y), int(x)].astype(int)


# ------------------------------------------------------------------------------------------------------------
# Pictures


def test_pictures_have_the_promised_shapes_and_types(pictures):
    images, classes, keypoints = pictures
    assert images.shape == (500, 32, 32, 3) and images.dtype == np.uint8
    assert classes.shape == (500,) and classes.dtype == np.int64
    assert len(keypoints) == 500


def test_the_same_seed_draws_the_same_images(pictures):
    images, classes, keypoints = toy.make(500, seed=1)
    assert (images == pictures[0]).all() and (classes == pictures[1]).all() and keypoints == pictures[2]


def test_a_longer_run_starts_with_the_shorter_one(pictures):
    images, classes, keypoints = toy.make(5, seed=1)
    assert (images == pictures[0][:5]).all() and (classes == pictures[1][:5]).all()
    assert keypoints == pictures[2][:5]


def test_another_seed_draws_other_images(pictures):
    assert (toy.make(20, seed=2)[0] != pictures[0][:20]).any((1, 2, 3)).all()


def test_classes_are_about_equally_frequent(pictures):
    assert (np.bincount(pictures[1], minlength=10) > 25).all()  # of 50 expected, standard deviation 7


def test_the_picture_is_background_above_and_below_the_horizon(pictures):
    corners = {(tuple(image[0, 0]), tuple(image[31, 31])) for image in pictures[0]}
    assert corners == set(toy.BACKGROUNDS.values())


def test_what_the_caller_fixes_is_fixed():
    rng = np.random.default_rng(0)
    image, _ = toy.draw(0, rng, colour=3, background=2)
    assert tuple(image[0, 0]) == toy.BACKGROUNDS["night"][0]
    assert (image == toy.COLOURS["green"]).all(-1).sum() > 100


def test_an_unknown_look_is_refused():
    with pytest.raises(ValueError, match="cannot fix hat"):
        toy.draw(0, np.random.default_rng(0), hat=1)


def test_every_class_shows_a_large_object_in_its_own_colour():
    for name in toy.CLASSES:
        image, _ = centred(name, flip=False)
        assert (image == toy.COLOURS["red"]).all(-1).sum() > 50, name  # without the smooth edges


def test_drawing_takes_at_most_two_milliseconds_an_image():
    start = time.process_time()  # of this process, so that a busy machine does not matter
    toy.make(200, seed=3)
    assert (time.process_time() - start) / 200 < 0.002


# ------------------------------------------------------------------------------------------------------------
# Keypoints


def test_a_class_has_four_to_six_keypoints_and_always_the_same(pictures):
    _, classes, keypoints = pictures
    for index in range(10):
        names = {frozenset(places) for places, c in zip(keypoints, classes) if c == index}
        assert len(names) == 1 and 4 <= len(names.pop()) <= 6


def test_every_keypoint_lies_inside_the_picture(pictures):
    places = np.array([place for places in pictures[2] for place in places.values()])
    assert (places > 0).all() and (places < 32).all()


def test_eyes_are_dark_wherever_the_object_stands(pictures):
    eyes = [pixel_at(image, place) for image, places in zip(pictures[0], pictures[2])
            for name, place in places.items() if "eye" in name]
    assert len(eyes) > 100 and np.mean(eyes, axis=1).max() < 70


@pytest.mark.parametrize("class_name, part, colour", [
    ("fish", "tail", [int(0.7 * channel) for channel in toy.COLOURS["red"]]),
    ("flower", "disc", toy.WHITE), ("flower", "leaf", toy.LEAF),
    ("house", "door", toy.BROWN), ("house", "window", toy.CREAM), ("house", "chimney", toy.BROWN),
    ("car", "front wheel", toy.WHITE), ("car", "rear wheel", toy.WHITE), ("car", "headlight", toy.GOLD),
    ("tree", "trunk", toy.BROWN), ("boat", "keel", toy.BROWN), ("mushroom", "middle dot", toy.WHITE),
    ("rocket", "window", toy.WHITE), ("rocket", "flame", toy.FLAME), ("face", "mouth", toy.DARK)])
def test_a_part_has_its_colour_at_its_keypoint_flipped_or_not(class_name, part, colour):
    for flip in (False, True):
        image, keypoints = centred(class_name, flip)
        assert np.abs(pixel_at(image, keypoints[part]) - colour).max() < 40


def test_a_flip_mirrors_the_keypoints():
    for name in toy.CLASSES:
        _, straight = centred(name, flip=False)
        _, flipped = centred(name, flip=True)
        for part, (x, y) in straight.items():
            assert flipped[toy.mirrored(part)] == pytest.approx((32 - x, y))


def test_a_flip_mirrors_the_picture():
    for name in toy.CLASSES:
        image, _ = centred(name, flip=False)
        flipped, _ = centred(name, flip=True)
        # Pillow rounds corners to whole pixels of the large picture: edges may differ a little
        assert np.abs(image[:, ::-1].astype(int) - flipped).max() < 100, name


def test_left_is_left_in_the_picture_even_after_a_flip(pictures):
    for places in pictures[2]:
        for part, (x, _) in places.items():
            if "left" in part:
                assert x < places[toy.mirrored(part)][0]


# ------------------------------------------------------------------------------------------------------------
# The judge


def test_the_judge_recognises_fresh_images(fresh_scores):
    assert fresh_scores["accuracy"] >= 0.99


def test_the_judge_recognises_slightly_blurred_and_noisy_images(fresh):
    images, classes = fresh
    torch.manual_seed(0)
    soft = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    assert toy.judge(soft + 0.1 * torch.randn_like(soft), classes)["accuracy"] >= 0.98


def test_the_accuracy_of_wrong_classes_is_low(fresh):
    images, classes = fresh
    assert toy.judge(images, (classes + 1) % 10)["accuracy"] < 0.01


def test_fresh_images_are_close_to_fresh_images(fresh_scores):
    assert fresh_scores["frechet"] < 0.5  # 0.20 to 0.32 for 1,000 images


def test_few_images_look_farther_away_than_many(fresh, fresh_scores):
    images, classes = fresh
    assert toy.judge(images[:50], classes[:50])["frechet"] > 2 * fresh_scores["frechet"]


def test_noise_is_far_from_fresh_images(fresh, fresh_scores):
    images, classes = fresh
    torch.manual_seed(0)
    noise = toy.judge(2 * torch.rand_like(images) - 1, classes)
    assert noise["frechet"] > 50 * fresh_scores["frechet"]
    assert noise["accuracy"] < 0.2


def test_images_of_one_colour_only_are_far_from_fresh_images(fresh, fresh_scores):
    rng = np.random.default_rng(4)
    images = np.stack([toy.draw(int(c), rng, colour=0)[0] for c in fresh[1]])
    scores = toy.judge(common.from_uint8(images), fresh[1])
    assert scores["accuracy"] >= 0.99 and scores["frechet"] > 5 * fresh_scores["frechet"]


def test_more_wrong_tokens_are_farther_from_fresh_images(fresh, fresh_scores):
    images, classes = fresh
    torch.manual_seed(0)
    rank = torch.rand(len(images), 1, 64).argsort(-1).view(-1, 1, 8, 8)  # the 64 tiles in a random order
    rank = rank.repeat_interleave(4, 2).repeat_interleave(4, 3)  # [n, 1, 32, 32]
    few, many = (torch.where(rank < k, images.roll(1, 0), images) for k in (1, 4))
    few, many = toy.judge(few, classes)["frechet"], toy.judge(many, classes)["frechet"]
    assert 2 * fresh_scores["frechet"] < few < many / 2


def test_features_and_logits_have_the_promised_shapes(fresh):
    features, logits = toy.judge_features(fresh[0][:7])
    assert features.shape == (7, 64) and logits.shape == (7, 10)


def test_a_score_does_not_depend_on_the_other_images(fresh):
    together, _ = toy.judge_features(fresh[0][:9])
    alone, _ = toy.judge_features(fresh[0][:1])
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("images", [
    torch.zeros(4, 32, 32, 3), torch.zeros(4, 3, 64, 64), torch.zeros(3, 32, 32),
    torch.zeros(4, 3, 32, 32, dtype=torch.uint8)])
def test_images_of_a_wrong_shape_or_type_are_refused(images):
    with pytest.raises(ValueError, match=r"float images \[n, 3, 32, 32\]"):
        toy.judge_features(images)


def test_a_wrong_number_of_classes_is_refused():
    with pytest.raises(ValueError, match="a class for each"):
        toy.judge(torch.zeros(4, 3, 32, 32), torch.zeros(5, dtype=torch.int64))


def test_a_missing_judge_says_how_to_train_one(monkeypatch, tmp_path):
    monkeypatch.setattr(toy, "JUDGE_PATH", tmp_path / "judge.pt")
    with pytest.raises(FileNotFoundError, match="python toy.py judge"):
        toy.load_judge.__wrapped__()


def test_another_checkpoint_is_not_taken_for_a_judge(monkeypatch, tmp_path):
    monkeypatch.setattr(toy, "JUDGE_PATH", tmp_path / "judge.pt")
    common.save({"weights": {"a": torch.zeros(1)}}, toy.JUDGE_PATH)
    with pytest.raises(ValueError, match="does not hold a judge"):
        toy.load_judge.__wrapped__()


def test_the_judge_is_small():
    assert sum(p.numel() for p in toy.Judge().parameters()) <= 250_000
    assert toy.JUDGE_PATH.stat().st_size <= 600_000


def test_training_writes_a_judge_that_loads(monkeypatch, tmp_path):
    monkeypatch.setattr(toy, "JUDGE_PATH", tmp_path / "judge.pt")
    monkeypatch.setattr(toy, "REFERENCE_SIZE", 100)
    toy.train_judge(steps=2, batch=8, path=toy.JUDGE_PATH)
    _, mean, covariance = toy.load_judge.__wrapped__()
    assert mean.shape == (64,) and covariance.shape == (64, 64)
    assert mean.dtype == covariance.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------
# The Frechet distance


def covariance_of(seed, rank=8):
    samples = torch.randn(rank, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return samples.T @ samples


def test_the_frechet_distance_of_equal_gaussians_is_zero():
    mean, covariance = torch.ones(8), covariance_of(0)
    assert toy.frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_matches_the_closed_form_for_commuting_covariances():
    a, b = torch.arange(1.0, 9), torch.arange(9.0, 1, -1)
    rotation = torch.linalg.qr(covariance_of(0)).Q  # the same axes: roots can be taken one by one
    cov_a, cov_b = (rotation * a @ rotation.T), (rotation * b @ rotation.T)
    expected = 8 * 0.5**2 + (a.sqrt() - b.sqrt()).square().sum().item()
    distance = toy.frechet_distance(torch.zeros(8), cov_a, torch.full((8,), 0.5), cov_b)
    assert distance == pytest.approx(expected)


def test_the_frechet_distance_matches_the_eigenvalues_of_the_product():
    a, b = covariance_of(1), covariance_of(2)
    cross = torch.linalg.eigvals(a @ b).real.sqrt().sum()
    expected = (a.trace() + b.trace() - 2 * cross).item()
    assert toy.frechet_distance(torch.zeros(8), a, torch.zeros(8), b) == pytest.approx(expected)


def test_the_frechet_distance_is_symmetric_even_for_singular_covariances():
    a, b, mean = covariance_of(1, rank=3), covariance_of(2), torch.zeros(8)
    there, back = toy.frechet_distance(mean, a, mean, b), toy.frechet_distance(mean, b, mean, a)
    assert there == pytest.approx(back, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------
# The command line


def test_the_command_writes_a_sheet(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["toy.py", "--out", str(tmp_path / "sheet.png")])
    toy.main()
    assert Image.open(tmp_path / "sheet.png").width > 1000


@pytest.mark.parametrize("arguments", [["jugde"], ["judge", "--steps", "0"], ["--out", "/dev/null/toy.png"]])
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_two(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["toy.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        toy.main()
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
