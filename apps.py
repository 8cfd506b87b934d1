"""What RandAR does without further training: python apps.py inpaint (edit, outpaint, extrapolate, ...)

The model was trained to continue an image from *any* part of it, in any order. So whatever is known of an
image goes first into the sequence, with its position instruction tokens, and the rest is decoded after it.
All of this file is that one move (`complete`), with other tokens known, other orders and other rotary angles.

    complete                         the missing tokens of an image, given all the others
    inpaint                          redo a part of an image; with another class, edit it (Sec. 3.4.1)
    outpaint, outpaint_by_windows    continue an image beyond its borders (Sec. 3.4.2)
    extrapolate                      more tokens than in training, for the same image (Sec. 3.4.3, App. F)

Each command writes one labelled picture. Without --image it draws examples of the toy world itself.
"""

import math
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import toy
from features import add_commands, correspond, encode_features
from randar import check_sampling, generation_order, grid_angles, rotary_angles, step_sizes
from sample import (UNDECODED, add_decoding_flags, decoding_precision, decoding_steps, load_models,
                    names_of_classes, parse_classes, spread_classes)

__all__ = ["complete", "inpaint", "outpaint", "outpaint_by_windows", "extrapolate", "encode_features",
           "correspond"]

# ------------------------------------------------------------------------------------------------------------
# The one move: what is known comes first


def complete(model, tokens, missing, classes, grid, angles=None, order="random", steps=None, **options):
    """Decode the missing tokens of images, given all the others, which stay as they are: tokens [b, N].

    tokens: [b, N] int64 in raster order of the grid (h, w), of any shape; what stands at missing places does
        not matter.
    missing: bool [b, N], equally many in each image (else a ValueError): a batch takes its steps together.
    classes: [b] int64, model.null_class for none.
    angles: [N, D / 2], by default those of the grid: within the grid of training, the angles of training.
    order: a name of ORDERS or int64 [b, N], a permutation of the grid. Missing tokens are decoded in their
        turns, and the known ones precede them in theirs.
    steps: decoding steps; by default the paper's schedule for as many tokens as are missing.
    options: cfg, scg, temperature, top_k, top_p and generator, as RandAR.decode takes them.
    """
    if isinstance(order, str):  # drawn as `generate` draws it: with all missing, this is plain generation
        order = generation_order(order, len(tokens), grid, options.get("generator"), tokens.device)
    numbers = missing.sum(dim=1)
    n = int(numbers[0])
    if (numbers != n).any():
        raise ValueError(f"the images of a batch must miss equally many tokens, not {numbers.min()} to "
                         f"{numbers.max()}: give one mask for all, or one image at a time")
    order = order.gather(1, missing.gather(1, order).int().argsort(dim=1, descending=True, stable=True))
    wanted, given = order[:, :n], order[:, n:]  # after a stable sort both are still in their turns
    known = given, tokens.gather(1, given)
    steps = decoding_steps((1, n)) if steps is None else steps
    angles = grid_angles(grid, model.head_dim, tokens.device) if angles is None else angles
    return model.generate(classes, wanted, steps, known=known, angles=angles, **options)


# ------------------------------------------------------------------------------------------------------------
# Inpainting and class-conditional editing (Sec. 3.4.1)
#
# A raster-order model sees only what lies above and to the left of a hole. Here every known token is context,
# wherever it is. Editing is inpainting with another class than that of the image: the surroundings stay, and
# guidance makes of the hole what is asked for.


@torch.no_grad()
def inpaint(model, tokenizer, images, mask, classes, paste=False, **options):
    """Redo a part of each image: (images [b, 3, H, W] in [-1, 1], tokens [b, N]).

    images: [b, 3, H, W], float in [-1, 1], H and W multiples of the tokenizer's pixels per token.
    mask: bool [H, W] or [b, H, W], True where the image is to be redone. A token is redone if any of its
        pixels is. All other tokens come out exactly as they are, encoded from the whole image.
    classes: [b] int64: those of the images, others to edit them, model.null_class for none.
    paste: also put the pixels outside the mask back, which the tokenizer would blur a little.
    options: order, steps, generator, ... as `complete` takes them.

    An empty mask gives the tokenizer's reconstruction, a full one a new image: RandAR.generate with the same
    generator and as many steps. Raises ValueError for shapes that do not fit.
    """
    missing = missing_tokens(images, mask, tokenizer)
    grid = missing.shape[1:]
    tokens = complete(model, tokenizer.encode(images), missing.flatten(1), classes, grid, **options)
    redone = tokenizer.decode(tokens, grid)
    return torch.where(mask.expand(len(images), -1, -1)[:, None], redone, images) if paste else redone, tokens


def missing_tokens(images, mask, tokenizer):
    """Which tokens of images [b, 3, H, W] a mask, bool [H, W] or [b, H, W], covers: bool [b, h, w]."""
    h, w = token_grid(images, tokenizer)
    b, _, height, width = images.shape
    if mask.dtype != torch.bool or mask.shape not in ((height, width), (b, height, width)):
        raise ValueError(f"the mask, {mask.dtype} {list(mask.shape)}, does not fit: give a bool one of the "
                         f"image's size, {height} x {width} pixels (height x width)")
    return F.max_pool2d(mask.expand(b, -1, -1).float(), tokenizer.config.downsampling) > 0  # any pixel


def token_grid(images, tokenizer):
    """The grid (h, w) of tokens that images [b, 3, H, W] become. Raises ValueError where they do not fit."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected images [b, 3, H, W], got {list(images.shape)}")
    (height, width), f = images.shape[2:], tokenizer.config.downsampling
    h, w = height // f, width // f
    if (h * f, w * f) != (height, width) or not h * w:
        remedy = f"crop it to {h * f} x {w * f}" if h * w else "take a larger one"
        raise ValueError(f"the image is {height} x {width} pixels (height x width), not multiples of {f}, "
                         f"the pixels of a token: {remedy}")
    return h, w


# ------------------------------------------------------------------------------------------------------------
# Outpainting (Sec. 3.4.2)
#
# Positions outside the grid of training have angles too: rotary angles are *extrapolated*. Attention sees
# differences of positions, so near the image all is as in training; only what a position instruction token
# says (its value) and long distances are new. All tokens attend to all others, wherever they are.


def margins(images, tokenizer, grid, corner):
    """How many tokens of the grid (H, W) lie to the left, right, above, below of the images, for F.pad."""
    h, w = token_grid(images, tokenizer)
    (height, width), (top, left) = grid, corner
    if height < h or width < w:
        raise ValueError(f"a grid of {height} x {width} tokens is smaller than the image, {h} x {w}")
    if not (0 <= top <= height - h and 0 <= left <= width - w):
        raise ValueError(f"the corner at {top}, {left} does not fit into a grid of {height} x {width} tokens")
    return left, width - w - left, top, height - h - top


def place_image(images, tokenizer, grid, corner):
    """Images on a larger grid (H, W): their tokens [b, H, W], and which are missing, bool [H, W]."""
    around, (h, w) = margins(images, tokenizer, grid, corner), token_grid(images, tokenizer)
    tokens = F.pad(tokenizer.encode(images).view(-1, h, w), around)
    return tokens, F.pad(torch.zeros(h, w, device=images.device), around, value=1.0).bool()


def outpainting_angles(grid, corner, trained, head_dim, device=None):
    """The angles of each position of a grid (H, W) around an image: [H * W, head_dim / 2].

    The paper extends to the right, where columns go on after the last of training. To the left and upwards
    the coordinates become *negative*, so that the image keeps those it would have had in training: a model
    knows in which row a horizon lies. Where the target has room for it, all of the trained range is used.
    """
    (height, width), (top, left), (h, w) = grid, corner, trained
    positions = torch.arange(height * width, device=device)
    rows = positions // width - min(top, max(0, height - h))
    columns = positions % width - min(left, max(0, width - w))
    return rotary_angles(rows.float(), columns.float(), head_dim)


@torch.no_grad()
def outpaint(model, tokenizer, images, grid, classes, corner=(0, 0), **options):
    """Continue images beyond their borders: (images [b, 3, H * f, W * f] in [-1, 1], tokens [b, H * W]).

    images: [b, 3, h * f, w * f], float in [-1, 1], f the tokenizer's pixels per token; grid: (H, W), tokens
    of the result, at least (h, w); corner: (row, column) of the image's upper left token in it, so that it
    can grow to any side; classes and options: as for `complete`. The image's tokens come out as they are.
    """
    tokens, missing = place_image(images, tokenizer, grid, corner)
    angles = outpainting_angles(grid, corner, model.config.grid, model.head_dim, tokens.device)
    missing = missing.flatten().expand(len(images), -1)
    tokens = complete(model, tokens.flatten(1), missing, classes, grid, angles, **options)
    return tokenizer.decode(tokens, grid), tokens


@torch.no_grad()
def outpaint_by_windows(model, tokenizer, images, grid, classes, corner=(0, 0), **options):
    """The baseline: a window of the grid of training, with the angles of training, moves on by half its size.

    Nothing is extrapolated, but what has left the window is forgotten. Arguments and result as for outpaint.
    """
    tokens, missing = place_image(images, tokenizer, grid, corner)
    window = h, w = min(grid[0], model.config.grid[0]), min(grid[1], model.config.grid[1])

    def starts(first, size, total):
        """Where windows begin along one axis: at the image, and every half window to both sides of it."""
        half = max(1, size // 2)
        return {min(max(first + i * half, 0), total - size) for i in range(-total, total)}

    places = [(r, c) for r in starts(corner[0], h, grid[0]) for c in starts(corner[1], w, grid[1])]
    for r, c in sorted(places, key=lambda place: math.dist(place, corner)):  # from the image outwards
        unknown = missing[r : r + h, c : c + w].flatten().expand(len(images), -1)
        if unknown.any():
            seen = tokens[:, r : r + h, c : c + w]
            seen[:] = complete(model, seen.flatten(1), unknown, classes, window, **options).view(-1, h, w)
            missing[r : r + h, c : c + w] = False
    return tokenizer.decode(tokens.flatten(1), grid), tokens.flatten(1)


# ------------------------------------------------------------------------------------------------------------
# Resolution extrapolation (Sec. 3.4.3)
#
# Twice as many tokens along each axis, for the same image. With angles like those of outpainting the model
# would paint a larger scene, several objects perhaps; with all angles interpolated, neighbours are half a
# position apart, which it has never seen. The remedy comes in parts. *Hierarchical order*: first the tokens
# whose coordinates are divisible by the factor; with interpolated angles they are exactly the grid of
# training, and decide on the layout. *Frequency mix*: the rest is decoded with slow frequencies interpolated,
# which see the layout, and the fastest extrapolated, which tell neighbours apart. *Spatial contextual
# guidance* (App. F) holds the new tokens to their context.


def extrapolation_angles(grid, factor, frequencies, head_dim, device=None):
    """The angles of a grid `factor` times as high and wide: [factor * h * factor * w, head_dim / 2].

    frequencies: so many of the highest of each axis are extrapolated, pos; the others are interpolated,
    pos / factor. 0 interpolates all, head_dim / 4 extrapolates all; beyond that, or for a
    factor that is not 1, 2, 3, ..., a ValueError.
    """
    if factor < 1 or factor != int(factor):
        raise ValueError(f"the factor must be a whole number from 1 on, not {factor}")
    if not 0 <= frequencies <= head_dim // 4:
        raise ValueError(f"frequencies must be from 0 to {head_dim // 4}, as many as an axis has, not "
                         f"{frequencies}")
    h, w = grid[0] * factor, grid[1] * factor
    positions = torch.arange(h * w, device=device)
    rows, columns = (positions // w).float(), (positions % w).float()
    fastest = torch.arange(head_dim // 2, device=device) % (head_dim // 4) < frequencies  # in both halves
    return torch.where(fastest, rotary_angles(rows, columns, head_dim),
                       rotary_angles(rows / factor, columns / factor, head_dim))


@torch.no_grad()
def extrapolate(model, tokenizer, classes, factor=2, hierarchical=True, frequencies=2, order="random",
                steps=-1, cfg=(3.0, 3.0), scg=2.5, **sampling):
    """New images of `factor` times the training resolution, 1, 2, 3, ...: (images, tokens).

    classes: [b] int64, model.null_class for none. Each part can be switched off, as in the paper's comparison
    (Fig. 6): hierarchical=False decodes all tokens in one go, frequencies=0 interpolates all angles, scg=1 is
    no spatial contextual guidance. order, by name, and steps are those of each of the two decodings, the
    defaults those of the released code. sampling: temperature, top_k, top_p, generator.

    Returns images [b, 3, H, W] in [-1, 1] and tokens [b, factor**2 * N]. factor=1 is plain generation. Raises
    ValueError for values out of range.
    """
    h, w = grid = model.config.grid
    large, device = (h * factor, w * factor), classes.device
    interpolated, mixed = (extrapolation_angles(grid, factor, number, model.head_dim, device)
                           for number in (0, frequencies))
    tokens = torch.full((len(classes), len(mixed)), -1, device=device)  # -1: nothing is there yet
    sampling |= dict(steps=steps, cfg=cfg)
    if hierarchical:
        turns = generation_order(order, len(classes), grid, sampling.get("generator"), device)
        turns = factor * (turns // w * large[1] + turns % w)  # the same places on the large grid
        tokens = model.generate(classes, turns, angles=interpolated, **sampling)
    tokens = complete(model, tokens, tokens < 0, classes, large, mixed, order, scg=scg, **sampling)
    return tokenizer.decode(tokens, large), tokens


# ------------------------------------------------------------------------------------------------------------
# The commands: each writes one picture, with a row for what is known and one for each result

EXAMPLES = 10**6  # the seed of the toy pictures to start from, none of which training has seen
GREY = UNDECODED / 127.5 - 1  # of what is not known, in [-1, 1]


def open_models(args):
    """(RandAR, Tokenizer, names of the classes, options for `complete`), once the command line is checked."""
    common.picture_format(args.out)
    if args.number < 1:
        raise ValueError(f"--number must be at least 1, not {args.number}")
    check_sampling(args.cfg, args.temperature, args.top_k, args.top_p, args.scg)
    generation_order(args.order or "random", 1, (1, 1))
    step_sizes(1, -1 if args.steps is None else args.steps)
    device = common.pick_device(args.device)
    model, tokenizer = load_models(args.ckpt, args.tokenizer, device)
    model.to(decoding_precision(device))
    args.order = args.order or model.order
    options = {name: getattr(args, name) for name in "order steps cfg scg temperature top_k top_p".split()}
    common.writable_folder(pathlib.Path(args.out).parent)
    return model, tokenizer, names_of_classes(model.class_names, model.config.num_classes), options


def inputs(args, model, tokenizer, number):
    """(images [b, 3, H, W], classes [b]): that of --image, of no class, or `number` toy pictures."""
    if args.image:
        images, classes = common.read_picture(args.image)[None], torch.tensor([model.null_class])
    elif model.class_names == toy.CLASSES:
        pixels, classes, _ = toy.make(number, EXAMPLES)
        images, classes = common.from_uint8(pixels), torch.from_numpy(classes)
    else:
        raise ValueError(f"{args.ckpt} does not know the toy world: give a picture, --image FILE")
    f = tokenizer.config.downsampling
    remedy = "reduce the picture, at best to {} x {} pixels".format(*(side * f for side in model.config.grid))
    check_size(model, [side // f for side in images.shape[2:]], remedy)
    token_grid(images, tokenizer)
    return images.to(model.output.weight.device), classes.to(model.output.weight.device)


def check_size(model, grid, remedy):
    """Raises ValueError for a grid that would take very long, or all of the memory, and come to nothing."""
    if math.prod(grid) > 16 * math.prod(model.config.grid):
        raise ValueError("{} x {} tokens, where {} x {} were learnt, are many: {}".format(
            *grid, *model.config.grid, remedy))


def draws(args, device):
    """(seed, a generator of that seed) for each result, with a progress bar."""
    for seed in tqdm(range(args.seed, args.seed + args.number), unit=" seeds", dynamic_ncols=True):
        yield seed, torch.Generator(device).manual_seed(seed)


def write_picture(rows, what, args, class_given=True):
    """rows: {label: images [n, 3, H, W]}, all of one size; small ones are enlarged."""
    pixels = np.concatenate([common.to_uint8(images) for images in rows.values()])
    zoom = max(1, 128 // min(pixels.shape[1:3]))
    guidance = f"cfg {args.cfg[0]:g} to {args.cfg[1]:g}" if class_given else "no class and so no cfg"
    title = f"{what}, {guidance}, scg {args.scg:g}"
    pixels = pixels.repeat(zoom, 1).repeat(zoom, 2)
    common.save_picture(common.picture_grid(pixels, list(rows), title), args.out)
    print(f"wrote {args.out}; {title}")


def say_verdict(model, label, images, classes):
    """For pictures of the toy world: in how many of them the judge sees the classes asked for."""
    toy_world = model.class_names == toy.CLASSES and images.shape[2:] == (toy.SIDE, toy.SIDE)
    if toy_world and len(images) > 1 and (classes < model.null_class).all():
        share = toy.judge(images, classes)["accuracy"]
        print(f"{label}: the judge sees the class asked for in {share:.1%} of {len(images)} pictures")


def inpaint_command(args):
    """Redo a part of pictures; `edit` does it with each of the classes asked for."""
    model, tokenizer, names, options = open_models(args)
    edit = args.name == "edit"
    images, own = inputs(args, model, tokenizer, 8)
    if args.mask:
        mask = common.read_picture(args.mask).mean(0).to(images.device) > 0  # brighter than middle grey
    else:
        top, left = (side // (8 if edit else 4) for side in images.shape[2:])
        mask = F.pad(torch.ones_like(images[0, 0, 2 * top :, 2 * left :]), (left, left, top, top)) > 0
    missing = missing_tokens(images, mask, tokenizer)[0]
    if args.classes:
        wanted = parse_classes(args.classes, names)
    else:
        wanted = spread_classes(range(len(names)), rows=3, columns=1).tolist() if edit else [None]
    hidden = F.interpolate(missing[None, None].float(), size=images.shape[2:]) > 0  # [1, 1, H, W]
    rows = {"input": images, "known": torch.where(hidden, GREY, images)}
    judged = []
    for seed, generator in draws(args, images.device):
        for label in wanted:
            classes = own if label is None else torch.full_like(own, label)
            results, _ = inpaint(model, tokenizer, images, mask, classes, args.paste, generator=generator,
                                 **options)
            rows[f"seed {seed}" if label is None else f"{names[label][0]}, seed {seed}"] = results
            judged.append((results, classes))
    redone = f"{missing.sum()} of {missing.numel()} tokens redone"
    write_picture(rows, redone, args, bool((classes < model.null_class).any()))
    if not missing.any():
        print("the mask redoes nothing, it is not brighter than middle grey: results are reconstructions")
    if missing.all():
        print("the mask covers every token: nothing is known, the results are new pictures")
    say_verdict(model, "results", *map(torch.cat, zip(*judged)))


def outpaint_command(args):
    """Continue pictures beyond their borders, and do the same with a sliding window."""
    model, tokenizer, names, options = open_models(args)
    images, classes = inputs(args, model, tokenizer, 5)
    h, w = token_grid(images, tokenizer)
    grid = tuple(args.grid or (h, w + w // 2))
    check_size(model, grid, "give a smaller --grid")
    corner = tuple(args.corner or ((grid[0] - h) // 2, (grid[1] - w) // 2))
    label = classes[:] = parse_classes(args.classes, names)[0] if args.classes else model.null_class
    around = [tokenizer.config.downsampling * side for side in margins(images, tokenizer, grid, corner)]
    rows = {"known": F.pad(images, around, value=GREY)}
    for name, function in (("", outpaint), ("sliding window, ", outpaint_by_windows)):
        for seed, generator in draws(args, images.device):
            rows[f"{name}seed {seed}"], _ = function(model, tokenizer, images, grid, classes, corner,
                                                     generator=generator, **options)
    write_picture(rows, f"{h} x {w} tokens become {grid[0]} x {grid[1]}", args, label < model.null_class)


def extrapolate_command(args):
    """More tokens than in training; one part of the method after the other, as in Fig. 6."""
    model, tokenizer, names, options = open_models(args)
    chosen = parse_classes(args.classes, names) if args.classes else range(min(10, len(names)))
    device = model.output.weight.device
    classes = torch.tensor([chosen[i % len(chosen)] for i in range(args.number)], device=device)
    interpolated = dict(frequencies=0, scg=1.0)
    variants = {"naive": dict(interpolated, hierarchical=False), "+ hierarchical order": interpolated,
                "+ frequency mix": dict(scg=1.0), "+ SCG": {}, "all but the mix": dict(frequencies=0)}
    h, w = (args.factor * side for side in model.config.grid)
    check_size(model, (h, w), "give a smaller --factor")
    extrapolation_angles(model.config.grid, args.factor, args.frequencies, model.head_dim)  # or a ValueError
    rows = {"step 1": None}
    for name, changes in tqdm(variants.items(), unit=" variants", dynamic_ncols=True):
        generator = torch.Generator(classes.device).manual_seed(args.seed)
        settings = dict(factor=args.factor, frequencies=args.frequencies) | options | changes
        rows[name], tokens = extrapolate(model, tokenizer, classes, generator=generator, **settings)
    coarse = tokens.view(-1, h, w)[:, :: args.factor, :: args.factor].flatten(1)  # the same in the last four
    rows["step 1"] = F.interpolate(tokenizer.decode(coarse, model.config.grid), scale_factor=args.factor)
    write_picture({name: images[:10] for name, images in rows.items()}, f"{h} x {w} tokens", args)
    for name, images in rows.items():
        say_verdict(model, name, F.avg_pool2d(images, args.factor), classes)


def main():
    parser = common.command_line(__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, run, number, classes, what in (
            ("inpaint", inpaint_command, 4, "a toy picture's own", "redo the masked part of a picture"),
            ("edit", inpaint_command, 2, "three", "redo the masked part as another class"),
            ("outpaint", outpaint_command, 2, "none", "continue a picture beyond its borders"),
            ("extrapolate", extrapolate_command, 10, "up to ten", "draw more tokens than in training")):
        command = commands.add_parser(name, help=what, description=what)
        command.set_defaults(run=run, name=name)
        add = command.add_argument
        if name == "extrapolate":
            add("--factor", type=int, default=2, help="of the resolution (default: 2)")
            add("--frequencies", type=int, default=2, help="of each axis, extrapolated (default: 2)")
        else:
            add("--image", help="a picture to start from (default: some of the toy world)")
        if run is inpaint_command:
            add("--mask", help="a picture, white where --image is to be redone (default: its middle)")
            add("--paste", action="store_true", help="put the known pixels back, which the tokenizer blurs")
        if name == "outpaint":
            add("--grid", nargs=2, type=int, metavar=("ROWS", "COLUMNS"),
                help="tokens of the result (default: half as many columns again)")
            add("--corner", nargs=2, type=int, metavar=("ROW", "COLUMN"),
                help="of the picture's first token in it (default: the picture in the middle)")
        add("--classes", nargs="+" if name in ("edit", "extrapolate") else 1, metavar="CLASS",
            help=f"number or name (default: {classes})")
        add("--number", type=int, default=number,
            help=f"{'pictures' if name == 'extrapolate' else 'results, each of another seed'} "
                 f"(default: {number})")
        larger = dict(steps=-1, cfg=(3.0, 3.0), scg=2.5) if name == "extrapolate" else {}
        usual_steps = "-1" if larger else "88 per 256 missing tokens"
        add_decoding_flags(add, usual_steps, f"{name}.png", **larger)
    add_commands(commands)
    args = parser.parse_args()
    with common.one_line_errors():
        args.run(args)


if __name__ == "__main__":
    main()
