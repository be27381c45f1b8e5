"""The flags of train.py: the table, the presets, and what contradicts what.

A flag that changes what an experiment is stands in the groups of EXPERIMENT: runs of one arm agree
in these. What follows from other flags is settled once, and is kept in a run's config.json.
"""

import os
from argparse import Namespace
from pathlib import Path

import masking
from data import corpus
from data.files import UserError
from data.flags import check_ranges, defaults, flag_parser
from data.machine import MACHINE_FLAGS, WORLD
from data.runs import check_new, open_earlier
from model import SIZES

# name, default (the laptop preset; None: it follows from others), what is allowed, help

FLAGS = {
    "Run": [
        ("out", "", "path", "run folder, never overwritten (default runs/<masking>-<seed>)"),
        ("seed", 0, "below 2^63", "of initial weights, data order and masks: pair arms by it"),
    ],
    "Data": [
        ("corpus", "docs", "path", "docs: the English in your Python, torch and numpy; wikitext2, "
         "wikitext103, bookcorpus: downloaded; or a text file (plain, .gz, .xz, .bz2) or a folder "
         "of them, a paragraph a line, a blank line between documents"),
        ("corpus-tokens", 0, "0 or more", "use only the first so many training tokens; 0: all"),
        ("vocab-size", 8192, "above 0", "pieces of the tokenizer that is learned from the corpus"),
        ("seq-len", 128, "from 16 to 65536", "tokens in a block, [CLS] and [SEP] included"),
    ],
    "Model": [
        ("size", "tiny", tuple(SIZES), "layers and width, as python model.py lists them"),
        ("layers", 0, "0 or more", "overrides --size; 0: as the size says"),
        ("width", 0, "0 or more", "overrides --size, a multiple of 64; 0: as the size says"),
        ("positions", "rotary", ("rotary", "learned"), "learned is BERT as published"),
        ("rotary-base", 100.0, "above 0", "frequency base of rotary positions; small is local"),
        ("local-start", 1.0, "0 or more", "initial query and key bias, with rotary; 0: off"),
        ("init-std", 0.05, "above 0", "deviation of the initial weights; BERT: 0.02"),
        ("dropout", 0.0, "from 0 to below 1", "on embeddings, attention, block outputs; BERT: 0.1"),
        ("init-from", "", "path", "begin with the weights of this finished run (every second layer "
         "of a deeper one); optimiser, schedule and step are new"),
    ],
    "Masking": [
        ("masking", "self", tuple(masking.MASKING), "anywhere; where a --teacher is uncertain; "
         "where the model itself is"),
        ("teacher", "", "path", "finished run that is asked (--masking entropy) and that teaches "
         "(--distill): the paper's external reference model"),
        ("select", "mix", (*masking.SELECT, "rise"), "which entropies: highest, lowest, nearest "
         "the row's median, in proportion, half highest and half random; low first, high last"),
        ("score-input", None, (*masking.SCORE_INPUT, "vocabulary"), "what is read. masked: the "
         "text, its candidates hidden; unmasked: all of it; once: all of it, before training "
         "(entropy); vocabulary: nothing, a mean of the vocabulary item is looked up (default of "
         "self; of entropy: masked)"),
        ("pool", 2, "0 or more", "candidates are a random pool of so many times k; 0: all tokens"),
        ("init-frac", None, "from 0 to below 1", "share of the run that masks at random first "
         "(self: 0.15, else 0)"),
        ("static", False, None, "a block is masked at the same places in every epoch"),
        ("mask-rate", 0.15, "above 0 and at most 1", "share of the tokens that are masked"),
        ("mask-rate-end", None, "above 0 and at most 1", "reached linearly (default: constant)"),
    ],
    "Distillation": [
        ("distill", "off", ("off", "complete", "after-init"), "learn from the --teacher, too: "
         "never, always, or after --init-frac"),
        ("alpha", 0.5, "above 0 and at most 1", "weight of the teacher against the true tokens"),
        ("tau", 2.0, "above 0", "temperature of both distributions"),
    ],
    "Optimisation": [
        ("steps", 2500, "above 0", "updates in the whole run"),
        ("flops-of", "", "path", "instead of --steps: the FLOPs that this finished run spent"),
        ("batch-size", 16, "above 0", "blocks in an update: part of the method"),
        ("lr", None, "above 0", "peak learning rate (default 3e-3, from width 256 on 1e-3)"),
        ("warmup-frac", 0.05, "from 0 to below 1", "share of the run over which the rate rises"),
        ("decay-frac", 1.0, "from 0 to 1", "share of the run, its end, over which the rate falls "
         "to 0; 1: from the warm-up on; 0: it never falls"),
        ("weight-decay", 0.01, "0 or more", "of matrices and embeddings, not of vectors"),
        ("clip", 1.0, "above 0", "largest norm of the gradient"),
    ],
    "Machine": [
        *MACHINE_FLAGS,
        ("micro-batch", 0, "0 or more", "blocks in a forward, for less memory; divides the batch"),
        ("compile", False, None, "torch.compile the training forward (not bit for bit)"),
        ("cache", os.path.relpath(Path(__file__).parent / "cache"), "path",
         "where prepared corpora are kept"),
    ],
    "Log": [
        ("log-every", 10, "above 0", "steps between log lines"),
        ("eval-every", 250, "0 or more", "steps between evaluations; 0: at start and end only"),
        ("eval-blocks", 1024, "above 0", "held-out blocks in an evaluation: the first in the "
         "text, so mix text that is sorted"),
        ("checkpoint-every", 250, "above 0", "steps between checkpoints"),
    ],
}
DEFAULTS = defaults(FLAGS)
# The flags that are the experiment: runs of one arm agree in them.
EXPERIMENT = {name for group in FLAGS if group not in ("Run", "Machine", "Log")
              for name in defaults({group: FLAGS[group]})}
# What may change when a run goes on. A corpus, teacher or origin that moved is known by its hash.
MAY_CHANGE = set(defaults({"": FLAGS["Machine"]})) - {"dtype"} | {"corpus", "teacher", "init_from"}

LONG = dict(  # why these: data/results/LOG.md
    corpus="wikitext103", mask_rate=0.3, decay_frac=1 / 8, checkpoint_every=1000)
PRESETS = {
    "laptop": {},  # the defaults: minutes on two cores
    "laptop-long": LONG | dict(  # --masking random: an hour in bfloat16, float32 half as fast
        size="wide", steps=32_000, warmup_frac=1 / 160, eval_every=2000),
    "gpu": LONG | dict(  # an H100: half an hour, estimated; some 20 epochs, so with dropout
        size="small", vocab_size=30522, dropout=0.1, init_std=0.02, batch_size=256,
        steps=80_000, warmup_frac=1 / 160, eval_every=1000, compile=True),
    "paper": dict(  # our literal guess from the abstract and the author's public model cards
        corpus="wikitext103", size="small", vocab_size=30522, seq_len=512, positions="learned",
        init_std=0.02, dropout=0.1, select="high", score_input="unmasked", pool=0, init_frac=0.0,
        batch_size=200, lr=1e-4, steps=28_600, warmup_frac=10_000 / 28_600, eval_every=1000,
        checkpoint_every=1000),
}


def settle(args):
    """The defaults that follow from other flags."""
    if args.init_frac is None:
        args.init_frac = 0.15 if args.masking == "self" else 0.0
    if args.score_input is None:  # why: data/results/dose.md
        args.score_input = "vocabulary" if args.masking == "self" else "masked"
    if args.lr is None:  # measured on tiny, wide and mini: data/results/LOG.md
        args.lr = 3e-3 if (args.width or SIZES[args.size][1]) < 256 else 1e-3
    if args.mask_rate_end is None:
        args.mask_rate_end = args.mask_rate
    args.out = args.out or f"runs/{args.masking}-{args.seed}"


def check_flags(args, given):
    """Refuse flags that contradict each other. `given`: the names of those that the user typed;
    None: the flags of an earlier run, whose --corpus, --teacher and --init-from may have moved."""
    new, given = given is not None, given or set()
    asking, teaching = args.masking != "random", args.distill != "off"
    share, rest = divmod(args.batch_size, WORLD)
    candidates = masking.mask_count(max(args.mask_rate, args.mask_rate_end), args.seq_len)
    candidates *= max(1, args.pool) if asking else 1
    for wrong, message in (
        (args.width % 64, f"--width {args.width}: must be a multiple of 64, the width of a head"),
        (not asking and given & {"select", "score_input", "pool"},
         "--select, --score-input and --pool need entropies: --masking self or entropy"),
        (not asking and args.init_frac and args.distill != "after-init",
         "--init-frac with --masking random means something only with --distill after-init"),
        (args.pool == 1, "--pool 1 leaves nothing to choose: give 2 or more, or 0"),
        (asking and not args.pool and args.score_input == "masked", "--pool 0 with --score-input "
         "masked would hide whole rows: give --pool 2, or --score-input unmasked"),
        (args.masking == "entropy" and args.score_input == "vocabulary",
         "--score-input vocabulary is learned by the model in training: use --masking self"),
        (args.masking == "self" and args.score_input == "once", "--score-input once is for a "
         "--teacher (--masking entropy): a model in training changes"),
        ((args.masking == "entropy" or teaching) and not args.teacher, "--masking entropy and "
         "--distill need --teacher RUN, for example one of  python train.py --masking random"),
        (args.teacher and args.masking != "entropy" and not teaching,
         "nothing uses --teacher: add --masking entropy or --distill complete"),
        (args.distill == "after-init" and not args.init_frac,
         "--distill after-init begins where --init-frac ends: give it a value above 0"),
        (not teaching and given & {"alpha", "tau"}, "--alpha and --tau need --distill"),
        (args.positions == "learned" and given & {"rotary_base", "local_start"},
         "--rotary-base and --local-start need --positions rotary"),
        (args.flops_of and "steps" in given, "give --steps or --flops-of, not both"),
        (rest, f"--batch-size {args.batch_size} cannot be split evenly over {WORLD} processes"),
        (share and share % (args.micro_batch or share), f"--micro-batch {args.micro_batch} does "
         f"not divide --batch-size {args.batch_size}" + f" over {WORLD} processes" * (WORLD > 1)),
        (args.compile and args.micro_batch and os.environ.get("TORCHINDUCTOR_CUDAGRAPHS") == "1",
         "a CUDA graph writes over the gradients that --micro-batch sums: leave that flag out, or "
         "TORCHINDUCTOR_CUDAGRAPHS"),
        (candidates > corpus.maskable(args.seq_len), f"{candidates} candidates for masking are "
         f"more than a row of {args.seq_len} tokens holds: lower --pool or --mask-rate"),
    ):
        if wrong:
            raise UserError(message)
    for name in ("teacher", "init_from", "flops_of")[:3 if new else 2]:
        run = getattr(args, name)
        if run and not (Path(run) / "model.pt").exists():
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {run}: not a finished run folder (if it has moved, say where "
                            f"with {flag})")


def parse_args(argv=None, description=None):
    """The command line -> (the flags; the config of the run that is resumed or evaluated, or None).

    A new run takes its flags from the command line and a preset; an earlier one from its
    config.json, and the flags that are given must then agree, but for those that may change.
    """
    parser = flag_parser("python train.py [FLAGS]", description, FLAGS)
    parser.add_argument("--preset", choices=PRESETS, help="laptop (default): minutes; laptop-long: "
                        "an hour; gpu: one GPU; paper: our literal guess. Any flag overrides it")
    parser.add_argument("--resume", nargs="?", const="", metavar="RUN",
                        help="continue this unfinished run (default: --out) with its own flags")
    parser.add_argument("--eval", metavar="RUN", help="only evaluate this finished run")
    typed = vars(parser.parse_args(argv))
    preset, resume, evaluated = (typed.pop(n, None) for n in ("preset", "resume", "eval"))
    if evaluated == "" or None not in (evaluated, resume):
        raise UserError("--eval RUN only evaluates and needs a run folder; --resume goes on")
    args, config = Namespace(**{**DEFAULTS, **PRESETS[preset or "laptop"], **typed}), None
    settle(args)
    if (evaluated, resume) != (None, None):
        run = Path(evaluated or resume or args.out).expanduser()
        args, config = open_earlier(run, evaluated is not None, typed, DEFAULTS, MAY_CHANGE)
    check_ranges(args, FLAGS)
    if evaluated is None:
        check_flags(args, None if config else set(typed))
    args.cache = os.path.abspath(args.cache)  # a run may go on in another working directory
    if not config:
        check_new(Path(args.out))
        if preset:
            print(f"preset {preset}: " + ", ".join(f"{n} {v}" for n, v in vars(args).items() if v))
    return args, config
