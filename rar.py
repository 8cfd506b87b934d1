"""RAR: raster order, learned through random orders (arXiv 2411.00776); and RandAR's ablations of its tokens.

RAR is RandAR's sibling. It, too, trains a causal decoder on shuffled tokens, and so it, too, has to say which
token comes next. But it wants random orders only as a teacher: the share of shuffled images is annealed to
zero in training, and what remains is an ordinary raster-order model that has seen every token from all sides.

    RandAR    [class, P_1, x_1, P_2, x_2, ...]               a token in between says where x_i belongs
    RAR       [cls, class + t_1, x_1 + t_2, x_2 + t_3, ...]  the token before x_i says so: half the length

Half the length is half the cost; but a token then waits for the one before it, and no two can be decoded at
once. Section and equation numbers in this file are RAR's, those of the ablations RandAR's.

    RARConfig, RAR_SIZES           what a model is made of
    randomness                     how many images are shuffled, and when (Eq. 5)
    RARAttention ... FinalLayer    the published decoder, a vision transformer
    RAR                            the sequence (Eq. 4); RAR.decode: one token a step
    merge_embeddings               after annealing, two tables of embeddings are one
    Dense, Merged                  RandAR with other position instruction tokens (RandAR's Table 2)
    save_model, load_model         files: whichever of these models they hold
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import common
from randar import (Config, KeyValueCache, RandAR, Step, check_sampling, collect, generation_order,
                    guided, load_randar, randar_of, sample, save_randar, step_sizes, streams_of)

# ------------------------------------------------------------------------------------------------------------
# What a model is made of


@dataclass
class RARConfig:
    """The shape of a RAR model. The defaults are the paper's RAR-B on ImageNet, with MaskGIT's tokens."""

    grid: tuple = (16, 16)  # (h, w): an image is N = h * w tokens
    vocab_size: int = 1024  # V: different image tokens, the codes of the tokenizer
    num_classes: int = 1000  # C
    dim: int = 768  # d: width
    n_layer: int = 24
    n_head: int = 16
    mlp: int = 3072  # width within the feed-forward layers
    dropout: float = 0.1  # of attention's weights and outputs, and within and after the feed-forward layers
    class_dropout: float = 0.1  # how often the class is hidden in training, for classifier-free guidance


RAR_SIZES = {
    "toy": dict(dim=128, n_layer=4, n_head=4, mlp=512, dropout=0.0),  # ours, to stand beside RandAR's
    "B": dict(dim=768, n_layer=24, n_head=16, mlp=3072),  # 261M
    "L": dict(dim=1024, n_layer=24, n_head=16, mlp=4096),  # 461M
    "XL": dict(dim=1280, n_layer=32, n_head=16, mlp=5120),  # 955M
    "XXL": dict(dim=1408, n_layer=40, n_head=16, mlp=6144),  # 1.5B
}
# The authors' guidance for their weights, as options of sample.py: --cfg 1 16 --power 2.75 for B, 1 15.5 and
# 2.5 for L, 1 6.9 and 1.5 for XL, 1 8 and 1.2 for XXL; for the last three --temperature 1.02.

# ------------------------------------------------------------------------------------------------------------
# Randomness annealing
#
# In raster order a token is predicted from those above and to the left of it, never from those below. In a
# random order any tokens can come first, so the model must learn how all parts of an image go together. That
# is worth learning, but harder than the task in the end, which has one order only. So RAR starts with the one
# and ends with the other.


def randomness(step, steps, start, end):
    """r of Eq. 5: the probability that an image of this training step is shuffled, a float from 1 to 0.

    start, end: shares of all steps; r falls linearly from 1 at the first to 0 at the second. The paper: 200
    and 300 of 400 epochs, which is 0.5 and 0.75; (1, 1) is always random, (0, 0) never.
    """
    share = step / steps
    if share < start:
        return 1.0
    return max(0.0, 1 - (share - start) / (end - start)) if share < end else 0.0


# ------------------------------------------------------------------------------------------------------------
# The decoder: a vision transformer. Names are those of the released weights, so that these load as they are.
#
# In place of RandAR's rotary angles, RMSNorm and SwiGLU: learned positions, LayerNorm and GELU. Queries and
# keys are normalised, too. And there is a *condition* for each token, made of the class and of the token's
# place in the sequence: it shifts, scales and gates what every layer does (adaLN, from diffusion models).


class RARAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qkv = common.Linear(config.dim, 3 * config.dim)
        self.q_norm, self.k_norm = (nn.LayerNorm(config.dim // config.n_head, eps=1e-6) for _ in range(2))
        self.proj = common.Linear(config.dim, config.dim)

    def forward(self, x, cache, place):
        """x [b, n, d] -> [b, n, d]; x comes after `place` tokens of the cache, and is then a single token."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # [b, heads, n, D]
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if cache is not None:
            k, v = cache.write(place, k, v)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=place == 0)
        return F.dropout(self.proj(y.transpose(1, 2).flatten(2)), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1, self.fc2 = common.Linear(config.dim, config.mlp), common.Linear(config.mlp, config.dim)
        self.dropout = config.dropout

    def forward(self, x):
        x = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(x), self.dropout, self.training)


def modulation(dim, chunks):
    """From the condition, d channels, to `chunks` times d: zeros at first, so that a layer does nothing."""
    linear = common.Linear(dim, chunks * dim)
    nn.init.zeros_(linear.weight), nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


class RARBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(config.dim, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = RARAttention(config), MLP(config)
        self.adaLN_modulation = modulation(config.dim, 6)

    def forward(self, x, condition, cache=None, place=0):
        """x, condition [b, n, d] -> [b, n, d]; x comes after `place` tokens of the cache."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, cache, place)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.adaLN_modulation = modulation(config.dim, 2)

    def forward(self, x, condition):
        scale, shift = self.adaLN_modulation(condition).chunk(2, dim=-1)  # not in the blocks' order
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


# ------------------------------------------------------------------------------------------------------------
# RAR
#
# Why t is needed (Fig. 3). Take two orders that differ in the last two places only. Up to there both have
# given the decoder the same tokens at the same positions: equal input, so an equal prediction. But in one
# order the next token is the upper one, say, and in the other the lower one: no prediction is right for both.
# So each token carries, besides the embedding of its own position, a *target-aware* embedding of the next
# one's (Eq. 4). The sequence starts with a learned token, cls, and the class.


class RAR(nn.Module):
    order = "raster"  # for released weights; our own files say their order
    predicting = slice(1, None)  # every place but the first: the class predicts x_1, x_1 predicts x_2, ...
    forward, loss, check_context = RandAR.forward, RandAR.loss, RandAR.check_context  # Algorithm 1 is these

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.head_dim = config.dim // config.n_head  # D
        self.null_class = config.num_classes
        self.checkpoint_activations = False  # in training: compute twice, keep less in memory
        number = math.prod(config.grid)  # N; the tables are as long as the released ones, not all is used
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.embeddings = nn.Embedding(config.vocab_size + 1 + config.num_classes + 1, config.dim)
        self.pos_embed = nn.Parameter(torch.empty(1, number + 1024, config.dim))
        self.target_aware_pos_embed = nn.Parameter(torch.empty(1, number + 1024, config.dim))
        self.timesteps_embeddings = nn.Parameter(torch.empty(1, number + 100, config.dim))
        self.blocks = nn.ModuleList(RARBlock(config) for _ in range(config.n_layer))
        self.adaln_before_head = FinalLayer(config)
        self.norm = nn.Identity()  # what RandAR has before its head; here the final layer has done it
        self.lm_head = common.Linear(config.dim, config.vocab_size)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 and name != "cls_token" and "adaLN" not in name:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    layers = property(lambda self: self.blocks)  # as RandAR, whose code this class borrows, calls them
    output = property(lambda self: self.lm_head)

    def embed(self, tokens):
        """Image tokens [b, n] -> [b, n, d]."""
        return self.embeddings(tokens)

    def places(self, classes, order):
        """All that is known of [cls, class, x_1, .., x_n] before its tokens are: without their embeddings.

        classes: [b]; order: [b, n]. Returns it and the condition of each place, [b, 2 + n, d] both.
        """
        # Rows of `embeddings`: V image tokens, a mask token that nothing uses, C classes, the null class.
        class_embedding = self.embeddings(self.config.vocab_size + 1 + classes)[:, None]  # [b, 1, d]
        prefix = torch.cat([self.cls_token.expand_as(class_embedding), class_embedding], dim=1)  # [b, 2, d]
        of_prefix = self.pos_embed[:, :2].expand(len(order), -1, -1)  # the two rows before those of positions
        own = torch.cat([of_prefix, self.pos_embed[0, 2 + order]], dim=1)  # [b, 2 + n, d]
        next_one = self.target_aware_pos_embed[0, 2 + order]  # t_1 for the class, ..., t_n for x_n-1
        x = own + F.pad(next_one, (0, 0, 1, 1)) + F.pad(prefix, (0, 0, 0, order.shape[1]))
        return x, class_embedding + self.timesteps_embeddings[:, : x.shape[1]]

    def sequence(self, tokens, classes, order):
        """[cls, class + t_1, x_1 + t_2, ..., x_N] of raster tokens [b, N], and the condition."""
        x, condition = self.places(classes, order)  # [b, 2 + N, d]
        embedded = self.embed(tokens.gather(1, order))  # x_1 .. x_N: [b, N, d]
        return x + F.pad(embedded, (0, 0, x.shape[1] - order.shape[1], 0)), condition

    def hidden_states(self, x, condition, caches=None, place=0):
        """Through all layers: x, condition [b, n, d] -> [b, n, d], as the head takes it."""
        return self.adaln_before_head(RandAR.hidden_states(self, x, condition, caches, place), condition)

    @torch.no_grad()
    def decode(self, classes, order, steps=-1, cfg=(1.0, 4.0), scg=1.0, temperature=1.0, top_k=0, top_p=1.0,
               generator=None, known=None, power=None):
        """The decoding loop: an iterator of Step(positions [b, 1], tokens [b, 1], logits [b, 1, V]).

        Arguments and errors are those of RandAR.decode, except:
        steps: one token a step is all that this model can, -1 or at least n; else a ValueError.
        scg: 1, none; else a ValueError.
        power: P >= 0 of RAR's guidance schedule, which rises from the first to the second value of cfg along
            a cosine, (1 - cos(pi share^P)) / 2: late and steeply, if P is large. None: linear, as in RandAR.
        """
        if step_sizes(order.shape[-1], steps) != [1] * order.shape[-1]:
            raise ValueError(f"this model decodes one token a step: steps must be -1, not {steps}")
        if scg != 1:
            raise ValueError(f"this model has no spatial contextual guidance: scg must be 1, not {scg}")
        if power is not None and not 0 <= power < math.inf:
            raise ValueError(f"power must be 0 (constant guidance) or more, not {power}")
        check_sampling(cfg, temperature, top_k, top_p, scg)
        known_positions, known_tokens = (order[..., :0],) * 2 if known is None else known
        self.check_context(classes, order, known_positions, known_tokens, None)

        streams = streams_of(cfg, scg, class_given=bool((classes != self.null_class).any()))
        null = torch.full_like(classes, self.null_class)
        stream_classes = torch.cat([classes if stream.with_class else null for stream in streams])
        k, n = known_positions.shape[1], order.shape[1]
        positions = torch.cat([known_positions, order], dim=1).repeat(len(streams), 1)
        x, context = self.places(stream_classes, positions)  # [streams * b, prefix + k + n, d]
        caches = [KeyValueCache(len(x), self.config.n_head, x.shape[1], self.head_dim, x.dtype, x.device)
                  for _ in self.layers]
        ready = x.shape[1] - n  # the prefix and the known tokens
        x[:, ready - k : ready] += self.embed(known_tokens).repeat(len(streams), 1, 1)

        @torch.no_grad()
        def loop():
            place = 0  # what the cache does not hold yet starts here, and ends where the next token belongs
            for i in range(n):
                end = ready + i
                hidden = self.hidden_states(x[:, place:end], context[:, place:end], caches, place)
                logits = self.output(self.norm(hidden[:, -1:])).float()  # [streams * b, 1, V]
                share = (k + i) / (k + n)
                rise = share if power is None else (1 - math.cos(math.pi * share**power)) / 2
                weight = cfg[0] + (cfg[1] - cfg[0]) * rise
                logits = guided(streams, logits.chunk(len(streams)), weight, scg)  # [b, 1, V]
                tokens = sample(logits, temperature, top_k, top_p, generator)  # [b, 1]
                yield Step(order[:, i : i + 1], tokens, logits)
                x[:, end : end + 1] += self.embed(tokens).repeat(len(streams), 1, 1)
                place = end

        return loop()

    def generate(self, classes, order=None, **options):
        """Run `decode` to its end, with its options: images as tokens [b, N] int64 in raster order.

        order: a name of randar.ORDERS, or positions int64 [b, n]; None: that of the model. Positions that are
        neither in it nor known come out as -1.
        """
        if order is None or isinstance(order, str):
            order = generation_order(order or self.order, len(classes), self.config.grid,
                                     options.get("generator"), classes.device)
        tokens = torch.full((len(order), math.prod(self.config.grid)), -1, device=order.device)
        return collect(self.decode(classes, order, **options), tokens, options.get("known"))


@torch.no_grad()
def merge_embeddings(model):
    """Add the target-aware embeddings of a RAR to its positional ones, in place, for raster order only.

    In raster order the successor of a position is always the same, and so is the sum of the two embeddings:
    one table is enough, and not a single logit changes. The model is then of no use in any other order.
    """
    number = math.prod(model.config.grid)
    model.pos_embed[:, 1 : 1 + number] += model.target_aware_pos_embed[:, 2 : 2 + number]
    model.target_aware_pos_embed.zero_()


# ------------------------------------------------------------------------------------------------------------
# Other position instruction tokens for RandAR (its Table 2)
#
# RandAR rotates one learned vector by the position's angles, so that positions share what there is to learn.
# Its paper compares two other ways: a learned vector for each position, and these vectors not as tokens of
# their own, but added to the token before, as RAR does. Decoder and training are RandAR's.


class Dense(RandAR):
    """*Dense*: a learned vector for each position, instead of one that is rotated."""

    def __init__(self, config):
        super().__init__(config)
        self.pos_instruct_embeddings = nn.Parameter(0.02 * torch.randn(math.prod(config.grid), config.dim))

    def position_instruction_tokens(self, rotation, positions):
        return self.pos_instruct_embeddings[positions]  # [b, n, d]


class Merged(Dense):
    """*Dense & merge*: [class + P_1, x_1 + P_2, x_2 + P_3, ...], RAR's sequence for RandAR's decoder."""

    predicting = slice(0, None)  # every place
    sequence, decode, generate = RAR.sequence, RAR.decode, RAR.generate

    def embed(self, tokens):
        return F.dropout(self.tok_embeddings(tokens), self.config.dropout, self.training)

    def places(self, classes, order):
        """As in RAR: [class, x_1, .., x_n] without the tokens, [b, 1 + n, d], and its rotation."""
        class_embedding = self.cls_embedding.embedding_table(classes)[:, None]  # [b, 1, d]
        next_one = self.pos_instruct_embeddings[order]  # P_1 for the class, ..., P_n for x_n-1
        x = F.pad(next_one, (0, 0, 0, 1)) + F.pad(class_embedding, (0, 0, 0, order.shape[1]))
        return x, self.sequence_rotation(order)[:, ::2]  # a token turns by its own position


ONE_BY_ONE = (RAR, Merged)  # these decode one token a step

# ------------------------------------------------------------------------------------------------------------
# Files

KINDS = {"rope": RandAR, "dense": Dense, "merge": Merged, "rar": RAR}  # as checkpoints name them


def save_model(model, path, half=False, **more):
    """Write a checkpoint of any of these models for load_model. half, more: as for randar.save_randar."""
    kind = {model_class: kind for kind, model_class in KINDS.items()}[type(model)]
    save_randar(model, path, half, kind=kind, **more)


def load_model(path, device="cpu"):
    """The RandAR, Dense, Merged or RAR that a file holds: one of ours, or released weights of RandAR or RAR.

    Otherwise as randar.load_randar, errors included.
    """
    return load_randar(path, device, model_of)


def model_of(content, state):
    """The model of a file's content and state dict. Released weights of RAR: read off the shapes."""
    if "config" in content:
        kind = content.get("kind", "rope")
        return KINDS[kind]((RARConfig if kind == "rar" else Config)(**content["config"]))
    if "timesteps_embeddings" not in state:
        return randar_of(content, state)
    side = math.isqrt(state["pos_embed"].shape[1] - 1024)
    vocab_size, dim = state["lm_head.weight"].shape
    classes = len(state["embeddings.weight"]) - vocab_size - 2
    n_layer = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    n_head = dim // len(state["blocks.0.attn.q_norm.weight"])
    mlp = len(state["blocks.0.mlp.fc1.bias"])
    return RAR(RARConfig((side, side), vocab_size, classes, dim, n_layer, n_head, mlp))
