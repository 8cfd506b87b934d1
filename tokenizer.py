"""Images <-> tokens: the commands, and how a tokenizer learns. The networks themselves are in vqgan.py.

    train_tokenizer     the training loop: reconstruct the image, keep every code in use

    python tokenizer.py train   [--data DIR]             on the toy world, or on a folder of class folders
    python tokenizer.py encode  --images DIR --out DIR   a folder of class folders -> a folder of tokens
    python tokenizer.py pack    --tokens DIR --out DIR   the released ImageNet tokens -> a folder of tokens
"""

import math
import pathlib
import signal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import common
import data
import toy
from vqgan import Tokenizer, TokenizerConfig, load_tokenizer, save_tokenizer

# ------------------------------------------------------------------------------------------------------------
# Training a tokenizer


def psnr(images, reconstructions):
    """Peak signal-to-noise ratio of each image in dB, [b]; both [b, 3, H, W] in [-1, 1]."""
    error = ((images - reconstructions.clamp(-1, 1)) / 2).square().mean((1, 2, 3))  # of pixels in [0, 1]
    return -10 * error.clamp_min(1e-10).log10()


@torch.no_grad()
def measure(tokenizer, images):
    """Reconstruct images [n, 3, H, W]: (mean PSNR in dB, share of the codebook in use)."""
    values, used = [], torch.zeros(tokenizer.config.codes, dtype=torch.bool)
    grid = [side // tokenizer.config.downsampling for side in images.shape[2:]]
    for batch in images.split(250):
        tokens = tokenizer.encode(batch)
        values.append(psnr(batch, tokenizer.decode(tokens, grid)))
        used[tokens.flatten().cpu()] = True
    return torch.cat(values).mean().item(), used.float().mean().item()


@torch.no_grad()
def reseed_dead_codes(tokenizer, latents, used):
    """Move every code that nobody chose lately onto a vector that the encoder does produce.

    latents: [n, code_dim] of the current batch; used: bool [codes].
    """
    dead = (~used).nonzero()[:, 0][: len(latents)]
    chosen = latents[torch.randperm(len(latents))[: len(dead)]]
    codes = tokenizer.quantize.embedding.weight
    codes[dead] = F.normalize(chosen, dim=-1).to(codes)


def train_tokenizer(tokenizer, images, validation, steps, out, batch_size=64, device="cpu"):
    """Train on reconstruction (L1 + L2) and commitment; the losses of arXiv 1711.00937, on unit vectors.

    images, validation: uint8 [n, H, W, 3]. Writes `out` every 250 steps, on Ctrl-C, and at the end.
    Returns (PSNR in dB, share of codes in use) on the validation images.
    """
    device = torch.device(device)
    precision = common.fast_precision(device)
    tokenizer.to(device).train()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    warm_up = min(100, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(  # up linearly, then down along half a cosine
        optimizer, lambda i: min((i + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * i / steps)))
    used = torch.zeros(tokenizer.config.codes, dtype=torch.bool, device=device)
    validation = common.from_uint8(validation).to(device)
    quality, use, measured = 0.0, 0.0, ""
    bar = tqdm(range(steps), desc="tokenizer", unit="step", dynamic_ncols=True)
    try:
        for step in bar:
            batch = images[np.random.randint(0, len(images), batch_size)]
            batch = common.from_uint8(batch).to(device)
            with torch.autocast(device.type, precision, enabled=precision is not torch.float32):
                painted, tokens, codebook_loss, commitment_loss = tokenizer(batch)
            error = painted.float() - batch
            loss = error.abs().mean() + error.square().mean() + codebook_loss + 0.25 * commitment_loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            used[tokens.flatten()] = True
            if step % 50 == 49 and step < 0.8 * steps:  # the last fifth leaves the codes in peace
                reseed_dead_codes(tokenizer, tokenizer.latents(batch).detach().flatten(0, 2), used)
            if step % 50 == 49:
                used.zero_()
            if step % 250 == 249 or step == steps - 1:
                tokenizer.eval()
                quality, use = measure(tokenizer, validation)
                measured = f", validation: PSNR {quality:.2f} dB, {use:.0%} of codes used"
                tokenizer.train()
                save_tokenizer(tokenizer, out)
            if step % 10 == 0:
                bar.set_postfix_str(f"loss {loss.item():.4f}{measured}")
    except KeyboardInterrupt:
        print(f"\nstopped after {step} of {steps} steps; what was learnt is in {out}")
        save_tokenizer(tokenizer, out)
    return quality, use


# ------------------------------------------------------------------------------------------------------------
# The commands


def train_command(args):
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    config = TokenizerConfig(image_size=args.image_size or toy.SIDE)
    size, f = config.image_size, config.downsampling
    if size < f or size % f or (args.data is None and size != toy.SIDE):
        raise ValueError(f"--image-size must be a multiple of {f}, in the toy world {toy.SIDE}, not {size}")
    paths = data.list_images(args.data)[0] if args.data else []
    common.writable_folder(pathlib.Path(args.out).parent)
    if args.data is None:
        images, validation = toy.make(40_000, seed=1)[0], toy.make(1_000, seed=2)[0]
    else:
        pixels = data.read_all(paths, config.image_size)
        if len(pixels) < 2:
            raise ValueError(f"{args.data} has one readable image: one to learn from and one to validate on, "
                             "at least, are needed")
        held_out = np.zeros(len(pixels), bool)
        held_out[np.random.permutation(len(pixels))[: max(1, min(1000, len(pixels) // 20))]] = True
        images, validation = pixels[~held_out], pixels[held_out]
    tokenizer = Tokenizer(config)
    quality, use = train_tokenizer(tokenizer, images, validation, args.steps, args.out, device=args.device)
    shown = validation[np.linspace(0, len(validation) - 1, 30 if len(validation) >= 30 else 6).astype(int)]
    painted = tokenizer.decode(tokenizer.encode(common.from_uint8(shown).to(args.device)))
    pairs = np.stack([shown, common.to_uint8(painted)], axis=1).reshape(-1, *shown.shape[1:])
    title = f"image, reconstruction: {quality:.1f} dB on average"
    picture = pathlib.Path(args.out).with_suffix(".png")
    common.save_picture(common.picture_grid(pairs, [""] * (len(shown) // 6), title), picture)  # six a row
    print(f"validation PSNR {quality:.2f} dB, {use:.1%} of the codes in use; wrote {args.out} and {picture}")


def encode_command(args):
    tokenizer = load_tokenizer(args.tokenizer, args.device)
    paths, labels, class_names = data.list_images(args.images)
    try:
        data.encode_images(paths, labels, class_names, pathlib.Path(args.images).resolve(), tokenizer,
                           args.tokenizer, args.out, args.image_size or tokenizer.config.image_size,
                           args.crops, args.batch_size, args.workers)
    except torch.cuda.OutOfMemoryError:
        raise ValueError(f"{args.batch_size} images at a time need more memory than {args.device} has: "
                         "give a smaller --batch-size") from None
    say_what_is_in(args.out)


def pack_command(args):
    tokenizer = load_tokenizer(args.tokenizer)
    data.pack_tokens(args.tokens, tokenizer, args.tokenizer, args.out, args.workers)
    say_what_is_in(args.out)


def say_what_is_in(out):
    folder = data.TokenFolder(out)
    print(f"wrote {out}: {len(folder):,} images of {len(folder.class_names):,} classes, "
          f"{folder.tokens.shape[1]} crops each, {folder.grid[0]} x {folder.grid[1]} tokens")


def main():
    parser = common.command_line(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|encode|pack")
    train = commands.add_parser("train", help="train a small tokenizer, on the toy world or on --data")
    train.add_argument("--data", help="a folder of class folders of images (default: the toy world)")
    train.add_argument("--steps", type=int, default=3500, help="optimiser steps (default: 3500)")
    train.add_argument("--out", default="my/tokenizer.pt", help="file to write (default: my/tokenizer.pt)")
    train.add_argument("--seed", type=int, default=0)
    encode = commands.add_parser("encode", help="turn a folder of images into a folder of tokens")
    encode.add_argument("--images", required=True, help="a folder of class folders of images")
    encode.add_argument("--out", required=True, help="the token folder to write")
    encode.add_argument("--tokenizer", default=common.CHECKPOINTS / "tokenizer.pt", help="default: the toy's")
    encode.add_argument("--crops", type=int, choices=(1, 2, 10), default=2,
                        help="1: the centre of each image; 2: and its mirror image; 10: the paper's, "
                        "corners and centre, and their mirror images (default: 2)")
    encode.add_argument("--batch-size", type=int, default=64, help="images at a time (default: 64)")
    pack = commands.add_parser("pack", help="turn the released ImageNet tokens into a folder of tokens")
    pack.add_argument("--tokens", required=True, help="a folder of folders 0, 1, 2, ... of .npy files")
    pack.add_argument("--out", required=True, help="the token folder to write")
    pack.add_argument("--tokenizer", required=True, help="the one that made the tokens")
    for command in (encode, pack):
        command.add_argument("--workers", type=int,
                             help="processes that read files (default: one a core, at most 16)")
    for command in (train, encode):
        command.add_argument("--image-size", type=int, help="pixels (default: the tokenizer's own)")
        command.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    args = parser.parse_args()
    with common.one_line_errors():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's wish to stop is like Ctrl-C
        if args.command != "pack":
            args.device = common.pick_device(args.device)
        if args.command == "train" and args.steps < 1:
            raise ValueError(f"--steps must be at least 1, not {args.steps}")
        if args.command == "encode" and args.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, not {args.batch_size}")
        if args.command != "train" and args.workers is not None and args.workers < 0:
            raise ValueError(f"--workers must be at least 0, not {args.workers}")
        {"train": train_command, "encode": encode_command, "pack": pack_command}[args.command](args)


if __name__ == "__main__":
    main()
