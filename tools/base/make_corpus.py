"""Writes the text the language model of the tiny base learns from: corpus.json, in LLaVA's record format.

Three kinds of records: conversations about a described shape (template v1; most of them), descriptions that end in a short
caption, and single sentences (both plain text).  Three lessons: single words asked about a bare "red circle"; the same with
negations and about wordy descriptions; and whole questions.
Usage: python make_corpus.py OUT.json [--lesson words|short|worded] [--records 16000] [--seed 1]
"""

import argparse
import json
import random
import re

import words


LESSONS = ["words", "short", "worded"]
# How many of the descriptions are bare, and how many of the short questions are negated.
BARE = {"words": 1.0, "short": 0.5, "worded": 0.0}
NEGATED = {"words": 0.0, "short": 0.1}


def conversation(rng: random.Random, lesson: str) -> list[dict]:
    scene = words.random_scene(rng)
    text = f"{scene.color} {scene.shape}" if BARE[lesson] and rng.random() < BARE[lesson] else words.describe(scene, rng)
    # In a record with a picture the template leaves spaces around it; half of the descriptions stand like that too.
    text = f" {text} \n" if rng.random() < 0.5 else f"{text}\n"
    turns = []
    for i in range(rng.choice([1, 1, 2, 4, 6, 8]) if lesson == "worded" else 10):
        question, answer = words.question(scene, rng) if lesson == "worded" else words.short_question(scene, rng, NEGATED[lesson])
        turns.append({"from": "human", "value": (text if i == 0 else "") + question})
        turns.append({"from": "gpt", "value": answer})
    return turns


def plain(rng: random.Random) -> str:
    scene = words.random_scene(rng)
    if rng.random() < 0.7:
        return f"{words.tags(scene, rng)} a {scene.color} {scene.shape}\n"
    return words.sentence(scene, rng)


def records(count: int, seed: int, lesson: str = "worded", plain_share: float = 0.12) -> list[dict]:
    rng = random.Random(seed)
    out = []
    for i in range(count):
        if rng.random() < plain_share:
            out.append({"id": f"text-{i}", "text": plain(rng)})
        else:
            out.append({"id": f"talk-{i}", "conversations": conversation(rng, lesson)})
    return out


def texts(data: list[dict]) -> list[str]:
    return [r["text"] if "text" in r else "\n".join(t["value"] for t in r["conversations"]) for r in data]


def normalise(text: str) -> str:
    return " " + " ".join(re.findall(r"[a-z0-9]+", text.lower())) + " "


def check(data: list[dict], sentences: list[str]) -> None:
    """Stops if any of the sentences occurs anywhere in the corpus, whatever its case and punctuation."""
    banned = {normalise(s) for s in sentences}
    for record in data:
        for turn in [record["text"]] if "text" in record else [t["value"] for t in record["conversations"]]:
            text = normalise(turn)
            hit = next((b for b in banned if b in text), None)
            if hit:
                raise SystemExit(f"record {record['id']} holds the held-out sentence{hit}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--records", type=int, default=16000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lesson", choices=LESSONS, default="worded")
    parser.add_argument("--no-check", action="store_true", help="skip the check against easy-VQA's questions (needs the package easy-vqa)")
    args = parser.parse_args()
    data = records(args.records, args.seed, args.lesson, 0.0 if args.lesson == "words" else 0.12)
    if not args.no_check:
        import easy_vqa

        sentences = sorted(set(easy_vqa.get_train_questions()[0]) | set(easy_vqa.get_test_questions()[0]))
        check(data, sentences)
        print(f"none of the {len(sentences)} question sentences of easy-VQA occurs in {len(data)} records")
    with open(args.out, "w") as f:
        json.dump(data, f, indent=0)
