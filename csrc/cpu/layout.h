// Where the engine keeps what it writes beside loss and gradient: one block, planned once.
//
// Legend: D hidden width, V vocabulary, SEGMENTS parts of the vocabulary with sums of their own.

constexpr int64_t SEGMENTS = 8;

SPF_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Everything that the engine writes beside loss and gradient, in one block of memory.
class Layout {
 public:
  struct Scratch {  // of one thread
    float *z[2], *dz, *packed, *head_rows[2], *bias[2];
  };
  float *hidden[2], *stored, *dh;
  Softmax softmax[2];
  Peak peak;
  float *value, *slope, *z_target[2], *dz_target, *nll;
  Rows rows;
  int64_t size;

  Layout(const TokenLoss& p, float* base) : p(p) {
    Cursor at{base};
    const int64_t n = p.rows;
    stored = at.take(p.streams * stored_stride());
    for (int s = 0; s < p.streams; s++) {
      hidden[s] = at.take(lanes() * numbers(p.heads[s].D));
      softmax[s] = {at.take(SEGMENTS * n), at.take(SEGMENTS * n), at.take(SEGMENTS * n)};
      z_target[s] = at.take(n);
    }
    dh = at.take(p.dhidden ? SEGMENTS * dh_stride() : 0);
    value = at.take(SEGMENTS * n), slope = at.take(SEGMENTS * n);
    dz_target = at.take(n), nll = at.take(n);
    peak = {at.take(SEGMENTS * n), at.take(SEGMENTS * n), at.take_int(SEGMENTS * n)};
    rows = {{at.take(n), at.take(n)},
            {at.take(n), at.take(n)},
            {at.take(n), at.take(n), at.take_int(n)},
            at.take(n)};
    scratch_base = at.next;
    scratch_size = 0;
    scratch(0, &scratch_size);
    size = (scratch_base - base) + scratch_size * p.threads;
  }

  // What is large is kept of the rows that there are, not of whole panels.
  int64_t lanes() const { return round_up(std::min(p.rows, p.T), LANES); }
  // Logits of one stream.
  int64_t stored_stride() const { return lanes() * stored_entries(); }
  // Gradient of one segment.
  int64_t dh_stride() const { return lanes() * round_up(p.heads[0].D, TILE); }

  // Logits are kept of the first `stored` of every PERIOD blocks of the vocabulary: every segment
  // has its share.
  bool is_stored(int64_t v) const { return v / BLOCK % PERIOD < p.stored; }
  int64_t stored_entries() const { return stored_before(round_up(p.V, BLOCK)); }
  int64_t stored_before(int64_t v) const {  // v begins a block
    const int64_t block = v / BLOCK;
    return (block / PERIOD * p.stored + std::min<int64_t>(block % PERIOD, p.stored)) * BLOCK;
  }

  Scratch scratch(int thread, int64_t* taken = nullptr) const {
    Cursor at{scratch_base + scratch_size * thread};
    float* begin = at.next;
    Scratch out{};
    for (int s = 0; s < p.streams; s++) {
      out.z[s] = at.take(BLOCK * PANEL);
      out.bias[s] = at.take(BLOCK);
      out.head_rows[s] = at.take(BLOCK * copied_floats(p.dtype, p.heads[s].D));
    }
    out.dz = at.take(BLOCK * PANEL);
    out.packed = at.take(p.dhidden ? numbers(BLOCK) * round_up(p.heads[0].D, TILE) : 0);
    if (taken) *taken = at.next - begin;
    return out;
  }

 private:
  struct Cursor {
    float* next;
    float* take(int64_t n) {  // whole cache lines
      float* p = next;
      next += round_up(n, 16);
      return p;
    }
    int32_t* take_int(int64_t n) { return reinterpret_cast<int32_t*>(take(n)); }
  };
  const TokenLoss& p;
  float* scratch_base;
  int64_t scratch_size;
};
