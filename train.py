"""Train a RandAR: python train.py

With no argument: the smallest model on the toy world, pictures within minutes. The recipe of the paper
(Sec. 4.1) is --size L --data TOKENS; every number of it can be overridden.

    RECIPES, learning_rate, make_optimizer    what the paper fixed
    open_tokens                               the data: the toy world, a token folder, or a folder of images
    Pictures                                  loss curve and sample grid, renewed as the training goes on
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

import matplotlib
import torch
from tqdm import tqdm

import common
import data
import toy
from randar import SIZES, Config, RandAR, save_randar
from sample import decoding_steps, draw_grid, spread_classes
from tokenizer import load_tokenizer

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (after the choice of a backend that needs no screen)

# ------------------------------------------------------------------------------------------------------------
# The recipe (Sec. 4.1)

RECIPES = {name: dict(steps=360_000, batch_size=1024, learning_rate=4e-4) for name in SIZES}
RECIPES["toy"] = dict(steps=2500, batch_size=64, learning_rate=3e-3)  # ten minutes on two CPU cores
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

    path: a token folder, a folder of class folders of images (turned into tokens in out/tokens first), or None
    for the toy world. Raises FileNotFoundError or ValueError where there is nothing to train on.
    """
    encoded = out / "tokens"
    is_tokens = path is not None and (pathlib.Path(path) / "meta.json").is_file()
    if not is_tokens and not (encoded / "meta.json").is_file():
        if path is None:
            tokenizer_path = tokenizer_path or common.CHECKPOINTS / "tokenizer.pt"
            tokenizer = load_tokenizer(tokenizer_path, device)
            images, labels, _ = toy.make(TOY_IMAGES, seed=0)
            batches = ((range(i, i + 250), images[i : i + 250]) for i in range(0, TOY_IMAGES, 250))
            data.encode_images(batches, TOY_IMAGES, labels, toy.CLASSES, tokenizer, tokenizer_path, encoded,
                               toy.SIDE, crops=1)
        else:
            paths, labels, names = data.list_images(path)
            if tokenizer_path is None:
                raise ValueError(f"{path} holds images: give the --tokenizer that shall turn them into tokens "
                                 "(python tokenizer.py train makes one)")
            tokenizer, skipped = load_tokenizer(tokenizer_path, device), []
            size = tokenizer.config.image_size
            data.encode_images(data.read_images(paths, size, skipped=skipped), len(paths), labels, names,
                               tokenizer, tokenizer_path, encoded, size)
            data.report_skipped(skipped)
    tokens = data.TokenFolder(path if is_tokens else encoded)
    tokenizer_path = pathlib.Path(tokenizer_path or tokens.tokenizer)
    if not tokenizer_path.is_file():
        raise FileNotFoundError(f"the tokenizer {tokenizer_path} is missing: give its place with --tokenizer")
    return tokens, tokenizer_path


# ------------------------------------------------------------------------------------------------------------
# What people watch


class Pictures:
    """Renews the loss curve and a grid of samples: the same classes, orders and random numbers every time."""

    def __init__(self, model, tokens, tokenizer, out, seed):
        self.model, self.tokenizer, self.out, self.seed = model, tokenizer, out, seed
        self.class_names = tokens.class_names
        self.classes = spread_classes(range(len(self.class_names)), rows=10, columns=8)

    def samples(self, title):
        device = next(self.model.parameters()).device
        self.model.eval()
        generator = torch.Generator(device).manual_seed(self.seed)
        classes = self.classes.to(device)
        steps = decoding_steps(self.model.config.grid)
        images = self.tokenizer.decode(self.model.generate(classes, steps=steps, generator=generator),
                                       self.model.config.grid)
        self.model.train()
        sheet = draw_grid(common.to_uint8(images), self.classes.tolist(), self.class_names, title)
        common.save_picture(sheet, self.out / "samples.png")

    def loss_curve(self, log):
        figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
        axes.plot([line["step"] for line in log], [line["loss"] for line in log], color="black", linewidth=1.2)
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats a token")
        axes.set_title(f"RandAR, {log[-1]['images']:,} images seen: loss {log[-1]['loss']:.3f}")
        axes.grid(alpha=0.3)
        figure.tight_layout()
        common.write_safely(self.out / "loss.png", lambda path: figure.savefig(path, format="png"))
        pyplot.close(figure)


# ------------------------------------------------------------------------------------------------------------
# The loop


def train(args):
    out = common.writable_folder(args.out)
    device = common.pick_device(args.device)
    tokens, tokenizer_path = open_tokens(args.data, args.tokenizer, out, device)
    tokenizer = load_tokenizer(tokenizer_path, device)
    if tokenizer.config.codes != tokens.codes:
        raise ValueError(f"{tokenizer_path} has {tokenizer.config.codes} codes, the tokens in {args.data} have "
                         f"{tokens.codes}: give --tokenizer the one that made them")
    if tokenizer_path.resolve() != (out / "tokenizer.pt").resolve():
        common.write_safely(out / "tokenizer.pt", lambda partial: shutil.copy(tokenizer_path, partial))

    torch.manual_seed(args.seed)
    config = Config(tokens.grid, tokens.codes, len(tokens.class_names), **SIZES[args.size])
    model = RandAR(config).to(device).train()
    optimizer = make_optimizer(model, args.learning_rate)
    first, log = 0, []
    if args.resume:
        saved = common.load(out / "training.pt", device)
        if saved["config"] != vars(config):
            raise ValueError(f"{out}/training.pt is a model of {saved['config']}, but the arguments ask for "
                             f"{vars(config)}: resume with the --size and --data it was started with")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, log = saved["step"], saved["log"]

    def save(step):
        settings = {name: value if value is None else str(value) for name, value in vars(args).items()}
        save_randar(model, out / "training.pt", optimizer=optimizer.state_dict(), step=step, log=log,
                    settings=settings, class_names=tokens.class_names)
        save_randar(model, out / "randar.pt", half=True, class_names=tokens.class_names, step=step)
        lines = "".join(json.dumps(line) + "\n" for line in log)
        common.write_safely(out / "log.jsonl", lambda partial: partial.write_text(lines))

    # bf16 needs no loss scaling; the weights, and AdamW's averages, stay in float32.
    precision = common.fast_precision(device)
    autocast = torch.autocast(device.type, precision, enabled=precision is not torch.float32)
    loss_function = torch.compile(model.loss) if common.can_compile(device) else model.loss
    pictures = Pictures(model, tokens, tokenizer, out, args.seed)
    stop = common.stop_at_signal()
    count = sum(p.numel() for p in model.parameters())
    print(f"RandAR-{args.size}, {count / 1e6:.1f}M parameters, on {len(tokens):,} images of {tokens.grid[0]} x "
          f"{tokens.grid[1]} tokens; pictures in {out}/. The first step compiles: up to a minute.")
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step", dynamic_ncols=True)
    recent, seconds = [], time.time()
    step = first
    for step in bar:
        # All randomness of a step (orders, dropouts) follows from its number: a resumed training repeats it.
        torch.manual_seed(args.seed * 1_000_003 + step)
        rate = learning_rate(step, args.steps, args.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch, classes = (x.to(device) for x in tokens.batch(step, args.batch_size, args.seed))
        total = 0.0
        for part, part_classes in zip(batch.split(args.micro_batch), classes.split(args.micro_batch)):
            with autocast:
                loss = loss_function(part, part_classes)
            loss = loss * (len(part) / len(batch))  # gradients add up to those of the whole batch
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(total)

        done = step + 1
        if done % args.report == 0 or done == args.steps:
            loss = torch.stack(recent).mean().item()
            speed = len(recent) * args.batch_size / (time.time() - seconds)
            log.append({"step": done, "images": done * args.batch_size, "loss": round(loss, 5),
                        "learning_rate": rate, "images_per_second": round(speed, 2)})
            bar.set_postfix_str(f"loss {loss:.3f}, lr {rate:.1e}, {speed:.0f} images/s")
            recent = []
            if not math.isfinite(loss):
                raise ValueError(f"the loss is {loss} at step {done}: lower --learning-rate and --resume")
        if done % args.picture_every == 0 or done == args.steps:
            save(done)
            pictures.loss_curve(log or [{"step": done, "images": 0, "loss": float("nan")}])
            pictures.samples(f"RandAR-{args.size}, step {done:,}, loss {log[-1]['loss']:.3f}" if log else "")
        if not recent:
            seconds = time.time()
        if stop:
            save(done)
            print(f"\nsaved at step {done:,}; to go on: python train.py --resume --out {args.out}")
            raise KeyboardInterrupt
    print(f"done: loss {log[-1]['loss']:.3f}" if log else f"nothing left to do: {first:,} steps are done")
    print(f"pictures: {out}/samples.png, {out}/loss.png; draw more: python sample.py --ckpt {out}/randar.pt")


def main():
    parser = common.command_line(__doc__)
    parser.add_argument("--size", default="toy", choices=SIZES, help="of the model (default: toy)")
    parser.add_argument("--data", help="a token folder, or a folder of class folders of images (default: the toy world)")
    parser.add_argument("--tokenizer", help="default: the one that made the tokens; for the toy world, ours")
    parser.add_argument("--out", default="out", help="a folder for weights and pictures (default: out)")
    parser.add_argument("--resume", action="store_true", help="go on with the training in --out, with its settings")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: the recipe's)")
    parser.add_argument("--batch-size", type=int, help="images a step (default: the recipe's)")
    parser.add_argument("--micro-batch", type=int, default=64, help="images at a time, as memory allows (default: 64)")
    parser.add_argument("--learning-rate", type=float, help="at its peak (default: the recipe's)")
    parser.add_argument("--report", type=int, default=20, help="steps between two lines of the log (default: 20)")
    parser.add_argument("--picture-every", type=int, default=250, metavar="STEPS",
                        help="steps between two savings and renewals of the pictures (default: 250)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    args = parser.parse_args()
    with common.one_line_errors():
        state = pathlib.Path(args.out) / "training.pt"
        if args.resume:
            # The settings of the start are the defaults now; --steps, say, can still be given anew.
            parser.set_defaults(**common.load(state).get("settings", {}))
            args = parser.parse_args()
        elif state.exists():
            raise ValueError(f"{args.out} already holds a training: add --resume to go on with it, "
                             "or give another folder with --out")
        for name, value in RECIPES[args.size].items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        for name in ("steps", "batch_size", "micro_batch", "learning_rate", "report", "picture_every"):
            if not getattr(args, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
        train(args)


if __name__ == "__main__":
    main()
