"""How good are the pictures? python evaluate.py --samples samples.npz

The figures of the paper's Table 1, as ADM's evaluation suite defines them:

    Statistics, inception_score, precision_recall    from what a network sees to a figure
    judge_features     such a network: the toy world's judge, which needs no download, or
    Inception          the one behind all published figures, from the file of StyleGAN's metrics
    evaluate           arrays of pictures in, figures out
"""

import functools
import json
import pathlib
import zipfile
import zlib
from collections import namedtuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import toy

# What a network sees in n pictures: pool [n, d], averaged over the picture; spatial [n, s], with a place, or
# None; probabilities [n, classes].
Features = namedtuple("Features", "pool spatial probabilities")

# ------------------------------------------------------------------------------------------------------------
# FID and sFID: the distance of two Gaussians
#
# Either set of pictures is described by mean and covariance of its features, toy.frechet_distance compares
# the two. FID's features are averaged over the picture and tell *what* is there; sFID's tell *where* as well.


class Statistics:
    """Count, mean [d] and covariance [d, d] of features that come in batches, in float64; none is kept."""

    def __init__(self):
        self.count, self.mean, self.scatter = 0, 0.0, 0.0

    def add(self, features):
        """features: [n, d], n > 0. Squares of deviations are summed, not of values: no digits get lost."""
        features = features.double()
        n, mean, total = len(features), features.mean(0), self.count + len(features)
        change = mean - self.mean
        self.scatter = self.scatter + (features - mean).T @ (features - mean)
        self.scatter += torch.outer(change, change) * (self.count * n / total)  # between the two means
        self.mean, self.count = self.mean + change * (n / total), total

    def gaussian(self):
        """(mean, covariance) on the CPU, as toy.frechet_distance takes them."""
        return self.mean.cpu(), self.scatter.cpu() / (self.count - 1)


# ------------------------------------------------------------------------------------------------------------
# Inception Score, precision and recall
#
# Where, in the space of features, are real pictures? Within a ball around each known one that reaches to its
# third nearest neighbour (Kynkaanniemi et al. 2019). Precision is the share of the samples in any of these
# balls; recall, with the roles exchanged, the share of the real pictures in a ball around any sample.

SPLIT = 5000  # ADM's: the mean of the scores of so many pictures each, in the order of the file
BLOCK = 1000  # rows of the matrix of distances that are in memory at a time


def inception_score(probabilities, split=SPLIT):
    """exp of the mean KL(p(class | picture) || p(class)), from 1 to the number of classes; [n, classes]."""
    kl = [torch.xlogy(p, p) - torch.xlogy(p, p.mean(0)) for p in probabilities.double().split(split)]
    return torch.stack([x.sum(1).mean().exp() for x in kl]).mean().item()  # xlogy: 0 log 0 is 0


def precision_recall(real, samples, k=3):
    """(precision, recall) from features [m, d] and [n, d]; k or fewer of either are a ValueError."""
    if min(len(real), len(samples)) <= k:
        raise ValueError(f"{k} neighbours need {k + 1} pictures, not {len(real)} and {len(samples)}")
    return share_within(samples, real, k), share_within(real, samples, k)


def share_within(points, centres, k):
    """The share of points [n, d] in any ball around one of the centres [m, d] up to its k-th neighbour."""
    radii = torch.cat([torch.cdist(block, centres).kthvalue(k + 1).values  # the nearest is the centre itself
                       for block in tqdm(centres.split(BLOCK), desc="neighbours", leave=False)])  # [m]
    inside = torch.cat([(torch.cdist(block, centres) <= radii).any(1)
                        for block in tqdm(points.split(BLOCK), desc="neighbours", leave=False)])  # [n]
    return inside.double().mean().item()


# ------------------------------------------------------------------------------------------------------------
# Where features come from: each takes pixels, uint8 [n, H, W, 3], and returns Features


def judge_features(pixels, device="cpu"):
    """What the toy world's judge sees in 32 x 32 pixels: 64 features, none with a place, and ten classes."""
    pool, logits = toy.judge_features(common.from_uint8(pixels).to(device))
    return Features(pool, None, logits.softmax(-1))


class Inception:
    """Inception(path)(pixels): 2048 features, 2023 with a place, 1008 classes. Raises ValueError."""

    def __init__(self, path, device="cpu"):
        self.device, self.has_parts = device, False
        probe = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, device=device)
        try:
            # TorchScript is a program, and runs by design: weights_only cannot help, only a trusted source.
            self.network = torch.jit.load(path, map_location=device).eval()
            pool = self.network(probe, return_features=True)
            self.network(probe, no_output_bias=True)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"cannot use {path} ({str(error).strip().splitlines()[-1][:90]}): give the file "
                             "inception-2015-12-05.pt of StyleGAN's metrics") from None
        try:  # no call gives features with a place, but parts have names: used if they lead to the same end
            again, spatial = self.through_parts(probe)
            self.has_parts = spatial is not None and bool((again - pool).norm() < 0.001 * pool.norm())
        except (AttributeError, RuntimeError):
            pass  # another network: without these parts there is no sFID

    def __call__(self, pixels):
        images = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).to(self.device)  # [n, 3, H, W] uint8
        probabilities = self.network(images, no_output_bias=True)  # without bias, as always for IS
        if self.has_parts:
            return Features(*self.through_parts(images), probabilities)
        return Features(self.network(images, return_features=True), None, probabilities)

    def through_parts(self, images):
        """uint8 [n, 3, H, W] -> pool features [n, 2048], features with a place [n, 2023]."""
        # To 299 x 299 pixels as TensorFlow 1 did: pixel i is taken at i H / 299. In grid_sample's -1..1:
        y, x = ((2 * torch.arange(299, device=self.device) * n / 299 + 1) / n - 1 for n in images.shape[2:])
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).expand(len(images), -1, -1, -1)
        x = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
        x, spatial = (x - 128) / 128, None  # [n, 3, 299, 299]
        for name, part in self.network.layers.named_children():
            if name == "mixed_6":  # 7 channels at 17 x 17 places; the channel last, as in ADM's mu_s
                spatial = part.conv(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
            x = part(x)
        return x.flatten(1), spatial


# ------------------------------------------------------------------------------------------------------------
# All figures

MEANINGS = {
    "FID": "lower is better: distance of the features, as a whole, from the reference's",
    "sFID": "lower is better: the same, of features with a place, if the network gives such",
    "IS": "higher is better, up to the number of classes, which must be mixed in the file",
    "precision": "higher is better: share of the samples that look like the reference",
    "recall": "higher is better: share of the reference that looks like the samples",
    "accuracy": "higher is better: share in which the judge sees the class asked for, if arr_1 tells"}


@torch.no_grad()
def evaluate(samples, reference, extractor=judge_features, classes=None, stored=None, batch_size=128):
    """The figures of MEANINGS, a dict: sFID where features have a place, accuracy where classes are given.

    samples, reference: uint8 [n, H, W, 3], [m, H, W, 3]; extractor: pixels -> Features; classes: int [n],
    those asked for; stored: {"FID" or "sFID": (mean, covariance)} of a larger reference, used where the sizes
    fit, which "stored" tells. Raises ValueError for sizes that differ and for too few pictures.
    """
    if samples.shape[1:] != reference.shape[1:]:
        raise ValueError("the samples have {} x {} pixels, the reference {} x {}: give pictures of one size"
                         .format(*samples.shape[1:3], *reference.shape[1:3]))
    if classes is not None and classes.shape != samples.shape[:1]:
        raise ValueError(f"{len(samples)} samples need as many classes (arr_1), not {list(classes.shape)}")
    widths = {name: x.shape[1] for name, x in zip(MEANINGS, extractor(samples[:1])[:2]) if x is not None}
    stored = {name: pair for name, pair in (stored or {}).items() if len(pair[1]) == widths.get(name)}
    d = max(widths.values())  # from d or fewer pictures, the covariance of d features would be singular
    if min(len(samples), len(reference)) <= d:
        raise ValueError(f"{len(samples)} samples and a reference of {len(reference)} are too few: give at "
                         f"least {d + 1} of each, one more than there are features (papers take 50,000)")
    seen = []
    for pixels, name in ((samples, "samples"), (reference, "reference")):
        statistics, kept = {figure: Statistics() for figure in widths}, []
        for start in tqdm(range(0, len(pixels), batch_size), f"features of the {name}", unit="batch"):
            features = extractor(pixels[start : start + batch_size])
            for figure, x in zip(widths, features):  # pool for FID, spatial for sFID
                statistics[figure].add(x)
            kept.append((features.pool, features.probabilities))
        seen.append((statistics, *map(torch.cat, zip(*kept))))
    (statistics, pool, probabilities), (real, real_pool, _) = seen
    figures = {name: toy.frechet_distance(*statistics[name].gaussian(),
                                          *stored.get(name, real[name].gaussian())) for name in widths}
    figures["IS"] = inception_score(probabilities)
    figures["precision"], figures["recall"] = precision_recall(real_pool, pool)
    if classes is not None:
        figures["accuracy"] = (probabilities.argmax(1).cpu().numpy() == classes).mean().item()
    return figures | {"stored": list(stored)}


def read_npz(path):
    """ADM's format: pixels uint8 [n, H, W, 3], classes [n] or None, and `stored` as evaluate takes it."""
    try:
        with np.load(path, allow_pickle=False) as file:
            pixels, classes = file["arr_0"], file.get("arr_1")  # 50,000 pictures of 256 x 256 are 10 GB
            stored = {figure: [torch.from_numpy(file[name]) for name in names]
                      for figure, names in {"FID": ("mu", "sigma"), "sFID": ("mu_s", "sigma_s")}.items()
                      if set(names) <= set(file)}
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not an .npz with pictures in arr_0 ({str(error)[:60]})") from None
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or not pixels.size:
        raise ValueError(f"arr_0 of {path} is {pixels.dtype} {list(pixels.shape)}, not uint8 [n, H, W, 3]")
    return pixels, classes, stored


def main():
    parser = common.command_line(__doc__)
    parser.add_argument("--samples", required=True, help=".npz: arr_0 uint8 [n, H, W, 3], arr_1 the classes")
    parser.add_argument("--reference", help="real pictures, likewise (default: fresh ones of the toy world)")
    parser.add_argument("--inception", help="inception-2015-12-05.pt (default: the toy world's judge)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--out", help="also write the figures here, as JSON")
    args = parser.parse_args()
    with common.one_line_errors():
        device = common.pick_device(args.device)
        if args.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, not {args.batch_size}")
        if args.inception and not args.reference:
            raise ValueError("Inception compares with real pictures: give --reference as well")
        if args.out:
            common.writable_folder(pathlib.Path(args.out).parent)
        samples, classes, _ = read_npz(args.samples)
        if args.inception:
            network = Inception(args.inception, device)
        elif samples.shape[1:3] == (toy.SIDE, toy.SIDE):
            network = functools.partial(judge_features, device=device)
        else:
            raise ValueError("the toy judge takes 32 x 32 pixels, the samples have {} x {}: give --inception "
                             "and --reference".format(*samples.shape[1:3]))
        if args.reference:
            reference, _, stored = read_npz(args.reference)
        else:  # fresh pictures, which nothing has learnt from
            reference, stored = toy.make(max(1000, len(samples)), toy.JUDGE_SEED + 2)[0], None
        # Inception's classes have numbers of their own; what ADM's files store are Inception's features.
        more = {"stored": stored} if args.inception else {"classes": classes}
        figures = evaluate(samples, reference, network, batch_size=args.batch_size, **more)
        print(f"{len(samples):,} samples, {len(reference):,} pictures of {args.reference or 'the toy world'}")
        for name, meaning in MEANINGS.items():
            value = f"{figures[name]:.4f}" if name in figures else "left out"
            print(f"{name:9} {value:>9}   {meaning}")
        if figures["stored"]:
            print(f"{' and '.join(figures['stored'])}: by the statistics stored in {args.reference}")
        if args.out:
            common.write_safely(args.out, lambda partial: partial.write_text(json.dumps(figures)))


if __name__ == "__main__":
    main()
