#!/usr/bin/env python3
"""Writes tests/golden/parity: tiny random LLaVA models with what PyTorch, transformers and PEFT compute from them.

    python tools/golden_parity.py [--out DIR] [CASE]...

Each case is a folder with a model, data, train configs, adapters and expected.json; tests/README.md says what the
numbers mean. The whole set takes a few minutes on one core. Needs torch, transformers, peft and pillow; the
versions used are recorded in every expected.json.
"""

import argparse
import json
import re
import shutil
import warnings
from pathlib import Path

import torch
import transformers

from golden.cases import CASES
from golden.checkpoint import Checkpoint, four_bits, write_adapter, write_model
from golden.precision import library_versions
from golden.records import INSTRUCTIONS, captions, draw_pictures, to_score, write_rows
from golden.reference import encode, encode_ids
from golden.training import greedy, score, search, train

ROOT = Path(__file__).resolve().parent.parent
DIGITS = 8  # significant digits kept in expected.json


def rounded(value):
    """Numbers with DIGITS significant digits, through lists and objects."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return value


def toml_text(settings):
    """Top-level keys only, which is all a train config of one stage needs."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())


def write_inputs(folder, case):
    """Everything but expected.json. Returns the opened checkpoint."""
    write_model(folder / "model", case)
    draw_pictures(folder / "images", case.seed)
    write_rows(folder / case.data_name, INSTRUCTIONS)
    write_rows(folder / "captions.json", captions())
    write_rows(folder / "score.json", to_score())
    checkpoint = Checkpoint.open(folder / "model", folder / "images")
    for number, run in enumerate(case.runs):
        settings = {
            "model_name_or_path": "model",
            "data_path": case.data_name,
            "image_folder": "images",
            "precision": "float32",
            "shuffle": False,
            **run.settings,
        }
        if run.settings["method"] in ("lora", "qlora"):
            settings["adapter_name_or_path"] = f"adapter-{run.name}"
            write_adapter(folder / f"adapter-{run.name}", checkpoint, run, case.seed + number, case.linear_projector)
        (folder / f"{run.name}.toml").write_text(toml_text(settings))
    for kind, double in case.packed:
        # As transformers and bitsandbytes write a model in four bits.
        packed = checkpoint.load(double=False, quantization=four_bits(kind, double))
        packed.save_pretrained(folder / f"model-{kind}")
        for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
            shutil.copy(folder / "model" / name, folder / f"model-{kind}")
    return checkpoint


def largest_relative(rows, other, key):
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(rows, other))


def largest_difference(lines, other):
    """Between the token log-probabilities of two lists of score lines."""
    pairs = ((x, y) for a, b in zip(lines, other) for x, y in zip(a["token_logprobs"], b["token_logprobs"]))
    return max(abs(x - y) for x, y in pairs)


def expected_training(folder, case, run, checkpoint):
    """Float32 metrics of a run, and how far float64 is from them."""
    path = folder / f"{run.name}.toml"
    steps, trainable = train(checkpoint, path, case.linear_projector, double=False)
    exact, _ = train(checkpoint, path, case.linear_projector, double=True)
    agreement = {
        "loss_relative": largest_relative(steps, exact, "loss"),
        "grad_norm_relative": largest_relative(steps, exact, "grad_norm"),
    }
    for step, precise in zip(steps, exact):
        step["loss_float64"] = precise["loss"]
        step["grad_norm_float64"] = precise["grad_norm"]
    print(f"  {run.name}: loss {steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}, float64 within", agreement)
    result = {"config": path.name, "trainable_parameters": trainable, "float64": agreement, "steps": steps}
    if run.settings["method"] in ("lora", "qlora"):
        adapter = f"adapter-{run.name}"
        rows = json.loads((folder / "score.json").read_text())
        result |= {"adapter": adapter, "adapter_score": score(checkpoint, rows, False, folder / adapter)}
    return result


def prompts(checkpoint):
    """Questions with and without a picture, encoded."""
    for prompt, image in (("What is in the picture?", "tall.png"), ("Which is longer?", None)):
        question = ("<image>\n" if image else "") + prompt
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": ""}]
        record = {"id": "generate", "conversations": turns} | ({"image": image} if image else {})
        # The prompt is the conversation up to the answer: without the last "▁" and </s> of the empty one.
        encoded = encode(record, checkpoint)
        encoded.input_ids = encoded.input_ids[:-2]
        yield prompt, image, encoded


def expected_generation(checkpoint):
    """Greedy answers, as far as the best token is a safe winner."""
    results = []
    for prompt, image, encoded in prompts(checkpoint):
        ids = greedy(checkpoint, encoded, new_tokens=12)
        results.append(
            {
                "prompt": prompt,
                "image": image,
                "prompt_tokens": len(encoded.input_ids),
                "token_ids": ids,
                "text": checkpoint.tokenizer.decode(ids, skip_special_tokens=True),
            }
        )
    return results


SEARCHES = [
    {"num_beams": 5},
    {"num_beams": 3, "repetition_penalty": 1.3},
    {"num_beams": 4, "length_penalty": -0.5},
    {"num_beams": 1, "repetition_penalty": 1.5},
]


def expected_search(checkpoint):
    """Answers of transformers' own `generate` without sampling."""
    return [
        {"prompt": prompt, "image": image, **settings, "token_ids": search(checkpoint, encoded, settings)}
        for prompt, image, encoded in prompts(checkpoint)
        for settings in SEARCHES
    ]


def expected(folder, case, checkpoint):
    rows = json.loads((folder / "score.json").read_text())
    single, exact = (score(checkpoint, rows, double) for double in (False, True))
    ids = [encode_ids(row, checkpoint.tokenizer, "v1", checkpoint.legacy) for row in rows]
    print(f"  score: float64 within {largest_difference(single, exact):.1e}")
    packed = {
        f"model-{kind}": score(checkpoint, rows, False, quantization=four_bits(kind, double))
        for kind, double in case.packed
    }
    packed = {"packed_score": packed} if packed else {}
    return packed | {
        "about": case.about,
        "versions": library_versions(),
        "score": single,
        "score_float64_difference": largest_difference(single, exact),
        "encoded": [{"id": row["id"], "ids": i, "labels": labels} for row, (i, labels) in zip(rows, ids)],
        "generate": expected_generation(checkpoint),
        "search": expected_search(checkpoint),
        "train": {run.name: expected_training(folder, case, run, checkpoint) for run in case.runs},
    }


def one_line_lists(text):
    """json.dumps with an indent, but lists of numbers on one line."""
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda match: " ".join(match.group().split()), text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="names of cases (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "tests/golden/parity")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for case in CASES:
        if arguments.cases and case.name not in arguments.cases:
            continue
        print(case.name)
        folder = arguments.out / case.name
        if folder.exists():
            shutil.rmtree(folder)
        checkpoint = write_inputs(folder, case)
        numbers = rounded(expected(folder, case, checkpoint))
        (folder / "expected.json").write_text(one_line_lists(json.dumps(numbers, indent=1)) + "\n")
        for path in folder.rglob("*.safetensors"):
            path.chmod(0o644)


if __name__ == "__main__":
    main()
