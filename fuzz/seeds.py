"""Fills corpus/ with the valid files to start from: the small fixtures of ../tests/golden, and what lies inside them."""

import json
from pathlib import Path

# A fuzzer gets no further with larger ones.
MAX_SEED = 100_000
ENDINGS = {
    ".safetensors": "safetensors", ".gguf": "gguf", ".bin": "torch_bin", ".pt": "torch_bin", ".model": "tokenizers",
    ".png": "pictures", ".jpg": "pictures", ".webp": "pictures", ".gif": "pictures", ".bmp": "pictures",
    ".jsonl": "records",
}
HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent / "tests" / "golden"


def target_of(path):
    if path.name in ("tokenizer.json", "smollm.json"):
        return "tokenizers"
    if path.name == "data.json":
        return "records"
    return "configs" if path.name.endswith("config.json") else ENDINGS.get(path.suffix)


def seeds():
    for path in sorted(GOLDEN.rglob("*")):
        if path.is_file() and target_of(path):
            yield target_of(path), path.read_bytes()
    for case in json.loads((GOLDEN / "data" / "decode.json").read_text()):
        yield "pictures", bytes.fromhex(case["file"])
    for template in json.loads((GOLDEN / "chat" / "templates.json").read_text())["templates"]:
        yield "tokenizers", template["template"].encode()
        for case in template["cases"]:
            yield "records", json.dumps({"messages": case["messages"]}).encode()


count = 0
for target, seed in seeds():
    if len(seed) <= MAX_SEED:
        folder = HERE / "corpus" / target
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"seed-{count:04}").write_bytes(seed)
        count += 1
print(f"{count} seeds")
