// Vectors of floats as wide as the processor has them, in GCC's and Clang's portable notation:
// one source for AVX2 and AVX-512. Sizes are in elements unless a name says bytes.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

// Defined by hand, it tries the code for AVX-512 on other processors: the compiler takes vectors
// apart, and where instructions are named it is done here, half by half.
#if defined(__AVX512BW__)
#define INFERMESH_WIDE
#elif defined(INFERMESH_WIDE)
#define INFERMESH_IN_HALVES
#endif

// One instruction adds four products of bytes to a sum of 32 bits. Defined by hand, it tries the
// code for such processors on others.
#if (defined(__AVX512VNNI__) && defined(INFERMESH_WIDE)) || \
    (defined(__AVXVNNI__) && !defined(INFERMESH_WIDE))
#undef INFERMESH_BYTE_SUMS
#define INFERMESH_BYTE_SUMS
#endif

namespace infermesh {

#if defined(INFERMESH_WIDE)
constexpr int kWidth = 16;
#else
constexpr int kWidth = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Uints __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
typedef int16_t Shorts __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint8_t Bytes __attribute__((vector_size(4 * kWidth)));
typedef int8_t Codes __attribute__((vector_size(kWidth)));

template <typename Vector, typename T>
inline Vector load(const T* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <typename Vector, typename T>
inline void store(T* to, Vector value) {
  std::memcpy(to, &value, sizeof value);
}

inline Floats fill(float value) { return value - Floats{}; }

// Keeps the compiler from merging what made a value with what is made of it.
template <typename T>
inline void settle(T& value) {
#if defined(INFERMESH_IN_HALVES)
  asm("" : "+m"(value));
#else
  asm("" : "+x"(value));
#endif
}

#if defined(INFERMESH_IN_HALVES)
// Of vectors of 32 bytes at a time.
template <typename Half, typename Vector, typename Operation, typename... More>
inline Vector in_halves(Operation operation, const Vector& first, const More&... more) {
  Vector out;
  for (size_t at = 0; at < sizeof out; at += sizeof(Half)) {
    const auto half = [at](const auto& of) {
      return load<Half>(reinterpret_cast<const char*>(&of) + at);
    };
    store(reinterpret_cast<char*>(&out) + at, operation(half(first), half(more)...));
  }
  return out;
}
#endif

// a * b + c, rounded once.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(INFERMESH_IN_HALVES)
  return in_halves<__m256>(
      [](__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }, a, b, c);
#elif defined(INFERMESH_WIDE)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}

// Adds to each sum the products of two neighbouring integers of 16 bits.
inline Ints add_pairs(Ints sums, Shorts a, Ints b) {
#if defined(INFERMESH_IN_HALVES)
  return sums + in_halves<__m256i>(
                    [](__m256i x, __m256i y) { return _mm256_madd_epi16(x, y); }, b, (Ints)a);
#elif defined(__AVX512VNNI__)
  return (Ints)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif defined(INFERMESH_WIDE)
  return sums + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
  return sums + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}

// Sums of products of neighbouring bytes, of which those of w have no sign.
#if defined(INFERMESH_BYTE_SUMS)
struct ByteSums {
  typedef Ints Vector;

  static Ints add(Ints sums, Bytes w, Ints x) {
#if defined(INFERMESH_WIDE) && defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, (__m512i)x);
#elif !defined(INFERMESH_WIDE) && defined(__AVXVNNI__)
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)w, (__m256i)x);
#else
    const Shorts even = (Shorts)w & 0xFF, odd = (Shorts)((Words)w >> 8);
    const Shorts x_even = (Shorts)((Words)x << 8) >> 8, x_odd = (Shorts)x >> 8;
    return add_pairs(add_pairs(sums, even, (Ints)x_even), odd, (Ints)x_odd);
#endif
  }

  static Ints of_fours(Ints sums) { return sums; }
};
#else
// In 16 bits: good for 8 additions of products that are at most 15 * 127.
struct ByteSums {
  typedef Shorts Vector;

  static Shorts add(Shorts sums, Bytes w, Ints x) {
#if defined(INFERMESH_IN_HALVES)
    return sums + in_halves<__m256i>(
                      [](__m256i a, __m256i b) { return _mm256_maddubs_epi16(a, b); }, (Shorts)w,
                      (Shorts)x);
#elif defined(INFERMESH_WIDE)
    return sums + (Shorts)_mm512_maddubs_epi16((__m512i)w, (__m512i)x);
#else
    return sums + (Shorts)_mm256_maddubs_epi16((__m256i)w, (__m256i)x);
#endif
  }

  static Ints of_fours(Shorts sums) { return add_pairs(Ints{}, sums, (Ints)(Shorts{} + 1)); }
};
#endif

// Written out, as GCC 12 makes six instructions of the portable notation.
inline Shorts widen_codes(const int8_t* from) {
#if defined(INFERMESH_IN_HALVES)
  typedef int8_t Narrow __attribute__((vector_size(2 * kWidth)));
  return __builtin_convertvector(load<Narrow>(from), Shorts);
#elif defined(INFERMESH_WIDE)
  return (Shorts)_mm512_cvtepi8_epi16(load<__m256i>(from));
#else
  return (Shorts)_mm256_cvtepi8_epi16(load<__m128i>(from));
#endif
}

// A bfloat16 is the upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

inline float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// To the nearest, ties to even, as torch rounds; a NaN stays one.
inline BFloat16 narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return {0x7FC0};
  return {static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}

inline Floats load_floats(const float* from) { return load<Floats>(from); }

inline Floats load_floats(const BFloat16* from) {
#if defined(__AVX2__) && !defined(INFERMESH_WIDE)
  // GCC makes five instructions of the conversion below, where there is one.
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
#else
  const Uints bits = __builtin_convertvector(load<Halves>(from), Uints) << 16;
  return (Floats)bits;
#endif
}

// A float with the bits of its nearest bfloat16, ties to even; a NaN stays one.
inline Floats round_to_bfloat16(Floats value) {
  const Uints bits = (Uints)value;
  const Uints rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u;
  return (Floats)(value == value ? rounded : Uints{} + 0x7FC00000u);
}

inline void store_floats(float* to, Floats value) { store(to, value); }

inline void store_floats(BFloat16* to, Floats value) {
  store(to, __builtin_convertvector((Uints)round_to_bfloat16(value) >> 16, Halves));
}

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return widen(value); }
inline void put(float* to, float value) { *to = value; }
inline void put(BFloat16* to, float value) { *to = narrow(value); }

// Lanes of two vectors put together; a lane of the second counts from kWidth on.
template <typename Order, std::size_t... I>
inline Floats pick(Floats a, Floats b, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Order::lane(I)...);
#else
  return __builtin_shuffle(a, b, Ints{Order::lane(I)...});
#endif
}

template <typename Order>
inline Floats pick(Floats a, Floats b) {
  return pick<Order>(a, b, std::make_index_sequence<kWidth>());
}

template <int kHalf>
struct Across {
  static constexpr int lane(int i) { return i ^ kHalf; }
};

// What `reduce` makes of all elements, in every element.
template <int kHalf = kWidth / 2, typename Vector, typename Reduce>
inline Vector over_all(Vector value, Reduce reduce) {
  if constexpr (kHalf > 0) {
    const Floats lanes = (Floats)value;
    const Vector across = (Vector)pick<Across<kHalf>>(lanes, lanes);
    return over_all<kHalf / 2>(reduce(value, across), reduce);
  } else {
    return value;
  }
}

// In one fixed order, whatever the width: halves onto halves.
inline float sum(Floats value) {
  return over_all(value, [](Floats a, Floats b) { return a + b; })[0];
}

inline float largest(Floats value) {
  return over_all(value, [](Floats a, Floats b) { return a > b ? a : b; })[0];
}

}  // namespace infermesh
