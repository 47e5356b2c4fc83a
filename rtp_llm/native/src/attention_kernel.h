// Attention of a few query rows to one split of the keys.
//
// Both products, scores = q Kᵀ and out = p V, are one micro-kernel over packed operands. A row of the first operand and
// a column of the second meet in one accumulator, which runs over their elements in order: the same sum in any tile.
#pragma once
#include <cfloat>
#include <cmath>
#include <utility>

#include "attention_simd.h"

namespace attention {

constexpr int SPLIT = 256;  // keys whose softmax is computed at once; begins at multiples of its size
#if defined(__AVX512F__)
constexpr int ROWS = 6;  // of a micro-kernel; with its vectors, what the registers hold
constexpr int VECTORS = 4;
#elif defined(__AVX2__)
constexpr int ROWS = 6;
constexpr int VECTORS = 2;
#else
constexpr int ROWS = 4;
constexpr int VECTORS = 2;
#endif
constexpr int PANEL = VECTORS * W;  // keys that are packed side by side
constexpr int PAIR = 2 * W;         // what all sizes of packed operands are multiples of

inline int64_t round_down(int64_t a, int64_t b) { return a / b * b; }
inline int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }

// How operands are packed. An item is what one lane multiplies at a time: STEP elements, of type Item. PRECISE: whether
// weights have the precision of float32.

// Elements become float32.
template <class T>
struct Single {
  using Element = T;
  using Item = float;
  using Vector = Floats;
  static constexpr int STEP = 1;
  static constexpr bool PRECISE = true;

  static Floats load(const T* row) { return load_vector(row); }

  static Floats multiply_add(float a, Floats b, Floats sum) { return a * b + sum; }

  // Stores what belongs together of W items of STEP keys, in order of the columns.
  static void put_values(const Floats* keys, float* out) { store(out, keys[0]); }

  // Stores the weights of 2 W keys; returns their sums by lane.
  static Floats put_weights(Floats low, Floats high, float* out) {
    store(out, low);
    store(out + W, high);
    return low + high;
  }
};

#if defined(__AVX512BF16__)
// Pairs of bf16, which one instruction multiplies and adds in float32.
struct Paired {
  using Element = bf16;
  using Item = uint32_t;
  using Vector = Ints;
  static constexpr int STEP = 2;
  static constexpr bool PRECISE = false;

  static Ints load(const bf16* row) { return ::load<Ints>(row); }

  static Floats multiply_add(uint32_t a, Ints b, Floats sum) {
    __m512i pair = _mm512_set1_epi32(static_cast<int>(a));
    __asm__("vdpbf16ps %2,%1,%0" : "+v"(sum) : "v"(pair), "v"(b));  // the intrinsic makes gcc 12 spill
    return sum;
  }

  static void put_values(const Ints* keys, uint32_t* out) {
    auto even = (Shorts)keys[0], odd = (Shorts)keys[1];
    store(out, interleave<0>(even, odd));
    store(out + W, interleave<1>(even, odd));
  }

  // The sum is that of the rounded weights, so that rounding does not change what they add up to.
  static Floats put_weights(Floats low, Floats high, uint32_t* out) {
    auto pairs = (Ints)_mm512_cvtne2ps_pbh(high, low);
    store(out, pairs);
    return multiply_add(0x3f803f80, pairs, Floats{});
  }
};
#endif

// Loads W items of a row of `size` elements, from element `first` on; zeros beyond its end.
template <class F>
inline typename F::Vector load_row(const typename F::Element* row, int64_t first, int64_t size) {
  if (first + W * F::STEP <= size) return F::load(row + first);
  typename F::Element padded[W * F::STEP] = {};
  if (first < size) std::memcpy(padded, row + first, static_cast<size_t>(size - first) * sizeof(padded[0]));
  return F::load(padded);
}

// Packs W keys of `size` elements as columns, PANEL apart: [item][key].
template <class F>
__attribute__((noinline)) void pack_keys(const typename F::Element* const* rows, int64_t size, typename F::Item* out) {
  constexpr int64_t N = W * F::STEP;
  for (int64_t first = 0; first < size; first += N, out += W * PANEL) {
    typename F::Vector block[W];
    if (first + N <= size) {
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) block[i] = F::load(rows[i] + first);
    } else {
      for (int i = 0; i < W; i++) block[i] = load_row<F>(rows[i], first, size);
    }
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) store(out + i * PANEL, block[i]);
  }
}

// Packs the values of PAIR keys as rows, `columns` apart: [key / STEP][column][key % STEP].
template <class F>
__attribute__((noinline)) void pack_values(const typename F::Element* const* rows, int64_t size, int64_t columns,
                                           typename F::Item* out) {
  constexpr int64_t N = W * F::STEP;
  for (int64_t first = 0; first < columns; first += N)
    for (int key = 0; key < PAIR; key += F::STEP) {
      typename F::Vector keys[F::STEP];
      for (int i = 0; i < F::STEP; i++) keys[i] = load_row<F>(rows[key + i], first, size);
      F::put_values(keys, out + key / F::STEP * columns + first);
    }
}

// A row-major operand: `stride` items between rows.
template <class Item>
struct Matrix {
  Item* data;
  int64_t stride;
};

template <class F, int R, int N>
void multiply_tile(Matrix<const typename F::Item> a, Matrix<const typename F::Item> b, int64_t steps,
                   Matrix<float> out) {
  using Vector = typename F::Vector;
  Floats sums[R][N];  // set element by element, else gcc 12 keeps them in memory
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) sums[r][j] = Floats{};
  for (int64_t k = 0; k < steps; k++) {
    Vector columns[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) columns[j] = load<Vector>(b.data + k * b.stride + j * W);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) sums[r][j] = F::multiply_add(a.data[r * a.stride + k], columns[j], sums[r][j]);
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) store(out.data + r * out.stride + j * W, sums[r][j]);
}

// Computes out = a b, for `rows` up to ROWS and `vectors` up to VECTORS of columns.
template <class F, int R = ROWS, int N = VECTORS>
void multiply(int64_t rows, int64_t vectors, Matrix<const typename F::Item> a, Matrix<const typename F::Item> b,
              int64_t steps, Matrix<float> out) {
  if constexpr (R > 1)
    if (rows < R) return multiply<F, R - 1, N>(rows, vectors, a, b, steps, out);
  if constexpr (N > 1)
    if (vectors < N) return multiply<F, R, N - 1>(rows, vectors, a, b, steps, out);
  multiply_tile<F, R, N>(a, b, steps, out);
}

// Softmax in base 2 over a part of the keys: the sums of weights x values, and behind them, so that all is one row of
// floats, the score that has the weight 1 and the sum of the weights.
struct Partial {
  float* sums;  // [columns]
  int64_t columns;

  float& top() const { return sums[columns]; }
  float& total() const { return sums[columns + 1]; }
  static int64_t size(int64_t columns) { return columns + W; }

  void clear() const {
    for (int64_t i = 0; i < columns; i += W) store(sums + i, Floats{});
    top() = -FLT_MAX;
    total() = 0.0f;
  }
};

// Adds the next split to those before it. Never inlined: the compiler must round alike wherever it is called.
__attribute__((noinline)) inline void fold(Partial state, Partial next) {
  float top = state.top() > next.top() ? state.top() : next.top();
  Floats a = exp2(splat(state.top() - top)), b = exp2(splat(next.top() - top));
  for (int64_t i = 0; i < state.columns; i += W)
    store(state.sums + i, load<Floats>(state.sums + i) * a + load<Floats>(next.sums + i) * b);
  state.total() = state.total() * a[0] + next.total() * b[0];
  state.top() = top;
}

// Turns the scores [first, last) of a row into weights, 2^(factor x score - top). Sets top and total of `partial`.
// A score of -infinity becomes an exact zero. first, last: multiples of PAIR.
template <class F>
void softmax(const float* scores, int64_t first, int64_t last, float factor, typename F::Item* weights,
             Partial partial) {
  Floats tops = splat(-INFINITY);
  for (int64_t i = first; i < last; i += W) tops = maximum(load<Floats>(scores + i), tops);
  float top = maximum(tops) * factor;
  top = top < -FLT_MAX ? -FLT_MAX : top;
  Floats sums{};
  for (int64_t i = first; i < last; i += PAIR) {
    Floats low = exp2<F::PRECISE>(load<Floats>(scores + i) * factor - top);
    Floats high = exp2<F::PRECISE>(load<Floats>(scores + i + W) * factor - top);
    sums += F::put_weights(low, high, weights + i / F::STEP);
  }
  partial.top() = top;
  partial.total() = sum(sums);
}

}  // namespace attention
