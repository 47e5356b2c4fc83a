// Paged causal attention with grouped queries, and the write of new keys and values into the cache.
//
// Flash attention (Dao et al. 2023): the keys of a sequence are cut into splits at multiples of SPLIT; each split gives
// a row of queries a softmax of its own, and these are folded in order of position. That is what every row computes,
// whether its token is a decode or one of a chunk, whoever computes beside it, and however the work is divided: tiles
// of rows only share the packed keys and values, and threads either fold the splits of a tile as they compute them or
// leave them to be folded by another. So a row's bits depend on its sequence alone.
#include <deque>

#include "attention_worker.h"
#include "replay.h"
#include "team.h"

namespace attention {
namespace {

constexpr int64_t RUN_TOKENS = 64;  // whose keys and values a thread writes at once

// Writes the keys and values of a token to its slot.
template <class T>
void write_token(const Call& call, int64_t token) {
  const AttentionStep& step = call.step;
  const AttentionLayer& layer = call.layer;
  int64_t slot = step.slots[token], row = step.kv_heads * step.head_dim;
  int64_t at = slot / step.block_size * layer.block_stride + slot % step.block_size * row;
  size_t bytes = static_cast<size_t>(row) * sizeof(T);
  std::memcpy(static_cast<T*>(layer.keys) + at, static_cast<const T*>(layer.k) + token * layer.k_stride, bytes);
  std::memcpy(static_cast<T*>(layer.values) + at, static_cast<const T*>(layer.v) + token * layer.v_stride, bytes);
}

template <class F>
void attend(const Call& call) {
  const AttentionStep& step = call.step;
  int64_t scratch = Scratch<F>::size(call.group(), call.columns());
  int64_t used = step.threads * scratch;
  const Plan plan = make_plan(call, step.workspace + used, step.workspace_bytes / 4 - used);
  auto num_tasks = static_cast<int64_t>(plan.tasks.size()), num_folded = static_cast<int64_t>(plan.folded.size());
  int threads = static_cast<int>(std::min(step.threads, num_tasks));
  for_runs(step.num_tokens, RUN_TOKENS, threads,
           [&](int64_t token) { write_token<typename F::Element>(call, token); });
  std::deque<Worker<F>> workers;
  for (int thread = 0; thread < threads; thread++) workers.emplace_back(call, step.workspace + thread * scratch);
  for_tasks(num_tasks, threads, [&](const Turn& turn) {
    Worker<F>& worker = workers[turn.thread];
    if (turn.is_first) worker.begin(plan.tasks[turn.task]);
    worker.run(plan.tasks[turn.task], turn.next < 0 ? nullptr : &plan.tasks[turn.next]);
  });
  for_tasks(num_folded, threads, [&](const Turn& turn) { workers[turn.thread].finish(plan.folded[turn.task]); });
}

#if defined(__AVX512BF16__)
using PackedBf16 = Paired;
#else
using PackedBf16 = Single<bf16>;
#endif

}  // namespace
}  // namespace attention

using namespace attention;

// Returns the bytes of the workspace that each thread needs; what there is beyond that holds partial results.
RTP_API int64_t rtp_attention_scratch_bytes(int64_t heads, int64_t kv_heads, int64_t head_dim) {
  return 4 * Scratch<Single<float>>::size(heads / kv_heads, round_up(head_dim, PAIR));
}

// Writes k and v to the cache; out [num_tokens, heads, head_dim] = the attention of q.
RTP_API void rtp_attention(int dtype, const AttentionStep* step, const void* q, int64_t q_stride, const void* k,
                           int64_t k_stride, const void* v, int64_t v_stride, void* keys, void* values,
                           int64_t block_stride, float scale, void* out) {
  AttentionLayer layer{q, k, v, out, keys, values, q_stride, k_stride, v_stride, block_stride, scale};
  Call call{*step, layer};
  if (dtype == BF16) attend<PackedBf16>(call);
  else if (dtype == FP16) attend<Single<fp16>>(call);
  else attend<Single<float>>(call);
}
RTP_REPLAYABLE(rtp_attention)
