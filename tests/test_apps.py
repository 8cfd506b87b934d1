"""The applications as a specification: what is known stays, what is not is drawn as the paper says."""

import re
import shlex
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import C, V, inputs_of, seeded, small_model, small_tokenizer
from PIL import Image

import apps
import common
import randar
import toy
from apps import complete, extrapolate, extrapolation_angles, inpaint, outpaint, outpaint_by_windows
from randar import generation_order, grid_angles, load_randar, save_randar
from sample import decoding_steps
from vqgan import load_tokenizer, save_tokenizer

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

    def spy(model, classes, order="random", steps=88, *rest, **options):
        assert not rest
        calls.append(dict(classes=classes, order=order, steps=steps, **options))
        return generate(model, classes, order, steps, **options)

    monkeypatch.setattr(randar.RandAR, "generate", spy)
    return calls


# ------------------------------------------------------------------------------------------------------------
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


def test_what_stands_at_missing_places_does_not_matter(model):
    tokens = torch.randint(V, (2, 16), generator=seeded(0))
    missing = torch.arange(16).expand(2, -1) % 3 > 0
    other = torch.where(missing, -1, tokens)
    one, two = (complete(model, x, missing, CLASSES, (4, 4), generator=seeded(3)) for x in (tokens, other))
    assert (one == two).all() and (one[~missing] == tokens[~missing]).all() and one.min() >= 0


def test_every_known_token_is_context_before_and_after_the_hole_in_raster_order(model):
    tokens = torch.randint(V, (1, 16), generator=seeded(0))
    missing = torch.arange(16)[None] == 7
    seen = inputs_of(model.output)
    for place in (None, 0, 15):
        changed = tokens.clone()
        if place is not None:
            changed[0, place] = (changed[0, place] + 1) % V
        complete(model, changed, missing, CLASSES[:1], (4, 4), order="raster", cfg=(1, 1))
    assert len(seen) == 3
    assert all(abs(x - seen[0]).max() > 1e-4 for x in seen[1:])


@pytest.mark.parametrize("number", [1, 5, 12, 16])
def test_the_steps_are_those_of_the_papers_schedule_for_the_missing_tokens(model, number):
    seen, tokens = inputs_of(model.layers[0]), torch.zeros(1, 16, dtype=torch.int64)
    complete(model, tokens, torch.arange(16)[None] < number, CLASSES[:1], (4, 4))
    assert len(seen) == round(number * 88 / 256) or number == len(seen) == 1


# ------------------------------------------------------------------------------------------------------------
# Inpainting and editing (Sec. 3.4.1)


@pytest.mark.parametrize("classes", [CLASSES, (CLASSES + 1) % C, torch.full((2,), C)])
def test_known_tokens_survive_inpainting_and_editing(model, tokenizer, classes):
    images = noise()
    pictures, tokens = inpaint(model, tokenizer, images, mask_of(5, 6, 9), classes, generator=seeded(0))
    known = [i for i in range(16) if i not in (5, 6, 9)]
    assert (tokens[:, known] == tokenizer.encode(images)[:, known]).all()
    assert tokens.min() >= 0 and torch.equal(pictures, tokenizer.decode(tokens))


def test_a_token_is_redone_if_any_of_its_pixels_is(tokenizer):
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4, 7] = mask[15, 0] = True  # the upper right corner of token (1, 1), the lower left one of (3, 0)
    missing = apps.missing_tokens(noise(), mask, tokenizer)
    assert missing.shape == (2, 4, 4) and missing[0].nonzero().tolist() == [[1, 1], [3, 0]]


def test_an_empty_mask_gives_the_reconstruction(model, tokenizer):
    images = noise()
    pictures, tokens = inpaint(model, tokenizer, images, mask_of(), CLASSES)
    assert torch.equal(tokens, tokenizer.encode(images)) and torch.equal(pictures, tokenizer.decode(tokens))


@pytest.mark.parametrize("order", ["random", "hierarchical", "spiral_in"])
def test_a_full_mask_gives_what_generate_gives_with_the_same_seed(model, tokenizer, order):
    options = dict(order=order, cfg=(1.0, 3.0), scg=1.5, top_k=20)
    full = mask_of(*range(16))
    _, tokens = inpaint(model, tokenizer, noise(), full, CLASSES, generator=seeded(7), **options)
    plain = model.generate(CLASSES, steps=decoding_steps((4, 4)), generator=seeded(7), **options)
    assert torch.equal(tokens, plain)


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


# ------------------------------------------------------------------------------------------------------------
# Outpainting (Sec. 3.4.2)

CORNERS = [(0, 0), (2, 3), (1, 0), (2, 0), (0, 3)]  # of a 4 x 4 image in 6 x 7


@pytest.mark.parametrize("function", [outpaint, outpaint_by_windows])
@pytest.mark.parametrize("corner", CORNERS)
def test_an_image_grows_to_any_side_and_its_tokens_survive(model, tokenizer, function, corner):
    images, (top, left) = noise(), corner
    pictures, tokens = function(model, tokenizer, images, (6, 7), CLASSES, corner, generator=seeded(0))
    inside = tokens.view(2, 6, 7)[:, top : top + 4, left : left + 4].flatten(1)
    assert (inside == tokenizer.encode(images)).all() and tokens.min() >= 0 and tokens.max() < V
    assert torch.equal(pictures, tokenizer.decode(tokens, (6, 7))) and pictures.shape == (2, 3, 24, 28)


@pytest.mark.parametrize("corner", CORNERS)
def test_the_image_keeps_the_angles_of_training_wherever_it_is(model, corner):
    angles = apps.outpainting_angles((6, 7), corner, (4, 4), model.head_dim).view(6, 7, -1)
    inside = angles[corner[0] : corner[0] + 4, corner[1] : corner[1] + 4].flatten(0, 1)
    assert torch.equal(inside, grid_angles((4, 4), model.head_dim))
    assert torch.allclose(angles[1:] - angles[:-1], angles[1:2] - angles[:1], atol=1e-5)  # neighbours are
    assert torch.allclose(angles[:, 1:] - angles[:, :-1], angles[:, 1:2] - angles[:, :1], atol=1e-5)  # alike


def test_a_target_within_the_grid_of_training_has_its_angles(model):
    for corner in ((0, 0), (1, 2)):
        angles = apps.outpainting_angles((4, 4), corner, (4, 4), model.head_dim)
        assert torch.equal(angles, grid_angles((4, 4), model.head_dim))


def test_outpainting_sees_all_of_the_image_and_decodes_all_the_rest_at_once(model, tokenizer, generations):
    outpaint(model, tokenizer, noise(), (6, 7), CLASSES, (1, 2), generator=seeded(0))
    [call] = generations
    assert call["known"][0].shape == (2, 16) and call["order"].shape == (2, 6 * 7 - 16)


def test_windows_have_the_size_and_the_angles_of_training_and_know_something(model, tokenizer, generations):
    outpaint_by_windows(model, tokenizer, noise(), (6, 9), CLASSES, (1, 3), generator=seeded(0))
    assert sum(call["order"].shape[1] for call in generations) == 6 * 9 - 16  # every token once
    for call in generations:
        assert call["known"][0].shape[1] >= 4 and call["known"][0].shape[1] + call["order"].shape[1] == 16
        assert torch.equal(call["angles"], grid_angles((4, 4), model.head_dim))


# ------------------------------------------------------------------------------------------------------------
# Resolution extrapolation (Sec. 3.4.3)


@pytest.mark.parametrize("grid, factor", [((4, 4), 2), ((4, 4), 3), ((3, 5), 2)])
def test_step_1_has_exactly_the_angles_of_training(grid, factor):
    h, w = grid
    angles = extrapolation_angles(grid, factor, 0, 16).view(factor * h, factor * w, -1)
    assert torch.equal(angles[::factor, ::factor].flatten(0, 1), grid_angles(grid, 16))


@pytest.mark.parametrize("frequencies", range(5))
def test_the_highest_frequencies_of_both_axes_are_extrapolated_and_the_others_interpolated(frequencies):
    angles = extrapolation_angles((4, 6), 2, frequencies, 16).view(8, 12, 2, 4)  # of rows, of columns
    far, frequency = angles[5, 3], 10000.0 ** (-torch.arange(4) / 4)  # the highest first
    scale = torch.where(torch.arange(4) < frequencies, 1.0, 0.5)
    assert torch.allclose(far, torch.stack([5 * scale * frequency, 3 * scale * frequency]))


@pytest.mark.parametrize("factor", [2, 3])
def test_step_1_is_plain_generation_and_its_tokens_survive(factor):
    model, tokenizer = small_model(grid=(2, 3)), small_tokenizer()
    pictures, tokens = extrapolate(model, tokenizer, CLASSES, factor, generator=seeded(1))
    coarse = tokens.view(2, 2 * factor, 3 * factor)[:, ::factor, ::factor].flatten(1)
    plain = model.generate(CLASSES, "random", steps=-1, cfg=(3.0, 3.0), generator=seeded(1))
    assert torch.equal(coarse, plain) and tokens.min() >= 0 and tokens.max() < V
    assert pictures.shape == (2, 3, 2 * factor * F_, 3 * factor * F_)


def test_step_2_has_step_1_as_context_under_mixed_angles(model, tokenizer, generations):
    _, tokens = extrapolate(model, tokenizer, CLASSES, frequencies=1, scg=1.7, steps=4, generator=seeded(1))
    first, second = generations
    even = [16 * (i // 4) + 2 * (i % 4) for i in range(16)]
    assert "scg" not in first and "known" not in first and second["scg"] == 1.7
    assert first["order"].sort(dim=1).values[0].tolist() == even
    assert torch.equal(first["angles"], extrapolation_angles((4, 4), 2, 0, model.head_dim))
    assert second["known"][0].sort(dim=1).values[0].tolist() == even
    assert (second["known"][1] == tokens.gather(1, second["known"][0])).all()
    assert torch.equal(second["angles"], extrapolation_angles((4, 4), 2, 1, model.head_dim))


def test_without_the_hierarchical_order_all_is_decoded_in_one_go(model, tokenizer, generations):
    _, tokens = extrapolate(model, tokenizer, CLASSES, hierarchical=False, frequencies=0, scg=1.0, steps=5)
    [call] = generations
    assert call["order"].shape == (2, 64) and call["known"][0].shape == (2, 0) and tokens.min() >= 0
    assert torch.equal(call["angles"], extrapolation_angles((4, 4), 2, 0, model.head_dim))


@pytest.mark.parametrize("hierarchical", [True, False])
def test_factor_1_is_plain_generation(model, tokenizer, hierarchical):
    options = dict(cfg=(3.0, 3.0), scg=1.0, steps=6)
    _, tokens = extrapolate(model, tokenizer, CLASSES, 1, hierarchical, generator=seeded(2), **options)
    plain = model.generate(CLASSES, generator=seeded(2), **options)
    assert torch.equal(tokens, plain)


def test_guidance_needs_no_second_pass_through_the_network(model, tokenizer):
    seen = inputs_of(model.layers[0])
    extrapolate(model, tokenizer, CLASSES, steps=5, scg=2.5, cfg=(3.0, 3.0))
    assert [x.shape[0] for x in seen] == 5 * [2 * 2] + 5 * [3 * 2]  # CFG in step 1, Eq. B in step 2


def test_eq_b_with_both_weights_one_is_the_conditional_model():
    streams = [randar.FULL_CLASS, randar.FULL_NULL, randar.DROP_NULL]
    logits = torch.randn(3, 2, 4, V, generator=seeded(0))
    assert torch.allclose(randar.guided(streams, list(logits), 1.0, 1.0), logits[0], atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# All of them


@pytest.mark.parametrize("function", [
    lambda *models, generator: inpaint(*models, noise(), mask_of(*range(9)), CLASSES, generator=generator),
    lambda *models, generator: outpaint(*models, noise(), (5, 7), CLASSES, (1, 2), generator=generator),
    lambda *models, generator: outpaint_by_windows(*models, noise(), (5, 7), CLASSES, generator=generator),
    lambda *models, generator: extrapolate(*models, CLASSES, steps=6, generator=generator),
])
def test_the_same_seed_gives_the_same_result(model, tokenizer, function):
    (_, first), (_, again), (_, other) = (function(model, tokenizer, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_grid_of_another_shape_than_training_works_throughout(tokenizer):
    model, images = small_model(grid=(3, 5)), noise(8, 24)  # 2 x 6 tokens: fewer rows, more columns
    pictures, tokens = inpaint(model, tokenizer, images, mask_of(3, 4, grid=(2, 6)), CLASSES)
    assert pictures.shape == images.shape and tokens.shape == (2, 12)
    for function in (outpaint, outpaint_by_windows):
        pictures, tokens = function(model, tokenizer, images, (5, 7), CLASSES, (2, 1))
        assert pictures.shape == (2, 3, 20, 28) and tokens.min() >= 0
        assert (tokens.view(2, 5, 7)[:, 2:4, 1:7].flatten(1) == tokenizer.encode(images)).all()
    pictures, _ = extrapolate(model, tokenizer, CLASSES, steps=4)
    assert pictures.shape == (2, 3, 24, 40)


MISTAKES = [
    (lambda *m: inpaint(*m, noise(18, 17), mask_of(1), CLASSES), "18 x 17 pixels .*: crop it to 16 x 16"),
    (lambda *m: inpaint(*m, noise(3, 16), mask_of(1), CLASSES), "3 x 16 pixels .*: take a larger one"),
    (lambda *m: inpaint(*m, noise()[0], mask_of(1), CLASSES), r"expected images \[b, 3, H, W\]"),
    (lambda *m: inpaint(*m, noise(), mask_of(1)[:12], CLASSES), r"mask, .*\[12, 16\], .*size, 16 x 16"),
    (lambda *m: inpaint(*m, noise(), mask_of(1).expand(3, -1, -1), CLASSES), r"mask, .*\[3, 16, 16\]"),
    (lambda *m: inpaint(*m, noise(), mask_of(1).float(), CLASSES), "mask, torch.float32 .*give a bool one"),
    (lambda *m: inpaint(*m, noise(), torch.stack([mask_of(1), mask_of(1, 2)]), CLASSES),
     "must miss equally many tokens, not 1 to 2: give one mask for all"),
    (lambda *m: inpaint(*m, noise(), mask_of(1), torch.tensor([0, C + 1])), "classes must be from 0 to 5"),
    (lambda *m: inpaint(*m, noise(), mask_of(1), CLASSES[:1]), r"expected classes \[b\]"),
    (lambda *m: inpaint(*m, noise(), mask_of(1), CLASSES, steps=0), "steps must be at least 1"),
    (lambda *m: inpaint(*m, noise(), mask_of(1), CLASSES, order="zigzag"), "unknown order 'zigzag'"),
    (lambda *m: outpaint(*m, noise(), (3, 8), CLASSES), "grid of 3 x 8 tokens is smaller than"),
    (lambda *m: outpaint_by_windows(*m, noise(), (8, 3), CLASSES), "grid of 8 x 3 tokens is smaller"),
    (lambda *m: outpaint(*m, noise(), (6, 6), CLASSES, (0, 3)), "corner at 0, 3 does not fit into a grid"),
    (lambda *m: outpaint(*m, noise(), (6, 6), CLASSES, (-1, 0)), "corner at -1, 0 does not fit"),
    (lambda *m: extrapolate(*m, CLASSES, 0), "factor must be a whole number from 1 on, not 0"),
    (lambda *m: extrapolate(*m, CLASSES, 1.5), "factor must be a whole number from 1 on, not 1.5"),
    (lambda *m: extrapolate(*m, CLASSES, frequencies=5), "frequencies must be from 0 to 4, .* not 5"),
    (lambda *m: extrapolate(*m, CLASSES + 2), "classes must be from 0 to 5, not 3 to 6"),
]


@pytest.mark.parametrize("call, problem", MISTAKES)
def test_a_mistake_is_one_line(model, tokenizer, call, problem):
    with pytest.raises(ValueError, match=problem) as error:
        call(model, tokenizer)
    assert "\n" not in str(error.value)


def test_features_belong_to_the_applications_too():
    from apps import correspond, encode_features
    assert callable(correspond) and callable(encode_features)


# ------------------------------------------------------------------------------------------------------------
# The commands


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs a command line in this process, in a folder with a small model of no toy world."""
    save_randar(small_model(), tmp_path / "randar.pt", class_names=["cat", "dog", "cow", "hen", "pig"])
    save_tokenizer(small_tokenizer(), tmp_path / "tokenizer.pt")
    pixels = common.to_uint8(noise(16, 24))
    Image.fromarray(pixels[0]).save(tmp_path / "photo.png")
    Image.fromarray(pixels[1, :15, :22]).save(tmp_path / "odd.png")
    Image.fromarray(mask_of(3, 4, grid=(4, 6)).numpy()).save(tmp_path / "mask.png")
    Image.fromarray(mask_of(grid=(4, 6)).numpy()).save(tmp_path / "nothing.png")
    Image.fromarray(mask_of(*range(24), grid=(4, 6)).numpy()).save(tmp_path / "everything.png")
    Image.new("RGB", (80, 80)).save(tmp_path / "huge.png")
    (tmp_path / "text.png").write_text("no image")
    monkeypatch.chdir(tmp_path)

    def run(line):
        monkeypatch.setattr(sys, "argv", ["apps.py", *shlex.split(line)])
        apps.main()

    return run


PHOTO = "--ckpt randar.pt --image photo.png"


@pytest.mark.parametrize("line, rows", [
    (f"inpaint {PHOTO} --mask mask.png --class 3 --number 3 --paste", 5),
    (f"inpaint {PHOTO} --cfg 3 3 --scg 2 --steps 2 --order raster --top-k 5 --top-p 0.9 --temperature 2", 6),
    (f"edit {PHOTO} --mask mask.png --class hen --number 1", 3),
    (f"edit {PHOTO} --classes hen 0 --number 2", 6),
    (f"outpaint {PHOTO} --grid 5 8 --corner 1 0 --class pig --number 1", 3),
    ("extrapolate --ckpt randar.pt --factor 3 --frequencies 1 --class pig cow --number 3 --steps 3", 6),
])
def test_each_command_writes_one_picture_of_a_photograph(run, capsys, monkeypatch, line, rows):
    sheets, picture_grid = [], common.picture_grid
    monkeypatch.setattr(common, "picture_grid", lambda *a: sheets.append(a) or picture_grid(*a))
    run(line + " --out new/a.png")
    [(pixels, labels, title)] = sheets
    assert len(labels) == rows and len(pixels) % rows == 0 and "cfg" in title
    assert Image.open("new/a.png").width > 100 and "wrote new/a.png" in capsys.readouterr().out


def test_a_mask_with_nothing_to_do_or_nothing_to_know_is_allowed_and_said(run, capsys):
    run(f"inpaint {PHOTO} --mask nothing.png --number 1")
    assert "results are reconstructions" in capsys.readouterr().out
    run(f"inpaint {PHOTO} --mask everything.png --number 1")
    assert "nothing is known, the results are new pictures" in capsys.readouterr().out


WRONG = {
    "inpaint --ckpt randar.pt": "randar.pt does not know the toy world: give a picture, --image FILE",
    f"inpaint {PHOTO} --image nowhere.png": "No such file or directory: nowhere.png",
    f"inpaint {PHOTO} --image text.png": "cannot identify image file 'text.png'",
    f"inpaint {PHOTO} --image odd.png": "15 x 22 pixels .* not multiples of 4, .*: crop it to 12 x 20",
    f"inpaint {PHOTO} --mask odd.png": r"the mask, torch.bool \[15, 22\], .*size, 16 x 24",
    f"inpaint {PHOTO} --class bird": "no class 'bird': give a number from 0 to 4 or a name",
    f"edit {PHOTO} --classes 1 5": "no class '5': give a number from 0 to 4",
    f"inpaint {PHOTO} --number 0": "--number must be at least 1, not 0",
    f"inpaint {PHOTO} --steps 0": "steps must be at least 1",
    f"inpaint {PHOTO} --order zigzag": "unknown order 'zigzag'",
    f"outpaint {PHOTO} --grid 4 5": "grid of 4 x 5 tokens is smaller than the image, 4 x 6",
    f"outpaint {PHOTO} --corner 1 0": "corner at 1, 0 does not fit into a grid of 4 x 9",
    f"outpaint {PHOTO} --image huge.png": "20 x 20 tokens, where 4 x 4 were learnt, are many: reduce",
    "extrapolate --ckpt randar.pt --factor 0": "factor must be a whole number from 1 on, not 0",
    "extrapolate --ckpt randar.pt --frequencies 9": "frequencies must be from 0 to 4",
    "extrapolate --ckpt randar.pt --scg inf": "cfg must be two numbers",
    "outpaint --out a.bmp": "cannot write a picture as a.bmp",
    "inpaint --ckpt nowhere.pt": "no checkpoint at nowhere.pt",
    "paint": "invalid choice: 'paint'",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_mistake_on_the_command_line_is_one_line_with_exit_code_two(run, capsys, line):
    with pytest.raises(SystemExit) as stop:
        run(line)
    out, errors = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and errors.startswith(("error: ", "apps.py"))
    assert len(errors.splitlines()) == 1 and re.search(WRONG[line], errors), errors


# ------------------------------------------------------------------------------------------------------------
# With the weights that ship


@pytest.mark.parametrize("line", ["inpaint --number 1", "edit --number 1 --class fish", "outpaint --number 1",
                                  "extrapolate --steps 8 --number 2"])
def test_each_command_draws_its_own_example(run, capsys, line):
    run(line)
    said = capsys.readouterr().out
    assert f"wrote {line.split()[0]}.png" in said
    assert line[0] == "o" or "the judge sees the class asked for in" in said


def test_editing_keeps_the_background_and_changes_the_object():
    """The judge agrees with the new class in 97% of 400 pictures (README); here 100 of them have to do."""
    model = load_randar(common.CHECKPOINTS / "randar_toy.pt")
    tokenizer = load_tokenizer(common.CHECKPOINTS / "tokenizer.pt")
    pixels, classes, _ = toy.make(100, apps.EXAMPLES)
    images, classes = common.from_uint8(pixels), torch.from_numpy(classes)
    wanted = (classes + torch.randint(1, 10, (100,), generator=seeded(0))) % 10
    mask = F.pad(torch.ones(24, 24), (4, 4, 4, 4)) > 0
    edited, _ = inpaint(model, tokenizer, images, mask, wanted, generator=seeded(1))
    assert toy.judge(edited, wanted)["accuracy"] >= 0.8
    assert toy.judge(edited, classes)["accuracy"] < 0.1
    corners = np.ix_(range(100), range(3), (0, 31), (0, 31))
    assert abs(edited.numpy()[corners] - images.numpy()[corners]).mean() < 0.05
