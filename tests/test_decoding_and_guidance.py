"""Decoding as a specification: the cached, parallel, guided loop against the plain way, written out."""

import pytest
import torch
from helpers import C, N, V, inputs_of, seeded, small_model
from torch.utils._python_dispatch import TorchDispatchMode

import randar
from randar import (CLASS, DROPPED, NULL, ORDERS, Guidance, Sampling, generation_order, sample_tokens,
                    step_sizes)


# ------------------------------------------------------------------------------------------------
# Decoding in parallel with a cache, against the plain way


def plain_logits(model, classes, order, tokens, m, kept=None):
    """The logits [b, m, V] of the m turns after those of `tokens` [b, t], in the order: Eq. 3, with no cache.

    kept: [b, t] bool, the tokens that are not replaced by zeros (App. F).
    """
    t = tokens.shape[1]
    raster = torch.zeros_like(order).scatter_(1, order[:, :t], tokens)  # those not known yet: not seen
    x, cos_sin = model.sequence(raster, classes, order)  # [class, P_1, x_1, ..., P_n, x_n]
    if kept is not None:
        x[:, 2 : 2 * t + 1 : 2] *= kept[..., None]
    known, queries = list(range(1 + 2 * t)), list(range(1 + 2 * t, 1 + 2 * (t + m), 2))
    x = model.hidden_states(x[:, known + queries], cos_sin[:, known + queries])
    return model.logits(x[:, -m:])


@torch.no_grad()
def plain_steps(model, classes, order, known_tokens, steps, cfg):
    """For steps that `decode` made: the logits that each should have had, under classifier-free guidance.

    order: [b, N], positions of known_tokens [b, k] first.
    """
    null, tokens = torch.full_like(classes, C), known_tokens
    for step in steps:
        m = step.tokens.shape[1]
        with_class = plain_logits(model, classes, order, tokens, m)
        without = plain_logits(model, null, order, tokens, m)
        weight = cfg[0] + (cfg[1] - cfg[0]) * tokens.shape[1] / order.shape[1]  # linear in the share decoded
        yield without + weight * (with_class - without)
        tokens = torch.cat([tokens, step.tokens], dim=1)


@pytest.mark.parametrize("steps", [1, 4, 7, -1])
def test_the_loop_draws_the_tokens_of_plain_decoding(batch, steps):
    model, (_, classes, order) = small_model().double(), batch
    plain = model.generate_plainly(classes, order, steps, generator=seeded(0))
    assert torch.equal(model.generate(classes, order, steps, cfg=(1, 1), generator=seeded(0)), plain)


@pytest.mark.parametrize("cfg", [(1, 1), (1.0, 4.0), (3.0, 3.0)])
@pytest.mark.parametrize("steps", [1, 4, 7, -1])
def test_cached_parallel_decoding_is_plain_decoding(model, batch, steps, cfg):
    _, classes, order = batch
    made = list(model.decode(classes, order, steps, cfg, generator=seeded(0)))
    assert [step.tokens.shape[1] for step in made] == step_sizes(N, steps)
    assert (torch.cat([step.positions for step in made], dim=1) == order).all()
    plain = plain_steps(model, classes, order, order[:, :0], made, cfg)
    for step, expected in zip(made, plain, strict=True):
        assert torch.allclose(step.logits, expected, atol=1e-4)


@torch.no_grad()
def test_an_isolated_query_predicts_as_if_it_were_the_only_one(model, batch):
    _, classes, order = batch
    tokens = torch.zeros_like(order[:, :0])
    for step in model.decode(classes, order, 4, (1, 1), queries="isolated", generator=seeded(0)):
        t = tokens.shape[1]
        for j in range(step.tokens.shape[1]):
            turns = torch.cat([order[:, :t], order[:, t + j : t + j + 1], order[:, t + 1 :]], dim=1)
            alone = plain_logits(model, classes, turns, tokens, 1)  # its position is the next
            assert torch.allclose(step.logits[:, j : j + 1], alone, atol=1e-4)
        tokens = torch.cat([tokens, step.tokens], dim=1)


@pytest.mark.parametrize("steps", [3, -1])
def test_cached_decoding_after_known_tokens_is_plain_decoding(model, batch, steps):
    tokens, classes, order = batch
    known = order[:, :5], tokens.gather(1, order[:, :5])
    made = list(model.decode(classes, order[:, 5:], steps, (1.0, 4.0), generator=seeded(0), known=known))
    plain = plain_steps(model, classes, order, known[1], made, (1.0, 4.0))
    for step, expected in zip(made, plain, strict=True):
        assert torch.allclose(step.logits, expected, atol=1e-4)


def test_decoding_one_token_a_step_has_the_logits_of_training(model, batch):
    _, classes, order = batch
    made = list(model.decode(classes, order, steps=-1, cfg=(1, 1), generator=seeded(0)))
    tokens = torch.cat([step.tokens for step in made], dim=1)  # in the order
    tokens = torch.empty_like(tokens).scatter_(1, order, tokens)  # raster
    logits = torch.cat([step.logits for step in made], dim=1)
    assert torch.allclose(model(tokens, classes, order)[0], logits, atol=1e-4)


def test_a_step_computes_the_head_on_its_queries_and_the_layers_on_new_tokens_only(model, batch):
    _, classes, order = batch
    in_layers, in_head = inputs_of(model.layers[0]), inputs_of(model.output)
    sizes = step_sizes(N, 5)
    list(model.decode(classes, order, 5, cfg=(1, 1)))
    assert [x.shape[1] for x in in_head] == sizes
    pending = [1] + [2 * m - 1 for m in sizes[:-1]]  # the class; then x_1, P_2, x_2, ..., P_m, x_m
    assert [x.shape[1] for x in in_layers] == [p + m for p, m in zip(pending, sizes)]


@pytest.mark.parametrize("name", ORDERS)
def test_any_order_gives_a_complete_image(model, name):
    tokens = model.generate(torch.arange(C), name, steps=6, generator=seeded(0))
    assert tokens.shape == (C, N) and tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < V


def test_generate_puts_what_decode_yields_where_it_belongs(model, batch):
    _, classes, order = batch
    image = model.generate(classes, order, steps=6, generator=seeded(3))
    for step in model.decode(classes, order, steps=6, generator=seeded(3)):
        assert (image.gather(1, step.positions) == step.tokens).all()


def test_decoding_keeps_no_graph_for_gradients(model, batch):
    _, classes, order = batch
    assert not any(step.logits.requires_grad for step in model.decode(classes, order, steps=3, scg=2.0))


def test_a_model_in_bfloat16_decodes_and_its_logits_are_float32(model, batch):
    _, classes, order = batch
    exact = next(model.decode(classes, order, steps=4, cfg=(1, 1))).logits
    steps = list(model.bfloat16().decode(classes, order, steps=4, cfg=(1, 1), generator=seeded(0)))
    assert steps[-1].logits.dtype == torch.float32
    assert abs(steps[0].logits - exact).max() < 0.05 * abs(exact).max()


def test_the_default_steps_follow_the_grid_and_the_default_order_the_training(model, batch):
    _, classes, order = batch
    assert len(list(model.decode(classes))) == 6  # 88 of 256, as a share of 16
    model.order = "raster"
    first = next(model.decode(classes))
    assert (first.positions == 0).all()


def test_the_same_seed_gives_the_same_images(model):
    first, again, other = (model.generate(torch.arange(C), steps=6, generator=seeded(s)) for s in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


class NeverWait(TorchDispatchMode):
    """On a GPU these operations make the host wait until the device has computed a value."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "repeat_interleave")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_") else []
        if name in self.waits or any(i is not None and i.dtype == torch.bool for i in indices):
            raise AssertionError(f"the host waits in {name}")
        return function(*args, **(kwargs or {}))


def test_the_loop_never_waits_for_the_device(model, batch, monkeypatch):
    tokens, classes, order = batch
    known = order[:, :3], tokens.gather(1, order[:, :3])
    loop = model.decode(classes, order[:, 3:], 4, scg=2.0, temperature=0.9, top_k=9, top_p=0.8, known=known)

    def wait(*_):
        raise AssertionError("the host waits")

    with monkeypatch.context() as patch, NeverWait():
        for name in ("tolist", "numpy", "cpu", "item"):  # on a CPU not all pass the dispatcher
            patch.setattr(torch.Tensor, name, wait)
        with pytest.raises(AssertionError):  # the guard works
            bool(tokens.sum() > 0)
        assert len(list(loop)) == 4


# ------------------------------------------------------------------------------------------------
# Known tokens and tables of angles: what the applications are made of


def test_known_tokens_survive(model, batch):
    tokens, classes, order = batch
    known = order[:, 10:], tokens.gather(1, order[:, 10:])
    image = model.generate(classes, order[:, :10], steps=4, known=known, generator=seeded(0))
    assert (image.gather(1, known[0]) == known[1]).all() and image.min() >= 0


def test_known_tokens_are_context(model, batch):
    tokens, classes, order = batch
    known = tokens.gather(1, order[:, :1])
    for cfg in ((1, 1), (1.0, 4.0)):
        one, other = (next(model.decode(classes, order[:, 1:], 4, cfg, known=(order[:, :1], known + change)))
                      for change in (0, 1 - 2 * (known > V // 2).long()))
        assert (abs(one.logits - other.logits).amax(-1) > 1e-4).all()


def test_positions_neither_known_nor_decoded_are_minus_one(model, batch):
    tokens, classes, order = batch
    known = order[:, :2], tokens[:, :2]
    image = model.generate(classes, order[:, 2:6], steps=2, known=known, generator=seeded(0))
    assert (image.gather(1, order[:, :6]) >= 0).all() and (image.gather(1, order[:, 6:]) == -1).all()


def test_nothing_to_decode_leaves_the_known_tokens(model, batch):
    tokens, classes, order = batch
    known = order, tokens.gather(1, order)
    assert (model.generate(classes, order[:, :0], known=known) == tokens).all()


def test_only_differences_of_positions_count_except_for_the_instruction_itself(model, batch):
    """Moving a whole image changes nothing in attention, only the values of the P_i (Eq. 5)."""
    _, classes, order = batch
    shifted = randar.grid_angles((4, 4), model.head_dim) + torch.rand(8, generator=seeded(0))
    moved, own = (next(model.decode(classes, order, 1, (1, 1), angles=a)).logits for a in (shifted, None))
    assert not torch.allclose(moved, own, atol=1e-4)
    model.pos_instruct_embeddings.data.zero_()  # without their values
    moved, own = (next(model.decode(classes, order, 1, (1, 1), angles=a)).logits for a in (shifted, None))
    assert torch.allclose(moved, own, atol=1e-4)


# ------------------------------------------------------------------------------------------------
# Guidance


@pytest.mark.parametrize("cfg, scg, class_given, contexts", [
    ((1, 1), 1, True, 1), ((1.0, 1.0), 1.0, True, 1), ([1.0, 1.0], 1, True, 1), ((1, 4), 1, True, 2),
    ((3, 3), 1.0, True, 2), ((1, 4), 1, False, 1), ((1, 4), 1.5, True, 3), ((1, 4), 1.5, False, 2),
])
def test_guidance_reads_no_more_contexts_than_it_needs(model, batch, cfg, scg, class_given, contexts):
    _, classes, order = batch
    seen = inputs_of(model.layers[0])
    model.generate(classes if class_given else torch.full((3,), C), order, 3, cfg, scg, generator=seeded(0))
    assert {x.shape[0] for x in seen} == {3 * contexts}


def test_the_null_class_is_never_guided(model, batch):
    _, classes, order = batch
    mixed = torch.tensor([C, 2, C])
    guided = model.generate(mixed, order, 5, cfg=(4.0, 4.0), top_k=1)
    plain = model.generate(mixed, order, 5, cfg=(1, 1), top_k=1)
    assert (guided[[0, 2]] == plain[[0, 2]]).all() and (guided[1] != plain[1]).any()


def test_without_spatial_guidance_eq_b_is_classifier_free_guidance_exactly(model, batch):
    _, classes, order = batch
    null = torch.full_like(classes, C)
    with_class, without = (next(model.decode(c, order, 1, (1, 1))).logits for c in (classes, null))
    for scg in (1, 1.0):
        step = next(model.decode(classes, order, 1, (3.0, 3.0), scg))
        assert torch.allclose(step.logits, without + 3 * (with_class - without), atol=1e-4)
    z = torch.randn(3 * 2, 4, V)
    both, three = [CLASS, NULL], [CLASS, NULL, DROPPED]
    plain = Guidance((3.0, 3.0), 1.0).combine(both, z[:4], share=0.5)
    assert torch.allclose(Guidance((3.0, 3.0), 1.0).combine(three, z, share=0.5), plain, atol=1e-5)


@pytest.mark.parametrize("known", [0, 6])
@pytest.mark.parametrize("class_given", [True, False])
def test_spatial_guidance_is_eq_b_and_without_a_class_eq_a(model, batch, monkeypatch, class_given, known):
    tokens, classes, order = batch
    null = torch.full_like(classes, C)
    classes = classes if class_given else null
    prefix = order[:, :known], tokens.gather(1, order[:, :known])
    drawn, rand = [], torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **options: drawn.append(rand(*a, **options)) or drawn[-1])
    loop = model.decode(classes, order[:, known:], 5, (1.0, 4.0), 1.7, known=prefix, generator=seeded(0))
    made = list(loop)
    kept = drawn[0][..., 0] >= 0.25  # [b, N], decided once: keys and values stay in the cache
    done, dropped_one = prefix[1], False
    for step in made:
        t, m = done.shape[1], step.tokens.shape[1]
        dropped_one |= bool((~kept[:, :t]).any())
        with torch.no_grad():
            drop_null = plain_logits(model, null, order, done, m, kept[:, :t])
            full_null = plain_logits(model, null, order, done, m)
            full_class = plain_logits(model, classes, order, done, m)
        expected = drop_null + 1.7 * (full_null - drop_null) + (1 + 3 * t / N) * (full_class - full_null)
        assert torch.allclose(step.logits, expected, atol=1e-4)
        done = torch.cat([done, step.tokens], dim=1)
    assert dropped_one


# ------------------------------------------------------------------------------------------------
# Sampling

FOUR = torch.tensor([0.3, 0.1, 0.4, 0.2])  # probabilities


def drawn(number=20000, logits=FOUR.log(), **options):
    """How often each token was drawn, int64 [V]."""
    tokens = sample_tokens(logits.expand(number, -1), Sampling(**options), seeded(0))
    return tokens.bincount(minlength=logits.numel())


def chi_square(counts, probabilities):
    expected = counts.sum() * probabilities
    return ((counts - expected) ** 2 / expected).sum()


def test_tokens_are_drawn_as_often_as_the_softmax_says():
    logits = torch.randn(16, generator=seeded(3)) * 2
    assert chi_square(drawn(50000, logits), logits.softmax(0)) < 38  # fair draws are, 999 times in 1000


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature):
    expected = FOUR ** (1 / temperature)
    assert chi_square(drawn(temperature=temperature), expected / expected.sum()) < 16


def test_top_k_1_takes_the_most_likely_token():
    logits = torch.randn(5, 7, V, generator=seeded(0))
    assert (sample_tokens(logits, Sampling(top_k=1)) == logits.argmax(-1)).all()


@pytest.mark.parametrize("top_k, support", [(1, [2]), (2, [0, 2]), (3, [0, 2, 3]), (4, [0, 1, 2, 3]),
                                            (9, [0, 1, 2, 3]), (0, [0, 1, 2, 3])])
def test_top_k_draws_from_the_k_best(top_k, support):
    assert drawn(top_k=top_k).nonzero().flatten().tolist() == support


@pytest.mark.parametrize("top_k", [1, 3])
def test_top_k_draws_from_no_more_than_k_where_all_are_equal(top_k):
    assert (drawn(logits=torch.zeros(8), top_k=top_k) > 0).sum() == top_k


@pytest.mark.parametrize("top_p, support", [(1e-6, [2]), (0.39, [2]), (0.41, [0, 2]), (0.69, [0, 2]),
                                            (0.71, [0, 2, 3]), (0.91, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])])
def test_top_p_draws_from_the_fewest_tokens_that_have_it_together(top_p, support):
    assert drawn(top_p=top_p).nonzero().flatten().tolist() == support


def test_top_k_and_top_p_keep_the_proportions_of_what_is_left():
    counts = drawn(top_k=3, top_p=0.7)
    assert counts[[1, 3]].sum() == 0  # of 4/9, 3/9 and 2/9 the first two are 70%
    assert chi_square(counts[[0, 2]], torch.tensor([3, 4]) / 7) < 11


# ------------------------------------------------------------------------------------------------
# The border of decoding: a mistake is one line, and comes before the first step


ORDER = generation_order("raster", 2, (4, 4))


@pytest.mark.parametrize("change, problem", [
    (dict(steps=0), "steps must be at least 1"),
    (dict(cfg=(1.0,)), "cfg must be two numbers"),
    (dict(temperature=float("nan")), "temperature must be above 0"),
    (dict(temperature=float("inf")), "temperature must be above 0, and finite"),
    (dict(top_p=1.1), "top_p above 0 and at most 1"),
    (dict(power=-1.0), "power must be 0"),
    (dict(queries="both"), "queries must be 'causal' or 'isolated', not 'both'"),
    (dict(drafts=0), "drafts must be 1 or more"),
    (dict(drafts=4, steps=3), "without steps, not 4 and 3"),
    (dict(classes=torch.tensor([0, C + 1])), "classes must be from 0 to 5, not 0 to 6"),
    (dict(order=ORDER[:1], classes=torch.tensor([0, 1])), r"expected classes \[1\].*the shapes \[2\]"),
    (dict(order=ORDER + 1), "positions must be from 0 to 15, not 1 to 16"),
    (dict(order=ORDER, angles=torch.zeros(12, 8)), "positions must be from 0 to 11, not 0 to 15"),
    (dict(classes=torch.tensor([0.0, 1.0])), "classes must be torch.int64, not torch.float32"),
    (dict(angles=torch.zeros(16, 7)), r"expected angles \[16, 8\]"),
    (dict(top_k=1.5), "expected whole numbers, not .*'top_k': 1.5"),
    (dict(known=(ORDER[:, :3], ORDER[:, :3])), "a position is given twice"),
    (dict(order=ORDER[:, 3:], known=(ORDER[:, :3], ORDER[:, :2])), r"known_tokens \[2, 3\]"),
    (dict(order=ORDER[:, 3:], known=(ORDER[:, :3], ORDER[:, :3] + V)), "known tokens must be from 0 to 31"),
])
def test_a_mistake_is_one_line_before_the_first_step(model, change, problem):
    arguments = dict(classes=torch.tensor([0, 1]), order=ORDER) | change
    for function in (model.decode, model.generate):  # decode raises when called, not when first stepped
        with pytest.raises(ValueError, match=problem) as error:
            function(**arguments)
        assert "\n" not in str(error.value)


def test_an_unknown_order_is_an_error_of_generate(model):
    with pytest.raises(ValueError, match="unknown order 'sideways': choose from random"):
        model.generate(torch.tensor([0]), "sideways")
