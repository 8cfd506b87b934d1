"""FID, sFID, Inception Score, precision, recall: against closed forms; from files to a table."""

import json
import os
from collections import OrderedDict
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import seeded
from torch import Tensor, nn

from studies import evaluate
from studies.evaluate import (gaussian, inception_features, inception_score, load_inception,
                              precision_recall)
from support import judge, toy
from support.border import UserError

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated; the file is what it is


def test_a_mean_far_from_zero_costs_the_covariance_of_float32_features_no_digits():
    features = torch.rand(10_000, 2, generator=seeded(0)) + 1000
    mean, covariance = gaussian(features)
    expected = features.double().numpy()
    np.testing.assert_allclose(mean, expected.mean(0), rtol=1e-13)
    np.testing.assert_allclose(covariance, np.cov(expected, rowvar=False), atol=1e-9)


def test_the_distance_of_two_sampled_gaussians_is_that_of_the_closed_form():
    a, b, shift = torch.tensor([[1.0, 4, 9, 16], [4.0, 1, 9, 1], [1.0, 0, -2, 0]])
    expected = (shift.square() + (a.sqrt() - b.sqrt()).square()).sum().item()  # axis by axis
    x, y = torch.randn(2, 100_000, 4, generator=seeded(0))
    turn = torch.linalg.qr(torch.randn(4, 4, generator=seeded(1))).Q  # axes do not matter
    x, y = x * a.sqrt() @ turn, (y * b.sqrt() + shift) @ turn
    assert judge.frechet_distance(*gaussian(x), *gaussian(y)) == pytest.approx(expected, rel=0.02)


def test_the_inception_score_is_that_of_the_closed_form():
    unsure, certain = torch.full((100, 7), 1 / 7), torch.eye(7).repeat(10, 1)
    mixed = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).repeat(50, 1)
    for probabilities, expected in ((unsure, 1), (certain, 7), (mixed, 1.8**0.9 * 0.2**0.1)):
        assert inception_score(probabilities) == pytest.approx(expected, rel=1e-6)


def test_the_score_is_the_mean_over_parts_of_the_file_in_its_order():
    mixed = torch.eye(4).repeat(100, 1)
    assert inception_score(mixed, split=100) == pytest.approx(4)
    assert inception_score(mixed[mixed.argmax(1).argsort()], split=100) == pytest.approx(1)
    rest = mixed[:1].repeat(100, 1)  # a shorter last part counts like any other
    assert inception_score(torch.cat([mixed, rest]), split=400) == pytest.approx((4 + 1) / 2)


def cluster(x, n, seed):
    """n points of the plane around (x, 0)."""
    return torch.randn(n, 2, generator=seeded(seed)) + torch.tensor([x, 0.0])


NEAR, FAR = cluster(0, 100, 0), cluster(100, 100, 1)


@pytest.mark.parametrize("real, samples, expected", [
    (NEAR, NEAR.flip(0), (1, 1)), (NEAR, FAR, (0, 0)),
    (torch.cat([NEAR, FAR]), NEAR, (1, 0.5)),  # half of the real ones: precise, but recall is half
    (NEAR, torch.cat([NEAR, FAR]), (0.5, 1))])  # half of the samples are wrong
def test_precision_is_of_samples_and_recall_of_real_pictures(real, samples, expected):
    assert precision_recall(real, samples) == expected


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


# ------------------------------------------------------------------------------------------------
# A small network, called like inception-2015-12-05.pt and with its names: 12 and 28 features


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
    share, high = (place - low).view(shape), (low + 1).clamp(max=n - 1)
    return x.index_select(axis, low) * (1 - share) + x.index_select(axis, high) * share


class Network(nn.Module):
    def __init__(self, shifted: bool):
        super().__init__()
        torch.manual_seed(0)
        self.shifted = shifted
        self.layers = nn.Sequential(OrderedDict([
            ("conv", nn.Conv2d(3, 6, 1, stride=200)), ("mixed_6", Mixed()),
            ("pool2", nn.AdaptiveAvgPool2d(1))]))
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
    for name, network in {"inception": Network(False), "shifted": Network(True),
                          "no_inception": Mixed()}.items():
        torch.jit.script(network).save(folder / f"{name}.pt")
    return folder


def seen_by(networks, file, pixels):
    return inception_features(pixels, load_inception(networks / file))


def noise(n, seed, side=24, top=256):
    return np.random.default_rng(seed).integers(top, size=(n, side, side, 3), dtype=np.uint8)


@torch.no_grad()
def test_the_features_are_those_of_the_call_and_of_the_convolution_in_mixed_6(networks):
    pixels, network = noise(5, 0), Network(False)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    pool, spatial, probabilities = seen_by(networks, "inception.pt", pixels)
    torch.testing.assert_close(pool, network(images, return_features=True))
    torch.testing.assert_close(probabilities, network(images, no_output_bias=True))
    resized = (between(between(images.float(), 2), 3) - 128) / 128
    maps = network.layers.mixed_6.conv(network.layers.conv(resized))  # [5, 8, 2, 2]
    assert spatial.shape == (5, 2 * 2 * 7)
    maps = maps[:, :7].permute(0, 2, 3, 1).flatten(1)  # the channel last, as in ADM's files
    torch.testing.assert_close(spatial, maps)


def test_parts_that_do_not_lead_to_the_features_of_the_call_are_not_used(networks):
    pool, spatial, _ = seen_by(networks, "shifted.pt", noise(3, 0))
    assert spatial.shape == (3, 0) and pool.shape == (3, 12)


def half(pixels):
    """An extractor that knows no network: three features with a place, two of them without."""
    seen = torch.from_numpy(pixels[:, :3, 0, 0]).float()
    probabilities = F.one_hot(torch.from_numpy(pixels[:, 0, 0, 0] > 127).long(), 2)
    return evaluate.Features(seen[:, :2], seen, probabilities)


def test_the_figures_are_those_of_the_features_classes_and_stored_statistics(monkeypatch):
    samples, reference = noise(300, 0, side=4, top=200), noise(200, 1, side=4)
    x, y = half(samples), half(reference)
    monkeypatch.setattr(evaluate, "BATCH", 64)
    figures = evaluate.evaluate(samples, reference, half)
    for name, a, b in (("FID", x.pool, y.pool), ("sFID", x.spatial, y.spatial)):
        expected = judge.frechet_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
        assert figures[name] == pytest.approx(expected, rel=1e-4)
    assert figures["IS"] == inception_score(x.probabilities)
    assert (figures["precision"], figures["recall"]) == precision_recall(y.pool, x.pool)
    assert figures.keys() == {"FID", "sFID", "IS", "precision", "recall"}

    wrong = (samples[:, 0, 0, 0] > 127) ^ (np.arange(300) < 75)  # a quarter is wrong
    stored = {"sFID": gaussian(x.spatial)}
    again = evaluate.evaluate(samples, reference, half, wrong, stored)
    assert again["accuracy"] == 0.75 and again["sFID"] == pytest.approx(0, abs=1e-6)
    assert again["FID"] == figures["FID"] and again["recall"] == figures["recall"]


# ------------------------------------------------------------------------------------------------
# The command

INCEPTION = "--inception NETWORKS/inception.pt"


@cache
def fresh(seed, world, draw=toy.make):
    return draw(300, seed, world)


def few(n, seed, world="plain"):
    """In place of toy.make: 1,000 pictures take seconds."""
    return [x[:n] for x in fresh(seed, world)]


@pytest.fixture
def measured(run, monkeypatch, tmp_path, networks):
    """A function that runs a command line in a folder with files, and returns its figures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "make", few)

    def measured(line):
        Path("figures.json").unlink(missing_ok=True)
        run(f"studies/evaluate.py {line} --out figures.json".replace("NETWORKS", str(networks)))
        return json.loads(Path("figures.json").read_text())

    return measured


def test_toy_pictures_go_through_without_any_other_file(measured, capsys):
    images, classes, _ = toy.make(300, 7)
    np.savez("fresh.npz", arr_0=images, arr_1=classes)
    np.savez("noise.npz", arr_0=noise(300, 0, side=32), arr_1=classes)
    fresh, rubbish = measured("--samples fresh.npz"), measured("--samples noise.npz")
    said = capsys.readouterr().out
    assert fresh["accuracy"] > 0.99 > 0.3 > rubbish["accuracy"]
    assert fresh["FID"] < 3 < 50 < rubbish["FID"]
    assert fresh["IS"] > 9 and fresh["precision"] > 0.8 and fresh["recall"] > 0.8
    assert rubbish["precision"] == rubbish["recall"] == 0
    assert "300 samples, 300 pictures of the reference" in said
    assert "sFID       left out" in said and f"FID       {fresh['FID']:9.4f}   lower is" in said


def test_samples_of_the_fine_world_are_compared_with_fresh_ones_of_it(measured):
    images, classes, _ = toy.make(100, 7, "fine")
    np.savez("fine.npz", arr_0=images, arr_1=classes)
    figures = measured("--samples fine.npz")
    assert figures["accuracy"] > 0.95 and figures["precision"] > 0.8


def test_inceptions_figures_come_from_two_files(measured, networks):
    samples, reference = noise(40, 0), noise(30, 1, top=230)
    np.savez("samples.npz", arr_0=samples, arr_1=np.arange(40))  # not Inception's classes
    np.savez_compressed("real.npz", arr_0=reference)
    figures = measured(f"--samples samples.npz --reference real.npz {INCEPTION}")
    expected = evaluate.evaluate(samples, reference, partial(seen_by, networks, "inception.pt"))
    assert figures.pop("stored") == [] and "accuracy" not in figures
    assert figures == pytest.approx(expected, rel=1e-3)


def test_statistics_stored_in_the_reference_are_used_and_that_is_said(measured, networks, capsys):
    samples = noise(40, 0)
    pool, spatial, _ = seen_by(networks, "inception.pt", samples)
    stored = dict(zip(("mu", "sigma", "mu_s", "sigma_s"), gaussian(pool) + gaussian(spatial)))
    np.savez("samples.npz", arr_0=samples)
    np.savez("real.npz", arr_0=noise(30, 1, top=20), **{k: x.detach() for k, x in stored.items()})
    figures = measured(f"--samples samples.npz --reference real.npz {INCEPTION}")
    assert figures["FID"] == pytest.approx(0, abs=1e-4) == figures["sFID"]
    assert figures["precision"] == 0  # from the pictures, which are others
    assert "stored in the reference: FID, sFID" in capsys.readouterr().out


def test_stored_statistics_are_of_one_number_of_features():
    good = dict(mu=np.zeros(4), sigma=np.eye(4))
    assert [x.shape for x in evaluate.statistics_of(good, ("mu", "sigma"), "x.npz")] == [(4,), (4, 4)]
    for bad in (good | dict(sigma=np.eye(5)), good | dict(mu=np.eye(4)), dict(mu=np.zeros(4))):
        with pytest.raises(UserError, match=r"mu, sigma of x.npz are .*, not numbers \[d\] and"):
            evaluate.statistics_of(bad, ("mu", "sigma"), "x.npz")


@pytest.mark.parametrize("line, complaint", [
    ("--samples nothing.npz", "nothing.npz is no file: give an .npz with pictures in arr_0"),
    ("--samples pipe", "pipe is no file: give"),
    ("--samples none.npz", "arr_0 of none.npz is uint8 [0, 32, 32, 3], not uint8 [n, H, W, 3]"),
    ("--samples few.npz --inception pipe", "no file at pipe: give inception-2015-12-05.pt"),
    ("--samples cut.npz", "cut.npz is not an .npz with pictures in arr_0"),
    ("--samples float.npz", "arr_0 of float.npz is float64 [9, 32, 32, 3], not uint8 [n, H, W, 3]"),
    ("--samples named.npz", "arr_1 of the samples is <U3 [64], not integers [64]"),
    ("--samples few.npz", "64 samples and a reference of 300 are too few: give at least 65"),
    ("--samples large.npz", "the samples are [24, 24, 3], the reference is [32, 32, 3]: give"),
    ("--samples large.npz --reference large.npz", "the judge takes float images"),
    ("--samples large.npz --inception NETWORKS/no_inception.pt", "inception-2015-12-05.pt")])
def test_a_mistake_is_one_line_and_exit_code_two(measured, capsys, line, complaint):
    toys = noise(64, 0, side=32)
    files = {"few": toys, "none": toys[:0], "large": noise(9, 0), "float": toys[:9] / 255}
    for name, pixels in files.items():
        np.savez(f"{name}.npz", arr_0=pixels)
    np.savez("named.npz", arr_0=toys, arr_1=["cat"] * 64)
    Path("cut.npz").write_bytes(Path("few.npz").read_bytes()[:5000])
    os.mkfifo("pipe")
    with pytest.raises(SystemExit) as stop:
        measured(line)
    said = capsys.readouterr().err.splitlines()  # before the last line: bars, not a traceback
    assert stop.value.code == 2 and complaint in said[-1] and "Traceback" not in " ".join(said)
