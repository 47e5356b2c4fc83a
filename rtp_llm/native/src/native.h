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

#if defined(__aarch64__)
using fp16 = __fp16;
inline float to_float(fp16 value) { return value; }
inline fp16 to_fp16(float value) { return static_cast<fp16>(value); }
#else
struct fp16 {
  uint16_t bits;
};

inline float to_float(fp16 value) {
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
inline fp16 to_fp16(float value) {
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

inline size_t dtype_size(int dtype) { return dtype == FP32 ? 4 : 2; }

inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
