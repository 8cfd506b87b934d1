"""What a generator knows about images: features, correspondences, attention (Sec. 3.4.4, App. E).

A causal decoder reads an image from its first token to its last, so the first know nothing of the rest. A
model of random orders has learnt to use context from anywhere, so there is a cure that costs no training:
let it read the image twice. In the second round every token has the whole first round before it.

    encode_features       an image as N vectors, each of which has seen all of it (Eq. 8)
    correspond, pck       the same part of another object, and how often it was found
    linear_probe          can a linear function read the class off the features?
    attention_maps        which tokens a token looks at, on the image
    toy_pairs, spair_...  pictures whose corresponding points are known
    add_commands          python apps.py correspond, python apps.py features (Table 5)
"""

import itertools
import json
import math
import pathlib
from collections import defaultdict, namedtuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import nn
from tqdm import tqdm

import common
import toy
from randar import ORDERS, generation_order, grid_angles
from sample import load_models

# ------------------------------------------------------------------------------------------------------------
# Bi-directional encoding (Sec. 3.4.4)
#
# Eq. 8 is the sequence of training with its image repeated: [class, P_1, x_1, .. x_N, P_1, x_1, .. x_N]. The
# features are the hidden states at the position instruction tokens of the last round. The decoder stays
# causal, so what round 1 computes is the same whether or not a round 2 follows: one pass gives both.


def prepare(model, tokens, classes, order, generator, grid):
    """What features_by_layer takes, checked: the sequence [b, 1 + 2 N, d], its rotation, turns [b, N]."""
    grid = grid or model.config.grid
    if classes is None:
        classes = torch.full((len(tokens),), model.null_class, device=tokens.device)
    order = getattr(model, "order", "random") if order is None else order
    if isinstance(order, str):
        order = generation_order(order, len(tokens), grid, generator, tokens.device)
    b, number = len(tokens), math.prod(grid)
    shapes = [list(x.shape) for x in (tokens, classes, order)]
    if shapes != [[b, number], [b], [b, number]]:
        raise ValueError(f"expected tokens [b, {number}], classes [b], order [b, {number}] for the grid "
                         f"{tuple(grid)}, got the shapes {str(shapes)[1:-1]}")
    angles = grid_angles(grid, model.head_dim, tokens.device)
    model.check_context(classes, order[:, :0], order, tokens, angles)  # values in range, no position twice
    return *model.sequence(tokens, classes, order, angles), order.argsort(dim=1)  # each position's turn


@torch.no_grad()
def features_by_layer(model, tokens, classes=None, rounds=2, order=None, generator=None, grid=None):
    """The features of images after each layer in turn: an iterator of n_layer times [b, rounds, N, d].

    tokens: [b, N] int64 in raster order, as are the features, whatever the order of the sequence.
    classes: [b] int64; None: the null class, for nobody asks for features of an image that is understood.
    rounds: 1 or more: how often the image goes through the decoder.
    order: a name of ORDERS or int64 [b, N]; None: that which the model was trained on (model.order).
    generator: a torch.Generator on the model's device, for random orders; grid: (h, w), None: the model's.

    Features are hidden states as the layer leaves them; no layer is computed before it is asked for. In
    training mode, dropout would be at work too. Raises ValueError for shapes and values that do not fit.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")
    x, rotation, turns = prepare(model, tokens, classes, order, generator, grid)
    # The class stands at the front once, the image `rounds` times: [b, 1 + rounds * 2 N, ...]
    x, rotation = (torch.cat([part[:, :1]] + [part[:, 1:]] * rounds, dim=1) for part in (x, rotation))
    for layer in model.layers:
        x = layer(x, rotation)
        instructions = x[:, 1:].unflatten(1, (rounds, -1, 2))[:, :, :, 0]  # of P_1 .. P_N: [b, rounds, N, d]
        yield torch.take_along_dim(instructions, turns[:, None, :, None], dim=2)  # in raster order


def encode_features(model, tokens, classes=None, rounds=2, layer=None, order=None, generator=None, grid=None):
    """Bi-directional features of images: [b, N, d] in raster order, those of the last round (Eq. 8).

    layer: after which one, 1 to n_layer, by default two thirds of the depth (24 of 36 was best in the paper).
    All else as in features_by_layer. Raises ValueError for a layer out of range as well.
    """
    layer = checked_layer(model, layer)
    layers = features_by_layer(model, tokens, classes, rounds, order, generator, grid)
    return next(itertools.islice(layers, layer - 1, None))[:, -1]


def checked_layer(model, layer):
    """A layer's number, from 1; None is two thirds of the depth. Raises ValueError for one out of range."""
    depth = model.config.n_layer
    layer = round(depth * 2 / 3) if layer is None else layer
    if not 1 <= layer <= depth:
        raise ValueError(f"layer must be from 1 to {depth}, the model's depth, not {layer}")
    return layer


# ------------------------------------------------------------------------------------------------------------
# Correspondence (Table 5, App. E)
#
# Where in the target is what the source shows at this point? At the pixel whose feature is most like that of
# the point. There is one feature for each token, so between tokens they are interpolated, as one enlarges a
# picture. Points are (x, y) in pixels from the top left corner: the middle of the first pixel is (0.5, 0.5).


def nearest_points(source, target, points, source_size, target_size):
    """For points of the source, the pixels of the target with the nearest features: [k, 2], their middles.

    source, target: features [h, w, d], of grids that span the whole picture.
    points: float [k, 2], (x, y) in pixels of the source. source_size, target_size: (height, width) in pixels.
    """
    source, target = (x.float().permute(2, 0, 1)[None] for x in (source, target))  # [1, d, h, w]
    size = torch.tensor([source_size[1], source_size[0]], device=source.device)  # x, y
    places = points.to(source.device) / size * 2 - 1  # grid_sample counts from -1 to 1
    wanted = F.grid_sample(source, places[None, None], padding_mode="border", align_corners=False)[0, :, 0]
    target = F.interpolate(target, tuple(target_size), mode="bilinear")[0].flatten(1)  # [d, pixels]
    likeness = F.normalize(wanted, dim=0).T @ target / target.norm(dim=0).clamp_min(1e-12)  # [k, pixels]
    best = likeness.argmax(dim=1)
    return torch.stack([best % target_size[1], best // target_size[1]], dim=1) + 0.5


def tokens_of(pictures, tokenizer, grid):
    """Pictures [3, H, W] in [-1, 1] of any size -> tokens [b, N]; stretched: to crop would lose points."""
    size = [tokens * tokenizer.config.downsampling for tokens in grid]
    device = next(tokenizer.parameters()).device
    fitting = [picture if list(picture.shape[1:]) == size else  # nothing to do: no rounding either
               F.interpolate(picture[None], size, mode="bicubic", antialias=True)[0].clamp(-1, 1)
               for picture in pictures]
    return tokenizer.encode(torch.stack(fitting).to(device))


def correspond(model, tokenizer, source, target, points, **options):
    """Where in the target picture is what the source picture shows at each point? Float [k, 2], (x, y).

    source, target: [3, H, W] in [-1, 1], of any size, also of two different ones.
    points: float [k, 2], (x, y) in pixels of the source picture; the answer is in pixels of the target.
    options: rounds, layer, classes, order, generator, grid, as encode_features takes them.
    Raises ValueError for shapes that do not fit and for points outside the picture.
    """
    if source.shape[:-2] != (3,) or target.shape[:-2] != (3,) or points.shape[1:] != (2,):
        raise ValueError("expected two pictures [3, H, W] and points [k, 2], got the shapes "
                         f"{list(source.shape)}, {list(target.shape)} and {list(points.shape)}")
    height, width = source.shape[1:]
    if ((points < 0) | (points > torch.tensor([width, height], device=points.device))).any():
        raise ValueError(f"points must lie in the picture, x from 0 to {width} and y from 0 to {height}")
    grid = options.get("grid") or model.config.grid
    features = encode_features(model, tokens_of([source, target], tokenizer, grid), **options)
    return nearest_points(*features.unflatten(1, grid), points, source.shape[1:], target.shape[1:])


def correct(found, truth, side, share=0.1):
    """Which points found [k, 2] are right: bool [k], those at most share * side pixels from the truth [k, 2].

    side: the larger one of the target picture (toy world) or of the object's box in it (SPair-71k's rule).
    """
    return (found - truth).norm(dim=1) <= share * side


def pck(right):
    """Share of correct keypoints: (mean over pairs, mean over all points); right: [k] bools of each pair."""
    by_pair = torch.stack([x.float().mean() for x in right])
    return by_pair.mean().item(), torch.cat(right).float().mean().item()


# ------------------------------------------------------------------------------------------------------------
# Linear probing (Table C)


def linear_probe(features, classes, test_features, test_classes):
    """Learn to tell the class by a linear function of the features: share of the test right (top-1).

    features: float [n, d], one vector a picture (the mean of its N features); classes: int64 [n].
    """
    mean, std = features.mean(dim=0), features.std(dim=0).clamp_min(1e-6)
    features, test_features = (features - mean) / std, (test_features - mean) / std
    linear = nn.Linear(features.shape[1], int(classes.max()) + 1, device=features.device)
    nn.init.zeros_(linear.weight)  # the problem is convex: no start is better than another
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():  # with a little weight decay, or the weights of separable classes would grow for ever
        optimizer.zero_grad()
        value = F.cross_entropy(linear(features), classes) + 1e-4 * linear.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (linear(test_features).argmax(dim=1) == test_classes).float().mean().item()


# ------------------------------------------------------------------------------------------------------------
# Attention


@torch.no_grad()
def attention_maps(model, tokens, layer, head, classes=None, order=None, generator=None, grid=None):
    """Which tokens each token looks at, in one head: (maps, to_class), shares that sum to 1 for each token.

    layer: 1 to n_layer; head: 0 to n_head - 1; all else as in features_by_layer, with one round.
    Returns maps [b, 2, N, 2, h, w] and to_class [b, 2, N]. maps[image, kind, position, other kind] is a
    picture [h, w]: how much the token at that position (raster order) looks at each other one. A kind is 0
    for position instruction tokens, 1 for image tokens. The class token itself sees nothing else.

    Computed anew from the layer's queries and keys: fused attention, which the model uses, never holds these
    weights. Raises ValueError for a layer or a head out of range.
    """
    layer = checked_layer(model, layer)
    if not 0 <= head < model.config.n_head:
        raise ValueError(f"head must be from 0 to {model.config.n_head - 1}, not {head}")
    grid = tuple(grid or model.config.grid)
    x, rotation, turns = prepare(model, tokens, classes, order, generator, grid)
    for block in model.layers[: layer - 1]:
        x = block(x, rotation)
    block = model.layers[layer - 1]
    q, k, _ = block.attention.queries_keys_values(block.attention_norm(x), rotation)
    scores = q[:, head] @ k[:, head].mT / math.sqrt(model.head_dim)  # [b, 1 + 2 N, 1 + 2 N]
    later = torch.ones(scores.shape[1:], dtype=torch.bool, device=x.device).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(dim=-1)
    # From the sequence to the image: the P of turn i stands at place 1 + 2 i, its image token after it.
    places = torch.cat([1 + 2 * turns, 2 + 2 * turns], dim=1)  # [b, 2 N]
    weights = torch.take_along_dim(weights, places[:, :, None], dim=1)  # [b, 2 N, 1 + 2 N]
    maps = torch.take_along_dim(weights, places[:, None, :], dim=2)  # [b, 2 N, 2 N]
    return maps.unflatten(2, (2, *grid)).unflatten(1, (2, -1)), weights[:, :, 0].unflatten(1, (2, -1))


# ------------------------------------------------------------------------------------------------------------
# Pictures whose corresponding points are known

# Two pictures [3, H, W] in [-1, 1], their points [k, 2], side as `correct` takes it, the name of the class.
Pair = namedtuple("Pair", "source target source_points target_points side name")
UNSEEN = 2 * 10**9  # toy pictures of seeds from here on: no network that ships has learnt from them


def toy_pairs(number, seed):
    """A list of Pairs of toy pictures; both show one class, and their points are its keypoints.

    The objects stand in opposite corners of where training has them, 5.7 pixels apart: whoever answers with
    the same place finds nothing. Left and right are those of the picture (toy.mirrored).
    """
    pairs = []
    for i in range(number):
        rng, label = np.random.default_rng([UNSEEN + seed, i]), i * len(toy.CLASSES) // number
        corner = rng.choice([14, 18], size=2)  # (x, y) of the object's middle
        pixels, places = zip(*(toy.draw(label, rng, x=x, y=y) for x, y in (corner, toy.SIDE - corner)))
        points = torch.tensor([[keypoints[name] for name in places[0]] for keypoints in places]).float()
        pairs.append(Pair(*common.from_uint8(np.stack(pixels)), *points, toy.SIDE, toy.CLASSES[label]))
    return pairs


def spair_pairs(folder):
    """The test pairs of SPair-71k: a list of Pairs with the paths of the pictures in their places.

    folder: with PairAnnotation/test/*.json and JPEGImages/CATEGORY/*.jpg, as the archive has them. Raises
    FileNotFoundError where files are missing, ValueError for one that is damaged.
    """
    folder, pairs = pathlib.Path(folder), []
    for path in sorted((folder / "PairAnnotation" / "test").glob("*.json")):
        try:
            pair = json.loads(path.read_text())
            names, points = ([pair[f"{end}_{what}"] for end in ("src", "trg")] for what in ("imname", "kps"))
            images = [folder / "JPEGImages" / pair["category"] / name for name in names]
            # Whole numbers there are pixels, ours are their corners: hence the half.
            points = torch.tensor(points).view(2, len(points[0]) or 1, 2) + 0.5
            left, top, right, bottom = pair["trg_bndbox"]
            pairs.append(Pair(*images, *points, max(right - left, bottom - top), pair["category"]))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is no pair of SPair-71k ({error}): unpack the archive again") from None
    if not pairs:
        raise FileNotFoundError(f"no {folder}/PairAnnotation/test/*.json: give the folder of SPair-71k, with "
                                "PairAnnotation and JPEGImages in it")
    for image in {image for pair in pairs for image in pair[:2] if not image.is_file()}:
        raise FileNotFoundError(f"{image} is missing, a pair needs it: unpack the archive again")
    return pairs


# ------------------------------------------------------------------------------------------------------------
# Measuring


def match_pairs(model, tokenizer, pairs, number, layers, order, generator):
    """Match `number` Pairs in rounds 1 and 2, after each of some layers: (right, examples).

    right: {(layer, round): a list of bool [k], from `correct`, one for each pair}.
    examples: four of the pairs, each with {(layer, round): points found [k, 2]}.
    """
    grid, right, examples = model.config.grid, defaultdict(list), []
    for i, pair in enumerate(tqdm(pairs, "matching", number, unit="pair", dynamic_ncols=True)):
        tokens, found = tokens_of([pair.source, pair.target], tokenizer, grid), {}
        features = features_by_layer(model, tokens, None, 2, order, generator)
        for layer, states in enumerate(itertools.islice(features, max(layers)), start=1):
            for turn in (1, 2) if layer in layers else ():
                maps = states[:, turn - 1].unflatten(1, grid)  # [2, h, w, d]
                sizes = pair.source.shape[1:], pair.target.shape[1:]
                found[layer, turn] = nearest_points(*maps, pair.source_points, *sizes).cpu()
                right[layer, turn].append(correct(found[layer, turn], pair.target_points, pair.side))
        if i in [j * number // 4 for j in range(4)]:
            examples.append((pair, found))
    return right, examples


def table_by_layer(model, tokenizer, number, seed, order=None):
    """What features are good for, on the toy world: [n_layer, 2, 3], of each layer in rounds 1 and 2.

    The three: PCK at 0.1, mean over `number` pairs; the same over all points; the top-1 of a linear probe
    that learns from 2 * number pictures and is tested on 4 * number others. Shares, 0 to 1.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    layers, learn, pooled = range(1, model.config.n_layer + 1), 2 * number, []
    right, _ = match_pairs(model, tokenizer, toy_pairs(number, seed), number, layers, order, generator)
    images, classes, _ = toy.make(3 * learn, UNSEEN + seed)
    for batch in tqdm(common.from_uint8(images).split(50), "encoding", unit="batch", dynamic_ncols=True):
        tokens = tokens_of(batch, tokenizer, model.config.grid)
        features = features_by_layer(model, tokens, None, 2, order, generator)
        pooled.append(torch.stack([states.mean(dim=2).cpu() for states in features], dim=1))
    pooled, classes = torch.cat(pooled), torch.from_numpy(classes)  # [6 * number, n_layer, 2, d]
    rows = []
    for layer, turn in right:
        x = pooled[:, layer - 1, turn - 1]
        top_1 = linear_probe(x[:learn], classes[:learn], x[learn:], classes[learn:])
        rows.append((*pck(right[layer, turn]), top_1))
    return torch.tensor(rows).view(-1, 2, 3)


# ------------------------------------------------------------------------------------------------------------
# What people look at


def draw_pairs(examples, layer, title, path):
    """Write a picture: a row for each of match_pairs's examples, a column for each round."""
    figure = Figure((10, 1 + 2.4 * len(examples)), dpi=110, layout="constrained")
    for row, (pair, found) in zip(figure.subplots(len(examples), 2, squeeze=False), examples):
        heights, widths = zip(pair.source.shape[1:], pair.target.shape[1:])
        shift = widths[0] + 0.1 * max(widths)  # where the target begins
        for turn, axes in enumerate(row, start=1):
            for picture, left, h, w in zip((pair.source, pair.target), (0, shift), heights, widths):
                axes.imshow(common.to_uint8(picture[None])[0], extent=(left, left + w, h, 0))
            right = correct(found[layer, turn], pair.target_points, pair.side)
            ends = zip(pair.source_points, found[layer, turn], pair.target_points, right)
            for (x, y), (found_x, found_y), (true_x, true_y), good in ends:
                line, colour = ("o-", "#00b000") if good else ("o--", "#e00000")
                axes.plot((x, found_x + shift), (y, found_y), line, color=colour, markeredgecolor="white",
                          linewidth=2, path_effects=[withStroke(linewidth=3.5, foreground="white")])
                if not good:
                    axes.plot(true_x + shift, true_y, "X", color="white", markeredgecolor="black")
            axes.set(xlim=(0, shift + widths[1]), ylim=(max(heights), 0),
                     title=f"{pair.name}, round {turn}: {right.sum()} of {len(right)}")
            axes.axis("off")
    figure.suptitle(f"{title}\ngreen, solid: right; red, dashed: wrong, with a cross where it should end")
    common.write_safely(path, lambda partial: figure.savefig(partial, format=common.picture_format(path)))


def draw_tables(tables, path):
    """Write a picture: both measures, layer by layer; tables: a list of (name, what table_by_layer gives)."""
    figure = Figure((10, 4.5), dpi=110, layout="constrained")
    labels = {0: "PCK at 0.1, mean of pairs, %", 2: "linear probe, top-1, %"}
    for axes, (column, label) in zip(figure.subplots(1, 2), labels.items()):
        for i, (name, table) in enumerate(tables):
            for turn, line in ((1, "--"), (2, "-")):
                axes.plot(range(1, 1 + len(table)), 100 * table[:, turn - 1, column], "os^v"[i % 4] + line,
                          color=f"C{i}", label=f"{name}, round {turn}")
        axes.set(xlabel="after layer", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(tables))
    common.write_safely(path, lambda partial: figure.savefig(partial, format=common.picture_format(path)))


# ------------------------------------------------------------------------------------------------------------
# The two commands


def open_models(paths, args):
    """A list of (RandAR, Tokenizer). Raises ValueError or OSError for all that can be wrong, but layers."""
    if args.number < 1:
        raise ValueError(f"--number must be at least 1, not {args.number}")
    generation_order(args.order or "random", 1, (1, 1))
    common.picture_format(args.out)
    models = [load_models(path, args.tokenizer, common.pick_device(args.device)) for path in paths]
    for path, (model, _) in zip(paths, models):
        if not getattr(args, "data", None) and model.class_names != toy.CLASSES:
            print(f"note: {path} has not learnt the toy world, whose pictures are used here; SPair-71k's are "
                  "those of python apps.py correspond --data DIR")
    common.writable_folder(pathlib.Path(args.out).parent)
    return models


def correspond_command(args):
    """Match pairs of pictures in rounds 1 and 2, say how many points were right, draw four pairs."""
    [(model, tokenizer)] = open_models([args.ckpt], args)
    layer, order = checked_layer(model, args.layer), args.order or model.order
    if args.data:
        pairs = spair_pairs(args.data)
        number = min(args.number, len(pairs))
        pairs = [pairs[i * len(pairs) // number] for i in range(number)]  # of all categories
        pairs = (Pair(*map(common.read_picture, pair[:2]), *pair[2:]) for pair in pairs)  # in their turn
    else:
        number, pairs = args.number, toy_pairs(args.number, args.seed)
    generator = torch.Generator(next(model.parameters()).device).manual_seed(args.seed)
    right, examples = match_pairs(model, tokenizer, pairs, number, [layer], order, generator)
    for turn in (1, 2):
        by_image, by_point = pck(right[layer, turn])
        print(f"round {turn}: PCK at 0.1 {by_image:.1%} per image, {by_point:.1%} per point")
    title = f"features after layer {layer} of {model.config.n_layer}, {order} order"
    draw_pairs(examples, layer, title, args.out)
    print(f"{number} pairs, {title}; drew {len(examples)} of them to {args.out}")


def features_command(args):
    """Correspondence and linear probe by layer and round, for each checkpoint: tables and a picture."""
    tables = []
    for path, (model, tokenizer) in zip(args.ckpt, open_models(args.ckpt, args)):
        name = f"{'/'.join(pathlib.Path(path).parts[-2:])}, {args.order or model.order} order"
        tables.append((name, table_by_layer(model, tokenizer, args.number, args.seed, args.order)))
        print(f"{name}, in %\n       PCK at 0.1 per image    per point             linear probe\n"
              "layer" + "     round 1   round 2" * 3)
        for layer, (first, second) in enumerate(100 * tables[-1][1], start=1):
            print(f"{layer:5}" + "".join(f"{a:12.1f}{b:10.1f}" for a, b in zip(first, second)))
    draw_tables(tables, args.out)
    print(f"wrote {args.out}")


def add_commands(commands):
    """Add `correspond` and `features` to the subparsers of apps.py; each sets `run`, a function of args."""
    shipped = common.CHECKPOINTS / "randar_toy.pt"
    match = commands.add_parser("correspond", help="match the parts of two objects")
    match.add_argument("--ckpt", default=shipped, help="weights (default: the toy model that ships)")
    match.add_argument("--data", metavar="DIR", help="the folder of SPair-71k (default: draw toy pictures)")
    match.add_argument("--layer", type=int, help="whose features (default: at two thirds of the depth)")
    match.set_defaults(run=correspond_command)
    table = commands.add_parser("features", help="correspondence and linear probe, layer by layer")
    table.add_argument("--ckpt", nargs="+", default=[shipped, shipped.with_name("randar_toy_raster.pt")],
                       help="weights to compare (default: the toy models of random and of raster order)")
    table.set_defaults(run=features_command)
    for name, command in (("correspond", match), ("features", table)):
        command.add_argument("--tokenizer", help="default: tokenizer.pt beside the checkpoint")
        command.add_argument("--number", type=int, default=200, help="pairs of pictures (default: 200)")
        command.add_argument("--order", help=f"{', '.join(ORDERS)} (default: that of the model's training)")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
        command.add_argument("--out", default=f"{name}.png", help=f"picture to write (default: {name}.png)")
