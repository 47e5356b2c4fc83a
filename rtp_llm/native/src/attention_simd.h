// Vectors of the widest registers that the level has, in the vector extensions of gcc and clang: one source for all.
#pragma once
#include <utility>

#include "native.h"

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // which gcc 12 finds in many of its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace attention {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
constexpr int LOG_W = 4;
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int LOG_W = 3;
#else
constexpr int W = 4;
constexpr int LOG_W = 2;
#endif

typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint16_t Shorts __attribute__((vector_size(4 * W)));
typedef uint16_t HalfShorts __attribute__((vector_size(2 * W)));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(as_indices(a)){__VA_ARGS__})
Ints as_indices(Ints);
Ints as_indices(Floats);
Shorts as_indices(Shorts);
#endif

template <class V, class P>
inline V load(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class P, class V>
inline void store(P* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

inline Floats splat(float x) { return x - Floats{}; }

// b where a or b is NaN.
inline Floats maximum(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline float sum(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float total = v[0];
  for (int i = 1; i < W; i++) total += v[i];
  return total;
#endif
}

inline float maximum(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float top = v[0];
  for (int i = 1; i < W; i++) top = v[i] > top ? v[i] : top;
  return top;
#endif
}

// Returns a0 b0 a1 b1 …, of the first (half = 0) or the second half of a and b.
template <int half, class V, size_t... i>
inline V interleave(V a, V b, std::index_sequence<i...>) {
  constexpr int n = sizeof...(i);
  return SHUFFLE(a, b, (i / 2 + i % 2 * n + half * n / 2)...);
}

template <int half>
inline Shorts interleave(Shorts a, Shorts b) {
  return interleave<half>(a, b, std::make_index_sequence<2 * W>());
}

// Transposes a W x W matrix: log2(W) times, row i and row i + W / 2 are interleaved.
template <class V>
inline void transpose(V (&rows)[W]) {
#pragma GCC unroll 4
  for (int stage = 0; stage < LOG_W; stage++) {
    V next[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; i++) {
      next[2 * i] = interleave<0>(rows[i], rows[i + W / 2], std::make_index_sequence<W>());
      next[2 * i + 1] = interleave<1>(rows[i], rows[i + W / 2], std::make_index_sequence<W>());
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) rows[i] = next[i];
  }
}

// Returns 2^x for x <= 127: 0 for large negative ones, 1 at 0, NaN for NaN. The relative error is below 2e-7, with
// PRECISE = false below 1.1e-4: enough for weights that are rounded to bf16.
template <bool PRECISE = true>
inline Floats exp2(Floats x) {
#if defined(__AVX512F__)
  Floats clamped = maximum(splat(-1000.0f), x), integer = _mm512_roundscale_ps(clamped, 0);
#else
  const Floats lowest = splat(-126.0f), magic = splat(12582912.0f);  // 1.5 x 2^23: adding it rounds to an integer
  Floats clamped = x < lowest ? lowest : x, shifted = clamped + magic, integer = shifted - magic;
#endif
  Floats f = clamped - integer, y;  // minimax polynomials of 2^f on [-0.5, 0.5], exact at 0
  if constexpr (PRECISE) {
    y = splat(1.326472725e-03f);
    y = y * f + splat(9.671512688e-03f);
    y = y * f + splat(5.550733744e-02f);
    y = y * f + splat(2.402224208e-01f);
    y = y * f + splat(6.931469776e-01f);
  } else {
    y = splat(5.500893142e-02f);
    y = y * f + splat(2.422109622e-01f);
    y = y * f + splat(6.932829274e-01f);
  }
  y = y * f + splat(1.0f);
#if defined(__AVX512F__)
  return _mm512_scalef_ps(y, integer);
#else
  y = reinterpret_cast<Floats>(reinterpret_cast<Ints>(y) + (reinterpret_cast<Ints>(shifted) << 23));
  return x < lowest ? Floats{} : x == x ? y : x;
#endif
}

struct Half {
  uint16_t bits;
};

#if !defined(__F16C__)
inline float to_float(Half value) {
  // Shifted into place, the exponent is 112 too low; the multiplication is exact, also for subnormal numbers.
  uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13, bits;
  float result;
  std::memcpy(&result, &magnitude, 4);
  result *= 0x1p112f;
  std::memcpy(&bits, &result, 4);
  if (magnitude >= 0x0f800000) bits |= 0x7f800000;  // infinity and NaN
  bits |= (value.bits & 0x8000u) << 16;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Rounds to the nearest, ties to even.
inline Half to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) bits = 0x7e00;
  else if (bits >= 0x477ff000) bits = 0x7c00;  // 65520 and more
  else if (bits < 0x38800000) {  // subnormal: the sum with 0.5 rounds at the last bit of a half
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    bits -= 0x3f000000;
  } else bits = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
  return {static_cast<uint16_t>(sign | bits)};
}
#endif

inline Floats load_floats(const float* p) { return load<Floats>(p); }

inline Floats load_floats(const bf16* p) {
  return reinterpret_cast<Floats>(__builtin_convertvector(load<HalfShorts>(p), Ints) << 16);
}

inline Floats load_floats(const Half* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(load<__m256i>(p));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(load<__m128i>(p));
#else
  Floats v;
  for (int i = 0; i < W; i++) v[i] = to_float(p[i]);
  return v;
#endif
}

inline void store_floats(float* p, Floats v) { store(p, v); }

inline void store_floats(bf16* p, Floats v) {
#if defined(__AVX512BF16__)
  store(p, (__m256i)_mm512_cvtneps_pbh(v));
#else
  for (int i = 0; i < W; i++) p[i] = to_bf16(v[i]);
#endif
}

inline void store_floats(Half* p, Floats v) {
#if defined(__AVX512F__)
  store(p, _mm512_cvtps_ph(v, 0));
#elif defined(__F16C__)
  store(p, _mm256_cvtps_ph(v, 0));
#else
  for (int i = 0; i < W; i++) p[i] = to_half(v[i]);
#endif
}

}  // namespace attention
