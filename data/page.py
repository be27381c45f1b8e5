"""How the demonstration of masking.py looks: in a terminal, and as a page (page.html beside this).

Both take `rows`, what masking.explain returns, and `most`, the entropy of the hottest colour.
"""

from html import escape
from pathlib import Path
from string import Template


def print_rows(rows, most, colour):
    """The heat map of a sentence, then a line per token."""

    def heat(text, H):
        if not colour:
            return text
        cold, hot = (255, 247, 236), (239, 101, 72)  # readable under black text
        r, g, b = (round(c + (h - c) * H / most) for c, h in zip(cold, hot))
        return f"\033[48;2;{r};{g};{b};30m{text}\033[0m"

    line = ""
    for row in rows:
        text = row["piece"].replace("▁", "")
        line += (" " if row["piece"].startswith("▁") and line else "") + (
            heat(text, row["alone"]) if colour else f"{text}[{row['alone']:.1f}]")
    names = list(rows[0]["masked"])
    print(f"\n{line}\n\n{'token':16} alone  pool clear  {' '.join(names)}   best guesses")
    for row in rows:
        numbers = "".join(f"{row[c]:6.1f}" if row[c] is not None else " " * 6
                          for c in ("alone", "pool", "clear"))
        marks = " ".join(("#" if row["masked"][name] else ".").center(len(name)) for name in names)
        text = ", ".join(f"{guess} {p:.0%}" for guess, p in row["guesses"])
        text *= any(row["masked"].values())
        print(heat(row["piece"].replace("▁", " ")[:16].ljust(16), row["alone"]) + numbers,
              marks, "", text)


def html_page(rows, title, most):
    """The same as one self-contained page (data/page.html is its template)."""
    def span(row):
        tip = f"{row['alone']:.1f} nats: " + ", ".join(f"{g} {p:.0%}" for g, p in row["guesses"])
        space = " " if row["piece"].startswith("▁") else ""
        return (f'{space}<span class="t" style="--h:{row["alone"] / most:.3f}" '
                f'title="{escape(tip)}">{escape(row["piece"].replace("▁", ""))}</span>')

    body = ""
    for row in rows:
        guesses = ", ".join(f"{escape(g)} <i>{p:.0%}</i>" for g, p in row["guesses"])
        cells = [f'<td class="n">{"" if row[c] is None else format(row[c], ".1f")}</td>'
                 for c in ("alone", "pool", "clear")]
        cells += [f'<td class="m">{"●" * masked}</td>' for masked in row["masked"].values()]
        cells += [f"<td>{guesses * any(row['masked'].values())}</td>"]
        body += f"<tr><td>{span(row)}</td>{''.join(cells)}</tr>\n"
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title), k=sum(row["masked"]["random"] for row in rows), n=len(rows),
        most=f"{most:.0f}", body=body, sentence="".join(map(span, rows)),
        head="".join(f"<th>{name}</th>" for name in rows[0]["masked"]))
