"""The data of a case: small pictures of odd sizes and modes, and records in LLaVA's JSON format."""

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

# name, width x height, Pillow mode
PICTURES = [
    ("wide.png", (37, 23), "RGB"),
    ("tall.png", (19, 52), "RGB"),
    ("grey.png", (64, 64), "L"),
    ("alpha.png", (51, 30), "RGBA"),
    ("palette.png", (29, 43), "P"),
]


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


# Pictures and text-only records, one and several turns, the placeholder before and after the question, a record
# that starts with an answer (dropped by the loader), characters outside the vocabulary (byte pieces), unequal lengths.
INSTRUCTIONS = [
    {
        "id": "picture-two-turns",
        "image": "wide.png",
        "conversations": [
            human("<image>\nWhat is in the picture?"),
            gpt("A red box."),
            human("How many?"),
            gpt("One."),
        ],
    },
    {"id": "text-short", "conversations": [human("Which is longer?"), gpt("The first one.")]},
    {
        "id": "picture-last",
        "image": "tall.png",
        "conversations": [human("Is there a line in it?\n<image>"), gpt("Yes. There is a blue line under the box.")],
    },
    {
        "id": "text-three-turns",
        "conversations": [
            gpt("(an answer before any question)"),
            human("Tell me about rivers."),
            gpt("A river carries water from the hills to the sea."),
            human("Warm or cold?"),
            gpt("Cold: about 4 °C, naïvely."),
            human("Thanks"),
            gpt("Yes."),
        ],
    },
    {
        "id": "picture-bytes",
        "image": "alpha.png",
        "conversations": [human("<image>\nWhat colour is it? 色?"), gpt("Blue — 青.\nAnd a little green.")],
    },
    {"id": "picture-one-word", "image": "grey.png", "conversations": [human("<image>\nA line?"), gpt("No")]},
    {
        "id": "picture-palette",
        "image": "palette.png",
        "conversations": [
            human("<image>\nWhat colour is the box, and how many lines are there in the picture?"),
            gpt("The picture shows a green box and two lines. One is darker than the one before it."),
            human("Is it?"),
            gpt("Yes."),
        ],
    },
]

CAPTIONS = [
    ("wide.png", "A red box and a blue line", None),
    ("tall.png", "two lines, each a little darker than the one before it", None),
    ("grey.png", "a box", None),
    ("alpha.png", "Three boxes in a row: 1, 2, 3", "A second question is ignored?"),
    ("palette.png", "the green box on the left", None),
    ("wide.png", "box, line", None),
]


def captions():
    """Stage-one records: the question is thrown away by `plain`, and so are turns after the first answer."""
    rows = []
    for index, (image, text, second) in enumerate(CAPTIONS):
        turns = [human(["<image>\nDescribe it.", "What is it?\n<image>"][index % 2]), gpt(text)]
        if second:
            turns += [human(second), gpt("And so is this answer.")]
        rows.append({"id": f"caption-{index}", "image": image, "conversations": turns})
    return rows


def to_score():
    """Records for `score`: conversations, and a bare text."""
    wanted = ("picture-two-turns", "text-three-turns", "picture-bytes")
    rows = [row for row in INSTRUCTIONS if row["id"] in wanted]
    return rows + [{"id": "bare-text", "text": "A river carries water to the sea.\nThe sea is wide."}]


def draw_pictures(folder: Path, seed):
    """Smooth gradients with a few shapes: small files whose resampling still shows every mistake."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    for name, (width, height), mode in PICTURES:
        picture = Image.new("RGB", (width, height))
        a, b, c = (rng.randrange(2, 7) for _ in range(3))
        for y in range(height):
            for x in range(width):
                picture.putpixel((x, y), ((a * x + y) % 256, (b * y + 2 * x) % 256, (c * (x + y)) % 256))
        draw = ImageDraw.Draw(picture)
        for _ in range(3):
            colour = tuple(rng.randrange(256) for _ in range(3))
            x, y = rng.randrange(width - 8), rng.randrange(height - 8)
            draw.rectangle((x, y, x + rng.randrange(3, 20), y + rng.randrange(2, 12)), fill=colour)
        if mode == "P":
            picture = picture.quantize(16)
        elif mode == "RGBA":
            picture.putalpha(Image.linear_gradient("L").resize((width, height)))
        elif mode != "RGB":
            picture = picture.convert(mode)
        picture.save(folder / name, optimize=True)


def write_rows(path: Path, rows):
    """One JSON array, or JSON Lines when the name ends so."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
