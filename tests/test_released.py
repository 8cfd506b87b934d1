"""Files that others released: tokenizers and weights load as they are, and the whole path goes through them.

The files here have the released names and shapes (the command's tests: the same with a quarter of the
channels), and made-up numbers; the expected tokens and pixels were computed with the released code.
"""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden import fill
from helpers import GOLDEN, V, seeded, small_model
from PIL import Image

import common
import vqgan
from randar import load_randar, save_randar
from sample import names_of_classes, parse_classes
from vqgan import (LLAMAGEN_VQ16, MASKGIT_VQ16, Codebook, MaskGITBlock, MaskGITCodebook, MaskGITTokenizer,
                   Tokenizer, TokenizerConfig, load_tokenizer, save_tokenizer)

SHAPES = json.loads((GOLDEN / "state_dict_shapes.json").read_text())
KINDS = {"llamagen_vq16": (Tokenizer, LLAMAGEN_VQ16), "maskgit_vq16": (MaskGITTokenizer, MASKGIT_VQ16)}


def write_tokenizer(name, path, channels=lambda n: n):
    """A file with the names, shapes and structure of the released one; channels: changes numbers of them."""
    shapes = {key: [channels(n) for n in shape] for key, shape in SHAPES[name].items()}
    state = {key: x.float() for key, x in fill.state_for(shapes).items()}
    torch.save({"model": state} if name == "llamagen_vq16" else state, path)
    return path


# ------------------------------------------------------------------------------------------------------------
# Tokenizers: full size, against the released code


@pytest.fixture(scope="module", params=KINDS)
def released(request, tmp_path_factory):
    """(name, the tokenizer that load_tokenizer makes of a full-size file)."""
    path = write_tokenizer(request.param, tmp_path_factory.mktemp("released") / "tokenizer")
    tokenizer = load_tokenizer(path)
    path.unlink()  # 288 and 218 MB
    return request.param, tokenizer


def test_a_released_file_is_told_by_its_contents(released):
    name, tokenizer = released
    assert (type(tokenizer), tokenizer.config) == KINDS[name] and not tokenizer.training
    assert tokenizer.config.downsampling == 16 and tokenizer.config.image_size == 256
    assert tokenizer.config.codes == {"llamagen_vq16": 16384, "maskgit_vq16": 1024}[name]


def test_tokens_and_pixels_are_those_of_the_released_code(released):
    name, tokenizer = released
    golden = np.load(GOLDEN / f"{name}.npz")
    assert (tokenizer.encode(torch.from_numpy(golden["image01"]) * 2 - 1).numpy() == golden["tokens"]).all()
    with torch.no_grad():
        codes = tokenizer.quantize.vectors(torch.from_numpy(golden["tokens"]).view(2, 4, 4))
        decoded = tokenizer.paint(codes).numpy()  # not cut off at black and white
    if name == "maskgit_vq16":
        decoded = (decoded + 1) / 2  # the released code has pixels in [0, 1]
    assert abs(decoded - golden["decoded"]).max() < 1e-3 * abs(golden["decoded"]).max()


@pytest.mark.parametrize("size", [(256, 250), (24, 32)])
def test_sides_that_are_no_multiples_of_sixteen_are_an_error(released, size):
    with pytest.raises(ValueError, match="H and W multiples of 16.*crop or resize"):
        released[1].encode(torch.zeros(1, 3, *size))


# ------------------------------------------------------------------------------------------------------------
# What is different in MaskGIT's


@pytest.fixture
def maskgit():
    """4 x 4 pixels a token, 32 codes of 8 numbers."""
    torch.manual_seed(0)
    return MaskGITTokenizer(TokenizerConfig(8, (1, 1, 2), 2, latent_channels=8, codes=V, code_dim=8)).eval()


def test_its_token_is_the_nearest_code_however_long_the_codes_are():
    torch.manual_seed(0)
    codebook = MaskGITCodebook(V, 4)
    codebook.embedding.weight.data *= torch.rand(V, 1) * 9
    z = torch.randn(5, 6, 7, 4) * 9
    distances = (z[..., None, :] - codebook.embedding.weight).square().sum(-1)  # [5, 6, 7, V]
    assert (codebook.nearest(z) == distances.argmin(-1)).all()
    assert torch.equal(codebook.vectors(codebook.nearest(z)), codebook.embedding(distances.argmin(-1)))


@pytest.mark.parametrize("kind", [Codebook, MaskGITCodebook])
def test_neighbours_are_not_confused_where_other_products_are_rounded(kind):
    torch.manual_seed(0)
    codebook, z = kind(1000, 8), torch.randn(1000, 8)
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
    block, x = MaskGITBlock(8, 16), torch.randn(2, 8, 4, 4)
    y, weight = block.branch(x), block.nin_shortcut.weight[..., 0, 0]
    assert torch.allclose(block(x), y + torch.einsum("oi,bihw->bohw", weight, y), atol=1e-6)
    same, x = MaskGITBlock(8, 8), torch.randn(2, 8, 4, 4)
    assert torch.equal(same(x), same.branch(x) + x)


def test_it_can_be_kept_in_half_precision_like_ours(maskgit, tmp_path):
    images = torch.rand(2, 3, 16, 24, generator=seeded(0)) * 2 - 1
    save_tokenizer(maskgit, tmp_path / "half.pt")
    loaded = load_tokenizer(tmp_path / "half.pt")
    assert isinstance(loaded, MaskGITTokenizer) and loaded.config == maskgit.config
    tokens = maskgit.encode(images)
    assert (loaded.encode(images) == tokens).float().mean() > 0.9
    assert abs(loaded.decode(tokens, (4, 6)) - maskgit.decode(tokens, (4, 6))).max() < 0.02


# ------------------------------------------------------------------------------------------------------------
# Classes by name


IMAGENET = names_of_classes(None, 1000)


def test_the_names_are_those_of_imagenets_thousand_classes():
    wordnet_ids = [wordnet for _, wordnet in IMAGENET]
    assert len(set(wordnet_ids)) == 1000 and wordnet_ids == sorted(wordnet_ids)
    assert [IMAGENET[i][0] for i in (0, 207, 360, 999)] == ["tench", "golden retriever", "otter",
                                                            "toilet tissue"]


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
    with pytest.raises(ValueError, match=complaint):
        parse_classes([word], IMAGENET)


def test_folders_of_imagenet_and_packed_tokens_get_readable_names():
    assert names_of_classes(["n02099601", "n02444819"], 2) == [("golden retriever", "n02099601"),
                                                               ("otter", "n02444819")]
    in_folder_order = sorted(map(str, range(1000)))  # "0", "1", "10", "100", ...
    names = names_of_classes(in_folder_order, 1000)
    assert names[2][0] == IMAGENET[10][0] and parse_classes(["10", "brambling"], names) == [2, 2]


def test_other_names_stay_as_they_are():
    assert names_of_classes(["fish", "5"], 2) == [("fish",), ("5",)]
    assert names_of_classes(None, 2) == [("class 0",), ("class 1",)]


# ------------------------------------------------------------------------------------------------------------
# The whole path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with released tokenizers of a quarter of the channels, and small RandARs for them."""
    folder = tmp_path_factory.mktemp("downloads")
    for name, file in (("llamagen_vq16", "vq_ds16_c2i.pt"),
                       ("maskgit_vq16", "maskgit-vqgan-imagenet-f16-256.bin")):
        write_tokenizer(name, folder / file, channels=lambda n: n // 4 if n in (128, 256, 512) else n)
    for codes in (1024, 16384):
        model = small_model(grid=(16, 16), dim=128, n_head=2, vocab_size=codes, num_classes=1000)
        torch.save(model.state_dict(), folder / f"randar_{codes}.pt")
    return folder


@pytest.fixture
def downloads(files, monkeypatch):
    """That folder as the current one."""
    monkeypatch.chdir(files)
    smaller = dict(channels=32, latent_channels=64)
    monkeypatch.setattr(vqgan, "LLAMAGEN_VQ16", replace(LLAMAGEN_VQ16, **smaller))
    monkeypatch.setattr(vqgan, "MASKGIT_VQ16", replace(MASKGIT_VQ16, **smaller, code_dim=64))
    return files


@pytest.mark.parametrize("codes, tokenizer", [(16384, "vq_ds16_c2i.pt"),
                                              (1024, "maskgit-vqgan-imagenet-f16-256.bin")])
def test_released_files_draw_pictures_of_imagenets_classes(downloads, run, monkeypatch, codes, tokenizer):
    labels, picture_grid = [], common.picture_grid
    monkeypatch.setattr(common, "picture_grid", lambda pixels, names, title:
                        labels.extend(names) or picture_grid(pixels, names, title))
    run(f"sample.py --ckpt randar_{codes}.pt --tokenizer {tokenizer} --classes 207 otter --cfg 1 4 "
        "--number 2 --steps 3 --npz drawn.npz")
    assert labels == ["golden retriever", "otter"] and Image.open("samples.png").height > 2 * 256
    drawn = np.load("drawn.npz")
    assert drawn["arr_0"].shape == (2, 256, 256, 3) and drawn["arr_1"].tolist() == [207, 360]
    model, painter = load_randar(f"randar_{codes}.pt"), load_tokenizer(tokenizer)
    tokens = model.generate(torch.tensor([207, 360]), steps=3, generator=seeded(0))
    assert (drawn["arr_0"] == common.to_uint8(painter.decode(tokens))).all()


@pytest.mark.parametrize("options, complaint", [
    ("--ckpt randar_16384.pt", "needs its tokenizer, .* give --tokenizer LlamaGen's vq_ds16_c2i.pt"),
    ("--ckpt randar_1024.pt", "give --tokenizer MaskGIT's maskgit-vqgan-imagenet-f16-256.bin"),
    ("--ckpt randar_1024.pt --tokenizer vq_ds16_c2i.pt", "knows 1024 codes, the tokenizer has 16384"),
    ("--ckpt vq_ds16_c2i.pt", "vq_ds16_c2i.pt holds no RandAR weights .it is a tokenizer, for --tokenizer"),
    ("--ckpt maskgit-vqgan-imagenet-f16-256.bin", "it is a tokenizer, for --tokenizer"),
    ("--ckpt randar_1024.pt --tokenizer randar_1024.pt", "holds no tokenizer"),
    ("--ckpt randar_1024.pt --tokenizer maskgit-vqgan-imagenet-f16-256.bin --classes crane", "134 and 517")])
def test_files_in_the_wrong_place_are_named(downloads, run, capsys, options, complaint):
    before = sorted(downloads.iterdir())
    with pytest.raises(SystemExit, match="2"):
        run(f"sample.py {options}")
    assert re.search(complaint, capsys.readouterr().err)
    assert sorted(downloads.iterdir()) == before


def test_the_order_is_that_of_the_training_unless_another_is_asked_for(downloads, run, capsys):
    model = small_model(grid=(16, 16), vocab_size=1024)
    save_randar(model, "raster.pt", order="raster")
    options = "sample.py --ckpt raster.pt --tokenizer maskgit-vqgan-imagenet-f16-256.bin --number 1 --steps 1"
    run(options)
    run(f"{options} --order random")
    run(options.replace("raster.pt", "randar_1024.pt"))
    said = capsys.readouterr().out.splitlines()
    assert [line.split("order ")[1].split(",")[0] for line in said] == ["raster", "random", "random"]
