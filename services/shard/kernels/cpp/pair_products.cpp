// Products with matrices of 8-bit codes where bytes of x would save nothing: two of its values as
// integers of 16 bits times two codes are one instruction, and neither that nor the sum over a
// block can overflow.
#include "activations.h"

#if !defined(INFERMESH_BYTE_SUMS)

namespace infermesh::products {
namespace {

// A panel is [pairs of columns][kPanel][2]; a step is 4 columns.
constexpr int64_t kStep = 4 * kPanel;

// A block of columns of a panel by a tile.
struct Block {
  const int8_t* weights;
  int64_t num_steps;
  const int32_t* x;    // [pairs, height]
  const float* units;  // [height]
  bool is_first;
};

template <int kHeight>
struct Loop {
  typedef Ints Integers[kHeight][2];

  static void run(Block block, Ahead ahead, float* sums) {
    Integers total = {};
    add_steps(block, ahead, total);
    for (int row = 0; row < kHeight; ++row)
      for (int v = 0; v < 2; ++v) {
        float* to = sums + row * kPanel + v * kWidth;
        const Floats before = block.is_first ? Floats{} : load_floats(to);
        const Floats added = __builtin_convertvector(total[row][v], Floats);
        store_floats(to, multiply_add(added, fill(block.units[row]), before));
      }
  }

  [[gnu::always_inline]] static void add_steps(const Block& block, Ahead& ahead, Integers& total) {
#pragma GCC unroll 2
    for (int64_t step = 0; step < block.num_steps; ++step) {
      ahead.step<kStep>();
      for (int pair = 0; pair < 2; ++pair) {
        const int8_t* from = block.weights + step * kStep;
        Shorts w[2];
        for (int v = 0; v < 2; ++v) w[v] = widen_codes(from + (2 * pair + v) * 2 * kWidth);
        for (int row = 0; row < kHeight; ++row)
          for (int v = 0; v < 2; ++v) {
            const Ints value = Ints{} + block.x[(2 * step + pair) * kHeight + row];
            total[row][v] = add_pairs(total[row][v], w[v], value);
          }
        // Else the compiler adds the products of both pairs first, and lacks registers for them.
        if (pair == 0)
          for (int row = 0; row < kHeight; ++row)
            for (int v = 0; v < 2; ++v) settle(total[row][v]);
      }
    }
  }
};

// Each tile widens the codes anew: keeping them widened was no faster.
struct PairKind {
  static constexpr int64_t kBlock = kCodeBlock;
  static constexpr int kTallest = kTile;

  static int64_t num_units(const Product& product, const Tiles& tiles) {
    return tiles.count * blocks_of(product);
  }

  static void prepare(const Product& product, int64_t first_row, const Tiles& tiles, int64_t unit,
                      void* scratch) {
    const Pairs made(product, tiles.num_rows, scratch);
    const int64_t tile = unit / made.num_blocks, start = tiles.start(tile);
    prepare_block_of_any(product, first_row + start, tiles.height(tile), unit % made.num_blocks,
                         made.pairs + start * made.num_pairs,
                         made.units + start * made.num_blocks);
  }

  static const float* column_scales(const Product& product, int64_t panel) {
    return static_cast<const float*>(product.scales) + panel * kPanel;
  }

  static void add(const Product& product, const void* prepared, const Tiles& tiles, int64_t tile,
                  int64_t panel, int64_t block, float* sums) {
    const Pairs x(product, tiles.num_rows, const_cast<void*>(prepared));
    const int64_t start = tiles.start(tile), height = tiles.height(tile), first = block * kBlock;
    Block work;
    work.num_steps = std::min(x.num_pairs / 2 - first / 4, kBlock / 4);
    work.weights = static_cast<const int8_t*>(product.weights) +
                   (panel * (x.num_pairs / 2) + first / 4) * kStep;
    work.x = x.pairs + start * x.num_pairs + first / 2 * height;
    work.units = x.units + start * x.num_blocks + block * height;
    work.is_first = block == 0;
    const Ahead ahead(work.weights, work.num_steps * kStep, work.num_steps, tiles, tile);
    for_height<PairKind, Loop>(height, work, ahead, sums + start * kPanel);
  }
};

}  // namespace

extern "C" void infermesh_multiply_int8(const Product* product) { multiply<PairKind>(*product); }

}  // namespace infermesh::products

#endif
