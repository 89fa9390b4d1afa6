// The two products of attention, for some query rows and one block of keys. In either the order of
// the sums is fixed: over the dimensions of a head, and over keys by their position. How many rows
// or vectors are taken at once changes no bit.
#pragma once

#include <algorithm>
#include <type_traits>

#include "transpose.h"
#include "vector_math.h"

namespace infermesh {

constexpr int kBlockKeys = 64;  // keys taken at once; blocks begin at multiples of it
constexpr int kBlockVectors = kBlockKeys / kWidth;
// Rows whose sums by two vectors fit the registers.
constexpr int kTileRows = kWidth == 16 ? 12 : 6;

// Asks for memory before it is needed.
template <typename T>
inline void fetch(const T* from, int count) {
  for (int d = 0; d < count; d += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(from + d);
}

// Turns as many dimensions of kWidth keys as it can by pairs, and returns how many.
inline int turn_pairs(const float* const (&)[kWidth], int, float*) { return 0; }

// A word holds two dimensions, so that a square of words is turned for two of floats.
inline int turn_pairs(const BFloat16* const (&from)[kWidth], int dim, float* to) {
  int d = 0;
  for (; d + 2 * kWidth <= dim; d += 2 * kWidth) {
    Floats square[kWidth];
    INFERMESH_UNROLL
    for (int i = 0; i < kWidth; ++i) square[i] = load<Floats>(from[i] + d);
    transpose(square);
    INFERMESH_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      const Uints words = (Uints)square[i];
      store(to + (d + 2 * i) * kWidth, words << 16);
      store(to + (d + 2 * i + 1) * kWidth, words & 0xFFFF0000u);
    }
  }
  return d;
}

// Keys as [head][vector of keys][dimension][key of the vector], for heads that are neighbours in
// memory. Keys that are not there are given as zeros. The next vector's are fetched meanwhile: the
// processor foresees neither so many rows at once nor a jump between the pool's blocks.
template <typename T>
void turn_keys(const T* const* keys, int first_vector, int end_vector, int heads, int dim,
               float* turned) {
  for (int vector = first_vector; vector < end_vector; ++vector) {
    for (int head = 0; head < heads; ++head) {
      const T* from[kWidth];
      for (int i = 0; i < kWidth; ++i) from[i] = keys[vector * kWidth + i] + head * dim;
      if (vector + 1 < end_vector)
        for (int i = 0; i < kWidth; ++i) fetch(keys[(vector + 1) * kWidth + i] + head * dim, dim);
      float* to = turned + (head * kBlockVectors + vector) * dim * kWidth;
      int d = turn_pairs(from, dim, to);
      for (; d + kWidth <= dim; d += kWidth) {
        Floats square[kWidth];
        INFERMESH_UNROLL
        for (int i = 0; i < kWidth; ++i) square[i] = load_floats(from[i] + d);
        transpose(square);
        INFERMESH_UNROLL
        for (int i = 0; i < kWidth; ++i) store(to + (d + i) * kWidth, square[i]);
      }
      for (; d < dim; ++d)
        for (int i = 0; i < kWidth; ++i) to[d * kWidth + i] = to_float(from[i][d]);
    }
  }
}

// Rows x Vectors sums that stay in registers.
template <int Rows, int Vectors>
struct Sums {
  Floats at[Rows][Vectors];

  // at[row][vector] += ones[row * stride] * others[vector]; `other` loads them.
  template <typename Other>
  inline void add(const float* ones, int64_t stride, Other other) {
    if constexpr (Rows < Vectors) {
      Floats held[Rows];
      INFERMESH_UNROLL
      for (int r = 0; r < Rows; ++r) held[r] = fill(ones[r * stride]);
      INFERMESH_UNROLL
      for (int v = 0; v < Vectors; ++v) {
        const Floats vector = other(v);
        INFERMESH_UNROLL
        for (int r = 0; r < Rows; ++r) at[r][v] += held[r] * vector;
      }
    } else {
      Floats held[Vectors];
      INFERMESH_UNROLL
      for (int v = 0; v < Vectors; ++v) held[v] = other(v);
      INFERMESH_UNROLL
      for (int r = 0; r < Rows; ++r) {
        const Floats one = fill(ones[r * stride]);
        INFERMESH_UNROLL
        for (int v = 0; v < Vectors; ++v) at[r][v] += one * held[v];
      }
    }
  }

  inline void store_to(float* to, int64_t stride) const {
    INFERMESH_UNROLL
    for (int r = 0; r < Rows; ++r)
      INFERMESH_UNROLL
      for (int v = 0; v < Vectors; ++v) store(to + r * stride + v * kWidth, at[r][v]);
  }
};

// scores[row][key] = query[row] · key, for Rows rows and Vectors vectors of keys. Evenly spread over
// that, `wanted` rows of as many values as a key has are fetched.
template <int Rows, int Vectors, typename T>
void score(const float* query, int query_stride, const float* turned, int dim, float* scores,
           const T* const* values, int offset, int wanted) {
  Sums<Rows, Vectors> sums;
  INFERMESH_UNROLL
  for (int r = 0; r < Rows; ++r)
    INFERMESH_UNROLL
    for (int v = 0; v < Vectors; ++v) sums.at[r][v] = Floats{};
  const int vector = dim * kWidth;
  const int step = wanted > 0 ? (dim + wanted - 1) / wanted : dim;
  for (int d = 0; d < dim;) {
    if (wanted > 0) fetch(*values++ + offset, dim), --wanted;
    for (const int end = std::min(dim, d + step); d < end; ++d, ++query, turned += kWidth)
      sums.add(query, query_stride, [&](int v) { return load<Floats>(turned + v * vector); });
  }
  sums.store_to(scores, kBlockKeys);
}

// mixed[row] = mixed[row] * fade[row] + sum over keys of weight[row][key] * value[key].
template <int Rows, int Vectors, typename T>
void mix(const float* weights, const T* const* values, int begin, int end, int offset,
         const float* fades, float* mixed, int mixed_stride) {
  Sums<Rows, Vectors> sums;
  INFERMESH_UNROLL
  for (int r = 0; r < Rows; ++r)
    INFERMESH_UNROLL
    for (int v = 0; v < Vectors; ++v)
      sums.at[r][v] = load<Floats>(mixed + r * mixed_stride + v * kWidth) * fades[r];
  for (int key = begin; key < end; ++key) {
    const T* from = values[key] + offset;
    sums.add(weights + key, kBlockKeys, [&](int v) { return load_floats(from + v * kWidth); });
  }
  sums.store_to(mixed, mixed_stride);
}

// Calls `work` with a constant: the number of rows, 1 to kTileRows.
template <int kRows = kTileRows, typename Work>
void with_rows(int rows, Work work) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return work(std::integral_constant<int, kRows>());
    with_rows<kRows - 1>(rows, work);
  }
}

// Vectors at once that fill the registers beside so many rows; each divides kBlockVectors.
constexpr int vectors_beside(int rows) {
  return rows == 1 ? kBlockVectors : rows <= 3 ? 4 : 2;
}

// Calls `work` with each tile's first row and its number of rows, all of about the same height.
template <typename Work>
inline void each_tile(int rows, Work work) {
  const int tiles = (rows + kTileRows - 1) / kTileRows;
  for (int tile = 0, begin = 0; tile < tiles; ++tile) {
    const int end = rows * (tile + 1) / tiles;
    with_rows(end - begin, [&](auto height) { work(begin, height); });
    begin = end;
  }
}

// Scores of all rows with vectors [first_vector, end_vector) of keys, and perhaps some beyond; the
// keys' values, of which there are those of keys [begin, end), are fetched meanwhile.
template <typename T>
void score_block(const float* query, int rows, int query_stride, const float* turned, int dim,
                 int first_vector, int end_vector, float* scores, const T* const* values,
                 int offset, int begin, int end) {
  each_tile(rows, [&](int row, auto height) {
    constexpr int count = decltype(height)::value, vectors = vectors_beside(count);
    for (int v = first_vector / vectors * vectors; v < end_vector; v += vectors) {
      const int from = std::max(begin, v * kWidth), to = std::min(end, (v + vectors) * kWidth);
      score<count, vectors>(query + row * query_stride, query_stride, turned + v * dim * kWidth,
                            dim, scores + row * kBlockKeys + v * kWidth, values + from, offset,
                            row == 0 ? std::max(0, to - from) : 0);
    }
  });
}

// Adds what all rows take of values [begin, end), `offset` behind where they are said to be. `dim`
// is a multiple of kWidth.
template <typename T>
void mix_block(const float* weights, int rows, const T* const* values, int begin, int end,
               int offset, int dim, const float* fades, float* mixed) {
  each_tile(rows, [&](int first, auto height) {
    constexpr int count = decltype(height)::value, vectors = vectors_beside(count);
    const float* weight = weights + first * kBlockKeys;
    int d = 0;
    for (; d + vectors * kWidth <= dim; d += vectors * kWidth)
      mix<count, vectors>(weight, values, begin, end, offset + d, fades + first,
                          mixed + first * dim + d, dim);
    for (; d < dim; d += kWidth)
      mix<count, 1>(weight, values, begin, end, offset + d, fades + first,
                    mixed + first * dim + d, dim);
  });
}

}  // namespace infermesh
