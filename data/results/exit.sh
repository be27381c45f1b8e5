#!/usr/bin/env bash
# When does a model leave the plateau? The runs of plan.md, first part. From the repository's folder:
#
#     CORPUS=FILE bash data/results/exit.sh text    # random masking, three texts, seeds 0 to 2
#     CORPUS=FILE bash data/results/exit.sh arms    # all arms, on the text that `text` chose
#     CORPUS=FILE bash data/results/exit.sh learned # BERT as published, for a GPU: see gpu.sh
#     python -m data.results.exit                   # the table and the pictures
#
# The runs of exit.jsonl can be repeated as they were at commit 4b704f6: there `high-unmasked` asks its
# teacher once, which gives the same losses, and `rise` is an arm.
#
# It can be stopped at any time and started again: a finished run is kept as a line of exit.jsonl,
# an interrupted one is resumed. JOBS runs at once, each with one thread (default 2).
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${CORPUS:?give the text:  CORPUS=FILE bash data/results/exit.sh text}"
export CORPUS RUNS=${RUNS:-runs/exit} PYTHON=${PYTHON:-python} OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
TOKENS=${TOKENS:-200000} STEPS=${STEPS:-2130}  # the text and the budget that `text` gave
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

shared() {  # STEPS -> the flags of all arms
    echo "--local-start 0 --lr 3e-3 --decay-frac 0 --steps $1 --warmup-frac $(awk "BEGIN { print 200 / $1 }")" \
        "--eval-every 25 --eval-blocks 256 --log-every 25 --checkpoint-every 500 --dtype bfloat16"
}

case ${1:-} in
text)
    for tokens in 200000 500000 1000000; do
        for seed in 0 1 2; do
            echo "text-$tokens-$seed --masking random --seed $seed --corpus-tokens $tokens $(shared 1000)"
        done
    done | all ;;
arms)
    # The arms of one seed follow one another, so that whatever stops, whole seeds stand.
    for seed in $(seq 10 18) $(seq 0 2); do
        S="--seed $seed --corpus-tokens $TOKENS $(shared "$STEPS")"
        T="--teacher $RUNS/teacher-$((100 + seed))"
        {
            echo "teacher-$((100 + seed)) --masking random --seed $((100 + seed)) --steps 2441 --dtype bfloat16"
            echo "random-$seed --masking random $S"
        } | all
        {
            if [ "$seed" -ge 10 ]; then
                echo "high-$seed --masking entropy $T --select high $S"
                echo "static-$seed --masking random --static $S"
                echo "distill-$seed --masking random --distill complete $T $S"
            else
                echo "low-$seed --masking entropy $T --select low $S"
                echo "high-unmasked-$seed --masking entropy $T --select high --score-input unmasked --pool 0 $S"
                echo "random-30-$seed --masking random --mask-rate 0.3 $S"
                echo "self-high-$seed --masking self --select high --score-input masked --init-frac 0 $S"
                echo "self-unmasked-$seed --masking self --select high --score-input unmasked --pool 0 --init-frac 0 $S"
                echo "self-unmasked-init-$seed --masking self --select high --score-input unmasked --pool 0 --init-frac 0.15 $S"
            fi
        } | all
    done ;;
learned)
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
    done | all ;;
*) echo "bash data/results/exit.sh text, arms or learned" >&2; exit 2 ;;
esac
