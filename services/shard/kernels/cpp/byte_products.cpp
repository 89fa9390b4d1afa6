// Products with matrices of codes, by bytes of x: of 4 bits everywhere, of 8 where the processor
// sums products of bytes in 32 bits. Each group of columns is summed as integers, which is exact.
#include "activations.h"

namespace infermesh::products {
namespace {

inline Floats floats_of(Ints value) { return __builtin_convertvector(value, Floats); }

constexpr int64_t kFoursPerGroup = kByteGroup / 4;
// The 4 bits that mean 0 where the zero point is the middle.
constexpr float kFourBitsOf0 = 8;

// Where the bytes of a panel come from, whose halves lie side by side: four columns of a row, in 32
// bits. They are the codes plus kByteOf0 or kFourBitsOf0.
struct FromInt8 {  // a panel is [fours of columns][2][kWidth][4]
  static constexpr int kFours = 1;
  static constexpr bool kHasGroups = false;  // else each group of columns has a scale and a zero
  static Bytes read(const uint8_t* from, int) { return load<Bytes>(from); }
};

struct FromInt4 {  // as above, the low halves of bytes before the high ones
  static constexpr int kFours = 2;
  static constexpr bool kHasGroups = true;
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
  int scale_shift;        // log2 of the groups of x that share a scale
  const int32_t* x;       // [fours, height]
  const Group* x_groups;  // [groups, height]
  bool is_first;
};

template <class From>
struct Sums {
  template <int kHeight>
  struct Loop {
    typedef Floats Totals[kHeight][2];
    typedef ByteSums::Vector Integers[kHeight][2];

    static void run(Block block, Ahead ahead, float* sums) {
      Totals totals;
      for (int row = 0; row < kHeight; ++row)
        for (int v = 0; v < 2; ++v)
          totals[row][v] =
              block.is_first ? Floats{} : load_floats(sums + row * kPanel + v * kWidth);
      int64_t group = 0;
      for (; (group + 1) * kFoursPerGroup <= block.num_fours; ++group)
        add_group(block, group, kFoursPerGroup, ahead, totals);
      if (group * kFoursPerGroup < block.num_fours)
        add_group(block, group, block.num_fours - group * kFoursPerGroup, ahead, totals);
      for (int row = 0; row < kHeight; ++row)
        for (int v = 0; v < 2; ++v)
          store_floats(sums + row * kPanel + v * kWidth, totals[row][v]);
    }

    [[gnu::always_inline]] static void add_group(const Block& block, int64_t group, int64_t fours,
                                                 Ahead& ahead, Totals& totals) {
      const Group* x = block.x_groups + group * kHeight;
      Integers sums;
      for (int row = 0; row < kHeight; ++row)
        for (int v = 0; v < 2; ++v)
          if constexpr (From::kHasGroups)
            sums[row][v] = ByteSums::Vector{};
          else
            sums[row][v] = Ints{} + x[row].start;
      add_fours(block, group * kFoursPerGroup, fours, ahead, sums);
      if constexpr (From::kHasGroups)
        add_scaled(block, group, x, sums, totals);
      else
        for (int row = 0; row < kHeight; ++row)
          for (int v = 0; v < 2; ++v)
            totals[row][v] = multiply_add(floats_of(sums[row][v]), fill(x[row].unit), totals[row][v]);
    }

    // Adds unit * integer * (scale * value + zero) of a group's columns.
    [[gnu::always_inline]] static void add_scaled(const Block& block, int64_t group, const Group* x,
                                                  const Integers& sums, Totals& totals) {
      const uint32_t* scales = block.scales + 2 * (group >> block.scale_shift) * kWidth;
      Floats scale[2], zero[2];
      widen_pairs(scales, scale);
      widen_pairs(scales + kWidth, zero);
      for (int v = 0; v < 2; ++v)  // what byte 0 means
        zero[v] = multiply_add(scale[v], fill(-kFourBitsOf0), zero[v]);
      for (int row = 0; row < kHeight; ++row)
        for (int v = 0; v < 2; ++v) {
          const Floats sum = floats_of(ByteSums::of_fours(sums[row][v]));
          totals[row][v] = multiply_add(sum * x[row].unit, scale[v],
                                        multiply_add(fill(x[row].total), zero[v], totals[row][v]));
        }
    }

    [[gnu::always_inline]] static void add_fours(const Block& block, int64_t first, int64_t count,
                                                 Ahead& ahead, Integers& sums) {
#pragma GCC unroll 2
      for (int64_t at = first; at < first + count; at += From::kFours) {
        ahead.step<kStepBytes>();
        for (int four = 0; four < From::kFours; ++four) {
          const uint8_t* from = block.weights + at / From::kFours * kStepBytes;
          Bytes w[2];
          for (int v = 0; v < 2; ++v) w[v] = From::read(from + v * 4 * kWidth, four);
          for (int row = 0; row < kHeight; ++row) {
            const Ints x = Ints{} + block.x[(at + four) * kHeight + row];
            for (int v = 0; v < 2; ++v) {
              sums[row][v] = ByteSums::add(sums[row][v], w[v], x);
              // Else the compiler multiplies ahead, and lacks registers for the products.
              settle(sums[row][v]);
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
    if (From::kHasGroups) return nullptr;
    return static_cast<const float*>(product.scales) + panel * kPanel;
  }

  static void add(const Product& product, const void* prepared, const Tiles& tiles, int64_t tile,
                  int64_t panel, int64_t block, float* sums) {
    const Fours x(product, tiles.num_rows, const_cast<void*>(prepared));
    const int64_t start = tiles.start(tile), height = tiles.height(tile);
    const int64_t first = block * kCodeBlock / 4;
    const int64_t panel_bytes = x.num_fours / From::kFours * kStepBytes;
    Block work;
    work.weights = static_cast<const uint8_t*>(product.weights) + panel * panel_bytes +
                   first / From::kFours * kStepBytes;
    work.scales = nullptr;
    work.scale_shift = 0;
    work.num_fours = std::min(kCodeBlock / 4, x.num_fours - first);
    work.x = x.fours + start * x.num_fours + first * height;
    work.x_groups = x.groups + start * x.num_groups + first / kFoursPerGroup * height;
    work.is_first = block == 0;
    if (From::kHasGroups) {
      const int64_t size = product.group_size;
      work.scale_shift = __builtin_ctzll(size / kByteGroup);
      work.scales = static_cast<const uint32_t*>(product.scales) +
                    2 * (panel * (product.num_columns / size) + first * 4 / size) * kWidth;
    }
    const int64_t num_steps = work.num_fours / From::kFours;
    const Ahead ahead(work.weights, num_steps * kStepBytes, num_steps, tiles, tile);
    for_height<ByteKind, Sums<From>::template Loop>(height, work, ahead, sums + start * kPanel);
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
