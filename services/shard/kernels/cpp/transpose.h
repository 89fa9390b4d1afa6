// Squares of kWidth x kWidth floats, turned in registers.
#pragma once

#include "common.h"

namespace infermesh {

// Within each four lanes: the first or last two of both, one by one (Single) or two by two.
template <bool Single, bool Last>
struct Interleaved {
  static constexpr int lane(int i) {
    const int in = i % 4, from = i - in + (Last ? 2 : 0);
    return Single ? from + in / 2 + (in % 2) * kWidth : from + in % 2 + (in / 2) * kWidth;
  }
};

// Groups of Size lanes: the even ones of both, or the odd ones.
template <int Size, bool Odd>
struct Swapped {
  static constexpr int lane(int i) {
    const bool odd = (i / Size) % 2;
    return (odd ? kWidth + i - Size : i) + (Odd ? Size : 0);
  }
};

template <int Size>
inline void swap_groups(Floats (&rows)[kWidth]) {
  for (int i = 0; i < kWidth; ++i) {
    if ((i / Size) % 2) continue;
    const Floats a = rows[i], b = rows[i + Size];
    rows[i] = pick<Swapped<Size, false>>(a, b);
    rows[i + Size] = pick<Swapped<Size, true>>(a, b);
  }
}

inline void transpose(Floats (&rows)[kWidth]) {
  for (int i = 0; i < kWidth; i += 4) {
    const Floats a = pick<Interleaved<true, false>>(rows[i], rows[i + 1]);
    const Floats b = pick<Interleaved<true, true>>(rows[i], rows[i + 1]);
    const Floats c = pick<Interleaved<true, false>>(rows[i + 2], rows[i + 3]);
    const Floats d = pick<Interleaved<true, true>>(rows[i + 2], rows[i + 3]);
    rows[i] = pick<Interleaved<false, false>>(a, c);
    rows[i + 1] = pick<Interleaved<false, true>>(a, c);
    rows[i + 2] = pick<Interleaved<false, false>>(b, d);
    rows[i + 3] = pick<Interleaved<false, true>>(b, d);
  }
  swap_groups<4>(rows);
#if defined(INFERMESH_WIDE)
  swap_groups<8>(rows);
#endif
}

}  // namespace infermesh
