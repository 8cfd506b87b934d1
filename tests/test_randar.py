"""RandAR as a specification: each test is one sentence, the mathematics before the reference values."""

import inspect
import itertools
import json
import math
import pathlib
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import fill
from torch.utils._python_dispatch import TorchDispatchMode

import randar
from randar import ORDERS, SIZES, Config, RandAR, generation_order, step_sizes
from randar import load_randar, sample, save_randar

GOLDEN = pathlib.Path(__file__).parent / "golden"
GRIDS = [(4, 4), (8, 8), (3, 5), (6, 2), (1, 7)]
N, V, C = 16, 32, 5  # tokens, codes and classes of the small model


def small_model(**changes):
    """Two layers with weights that are far from zero, so that everything has an influence; in eval mode."""
    settings = dict(grid=(4, 4), vocab_size=V, num_classes=C, dim=32, n_layer=2, n_head=2) | changes
    model = RandAR(Config(**settings))
    model.load_state_dict(fill.state_for({name: p.shape for name, p in model.named_parameters()}))
    return model.eval()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model():
    return small_model()


@pytest.fixture
def batch():
    """tokens [3, N], classes [3], order [3, N]."""
    tokens = torch.randint(V, (3, N), generator=seeded(0))
    return tokens, torch.tensor([0, 3, 4]), generation_order("random", 3, (4, 4), seeded(1))


@pytest.fixture
def attention_calls(monkeypatch):
    """A list to which every call of attention adds (query, key, value, keyword arguments)."""
    calls, attention = [], F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        calls.append((q, k, v, options))
        return attention(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls


def inputs_of(module):
    """A list to which every call of the module adds its first input."""
    seen = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


# ------------------------------------------------------------------------------------------------------------
# Where a token is: 2D rotary angles


def test_the_product_of_two_rotated_vectors_depends_on_the_difference_of_positions_only():
    query, key = torch.randn(2, 16, generator=seeded(0))

    def product(a, b):
        rotation = randar.rotation_of(randar.rotary_angles(*torch.tensor([a, b]).float().T, head_dim=16))
        return randar.rotate(query, rotation[0]) @ randar.rotate(key, rotation[1])

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
    rotated = randar.rotate(x, randar.rotation_of(angles))
    assert torch.allclose(rotated, torch.view_as_real(turned).flatten(1), atol=1e-6)


def test_fractions_of_positions_lie_between_the_positions():
    half = randar.rotary_angles(torch.tensor([0.5]), torch.tensor([1.5]), head_dim=8)
    around = randar.grid_angles((2, 3), head_dim=8)
    assert torch.allclose(half[0], (around[1] + around[5]) / 2)  # (0, 1) and (1, 2)


def test_a_head_that_cannot_be_divided_into_pairs_of_rows_and_columns_is_an_error():
    with pytest.raises(ValueError, match="multiple of 4"):
        randar.rotary_angles(torch.zeros(1), torch.zeros(1), head_dim=6)


def test_position_instruction_tokens_differ_between_positions(model):
    rotation = randar.rotation_of(randar.grid_angles((4, 4), model.head_dim))[None]
    instructions = model.position_instruction_tokens(rotation)[0]  # [N, d]
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


# ------------------------------------------------------------------------------------------------------------
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


# ------------------------------------------------------------------------------------------------------------
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


# ------------------------------------------------------------------------------------------------------------
# The decoder


@pytest.mark.parametrize("size, millions", [("L", 343), ("XL", 775), ("XXL", 1400)])
def test_sizes_count_the_parameters_of_table_a(size, millions):
    with torch.device("meta"):
        model = RandAR(Config(**SIZES[size]))
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(count, -2 if size == "XXL" else 0) == millions


def test_names_and_shapes_are_those_of_the_released_weights():
    with torch.device("meta"):
        state = RandAR(Config(**SIZES["L"])).state_dict()
    shapes = json.loads((GOLDEN / "state_dict_shapes.json").read_text())["randar_L"]
    assert {name: list(tensor.shape) for name, tensor in state.items()} == shapes


@pytest.mark.parametrize("turn", [0, 6, 14])
def test_a_token_has_an_influence_on_later_turns_only(model, batch, turn):
    tokens, classes, order = batch
    changed = tokens.clone()
    here = order[:, turn : turn + 1]  # the position decoded at this turn
    changed.scatter_(1, here, (tokens.gather(1, here) + 1) % V)
    difference = abs(model(changed, classes, order) - model(tokens, classes, order)).amax(-1)  # [b, N] turns
    assert (difference[:, : turn + 1] == 0).all() and (difference[:, turn + 1 :] > 1e-6).all()


def test_the_position_of_the_next_token_changes_its_prediction(model, batch):
    tokens, classes, order = batch
    swapped = order.clone()
    swapped[:, [7, 8]] = order[:, [8, 7]]
    difference = abs(model(tokens, classes, swapped) - model(tokens, classes, order)).amax(-1)
    assert (difference[:, :7] == 0).all() and (difference[:, 7] > 1e-4).all()


def test_the_class_changes_every_prediction(model, batch):
    tokens, classes, order = batch
    difference = model(tokens, (classes + 1) % C, order) - model(tokens, classes, order)
    assert (abs(difference).amax(-1) > 1e-6).all()


# ------------------------------------------------------------------------------------------------------------
# Training


def test_the_head_runs_on_half_of_the_positions(model, batch):
    in_layers, in_head = inputs_of(model.layers[0]), inputs_of(model.output)
    model.train().loss(*batch)
    assert in_layers[0].shape[1] == 2 * N and in_head[0].shape[1] == N


def test_no_mask_is_made_in_training(model, batch, attention_calls):
    model.train().loss(*batch)
    assert all(options == {"is_causal": True} for _, _, _, options in attention_calls)


def test_the_loss_is_the_cross_entropy_of_the_tokens_in_the_order_given(model, batch):
    tokens, classes, order = batch
    log_p = model(tokens, classes, order).log_softmax(-1)
    by_hand = [-log_p[i, turn, tokens[i, order[i, turn]]] for i in range(3) for turn in range(N)]
    assert torch.isclose(model.loss(tokens, classes, order), sum(by_hand) / len(by_hand), atol=1e-6)


def test_an_untrained_model_predicts_every_token_equally(batch):
    fresh = RandAR(Config(grid=(4, 4), vocab_size=V, num_classes=C, dim=32, n_layer=1, n_head=2))
    assert math.isclose(fresh.loss(*batch).item(), math.log(V), rel_tol=1e-6)


def test_without_an_order_each_image_gets_a_fresh_random_one(model, batch):
    tokens, classes, _ = batch
    orders = []
    model.register_forward_pre_hook(lambda _, inputs: orders.append(inputs[2]))
    torch.manual_seed(0)
    model.loss(tokens, classes), model.loss(tokens, classes)
    rows = torch.cat(orders)
    assert (rows.sort(dim=1).values == torch.arange(N)).all()
    assert len({tuple(row) for row in rows.tolist()}) == 6


def test_classes_are_hidden_in_training_only(batch):
    tokens, classes, order = batch
    model = small_model(dropout=0.0, class_dropout=1.0)
    given, none = model.loss(tokens, classes, order), model.loss(tokens, torch.full((3,), C), order)
    assert given != none and model.train().loss(tokens, classes, order) == none


def test_one_class_in_ten_is_hidden():
    model, seen = small_model().train(), []
    model.cls_embedding.embedding_table.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    model.loss(torch.zeros(1000, N, dtype=torch.int64), torch.zeros(1000, dtype=torch.int64))
    assert abs((seen[0] == C).sum() - 100) < 40 and (seen[0] == 0).sum() + (seen[0] == C).sum() == 1000


@pytest.mark.parametrize("training", [True, False])
def test_tokens_attention_and_feed_forward_have_dropout_in_training_only(model, batch, monkeypatch, training):
    calls = []
    monkeypatch.setattr(F, "dropout", lambda x, p, active: calls.append((p, active)) or x)
    model.train(training).loss(*batch)
    assert calls == [(0.1, training)] * (1 + 2 * model.config.n_layer)


def test_gradients_reach_every_parameter(model, batch):
    model.loss(*batch).backward()
    assert all(p.grad.norm() > 0 for p in model.parameters())


@pytest.mark.parametrize("changed, shape", [("tokens", (3, 15)), ("tokens", (2, 16)), ("tokens", (16,)),
                                            ("classes", (2,)), ("order", (3, 15)), ("order", (1, 16))])
def test_shapes_that_do_not_fit_are_an_error_in_training(model, batch, changed, shape):
    arguments = list(batch)
    arguments[["tokens", "classes", "order"].index(changed)] = torch.zeros(shape, dtype=torch.int64)
    for function in (model, model.loss):
        with pytest.raises(ValueError, match=r"expected tokens \[b, 16\].*(4, 4).*got the shapes"):
            function(*arguments)


# ------------------------------------------------------------------------------------------------------------
# Decoding in parallel with a cache, against the plain way


def plain_logits(model, classes, order, tokens, m, kept=None):
    """The logits [b, m, V] of the m turns after those of `tokens` [b, t], in the order: Eq. 3, with no cache.

    kept: [b, t] bool, the tokens that are not replaced by zeros (App. F).
    """
    t = tokens.shape[1]
    rotation = model.sequence_rotation(order)  # of [class, P_1, x_1, ..., P_n, x_n]
    instructions = model.position_instruction_tokens(rotation[:, 1::2])
    embedded = model.tok_embeddings(tokens) * (1 if kept is None else kept[..., None])
    sequence, rotations = [model.cls_embedding.embedding_table(classes)], [rotation[:, 0]]
    for i in range(t):
        sequence += [instructions[:, i], embedded[:, i]]
        rotations += [rotation[:, 1 + 2 * i], rotation[:, 2 + 2 * i]]
    for i in range(t, t + m):  # Q_1 .. Q_m: the next position instruction tokens, without their image tokens
        sequence += [instructions[:, i]]
        rotations += [rotation[:, 1 + 2 * i]]
    x = model.hidden_states(torch.stack(sequence, dim=1), torch.stack(rotations, dim=1))
    return model.output(model.norm(x[:, -m:]))


@torch.no_grad()
def plain_steps(model, classes, order, known_tokens, steps, cfg):
    """For steps that `decode` made: the logits that each should have had, under classifier-free guidance.

    order: [b, N], positions of known_tokens [b, k] first.
    """
    null, tokens = torch.full_like(classes, C), known_tokens
    for step in steps:
        m = step.tokens.shape[1]
        with_class = plain_logits(model, classes, order, tokens, m)
        without = plain_logits(model, null, order, tokens, m)
        weight = cfg[0] + (cfg[1] - cfg[0]) * tokens.shape[1] / order.shape[1]  # linear in the share decoded
        yield without + weight * (with_class - without)
        tokens = torch.cat([tokens, step.tokens], dim=1)


@pytest.mark.parametrize("cfg", [(1, 1), (1.0, 4.0), (3.0, 3.0)])
@pytest.mark.parametrize("steps", [1, 4, 7, -1])
def test_cached_parallel_decoding_is_plain_decoding(model, batch, steps, cfg):
    _, classes, order = batch
    made = list(model.decode(classes, order, steps, cfg, generator=seeded(0)))
    assert [step.tokens.shape[1] for step in made] == step_sizes(N, steps)
    assert (torch.cat([step.positions for step in made], dim=1) == order).all()
    plain = plain_steps(model, classes, order, order[:, :0], made, cfg)
    for step, expected in zip(made, plain, strict=True):
        assert torch.allclose(step.logits, expected, atol=1e-4)


@pytest.mark.parametrize("steps", [3, -1])
def test_cached_decoding_after_known_tokens_is_plain_decoding(model, batch, steps):
    tokens, classes, order = batch
    known = order[:, :5], tokens.gather(1, order[:, :5])
    made = list(model.decode(classes, order[:, 5:], steps, (1.0, 4.0), generator=seeded(0), known=known))
    plain = plain_steps(model, classes, order, known[1], made, (1.0, 4.0))
    for step, expected in zip(made, plain, strict=True):
        assert torch.allclose(step.logits, expected, atol=1e-4)


def test_decoding_one_token_a_step_has_the_logits_of_training(model, batch):
    _, classes, order = batch
    made = list(model.decode(classes, order, steps=-1, cfg=(1, 1), generator=seeded(0)))
    tokens = torch.cat([step.tokens for step in made], dim=1)  # in the order
    tokens = torch.empty_like(tokens).scatter_(1, order, tokens)  # raster
    logits = torch.cat([step.logits for step in made], dim=1)
    assert torch.allclose(model(tokens, classes, order), logits, atol=1e-4)


def test_a_step_computes_the_head_on_its_queries_and_the_layers_on_new_tokens_only(model, batch):
    _, classes, order = batch
    in_layers, in_head = inputs_of(model.layers[0]), inputs_of(model.output)
    sizes = step_sizes(N, 5)
    list(model.decode(classes, order, 5, cfg=(1, 1)))
    assert [x.shape[1] for x in in_head] == sizes
    pending = [1] + [2 * m - 1 for m in sizes[:-1]]  # the class; then x_1, P_2, x_2, ..., P_m, x_m
    assert [x.shape[1] for x in in_layers] == [p + m for p, m in zip(pending, sizes)]


@pytest.mark.parametrize("name", ORDERS)
def test_any_order_gives_a_complete_image(model, name):
    tokens = model.generate(torch.arange(C), name, steps=6, generator=seeded(0))
    assert tokens.shape == (C, N) and tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < V


def test_generate_puts_what_decode_yields_where_it_belongs(model, batch):
    _, classes, order = batch
    image = model.generate(classes, order, steps=6, generator=seeded(3))
    for step in model.decode(classes, order, steps=6, generator=seeded(3)):
        assert (image.gather(1, step.positions) == step.tokens).all()


def test_decoding_keeps_no_graph_for_gradients(model, batch):
    _, classes, order = batch
    assert not any(step.logits.requires_grad for step in model.decode(classes, order, steps=3, scg=2.0))


def test_a_model_in_bfloat16_decodes_and_its_logits_are_float32(model, batch):
    _, classes, order = batch
    exact = next(model.decode(classes, order, steps=4, cfg=(1, 1))).logits
    steps = list(model.bfloat16().decode(classes, order, steps=4, cfg=(1, 1), generator=seeded(0)))
    assert steps[-1].logits.dtype == torch.float32
    assert abs(steps[0].logits - exact).max() < 0.05 * abs(exact).max()


def test_the_same_seed_gives_the_same_images(model):
    first, again, other = (model.generate(torch.arange(C), steps=6, generator=seeded(s)) for s in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


class NeverWait(TorchDispatchMode):
    """On a GPU these operations make the host wait until the device has computed a value."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "repeat_interleave")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_") else []
        if name in self.waits or any(i is not None and i.dtype == torch.bool for i in indices):
            raise AssertionError(f"the host waits in {name}")
        return function(*args, **(kwargs or {}))


def test_the_loop_never_waits_for_the_device(model, batch, monkeypatch):
    tokens, classes, order = batch
    known = order[:, :3], tokens.gather(1, order[:, :3])
    loop = model.decode(classes, order[:, 3:], 4, scg=2.0, temperature=0.9, top_k=9, top_p=0.8, known=known)
    next(loop)

    def wait(*_):
        raise AssertionError("the host waits")

    with monkeypatch.context() as patch, NeverWait():
        for name in ("tolist", "numpy", "cpu", "item"):  # on a CPU not all pass the dispatcher
            patch.setattr(torch.Tensor, name, wait)
        with pytest.raises(AssertionError):  # the guard works
            bool(tokens.sum() > 0)
        assert len(list(loop)) == 3


# ------------------------------------------------------------------------------------------------------------
# Known tokens and tables of angles: what the applications are made of


def test_known_tokens_survive(model, batch):
    tokens, classes, order = batch
    known = order[:, 10:], tokens.gather(1, order[:, 10:])
    image = model.generate(classes, order[:, :10], steps=4, known=known, generator=seeded(0))
    assert (image.gather(1, known[0]) == known[1]).all() and image.min() >= 0


def test_known_tokens_are_context(model, batch):
    tokens, classes, order = batch
    known = tokens.gather(1, order[:, :1])
    for cfg in ((1, 1), (1.0, 4.0)):
        one, other = (next(model.decode(classes, order[:, 1:], 4, cfg, known=(order[:, :1], known + change)))
                      for change in (0, 1 - 2 * (known > V // 2).long()))
        assert (abs(one.logits - other.logits).amax(-1) > 1e-4).all()


def test_known_tokens_weigh_like_tokens_that_were_decoded(model, batch):
    tokens, classes, order = batch
    known = order[:, :6], tokens.gather(1, order[:, :6])
    step = next(model.decode(classes, order[:, 6:], steps=-1, cfg=(1, 1), known=known))
    assert torch.allclose(step.logits[:, 0], model(tokens, classes, order)[:, 6], atol=1e-4)


def test_nothing_known_is_plain_generation(model, batch):
    _, classes, order = batch
    empty = order[:, :0], order[:, :0]
    with_empty = model.generate(classes, order, steps=5, scg=1.5, known=empty, generator=seeded(4))
    assert (with_empty == model.generate(classes, order, steps=5, scg=1.5, generator=seeded(4))).all()


def test_positions_neither_known_nor_decoded_are_minus_one(model, batch):
    tokens, classes, order = batch
    known = order[:, :2], tokens[:, :2]
    image = model.generate(classes, order[:, 2:6], steps=2, known=known, generator=seeded(0))
    assert (image.gather(1, order[:, :6]) >= 0).all() and (image.gather(1, order[:, 6:]) == -1).all()


def test_nothing_to_decode_leaves_the_known_tokens(model, batch):
    tokens, classes, order = batch
    known = order, tokens.gather(1, order)
    assert (model.generate(classes, order[:, :0], known=known) == tokens).all()


def test_other_angles_give_images_on_another_grid(model):
    grid, classes = (3, 5), torch.tensor([1, 2])
    angles = randar.grid_angles(grid, model.head_dim)
    order = generation_order("random", 2, grid, seeded(0))
    known = order[:, :4], torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    image = model.generate(classes, order[:, 4:], steps=4, known=known, angles=angles, generator=seeded(1))
    assert image.shape == (2, 15) and image.min() >= 0 and (image.gather(1, known[0]) == known[1]).all()


def test_the_models_own_angles_are_the_default(model, batch):
    _, classes, order = batch
    angles = randar.grid_angles((4, 4), model.head_dim)
    own = model.generate(classes, order, 4, angles=angles, generator=seeded(0))
    assert (own == model.generate(classes, order, 4, generator=seeded(0))).all()


def test_only_differences_of_positions_count_except_for_the_instruction_itself(model, batch):
    """Moving a whole image changes nothing in attention, only the values of the P_i (Eq. 5)."""
    _, classes, order = batch
    shifted = randar.grid_angles((4, 4), model.head_dim) + torch.rand(8, generator=seeded(0))
    moved, own = (next(model.decode(classes, order, 1, (1, 1), angles=a)).logits for a in (shifted, None))
    assert not torch.allclose(moved, own, atol=1e-4)
    model.pos_instruct_embeddings.data.zero_()  # without their values
    moved, own = (next(model.decode(classes, order, 1, (1, 1), angles=a)).logits for a in (shifted, None))
    assert torch.allclose(moved, own, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------
# Guidance


@pytest.mark.parametrize("cfg, scg, class_given, streams", [
    ((1, 1), 1, True, 1), ((1.0, 1.0), 1.0, True, 1), ([1.0, 1.0], 1, True, 1), ((1, 4), 1, True, 2),
    ((3, 3), 1.0, True, 2), ((1, 4), 1, False, 1), ((1, 4), 1.5, True, 3), ((1, 4), 1.5, False, 2),
])
def test_guidance_runs_no_more_streams_than_it_needs(model, batch, cfg, scg, class_given, streams):
    _, classes, order = batch
    seen = inputs_of(model.layers[0])
    model.generate(classes if class_given else torch.full((3,), C), order, 3, cfg, scg, generator=seeded(0))
    assert {x.shape[0] for x in seen} == {3 * streams}


def test_the_null_class_is_never_guided(model, batch):
    _, classes, order = batch
    mixed = torch.tensor([C, 2, C])
    guided = model.generate(mixed, order, 5, cfg=(4.0, 4.0), top_k=1)
    plain = model.generate(mixed, order, 5, cfg=(1, 1), top_k=1)
    assert (guided[[0, 2]] == plain[[0, 2]]).all() and (guided[1] != plain[1]).any()


def test_without_spatial_guidance_eq_b_is_classifier_free_guidance_exactly(model, batch):
    _, classes, order = batch
    null = torch.full_like(classes, C)
    with_class, without = (next(model.decode(c, order, 1, (1, 1))).logits for c in (classes, null))
    for scg in (1, 1.0):
        step = next(model.decode(classes, order, 1, (3.0, 3.0), scg))
        assert torch.allclose(step.logits, without + 3 * (with_class - without), atol=1e-4)
    z = dict(zip((randar.FULL_CLASS, randar.FULL_NULL, randar.DROP_NULL), torch.randn(3, 2, 4, V)))
    plain = randar.guided([randar.FULL_CLASS, randar.FULL_NULL], list(z.values())[:2], 3.0, 1.0)
    assert torch.allclose(randar.guided(list(z), list(z.values()), 3.0, 1.0), plain, atol=1e-5)


@pytest.mark.parametrize("known", [0, 6])
@pytest.mark.parametrize("class_given", [True, False])
def test_spatial_guidance_is_eq_b_and_without_a_class_eq_a(model, batch, monkeypatch, class_given, known):
    tokens, classes, order = batch
    null = torch.full_like(classes, C)
    classes = classes if class_given else null
    prefix = order[:, :known], tokens.gather(1, order[:, :known])
    drawn, rand = [], torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **options: drawn.append(rand(*a, **options)) or drawn[-1])
    loop = model.decode(classes, order[:, known:], 5, (1.0, 4.0), 1.7, known=prefix, generator=seeded(0))
    made = list(loop)
    kept = torch.cat(drawn, dim=1) >= 0.25  # decided once, when a token enters the cache
    done, dropped_one = prefix[1], False
    for step in made:
        t, m = done.shape[1], step.tokens.shape[1]
        dropped_one |= bool((~kept[:, :t]).any())
        with torch.no_grad():
            drop_null = plain_logits(model, null, order, done, m, kept[:, :t])
            full_null = plain_logits(model, null, order, done, m)
            full_class = plain_logits(model, classes, order, done, m)
        expected = drop_null + 1.7 * (full_null - drop_null) + (1 + 3 * t / N) * (full_class - full_null)
        assert torch.allclose(step.logits, expected, atol=1e-4)
        done = torch.cat([done, step.tokens], dim=1)
    assert dropped_one


# ------------------------------------------------------------------------------------------------------------
# Sampling

FOUR = torch.tensor([0.3, 0.1, 0.4, 0.2])  # probabilities


def drawn(number=20000, logits=FOUR.log(), **options):
    """How often each token was drawn, int64 [V]."""
    tokens = sample(logits.expand(number, -1), generator=seeded(0), **options)
    return tokens.bincount(minlength=logits.numel())


def chi_square(counts, probabilities):
    expected = counts.sum() * probabilities
    return ((counts - expected) ** 2 / expected).sum()


def test_tokens_are_drawn_as_often_as_the_softmax_says():
    logits = torch.randn(16, generator=seeded(3)) * 2
    assert chi_square(drawn(50000, logits), logits.softmax(0)) < 38  # fair draws are, 999 times in 1000


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature):
    expected = FOUR ** (1 / temperature)
    assert chi_square(drawn(temperature=temperature), expected / expected.sum()) < 16


def test_top_k_1_takes_the_most_likely_token():
    logits = torch.randn(5, 7, V, generator=seeded(0))
    assert (sample(logits, top_k=1) == logits.argmax(-1)).all()


@pytest.mark.parametrize("top_k, support", [(1, [2]), (2, [0, 2]), (3, [0, 2, 3]), (4, [0, 1, 2, 3]),
                                            (9, [0, 1, 2, 3]), (0, [0, 1, 2, 3])])
def test_top_k_draws_from_the_k_best(top_k, support):
    assert drawn(top_k=top_k).nonzero().flatten().tolist() == support


@pytest.mark.parametrize("top_k", [1, 3])
def test_top_k_draws_from_no_more_than_k_where_all_are_equal(top_k):
    assert (drawn(logits=torch.zeros(8), top_k=top_k) > 0).sum() == top_k


@pytest.mark.parametrize("top_p, support", [(1e-6, [2]), (0.39, [2]), (0.41, [0, 2]), (0.69, [0, 2]),
                                            (0.71, [0, 2, 3]), (0.91, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])])
def test_top_p_draws_from_the_fewest_tokens_that_have_it_together(top_p, support):
    assert drawn(top_p=top_p).nonzero().flatten().tolist() == support


def test_top_k_and_top_p_keep_the_proportions_of_what_is_left():
    counts = drawn(top_k=3, top_p=0.7)
    assert counts[[1, 3]].sum() == 0  # of 4/9, 3/9 and 2/9 the first two are 70%
    assert chi_square(counts[[0, 2]], torch.tensor([3, 4]) / 7) < 11


# ------------------------------------------------------------------------------------------------------------
# The border of decoding: a mistake is one line, and comes before the first step


ORDER = generation_order("raster", 2, (4, 4))


@pytest.mark.parametrize("change, problem", [
    (dict(steps=0), "steps must be at least 1"),
    (dict(steps=-3), "steps must be at least 1"),
    (dict(cfg=(1.0,)), "cfg must be two numbers"),
    (dict(cfg=(1.0, 2.0, 3.0)), "cfg must be two numbers"),
    (dict(temperature=0.0), "temperature must be above 0, not 0.0: top_k=1"),
    (dict(temperature=-1.0), "temperature must be above 0"),
    (dict(temperature=float("nan")), "temperature must be above 0"),
    (dict(top_k=-1), "top_k must be 0"),
    (dict(top_p=0.0), "top_p must be above 0"),
    (dict(top_p=1.1), "top_p must be above 0"),
    (dict(classes=torch.tensor([0, C + 1])), "classes must be from 0 to 5, not 0 to 6"),
    (dict(classes=torch.tensor([-1, 0])), "classes must be from 0 to 5, not -1 to 0"),
    (dict(classes=torch.tensor([0, 1, 2])), r"expected classes \[b\].*\[3\], \[2, 16\]"),
    (dict(order=ORDER[:1]), r"expected classes \[b\].*\[2\], \[1, 16\]"),
    (dict(order=ORDER[0]), r"expected classes \[b\], order \[b, n\]"),
    (dict(order=ORDER + 1), "positions must be from 0 to 15, not 1 to 16"),
    (dict(order=ORDER - 1), "positions must be from 0 to 15, not -1 to 14"),
    (dict(order=ORDER, angles=torch.zeros(12, 8)), "positions must be from 0 to 11, not 0 to 15"),
    (dict(order=ORDER // 2), "a position is twice"),
    (dict(known=(ORDER[:, :3], ORDER[:, :3])), "a position is twice"),
    (dict(order=ORDER[:, 3:], known=(ORDER[:, :3], ORDER[:, :2])), r"known positions and tokens \[b, k\]"),
    (dict(order=ORDER[:, 3:], known=(ORDER[:1, :3], ORDER[:1, :3])), r"known positions and tokens \[b, k\]"),
    (dict(order=ORDER[:, 3:], known=(ORDER[:, :3], ORDER[:, :3] + V)), "known tokens must be from 0 to 31"),
    (dict(order=ORDER[:, 3:], known=(ORDER[:, :3] + 14, ORDER[:, :3])), "positions must be from 0 to 15"),
])
def test_a_mistake_is_one_line_before_the_first_step(model, change, problem):
    arguments = dict(classes=torch.tensor([0, 1]), order=ORDER) | change
    for function in (model.decode, model.generate):  # decode raises when called, not when first stepped
        with pytest.raises(ValueError, match=problem) as error:
            function(**arguments)
        assert "\n" not in str(error.value)


def test_an_unknown_order_is_an_error_of_generate(model):
    with pytest.raises(ValueError, match="unknown order 'sideways': choose from random"):
        model.generate(torch.tensor([0]), "sideways")


def test_generate_takes_all_that_decode_takes():
    decode, generate = (inspect.signature(f).parameters for f in (RandAR.decode, RandAR.generate))
    assert list(decode) == list(generate)
    assert all(decode[name].default == generate[name].default for name in decode if name != "order")


# ------------------------------------------------------------------------------------------------------------
# Files


def test_a_checkpoint_comes_back_as_it_was(model, batch, tmp_path):
    save_randar(model.train(), tmp_path / "a.pt", class_names=["cat", "dog"])
    loaded = load_randar(tmp_path / "a.pt")
    assert loaded.config == model.config and loaded.class_names == ["cat", "dog"] and not loaded.training
    assert torch.equal(loaded(*batch), model.eval()(*batch))


def test_half_precision_is_half_as_large_and_nearly_the_same(model, batch, tmp_path):
    save_randar(model, tmp_path / "full.pt")
    save_randar(model, tmp_path / "half.pt", half=True)
    assert (tmp_path / "half.pt").stat().st_size < 0.6 * (tmp_path / "full.pt").stat().st_size
    loaded = load_randar(tmp_path / "half.pt")
    assert loaded.class_names is None and {p.dtype for p in loaded.parameters()} == {torch.float32}
    expected = model(*batch)
    assert abs(loaded(*batch) - expected).max() < 0.01 * abs(expected).max()


def test_released_weights_load_without_a_configuration(tmp_path):
    model = small_model(grid=(16, 16), dim=128, n_head=2)  # heads of 64 channels, as in all released weights
    torch.save(model.state_dict(), tmp_path / "released.pt")
    loaded = load_randar(tmp_path / "released.pt")
    assert loaded.config == model.config and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_safetensors_load(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = small_model(grid=(16, 16), dim=128, n_head=2)
    safetensors.save_file(model.state_dict(), tmp_path / "released.safetensors")
    assert torch.equal(load_randar(tmp_path / "released.safetensors").output.weight, model.output.weight)
    (tmp_path / "released.safetensors").write_bytes(b"not at all")
    assert "download it again" in complaint(tmp_path / "released.safetensors")


def complaint(path, kind=ValueError):
    """What load_randar says about a file it cannot load; one line that names it."""
    with pytest.raises(kind) as error:
        load_randar(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and len(message) < 300 + len(str(path))
    return message


def test_a_missing_checkpoint_is_named(tmp_path):
    for name in ("nothing.pt", "nothing.safetensors"):
        assert "no checkpoint at" in complaint(tmp_path / name, FileNotFoundError)


def test_without_the_package_for_safetensors_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as if it were not installed
    (tmp_path / "a.safetensors").write_bytes(b"anything")
    assert "pip install safetensors" in complaint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_named(model, tmp_path, share):
    save_randar(model, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content[: int(share * len(content))])
    assert "truncated" in complaint(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [
    {"config": {"channels": 64}, "model": {"encoder.conv_in.weight": torch.zeros(3)}},  # a tokenizer
    {"model": {"quantize.embedding.weight": torch.zeros(3)}},  # LlamaGen's
    {"tok_embeddings.weight": torch.zeros(4)},
    {"tok_embeddings.weight": torch.zeros(4, 8), "cls_embedding.embedding_table.weight": torch.zeros(4, 8)},
    {"tok_embeddings.weight": torch.zeros(4, 8), "cls_embedding.embedding_table.weight": torch.zeros(4, 8),
     "layers.0.attention.wqkv.weight": torch.zeros(24, 8)},
    {}, [1, 2], torch.zeros(3),
])
def test_a_file_that_holds_something_else_is_named(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    assert "holds no RandAR weights" in complaint(tmp_path / "other.pt")


def test_weights_of_another_shape_are_named(model, tmp_path):
    save_randar(small_model(vocab_size=V + 1), tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt")
    content["config"]["vocab_size"] = V
    torch.save(content, tmp_path / "a.pt")
    assert "does not fit" in complaint(tmp_path / "a.pt") and "output.weight" in complaint(tmp_path / "a.pt")
    torch.save(content | {"model": {"norm.weight": torch.zeros(32)}}, tmp_path / "a.pt")
    assert "does not fit" in complaint(tmp_path / "a.pt")


# ------------------------------------------------------------------------------------------------------------
# Agreement with the released implementation


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "randar_small.npz")


@pytest.fixture(scope="module")
def golden_model(golden):
    settings = json.loads(str(golden["config"]))
    return small_model(**settings | {"grid": (settings["grid"], settings["grid"])})


def arguments_of(golden):
    return [torch.from_numpy(golden[name]) for name in ("tokens", "classes", "order")]


def test_logits_are_those_of_the_released_code(golden, golden_model):
    logits = golden_model(*arguments_of(golden)).detach().numpy()
    assert abs(logits - golden["logits"]).max() < 1e-3 * abs(golden["logits"]).max()


def test_loss_and_gradients_are_those_of_the_released_code(golden, golden_model):
    golden_model.zero_grad()
    loss = golden_model.loss(*arguments_of(golden))
    loss.backward()
    assert abs(loss.item() - golden["loss"]) < 1e-4
    norms = {f"gradnorm/{name}": p.grad.norm().item() for name, p in golden_model.named_parameters()}
    assert norms.keys() == {key for key in golden.files if key.startswith("gradnorm/")}
    for name, norm in norms.items():
        assert math.isclose(norm, golden[name], rel_tol=0.01), name


def test_greedy_decoding_gives_the_tokens_of_the_released_code(golden, golden_model):
    _, classes, order = arguments_of(golden)
    keys = [key for key in golden.files if key.startswith("greedy/")]
    assert len(keys) == 5
    for key in keys:  # greedy/steps=6,cfg=1.0-4.0
        steps, cfg = (part.split("=")[1] for part in key.split(","))
        cfg = tuple(float(end) for end in cfg.split("-"))
        tokens = golden_model.generate(classes, order, int(steps), cfg, top_k=1)
        assert (tokens.numpy() == golden[key]).all(), key
