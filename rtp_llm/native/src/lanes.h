// Sixteen floats at a time, at every level: the compiler splits them into the vectors that the CPU has.
//
// Sums run over sixteen lanes and then over the lanes, in one order: they do not depend on the level, except where it
// fuses a product and a sum.
#pragma once
#include <cmath>

#include "native.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__aarch64__)
using fp16 = __fp16;
#else
using fp16 = _Float16;
#endif
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));    // of Floats
typedef uint16_t Halves __attribute__((vector_size(32)));  // sixteen bf16 or fp16

constexpr int64_t LANES = 16;

inline Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Floats load(const bf16* from) {
  Halves stored;
  std::memcpy(&stored, from, sizeof stored);
  return reinterpret_cast<Floats>(__builtin_convertvector(stored, Bits) << 16);
}

inline Floats load(const fp16* from) {
  Floats v;
#if defined(__F16C__)
  __m256 halves[2];
  for (int i = 0; i < 2; i++)
    halves[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i));
  std::memcpy(&v, halves, sizeof v);
#else
  for (int i = 0; i < LANES; i++) v[i] = static_cast<float>(from[i]);
#endif
  return v;
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

// Rounds to the nearest, ties to even; NaN stays NaN. See `to_bf16`.
inline void store(bf16* to, Floats v) {
  Bits bits = reinterpret_cast<Bits>(v);
  Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Halves stored = __builtin_convertvector(v == v ? rounded : (bits >> 16) | 0x40, Halves);
  std::memcpy(to, &stored, sizeof stored);
}

inline void store(fp16* to, Floats v) {
#if defined(__F16C__)
  __m256 halves[2];
  std::memcpy(halves, &v, sizeof v);
  for (int i = 0; i < 2; i++)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to) + i, _mm256_cvtps_ph(halves[i], _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < LANES; i++) to[i] = static_cast<fp16>(v[i]);
#endif
}

// The first `count` lanes; the others are 0.
template <typename T>
Floats load(const T* from, int64_t count) {
  if (count == LANES) return load(from);
  T padded[LANES] = {};
  std::memcpy(padded, from, static_cast<size_t>(count) * sizeof(T));
  return load(padded);
}

template <typename T>
void store(T* to, Floats v, int64_t count) {
  if (count == LANES) return store(to, v);
  T padded[LANES];
  store(padded, v);
  std::memcpy(to, padded, static_cast<size_t>(count) * sizeof(T));
}

// Returns what `store` and `load` make of v.
template <typename T>
Floats round_to(Floats v) {
  T stored[LANES];
  store(stored, v);
  return load(stored);
}

template <>
inline Floats round_to<float>(Floats v) {
  return v;
}

inline float sum_lanes(Floats v) {
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) v[i] += v[i + width];
  return v[0];
}

// Calls step(i, count) for the elements [i, i + count) of [0, size), LANES of them at a time and then the rest.
template <typename Step>
inline void for_lanes(int64_t size, Step step) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) step(i, LANES);
  if (i < size) step(i, size - i);
}

// Calls call(T{}) with the type that a dtype code stands for.
template <typename Call>
void with_dtype(int dtype, Call call) {
  if (dtype == FP32) call(float{});
  else if (dtype == BF16) call(bf16{});
  else call(fp16{});
}
