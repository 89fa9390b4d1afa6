// Rows of x as integers, in the order in which the products with codes read them: by pairs of
// columns with 16 bits, or by fours with 8.
#pragma once

#include <cfloat>

#include "panels.h"

namespace infermesh::products {

// Columns in hand at a time. With 16 bits they share a unit, and their sum of products can't
// overflow: 512 * 32767 * 128 < 2^31.
constexpr int64_t kCodeBlock = 512;
constexpr float kLargestPair = 32767;
// Columns that share a unit with 8 bits.
constexpr int64_t kByteGroup = 32;
constexpr float kLargestByte = 127;
// The unsigned byte that means 0 in a matrix of codes of 8 bits.
constexpr int32_t kByteOf0 = 128;
// Values whose largest is smaller are all 0.
constexpr float kSmallestPeak = 1e-30f;
// Added and taken away again, it leaves the nearest integer, ties to even.
constexpr float kRound = 12582912;

inline int64_t blocks_of(const Product& product) {
  return (product.num_columns + kCodeBlock - 1) / kCodeBlock;
}

// x by pairs of columns, tile by tile, in a product's scratch.
struct Pairs {
  int64_t num_pairs, num_blocks;  // there are whole fours of columns
  int32_t* pairs;                 // per tile [num_pairs, height]
  float* units;                   // per tile [num_blocks, height]

  Pairs(const Product& product, int64_t num_rows, void* scratch)
      : num_pairs((product.num_columns + 3) / 4 * 2),
        num_blocks(blocks_of(product)),
        pairs(static_cast<int32_t*>(scratch)),
        units(reinterpret_cast<float*>(pairs + num_rows * num_pairs)) {}
};

// A group of a row: what its integers are multiples of, the sum of what they mean, and what a sum of
// their products with codes plus kByteOf0 begins with, so that it ends as that with the codes.
struct Group {
  float unit, total;
  int32_t start;
};

// x by fours of columns, in the same way.
struct Fours {
  int64_t num_fours, num_groups;  // the last ones may be filled up with zeros
  int32_t* fours;                 // per tile [num_fours, height]
  Group* groups;                  // per tile [num_groups, height]

  Fours(const Product& product, int64_t num_rows, void* scratch)
      : num_fours((product.num_columns + 3) / 4),
        num_groups((product.num_columns + kByteGroup - 1) / kByteGroup),
        fours(static_cast<int32_t*>(scratch)),
        groups(reinterpret_cast<Group*>(fours + num_rows * num_fours)) {}
};

// Up to kCodeBlock values to integers, and zeros behind them up to whole vectors. Returns their
// unit, of which kLargestPair are the largest value; no number where one of the values is none or
// infinite.
template <typename X>
float quantize(const X* x, int64_t count, int32_t* out) {
  alignas(64) float values[kCodeBlock];
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
  const Floats inverse = fill(kLargestPair / peak), round = fill(kRound);
  for (int64_t k = 0; k < whole; k += kWidth) {
    const Floats nearest = multiply_add(load_floats(values + k), inverse, round) - round;
    store(out + k, __builtin_convertvector(nearest, Ints));
  }
  return peak / kLargestPair;
}

// A block of columns of a tile.
template <typename X>
void prepare_block(const Product& product, const X* x, int height, int64_t block, int32_t* pairs,
                   float* units) {
  const int64_t first = block * kCodeBlock;
  const int64_t count = std::min(kCodeBlock, product.num_columns - first);
  alignas(64) int32_t values[kCodeBlock];
  for (int row = 0; row < height; ++row) {
    units[block * height + row] =
        quantize(x + row * product.x_stride + first, count, values);
    for (int64_t k = 0; k < (count + 3) / 4 * 4; k += 2)
      pairs[(first + k) / 2 * height + row] =
          static_cast<int32_t>((values[k] & 0xFFFFu) | static_cast<uint32_t>(values[k + 1]) << 16);
  }
}

// A group of a row as bytes, with zeros behind them where it is not whole. Their unit is no number
// where one of the values is none or infinite.
template <typename X>
[[gnu::always_inline]] inline Group to_bytes(const X* x, int64_t count, int8_t* bytes) {
  constexpr int kVectors = kByteGroup / kWidth;
  X whole[kByteGroup];
  if (count < kByteGroup) {
    for (int64_t k = 0; k < kByteGroup; ++k) whole[k] = k < count ? x[k] : X{};
    x = whole;
  }
  Floats values[kVectors];
  Uints most{};  // floats without their signs are in the order of their bits
  for (int v = 0; v < kVectors; ++v) {
    values[v] = load_floats(x + v * kWidth);
    const Uints size = (Uints)values[v] & 0x7FFFFFFFu;
    most = size > most ? size : most;
  }
  most = over_all(most, [](Uints a, Uints b) { return a > b ? a : b; });
  const float peak = ((Floats)most)[0];
  if (!(peak >= kSmallestPeak && peak <= FLT_MAX)) {
    std::memset(bytes, 0, kByteGroup);
    return {peak * 0, peak * 0, 0};
  }
  Ints sums{};
  for (int v = 0; v < kVectors; ++v) {
    const Floats nearest = multiply_add(values[v], fill(kLargestByte / peak), fill(kRound));
    const Ints integers = (Ints)nearest - (Ints)fill(kRound);
    store(bytes + v * kWidth, __builtin_convertvector(integers, Codes));
    sums += integers;
  }
  const int32_t sum = over_all(sums, [](Ints a, Ints b) { return a + b; })[0];
  const float unit = peak / kLargestByte;
  return {unit, unit * static_cast<float>(sum), -kByteOf0 * sum};
}

template <typename X>
void prepare_block(const Product& product, const X* x, int height, int64_t block, int32_t* fours,
                   Group* groups) {
  const int64_t first = block * kCodeBlock;
  const int64_t end = std::min(first + kCodeBlock, product.num_columns);
  for (int row = 0; row < height; ++row)
    for (int64_t start = first; start < end; start += kByteGroup) {
      const int64_t count = std::min(kByteGroup, end - start);
      alignas(kByteGroup) int8_t bytes[kByteGroup];
      groups[start / kByteGroup * height + row] =
          to_bytes(x + row * product.x_stride + start, count, bytes);
      int32_t* to = fours + start / 4 * height + row;
      for (int64_t k = 0; k < count; k += 4, to += height) {
        std::memcpy(to, bytes + k, 4);
        asm("" : "+r"(to));  // else GCC 12 scatters them, which is slower
      }
    }
}

// The same, of x of either type; the tile begins with row `first_row` of x.
template <typename... To>
void prepare_block_of_any(const Product& product, int64_t first_row, int height, int64_t block,
                          To*... to) {
  const int64_t offset = first_row * product.x_stride;
  if (product.x_is_bfloat16)
    prepare_block(product, static_cast<const BFloat16*>(product.x) + offset, height, block, to...);
  else
    prepare_block(product, static_cast<const float*>(product.x) + offset, height, block, to...);
}

}  // namespace infermesh::products
