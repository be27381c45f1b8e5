#!/usr/bin/env bash
# From which budget on is pretraining worth 1.5 points and three joint errors? Random masking alone,
# against random weights. From the repository's folder:
#
#     CORPUS=FILE GLUE=FOLDER bash data/results/gate.sh          # 20, 41 and 82 million tokens
#     CORPUS=FILE GLUE=FOLDER bash data/results/gate.sh 10000    # one budget, in steps
#
# It can be stopped at any time and started again: runs go on where they were, scores are kept in
# the run folders. JOBS runs at once, each with one thread (default 2).
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${CORPUS:?give the text}" "${GLUE:?give the folder with the GLUE files}"
export CORPUS GLUE RUNS=${RUNS:-runs/gate} PYTHON=${PYTHON:-python} OMP_NUM_THREADS=1
export FINE="--glue-dir $GLUE --tasks SST-2,QQP,MNLI,QNLI --seeds 2 --threads 1 --dtype bfloat16 ${MORE:-}"
mkdir -p "$RUNS"

one() {  # STEPS SEED: pretrain and fine-tune
    local run=$RUNS/random-$1-$2 warmup=$(awk "BEGIN { print 200 / $1 }")
    if [ -e "$run/config.json" ] && [ ! -e "$run/model.pt" ]; then set -- --resume "$run"
    else set -- --out "$run" --masking random --steps "$1" --seed "$2" --corpus "$CORPUS" \
        --corpus-tokens 5200000 --warmup-frac "$warmup" --decay-frac 0.125 --eval-every 1000 \
        --checkpoint-every 1000 --dtype bfloat16 --threads 1; fi
    { [ -e "$run/model.pt" ] || "$PYTHON" train.py "$@"; } >> "$run.txt" 2>&1 &&
        "$PYTHON" glue.py "$run" $FINE >> "$run.txt" 2>&1 ||
        { tail -n 1 "$run.txt" >&2; return 255; }  # xargs ends
    echo "$(date +%H:%M) $run"
}
export -f one

for steps in ${*:-10000 20000 40000}; do
    printf "$steps %s\n" 0 1 2 | xargs -P "${JOBS:-2}" -L 1 bash -c 'one "$@"' one
    "$PYTHON" glue.py "$RUNS/random-$steps"-? $FINE --table --baseline "random-$steps"
done
