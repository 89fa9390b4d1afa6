// Products with matrices of codes, by bytes of x: of 4 bits everywhere, of 8 where the processor
// sums products of bytes in 32 bits. Each group of columns is summed as integers, which is exact.
#include "activations.h"

namespace infermesh::products {
namespace {

inline Floats floats_of(Ints value) { return __builtin_convertvector(value, Floats); }

constexpr int64_t kFoursPerGroup = kByteGroup / 4;

// Where the bytes of a panel come from, whose halves lie side by side: four columns of a row, which
// are the value plus kMiddle, in 32 bits.
struct FromInt8 {  // a panel is [fours of columns][2][kWidth][4]
  static constexpr int kFours = 1, kMiddle = 128, kAtOnce = 2;
  static Bytes read(const uint8_t* from, int) { return load<Bytes>(from); }
};

struct FromInt4 {  // as above, the low halves of bytes before the high ones
  static constexpr int kFours = 2, kMiddle = 8, kAtOnce = 1;
  static Bytes read(const uint8_t* from, int four) {
    const Words both = load<Words>(from);
    return (Bytes)(four ? both >> 4 : both) & 15;
  }
};

constexpr int64_t kStepBytes = 4 * kPanel;  // of kFours columns times 4

// A block of columns of a panel by a tile.
struct Block {
  const uint8_t* weights;
  const uint32_t* scales;  // [scale groups][scale, zero][kWidth] pairs of bfloat16, or null
  int64_t num_fours;
  int scale_shift;  // log2 of the groups of x that share a scale
  int64_t weights_size, scales_size;  // from one panel to the next
  const int32_t* x;                   // [fours, height]
  const Group* x_groups;              // [groups, height]
  bool is_first;
};

template <class From>
struct Sums {
  template <int kHeight, int kPanels>
  struct Loop {
    typedef Floats Totals[kPanels][kHeight][2];
    typedef ByteSums::Vector Integers[kPanels][kHeight][2];

    static void run(Block block, Ahead ahead, float* sums) {
      Totals totals;
      each(sums, [&](int p, int row, int v, float* at) {
        totals[p][row][v] = block.is_first ? Floats{} : load_floats(at);
      });
      int64_t group = 0;
      for (; (group + 1) * kFoursPerGroup <= block.num_fours; ++group)
        add_group(block, group, kFoursPerGroup, ahead, totals);
      if (group * kFoursPerGroup < block.num_fours)
        add_group(block, group, block.num_fours - group * kFoursPerGroup, ahead, totals);
      each(sums, [&](int p, int row, int v, float* at) { store_floats(at, totals[p][row][v]); });
    }

    template <typename Work>
    [[gnu::always_inline]] static void each(float* sums, Work work) {
      for (int p = 0; p < kPanels; ++p)
        for (int row = 0; row < kHeight; ++row)
          for (int v = 0; v < 2; ++v)
            work(p, row, v, sums + p * kSumsSize + row * kPanel + v * kWidth);
    }

    // Adds unit * integer * (scale * value + zero) of a group's columns.
    [[gnu::always_inline]] static void add_group(const Block& block, int64_t group, int64_t fours,
                                                 Ahead& ahead, Totals& totals) {
      Integers sums = {};
      add_fours(block, group * kFoursPerGroup, fours, ahead, sums);
      for (int p = 0; p < kPanels; ++p) {
        Floats scale[2], zero[2];
        if (block.scales) {
          const uint32_t* scales = block.scales + p * block.scales_size +
                                   2 * (group >> block.scale_shift) * kWidth;
          widen_pairs(scales, scale);
          widen_pairs(scales + kWidth, zero);
          // what byte 0 means, where the zero point is what kMiddle does
          for (int v = 0; v < 2; ++v)
            zero[v] = multiply_add(scale[v], fill(-From::kMiddle), zero[v]);
        }
        for (int row = 0; row < kHeight; ++row) {
          const Group x = block.x_groups[group * kHeight + row];
          for (int v = 0; v < 2; ++v) {
            const Ints sum = ByteSums::of_fours(sums[p][row][v]);
            Floats& total = totals[p][row][v];
            if (block.scales)
              total = multiply_add(floats_of(sum) * x.unit, scale[v],
                                   multiply_add(fill(x.total), zero[v], total));
            else
              total = multiply_add(floats_of(sum - x.sum * From::kMiddle), fill(x.unit), total);
          }
        }
      }
    }

    [[gnu::always_inline]] static void add_fours(const Block& block, int64_t first, int64_t count,
                                                 Ahead& ahead, Integers& sums) {
#pragma GCC unroll 2
      for (int64_t at = first; at < first + count; at += From::kFours) {
        if (kPanels == 1) ahead.step();
        for (int four = 0; four < From::kFours; ++four) {
#pragma GCC unroll 4
          for (int p = 0; p < kPanels; ++p) {
            const uint8_t* from =
                block.weights + p * block.weights_size + at / From::kFours * kStepBytes;
            Bytes w[2];
            for (int v = 0; v < 2; ++v) w[v] = From::read(from + v * 4 * kWidth, four);
            for (int row = 0; row < kHeight; ++row) {
              const Ints x = Ints{} + block.x[(at + four) * kHeight + row];
              for (int v = 0; v < 2; ++v) {
                sums[p][row][v] = ByteSums::add(sums[p][row][v], w[v], x);
                // Else the compiler multiplies ahead, and lacks registers for the products.
                settle(sums[p][row][v]);
              }
            }
          }
        }
      }
    }
  };
};

template <class From>
struct ByteKind {
  static constexpr int64_t kBlock = kCodeBlock;
  static constexpr int kTallest = kWidth == 16 ? 8 : 5;  // GCC 12 keeps sums of more in memory

  static constexpr int panels_at_once(int64_t height) { return height == 1 ? From::kAtOnce : 1; }

  static int64_t num_units(const Product& product, const Tiles& tiles) {
    return tiles.count * blocks_of(product);
  }

  static void prepare(const Product& product, int64_t first_row, const Tiles& tiles, int64_t unit,
                      void* scratch) {
    const Fours made(product, tiles.num_rows, scratch);
    const int64_t num_blocks = blocks_of(product), start = tiles.start(unit / num_blocks);
    prepare_block_of_any(product, first_row + start, tiles.height(unit / num_blocks),
                         unit % num_blocks, made.fours + start * made.num_fours,
                         made.groups + start * made.num_groups);
  }

  static const float* column_scales(const Product& product, int64_t panel) {
    if (product.group_size) return nullptr;
    return static_cast<const float*>(product.scales) + panel * kPanel;
  }

  static void add(const Product& product, const void* prepared, const Tiles& tiles, int64_t tile,
                  int64_t panel, int64_t num_panels, int64_t block, float* sums) {
    const Fours x(product, tiles.num_rows, const_cast<void*>(prepared));
    const int64_t start = tiles.start(tile), height = tiles.height(tile);
    const int64_t first = block * kCodeBlock / 4;
    Block work;
    work.weights_size = x.num_fours / From::kFours * kStepBytes;
    work.weights = static_cast<const uint8_t*>(product.weights) + panel * work.weights_size +
                   first / From::kFours * kStepBytes;
    work.scales = nullptr;
    work.scales_size = work.scale_shift = 0;
    work.num_fours = std::min(kCodeBlock / 4, x.num_fours - first);
    work.x = x.fours + start * x.num_fours + first * height;
    work.x_groups = x.groups + start * x.num_groups + first / kFoursPerGroup * height;
    work.is_first = block == 0;
    if (product.group_size) {
      work.scales_size = 2 * (product.num_columns / product.group_size) * kWidth;
      work.scale_shift = __builtin_ctzll(product.group_size / kByteGroup);
      work.scales = static_cast<const uint32_t*>(product.scales) + panel * work.scales_size +
                    2 * (first * 4 / product.group_size) * kWidth;
    }
    const int64_t num_steps = work.num_fours / From::kFours;
    const Ahead ahead(work.weights, num_steps * kStepBytes, tiles, tile, num_steps);
    for_height<ByteKind, Sums<From>::template Loop>(height, num_panels, work, ahead,
                                                    sums + start * kPanel);
  }
};

}  // namespace

extern "C" {

void infermesh_multiply_int4(const Product* product) {
  multiply<ByteKind<FromInt4>>(*product);
}

// Whether codes of 8 bits are multiplied by bytes, too; see pair_products.cpp.
#if defined(INFERMESH_BYTE_SUMS)
void infermesh_product_bytes(int32_t* out) { *out = 1; }

void infermesh_multiply_int8(const Product* product) {
  multiply<ByteKind<FromInt8>>(*product);
}
#else
void infermesh_product_bytes(int32_t* out) { *out = 0; }
#endif
}

}  // namespace infermesh::products
