"""From a record to token ids, labels and pixels, by the reference rules of LLaVA's own trainer."""

from dataclasses import dataclass

import numpy
import torch
from PIL import Image

IMAGE_TOKEN_INDEX = -200
IGNORE_INDEX = -100
PLACEHOLDER = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass
class Encoded:
    """One record ready for the model: placeholders expanded, cut to the maximum length."""

    id: str
    input_ids: list
    labels: list
    pixels: torch.Tensor | None  # [1, 3, size, size] float32

    def target_tokens(self):
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


def tokenizer_image_token(text, tokenizer):
    """Each chunk between placeholders is tokenised on its own; the BOS of later chunks is dropped."""
    chunks = [tokenizer(chunk).input_ids for chunk in text.split(PLACEHOLDER)]
    ids = list(chunks[0])
    for chunk in chunks[1:]:
        assert chunk[0] == tokenizer.bos_token_id
        ids += [IMAGE_TOKEN_INDEX] + chunk[1:]
    return ids


def placeholder_first(text):
    """All placeholders of a turn become one, in front, on a line of its own."""
    if PLACEHOLDER not in text:
        return text
    return (PLACEHOLDER + "\n" + text.replace(PLACEHOLDER, "").strip()).strip()


def encode_v1(conversations, tokenizer, legacy):
    """The v1 prompt and its labels by the rounds rule (an answer and its </s> are supervised)."""
    if conversations[0]["from"] != "human":
        conversations = conversations[1:]
    prompt = SYSTEM + " "
    for index, turn in enumerate(conversations):
        assert turn["from"] == ("human", "gpt")[index % 2]
        prompt += ("USER: ", "ASSISTANT: ")[index % 2] + turn["value"] + (" ", "</s>")[index % 2]

    ids = tokenizer_image_token(prompt, tokenizer)
    labels = list(ids)
    labels[0] = IGNORE_INDEX
    current = 1
    for index, round_text in enumerate(text for text in prompt.split("</s>") if text):
        parts = round_text.split(" ASSISTANT: ")
        assert len(parts) == 2
        round_length = len(tokenizer_image_token(round_text, tokenizer))
        instruction_length = len(tokenizer_image_token(parts[0] + " ASSISTANT: ", tokenizer)) - 2
        if index > 0 and not legacy:
            round_length -= 1
            instruction_length -= 1
        labels[current : current + instruction_length] = [IGNORE_INDEX] * instruction_length
        current += round_length
    assert current == len(ids), f"tokenization mismatch: {current} vs {len(ids)}"
    return ids, labels


def encode_plain(conversations, tokenizer):
    """The picture, the first answer and a newline; everything after the picture is supervised, no </s>."""
    assert PLACEHOLDER in conversations[0]["value"]
    ids = tokenizer_image_token(PLACEHOLDER + conversations[1]["value"] + "\n", tokenizer)
    masked = len(tokenizer_image_token(PLACEHOLDER, tokenizer))
    return ids, [IGNORE_INDEX] * masked + ids[masked:]


def encode_ids(record, tokenizer, version, legacy):
    """Ids with IMAGE_TOKEN_INDEX per picture, and labels of the same length."""
    if "text" in record:
        ids = tokenizer(record["text"]).input_ids
        return ids, [IGNORE_INDEX] + ids[1:]
    turns = record["conversations"]
    if "image" in record:
        turns = [{**turn, "value": placeholder_first(turn["value"])} for turn in turns]
    return encode_plain(turns, tokenizer) if version == "plain" else encode_v1(turns, tokenizer, legacy)


def load_pixels(path, processor, aspect_ratio):
    """CLIPImageProcessor's pixels; `pad` first squares the picture with the mean colour."""
    picture = Image.open(path).convert("RGB")
    if aspect_ratio == "pad":
        side = max(picture.size)
        canvas = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in processor.image_mean))
        canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = canvas
    pixels = processor(picture)["pixel_values"][0]
    return torch.from_numpy(numpy.asarray(pixels, dtype=numpy.float32))[None]


def encode(record, context, version="v1", aspect_ratio="square", max_length=2048):
    """Everything the model needs for one record; `context` is a golden.checkpoint.Checkpoint."""
    ids, labels = encode_ids(record, context.tokenizer, version, context.legacy)
    input_ids, expanded = [], []
    for token, label in zip(ids, labels):
        if token == IMAGE_TOKEN_INDEX:
            input_ids += [context.image_token_id] * context.image_tokens
            expanded += [IGNORE_INDEX] * context.image_tokens
        else:
            input_ids.append(token)
            expanded.append(label)
    pixels = None
    if IMAGE_TOKEN_INDEX in ids:
        pixels = load_pixels(context.images / record["image"], context.processor, aspect_ratio)
    return Encoded(record["id"], input_ids[:max_length], expanded[:max_length], pixels)
