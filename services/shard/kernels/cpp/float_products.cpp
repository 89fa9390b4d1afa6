// Products with matrices of float32 or bfloat16: sums in float32, one fused multiply-add after the
// other. A bfloat16 is widened in registers, which costs less than reading twice the bytes.
#include "panels.h"

namespace infermesh::products {
namespace {

// A panel is [columns][2][kWidth].
struct Float32 {
  typedef float Word;
  static constexpr int kWords = kPanel;
  static void widen(const float* from, Floats out[2]) {
    for (int v = 0; v < 2; ++v) out[v] = load_floats(from + v * kWidth);
  }
};

// A panel is [columns][kWidth] pairs.
struct BFloat16Pairs {
  typedef uint32_t Word;
  static constexpr int kWords = kWidth;
  static void widen(const uint32_t* from, Floats out[2]) { widen_pairs(from, out); }
};

template <class Weights>
struct FloatKind {
  typedef typename Weights::Word Word;
  // Of a panel, it stays in the first cache while all tiles pass.
  static constexpr int64_t kBlock = 256;

  static constexpr int panels_at_once(int64_t height) {
    return height == 1 ? 4 : height == 2 ? 2 : 1;
  }

  static int64_t num_units(const Product&, const Tiles& tiles) { return tiles.count; }

  // A tile as float32 [columns][height].
  static void prepare(const Product& product, int64_t first_row, const Tiles& tiles, int64_t tile,
                      void* scratch) {
    float* to = static_cast<float*>(scratch) + tiles.start(tile) * product.num_columns;
    const int64_t start = (first_row + tiles.start(tile)) * product.x_stride;
    if (product.x_is_bfloat16)
      lay(static_cast<const BFloat16*>(product.x) + start, product, tiles.height(tile), to);
    else
      lay(static_cast<const float*>(product.x) + start, product, tiles.height(tile), to);
  }

  template <typename X>
  static void lay(const X* x, const Product& product, int height, float* to) {
    if (height == 1) {  // known to be dense
      for (int64_t k = 0; k < product.num_columns; ++k) to[k] = to_float(x[k]);
      return;
    }
    for (int row = 0; row < height; ++row)
      for (int64_t k = 0; k < product.num_columns; ++k)
        to[k * height + row] = to_float(x[row * product.x_stride + k]);
  }

  static const float* column_scales(const Product&, int64_t) { return nullptr; }

  static void add(const Product& product, const void* prepared, const Tiles& tiles, int64_t tile,
                  int64_t panel, int64_t num_panels, int64_t block, float* sums) {
    const int64_t start = tiles.start(tile);
    const int height = tiles.height(tile);
    const int64_t first = block * kBlock, left = product.num_columns - first;
    const Word* weights = static_cast<const Word*>(product.weights) +
                          (panel * product.num_columns + first) * Weights::kWords;
    const int64_t num_columns = left < kBlock ? left : kBlock;
    const int64_t num_bytes = num_columns * Weights::kWords * sizeof(Word);
    const Ahead ahead(weights, num_bytes, tiles, tile, num_columns);
    const float* x =
        static_cast<const float*>(prepared) + start * product.num_columns + first * height;
    for_height<FloatKind, Loop>(height, num_panels, weights, product.num_columns * Weights::kWords,
                                x, num_columns, block == 0, ahead, sums + start * kPanel);
  }

  template <int kHeight, int kPanels>
  struct Loop {
    static void run(const Word* weights, int64_t panel_size, const float* x, int64_t num_columns,
                    bool is_first, Ahead ahead, float* sums) {
      Floats total[kPanels][kHeight][2];
      for (int p = 0; p < kPanels; ++p)
        for (int row = 0; row < kHeight; ++row)
          for (int v = 0; v < 2; ++v)
            total[p][row][v] =
                is_first ? Floats{} : load_floats(sums + p * kSumsSize + row * kPanel + v * kWidth);
#pragma GCC unroll 4
      for (int64_t k = 0; k < num_columns; ++k) {
        if (kPanels == 1) ahead.step();
        for (int p = 0; p < kPanels; ++p) {
          Floats w[2];
          Weights::widen(weights + p * panel_size + k * Weights::kWords, w);
          for (int row = 0; row < kHeight; ++row) {
            const Floats value = fill(x[k * kHeight + row]);
            for (int v = 0; v < 2; ++v)
              total[p][row][v] = multiply_add(value, w[v], total[p][row][v]);
          }
        }
      }
      for (int p = 0; p < kPanels; ++p)
        for (int row = 0; row < kHeight; ++row)
          for (int v = 0; v < 2; ++v)
            store_floats(sums + p * kSumsSize + row * kPanel + v * kWidth, total[p][row][v]);
    }
  };
};

}  // namespace

extern "C" {

void infermesh_multiply_float32(const Product* product) {
  multiply<FloatKind<Float32>>(*product);
}

void infermesh_multiply_bfloat16(const Product* product) {
  multiply<FloatKind<BFloat16Pairs>>(*product);
}

// Rows of x that are prepared at a time.
void infermesh_product_rows(int32_t* out) { *out = kRowBlock; }
}

}  // namespace infermesh::products
