"""How good are the pictures? python -m studies.evaluate --samples samples.npz

The figures of the paper's Table 1, as ADM's evaluation suite defines them: a network looks at
samples and at real pictures, and what it sees in them, its *features*, is compared.

    gaussian, inception_score, precision_recall    from features to figures
    judge_features        features of the toy world's judge, which needs no download
    inception_features    those behind all published figures, from the file of StyleGAN's metrics
    evaluate              arrays of pictures in, figures out
"""

import functools
import json
import pathlib
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
BATCH = 128  # pictures that a network looks at, at a time


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
    radii = [torch.cdist(block, centres).kthvalue(k + 1).values  # the nearest: the centre itself
             for block in centres.split(BLOCK)]
    radii = torch.cat(radii)  # [m]
    inside = [(torch.cdist(block, centres) <= radii).any(1)  # [block, m] -> bool [block]
              for block in points.split(BLOCK)]
    return torch.cat(inside).double().mean().item()


# ------------------------------------------------------------------------------------------------
# Where features come from: each takes pixels, uint8 [n, H, W, 3], and returns Features


def judge_features(pixels, device="cpu"):
    """What the judge of a toy world sees: 64 features, 448 with a place, ten classes."""
    images = pictures.from_uint8(pixels).to(device)  # [n, 3, S, S]
    pool, logits = judge.judge_features(images)
    network, _, _ = judge.load_judge(images.device, images.shape[-1])
    maps = F.adaptive_avg_pool2d(network.body(images), 8)  # [n, 64, 8, 8]
    return Features(pool, maps[:, :7].flatten(1), logits.softmax(-1))  # 7 channels, as Inception's


def load_inception(path, device="cpu"):
    """The network in inception-2015-12-05.pt of StyleGAN's metrics. UserError for another file."""
    if not pathlib.Path(path).is_file():
        raise UserError(f"no file at {path}: give inception-2015-12-05.pt of StyleGAN's metrics")
    try:
        # TorchScript is a program and runs by design: take it from a source that you trust.
        network = torch.jit.load(path, map_location=device).eval()
        inception_features(np.zeros((1, 32, 32, 3), np.uint8), network)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot use {path} ({error!r:.120}): give inception-2015-12-05.pt of "
                        "StyleGAN's metrics") from None
    return network


def inception_features(pixels, network):
    """What load_inception's network sees: 2048 features, 2023 with a place, 1008 classes."""
    device = next(network.parameters()).device
    images = torch.tensor(pixels, device=device).permute(0, 3, 1, 2)  # uint8 [n, 3, H, W]
    pool = network(images, return_features=True)
    probabilities = network(images, no_output_bias=True)  # without bias, as always for IS

    # No call gives features with a place: we go through the parts ourselves. First to 299 x 299
    # pixels as TensorFlow 1 did: pixel i is taken at i H / 299. So are the first 299 of 300 when
    # the picture has a row and a column more, and corners stay corners.
    x = F.pad(images.float(), (0, 1, 0, 1), mode="replicate")
    x = F.interpolate(x, (300, 300), mode="bilinear", align_corners=True)[..., :299, :299]
    x, spatial = (x - 128) / 128, pool[:, :0]  # spatial: none, where no part is called mixed_6
    for name, part in network.layers.named_children():
        if name == "mixed_6":  # 7 channels at 17 x 17 places; channels last, as in ADM's mu_s
            spatial = part.conv(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = part(x)

    # We believe it if we end where the network's own call ends.
    if (x.flatten(1) - pool).norm() > 0.001 * pool.norm():
        spatial = pool[:, :0]
    return Features(pool, spatial, probabilities)


# ------------------------------------------------------------------------------------------------
# All figures

MEANINGS = {
    "FID": "lower is better: distance of the features, as a whole, from the reference's",
    "sFID": "lower is better: the same, of features with a place, if there are enough pictures",
    "IS": "higher is better, up to the number of classes, which must be mixed in the file",
    "precision": "higher is better: share of the samples that look like the reference",
    "recall": "higher is better: share of the reference that looks like the samples",
    "accuracy": "higher is better: share in which the judge sees the class asked for, in arr_1",
}


@torch.no_grad()
def evaluate(samples, reference, extractor=judge_features, classes=None, stored={}):
    """The figures of MEANINGS: a dict, with sFID and accuracy only where there is what they need.

    samples, reference: uint8 [n, H, W, 3], [m, H, W, 3]; extractor: pixels -> Features; classes:
    int [n], those asked for; stored: {"FID" or "sFID": (mean, covariance)} of a larger reference.
    """
    if samples.shape[1:] != reference.shape[1:]:
        raise UserError(f"the samples are {list(samples.shape[1:])}, the reference is "
                        f"{list(reference.shape[1:])}: give --reference pictures of one size")

    if classes is not None and not (classes.dtype.kind in "biu" and len(classes) == len(samples)):
        raise UserError(f"arr_1 of the samples is {classes.dtype} {list(classes.shape)}, not "
                        f"integers [{len(samples)}], the class of each")

    # What the network sees
    ours, real = features_of(samples, extractor), features_of(reference, extractor)
    number, d = min(len(samples), len(reference)), ours.pool.shape[1]
    if number <= d:  # then a covariance of d features is singular
        raise UserError(f"{len(samples)} samples and a reference of {len(reference)} are too few: "
                        f"give at least {d + 1} of each (papers take 50,000)")

    # How far the two are from each other
    figures = {}
    for name, x, y in (("FID", ours.pool, real.pool), ("sFID", ours.spatial, real.spatial)):
        if 0 < x.shape[1] < number:
            target = stored[name] if name in stored else gaussian(y)
            figures[name] = judge.frechet_distance(*gaussian(x), *target)

    # Which of the pictures are good
    figures["IS"] = inception_score(ours.probabilities)
    figures["precision"], figures["recall"] = precision_recall(real.pool, ours.pool)
    if classes is not None:
        figures["accuracy"] = (ours.probabilities.argmax(1).cpu().numpy() == classes).mean().item()
    return figures


def features_of(pixels, extractor):
    """The Features of all pictures, a batch at a time."""
    starts = tqdm(range(0, len(pixels), BATCH), "features", leave=False)
    batches = [extractor(pixels[start : start + BATCH]) for start in starts]
    return Features(*(torch.cat(parts) for parts in zip(*batches)))


# ------------------------------------------------------------------------------------------------
# Files, and the command


def read_npz(path):
    """The arrays of a file in ADM's format: a dict, with pixels uint8 [n, H, W, 3] as arr_0."""
    if not pathlib.Path(path).is_file():  # a pipe would be waited for, for ever
        raise UserError(f"{path} is no file: give an .npz with pictures in arr_0")
    try:
        with np.load(path) as file:
            arrays = dict(file)  # 50,000 pictures of 256 x 256 are 10 GB
        pixels = arrays["arr_0"]
    except Exception as error:  # a damaged file may raise anything in numpy, zip
        raise UserError(f"{path} is not an .npz with pictures in arr_0 ({error})") from None
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or not len(pixels):
        raise UserError(f"arr_0 of {path} is {pixels.dtype} {list(pixels.shape)}, not uint8 "
                        "[n, H, W, 3]")
    return arrays


def statistics_of(arrays, names, path):
    """[mean [d], covariance [d, d]] of an .npz's arrays; UserError for something else."""
    mean, covariance = (np.asarray(arrays.get(name)) for name in names)
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape or covariance.dtype.kind != "f":
        raise UserError(f"{names[0]}, {names[1]} of {path} are {list(mean.shape)} and "
                        f"{list(covariance.shape)}, not numbers [d] and [d, d]")
    return [torch.from_numpy(mean), torch.from_numpy(covariance)]


def main():
    parser = border.command_line(__doc__)
    add = parser.add_argument
    add("--samples", required=True, help=".npz: arr_0 uint8 [n, H, W, 3], arr_1 the classes")
    add("--reference", help="real pictures, likewise (default: fresh ones of our world)")
    add("--inception", help="inception-2015-12-05.pt (default: the toy world's judge)")
    add("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    add("--out", help="also write the figures here, as JSON")
    args = parser.parse_args()
    with border.one_line_errors("the number of pictures"):
        if args.out:
            border.output(args.out)
        device, samples = border.pick_device(args.device), read_npz(args.samples)
        pixels, classes = samples["arr_0"], samples.get("arr_1")
        if args.reference:
            reference = read_npz(args.reference)
        else:  # fresh pictures, which nothing has learnt from
            world = "fine" if pixels.shape[1] == toy.WORLDS["fine"] else "plain"
            number = max(1000, len(pixels))
            reference = {"arr_0": toy.make(number, judge.JUDGE_SEED + 2, world)[0]}

        extractor, stored = functools.partial(judge_features, device=device), {}
        if args.inception:  # classes of its own; statistics in files are those of its features
            network, classes = load_inception(args.inception, device), None
            extractor = functools.partial(inception_features, network=network)
            for name, *keys in (("FID", "mu", "sigma"), ("sFID", "mu_s", "sigma_s")):
                if keys[0] in reference:
                    stored[name] = statistics_of(reference, keys, args.reference)
        figures = evaluate(pixels, reference["arr_0"], extractor, classes, stored)

        print(f"{len(pixels):,} samples, {len(reference['arr_0']):,} pictures of the reference")
        for name, meaning in MEANINGS.items():
            value = f"{figures[name]:.4f}" if name in figures else "left out"
            print(f"{name:9} {value:>9}   {meaning}")
        if stored:
            print(f"by the statistics stored in the reference: {', '.join(stored)}")
        if args.out:
            text = json.dumps(figures | {"stored": list(stored)})
            border.write_safely(args.out, lambda partial: partial.write_text(text))


if __name__ == "__main__":
    main()
