"""Flags as a table, {group: [(name, default, allowed, help)]}, which train.py and glue.py have.

    default   True or False makes --name and --no-name; None: it follows from others
    allowed   a tuple of choices; a range, in the words of RANGES; "path", whose ~ is expanded; or
              None for any text
"""

import argparse
from math import inf
from pathlib import Path

from data.files import UserError

RANGES = {
    "above 0": lambda v: 0 < v < inf,
    "0 or more": lambda v: 0 <= v < inf,
    "from 0 to 1": lambda v: 0 <= v <= 1,
    "from 0 to below 1": lambda v: 0 <= v < 1,
    "above 0 and at most 1": lambda v: 0 < v <= 1,
    "from 16 to 65536": lambda v: 16 <= v <= 65536,  # model.py reads no longer rows
    # 5 special tokens, 256 bytes and an alphabet; and what uint16 holds
    "from 300 to 65536": lambda v: 300 <= v <= 65536,
    "from 0 to 1024": lambda v: 0 <= v <= 1024,  # torch crashes at some number beyond
    "below 2^63": lambda v: 0 <= v < 2**63,
}


def flag_parser(usage, description, flags=()):
    """An argparse parser with these flags that holds only what was given, and whose complaints are
    one line."""
    parser = argparse.ArgumentParser(
        usage=usage, description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)

    def refuse(message):
        raise UserError(f"{message}; --help lists what can be given")

    parser.error = refuse
    for title in flags:
        group = parser.add_argument_group(title)
        for name, default, allowed, text in flags[title]:
            if default not in ("", None):
                text += f" (default {default})"
            kind = {"type": float if default is None else type(default), "metavar": "X"}
            if isinstance(default, bool):
                kind = {"action": argparse.BooleanOptionalAction}
            elif isinstance(allowed, tuple):
                kind = {"choices": allowed}
            group.add_argument(f"--{name}", help=text, **kind)
    return parser


def defaults(flags):
    """{name, with _ for -: default} of a table of flags."""
    return {row[0].replace("-", "_"): row[1] for rows in flags.values() for row in rows}


def check_ranges(args, flags):
    """Expand ~ in the paths of the namespace `args`. UserError for a value outside its range."""
    for rows in flags.values():
        for name, _, allowed, _ in rows:
            key = name.replace("-", "_")
            value = getattr(args, key)
            if allowed == "path":
                setattr(args, key, value and str(Path(value).expanduser()))
            elif allowed in RANGES and value is not None and not RANGES[allowed](value):
                raise UserError(f"--{name} {value}: must be {allowed}")
