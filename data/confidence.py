"""How sure a difference between two arms is, from their scores seed by seed.

A t interval, which takes the differences for normal, and an exact sign-flip test, which takes them
for nothing but symmetric. Both by hand; tests/test_compare.py has them from a textbook.
"""

import math
import statistics


def t_factor(df):
    """The t for which a Student t variable with `df` degrees of freedom is in [-t, t] with 95 %.

    Bisection of the closed form for whole df (Abramowitz and Stegun 26.7.3 and 26.7.4).
    """
    def inside(t):
        angle = math.atan(t / math.sqrt(df))
        cos, term, total = math.cos(angle), 1.0, 0.0
        if df % 2:
            term = cos
        for i in range(df % 2, df - 1, 2):  # cos^i, each with its product of odd / even numbers
            total += term
            term *= cos**2 * (i + 1) / (i + 2)
        total *= math.sin(angle)
        return 2 / math.pi * (angle + total) if df % 2 else total

    low, high = 0.0, 1e3  # the largest needed is 12.7, at df 1
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return middle


def sign_flip(differences):
    """Exact two-sided p of a mean of paired differences, and the smallest p attainable at this n.

    If the arms were alike, every difference could as well have had the other sign: p is the share
    of the 2^n sign patterns whose sum is at least as far from 0 as the one that was seen.
    """
    sums = [0.0]
    for d in differences:  # 2^n sums: n = 20 takes a second
        sums = [s + x for s in sums for x in (d, -d)]
    seen = abs(sum(differences)) - 1e-9  # equal sums that are rounded differently count
    return sum(abs(s) >= seen for s in sums) / len(sums), 2 / len(sums)


def paired(arm, base):
    """Two arms as {seed: score} -> their comparison over common seeds, or None if they share none.

    difference in points with low and high (None at one pair), p, p_smallest, and the relative gain
    in percent: the ratio of the two means, minus 1.
    """
    seeds = sorted(set(arm) & set(base))
    if not seeds:
        return None
    differences = [arm[s] - base[s] for s in seeds]
    mean, n, half = statistics.fmean(differences), len(seeds), None
    if n > 1:
        half = t_factor(n - 1) * statistics.stdev(differences) / math.sqrt(n)
    p, smallest = sign_flip(differences)
    base_mean = statistics.fmean(base[s] for s in seeds)
    return {
        "pairs": n, "difference": mean,
        "low": mean - half if n > 1 else None, "high": mean + half if n > 1 else None,
        "p": p, "p_smallest": smallest,
        "gain_percent": 100 * mean / base_mean if base_mean > 0 else None,
    }
