"""The paper in miniature: trains and measures what notebook 8 shows. Both go on where they stopped.

    python -m studies.miniature train     models into checkpoints/miniature: three hours on one core
    python -m studies.miniature measure   figures into studies/miniature: an hour and a half

    TRAININGS, train      the same data, batch, number of steps and recipe for all models
    figures, runs_of      how good samples are; what each table and figure of the paper compares
    features, latency     what has no samples to judge
    measure, read, show   files, and how notebook 8 reads them

Every comparison has SAMPLES samples for each of SEEDS, against as many fresh pictures. The raster
model and the last random one are those that ship for everybody, trained by the same command.
"""

import contextlib
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import torch
from tqdm import tqdm

from randar import ORDERS, load_randar
from studies.bench import decoding, interleaved
from studies.evaluate import evaluate
from studies.features import table_by_layer
from support import border, pictures, toy
from support.judge import JUDGE_SEED
from tokenizer import load_tokenizer

HERE = pathlib.Path(__file__).resolve().parent
WEIGHTS, RESULTS = border.CHECKPOINTS / "miniature", HERE / "miniature"
SAMPLES, SEEDS, BATCH = 2000, (0, 1, 2), 250  # BATCH: drawn at a time
FIGURES = ("accuracy", "FID", "IS", "precision", "recall")
PARALLEL, ALL = 22, 64  # decoding steps: 88 of 256 as a share of 64, and one token a step

# ------------------------------------------------------------------------------------------------
# Training: python train.py, 5,400 steps each
#
# Figure 4a wants the same training after fewer steps. The learning rate is constant up to the last
# sixth: a training to 600 steps without a descent is the beginning of that to 5,400.

STEPS = 5400
TRAININGS = {  # name: flags of train.py, and the steps at which weights are kept
    "toy": ("", (600, 1800, STEPS)),
    "tiny": ("--size tiny", (600, 1800, STEPS)),
    "raster": ("--order raster", (STEPS,)),
    "rar": ("--model rar", (STEPS,)),
    "dense": ("--position dense", (STEPS,)),
    "merge": ("--position merge", (STEPS,)),
}
# These two are not kept twice:
SHIPPED = {("toy", STEPS): "randar_toy.pt", ("raster", STEPS): "randar_toy_raster.pt"}


def weights(name, steps=STEPS):
    """Where the weights of a training are kept."""
    if (name, steps) in SHIPPED:
        return border.CHECKPOINTS / SHIPPED[name, steps]
    return WEIGHTS / f"{name}_{steps}.pt"


def train(out):
    """Train every model of which weights are missing, in folders of `out`."""
    missing = [(name, steps) for name, (_, kept) in TRAININGS.items() for steps in kept
               if not weights(name, steps).is_file()]
    for name, steps in missing:
        # Go on from where it is. train.py refuses if that is too far: then remove the folder.
        folder = out.resolve() / name
        descent = 1 / 6 if steps == STEPS else 0  # of the learning rate, see above
        line = f"train.py {TRAININGS[name][0]} --steps {steps} --descent {descent}".split()
        line += ["--resume"] if (folder / "training.pt").is_file() else []
        run_to_its_end([sys.executable, *line, "--out", str(folder)])

        # Keep what comes out: the next one goes on from there.
        result = folder / ("rar.pt" if name == "rar" else "randar.pt")
        border.write_safely(weights(name, steps), lambda partial: shutil.copy(result, partial))


def run_to_its_end(command):
    """Run a command in the project's folder. If it fails, it has said why: this ends, too."""
    process = subprocess.Popen(command, cwd=HERE.parent)  # in a process of its own, as typed
    while process.poll() is None:
        with contextlib.suppress(KeyboardInterrupt):  # the command has it, too, and saves first
            process.wait()
    if process.returncode:
        sys.exit(process.returncode)


# ------------------------------------------------------------------------------------------------
# What is compared: a run is a dict of a training's name and steps, and how its model decodes


def figures(run, seed, device):
    """FIGURES of SAMPLES samples: a dict; FID is the judge's Frechet distance.

    run: keys model, trained (steps), order, steps (decoding), cfg (its end; it starts at 1), scg.
    Every seed compares with fresh pictures of its own.
    """
    model = load_randar(weights(run["model"], run["trained"]), device)
    model.to(border.fast_precision(device))
    tokenizer = load_tokenizer(border.CHECKPOINTS / "tokenizer.pt", device)
    generator = torch.Generator(device).manual_seed(seed)
    classes, pixels = torch.arange(SAMPLES, device=device) % len(toy.CLASSES), []
    for some in classes.split(BATCH):  # [BATCH]
        tokens = model.generate(some, run["order"], run["steps"], cfg=(1.0, run["cfg"]),
                                scg=run["scg"], generator=generator)
        pixels.append(pictures.to_uint8(tokenizer.decode(tokens)))  # [BATCH, 32, 32, 3]

    fresh, _, _ = toy.make(SAMPLES, JUDGE_SEED + 100 + seed)
    result = evaluate(np.concatenate(pixels), fresh, classes=classes.cpu().numpy())
    return {name: result[name] for name in FIGURES}


def run_of(model, steps=PARALLEL, order="random", cfg=1.5, scg=1.0, trained=STEPS):
    """A run; cfg: 1.5 is the best one of Table 1's sweep, for random and for raster order."""
    return dict(model=model, trained=trained, order=order, steps=steps, cfg=cfg, scg=scg)


def runs_of(name):
    """The runs that a table or figure of the paper compares, by the name of its file: a list."""
    if name == "guidance":  # Table 1, last block, and RAR: each at each guidance
        ways = ("toy", PARALLEL, "random"), ("raster", ALL, "raster"), ("rar", ALL, "raster")
        return [run_of(*way, cfg) for way in ways for cfg in (1.0, 1.5, 2.5, 4.0, 6.0)]
    if name == "positions":  # Table 2: merged ones can only be decoded one token a step
        models = "toy", "dense", "merge"
        return [run_of(model, ALL, cfg=cfg) for model in models for cfg in (1.0, 1.5, 2.5)]
    if name == "orders":  # Table 3: the paper's ten, whatever a reader has added
        return [run_of("toy", order=order) for order in ORDERS[:10]]
    if name == "steps":  # Figure 4b; do orders of tokens that lie far apart allow fewer steps?
        ways = ("toy", "random"), ("toy", "hierarchical"), ("raster", "raster")
        return [run_of(model, steps, order) for model, order in ways
                for steps in (4, 8, 12, PARALLEL, ALL)]
    if name == "training":  # Figure 4a, Table B: quality against training steps, two sizes
        return [run_of(model, trained=steps) for model in ("toy", "tiny")
                for steps in TRAININGS[model][1]]
    if name == "scg":  # Table D: spatial contextual guidance at training resolution, off and on
        return [run_of("toy", scg=scg) for scg in (1.0, 1.2, 1.5)]


RUNS = ("guidance", "positions", "orders", "steps", "training", "scg")  # names for runs_of


def features(device):
    """Tables 5 and C: PCK and probe by layer and round, of the random and raster models: rows."""
    rows, tokenizer = [], load_tokenizer(border.CHECKPOINTS / "tokenizer.pt", device)
    for name in ("toy", "raster"):
        model = load_randar(weights(name), device)
        tables = [table_by_layer(model, tokenizer, 200, seed).tolist() for seed in SEEDS]
        rows.append(dict(run=dict(model=name), results=tables))
    return rows


def latency(device, seconds=20):
    """Table 4: seconds for one image and for 64 with guidance, by the number of steps: rows."""
    model, steps = load_randar(weights("toy"), device), (ALL, 48, 32, PARALLEL, 16, 12, 8)
    cases = {(batch, n): decoding(model, batch, n) for batch in (1, 64) for n in steps}
    return [dict(run=dict(batch=batch, steps=n), results=[dict(seconds=taken)])
            for (batch, n), taken in interleaved(cases, device, seconds, "latency").items()]


# ------------------------------------------------------------------------------------------------
# Measuring, and files: rows {"run": ..., "results": one dict for each seed} as JSON, a line each


def read(name):
    """The rows of a file of results; an empty list where there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else []


def write(name, rows):
    """Write a file of results."""
    text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
    border.write_safely(RESULTS / f"{name}.json", lambda partial: partial.write_text(text))


def measure(name, device):
    """Measure what is missing of the file called `name`; saves after each run and seed."""
    rows = read(name)
    if name == "features":
        write(name, rows or features(device))
        return

    # Rows that nobody asks for any more stay.
    rows += [dict(run=run, results=[]) for run in runs_of(name) if not pick(rows, **run)]
    missing = [(row, seed) for seed in SEEDS for row in rows if seed >= len(row["results"])]
    for row, seed in tqdm(missing, desc=name):
        row["results"].append(figures(row["run"], seed, device))
        write(name, rows)


def mean_and_spread(row, figure):
    """Over the seeds: the mean, and the standard deviation of a single draw."""
    values = np.array([result[figure] for result in row["results"]])  # one for each seed
    return values.mean(), values.std(ddof=1)


def show(rows, label):
    """Prints a line for each row: mean and spread of each figure; label: a run -> a line's name."""
    names = [label(row["run"]) for row in rows]
    width = max(map(len, names)) + 2
    print(" " * width + "".join(f"{figure:>16}" for figure in FIGURES))
    for row, name in zip(rows, names):
        cells = [mean_and_spread(row, figure) for figure in FIGURES]
        print(f"{name:{width}}" + "".join(f"{mean:>9.3f} ±{spread:.3f}" for mean, spread in cells))


def pick(rows, **wanted):
    """The rows whose runs have these values, for example pick(rows, model="toy", steps=22)."""
    return [row for row in rows if all(row["run"][key] == value for key, value in wanted.items())]


def main():
    names = (*RUNS, "features")
    parser = border.command_line(__doc__)
    add = parser.add_argument
    add("what", choices=("train", "measure"))
    add("--only", nargs="+", choices=names, default=names, help="measure only some files")
    add("--out", default="miniature", help="for trainings (default: miniature)")
    add("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    args = parser.parse_args()
    with border.one_line_errors():
        if args.what == "train":
            train(border.writable_folder(args.out))
        else:
            for name in args.only:
                measure(name, border.pick_device(args.device))


if __name__ == "__main__":
    main()
