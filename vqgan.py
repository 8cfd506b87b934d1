"""Images <-> tokens: the networks. RandAR does not draw pixels: it writes a sequence of *tokens*, and this
file turns those into pictures.

A VQGAN (arXiv 2012.09841, in LlamaGen's form, arXiv 2406.06525) squeezes an image into a small grid of
vectors, replaces each vector by the nearest of a fixed list of *codes*, and paints the image back from the
codes. The number of the code is the token.

    TokenizerConfig     the settings: small ones for the toy world, and those of two released tokenizers
    Encoder, Decoder, Codebook, Tokenizer
    MaskGITTokenizer    what differs in MaskGIT's (arXiv 2202.04200)
    load_tokenizer      a file -> Tokenizer: ours, LlamaGen's or MaskGIT's, told apart by their contents
"""

import math
import re
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

import common


@dataclass
class TokenizerConfig:
    """The shape of a tokenizer. The defaults are the toy world's: 32 x 32 pixels -> 8 x 8 tokens."""

    channels: int = 24  # of the first convolution
    multipliers: tuple = (1, 2, 4)  # of the channels, level by level; between two levels the image is halved
    residual_blocks: int = 1  # in a level of the encoder; the decoder, whose task is harder, has one more
    latent_channels: int = 128  # between encoder and codebook
    codes: int = 512  # how many different tokens there are
    code_dim: int = 8  # few: nearest neighbours in a low dimension leave no code unused
    attention: bool = False  # at the lowest resolution
    image_size: int = 32  # pixels, of the images it was made for; any multiple of `downsampling` works

    @property
    def downsampling(self):
        """Pixels per token, along each axis."""
        return 2 ** (len(self.multipliers) - 1)


LLAMAGEN_VQ16 = TokenizerConfig(128, (1, 1, 2, 2, 4), 2, 256, 16384, 8, attention=True, image_size=256)
MASKGIT_VQ16 = TokenizerConfig(128, (1, 1, 2, 2, 4), 2, 256, 1024, 256, image_size=256)


# ------------------------------------------------------------------------------------------------------------
# The bricks. Parameter names are LlamaGen's, so that its released weights load as they are.


def group_norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)  # 32 groups from 128 channels on


class ResidualBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))); a 1 x 1 convolution on x where its channels change."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = group_norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def branch(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(y)))

    def forward(self, x):  # [b, c_in, h, w] -> [b, c_out, h, w]
        return self.branch(x) + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class SpatialAttention(nn.Module):
    """Every place looks at every other, one head over h * w places: distant parts can agree on a colour."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):  # [b, c, h, w]
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).mT[:, None] for f in (self.q, self.k, self.v))  # [b, 1, h * w, c] each
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.reshape(x.shape)
        return x + self.proj_out(y)


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):  # [b, c, h, w] -> [b, c, h / 2, w / 2]
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # asymmetric, as the released weights were trained


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):  # [b, c, h, w] -> [b, c, 2 h, 2 w]
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, and the step to the next."""

    def __init__(self, channels_in, channels_out, blocks, attention, resample=None):
        super().__init__()
        sizes = [channels_in] + [channels_out] * blocks
        self.res = nn.ModuleList(ResidualBlock(i, o) for i, o in zip(sizes, sizes[1:]))
        self.attn = nn.ModuleList(SpatialAttention(channels_out) for _ in range(blocks if attention else 0))
        if resample is Downsample:
            self.downsample = Downsample(channels_out)
        elif resample is Upsample:
            self.upsample = Upsample(channels_out)

    def forward(self, x):
        for i, block in enumerate(self.res):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        for resample in ("downsample", "upsample"):
            x = getattr(self, resample)(x) if hasattr(self, resample) else x
        return x


def middle_blocks(channels, attention):
    """The blocks at the lowest resolution, between the levels and the codes."""
    between = [SpatialAttention(channels)] if attention else []
    return nn.Sequential(ResidualBlock(channels, channels), *between, ResidualBlock(channels, channels))


class Encoder(nn.Module):
    """Image [b, 3, H, W] -> latent vectors [b, latent_channels, H / f, W / f], f = config.downsampling."""

    def __init__(self, config):
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.conv_blocks = nn.Sequential()
        before = config.channels
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            attention = config.attention and last
            resample = None if last else Downsample
            self.conv_blocks.append(Level(before, width, config.residual_blocks, attention, resample))
            before = width
        self.mid = middle_blocks(before, config.attention)
        self.norm_out = group_norm(before)
        self.conv_out = nn.Conv2d(before, config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.mid(self.conv_blocks(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """The encoder's mirror: latent vectors [b, latent_channels, h, w] -> image [b, 3, h * f, w * f]."""

    def __init__(self, config):
        super().__init__()
        widths = [config.channels * m for m in reversed(config.multipliers)]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = middle_blocks(widths[0], config.attention)
        self.conv_blocks = nn.Sequential()
        before = widths[0]
        for i, width in enumerate(widths):
            attention = config.attention and i == 0
            resample = None if i == len(widths) - 1 else Upsample
            self.conv_blocks.append(Level(before, width, config.residual_blocks + 1, attention, resample))
            before = width
        self.norm_out = group_norm(before)
        self.conv_out = nn.Conv2d(before, 3, 3, padding=1)

    def forward(self, z):
        x = self.conv_blocks(self.mid(self.conv_in(z)))
        return self.conv_out(F.silu(self.norm_out(x)))


# ------------------------------------------------------------------------------------------------------------
# The codebook: the one discrete step, and how gradients get past it


def full_precision(z):
    """Autocast off on the device of z: the eight bits of bfloat16 confuse neighbours."""
    return torch.autocast(z.device.type, enabled=False)


class Codebook(nn.Module):
    """A list of unit vectors; a vector's token is the number of the one that points most nearly its way."""

    def __init__(self, codes, code_dim):
        super().__init__()
        self.embedding = nn.Embedding(codes, code_dim)
        nn.init.normal_(self.embedding.weight)

    def vectors(self, tokens):
        """Tokens [...] -> unit vectors [..., code_dim]."""
        return F.normalize(self.embedding(tokens), dim=-1)

    def nearest(self, z):
        """Vectors [..., code_dim] -> tokens [...]: of unit vectors, the nearest has the largest product."""
        codes = F.normalize(self.embedding.weight.float(), dim=-1)
        with full_precision(z):
            return (F.normalize(z.float(), dim=-1) @ codes.T).argmax(-1)

    def forward(self, z):
        """z [b, h, w, code_dim] -> (nearest codes, tokens [b, h, w], codebook loss, commitment loss)."""
        tokens = self.nearest(z)
        z, codes = F.normalize(z, dim=-1), self.vectors(tokens)
        codebook_loss = (codes - z.detach()).square().mean()  # moves codes to the vectors they stand for
        commitment_loss = (codes.detach() - z).square().mean()  # keeps the encoder near the codes it chose
        # Straight through: forwards it is the code, backwards it is as if nothing had been rounded.
        return z + (codes - z).detach(), tokens, codebook_loss, commitment_loss


class Tokenizer(nn.Module):
    """Encoder, codebook and decoder."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.codes, config.code_dim)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, 1)

    def latents(self, images):
        """[b, 3, H, W] -> what the codebook is to round, [b, h, w, code_dim]."""
        return self.quant_conv(self.encoder(images)).permute(0, 2, 3, 1)

    def paint(self, codes):
        """Code vectors [b, h, w, code_dim] -> [b, 3, H, W]."""
        return self.decoder(self.post_quant_conv(codes.permute(0, 3, 1, 2)))

    def forward(self, images):
        """Training: (reconstruction [b, 3, H, W], tokens [b, h, w], codebook loss, commitment loss)."""
        codes, tokens, codebook_loss, commitment_loss = self.quantize(self.latents(images))
        return self.paint(codes), tokens, codebook_loss, commitment_loss

    @torch.no_grad()
    def encode(self, images):
        """Images [b, 3, H, W], float in [-1, 1] -> tokens [b, N] int64 in raster order, N = H/f * W/f.

        Raises ValueError where a side is not a multiple of f = config.downsampling.
        """
        f = self.config.downsampling
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % f or images.shape[3] % f:
            raise ValueError(f"expected images [b, 3, H, W] with H and W multiples of {f}, got "
                             f"{list(images.shape)}: crop or resize them")
        return self.quantize.nearest(self.latents(images)).flatten(1)

    @torch.no_grad()
    def decode(self, tokens, grid=None):
        """Tokens [b, N] in raster order -> images [b, 3, H, W] in [-1, 1].

        grid: (h, w) where it is not square. Raises ValueError where N does not fill the grid.
        """
        h, w = grid or (math.isqrt(tokens.shape[1]),) * 2
        if h * w != tokens.shape[1]:
            raise ValueError(f"{tokens.shape[1]} tokens do not fill {h} x {w}: give the grid as (h, w)")
        return self.paint(self.quantize.vectors(tokens.reshape(-1, h, w))).clamp(-1, 1)


# ------------------------------------------------------------------------------------------------------------
# MaskGIT's tokenizer: the same plan with some other bricks. Here is what differs, and no more.


class MaskGITBlock(ResidualBlock):
    """No biases; where the channels change, the 1 x 1 convolution is on the block's *own output*, not on x.

    It looks like a slip, but the released weights were trained with it.
    """

    def __init__(self, channels_in, channels_out):
        super().__init__(channels_in, channels_out)
        self.conv1.bias = self.conv2.bias = None
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_out, channels_out, 1, bias=False)

    def forward(self, x):
        y = self.branch(x)
        return y + (self.nin_shortcut(y) if hasattr(self, "nin_shortcut") else x)


class MaskGITCodebook(Codebook):
    """Codes of any length: a vector's token is the number of the nearest, in the Euclidean distance."""

    def vectors(self, tokens):
        return self.embedding(tokens)

    def nearest(self, z):
        # Of |z - e|^2 = |z|^2 - 2 z e + |e|^2 the first term is the same for all codes e: to leave it out
        # spares memory (no z - e for every pair) and precision (no large numbers that cancel).
        codes = self.embedding.weight.float()
        with full_precision(z):
            return (z.float() @ codes.T - codes.square().sum(-1) / 2).argmax(-1)


class MaskGITTokenizer(Tokenizer):
    """Made for images in [0, 1]; outside, that is in encode and decode, they are in [-1, 1] here too."""

    def __init__(self, config):
        super().__init__(config)
        self.quantize = MaskGITCodebook(config.codes, config.code_dim)
        self.quant_conv = self.post_quant_conv = nn.Identity()  # its codes are as wide as its latent vectors
        self.encoder.conv_in.bias = None
        self.encoder.conv_out = nn.Conv2d(self.encoder.conv_out.in_channels, config.latent_channels, 1)
        for level in self.encoder.conv_blocks[:-1]:
            level.downsample = nn.AvgPool2d(2)
        for level in self.decoder.conv_blocks:
            del level.res[-1]  # as many as in the encoder
        for network in (self.encoder, self.decoder):
            for blocks in (network.mid, *(level.res for level in network.conv_blocks)):
                for i, block in enumerate(blocks):
                    blocks[i] = MaskGITBlock(block.conv1.in_channels, block.conv1.out_channels)

    def latents(self, images):
        return super().latents((images + 1) / 2)

    def paint(self, codes):
        return super().paint(codes) * 2 - 1


def our_name(name):
    """A parameter's name in MaskGIT's file -> the name here. Its decoder counts levels from the image on."""
    name = re.sub(r"^encoder\.down\.(\d)", r"encoder.conv_blocks.\1", name)
    last = len(MASKGIT_VQ16.multipliers) - 1
    name = re.sub(r"^decoder\.up\.(\d)", lambda level: f"decoder.conv_blocks.{last - int(level[1])}", name)
    return name.replace(".block.", ".res.").replace(".upsample_conv.", ".upsample.conv.")


# ------------------------------------------------------------------------------------------------------------
# Files


def load_tokenizer(path, device="cpu"):
    """A tokenizer from a file, in eval mode: one of ours, LlamaGen's vq_ds16_c2i.pt or MaskGIT's
    maskgit-vqgan-imagenet-f16-256.bin.

    Raises FileNotFoundError for a missing file, ValueError for one that holds no tokenizer.
    """
    content = common.load(path)
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or "quantize.embedding.weight" not in state:
        raise ValueError(f"{path} holds no tokenizer: give a file that python tokenizer.py train made, or "
                         "LlamaGen's vq_ds16_c2i.pt, or MaskGIT's maskgit-vqgan-imagenet-f16-256.bin")
    state = {our_name(name): x for name, x in state.items() if name != "quantize.codebook_used"}  # statistics
    kind, config = Tokenizer, LLAMAGEN_VQ16
    if "quant_conv.weight" not in state:  # between encoder and codes: only MaskGIT's does without
        kind, config = MaskGITTokenizer, MASKGIT_VQ16
    try:
        with torch.device("meta"):  # shapes without numbers: all of these come from the file
            tokenizer = kind(TokenizerConfig(**content["config"]) if "config" in content else config)
        tokenizer.to_empty(device=device).load_state_dict(state)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()[:180]  # torch names every parameter, one will do
        raise ValueError(f"{path} does not fit its tokenizer ({reason}): give another one") from None
    return tokenizer.eval()


def save_tokenizer(tokenizer, path):
    """Write a tokenizer for load_tokenizer, in half precision: half the megabytes, the same quality."""
    state = common.half_precision(tokenizer.state_dict())
    common.save({"config": asdict(tokenizer.config), "model": state}, path)
