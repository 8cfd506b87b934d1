"""RandAR: decoder-only autoregressive image generation in random token orders (arXiv 2412.01827).

A GPT writes text from left to right. An image has no such direction, yet a plain causal decoder must know
*where* the token that it is to predict belongs. RandAR says so in the sequence itself: before every image
token stands a *position instruction token*. Trained on a fresh random order for every image, the model then
generates in any order, several tokens at a time, and fills in, extends or changes given images with no
further training: `decode` takes known tokens, any positions and any rotary angles.

Read from top to bottom:

    Config, SIZES                  what a model is made of (Table A)
    rotary_angles, rotate          where a token is: 2D rotary angles
    generation_order               in which order the image is written (Table 3, Fig. A)
    step_sizes                     how many tokens at once, step by step (Sec. 3.3)
    RMSNorm ... Block              the decoder, a Llama with a key-value cache
    RandAR                         the sequence, the training loss (Alg. A), and
    RandAR.decode, .generate       the one decoding loop (Alg. B), with guidance (App. F)
    load_randar, save_randar       files: ours and the released weights
"""

import math
from collections import namedtuple
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import common

# ------------------------------------------------------------------------------------------------------------
# What a model is made of


@dataclass
class Config:
    """The shape of a RandAR model. The defaults are the paper's RandAR-L on ImageNet (Table A)."""

    grid: tuple = (16, 16)  # (h, w): an image is N = h * w tokens
    vocab_size: int = 16384  # V: different image tokens, the codes of the tokenizer
    num_classes: int = 1000  # C
    dim: int = 1024  # d: width
    n_layer: int = 24
    n_head: int = 16
    dropout: float = 0.1  # of token embeddings, attention outputs and feed-forward outputs, in training
    class_dropout: float = 0.1  # how often the class is hidden in training, for classifier-free guidance


SIZES = {  # for example Config(**SIZES["XL"], grid=(16, 16), vocab_size=16384, num_classes=1000)
    "tiny": dict(dim=64, n_layer=4, n_head=2, dropout=0.0),  # ours, to see what size does (Fig. 4a)
    "toy": dict(dim=128, n_layer=4, n_head=4, dropout=0.0),  # ours, 1.2M: too few parameters to overfit
    "L": dict(dim=1024, n_layer=24, n_head=16),  # 343M, as all below of Table A
    "XL": dict(dim=1280, n_layer=36, n_head=20),  # 775M
    "XXL": dict(dim=1536, n_layer=48, n_head=24),  # 1.4B
}

# ------------------------------------------------------------------------------------------------------------
# Where a token is: 2D rotary angles
#
# A rotary embedding turns each pair of channels of a query or key by an angle proportional to the token's
# position, so that their dot product depends on the *difference* of two positions only. An image position has
# two coordinates: the first half of the pairs turns with the row, the second half with the column. Slow pairs
# see the layout, fast ones detail; resolution extrapolation treats the two differently (Sec. 3.4.3).


def rotary_angles(rows, columns, head_dim, base=10000.0):
    """Angles by which the channel pairs of a token at (row, column) turn.

    rows, columns: float tensors [...], in units of token positions; fractions are interpolated positions.
    head_dim: D, channels per attention head, a multiple of 4 (else a ValueError).
    Returns [..., D / 2] in radians: row angles in the first half, column angles in the second (Eq. 5).
    """
    if head_dim % 4:
        raise ValueError(f"head_dim must be a multiple of 4 (pairs for rows and for columns), not {head_dim}")
    frequencies = base ** -torch.arange(0, 1, 4 / head_dim, device=rows.device)  # [D / 4], from 1 down
    return torch.cat([rows[..., None] * frequencies, columns[..., None] * frequencies], dim=-1)


def grid_angles(grid, head_dim, device=None):
    """The angles of every position of an (h, w) grid in raster order, float [h * w, head_dim / 2]."""
    h, w = grid
    positions = torch.arange(h * w, device=device)
    return rotary_angles((positions // w).float(), (positions % w).float(), head_dim)


def rotation_of(angles):
    """Angles [..., D / 2] -> their cosines and sines [..., D / 2, 2], which is all that `rotate` needs."""
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x, rotation):
    """Turn each pair of channels (2i, 2i + 1) of x [..., D] by its angle; rotation: [..., D / 2, 2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # in float32 for precision: [..., D / 2] each
    cos, sin = rotation.unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


# ------------------------------------------------------------------------------------------------------------
# In which order: eleven ways to write an image
#
# An order lists positions (raster indices, row * w + column) in the turn in which they are decoded. One
# model, trained on random orders, can follow every one of them (Table 3). Three are *partly* random: two
# parts, each in a random order of its own. The last is not the paper's (arXiv 2503.17076 has it for masks).

ORDERS = ("random", "raster", "spiral_in", "spiral_out", "z_curve", "subsample", "alternate",
          "hierarchical", "center_first", "border_first", "halton")


def generation_order(name, batch, grid, generator=None, device=None):
    """The order of that name for each image of a batch: int64 [b, N], the raster index decoded at each turn.

    name: one of ORDERS ("-" may stand for "_"), else a ValueError; grid: (h, w); generator: a torch.Generator
    on `device`, for the orders with randomness, which differ from image to image.
    """
    name = name.replace("-", "_")
    if name not in ORDERS:
        raise ValueError(f"unknown order {name!r}: choose from {', '.join(ORDERS)}")
    h, w = grid
    positions = torch.arange(h * w, device=device)
    row, column = positions // w, positions % w
    random = torch.rand(batch, h * w, generator=generator, device=device)
    in_the_middle = (abs(2 * row - (h - 1)) < h / 2) & (abs(2 * column - (w - 1)) < w / 2)  # h/2 by w/2

    # Every order is a sort: a key for each position, the smallest goes first.
    if name == "random":
        key = random
    elif name == "raster":
        key = positions
    elif name in ("spiral_in", "spiral_out"):  # clockwise from the top left to the middle, or that backwards
        key = spiral_rank(row, column, h, w) * (1 if name == "spiral_in" else -1)
    elif name == "z_curve":  # interleave the bits of row and column: quadrant by quadrant, at every scale
        key = sum((row >> bit & 1) << (2 * bit + 1) | (column >> bit & 1) << (2 * bit) for bit in range(16))
    elif name == "subsample":  # four coarse images one after the other
        key = (row % 2 * 2 + column % 2) * h * w + positions
    elif name == "alternate":  # as the ox ploughs: every second row runs backwards
        key = row * w + torch.where(row % 2 == 0, column, w - 1 - column)
    elif name == "hierarchical":  # a coarse image, in random order, then all the rest, in random order
        key = ((row % 2 == 1) | (column % 2 == 1)) + random
    elif name in ("center_first", "border_first"):
        key = random + (in_the_middle if name == "border_first" else ~in_the_middle)
    elif name == "halton":
        key = halton_rank(h, w).to(positions.device)
    return key.expand(batch, -1).argsort(dim=-1, stable=True)


def spiral_rank(row, column, h, w):
    """The turn at which a clockwise spiral from the top left inwards reaches (row, column): int64 [N]."""
    ring = torch.stack([row, column, h - 1 - row, w - 1 - column]).amin(0)  # how many rings lie around it
    rows, columns = h - 2 * ring, w - 2 * ring  # the size of the ring's rectangle
    down, right = row - ring, column - ring  # the place in it
    along = torch.where(down == 0, right,  # the top edge, to the right
            torch.where(right == columns - 1, columns - 1 + down,  # the right edge, downwards
            torch.where(down == rows - 1, 2 * columns + rows - 3 - right,  # the bottom edge, to the left
                        2 * columns + 2 * rows - 4 - down)))  # the left edge, upwards
    return h * w - rows * columns + along  # all outer rings come before


def halton_rank(h, w):
    """The number of Halton's first point in each cell of a grid: int64 [N], all different.

    Points that follow each other lie far apart: so do tokens that are decoded at once. A point's row and
    column are its number in base 2 and 3, mirrored at the decimal point: 1, 2, 3 give the rows .1 .01 .11
    """
    numbers = torch.arange(1, 24 * h * w)  # enough for a point in each cell
    down, right = (sum(numbers.double() // base**i % base / base ** (i + 1) for i in range(24))
                   for base in (2, 3))  # from 0 to below 1
    cells = (down * h).long() * w + (right * w).long()
    return torch.full((h * w,), 24 * h * w).scatter_reduce(0, cells, numbers, "amin")


# ------------------------------------------------------------------------------------------------------------
# How many at once: the step schedule
#
# Tokens decoded in one step do not see each other, so one step may decode many only once the image is largely
# decided: a cosine curve, one token at a time in the beginning, many in the end.


def step_sizes(number, steps):
    """How many tokens each step decodes: a list of ints, each at least 1, that sums to `number`.

    number: tokens to decode, N; steps: T >= 1, else a ValueError. -1, or more steps than tokens: one a step.
    """
    if steps != -1 and steps < 1:
        raise ValueError(f"steps must be at least 1 (or -1 for one token a step), not {steps}")
    if steps == -1 or steps >= number:
        return [1] * number
    sizes = []
    for k in range(steps):
        target = min(number, int((1 - math.cos(math.pi / 2 * (k + 1) / steps)) * number + 1))
        if k == 0 and steps > 1:
            target = 1  # as in the released code: nothing is there yet that two tokens could agree with
        sizes.append(max(1, target - sum(sizes)))
    return sizes


# ------------------------------------------------------------------------------------------------------------
# The decoder: a Llama. Parameter names are those of the released weights, so that these load as they are.


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, eps=1e-5).to(x.dtype) * self.weight.to(x.dtype)


class KeyValueCache:
    """Keys and values of all tokens so far in one layer, so that a decoding step computes new ones only."""

    def __init__(self, batch, heads, length, head_dim, dtype, device):
        self.keys = torch.zeros(batch, heads, length, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)

    def write(self, place, keys, values):
        """Put [b, heads, n, D] from `place` on, over what stood there; returns all up to place + n."""
        end = place + keys.shape[2]
        self.keys[:, :, place:end], self.values[:, :, place:end] = keys, values
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.wqkv = common.Linear(config.dim, 3 * config.dim, bias=False)  # query, key, value: one product
        self.wo = common.Linear(config.dim, config.dim, bias=False)

    def queries_keys_values(self, x, rotation):
        q_k_v = self.wqkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        return *rotate(q_k_v[:2], rotation[:, None]), q_k_v[2]  # [b, heads, n, D] each

    def forward(self, x, rotation, cache=None, place=0):
        """x [b, n, d], rotation [b, n, D / 2, 2] -> [b, n, d]; x comes after `place` tokens of the cache."""
        q, k, v = self.queries_keys_values(x, rotation)
        if cache is not None:
            k, v = cache.write(place, k, v)
        if place > 0:  # the new tokens are the *last* ones: causal from the lower right corner
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(place)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        elif x.device.type == "cpu":  # whose attention takes up to four times as long in bfloat16
            with torch.autocast("cpu", enabled=False):
                y = F.scaled_dot_product_attention(*(t.float() for t in (q, k, v)), is_causal=True)
        else:  # training, and the first step: plain causal attention
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.dropout(self.wo(y.to(v.dtype).transpose(1, 2).flatten(2)), self.dropout, self.training)


class FeedForward(nn.Module):
    """SwiGLU: one projection gates the other."""

    def __init__(self, config):
        super().__init__()
        hidden = math.ceil(int(8 * config.dim / 3) / 256) * 256  # as Llama: 2/3 of 4 d, for a third matrix
        self.w1 = common.Linear(config.dim, hidden, bias=False)
        self.w3 = common.Linear(config.dim, hidden, bias=False)
        self.w2 = common.Linear(hidden, config.dim, bias=False)
        self.dropout = config.dropout

    def forward(self, x):
        return F.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm, self.ffn_norm = RMSNorm(config.dim), RMSNorm(config.dim)

    def forward(self, x, rotation, cache=None, place=0):
        x = x + self.attention(self.attention_norm(x), rotation, cache, place)
        return x + self.feed_forward(self.ffn_norm(x))


# ------------------------------------------------------------------------------------------------------------
# RandAR
#
# The sequence of one image (Eq. 3) is  [class, P_1, x_1, P_2, x_2, ..., P_N]:  P_i tells where the i-th token
# belongs, and the prediction at P_i is the distribution of x_i. The last image token predicts nothing and is
# left out: 2 N tokens.

# What a decoding step did: positions and tokens, int64 [b, m], and the guided logits, float32 [b, m, V].
Step = namedtuple("Step", "positions tokens logits")


class RandAR(nn.Module):
    order = "random"  # that of its training; load_randar knows better
    predicting = slice(1, None, 2)  # places of the sequence that predict: the position instruction tokens

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.head_dim = config.dim // config.n_head  # D
        self.null_class = config.num_classes  # "no class given": the last row of the class embedding
        self.checkpoint_activations = False  # in training: compute twice, keep less in memory
        self.cls_embedding = nn.ModuleDict({"embedding_table": nn.Embedding(self.null_class + 1, config.dim)})
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.pos_instruct_embeddings = nn.Parameter(torch.empty(1, config.dim))  # e of Eq. 5: one for all
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim)
        self.output = common.Linear(config.dim, config.vocab_size, bias=False)
        for matrix in (parameter for parameter in self.parameters() if parameter.ndim == 2):
            nn.init.normal_(matrix, std=0.02)
        nn.init.zeros_(self.output.weight)  # training starts from the uniform distribution, loss log(V)

    # The parts of a sequence: embeddings [b, n, d] and rotations [b, n, D / 2, 2]

    def position_instruction_tokens(self, rotation, positions=None):
        """P_i = RoPE(e, h_i, w_i) (Eq. 5) for rotation [b, n, D / 2, 2] -> [b, n, d].

        positions: int64 [b, n]; the rotation says all, but another kind may want them (rar.Dense).
        Attention rotates their queries and keys a second time, like those of all tokens. This first rotation
        is what makes the *values* differ: the second shows in comparisons with other image tokens only.
        """
        e = self.pos_instruct_embeddings.view(1, 1, self.config.n_head, self.head_dim)
        return rotate(e.expand(*rotation.shape[:2], -1, -1), rotation[:, :, None]).flatten(2)

    def sequence_rotation(self, order, angles=None):
        """Rotations of [class, P_1, x_1, ..., P_n, x_n]: [b, 1 + 2 n, D / 2, 2]; a token turns like its P.

        order: [b, n] positions; angles: [positions, D / 2], those of the model's own grid by default.
        """
        if angles is None:
            angles = grid_angles(self.config.grid, self.head_dim, order.device)
        rotation = rotation_of(angles)[order].repeat_interleave(2, dim=1)  # [b, 2 n, D / 2, 2]
        # The class has no place in the image. The released weights were trained with cos = sin = 0 for it,
        # which zeroes its query and key, so that every query scores it 0: it is read through its value only.
        return F.pad(rotation, (0, 0, 0, 0, 1, 0))

    def sequence(self, tokens, classes, order, angles=None):
        """[class, P_1, x_1, ..., P_N, x_N] of raster tokens [b, N]: [b, 1 + 2 N, d], and its rotation."""
        rotation = self.sequence_rotation(order, angles)  # [b, 1 + 2 N, D / 2, 2]
        instructions = self.position_instruction_tokens(rotation[:, 1::2], order)  # P_1 .. P_N: [b, N, d]
        image_tokens = self.tok_embeddings(tokens.gather(1, order))  # x_1 .. x_N: [b, N, d]
        image_tokens = F.dropout(image_tokens, self.config.dropout, self.training)
        pairs = torch.stack([instructions, image_tokens], dim=2).flatten(1, 2)  # P_1, x_1, .. [b, 2 N, d]
        return torch.cat([self.cls_embedding.embedding_table(classes)[:, None], pairs], dim=1), rotation

    def hidden_states(self, x, rotation, caches=None, place=0):
        """Through all layers: x [b, n, d] -> [b, n, d], not yet normalised."""
        for i, layer in enumerate(self.layers):
            if self.checkpoint_activations and self.training:
                x = checkpoint(layer, x, rotation, use_reentrant=False)
            else:
                x = layer(x, rotation, caches[i] if caches else None, place)
        return x

    # Training (Alg. A)

    def forward(self, tokens, classes, order, hidden=None, head=True):
        """Logits of every token of an image, each given the class and the tokens before it in the order.

        tokens: [b, N] int64 in raster order; classes: [b] int64, null_class for none; order: [b, N] int64, a
        permutation in each row; hidden: bool [b], whose class becomes null_class (None: in training a tenth,
        at random). Returns [b, N, V], in the order given (not in raster order); with head=False, what the
        head would see, [b, N, d]. Raises ValueError for shapes that do not fit; values are not checked.
        """
        b, number = len(tokens), math.prod(self.config.grid)
        shapes = [list(x.shape) for x in (tokens, classes, order)]
        if shapes != [[b, number], [b], [b, number]]:
            raise ValueError(f"expected tokens [b, {number}], classes [b], order [b, {number}] for the grid "
                             f"{self.config.grid}, got the shapes {str(shapes)[1:-1]}")
        if hidden is None:
            hidden = torch.rand(b, device=classes.device) < self.config.class_dropout * self.training
        x, rotation = self.sequence(tokens, torch.where(hidden, self.null_class, classes), order)
        x = self.hidden_states(x[:, :-1], rotation[:, :-1])  # without the last image token: [b, 2 N, d]
        x = self.norm(x[:, self.predicting])  # the head runs on half of it: [b, N, d]
        return self.output(x) if head else x

    def loss(self, tokens, classes, order=None, hidden=None):
        """Mean cross entropy in nats a token (Alg. A): a scalar. order: [b, N], or None for random ones."""
        if order is None:
            order = generation_order("random", len(tokens), self.config.grid, device=tokens.device)
        x, targets = self(tokens, classes, order, hidden, head=False), tokens.gather(1, order)
        # The logits of all images would be the largest tensor of training. So those of a few at a time (at
        # most 128 MB), and none kept: the backward pass computes them again, for 1% of a step at size L.
        few = max(1, 2**25 // (order.shape[1] * self.config.vocab_size))

        def summed(x, targets):
            return F.cross_entropy(self.output(x).flatten(0, 1).float(), targets.flatten(), reduction="sum")
        return sum(checkpoint(summed, *part, use_reentrant=False, preserve_rng_state=False)
                   for part in zip(x.split(few), targets.split(few))) / targets.numel()

    # Decoding (Alg. B)

    @torch.no_grad()
    def decode(self, classes, order, steps=88, cfg=(1.0, 4.0), scg=1.0, temperature=1.0, top_k=0, top_p=1.0,
               generator=None, known=None, angles=None):
        """The decoding loop, to be stepped through: an iterator of Step(positions, tokens, logits).

        classes: [b] int64, 0 .. C - 1, or null_class for none.
        order: [b, n] int64, the positions to decode in their turns: all of the image, or any part of it.
        steps: decoding steps, over which step_sizes distributes the n positions; -1 is one token a step.
        cfg: (start, end) of classifier-free guidance, linear in the share of tokens known before the step, so
            that the end itself is never quite reached; (1, 1) is none.
        scg: w_scg of spatial contextual guidance (App. F); 1 is none.
        temperature > 0, top_k (0: all), top_p in (0, 1]: how to sample; top_k=1 takes the most likely token.
        generator: a torch.Generator on the model's device, for samples that can be repeated.
        known: (positions [b, k], tokens [b, k]) int64: context before everything decoded, and left as it is.
        angles: [positions, D / 2], rotary angles of each position, by default those of the model's grid.

        Raises ValueError, before the first step, for values out of range and shapes that do not fit. From
        then on the host never waits for the device. In training mode, dropout would be at work here too.
        """
        sizes = step_sizes(order.shape[-1], steps)
        check_sampling(cfg, temperature, top_k, top_p, scg)
        known_positions, known_tokens = (order[..., :0],) * 2 if known is None else known
        self.check_context(classes, order, known_positions, known_tokens, angles)

        # Guidance compares the predictions in several contexts: streams, stacked along the batch dimension.
        streams = streams_of(cfg, scg, class_given=bool((classes != self.null_class).any()))
        null = torch.full_like(classes, self.null_class)
        stream_classes = torch.cat([classes if stream.with_class else null for stream in streams])
        class_token = self.cls_embedding.embedding_table(stream_classes)[:, None]  # [streams * b, 1, d]

        k, n = known_positions.shape[1], order.shape[1]
        positions = torch.cat([known_positions, order], dim=1).repeat(len(streams), 1)
        rotation = self.sequence_rotation(positions, angles)  # [streams * b, 1 + 2 (k + n), D / 2, 2]
        instructions = self.position_instruction_tokens(rotation[:, 1::2], positions)  # [.., k + n, d]
        caches = [KeyValueCache(len(class_token), self.config.n_head, 2 * (k + n), self.head_dim,
                                class_token.dtype, order.device) for _ in self.layers]

        def embed(tokens):
            """[b, m] -> [streams * b, m, d]; in streams that drop, a quarter is zeroed (App. F)."""
            embedded = self.tok_embeddings(tokens)
            if DROP_NULL not in streams:
                return embedded.repeat(len(streams), 1, 1)
            kept = torch.rand(tokens.shape, generator=generator, device=tokens.device)[..., None] >= 0.25
            return torch.cat([embedded * kept if stream.drops else embedded for stream in streams])

        def pairs(start, tokens):
            """P_i, x_i, P_i+1, ... for tokens [b, m] of the turns from `start` on: [streams * b, 2 m, d]."""
            end = start + tokens.shape[1]
            return torch.stack([instructions[:, start:end], embed(tokens)], dim=2).flatten(1, 2)

        @torch.no_grad()
        def loop():
            # `pending`: what the cache does not hold yet of the sequence that training saw, from `place` on.
            pending, place, done = torch.cat([class_token, pairs(0, known_tokens)], dim=1), 0, k
            for m in sizes:
                # The input: what is pending, and m queries Q_1 .. Q_m, the P of the next m turns without x.
                queries = instructions[:, done : done + m]
                end = place + pending.shape[1]  # where the next P belongs in the sequence of training
                rotations = torch.cat([rotation[:, place:end], rotation[:, end : end + 2 * m : 2]], dim=1)
                x = self.hidden_states(torch.cat([pending, queries], dim=1), rotations, caches, place)
                logits = self.output(self.norm(x[:, -m:])).float()  # [streams * b, m, V]
                weight = cfg[0] + (cfg[1] - cfg[0]) * done / (k + n)  # linear in the share of tokens known
                logits = guided(streams, logits.chunk(len(streams)), weight, scg)  # [b, m, V]
                tokens = sample(logits, temperature, top_k, top_p, generator)  # [b, m]
                yield Step(order[:, done - k : done - k + m], tokens, logits)
                # The cache now ends in Q_1 Q_2 .. Q_m, but training saw P_1 x_1 P_2 x_2 .. P_m x_m. Only Q_1
                # is right where it is: the next step overwrites the rest with x_1 P_2 x_2 .. (Alg. B).
                pending, place = pairs(done, tokens)[:, 1:], end + 1
                done += m

        return loop()  # not a step has run yet, but all that can be wrong has been checked

    def check_context(self, classes, order, known_positions, known_tokens, angles):
        """Raises ValueError for arguments of `decode` that do not fit the model or each other."""
        shapes = [list(x.shape) for x in (classes, order, known_positions, known_tokens)]
        b, n, k = len(order), order.shape[-1], known_positions.shape[-1]
        if shapes != [[b], [b, n], [b, k], [b, k]]:
            raise ValueError("expected classes [b], order [b, n], known positions and tokens [b, k], "
                             f"got the shapes {str(shapes)[1:-1]}")
        number = math.prod(self.config.grid) if angles is None else len(angles)
        positions = torch.cat([known_positions, order], dim=1)
        for name, x, end in (("classes", classes, self.null_class + 1), ("positions", positions, number),
                             ("known tokens", known_tokens, self.config.vocab_size)):
            if ((x < 0) | (x >= end)).any():
                raise ValueError(f"{name} must be from 0 to {end - 1}, not {x.min()} to {x.max()}")
        if (positions.sort(dim=1).values.diff(dim=1) == 0).any():
            raise ValueError("a position is twice in the order, or in it and among the known: give it once")

    def generate(self, classes, order="random", steps=88, cfg=(1.0, 4.0), scg=1.0, temperature=1.0, top_k=0,
                 top_p=1.0, generator=None, known=None, angles=None):
        """Run `decode` to its end: images as tokens [b, N] int64 in raster order. Arguments as there, except:

        order: a name of ORDERS, for the model's whole grid, or positions int64 [b, n]. Positions that are
        neither in it nor known come out as -1.
        """
        if isinstance(order, str):
            order = generation_order(order, len(classes), self.config.grid, generator, classes.device)
        steps = self.decode(classes, order, steps, cfg, scg, temperature, top_k, top_p, generator, known,
                            angles)
        number = math.prod(self.config.grid) if angles is None else len(angles)
        return collect(steps, torch.full((len(order), number), -1, device=order.device), known)


def collect(steps, tokens, known=None):
    """Put the tokens of all steps of a `decode`, and the known ones, in their places of tokens [b, N]."""
    if known is not None:
        tokens.scatter_(1, *known)
    for step in steps:
        tokens.scatter_(1, step.positions, step.tokens)
    return tokens


# ------------------------------------------------------------------------------------------------------------
# Guidance and sampling
#
# Classifier-free guidance moves the logits away from what the model would say without the class. Spatial
# contextual guidance (App. F): away from what it would say if image tokens had been dropped, known ones too,
# each with probability 1/4, drawn once, when it enters the cache. Each context is a stream of its own.

Stream = namedtuple("Stream", "drops with_class")
FULL_CLASS, FULL_NULL, DROP_NULL = Stream(False, True), Stream(False, False), Stream(True, False)


def streams_of(cfg, scg, class_given):
    """Whose predictions the guidance needs: one stream, two for CFG or for Eq. A, three for Eq. B."""
    if scg == 1:
        return [FULL_CLASS, FULL_NULL] if class_given and tuple(cfg) != (1, 1) else [FULL_CLASS]
    return [FULL_CLASS, FULL_NULL, DROP_NULL] if class_given else [FULL_NULL, DROP_NULL]


def guided(streams, logits, cfg, scg):
    """Combine the logits [b, m, V] of the streams; cfg and scg are w_cfg and w_scg at this step."""
    z = dict(zip(streams, logits))
    if FULL_NULL not in z:
        return z[FULL_CLASS]
    image = z[FULL_NULL]
    if DROP_NULL in z:
        image = z[DROP_NULL] + scg * (z[FULL_NULL] - z[DROP_NULL])  # Eq. A
    if FULL_CLASS in z:
        image = image + cfg * (z[FULL_CLASS] - z[FULL_NULL])  # Eq. B; with w_scg = 1, plain CFG
    return image


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw one token from each distribution: logits [..., V] float -> int64 [...]; see check_sampling."""
    logits = logits / temperature
    if top_k:  # the k best, and no more where several are equal
        best, tokens = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, tokens, best)
    if top_p < 1:  # the fewest tokens that have top_p of the probability together
        ordered, tokens = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        better = probabilities.cumsum(-1) - probabilities  # what the tokens before this one have together
        logits = logits.scatter(-1, tokens, ordered.masked_fill(better >= top_p, -torch.inf))
    # The largest of p_i / E_i, with E_i exponentially distributed, is i with probability p_i. Unlike
    # torch.multinomial this never makes the host wait for the device.
    return (logits.softmax(-1) / torch.empty_like(logits).exponential_(generator=generator)).argmax(-1)


def check_sampling(cfg, temperature, top_k, top_p, scg):
    """Raises ValueError for guidance that is not a pair, and for a value out of its range."""
    if len(cfg) != 2 or not all(map(math.isfinite, (*cfg, scg))):
        raise ValueError("cfg must be two numbers, guidance at the start and at the end, and scg one, "
                         f"not {list(cfg)} and {scg}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}: top_k=1 is the likeliest token")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (all tokens) or more, not {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")


# ------------------------------------------------------------------------------------------------------------
# Files


def save_randar(model, path, half=False, **more):
    """Write a checkpoint for load_randar. half: weights in float16; more: class_names, training state, ..."""
    state = common.half_precision(model.state_dict()) if half else model.state_dict()
    common.save({"config": asdict(model.config), "model": state, **more}, path)


def randar_of(content, state):
    """A RandAR as a file holds it: released ones have heads of 64 channels, and say the rest by shapes."""
    if "config" in content:
        return RandAR(Config(**content["config"]))
    vocab_size, dim = len(state["tok_embeddings.weight"]), len(state["layers.0.attention.wo.weight"])
    classes = len(state["cls_embedding.embedding_table.weight"]) - 1
    n_layer = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    return RandAR(Config((16, 16), vocab_size, classes, dim, n_layer, n_head=dim // 64))


def load_randar(path, device="cpu", model_of=randar_of):
    """A RandAR from one of our checkpoints, or from released weights (.safetensors, .pt), in eval mode.

    model.class_names is a list of str, or None where the file names none; model.order is the order that it
    was trained on, "random" unless the file says otherwise; model_of is for rar.load_model, which knows other
    models, too. Raises FileNotFoundError, or ValueError for a file that is damaged or holds something else.
    """
    content = common.load(path)
    try:
        state = content.get("model", content)
        if "quantize.embedding.weight" in state:
            raise ValueError("it is a tokenizer, for --tokenizer")
        with torch.device("meta"):  # shapes without numbers: all of these come from the file
            model = model_of(content, state)
        model.to_empty(device=device).load_state_dict(state)
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        reason = "there is no " * isinstance(error, KeyError) + str(error).splitlines()[-1].strip()[:180]
        raise ValueError(f"{path} holds no RandAR weights ({reason}): give a file that train.py wrote, or "
                         "released weights") from None
    model.class_names, model.order = content.get("class_names"), content.get("order", model.order)
    return model.eval()
