"""Makes docs/step.html, decodings to step through in a browser: python docs/draw_step.py

The page shows what `RandAR.decode` did: a `Recorder` listens to it. docs/step_template.html is the
page without its data. Three to six minutes on one CPU core.
"""

import base64
import io
import json
import pathlib
import sys

import numpy as np
import torch
from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import exact  # noqa: E402
import randar  # noqa: E402
from support import border, toy  # noqa: E402
from support.pictures import to_uint8  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402

CLASSES = ["fish", "house", "butterfly"]
ORDERS = ["random", "raster", "spiral_in", "hierarchical"]
SCHEDULES = {  # what the page calls it: arguments of `decode`
    "64 steps, one token each": dict(steps=-1),
    "22 steps, the default": dict(steps=22),
    "8 steps, few": dict(steps=8),
    "exact, 8 drafts a step": dict(drafts=8),
}
CFG, SEED, LIKELIEST = (1.0, 4.0), 5, 5


class Recorder:
    """In a `with` block: what the model is asked and answers in each pass, which drafts are kept.

    passes: of each (mask, bool [r, places]; start_pos; logits [c, m, V]), one image decoded;
    checks: of each step of exact decoding (drafts [m], q [m, V], p [m, V], passed [m]).
    """

    def __init__(self, model):
        self.model, self.passes, self.checks = model, [], []

    def __enter__(self):
        self.keep_or_redraw = exact.keep_or_redraw

        def hidden_states(x, cos_sin, mask, caches, start_pos):
            if mask is None:  # causal
                mask = torch.ones(x.shape[1], start_pos + x.shape[1], dtype=torch.bool)
                mask = mask.tril(start_pos)
            self.asked = mask.reshape(-1, *mask.shape[-2:])[0], start_pos  # contexts have the same
            return type(self.model).hidden_states(self.model, x, cos_sin, mask, caches, start_pos)

        def logits(y):
            self.passes.append((*self.asked, type(self.model).logits(self.model, y)))
            return self.passes[-1][-1]

        def keep_or_redraw(drafts, q, p, generator):
            passed, tokens = self.keep_or_redraw(drafts, q, p, generator)
            self.checks.append((drafts[0], q[0], p[0], passed[0]))
            return passed, tokens

        self.model.hidden_states, self.model.logits = hidden_states, logits
        exact.keep_or_redraw = keep_or_redraw
        return self

    def __exit__(self, *error):
        del self.model.hidden_states, self.model.logits  # those of the class are back
        exact.keep_or_redraw = self.keep_or_redraw


def thousandths(p):
    """Probabilities, [n], as a list of whole numbers."""
    return (1000 * p).round().int().tolist()


def sees(mask):
    """How many places each row of a mask sees: the first ones, as many as it says, and itself."""
    counts = mask.long().cumprod(1).sum(1)  # [r]
    own = torch.arange(mask.shape[1] - len(mask), mask.shape[1])[:, None]
    places = torch.arange(mask.shape[1])
    assert torch.equal(mask, (places < counts[:, None]) | (places == own))  # what the page draws
    return counts.tolist()


def answers(logits, turns, drawn, num_tokens):
    """What each query is answered: [code, with class, without class, guided] of the likeliest.

    logits: [2, m, V]; turns: tokens known when it is drawn, [m]; drawn: [m] codes, always listed.
    """
    share = torch.as_tensor(turns)[:, None] / num_tokens
    guided = randar.Guidance(CFG).combine([randar.CLASS, randar.NULL], logits, share)[0]
    p = torch.stack([logits[0], logits[1], guided]).softmax(-1)  # [3, m, V]
    rows = []
    for i, code in enumerate(drawn):
        best = p[2, i].topk(LIKELIEST).indices.tolist()
        codes = best + [code] * (code not in best)
        rows.append([[c, *thousandths(p[:, i, c])] for c in codes])
    return rows


def parallel_steps(passes, steps, num_tokens):
    """Alg. B, one dict a step; what its entries mean stands in the page's template."""
    told, done = [], 0
    for (mask, start_pos, logits), step in zip(passes, steps, strict=True):
        drawn, first = step.tokens[0].tolist(), 1 + 2 * done
        reads = [*range(start_pos, first), *range(first, first + 2 * len(drawn), 2)]
        told.append(dict(
            done=done, decides=len(drawn), reads=reads, queries=len(drawn), start=start_pos,
            sees=sees(mask), drawn=drawn,
            answers=answers(logits, [done] * len(drawn), drawn, num_tokens)))
        done += len(drawn)
    return told


def exact_steps(recorder, steps, num_tokens, drafts):
    """Exact decoding: a pass that drafts, then steps that check; turns behind the end are left."""
    mask, start_pos, logits = recorder.passes[0]
    tokens = recorder.checks[0][0].tolist()
    told = [dict(done=0, decides=0, reads=[0, *range(1, 2 * drafts, 2)], queries=drafts, start=0,
                 sees=sees(mask), drawn=tokens,
                 answers=answers(logits, [0] * drafts, tokens, num_tokens))]

    done, reads = 0, [*range(2 * drafts + 2), *range(2 * drafts + 3, 4 * drafts + 3, 2)]
    for i, (mask, start_pos, logits) in enumerate(recorder.passes[1:]):
        draft, q, p, passed = recorder.checks[i]
        q, p = (x.gather(1, draft[:, None])[:, 0] for x in (q, p))  # [drafts]
        turns = torch.arange(done, done + 2 * drafts + 1)
        assert mask[:, : 2 * done].all()  # all that is cached, as the page draws it
        decided, shown = steps[i].tokens.shape[1], min(len(turns), num_tokens - done)

        # What it drew and did not decide, the next step finds as its drafts.
        drawn = steps[i].tokens[0].tolist()
        if i + 1 < len(recorder.checks):
            drawn += recorder.checks[i + 1][0].tolist()
        told.append(dict(
            done=done, decides=decided, reads=[2 * done + place for place in reads], start=-1,
            queries=drafts, sees=sees(mask[:, start_pos:]), drawn=drawn[:shown],
            drafts=draft.tolist()[:shown], kept=passed.int().tolist()[:shown],
            q=thousandths(q[:shown]), p=thousandths(p[:shown]),
            chance=thousandths((p / q).clamp(max=1)[:shown]),
            answers=answers(logits, turns, drawn, num_tokens)[:shown]))
        done += decided
    return told


def png(pixels):
    """Pixels uint8 [h, w, 3] as the base64 of a PNG of at most 128 colours."""
    file = io.BytesIO()
    Image.fromarray(pixels).quantize(128).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


@torch.no_grad()
def cut_patches(tokenizer, tokens, places, side=8, f=4, columns=16):
    """Codes as pixels, [rows * f, columns * f, 3]: each in its position of the finished picture.

    What a code looks like depends on its neighbours. tokens: int64 [N]; places: (position, code)s.
    """
    patches = np.zeros((-len(places) // columns * -columns, f, f, 3), np.uint8)
    for begin in range(0, len(places), 64):
        positions, codes = torch.tensor(places[begin : begin + 64]).unbind(1)
        grids = tokens.repeat(len(codes), 1).scatter_(1, positions[:, None], codes[:, None])
        pixels = to_uint8(tokenizer.decode(grids))
        cells = pixels.reshape(-1, side, f, side, f, 3).swapaxes(2, 3)  # [n, row, column, f, f, 3]
        patches[begin : begin + len(codes)] = cells[range(len(codes)), positions // side,
                                                    positions % side]
    rows = patches.reshape(-1, columns, f, f, 3).swapaxes(1, 2)
    return rows.reshape(-1, columns * f, 3)


def record(model, tokenizer, label, name, options):
    """One decoding, as the page wants it."""
    generator = torch.Generator().manual_seed(SEED)
    num_tokens = 64
    order = randar.generation_order(name, 1, model.config.grid, generator)
    with Recorder(model) as recorder:
        steps = list(model.decode(torch.tensor([label]), order, cfg=CFG, generator=generator,
                                  **options))
    if "drafts" in options:
        told = exact_steps(recorder, steps, num_tokens, options["drafts"])
    else:
        told = parallel_steps(recorder.passes, steps, num_tokens)

    # The page knows a code by its patch: the first are the finished picture's, turn by turn.
    turns = order[0].tolist()
    codes = torch.cat([step.tokens for step in steps], dim=1)[0]
    patches = {place: i for i, place in enumerate(zip(turns, codes.tolist()))}

    def patch(turn, code):
        return patches.setdefault((turns[turn], code), len(patches))

    for step in told:
        step["drawn"] = [patch(step["done"] + i, code) for i, code in enumerate(step["drawn"])]
        step["drafts"] = [patch(step["done"] + i, code)
                          for i, code in enumerate(step.get("drafts", []))]
        step["answers"] = [[[patch(step["done"] + i, code), *p] for code, *p in rows]
                           for i, rows in enumerate(step["answers"])]
    image = torch.zeros_like(codes).scatter(0, order[0], codes)
    return dict(turns=turns, codes=[code for _, code in patches], steps=told,
                png=png(cut_patches(tokenizer, image, list(patches))))


def main():
    model = randar.load_randar(border.CHECKPOINTS / "randar_toy.pt")
    tokenizer = load_tokenizer(border.CHECKPOINTS / "tokenizer.pt")
    runs = []
    for name in CLASSES:  # the page counts in this order: the schedule changes fastest
        for order in ORDERS:
            for options in SCHEDULES.values():
                label = toy.CLASSES.index(name)
                runs.append(record(model, tokenizer, label, order, options))
            print(name, order)

    data = dict(classes=CLASSES, orders=ORDERS, schedules=list(SCHEDULES), cfg=CFG, runs=runs)
    page = (HERE / "step_template.html").read_text()
    page = page.replace("{{DATA}}", json.dumps(data, separators=(",", ":")))
    border.write_safely(HERE / "step.html", lambda path: path.write_text(page))


if __name__ == "__main__":
    main()
