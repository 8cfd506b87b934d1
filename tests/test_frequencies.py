"""How many frequencies can be extrapolated: studies/frequencies.py."""

import numpy as np
import pytest
import torch
from helpers import small_model

from studies import frequencies
from studies.frequencies import MODELS, turns_across
from support import toy
from support.pictures import from_uint8


def counts(side, head_dim, base, least):
    return int((turns_across(side, head_dim, base) >= least).sum())


def test_the_three_models_differ_in_how_many_frequencies_make_a_whole_turn_or_half_of_one():
    dims = {name: (128 // heads, base) for name, (base, heads) in MODELS.items()}
    assert {name: counts(8, *dim, 1.0) for name, dim in dims.items()} == dict(paper=1, base=1, heads=1)
    assert {name: counts(8, *dim, 0.5) for name, dim in dims.items()} == dict(paper=1, base=5, heads=2)
    assert counts(16, 64, 10_000.0, 1.0) == 2  # the released models, and the fine one


@pytest.mark.parametrize("shift, share", [(0, 1.0), (1, 0.0)])
def test_of_fresh_pictures_of_twice_the_size_the_judge_names_all(monkeypatch, shift, share):
    def draw(model, tokenizer, classes, **_):
        labels = (classes + shift) % 10
        pixels = np.stack([toy.draw(label, np.random.default_rng(0), side=64)[0] for label in labels])
        return from_uint8(pixels), None

    monkeypatch.setattr(frequencies, "extrapolate", draw)
    assert abs(frequencies.accuracy(small_model(), None, 1) - share) < 0.03


def test_turns_are_angles_by_a_full_circle():
    assert torch.allclose(turns_across(9, 32)[:2] * 2 * torch.pi, torch.tensor([8.0, 8 * 10_000 ** -(1 / 8)]))
