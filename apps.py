"""What RandAR does without further training: python apps.py inpaint (edit, outpaint, ...)

The model has learned to continue an image from *any* part of it, in any order. So all that is known
can go first into the sequence, and the rest is decoded after it. The first three are this one move,
`complete`, with other tokens known, another order, other rotary angles:

    inpaint           redo a part of an image; with another class: edit (Sec. 3.4.1)
    outpaint          continue an image beyond its borders (Sec. 3.4.2)
    extrapolate       more tokens than in training, for the same image (Sec. 3.4.3)

What decodes nothing is in bidirectional.py: encode_features, correspond, attention_maps, ...; its
names are imported here, so that all that RandAR does can be had from apps.
"""

import support  # first: Ctrl-C while torch is imported is no traceback

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from bidirectional import (angles_of, attention_maps, checked_layer, correspond,  # noqa: F401
                           encode_features, features_by_layer, nearest_points, tokens_of)
from randar import generation_order, grid_angles, rotary_angles
from sample import (SHOWN, add_decoding_flags, add_model_flags, decoding_options, load_models,
                    say_verdict)
from support import border, checks, pictures, toy
from support.border import UserError, decoding_precision
from support.classes import names_of_classes, parse_classes

# ------------------------------------------------------------------------------------------------
# The one move: what is known comes first
#
# In training the first k tokens of a sequence are at k random positions, for every k. So any known
# tokens, wherever they are, are a beginning that the model has learned to continue. (A model of
# raster order, such as RAR in the end, has not: one can ask it, and see.) Of tokens that are drawn
# in one step none knows what the others will be: query Q_2 attends to Q_1, but not to x_1. So the
# number of steps follows the number of missing tokens.


def complete(model, tokens, missing, classes, grid, angles=None, order=None, steps=None, **options):
    """Decode the missing tokens of images, given all others, which stay as they are: int64 [b, N].

    tokens: int64 [b, N] in raster order of the grid (h, w); at missing positions they are not read.
    missing: bool [b, N], equally many in each image. classes: int64 [b], model.null_class for none.
    angles: [N, D / 2]; None: those of the grid. order: a name, or all positions, int64 [b, N]; the
    missing are decoded in this order, the known precede them in this order too. steps: None is the
    paper's schedule for as many as are missing. options: those of RandAR.decode.
    """
    own = angles_of(model, grid, tokens.device)
    angles = own if angles is None else angles
    b, n = len(tokens), int(missing[0].sum())  # a batch takes its steps together: n is one number
    if (missing.sum(dim=1) != n).any():
        raise UserError("images of a batch must miss equally many tokens: give such masks")
    order = model.order if order is None else order
    if isinstance(order, str):  # drawn as `decode` does: with all missing, this is generation
        order = generation_order(order, b, grid, options.get("generator"), tokens.device)

    # The order falls into two, what is missing and what is known; in both all keep their turns.
    asked = missing.gather(1, order)  # [b, N] bool, in turns
    wanted = order[asked].view(b, n)  # positions to decode
    given = order[~asked].view(b, math.prod(grid) - n)  # positions that come first
    known = (given, tokens.gather(1, given))
    return model.generate(classes, wanted, steps, known=known, angles=angles, **options)


# ------------------------------------------------------------------------------------------------
# Inpainting and class-conditional editing (Sec. 3.4.1)
#
# A raster-order model has seen only what is above and to the left of a hole. Here every known token
# is context, wherever it is. Editing is inpainting with another class than that of the image: the
# surroundings stay, and guidance makes of the hole what is asked for.


@torch.no_grad()
def inpaint(model, tokenizer, images, mask, classes, paste=False, **options):
    """Redo a part of each image: (images [b, 3, H, W] in [-1, 1], tokens [b, N]).

    images: float [b, 3, H, W] in [-1, 1]. mask: bool [H, W] or [b, H, W], True where an image is to
    be redone; a token is redone if any of its pixels is. classes: int64 [b], other ones to edit.
    paste: also put the pixels outside the mask back, which the tokenizer would blur a little.
    options: order, steps, generator, ... as `complete` takes them.

    An empty mask gives the tokenizer's reconstruction; a full one what RandAR.generate gives.
    """
    tokens, grid = tokenizer.encode(images), token_grid(images, tokenizer)  # [b, h * w]; h and w
    missing = missing_tokens(images, mask, tokenizer).flatten(1)  # [b, h * w]
    tokens = complete(model, tokens, missing, classes, grid, **options)
    redone = tokenizer.decode(tokens, grid)
    if paste:
        redone = torch.where(mask.expand(len(images), -1, -1)[:, None], redone, images)
    return redone, tokens


def missing_tokens(images, mask, tokenizer):
    """Which tokens of images [b, 3, H, W] a mask, bool [(b,) H, W], covers: bool [b, h, w]."""
    b, _, height, width = images.shape
    masks = mask.expand(b, -1, -1)
    checks.check_shapes(torch.bool, masks=(masks, [b, height, width]))
    return F.max_pool2d(masks.float(), tokenizer.config.downsampling) > 0  # any pixel is enough


def token_grid(images, tokenizer):
    """The grid (h, w) of tokens that images [b, 3, H, W] become."""
    f = tokenizer.config.downsampling  # pixels a token
    return images.shape[2] // f, images.shape[3] // f


# ------------------------------------------------------------------------------------------------
# Outpainting (Sec. 3.4.2)
#
# Positions outside the grid of training have angles too: these are *extrapolated*. Attention sees
# differences of positions, so near the image all is as in training. Only what a position
# instruction token says (its value) and long distances are new. All that is known is context.


def margins(images, tokenizer, grid, corner):
    """How many tokens of a grid (H, W) are left, right, above and below of images at a corner."""
    (h, w), (height, width), (top, left) = token_grid(images, tokenizer), grid, corner
    sides = left, width - left - w, top, height - top - h
    if min(sides) < 0:
        raise UserError(f"an image of {h} x {w} tokens, its corner at {top}, {left}, does not fit "
                        f"into a grid of {height} x {width}")
    return sides


def place_image(images, tokenizer, grid, corner):
    """The tokens of images on a larger grid (H, W), -1 where they are missing: [b, H, W]."""
    tokens = tokenizer.encode(images).unflatten(1, token_grid(images, tokenizer))  # [b, h, w]
    return F.pad(tokens, margins(images, tokenizer, grid, corner), value=-1)


def outpainting_angles(grid, corner, trained, head_dim, device=None):
    """The angles of each position of a grid (H, W) around an image: [H * W, head_dim / 2].

    The paper extends to the right, where columns go on after the last of training. To the left and
    upwards coordinates become *negative*, so that the image keeps its own: a model knows in which
    row a horizon lies. Where the grid has room, all of the range of training, `trained`, is used.
    """
    (height, width), (top, left), (h, w) = grid, corner, trained
    positions = torch.arange(height * width, device=device)
    rows = positions // width - min(top, max(0, height - h))  # 0 where the trained range begins
    columns = positions % width - min(left, max(0, width - w))
    return rotary_angles(rows.float(), columns.float(), head_dim)


@torch.no_grad()
def outpaint(model, tokenizer, images, grid, classes, corner=(0, 0), **options):
    """Continue images to any side: (images [b, 3, H * f, W * f] in [-1, 1], tokens [b, H * W]).

    images: float [b, 3, h * f, w * f] in [-1, 1], f pixels a token; their tokens stay. grid: (H, W)
    of the result. corner: (row, column) of the image's first token in it. classes, options: as for
    `complete`.
    """
    tokens = place_image(images, tokenizer, grid, corner).flatten(1)  # [b, H * W]
    angles = outpainting_angles(grid, corner, model.config.grid, model.head_dim, tokens.device)
    tokens = complete(model, tokens, tokens < 0, classes, grid, angles, **options)
    return tokenizer.decode(tokens, grid), tokens


@torch.no_grad()
def outpaint_by_windows(model, tokenizer, images, grid, classes, corner=(0, 0), **options):
    """The baseline: a window of the grid of training, under its angles, moves on by half its size.

    Nothing is extrapolated, but what has left the window is forgotten. How far it moves at a time
    the paper does not say. All else as for outpaint.
    """
    tokens = place_image(images, tokenizer, grid, corner)  # [b, H, W]
    h, w = min(grid[0], model.config.grid[0]), min(grid[1], model.config.grid[1])

    # Where windows are, from the image outwards.
    rows, columns = window_starts(corner[0], h, grid[0]), window_starts(corner[1], w, grid[1])
    windows = sorted(itertools.product(rows, columns), key=lambda start: math.dist(start, corner))

    # Each is completed: what it has of the image, or of windows before it, is known.
    for row, column in windows:
        here = (slice(None), slice(row, row + h), slice(column, column + w))
        window = tokens[here].flatten(1)  # [b, h * w]
        if (window < 0).any():
            window = complete(model, window, window < 0, classes, (h, w), **options)
            tokens[here] = window.view(-1, h, w)
    return tokenizer.decode(tokens.flatten(1), grid), tokens.flatten(1)


def window_starts(first, size, total):
    """Where windows begin along one axis: at `first`, every half window from it, at both ends."""
    half = max(1, size // 2)
    starts = range(first % half - half, total, half)
    return {min(max(start, 0), total - size) for start in starts}


# ------------------------------------------------------------------------------------------------
# Resolution extrapolation (Sec. 3.4.3, App. F)
#
# Twice as many tokens along each axis, for the same image. With the angles of outpainting the model
# would paint a larger scene, with several objects perhaps. With all angles interpolated, neighbours
# are half a position apart, which it has never seen. The remedy has three parts:
#
# - *Hierarchical order*: first the tokens whose coordinates are divisible by the factor. Their
#   angles, interpolated, are exactly those of training, and they decide on the layout.
# - *Frequency mix*: the rest is decoded with slow frequencies interpolated, which see the layout,
#   and the k fastest of each axis extrapolated, which tell neighbours apart. The tokens of the
#   first part are its context, under these angles too.
# - *Spatial contextual guidance* (App. F) holds the new tokens to their context.
#
# The released code differs: its positions are linspace(0, 15, 32), so that the first part has not
# quite the angles of training, and its guidance hides tokens of the first part only, half of them.
# We follow the paper: pos / 2, and a quarter of all tokens. The paper does not give k; ours is 1,
# under which the fine model finds the true rest of enlarged pictures likeliest (notebook 6).


def extrapolation_angles(grid, factor, frequencies, head_dim, device=None):
    """The angles of a grid `factor` times as high and as wide as (h, w): [factor^2 h w, D / 2].

    frequencies: so many of the highest of each axis are extrapolated, pos; the others are
    interpolated, pos / factor. 0 interpolates all, head_dim / 4 extrapolates all.
    """
    angles = grid_angles((factor * grid[0], factor * grid[1]), head_dim, device)
    # Of both halves, the rows' angles and the columns', the first ones are the fastest.
    fastest = torch.arange(head_dim // 4, device=device) < frequencies  # [D / 4]
    return torch.where(fastest.repeat(2), angles, angles / factor)  # proportional to the position


@torch.no_grad()
def extrapolate(model, tokenizer, classes, factor=2, hierarchical=True, frequencies=1, scg=2.5,
                steps=-1, cfg=(3.0, 3.0), **sampling):
    """New images of `factor` times the resolution of training: (images, tokens [b, factor^2 N]).

    classes: int64 [b], model.null_class for none. Each part can be switched off:
    hierarchical=False decodes all tokens in one go, frequencies=0 interpolates all angles, scg=1 is
    no spatial contextual guidance. steps are those of both decodings, and so is sampling: order,
    by name, temperature, generator, ... Images are float [b, 3, H, W] in [-1, 1].
    """
    sampling |= dict(steps=steps, cfg=cfg)
    h, w = model.config.grid
    large = (factor * h, factor * w)
    angles = extrapolation_angles((h, w), factor, frequencies, model.head_dim, classes.device)
    tokens = torch.full((len(classes), *large), -1, device=classes.device)  # -1: missing

    # Under its angles, those of training, the first part is plain generation; without SCG, as there
    # is no context yet. Then the rest; or everything, in one go.
    if hierarchical:
        first = model.generate(classes, **sampling)  # [b, h * w]
        tokens[:, ::factor, ::factor] = first.view(-1, h, w)
    tokens = tokens.flatten(1)  # [b, factor^2 N]
    tokens = complete(model, tokens, tokens < 0, classes, large, angles, scg=scg, **sampling)
    return tokenizer.decode(tokens, large), tokens


PARTS = {  # what differs from the whole method; in Fig. 6 there is no row for the mix alone
    "naive": dict(hierarchical=False, frequencies=0, scg=1.0),
    "+ hierarchical order": dict(frequencies=0, scg=1.0),
    "+ frequency mix": dict(scg=1.0),
    "+ SCG": dict(),
    "all but the mix": dict(frequencies=0)}


# ------------------------------------------------------------------------------------------------
# The commands
#
# Each yields the rows of one picture: (label, images [n, 3, H, W], the classes that the judge of
# the toy world is to see in them, int64 [n], or None).

FINE = toy.folder("fine") / "randar.pt"  # it draws the pictures of README
EXAMPLES = 10**6  # the seed of the toy pictures to start from, none of which training has seen
GREY = pictures.UNDECODED / 127.5 - 1  # of what is not known, in [-1, 1]


def seeded(args, seed):
    """A generator on the device of the command."""
    return torch.Generator(args.device).manual_seed(seed)


def inputs(args, model, tokenizer, number):
    """(images [b, 3, H, W], classes [b]): --image, which has no class, or `number` toy pictures."""
    if args.image:
        images, classes = pictures.read_picture(args.image)[None], torch.tensor([model.null_class])
    elif toy.world_of(model, tokenizer):
        pixels, classes, _ = toy.make(number, EXAMPLES, toy.world_of(model, tokenizer))
        images, classes = pictures.from_uint8(pixels), torch.from_numpy(classes)
    else:
        raise UserError(f"{args.ckpt} does not know the toy world: give a picture, --image FILE")
    # A photograph from a camera would take hours and all of the memory, for nothing.
    if math.prod(token_grid(images, tokenizer)) > 16 * math.prod(model.config.grid):
        raise UserError(f"{args.image} has over 16 times the tokens of training: reduce it")
    return images.to(args.device), classes.to(args.device)


def inpaint_command(args, model, tokenizer, names):
    """redo a part of pictures, for `edit` as other classes"""
    images, own = inputs(args, model, tokenizer, number=8)
    height, width = images.shape[2:]
    top, left = height // args.margin, width // args.margin
    mask = torch.zeros(height, width, dtype=torch.bool, device=args.device)
    mask[top : height - top, left : width - left] = True
    if args.mask:
        mask = pictures.read_picture(args.mask, background="black")  # transparent: kept
        mask = mask.mean(0).to(args.device) > 0  # brighter than grey
    missing = missing_tokens(images, mask, tokenizer)[:, None].float()  # [b, 1, h, w]
    hidden = F.interpolate(missing, (height, width)) > 0
    yield "input", images, None
    yield "known", images.masked_fill(hidden, GREY), None

    wanted = {"seed": own}
    if args.classes:
        labels = parse_classes(args.classes, names)
        wanted = {f"{names[label][0]}, seed": torch.full_like(own, label) for label in labels}
    for seed in range(args.seed, args.seed + args.number):
        options = decoding_options(args) | dict(generator=seeded(args, seed))
        for name, classes in wanted.items():
            redone, _ = inpaint(model, tokenizer, images, mask, classes, args.paste, **options)
            yield f"{name} {seed}", redone, classes


def outpaint_command(args, model, tokenizer, names):
    """continue pictures beyond their borders, also with a sliding window"""
    images, classes = inputs(args, model, tokenizer, number=5)
    chosen = parse_classes(args.classes, names) if args.classes else [model.null_class]
    classes = torch.tensor(chosen).repeat(len(images))[: len(images)].to(images.device)  # in turn
    h, w = token_grid(images, tokenizer)
    grid = args.grid or (h, w + w // 2)
    corner = args.corner or ((grid[0] - h) // 2, (grid[1] - w) // 2)  # in the middle

    sides = [tokenizer.config.downsampling * n for n in margins(images, tokenizer, grid, corner)]
    yield "known", F.pad(images, sides, value=GREY), None
    for name, function in (("outpaint", outpaint), ("sliding window", outpaint_by_windows)):
        for seed in range(args.seed, args.seed + args.number):
            options = decoding_options(args) | dict(generator=seeded(args, seed))
            results, _ = function(model, tokenizer, images, grid, classes, corner, **options)
            yield f"{name}, seed {seed}", results, None


def extrapolate_command(args, model, tokenizer, names):
    """draw more tokens than in training, and what each part of the method does (as Fig. 6)"""
    chosen = parse_classes(args.classes, names) if args.classes else range(len(names))
    classes = torch.tensor(chosen).repeat(args.number)[: args.number].to(args.device)  # in turn

    whole = dict(factor=args.factor, frequencies=args.frequencies) | decoding_options(args)
    for row, changes in ({"step 1": dict(factor=1)} | PARTS).items():
        options = whole | changes | dict(generator=seeded(args, args.seed))
        images, _ = extrapolate(model, tokenizer, classes, **options)
        yield row, images, classes


def correspond_command(args, model, tokenizer, names):
    """find the parts of toy objects on others of their class"""
    asked, found, world = [], [], toy.world_of(model, tokenizer) or "plain"
    for i in range(args.number):
        rng, label = np.random.default_rng([EXAMPLES, args.seed, i]), i % len(toy.CLASSES)
        (source, parts), (target, _) = (toy.draw(label, rng, world) for _ in range(2))
        points = torch.tensor(list(parts.values()))  # (x, y), [k, 2]
        options = dict(layer=args.layer, order=args.order, generator=seeded(args, args.seed))
        both = pictures.from_uint8(np.stack([source, target]))  # [2, 3, H, W]
        there = correspond(model, tokenizer, *both, points, **options)
        asked.append(pictures.with_dots(source, points))
        found.append(pictures.with_dots(target, there))
    yield "asked for", torch.cat(asked), None
    yield "found", torch.cat(found), None


def parse():
    """The command line."""
    parser = border.command_line(__doc__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    whole, many = dict(type=border.whole_number), dict(type=border.positive_int)
    flags = (  # of which commands, and what they are
        ("inpaint edit outpaint extrapolate", "--classes", dict(nargs="+", help="numbers, names")),
        ("inpaint edit outpaint", "--image", dict(help="to start from (default: toy pictures)")),
        ("inpaint edit", "--mask", dict(help="a picture, white is redone (default: the middle)")),
        ("inpaint edit", "--paste", dict(action="store_true", help="put known pixels back")),
        ("outpaint", "--grid", many | dict(nargs=2, help="tokens of the result: rows, columns")),
        ("outpaint", "--corner", whole | dict(nargs=2, help="the picture's first: row, column")),
        ("extrapolate", "--factor", many | dict(default=2, help="of the resolution (2)")),
        ("extrapolate", "--frequencies", whole | dict(default=1, help="extrapolated ones (1)")),
        ("correspond", "--layer", many | dict(help="whose features (at 2/3 of the depth)")))

    for name, run, defaults in (
            ("inpaint", inpaint_command, dict(number=4, margin=4)),
            ("edit", inpaint_command, dict(number=2, margin=8, classes=["0", "3", "6"])),
            ("outpaint", outpaint_command, dict(number=2)),
            ("extrapolate", extrapolate_command, dict(number=10, steps=128, cfg=(3, 3), scg=2.5)),
            ("correspond", correspond_command, dict(number=8))):
        command = subparsers.add_parser(name, help=run.__doc__)
        command.add_argument("--number", help="results (default: %(default)s)", **many)
        for commands, flag, options in flags:
            if name in commands.split():
                command.add_argument(flag, **options)
        add_model_flags(command.add_argument)
        if name != "correspond":
            add_decoding_flags(command.add_argument)
        command.set_defaults(run=run, out=f"{name}.png", ckpt=FINE, **defaults)
    return parser.parse_args()


def main():
    """Draw the rows of a command, and say what the judge sees in them."""
    with border.one_line_errors(smaller="--number, or give a smaller --image"):
        args = parse()
        pictures.picture_format(args.out)
        border.output(args.out, others=[getattr(args, "image", None), getattr(args, "mask", None)])
        args.device = border.pick_device(args.device)
        model, tokenizer = load_models(args.ckpt, args.tokenizer, args.device)
        model.to(decoding_precision(args.device))
        names = names_of_classes(model.class_names, model.config.num_classes)

        rows = list(tqdm(args.run(args, model, tokenizer, names), unit=" rows", delay=1))
        height, width = rows[-1][1].shape[2:]  # pixels; only step 1 has fewer
        size = [side * max(1, 128 // height) for side in (height, width)]
        shown = [(label, pictures.to_uint8(F.interpolate(images[:SHOWN], size)))
                 for label, images, _ in rows]
        pictures.save_picture(pictures.picture_grid(shown), args.out)
        print(f"wrote {args.out}, up to {SHOWN} pictures of each row")
        for label, images, classes in rows:
            if classes is not None:
                say_verdict(label, images, classes, toy.world_of(model, tokenizer))


if __name__ == "__main__":
    main()
