"""RAR: raster order, learned through random orders (arXiv 2411.00776); and RandAR's ablations.

RAR is RandAR's sister. It, too, trains a causal decoder on shuffled tokens, so it, too, has to say
which token comes next. But it wants random orders as a teacher only: the share of shuffled images
is annealed to zero, and what remains is a raster-order model that has seen every token from all
sides. From RandAR to RAR it is two small steps and another decoder:

    RandAR, Dense   [class, P_1, x_1, P_2, x_2, ...]          P_i, inserted, says where x_i belongs
    Merged          [class + P_1, x_1 + P_2, x_2 + P_3, ..]   the token before says so: half as long
    RAR             [cls, class + P_1, x_1 + P_2, ...]        the same, in a vision transformer

Half the length is about half the cost. But it is the token before that is asked what comes next,
so several questions at once have no tokens of their own: these models decode one token a step, if
nobody says otherwise. In parallel the last token is asked again and again, which no training has
shown it. RandAR's paper found that much worse (Sec. 4.2); in the toy world it is not
(docs/miniature.md). Dense and Merged are of its Table 2; all other sections, tables and equations
in this file are of RAR's first arXiv version.

    randomness            how many images are shuffled, and when (Sec. 3.2)
    Dense, Merged         RandAR with other position instruction tokens
    RARConfig ... RAR     RAR's decoder and its sequence (Eq. 4)
    merge_embeddings      after annealing, two tables of embeddings are one
    KINDS, recognise      which of these models a file holds
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from randar import Config, RandAR, Step, sample_tokens
from support import checks
from support.border import UserError
from support.speed import causal_attention

# ------------------------------------------------------------------------------------------------
# Randomness annealing
#
# In raster order a token is predicted from those above and to the left of it only. In a random
# order any tokens can come first, so the model must learn how all parts of an image go together.
# That is worth learning, but harder than the task in the end, which has one order. So RAR starts
# with the one and ends with the other.


def randomness(step, steps, start, end):
    """r, the probability that an image of this training step is shuffled: a float from 1 to 0.

    start, end: shares of all steps; r is 1 up to start, falls linearly, and is 0 from end on. The
    paper: 200 and 300 of 400 epochs, 0.5 and 0.75. (1, 1) is always random, (0, 0) never.
    """
    share = step / steps
    if share < start:
        return 1.0
    if share >= end:
        return 0.0
    return 1 - (share - start) / (end - start)


# ------------------------------------------------------------------------------------------------
# Other position instruction tokens for RandAR (its Table 2)
#
# RandAR rotates one learned vector by the position's angles, so that positions share what there is
# to learn. Its paper compares two other ways; decoder and training are RandAR's.


class Dense(RandAR):
    """*Dense*: a learned vector for each position, instead of one that is rotated."""

    kind = "dense"

    def __init__(self, config):
        super().__init__(config)
        num_tokens = math.prod(config.grid)
        self.pos_instruct_embeddings = nn.Parameter(0.02 * torch.randn(num_tokens, config.dim))

    def position_instruction_tokens(self, cos_sin, positions):
        return self.pos_instruct_embeddings[positions]  # [b, n, d]


class Merged(Dense):
    """*Dense & merge*: the next position's vector is added to the token before, not inserted."""

    kind = "merge"
    predicting = slice(0, None)  # every token: the class predicts x_1, x_1 predicts x_2, ...
    inserts_instructions = False

    def sequence(self, tokens, classes, order, angles=None):
        """[class + P_1, x_1 + P_2, ..., x_n], [b, 1 + n, d], and cos_sin; all else as RandAR's."""
        x, cos_sin = super().sequence(tokens, classes, order, angles)  # [class, P_1, x_1, ...]
        own, next_one = x[:, ::2], x[:, 1::2]  # class, x_1, ..., x_n; P_1, ..., P_n
        next_one = F.pad(next_one, (0, 0, 0, 1))  # x_n asks for none: zeros
        return own + next_one, cos_sin[:, ::2]  # rotated by its own position

    @torch.no_grad()
    def _steps(self, classes, order, sizes, contexts, guidance, sampling, generator, known, angles,
               isolated):
        """RandAR's loop. The queries of a step are the last known token, each with another P."""
        classes = self.classes_in(contexts, classes)  # [c * b]
        known_positions, tokens = (x.repeat(len(contexts), 1) for x in known)  # [c * b, k]
        order = order.repeat(len(contexts), 1)  # [c * b, n]
        positions = torch.cat([known_positions, order], dim=1)  # [c * b, k + n]
        blank = order.new_zeros(len(order), math.prod(self.config.grid))  # unknown, unread
        tokens = blank.scatter(1, known_positions, tokens)  # [c * b, N], raster order

        caches, start_pos, done, total = None, 0, known[0].shape[1], positions.shape[1]
        for m in sizes:
            # To embed all of the sequence anew is simple, and costs little beside the layers.
            x, where = self.sequence(tokens, classes, positions)  # [c * b, 1 (RAR: 2) + total, ...]
            if caches is None:
                heads = self.config.n_head, x.shape[1], self.head_dim
                caches = x.new_zeros(self.config.n_layer, 2, len(x), *heads)

            # The input: what the cache does not hold yet of all that is known, and m - 1 copies of
            # the last of it. The first query is as in training and stays; copies are overwritten.
            last = x.shape[1] - total + done - 1  # its place; the class's, if nothing is known
            seen = torch.arange(start_pos, last + m, device=x.device).clamp(max=last)
            x, where = x[:, seen], where[:, seen]
            asked = self.position_instruction_tokens(None, positions[:, done : done + m])
            x[:, -m:] += asked - asked[:, :1]  # [c * b, m, d]; they all ask for the first already
            y = self.hidden_states(x, where, caches=caches, start_pos=start_pos)

            share = torch.full((), done / total, device=x.device)
            logits = guidance.combine(contexts, self.logits(y[:, -m:]), share)  # [b, m, V]
            drawn = sample_tokens(logits, sampling, generator)  # [b, m]
            yield Step(positions[: len(drawn), done : done + m], drawn, logits)
            tokens.scatter_(1, positions[:, done : done + m], drawn.repeat(len(contexts), 1))
            start_pos, done = last + 1, done + m


# ------------------------------------------------------------------------------------------------
# RAR's decoder: a vision transformer. Names are those of the released weights, so that these load.
#
# In place of RandAR's rotary angles, RMSNorm and SwiGLU: learned positions, LayerNorm and GELU.
# Queries and keys are normalised, too. And there is a *condition* for each token, made of the class
# and of the token's place in the sequence, which shifts, scales and gates what every layer does
# (adaLN, from diffusion models). The paper's ablations, its Tables 2 and 3, go without it.


@dataclass
class RARConfig(Config):
    """As Config, and the width of feed-forward layers. The defaults are RAR-B, MaskGIT's tokens."""

    vocab_size: int = 1024
    dim: int = 768
    dropout: float = 0.1  # of attention's weights and outputs, within and after feed-forward layers
    mlp: int = 3072


RAR_SIZES = {
    "tiny": dict(dim=64, n_layer=4, n_head=2, mlp=256, dropout=0.0),  # ours, 0.5M
    "toy": dict(dim=128, n_layer=4, n_head=4, mlp=512, dropout=0.0),  # ours, 1.7M
    "S": dict(dim=768, n_layer=12, n_head=16, mlp=3072),  # 133M; that it has 16 heads is a guess
    "B": dict(dim=768, n_layer=24, n_head=16, mlp=3072),  # 261M
    "L": dict(dim=1024, n_layer=24, n_head=16, mlp=4096),  # 461M
    "XL": dict(dim=1280, n_layer=32, n_head=16, mlp=5120),  # 955M
    "XXL": dict(dim=1408, n_layer=40, n_head=16, mlp=6144),  # 1.5B
}
# The authors' guidance for their weights: support/released.py.


class RARAttention(nn.Module):
    """Causal self-attention with normalised queries and keys; arguments as randar.Attention's."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.q_norm = nn.LayerNorm(config.dim // config.n_head, eps=1e-6)
        self.k_norm = nn.LayerNorm(config.dim // config.n_head, eps=1e-6)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x, cache=None, start_pos=0):
        qkv = self.qkv(x).unflatten(-1, (3, self.n_head, -1))  # [b, n, 3, heads, D]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [b, heads, n, D] each
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if cache is not None:
            end = start_pos + x.shape[1]
            cache[:, :, :, start_pos:end] = torch.stack([k, v])
            k, v = cache[:, :, :, :end]  # of all tokens so far: [b, heads, end, D] each

        y = causal_attention(q, k, v, self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).flatten(2)  # [b, n, d]
        return F.dropout(self.proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """The feed-forward layer, on x [b, n, d]."""

    def __init__(self, config):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(config.dim, config.mlp), nn.Linear(config.mlp, config.dim)
        self.dropout = config.dropout

    def forward(self, x):
        x = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(x), self.dropout, self.training)


def modulation(dim, chunks):
    """From the condition, d channels, to `chunks` times d: zeros at first, so layers do nothing."""
    linear = nn.Linear(dim, chunks * dim)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


class RARBlock(nn.Module):
    """One layer: x, condition [b, n, d] -> [b, n, d]; all else as randar.Block."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn, self.mlp = RARAttention(config), MLP(config)
        self.adaLN_modulation = modulation(config.dim, 6)

    def forward(self, x, condition, cache=None, start_pos=0):
        modulated = self.adaLN_modulation(condition).chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulated  # [b, n, d] each
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, cache, start_pos)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    """The norm before the head, under the condition as well."""

    def __init__(self, config):
        super().__init__()
        self.adaLN_modulation = modulation(config.dim, 2)

    def forward(self, x, condition):
        scale, shift = self.adaLN_modulation(condition).chunk(2, dim=-1)  # not in the blocks' order
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


# ------------------------------------------------------------------------------------------------
# RAR
#
# Why P is needed (Fig. 3). Take two orders that differ in the last two turns only. Up to there both
# have given the decoder the same tokens at the same positions: equal input, an equal prediction.
# But in one order the next token is the upper one, say, in the other the lower one: no prediction
# is right for both. So each token carries, besides the embedding of its own position, the
# *target-aware* one of the next (Eq. 4). First come a learned token, cls, and the class.


class RAR(Merged):
    """RAR: its decoder and sequence; training and decoding are those of the classes above.

    config: RARConfig. All else as RandAR.
    """

    kind = "rar"
    predicting = slice(1, None)  # every token but cls: the class predicts x_1, ...
    layers = property(lambda self: self.blocks)  # RandAR's names for what follows
    output = property(lambda self: self.lm_head)

    def __init__(self, config):
        nn.Module.__init__(self)  # nothing of RandAR's network is in this one
        self.config, self.order, self.class_names = config, "raster", None
        self.head_dim = config.dim // config.n_head  # D
        self.null_class = config.num_classes
        num_tokens = math.prod(config.grid)  # tables are longer, as in the released weights
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.embeddings = nn.Embedding(config.vocab_size + 1 + config.num_classes + 1, config.dim)
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens + 1024, config.dim))
        self.target_aware_pos_embed = nn.Parameter(torch.empty(1, num_tokens + 1024, config.dim))
        self.timesteps_embeddings = nn.Parameter(torch.empty(1, num_tokens + 100, config.dim))
        self.blocks = nn.ModuleList(RARBlock(config) for _ in range(config.n_layer))
        self.adaln_before_head = FinalLayer(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 and name != "cls_token" and "adaLN" not in name:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def sequence(self, tokens, classes, order, angles=None):
        """[cls, class + P_1, x_1 + P_2, ..., x_n] of raster tokens [b, N], and the condition.

        Both [b, 2 + n, d]. P_i is the target-aware embedding of the position of turn i.
        """
        # Rows of `embeddings`: V image tokens, a mask token that nothing uses, C classes, no class.
        class_token = self.embeddings(self.config.vocab_size + 1 + classes)[:, None]  # [b, 1, d]
        image_tokens = self.embeddings(tokens.gather(1, order))  # x, in turns: [b, n, d]
        x = torch.cat([self.cls_token.expand_as(class_token), class_token, image_tokens], dim=1)

        # Rows 0 and 1 of the tables of positions are those of cls and the class.
        first_two = self.pos_embed[:, :2].expand(len(x), -1, -1)
        own = torch.cat([first_two, self.pos_embed[0, 2 + order]], dim=1)  # [b, 2 + n, d]
        next_one = self.position_instruction_tokens(None, order)  # P: [b, n, d]
        condition = class_token + self.timesteps_embeddings[:, : x.shape[1]]
        next_one = F.pad(next_one, (0, 0, 1, 1))  # cls and x_n ask for none: zeros
        return own + next_one + x, condition

    def position_instruction_tokens(self, cos_sin, positions):
        return self.target_aware_pos_embed[0, 2 + positions]  # [b, n, d]

    def hidden_states(self, x, condition, caches=None, start_pos=0):
        """Through all layers: x, condition [b, n, d] -> [b, n, d], as the head takes it."""
        for i, block in enumerate(self.blocks):
            x = block(x, condition, None if caches is None else caches[i], start_pos)
        return self.adaln_before_head(x, condition)

    def logits(self, x):
        return self.lm_head(x).float()  # [b, n, V]


@torch.no_grad()
def merge_embeddings(model):
    """Add the target-aware embeddings of a RAR to its positional ones, in place.

    In raster order the successor of a position is always the same, and so is the sum of the two:
    one table is enough, and not a single logit changes. In other orders the model is useless then.
    """
    num_tokens = math.prod(model.config.grid)
    model.pos_embed[:, 1 : 1 + num_tokens] += model.target_aware_pos_embed[:, 2 : 2 + num_tokens]
    model.target_aware_pos_embed.zero_()


# ------------------------------------------------------------------------------------------------
# Files: randar.load_randar asks which of these models one holds

KINDS = {"rope": (RandAR, Config), "dense": (Dense, Config), "merge": (Merged, Config),
         "rar": (RAR, RARConfig)}  # as checkpoints name them


def recognise(content, path):
    """(class, config) of the model in a file's content: a checkpoint's, or released ones by shapes.

    Raises UserError, with the path, for anything else.
    """
    state, kind = content.get("model", content), content.get("kind", "rope")
    released = {"pos_instruct_embeddings", "timesteps_embeddings"} & state.keys()
    if "kind" not in content and not released:
        raise UserError(f"{path} holds no weights of RandAR or RAR: give a file of train.py, or "
                        "released weights")

    if "config" in content:  # one of ours; the first ones, all RandAR, do not say their kind
        if kind not in KINDS:
            raise UserError(f"{path} holds a model of kind {kind!r}: add it to KINDS in rar.py")
        model_class, config_class = KINDS[kind]
        return model_class, checks.config_of(config_class, content["config"], path)

    if "pos_instruct_embeddings" in state:  # RandAR; heads have 64 channels
        vocab_size, dim = state["tok_embeddings.weight"].shape
        num_classes = len(state["cls_embedding.embedding_table.weight"]) - 1
        n_layer = len([name for name in state if name.endswith(".attention.wo.weight")])
        return RandAR, Config((16, 16), vocab_size, num_classes, dim, n_layer, n_head=dim // 64)

    side = math.isqrt(state["pos_embed"].shape[1] - 1024)
    vocab_size, dim = state["lm_head.weight"].shape
    num_classes = len(state["embeddings.weight"]) - vocab_size - 2
    n_layer = len([name for name in state if name.endswith(".attn.proj.weight")])
    n_head = dim // len(state["blocks.0.attn.q_norm.weight"])
    mlp = len(state["blocks.0.mlp.fc1.bias"])
    return RAR, RARConfig((side, side), vocab_size, num_classes, dim, n_layer, n_head, mlp=mlp)
