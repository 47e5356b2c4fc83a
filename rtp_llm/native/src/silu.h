#pragma once
#include <initializer_list>

#include "lanes.h"

typedef int32_t Integers __attribute__((vector_size(64)));

inline Floats broadcast(float value) { return value - Floats{}; }

// Returns e^x with a relative error below 3e-7; at least 1e-38, infinity above 88.8. After expf of Cephes.
inline Floats exp(Floats x) {
  x = x < -87.4f ? broadcast(-87.4f) : x;
  x = x > 88.8f ? broadcast(88.8f) : x;
  const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  Floats n = x * 1.44269504f + to_integer - to_integer;
  Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = broadcast(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = p * r + c;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors, since 2^128 is infinity.
  Integers exponent = __builtin_convertvector(n, Integers), half = exponent >> 1;
  return p * reinterpret_cast<Floats>((half + 127) << 23) * reinterpret_cast<Floats>((exponent - half + 127) << 23);
}

inline Floats silu(Floats x) { return x / (1.0f + exp(-x)); }
