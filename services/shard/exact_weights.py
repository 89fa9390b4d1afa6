"""From logits to weights whose sums are exact, so that a row's token depends on that row alone.

A weight is 2^34 times a token's probability relative to the likeliest one, rounded to an integer.
float64 adds up to 2^19 such integers without rounding: whatever the order, the blocks, the threads
or the device's reduction, sums are the same bits. What is less likely than 2^-35 of the likeliest
token has weight 0 and is never drawn; all that is lost this way, or won or lost by rounding, is
below 2^-35 per token of the vocabulary.

`kernels/cpp/sampling.cpp` computes the same bits: see `exact_weights` for how.
"""

from __future__ import annotations

import math

import torch

# Tokens whose weights are summed at once; a multiple of every instruction set's vector.
BLOCK = 64
# log2 of the likeliest token's weight.
SCALE_BITS = 34
LOG2_E = math.log2(math.e)
# As many values as torch computes in one thread. In several, a thread's share may end within a
# vector, and what does not fill one goes another way through exp2, whose last bit may differ.
_ONE_THREAD = 32768


def exponents(logits: torch.Tensor, largest: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """log2 of probabilities relative to the likeliest token, filled up to whole blocks with -inf.

    Args:
        logits: [rows, vocab_size] float32.
        largest: [rows, 1], the largest of each.
        scale: [rows, 1] float32, log2(e) / temperature.
    """
    num_rows, vocab = logits.shape
    found = logits.new_empty(num_rows, vocab + -vocab % BLOCK)
    found[:, vocab:] = float("-inf")
    # Relative to the maximum first: a temperature near zero must not overflow.
    torch.sub(logits, largest, out=found[:, :vocab])
    return found.mul_(scale)


def exact_weights(exponents: torch.Tensor) -> torch.Tensor:
    """Weights, of the same shape, which is whole blocks.

    On a CPU, torch's exp2 is that of SLEEF (Shibata and Petrogalli 2020, IEEE TPDS 31(6)):
    a polynomial of degree 6 by Horner's rule in fused multiply-adds.
    """
    found = torch.empty_like(exponents)
    if exponents.device.type == "cpu" and exponents.numel() > _ONE_THREAD:
        parts = (torch.split(values.view(-1), _ONE_THREAD) for values in (exponents, found))
        for part, of_part in zip(*parts, strict=True):
            torch.exp2(part, out=of_part)
    else:
        torch.exp2(exponents, out=found)
    return found.mul_(float(1 << SCALE_BITS)).round_()


def kept_weights(
    exponents: torch.Tensor, weights: torch.Tensor, cutoffs: torch.Tensor
) -> torch.Tensor:
    """The weights, 0 where an exponent lies below its row's cutoff [rows, 1].

    A mask of floats, as torch takes five times as long with one of bools.
    """
    return torch.ge(exponents, cutoffs, out=torch.empty_like(exponents)).mul_(weights)


def block_sums(weights: torch.Tensor) -> torch.Tensor:
    """[rows, blocks] float64."""
    return weights.view(len(weights), -1, BLOCK).sum(dim=-1, dtype=torch.float64)


def block_maxima(logits: torch.Tensor) -> torch.Tensor:
    """[rows, blocks] largest values of neighbouring tokens; the last block may be shorter."""
    num_rows, vocab = logits.shape
    whole = vocab - vocab % BLOCK
    maxima = logits[:, :whole].view(num_rows, whole // BLOCK, BLOCK).amax(dim=-1)
    if whole < vocab:
        maxima = torch.cat([maxima, logits[:, whole:].amax(dim=-1, keepdim=True)], dim=1)
    return maxima
