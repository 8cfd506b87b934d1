"""RAR and RandAR's ablations as a specification: the sequence, annealing, decoding token by token, files, and
the commands, which treat all of them alike."""

import json
import math
import pathlib
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden import fill
from helpers import GOLDEN, SMALL, C, N, V, arguments_of, inputs_of, seeded, small_tokenizer
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import train
from randar import Config, generation_order, load_randar, step_sizes
from rar import (KINDS, RAR, RAR_SIZES, RARBlock, RARConfig, load_model, merge_embeddings, randomness,
                 save_model)
from vqgan import save_tokenizer


def small(kind):
    """Two layers with weights that are far from zero, so that everything has an influence; in eval mode."""
    shape = dict(grid=(4, 4), vocab_size=V, num_classes=C, dim=32, n_layer=2, n_head=2)
    model = KINDS[kind](RARConfig(**shape, mlp=64) if kind == "rar" else Config(**shape))
    generator = seeded(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return model.eval()


@pytest.fixture
def rar():
    return small("rar")


# ------------------------------------------------------------------------------------------------------------
# RAR's decoder and its sequence


@pytest.mark.parametrize("size, millions", [("B", 261), ("L", 461), ("XL", 955), ("XXL", 1499)])
def test_sizes_count_the_parameters_of_the_paper(size, millions):
    with torch.device("meta"):
        model = RAR(RARConfig(**RAR_SIZES[size]))
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 1


def test_names_and_shapes_are_those_of_the_released_weights():
    with torch.device("meta"):
        state = RAR(RARConfig(**RAR_SIZES["B"])).state_dict()
    shapes = json.loads((GOLDEN / "state_dict_shapes.json").read_text())["rar_B"]
    assert {name: list(tensor.shape) for name, tensor in state.items()} == shapes


def test_a_new_layer_does_nothing_yet():
    x, condition = torch.randn(2, 3, 5, 32, generator=seeded(0))
    assert torch.equal(RARBlock(RARConfig(dim=32, n_head=2, mlp=64))(x, condition), x)


@pytest.mark.parametrize("kind", ["rar", "merge", "dense"])
@pytest.mark.parametrize("turn", [0, 6, 14])
def test_a_token_has_an_influence_on_later_turns_only(batch, kind, turn):
    (tokens, classes, order), model = batch, small(kind)
    changed, here = tokens.clone(), order[:, turn : turn + 1]
    changed.scatter_(1, here, (tokens.gather(1, here) + 1) % V)
    difference = abs(model(changed, classes, order) - model(tokens, classes, order)).amax(-1)  # [b, N] turns
    assert (difference[:, : turn + 1] == 0).all() and (difference[:, turn + 1 :] > 1e-6).all()


def two_orders(order):
    """Two that differ in the last two places only (Fig. 3)."""
    return order, torch.cat([order[:, :-2], order[:, -2:].flip(1)], dim=1)


def test_without_the_target_aware_embedding_two_next_positions_get_the_same_prediction(rar, batch):
    tokens, classes, order = batch
    rar.target_aware_pos_embed.data.zero_()
    one, other = (rar(tokens, classes, order)[:, :-1] for order in two_orders(order))
    assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["rar", "merge", "dense"])
def test_a_prediction_knows_which_position_is_next(batch, kind):
    (tokens, classes, order), model = batch, small(kind)
    one, other = (model(tokens, classes, order) for order in two_orders(order))
    assert torch.equal(one[:, :-2], other[:, :-2])
    assert (abs(one - other)[:, -2].amax(-1) > 1e-3).all()


def test_after_annealing_two_tables_merge_without_changing_a_single_logit(rar, batch):
    tokens, classes, order = batch
    raster = torch.arange(N).expand(3, -1)
    before, elsewhere = rar(tokens, classes, raster), rar(tokens, classes, order)
    merge_embeddings(rar)
    assert not rar.target_aware_pos_embed.any()
    assert torch.equal(rar(tokens, classes, raster), before)
    assert (rar(tokens, classes, order) - elsewhere).abs().max() > 1e-3


def test_no_token_is_inserted_and_the_last_one_is_not_computed(batch):
    lengths = {}
    for kind in KINDS:
        model = small(kind)
        seen = inputs_of(model.layers[0])
        assert model(*batch).shape == (3, N, V)
        lengths[kind] = seen[0].shape[1]
    assert lengths == {"rope": 2 * N, "dense": 2 * N, "merge": N, "rar": N + 1}


@pytest.mark.parametrize("kind", ["dense", "merge"])
def test_a_learned_vector_acts_from_the_turn_of_its_position_on(batch, kind):
    (tokens, classes, order), model = batch, small(kind)
    before = model(tokens, classes, order)
    model.pos_instruct_embeddings.data[5] += 1
    changed = (abs(model(tokens, classes, order) - before) > 1e-6).any(-1)  # [b, N] turns
    turn = order.argsort(dim=1)[:, 5:6]  # at which position 5 is decoded
    assert torch.equal(changed, torch.arange(N) >= turn)


@pytest.mark.parametrize("kind", KINDS)
def test_the_operations_of_a_training_step_are_those_that_torch_counts(batch, kind, monkeypatch):
    monkeypatch.setattr(common, "uses_onednn", lambda x: False)  # whose products it does not know
    model = small(kind)
    with FlopCounterMode(display=False) as counted:
        model(*batch).sum().backward()
    assert math.isclose(3 * train.training_flops(model), counted.get_total_flops(), rel_tol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(batch, kind):
    model = small(kind).train()
    model.loss(*batch).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


# ------------------------------------------------------------------------------------------------------------
# Annealing


def test_randomness_falls_linearly_from_one_to_none_between_start_and_end():
    values = [randomness(epoch, 400, 0.5, 0.75) for epoch in (0, 199, 200, 225, 250, 300, 399)]
    assert values == [1, 1, 1, 0.75, 0.5, 0, 0]
    assert [randomness(step, 4, 1, 1) for step in range(4)] == [1] * 4  # always random
    assert [randomness(step, 4, 0, 0) for step in range(4)] == [0] * 4  # never
    assert [randomness(step, 4, 0.5, 0.5) for step in range(4)] == [1, 1, 0, 0]


def batch_of(step, part=slice(None), anneal=(0, 1), order="raster"):
    """What a training of 4 steps, on 1,000 made-up images each, draws: orders and hidden classes."""
    folder = SimpleNamespace(grid=(4, 4), batch=lambda *_: ("tokens", "classes"))
    args = SimpleNamespace(seed=0, batch_size=1000, class_dropout=0.1, steps=4, order=order, anneal=anneal)
    return train.training_batch(folder, step, args, part)[2:]


@pytest.mark.parametrize("order", ["raster", "spiral_in"])
@pytest.mark.parametrize("step, share", [(0, 1), (1, 0.75), (3, 0.25)])
def test_that_share_of_the_images_is_shuffled_and_the_others_are_in_order(step, share, order):
    orders, _ = batch_of(step, order=order)
    shuffled = (orders != generation_order(order, 1, (4, 4))).any(1)
    assert abs(shuffled.float().mean() - share) < 0.06
    assert (orders.sort(dim=1).values == torch.arange(N)).all()
    assert len(set(map(tuple, orders[shuffled].tolist()))) == shuffled.sum()


def test_what_is_shuffled_follows_from_the_step_for_the_whole_batch():
    for whole, first, second in zip(*(batch_of(1, part) for part in (
            slice(None), slice(0, 500), slice(500, 1000)))):
        assert torch.equal(whole, torch.cat([first, second]))
    assert not torch.equal(batch_of(1)[0], batch_of(2)[0])


# ------------------------------------------------------------------------------------------------------------
# Decoding, one token a step


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_with_a_cache_has_the_logits_of_training(batch, kind):
    (_, classes, order), model = batch, small(kind)
    made = list(model.decode(classes, order, steps=-1, cfg=(1, 1), generator=seeded(0)))
    assert (torch.cat([step.positions for step in made], dim=1) == order).all()
    tokens = torch.cat([step.tokens for step in made], dim=1)  # in the order
    tokens = torch.empty_like(tokens).scatter_(1, order, tokens)  # raster
    logits = torch.cat([step.logits for step in made], dim=1)
    assert torch.allclose(model(tokens, classes, order), logits, atol=1e-4)


def test_dense_decodes_in_parallel_as_randar_does(batch):
    (_, classes, order), model = batch, small("dense")
    made = list(model.decode(classes, order, steps=5, cfg=(1, 1), generator=seeded(0)))
    assert [step.tokens.shape[1] for step in made] == step_sizes(N, 5)
    tokens = torch.cat([step.tokens for step in made], dim=1)
    logits = model(torch.empty_like(tokens).scatter_(1, order, tokens), classes, order)
    done = 0
    for step in made:  # of a step's tokens the first has the context that it has in training
        assert torch.allclose(step.logits[:, 0], logits[:, done], atol=1e-4)
        done += step.tokens.shape[1]


@pytest.mark.parametrize("power", [None, 0, 1.0, 2.75])
@pytest.mark.parametrize("kind", ["rar", "merge"])
def test_guidance_rises_along_rars_cosine_also_after_known_tokens(batch, kind, power):
    (tokens, classes, order), model, k = batch, small(kind), 5
    known = order[:, :k], tokens.gather(1, order[:, :k])
    made = list(model.decode(classes, order[:, k:], cfg=(1.0, 8.0), generator=seeded(0), known=known,
                             power=power))
    decoded = torch.cat([known[1], *(step.tokens for step in made)], dim=1)
    image = torch.empty_like(tokens).scatter_(1, order, decoded)
    with_class, without = (model(image, c, order) for c in (classes, torch.full_like(classes, C)))
    for i, step in enumerate(made, start=k):
        weight = 1 + 7 * (i / N if power is None else (1 - math.cos(math.pi * (i / N) ** power)) / 2)
        expected = without[:, i] + weight * (with_class - without)[:, i]
        assert torch.allclose(step.logits[:, 0], expected, atol=1e-3)


@pytest.mark.parametrize("kind, prefix", [("rar", 2), ("merge", 1)])
def test_a_step_computes_one_new_token_for_each_stream(batch, kind, prefix):
    (_, classes, order), model = batch, small(kind)
    seen = inputs_of(model.layers[0])
    for cfg, streams in (((1, 1), 1), ((1, 4), 2)):
        seen.clear()
        list(model.decode(classes, order, cfg=cfg))
        assert [list(x.shape[:2]) for x in seen] == [[3 * streams, n] for n in [prefix] + [1] * (N - 1)]


@pytest.mark.parametrize("kind", ["rar", "merge"])
def test_generate_puts_what_decode_yields_where_it_belongs(batch, kind):
    (tokens, classes, order), model = batch, small(kind)
    known = order[:, :4], tokens.gather(1, order[:, :4])
    image = model.generate(classes, order[:, 4:-2], known=known, generator=seeded(3))
    assert (image.gather(1, order[:, :4]) == known[1]).all() and (image.gather(1, order[:, -2:]) == -1).all()
    for step in model.decode(classes, order[:, 4:-2], known=known, generator=seeded(3)):
        assert (image.gather(1, step.positions) == step.tokens).all()
    by_name = [model.generate(classes, name, generator=seeded(3)) for name in (None, model.order)]
    assert torch.equal(*by_name) and by_name[0].min() >= 0


@pytest.mark.parametrize("options, complaint", [
    (dict(steps=5), "one token a step: steps must be -1, not 5"), (dict(scg=2.0), "scg must be 1, not 2.0"),
    (dict(steps=0), "steps must be at least 1"), (dict(power=-1), "power must be 0 .* or more, not -1"),
    (dict(power=math.nan), "power"), (dict(temperature=0), "temperature"), (dict(cfg=(1,)), "cfg"),
    (dict(known=(torch.zeros(3, 1, dtype=torch.int64),) * 2), "twice")])
@pytest.mark.parametrize("kind", ["rar", "merge"])
def test_what_such_a_model_cannot_do_is_an_error_before_the_first_step(batch, kind, options, complaint):
    _, classes, order = batch
    for function in (small(kind).decode, small(kind).generate):
        with pytest.raises(ValueError, match=complaint):
            function(classes, order, **options)


# ------------------------------------------------------------------------------------------------------------
# Agreement with the released implementation


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "rar_small.npz")


@pytest.fixture
def golden_model(golden):
    settings = json.loads(str(golden["config"]))
    model = RAR(RARConfig(**settings | {"grid": (settings["grid"], settings["grid"])}))
    model.load_state_dict(fill.state_for({name: p.shape for name, p in model.named_parameters()}))
    return model.eval()


def test_logits_are_those_of_the_released_code(golden, golden_model):
    logits = golden_model(*arguments_of(golden)).detach().numpy()
    assert abs(logits - golden["logits"]).max() < 1e-3 * abs(golden["logits"]).max()


def test_loss_and_gradients_are_those_of_the_released_code(golden, golden_model):
    loss = golden_model.loss(*arguments_of(golden))
    loss.backward()
    assert abs(loss.item() - golden["loss"]) < 1e-4
    norms = {f"gradnorm/{name}": p.grad.norm().item() for name, p in golden_model.named_parameters()}
    assert norms.keys() == {key for key in golden.files if key.startswith("gradnorm/")}
    for name, norm in norms.items():  # that of k_norm's bias, the same for all keys, is 0 up to rounding
        assert math.isclose(norm, golden[name], rel_tol=0.01, abs_tol=1e-7), name


def test_greedy_decoding_gives_the_tokens_of_the_released_code(golden, golden_model):
    keys = [key for key in golden.files if key.startswith("greedy/")]
    assert len(keys) == 2
    for key in keys:  # greedy/scale=8.0,pow=2.75
        scale, power = (float(part.split("=")[1]) for part in key.split(","))
        classes = torch.from_numpy(golden["classes"])
        tokens = golden_model.generate(classes, "raster", cfg=(1.0, scale), power=power, top_k=1)
        assert (tokens.numpy() == golden[key]).all(), key


# ------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_says_which_model_it_holds(tmp_path, batch, kind):
    model = small(kind)
    save_model(model, tmp_path / "a.pt", class_names=list("abcde"), order="spiral_in")
    loaded = load_model(tmp_path / "a.pt")
    assert type(loaded) is KINDS[kind] and loaded.config == model.config and not loaded.training
    assert torch.equal(loaded(*batch), model(*batch))
    assert (loaded.class_names, loaded.order) == (list("abcde"), "spiral_in")


@pytest.mark.parametrize("kind, order", [("rope", "random"), ("rar", "raster")])
def test_released_weights_are_told_by_their_contents(tmp_path, kind, order):
    settings = dict(grid=(16, 16), vocab_size=V, num_classes=C, dim=64, n_layer=3, n_head=1)
    config = RARConfig(**settings | {"n_head": 4}, mlp=96) if kind == "rar" else Config(**settings)
    torch.save(KINDS[kind](config).state_dict(), tmp_path / "released.bin")
    loaded = load_model(tmp_path / "released.bin")
    assert type(loaded) is KINDS[kind] and loaded.config == config and loaded.order == order


@pytest.mark.parametrize("kind", ["dense", "merge", "rar"])
def test_who_needs_a_randar_is_told_that_the_file_holds_none(tmp_path, kind):
    save_model(small(kind), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt holds no RandAR weights"):
        load_randar(tmp_path / "a.pt")


# ------------------------------------------------------------------------------------------------------------
# The commands


@pytest.fixture(scope="module")
def tokens_folder(tmp_path_factory):
    """A folder with a tokenizer and with the tokens of eight images of two classes."""
    folder = tmp_path_factory.mktemp("rar")
    save_tokenizer(small_tokenizer(), folder / "tok.pt")
    pixels = np.random.default_rng(0).integers(256, size=(8, 16, 16, 3), dtype=np.uint8)
    data.encode_images(pixels, [0, 1] * 4, ["cat", "dog"], "noise", small_tokenizer(), folder / "tok.pt",
                       folder / "tokens", 16, crops=1)
    return folder


@pytest.fixture
def there(tokens_folder, tmp_path, monkeypatch):
    """An empty current folder; returns the beginning of a command line for a training."""
    monkeypatch.chdir(tmp_path)
    return f"train.py --data {tokens_folder}/tokens --tokenizer {tokens_folder}/tok.pt {SMALL}"


@pytest.mark.parametrize("options, kind, file, order", [
    ("--model rar", "rar", "rar.pt", "raster"), ("--position dense", "dense", "randar.pt", "random"),
    ("--position merge --order spiral_in", "merge", "randar.pt", "spiral_in"),
    ("--anneal 0 1", "rope", "randar.pt", "raster")])
def test_every_model_is_trained_and_drawn_from_alike(there, run, capsys, options, kind, file, order):
    run(f"{there} {options} --steps 2 --out new")
    assert type(load_model(f"new/{file}")) is KINDS[kind]
    run(f"sample.py --ckpt new/{file} --number 4 --npz drawn.npz")
    assert f"order {order}" in capsys.readouterr().out
    drawn = np.load("drawn.npz")
    assert drawn["arr_0"].shape == (4, 16, 16, 3) and drawn["arr_1"].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("options", ["--model rar --anneal 0 0.9", "--position merge"])
def test_an_interrupted_and_resumed_training_is_the_one_that_went_straight_on(there, run, monkeypatch,
                                                                              options):
    line = f"{there} {options} --steps 4 --dropout 0.1"
    run(f"{line} --out straight")
    steps, rate = [], train.learning_rate

    def stop_in_the_second_step(*inputs):
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGTERM)
        return rate(*inputs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "learning_rate", stop_in_the_second_step)
        run(f"{line} --out stopped")
    assert common.load("stopped/training.pt")["step"] == 2
    run("train.py --resume --out stopped")
    stopped, straight = (common.load(f"{folder}/training.pt") for folder in ("stopped", "straight"))
    assert [line["loss"] for line in stopped["log"]] == [line["loss"] for line in straight["log"]]
    assert all(torch.equal(stopped["model"][name], x) for name, x in straight["model"].items())


@pytest.mark.parametrize("options, complaint", [
    ("--model rar --position dense", "--position dense is of RandAR's models"),
    ("--size B", "--model randar has the sizes tiny, toy, L, XL, XXL, not B"),
    ("--anneal 0.7 0.3", "0 <= START <= END <= 1, not 0.7 0.3"), ("--anneal 0 300", "not 0 300"),
    ("--anneal nan 1", "not nan 1"), ("--model gpt", "invalid choice: 'gpt'")])
def test_a_mistake_is_said_before_anything_is_written(there, run, capsys, options, complaint):
    with pytest.raises(SystemExit, match="2"):
        run(f"{there} {options} --steps 1 --out new")
    assert re.search(complaint, capsys.readouterr().err) and not any(pathlib.Path().iterdir())


def test_a_training_is_resumed_as_the_model_that_it_is(there, run, capsys):
    run(f"{there} --position merge --steps 1 --out new")
    with pytest.raises(SystemExit, match="2"):
        run("train.py --resume --position dense --steps 2 --out new")
    assert "or no RandAR (dense)-toy: resume with the --size" in capsys.readouterr().err


@pytest.fixture
def released_rar(tokens_folder, tmp_path, monkeypatch):
    """In the current folder is a small rar_b.bin, a bare state dict; returns the tokenizer's path."""
    monkeypatch.chdir(tmp_path)
    config = RARConfig(**RAR_SIZES["toy"] | dict(dim=32, n_layer=1, mlp=64), vocab_size=V, num_classes=1000)
    torch.save(RAR(config).state_dict(), "rar_b.bin")
    return tokens_folder / "tok.pt"


def test_released_weights_draw_pictures_of_imagenets_classes(released_rar, run, capsys):
    run(f"sample.py --ckpt rar_b.bin --tokenizer {released_rar} --classes otter --number 1 --cfg 1 16 "
        "--power 2.75")
    said = capsys.readouterr().out
    assert "256 steps, order raster, cfg 1 to 16 by power 2.75, scg 1" in said


@pytest.mark.parametrize("options, complaint", [
    ("--steps 5", "steps must be -1, not 5"), ("--scg 2", "scg must be 1, not 2"), ("--power -1", "power"),
    ("--ckpt randar.pt --power 2", "--power is for RAR")])
def test_what_a_model_cannot_do_is_said_before_anything_is_drawn(released_rar, run, capsys, options,
                                                                 complaint):
    save_model(small("rope"), "randar.pt")
    with pytest.raises(SystemExit, match="2"):
        run(f"sample.py --ckpt rar_b.bin --tokenizer {released_rar} {options}")
    assert re.search(complaint, capsys.readouterr().err) and not pathlib.Path("samples.png").exists()
