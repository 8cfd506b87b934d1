"""Draw pictures: python sample.py

A checkpoint goes in, a labelled grid of pictures comes out, by default of the toy world. With
released weights, which are fetched once (support/released.py has their names): python sample.py
--ckpt randar-L --classes 207 "red fox" (classes of ImageNet, by number or name).

To measure quality, write many pictures into one file; eight GPUs draw the same ones as one:
torchrun --nproc-per-node 8 sample.py --number 50000 --npz samples.npz
"""

import support  # first: Ctrl-C while torch is imported is no traceback

import pathlib
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from randar import ORDERS, load_randar
from support import border, data, judge, pictures, released, toy
from support.border import UserError, decoding_precision
from support.classes import names_of_classes, parse_classes, spread_classes
from support.speed import compile_layers, record
from tokenizer import load_tokenizer

SHOWN = 12  # pictures of each class in the grid
COMPILED = 5000  # so many pictures are worth compiling, on a GPU: predicted, not yet measured


def load_models(ckpt, tokenizer=None, device="cpu"):
    """(model, Tokenizer) from files, in eval mode; the model is of any kind that load_randar knows.

    Both: paths, or words for released ones; None is the tokenizer that was released with the
    checkpoint, or tokenizer.pt beside it. UserError if they do not fit.
    """
    tokenizer = tokenizer or released.known_of(ckpt)[0]
    model = load_randar(released.file_of(ckpt), device)
    beside = pathlib.Path(ckpt).with_name("tokenizer.pt")
    remedy = (f"give --tokenizer the one of {model.config.vocab_size} codes that it was trained "
              "with (released ones: llamagen has 16384, maskgit 1024)")
    if tokenizer is None and not beside.is_file():
        raise UserError(f"{ckpt} needs its tokenizer, and there is no {beside}: {remedy}")

    tokenizer = load_tokenizer(released.file_of(tokenizer or beside), device)
    if tokenizer.config.codebook_size != model.config.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.config.codebook_size} codes: {remedy}")
    if model.fingerprint not in (None, data.facts_of(tokenizer, "")["fingerprint"]):
        raise UserError(f"the tokenizer is another one, with as many codes: {remedy}")
    return model, tokenizer


# ------------------------------------------------------------------------------------------------
# From classes to pictures


def sample_batches(model, tokenizer, classes, seed, batch_size=64, rank=0, processes=1, graph=False,
                   **options):
    """Draw an image of each class, n ints: an iterator of batches, each as of draw_batch.

    The batches are dealt out to the processes. All of them must iterate, but only rank 0 gets the
    images: always the same, for chance in a batch follows from the seed and its number alone.
    graph: full batches by a CUDA graph (see `record`).
    """
    device, batches = next(model.parameters()).device, torch.as_tensor(classes).split(batch_size)
    generator = torch.Generator(device)
    recorded = record(model, batches[0].to(device), generator, **options) if graph else None
    starts = range(0, len(batches), processes)  # from each on, one batch for each process
    if rank == 0:
        starts = tqdm(starts, "sampling", unit=" draws")
    for start in starts:
        drawn, mine = None, start + rank
        if mine < len(batches):  # in the end some have nothing to do
            generator.manual_seed(seed + 1_000_003 * mine)
            decode = recorded if len(batches[mine]) == len(batches[0]) else None
            drawn = draw_batch(model, tokenizer, batches[mine].to(device), generator, decode,
                               **options)

        parts = [drawn]
        if processes > 1:
            parts = [None] * processes
            dist.gather_object(drawn, parts if rank == 0 else None)
        yield from filter(None, parts)  # elsewhere than on rank 0 there is none


def draw_batch(model, tokenizer, classes, generator, decode=None, **options):
    """Draw an image of each class, int64 [b]: (pixels uint8 [b, H, W, 3], steps int32 [b, h, w]).

    options: order, steps, cfg, ... as the model's `decode` takes them. decode: in its place, what
    `record` made of it, with the generator and options in it. Returns NumPy arrays; steps: the step
    in which each token was decoded.
    """
    tokens = torch.zeros(len(classes), *model.config.grid, dtype=torch.int64, device=classes.device)
    steps = torch.full_like(tokens, tokens[0].numel())  # [b, h, w] both, filled step by step
    decoding = decode(classes) if decode else model.decode(classes, generator=generator, **options)
    for i, step in enumerate(decoding):  # Alg. B
        tokens.flatten(1).scatter_(1, step.positions, step.tokens)
        now = torch.full_like(step.positions, i)
        steps.flatten(1).scatter_reduce_(1, step.positions, now, "amin")  # the first time counts
    images = tokenizer.decode(tokens.flatten(1), model.config.grid)  # [b, 3, H, W]
    return pictures.to_uint8(images), steps.int().cpu().numpy()


def write_npz(path, batches, classes, height, width):
    """Write pictures as ADM's evaluation reads them: arr_0 uint8 [n, height, width, 3], arr_1 [n].

    batches: an iterator of uint8 [b, height, width, 3], n in all. Each is written before the next
    is drawn, so that memory does not grow with n. classes: the labels, n ints.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(classes), height, width, 3)}

    def write(partial):
        with zipfile.ZipFile(partial, "w") as archive:  # an .npz is .npy files, not compressed
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for pixels in batches:
                    file.write(pixels.tobytes())
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, np.asarray(classes, np.int64))

    border.write_safely(path, write)


# ------------------------------------------------------------------------------------------------
# Flags, those of apps.py too; `add` is a parser's add_argument


def add_model_flags(add):
    """Those of every command."""
    add("--ckpt", default=border.CHECKPOINTS / "randar_toy.pt",
        help="weights of train.py, or released ones, by file or by name: randar-L, randar-XL, "
        "randar-L-maskgit, rar-B, -L, -XL, -XXL (default: a toy model that ships)")
    add("--tokenizer", help="ours, or a released one: llamagen, maskgit, or its file (default: the "
        "one that --ckpt was released with, or tokenizer.pt beside it)")
    add("--order", help=f"one of {', '.join(ORDERS)} (default: that of the model's training)")
    add("--seed", type=border.seed, default=0)
    add("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    add("--out", default="samples.png", help="the picture to write (default: %(default)s)")


def add_decoding_flags(add):
    """Those of commands that decode. None: as the authors of released weights do, or the usual."""
    add("--steps", type=border.step_count,
        help="of decoding (default: 88 per 256 tokens, 128 for extrapolate; -1: one token a step)")
    add("--queries", choices=("causal", "isolated"), default="causal",
        help="whether tokens of one step see each other's position (causal, the paper's) or not")
    add("--drafts", type=border.positive_int, metavar="N",
        help="exact parallel decoding, N drafts a step, in place of --steps, its queries isolated "
        "(try 8 for one picture, 2 for many at once)")
    add("--cfg", nargs=2, type=border.finite_float, metavar=("START", "END"),
        help="classifier-free guidance, from START to END (default: 1 4, if not its authors')")
    add("--power", type=border.finite_float, metavar="P",
        help="guidance rises as (1 - cos(pi share^P)) / 2, as RAR's (default: in a straight line)")
    add("--scg", type=border.finite_float, default=1.0,
        help="spatial contextual guidance (default: %(default)s)")
    add("--temperature", type=border.positive_float, help="(default: 1, if not its authors')")
    add("--top-k", type=border.whole_number, default=0, help="of the k likeliest (default: of all)")
    add("--top-p", type=border.probability, default=1.0, help="of the likeliest, this much of all")


def decoding_options(args):
    """The arguments of `decode` that flags give: a dict. In args, too, flags left open are set."""
    usual = dict(cfg=(1.0, 4.0), temperature=1.0)
    for name, value in (usual | released.known_of(args.ckpt)[1]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    names = ("order", "steps", "queries", "drafts", "cfg", "power", "scg", "temperature", "top_k",
             "top_p")
    options = {name: getattr(args, name) for name in names}
    return options | ({"steps": None} if args.drafts else {})  # drafts stand in its place


# ------------------------------------------------------------------------------------------------
# The command: parse, load, draw, write


def parse():
    """The command line."""
    parser = border.command_line(__doc__)
    add = parser.add_argument
    add("--classes", nargs="+", metavar="CLASS", help="numbers or names (default: ten; --npz: all)")
    add("--number", type=border.positive_int, help="pictures in all (default: 8 of each class)")
    add("--batch-size", type=border.positive_int, default=64, help="pictures at once (default: 64)")
    add("--gif", action="store_true", help="also an animation of the decoding, beside --out")
    add("--npz", metavar="FILE", help="also all pictures, in ADM's format, for evaluation")
    add("--graph", action="store_true", help="on a GPU, start a batch as one CUDA graph")
    add_model_flags(add)
    add_decoding_flags(add)
    return parser.parse_args()


def choose_classes(args, names):
    """(the class of each picture to draw, the classes to look at): two lists of ints."""
    shown = spread_classes(range(len(names)), columns=1).tolist()  # ten at most
    chosen = range(len(names)) if args.npz else shown  # quality is that of all classes
    if args.classes:
        chosen = shown = parse_classes(args.classes, names)
    classes = [chosen[i % len(chosen)] for i in range(args.number or 8 * len(chosen))]
    if not args.npz:  # in a file they stay mixed, for measures are computed over its parts as well
        classes.sort(key=chosen.index)
    return classes, shown


def keep(batches, classes, rows, most):
    """Pass the pixels of batches on; rows[class] gets its first pictures, [pixels, steps] each."""
    labels = iter(classes)  # of all pictures, in the order in which they are drawn
    for pixels, steps in batches:
        for picture in zip(pixels, steps):
            row = rows.get(next(labels))
            if row is not None and len(row) < most:
                row.append([x.copy() for x in picture])  # a view would keep all of the batch
        yield pixels


def write_pictures(args, rows, names, f):
    """The grid and the animation of rows {class: its [pixels, steps]}; f: pixels a token."""
    # What happened is read off the pictures: the largest of steps is the number of the last step.
    shown = {label: list(zip(*row[:SHOWN])) for label, row in rows.items() if row}
    last = max(np.max(steps) for _, steps in shown.values())
    title = (f"{last + 1} steps, order {args.order}, cfg {args.cfg[0]:g} to {args.cfg[1]:g}, "
             f"scg {args.scg:g}, seed {args.seed}")
    grid = [(names[label][0], pixels) for label, (pixels, _) in shown.items()]
    pictures.save_picture(pictures.picture_grid(grid, title), args.out)
    print(f"wrote up to {SHOWN} pictures of each class to {args.out}; {title}")

    if args.gif:  # of the first picture of each class
        path = pathlib.Path(args.out).with_suffix(".gif")
        pixels, steps = zip(*[row[0] for row in rows.values() if row])
        pictures.draw_gif(np.stack(pixels), np.stack(steps), f, path)
        print(f"wrote {path}")


def say_verdict(name, images, classes, world):
    """What the judge of a world says of images [n, 3, S, S] and their classes, n ints; or nothing.

    Images that are larger than it knows are reduced.
    """
    if world and len(images) > 1:
        if images.shape[-1] not in judge.SIDES[world]:
            images = F.adaptive_avg_pool2d(images, toy.WORLDS[world])
        verdict = judge.judge(images, classes)
        print(f"{name}: judge {verdict['accuracy']:.1%} of {len(images)}, "
              f"Frechet {verdict['frechet']:.2f}")


def main():
    """The command, in each of the processes that share the work."""
    with border.one_line_errors(smaller="--batch-size"):
        args = parse()
        rank, processes, device = border.join_processes(args.device)
        model, tokenizer = load_models(args.ckpt, args.tokenizer, device)
        model.to(decoding_precision(device))  # not the tokenizer, which is small
        names = names_of_classes(model.class_names, model.config.num_classes)
        classes, shown = choose_classes(args, names)
        args.order = args.order or model.order

        # What is mistyped, or cannot be written, is said before hours of work.
        if args.graph and (device.type != "cuda" or args.drafts):
            raise UserError("--graph is for a GPU and for a fixed number of steps, so not with "
                            "--drafts: leave --graph out")
        options = decoding_options(args)
        model.decode(torch.tensor(classes[:1], device=device), **options)  # no step of it yet
        pictures.picture_format(args.out)
        border.output(args.out)
        if args.gif:
            border.output(pathlib.Path(args.out).with_suffix(".gif"), others=[args.out])
        if args.npz:
            border.output(args.npz, "--npz", others=[args.out])

        if device.type == "cuda" and len(classes) >= COMPILED * processes:
            if border.can_compile(device):
                compile_layers(model)

        # Pictures pass by, on their way to the file. Some are kept: to be shown, for the judge.
        world, rows = toy.world_of(model, tokenizer), {label: [] for label in shown}
        batches = sample_batches(model, tokenizer, classes, args.seed, args.batch_size, rank,
                                 processes, **options)
        pixels = keep(batches, classes, rows, most=len(classes) if world else SHOWN)
        f, (h, w) = tokenizer.config.downsampling, model.config.grid
        if args.npz and rank == 0:
            write_npz(args.npz, pixels, classes, f * h, f * w)
            print(f"wrote {args.npz}: {len(classes)} pictures and their classes")
        for _ in pixels:  # without --npz, nothing has asked for them yet
            pass

        if rank == 0:  # the others have not seen them
            write_pictures(args, rows, names, f)
            labels = [label for label, row in rows.items() for _ in row]
            images = np.stack([pixels for row in rows.values() for pixels, _ in row])
            say_verdict("samples", pictures.from_uint8(images), labels, world)


if __name__ == "__main__":
    main()
