"""How good are the pictures? python -m studies.evaluate --samples samples.npz

The figures of the paper's Table 1, as ADM's evaluation suite defines them: a network looks at
samples and at real pictures, and what it sees in them, its *features*, is compared.

    gaussian, inception_score, precision_recall    from features to figures
    judge_features    features of the toy world's judge, which needs no download
    Inception         those behind all published figures, from the file of StyleGAN's metrics
    evaluate          arrays of pictures in, figures out
"""

import functools
import json
from collections import namedtuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from support import border, judge, pictures, toy
from support.border import UserError

# What a network sees in n pictures: pool [n, d], averaged over the picture; spatial [n, s], with a
# place in the picture (s = 0: there are none); probabilities [n, classes].
Features = namedtuple("Features", "pool spatial probabilities")

# ------------------------------------------------------------------------------------------------
# From features to figures
#
# FID and sFID: either set of pictures is described by mean and covariance of its features, and the
# two Gaussians are compared. FID's features tell *what* is there, sFID's tell *where* as well.
#
# Precision and recall (Kynkaanniemi et al. 2019): where, in the space of features, are real
# pictures? Within a ball around each known one, up to its third nearest neighbour. Precision is the
# share of samples in any of these balls; recall, with the roles exchanged, that of real pictures.

BLOCK = 1000  # rows of the matrix of distances that are in memory at a time


def gaussian(features):
    """(mean [d], covariance [d, d]) of features [n, d], in float64 on the CPU."""
    features = features.cpu().double()
    return features.mean(0), torch.cov(features.T)  # of deviations from the mean


def inception_score(probabilities, split=5000):
    """exp of the mean KL(p(class | picture) || p(class)), 1 up to the number of classes.

    The mean of the scores of `split` pictures each, in the order of the file, as ADM takes it.
    """
    scores = []
    for p in probabilities.cpu().double().split(split):  # [split, classes]
        kl = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))  # xlogy: 0 log 0 is 0
        scores.append(kl.sum(1).mean().exp())  # of this part
    return torch.stack(scores).mean().item()


def precision_recall(real, samples, k=3):
    """(precision, recall) from features [m, d] and [n, d], of more than k pictures each."""
    return share_within(samples, real, k), share_within(real, samples, k)


def share_within(points, centres, k):
    """The share of points [n, d] in a ball around any of centres [m, d], up to its neighbour k."""
    radii = []
    for block in centres.split(BLOCK):
        distances = torch.cdist(block, centres)  # [block, m]; the nearest is the centre itself
        radii.append(distances.kthvalue(k + 1).values)
    radii = torch.cat(radii)  # [m]

    inside = 0
    for block in points.split(BLOCK):
        inside += (torch.cdist(block, centres) <= radii).any(1).sum().item()  # [block, m] -> int
    return inside / len(points)


# ------------------------------------------------------------------------------------------------
# Where features come from: each takes pixels, uint8 [n, H, W, 3], and returns Features


def judge_features(pixels, device="cpu"):
    """What the toy world's judge sees in 32 x 32 pixels: 64 features, ten classes."""
    pool, logits = judge.judge_features(pictures.from_uint8(pixels).to(device))
    return Features(pool, pool[:, :0], logits.softmax(-1))  # [n, 64], [n, 0], [n, 10]


class Inception:
    """Inception(path)(pixels): 2048 features, 2023 with a place, 1008 classes. Raises UserError."""

    def __init__(self, path, device="cpu"):
        self.device = device
        try:
            # TorchScript is a program and runs by design: take it from a source that you trust.
            self.network = torch.jit.load(path, map_location=device).eval()
            self(np.zeros((1, 32, 32, 3), np.uint8))  # another network stops here
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1][:90]
            raise UserError(f"cannot use {path} ({reason}): give inception-2015-12-05.pt of "
                            "StyleGAN's metrics") from None

    def __call__(self, pixels):
        images = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).to(self.device)
        pool = self.network(images, return_features=True)
        probabilities = self.network(images, no_output_bias=True)  # without bias, as always for IS

        # No call gives features with a place. But parts have names: we go through them ourselves,
        # and believe what we see if it ends where the network's own call ends.
        try:
            again, spatial = self.through_parts(images)
            believed = (again - pool).norm() < 0.001 * pool.norm()
        except (AttributeError, RuntimeError):
            believed = False  # other names
        return Features(pool, spatial if believed else pool[:, :0], probabilities)

    def through_parts(self, images):
        """uint8 [n, 3, H, W] -> features [n, 2048], and with a place [n, 2023]."""
        # To 299 x 299 pixels as TensorFlow 1 did: pixel i is taken at i H / 299. grid_sample counts
        # from -1 to 1, where pixel j of n has its middle at (2 j + 1) / n - 1.
        side = torch.arange(299, device=self.device)
        y, x = ((2 * side * n / 299 + 1) / n - 1 for n in images.shape[2:])  # [299] each
        y, x = torch.meshgrid(y, x, indexing="ij")
        grid = torch.stack([x, y], dim=-1).expand(len(images), -1, -1, -1)  # [n, 299, 299, 2]
        x = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)

        x = (x - 128) / 128  # [n, 3, 299, 299]
        spatial = x[:, 0, 0, :0]  # [n, 0], where no part is called mixed_6
        for name, part in self.network.layers.named_children():
            if name == "mixed_6":  # 7 channels at 17 x 17 places; channels last, as in ADM's mu_s
                spatial = part.conv(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
            x = part(x)
        return x.flatten(1), spatial


# ------------------------------------------------------------------------------------------------
# All figures

MEANINGS = {
    "FID": "lower is better: distance of the features, as a whole, from the reference's",
    "sFID": "lower is better: the same, of features with a place, if the network gives such",
    "IS": "higher is better, up to the number of classes, which must be mixed in the file",
    "precision": "higher is better: share of the samples that look like the reference",
    "recall": "higher is better: share of the reference that looks like the samples",
    "accuracy": "higher is better: share in which the judge sees the class asked for, in arr_1",
}


@torch.no_grad()
def evaluate(samples, reference, extractor=judge_features, classes=None, stored={}, batch_size=128):
    """The figures of MEANINGS: a dict, with sFID and accuracy only where there is what they need.

    samples, reference: uint8 [n, H, W, 3], [m, H, W, 3]; extractor: pixels -> Features; classes:
    int [n], those asked for; stored: {"FID" or "sFID": (mean, covariance)} of a larger reference,
    used where sizes fit, as the key "stored" tells. Raises UserError for what does not fit.
    """
    if samples.shape[1:] != reference.shape[1:]:
        raise UserError(f"the samples are {list(samples.shape[1:])}, the reference is "
                        f"{list(reference.shape[1:])}: give --reference pictures of one size")

    # What the network sees
    ours = features_of(samples, extractor, batch_size)
    real = features_of(reference, extractor, batch_size)
    d = max(ours.pool.shape[1], ours.spatial.shape[1])
    if min(len(samples), len(reference)) <= d:  # then a covariance of d features is singular
        raise UserError(f"{len(samples)} samples and a reference of {len(reference)} are too few: "
                        f"give at least {d + 1} of each (papers take 50,000)")

    # How far the two are from each other
    figures, used = {}, []
    for name, x, y in (("FID", ours.pool, real.pool), ("sFID", ours.spatial, real.spatial)):
        target = stored.get(name)
        if target is not None and len(target[0]) == x.shape[1]:
            used.append(name)
        else:
            target = gaussian(y)
        if x.shape[1] > 0:
            figures[name] = judge.frechet_distance(*gaussian(x), *target)

    # Which of the pictures are good
    figures["IS"] = inception_score(ours.probabilities)
    figures["precision"], figures["recall"] = precision_recall(real.pool, ours.pool)
    if classes is not None:
        figures["accuracy"] = (ours.probabilities.argmax(1).cpu().numpy() == classes).mean().item()
    return figures | {"stored": used}


def features_of(pixels, extractor, batch_size):
    """The Features of all pictures, a batch at a time."""
    batches = [extractor(pixels[start : start + batch_size])
               for start in tqdm(range(0, len(pixels), batch_size), "features", leave=False)]
    return Features(*(torch.cat(parts) for parts in zip(*batches)))


# ------------------------------------------------------------------------------------------------
# Files, and the command


def read_npz(path):
    """ADM's format: pixels uint8 [n, H, W, 3], classes [n] or None, `stored` of evaluate."""
    try:
        with np.load(path, allow_pickle=False) as file:
            pixels, classes = file["arr_0"], file.get("arr_1")  # 50,000 of 256 x 256 are 10 GB
            stored = {}
            for name, mean, covariance in (("FID", "mu", "sigma"), ("sFID", "mu_s", "sigma_s")):
                if mean in file:
                    stored[name] = torch.from_numpy(file[mean]), torch.from_numpy(file[covariance])
    except Exception as error:  # a damaged file may raise anything in numpy, zip
        raise UserError(f"{path} is not an .npz with pictures in arr_0 ({error})") from None
    if pixels.dtype != np.uint8 or pixels.ndim != 4:
        raise UserError(f"arr_0 of {path} is {pixels.dtype} {list(pixels.shape)}, not uint8 "
                        "[n, H, W, 3]")
    return pixels, classes, stored


def main():
    parser = border.command_line(__doc__)
    add = parser.add_argument
    add("--samples", required=True, help=".npz: arr_0 uint8 [n, H, W, 3], arr_1 the classes")
    add("--reference", help="real pictures, likewise (default: fresh ones of the toy world)")
    add("--inception", help="inception-2015-12-05.pt (default: the toy world's judge)")
    add("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    add("--batch-size", type=border.positive_int, default=128, help="pictures (default: 128)")
    add("--out", help="also write the figures here, as JSON")
    args = parser.parse_args()
    with border.one_line_errors():
        device = border.pick_device(args.device)
        samples, classes, _ = read_npz(args.samples)
        if args.reference:
            reference, _, stored = read_npz(args.reference)
        else:  # fresh pictures, which nothing has learnt from
            reference, _, _ = toy.make(max(1000, len(samples)), judge.JUDGE_SEED + 2)
            stored = {}

        extractor = functools.partial(judge_features, device=device)
        if args.inception:
            extractor, classes = Inception(args.inception, device), None  # its classes are others
        figures = evaluate(samples, reference, extractor, classes, stored, args.batch_size)

        print(f"{len(samples):,} samples, {len(reference):,} pictures of the reference")
        for name, meaning in MEANINGS.items():
            value = f"{figures[name]:.4f}" if name in figures else "left out"
            print(f"{name:9} {value:>9}   {meaning}")
        if figures["stored"]:
            print(f"by the statistics stored in the reference: {figures['stored']}")
        if args.out:
            border.write_safely(args.out, lambda partial: partial.write_text(json.dumps(figures)))


if __name__ == "__main__":
    main()
