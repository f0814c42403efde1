"""The program's dropout masks inside PEFT's layers, so that runs with dropout can be compared step by step.

Element i of a micro-batch's rows (its records one behind the other) is kept when word i % 4 of Philox 4x32-10, at the
counter (i / 4, step, stream, 0) and the key (seed, 0), is at least p * 2^32. A stream is the number of an adapted
module, a step the number of a micro-batch.
"""

import numpy
import torch
from peft.tuners.lora import LoraLayer

LOW = numpy.uint64(0xFFFFFFFF)
MULTIPLIERS = (numpy.uint64(0xD2511F53), numpy.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter, key):
    """Four words [4, N] from counters [4, N] and one key; all in uint64 below 2^32."""
    for round in range(10):
        keys = [numpy.uint64((k + round * w) & 0xFFFFFFFF) for k, w in zip(key, WEYL)]
        first, second = MULTIPLIERS[0] * counter[0], MULTIPLIERS[1] * counter[2]
        counter = [
            (second >> numpy.uint64(32)) ^ counter[1] ^ keys[0],
            second & LOW,
            (first >> numpy.uint64(32)) ^ counter[3] ^ keys[1],
            first & LOW,
        ]
    return numpy.stack(counter)


class Clock:
    """Which micro-batch is computed, and at which of its rows the record at hand begins."""

    def __init__(self, seed):
        self.seed, self.step, self.row = seed, 0, 0


class Dropout(torch.nn.Module):
    def __init__(self, probability, stream, clock):
        super().__init__()
        self.probability, self.stream, self.clock = probability, stream, clock

    def forward(self, x):
        first = self.clock.row * x.shape[-1]
        quads = numpy.arange(first // 4, (first + x.numel()) // 4 + 1, dtype=numpy.uint64)
        rest = [numpy.full_like(quads, word) for word in (self.clock.step, self.stream, 0)]
        words = philox([quads, *rest], (self.clock.seed & 0xFFFFFFFF, 0)).T.reshape(-1)
        words = words[first % 4 :][: x.numel()]
        keep = torch.from_numpy(words >= numpy.uint64(round(self.probability * 2**32)))
        return x * keep.reshape(x.shape).to(x.dtype) / (1 - self.probability)


def draw_masks(model, probability, clock):
    """Puts the program's dropout into every adapted module, in training mode (which moves nothing else here)."""
    if probability == 0:
        return
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for stream, layer in enumerate(layers):
        layer.lora_dropout["default"] = Dropout(probability, stream, clock)
        layer.training = True
