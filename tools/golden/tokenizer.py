"""A tiny LLaMA-style tokenizer: byte-fallback BPE over a few hundred pieces.

The layout is LLaMA's: ids 0, 1, 2 are <unk>, <s>, </s>, then the 256 byte pieces, then single
characters, then merged pieces. `<image>` and `<pad>` follow as added tokens, as in llava-hf folders.
Merges never cross a word or a punctuation mark, and start with the four that make "USER" one piece
inside a text but two at its start ("▁US" + "ER"), which is what LLaMA's own vocabulary does and what
the length correction of the v1 label rule relies on.
"""

import json
import re
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

SPACE = "\u2581"

CORPUS = """
A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful,
detailed, and polite answers to the user's questions. USER: ASSISTANT: USER: ASSISTANT:
What is in the picture? What colour is the box? How many lines are there? Is there a line in it?
There is a red box on the left and a blue line under it. The picture shows a green box and two lines.
A red box. A blue line. Yes. No. One. Two. Three boxes in a row, each a little darker than the one before it.
Tell me about rivers. A river carries water from the hills to the sea. Which is longer? The first one.
"""

FIRST_MERGES = [("U", "S"), ("E", "R"), (SPACE, "US"), ("US", "ER")]
NEVER_MERGED = (SPACE + "US", "ER")


def words_of(text):
    """Words with their leading space mark, and single punctuation marks: the units merges stay inside."""
    marked = SPACE + SPACE.join(text.split())
    return re.findall(rf"{SPACE}?[A-Za-z]+|.", marked)


def learn_merges(count):
    """The most frequent pairs, one at a time; ties go to the byte-wise smaller pair."""
    words = Counter(words_of(CORPUS))
    split = {word: list(word) for word in words}
    merges = []
    while len(merges) < count:
        pairs = Counter()
        for word, pieces in split.items():
            for pair in zip(pieces, pieces[1:]):
                pairs[pair] += words[word]
        del pairs[NEVER_MERGED]
        if len(merges) < len(FIRST_MERGES):
            best = FIRST_MERGES[len(merges)]
        else:
            best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, pieces in split.items():
            i = 0
            while i + 1 < len(pieces):
                if (pieces[i], pieces[i + 1]) == best:
                    pieces[i : i + 2] = [best[0] + best[1]]
                i += 1
    return merges


def build(merge_count, legacy):
    """The tokenizer; `legacy` puts the dummy space in front of every text after a special token."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for char in sorted(set("".join(words_of(CORPUS)))):
        vocab[char] = len(vocab)
    merges = learn_merges(merge_count)
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))

    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def save(tokenizer, folder: Path, legacy, max_length):
    """tokenizer.json and the tokenizer_config.json of a LLaMA tokenizer beside it."""
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=0))
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": legacy,
        "model_max_length": max_length,
        "pad_token": "<pad>",
        "padding_side": "right",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
