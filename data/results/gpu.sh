#!/usr/bin/env bash
# What is asked of one GPU, a quarter of an hour of an H100 in all. From the repository's folder:
#
#     CORPUS=FILE OUT=FOLDER bash data/results/gpu.sh learned    # 9 minutes at most: learned positions (plan.md)
#     OUT=FOLDER bash data/results/gpu.sh bench                  # 4: steps of train.py and of transformers
#
# OUT gets one text file a part, exit.jsonl and the logs of the runs. A part that is through is not
# run again; a run that was interrupted is resumed. Every part has an end: what it had by then stands.
# Without a GPU every part ends at once (DEVICE=cpu: it goes on).
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${OUT:?give a folder for the results:  OUT=FOLDER bash data/results/gpu.sh}"
export PYTHON=${PYTHON:-python3} RUNS=${RUNS:-runs/exit} DEVICE=${DEVICE:-cuda}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)

# NAME SECONDS COMMAND...: its output goes to OUT/NAME.txt; the last line says how it ended.
part() {
    local name=$1 seconds=$2 began=$SECONDS
    shift 2
    [ "$(tail -n 1 "$OUT/$name.txt" 2> /dev/null)" != "ended with 0" ] || return 0
    timeout "$seconds" "$@" > "$OUT/$name.txt" 2>&1
    echo "ended with $?" >> "$OUT/$name.txt"
    echo "$name: $((SECONDS - began)) s, $(tail -n 1 "$OUT/$name.txt")"
}

# Many small runs share a GPU well under NVIDIA's multi-process service, and badly without it.
start_mps() {
    command -v nvidia-cuda-mps-control > /dev/null || return 0
    "$PYTHON" -c "import torch"  # read from the disk once, outside the time limit below
    nvidia-cuda-mps-control -d || return 0
    trap stop_mps EXIT
    timeout 60 "$PYTHON" -c "import torch; torch.ones(1).cuda()" && echo "under MPS" && return
    echo "MPS does not work here: runs will take turns"
    stop_mps
}
stop_mps() {
    trap - EXIT
    command -v nvidia-cuda-mps-control > /dev/null || return 0
    echo quit | timeout 20 nvidia-cuda-mps-control
}

learned() {
    # All cores encode the text before the runs, which have one thread each, ask for it.
    part text 150 "$PYTHON" -c "import os, sys; from data.corpus import prepare
prepare(sys.argv[1], 8192, 'data/cache', os.cpu_count())" "$CORPUS"
    start_mps
    # Without graphs a step of `tiny` is bound by its launches. Nine runs compile at the same time.
    part learned "${LEARNED_SECONDS:-420}" env JOBS="${JOBS:-9}" FLAGS="${FLAGS---compile}" \
        TORCHINDUCTOR_CUDAGRAPHS=1 TORCHINDUCTOR_COMPILE_THREADS=2 bash data/results/exit.sh learned
    stop_mps
    cp data/results/exit.jsonl "$OUT/exit.jsonl"
    tail -n +1 "$RUNS"/learned-*/log.jsonl > "$OUT/logs.txt"  # those of unfinished runs, too
    tail -n 5 "$RUNS"/*.txt > "$OUT/messages.txt"
}

[ $# -gt 0 ] || set -- learned bench
for name in "$@"; do
    case $name in
    learned) : "${CORPUS:?$name reads a text:  CORPUS=FILE OUT=FOLDER bash data/results/gpu.sh $name}" ;;
    bench) ;;
    *) echo "the parts are learned and bench" >&2; exit 2 ;;
    esac
done
for name in "$@"; do
    case $name in
    learned) learned ;;
    # Cases of train.py and of transformers: both have "tra".
    bench) part bench 280 "$PYTHON" -m tests.bench --device "$DEVICE" --rounds 1 --compile --only tra \
        ${BENCH:---size small --vocab-size 30522 --batch-size 256} ;;
    esac
done
