"""The shapes a LLaVA folder takes in the wild, made from one that transformers has just saved.

saved     as this version of transformers writes it: `language_model.model.*`, `vision_tower.*` without the inner
          `vision_model`, every key of the sub-configs written out, `rope_parameters`
released  as the released llava-hf folders are: `vision_tower.vision_model.*`, sub-configs without the keys that have
          their default value, `rope_theta` beside the other keys, `torch_dtype`
runtime   tensors named as the running model names them: `model.language_model.*`, `lm_head`, `model.vision_tower.*`
"""

import json
import re
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig

RENAMES = {
    "saved": [],
    "released": [(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.")],
    "runtime": [
        (r"^language_model\.lm_head", "lm_head"),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    ],
}


def rewrite(folder: Path, layout):
    """Renames the tensors of a one-file folder, and for `released` makes its config sparse."""
    if layout == "saved":
        return
    path = folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(path).items():
        for pattern, replacement in RENAMES[layout]:
            name = re.sub(pattern, replacement, name)
        tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    if layout == "released":
        path = folder / "config.json"
        path.write_text(json.dumps(released_config(json.loads(path.read_text())), indent=2) + "\n")


def released_config(config):
    """config.json as transformers 4 wrote it, with only the keys that differ from their defaults."""
    text, vision = config["text_config"], config["vision_config"]
    rope = text.pop("rope_parameters")["rope_theta"]
    if text["num_key_value_heads"] == text["num_attention_heads"]:
        del text["num_key_value_heads"]
    del text["head_dim"]
    text = sparse(text, LlamaConfig().to_dict())
    if rope != 10000.0:
        text["rope_theta"] = rope
    text["torch_dtype"] = "float32"
    config |= {"text_config": text, "vision_config": sparse(vision, CLIPVisionConfig().to_dict())}
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.37.2"
    return config


def sparse(config, defaults):
    return {key: value for key, value in config.items() if key == "model_type" or defaults.get(key) != value}


def preprocessor(side, numbers_only):
    """preprocessor_config.json, with sizes as objects (current files) or as plain numbers (old ones)."""
    config = {
        "crop_size": side if numbers_only else {"height": side, "width": side},
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": side if numbers_only else {"shortest_edge": side},
    }
    if numbers_only:
        return {**config, "feature_extractor_type": "CLIPFeatureExtractor"}
    extra = {"do_convert_rgb": True, "do_rescale": True, "rescale_factor": 0.00392156862745098}
    return {**config, **extra, "image_processor_type": "CLIPImageProcessor"}
