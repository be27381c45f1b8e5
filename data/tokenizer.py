"""A thin wrapper around sentencepiece: lower-cased NFKC byte-pair encoding with byte fallback.

The five special ids come first. They are control symbols to sentencepiece: no text, not even the
text "[MASK]", is ever encoded to one of them.
"""

import io
import string
from pathlib import Path

import sentencepiece

from data.files import UserError, sha256_file, write_atomic

PAD, UNK, CLS, SEP, MASK = range(5)
N_SPECIAL = 5  # ordinary tokens are the ids from here on
MIN_VOCAB = 300  # 5 special tokens, 256 byte pieces, and an alphabet
MAX_VOCAB = 65536  # token ids are stored as uint16
PRINTABLE = set(string.digits + string.ascii_letters + string.punctuation)


class Tokenizer:
    """encode: text -> ids; decode: ids -> text; pieces: id -> its piece, "▁" marking a space."""

    def __init__(self, path, sha256=None):
        """Open a tokenizer.model; with `sha256`, its bytes are checked before they are parsed."""
        if not Path(path).is_file():
            raise UserError(f"cannot read {path}: there is no such file")
        self.sha256 = sha256_file(path)
        if sha256 is not None and sha256 != self.sha256:
            raise UserError(f"{path} is damaged: its checksum is not the recorded one")
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError:
            raise UserError(f"{path} is not a sentencepiece model")
        self.vocab_size = self.sp.vocab_size()
        self.pieces = [self.sp.id_to_piece(i) for i in range(self.vocab_size)]
        for i, piece in enumerate(self.pieces):  # a byte that is a character is shown as that
            if self.sp.is_byte(i) and chr(int(piece[1:-1], 16)) in PRINTABLE:
                self.pieces[i] = chr(int(piece[1:-1], 16))

    def encode(self, text, threads=1):
        """A string -> list of ids; a list of strings -> list of lists, encoded in parallel."""
        if isinstance(text, str):  # what a terminal passes on may hold bytes that are no text
            text = text.encode("utf-8", "replace").decode()
        return self.sp.encode(text, num_threads=threads)

    def encode_with_masks(self, text):
        """Like encode, but each "[MASK]" in the text becomes the id MASK: for a person's prompt."""
        ids = []
        for i, part in enumerate(text.split("[MASK]")):
            if i:
                ids.append(MASK)
            piece_ids = self.encode(part)
            # Sentencepiece puts a space before every text it is given; "[MASK]." has none there.
            if i and piece_ids and not part[0].isspace():
                bare = self.pieces[piece_ids[0]].removeprefix("▁")
                if not bare:
                    del piece_ids[0]
                elif self.sp.piece_to_id(bare) != UNK:
                    piece_ids[0] = self.sp.piece_to_id(bare)
            ids += piece_ids
        return ids

    def decode(self, ids):
        return self.sp.decode([int(i) for i in ids if i >= N_SPECIAL])


def train_tokenizer(paragraphs, vocab_size, path):
    """Learn a BPE vocabulary of `vocab_size` from an iterable of strings; write `path`.

    The same text gives the same file. UserError if the text does not support so many pieces.
    """
    model = io.BytesIO()  # not a file: sentencepiece would write that file's path into the model
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(paragraphs),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            pad_id=PAD,
            unk_id=UNK,
            bos_id=CLS,
            eos_id=SEP,
            pad_piece="[PAD]",
            unk_piece="[UNK]",
            bos_piece="[CLS]",
            eos_piece="[SEP]",
            control_symbols=["[MASK]"],
            normalization_rule_name="nfkc_cf",  # NFKC and case folding
            byte_fallback=True,
            character_coverage=0.9995,  # sentencepiece's own advice; the rest goes through bytes
            max_sentence_length=1 << 22,  # bytes; longer lines would be left out silently
            minloglevel=2,
        )
    except RuntimeError as error:
        if "required_chars" in str(error):
            raise UserError(f"--vocab-size {vocab_size} does not hold the letters of this corpus: "
                            "give a larger one")
        if "<=" not in str(error):
            raise UserError(f"the text cannot train a tokenizer: {str(error)[:200]}")
        raise UserError(f"--vocab-size {vocab_size} is more than this corpus supports: give more "
                        f"text, or at most {str(error).rpartition('<=')[2].strip(' .')}")
    write_atomic(path, model.getvalue())
