"""The tables of data/compare.py as text, for a terminal or a README."""

import itertools

END_NAMES = {"primary": "primary", "glue": "GLUE (8)", "mean": "mean"}


def show(value):
    """{"mean", "sd"} -> 72.1 ± 0.4"""
    if value is None:
        return "-"
    return f"{value['mean']:.1f}" + (f" ± {value['sd']:.1f}" if value["sd"] is not None else "")


def show_against(c):
    """A comparison -> the difference with its interval, p, the smallest p, the relative gain."""
    if c is None:
        return ["no common seed", "-", "-"]
    interval = f" [{c['low']:+.2f}, {c['high']:+.2f}]" if c["low"] is not None else ""
    gain = "-" if c["gain_percent"] is None else f"{c['gain_percent']:+.1f} %"
    return [f"{c['difference']:+.2f}{interval}", f"{c['p']:.3f} ({c['p_smallest']:.3f})", gain]


def cells(table, parts=False):
    """A table -> its two grids of strings, the first line of each being the header."""
    everything = [*table["floors"], *table["rows"]]
    ends = [end for end in END_NAMES if any(end in row["ends"] for row in everything)]
    columns = []
    for task in table["tasks"]:
        names = next(row["parts"][task] for row in everything if task in row["parts"])
        columns.append((task, lambda row, task=task: row["tasks"].get(task)))
        if parts and len(names) > 1:
            columns += [(f"{task} {part}", lambda row, task=task, part=part:
                         row["parts"].get(task, {}).get(part)) for part in names]
    columns += [(END_NAMES[end], lambda row, end=end: row["ends"].get(end)) for end in ends]
    scores = [["arm", "n", *(name for name, _ in columns)]]
    scores += [[row["name"], str(row["n"]), *(show(get(row)) for _, get in columns)]
               for row in everything]
    if table["baseline"] is None:
        return scores, []
    against = [["arm", "against", "FLOPs", "with teacher", "time"]]
    for end in ends:
        against[0] += [f"{END_NAMES[end]}, difference", "p (smallest)", "gain"]
    for row in table["rows"]:
        costs = [f"{row[c]:.2f}" if row[c] else "-" for c in ("cost", "cost_with_teacher", "time")]
        compared = itertools.chain.from_iterable(
            ["", "", ""] if "against" not in row else show_against(row["against"][end])
            if end in row["against"] else ["not scored on all tasks", "-", "-"] for end in ends)
        base = row["baseline"] if "against" in row else ""
        against.append([row["name"], base, *costs, *compared])
    return scores, against


def grid(lines, markdown):
    """Lines of strings -> one text, aligned or as a Markdown table."""
    if markdown:
        lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(
        cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))
    ).rstrip() for line in lines)


def show_tables(tables, markdown=False, parts=False):
    """All tables as one text for a terminal or a README."""
    out = []
    if len(tables) > 1:
        out.append(f"{len(tables)} tables: their runs differ in corpus, size, tokens or recipe, "
                   "and cannot be compared")
    for table in tables:
        scores, against = cells(table, parts)
        recipe = ", ".join(f"{k.replace('_', '-')} {v}" for k, v in table["recipe"].items())
        counts = {task: len(seeds) for task, seeds in table["fine_tuning_seeds"].items()}
        times = ", ".join(map(str, sorted(set(counts.values()))))
        out.append(f"{table['title']}. Recipe: {recipe}; fine-tuning seeds: {times}")
        out.append(grid(scores, markdown))
        if against:
            out.append("Paired by seed (95 % t interval; exact sign-flip p, smallest attainable):")
            out.append(grid(against, markdown))
        if table["notes"]:
            out.append("\n".join(f"- {note}" for note in table["notes"]))
    return "\n\n".join(out)
