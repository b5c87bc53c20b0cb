// The product of a register tile by AMX: a tile of 16 rows of the head, others of as many numbers
// of 16 lanes, and those of their sums.
//
// A tile is loaded from memory as it lies there, so the operands are those of operands_bf16.h.

constexpr int64_t TILE_NUMBERS = 16;  // of a row: 64 bytes

// While it lives, its thread has eight whole tiles.
class ProductRegisters {
 public:
  ProductRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } whole;
    static_assert(sizeof whole == 64);
    std::atomic_signal_fence(std::memory_order_seq_cst);
    _tile_loadconfig(&whole);
  }
  ~ProductRegisters() { _tile_release(); }
  ProductRegisters(const ProductRegisters&) = delete;
  ProductRegisters& operator=(const ProductRegisters&) = delete;
};

// n: a multiple of TILE_NUMBERS. Tiles 0 to 2 hold the sums of NV vectors, 3 a, 4 to 6 b. The
// fences are for the compiler, which is not told which memory the tiles' instructions touch.
template <int NV>
SPF_INLINE void matrix_tile(const char* a, int64_t row, const float* b, int64_t n, float* out,
                            bool accumulate) {
  constexpr int64_t ROWS = NV * LANES, LINE_BYTES = ROWS * sizeof(float);
  static_assert(TILE == 16 && LANES == 16 && NV <= 3);
  std::atomic_signal_fence(std::memory_order_seq_cst);
  if (accumulate) {
    _tile_loadd(0, out, LINE_BYTES);
    if constexpr (NV > 1) _tile_loadd(1, out + LANES, LINE_BYTES);
    if constexpr (NV > 2) _tile_loadd(2, out + 2 * LANES, LINE_BYTES);
  } else {
    _tile_zero(0);
    if constexpr (NV > 1) _tile_zero(1);
    if constexpr (NV > 2) _tile_zero(2);
  }
  for (int64_t k = 0; k < n; k += TILE_NUMBERS, a += TILE_NUMBERS * NUMBER) {
    const float* lines = b + k * ROWS;
    _tile_loadd(3, a, row * NUMBER);
    _tile_loadd(4, lines, LINE_BYTES);
    _tile_dpbf16ps(0, 3, 4);
    if constexpr (NV > 1) {
      _tile_loadd(5, lines + LANES, LINE_BYTES);
      _tile_dpbf16ps(1, 3, 5);
    }
    if constexpr (NV > 2) {
      _tile_loadd(6, lines + 2 * LANES, LINE_BYTES);
      _tile_dpbf16ps(2, 3, 6);
    }
  }
  _tile_stored(0, out, LINE_BYTES);
  if constexpr (NV > 1) _tile_stored(1, out + LANES, LINE_BYTES);
  if constexpr (NV > 2) _tile_stored(2, out + 2 * LANES, LINE_BYTES);
  std::atomic_signal_fence(std::memory_order_seq_cst);
}

// A row's numbers are neighbours here. What fills no tile goes through the vectors.
template <int NV>
SPF_INLINE void product(const char* a, Strides a_at, const float* b, int64_t n, float* out,
                        bool accumulate) {
  constexpr int ROWS = NV * LANES, M = 8;  // as many rows as the vectors' registers hold sums of
  const int64_t in_tiles = n - n % TILE_NUMBERS;
  if (in_tiles) matrix_tile<NV>(a, a_at.row, b, in_tiles, out, accumulate);
  if (in_tiles == n) return;
  for (int i = 0; i < TILE; i += M)
    register_tile<M, NV>(a + (i * a_at.row + in_tiles) * NUMBER, a_at, b + in_tiles * ROWS,
                         n - in_tiles, out + i * ROWS, accumulate || in_tiles);
}
