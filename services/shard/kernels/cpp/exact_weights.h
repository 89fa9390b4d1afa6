// Weights whose sums are exact: the arithmetic of exact_weights.py, bit for bit.
#pragma once


#include "common.h"

namespace infermesh {

constexpr int kBlock = 64;      // as BLOCK in exact_weights.py
constexpr int kScaleBits = 34;  // as SCALE_BITS
// An exponent below which every weight is 0.
constexpr float kNothing = -(kScaleBits + 1);

// Keeps the compiler from fusing a product into the sum that follows: torch rounds both.
template <typename T>
inline T rounded(T value) {
  settle(value);
  return value;
}

// log2 of probabilities relative to the largest logit.
struct Exponent {
  float largest, scale;
  float operator()(float logit) const { return rounded((logit - largest) * scale); }
  Floats operator()(Floats logits) const { return rounded((logits - largest) * scale); }
};

// To a multiple of a power of two: adding 1.5 * 2^23 of them leaves no room for a remainder.
inline Floats to_multiple(Floats values, float power) {
  const float shift = 12582912.0f * power;
  return (values + shift) - shift;
}

// 2^(exponent + kScaleBits), rounded to an integer: `high` in multiples of 2^17, `low` the rest.
// Floats add up 64 of either without rounding.
struct Weights {
  Floats high, low;
  Floats whole() const { return high + low; }
};

// The polynomial is that of SLEEF's exp2, which torch uses (Shibata and Petrogalli 2020); its
// products and sums are fused as they are there.
inline Weights weights_of(Floats exponents) {
  const Floats shifted = exponents + 12582912.0f;  // an integer, in the low bits
  const Floats s = exponents - (shifted - 12582912.0f);
  Floats u = multiply_add(s, fill(0.1535920892e-3f), fill(0.1339262701e-2f));
  u = multiply_add(u, s, fill(0.9618384764e-2f));
  u = multiply_add(u, s, fill(0.5550347269e-1f));
  u = multiply_add(u, s, fill(0.2402264476f));
  u = multiply_add(u, s, fill(0.6931471825f));
  u = multiply_add(u, s, fill(1.0f));
  const Floats w = (Floats)((Ints)u + (((Ints)shifted + kScaleBits) << 23));
  const Floats high = to_multiple(w, 131072.0f);
  return {high, to_multiple(w - high, 1.0f)};
}

// Exponents below the cutoff, which is kNothing at least, become one that weighs nothing.
inline Floats cut(Floats exponents, float cutoff) {
  return exponents >= cutoff ? exponents : fill(2 * kNothing);
}

// Of the 64 exponents that `next(i)` gives, kWidth at a time.
template <typename Next>
inline double weight_of_block(Next next) {
  Floats high{}, low{};
  for (int i = 0; i < kBlock; i += kWidth) {
    const Weights weights = weights_of(next(i));
    high += weights.high;
    low += weights.low;
  }
  return static_cast<double>(sum(high)) + sum(low);
}

}  // namespace infermesh
