// What attention computes with registers of floats.
#pragma once
#include <utility>

#include "vector.h"

namespace attention {

using Floats = FloatVector;
using Ints = IntVector;
using Shorts = ShortVector;
constexpr int W = WIDTH;

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(as_indices(a)){__VA_ARGS__})
Ints as_indices(Ints);
Ints as_indices(Floats);
Shorts as_indices(Shorts);
#endif

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
  for (int stage = 0; stage < LOG_WIDTH; stage++) {
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

}  // namespace attention
