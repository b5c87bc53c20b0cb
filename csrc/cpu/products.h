// The two matrix products of a tile: logits, and the gradient that goes back through the head.
//
// Operands come in numbers of four bytes: an fp32, or DEPTH = 2 neighbours in bf16, whose products
// are added in one instruction (operands_fp32.h, operands_bf16.h). Sums are fp32.
//
// A panel is NV vectors of rows (tokens): the rows lie in the SIMD lanes, the head's numbers are
// broadcast. So the head is read as it lies in memory, the softmax over the vocabulary needs no
// step across lanes, and a row's sums are taken in one fixed order whatever rows stand beside it.

constexpr int PANEL_VECTORS = 3;
constexpr int PANEL = PANEL_VECTORS * LANES;
// Rows of a register tile: TILE * PANEL_VECTORS accumulators fit the register file (32 or 16), or
// TILE rows one of AMX's. Vocabulary entries of a block, which stays in the second-level cache with
// its packed copy and the block that comes next; and the numbers of a slice of D, whose panel stays
// in the first. Each slice's sums begin anew, so that a logit's rounding error grows with D / SLICE
// and not with D. (AMX's sums go on, but each of its steps adds 32 products.)
#if SPF_AMX
constexpr int TILE = 16;
constexpr int64_t BLOCK = 64;
constexpr int64_t SLICE = 128;
#else
constexpr int TILE = SPF_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int64_t BLOCK = 48;
constexpr int64_t SLICE = 64;
#endif
constexpr int64_t LINE = 64;  // bytes of a line of the cache

SPF_INLINE float half_to_float(uint16_t h) {
  // subnormals as integers: floating-point tricks fail where the caller flushes subnormals to zero
  const float subnormal = float(h & 0x03ff) * 0x1p-24f;
  const uint32_t exponent = h & 0x7c00, sign = uint32_t(h & 0x8000) << 16;
  uint32_t bits =
      (uint32_t(h & 0x7fff) << 13) + (exponent == 0x7c00 ? (255 - 31) << 23 : (127 - 15) << 23);
  uint32_t small;
  __builtin_memcpy(&small, &subnormal, 4);
  bits = sign | (exponent ? bits : small);
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

// n numbers from element `first` of a matrix of any dtype, as fp32.
static void to_float(const void* source, Dtype dtype, int64_t first, int64_t n, float* out) {
  if (dtype == Dtype::f32) {
    __builtin_memcpy(out, static_cast<const float*>(source) + first, n * sizeof(float));
  } else if (dtype == Dtype::bf16) {
    const uint16_t* in = static_cast<const uint16_t*>(source) + first;
    for (int64_t i = 0; i < n; i++) {
      uint32_t bits = uint32_t(in[i]) << 16;
      __builtin_memcpy(out + i, &bits, 4);
    }
  } else {
    const uint16_t* in = static_cast<const uint16_t*>(source) + first;
    for (int64_t i = 0; i < n; i++) out[i] = half_to_float(in[i]);
  }
}

constexpr int64_t NUMBER = 4;  // bytes

// Numbers from one row of a matrix to the next, and from one column.
struct Strides {
  int64_t row, column;
};

#if SPF_BF16
#include "operands_bf16.h"
#else
#include "operands_fp32.h"
#endif

SPF_INLINE int64_t numbers(int64_t n) { return (n + DEPTH - 1) / DEPTH; }

// What is to come from memory, asked for a few lines at every register tile: the products hide the
// wait. The hardware does not foresee a product that walks over many rows at once.
struct Ahead {
  const char* at;
  int64_t left;  // bytes

  void fetch(int64_t bytes) {
    for (const int64_t stop = std::max<int64_t>(left - bytes, 0); left > stop;
         left -= LINE, at += LINE)
      __builtin_prefetch(at, 0, 2);
  }
};

// M rows of: out[v, :] (+)= sum over k in [0, n) of a[v, k] * b[k, :] in numbers.
template <int M, int NV>
SPF_INLINE void register_tile(const char* a, Strides a_at, const float* b, int64_t n, float* out,
                              bool accumulate) {
  constexpr int ROWS = NV * LANES;
  vf sum[M][NV] = {};
  for (int64_t k = 0; k < n; k++) {
    vf columns[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) columns[j] = load(b + k * ROWS + j * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
      vf factor = broadcast_number(a + (i * a_at.row + k * a_at.column) * NUMBER);
#pragma GCC unroll 8
      for (int j = 0; j < NV; j++) sum[i][j] = multiply_add(factor, columns[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; i++) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) {
      float* p = out + i * ROWS + j * LANES;
      store(p, accumulate ? load(p) + sum[i][j] : sum[i][j]);
    }
  }
}

// The same of TILE rows.
#if SPF_AMX
#include "matrix_tiles.h"
#else
struct ProductRegisters {};
template <int NV>
SPF_INLINE void product(const char* a, Strides a_at, const float* b, int64_t n, float* out,
                        bool accumulate) {
  register_tile<TILE, NV>(a, a_at, b, n, out, accumulate);
}
#endif

// z[v, :] = sum over d of w[v, d] * h[d, :] for v in [0, n).    w [n, D], h [numbers(D), ROWS]
template <int NV>
static void logits_tile(const char* w, int64_t n, const float* h, int64_t D, float* z,
                        Ahead& ahead) {
  constexpr int ROWS = NV * LANES;
  const Strides w_at{numbers(D), 1};
  auto row = [&](int64_t v, int64_t d) { return w + (v * w_at.row + d) * NUMBER; };
  for (int64_t d = 0; d < numbers(D); d += SLICE) {
    const int64_t width = std::min(numbers(D) - d, SLICE);
    int64_t v = 0;
    for (; v + TILE <= n; v += TILE) {
      ahead.fetch(TILE * SLICE * NUMBER);
      product<NV>(row(v, d), w_at, h + d * ROWS, width, z + v * ROWS, d > 0);
    }
    for (; v < n; v++)
      register_tile<1, NV>(row(v, d), w_at, h + d * ROWS, width, z + v * ROWS, d > 0);
  }
}

// dh[d, :] += sum over v in [0, n) of w[v, d] * dz[v, :].
// packed: by pack_columns, dz [numbers(n), ROWS], dh [padded D, ROWS]
template <int NV>
static void gradient_tile(const float* packed, int64_t n, const float* dz, int64_t D, float* dh,
                          Ahead& ahead) {
  constexpr int ROWS = NV * LANES;
  for (int64_t d = 0; d < D; d += TILE) {
    ahead.fetch(TILE * numbers(n) * NUMBER);
    const char* columns = reinterpret_cast<const char*>(packed + d * numbers(n));
    product<NV>(columns, packed_at(n), dz, numbers(n), dh + d * ROWS, true);
  }
}
