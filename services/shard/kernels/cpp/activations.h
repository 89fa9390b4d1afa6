// Rows of x as integers: of each, every kActivationBlock columns have 16 bits, in units of their
// largest value / 32767. 8 bits would lose 258 times as much, and save no instruction without
// AVX-512 VNNI.
#pragma once

#include "panels.h"

namespace infermesh::products {

// Of a sum of 512 products: 512 * 32767 * 128 < 2^31.
constexpr int64_t kActivationBlock = 512;
constexpr float kLargest = 32767;
constexpr float kSmallestPeak = 1e-30f;
// Added and taken away again, it leaves the nearest integer, ties to even.
constexpr float kRound = 12582912;

// Of the integers that share a group's scale.
struct GroupSum {
  int32_t from_code;  // times -8, as code 8 stands for the zero
  float for_zero;
};

inline int64_t blocks_of(const Product& product) {
  return (product.num_columns + kActivationBlock - 1) / kActivationBlock;
}

// x of a product as integers, tile by tile, in its scratch.
struct Activations {
  int64_t num_pairs, num_blocks, num_groups;  // pairs of columns, of which there are whole fours
  int32_t* pairs;  // per tile [num_pairs, height]
  float* units;    // per tile [num_blocks, height]
  GroupSum* sums;  // per tile [num_groups, height]

  Activations(const Product& product, int64_t num_rows, void* scratch)
      : num_pairs((product.num_columns + 3) / 4 * 2),
        num_blocks(blocks_of(product)),
        num_groups(product.group_size ? product.num_columns / product.group_size : 0),
        pairs(static_cast<int32_t*>(scratch)),
        units(reinterpret_cast<float*>(pairs + num_rows * num_pairs)),
        sums(reinterpret_cast<GroupSum*>(units + num_rows * num_blocks)) {}
};

// Up to kActivationBlock values to integers, and zeros behind them up to whole vectors. Returns
// their unit, which is no number where one of the values is none or infinite.
template <typename X>
float quantize(const X* x, int64_t count, int32_t* out) {
  alignas(64) float values[kActivationBlock];
  const int64_t whole = (count + kWidth - 1) / kWidth * kWidth;
  for (int64_t k = 0; k < count; ++k) values[k] = to_float(x[k]);
  for (int64_t k = count; k < whole; ++k) values[k] = 0;
  Floats peaks{}, zeros{};
  for (int64_t k = 0; k < whole; k += kWidth) {
    const Floats value = load_floats(values + k);
    const Floats size = (Floats)((Uints)value & 0x7FFFFFFFu);
    peaks = size > peaks ? size : peaks;
    zeros += value * 0.0f;
  }
  const float peak = largest(peaks), zero = sum(zeros);
  if (zero != 0 || peak < kSmallestPeak) {
    for (int64_t k = 0; k < whole; ++k) out[k] = 0;
    return zero;
  }
  const Floats inverse = fill(kLargest / peak), round = fill(kRound);
  for (int64_t k = 0; k < whole; k += kWidth) {
    const Floats nearest = multiply_add(load_floats(values + k), inverse, round) - round;
    store(out + k, __builtin_convertvector(nearest, Ints));
  }
  return peak / kLargest;
}

// A block of columns of a tile.
template <typename X>
void prepare_block(const Product& product, const X* x, int height, int64_t block, int32_t* pairs,
                   float* units, GroupSum* sums) {
  const int64_t first = block * kActivationBlock, left = product.num_columns - first;
  const int64_t count = left < kActivationBlock ? left : kActivationBlock;
  const int64_t group = product.group_size;
  alignas(64) int32_t values[kActivationBlock];
  for (int row = 0; row < height; ++row) {
    units[block * height + row] = quantize(x + row * product.x_stride + first, count, values);
    for (int64_t k = 0; k < (count + 3) / 4 * 4; k += 2)
      pairs[(first + k) / 2 * height + row] =
          static_cast<int32_t>((values[k] & 0xFFFFu) | static_cast<uint32_t>(values[k + 1]) << 16);
    for (int64_t start = 0; group && start < count; start += group) {
      int32_t sum = 0;
      for (int64_t k = start; k < start + group; ++k) sum += values[k];
      sums[(first + start) / group * height + row] = {-8 * sum, static_cast<float>(sum)};
    }
  }
}

}  // namespace infermesh::products
