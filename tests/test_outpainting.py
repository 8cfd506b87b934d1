"""What grew beside a picture is judged: studies/outpainting.py."""

import numpy as np
import pytest

from studies.outpainting import is_whole, measure, objects_in
from support import toy


@pytest.fixture(scope="module")
def pictures():
    """Objects in the middle, so that no border cuts them: uint8 [40, 64, 64, 3]."""
    return np.stack([toy.draw(i % 10, np.random.default_rng(i), "fine", x=16, y=16, size=0.8)[0]
                     for i in range(40)])


def test_objects_are_found_by_their_columns():
    unlike = np.zeros((8, 20), bool)
    unlike[2:6, 3:7] = unlike[1:5, 10:12] = True
    unlike[0, 15] = True  # a single pixel is none
    assert objects_in(unlike).tolist() == [[3, 7], [10, 12]]


def test_an_object_that_ends_in_a_straight_edge_is_not_whole():
    disc = np.hypot(*np.mgrid[-20:21, -20:21]) < 20  # [41, 41]
    assert is_whole(disc, 1, 40, side=41)
    assert not is_whole(disc, 1, 21, side=41)  # its left half
    assert not is_whole(np.hstack([disc] * 3), 1, 122, side=41)  # too wide for one


def test_fresh_pictures_are_continued_whole_and_recognised(pictures):
    figures = measure(pictures, None, side=64, new=0)
    assert figures["background"] > 0.99 and figures["objects"] == 1
    assert figures["whole"] > 0.9 and figures["recognised"] > 0.8


def test_what_is_cut_in_two_or_of_another_class_is_noticed(pictures):
    halves = np.concatenate([pictures[:, :, 32:], pictures[:, :, :32]], axis=2)
    wide = np.concatenate([pictures, pictures, halves], axis=2)  # a new whole one, one cut in two
    classes = np.arange(40) % 10
    figures = measure(np.concatenate([pictures, pictures], axis=2), classes, side=64, new=64)
    assert figures["whole"] > 0.9
    other = measure(np.concatenate([pictures, pictures], axis=2), (classes + 1) % 10, 64, new=64)
    assert other["recognised"] < 0.1 and figures["recognised"] > 0.8
    assert measure(wide, classes, 64, new=64)["whole"] < 0.9
