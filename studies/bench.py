"""How fast it is, and how near to what the hardware allows: python -m studies.bench

Without arguments: the toy model, in a few minutes. --size L measures the paper's, with made-up
weights: on a GPU, or in some ten minutes on a CPU, two images at a time.

    interleaved                 how times are measured
    decoding_floor              the time that sampling must take on this device
    training_rows               a training step, plain and compiled
    sampling_rows               a batch of images, with the cache and without, in many steps and few
    exact_rows                  exact parallel decoding beside these: steps, tokens, seconds
    rar_rows                    --rar B: the throughput of RAR instead, as in its Table 5

    bench/bench.json   all figures        bench/bench.png   a picture of them
"""

import functools
import itertools
import json
import math
import pathlib
import time
from statistics import fmean, median

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from randar import (SIZES, Config, RandAR, default_steps, generation_order, load_randar,
                    step_sizes)
from rar import RAR, RAR_SIZES, RARConfig
from support import border, pictures
from support.border import decoding_precision
from support.speed import (compile_layers, matrix_rate, mixed_precision, record, speed_up_cpu,
                           sustained, training_flops)
from tokenizer import MASKGIT_VQ16, Tokenizer, TokenizerConfig
from train import RECIPE, RECIPES, TOY_SIZES, make_optimizer

MANY = 64  # images that exact decoding draws at a time

# ------------------------------------------------------------------------------------------------
# How it is measured, and by what


def interleaved(cases, device, seconds, what):
    """Run functions in turn, in rounds: what else the machine does then meets all of them alike.

    cases: {name: function}. The first round warms up; up to five count, begun within `seconds`.
    Returns {name: median of its seconds}.
    """
    taken = {name: [] for name in cases}
    for i in range(6):
        if i <= 1:
            began = time.perf_counter()  # in the end, of the first round that counts
        for name, function in tqdm(cases.items(), desc=f"{what}, round {i} of 5", leave=False):
            started = time.perf_counter()
            function()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            taken[name].append(time.perf_counter() - started)
        if i > 0 and time.perf_counter() - began > seconds:
            break
    return {name: median(times[1:]) for name, times in taken.items()}


def decoding_floor(model, streams, steps, rate, speed, apart=False):
    """Seconds that decoding takes on a device that does nothing else, and does it perfectly.

    streams: sequences at a time, two an image with guidance; rate, speed: operations and bytes a
    second. A step reads weights, keys, values once, and meanwhile computes. apart: it computes the
    products with weights and attention one after the other, as kernels do: a floor to be reached.
    """
    layers, d, width = model.config.n_layer, model.config.dim, model.output.weight.itemsize
    in_layers = sum(p.numel() for p in model.layers.parameters())  # one multiplication each
    in_head = model.output.weight.numel()
    seconds, unread, start_pos = 0.0, 1, 0  # unread: the class at first, which the cache lacks
    for m in step_sizes(math.prod(model.config.grid), steps):
        n, end = unread + m, start_pos + unread + m  # n new tokens; the last looks at `end` of them
        # (multiplications of a sequence, numbers that move), of products and of attention: query by
        # key and weight by value, causal; all keys and values are read, n written.
        parts = [(n * in_layers + m * in_head, in_layers + in_head),
                 (layers * d * n * (start_pos + end), streams * layers * 2 * d * (end + n))]
        if not apart:
            parts = [[sum(column) for column in zip(*parts)]]
        seconds += sum(max(2 * streams * operations / rate, numbers * width / speed)  # 2: and added
                       for operations, numbers in parts)
        start_pos, unread = start_pos + unread + 1, 2 * m - 1  # x_1 P_2 x_2 .. P_m x_m; P_1 stays
    return seconds


# ------------------------------------------------------------------------------------------------
# What is measured: training and sampling


def training_rows(model, batch, rate, seconds, compiled=False, accumulated=1):
    """A row for each way to train with a micro-batch, its share of AdamW's step included.

    rate: the operations a second that MFU is a share of; accumulated: micro-batches to one step of
    AdamW; gigabytes: the most that a GPU's memory held, weights, gradients and AdamW's among it.
    """
    device, optimizer = next(model.parameters()).device, make_optimizer(model, 1e-4)
    gigabytes, rows, n = {}, [], math.prod(model.config.grid)
    tokens = torch.randint(model.config.vocab_size, (batch, n), device=device)  # [b, N]
    classes = torch.randint(model.config.num_classes, (batch,), device=device)  # [b]
    ways = {"plain": model} | ({"compiled": torch.compile(model)} if compiled else {})

    def learn(way):
        """Add up gradients, as train.py does, and keep what it takes at most."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with mixed_precision(device):
            _, loss = ways[way](tokens, classes)  # a random order for each image
        loss.backward()
        if device.type == "cuda":
            gigabytes[way] = torch.cuda.max_memory_allocated(device) / 1e9

    def update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()  # the gradients stay: the next micro-batch adds to them, as most do

    cases = {way: functools.partial(learn, way) for way in ways} | {"AdamW": update}
    times = interleaved(cases, device, seconds, "training")
    for way in ways:
        taken = times[way] + times["AdamW"] / accumulated
        rows.append(dict(training=way, tokens=n, batch=batch, seconds=taken, AdamW=times["AdamW"],
                         tokens_per_second=batch * n / taken, images_per_second=batch / taken,
                         MFU=training_flops(model) * batch / taken / rate,
                         gigabytes=gigabytes.get(way)))
    model.zero_grad()  # which frees them
    return rows


@torch.no_grad()
def uncached_logits(model, tokens, classes, order, done, m):
    """One step of RandAR.generate_plainly: all of the sequence goes through all layers again.

    tokens [b, N], classes [b], order [b, N], int64, of whose turns the first `done` are known.
    Returns logits of the next m turns, [b, m, V], without guidance.
    """
    seen = [*range(1 + 2 * done), *range(1 + 2 * done, 1 + 2 * (done + m), 2)]
    x, cos_sin = model.sequence(tokens, classes, order)  # [b, 1 + 2 N, d]
    return model.logits(model.hidden_states(x[:, seen], cos_sin[:, seen])[:, -m:])


def decoding(model, batch, steps, way="cached"):
    """A function that draws images with guidance; way: see sampling_rows."""
    classes = torch.zeros(batch, dtype=torch.int64, device=next(model.parameters()).device)
    if way == "graph":
        decode = record(model, classes, torch.Generator(classes.device), steps=steps)
        return lambda: decode(classes)
    if way != "uncached":
        return lambda: model.generate(classes, steps=steps)

    classes = classes.repeat(2)  # with the class and without: two contexts
    order = generation_order("random", 2 * batch, model.config.grid, device=classes.device)
    tokens, sizes = torch.zeros_like(order), step_sizes(order.shape[1], steps)

    def five_steps():
        for k in (steps * tenth // 10 for tenth in (1, 3, 5, 7, 9)):
            uncached_logits(model, tokens, classes, order, sum(sizes[:k]), sizes[k])

    return five_steps


def sampling_rows(model, ways, rate, speed, seconds):
    """A row for each of ways, a list of (way, images, steps).

    "cached": as sample.py. "compiled": the same, of a model with compiled layers. "graph": as
    sample.py --graph. "uncached": all goes through all layers anew, in five evenly spaced steps.
    """
    cases = {(way, *sizes): decoding(model, *sizes, way) for way, *sizes in ways}
    times, rows = interleaved(cases, model.output.weight.device, seconds, "sampling"), []
    for (way, batch, steps), taken in times.items():
        if way == "uncached":
            taken *= steps / 5  # of which five were made: their cost is a smooth curve
        floor, apart = (decoding_floor(model, 2 * batch, steps, rate, speed, apart)
                        for apart in (False, True))
        rows.append(dict(sampling=way, tokens=math.prod(model.config.grid), batch=batch,
                         steps=steps, seconds=taken, images_per_second=batch / taken,
                         floor_seconds=floor, times_floor=taken / floor, floor_apart=apart))
    return rows


def sampling_parts(model, batch, rate, speed, seconds, compiled):
    """Rows of sampling in all steps, the paper's 88 of 256, and 48: an iterator, a list a way."""
    n, gpu = math.prod(model.config.grid), model.output.weight.is_cuda
    steps, images = (n, default_steps(n), n * 48 // 256), (batch, 8, 1) if gpu else (batch, 1)
    sizes = list(itertools.product(images, steps))
    ways = [("cached", *size) for size in sizes] + [("uncached", batch, count) for count in steps]
    yield sampling_rows(model, ways, rate, speed, seconds)
    if gpu and compiled:
        compile_layers(model)
        yield sampling_rows(model, [("compiled", *size) for size in sizes], rate, speed, seconds)
    if gpu:
        ways = [("graph", number, default_steps(n)) for number in images]
        yield sampling_rows(model, ways, rate, speed, seconds)


def rows_by_tokens(settings, device, batch, learning_rate, drawing_rate, speed, seconds):
    """(training_rows, sampling_rows) of one layer, by the number of tokens; rates as there."""
    training, sampling = [], []
    for side in (8, 16, 24, 32):
        model = RandAR(Config(**settings | dict(grid=(side, side), n_layer=1))).to(device)
        training += training_rows(model, batch, learning_rate, seconds)
        ways = [("cached", batch, default_steps(side**2))]
        model.eval().to(decoding_precision(device))
        sampling += sampling_rows(model, ways, drawing_rate, speed, seconds)
    return training, sampling


def tokens_read(model, classes, options):
    """(passes, tokens through the layers, of each image in each context) of one decoding."""
    lengths = []
    hook = model.layers[0].register_forward_pre_hook(lambda _, x: lengths.append(x[0].shape[1]))
    for _ in model.decode(classes, **options):
        pass
    hook.remove()
    return len(lengths), sum(lengths)


def exact_rows(model, seconds, compiled=False):
    """A row for each way to decode, of one image and of MANY: exact decoding beside the paper's.

    model: a trained one, for made-up weights draft badly. compiled: its layers are, from then on.
    """
    num_tokens, device, rows = math.prod(model.config.grid), model.output.weight.device, []
    ways = {"one token a step": dict(steps=-1)}
    ways |= {f"{default_steps(num_tokens)} steps, causal": {}}  # the paper's
    ways |= {f"{n} steps, isolated": dict(steps=n, queries="isolated")
             for n in (num_tokens * k // 16 for k in (1, 2, 3))}
    ways |= {f"exact, {drafts} drafts": dict(drafts=drafts) for drafts in (2, 4, 8, 16)}
    ways = {way: options | dict(cfg=(1.0, 1.5)) for way, options in ways.items()}
    batches = {batch: torch.arange(batch, device=device) % model.null_class for batch in (1, MANY)}

    # How many passes exact decoding takes depends on chance: the mean of so many images.
    counts = {(batch, way): [tokens_read(model, classes, options)
                             for _ in range(MANY // batch if "drafts" in options else 1)]
              for batch, classes in batches.items() for way, options in ways.items()}
    if compiled:
        compile_layers(model)
    cases = {(batch, way): functools.partial(model.generate, classes, **options)
             for batch, classes in batches.items() for way, options in ways.items()}
    for (batch, way), taken in interleaved(cases, device, seconds, "exact decoding").items():
        passes, tokens = (fmean(numbers) for numbers in zip(*counts[batch, way]))
        rows.append(dict(decoding=way, compiled=compiled, batch=batch, passes=passes,
                         tokens_read=tokens, seconds=taken, seconds_per_image=taken / batch))
    return rows


def rar_rows(size, batch, device, seconds, compiled=False):
    """RAR's Table 5: images a second, one token a step with the cache, and the same to pixels.

    Weights are made up. The paper: batch 128, float32, one A100, pixels included.
    """
    small = size in TOY_SIZES
    shape = dict(grid=(8, 8), vocab_size=512, num_classes=10) if small else {}
    model = RAR(RARConfig(**RAR_SIZES[size] | shape)).to(device, decoding_precision(device)).eval()
    tokenizer = Tokenizer(TokenizerConfig() if small else MASKGIT_VQ16).to(device).eval()
    if compiled:
        compile_layers(model)

    draw_tokens = decoding(model, batch, steps=-1)  # with guidance
    cases = {"tokens": draw_tokens, "pixels": lambda: tokenizer.decode(draw_tokens())}
    times = interleaved(cases, device, seconds, f"RAR-{size}")
    return [dict(RAR=size, compiled=compiled, batch=batch, to=name, seconds=taken,
                 images_per_second=batch / taken) for name, taken in times.items()]


# ------------------------------------------------------------------------------------------------
# What people look at, and the command


def show(rows):
    """Prints rows, dicts with the same keys, as a table, and returns them."""
    lines = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    lines.insert(0, list(rows[0]))
    widths = [max(map(len, column)) + 2 for column in zip(*lines)]
    for line in lines:
        print("".join(cell.rjust(width) for cell, width in zip(line, widths)), flush=True)
    return rows


def draw(result, path):
    """Latency of a batch by the number of steps, and costs by the number of tokens."""
    figure = Figure(figsize=(13, 5), layout="tight")
    left, right = figure.subplots(1, 2)
    batches = [row for row in result["sampling"] if row["batch"] == result["batch"]]
    cached, uncached = ([row for row in batches if row["sampling"] == way]
                        for way in ("cached", "uncached"))

    for axes, rows, x, y, label in (
            (left, cached, "steps", "seconds", "cached"),
            (left, uncached, "steps", "seconds", "uncached"),
            (left, cached, "steps", "floor_seconds", "floor"),
            (right, result["training_by_tokens"], "tokens", "seconds", "training step"),
            (right, result["sampling_by_tokens"], "tokens", "seconds", "decoding"),
            (right, result["sampling_by_tokens"], "tokens", "floor_seconds", "floor of decoding")):
        axes.plot([row[x] for row in rows], [row[y] for row in rows], "o-", label=label)
        axes.set(xlabel=x, ylabel="seconds", yscale="log")
        axes.legend()
    pictures.save_figure(figure, path)


def write(result, out):
    """All figures so far into the folder `out`."""
    text = json.dumps(result, indent=1)
    border.write_safely(out / "bench.json", lambda partial: partial.write_text(text))


def limits(device, dtypes):
    """({dtype: operations a second in products of matrices}, bytes a second that memory gives)."""
    side = 8192 if device.type == "cuda" else 4096
    rates = {dtype: matrix_rate(device, dtype, side) for dtype in dtypes}
    return rates, 2**30 / sustained(torch.ones(2**28, device=device).sum)  # a gigabyte of float32


def bench(args):
    """Measure as the command line says, print the tables, write them and the picture."""
    device, out = border.pick_device(args.device), pathlib.Path(args.out)
    for name in ("bench.json", "bench.png"):
        border.output(out / name)
    side = {"tiny": 8, "toy": 8, "fine": 16}.get(args.size)  # tokens, of our own worlds
    toy, gpu, settings = side is not None, device.type == "cuda", SIZES[args.size]
    if toy:
        settings = settings | dict(grid=(side, side), vocab_size=512, num_classes=10)
    batch = args.batch_size or (64 if toy or gpu else 2)

    # What the device can do at best, in the precisions of train.py and of sample.py
    learn, draws = border.fast_precision(device), decoding_precision(device)
    rates, speed = limits(device, {learn, draws})
    name = torch.cuda.get_device_name(device) if gpu else f"{torch.get_num_threads()} CPU threads"
    result = dict(machine=name, torch=torch.__version__, size=args.size, batch=batch,
                  TFLOP_per_second={str(dtype): rate / 1e12 for dtype, rate in rates.items()},
                  GB_per_second=speed / 1e9)
    print(result)

    # A training step, with all that train.py does for its speed, and of its micro-batch
    if not gpu:
        speed_up_cpu()
    recipe = {name: value for name, (value, *_) in RECIPE.items()} | RECIPES.get(args.size, {})
    micro = min(recipe["micro_batch"], args.batch_size or (math.inf if gpu else batch))
    with device:  # so that it draws XXL's weights
        model = RandAR(Config(**settings))
    compiled = border.can_compile(device)
    if not args.no_training:
        result["training"] = show(training_rows(model, micro, rates[learn], args.seconds, compiled,
                                                recipe["batch_size"] // micro))
        parts = rows_by_tokens(settings, device, min(batch, 4), rates[learn], rates[draws], speed,
                               args.seconds)
        result |= zip(("training_by_tokens", "sampling_by_tokens"), map(show, parts))

    # Sampling
    model.eval().to(draws)
    result["sampling"] = []
    for rows in sampling_parts(model, batch, rates[draws], speed, args.seconds, compiled):
        result["sampling"] += show(rows)
        write(result, out)  # to compile the next may take longer than there is time

    # Exact parallel decoding, of the weights that ship
    shipped = {"toy": "randar_toy.pt", "fine": "fine/randar.pt"}.get(args.size)
    if shipped:
        model = load_randar(border.CHECKPOINTS / shipped, device).to(draws)
        rows = exact_rows(model, args.seconds)
        rows += exact_rows(model, args.seconds, compiled=True) if compiled else []
        result["exact"] = show(rows)

    write(result, out)
    if not args.no_training:  # the picture is of all of it
        draw(result, out / "bench.png")
    print(f"wrote the figures into {out}")


def main():
    parser = border.command_line(__doc__)
    add = parser.add_argument
    add("--size", default="toy", choices=SIZES, help="of the model (default: toy)")
    add("--rar", choices=RAR_SIZES, metavar="SIZE", help="the throughput of RAR instead")
    add("--batch-size", type=border.positive_int, help="images (default: 64; 2 of size L on a CPU)")
    add("--seconds", type=border.positive_float, default=60, help="for each part (default: 60)")
    add("--no-training", action="store_true", help="only sampling (to compile XXL takes minutes)")
    add("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    add("--out", default="bench", help="folder for picture and figures (default: bench)")
    args = parser.parse_args()
    with border.one_line_errors(smaller="--batch-size"):
        if args.rar:
            device = border.pick_device(args.device)
            compiles = device.type == "cuda" and border.can_compile(device)
            for compiled in (False, True) if compiles else (False,):
                show(rar_rows(args.rar, args.batch_size or 64, device, args.seconds, compiled))
        else:
            bench(args)


if __name__ == "__main__":
    main()
