// How the attention of one layer is divided into tasks.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "attention_kernel.h"

// What all layers of a KV cache group have in common in one step, see `native_attention.Step`.
struct AttentionStep {
  const int64_t* query_start_loc;  // [num_sequences + 1]
  const int64_t* seq_lens;         // [num_sequences]
  const int64_t* block_tables;     // [num_sequences, table_width]
  const int64_t* slots;            // [num_tokens]
  int64_t num_sequences, num_tokens, table_width;
  int64_t block_size, window;
  int64_t kv_heads, head_dim, heads;
  float* workspace;
  int64_t workspace_bytes;
  int64_t threads;
};

// One layer. Strides are in elements: of tokens of q, k and v, and of blocks. Heads and slots are adjacent.
struct AttentionLayer {
  const void *q, *k, *v;
  void *out, *keys, *values;
  int64_t q_stride, k_stride, v_stride, block_stride;
  float scale;
};

namespace attention {

constexpr int64_t MAX_ROWS = 192;  // of a task: the packing of a split costs little beside its products
constexpr int64_t MIN_ROWS = 24;
constexpr int64_t MAX_SPLIT_BYTES = 512 << 10;  // of the keys and values that a task prefetches; L2 caches have 1 MB

struct Call {
  const AttentionStep& step;
  const AttentionLayer& layer;

  int64_t group() const { return step.heads / step.kv_heads; }
  int64_t columns() const { return round_up(step.head_dim, PAIR); }
  int64_t lowest(int64_t position) const {
    return step.window ? std::max<int64_t>(0, position + 1 - step.window) : 0;
  }
};

// Queries of one sequence, the splits of the keys that they attend to, [first_split, last_split), and the KV heads.
struct Task {
  int64_t sequence, kv_head, num_kv_heads;
  int64_t token, position, num_tokens;  // of the first query: its row of q, and its position in the sequence
  int64_t first_split, last_split;
  float* partials;  // of the splits, to be folded later; null: fold them and write the output

  int64_t num_splits() const { return last_split - first_split; }
};

struct Plan {
  std::vector<Task> tasks;
  std::vector<Task> folded;  // those whose splits other tasks compute
};

// Divides the work, so that each thread has several tasks. What takes more than its share of the time is divided by
// splits too, as far as there is memory for their partial results: `size` floats.
inline Plan make_plan(const Call& call, float* memory, int64_t size) {
  const AttentionStep& step = call.step;
  int64_t group = call.group(), total = 0;
  int64_t fair_rows = step.num_tokens * step.heads / (4 * step.threads);
  int64_t tile = std::max<int64_t>(1, std::clamp(fair_rows, MIN_ROWS, MAX_ROWS) / group);
  std::vector<Task> tiles;
  for (int64_t i = step.num_sequences - 1; i >= 0; i--) {  // chunks before decodes: the last tasks are short
    int64_t end = step.query_start_loc[i + 1], start = step.query_start_loc[i];
    int64_t to_position = step.seq_lens[i] - end;
    for (int64_t token = start + round_down(end - start - 1, tile); token >= start; token -= tile) {
      int64_t position = token + to_position, num_tokens = std::min(tile, end - token);
      int64_t first = call.lowest(position) / SPLIT, last = (position + num_tokens - 1) / SPLIT + 1;
      tiles.push_back({i, 0, 0, token, position, num_tokens, first, last, nullptr});
      total += (last - first) * step.kv_heads;
    }
  }
  Plan plan;
  float* end = memory + size;
  for (Task task : tiles) {
    int64_t splits = task.num_splits(), rows = task.num_tokens * group;
    int64_t partial = rows * step.kv_heads * Partial::size(call.columns());
    bool divides = splits > 1 && splits * 2 * step.threads > total && splits * partial <= end - memory;
    // Heads in one task are read together, side by side in memory, as long as there are tasks enough.
    int64_t tasks = divides ? total : total / splits;
    int64_t heads = std::min(tasks / (4 * step.threads), MAX_ROWS / rows);
    heads = std::clamp<int64_t>(heads, 1, MAX_SPLIT_BYTES / (2 * SPLIT * call.columns() * sizeof(float)));
    for (task.kv_head = 0; task.kv_head < step.kv_heads; task.kv_head += heads) {
      task.num_kv_heads = std::min(heads, step.kv_heads - task.kv_head);
      if (!divides) {
        plan.tasks.push_back(task);
        continue;
      }
      int64_t part_size = task.num_kv_heads * rows * Partial::size(call.columns());
      task.partials = std::exchange(memory, memory + splits * part_size);
      plan.folded.push_back(task);
      for (Task part = task; part.first_split < task.last_split; part.first_split++, part.partials += part_size) {
        part.last_split = part.first_split + 1;
        plan.tasks.push_back(part);
      }
    }
  }
  return plan;
}

}  // namespace attention
