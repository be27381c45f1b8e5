#!/usr/bin/env bash
# Which recipe of fine-tuning sees most for its time? Random masking against random weights, seeds 0 to 2,
# by three recipes, each at the best of three rates. From the repository's folder:
#
#     CORPUS=FILE GLUE=FOLDER bash data/results/instrument.sh      # DTYPE=float32, CACHE=FOLDER, JOBS=2
#
# Started again it goes on. The rule: the least (P + n c) (s_pre^2 + s_fine^2 / n) / gain^2, where P and c are
# minutes of a pretraining and of n fine-tuning seeds each, s_pre and s_fine the deviations of the gain between them.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${CORPUS:?}" "${GLUE:?}"
export PYTHON=${PYTHON:-python} RUNS=${RUNS:-runs/instrument} CACHE=${CACHE:-data/cache} OMP_NUM_THREADS=1
M="--dtype ${DTYPE:-bfloat16} --threads 1"
mkdir -p "$RUNS"
for seed in 0 1 2; do
    run=$RUNS/random-$seed
    if [ -e "$run/model.pt" ]; then continue; fi
    if [ -e "$run/config.json" ]; then set -- --resume "$run" --cache "$CACHE"
    else set -- --out "$run" --masking random --seed $seed --corpus "$CORPUS" --cache "$CACHE" --corpus-tokens 5200000 \
        --steps 10000 --warmup-frac 0.02 --decay-frac 0.125 --eval-every 1000 --checkpoint-every 1000 $M ${FLAGS:-}; fi
    echo "$PYTHON train.py $*"
done | xargs -r -P "${JOBS:-2}" -I{} sh -c "{} >> $RUNS/train.txt 2>&1"
score() {  # LR OF-RANDOM-WEIGHTS MAX-TRAIN EPOCHS SEEDS PRETRAINING-SEEDS...
    local lr=$1 w=$2 n=$3 e=$4 s=$5; shift 5
    "$PYTHON" -c "import sys, glue; glue.RATES[True, False] = ($w, $w); sys.argv[0] = 'glue.py'; glue.main()" \
        $(printf "$RUNS/random-%s " "$@") --lr $lr --embedding-lr $lr --tasks SST-2,QQP,MNLI,QNLI --glue-dir "$GLUE" \
        --cache "$RUNS" --max-train $n --epochs $e --seeds $s $M ${FINE:-} >> "$RUNS/glue.txt" 2>&1
}
for recipe in "${N20:-20000} 1" "${N5:-5000} 3" "${N20:-20000} 3"; do
    for rates in "5e-4 2.5e-4" "1e-3 5e-4" "2e-3 1e-3"; do score $rates $recipe 1 ${SEEDS:-0 1 2}; done
    score 1e-3 5e-4 $recipe 3 0 1 2  # the errors of three fine-tuning seeds; at another best rate: again, with that
done
for rate in 2.5e-4 5e-4 1e-3; do  # a table shows random weights at one rate of their own: ask with each
    "$PYTHON" -c "import sys, glue; glue.RATES[True, False] = ($rate, $rate); sys.argv[0] = 'glue.py'; glue.main()" \
        "$RUNS"/random-? --cache "$RUNS" $M --table --jsonl instrument
done | sort -u > "$RUNS/scores.jsonl"
"$PYTHON" -m data.results.instrument "$RUNS"
