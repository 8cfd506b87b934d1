"""FID, sFID, Inception Score, precision and recall: against closed forms, and from files to a table."""

import json
import shlex
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import seeded
from torch import Tensor, nn

import evaluate
import toy
from evaluate import Inception, Statistics, inception_score, precision_recall

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated, but the file is what it is

# ------------------------------------------------------------------------------------------------------------
# FID: statistics in batches, and the distance of two Gaussians


def statistics_of(features, batch):
    statistics = Statistics()
    for part in features.split(batch):
        statistics.add(part)
    return statistics


def test_statistics_in_batches_are_those_of_all_features_at_once():
    features = torch.randn(1000, 5, dtype=torch.float64, generator=seeded(0)).cumsum(1)  # correlated
    for batch in (1, 7, 1000):
        statistics = statistics_of(features, batch)
        mean, covariance = statistics.gaussian()
        assert statistics.count == 1000
        np.testing.assert_allclose(mean, features.numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-12)


def test_a_mean_far_from_zero_costs_the_covariance_no_digits():
    features = torch.randn(1000, 3, dtype=torch.float64, generator=seeded(0))
    _, covariance = statistics_of(features + 1e7, 10).gaussian()
    np.testing.assert_allclose(covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-7, atol=1e-7)


def test_features_in_float32_are_accumulated_in_float64():
    features = torch.rand(100_000, 2, generator=seeded(0)) + 1000
    mean, covariance = statistics_of(features, 1000).gaussian()
    np.testing.assert_allclose(mean, features.double().mean(0), rtol=1e-13)
    np.testing.assert_allclose(covariance, np.cov(features.double().numpy(), rowvar=False), atol=1e-9)


def test_the_distance_of_two_sampled_gaussians_is_that_of_the_closed_form():
    a, b, shift = torch.tensor([1.0, 4, 9, 16]), torch.tensor([4.0, 1, 9, 1]), torch.tensor([1.0, 0, -2, 0])
    expected = (shift.square() + (a.sqrt() - b.sqrt()).square()).sum().item()  # axes can be taken one by one
    x, y = torch.randn(2, 100_000, 4, generator=seeded(0))
    turn = torch.linalg.qr(torch.randn(4, 4, generator=seeded(1))).Q  # the distance does not depend on axes
    x, y = x * a.sqrt() @ turn, (y * b.sqrt() + shift) @ turn
    first, second = statistics_of(x, 999).gaussian(), statistics_of(y, 100).gaussian()
    assert toy.frechet_distance(*first, *second) == pytest.approx(expected, rel=0.02)


# ------------------------------------------------------------------------------------------------------------
# Inception Score


def test_a_network_that_never_decides_gives_the_score_one():
    assert inception_score(torch.full((100, 7), 1 / 7)) == pytest.approx(1)


def test_certain_and_equally_frequent_classes_give_their_number():
    assert inception_score(torch.eye(7).repeat(10, 1)) == pytest.approx(7)


def test_the_score_of_two_classes_at_nine_to_one_is_that_of_the_closed_form():
    probabilities = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).repeat(50, 1)
    expected = (0.9 / 0.5) ** 0.9 * (0.1 / 0.5) ** 0.1
    assert inception_score(probabilities) == pytest.approx(expected, rel=1e-6)


def test_the_score_is_the_mean_over_parts_of_the_file_in_its_order():
    mixed = torch.eye(4).repeat(100, 1)
    assert inception_score(mixed, split=100) == pytest.approx(4)
    assert inception_score(mixed[mixed.argmax(1).argsort()], split=100) == pytest.approx(1)
    rest = mixed[:1].repeat(100, 1)  # a shorter last part counts like any other
    assert inception_score(torch.cat([mixed, rest]), split=400) == pytest.approx((4 + 1) / 2)


# ------------------------------------------------------------------------------------------------------------
# Precision and recall


def cluster(x, n, seed):
    """n points of the plane around (x, 0)."""
    return torch.randn(n, 2, generator=seeded(seed)) + torch.tensor([x, 0.0])


def test_the_same_set_has_precision_and_recall_one():
    real = cluster(0, 100, 0)
    assert precision_recall(real, real.flip(0)) == (1, 1)


def test_sets_far_apart_have_precision_and_recall_zero():
    assert precision_recall(cluster(0, 100, 0), cluster(100, 100, 1)) == (0, 0)


def test_samples_of_half_of_the_real_pictures_are_precise_but_recall_half():
    real = torch.cat([cluster(0, 100, 0), cluster(100, 100, 1)])
    assert precision_recall(real, real[:100]) == (1, 0.5)


def test_samples_of_which_half_are_wrong_recall_everything_at_half_the_precision():
    real = cluster(0, 100, 0)
    assert precision_recall(real, torch.cat([real, cluster(100, 100, 1)])) == (0.5, 1)


def test_a_ball_reaches_to_the_third_neighbour():
    real = torch.tensor([[0.0], [1.0], [2.0], [4.0]])  # radii 4, 3, 2, 4: from -4 to 8
    samples = torch.tensor([[7.9], [8.1], [-3.9], [-4.1], [50.0]])
    assert precision_recall(real, samples, k=3)[0] == 2 / 5
    assert precision_recall(real, samples, k=1)[0] == 0  # radii 1, 1, 1, 2


def test_blocks_of_rows_do_not_change_the_figures(monkeypatch):
    real, samples = cluster(0, 100, 0), cluster(1.5, 90, 1)
    expected = precision_recall(real, samples)
    monkeypatch.setattr(evaluate, "BLOCK", 7)
    assert precision_recall(real, samples) == expected and 0.1 < expected[0] < 0.9


@pytest.mark.parametrize("real, samples", [(3, 4), (4, 3)])
def test_fewer_than_four_pictures_have_no_three_neighbours(real, samples):
    assert precision_recall(torch.zeros(4, 2), torch.zeros(4, 2)) == (1, 1)
    with pytest.raises(ValueError, match="3 neighbours need 4 pictures"):
        precision_recall(torch.zeros(real, 2), torch.zeros(samples, 2))


# ------------------------------------------------------------------------------------------------------------
# A small network, called like inception-2015-12-05.pt and with its names: 12 pool features, 28 with a place


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.tower = nn.Conv2d(6, 8, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.tower(x)], 1)


def between(x: Tensor, axis: int) -> Tensor:
    """299 values along an axis of n, the i-th at i n / 299, between its two neighbours."""
    n = x.size(axis)
    place = torch.arange(299) * n / 299
    low = place.floor().long()
    shape = [1, 1, 1, 1]
    shape[axis] = 299
    share = (place - low).view(shape)
    return x.index_select(axis, low) * (1 - share) + x.index_select(axis, (low + 1).clamp(max=n - 1)) * share


class Network(nn.Module):
    def __init__(self, shifted: bool, mixed: str):
        super().__init__()
        torch.manual_seed(0)
        self.shifted = shifted
        self.layers = nn.Sequential(OrderedDict([
            ("conv", nn.Conv2d(3, 6, 1, stride=200)), (mixed, Mixed()), ("pool2", nn.AdaptiveAvgPool2d(1))]))
        self.output = nn.Linear(12, 5)

    def forward(self, img: Tensor, return_features: bool = False, use_fp16: bool = False,
                no_output_bias: bool = False) -> Tensor:
        x = between(between(img.float(), 2), 3)  # [n, 3, 299, 299]
        if self.shifted:  # by half a pixel: what everybody does today
            x = F.interpolate(img.float(), (299, 299), mode="bilinear")
        features = self.layers((x - 128) / 128).flatten(1)
        if return_features:
            return features
        bias = None if no_output_bias else self.output.bias
        return F.linear(features, self.output.weight, bias).softmax(1)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A folder of TorchScript files."""
    folder = tmp_path_factory.mktemp("networks")
    for name, network in {"inception.pt": Network(False, "mixed_6"), "other_names.pt": Network(False, "b"),
                          "shifted.pt": Network(True, "mixed_6"), "no_inception.pt": Mixed()}.items():
        torch.jit.script(network).save(folder / name)
    torch.save({"weights": torch.zeros(3)}, folder / "weights.pt")
    (folder / "text.pt").write_text("not found")
    return folder


def noise(n, seed, side=24, top=256):
    return np.random.default_rng(seed).integers(top, size=(n, side, side, 3), dtype=np.uint8)


@torch.no_grad()
def test_the_features_are_those_of_the_call_and_of_the_convolution_in_mixed_6(networks):
    pixels, network = noise(5, 0), Network(False, "mixed_6")
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    pool, spatial, probabilities = Inception(networks / "inception.pt")(pixels)
    torch.testing.assert_close(pool, network(images, return_features=True))
    torch.testing.assert_close(probabilities, network(images, no_output_bias=True))
    resized = (between(between(images.float(), 2), 3) - 128) / 128
    maps = network.layers.mixed_6.conv(network.layers.conv(resized))  # [5, 8, 2, 2]
    assert spatial.shape == (5, 2 * 2 * 7)
    for y, x, channel in ((0, 0, 0), (0, 1, 3), (1, 0, 6)):  # the channel comes last, as in ADM's statistics
        torch.testing.assert_close(spatial.view(5, 2, 2, 7)[:, y, x, channel], maps[:, channel, y, x])


@pytest.mark.parametrize("file", ["other_names.pt", "shifted.pt"])
def test_parts_that_do_not_lead_to_the_features_of_the_call_are_not_used(networks, file):
    pool, spatial, _ = Inception(networks / file)(noise(3, 0))
    assert spatial is None and pool.shape == (3, 12)


# ------------------------------------------------------------------------------------------------------------
# All figures, from arrays


def half(pixels):
    """An extractor that knows no network: two features with a place, and the first of them without."""
    seen = torch.from_numpy(pixels[:, :2, 0, 0]).float()
    probabilities = F.one_hot(torch.from_numpy(pixels[:, 0, 0, 0] > 127).long(), 2)
    return evaluate.Features(seen[:, :1], seen, probabilities)


def test_the_figures_are_those_of_the_features():
    samples, reference = noise(300, 0, side=4, top=200), noise(200, 1, side=4)
    figures = evaluate.evaluate(samples, reference, half, batch_size=64)
    x, y = half(samples), half(reference)
    assert figures["FID"] == pytest.approx(toy.frechet_distance(
        x.pool.mean(0), x.pool.T.cov()[None, None], y.pool.mean(0), y.pool.T.cov()[None, None]), rel=1e-4)
    assert figures["sFID"] == pytest.approx(toy.frechet_distance(
        x.spatial.mean(0), x.spatial.T.cov(), y.spatial.mean(0), y.spatial.T.cov()), rel=1e-4)
    assert figures["IS"] == inception_score(x.probabilities)
    assert (figures["precision"], figures["recall"]) == precision_recall(y.pool, x.pool)
    assert figures.keys() == {"FID", "sFID", "IS", "precision", "recall", "stored"} and not figures["stored"]


def test_accuracy_is_the_share_of_samples_that_show_their_class():
    samples = noise(100, 0, side=4)
    seen = (samples[:, 0, 0, 0] > 127).astype(int)
    wrong = np.where(np.arange(100) < 25, 1 - seen, seen)
    assert evaluate.evaluate(samples, samples, half, classes=wrong)["accuracy"] == 0.75


def test_stored_statistics_stand_for_the_reference_where_their_size_fits():
    samples, reference = noise(300, 0, side=4), noise(200, 1, side=4, top=100)
    mean, covariance = statistics_of(half(samples).spatial, 300).gaussian()
    stored = {"sFID": (mean, covariance), "FID": (torch.zeros(7), torch.eye(7))}
    expected = evaluate.evaluate(samples, reference, half)
    figures = evaluate.evaluate(samples, reference, half, stored=stored)
    assert figures.pop("stored") == ["sFID"] and not expected.pop("stored")
    assert figures.pop("sFID") == pytest.approx(0, abs=1e-6) and expected.pop("sFID") > 100
    assert figures == expected


# ------------------------------------------------------------------------------------------------------------
# The command

INCEPTION = "--inception NETWORKS/inception.pt"


@pytest.fixture
def run(monkeypatch, tmp_path, networks):
    """A function that runs a command line in a folder with files of pictures, and returns its figures."""
    monkeypatch.chdir(tmp_path)
    draw = toy.make
    monkeypatch.setattr(toy, "make", lambda n, seed: draw(min(n, 300), seed))  # 1,000 would take a second

    def run(line):
        arguments = shlex.split(line.replace("NETWORKS", str(networks)))
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
        evaluate.main()
        return json.loads((tmp_path / "figures.json").read_text()) if "--out figures.json" in line else None

    return run


def test_toy_pictures_go_through_without_any_other_file(run, capsys):
    images, classes, _ = toy.make(300, 7)
    np.savez("fresh.npz", arr_0=images, arr_1=classes)
    np.savez("noise.npz", arr_0=noise(300, 0, side=32), arr_1=classes)
    fresh = run("--samples fresh.npz --out figures.json")
    said = capsys.readouterr().out
    rubbish = run("--samples noise.npz --out figures.json")
    assert fresh["accuracy"] > 0.99 > 0.3 > rubbish["accuracy"]
    assert fresh["FID"] < 3 < 50 < rubbish["FID"]
    assert fresh["IS"] > 9 and fresh["precision"] > 0.8 and fresh["recall"] > 0.8
    assert rubbish["precision"] == rubbish["recall"] == 0
    assert "300 samples, 300 pictures of the toy world" in said
    assert "sFID       left out" in said and f"FID       {fresh['FID']:9.4f}   lower is better" in said


def test_inceptions_figures_come_from_two_files(run, networks, capsys):
    samples, reference = noise(40, 0), noise(30, 1, top=230)
    np.savez("samples.npz", arr_0=samples, arr_1=np.arange(40))  # not Inception's classes: no accuracy
    np.savez_compressed("real.npz", arr_0=reference)
    figures = run(f"--samples samples.npz --reference real.npz {INCEPTION} --batch-size 9 --out figures.json")
    expected = evaluate.evaluate(samples, reference, Inception(networks / "inception.pt"))
    assert figures.keys() == {"FID", "sFID", "IS", "precision", "recall", "stored"}
    for name in ("FID", "sFID", "IS"):
        assert figures[name] == pytest.approx(expected[name], rel=1e-3)
    assert "stored" not in capsys.readouterr().out


def test_the_same_pictures_have_no_distance(run):
    np.savez("real.npz", arr_0=noise(30, 1))
    figures = run(f"--samples real.npz --reference real.npz {INCEPTION} --out figures.json")
    assert figures["FID"] == pytest.approx(0, abs=1e-6) and figures["sFID"] == pytest.approx(0, abs=1e-5)
    assert figures["precision"] == figures["recall"] == 1


def test_without_spatial_features_sfid_is_left_out_and_that_is_said(run, capsys):
    np.savez("real.npz", arr_0=noise(20, 1))
    line = "--samples real.npz --reference real.npz --inception NETWORKS/shifted.pt"
    figures = run(f"{line} --out figures.json")
    assert "sFID" not in figures and "FID" in figures
    assert "sFID       left out" in capsys.readouterr().out


def test_statistics_stored_in_the_reference_are_used_for_inception_and_that_is_said(run, networks, capsys):
    samples = noise(40, 0)
    seen = Inception(networks / "inception.pt")(samples)
    pool, spatial = seen.pool.detach().numpy(), seen.spatial.detach().numpy()
    np.savez("samples.npz", arr_0=samples)
    np.savez("real.npz", arr_0=noise(30, 1, top=20), mu=pool.mean(0), sigma=np.cov(pool, rowvar=False),
             mu_s=spatial.mean(0), sigma_s=np.cov(spatial, rowvar=False))
    figures = run(f"--samples samples.npz --reference real.npz {INCEPTION} --out figures.json")
    assert figures["FID"] == pytest.approx(0, abs=1e-4) and figures["sFID"] == pytest.approx(0, abs=1e-4)
    assert figures["precision"] == 0  # from the pictures, which are others
    assert "FID and sFID: by the statistics stored in real.npz" in capsys.readouterr().out


@pytest.fixture
def wrong_files(run):
    """Files of pictures that are not as they should be; with `run`, in the current folder."""
    toys = noise(300, 0, side=32)
    for name, content in {"toy": {"arr_0": toys}, "few": {"arr_0": toys[:64]}, "none": {"arr_0": toys[:0]},
                          "large": {"arr_0": noise(9, 0)}, "float": {"arr_0": toys[:9] / 255},
                          "channels": {"arr_0": toys[:9].transpose(0, 3, 1, 2)},
                          "classes": {"arr_0": toys, "arr_1": np.zeros(299)}, "other": {"pixels": toys[:9]},
                          "objects": {"arr_0": np.array([{}])}}.items():
        np.savez(f"{name}.npz", **content)
    with open("array.npz", "wb") as file:
        np.save(file, toys[:9])
    Path("cut.npz").write_bytes(Path("few.npz").read_bytes()[:5000])
    Path("text.npz").write_text("no pictures")


@pytest.mark.parametrize("line, complaint", [
    ("--samples nothing.npz", "No such file or directory: nothing.npz"),
    ("--samples text.npz", "text.npz is not an .npz with pictures in arr_0"),
    ("--samples array.npz", "array.npz is not an .npz with pictures in arr_0"),
    ("--samples cut.npz", "cut.npz is not an .npz with pictures in arr_0"),
    ("--samples objects.npz", "objects.npz is not an .npz with pictures in arr_0"),
    ("--samples other.npz", "other.npz is not an .npz with pictures in arr_0"),
    ("--samples float.npz", "arr_0 of float.npz is float64 [9, 32, 32, 3], not uint8 [n, H, W, 3]"),
    ("--samples channels.npz", "arr_0 of channels.npz is uint8 [9, 3, 32, 32], not uint8"),
    ("--samples none.npz", "arr_0 of none.npz is uint8 [0, 32, 32, 3], not uint8"),
    ("--samples few.npz", "64 samples and a reference of 300 are too few: give at least 65 of each"),
    ("--samples classes.npz", "300 samples need as many classes (arr_1), not [299]"),
    ("--samples large.npz", "the toy judge takes 32 x 32 pixels, the samples have 24 x 24: give --inception"),
    ("--samples toy.npz --reference large.npz", "the samples have 32 x 32 pixels, the reference 24 x 24"),
    ("--samples toy.npz --reference nothing.npz", "No such file or directory: nothing.npz"),
    (f"--samples large.npz {INCEPTION}", "give --reference"),
    (f"--samples large.npz --reference large.npz {INCEPTION}", "give at least 29 of each"),
    ("--samples large.npz --reference large.npz --inception nothing.pt", "cannot use nothing.pt"),
    ("--samples large.npz --reference large.npz --inception NETWORKS/weights.pt", "inception-2015-12-05.pt"),
    ("--samples large.npz --reference large.npz --inception NETWORKS/text.pt", "inception-2015-12-05.pt"),
    ("--samples large.npz --reference large.npz --inception NETWORKS/no_inception.pt", "argument"),
    ("--samples toy.npz --batch-size 0", "--batch-size must be at least 1"),
    ("--samples toy.npz --device abacus", "cannot use device"),
    ("--samples toy.npz --out text.npz/figures.json", "give another place, --out"),
    ("", "--samples")])
def test_a_mistake_is_one_line_and_exit_code_two(run, wrong_files, capsys, line, complaint):
    with pytest.raises(SystemExit) as stop:
        run(line)
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(said) == 1 and complaint in said[0]
