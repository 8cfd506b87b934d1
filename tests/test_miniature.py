"""The paper in miniature: notebooks/miniature.py trains and measures what notebook 8 shows."""

import pathlib
import shutil
import sys

import pytest
import torch
from helpers import small_model

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "notebooks"))
import common  # noqa: E402  (after the path)
import miniature  # noqa: E402
from miniature import RUNS, SEEDS, STEPS, TRAININGS, mean_and_spread, read, weights  # noqa: E402
from rar import load_model  # noqa: E402


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Weights and results are kept in an empty folder."""
    monkeypatch.setattr(miniature, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(miniature, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(miniature, "SHIPPED", {})
    return tmp_path


def row(model="toy", cfg=1.0, fid=(1.0, 2.0, 3.0)):
    run = dict(model=model, trained=STEPS, order="random", steps=22, cfg=cfg, scg=1.0)
    return dict(run=run, results=[{"FID": value} for value in fid])


@pytest.mark.parametrize("name, steps", [(name, steps) for name in TRAININGS for steps in TRAININGS[name][1]])
def test_the_weights_of_every_training_ship(name, steps):
    model = load_model(weights(name, steps))
    assert model.config.grid == (8, 8) and model.config.vocab_size == 512


def test_all_that_ships_is_small():
    assert sum(file.stat().st_size for file in common.CHECKPOINTS.glob("**/*.pt")) < 25e6


@pytest.mark.parametrize("name", RUNS)
def test_every_comparison_was_measured_with_all_seeds(name):
    rows = read(name)
    assert [row["run"] for row in rows] == RUNS[name]()
    for row in rows:
        assert len(row["results"]) == len(SEEDS)
        assert all(0 <= result["accuracy"] <= 1 and result["FID"] > 0 for result in row["results"])


def test_random_order_beats_guessing_by_far_in_what_was_measured():
    [row] = [row for row in read("orders") if row["run"]["order"] == "random"]
    assert mean_and_spread(row, "accuracy")[0] > 0.9


def test_the_spread_is_the_standard_deviation_between_seeds():
    assert mean_and_spread(row(), "FID") == (2.0, 1.0)
    assert mean_and_spread(row(fid=[4.0]), "FID") == (4.0, 0.0)


def test_the_best_guidance_is_that_of_the_lowest_mean_distance(elsewhere, monkeypatch):
    monkeypatch.setattr(miniature, "guidance_runs", lambda: [1, 2, 3])
    miniature.write("guidance", [row(cfg=1.0), row(cfg=2.0, fid=(2.0, 2.0, 1.0)), row("raster", cfg=4.0)])
    assert miniature.best_guidance("toy") == 2.0
    assert miniature.best_guidance("dense") == 2.0  # not in the sweep
    assert miniature.best_guidance("raster") == 4.0


def test_without_a_complete_sweep_the_best_guidance_is_not_guessed(elsewhere):
    miniature.write("guidance", [row()])
    with pytest.raises(ValueError, match="measure --only guidance first"):
        miniature.best_guidance("toy")


def test_measuring_goes_on_where_it_was_stopped_and_measures_no_run_twice(elsewhere, monkeypatch):
    asked = []

    def figures(run, seed, device):
        asked.append((run["cfg"], seed))
        return {"FID": 1.0}

    monkeypatch.setattr(miniature, "figures", figures)
    runs = [row(cfg=1.0)["run"], row(cfg=2.0)["run"], row(cfg=3.0)["run"]]
    monkeypatch.setattr(miniature, "RUNS", {"one": lambda: runs[:2], "two": lambda: runs})
    miniature.write("one", [row(cfg=1.0, fid=(1.0,))])
    miniature.measure(["one", "two"], torch.device("cpu"))
    assert asked == [(2.0, 0), (1.0, 1), (2.0, 1), (1.0, 2), (2.0, 2), (3.0, 0), (3.0, 1), (3.0, 2)]
    assert [len(row["results"]) for row in read("two")] == [3, 3, 3]


def test_figures_are_those_of_the_samples_of_a_seed(elsewhere, monkeypatch):
    monkeypatch.setattr(miniature, "SAMPLES", 70)
    run = row()["run"] | dict(model="toy", steps=2)
    (elsewhere / "weights").mkdir()
    shutil.copy(common.CHECKPOINTS / "randar_toy.pt", elsewhere / "weights" / f"toy_{STEPS}.pt")
    first, again, other = (miniature.figures(run, seed, torch.device("cpu")) for seed in (0, 0, 1))
    assert first == again != other and set(first) == set(miniature.FIGURES)


def test_training_calls_train_py_for_what_is_missing_and_goes_on_from_what_is_there(elsewhere, monkeypatch):
    lines = []

    def pretend(line):
        lines.append(" ".join(line[2:]))
        folder, steps = pathlib.Path(line[line.index("--out") + 1]), int(line[line.index("--steps") + 1])
        folder.mkdir(exist_ok=True, parents=True)
        common.save({"step": steps}, folder / "training.pt")
        common.save({}, folder / "randar.pt")

    trainings = {"tiny": ("--size tiny", (600, STEPS)), "toy": ("", (STEPS,))}
    monkeypatch.setattr(miniature, "TRAININGS", trainings)
    monkeypatch.setattr(miniature, "run_to_its_end", pretend)
    (elsewhere / "weights").mkdir()
    common.save(small_model().state_dict(), elsewhere / "weights" / f"toy_{STEPS}.pt")  # this one is there
    miniature.train(elsewhere)
    assert lines == [f"--size tiny --steps 600 --descent 0 --out {elsewhere}/tiny",
                     f"--size tiny --steps {STEPS} --descent {1 / 6} --out {elsewhere}/tiny --resume"]
    assert weights("tiny", 600).is_file() and weights("tiny").is_file()
    weights("tiny", 600).unlink()  # what the folder holds is not that any more
    with pytest.raises(ValueError, match=f"gone on to step {STEPS}.*remove that folder"):
        miniature.train(elsewhere)


def test_a_training_that_fails_ends_with_its_own_exit_code():
    miniature.run_to_its_end([sys.executable, "-c", "open('train.py')"])  # in the project's folder
    with pytest.raises(SystemExit) as stop:
        miniature.run_to_its_end([sys.executable, "-c", "raise SystemExit(130)"])
    assert stop.value.code == 130
