// What all kernels share: dtypes, and the conversions between them. `library.SIGNATURES` lists the functions.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#define RTP_API extern "C" __attribute__((visibility("default")))

// The codes of `library.DTYPE_CODES`.
enum Dtype : int { FP32 = 0, BF16 = 1, FP16 = 2 };

using bf16 = uint16_t;  // its bits

inline float to_float(bf16 value) {
  uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Rounds to the nearest, ties to even; NaN stays NaN.
inline bf16 to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<bf16>((bits >> 16) | 0x40);
  return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline size_t dtype_size(int dtype) { return dtype == FP32 ? 4 : 2; }

inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
