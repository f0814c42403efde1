"""Packs the easy-VQA data set (PyPI package easy-vqa 1.0, MIT licence) into one small file, losslessly.

Layout of easy_vqa.bin; every integer is little-endian:

    8 bytes   "EASYVQA1"
    u32       number of answers A, then A strings   (answers.txt's order; a string is one u8 length and that many bytes of UTF-8)
    u32       number of sentences S, then S strings (every question sentence once, sorted)
    then twice, for the training split and for the test split:
        u32       number of pictures P
        u32       number of questions Q
        u32       length in bytes of the PNG that follows
        bytes     one PNG, 8-bit RGB, 1,024 pixels wide: pictures of 64x64 in rows of 16.  Picture i is at
                  x = 64 * (i mod 16), y = 64 * (i / 16); the last row may be filled up with black
        Q x 4     u16 picture index, u8 sentence index, u8 answer index    (the order of questions.json)

The file ends there.  The picture index is the number in the data set's file name.
Usage: python pack_easy_vqa.py OUT.bin    (needs easy-vqa and pillow; also writes the licence beside it, as easy_vqa.LICENSE)
"""

import importlib.metadata
import io
import os
import struct
import sys

import easy_vqa
from PIL import Image

COLUMNS, SIDE = 16, 64


def strings(items: list[str]) -> bytes:
    return struct.pack("<I", len(items)) + b"".join(struct.pack("<B", len(s.encode())) + s.encode() for s in items)


def sheet(paths: dict[int, str]) -> bytes:
    assert sorted(paths) == list(range(len(paths)))
    rows = -(-len(paths) // COLUMNS)
    canvas = Image.new("RGB", (COLUMNS * SIDE, rows * SIDE))
    for i, path in paths.items():
        picture = Image.open(path)
        assert picture.mode == "RGB" and picture.size == (SIDE, SIDE), path
        canvas.paste(picture, (SIDE * (i % COLUMNS), SIDE * (i // COLUMNS)))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def pack() -> bytes:
    splits = [(easy_vqa.get_train_image_paths(), easy_vqa.get_train_questions()), (easy_vqa.get_test_image_paths(), easy_vqa.get_test_questions())]
    answers = easy_vqa.get_answers()
    sentences = sorted({q for _, (questions, _, _) in splits for q in questions})
    out = [b"EASYVQA1", strings(answers), strings(sentences)]
    for paths, (questions, given, images) in splits:
        png = sheet({int(k): v for k, v in paths.items()})
        out.append(struct.pack("<III", len(paths), len(questions), len(png)) + png)
        out += [struct.pack("<HBB", int(i), sentences.index(q), answers.index(a)) for q, a, i in zip(questions, given, images)]
    return b"".join(out)


def unpack(data: bytes):
    """The inverse, to check the file and to show how it is read: answers, sentences, [(pictures, questions)] * 2."""
    position = 8
    assert data[:8] == b"EASYVQA1"

    def take(layout: str):
        nonlocal position
        values = struct.unpack_from("<" + layout, data, position)
        position += struct.calcsize("<" + layout)
        return values

    tables = [[take(f"{take('B')[0]}s")[0].decode() for _ in range(take("I")[0])] for _ in range(2)]
    splits = []
    for _ in range(2):
        pictures, questions, length = take("III")
        canvas = Image.open(io.BytesIO(data[position : position + length]))
        position += length
        boxes = [(SIDE * (i % COLUMNS), SIDE * (i // COLUMNS)) for i in range(pictures)]
        splits.append(([canvas.crop((x, y, x + SIDE, y + SIDE)) for x, y in boxes], [take("HBB") for _ in range(questions)]))
    assert position == len(data)
    return *tables, splits


def check(data: bytes) -> None:
    answers, sentences, splits = unpack(data)
    originals = [(easy_vqa.get_train_image_paths(), easy_vqa.get_train_questions()), (easy_vqa.get_test_image_paths(), easy_vqa.get_test_questions())]
    for (pictures, questions), (paths, (asked, given, images)) in zip(splits, originals):
        assert all(pictures[int(i)].tobytes() == Image.open(path).tobytes() for i, path in paths.items())
        assert [(i, sentences[q], answers[a]) for i, q, a in questions] == list(zip(map(int, images), asked, given))


if __name__ == "__main__":
    packed = pack()
    check(packed)
    with open(sys.argv[1], "wb") as f:
        f.write(packed)
    licence = next(p for p in importlib.metadata.files("easy-vqa") if p.name == "LICENSE")
    with open(os.path.join(os.path.dirname(sys.argv[1]) or ".", "easy_vqa.LICENSE"), "w") as f:
        f.write(licence.read_text())
    print(f"{len(packed)} bytes; every picture and question checked")
