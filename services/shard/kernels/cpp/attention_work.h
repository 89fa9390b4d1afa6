// What attention works on: the call, its units of work, and a thread's memory.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "attention_tile.h"

namespace infermesh {

constexpr int kSegmentKeys = 512;  // a multiple of kBlockKeys
constexpr float kLowest = -std::numeric_limits<float>::max();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Neighbouring queries of one row with the heads of some KV heads. Its rows are ordered by KV head,
// query and query head.
struct Unit {
  int64_t row, kv_head;
  int kv_heads;
  int64_t token;     // the first query among the packed tokens
  int64_t position;  // and in its sequence
  int queries;
  int64_t low, high;  // keys that any of them sees

  int query_of(int row, int group) const { return row / group % queries; }
  int64_t token_of(int row, int group) const { return token + query_of(row, group); }
  int64_t head_of(int row, int group) const {
    return (kv_head + row / (group * queries)) * group + row % group;
  }
  int64_t first_segment() const { return low / kSegmentKeys; }
  int64_t end_segment() const { return (high - 1) / kSegmentKeys + 1; }
};

// T: what the pool holds.
template <typename T>
struct Call {
  float* out;  // [tokens, heads, dim]
  const float* query;
  int64_t query_token, query_head;  // strides
  const T *keys, *values;           // [blocks, block_size, kv_heads, dim]
  const int64_t* tables;
  int64_t table_stride;
  const int64_t *query_lens, *context_lens;
  int64_t num_rows, block_size, num_heads, num_kv_heads;
  int dim;
  int64_t window;        // 0: all
  float scale, softcap;  // 0: none
  const float* sinks;    // [heads], or null

  int group() const { return static_cast<int>(num_heads / num_kv_heads); }
  int rows_of(const Unit& unit) const { return unit.kv_heads * unit.queries * group(); }
  int padded_dim() const { return (dim + kWidth - 1) / kWidth * kWidth; }
  int64_t lowest_seen(int64_t position) const {
    return window > 0 ? std::max<int64_t>(0, position - window + 1) : 0;
  }
};

// What some keys gave: per row the largest score, the sum of weights and the weighted values.
struct State {
  float *most, *total, *mixed;

  static int64_t size(int rows, int dim) { return static_cast<int64_t>(rows) * (dim + 2); }
  static State at(float* memory, int rows) { return {memory, memory + rows, memory + 2 * rows}; }

  void clear(int rows, int dim) const {
    std::fill(most, most + rows, kLowest);
    std::fill(total, mixed + static_cast<int64_t>(rows) * dim, 0.0f);
  }
};

// One thread's memory.
template <typename T>
struct Workspace {
  Workspace(const Call<T>& call, const std::vector<Unit>& units) {
    static thread_local std::vector<float> memory;
    int rows = 0, heads = 0;
    for (const Unit& unit : units) {
      rows = std::max(rows, call.rows_of(unit));
      heads = std::max(heads, unit.kv_heads);
    }
    const int64_t dim = call.padded_dim();
    const int64_t sizes[] = {rows * dim,       heads * kBlockKeys * dim, kBlockKeys * dim,
                             rows * kBlockKeys, rows,                     heads * dim,
                             State::size(rows, dim), State::size(rows, dim)};
    int64_t wanted = 16;
    for (int64_t size : sizes) wanted += size + 16;
    if (static_cast<int64_t>(memory.size()) < wanted) memory.assign(wanted, 0.0f);
    float* next = memory.data();
    float* parts[8];
    for (int i = 0; i < 8; ++i) {
      next += (64 - reinterpret_cast<uintptr_t>(next) % 64) % 64 / sizeof(float);
      parts[i] = next;
      next += sizes[i];
    }
    query = parts[0], turned = parts[1], copied = parts[2], scores = parts[3], fades = parts[4];
    zeros = reinterpret_cast<T*>(parts[5]), part = parts[6], whole = parts[7];
    std::fill(parts[5], parts[5] + sizes[5], 0.0f);
  }

  float *query, *turned, *copied, *scores, *fades, *part, *whole;
  T* zeros;
};

}  // namespace infermesh
