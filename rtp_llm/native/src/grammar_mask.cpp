// What a grammar forbids, and the tokens of greedy rows that have a grammar.
//
// A mask has a bit per token, the lowest bit of a byte first; 1: allowed. It takes ceil(vocab / 8) bytes.
#include <algorithm>
#include <cmath>

#include "native.h"
#include "team.h"

namespace {

constexpr int64_t WORD = 64;     // tokens whose bits are read at once
constexpr int64_t CHUNK = 4096;  // logits that are read again to find which one is the highest
constexpr int64_t RUN_ELEMENTS = 1 << 15;  // that a thread computes at once
constexpr uint64_t ALL = ~uint64_t{0};

// As wide as the CPU's vectors: gcc splits the sums of wider ones, but compares them lane by lane.
#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
using Floats = float __attribute__((vector_size(4 * LANES)));
using Bits = int32_t __attribute__((vector_size(4 * LANES)));

Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

uint64_t load_word(const uint8_t* mask, int64_t token) {
  uint64_t word;
  std::memcpy(&word, mask + token / 8, sizeof word);
  return word;
}

bool is_allowed(const uint8_t* mask, int64_t token) { return !mask || (mask[token / 8] >> (token % 8) & 1); }

// Returns -inf for the tokens whose bits, the lowest ones of `word`, are not set.
Floats masked(Floats v, uint64_t word) {
  Bits lane;
  for (int i = 0; i < LANES; i++) lane[i] = 1 << i;
  return (static_cast<int32_t>(word & 0xffff) & lane) != 0 ? v : Floats{} - INFINITY;
}

void mask_row(float* logits, const uint8_t* mask, int64_t vocab) {
  int64_t token = 0;
  for (; token + WORD <= vocab; token += WORD) {
    uint64_t word = load_word(mask, token);
    if (word == ALL) continue;
    for (int64_t i = 0; i < WORD; i += LANES) {
      Floats v = masked(load(logits + token + i), word >> i);
      std::memcpy(logits + token + i, &v, sizeof v);
    }
  }
  for (; token < vocab; token++)
    if (!is_allowed(mask, token)) logits[token] = -INFINITY;
}

// Returns the highest logit of the allowed tokens from `token` on, -inf without any; NaN if any logit is NaN or +inf.
float find_highest(const float* logits, const uint8_t* mask, int64_t token, int64_t end) {
  Floats best = Floats{} - INFINITY;
  Bits failed{};
  for (; token + WORD <= end; token += WORD) {
    uint64_t word = mask ? load_word(mask, token) : ALL;
    for (int64_t i = 0; i < WORD; i += LANES) {
      Floats v = load(logits + token + i), allowed = word == ALL ? v : masked(v, word >> i);
      failed |= ~(v < INFINITY);  // NaN is less than nothing
      best = allowed > best ? allowed : best;
    }
  }
  float highest = -INFINITY;
  for (int lane = 0; lane < LANES; lane++) {
    if (failed[lane]) return NAN;
    highest = std::max(highest, best[lane]);
  }
  for (; token < end; token++) {
    if (!(logits[token] < INFINITY)) return NAN;
    if (is_allowed(mask, token)) highest = std::max(highest, logits[token]);
  }
  return highest;
}

// Returns the first allowed token with the highest logit; -1 if that is -inf or any logit is NaN or +inf.
int64_t find_token(const float* logits, const uint8_t* mask, int64_t vocab) {
  float best = -INFINITY;
  int64_t token = -1;  // the first one of the chunk with the highest logit
  for (int64_t begin = 0; begin < vocab; begin += CHUNK) {
    float highest = find_highest(logits, mask, begin, std::min(begin + CHUNK, vocab));
    if (std::isnan(highest)) return -1;
    if (highest > best) best = highest, token = begin;
  }
  while (token >= 0 && !(logits[token] == best && is_allowed(mask, token))) token++;
  return token;
}

// Calls call(row, mask) for each row; the mask is null where mask_of_row is -1 or null.
template <typename Call>
void for_rows(int64_t rows, int64_t vocab, const uint8_t* masks, const int64_t* mask_of_row, int threads, Call call) {
  for_runs(rows, div_up(RUN_ELEMENTS, vocab), threads, [&](int64_t row) {
    int64_t index = mask_of_row ? mask_of_row[row] : -1;
    call(row, index < 0 ? nullptr : masks + index * div_up(vocab, 8));
  });
}

}  // namespace

// logits [rows, vocab] fp32, rows `ld` apart. masks, mask_of_row: as for rtp_mask_logits, or null. tokens [rows]: the
// first allowed token with the highest logit; -1 if that is -inf, none is allowed, or any logit is NaN or +inf.
RTP_API void rtp_argmax_allowed(const float* logits, int64_t ld, int64_t rows, int64_t vocab, const uint8_t* masks,
                               const int64_t* mask_of_row, int64_t* tokens, int threads) {
  for_rows(rows, vocab, masks, mask_of_row, threads, [=](int64_t row, const uint8_t* mask) {
    tokens[row] = find_token(logits + row * ld, mask, vocab);
  });
}

// Sets the logits [rows, vocab] fp32 of forbidden tokens to -inf. mask_of_row [rows]: which of the masks, -1: none.
RTP_API void rtp_mask_logits(float* logits, int64_t rows, int64_t vocab, const uint8_t* masks,
                             const int64_t* mask_of_row, int threads) {
  for_rows(rows, vocab, masks, mask_of_row, threads, [=](int64_t row, const uint8_t* mask) {
    if (mask) mask_row(logits + row * vocab, mask, vocab);
  });
}
