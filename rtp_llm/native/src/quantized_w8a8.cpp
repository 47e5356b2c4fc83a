// y = x Wᵀ + bias with W in int8, one scale per output, and x quantized to int8, one scale per row. Sums are exact.
//
// A block: float scales[BLOCK], int32 start[BLOCK], int8 cells[k / INPUTS][BLOCK][INPUTS]. A prepared row of x: its float
// scale, then k / INPUTS words. The values of x are in -127 … 127.
#include "quantized.h"
#include "replay.h"

namespace {

#if defined(__AVX512VNNI__)
// Four products in each lane, of uint8 with int8 and without saturation: x is kept plus 128, and the sum of an output
// starts at -128 times the sum of its weights.
struct DotInt8 {
  using Sum = IntVector;
  static constexpr int64_t INPUTS = 4, CELL_BYTES = 4;
  static constexpr int32_t X_OFFSET = 128;
  static IntVector load(const uint8_t* cells) { return ::load<IntVector>(cells); }
  static void add(IntVector& sum, IntVector x, IntVector w) { __asm__("vpdpbusd %2,%1,%0" : "+v"(sum) : "v"(x), "v"(w)); }
};
#else
// Two products in each lane, of int16.
struct DotInt8 {
  using Sum = IntVector;
  static constexpr int64_t INPUTS = 2, CELL_BYTES = 2;
  static constexpr int32_t X_OFFSET = 0;
  static IntVector load(const uint8_t* cells) { return (IntVector)load_shorts(cells); }
  static void add(IntVector& sum, IntVector x, IntVector w) { sum += multiply_pairs((ShortVector)x, (ShortVector)w); }
};
#endif

struct W8A8 {
  static constexpr int64_t ROWS = MAX_ROWS, INPUTS = DotInt8::INPUTS, HEAD = 8 * BLOCK;

  const uint8_t *block, *next_block;

  static int64_t steps(int64_t k) { return div_up(k, INPUTS); }
  static int64_t block_bytes(int64_t k) { return HEAD + steps(k) * BLOCK * INPUTS; }
  static int64_t row_bytes(const Linear& l) { return 4 + 4 * steps(l.k); }

  static void prepare(const Linear& l, int64_t row, uint8_t* out) {
    thread_local Scratch scratch;
    float* x = static_cast<float*>(scratch.reserve(4 * (l.k + INPUTS)));
    read_floats(l.dtype, l.x, row * l.ldx, l.k, x);
    for (int64_t i = l.k; i < steps(l.k) * INPUTS; i++) x[i] = 0;
    Scale scale(largest_magnitude(x, l.k));
    std::memcpy(out, &scale.scale, 4);
    using Word = std::conditional_t<INPUTS == 4, uint8_t, int16_t>;
    Word* words = reinterpret_cast<Word*>(out + 4);
    for_lanes(steps(l.k) * INPUTS, [&](int64_t i, int64_t lanes) {
      store(words + i, round_to_integers(load(x + i, lanes) * scale.inverse) + DotInt8::X_OFFSET, lanes);
    });
  }

  void open(const Linear&, const uint8_t* at, int64_t, int64_t, const uint8_t* next) { block = at, next_block = next; }

  void compute(const Linear& l, const uint8_t* rows, TileRows tile, float* values) const {
    const uint8_t* cells = block + HEAD;
    const uint8_t* x = rows + tile.row * row_bytes(l);
    IntVector start[3], sums[3 * MAX_ROWS];
    for (int i = 0; i < 3; i++) start[i] = load<IntVector>(block + 4 * (BLOCK + i * WIDTH));
    multiply_rows<DotInt8>(tile.rows, cells, reinterpret_cast<const int32_t*>(x + 4), row_bytes(l) / 4, steps(l.k),
                           next_weights(cells, BLOCK * INPUTS, steps(l.k), next_block, tile.t, tile.tiles), start,
                           sums);
    for (int r = 0; r < tile.rows; r++) {
      float scale;
      std::memcpy(&scale, x + r * row_bytes(l), 4);
      for (int i = 0; i < 3; i++)
        store(values + r * 2 * BLOCK + i * WIDTH, __builtin_convertvector(sums[3 * r + i], FloatVector) *
                                                      load<FloatVector>(block + 4 * i * WIDTH) * scale);
    }
  }

  static void pack_block(const int8_t* w, const float* scales, int64_t count, int64_t k, uint8_t* out) {
    std::memcpy(out, scales, 4 * count);
    for (int64_t n = 0; n < count; n++) {
      int32_t start = 0;
      for (int64_t i = 0; i < k; i++) {
        start -= DotInt8::X_OFFSET * w[n * k + i];
        out[HEAD + (i / INPUTS * BLOCK + n) * INPUTS + i % INPUTS] = static_cast<uint8_t>(w[n * k + i]);
      }
      std::memcpy(out + 4 * (BLOCK + n), &start, 4);
    }
  }
};

}  // namespace

RTP_API int64_t rtp_w8a8_packed_bytes(int, int64_t n, int64_t k, int gated) { return packed_bytes<W8A8>(n, k, gated); }

// w [n, k] int8, scales [n] float.
RTP_API void rtp_w8a8_pack(int, const void* w, const void* scales, void* packed, int64_t n, int64_t k, int gated,
                           int threads) {
  pack<W8A8>(static_cast<const int8_t*>(w), static_cast<const float*>(scales), 1, static_cast<uint8_t*>(packed), n, k,
             gated, threads);
}

// x [m, k] and bias [n] (or null) in `dtype`; y [m, n] in `y_dtype`. gated: W and bias stack gate and up, and y [m, n / 2]
// is silu(gate) * up. ldx, ldy: the distance of rows, in elements.
RTP_API void rtp_w8a8_linear(int dtype, int y_dtype, const void* x, int64_t ldx, const void* packed, const void* bias,
                             void* y, int64_t ldy, int64_t m, int64_t n, int64_t k, int gated, int threads) {
  run<W8A8>({dtype, y_dtype, x, ldx, static_cast<const uint8_t*>(packed), bias, y, ldy, m, n, k, gated != 0, threads});
}
RTP_REPLAYABLE(rtp_w8a8_linear)
