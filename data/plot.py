"""Draw the learning curves of runs, or the differences between arms, as an SVG picture.

    python -m data.plot runs/random-* runs/self-*              # held-out loss against tokens
    python glue.py runs/* --table --json > scores.json
    python -m data.plot scores.json --out differences.svg      # gains with their 95 % intervals

Runs of one arm (the folder's name without its final -SEED) are one line, their mean, over a thin
line for each. The picture follows the reader's light or dark setting and needs no other file.
"""

import argparse
import json
import math
import re
from html import escape
from pathlib import Path

from data.files import UserError, run_script, write_atomic
from data.runs import WITHOUT_CONTEXT, read_config, read_log

WIDTH, HEIGHT, TOP = 800, 420, 44
LINE = 17  # height of a line of text
LETTER = 7  # mean width of a letter, rather too much than too little
LIGHT = "#0969da #cf222e #1a7f37 #8250df #bc4c00 #0a7d8c #bf3989 #7d6608".split()
DARK = "#58a6ff #ff7b72 #3fb950 #bc8cff #f0883e #39c5cf #f778ba #d4b106".split()


def style(ink, soft, grid, paper, colours):
    """The classes of a picture as CSS; an element draws in the colour of its class."""
    arms = "".join(f".arm{i}{{color:{colour}}}" for i, colour in enumerate(colours))
    return (f".paper{{fill:{paper}}}.ink{{color:{ink}}}.soft{{color:{soft}}}.grid{{color:{grid}}}"
            f"{arms}")


def svg(body, width, height):
    """Elements of a picture -> the text of an SVG file that reads in light and in dark."""
    css = ("text,circle{fill:currentColor}polyline{stroke:currentColor;fill:none}"
           + style("#1f2328", "#59636e", "#d8dee4", "#ffffff", LIGHT)
           + "@media (prefers-color-scheme: dark){"
           + style("#e6edf3", "#9198a1", "#2f353d", "#0d1117", DARK) + "}")
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="13">',
        f"<style>{css}</style>", f'<rect class="paper" width="{width}" height="{height}"/>',
        *body, "</svg>\n"])


def text(x, y, words, css="ink", anchor="start"):
    return (f'<text x="{x:.1f}" y="{y + 4:.1f}" class="{css}" text-anchor="{anchor}">'
            f"{escape(words)}</text>")


def line(points, css, width=1.0, more=""):
    """A line through points [(x, y)]; `more`: further attributes."""
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{points}" class="{css}" stroke-width="{width}" {more}/>'


def ticks(low, high, count=6):
    """Round numbers from `low` to `high`, `count` of them or a few less."""
    raw = max(high - low, 1e-9) / count
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def apart(heights, last, gap=LINE):
    """Move labels as little as it takes: the same heights, in the same order, `gap` or more apart
    and, where there is room, none below `last`."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    places = [heights[i] for i in order]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], last - (len(places) - 1 - i) * gap)
    return [places[order.index(i)] for i in range(len(heights))]


# --------------------------------------------------------------------------------------------------
# learning curves


def curves(runs):
    """Run folders -> {arm: [[(tokens, held-out loss in nats)] for each run]} and {name: height} of
    the lines to compare with. UserError where losses cannot be compared."""
    arms, tokenizers, unigram = {}, set(), set()
    for run in map(Path, runs):
        config = read_config(run)
        points = [(entry["tokens"], entry["val_loss"]) for entry in read_log(run)
                  if "val_loss" in entry]
        if len(points) < 2:
            raise UserError(f"{run} has no two evaluations yet: there is no curve to draw")
        arms.setdefault(re.sub(r"-\d+$", "", run.resolve().name), []).append(points)
        tokenizers.add(config.get("tokenizer_sha256"))
        unigram.add(round(config.get("unigram_entropy", 0), 2))
    if len(tokenizers) > 1:
        raise UserError("these runs have different tokenizers: their losses, in nats per token, "
                        "cannot be compared")
    H = unigram.pop()
    levels = {"plateau: no context used": WITHOUT_CONTEXT * H, "unigram entropy": H}
    return arms, {} if unigram or not H else levels


def mean_curve(runs):
    """[[(x, y)] for each run] -> [(x, mean y)] at those x that all of them have."""
    runs = [dict(points) for points in runs]
    shared = sorted(set(runs[0]).intersection(*runs))
    return [(x, sum(run[x] for run in runs) / len(runs)) for x in shared]


def draw_curves(arms, levels, title="held-out loss (nats)", label="training tokens (millions)",
                unit=1e6):
    """{arm: [[(x, y)] for each run]}, {name: y of a level} -> the text of an SVG file."""
    means = {arm: mean_curve(runs) for arm, runs in arms.items()}
    points = [point for runs in arms.values() for run in runs for point in run]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low = min([y for _, y in points] + list(levels.values()))
    # What a model of random weights begins with (ln V) would press all else together.
    high = min(max(y for _, y in points), max(levels.values(), default=math.inf) + 0.5)
    low, high = low - 0.04 * (high - low), high + 0.04 * (high - low) + 1e-6
    css = {arm: f"arm{i % len(LIGHT)}" for i, arm in enumerate(arms)}
    labels = [(f"{name} {y:.2f}", y, "soft") for name, y in levels.items()]
    labels += [(f"{arm} {mean[-1][1]:.2f}", mean[-1][1], css[arm]) for arm, mean in means.items()]
    left, right = 48, WIDTH - 20 - LETTER * max(len(words) for words, *_ in labels)
    bottom = HEIGHT - 44

    def at(x, y):
        return (left + (x - first) / (last - first or 1) * (right - left),
                TOP + (high - y) / (high - low) * (bottom - TOP))

    body = [f'<clipPath id="inside"><rect x="{left}" y="{TOP}" width="{right - left}" '
            f'height="{bottom - TOP}"/></clipPath>',
            text(left, 20, title), text((left + right) / 2, HEIGHT - 12, label, "soft", "middle")]
    for y in ticks(low, high):
        body += [line([at(first, y), at(last, y)], "grid"),
                 text(left - 8, at(first, y)[1], f"{y:g}", "soft", "end")]
    for x in ticks(first / unit, last / unit):
        body.append(text(at(x * unit, low)[0], bottom + 14, f"{x:g}", "soft", "middle"))
    for y, opacity in zip(levels.values(), (1, 0.5)):
        body.append(line([at(first, y), at(last, y)], "soft", 1.5,
                         f'stroke-dasharray="5 4" opacity="{opacity}"'))
    for i, (arm, runs) in enumerate(arms.items()):
        inside = 'clip-path="url(#inside)"'
        if len(runs) > 1:
            body += [line([at(*point) for point in run], css[arm], 1, 'opacity="0.35" ' + inside)
                     for run in runs]
        if i >= len(LIGHT):  # a colour that is there already
            inside += ' stroke-dasharray="7 3"'
        body.append(line([at(*point) for point in means[arm]], css[arm], 2.2, inside))
    heights = apart([at(first, y)[1] for _, y, _ in labels], bottom)
    body += [text(right + 8, height, words, colour)
             for (words, _, colour), height in zip(labels, heights)]
    return svg(body, WIDTH, HEIGHT)


# --------------------------------------------------------------------------------------------------
# differences


def differences(tables):
    """What glue.py prints with --json -> [(title, [(arm, difference, low, high)])], of a table's
    first endpoint, primary where there is one; low and high are None where there is one pair."""
    groups = []
    for table in tables:
        against = {row["name"]: row["against"] for row in table["rows"] if row.get("against")}
        ends = [end for compared in against.values() for end, c in compared.items() if c]
        if ends:
            found = [(arm, compared[ends[0]]) for arm, compared in against.items()
                     if compared.get(ends[0])]
            title = f"{table['title']}: {ends[0]}, difference to {table['baseline']}"
            groups.append((title, [(arm, c["difference"], c["low"], c["high"])
                                   for arm, c in found]))
    return groups


def draw_differences(groups, unit="points", form="+.1f"):
    """[(title, [(arm, difference, low, high)])] -> the text of an SVG: a dot and a bar an arm."""
    rows = [row for _, rows in groups for row in rows]
    values = [0.0] + [value for row in rows for value in row[1:] if value is not None]
    margin = 0.05 * (max(values) - min(values)) + 1e-6
    low, high = min(values) - margin, max(values) + margin
    left, right = 24 + LETTER * max(len(row[0]) for row in rows), WIDTH - 145
    body, y = [], 24

    def at(x):
        return left + (x - low) / (high - low) * (right - left)

    for title, rows in groups:
        body.append(text(12, y, title, "soft"))
        for x in ticks(low, high):
            ends = [(at(x), y + 12), (at(x), y + 12 + 22 * len(rows))]
            body.append(line(ends, "grid" if x else "ink", 1 if x else 1.5))
        for name, difference, first, last in rows:
            y += 22
            numbers = f"{difference:{form}}"
            if first is not None:
                numbers += f" [{first:{form}}, {last:{form}}]"
                body.append(line([(at(first), y), (at(last), y)], "arm0", 2.5))
            body += [text(12, y, name), text(right + 10, y, numbers, "soft"),
                     f'<circle cx="{at(difference):.1f}" cy="{y}" r="4.5" class="arm0"/>']
        y += 2 * LINE
    body += [text(at(x), y - 8, f"{x:+g}" if x else "0", "soft", "middle")
             for x in ticks(low, high)]
    body.append(text((left + right) / 2, y + LINE - 6, unit, "soft", "middle"))
    return svg(body, WIDTH, y + 2 * LINE)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="RUN",
                        help="run folders, or one JSON file of glue.py")
    parser.add_argument("--out", default="plot.svg", help="the picture (default plot.svg)")

    def refuse(message):
        raise UserError(message)

    parser.error = refuse
    args = parser.parse_args()
    out = Path(args.out)
    if out.exists() and not (out.is_file() and out.read_bytes().startswith(b"<svg")):
        raise UserError(f"{out} exists and is not a picture of this program: name another --out")
    if len(args.inputs) == 1 and Path(args.inputs[0]).is_file():
        try:
            groups = differences(json.loads(Path(args.inputs[0]).read_text()))
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"{args.inputs[0]} is not what glue.py prints with --json")
        if not groups:
            raise UserError(f"{args.inputs[0]} has no differences: it takes two arms with pairs")
        picture = draw_differences(groups)
    else:
        picture = draw_curves(*curves(args.inputs))
    write_atomic(out, picture.encode())
    print(out)


if __name__ == "__main__":
    run_script(main)
