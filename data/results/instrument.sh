#!/usr/bin/env bash
# Which recipe of fine-tuning sees most for its time? Random masking against random weights, seeds 0 to 2,
# by two recipes, each at the best of three rates. From the repository's folder:
#
#     CORPUS=FILE GLUE=FOLDER bash data/results/instrument.sh      # SEEDS="0 1 2", JOBS=2, CACHE=FOLDER
#     python -m data.results.instrument                            # the table, with the gate's recipe beside it
#
# It can be killed and started again at any time: what is scored is a line of instrument.jsonl (OUT). Seed 0
# chooses the rates, so it comes first. The rule: the least (P + n c) (s_pre^2 + s_fine^2 / n) / gain^2, where P
# and c are minutes of a pretraining and of each of n fine-tunings, s_pre and s_fine the gain's deviations.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${CORPUS:?}" "${GLUE:?}"
export PYTHON=${PYTHON:-python} RUNS=${RUNS:-runs/instrument} CACHE=${CACHE:-data/cache} CORPUS FLAGS=${FLAGS:-}
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 M="--dtype ${DTYPE:-auto} --threads 1"
ask="-m data.results.instrument ${OUT:-}"
mkdir -p "$RUNS"
todo() { "$PYTHON" $ask --todo ${SEEDS:-0 1 2}; }  # lines: SEED, rate of runs, of random weights, ROWS EPOCHS SEEDS
pretrain() {  # SEED
    local run=$RUNS/random-$1
    if [ -e "$run/model.pt" ]; then return; fi
    if [ -e "$run/config.json" ]; then set -- --resume "$run" --cache "$CACHE"
    else set -- --out "$run" --masking random --seed "$1" --corpus "$CORPUS" --cache "$CACHE" --corpus-tokens 5200000 \
        --steps 10000 --warmup-frac 0.02 --decay-frac 0.125 --eval-every 1000 --checkpoint-every 1000 $M $FLAGS; fi
    "$PYTHON" train.py "$@" >> "$run.txt" 2>&1 || { tail -n 1 "$run.txt" >&2; return 255; }
}
export -f pretrain
first=$(todo)
cut -d" " -f1 <<< "$first" | sort -u | xargs -r -P "${JOBS:-2}" -L 1 bash -c 'pretrain "$@"' pretrain
while lines=$(todo) && [ "$lines" ]; do
    read -r seed lr of_weights rows epochs seeds <<< "$lines"  # the first of them
    [ "$lines" != "${before:-}" ] || { tail -n 1 "$RUNS/glue.txt" >&2; exit 1; }
    before=$lines run=$RUNS/random-$seed
    # A table shows random weights at one rate of their own: here it is this one.
    glue() {
        "$PYTHON" -c "import sys, glue; glue.RATES[True, False] = ($of_weights, $of_weights)
sys.argv[0] = 'glue.py'; glue.main()" "$run" --cache "$RUNS" $M --lr "$lr" --embedding-lr "$lr" --epochs "$epochs" \
            --tasks SST-2,QQP,MNLI,QNLI --max-train "$rows" "$@" 2>> "$RUNS/glue.txt" ||
            { tail -n 1 "$RUNS/glue.txt" >&2; exit 1; }
    }
    glue --glue-dir "$GLUE" --seeds "$seeds" --jobs "${JOBS:-2}" ${FINE:-} >> "$RUNS/glue.txt"
    glue --table --jsonl instrument | "$PYTHON" $ask --keep "$run"
    echo "$(date +%H:%M) seed $seed: $rows rows, $epochs epochs, rates $lr and $of_weights"
done
"$PYTHON" $ask
