"""Train a RandAR: python train.py

With no argument: the smallest model on the toy world, pictures within minutes. The recipe of the paper
(Sec. 4.1) is --size L --data TOKENS; every number of it can be overridden.

    RECIPES, learning_rate, make_optimizer    what the paper fixed
    open_tokens                               the data: the toy world, a token folder, or a folder of images
    draw_loss, draw_samples                   what people watch while it trains
    train                                     the loop

    out/randar.pt      the weights, for sample.py      out/samples.png   what the model draws now
    out/training.pt    all of it, for --resume         out/loss.png      the curve
    out/tokenizer.pt   copied here, for sample.py      out/log.jsonl     a line of JSON per report
"""

import json
import math
import pathlib
import shutil
import time
from dataclasses import asdict

import matplotlib
import torch
from tqdm import tqdm

import common
import data
import toy
from randar import SIZES, Config, RandAR, save_randar
from sample import decoding_steps, draw_grid, spread_classes
from vqgan import load_tokenizer

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (after the choice of a backend that needs no screen)

# ------------------------------------------------------------------------------------------------------------
# The recipe (Sec. 4.1)

RECIPES = {name: dict(steps=360_000, batch_size=1024, micro_batch=32, learning_rate=4e-4) for name in SIZES}
RECIPES["toy"] = dict(steps=1200, batch_size=64, micro_batch=64, learning_rate=3e-3)  # ours, for a laptop
LAST_LEARNING_RATE = 1e-5
TOY_IMAGES = 40_000


def learning_rate(step, steps, peak):
    """Constant for the first 5/6 of the steps, then linear to 1e-5."""
    rest = (steps - step) / (steps / 6)  # 1 where the descent begins, 0 in the end
    return LAST_LEARNING_RATE + (peak - LAST_LEARNING_RATE) * min(1.0, rest)


def make_optimizer(model, peak):
    """AdamW; weight decay on matrices only: to pull a norm's scale towards zero would only do harm."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)


# ------------------------------------------------------------------------------------------------------------
# The data


def open_tokens(path, tokenizer_path, out, device):
    """The TokenFolder to train on, and the path of the tokenizer that made it.

    path: a token folder, a folder of class folders of images (turned into tokens in out/tokens first), or
    None for the toy world. Raises FileNotFoundError or ValueError where there is nothing to train on.
    """
    if path is not None and (pathlib.Path(path) / "meta.json").is_file():
        tokens = data.TokenFolder(path)
        return tokens, pathlib.Path(tokenizer_path or tokens.tokenizer)
    encoded = out / "tokens"
    if path is None:
        source, tokenizer_path = "toy world", tokenizer_path or common.CHECKPOINTS / "tokenizer.pt"
    else:
        source, (paths, labels, names) = pathlib.Path(path).resolve(), data.list_images(path)
        if tokenizer_path is None:
            raise ValueError(f"{path} holds images: give the --tokenizer that shall turn them into tokens "
                             "(python tokenizer.py train makes one)")
    tokenizer_path = pathlib.Path(tokenizer_path)
    if (encoded / "meta.json").is_file():  # from an earlier start: as good as new if nothing has changed
        tokens = data.TokenFolder(encoded)
        same_tokenizer = tokenizer_path.resolve() in (pathlib.Path(tokens.tokenizer),
                                                      (out / "tokenizer.pt").resolve())
        if tokens.source in (str(source), None) and same_tokenizer:
            return tokens, tokenizer_path
    tokenizer = load_tokenizer(tokenizer_path, device)
    if path is None:
        common.writable_folder(encoded)  # to know it before a minute of drawing
        images, labels, _ = toy.make(TOY_IMAGES, seed=0)
        batches = ((range(i, i + 250), images[i : i + 250]) for i in range(0, TOY_IMAGES, 250))
        data.encode_images(batches, labels, toy.CLASSES, source, tokenizer, tokenizer_path, encoded, toy.SIDE,
                           crops=1)
    else:
        size, skipped = tokenizer.config.image_size, []
        data.encode_images(data.read_images(paths, size, skipped=skipped), labels, names, source, tokenizer,
                           tokenizer_path, encoded, size)
        data.report_skipped(skipped)
    return data.TokenFolder(encoded), tokenizer_path


# ------------------------------------------------------------------------------------------------------------
# What people watch


def draw_loss(log, path):
    """The loss curve, from the lines of the log."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot([line["step"] for line in log], [line["loss"] for line in log], color="black", linewidth=1.2,
              marker="." if len(log) < 3 else None)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.set_title(f"RandAR, {log[-1]['images']:,} images seen: loss {log[-1]['loss']:.3f}")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    common.write_safely(path, lambda partial: figure.savefig(partial, format="png"))
    pyplot.close(figure)


def draw_samples(model, tokenizer, class_names, seed, title, path):
    """Eight samples of ten classes; every time the same classes, orders and random numbers, to compare."""
    device = next(model.parameters()).device
    grid = model.config.grid
    classes = spread_classes(range(len(class_names)), rows=10, columns=8)
    model.eval()
    generator = torch.Generator(device).manual_seed(seed)
    tokens = model.generate(classes.to(device), steps=decoding_steps(grid), generator=generator)
    model.train()
    pixels = common.to_uint8(tokenizer.decode(tokens, grid))
    common.save_picture(draw_grid(pixels, classes.tolist(), class_names, title), path)


# ------------------------------------------------------------------------------------------------------------
# The loop


def train(args):
    """Train as the command line says; see main. Writes the files that the top of this file lists."""
    out = pathlib.Path(args.out)  # nothing is written there before all that can be wrong has been checked
    device = common.pick_device(args.device)
    tokens, tokenizer_path = open_tokens(args.data, args.tokenizer, out, device)
    if not tokenizer_path.is_file():
        raise FileNotFoundError(f"the tokenizer {tokenizer_path} is missing: give its place with --tokenizer")
    tokenizer = load_tokenizer(tokenizer_path, device)
    if tokenizer.config.codes != tokens.codes:
        raise ValueError(f"{tokenizer_path} has {tokenizer.config.codes} codes, but the tokens were made "
                         f"with {tokens.codes}: give --tokenizer the one that made them")

    torch.manual_seed(args.seed)
    config = Config(tokens.grid, tokens.codes, len(tokens.class_names), **SIZES[args.size])
    model = RandAR(config).to(device).train()
    optimizer = make_optimizer(model, args.learning_rate)
    first, log = 0, []
    if args.resume:
        saved = common.load(out / "training.pt", device)
        if "optimizer" not in saved or saved["config"] != asdict(config):
            raise ValueError(f"{out}/training.pt is not a --size {args.size} model of these tokens: "
                             "resume with the --size and --data that it was started with")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, log = saved["step"], saved["log"]
    if first >= args.steps:
        raise ValueError(f"{out} holds {first} steps already: ask for more with --steps")
    common.writable_folder(out)
    if tokenizer_path.resolve() != (out / "tokenizer.pt").resolve():
        common.write_safely(out / "tokenizer.pt", lambda partial: shutil.copy(tokenizer_path, partial))

    def save(step):
        settings = {name: str(value) for name, value in vars(args).items() if value is not None}
        del settings["resume"], settings["out"]
        save_randar(model, out / "training.pt", optimizer=optimizer.state_dict(), step=step, log=log,
                    settings=settings, class_names=tokens.class_names)
        save_randar(model, out / "randar.pt", half=True, class_names=tokens.class_names, step=step)
        lines = "".join(json.dumps(line) + "\n" for line in log)
        common.write_safely(out / "log.jsonl", lambda partial: partial.write_text(lines))

    # bfloat16 has the range of float32, so the loss needs no scaling; weights and averages stay in float32.
    precision = common.fast_precision(device)
    autocast = torch.autocast(device.type, precision, enabled=precision is not torch.float32)
    loss_function = torch.compile(model.loss) if common.can_compile(device) else model.loss
    print(f"RandAR-{args.size}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, "
          f"on {len(tokens):,} images of {tokens.grid[0]} x {tokens.grid[1]} tokens. "
          f"The first step may take a minute. Pictures appear in {out} every {args.picture_every} steps.")
    stop = common.stop_at_signal()
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step", dynamic_ncols=True)
    losses, since = [], time.time()
    for step in bar:
        # All that is random in a step (orders, dropout) follows from its number, so that a resumed training
        # goes on exactly as it would have.
        torch.manual_seed(args.seed * 1_000_003 + step)
        rate = learning_rate(step, args.steps, args.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch, classes = (x.to(device) for x in tokens.batch(step, args.batch_size, args.seed))
        for part, part_classes in zip(batch.split(args.micro_batch), classes.split(args.micro_batch)):
            with autocast:
                loss = loss_function(part, part_classes) * (len(part) / len(batch))
            loss.backward()  # the gradients of the parts add up to those of the whole batch
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        pause = bool(stop) or done == args.steps or done % args.picture_every == 0
        if pause or done % args.report == 0:
            steps_since = done - (log[-1]["step"] if log else 0)
            mean_loss = (torch.stack(losses).sum() / steps_since).item()
            speed = steps_since * args.batch_size / (time.time() - since)
            log.append({"step": done, "images": done * args.batch_size, "loss": round(mean_loss, 5),
                        "learning_rate": rate, "images_per_second": round(speed, 1)})
            bar.set_postfix_str(f"loss {mean_loss:.3f}, lr {rate:.1e}, {speed:.0f} images/s")
            if not math.isfinite(mean_loss):
                raise ValueError(f"the loss is {mean_loss} at step {done}: lower --learning-rate")
            if pause:
                save(done)
                draw_loss(log, out / "loss.png")
            if pause and not stop:
                title = f"RandAR-{args.size}, step {done:,}, loss {mean_loss:.3f}"
                draw_samples(model, tokenizer, tokens.class_names, args.seed, title, out / "samples.png")
            losses, since = [], time.time()
        if stop:
            bar.close()
            print(f"saved step {done:,}; to go on: python train.py --resume --out {args.out}")
            raise KeyboardInterrupt
    print(f"loss {log[-1]['loss']:.3f}; see {out}/samples.png and {out}/loss.png; "
          f"for more pictures: python sample.py --ckpt {out}/randar.pt")


def main():
    parser = common.command_line(__doc__)
    parser.add_argument("--size", default="toy", choices=SIZES, help="of the model (default: toy)")
    parser.add_argument("--data", help="token folder or folder of class folders (default: the toy world)")
    parser.add_argument("--tokenizer", help="default: what made the tokens; for the toy world, ours")
    parser.add_argument("--out", default="out", help="folder for weights and pictures (default: out)")
    parser.add_argument("--resume", action="store_true", help="go on with the training in --out")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: the recipe's)")
    parser.add_argument("--batch-size", type=int, help="images a step (default: the recipe's)")
    parser.add_argument("--micro-batch", type=int, help="of these at a time (default: the recipe's)")
    parser.add_argument("--learning-rate", type=float, help="at its peak (default: the recipe's)")
    parser.add_argument("--report", type=int, default=20, help="steps to a line of the log (default: 20)")
    parser.add_argument("--picture-every", type=int, default=250, metavar="STEPS",
                        help="steps to a checkpoint and new pictures (default: 250)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    args = parser.parse_args()
    with common.one_line_errors():
        state = pathlib.Path(args.out) / "training.pt"
        if args.resume and not state.exists():
            raise ValueError(f"{args.out} holds no training to go on with: start it without --resume")
        if args.resume:
            # The settings of the start are the defaults now: --steps, say, can still be given anew. The
            # tokenizer is the copy that was made then, whatever has become of the original since.
            settings = common.load(state).get("settings", {})
            parser.set_defaults(**settings | {"tokenizer": str(state.with_name("tokenizer.pt"))})
            args = parser.parse_args()
        elif state.exists():
            raise ValueError(f"{args.out} holds a training already: add --resume to go on with it, or give "
                             "another folder with --out")
        for name, value in RECIPES[args.size].items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        for name in ("steps", "batch_size", "micro_batch", "learning_rate", "report", "picture_every"):
            if not getattr(args, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
        train(args)


if __name__ == "__main__":
    main()
