"""Weights and inputs from a hash of (tensor number, element number), so that no file has to carry them.

Element i (row-major, from 0) of tensor number t, in wrapping 32-bit arithmetic:
    x = (i + 1) * 2654435761;  x ^= x >> 16;  x = x * 2246822519 + t * 374761393
    x ^= x >> 13;  x = x * 3266489917;  x ^= x >> 16;  u = x / 2^32 * 2 - 1   (in float64)
"""

import math

import numpy
import torch


def uniform(number, shape):
    """u in [-1, 1) as float64 of `shape`, for tensor number `number`."""
    with numpy.errstate(over="ignore"):
        x = numpy.arange(1, math.prod(shape) + 1, dtype=numpy.uint32) * numpy.uint32(2654435761)
        x ^= x >> numpy.uint32(16)
        x = x * numpy.uint32(2246822519) + numpy.uint32(number * 374761393 % 2**32)
        x ^= x >> numpy.uint32(13)
        x *= numpy.uint32(3266489917)
        x ^= x >> numpy.uint32(16)
    return (x.astype(numpy.float64) / 2.0**32 * 2 - 1).reshape(shape)


def tensor(number, shape, scale=1.0, offset=0.0):
    """offset + scale * u, computed in float64 and rounded to float32 once."""
    return torch.from_numpy((offset + scale * uniform(number, shape)).astype(numpy.float32))
