// One unit of attention: block after block of keys into a segment's state, segment after segment
// into the result.
#pragma once

#include "attention_work.h"

namespace infermesh {

inline Floats masked(Floats scores, int lane, int begin, int end) {
  Ints lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = lane + i;
  return ((lanes >= begin) & (lanes < end)) ? scores : fill(-kInfinity);
}

// Caps and masks a row's scores of a block, of which only those of keys [begin, end) are seen.
// Returns the largest of them and `most`.
inline float cap(float* scores, int first_vector, int end_vector, int begin, int end, float softcap,
                 float most) {
  Floats top = fill(most);
  for (int v = first_vector; v < end_vector; ++v) {
    const int lane = v * kWidth;
    Floats score = load<Floats>(scores + lane);
    if (softcap > 0) score = softcap * tanh(score / softcap);
    if (lane < begin || lane + kWidth > end) score = masked(score, lane, begin, end);
    store(scores + lane, score);
    top = max(top, score);
  }
  return largest(top);
}

// Turns a row's scores into weights beside a score `most`, and returns their sum.
inline float weigh(float* scores, int first_vector, int end_vector, float most) {
  Floats sums = {};
  for (int v = first_vector; v < end_vector; ++v) {
    const Floats weight = exp(load<Floats>(scores + v * kWidth) - most);
    store(scores + v * kWidth, weight);
    sums += weight;
  }
  return sum(sums);
}

// By how much each row's earlier sums fade, from how much the largest score grew.
inline void fade(float* grown, int rows) {
  for (int i = 0; i < rows; i += kWidth) {
    const int count = std::min(kWidth, rows - i);
    float some[kWidth] = {};
    std::copy_n(grown + i, count, some);
    store(some, exp(load<Floats>(some)));
    std::copy_n(some, count, grown + i);
  }
}

template <typename T>
void load_query(const Call<T>& call, const Unit& unit, float* query) {
  const int group = call.group(), stride = call.padded_dim();
  for (int row = 0; row < call.rows_of(unit); ++row) {
    const float* from = call.query + unit.token_of(row, group) * call.query_token +
                        unit.head_of(row, group) * call.query_head;
    for (int d = 0; d < call.dim; ++d) query[row * stride + d] = from[d] * call.scale;
  }
}

// Where the keys and values of one block of keys are, for a unit's first KV head; by place in the
// block.
template <typename T>
struct Block {
  const T *keys[kBlockKeys], *values[kBlockKeys];
  int64_t base;     // position of the block's first key
  int first, last;  // places of the keys that are there: [first, last)

  int first_vector() const { return first / kWidth; }
  int end_vector() const { return (last + kWidth - 1) / kWidth; }
};

template <typename T>
Block<T> find_block(const Call<T>& call, const Unit& unit, int64_t begin, int64_t end,
                    const T* zeros) {
  Block<T> block;
  block.base = begin / kBlockKeys * kBlockKeys;
  block.first = static_cast<int>(begin - block.base);
  block.last = static_cast<int>(end - block.base);
  for (int i = block.first_vector() * kWidth; i < block.end_vector() * kWidth; ++i)
    block.keys[i] = zeros;
  const int64_t* table = call.tables + unit.row * call.table_stride;
  const int64_t width = call.num_kv_heads * call.dim;
  for (int64_t position = begin; position < end;) {
    const int64_t within = position % call.block_size;
    const int64_t next = std::min(end, position + call.block_size - within);
    int64_t at = (table[position / call.block_size] * call.block_size + within) * width +
                 unit.kv_head * call.dim;
    for (; position < next; ++position, at += width) {
      block.keys[position - block.base] = call.keys + at;
      block.values[position - block.base] = call.values + at;
    }
  }
  return block;
}

template <typename T>
void mix_head(const Call<T>& call, const Block<T>& block, int head, int rows, const float* weights,
              const float* fades, float* copied, float* mixed) {
  const int dim = call.padded_dim(), offset = head * call.dim;
  if (rows <= 2 * kTileRows && dim == call.dim) {  // each value is read once or twice, in place
    mix_block(weights, rows, block.values, block.first, block.last, offset, dim, fades, mixed);
    return;
  }
  const float* copies[kBlockKeys];
  for (int i = block.first; i < block.last; ++i) {
    const T* from = block.values[i] + offset;
    float* to = copied + i * dim;
    int d = 0;
    for (; d + kWidth <= call.dim; d += kWidth) store(to + d, load_floats(from + d));
    for (; d < dim; ++d) to[d] = d < call.dim ? to_float(from[d]) : 0.0f;
    copies[i] = to;
  }
  mix_block(weights, rows, copies, block.first, block.last, 0, dim, fades, mixed);
}

// Adds a block of keys to the state.
template <typename T>
void add_block(const Call<T>& call, const Unit& unit, const Block<T>& block,
               const Workspace<T>& work, const State& state) {
  const int first = block.first_vector(), last = block.end_vector(), dim = call.padded_dim();
  const int group = call.group(), rows = unit.queries * group;
  turn_keys(block.keys, first, last, unit.kv_heads, call.dim, work.turned);
  for (int head = 0; head < unit.kv_heads; ++head) {
    const int64_t row = static_cast<int64_t>(head) * rows;
    float *scores = work.scores + row * kBlockKeys, *fades = work.fades + row;
    const float* turned = work.turned + static_cast<int64_t>(head) * call.dim * kBlockKeys;
    score_block(work.query + row * dim, rows, dim, turned, call.dim, first, last, scores,
                block.values, head * call.dim, block.first, block.last);
    float *most = state.most + row, *total = state.total + row;
    for (int i = 0; i < rows; ++i) {
      const int64_t position = unit.position + i / group - block.base;
      const int64_t from = std::max<int64_t>(
          block.first, call.lowest_seen(position + block.base) - block.base);
      const float now = cap(scores + i * kBlockKeys, first, last, static_cast<int>(from),
                            static_cast<int>(std::min<int64_t>(block.last, position + 1)),
                            call.softcap, most[i]);
      fades[i] = most[i] - now;
      most[i] = now;
    }
    fade(fades, rows);
    for (int i = 0; i < rows; ++i)
      total[i] = total[i] * fades[i] + weigh(scores + i * kBlockKeys, first, last, most[i]);
    mix_head(call, block, head, rows, scores, fades, work.copied, state.mixed + row * dim);
  }
}

template <typename T>
void run_segment(const Call<T>& call, const Unit& unit, int64_t segment, const Workspace<T>& work,
                 const State& state) {
  state.clear(call.rows_of(unit), call.padded_dim());
  const int64_t end = std::min(unit.high, (segment + 1) * kSegmentKeys);
  for (int64_t key = std::max(unit.low, segment * kSegmentKeys); key < end;) {
    const int64_t next = std::min(end, (key / kBlockKeys + 1) * kBlockKeys);
    add_block(call, unit, find_block(call, unit, key, next, work.zeros), work, state);
    key = next;
  }
}

// Adds a later segment's state to that of the earlier ones.
inline __attribute__((noinline)) void merge(const State& into, const State& part, int rows, int dim) {
  for (int row = 0; row < rows; ++row) {
    const float most = std::max(into.most[row], part.most[row]);
    const float old = exp(fill(into.most[row] - most))[0];
    const float fresh = exp(fill(part.most[row] - most))[0];
    into.most[row] = most;
    into.total[row] = into.total[row] * old + part.total[row] * fresh;
    for (int64_t d = static_cast<int64_t>(row) * dim; d < (row + 1) * dim; d += kWidth) {
      const Floats mixed = load<Floats>(into.mixed + d) * old;
      store(into.mixed + d, mixed + load<Floats>(part.mixed + d) * fresh);
    }
  }
}

template <typename T>
void write_out(const Call<T>& call, const Unit& unit, const State& state) {
  const int group = call.group(), dim = call.padded_dim();
  for (int row = 0; row < call.rows_of(unit); ++row) {
    const int64_t head = unit.head_of(row, group);
    float share = 1.0f, total = state.total[row];
    if (call.sinks != nullptr) {
      const float sink = call.sinks[head], most = std::max(state.most[row], sink);
      share = exp(fill(state.most[row] - most))[0];
      total = total * share + exp(fill(sink - most))[0];
    }
    const float factor = share / total;
    float* to = call.out + (unit.token_of(row, group) * call.num_heads + head) * call.dim;
    const float* mixed = state.mixed + static_cast<int64_t>(row) * dim;
    // + 0: a sum of nothing is 0 here and -0 there
    for (int d = 0; d < call.dim; ++d) to[d] = mixed[d] * factor + 0.0f;
  }
}

}  // namespace infermesh
