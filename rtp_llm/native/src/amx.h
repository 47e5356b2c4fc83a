// The tile instructions of AMX for bf16, or with RTP_EMULATE_AMX a model of them in plain C++ for tests elsewhere.
#pragma once
#include "native.h"

#if defined(__AMX_BF16__) || defined(RTP_EMULATE_AMX)
#define RTP_AMX 1

// The operand of LDTILECFG: for each tile its bytes per row, at most 64, and its rows, at most 16.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

#if defined(RTP_EMULATE_AMX)

struct EmulatedTile {
  uint32_t words[16][16];
};
inline thread_local EmulatedTile emulated_tiles[8];
inline thread_local TileConfig emulated_config;

inline void tile_configure(const TileConfig& config) {
  emulated_config = config;
  std::memset(emulated_tiles, 0, sizeof emulated_tiles);
}
inline void tile_release() {}
inline void tile_zero(int t) { std::memset(&emulated_tiles[t], 0, sizeof emulated_tiles[t]); }
inline void tile_load(int t, const void* from, int64_t stride) {
  const char* row = static_cast<const char*>(from);
  tile_zero(t);
  for (int i = 0; i < emulated_config.rows[t]; i++, row += stride)
    std::memcpy(emulated_tiles[t].words[i], row, emulated_config.bytes_per_row[t]);
}
inline void tile_store(int t, void* to, int64_t stride) {
  char* row = static_cast<char*>(to);
  for (int i = 0; i < emulated_config.rows[t]; i++, row += stride)
    std::memcpy(row, emulated_tiles[t].words[i], emulated_config.bytes_per_row[t]);
}
// c += a b, over pairs: even and odd products are summed apart (Intel SDM, TDPBF16PS).
inline void tile_dot(int c, int a, int b) {
  for (int m = 0; m < emulated_config.rows[c]; m++)
    for (int n = 0; n < emulated_config.bytes_per_row[c] / 4; n++) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < emulated_config.bytes_per_row[a] / 4; k++) {
        uint32_t x = emulated_tiles[a].words[m][k], w = emulated_tiles[b].words[k][n];
        even += to_float(static_cast<bf16>(x)) * to_float(static_cast<bf16>(w));
        odd += to_float(static_cast<bf16>(x >> 16)) * to_float(static_cast<bf16>(w >> 16));
      }
      std::memcpy(&sum, &emulated_tiles[c].words[m][n], 4);
      sum += even + odd;
      std::memcpy(&emulated_tiles[c].words[m][n], &sum, 4);
    }
}
inline bool amx_permitted() { return true; }

#else
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

// The numbers of tiles are part of the instructions: literals only.
inline void tile_configure(const TileConfig& config) {
  __asm__ volatile("" : : "r"(&config) : "memory");  // gcc's intrinsics do not say what memory they read
  _tile_loadconfig(&config);
}
#define tile_release() _tile_release()
#define tile_zero(t) _tile_zero(t)
#define tile_load(t, from, stride) _tile_loadd(t, from, stride)
#define tile_store(t, to, stride) _tile_stored(t, to, stride)
#define tile_dot(c, a, b) _tile_dpbf16ps(c, a, b)

// Asks the kernel for the state of the tiles, for all threads of this process (Linux, Documentation/arch/x86/xstate).
inline bool amx_permitted() {
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

#endif
#endif
