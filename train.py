"""Train a RandAR: python train.py

Without arguments: the smallest model on the toy world, pictures within minutes. The paper's recipe
(Sec. 4.1) is --size L --data TOKENS; each of its numbers is a flag. On many GPUs the same command:
torchrun --nproc-per-node 8 train.py --size XXL --data TOKENS. The models of rar.py learn in the
same way: --model rar for RAR, --position dense or merge for RandAR's ablations.

    RECIPE, learning_rate, make_optimizer   what the paper fixed
    open_tokens, training_batch             what a training step reads
    train                                   the loop: the heart of this file
    report ... draw_loss                    what people watch meanwhile
    Run, open_run, save, make_network       what a training starts from, and goes on from
    training_flops, matrix_rate             what a step costs

Written into the folder --out:

    randar.pt (rar.pt)   the weights                   samples.png   what the model draws now
    training.pt          all of it, for --resume       loss.png      the curves
    tokenizer.pt         copied here, for sample.py    log.jsonl     a line of JSON for each report
"""

import functools
import json
import math
import pathlib
import shlex
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from randar import ORDERS, SIZES, RandAR, generation_order, save_randar
from rar import KINDS, RAR_SIZES, randomness
from support import border, classes, data, pictures, toy
from support.border import UserError, fraction, positive_float, positive_int
from tokenizer import Tokenizer, load_tokenizer

# ------------------------------------------------------------------------------------------------
# The recipe
#
# The numbers are the paper's (Sec. 4.1), but gradient clipping and dropout in layers: these are the
# released code's. The toy world takes a larger step, and so small a model need not forget anything.

RECIPE = {  # flag: (default, type, text)
    "steps": (360_000, positive_int, "training steps"),
    "batch_size": (1024, positive_int, "images a step, of all processes together"),
    "micro_batch": (32, positive_int, "of these at a time, as many as fit into the memory"),
    "learning_rate": (4e-4, positive_float, "at its peak"),
    "min_lr": (1e-5, fraction, "the learning rate in the end"),
    "descent": (1 / 6, fraction, "share of the steps in which it falls"),
    "weight_decay": (0.05, fraction, "of matrices"),
    "grad_clip": (1.0, positive_float, "largest norm of the gradient"),
    "dropout": (0.1, fraction, "of token embeddings and of layers' outputs"),
    "class_dropout": (0.1, fraction, "how often the class is hidden"),
    "picture_every": (500, positive_int, "steps to a checkpoint, held-out loss and pictures"),
}
TOY = {"steps": 1200, "batch_size": 64, "micro_batch": 64, "learning_rate": 3e-3, "dropout": 0.0,
       "picture_every": 250}  # instead, for the sizes
SIZES_OF = {"randar": SIZES, "rar": RAR_SIZES}
TOY_SIZES, TOY_IMAGES = ("tiny", "toy"), 40_000
HELD_OUT = 512  # images at most, to measure the loss of: two seconds for the toy sizes
BAD_STEPS = 10  # without a finite loss and gradient, in a row: these end the training


def learning_rate(step, steps, peak, last=1e-5, descent=1 / 6):
    """Constant for the first 5/6 of the steps, then linear to `last`."""
    if step < steps * (1 - descent):
        return peak
    return last + (peak - last) * (steps - step) / (steps * descent)


def make_optimizer(model, peak, weight_decay=0.05):
    """AdamW; weight decay on matrices only: to pull a norm's scale towards zero would do harm."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)


# ------------------------------------------------------------------------------------------------
# What a step reads
#
# Tokens, not images: tokenizer.py has turned these into a folder of tokens, once and for all.


def open_tokens(args, rank, processes, device):
    """The TokenFolder of --data, or the toy world: drawn and encoded once, into OUT/tokens.

    The work of one process; the others wait.
    """
    folder = pathlib.Path(args.data or f"{args.out}/tokens")
    if args.data is None and rank == 0 and not (folder / "labels.npy").is_file():
        path = args.tokenizer or border.CHECKPOINTS / "tokenizer.pt"
        tokenizer = load_tokenizer(path, device)
        border.writable_folder(folder)  # to know it before a minute of drawing
        images, labels, _ = toy.make(TOY_IMAGES, seed=0)
        data.encode_images(images, labels, toy.CLASSES, tokenizer, path, folder, crops=1)
    if processes > 1:
        dist.barrier()
    return data.TokenFolder(folder)


def training_batch(tokens, step, args, part):
    """What a training step reads: tokens [n, N], classes [n], orders [n, N], drop_class bool [n].

    part: a slice of the batch, the n images of this process. All chance follows from the seed and
    the step's number, for the whole batch: a resumed training goes on exactly as it would have, and
    many processes see together what one would see.
    """
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    orders = generation_order(args.order, args.batch_size, tokens.grid, generator)  # [batch, N]
    drop_class = torch.rand(args.batch_size, generator=generator) < args.class_dropout

    if args.anneal:  # RAR's Sec. 3.2: fewer and fewer images are shuffled, a share r of them
        random = generation_order("random", args.batch_size, tokens.grid, generator)
        r = randomness(step, args.steps, *args.anneal)
        shuffled = torch.rand(args.batch_size, 1, generator=generator) < r  # [batch, 1]
        orders = torch.where(shuffled, random, orders)
    return *tokens.batch(step, args.batch_size, args.seed, part), orders[part], drop_class[part]


# ------------------------------------------------------------------------------------------------
# The loop
#
# From here to the cross entropy it is one call: network(...) is RandAR.forward (randar.py). What
# surrounds it has three reasons: a batch that is larger than the memory (micro-batches), processes
# that share a batch, and trainings that are interrupted.


def train(args):
    """Train as the command line says, and write the files that the top of this file lists."""
    run = open_run(args)
    network, device, share = make_network(run, args), run.device, args.batch_size // run.processes
    part = slice(run.rank * share, (run.rank + 1) * share)  # of each batch, this process's images
    reader = ThreadPoolExecutor(1)
    coming = reader.submit(training_batch, run.tokens, run.step, args, part)
    stop, bad_steps = border.stop_at_signal(), 0

    bar = tqdm(range(run.step, args.steps), initial=run.step, total=args.steps, unit="step",
               dynamic_ncols=True, disable=run.rank > 0)
    for step in bar:
        # A thread reads the next batch from the disk while this one is computed.
        started = time.perf_counter()
        batch = [x.to(device) for x in coming.result()]
        coming = reader.submit(training_batch, run.tokens, step + 1, args, part)
        lr = learning_rate(step, args.steps, args.learning_rate, args.min_lr, args.descent)
        for group in run.optimizer.param_groups:
            group["lr"] = lr

        # The gradients of micro-batches add up to those of the whole batch. bfloat16 has float32's
        # range, so the loss needs no scaling. Dropout's chance follows from the image's number.
        step_loss = torch.zeros((), device=device)
        for first in range(0, share, args.micro_batch):
            tokens, labels, order, drop_class = [x[first : first + args.micro_batch] for x in batch]
            torch.manual_seed(args.seed * 1_000_003 + step * args.batch_size + part.start + first)
            network.require_backward_grad_sync = first + args.micro_batch >= share  # the last only
            with run.autocast:
                loss = network(tokens, labels, order, drop_class)[1] * (len(tokens) / share)
            loss.backward()
            step_loss += loss.detach() / run.processes

        # All processes must agree on the loss, and on whether one of them was asked to stop.
        asked_to_stop = torch.tensor(float(len(stop) > 0), device=device)
        summary = torch.stack([step_loss, asked_to_stop])
        if run.processes > 1:
            dist.all_reduce(summary)
        step_loss, asked_to_stop = summary.tolist()

        # A gradient that is not finite would spoil weights and averages for good: skip the step.
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), args.grad_clip).item()
        if math.isfinite(norm):
            run.optimizer.step()
            run.losses.append(step_loss)
            bad_steps = 0
        else:
            bad_steps += 1
            border.say(f"step {step + 1} skipped: loss {step_loss:g}, norm of gradient {norm:g}")
        if bad_steps == BAD_STEPS:
            raise UserError(f"{BAD_STEPS} steps skipped in a row: lower the --learning-rate")
        run.optimizer.zero_grad(set_to_none=True)

        # What people watch is the work of the first process alone.
        run.step = step + 1
        run.seconds.append(time.perf_counter() - started)
        if run.rank == 0:
            report(run, args, bar, asked_to_stop)
        if asked_to_stop:
            raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------
# What people watch


def report(run, args, bar, asked_to_stop):
    """After a step, in the first process: the log, the files, the pictures, when they are due."""
    done = run.step == args.steps
    checkpoint = done or run.step % args.picture_every == 0
    if run.losses and (checkpoint or run.step % args.report == 0):
        # A line is about all steps since the last one; the time of pictures does not count.
        speed = args.batch_size * len(run.seconds) / sum(run.seconds)  # images a second
        line = {"step": run.step, "images": run.step * args.batch_size,
                "loss": math.fsum(run.losses) / len(run.losses),
                "learning_rate": run.optimizer.param_groups[0]["lr"],
                "images_per_second": round(speed, 1),
                "tokens_per_second": round(speed * math.prod(run.tokens.grid))}
        if run.peak:
            line["mfu"] = round(speed * training_flops(run.model) / run.peak, 4)
        if checkpoint and len(run.tokens.held_out_rows) > 0:
            line["held_out_loss"] = held_out_loss(run, args)
        run.log.append(line)
        run.losses, run.seconds = [], []
        for name in ("loss", "held_out_loss", "mfu"):
            if name in line:
                run.shown[name] = f"{line[name]:.3f}"
        bar.set_postfix(run.shown)

    # Whoever is asked to stop may not have the time for pictures.
    if checkpoint or asked_to_stop:
        save(run, args)
    if asked_to_stop:
        bar.write(f"saved step {run.step:,}; to go on: python train.py --resume --out {args.out}")
    elif checkpoint:
        draw_samples(run, args, title=f"step {run.step:,}, {bar.postfix}")
    if done:
        bar.write(f"{bar.postfix}; see {args.out}/samples.png and loss.png; for more pictures: "
                  f"python sample.py --ckpt {args.out}/{args.model}.pt")


@torch.no_grad()
def held_out_loss(run, args):
    """The loss of images that training never sees: always the same ones, in the same orders.

    No class is hidden and nothing dropped out, so that it is a little lower than training's as long
    as the model learns what images have in common. When it rises, the model learns them by heart.
    """
    tokens, labels = run.tokens.held_out(HELD_OUT)  # [n, N], [n]
    generator = torch.Generator().manual_seed(0)
    orders = generation_order(args.order, len(tokens), run.tokens.grid, generator)  # [n, N]

    # A micro-batch at a time, as in training; the network is not compiled once more for this.
    run.model.eval()
    total = 0.0
    for batch in zip(*[x.split(args.micro_batch) for x in (tokens, labels, orders)]):
        with run.autocast:
            _, loss = run.model(*[x.to(run.device) for x in batch])
        total += loss.item() * len(batch[0])
    run.model.train()
    return total / len(tokens)


def draw_samples(run, args, title):
    """Eight samples of ten classes; always the same classes, orders, random numbers, to compare."""
    labels = classes.spread_classes(range(run.model.null_class), rows=10, columns=8)  # [80]
    generator = torch.Generator(run.device).manual_seed(args.seed)
    run.model.eval()
    tokens = run.model.generate(labels.to(run.device), generator=generator)  # [80, N]
    run.model.train()

    # From tokens to a labelled sheet, a row for each class
    pixels = pictures.to_uint8(run.tokenizer.decode(tokens, run.tokens.grid))
    names = classes.names_of_classes(run.tokens.class_names, run.model.null_class)
    sheet = pictures.draw_grid(pixels, labels.tolist(), [known[0] for known in names], title)
    pictures.save_picture(sheet, f"{args.out}/samples.png")


def draw_loss(log, path):
    """The curves of training and held-out loss, from the lines of the log."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="tight")
    axes = figure.subplots()
    for name, label, colour in (("loss", "training", "black"), ("held_out_loss", "held out", "C1")):
        lines = [line for line in log if name in line]
        axes.plot([line["step"] for line in lines], [line[name] for line in lines], label=label,
                  color=colour, linewidth=1.2, marker="." if len(lines) < 20 else None)

    axes.set(xlabel="training step", ylabel="loss, nats a token",
             title=f"loss {log[-1]['loss']:.3f} after {log[-1]['images']:,} images")
    axes.grid(alpha=0.3)
    axes.legend()
    border.write_safely(path, lambda partial: figure.savefig(partial, format="png"))


# ------------------------------------------------------------------------------------------------
# What a training starts from, and goes on from


@dataclass
class Run:
    """A training after `step` of its steps, in one of its processes."""

    rank: int
    processes: int
    device: torch.device
    tokens: data.TokenFolder
    tokenizer: Tokenizer
    model: RandAR
    optimizer: torch.optim.Optimizer
    autocast: torch.autocast
    peak: float = None  # operations a second that its GPUs could do
    step: int = 0
    log: list = field(default_factory=list)  # what log.jsonl says
    losses: list = field(default_factory=list)  # of each step since the last line of the log
    seconds: list = field(default_factory=list)  # likewise
    shown: dict = field(default_factory=dict)  # in the bar


def open_run(args):
    """A Run to start with, or to go on with. All that can be wrong is found before it writes."""
    rank, processes, device = border.join_processes(args.device)
    if args.batch_size % processes:
        raise UserError(f"--batch-size {args.batch_size} cannot be shared by {processes} "
                        "processes: give a multiple of their number")
    tokens = open_tokens(args, rank, processes, device)
    codes, path = tokens.codebook_size, args.tokenizer or tokens.tokenizer
    tokenizer = load_tokenizer(path, device)
    if tokenizer.config.codebook_size != codes:
        raise UserError(f"{path} has {tokenizer.config.codebook_size} codes, but the tokens were "
                        f"made with {codes}: give --tokenizer the one that made them")

    # A model that knows nothing yet. Products of matrices are in bfloat16 where the hardware has
    # it: autocast leaves the weights in float32, and sums where it matters.
    torch.manual_seed(args.seed)
    kind = "rar" if args.model == "rar" else args.position
    model_class, config_class = KINDS[kind]
    shape = SIZES_OF[args.model][args.size]
    shape = shape | {"dropout": args.dropout, "class_dropout": args.class_dropout}
    config = config_class(tokens.grid, codes, len(tokens.class_names), **shape)
    model = model_class(config).to(device).train()
    model.order, model.class_names = args.order, tokens.class_names
    optimizer = make_optimizer(model, args.learning_rate, args.weight_decay)
    precision = border.fast_precision(device)
    autocast = torch.autocast(device.type, precision, enabled=precision is not torch.float32)
    run = Run(rank, processes, device, tokens, tokenizer, model, optimizer, autocast)

    # What it has learnt before. All of these decide what a training is; other flags may change.
    if args.resume:
        saved = border.load(f"{args.out}/training.pt", device)
        fixed = ("batch_size", "seed", "order", "anneal")
        same = "optimizer" in saved and saved["config"] == asdict(config)
        same = same and saved.get("kind", "rope") == kind  # the first files do not say
        if not same or any(saved["settings"].get(name) != getattr(args, name) for name in fixed):
            raise UserError(f"{args.out} holds another training: leave --size, --data, --seed, "
                            "--batch-size, --order, ... as they were, or give another --out")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        run.step, run.log, run.losses = saved["step"], saved["log"], saved["losses"]
    if run.step >= args.steps:
        raise UserError(f"{args.out} holds {run.step} steps already: ask for more with --steps")

    if rank == 0:
        out = border.writable_folder(args.out)
        border.write_safely(out / "tokenizer.pt", functools.partial(shutil.copy, path))
    return run


def save(run, args):
    """Write the weights and the log, a file at a time.

    training.pt alone is enough to go on: after a crash between two files the next save mends all.
    """
    # What --resume starts from, then what sample.py does, then what people look at.
    settings = {name: value for name, value in vars(args).items() if value is not None}
    del settings["resume"], settings["out"]
    save_randar(run.model, f"{args.out}/training.pt", optimizer=run.optimizer.state_dict(),
                step=run.step, log=run.log, losses=run.losses, settings=settings)
    save_randar(run.model, f"{args.out}/{args.model}.pt", half=True, step=run.step)
    lines = "".join(json.dumps(line) + "\n" for line in run.log)
    border.write_safely(f"{args.out}/log.jsonl", lambda partial: partial.write_text(lines))
    if run.log:
        draw_loss(run.log, f"{args.out}/loss.png")


def make_network(run, args):
    """The model as the loop calls it: of many processes, compiled. Says what will be trained."""
    network = run.model
    if run.device.type == "cpu":
        # Else threads add up gradients in the order in which they come, and a resumed training is
        # not the same to the last bit.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # this only finds mistakes
        F.scaled_dot_product_attention = attention_in_float32
    if args.checkpoint_activations:
        checkpoint_activations(run.model)
    if run.processes > 1:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)
    if border.can_compile(run.device):
        network = torch.compile(network)

    # What to expect
    parameters = sum(p.numel() for p in run.model.parameters())
    if run.rank == 0:
        h, w = run.tokens.grid
        print(f"{type(run.model).__name__}-{args.size}, {parameters / 1e6:.1f}M parameters, on "
              f"{len(run.tokens):,} images of {h} x {w} tokens. The first step may take a minute. "
              f"Pictures appear in {args.out} every {args.picture_every} steps.")
    if run.device.type == "cuda":
        run.peak = run.processes * matrix_rate(run.device, border.fast_precision(run.device))
        border.say(f"MFU is the share of {run.peak / 1e12:.0f} TFLOP/s, just measured")
    return network


attention = F.scaled_dot_product_attention


def attention_in_float32(q, k, v, *arguments, **options):
    """On CPUs attention is slow in bfloat16: a toy step would take 1.7 times as long.

    (Measured on a Xeon with AMX: 0.49 s of one core, 0.29 s with this. All in float32: 0.56 s.)
    """
    if q.dtype is torch.bfloat16:
        q, k, v = q.float(), k.float(), v.float()
    with torch.autocast("cpu", enabled=False):
        return attention(q, k, v, *arguments, **options)


# ------------------------------------------------------------------------------------------------
# What a step costs


def layers_and_head(model):
    """RAR's names are those of its released weights."""
    return (model.blocks, model.lm_head) if model.kind == "rar" else (model.layers, model.output)


def checkpoint_activations(model):
    """Keep only the input of each layer, and compute the layer again when its gradient is due."""
    for layer in layers_and_head(model)[0]:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def training_flops(model):
    """Floating-point operations of one training image: forward, and backward twice as dear."""
    layers, head = layers_and_head(model)
    num_tokens = math.prod(model.config.grid)
    length = num_tokens * (model.predicting.step or 1)  # 2 N; N, where no token is inserted
    in_layers = sum(p.numel() for p in layers.parameters())  # each token meets each of them once
    weights = length * in_layers + num_tokens * head.weight.numel()

    # Query by key, then weight by value: d multiplications each for every pair of tokens, half of
    # which a causal model needs.
    attention = model.config.n_layer * 2 * model.config.dim * length**2 / 2
    return 3 * 2 * (weights + attention)  # 2: a multiplication and an addition


def matrix_rate(device, dtype, side=8192, repeats=10):
    """Operations a second in large matrix products: what this device could do at best.

    The median of some repeats, each of which waits for the device.
    """
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        torch.matmul(a, b)[0, 0].item()
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / sorted(seconds)[repeats // 2]


# ------------------------------------------------------------------------------------------------
# The command line
#
# What stands for None below depends on the size and on other flags: `complete` fills it in.


def complete(args):
    """Check what argparse cannot, and fill in the defaults that depend on other arguments."""
    # Which models there are
    sizes = SIZES_OF[args.model]
    if args.size not in sizes or (args.model == "rar" and args.position != "rope"):
        raise UserError(f"--model {args.model} has the sizes {', '.join(sizes)}; RandAR alone has "
                        "a --position")

    # RAR's Sec. 3.2: the last quarter of the training is in raster order.
    if args.anneal is None and args.model == "rar":
        args.anneal = [0.5, 0.75]
    if args.anneal and not 0 <= args.anneal[0] <= args.anneal[1] <= 1:
        raise UserError("--anneal takes two shares of the steps, 0 <= START <= END <= 1")

    # Only the toy sizes have a world of their own: ImageNet's recipe on it would take weeks to
    # learn by heart what the smallest model learns in minutes.
    folder = pathlib.Path(args.data or "IMAGES")
    images = folder.is_dir() and not (folder / "meta.json").is_file()
    if images or (args.data is None and args.size not in TOY_SIZES):
        command = ["python", "tokenizer.py", "encode", "--images", str(folder), "--out", "tokens",
                   "--tokenizer", args.tokenizer or "vq_ds16_c2i.pt"]
        raise UserError(f"--size {args.size} needs tokens of your images: {shlex.join(command)}, "
                        "then add --data tokens")

    # The recipe: the paper's, or for toys.
    args.order = args.order or ("raster" if args.anneal else "random")
    for name, (value, _, _) in RECIPE.items():
        if getattr(args, name) is None:
            setattr(args, name, TOY.get(name, value) if args.size in TOY_SIZES else value)


def main():
    # What is trained, on what, and where it goes
    parser = border.command_line(__doc__)
    add = parser.add_argument
    add("--model", default="randar", choices=("randar", "rar"), help="(default: randar)")
    add("--size", default="toy", choices=SIZES | RAR_SIZES, help="(default: toy; B: RAR's)")
    add("--position", default="rope", choices=("rope", "dense", "merge"),
        help="RandAR's position instruction tokens (default: rope; the others: rar.py)")
    add("--data", help="token folder (default: the toy world)")
    add("--tokenizer", help="(default: what made the tokens; for the toy world, ours)")
    add("--out", default="out", help="folder for weights and pictures (default: out)")
    add("--resume", action="store_true", help="go on with the training in --out")
    add("--order", choices=ORDERS, metavar="ORDER", type=lambda name: name.replace("-", "_"),
        help="random, or raster for the paper's counterpart (default: random; annealed: raster)")
    add("--anneal", nargs=2, type=border.finite_float, metavar=("START", "END"),
        help="random orders, fewer from START on, from END on only --order: shares of the steps, "
        "from 0 to 1 (default: none; RAR: 0.5 0.75)")

    # How
    for name, (value, number, text) in RECIPE.items():
        add("--" + name.replace("_", "-"), type=number,
            help=f"{text} (default: {value:g}; toy: {TOY.get(name, value):g})")
    add("--checkpoint-activations", action="store_true", help="compute layers twice: less memory")
    add("--report", type=positive_int, default=20, help="steps to a line of the log (default: 20)")
    add("--seed", type=border.seed, default=0, help="(default: 0)")
    add("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    args = parser.parse_args()

    with border.one_line_errors():
        state = pathlib.Path(args.out) / "training.pt"
        # What was said at the start is the default when it goes on: --steps, say, may be changed.
        if args.resume:
            settings = border.load(state).get("settings", {})
            older = {"clip": "grad_clip", "last_learning_rate": "min_lr"}  # names in first files
            settings = {older.get(name, name): value for name, value in settings.items()}
            settings["tokenizer"] = str(state.with_name("tokenizer.pt"))  # the copy made then
            parser.set_defaults(**settings)
            args = parser.parse_args()
        elif state.exists():
            raise UserError(f"{args.out} holds a training: add --resume, or give another --out")
        complete(args)
        train(args)


if __name__ == "__main__":
    main()
