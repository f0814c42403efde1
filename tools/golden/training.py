"""The reference trainer: one record at a time, unpadded, torch.optim.AdamW, the schedules of transformers."""

import itertools
import json
import math
import tomllib

import torch
from transformers import get_scheduler

from .checkpoint import forget_lengths, four_bits
from .masks import Clock, draw_masks
from .precision import float64_mode
from .reference import IGNORE_INDEX, encode


def token_losses(model, record):
    """Negative log-likelihood of every supervised token (its own position is never its input): [targets]."""
    inputs = {"input_ids": torch.tensor([record.input_ids])}
    if record.pixels is not None:
        inputs["pixel_values"] = record.pixels.to(next(model.parameters()).dtype)
    forget_lengths(model)
    logits = model(**inputs, use_cache=False).logits[0, :-1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    targets = torch.tensor(record.labels[1:])
    keep = targets != IGNORE_INDEX
    log_probs = torch.log_softmax(logits[keep], dim=-1)
    return -log_probs.gather(1, targets[keep, None])[:, 0]


def read_rows(path):
    text = path.read_text()
    return json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]


def score(checkpoint, rows, double, adapter=None, quantization=None):
    """What `score` prints for each record."""
    with float64_mode(double), torch.no_grad():
        model = checkpoint.load(double, adapter, quantization)
        lines = []
        for row in rows:
            losses = token_losses(model, encode(row, checkpoint))
            lines.append(
                {
                    "id": row["id"],
                    "tokens": len(losses),
                    "loss": losses.mean().item(),
                    "token_logprobs": [-loss for loss in losses.tolist()],
                }
            )
        return lines


def greedy(checkpoint, record, new_tokens, lead=0.02):
    """Greedy continuation of a record's ids, with a cache as `generate` has (dynamic rotary frequencies grow with it);
    ends where the best token leads by too little."""
    with torch.no_grad():
        model = checkpoint.load(double=False)
        ids = list(record.input_ids)
        inputs = {} if record.pixels is None else {"pixel_values": record.pixels}
        past, unread = None, ids
        for _ in range(new_tokens):
            output = model(input_ids=torch.tensor([unread]), **inputs, past_key_values=past, use_cache=True)
            past, inputs, logits = output.past_key_values, {}, output.logits[0, -1]
            best, second = logits.topk(2).values.tolist()
            if best - second < lead:
                break
            ids.append(int(logits.argmax()))
            unread = ids[-1:]
            if ids[-1] == checkpoint.tokenizer.eos_token_id:
                break
        return ids[len(record.input_ids) :]


def search(checkpoint, record, settings, new_tokens=10):
    """What transformers' `generate` adds to a record's ids."""
    model = checkpoint.load(double=False)
    ids = torch.tensor([record.input_ids])
    inputs = {} if record.pixels is None else {"pixel_values": record.pixels}
    pad = checkpoint.tokenizer.pad_token_id
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad,
        **inputs, **settings,
    )
    return output[0, ids.shape[1] :].tolist()


def choose_trainable(model, method, freeze_projector, unfreeze_vision, linear_projector):
    """Switches requires_grad; `lora` and `qlora` keep what PEFT made trainable."""
    if method not in ("lora", "qlora"):
        for name, weight in model.named_parameters():
            if "multi_modal_projector" in name:
                weight.requires_grad = not freeze_projector
            elif "vision_tower" in name:
                weight.requires_grad = unfreeze_vision
            else:
                weight.requires_grad = method == "full"
    if linear_projector:
        # On disk a linear projector carries an identity behind it, which is no parameter of the model.
        for name, weight in model.named_parameters():
            if "linear_2" in name:
                weight.requires_grad = False
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


def parameter_groups(named, learning_rate, projector_lr, weight_decay, tower_lr=None):
    """{projector, tower, other} x {decay, no decay}; one-dimensional norm weights and biases have no decay."""
    groups = {}
    for name, weight in named:
        lr = learning_rate
        if "multi_modal_projector" in name:
            lr = projector_lr
        elif "vision_tower" in name and tower_lr is not None:
            lr = tower_lr
        decay = weight_decay if weight.ndim > 1 else 0.0
        groups.setdefault((lr, decay), []).append(weight)
    return [{"params": weights, "lr": lr, "weight_decay": decay} for (lr, decay), weights in groups.items()]


def batches(count, config):
    """Lists of micro-batches of record numbers, one list an optimizer step, in file order."""
    micro = config.get("per_device_train_batch_size", 1)
    size = micro * config.get("gradient_accumulation_steps", 1)
    if "max_steps" in config:
        endless = itertools.cycle(range(count))
        steps = [list(itertools.islice(endless, size)) for _ in range(config["max_steps"])]
    else:
        epoch = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
        steps = epoch * config.get("num_train_epochs", 1)
    return [[step[i : i + micro] for i in range(0, len(step), micro)] for step in steps]


def train(checkpoint, config_path, linear_projector, double):
    """Runs a train config and returns a list of the metrics of its steps."""
    config = tomllib.loads(config_path.read_text())
    folder = config_path.parent
    version = config.get("version", "v1")
    adapter = folder / config["adapter_name_or_path"] if "adapter_name_or_path" in config else None
    records = [
        encode(
            row,
            checkpoint,
            version,
            config.get("image_aspect_ratio", "square"),
            config.get("model_max_length", 2048),
        )
        for row in read_rows(folder / config["data_path"])
    ]
    steps = batches(len(records), config)
    assert not config["shuffle"]

    with float64_mode(double):
        quantization = None
        if config["method"] == "qlora":
            quantization = four_bits(config.get("quant_type", "nf4"), config.get("double_quant", True))
        model = checkpoint.load(double, adapter, quantization)
        named = choose_trainable(
            model,
            config["method"],
            config.get("freeze_mm_mlp_adapter", False),
            config.get("unfreeze_mm_vision_tower", False),
            linear_projector,
        )
        weights = [weight for _, weight in named]
        clock = Clock(config.get("seed", 0))
        draw_masks(model, config.get("lora_dropout", 0.0), clock)
        rate = config["learning_rate"]
        optimizer = torch.optim.AdamW(
            parameter_groups(named, rate, config.get("mm_projector_lr", rate), config.get("weight_decay", 0.0)),
            betas=(0.9, 0.999),
            eps=1e-8,
        )
        warmup = config.get("warmup_steps", math.ceil(config.get("warmup_ratio", 0.03) * len(steps)))
        kind = config.get("lr_scheduler_type", "cosine")
        schedule = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=len(steps))
        factor = schedule.lr_lambdas[0]
        metrics = []
        for number, micro_batches in enumerate(steps):
            loss_norm = config.get("loss_norm", "global_tokens")
            clock.step = number * config.get("gradient_accumulation_steps", 1)
            loss, token_mean = optimizer_step_gradients(model, records, micro_batches, loss_norm, clock)
            norm = torch.linalg.vector_norm(
                torch.stack([w.grad.norm() for w in weights if w.grad is not None])
            ).item()
            limit = config.get("max_grad_norm", 1.0)
            if limit > 0:
                torch.nn.utils.clip_grad_norm_(weights, limit)
            metrics.append(
                {
                    "step": number + 1,
                    "loss": loss,
                    "grad_norm": norm,
                    "learning_rate": rate * factor(number),
                    "target_tokens": sum(records[i].target_tokens() for micro in micro_batches for i in micro),
                }
            )
            if loss_norm == "micro_mean":
                metrics[-1]["token_mean_loss"] = token_mean
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        trainable = sum(weight.numel() for weight in weights)
    return metrics, trainable


def optimizer_step_gradients(model, records, micro_batches, loss_norm, clock):
    """Accumulates the gradients of one optimizer step; returns the loss they are of, and the mean over tokens."""
    total = sum(records[i].target_tokens() for micro in micro_batches for i in micro)
    loss = token_sum = 0.0
    for micro in micro_batches:
        if loss_norm == "micro_mean":
            divisor = len(micro_batches) * sum(records[i].target_tokens() for i in micro)
        else:
            divisor = total
        clock.row = 0
        for index in micro:
            record_sum = token_losses(model, records[index]).sum()
            (record_sum / divisor).backward()
            loss += record_sum.item() / divisor
            token_sum += record_sum.item()
            clock.row += len(records[index].input_ids)
        clock.step += 1
    return loss, token_sum / total
