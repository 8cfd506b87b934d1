"""Train a RandAR: python train.py

Without arguments: a small model on a world that we draw, pictures within minutes; --data fine
--size fine is a richer world. --size L --data TOKENS is the paper's recipe (Sec. 4.1), --model rar
trains RAR, --position dense or merge an ablation of RandAR. On many GPUs: torchrun --nproc-per-node
8 train.py --size XXL --data TOKENS. What appears in the folder --out:

    randar.pt (rar.pt)   the weights                   samples.png   what the model draws now
    training.pt          and all else, for --resume    loss.png      the curves
    tokenizer.pt         copied here, for sample.py    log.jsonl     a line of JSON for each report
"""

import support  # first: Ctrl-C while torch is imported is no traceback

import copy
import filecmp
import json
import math
import pathlib
import shutil
import time
from statistics import fmean

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from randar import ORDERS, SIZES, generation_order, save_randar
from rar import KINDS, RAR_SIZES, randomness
from support import border, checks, classes, data, pictures, released, toy
from support.border import (UserError, decoding_precision, fraction, positive_float,
                            positive_int)
from support.speed import checkpoint_activations, mixed_precision, speed_up_cpu, throughput
from tokenizer import load_tokenizer

# ------------------------------------------------------------------------------------------------
# The recipe
#
# The numbers are the paper's (Sec. 4.1). Gradient clipping and dropout in layers are the released
# code's. Micro-batches, pictures, and weight decay of matrices only are ours. Small models have a
# higher learning rate and, in the plain world, no dropout. The authors' released weights come from
# another schedule: warm-up, and a cosine.

RECIPE = {  # flag: (default, type, text)
    "steps": (360_000, positive_int, "training steps"),
    "batch_size": (1024, positive_int, "images a step, of all processes together"),
    "micro_batch": (32, positive_int, "of these at a time, as many as fit into the memory"),
    "learning_rate": (4e-4, positive_float, "at its peak"),
    "min_lr": (1e-5, fraction, "the learning rate in the end"),
    "warm_up": (0.0, fraction, "share of the steps in which it rises"),
    "descent": (1 / 6, fraction, "share of the steps in which it falls"),
    "weight_decay": (0.05, fraction, "of matrices"),
    "beta2": (0.95, fraction, "AdamW's memory of squared gradients"),
    "grad_clip": (1.0, positive_float, "largest norm of the gradient"),
    "token_dropout": (0.1, fraction, "of token embeddings"),
    "dropout": (0.1, fraction, "of layers' outputs"),
    "class_dropout": (0.1, fraction, "how often the class is hidden"),
    "picture_every": (500, positive_int, "steps to a checkpoint, held-out loss and pictures"),
}
TOY = {"steps": 1200, "batch_size": 64, "micro_batch": 64, "learning_rate": 3e-3, "dropout": 0.0,
       "token_dropout": 0.0, "picture_every": 250}  # instead of the paper's
FINE = TOY | {"steps": 6000, "batch_size": 32, "learning_rate": 2e-3, "token_dropout": 0.1,
              "picture_every": 500}
TOY_SIZES = {"tiny": TOY, "toy": TOY, "fine": FINE}
NIGHT = {"batch_size": 256}  # ours, and not tuned: ten hours of ImageNet on an A100, by formula
RECIPES = TOY_SIZES | {  # of a size, instead of the paper's
    "S": NIGHT | {"steps": 200_000, "micro_batch": 128, "learning_rate": 1e-3},
    "M": NIGHT | {"steps": 60_000, "micro_batch": 64, "learning_rate": 6e-4},
    "XXL": {"micro_batch": 16},  # 32 would just not fit into 80 GB
}
RAR_RECIPE = {  # of RAR's own sizes: its Table 6; the micro-batch is ours
    "steps": 250_000, "batch_size": 2048, "micro_batch": 32, "learning_rate": 4e-4,
    "warm_up": 1 / 4, "descent": 3 / 4, "schedule": "cosine", "weight_decay": 0.03, "beta2": 0.96}
SIZES_OF = {"randar": SIZES, "rar": RAR_SIZES}
PARTS = ("config", "model", "optimizer", "step")  # what training.pt must have
DRAWN = {"plain": 40_000, "fine": 100_000}  # pictures of each of toy.WORLDS


def learning_rate(step, steps, peak, last=1e-5, descent=1 / 6, warm_up=0.0, cosine=False):
    """Constant for the first 5/6 of the steps, then linear to `last`.

    RAR: it rises in the first quarter (warm_up), and falls along a cosine in the other three.
    """
    if step < steps * warm_up:
        return peak * (step + 1) / (steps * warm_up + 1)
    if step < steps * (1 - descent):
        return peak
    left = (steps - step) / (steps * descent)  # from 1 down to 0
    if cosine:
        left = (1 - math.cos(math.pi * left)) / 2
    return last + (peak - last) * left


def make_optimizer(model, peak, weight_decay=0.05, beta2=0.95):
    """AdamW; weight decay on matrices only: to pull a norm's scale towards zero would do harm."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, beta2), fused=True)


# ------------------------------------------------------------------------------------------------
# What a step reads
#
# Tokens, not images: tokenizer.py has turned these into a folder of tokens, once and for all.


def open_tokens(args, rank, processes, device):
    """The TokenFolder of --data; a drawn world is drawn and encoded once, into OUT/tokens."""
    world, folder = args.data or "plain", pathlib.Path(args.out, "tokens")
    drawn, read = world in DRAWN, pathlib.Path(world, "meta.json").is_file()
    # ImageNet's recipe would take weeks to learn by heart what a small model learns in minutes.
    if not read and (not drawn or args.size not in TOY_SIZES):
        raise UserError(f"--size {args.size} needs tokens of your images: python tokenizer.py "
                        f"encode --images {args.data or 'IMAGES'} --out tokens --tokenizer "
                        f"{args.tokenizer or 'llamagen'}, then add --data tokens")
    if not drawn:
        return data.TokenFolder(world)

    if rank == 0 and not (folder / "labels.npy").is_file():
        path = released.file_of(args.tokenizer or toy.folder(world) / "tokenizer.pt")
        place_of_copy(args, path)  # before the work
        tokenizer = load_tokenizer(path, device)
        images, labels, _ = toy.make(DRAWN[world], seed=0, world=world)
        data.encode_images(images, labels, toy.CLASSES, tokenizer, path, folder,
                           source=world, size=images.shape[1], crops=1)
    if processes > 1:
        dist.barrier()  # this was the work of one; the others wait
    tokens = data.TokenFolder(folder)
    if tokens.source not in ("", world):  # "": of an earlier version
        raise UserError(f"{folder} holds tokens of {tokens.source}: add --data {folder} to learn "
                        "from them, or give another --out")
    return tokens


def place_of_copy(args, path):
    """Where the tokenizer goes, beside the weights. UserError if another one is there."""
    copied = pathlib.Path(args.out, "tokenizer.pt")
    if copied.is_file() and not filecmp.cmp(path, copied, shallow=False):
        raise UserError(f"{copied} is another tokenizer than {path}: give another --out")
    return copied


def training_batch(tokens, step, args, part):
    """What a training step reads: tokens [n, N], classes [n], orders [n, N], drop_class bool [n].

    part: a slice of the batch, the n images of this process. All random numbers follow from the
    seed and the step's number, for the whole batch: a resumed training goes on exactly as it would
    have, and many processes see together what one would see.
    """
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    orders = generation_order(args.order, args.batch_size, tokens.grid, generator)  # [batch, N]
    drop_class = torch.rand(args.batch_size, generator=generator) < args.class_dropout  # [batch]

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
    rank, processes, device = border.join_processes(args.device)
    model, optimizer, tokens, tokenizer, state = open_run(args, rank, processes, device)
    n = args.batch_size // processes  # images of each batch, for one process
    part = slice(rank * n, (rank + 1) * n)  # those of this process
    stop, bad_steps = border.stop_at_signal(), 0  # stop: empty until Ctrl-C or SIGTERM

    # The model as the loop calls it: of many processes, compiled
    network = model
    if processes > 1:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)
    network = torch.compile(network) if border.can_compile(device) else network

    bar = tqdm(range(state["step"], args.steps), initial=state["step"], total=args.steps,
               unit="step", dynamic_ncols=True, disable=rank > 0)
    for step in bar:
        started = time.perf_counter()
        batch = [x.to(device) for x in training_batch(tokens, step, args, part)]  # [n, ...]
        lr = learning_rate(step, args.steps, args.learning_rate, args.min_lr, args.descent,
                           args.warm_up, args.schedule == "cosine")
        for group in optimizer.param_groups:
            group["lr"] = lr

        # The gradients of micro-batches add up to those of the whole batch. bfloat16 has float32's
        # range: the loss needs no scaling. Dropout's chance follows from the first image's number.
        totals = torch.zeros(2, device=device)  # the loss; how many processes were asked to stop
        for first in range(0, n, args.micro_batch):
            micro_batch = [x[first : first + args.micro_batch] for x in batch]
            torch.manual_seed(args.seed * 1_000_003 + step * args.batch_size + part.start + first)
            network.require_backward_grad_sync = first + args.micro_batch >= n  # once a step
            with mixed_precision(device):
                loss = network(*micro_batch)[1] * (len(micro_batch[0]) / n)
            loss.backward()
            totals[0] += loss.detach() / processes

        # All processes must agree on the loss, and on whether one of them was asked to stop.
        totals[1] = len(stop)
        if processes > 1:
            dist.all_reduce(totals)
        step_loss, asked_to_stop = totals.tolist()

        # A gradient that is not finite would spoil the weights for good: skip the step.
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        bad_steps = 0 if norm.isfinite() else bad_steps + 1
        if bad_steps == 10 or (bad_steps and step + 1 == args.steps):
            raise UserError(f"the last {bad_steps} steps were skipped: lower the --learning-rate")
        if bad_steps:
            border.say(f"step {step + 1} skipped: the norm of its gradient is {norm:g}")
        else:
            optimizer.step()
            state["losses"].append(step_loss)
        optimizer.zero_grad(set_to_none=True)

        # What people watch is the work of the first process alone.
        state |= dict(step=step + 1, seconds=state["seconds"] + time.perf_counter() - started)
        if rank == 0 and not bad_steps:  # what was saved last was good: it stays for now
            report(model, optimizer, tokens, tokenizer, state, args, bar, asked_to_stop)
        if asked_to_stop:
            raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------
# What people watch


def report(model, optimizer, tokens, tokenizer, state, args, bar, asked_to_stop):
    """After a step, in one process: a line of the log, files and pictures, when they are due."""
    step, out = state["step"], args.out
    checkpoint = step == args.steps or step % args.picture_every == 0
    if state["losses"] and (checkpoint or step % args.report == 0):
        # All steps since the last line count, the time of pictures does not.
        speed = args.batch_size * len(state["losses"]) / state["seconds"]  # images a second
        line = {"loss": fmean(state["losses"]), "learning_rate": optimizer.param_groups[0]["lr"]}
        line |= throughput(model, speed)
        bar.set_postfix(line)
        if checkpoint and len(tokens.held_out_rows) > 0:
            line["held_out_loss"] = held_out_loss(model, tokens, args)
            bar.set_description(f"held-out loss {line['held_out_loss']:.3f}")
        state["log"].append({"step": step, "images": step * args.batch_size} | line)
        state |= {"losses": [], "seconds": 0.0}

    # The first file alone is enough to go on: after a crash the next checkpoint mends the others.
    if checkpoint or asked_to_stop:
        save_randar(model, f"{out}/training.pt", optimizer=optimizer.state_dict(),
                    settings=vars(args), fingerprint=tokens.fingerprint, **state)
        save_randar(model, f"{out}/{args.model}.pt", half=True, step=step,
                    fingerprint=tokens.fingerprint)  # for sample.py
        lines = "".join(json.dumps(line) + "\n" for line in state["log"])
        border.write_safely(f"{out}/log.jsonl", lambda partial: partial.write_text(lines))
        draw_loss(state["log"], f"{out}/loss.png")

    # Whoever is asked to stop may not have the time for pictures.
    if asked_to_stop:
        bar.write(f"saved step {step:,}; to go on: python train.py --resume --out {out}")
    elif checkpoint or step == 50:  # of the largest models, 500 steps take an hour
        draw_samples(model, tokenizer, args, title=f"step {step:,}")


@torch.no_grad()
def held_out_loss(model, tokens, args):
    """The loss of 512 images that training never sees: always the same, in the same orders.

    No class is hidden and nothing dropped out, so that it is a little lower than training's as long
    as the model learns what images have in common. When it rises, the model learns them by heart.
    """
    images, labels = tokens.held_out(512)  # [n, N], [n]
    torch.manual_seed(0)  # the loop seeds for each micro-batch, so this does not disturb it
    orders = generation_order(args.order, len(labels), tokens.grid)  # [n, N]

    # A micro-batch at a time, as in training; the network is not compiled once more for this.
    device, total = next(model.parameters()).device, 0.0
    model.eval()
    for batch in zip(*[x.split(args.micro_batch) for x in (images, labels, orders)]):
        with mixed_precision(device):
            total += model(*[x.to(device) for x in batch])[1].item() * len(batch[0])
    model.train()
    return total / len(labels)


def draw_samples(model, tokenizer, args, title):
    """Eight samples of ten classes; always the same classes, orders, random numbers, to compare."""
    labels = classes.spread_classes(range(model.null_class))  # [80]
    torch.manual_seed(args.seed)
    device = next(model.parameters()).device
    copied = copy.deepcopy(model).eval().to(decoding_precision(device))  # as sample.py draws

    # 16 at a time: of 80, the caches of the largest model would take half of a card's memory.
    parts = [copied.generate(part) for part in labels.to(device).split(16)]
    tokens = torch.cat(parts)  # [80, N]

    # From tokens to a labelled sheet, a row for each class
    pixels = pictures.to_uint8(tokenizer.decode(tokens, model.config.grid))
    names = classes.names_of_classes(model.class_names, model.null_class)
    rows = [(names[labels[i]][0], pixels[i : i + 8]) for i in range(0, len(pixels), 8)]
    pictures.save_picture(pictures.picture_grid(rows, title), f"{args.out}/samples.png")


def draw_loss(log, path):
    """The curves of training and held-out loss, from the lines of the log."""
    figure = Figure(figsize=(8, 4.5), layout="tight")
    axes = figure.subplots()
    for name in ("loss", "held_out_loss"):
        lines = [line for line in log if name in line]
        axes.plot([x["step"] for x in lines], [x[name] for x in lines], ".-", label=name)
    axes.set(xlabel="training step", ylabel="nats a token")
    axes.legend()
    pictures.save_figure(figure, path)


# ------------------------------------------------------------------------------------------------
# What a training starts from, and goes on from


def open_run(args, rank, processes, device):
    """(model, optimizer, tokens, tokenizer, state), new or as --resume finds them.

    state: what else training.pt holds; losses and seconds are those since the last line of the log.
    All that can be wrong is found before anything is written.
    """
    if args.batch_size % processes:
        raise UserError(f"--batch-size {args.batch_size} cannot be shared by {processes} processes")
    sizes = SIZES_OF[args.model]
    if args.size not in sizes or (args.model == "rar" and args.position != "rope"):
        raise UserError(f"--model {args.model} has the sizes {', '.join(sizes)}; rar no --position")
    tokens = open_tokens(args, rank, processes, device)
    path = released.file_of(args.tokenizer or tokens.tokenizer)
    tokenizer = load_tokenizer(path, device)
    facts = data.facts_of(tokenizer, path)  # codes, and a fingerprint: others have as many codes
    same = tokens.fingerprint in (None, facts["fingerprint"])
    if facts["codes"] != tokens.codebook_size or not same:
        raise UserError(f"{path} did not make the tokens: give --tokenizer the one that did")
    copied = place_of_copy(args, path)

    # A model that knows nothing yet
    torch.manual_seed(args.seed)
    kind = "rar" if args.model == "rar" else args.position
    model_class, config_class = KINDS[kind]
    dropouts = dict(token_dropout=args.token_dropout, dropout=args.dropout,
                    class_dropout=args.class_dropout)
    config = config_class(tokens.grid, tokens.codebook_size, len(tokens.class_names),
                          **sizes[args.size] | dropouts)
    model = model_class(config).to(device).train()
    model.order, model.class_names = args.order, tokens.class_names
    if args.checkpoint_activations:
        checkpoint_activations(model)
    if device.type == "cpu":
        speed_up_cpu()
    optimizer = make_optimizer(model, args.learning_rate, args.weight_decay, args.beta2)

    # What it has learnt before. All that is compared decides what a training is; files of earlier
    # versions lack some of it.
    state = {"step": 0, "log": [], "losses": [], "seconds": 0.0}
    if args.resume:
        saved = border.load(f"{args.out}/training.pt", device, PARTS)
        same = saved.get("kind", "rope") == kind
        same = same and saved["config"].items() <= vars(config).items()
        for name in ("batch_size", "seed", "order", "anneal"):
            same = same and saved.get("settings", {}).get(name) == getattr(args, name)
        if not same:
            raise UserError(f"{args.out} holds another training: leave its flags, or change --out")
        checks.load_weights(model, saved["model"], f"{args.out}/training.pt")
        optimizer.load_state_dict(saved["optimizer"])
        state |= {name: saved[name] for name in state if name in saved}
    if state["step"] >= args.steps:
        raise UserError(f"{args.out} holds {state['step']} steps already: ask for more --steps")

    if rank == 0 and not copied.is_file():
        border.write_safely(copied, lambda partial: shutil.copy(path, partial))
    parameters = sum(p.numel() for p in model.parameters())
    border.say(f"{parameters / 1e6:.1f}M parameters, {len(tokens):,} images; pictures will be in "
               f"{args.out}; the first step may take a minute")
    return model, optimizer, tokens, tokenizer, state


# ------------------------------------------------------------------------------------------------
# The command line


def main():
    # What is trained, on what, and where it goes
    parser = border.command_line(__doc__)
    add = parser.add_argument
    add("--model", default="randar", choices=SIZES_OF, help="(default: randar)")
    add("--size", default="toy", choices=SIZES | RAR_SIZES, help="(default: toy; B: RAR's)")
    add("--position", default="rope", choices=[kind for kind in KINDS if kind != "rar"],
        help="(default: rope)")
    add("--data", help="token folder, or a world that we draw: plain, fine (default: plain)")
    add("--tokenizer", help="(default: what made the tokens; for drawn worlds, ours)")
    add("--out", default="out", help="folder for weights and pictures (default: out)")
    add("--resume", action="store_true", help="go on with the training in --out")
    add("--order", choices=ORDERS, metavar="ORDER", type=lambda name: name.replace("-", "_"),
        help="random, or raster for the paper's counterpart (default: random; annealed: raster)")
    add("--anneal", nargs=2, type=border.finite_float, metavar=("START", "END"),
        help="shares of the steps between which random orders give way to --order (RAR: 0.5 0.75)")

    # How
    for name, (value, number, text) in RECIPE.items():
        add("--" + name.replace("_", "-"), type=number, default=value,
            help=f"{text} (default: {value:g}; toy: {TOY.get(name, value):g})")
    add("--schedule", default="linear", choices=("linear", "cosine"),
        help="how the learning rate falls (default: linear; RAR's: cosine)")
    add("--checkpoint-activations", action="store_true", help="compute layers twice: less memory")
    add("--report", type=positive_int, default=20, help="steps to a line of the log (default: 20)")
    add("--seed", type=border.seed, default=0, help="(default: 0)")
    add("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    args = parser.parse_args()

    with border.one_line_errors(smaller="--micro-batch"):
        # Other defaults: of some sizes, of RAR (its Sec. 3.2), of the training that goes on
        path = pathlib.Path(args.out) / "training.pt"
        parser.set_defaults(**RECIPES.get(args.size, {}))
        if args.model == "rar":
            parser.set_defaults(anneal=[0.5, 0.75])  # the last quarter is in raster order
            parser.set_defaults(**(RAR_RECIPE if args.size not in TOY_SIZES else {}))
        if args.resume:
            parser.set_defaults(**border.load(path, parts=PARTS).get("settings", {}))
            parser.set_defaults(out=args.out, tokenizer=f"{args.out}/tokenizer.pt")  # the copy
        elif path.exists():
            raise UserError(f"{args.out} holds a training: add --resume, or give another --out")
        else:  # what is there is not ours
            for name in (f"{args.model}.pt", "log.jsonl", "loss.png", "samples.png"):
                if (path.parent / name).exists() and not border.is_ours(path.parent / name):
                    raise UserError(f"{path.parent / name} is there already: give another --out")
        args = parser.parse_args()
        args.order = args.order or ("raster" if args.anneal else "random")
        with border.alone(args.out):
            train(args)
        border.say(f"for more pictures: python sample.py --ckpt {args.out}/{args.model}.pt")


if __name__ == "__main__":
    main()
