// What the linears over quantized weights share: the product of a tile, the rows of x, the epilogue, the loop over W.
//
// Layout: W is cut into blocks of BLOCK outputs, one after the other, each a sequential stream. A step of the inputs
// takes one 32-bit word of a row of x and a cell of each output. Of gated weights, a block of gate is followed by the
// block of the same columns of up. Every output has one accumulator that runs over the inputs in one order, whatever
// the number of rows: the bits of a row do not depend on the other rows, nor on the number of threads.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <type_traits>

#include "silu.h"
#include "team.h"

#if defined(__AVX512BW__)
constexpr int MAX_ROWS = 8;  // of a tile; with BLOCK columns its accumulators fill the registers
#else
constexpr int MAX_ROWS = 4;
#endif
constexpr int64_t BLOCK = 3 * WIDTH;

inline IntVector broadcast(int32_t word) { return IntVector{} + word; }

// Returns the int8 at `at` as int16, to fill a vector. gcc 12 converts vectors of
// int8 one by one, and warns of the undefined lanes in the unmasked functions of its own header.
inline ShortVector load_shorts(const void* at) {
#if defined(__AVX512BW__)
  return (ShortVector)_mm512_maskz_cvtepi8_epi16(~0u, load<__m256i>(at));
#elif defined(__AVX2__)
  return (ShortVector)_mm256_cvtepi8_epi16(load<__m128i>(at));
#else
  ShortVector result;
  for (int i = 0; i < 2 * WIDTH; i++) result[i] = static_cast<const int8_t*>(at)[i];
  return result;
#endif
}

// Returns the int8 at `at` as float, to fill a vector.
inline FloatVector load_floats(const void* at) {
#if defined(__AVX512BW__)
  return __builtin_convertvector((IntVector)_mm512_maskz_cvtepi8_epi32(0xffff, load<__m128i>(at)), FloatVector);
#elif defined(__AVX2__)
  return (FloatVector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(at))));
#else
  FloatVector result;
  for (int i = 0; i < WIDTH; i++) result[i] = static_cast<const int8_t*>(at)[i];
  return result;
#endif
}

// Returns the sums of the two products of int16 in each lane.
inline IntVector multiply_pairs(ShortVector a, ShortVector b) {
#if defined(__AVX512BW__)
  return (IntVector)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (IntVector)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (IntVector)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  IntVector sums;
  for (int i = 0; i < WIDTH; i++) sums[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sums;
#endif
}

// Memory of one thread, which grows and is used again in the next call.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = (bytes + 4095) / 4096 * 4096;
      memory_ = std::aligned_alloc(4096, size_);
      if (!memory_) std::abort();
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

// The arguments of a call, see `rtp_w8a8_linear`.
struct Linear {
  int dtype, y_dtype;
  const void* x;
  int64_t ldx;
  const uint8_t* packed;
  const void* bias;
  void* y;
  int64_t ldy, m, n, k;
  bool gated;
  int threads;

  int64_t outputs() const { return gated ? n / 2 : n; }
  int64_t parts() const { return gated ? 2 : 1; }
};

// ---- Rows of x

// Writes `count` elements of a matrix as float, from the element `first` on.
inline void read_floats(int dtype, const void* matrix, int64_t first, int64_t count, float* out) {
  with_dtype(dtype, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(matrix) + first;
    for_lanes(count, [&](int64_t i, int64_t lanes) { store(out + i, load(from + i, lanes), lanes); });
  });
}

// Returns the largest |value|, NaN if any is infinite or NaN. The bits of positive floats are ordered as the floats.
inline float largest_magnitude(const float* values, int64_t count) {
  Integers magnitudes = {};
  for_lanes(count, [&](int64_t i, int64_t lanes) {
    Integers bits = reinterpret_cast<Integers>(load(values + i, lanes)) & 0x7fffffff;
    magnitudes = bits > magnitudes ? bits : magnitudes;
  });
  int32_t largest = 0;
  for (int i = 0; i < LANES; i++) largest = std::max(largest, magnitudes[i]);
  if (largest >= 0x7f800000) return std::numeric_limits<float>::quiet_NaN();
  float result;
  std::memcpy(&result, &largest, 4);
  return result;
}

// Returns the nearest integers, ties to even. Not by adding 1.5 * 2^23, which is fused with a multiplication before it.
inline Integers round_to_integers(Floats values) {
#if defined(__AVX512F__)
  return (Integers)_mm512_maskz_cvtps_epi32(0xffff, (__m512)values);
#else
  Integers result;
  for (int i = 0; i < LANES; i++) result[i] = static_cast<int32_t>(__builtin_rintf(values[i]));
  return result;
#endif
}

// Writes the low bytes of the first `count` integers.
inline void store(uint8_t* to, Integers values, int64_t count) {
#if defined(__AVX512F__)
  __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)values);
  std::memcpy(to, &bytes, static_cast<size_t>(count));
#else
  for (int64_t i = 0; i < count; i++) to[i] = static_cast<uint8_t>(values[i]);
#endif
}

inline void store(int16_t* to, Integers values, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = static_cast<int16_t>(values[i]);
}

// The scale of symmetric 8-bit values, and its inverse. A row that is not finite has the scale NaN, which its products
// inherit; one that is zero to float32 has zeros.
struct Scale {
  float scale, inverse;
  explicit Scale(float largest) : scale(largest / 127), inverse(largest > 1e-30f ? 127 / largest : 0) {}
};

// ---- The product of a tile

// Where the weights lie that are needed next: each step prefetches `lines` cache lines, from step `split` on at `later`.
struct Prefetch {
  const uint8_t* at;
  int64_t stride;  // bytes between two prefetches, at most a cache line
  int lines;
  int64_t split;
  const uint8_t* later;
};

#define FOR_ROWS(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)

// Adds the products of R rows of x with a block: sums[R][3] += …, starting from `initial[3]`.
//
// Dot: the kind of a step. Sum: the accumulators' type. CELL_BYTES: of one output. load: the cells of WIDTH outputs as
// words. add: sum += x · w. The accumulators are named variables, since gcc 12 spills arrays of them in each step.
template <class Dot, int R>
void multiply_tile(const uint8_t* w, const int32_t* x, int64_t ldx, int64_t steps, Prefetch next,
                   const typename Dot::Sum* initial, typename Dot::Sum* sums) {
  using Sum = typename Dot::Sum;
#define DECLARE(r) Sum a##r##0 = initial[0], a##r##1 = initial[1], a##r##2 = initial[2];
  FOR_ROWS(DECLARE)
  constexpr int64_t VECTOR = WIDTH * Dot::CELL_BYTES;
  for (int64_t step = 0; step < steps; step++) {
    IntVector w0 = Dot::load(w), w1 = Dot::load(w + VECTOR), w2 = Dot::load(w + 2 * VECTOR);
    if (step == next.split) next.at = next.later;
    __builtin_prefetch(next.at);
    if (next.lines > 1) __builtin_prefetch(next.at + next.stride);
    if (next.lines > 2) __builtin_prefetch(next.at + 2 * next.stride);
    next.at += next.lines * next.stride;
    w += 3 * VECTOR;
#define ADD(r)                                   \
  if constexpr (R > r) {                         \
    IntVector v = broadcast(x[r * ldx + step]);       \
    Dot::add(a##r##0, v, w0);                    \
    Dot::add(a##r##1, v, w1);                    \
    Dot::add(a##r##2, v, w2);                    \
  }
    FOR_ROWS(ADD)
  }
#define KEEP(r) \
  if constexpr (R > r) sums[3 * r] = a##r##0, sums[3 * r + 1] = a##r##1, sums[3 * r + 2] = a##r##2;
  FOR_ROWS(KEEP)
#undef DECLARE
#undef ADD
#undef KEEP
}

template <class Dot>
void multiply_rows(int rows, const uint8_t* w, const int32_t* x, int64_t ldx, int64_t steps, Prefetch next,
                   const typename Dot::Sum* initial, typename Dot::Sum* sums) {
  switch (rows) {
    case 1: return multiply_tile<Dot, 1>(w, x, ldx, steps, next, initial, sums);
    case 2: return multiply_tile<Dot, 2>(w, x, ldx, steps, next, initial, sums);
    case 3: return multiply_tile<Dot, 3>(w, x, ldx, steps, next, initial, sums);
#if defined(__AVX512BW__)
    case 4: return multiply_tile<Dot, 4>(w, x, ldx, steps, next, initial, sums);
    case 5: return multiply_tile<Dot, 5>(w, x, ldx, steps, next, initial, sums);
    case 6: return multiply_tile<Dot, 6>(w, x, ldx, steps, next, initial, sums);
    case 7: return multiply_tile<Dot, 7>(w, x, ldx, steps, next, initial, sums);
#endif
    default: return multiply_tile<Dot, MAX_ROWS>(w, x, ldx, steps, next, initial, sums);
  }
}

// ---- The epilogue

// One tile of results before it is written: gate and up side by side, or one part.
struct Tile {
  float values[MAX_ROWS][2 * BLOCK];
  float bias[2 * BLOCK];
};

inline void read_bias(const Linear& l, int64_t first, int64_t count, Tile& tile) {
  for (int64_t part = 0; part < l.parts(); part++)
    if (l.bias) read_floats(l.dtype, l.bias, part * l.outputs() + first, count, tile.bias + part * BLOCK);
    else std::memset(tile.bias + part * BLOCK, 0, BLOCK * 4);
}

inline void finish_row(const Linear& l, const float* values, const float* bias, int64_t row, int64_t first,
                       int64_t count) {
  with_dtype(l.y_dtype, [&](auto type) {
    auto* y = static_cast<decltype(type)*>(l.y) + row * l.ldy + first;
    for_lanes(count, [&](int64_t i, int64_t lanes) {
      auto sum = [&](int64_t part) {
        int64_t at = part * BLOCK + i;
        return load(values + at, lanes) + load(bias + at, lanes);
      };
      store(y + i, l.gated ? silu(sum(0)) * sum(1) : sum(0), lanes);
    });
  });
}

// ---- The loop over W

// Returns what the tile `t` of `tiles` prefetches: with one tile, the stream 4 KiB ahead. With several, only the first
// reads its block from memory, so each prefetches its share of the next block. The lines of a step are a multiple of
// `places`, at which it prefetches.
inline Prefetch next_weights(const uint8_t* cells, int64_t step_bytes, int64_t steps, const uint8_t* next_block,
                             int64_t t, int64_t tiles, int64_t places = 1) {
  constexpr int64_t DISTANCE = 4096;
  const int64_t bytes = div_up(step_bytes, tiles), lines = div_up(bytes, 64 * places) * places;
  const int64_t stride = div_up(bytes, lines);
  if (tiles == 1) {
    int64_t ahead = DISTANCE / step_bytes;
    return {cells + DISTANCE, stride, static_cast<int>(lines), steps > ahead ? steps - ahead : 0, next_block};
  }
  return {next_block + t * steps * lines * stride, stride, static_cast<int>(lines), steps, nullptr};
}

// The place of a tile: `row` is its first, `t` its number.
struct TileRows {
  int64_t row;
  int rows;
  int64_t t, tiles;
};

constexpr int64_t RUN_INPUTS = 1 << 14;   // of rows that a thread prepares at once
constexpr int64_t RUN_BYTES = 128 << 10;  // of weights that a thread takes at once

// Computes a linear. Scheme: how its weights and rows of x are kept:
//
// ROWS: of a tile. block_bytes(k): of a block. row_bytes(l): of a prepared row of x, 0 if x is read as it is.
// prepare(l, row, out): writes a prepared row. open(l, block, part, tiles, next): gets ready for the tiles of a block;
// `next` is read after it.
// compute(rows, tile, values): writes the products of a tile with the block, [ROWS][2 * BLOCK].
template <class Scheme>
void compute_unit(const Linear& l, const uint8_t* rows, int64_t unit, const uint8_t* next_unit) {
  const int64_t parts = l.parts(), tiles = div_up(l.m, Scheme::ROWS), block_bytes = Scheme::block_bytes(l.k);
  const int64_t first = unit * BLOCK, count = std::min(BLOCK, l.outputs() - first);
  const uint8_t* block = l.packed + unit * parts * block_bytes;
  Tile tile;
  Scheme schemes[2];
  read_bias(l, first, count, tile);
  for (int64_t part = 0; part < parts; part++) {
    // One tile reads the parts one after the other. With several, tiles of a part prefetch the same part.
    const uint8_t* next = tiles > 1 ? next_unit + part * block_bytes : part + 1 < parts ? block + block_bytes : next_unit;
    schemes[part].open(l, block + part * block_bytes, part, tiles, next);
  }
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t row = t * Scheme::ROWS;
    const TileRows at{row, static_cast<int>(std::min(Scheme::ROWS, l.m - row)), t, tiles};
    for (int64_t part = 0; part < parts; part++) schemes[part].compute(l, rows, at, tile.values[0] + part * BLOCK);
    for (int r = 0; r < at.rows; r++) finish_row(l, tile.values[r], tile.bias, row + r, first, count);
  }
}

template <class Scheme>
void run(const Linear& l) {
  thread_local Scratch scratch;
  const int64_t row_bytes = Scheme::row_bytes(l), block_bytes = Scheme::block_bytes(l.k);
  uint8_t* rows = row_bytes ? static_cast<uint8_t*>(scratch.reserve(l.m * row_bytes)) : nullptr;
  if (rows)
    for_runs(l.m, div_up(RUN_INPUTS, l.k), l.threads,
             [&](int64_t row) { Scheme::prepare(l, row, rows + row * row_bytes); });
  const int64_t units = div_up(l.outputs(), BLOCK), parts = l.parts(), unit_bytes = parts * block_bytes;
  const int64_t run = std::min(div_up(RUN_BYTES, unit_bytes), div_up(units, 2 * l.threads));
  for_tasks(div_up(units, run), l.threads, [&](const Turn& turn) {
    const int64_t begin = turn.task * run, end = std::min(begin + run, units);
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t next = unit + 1 < end ? unit + 1 : turn.next < 0 ? unit : turn.next * run;
      compute_unit<Scheme>(l, rows, unit, l.packed + next * unit_bytes);
    }
  });
}

// Returns the bytes of W [n, k] in blocks.
template <class Scheme>
int64_t packed_bytes(int64_t n, int64_t k, bool gated) {
  int64_t parts = gated ? 2 : 1;
  return parts * div_up(n / parts, BLOCK) * Scheme::block_bytes(k);
}

// Packs W [n, k] int8 with scales [n, groups] float. Scheme::pack_block(rows of W, their scales, number of rows, k, out).
template <class Scheme>
void pack(const int8_t* w, const float* scales, int64_t groups, uint8_t* out, int64_t n, int64_t k, bool gated,
          int threads) {
  int64_t parts = gated ? 2 : 1, outputs = n / parts, units = div_up(outputs, BLOCK);
  for_runs(units * parts, 1, threads, [&](int64_t i) {
    int64_t first = i / parts * BLOCK, row = i % parts * outputs + first;
    int64_t count = outputs - first < BLOCK ? outputs - first : BLOCK;
    uint8_t* block = out + i * Scheme::block_bytes(k);
    std::memset(block, 0, Scheme::block_bytes(k));
    Scheme::pack_block(w + row * k, scales + row * groups, count, k, block);
  });
}
