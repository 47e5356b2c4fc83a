// A register of 32-bit elements at every level, in the vector extensions of gcc and clang: one source for all.
#pragma once
#include "native.h"

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // which gcc 12 finds in many of its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define RTP_INLINE inline __attribute__((always_inline))

#if defined(__AVX512BW__)
constexpr int WIDTH = 16, LOG_WIDTH = 4;  // elements in a register
#elif defined(__AVX2__)
constexpr int WIDTH = 8, LOG_WIDTH = 3;
#else
constexpr int WIDTH = 4, LOG_WIDTH = 2;
#endif

typedef float FloatVector __attribute__((vector_size(4 * WIDTH)));
typedef int32_t IntVector __attribute__((vector_size(4 * WIDTH)));
typedef int16_t ShortVector __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t HalfVector __attribute__((vector_size(2 * WIDTH)));  // bf16 or fp16, as many as floats in a register

template <class V>
RTP_INLINE V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
RTP_INLINE void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

RTP_INLINE FloatVector load_vector(const float* from) { return load<FloatVector>(from); }

RTP_INLINE FloatVector load_vector(const bf16* from) {
  return reinterpret_cast<FloatVector>(__builtin_convertvector(load<HalfVector>(from), IntVector) << 16);
}

RTP_INLINE FloatVector load_vector(const fp16* from) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(load<__m256i>(from));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(load<__m128i>(from));
#else
  FloatVector v;
  for (int i = 0; i < WIDTH; i++) v[i] = to_float(from[i]);
  return v;
#endif
}

RTP_INLINE void store_vector(float* to, FloatVector v) { store(to, v); }

RTP_INLINE void store_vector(bf16* to, FloatVector v) {
#if defined(__AVX512BF16__)
  store(to, (__m256i)_mm512_cvtneps_pbh(v));
#else
  for (int i = 0; i < WIDTH; i++) to[i] = to_bf16(v[i]);
#endif
}

RTP_INLINE void store_vector(fp16* to, FloatVector v) {
#if defined(__AVX512F__)
  store(to, _mm512_cvtps_ph(v, 0));
#elif defined(__F16C__)
  store(to, _mm256_cvtps_ph(v, 0));
#else
  for (int i = 0; i < WIDTH; i++) to[i] = to_fp16(v[i]);
#endif
}

RTP_INLINE FloatVector splat(float x) { return x - FloatVector{}; }
