// How matrices lie in memory, and the loops over them that every kind of weights shares.
//
// A matrix [N, K] is cut into panels of kPanel rows; a panel holds its weights column after column,
// so that a product reads it from end to end. Rows of x are cut into tiles of up to kTile rows. The
// sums of a tile by a panel are in registers while a block of columns passes.
//
// Whatever the tiles and threads, an element is summed in one order (ascending columns; with codes,
// ascending blocks, as the sums of integers are exact): a row gives the same bits in any batch.
#pragma once

#include <algorithm>

#include "team.h"

namespace infermesh::products {

constexpr int kPanel = 2 * kWidth;
// Rows of a tile: what leaves registers for a panel's weights beside the sums.
constexpr int kTile = kWidth == 16 ? 12 : 6;
// Rows of x in hand at a time: a block of their columns stays in the second cache.
constexpr int64_t kRowBlock = 192;
// Fewer products than this take no longer than waking the other threads does.
constexpr int64_t kParallelProducts = 1 << 17;

// 32 bits are a bfloat16 of row i (low half) and of row i + kWidth (high half) of a panel, so that
// one shift and one mask widen both.
inline void widen_pairs(const uint32_t* from, Floats out[2]) {
  const Uints both = load<Uints>(from);
  out[0] = (Floats)(both << 16);
  out[1] = (Floats)(both & 0xFFFF0000u);
}

// Where the result of a panel goes: the first column of its part of the output, the part's width,
// the panel's first column within the part, and how many it has.
struct Target {
  int32_t part_start, part_width, start, count;
};

// One product, as Python describes it.
struct Product {
  const void* x;  // [num_rows, num_columns], float or BFloat16
  int64_t x_stride;
  int64_t num_rows;
  int64_t num_columns;
  const void* weights;
  const void* scales;     // of codes, else null
  const float* bias;      // [num_panels, kPanel] or null
  const Target* targets;  // [num_panels]
  int64_t num_panels;
  int64_t group_size;     // of codes of 4 bits, else 0
  void* out;              // float or BFloat16
  int64_t out_stride;  // 0: each part is a matrix of its own, one after the other
  void* scratch;       // num_columns + 4 words for each row, at most kRowBlock of them
  int32_t x_is_bfloat16, out_is_bfloat16;
  int32_t num_threads;
};

inline int64_t products_of(const Product& product, int64_t num_rows) {
  return num_rows * product.num_columns * product.num_panels * kPanel;
}

// Rows of x that are in hand, cut into tiles of nearly equal height.
struct Tiles {
  int64_t num_rows, count;

  Tiles(int64_t rows, int64_t tallest) : num_rows(rows), count((rows + tallest - 1) / tallest) {}
  int64_t start(int64_t tile) const { return num_rows * tile / count; }
  int height(int64_t tile) const { return static_cast<int>(start(tile + 1) - start(tile)); }
};

// What is fetched into the cache beside the work, one step at a time. Each of several tiles fetches
// its share of the block that comes next. A single one stays ahead of itself, far enough for memory:
// the processor's own prefetching stops at each page.
struct Ahead {
  static constexpr int64_t kLeadBytes = 8192, kLineBytes = 64;
  const char* at;
  int64_t stride;

  // Of a block at `weights`.
  Ahead(const void* weights, int64_t num_bytes, int64_t num_steps, const Tiles& tiles, int64_t tile)
      : at(static_cast<const char*>(weights)) {
    const bool is_single = tiles.count == 1;
    at += is_single ? kLeadBytes : num_bytes + num_bytes * tile / tiles.count;
    stride = num_bytes / (tiles.count * num_steps) + !is_single;
  }

  template <int64_t kStepBytes>
  void step() {
    for (int64_t line = 0; line < kStepBytes; line += kLineBytes) __builtin_prefetch(at + line);
    at += stride;
  }
};

// Calls the `Loop` of a tile's height, which is known to the compiler.
template <class Kind, template <int> class Loop, int kHeight = Kind::kTallest,
          typename... Arguments>
void for_height(int64_t height, Arguments... arguments) {
  if constexpr (kHeight > 0) {
    if (height == kHeight)
      Loop<kHeight>::run(arguments...);
    else
      for_height<Kind, Loop, kHeight - 1>(height, arguments...);
  }
}

template <typename Out>
void write_row(const float* sums, const float* scales, const float* bias, int count, Out* to) {
  Floats values[2];
  for (int v = 0; v < 2; ++v) {
    const Floats sum = load_floats(sums + v * kWidth);
    const Floats added = bias ? load_floats(bias + v * kWidth) : Floats{};
    values[v] = scales ? multiply_add(sum, load_floats(scales + v * kWidth), added) : sum + added;
  }
  if (count == kPanel) {
    for (int v = 0; v < 2; ++v) store_floats(to + v * kWidth, values[v]);
    return;
  }
  Out whole[kPanel];
  for (int v = 0; v < 2; ++v) store_floats(whole + v * kWidth, values[v]);
  for (int i = 0; i < count; ++i) to[i] = whole[i];
}

// The sums of rows by one panel, to where they belong; `scales` are one per column, or null.
template <typename Out>
void write_panel(const Product& product, int64_t first_row, int64_t num_rows, int64_t panel,
                 const float* sums, const float* scales) {
  const Target target = product.targets[panel];
  const bool apart = product.out_stride == 0;
  const int64_t stride = apart ? target.part_width : product.out_stride;
  Out* to = static_cast<Out*>(product.out) + first_row * stride + target.start +
            target.part_start * (apart ? product.num_rows : 1);
  const float* bias = product.bias ? product.bias + panel * kPanel : nullptr;
  for (int64_t row = 0; row < num_rows; ++row)
    write_row(sums + row * kPanel, scales, bias, target.count, to + row * stride);
}

// Sums of rows of x by a panel. Kind has kBlock, its tiles' kTallest, and for a block of columns
// `add(product, prepared, tiles, tile, panel, block, sums)` of a tile by a panel.
template <class Kind>
[[gnu::noinline, gnu::flatten]] void sum_panel(const Product& product, const Tiles& tiles,
                                               int64_t panel, float* sums) {
  __builtin_prefetch(product.targets + panel);  // all that is read after the weights
  const float* scales = Kind::column_scales(product, panel);
  for (int v = 0; v < 2; ++v) {
    if (scales) __builtin_prefetch(scales + v * kWidth);
    if (product.bias) __builtin_prefetch(product.bias + panel * kPanel + v * kWidth);
  }
  const int64_t num_blocks = (product.num_columns + Kind::kBlock - 1) / Kind::kBlock;
  for (int64_t block = 0; block < num_blocks; ++block)
    for (int64_t tile = 0; tile < tiles.count; ++tile)
      Kind::add(product, product.scratch, tiles, tile, panel, block, sums);
}

// Rows of x by panels, for `each_share`. A part is as many panels as there is room for their sums.
template <class Kind>
struct PanelShares {
  const Product& product;
  const Tiles& tiles;
  const int64_t first_row, count;
  alignas(64) float sums[kRowBlock * kPanel];  // [panels of a part, rows, kPanel]

  PanelShares(const Product& product, const Tiles& tiles, int64_t first_row, int64_t count)
      : product(product), tiles(tiles), first_row(first_row), count(count) {}

  int64_t at_once() const { return kRowBlock / tiles.num_rows; }
  int64_t start(int64_t share) const { return product.num_panels * share / count; }
  int64_t first(int64_t share, int64_t part) const { return start(share) + part * at_once(); }
  int64_t end(int64_t share, int64_t part) const {
    return std::min(start(share + 1), first(share, part + 1));
  }
  float* sums_of(int64_t place) { return sums + place * tiles.num_rows * kPanel; }

  int64_t num_parts(int64_t share) const {
    return (start(share + 1) - start(share) + at_once() - 1) / at_once();
  }

  void compute(int64_t share, int64_t part) {
    const int64_t first_panel = first(share, part), end_panel = end(share, part);
    for (int64_t panel = first_panel; panel < end_panel; ++panel)
      sum_panel<Kind>(product, tiles, panel, sums_of(panel - first_panel));
  }

  void write(int64_t share, int64_t part) {
    const int64_t first_panel = first(share, part), end_panel = end(share, part);
    for (int64_t panel = first_panel; panel < end_panel; ++panel) {
      const float* from = sums_of(panel - first_panel);
      const float* scales = Kind::column_scales(product, panel);
      if (product.out_is_bfloat16)
        write_panel<BFloat16>(product, first_row, tiles.num_rows, panel, from, scales);
      else
        write_panel<float>(product, first_row, tiles.num_rows, panel, from, scales);
    }
  }
};

// The product of up to kRowBlock rows. `Kind::prepare(product, first_row, tiles, unit, scratch)`
// brings a part of x into the order in which `add` reads it; units are independent.
template <class Kind>
void multiply_rows(const Product& product, int64_t first_row, int64_t num_rows, bool is_small) {
  const Tiles tiles(num_rows, Kind::kTallest);
  const int64_t num_units = Kind::num_units(product, tiles);
  const auto prepare = [&](int64_t unit) {
    Kind::prepare(product, first_row, tiles, unit, product.scratch);
  };
  const auto prepare_all = [&] {
    for (int64_t unit = 0; unit < num_units; ++unit) prepare(unit);
  };
  if (tiles.count == 1)  // to share it out would take longer than to make it
    once(prepare_all);
  else
    each(num_units, prepare);
  const int64_t most = is_small ? 1 : team_size() * kSharesPerThread;
  PanelShares<Kind> shares(product, tiles, first_row, std::min(most, product.num_panels));
  each_share(shares.count, shares);
}

template <class Kind>
void multiply(const Product& product) {
  const bool is_small = products_of(product, product.num_rows) < kParallelProducts;
  in_team(is_small ? 1 : std::min<int64_t>(product.num_threads, product.num_panels), [&] {
    for (int64_t row = 0; row < product.num_rows; row += kRowBlock)
      multiply_rows<Kind>(product, row, std::min(kRowBlock, product.num_rows - row), is_small);
  });
}

}  // namespace infermesh::products
