"""The paper in miniature: trains and measures what notebook 8 shows. Both go on where they were stopped.

    python notebooks/miniature.py train      the models, into checkpoints/miniature: three hours on one core
    python notebooks/miniature.py measure    the figures, into notebooks/miniature: an hour and a half

    TRAININGS, train               the same data, batch, number of steps and recipe for all models
    figures                        how good a model's samples are: the toy judge's figures
    guidance_runs ... scg_runs     what each table and figure of the paper compares
    features, latency              what has no samples to judge
    measure, read, show            files, and how notebook 8 reads them

Every comparison has SAMPLES samples for each of SEEDS, against as many fresh pictures. The raster model and
the last random one are those that ship for everybody, trained by the same command.
"""

import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"  # the bars of what is called would hide the one that matters
import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT)]
import common  # noqa: E402  (after the path)
import toy  # noqa: E402
from evaluate import evaluate  # noqa: E402
from features import table_by_layer  # noqa: E402
from randar import ORDERS  # noqa: E402
from rar import load_model  # noqa: E402
from vqgan import load_tokenizer  # noqa: E402

WEIGHTS, RESULTS = common.CHECKPOINTS / "miniature", HERE / "miniature"
SAMPLES, SEEDS, BATCH = 2000, (0, 1, 2), 250
FIGURES = ("accuracy", "FID", "IS", "precision", "recall")
PARALLEL, ALL = 22, 64  # decoding steps: 88 of 256 as a share of 64, and one token a step

# ------------------------------------------------------------------------------------------------------------
# Training: python train.py, 5,400 steps each
#
# Figure 4a wants the same training after fewer steps. The learning rate is constant up to the last sixth, so
# a training to 600 steps without a descent is the beginning of that to 5,400.

STEPS = 5400
TRAININGS = {  # name: flags of train.py, and the steps at which weights are kept
    "toy": ("", (600, 1800, STEPS)),
    "tiny": ("--size tiny", (600, 1800, STEPS)),
    "raster": ("--order raster", (STEPS,)),
    "rar": ("--model rar", (STEPS,)),
    "dense": ("--position dense", (STEPS,)),
    "merge": ("--position merge", (STEPS,)),
}
SHIPPED = {("toy", STEPS): "randar_toy.pt", ("raster", STEPS): "randar_toy_raster.pt"}  # in checkpoints


def weights(name, steps=STEPS):
    """Where the weights of a training are kept."""
    shipped = SHIPPED.get((name, steps))
    return common.CHECKPOINTS / shipped if shipped else WEIGHTS / f"{name}_{steps}.pt"


def train(out):
    """Train every model of which weights are missing, in folders of `out`."""
    for name, (flags, kept) in TRAININGS.items():
        folder = pathlib.Path(out) / name
        for steps in kept:
            if weights(name, steps).is_file():
                continue
            state = folder / "training.pt"
            done = common.load(state)["step"] if state.is_file() else 0
            if done > steps:
                raise ValueError(f"{folder} has gone on to step {done}, but {weights(name, steps)} is "
                                 "missing: remove that folder, to train anew")
            if done < steps:
                print(f"{name}: from step {done} to {steps}", flush=True)
                line = [*flags.split(), "--steps", steps, "--descent", 0 if steps < STEPS else 1 / 6,
                        "--out", folder.resolve(), *["--resume"] * (done > 0)]
                run_to_its_end([sys.executable, "train.py", *map(str, line)])
            result = folder / ("rar.pt" if name == "rar" else "randar.pt")
            common.write_safely(weights(name, steps), lambda partial: shutil.copy(result, partial))


def run_to_its_end(command):
    """Run a command in the project's folder, with its bar. If it fails, it has said why: this ends, too."""
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TQDM_DISABLE": "0"})
    while process.poll() is None:
        try:
            process.wait()
        except KeyboardInterrupt:  # the terminal has sent it to the command as well, which saves first
            pass
    if process.returncode:
        sys.exit(process.returncode)


# ------------------------------------------------------------------------------------------------------------
# What is compared: a run is a dict of a training's name and steps, and how its model decodes


def figures(run, seed, device):
    """Accuracy, FID (the judge's Frechet distance), IS, precision and recall of SAMPLES samples: a dict.

    run: keys model, trained (steps), order, steps (decoding), cfg (its end; it starts at 1) and scg. Every
    seed compares with fresh pictures of its own.
    """
    model = load_model(weights(run["model"], run["trained"]), device).to(common.fast_precision(device))
    tokenizer = load_tokenizer(common.CHECKPOINTS / "tokenizer.pt", device)
    generator = torch.Generator(device).manual_seed(seed)
    classes = torch.arange(SAMPLES, device=device) % len(toy.CLASSES)
    pixels = [common.to_uint8(tokenizer.decode(model.generate(
        some, order=run["order"], steps=run["steps"], cfg=(1.0, run["cfg"]), scg=run["scg"],
        generator=generator))) for some in classes.split(BATCH)]
    fresh, _, _ = toy.make(SAMPLES, toy.JUDGE_SEED + 100 + seed)
    result = evaluate(np.concatenate(pixels), fresh, classes=classes.cpu().numpy())
    return {name: result[name] for name in FIGURES}


def run_of(model, steps=PARALLEL, order="random", cfg=None, scg=1.0, trained=STEPS):
    """A run; cfg None: the best one of Table 1's sweep, for the models that are in it."""
    cfg = best_guidance(model) if cfg is None else cfg
    return dict(model=model, trained=trained, order=order, steps=steps, cfg=cfg, scg=scg)


SWEEP = (1.0, 1.5, 2.5, 4.0, 6.0)


def guidance_runs():
    """Table 1, last block, and RAR: each at each guidance."""
    return [run_of(model, steps, order, cfg) for model, steps, order in (
        ("toy", PARALLEL, "random"), ("raster", ALL, "raster"), ("rar", ALL, "raster")) for cfg in SWEEP]


def best_guidance(model):
    """The guidance of lowest mean FID in the sweep; for models that are not in it, the random one's."""
    found = read("guidance")
    if len(found) < len(guidance_runs()) or min(len(row["results"]) for row in found) < len(SEEDS):
        raise ValueError("the best guidance is not known yet: measure --only guidance first")
    rows = [row for row in found if row["run"]["model"] == (model if model in ("raster", "rar") else "toy")]
    return min(rows, key=lambda row: mean_and_spread(row, "FID")[0])["run"]["cfg"]


def position_runs():
    """Table 2: position instruction tokens; merged ones can only be decoded one token a step."""
    return [run_of(name, ALL, cfg=cfg) for name in ("toy", "dense", "merge") for cfg in (1.0, 1.5, 2.5)]


def order_runs():
    """Table 3: the ten orders, and Halton's."""
    return [run_of("toy", order=order) for order in ORDERS]


def step_runs():
    """Figure 4b, and whether an order of tokens that lie far apart allows fewer steps."""
    counts = (4, 8, 12, PARALLEL, ALL)
    runs = [run_of("toy", steps, order) for order in ("random", "hierarchical", "halton") for steps in counts]
    return runs + [run_of("raster", steps, "raster") for steps in counts]


def training_runs():
    """Figure 4a, Table B: quality against training steps, two sizes."""
    return [run_of(name, trained=steps) for name in ("toy", "tiny") for steps in TRAININGS[name][1]]


def scg_runs():
    """Table D: spatial contextual guidance at training resolution, on and off."""
    return [run_of("toy", scg=scg) for scg in (1.0, 1.2, 1.5)]


RUNS = {"guidance": guidance_runs, "positions": position_runs, "orders": order_runs, "steps": step_runs,
        "training": training_runs, "scg": scg_runs}


def features(device):
    """Table 5 and C: PCK and probe by round and layer, for the random and the raster model: a row each."""
    tokenizer = load_tokenizer(common.CHECKPOINTS / "tokenizer.pt", device)
    for name in ("toy", "raster"):
        model = load_model(weights(name), device)
        tables = [table_by_layer(model, tokenizer, 200, seed, model.order).tolist() for seed in SEEDS]
        yield dict(run=dict(model=name), results=tables)


def latency(device, repeats=5):
    """Table 4: seconds for one image and for 64 with guidance, by the number of decoding steps: rows.

    The counts take turns, so that what else the machine does meets all of them alike; medians.
    """
    model, counts = load_model(weights("toy"), device), (ALL, 48, 32, PARALLEL, 16, 12, 8)
    taken = {(batch, steps): [] for batch in (1, 64) for steps in counts}
    for _ in range(repeats + 1):
        for (batch, steps), seconds in taken.items():
            started = time.perf_counter()
            model.generate(torch.zeros(batch, dtype=torch.int64, device=device), steps=steps)[0, 0].item()
            seconds.append(time.perf_counter() - started)
    return [dict(run=dict(batch=batch, steps=steps), results=[{"seconds": statistics.median(seconds[1:])}])
            for (batch, steps), seconds in taken.items()]


# ------------------------------------------------------------------------------------------------------------
# Measuring, and files: a JSON file for each of RUNS, {"run": ..., "results": one dict for each seed} in each


def read(name):
    """The rows of a file of results; an empty list where there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else []


def write(name, rows):
    text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
    common.write_safely(RESULTS / f"{name}.json", lambda partial: partial.write_text(text))


def measure(names, device):
    """Measure what is missing of the files called `names`; saves after each run and seed."""
    for name in names:
        if name in RUNS:
            # A run that another file has, too, is not measured twice.
            known = [row for other in (*RUNS, name) for row in read(other)]
            known = {json.dumps(row["run"]): row["results"] for row in known}
            rows = [dict(run=run, results=known.get(json.dumps(run), [])) for run in RUNS[name]()]
            missing = [(row, seed) for seed in SEEDS for row in rows if seed >= len(row["results"])]
            bar = tqdm(missing, desc=name, unit="run", disable=False)
            for row, seed in bar:
                row["results"].append(figures(row["run"], seed, device))
                bar.set_postfix_str(f"{row['run']['model']}: FID {row['results'][-1]['FID']:.2f}")
                write(name, [row for row in rows if row["results"]])
            write(name, rows)
        elif not read(name):
            write(name, list({"features": features, "latency": latency}[name](device)))
        print(f"{RESULTS / name}.json: complete", flush=True)


def mean_and_spread(row, figure):
    """Over the seeds: the mean, and the standard deviation of a single draw (0 of one seed alone)."""
    values = [result[figure] for result in row["results"]]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def show(rows, label):
    """Prints a line for each row, mean and spread of each figure; label: a run -> what the line is called."""
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
    parser = common.command_line(__doc__)
    parser.add_argument("what", choices=("train", "measure"))
    parser.add_argument("--only", nargs="+", choices=(*RUNS, "features", "latency"), metavar="NAME",
                        help=f"measure only some of {', '.join((*RUNS, 'features', 'latency'))}")
    parser.add_argument("--out", default="miniature", help="folder for trainings (default: miniature)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    args = parser.parse_args()
    with common.one_line_errors():
        if args.what == "train":
            train(common.writable_folder(args.out))
        else:
            measure(args.only or (*RUNS, "features", "latency"), common.pick_device(args.device))


if __name__ == "__main__":
    main()
