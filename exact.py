"""Exact parallel decoding: several tokens a step, with the distribution of one token a step.

Ours, not the paper's: model.decode(..., drafts=8). In Alg. B no token of a step knows the others,
which costs quality. But the next step reads x_1 P_2 x_2 .. P_m x_m anyway. What it predicts at P_j
is p(x_j | all before it), from which one token a step would draw x_j; Alg. B throws it away. So
take what a step draws as *drafts*, and let the next step keep or redraw each:

    keep_or_redraw    why what comes out has the distribution p, whatever was drafted
    exact_steps       the loop

A step decides all drafts up to the first that it redraws, and this one; if it redraws none, also
the token that its first query draws. The drafts after a redrawn one were checked by a p that had
read a wrong token. What comes out there is a draft again, mostly the same one (arXiv 2510.24211).

Is that still exact? Drafts depend on each other by now. But given all that happened at *earlier
turns*, in this step and in those before, a draft has the distribution q; and q, p and whether its
turn is decided in this step depend on earlier turns only. So keep_or_redraw makes p of q, turn by
turn. More drafts mean fewer steps, but more that each step reads for nothing. The words are those
of randar.py; notebook 9 shows one picture.
"""

import torch
import torch.nn.functional as F

from randar import Step, draw_tokens, probabilities


def keep_or_redraw(drafted, q, p, generator=None):
    """From tokens drawn from q make tokens that have the distribution p: (passed, tokens).

    drafted, tokens: int64 [..., m]; q, p: [..., m, V]; passed: bool [..., m], which are kept. A
    draft x is kept with probability min(1, p(x) / q(x)). Otherwise another one is drawn in its
    place, with a chance in proportion to max(0, p - q). So the probability that x comes out is

        q(x) min(1, p(x) / q(x)) + max(0, p(x) - q(x))  =  p(x)

    since all the max(0, p - q) sum to the probability that a draft is not kept. A bad q only means
    that few are: speculative decoding (arXiv 2211.17192).
    """
    ratio = (p / q).gather(-1, drafted[..., None])[..., 0]  # [..., m]; q(x) > 0: it was drawn
    passed = torch.rand(ratio.shape, generator=generator, device=p.device) < ratio
    redrawn = draw_tokens((p - q).clamp(min=0), generator)
    return passed, torch.where(passed, drafted, redrawn)


# ------------------------------------------------------------------------------------------------
# The loop. With 2 drafts a step reads, in this order,
#
#     x_i P x P x P Q Q     x_i: the last known token (the class, if there is none).
#         |   |             At these P it checks the drafts, each x that follows one.
#                 | | |     These are queries, and do not see each other. They draw what comes after
#                           the drafts: one token, and further drafts.


def layout(drafts, device):
    """What one step reads of the sequence, r tokens, counted from x_i: (reads, s, at_p, sees).

    reads: int64 [r], how far after x_i; the first s follow each other, and stay in the cache.
    at_p: int64 [2 drafts + 1], which of them are P or Q. sees: bool [r, r], which others each sees.
    """
    s = 2 * drafts + 2
    queries = s + 1 + 2 * torch.arange(drafts, device=device)
    reads = torch.cat([torch.arange(s, device=device), queries])
    at_p = (reads % 2).nonzero()[:, 0]
    sees = torch.ones(len(reads), len(reads), dtype=torch.bool, device=device).tril()
    sees[s - 1 :, s - 1 :] = torch.eye(drafts + 1, dtype=torch.bool, device=device)
    return reads, s, at_p, sees


@torch.no_grad()
def exact_steps(model, classes, order, drafts, contexts, guidance, sampling, generator, known,
                angles):
    """RandAR.decode with drafts, its arguments checked: an iterator of Step.

    Images of a batch are not equally far: `done`, how many tokens are known, is int64 [b].
    """
    # The order goes on with its last position, so that there is always enough to draft. No token
    # of the image sees what is drafted there.
    (b, k), total = known[0].shape, known[0].shape[1] + order.shape[1]
    order = torch.cat([order, order[:, -1:].repeat(1, 2 * drafts + 1)], dim=1)
    positions, x, cos_sin, kept = model.beginning(classes, order, contexts, generator, known,
                                                  angles)
    done, device, c = torch.full_like(classes, k), x.device, len(contexts)
    reads, s, at_p, sees = layout(drafts, device)

    # The first drafts are drawn by a step of Alg. B with isolated queries; q: what they come from.
    step = next(model._steps(classes, order, [drafts], contexts, guidance, sampling, generator,
                             known, angles, isolated=True))
    q = probabilities(step.logits, sampling)  # [b, drafts, V]
    tokens = torch.cat([known[1], step.tokens], dim=1)
    tokens = F.pad(tokens, (0, positions.shape[1] - tokens.shape[1]))  # in turns: [b, k + n + ..]

    # The cache: all places of the sequence and, after them, r more for what a step reads
    end, rows = x.shape[1], torch.arange(len(x), device=device)[:, None]
    size = len(x), model.config.n_head, end + len(reads), model.head_dim
    caches = x.new_zeros(model.config.n_layer, 2, *size)
    if k:
        model.hidden_states(x[:, : 2 * k], cos_sin[:, : 2 * k], None, caches)

    ahead = torch.arange(2 * drafts + 1, device=device)  # turns from `done` on
    while (done < total).any():
        x[:, 2::2] = model.tok_embeddings(tokens).repeat(c, 1, 1) * kept
        places = 2 * done.repeat(c)[:, None] + reads  # [c * b, r]
        cached = torch.arange(end, device=device) < places[:, :1]  # before x_i: [c * b, end]
        mask = torch.cat([cached[:, None].expand(-1, len(reads), -1),
                          sees.expand(len(x), -1, -1)], dim=2)[:, None]  # [c * b, 1, r, end + r]
        y = model.hidden_states(x[rows, places], cos_sin[rows, places], mask, caches, end)

        # Keys and values to their own places. Those of drafts that fail will be overwritten.
        read = caches[:, :, :, :, end : end + s]  # [layers, 2, c * b, heads, s, D]
        # rows and places are indices: their axes come first, [c * b, s, layers, 2, heads, D].
        caches[:, :, rows, :, places[:, :s]] = read.permute(2, 4, 0, 1, 3, 5)

        # Check the drafts, draw from the queries.
        turn = done[:, None] + ahead  # [b, 2 drafts + 1]
        share = turn[..., None] / total  # known, when one token a step draws this one
        logits = guidance.combine(contexts, model.logits(y[:, at_p]), share)
        p = probabilities(logits, sampling)  # [b, 2 drafts + 1, V]
        drafted = tokens.gather(1, turn[:, :drafts])  # [b, drafts]
        passed, checked = keep_or_redraw(drafted, q, p[:, :drafts], generator)
        tokens.scatter_(1, turn, torch.cat([checked, draw_tokens(p[:, drafts:], generator)], dim=1))

        # An image that decides fewer than another one repeats its last: the first time counts.
        decided = (passed.long().cumprod(1).sum(1) + 1).minimum(total - done)  # [b]
        shown = ahead[: decided.max()].minimum(decided[:, None] - 1)
        at, shown = done[:, None] + shown, shown.clamp(min=0)[..., None]
        yield Step(positions[:b].gather(1, at), tokens.gather(1, at),
                   torch.take_along_dim(logits, shown, dim=1))
        q = torch.take_along_dim(p, (decided[:, None] + ahead[:drafts])[..., None], dim=1)
        done = done + decided
