#!/usr/bin/env python3
"""Writes tests/golden/tiny_fixture.json: a LLaVA whose weights come from a hash, with its outputs and gradients.

    python tools/golden_tiny_fixture.py [--out FILE] [--check]

No weights are stored; golden/hash_rule.py says how to make them. Tensor number t is the index of the tensor's name
in the byte-wise sorted list of all names, in the layout `language_model.model.*`, `language_model.lm_head.weight`,
`multi_modal_projector.*`, `vision_tower.vision_model.*`. Norm gains are 1 + 0.1 u, biases 0.05 u, the rest 0.2 u;
pixel_values are u of tensor number 1000. LoRA number k (layers in order; q, k, v, o, gate, up, down) has
A = 0.2 u(2000 + 2k), B = 0.2 u(2001 + 2k). --check only compares with the figures in REMEMBERED.
"""

import argparse
import json
import re
from pathlib import Path

import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from golden.hash_rule import tensor, uniform
from golden.precision import float64_mode, library_versions

ROOT = Path(__file__).resolve().parent.parent
INPUT_IDS = [1, 5, 9, 60, 60, 60, 60, 7, 3, 11, 20, 33, 2]
LABELS = [-100] * 9 + [11, 20, 33, 2]
LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LINEARS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]

# Figures of an earlier, independent run (transformers 4.57.1, float32): a change of library must not move them.
REMEMBERED = {
    "mlp2x_gelu": {
        "loss": 4.3597207,
        "logits_norm": 28.223448,
        "gradient_norm": 16.3518892,
        "full": [4.3597207, 2.4954824, 1.5982531, 1.1081455, 0.8042935],
        "projector": [4.3597207, 4.0640321, 3.7814677, 3.5116200, 3.2614536],
        "lora": [4.1536045, 3.7097156, 3.3324928, 3.0260663, 2.7816646],
    },
    "linear": {
        "loss": 4.6731744,
        "logits_norm": 27.399490,
        "gradient_norm": 15.1076633,
        "full": [4.6731744, 2.9154520, 1.9406240, 1.2731347, 0.8446033],
        "projector": [4.6731744, 4.5559454, 4.4401979, 4.3269606, 4.2172170],
        "lora": [4.5379119, 4.1803284, 3.8589172, 3.5767269, 3.3284428],
    },
}


class LowRank(torch.nn.Module):
    """A frozen linear with an adapter: W x + 2 B A x."""

    def __init__(self, linear, number):
        super().__init__()
        self.linear = linear
        kind = linear.weight.dtype
        self.lora_A = torch.nn.Parameter(tensor(2000 + 2 * number, (2, linear.in_features), 0.2).to(kind))
        self.lora_B = torch.nn.Parameter(tensor(2001 + 2 * number, (linear.out_features, 2), 0.2).to(kind))

    def forward(self, x):
        return self.linear(x) + 2.0 * ((x @ self.lora_A.T) @ self.lora_B.T)


def stored_name(name):
    """From the running model's parameter name to the name that numbers the tensors."""
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    name = re.sub(r"^lm_head", "language_model.lm_head", name)
    name = re.sub(r"^model\.(vision_tower|multi_modal_projector)\.", r"\1.", name)
    return re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name)


def build(projector, double=False):
    """The model of the fixture; a linear projector's identity `linear_2` has no number."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=64,
            rms_norm_eps=1e-5,
        ),
        image_token_index=60,
        projector_hidden_act="gelu" if projector == "mlp2x_gelu" else "linear",
        attn_implementation="eager",
    )
    model = LlavaForConditionalGeneration(config).eval()
    parameters = {stored_name(name): weight for name, weight in model.named_parameters()}
    if projector == "linear":
        torch.nn.init.eye_(parameters.pop("multi_modal_projector.linear_2.weight").data)
        torch.nn.init.zeros_(parameters.pop("multi_modal_projector.linear_2.bias").data)
    for number, name in enumerate(sorted(parameters, key=str.encode)):
        weight = parameters[name]
        scale, offset = 0.2, 0.0
        if name.endswith(".bias"):
            scale = 0.05
        elif weight.ndim == 1 and name.endswith(".weight"):
            scale, offset = 0.1, 1.0
        weight.data = tensor(number, weight.shape, scale, offset)
    if double:
        model.double()
    return model, parameters


def pixel_values(model):
    return torch.from_numpy(uniform(1000, (1, 3, 28, 28))).float().to(model.lm_head.weight.dtype)


def forward(model):
    """Loss of the fixture's only batch, and the model's whole output."""
    output = model(input_ids=torch.tensor([INPUT_IDS]), pixel_values=pixel_values(model), use_cache=False)
    loss = torch.nn.functional.cross_entropy(output.logits[0, 8:-1], torch.tensor(LABELS[9:]))
    return loss, output


def add_adapters(model):
    linears = [(layer, name) for layer in model.model.language_model.layers for name in LINEARS]
    for number, (layer, name) in enumerate(linears):
        parent = layer.get_submodule(name.split(".")[0])
        setattr(parent, name.split(".")[1], LowRank(layer.get_submodule(name), number))


def trainable(model, parameters, mode):
    """Adds adapters for `lora`, then returns what the mode trains."""
    if mode == "lora":
        add_adapters(model)
        adapters = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    elif mode == "full":
        adapters = {name: weight for name, weight in parameters.items() if name.startswith("language_model.")}
    else:
        adapters = {}
    projector = {name: weight for name, weight in parameters.items() if name.startswith("multi_modal_projector.")}
    return {stored_name(name).replace(".linear.", "."): w for name, w in (adapters | projector).items()}


def gradients(weights):
    return {
        name: {"norm": weight.grad.norm().item(), "first": weight.grad.flatten()[:2].tolist()}
        for name, weight in sorted(weights.items())
    }


def figures(tensor_, *starts):
    """Norm and the first four elements at some index tuples."""
    return {
        "norm": tensor_.norm().item(),
        "at": {",".join(map(str, start)): tensor_[start][:4].tolist() for start in starts},
    }


def vision_figures(model):
    hidden = model.model.vision_tower(pixel_values(model), output_hidden_states=True).hidden_states
    features = model.model.multi_modal_projector(hidden[-2][:, 1:])
    states = [figures(state, (0, 0), (0, 1)) for state in hidden[:3]]
    return {"hidden_states": states, "projector": figures(features, (0, 0), (0, 3))}


def greedy(model, count):
    ids = INPUT_IDS[:9]
    for _ in range(count):
        logits = model(input_ids=torch.tensor([ids]), pixel_values=pixel_values(model), use_cache=False).logits
        ids = ids + [int(logits[0, -1].argmax())]
    return ids[9:]


def trajectory(projector, mode, double):
    """Losses before steps 1...12 of AdamW at 1e-3 on the same batch, and the first step's gradients."""
    model, parameters = build(projector, double)
    weights = trainable(model, parameters, mode)
    for weight in model.parameters():
        weight.requires_grad = False
    for weight in weights.values():
        weight.requires_grad = True
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-3, weight_decay=0.0)
    losses, first = [], None
    for _ in range(12):
        optimizer.zero_grad()
        loss, _ = forward(model)
        loss.backward()
        first = first or gradients(weights)
        losses.append(loss.item())
        optimizer.step()
    return {"losses": losses, "gradients": first}


def measure(projector, double):
    with float64_mode(double):
        model, _ = build(projector, double)
        with torch.no_grad():
            loss, output = forward(model)
            logits = output.logits
            result = {
                "loss": loss.item(),
                "vision": vision_figures(model),
                "logits": figures(logits, (0, 2), (0, 12)),
                "argmax": logits[0].argmax(-1).tolist(),
                "greedy": greedy(model, 6),
            }
        result["train"] = {mode: trajectory(projector, mode, double) for mode in ("full", "projector", "lora")}
        norms = [row["norm"] for row in result["train"]["full"]["gradients"].values()]
        result["gradient_norm"] = torch.tensor(norms, dtype=torch.float64).norm().item()
        return result


def close(ours, theirs, tolerance):
    return all(abs(a - b) <= tolerance * abs(b) for a, b in zip(ours, theirs))


def check(projector, ours, double, tolerance=2e-6):
    """Stops if a remembered figure moved; returns the largest relative distance of a loss to float64's."""
    known = REMEMBERED[projector]
    assert close([ours["loss"], ours["logits"]["norm"]], [known["loss"], known["logits_norm"]], tolerance)
    assert close([ours["gradient_norm"]], [known["gradient_norm"]], tolerance)
    far = 0.0
    for mode, run in ours["train"].items():
        assert close(run["losses"], known[mode], tolerance), (projector, mode, run["losses"])
        exact = double["train"][mode]["losses"]
        far = max(far, *(abs(a - b) / b for a, b in zip(run["losses"], exact)))
    return far


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "tests/golden/tiny_fixture.json")
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    result = {"versions": library_versions(), "input_ids": INPUT_IDS, "labels": LABELS}
    for projector in REMEMBERED:
        result[projector] = measure(projector, double=False)
        far = check(projector, result[projector], measure(projector, double=True))
        result[projector]["float64_loss_relative"] = far
        print(f"{projector}: remembered figures hold, float64 within {far:.1e} of every loss")
    if not arguments.check:
        text = json.dumps(json.loads(json.dumps(result), parse_float=lambda x: float(f"{float(x):.8g}")), indent=1)
        arguments.out.write_text(re.sub(r"\[[^\[\]{}\"]*\]", lambda m: " ".join(m.group().split()), text) + "\n")


if __name__ == "__main__":
    main()
