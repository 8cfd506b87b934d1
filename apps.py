"""What RandAR does without further training: python apps.py inpaint (edit, outpaint, ...)

The model was trained to continue an image from *any* part of it, in any order. So all that is known
of an image can go first into the sequence, with its position instruction tokens, and the rest is
decoded after it. Every application is this one move, `complete`, with other tokens known, another
order, other rotary angles. The decoding loop is RandAR's; there is no other.

    complete                         the missing tokens of an image, given all the others
    inpaint                          redo a part of an image; with another class: edit (Sec. 3.4.1)
    outpaint, outpaint_by_windows    continue an image beyond its borders (Sec. 3.4.2)
    extrapolate                      more tokens than in training, for the same image (Sec. 3.4.3)
    encode_features                  an image as vectors, each has seen all of it (Sec. 3.4.4)
    correspond                       where is the same part on another object? (App. E)
    attention_maps                   which tokens a token looks at

Each command writes one labelled picture. Without --image it draws examples of the toy world itself.
"""

import itertools
import math
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

from randar import generation_order, grid_angles, rotary_angles
from sample import (add_decoding_flags, add_model_flags, decoding_options, decoding_precision,
                    load_models, say_verdict)
from support import border, checks, pictures, toy
from support.border import UserError
from support.classes import names_of_classes, parse_classes, spread_classes


def need_kind(model, what, *kinds):
    """Raises UserError where the model is of none of these kinds (rar.KINDS)."""
    if model.kind not in kinds:
        raise UserError(f"{what} takes a model of the kind {' or '.join(kinds)}, this one is of "
                        f"the kind {model.kind!r}")


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
    missing: bool [b, N], equally many in each image.
    classes: int64 [b], model.null_class for none.
    angles: [N, D / 2], of all positions; None: those of the grid.
    order: a name, or all positions of the grid, int64 [b, N]; None: as in the model's training. The
        missing tokens are decoded in this order; the known ones precede them, in this order too.
    steps: None is the paper's schedule for as many tokens as are missing.
    options: cfg, scg, power, temperature, top_k, top_p, generator, as RandAR.decode takes them.
    """
    b, num_tokens = len(tokens), math.prod(grid)
    checks.check_shapes(tokens=(tokens, [b, num_tokens]), missing=(missing, [b, num_tokens]))
    if tuple(grid) != tuple(model.config.grid):
        need_kind(model, "another grid than that of training", "rope")
        angles = grid_angles(grid, model.head_dim, tokens.device) if angles is None else angles

    # A batch takes its steps together, so n must be one number.
    n = int(missing[0].sum())
    if (missing.sum(dim=1) != n).any():
        raise UserError("images of a batch must miss equally many tokens: give one mask for all, "
                        "or one image at a time")
    order = model.order if order is None else order
    if isinstance(order, str):  # drawn as `decode` does: with all missing, this is generation
        order = generation_order(order, b, grid, options.get("generator"), tokens.device)

    # The order falls into two, what is missing and what is known; in both all keep their turns.
    asked = missing.gather(1, order)  # [b, N] bool, in turns
    wanted = order[asked].view(b, n)  # positions to decode
    given = order[~asked].view(b, num_tokens - n)  # positions that come first
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

    images: float [b, 3, H, W] in [-1, 1], H and W multiples of the tokenizer's pixels per token.
    mask: bool [H, W] or [b, H, W], True where the image is to be redone. A token is redone if any
        of its pixels is. All others come out exactly as they are, encoded from the whole image.
    classes: int64 [b]: those of the images, others to edit them, model.null_class for none.
    paste: also put the pixels outside the mask back, which the tokenizer would blur a little.
    options: order, steps, generator, ... as `complete` takes them.

    An empty mask gives the tokenizer's reconstruction; a full one what RandAR.generate gives.
    """
    missing = missing_tokens(images, mask, tokenizer)  # [b, h, w]
    tokens, grid = tokenizer.encode(images), missing.shape[1:]  # [b, h * w]; h and w
    tokens = complete(model, tokens, missing.flatten(1), classes, grid, **options)
    redone = tokenizer.decode(tokens, grid)
    if paste:
        redone = torch.where(mask.expand(len(images), -1, -1)[:, None], redone, images)
    return redone, tokens


def missing_tokens(images, mask, tokenizer):
    """Which tokens of images [b, 3, H, W] a mask, bool [(b,) H, W], covers: bool [b, h, w]."""
    b, (height, width), f = len(images), images.shape[-2:], tokenizer.config.downsampling
    token_grid(images, tokenizer)
    if mask.dtype != torch.bool or mask.shape not in ((height, width), (b, height, width)):
        raise UserError(f"the mask, {mask.dtype} {list(mask.shape)}, does not fit: give a bool one "
                        f"of the image's size, {height} x {width} pixels (height x width)")
    return F.max_pool2d(mask.expand(b, -1, -1).float(), f) > 0  # any pixel of a token is enough


def token_grid(images, tokenizer):
    """The grid (h, w) of tokens that images [b, 3, H, W] become. UserError if they do not fit."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise UserError(f"expected images [b, 3, H, W], got {list(images.shape)}")
    (height, width), f = images.shape[2:], tokenizer.config.downsampling  # f: pixels a token
    if min(height, width) < f or height % f or width % f:
        raise UserError(f"the image is {height} x {width} pixels (height x width), not multiples "
                        f"of {f}: crop it to {height // f * f} x {width // f * f}")
    return height // f, width // f


# ------------------------------------------------------------------------------------------------
# Outpainting (Sec. 3.4.2)
#
# Positions outside the grid of training have angles too: these are *extrapolated*. Attention sees
# differences of positions, so near the image all is as in training. Only what a position
# instruction token says (its value) and long distances are new. All that is known is context.


def place_image(images, tokenizer, grid, corner):
    """Images on a larger grid (H, W): tokens, and which are missing, bool; both [b, H, W]."""
    (h, w), (height, width), (top, left) = token_grid(images, tokenizer), grid, corner
    if not (0 <= top <= height - h and 0 <= left <= width - w):
        raise UserError(f"an image of {h} x {w} tokens, its corner at {top}, {left}, does not fit "
                        f"into a grid of {height} x {width}")
    tokens = torch.zeros(len(images), height, width, dtype=torch.int64, device=images.device)
    missing = torch.ones_like(tokens, dtype=torch.bool)
    tokens[:, top : top + h, left : left + w] = tokenizer.encode(images).view(-1, h, w)
    missing[:, top : top + h, left : left + w] = False
    return tokens, missing


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

    images: float [b, 3, h * f, w * f] in [-1, 1], f the tokenizer's pixels per token; their tokens
        come out as they are. grid: (H, W), tokens of the result, at least (h, w). corner: (row,
        column) of the image's first token in it. classes, options: as for `complete`.
    """
    need_kind(model, "outpainting", "rope")
    tokens, missing = place_image(images, tokenizer, grid, corner)
    angles = outpainting_angles(grid, corner, model.config.grid, model.head_dim, tokens.device)
    tokens, missing = tokens.flatten(1), missing.flatten(1)
    tokens = complete(model, tokens, missing, classes, grid, angles, **options)
    return tokenizer.decode(tokens, grid), tokens


@torch.no_grad()
def outpaint_by_windows(model, tokenizer, images, grid, classes, corner=(0, 0), **options):
    """The baseline: a window of the grid of training, under its angles, moves on by half its size.

    Nothing is extrapolated, but what has left the window is forgotten. All else as for outpaint.
    """
    need_kind(model, "outpainting", "rope")
    tokens, missing = place_image(images, tokenizer, grid, corner)
    h, w = min(grid[0], model.config.grid[0]), min(grid[1], model.config.grid[1])

    # Where windows are, from the image outwards.
    rows, columns = window_starts(corner[0], h, grid[0]), window_starts(corner[1], w, grid[1])
    windows = sorted(itertools.product(rows, columns), key=lambda start: math.dist(start, corner))

    # Each is completed: what it has of the image, or of windows before it, is known.
    for row, column in windows:
        here = (slice(None), slice(row, row + h), slice(column, column + w))
        unknown = missing[here].flatten(1)
        if unknown.any():
            done = complete(model, tokens[here].flatten(1), unknown, classes, (h, w), **options)
            tokens[here], missing[here] = done.view(-1, h, w), False
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
# We follow the paper: pos / 2, and a quarter of all tokens. The paper does not give k; ours is 2.


def extrapolation_angles(grid, factor, frequencies, head_dim, device=None):
    """The angles of a grid `factor` times as high and as wide as (h, w): [factor^2 h w, D / 2].

    frequencies: so many of the highest of each axis are extrapolated, pos; the others are
    interpolated, pos / factor. 0 interpolates all, head_dim / 4 extrapolates all.
    """
    if factor not in range(1, 1000) or frequencies not in range(head_dim // 4 + 1):
        raise UserError("the factor must be a whole number from 1 on and frequencies one from 0 to "
                        f"{head_dim // 4}, as many as an axis has, not {factor} and {frequencies}")
    width = factor * grid[1]
    positions = torch.arange(factor * grid[0] * width, device=device)
    rows, columns = (positions // width).float(), (positions % width).float()
    extrapolated = rotary_angles(rows, columns, head_dim)  # [N, D / 2]
    interpolated = rotary_angles(rows / factor, columns / factor, head_dim)

    # Of both halves, the rows' angles and the columns', the first ones are the fastest.
    fastest = torch.arange(head_dim // 4, device=device) < frequencies  # [D / 4]
    return torch.where(fastest.repeat(2), extrapolated, interpolated)


@torch.no_grad()
def extrapolate(model, tokenizer, classes, factor=2, hierarchical=True, frequencies=2, order=None,
                steps=-1, cfg=(3.0, 3.0), scg=2.5, **sampling):
    """New images of `factor` times the resolution of training: (images, tokens [b, factor^2 N]).

    classes: int64 [b], model.null_class for none. Each part can be switched off, as in Fig. 6:
    hierarchical=False decodes all tokens in one go, frequencies=0 interpolates all angles, scg=1 is
    no spatial contextual guidance. order, by name, and steps are those of both decodings. sampling:
    temperature, top_k, top_p, power, generator. Images are float [b, 3, H, W] in [-1, 1].
    """
    need_kind(model, "resolution extrapolation", "rope")
    (h, w), order, device = model.config.grid, order or model.order, classes.device

    # Two tables of angles, and a large grid of which nothing is known yet.
    interpolated = extrapolation_angles((h, w), factor, 0, model.head_dim, device)
    mixed = extrapolation_angles((h, w), factor, frequencies, model.head_dim, device)
    tokens = torch.full((len(classes), len(mixed)), -1, device=device)  # -1: missing
    sampling |= dict(steps=steps, cfg=cfg)

    if hierarchical:  # the first part; without SCG, for there is no context yet
        turns = generation_order(order, len(classes), (h, w), sampling.get("generator"), device)
        rows, columns = factor * (turns // w), factor * (turns % w)  # on the large grid: [b, h * w]
        positions = rows * factor * w + columns
        tokens = model.generate(classes, positions, angles=interpolated, **sampling)

    # The rest; or everything, in one go.
    large = (factor * h, factor * w)
    tokens = complete(model, tokens, tokens < 0, classes, large, mixed, order, scg=scg, **sampling)
    return tokenizer.decode(tokens, large), tokens


# ------------------------------------------------------------------------------------------------
# Bi-directional features (Sec. 3.4.4)
#
# A causal decoder reads an image from its first token to its last, so the first know nothing of the
# rest. A model of random orders has learned to use context from anywhere. So there is a cure that
# costs no training: it reads the image twice (Eq. 8),
#
#     class P_1 x_1 ... P_N x_N P_1 x_1 ... P_N x_N
#
# and features are the hidden states at the P of the second *round*, which have all of the first
# before them. The decoder stays causal: what round 1 computes is the same without a round 2.


def prepare(model, tokens, classes, order, generator, grid):
    """For the functions below: x [b, 1 + 2 N, d], its cos_sin, and each position's turn, [b, N]."""
    need_kind(model, "reading features or attention", "rope", "dense")
    grid, order = tuple(grid or model.config.grid), model.order if order is None else order
    if grid != tuple(model.config.grid):
        need_kind(model, "another grid than that of training", "rope")
    if isinstance(order, str):
        order = generation_order(order, len(tokens), grid, generator, tokens.device)
    if classes is None:
        classes = torch.full_like(tokens[:, 0], model.null_class)

    # Values out of range would end in a crash on a GPU, far from here.
    shape = [len(tokens), math.prod(grid)]
    checks.check_shapes(tokens=(tokens, shape), classes=(classes, shape[:1]), order=(order, shape))
    checks.check_values("tokens", tokens, model.config.vocab_size)
    checks.check_values("classes", classes, model.null_class + 1)
    angles = grid_angles(grid, model.head_dim, tokens.device)  # [N, D / 2]
    return *model.sequence(tokens, classes, order, angles), order.argsort(dim=1)


@torch.no_grad()
def features_by_layer(model, tokens, classes=None, rounds=2, order=None, generator=None, grid=None):
    """Features of images after each layer in turn: an iterator of n_layer times [b, rounds, N, d].

    tokens: int64 [b, N] in raster order, as are the features. classes: int64 [b]; None: the null
    class, for nobody names the class of what is to be understood. order: a name, or int64 [b, N];
    None: as in the model's training. generator: for random orders. grid: (h, w); None: the model's.

    Features are hidden states as the layer leaves them; none is computed before it is asked for.
    """
    if rounds < 1:
        raise UserError(f"rounds must be at least 1, not {rounds}")

    # Rounds have the same angles: x_1 of the second stands in the image where the first one does.
    x, cos_sin, turns = prepare(model, tokens, classes, order, generator, grid)
    x = torch.cat([x[:, :1], x[:, 1:].repeat(1, rounds, 1)], dim=1)  # the class comes once
    cos_sin = torch.cat([cos_sin[:, :1], cos_sin[:, 1:].repeat(1, rounds, 1, 1)], dim=1)

    # One pass gives all rounds, since no round depends on a later one.
    for layer in model.layers:
        x = layer(x, cos_sin)  # [b, 1 + rounds * 2 N, d]
        at_p = x[:, 1::2].unflatten(1, (rounds, -1))  # in turns: [b, rounds, N, d]
        yield torch.take_along_dim(at_p, turns[:, None, :, None], dim=2)  # in raster order


def encode_features(model, tokens, classes=None, rounds=2, layer=None, **options):
    """Bi-directional features of images (Eq. 8), of the last round: [b, N, d] in raster order.

    layer: after which one, 1 to n_layer; None: at two thirds of the depth (24 of 36 was best in the
    paper). options: order, generator, grid; these and all else as in features_by_layer.
    """
    layer = checked_layer(model, layer)
    layers = features_by_layer(model, tokens, classes, rounds, **options)
    return next(itertools.islice(layers, layer - 1, None))[:, -1]


def checked_layer(model, layer):
    """The number of a layer, from 1; None is two thirds of the depth."""
    depth = model.config.n_layer
    layer = round(depth * 2 / 3) if layer is None else layer
    if not 1 <= layer <= depth:
        raise UserError(f"layer must be from 1 to {depth}, the model's depth, not {layer}")
    return layer


# ------------------------------------------------------------------------------------------------
# Correspondence (Table 5, App. E)
#
# Where in the target is what the source shows at this point? At the pixel whose feature is most
# like that of the point. There is one feature for each token; between tokens they are interpolated,
# as one enlarges a picture. Points are (x, y) in pixels: the first pixel's middle is (0.5, 0.5).


def nearest_points(source, target, points, source_size, target_size):
    """The pixels of the target with features nearest to those of points: their middles, [k, 2].

    source, target: features [h, w, d], of grids that span the whole picture. points: float [k, 2],
    in the source. source_size, target_size: (height, width) in pixels.
    """
    source, target = source.float().permute(2, 0, 1)[None], target.float().permute(2, 0, 1)[None]

    # The features at the points,
    size = torch.tensor([source_size[1], source_size[0]], device=source.device)  # x, y
    places = points.to(source.device) / size * 2 - 1  # grid_sample counts from -1 to 1
    wanted = F.grid_sample(source, places[None, None], padding_mode="border", align_corners=False)
    wanted = F.normalize(wanted[0, :, 0], dim=0)  # [d, k]

    # and those of all pixels of the target; directions count, not lengths.
    pixels = F.interpolate(target, tuple(target_size), mode="bilinear")[0].flatten(1)  # [d, pixels]
    likeness = wanted.T @ pixels / pixels.norm(dim=0).clamp_min(1e-12)  # cosines, [k, pixels]
    best = likeness.argmax(dim=1)  # a raster index of pixels
    return torch.stack([best % target_size[1], best // target_size[1]], dim=1) + 0.5


def tokens_of(images, tokenizer, grid):
    """Pictures [3, H, W] of any size -> tokens [b, N]; stretched, for to crop would lose points."""
    size = [side * tokenizer.config.downsampling for side in grid]
    fitting = []
    for image in images:
        if list(image.shape[1:]) != size:
            image = F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(-1, 1)
        fitting.append(image)
    return tokenizer.encode(torch.stack(fitting).to(next(tokenizer.parameters()).device))


def correspond(model, tokenizer, source, target, points, **options):
    """Where in the target picture is what the source picture shows at each point? Float [k, 2].

    source, target: [3, H, W] in [-1, 1], of any size, also of two different ones. points: float
    [k, 2], (x, y) in pixels of the source; the answer is in pixels of the target. options: rounds,
    layer, order, ... as encode_features takes them.
    """
    if source.shape[:-2] != (3,) or target.shape[:-2] != (3,) or points.shape[1:] != (2,):
        raise UserError("expected two pictures [3, H, W] and points [k, 2], got the shapes "
                        f"{list(source.shape)}, {list(target.shape)} and {list(points.shape)}")
    height, width = source.shape[1:]
    if ((points < 0) | (points > points.new_tensor([width, height]))).any():
        raise UserError(f"points must lie in the picture: x from 0 to {width}, y to {height}")

    # Both pictures become tokens, then vectors, as one batch.
    grid = tuple(options.get("grid") or model.config.grid)
    features = encode_features(model, tokens_of([source, target], tokenizer, grid), **options)
    features = features.unflatten(1, grid)  # [2, h, w, d]
    return nearest_points(features[0], features[1], points, source.shape[1:], target.shape[1:])


# ------------------------------------------------------------------------------------------------
# Attention


@torch.no_grad()
def attention_maps(model, tokens, layer, head, classes=None, order=None, generator=None, grid=None):
    """Which tokens each token looks at, in one head: (maps, to_class), which sum to 1 for each.

    layer: 1 to n_layer; head: 0 to n_head - 1; all else as in features_by_layer, with one round.
    Returns maps [b, 2, N, 2, h, w] and to_class [b, 2, N]. maps[image, kind, position, other kind]
    is a picture [h, w]: how much the token at that position (raster order) looks at each other one.
    A kind is 0 for position instruction tokens, 1 for image tokens. The class sees itself only.
    """
    layer = checked_layer(model, layer)
    if not 0 <= head < model.config.n_head:
        raise UserError(f"head must be from 0 to {model.config.n_head - 1}, not {head}")
    x, cos_sin, turns = prepare(model, tokens, classes, order, generator, grid)
    for block in model.layers[: layer - 1]:
        x = block(x, cos_sin)

    # Computed anew: fused attention, which the model uses, never holds these weights.
    block = model.layers[layer - 1]
    q, k, _ = block.attention.queries_keys_values(block.attention_norm(x), cos_sin)
    scores = q[:, head] @ k[:, head].mT / math.sqrt(model.head_dim)  # [b, 1 + 2 N, 1 + 2 N]
    later = torch.ones(scores.shape[1:], dtype=torch.bool, device=x.device).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(dim=-1)

    # From the sequence to the image: P of turn i is at place 1 + 2 i, its image token after it.
    places = torch.cat([1 + 2 * turns, 2 + 2 * turns], dim=1)  # [b, 2 N]
    weights = torch.take_along_dim(weights, places[:, :, None], dim=1)  # [b, 2 N, 1 + 2 N]
    maps = torch.take_along_dim(weights, places[:, None, :], dim=2)  # [b, 2 N, 2 N]
    maps = maps.unflatten(2, (2, *(grid or model.config.grid))).unflatten(1, (2, -1))
    return maps, weights[:, :, 0].unflatten(1, (2, -1))


# ------------------------------------------------------------------------------------------------
# The commands: each writes one picture, with a row for what is known and one for each result

EXAMPLES = 10**6  # the seed of the toy pictures to start from, none of which training has seen
GREY = pictures.UNDECODED / 127.5 - 1  # of what is not known, in [-1, 1]


def start(args):
    """(model, tokenizer, names of the classes, device), with the place for the picture checked."""
    pictures.picture_format(args.out)
    device = border.pick_device(args.device)
    model, tokenizer = load_models(args.ckpt, args.tokenizer, device)
    border.writable_folder(pathlib.Path(args.out).parent)
    names = names_of_classes(model.class_names, model.config.num_classes)
    return model.to(decoding_precision(device)), tokenizer, names, device


def inputs(args, model, tokenizer, device, number):
    """(images [b, 3, H, W], classes [b]): --image, which has no class, or `number` toy pictures."""
    if args.image:
        images, classes = pictures.read_picture(args.image)[None], torch.tensor([model.null_class])
    elif model.class_names == toy.CLASSES:
        pixels, classes, _ = toy.make(number, EXAMPLES)
        images, classes = pictures.from_uint8(pixels), torch.from_numpy(classes)
    else:
        raise UserError(f"{args.ckpt} does not know the toy world: give a picture, --image FILE")
    # A photograph from a camera would take hours and all of the memory, for nothing.
    if math.prod(token_grid(images, tokenizer)) > 16 * math.prod(model.config.grid):
        raise UserError(f"{args.image} has over 16 times the tokens of training: reduce it")
    return images.to(device), classes.to(device)


def seeds(args, device):
    """The seed of each result, and a generator; with a progress bar."""
    for seed in tqdm(range(args.seed, args.seed + args.number), unit=" seeds", delay=1):
        yield seed, torch.Generator(device).manual_seed(seed)


def write_picture(rows, title, args, class_given=True):
    """rows: {label: images [n, 3, H, W]}, all of one size; small ones are enlarged."""
    pixels = np.concatenate([pictures.to_uint8(images) for images in rows.values()])
    zoom = max(1, 128 // min(pixels.shape[1:3]))  # the toy world's have 32 x 32 pixels
    pixels = pixels.repeat(zoom, 1).repeat(zoom, 2)
    if "cfg" in args and class_given:  # without a class, there is nothing to guide to
        title += f", cfg {args.cfg[0]:g} to {args.cfg[1]:g}, scg {args.scg:g}"
    pictures.save_picture(pictures.picture_grid(pixels, list(rows), title), args.out)
    print(f"wrote {args.out}; {title}")


def inpaint_command(args):
    """Redo a part of pictures: as their own classes or, for `edit`, as others."""
    model, tokenizer, names, device = start(args)
    images, own = inputs(args, model, tokenizer, device, 8)

    # The classes asked for: for `edit` three of all, otherwise those that the pictures have.
    wanted, labels, share = {"": own}, [], 4
    if args.command == "edit":
        labels, share = spread_classes(range(len(names)), rows=3, columns=1).tolist(), 8
    if args.classes:
        labels = parse_classes(args.classes, names)
    if labels:
        wanted = {f"{names[label][0]}, ": torch.full_like(own, label) for label in labels}

    # The mask: the middle, without a quarter (or an eighth) of the picture on each side.
    top, left = images.shape[2] // share, images.shape[3] // share
    middle = torch.ones_like(images[0, 0, 2 * top :, 2 * left :])
    mask = F.pad(middle, (left, left, top, top)) > 0  # bool [H, W]
    if args.mask:
        mask = pictures.read_picture(args.mask).mean(0).to(device) > 0  # brighter than middle grey
    missing = missing_tokens(images, mask, tokenizer)[:1]  # [1, h, w], of every image
    hidden = F.interpolate(missing[None].float(), size=images.shape[2:]) > 0  # [1, 1, H, W]

    # All seeds, all classes; what the judge says of them comes last.
    rows, asked = {"input": images, "known": torch.where(hidden, GREY, images)}, {}
    for seed, generator in seeds(args, device):
        for name, classes in wanted.items():
            row = f"{name}seed {seed}"
            rows[row], _ = inpaint(model, tokenizer, images, mask, classes, args.paste,
                                   generator=generator, **decoding_options(args))
            asked[row] = classes
    class_given = bool((classes < model.null_class).any())
    write_picture(rows, f"{missing.sum()} of {missing.numel()} tokens redone", args, class_given)
    for row, classes in asked.items():
        say_verdict(row, rows[row], classes, model.class_names)


def outpaint_command(args):
    """Continue pictures beyond their borders, and do the same with a sliding window."""
    model, tokenizer, names, device = start(args)
    images, classes = inputs(args, model, tokenizer, device, 5)

    # Where the picture is in the larger one: in the middle.
    (h, w), f = token_grid(images, tokenizer), tokenizer.config.downsampling
    grid = tuple(args.grid or (h, w + w // 2))
    top, left = args.corner or ((grid[0] - h) // 2, (grid[1] - w) // 2)
    classes[:] = parse_classes(args.classes, names)[0] if args.classes else model.null_class

    # Our way, then the baseline. Their first row is filled in when the size of results is known.
    rows = {"known": None}
    for name, function in (("", outpaint), ("sliding window, ", outpaint_by_windows)):
        for seed, generator in seeds(args, device):
            results, _ = function(model, tokenizer, images, grid, classes, (top, left),
                                  generator=generator, **decoding_options(args))
            rows[f"{name}seed {seed}"] = results
    rows["known"] = torch.full_like(results, GREY)  # [b, 3, f * grid[0], f * grid[1]]
    rows["known"][:, :, f * top : f * (top + h), f * left : f * (left + w)] = images
    title = f"{h} x {w} tokens become {grid[0]} x {grid[1]}"
    write_picture(rows, title, args, class_given=bool(args.classes))


def extrapolate_command(args):
    """More tokens than in training; one part of the method after the other, as in Fig. 6."""
    model, tokenizer, names, device = start(args)
    chosen = parse_classes(args.classes, names) if args.classes else range(min(10, len(names)))
    classes = torch.tensor([chosen[i % len(chosen)] for i in range(args.number)], device=device)

    # What differs from the whole method, in the order of the paper's argument.
    variants = {
        "naive": dict(hierarchical=False, frequencies=0, scg=1.0),
        "+ hierarchical order": dict(frequencies=0, scg=1.0),
        "+ frequency mix": dict(scg=1.0),
        "+ SCG": dict(),
        "all but the mix": dict(frequencies=0),
    }
    rows, f, (h, w) = {"step 1": None}, args.factor, model.config.grid
    extrapolation_angles((h, w), f, args.frequencies, model.head_dim)  # a UserError, or nothing
    for row, changes in tqdm(variants.items(), unit=" variants", delay=1):
        options = dict(factor=f, frequencies=args.frequencies) | decoding_options(args) | changes
        generator = torch.Generator(device).manual_seed(args.seed)
        rows[row], tokens = extrapolate(model, tokenizer, classes, generator=generator, **options)

    # The first part itself, enlarged with hard edges.
    coarse = tokens.view(-1, f * h, f * w)[:, ::f, ::f].flatten(1)  # all but the first share it
    rows["step 1"] = F.interpolate(tokenizer.decode(coarse, (h, w)), scale_factor=f)
    shown = {row: images[:10] for row, images in rows.items()}
    write_picture(shown, f"{f * h} x {f * w} tokens", args)
    for row, images in rows.items():
        say_verdict(row, F.avg_pool2d(images, f), classes, model.class_names)


def correspond_command(args):
    """Find the parts of toy objects on others of their class, with one round and with two."""
    model, tokenizer, _, device = start(args)
    if model.class_names != toy.CLASSES:
        raise UserError(f"{args.ckpt} does not know the toy world: give pictures to python -m "
                        "studies.features, --data DIR")

    # Pairs of one class: what is asked for in the one is known in the other.
    rows = {name: [] for name in ("asked for", "round 1", "round 2", "right")}
    for i in range(args.number):
        rng, label = np.random.default_rng([EXAMPLES, args.seed, i]), i % len(toy.CLASSES)
        (source, asked), (target, right) = toy.draw(label, rng), toy.draw(label, rng)
        images, points = pictures.from_uint8(np.stack([source, target])), list(asked.values())
        rows["asked for"].append(with_dots(source, points))
        rows["right"].append(with_dots(target, [right[name] for name in asked]))

        # Both rounds read in the same order.
        for rounds in (1, 2):
            generator = torch.Generator(device).manual_seed(args.seed)
            found = correspond(model, tokenizer, *images, torch.tensor(points), rounds=rounds,
                               layer=args.layer, order=args.order, generator=generator)
            rows[f"round {rounds}"].append(with_dots(target, found.tolist()))
    rows = {name: pictures.from_uint8(np.stack(row)) for name, row in rows.items()}
    write_picture(rows, f"features after layer {checked_layer(model, args.layer)}", args)


def with_dots(pixels, points, zoom=4):
    """Pixels uint8 [H, W, 3], enlarged, with points (x, y) on them, each of its own colour."""
    image = Image.fromarray(pixels.repeat(zoom, 0).repeat(zoom, 1))
    for (x, y), colour in zip(points, ("red", "lime", "blue", "yellow", "magenta", "cyan")):
        middle = (zoom * x, zoom * y)
        ImageDraw.Draw(image).circle(middle, 5, fill=colour, outline="black", width=2)
    return np.asarray(image)


def parse():
    """The command line."""
    parser = border.command_line(__doc__)  # in what it says of a flag, (...) is the default
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, run, number, what in (
            ("inpaint", inpaint_command, 4, "redo a part of pictures"),
            ("edit", inpaint_command, 2, "redo a part of pictures as other classes"),
            ("outpaint", outpaint_command, 2, "continue pictures beyond their borders"),
            ("extrapolate", extrapolate_command, 10, "draw more tokens than in training"),
            ("correspond", correspond_command, 8, "find parts of an object on another")):
        # What all commands have,
        command = commands.add_parser(name, help=what, description=what)
        command.set_defaults(run=run)
        add = command.add_argument
        add("--number", type=border.positive_int, default=number, help=f"results ({number})")

        # those that decode nothing, or without a picture to start from,
        if name == "correspond":
            add("--layer", type=border.positive_int, help="whose features (at 2/3 of the depth)")
            add_model_flags(add, "correspond.png")
            continue

        add("--classes", nargs="+", metavar="CLASS", help="numbers or names")
        if name == "extrapolate":
            add("--factor", type=border.positive_int, default=2, help="of the resolution (2)")
            add("--frequencies", type=border.whole_number, default=2, help="extrapolated ones (2)")
            add_decoding_flags(add, "-1", "extrapolate.png", steps=-1, cfg=(3.0, 3.0), scg=2.5)
            continue

        # and those that continue one.
        add("--image", help="a picture to start from (default: some of the toy world)")
        add_decoding_flags(add, "88 per 256 missing tokens", f"{name}.png")
        if name == "outpaint":
            add("--grid", nargs=2, type=border.positive_int, metavar=("ROWS", "COLUMNS"),
                help="tokens of the result (default: half as many columns again)")
            add("--corner", nargs=2, type=border.whole_number, metavar=("ROW", "COLUMN"),
                help="of the picture's first token in it (default: the picture in the middle)")
        else:
            add("--mask", help="a picture, white where the other is redone (its middle)")
            add("--paste", action="store_true", help="put the known pixels back, unblurred")
    return parser.parse_args()


def main():
    with border.one_line_errors():
        args = parse()
        args.run(args)


if __name__ == "__main__":
    main()
