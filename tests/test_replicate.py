"""The comparison of masks, and its table.   python -m pytest tests/test_replicate.py -q"""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch

import train
from data.machine import commit
from data.results import quality
from data.results.quality import CONTRASTS, RULES, confirm, ninety, read_lines, verdict
from data.runs import read_log
from data.tasks import PRIMARY, TASKS
from model import Shape
from tests.helpers import LABELS, ROOT, WORDS, call, refused, write_corpus, write_task
from tests.test_plot import make_run

SCRIPT = ["bash", ROOT / "data/results/replicate.sh"]
WEIGHTS = "random weights"

# ---- the script, with a python that does nothing but say what it was asked

FAKE = """#!/bin/sh
echo "$@" >> "$CALLS"
out=$(echo "$@" | sed -n 's/.*--out \\([^ ]*\\).*/\\1/p')
case "$*" in
*--keep*random-99*) echo "no space" >&2; exit 1 ;;
*--keep*) cat > /dev/null; echo "{\\"run\\": \\"$(basename "$5")\\", \\"$6\\": 1}" >> "$3" ;;
glue.py*$BREAKS*--table*) echo "no table" >&2; exit 1 ;;
glue.py*static-11*--freeze*) echo "error: static-11, RTE: the loss is not finite" >&2; exit 1 ;;
glue.py*static-15*--freeze*) echo "error: random weights-15, RTE: is not finite" >&2; exit 1 ;;
glue.py*) echo scores ;;
train.py*--seed\\ 13*static*) mkdir -p "$out"; echo "gradient is not finite at 9" >&2; exit 1 ;;
train.py*$BREAKS*) mkdir -p "$out"; touch "$out/config.json"; echo "no memory" >&2; exit 1 ;;
train.py*) out=${out:-$3}; mkdir -p "$out"; touch "$out/config.json" "$out/model.pt"
    echo '{"step": 20, "seconds": 1.2}' > "$out/log.jsonl" ;;
esac
"""


def run_script(folder, **variables):
    """-> (the finished process, the commands that it gave, sorted)"""
    python, calls = folder / "python", folder / "calls"
    python.write_text(FAKE)
    python.chmod(0o755)
    calls.write_text("")
    done = subprocess.run(SCRIPT, text=True, capture_output=True, env={
        **os.environ, "PYTHON": str(python), "CALLS": str(calls), "RUNS": str(folder / "runs"),
        "CACHE": "c", "CORPUS": "text", "GLUE": "tsv", "BREAKS": "never", **variables})
    return done, calls.read_text().splitlines()


def kept(folder):
    return [json.loads(line)["run"]
            for line in (folder / "runs/quality.jsonl").read_text().splitlines()]


def test_all_that_is_planned_is_run_once_and_a_broken_run_goes_on(tmp_path):
    broken, _ = run_script(tmp_path, BREAKS="--seed 12 *context", JOBS="1")
    assert broken.returncode and "no memory" in broken.stderr
    before = kept(tmp_path)
    assert before[:6] == ["random-10", "random-11", "longer-10", "self-10", "error-10", "fall-10"]
    done, calls = run_script(tmp_path, MOON="error")
    assert done.returncode == 0, done.stderr
    assert not any(f"{run} " in f"{line} " for run in before for line in calls)
    assert sum("--resume" in line for line in calls) == 1
    found = kept(tmp_path)
    planned = {f"{arm}-{seed}" for pair, seeds in CONTRASTS.items() for arm in pair
               for seed in seeds if arm != WEIGHTS and (arm == "error-fall" or "-fall" not in arm)}
    assert len(found) == len(set(found)) and set(found) == planned
    assert len(list((tmp_path / "runs").glob("teacher-?"))) == 3
    assert [line.split()[-1] for line in run_script(tmp_path, MOON="error")[1]] == ["--check"]
    assert not any("scores" in path.read_text() for path in (tmp_path / "runs").glob("*.txt"))


def test_a_run_that_diverged_is_kept_without_scores(tmp_path):
    _, calls = run_script(tmp_path, SEEDS="13", ARMS="static")
    assert [line.split()[0] for line in calls] == ["train.py", "-m"]
    _, calls = run_script(tmp_path, SEEDS="11", ARMS="static")  # a fine-tuning did
    assert "--table" not in " ".join(calls) and kept(tmp_path) == ["static-13", "static-11"]
    assert (tmp_path / "runs/quality.jsonl").read_text().count("--diverged") == 2
    done, _ = run_script(tmp_path, SEEDS="15", ARMS="static")  # of random weights: nothing is known
    assert done.returncode and kept(tmp_path) == ["static-13", "static-11"]


def test_nothing_is_kept_where_the_scores_could_not_be_read(tmp_path):
    done, _ = run_script(tmp_path, SEEDS="14", ARMS="random", BREAKS="random-14 --cache")
    assert done.returncode and "no table" in done.stderr
    done, _ = run_script(tmp_path, SEEDS="99", ARMS="random")
    assert done.returncode and "no space" in done.stderr
    assert not (tmp_path / "runs/quality.jsonl").exists()


def test_dry_prints_every_command_once_and_how_long_they_take(tmp_path):
    done, calls = run_script(tmp_path, SEEDS="0", ARMS="random fall", DRY="1", JOBS="3")
    printed = [line.split()[1:] for line in done.stdout.splitlines()]
    assert [words[0] for words in printed] == ["train.py", "glue.py", "glue.py"] * 2
    caches = [words[words.index("--cache") + 1] for words in printed]
    assert caches == ["c", *[str(tmp_path / "runs")] * 2] * 2
    # 20 steps took 1.2 s: 10 minutes and 8.3, and twice random's for the fine-tunings.
    assert "about 0 h 12 min, 3 at a time" in done.stderr
    assert not (tmp_path / "runs").exists() and len(calls) == 2


def test_all_runs_of_a_seed_have_the_number_format_of_its_first(tmp_path):
    kept = {"run": "random-10", "seed": 10, "dtype": "bfloat16", "scores": [{"dtype": "other"}]}
    for more, others in (({}, "auto"), ({"DTYPE": "float32"}, "float32")):
        (tmp_path / "runs/fall-1").mkdir(parents=True, exist_ok=True)  # not kept yet
        (tmp_path / "runs/fall-1/config.json").write_text('{"starts": [{"dtype": "bfloat16"}]}')
        (tmp_path / "runs/quality.jsonl").write_text(json.dumps(kept) + "\n")
        _, calls = run_script(tmp_path, SEEDS="10 0 1", ARMS="fall", **more)
        for seed, dtype in ("10", "bfloat16"), ("0", others), ("1", "bfloat16"):
            asked = [line for line in calls if f"fall-{seed} " in line + " " and "-m " not in line]
            asked = [line for line in asked if "--resume" not in line]  # that keeps its own
            assert len(asked) > 2
            assert all(f"--dtype {dtype} --threads 1" in line for line in asked)
            (tmp_path / f"runs/fall-{seed}/config.json").write_text("{}")


def test_no_such_arm(tmp_path):
    for asked, said in (({"ARMS": "random slef"}, "no arm slef"), ({"MOON": "slef"}, "no arm slef"),
                        ({"ARMS": "teacher"}, "teachers for distill"),
                        ({"ARMS": "self-fall", "MOON": "error"}, "RULE-fall with MOON=RULE")):
        done, calls = run_script(tmp_path, **asked)
        assert done.returncode == 2 and said in done.stderr and not calls


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    """{arm: the flags of seed 10} of all trainings, as train.py reads them."""
    folder, found = tmp_path_factory.mktemp("arms"), {}
    _, calls = run_script(folder, SEEDS="10", MOON=" ".join(RULES))
    for line in calls:
        words = line.split()
        if words[0] == "train.py":
            args, *_ = train.parse_args([*words[1:-2], "--out", str(folder / "new")])
            found[words[-1].split("/")[-1].rpartition("-")[0]] = args
    return found


def test_every_arm_differs_from_random_by_what_the_plan_says(arms):
    own = {"masking": "self", "init_frac": 0.15, "select": "mix"}
    entropy = {**own, "masking": "entropy"}
    falling = {"mask_rate": 0.3, "steps": 8297}  # it ends at 15 %, as random does
    error = own | {"select": "sample", "score_input": "error"}
    high = {name: value for name, value in own.items() if name != "select"}
    slow = falling | {"steps": 5864}  # they ask the model
    vocabulary, context = (own | {"score_input": name} for name in ("vocabulary", "context"))
    assert {arm: {name: value for name, value in vars(args).items()
                  if value != getattr(arms["random"], name) and name not in ("out", "teacher")}
            for arm, args in arms.items()} == {  # settled: without entropies, select is "high"
        "teacher": {"seed": 104, "size": "wide", "corpus_tokens": 0, "steps": 20000, "lr": 1e-3},
        "random": {}, "longer": {"steps": 14014}, "self": own, "error": error, "fall": falling,
        "error-fall": error | falling, "vocabulary-fall": vocabulary | falling,
        "self-fall": own | slow, "high-fall": high | slow, "context-fall": context | slow,
        "high": high,
        "low": own | {"select": "low"}, "vocabulary": vocabulary, "context": context,
        "distill": {"distill": "complete"},
        "entropy": entropy, "entropy-distill": entropy | {"distill": "complete"},
        "double": {"steps": 20000}, "static": {"static": True}, "redrawn": {"select": "sample"},
        "literal": high | {"score_input": "unmasked", "pool": 0},
        **{f"{arm}-{other}": flags | more for arm, flags in (("random", {}), ("self", own))
           for other, more in (("1.6M", {"corpus_tokens": 1600000}),
                               ("25.8M", {"corpus_tokens": 25800000}),
                               ("rate30", {"mask_rate": 0.3, "mask_rate_end": 0.3}))}}
    assert {arm for arm, args in arms.items() if args.teacher} == {
        "entropy", "distill", "entropy-distill"}


@pytest.mark.parametrize("arm, other", [
    ("longer", "self"), ("fall", "random"), *((f"{rule}-fall", "random") for rule in RULES)])
def test_steps_are_those_of_equal_flops(arm, other, arms):
    def prepare(arm):
        model = Namespace(shape=Shape(8192, 2, 128, 128), parameters=lambda: iter([torch.ones(1)]))
        strategy = train.make_strategy(arms[arm], None, model, None)
        return arms[arm], Namespace(model=model, strategy=strategy)

    flops = train.count_flops(*prepare(other), range(arms[other].steps))
    assert arms[arm].steps == train.steps_for(flops, *prepare(arm))


# ---- the script, with all that it runs, on a toy text


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("toy corpus"), random.Random(0)
    write_corpus(folder / "text.txt", documents=300)
    for task in (*PRIMARY, "STS-B"):
        sentences = [" ".join(rng.choices(WORDS, k=5)) for _ in range(48)]
        write_task(folder / "glue", task, [
            (a, b, rng.choice(LABELS[task])) for a, b in zip(sentences[::2], sentences[1::2])], 12)
    return folder


def test_a_toy_is_replicated_and_killed_on_the_way(toy, monkeypatch, capsys):
    runs = toy / "runs"
    env = {**os.environ, "PYTHON": sys.executable, "CORPUS": str(toy / "text.txt"),
           "GLUE": str(toy / "glue"), "CACHE": str(toy / "cache"), "RUNS": str(runs),
           "DTYPE": "float32", "SEEDS": "0", "ARMS": "error", "FINE": "--batch-size 24",
           "FLAGS": "--vocab-size 600 --layers 2 --width 64 --seq-len 34 --batch-size 8 --steps 60 "
                    "--eval-blocks 8 --eval-every 0 --checkpoint-every 5 --log-every 5"}
    first = subprocess.Popen(SCRIPT, env=env, start_new_session=True)
    while first.poll() is None and not any(
            line["step"] >= 10 for line in read_log(runs / "error-0")):
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (runs / "error-0/model.pt").exists() and not (runs / "quality.jsonl").exists()
    done = subprocess.run(SCRIPT, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    weights, = read_lines(runs / "quality.jsonl").pop(WEIGHTS).values()
    error, = read_lines(runs / "quality.jsonl")["error"].values()
    assert len(json.loads((runs / "error-0/config.json").read_text())["starts"]) == 2
    scored = {(task, seed) for task in (*PRIMARY, "STS-B") for seed in range(3)}
    for line in (error, weights):
        assert {(e["task"], e["seed"]) for e in quality.by_recipe(line, quality.RECIPE)} == scored
        assert len(quality.by_recipe(line, {"freeze": True})) == 4 and len(line["scores"]) == 19
        assert line["dtype"] == "float32" and {"machine", "torch", "commit"} <= line.keys()
        for e in line["scores"]:
            right = e["correct"].count("1") / 12
            assert e["task"] == "STS-B" or 100 * right == pytest.approx(
                e["parts"][TASKS[e["task"]].parts[0]], abs=0.01)
    assert str(toy) not in (runs / "quality.jsonl").read_text()
    assert sum(share for share, _ in error["bins"].values()) == pytest.approx(1)
    before = (runs / "quality.jsonl").read_bytes()
    assert subprocess.run(SCRIPT, env=env).returncode == 0
    assert (runs / "quality.jsonl").read_bytes() == before


# ---- the table, of lines made by hand: four tasks of ten rows

FIRST = range(10, 22)


def run(arm, seed, right, **more):
    """A run that has the first `right` of ten rows right in each task: ten points a row."""
    where = {"device": "cpu", "dtype": "float32", "torch": "2", "machine": "ours", "commit": "c0"}
    return {**where, "run": f"{arm}-{seed}", "arm": arm, "seed": seed, "finished": True,
            "flops": 100, "teacher_flops": 0, "teacher_sha256": "", "val_loss": 5.0, "scores": [
                {**where, "task": task, "seed": 0, "data": "d",
                 "recipe": quality.RECIPE,
                 "score": 10 * right, "parts": dict.fromkeys(TASKS[task].parts, 10 * right),
                 "rows": [9, 10], "correct": f"{int('1' * right + '0' * (10 - right), 2):x}"}
                for task in PRIMARY], **more}


def lines():
    """12 seeds: longer gains a row on the first two, self on the even ones, error on nine."""
    return [line for seed in FIRST for line in (
        run(WEIGHTS, seed, 5, flops=0), run("random", seed, 6),
        run("longer", seed, 6 + (seed < 12), flops=140),
        run("self", seed, 7 - seed % 2, flops=140, loss_by_frequency={"less often": [0.1, 7.5]}),
        run("error", seed, 6 + (seed < 19)))]


def printed(some, tmp_path, capsys):
    """-> what the script prints of these lines"""
    (tmp_path / "quality.jsonl").write_text("".join(json.dumps(line) + "\n" for line in some))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["quality", str(tmp_path / "quality.jsonl")])
        quality.main()
    return capsys.readouterr().out


def cells(out, arm, control):
    return next(([c.strip() for c in line.split("|")[3:-1]] for line in out.splitlines()
                 if line.replace(" ", "").startswith(f"|{arm}|{control}|")), None)


def test_the_table_by_hand(tmp_path, capsys):
    out = printed(lines(), tmp_path, capsys)
    # Six differences of 10 and six of 0: mean 5, error sqrt(300 / 11 / 12) = 1.508, t 3.317 with 11
    # degrees of freedom; the 97.5 % point of t is 2.201, that of 95 % 1.796. All six must have one
    # sign for a sum as far from 0: 2 of 64. Rows: in each task one of ten differs, in half of the
    # seeds: sqrt(4 (0.25 / 10 - 0.05^2) / 10) / 4 = 2.37 points; together 2.81.
    assert cells(out, "self", "random") == [
        "12", "+5.00 [+1.68, +8.32]", "[+2.29, +7.71]", "0.0069", "0.0312", "0.2078", "2.81",
        "1.40", "1.40", "-", "-"]
    assert "\nself: inconclusive\nerror: gain\n" in out and "entropy-distill:" not in out
    assert "\nBy the means, self is above longer.\n" in out
    # Five of 10, one of -10: mean 3.33, error sqrt((600 - 133.3) / 11 / 12) = 1.880, t 1.773. It is
    # the larger p of self, and the second of Holm's three: twice.
    assert cells(out, "self", "longer")[:6] == [
        "12", "+3.33 [-0.81, +7.47]", "[-0.04, +6.71]", "0.1039", "0.2188", "0.2078"]
    # Nine of 10: mean 7.5, error sqrt(225 / 11 / 12) = 1.306, t 5.745: p 0.00013, three times.
    assert cells(out, "error", "random")[3:6] == ["0.0001", "0.0039", "0.0004"]
    assert cells(out, "random", "randomweights")[6:9] == ["4.74", "-", "-"]
    assert "paper's +5 % would be 3.00 points: not refuted for self" in out  # it may gain 8.32
    assert "is chosen when these are full: vocabulary - random" in out
    picture = (tmp_path / "quality.svg").read_text()
    assert "pretraining gains +10.00" in picture and "the paper&#x27;s +5 % +3.00" in picture
    assert "self - longer" in picture and "random - random weights" not in picture


def tables(text):
    """Markdown -> {(arm, control): {header: cell}} of all its tables that begin with these two."""
    found, header = {}, []
    for line in text.splitlines():
        cells = [cell.strip(" *") for cell in line.split("|")[1:-1]]
        if line.startswith("|---") or line.startswith("| ---"):
            continue
        if not cells or cells[:2] == ["arm", "control"]:
            header = cells
        elif header:
            found.setdefault(tuple(cells[:2]), {}).update(zip(header[2:], cells[2:]))
    return found


def test_the_pages_say_what_the_script_prints(tmp_path, capsys):
    """Of the committed runs: every number of quality.py stands in quality.md, and those of the
    README's table are among them."""
    results = ROOT / "data" / "results"
    out = printed(map(json.loads, (results / "quality.jsonl").read_text().splitlines()),
                  tmp_path, capsys)
    known = tables(out)
    for line in out.splitlines():
        contrast, cells = line.split("|")[1:2], [c.strip() for c in line.split("|")[2:-1]]
        if line.startswith("| difference"):
            header = cells
        elif contrast and " - " in contrast[0] and "---" not in line:
            known[tuple(contrast[0].strip().split(" - "))].update(zip(header, cells))
    page, readme = (path.read_text() for path in (results / "quality.md", ROOT / "README.md"))
    assert tables(page) == known
    rows = tables(readme)
    assert rows.keys() == known.keys()
    for contrast, row in rows.items():
        assert len(row) > 3 and row.items() <= known[contrast].items()
    words = " ".join(page.split())
    for line in out.splitlines():
        if not re.match(r"\||$", line) and "not shown yet" not in line and not (
                "not of one processor" in line
                and tuple(line.split(",")[0].split(" - ")) not in known):
            assert " ".join(line.split()) in words
    assert (tmp_path / "quality.svg").read_text() == (results / "quality.svg").read_text()


def test_nothing_is_shown_below_its_number_of_pairs(tmp_path, capsys):
    some = [line for line in lines() if line["run"] not in ("self-21", "random weights-10")]
    out = printed([*some, run("self", 22, 9), run("random", 22, 6)], tmp_path, capsys)
    assert "self - random: 11 of 12 pairs, not shown yet" in out
    assert cells(out, "self", "random") is None and cells(out, "error", "random")
    assert cells(out, "self", "longer") is None and "\nself: " not in out and "for self" not in out
    assert not (tmp_path / "quality.svg").exists()


def test_seeds_of_no_plan_are_shown_apart(tmp_path, capsys):
    out = printed([run("random", 0, 6), run("self", 0, 9)], tmp_path, capsys)
    assert out.rstrip().splitlines()[-1].split("|")[2:4] == ["   1 ", "            +30.00 "]


@pytest.mark.parametrize("change, said", [
    ({"dtype": "bfloat16"}, "error - random, seed 12: left out, for another dtype"),
    ({"scores": run("error", 12, 7)["scores"][1:]},
     "error - random, seed 12: left out, for want of scores"),
    ({"scores": 2 * run("error", 12, 7)["scores"]},
     "error - random, seed 12: left out, for another fine-tunings"),
    ({"machine": "theirs"}, "error - random, not of one processor: seeds 12")])
def test_pairs_that_cannot_be_compared_are_named(change, said, tmp_path, capsys):
    some = [{**line, **change, "seconds": 9} if line["run"] == "error-12" else {
        **line, "seconds": 2} for line in lines()]
    out = printed(some, tmp_path, capsys)
    assert said in out and (cells(out, "error", "random") is None) == ("left out" in said)
    assert "left out" in said or cells(out, "error", "random")[9] == "1.00"  # of one processor


def test_the_seeds_of_each_number_format_have_their_mean_too(tmp_path, capsys):
    some = [{**line, "dtype": "bfloat16" if line["seed"] < 12 else "float32"} for line in lines()]
    for line in some:
        line["scores"] = [{**entry, "dtype": line["dtype"]} for entry in line["scores"]]
    out = printed(some, tmp_path, capsys)
    assert cells(out, "longer", "random")[1].startswith("+1.67")  # 10 on two seeds of twelve
    assert "longer - random, dtype bfloat16, 2 seeds: +10.00" in out
    assert "longer - random, dtype float32, 10 seeds: +0.00" in out
    assert "dtype" not in printed(lines(), tmp_path, capsys)


def test_a_pair_of_two_teachers_is_left_out_and_each_teacher_has_its_mean(tmp_path, capsys):
    some = [run(arm, seed, right + (seed > 12), teacher_sha256="abc"[seed // 3 - 3] * 64,
                teacher_flops=100) for seed in range(9, 18)
            for arm, right in (("distill", 6), ("entropy-distill", 6 + (seed < 12)))]
    for line in some:
        line["seed"] += 1
        line["run"] = f"{line['arm']}-{line['seed']}"
    out = printed(some, tmp_path, capsys)
    assert "teacher aaaaaaaa, 3 seeds: +10.00" in out and "teacher cccccccc, 3 seeds: +0.00" in out
    some[0]["teacher_sha256"] = "d" * 64
    assert "seed 10: left out, for another teacher" in printed(some, tmp_path, capsys)


def test_a_run_that_diverged_counts_as_its_random_weights(tmp_path, capsys):
    some = [{**line, "finished": False, "scores": []} if line["run"] == "error-21" else line
            for line in lines()]
    out = printed(some, tmp_path, capsys)  # nine of 10, two of 0, and -10
    assert cells(out, "error", "random")[:2] == ["12", "+6.67 [+2.53, +10.81]"]
    assert "error-21 diverged: it counts with the scores of its random weights\n" in out


def test_a_line_of_another_commit_is_refused(tmp_path, monkeypatch, capsys):
    some = lines()
    some[9]["scores"][2]["commit"] = "c1"
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, some)))
    line = refused(["data/results/quality.py", tmp_path / "q.jsonl"], monkeypatch, capsys)
    assert "error-11 is of commit" in line


def test_self_must_differ_from_both_of_its_controls_in_one_direction():
    def found(*differences):
        return {("self", control): {"difference": d, "p_t": p}
                for control, d, p in zip(("random", "longer"), differences, (0.001, 0.02))}

    rest = {("error", "random"): {"difference": 1, "p_t": 0.01},
            ("entropy-distill", "distill"): {"difference": 1, "p_t": 0.5}}
    assert confirm(found(1, 2) | rest) == pytest.approx(
        {"error": 0.03, "self": 0.04, "entropy-distill": 0.5})
    assert confirm(found(1, -2) | rest)["self"] == 1
    assert confirm(found(1) | rest)["self"] == 1  # the other is not full yet


def test_a_difference_is_told_as_steps_where_longer_is_surely_better(tmp_path, capsys):
    """longer gains 10 points on eleven seeds, 6.67 on average less nothing; error 7.5."""
    some = [run("longer", line["seed"], 7 - (line["seed"] == 21), flops=140)
            if line["arm"] == "longer" else line for line in lines()]
    # 9.17 points for 0.487 doublings: 7.5 are worth 2^(0.487 x 7.5 / 9.17) = 1.32 times the steps.
    out = printed(some, tmp_path, capsys)
    said = cells(out, "error", "random")[-1]
    value, low, high = map(float, said.replace("[", "").replace("]", "").replace(",", "").split())
    assert value == pytest.approx(2 ** (0.48687 * 7.5 / 9.16667), abs=0.005)
    assert low < 1.25 < 1.4 < high
    assert cells(out, "longer", "random")[-1] == "-"
    # An arm of fewer seeds: 20 points where longer gains 10 are two of its doublings, 2 to the
    # 0.974th. But longer must be better by those seeds and by all. Then it is not by seed 12; and
    # then by these three alone: 10 points of three, 2.5 of all, with an error of 1.3.
    double = [run("double", seed, 8) for seed in (10, 11, 12)]
    not_by_one = [run("longer", seed, 7 - (seed == 12)) for seed in FIRST]
    of_three = [run("longer", seed, 6 + (seed < 13)) for seed in FIRST]
    for longer, steps in (([], "1.96 [1.96, 1.96]"), (not_by_one, "-"), (of_three, "-")):
        kept = [line for line in some if line["arm"] != "longer" or not longer]
        out = printed([*kept, *longer, *double], tmp_path, capsys)
        assert cells(out, "double", "random")[0] == "3"
        assert cells(out, "double", "random")[-1] == steps
    some = [line for line in some if line["run"] != "longer-21"]  # not full: nothing of it is shown
    assert cells(printed(some, tmp_path, capsys), "error", "random")[-1] == "-"


@pytest.mark.parametrize("best, chosen", [
    ({}, "error-fall"), ({"context": 0.19}, "error-fall"), ({"context": 0.21}, "context-fall"),
    ({"error": -0.5, "self": -0.4, "high": -0.4, "context": -0.4, "vocabulary": -0.4}, "none")])
def test_the_rule_of_the_last_test_is_chosen_by_six_seeds(best, chosen):
    full = {}
    for arm, control in RULES.items():
        full[arm, control] = {seed: tuple(
            {"scores": [{"task": task, "seed": 0, "recipe": quality.RECIPE, "score": score,
                         "parts": dict.fromkeys(TASKS[task].parts, score)} for task in PRIMARY]}
            for score in (60 + best.get(arm, 0.0) + 9 * (seed > 15), 60)) for seed in range(10, 22)}
    assert f"The last test: {chosen}" in quality.choose_last(full)
    if "context" in best and chosen != "none":  # without error the best of the others
        assert "The last test: context-fall" in quality.choose_last(full, ["error"])
    assert "All rules" in quality.choose_last(full, list(RULES))
    del full["high", "longer"]
    assert "when these are full: high - longer" in quality.choose_last(full)
    assert f"The last test: {chosen}" in quality.choose_last(full, ["high"])


@pytest.mark.parametrize("p, difference, smallest, said", [
    (0.04, 4.5, 1.0, "gain"), (0.04, 4.5, 9.0, "gain, too small to matter"),
    (0.04, -4.5, 1.0, "no gain that matters, a loss"), (0.06, 4.5, 1.0, "inconclusive"),
    (0.06, 1.0, 4.5, "inconclusive"), (0.06, 1.0, 4.7, "no gain that matters")])
def test_the_verdict_knows_the_smallest_effect(p, difference, smallest, said, monkeypatch):
    monkeypatch.setattr(quality, "SMALLEST", smallest)
    result = {"difference": difference, "seed_error": 2.0, "seeds": range(12)}
    assert ninety(result) == pytest.approx([difference - 3.592, difference + 3.592], abs=1e-3)
    other = {**result, "difference": 99}  # self: against longer
    found = {("self", "random"): other, ("self", "longer"): result}
    assert verdict("self", found, {"self": p}) == said


def keep(folder, entries, monkeypatch, *flags):
    """quality.py --keep of a run folder, with these scores as glue.py prints them."""
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(json.dumps, entries)) + "\n\n"))
    call(["data/results/quality.py", folder / "q.jsonl", "--keep", folder / "self-3", *flags],
         monkeypatch)


def test_a_run_is_kept_once_and_only_with_all_its_scores(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "self-3", [9.0, 5.0])
    entries = [{**e, "run": name, "correct": "1010", "score": score, "commit": commit()}
               for name, score in (("self-3", 1.0), ("random weights-3", 2.0), ("self-3", 3.0))
               for e in run("self", 3, 7)["scores"]]
    with pytest.raises(SystemExit):
        keep(tmp_path, entries[1:4], monkeypatch)
    assert "self-3 is not kept, since it has no score" in capsys.readouterr().err
    assert not (tmp_path / "q.jsonl").exists()
    keep(tmp_path, entries, monkeypatch)
    keep(tmp_path, entries, monkeypatch)  # it is there already
    ours, weights = map(json.loads, (tmp_path / "q.jsonl").read_text().splitlines())
    assert [e["score"] for e in ours["scores"]] == [3.0] * 4 and ours["scores"][0]["correct"] == "a"
    assert [e["score"] for e in weights["scores"]] == [2.0] * 4 and ours["finished"]
    assert ours["flags"]["mask_rate"] == 0.15 and "corpus" not in ours["flags"]
    ours["commit"] = "of another"
    (tmp_path / "q.jsonl").write_text(json.dumps(ours) + "\n")
    line = refused(["data/results/quality.py", tmp_path / "q.jsonl", "--check"], monkeypatch,
                   capsys)
    assert "is of commit of another, and this of" in line
    (tmp_path / "q.jsonl").unlink()
    with pytest.raises(SystemExit):
        keep(tmp_path, [{**e, "commit": "c1"} for e in entries], monkeypatch)
    assert not (tmp_path / "q.jsonl").exists()
    keep(make_run(tmp_path / "b" / "self-3", [9.0, 5.0]).parent, [], monkeypatch, "--diverged")
    line, = map(json.loads, (tmp_path / "b" / "q.jsonl").read_text().splitlines())
    assert not line["finished"] and not line["scores"]
