// What precedes attention, in place on the output of the qkv projection: norms of query and key heads, rotary embedding.
#include "norm.h"
#include "replay.h"
#include "team.h"

namespace {

constexpr int64_t RUN_ELEMENTS = 1 << 14;  // that a thread computes at once

// Rotates the pairs (i, i + dim / 2) of a head by the angles of its position. Rounds as `ops.apply_rotary_emb` does.
template <typename T>
void rotate(T* head, const T* cos, const T* sin, int64_t dim) {
  T* other = head + dim / 2;
  for_lanes(dim / 2, [&](int64_t i, int64_t count) {
    Floats a = load(head + i, count), b = load(other + i, count), c = load(cos + i, count), s = load(sin + i, count);
    store(head + i, round_to<T>(a * c) - round_to<T>(b * s), count);
    store(other + i, round_to<T>(b * c) + round_to<T>(a * s), count);
  });
}

}  // namespace

// qkv: [rows, (heads + 2 * kv_heads) * dim], rows `ld` elements apart; query heads, key heads, value heads.
// q_weight, k_weight: [dim], null: no norm. cos, sin: [rows, dim / 2], null: no rotation.
RTP_API void rtp_norm_rope(int dtype, void* qkv, int64_t ld, const void* q_weight, const void* k_weight,
                           const void* cos, const void* sin, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim,
                           float eps, int threads) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    int64_t rotated = heads + kv_heads;
    for_runs(rows, div_up(RUN_ELEMENTS, rotated * dim), threads, [&](int64_t row) {
      for (int64_t i = 0; i < rotated; i++) {
        T* head = static_cast<T*>(qkv) + row * ld + i * dim;
        const T* weight = static_cast<const T*>(i < heads ? q_weight : k_weight);
        int64_t angles = row * (dim / 2);
        if (weight) norm_row(head, weight, head, dim, eps);
        if (cos) rotate(head, static_cast<const T*>(cos) + angles, static_cast<const T*>(sin) + angles, dim);
      }
    });
  });
}
RTP_REPLAYABLE(rtp_norm_rope)
