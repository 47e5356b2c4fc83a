// Sixteen floats at a time, at every level: the compiler splits them into the vectors that the CPU has.
//
// Sums run over sixteen lanes and then over the lanes, in one order: they do not depend on the level, except where it
// fuses a product and a sum.
#pragma once
#include <cmath>

#include "vector.h"

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));    // of Floats
typedef uint16_t Halves __attribute__((vector_size(32)));  // sixteen bf16 or fp16

constexpr int64_t LANES = 16;

inline Floats load(const float* from) { return load<Floats>(from); }

inline Floats load(const bf16* from) {
  return reinterpret_cast<Floats>(__builtin_convertvector(load<Halves>(from), Bits) << 16);
}

inline Floats load(const fp16* from) {
  FloatVector parts[LANES / WIDTH];
  for (int i = 0; i < LANES / WIDTH; i++) parts[i] = load_vector(from + i * WIDTH);
  return load<Floats>(parts);
}

inline void store(float* to, Floats v) { store<Floats>(to, v); }

// Rounds to the nearest, ties to even; NaN stays NaN. See `to_bf16`.
inline void store(bf16* to, Floats v) {
  Bits bits = reinterpret_cast<Bits>(v);
  Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Halves stored = __builtin_convertvector(v == v ? rounded : (bits >> 16) | 0x40, Halves);
  store(to, stored);
}

inline void store(fp16* to, Floats v) {
  FloatVector parts[LANES / WIDTH];
  store<Floats>(parts, v);
  for (int i = 0; i < LANES / WIDTH; i++) store_vector(to + i * WIDTH, parts[i]);
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
