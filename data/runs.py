"""Run folders: which flags and folders are refused before any work begins, checkpoints, the log.

    runs/self-0/  config.json         every flag, versions, hashes of corpus, tokenizer and teacher
                  tokenizer.model     the vocabulary
                  log.jsonl           a JSON object a line, see the README
                  checkpoint.pt       everything needed to go on; checkpoint.prev.pt the one before
                  model.pt            the final weights: a folder that has it is finished
"""

import importlib.util
import json
import os
import re
from pathlib import Path

from data.download import NAMED
from data.files import (
    UserError, check_range, load_tensors, lock_folder, make_folder, read_json, save_tensors,
    sha256_file, write_atomic, write_json,
)
from data.ranks import WORLD

# The share of the unigram entropy below which a loss takes context. A tenth of the tokens to
# predict is shown as it is: a model that copies those is below the entropy, but it still has all of
# it at [MASK] (0.8 of them) and where another token stands (0.1).
WITHOUT_CONTEXT = 0.9
BEFORE_CONFIG = {".lock", "tokenizer.model", "tokenizer.model.tmp", "config.json.tmp"}


def check_flags(a, given):
    """Refuse values out of range and flags that contradict each other; settle open defaults."""

    def need(condition, message):
        if not condition:
            raise UserError(message)

    if a["init_frac"] == -1:
        a["init_frac"] = 0.15 if a["masking"] == "self" else 0.0
    if a["lr"] == -1:  # measured on tiny, wide and mini: data/results/instrument/README.md
        narrow = a["width"] < 256 if a["width"] else a["size"] == "tiny"
        a["lr"] = 3e-3 if narrow else 1e-3
    if a["mask_rate_end"] == -1:
        a["mask_rate_end"] = a["mask_rate"]
    a["out"] = a["out"] or f"runs/{a['masking']}-{a['seed']}"
    inf = float("inf")
    for names, allowed, rule in (
            ("steps batch_size lr clip tau init_std rotary_base log_every eval_blocks "
             "checkpoint_every", lambda v: 0 < v < inf, "above 0"),
            ("seed corpus_tokens layers width pool micro_batch weight_decay threads eval_every "
             "local_start", lambda v: 0 <= v < inf, "0 or more"),
            ("dropout init_frac warmup_frac", lambda v: 0 <= v < 1, "from 0 to below 1"),
            ("decay_frac", lambda v: 0 <= v <= 1, "from 0 to 1"),
            ("mask_rate mask_rate_end alpha", lambda v: 0 < v <= 1, "above 0 and at most 1"),
            ("seq_len", lambda v: v >= 16, "at least 16"),
            ("width", lambda v: v % 64 == 0, "a multiple of 64, the width of a head"),
            ("seed", lambda v: v < 2**63, "below 2^63")):
        check_range(a, names, allowed, rule)
    names = ("docs", *NAMED)
    need(a["corpus"] in names or (a["corpus"] and Path(a["corpus"]).exists()),
         f"--corpus {a['corpus']}: no such file or folder; the names are {', '.join(names)}")
    for name in ("teacher", "flops_of"):
        need(not a[name] or (Path(a[name]) / "model.pt").exists(),
             f"--{name.replace('_', '-')} {a[name]}: not a finished run folder (if it has moved, "
             f"say where with --{name.replace('_', '-')})")

    self_or_teacher = a["masking"] != "random"
    for name in sorted({"select", "score_input", "pool"} & given):
        need(self_or_teacher, f"--{name.replace('_', '-')} is about entropies, and --masking "
             "random uses none: leave it out")
    need(self_or_teacher or not a["init_frac"] or a["distill"] == "after-init",
         "--init-frac with --masking random means something only with --distill after-init")
    need(a["pool"] != 1, "--pool 1 leaves nothing to choose: give 2 or more, or 0")
    need(not self_or_teacher or a["pool"] or a["score_input"] != "masked", "--pool 0 with "
         "--score-input masked would mask whole rows: give --pool 2, or --score-input clear")
    need(a["masking"] != "entropy" or a["score_input"] != "type", "--score-input type is learned "
         "from the model in training: use it with --masking self")
    uses_teacher = a["masking"] == "entropy" or a["distill"] != "off" or a["init_from_teacher"]
    need(a["teacher"] or not uses_teacher, "--masking entropy, --distill and --init-from-teacher "
         "need --teacher RUN: a finished run, for example of  python train.py --masking random")
    need(uses_teacher or not a["teacher"],
         "nothing uses --teacher: add --masking entropy or --distill complete")
    need(a["distill"] != "after-init" or a["init_frac"], "--distill after-init begins where "
         "--init-frac ends: give it a value above 0")
    need(a["distill"] != "off" or not {"alpha", "tau"} & given, "--alpha and --tau need --distill")
    need(a["positions"] == "rotary" or not {"rotary_base", "local_start"} & given,
         "--rotary-base and --local-start need --positions rotary")
    need(not a["flops_of"] or "steps" not in given, "give --steps or --flops-of, not both")
    for name in ("flops_of", "init_from_teacher"):
        need(not (a["begin_from"] and a[name]),
             f"give --begin-from or --{name.replace('_', '-')}, not both")
    if "begin_from" in given and a["begin_from"]:
        check_origin(a)
    share, rest = divmod(a["batch_size"], WORLD)
    need(rest == 0, f"--batch-size {a['batch_size']} cannot be split evenly over {WORLD} processes")
    need(share % (a["micro_batch"] or share) == 0, f"--micro-batch {a['micro_batch']} does not "
         f"divide --batch-size {a['batch_size']}" + f" over {WORLD} processes" * (WORLD > 1))
    need(not a["tensorboard"] or importlib.util.find_spec("tensorboard"),
         "--tensorboard needs a package that is not here: pip install tensorboard")
    # A block of n tokens holds at most ceil(n / 17) [SEP]s, see data/corpus.py.
    n = a["seq_len"] - 2
    most = int(max(a["mask_rate"], a["mask_rate_end"]) * n + 0.5)
    most *= max(1, a["pool"]) if self_or_teacher else 1
    need(most <= n - -(-n // 17), f"{most} candidates for masking are more than a row of "
         f"{a['seq_len']} tokens holds: lower --pool or --mask-rate")


def open_run(a, given, may_change):
    """-> (all flags, the config of the earlier run that is resumed or evaluated, or None).

    A new run takes its flags from `a`; an earlier one from its config.json, and the flags in
    `given` must then agree, but for those in `may_change`. UserError for every folder in which
    something could be lost.
    """
    if {"resume", "eval"} <= given or a.get("eval") == "":
        raise UserError("--eval RUN only evaluates and needs a run folder; --resume goes on")
    run = Path(a.get("eval") or a.get("resume") or a["out"] or f"runs/{a['masking']}-{a['seed']}")
    config, finished = run / "config.json", (run / "model.pt").exists()
    if not {"resume", "eval"} & given:
        if config.exists():
            what = f"finished: give another --out, for example {run}-b" if finished else (
                f"unfinished: continue it with  python train.py --resume {run}")
            raise UserError(f"{run} is {what}")
        if run.exists() and (not run.is_dir() or set(os.listdir(run)) - BEFORE_CONFIG):
            raise UserError(f"{run} is there and is no run folder: give another --out")
        return {**a, "eval": False}, None
    if not config.exists():
        raise UserError(f"{run} is not a run folder: it has no config.json")
    if "resume" in given and finished:
        raise UserError(f"{run} is finished, and with it its learning-rate schedule: nothing to "
                        "resume; start a longer run with another --out")
    if "eval" in given and not finished:
        raise UserError(f"{run} is not finished: continue it with  python train.py --resume {run}")
    config = read_config(run, a)
    own, names = config["flags"], set(a) - {"resume", "eval"}
    if set(own) != names or not {"corpus_sha256", "tokenizer_sha256", "teacher_sha256", "dtype",
                                 "origin_sha256", "flops", "teacher_flops"} <= set(config):
        raise UserError(f"{run / 'config.json'} is damaged, or of another version of train.py")
    for name in sorted(given - {"resume", "eval", "out"} - may_change):
        if a[name] != own[name]:
            raise UserError(f"{run} has --{name.replace('_', '-')} {own[name]}, and that cannot "
                            "change: leave the flag out, or start a run with another --out")
    own |= {name: a[name] for name in given & may_change} | {"out": str(run)}
    if "resume" in given:
        check_flags({**own, "flops_of": ""}, set())  # its FLOPs are in --steps by now
    return {**own, "eval": "eval" in given}, config


def read_config(run, defaults):
    """A run's config.json; its flags have the types of the `defaults` of the same name, where there
    are any. UserError if it is damaged."""
    path = Path(run) / "config.json"
    flags = (config := read_json(path)).get("flags")
    if not isinstance(flags, dict) or "masking" not in flags or not all(
            type(value) is type(defaults.get(name, value)) for name, value in flags.items()):
        raise UserError(f"{path} is damaged, or of another version of train.py")
    return config


def begin_run(run, earlier, tokenizer_path, config):
    """Make the run folder with its config.json and tokenizer.model, or check that an `earlier` run
    is continued with the tokenizer and teacher it had. -> the folder's lock, to be kept alive."""
    make_folder(run)
    lock = lock_folder(run)
    if earlier:
        for what in ("tokenizer", "teacher"):
            if earlier[f"{what}_sha256"] != config[f"{what}_sha256"]:
                raise UserError(f"the {what} is not the one that {run} began with")
    else:
        if (run / "config.json").exists():
            raise UserError(f"{run} was begun by another process just now")
        write_atomic(run / "tokenizer.model", tokenizer_path.read_bytes())
        write_json(run / "config.json", config)  # last: a folder that has it is a run
    return lock


def spent_flops(run):
    """(FLOPs of a finished run, FLOPs of the training of its teacher). UserError if unfinished."""
    if not (Path(run) / "model.pt").exists():
        raise UserError(f"{run} is not a finished run")
    config = read_json(Path(run) / "config.json")
    if not all(isinstance(config.get(name), int) for name in ("flops", "teacher_flops")):
        raise UserError(f"{run} was made by another version of train.py")
    return config["flops"], config["teacher_flops"]


# What a run and its continuation must share: the model, the text, and the order of the blocks.
SHARED = ("seed corpus_tokens vocab_size seq_len size layers width positions rotary_base "
          "batch_size weight_decay").split()


def check_origin(a, corpus_sha256=None):
    """The finished run of --begin-from -> (its steps, its FLOPs, those of its teacher, or 0 where
    the run with the flags `a` has the same teacher).

    UserError if that run cannot continue it. Its masking may be another one.
    """
    flops, teacher_flops = spent_flops(a["begin_from"])
    config = read_config(a["begin_from"], a)
    for name in SHARED:
        if config["flags"].get(name) != a[name]:
            raise UserError(f"--begin-from {a['begin_from']} has --{name.replace('_', '-')} "
                            f"{config['flags'].get(name)}, and that cannot change")
    steps = config["flags"].get("steps", a["steps"])
    if steps >= a["steps"]:
        raise UserError(f"--begin-from {a['begin_from']} has {steps} steps: --steps, which counts "
                        "them too, must be larger")
    if config["flags"].get("decay_frac") != 0:
        raise UserError(f"--begin-from {a['begin_from']}: its learning rate has fallen; only a run "
                        "of --decay-frac 0 can be continued")
    if round(a["warmup_frac"] * a["steps"]) > steps:
        raise UserError(f"--begin-from {a['begin_from']}: the warm-up of --warmup-frac, a share of "
                        f"--steps, would begin again after its {steps} steps: lower it")
    if a["teacher"] and config.get("teacher_sha256") == origin_sha256(a["teacher"]):
        teacher_flops = 0
    if corpus_sha256 not in (None, config.get("corpus_sha256")):
        raise UserError(f"--corpus {a['corpus']} is not the text of {a['begin_from']}")
    return steps, flops, teacher_flops


def origin_sha256(run):
    """The sha256 of a finished run's weights; "" for no run."""
    return sha256_file(Path(run) / "model.pt") if run else ""


def load_origin(run, earlier):
    """The last checkpoint of the run of --begin-from. UserError if it is not there, or not that
    of the run with which the `earlier` one, that is resumed, began."""
    run, state = Path(run), None
    if (run / "config.json").exists() and (run / "model.pt").exists():
        if earlier and earlier["origin_sha256"] != origin_sha256(run):
            raise UserError(f"--begin-from {run} is not the run that this one began from")
        state = load_checkpoint(run)
        steps = read_json(run / "config.json")["flags"]["steps"]
    if not state or state["step"] != steps:
        raise UserError(f"--begin-from {run} has no checkpoint of its last step (if it has moved, "
                        "say where with --begin-from)")
    return state


def save_checkpoint(run, state):
    """Write checkpoint.pt; the one that was there becomes checkpoint.prev.pt.

    At every moment one of the two is whole, whatever happens to the process.
    """
    new, newest = run / "checkpoint.new.pt", run / "checkpoint.pt"
    save_tensors(new, {**state, "config_sha256": sha256_file(run / "config.json")})
    if newest.exists():
        os.replace(newest, run / "checkpoint.prev.pt")
    os.replace(new, newest)


def load_checkpoint(run):
    """What save_checkpoint wrote, or None where a run was stopped before its first checkpoint."""
    newest, previous = run / "checkpoint.pt", run / "checkpoint.prev.pt"
    if not newest.exists() and not previous.exists():
        return None
    try:
        state = load_tensors(newest if newest.exists() else previous)
    except UserError as error:
        if not (newest.exists() and previous.exists()):
            raise
        load_tensors(previous)  # if that one is damaged too, it says so itself
        raise UserError(f"{error}; {previous} is intact: delete {newest} to go on from there")
    if state.get("config_sha256") != sha256_file(run / "config.json"):
        raise UserError(f"the checkpoint in {run} does not belong to its config.json")
    return state


def parse_log(run):
    """-> (the whole lines of a run's log.jsonl as dicts, the number of a damaged line or 0). What
    follows the last line break is half a line, which a kill left: it is dropped."""
    path, lines = Path(run) / "log.jsonl", []
    try:
        *whole, _ = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}")
    for number, line in enumerate(whole, 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            return lines, number
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            return lines, number
        lines.append(entry)
    return lines, 0


def read_log(run):
    """The lines of a run's log.jsonl as dicts. UserError where one of them is damaged."""
    lines, damaged = parse_log(run)
    if damaged:
        raise UserError(f"{Path(run) / 'log.jsonl'} is damaged in line {damaged}")
    return lines


def open_log(run, step, logged):
    """Cut the log after `step` -> (the log, opened to append, and the step of its last line).

    logged: the step of the last line that was there when the checkpoint of `step` was written.
    What came later may be damaged, as after a power cut; so far the log must reach.
    """
    path = run / "log.jsonl"
    lines = [line for line in parse_log(run)[0] if line["step"] <= step] if step else []
    if step and path.exists() and (lines[-1]["step"] if lines else None) != logged:
        raise UserError(f"{path} is damaged: lines up to step {logged} were there; move it away to "
                        "go on without them")
    write_atomic(run / "log.jsonl", "".join(json.dumps(x) + "\n" for x in lines).encode())
    return open(run / "log.jsonl", "a"), lines[-1]["step"] if lines else None


def open_tensorboard(run, step):
    """-> a function that mirrors an entry of the log, for those who have tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run / "tensorboard", purge_step=step)  # what a kill left is dropped

    def mirror(entry):
        masked = entry.get("masked", {})
        scalars = {k: v for k, v in entry.items() if k != "masked"}
        for name, value in masked.items():  # a pair is [chosen, all tokens]
            values = value if isinstance(value, list) else [value]
            scalars |= {f"masked/{name}{end}": v for v, end in zip(values, ("", "_all"))}
        for name, value in scalars.items():
            writer.add_scalar(name, value, entry["step"])
        writer.flush()

    return mirror


SCORE = {"task": str, "seed": int, "recipe": dict, "data": str, "model": str, "score": float,
         "parts": dict, "majority": dict, "rows": list, "official": list, "trained_on": int}


def is_score(entry):
    """Is this what glue.py adds to a glue.json?"""
    from data.tasks import TASKS

    if not isinstance(entry, dict) or not all(
            isinstance(entry.get(name), kind) for name, kind in SCORE.items()):
        return False
    task = TASKS.get(entry["task"])
    right = entry.get("right", "")  # scores from before 2026-11-26 do not have it
    return task is not None and isinstance(right, str) and re.fullmatch(
        "(0x[0-9a-f]+)?", right) is not None and all(
        len(rows) == 1 + len(task.dev) and all(isinstance(n, int) and n > 0 for n in rows)
        for rows in (entry["rows"], entry["official"])) and all(
        set(parts) == set(task.parts) and all(isinstance(v, float) for v in parts.values())
        for parts in (entry["parts"], entry["majority"]))


def read_scores(folder, model):
    """The scores in a folder's glue.json that belong to the weights with this sha256: a list of
    dicts as glue.py makes them, with SCORE. UserError if the file is damaged."""
    path = Path(folder) / "glue.json"
    if not path.exists():
        return []
    entries = read_json(path).get("scores")
    if not isinstance(entries, list) or not all(map(is_score, entries)):
        raise UserError(f"{path} is damaged: move it away, and the scores are computed again")
    for entry in entries:  # before 2026-11-26 there was one rate for all
        entry["recipe"].setdefault("embedding_lr", entry["recipe"].get("lr"))
    return [entry for entry in entries if entry["model"] == model]


def add_score(folder, entry):
    """Add an entry to glue.json; all that is there, also for another recipe, stays."""
    path = Path(folder) / "glue.json"
    entries = read_json(path)["scores"] if path.exists() else []
    write_json(path, {"scores": [*entries, entry]})
