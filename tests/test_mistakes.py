"""A mistake is one line, before any work.   python -m pytest tests/test_mistakes.py -q"""

import pytest

from tests.helpers import command, refused

# Wrong lines, each with what the answer must have: the last flag, but for "->". RUN is a run.
WRONG = """
train.py --batch-size 0 -> --batch-size 0: must be above 0
train.py --batch-size x -> invalid int value: 'x'
train.py --batch-size 999999999 -> less than a batch
train.py --mask-rate 1.5; train.py --mask-rate nan; train.py --mask-rate 0.5
train.py --mask-rate 0; train.py --mask-rate 0.01
train.py --mask-rate-end 2; train.py --pool 9; train.py --pool 1; train.py --pool -1
train.py --score-input masked --pool 0; train.py --seq-len 4; train.py --steps 1e3
train.py --seed -1; train.py --seed 99999999999999999999; train.py --lr inf; train.py --dropout 1
train.py --distill complete -> --teacher; train.py --distill complete --teacher RUN --tau 0
train.py --distill after-init --teacher RUN --init-frac 0 -> --init-frac
train.py --alpha 0.3; train.py --tau 3
train.py --teacher RUN; train.py --masking entropy -> --teacher
train.py --masking entropy --teacher RUN --score-input vocabulary; train.py --score-input once
train.py --score-input context --pool 0; train.py --score-input context --select sample
train.py --masking entropy --teacher nowhere -> not a finished run
train.py --masking entropy --vocab-size 560 --teacher RUN -> has another tokenizer
train.py --masking random --select low; train.py --static; train.py --masking random --init-frac 0.1
train.py --masking random --pool 3; train.py --vocab-size 299; train.py --vocab-size 65537
train.py --width 100; train.py --micro-batch 3; train.py --preset lap; train.py --init-from nowhere
train.py --width 128 --init-from RUN -> --init-from needs a run of the same
train.py --flops-of nowhere; train.py --steps 5 --flops-of RUN
train.py --corpus nowhere -> no such file or folder; train.py --corpus
train.py --mask-ratee 1 -> --mask-ratee; train.py x -> unrecognized arguments: x
train.py --resume nowhere -> nowhere is not a run folder
train.py --eval nowhere -> nowhere is not a run folder
train.py --resume nowhere --eval nowhere; train.py --resume RUN -> nothing to resume
train.py --device mps -> invalid choice: 'mps'; train.py --threads -1
train.py --positions learned --rotary-base 10
glue.py -> give the run folders to score; glue.py nowhere -> is not a run folder
glue.py RUN --tasks SNLI -> there is no task SNLI
glue.py RUN --tasks , -> there is no task without a name
glue.py RUN --seeds 0 -> --seeds 0: must be above 0; glue.py RUN --freeze --embedding-lr 1e-3
glue.py RUN --glue-dir nowhere --tasks RTE -> RTE/train.tsv: No such file
glue.py RUN --table -> nothing is scored yet
glue.py RUN --baseline self -> --baseline self: the arms are teacher
data/inspection.py -> python train.py; data/inspection.py nowhere a -> not a run folder
data/inspection.py RUN a -> from 2 to 32; data/inspection.py RUN a b -> a sentence in quotes
data/inspection.py RUN abc --mask-rate 2; data/inspection.py RUN abc --seed -1
data/inspection.py RUN abc --html / -> name another
model.py RUN -> say what to do with it; model.py --fill x -> required: RUN
model.py RUN --fill x -> there is no [MASK] in the text; model.py nowhere --fill [MASK] -> nowhere
data/plot.py nowhere -> nowhere
"""


@pytest.mark.parametrize("case", WRONG.strip().replace("\n", "; ").split("; "))
def test_a_mistake_is_one_line(case, folder, teacher, monkeypatch, capsys):
    line, _, answer = case.partition(" -> ")
    argv = [teacher if word == "RUN" else word for word in line.split()]
    if argv[0] == "train.py" and not {"--resume", "--eval"} & set(argv):
        argv = command(folder, "refused", *argv[1:])
    answer = answer or [word for word in line.split() if word.startswith("--")][-1]
    assert answer in refused(argv, monkeypatch, capsys)
    assert not (folder / "refused").exists()


def test_graphs_do_not_write_over_gradients_that_are_summed(folder, monkeypatch, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CUDAGRAPHS", "1")
    argv = command(folder, "refused", "--compile", "--micro-batch", "1")
    assert "TORCHINDUCTOR_CUDAGRAPHS" in refused(argv, monkeypatch, capsys)
