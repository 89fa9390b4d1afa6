// exp, tanh and the normal distribution on vectors of floats. The polynomials are Chebyshev fits
// made for this file; a NaN gives a NaN.
#pragma once

#include "common.h"

namespace infermesh {

#if defined(__clang__)
#define INFERMESH_UNROLL _Pragma("unroll")
#else
#define INFERMESH_UNROLL _Pragma("GCC unroll 64")
#endif

inline Floats max(Floats a, Floats b) { return a > b ? a : b; }

inline Floats absolute(Floats value) { return (Floats)((Uints)value & 0x7FFFFFFFu); }

// To within 2 units in the last place from -87.3 on; below that 0, above 88.4 infinity.
inline Floats exp(Floats x) {
  // log2(e) * x to the nearest integer n, by a number whose last bit is 1; then e^x = 2^n * e^r.
  const Floats shift = fill(12582912.0f);
  const Floats low = fill(-87.3f);
  const Floats floored = x < low ? low : x;
  const Floats held = floored > 89.0f ? fill(89.0f) : floored;
  const Floats shifted = held * 1.44269504f + shift;
  const Floats n = shifted - shift;
  const Floats r = (held - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats tail = r * 0.00139336882f + 0.00836320501f;
  tail = tail * r + 0.041666463f;
  tail = tail * r + 0.166665763f;
  tail = tail * r + 0.5f;
  const Floats power = (Floats)(((Uints)shifted + (127u - 0x4B400000u)) << 23);
  const Floats value = ((tail * r) * r + r + 1.0f) * power;
  return x < low ? Floats{} : value;
}

inline Floats tanh(Floats x) {
  const Floats square = x * x;
  Floats tail = square * -0.006104948f + 0.0210036412f;
  tail = tail * square + -0.0538524985f;
  tail = tail * square + 0.133327827f;
  tail = tail * square + -0.333333284f;
  const Floats small = x + x * (square * tail);
  const Floats size = absolute(x);
  const Floats large = 1.0f - 2.0f / (exp(size + size) + 1.0f);
  const Floats signed_large = x < 0.0f ? -large : large;
  return size < 0.625f ? small : signed_large;
}

// The part of a normal distribution below x.
inline Floats normal_below(Floats x) {
  const Floats z = absolute(x) * 0.707106781f;
  const Floats t = 1.0f / (1.0f + 0.5f * z);
  Floats p = t * -0.0583182424f + 0.281191915f;
  p = p * t + -0.480802685f;
  p = p * t + 0.271470845f;
  p = p * t + -0.0225914251f;
  p = p * t + 0.201196656f;
  p = p * t + 0.243426815f;
  p = p * t + 0.282337844f;
  p = p * t + 0.28208819f;
  const Floats above = 0.5f * exp(-z * z) * (p * t);
  return x > 0.0f ? 1.0f - above : above;
}

}  // namespace infermesh
