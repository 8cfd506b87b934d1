"""The paper in miniature: trains and measures what notebook 8 shows. Both go on where they stopped.

    python -m studies.miniature train     models into checkpoints/miniature: five hours on one core
    python -m studies.miniature measure   figures into studies/miniature: for each run and seed two
                                          minutes of one core, five in the fine world; all: a day

    TRAININGS, train      the same data, batch, number of steps and recipe for all models
    RUNS                  what each table and figure of the paper compares
    figures               how good samples are, at the resolution of training and above
    features, latency     what has no samples to judge
    measure, read, show   files, and how notebook 8 reads them

Every comparison has SAMPLES samples for each of SEEDS, against as many fresh pictures; of enlarged
ones, which take long, ENLARGED. Models that ship for everybody are trained by the same command.
"""

import json
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import torch
from tqdm import tqdm

from apps import PARTS, extrapolate
from randar import ORDERS
from sample import load_models
from studies import bench
from studies.evaluate import evaluate
from studies.features import encoder_pck, table_by_layer, toy_pairs
from support import border, pictures, toy
from support.judge import JUDGE_SEED

HERE = pathlib.Path(__file__).resolve().parent
WEIGHTS, RESULTS = border.CHECKPOINTS / "miniature", HERE / "miniature"
SAMPLES, SEEDS, BATCH = 2000, (0, 1, 2), 250  # BATCH: drawn at a time
ENLARGED = 200
FIGURES = ("accuracy", "FID", "sFID", "IS", "precision", "recall")
PARALLEL, ALL = 22, 64  # decoding steps: 88 of 256 as a share of 64, and one token a step

# ------------------------------------------------------------------------------------------------
# Training: python train.py, in the plain world 5,400 steps each
#
# Figure 4a wants the same training after fewer steps. The learning rate is constant up to the last
# sixth: a training to 600 steps without a descent is the beginning of that to 5,400.

STEPS, FINE_STEPS, ANNEALED_STEPS = 5400, 6100, 2400  # what ships of fine: in two goes, 3,500 first
TRAININGS = {  # name: flags of train.py, and the steps at which weights are kept
    "toy": ("", (600, 1800, STEPS)),
    "tiny": ("--size tiny", (600, 1800, STEPS)),
    "raster": ("--order raster", (STEPS,)),
    "rar": ("--model rar", (STEPS,)),
    "dense": ("--position dense", (STEPS,)),
    "merge": ("--position merge", (STEPS,)),
    "dropout": ("--size tiny --token-dropout 0.1", (1800,)),
    "fine": ("--size fine --data fine", (FINE_STEPS,)),
}
# RAR's Table 2: when randomness is annealed, in shares of the training; its Table 3: to which
# order. Small models of few steps: good ones are all alike here, as good as fresh pictures.
ANNEALINGS = {f"annealed_{start:g}_{end:g}": (start, end) for start, end in (
    (0, 0), (0.25, 0.25), (0.25, 0.5), (0.5, 0.5), (0.5, 0.75), (0.5, 1), (0.75, 1), (1, 1))}
DEFAULT = "annealed_0.5_0.75"  # the paper's choice; it ends in raster order
ENDS = {f"{DEFAULT}_{order}": order for order in ORDERS[2:7]}  # all fixed ones but raster
SMALL_RAR = "--model rar --size tiny --batch-size 32 --report 40"
TRAININGS |= {name: (f"{SMALL_RAR} --anneal {start} {end}", (ANNEALED_STEPS,))
              for name, (start, end) in ANNEALINGS.items()}
TRAININGS |= {name: (f"{SMALL_RAR} --anneal 0.5 0.75 --order {order}", (ANNEALED_STEPS,))
              for name, order in ENDS.items()}
SHIPPED = {("toy", STEPS): "randar_toy.pt", ("raster", STEPS): "randar_toy_raster.pt",
           ("fine", FINE_STEPS): "fine/randar.pt"}  # these are not kept twice


def weights(name, steps=STEPS):
    """Where the weights of a training are kept."""
    if (name, steps) in SHIPPED:
        return border.CHECKPOINTS / SHIPPED[name, steps]
    return WEIGHTS / f"{name}_{steps}.pt"


def load(name, steps, device):
    """(model, tokenizer, name of the world) of a training."""
    world = "fine" if name == "fine" else "plain"
    path = toy.folder(world) / "tokenizer.pt"
    return *load_models(weights(name, steps), path, device), world


def train(out):
    """Train every model of which weights are missing, in folders of `out`."""
    missing = [(name, steps) for name, (_, kept) in TRAININGS.items() for steps in kept
               if not weights(name, steps).is_file()]
    for name, steps in missing:
        # Go on from where it is. train.py refuses if that is too far: then remove the folder.
        folder = out.resolve() / name
        flags, kept = TRAININGS[name]
        descent = 1 / 6 if steps in (STEPS, FINE_STEPS, ANNEALED_STEPS) else 0  # see above
        line = f"train.py {flags} --steps {steps} --descent {descent}".split()
        line += ["--resume"] if (folder / "training.pt").is_file() else []
        tokens = [path.parent for path in out.resolve().glob("*/tokens/labels.npy")
                  if (path.parts[-3] == "fine") == (name == "fine")]
        line += ["--data", str(tokens[0])] if tokens else []  # a world is encoded once
        command = [sys.executable, *line, "--out", str(folder)]
        code = subprocess.run(command, cwd=HERE.parent).returncode
        if code:
            sys.exit(code)  # it has said why

        # Keep what comes out: the next one goes on from there.
        result = folder / ("rar.pt" if "--model rar" in flags else "randar.pt")
        border.write_safely(weights(name, steps), lambda partial: shutil.copy(result, partial))
        if name in ANNEALINGS:  # RAR's Fig. 4a
            border.write_safely(RESULTS / f"{name}.jsonl",
                                lambda partial: shutil.copy(folder / "log.jsonl", partial))


# ------------------------------------------------------------------------------------------------
# What is compared: a run is a dict of a training's name and steps, and how its model decodes


def run_of(model, steps=PARALLEL, order="random", cfg=1.5, scg=1.0, trained=STEPS, **more):
    """A run; cfg: none of Table 1's sweep is better than 1.5 beyond the spread."""
    return dict(model=model, trained=trained, order=order, steps=steps, cfg=cfg, scg=scg) | more


def ways(model, order, steps, drafts, trained=STEPS):
    """Runs that decode one token a step, in parallel (causal, isolated queries), and exactly.

    steps: a list of how many, the last of which is one token a step; drafts: a list, of exact ones.
    """
    causal, isolated = (dict(queries=name, drafts=None) for name in ("causal", "isolated"))
    rows = [(n, way) for n in steps[:-1] for way in (causal, isolated)] + [(steps[-1], causal)]
    rows += [(None, dict(queries="isolated", drafts=n)) for n in drafts]
    return [run_of(model, n, order, trained=trained, **way) for n, way in rows]


WHOLE = dict(factor=2, hierarchical=True, frequencies=1, scg=2.5)  # apps.extrapolate's defaults
RUNS = {  # file: the runs that a table or figure of the paper compares
    # Table 1, last block, and RAR: each at each guidance
    "guidance": [run_of(*way, cfg) for way in (
        ("toy", PARALLEL, "random"), ("raster", ALL, "raster"), ("rar", ALL, "raster"))
        for cfg in (1.0, 1.5, 2.5, 4.0, 6.0)],
    # Table 2: one token a step, and in parallel
    "positions": [run_of(model, ALL, cfg=cfg)
                  for model in ("toy", "dense", "merge") for cfg in (1.0, 1.5, 2.5)],
    "positions_parallel": [run_of(model, steps) for model in ("toy", "dense", "merge")
                           for steps in (PARALLEL, 8)],
    # Table 3: the paper's ten, whatever a reader has added; there, fixed ones go one token a step
    "orders": [run_of("toy", order=order) for order in ORDERS[:10]],
    "fixed_orders": [run_of("toy", ALL, order) for order in ORDERS[1:7]],
    # Figure 4b; do orders of tokens that lie far apart allow fewer steps?
    "steps": [run_of(model, steps, order) for model, order in (
        ("toy", "random"), ("toy", "hierarchical"), ("raster", "raster"))
        for steps in (4, 8, 12, PARALLEL, ALL)],
    # Figure 4a, Table B: quality against training steps, two sizes
    "training": [run_of(model, trained=steps)
                 for model in ("toy", "tiny") for steps in TRAININGS[model][1]],
    # Table D: spatial contextual guidance at training resolution, off and on. "dropout" is "tiny",
    # but has lost tokens in training as well: the paper's reason why it should help
    "scg": [run_of(model, scg=scg, trained=trained) for model, trained in (
        ("toy", STEPS), ("tiny", 1800), ("dropout", 1800)) for scg in (1.0, 1.2, 1.5)],
    "fine_scg": [run_of("fine", 88, scg=scg, trained=FINE_STEPS) for scg in (1.0, 1.2, 1.5, 2.0)],
    # Not in the paper: queries that do not see each other, and exact parallel decoding
    "exact": ways("toy", "random", (4, 8, 12, PARALLEL, ALL), (2, 4, 8)),
    "exact_orders": [run for order in ("raster", "hierarchical")
                     for run in ways("toy", order, (4, 8, 12, PARALLEL, ALL), (2, 4, 8))],
    "fine_exact": ways("fine", "random", (16, 32, 48, 88, 256), (8,), FINE_STEPS),
    # Figure 6, App. F: twice the resolution, part by part; the mix alone and three times are ours
    "extrapolation": [WHOLE | parts for parts in PARTS.values()],
    "frequencies": [WHOLE | dict(frequencies=k, scg=1.0) for k in range(5)],
    "enlarged_scg": [WHOLE | dict(scg=scg) for scg in (1.0, 1.5, 2.0, 2.5, 4.0)],
    "threefold": [WHOLE | parts | dict(factor=3) for parts in PARTS.values()],
    # RAR's Table 2: when randomness is annealed, the random-only model in raster order as well; its
    # Table 3: the order in which training ends
    "annealing": [run_of(name, ALL, order, 1.0, trained=ANNEALED_STEPS) for name, order in (
        *((name, "raster") for name in ANNEALINGS), ("annealed_1_1", "random"))],
    "ends": [run_of(name, ALL, order, 1.0, trained=ANNEALED_STEPS) for name, order in (
        (DEFAULT, "raster"), *ENDS.items())],
    # Tables 5 and C: PCK and probe by layer and round; PCK of the tokenizer's encoder
    "features": [dict(model="toy"), dict(model="raster")],
    "encoder": [dict(model="toy")],
}


def figures(run, seed, device):
    """FIGURES of samples: a dict; FID is the judge's Frechet distance.

    run: keys model, trained (steps), order, steps (decoding), cfg (its end; it starts at 1), scg,
    some with queries and drafts: of SAMPLES. Or, with the key factor, keywords of apps.extrapolate:
    of ENLARGED by the fine model, in 128 steps, and in step 1 as many, not one token a step: eight
    times faster, a little worse.
    Every seed compares with as many fresh pictures of its own.
    """
    larger = "factor" in run
    name, trained = ("fine", FINE_STEPS) if larger else (run["model"], run["trained"])
    model, tokenizer, world = load(name, trained, device)
    model.to(border.fast_precision(device))
    generator = torch.Generator(device).manual_seed(seed)
    number, pixels = ENLARGED if larger else SAMPLES, []
    classes = torch.arange(number, device=device) % len(toy.CLASSES)
    batch = 50 if run.get("factor") == 3 else BATCH  # of these 50 have 4 GB of keys and values
    for some in classes.split(batch):  # [batch]
        if larger:
            images, _ = extrapolate(model, tokenizer, some, steps=128, generator=generator, **run)
        else:
            way = {name: run[name] for name in ("queries", "drafts") if name in run}
            tokens = model.generate(some, run["order"], run["steps"], cfg=(1.0, run["cfg"]),
                                    scg=run["scg"], generator=generator, **way)
            images = tokenizer.decode(tokens)  # [batch, 3, S, S]
        pixels.append(pictures.to_uint8(images))

    pixels = np.concatenate(pixels)  # [number, S, S, 3]
    fresh, _, _ = toy.make(number, JUDGE_SEED + 100 + seed, world, side=pixels.shape[1])
    return evaluate(pixels, fresh, classes=classes.cpu().numpy())


def features(run, seed, device):
    """Of a run with the key model alone, what table_by_layer measures, as lists."""
    model, tokenizer, _ = load(run["model"], STEPS, device)
    return table_by_layer(model, tokenizer, 200, seed).tolist()


def encoder(run, seed, device):
    """PCK of the encoder of a model's tokenizer, as a dict."""
    _, tokenizer, world = load(run["model"], STEPS, device)
    by_image, by_point = encoder_pck(tokenizer, toy_pairs(200, seed, world))
    return dict(PCK=by_image, by_point=by_point)


def latency(device, seconds=20):
    """Table 4: seconds for one image and for 64 with guidance, by the number of steps: rows."""
    model, _, _ = load("toy", STEPS, device)
    cases = {(batch, n): bench.decoding(model, batch, n)
             for batch in (1, 64) for n in (ALL, 48, 32, PARALLEL, 16, 12, 8)}
    times = bench.interleaved(cases, device, seconds, "latency")
    return [dict(run=dict(batch=batch, steps=n), results=[dict(seconds=taken)])
            for (batch, n), taken in times.items()]


# ------------------------------------------------------------------------------------------------
# Measuring, and files: rows {"run": ..., "results": one dict for each seed} as JSON, a line each


def read(name):
    """The rows of a file of results; an empty list where there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else []


def measure(name, device):
    """Measure what is missing of the file called `name`; saves after each run and seed."""
    function = {"features": features, "encoder": encoder}.get(name, figures)
    rows = read(name)  # those that nobody asks for any more stay
    rows += [dict(run=run, results=[]) for run in RUNS[name] if not pick(rows, **run)]
    missing = [(row, seed) for seed in SEEDS for row in rows if seed >= len(row["results"])]
    for row, seed in tqdm(missing, desc=name):
        row["results"].append(function(row["run"], seed, device))
        text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
        border.write_safely(RESULTS / f"{name}.json", lambda partial: partial.write_text(text))


def mean_and_spread(row, figure):
    """Over the seeds: the mean, and the standard deviation of a single draw."""
    values = np.array([result[figure] for result in row["results"]])  # one for each seed
    return values.mean(), values.std(ddof=1)


def show(rows, label):
    """Prints a line for each row: mean and spread of each figure; label: a run -> a line's name."""
    table = []
    measured = [x for x in FIGURES if all(x in row["results"][0] for row in rows)]  # some: no sFID
    for row in rows:
        cells = [mean_and_spread(row, name) for name in measured]
        texts = {name: f"{x:.3f} ±{spread:.3f}" for name, (x, spread) in zip(measured, cells)}
        table.append({"": label(row["run"])} | texts)
    bench.show(table)


def pick(rows, **wanted):
    """The rows whose runs have these values, for example pick(rows, model="toy", steps=22)."""
    return [row for row in rows if all(row["run"][key] == value for key, value in wanted.items())]


def main():
    parser = border.command_line(__doc__)
    add = parser.add_argument
    add("what", choices=("train", "measure"))
    add("--only", nargs="+", choices=RUNS, default=RUNS, help="measure only some files")
    add("--out", default="miniature", help="for trainings (default: miniature)")
    add("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    args = parser.parse_args()
    with border.one_line_errors():
        if args.what == "train":
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is train.py's, which saves first
            train(border.writable_folder(args.out))
        else:
            device = border.pick_device(args.device)
            for name in args.only:
                measure(name, device)


if __name__ == "__main__":
    main()
