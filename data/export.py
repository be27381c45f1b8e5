"""A run as a folder that Hugging Face transformers opens, written without that library.

    DIR/config.json            BertForMaskedLM, or RoFormerForMaskedLM for rotary positions
    DIR/model.safetensors      the same weights under their names there
    DIR/tokenizer.json         the same vocabulary for the tokenizers library, which plain
    DIR/tokenizer_config.json  transformers has; sentencepiece is not needed there

The logits and the ids are the same, for text with [MASK] too, and each token's span is its letters
without the blank before them; tests/test_export.py compares them where transformers is. Other
special tokens in a text are tokens there and mere text here.
"""

import json

import torch

from data.files import UserError, write_atomic, write_json
from data.tokenizer import INVISIBLE, N_SPECIAL, RESERVED


def export(model, tokenizer, folder):
    """Write the four files -> the name of the class that opens them. UserError for a folder that is
    there already: nothing is overwritten."""
    if folder.exists():
        raise UserError(f"{folder} exists: give another folder to --export")
    folder.mkdir(parents=True)
    config = make_config(model.shape)
    write_atomic(folder / "model.safetensors", safetensors(rename_weights(model)))
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.shape.seq_len,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}})
    write_json(folder / "tokenizer.json", tokenizer_json(tokenizer))
    return config["architectures"][0]


def make_config(shape):
    kind = "RoFormer" if shape.positions == "rotary" else "Bert"
    return {
        "architectures": [f"{kind}ForMaskedLM"], "model_type": kind.lower(),
        "vocab_size": shape.vocab_size, "hidden_size": shape.width, "embedding_size": shape.width,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "intermediate_size": 4 * shape.width, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
        "max_position_embeddings": shape.seq_len, "type_vocab_size": 2, "rotary_value": False,
        "hidden_dropout_prob": shape.dropout, "attention_probs_dropout_prob": shape.dropout,
        "initializer_range": shape.init_std, "pad_token_id": 0, "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def rename_weights(model):
    """The state dict under the names, and in the order of rows, that transformers has."""
    shape, ours = model.shape, model.state_dict()
    prefix = "roformer" if shape.positions == "rotary" else "bert"
    out = {
        f"{prefix}.embeddings.word_embeddings.weight": ours["token_embedding.weight"],
        f"{prefix}.embeddings.token_type_embeddings.weight": ours["type_embedding.weight"],
        "cls.predictions.decoder.weight": ours["token_embedding.weight"],  # tied
        "cls.predictions.decoder.bias": ours["head_bias"],  # one bias under two names
        "cls.predictions.bias": ours["head_bias"],
    }
    modules = {f"{prefix}.embeddings.LayerNorm": "norm",
               "cls.predictions.transform.dense": "head_dense",
               "cls.predictions.transform.LayerNorm": "head_norm"}
    for i in range(shape.layers):
        layer, block = f"{prefix}.encoder.layer.{i}", f"blocks.{i}"
        modules |= {f"{layer}.attention.output.dense": f"{block}.attention.out",
                    f"{layer}.attention.output.LayerNorm": f"{block}.norm1",
                    f"{layer}.intermediate.dense": f"{block}.up",
                    f"{layer}.output.dense": f"{block}.down",
                    f"{layer}.output.LayerNorm": f"{block}.norm2"}
        for kind in ("weight", "bias"):
            q, k, v = ours[f"{block}.attention.qkv.{kind}"].chunk(3)
            if shape.positions == "rotary":
                q, k = interleave(q, shape.heads), interleave(k, shape.heads)
            for name, x in (("query", q), ("key", k), ("value", v)):
                out[f"{layer}.attention.self.{name}.{kind}"] = x
    for theirs, own in modules.items():
        for kind in ("weight", "bias"):
            out[f"{theirs}.{kind}"] = ours[f"{own}.{kind}"]
    if shape.positions == "rotary":  # its table of positions: all sines, then all cosines
        out[f"{prefix}.encoder.embed_positions.weight"] = torch.cat((model.sin, model.cos), 1)
    else:
        out[f"{prefix}.embeddings.position_embeddings.weight"] = ours["position_embedding.weight"]
    return out


def interleave(x, heads):
    """We rotate plane i as the components (i, i + D/2) of a head, RoFormer as (2i, 2i + 1): the
    rows (h D, ...) of the query and key projections are put into that order."""
    halves = x.unflatten(0, (heads, 2, -1))  # (h, 2, D / 2, ...)
    return halves.transpose(1, 2).reshape(x.shape)


def safetensors(tensors):
    """{name: float32 tensor} -> the bytes of a .safetensors file: the length of a JSON header (8
    bytes), the header with each tensor's place, the tensors. The format's specification is that
    short: https://github.com/huggingface/safetensors#format"""
    header, data = {"__metadata__": {"format": "pt"}}, []
    end = 0
    for name, x in tensors.items():
        data.append(x.detach().float().contiguous().numpy().tobytes())
        header[name] = {"dtype": "F32", "shape": list(x.shape),
                        "data_offsets": [end, end + len(data[-1])]}
        end += len(data[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return b"".join([len(text).to_bytes(8, "little"), text, *data])


# --------------------------------------------------------------------------------------------------
# the tokenizer


def tokenizer_json(tokenizer):
    """A Tokenizer -> what the tokenizers library reads."""
    sp = tokenizer.sp
    # The space in a piece is written as in GPT-2's vocabulary: the tokenizers library leaves that
    # sign alone out of the spans. No piece has it as a letter, which would be in lower case.
    names = [sp.id_to_piece(i).replace("▁", "Ġ") for i in range(tokenizer.vocab_size)]
    ids = {name: i for i, name in enumerate(names)}
    # sentencepiece joins the neighbours whose union has the best score. tokenizers has a list of
    # pairs instead: every way to make a piece of two others, the best pieces first.
    merges = []
    for name in sorted(names[N_SPECIAL:], key=lambda n: -sp.get_score(ids[n])):
        if not sp.is_byte(ids[name]):
            pairs = [(name[:i], name[i:]) for i in range(1, len(name))]
            merges += sorted((p for p in pairs if p[0] in ids and p[1] in ids),
                             key=lambda p: (ids[p[0]], ids[p[1]]))
    special = [{"id": i, "content": names[i], "single_word": False, "lstrip": names[i] == "[MASK]",
                "rstrip": False, "normalized": False, "special": True} for i in range(N_SPECIAL)]

    def replace(pattern, content):
        return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}

    # The steps of data/tokenizer.py's normalize. A space in front stays: it begins a word after
    # [MASK], and a text's own is what would be put there.
    blank = rf"[\s{RESERVED}]"  # of several the last stays, whose place is next to the word
    normalizer = {"type": "Sequence", "normalizers": [
        replace(rf"\A{INVISIBLE}", " "), replace(INVISIBLE, ""), {"type": "NFKC"},
        {"type": "Lowercase"}, replace("ς", "σ"), replace(rf"{blank}+(?={blank}|\z)", ""),
        replace(blank, " ")]}

    def template(*parts):
        return [{kind: {"id": name, "type_id": type_id}} for kind, name, type_id in parts]

    first = [("SpecialToken", "[CLS]", 0), ("Sequence", "A", 0), ("SpecialToken", "[SEP]", 0)]
    second = [("Sequence", "B", 1), ("SpecialToken", "[SEP]", 1)]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "Ġ", "prepend_scheme": "first",
                          "split": True},
        "post_processor": {"type": "Sequence", "processors": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
             "use_regex": False},
            {"type": "TemplateProcessing", "single": template(*first),
             "pair": template(*first, *second),
             "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]}
                                for name in ("[CLS]", "[SEP]")}}]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "Ġ"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "[UNK]", "fuse_unk": True,
                  "byte_fallback": True, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "ignore_merges": False, "vocab": ids,
                  "merges": [" ".join(pair) for pair in merges]},  # old versions read no pairs
    }
