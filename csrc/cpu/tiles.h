// What happens to a tile of logits: the transform, softmax statistics, values and gradients.
//
// A tile is z [n, ROWS]: n vocabulary entries by NV vectors of rows. Statistics: one number a row.

struct Transform {
  float softcap, scale, temperature;

  // z = softcap * tanh(scale * (raw + bias) / softcap) / temperature
  template <int NV>
  void apply(float* z, int64_t n, const float* bias) const {
    constexpr int ROWS = NV * LANES;
    if (!softcap && !bias && scale == 1.0f && temperature == 1.0f) return;
    for (int64_t v = 0; v < n; v++)
      for (int j = 0; j < NV; j++) {
        float* p = z + v * ROWS + j * LANES;
        vf x = (load(p) + (bias ? bias[v] : 0.0f)) * scale;
        if (softcap) x = softcap * tanh(x / softcap);
        store(p, x / temperature);
      }
  }

  // d z / d raw from the finished z, of one number or of a vector
  template <class Number>
  Number slope(Number z) const {
    Number capped = softcap ? z * (temperature / softcap) : Number{};
    return (scale / temperature) * (1.0f - capped * capped);
  }

  // dz becomes the gradient by the raw product
  template <int NV>
  void chain(const float* z, int64_t n, float* dz) const {
    if (!softcap && scale == temperature) return;
    for (int64_t i = 0; i < n * NV * LANES; i += LANES)
      store(dz + i, load(dz + i) * slope(load(z + i)));
  }
};

// By what a row's sums shrink when its top rises: 1 where it did not.
template <int NV>
struct Shrinkage {
  vf factor[NV];

  // x [n, ROWS]
  void apply(float* x, int64_t n) const {
    bool any = false;
    for (int j = 0; j < NV; j++)
      for (int lane = 0; lane < LANES; lane++) any = any || factor[j][lane] != 1.0f;
    if (!any) return;
    for (int64_t i = 0; i < n; i++)
      for (int j = 0; j < NV; j++, x += LANES) store(x, load(x) * factor[j]);
  }
};

// Running logsumexp of the rows of a panel: sum of e^(z - top) and top = max z; and the sum of z.
struct Softmax {
  float *top, *sum, *total;  // [ROWS] each

  void clear(int64_t rows) const {
    for (int64_t r = 0; r < rows; r++) top[r] = -INF, sum[r] = total[r] = 0.0f;
  }

  // Adds a tile. keep(position, e) is given e = e^(z - top) of every logit, the top of its own
  // row's so far; the result is the factor by which sums taken under the earlier tops have shrunk.
  template <int NV, class Keep>
  Shrinkage<NV> add(const float* z, int64_t n, const Keep& keep) const {
    constexpr int ROWS = NV * LANES;
    Shrinkage<NV> shrinkage;
    for (int j = 0; j < NV; j++) {
      const int64_t lane = j * LANES;
      vf old_top = load(top + lane), new_top = old_top;
      for (int64_t v = 0; v < n; v++) new_top = max(new_top, load(z + v * ROWS + lane));
      // a row that is -inf so far has no top to subtract
      const vf base = new_top == -INF ? broadcast(0.0f) : new_top;
      auto exponential = [&](int64_t v) {
        const vf e = exp(load(z + v * ROWS + lane) - base);
        keep(v * ROWS + lane, e);
        return e;
      };
      vf even = {}, odd = {};
      int64_t v = 0;
      for (; v + 2 <= n; v += 2) {
        even += exponential(v);
        odd += exponential(v + 1);
      }
      if (v < n) even += exponential(v);
      shrinkage.factor[j] = exp(old_top - base);
      store(top + lane, new_top);
      store(sum + lane, load(sum + lane) * shrinkage.factor[j] + (even + odd));
    }
    return shrinkage;
  }

  template <int NV>
  void add(const float* z, int64_t n) const {
    add<NV>(z, n, [](int64_t, vf) {});
  }

  template <int NV>
  void add_total(const float* z, int64_t n) const {
    for (int j = 0; j < NV; j++) {
      vf all = {};
      for (int64_t v = 0; v < n; v++) all += load(z + (v * NV + j) * LANES);
      store(total + j * LANES, load(total + j * LANES) + all);
    }
  }

  Softmax from(int64_t row) const { return {top + row, sum + row, total + row}; }
};

// Divergences of teacher p and student q, one vocabulary entry at a time; see
// softprompt_fast/backends/formulas.py. The slope may be shifted by any multiple of q. Where it is
// q * rate, taking off the rate of the student's most probable entry keeps a confident
// student from cancelling.
struct ValueSlope {
  vf value, slope;
};
constexpr float SMALL = 0.5f, RULED_OUT = 1.0f, FAR = 30.0f;

SPF_INLINE vf times(vf p, vf x) { return p == 0.0f ? broadcast(0.0f) : p * x; }

// The parts of teacher and student in the mixture m = p teacher + q student, from double: 1 - beta
// keeps its digits.
struct Mixture {
  float p, q, log_q, p_over_q;

  explicit Mixture(double beta)
      : p(float(beta)), q(float(1.0 - beta)), log_q(float(std::log1p(-beta))),
        p_over_q(float(beta / (1.0 - beta))) {}
};

// What is taken off the rates of a row, from d = log q - log p of the student's
// most probable entry.
struct Shift {
  vf rate;
  vi ruled_out;  // the teacher gives that entry much less probability
};

struct ForwardKL {
  SPF_INLINE Shift shift(vf, const Mixture&) { return {vf{}, vi{}}; }
  SPF_INLINE ValueSlope at(vf log_p, vf log_q, const Mixture&, const Shift&) {
    vf p = exp(log_p), q = exp(log_q), d = log_q - log_p;
    return {abs(d) < SMALL ? p * excess(d) : q - p - times(p, d), q - p};
  }
};

struct ReverseKL {
  SPF_INLINE Shift shift(vf d_peak, const Mixture&) { return {d_peak, vi{}}; }
  SPF_INLINE ValueSlope at(vf log_p, vf log_q, const Mixture&, const Shift& shift) {
    vf p = exp(log_p), q = exp(log_q), d = log_q - log_p;
    return {abs(d) < SMALL ? q * excess(-d) : p - q + times(q, d), times(q, d - shift.rate)};
  }
};

struct JensenShannon {
  struct Ratios {
    vf p, q;  // log(p / m), log(q / m)
    vf rate;  // log(q / m), but log(m.q * q / m) in a row that is ruled out: a small number there
  };
  SPF_INLINE Ratios over_mixture(vf d, const Mixture& m, vi ruled_out) {
    vf log_ratio = min(-d, broadcast(FAR)), ratio = exp(log_ratio);  // p / q
    // m / q - 1; where ruled out m / (m.q q) - 1
    vf above = ruled_out ? m.p_over_q * ratio : m.p * expm1(log_ratio);
    vf m_over_q = above < -0.5f ? log(m.q + m.p * ratio) : log1p(above);
    vf m_over_p = log(m.p + m.q * exp(d));
    vi near = d > -FAR;
    vf constant = ruled_out ? broadcast(m.log_q) : vf{};
    vf rate = near ? -m_over_q : d - m_over_p + constant;
    vf q = rate - constant;
    return {near ? q - d : -m_over_p, q, rate};
  }
  SPF_INLINE Shift shift(vf d_peak, const Mixture& m) {
    vi ruled_out = d_peak > RULED_OUT;
    return {over_mixture(d_peak, m, ruled_out).rate, ruled_out};
  }
  SPF_INLINE ValueSlope at(vf log_p, vf log_q, const Mixture& m, const Shift& shift) {
    vf p = exp(log_p), q = exp(log_q);
    Ratios over = over_mixture(log_q - log_p, m, shift.ruled_out);
    return {m.p * times(p, over.p) + m.q * times(q, over.q),
            m.q * times(q, over.rate - shift.rate)};
  }
};

// The student's largest logit in the rows of a panel, and the teacher's logit of the same entry.
struct Peak {
  float *z, *z_teacher;  // [ROWS]
  int32_t* entry;        // [ROWS]

  void clear(int64_t rows) const {
    for (int64_t r = 0; r < rows; r++) z[r] = z_teacher[r] = -INF, entry[r] = 0;
  }

  // tiles [n, ROWS] of the vocabulary's entries from `first` on
  template <int NV>
  void add(const float* tile, const float* teacher_tile, int64_t first, int64_t n) const {
    for (int j = 0; j < NV; j++) {
      vf best = load(z + j * LANES), teacher = load(z_teacher + j * LANES);
      vi where;
      __builtin_memcpy(&where, entry + j * LANES, sizeof where);
      for (int64_t v = 0; v < n; v++) {
        vf candidate = load(tile + (v * NV + j) * LANES);
        vi better = candidate > best;
        best = better ? candidate : best;
        teacher = better ? load(teacher_tile + (v * NV + j) * LANES) : teacher;
        where = better ? vi{} + int32_t(first + v) : where;
      }
      store(z + j * LANES, best);
      store(z_teacher + j * LANES, teacher);
      __builtin_memcpy(entry + j * LANES, &where, sizeof where);
    }
  }

  Peak from(int64_t row) const { return {z + row, z_teacher + row, entry + row}; }
};

// The logarithm of a row's softmax sum, as the largest logit and the rest: a difference z - top is
// exact where it matters, z - (top + log_sum) would be rounded to the size of the logits.
// [ROWS] each
struct Normaliser {
  float *top, *log_sum;

  Normaliser from(int64_t row) const { return {top + row, log_sum + row}; }
};

// log softmax of one vector of rows.
struct LogSoftmax {
  vf top, log_sum;

  LogSoftmax(const Normaliser& rows, int j)
      : top(load(rows.top + j * LANES)), log_sum(load(rows.log_sum + j * LANES)) {}
  inline __attribute__((always_inline)) vf operator()(vf z) const { return (z - top) - log_sum; }
};

// What the rows of a panel need while their gradient is formed.
struct Rows {
  Normaliser q, p;
  Peak peak;
  float* slope_sum;  // [ROWS]

  Rows from(int64_t row) const {
    return {q.from(row), p.from(row), peak.from(row), slope_sum + row};
  }
};

// The shift of one vector of rows, by the same arithmetic as in the tile: it cancels exactly.
template <class Divergence>
SPF_INLINE Shift peak_shift(const Rows& rows, const LogSoftmax& log_p, const LogSoftmax& log_q,
                            const Mixture& m, int j) {
  vf q = log_q(load(rows.peak.z + j * LANES)), p = log_p(load(rows.peak.z_teacher + j * LANES));
  return Divergence::shift(q - p, m);
}

// Sums of value and slope over the tile, added to value[ROWS] and slope[ROWS].
template <int NV, class Divergence>
static void divergence_sums(const float* z, const float* z_teacher, int64_t n, const Rows& rows,
                            const Mixture& m, float* value, float* slope) {
  constexpr int ROWS = NV * LANES;
  for (int j = 0; j < NV; j++) {
    const LogSoftmax log_q(rows.q, j), log_p(rows.p, j);
    const Shift shift = peak_shift<Divergence>(rows, log_p, log_q, m, j);
    vf values = {}, slopes = {};
    for (int64_t v = 0; v < n; v++) {
      const int64_t at = v * ROWS + j * LANES;
      ValueSlope f = Divergence::at(log_p(load(z_teacher + at)), log_q(load(z + at)), m, shift);
      values += f.value;
      slopes += f.slope;
    }
    store(value + j * LANES, load(value + j * LANES) + values);
    store(slope + j * LANES, load(slope + j * LANES) + slopes);
  }
}

// dz (+)= alpha * (slope - q * slope_sum).
template <int NV, class Divergence>
static void divergence_gradient(const float* z, const float* z_teacher, int64_t n, const Rows& rows,
                                const Mixture& m, float alpha, bool accumulate, float* dz) {
  constexpr int ROWS = NV * LANES;
  for (int j = 0; j < NV; j++) {
    const LogSoftmax log_q(rows.q, j), log_p(rows.p, j);
    const Shift shift = peak_shift<Divergence>(rows, log_p, log_q, m, j);
    vf slope_sum = load(rows.slope_sum + j * LANES);
    for (int64_t v = 0; v < n; v++) {
      const int64_t at = v * ROWS + j * LANES;
      vf student = log_q(load(z + at));
      ValueSlope f = Divergence::at(log_p(load(z_teacher + at)), student, m, shift);
      vf term = alpha * (f.slope - exp(student) * slope_sum);
      store(dz + at, accumulate ? load(dz + at) + term : term);
    }
  }
}

// dz = weight * (q - uniform).
template <int NV>
static void softmax_gradient(const float* z, int64_t n, const Rows& rows, float weight,
                             float uniform, float* dz) {
  constexpr int ROWS = NV * LANES;
  for (int j = 0; j < NV; j++) {
    const LogSoftmax log_q(rows.q, j);
    for (int64_t v = 0; v < n; v++) {
      const int64_t at = v * ROWS + j * LANES;
      store(dz + at, weight * (exp(log_q(load(z + at))) - uniform));
    }
  }
}
