"""What the notebooks share: which models to step through, and pictures that say something about a grid.

Nothing of the method is here: it is in the project's files, which `import course` makes importable.

    open_models     the models, the tokenizer and some images: the toy world's, or those of released files
    pixels_of       tokens -> pictures
    show_pictures, show_numbers, show_ramp, show_strip      drawing, readable in grey
"""

import pathlib
import sys
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import common  # noqa: E402  (after the path)
import data  # noqa: E402
import toy  # noqa: E402
from randar import load_randar  # noqa: E402
from sample import decoding_steps, names_of_classes  # noqa: E402
from vqgan import load_tokenizer  # noqa: E402

pyplot.rcParams.update({"figure.dpi": 100, "font.size": 11, "axes.grid": False, "image.cmap": "gray"})
NO_RASTER = "This needs a model of raster order: train one (train.py --order raster), set PATHS['raster']."


def open_models(model="toy", randar=None, raster=None, tokenizer=None, images=None):
    """What a notebook works on. model: "toy", the weights that ship; else the files given are opened.

    randar, tokenizer: released or own weights; raster: a raster-order counterpart, or None where there is
    none; images: a folder of class folders of images, for `examples`. Returns a namespace:

    randar, raster      the models, in eval mode on the GPU if there is one; raster may be None
    tokenizer, device
    grid, number        (h, w) and N = h * w
    steps               decoding steps as in the paper: 88 for 256 tokens, 22 for 64
    names               of the classes
    examples            a function (n, seed=0) -> tokens [n, N], classes [n], pixels uint8 [n, H, W, 3]
    """
    device = common.pick_device()
    if model == "toy":
        randar, raster, tokenizer = (common.CHECKPOINTS / name for name in (
            "randar_toy.pt", "randar_toy_raster.pt", "tokenizer.pt"))
    elif randar is None or tokenizer is None:
        raise ValueError(f'MODEL = "{model}" needs its files: PATHS = dict(randar=..., tokenizer=...)')
    randar, tokenizer = load_randar(randar, device), load_tokenizer(tokenizer, device)
    raster = load_randar(raster, device) if raster else None

    aliases = names_of_classes(randar.class_names, randar.config.num_classes)  # all names of each class

    def examples(n, seed=0):
        if model == "toy":
            pixels, classes, _ = toy.make(n, seed)
        else:
            if images is None:
                raise ValueError("some images are needed: PATHS['images'], a folder of class folders")
            paths, labels, folders = data.list_images(images)
            if n > len(paths):
                raise ValueError(f"{n} images are needed, {images} has {len(paths)}")
            chosen = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed))[:n].tolist()
            side = tokenizer.config.image_size
            pixels = np.stack([np.array(common.open_picture(paths[i]).resize((side, side))) for i in chosen])
            # Folders may be some of the classes only: where one is called like a class, it is that class.
            numbers = {name: i for i, names in enumerate(aliases) for name in names}
            classes = torch.tensor([numbers.get(folders[labels[i]], int(labels[i])) for i in chosen])
        tokens = torch.cat([tokenizer.encode(common.from_uint8(pixels[i : i + 64]).to(device))
                            for i in range(0, n, 64)])
        return tokens, torch.as_tensor(classes).to(device), pixels

    return SimpleNamespace(randar=randar, raster=raster, tokenizer=tokenizer, device=device,
                           names=[names[0] for names in aliases],
                           grid=randar.config.grid, number=randar.config.grid[0] * randar.config.grid[1],
                           steps=decoding_steps(randar.config.grid), examples=examples)


def pixels_of(tokenizer, tokens, grid=None):
    """Tokens [b, N] -> pictures, numpy uint8 [b, H, W, 3]."""
    with torch.no_grad():
        return common.to_uint8(tokenizer.decode(tokens, grid))


# ------------------------------------------------------------------------------------------------------------
# Drawing: each function fills the matplotlib axes that it is given


def show_pictures(pixels, titles=None, columns=8, side=1.5, heading=None):
    """A figure of pictures uint8 [n, H, W, 3], row after row; titles: a string for each, or None."""
    rows = -(-len(pixels) // columns)
    figure, axes = pyplot.subplots(rows, columns, squeeze=False, layout="constrained",
                                   figsize=(side * columns, side * rows * 1.15))
    for place in axes.flat:
        place.set_axis_off()
    for i, picture in enumerate(pixels):
        axes.flat[i].imshow(picture, interpolation="nearest")
        if titles is not None:
            axes.flat[i].set_title(titles[i], fontsize=10)
    if heading:
        figure.suptitle(heading)
    return figure


def show_ramp(axes, values, grid, title="", low=None, high=None, colours="gray"):
    """A number for each position, [N] in raster order, as shades: dark is small. Returns the image."""
    shades = axes.imshow(np.asarray(values, float).reshape(grid), colours, vmin=low, vmax=high)
    axes.set(title=title, xticks=[], yticks=[])
    return shades


def show_numbers(axes, values, grid, title="", shaded=True, size=9):
    """A number for each position, [N] in raster order, written into its cell; shaded: dark is small."""
    values = np.asarray(values).reshape(grid)
    shades = values if shaded else np.ones(grid)
    low, high = (shades.min(), shades.max()) if shaded else (0, 1)
    axes.imshow(shades, "gray", vmin=low - 0.35 * (high - low), vmax=high)
    for (row, column), value in np.ndenumerate(values):
        dark = shaded and value < (low + high) / 2
        axes.text(column, row, value, ha="center", va="center", size=size, color="white" if dark else "black")
    axes.set(title=title, xticks=np.arange(grid[1] + 1) - 0.5, yticks=np.arange(grid[0] + 1) - 0.5)
    axes.tick_params(length=0, labelbottom=False, labelleft=False)
    axes.grid(color="0.6", linewidth=0.6)


STRIP = {"class": ("black", "white"), "P": ("white", "black"), "x": ("0.65", "black"),  # fill, letters
         "Q": ("white", "black"), "": ("0.95", "0.95")}


def show_strip(axes, labels, kinds, below=None, title=""):
    """A sequence as a row of boxes. labels: what stands in each; kinds: keys of STRIP (Q has a dashed edge).

    below: what stands under each box, smaller, or None.
    """
    for i, (label, kind) in enumerate(zip(labels, kinds)):
        fill, letters = STRIP[kind]
        axes.add_patch(matplotlib.patches.Rectangle((i + 0.05, 0), 0.9, 1, facecolor=fill, edgecolor="black",
                                                    linestyle="--" if kind == "Q" else "-"))
        axes.text(i + 0.5, 0.5, label, ha="center", va="center", color=letters, fontsize=10)
        if below is not None:
            axes.text(i + 0.5, -0.15, below[i], ha="center", va="top", fontsize=8)
    axes.set(xlim=(0, len(labels)), ylim=(-0.9 if below is not None else -0.1, 1.1))
    axes.set_title(title, loc="left")
    axes.set_axis_off()
