"""The GPU's path against the CPU's. All but one skipped where there is no GPU.

    python -m pytest tests/test_cuda.py -q

Each check is a process of its own, since tests/conftest.py hides the GPU from this one. The first
compares every piece on both devices in float32: `python tests/test_cuda.py cuda`, that is this file
as a script, prints the differences. The rest run the scripts.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
ROUNDING = 2e-5  # float32 sums in another order, relative to the largest number


def compare(device):
    """Run every piece on the CPU and on `device` in float32 -> {piece: relative difference}."""
    import torch.nn.functional as F

    from argparse import Namespace
    from contextlib import nullcontext

    import masking as M
    from data.vocabulary import VocabularyMean
    from model import Bert, Shape
    from train import distillation_loss, evaluate, make_optimizer

    apart = {}

    def note(name, ours, theirs):
        theirs = theirs.to(ours.device)
        scale = ours.abs().max().clamp_min(1e-30) if ours.is_floating_point() else 1
        apart[name] = ((ours - theirs).abs().max() / scale).item()

    tokens = torch.randint(5, 300, (8, 34), generator=torch.Generator().manual_seed(0))
    tokens[:, 0], tokens[:, -1], tokens[2, 9] = 1, 2, 2
    noise = M.draw(0, 3, 8, 34)
    H = torch.rand(8, 34, generator=torch.Generator().manual_seed(1))
    moved = [x.to(device) for x in (tokens, noise, H)]
    for select in M.SELECT:
        for pool in (0, 2):
            ours, theirs = (M.Strategy(table, lambda table, t, places: table.gather(1, places),
                                       M.SELECT[select], pool) for table in (H, moved[2]))
            note(f"choose {select} {pool}", ours(tokens, 5, noise), theirs(moved[0], 5, moved[1]))
    positions = M.Strategy()(tokens, 5, noise)
    inputs = M.corrupt(tokens, positions, noise, 300)
    note("corrupt", inputs, M.corrupt(moved[0], positions.to(device), moved[1], 300))
    labels = tokens.gather(1, positions).flatten()
    attend = torch.arange(34) < torch.arange(20, 36, 2)[:, None]  # (8, 34)
    types = (torch.arange(34) > 15).long().expand(8, -1)

    for kind in ("rotary", "learned"):
        shape = Shape(300, layers=2, width=128, seq_len=34, positions=kind, dropout=0.0)
        results = []
        for where in ("cpu", device):
            torch.manual_seed(0)
            model = Bert(shape).to(where)
            optimizer = make_optimizer(model.parameters(), 1e-3, 0.01)
            t, x, p, y, a, s = (z.to(where) for z in (tokens, inputs, positions, labels, attend,
                                                      types))
            logits = model(x, p)
            full = model.encode(x, None, s, a)
            masked = M.masked(model, t, p)
            mean = VocabularyMean(lambda logits, labels: M.entropies(logits), 0.0, 300,
                                  where)
            mean.see(y, torch.full_like(y, M.MASK), logits.flatten(0, 1))
            mean.learn(Namespace(sum=lambda x: x))
            taught = distillation_loss(logits.flatten(0, 1), logits.flatten(0, 1).roll(1, 0), 2.0)
            with torch.autocast(torch.device(where).type, torch.bfloat16):
                half = F.cross_entropy(model(x, p).flatten(0, 1).float(), y)
            loss = F.cross_entropy(logits.flatten(0, 1), y) + taught
            loss.backward()
            gradients = torch.cat([w.grad.flatten() for w in model.parameters()
                                   if w.grad is not None])
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            evaluated = torch.tensor(list(evaluate(
                model, t, Namespace(autocast=nullcontext)).values()))
            results.append(dict(
                logits=logits, padded=full[a], loss=loss, gradients=gradients,
                entropy=masked, vocabulary=mean.mean, taught=taught, bfloat16=half,
                after=model(x, p), evaluated=evaluated))
        for name, ours in results[0].items():
            note(f"{kind} {name}", ours.detach(), results[1][name].detach())
    return apart


if __name__ == "__main__":  # here, since what follows is of the tests, and may hide the GPU
    print(json.dumps(compare(sys.argv[1])))
    sys.exit()

from data.runs import read_config, read_log  # noqa: E402
from tests.conftest import GPUS  # noqa: E402
from tests.helpers import LABELS, WORDS, command, write_corpus, write_task  # noqa: E402

WITH_GPU = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
WITH_GPU.pop("CUDA_VISIBLE_DEVICES")
if GPUS is not None:
    WITH_GPU["CUDA_VISIBLE_DEVICES"] = GPUS


def run(*argv, status=0):
    """A script in a process that sees the GPU -> its output."""
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, env=WITH_GPU, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == status, done.stdout
    return done.stdout


def has_gpu():
    if torch.version.cuda is None:  # a torch for CPUs alone
        return False
    return run("-c", "import torch; print(torch.cuda.is_available())").strip() == "True"


GLUE_TASKS = ("SST-2", "MNLI", "STS-B")
gpu = pytest.mark.skipif(not has_gpu(), reason="no GPU")


def check(apart):
    for name, distance in apart.items():
        exact = name.startswith(("choose", "corrupt"))
        assert distance <= (0 if exact else 0.01 if "bfloat16" in name else ROUNDING), (
            name, distance)


def test_the_comparison_itself_on_two_equal_devices():
    check(compare("cpu"))


@gpu
def test_every_piece_is_the_same_on_both():
    check(json.loads(run(__file__, "cuda").splitlines()[-1]))


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    box = tmp_path_factory.mktemp("cuda")
    write_corpus(box / "text.txt", documents=300)
    run(*command(box, "teacher", "--masking", "random", "--device", "cpu"))
    return box


def last_loss(folder):
    return read_log(folder)[-1]["val_loss"]


@gpu
@pytest.mark.parametrize("flags", [
    ["--masking", "random"],
    ["--masking", "self", "--score-input", "masked", "--init-frac", "0.3", "--compile",
     "--micro-batch", "4"],
    ["--masking", "self", "--init-frac", "0.2"],
    ["--masking", "entropy", "--distill", "complete", "--teacher"],
], ids=lambda flags: " ".join(flags[1:]).replace("-", ""))
def test_a_run_on_the_gpu_learns_what_it_learns_on_the_cpu(box, tmp_path, flags):
    flags = [*flags, *[box / "teacher"] * ("--teacher" in flags)]
    run(*command(box, tmp_path / "gpu", "--dtype", "auto", *flags))
    start = read_config(tmp_path / "gpu")["starts"][0]
    assert (start["device"], start["dtype"]) == ("cuda", "bfloat16")
    flags = [flag for flag in flags if flag != "--compile"]
    run(*command(box, tmp_path / "cpu", *flags, "--device", "cpu"))
    assert abs(last_loss(tmp_path / "gpu") - last_loss(tmp_path / "cpu")) < 0.1
    assert read_log(tmp_path / "gpu")[-1]["peak_memory_mb"] < 500  # the GPU's, not the process's


@gpu
@pytest.mark.parametrize("freeze", [False, True])
def test_fine_tuning_scores_alike(box, tmp_path, freeze):
    rng = random.Random(0)
    for task in GLUE_TASKS:  # one of two words says which class it is
        rows = [(" ".join(rng.choices(WORDS[9:], k=6) + 2 * WORDS[i % 2:i % 2 + 1]),
                 " ".join(rng.choices(WORDS[9:], k=5)), LABELS[task][i % 2]) for i in range(120)]
        write_task(tmp_path / "GLUE", task, rows, n_dev=40)
    scores = {}
    for device in ("cpu", "cuda"):
        shutil.copytree(box / "teacher", tmp_path / device)
        run("glue.py", tmp_path / device, "--glue-dir", tmp_path / "GLUE", "--cache",
            tmp_path / f"cache-{device}", "--tasks", ",".join(GLUE_TASKS), "--epochs", "6",
            "--threads", "1", "--device", device, *["--dtype", "float32"] * (device == "cpu"),
            *["--freeze"] * freeze)
        kept = json.loads((tmp_path / device / "glue.json").read_text())["scores"]
        scores[device] = {e["task"]: e["score"] for e in kept}
        assert {e["device"] for e in kept} == {device} and len(kept) == len(GLUE_TASKS)
    for task, score in scores["cpu"].items():
        # 40 rows: one is 2.5 points, and bfloat16 turns some; a wrong label or mask would be 50
        assert abs(score - scores["cuda"][task]) < 20, scores
