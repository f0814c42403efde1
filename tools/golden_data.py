"""Writes tests/golden/data: what Pillow, transformers and tokenizers give, for the tests of src/data.

    python tools/golden_data.py

Made with Python 3.11, Pillow 13.0.0, numpy 2.4.6, tokenizers 0.23.3, transformers 5.23.0 (no torch needed).
The masks are LLaVA's algorithm (round by round, by token counts), which src/data does not use: it labels by spans.
"""

import io
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

OUT = Path(__file__).resolve().parent.parent / "tests" / "golden" / "data"
IMAGE, IGNORE = -200, -100
V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def fnv(data: bytes) -> str:
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


# ---------------------------------------------------------------------------------------------- pictures


def synthetic(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x % 256, y % 256, (x + y) % 256], -1).astype(np.uint8))


def noisy(width: int, height: int) -> Image.Image:
    """A picture of hard edges and noise that is quickly made again: bytes of a linear congruential generator."""
    state, out = 12345, bytearray()
    for _ in range(width * height * 3):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        out.append(state >> 24 if state & 0x400000 else 255 * (state >> 31))
    return Image.frombytes("RGB", (width, height), bytes(out))


def resize_cases() -> list:
    cases = []
    for make, name, sizes in [(synthetic, "synthetic", [(640, 480), (333, 1000), (300, 1000)]), (noisy, "noisy", [(61, 97), (100, 50)])]:
        for source in sizes:
            picture = make(*source)
            for target in [(448, 336), (224, 224), (61, 200), (7, 5), (1, 1)]:
                for resample in range(6):
                    cases.append({
                        "picture": name, "source": source, "target": target, "resample": resample,
                        "hash": fnv(picture.resize(target, resample).tobytes()),
                    })
    return cases


def expand_to_square(picture: Image.Image, colour) -> Image.Image:
    width, height = picture.size
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(picture, ((side - width) // 2, (side - height) // 2))
    return canvas


def processor_cases() -> list:
    cases = []
    configs = [
        {"size": 336, "crop_size": 336, "resample": 3},
        {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "do_convert_rgb": True},
        {"size": {"height": 32, "width": 48}, "do_center_crop": False, "resample": 2},
        {"size": {"shortest_edge": 30}, "crop_size": {"height": 41, "width": 32}, "image_mean": [0.5, 0.5, 0.5],
         "image_std": [0.5, 0.25, 0.5]},
        {"do_resize": False, "crop_size": 64, "do_normalize": False},
        {"size": 64, "crop_size": 64, "do_rescale": False, "image_mean": [127.5, 127.5, 127.5], "image_std": [60, 60, 60]},
    ]
    for config in configs:
        processor = CLIPImageProcessorPil(**config)
        for size in [(640, 480), (480, 641), (100, 50), (1000, 333), (400, 1001)]:
            for pad in [False, True]:
                picture = synthetic(*size)
                if pad:
                    picture = expand_to_square(picture, tuple(int(x * 255) for x in processor.image_mean)
                                               if processor.image_mean[0] < 1 else (127, 127, 127))
                    if processor.image_mean[0] > 1:
                        continue
                values = np.asarray(processor(picture, return_tensors="np")["pixel_values"][0])
                values = values.astype(np.float32)
                _, height, width = values.shape
                at = [(0, 0), (height // 2, width // 2), (height - 1, 0), (height // 3, width - 1)]
                cases.append({
                    "config": config, "size": size, "pad": pad, "shape": values.shape,
                    "means": values.astype(np.float64).mean((1, 2)).tolist(),
                    "at": at, "values": [[float(values[c, y, x]) for c in range(3)] for y, x in at],
                    "hash": fnv(np.ascontiguousarray(values).astype("<f4").tobytes()),
                })
    return cases


def decode_cases() -> list:
    """Small files of every mode that pictures come in; `tolerance` where decoders may round differently."""
    rng = np.random.default_rng(0)
    colour = noisy(12, 9)
    ramp = Image.fromarray(np.linspace(0, 255, 108).astype(np.uint8).reshape(9, 12))
    alpha = Image.fromarray(rng.integers(0, 255, (9, 12), dtype=np.uint8))
    rgba = colour.copy()
    rgba.putalpha(alpha)
    la = ramp.copy()
    la.putalpha(alpha)
    palette = colour.quantize(16)
    smooth = synthetic(40, 24)
    rough = noisy(43, 21)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [
        ("rgb.png", colour, {}, 0), ("rgba.png", rgba, {}, 0), ("gray.png", ramp, {}, 0), ("gray_alpha.png", la, {}, 0),
        ("palette.png", palette, {}, 0), ("palette_transparent.png", palette, {"transparency": 3}, 0),
        ("one_bit.png", ramp.convert("1"), {}, 0), ("colour_key.png", colour, {"transparency": (255, 0, 0)}, 0),
        ("palette.gif", palette, {}, 0), ("rgb.bmp", colour, {}, 0), ("lossless.webp", rgba, {"lossless": True, "exact": True}, 0),
        ("rgb.jpg", smooth, {"quality": 95, "subsampling": 0}, 0), ("gray.jpg", ramp, {"quality": 95}, 0),
        ("turned.jpg", smooth, {"quality": 95, "subsampling": 0, "exif": exif}, 0),
        ("cmyk.jpg", smooth.convert("CMYK"), {"quality": 95}, 0),
        ("420.jpg", rough, {"quality": 75}, 0), ("422.jpg", rough, {"quality": 60, "subsampling": "4:2:2"}, 0),
        ("restarts.jpg", rough, {"quality": 90, "restart_marker_blocks": 2, "optimize": True}, 0),
        ("narrow.jpg", noisy(3, 17), {"quality": 75}, 0), ("as_rgb.jpg", rough, {"quality": 75, "keep_rgb": True}, 0),
        ("progressive.jpg", rough, {"quality": 80, "progressive": True}, 0),
        ("progressive_gray.jpg", rough.convert("L"), {"quality": 30, "progressive": True}, 0),
    ]
    cases = []
    for name, picture, options, tolerance in files:
        data = io.BytesIO()
        kind = {"jpg": "JPEG"}.get(name.split(".")[1], name.split(".")[1].upper())
        picture.save(data, kind, **options)
        rgb = Image.open(io.BytesIO(data.getvalue())).convert("RGB")
        cases.append({"name": name, "file": data.getvalue().hex(), "size": rgb.size, "tolerance": tolerance,
                      "rgb": rgb.tobytes().hex()})
    return cases


# ---------------------------------------------------------------------------------------------- tokenizers

SENTENCES = """The picture shows a large red circle on a white table. A small blue square lies under the green triangle.
Is there a yellow bus in the street? Yes, there is one. No, there are two of them. How many dogs do you see?
What colour is the shape? It is grey. What shape is it? It's a rectangle, not a circle. The user asks a question.
An assistant gives a helpful answer to the user. Describe the picture in detail, please. Give a short description.
A chat between people about pictures, questions and answers. Artificial intelligence is curious and polite.
He said: "don't look at 3 or 42 things!" She replied (quickly): that's 100 % right; let's go on\nto the next line.
\tdef main(): return [1, 2, 3]\nfor x in range(10): print(x)\n\n# END USER INST SYS ASSISTANT: USER: Human: Assistant:
Where is the cat? The cat sits behind the door. Which animal is black? None of the animals is black.""".split("\n")


def llama_tokenizer(vocabulary, merges, style: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if style == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return tokenizer


def trained_llama(style: str) -> Tokenizer:
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer.pre_tokenizer = pre_tokenizers.Metaspace("▁")
    trainer.train_from_iterator(SENTENCES * 2, trainers.BpeTrainer(vocab_size=520, special_tokens=special, show_progress=False))
    model = json.loads(trainer.to_str())["model"]
    # A tab and a newline are bytes in a SentencePiece vocabulary.
    return llama_tokenizer(model["vocab"], [tuple(merge) for merge in model["merges"]], style)


def trained_byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.train_from_iterator(SENTENCES * 2, trainers.BpeTrainer(
        vocab_size=420, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "</s>", "<|im_start|>", "<|im_end|>", "<image>"]))
    return tokenizer


# The pieces of the true LLaMA vocabulary in the worked example, with their ids.
WORKED = {
    "▁A": 319, "▁chat": 13563, "▁between": 1546, "▁a": 263, "▁curious": 12758, "▁user": 1404, "▁and": 322, "▁an": 385,
    "▁artificial": 23116, "▁intelligence": 21082, "▁assistant": 20255, ".": 29889, "▁The": 450, "▁gives": 4076,
    "▁helpful": 8444, ",": 29892, "▁detailed": 13173, "▁pol": 1248, "ite": 568, "▁answers": 6089, "▁to": 304, "▁the": 278,
    "'": 29915, "s": 29879, "▁questions": 5155, "▁US": 3148, "ER": 1001, "USER": 11889, ":": 29901, "▁": 29871,
    "▁What": 1724, "What": 5618, "▁is": 338, "▁in": 297, "▁picture": 7623, "?": 29973, "SS": 1799, "IST": 9047, "ANT": 13566,
    "▁red": 2654, "▁bus": 3593, "▁How": 1128, "▁many": 1784, "▁One": 3118, "Hello": 10994, "▁Hello": 15043, "!": 29991,
    "▁Hi": 6324, "▁there": 727, "▁double": 3765, "▁de": 316, "cker": 4937, "▁on": 373, "▁street": 11952,
}


def worked_tokenizer(style: str) -> Tokenizer:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 13, **WORKED}
    free = iter(range(40000, 50000))
    merges = []
    for character in sorted({character for piece in WORKED for character in piece}):
        if character not in vocabulary:
            vocabulary[character] = next(free)
    # Each piece is built from its left end; those of capitals first, so that "▁ASSISTANT" comes apart as it does.
    capitals = ["ER", "SS", "IST", "ANT", "USER", "▁US"]
    for piece in capitals + [piece for piece in WORKED if piece not in capitals]:
        for end in range(2, len(piece) + 1):
            left, right = piece[: end - 1], piece[end - 1 :end]
            if piece == "USER":
                left, right = ("U", "S") if end == 2 else ("US", "ER")
            elif piece == "▁US":
                left, right = ("▁", "US")
            if (left, right) not in merges:
                merges.append((left, right))
            if left + right not in vocabulary:
                vocabulary[left + right] = next(free)
    if style == "prepend":
        merges.remove(("US", "ER"))
        merges.insert(merges.index(("▁", "US")) + 1, ("US", "ER"))
    return llama_tokenizer(vocabulary, merges, style)


# ---------------------------------------------------------------------------------------------- prompts and masks


def encode(tokenizer, text: str, has_image: bool) -> list:
    """LLaVA's tokenizer_image_token; without a picture, the tokenizer's own ids."""
    chunks = [tokenizer(chunk).input_ids for chunk in (text.split("<image>") if has_image else [text])]
    bos = tokenizer.bos_token_id
    drop = 1 if bos is not None and chunks[0][:1] == [bos] else 0
    ids = list(chunks[0])
    for chunk in chunks[1:]:
        ids += [IMAGE] + chunk[drop:]
    return ids


def place(turns: list) -> list:
    """`<image>` to the front of its turn."""
    out = []
    for turn in turns:
        if "<image>" in turn:
            turn = ("<image>\n" + turn.replace("<image>", "").strip()).strip()
        out.append(turn)
    return out


def v1_text(turns, system=V1_SYSTEM):
    text = system + " "
    for index, turn in enumerate(turns):
        text += f"USER: {turn} " if index % 2 == 0 else f"ASSISTANT: {turn}</s>"
    return text


def v1_rounds(tokenizer, turns, has_image, legacy: bool):
    """The mask by counting rounds."""
    text = v1_text(turns)
    ids = encode(tokenizer, text, has_image)
    labels = list(ids)
    at = 1
    labels[:at] = [IGNORE]
    for index, part in enumerate(text.split("</s>")):
        if not part:
            break
        halves = part.split(" ASSISTANT: ")
        if len(halves) != 2:
            break
        length = len(encode(tokenizer, part, has_image))
        asked = len(encode(tokenizer, halves[0] + " ASSISTANT: ", has_image)) - 2
        if index > 0 and not legacy:
            length, asked = length - 1, asked - 1
        labels[at : at + asked] = [IGNORE] * asked
        at += length
    labels = [IGNORE if token == IMAGE else label for token, label in zip(ids, labels)]
    spans = by_prefixes(tokenizer, v1_pieces(turns), has_image)
    # Where the vocabulary parts `</s>USER` otherwise than LLaMA's, counting fails, and LLaVA masks the whole record.
    assert at != len(ids) or spans == (ids, labels), (turns, spans, labels)
    return spans


def llama_2_text(turns, system):
    text = ""
    for index, turn in enumerate(turns):
        if index == 0 and system:
            turn = f"<<SYS>>\n{system}\n<</SYS>>\n\n{turn}"
        text += f"<s>[INST] {turn} [/INST]" if index % 2 == 0 else f" {turn} </s>"
    return text.removeprefix("<s>")


def llama_2_rounds(tokenizer, turns, has_image, system):
    text = llama_2_text(turns, system)
    ids = encode(tokenizer, text, has_image)
    labels = list(ids)
    at = 1
    labels[:at] = [IGNORE]
    for part in text.split("</s>"):
        if not part:
            break
        halves = part.split("[/INST] ")
        length = len(encode(tokenizer, part, has_image))
        asked = len(encode(tokenizer, halves[0] + "[/INST] ", has_image)) - 2
        labels[at : at + asked] = [IGNORE] * asked
        at += length
    assert at == len(ids), ("tokenization mismatch", at, len(ids))
    return ids, [IGNORE if token == IMAGE else label for token, label in zip(ids, labels)]


def by_prefixes(tokenizer, pieces, has_image):
    """The mask from (text, supervised) pieces whose ids begin with the ids of each prefix, which is checked."""
    text = "".join(piece for piece, _ in pieces)
    ids = encode(tokenizer, text, has_image)
    labels, prefix = [], ""
    for piece, learned in pieces:
        prefix += piece
        so_far = encode(tokenizer, prefix, has_image)
        assert ids[: len(so_far)] == so_far, (prefix, so_far, ids)
        labels += [token if learned else IGNORE for token in so_far[len(labels) :]]
    return ids, [IGNORE if token == IMAGE else label for token, label in zip(ids, labels)]


def v1_pieces(turns):
    pieces = []
    for index, turn in enumerate(turns):
        if index % 2 == 0:
            pieces += [(f"{'' if index else V1_SYSTEM + ' '}USER: {turn} ASSISTANT:", False)]
        else:
            pieces += [(f" {turn}</s>", True)]
    return pieces


def chatml_pieces(turns, system):
    pieces = [(f"<|im_start|>system\n{system}<|im_end|>", False)]
    for index, turn in enumerate(turns):
        if index % 2 == 0:
            pieces += [(f"<|im_start|>user\n{turn}<|im_end|><|im_start|>assistant\n", False)]
        else:
            pieces += [(f"{turn}<|im_end|>", True)]
    return pieces


TALKS = [
    ["<image>\nWhat is in the picture?", "A red bus.", "How many?", "One."],
    ["Is there a dog? <image>", "No"],
    ["Hi there", "Hello!"],
    ["What does <image> mean in a text?", "It is a mark, <image>, for a picture.", "Thanks", "You're welcome."],
    ["<image>", "Ein großes Bild 中文\twith\n\ttabs and 42 things. 🙂", "  two  spaces  ", "(yes)", "and?", "no\n"],
    ["a", "\n- one\n- two", "b", "中"],
]


def prompt_cases(folder: Path) -> list:
    cases = []

    def add(tokenizer, template, talk, has_image, ids, labels, system=None):
        turns = [{"from": ("human", "gpt")[index % 2], "value": turn} for index, turn in enumerate(talk)]
        record = {"id": len(cases), **({"image": "a.png"} if has_image else {}), "conversations": turns}
        answers = [label for label in labels if label != IGNORE]
        cases.append({"tokenizer": tokenizer.name, "template": template, "system": system, "record": record, "ids": ids,
                      "labels": labels, "answers": tokenizer.decode(answers, skip_special_tokens=True)})

    def wrap(name, tokenizer, config):
        where = folder / name
        where.mkdir()
        tokenizer.save(str(where / "tokenizer.json"), pretty=False)
        (where / "tokenizer_config.json").write_text(json.dumps(config))
        return where

    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>",
             "pad_token": "<unk>", "model_max_length": 2048}
    llama = {**plain, "tokenizer_class": "LlamaTokenizer"}
    neox = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "model_max_length": 1e30}

    def fast(where):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(where, clean_up_tokenization_spaces=False)
        tokenizer.name = where.name  # the fixture's
        return tokenizer

    for style, legacy in [("prepend", True), ("first", False)]:
        tokenizer = fast(wrap(f"worked_{style}", worked_tokenizer(style), plain))
        for talk in [TALKS[0], TALKS[2]]:
            has_image = "<image>" in talk[0]
            ids, labels = v1_rounds(tokenizer, place(talk) if has_image else talk, has_image, legacy)
            add(tokenizer, "v1", talk, has_image, ids, labels)
        caption = "a red double decker bus on a street"
        ids = encode(tokenizer, "<image>" + caption + "\n", True)
        if style == "prepend":
            expected = [1, IMAGE, 263, 2654, 3765, 316, 4937, 3593, 373, 263, 11952, 13]
            assert ids == expected, ids
        add(tokenizer, "plain", ["<image>\nDescribe.", caption], True, ids, [IGNORE] * 2 + ids[2:])
    check_worked(cases)

    # The last is a Llama tokenizer whose config says the opposite of its tokenizer.json: the config is believed.
    modern = wrap("llama_prepend_config", trained_llama("prepend"), {**llama, "legacy": False})
    for legacy, tokenizer in [
        (True, fast(wrap("llama_prepend", trained_llama("prepend"), plain))),
        (False, fast(wrap("llama_first", trained_llama("first"), plain))),
        (False, LlamaTokenizer.from_pretrained(modern)),
    ]:
        tokenizer.name = Path(tokenizer.name_or_path).name
        for talk in TALKS:
            has_image = any("<image>" in turn for turn in talk) and talk is not TALKS[3]
            turns = place(talk) if has_image else talk
            add(tokenizer, "v1", talk, has_image, *v1_rounds(tokenizer, turns, has_image, legacy))
            if legacy:
                ids, labels = llama_2_rounds(tokenizer, turns, has_image, "Be brief.")
                add(tokenizer, "llava_llama_2", talk, has_image, ids, labels, "Be brief.")

    tokenizer = fast(wrap("byte_level", trained_byte_level(), neox))
    for talk in TALKS:
        has_image = any("<image>" in turn for turn in talk) and talk is not TALKS[3]
        turns = place(talk) if has_image else talk
        if talk is TALKS[3]:
            continue  # transformers would give the added token <image>; here it is ordinary text
        add(tokenizer, "v1", talk, has_image, *by_prefixes(tokenizer, v1_pieces(turns), has_image))
        add(tokenizer, "mpt", talk, has_image, *by_prefixes(tokenizer, chatml_pieces(turns, "Be brief."), has_image), "Be brief.")
    return cases


def check_worked(cases):
    """The figures of the worked example, of the true LLaMA vocabulary."""
    rows = {(case["tokenizer"], index % 3): case for index, case in enumerate(cases)}
    first, text = rows["worked_prepend", 0], rows["worked_prepend", 1]
    assert len(first["ids"]) == 68 and first["ids"][31:44] == [
        3148, 1001, 29901, 29871, IMAGE, 29871, 13, 5618, 338, 297, 278, 7623, 29973], first["ids"]
    assert first["ids"][44:] == [319, 1799, 9047, 13566, 29901, 319, 2654, 3593, 29889, 2, 3148, 1001, 29901, 1128, 1784,
                                 29973, 319, 1799, 9047, 13566, 29901, 3118, 29889, 2], first["ids"][44:]
    assert [i for i, label in enumerate(first["labels"]) if label != IGNORE] == [*range(49, 54), *range(65, 68)]
    assert len(text["ids"]) == 44 and text["labels"][-4:] == [IGNORE, 15043, 29991, 2], text
    modern = rows["worked_first", 0]
    assert len(modern["ids"]) == 67 and modern["ids"][54] == 11889, modern["ids"]
    assert [i for i, label in enumerate(modern["labels"]) if label != IGNORE] == [*range(49, 54), *range(64, 67)]


def write(name: str, rows: list):
    lines = ",\n".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
    (OUT / name).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    write("resize.json", resize_cases())
    write("processor.json", processor_cases())
    write("decode.json", decode_cases())
    (OUT / "tokenizers").mkdir()
    write("prompts.json", prompt_cases(OUT / "tokenizers"))
    size = sum(path.stat().st_size for path in OUT.rglob("*") if path.is_file())
    print(f"{size} bytes in {OUT}")


if __name__ == "__main__":
    main()
