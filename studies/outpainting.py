"""Is what grows beside a picture as good as what was there? python -m studies.outpainting

Pictures of the fine world grow to four times their width (Fig. 5 and C), with attention to all that
is there and by a window that moves on; with a class and without. Because we draw this world, we can
look at what is new without anybody's eyes:

    background    of new columns without an object, those with the same sky, ground and horizon
    objects       new ones for each picture, and of these those that are
    whole         not cut off by a straight edge, nor run together with another: ours taper off
    recognised    seen by the judge as the class given, or without one as some class with certainty

As a yardstick, the same of fresh pictures.
"""

import numpy as np
import torch
from tqdm import tqdm

from apps import FINE, outpaint, outpaint_by_windows
from sample import load_models
from support import border, judge, pictures, toy
from support.border import UserError

TIMES = 4  # as wide
UNSEEN = 3 * 10**9  # the seed of pictures to start from


def look(pixels, side):
    """What stands where: (unlike [n, H, W] bool, sky [n, W] pixels) of uint8 [n, H, W, 3].

    unlike: pixels that have neither of the background's two colours, which the judge names from the
    first `side` columns. sky: how many pixels of a column have the upper one.
    """
    background = judge.labels_seen(pictures.from_uint8(pixels[:, :, :side]))[:, 2].numpy()  # [n]
    colours = np.array(list(toy.BACKGROUNDS.values()))[background]  # [n, 2, 3]

    far = [abs(pixels.astype(int) - colours[:, None, None, i]).max(-1) > 20 for i in (0, 1)]
    return far[0] & far[1], (~far[0]).sum(1)


def objects_in(unlike):
    """Where objects are in one picture, [H, W] bool: (first column, last + 1) of each."""
    here = np.pad(unlike.sum(0) >= 3, 1)  # the horizon's soft edge has fewer pixels
    return np.flatnonzero(np.diff(here.astype(int))).reshape(-1, 2)


def is_whole(unlike, start, end, side):
    """Whether an object, of any class of ours, is one and complete: its two ends are low."""
    heights = unlike[:, start:end].sum(0)
    return end - start <= 1.1 * side and max(heights[0], heights[-1]) <= heights.max() / 2


def measure(pixels, classes, side, new):
    """The figures of this file's head, a dict; pixels uint8 [n, side, W, 3], new from column `new`.

    classes: int [n], or None. Objects at a border, or that begin in what was known, do not count.
    """
    unlike, sky = look(pixels, side)
    continued, whole, windows, wanted = [], [], [], []
    for i, picture in enumerate(unlike):
        free = picture.sum(0) < 3  # columns without an object
        if free[:side].any():
            horizon = np.median(sky[i, :side][free[:side]])
            continued.append(abs(sky[i, new:][free[new:]] - horizon) <= 1)
        for start, end in objects_in(picture):
            if start <= new or end >= picture.shape[1]:
                continue
            whole.append(is_whole(picture, start, end, side))
            left = min(max(0, (start + end - side) // 2), picture.shape[1] - side)
            windows.append(pixels[i, :, left : left + side])
            wanted.append(classes[i] if classes is not None else -1)

    if not windows or not continued:
        raise UserError("no picture has a new object, or free sky, to judge: give more, --number")

    # The judge looks at each object in a window of its own.
    _, logits = judge.judge_features(pictures.from_uint8(np.stack(windows)))
    certainty, seen = logits.softmax(-1).max(-1)
    right = certainty > 0.9 if classes is None else seen == torch.tensor(wanted)
    return {"background": np.concatenate(continued).mean(), "objects": len(whole) / len(pixels),
            "whole": np.mean(whole), "recognised": right.float().mean().item()}


def main():
    parser = border.command_line(__doc__)
    add = parser.add_argument
    add("--ckpt", default=FINE, help="(default: the fine model)")
    add("--number", type=border.positive_int, default=100, help="pictures (default: 100)")
    add("--steps", type=border.step_count, help="of decoding (default: 88 for 256 tokens)")
    add("--seed", type=border.seed, default=0, help="(default: 0)")
    add("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    args = parser.parse_args()
    with border.one_line_errors():
        device = border.pick_device(args.device)
        model, tokenizer = load_models(args.ckpt, device=device)
        pixels, classes, _ = toy.make(args.number, UNSEEN + args.seed, "fine")
        images, side = pictures.from_uint8(pixels).to(device), pixels.shape[1]
        h, w = model.config.grid

        # The classes asked for are others than those of the pictures.
        others = (classes + 1 + np.arange(len(classes)) % 9) % 10
        nobody = np.full_like(classes, model.null_class)
        table = {"fresh pictures": measure(pixels, None, side, new=0)}
        ways = [("full attention", outpaint), ("sliding window", outpaint_by_windows)]
        cases = [(name, grow, asked) for name, grow in ways for asked in (others, nobody)]
        for name, grow, asked in tqdm(cases):
            generator, grown = torch.Generator(device).manual_seed(args.seed), []
            for part, wanted in zip(images.split(50), torch.tensor(asked, device=device).split(50)):
                large, _ = grow(model, tokenizer, part, (h, TIMES * w), wanted, steps=args.steps,
                                generator=generator)
                grown.append(pictures.to_uint8(large))
            given = asked if asked is others else None
            name += ", no class" if given is None else ", another class"
            table[name] = measure(np.concatenate(grown), given, side, new=side)

        print(f"{'':32}" + "".join(f"{name:>12}" for name in table["fresh pictures"]))
        for name, figures in table.items():
            print(f"{name:32}" + "".join(f"{x:12.3f}" for x in figures.values()))


if __name__ == "__main__":
    main()
