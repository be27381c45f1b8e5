# What made the files of this folder. FILE: real English, 100 MB; GLUE: a folder in the official layout.
# The *.jsonl are the evaluations of the runs' logs. Run from the repository's folder.
T="python train.py --corpus FILE --dropout 0 --eval-every 500 --checkpoint-every 1000 --threads 1"
R="$T --masking random"
$R --steps 2000 --warmup-frac 0.1 --decay-frac 0 --out runs/trunk-4M
$R --steps 4000 --warmup-frac 0.05 --decay-frac 0 --begin-from runs/trunk-4M --out runs/trunk-8M
$R --steps 8000 --warmup-frac 0.025 --decay-frac 0 --begin-from runs/trunk-8M --out runs/trunk-16M
$R --steps 2500 --decay-frac 0.2 --begin-from runs/trunk-4M --out runs/random-5M
$R --steps 5000 --decay-frac 0.2 --begin-from runs/trunk-8M --out runs/random-10M
$R --steps 10000 --decay-frac 0.2 --begin-from runs/trunk-16M --out runs/random-20M
$T --masking self --steps 10000 --warmup-frac 0.02 --decay-frac 0.2 --out runs/self-20M

G="python glue.py --glue-dir GLUE --threads 1"
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
python -m data.curve scores-table.json data/results/instrument/curve.svg
