"""How fast it is, and how near to what the hardware allows: python bench.py

With no argument: the toy model, in a minute or two. python bench.py --size L measures the paper's sizes, with
made-up weights: on a GPU, or in some minutes on a CPU (two images at a time, not every combination).

    interleaved                 how times and memory are measured
    bandwidth, decoding_floor   what this device can do, and what the method asks of it
    training_rows               a step of training, plain and compiled
    sampling_rows               a batch of images, cached and uncached, in many steps and few
    scaling_rows                how the costs grow with the number of tokens
    show, draw                  what people look at

    bench/bench.json   all figures        bench/bench.png   latency against steps, cost against tokens
"""

import copy
import itertools
import json
import math
import pathlib
import time
from statistics import median

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import common
from randar import SIZES, Config, RandAR, generation_order, step_sizes
from sample import decoding_steps
from train import make_optimizer, training_flops

NO_CFG, CFG = (1.0, 1.0), (1.0, 4.0)  # without and with classifier-free guidance

# ------------------------------------------------------------------------------------------------------------
# How it is measured, what the device can do (common.matrix_rate, too) and what the method asks of it


def interleaved(cases, device, seconds, what):
    """Run functions in turn, in rounds: so what else the machine does meets all of them alike.

    cases: {name: function}, warmed up. Ends after five rounds, or the first that ends after `seconds`.
    Returns {name: (median of seconds, peak in GB)}; on a CPU the whole process's, None where none can tell.
    """
    taken, peak, began = {name: [] for name in cases}, {}, time.perf_counter()
    cuda, linux = device.type == "cuda", pathlib.Path("/proc/self/status")
    for i in range(5):
        for name, function in tqdm(cases.items(), desc=f"{what}, round {i + 1}", leave=False):
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
            elif linux.exists():
                linux.with_name("clear_refs").write_text("5")  # forget the highest mark
            started = time.perf_counter()
            function()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            taken[name].append(time.perf_counter() - started)
            if cuda:
                peak[name] = torch.cuda.max_memory_allocated(device) / 1e9
            elif linux.exists():
                peak[name] = int(linux.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9
        if time.perf_counter() - began > seconds:
            break
    return {name: (median(times), peak.get(name)) for name, times in taken.items()}


def bandwidth(device):
    """Bytes a second that the device reads from its memory: of far more than its caches hold."""
    x = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    return 4 * len(x) / interleaved({"read": x.sum}, device, 5, "bandwidth")["read"][0]


def decoding_floor(model, streams, steps, width, rate, speed):
    """Seconds that decoding must take on a device that does nothing else, and does it perfectly.

    streams: sequences at a time, two an image with guidance; width: bytes of a number; rate and speed: the
    operations and bytes a second. A step reads weights, keys and values once, and multiplies meanwhile.
    """
    config, d = model.config, model.config.dim
    in_layers, in_head = sum(p.numel() for p in model.layers.parameters()), d * config.vocab_size
    seconds, pending, place = 0.0, 1, 0
    for m in step_sizes(math.prod(config.grid), steps):
        n, end = pending + m, place + pending + m  # n new tokens; the last one looks at `end` of them
        attention = config.n_layer * d * n * (place + end)  # query by key, weight by value, half of the n x n
        operations = 2 * streams * (n * in_layers + m * in_head + attention)
        numbers = in_layers + in_head + streams * config.n_layer * 2 * d * (end + n)  # all read, n written
        seconds += max(operations / rate, numbers * width / speed)
        place, pending = place + pending + 1, 2 * m - 1  # x_1 P_2 x_2 .. P_m x_m: the P_1 stays where it is
    return seconds


# ------------------------------------------------------------------------------------------------------------
# What is measured


def training_step(model, optimizer, batch, precision, loss_function):
    """A function that takes one step, as train.py does."""
    device, number = next(model.parameters()).device, math.prod(model.config.grid)
    tokens = torch.randint(model.config.vocab_size, (batch, number), device=device)
    classes = torch.randint(model.config.num_classes, (batch,), device=device)

    def step():
        with torch.autocast(device.type, precision, enabled=precision is not torch.float32):
            loss = loss_function(tokens, classes)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def training_rows(model, batch, device, rates, seconds):
    """A row for each way to train. rates: {precision: operations a second}, the fastest one last."""
    ways = [("plain", precision, model.train().loss) for precision in rates]
    if common.can_compile(device):
        ways.append(("compiled", list(rates)[-1], torch.compile(model.loss)))
    optimizer, number = make_optimizer(model, 1e-4), math.prod(model.config.grid)
    cases = {way: training_step(model, optimizer, batch, *way[1:]) for way in ways}
    for step in tqdm(cases.values(), desc="training, warm-up", leave=False):
        step()
    flops, timed = training_flops(model), interleaved(cases, device, seconds, "training").items()
    return [dict(training=f"{way} {str(precision)[6:]}", batch=batch, seconds=taken,
                 images_per_second=batch / taken, tokens_per_second=batch / taken * number,
                 GFLOP_per_image=flops / 1e9, MFU=flops * batch / taken / rates[precision], peak_GB=peak)
            for (way, precision, _), (taken, peak) in timed]


@torch.no_grad()
def uncached_logits(model, tokens, classes, order, done, m):
    """What a decoding step would compute without a cache: all of the sequence goes through all layers again.

    tokens [b, N], classes [b], order [b, N], int64, of whose turns the first `done` are known. Returns logits
    of the next m turns, [b, m, V], without guidance.
    """
    known, end = 1 + 2 * done, 1 + 2 * (done + m)  # [class, P_1, x_1, ...], and then Q_1 .. Q_m
    x, rotation = (torch.cat([y[:, :known], y[:, known:end:2]], dim=1)
                   for y in model.sequence(tokens, classes, order))
    return model.output(model.norm(model.hidden_states(x, rotation)[:, -m:]))


def decoding(model, batch, cfg, steps, cached=True):
    """A function that draws a batch of images; without a cache, it makes five evenly spaced steps only."""
    classes = torch.zeros(batch, dtype=torch.int64, device=next(model.parameters()).device)
    if cached:
        return lambda: model.generate(classes, steps=steps, cfg=cfg)
    classes = classes if cfg == NO_CFG else classes.repeat(2)
    order = generation_order("random", len(classes), model.config.grid, device=classes.device)
    sizes = step_sizes(order.shape[1], steps)

    def five_steps():
        for k in ((2 * i + 1) * steps // 10 for i in range(5)):
            uncached_logits(model, torch.zeros_like(order), classes, order, sum(sizes[:k]), sizes[k])
    return five_steps


def sampling_rows(models, batch, device, rates, speed, seconds, slow):
    """A row for each combination. models: {precision: model}; the first is measured in all; slow: in some."""
    first, cases = next(iter(models)), {}
    number, usual = (f(models[first].config.grid) for f in (math.prod, decoding_steps))
    some = (number, usual, -(-number * 48 // 256))  # 256, 88 and 48, or as large a share of fewer tokens
    for case in itertools.product(models, sorted({1, batch}), (NO_CFG, CFG), some, (True, False)):
        precision, size, cfg, steps, cached = case
        full, as_usual = size == batch and cfg == CFG, steps == usual
        if full and as_usual or precision is first and (not slow or cached and (full or as_usual)):
            cases[case] = decoding(models[precision], size, cfg, steps, cached)
    warm = [decoding(model, batch, CFG, 2) for model in models.values()] if slow else cases.values()
    for function in tqdm(warm, desc="sampling, warm-up", leave=False):
        function()
    rows = []
    for case, (taken, peak) in interleaved(cases, device, seconds, "sampling").items():
        precision, size, cfg, steps, cached = case
        taken *= 1 if cached else steps / 5  # of which five were made: their cost is a smooth curve
        streams = size * (1 if cfg == NO_CFG else 2)
        floor = decoding_floor(models[precision], streams, steps, precision.itemsize, rates[precision], speed)
        rows.append(dict(sampling=f"{'cached' if cached else 'uncached'} {str(precision)[6:]}", batch=size,
                         guidance="no" if cfg == NO_CFG else "yes", steps=steps, seconds=taken,
                         images_per_second=size / taken, floor_seconds=floor, times_floor=taken / floor,
                         peak_GB=peak))
    return rows


def scaling_rows(settings, batch, device, precision, rate, speed, seconds):
    """A row for each number of tokens: times and memory of a plain model, and what they should grow as."""
    models, training, kept = {}, {}, {}
    for side in (8, 16, 24, 32):
        model = models[side] = RandAR(Config(**settings | dict(grid=(side, side)))).to(device)
        training[side] = training_step(model, make_optimizer(model, 1e-4), batch, precision, model.loss)
        bytes_of = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}  # not to be counted

        def note(x):
            bytes_of.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
            return x
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):  # what the backward pass will need
            training[side]()
        kept[side] = sum(bytes_of.values()) / 1e9
    trained = interleaved(training, device, seconds / 2, "numbers of tokens, training")
    drawing = {side: decoding(model.eval().to(precision), batch, CFG, decoding_steps((side, side)))
               for side, model in models.items()}
    drawing[8]()
    drawn = interleaved(drawing, device, seconds / 2, "numbers of tokens, decoding")
    return [dict(tokens=side**2, batch=batch, layers=model.config.n_layer, training_seconds=trained[side][0],
                 training_GFLOP=batch * training_flops(model) / 1e9, kept_GB=kept[side],
                 decoding_seconds=drawn[side][0], floor_seconds=decoding_floor(
                     model, 2 * batch, decoding_steps((side, side)), precision.itemsize, rate, speed))
            for side, model in models.items()]


# ------------------------------------------------------------------------------------------------------------
# What people look at, and the command


def show(rows):
    """Prints rows, dicts with the same keys, as a table, and returns them."""
    def cell(x):
        return (f"{x:.3g}" if x < 1000 else f"{x:.0f}") if isinstance(x, float) else str(x)
    cells = [[key.replace("_", " ") for key in rows[0]], *([cell(x) for x in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    print("", *("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells), sep="\n", flush=True)
    return rows


def draw(result, path):
    """Latency against steps, and cost against the number of tokens, each beside what theory says."""
    figure = Figure(figsize=(13, 5), dpi=110, layout="tight")
    left, right = figure.subplots(1, 2)
    for way in dict.fromkeys(row["sampling"] for row in result["sampling"]):
        points = [(row["steps"], row["seconds"], row["floor_seconds"]) for row in result["sampling"]
                  if (row["sampling"], row["batch"], row["guidance"]) == (way, result["batch"], "yes")]
        steps, seconds, floor = zip(*points)
        line, = left.plot(steps, seconds, "o-", label=way)
        if not way.startswith("uncached"):
            left.plot(steps, floor, "x--", color=line.get_color(), label="its floor")
    left.set(xlabel="decoding steps", ylabel="seconds a batch", yscale="log",
             title=f"RandAR-{result['size']}: {result['batch']} images, with guidance")
    left.set_ylim(top=8 * left.get_ylim()[1])  # room for the legend
    rows, tokens = result["scaling"], [row["tokens"] for row in result["scaling"]]
    for measured, theory, label in (("training_seconds", "training_GFLOP", "time of a training step"),
                                    ("kept_GB", "tokens", "memory kept for its backward pass"),
                                    ("decoding_seconds", "floor_seconds", "time of decoding")):
        line, = right.plot(tokens, [row[measured] / rows[-1][measured] for row in rows], "o-", label=label)
        right.plot(tokens, [row[theory] / rows[-1][theory] for row in rows], "--", color=line.get_color())
    right.set(xlabel="tokens of an image", ylabel=f"share of that of {tokens[-1]} tokens", xscale="log",
              yscale="log", title=f"Number of tokens (layers: {rows[0]['layers']}; dashed: theory)")
    right.set_xticks(tokens, tokens), right.minorticks_off()
    for axes in (left, right):
        axes.legend(fontsize=9, loc="upper left", ncols=2 if axes is left else 1)
        axes.grid(alpha=0.3)
    common.write_safely(path, lambda partial: figure.savefig(partial, format="png"))


def bench(args):
    """Measure as the command line says, print the tables, write them and the picture."""
    device, out = common.pick_device(args.device), common.writable_folder(args.out)
    toy, gpu = args.size == "toy", device.type == "cuda"
    batch = args.batch_size or (64 if toy or gpu else 2)
    settings = SIZES[args.size] | (dict(grid=(8, 8), vocab_size=512, num_classes=10) if toy else {})
    model, fast = RandAR(Config(**settings)).to(device), common.fast_precision(device)
    precisions = [fast] if gpu else list(dict.fromkeys([torch.float32, fast]))
    rates = {dtype: common.matrix_rate(device, dtype, 8192 if gpu else 4096) for dtype in precisions}
    speed = bandwidth(device)
    machine = torch.cuda.get_device_name(device) if gpu else f"{torch.get_num_threads()} CPU threads"
    result = dict(date=time.strftime("%Y-%m-%d"), machine=machine, torch=torch.__version__, size=args.size,
                  batch=batch, GB_per_second=speed / 1e9,
                  TFLOP_per_second={str(precision)[6:]: rate / 1e12 for precision, rate in rates.items()})
    print(", ".join(f"{key} {value}" for key, value in result.items()))
    size = min(batch, 64 if toy else 32)  # train.py's micro-batch
    result["training"] = show(training_rows(model, size, device, rates, args.seconds))
    models = {precision: copy.deepcopy(model.eval()).to(precision) for precision in precisions}
    del model
    torch._dynamo.config.recompile_limit = 64  # a few graphs for each of the batches below
    for layer in models[fast].layers if gpu else []:  # on a CPU decoding is hardly faster for it
        layer.compile(dynamic=True)  # one graph serves all layers, and steps of all lengths
    slow = not (toy or gpu)
    result["sampling"] = show(sampling_rows(models, batch, device, rates, speed, args.seconds, slow))
    del models
    settings |= {} if toy else dict(n_layer=1 if slow else 4)  # the slopes are those of all layers
    result["scaling"] = show(scaling_rows(settings, 1 if slow else 4, device, precisions[0],
                                          rates[precisions[0]], speed, args.seconds))
    common.write_safely(out / "bench.json", lambda partial: partial.write_text(json.dumps(result, indent=1)))
    draw(result, out / "bench.png")
    print(f"\nwrote {out}/bench.json and {out}/bench.png")


def main():
    parser = common.command_line(__doc__)
    parser.add_argument("--size", default="toy", choices=SIZES, help="of the model (default: toy)")
    parser.add_argument("--batch-size", type=int, help="images at a time (default: 64; 2 of size L on a CPU)")
    parser.add_argument("--seconds", type=float, default=60, help="for repeats of each part (default: 60)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    parser.add_argument("--out", default="bench", help="folder for picture and figures (default: bench)")
    args = parser.parse_args()
    with common.one_line_errors():
        if args.batch_size is not None and args.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, not {args.batch_size}")
        bench(args)


if __name__ == "__main__":
    main()
