// AMX's instructions on any CPU, for the tests. Included before csrc/cpu (g++ -include).
//
// A tile that is used while its thread has no tiles stops the program, as the CPU would.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

namespace emulated {

struct Tile {
  uint32_t at[16][16];
};
inline thread_local Tile tiles[8];
inline thread_local bool configured = false;

inline void need_tiles() {
  if (!configured) std::abort();
}

inline float of_bf16(uint32_t upper_bits) {
  float x;
  std::memcpy(&x, &upper_bits, sizeof x);
  return x;
}

inline void load_config(const void* memory) {
  const uint8_t* byte = static_cast<const uint8_t*>(memory);
  uint16_t row_bytes[8];
  std::memcpy(row_bytes, byte + 16, sizeof row_bytes);
  for (int i = 0; i < 8; i++)
    if (byte[0] != 1 || row_bytes[i] != 64 || byte[48 + i] != 16) std::abort();
  for (int i = 2; i < 16; i++)
    if (byte[i]) std::abort();
  configured = true;
}

inline void zero(int tile) {
  need_tiles();
  tiles[tile] = {};
}

inline void load(int tile, const void* base, int64_t stride) {
  need_tiles();
  for (int row = 0; row < 16; row++)
    std::memcpy(tiles[tile].at[row], static_cast<const char*>(base) + row * stride, 64);
}

inline void store(int tile, void* base, int64_t stride) {
  need_tiles();
  for (int row = 0; row < 16; row++)
    std::memcpy(static_cast<char*>(base) + row * stride, tiles[tile].at[row], 64);
}

// The first products of all pairs, the second ones, and the sum of both to what was there.
inline void multiply(int sums, int a, int b) {
  need_tiles();
  for (int m = 0; m < 16; m++)
    for (int n = 0; n < 16; n++) {
      float first = 0.0f, second = 0.0f;
      for (int k = 0; k < 16; k++) {
        const uint32_t x = tiles[a].at[m][k], y = tiles[b].at[k][n];
        first = std::fma(of_bf16(x << 16), of_bf16(y << 16), first);
        second = std::fma(of_bf16(x & 0xffff0000), of_bf16(y & 0xffff0000), second);
      }
      float sum;
      std::memcpy(&sum, &tiles[sums].at[m][n], sizeof sum);
      sum += first + second;
      std::memcpy(&tiles[sums].at[m][n], &sum, sizeof sum);
    }
}

}  // namespace emulated

#define _tile_loadconfig(memory) emulated::load_config(memory)
#define _tile_release() (emulated::configured = false)
#define _tile_zero(tile) emulated::zero(tile)
#define _tile_loadd(tile, base, stride) emulated::load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated::store(tile, base, stride)
#define _tile_dpbf16ps(sums, a, b) emulated::multiply(sums, a, b)
