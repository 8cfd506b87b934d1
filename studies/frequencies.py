"""How many rotary frequencies can be extrapolated? A theory, tried on models trained for it.

    python -m studies.frequencies paper     the toy model after 600 steps, which ships
    python -m studies.frequencies base      all frequencies fast, by another base: trains it first
    python -m studies.frequencies heads     twice as many, by wider heads: likewise

A frequency that turns around within the grid of training shows every angle there. Extrapolated to
twice the grid (apps.extrapolate, Sec. 3.4.3) it meets no new one. Attention alone, which sees
differences of positions, of both signs, is content with half a turn. So one of two is to be seen:
pictures break at the first frequency that does not make a whole turn, or half of one. Of the three
models' frequencies one makes a whole turn; 1, 5 and 2 make half of one. Each model draws pictures
of 16 x 16 tokens in hierarchical order, with the k fastest frequencies of each axis extrapolated.
The judge sees them at half size.

turns_across    how often each frequency turns around
accuracy        of what is drawn, for one k
"""

import json
import math
import sys

import torch
import torch.nn.functional as F

import randar
import train
from apps import extrapolate
from sample import load_models
from studies.miniature import RESULTS
from support import border, judge

MODELS = {"paper": (10_000.0, 4), "base": (4.0, 4), "heads": (10_000.0, 2)}  # base, heads
STEPS, PICTURES = 600, 100
NUMBERS = (0, 1, 2, 3, 4, 6, 8)  # k


def turns_across(side, head_dim, base=10_000.0):
    """How often each frequency turns around from an axis's first token to its last: [D / 4]."""
    angles = randar.rotary_angles(torch.tensor(side - 1.0), torch.tensor(0.0), head_dim, base)
    return angles[: head_dim // 4] / (2 * math.pi)  # the row's


def accuracy(model, tokenizer, frequencies):
    """The share of PICTURES, drawn with so many frequencies extrapolated, that the judge names."""
    device = next(model.parameters()).device
    generator, right = torch.Generator(device).manual_seed(0), []
    for classes in (torch.arange(PICTURES, device=device) % 10).split(50):
        images, _ = extrapolate(model, tokenizer, classes, frequencies=frequencies, scg=1.0,
                                steps=48, generator=generator)  # [50, 3, 64, 64]
        right.append(judge.judge(F.avg_pool2d(images, 2), classes)["accuracy"])
    return sum(right) / len(right)


def main():
    parser = border.command_line(__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--out", default="frequencies", help="for trainings (default: frequencies)")
    args = parser.parse_args()

    # The base is a number of the formula and in no file; heads are part of a size.
    base, heads = MODELS[args.model]
    randar.rotary_angles.__defaults__ = (base,)
    randar.SIZES["toy"] |= dict(n_head=heads)
    path = border.CHECKPOINTS / f"miniature/toy_{STEPS}.pt"  # "paper" ships
    if args.model != "paper":
        with border.one_line_errors():
            folder = border.writable_folder(args.out) / args.model
        path, saved = folder / "randar.pt", folder / "training.pt"
        if not saved.is_file() or border.load(saved)["step"] < STEPS:
            sys.argv = ["train.py", "--steps", str(STEPS), "--descent", "0", "--out", str(folder)]
            sys.argv += ["--resume"] if saved.is_file() else []
            train.main()

    with border.one_line_errors():
        device = border.pick_device()
        model, tokenizer = load_models(path, border.CHECKPOINTS / "tokenizer.pt", device)
        turns = turns_across(model.config.grid[0], model.head_dim, base).tolist()
        row = dict(model=args.model, base=base, heads=heads, turns=turns, accuracy={})
        file = RESULTS / f"frequencies_{args.model}.json"
        for k in NUMBERS:
            row["accuracy"][k] = accuracy(model, tokenizer, k)
            print(f"k = {k}: {row['accuracy'][k]:.0%}", flush=True)
        border.write_safely(file, lambda partial: partial.write_text(json.dumps(row)))


if __name__ == "__main__":
    main()
