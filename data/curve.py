"""Score against pretraining tokens, as a picture (SVG) of what `glue.py --json` prints.

    python glue.py runs/random-* --table --json > scores.json
    python -m data.curve scores.json curve.svg                 # the primary endpoint
    python -m data.curve scores.json curve.svg --score STS-B   # or a task

A point per arm and token count, means over seeds; the floors are lines: random weights, fine-tuned
alike, and the majority class. Tokens are on a logarithmic axis.
"""

import argparse
import json
import math
import re
from html import escape
from pathlib import Path

from data.files import UserError, refuse_command, run_script, write_atomic

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 60, 190, 40, 50
SCHEDULE = {"steps", "warmup_frac", "decay_frac"}  # may differ from point to point
COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e"]


def read_points(tables, score):
    """Tables of glue.py -> ({arm: [(tokens, mean)]}, {floor: mean over the tables}). UserError
    where they differ in more than tokens and the schedule that goes with them."""
    if len({(repr(table["recipe"]), table["subject"]) for table in tables}) > 1:
        raise UserError("these scores differ in recipe, corpus or size, not only in tokens: name "
                        "the recipe to glue.py --table, and give it runs of one size")
    arms, floors, flags = {}, {}, {}
    for table in tables:
        for rows, into in ((table["rows"], arms), (table["floors"], floors)):
            for row in rows:
                name = re.sub(r", steps \d+", "", row["name"])
                own = {k: v for k, v in row.get("flags", {}).items() if k not in SCHEDULE}
                if flags.setdefault(name, own) != own:  # a name tells arms of one table apart
                    differ = sorted(k for k in own if own[k] != flags[name].get(k))
                    raise UserError(f"the arm {name} has another {', '.join(differ)} at "
                                    f"{table['tokens']} tokens: give glue.py the runs of one arm")
                value = row["ends"].get(score) or row["tasks"].get(score)
                if value:
                    into.setdefault(name, []).append((table["tokens"], value["mean"]))
    return ({name: sorted(points) for name, points in arms.items()},
            {name: sum(y for _, y in points) / len(points) for name, points in floors.items()})


def ticks(low, high, count=6):
    """Round numbers from below `low` to above `high`, about `count` of them."""
    raw = max(high - low, 1e-3) / count
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    return [i * step for i in range(first, last + 1)]


def draw(arms, floors, label):
    """-> the picture, as the text of an SVG file."""
    tokens = sorted({x for points in arms.values() for x, _ in points})
    values = [y for points in arms.values() for _, y in points]
    values += [y for name, y in floors.items() if name != "majority class"]
    ys = ticks(min(values), max(values))
    # A little room on both sides; one token count alone stands in the middle.
    first, last = math.log(tokens[0] / 1.2), math.log(tokens[-1] * 1.2)

    def at(x, y):
        return (LEFT + (math.log(x) - first) / (last - first) * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - (y - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM))

    def text(x, y, words, anchor="start", colour="#333"):
        return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">'
                f'{escape(words)}</text>')

    labels = []  # on the right: (height, words, colour)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
           f'font-family="sans-serif" font-size="13">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
           text(LEFT, 24, label),
           text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, "pretraining tokens (millions)", "middle")]
    for y in ys:
        height = at(tokens[0], y)[1]
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}" '
                   'stroke="#ddd"/>')
        out.append(text(LEFT - 8, height + 4, f"{y:g}", "end"))
    free = 0
    for x in tokens:
        if (place := at(x, ys[0])[0]) >= free:  # a number that would lie on another is left out
            out.append(text(place, HEIGHT - BOTTOM + 18, f"{x / 1e6:.0f}", "middle"))
            free = place + 26
    for name, y in floors.items():
        if ys[0] <= y <= ys[-1]:
            height = at(tokens[0], y)[1]
            out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" '
                       f'y2="{height:.1f}" stroke="#888" stroke-dasharray="6 4"/>')
            labels.append((height + 4, f"{name} {y:.1f}", "#666"))
    for i, (name, points) in enumerate(arms.items()):
        colour = COLOURS[i % len(COLOURS)]
        places = [at(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in places]
        labels.append((places[-1][1] + 4, f"{name} {points[-1][1]:.1f}", colour))
    below = HEIGHT  # where the label before it is: from below, apart, in their order
    for height, words, colour in sorted(labels, reverse=True):
        below = min(height, below - 15)
        out.append(text(WIDTH - RIGHT + 8, below, words, colour=colour))
    return "\n".join([*out, "</svg>\n"])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", help="what glue.py printed with --json")
    parser.add_argument("picture", help="the SVG file to write")
    parser.add_argument("--score", default="primary", help="primary, glue, mean or a task "
                        "(default primary)")
    parser.error = refuse_command
    a = parser.parse_args()
    try:
        arms, floors = read_points(json.loads(Path(a.scores).read_text()), a.score)
    except OSError as error:
        raise UserError(f"cannot read {a.scores}: {error.strerror}")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{a.scores} is not what glue.py prints with --json")
    try:
        if Path(a.picture).exists() and not Path(a.picture).read_bytes().startswith(b"<svg"):
            raise UserError(f"{a.picture} exists and is no picture: give another name")
    except OSError as error:
        raise UserError(f"cannot write {a.picture or 'a picture without a name'}: {error.strerror}")
    if not arms:
        raise UserError(f"{a.scores} has no score named {a.score}")
    label = {"primary": "primary endpoint: mean accuracy of MNLI-m, QNLI, SST-2, QQP",
             "glue": "GLUE, mean of 8 tasks"}.get(a.score, a.score)
    write_atomic(a.picture, draw(arms, floors, label).encode())


if __name__ == "__main__":
    run_script(main)
