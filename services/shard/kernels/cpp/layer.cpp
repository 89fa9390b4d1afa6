// Whole decoder layers in one call, float32 between their matrices: what lies between kernels is then
// a function call and not an interpreter.
//
//   x = x + m * after_attention(attention(before_attention(x)))
//   x = x + m * after_mlp(mlp(before_mlp(x)))
//
// Norms without a weight are not there.
#include "panels.h"

using namespace infermesh;
using infermesh::products::kParallelProducts;
using infermesh::products::kRowBlock;
using infermesh::products::Product;

extern "C" {

void infermesh_rms_norm_float32(const float* x, int64_t inner, int64_t outer_stride,
                                int64_t inner_stride, const float* residual, const float* weight,
                                int64_t rows, int64_t width, float eps, float offset,
                                int32_t round_first, float* sum, float* out);
void infermesh_rotary_float32_float32(float* states, int64_t heads, int64_t token_stride,
                                      int64_t head_stride, const float* cos, const float* sin,
                                      int64_t table_stride, int64_t tokens, int64_t pairs,
                                      int32_t neighbours);
}

namespace {

struct Norm {
  const float* weight;
  float eps, offset;
};

// A matrix, and the kernel for its type.
struct Matrix {
  Product product;  // without what a step brings
  void (*multiply)(const Product*);
  int64_t num_rows;
};

typedef void (*Gate)(const float*, int64_t, int64_t, int64_t, const float*, int64_t, int64_t,
                     int64_t, int64_t, int64_t, float*);

// Of the pool's type, see attention.cpp.
typedef void (*WriteKv)(void*, void*, const int64_t*, int64_t, int64_t, int64_t, const float*,
                        int64_t, int64_t, const float*, int64_t, int64_t);
typedef void (*Attend)(float*, const float*, int64_t, int64_t, const void*, const void*,
                       const int64_t*, int64_t, const int64_t*, const int64_t*, int64_t, int64_t,
                       int64_t, int64_t, int64_t, int64_t, float, float, const float*);

struct Layer {
  Norm before_attention, after_attention, before_mlp, after_mlp, query_norm, key_norm;
  Matrix qkv, out, both, down;
  Gate gate;
  WriteKv write_kv;
  Attend attend;
  int64_t starts[3];  // of q, k and v among the columns of qkv
  int64_t num_heads, num_kv_heads, head_dim;
  int64_t window;
  const float* sinks;
  void* keys;
  void* values;
  float scale, softcap, multiplier;
  int32_t neighbours, norm_whole, gate_first;
};

// What layers of a step have in common.
struct Step {
  const int64_t* tables;
  const int64_t* query_lens;
  const int64_t* context_lens;
  const int64_t* slots;
  const float* cos;
  const float* sin;
  float* normed;    // [tokens, width]
  float* projected;  // [tokens, rows of qkv]
  float* mixed;     // [tokens, heads * dim]
  float* both;      // [kRowBlock tokens, rows of both]
  float* hidden;    // [kRowBlock tokens, columns of down]
  float* scratch;   // of products
  int64_t table_stride, num_rows, block_size, num_tokens, cos_stride, pairs;
  int32_t num_threads;
};

const float* normed(const Norm& norm, const float* x, int64_t rows, int64_t width, float* to) {
  if (norm.weight == nullptr) return x;
  infermesh_rms_norm_float32(x, 1, width, 0, nullptr, norm.weight, rows, width, norm.eps,
                             norm.offset, 0, to, to);
  return to;
}

void multiply(const Matrix& matrix, const Step& step, int64_t num_rows, const float* x, float* out,
              int64_t out_stride) {
  Product product = matrix.product;
  product.x = x;
  product.x_stride = product.num_columns;
  product.num_rows = num_rows;
  product.out = out;
  product.out_stride = out_stride;
  product.scratch = step.scratch;
  product.num_threads = step.num_threads;
  matrix.multiply(&product);
}

// Queries, keys and values of x, one matrix after another in step.projected; K and V go to the pool.
void project(const Layer& layer, const Step& step, const float* x, float* (&parts)[3]) {
  const int64_t tokens = step.num_tokens, dim = layer.head_dim;
  multiply(layer.qkv, step, tokens, x, step.projected, 0);
  for (int i = 0; i < 3; ++i) parts[i] = step.projected + tokens * layer.starts[i];
  const Norm* norms[2] = {&layer.query_norm, &layer.key_norm};
  for (int i = 0; i < 2; ++i) {
    const int64_t heads = i == 0 ? layer.num_heads : layer.num_kv_heads;
    const int64_t width = layer.norm_whole ? heads * dim : dim;
    normed(*norms[i], parts[i], tokens * heads * dim / width, width, parts[i]);
    infermesh_rotary_float32_float32(parts[i], heads, heads * dim, dim, step.cos, step.sin,
                                     step.cos_stride, tokens, step.pairs, layer.neighbours);
  }
  const int64_t kv_width = layer.num_kv_heads * dim;
  once([&] {
    layer.write_kv(layer.keys, layer.values, step.slots, tokens, layer.num_kv_heads, dim, parts[1],
                   kv_width, dim, parts[2], kv_width, dim);
  });
}

void attention(const Layer& layer, const Step& step, const float* query, float* out) {
  const int64_t dim = layer.head_dim;
  layer.attend(step.mixed, query, layer.num_heads * dim, dim, layer.keys, layer.values, step.tables,
               step.table_stride, step.query_lens, step.context_lens, step.num_rows,
               step.block_size, layer.num_heads, layer.num_kv_heads, dim, layer.window, layer.scale,
               layer.softcap, layer.sinks);
  multiply(layer.out, step, step.num_tokens, step.mixed, out, layer.out.num_rows);
}

// By as many tokens as a product has in hand at a time: what is between its matrices stays in the
// cache.
void mlp(const Layer& layer, const Step& step, const float* x, float* out) {
  const int64_t width = layer.down.product.num_columns;
  const float* gate = step.both + (layer.gate_first ? 0 : width);
  const float* up = step.both + (layer.gate_first ? width : 0);
  for (int64_t first = 0; first < step.num_tokens; first += kRowBlock) {
    const int64_t rows = std::min(kRowBlock, step.num_tokens - first);
    multiply(layer.both, step, rows, x + first * layer.both.product.num_columns, step.both,
             2 * width);
    layer.gate(gate, 1, 2 * width, 0, up, 1, 2 * width, 0, rows, width, step.hidden);
    multiply(layer.down, step, rows, step.hidden, out + first * layer.down.num_rows,
             layer.down.num_rows);
  }
}

// x = x + multiplier * added, each rounded, as torch does.
void add(const float* added, float multiplier, int64_t count, float* x) {
  each_part(count, count, [&](int64_t i, int64_t end) {
    for (; i + kWidth <= end; i += kWidth) {
      Floats product = multiplier * load_floats(added + i);
      settle(product);
      store_floats(x + i, load_floats(x + i) + product);
    }
    for (; i < end; ++i) {
      float product = multiplier * added[i];
      settle(product);
      x[i] = x[i] + product;
    }
  });
}

int64_t largest_product(const Layer& layer, int64_t num_tokens) {
  int64_t most = 0;
  for (const Matrix* matrix : {&layer.qkv, &layer.out, &layer.both, &layer.down})
    most = std::max(most, products::products_of(matrix->product, num_tokens));
  return most;
}

// A layer but for what `project` does; `states` become those behind it.
void finish(const Layer& layer, const Step& step, const float* query, float* states, float* added) {
  const int64_t tokens = step.num_tokens, width = layer.down.num_rows;
  attention(layer, step, query, added);
  const float* from = normed(layer.after_attention, added, tokens, width, step.normed);
  add(from, layer.multiplier, tokens * width, states);
  from = normed(layer.before_mlp, states, tokens, width, step.normed);
  mlp(layer, step, from, added);
  from = normed(layer.after_mlp, added, tokens, width, step.normed);
  add(from, layer.multiplier, tokens * width, states);
}

void run(const Layer& layer, const Step& step, float* states, float* added) {
  const int64_t width = layer.down.num_rows;
  float* parts[3];
  project(layer, step, normed(layer.before_attention, states, step.num_tokens, width, step.normed),
          parts);
  finish(layer, step, parts[0], states, added);
}

// Tokens whose states behind the last layer are needed; of others it only leaves K and V.
struct Needed {
  const int64_t* tokens;  // ascending, among the packed ones
  const int64_t* tables;  // a row for each
  const int64_t* query_lens;
  const int64_t* context_lens;
  float* states;  // room: [count, width]
  int64_t count, table_stride;
};

// Tokens whose K or V is no finite number get a NaN, as attention would give them.
void mark_broken(const Layer& layer, int64_t tokens, float* const (&parts)[3], float* states) {
  const int64_t kv_width = layer.num_kv_heads * layer.head_dim, width = layer.down.num_rows;
  each_part(tokens, tokens * kv_width, [&](int64_t token, int64_t end) {
    for (; token < end; ++token) {
      Floats zeros{};
      float zero = 0;
      for (const float* part : {parts[1] + token * kv_width, parts[2] + token * kv_width}) {
        int64_t i = 0;
        for (; i + kWidth <= kv_width; i += kWidth) zeros += 0.0f * load_floats(part + i);
        for (; i < kv_width; ++i) zero += 0.0f * part[i];
      }
      zero += sum(zeros);
      if (zero != 0) states[token * width] = zero;
    }
  });
}

// The last layer. Other tokens than those needed keep the states that they have.
void run_last(const Layer& layer, const Step& step, const Needed& needed, float* states,
              float* added) {
  const int64_t width = layer.down.num_rows, query_width = layer.num_heads * layer.head_dim;
  const size_t of_states = width * sizeof(float), of_query = query_width * sizeof(float);
  float* parts[3];
  project(layer, step, normed(layer.before_attention, states, step.num_tokens, width, step.normed),
          parts);
  mark_broken(layer, step.num_tokens, parts, states);
  if (needed.count == 0) return;
  once([&] {  // ascending: a query moves to where one is that is not needed, or has moved
    for (int64_t i = 0; i < needed.count; ++i) {
      const int64_t token = needed.tokens[i];
      std::memmove(parts[0] + i * query_width, parts[0] + token * query_width, of_query);
      std::memcpy(needed.states + i * width, states + token * width, of_states);
    }
  });
  Step last = step;
  last.tables = needed.tables, last.table_stride = needed.table_stride;
  last.query_lens = needed.query_lens, last.context_lens = needed.context_lens;
  last.num_rows = last.num_tokens = needed.count;
  finish(layer, last, parts[0], needed.states, added);
  once([&] {
    for (int64_t i = 0; i < needed.count; ++i)
      std::memcpy(states + needed.tokens[i] * width, needed.states + i * width, of_states);
  });
}

}  // namespace

// One layer after another over states [tokens, width], in place. `added` is room for as much; each
// layer has its step, as not all of a model's turn their heads by the same tables. `needed` may be
// null: all are.
extern "C" void infermesh_layers(const Layer* layers, const Step* const* steps, int64_t count,
                                 const Needed* needed, float* states, float* added) {
  const Step& step = **steps;
  const int64_t most = largest_product(*layers, step.num_tokens);
  in_team(most < kParallelProducts ? 1 : step.num_threads, [&] {
    for (int64_t i = 0; i < count; ++i)
      if (needed != nullptr && i + 1 == count)
        run_last(layers[i], *steps[i], *needed, states, added);
      else
        run(layers[i], *steps[i], states, added);
  });
}
