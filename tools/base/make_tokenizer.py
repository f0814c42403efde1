"""Makes the tokenizer of the tiny base: LLaMA style BPE (▁ for a space, byte fallback, <unk> <s> </s> first).

Merges are learned inside words and punctuation marks only.  Two kinds are added by hand after them: the role names with
their colon, and the chain that makes the system sentence of template v1 one token, which stands in front of every
conversation.  Usage: python make_tokenizer.py CORPUS.json OUT_DIR
"""

import collections
import json
import os
import re
import sys

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import make_corpus
import words

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
ROLES = ["USER:", "ASSISTANT:"]
EXTRA = ["Describe the picture.", "What is in this photo? Yes, no. I see you can say it is there.", "how many one two three four"]


def learn(corpus: list[str], vocab_size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Learns merges inside words; returns the characters and the merges in order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # A piece is one word with the ▁ before it, one digit or one mark.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[A-Za-z]+|▁|[^A-Za-z▁]"), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, show_progress=False, limit_alphabet=200,
                                  initial_alphabet=list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789▁.,:;?!'\"()-+*/=%&<>"))
    tokenizer.train_from_iterator(corpus, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    alphabet = sorted(t for t in model["vocab"] if len(t) == 1 and t != "\n")
    return alphabet, [tuple(m) for m in model["merges"]]


def build(corpus: list[str], vocab_size: int = 1024) -> Tokenizer:
    # Words with and without a space in front, so that both forms become one token each.
    vocabulary = sorted(set(re.findall(r"[A-Za-z]+", " ".join(corpus + EXTRA + [SYSTEM]))))
    counts = collections.Counter(re.findall(r"[A-Za-z]+", " ".join(corpus)))
    sure = [w for w in vocabulary if counts[w] >= 20 or w in SYSTEM]
    weighted = corpus + EXTRA + [" ".join(sure)] * 300 + [f"\n{w}" for w in sure for _ in range(60)] + [f"{SYSTEM} USER ASSISTANT"] * 300
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    alphabet, merges = learn(weighted, vocab_size)

    def merged(pieces: list[str]) -> list[tuple[str, str]]:
        chain, left = [], pieces[0]
        for piece in pieces[1:]:
            chain.append((left, piece))
            left += piece
        return chain

    phrases = merged(re.findall(r"▁?[A-Za-z]+|[^A-Za-z▁]", "▁" + SYSTEM.replace(" ", "▁")))
    phrases = [("▁" + r[:-1], ":") for r in ROLES] + phrases
    room = vocab_size - 2 - len(special) - len(bytes_) - len(alphabet) - len(phrases)
    merges = merges[:room]
    vocab = {}
    for token in special + bytes_ + [a + b for a, b in merges] + alphabet + [a + b for a, b in phrases]:
        vocab.setdefault(token, len(vocab))
    missing = [t for pair in phrases for t in pair if t not in vocab]
    assert not missing, f"no room in the vocabulary for {missing}"
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges + phrases, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special + ["<image>", "<pad>"]])
    return tokenizer


def save(tokenizer: Tokenizer, folder: str) -> None:
    os.makedirs(folder, exist_ok=True)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
              "pad_token": "<pad>", "image_token": "<image>", "add_bos_token": True, "add_eos_token": False, "legacy": True,
              "clean_up_tokenization_spaces": False, "model_max_length": 512, "padding_side": "right"}
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
        json.dump(config, f, indent=2)
    with open(os.path.join(folder, "special_tokens_map.json"), "w") as f:
        json.dump({k: config[k] for k in ["bos_token", "eos_token", "unk_token", "pad_token"]}, f, indent=2)


if __name__ == "__main__":
    with open(sys.argv[1]) as f:
        corpus = make_corpus.texts(json.load(f))
    listed = [" ".join(words.COLORS + words.SHAPES + words.BACKGROUNDS)]
    tokenizer = build(corpus + listed)
    save(tokenizer, sys.argv[2])
    print(f"{tokenizer.get_vocab_size()} tokens")
    for text in [SYSTEM + " USER: ", "\nis there a teal shape? ASSISTANT: no", "a teal circle\n", "</s>USER: what's new?"]:
        print(tokenizer.encode(text).tokens)
