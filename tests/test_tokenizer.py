"""Images <-> tokens as a specification: what goes in, what comes out, what learns what, and how well."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import V, seeded, small_model, small_tokenizer, write_images
from PIL import Image

import common
import tokenizer
import toy
from randar import save_randar
from tokenizer import psnr
from vqgan import Codebook, Tokenizer, TokenizerConfig, load_tokenizer, save_tokenizer


@pytest.fixture
def tok():
    """4 x 4 pixels a token, 32 codes of 4 numbers."""
    return small_tokenizer()


@pytest.fixture
def images():
    """[3, 3, 16, 24] in [-1, 1]: 4 x 6 tokens."""
    return torch.rand(3, 3, 16, 24, generator=seeded(0)) * 2 - 1


# ------------------------------------------------------------------------------------------------------------
# Images to tokens and back


@pytest.mark.parametrize("height, width", [(16, 16), (16, 24), (8, 4), (40, 40)])
def test_an_image_becomes_one_token_for_each_square_of_pixels(tok, height, width):
    tokens = tok.encode(torch.rand(3, 3, height, width, generator=seeded(0)) * 2 - 1)
    assert tokens.shape == (3, height // 4 * width // 4) and tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < V and tokens.unique().numel() > 1


@pytest.mark.parametrize("grid", [(4, 4), (4, 6), (2, 1), (10, 10)])
def test_tokens_become_an_image_of_the_grid(tok, grid):
    tokens = torch.randint(V, (3, grid[0] * grid[1]), generator=seeded(0))
    image = tok.decode(tokens, grid)
    assert image.shape == (3, 3, 4 * grid[0], 4 * grid[1]) and image.dtype == torch.float32
    assert image.min() >= -1 and image.max() <= 1
    if grid[0] == grid[1]:
        assert torch.equal(tok.decode(tokens), image)


def test_pixels_beyond_black_and_white_are_cut_off(tok):
    tok.decoder.conv_out.bias.data = torch.tensor([9.0, -9.0, 0.0])
    red, green, _ = tok.decode(torch.zeros(1, 16, dtype=torch.int64))[0]
    assert (red == 1).all() and (green == -1).all()


def test_tokens_are_in_raster_order(tok, images):
    encoder, decoder = tok.latents(images), []
    tok.decoder.register_forward_pre_hook(lambda _, inputs: decoder.append(inputs[0]))
    tokens = tok.encode(images)
    assert (tokens.view(3, 4, 6) == tok.quantize.nearest(encoder)).all()
    tok.decode(tokens, (4, 6))
    codes = tok.quantize.vectors(tokens).view(3, 4, 6, 4).permute(0, 3, 1, 2)
    assert torch.equal(decoder[0], tok.post_quant_conv(codes))


def test_an_image_does_not_depend_on_the_others(tok, images):
    assert (tok.encode(images)[:1] == tok.encode(images[:1])).all()


def test_encoding_and_decoding_keep_no_graph_for_gradients(tok, images):
    assert not tok.decode(tok.encode(images), (4, 6)).requires_grad


@pytest.mark.parametrize("shape", [(1, 3, 16, 18), (1, 3, 15, 16), (1, 1, 16, 16), (3, 16, 16)])
def test_images_that_tokens_do_not_fill_are_an_error(tok, shape):
    with pytest.raises(ValueError, match="H and W multiples of 4.*crop or resize"):
        tok.encode(torch.zeros(shape))


@pytest.mark.parametrize("number, grid", [(15, None), (24, None), (16, (4, 5)), (24, (4, 4))])
def test_tokens_that_do_not_fill_the_grid_are_an_error(tok, number, grid):
    with pytest.raises(ValueError, match=f"{number} tokens do not fill .* give the grid"):
        tok.decode(torch.zeros(1, number, dtype=torch.int64), grid)


# ------------------------------------------------------------------------------------------------------------
# The codebook


@pytest.fixture
def codebook():
    torch.manual_seed(0)
    return Codebook(V, 4)


def test_a_token_is_the_nearest_code_among_unit_vectors(codebook):
    z = torch.randn(5, 6, 7, 4, generator=seeded(1)) * torch.rand(5, 6, 7, 1, generator=seeded(2)) * 9
    codes = F.normalize(codebook.embedding.weight, dim=-1)
    distances = (F.normalize(z, dim=-1)[..., None, :] - codes).square().sum(-1)  # [5, 6, 7, V]
    assert (codebook.nearest(z) == distances.argmin(-1)).all()


def test_codes_are_unit_vectors_and_their_own_nearest(codebook):
    vectors = codebook.vectors(torch.arange(V))
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(V))
    assert (codebook.nearest(3 * vectors) == torch.arange(V)).all()


def test_the_decoder_gets_codes_and_the_encoder_gradients_as_if_nothing_had_been_rounded(codebook):
    z = torch.randn(2, 3, 3, 4, generator=seeded(1)).requires_grad_()
    weight = torch.randn(2, 3, 3, 4, generator=seeded(2))
    codes, tokens, _, _ = codebook(z)
    assert torch.allclose(codes, codebook.vectors(tokens), atol=1e-6)
    gradient, of_codes = torch.autograd.grad((codes * weight).sum(), [z, codebook.embedding.weight],
                                             allow_unused=True)
    not_rounded, = torch.autograd.grad((F.normalize(z, dim=-1) * weight).sum(), [z])
    assert torch.allclose(gradient, not_rounded) and of_codes is None


def test_one_loss_moves_codes_to_vectors_and_the_other_vectors_to_codes(codebook):
    z = torch.randn(2, 3, 3, 4, generator=seeded(1)).requires_grad_()
    codes, tokens, codebook_loss, commitment_loss = codebook(z)
    distance = (F.normalize(z, dim=-1) - codebook.vectors(tokens)).square().mean()
    assert torch.isclose(codebook_loss, distance) and torch.isclose(commitment_loss, distance)
    of_z, of_codes = torch.autograd.grad(codebook_loss, [z, codebook.embedding.weight], allow_unused=True,
                                         retain_graph=True)
    chosen = torch.zeros(V, dtype=torch.bool)
    chosen[tokens.flatten()] = True
    assert of_z is None and ((of_codes != 0).any(1) == chosen).all()
    of_z, of_codes = torch.autograd.grad(commitment_loss, [z, codebook.embedding.weight], allow_unused=True)
    assert of_codes is None and (of_z != 0).any(-1).all()


def test_the_error_of_the_picture_reaches_every_parameter_but_the_codes(tok, images):
    painted, tokens, codebook_loss, commitment_loss = tok(images)
    assert painted.shape == images.shape and tokens.shape == (3, 4, 6)
    (painted - images).abs().mean().backward()
    unmoved = [name for name, p in tok.named_parameters() if p.grad is None or p.grad.norm() == 0]
    assert unmoved == ["quantize.embedding.weight"]


def test_dead_codes_are_moved_onto_given_vectors_and_live_ones_stay(tok):
    before = tok.quantize.embedding.weight.detach().clone()
    used = torch.arange(V) % 4 != 0  # eight dead codes
    latents = torch.randn(50, 4, generator=seeded(0))
    tokenizer.reseed_dead_codes(tok, latents, used)
    after = tok.quantize.embedding.weight.detach()
    assert torch.equal(after[used], before[used])
    matches = torch.isclose(after[~used, None], F.normalize(latents, dim=-1), atol=1e-6).all(-1)  # [8, 50]
    assert (matches.sum(1) == 1).all() and matches.any(0).sum() == 8  # each onto another


def test_with_more_dead_codes_than_vectors_each_vector_gets_one(tok):
    before = tok.quantize.embedding.weight.detach().clone()
    tokenizer.reseed_dead_codes(tok, torch.ones(3, 4), torch.zeros(V, dtype=torch.bool))
    assert (tok.quantize.embedding.weight != before).any(1).sum() == 3


# ------------------------------------------------------------------------------------------------------------
# How good a reconstruction is


@pytest.mark.parametrize("error, decibels", [(0.2, 20), (0.02, 40), (2, 0), (0, 100)])
def test_psnr_is_that_of_pixels_from_zero_to_one(error, decibels):
    images = torch.full((2, 3, 8, 8), -1.0)
    assert torch.allclose(psnr(images, images + error), torch.full((2,), float(decibels)), atol=1e-3)


def test_psnr_is_of_each_image_and_of_what_can_be_shown():
    images = torch.ones(2, 3, 8, 8)
    values = psnr(images, torch.stack([images[0] - 0.2, images[1] + 5]))  # brighter than white is white
    assert values.tolist() == pytest.approx([20, 100], abs=1e-3)


def test_measure_is_the_mean_psnr_and_the_share_of_codes_in_use(tok, images):
    tokens = tok.encode(images)
    quality, use = tokenizer.measure(tok, images)
    assert quality == pytest.approx(psnr(images, tok.decode(tokens, (4, 6))).mean().item(), abs=1e-4)
    assert use == tokens.unique().numel() / V


# ------------------------------------------------------------------------------------------------------------
# Files of ours; tests/test_released.py has those of others


def test_a_tokenizer_comes_back_as_it_was_rounded_to_half_precision(tok, images, tmp_path):
    save_tokenizer(tok, tmp_path / "tok.pt")
    loaded = load_tokenizer(tmp_path / "tok.pt")
    assert loaded.config == tok.config and not loaded.training
    for (name, mine), read in zip(tok.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert read.dtype == torch.float32 and torch.equal(read, mine.half().float()), name
    assert (loaded.encode(images) == tok.encode(images)).float().mean() > 0.9
    save_tokenizer(loaded, tmp_path / "again.pt")
    assert torch.equal(load_tokenizer(tmp_path / "again.pt").decode(loaded.encode(images), (4, 6)),
                       loaded.decode(loaded.encode(images), (4, 6)))


def complaint(path, kind=ValueError):
    """What load_tokenizer says about a file it cannot load; one line that names it."""
    with pytest.raises(kind) as error:
        load_tokenizer(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and len(message) < 300 + len(str(path))
    return message


def test_a_missing_or_truncated_tokenizer_is_named(tok, tmp_path):
    assert "no checkpoint at" in complaint(tmp_path / "nothing.pt", FileNotFoundError)
    save_tokenizer(tok, tmp_path / "tok.pt")
    content = (tmp_path / "tok.pt").read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 9):
        (tmp_path / "tok.pt").write_bytes(content[:length])
        assert "truncated" in complaint(tmp_path / "tok.pt")


def test_a_file_that_holds_no_tokenizer_is_named(tmp_path):
    save_randar(small_model(), tmp_path / "randar.pt")
    assert "holds no tokenizer: give a file that" in complaint(tmp_path / "randar.pt")
    for content in ({}, [1, 2], torch.zeros(3), {"model": torch.zeros(3)}):
        torch.save(content, tmp_path / "other.pt")
        assert "holds no tokenizer" in complaint(tmp_path / "other.pt")


def test_a_tokenizer_of_another_shape_is_named(tok, tmp_path):
    save_tokenizer(tok, tmp_path / "tok.pt")
    content = torch.load(tmp_path / "tok.pt", weights_only=True)
    torch.save(content | {"config": content["config"] | {"codes": V + 1}}, tmp_path / "other.pt")
    assert "does not fit its tokenizer" in complaint(tmp_path / "other.pt")
    torch.save({"model": {"quantize.embedding.weight": torch.zeros(9, 9)}}, tmp_path / "other.pt")
    assert "does not fit its tokenizer" in complaint(tmp_path / "other.pt")
    torch.save(content | {"config": {"colour": 3}}, tmp_path / "other.pt")
    assert "does not fit its tokenizer" in complaint(tmp_path / "other.pt")


# ------------------------------------------------------------------------------------------------------------
# Training


def train_small(out, steps=30):
    """A small tokenizer after some steps on toy images: (tokenizer, what train_tokenizer returned)."""
    torch.manual_seed(0)
    np.random.seed(0)
    tok = Tokenizer(TokenizerConfig(channels=8, codes=64, latent_channels=16))
    images, validation = toy.make(200, seed=5)[0], toy.make(50, seed=6)[0]
    return tok, tokenizer.train_tokenizer(tok, images, validation, steps, out, batch_size=16)


def test_a_few_steps_of_training_make_better_pictures(tmp_path):
    validation = common.from_uint8(toy.make(50, seed=6)[0])
    _, (after_one, _) = train_small(tmp_path / "tok.pt", steps=1)
    tok, (quality, use) = train_small(tmp_path / "tok.pt", steps=60)
    assert quality > after_one + 4 and 0 < use <= 1
    assert tokenizer.measure(tok, validation)[0] == pytest.approx(quality, abs=0.01)
    written, _ = tokenizer.measure(load_tokenizer(tmp_path / "tok.pt"), validation)
    assert written == pytest.approx(quality, abs=0.5)  # what was written is what was learnt


def test_ctrl_c_keeps_what_was_learnt(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer.nn.utils, "clip_grad_norm_", interrupt)
    tok, _ = train_small(tmp_path / "tok.pt")
    assert "stopped after 0 of 30 steps; what was learnt is in" in capsys.readouterr().out
    assert load_tokenizer(tmp_path / "tok.pt").config == tok.config
    assert [path.name for path in tmp_path.iterdir()] == ["tok.pt"]


@pytest.mark.parametrize("number", [2, 45])
def test_the_command_learns_from_a_folder_and_shows_what_it_learnt(tmp_path, monkeypatch, capsys, number):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    for i, image in enumerate(toy.make(number, seed=7)[0]):
        Image.fromarray(image).save(tmp_path / "photos" / "cat" / f"{i}.png")
    out = tmp_path / "new" / "tok.pt"
    options = ["--data", tmp_path / "photos", "--steps", 1, "--image-size", 16, "--out", out]
    monkeypatch.setattr(sys, "argv", ["tokenizer.py", "train", *map(str, options)])
    tokenizer.main()
    assert load_tokenizer(out).config == TokenizerConfig(image_size=16)
    assert Image.open(out.with_suffix(".png")).width > 100
    assert "validation PSNR" in capsys.readouterr().out


def test_one_image_is_too_few_to_learn_from_and_to_validate_on(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "photos", names=("cat",), number=1)
    monkeypatch.setattr(sys, "argv", ["tokenizer.py", "train", "--data", str(tmp_path / "photos"),
                                      "--out", str(tmp_path / "tok.pt")])
    with pytest.raises(SystemExit, match="2"):
        tokenizer.main()
    assert "photos has one readable image: one to learn from and one" in capsys.readouterr().err
    assert not (tmp_path / "tok.pt").exists()


# ------------------------------------------------------------------------------------------------------------
# The tokenizer that ships


@pytest.fixture(scope="module")
def reconstructed():
    """500 fresh toy images, their reconstructions, and their classes."""
    pixels, classes, _ = toy.make(500, seed=20_241_201)
    images, shipped = common.from_uint8(pixels), load_tokenizer(common.CHECKPOINTS / "tokenizer.pt")
    return images, shipped.decode(shipped.encode(images)), torch.from_numpy(classes)


def test_the_shipped_tokenizer_is_that_of_the_toy_world():
    assert load_tokenizer(common.CHECKPOINTS / "tokenizer.pt").config == TokenizerConfig()
    assert TokenizerConfig().image_size == toy.SIDE and TokenizerConfig().downsampling == 4


def test_the_shipped_tokenizer_reaches_29_decibels_on_fresh_images(reconstructed):
    images, painted, _ = reconstructed
    assert psnr(images[:200], painted[:200]).mean() >= 29


def test_the_judge_recognises_what_went_through_the_shipped_tokenizer(reconstructed):
    _, painted, classes = reconstructed
    assert toy.judge(painted, classes)["accuracy"] >= 0.98
