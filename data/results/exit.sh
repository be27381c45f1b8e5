#!/usr/bin/env bash
# When does BERT as published, with learned positions, leave the plateau? For a GPU: see gpu.sh, which
# calls this. plan.md, first part. From the repository's folder:
#
#     CORPUS=FILE bash data/results/exit.sh learned
#
# It can be stopped at any time and started again: a finished run is kept as a line of exit.jsonl,
# an interrupted one is resumed. JOBS runs at once, each with one thread (default 2).
set -euo pipefail
cd "$(dirname "$0")/../.."
[ "${1:-}" = learned ] || { echo "bash data/results/exit.sh learned" >&2; exit 2; }
: "${CORPUS:?give the text:  CORPUS=FILE bash data/results/exit.sh learned}"
export CORPUS RUNS=${RUNS:-runs/exit} PYTHON=${PYTHON:-python} OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
mkdir -p "$RUNS"

# One line of the lists below: NAME FLAGS...
train() {
    local name=$1 run=$RUNS/$1
    shift
    if [[ $name != teacher-* ]] && grep -qs "\"run\": \"$name\"" data/results/exit.jsonl; then return; fi
    if [ -e "$run/config.json" ] && [ ! -e "$run/model.pt" ]; then set -- --resume "$run"
    else set -- --out "$run" --corpus "$CORPUS" --threads 1 "$@"; fi
    # Stopped or broken: xargs ends, and nothing is kept. A run that diverged is a result, though.
    [ -e "$run/model.pt" ] || "$PYTHON" train.py "$@" >> "$run.txt" 2>&1 ||
        tail -n 3 "$run.txt" | grep -q "is not finite" || return 255
    if [[ $name != teacher-* ]]; then "$PYTHON" -m data.results.exit --keep "$run" --to exit.jsonl || return 255; fi
    echo "$(date +%H:%M) $name"
}
export -f train
all() { xargs -P "${JOBS:-2}" -L 1 bash -c 'train "$@"' train; }

# The whole text, BERT's positions and initial weights: 60 million tokens a run. FLAGS: of the machine.
M="--device ${DEVICE:-auto} --dtype bfloat16"
L=${LEARNED_STEPS:-29300} every=$((${LEARNED_STEPS:-29300} < 250 ? ${LEARNED_STEPS:-29300} : 250))
for seed in 0 1 2; do
    echo "teacher-$((100 + seed)) --masking random --seed $((100 + seed)) --steps ${TEACHER_STEPS:-2441} $M"
done | all
for seed in 0 1 2; do
    S="--seed $seed --positions learned --init-std 0.02 --lr 1e-3 --decay-frac 0 --steps $L"
    S="$S --warmup-frac $(awk "BEGIN { print ($L > 400 ? 200 / $L : 0.5) }") --eval-every $every --eval-blocks 256"
    # No line may end in a space: xargs would take the next one for its rest.
    S="$S --log-every $every --checkpoint-every 5000 ${FLAGS:-} $M"
    T="--teacher $RUNS/teacher-$((100 + seed))"
    echo "learned-random-$seed --masking random $S"
    echo "learned-high-$seed --masking entropy $T --select high $S"
    echo "learned-distill-$seed --masking random --distill complete $T $S"
done | all
