"""Images <-> tokens. RandAR does not draw pixels: it writes tokens, and this file paints them.

A VQGAN (arXiv 2012.09841, in LlamaGen's form, 2406.06525) squeezes an image into a small grid of
vectors, replaces each by the nearest of a fixed list of *codes*, the codebook, and paints the image
back from the codes. The number of a code is the *token*.

    Encoder, Codebook, Decoder, Tokenizer   the networks; parameter names are LlamaGen's
    load_tokenizer, save_tokenizer          files: ours, LlamaGen's, MaskGIT's (arXiv 2202.04200)
    train_tokenizer                         how a small one learns

    python tokenizer.py train  [--data DIR]            on the toy world or a folder of class folders
    python tokenizer.py encode --images DIR --out DIR  a folder of class folders -> a token folder
    python tokenizer.py pack   --tokens DIR --out DIR  released ImageNet tokens -> a token folder

Shapes: b images of H x W pixels, h x w = N tokens, f = H / h pixels a token along each axis.
"""

import math
import pathlib
import re
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from support import border, data, toy
from support.border import UserError
from support.pictures import from_uint8, picture_grid, save_picture, to_uint8


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
# Bricks


def group_norm(channels):
    """32 groups from 128 channels on, fewer for small tokenizers."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))); a 1 x 1 convolution on x if channels change."""

    def __init__(self, channels_in, channels_out, maskgit=False):
        super().__init__()
        bias = not maskgit
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=bias)
        self.norm2 = group_norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=bias)

        # MaskGIT's shortcut is of the block's *own output*, not of x. It looks like a slip, but the
        # released weights were trained with it.
        self.nin_shortcut, self.of_output = nn.Identity(), False
        if channels_in != channels_out:
            self.of_output = maskgit
            width = channels_out if maskgit else channels_in
            self.nin_shortcut = nn.Conv2d(width, channels_out, 1, bias=bias)

    def forward(self, x):
        """[b, c_in, h, w] -> [b, c_out, h, w]"""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))  # [b, c_out, h, w]
        return y + self.nin_shortcut(y if self.of_output else x)


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


def downsample(channels):
    """[b, c, h, w] -> [b, c, h / 2, w / 2]; padded asymmetrically, as LlamaGen was trained."""
    conv = nn.Conv2d(channels, channels, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv))


def upsample(channels):
    """[b, c, h, w] -> [b, c, 2 h, 2 w]: every pixel four times, then a convolution."""
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(repeat=nn.Upsample(scale_factor=2.0), conv=conv))


class Level(nn.Module):
    """The blocks of one resolution, then the step to the next: downsample, upsample or neither."""

    def __init__(self, config, widths, lowest, downsample=None, upsample=None):
        super().__init__()
        pairs = list(zip(widths, widths[1:]))  # of channels, into each block and out of it
        attention = SpatialAttention if lowest and config.attention else nn.Identity
        self.res = nn.ModuleList(ResidualBlock(i, o, config.maskgit) for i, o in pairs)
        self.attn = nn.ModuleList(attention(o) for _, o in pairs)
        self.downsample = downsample or nn.Identity()  # after the last block, if at all
        self.upsample = upsample or nn.Identity()

    def forward(self, x):
        """[b, c_in, h, w] -> [b, c_out, h, w], half or twice the h and w."""
        for block, attention in zip(self.res, self.attn):
            x = attention(block(x))
        return self.upsample(self.downsample(x))


def middle(config, width):
    """What stands between the levels and the codes."""
    first, last = (ResidualBlock(width, width, config.maskgit) for _ in range(2))
    between = [SpatialAttention(width)] if config.attention else []
    return nn.Sequential(first, *between, last)


# --------------------------------------------------------------------------------------------------
# The networks


class Encoder(nn.Module):
    """From pixels to latent vectors, by levels of half the resolution each."""

    def __init__(self, config):
        super().__init__()
        width, lowest = config.channels, len(config.multipliers) - 1
        self.conv_in = nn.Conv2d(3, width, 3, padding=1, bias=not config.maskgit)
        self.conv_blocks = nn.Sequential()
        for i, multiplier in enumerate(config.multipliers):
            # The first block of a level brings the channels to its width.
            widths = [width] + [config.channels * multiplier] * config.residual_blocks
            width = widths[-1]
            step = nn.AvgPool2d(2) if config.maskgit else downsample(width)
            step = step if i < lowest else None
            self.conv_blocks.append(Level(config, widths, i == lowest, downsample=step))

        self.mid = middle(config, width)
        self.norm_out = group_norm(width)
        kernel = 1 if config.maskgit else 3  # pixels
        self.conv_out = nn.Conv2d(width, config.latent_channels, kernel, padding=kernel // 2)

    def forward(self, x):
        """[b, 3, H, W] -> [b, latent_channels, h, w]"""
        x = self.mid(self.conv_blocks(self.conv_in(x)))  # [b, c, h, w]
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """The encoder's mirror; LlamaGen's has one block more in each level, for the harder task."""

    def __init__(self, config):
        super().__init__()
        width = config.channels * config.multipliers[-1]
        blocks = config.residual_blocks + (0 if config.maskgit else 1)
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.mid = middle(config, width)
        self.conv_blocks = nn.Sequential()
        for i, multiplier in enumerate(reversed(config.multipliers)):
            widths = [width] + [config.channels * multiplier] * blocks
            width = widths[-1]
            step = upsample(width) if i < len(config.multipliers) - 1 else None
            self.conv_blocks.append(Level(config, widths, i == 0, upsample=step))

        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z):
        """[b, latent_channels, h, w] -> [b, 3, H, W]"""
        x = self.conv_blocks(self.mid(self.conv_in(z)))  # [b, c, H, W]
        return self.conv_out(F.silu(self.norm_out(x)))


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
        """[b, 3, H, W] -> what the codebook is to round, [b, h, w, code_dim]."""
        if self.config.maskgit:
            images = (images + 1) / 2  # it was trained on [0, 1]
        return self.quant_conv(self.encoder(images)).permute(0, 2, 3, 1)

    def paint(self, codes):
        """Code vectors [b, h, w, code_dim] -> [b, 3, H, W]."""
        images = self.decoder(self.post_quant_conv(codes.permute(0, 3, 1, 2)))  # [b, 3, H, W]
        return images * 2 - 1 if self.config.maskgit else images

    def forward(self, images):
        """For training: (repainted [b, 3, H, W], tokens, codebook loss, commitment loss)."""
        codes, tokens, codebook_loss, commitment_loss = self.quantize(self.latents(images))
        return self.paint(codes), tokens, codebook_loss, commitment_loss

    @torch.no_grad()
    def encode(self, images):
        """Images [b, 3, H, W] -> tokens [b, N] int64, raster order. f must divide H and W."""
        f = self.config.downsampling
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % f or images.shape[3] % f:
            raise UserError(f"expected images [b, 3, H, W] with H and W multiples of {f}, got "
                            f"{list(images.shape)}: crop or resize them")
        return self.quantize.nearest(self.latents(images)).flatten(1)  # [b, h, w] -> [b, N]

    @torch.no_grad()
    def decode(self, tokens, grid=None):
        """Tokens [b, N] in raster order -> images [b, 3, H, W]; grid (h, w) if it is not square."""
        side = math.isqrt(tokens.shape[1])
        h, w = grid or (side, side)
        if h * w != tokens.shape[1]:
            raise UserError(f"{tokens.shape[1]} tokens do not fill {h} x {w}: give the grid (h, w)")
        return self.paint(self.quantize.vectors(tokens.reshape(-1, h, w))).clamp(-1, 1)


# --------------------------------------------------------------------------------------------------
# Files


def our_name(name):
    """A parameter's name in MaskGIT's file -> ours. Its decoder counts levels from the image on."""
    last = len(MASKGIT_VQ16.multipliers) - 1
    name = re.sub(r"^encoder\.down\.", "encoder.conv_blocks.", name)  # levels, the finest first
    name = re.sub(r"^decoder\.up\.(\d)", lambda i: f"decoder.conv_blocks.{last - int(i[1])}", name)
    return name.replace(".block.", ".res.").replace(".upsample_conv.", ".upsample.conv.")


def load_tokenizer(path, device="cpu"):
    """A tokenizer in eval mode, from a file of ours, LlamaGen's or MaskGIT's; else UserError."""
    content = border.load(path)
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or "quantize.embedding.weight" not in state:
        raise UserError(f"{path} holds no tokenizer: give a file of python tokenizer.py train, "
                        "LlamaGen's vq_ds16_c2i.pt or MaskGIT's maskgit-vqgan-imagenet-f16-256.bin")
    state = {our_name(name): x for name, x in state.items()}
    state.pop("quantize.codebook_used", None)  # LlamaGen's statistics of its training

    # Its contents tell what it is: only MaskGIT's has nothing between encoder and codes.
    maskgit = "quant_conv.weight" not in state
    config = MASKGIT_VQ16 if maskgit else LLAMAGEN_VQ16
    try:
        if "config" in content:  # of ours, whose first ones called the codebook_size "codes"
            settings = {name.replace("codes", "codebook_size"): x
                        for name, x in content["config"].items()}
            config = replace(TokenizerConfig(**settings), maskgit=maskgit)
        with torch.device("meta"):  # shapes without numbers: all of these come from the file
            tokenizer = Tokenizer(config)
        tokenizer.to_empty(device=device).load_state_dict(state)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()[:180]  # of many lines one will do
        raise UserError(f"{path} does not fit its tokenizer ({reason}): give another one") from None
    return tokenizer.eval()


def save_tokenizer(tokenizer, path):
    """Write a tokenizer for load_tokenizer, in half precision: half the size, the same quality."""
    state = border.half_precision(tokenizer.state_dict())  # load_state_dict makes it float32
    border.save({"config": asdict(tokenizer.config), "model": state}, path)


# --------------------------------------------------------------------------------------------------
# Training a tokenizer


def psnr(images, painted):
    """Peak signal-to-noise ratio of each image in dB, [b]; both [b, 3, H, W] in [-1, 1]."""
    error = ((images - painted.clamp(-1, 1)) / 2).square().mean((1, 2, 3))  # of pixels in [0, 1]
    return -10 * error.clamp_min(1e-10).log10()


@torch.no_grad()
def measure(tokenizer, images):
    """Repaint images [n, 3, H, W]: (mean PSNR in dB, share of the codebook in use)."""
    values, used = [], torch.zeros(tokenizer.config.codebook_size, dtype=torch.bool)  # [V]
    grid = [side // tokenizer.config.downsampling for side in images.shape[2:]]
    for batch in images.split(250):
        tokens = tokenizer.encode(batch)  # [b, N]
        values.append(psnr(batch, tokenizer.decode(tokens, grid)))
        used[tokens.flatten().cpu()] = True
    return torch.cat(values).mean().item(), used.float().mean().item()


@torch.no_grad()
def reseed_dead_codes(tokenizer, latents, used):
    """Move codes that nobody chose lately, not used (bool [V]), onto latents [n, code_dim]."""
    dead = (~used).nonzero()[:, 0][: len(latents)]  # [k], at most one code for each latent
    chosen = latents[torch.randperm(len(latents))[: len(dead)]]  # [k, code_dim]
    codes = tokenizer.quantize.embedding.weight
    codes[dead] = F.normalize(chosen, dim=-1).to(codes)


def train_tokenizer(tokenizer, images, validation, steps, out, batch_size=64, device="cpu",
                    stop=()):
    """Train to repaint images uint8 [n, H, W, 3], with L1 + L2 and the codebook's two losses.

    Writes `out` every 250 steps and at the end, which comes early once `stop` is not empty. Returns
    (PSNR in dB, share of codes in use) on the validation images, uint8 [m, H, W, 3].
    """
    device = torch.device(device)
    precision = border.fast_precision(device)
    tokenizer.to(device)
    validation = from_uint8(validation).to(device)  # [m, 3, H, W] in [-1, 1]

    # The learning rate rises in a line, then falls along half a cosine.
    optimizer = torch.optim.AdamW(tokenizer.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    warm_up = min(100, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * i / steps)))

    used = torch.zeros(tokenizer.config.codebook_size, dtype=torch.bool, device=device)
    bar = tqdm(range(1, steps + 1), desc="tokenizer", unit="step", dynamic_ncols=True)
    for step in bar:
        batch = from_uint8(images[np.random.randint(0, len(images), batch_size)]).to(device)
        with torch.autocast(device.type, precision, enabled=precision is not torch.float32):
            painted, tokens, codebook_loss, commitment_loss = tokenizer(batch)
        error = painted.float() - batch  # [b, 3, H, W]
        loss = error.abs().mean() + error.square().mean() + codebook_loss + 0.25 * commitment_loss

        # One step of AdamW
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)  # one odd batch must not undo many
        optimizer.step()
        schedule.step()

        # Codes that none of 50 batches chose are moved; the last fifth leaves them in peace.
        used[tokens.flatten()] = True
        if step % 50 == 0:
            if step <= 0.8 * steps:
                reseed_dead_codes(tokenizer, tokenizer.latents(batch).detach().flatten(0, 2), used)
            used.zero_()

        if step % 250 == 0 or step == steps or stop:
            quality, use = measure(tokenizer, validation)
            bar.set_postfix_str(f"loss {loss.item():.4f}, {quality:.2f} dB, {use:.0%} of codes")
            save_tokenizer(tokenizer, out)
        if stop:
            break
    return quality, use


# --------------------------------------------------------------------------------------------------
# The commands


def train_command(args):
    """python tokenizer.py train: also draws 30 images and their reconstructions, beside --out."""
    device = border.pick_device(args.device)
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    size = args.image_size or toy.SIDE  # pixels
    config = TokenizerConfig(image_size=size)
    if size % config.downsampling or (args.data is None and size != toy.SIDE):
        raise UserError(f"--image-size must be a multiple of {config.downsampling}, in the toy "
                        f"world {toy.SIDE}, not {size}")
    border.writable_folder(pathlib.Path(args.out).parent)

    # What it learns from, and what it is measured on: 5%, at most 1,000.
    if args.data is None:
        images, validation = toy.make(40_000, seed=1)[0], toy.make(1_000, seed=2)[0]
    else:
        pixels = data.read_all(data.list_images(args.data)[0], size)  # uint8 [n, size, size, 3]
        if len(pixels) < 2:
            raise UserError(f"{args.data} has one readable image: give at least two")
        pixels = pixels[np.random.permutation(len(pixels))]
        held_out = max(1, min(1000, len(pixels) // 20))
        images, validation = pixels[held_out:], pixels[:held_out]

    tokenizer = Tokenizer(config)
    quality, use = train_tokenizer(tokenizer, images, validation, args.steps, args.out,
                                   device=device, stop=border.stop_at_signal())

    # A picture of both, three pairs a row
    shown = validation[:30]
    painted = tokenizer.decode(tokenizer.encode(from_uint8(shown).to(device)))
    pairs = np.stack([shown, to_uint8(painted)], axis=1).reshape(-1, size, size, 3)  # in turn
    rows = [""] * max(1, len(shown) // 3)
    title = f"image, reconstruction: {quality:.1f} dB on average"
    picture = pathlib.Path(args.out).with_suffix(".png")
    save_picture(picture_grid(pairs, rows, title), picture)
    print(f"validation PSNR {quality:.2f} dB, {use:.1%} of the codes in use; wrote {args.out} and "
          f"{picture}")


def encode_command(args):
    """python tokenizer.py encode: interrupted, the same command goes on."""
    tokenizer = load_tokenizer(args.tokenizer, border.pick_device(args.device))
    images, labels, names = data.list_images(args.images)
    source = pathlib.Path(args.images).resolve()
    data.encode_images(images, labels, names, tokenizer, args.tokenizer, args.out, source,
                       args.image_size, args.crops, args.batch_size, args.workers)


def pack_command(args):
    """python tokenizer.py pack: interrupted, the same command goes on."""
    tokenizer = load_tokenizer(args.tokenizer)
    data.pack_tokens(args.tokens, tokenizer, args.tokenizer, args.out, args.workers)


def main():
    """The commands and their flags."""
    parser = border.command_line(__doc__)
    commands = parser.add_subparsers(required=True, metavar="train|encode|pack")
    # A small tokenizer
    train = commands.add_parser("train", help="train a small tokenizer")
    train.set_defaults(command=train_command)
    train.add_argument("--data", help="a folder of class folders (default: the toy world)")
    train.add_argument("--steps", type=border.positive_int, default=3500, help="default: 3500")
    train.add_argument("--out", default="my/tokenizer.pt", help="default: my/tokenizer.pt")
    train.add_argument("--seed", type=border.seed, default=0)

    # Images become tokens.
    encode = commands.add_parser("encode", help="turn a folder of images into a token folder")
    encode.set_defaults(command=encode_command)
    encode.add_argument("--images", required=True, help="a folder of class folders of images")
    shipped = border.CHECKPOINTS / "tokenizer.pt"
    encode.add_argument("--tokenizer", default=shipped, help="default: the toy world's")
    encode.add_argument("--crops", type=int, choices=(1, 2, 10), default=2,
                        help="1: the centre of each image; 2 (default): and its mirror image; "
                        "10: the paper's, corners and centre, and their mirror images")
    encode.add_argument("--batch-size", type=border.positive_int, default=64, help="default: 64")

    # The released tokens are tokens already.
    pack = commands.add_parser("pack", help="turn the released ImageNet tokens into a token folder")
    pack.set_defaults(command=pack_command)
    pack.add_argument("--tokens", required=True, help="a folder of folders 0, 1, ... of .npy files")
    pack.add_argument("--tokenizer", required=True, help="the one that made the tokens")

    # Flags that two commands share
    for command in (encode, pack):
        command.add_argument("--out", required=True, help="the token folder to write")
        command.add_argument("--workers", type=border.whole_number,
                             help="threads that read files (default: one a core, at most 16)")
    for command in (train, encode):
        command.add_argument("--image-size", type=border.positive_int, help="default: its own")
        command.add_argument("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    args = parser.parse_args()
    with border.one_line_errors():
        args.command(args)


if __name__ == "__main__":
    main()
