#!/usr/bin/env bash
# Does any choice of masks make a better model? The runs of plan.md, third part. From the repository's folder:
#
#     SEEDS=0 ARMS="random self" bash data/results/replicate.sh      # what to try first
#     bash data/results/replicate.sh                                 # all that is planned: days of two cores
#     python -m data.results.quality runs/replicate/quality.jsonl    # the table and the picture of either
#
# It can be killed and started again at any time and repeats nothing: a finished run is a line of OUT,
# an interrupted one is resumed, every score is kept at once. What it may be given, as NAME=VALUE before it:
#
#     DRY=1         only print the commands, and how long they take by a few steps of each arm
#     SEEDS, ARMS   numbers and names from the lists below (default: as planned, in the plan's order)
#     JOBS          runs at a time, each with one thread (2)
#     CORPUS, GLUE  a text; a folder with GLUE's files (default: WikiText-103 and the official files, downloaded)
#     DTYPE         the number format of seeds that have no run yet (auto: bfloat16 where the machine has it);
#                   later runs of a seed, and its scores, have that of its first
#     MOON=RULE     the last test of the plan, by the rule that quality.py names: error, self, ...
#     RUNS, CACHE, OUT, PYTHON    folders, the file with the lines, and the program. Where RUNS may go, put OUT
#                   elsewhere and keep RUNS/glue (scores of random weights) and RUNS/teacher-*/model.pt beside it
#     FLAGS, FINE   more flags for train.py and for glue.py, as a test of this script has
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHON=${PYTHON:-python} CORPUS=${CORPUS:-wikitext103} GLUE=${GLUE:-}
export DRY=${DRY:-} FLAGS=${FLAGS:-} FINE=${FINE:-} RUNS=${RUNS:-runs/replicate} CACHE=${CACHE:-data/cache}
export OUT=${OUT:-$RUNS/quality.jsonl} DTYPE=${DTYPE:-auto}
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1  # what is printed last stands last in a file, too
[ "$DRY" ] || mkdir -p "$RUNS"

# ARM SEED -> flags, an array: how the arm differs from random masking. The steps of `longer` have the FLOPs
# of self, those of the falling rates the FLOPs of random: train.py --flops-of RUN, of 10 000 steps.
set_flags() {
    local own="--masking self --pool 2 --init-frac 0.15"
    local entropy="--masking entropy --score-input masked --select mix --pool 2 --init-frac 0.15"
    local teacher=(--teacher "$RUNS/teacher-$((($2 + 2) / 3))")  # one for three seeds
    local falling="--mask-rate 0.3 --mask-rate-end 0.15 --steps"
    case $1 in
    self-fall | high-fall | context-fall) set_flags "${1%-*}" "$2" && flags+=($falling 5864 $FLAGS) && return ;;
    *-fall) set_flags "${1%-*}" "$2" && flags+=($falling 8297 $FLAGS) && return ;;
    *-1.6M) set_flags "${1%-*}" "$2" && flags+=(--corpus-tokens 1600000 $FLAGS) && return ;;
    *-25.8M) set_flags "${1%-*}" "$2" && flags+=(--corpus-tokens 25800000 $FLAGS) && return ;;
    *-rate30) set_flags "${1%-*}" "$2" && flags+=(--mask-rate 0.3 $FLAGS) && return ;;
    teacher) flags=(--masking random --size wide --corpus-tokens 0 --steps 20000 --seed $((100 + $2))) ;;
    random) flags=(--masking random) ;;
    longer) flags=(--masking random --steps 14014) ;;
    double) flags=(--masking random --steps 20000) ;;
    self) flags=($own --score-input masked --select mix) ;;
    high | low) flags=($own --score-input masked --select "$1") ;;
    error) flags=($own --score-input error --select sample) ;;
    vocabulary | context) flags=($own --score-input "$1" --select mix) ;;
    literal) flags=(--masking self --pool 0 --init-frac 0.15 --score-input unmasked --select high) ;;
    fall) flags=(--masking random $falling 8297) ;;
    distill) flags=(--masking random --distill complete "${teacher[@]}") ;;
    entropy) flags=($entropy "${teacher[@]}") ;;
    entropy-distill) flags=($entropy --distill complete "${teacher[@]}") ;;
    static) flags=(--masking random --static) ;;
    redrawn) flags=(--masking random --select sample) ;;  # A/A: other masks, the same weights and order
    *) echo "ARMS: there is no arm $1" >&2 && exit 2 ;;
    esac
    flags=(--seed "$2" --corpus "$CORPUS" --corpus-tokens 5200000 --steps 10000 --warmup-frac 0.02 --decay-frac 0.125
        --eval-every 1000 --checkpoint-every 1000 --cache "$CACHE" $(machine "$2") "${flags[@]}" $FLAGS)
}

machine() {  # SEED -> flags of both scripts. The two runs of a pair must have one number format.
    local kept=$(grep -sm 1 "^{\"run\": \"[^\"]*-$1\"" "$OUT" | cat - "$RUNS"/*-"$1"/config.json 2> /dev/null |
        grep -o '"dtype": "[a-z0-9]*"' | head -n 1 | cut -d'"' -f4)
    echo "--dtype ${kept:-$DTYPE} --threads 1"
}

scorings() {  # SEED -> a line of glue.py's flags for each recipe
    local four=SST-2,QQP,MNLI,QNLI
    echo "--tasks $four,STS-B --max-train 5000 --epochs 3 --seeds 3"
    echo "--tasks $four --freeze"
    if [[ $1 =~ ^1[012]$ ]]; then echo "--tasks $four --epochs 3"; fi
}

say() {  # COMMAND...: run it, its output in $run.txt; with DRY only print it
    if [ "$DRY" ]; then printf "%q " "$@" && echo; else "$@" >> "${to:-$run.txt}" 2>> "$run.txt"; fi
}

one() {  # ARM SEED: pretrain, fine-tune, keep
    local name=${1-}-${2-} run=$RUNS/${1-}-${2-} flags scoring scores= diverged=
    if [ $# = 0 ] || grep -qs "\"run\": \"$name\"" "$OUT"; then return; fi
    set_flags "$1" "$2"
    if [ -e "$run/config.json" ]; then flags=(--resume "$run" --cache "$CACHE"); else flags+=(--out "$run"); fi
    [ -e "$run/model.pt" ] || say "$PYTHON" train.py "${flags[@]}" || broken
    # Scores of random weights are kept in RUNS: those of other recipes, elsewhere, are not taken for them.
    if [ "$1" != teacher ] && [ -z "$diverged" ]; then
        while read -r scoring; do  # no table of it is kept: one of `random` shows random weights against it
            to=/dev/null say "$PYTHON" glue.py "$run" --glue-dir "$GLUE" --cache "$RUNS" $(machine "$2") $scoring \
                $FINE < /dev/null || broken
        done < <(scorings "$2")
    fi
    if [ "$DRY" ]; then measure "$1" "$2" && return; fi
    if [ "$1" = teacher ]; then return; fi
    [ "$diverged" ] || scores=$("$PYTHON" glue.py "$run" --cache "$RUNS" $(machine "$2") --table --jsonl replicate \
        2>> "$run.txt") || stop
    "$PYTHON" -m data.results.quality "$OUT" --keep "$run" $diverged <<< "$scores" 2>> "$run.txt" || stop
    echo "$(date +%H:%M) $name"
}
stop() {  # xargs starts no other run
    tail -n 1 "$run.txt" >&2
    exit 255
}
broken() {  # nothing is kept; but if it diverged, or a fine-tuning of it, that is a result
    tail -n 3 "$run.txt" | grep -q -e "gradient is not finite" -e "error: $name, .*is not finite" || stop
    diverged=--diverged
}

# ARM SEED: add to the file `minutes` what it takes, by 20 steps. Its fine-tuning is taken to be as long as the
# pretraining of `random`: about so it is.
measure() {
    local finished=$RUNS/$1-$2/model.pt RUNS=$MEASURED run=$MEASURED/$1-$2 flags steps
    for arm in random "$1"; do
        if [ -e "$MEASURED/$arm" ]; then  # of a teacher another seed's will do
            [ "$arm" != teacher ] || ln -sfn "$(ls -d "$MEASURED"/teacher-? | head -n 1)" "$MEASURED/teacher-$2"
            continue
        fi
        run=$MEASURED/$arm-$2
        set_flags "$arm" "$2"
        steps=$(sed 's/.*--steps \([0-9]*\).*/\1/' <<< "${flags[*]}")  # the last one counts
        "$PYTHON" train.py "${flags[@]}" --out "$run" --steps 20 --eval-every 0 --eval-blocks 2 > "$run.txt" 2>&1 ||
            stop
        tail -n 1 "$run/log.jsonl" | sed 's/.*"seconds": \([0-9.]*\).*/\1/' |
            awk "{ print \$1 / 20 * $steps / 60 }" > "$MEASURED/$arm"
    done
    [ -e "$finished" ] || cat "$MEASURED/$1" >> "$MEASURED/minutes"
    [ "$1" = teacher ] || cat "$MEASURED/random" >> "$MEASURED/minutes"
    echo "\"run\": \"$1-$2\"" >> "$OUT"  # a copy: no run is told twice
}
export -f set_flags machine scorings say one stop broken measure

asked() { [ -z "${ARMS:-}" ] || [[ " $ARMS " == *" $1 "* ]]; }
all() { xargs -P "$JOBS" -L 1 bash -c 'one "$@"' one; }
stage() {  # "ARMS" SEEDS...: what is asked for of these, seed by seed
    local arms=$1 arm seed
    shift
    for seed in ${SEEDS:-$*}; do
        for arm in $arms; do if asked "$arm"; then echo "$arm $seed"; fi; done
    done | all
}
first() {  # SEEDS...: the arms of the first test, random a seed ahead: random weights are scored with it
    local arm seed before=
    for seed in "$@" end; do
        if [ "$seed" != end ] && asked random; then echo "random $seed"; fi
        for arm in longer self error fall; do if [ "$before" ] && asked "$arm"; then echo "$arm $before"; fi; done
        before=$seed
    done | all
}
teachers() {  # SEEDS...: the teachers of what is not there yet
    local arm seed
    for seed in ${SEEDS:-$*}; do
        for arm in distill entropy-distill entropy; do
            if asked "$arm" && ! grep -qs "\"run\": \"$arm-$seed\"" "$OUT" && { [ "$arm" != entropy ] ||
                [ "${ARMS:-}" ] || [ "$seed" -le 12 ]; }; then echo "teacher $(((seed + 2) / 3))"; fi
        done
    done | sort -u | all
}

for arm in ${ARMS:-} ${MOON:+$(printf "%s-fall " $MOON)}; do  # is there such an arm?
    set_flags "$arm" 0
    if [ "$arm" = teacher ] || { [[ $arm == *-fall ]] && [[ " ${MOON:-} " != *" ${arm%-fall} "* ]]; }; then
        echo "ARMS: $arm is made where it is needed: teachers for distill, RULE-fall with MOON=RULE" >&2 && exit 2
    fi
done
JOBS=${JOBS:-2} at_once=${JOBS:-2}
if [ "$DRY" ]; then
    JOBS=1 MEASURED=$(mktemp -d)
    export MEASURED
    trap 'rm -rf "$MEASURED"' EXIT
    : > "$MEASURED/minutes"
    if [ -e "$OUT" ]; then cp "$OUT" "$MEASURED/quality.jsonl"; fi
    OUT=$MEASURED/quality.jsonl
fi
if [ -s "$OUT" ] && [ -z "$DRY" ]; then "$PYTHON" -m data.results.quality "$OUT" --check; fi
first ${SEEDS:-$(echo {10..21})}
teachers {10..18}
stage "distill entropy-distill" {10..18}
stage "vocabulary context high low redrawn" {10..15}
stage "entropy static literal double" {10..12}
for rule in ${MOON:-${DRY:+error}}; do stage "fall $rule-fall" {22..33}; done
for other in 1.6M 25.8M rate30; do stage "random-$other self-$other" {10..12}; done  # the text, the rate
if [ "$DRY" ]; then
    awk "{ sum += \$1 / $at_once } END { printf \"about %d h %02d min, $at_once at a time\n\", sum / 60, sum % 60 }" \
        "$MEASURED/minutes" >&2
fi
