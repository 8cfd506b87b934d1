"""The applications as a specification: what is known stays, the rest is drawn as the paper says."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import C, N, V, inputs_of, seeded, small_model, small_model_of, small_tokenizer
from PIL import Image

import apps
import randar
import rar
from apps import (attention_maps, complete, correspond, encode_features, extrapolate,
                  extrapolation_angles, features_by_layer, inpaint, nearest_points, outpaint,
                  outpaint_by_windows)
from randar import default_steps, generation_order, grid_angles, load_randar, save_randar
from support import border, judge, pictures, toy
from support.border import UserError
from tokenizer import load_tokenizer, save_tokenizer

CLASSES = torch.tensor([1, 4])
F_ = 4  # pixels per token of the small tokenizer


@pytest.fixture
def tokenizer():
    return small_tokenizer()


def noise(height=16, width=16, number=2):
    """Images that no tokenizer reconstructs."""
    return torch.rand(number, 3, height, width, generator=seeded(5)) * 2 - 1


def mask_of(*tokens, grid=(4, 4)):
    """A mask that covers the tokens, raster indices."""
    mask = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    mask[list(tokens)] = True
    return mask.view(grid).repeat_interleave(F_, 0).repeat_interleave(F_, 1)


@pytest.fixture
def generations(monkeypatch):
    """A list to which every call of RandAR.generate adds its arguments, by name."""
    calls, generate = [], randar.RandAR.generate

    def spy(model, classes, order=None, steps=None, **options):
        calls.append(dict(classes=classes, order=order, steps=steps, **options))
        return generate(model, classes, order, steps, **options)

    monkeypatch.setattr(randar.RandAR, "generate", spy)
    return calls


# ------------------------------------------------------------------------------------------------
# The one move


def test_known_tokens_come_first_and_both_parts_keep_their_turns(model, generations):
    tokens = torch.randint(V, (2, 16), generator=seeded(0))
    order = generation_order("random", 2, (4, 4), seeded(1))
    missing = torch.rand(2, 16, generator=seeded(2)).argsort(dim=1) < 6
    complete(model, tokens, missing, CLASSES, (4, 4), order=order, generator=seeded(3))
    [call] = generations
    for i in range(2):
        assert call["order"][i].tolist() == [p for p in order[i].tolist() if missing[i, p]]
        assert call["known"][0][i].tolist() == [p for p in order[i].tolist() if not missing[i, p]]
    assert (call["known"][1] == tokens.gather(1, call["known"][0])).all()


@pytest.mark.parametrize("kind", rar.KINDS)
def test_what_stands_at_missing_positions_does_not_matter(kind):
    model = small_model_of(kind)
    tokens = torch.randint(V, (2, 16), generator=seeded(0))
    missing = torch.arange(16).expand(2, -1) % 3 > 0
    other = torch.where(missing, -1, tokens)
    one, two = (complete(model, x, missing, CLASSES, (4, 4), generator=seeded(3))
                for x in (tokens, other))
    assert (one == two).all() and (one[~missing] == tokens[~missing]).all() and one.min() >= 0


def test_every_known_token_is_context_before_and_after_the_hole_in_raster_order(model):
    tokens = torch.randint(V, (1, 16), generator=seeded(0))
    missing = torch.arange(16)[None] == 7
    seen = inputs_of(model.output)
    for position in (None, 0, 15):
        changed = tokens.clone()
        if position is not None:
            changed[0, position] = (changed[0, position] + 1) % V
        complete(model, changed, missing, CLASSES[:1], (4, 4), order="raster", cfg=(1, 1))
    assert len(seen) == 3
    assert all(abs(x - seen[0]).max() > 1e-4 for x in seen[1:])


@pytest.mark.parametrize("number", [1, 5, 12, 16])
def test_the_steps_are_those_of_the_papers_schedule_for_the_missing_tokens(model, number):
    seen, tokens = inputs_of(model.layers[0]), torch.zeros(1, 16, dtype=torch.int64)
    complete(model, tokens, torch.arange(16)[None] < number, CLASSES[:1], (4, 4))
    assert len(seen) == default_steps(number)


# ------------------------------------------------------------------------------------------------
# Inpainting and editing (Sec. 3.4.1)


@pytest.mark.parametrize("kind", rar.KINDS)
@pytest.mark.parametrize("classes", [CLASSES, (CLASSES + 1) % C, torch.full((2,), C)])
def test_known_tokens_survive_inpainting_and_editing(tokenizer, kind, classes):
    images, mask, model = noise(), mask_of(5, 6, 9), small_model_of(kind)
    redone, tokens = inpaint(model, tokenizer, images, mask, classes, generator=seeded(0))
    known = [i for i in range(16) if i not in (5, 6, 9)]
    assert (tokens[:, known] == tokenizer.encode(images)[:, known]).all()
    assert tokens.min() >= 0 and torch.equal(redone, tokenizer.decode(tokens))


def test_a_token_is_redone_if_any_of_its_pixels_is(tokenizer):
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4, 7] = mask[15, 0] = True  # the upper right corner of (1, 1), lower left of (3, 0)
    missing = apps.missing_tokens(noise(), mask, tokenizer)
    assert missing.shape == (2, 4, 4) and missing[0].nonzero().tolist() == [[1, 1], [3, 0]]


def test_an_empty_mask_gives_the_reconstruction(model, tokenizer):
    images = noise()
    redone, tokens = inpaint(model, tokenizer, images, mask_of(), CLASSES)
    assert torch.equal(tokens, tokenizer.encode(images))
    assert torch.equal(redone, tokenizer.decode(tokens))


@pytest.mark.parametrize("order", ["random", "hierarchical", "spiral_in"])
def test_a_full_mask_gives_what_generate_gives_with_the_same_seed(model, tokenizer, order):
    options = dict(order=order, cfg=(1.0, 3.0), scg=1.5, top_k=20)
    full = mask_of(*range(16))
    _, tokens = inpaint(model, tokenizer, noise(), full, CLASSES, generator=seeded(7), **options)
    assert torch.equal(tokens, model.generate(CLASSES, generator=seeded(7), **options))


def test_pasting_puts_the_pixels_outside_the_mask_back(model, tokenizer):
    images, mask = noise(), mask_of(5, 6)
    mask[4, 4] = False  # a pixel that the user knows, of a token that is redone
    pasted, _ = inpaint(model, tokenizer, images, mask, CLASSES, paste=True, generator=seeded(0))
    plain, _ = inpaint(model, tokenizer, images, mask, CLASSES, generator=seeded(0))
    assert torch.equal(pasted[..., ~mask], images[..., ~mask])
    assert torch.equal(pasted[..., mask], plain[..., mask])
    assert not torch.equal(plain[..., ~mask], images[..., ~mask])


def test_each_image_may_have_a_mask_of_its_own(model, tokenizer):
    images, masks = noise(), torch.stack([mask_of(0, 1, 2), mask_of(8, 9, 15)])
    _, tokens = inpaint(model, tokenizer, images, masks, CLASSES, generator=seeded(0))
    same = tokens == tokenizer.encode(images)
    assert same[0, 3:].all() and same[1, [*range(8), *range(10, 15)]].all()


# ------------------------------------------------------------------------------------------------
# Outpainting (Sec. 3.4.2)

CORNERS = [(0, 0), (2, 3), (1, 0), (2, 0), (0, 3)]  # of a 4 x 4 image in 6 x 7


@pytest.mark.parametrize("function", [outpaint, outpaint_by_windows])
@pytest.mark.parametrize("corner", CORNERS)
def test_an_image_grows_to_any_side_and_its_tokens_survive(model, tokenizer, function, corner):
    images, (top, left), options = noise(), corner, dict(generator=seeded(0))
    larger, tokens = function(model, tokenizer, images, (6, 7), CLASSES, corner, **options)
    inside = tokens.view(2, 6, 7)[:, top : top + 4, left : left + 4].flatten(1)
    assert (inside == tokenizer.encode(images)).all() and tokens.min() >= 0 and tokens.max() < V
    assert torch.equal(larger, tokenizer.decode(tokens, (6, 7))) and larger.shape == (2, 3, 24, 28)


@pytest.mark.parametrize("corner", CORNERS)
def test_the_image_keeps_the_angles_of_training_wherever_it_is(model, corner):
    angles = apps.outpainting_angles((6, 7), corner, (4, 4), model.head_dim).view(6, 7, -1)
    inside = angles[corner[0] : corner[0] + 4, corner[1] : corner[1] + 4].flatten(0, 1)
    assert torch.equal(inside, grid_angles((4, 4), model.head_dim))
    down, right = angles[1:] - angles[:-1], angles[:, 1:] - angles[:, :-1]
    assert torch.allclose(down, down[:1], atol=1e-5)  # all neighbours are alike
    assert torch.allclose(right, right[:, :1], atol=1e-5)


def test_a_target_within_the_grid_of_training_has_its_angles(model):
    angles = apps.outpainting_angles((4, 4), (1, 2), (4, 4), model.head_dim)
    assert torch.equal(angles, grid_angles((4, 4), model.head_dim))


def test_outpainting_sees_all_of_the_image_and_decodes_the_rest(model, tokenizer, generations):
    outpaint(model, tokenizer, noise(), (6, 7), CLASSES, (1, 2), generator=seeded(0))
    [call] = generations
    assert call["known"][0].shape == (2, 16) and call["order"].shape == (2, 6 * 7 - 16)


def test_windows_are_the_grid_of_training_and_know_something(model, tokenizer, generations):
    outpaint_by_windows(model, tokenizer, noise(), (6, 9), CLASSES, (1, 3), generator=seeded(0))
    assert sum(call["order"].shape[1] for call in generations) == 6 * 9 - 16  # every token once
    for call in generations:
        known = call["known"][0].shape[1]
        assert known >= 4 and known + call["order"].shape[1] == 16
        assert call["angles"] is None  # those of training


# ------------------------------------------------------------------------------------------------
# Resolution extrapolation (Sec. 3.4.3)


@pytest.mark.parametrize("grid, factor", [((4, 4), 2), ((4, 4), 3), ((3, 5), 2)])
def test_the_first_part_has_exactly_the_angles_of_training(grid, factor):
    h, w = grid
    angles = extrapolation_angles(grid, factor, 0, 16).view(factor * h, factor * w, -1)
    torch.testing.assert_close(angles[::factor, ::factor].flatten(0, 1), grid_angles(grid, 16))


@pytest.mark.parametrize("frequencies", range(5))
def test_the_highest_frequencies_of_both_axes_are_extrapolated_the_others_not(frequencies):
    angles = extrapolation_angles((4, 6), 2, frequencies, 16).view(8, 12, 2, 4)  # of rows, columns
    far, frequency = angles[5, 3], 10000.0 ** (-torch.arange(4) / 4)  # the highest first
    scale = torch.where(torch.arange(4) < frequencies, 1.0, 0.5)
    assert torch.allclose(far, torch.stack([5 * scale * frequency, 3 * scale * frequency]))


@pytest.mark.parametrize("factor", [2, 3])
def test_the_first_part_is_plain_generation_and_its_tokens_survive(factor):
    model, tokenizer = small_model(grid=(2, 3)), small_tokenizer()
    images, tokens = extrapolate(model, tokenizer, CLASSES, factor, generator=seeded(1))
    coarse = tokens.view(2, 2 * factor, 3 * factor)[:, ::factor, ::factor].flatten(1)
    plain = model.generate(CLASSES, "random", steps=-1, cfg=(3.0, 3.0), generator=seeded(1))
    assert torch.equal(coarse, plain) and tokens.min() >= 0 and tokens.max() < V
    assert images.shape == (2, 3, 2 * factor * F_, 3 * factor * F_)


def test_the_second_part_has_the_first_as_context_under_mixed_angles(model, tokenizer, generations):
    options = dict(frequencies=1, scg=1.7, steps=4, generator=seeded(1))
    _, tokens = extrapolate(model, tokenizer, CLASSES, **options)
    first, second = generations
    even = [16 * (i // 4) + 2 * (i % 4) for i in range(16)]
    assert not first.keys() & {"scg", "known", "angles"} and second["scg"] == 1.7
    assert second["known"][0].sort(dim=1).values[0].tolist() == even
    assert (second["known"][1] == tokens.gather(1, second["known"][0])).all()
    assert torch.equal(second["angles"], extrapolation_angles((4, 4), 2, 1, model.head_dim))


def test_without_the_hierarchical_order_all_is_decoded_in_one_go(model, tokenizer, generations):
    options = dict(hierarchical=False, frequencies=0, scg=1.0, steps=5)
    _, tokens = extrapolate(model, tokenizer, CLASSES, **options)
    [call] = generations
    assert call["order"].shape == (2, 64) and call["known"][0].shape == (2, 0) and tokens.min() >= 0
    assert torch.equal(call["angles"], extrapolation_angles((4, 4), 2, 0, model.head_dim))


@pytest.mark.parametrize("hierarchical", [True, False])
def test_factor_1_is_plain_generation(model, tokenizer, hierarchical):
    options = dict(cfg=(3.0, 3.0), scg=1.0, steps=6)
    plain = model.generate(CLASSES, generator=seeded(2), **options)
    options |= dict(generator=seeded(2))
    _, tokens = extrapolate(model, tokenizer, CLASSES, 1, hierarchical, **options)
    assert torch.equal(tokens, plain)


def test_guidance_needs_no_second_pass_through_the_network(model, tokenizer):
    seen = inputs_of(model.layers[0])
    extrapolate(model, tokenizer, CLASSES, steps=5, scg=2.5, cfg=(3.0, 3.0))
    assert [len(x) for x in seen] == 5 * [2 * 2] + 5 * [3 * 2]  # CFG first, then Eq. B


# ------------------------------------------------------------------------------------------------
# All of them


@pytest.mark.parametrize("function", [
    lambda *m, generator: inpaint(*m, noise(), mask_of(*range(9)), CLASSES, generator=generator),
    lambda *m, generator: outpaint(*m, noise(), (5, 7), CLASSES, (1, 2), generator=generator),
    lambda *m, generator: outpaint_by_windows(*m, noise(), (5, 7), CLASSES, generator=generator),
    lambda *m, generator: extrapolate(*m, CLASSES, steps=6, generator=generator),
])
def test_the_same_seed_gives_the_same_result(model, tokenizer, function):
    results = [function(model, tokenizer, generator=seeded(seed))[1] for seed in (1, 1, 2)]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_a_grid_of_another_shape_than_training_works_throughout(tokenizer):
    model, images = small_model(grid=(3, 5)), noise(8, 24)  # 2 x 6 tokens: fewer rows, more columns
    redone, tokens = inpaint(model, tokenizer, images, mask_of(3, 4, grid=(2, 6)), CLASSES)
    assert redone.shape == images.shape and tokens.shape == (2, 12)
    for function in (outpaint, outpaint_by_windows):
        larger, tokens = function(model, tokenizer, images, (5, 7), CLASSES, (2, 1))
        assert larger.shape == (2, 3, 20, 28) and tokens.min() >= 0
        inside = tokens.view(2, 5, 7)[:, 2:4, 1:7].flatten(1)
        assert (inside == tokenizer.encode(images)).all()
    assert extrapolate(model, tokenizer, CLASSES, steps=4)[0].shape == (2, 3, 24, 40)


MISTAKES = [
    (lambda *m: inpaint(*m, noise(), mask_of(1)[:12], CLASSES), r"\[2, 16, 16\], .*\[2, 12, 16"),
    (lambda *m: inpaint(*m, noise(), torch.stack([mask_of(1), mask_of(1, 2)]), CLASSES),
     "must miss equally many tokens: give such masks"),
    (lambda *m: outpaint(*m, noise(), (6, 6), CLASSES, (0, 3)), "its corner at 0, 3, does not fit"),
    (lambda m, t: attention_maps(m, t.encode(noise()), [1, 0]), "layer must be from 1 to 2"),
]


@pytest.mark.parametrize("call, problem", MISTAKES)
def test_what_does_not_fit_is_refused(model, tokenizer, call, problem):
    with pytest.raises(UserError, match=problem):
        call(model, tokenizer)


@pytest.mark.parametrize("kind, call", [
    ("dense", lambda *m: outpaint(*m, noise(), (5, 7), CLASSES)),
    ("rar", lambda *m: extrapolate(*m, CLASSES)),
    ("merge", lambda *m: inpaint(*m, noise(16, 24), mask_of(1, grid=(4, 6)), CLASSES)),
    ("rar", lambda m, t: encode_features(m, t.encode(noise()))),
    ("merge", lambda m, t: attention_maps(m, t.encode(noise()))),
    ("dense", lambda m, t: encode_features(m, t.encode(noise(16, 24)), grid=(4, 6)))])
def test_what_a_kind_of_model_cannot_do_is_refused_by_name(tokenizer, kind, call):
    with pytest.raises(UserError, match=f"of the kind '{kind}'"):
        call(small_model_of(kind), tokenizer)


# ------------------------------------------------------------------------------------------------
# Bi-directional features (Sec. 3.4.4)


def in_turns(x, order):
    """[b, N, d] in raster order -> in the order given."""
    return x.gather(1, order[:, :, None].expand_as(x))


def changed(model, batch, turn, rounds):
    """Bool [b, N]: whose features, in their turns, change with the token of one turn."""
    tokens, classes, order = batch
    position = order[:, turn : turn + 1]
    other = tokens.scatter(1, position, (tokens.gather(1, position) + 1) % V)
    one, two = (encode_features(model, x, classes, rounds, 2, order=order) for x in (tokens, other))
    return in_turns(abs(one - two), order).amax(-1) > 1e-6


def test_predictions_are_made_of_the_first_round_features_of_the_last_layer(model, batch):
    tokens, classes, order = batch
    states = in_turns(encode_features(model, tokens, classes, 1, 2, order=order), order)
    logits, _ = model(tokens, classes, order)
    torch.testing.assert_close(model.logits(states), logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_second_round_is_a_second_pass_with_the_cache_of_the_first(model, batch):
    tokens, classes, order = batch
    x, cos_sin = model.sequence(tokens, classes, order)
    caches = torch.zeros(2, 2, 3, 2, 1 + 4 * N, 16)
    model.hidden_states(x, cos_sin, None, caches)
    mask = torch.ones(2 * N, 1 + 4 * N, dtype=torch.bool).tril(1 + 2 * N)  # the class came once
    second = model.hidden_states(x[:, 1:], cos_sin[:, 1:], mask, caches, start_pos=1 + 2 * N)
    states = in_turns(encode_features(model, tokens, classes, 2, 2, order=order), order)
    torch.testing.assert_close(states, second[:, ::2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("turn", range(0, N, 5))
def test_in_the_second_round_every_feature_depends_on_every_token(model, batch, turn):
    assert changed(model, batch, turn, rounds=2).all()


@pytest.mark.parametrize("turn", range(0, N, 5))
def test_in_the_first_round_a_feature_depends_on_the_tokens_before_it_only(model, batch, turn):
    change = changed(model, batch, turn, rounds=1)
    assert not change[:, : turn + 1].any() and change[:, turn + 1 :].all()


def test_one_pass_gives_every_layer_and_every_round(model, batch):
    tokens, classes, order = batch
    for layer, states in enumerate(features_by_layer(model, tokens, classes, 3, order), start=1):
        assert states.shape == (3, 3, N, 32) and not states.requires_grad
        for rounds in (1, 2, 3):
            alone = encode_features(model, tokens, classes, rounds, layer, order=order)
            torch.testing.assert_close(states[:, rounds - 1], alone, atol=1e-5, rtol=1e-5)


def test_features_of_an_image_do_not_depend_on_the_others_but_on_the_class(model, batch):
    tokens, classes, order = batch
    together = encode_features(model, tokens, classes, order=order)
    alone = encode_features(model, tokens[1:2], classes[1:2], order=order[1:2])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)
    other = encode_features(model, tokens, (classes + 1) % C, order=order)
    assert (abs(together - other).amax(-1) > 1e-6).all()


def test_no_layer_after_the_one_asked_for_is_computed(model, batch):
    seen = inputs_of(model.layers[1])
    encode_features(model, batch[0], layer=1)
    assert not seen


def test_by_default_nobody_says_the_class_and_the_order_is_that_of_training(model, batch):
    tokens, null = batch[0], torch.full((3,), C)
    model.order, raster = "raster", torch.arange(N).expand(3, -1)
    expected = encode_features(model, tokens, null, 2, 1, order=raster)
    assert torch.equal(encode_features(model, tokens), expected)
    drawn = [encode_features(model, tokens, order="random", generator=seeded(s)) for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("depth, layer", [(36, 24), (24, 16), (48, 32), (4, 3), (2, 1), (1, 1)])
def test_by_default_features_come_from_two_thirds_of_the_depth(depth, layer):
    assert apps.checked_layer(small_model(n_layer=depth, dim=8), None) == layer


def test_images_of_another_grid_than_that_of_training_have_features_too(model):
    tokens = torch.randint(V, (2, 15), generator=seeded(0))
    assert encode_features(model, tokens, grid=(3, 5)).shape == (2, 15, 32)
    maps, to_class = attention_maps(model, tokens, [1], grid=(3, 5))
    assert maps.shape == (2, 1, 2, 2, 15, 2, 3, 5) and to_class.shape == (2, 1, 2, 2, 15)


def test_dense_models_have_features_and_attention(batch):
    model = small_model_of("dense")
    assert encode_features(model, batch[0]).shape == (3, N, 32)
    assert attention_maps(model, batch[0])[0].shape == (3, 2, 2, 2, N, 2, 4, 4)


# ------------------------------------------------------------------------------------------------
# Correspondence


def feature_map(h=4, w=4, seed=0):
    return torch.randn(h, w, 32, generator=seeded(seed))


def pixel_middles(height, width, border):
    """All (x, y) at least `border` pixels inside a picture: [k, 2]."""
    rows, columns = torch.arange(border, height - border), torch.arange(border, width - border)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1) + 0.5


def test_every_pixel_of_an_image_corresponds_to_itself_whatever_the_length_of_features():
    points = pixel_middles(20, 20, border=3)  # nearer to the border, features are constant
    found = nearest_points(feature_map(), feature_map(), points, (20, 20), (20, 20))
    assert torch.equal(found, points)
    lengths, middles = torch.rand(4, 4, 1, generator=seeded(1)) + 0.1, pixel_middles(4, 4, 1) * 5
    found = nearest_points(feature_map(), feature_map() * lengths, middles, (20, 20), (20, 20))
    assert torch.equal(found, middles)


def test_token_middles_correspond_to_themselves_in_a_picture_of_any_size():
    middles = pixel_middles(4, 6, border=1)  # (x, y) in tokens
    found = nearest_points(feature_map(4, 6), feature_map(4, 6), middles * 4, (16, 24), (28, 66))
    assert torch.equal(found, middles * torch.tensor([11, 7]))  # 11 by 7 pixels a token


def test_what_moved_is_found_where_it_moved_to():
    source, points = feature_map(), pixel_middles(20, 20, border=3)
    points = points[points[:, 0] < 12]
    found = nearest_points(source, source.roll(1, dims=1), points, (20, 20), (20, 20))
    assert torch.equal(found, points + torch.tensor([5, 0]))


def test_a_picture_corresponds_to_itself(model, tokenizer):
    picture, points = noise(number=1)[0], pixel_middles(16, 16, border=2)
    found = correspond(model, tokenizer, picture, picture, points, order="raster")
    assert torch.equal(found, points)
    larger = F.interpolate(picture[None], (40, 24))[0]
    found = correspond(model, tokenizer, picture, larger, points, order="raster", rounds=1, layer=2)
    assert found.shape == points.shape and (found <= torch.tensor([24, 40])).all()
    assert found[:, 1].max() > 20


def test_pictures_are_stretched_to_what_the_model_knows_and_left_alone_if_they_have_it(tokenizer):
    picture = noise(number=1)[0]
    one, two = apps.tokens_of([picture, torch.rand(3, 9, 30)], tokenizer, (4, 4))
    assert torch.equal(one[None], tokenizer.encode(picture[None])) and two.shape == (N,)


# ------------------------------------------------------------------------------------------------
# Attention


def in_sequence(maps, to_class, order):
    """The maps of one head as weights of the whole sequence, [b, 1 + 2 N, 1 + 2 N]."""
    b = len(order)
    places = (1 + 2 * order.argsort(dim=1)[:, None] + torch.arange(2)[None, :, None]).flatten(1)
    weights = torch.zeros(b, 1 + 2 * N, 1 + 2 * N)
    weights[:, 0, 0] = 1  # the class sees itself only
    for i in range(b):
        weights[i, places[i][:, None], places[i]] = maps[i].reshape(2 * N, 2 * N)
        weights[i, places[i], 0] = to_class[i].flatten()
    return weights


@pytest.mark.parametrize("layer, head", [(1, 0), (2, 1)])
def test_the_maps_are_the_weights_that_attention_uses(model, batch, attention_calls, layer, head):
    tokens, classes, order = batch
    maps, to_class = attention_maps(model, tokens, [layer], classes, order)
    weights = in_sequence(maps[:, 0, head], to_class[:, 0, head], order)
    attention_calls.clear()
    model(tokens, classes, order)
    q, k, v, options = attention_calls[layer - 1]
    used = F.scaled_dot_product_attention(q, k, v, **options)[:, head]
    ours = weights[:, : 2 * N, : 2 * N] @ v[:, head]
    torch.testing.assert_close(ours, used, atol=1e-5, rtol=1e-4)


def test_the_weights_of_a_token_sum_to_one_and_are_zero_for_later_tokens_only(model, batch):
    tokens, classes, order = batch
    maps, to_class = attention_maps(model, tokens, [2], classes, order)
    assert torch.allclose(maps.sum((5, 6, 7)) + to_class, torch.ones(3, 1, 2, 2, N))
    weights = in_sequence(maps[:, 0, 0], to_class[:, 0, 0], order)
    assert (weights.triu(1) == 0).all() and (weights + torch.ones(33, 33).triu(1) > 0).all()


def test_one_call_for_all_layers_equals_calls_for_each_and_reads_the_image_once(model, batch):
    tokens, classes, order = batch
    seen = inputs_of(model.layers[0])
    together = attention_maps(model, tokens, None, classes, order)
    assert len(seen) == 1
    each = zip(*(attention_maps(model, tokens, [layer], classes, order) for layer in (1, 2)))
    for all_layers, of_each in zip(together, each):
        assert torch.equal(all_layers, torch.cat(of_each, dim=1))


# ------------------------------------------------------------------------------------------------
# The commands


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a small model that does not know the toy world, and pictures."""
    model = small_model()
    model.class_names = ["cat", "dog", "cow", "hen", "pig"]
    save_randar(model, tmp_path / "randar.pt")
    save_randar(small_model_of("merge"), tmp_path / "merge.pt")
    save_tokenizer(small_tokenizer(), tmp_path / "tokenizer.pt")
    pixels = pictures.to_uint8(noise(16, 24))
    Image.fromarray(pixels[0]).save(tmp_path / "photo.png")
    Image.fromarray(pixels[1, :15, :22]).save(tmp_path / "odd.png")
    Image.fromarray(pixels[1, :16, :16]).save(tmp_path / "square.png")
    Image.fromarray(mask_of(3, 4, grid=(4, 6)).numpy()).save(tmp_path / "mask.png")
    Image.new("RGB", (80, 80)).save(tmp_path / "huge.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


PHOTO = "--ckpt randar.pt --image photo.png"


@pytest.mark.parametrize("line, labels", [
    (f"inpaint {PHOTO} --mask mask.png --class 3 --number 2 --paste", "hen, seed 0;hen, seed 1"),
    (f"inpaint {PHOTO} --cfg 3 3 --power 1 --scg 2 --steps 2 --top-k 5 --number 1", "seed 0"),
    ("inpaint --ckpt merge.pt --image square.png --number 1 --seed 4", "seed 4"),
    (f"edit {PHOTO} --classes hen 0 --number 1 --order raster", "hen, seed 0;cat, seed 0"),
    (f"outpaint {PHOTO} --grid 5 8 --corner 1 0 --class pig --number 1",
     "outpaint, seed 0;sliding window, seed 0"),
    ("extrapolate --ckpt randar.pt --factor 3 --freq 1 --class pig 0 --number 3 --steps 2",
     "naive;+ hierarchical order;+ frequency mix;+ SCG;all but the mix"),
])
def test_each_command_writes_one_picture(folder, run, capsys, monkeypatch, line, labels):
    sheets, picture_grid = [], pictures.picture_grid
    monkeypatch.setattr(pictures, "picture_grid", lambda *a: sheets.append(a) or picture_grid(*a))
    run(f"apps.py {line} --out new/a.png")
    [(rows,)] = sheets
    assert ";".join(label for label, _ in rows).endswith(labels)
    assert Image.open("new/a.png").width > 100 and "wrote new/a.png" in capsys.readouterr().out


def test_several_classes_are_taken_in_turn(folder, run, monkeypatch):
    asked = []
    monkeypatch.setattr(apps, "outpaint", lambda m, t, images, grid, classes, *_, **__: (
        asked.append(classes.tolist()) or images, None))
    monkeypatch.setattr(apps, "outpaint_by_windows", apps.outpaint)
    run("apps.py outpaint --classes 1 4 --number 1 --out new.png")
    assert asked == 2 * [[1, 4, 1, 4, 1]]  # five pictures of the toy world


WRONG = {
    "inpaint --ckpt randar.pt": "does not know the toy world: give a picture, --image",
    f"inpaint {PHOTO} --image odd.png": r"H and W multiples of 4, got \[1, 3, 15, 22\]: crop",
    f"inpaint {PHOTO} --mask odd.png": r"expected masks \[1, 16, 24\], got .*\[1, 15, 22\]",
    "inpaint --ckpt merge.pt --image photo.png": "another grid .* is of the kind 'merge'",
    f"edit {PHOTO} --classes 1 5": "no class '5': give a number from 0 to 4",
    f"outpaint {PHOTO} --grid 4 5": "4 x 6 tokens.* does not fit into a grid of 4 x 5",
    f"outpaint {PHOTO} --image huge.png": "huge.png has over 16 times the tokens of training",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_mistake_on_the_command_line_is_one_line_with_exit_code_two(folder, run, capsys, line):
    with pytest.raises(SystemExit) as stop:
        run(f"apps.py {line}")
    out, errors = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and errors.startswith(("error: ", "apps.py"))
    assert len(errors.splitlines()) == 1 and re.search(WRONG[line], errors), errors


# ------------------------------------------------------------------------------------------------
# With the weights that ship

TOY = border.CHECKPOINTS / "randar_toy.pt"


@pytest.mark.parametrize("line", ["inpaint --number 1", "edit --number 1 --class fish",
                                  "outpaint --number 1 --steps 4", "correspond --number 2",
                                  f"extrapolate --ckpt {TOY} --steps 3 --number 2"])
def test_each_command_draws_its_own_example(folder, run, capsys, line):
    run(f"apps.py {line}")
    said, command = capsys.readouterr().out, line.split()[0]
    assert f"wrote {command}.png" in said and (folder / f"{command}.png").is_file()
    assert ("judge" in said) == (command in ("inpaint", "edit", "extrapolate"))


def test_editing_keeps_the_background_and_changes_the_object():
    """The judge agrees with the new class in 97% of 400 pictures; here 40 of them have to do."""
    pixels, classes, _ = toy.make(40, apps.EXAMPLES)
    images, classes = pictures.from_uint8(pixels), torch.from_numpy(classes)
    wanted = (classes + torch.randint(1, 10, (40,), generator=seeded(0))) % 10
    mask = F.pad(torch.ones(24, 24), (4, 4, 4, 4)) > 0
    model = load_randar(TOY)
    tokenizer = load_tokenizer(border.CHECKPOINTS / "tokenizer.pt")
    edited, _ = inpaint(model, tokenizer, images, mask, wanted, generator=seeded(1))
    assert judge.judge(edited, wanted)["accuracy"] >= 0.8
    assert judge.judge(edited, classes)["accuracy"] < 0.1
    corners = np.ix_(range(40), range(3), (0, 31), (0, 31))
    assert abs(edited.numpy()[corners] - images.numpy()[corners]).mean() < 0.05


def test_true_pictures_of_twice_the_size_are_likeliest_with_one_frequency_extrapolated():
    """Hence the default of `extrapolate`: with more than two, angles are new to the model (notebook 6)."""
    model = load_randar(border.CHECKPOINTS / "fine/randar.pt")
    tokenizer = load_tokenizer(border.CHECKPOINTS / "fine/tokenizer.pt")
    (small, classes, _), (large, _, _) = (toy.make(3, 7, "fine", side) for side in (64, 128))
    with torch.no_grad():
        first, tokens = (tokenizer.encode(pictures.from_uint8(x)) for x in (small, large))
        tokens.view(3, 32, 32)[:, ::2, ::2] = first.view(3, 16, 16)  # step 1 as it should be
        order, nats = generation_order("hierarchical", 3, (32, 32), seeded(0)), {}
        for k in (0, 1, 3):
            angles = extrapolation_angles((16, 16), 2, k, model.head_dim)
            x, cos_sin = model.sequence(tokens, torch.from_numpy(classes), order, angles)
            logits = model.logits(model.hidden_states(x[:, :-1], cos_sin[:, :-1])[:, 1::2])
            rest = (logits.mT[..., 256:], tokens.gather(1, order)[:, 256:])
            nats[k] = F.cross_entropy(*rest).item()
    assert nats[1] < nats[0] - 0.3 and nats[0] < nats[3] - 0.2  # of 40 pictures 2.31, 3.10, 3.63
