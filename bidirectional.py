"""What RandAR knows of an image (Sec. 3.4.4): features, correspondences, attention. Decodes nothing.

    features_by_layer, encode_features    an image as vectors, each has seen all of it (Eq. 8)
    correspond                            where is the same part on another object? (App. E)
    attention_maps                        which tokens each token looks at

apps.py has these names, too, and the command `correspond`; studies/features.py measures them.
"""

import math

import torch
import torch.nn.functional as F

from randar import generation_order, grid_angles
from support.border import UserError

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


def angles_of(model, grid, device=None):
    """The angles of a grid other than that of training, [N, D / 2]; None for that of training."""
    if tuple(grid) == tuple(model.config.grid):
        return None
    if model.kind != "rope":  # the others have learned a vector for each position
        raise UserError("another grid than that of training takes a model of the kind rope, this "
                        f"one is of the kind {model.kind!r}")
    return grid_angles(grid, model.head_dim, device)


def prepare(model, tokens, classes, order, generator, grid):
    """For the functions below: x [b, 1 + 2 N, d], its cos_sin, and each position's turn, [b, N]."""
    if not model.inserts_instructions:
        raise UserError("features and attention are read at position instruction tokens: a model "
                        f"of the kind {model.kind!r} has none of their own, give one of rope")
    grid = grid or model.config.grid
    order = model.order if order is None else order
    if isinstance(order, str):
        order = generation_order(order, len(tokens), grid, generator, tokens.device)
    if classes is None:
        classes = torch.full_like(tokens[:, 0], model.null_class)
    angles = angles_of(model, grid, tokens.device)
    return *model.sequence(tokens, classes, order, angles), order.argsort(dim=1)


@torch.no_grad()
def features_by_layer(model, tokens, classes=None, rounds=2, order=None, generator=None, grid=None):
    """Features of images after each layer in turn: an iterator of n_layer times [b, rounds, N, d].

    tokens: int64 [b, N] in raster order, as are the features. classes: int64 [b]; None: the null
    class, for nobody names the class of what is to be understood. order: a name, or int64 [b, N];
    None: as in the model's training. generator: for random orders. grid: (h, w); None: the model's.
    """
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

    layer: after which one, 1 to n_layer; None: at two thirds of the depth (24 of 36 was the best of
    the three that the paper tried). options: order, generator, grid; these and all else as in
    features_by_layer.
    """
    layers = features_by_layer(model, tokens, classes, rounds, **options)
    for _, features in zip(range(checked_layer(model, layer)), layers):
        pass  # later layers are never computed
    return features[:, -1]


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

    # and those of all pixels of the target. The nearest by cosine; the paper: by dot product.
    pixels = F.interpolate(target, tuple(target_size), mode="bilinear")[0].flatten(1)  # [d, pixels]
    likeness = wanted[0, :, 0].T @ F.normalize(pixels, dim=0)  # [k, pixels]
    best = likeness.argmax(dim=1)  # a raster index of pixels
    return torch.stack([best % target_size[1], best // target_size[1]], dim=1) + 0.5


def tokens_of(images, tokenizer, grid):
    """Pictures [3, H, W] of any size -> tokens [b, N]; stretched, for to crop would lose points."""
    size = [side * tokenizer.config.downsampling for side in grid]
    fitting = [F.interpolate(image[None], size, mode="bicubic", antialias=True) for image in images]
    device = next(tokenizer.parameters()).device
    return tokenizer.encode(torch.cat(fitting).clamp(-1, 1).to(device))  # bicubic may overshoot


def correspond(model, tokenizer, source, target, points, **options):
    """Where in the target picture is what the source picture shows at each point? Float [k, 2].

    source, target: [3, H, W] in [-1, 1], of any size, each of its own. points: float [k, 2], (x, y)
    in pixels of the source; the answer is in pixels of the target. options: of encode_features.
    """
    grid = tuple(options.get("grid") or model.config.grid)
    features = encode_features(model, tokens_of([source, target], tokenizer, grid), **options)
    features = features.unflatten(1, grid)  # of both pictures, one batch: [2, h, w, d]
    return nearest_points(features[0], features[1], points, source.shape[1:], target.shape[1:])


# ------------------------------------------------------------------------------------------------
# Attention


@torch.no_grad()
def attention_maps(model, tokens, layers=None, classes=None, order=None, generator=None, grid=None):
    """Which tokens each token looks at, in all heads of some layers, from one pass.

    layers: rising numbers, 1 to n_layer, or None: all. All else as features_by_layer, of one round.
    Returns maps [b, layers, heads, 2, N, 2, h, w] and to_class [b, layers, heads, 2, N].
    maps[image, i, j, kind, position, other kind] is a picture [h, w]: how much the token at that
    position (raster order) looks at each other one; the class gets the rest of 1.
    A kind is 0 for position instruction tokens, 1 for image tokens.
    """
    x, cos_sin, turns = prepare(model, tokens, classes, order, generator, grid)
    layers = [checked_layer(model, i) for i in layers or range(1, 1 + model.config.n_layer)]
    # The places in the sequence of the class, of all P, of all x: these in raster order
    places = torch.cat([0 * turns[:, :1], 1 + 2 * turns, 2 + 2 * turns], dim=1)  # [b, 1 + 2 N]
    later = places[:, None, :, None] < places[:, None, None, :]  # [b, 1, 1 + 2 N, 1 + 2 N]
    weights = []
    for layer, block in enumerate(model.layers[: max(layers)], start=1):
        if layer in layers:  # computed anew: fused attention never holds these weights
            q, k, _ = block.attention.queries_keys_values(block.attention_norm(x), cos_sin)
            q, k = (torch.take_along_dim(y, places[:, None, :, None], dim=2) for y in (q, k))
            scores = q @ k.mT / math.sqrt(model.head_dim)  # [b, heads, 1 + 2 N, 1 + 2 N]
            weights.append(scores.masked_fill(later, -torch.inf).softmax(-1)[:, :, 1:])
        x = block(x, cos_sin)

    weights = torch.stack(weights, dim=1).unflatten(3, (2, -1))  # [..., 2, N, 1 + 2 N]
    return weights[..., 1:].unflatten(-1, (2, *(grid or model.config.grid))), weights[..., 0]
