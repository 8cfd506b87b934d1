"""Draws docs/cache.png, the cache while steps decode 1, 2 and 3 tokens: python docs/draw_cache.py

Labels follow what `RandAR._steps` writes: what the cache lacks of all that is known, then queries.
"""

import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from support import pictures  # noqa: E402

SIZES = [1, 2, 3]  # tokens that the steps decode
LOOKS = {  # first letter of a label: colour of the box, of the text, line; also readable in grey
    "c": ("black", "white", "-"),
    "P": ("white", "black", "-"),
    "x": ("#b4b4b4", "black", "-"),
    "Q": ("#fff3c4", "black", "--"),
}
LEFT, BOX, HEIGHT, ROW = 2.05, 0.5, 0.42, 0.76  # inches: first box, its sides, rows' distance
NOTES = {  # row: what is worth a word
    1: ["$Q_1$ is what training has", "there, $P_1$: it stays"],
    2: ["$Q_3$ reads $Q_2$, but not $x_2$:", "$x_2$ is not drawn yet"],
    3: ["$Q_2$ stays as $P_2$,", "$Q_3$ is overwritten"],
    4: ["first what is known now,", "then the queries"],
    5: ["$Q_4$ stays as $P_4$,", "$Q_5$, $Q_6$ are overwritten"],
}


def rows_of(sizes):
    """The picture's rows: (title, labels of the cache, what is written, what will be overwritten).

    The last two are pairs (first place, end), or None.
    """
    rows, cache, done, start_pos = [], [], 0, 0
    for step, m in enumerate(sizes, start=1):
        # What training would have before the first query: class P_1 x_1 ... P_done x_done.
        known = ["class"]
        for turn in range(1, done + 1):
            known += [f"P_{turn}", f"x_{turn}"]
        queries = [f"Q_{done + 1 + j}" for j in range(m)]

        # The step writes over the cache, from start_pos on.
        written = known[start_pos:] + queries
        cache = cache[:start_pos] + written
        drawn = ", ".join(f"$x_{done + 1 + j}$" for j in range(m))
        title = [f"step {step} writes,", f"draws {drawn}"]
        rows.append((title, cache, (start_pos, len(cache)), None))

        # What the next step finds: the first query counts as a P, the others are to be overwritten.
        start_pos = len(known) + 1
        done += m
        cache = list(cache)
        cache[start_pos - 1] = cache[start_pos - 1].replace("Q", "P")
        rows.append(([f"step {step + 1} finds"], cache, None, (start_pos, len(cache))))
    return rows


def draw_row(axes, top, title, cache, written, overwritten):
    """One row of boxes, its title on the left; top: of the boxes, in inches."""
    middle = top - HEIGHT / 2
    # The title, then a box for each place of the cache.
    axes.text(0.05, middle, "\n".join(title), va="center", fontsize=12, weight="bold")
    for place, label in enumerate(cache):
        fill, ink, line = LOOKS[label[0]]
        left = LEFT + place * BOX
        axes.add_patch(Rectangle((left + 0.02, top - HEIGHT), BOX - 0.04, HEIGHT, facecolor=fill,
                                 edgecolor="black", linestyle=line, linewidth=1.3))
        text = "class" if label == "class" else f"${label}$"
        axes.text(left + BOX / 2, middle, text, ha="center", va="center", color=ink,
                  fontsize=10.5 if label == "class" else 14)

    # A bar under what this step has written, a stroke through what the next one will overwrite.
    if written:
        first, end = written
        axes.plot([LEFT + first * BOX + 0.02, LEFT + end * BOX - 0.02], [top - HEIGHT - 0.09] * 2,
                  color="black", linewidth=5, solid_capstyle="butt")
    for place in range(*overwritten or (0, 0)):
        left, right = LEFT + place * BOX - 0.02, LEFT + (place + 1) * BOX + 0.02
        axes.plot([left, right], [top - HEIGHT - 0.04, top + 0.04], color="#b00000", linewidth=3)


def main():
    rows = rows_of(SIZES)
    height = ROW * len(rows) + 0.65
    figure = pyplot.figure(figsize=(9.6, height), dpi=180)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 9.6), ylim=(0, height))
    axes.axis("off")

    # Places in the sequence, above all rows.
    axes.text(0.05, height - 0.2, "place in the cache", va="center", fontsize=11, color="#444444")
    longest = max(len(cache) for _, cache, _, _ in rows)
    for place in range(longest):
        axes.text(LEFT + (place + 0.5) * BOX, height - 0.2, str(place), ha="center", va="center",
                  fontsize=11, color="#444444")

    # The rows, each with its note behind the last box.
    for i, row in enumerate(rows):
        top = height - 0.42 - ROW * i
        draw_row(axes, top, *row)
        right = LEFT + len(row[1]) * BOX + 0.15
        axes.text(right, top - HEIGHT / 2, "\n".join(NOTES.get(i, [])), va="center", fontsize=11)

    # What the marks mean.
    legend = "bar: what the step writes      stroke: what the next step overwrites"
    legend += "      dashed: queries"
    axes.text(0.05, 0.14, legend, va="center", fontsize=11, color="#444444")
    pictures.save_figure(figure, HERE / "cache.png")


if __name__ == "__main__":
    main()
