"""What a generator's features are good for (Table 5, App. E): python -m studies.features

Without arguments: the toy models of random and of raster order, layer by layer, in one round and
in two. With SPair-71k's pictures, --data DIR: parts of objects are matched by the features of one
layer, and some of them drawn. The features themselves are in bidirectional.py.

    correct, pck, linear_probe      is the same part found? can a linear function tell the class?
    toy_pairs, spair_pair           pictures whose corresponding points are known
    match_pairs, table_by_layer, encoder_pck      what is measured
    draw_pairs, draw_tables         what people look at
"""

import itertools
import json
import pathlib
from collections import defaultdict, namedtuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from bidirectional import checked_layer, features_by_layer, nearest_points, tokens_of
from randar import ORDERS
from sample import load_models
from support import border, pictures, toy
from support.border import UserError

# ------------------------------------------------------------------------------------------------
# Two figures (Table 5): the share of correct keypoints, PCK, and a linear probe


def correct(found, truth, side):
    """Which points found [k, 2] are at most 0.1 * side pixels from the truth [k, 2]: bool [k].

    side: the larger one of the target picture (toy world) or of the object's box in it (SPair-71k).
    """
    return (found - truth).norm(dim=1) <= 0.1 * side


def pck(right):
    """PCK: (mean over pairs, mean over all points); right: bool [k] of each pair."""
    by_pair = torch.stack([x.float().mean() for x in right if len(x)])  # of points that both show
    return by_pair.mean().item(), torch.cat(right).float().mean().item()


def linear_probe(features, classes, test_features, test_classes):
    """Learn to tell the class by a linear function of features: shares of the test right.

    features: float [n, d], one vector a picture (the mean of its N features); classes: int64 [n].
    Returns (top-1, top-5): the class is the likeliest one, is among the five likeliest.
    """
    mean, std = features.mean(dim=0), features.std(dim=0).clamp_min(1e-6)  # [d] each
    features, test_features = (features - mean) / std, (test_features - mean) / std
    linear = nn.Linear(features.shape[1], int(classes.max()) + 1, device=features.device)  # d to C
    for parameter in linear.parameters():  # the problem is convex: no start is better than another
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():  # a little weight decay, or the weights of separable classes would grow for ever
        optimizer.zero_grad()
        value = F.cross_entropy(linear(features), classes)
        value += 1e-4 * linear.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    ranked = linear(test_features).argsort(descending=True)  # classes, the likeliest first: [n, C]
    right = ranked == test_classes[:, None]
    return tuple(right[:, :k].any(dim=1).float().mean().item() for k in (1, 5))


# ------------------------------------------------------------------------------------------------
# Pictures whose corresponding points are known

# Two pictures [3, H, W] in [-1, 1]; points [k, 2]; side, as `correct` takes it; the class's name
Pair = namedtuple("Pair", "source target source_points target_points side name")
UNSEEN = 2 * 10**9  # toy pictures of seeds from here on: no network that ships has learnt from them


def toy_pairs(number, seed, world="plain"):
    """A list of Pairs of toy pictures; both show one class, and their points are its keypoints.

    In the plain world the objects stand in opposite corners of where training has them, 5.7 pixels
    apart: who answers with the same place finds nothing. In the fine one they differ in size, too,
    and the points are those that both show. Left and right are of the picture (toy.mirrored).
    """
    pairs, side = [], toy.WORLDS[world]
    for i in range(number):
        rng, label = np.random.default_rng([UNSEEN + seed, i]), i * len(toy.CLASSES) // number
        one = other = {}
        if world == "plain":
            x, y = rng.choice([14, 18], size=2)  # the middle of the object
            one, other = {"x": x, "y": y}, {"x": toy.SIDE - x, "y": toy.SIDE - y}
        source, here = toy.draw(label, rng, world, **one)
        target, there = toy.draw(label, rng, world, **other)
        both = [name for name in here if name in there]
        points = [torch.tensor([places[name] for name in both]).view(-1, 2).float()
                  for places in (here, there)]  # the fine world may show none twice
        images = pictures.from_uint8(np.stack([source, target]))
        pairs.append(Pair(*images, *points, side, toy.CLASSES[label]))
    return pairs


def spair_pair(path):
    """A Pair of SPair-71k; path: an annotation, in the folder as the archive has it."""
    pair = json.loads(path.read_text())
    folder = path.parents[2] / "JPEGImages" / pair["category"]
    images = [pictures.read_picture(folder / pair[key]) for key in ("src_imname", "trg_imname")]
    # Whole numbers there are pixels, ours are their corners: hence the half.
    points = [torch.tensor(pair[key]) + 0.5 for key in ("src_kps", "trg_kps")]  # [k, 2] each
    left, top, right, bottom = pair["trg_bndbox"]
    return Pair(*images, *points, max(right - left, bottom - top), pair["category"])


# ------------------------------------------------------------------------------------------------
# Measuring


def match_pairs(model, tokenizer, pairs, number, layers, order, generator):
    """Match `number` Pairs in rounds 1 and 2, after each of some layers: (right, examples).

    right: {(layer, round): a list of bool [k], from `correct`, one for each pair}.
    examples: four of the pairs, each with {(layer, round): points found [k, 2]}.
    """
    grid, right, examples = model.config.grid, defaultdict(list), []
    drawn = [i * number // 4 for i in range(4)]
    for i, pair in enumerate(tqdm(pairs, "matching", number, leave=False)):
        tokens, found = tokens_of([pair.source, pair.target], tokenizer, grid), {}  # [2, N]
        sizes = pair.source.shape[1:], pair.target.shape[1:]
        features = features_by_layer(model, tokens, None, 2, order, generator)
        states = list(itertools.islice(features, max(layers)))  # [2, rounds, N, d] each
        for layer, r in itertools.product(layers, (1, 2)):
            source, target = states[layer - 1][:, r - 1].unflatten(1, grid)  # [h, w, d] each
            points = nearest_points(source, target, pair.source_points, *sizes).cpu()  # [k, 2]
            found[layer, r] = points
            right[layer, r].append(correct(points, pair.target_points, pair.side))
        if i in drawn:
            examples.append((pair, found))
    return right, examples


def table_by_layer(model, tokenizer, number, seed, order=None):
    """What features are good for, on its toy world, [n_layer, 2, 4]: of each layer in rounds 1, 2.

    The four: PCK at 0.1, mean over `number` pairs; the same over all points; top-1 and top-5 of a
    linear probe that learns from 2 * number pictures and is tested on 4 * number others. 0 to 1.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    layers, world = range(1, model.config.n_layer + 1), toy.world_of(model, tokenizer) or "plain"
    pairs = toy_pairs(number, seed, world)
    right, _ = match_pairs(model, tokenizer, pairs, number, layers, order, generator)

    # For the probe: the mean of each picture's features
    images, classes, _ = toy.make(6 * number, UNSEEN + seed, world)
    pooled, classes = [], torch.from_numpy(classes)
    for batch in tqdm(pictures.from_uint8(images).split(50), "encoding", leave=False):
        tokens = tokens_of(batch, tokenizer, model.config.grid)
        features = features_by_layer(model, tokens, None, 2, order, generator)
        pooled.append(torch.stack([states.mean(dim=2).cpu() for states in features]))  # over N
    pooled = torch.cat(pooled, dim=1)  # [n_layer, 6 * number, rounds, d]

    table, learn = torch.empty(len(layers), 2, 4), 2 * number  # the first ones are learnt from
    for layer, r in right:
        x = pooled[layer - 1, :, r - 1]  # [6 * number, d]
        probe = linear_probe(x[:learn], classes[:learn], x[learn:], classes[learn:])
        table[layer - 1, r - 1] = torch.tensor([*pck(right[layer, r]), *probe])
    return table


@torch.no_grad()
def encoder_pck(tokenizer, pairs):
    """PCK of what the tokenizer's encoder sees, without a generator (Table C's last row): as pck.

    pairs: Pairs of pictures of one size, a multiple of the tokenizer's f.
    """
    right, device = [], next(tokenizer.parameters()).device
    for pair in pairs:
        seen = tokenizer.encoder(torch.stack([pair.source, pair.target]).to(device))
        source, target = seen.permute(0, 2, 3, 1)  # [h, w, latent_channels] each
        size = pair.source.shape[1:]
        points = nearest_points(source, target, pair.source_points, size, size).cpu()  # [k, 2]
        right.append(correct(points, pair.target_points, pair.side))
    return pck(right)


# ------------------------------------------------------------------------------------------------
# What people look at, and the command


def draw_pairs(examples, layer, title, path):
    """Write a picture: a row for each of match_pairs's examples, a column for each round.

    A line leads from each point of the source to the one found in the target.
    """
    figure = Figure((10, 1 + 2.4 * len(examples)), dpi=110, layout="constrained")
    for row, (pair, found) in zip(figure.subplots(len(examples), 2, squeeze=False), examples):
        # Source and target side by side, white below the lower one
        images = pair.source, pair.target
        height = max(image.shape[1] for image in images)
        images = [F.pad(image, (0, 0, 0, height - image.shape[1]), value=1) for image in images]
        both = pictures.to_uint8(torch.cat(images, dim=2)[None])[0]  # [height, width, 3]

        for r, axes in enumerate(row, start=1):
            axes.imshow(both, extent=(0, both.shape[1], height, 0))
            right = correct(found[layer, r], pair.target_points, pair.side)
            ends = found[layer, r] + torch.tensor([pair.source.shape[2], 0])  # in the target
            for start, end, good in zip(pair.source_points, ends, right):
                axes.plot(*zip(start, end), "go-" if good else "ro--")
            axes.set_title(f"{pair.name}, round {r}: {right.sum()} of {len(right)}")
            axes.axis("off")
    figure.suptitle(f"{title}\ngreen, solid: right; red, dashed: wrong")
    pictures.save_figure(figure, path)


def draw_tables(tables, path):
    """Write a picture: PCK and probe by layer; tables: a list of (name, table_by_layer's)."""
    figure = Figure((10, 4.5), dpi=110, layout="constrained")
    for axes, column, label in zip(figure.subplots(1, 2), (0, 2), ("PCK at 0.1", "linear probe")):
        for i, (name, table) in enumerate(tables):
            for r, line in ((1, "o--"), (2, "o-")):
                axes.plot(range(1, 1 + len(table)), 100 * table[:, r - 1, column], line,
                          color=f"C{i}", label=f"{name}, round {r}")
        axes.set(xlabel="after layer", ylabel=f"{label}, %")
        axes.legend()
    pictures.save_figure(figure, path)


def match(model, tokenizer, args):
    """SPair-71k: PCK by the features of one layer, and a picture of four pairs."""
    layer, order = checked_layer(model, args.layer), args.order or model.order
    paths = sorted(pathlib.Path(args.data).glob("PairAnnotation/test/*.json"))
    if not paths:
        raise UserError(f"no {args.data}/PairAnnotation/test/*.json: give SPair-71k's folder")
    number = min(args.number, len(paths))
    chosen = [paths[i * len(paths) // number] for i in range(number)]  # of all categories

    pairs = map(spair_pair, chosen)
    generator = torch.Generator(next(model.parameters()).device).manual_seed(args.seed)
    right, examples = match_pairs(model, tokenizer, pairs, number, [layer], order, generator)
    title = f"{number} pairs, features after layer {layer} of {model.config.n_layer}, {order} order"
    print(title)
    for r in (1, 2):
        by_image, by_point = pck(right[layer, r])
        print(f"round {r}: PCK at 0.1 {by_image:.1%} per image, {by_point:.1%} per point")
    draw_pairs(examples, layer, title, args.out)


def compare(models, args):
    """PCK and linear probe by layer and round, of each checkpoint: tables, and a picture."""
    tables = []  # (name, [n_layer, 2, 4]) of each
    for path, (model, tokenizer) in zip(args.ckpt, models):
        name = f"{pathlib.Path(path).name}, {args.order or model.order} order"
        table = table_by_layer(model, tokenizer, args.number, args.seed, args.order)
        tables.append((name, table))
        print(f"{name}, in %, rounds 1, 2: PCK at 0.1 per image, per point; probe top-1, top-5")
        for layer, rounds in enumerate(100 * table, start=1):  # [2, 4]
            print(f"layer {layer:2}", *(f"{a:8.1f}{b:8.1f}" for a, b in rounds.T))
    draw_tables(tables, args.out)


def main():
    toy_models = [border.CHECKPOINTS / name for name in ("randar_toy.pt", "randar_toy_raster.pt")]
    parser = border.command_line(__doc__)
    add = parser.add_argument
    add("--ckpt", nargs="+", default=toy_models, help="to compare (default: the toy models)")
    add("--data", metavar="DIR", help="the folder of SPair-71k (default: draw toy pictures)")
    add("--layer", type=border.positive_int, help="of SPair-71k (default: 2/3 of the depth)")
    add("--tokenizer", help="default: tokenizer.pt beside the checkpoint")
    add("--number", type=border.positive_int, default=200, help="pairs of pictures (default: 200)")
    add("--order", help=f"one of {', '.join(ORDERS)} (default: that of the model's training)")
    add("--seed", type=border.seed, default=0, help="(default: 0)")
    add("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    add("--out", default="features.png", help="picture to write (default: features.png)")
    args = parser.parse_args()
    with border.one_line_errors():
        pictures.picture_format(args.out)  # before hours of work
        border.output(args.out)
        if args.data and len(args.ckpt) > 1:
            raise UserError("--data is for one model: give one --ckpt")
        device = border.pick_device(args.device)
        models = [load_models(path, args.tokenizer, device) for path in args.ckpt]
        if args.data:
            match(*models[0], args)
        else:
            compare(models, args)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
