// The operands of the products in bf16: pairs of neighbours, in the four bytes of one fp32. The
// head is read as it lies in memory.

constexpr int DEPTH = 2;

SPF_INLINE vf broadcast_number(const char* p) {
  int32_t bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return bits_to_float(bits - vi{});
}

// sum + a.first * b.first + a.second * b.second
SPF_INLINE vf multiply_add(vf a, vf b, vf sum) {
#if SPF_EMULATED
  const auto first = [](vf x) { return bits_to_float((vi)x << 16); };
  const auto second = [](vf x) { return bits_to_float((vi)x & int32_t(0xffff0000)); };
  return fma(first(a), first(b), fma(second(a), second(b), sum));
#else
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
#endif
}

SPF_INLINE float pair(uint16_t first, uint16_t second) {
  const uint32_t bits = first | uint32_t(second) << 16;
  float out;
  __builtin_memcpy(&out, &bits, sizeof out);
  return out;
}

// The pair of a row that begins at d. That which an odd width cuts short ends with a zero.
SPF_INLINE float pair_at(const uint16_t* row, int64_t d, int64_t D) {
  return pair(row[d], d + 1 < D ? row[d + 1] : uint16_t(0));
}

// The nearest bf16, ties to even, in the lower half of each lane. NaN stays NaN.
SPF_INLINE vu to_bf16(vf x) {
  const vu bits = (vu)x, rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return (vu)(x == x ? (vi)rounded : vi{} + 0x7fc0);
}

// A row of hidden states: its pairs to out[0], out[stride] and so on. first: its first element
static void scatter_row(const void* hidden, Dtype, int64_t first, int64_t D, int64_t stride,
                        float* out) {
  const uint16_t* row = static_cast<const uint16_t*>(hidden) + first;
  for (int64_t d = 0; d < D; d += 2) out[d / 2 * stride] = pair_at(row, d, D);
}

// Floats that a row of the head takes where the products cannot read it as it lies in memory: a row
// of odd width ends amid a pair.
SPF_INLINE int64_t copied_floats(Dtype, int64_t D) { return D % 2 ? (D + 1) / 2 : 0; }

// n rows of the head: as they lie, or padded with a zero in `copy`.
static const char* head_rows(const void* head, Dtype, int64_t first, int64_t n, int64_t D,
                             float* copy) {
  const uint16_t* w = static_cast<const uint16_t*>(head) + first * D;
  if (D % 2 == 0) return reinterpret_cast<const char*>(w);
  for (int64_t v = 0; v < n; v++, w += D)
    for (int64_t d = 0; d < D; d += 2) *copy++ = pair_at(w, d, D);
  return reinterpret_cast<const char*>(copy - n * ((D + 1) / 2));
}

// [n, D] -> tiles of columns [ceil(D / TILE)][ceil(n / 2)][TILE], each number one column of two
// rows, so that the gradient's broadcasts are contiguous; [TILE][ceil(n / 2)] for AMX, which reads
// whole rows. Padded with zeros.
SPF_INLINE Strides packed_at([[maybe_unused]] int64_t n) {
#if SPF_AMX
  return {(n + 1) / 2, 1};
#else
  return {1, TILE};
#endif
}
static void pack_columns(const char* rows, int64_t n, int64_t D, float* packed) {
  const int64_t row = (D + 1) / 2 * NUMBER;
  const Strides at = packed_at(n);
  const std::vector<char> zeros(n % 2 ? row : 0);
  for (int64_t v = 0; v < n; v += 2, rows += 2 * row) {
    const char* next = v + 1 < n ? rows + row : zeros.data();
    auto column = [&](int64_t d) {
      uint16_t first, second;
      __builtin_memcpy(&first, rows + d * sizeof first, sizeof first);
      __builtin_memcpy(&second, next + d * sizeof second, sizeof second);
      return pair(first, second);
    };
    float* out = packed + v / 2 * at.column;
    int64_t d = 0;
    for (; d + TILE <= D; d += TILE, out += (n + 1) / 2 * TILE)
      for (int64_t i = 0; i < TILE; i++) out[i * at.row] = column(d + i);
    if (d < D)
      for (int64_t i = 0; i < TILE; i++) out[i * at.row] = d + i < D ? column(d + i) : 0.0f;
  }
}

// A tile [n, ROWS] that is multiplied back becomes pairs of its rows [ceil(n / 2), ROWS], in its
// place. It is rounded here and not before: what it holds is already the difference.
template <int NV>
SPF_INLINE void to_operand(float* tile, int64_t n) {
  constexpr int ROWS = NV * LANES;
  for (int64_t v = 0; v < n; v += 2)
    for (int64_t i = 0; i < ROWS; i += LANES) {
      const vu first = to_bf16(load(tile + v * ROWS + i));
      const vu second = v + 1 < n ? to_bf16(load(tile + (v + 1) * ROWS + i)) : vu{};
      store(tile + v / 2 * ROWS + i, (vf)(first | second << 16));
    }
}
