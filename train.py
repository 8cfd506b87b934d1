"""Train a RandAR: python train.py

With no argument: the smallest model on the toy world, pictures within minutes. The recipe of the paper
(Sec. 4.1) is --size L --data TOKENS; every number of it can be overridden. On many GPUs, the same command:
torchrun --nproc-per-node 8 train.py --size XXL --data TOKENS. The models of rar.py are trained in the same
way: --model rar for RAR, --position dense or merge for RandAR's ablations.

    RECIPE, learning_rate, make_optimizer     what the paper fixed
    open_tokens, training_batch               the data: the toy world, a token folder, or a folder of images
    training_flops                            what a step costs
    draw_loss, draw_samples                   what people watch while it trains
    open_run, save, train                     the loop, and what it starts from

    out/randar.pt      the weights (RAR's: rar.pt)     out/samples.png   what the model draws now
    out/training.pt    all of it, for --resume         out/loss.png      the curve
    out/tokenizer.pt   copied here, for sample.py      out/log.jsonl     a line of JSON per report
"""

import contextlib
import json
import math
import pathlib
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from types import SimpleNamespace

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import common
import data
import toy
from randar import ORDERS, SIZES, Config, generation_order
from rar import KINDS, RAR_SIZES, RARConfig, randomness, save_model
from sample import default_steps, draw_grid, names_of_classes, spread_classes
from vqgan import load_tokenizer

# ------------------------------------------------------------------------------------------------------------
# The recipe (Sec. 4.1): each line is a flag of the command, too

RECIPE = {
    "steps": (360_000, "optimiser steps"),
    "batch_size": (1024, "images a step, of all processes together"),
    "micro_batch": (32, "of these at a time, as many as fit into the memory"),
    "learning_rate": (4e-4, "at its peak"),
    "last_learning_rate": (1e-5, "in the end"),
    "descent": (1 / 6, "share of the steps in which it falls"),
    "weight_decay": (0.05, "of matrices"),
    "clip": (1.0, "largest norm of the gradient"),
    "dropout": (0.1, "of token embeddings, attention and feed-forward outputs"),
    "class_dropout": (0.1, "how often the class is hidden"),
    "picture_every": (500, "steps to a checkpoint and new pictures"),
}
TOY = dict(steps=1200, batch_size=64, micro_batch=64, learning_rate=3e-3, dropout=0.0, picture_every=250)
TOY_IMAGES = 40_000
BAD_STEPS = 10  # without a finite loss and gradient, in a row: after these the training stops


def learning_rate(step, steps, peak, last=1e-5, descent=1 / 6):
    """Constant for the first 5/6 of the steps, then linear to `last`."""
    if step < steps * (1 - descent):
        return peak
    return last + (peak - last) * (steps - step) / (steps * descent)


def make_optimizer(model, peak, weight_decay=0.05):
    """AdamW; weight decay on matrices only: to pull a norm's scale towards zero would only do harm."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)


# ------------------------------------------------------------------------------------------------------------
# The data


def open_tokens(path, tokenizer_path, out, device, processes=1):
    """The TokenFolder to train on, and the path of the tokenizer that made it.

    path: a token folder, a folder of class folders of images (turned into tokens in out/tokens first), or
    None for the toy world. Raises FileNotFoundError or ValueError where there is nothing to train on.
    """
    if path is not None and (pathlib.Path(path) / "meta.json").is_file():
        tokens = data.TokenFolder(path)
        return tokens, pathlib.Path(tokenizer_path or tokens.tokenizer)
    encoded = out / "tokens"
    if path is not None and not pathlib.Path(path).is_dir():
        raise FileNotFoundError(f"no folder {path}: give a token folder, or one of class folders of images, "
                                "with --data")
    if path is None:
        source, tokenizer_path = "toy world", tokenizer_path or common.CHECKPOINTS / "tokenizer.pt"
    else:
        source, (paths, labels, names) = pathlib.Path(path).resolve(), data.list_images(path)
        if tokenizer_path is None:
            raise ValueError(f"{path} holds images: give the --tokenizer that shall turn them into tokens "
                             "(python tokenizer.py train makes one)")
        if processes > 1:
            raise ValueError(f"{path} holds images: turn them into tokens first, python tokenizer.py encode; "
                             "that is no work for many processes")
    tokenizer_path = pathlib.Path(tokenizer_path)
    if (encoded / "meta.json").is_file():  # from an earlier start: as good as new if nothing has changed
        tokens = data.TokenFolder(encoded)
        same_tokenizer = tokenizer_path.resolve() in (pathlib.Path(tokens.tokenizer),
                                                      (out / "tokenizer.pt").resolve())
        if tokens.source in (str(source), None) and same_tokenizer:
            return tokens, tokenizer_path
    tokenizer = load_tokenizer(tokenizer_path, device)
    if (encoded / "meta.json").is_file():  # of other images or another tokenizer: ours to replace
        (encoded / "meta.json").unlink()
    if path is None:
        common.writable_folder(encoded)  # to know it before a minute of drawing
        images, labels, _ = toy.make(TOY_IMAGES, seed=0)
        data.encode_images(images, labels, toy.CLASSES, source, tokenizer, tokenizer_path, encoded, toy.SIDE,
                           crops=1)
    else:
        data.encode_images(paths, labels, names, source, tokenizer, tokenizer_path, encoded,
                           tokenizer.config.image_size)
    return data.TokenFolder(encoded), tokenizer_path


def training_batch(tokens, step, args, part):
    """What step number `step` trains on: tokens [n, N], classes [n], orders [n, N], hidden classes bool [n].

    part: a slice of the batch, the share of this process. All that chance decides follows from the seed and
    the number of the step, for the whole batch: so a training that is resumed goes on exactly as it would
    have, and many processes together see exactly what one alone would.
    """
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    orders = generation_order(args.order, args.batch_size, tokens.grid, generator)  # afresh for every image
    hidden = torch.rand(args.batch_size, generator=generator) < args.class_dropout
    if args.anneal:
        random = generation_order("random", args.batch_size, tokens.grid, generator)
        r = randomness(step, args.steps, *args.anneal)
        orders = torch.where(torch.rand(args.batch_size, 1, generator=generator) < r, random, orders)
    return *tokens.batch(step, args.batch_size, args.seed, part), orders[part], hidden[part]


# ------------------------------------------------------------------------------------------------------------
# What it costs


def training_flops(model):
    """Floating-point operations of one training image: a forward pass, and a backward pass twice as dear."""
    config, number = model.config, math.prod(model.config.grid)
    length = number * (model.predicting.step or 1)  # 2 N tokens; N, where none are inserted
    in_layers = sum(p.numel() for p in model.layers.parameters())  # each meets every one of them once
    matrices = length * in_layers + number * model.output.weight.numel()
    # Query by key, then weights by value: d multiplications each for every pair of tokens, half of which a
    # causal model needs.
    attention = config.n_layer * 2 * config.dim * length**2 / 2
    return 3 * 2 * (matrices + attention)  # 2: a multiplication and an addition


# ------------------------------------------------------------------------------------------------------------
# What people watch


def draw_loss(log, path):
    """The loss curve, from the lines of the log."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="tight")
    axes = figure.subplots()
    axes.plot([line["step"] for line in log], [line["loss"] for line in log], color="black", linewidth=1.2,
              marker="." if len(log) < 3 else None)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.set_title(f"{log[-1]['images']:,} images seen: loss {log[-1]['loss']:.3f}")
    axes.grid(alpha=0.3)
    common.write_safely(path, lambda partial: figure.savefig(partial, format="png"))


def draw_samples(run, args, title):
    """Eight samples of ten classes; every time the same classes, orders and random numbers, to compare."""
    model, class_names = run.model, run.tokens.class_names
    classes = spread_classes(range(len(class_names)), rows=10, columns=8)
    model.eval()
    generator = torch.Generator(run.device).manual_seed(args.seed)
    steps = default_steps(model)
    tokens = model.generate(classes.to(run.device), args.order, steps=steps, generator=generator)
    model.train()
    pixels = common.to_uint8(run.tokenizer.decode(tokens, model.config.grid))
    names = [known[0] for known in names_of_classes(class_names, len(class_names))]
    common.save_picture(draw_grid(pixels, classes.tolist(), names, title), run.out / "samples.png")


# ------------------------------------------------------------------------------------------------------------
# The loop


class TrainingLoss(torch.nn.Module):
    """The loss as a module of its own: DistributedDataParallel wraps a module, and calls its forward."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, classes, orders, hidden):
        return self.model.loss(tokens, classes, orders, hidden)


def open_run(args):
    """All that a training starts from, or goes on from: a namespace. Raises ValueError, FileNotFoundError.

    Nothing is written before all that can be wrong has been checked, except tokens that are to be made.
    """
    rank, processes, device = common.join_processes(args.device)
    if args.batch_size % processes:
        raise ValueError(f"--batch-size {args.batch_size} cannot be shared by {processes} processes: give a "
                         "multiple of their number")
    out = pathlib.Path(args.out)
    if rank > 0:
        dist.barrier()  # until the first process has made the tokens
    tokens, tokenizer_path = open_tokens(args.data, args.tokenizer, out, device, processes)
    if rank == 0 and processes > 1:
        dist.barrier()
    if not tokenizer_path.is_file():
        raise FileNotFoundError(f"the tokenizer {tokenizer_path} is missing: give its place with --tokenizer")
    tokenizer = load_tokenizer(tokenizer_path, device) if rank == 0 else None
    if tokenizer and tokenizer.config.codes != tokens.codes:
        raise ValueError(f"{tokenizer_path} has {tokenizer.config.codes} codes, but the tokens were made "
                         f"with {tokens.codes}: give --tokenizer the one that made them")

    torch.manual_seed(args.seed)
    kind = "rar" if args.model == "rar" else args.position
    sizes, make_config = (RAR_SIZES, RARConfig) if kind == "rar" else (SIZES, Config)
    settings = sizes[args.size] | dict(dropout=args.dropout, class_dropout=args.class_dropout)
    config = make_config(tokens.grid, tokens.codes, len(tokens.class_names), **settings)
    model = KINDS[kind](config).to(device).train()
    model.checkpoint_activations = args.checkpoint_activations
    name = ("RAR" if kind == "rar" else "RandAR" if kind == "rope" else f"RandAR ({kind})") + f"-{args.size}"
    optimizer = make_optimizer(model, args.learning_rate, args.weight_decay)
    step, log, losses = 0, [], []  # losses: of the steps since the last line of the log
    if args.resume:
        saved = common.load(out / "training.pt", device)
        if ("optimizer" not in saved or saved["config"] != asdict(config)
                or saved.get("kind", "rope") != kind):  # RandAR's older files do not say their kind
            raise ValueError(f"{out}/training.pt is not a --size {args.size} model of these tokens, or no "
                             f"{name}: resume with the --size, --data, ... that it was started with")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, log, losses = saved["step"], saved["log"], saved["losses"]
    if step >= args.steps:
        raise ValueError(f"{out} holds {step} steps already: ask for more with --steps")
    if rank == 0:
        common.writable_folder(out)
        if tokenizer_path.resolve() != (out / "tokenizer.pt").resolve():
            common.write_safely(out / "tokenizer.pt", lambda partial: shutil.copy(tokenizer_path, partial))
    return SimpleNamespace(rank=rank, processes=processes, device=device, out=out, tokens=tokens, name=name,
                           tokenizer=tokenizer, model=model, optimizer=optimizer, step=step, log=log,
                           losses=losses)


def save(run, args):
    """The files of `out`. training.pt alone is enough to go on: a crash between two of them costs nothing."""
    kept = {name: value for name, value in vars(args).items() if value is not None}
    del kept["resume"], kept["out"]
    more = dict(class_names=run.tokens.class_names, order=args.order, step=run.step)
    save_model(run.model, run.out / "training.pt", optimizer=run.optimizer.state_dict(), log=run.log,
               losses=run.losses, settings=kept, **more)
    save_model(run.model, run.out / f"{args.model}.pt", half=True, **more)
    lines = "".join(json.dumps(line) + "\n" for line in run.log)
    common.write_safely(run.out / "log.jsonl", lambda partial: partial.write_text(lines))
    if run.log:
        draw_loss(run.log, run.out / "loss.png")


def gradients(network, loss_function, batch, args, run, part):
    """Add up the gradients of a batch, a micro-batch at a time. Returns the loss, a scalar on the device.

    loss_function: the network, compiled or not; part: the slice of the whole batch that `batch` is.
    """
    # bfloat16 has the range of float32, so the loss needs no scaling; weights and averages stay in float32.
    precision = common.fast_precision(run.device)
    autocast = torch.autocast(run.device.type, precision, enabled=precision is not torch.float32)
    share, total = part.stop - part.start, torch.zeros((), device=run.device)
    for place in range(0, share, args.micro_batch):
        pieces = [x[place : place + args.micro_batch] for x in batch]
        torch.manual_seed((args.seed * 1_000_003 + run.step) * 1_000_003 + part.start + place)  # of dropout
        exchange = run.processes == 1 or place + args.micro_batch >= share  # gradients: in the end only
        with contextlib.nullcontext() if exchange else network.no_sync():
            with autocast:
                loss = loss_function(*pieces) * (len(pieces[0]) / share)
            loss.backward()  # the gradients of the parts add up to those of the whole batch
        total += loss.detach() / run.processes
    return total


def train(args):
    """Train as the command line says; see main. Writes the files that the top of this file lists."""
    run = open_run(args)
    device, processes, first_process, tokens = run.device, run.processes, run.rank == 0, run.tokens
    if device.type == "cpu":  # or two threads would add up gradients in the order in which they come: a
        torch.use_deterministic_algorithms(True)  # resumed training shall be the very same, to the last bit
        torch.utils.deterministic.fill_uninitialized_memory = False  # which only finds mistakes, and costs
    network, precision = TrainingLoss(run.model), common.fast_precision(device)
    if processes > 1:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)
    loss_function = torch.compile(network) if common.can_compile(device) else network
    peak = common.matrix_rate(device, precision) * processes if device.type == "cuda" else None
    if first_process:
        print(f"{run.name}, {sum(p.numel() for p in run.model.parameters()) / 1e6:.1f}M parameters, "
              f"on {len(tokens):,} images of {tokens.grid[0]} x {tokens.grid[1]} tokens. The first step may "
              f"take a minute. Pictures appear in {run.out} every {args.picture_every} steps.")
    if first_process and peak:
        print(f"MFU is the share of {peak / 1e12:.0f} TFLOP/s, measured just now with products of two "
              f"8192 x 8192 matrices in {str(precision).removeprefix('torch.')}")

    share = args.batch_size // processes
    part = slice(run.rank * share, (run.rank + 1) * share)
    reader = ThreadPoolExecutor(1)  # reads the next batch from the disk while this one is computed
    coming = reader.submit(training_batch, tokens, run.step, args, part)
    stop, bad_steps, seconds, timed_steps = common.stop_at_signal(), 0, 0.0, 0
    bar = tqdm(range(run.step, args.steps), initial=run.step, total=args.steps, unit="step",
               dynamic_ncols=True, disable=not first_process)
    for step in bar:
        started = time.perf_counter()
        rate = learning_rate(step, args.steps, args.learning_rate, args.last_learning_rate, args.descent)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        batch = [x.to(device) for x in coming.result()]
        coming = reader.submit(training_batch, tokens, step + 1, args, part)
        asked = torch.tensor(float(len(stop) > 0), device=device)  # whether to stop: any process may be asked
        summary = torch.stack([gradients(network, loss_function, batch, args, run, part), asked])
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), args.clip)
        if processes > 1:
            dist.all_reduce(summary)
        step_loss, asked_to_stop = summary.tolist()
        if math.isfinite(step_loss) and math.isfinite(norm):
            run.optimizer.step()
            run.losses.append(step_loss)
            bad_steps = 0
        else:  # such a gradient would spoil the weights and the optimiser's averages for good
            bad_steps += 1
            if first_process:
                tqdm.write(f"step {step + 1} skipped: loss {step_loss:g}, norm of the gradient {norm:g}")
        run.optimizer.zero_grad(set_to_none=True)
        seconds, timed_steps = seconds + time.perf_counter() - started, timed_steps + 1
        run.step = done = step + 1
        if run.losses and (done % args.report == 0 or done == args.steps):
            speed = timed_steps * args.batch_size / seconds
            line = {"step": done, "images": done * args.batch_size,
                    "loss": math.fsum(run.losses) / len(run.losses), "learning_rate": rate,
                    "images_per_second": round(speed, 1),
                    "tokens_per_second": round(speed * math.prod(tokens.grid))}
            shown = f"loss {line['loss']:.3f}, lr {rate:.1e}, {speed:.0f} images/s"
            if peak:
                line["mfu"] = round(speed * training_flops(run.model) / peak, 4)
                shown += f", MFU {line['mfu']:.0%}"
            run.log.append(line)
            bar.set_postfix_str(shown)
            run.losses, seconds, timed_steps = [], 0.0, 0
        if bad_steps == BAD_STEPS:
            raise ValueError(f"the loss or its gradient was not finite in {BAD_STEPS} steps in a row, up to "
                             f"step {done}: start, or --resume from the last checkpoint, with a lower "
                             "--learning-rate")
        if first_process and (asked_to_stop or done == args.steps or done % args.picture_every == 0):
            save(run, args)
            if not asked_to_stop:
                title = f"{run.name}, step {done:,}, loss {step_loss:.3f}"
                draw_samples(run, args, title)
        if asked_to_stop:
            bar.close()
            if first_process:
                print(f"saved step {done:,}; to go on: python train.py --resume --out {args.out}")
            raise KeyboardInterrupt
    reader.shutdown()
    if first_process:
        print(f"loss {run.log[-1]['loss']:.3f}; see {run.out}/samples.png and {run.out}/loss.png; "
              f"for more pictures: python sample.py --ckpt {run.out}/{args.model}.pt")


def main():
    parser = common.command_line(__doc__)
    parser.add_argument("--model", default="randar", choices=("randar", "rar"), help="(default: randar)")
    parser.add_argument("--size", default="toy", choices=SIZES | RAR_SIZES, help="(default: toy; B: RAR's)")
    parser.add_argument("--position", default="rope", choices=("rope", "dense", "merge"),
                        help="RandAR's position instruction tokens (default: rope; the others: rar.py)")
    parser.add_argument("--data", help="token folder or folder of class folders (default: the toy world)")
    parser.add_argument("--tokenizer", help="default: what made the tokens; for the toy world, ours")
    parser.add_argument("--out", default="out", help="folder for weights and pictures (default: out)")
    parser.add_argument("--resume", action="store_true", help="go on with the training in --out")
    parser.add_argument("--order", choices=ORDERS, metavar="ORDER", type=lambda x: x.replace("-", "_"),
                        help="of the tokens: random, or raster for the paper's counterpart (default: random; "
                             "raster for RAR and with --anneal)")
    parser.add_argument("--anneal", nargs=2, type=float, metavar=("START", "END"),
                        help="random orders, from START on fewer and fewer, from END on only --order: "
                             "shares of the steps from 0 to 1 (default: not at all; RAR: 0.5 0.75)")
    for name, (value, text) in RECIPE.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value),
                            help=f"{text} (default: {value:g}; toy: {TOY.get(name, value):g})")
    parser.add_argument("--checkpoint-activations", action="store_true",
                        help="compute each layer twice, to keep less of it in memory")
    parser.add_argument("--report", type=int, default=20, help="steps to a line of the log (default: 20)")
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
            for name in ("batch_size", "seed", "order", "anneal"):  # or it would not be the same training
                if name in settings and getattr(args, name) != settings[name]:
                    raise ValueError(f"{args.out} was begun with --{name.replace('_', '-')} "
                                     f"{settings[name]}: leave that, or start anew with another --out")
        elif state.exists():
            raise ValueError(f"{args.out} holds a training already: add --resume to go on with it, or give "
                             "another folder with --out")
        if args.model == "rar" and args.position != "rope":
            raise ValueError(f"--position {args.position} is of RandAR's models: leave out --model rar")
        sizes = RAR_SIZES if args.model == "rar" else SIZES
        if args.size not in sizes:
            raise ValueError(f"--model {args.model} has the sizes {', '.join(sizes)}, not {args.size}")
        if args.model == "rar" and args.anneal is None:
            args.anneal = [0.5, 0.75]
        if args.anneal and not 0 <= args.anneal[0] <= args.anneal[1] <= 1:
            raise ValueError("--anneal takes two shares of the steps, 0 <= START <= END <= 1, not "
                             f"{args.anneal[0]:g} {args.anneal[1]:g}")
        args.order = args.order or ("raster" if args.anneal else "random")
        for name, (value, _) in RECIPE.items():
            if getattr(args, name) is None:
                setattr(args, name, TOY.get(name, value) if args.size in ("tiny", "toy") else value)
        for name in ("steps", "batch_size", "micro_batch", "learning_rate", "clip", "picture_every",
                     "report"):
            if not getattr(args, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
        if args.seed < 0:
            raise ValueError(f"--seed must be 0 or more, not {args.seed}")
        for name in ("last_learning_rate", "descent", "weight_decay", "dropout", "class_dropout"):
            if not 0 <= getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be from 0 to below 1, not "
                                 f"{getattr(args, name)}")
        train(args)


if __name__ == "__main__":
    main()
