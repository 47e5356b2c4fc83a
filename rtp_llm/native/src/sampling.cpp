// Sampling of rows of logits without sorting the vocabulary. All pointers: see rtp_llm/kernels/sampling.py.
#include <algorithm>
#include <vector>

#include "silu.h"
#include "team.h"

namespace {

constexpr int64_t GROUP = 128;  // logits whose maximum is looked at first
constexpr int64_t BLOCK = 512;  // tokens whose weights are added up first
constexpr int64_t RUN_ELEMENTS = 1 << 15;  // that a thread computes at once

typedef double Doubles __attribute__((vector_size(64)));
typedef int64_t Longs __attribute__((vector_size(64)));
typedef float Singles __attribute__((vector_size(32)));  // as many as Doubles
constexpr int64_t DOUBLES = 8;

// Returns the highest of these logits, NaN if one is NaN.
float max_of(const float* logits, int64_t count) {
  Floats highest = broadcast(-INFINITY);
  Bits is_nan{};
  auto look_at = [&](Floats v) {
    highest = v > highest ? v : highest;
    is_nan |= v != v;
  };
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) look_at(load(logits + i));
  if (i < count) {
    Floats rest = broadcast(-INFINITY);
    std::memcpy(&rest, logits + i, static_cast<size_t>(count - i) * sizeof(float));
    look_at(rest);
  }
  uint32_t any_nan = 0;
  float result = -INFINITY;
  for (int lane = 0; lane < LANES; lane++) {
    any_nan |= is_nan[lane];
    result = highest[lane] > result ? highest[lane] : result;
  }
  return any_nan ? NAN : result;
}

// Writes the maximum of each group. Returns the highest, NaN if one is NaN.
float group_maxima(const float* logits, int64_t vocab, std::vector<float>& maxima) {
  maxima.resize(div_up(vocab, GROUP));
  float highest = -INFINITY;
  for (size_t i = 0; i < maxima.size(); i++) {
    int64_t start = static_cast<int64_t>(i) * GROUP;
    maxima[i] = max_of(logits + start, std::min(GROUP, vocab - start));
    if (std::isnan(maxima[i])) return NAN;
    highest = std::max(highest, maxima[i]);
  }
  return highest;
}

// Orders by value descending, then by token: as unsigned integers in descending order.
uint64_t sort_key(float value, int64_t token) {
  value += 0.0f;  // -0 is 0
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = bits & 0x80000000 ? ~bits : bits | 0x80000000;
  return static_cast<uint64_t>(bits) << 32 | (0xffffffff - static_cast<uint32_t>(token));
}

// Writes the `count` highest logits of a row in descending order, equal ones in order of their tokens.
//
// At least `count` logits reach the count-th highest maximum of a group, so that the other groups hold none of them.
void find_top(const float* logits, int64_t vocab, int64_t count, std::vector<float>& maxima, float* values,
              int64_t* tokens) {
  float bound = -INFINITY;
  std::vector<float> ordered(maxima);
  if (static_cast<int64_t>(maxima.size()) > count) {
    std::nth_element(ordered.begin(), ordered.begin() + count - 1, ordered.end(), std::greater<>());
    bound = ordered[count - 1];
  }
  std::vector<uint64_t> above;
  std::vector<int64_t> equal;  // to the bound, in order
  for (size_t group = 0; group < maxima.size(); group++) {
    if (maxima[group] < bound) continue;
    int64_t start = static_cast<int64_t>(group) * GROUP, end = std::min(start + GROUP, vocab);
    for (int64_t token = start; token < end; token++) {
      if (logits[token] > bound) above.push_back(sort_key(logits[token], token));
      else if (logits[token] == bound && static_cast<int64_t>(equal.size()) < count) equal.push_back(token);
    }
  }
  int64_t num_above = std::min(static_cast<int64_t>(above.size()), count);
  std::partial_sort(above.begin(), above.begin() + num_above, above.end(), std::greater<>());
  for (int64_t i = 0; i < count; i++) {
    tokens[i] = i < num_above ? 0xffffffff - static_cast<uint32_t>(above[i]) : equal[i - num_above];
    values[i] = logits[tokens[i]];
  }
}

// Returns the sum of exp((logit - highest) / temperature), with a relative error below 1e-5.
double rough_mass(const float* logits, int64_t vocab, float highest, double temperature) {
  double mass = 0;
  float scale = static_cast<float>(1 / temperature);
  for (int64_t start = 0; start < vocab; start += GROUP) {
    Floats sums{};
    for_lanes(std::min(GROUP, vocab - start), [&](int64_t i, int64_t count) {
      Floats weights = exp((load(logits + start + i, count) - highest) * scale);
      for (int64_t lane = count; lane < LANES; lane++) weights[lane] = 0;
      sums += weights;
    });
    mass += sum_lanes(sums);
  }
  return mass;
}

// Returns e^x for x <= 0 with an error of about one unit in the last place; 0 below -708. By Taylor's series.
Doubles exp(Doubles x) {
  const double to_integer = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  Doubles bounded = x < -708.0 ? x * 0 - 708.0 : x;
  bounded = x != x ? x : bounded;
  Doubles n = bounded * 1.4426950408889634 + to_integer - to_integer;
  Doubles r = bounded - n * 6.93147180369123816490e-01 - n * 1.90821492927058770002e-10;
  Doubles p{};
  for (double factorial : {6227020800., 479001600., 39916800., 3628800., 362880., 40320., 5040., 720., 120., 24., 6., 2.})
    p = p * r + 1 / factorial;
  p = (p * r + 1) * r + 1;
  Doubles power = reinterpret_cast<Doubles>((__builtin_convertvector(n, Longs) + 1023) << 52);
  return x < -708.0 ? Doubles{} : p * power;
}

// Writes the weights exp((logit - highest) / temperature) of up to BLOCK tokens. Returns their sum.
double block_weights(const float* logits, int64_t count, float highest, double temperature, double* weights) {
  Doubles sums{};
  for (int64_t i = 0; i < count; i += DOUBLES) {
    Singles v = Singles{} - INFINITY;
    if (i + DOUBLES <= count) std::memcpy(&v, logits + i, sizeof v);
    else std::memcpy(&v, logits + i, static_cast<size_t>(count - i) * sizeof(float));
    Doubles w = exp((__builtin_convertvector(v, Doubles) - static_cast<double>(highest)) / temperature);
    std::memcpy(weights + i, &w, sizeof w);
    sums += w;
  }
  double sum = 0;
  for (int64_t lane = 0; lane < DOUBLES; lane++) sum += sums[lane];
  return sum;
}

// Returns the first token up to which the tokens, in order of their ids, weigh more than the fraction `number` of all.
int64_t sample_by_id(const float* logits, int64_t vocab, float highest, double temperature, double number) {
  double weights[BLOCK], total = 0;
  std::vector<double> masses(div_up(vocab, BLOCK));
  auto weigh = [&](size_t block) {
    int64_t start = static_cast<int64_t>(block) * BLOCK;
    return block_weights(logits + start, std::min(BLOCK, vocab - start), highest, temperature, weights);
  };
  for (size_t block = 0; block < masses.size(); block++) total += masses[block] = weigh(block);
  double target = number * total, before = 0;
  size_t block = 0, last = 0;  // last: that has a weight; rounding can make `before` stay below the target
  for (; block < masses.size() && before + masses[block] <= target; before += masses[block++])
    if (masses[block] > 0) last = block;
  block = block < masses.size() ? block : last;
  weigh(block);
  int64_t start = static_cast<int64_t>(block) * BLOCK, count = std::min(BLOCK, vocab - start), token = 0;
  for (int64_t i = 0; i < count; i++) {
    if (weights[i] > 0) token = start + i;
    if ((before += weights[i]) > target) break;
  }
  return token;
}

template <typename Row>
void for_rows(int64_t rows, int64_t vocab, int threads, Row row) {
  for_runs(rows, div_up(RUN_ELEMENTS, vocab), threads, row);
}

}  // namespace

RTP_API void rtp_argmax_finite(const float* logits, int64_t ld, int64_t rows, int64_t vocab, int64_t* tokens,
                               int threads) {
  for_rows(rows, vocab, threads, [=](int64_t i) {
    const float* row = logits + i * ld;
    std::vector<float> maxima;
    float highest = group_maxima(row, vocab, maxima);
    tokens[i] = -1;
    if (!std::isfinite(highest)) return;
    auto group = std::find(maxima.begin(), maxima.end(), highest) - maxima.begin();
    tokens[i] = std::find(row + group * GROUP, row + vocab, highest) - row;
  });
}

RTP_API void rtp_top_tokens(const float* logits, int64_t ld, int64_t rows, int64_t vocab, int64_t count,
                            const double* temperatures, float* values, int64_t* tokens, double* masses, int threads) {
  for_rows(rows, vocab, threads, [=](int64_t i) {
    const float* row = logits + i * ld;
    std::vector<float> maxima;
    float highest = group_maxima(row, vocab, maxima);
    if (std::isfinite(highest)) {
      find_top(row, vocab, count, maxima, values + i * count, tokens + i * count);
      masses[i] = rough_mass(row, vocab, highest, temperatures[i]);
    } else {
      std::fill_n(values + i * count, count, highest);
      std::fill_n(tokens + i * count, count, 0);
      masses[i] = NAN;
    }
  });
}

RTP_API void rtp_sample_by_id(const float* logits, int64_t ld, int64_t rows, int64_t vocab, const double* temperatures,
                              const double* numbers, int64_t* tokens, int threads) {
  for_rows(rows, vocab, threads, [=](int64_t i) {
    const float* row = logits + i * ld;
    float highest = max_of(row, vocab);
    tokens[i] = std::isfinite(highest) ? sample_by_id(row, vocab, highest, temperatures[i], numbers[i]) : -1;
  });
}
