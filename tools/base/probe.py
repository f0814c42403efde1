"""Linear probe: are color and shape of easy-VQA's training pictures linearly readable from the tower's features?

Fits softmax regression on the features of four fifths of the pictures whose color (shape) the training questions give away,
and reports both parts.  Usage: python probe.py BASE_DIR PACKED    (needs torch, transformers, pillow)
"""

import re
import sys

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

import pack_easy_vqa

COLORS = ["green", "red", "gray", "teal", "black", "yellow", "brown", "blue"]
SHAPES = ["circle", "rectangle", "triangle"]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def facts(sentences, answers, questions):
    """picture -> {"color": word, "shape": word}, as far as its questions and answers say so."""
    out = {}
    for picture, sentence, answer in questions:
        text, given = sentences[sentence], answers[answer]
        denied = given == ("yes" if " not " in text or " no " in text else "no")
        for word in [given] + ([] if denied else re.findall("[a-z]+", text)):
            for kind, values in [("color", COLORS), ("shape", SHAPES)]:
                if word in values:
                    out.setdefault(picture, {})[kind] = word
    return out


def fit(x, y, count, steps=400):
    cut = len(x) * 4 // 5
    x = (x - x[:cut].mean(0)) / (x[:cut].std(0) + 1e-5)
    w, b = torch.zeros(x.shape[1], count, requires_grad=True), torch.zeros(count, requires_grad=True)
    optimizer = torch.optim.Adam([w, b], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (torch.nn.functional.cross_entropy(x[:cut] @ w + b, y[:cut]) + 1e-4 * w.square().sum()).backward()
        optimizer.step()
    right = ((x @ w + b).argmax(1) == y).float()
    return right[:cut].mean().item(), right[cut:].mean().item()


def main():
    model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    with open(sys.argv[2], "rb") as f:
        answers, sentences, [(pictures, questions), _] = pack_easy_vqa.unpack(f.read())
    pixels = torch.tensor(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2)
    features = []
    with torch.no_grad():
        for part in pixels.split(500):
            layers = model.model.vision_tower((part / 255 - MEAN) / STD, output_hidden_states=True).hidden_states
            features.append(layers[model.config.vision_feature_layer][:, 1:].flatten(1))
    features, known = torch.cat(features), facts(sentences, answers, questions)
    for kind, values in [("color", COLORS), ("shape", SHAPES)]:
        ids = [i for i in sorted(known) if kind in known[i]]
        train, held = fit(features[ids], torch.tensor([values.index(known[i][kind]) for i in ids]), len(values))
        print(f"{kind}: {len(ids)} pictures, fitted {train:.4f}, held out {held:.4f}")


if __name__ == "__main__":
    sys.exit(main())
