"""Images <-> tokens as a specification: what goes in and comes out, what learns what, how well."""

import pytest
import torch
import torch.nn.functional as F
from helpers import V, seeded, small_tokenizer
from PIL import Image

import tokenizer
from support import border, judge, toy
from support.border import UserError
from support.pictures import from_uint8, psnr
from tokenizer import Codebook, TokenizerConfig, load_tokenizer, save_tokenizer


@pytest.fixture
def tok():
    """4 x 4 pixels a token, 32 codes of 4 numbers."""
    return small_tokenizer()


@pytest.fixture
def images():
    """[3, 3, 16, 24] in [-1, 1]: 4 x 6 tokens."""
    return torch.rand(3, 3, 16, 24, generator=seeded(0)) * 2 - 1


# --------------------------------------------------------------------------------------------------
# Images to tokens and back


@pytest.mark.parametrize("grid", [(4, 4), (4, 6)])
def test_a_square_of_pixels_becomes_a_token_and_a_token_a_square_of_pixels(tok, grid):
    h, w = grid
    tokens = tok.encode(torch.rand(3, 3, 4 * h, 4 * w, generator=seeded(0)) * 2 - 1)
    assert tokens.shape == (3, h * w) and tokens.dtype == torch.int64
    assert 0 <= tokens.min() < tokens.max() < V
    image = tok.decode(tokens, grid)
    assert image.shape == (3, 3, 4 * h, 4 * w) and image.dtype == torch.float32
    assert image.min() >= -1 and image.max() <= 1
    if h == w:
        assert torch.equal(tok.decode(tokens), image)


def test_tokens_are_in_raster_order(tok, images):
    encoder, decoder = tok.latents(images), []
    tok.decoder.register_forward_pre_hook(lambda _, inputs: decoder.append(inputs[0]))
    tokens = tok.encode(images)
    assert (tokens.view(3, 4, 6) == tok.quantize.nearest(encoder)).all()
    tok.decode(tokens, (4, 6))
    codes = tok.quantize.vectors(tokens).view(3, 4, 6, 4).permute(0, 3, 1, 2)
    assert torch.equal(decoder[0], tok.post_quant_conv(codes))


def test_images_that_tokens_do_not_fill_are_an_error(tok):
    with pytest.raises(UserError, match="H and W multiples of 4, got .* crop or resize"):
        tok.encode(torch.zeros(1, 3, 16, 18))


# --------------------------------------------------------------------------------------------------
# The codebook


@pytest.fixture
def codebook():
    torch.manual_seed(0)
    return Codebook(TokenizerConfig(codebook_size=V, code_dim=4))


def test_a_token_is_the_nearest_code_among_unit_vectors(codebook):
    z = torch.randn(5, 6, 7, 4, generator=seeded(1))
    z = z * torch.rand(5, 6, 7, 1, generator=seeded(2)) * 9
    codes = F.normalize(codebook.embedding.weight, dim=-1)
    distances = (F.normalize(z, dim=-1)[..., None, :] - codes).square().sum(-1)  # [5, 6, 7, V]
    assert (codebook.nearest(z) == distances.argmin(-1)).all()


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
    inputs = [z, codebook.embedding.weight]
    of_z, of_codes = torch.autograd.grad(codebook_loss, inputs, allow_unused=True,
                                         retain_graph=True)
    chosen = torch.zeros(V, dtype=torch.bool)
    chosen[tokens.flatten()] = True
    assert of_z is None and ((of_codes != 0).any(1) == chosen).all()
    of_z, of_codes = torch.autograd.grad(commitment_loss, inputs, allow_unused=True)
    assert of_codes is None and (of_z != 0).any(-1).all()


def test_the_error_of_the_picture_reaches_every_parameter_but_the_codes(tok, images):
    codes, tokens, _, _ = tok.quantize(tok.latents(images))
    painted = tok.paint(codes)
    assert painted.shape == images.shape and tokens.shape == (3, 4, 6)
    (painted - images).abs().mean().backward()
    unmoved = [name for name, p in tok.named_parameters() if p.grad is None or p.grad.norm() == 0]
    assert unmoved == ["quantize.embedding.weight"]


def test_dead_codes_are_moved_onto_given_vectors_and_live_ones_stay(codebook):
    before = codebook.embedding.weight.detach().clone()
    used = torch.arange(V) % 4 != 0  # eight dead codes
    latents = torch.randn(50, 4, generator=seeded(0))
    tokenizer.reseed_dead_codes(codebook, latents, used)
    after = codebook.embedding.weight.detach()
    assert torch.equal(after[used], before[used])
    latents = F.normalize(latents, dim=-1)
    matches = torch.isclose(after[~used, None], latents, atol=1e-6).all(-1)  # [8, 50]
    assert (matches.sum(1) == 1).all() and matches.any(0).sum() == 8  # each onto another


# --------------------------------------------------------------------------------------------------
# How good a reconstruction is


@pytest.mark.parametrize("error, decibels", [(0.2, 20), (0.02, 40), (2, 0), (0, 100)])
def test_psnr_is_that_of_pixels_from_zero_to_one(error, decibels):
    images = torch.full((2, 3, 8, 8), -1.0)
    assert psnr(images, images + error).tolist() == pytest.approx([decibels] * 2, abs=1e-3)


# --------------------------------------------------------------------------------------------------
# Files of ours; tests/test_released_tokenizers.py has those of others


def test_a_tokenizer_comes_back_as_it_was_rounded_to_half_precision(tok, images, tmp_path):
    save_tokenizer(tok, tmp_path / "tok.pt")
    loaded = load_tokenizer(tmp_path / "tok.pt")
    assert loaded.config == tok.config and not loaded.training
    for mine, read in zip(tok.parameters(), loaded.parameters(), strict=True):
        assert read.dtype == torch.float32 and torch.equal(read, mine.half().float())
    assert (loaded.encode(images) == tok.encode(images)).float().mean() > 0.9
    save_tokenizer(loaded, tmp_path / "again.pt")
    assert torch.equal(load_tokenizer(tmp_path / "again.pt").decode(loaded.encode(images), (4, 6)),
                       loaded.decode(loaded.encode(images), (4, 6)))


@pytest.mark.parametrize("content, problem", [
    ([1, 2], "holds no tokenizer"),
    ({"model": {"quantize.embedding.weight": torch.zeros(9, 9)}}, "does not fit")])
def test_a_file_that_is_no_tokenizer_is_an_error_in_one_line(tmp_path, content, problem):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(UserError, match=problem) as error:
        load_tokenizer(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and len(message) < 300 + len(str(path))


# --------------------------------------------------------------------------------------------------
# Training


def quality(tok, images):
    """PSNR of the reconstructions in dB."""
    return psnr(images, tok.decode(tok.encode(images))).mean().item()


def test_a_few_steps_of_training_make_better_pictures(tok, tmp_path):
    pixels = toy.make(100, seed=5)[0][:, -16:, -16:]  # corners of toy pictures
    images = from_uint8(pixels[:20])  # [20, 3, 16, 16]
    torch.manual_seed(0)
    tokenizer.train_tokenizer(tok, pixels[20:], pixels[:20], 60, tmp_path / "tok.pt", batch_size=16)
    learnt = quality(tok, images)
    assert learnt > quality(small_tokenizer(), images) + 4
    written = quality(load_tokenizer(tmp_path / "tok.pt"), images)
    assert written == pytest.approx(learnt, abs=0.5)  # what was written is what was learnt


def test_asked_to_stop_it_keeps_what_was_learnt(tok, tmp_path):
    pixels = toy.make(30, seed=5)[0][:, -16:, -16:]
    tokenizer.train_tokenizer(tok, pixels, pixels[:5], 1000, tmp_path / "tok.pt", stop=[1])
    assert load_tokenizer(tmp_path / "tok.pt").config == tok.config
    assert [path.name for path in tmp_path.iterdir()] == ["tok.pt"]


def test_a_training_that_diverges_keeps_what_was_saved_before(tok, tmp_path):
    save_tokenizer(tok, tmp_path / "tok.pt")
    before = (tmp_path / "tok.pt").read_bytes()
    with torch.no_grad():
        tok.decoder[0].weight.fill_(torch.nan)
    pixels = toy.make(30, seed=5)[0][:, -16:, -16:]
    with pytest.raises(UserError, match="diverged"):
        tokenizer.train_tokenizer(tok, pixels, pixels[:5], 1, tmp_path / "tok.pt", batch_size=2)
    assert (tmp_path / "tok.pt").read_bytes() == before


LEARN = "tokenizer.py train --steps 1 --out new/tok.pt"


def test_the_command_learns_from_a_folder_and_shows_what_it_learnt(here, run, capsys):
    run(f"{LEARN} --data photos --image-size 16")
    assert load_tokenizer("new/tok.pt").config == TokenizerConfig(image_size=16)
    assert Image.open("new/tok.png").width > 100
    assert "wrote new/tok.pt" in capsys.readouterr().out


@pytest.mark.parametrize("options, world, side", [("", "plain", 32), ("--data fine", "fine", 64)])
def test_the_command_learns_a_drawn_world(here, run, monkeypatch, options, world, side):
    drawn, make = [], toy.make

    def few(n, seed, world):
        drawn.append((n, seed, world))
        return make(4, seed, world)

    monkeypatch.setattr(toy, "make", few)
    monkeypatch.setattr(tokenizer, "train_tokenizer",
                        lambda untrained, images, validation, steps, out, **_: save_tokenizer(untrained, out))
    run(f"{LEARN} {options}")
    assert load_tokenizer("new/tok.pt").config == TokenizerConfig(image_size=side)
    assert drawn == [(40_000, 1, world), (250, 2, world)]


def test_a_size_that_tokens_do_not_fill_is_one_line(here, run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(f"{LEARN} --data photos --image-size 18")
    assert "multiples of 4" in capsys.readouterr().err.splitlines()[-1]


# --------------------------------------------------------------------------------------------------
# The tokenizer that ships


def test_the_shipped_tokenizer_reaches_29_decibels_on_fresh_images_and_the_judge_knows_them():
    pixels, classes, _ = toy.make(200, seed=20_241_201)
    images, shipped = from_uint8(pixels), load_tokenizer(border.CHECKPOINTS / "tokenizer.pt")
    painted = shipped.decode(shipped.encode(images))
    assert psnr(images, painted).mean() >= 29
    assert judge.judge(painted, torch.from_numpy(classes))["accuracy"] >= 0.98
