// RMSNorm, and the end of a sub-block of the decoder: the addition to the residual and the norms around it.
#include "norm.h"
#include "replay.h"
#include "team.h"

namespace {

constexpr int64_t RUN_ELEMENTS = 1 << 14;  // that a thread computes at once: fewer cost more than they save

template <typename T>
struct SubBlockEnd {
  const T *post_weight, *pre_weight;  // null: no norm there
  int64_t size;
  float eps;

  // residual += post_norm(x); x = pre_norm(residual)
  void compute(T* x, T* residual) const {
    if (post_weight) norm_row(x, post_weight, x, size, eps);
    for_lanes(size, [&](int64_t i, int64_t count) {
      store(residual + i, load(x + i, count) + load(residual + i, count), count);
    });
    if (pre_weight) norm_row(residual, pre_weight, x, size, eps);
  }
};

}  // namespace

// x [rows, size], rows `ldx` elements apart; weight [size]; y [rows, size].
RTP_API void rtp_rms_norm(int dtype, const void* x, int64_t ldx, const void* weight, void* y, int64_t rows,
                          int64_t size, float eps, int threads) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    for_runs(rows, div_up(RUN_ELEMENTS, size), threads, [&](int64_t row) {
      norm_row(static_cast<const T*>(x) + row * ldx, static_cast<const T*>(weight), static_cast<T*>(y) + row * size,
               size, eps);
    });
  });
}
RTP_REPLAYABLE(rtp_rms_norm)

// residual += post_norm(x), then x = pre_norm(residual), both [rows, size]. A weight that is null: no norm there; without
// pre_weight, x holds undefined values.
RTP_API void rtp_add_rms_norm(int dtype, void* x, void* residual, const void* post_weight, const void* pre_weight,
                              int64_t rows, int64_t size, float eps, int threads) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    SubBlockEnd<T> end{static_cast<const T*>(post_weight), static_cast<const T*>(pre_weight), size, eps};
    for_runs(rows, div_up(RUN_ELEMENTS, size), threads, [&](int64_t row) {
      end.compute(static_cast<T*>(x) + row * size, static_cast<T*>(residual) + row * size);
    });
  });
}
RTP_REPLAYABLE(rtp_add_rms_norm)
