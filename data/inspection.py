"""What a strategy masks: as numbers for the log, in the terminal, and as a page.

    python -m data.inspection runs/self-0 "If the input is not a tensor, it raises an error."
    python -m data.inspection RUN "SENTENCE" --html page.html

masking.py decides, this file looks. The *exact* entropy of a token is that of the model's
prediction where this token alone is masked: what the cheaper scores stand for, at the price of one
forward per token. Entropies are in nats.
"""

import os
from dataclasses import replace
from html import escape
from pathlib import Path
from string import Template

import numpy as np
import torch

import masking
from data.files import UserError, run_script, write_atomic
from data.flags import flag_parser
from data.tokenizer import CLS, MASK, N_SPECIAL, SEP
from masking import SELECT, Strategy, draw, entropy, mask_count, masked, uncertainty, unmasked
from model import load

DIAGNOSIS_SEED = 2605  # one constant: every step and every arm is looked at with the same noise
DOSE_BLOCKS = 16  # exact entropies take a forward per token: some 2000 at 128 tokens a block
PLATEAU = 0.1  # nats, a choice: where entropies differ by less within a row, their order is noise

# --------------------------------------------------------------------------------------------------
# for the log


def token_kinds(pieces, counts):
    """Name kinds of vocabulary items: {kind: boolean (V,)}, for the table of what is masked.

    pieces: the vocabulary; counts (V,): how often each occurs in the training text. (Capitals are
    not among them: the tokenizer folds case, and ids do not remember it.)
    """
    counts = torch.as_tensor(np.where(np.arange(len(counts)) < N_SPECIAL, 0, counts))
    pieces = ["" if p.startswith("<0x") else p for p in pieces]  # bytes of rare characters
    frequent = torch.zeros(len(pieces), dtype=torch.bool)
    frequent[counts.argsort(descending=True, stable=True)[:100]] = True
    return {
        "word_internal": torch.tensor([p[:1].isalnum() for p in pieces]),  # no "▁" before it
        "number": torch.tensor([any(c.isdigit() for c in p) for p in pieces]),
        "frequent": frequent,  # the 100 most frequent
        "rare": counts < 100,  # seen fewer than 100 times
    }


def diagnose(model, tokens, k, strategy, kinds, static=False, with_dose=False):
    """Compare what a strategy masks in tokens (B, T) with all tokens: a dict for the log.

    The noise is the same at every step and in every run. Leaves eval mode on. Pairs are [chosen, at
    random], and of kinds [chosen, all]:

    entropy, accuracy  of the model at the chosen tokens, all [MASK], and at k random ones
    word_internal ...  shares of the kinds of token_kinds
    overlap            share of the chosen that are chosen again at another step, and what a random
                       choice has: how repetitive the masks are
    rate               masked share of the maskable tokens
    neighbour          share of the chosen whose right neighbour is chosen, too
    dose               see dose(), of the first blocks; only where asked for: it takes many forwards
    """
    noise = [draw(DIAGNOSIS_SEED, i, *tokens.shape).to(tokens.device) for i in range(3)]
    if static:  # then another step has the same numbers for places
        noise[1] = masking.keep_places(noise[1], noise[0])
    model.eval()
    chosen, again = (strategy(tokens, k, numbers) for numbers in noise[:2])
    maskable = tokens >= N_SPECIAL
    pairs = {"entropy": [], "accuracy": []}
    for positions in (chosen, Strategy()(tokens, k, noise[2])):
        inputs = tokens.scatter(1, positions, MASK)
        pairs["entropy"].append(uncertainty(model, inputs, positions).mean().item())
        with torch.inference_mode():
            guesses = torch.cat([model(x, p).argmax(-1)
                                 for x, p in zip(inputs.split(16), positions.split(16))])
        pairs["accuracy"].append((guesses == tokens.gather(1, positions)).float().mean().item())
    for name, kind in kinds.items():
        kind = kind.to(tokens.device)
        pairs[name] = [kind[tokens.gather(1, chosen)].float().mean().item(),
                       kind[tokens[maskable]].float().mean().item()]
    is_chosen = torch.zeros_like(maskable).scatter(1, chosen, True)
    rate = (is_chosen & maskable).sum() / maskable.sum()
    overlap = is_chosen.gather(1, again).float().mean()
    pairs["overlap"] = [overlap.item(), (k * len(tokens) / maskable.sum()).item()]
    report = {"rate": rate.item(), **pairs, "neighbour": neighbour(chosen)}
    if with_dose:
        report["dose"] = dose(model, tokens[:DOSE_BLOCKS], chosen[:DOSE_BLOCKS])
    return report


def one_at_a_time(model, tokens):
    """Mask each ordinary token of tokens (B, T) alone -> an iterator over parts of them: their rows
    (n,), their places (n,), the logits there (n, V)."""
    all_rows, all_places = (tokens >= N_SPECIAL).nonzero(as_tuple=True)
    for rows, places in zip(all_rows.split(64), all_places.split(64)):  # 64: the logits stay small
        with torch.inference_mode():
            inputs = tokens[rows].scatter(1, places[:, None], MASK)
            logits = model(inputs, places[:, None])[:, 0]
        yield rows, places, logits


def exact_entropy(model, tokens):
    """Entropy (B, T) of every token of tokens (B, T), masked alone; nan at special tokens. Takes a
    forward per token and leaves eval mode on."""
    model.eval()
    H = torch.full(tokens.shape, torch.nan, device=tokens.device)
    for rows, places, logits in one_at_a_time(model, tokens):
        H[rows, places] = entropy(logits)
    return H


def standardise(H):
    """Entropies H (B, T), nan at special tokens -> how many standard deviations of its row each is
    above its row's mean, 0 at special tokens; None where that means nothing: on the plateau."""
    above = H - H.nanmean(1, keepdim=True)
    deviation = above.square().nanmean(1, keepdim=True).sqrt()  # (B, 1)
    if deviation.mean() < PLATEAU:
        return None
    return (above / deviation.clamp_min(1e-6)).nan_to_num()


def dose(model, tokens, positions):
    """How strongly positions (B, k) select: the exact entropies of the chosen tokens, above their
    row's mean over all maskable tokens, in that row's standard deviations; the mean over all. 0 for
    a random choice. None on the plateau, where a row's entropies hardly differ."""
    deviations = standardise(exact_entropy(model, tokens))
    return None if deviations is None else deviations.gather(1, positions).mean().item()


def neighbour(positions):
    """Share of the chosen positions (B, k), in ascending order, whose right neighbour is chosen."""
    return (positions.diff(dim=1) == 1).sum().item() / positions.numel()


# --------------------------------------------------------------------------------------------------
# several strategies beside each other


def strategies_of(model):
    """{name: Strategy} to look at side by side: every rule asks this model."""
    return {"random": Strategy(),
            **{name: Strategy(model, masked, select, 2) for name, select in SELECT.items()},
            "high-unmasked": Strategy(model, unmasked)}  # our literal guess from the abstract


def watch(strategy, tokens, k, noise):
    """Choose by a strategy -> positions (B, k) and the entropies (B, T) that it chose by, nan where
    it looked at none."""
    seen = torch.full(tokens.shape, torch.nan, device=tokens.device)

    def reads(model, tokens, places):
        H = strategy.reads(model, tokens, places)
        seen.scatter_(1, places, H)
        return H

    watched = replace(strategy, reads=reads) if strategy.reads else strategy
    return watched(tokens, k, noise), seen


# --------------------------------------------------------------------------------------------------
# one sentence


def explain(model, tokenizer, text, strategies, rate, seed):
    """Look at one sentence -> a dict per token: piece; its entropies H {"alone": exact, "pool": as
    high to mix read it, None outside the pool, "unmasked"}; guesses [(piece, probability)]; masked
    {strategy: bool}. UserError for a sentence that does not fit the model."""
    ids = tokenizer.encode(text)
    if not 2 <= len(ids) <= model.shape.seq_len - 2:
        raise UserError(f"the sentence is {len(ids)} token(s) long: this model reads from 2 to "
                        f"{model.shape.seq_len - 2}; put it in quotes")
    tokens = torch.tensor([[CLS, *ids, SEP]])
    k = min(mask_count(rate, len(ids) + 2), len(ids) // 2)  # a pool of 2k must fit
    noise = draw(seed, 0, *tokens.shape)
    looks = {name: watch(strategy, tokens, k, noise)
             for name, strategy in strategies.items()}
    read = {name: looks[of][1][0].tolist()
            for name, of in (("pool", "high"), ("unmasked", "high-unmasked"))}
    logits = torch.cat([logits for *_, logits in one_at_a_time(model, tokens)])  # (n, V)
    top = logits.float().softmax(-1).topk(5)
    rows = []
    for i, (token, H, indices, p) in enumerate(zip(
            ids, entropy(logits).tolist(), top.indices.tolist(), top.values.tolist()), 1):
        guesses = [tokenizer.pieces[v].replace("▁", " ").strip() or "_" for v in indices]
        rows.append({"piece": tokenizer.pieces[token], "guesses": list(zip(guesses, p)),
                     "H": {"alone": H, **{name: None if np.isnan(values[i]) else values[i]
                                          for name, values in read.items()}},
                     "masked": {name: i in chosen for name, (chosen, _) in looks.items()}})
    return rows


def cells(row):
    """What is shown of a token: its entropies, a mark for each strategy that masks it, and the best
    guesses where one does."""
    masked = row["masked"].values()
    guesses = ", ".join(f"{guess} {p:.0%}" for guess, p in row["guesses"])
    return [*("" if H is None else f"{H:.1f}" for H in row["H"].values()),
            *("●" * is_masked for is_masked in masked), guesses * any(masked)]


def print_rows(rows):
    """Print a line per token."""
    names = [*rows[0]["H"], *rows[0]["masked"]]
    print(f"\n{'token':16}", *names, " best guesses")
    for row in rows:
        *short, guesses = cells(row)
        print(row["piece"].replace("▁", " ")[:16].ljust(16),
              *(cell.center(len(name)) for cell, name in zip(short, names)), "", guesses)


def html_page(rows, title):
    """The same as one self-contained page with a heat map, made from data/inspection.html."""
    sentence = body = ""
    most = max(1.0, np.ceil(max(row["H"]["alone"] for row in rows)))  # nats of the hottest colour
    for row in rows:
        H = row["H"]["alone"]
        tip = f"{H:.1f} nats: " + ", ".join(f"{g} {p:.0%}" for g, p in row["guesses"])
        span = (f'<span class="t" style="--h:{H / most:.3f}" title="{escape(tip)}">'
                f'{escape(row["piece"].replace("▁", ""))}</span>')
        span = " " * row["piece"].startswith("▁") + span
        sentence += span
        others = "".join(f"<td>{escape(cell)}</td>" for cell in cells(row))
        body += f"<tr><td>{span}</td>{others}</tr>\n"
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title), k=sum(row["masked"]["random"] for row in rows), n=len(rows),
        most=f"{most:.0f}", body=body, sentence=sentence,
        head="".join(f"<th>{name}</th>" for name in (*rows[0]["H"], *rows[0]["masked"])))


def main():
    parser = flag_parser("python -m data.inspection RUN SENTENCE [FLAGS]", __doc__)
    parser.add_argument("run", nargs="?", default="", help="a finished run: its model is asked")
    parser.add_argument("sentence", nargs="*", default=[], help="what to look at, in quotes")
    parser.add_argument("--mask-rate", type=float, default=0.15, help="share masked (default 0.15)")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default 0)")
    parser.add_argument("--html", default="", metavar="FILE", help="also write a web page")
    args = parser.parse_args()
    if not args.run or len(args.sentence) != 1:
        raise UserError('give a run folder and a sentence in quotes:  python -m data.inspection '
                        'RUN "A sentence."  A run is made in minutes by  python train.py')
    if not 0 < args.mask_rate <= 0.5 or args.seed < 0:
        raise UserError("--mask-rate must be above 0 and at most 0.5, --seed 0 or more")
    run = os.path.expanduser(args.run)
    model, tokenizer = load(run)
    rows = explain(model, tokenizer, args.sentence[0], strategies_of(model), args.mask_rate,
                   args.seed)
    if args.html:
        page = Path(args.html).expanduser()
        if page.exists() and not (
                page.is_file() and b"made by data.inspection" in page.read_bytes()[:300]):
            raise UserError(f"{page} exists and is not a page of this program: name another")
        write_atomic(page, html_page(rows, run).encode(errors="replace"))
    print(f"{sum(row['masked']['random'] for row in rows)} of {len(rows)} tokens masked. Entropies "
          "in nats: each token masked alone (so are the guesses); a random pool of\ntwice as many "
          "as are masked, all masked at once (high to mix choose by it, mix only half of its\n"
          "tokens); the unmasked text.\n"
          "● says that a strategy masks the token; guesses stand where one does.")
    print_rows(rows)


if __name__ == "__main__":
    run_script(main)
