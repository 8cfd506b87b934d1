"""Where a token is, in which order tokens are written, how many at once: before there is any network."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from helpers import GOLDEN, N, seeded

import randar
from randar import ORDERS, generation_order, step_sizes

GRIDS = [(4, 4), (8, 8), (3, 5), (6, 2), (1, 7)]


def cos_sin_of(angles):
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


# ------------------------------------------------------------------------------------------------
# Where a token is: 2D rotary angles


def test_the_product_of_two_rotated_vectors_depends_on_the_difference_of_positions_only():
    query, key = torch.randn(2, 16, generator=seeded(0))

    def product(a, b):
        cos_sin = cos_sin_of(randar.rotary_angles(*torch.tensor([a, b]).float().T, head_dim=16))
        return randar.rotate(query, cos_sin[0]) @ randar.rotate(key, cos_sin[1])

    assert torch.isclose(product((0, 0), (1, 3)), product((5, 2), (6, 5)), atol=1e-5)
    assert not torch.isclose(product((0, 0), (1, 3)), product((0, 0), (3, 1)), atol=1e-2)


def test_the_first_half_of_the_pairs_turns_with_the_row_and_the_second_with_the_column():
    angles = randar.grid_angles((3, 5), head_dim=16).view(3, 5, 8)
    frequencies = 10000.0 ** (-torch.arange(4) * 2 / 8)
    for row, column in itertools.product(range(3), range(5)):
        assert torch.allclose(angles[row, column, :4], row * frequencies)
        assert torch.allclose(angles[row, column, 4:], column * frequencies)


def test_rotation_is_multiplication_by_a_complex_number():
    x, angles = torch.randn(7, 16, generator=seeded(0)), torch.rand(7, 8, generator=seeded(1)) * 6
    turned = torch.view_as_complex(x.view(7, 8, 2)) * torch.exp(1j * angles)
    rotated = randar.rotate(x, cos_sin_of(angles))
    assert torch.allclose(rotated, torch.view_as_real(turned).flatten(1), atol=1e-6)


def test_fractions_of_positions_lie_between_the_positions():
    half = randar.rotary_angles(torch.tensor([0.5]), torch.tensor([1.5]), head_dim=8)
    around = randar.grid_angles((2, 3), head_dim=8)
    assert torch.allclose(half[0], (around[1] + around[5]) / 2)  # (0, 1) and (1, 2)


@pytest.mark.parametrize("head_dim", range(4, 260, 4))
def test_every_multiple_of_four_has_half_as_many_angles(head_dim):
    angles = randar.rotary_angles(torch.ones(3), torch.zeros(3), head_dim)
    assert angles.shape == (3, head_dim // 2)
    quarter = head_dim // 4
    expected = [10000.0 ** (-2 * k / (head_dim / 2)) for k in range(quarter)]
    assert torch.allclose(angles[0, :quarter], torch.tensor(expected)) and not angles[:, quarter:].any()


def test_a_head_that_cannot_be_divided_into_pairs_of_rows_and_columns_is_an_error():
    with pytest.raises(ValueError, match="multiple of 4"):
        randar.rotary_angles(torch.zeros(1), torch.zeros(1), head_dim=6)


def test_position_instruction_tokens_differ_between_positions(model):
    cos_sin = cos_sin_of(randar.grid_angles((4, 4), model.head_dim))[None]
    instructions = model.position_instruction_tokens(cos_sin, torch.arange(N)[None])[0]  # [N, d]
    distances = torch.cdist(instructions, instructions) + torch.eye(N) * 9
    assert distances.min() > 0.01
    assert torch.allclose(instructions.norm(dim=1), model.pos_instruct_embeddings.norm())  # turned (Eq. 5)
    assert torch.allclose(instructions[0], model.pos_instruct_embeddings[0])  # not even that at (0, 0)


def test_the_class_token_is_scored_zero_by_every_token(model, batch, attention_calls):
    model(*batch)
    for query, key, _, _ in attention_calls:
        assert (query[:, :, 0] == 0).all() and (key[:, :, 0] == 0).all()
        assert ((query @ key.transpose(2, 3))[..., 0] == 0).all()
    assert len(attention_calls) == model.config.n_layer


# ------------------------------------------------------------------------------------------------
# In which order


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ORDERS)
def test_every_order_is_a_permutation(name, grid):
    order = generation_order(name, 3, grid, seeded(0))
    assert order.dtype == torch.int64 and order.shape == (3, math.prod(grid))
    assert (order.sort(dim=1).values == torch.arange(math.prod(grid))).all()


@pytest.mark.parametrize("name, grid, expected", [
    ("raster", (2, 3), [0, 1, 2, 3, 4, 5]),
    ("alternate", (3, 3), [0, 1, 2, 5, 4, 3, 6, 7, 8]),
    ("subsample", (4, 4), [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15]),
    ("z_curve", (4, 4), [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]),
    ("z_curve", (2, 3), [0, 1, 3, 4, 2, 5]),
    ("spiral_in", (3, 4), [0, 1, 2, 3, 7, 11, 10, 9, 8, 4, 5, 6]),
    ("spiral_in", (3, 3), [0, 1, 2, 5, 8, 7, 6, 3, 4]),
    ("spiral_in", (3, 1), [0, 1, 2]),
])
def test_orders_without_randomness_are_exactly_these(name, grid, expected):
    assert generation_order(name, 2, grid).tolist() == [expected, expected]


@pytest.mark.parametrize("grid", GRIDS)
def test_spiral_out_is_spiral_in_backwards(grid):
    assert (generation_order("spiral_out", 1, grid) == generation_order("spiral_in", 1, grid).flip(1)).all()


@pytest.mark.parametrize("name, first", [
    ("hierarchical", {0, 2, 8, 10}),  # even rows and even columns
    ("center_first", {5, 6, 9, 10}),
    ("border_first", set(range(16)) - {5, 6, 9, 10}),
])
def test_partly_random_orders_finish_their_first_part_first(name, first):
    for order in generation_order(name, 20, (4, 4), seeded(0)).tolist():
        assert set(order[: len(first)]) == first


@pytest.mark.parametrize("name", ["random", "hierarchical", "center_first", "border_first"])
def test_orders_with_randomness_differ_between_images_and_repeat_with_the_seed(name):
    order = generation_order(name, 4, (4, 4), seeded(5))
    assert len({tuple(row) for row in order.tolist()}) == 4
    assert (generation_order(name, 4, (4, 4), seeded(5)) == order).all()
    assert (generation_order(name, 4, (4, 4), seeded(6)) != order).any()


def test_a_random_order_starts_everywhere_equally_often():
    first = generation_order("random", 8000, (4, 4), seeded(0))[:, 0]
    assert abs(first.bincount(minlength=16) - 500).max() < 90  # 4 standard deviations


def test_the_papers_spelling_of_an_order_is_understood():
    assert (generation_order("spiral-in", 1, (4, 4)) == generation_order("spiral_in", 1, (4, 4))).all()


def test_an_unknown_order_is_an_error_that_lists_the_choices():
    with pytest.raises(ValueError) as error:
        generation_order("zigzag", 1, (4, 4))
    assert "zigzag" in str(error.value) and all(name in str(error.value) for name in ORDERS)


# ------------------------------------------------------------------------------------------------
# How many at once


@pytest.mark.parametrize("number", [0, 1, 2, 3, 15, 16, 64, 100, 256])
def test_steps_sum_to_the_number_of_tokens_and_none_is_empty(number):
    for steps in range(1, number + 3):
        sizes = step_sizes(number, steps)
        assert sum(sizes) == number and all(size >= 1 for size in sizes) and len(sizes) == min(steps, number)


def test_minus_one_and_more_steps_than_tokens_are_one_token_a_step():
    assert step_sizes(7, -1) == step_sizes(7, 7) == step_sizes(7, 100) == [1] * 7


def test_the_schedule_is_a_cosine_few_tokens_in_the_beginning_and_many_in_the_end():
    done = np.cumsum(step_sizes(256, 64))
    cosine = (1 - np.cos(np.pi / 2 * np.arange(1, 65) / 64)) * 256
    assert (abs(done - cosine)[16:] <= 1).all()


def test_the_default_follows_the_number_of_tokens():
    assert [randar.default_steps(n) for n in (256, 64, 16, 1)] == [88, 22, 6, 1]


def test_the_first_token_is_alone_unless_there_is_one_step_only():
    assert step_sizes(16, 4)[0] == step_sizes(256, 2)[0] == 1  # where the cosine says 2 and 75
    assert step_sizes(256, 1) == [256]


@pytest.mark.parametrize("steps", [0, -2])
def test_no_steps_are_an_error(steps):
    with pytest.raises(ValueError, match=f"steps must be at least 1.*{steps}"):
        step_sizes(16, steps)


def test_steps_are_those_of_the_released_code():
    for key, expected in json.loads((GOLDEN / "step_sizes.json").read_text()).items():
        assert step_sizes(*map(int, key.split(","))) == expected, key
