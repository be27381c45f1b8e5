"""How sure a difference between two arms is, from their scores seed by seed.

A paired t test, which takes the differences for normal, and an exact sign-flip test, which takes
them for nothing but symmetric. Both by hand; tests/test_scores.py has them from a textbook.
"""

import math
import statistics

import numpy as np


def t_test_p(t, df):
    """Two-sided p of Student's t for whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3
    and 26.7.4): 1 - 2/pi (angle + sin (cos + 2/3 cos^3 + ...)) for odd df,
    1 - sin (1 + 1/2 cos^2 + 1*3/(2*4) cos^4 + ...) for even df, where tan(angle) = t / sqrt(df)."""
    angle = math.atan(abs(t) / math.sqrt(df))
    term, total = math.cos(angle) if df % 2 else 1.0, 0.0
    for i in range(df % 2, df - 1, 2):
        total += term
        term *= math.cos(angle)**2 * (i + 1) / (i + 2)
    total *= math.sin(angle)
    return max(0.0, 1 - (2 / math.pi * (angle + total) if df % 2 else total))


def t_quantile(df, share=0.05):
    """The t that is exceeded, on one side or the other, with this share: 0.05 gives half the width
    of a 95 % interval in standard errors. By bisection; the largest of these, at df 1, is 12.7."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if t_test_p(middle, df) < share else (middle, high)
    return middle


def sign_flip(differences):
    """Exact two-sided p of a mean of n paired differences; it is never below 2 / 2^n.

    If the arms were alike, every difference could as well have had the other sign: p is the share
    of the 2^n sign patterns whose sum is at least as far from 0 as the one that was seen.
    """
    if len(differences) > 24:  # 2^n sums: 128 MB at n = 24
        return None
    sums = np.zeros(1)
    for d in differences:
        sums = np.concatenate((sums + d, sums - d))
    # Equal sums that are rounded differently count.
    p = np.mean(np.abs(sums) >= abs(sum(differences)) - 1e-9)
    return float(p)


def paired(arm, base):
    """Compare two arms, {seed: score} each, over their common seeds -> dict, or None without any.

    difference (points), its standard error over seeds, 95 % t interval (low, high) and p, the exact
    sign-flip p, and the relative gain in percent: the ratio of the two means, minus 1. One pair has
    no error: what needs one is None.
    """
    seeds = sorted(set(arm) & set(base))
    if not seeds:
        return None
    differences = [arm[s] - base[s] for s in seeds]
    mean, n = statistics.fmean(differences), len(seeds)
    base_mean = statistics.fmean(base[s] for s in seeds)
    result = {"seeds": seeds, "difference": mean, "seed_error": None, "low": None, "high": None,
              "p_t": None, "p_sign_flip": sign_flip(differences),
              "gain_percent": 100 * mean / base_mean if base_mean > 0 else None}
    if n > 1:
        error = statistics.stdev(differences) / math.sqrt(n)
        half = t_quantile(n - 1) * error
        t = math.copysign(math.inf, mean) if error == 0 else mean / error
        result |= {"seed_error": error, "low": mean - half, "high": mean + half,
                   "p_t": t_test_p(t, n - 1) if mean else 1.0}
    return result
