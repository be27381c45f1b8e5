#!/usr/bin/env bash
# What is asked of one GPU, in some twelve minutes of an H100. From the repository's folder:
#
#     CORPUS=FILE OUT=FOLDER bash data/results/gpu.sh            # all parts
#     CORPUS=FILE OUT=FOLDER bash data/results/gpu.sh learned    # 7 minutes: learned positions (plan.md)
#     OUT=FOLDER bash data/results/gpu.sh profile bench          # 5 minutes: where a step's time goes
#     CORPUS=FILE OUT=FOLDER bash data/results/gpu.sh race       # 2 minutes: time to a loss, us and BERT
#
# OUT gets one text file a part, exit.jsonl and the logs of the runs. A part that is through is not
# run again; a run that was interrupted is resumed. Every part has an end: what it had by then stands.
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${OUT:?give a folder for the results:  OUT=FOLDER bash data/results/gpu.sh}"
export PYTHON=${PYTHON:-python} RUNS=${RUNS:-runs/exit}
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
    nvidia-cuda-mps-control -d || return 0
    trap stop_mps EXIT
    timeout 60 "$PYTHON" -c "import torch; torch.ones(1).cuda()" || stop_mps  # it does not work here
}
stop_mps() {
    trap - EXIT
    command -v nvidia-cuda-mps-control > /dev/null || return 0
    echo quit | timeout 20 nvidia-cuda-mps-control
}

learned() {
    start_mps
    # Without graphs a step of `tiny` is bound by its launches.
    part learned "${LEARNED_SECONDS:-460}" env JOBS="${JOBS:-9}" FLAGS="${FLAGS---compile}" \
        TORCHINDUCTOR_CUDAGRAPHS=1 bash data/results/exit.sh learned
    stop_mps
    cp data/results/exit.jsonl "$OUT/exit.jsonl"
    tail -n +1 "$RUNS"/learned-*/log.jsonl > "$OUT/logs.txt"  # those of unfinished runs, too
    tail -n 5 "$RUNS"/*.txt > "$OUT/messages.txt"
}

for name in "${@:-learned profile bench race}"; do
    for each in $name; do
        case $each in
        learned) learned ;;
        profile) part profile 300 "$PYTHON" -m tests.profiling --seconds 240 ${PROFILE:-} ;;
        # Cases of train.py and of transformers: both have "tra".
        bench) part bench 150 "$PYTHON" -m tests.bench --rounds 1 --compile --only tra \
            ${BENCH:---size small --vocab-size 30522 --batch-size 256} ;;
        race) part race 150 "$PYTHON" -m tests.race --corpus "$CORPUS" ${RACE:-} ;;
        *) echo "the parts are learned, profile, bench and race" >&2; exit 2 ;;
        esac
    done
done
