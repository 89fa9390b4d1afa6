// Causal attention of packed rows over the paged pool, and the writing of K and V into it.
//
// Some KV heads, the query heads that share them and some neighbouring queries are one unit of
// work, which reads each block of keys once. Keys are taken in segments that begin at fixed
// positions; each segment has a softmax of its own, and segments are merged in order. So a query's
// bits follow from its own sequence alone: not from the batch, the chunk or the number of threads.
#include <utility>

#include "attention_block.h"
#include "team.h"

namespace infermesh {
namespace {

// Rows of a KV head, where the query heads that share it are fewer; with few units, or with many.
constexpr int kHeadRows = 32, kManyHeadRows = 128;
// Where they are fewer, several heads are one unit, as many as have this many values in a block of
// keys: their keys are neighbours in memory, and read as a stream.
constexpr int kUnitValues = 1 << 15;
constexpr int kUnitsPerThread = 4;  // with fewer units than that, segments are work of their own

// Units of so many KV heads at most, or of so many rows of one, the longest first.
template <typename T>
std::vector<Unit> units_of(const Call<T>& call, int64_t most_heads, int most_rows) {
  int64_t most = std::max(1, most_rows / call.group());
  if (most > kWidth) most -= most % kWidth;  // what they see of each other is whole vectors
  std::vector<Unit> units;
  int64_t token = 0;
  for (int64_t row = 0; row < call.num_rows; ++row) {
    const int64_t queries = call.query_lens[row], before = call.context_lens[row] - queries;
    const int64_t heads = queries * call.group() < kHeadRows ? most_heads : 1;
    for (int64_t done = 0; done < queries; done += most) {
      const int64_t count = std::min(most, queries - done), position = before + done;
      for (int64_t head = 0; head < call.num_kv_heads; head += heads)
        units.push_back({row, head, static_cast<int>(std::min(heads, call.num_kv_heads - head)),
                         token + done, position, static_cast<int>(count),
                         call.lowest_seen(position), position + count});
    }
    token += queries;
  }
  std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) {
    return (a.high - a.low) * a.queries * a.kv_heads > (b.high - b.low) * b.queries * b.kv_heads;
  });
  return units;
}

template <typename T>
void run_whole(const Call<T>& call, const std::vector<Unit>& units) {
  const Workspace<T> work(call, units);
  const auto compute = [&](int64_t i) {
    const Unit& unit = units[i];
    const int rows = call.rows_of(unit);
    const State whole = State::at(work.whole, rows), part = State::at(work.part, rows);
    load_query(call, unit, work.query);
    run_segment(call, unit, unit.first_segment(), work, whole);
    for (int64_t segment = unit.first_segment() + 1; segment < unit.end_segment(); ++segment) {
      run_segment(call, unit, segment, work, part);
      merge(whole, part, rows, call.padded_dim());
    }
  };
  each_share(units.size(), compute, [&](int64_t i) {
    write_out(call, units[i], State::at(work.whole, call.rows_of(units[i])));
  });
}

// In a team. Few units with long contexts: their segments are shared out, and merged when all are
// there.
template <typename T>
void run_split(const Call<T>& call, const std::vector<Unit>& units) {
  const int dim = call.padded_dim();
  std::vector<std::pair<int64_t, int64_t>> parts;  // unit, segment
  std::vector<int64_t> offsets, firsts;
  int64_t size = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(units.size()); ++i) {
    firsts.push_back(static_cast<int64_t>(parts.size()));
    for (int64_t s = units[i].first_segment(); s < units[i].end_segment(); ++s) {
      parts.push_back({i, s});
      offsets.push_back(size);
      size += State::size(call.rows_of(units[i]), dim);
    }
  }
  firsts.push_back(static_cast<int64_t>(parts.size()));
  float* const memory = room(size);
  const Workspace<T> work(call, units);
  const auto rows_of = [&](int64_t part) { return call.rows_of(units[parts[part].first]); };
  const auto run = [&](int64_t part) {
    const Unit& unit = units[parts[part].first];
    load_query(call, unit, work.query);
    run_segment(call, unit, parts[part].second, work, State::at(work.part, rows_of(part)));
  };
  each_share(parts.size(), run, [&](int64_t part) {
    std::copy_n(work.part, State::size(rows_of(part), dim), memory + offsets[part]);
  });
  const auto merge_all = [&](int64_t i) {
    const int rows = call.rows_of(units[i]);
    std::copy_n(memory + offsets[firsts[i]], State::size(rows, dim), work.whole);
    for (int64_t part = firsts[i] + 1; part < firsts[i + 1]; ++part)
      merge(State::at(work.whole, rows), State::at(memory + offsets[part], rows), rows, dim);
  };
  each_share(units.size(), merge_all, [&](int64_t i) {
    write_out(call, units[i], State::at(work.whole, call.rows_of(units[i])));
  });
}

template <typename T>
void attend_by_member(const Call<T>& call) {
  const int64_t threads = team_size();
  const int64_t heads = std::max(1, kUnitValues / (kBlockKeys * call.padded_dim()));
  std::vector<Unit> units = units_of(call, heads, kManyHeadRows);
  const auto few = [&] {
    return threads > 1 && static_cast<int64_t>(units.size()) < kUnitsPerThread * threads;
  };
  if (few()) units = units_of(call, heads, kHeadRows);
  if (!few()) return run_whole(call, units);
  int64_t segments = 0;
  for (const Unit& unit : units) segments += unit.end_segment() - unit.first_segment();
  if (segments < 2 * threads) units = units_of(call, 1, kHeadRows);
  run_split(call, units);
}

template <typename T>
void attend(const Call<T>& call) {
  in_team(omp_get_max_threads(), [&] { attend_by_member(call); });
}

template <typename T>
inline void convert(const float* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store_floats(to + i, load<Floats>(from + i));
  for (; i < count; ++i) put(to + i, from[i]);
}

// Stores tokens' K and V, whose heads lie `*_head` and whose tokens `*_token` values apart.
template <typename T>
void write_kv(T* keys, T* values, const int64_t* slots, int64_t tokens, int64_t heads, int64_t dim,
              const float* key, int64_t key_token, int64_t key_head, const float* value,
              int64_t value_token, int64_t value_head) {
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t to = (slots[token] * heads + head) * dim;
      convert(key + token * key_token + head * key_head, dim, keys + to);
      convert(value + token * value_token + head * value_head, dim, values + to);
    }
}

}  // namespace
}  // namespace infermesh

// The pool is of type T, everything else of float32. `Attend` and `WriteKv` of layer.cpp are these.
#define INFERMESH_ATTENTION(NAME, T)                                                               \
  extern "C" void infermesh_paged_attention_##NAME(                                                \
      float* out, const float* query, int64_t query_token, int64_t query_head, const void* keys,   \
      const void* values, const int64_t* tables, int64_t table_stride, const int64_t* query_lens,  \
      const int64_t* context_lens, int64_t num_rows, int64_t block_size, int64_t num_heads,        \
      int64_t num_kv_heads, int64_t dim, int64_t window, float scale, float softcap,               \
      const float* sinks) {                                                                        \
    infermesh::attend<T>({out, query, query_token, query_head, static_cast<const T*>(keys),        \
                          static_cast<const T*>(values), tables, table_stride, query_lens,         \
                          context_lens, num_rows, block_size, num_heads, num_kv_heads,             \
                          static_cast<int>(dim), window, scale, softcap, sinks});                  \
  }                                                                                                \
  extern "C" void infermesh_write_kv_##NAME(                                                       \
      void* keys, void* values, const int64_t* slots, int64_t tokens, int64_t heads, int64_t dim,  \
      const float* key, int64_t key_token, int64_t key_head, const float* value,                   \
      int64_t value_token, int64_t value_head) {                                                   \
    infermesh::write_kv<T>(static_cast<T*>(keys), static_cast<T*>(values), slots, tokens, heads,   \
                           dim, key, key_token, key_head, value, value_token, value_head);         \
  }

INFERMESH_ATTENTION(float32, float)
INFERMESH_ATTENTION(bfloat16, infermesh::BFloat16)
