#!/usr/bin/env bash
# When does the use of context begin? The runs of plan.md, second part. From the repository's folder:
#
#     CORPUS=FILE bash data/results/onset.sh       # SEEDS="30 31 ...", JOBS=2, CACHE=FOLDER
#     python -m data.results.exit                  # the tables and the pictures
#
# It can be stopped at any time and started again: a finished run is kept as a line of onset.jsonl,
# an interrupted one is resumed. JOBS runs at once, each with one thread (default 2).
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${CORPUS:?give the text:  CORPUS=FILE bash data/results/onset.sh}"
export CORPUS RUNS=${RUNS:-runs/onset} CACHE=${CACHE:-data/cache} PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
mkdir -p "$RUNS"

train() {  # NAME FLAGS...
    local name=$1 run=$RUNS/$1
    shift
    if grep -qs "\"run\": \"$name\"" data/results/onset.jsonl; then return; fi
    if [ -e "$run/config.json" ] && [ ! -e "$run/model.pt" ]; then set -- --resume "$run" --cache "$CACHE"
    else set -- --out "$run" --corpus "$CORPUS" --cache "$CACHE" --dtype float32 --threads 1 "$@"; fi
    # Stopped or broken: xargs ends, and nothing is kept. A run that diverged is a result, though.
    [ -e "$run/model.pt" ] || "$PYTHON" train.py "$@" >> "$run.txt" 2>&1 ||
        tail -n 3 "$run.txt" | grep -q "is not finite" || return 255
    [[ $name == *teacher-* ]] || "$PYTHON" -m data.results.exit --keep "$run" --to onset.jsonl || return 255
    echo "$(date +%H:%M) $name"
}
export -f train
all() { xargs -P "${JOBS:-2}" -L 1 bash -c 'train "$@"' train; }
arm() {  # STEPS -> the flags of all arms
    echo "--local-start 0 --lr 3e-3 --decay-frac 0 --steps $1 --warmup-frac $(awk "BEGIN { print 200 / $1 }")" \
        "--eval-every 25 --eval-blocks 256 --log-every 25 --checkpoint-every 500"
}

for seed in ${SEEDS:-30 31 32 33 34 35 36 37 38}; do
    once="--seed $seed --corpus-tokens 4300000" small="--seed $seed --corpus-tokens 200000"
    teacher="--masking random --steps 2441 --seed $((100 + seed))"
    T="--teacher $RUNS/teacher-$((100 + seed))" C="--teacher $RUNS/control-teacher-$((100 + seed))"
    {
        echo "teacher-$((100 + seed)) $teacher"
        echo "control-teacher-$((100 + seed)) $teacher --corpus-tokens 4300000"
        echo "random-$seed --masking random $once $(arm 1000)"
        echo "small-random-$seed --masking random $small $(arm 600)"
        echo "small-static-$seed --masking random --static $small $(arm 600)"
    } | all
    {
        echo "high-$seed --masking entropy $T --select high --score-input masked --pool 2 $once $(arm 2130)"
        echo "distill-$seed --masking random --distill complete $T $once $(arm 1000)"
        echo "distill-control-$seed --masking random --distill complete $C $once $(arm 1000)"
    } | all
done
