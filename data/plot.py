"""Draw the learning curves of runs as an SVG picture.

    python -m data.plot runs/random-* runs/self-*              # held-out loss, context gain

Runs of one arm (data/arms.py) are one line, their mean, over a thin line for each (up to four
arms); runs that were evaluated at different steps have no mean. The picture follows the reader's
light or dark setting and needs no other file.
"""

import math
from html import escape
from pathlib import Path

from data.arms import group_arms, read_run
from data.files import UserError, run_script, write_atomic
from data.flags import flag_parser
from data.runs import read_config

WIDTH, HEIGHT, TOP = 800, 420, 44
LINE = 17  # height of a line of text
MARK = "made by data.plot"  # such a file may be drawn anew, no other is overwritten
LETTER = 7  # mean width of a letter, rather too much than too little
COLOURS = {  # class of an element -> its colour in light, in dark
    "paper": ("#ffffff", "#0d1117"), "grid": ("#d8dee4", "#2f353d"),
    "ink": ("#1f2328", "#e6edf3"), "soft": ("#59636e", "#9198a1"),
    "arm0": ("#0969da", "#58a6ff"), "arm1": ("#cf222e", "#ff7b72"),
    "arm2": ("#1a7f37", "#3fb950"), "arm3": ("#8250df", "#bc8cff"),
    "arm4": ("#bc4c00", "#f0883e"), "arm5": ("#0a7d8c", "#39c5cf"),
    "arm6": ("#bf3989", "#f778ba"), "arm7": ("#7d6608", "#d4b106"),
}
ARM_COLOURS = 8


def svg(body, width, height):
    """Elements of a picture -> the text of an SVG file that reads in light and in dark."""
    light, dark = ("".join(f".{css}{{color:{both[i]}}}" for css, both in COLOURS.items())
                   for i in range(2))
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="13"><!-- {MARK} -->',
        "<style>text,circle,rect{fill:currentColor}polyline{stroke:currentColor;fill:none}"
        f"{light}@media (prefers-color-scheme: dark){{{dark}}}</style>",
        f'<rect class="paper" width="{width}" height="{height}"/>', *body, "</svg>\n"])


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
    places, n = sorted(heights), len(heights)
    for i in range(1, n):
        places[i] = max(places[i], places[i - 1] + gap)
    places = [min(place, last - (n - 1 - i) * gap) for i, place in enumerate(places)]
    order = sorted(range(n), key=lambda i: heights[i])
    return [places[order.index(i)] for i in range(n)]


# --------------------------------------------------------------------------------------------------
# learning curves


def curves(runs):
    """Run folders -> {arm: [[(tokens, held-out loss in nats)] for each run]}; {name: height} of the
    lines to compare with; the context gains of those runs that have them, like the losses.
    UserError where losses cannot be compared."""
    losses, gains, tokenizers, unigram = {}, {}, set(), set()
    for arm, models in group_arms(map(read_run, runs)).items():
        for run, log in ((model.folder, model.pretraining.evaluations) for model in models):
            if len(log) < 2:
                raise UserError(f"{run} has no two evaluations yet, so no curve: train it further")
            for key, found in (("val_loss", losses), ("context_gain", gains)):
                if points := [(line["tokens"], line[key]) for line in log
                              if line.get(key) is not None]:
                    found.setdefault(arm, []).append(points)
            config = read_config(run)
            tokenizers.add(config["tokenizer_sha256"])
            unigram.add(round(config["unigram_entropy"], 2))
    if len(tokenizers) > 1:
        raise UserError("these runs have different tokenizers: their losses, in nats per token, "
                        "cannot be compared")
    levels = {"unigram entropy": H for H in unigram} if len(unigram) == 1 else {}
    return losses, levels, gains


def mean_curve(runs):
    """[[(x, y)] for each run] -> [(x, mean y)] where all of them are; [] where they were not
    evaluated at the same x."""
    first, last = max(run[0][0] for run in runs), min(run[-1][0] for run in runs)
    common = [[(x, y) for x, y in run if first <= x <= last] for run in runs]
    if len({tuple(x for x, _ in run) for run in common}) > 1:
        return []
    return [(of[0][0], sum(y for _, y in of) / len(runs)) for of in zip(*common)]


def draw_curves(arms, levels, title="held-out loss (nats)", label="training tokens (millions)",
                unit=1e6, gains=()):
    """{arm: [[(x, y)] for each run]}, {name: y of a level} -> the text of an SVG file. `gains`, a
    dict like `arms`, is drawn below."""
    names = list(arms)
    body = panel(arms, levels, title, label, unit, names)
    if gains:
        below = panel(gains, {}, "context gain (nats): how much worse in another text's context",
                      label, unit, names, "below")
        body += [f'<g transform="translate(0 {HEIGHT})">', *below, "</g>"]
    return svg(body, WIDTH, HEIGHT * (2 if gains else 1))


def panel(arms, levels, title, label, unit, names, inside="inside"):
    """-> the elements of one diagram. The place of an arm in `names` gives its colour; `inside` is
    the name of the area that lines are clipped at."""
    means = {arm: mean_curve(runs) for arm, runs in arms.items()}
    points = [point for runs in arms.values() for run in runs for point in run]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low = min([y for _, y in points] + list(levels.values()))
    # What a model of random weights begins with (ln V) would press all else together.
    high = min(max(y for _, y in points), max(levels.values(), default=math.inf) + 0.5)
    low, high = low - 0.04 * (high - low), high + 0.04 * (high - low) + 1e-6
    css = {arm: f"arm{i % ARM_COLOURS}" for i, arm in enumerate(names)}
    labels = [(f"{name} {y:.2f}", y, "soft") for name, y in levels.items()]
    labels += [(f"{arm} {mean[-1][1]:.2f}", mean[-1][1], css[arm]) if mean else
               (f"{arm}: no mean", arms[arm][0][-1][1], css[arm]) for arm, mean in means.items()]
    left, right = 48, WIDTH - 20 - LETTER * max(len(words) for words, *_ in labels)
    bottom = HEIGHT - 44

    def at(x, y):
        return (left + (x - first) / (last - first or 1) * (right - left),
                TOP + (high - y) / (high - low) * (bottom - TOP))

    body = [f'<clipPath id="{inside}"><rect x="{left}" y="{TOP}" width="{right - left}" '
            f'height="{bottom - TOP}"/></clipPath>',
            text(left, 20, title), text((left + right) / 2, HEIGHT - 12, label, "soft", "middle")]
    for y in ticks(low, high):
        body += [line([at(first, y), at(last, y)], "grid"),
                 text(left - 8, at(first, y)[1], f"{y:g}", "soft", "end")]
    for x in ticks(first / unit, last / unit):
        body.append(text(at(x * unit, low)[0], bottom + 14, f"{x:g}", "soft", "middle"))
    for y in levels.values():
        body.append(line([at(first, y), at(last, y)], "soft", 1.5, 'stroke-dasharray="5 4"'))
    for arm, runs in arms.items():
        style = f'clip-path="url(#{inside})"'
        if not means[arm] or len(runs) > 1 and len(arms) <= ARM_COLOURS // 2:  # more: a tangle
            body += [line([at(*point) for point in run], css[arm], 1, 'opacity="0.35" ' + style)
                     for run in runs]
        if names.index(arm) >= ARM_COLOURS:  # a colour that is there already
            style += ' stroke-dasharray="7 3"'
        if means[arm]:
            body.append(line([at(*point) for point in means[arm]], css[arm], 2.2, style))
    heights = apart([at(first, y)[1] for _, y, _ in labels], bottom)
    return body + [text(right + 8, height, words, colour)
                   for (words, _, colour), height in zip(labels, heights)]


def main():
    parser = flag_parser("python -m data.plot RUN [RUN ...] [--out FILE]", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, finished or not")
    parser.add_argument("--out", default="plot.svg", help="the picture (default plot.svg)")
    args = parser.parse_args()
    out = Path(args.out).expanduser()
    if out.suffix != ".svg":
        raise UserError(f"--out {args.out}: the picture is SVG: give a name that ends in .svg")
    if out.exists() and not (out.is_file() and MARK.encode() in out.read_bytes()[:300]):
        raise UserError(f"{out} exists and is not a picture of this program: name another --out")
    losses, levels, gains = curves(args.runs)
    write_atomic(out, draw_curves(losses, levels, gains=gains).encode())
    print(f"{out}: open it in a browser")


if __name__ == "__main__":
    run_script(main)
