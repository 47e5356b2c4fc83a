// RMSNorm of one row, as norm.cpp and rope.cpp need it.
#pragma once
#include "lanes.h"

// y = x / rms(x) * weight. The quotient is computed in fp32 and rounded, as in `ops.rms_norm`. y may be x.
template <typename T>
void norm_row(const T* x, const T* weight, T* y, int64_t size, float eps) {
  Floats squares{};
  for_lanes(size, [&](int64_t i, int64_t count) {
    Floats v = load(x + i, count);
    squares += v * v;
  });
  float scale = 1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(size) + eps);
  for_lanes(size, [&](int64_t i, int64_t count) {
    Floats normalized = round_to<T>(load(x + i, count) * scale);
    store(y + i, load(weight + i, count) * normalized, count);
  });
}
