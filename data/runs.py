"""Run folders: what is refused before any work begins, checkpoints, the log.

    runs/self-0/  config.json         every flag, hashes of corpus, tokenizer and teacher, FLOPs,
                                      and machine, versions and commit of each start
                  tokenizer.model     the vocabulary
                  log.jsonl           a JSON object a line, see data/results/keys.md
                  checkpoint.pt       everything needed to go on; checkpoint.prev.pt the one before
                  model.pt            the final weights: a folder that has it is finished

config.json has no checksum. What was trained carries its hash: checkpoint.pt and model.pt.
"""

import json
import os
import platform
import shlex
import sys
import time
from argparse import Namespace
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from data.files import (
    UserError, load_tensors, lock_folder, read_json, save_tensors, sha256_file, sha256_json,
    write_atomic, write_json,
)
from data.machine import RANK, WORLD

USES_CONTEXT = 0.25  # nats of context gain, as in the second part of data/results/plan.md
CONFIG = {"flags": dict, "corpus_sha256": str, "tokenizer_sha256": str, "teacher_sha256": str,
          "origin_sha256": str, "parameters": int, "unigram_entropy": float, "flops": int,
          "teacher_flops": int, "experiment": list, "starts": list}
OURS = {"tokenizer.model", "log.jsonl", "checkpoint.pt", "checkpoint.prev.pt", "model.pt",
        "glue.json"}  # what a new run would write over
# Where these differ, a run goes on, but not bit for bit.
NOT_BIT_FOR_BIT = ("machine", "device", "torch", "threads", "processes", "micro_batch", "compile")


def resume_command(run):
    return f"python train.py --resume {shlex.quote(str(run))}"


def less_memory(run, blocks):
    """A UserError for a run that had no memory for so many blocks at once."""
    if blocks == 1:
        return UserError("not enough memory for one block: a smaller --size or --seq-len is needed")
    fewer = next((blocks // n for n in (16, 8, 4, 2, 3, 5) if blocks % n == 0), 1)
    return UserError(f"not enough memory for {blocks} blocks at once: go on with  "
                     f"{resume_command(run)} --micro-batch {fewer}")


def check_new(run):
    """UserError for a folder in which a new run would overwrite something."""
    if (run / "config.json").exists():
        if not (run / "model.pt").exists():
            raise UserError(f"{run} is unfinished: continue it with  {resume_command(run)}")
        name, _, seed = str(run).rpartition("-")
        other = f"{name}-b-{seed}" if name and seed.isdigit() else f"{run}-b"
        raise UserError(f"{run} is finished: to repeat it give another --seed, for another "
                        f"experiment another --out, for example {shlex.quote(other)}")
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file: give another --out")
    # What is not ours may stay, such as a log of what is printed. A start that was killed before
    # config.json leaves a vocabulary, with a lock beside it.
    killed = ["tokenizer.model"] * (run / ".lock").exists()
    for name in sorted(OURS.difference(killed)):
        if (run / name).exists():
            raise UserError(f"{run} has a {name} and is no run folder: give another --out")


def open_earlier(run, finished, typed, defaults, may_change):
    """The flags and the config of a run that is finished (to be evaluated), or not (to go on).

    `typed`, the flags of the command line, must agree with the run's own, but for those that may
    change. -> (Namespace, dict). UserError if they do not, or if there is no such run.
    """
    if not (run / "config.json").exists():
        raise UserError(f"{run} is not a run folder: it has no config.json. One that was stopped "
                        "before it had one is begun anew, without --resume")
    if finished and not (run / "model.pt").exists():
        raise UserError(f"{run} is not finished: continue it with  {resume_command(run)}")
    if not finished and (run / "model.pt").exists():
        raise UserError(f"{run} is finished, and with it its learning-rate schedule: nothing to "
                        "resume; start a longer run with another --out")
    config = read_config(run)
    flags = config["flags"]
    if flags.keys() != defaults.keys() or not all(
            isinstance(flags[name], (int, float, str) if value is None else type(value))
            for name, value in defaults.items()):
        raise UserError(f"{run / 'config.json'} is of another version of train.py")
    for name in sorted(typed.keys() - may_change - {"out"}):
        if typed[name] != flags[name]:
            raise UserError(f"{run} has --{name.replace('_', '-')} {flags[name]}, and that cannot "
                            "change: leave the flag out, or start a run with another --out")
    needed = {name: value for start in config["starts"] for name, value in start.items()
              if name in ("micro_batch", "compile")}  # by the last start
    return Namespace(**{**flags, **needed, **typed, "out": str(run)}), config


def read_config(run):
    """Read a run's config.json -> a dict with the keys of CONFIG. UserError if it is damaged."""
    path = Path(run) / "config.json"
    config = read_json(path)
    if not all(isinstance(config.get(name), kind) for name, kind in CONFIG.items()) or not all(
            isinstance(start, dict) for start in config["starts"]):
        raise UserError(f"{path} is damaged, or of another version of train.py")
    return config


def config_sha256(config):
    """The hash of what decides a run: all of its config but where it was started."""
    return sha256_json({name: value for name, value in config.items() if name != "starts"})


def model_sha256(run):
    """The sha256 of a finished run's weights; "" for no run."""
    return sha256_file(Path(run) / "model.pt") if run else ""


# --------------------------------------------------------------------------------------------------
# a run that is being trained


@dataclass
class State:
    """What a checkpoint holds beside weights and optimiser. Nothing else survives a kill."""

    step: int = 0  # updates done
    flops: int = 0  # spent on them, and by the run of --init-from
    seconds: float = 0.0  # up to the last log line, evaluations left out
    logged: int = -1  # the step of that line
    log: str = ""  # log.jsonl so far: resuming writes it back, so it cannot be torn
    pending: list = field(default_factory=list)  # what the updates since that line returned
    clock: tuple = ()  # (step, time) at that line, or when this process began; not in a checkpoint

    def average_pending(self, machine):
        """Average the (loss, norm) of each update since the last log line over the processes.
        FloatingPointError, with the first bad step, where one is not a number."""
        if self.pending:
            values = machine.sum(torch.stack(self.pending)) / WORLD  # (n, 2)
            self.pending = list(values)
            finite = values.isfinite().all(1)
            if not finite.all():
                bad = finite.int().argmin().item()
                raise FloatingPointError(self.step - len(values) + 1 + bad)

    def stop_clock(self, batch_tokens):
        """What a log line says of the time since the last one, and of all time."""
        (step, began), now = self.clock, time.perf_counter()
        self.seconds += now - began
        return {"tokens_per_s": round((self.step - step) * batch_tokens / (now - began)),
                "seconds": round(self.seconds, 1)}


class Run:
    """The folder of a run that is being trained. Process 0 alone writes in it."""

    def __init__(self, args, job, earlier, experiment, flops, teacher_flops):
        """A new run; or one that goes on, an `earlier` one (its config). Nothing is written yet.

        experiment: the flags in which runs of one arm agree. flops, teacher_flops: what the whole
        run will have spent, and what its teacher did.
        """
        args.dtype = job.machine.dtype  # what auto chose belongs to the run: it goes on with that
        self.start = {
            **job.machine.record(), "numpy": np.__version__, "micro_batch": args.micro_batch,
            "compile": args.compile, "python": platform.python_version(), "command": sys.argv,
            "date": time.strftime("%Y-%m-%d %H:%M")}
        self.now = {
            "flags": vars(args), "experiment": sorted(experiment),
            "corpus_sha256": job.text.sha256, "tokenizer_sha256": job.text.tokenizer.sha256,
            "teacher_sha256": model_sha256(args.teacher),
            "origin_sha256": model_sha256(args.init_from),
            "parameters": sum(p.numel() for p in job.model.parameters()),
            "unigram_entropy": job.text.unigram_entropy, "flops": flops,
            "teacher_flops": teacher_flops, "starts": [self.start]}
        self.path, self.earlier = Path(args.out), earlier
        self.config = earlier or self.now

    def open(self, job):
        """Make the folder of a new run; or check that an earlier one goes on with the tokenizer,
        teacher and origin that it had, and add this start to its config.json."""
        if RANK:
            return
        path, earlier = self.path, self.earlier
        path.mkdir(parents=True, exist_ok=True)
        self.lock = lock_folder(path)  # until this process ends
        if not earlier:
            check_new(path)  # once more: another process may have begun it meanwhile
            write_atomic(path / "tokenizer.model", job.text.tokenizer_path.read_bytes())
            write_json(path / "config.json", self.config)  # last: a folder that has it is a run
            return
        for what in ("tokenizer", "teacher", "origin"):
            if earlier[f"{what}_sha256"] != self.now[f"{what}_sha256"]:
                raise UserError(f"the {what} is not the one that {path} began with")
        before = earlier["starts"][-1] if earlier["starts"] else {}
        changed = [f"{name} {self.start[name]} (before: {before.get(name)})"
                   for name in NOT_BIT_FOR_BIT if self.start[name] != before.get(name)]
        if changed:
            print(f"note: {', '.join(changed)}: it goes on, but not bit for bit as it would have")
        write_json(path / "config.json", {**earlier, "starts": [*earlier["starts"], self.start]})

    def restore(self, job, state):
        """Go on where the newest checkpoint is, if there is one -> the State there, or `state`.
        What the log has beyond it is dropped."""
        saved = load_checkpoint(self.path, self.config)
        if saved:
            job.model.load_state_dict(saved["model"])
            job.optimizer.load_state_dict(saved["optimizer"])
            if job.means:
                job.means.load_state(saved["means"])
            state = State(**saved["state"])
            state.pending = [x.to(job.machine.device) for x in state.pending]
        if not RANK:
            write_atomic(self.path / "log.jsonl", state.log.encode())
        state.clock = (state.step, time.perf_counter())
        return state

    def log(self, state, line):
        """Add a line, a dict, to the log."""
        text = json.dumps(line) + "\n"
        state.log, state.logged, state.pending = state.log + text, state.step, []
        state.clock = (state.step, time.perf_counter())
        if not RANK:
            with open(self.path / "log.jsonl", "a") as f:
                f.write(text)

    def save(self, job, state):
        """Write checkpoint.pt; the one that was there becomes checkpoint.prev.pt. At every moment
        one of the two is whole, whatever happens to the process."""
        if RANK:
            return
        new, newest = self.path / "checkpoint.new.pt", self.path / "checkpoint.pt"
        save_tensors(new, {
            "model": job.model.state_dict(), "optimizer": job.optimizer.state_dict(),
            "state": {name: value for name, value in vars(state).items() if name != "clock"},
            "means": job.means and job.means.state(), "config_sha256": config_sha256(self.config)})
        if newest.exists():
            os.replace(newest, self.path / "checkpoint.prev.pt")
        os.replace(new, newest)

    def finish(self, shape, weights):
        """Write model.pt, which makes the run a finished one."""
        save_tensors(self.path / "model.pt", {"shape": asdict(shape), "model": weights,
                                              "config_sha256": config_sha256(self.config)})
        self.lock.close()


def load_checkpoint(run, config):
    """What Run.save wrote, or None where a run was stopped before its first checkpoint."""
    there = [path for path in (run / "checkpoint.pt", run / "checkpoint.prev.pt") if path.exists()]
    if not there:
        return None
    newest, *previous = there
    try:
        state = load_tensors(newest)
    except UserError as error:
        if not previous:
            raise
        load_tensors(previous[0])  # if that one is damaged too, it says so itself
        raise UserError(f"{error}; {previous[0]} is intact: delete {newest} to go on from there")
    if state.get("config_sha256") != config_sha256(config):
        raise UserError(f"the checkpoint in {run} does not belong to its config.json: one of the "
                        "two was changed, or copied here")
    return state


def read_log(run):
    """Read a run's log.jsonl -> its lines as dicts. What follows the last line break is half a
    line, which a kill left: it is dropped. UserError where a line is damaged."""
    path = Path(run) / "log.jsonl"
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            lines.append(json.loads(line))
            lines[-1]["step"] + 0
        except (ValueError, RecursionError, LookupError, TypeError):
            raise UserError(f"{path} is damaged in line {number}")
    return lines


def about_context(log):
    """Lines of a log -> in words, whether the model uses context, and since when."""
    gains = [(line["step"], line["context_gain"]) for line in log
             if line.get("context_gain") is not None]
    if not gains:
        return "whether it uses context takes two held-out blocks to see"
    before = [i for i, (_, gain) in enumerate(gains) if gain <= USES_CONTEXT]
    if before and before[-1] == len(gains) - 1:
        return "it uses no context yet: train for more --steps"
    step = gains[before[-1] + 1 if before else 0][0]
    return (f"it has used context since step {step}: with that of another text its loss is "
            f"{gains[-1][1]:.2f} nats higher")
