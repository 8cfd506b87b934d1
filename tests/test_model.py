"""The decoder and its loss as a specification: each test is one sentence, the mathematics before the
reference values."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDEN, C, N, V, arguments_of, inputs_of, small_model

from randar import SIZES, Config, RandAR

# ------------------------------------------------------------------------------------------------
# The decoder


@pytest.mark.parametrize("size, millions", [("S", 34), ("M", 111), ("L", 343), ("XL", 775), ("XXL", 1400)])
def test_sizes_count_the_parameters_of_table_a_and_our_own(size, millions):
    with torch.device("meta"):
        model = RandAR(Config(**SIZES[size]))
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(count, -2 if size == "XXL" else 0) == millions


def test_names_and_shapes_are_those_of_the_released_weights():
    with torch.device("meta"):
        state = RandAR(Config(**SIZES["L"])).state_dict()
    shapes = json.loads((GOLDEN / "state_dict_shapes.json").read_text())["randar_L"]
    assert {name: list(tensor.shape) for name, tensor in state.items()} == shapes


@pytest.mark.parametrize("turn", [0, 6, 14])
def test_a_token_has_an_influence_on_later_turns_only(model, batch, turn):
    tokens, classes, order = batch
    changed = tokens.clone()
    here = order[:, turn : turn + 1]  # the position decoded at this turn
    changed.scatter_(1, here, (tokens.gather(1, here) + 1) % V)
    (one, _), (other, _) = model(changed, classes, order), model(tokens, classes, order)
    difference = abs(one - other).amax(-1)  # [b, N] turns
    assert (difference[:, : turn + 1] == 0).all() and (difference[:, turn + 1 :] > 1e-6).all()


def test_the_position_of_the_next_token_changes_its_prediction(model, batch):
    tokens, classes, order = batch
    swapped = order.clone()
    swapped[:, [7, 8]] = order[:, [8, 7]]
    difference = abs(model(tokens, classes, swapped)[0] - model(tokens, classes, order)[0]).amax(-1)
    assert (difference[:, :7] == 0).all() and (difference[:, 7] > 1e-4).all()


def test_the_class_changes_every_prediction(model, batch):
    tokens, classes, order = batch
    difference = model(tokens, (classes + 1) % C, order)[0] - model(tokens, classes, order)[0]
    assert (abs(difference).amax(-1) > 1e-6).all()


def test_a_fresh_model_names_its_order_and_no_classes(model):
    assert model.order == "random" and model.class_names is None


# ------------------------------------------------------------------------------------------------
# Training


def test_the_head_runs_on_half_of_the_sequence(model, batch):
    in_layers, in_head = inputs_of(model.layers[0]), inputs_of(model.output)
    model.train()(*batch)
    assert in_layers[0].shape[1] == 2 * N and in_head[0].shape[1] == N


def test_no_mask_is_made_in_training(model, batch, attention_calls):
    model.train()(*batch)
    assert all(options["is_causal"] and "attn_mask" not in options for *_, options in attention_calls)


def test_training_keeps_each_value_alone_not_the_product_that_it_is_a_part_of(model, batch, attention_calls):
    model.train()(*batch)
    assert all(v.untyped_storage().nbytes() == v.nbytes for _, _, v, _ in attention_calls)


def test_the_loss_is_the_cross_entropy_of_the_tokens_in_the_order_given(model, batch):
    tokens, classes, order = batch
    logits, loss = model(tokens, classes, order)
    log_p = logits.log_softmax(-1)
    by_hand = [-log_p[i, turn, tokens[i, order[i, turn]]] for i in range(3) for turn in range(N)]
    assert torch.isclose(loss, sum(by_hand) / len(by_hand), atol=1e-6)


def test_an_untrained_model_predicts_every_token_equally(batch):
    fresh = RandAR(Config(grid=(4, 4), vocab_size=V, num_classes=C, dim=32, n_layer=1, n_head=2))
    assert math.isclose(fresh(*batch)[1].item(), math.log(V), rel_tol=1e-6)


def test_randar_overfits_one_batch(batch):
    torch.manual_seed(0)
    fresh = RandAR(Config((4, 4), V, C, dim=64, n_layer=2, n_head=2, dropout=0.0, class_dropout=0.0))
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=5e-3)
    for _ in range(80):
        loss = fresh(*batch)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 < math.log(V)


def test_without_an_order_each_image_gets_a_fresh_random_one(model, batch, monkeypatch):
    tokens, classes, _ = batch
    orders, sequence = [], model.sequence
    monkeypatch.setattr(model, "sequence", lambda *a: orders.append(a[2]) or sequence(*a))
    torch.manual_seed(0)
    model(tokens, classes), model(tokens, classes)
    rows = torch.cat(orders)
    assert (rows.sort(dim=1).values == torch.arange(N)).all()
    assert len({tuple(row) for row in rows.tolist()}) == 6


def test_classes_are_dropped_in_training_only(batch):
    tokens, classes, order = batch
    model = small_model(token_dropout=0.0, dropout=0.0, class_dropout=1.0)
    given, none = model(tokens, classes, order)[1], model(tokens, torch.full((3,), C), order)[1]
    assert given != none and model.train()(tokens, classes, order)[1] == none


def test_the_caller_may_choose_whose_class_is_dropped(model, batch):
    tokens, classes, order = batch
    drop = torch.tensor([True, False, True])
    dropped = model(tokens, torch.where(drop, C, classes), order)[0]
    assert torch.equal(model(tokens, classes, order, drop_class=drop)[0], dropped)


def test_one_class_in_ten_is_dropped():
    model, seen = small_model().train(), []
    table = model.cls_embedding.embedding_table
    table.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    model(torch.zeros(1000, N, dtype=torch.int64), torch.zeros(1000, dtype=torch.int64))
    assert abs((seen[0] == C).sum() - 100) < 40
    assert (seen[0] == 0).sum() + (seen[0] == C).sum() == 1000


@pytest.mark.parametrize("training", [True, False])
def test_tokens_attention_and_feed_forward_have_dropout_in_training_only(batch, monkeypatch, training):
    model, calls = small_model(token_dropout=0.2), []
    monkeypatch.setattr(F, "dropout", lambda x, p, active: calls.append((p, active)) or x)
    model.train(training)(*batch)
    assert calls == [(0.2, training)] + [(0.1, training)] * 2 * model.config.n_layer


def test_gradients_reach_every_parameter(model, batch):
    model(*batch)[1].backward()
    assert all(p.grad.norm() > 0 for p in model.parameters())


@pytest.mark.parametrize("changed, shape", [("tokens", (3, 15)), ("classes", (2,)), ("order", (1, 16))])
def test_shapes_that_do_not_fit_are_an_error_in_training(model, batch, changed, shape):
    arguments = list(batch)
    arguments[["tokens", "classes", "order"].index(changed)] = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected tokens \[3, 16\], classes \[3\].*got the shapes"):
        model(*arguments)


# ------------------------------------------------------------------------------------------------
# Agreement with the released implementation


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "randar_small.npz")


@pytest.fixture(scope="module")
def golden_model(golden):
    settings = json.loads(str(golden["config"]))
    return small_model(**settings | {"grid": (settings["grid"], settings["grid"])})


def test_logits_are_those_of_the_released_code(golden, golden_model):
    logits = golden_model(*arguments_of(golden))[0].detach().numpy()
    assert abs(logits - golden["logits"]).max() < 1e-3 * abs(golden["logits"]).max()


def test_loss_and_gradients_are_those_of_the_released_code(golden, golden_model):
    golden_model.zero_grad()
    loss = golden_model(*arguments_of(golden))[1]
    loss.backward()
    assert abs(loss.item() - golden["loss"]) < 1e-4
    norms = {f"gradnorm/{name}": p.grad.norm().item() for name, p in golden_model.named_parameters()}
    assert norms.keys() == {key for key in golden.files if key.startswith("gradnorm/")}
    for name, norm in norms.items():
        assert math.isclose(norm, golden[name], rel_tol=0.01), name


def test_greedy_decoding_gives_the_tokens_of_the_released_code(golden, golden_model):
    _, classes, order = arguments_of(golden)
    keys = [key for key in golden.files if key.startswith("greedy/")]
    assert len(keys) == 5
    for key in keys:  # greedy/steps=6,cfg=1.0-4.0
        steps, cfg = (part.split("=")[1] for part in key.split(","))
        cfg = tuple(float(end) for end in cfg.split("-"))
        tokens = golden_model.generate(classes, order, int(steps), cfg=cfg, top_k=1)
        assert (tokens.numpy() == golden[key]).all(), key
