"""Images <-> tokens. RandAR does not draw pixels: it writes tokens, and this file paints them.

A VQGAN (arXiv 2012.09841, in LlamaGen's form, 2406.06525) squeezes an image into a small grid of
vectors, replaces each by the nearest of a fixed list of *codes*, the codebook, and paints the image
back from the codes. The number of a code is the *token*. It is more than its f x f pixels: by the
layers' norms every token has seen all of the image, and equal patches may have different tokens.

    python tokenizer.py train  [--data fine]           on a toy world, or --data DIR: class folders
    python tokenizer.py encode --images DIR --out DIR  a folder of class folders -> a token folder
    python tokenizer.py pack   --tokens DIR --out DIR  released ImageNet tokens -> a token folder

Shapes: b images of H x W pixels, h x w = N tokens, f = H / h pixels a token along each axis.
"""

import support  # first: Ctrl-C while torch is imported is no traceback

import math
import pathlib
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from support import border, checks, data, released, toy
from support.border import UserError
from support.pictures import from_uint8, picture_grid, psnr, save_picture, to_uint8
from support.speed import mixed_precision


@dataclass
class TokenizerConfig:
    """The shape of a tokenizer. The defaults are the toy world's: 32 x 32 pixels, 8 x 8 tokens."""

    channels: int = 24  # of the first convolution
    multipliers: tuple = (1, 2, 4)  # of the channels, level by level; all but the last halve
    residual_blocks: int = 1  # in a level of the encoder
    latent_channels: int = 128  # between encoder and codebook
    codebook_size: int = 512  # how many different tokens there are
    code_dim: int = 8  # few: nearest neighbours in a low dimension leave no code unused
    attention: bool = False  # at the lowest resolution
    image_size: int = 32  # pixels, of the images it was made for; any multiple of f works
    maskgit: bool = False  # with MaskGIT's bricks instead of LlamaGen's

    @property
    def downsampling(self):
        """f, pixels per token along each axis."""
        return 2 ** (len(self.multipliers) - 1)


LLAMAGEN_VQ16 = TokenizerConfig(128, (1, 1, 2, 2, 4), 2, 256, 16384, 8, True, 256)
MASKGIT_VQ16 = TokenizerConfig(128, (1, 1, 2, 2, 4), 2, 256, 1024, 256, False, 256, maskgit=True)


# --------------------------------------------------------------------------------------------------
# The networks


def group_norm(channels):
    """32 groups from 128 channels on, fewer for small tokenizers."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))); a 1 x 1 convolution on x if channels change."""

    def __init__(self, channels_in, channels_out, maskgit=False):
        super().__init__()
        self.maskgit, bias = maskgit, not maskgit
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=bias)
        self.norm2 = group_norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=bias)
        if channels_in != channels_out:
            seen = channels_out if maskgit else channels_in
            self.nin_shortcut = nn.Conv2d(seen, channels_out, 1, bias=bias)

    def forward(self, x):
        """[b, c_in, h, w] -> [b, c_out, h, w]"""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))  # [b, c_out, h, w]
        if x.shape == y.shape:
            return x + y

        # MaskGIT's shortcut is of the block's *own output*, not of x. It looks like a slip, but the
        # released weights were trained with it.
        return y + self.nin_shortcut(y if self.maskgit else x)


class SpatialAttention(nn.Module):
    """Every place looks at every other, one head: distant parts can agree on a colour."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        """[b, c, h, w] -> the same"""
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).mT[:, None] for f in (self.q, self.k, self.v))  # [b, 1, hw, c]
        y = F.scaled_dot_product_attention(q, k, v)  # [b, 1, hw, c]
        return x + self.proj_out(y[:, 0].mT.reshape(x.shape))


class Level(nn.Module):
    """Residual blocks of one resolution; the first brings the channels from c_in to c_out."""

    def __init__(self, config, c_in, c_out, blocks, lowest):
        super().__init__()
        widths = pairwise([c_in] + blocks * [c_out])
        attention = SpatialAttention if lowest and config.attention else nn.Identity
        self.res = nn.ModuleList(ResidualBlock(i, o, config.maskgit) for i, o in widths)
        self.attn = nn.ModuleList(attention(c_out) for _ in range(blocks))
        self.downsample, self.upsample = nn.Sequential(), nn.Sequential()  # filled below

    def forward(self, x):
        """[b, c_in, h, w] -> [b, c_out, h, w]; all levels but the last halve or double h and w."""
        for block, attention in zip(self.res, self.attn):
            x = attention(block(x))
        return self.upsample(self.downsample(x))


def middle(config, width):
    """What stands between the levels and the codes."""
    first, last = (ResidualBlock(width, width, config.maskgit) for _ in range(2))
    between = [SpatialAttention(width)] if config.attention else []
    return nn.Sequential(first, *between, last)


class Encoder(nn.Sequential):
    """Pixels [b, 3, H, W] -> latents [b, latent_channels, h, w], part by part as made here."""

    def __init__(self, config):
        super().__init__()
        width, last = config.channels, len(config.multipliers) - 1
        self.conv_in = nn.Conv2d(3, width, 3, padding=1, bias=not config.maskgit)
        self.conv_blocks = nn.Sequential()
        for i, multiplier in enumerate(config.multipliers):
            c_in, width = width, config.channels * multiplier
            level = Level(config, c_in, width, config.residual_blocks, lowest=i == last)
            if i < last and config.maskgit:  # all levels but the last halve
                level.downsample.append(nn.AvgPool2d(2))
            elif i < last:
                level.downsample.pad = nn.ZeroPad2d((0, 1, 0, 1))  # as in LlamaGen
                level.downsample.conv = nn.Conv2d(width, width, 3, stride=2)
            self.conv_blocks.append(level)

        self.mid = middle(config, width)
        self.norm_out, self.swish = group_norm(width), nn.SiLU()
        kernel = 1 if config.maskgit else 3  # pixels
        self.conv_out = nn.Conv2d(width, config.latent_channels, kernel, padding=kernel // 2)


class Decoder(nn.Sequential):
    """Latents [b, latent_channels, h, w] -> pixels [b, 3, H, W]: the encoder's mirror."""

    def __init__(self, config):
        super().__init__()
        width, last = config.channels * config.multipliers[-1], len(config.multipliers) - 1
        blocks = config.residual_blocks + (not config.maskgit)  # LlamaGen: one more
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.mid = middle(config, width)
        self.conv_blocks = nn.Sequential()
        for i, multiplier in enumerate(reversed(config.multipliers)):
            c_in, width = width, config.channels * multiplier
            level = Level(config, c_in, width, blocks, lowest=i == 0)
            if i < last:  # every pixel four times, then a convolution
                level.upsample.repeat = nn.Upsample(scale_factor=2.0)
                level.upsample.conv = nn.Conv2d(width, width, 3, padding=1)
            self.conv_blocks.append(level)

        self.norm_out, self.swish = group_norm(width), nn.SiLU()
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)


class Codebook(nn.Module):
    """The one discrete step: a vector's token is the number of the nearest code.

    LlamaGen's codes and vectors have unit length, so that only directions count; MaskGIT's do not.
    """

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.code_dim)
        self.unit = not config.maskgit

    def scaled(self, x):
        """Vectors [..., code_dim], to unit length where the codes have it."""
        return F.normalize(x, dim=-1) if self.unit else x

    def vectors(self, tokens):
        """Tokens [...] -> codes [..., code_dim]."""
        return self.scaled(self.embedding(tokens))

    def nearest(self, z):
        """Vectors [..., code_dim] -> tokens [...]."""
        # Of |z - e|^2 = |z|^2 - 2 z e + |e|^2 the first term is the same for all codes e, and for
        # codes of unit length the last one, too. bfloat16 would confuse neighbours.
        codes = self.scaled(self.embedding.weight.float())  # [V, code_dim]
        with torch.autocast(z.device.type, enabled=False):
            likeness = self.scaled(z.float()) @ codes.T  # [..., V], larger is nearer
            if not self.unit:
                likeness = likeness - codes.square().sum(-1) / 2
        return likeness.argmax(-1)

    def forward(self, z):
        """z [b, h, w, code_dim] -> (codes, tokens [b, h, w], codebook loss, commitment loss)."""
        tokens = self.nearest(z)
        z, codes = self.scaled(z), self.vectors(tokens)  # [b, h, w, code_dim] each

        # arXiv 1711.00937: one loss moves codes to vectors, one keeps vectors near their codes.
        codebook_loss = (codes - z.detach()).square().mean()
        commitment_loss = (codes.detach() - z).square().mean()

        # Straight through: forwards it is the code, backwards as if nothing had been rounded.
        return z + (codes - z).detach(), tokens, codebook_loss, commitment_loss


class Tokenizer(nn.Module):
    """Encoder, codebook and decoder. Images are in [-1, 1]."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config)
        self.quant_conv = self.post_quant_conv = nn.Identity()
        if not config.maskgit:  # whose codes are as wide as its latent vectors
            self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
            self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, 1)

    def latents(self, images):
        """[b, 3, H, W] -> what the codebook is to round, [b, h, w, code_dim]. UserError."""
        f = self.config.downsampling
        if images.shape[-2] % f or images.shape[-1] % f:
            got = list(images.shape)
            raise UserError(f"expected H and W multiples of {f}, got {got}: crop or resize them")
        if self.config.maskgit:
            images = (images + 1) / 2  # it was trained on [0, 1]
        return self.quant_conv(self.encoder(images)).permute(0, 2, 3, 1)

    def paint(self, codes):
        """Code vectors [b, h, w, code_dim] -> [b, 3, H, W]."""
        images = self.decoder(self.post_quant_conv(codes.permute(0, 3, 1, 2)))  # [b, 3, H, W]
        return images * 2 - 1 if self.config.maskgit else images

    @torch.no_grad()
    def encode(self, images):
        """Images [b, 3, H, W] -> tokens [b, N] int64, raster order."""
        return self.quantize.nearest(self.latents(images)).flatten(1)  # [b, h, w] -> [b, N]

    @torch.no_grad()
    def decode(self, tokens, grid=None):
        """Tokens [b, N] in raster order -> images [b, 3, H, W]; grid (h, w) if it is not square."""
        side = math.isqrt(tokens.shape[1])
        h, w = grid or (side, side)
        checks.check_shapes(tokens=(tokens, [len(tokens), h * w]))
        checks.check_values("tokens", tokens, self.config.codebook_size)
        tokens = tokens.reshape(-1, h, w)  # [b, h, w]
        return self.paint(self.quantize.vectors(tokens)).clamp(-1, 1)


# --------------------------------------------------------------------------------------------------
# Files


def recognise(content, path):
    """(Tokenizer, config) of a file's content: ours, LlamaGen's or MaskGIT's; else UserError."""
    state = content.get("model", content)
    if "quantize.embedding.weight" not in state:
        raise UserError(f"{path} holds no tokenizer: give one of ours, LlamaGen's or MaskGIT's")

    # Parameters have LlamaGen's names. MaskGIT's decoder counts levels from the image on.
    names = {"encoder.down.": "encoder.conv_blocks.", ".block.": ".res.",
             ".upsample_conv.": ".upsample.conv."}
    names |= {f"decoder.up.{4 - i}.": f"decoder.conv_blocks.{i}." for i in range(5)}
    for theirs, ours in names.items():
        state = {name.replace(theirs, ours): x for name, x in state.items()}
    state.pop("quantize.codebook_used", None)  # LlamaGen's statistics of its training
    content["model"] = state

    if "config" in content:  # ours
        settings = content["config"]
        if "codes" in settings:  # so our first files call it
            settings["codebook_size"] = settings.pop("codes")
        return Tokenizer, checks.config_of(TokenizerConfig, settings, path)

    # Nothing stands between MaskGIT's encoder and its codes.
    return Tokenizer, LLAMAGEN_VQ16 if "quant_conv.weight" in state else MASKGIT_VQ16


def load_tokenizer(path, device="cpu"):
    """The tokenizer that a file holds, in eval mode. UserError if it holds none."""
    return checks.load_network(path, recognise, device)[0]


def save_tokenizer(tokenizer, path):
    """Write a tokenizer for load_tokenizer, in half precision: half the size, the same quality."""
    checks.save_network(tokenizer, path, half=True)


# --------------------------------------------------------------------------------------------------
# Training a tokenizer


@torch.no_grad()
def reseed_dead_codes(codebook, latents, used):
    """Move codes that nobody chose lately, not used (bool [V]), onto latents [n, code_dim]."""
    dead = (~used).nonzero()[: len(latents), 0]  # [k], at most one code for each latent
    chosen = latents[torch.randperm(len(latents))[: len(dead)]]  # [k, code_dim]
    codebook.embedding.weight[dead] = F.normalize(chosen.float(), dim=-1)


def train_tokenizer(tokenizer, images, validation, steps, out, batch_size=64, stop=()):
    """Train to repaint images uint8 [n, H, W, 3], with L1 + L2 and the codebook's two losses.

    Every 250 steps and at the end it writes `out` and measures validation, uint8 [m, H, W, 3]. The
    end comes early once `stop` is not empty.
    """
    device = next(tokenizer.parameters()).device
    validation = from_uint8(validation).to(device)  # [m, 3, H, W] in [-1, 1]
    used = torch.zeros(tokenizer.config.codebook_size, dtype=torch.bool, device=device)  # [V]

    # The learning rate rises in a line, then falls along half a cosine.
    optimizer = torch.optim.AdamW(tokenizer.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * i / steps)))

    bar = tqdm(range(1, steps + 1), desc="tokenizer")
    for step in bar:
        chosen = torch.randint(len(images), (batch_size,)).numpy()  # [b]
        batch = from_uint8(images[chosen]).to(device)  # [b, 3, H, W]
        with mixed_precision(device):
            latents = tokenizer.latents(batch)  # [b, h, w, code_dim]
            codes, tokens, codebook_loss, commitment_loss = tokenizer.quantize(latents)
            painted = tokenizer.paint(codes)  # [b, 3, H, W]
        error = painted.float() - batch  # [b, 3, H, W]
        loss = error.abs().mean() + error.square().mean() + codebook_loss + 0.25 * commitment_loss

        # One step of AdamW
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)  # one odd batch must not undo many
        optimizer.step()
        schedule.step()

        # Codes that none of 50 batches chose are moved; the last fifth leaves them in peace.
        used[tokens.flatten()] = True
        if step % 50 == 0 and step <= 0.8 * steps:
            reseed_dead_codes(tokenizer.quantize, latents.flatten(0, 2), used)
            used.zero_()

        if step % 250 == 0 or step == steps or stop:
            tokens = tokenizer.encode(validation)  # [m, N]
            quality = psnr(validation, tokenizer.decode(tokens)).mean()
            if not quality.isfinite():  # what was saved last was good: it stays
                raise UserError("the training diverged: give another --seed")
            bar.set_postfix_str(f"PSNR {quality:.2f} dB, {len(tokens.unique())} codes in use")
            save_tokenizer(tokenizer, out)
        if stop:
            break


# --------------------------------------------------------------------------------------------------
# The commands


def train_command(args):
    """python tokenizer.py train: also draws images and their reconstructions, beside --out."""
    out, device = pathlib.Path(args.out), border.pick_device(args.device)
    sheet = out.with_suffix(".png")  # of what it has learnt
    border.output(out)
    border.output(sheet, others=[out])
    torch.manual_seed(args.seed)

    # What it learns from, and what it is measured on: of a folder 5%, at most 250.
    if args.data in toy.WORLDS:
        images = toy.make(40_000, seed=1, world=args.data)[0]  # uint8 [n, H, W, 3]
        validation = toy.make(250, seed=2, world=args.data)[0]
    else:
        pixels = data.read_all(data.list_images(args.data)[0], args.image_size)
        if len(pixels) < 2:
            raise UserError(f"{args.data} has {len(pixels)} readable images: give two or more")
        pixels = pixels[torch.randperm(len(pixels)).numpy()]  # uint8 [n, H, W, 3]
        held_out = min(250, len(pixels) // 20 + 1)
        images, validation = pixels[held_out:], pixels[:held_out]

    tokenizer = Tokenizer(TokenizerConfig(image_size=images.shape[1])).to(device)
    train_tokenizer(tokenizer, images, validation, args.steps, out, stop=border.stop_at_signal())

    shown = from_uint8(validation[:10]).to(device)  # [10, 3, H, W]
    painted = tokenizer.decode(tokenizer.encode(shown))
    rows = [("image", to_uint8(shown)), ("repainted", to_uint8(painted))]
    save_picture(picture_grid(rows), sheet)
    print(f"wrote {out} and, of {len(shown)} images, {sheet}")


def main():
    """The commands and their flags."""
    parser = border.command_line(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|encode|pack")

    train = commands.add_parser("train", help="train a small tokenizer")
    train.add_argument("--data", default="plain",
                       help="plain (default) or fine: a toy world; else a folder of class folders")
    train.add_argument("--image-size", type=border.positive_int, default=32, help="default: 32")
    train.add_argument("--steps", type=border.positive_int, default=3500, help="default: 3500")
    train.add_argument("--seed", type=border.seed, default=0)
    train.add_argument("--out", default="my/tokenizer.pt", help="default: my/tokenizer.pt")
    train.add_argument("--device", help="default: a GPU where there is one")

    encode = commands.add_parser("encode", help="turn a folder of images into a token folder")
    encode.add_argument("--images", required=True, help="a folder of class folders of images")
    encode.add_argument("--image-size", type=border.positive_int, help="default: the tokenizer's")
    encode.add_argument("--crops", type=int, choices=(1, 2, 10), default=2,
                        help="1: the centre; 2 (default): and its mirror image; 10: the paper's")
    encode.add_argument("--batch-size", type=border.positive_int, default=64, help="default: 64")
    encode.add_argument("--tokenizer", default=border.CHECKPOINTS / "tokenizer.pt",
                        help="a file, or llamagen or maskgit; default: the toy world's")
    encode.add_argument("--out", required=True, help="the token folder to write")
    encode.add_argument("--device", help="default: a GPU where there is one")

    # The released tokens are tokens already.
    pack = commands.add_parser("pack", help="turn the released ImageNet tokens into a token folder")
    pack.add_argument("--tokens", required=True, help="a folder of folders 0, 1, ... of .npy files")
    pack.add_argument("--tokenizer", required=True, help="llamagen, maskgit, or its file")
    pack.add_argument("--out", required=True, help="the token folder to write")
    args = parser.parse_args()

    # Encoding and packing, if interrupted, go on when the same command is given again.
    smaller = {"train": "--image-size", "encode": "--batch-size"}.get(args.command)
    with border.one_line_errors(smaller):
        if args.command == "train":
            return train_command(args)
        path = released.file_of(args.tokenizer)
        if args.command == "encode":
            tokenizer = load_tokenizer(path, border.pick_device(args.device))
            data.encode_images(*data.list_images(args.images), tokenizer, path, args.out,
                               pathlib.Path(args.images).resolve(), args.image_size, args.crops,
                               args.batch_size)
        else:
            data.pack_tokens(args.tokens, load_tokenizer(path), path, args.out)


if __name__ == "__main__":
    main()
