"""The campaign that shows what people can rely on: real scripts, real faults, nothing lost.

    python -m tests.faults                   # all but the load: half an hour on two cores
    python -m tests.faults --only load       # 1 GB of text, and 20 000 steps: a quarter of an hour
    python -m tests.faults --only kill,text --tries 4

Prints a table (fault, tries, survived, lost, exit statuses) and ends with status 1 if anything was
lost. `Survived` means: a run that goes on ends in the very weights and log of an uninterrupted one;
no finished score is lost or computed again; bad input is refused in one line with status 2; and no
script ever shows a traceback. Random moments come from --seed, but what a kill interrupts depends
on the machine. Small filesystems need root: where they cannot be mounted, that is said.

Here is what happens to a machine; tests/hostile.py has what people and files do.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from data.files import (
    UserError, check_range, progress, read_json, refuse_command, run_script, sha256_file,
)
from data.runs import read_log
from tests import fuzz, hostile
from tests.box import (
    ARMS, GLUE_TASKS, ROOT, can_mount, differs, fill_box, finish, glue, go_on, limit_files,
    not_fine, not_refused, small_disk, start, start_mute, toy,
)
from tests.test_data import write_corpus
from tests.test_download import DATA, SHA, serve

DOWNLOAD = ("import sys; from data import download as D; from data.files import run_script; "
            f"D.TIMEOUT = 1; run_script(lambda: D.download(sys.argv[2:], {len(DATA)}, {SHA!r}, "
            "sys.argv[1]))")
PREPARE = ("import sys; from data.corpus import prepare; from data.files import run_script; "
           "run_script(lambda: prepare(sys.argv[1], 600, sys.argv[2]))")


def wait_for(process, path):
    while process.poll() is None and not path.exists():
        time.sleep(0.005)


def kill_after(process, seconds):
    """kill -9 -> its status: -9, or another one where it was done before."""
    time.sleep(seconds)
    process.kill()
    return process.wait()


# --------------------------------------------------------------------------------------------------
# parts: generators of (fault, what was lost or "", exit status of what met the fault)


def kill(box, tries, rng):
    """kill -9 of train.py, twice in some runs, half of them aimed at the writing of a checkpoint.

    Every arm in turn. Whether half a checkpoint was on the disk is seen afterwards.
    """
    arms = [arm for arm in ARMS if (box / arm).exists()]
    done = 0
    while done < tries:
        arm, aim = arms[done // 2 % len(arms)], done % 2
        run, whole = box / "killed", box / arm
        argv = toy(box, run, *ARMS[arm])
        lasted = (whole / "model.pt").stat().st_mtime - (whole / "config.json").stat().st_mtime
        half = False
        for _ in range(rng.choice([1, 1, 2])):
            process = start_mute(
                ["train.py", "--resume", run] if (run / "config.json").exists() else argv)
            if rng.random() < 0.8:  # else it may also die while it reads its flags and imports
                wait_for(process, run / "log.jsonl")
            seconds = rng.uniform(0, 0.9 * lasted)
            if aim:
                for _ in range(rng.randrange(1, 12)):  # so many checkpoints are let through
                    wait_for(process, run / "checkpoint.pt")
                    while process.poll() is None and not list(run.glob("checkpoint.new.pt*")):
                        pass
                    seconds = rng.uniform(0, 0.002)
            status = kill_after(process, seconds)
            half = half or bool(list(run.glob("checkpoint.new.pt*")))
            if (run / "model.pt").exists():
                break
        if status == -9:
            result = go_on(argv, run)
            lost = differs(run, whole)
            yield ("kill -9 of train.py" + ", half a checkpoint on the disk" * half,
                   lost and f"{arm}: {lost} {result[2][-200:]}", status)
            done += 1
        shutil.rmtree(run, ignore_errors=True)


def kill_glue(box, tries, rng):
    """glue.py, by kill -9 and by signals: what was scored stays, what was not is computed, once."""
    def scores(cache):
        paths = sorted([box / "scored" / "glue.json", *(box / cache).glob("glue/*/glue.json")])
        return [read_json(path)["scores"] for path in paths if path.exists()]

    def same(cache, before=()):
        """Are there all scores, each once, as undisturbed, and those `before` untouched?"""
        after = scores(cache)
        if [[e["task"] for e in entries] for entries in after] != 2 * [list(GLUE_TASKS)]:
            return f"scores of {[[e['task'] for e in entries] for entries in after]}"
        if [[e["parts"] for e in x] for x in after] != [[e["parts"] for e in x] for x in whole]:
            return "other scores"
        kept = sum(entry in after[0] + after[1] for entries in before for entry in entries)
        return "" if kept == sum(map(len, before)) else "finished scores computed again"

    shutil.copytree(box / "random", box / "scored")
    began = time.time()
    result = finish(glue(box, box / "scored", cache="glue-whole"))
    lasted, whole = time.time() - began, scores("glue-whole")
    if lost := not_fine(result) or same("glue-whole"):
        yield "glue.py, undisturbed", lost, result[0]
        return
    kinds = [(signal.SIGKILL, -(-tries // 4)), (signal.SIGINT, -(-tries // 20)),
             (signal.SIGTERM, -(-tries // 20))]
    for number in [number for number, times in kinds for _ in range(times)]:
        while True:
            (box / "scored" / "glue.json").unlink()
            shutil.rmtree(box / "glue-cache", ignore_errors=True)
            argv = glue(box, box / "scored", cache="glue-cache")
            process = start(argv)
            time.sleep(rng.uniform(0.5, 1) * lasted)
            process.send_signal(number)
            _, err = process.communicate()
            if process.returncode != 0:
                break
        before = scores("glue-cache")  # refuses what is half there
        result = finish(argv)
        lost = not_fine(result) or same("glue-cache", before) or (
            err[-300:] if "Traceback" in err else "")
        what = "kill -9" if number == signal.SIGKILL else "SIGINT, SIGTERM"
        yield f"{what} of glue.py", lost, process.returncode


def kill_preparation(box, tries, rng):
    """kill -9 while a corpus is prepared, or a file downloaded."""
    write_corpus(box / "larger.txt", documents=9000)

    def parts(cache):
        return {str(p.relative_to(cache)): sha256_file(p) for p in cache.rglob("*")
                if p.is_file() and p.name != ".lock"}

    began = time.time()
    finish(["-c", PREPARE, box / "larger.txt", box / "whole"])
    lasted, whole, done = time.time() - began, parts(box / "whole"), 0
    while done < -(-tries // 4):
        cache = box / "killed-cache"
        argv = ["-c", PREPARE, box / "larger.txt", cache]
        status = kill_after(start_mute(argv), rng.uniform(0.3, 1) * lasted)
        if status == -9:
            result = finish(argv)
            lost = not_fine(result) or (
                "" if parts(cache) == whole else f"other files: {sorted(parts(cache))}")
            yield "kill -9 while a corpus is prepared", lost, status
            done += 1
        shutil.rmtree(cache, ignore_errors=True)
    for server in serve():
        for i in range(-(-tries // 2)):
            target = box / "downloads" / f"killed-{i}"
            status = kill_after(start_mute(["-c", DOWNLOAD, target, server.url + "slow"]),
                                rng.uniform(0.1, 2))
            lost = "half of it under its name" if target.exists() else ""
            result = finish(["-c", DOWNLOAD, target, server.url + "good"])
            lost = lost or not_fine(result) or (
                "" if target.read_bytes() == DATA else "another file")
            yield "kill -9 of a download", lost, status


def signals(box, tries, rng):
    """SIGINT, SIGTERM, SIGHUP; once: saved after the step; twice: it does not wait."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        for times in [1, 2] * max(1, tries // 24):
            while True:
                run = box / "signalled"
                shutil.rmtree(run, ignore_errors=True)
                argv = toy(box, run, *ARMS["self"])
                process = start(argv)
                wait_for(process, run / "checkpoint.pt")
                time.sleep(rng.uniform(0, 0.2))
                for i in range(times):
                    process.send_signal(number)
                    time.sleep(rng.uniform(0, 0.01))
                out, err = process.communicate()
                if process.returncode != 0:
                    break
            expected = [128 + number] if times == 1 else [128 + number, -number]
            lost = "" if process.returncode in expected and "Traceback" not in err else (
                f"status {process.returncode} {err[-300:]}")
            if times == 1 and f"--resume {run}" not in out:
                lost = lost or "it does not say how to go on"
            result = go_on(argv, run)
            lost = lost or not_fine(result) or differs(run, box / "self")
            yield (f"SIGINT, SIGTERM, SIGHUP of train.py, {'once' if times == 1 else 'twice'}",
                   lost, process.returncode)


def full_disk(box, tries, rng):
    """No more room at any write: a line, status 2, and all goes on when there is room again."""
    sizes = [(box / "random" / name).stat().st_size for name in (
        "checkpoint.pt", "config.json", "tokenizer.model", "model.pt")]
    limits = [size - 1 for size in sizes] + [int(10 ** rng.uniform(1, 6.3)) for _ in range(tries)]
    for limit in limits[:max(4, tries // 4)]:
        run = box / "full"
        argv = toy(box, run, *ARMS["random"])
        result = finish(argv, preexec_fn=limit_files(limit))
        lost = not_fine(result)
        go_on(argv, run)
        yield "full disk: train.py", lost or differs(run, box / "random"), result[0]
        shutil.rmtree(run, ignore_errors=True)
    run = box / "full"
    shutil.copytree(box / "random", run)
    finish(glue(box, run, "--tasks", "CoLA"))
    before = (run / "glue.json").read_bytes()
    result = finish(glue(box, run), preexec_fn=limit_files(len(before) + 20))
    lost = not_refused(result) or (
        "" if (run / "glue.json").read_bytes() == before else "glue.json has changed")
    yield "full disk: glue.py", lost or not_fine(finish(glue(box, run))), result[0]
    for argv in (["-c", PREPARE, box / "text.txt", box / "full-cache"],
                 ["model.py", box / "random", "--export", box / "exported"],
                 ["masking.py", box / "random", "the model reads", "--html", box / "x.html"]):
        result = finish(argv, preexec_fn=limit_files(2000))
        yield ("full disk: preparation, export, page",
               not_refused(result) or not_fine(finish(argv)), result[0])
    for server in serve():
        argv = ["-c", DOWNLOAD, box / "downloads" / "full", server.url + "good"]
        result = finish(argv, preexec_fn=limit_files(100_000))
        yield "full disk: download", not_refused(result) or not_fine(finish(argv)), result[0]


def small_disks(box, tries, rng):
    """A filesystem without room, as it really is: from the start, or in the middle of a run; and
    one that turned read-only."""
    if not can_mount(box):
        print("not tried: small filesystems and read-only folders, this process may not mount",
              file=sys.stderr)
        return
    argv, whole = toy(box, box / "disk" / "run", *ARMS["random"]), box / "random"
    for i in range(max(4, tries // 6)):
        with small_disk(box / "disk", 20_000) as remount:
            run, filler = box / "disk" / "run", box / "disk" / "filler"
            if i % 2:
                filler.write_bytes(bytes((20_000 - rng.randrange(4, 3500)) << 10))
                result = finish(argv)
            else:
                process = start_mute(argv)
                wait_for(process, run / "checkpoint.pt")
                kill_after(process, rng.uniform(0, 0.1))
                free = shutil.disk_usage(box / "disk").free
                filler.write_bytes(bytes(max(0, free - (rng.choice([0, 4, 8, 800, 1600]) << 10))))
                result = finish(["train.py", "--resume", run])
            filler.unlink()
            go_on(argv, run)
            yield ("small filesystem: train.py", not_fine(result) or differs(run, whole),
                   result[0])
        (box / "disk").rmdir()
    with small_disk(box / "disk", 20_000) as remount:
        process = start_mute(argv)
        wait_for(process, run / "checkpoint.pt")
        kill_after(process, 0)
        remount("ro")
        results = [finish(["train.py", "--resume", run]), finish(argv[:-3] + [run.parent / "new"])]
        remount("rw")
        go_on(argv, run)
        remount("ro")
        results.append(finish(glue(box, run)))
        for result in results:
            yield "read-only run folder", not_refused(result) or differs(run, whole), result[0]
    (box / "disk").rmdir()


def folders(box, tries, rng):
    """Two processes on one run folder, and the lock of a dead one."""
    run, whole = box / "shared", box / "random"
    argv = toy(box, run, *ARMS["random"])
    first = start_mute(argv)
    wait_for(first, run / "log.jsonl")
    first.send_signal(signal.SIGSTOP)  # it must not finish in the meantime
    for command in (["train.py", "--resume", run], argv):
        result = finish(command)
        yield "two processes on one run folder", not_refused(result), result[0]
    status = kill_after(first, 0)
    lost = "" if (run / ".lock").exists() else "there was no lock"
    result = finish(["train.py", "--resume", run])
    yield "the lock of a dead process", lost or not_fine(result) or differs(run, whole), status


def checkpoints(box, tries, rng):
    """Checkpoints that are cut, flipped, or of another run: refused, and the one before resumes."""
    whole = box / "random"
    for i in range(max(3, tries // 4)):
        run = box / "damaged"
        shutil.copytree(whole, run)
        (run / "model.pt").unlink()
        newest = run / "checkpoint.pt"
        data = bytearray(newest.read_bytes())
        what = ("with one bit flipped", "cut short", "of another run")[i % 3]
        if i % 3 == 0:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif i % 3 == 1:
            del data[rng.randrange(len(data)):]
        else:
            data = (box / "self" / "checkpoint.pt").read_bytes()
        newest.write_bytes(data)
        result = finish(["train.py", "--resume", run])
        lost = not_refused(result, "checkpoint")
        newest.unlink()  # as the line says: the one before is there
        lost = lost or not_fine(finish(["train.py", "--resume", run])) or differs(run, whole)
        yield f"checkpoint {what}", lost, result[0]
        shutil.rmtree(run)


def not_finite(box, tries, rng):
    """The loss becomes NaN or infinite at a step: status 1, the step is named, and the last good
    checkpoint resumes to the weights of a run in which that never happened."""
    for i in range(max(2, tries // 8)):
        step, value = rng.randrange(1, 60), ("nan", "inf")[i % 2]
        arms = [arm for arm in ARMS if (box / arm).exists()]
        arm = arms[i // 2 % len(arms)]
        source, run = (ROOT / "train.py").read_text(), box / "not-finite"
        line = "            loss = F.nll_loss(log_p, labels)\n"
        assert source.count(line) == 1
        (box / "faulty.py").write_text(source.replace(
            line, line + f"            loss = loss * float('{value}') if step == {step} else loss\n"
        ).replace("__file__", repr(str(ROOT / "train.py"))))
        code = (f"import sys; sys.path[0] = {str(ROOT)!r}; sys.argv = sys.argv[1:]; "
                "exec(compile(open(sys.argv[0]).read(), 'train.py', 'exec'))")
        argv = toy(box, run, *ARMS[arm])
        result = finish(["-c", code, box / "faulty.py", *argv[1:]])
        named = f"not finite at step {step + 1};" in result[2]
        lost = "" if result[0] == 1 and named and "Traceback" not in result[2] else (
            f"step {step + 1}, {value}: status {result[0]} {result[2][-300:]}")
        go_on(argv, run)
        yield "a loss that is NaN or infinite", lost or differs(run, box / arm), result[0]
        shutil.rmtree(run)


def downloads(box, tries, rng):
    """Every way in which a server can fail: never taken for whole, then fetched rightly."""
    for server in serve():
        for what in ("cut", "short", "long", "wrong", "403", "404", "500", "stall", "nowhere"):
            url = "http://127.0.0.1:9/" if what == "nowhere" else server.url + what
            target = box / "downloads" / what
            result = finish(["-c", DOWNLOAD, target, url])
            lost = not_refused(result, str(target)) or (
                "it was taken for whole" if target.exists() else "")
            server.seen.clear()
            again = finish(["-c", DOWNLOAD, target, url, server.url + "moved"])
            if what == "cut" and server.seen[0][1] != f"bytes={len(DATA) // 2}-":
                lost = lost or "it was not resumed"
            lost = lost or not_fine(again) or (
                "" if target.read_bytes() == DATA else "another file")
            yield "a server that fails, then a redirect to one that does not", lost, result[0]


def load(box, tries, rng):
    """A corpus of 1 GB in less than 1.5 GB of memory; 20 000 steps without growth."""
    path = box / "gigabyte.txt"
    words = ["".join(rng.choices("etaoinshrdlucmfw", k=rng.randint(2, 9))) for _ in range(50_000)]
    weights = [1 / (rank + 2.7) for rank in range(len(words))]
    lines = [" ".join(rng.choices(words, weights, k=60)) for _ in range(20_000)]
    with open(path, "w") as f:
        while f.tell() < 1e9:
            rng.shuffle(lines)
            for i in range(0, len(lines), 5):
                f.write("\n".join(lines[i:i + 5]) + "\n\n")
    began = time.time()
    result = finish(["train.py", "--corpus", path, "--cache", box / "cache", "--masking", "random",
                     "--steps", 200, "--threads", "1", "--out", box / "gigabyte"], seconds=3600)
    log = read_log(box / "gigabyte")
    memory = log[-1].get("peak_memory_mb", 1 << 30) if log else 1 << 30  # preparation included
    print(f"1 GB prepared and trained on for 200 steps: {memory} MB at most, "
          f"{time.time() - began:.0f} s", file=sys.stderr)
    lost = not_fine(result) or ("" if memory < 1500 else f"{memory} MB")
    yield f"a corpus of 1 GB, 200 steps: {memory} MB", lost, result[0]
    path.unlink()
    argv = toy(box, box / "long", "--masking", "self", steps=20_000)
    result = finish([*argv, "--eval-every", "1000", "--checkpoint-every", "1000"], seconds=3600)
    log = [line for line in read_log(box / "long") if "tokens_per_s" in line]
    memory = [line["peak_memory_mb"] for line in log if "peak_memory_mb" in line]
    # The self-masked steps, in quarters. The quickest lines of each: others use the machine too.
    log = [line["tokens_per_s"] for line in log if line["step"] > 0.3 * 20_000]
    size = len(log) // 4
    first, *_, last = [sorted(log[i * size:(i + 1) * size])[int(0.9 * size)] for i in range(4)]
    figures = f"{memory[1]} -> {memory[-1]} MB, {first} -> {last} tokens/s"
    lost = not_fine(result)
    if memory[-1] > 1.03 * memory[1] or last < 0.9 * first:
        lost = lost or figures
    yield f"20 000 steps: {figures}", lost, result[0]


PARTS = {"kill": kill, "glue": kill_glue, "preparation": kill_preparation, "signals": signals,
         "disk": full_disk, "small": small_disks, "folders": folders, "checkpoints": checkpoints,
         "loss": not_finite, "downloads": downloads, **hostile.PARTS, "fuzz": fuzz.campaign,
         "load": load}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--tries", type=int, default=50, help="kills of train.py, and more or "
                        "less of the rest (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default 0)")
    parser.error = refuse_command
    a = parser.parse_args()
    check_range(vars(a), "tries", lambda v: v > 0, "above 0")
    names = a.only.split(",") if a.only else [name for name in PARTS if name != "load"]
    if unknown := set(names) - set(PARTS):
        raise UserError(f"--only: there is no part {unknown.pop()}; they are {', '.join(PARTS)}")
    rng, any_lost = random.Random(a.seed), False
    print("| fault | tries | survived | lost | exit statuses |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder, progress(unit=" tries") as bar:
        box = Path(folder) / "box"
        box.mkdir()
        fill_box(box)
        for name in names:
            bar.set_description(name)
            table = {}
            for fault, lost, status in PARTS[name](box, a.tries, rng):
                tries, losses, statuses = table.get(fault, (0, 0, set()))
                table[fault] = (tries + 1, losses + bool(lost), statuses | {str(status)})
                if lost:
                    bar.write(f"LOST {fault}: {lost}", file=sys.stderr)
                bar.update()
            for fault, (tries, losses, statuses) in table.items():
                any_lost = any_lost or losses > 0
                bar.write(f"| {fault} | {tries} | {tries - losses} | {losses} | "
                          f"{', '.join(sorted(statuses))} |", file=sys.stdout)
                sys.stdout.flush()
    sys.exit(any_lost)


if __name__ == "__main__":
    run_script(main)
