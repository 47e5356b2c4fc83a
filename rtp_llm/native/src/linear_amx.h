// The micro-kernel of linear_tile.h over the tiles of AMX: the same layout, up to 32 rows at a time.
#pragma once
#include <algorithm>

#include "amx.h"
#include "linear_tile.h"

#ifdef RTP_AMX

struct AmxStep : PairStep {
  static constexpr int64_t ROWS = 32;
};

// Sets the rows of the tiles: 0 to 3 hold sums, 4 and 5 hold x, 6 and 7 weights. Of more than 16 rows, the tiles 2, 3
// and 5 hold the lower ones.
inline void configure_tiles(int rows) {
  TileConfig config;
  for (int t = 0; t < 8; t++) {
    bool is_lower = rows > 16 && (t == 2 || t == 3 || t == 5);
    config.bytes_per_row[t] = 64;
    config.rows[t] = static_cast<uint8_t>(t >= 6 ? 16 : is_lower ? rows - 16 : std::min(rows, 16));
  }
  tile_configure(config);
}

// Prefetches for the 16 steps from `step` on.
inline void prefetch_steps(const Prefetch& prefetch, int64_t step) {
  bool is_second = step >= prefetch.split;
  const char* from = is_second ? prefetch.second : prefetch.first;
  int64_t begin = (is_second ? step - prefetch.split : step) * prefetch.lines;
  int64_t end = begin + AmxStep::GRANULARITY * prefetch.lines;
  for (int64_t i = begin; i < end; i++) __builtin_prefetch(from + i * prefetch.stride);
}

// Up to 16 rows: 1 x 4 tiles of sums.
inline void compute_upper_rows(const Tile& tile, const Prefetch& prefetch) {
  const int64_t ldx = tile.ldx * 4, lds = BLOCK * 4;
  float* sums = tile.sums;
  if (tile.accumulates) {
    tile_load(0, sums, lds); tile_load(1, sums + 16, lds); tile_load(2, sums + 32, lds); tile_load(3, sums + 48, lds);
  } else {
    tile_zero(0); tile_zero(1); tile_zero(2); tile_zero(3);
  }
  for (int64_t step = 0; step < tile.steps; step += AmxStep::GRANULARITY) {
    prefetch_steps(prefetch, step);
    const char* w = tile.w + step * AmxStep::BYTES;
    tile_load(4, tile.x + step, ldx);
    tile_load(6, w, AmxStep::BYTES); tile_dot(0, 4, 6);
    tile_load(7, w + 64, AmxStep::BYTES); tile_dot(1, 4, 7);
    tile_load(6, w + 128, AmxStep::BYTES); tile_dot(2, 4, 6);
    tile_load(7, w + 192, AmxStep::BYTES); tile_dot(3, 4, 7);
  }
  tile_store(0, sums, lds); tile_store(1, sums + 16, lds); tile_store(2, sums + 32, lds); tile_store(3, sums + 48, lds);
}

// 17 to 32 rows, 32 columns: 2 x 2 tiles of sums. prefetch: null if it was done before.
inline void compute_all_rows(const Tile& tile, int64_t column, const Prefetch* prefetch) {
  const int64_t ldx = tile.ldx * 4, lds = BLOCK * 4;
  float *upper = tile.sums + column, *lower = upper + 16 * BLOCK;
  if (tile.accumulates) {
    tile_load(0, upper, lds); tile_load(1, upper + 16, lds); tile_load(2, lower, lds); tile_load(3, lower + 16, lds);
  } else {
    tile_zero(0); tile_zero(1); tile_zero(2); tile_zero(3);
  }
  for (int64_t step = 0; step < tile.steps; step += AmxStep::GRANULARITY) {
    if (prefetch) prefetch_steps(*prefetch, step);
    const char* w = tile.w + step * AmxStep::BYTES + column * 4;
    tile_load(4, tile.x + step, ldx); tile_load(5, tile.x + 16 * tile.ldx + step, ldx);
    tile_load(6, w, AmxStep::BYTES); tile_load(7, w + 64, AmxStep::BYTES);
    tile_dot(0, 4, 6); tile_dot(1, 4, 7); tile_dot(2, 5, 6); tile_dot(3, 5, 7);
  }
  tile_store(0, upper, lds); tile_store(1, upper + 16, lds); tile_store(2, lower, lds); tile_store(3, lower + 16, lds);
}

template <>
inline void compute_tile<AmxStep>(int rows, const Tile& tile, const Prefetch& prefetch) {
  configure_tiles(rows);
  if (rows <= 16) {
    compute_upper_rows(tile, prefetch);
  } else {
    compute_all_rows(tile, 0, &prefetch);
    compute_all_rows(tile, 32, nullptr);
  }
  tile_release();
}

#endif
