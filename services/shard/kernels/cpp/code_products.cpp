// Products with matrices of 8- or 4-bit codes, summed as integers: two activations of 16 bits times
// two codes are one instruction, and neither that nor the sum over a block can overflow.
#include "activations.h"

namespace infermesh::products {
namespace {

typedef uint16_t Nibbles __attribute__((vector_size(4 * kWidth)));

inline Ints fill_ints(int32_t value) { return value - Ints{}; }
inline Floats floats_of(Ints value) { return __builtin_convertvector(value, Floats); }

// Where the integers of a matrix come from, 4 columns at a time: two pairs by a panel's halves.
struct FromInt8 {  // a panel is [pairs of columns][kPanel][2]
  typedef int8_t Word;
  static constexpr int kAtOnce = 4;
  static constexpr int64_t kStep = 4 * kPanel;
  static void read(const int8_t* from, int pair, Shorts out[2]) {
    for (int v = 0; v < 2; ++v) out[v] = widen_codes(from + (2 * pair + v) * 2 * kWidth);
  }
};

// A panel is [columns / 4][kWidth][2] words. Their nibbles are, from the lowest: row i and row
// i + kWidth in one of the first two columns, and both in one of the last two.
struct FromInt4 {
  typedef uint16_t Word;
  static constexpr int kAtOnce = 1;  // unpacking takes the registers of more
  static constexpr int64_t kStep = kPanel;
  static void read(const uint16_t* from, int pair, Shorts out[2]) {
    const Nibbles codes = load<Nibbles>(from) >> (8 * pair);
    out[0] = (Shorts)(codes & 15);
    out[1] = (Shorts)(pair ? codes >> 4 : (codes >> 4) & 15);
  }
};

// A block of columns of a panel by a tile.
template <typename Word>
struct Block {
  const Word* weights;
  const uint32_t* scales;  // of groups: [groups][scale, zero][kWidth] pairs of bfloat16, or null
  int64_t num_groups, steps_per_group;
  int64_t weights_size, scales_size;  // from one panel to the next
  const int32_t* x;                   // [pairs, height]
  const GroupSum* x_sums;             // [groups, height]
  const float* units;                 // [height]
  bool is_first;
};

template <class From>
struct Sums {
  template <int kHeight, int kPanels>
  struct Loop {
    typedef Block<typename From::Word> Work;
    typedef Ints Integers[kPanels][kHeight][2];

    static void run(Work block, Ahead ahead, float* sums) {
      Floats added[kPanels][kHeight][2] = {};
      if (block.scales) {
        for (int64_t group = 0; group < block.num_groups; ++group)
          add_group(block, group, ahead, added);
      } else {
        Integers total = {};
        add_steps(block, 0, ahead, total);
        for (int p = 0; p < kPanels; ++p)
          for (int row = 0; row < kHeight; ++row)
            for (int v = 0; v < 2; ++v) added[p][row][v] = floats_of(total[p][row][v]);
      }
      for (int p = 0; p < kPanels; ++p)
        for (int row = 0; row < kHeight; ++row)
          for (int v = 0; v < 2; ++v) {
            float* to = sums + p * kSumsSize + row * kPanel + v * kWidth;
            const Floats before = block.is_first ? Floats{} : load_floats(to);
            store_floats(to, multiply_add(added[p][row][v], fill(block.units[row]), before));
          }
    }

    // Sum of scale * (code - 8) * x + zero * x.
    [[gnu::always_inline]] static void add_group(const Work& block, int64_t group, Ahead& ahead,
                                                 Floats (&added)[kPanels][kHeight][2]) {
      const GroupSum* x_sums = block.x_sums + group * kHeight;
      Integers total;
      for (int p = 0; p < kPanels; ++p)
        for (int row = 0; row < kHeight; ++row)
          for (int v = 0; v < 2; ++v) total[p][row][v] = fill_ints(x_sums[row].from_code);
      add_steps(block, group * block.steps_per_group, ahead, total);
      for (int p = 0; p < kPanels; ++p) {
        const uint32_t* scales = block.scales + p * block.scales_size + 2 * group * kWidth;
        Floats scale[2], zero[2];
        widen_pairs(scales, scale);
        widen_pairs(scales + kWidth, zero);
        for (int row = 0; row < kHeight; ++row)
          for (int v = 0; v < 2; ++v) {
            const Floats x_sum = fill(x_sums[row].for_zero);
            added[p][row][v] = multiply_add(floats_of(total[p][row][v]), scale[v],
                                            multiply_add(x_sum, zero[v], added[p][row][v]));
          }
      }
    }

    [[gnu::always_inline]] static void add_steps(const Work& block, int64_t first, Ahead& ahead,
                                                 Integers& total) {
#pragma GCC unroll 2
      for (int64_t step = first; step < first + block.steps_per_group; ++step) {
        if (kPanels == 1) ahead.step();
        for (int pair = 0; pair < 2; ++pair) {
          for (int p = 0; p < kPanels; ++p) {
            Shorts w[2];
            From::read(block.weights + p * block.weights_size + step * From::kStep, pair, w);
            for (int row = 0; row < kHeight; ++row)
              for (int v = 0; v < 2; ++v) {
                const Ints value = fill_ints(block.x[(2 * step + pair) * kHeight + row]);
                total[p][row][v] = add_pairs(total[p][row][v], w[v], value);
              }
          }
          // Else the compiler adds the products of both pairs first, and lacks registers for them.
          if (pair == 0)
            for (int p = 0; p < kPanels; ++p)
              for (int row = 0; row < kHeight; ++row)
                for (int v = 0; v < 2; ++v) settle(total[p][row][v]);
        }
      }
    }
  };
};

// Codes of either size. Each tile widens them anew: keeping them widened was no faster.
template <class From>
struct CodeKind {
  static constexpr int64_t kBlock = kActivationBlock;

  static constexpr int panels_at_once(int64_t height) { return height == 1 ? From::kAtOnce : 1; }

  static int64_t num_units(const Product& product, const Tiles& tiles) {
    return tiles.count * blocks_of(product);
  }

  static void prepare(const Product& product, int64_t first_row, const Tiles& tiles, int64_t unit,
                      void* scratch) {
    const Activations made(product, tiles.num_rows, scratch);
    const int64_t tile = unit / made.num_blocks, block = unit % made.num_blocks;
    const int64_t start = tiles.start(tile);
    const int64_t offset = (first_row + start) * product.x_stride;
    int32_t* pairs = made.pairs + start * made.num_pairs;
    float* units = made.units + start * made.num_blocks;
    GroupSum* sums = made.sums + start * made.num_groups;
    if (product.x_is_bfloat16)
      prepare_block(product, static_cast<const BFloat16*>(product.x) + offset, tiles.height(tile),
                    block, pairs, units, sums);
    else
      prepare_block(product, static_cast<const float*>(product.x) + offset, tiles.height(tile),
                    block, pairs, units, sums);
  }

  static const float* column_scales(const Product& product, int64_t panel) {
    if (product.group_size) return nullptr;
    return static_cast<const float*>(product.scales) + panel * kPanel;
  }

  static void add(const Product& product, const void* prepared, const Tiles& tiles, int64_t tile,
                  int64_t panel, int64_t num_panels, int64_t block, float* sums) {
    const Activations x(product, tiles.num_rows, const_cast<void*>(prepared));
    const int64_t start = tiles.start(tile), height = tiles.height(tile);
    const int64_t first = block * kBlock, group = product.group_size;
    const int64_t left = x.num_pairs / 2 - first / 4;
    const int64_t num_steps = left < kBlock / 4 ? left : kBlock / 4;
    Block<typename From::Word> work;
    work.weights = static_cast<const typename From::Word*>(product.weights) +
                   (panel * (x.num_pairs / 2) + first / 4) * From::kStep;
    work.weights_size = x.num_pairs / 2 * From::kStep;
    work.scales_size = 2 * x.num_groups * kWidth;
    work.scales = nullptr;
    work.num_groups = 1;
    work.steps_per_group = num_steps;
    work.x = x.pairs + start * x.num_pairs + first / 2 * height;
    work.x_sums = nullptr;
    work.units = x.units + start * x.num_blocks + block * height;
    work.is_first = block == 0;
    if (group) {
      work.scales = static_cast<const uint32_t*>(product.scales) +
                    (panel * x.num_groups + first / group) * 2 * kWidth;
      work.num_groups = num_steps * 4 / group;
      work.steps_per_group = group / 4;
      work.x_sums = x.sums + start * x.num_groups + first / group * height;
    }
    const int64_t num_bytes = num_steps * From::kStep * sizeof(typename From::Word);
    const Ahead ahead(work.weights, num_bytes, tiles, tile, num_steps);
    for_height<CodeKind, Sums<From>::template Loop>(height, num_panels, work, ahead,
                                                    sums + start * kPanel);
  }
};

}  // namespace

extern "C" {

void infermesh_multiply_int8(const Product* product) {
  multiply<CodeKind<FromInt8>>(*product);
}

void infermesh_multiply_int4(const Product* product) {
  multiply<CodeKind<FromInt4>>(*product);
}
}

}  // namespace infermesh::products
