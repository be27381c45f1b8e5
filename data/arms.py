"""Arms: what runs are compared as, by glue.py and by data/plot.py.

An arm is a name: runs/self-high-0 and runs/self-high-1 are runs of the arm self-high, since their
folders' names end in their own seeds. They must agree in every flag of the experiment.
"""

from dataclasses import dataclass, field
from pathlib import Path

from data.files import UserError
from data.runs import read_config, read_log

SAME = ("device", "dtype", "torch")  # scores that do not share these are not compared
WHERE = (*SAME, "machine")  # a score of another processor, which rounds differently, is another one


@dataclass
class Pretraining:
    """How a run was made, as far as a table tells it."""

    experiment: dict  # flag -> value; of a path what it stands for, see read_run
    start: dict  # what WHERE names, of all its starts: machine_of
    evaluations: list  # the lines of its log that have a held-out loss


@dataclass
class Model:
    """A run; or random weights, which are an arm like others (then `pretraining` is None)."""

    arm: str
    seed: int  # of pretraining
    folder: Path
    sha256: str = ""  # of the weights: a score belongs to them
    shape: object = None
    tokenizer: object = None
    pretraining: Pretraining | None = None
    scores: list = field(default_factory=list)  # entries of glue.json that a table shall show

    @property
    def name(self):
        return f"{self.arm}-{self.seed}"


def read_run(path):
    """A run folder, finished or not -> a Model, of which the weights are not read. UserError where
    a file is missing or damaged."""
    path = Path(path)
    config, log = read_config(path), read_log(path)
    evaluations = [line for line in log if "val_loss" in line]
    if not evaluations:
        raise UserError(f"{path} has no log.jsonl with an evaluation: the whole folder is needed, "
                        "and an evaluation that is done")
    try:
        for line in evaluations:  # are they numbers?
            sum([line["val_loss"], line["tokens"], line["flops"], line["flops_with_teacher"],
                 line.get("seconds", 0), line.get("context_gain") or 0])
        flags = config["flags"]
        # A path says nothing: what is compared is the text, how much training is behind the teacher
        # and the weights that were begun with, and that the budget is another run's.
        stands_for = {
            "corpus": config["corpus_sha256"], "flops_of": bool(flags["flops_of"]),
            "teacher": flags["teacher"] and config["teacher_flops"],
            "init_from": flags["init_from"] and log[0]["flops"]}
        experiment = {name: stands_for.get(name, flags.get(name))
                      for name in sorted(config["experiment"])}
        return Model(
            path.absolute().name.removesuffix(f"-{flags['seed']}"), flags["seed"], path,
            pretraining=Pretraining(experiment, machine_of(*config["starts"]), evaluations))
    except (LookupError, TypeError, ValueError):
        raise UserError(f"{path}: config.json or log.jsonl is damaged, or of another version")


def machine_of(*records):
    """What two scores, or all starts of two runs, must share to be compared."""
    return {key: "/".join(sorted({str(record.get(key)) for record in records})) for key in WHERE}


def group_arms(models):
    """-> {arm: [its models]}. UserError where two have one seed, or differ in the experiment."""
    arms = {}
    for model in models:
        for other in arms.setdefault(model.arm, []):
            both, new_name = f"{other.folder} and {model.folder}", f"{model.arm}-b-{model.seed}"
            if other.seed == model.seed:
                raise UserError(f"{both} are both the arm {model.arm} with seed {model.seed}: give "
                                f"one of them, or rename one, for example {new_name}")
            for flag, (a, b) in differing(other, model).items():
                raise UserError(
                    f"{both} are by their names one arm, {model.arm}, but differ in {flag} "
                    f"({str(a)[:40]}, {str(b)[:40]}): rename the runs of one kind, for example "
                    f"{new_name}")
        arms[model.arm].append(model)
    return arms


def differing(model, other):
    """The flags of the experiment in which two runs differ -> {flag: (one value, the other)}."""
    if model.pretraining is None or other.pretraining is None:
        return {}
    a, b = model.pretraining.experiment, other.pretraining.experiment
    return {"--" + name.replace("_", "-"): (a.get(name), b.get(name)) for name in sorted({*a, *b})
            if a.get(name) != b.get(name)}
