// Products of bytes in the tile registers of AMX.
#pragma once

#include "int8_inputs.h"

#if defined(__AMX_INT8__) && defined(SPECDEC_AVX512) && defined(__linux__)
#define SPECDEC_TILES
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// Whether Linux lets this process use AMX's registers.
inline bool may_use_tiles() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool may = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return may;
}

// Prepares the registers for products of R rows. Every loop of products is followed by _tile_release.
template <int R>
void configure_tiles() {
  struct alignas(64) Shapes {  // of tiles: 0 and 1 products, 2 and 3 rows, the others columns
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {R, R, R, R, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS};
  };
  static constexpr Shapes shapes;
  _tile_loadconfig(&shapes);
}

// For i = begin … end - 1: add(i, products), int32 [R, 16] of a(i), int8 [R, 64] with rows `stride` apart, and b(i),
// int8 [16, 16, 4], of which word [k, j] has bytes 4 k … 4 k + 3 of column j. prepare(i) comes two products before
// b(i). Each function is called for one i after the other.
//
// What a tile takes from memory, or puts there, arrives late. So a product is stored when the next one is begun, and
// added when the one after that is; two sets of tiles take turns.
template <typename A, typename B, typename Prepare, typename Add>
[[gnu::always_inline]] inline void for_each_product(int64_t begin, int64_t end, int64_t stride, const A& a, const B& b,
    const Prepare& prepare, const Add& add) {
  constexpr int64_t AHEAD = 2, LATE = 2;
  IntVec products[2][TILE_ROWS];
  for (int64_t i = begin - AHEAD; i < end + LATE; ++i) {
    if (i + AHEAD < end) prepare(i + AHEAD);
    if (i < begin) continue;
    if (i < end) {
      const int8_t* const rows = a(i);
      const void* const columns = b(i);
      asm volatile("" ::"r"(columns), "r"(rows) : "memory");  // GCC 12 does not know that tiles are loaded from memory
      if (i % 2 == 0) {
        _tile_loadd(2, rows, stride);
        _tile_loadd(4, columns, 64);
        _tile_zero(0);
        _tile_dpbssd(0, 2, 4);
      } else {
        _tile_loadd(3, rows, stride);
        _tile_loadd(5, columns, 64);
        _tile_zero(1);
        _tile_dpbssd(1, 3, 5);
      }
    }
    if (i % 2 == 0)
      _tile_stored(1, products[1], 64);
    else
      _tile_stored(0, products[0], 64);
    if (i >= begin + LATE) add(i - LATE, products[i % 2]);
  }
}

}  // namespace
#endif
