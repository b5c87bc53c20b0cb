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

// Value and slope of a divergence at one vocabulary entry; see softprompt_fast/divergences.py.
struct ValueSlope {
  vf value, slope;
};
constexpr float SMALL = 0.5f;

SPF_INLINE vf times(vf p, vf x) { return p == 0.0f ? broadcast(0.0f) : p * x; }

SPF_INLINE ValueSlope forward_kl(vf log_p, vf log_q, float) {
  vf p = exp(log_p), q = exp(log_q), d = log_q - log_p, g = excess(d);
  vi small = abs(d) < SMALL;
  return {small ? p * g : q - p - times(p, d), small ? p * (d + g) : q - p};
}

SPF_INLINE ValueSlope reverse_kl(vf log_p, vf log_q, float) {
  vf p = exp(log_p), q = exp(log_q), d = log_q - log_p, slope = times(q, d);
  return {abs(d) < SMALL ? q * excess(-d) : p - q + slope, slope};
}

SPF_INLINE ValueSlope jensen_shannon(vf log_p, vf log_q, float beta) {
  const vf zero = {};
  vf p = exp(log_p), q = exp(log_q), d = log_q - log_p;
  vf m_over_p = log1p((1.0f - beta) * expm1(min(d, zero)));
  vf m_over_q = log1p(beta * expm1(-max(d, zero)));
  vi p_larger = d <= 0.0f;
  vf p_over_m = p_larger ? -m_over_p : -m_over_q - d;
  vf q_over_m = p_larger ? d - m_over_p : -m_over_q;
  vf slope = (1.0f - beta) * times(q, q_over_m);
  vf small = beta * p * excess(-p_over_m) + (1.0f - beta) * q * excess(-q_over_m);
  return {abs(d) < SMALL ? small : beta * times(p, p_over_m) + slope, slope};
}

using Divergence = ValueSlope (*)(vf log_p, vf log_q, float beta);

// One row's numbers while its gradient is formed.    [ROWS] each
struct Rows {
  float *lse_q, *lse_p, *slope_sum;
};

// Sums of value and slope over the tile, added to value[ROWS] and slope[ROWS].
template <int NV, Divergence divergence>
static void divergence_sums(const float* z, const float* z_teacher, int64_t n, const Rows& rows,
                            float beta, float* value, float* slope) {
  constexpr int ROWS = NV * LANES;
  for (int j = 0; j < NV; j++) {
    vf lse_q = load(rows.lse_q + j * LANES), lse_p = load(rows.lse_p + j * LANES);
    vf values = {}, slopes = {};
    for (int64_t v = 0; v < n; v++) {
      const int64_t at = v * ROWS + j * LANES;
      ValueSlope f = divergence(load(z_teacher + at) - lse_p, load(z + at) - lse_q, beta);
      values += f.value;
      slopes += f.slope;
    }
    store(value + j * LANES, load(value + j * LANES) + values);
    store(slope + j * LANES, load(slope + j * LANES) + slopes);
  }
}

// dz (+)= alpha * (slope - q * slope_sum).
template <int NV, Divergence divergence>
static void divergence_gradient(const float* z, const float* z_teacher, int64_t n, const Rows& rows,
                                float beta, float alpha, bool accumulate, float* dz) {
  constexpr int ROWS = NV * LANES;
  for (int j = 0; j < NV; j++) {
    vf lse_q = load(rows.lse_q + j * LANES), lse_p = load(rows.lse_p + j * LANES);
    vf slope_sum = load(rows.slope_sum + j * LANES);
    for (int64_t v = 0; v < n; v++) {
      const int64_t at = v * ROWS + j * LANES;
      vf log_q = load(z + at) - lse_q;
      ValueSlope f = divergence(load(z_teacher + at) - lse_p, log_q, beta);
      vf term = alpha * (f.slope - exp(log_q) * slope_sum);
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
    vf lse = load(rows.lse_q + j * LANES);
    for (int64_t v = 0; v < n; v++) {
      const int64_t at = v * ROWS + j * LANES;
      store(dz + at, weight * (exp(load(z + at) - lse) - uniform));
    }
  }
}
