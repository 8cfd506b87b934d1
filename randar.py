"""RandAR: decoder-only autoregressive image generation in random token orders (arXiv 2412.01827).

A GPT writes text from left to right. An image has no such direction, so a causal decoder must be
told *where* the token that it is to predict belongs. RandAR says so in the sequence: before every
image token stands a *position instruction token*. That and the shuffling are all that it adds to
LlamaGen (arXiv 2406.06525). Trained on a fresh random order for every image, one model generates
in any order, several tokens at a time, and fills in, extends or changes images as it is.

    Config, SIZES              what a model is made of (Table A)
    rotary_angles, rotate      where a token is: 2D rotary angles (Eq. 5)
    generation_order           in which order the image is written (Table 3, Fig. A)
    step_sizes                 how many tokens at once, step by step (Sec. 4.1)
    Attention ... Block        the decoder, a Llama
    Guidance, sample_tokens    from logits to tokens (App. F)
    RandAR                     the sequence (Eq. 3), the loss (Eq. 4, Alg. A), decoding (Alg. B)
    load_randar, save_randar   files: ours and the released weights

Sections, tables and equations are those of the paper's first arXiv version. The words:
*position*: where a token is in the image, row * w + column; *turn*: its index in the order;
*place*: its index in the sequence (*start_pos*: of the first new one); *step*: decodes m tokens at
once, its *queries* Q are their instruction tokens (not attention's queries). P_i, x_i: instruction
token and image token of turn i; N = h * w of each; b: batch; n: tokens to decode, or that a layer
reads; k: known ones; c: contexts of guidance; d, D: width, of all and of a head; V: vocabulary.
"""

import math
from collections import namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from support import checks
from support.border import UserError
from support.speed import causal_attention

# ------------------------------------------------------------------------------------------------
# What a model is made of


@dataclass
class Config:
    """The shape of a RandAR model. The defaults are the paper's RandAR-L on ImageNet (Table A)."""

    grid: tuple = (16, 16)  # (h, w): an image is N = h * w tokens
    vocab_size: int = 16384  # V: different image tokens, the codebook of the tokenizer
    num_classes: int = 1000  # C
    dim: int = 1024  # d: width
    n_layer: int = 24
    n_head: int = 16
    token_dropout: float = 0.1  # of token embeddings (Sec. 4.1)
    dropout: float = 0.1  # of layers' outputs (released code)
    class_dropout: float = 0.1  # how often training hides the class, for classifier-free guidance


SIZES = {  # for example Config(**SIZES["XL"], grid=(16, 16), vocab_size=16384, num_classes=1000)
    "tiny": dict(dim=64, n_layer=4, n_head=2, token_dropout=0.0, dropout=0.0),  # ours, 0.3M
    "toy": dict(dim=128, n_layer=4, n_head=4, token_dropout=0.0, dropout=0.0),  # ours, 1.2M
    "fine": dict(dim=192, n_layer=6, n_head=3, dropout=0.0),  # ours, 2.9M, for the fine world
    "S": dict(dim=384, n_layer=12, n_head=6),  # ours, 34M; of a codebook of 512 and 10 classes 22M
    "M": dict(dim=768, n_layer=12, n_head=12),  # ours, 111M and 86M
    "L": dict(dim=1024, n_layer=24, n_head=16),  # 343M; this and those below: Table A
    "XL": dict(dim=1280, n_layer=36, n_head=20),  # 775M
    "XXL": dict(dim=1536, n_layer=48, n_head=24),  # 1.4B
}

# ------------------------------------------------------------------------------------------------
# Where a token is: 2D rotary angles
#
# A rotary embedding rotates each pair of channels of a query or key by an angle in proportion to
# the token's position, so that their dot product depends on the *difference* of two positions only.
# An image position has two coordinates: the first half of the pairs rotates with the row, the
# second half with the column. Slow pairs see the layout, fast ones detail: for a larger grid the
# slow ones are interpolated, the fast ones extrapolated (apps.extrapolate, Sec. 3.4.3).


def rotary_angles(rows, columns, head_dim, base=10000.0):
    """The angles of the channel pairs of a token at (row, column): [..., D / 2], in radians.

    rows, columns: float tensors [...], in units of token positions; fractions are interpolated.
    head_dim: D, a multiple of 4. Row angles are the first half, column angles the second.
    """
    if head_dim % 4:
        raise UserError(f"head_dim must be a multiple of 4 (two axes of pairs), not {head_dim}")
    quarter = head_dim // 4  # pairs for each of the two axes
    frequencies = base ** -(torch.arange(quarter, device=rows.device) / quarter)  # [D / 4]
    return torch.cat([rows[..., None] * frequencies, columns[..., None] * frequencies], dim=-1)


def grid_angles(grid, head_dim, device=None):
    """The angles of every position of an (h, w) grid in raster order, float [h * w, D / 2]."""
    positions = torch.arange(grid[0] * grid[1], device=device)
    return rotary_angles((positions // grid[1]).float(), (positions % grid[1]).float(), head_dim)


def rotate(x, cos_sin):
    """Rotate the channels (2i, 2i + 1) of x [..., D] by their angle; cos_sin: [..., D / 2, 2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [..., D / 2], float32 for precision
    cos, sin = cos_sin.unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


# ------------------------------------------------------------------------------------------------
# In which order to write an image
#
# An order lists the position of each turn. One model, trained on random orders, can follow every
# one of them (Table 3). Some are *partly* random: two shuffled parts.

ORDERS = ("random", "raster", "spiral_in", "spiral_out", "z_curve", "subsample", "alternate",
          "hierarchical", "center_first", "border_first")


def generation_order(name, batch, grid, generator=None, device=None):
    """The position of each turn, int64 [b, N]; random orders differ from image to image.

    name: one of ORDERS ("-" may stand for "_"); generator: a torch.Generator on `device`.
    """
    h, w = grid
    positions = torch.arange(h * w, device=device)
    row, column = positions // w, positions % w
    random = torch.rand(batch, h * w, generator=generator, device=device)
    middle = (abs(2 * row - h + 1) < h / 2) & (abs(2 * column - w + 1) < w / 2)  # h / 2 by w / 2
    walk = spiral(positions.view(h, w))

    # Every order is a sort: a key for each position, [N] or [b, N]; the smallest key goes first.
    keys = {
        "random": random,
        "raster": positions,
        "spiral_in": walk.argsort(),  # the turn of each position
        "spiral_out": -walk.argsort(),
        "z_curve": sum((2 * (row >> i & 1) + (column >> i & 1)) * 4**i for i in range(16)),
        # Four coarse images. Fig. A has 4 x 4 tokens: for more it may mean another order than this.
        "subsample": (2 * (row % 2) + column % 2) * h * w + positions,
        "alternate": row * w + torch.where(row % 2 == 0, column, w - 1 - column),  # there and back
        "hierarchical": random + ((row % 2 == 1) | (column % 2 == 1)),  # even ones first
        "center_first": random + ~middle,
        "border_first": random + middle,
    }
    name = name.replace("-", "_")
    if name not in ORDERS:
        raise UserError(f"unknown order {name!r}: choose from {', '.join(ORDERS)}")
    return keys[name].expand(batch, -1).argsort(dim=-1, stable=True)


def spiral(cells):
    """Cells [h, w] in the order of a clockwise walk from the top left inwards: [h * w]."""
    walk = []
    while cells.numel():
        walk.append(cells[0])  # along the top row
        cells = cells[1:].T.flip(0)  # rotate what is left: its right side is on top
    return torch.cat(walk)


# ------------------------------------------------------------------------------------------------
# How many at once: the step schedule
#
# Tokens of one step are drawn independently of each other, so a step may decode many only once the
# image is largely decided: few at a time in the beginning, many in the end, along a cosine.


def step_sizes(num_tokens, steps):
    """How many tokens each step decodes (Alg. B): a list of ints >= 1; -1: one token a step."""
    if steps != -1 and steps < 1:
        raise UserError(f"steps must be at least 1 (or -1 for one token a step), not {steps}")
    if steps == -1 or steps >= num_tokens:
        return [1] * num_tokens
    sizes = []
    for k in range(steps):
        share = 1 - math.cos(math.pi / 2 * (k + 1) / steps)
        target = min(num_tokens, int(share * num_tokens + 1))  # tokens after this step
        if k == 0 and steps > 1:
            target = 1  # in a blank image two have nothing to agree with (Alg. B)
        sizes.append(max(1, target - sum(sizes)))
    return sizes


def default_steps(num_tokens):
    """The paper's 88 steps for 256 tokens; in proportion (ours), 22 for 64."""
    return max(1, round(num_tokens * 88 / 256))


# ------------------------------------------------------------------------------------------------
# The decoder: a Llama. Parameter names are those of the released weights, so that these load.


class Attention(nn.Module):
    """Causal self-attention: every token reads itself and those before it in the sequence."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)  # query, key, value
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def queries_keys_values(self, x, cos_sin):
        """x [b, n, d], cos_sin [b, n, D / 2, 2] -> three times [b, heads, n, D]."""
        qkv = self.wqkv(x).unflatten(-1, (3, self.n_head, -1))  # [b, n, 3, heads, D]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [b, heads, n, D] each
        cos_sin = cos_sin[:, None]  # [b, 1, n, D / 2, 2]: the same for all heads
        # A copy of v: the view would keep all of qkv in memory until the backward pass.
        return rotate(q, cos_sin), rotate(k, cos_sin), v.contiguous()

    def forward(self, x, cos_sin, mask=None, cache=None, start_pos=0):
        """x [b, n, d] -> [b, n, d]; cache: [2, b, heads, length, D].

        mask: bool [n, end] or [b, 1, n, end], who sees whom (end = start_pos + n); None: causal.
        """
        q, k, v = self.queries_keys_values(x, cos_sin)
        if cache is not None:
            end = start_pos + x.shape[1]
            cache[:, :, :, start_pos:end] = torch.stack([k, v])  # over whatever stood there
            k, v = cache[:, :, :, :end]  # of all tokens so far: [b, heads, end, D] each
        if mask is None:
            y = causal_attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = y.transpose(1, 2).flatten(2)  # [b, n, d]
        return F.dropout(self.wo(y), self.dropout, self.training)


class FeedForward(nn.Module):
    """SwiGLU on x [b, n, d]: one projection gates the other."""

    def __init__(self, config):
        super().__init__()
        inner = math.ceil(int(8 * config.dim / 3) / 256) * 256  # 2/3 of 4 d, for 3 matrices, not 2
        self.w1 = nn.Linear(config.dim, inner, bias=False)
        self.w3 = nn.Linear(config.dim, inner, bias=False)
        self.w2 = nn.Linear(inner, config.dim, bias=False)
        self.dropout = config.dropout

    def forward(self, x):
        return F.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)), self.dropout, self.training)


class Block(nn.Module):
    """One layer, x [b, n, d] -> [b, n, d]: tokens read each other, then each works on its own."""

    def __init__(self, config):
        super().__init__()
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=1e-5)

    def forward(self, x, cos_sin, mask=None, cache=None, start_pos=0):
        x = x + self.attention(self.attention_norm(x), cos_sin, mask, cache, start_pos)
        return x + self.feed_forward(self.ffn_norm(x))


# ------------------------------------------------------------------------------------------------
# From logits to tokens: guidance and sampling
#
# Guidance compares what the model says in several *contexts*. Classifier-free guidance (CFG) moves
# the logits away from what it says without the class. Spatial contextual guidance (SCG, App. F)
# moves them away from what it says without the class and with a quarter of its image tokens zeroed.

CLASS = "all tokens, the class"
NULL = "all tokens, no class"
DROPPED = "three quarters of the tokens, no class"


@dataclass
class Guidance:
    """How strongly the contexts pull; w_scg = 1 is plain CFG, with cfg = (1, 1) no guidance.

    w_cfg rises in a straight line with the share of tokens that are known: a small hole in a known
    image is filled near its end value.
    """

    cfg: tuple = (1.0, 4.0)  # w_cfg when nothing is known, and when all is
    scg: float = 1.0  # w_scg
    power: float = None  # RAR's schedule, not a straight line: the larger, the later w_cfg rises

    def contexts(self, classes, null_class):
        """Names of the contexts to read: one, two, or the three of Eq. B; classes: int64 [b]."""
        class_given = bool((classes != null_class).any())  # the host waits for the device
        if self.scg != 1:
            return [CLASS, NULL, DROPPED] if class_given else [NULL, DROPPED]
        return [CLASS, NULL] if class_given and tuple(self.cfg) != (1, 1) else [CLASS]

    def combine(self, contexts, logits, share):
        """Logits [c * b, m, V] of c contexts -> [b, m, V].

        share: of the tokens that are known, 0 .. 1: a tensor, of one number or [b, m, 1].
        """
        if len(contexts) == 1:
            return logits
        z = dict(zip(contexts, logits.chunk(len(contexts))))
        rise = share if self.power is None else (1 - torch.cos(math.pi * share**self.power)) / 2
        w_cfg = self.cfg[0] + (self.cfg[1] - self.cfg[0]) * rise  # 1: z[CLASS]; 0: z[NULL]
        guided = z[NULL]
        if DROPPED in z:
            guided = z[DROPPED] + self.scg * (z[NULL] - z[DROPPED])  # Eq. A, of no class
        if CLASS in z:
            guided = guided + w_cfg * (z[CLASS] - z[NULL])  # Eq. B; without DROPPED, CFG
        return guided


@dataclass
class Sampling:
    """Which tokens may be drawn."""

    temperature: float = 1.0  # above 0
    top_k: int = 0  # of the k likeliest only; 0: of all
    top_p: float = 1.0  # of the fewest that have this probability together; 1: of all


def probabilities(logits, sampling=Sampling()):
    """The distributions that tokens are drawn from: logits [..., V] -> [..., V], sums 1."""
    logits = logits / sampling.temperature
    if sampling.top_k:  # the k best, and no more where several are equal
        best, tokens = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, tokens, best)
    if sampling.top_p < 1:
        ordered, tokens = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # of all likelier tokens
        ordered = ordered.masked_fill(before >= sampling.top_p, -torch.inf)
        logits = logits.scatter(-1, tokens, ordered)
    return logits.softmax(-1)


def draw_tokens(weights, generator=None):
    """One token of each row, with a chance in proportion to its weight: [..., V] -> int64 [...].

    The largest of p_i / E_i, E_i exponentially distributed, is i with probability p_i. Unlike
    torch.multinomial this never makes the host wait for the device.
    """
    noise = torch.empty_like(weights).exponential_(generator=generator)
    return (weights / noise).argmax(-1)


def sample_tokens(logits, sampling=Sampling(), generator=None):
    """Draw one token from each distribution: logits [..., V] float -> int64 [...]."""
    return draw_tokens(probabilities(logits, sampling), generator)


# ------------------------------------------------------------------------------------------------
# RandAR
#
# The sequence of one image (Eq. 3) is  [class, P_1, x_1, P_2, x_2, ..., P_N]:  P_i says where the
# token of turn i belongs, and what is predicted at P_i is the distribution of x_i. The last image
# token predicts nothing and is left out: 2 N tokens.

Step = namedtuple("Step", "positions tokens logits")  # int64 [b, m] twice, float32 [b, m, V]


class RandAR(nn.Module):
    """Tokens [b, N] and classes [b] -> logits and loss, or new images."""

    kind = "rope"  # of position instruction tokens, as files name it; rar.py has others
    predicting = slice(1, None, 2)  # the tokens of the sequence that predict one: the P
    inserts_instructions = True  # not rar.Merged: it asks for a token at the one before

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.order = "random"  # the name of the order of its training
        self.class_names = None  # or a list of C str
        self.head_dim = config.dim // config.n_head  # D
        self.null_class = config.num_classes  # "no class": last row of the class embedding
        table = nn.Embedding(config.num_classes + 1, config.dim)
        self.cls_embedding = nn.ModuleDict({"embedding_table": table})
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.pos_instruct_embeddings = nn.Parameter(torch.empty(1, config.dim))  # e of Eq. 5
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        nn.init.zeros_(self.output.weight)  # so training starts from the uniform distribution

    def position_instruction_tokens(self, cos_sin, positions):
        """P_i = RoPE(e, h_i, w_i) (Eq. 5) for cos_sin [b, n, D / 2, 2] -> [b, n, d].

        Attention rotates queries and keys as well, but never values. If every P were the same e,
        all would hand on the same value, and no layer could read from one where it is. positions,
        int64 [b, n]: for rar.Dense.
        """
        e = self.pos_instruct_embeddings.view(self.config.n_head, self.head_dim)  # [heads, D]
        return rotate(e, cos_sin[:, :, None]).flatten(2)

    def sequence(self, tokens, classes, order, angles=None):
        """[class, P_1, x_1, ..., P_n, x_n]: [b, 1 + 2 n, d], and cos_sin [b, 1 + 2 n, D / 2, 2].

        tokens: int64 [b, N] in raster order; order: int64 [b, n]; angles: [N, D / 2] or None.
        """
        if angles is None:
            angles = grid_angles(self.config.grid, self.head_dim, order.device)
        cos_sin = torch.stack([angles.cos(), angles.sin()], dim=-1)[order]  # [b, n, D / 2, 2]
        instructions = self.position_instruction_tokens(cos_sin, order)  # P: [b, n, d]
        image_tokens = self.tok_embeddings(tokens.gather(1, order))  # x, in turns: [b, n, d]
        image_tokens = F.dropout(image_tokens, self.config.token_dropout, self.training)
        pairs = torch.stack([instructions, image_tokens], dim=2).flatten(1, 2)  # P_1, x_1, ...
        class_token = self.cls_embedding.embedding_table(classes)[:, None]  # [b, 1, d]

        # x_i is rotated like its P_i. The class has no position: the released weights were trained
        # with cos = sin = 0 for it. That is no angle: its query and key are zero. So every token
        # scores it 0, which still has a weight after the softmax (15% in the toy model).
        cos_sin = cos_sin.repeat_interleave(2, dim=1)
        cos_sin = torch.cat([torch.zeros_like(cos_sin[:, :1]), cos_sin], dim=1)
        return torch.cat([class_token, pairs], dim=1), cos_sin

    def hidden_states(self, x, cos_sin, mask=None, caches=None, start_pos=0):
        """Through all layers: x [b, n, d] -> the same; caches: [layers, 2, b, heads, length, D]."""
        for i, layer in enumerate(self.layers):
            x = layer(x, cos_sin, mask, None if caches is None else caches[i], start_pos)
        return x

    def logits(self, x):
        """Hidden states [b, n, d] -> what they predict, float32 [b, n, V]."""
        return self.output(self.norm(x)).float()

    def forward(self, tokens, classes, order=None, drop_class=None):
        """Training (Alg. A): each token predicted from the class and those before it in the order.

        tokens: int64 [b, N] in raster order; classes: int64 [b], null_class for none; order: int64
        [b, N] (None: a random one for each image); drop_class: bool [b], whose class is hidden
        (None: in training a tenth, at random). Returns logits, float32 [b, N, V] *in the order
        given*, and their mean cross entropy in nats a token (Eq. 4). UserError for wrong shapes.
        """
        b, num_tokens = len(tokens), math.prod(self.config.grid)
        if order is None:
            order = generation_order("random", b, self.config.grid, device=tokens.device)
        if drop_class is None:
            probability = self.config.class_dropout if self.training else 0.0
            drop_class = torch.rand(b, device=tokens.device) < probability
        checks.check_shapes(tokens=(tokens, [b, num_tokens]), classes=(classes, [b]),
                            order=(order, [b, num_tokens]))

        classes = torch.where(drop_class, self.null_class, classes)
        x, cos_sin = self.sequence(tokens, classes, order)
        x = self.hidden_states(x[:, :-1], cos_sin[:, :-1])  # all but the last x: [b, 2 N, d]
        logits = self.logits(x[:, self.predicting])  # at the P, half of the sequence: [b, N, V]
        targets = tokens.gather(1, order)  # [b, N], in turns
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate_plainly(self, classes, order, steps, generator=None):
        """Alg. B without cache and guidance: images as tokens int64 [b, N] in raster order.

        Read this before `decode`, which without guidance draws the same tokens, many times faster
        (a test proves it).
        """
        tokens, done = torch.zeros_like(order), 0  # what is not decoded yet is never read
        for m in step_sizes(order.shape[1], steps):
            # What is known, class P_1 x_1 .. P_done x_done, and m queries, the P of the next turns
            seen = [*range(1 + 2 * done), *range(1 + 2 * done, 1 + 2 * (done + m), 2)]
            x, cos_sin = self.sequence(tokens, classes, order)  # [b, 1 + 2 N, d]
            x = self.hidden_states(x[:, seen], cos_sin[:, seen])  # [b, 1 + 2 done + m, d]
            # All m are drawn at once: none of them knows what the others will be (Eq. 6, 7).
            drawn = sample_tokens(self.logits(x[:, -m:]), generator=generator)  # [b, m]
            tokens.scatter_(1, order[:, done : done + m], drawn)
            done += m
        return tokens

    def decode(self, classes, order=None, steps=None, cfg=(1.0, 4.0), scg=1.0, temperature=1.0,
               top_k=0, top_p=1.0, generator=None, known=None, angles=None, power=None,
               queries="causal", drafts=None):
        """Decode step by step: an iterator of Step(positions, tokens, guided logits).

        classes: int64 [b], 0 .. C - 1, or null_class; order: a name of ORDERS (None: that of its
        training), or positions, int64 [b, n], of all the image or a part; steps: how many, or -1,
        one token a step (None: 88 for 256 tokens, as the paper, and -1 for rar.Merged); cfg, scg,
        power: see Guidance; temperature, top_k, top_p: see Sampling; generator: a torch.Generator
        on the model's device; known: (positions, tokens), int64 [b, k], which come first and stay
        as they are; angles: float [N, D / 2], of another grid; queries: "causal", as the paper, or
        "isolated" (in exact decoding always): no query of a step sees another one; drafts: None, or
        how many a step of exact decoding (exact.py) has, in place of `steps`. Raises UserError for
        what does not fit, before it returns; from then on the host never waits for the device (but
        in exact decoding). In training mode dropout is at work.
        """
        order = self.order if order is None else order
        if isinstance(order, str):
            grid = self.config.grid
            order = generation_order(order, len(classes), grid, generator, classes.device)
        known = (order[:, :0], order[:, :0]) if known is None else known
        guidance, sampling = Guidance(cfg, scg, power=power), Sampling(temperature, top_k, top_p)
        checks.check_decoding(self, classes, order, steps, guidance, sampling, known, angles,
                              queries, drafts)
        given = dict(contexts=guidance.contexts(classes, self.null_class), guidance=guidance,
                     sampling=sampling, generator=generator, known=known, angles=angles)
        if drafts is not None and order.shape[1] > 0:
            from exact import exact_steps  # it imports this file, so not at the top
            return exact_steps(self, classes, order, drafts, **given)
        if steps is None:
            steps = default_steps(order.shape[1]) if self.inserts_instructions else -1
        sizes = step_sizes(order.shape[1], steps)
        return self._steps(classes, order, sizes, **given, isolated=queries == "isolated")

    def classes_in(self, contexts, classes):
        """Classes, int64 [b], in each of c contexts, one after the other: [c * b]."""
        null = torch.full_like(classes, self.null_class)
        return torch.cat([classes if name == CLASS else null for name in contexts])

    def beginning(self, classes, order, contexts, generator, known, angles):
        """What decoding starts from: (positions, x, cos_sin, kept).

        The batch holds c contexts, one after the other: positions, int64 [c * b, k + n], the known
        ones first; x and cos_sin, the sequence to come, class P_1 x_1 ... P_k+n x_k+n, of whose
        image tokens the first k are filled in; kept, [c * b, k + n, 1], 0 for those that SCG drops.
        """
        # Image tokens stand at the places 2, 4, 6, ...: the known ones, then those to be drawn.
        positions = torch.cat([known[0], order], dim=1).repeat(len(contexts), 1)  # [c * b, k + n]
        num_tokens = math.prod(self.config.grid) if angles is None else len(angles)
        blank = positions.new_zeros(len(positions), num_tokens)  # unknown, unread
        classes = self.classes_in(contexts, classes)  # [c * b]
        x, cos_sin = self.sequence(blank, classes, positions, angles)  # [c * b, 1 + 2 (k + n), d]

        # The last context may drop tokens. Which ones is decided once: a token's key and value stay
        # in the cache, and another decision could not change them.
        b, k = known[0].shape
        kept = x.new_ones(*positions.shape, 1)
        if DROPPED in contexts:
            kept[-b:] = torch.rand(kept[-b:].shape, generator=generator, device=x.device).ge(0.25)
        embedded = self.tok_embeddings(known[1]).repeat(len(contexts), 1, 1)  # [c * b, k, d]
        x[:, 2 : 2 + 2 * k : 2] = embedded * kept[:, :k]
        return positions, x, cos_sin, kept

    @torch.no_grad()
    def _steps(self, classes, order, sizes, contexts, guidance, sampling, generator, known, angles,
               isolated):
        """Alg. B, its arguments checked."""
        positions, x, cos_sin, kept = self.beginning(classes, order, contexts, generator, known,
                                                     angles)
        (b, done), total, start_pos = known[0].shape, positions.shape[1], 0
        size = len(x), self.config.n_head, 2 * total, self.head_dim  # as long as in training
        caches = x.new_zeros(self.config.n_layer, 2, *size)  # [layers, 2, *size]: keys, values

        for m in sizes:
            # The input: what the cache does not hold yet of all that is known, and m queries.
            first = 1 + 2 * done  # the place of the first query's P in the sequence of training
            unread = torch.arange(start_pos, first, device=x.device)
            queries = torch.arange(first, first + 2 * m, 2, device=x.device)
            seen = torch.cat([unread, queries])
            mask = None  # all that is cached, and of the input what comes before
            if isolated:  # a query sees what is known and itself, as in training; not the paper's
                end = start_pos + len(seen)
                mask = x.new_ones(len(seen), end, dtype=torch.bool).tril(start_pos)
                mask[-m:, -m:] = torch.eye(m, dtype=torch.bool, device=x.device)  # [n, end]
            y = self.hidden_states(x[:, seen], cos_sin[:, seen], mask, caches, start_pos)
            share = torch.full((), done / total, device=x.device)
            logits = guidance.combine(contexts, self.logits(y[:, -m:]), share)  # [b, m, V]
            tokens = sample_tokens(logits, sampling, generator)  # [b, m]
            yield Step(positions[:b, done : done + m], tokens, logits)

            # The cache, after a step that decoded x_2 and x_3 with two queries:
            #
            #     class P_1 x_1 Q_2 Q_3      Q_2 saw what P_2 sees in training: it stays, as P_2.
            #                   ^^^ ^^^      Q_3 saw Q_2, but not x_2: it is overwritten.
            #
            # The next step writes x_2 P_3 x_3, from Q_3's place on, and then its own queries:
            #
            #     class P_1 x_1 P_2 x_2 P_3 x_3 Q_4 Q_5
            embedded = self.tok_embeddings(tokens).repeat(len(contexts), 1, 1)  # [c * b, m, d]
            x[:, first + 1 : first + 2 * m : 2] = embedded * kept[:, done : done + m]
            start_pos, done = first + 1, done + m

    def generate(self, classes, order=None, steps=None, cfg=(1.0, 4.0), scg=1.0, known=None,
                 angles=None, **options):
        """`decode`, with its arguments, to the end: images as tokens int64 [b, N] in raster order.

        Positions that are neither in the order nor known come out as -1.
        """
        decoding = self.decode(classes, order, steps, cfg, scg, known=known, angles=angles,
                               **options)
        num_tokens = math.prod(self.config.grid) if angles is None else len(angles)
        tokens = torch.full((len(classes), num_tokens), -1, device=classes.device)
        if known is not None:
            tokens.scatter_(1, *known)
        for step in decoding:
            tokens.scatter_(1, step.positions, step.tokens)
        return tokens


# ------------------------------------------------------------------------------------------------
# Files


def save_randar(model, path, half=False, **more):
    """Write a checkpoint for load_randar. half: weights in float16; more: optimizer, step, ..."""
    more = dict(kind=model.kind, order=model.order, class_names=model.class_names) | more
    checks.save_network(model, path, half, **more)


def load_randar(path, device="cpu"):
    """The model that a file holds, in eval mode: one of ours, or released weights of RandAR or RAR.

    Raises UserError for a file that is missing, damaged or holds something else.
    """
    import rar  # it imports this file, so not at the top

    model, content = checks.load_network(path, rar.recognise, device)
    model.class_names, model.order = content.get("class_names"), content.get("order", model.order)
    model.fingerprint = content.get("fingerprint")  # of its tokenizer; None: nobody noted it
    if model.order not in ORDERS or not all(isinstance(x, str) for x in model.class_names or []):
        raise UserError(f"{path} names an order or classes that do not exist: it is damaged")
    return model
