"""Tokenizers that others released load as they are; and classes have ImageNet's names.

The files here have the released names and shapes, and made-up numbers; the expected tokens and
pixels were computed with the released code.
"""

import json

import numpy as np
import pytest
import torch
from golden import fill
from helpers import GOLDEN, V, seeded

from support.border import UserError
from support.classes import names_of_classes, parse_classes, spread_classes
from tokenizer import (LLAMAGEN_VQ16, MASKGIT_VQ16, Codebook, ResidualBlock, Tokenizer,
                       TokenizerConfig, load_tokenizer, save_tokenizer)

SHAPES = json.loads((GOLDEN / "state_dict_shapes.json").read_text())
CONFIGS = {"llamagen_vq16": LLAMAGEN_VQ16, "maskgit_vq16": MASKGIT_VQ16}


def write_tokenizer(name, path):
    """A file with the names, shapes and structure of the released one."""
    state = fill.state_for(SHAPES[name])
    torch.save({"model": state} if name == "llamagen_vq16" else state, path)
    return path


# --------------------------------------------------------------------------------------------------
# Tokenizers: full size, against the released code


@pytest.fixture(scope="module", params=CONFIGS)
def released(request, tmp_path_factory):
    """(name, the tokenizer that load_tokenizer makes of a full-size file)."""
    path = write_tokenizer(request.param, tmp_path_factory.mktemp("released") / "tokenizer")
    tokenizer = load_tokenizer(path)
    path.unlink()  # 288 and 218 MB
    return request.param, tokenizer


def test_a_released_file_is_told_by_its_contents(released):
    name, tokenizer = released
    assert tokenizer.config == CONFIGS[name] and not tokenizer.training
    assert tokenizer.config.downsampling == 16 and tokenizer.config.image_size == 256
    assert tokenizer.config.codebook_size == {"llamagen_vq16": 16384, "maskgit_vq16": 1024}[name]


def test_tokens_and_pixels_are_those_of_the_released_code(released):
    name, tokenizer = released
    golden = np.load(GOLDEN / f"{name}.npz")
    images = torch.from_numpy(golden["image01"]) * 2 - 1
    assert (tokenizer.encode(images).numpy() == golden["tokens"]).all()
    with torch.no_grad():
        codes = tokenizer.quantize.vectors(torch.from_numpy(golden["tokens"]).view(2, 4, 4))
        decoded = tokenizer.paint(codes).numpy()  # not cut off at black and white
    if name == "maskgit_vq16":
        decoded = (decoded + 1) / 2  # the released code has pixels in [0, 1]
    assert abs(decoded - golden["decoded"]).max() < 1e-3 * abs(golden["decoded"]).max()


# --------------------------------------------------------------------------------------------------
# What is different in MaskGIT's


@pytest.fixture
def maskgit():
    """4 x 4 pixels a token, 32 codes of 8 numbers."""
    torch.manual_seed(0)
    return Tokenizer(TokenizerConfig(8, (1, 1, 2), 2, 8, V, code_dim=8, maskgit=True)).eval()


def test_its_token_is_the_nearest_code_however_long_the_codes_are():
    torch.manual_seed(0)
    codebook = Codebook(TokenizerConfig(codebook_size=V, code_dim=4, maskgit=True))
    codebook.embedding.weight.data *= torch.rand(V, 1) * 9
    z = torch.randn(5, 6, 7, 4) * 9
    distances = (z[..., None, :] - codebook.embedding.weight).square().sum(-1)  # [5, 6, 7, V]
    assert (codebook.nearest(z) == distances.argmin(-1)).all()
    nearest = codebook.embedding(distances.argmin(-1))
    assert torch.equal(codebook.vectors(codebook.nearest(z)), nearest)


@pytest.mark.parametrize("maskgit", [False, True])
def test_neighbours_are_not_confused_where_other_products_are_rounded(maskgit):
    torch.manual_seed(0)
    codebook = Codebook(TokenizerConfig(codebook_size=1000, maskgit=maskgit))
    z = torch.randn(1000, 8)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = codebook.nearest(z)
    assert (rounded == codebook.nearest(z)).all()


def test_its_networks_see_black_as_zero_and_white_as_one(maskgit):
    seen, painted = [], torch.rand(1, 3, 8, 8, generator=seeded(0))
    maskgit.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    maskgit.decoder.register_forward_hook(lambda *_: painted)
    images = torch.stack([torch.full((3, 8, 8), value) for value in (-1.0, 0.0, 1.0)])
    maskgit.encode(images)
    assert [image.unique().tolist() for image in seen[0]] == [[0], [0.5], [1]]
    assert torch.allclose(maskgit.decode(torch.zeros(1, 4, dtype=torch.int64)), painted * 2 - 1)


def test_where_channels_change_a_block_takes_the_shortcut_of_its_own_output():
    torch.manual_seed(0)
    block, x = ResidualBlock(8, 16, maskgit=True), torch.randn(2, 8, 4, 4)
    weight = block.nin_shortcut.weight.data
    block.nin_shortcut.weight.data = torch.zeros_like(weight)
    y = block(x)
    block.nin_shortcut.weight.data = weight
    mixed = torch.einsum("oi,bihw->bohw", weight[..., 0, 0], y)
    assert torch.allclose(block(x), y + mixed, atol=1e-6)


def test_it_can_be_kept_in_half_precision_like_ours(maskgit, tmp_path):
    images = torch.rand(2, 3, 16, 24, generator=seeded(0)) * 2 - 1
    save_tokenizer(maskgit, tmp_path / "half.pt")
    loaded = load_tokenizer(tmp_path / "half.pt")
    assert loaded.config == maskgit.config
    tokens = maskgit.encode(images)
    assert (loaded.encode(images) == tokens).float().mean() > 0.9
    assert abs(loaded.decode(tokens, (4, 6)) - maskgit.decode(tokens, (4, 6))).max() < 0.02


# --------------------------------------------------------------------------------------------------
# Classes by name


IMAGENET = names_of_classes(None, 1000)


def test_the_names_are_those_of_imagenets_thousand_classes():
    names, wordnet_ids = zip(*IMAGENET)
    assert len(set(wordnet_ids)) == 1000 and sorted(wordnet_ids) == list(wordnet_ids)
    assert (names[0], names[207], names[999]) == ("tench", "golden retriever", "toilet tissue")


@pytest.mark.parametrize("word", ["207", "golden retriever", "golden_retriever", "Golden-Retriever",
                                  "n02099601"])
def test_a_class_can_be_called_by_its_number_name_or_wordnet_id(word):
    assert parse_classes(["360", word], IMAGENET) == [360, 207]


@pytest.mark.parametrize("word, complaint", [
    ("crane", "'crane' is the name of the classes 134 and 517: give the number"),
    ("maillot", "classes 638 and 639"),
    ("1000", "no class '1000': give a number from 0 to 999 or a name"),
    ("goldfsh", "no class 'goldfsh': .*goldfish"),
    ("retriever", r"\(.*golden retriever.*Labrador retriever.*\)$")])
def test_a_name_that_is_unclear_or_unknown_is_an_error_that_helps(word, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_classes([word], IMAGENET)


def test_folders_of_imagenet_and_packed_tokens_get_readable_names():
    assert names_of_classes(["n02099601", "n02444819"], 2) == [("golden retriever", "n02099601"),
                                                               ("otter", "n02444819")]
    in_folder_order = sorted(map(str, range(1000)))  # "0", "1", "10", "100", ...
    names = names_of_classes(in_folder_order, 1000)
    assert names[2][0] == IMAGENET[10][0] and parse_classes(["10", "brambling"], names) == [2, 2]


def test_eight_of_each_of_ten_classes_are_spread_over_all():
    classes = spread_classes(range(1000))
    assert classes.tolist() == [100 * i for i in range(10) for _ in range(8)]
    assert spread_classes([3, 5], columns=2).tolist() == [3, 3, 5, 5]
