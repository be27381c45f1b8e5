"""A picture of differences with their intervals, for exit.py and quality.py."""

from data.plot import LETTER, LINE, WIDTH, line, svg, text, ticks


def draw_differences(groups, unit, show, levels=()):
    """[(title, [(arm, difference, low, high, *of each pair)])] -> the text of an SVG: for each arm
    a dot, a bar from low to high (None: no bar), and a small dot for each pair that is given.
    `levels`, {what: difference}, are lines to compare with; `show` puts a difference into words."""
    rows = [row for _, rows in groups for row in rows]
    # The rightmost first, at the top: so no line runs through the words of another.
    levels = dict(sorted(dict(levels).items(), key=lambda level: -level[1]))
    values = [0.0, *levels.values()] + [x for row in rows for x in row[1:] if x is not None]
    margin = 0.05 * (max(values) - min(values)) + 1e-6
    low, high = min(values) - margin, max(values) + margin
    numbers = {row: show(row[1]) + (f" [{show(row[2])}, {show(row[3])}]" if row[2] is not None
                                    else "") for row in rows}
    left = 24 + LETTER * max(len(row[0]) for row in rows)
    right = WIDTH - 20 - LETTER * max(map(len, numbers.values()))
    body, y = [], 24

    def at(x):
        return left + (x - low) / (high - low) * (right - left)

    for i, (what, x) in enumerate(levels.items()):
        body.append(text(at(x), y + i * LINE, f"{what} {show(x)}", "arm1", "end"))
    top, y = y + LINE, y + LINE * len(levels)
    for title, rows in groups:
        body.append(text(12, y, title, "soft"))
        for x in ticks(low, high):
            ends = [(at(x), y + 12), (at(x), y + 12 + 22 * len(rows))]
            body.append(line(ends, "grid" if x else "ink", 1 if x else 1.5))
        for row in rows:
            name, difference, first, last, *pairs = row
            y += 22
            if first is not None:
                body.append(line([(at(first), y), (at(last), y)], "arm0", 2.5))
            body += [text(12, y, name), text(right + 10, y, numbers[row], "soft")]
            body += [f'<circle cx="{at(x):.1f}" cy="{y}" r="{radius}" class="{css}"/>'
                     for x, radius, css in [(difference, 4.5, "arm0")] + [
                         (x, 2, "ink") for x in pairs]]
        y += 2 * LINE
    for i, x in enumerate(levels.values()):
        body.append(line([(at(x), top + (i - 0.4) * LINE), (at(x), y - LINE)], "arm1", 1.5,
                         'stroke-dasharray="5 4"'))
    body += [text(at(x), y - 8, f"{x:+g}" if x else "0", "soft", "middle")
             for x in ticks(low, high)]
    body.append(text((left + right) / 2, y + LINE - 6, unit, "soft", "middle"))
    return svg(body, WIDTH, y + 2 * LINE)
