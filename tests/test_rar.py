"""RAR and RandAR's ablations as a specification: the sequence, annealing, decoding token by token, files."""

import json
import math

import numpy as np
import pytest
import torch
from golden import fill
from helpers import GOLDEN, C, N, V, arguments_of, inputs_of, seeded

from randar import Config, load_randar, save_randar, step_sizes
from rar import KINDS, RAR, RAR_SIZES, RARBlock, RARConfig, merge_embeddings, randomness


def small(kind):
    """Two layers with weights that are far from zero, so that everything has an influence; in eval mode."""
    shape = dict(grid=(4, 4), vocab_size=V, num_classes=C, dim=32, n_layer=2, n_head=2)
    model = KINDS[kind][0](RARConfig(**shape, mlp=64) if kind == "rar" else Config(**shape))
    generator = seeded(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return model.eval()


@pytest.fixture
def rar():
    return small("rar")


# ------------------------------------------------------------------------------------------------
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
    one, other = model(changed, classes, order)[0], model(tokens, classes, order)[0]
    difference = abs(one - other).amax(-1)  # [b, N] turns
    assert (difference[:, : turn + 1] == 0).all() and (difference[:, turn + 1 :] > 1e-6).all()


def two_orders(order):
    """Two that differ in the last two places only (Fig. 3)."""
    return order, torch.cat([order[:, :-2], order[:, -2:].flip(1)], dim=1)


def test_without_the_target_aware_embedding_two_next_positions_get_the_same_prediction(rar, batch):
    tokens, classes, order = batch
    rar.target_aware_pos_embed.data.zero_()
    one, other = (rar(tokens, classes, order)[0][:, :-1] for order in two_orders(order))
    assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["rar", "merge", "dense"])
def test_a_prediction_knows_which_position_is_next(batch, kind):
    (tokens, classes, order), model = batch, small(kind)
    one, other = (model(tokens, classes, order)[0] for order in two_orders(order))
    assert torch.equal(one[:, :-2], other[:, :-2])
    assert (abs(one - other)[:, -2].amax(-1) > 1e-3).all()


def test_after_annealing_two_tables_merge_without_changing_a_single_logit(rar, batch):
    tokens, classes, order = batch
    raster = torch.arange(N).expand(3, -1)
    before, elsewhere = rar(tokens, classes, raster)[0], rar(tokens, classes, order)[0]
    merge_embeddings(rar)
    assert not rar.target_aware_pos_embed.any()
    assert torch.equal(rar(tokens, classes, raster)[0], before)
    assert (rar(tokens, classes, order)[0] - elsewhere).abs().max() > 1e-3


def test_no_token_is_inserted_and_the_last_one_is_not_computed(batch):
    lengths = {}
    for kind in KINDS:
        model = small(kind)
        seen = inputs_of(model.blocks[0] if kind == "rar" else model.layers[0])
        assert model(*batch)[0].shape == (3, N, V)
        lengths[kind] = seen[0].shape[1]
    assert lengths == {"rope": 2 * N, "dense": 2 * N, "merge": N, "rar": N + 1}


@pytest.mark.parametrize("kind", ["dense", "merge"])
def test_a_learned_vector_acts_from_the_turn_of_its_position_on(batch, kind):
    (tokens, classes, order), model = batch, small(kind)
    before = model(tokens, classes, order)[0]
    model.pos_instruct_embeddings.data[5] += 1
    changed = (abs(model(tokens, classes, order)[0] - before) > 1e-6).any(-1)  # [b, N] turns
    turn = order.argsort(dim=1)[:, 5:6]  # at which position 5 is decoded
    assert torch.equal(changed, torch.arange(N) >= turn)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(batch, kind):
    model = small(kind).train()
    model(*batch)[1].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


# ------------------------------------------------------------------------------------------------
# Annealing


def test_randomness_falls_linearly_from_one_to_none_between_start_and_end():
    values = [randomness(epoch, 400, 0.5, 0.75) for epoch in (0, 199, 200, 225, 250, 300, 399)]
    assert values == [1, 1, 1, 0.75, 0.5, 0, 0]
    assert [randomness(step, 4, 1, 1) for step in range(4)] == [1] * 4  # always random
    assert [randomness(step, 4, 0, 0) for step in range(4)] == [0] * 4  # never
    assert [randomness(step, 4, 0.5, 0.5) for step in range(4)] == [1, 1, 0, 0]


# ------------------------------------------------------------------------------------------------
# Decoding, one token a step


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_with_a_cache_has_the_logits_of_training(batch, kind):
    (_, classes, order), model = batch, small(kind)
    made = list(model.decode(classes, order, steps=-1, cfg=(1, 1), generator=seeded(0)))
    assert (torch.cat([step.positions for step in made], dim=1) == order).all()
    tokens = torch.cat([step.tokens for step in made], dim=1)  # in the order
    tokens = torch.empty_like(tokens).scatter_(1, order, tokens)  # raster
    logits = torch.cat([step.logits for step in made], dim=1)
    assert torch.allclose(model(tokens, classes, order)[0], logits, atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "merge", "rar"])
def test_they_decode_in_parallel_as_randar_does(batch, kind):
    (_, classes, order), model = batch, small(kind)
    made = list(model.decode(classes, order, steps=5, cfg=(1, 1), generator=seeded(0)))
    assert [step.tokens.shape[1] for step in made] == step_sizes(N, 5)
    tokens = torch.cat([step.tokens for step in made], dim=1)
    logits = model(torch.empty_like(tokens).scatter_(1, order, tokens), classes, order)[0]
    done = 0
    for step in made:  # of a step's tokens the first has the context that it has in training
        assert torch.allclose(step.logits[:, 0], logits[:, done], atol=1e-4)
        done += step.tokens.shape[1]


@pytest.mark.parametrize("kind, prefix", [("rar", 2), ("merge", 1)])
def test_without_instructions_of_their_own_a_step_asks_the_last_token_again(batch, kind, prefix):
    (tokens, classes, order), model, k = batch, small(kind), 5
    known = order[:, :k], tokens.gather(1, order[:, :k])
    [step] = model.decode(classes, order[:, k:k + 3], 1, (1, 1), known=known)
    x, where = model.sequence(tokens, classes, order)
    last, queries = prefix + k - 1, []
    for turn in (k, k + 1, k + 2):  # as if this turn came next
        other = torch.cat([order[:, :k], order[:, turn:turn + 1], order[:, k:turn], order[:, turn + 1:]], 1)
        queries.append(model.sequence(tokens, classes, other)[0][:, last])
    x = torch.cat([x[:, :last], torch.stack(queries, dim=1)], dim=1)
    y = model.hidden_states(x, where[:, [*range(last), last, last, last]])
    assert torch.allclose(model.logits(y[:, -3:]), step.logits, atol=1e-4)


@pytest.mark.parametrize("power", [None, 0, 1.0, 2.75])
@pytest.mark.parametrize("kind", ["rar", "merge"])
def test_guidance_rises_along_rars_cosine_also_after_known_tokens(batch, kind, power):
    (tokens, classes, order), model, k = batch, small(kind), 5
    known = order[:, :k], tokens.gather(1, order[:, :k])
    made = list(model.decode(classes, order[:, k:], cfg=(1.0, 8.0), generator=seeded(0), known=known,
                             power=power))
    decoded = torch.cat([known[1], *(step.tokens for step in made)], dim=1)
    image = torch.empty_like(tokens).scatter_(1, order, decoded)
    with_class, without = (model(image, c, order)[0] for c in (classes, torch.full_like(classes, C)))
    for i, step in enumerate(made, start=k):
        weight = 1 + 7 * (i / N if power is None else (1 - math.cos(math.pi * (i / N) ** power)) / 2)
        expected = without[:, i] + weight * (with_class - without)[:, i]
        assert torch.allclose(step.logits[:, 0], expected, atol=1e-3)


@pytest.mark.parametrize("kind, prefix", [("rar", 2), ("merge", 1)])
def test_a_step_computes_one_new_token_for_each_stream(batch, kind, prefix):
    (_, classes, order), model = batch, small(kind)
    seen = inputs_of(model.blocks[0] if kind == "rar" else model.layers[0])
    for cfg, contexts in (((1, 1), 1), ((1, 4), 2)):
        seen.clear()
        list(model.decode(classes, order, cfg=cfg))
        assert [list(x.shape[:2]) for x in seen] == [[3 * contexts, n] for n in [prefix] + [1] * (N - 1)]


@pytest.mark.parametrize("options, complaint", [
    (dict(queries="isolated"), "with causal queries"), (dict(drafts=4), "without drafts"),
    (dict(scg=2.0), "and spatial contextual guidance"),
    (dict(angles=torch.zeros(16, 8)), "on its own grid")])
def test_what_such_a_model_cannot_do_is_an_error_before_the_first_step(batch, options, complaint):
    _, classes, order = batch
    with pytest.raises(ValueError, match=complaint):
        small("rar").decode(classes, order, **options)


# ------------------------------------------------------------------------------------------------
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
    logits = golden_model(*arguments_of(golden))[0].detach().numpy()
    assert abs(logits - golden["logits"]).max() < 1e-3 * abs(golden["logits"]).max()


def test_loss_and_gradients_are_those_of_the_released_code(golden, golden_model):
    loss = golden_model(*arguments_of(golden))[1]
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


# ------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_says_which_model_it_holds(tmp_path, batch, kind):
    model = small(kind)
    save_randar(model, tmp_path / "a.pt", class_names=list("abcde"), order="spiral_in")
    loaded = load_randar(tmp_path / "a.pt")
    assert type(loaded) is KINDS[kind][0] and loaded.config == model.config and not loaded.training
    assert torch.equal(loaded(*batch)[0], model(*batch)[0])
    assert (loaded.class_names, loaded.order) == (list("abcde"), "spiral_in")


@pytest.mark.parametrize("kind, order", [("rope", "random"), ("rar", "raster")])
def test_released_weights_are_told_by_their_contents(tmp_path, kind, order):
    settings = dict(grid=(16, 16), vocab_size=V, num_classes=C, dim=64, n_layer=3, n_head=1)
    config = RARConfig(**settings | {"n_head": 4}, mlp=96) if kind == "rar" else Config(**settings)
    torch.save(KINDS[kind][0](config).state_dict(), tmp_path / "released.bin")
    loaded = load_randar(tmp_path / "released.bin")
    assert type(loaded) is KINDS[kind][0] and loaded.config == config and loaded.order == order
    assert not loaded.training
