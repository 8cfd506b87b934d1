"""Draw pictures: python sample.py

A checkpoint goes in, a labelled grid of pictures comes out. With no argument: the ten classes of the toy
world.
"""

import math
import pathlib

import numpy as np
import torch
from tqdm import tqdm

import common
import toy
from randar import ORDERS, check_sampling, generation_order, load_randar, step_sizes
from vqgan import load_tokenizer

UNDECODED = 200  # the grey of places that are not decoded yet


def decoding_steps(grid):
    """The default number of decoding steps: the paper's 88 for 16 x 16 tokens, and in proportion."""
    return max(1, round(math.prod(grid) * 88 / 256))


def spread_classes(classes, rows=10, columns=8):
    """int64 [n]: `columns` of each class, of at most `rows` classes spread evenly over those given."""
    chosen = [classes[i * len(classes) // min(rows, len(classes))] for i in range(min(rows, len(classes)))]
    return torch.tensor(chosen).repeat_interleave(columns)


def draw_grid(pixels, classes, class_names, title, columns=12):
    """A labelled picture with a row for each class, its first `columns` images; missing ones stay white.

    pixels: uint8 [n, H, W, 3]; classes: list of n ints; class_names: list of str or None.
    Returns a PIL image.
    """
    rows = {label: [] for label in classes}
    for image, label in zip(pixels, classes):
        if len(rows[label]) < columns:
            rows[label].append(image)
    columns = max(map(len, rows.values()))
    white = np.full_like(pixels[0], 255)
    cells = np.stack([image for row in rows.values() for image in row + [white] * (columns - len(row))])
    names = [class_names[label] if class_names else f"class {label}" for label in rows]
    return common.picture_grid(cells, names, title)


def draw_gif(pixels, turns, f, path, seconds=4.0):
    """An animation: grey pictures fill up in the order of decoding, then stay for a while.

    pixels: uint8 [n, H, W, 3], the finished pictures; turns: int [n, h, w], the step in which each token was
    decoded; f: pixels a token. A token's pixels appear, as they are in the end, in the step that decoded it.
    """
    steps, tokens = int(turns.max()) + 1, turns[0].size
    shown = np.stack([np.kron(turns, np.ones((1, f, f), turns.dtype)) < step for step in range(steps + 1)])
    columns = math.ceil(math.sqrt(len(pixels) * 2))
    frames = []
    for step, mask in enumerate(shown):
        cells = np.where(mask[..., None], pixels, np.uint8(UNDECODED))
        cells = np.concatenate([cells, np.full((-len(cells) % columns, *cells.shape[1:]), 255, np.uint8)])
        title = f"step {step} of {steps}: {(turns[0] < step).sum()} of {tokens} tokens"
        frames.append(common.picture_grid(cells, [""] * (len(cells) // columns), title))
    durations = [int(1000 * seconds / steps)] * steps + [2000]
    common.save_picture(frames[0], path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def sample_images(model, tokenizer, classes, seed, batch_size=64, **options):
    """Draw an image of each class: (images [n, 3, H, W] in [-1, 1], turns int64 [n, h, w]), both on the CPU.

    turns: the decoding step in which each token was written. options: order, steps, cfg, scg, temperature,
    top_k, top_p, as RandAR.decode takes them (order by name).
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    h, w = grid = model.config.grid
    name = options.pop("order")
    images, turns = [], []
    with tqdm(total=len(classes), desc="sampling", unit="image", dynamic_ncols=True) as bar:
        for part in torch.as_tensor(classes, device=device).split(batch_size):
            order = generation_order(name, len(part), grid, generator, device)
            tokens, turn = torch.zeros_like(order), torch.zeros_like(order)
            for i, step in enumerate(model.decode(part, order, generator=generator, **options)):
                tokens.scatter_(1, step.positions, step.tokens)
                turn.scatter_(1, step.positions, torch.full_like(step.tokens, i))
            images.append(tokenizer.decode(tokens, grid).cpu())
            turns.append(turn.view(-1, h, w).cpu())
            bar.update(len(part))
    return torch.cat(images), torch.cat(turns)


def parse_classes(words, class_names, number):
    """Class numbers from numbers or names. Raises ValueError for one that the model does not have."""
    classes = []
    for word in words:
        if class_names and word in class_names:
            classes.append(class_names.index(word))
        elif word.isdecimal() and int(word) < number:
            classes.append(int(word))
        else:
            names = f" or a name ({', '.join(class_names[:10])})" if class_names else ""
            raise ValueError(f"no class {word!r}: give a number from 0 to {number - 1}{names}")
    return classes


def main():
    parser = common.command_line(__doc__)
    parser.add_argument("--ckpt", default=common.CHECKPOINTS / "randar_toy.pt",
                        help="weights of train.py or released ones (default: the toy model that ships)")
    parser.add_argument("--tokenizer", help="default: tokenizer.pt beside the checkpoint")
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="numbers or names (default: ten)")
    parser.add_argument("--number", type=int, help="pictures in all (default: 8 of each class)")
    parser.add_argument("--steps", type=int, help="of decoding, -1: one a token (default: 88 per 256 tokens)")
    parser.add_argument("--order", default="random", help=f"one of {', '.join(ORDERS)} (default: random)")
    parser.add_argument("--cfg", nargs=2, type=float, default=(1.0, 4.0), metavar=("START", "END"),
                        help="classifier-free guidance, rising from START to END (default: 1 4)")
    parser.add_argument("--scg", type=float, default=1.0, help="spatial contextual guidance (default: 1)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0, help="the k most likely tokens only (default: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="the likeliest tokens of this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    parser.add_argument("--out", default="samples.png", help="the picture to write (default: samples.png)")
    parser.add_argument("--gif", action="store_true", help="also an animation of the decoding, beside --out")
    args = parser.parse_args()
    with common.one_line_errors():
        device = common.pick_device(args.device)
        if common.picture_format(args.out) == "gif" and args.gif:
            raise ValueError(f"--gif would overwrite {args.out}: end the name of --out in .png")
        model = load_randar(args.ckpt, device)
        beside = pathlib.Path(args.ckpt).with_name("tokenizer.pt")
        tokenizer = load_tokenizer(args.tokenizer or beside, device)
        if tokenizer.config.codes != model.config.vocab_size:
            raise ValueError(f"{args.ckpt} knows {model.config.vocab_size} codes, the tokenizer has "
                             f"{tokenizer.config.codes}: give --tokenizer the one that it was trained with")
        names = model.class_names
        if args.classes:
            chosen = parse_classes(args.classes, names, model.config.num_classes)
        else:
            chosen = spread_classes(range(model.config.num_classes), columns=1).tolist()
        number = 8 * len(chosen) if args.number is None else args.number
        if number < 1:
            raise ValueError(f"--number must be at least 1, not {number}")
        classes = sorted((chosen[i % len(chosen)] for i in range(number)), key=chosen.index)
        steps = decoding_steps(model.config.grid) if args.steps is None else args.steps
        # All that can be wrong is found before anything is drawn or written: each of these raises ValueError.
        step_sizes(math.prod(model.config.grid), steps)
        generation_order(args.order, 1, model.config.grid)
        check_sampling(args.cfg, args.temperature, args.top_k, args.top_p, args.scg)
        common.writable_folder(pathlib.Path(args.out).parent)
        images, turns = sample_images(model, tokenizer, classes, args.seed, order=args.order, steps=steps,
                                      cfg=args.cfg, scg=args.scg, temperature=args.temperature,
                                      top_k=args.top_k, top_p=args.top_p)
        pixels = common.to_uint8(images)
        title = (f"{turns.max() + 1} steps, order {args.order}, cfg {args.cfg[0]:g} to {args.cfg[1]:g}, "
                 f"scg {args.scg:g}, seed {args.seed}")
        common.save_picture(draw_grid(pixels, classes, names, title), args.out)
        print(f"drew {number} pictures, wrote up to 12 of each class to {args.out}; {title}")
        if args.gif:
            path = pathlib.Path(args.out).with_suffix(".gif")
            first = [classes.index(label) for label in dict.fromkeys(classes)]  # one picture of each class
            draw_gif(pixels[first], turns[first].numpy(), tokenizer.config.downsampling, path)
            print(f"wrote {path}")
        if names == toy.CLASSES and number > 1:
            verdict = toy.judge(images, torch.tensor(classes))
            print(f"the judge sees the class asked for in {verdict['accuracy']:.1%} of them")
            if number >= 500 and len(chosen) == len(names):  # fewer, or of some classes only, do not compare
                print(f"Frechet distance to fresh pictures {verdict['frechet']:.2f} (1,000 fresh ones: 0.26)")


if __name__ == "__main__":
    main()
