"""What the notebooks share: which models to step through, and pictures of grids and sequences.

Nothing of the method is here: it is in the project's files, which `import course` makes importable.

    open_course     the models, the tokenizer and images: the toy world's, or those of files
    pixels_of       tokens -> pictures
    show_pictures, show_numbers, show_ramp, show_strip      drawing, readable in grey
"""

import os
import pathlib
import sys
from types import SimpleNamespace

os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars between what a notebook says

import matplotlib  # noqa: E402  (tqdm is imported after that line)
import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib import pyplot  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from randar import default_steps, load_randar  # noqa: E402  (after the path)
from support import border, data, pictures, released, toy  # noqa: E402
from support.border import UserError  # noqa: E402
from support.classes import names_of_classes  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402

pyplot.rcParams.update({"figure.dpi": 100, "font.size": 11, "image.cmap": "gray"})
NO_RASTER = ("This needs a model of raster order: train one (python train.py --order raster), and "
             "set PATHS['raster'].")

# ------------------------------------------------------------------------------------------------
# The models


def open_course(model="toy", randar=None, raster=None, tokenizer=None, images=None):
    """What a notebook works on: the namespace below.

    model: "toy" or "fine", which ship, of the plain and the fine world; else the files are opened.
    randar, tokenizer: released or own weights, by file, or by a word of support/released.py, which
    fetches them; raster: a counterpart of raster order, None where there is none; images: a folder
    of class folders of images, for `examples`, None: the model draws them. Relative paths start at
    the repository's root.

    randar, raster      the models, in eval mode, on the GPU if there is one; raster may be None
    tokenizer, device
    grid, num_tokens    (h, w) and N = h * w
    steps               decoding steps as in the paper: 88 for 256 tokens, 22 for 64
    names               of the classes
    examples            function (n, seed=0) -> tokens [n, N], classes [n], uint8 [n, H, W, 3]
    """
    device = border.pick_device()
    world = {"toy": "plain", "fine": "fine"}.get(model)
    if model == "toy":
        torch.set_num_threads(1)  # the toy model is too small to be shared among cores
        randar = border.CHECKPOINTS / "randar_toy.pt"
        raster = border.CHECKPOINTS / "randar_toy_raster.pt"
    elif model == "fine":
        randar = toy.folder(world) / "randar.pt"
    if world:
        tokenizer = toy.folder(world) / "tokenizer.pt"
    elif randar is None or tokenizer is None:
        raise UserError(f'MODEL = "{model}" needs its files: '
                        "PATHS = dict(randar=..., tokenizer=...)")

    # ROOT / path is the path itself where that is absolute.
    randar = load_randar(ROOT / released.file_of(randar), device)
    tokenizer = load_tokenizer(ROOT / released.file_of(tokenizer), device)
    raster = load_randar(ROOT / raster, device) if raster else None
    all_names = names_of_classes(randar.class_names, randar.config.num_classes)  # lists
    num_tokens = randar.config.grid[0] * randar.config.grid[1]

    def examples(n, seed=0):
        if world:
            pixels, classes, _ = toy.make(n, seed, world)
        elif images is None:
            return drawn_by(randar, tokenizer, n, seed, device)
        else:
            side = tokenizer.config.image_size
            pixels, classes = images_of(ROOT / images, n, seed, side, all_names)
        batches = pictures.from_uint8(pixels).split(64)
        tokens = torch.cat([tokenizer.encode(batch.to(device)) for batch in batches])
        return tokens, torch.as_tensor(classes).to(device), pixels

    return SimpleNamespace(
        randar=randar, raster=raster, tokenizer=tokenizer, device=device, grid=randar.config.grid,
        num_tokens=num_tokens, steps=default_steps(num_tokens),
        names=[names[0] for names in all_names], examples=examples)


def images_of(folder, n, seed, side, all_names):
    """n images of a folder of class folders: pixels uint8 [n, side, side, 3], classes [n].

    The centre of each, as in training. The folders may be some of the classes only: one that is
    called like a class is that class.
    """
    paths, labels, folders = data.list_images(folder)
    if n > len(paths):
        raise UserError(f"{n} images are needed, {folder} has {len(paths)}")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(paths), generator=generator)[:n].tolist()

    pixels = [data.read_image(paths[i], side) for i in chosen]  # None for an unreadable one
    for i, picture in zip(chosen, pixels):
        if picture is None:
            raise UserError(f"unreadable image {paths[i]}: remove it")
    class_of = {name: i for i, names in enumerate(all_names) for name in names}
    classes = [class_of.get(folders[labels[i]], int(labels[i])) for i in chosen]
    return np.stack(pixels), torch.tensor(classes)


def drawn_by(model, tokenizer, n, seed, device):
    """n examples that the model draws, of classes spread over all: what `examples` returns.

    A model finds its own pictures easy: its loss on them is not the loss on photographs.
    """
    classes = torch.arange(n, device=device) * model.config.num_classes // n  # int64 [n]
    generator = torch.Generator(device).manual_seed(seed)
    batches = [model.generate(part, generator=generator) for part in classes.split(16)]
    tokens = torch.cat(batches)  # [n, N]
    pixels = [pixels_of(tokenizer, part, model.config.grid) for part in tokens.split(16)]
    return tokens, classes, np.concatenate(pixels)


def pixels_of(tokenizer, tokens, grid=None):
    """Tokens [b, N] -> pictures, numpy uint8 [b, H, W, 3]."""
    with torch.no_grad():
        return pictures.to_uint8(tokenizer.decode(tokens, grid))


# ------------------------------------------------------------------------------------------------
# Drawing: each function but the first fills the matplotlib axes that it is given


def show_pictures(pixels, titles=None, columns=8, side=1.5, heading=None):
    """A figure of pictures uint8 [n, H, W, 3], row by row; titles: a string for each, or None."""
    rows = -(-len(pixels) // columns)
    figure, panels = pyplot.subplots(rows, columns, squeeze=False, layout="constrained",
                                     figsize=(side * columns, side * rows * 1.15))
    for panel in panels.flat:
        panel.set_axis_off()
    for i, picture in enumerate(pixels):
        panels.flat[i].imshow(picture, interpolation="nearest")
        if titles is not None:
            panels.flat[i].set_title(titles[i], fontsize=10)
    if heading:
        figure.suptitle(heading)
    return figure


def show_ramp(axes, values, grid, title="", low=None, high=None, colours="gray"):
    """A number for each position, [N] in raster order, as shades, dark is small. -> the image."""
    shades = axes.imshow(np.asarray(values, float).reshape(grid), colours, vmin=low, vmax=high)
    axes.set(title=title, xticks=[], yticks=[])
    return shades


def show_numbers(axes, values, grid, title="", shaded=True, size=9):
    """A number for each position, [N] in raster order, in its cell; shaded: dark is small."""
    values = np.asarray(values).reshape(grid)
    shades = values if shaded else np.ones(grid)
    low, high = (shades.min(), shades.max()) if shaded else (0, 1)
    axes.imshow(shades, "gray", vmin=low - 0.35 * (high - low), vmax=high)

    for (row, column), value in np.ndenumerate(values):
        dark = shaded and value < (low + high) / 2
        colour = "white" if dark else "black"
        axes.text(column, row, value, ha="center", va="center", size=size, color=colour)
    edges = dict(xticks=np.arange(grid[1] + 1) - 0.5, yticks=np.arange(grid[0] + 1) - 0.5)
    axes.set(title=title, **edges)
    axes.tick_params(length=0, labelbottom=False, labelleft=False)
    axes.grid(color="0.6", linewidth=0.6)


STRIP = {"class": ("black", "white"), "P": ("white", "black"), "x": ("0.65", "black"),
         "Q": ("white", "black"), "": ("0.95", "0.95")}  # kind: colours of the box, of its letters


def show_strip(axes, labels, kinds, below=None, title=""):
    """A sequence as a row of boxes. labels: what stands in each; kinds: keys of STRIP.

    A Q has a dashed edge. below: what stands under each box, smaller, or None.
    """
    for i, (label, kind) in enumerate(zip(labels, kinds)):
        fill, letters = STRIP[kind]
        edge = "--" if kind == "Q" else "-"
        box = matplotlib.patches.Rectangle((i + 0.05, 0), 0.9, 1, facecolor=fill, edgecolor="black",
                                           linestyle=edge)
        axes.add_patch(box)
        axes.text(i + 0.5, 0.5, label, ha="center", va="center", color=letters, fontsize=10)
        if below is not None:
            axes.text(i + 0.5, -0.15, below[i], ha="center", va="top", fontsize=8)
    axes.set(xlim=(0, len(labels)), ylim=(-0.9 if below is not None else -0.1, 1.1))
    axes.set_title(title, loc="left")
    axes.set_axis_off()
