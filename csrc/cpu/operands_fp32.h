// The operands of the products in fp32, whatever the dtype in memory.

constexpr int DEPTH = 1;

SPF_INLINE vf broadcast_number(const char* p) {
  float x;
  __builtin_memcpy(&x, p, sizeof x);
  return broadcast(x);
}
SPF_INLINE vf multiply_add(vf a, vf b, vf sum) { return fma(a, b, sum); }

// A row of hidden states: its numbers to out[0], out[stride] and so on. first: its first element
static void scatter_row(const void* hidden, Dtype dtype, int64_t first, int64_t D, int64_t stride,
                        float* out) {
  std::vector<float> row(D);
  to_float(hidden, dtype, first, D, row.data());
  for (int64_t d = 0; d < D; d++) out[d * stride] = row[d];
}

// Floats that a row of the head takes where the products cannot read it as it lies in memory.
SPF_INLINE int64_t copied_floats(Dtype dtype, int64_t D) { return dtype == Dtype::f32 ? 0 : D; }

// n rows of the head: as they lie, or in `copy`.
static const char* head_rows(const void* head, Dtype dtype, int64_t first, int64_t n, int64_t D,
                             float* copy) {
  if (dtype == Dtype::f32) return static_cast<const char*>(head) + first * D * sizeof(float);
  to_float(head, dtype, first * D, n * D, copy);
  return reinterpret_cast<const char*>(copy);
}

// [n, D] -> tiles of columns [ceil(D / TILE)][n][TILE], so that the gradient's broadcasts are
// contiguous; padded with zeros.
SPF_INLINE Strides packed_at(int64_t) { return {1, TILE}; }
static void pack_columns(const char* rows, int64_t n, int64_t D, float* packed) {
  const float* w = reinterpret_cast<const float*>(rows);
  for (int64_t v = 0; v < n; v++, w += D) {
    float* out = packed + v * TILE;
    int64_t d = 0;
    for (; d + TILE <= D; d += TILE, out += n * TILE)
      __builtin_memcpy(out, w + d, TILE * sizeof(float));
    if (d < D)
      for (int64_t i = 0; i < TILE; i++) out[i] = d + i < D ? w[d + i] : 0.0f;
  }
}

// A tile that is multiplied back becomes an operand, in its place.
template <int NV>
SPF_INLINE void to_operand(float*, int64_t) {}
