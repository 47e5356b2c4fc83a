// Computes the tasks of a plan in one thread.
#pragma once
#include "attention_plan.h"

namespace attention {

constexpr int64_t MAX_HEAD_DIM = 256;
constexpr float LOG2_E = 1.44269504f;

inline int64_t max_rows(int64_t group) { return std::max(MAX_ROWS, group); }

// Buffers of one thread.
template <class F>
struct Scratch {
  using Item = typename F::Item;
  float *keys, *values, *queries, *weights;  // items, which are as large as floats
  float *scores, *parts, *states;

  static int64_t size(int64_t group, int64_t columns) {
    return SPLIT * (2 * columns + 2 * ROWS) + max_rows(group) * columns +
           (ROWS + max_rows(group)) * Partial::size(columns);
  }

  Scratch(float* memory, int64_t group, int64_t columns) {
    auto take = [&memory](int64_t size) { return std::exchange(memory, memory + size); };
    keys = take(SPLIT * columns);
    values = take(SPLIT * columns);
    weights = take(SPLIT * ROWS);
    scores = take(SPLIT * ROWS);
    queries = take(max_rows(group) * columns);
    parts = take(ROWS * Partial::size(columns));
    states = take(max_rows(group) * Partial::size(columns));
  }
};

template <class F>
class Worker {
  using Element = typename F::Element;
  using Item = typename F::Item;

 public:
  Worker(const Call& call, float* scratch)
      : call_(call),
        group_(call.group()),
        columns_(call.columns()),
        items_(round_up(div_up(call.step.head_dim, F::STEP), W)),
        scratch_(scratch, group_, columns_) {}

  // Computes a task; `next`, or null, is the one that will be run after it.
  void run(const Task& task, const Task* next) {
    int64_t rows = task.num_tokens * group_, all_rows = task.num_kv_heads * rows, size = Partial::size(columns_);
    load_queries(task);
    for (int64_t r = 0; r < all_rows && !task.partials; r++) state(r).clear();
    for (int64_t split = task.first_split; split < task.last_split; split++) {
      if (split + 1 < task.last_split) announce(task, split + 1);
      else if (next) announce(*next, next->first_split);
      else upcoming_->next = 0, upcoming_->last = -1;
      float* partials = task.partials + (split - task.first_split) * all_rows * size;
      for (int64_t row = 0; row < all_rows; row += rows)
        attend(task, split, row, task.partials ? partials + row * size : nullptr);
      prefetch(SPLIT * task.num_kv_heads);
      std::swap(current_, upcoming_);
    }
    for (int64_t r = 0; r < all_rows && !task.partials; r++) write(task, r);
  }

  // Finds the keys of the split that `run` begins with, unless a task before it has.
  void begin(const Task& task) {
    announce(task, task.first_split);
    std::swap(current_, upcoming_);
  }

  // Folds the partial results of a task and writes its output.
  void finish(const Task& task) {
    int64_t rows = task.num_kv_heads * task.num_tokens * group_, size = Partial::size(columns_);
    for (int64_t r = 0; r < rows; r++) {
      state(r).clear();
      for (int64_t i = 0; i < task.num_splits(); i++)
        fold(state(r), {task.partials + (i * rows + r) * size, columns_});
      write(task, r);
    }
  }

 private:
  // Keys that a query attends to, as offsets from the start of a split; may be empty.
  struct Range {
    int64_t first, last;  // both inclusive
    int64_t begin(int64_t unit) const { return round_down(first, unit); }
    int64_t end(int64_t unit) const { return round_up(last + 1, unit); }
  };

  static constexpr Element ZEROS[MAX_HEAD_DIM] = {};

  // The addresses of the keys and values of a split that a task sees, of one of its heads, and zeros beside them up to
  // multiples of PAIR. What is not prefetched yet begins in `next`, `offset` bytes behind its address.
  struct Rows {
    const Element* keys[SPLIT];
    const Element* values[SPLIT];
    int64_t next = 0, last = -1, offset = 0, bytes = 0;
  };

  Partial state(int64_t row) { return {scratch_.states + row * Partial::size(columns_), columns_}; }

  // Returns the keys of a split that the queries of these rows see, together.
  Range range(const Task& task, int64_t split, int64_t first_row, int64_t last_row) const {
    int64_t first = call_.lowest(task.position + first_row / group_), last = task.position + last_row / group_;
    return {std::max<int64_t>(first - split * SPLIT, 0), std::min<int64_t>(last - split * SPLIT, SPLIT - 1)};
  }

  // Returns where a row of a task begins in a tensor [tokens, heads, head_dim] with this distance between tokens.
  int64_t offset(const Task& task, int64_t row, int64_t stride) const {
    int64_t rows = task.num_tokens * group_, kv_head = task.kv_head + row / rows;
    return (task.token + row % rows / group_) * stride + (kv_head * group_ + row % group_) * call_.step.head_dim;
  }

  void load_queries(const Task& task) {
    for (int64_t r = 0; r < task.num_kv_heads * task.num_tokens * group_; r++) {
      const Element* row = static_cast<const Element*>(call_.layer.q) + offset(task, r, call_.layer.q_stride);
      for (int64_t i = 0; i < items_; i += W)
        store(queries() + r * items_ + i, load_row<F>(row, i * F::STEP, call_.step.head_dim));
    }
  }

  // Computes the partial results of a split and one head, whose rows begin with `first`: into `partials`, or, where
  // that is null, folded into the states.
  void attend(const Task& task, int64_t split, int64_t first, float* partials) {
    int64_t rows = task.num_tokens * group_, size = Partial::size(columns_);
    Range all = range(task, split, 0, rows - 1);
    pack_keys(all);
    pack_values(current_->values, all);
    for (int64_t row = 0; row < rows;) {
      int64_t count = (rows - row) / div_up(rows - row, ROWS);
      float* out = partials ? partials + row * size : scratch_.parts;
      attend_rows(task, split, first, row, count, {out, size});
      for (int64_t r = 0; !partials && r < count; r++) fold(state(first + row + r), {out + r * size, columns_});
      row += count;
    }
    for (int64_t key = all.first; key <= all.last; key++) {  // to the next head
      current_->keys[key] += call_.step.head_dim;
      current_->values[key] += call_.step.head_dim;
    }
  }

  void attend_rows(const Task& task, int64_t split, int64_t first, int64_t row, int64_t count, Matrix<float> out) {
    Range all = range(task, split, row, row + count - 1);
    if (all.first > all.last) {
      for (int64_t r = 0; r < count; r++) Partial{out.data + r * out.stride, columns_}.clear();
      return;
    }
    int64_t begin = all.begin(PAIR), end = all.end(PAIR);
    multiply_keys(first + row, count, round_down(begin, PANEL), end);
    for (int64_t r = 0; r < count; r++) {
      float* scores = scratch_.scores + r * SPLIT;
      Range own = range(task, split, row + r, row + r);
      std::fill(scores + begin, scores + std::min(std::max(own.first, begin), end), -INFINITY);
      std::fill(scores + std::max(begin, own.last + 1), scores + end, -INFINITY);
      softmax<F>(scores, begin, end, call_.layer.scale * LOG2_E, weights() + r * (SPLIT / F::STEP),
                 {out.data + r * out.stride, columns_});
    }
    multiply_values(0, count, begin, end, out);
    if (row / group_ != (row + count - 1) / group_ && has_nan(count, out))
      multiply_values_row_by_row(task, split, row, count, out);
  }

  // A weight of zero does not hide NaN. A row must not see those of keys that only the other rows see.
  void multiply_values_row_by_row(const Task& task, int64_t split, int64_t row, int64_t count, Matrix<float> out) {
    for (int64_t r = 0; r < count; r++) {
      Range own = range(task, split, row + r, row + r);
      if (own.first > own.last) continue;
      const Element* rows[SPLIT];
      for (int64_t key = own.begin(PAIR); key < own.end(PAIR); key++)
        rows[key] = key < own.first || key > own.last ? ZEROS : current_->values[key];
      pack_values(rows, own);
      multiply_values(r, 1, own.begin(PAIR), own.end(PAIR), {out.data + r * out.stride, out.stride});
    }
    pack_values(current_->values, range(task, split, 0, task.num_tokens * group_ - 1));
  }

  bool has_nan(int64_t count, Matrix<float> out) const {
    Floats sums{};
    for (int64_t r = 0; r < count; r++)
      for (int64_t i = 0; i < columns_; i += W) sums += load<Floats>(out.data + r * out.stride + i) * 0.0f;
    return sum(sums) != 0.0f;  // infinity too
  }

  void multiply_keys(int64_t row, int64_t count, int64_t begin, int64_t end) {
    int64_t steps = div_up(call_.step.head_dim, F::STEP);
    for (int64_t key = begin; key < end; key += PANEL) {
      prefetch(PANEL * 3 / 16);
      multiply<F>(count, std::min<int64_t>(VECTORS, (end - key) / W), {queries() + row * items_, items_},
                  {keys() + key * items_, PANEL}, steps, {scratch_.scores + key, SPLIT});
    }
  }

  void multiply_values(int64_t row, int64_t count, int64_t begin, int64_t end, Matrix<float> out) {
    for (int64_t column = 0; column < columns_; column += PANEL)
      multiply<F>(count, std::min<int64_t>(VECTORS, (columns_ - column) / W),
                  {weights() + (row * SPLIT + begin) / F::STEP, SPLIT / F::STEP},
                  {values() + begin / F::STEP * columns_ + column, columns_}, (end - begin) / F::STEP,
                  {out.data + column, out.stride});
  }

  // Finds the keys and values of the split that is computed next, which `prefetch` then brings closer.
  void announce(const Task& task, int64_t split) {
    const AttentionLayer& layer = call_.layer;
    const AttentionStep& step = call_.step;
    Range all = range(task, split, 0, task.num_tokens * group_ - 1);
    const int64_t* table = step.block_tables + task.sequence * step.table_width;
    for (const Element** rows : {upcoming_->keys, upcoming_->values}) {
      std::fill(rows + all.begin(PAIR), rows + all.first, ZEROS);
      std::fill(rows + all.last + 1, rows + all.end(PAIR), ZEROS);
    }
    int64_t key = all.first;
    while (key <= all.last) {
      int64_t position = split * SPLIT + key, offset = position % step.block_size;
      int64_t at = table[position / step.block_size] * layer.block_stride +
                   (offset * step.kv_heads + task.kv_head) * step.head_dim;
      // The first of a block, now, brings the address of its page.
      __builtin_prefetch(static_cast<const Element*>(layer.keys) + at);
      __builtin_prefetch(static_cast<const Element*>(layer.values) + at);
      int64_t stop = std::min(all.last + 1, key + step.block_size - offset);
      for (; key < stop; key++, at += step.kv_heads * step.head_dim) {
        upcoming_->keys[key] = static_cast<const Element*>(layer.keys) + at;
        upcoming_->values[key] = static_cast<const Element*>(layer.values) + at;
      }
    }
    upcoming_->next = all.first;
    upcoming_->last = all.last;
    upcoming_->offset = 0;
    upcoming_->bytes = task.num_kv_heads * head_bytes();
  }

  int64_t head_bytes() const { return call_.step.head_dim * static_cast<int64_t>(sizeof(Element)); }

  // Prefetches as much of the announced split as `count` keys and values of one head. Called in small steps between
  // computations, so that the memory is never idle.
  void prefetch(int64_t count) {
    Rows& rows = *upcoming_;
    for (int64_t lines = count * div_up(head_bytes(), 64); lines > 0 && rows.next <= rows.last; lines--) {
      __builtin_prefetch(reinterpret_cast<const char*>(rows.keys[rows.next]) + rows.offset);
      __builtin_prefetch(reinterpret_cast<const char*>(rows.values[rows.next]) + rows.offset);
      rows.offset += 64;
      if (rows.offset < rows.bytes) continue;
      rows.offset = 0;
      rows.next++;
    }
  }

  void pack_keys(Range range) {
    for (int64_t key = range.begin(PAIR); key < range.end(PAIR); key += W) {
      prefetch(W * 3 / 8);
      attention::pack_keys<F>(current_->keys + key, call_.step.head_dim,
                     keys() + round_down(key, PANEL) * items_ + key % PANEL);
    }
  }

  void pack_values(const Element* const* rows, Range range) {
    for (int64_t key = range.begin(PAIR); key < range.end(PAIR); key += PAIR) {
      prefetch(PAIR / 4);
      attention::pack_values<F>(rows + key, call_.step.head_dim, columns_, values() + key / F::STEP * columns_);
    }
  }

  void write(const Task& task, int64_t row) {
    const AttentionStep& step = call_.step;
    Element* out = static_cast<Element*>(call_.layer.out) + offset(task, row, step.heads * step.head_dim);
    float factor = 1.0f / state(row).total();
    for (int64_t i = 0; i < step.head_dim; i += W) {
      Floats values = load<Floats>(state(row).sums + i) * factor;
      if (i + W <= step.head_dim) {
        store_vector(out + i, values);
        continue;
      }
      Element last[W];
      store_vector(last, values);
      std::memcpy(out + i, last, static_cast<size_t>(step.head_dim - i) * sizeof(Element));
    }
  }

  Item* keys() { return reinterpret_cast<Item*>(scratch_.keys); }
  Item* values() { return reinterpret_cast<Item*>(scratch_.values); }
  Item* queries() { return reinterpret_cast<Item*>(scratch_.queries); }
  Item* weights() { return reinterpret_cast<Item*>(scratch_.weights); }

  const Call& call_;
  const int64_t group_, columns_, items_;
  Scratch<F> scratch_;
  Rows rows_[2];
  Rows *current_ = &rows_[0], *upcoming_ = &rows_[1];
};

}  // namespace attention
