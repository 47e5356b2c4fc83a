// y = x Wᵀ + bias with W in int8, one scale per output, and x as it is.
//
// A block: float scales[BLOCK], int8 cells[k / INPUTS][BLOCK][INPUTS]. int8 is exact in bf16 and float32: the cells are
// widened in registers. For more rows than one tile, they are widened once, into memory that the second cache holds.
#include "quantized.h"
#include "replay.h"

namespace {

struct DotFloat {
  using Sum = FloatVector;
  static constexpr int64_t INPUTS = 1, CELL_BYTES = 1;
  static IntVector load(const uint8_t* cells) { return (IntVector)load_floats(cells); }
  static void add(FloatVector& sum, IntVector x, IntVector w) { sum += (FloatVector)x * (FloatVector)w; }
};

#if defined(__AVX512BF16__)
struct DotBf16 {
  using Sum = FloatVector;
  static constexpr int64_t INPUTS = 2, CELL_BYTES = 2;
  static IntVector load(const uint8_t* cells) {
    return (IntVector)_mm512_cvtne2ps_pbh((__m512)load_floats(cells + WIDTH), (__m512)load_floats(cells));
  }
  static void add(FloatVector& sum, IntVector x, IntVector w) { __asm__("vdpbf16ps %2,%1,%0" : "+v"(sum) : "v"(x), "v"(w)); }
};
#endif

// The cells of Dot after they have been widened.
template <class Dot>
struct Widened : Dot {
  static constexpr int64_t CELL_BYTES = 4;
  static IntVector load(const uint8_t* cells) { return ::load<IntVector>(cells); }
};

template <class Dot>
struct Int8 {
  static constexpr int64_t ROWS = MAX_ROWS, INPUTS = Dot::INPUTS, HEAD = 4 * BLOCK;

  const uint8_t *block, *next_block, *widened;

  static int64_t steps(int64_t k) { return div_up(k, INPUTS); }
  static int64_t block_bytes(int64_t k) { return HEAD + steps(k) * BLOCK * INPUTS; }

  // Rows of x are read as they are if they consist of whole words.
  static int64_t row_bytes(const Linear& l) {
    bool has_words = INPUTS == 2 ? l.dtype == BF16 && l.k % 2 == 0 && l.ldx % 2 == 0 : l.dtype == FP32;
    return has_words ? 0 : 4 * steps(l.k);
  }

  static void prepare(const Linear& l, int64_t row, uint8_t* out) {
    if constexpr (INPUTS == 1) {
      read_floats(l.dtype, l.x, row * l.ldx, l.k, reinterpret_cast<float*>(out));
    } else {
      const bf16* x = static_cast<const bf16*>(l.x) + row * l.ldx;
      std::memset(out + row_bytes(l) - 4, 0, 4);
      std::memcpy(out, x, 2 * l.k);
    }
  }

  void open(const Linear& l, const uint8_t* at, int64_t part, int64_t tiles, const uint8_t* next) {
    thread_local Scratch scratch[2];
    block = at, next_block = next, widened = nullptr;
    if (tiles < 2) return;
    uint8_t* panel = static_cast<uint8_t*>(scratch[part].reserve(steps(l.k) * BLOCK * 4));
    for (int64_t i = 0; i < 3 * steps(l.k); i++)
      store(panel + i * WIDTH * 4, Dot::load(block + HEAD + i * WIDTH * INPUTS));
    widened = panel;
  }

  void compute(const Linear& l, const uint8_t* rows, TileRows tile, float* values) const {
    const uint8_t* cells = block + HEAD;
    const int64_t ldx = row_bytes(l) ? row_bytes(l) / 4 : l.ldx / INPUTS;
    const int32_t* x = (row_bytes(l) ? reinterpret_cast<const int32_t*>(rows) : static_cast<const int32_t*>(l.x));
    Prefetch next = next_weights(cells, BLOCK * INPUTS, steps(l.k), next_block, tile.t, tile.tiles);
    FloatVector start[3] = {}, sums[3 * MAX_ROWS];
    x += tile.row * ldx;
    if (widened) multiply_rows<Widened<Dot>>(tile.rows, widened, x, ldx, steps(l.k), next, start, sums);
    else multiply_rows<Dot>(tile.rows, cells, x, ldx, steps(l.k), next, start, sums);
    for (int r = 0; r < tile.rows; r++)
      for (int i = 0; i < 3; i++)
        store(values + r * 2 * BLOCK + i * WIDTH, sums[3 * r + i] * load<FloatVector>(block + 4 * i * WIDTH));
  }

  static void pack_block(const int8_t* w, const float* scales, int64_t count, int64_t k, uint8_t* out) {
    std::memcpy(out, scales, 4 * count);
    for (int64_t n = 0; n < count; n++)
      for (int64_t i = 0; i < k; i++)
        out[HEAD + (i / INPUTS * BLOCK + n) * INPUTS + i % INPUTS] = static_cast<uint8_t>(w[n * k + i]);
  }
};

// Calls `function` with the scheme for activations of `dtype`.
template <class Function>
auto with_scheme(int dtype, Function function) {
#if defined(__AVX512BF16__)
  if (dtype == BF16) return function(Int8<DotBf16>());
#endif
  (void)dtype;
  return function(Int8<DotFloat>());
}

}  // namespace

RTP_API int64_t rtp_int8_packed_bytes(int dtype, int64_t n, int64_t k, int gated) {
  return with_scheme(dtype, [=](auto scheme) { return packed_bytes<decltype(scheme)>(n, k, gated); });
}

// w [n, k] int8, scales [n] float.
RTP_API void rtp_int8_pack(int dtype, const void* w, const void* scales, void* packed, int64_t n, int64_t k, int gated,
                           int threads) {
  with_scheme(dtype, [=](auto scheme) {
    pack<decltype(scheme)>(static_cast<const int8_t*>(w), static_cast<const float*>(scales), 1,
                           static_cast<uint8_t*>(packed), n, k, gated, threads);
  });
}

// As rtp_w8a8_linear.
RTP_API void rtp_int8_linear(int dtype, int y_dtype, const void* x, int64_t ldx, const void* packed, const void* bias,
                             void* y, int64_t ldy, int64_t m, int64_t n, int64_t k, int gated, int threads) {
  Linear l{dtype, y_dtype, x, ldx, static_cast<const uint8_t*>(packed), bias, y, ldy, m, n, k, gated != 0, threads};
  with_scheme(dtype, [&](auto scheme) { run<decltype(scheme)>(l); });
}
RTP_REPLAYABLE(rtp_int8_linear)
