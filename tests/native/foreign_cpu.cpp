// Compares kernels with plain loops in double, on whatever CPU this is compiled for. Prints what differs; exit code 1.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "../../rtp_llm/native/src/attention_plan.h"
#include "../../rtp_llm/native/src/native.h"

extern "C" {
int rtp_linear_start(int* amx);
int64_t rtp_linear_packed_bytes(int dtype, int gated, int64_t n, int64_t k);
void rtp_linear_pack(int dtype, int gated, const void* weight, void* packed, int64_t n, int64_t k, int threads);
void rtp_linear(int dtype, int y_dtype, int gated, const void* x, int64_t ldx, const void* packed, const void* bias,
                void* y, int64_t ldy, int64_t m, int64_t n, int64_t k, int threads);
void rtp_add_rms_norm(int dtype, void* x, void* residual, const void* post_weight, const void* pre_weight, int64_t rows,
                      int64_t size, float eps, int threads);
int64_t rtp_attention_scratch_bytes(int64_t heads, int64_t kv_heads, int64_t head_dim);
void rtp_attention(int dtype, const AttentionStep* step, const void* q, int64_t q_stride, const void* k,
                   int64_t k_stride, const void* v, int64_t v_stride, void* keys, void* values, int64_t block_stride,
                   float scale, void* out);
}

using Values = std::vector<float>;
int failures = 0;

// Returns the numbers -1 … 1 of a linear congruential generator.
Values make_values(int64_t count) {
  static uint32_t state = 1;
  Values values(count);
  for (float& value : values) value = static_cast<int32_t>(state = state * 1664525u + 1013904223u) * 0x1p-31f;
  return values;
}

void compare(const char* what, const Values& values, const std::vector<double>& expected, double bound) {
  double worst = 0;
  for (size_t i = 0; i < values.size(); i++) worst = std::fmax(worst, std::fabs(values[i] - expected[i]));
  bool is_right = values.size() == expected.size() && worst <= bound;  // false for NaN as well
  std::printf("%-28s largest error %.2e, bound %.0e%s\n", what, worst, bound, is_right ? "" : "  WRONG");
  failures += !is_right;
}

void check_linear(int64_t m, int gated) {
  constexpr int64_t n = 202, k = 131;
  Values x = make_values(m * k), w = make_values(n * k), bias = make_values(n);
  int64_t columns = gated ? n / 2 : n;
  std::vector<char> packed(rtp_linear_packed_bytes(FP32, gated, n, k) + 16384);
  char* memory = packed.data() + 4096 - reinterpret_cast<uintptr_t>(packed.data()) % 4096;
  rtp_linear_pack(FP32, gated, w.data(), memory, n, k, 1);
  Values y(m * columns);
  rtp_linear(FP32, FP32, gated, x.data(), k, memory, bias.data(), y.data(), columns, m, n, k, 2);
  std::vector<double> expected;
  auto product = [&](int64_t row, int64_t column) {
    double sum = bias[column];
    for (int64_t i = 0; i < k; i++) sum += static_cast<double>(x[row * k + i]) * w[column * k + i];
    return sum;
  };
  for (int64_t row = 0; row < m; row++)
    for (int64_t column = 0; column < columns; column++) {
      double value = product(row, column);
      if (gated) value = value / (1 + std::exp(-value)) * product(row, column + columns);
      expected.push_back(value);
    }
  compare(gated ? "gated linear" : "linear", y, expected, gated ? 1e-3 : 1e-4);
}

void check_norm() {
  constexpr int64_t rows = 5, size = 133;
  Values x = make_values(rows * size), residual = make_values(rows * size), weight = make_values(size);
  std::vector<double> expected;
  for (int64_t row = 0; row < rows; row++) {
    double squares = 0;
    auto total = [&](int64_t i) { return static_cast<double>(x[row * size + i]) + residual[row * size + i]; };
    for (int64_t i = 0; i < size; i++) squares += total(i) * total(i);
    for (int64_t i = 0; i < size; i++) expected.push_back(total(i) / std::sqrt(squares / size + 1e-6) * weight[i]);
  }
  rtp_add_rms_norm(FP32, x.data(), residual.data(), nullptr, weight.data(), rows, size, 1e-6f, 1);
  compare("residual addition and norm", x, expected, 1e-5);
}

// One sequence whose newest tokens are a chunk, with grouped heads and blocks in descending order.
void check_attention(int64_t seq_len, int64_t num_tokens, int64_t window) {
  constexpr int64_t heads = 6, kv_heads = 2, dim = 32, block_size = 16;
  int64_t num_blocks = div_up(seq_len, block_size), block_stride = block_size * kv_heads * dim;
  Values k = make_values(seq_len * kv_heads * dim), v = make_values(seq_len * kv_heads * dim);
  Values q = make_values(num_tokens * heads * dim), out(q.size());
  Values keys((num_blocks + 1) * block_stride, NAN), values(keys);
  std::vector<int64_t> table(num_blocks), slots(num_tokens), starts{0, num_tokens}, lens{seq_len};
  for (int64_t i = 0; i < num_blocks; i++) table[i] = num_blocks - i;
  auto slot = [&](int64_t position) { return table[position / block_size] * block_size + position % block_size; };
  int64_t first = seq_len - num_tokens, row = kv_heads * dim;
  for (int64_t i = 0; i < num_tokens; i++) slots[i] = slot(first + i);
  for (int64_t i = 0; i < first * row; i++) {
    keys[slot(i / row) * row + i % row] = k[i];
    values[slot(i / row) * row + i % row] = v[i];
  }
  std::vector<char> workspace(2 * rtp_attention_scratch_bytes(heads, kv_heads, dim) + (1 << 20));
  AttentionStep step{starts.data(), lens.data(), table.data(), slots.data(), 1, num_tokens, num_blocks,
                                block_size, window, kv_heads, dim, heads,
                                reinterpret_cast<float*>(workspace.data()), static_cast<int64_t>(workspace.size()), 2};
  rtp_attention(FP32, &step, q.data(), heads * dim, &k[first * row], row, &v[first * row], row, keys.data(),
                values.data(), block_stride, 0.2f, out.data());
  std::vector<double> expected;
  for (int64_t token = 0; token < num_tokens; token++)
    for (int64_t head = 0; head < heads; head++) {
      int64_t position = first + token, kv = head / (heads / kv_heads);
      int64_t lowest = window ? std::max<int64_t>(0, position + 1 - window) : 0;
      std::vector<double> sums(dim);
      double total = 0;
      for (int64_t key = lowest; key <= position; key++) {
        double score = 0;
        for (int64_t d = 0; d < dim; d++) score += static_cast<double>(q[(token * heads + head) * dim + d]) * k[key * row + kv * dim + d];
        double weight = std::exp(0.2 * score);
        total += weight;
        for (int64_t d = 0; d < dim; d++) sums[d] += weight * v[key * row + kv * dim + d];
      }
      for (double sum : sums) expected.push_back(sum / total);
    }
  compare("attention", out, expected, 1e-5);
}

int main() {
  int amx = 0;
  if (!rtp_linear_start(&amx)) std::puts("self-check of the linears  WRONG"), failures++;
  for (int64_t m : {1, 7, 33}) check_linear(m, 0), check_linear(m, 1);
  check_norm();
  check_attention(1, 1, 0);
  check_attention(700, 1, 0);
  check_attention(300, 77, 0);
  check_attention(300, 77, 50);
  return failures != 0;
}
