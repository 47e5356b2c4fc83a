// y = x Wᵀ + bias with W in 4 bits, one bf16 scale for each GROUP of inputs of an output, and x quantized to int8 with
// one scale for each group. The sum of a group is exact; groups are added in order, in float32.
//
// A block is a sequence of steps of two groups: three vectors of scales (a lane has the two scales of an output), then
// eight cells of three vectors. A cell has eight inputs of each output: those 0 … 3 in the low halves of its bytes, 4 … 7
// in the high halves, each plus 8. A prepared row of x has for each step the two scales, the two starts of the sums
// (-8 times the sum of the group, for the offset of the weights), and the words that are multiplied with each cell.
#include "quantized.h"
#include "replay.h"

namespace {

constexpr int64_t GROUP = 32, STEP = 2 * GROUP, CELL = 8, CELLS = STEP / CELL, OFFSET = 8;

#if defined(__AVX512VNNI__)
// The words are inputs 0 … 3 and 4 … 7 of the cell, as int8.
constexpr int WORDS = 2;

inline void add_cell(IntVector& sum, IntVector cell, const int32_t* x) {
  IntVector low = cell & 0x0f0f0f0f, high = (cell >> 4) & 0x0f0f0f0f;
  __asm__("vpdpbusd %2%{1to16%},%1,%0" : "+v"(sum) : "v"(low), "m"(x[0]));
  __asm__("vpdpbusd %2%{1to16%},%1,%0" : "+v"(sum) : "v"(high), "m"(x[1]));
}

inline void write_words(const Integers* x, uint8_t* out) {
  for (int i = 0; i < GROUP / LANES; i++) store(out + i * LANES, x[i], LANES);
}
#else
// Word i has the two inputs, as int16, whose weights have their bits at 4 i in the two halves of the cell.
constexpr int WORDS = 4;

inline void add_cell(IntVector& sum, IntVector cell, const int32_t* x) {
  for (int i = 0; i < WORDS; i++)
    sum += multiply_pairs((ShortVector)((cell >> (4 * i)) & 0x000f000f), (ShortVector)broadcast(x[i]));
}

inline void write_words(const Integers* x, uint8_t* out) {
  int16_t words[2 * GROUP / CELL * WORDS];
  for (int cell = 0; cell < GROUP / CELL; cell++)
    for (int i = 0; i < 2 * WORDS; i++) {
      int input = cell * CELL + i / 2 % 2 * 4 + i / 4 + i % 2 * 2;
      words[cell * 2 * WORDS + i] = static_cast<int16_t>(x[input / LANES][input % LANES]);
    }
  std::memcpy(out, words, sizeof words);
}
#endif

// One step of a prepared row.
struct RowStep {
  float scales[2];
  int32_t starts[2];
  int32_t words[CELLS * WORDS];
};

constexpr int64_t STEP_BYTES = (3 + 3 * CELLS) * WIDTH * 4;

// Computes R rows of a block: sums[R][3].
template <int R>
void multiply_tile(const uint8_t* w, const RowStep* x, int64_t steps, Prefetch next, FloatVector* sums) {
#define FOR_TILE(DO) DO(0) DO(1) DO(2) DO(3)
#define DECLARE(r) FloatVector f##r##0 = {}, f##r##1 = {}, f##r##2 = {};
  FOR_TILE(DECLARE)
  const int64_t lines = next.lines / CELLS;  // that each cell prefetches: more at once wait for each other
  for (int64_t step = 0; step < steps; step++) {
    if (step == next.split) next.at = next.later;
    const uint8_t* cells = w + 3 * WIDTH * 4;
    for (int group = 0; group < 2; group++) {
#define START(r)                                                                              \
  [[maybe_unused]] IntVector a##r##0 = broadcast(x[R > r ? r * steps + step : step].starts[group]), \
                        a##r##1 = a##r##0, a##r##2 = a##r##0;
      FOR_TILE(START)
      for (int64_t cell = group * CELLS / 2; cell < (group + 1) * CELLS / 2; cell++) {
        IntVector w0 = load<IntVector>(cells), w1 = load<IntVector>(cells + WIDTH * 4), w2 = load<IntVector>(cells + 2 * WIDTH * 4);
        cells += 3 * WIDTH * 4;
        for (int64_t line = 0; line < lines; line++, next.at += next.stride) __builtin_prefetch(next.at);
#define ADD(r)                                                            \
  if constexpr (R > r) {                                                  \
    const int32_t* words = x[r * steps + step].words + cell * WORDS;      \
    add_cell(a##r##0, w0, words);                                         \
    add_cell(a##r##1, w1, words);                                         \
    add_cell(a##r##2, w2, words);                                         \
  }
        FOR_TILE(ADD)
      }
      auto scale = [&](int i) {
        IntVector both = load<IntVector>(w + i * WIDTH * 4);
        return (FloatVector)(group ? both & static_cast<int32_t>(0xffff0000) : both << 16);
      };
      FloatVector s0 = scale(0), s1 = scale(1), s2 = scale(2);
#define SCALE(r)                                                            \
  if constexpr (R > r) {                                                    \
    float xs = x[r * steps + step].scales[group];                           \
    f##r##0 += __builtin_convertvector(a##r##0, FloatVector) * (s0 * xs);        \
    f##r##1 += __builtin_convertvector(a##r##1, FloatVector) * (s1 * xs);        \
    f##r##2 += __builtin_convertvector(a##r##2, FloatVector) * (s2 * xs);        \
  }
      FOR_TILE(SCALE)
    }
    w = cells;
  }
#define KEEP(r) \
  if constexpr (R > r) sums[3 * r] = f##r##0, sums[3 * r + 1] = f##r##1, sums[3 * r + 2] = f##r##2;
  FOR_TILE(KEEP)
}

struct Int4 {
  static constexpr int64_t ROWS = MAX_ROWS / 2;

  const uint8_t *block, *next_block;

  static int64_t steps(int64_t k) { return div_up(k, STEP); }
  static int64_t block_bytes(int64_t k) { return steps(k) * STEP_BYTES; }
  static int64_t row_bytes(const Linear& l) { return steps(l.k) * static_cast<int64_t>(sizeof(RowStep)); }

  static void prepare(const Linear& l, int64_t row, uint8_t* out) {
    RowStep* prepared = reinterpret_cast<RowStep*>(out);
    for (int64_t first = 0; first < l.k; first += GROUP) {
      float x[GROUP] = {};
      Integers quantized[GROUP / LANES], sums = {};
      read_floats(l.dtype, l.x, row * l.ldx + first, std::min(GROUP, l.k - first), x);
      Scale scale(largest_magnitude(x, GROUP));
      for (int64_t i = 0; i < GROUP / LANES; i++)
        sums += quantized[i] = round_to_integers(load(x + i * LANES) * scale.inverse);
      int32_t sum = 0;
      for (int i = 0; i < LANES; i++) sum += sums[i];
      RowStep& step = prepared[first / STEP];
      int64_t group = first / GROUP % 2;
      step.scales[group] = scale.scale;
      step.starts[group] = -static_cast<int32_t>(OFFSET) * sum;
      write_words(quantized, reinterpret_cast<uint8_t*>(step.words + group * GROUP / CELL * WORDS));
    }
    if (div_up(l.k, GROUP) % 2) {  // the last step has one group
      RowStep& step = prepared[steps(l.k) - 1];
      step.scales[1] = 0, step.starts[1] = 0;
      std::memset(step.words + CELLS / 2 * WORDS, 0, sizeof step.words / 2);
    }
  }

  void open(const Linear&, const uint8_t* at, int64_t, int64_t, const uint8_t* next) { block = at, next_block = next; }

  void compute(const Linear& l, const uint8_t* rows, TileRows tile, float* values) const {
    const RowStep* x = reinterpret_cast<const RowStep*>(rows + tile.row * row_bytes(l));
    Prefetch next = next_weights(block, STEP_BYTES, steps(l.k), next_block, tile.t, tile.tiles, CELLS);
    FloatVector sums[3 * ROWS] = {};
    switch (tile.rows) {
      case 1: multiply_tile<1>(block, x, steps(l.k), next, sums); break;
#if defined(__AVX512BW__)
      case 2: multiply_tile<2>(block, x, steps(l.k), next, sums); break;
      case 3: multiply_tile<3>(block, x, steps(l.k), next, sums); break;
#endif
      default: multiply_tile<ROWS>(block, x, steps(l.k), next, sums);
    }
    for (int r = 0; r < tile.rows; r++)
      for (int i = 0; i < 3; i++) store(values + r * 2 * BLOCK + i * WIDTH, sums[3 * r + i]);
  }

  static void pack_block(const int8_t* w, const float* scales, int64_t count, int64_t k, uint8_t* out) {
    const int64_t groups = div_up(k, GROUP);
    for (int64_t n = 0; n < count; n++)
      for (int64_t step = 0; step < steps(k); step++) {
        uint8_t* at = out + step * STEP_BYTES;
        for (int64_t group = 0; group < 2 && 2 * step + group < groups; group++) {
          bf16 scale = to_bf16(scales[n * groups + 2 * step + group]);
          std::memcpy(at + 4 * n + 2 * group, &scale, 2);
        }
        for (int64_t i = 0; i < STEP; i++) {
          int64_t input = step * STEP + i;
          int value = (input < k ? w[n * k + input] : 0) + OFFSET;
          at[((3 + 3 * (i / CELL)) * WIDTH + n) * 4 + i % 4] |= static_cast<uint8_t>(value << (i % CELL / 4 * 4));
        }
      }
  }
};

}  // namespace

RTP_API int64_t rtp_int4_packed_bytes(int, int64_t n, int64_t k, int gated) { return packed_bytes<Int4>(n, k, gated); }

// w [n, k] int8 in -8 … 7, scales [n, div_up(k, GROUP)] float.
RTP_API void rtp_int4_pack(int, const void* w, const void* scales, void* packed, int64_t n, int64_t k, int gated,
                           int threads) {
  pack<Int4>(static_cast<const int8_t*>(w), static_cast<const float*>(scales), div_up(k, GROUP),
             static_cast<uint8_t*>(packed), n, k, gated, threads);
}

// As rtp_w8a8_linear.
RTP_API void rtp_int4_linear(int dtype, int y_dtype, const void* x, int64_t ldx, const void* packed, const void* bias,
                             void* y, int64_t ldy, int64_t m, int64_t n, int64_t k, int gated, int threads) {
  run<Int4>({dtype, y_dtype, x, ldx, static_cast<const uint8_t*>(packed), bias, y, ldy, m, n, k, gated != 0, threads});
}
RTP_REPLAYABLE(rtp_int4_linear)
