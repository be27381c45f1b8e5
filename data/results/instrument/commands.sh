# What made the files of this folder. FILE: real English, 100 MB; GLUE: a folder in the official layout.
# The *.jsonl named after runs are the evaluations of their logs. Run from the repository's folder.
# Before the fifth part glue.py had one rate for all: today that is  --embedding-lr  with the value of --lr.

# ---- first part: 15 % masked; fine-tuning at --lr 3e-4, the mean over all tokens
T="python train.py --corpus FILE --dropout 0 --eval-every 500 --checkpoint-every 1000 --threads 1"
R="$T --masking random"
$R --steps 2000 --warmup-frac 0.1 --decay-frac 0 --out runs/trunk-4M
$R --steps 4000 --warmup-frac 0.05 --decay-frac 0 --begin-from runs/trunk-4M --out runs/trunk-8M
$R --steps 8000 --warmup-frac 0.025 --decay-frac 0 --begin-from runs/trunk-8M --out runs/trunk-16M
$R --steps 2500 --decay-frac 0.2 --begin-from runs/trunk-4M --out runs/random-5M
$R --steps 5000 --decay-frac 0.2 --begin-from runs/trunk-8M --out runs/random-10M
$R --steps 10000 --decay-frac 0.2 --begin-from runs/trunk-16M --out runs/random-20M
$T --masking self --steps 10000 --warmup-frac 0.02 --decay-frac 0.2 --out runs/self-20M

G="python glue.py --glue-dir GLUE --threads 1 --lr 3e-4 --pool-output mean"
S="$G runs/random-10M --tasks CoLA,SST-2,STS-B,QNLI --max-train 5000"      # search.json
$G runs/random-10M --max-train 20000 --tasks SST-2,QQP,MNLI,QNLI,STS-B       # scores.json, too
$S
$S --lr 1e-3
$S --epochs 6
$S --pool-output cls
$G runs/random-20M runs/self-20M --max-train 20000                         # scores.json
$G runs/random-5M --max-train 20000 --tasks SST-2,QQP,MNLI,QNLI,STS-B        # stopped after two tasks
# scores-5000-rows.json; the second of these was stopped after two tasks
$G runs/random-5M --tasks SST-2,STS-B,QNLI,MNLI --max-train 5000
$G runs/random-5M --tasks SST-2,STS-B,QNLI,MNLI --max-train 5000 --lr 1e-3
$G runs/random-20M --tasks SST-2 --max-train 5000 --seeds 3
$G runs/random-* --max-train 20000 --table --json > scores-table.json
python -m data.curve scores-table.json curve.svg

# ---- second part: screening of pretraining, two runs at a time, one thread each
N="$R --steps 2500 --warmup-frac 0.08 --decay-frac 0.2"     # against trunk-4M and random-5M
$N --weight-decay 0.1 --out runs/weight-decay-0.1
# These need:  git apply data/results/instrument/local-start.patch
LOCAL=layer0 $N --out runs/local-first-layer
LOCAL=half $N --out runs/local-half-of-the-heads
LOCAL=match $N --out runs/local-and-tied-head      # and query = key weights in one head of the last
LOCAL=layer0 $R --steps 4000 --warmup-frac 0.05 --decay-frac 0 --mask-rate 0.3 --out runs/rate30-local-first-layer    # stopped
$R --steps 1500 --warmup-frac 0.1333334 --decay-frac 0 --mask-rate 0.5 --out runs/rate50-3M    # stopped

# ---- third part: 30 % masked
M="$R --mask-rate 0.3"
$M --steps 2000 --warmup-frac 0.1 --decay-frac 0 --out runs/rate30-4M
$M --steps 4000 --warmup-frac 0.05 --decay-frac 0 --begin-from runs/rate30-4M --out runs/rate30-8M
$M --steps 8000 --warmup-frac 0.025 --decay-frac 0 --begin-from runs/rate30-8M --out runs/rate30-16M
$M --steps 16000 --warmup-frac 0.0125 --decay-frac 0 --begin-from runs/rate30-16M --out runs/rate30-32M
$M --steps 2500 --warmup-frac 0.08 --decay-frac 0.2 --begin-from runs/rate30-4M --out runs/rate30-5M
$M --steps 10000 --warmup-frac 0.02 --decay-frac 0.2 --begin-from runs/rate30-16M --out runs/rate30-20M
$M --steps 20000 --warmup-frac 0.01 --decay-frac 0.2 --begin-from runs/rate30-32M --out runs/rate30-40M
for s in 1 2 3 4; do $M --seed $s --steps 2500 --warmup-frac 0.08 --decay-frac 0.2 --out runs/rate30-5M-s$s; done

# ---- the fine-tuning recipe: recipe.jsonl. Accuracies (STS-B: Spearman), of at most 2000 rows of a development set; made by
# a loop over glue.fine_tune, of which this is the meaning. "mean of the layers" was a change that is not kept.
for lr in 3e-4 1e-3 2e-3 4e-3; do
    python glue.py --glue-dir GLUE --threads 1 runs/random-20M --tasks SST-2,QQP --max-train 2000 --epochs 4 --pool-output mean --lr $lr --parts
done
for p in mean pair; do
    python glue.py --glue-dir GLUE --threads 1 runs/random-20M --tasks SST-2,QQP,MNLI,QNLI,STS-B --max-train 5000 --pool-output $p --parts
done

# ---- the curve and the noise: scores-pair.json, curve-pair.svg
P="python glue.py --glue-dir GLUE --threads 1 --max-train 5000 --lr 1e-3"    # --pool-output pair is the default; --lr: for random weights, too
for r in rate30-5M rate30-20M rate30-40M rate30-5M-s1 rate30-5M-s2 rate30-5M-s3 rate30-5M-s4; do
    $P runs/$r --tasks SST-2,QQP,MNLI,QNLI,STS-B --seeds 2
done
$P runs/rate30-40M --tasks SST-2,QQP,MNLI,QNLI --lr 2e-3
$P runs/rate30-40M --tasks SST-2 --lr 3e-3
$P runs/rate30-40M --tasks SST-2,QQP,MNLI,QNLI,STS-B --freeze --lr 3e-3
for r in rate30-5M rate30-40M; do python -m data.reach runs/$r; done    # reach.txt
python glue.py runs/rate30-5M runs/rate30-20M runs/rate30-40M --max-train 5000 --tasks SST-2,QQP,MNLI,QNLI,STS-B --table --json > curve.json
python -m data.curve curve.json data/results/instrument/curve-pair.svg

# ---- fourth part, 2026-11-25: bfloat16 on the CPU, a longer curve, a second shape; two runs at a time, one thread each
B="$M --dtype bfloat16"
$B --steps 2500 --warmup-frac 0.08 --decay-frac 0.2 --out runs/bf16-5M
$B --eval-every 1000 --steps 32000 --warmup-frac 0.00625 --decay-frac 0 --out runs/bf16-64M
$B --eval-every 1000 --steps 40000 --warmup-frac 0.005 --decay-frac 0.2 --begin-from runs/bf16-64M --out runs/bf16-80M
for lr in 1e-3 2e-3; do    # with torch's fused attention; 3e-3 was run alike
    $B --size mini --lr $lr --eval-every 100 --steps 400 --warmup-frac 0.375 --decay-frac 0 --out runs/mini-lr-$lr
done
S="$B --size mini --lr 1e-3"
$S --steps 2000 --warmup-frac 0.1 --decay-frac 0 --out runs/mini-4M
$S --steps 8000 --warmup-frac 0.025 --decay-frac 0 --begin-from runs/mini-4M --out runs/mini-16M
$S --steps 12000 --warmup-frac 0.0166667 --decay-frac 0 --begin-from runs/mini-16M --out runs/mini-24M
$S --steps 15000 --warmup-frac 0.0133333 --decay-frac 0.2 --begin-from runs/mini-24M --out runs/mini-30M
# scores-bf16.json
P="$P --dtype bfloat16 --tasks SST-2,QQP,MNLI,QNLI,STS-B"
$P runs/bf16-80M --seeds 3
$P runs/bf16-80M --seeds 2 --lr 2e-3    # the second seed of random weights was stopped before QNLI
$P runs/mini-30M --lr 1e-3
$P runs/mini-30M --lr 3e-4
python glue.py --glue-dir GLUE --threads 1 --dtype bfloat16 --max-train 2000 --tasks SST-2,QNLI runs/mini-16M --lr 1e-3    # and 3e-4
# 20 000 rows: scores-rows.json. heads.jsonl: the head that compares word by word needs  git apply data/results/instrument/align.patch
G="python glue.py --glue-dir GLUE --threads 1 --dtype bfloat16"
$B --eval-every 2000 --steps 80000 --warmup-frac 0.0025 --decay-frac 0.2 --begin-from runs/bf16-64M --out runs/bf16-160M
S="$S --eval-every 1000"
$S --steps 28000 --warmup-frac 0.00714285714 --decay-frac 0 --begin-from runs/mini-24M --out runs/mini-57M
$S --steps 32000 --warmup-frac 0.00625 --decay-frac 0.125 --begin-from runs/mini-57M --out runs/mini-66M
for r in bf16-5M bf16-80M bf16-160M; do $G runs/$r --lr 1e-3 --max-train 20000 --tasks SST-2,QQP,MNLI,QNLI; done
$G runs/mini-30M --max-train 20000 --lr 3e-4 --tasks QNLI
$G runs/mini-66M --max-train 20000 --lr 3e-4 --tasks SST-2,QQP,MNLI,QNLI    # run and random weights by two jobs
$G runs/bf16-80M --max-train 5000 --tasks QQP,MNLI,QNLI --pool-output align
$G runs/mini-30M --max-train 5000 --tasks QNLI --lr 6e-4    # and 1.5e-4: random weights alone
# a third shape, wide; the rates of random weights. gcache: another --cache, where two jobs would wait for each other
for lr in 1e-3 2e-3; do
    $B --layers 2 --width 256 --lr $lr --eval-every 100 --steps 700 --warmup-frac 0.2857143 --decay-frac 0 --out runs/wide-lr-$lr
done
$B --layers 4 --width 192 --lr 1.5e-3 --eval-every 100 --steps 700 --warmup-frac 0.2857143 --decay-frac 0 --out runs/4x192-lr-1.5e-3
S="$B --layers 2 --width 256 --lr 1e-3 --eval-every 1000"
$S --steps 10000 --warmup-frac 0.02 --decay-frac 0 --out runs/wide-20M
$S --steps 12500 --warmup-frac 0.016 --decay-frac 0.2 --begin-from runs/wide-20M --out runs/wide-26M
$S --steps 16000 --warmup-frac 0.0125 --decay-frac 0 --begin-from runs/wide-20M --out runs/wide-33M
$S --steps 20000 --warmup-frac 0.01 --decay-frac 0.2 --begin-from runs/wide-33M --out runs/wide-41M
$S --steps 28000 --warmup-frac 0.00714285714 --decay-frac 0 --begin-from runs/wide-33M --out runs/wide-57M
$S --steps 32000 --warmup-frac 0.00625 --decay-frac 0.125 --begin-from runs/wide-57M --out runs/wide-66M
# Runs and random weights were scored by jobs of their own, of which these are the meaning.
for r in wide-26M wide-41M wide-66M; do $G runs/$r --lr 3e-4 --tasks SST-2,QQP,MNLI,QNLI,STS-B; done    # wide-66M: without STS-B
$G runs/wide-66M --lr 1.5e-4 --tasks SST-2,QQP,MNLI,QNLI    # random weights alone
$G runs/mini-30M --lr 3e-4 --tasks SST-2,QQP,MNLI
$G runs/mini-66M --lr 1.5e-4 --tasks SST-2,QQP,MNLI,QNLI    # random weights alone
for lr in 5e-4 2.5e-4; do $G runs/bf16-80M --lr $lr --tasks SST-2,QQP,MNLI,QNLI; done    # 2.5e-4: random weights alone
for lr in 1e-3 5e-4; do $G runs/bf16-80M --lr $lr --epochs 1 --tasks SST-2,QQP,MNLI,QNLI; done    # 5e-4: random weights alone
$G runs/bf16-80M --max-train 5000 --lr 5e-4 --tasks SST-2,QQP,MNLI,QNLI    # random weights alone
# two hours of two cores in one run: what --preset laptop-long has been since, but for the text
python train.py --preset laptop-long --masking random --corpus FILE --dtype bfloat16 --threads 2 --steps 64000 --warmup-frac 0.003125 --eval-every 2000 --out runs/wide-131M
$G runs/wide-131M --lr 3e-4 --tasks SST-2,QQP,MNLI,QNLI,STS-B
for lr in 6e-4 1.5e-4; do $G runs/wide-131M --lr $lr --tasks SST-2,QQP,MNLI,QNLI; done    # 1.5e-4 was stopped after QQP
$G runs/wide-131M --lr 1.5e-4 --tasks STS-B    # random weights alone
$G runs/wide-131M --freeze --tasks SST-2,QQP,MNLI,QNLI
$G runs/wide-131M --lr 6e-4 --max-train 5000 --tasks SST-2,QQP,MNLI,QNLI    # the run alone; random weights: --lr 1.5e-4
# ---- fifth part, 2026-11-26: a rate of its own for the token embeddings (rates.jsonl), and the setup that is the default since
$B --steps 10000 --warmup-frac 0.02 --decay-frac 0.2 --eval-every 2500 --out runs/tiny-20M
# rates.jsonl was made by a loop around the parts of glue.py, of which these are the meaning. Its lines name what they changed:
# lr, embedding_lr, dropout, pool_output mean  are flags;  pool_output max  and  head_lr  need
# git apply data/results/instrument/maxima-and-head-rate.patch;  first_block_lr  and an embedding_lr of 0 have no flag.
for e in 6e-4 1.8e-4 6e-5; do $G runs/wide-131M --max-train 5000 --lr 6e-4 --embedding-lr $e --tasks SST-2,QQP,MNLI,QNLI; done
for e in 1e-3 1e-4; do $G runs/tiny-20M --max-train 5000 --lr 1e-3 --embedding-lr $e --tasks SST-2,QQP,MNLI,QNLI; done
$G runs/wide-131M --tasks SST-2,QQP,MNLI,QNLI,STS-B    # the default: --lr 6e-4 --embedding-lr 6e-5, random weights 1.5e-4
python train.py --preset laptop-long --masking random --corpus FILE --dtype bfloat16 --threads 1 --out runs/wide-66M-s0
$G runs/wide-66M-s0 --tasks SST-2,QQP,MNLI,QNLI,STS-B
for r in wide-66M-s0 wide-131M; do $G runs/$r --seeds 2 --tasks SST-2,QQP,MNLI,QNLI; done    # random weights: the first seed alone
# ---- sixth part: batch, vocabulary, sharing, heads, rates, optimiser on wide (wide-screening.jsonl)
P="python train.py --preset laptop-long --masking random --corpus FILE --dtype bfloat16 --threads 1"
W="$P --steps 3000 --warmup-frac 0.0666667 --decay-frac 0.25 --eval-every 500"
$W --out runs/screen
$W --lr 2e-3 --out runs/screen-lr-2e-3
$W --batch-size 8 --steps 6000 --out runs/screen-batch-8
$W --batch-size 32 --steps 1500 --lr 1.4e-3 --eval-every 250 --out runs/screen-batch-32
$W --vocab-size 4096 --steps 3450 --out runs/screen-4096
$W --vocab-size 16384 --steps 2400 --out runs/screen-16384
for r in screen screen-4096 screen-16384; do python glue.py --glue-dir GLUE --threads 1 --dtype bfloat16 runs/$r --max-train 5000 --tasks SST-2,QQP,MNLI,QNLI; done
python glue.py --glue-dir GLUE --threads 1 --dtype bfloat16 runs/screen --tasks SST-2,QQP,MNLI,QNLI
python glue.py --glue-dir GLUE --threads 1 --dtype bfloat16 runs/wide-66M-s0 --seeds 3 --tasks SST-2,QQP,MNLI,QNLI
$P --seed 1 --out runs/wide-66M-s1
C="$P --decay-frac 0.25 --warmup-frac 0.025"    # the 25 minutes
$C --steps 8000 --eval-every 1000 --out runs/wide-16M
$C --batch-size 8 --steps 16000 --eval-every 2000 --out runs/wide-16M-batch-8
# These need:  git apply data/results/instrument/optimiser.patch
SHARE=1 $W --out runs/screen-share
HEAD=32 $W --out runs/screen-heads-of-32
EMBEDDINGS=3 $W --out runs/screen-embeddings-3
EMBEDDINGS=10 $W --out runs/screen-embeddings-10
EMBEDDINGS=5 $W --lr 6e-4 --out runs/screen-embeddings-5
MUON=1 $W --out runs/screen-muon
MUON=3 $W --out runs/screen-muon-3
MUON=1 EMBEDDINGS=3 NS=3 $W --out runs/screen-muon-embeddings
MUON=1 EMBEDDINGS=3 $W --batch-size 32 --steps 1500 --lr 1.4e-3 --eval-every 250 --out runs/screen-muon-batch-32
EMBEDDINGS=3 $P --out runs/wide-embeddings-66M    # stopped after 6830 steps
MUON=1 NS=3 $P --out runs/wide-muon-66M           # stopped after 6240 steps

# ---- seventh part, 2026-11-26: on one NVIDIA H100 (torch 2.11.0+cu130), all at once (nvidia-cuda-mps-control -d), where no other machine is named; it chooses bfloat16
C="env TORCHINDUCTOR_CUDAGRAPHS=1 python train.py --preset laptop-long --masking random --corpus FILE --threads 1 --compile --log-every 100"
for s in 2 3 4; do $C --seed $s --out runs/wide-66M-s$s; done
$C --out runs/wide-66M-s0-gpu    # seed 0 again, against that of the CPU
B="--batch-size 32 --lr 1.4e-3"
$C $B --steps 64000 --warmup-frac 0.0015625 --eval-every 4000 --out runs/wide-262M
$C $B --steps 96000 --warmup-frac 0.00104167 --eval-every 6000 --out runs/wide-393M
$C $B --size mini --steps 60500 --warmup-frac 0.00165289 --eval-every 3781 --out runs/mini-248M
# Two other shapes, with about the FLOPs of wide-66M
$C --layers 3 --width 256 --steps 21500 --warmup-frac 0.00930233 --eval-every 1343 --out runs/3x256-44M
$C --layers 2 --width 384 --steps 16000 --warmup-frac 0.0125 --eval-every 1000 --out runs/2x384-33M
# Fine-tuning on the H100, a process a task; runs and random weights were scored by jobs of their own.
G="python glue.py --glue-dir GLUE --threads 1 --tasks SST-2,QQP,MNLI,QNLI"
$G runs/wide-66M-s[234] --seeds 3
$G runs/wide-262M --seeds 2
$G runs/wide-66M-s0-gpu runs/3x256-44M runs/2x384-33M
$G runs/mini-248M --seeds 2    # the second seed's SST-2 and QQP on the CPU
$G runs/mini-248M --lr 3e-4 --embedding-lr 3e-4
$G runs/wide-131M --max-train 0
# The rest on two cores
G="$G --dtype bfloat16"
$G runs/wide-66M-s[01] --seeds 3
$G runs/wide-66M-s[012] --seeds 1    # random weights alone, of three seeds
$G runs/wide-393M --seeds 2
$G runs/wide-131M --epochs 1         # and random weights with --lr 3e-4 --embedding-lr 3e-4, too
$G runs/mini-248M --max-train 5000
for r in screen wide-66M-s0 wide-262M wide-393M mini-248M; do
    $G runs/$r --freeze
    $G runs/$r --tasks STS-B
done
python -m data.reach runs/mini-248M --blocks 128    # reach.txt
python glue.py runs/wide-66M-s[01234] --table --tasks SST-2,QQP,MNLI,QNLI    # "it can be compared with"
# fit.jsonl: a loop around glue.fine_tune, of which this is the meaning. Masked tokens have no flag: in fine_tune, before the vector,
# tokens = tokens.masked_fill((torch.rand(tokens.shape) < 0.2) & (tokens >= N_SPECIAL), MASK)
$G runs/wide-131M --tasks MNLI --epochs 6 --dropout 0.1
$G runs/mini-248M --tasks MNLI,QNLI --max-train 5000 --pool-output cls

# curve-pair.svg as it is now: the means of the table in README.md of this folder, drawn by data.curve.draw
python - <<'END'
from pathlib import Path
from data.curve import draw
arms = {"random (tiny)": [(5.12e6, 65.2), (20.48e6, 66.4), (40.96e6, 66.8), (81.92e6, 66.5)], "random (mini)": [(30.72e6, 65.6)]}
floors = {"random weights (tiny)": 63.0, "random weights (mini)": 62.3}
Path("data/results/instrument/curve-pair.svg").write_text(draw(arms, floors, "primary endpoint: mean accuracy of MNLI-m, QNLI, SST-2, QQP"))
END
# curve-rows.svg: the means of the table in README.md of this folder; random weights at their best rate
python - <<'END'
from pathlib import Path
from data.curve import draw
arms = {"tiny (2 x 128)": [(5.12e6, 69.56), (81.92e6, 71.27), (163.84e6, 71.39)],
        "wide (2 x 256)": [(6.14e6, 70.85), (65.54e6, 72.88), (131.07e6, 73.54), (262.14e6, 73.27), (393.22e6, 73.497)],
        "wide, one rate": [(25.6e6, 71.24), (40.96e6, 72.01), (65.54e6, 72.76), (131.07e6, 72.66)],
        "mini, one rate": [(30.72e6, 71.0), (65.54e6, 72.81), (247.81e6, 72.51)]}
floors = {"random weights (tiny)": 68.79, "random weights (mini)": 68.88, "random weights (wide)": 69.247}
label = "20 000 rows; primary endpoint: mean accuracy of MNLI-m, QNLI, SST-2, QQP"
Path("data/results/instrument/curve-rows.svg").write_text(draw(arms, floors, label))
END
