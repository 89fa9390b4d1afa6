// What lies between a model's products: norms, rotations, gates. Each rounds to the tensors' type
// where transformers' formula does, and computes in float32 between. A row's bits follow from that
// row alone.
#include <cmath>

#include "team.h"
#include "transpose.h"
#include "vector_math.h"

namespace infermesh {
namespace {

// To the tensors' type and back.
inline Floats rounded(const float*, Floats value) { return value; }
inline Floats rounded(const BFloat16*, Floats value) { return round_to_bfloat16(value); }

// The first `count` lanes, or all where there are more; the others are 0.
template <typename T>
inline Floats load_some(const T* from, int64_t count) {
  if (count >= kWidth) return load_floats(from);
  T held[kWidth] = {};
  std::memcpy(held, from, count * sizeof(T));
  return load_floats(held);
}

template <typename T>
inline void store_some(T* to, Floats value, int64_t count) {
  if (count >= kWidth) return store_floats(to, value);
  T held[kWidth];
  store_floats(held, value);
  std::memcpy(to, held, count * sizeof(T));
}

// Calls `work` with the place of each vector of a row and the number of its values: a constant but
// for the last.
template <typename Work>
inline void each_vector(int64_t width, Work work) {
  int64_t i = 0;
  for (; i + kWidth <= width; i += kWidth) work(i, int64_t{kWidth});
  if (i < width) work(i, width - i);
}

// Rows of `width` neighbouring values: `outer` times `inner` of them, so many values apart.
template <typename T>
struct Rows {
  T* first;
  int64_t inner, outer_stride, inner_stride;

  T* at(int64_t row) const {
    return first + row / inner * outer_stride + row % inner * inner_stride;
  }
};

struct NormRules {
  float eps, offset;  // the weight counts as weight + offset
  bool round_first;   // before the weight, too
};

// out = norm(x) * weight; with a residual x + residual takes the place of x, and is kept in `sum`.
template <typename T>
void norm_row(const T* x, const T* residual, const T* weight, int64_t width, NormRules rules,
              T* sum, T* out) {
  Floats squares = {};
  each_vector(width, [&](int64_t i, int64_t count) {
    Floats value = load_some(x + i, count);
    if (residual != nullptr) {
      value = rounded(x, value + load_some(residual + i, count));
      store_some(sum + i, value, count);
    }
    squares += value * value;
  });
  const T* from = residual != nullptr ? sum : x;
  const float factor =
      1.0f / std::sqrt(infermesh::sum(squares) / static_cast<float>(width) + rules.eps);
  each_vector(width, [&](int64_t i, int64_t count) {
    Floats value = load_some(from + i, count) * factor;
    if (rules.round_first) value = rounded(x, value);
    store_some(out + i, value * (load_some(weight + i, count) + rules.offset), count);
  });
}

template <typename T>
void norm(Rows<const T> x, const T* residual, const T* weight, int64_t rows, int64_t width,
          NormRules rules, T* sum, T* out) {
  each_part(rows, rows * width, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t at = row * width;
      norm_row(x.at(row), residual == nullptr ? nullptr : residual + at, weight, width, rules,
               sum + at, out + at);
    }
  });
}

// Table is the tensors' type, and then both products are rounded to it, or float.
template <typename T, typename Table>
void rotate_halves(T* head, const Table* cos, const Table* sin, int64_t pairs) {
  each_vector(pairs, [&](int64_t i, int64_t count) {
    const Floats a = load_some(head + i, count), b = load_some(head + pairs + i, count);
    const Floats c = load_some(cos + i, count), s = load_some(sin + i, count);
    store_some(head + i, rounded(cos, a * c) + rounded(cos, -b * s), count);
    store_some(head + pairs + i, rounded(cos, b * c) + rounded(cos, a * s), count);
  });
}

struct Neighbour {
  static constexpr int lane(int i) { return i ^ 1; }
};
struct Doubled {
  static constexpr int lane(int i) { return i / 2; }
};

// As rotate_halves, where a pair's values are neighbours.
template <typename T, typename Table>
void rotate_neighbours(T* head, const Table* cos, const Table* sin, int64_t pairs) {
  const Floats none = {};
  Floats signs;
  for (int i = 0; i < kWidth; ++i) signs[i] = i % 2 ? 1.0f : -1.0f;
  for (int64_t i = 0; i < pairs; i += kWidth / 2) {
    const int64_t count = pairs - i < kWidth / 2 ? pairs - i : kWidth / 2;
    const Floats x = load_some(head + 2 * i, 2 * count);
    const Floats c = pick<Doubled>(load_some(cos + i, count), none);
    const Floats s = pick<Doubled>(load_some(sin + i, count), none) * signs;
    const Floats turned = rounded(cos, x * c) + rounded(cos, pick<Neighbour>(x, none) * s);
    store_some(head + 2 * i, turned, 2 * count);
  }
}

// Turns the first 2 * pairs values of each head; row = token, inner = heads.
template <typename T, typename Table>
void rotate(Rows<T> states, const Table* cos, const Table* sin, int64_t table_stride, int64_t rows,
            int64_t pairs, bool neighbours) {
  each_part(rows, rows * pairs, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t at = row / states.inner * table_stride;
      if (neighbours)
        rotate_neighbours(states.at(row), cos + at, sin + at, pairs);
      else
        rotate_halves(states.at(row), cos + at, sin + at, pairs);
    }
  });
}

struct Silu {
  static Floats of(Floats x) { return x / (1.0f + exp(-x)); }
};
struct GeluTanh {
  // 0.5 * (1 + tanh(u)) = 1 / (1 + exp(-2u)), without the loss of digits below 0
  static Floats of(Floats x) {
    const Floats u = 0.797884561f * (x + 0.044715f * (x * x * x));
    return x / (1.0f + exp(-2.0f * u));
  }
};
struct GeluErf {
  static Floats of(Floats x) { return x * normal_below(x); }
};

// out = activation(gate) * up
template <typename Activation, typename T>
void gate(Rows<const T> gates, Rows<const T> ups, int64_t rows, int64_t width, T* out) {
  each_part(rows, rows * width, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const T *from = gates.at(row), *up = ups.at(row);
      T* to = out + row * width;
      each_vector(width, [&](int64_t i, int64_t count) {
        const Floats active = rounded(from, Activation::of(load_some(from + i, count)));
        store_some(to + i, active * load_some(up + i, count), count);
      });
    }
  });
}

}  // namespace
}  // namespace infermesh

#define INFERMESH_GATE(KIND, ACTIVATION, NAME, T)                                                \
  extern "C" void infermesh_##KIND##_##NAME(                                                     \
      const T* gates, int64_t gate_inner, int64_t gate_outer_stride, int64_t gate_inner_stride,  \
      const T* ups, int64_t up_inner, int64_t up_outer_stride, int64_t up_inner_stride,          \
      int64_t rows, int64_t width, T* out) {                                                     \
    infermesh::gate<infermesh::ACTIVATION, T>(                                                   \
        {gates, gate_inner, gate_outer_stride, gate_inner_stride},                               \
        {ups, up_inner, up_outer_stride, up_inner_stride}, rows, width, out);                    \
  }

#define INFERMESH_ROTARY(NAME, T, TABLE)                                                         \
  extern "C" void infermesh_rotary_##NAME(                                                       \
      T* states, int64_t heads, int64_t token_stride, int64_t head_stride, const TABLE* cos,     \
      const TABLE* sin, int64_t table_stride, int64_t tokens, int64_t pairs,                     \
      int32_t neighbours) {                                                                      \
    infermesh::rotate<T, TABLE>({states, heads, token_stride, head_stride}, cos, sin,            \
                                table_stride, tokens * heads, pairs, neighbours != 0);           \
  }

#define INFERMESH_ELEMENTWISE(NAME, T)                                                           \
  extern "C" void infermesh_rms_norm_##NAME(                                                     \
      const T* x, int64_t inner, int64_t outer_stride, int64_t inner_stride, const T* residual,  \
      const T* weight, int64_t rows, int64_t width, float eps, float offset,                     \
      int32_t round_first, T* sum, T* out) {                                                     \
    infermesh::norm<T>({x, inner, outer_stride, inner_stride}, residual, weight, rows, width,    \
                       {eps, offset, round_first != 0}, sum, out);                               \
  }                                                                                              \
  INFERMESH_GATE(silu_mul, Silu, NAME, T)                                                        \
  INFERMESH_GATE(gelu_tanh_mul, GeluTanh, NAME, T)                                               \
  INFERMESH_GATE(gelu_erf_mul, GeluErf, NAME, T)

INFERMESH_ELEMENTWISE(float32, float)
INFERMESH_ELEMENTWISE(bfloat16, infermesh::BFloat16)
INFERMESH_ROTARY(float32_float32, float, float)
INFERMESH_ROTARY(bfloat16_bfloat16, infermesh::BFloat16, infermesh::BFloat16)
INFERMESH_ROTARY(bfloat16_float32, infermesh::BFloat16, float)
