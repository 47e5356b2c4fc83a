// The micro-kernel of products with packed weights: up to MAX_ROWS rows of x times one block of BLOCK outputs.
//
// A block holds, step after step along the inputs, what each of its outputs needs of that step; a step takes 32 bits of
// each row of x, a "word": one fp32 input, or a pair of bf16. Every output has one accumulator that runs over the steps
// in order, so the bits of a row do not depend on the other rows.
#pragma once
#include <type_traits>
#include <utility>

#include "lanes.h"

// MAX_ROWS * VECTORS accumulators, the weights of a step and one word of x fill the vector registers. BLOCK is a multiple
// of LANES.
#if defined(__AVX512F__)
constexpr int VECTORS = 4, MAX_ROWS = 6;
#elif defined(__AVX2__)
constexpr int VECTORS = 2, MAX_ROWS = 6;
#elif defined(__aarch64__)
constexpr int VECTORS = 4, MAX_ROWS = 6;
#else
constexpr int VECTORS = 4, MAX_ROWS = 2;
#endif
constexpr int64_t BLOCK = VECTORS * WIDTH;

using Vector = FloatVector;

// What a tile reads ahead of its use: `lines` cache lines each step, at `first` in the first `split` steps, at `second`
// in the others.
struct Prefetch {
  const char* first;
  const char* second;
  int64_t split;
  int64_t stride;  // bytes between two prefetches, at most a cache line
  int lines;       // 4, 2 or 1
};

struct Tile {
  const char* w;      // the first step of a part of a block
  const uint32_t* x;  // words of the first row, from the same step on
  int64_t ldx;        // distance of the rows of x, in words
  int64_t steps;
  float* sums;        // [rows][BLOCK]
  bool accumulates;   // adds to `sums`, which hold the earlier steps
};

// A kind of step. INPUTS: inputs of each output. BYTES: of the weights of a block. ROWS: the most rows of a tile.
// GRANULARITY: the number of steps is a multiple of it.
//
// This one: one input; weights of fp32, or of 16 bits that are converted. `Weight`: their type.
template <class Weight>
struct FmaStep {
  static constexpr int64_t ROWS = MAX_ROWS, GRANULARITY = 1;
  static constexpr int INPUTS = 1;
  static constexpr int64_t BYTES = BLOCK * sizeof(Weight);
  static RTP_INLINE Vector load_weights(const char* w, size_t vector) {
    return load_vector(reinterpret_cast<const Weight*>(w) + vector * WIDTH);
  }
  static RTP_INLINE void add(Vector& sum, Vector x, Vector w) {
#if defined(__AVX512F__)
    sum = _mm512_fmadd_ps(x, w, sum);
#elif defined(__AVX2__)
    sum = _mm256_fmadd_ps(x, w, sum);
#else
    sum += x * w;
#endif
  }
};

#if defined(__AVX512BF16__)
// A step of two bf16 inputs.
struct PairStep {
  static constexpr int64_t ROWS = MAX_ROWS;
#if defined(__AMX_BF16__) || defined(RTP_EMULATE_AMX)
  static constexpr int64_t GRANULARITY = 16;  // that of AMX, for weights that serve both
#else
  static constexpr int64_t GRANULARITY = 1;
#endif
  static constexpr int INPUTS = 2;
  static constexpr int64_t BYTES = BLOCK * 4;
  static RTP_INLINE Vector load_weights(const char* w, size_t vector) {
    return load_vector(reinterpret_cast<const float*>(w) + vector * WIDTH);
  }
  // Assembly, since gcc 12 spills accumulators of the intrinsic.
  static RTP_INLINE void add(Vector& sum, Vector x, Vector w) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
  }
};
#endif

RTP_INLINE Vector broadcast_word(const uint32_t* p) {
  float word;
  std::memcpy(&word, p, 4);
  return word - Vector{};
}

// Indices of arrays of vectors are constants of templates: gcc 12 keeps an array in memory if a loop indexes it.
template <class Step, size_t... V>
RTP_INLINE void load_step(Vector* weights, const char* w, std::index_sequence<V...>) {
  ((weights[V] = Step::load_weights(w, V)), ...);
}

// Adds one row's products of a step to its accumulators.
template <class Step, size_t ROW, size_t... V>
RTP_INLINE void add_row(Vector* sums, const Vector* weights, const Tile& tile, int64_t step,
                        std::index_sequence<V...>) {
  Vector x = broadcast_word(tile.x + ROW * tile.ldx + step);
  (Step::add(sums[ROW * VECTORS + V], x, weights[V]), ...);
}

template <class Step, int LINES, size_t... ROW, size_t... SUM>
RTP_INLINE void compute_rows(const Tile& tile, const Prefetch& prefetch, std::index_sequence<ROW...>,
                             std::index_sequence<SUM...>) {
  constexpr auto vectors = std::make_index_sequence<VECTORS>();
  Vector sums[sizeof...(SUM)] = {};
  if (tile.accumulates) ((sums[SUM] = load_vector(tile.sums + SUM * WIDTH)), ...);
  const char* ahead = prefetch.first;
  const char* w = tile.w;
  const int64_t stride = prefetch.stride, split = prefetch.split, steps = tile.steps;
  for (int64_t step = 0; step < steps; step++, w += Step::BYTES) {
    if (step == split) ahead = prefetch.second;
    for (int i = 0; i < LINES; i++, ahead += stride) __builtin_prefetch(ahead);
    Vector weights[VECTORS];
    load_step<Step>(weights, w, vectors);
    (add_row<Step, ROW>(sums, weights, tile, step, vectors), ...);
  }
  (std::memcpy(tile.sums + SUM * WIDTH, &sums[SUM], sizeof(Vector)), ...);
}

template <class Step, int ROWS>
void compute_tile(const Tile& tile, const Prefetch& prefetch) {
  constexpr auto rows = std::make_index_sequence<ROWS>();
  constexpr auto sums = std::make_index_sequence<ROWS * VECTORS>();
  if (prefetch.lines == 4) compute_rows<Step, 4>(tile, prefetch, rows, sums);
  else if (prefetch.lines == 2) compute_rows<Step, 2>(tile, prefetch, rows, sums);
  else compute_rows<Step, 1>(tile, prefetch, rows, sums);
}

// Computes the first `rows` (1 … Step::ROWS) rows of a tile.
template <class Step>
void compute_tile(int rows, const Tile& tile, const Prefetch& prefetch) {
  switch (rows) {
    case 1: return compute_tile<Step, 1>(tile, prefetch);
    case 2: return compute_tile<Step, 2>(tile, prefetch);
#if defined(__AVX2__) || defined(__aarch64__)
    case 3: return compute_tile<Step, 3>(tile, prefetch);
    case 4: return compute_tile<Step, 4>(tile, prefetch);
    case 5: return compute_tile<Step, 5>(tile, prefetch);
    case 6: return compute_tile<Step, 6>(tile, prefetch);
#endif
    default: __builtin_unreachable();
  }
}
