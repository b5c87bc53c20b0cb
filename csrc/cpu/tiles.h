// What happens to a tile of logits: the transform, running softmax statistics, values and gradients.
//
// A tile is z [n, ROWS]: n vocabulary entries by NV vectors of rows. Statistics are one number a row.

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

  // dz becomes the gradient by the raw product: times d z / d raw, from the finished z
  template <int NV>
  void chain(const float* z, int64_t n, float* dz) const {
    const float linear = scale / temperature;
    if (!softcap && linear == 1.0f) return;
    for (int64_t i = 0; i < n * NV * LANES; i += LANES) {
      vf slope = broadcast(linear);
      if (softcap) {
        vf capped = load(z + i) * (temperature / softcap);
        slope *= 1.0f - capped * capped;
      }
      store(dz + i, load(dz + i) * slope);
    }
  }
};

// Running logsumexp of the rows of a panel: sum of e^(z - top) and top = max z; and the plain sum of z.
struct Softmax {
  float *top, *sum, *total;  // [ROWS] each

  void clear(int64_t rows) const {
    for (int64_t r = 0; r < rows; r++) top[r] = -INF, sum[r] = total[r] = 0.0f;
  }

  template <int NV>
  void add(const float* z, int64_t n) const {
    constexpr int ROWS = NV * LANES;
    for (int j = 0; j < NV; j++, z += LANES) {
      vf old_top = load(top + j * LANES), new_top = old_top;
      for (int64_t v = 0; v < n; v++) new_top = max(new_top, load(z + v * ROWS));
      // a row that is -inf so far has no top to subtract
      vf base = new_top == -INF ? broadcast(0.0f) : new_top;
      vf even = {}, odd = {};
      int64_t v = 0;
      for (; v + 2 <= n; v += 2) {
        even += exp(load(z + v * ROWS) - base);
        odd += exp(load(z + (v + 1) * ROWS) - base);
      }
      if (v < n) even += exp(load(z + v * ROWS) - base);
      store(top + j * LANES, new_top);
      store(sum + j * LANES, load(sum + j * LANES) * exp(old_top - base) + (even + odd));
    }
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
// softprompt_fast/divergences.py. The slope may be shifted by any multiple of q. Where it is q * rate,
// taking off the rate of the student's most probable entry keeps a confident student from cancelling.
struct ValueSlope {
  vf value, slope;
};
constexpr float SMALL = 0.5f;

SPF_INLINE vf times(vf p, vf x) { return p == 0.0f ? broadcast(0.0f) : p * x; }

struct ForwardKL {
  SPF_INLINE vf rate(vf, vf, float) { return broadcast(0.0f); }
  SPF_INLINE ValueSlope at(vf log_p, vf log_q, float, vf) {
    vf p = exp(log_p), q = exp(log_q), d = log_q - log_p, g = excess(d);
    vi small = abs(d) < SMALL;
    return {small ? p * g : q - p - times(p, d), small ? p * (d + g) : q - p};
  }
};

struct ReverseKL {
  SPF_INLINE vf rate(vf log_p, vf log_q, float) { return log_q - log_p; }
  SPF_INLINE ValueSlope at(vf log_p, vf log_q, float beta, vf shift) {
    vf p = exp(log_p), q = exp(log_q), d = rate(log_p, log_q, beta);
    return {abs(d) < SMALL ? q * excess(-d) : p - q + times(q, d), times(q, d - shift)};
  }
};

struct JensenShannon {
  // log(p / m) and log(q / m): expm1 only sees arguments <= 0 and cannot overflow
  struct Ratios {
    vf p, q;
  };
  SPF_INLINE Ratios over_mixture(vf d, float beta) {
    const vf zero = {};
    vf m_over_p = log1p((1.0f - beta) * expm1(min(d, zero)));
    vf m_over_q = log1p(beta * expm1(-max(d, zero)));
    vi p_larger = d <= 0.0f;
    return {p_larger ? -m_over_p : -m_over_q - d, p_larger ? d - m_over_p : -m_over_q};
  }
  SPF_INLINE vf rate(vf log_p, vf log_q, float beta) {
    return (1.0f - beta) * over_mixture(log_q - log_p, beta).q;
  }
  SPF_INLINE ValueSlope at(vf log_p, vf log_q, float beta, vf shift) {
    vf p = exp(log_p), q = exp(log_q), d = log_q - log_p;
    Ratios log = over_mixture(d, beta);
    vf small = beta * p * excess(-log.p) + (1.0f - beta) * q * excess(-log.q);
    vf large = beta * times(p, log.p) + (1.0f - beta) * times(q, log.q);
    return {abs(d) < SMALL ? small : large, times(q, (1.0f - beta) * log.q - shift)};
  }
};

// The student's largest logit in the rows of a panel, and the teacher's logit of the same entry.
struct Peak {
  float *z, *z_teacher;  // [ROWS]

  void clear(int64_t rows) const {
    for (int64_t r = 0; r < rows; r++) z[r] = z_teacher[r] = -INF;
  }

  template <int NV>
  void add(const float* tile, const float* teacher_tile, int64_t n) const {
    for (int j = 0; j < NV; j++) {
      vf best = load(z + j * LANES), teacher = load(z_teacher + j * LANES);
      for (int64_t v = 0; v < n; v++) {
        vf candidate = load(tile + (v * NV + j) * LANES);
        vi better = candidate > best;
        best = better ? candidate : best;
        teacher = better ? load(teacher_tile + (v * NV + j) * LANES) : teacher;
      }
      store(z + j * LANES, best);
      store(z_teacher + j * LANES, teacher);
    }
  }

  Peak from(int64_t row) const { return {z + row, z_teacher + row}; }
};

// The logarithm of a row's softmax sum, as the largest logit and the rest: a difference z - top is exact
// where it matters, z - (top + log_sum) would be rounded to the size of the logits.    [ROWS] each
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

// The rate at the peaks of one vector of rows, by the same arithmetic as in the tile: it cancels exactly.
template <class Divergence>
SPF_INLINE vf peak_rate(const Rows& rows, const LogSoftmax& log_p, const LogSoftmax& log_q, float beta,
                        int j) {
  return Divergence::rate(log_p(load(rows.peak.z_teacher + j * LANES)),
                          log_q(load(rows.peak.z + j * LANES)), beta);
}

// Sums of value and slope over the tile, added to value[ROWS] and slope[ROWS].
template <int NV, class Divergence>
static void divergence_sums(const float* z, const float* z_teacher, int64_t n, const Rows& rows,
                            float beta, float* value, float* slope) {
  constexpr int ROWS = NV * LANES;
  for (int j = 0; j < NV; j++) {
    const LogSoftmax log_q(rows.q, j), log_p(rows.p, j);
    const vf shift = peak_rate<Divergence>(rows, log_p, log_q, beta, j);
    vf values = {}, slopes = {};
    for (int64_t v = 0; v < n; v++) {
      const int64_t at = v * ROWS + j * LANES;
      ValueSlope f = Divergence::at(log_p(load(z_teacher + at)), log_q(load(z + at)), beta, shift);
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
                                float beta, float alpha, bool accumulate, float* dz) {
  constexpr int ROWS = NV * LANES;
  for (int j = 0; j < NV; j++) {
    const LogSoftmax log_q(rows.q, j), log_p(rows.p, j);
    const vf shift = peak_rate<Divergence>(rows, log_p, log_q, beta, j);
    vf slope_sum = load(rows.slope_sum + j * LANES);
    for (int64_t v = 0; v < n; v++) {
      const int64_t at = v * ROWS + j * LANES;
      vf student = log_q(load(z + at));
      ValueSlope f = Divergence::at(log_p(load(z_teacher + at)), student, beta, shift);
      vf term = alpha * (f.slope - exp(student) * slope_sum);
      store(dz + at, accumulate ? load(dz + at) + term : term);
    }
  }
}

// dz = weight * (q - uniform).
template <int NV>
static void softmax_gradient(const float* z, int64_t n, const Rows& rows, float weight, float uniform,
                             float* dz) {
  constexpr int ROWS = NV * LANES;
  for (int j = 0; j < NV; j++) {
    const LogSoftmax log_q(rows.q, j);
    for (int64_t v = 0; v < n; v++) {
      const int64_t at = v * ROWS + j * LANES;
      store(dz + at, weight * (exp(log_q(load(z + at))) - uniform));
    }
  }
}
