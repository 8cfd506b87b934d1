"""Exact parallel decoding: whatever is drafted, images come as if decoded one token a step."""

import itertools
import os

import pytest
import torch
from helpers import C, N, seeded, small_model

import exact
from randar import CLASS, NULL, Guidance, Sampling, probabilities

CODES, TOKENS = 3, 4  # of the smallest model: 81 images, each can be counted
SAMPLES = int(os.environ.get("SAMPLES", 5_000))  # SAMPLES=100000 python -m pytest ...: minutes
BATCH = 1000  # drawn at a time


@pytest.fixture(scope="module")
def smallest():
    return small_model(grid=(2, 2), vocab_size=CODES, dim=8, n_layer=1, n_head=1).double()


@torch.no_grad()
def probability_of_each_image(model, order, known, cfg, sampling):
    """Of all CODES ** TOKENS images, tokens in the order of itertools.product: float64 [images].

    From the logits of training, one token a step; order: [1, TOKENS], of which `known` come first.
    """
    images = torch.tensor(list(itertools.product(range(CODES), repeat=TOKENS)))  # [81, 4], raster
    orders = order.expand(len(images), -1)
    both = [model(images, torch.full((len(images),), label), orders)[0] for label in (1, C)]
    share = (torch.arange(TOKENS) / TOKENS)[:, None]  # known, when the token of a turn is drawn
    logits = Guidance(cfg).combine([CLASS, NULL], torch.cat(both), share)
    p = probabilities(logits, sampling).gather(2, images.gather(1, orders)[..., None])[..., 0]
    p = p.double()[:, known.shape[1] :].prod(1)
    return p * (images.gather(1, orders[:, : known.shape[1]]) == known).all(1)


def chi_square(model, drafts, cfg=(1.0, 4.0), sampling=Sampling(), known=0):
    """(statistic, degrees of freedom) of the images drawn, against their exact probabilities."""
    order = torch.tensor([[2, 0, 3, 1]])
    given = torch.full((1, known), 1)
    expected = SAMPLES * probability_of_each_image(model, order, given, cfg, sampling)

    order, given, generator = order.expand(BATCH, -1), given.expand(BATCH, -1), seeded(0)
    options = dict(cfg=cfg, drafts=drafts, known=(order[:, :known], given)) | vars(sampling)
    drawn = [model.generate(torch.ones(BATCH).long(), order[:, known:], generator=generator, **options)
             for _ in range(SAMPLES // BATCH)]
    number = torch.cat(drawn) @ CODES ** torch.arange(TOKENS - 1, -1, -1)  # of each image, as product counts
    counts = torch.bincount(number, minlength=len(expected)).double()
    assert (counts[expected == 0] == 0).all()  # what cannot be is never drawn
    often = expected > 5  # the rule of thumb for this test
    return ((counts - expected)[often] ** 2 / expected[often]).sum().item(), often.sum().item() - 1


def fits(statistic, freedom):
    """Within five standard deviations of what chance alone would give."""
    return statistic < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("drafts, options", [
    (1, {}), (5, {}),  # even more than there are tokens
    (3, dict(cfg=(1, 1))), (2, dict(known=1)),
    (3, dict(sampling=Sampling(temperature=0.7, top_k=2))), (3, dict(sampling=Sampling(top_p=0.8)))])
def test_images_have_the_probability_that_one_token_a_step_gives_them(smallest, drafts, options):
    assert fits(*chi_square(smallest, drafts, **options))


@torch.no_grad()
def logits_of_training(model, tokens, label, order, kept=None):
    """Of each turn, [1, N, V], from one pass; kept: [1, N], tokens that are not replaced by zeros."""
    x, cos_sin = model.sequence(tokens, torch.tensor([label]), order)
    if kept is not None:
        x[:, 2::2] *= kept[..., None]
    return model.logits(model.hidden_states(x[:, :-1], cos_sin[:, :-1])[:, 1::2])


def of_image(steps, i):
    """(positions [n], tokens [n], logits [n, V]) of an image of a batch; what is repeated, once."""
    first = {}
    for step in steps:
        for position, token, logits in zip(step.positions[i], step.tokens[i], step.logits[i]):
            first.setdefault(position.item(), (token, logits))
    return (torch.tensor(list(first)), *map(torch.stack, zip(*first.values())))


@pytest.mark.parametrize("drafts, known, scg", [
    (1, 0, 1.0), (1, 5, 1.7), (3, 0, 1.7), (3, 5, 1.0), (20, 5, 1.0)])
def test_every_token_is_drawn_from_the_logits_of_one_token_a_step(model, batch, drafts, known, scg):
    tokens, classes, order = batch
    prefix = order[:, :known], tokens.gather(1, order[:, :known])
    steps = list(model.decode(classes, order[:, known:], cfg=(1.0, 4.0), scg=scg, drafts=drafts,
                              known=prefix, generator=seeded(0)))
    assert len(steps) < N - known or drafts == 1
    kept = torch.rand(len(order), N + 2 * drafts + 1, 1, generator=seeded(0)).ge(0.25)  # the first chance
    w_cfg = 1 + 3 * (torch.arange(N) / N)[:, None]
    for i, label in enumerate(classes.tolist()):
        positions, drawn, logits = of_image(steps, i)
        assert torch.equal(positions, order[i, known:])
        drawn = torch.cat([prefix[1][i], drawn])[None]
        image = torch.zeros_like(drawn).scatter_(1, order[i : i + 1], drawn)
        full, null = (logits_of_training(model, image, x, order[i : i + 1]) for x in (label, C))
        dropped = logits_of_training(model, image, C, order[i : i + 1], kept[i : i + 1, :N, 0])
        expected = dropped + scg * (null - dropped) + w_cfg * (full - null)
        assert torch.allclose(logits, expected[0, known:], atol=1e-4)


def test_images_of_a_batch_go_on_at_their_own_pace(model, batch):
    _, classes, order = batch
    image = model.generate(classes, order, drafts=4, generator=seeded(0))
    assert image.min() >= 0
    alone = [len(list(model.decode(classes[:1], order[:1], drafts=4, generator=seeded(i)))) for i in range(9)]
    assert len(set(alone)) > 1  # some need more steps than others
    steps = list(model.decode(classes, order, drafts=4, generator=seeded(0)))
    assert max(len(step.tokens[0]) for step in steps) <= 5  # at most all drafts and a query


@pytest.mark.parametrize("drafts", [2, 3])
def test_isolated_queries_draft_and_all_up_to_the_first_that_fails_are_decided(model, batch, monkeypatch,
        drafts):
    (_, classes, order), checks, keep = (x[:1] for x in batch), [], exact.keep_or_redraw

    def witness(drafted, q, p, generator):
        passed, tokens = keep(drafted, q, p, generator)
        checks.append((q, passed[0]))
        return passed, tokens

    def isolated(known):
        """What isolated queries draw all that is missing from, after so many of the image: [1, n, V]."""
        given = order[:, :known], tokens[:, :known]
        step = next(model.decode(classes, order[:, known:], 1, (1, 1), known=given, queries="isolated"))
        return probabilities(step.logits, Sampling(temperature=1.5))

    monkeypatch.setattr(exact, "keep_or_redraw", witness)
    options = dict(cfg=(1, 1), temperature=1.5, drafts=drafts, generator=seeded(3))
    steps = list(model.decode(classes, order, **options))
    tokens = torch.cat([step.tokens for step in steps], dim=1)  # in turns
    assert torch.allclose(checks[0][0], isolated(0)[:, :drafts], atol=1e-5)

    done, failed, whole = 0, 0, 0
    for step, (_, passed), (next_q, _) in zip(steps, checks, checks[1:]):
        assert step.tokens.shape[1] == passed.long().cumprod(0).sum() + 1
        done += step.tokens.shape[1]
        failed += not passed.all()
        if passed.all() and done + drafts <= N:  # the first query's token is decided; others are drafts
            queries = isolated(done - 1)[:, 1:drafts]
            assert torch.allclose(next_q[:, : drafts - 1], queries, atol=1e-5)
            whole += 1
    assert failed and whole


@pytest.mark.parametrize("rule", ["every draft is kept", "failed ones are drawn again from p"])
def test_a_wrong_rule_would_show(smallest, monkeypatch, rule):
    def wrong(drafted, q, p, generator):
        passed, _ = keep(drafted, q, p, generator)
        if rule == "every draft is kept":
            passed = torch.ones_like(passed)
        return passed, torch.where(passed, drafted, exact.draw_tokens(p, generator))

    keep = exact.keep_or_redraw
    monkeypatch.setattr(exact, "keep_or_redraw", wrong)
    assert not fits(*chi_square(smallest, 3))


def test_a_draft_from_any_distribution_becomes_a_token_from_the_wanted_one(monkeypatch):
    """One draft, by exact arithmetic: all drafts x of chance q(x), all of 1,000 evenly spaced chances u."""
    q, p = torch.tensor([[4, 2, 2, 0], [1, 4, 2, 1]], dtype=torch.float64) / 8
    law = torch.zeros(4, dtype=torch.float64)
    for draft in (0, 1, 2):  # 3 is never drawn from q
        for u in torch.arange(0.5, 1000).double() / 1000:
            monkeypatch.setattr(torch, "rand", lambda *_, u=u, **__: u)
            monkeypatch.setattr(exact, "draw_tokens", lambda weights, _: weights)  # the law of a new draw
            passed, weights = exact.keep_or_redraw(torch.tensor([draft]), q[None], p[None])
            kept = torch.nn.functional.one_hot(torch.tensor(draft), 4)
            law += q[draft] / 1000 * (kept if passed else weights[0] / weights.sum())
    assert torch.allclose(law, p)
