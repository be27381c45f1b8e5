"""Running means of vocabulary items. Not from the paper.

A strategy can read them instead of a text: training's own predictions make them, and no forward is
needed (--score-input vocabulary, error). Or it reads how far a score is above the mean of its item
(context): that takes the forward of the score.
"""

import torch

from data.tokenizer import MASK


class VocabularyMean:
    """The mean of a number over the predictions of each vocabulary item. It learns only while a
    model trains: `see` keeps what a forward says, and `learn` takes it in after the update.

    measure  (logits (N, V), labels (N,)) -> the numbers (N,), of training's predictions; None: they
             are the scores of `asks`
    unseen   what an item has that was not seen yet
    prior    so many values equal to `unseen` count as seen, when a mean is read
    asks     one of masking.READS, whose scores a strategy gets less the mean of their items

    Where [MASK] was shown counts, and of that the last ~WINDOW values: they change in training.
    """

    WINDOW = 64  # a choice: other lengths were not tried

    def __init__(self, measure, unseen, vocab_size, device="cpu", prior=0, asks=None):
        self.measure, self.unseen, self.prior, self.asks = measure, unseen, prior, asks
        self.mean = torch.full((vocab_size,), unseen, device=device)
        self.seen = torch.zeros(vocab_size, device=device)
        self.parts = []  # of this step: (N, 3) item, number, 1 where [MASK] was shown

    def __call__(self, model, tokens, places):
        """As something that a strategy reads: (B, T), (B, c) -> (B, c), the means; with `asks` how
        far each score is above the mean of its item, 0 for an item that was not seen."""
        items = tokens.gather(1, places)
        if self.asks:
            scores = self.asks(model, tokens, places)
            if model.training:
                self.keep(items.flatten(), scores.flatten(), torch.ones_like(scores.flatten()))
            return (scores - self.mean[items]).where(self.seen[items] > 0, 0.0)
        n = self.seen.clamp_max(self.WINDOW)
        # (n mean + prior unseen) / (n + prior), which without a prior is the mean, bit for bit.
        read = self.mean + self.prior * (self.unseen - self.mean) / (n + self.prior).clamp_min(1)
        return read[items]

    def see(self, labels, shown, logits):
        """labels (N,) the items to predict, shown (N,) what stood there, logits (N, V)."""
        if self.measure:
            self.keep(labels, self.measure(logits.detach(), labels), shown == MASK)

    def keep(self, items, numbers, counts):
        """items (N,), their numbers (N,), which of them count (N,), until the next `learn`."""
        self.parts.append(torch.stack([items.float(), numbers, counts.float()], 1))

    def learn(self, machine):
        """Take in what was seen since the last update, by all processes. All at once, so that a
        micro-batch is only about memory."""
        if not self.parts:
            return
        items, numbers, weight = torch.cat(self.parts).unbind(1)
        items, self.parts = items.long(), []
        n, total = (machine.sum(torch.zeros_like(self.mean).index_add_(0, items, x))
                    for x in (weight, weight * numbers))
        self.seen += n
        # The mean of all values while they are few, then one that forgets.
        rate = (n / self.seen.clamp(1, self.WINDOW)).clamp_max(1)
        self.mean += rate * (total / n.clamp_min(1) - self.mean)

    def state(self):
        return torch.stack([self.mean, self.seen])

    def load_state(self, state):
        self.mean, self.seen = state.to(self.mean.device)
