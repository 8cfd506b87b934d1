"""Checkpoints: what was saved comes back, released weights load, and anything else is named in one line."""

import re
import sys

import pytest
import torch
from helpers import V, small_model

from randar import load_randar, save_randar


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


@pytest.mark.parametrize("more, order", [({}, "random"), ({"order": "raster"}, "raster")])
def test_the_order_of_the_training_comes_back(model, tmp_path, more, order):
    save_randar(model, tmp_path / "a.pt", **more)
    assert load_randar(tmp_path / "a.pt").order == order


def test_loading_draws_no_random_numbers(model, tmp_path):
    save_randar(model, tmp_path / "a.pt")
    before = torch.get_rng_state()  # a large model's would take seconds, all to be overwritten
    load_randar(tmp_path / "a.pt")
    assert torch.equal(torch.get_rng_state(), before)


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


SMALL = {"tok_embeddings.weight": torch.zeros(4, 8),
         "cls_embedding.embedding_table.weight": torch.zeros(4, 8)}


@pytest.mark.parametrize("content, reason", [
    ({"config": {"channels": 64}, "model": {"quantize.embedding.weight": torch.zeros(3)}}, "tokenizer"),
    ({"model": {"quantize.embedding.weight": torch.zeros(3)}}, "it is a tokenizer, for --tokenizer"),
    ({"quantize.embedding.weight": torch.zeros(3)}, "it is a tokenizer, for --tokenizer"),
    ({"cls_token": torch.zeros(3), "blocks.0.attn.qkv.weight": torch.zeros(3)}, "no 'tok_embeddings.weight'"),
    (SMALL, "no 'layers.0.attention.wo.weight'"),
    (SMALL | {"layers.0.attention.wo.weight": torch.zeros(8, 8)}, "zero"),  # less than a head of 64 channels
    ({"config": {"channels": 64}, "model": {}}, "channels"),
    ({}, ""), ([1, 2], ""), (torch.zeros(3), ""),
])
def test_a_file_that_holds_something_else_is_named(tmp_path, content, reason):
    torch.save(content, tmp_path / "other.pt")
    assert "holds no RandAR weights" in complaint(tmp_path / "other.pt")
    assert reason in complaint(tmp_path / "other.pt")


def test_what_does_not_fit_in_released_weights_is_named(tmp_path):
    state = small_model(grid=(16, 16), dim=128, n_head=2).state_dict()
    for change, reason in (({"layers.0.ffn_norm.weight": None}, 'Missing key.* "layers.0.ffn_norm.weight"'),
                           ({"norm.weight": torch.zeros(64)}, r"size mismatch for norm.weight: .*64.*128"),
                           ({"extra": torch.zeros(1)}, 'Unexpected key.* "extra"')):
        content = {name: x for name, x in (state | change).items() if x is not None}
        torch.save(content, tmp_path / "other.pt")
        assert re.search(f"holds no RandAR weights .{reason}", complaint(tmp_path / "other.pt"))


def test_weights_of_another_shape_are_named(model, tmp_path):
    save_randar(small_model(vocab_size=V + 1), tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    content["config"]["vocab_size"] = V
    torch.save(content, tmp_path / "a.pt")
    assert "size mismatch" in complaint(tmp_path / "a.pt") and "output.weight" in complaint(tmp_path / "a.pt")
    torch.save(content | {"model": {"norm.weight": torch.zeros(32)}}, tmp_path / "a.pt")
    assert "Missing key" in complaint(tmp_path / "a.pt")
