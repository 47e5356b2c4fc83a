// y = x Wᵀ + bias over packed weights, or silu(gate) * up of the two halves of that.
//
// Layout of the weights: units of BLOCK columns of y, one after the other; a unit is a block of outputs, or if W is
// gated, a block of gates and the block of the ups that belong to them. A block is [steps][BLOCK][inputs of a step]: see
// linear_tile.h. So a thread that computes a unit reads one sequential stream.
//
// Threads take units as they are ready, since cores are uneven. While a part of a block is multiplied with
// one tile of rows after the other, the next part comes from memory, a share of it in each tile: so the time is the
// longer of reading and computing, not their sum. More rows than MAX_CHUNK_ROWS are computed in chunks.
#include <algorithm>
#include <memory>
#include <vector>

#include "linear_amx.h"
#include "linear_tile.h"
#include "replay.h"
#include "silu.h"
#include "team.h"

namespace {

constexpr int64_t LARGE_PART_BYTES = 128 << 10;  // of weights; two parts and the inputs of a chunk fit the L2 cache
constexpr int64_t MAX_CHUNK_ROWS = 96;
constexpr int64_t STREAM_DISTANCE = 4096;  // how far ahead a single tile prefetches
constexpr int64_t MIN_PARALLEL_PRODUCTS = 1 << 17;
constexpr int64_t RUN_ELEMENTS = 1 << 14;  // that a thread copies at once

// Returns how many steps k inputs take.
template <class Step>
int64_t count_steps(int64_t k) {
  return div_up(k, Step::INPUTS * Step::GRANULARITY) * Step::GRANULARITY;
}

struct Linear {
  const char* weights;
  const void* bias;  // [n], or null
  const uint32_t* x;  // words [m][ldx]
  void* y;            // [m][ldy]
  int64_t ldx, ldy, m, n, steps;
  bool gated;

  int64_t halves() const { return gated ? 2 : 1; }
  int64_t columns() const { return n / halves(); }  // of y
  int64_t units() const { return div_up(columns(), BLOCK); }
  int64_t chunks() const { return div_up(m, MAX_CHUNK_ROWS); }
  int64_t chunk_rows() const { return div_up(m, chunks()); }
};

// Returns how many bytes of a block are multiplied with all rows before the next part. With few rows, reading from memory
// takes as long as computing: small parts, which stay in the L1 cache between their prefetch and the last tile, spare the
// core half of the cache lines that it can wait for. They also mean that the sums are stored more often.
inline int64_t part_bytes(int64_t rows) {
  if (rows <= 2 * MAX_ROWS) return 4 << 10;
  return rows <= 3 * MAX_ROWS ? 8 << 10 : LARGE_PART_BYTES;
}

// Returns what tile `index` of `count` reads ahead: of its own stream if it is the only reader of new weights, else its
// share of the part `next`.
template <class Step>
Prefetch plan_prefetch(const Tile& tile, const char* next, int64_t index, int64_t count) {
  int64_t bytes = div_up(Step::BYTES, count);
  int lines = bytes > 128 ? 4 : bytes > 64 ? 2 : 1;
  int64_t stride = div_up(bytes, lines);
  if (count == 1) {
    int64_t split = std::max<int64_t>(0, tile.steps - STREAM_DISTANCE / Step::BYTES);
    return {tile.w + STREAM_DISTANCE, next, split, stride, lines};
  }
  return {next + index * lines * stride * tile.steps, nullptr, tile.steps, stride, lines};
}

// Computes the sums [rows][BLOCK] of a block for the rows x. next: what will be read after this block. cold: nobody has
// prefetched the block.
template <class Step>
void compute_block(const Linear& linear, const char* w, const uint32_t* x, int64_t rows, float* sums, const char* next,
                   bool cold) {
  int64_t tiles = div_up(rows, Step::ROWS);
  int64_t parts = tiles == 1 ? 1 : div_up(linear.steps * Step::BYTES, part_bytes(rows));
  int64_t part_steps = div_up(linear.steps, parts * Step::GRANULARITY) * Step::GRANULARITY;
  for (int64_t begin = 0; begin < linear.steps; begin += part_steps) {
    int64_t steps = std::min(part_steps, linear.steps - begin), end = begin + steps;
    const char* ahead = end < linear.steps ? w + end * Step::BYTES : next;
    bool is_stream = tiles == 1 || (cold && begin == 0);
    for (int64_t i = 0; i < tiles; i++) {
      int64_t row = rows * i / tiles;
      int count = static_cast<int>(rows * (i + 1) / tiles - row);
      const uint32_t* words = x + row * linear.ldx + begin;
      Tile tile{w + begin * Step::BYTES, words, linear.ldx, steps, sums + row * BLOCK, begin > 0};
      Prefetch prefetch = is_stream && i == 0 ? plan_prefetch<Step>(tile, ahead, 0, 1)
                                              : plan_prefetch<Step>(tile, ahead, i - is_stream, tiles - is_stream);
      compute_tile<Step>(count, tile, prefetch);
    }
  }
}

// Writes the rows [rows][BLOCK] of a unit to y, whose first column there is `column`.
template <class X, class Y>
void finish_unit(const Linear& linear, const float* sums, int64_t first_row, int64_t rows, int64_t column) {
  const X* bias = static_cast<const X*>(linear.bias);
  Y* y = static_cast<Y*>(linear.y) + first_row * linear.ldy + column;
  int64_t columns = std::min(BLOCK, linear.columns() - column);
  for (int64_t i = 0; i < columns; i += LANES) {
    int64_t count = std::min(LANES, columns - i);
    Floats bias_gate = {}, bias_up = {};
    if (bias) bias_gate = load(bias + column + i, count);
    if (bias && linear.gated) bias_up = load(bias + linear.columns() + column + i, count);
    for (int64_t row = 0; row < rows; row++) {
      const float* at = sums + row * BLOCK + i;
      Floats value = load(at) + bias_gate;
      if (linear.gated) value = silu(value) * (load(at + rows * BLOCK) + bias_up);
      store(y + row * linear.ldy + i, value, count);
    }
  }
}

template <class Step, class X, class Y>
void compute(const Linear& linear, int threads) {
  int64_t units = linear.units(), tasks = units * linear.chunks(), chunk_rows = linear.chunk_rows();
  int64_t block_bytes = linear.steps * Step::BYTES, unit_bytes = linear.halves() * block_bytes;
  for_tasks(tasks, threads, [&](const Turn& turn) {
    alignas(64) float sums[2 * MAX_CHUNK_ROWS * BLOCK];
    int64_t first_row = turn.task / units * chunk_rows, rows = std::min(chunk_rows, linear.m - first_row);
    const char* w = linear.weights + turn.task % units * unit_bytes;
    const char* ahead = turn.next < 0 ? w : linear.weights + turn.next % units * unit_bytes;
    for (int64_t half = 0; half < linear.halves(); half++)
      compute_block<Step>(linear, w + half * block_bytes, linear.x + first_row * linear.ldx, rows,
                          sums + half * rows * BLOCK, half + 1 < linear.halves() ? w + block_bytes : ahead,
                          turn.is_first && half == 0);
    finish_unit<X, Y>(linear, sums, first_row, rows, turn.task % units * BLOCK);
  });
}

// Memory that a thread keeps from call to call.
uint32_t* scratch(int64_t words) {
  thread_local std::unique_ptr<uint32_t[]> memory;
  thread_local int64_t capacity = 0;
  if (words > capacity) {
    memory.reset(new uint32_t[static_cast<size_t>(words)]);
    capacity = words;
  }
  return memory.get();
}

// Returns the rows of x as words [m][*ldx]: x itself, or a copy that is converted, or padded by a zero input.
template <class Step, class X>
const uint32_t* to_words(const X* x, int64_t* ldx, int64_t m, int64_t k, int threads) {
  int64_t steps = count_steps<Step>(k), source_ldx = *ldx;
  if (sizeof(X) * Step::INPUTS == 4 && k == steps * Step::INPUTS && *ldx % Step::INPUTS == 0) {
    *ldx /= Step::INPUTS;
    return reinterpret_cast<const uint32_t*>(x);
  }
  uint32_t* words = scratch(m * steps);
  for_runs(m, div_up(RUN_ELEMENTS, k), threads, [&](int64_t row) {
    const X* from = x + row * source_ldx;
    uint32_t* to = words + row * steps;
    if constexpr (Step::INPUTS == 1) {
      float* floats = reinterpret_cast<float*>(to);
      for_lanes(k, [&](int64_t i, int64_t count) { store(floats + i, load(from + i, count), count); });
    } else {
      std::memcpy(to, from, static_cast<size_t>(k) * sizeof(X));
      std::memset(reinterpret_cast<X*>(to) + k, 0, static_cast<size_t>(steps * Step::INPUTS - k) * sizeof(X));
    }
  });
  *ldx = steps;
  return words;
}

template <class Step, class X>
void run(int y_dtype, Linear linear, const void* x, int64_t k, int threads) {
  if (linear.m * linear.n * k < MIN_PARALLEL_PRODUCTS) threads = 1;
  linear.steps = count_steps<Step>(k);
  linear.x = to_words<Step>(static_cast<const X*>(x), &linear.ldx, linear.m, k, threads);
  if (y_dtype == FP32) compute<Step, X, float>(linear, threads);
  else compute<Step, X, X>(linear, threads);
}

template <class Step, class Weight>
void pack(const Weight* weight, Weight* packed, int64_t n, int64_t k, bool gated, int threads) {
  int64_t halves = gated ? 2 : 1, columns = n / halves, steps = count_steps<Step>(k);
  for_runs(div_up(columns, BLOCK) * halves, 1, threads, [&](int64_t block) {
    int64_t column = block / halves * BLOCK, rows = std::min(BLOCK, columns - column);
    const Weight* from = weight + (block % halves * columns + column) * k;
    Weight* to = packed + block * steps * BLOCK * Step::INPUTS;
    std::memset(to, 0, static_cast<size_t>(steps * Step::BYTES));
    for (int64_t input = 0; input < k; input += Step::INPUTS, to += BLOCK * Step::INPUTS)
      for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < std::min<int64_t>(Step::INPUTS, k - input); i++)
          to[row * Step::INPUTS + i] = from[row * k + input + i];
  });
}

#if defined(__AVX512BF16__)
using Bf16Step = PairStep;
#else
using Bf16Step = FmaStep<bf16>;
#endif

// Calls call(step, element) with the kind of step for a dtype and the dtype.
template <class Call>
auto with_step(int dtype, Call call) {
  if (dtype == FP32) return call(FmaStep<float>{}, float{});
  if (dtype == FP16) return call(FmaStep<fp16>{}, fp16{});
  return call(Bf16Step{}, bf16{});
}

#ifdef RTP_AMX
bool uses_amx = false;  // until rtp_linear_start
#endif

}  // namespace

// Returns the bytes that W [n, k] takes when it is packed.
RTP_API int64_t rtp_linear_packed_bytes(int dtype, int gated, int64_t n, int64_t k) {
  int64_t halves = gated ? 2 : 1, blocks = div_up(n / halves, BLOCK) * halves;
  return with_step(dtype, [&](auto step, auto) {
    using Step = decltype(step);
    return blocks * count_steps<Step>(k) * Step::BYTES;
  });
}

// weight: W [n, k] in `dtype`, gates above ups if `gated`.
RTP_API void rtp_linear_pack(int dtype, int gated, const void* weight, void* packed, int64_t n, int64_t k,
                             int threads) {
  with_step(dtype, [&](auto step, auto element) {
    using Weight = decltype(element);
    pack<decltype(step)>(static_cast<const Weight*>(weight), static_cast<Weight*>(packed), n, k, gated, threads);
  });
}

// x [m, k] with rows at a distance of ldx, and bias [n] or null, in `dtype`. y [m, n], or [m, n / 2] if `gated`, with
// rows at a distance of ldy, in `y_dtype`: FP32 or `dtype`. packed: W [n, k].
RTP_API void rtp_linear(int dtype, int y_dtype, int gated, const void* x, int64_t ldx, const void* packed,
                        const void* bias, void* y, int64_t ldy, int64_t m, int64_t n, int64_t k, int threads) {
  if (m == 0) return;
  Linear linear{static_cast<const char*>(packed), bias, nullptr, y, ldx, ldy, m, n, 0, gated != 0};
#ifdef RTP_AMX
  if (dtype == BF16 && uses_amx) return run<AmxStep, bf16>(y_dtype, linear, x, k, threads);
#endif
  with_step(dtype, [&](auto step, auto element) {
    run<decltype(step), decltype(element)>(y_dtype, linear, x, k, threads);
  });
}

// Returns whether a small product equals plain sums. The inputs are small integers, so that every dtype is exact.
static bool is_right(int dtype) {
  constexpr int64_t m = 35, n = 70, k = 75;
  return with_step(dtype, [&](auto, auto element) {
    using X = decltype(element);
    auto at = [](int64_t i) { return static_cast<float>(i * 7919 % 13 - 6); };
    auto convert = [](float value) {
      if constexpr (std::is_same_v<X, bf16>) return to_bf16(value);
      else if constexpr (std::is_same_v<X, fp16>) return to_fp16(value);
      else return value;
    };
    std::vector<X> x(m * k), w(n * k);
    std::vector<float> y(m * n);
    for (int64_t i = 0; i < m * k; i++) x[i] = convert(at(i));
    for (int64_t i = 0; i < n * k; i++) w[i] = convert(at(i + 5));
    std::vector<char> packed(rtp_linear_packed_bytes(dtype, 0, n, k));
    rtp_linear_pack(dtype, 0, w.data(), packed.data(), n, k, 1);
    rtp_linear(dtype, FP32, 0, x.data(), k, packed.data(), nullptr, y.data(), n, m, n, k, 1);
    for (int64_t row = 0; row < m; row++)
      for (int64_t column = 0; column < n; column++) {
        float sum = 0;
        for (int64_t i = 0; i < k; i++) sum += at(row * k + i) * at(column * k + i + 5);
        if (y[row * n + column] != sum) return false;
      }
    return true;
  });
}

// To be called once, before other products. Returns whether products are right on this CPU. *amx: whether AMX computes
// those of bf16, which takes an instruction set, a kernel of the system that permits it, and right results.
RTP_API int rtp_linear_start(int* amx) {
  *amx = 0;
#ifdef RTP_AMX
  uses_amx = amx_permitted();
  *amx = uses_amx = uses_amx && is_right(BF16);
#endif
  return is_right(FP32) && is_right(FP16) && is_right(BF16);
}
RTP_REPLAYABLE(rtp_linear)
