// Products with matrices of float32 or bfloat16: sums in float32, one fused multiply-add after the
// other. A bfloat16 is widened in registers, which costs less than reading twice the bytes; where
// the processor multiplies pairs of them, x is rounded to bfloat16, too.
#include "panels.h"

namespace infermesh::products {
namespace {

// Kinds of weights. A panel is [steps][kWords]; a step is so many columns, with one X per row of x.
struct Float32 {  // words are [2][kWidth]
  typedef float Word;
  typedef float X;
  typedef Floats Vector;
  static constexpr int kColumns = 1, kWords = kPanel;
  static void read(const float* from, Vector out[2]) {
    for (int v = 0; v < 2; ++v) out[v] = load_floats(from + v * kWidth);
  }
  static Floats add(Floats sum, Vector w, X x) { return multiply_add(fill(x), w, sum); }
};

#if defined(__AVX512BF16__)
struct PairsOfBFloat16 {  // words are [2][kWidth] pairs of columns
  typedef uint32_t Word;
  typedef uint32_t X;
  typedef Uints Vector;
  static constexpr int kColumns = 2, kWords = kPanel;
  static void read(const uint32_t* from, Vector out[2]) {
    for (int v = 0; v < 2; ++v) out[v] = load<Uints>(from + v * kWidth);
  }
  static Floats add(Floats sum, Vector w, X x) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(Uints{} + x), (__m512bh)w);
  }
};
#else
struct PairsOfBFloat16 {  // words are [kWidth] pairs of rows
  typedef uint32_t Word;
  typedef float X;
  typedef Floats Vector;
  static constexpr int kColumns = 1, kWords = kWidth;
  static void read(const uint32_t* from, Vector out[2]) { widen_pairs(from, out); }
  static Floats add(Floats sum, Vector w, X x) { return multiply_add(fill(x), w, sum); }
};
#endif

// A row of x and zeros up to `whole` columns as words, the first at `to`, each `height` behind the
// one before.
template <typename In>
void lay_row(const In* x, int64_t num_columns, int64_t whole, int64_t height, float* to) {
  for (int64_t k = 0; k < num_columns; ++k) to[k * height] = to_float(x[k]);
  for (int64_t k = num_columns; k < whole; ++k) to[k * height] = 0;
}

template <typename In>
void lay_row(const In* x, int64_t num_columns, int64_t whole, int64_t height, uint32_t* to) {
  int64_t k = 0;
  for (; k + kWidth <= num_columns; k += kWidth) {
    alignas(32) BFloat16 rounded[kWidth];
    store_floats(rounded, load_floats(x + k));
    for (int i = 0; i < kWidth; i += 2)
      std::memcpy(to + (k + i) / 2 * height, rounded + i, sizeof *to);
  }
  for (; k < whole; k += 2) {
    const uint32_t low = narrow(to_float(x[k])).bits;
    const uint32_t high = k + 1 < num_columns ? narrow(to_float(x[k + 1])).bits : 0;
    to[k / 2 * height] = low | high << 16;
  }
}

template <class Weights>
struct FloatKind {
  typedef typename Weights::Word Word;
  typedef typename Weights::X X;
  // Of a panel, it stays in the first cache while all tiles pass.
  static constexpr int64_t kBlock = 256;
  static constexpr int kTallest = kTile;
  static constexpr int64_t kStepsOfBlock = kBlock / Weights::kColumns;
  static constexpr int64_t kStepBytes = Weights::kWords * sizeof(Word);

  static int64_t num_units(const Product&, const Tiles& tiles) { return tiles.count; }

  static int64_t num_steps(const Product& product) {
    return (product.num_columns + Weights::kColumns - 1) / Weights::kColumns;
  }

  // A tile as [steps][height].
  static void prepare(const Product& product, int64_t first_row, const Tiles& tiles, int64_t tile,
                      void* scratch) {
    X* to = static_cast<X*>(scratch) + tiles.start(tile) * num_steps(product);
    const int64_t start = (first_row + tiles.start(tile)) * product.x_stride;
    if (product.x_is_bfloat16)
      lay(static_cast<const BFloat16*>(product.x) + start, product, tiles.height(tile), to);
    else
      lay(static_cast<const float*>(product.x) + start, product, tiles.height(tile), to);
  }

  template <typename In>
  static void lay(const In* x, const Product& product, int height, X* to) {
    const int64_t columns = product.num_columns, whole = num_steps(product) * Weights::kColumns;
    if (height == 1) return lay_row(x, columns, whole, 1, to);  // known to be dense
    for (int row = 0; row < height; ++row)
      lay_row(x + row * product.x_stride, columns, whole, height, to + row);
  }

  static const float* column_scales(const Product&, int64_t) { return nullptr; }

  static void add(const Product& product, const void* prepared, const Tiles& tiles, int64_t tile,
                  int64_t panel, int64_t block, float* sums) {
    const int64_t start = tiles.start(tile), all_steps = num_steps(product);
    const int height = tiles.height(tile);
    const int64_t first = block * kStepsOfBlock, left = all_steps - first;
    const Word* weights =
        static_cast<const Word*>(product.weights) + (panel * all_steps + first) * Weights::kWords;
    const int64_t steps = left < kStepsOfBlock ? left : kStepsOfBlock;
    const Ahead ahead(weights, steps * kStepBytes, steps, tiles, tile);
    const X* x = static_cast<const X*>(prepared) + start * all_steps + first * height;
    for_height<FloatKind, Loop>(height, weights, x, steps, block == 0, ahead,
                                sums + start * kPanel);
  }

  template <int kHeight>
  struct Loop {
    static void run(const Word* weights, const X* x, int64_t num_steps, bool is_first, Ahead ahead,
                    float* sums) {
      Floats total[kHeight][2];
      for (int row = 0; row < kHeight; ++row)
        for (int v = 0; v < 2; ++v)
          total[row][v] = is_first ? Floats{} : load_floats(sums + row * kPanel + v * kWidth);
#pragma GCC unroll 4
      for (int64_t step = 0; step < num_steps; ++step) {
        ahead.step<kStepBytes>();
        typename Weights::Vector w[2];
        Weights::read(weights + step * Weights::kWords, w);
        for (int row = 0; row < kHeight; ++row)
          for (int v = 0; v < 2; ++v)
            total[row][v] = Weights::add(total[row][v], w[v], x[step * kHeight + row]);
      }
      for (int row = 0; row < kHeight; ++row)
        for (int v = 0; v < 2; ++v)
          store_floats(sums + row * kPanel + v * kWidth, total[row][v]);
    }
  };
};

}  // namespace

extern "C" {

void infermesh_multiply_float32(const Product* product) {
  multiply<FloatKind<Float32>>(*product);
}

void infermesh_multiply_bfloat16(const Product* product) {
  multiply<FloatKind<PairsOfBFloat16>>(*product);
}

// Whether products with bfloat16 round x to it, too.
void infermesh_product_rounds(int32_t* out) { *out = PairsOfBFloat16::kColumns == 2; }

// Rows of x that are prepared at a time.
void infermesh_product_rows(int32_t* out) { *out = kRowBlock; }
}

}  // namespace infermesh::products
