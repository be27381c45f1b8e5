"""Text -> token ids: lower-cased NFKC, then sentencepiece's byte-pair encoding with byte fallback.

How text is normalized stands here rather than in the sentencepiece model, so that data/export.py
can write down the same steps for another library. Text always passes through `normalize`: text of
the corpus, of GLUE, and of a prompt.

The five special ids come first. They are control symbols to sentencepiece: no text, not even the
text "[MASK]", is ever encoded to one of them.
"""

import io
import re
import string
import unicodedata
from itertools import chain
from pathlib import Path

import sentencepiece

from data.files import UserError, sha256_file, write_atomic

PAD, UNK, CLS, SEP, MASK = range(5)
N_SPECIAL = 5  # ordinary tokens are the ids from here on
PRINTABLE = set(string.digits + string.ascii_letters + string.punctuation)

# Control characters, and what Unicode calls default ignorable: soft hyphens, zero-width characters,
# marks of direction and of byte order, variation selectors. An emoji joined of several falls apart;
# so do words of Persian or Hindi, which are written with joiners: this is made for English.
INVISIBLE = ("[\0-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5"
             "\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0"
             "\ufff0-\ufffc\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]")
INVISIBLE_RE = re.compile(INVISIBLE)
# Characters that sentencepiece keeps for itself: "▁" is its space, "▅" its unknown character; its
# trainer passes over a paragraph that has one.
RESERVED = "▁▅"


def normalize(text):
    """Text that looks alike -> the same text, with single spaces, none at the end, and one in front
    where there was one. data/export.py describes the same steps."""
    text = text.encode("utf-8", "replace").decode()  # a terminal may pass on what is no text
    # In front, after [MASK], it counts as a space, as in an export, where no rule could drop it.
    text = INVISIBLE_RE.sub(lambda found: "" if found.start() else " ", text)
    text = unicodedata.normalize("NFKC", text).lower()
    text = text.replace("ς", "σ")  # str.lower alone knows where a Greek word ends
    for character in RESERVED:
        text = text.replace(character, " ")
    words = text.split()
    return " " * (words != [] and text[0].isspace()) + " ".join(words)


class Tokenizer:
    """encode: text -> ids; decode: ids -> text; pieces: id -> its piece, "▁" marking a space."""

    def __init__(self, path, sha256=None):
        """Open a tokenizer.model; with `sha256`, its bytes are checked before they are parsed."""
        self.sha256 = sha256_file(path)
        if sha256 is not None and sha256 != self.sha256:
            raise UserError(f"{path} is damaged: its checksum is not the recorded one")
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=Path(path).read_bytes())
        except RuntimeError:
            raise UserError(f"{path} is not a sentencepiece model")
        self.vocab_size = self.sp.vocab_size()
        self.pieces = [self.sp.id_to_piece(i) for i in range(self.vocab_size)]
        for i, piece in enumerate(self.pieces):  # a byte that is a character is shown as that
            if self.sp.is_byte(i) and chr(int(piece[1:-1], 16)) in PRINTABLE:
                self.pieces[i] = chr(int(piece[1:-1], 16))

    def encode(self, text, threads=1):
        """A string -> list of ids; a list of strings -> list of lists, with so many threads."""
        if isinstance(text, str):
            return self.encode([text])[0]
        # No piece reaches over a space: each word is encoded once, however often it is there. That
        # gives the ids of whole texts in two thirds of the time.
        texts = [normalize(" " + t).split() for t in text]
        words = list(set(chain.from_iterable(texts)))
        encoded = self.sp.encode([" " + word for word in words], num_threads=threads)
        ids = dict(zip(words, encoded))
        return [list(chain.from_iterable(map(ids.__getitem__, t))) for t in texts]

    def encode_with_masks(self, text):
        """Like encode, but each "[MASK]" in the text becomes the id MASK: for a person's prompt."""
        first, *others = text.split("[MASK]")
        ids = self.encode(first)
        for part in others:  # no space in front but its own: "[MASK]." has none
            ids += [MASK, *self.sp.encode(normalize(part))]
        return ids

    def decode(self, ids):
        return self.sp.decode([int(i) for i in ids if i >= N_SPECIAL]).removeprefix(" ")


def train_tokenizer(paragraphs, vocab_size, path):
    """Learn a BPE vocabulary of `vocab_size` from an iterable of strings; write `path`.

    The same text gives the same file. UserError if the text does not support so many pieces.
    """
    model = io.BytesIO()  # not a file: sentencepiece would write that file's path into the model
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(normalize(" " + paragraph) for paragraph in paragraphs),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            pad_id=PAD, pad_piece="[PAD]",
            unk_id=UNK, unk_piece="[UNK]",
            bos_id=CLS, bos_piece="[CLS]",
            eos_id=SEP, eos_piece="[SEP]",
            control_symbols=["[MASK]"],
            normalization_rule_name="identity",  # `normalize` has done all three
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            character_coverage=0.9995,  # sentencepiece's own advice; the rest goes through bytes
            max_sentence_length=1 << 30,  # bytes; longer lines would be left out silently
            num_threads=1,  # the vocabulary does not depend on it, but the file has the number
            minloglevel=2,
        )
    except RuntimeError as error:
        if "KeyboardInterrupt" in str(error):  # it came while `normalize` was called from C++
            raise KeyboardInterrupt
        if needed := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            raise UserError(f"--vocab-size {vocab_size} does not hold the letters of this corpus: "
                            f"give at least {needed[1]}")
        if possible := re.search(r"<= (\d+)", str(error)):
            raise UserError(f"--vocab-size {vocab_size} is more than this corpus supports: give "
                            f"more text, or at most {possible[1]}")
        raise UserError(f"the text cannot train a tokenizer: {str(error)[:200]}")
    write_atomic(path, model.getvalue())
