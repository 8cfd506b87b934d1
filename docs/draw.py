"""Draws README's first picture, docs/randar.png: python docs/draw.py

Above, the training sequence of one image; below, one set of weights that decodes in three orders.
"""

import pathlib
import sys

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from randar import default_steps, generation_order, load_randar  # noqa: E402
from support import border, pictures, toy  # noqa: E402
from support.pictures import UNDECODED, to_uint8  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402

INSTRUCTION, TOKEN, CLASS = "#3b6fb6", "#444444", "#b6553b"


def where(position, side=8):
    """A small grid with one dark cell: what a position instruction token says."""
    cells = np.full((side, side, 3), 235, np.uint8)
    cells[divmod(position, side)] = (59, 111, 182)
    return cells


def box(figure, left, bottom, size, picture, label, colour):
    """A framed picture, or an empty frame, with a label above; sizes are shares of the figure."""
    height = size * figure.get_figwidth() / figure.get_figheight()
    axes = figure.add_axes((left, bottom, size, height))
    if picture is not None:
        axes.imshow(picture, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])

    # The frame and the label have the colour of their kind of token.
    for spine in axes.spines.values():
        spine.set(edgecolor=colour, linewidth=2)
    axes.set_title(label, color=colour, fontsize=11, pad=4)
    return axes


def draw_training(figure):
    """The upper part: the sequence of one image in one random order."""
    title = ("Training: a random order for each image. A position instruction token P says where "
             "the next token x belongs.")
    figure.text(0.01, 0.96, title, fontsize=12, weight="bold")

    # The image and its class.
    look = dict(x=16, y=15, size=1.1, colour=1, background=0, flip=False)
    pixels, _ = toy.draw(1, np.random.default_rng(0), **look)
    box(figure, 0.01, 0.74, 0.105, pixels, "image", TOKEN)
    axes = box(figure, 0.15, 0.775, 0.055, None, "class", CLASS)
    axes.text(0.5, 0.5, "fish", ha="center", va="center", transform=axes.transAxes, color=CLASS)

    # The first six pairs P, x. A token of the toy world is a square of 4 x 4 pixels.
    order = generation_order("random", 1, (8, 8), torch.Generator().manual_seed(9))[0].tolist()
    for i, position in enumerate(order[:6]):
        row, column = divmod(position, 8)
        patch = pixels[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        left = 0.217 + 0.128 * i
        box(figure, left, 0.775, 0.055, where(position), f"$P_{i + 1}$", INSTRUCTION)
        box(figure, left + 0.062, 0.775, 0.055, patch, f"$x_{i + 1}$", TOKEN)
        label = f"predicts $x_{i + 1}$"
        figure.text(left + 0.0275, 0.74, label, ha="center", fontsize=10, color=INSTRUCTION)
    figure.text(0.985, 0.81, "...", fontsize=16, ha="center")


def decode(model, tokenizer, name, label):
    """An image uint8 [32, 32, 3], and the step that decoded each of its pixels, int [32, 32]."""
    generator = torch.Generator().manual_seed(5)
    order = generation_order(name, 1, (8, 8), generator)
    tokens, step_of = torch.zeros_like(order), torch.zeros_like(order)

    for i, step in enumerate(model.decode(torch.tensor([label]), order, generator=generator)):
        tokens.scatter_(1, step.positions, step.tokens)
        step_of.scatter_(1, step.positions, torch.full_like(step.tokens, i))
    step_of = np.kron(step_of.view(8, 8).numpy(), np.ones((4, 4), int))
    return to_uint8(tokenizer.decode(tokens))[0], step_of


def draw_decoding(figure, model, tokenizer):
    """The lower part: one row for each order, the same weights."""
    title = ("Generation: any order, several tokens a step, a key-value cache. All rows: the same "
             "weights.")
    figure.text(0.01, 0.66, title, fontsize=12, weight="bold")
    moments = [2, 6, 10, 14, 18, default_steps(64)]

    # The finished image, with what is not yet decoded at that moment in grey.
    for row, (name, label) in enumerate((("random", 7), ("spiral_in", 4), ("center_first", 8))):
        image, step_of = decode(model, tokenizer, name, label)
        bottom = 0.455 - 0.215 * row
        figure.text(0.01, bottom + 0.085, f"order\n{name}", fontsize=11, va="center")
        for column, moment in enumerate(moments):
            shown = np.where((step_of < moment)[..., None], image, UNDECODED)
            known = int((step_of < moment).sum() / 16)
            label = f"step {moment}: {known} of 64"
            box(figure, 0.15 + 0.142 * column, bottom, 0.107, shown, label, TOKEN)


def main():
    model = load_randar(border.CHECKPOINTS / "randar_toy.pt")
    tokenizer = load_tokenizer(border.CHECKPOINTS / "tokenizer.pt")
    figure = pyplot.figure(figsize=(12, 8.2), dpi=110)

    draw_training(figure)
    draw_decoding(figure, model, tokenizer)
    pictures.save_figure(figure, HERE / "randar.png")


if __name__ == "__main__":
    main()
