"""Checkpoints: what was saved comes back, released weights load, anything else is named in one line."""

import sys

import pytest
import torch
from helpers import V, small_model

import rar
from randar import Config, RandAR, load_randar, save_randar
from support import border, judge, toy
from support.pictures import from_uint8
from tokenizer import load_tokenizer


def test_half_precision_is_half_as_large_and_nearly_the_same(model, batch, tmp_path):
    save_randar(model, tmp_path / "full.pt")
    save_randar(model, tmp_path / "half.pt", half=True)
    assert (tmp_path / "half.pt").stat().st_size < 0.6 * (tmp_path / "full.pt").stat().st_size
    loaded, expected = load_randar(tmp_path / "half.pt"), model(*batch)[0]
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert abs(loaded(*batch)[0] - expected).max() < 0.01 * abs(expected).max()


def test_files_of_the_first_version_do_not_say_their_kind_and_load(model, tmp_path):
    save_randar(model, tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save({name: content[name] for name in ("config", "model")}, tmp_path / "a.pt")
    assert load_randar(tmp_path / "a.pt").order == "random"


def test_safetensors_load(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = small_model(grid=(16, 16), dim=128, n_head=2)
    safetensors.save_file(model.state_dict(), tmp_path / "released.safetensors")
    assert torch.equal(load_randar(tmp_path / "released.safetensors").output.weight, model.output.weight)


def test_loading_draws_no_random_numbers(model, tmp_path):
    save_randar(model, tmp_path / "a.pt")
    before = torch.get_rng_state()  # a large model's would take seconds, all to be overwritten
    load_randar(tmp_path / "a.pt")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name, order, kind", [
    ("randar_toy.pt", "random", "rope"), ("randar_toy_raster.pt", "raster", "rope"),
    ("miniature/dense_5400.pt", "random", "dense"), ("miniature/merge_5400.pt", "random", "merge"),
    ("miniature/rar_5400.pt", "raster", "rar")])
def test_every_kind_of_shipped_weights_opens_and_predicts_better_than_chance(name, order, kind):
    model = load_randar(border.CHECKPOINTS / name)
    assert (model.order, model.kind) == (order, kind)
    assert model.class_names[1] == "fish" and model.config.grid == (8, 8)
    pixels, classes, _ = toy.make(10, 7)
    tokens = load_tokenizer(border.CHECKPOINTS / "tokenizer.pt").encode(from_uint8(pixels))
    raster = torch.arange(64).expand(10, -1) if order == "raster" else None
    assert model(tokens, torch.from_numpy(classes), raster)[1] < 3.5  # guessing among 512 codes: 6.24


def complaint(path):
    """What load_randar says about a file it cannot load; one line that names it."""
    with pytest.raises(border.UserError) as error:
        load_randar(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and len(message) < 400 + len(str(path))
    return message


def test_without_the_package_for_safetensors_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as if it were not installed
    (tmp_path / "a.safetensors").write_bytes(b"anything")
    assert "pip install safetensors" in complaint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_or_missing_checkpoint_is_named(model, tmp_path, share):
    save_randar(model, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content[: int(share * len(content))])
    assert "may be truncated" in complaint(tmp_path / "a.pt")
    assert "no checkpoint at" in complaint(tmp_path / "b.pt")


@pytest.mark.parametrize("content", [
    {"config": {"channels": 64}, "model": {"quantize.embedding.weight": torch.zeros(3)}},
    {"quantize.embedding.weight": torch.zeros(3)}, {}, [1, 2], torch.zeros(3)])
def test_a_file_that_holds_something_else_is_named(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    assert "holds no weights of RandAR or RAR" in complaint(tmp_path / "other.pt")


class Lettered(RandAR):
    """A reader's own kind of position instruction tokens, under a name of its own."""

    kind = "lettered"

    def __init__(self, config):
        super().__init__(config)
        self.letters = self.pos_instruct_embeddings
        del self.pos_instruct_embeddings

    def position_instruction_tokens(self, cos_sin, positions):
        return self.letters.expand(*positions.shape, -1)


def test_a_readers_own_kind_of_model_comes_back_once_it_is_in_kinds(batch, tmp_path, monkeypatch):
    save_randar(model := Lettered(small_model().config).eval(), tmp_path / "a.pt")
    assert "kind 'lettered': add it to KINDS" in complaint(tmp_path / "a.pt")
    monkeypatch.setitem(rar.KINDS, "lettered", (Lettered, Config))
    assert torch.equal(load_randar(tmp_path / "a.pt")(*batch)[0], model(*batch)[0])


def test_weights_of_a_training_that_has_diverged_are_named(model, tmp_path):
    model.output.weight.data[0, 0] = torch.nan
    save_randar(model, tmp_path / "a.pt")
    assert "not finite" in complaint(tmp_path / "a.pt")


def test_weights_of_another_shape_are_named(tmp_path):
    save_randar(small_model(vocab_size=V + 1), tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    content["config"]["vocab_size"] = V
    torch.save(content, tmp_path / "a.pt")
    assert "size mismatch" in complaint(tmp_path / "a.pt")


@pytest.mark.parametrize("name, value", [
    ("n_head", "two"), ("n_head", 3), ("nothing", 1), ("grid", 4), ("dropout", float("nan")), ("dim", True)])
def test_a_bad_value_inside_a_file_is_said_with_the_files_name(model, tmp_path, name, value):
    save_randar(model, tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    content["config"][name] = value
    torch.save(content, tmp_path / "a.pt")
    assert "names a network" in complaint(tmp_path / "a.pt")


@pytest.mark.parametrize("name, value", [("order", "zigzag"), ("class_names", [1, 2])])
def test_a_bad_order_or_class_name_is_said_with_the_files_name_too(model, tmp_path, name, value):
    save_randar(model, tmp_path / "a.pt")
    torch.save(torch.load(tmp_path / "a.pt", weights_only=True) | {name: value}, tmp_path / "a.pt")
    assert "an order or classes" in complaint(tmp_path / "a.pt")


def test_in_what_the_fine_model_draws_the_judge_sees_the_classes():
    model, classes = load_randar(border.CHECKPOINTS / "fine/randar.pt"), torch.arange(10)
    tokens = model.generate(classes, steps=24, cfg=(1, 2), generator=torch.Generator().manual_seed(0))
    images = load_tokenizer(border.CHECKPOINTS / "fine/tokenizer.pt").decode(tokens)
    assert judge.judge(images.detach(), classes)["accuracy"] >= 0.5  # of 20 in 48 steps 0.9
