"""The reference for optimisers and precisions: AdamW with moments in eight bits, f32 masters under 16-bit weights."""

import math
import tomllib

import bitsandbytes
import torch
from bitsandbytes.functional import create_dynamic_map
from transformers import get_scheduler

from .reference import encode
from .training import batches, choose_trainable, parameter_groups, read_rows, token_losses

BLOCK = 256
LEAST = 4096
BETAS = (0.9, 0.999)
EPSILON = 1e-8
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class BlockwiseAdamW(torch.optim.Optimizer):
    """bitsandbytes' AdamW8bit as its CUDA kernel `kOptimizerStatic8bit2StateBlockwise` does it, written from that
    kernel's rules: the decay comes after the update, indices are the nearest by midpoints with the even one halfway, and
    a first moment below zero never becomes zero. (The library's own CPU code decays first, looks indices up on a grid,
    and lets small moments become zero.) Tensors of fewer than 4096 elements: torch's AdamW."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.maps = [create_dynamic_map(signed=True), create_dynamic_map(signed=False)]

    def quantise(self, values, which):
        """Indices and the largest size of each block; `values` [blocks, BLOCK]."""
        absmax = values.abs().amax(dim=1)
        x = torch.where(absmax[:, None] > 0, values / absmax[:, None], torch.zeros(()))
        bounds = (self.maps[which][:-1] + self.maps[which][1:]) * 0.5
        below = torch.searchsorted(bounds, x.contiguous())  # bounds[below - 1] < x <= bounds[below]
        halfway = (below < 255) & (x == bounds[below.clamp(max=254)]) & (below % 2 == 1)
        index = below + halfway
        if which == 0:
            index = torch.where((values < 0) & (index == 127), 126, index)
        return index, absmax

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            rate, decay = group["lr"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, rate, decay)

    def update(self, p, rate, decay):
        state, g = self.state[p], p.grad.float()
        state["step"] = t = state.get("step", 0) + 1
        c1, c2 = 1 - BETAS[0] ** t, math.sqrt(1 - BETAS[1] ** t)
        if p.numel() < LEAST:
            m = state.setdefault("m", torch.zeros_like(g)).lerp_(g, 1 - BETAS[0])
            v = state.setdefault("v", torch.zeros_like(g)).mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
            p.mul_(1 - rate * decay).addcdiv_(m, v.sqrt() / c2 + EPSILON, value=-rate / c1)
            return
        flat = torch.nn.functional.pad(g.flatten(), (0, -p.numel() % BLOCK)).view(-1, BLOCK)
        moments = []
        for which, (beta, change) in enumerate(zip(BETAS, (flat, flat * flat))):
            if which in state:
                index, absmax = state[which]
                present = self.maps[which][index] * absmax[:, None]
            else:
                present = torch.zeros_like(flat)
            moments.append(present * beta + (1 - beta) * change)
        change = (moments[0] / (moments[1].sqrt() + c2 * EPSILON)).flatten()[: p.numel()].view_as(p)
        p.add_(change, alpha=-rate * c2 / c1).mul_(1 - rate * decay)
        for which, moment in enumerate(moments):
            state[which] = self.quantise(moment, which)


class BlockwiseOnGrid(BlockwiseAdamW):
    """The same with the indices of bitsandbytes' CPU library: its AdamW8bit on a processor differs in nothing else that
    shows, which is how the class above is known to be right."""

    def quantise(self, values, which):
        index, absmax = torch.ops.bitsandbytes.quantize_blockwise(values.contiguous(), self.maps[which], BLOCK)
        return index.long(), absmax


OPTIMISERS = {
    "torch": lambda groups: torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON),
    "blockwise": BlockwiseAdamW,
    "blockwise_on_grid": BlockwiseOnGrid,
    "bitsandbytes": lambda groups: bitsandbytes.optim.AdamW8bit(groups, betas=BETAS, eps=EPSILON),
}


class Rounded(torch.autograd.Function):
    """x as a 16-bit type has it; the gradient passes as it is."""

    @staticmethod
    def forward(ctx, x, half):
        return x.to(half).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def round_what_layers_keep(model, half, tower):
    """As the program does with a 16-bit precision: the input of every decoder layer, its queries, keys and values before
    they are rotated, and what attention gives; the same in a tower that trains."""

    def first(_, arguments, keywords):
        if arguments:
            return (Rounded.apply(arguments[0], half), *arguments[1:]), keywords
        return arguments, keywords | {"hidden_states": Rounded.apply(keywords["hidden_states"], half)}

    for name, module in model.named_modules():
        if "vision_tower" in name and not tower:
            continue
        parts = name.split(".")
        if parts[-1].isdigit() and parts[-2] == "layers":
            module.register_forward_pre_hook(first, with_kwargs=True)
        elif parts[-1] in ("o_proj", "out_proj"):
            module.register_forward_pre_hook(first, with_kwargs=True)
        elif parts[-1] in ("q_proj", "k_proj", "v_proj"):
            module.register_forward_hook(lambda _, __, output: Rounded.apply(output, half))


def rounds(name, weight):
    """What the program keeps in 16 bits: matrices that products and look-ups read; of what trains, under `full` alone."""
    return weight.ndim > 1 and "position_embedding" not in name


def train(checkpoint, config_path, optimiser, half=None, whole=False):
    """Runs a train config. `half`: a dtype; the masters are f32, and the model reads them rounded to it: matrices alone,
    in f32 arithmetic that rounds what layers keep, or with `whole` every weight, activation and gradient, as a model cast to it computes."""
    config = tomllib.loads(config_path.read_text())
    folder = config_path.parent
    adapter = folder / config["adapter_name_or_path"] if "adapter_name_or_path" in config else None
    records = [encode(row, checkpoint, "v1", "square", 2048) for row in read_rows(folder / config["data_path"])]
    steps = batches(len(records), config)
    model = checkpoint.load(False, adapter)
    named = choose_trainable(model, config["method"], False, config.get("unfreeze_mm_vision_tower", False), False)
    # The masters; the model holds what they are rounded to.
    masters = [(name, weight.detach().clone().requires_grad_()) for name, weight in named]
    if whole:
        model.to(half)
        named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    pairs = list(zip(named, masters))

    @torch.no_grad()
    def publish():
        for (name, weight), (_, master) in pairs:
            rounded = half is not None and (whole or (config["method"] == "full" and rounds(name, weight)))
            weight.copy_(master.to(half).to(weight.dtype) if rounded else master)

    publish()
    if half is not None and not whole:
        round_what_layers_keep(model, half, config.get("unfreeze_mm_vision_tower", False))
        # What is frozen is kept in 16 bits too.
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if not weight.requires_grad and rounds(name, weight):
                    weight.copy_(weight.to(half).float())
    rate = config["learning_rate"]
    groups = parameter_groups(
        masters, rate, config.get("mm_projector_lr", rate), config.get("weight_decay", 0.0),
        config.get("mm_vision_tower_lr", rate),
    )
    optimizer = OPTIMISERS[optimiser](groups)
    warmup = config.get("warmup_steps", math.ceil(config.get("warmup_ratio", 0.03) * len(steps)))
    kind = config.get("lr_scheduler_type", "cosine")
    schedule = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=len(steps))
    scale = 2.0 ** config.get("initial_scale_power", 16) if half is torch.float16 else 1.0
    metrics = []
    for number, micro_batches in enumerate(steps):
        used = sorted({index for micro in micro_batches for index in micro})
        total = sum(records[i].target_tokens() for micro in micro_batches for i in micro)
        loss = 0.0
        for index in (i for micro in micro_batches for i in micro):
            record_sum = token_losses(model, records[index]).sum()
            (record_sum * (scale / total)).backward()
            loss += record_sum.item() / total
        assert used
        for (_, weight), (_, master) in pairs:
            master.grad = None if weight.grad is None else weight.grad.float() / scale
            weight.grad = None
        gradients = [master.grad for _, master in masters if master.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])).item()
        assert math.isfinite(norm), "the reference overflowed: lower initial_scale_power"
        limit = config.get("max_grad_norm", 1.0)
        if limit > 0:
            torch.nn.utils.clip_grad_norm_([master for _, master in masters], limit)
        learning_rate = rate * schedule.lr_lambdas[0](number)
        metrics.append(
            {"step": number + 1, "loss": loss, "grad_norm": norm, "learning_rate": learning_rate, "target_tokens": total}
        )
        optimizer.step()
        schedule.step()
        publish()
    return metrics
