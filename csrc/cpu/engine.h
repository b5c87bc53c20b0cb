// The engine: chunks of rows go over the head, in one sweep or in several.
//
// Legend: T tokens, D hidden width, V vocabulary, ROWS rows of a panel, SEGMENTS parts of V.
//
// One stream of logits (NLL, KL from a sketch) takes one sweep, on line as in flash attention:
//
//   tile of logits -> running max and sum of every row,
//                     tile of e^(z - max) -> added to the gradient
//
// where max is the row's largest logit so far; when it rises, what was added shrinks. Nothing is
// kept. With a teacher beside it q - p must be taken before it is rounded, and so both sums
// be known first:
//
//   sweep 1   tiles of logits -> running max and sum of every row      (kept, of some blocks)
//   sweep 2   tiles of logits -> sums of value and slope               (divergences that need them)
//   sweep 3   tiles of logits -> tile of dz -> added to the gradient   (before the tile leaves
//                                                                       the cache)
//
// Work is divided by the vocabulary as well as by rows, so that sixteen tokens keep all cores busy.
// Each segment has sums of its own, added in order at the end: no result depends on the threads.

#include "simd.h"
#include "products.h"
#include "tiles.h"
#include "layout.h"
#include "entries.h"

// BLOCK entries of the vocabulary, as the products read them, and the next ones in memory.
struct Block {
  int64_t first, n;
  const char* weight[2];
  const float* bias[2];
  Ahead ahead[2];
};

class Chunk {
 public:
  Chunk(const TokenLoss& p, const Layout& at, ParallelFor parallel, int64_t start)
      : p(p), at(at), parallel(parallel), start(start), count(std::min(p.rows, p.T - start)),
        panels((count + PANEL - 1) / PANEL), transform{p.softcap, p.logit_scale, p.temperature},
        online(p.dhidden && p.streams == 1 && !p.label_smoothing),
        measured_early(p.streams == 2 && (p.beta != 0.0 || !p.dhidden)), mixture(p.beta),
        entries(p, start, count) {}

  void run() {
    load_hidden();
    if (online) {
      sweep([this](auto nv, auto&... tile) { statistics_and_gradient<nv()>(tile...); }, true);
      finish_softmax();
      finish_online_gradient();
      return finish_loss();
    }
    sweep([this](auto nv, auto&... tile) { statistics<nv()>(tile...); });
    finish_softmax();
    if (measured_early) {
      sweep([this](auto nv, auto&... tile) { measure<nv()>(tile...); });
      finish_slopes();
    }
    if (p.dhidden) {
      sweep([this](auto nv, auto&... tile) { gradient<nv()>(tile...); }, true);
      finish_gradient();
      if (p.streams == 2 && !measured_early) balance_slopes();
    }
    finish_loss();
  }

 private:
  const TokenLoss& p;
  const Layout& at;
  const ParallelFor parallel;
  const int64_t start, count, panels;  // rows [start, start + count) of the call
  const Transform transform;
  const bool online;          // one sweep does everything
  const bool measured_early;  // values and slope sums have a sweep of their own
  const Mixture mixture;
  Entries entries;

  int vectors(int64_t panel) const {
    const int64_t rows = std::min<int64_t>(PANEL, count - panel * PANEL);
    return int((rows + LANES - 1) / LANES);
  }

  // Calls body(integral_constant<NV>) with the panel's number of vectors.
  template <class Body>
  void with_vectors(int64_t panel, const Body& body) const {
    switch (vectors(panel)) {
      case 1: return body(std::integral_constant<int, 1>());
      case 2: return body(std::integral_constant<int, 2>());
      default: return body(std::integral_constant<int, 3>());
    }
  }

  // Rows to lanes: hidden [numbers(D), ROWS] of every panel. Lanes without a row are zero.
  void load_hidden() {
    for (int s = 0; s < p.streams; s++) {
      const int64_t D = p.heads[s].D;
      parallel(panels, p.threads, [&](int64_t panel, int) {
        const int64_t lanes = vectors(panel) * LANES;
        float* out = at.hidden[s] + panel * PANEL * numbers(D);
        std::fill_n(out, lanes * numbers(D), 0.0f);
        for (int64_t r = panel * PANEL; r < std::min(count, (panel + 1) * PANEL); r++)
          scatter_row(p.heads[s].hidden, p.dtype, (start + r) * D, D, lanes,
                      out + r - panel * PANEL);
      });
    }
    for (int s = 0; s < p.streams; s++) at.softmax[s].clear(SEGMENTS * p.rows);
    at.peak.clear(SEGMENTS * p.rows);
    std::fill_n(at.value, SEGMENTS * p.rows, 0.0f);
    std::fill_n(at.slope, SEGMENTS * p.rows, 0.0f);
    if (p.dhidden) std::fill_n(at.dh, SEGMENTS * at.dh_stride(), 0.0f);
  }

  // Every block of the vocabulary with every panel: body(NV, segment, block, panel, scratch).
  template <class Body>
  void sweep(const Body& body, bool packed = false) const {
    const int64_t blocks = (p.V + BLOCK - 1) / BLOCK;
    const int64_t groups = std::min<int64_t>(panels, (4 * p.threads + SEGMENTS - 1) / SEGMENTS);
    parallel(SEGMENTS * groups, p.threads, [&](int64_t task, int thread) {
      const int64_t segment = task % SEGMENTS, group = task / SEGMENTS;
      const Layout::Scratch scratch = at.scratch(thread);
      [[maybe_unused]] const ProductRegisters registers;
      for (int64_t b = blocks * segment / SEGMENTS; b < blocks * (segment + 1) / SEGMENTS; b++) {
        Block block = load_block(b * BLOCK, scratch);
        if (packed) pack_columns(block.weight[0], block.n, p.heads[0].D, scratch.packed);
        for (int64_t panel = panels * group / groups; panel < panels * (group + 1) / groups;
             panel++)
          with_vectors(panel, [&](auto nv) { body(nv, segment, block, panel, scratch); });
      }
    });
  }

  Block load_block(int64_t first, const Layout::Scratch& scratch) const {
    const int64_t next = first + BLOCK, size = p.dtype == Dtype::f32 ? 4 : 2;
    Block block{first, std::min(BLOCK, p.V - first), {}, {}, {}};
    for (int s = 0; s < p.streams; s++) {
      const Head& head = p.heads[s];
      if (s == 1 && head.weight == p.heads[0].weight && head.bias == p.heads[0].bias) {
        block.weight[1] = block.weight[0], block.bias[1] = block.bias[0];
        continue;
      }
      block.weight[s] =
          head_rows(head.weight, p.dtype, first, block.n, head.D, scratch.head_rows[s]);
      if (next < p.V)
        block.ahead[s] = {static_cast<const char*>(head.weight) + next * head.D * size,
                          std::min(BLOCK, p.V - next) * head.D * size};
      if (head.bias) {
        to_float(head.bias, p.dtype, first, block.n, scratch.bias[s]);
        block.bias[s] = scratch.bias[s];
      }
    }
    return block;
  }

  template <int NV>
  void logits(int s, Block& block, int64_t panel, float* z) const {
    const int64_t D = p.heads[s].D;
    logits_tile<NV>(block.weight[s], block.n, at.hidden[s] + panel * PANEL * numbers(D), D, z,
                    block.ahead[s]);
    transform.template apply<NV>(z, block.n, block.bias[s]);
  }

  float* stored_tile(int s, int64_t lanes, const Block& block, int64_t panel) const {
    float* of_panel = at.stored + s * at.stored_stride() + panel * PANEL * at.stored_entries();
    return of_panel + at.stored_before(block.first) * lanes;
  }

  // The tile's logits in a later sweep: kept from the first, or computed once more.
  template <int NV>
  const float* again(int s, Block& block, int64_t panel, const Layout::Scratch& scratch) const {
    if (at.is_stored(block.first)) return stored_tile(s, NV * LANES, block, panel);
    logits<NV>(s, block, panel, scratch.z[s]);
    return scratch.z[s];
  }

  // Calls body(row, position in the tile) for each row of the panel whose target lies in the block.
  template <int NV, class Body>
  void targets(const Block& block, int64_t panel, const Body& body) const {
    if (!p.targets) return;
    for (int64_t lane = 0; lane < NV * LANES && panel * PANEL + lane < count; lane++) {
      const int64_t row = panel * PANEL + lane, v = p.targets[start + row] - block.first;
      if (v >= 0 && v < block.n) body(row, v * NV * LANES + lane);
    }
  }

  template <int NV>
  static int64_t position(const Block& block, int64_t panel, const Entry& entry) {
    return (entry.v - block.first) * NV * LANES + entry.row - panel * PANEL;
  }

  Rows rows(int64_t panel) const { return at.rows.from(panel * PANEL); }

  // The one sweep. The target and the other entries of its distribution are left out of the
  // gradient: their q - mass is added when q is known, as one difference.
  template <int NV>
  void statistics_and_gradient(int64_t segment, Block& block, int64_t panel,
                               const Layout::Scratch& scratch) {
    const int64_t D = p.heads[0].D, first = segment * p.rows + panel * PANEL;
    float *z = scratch.z[0], *dz = scratch.dz, *z_target = at.z_target[0];
    logits<NV>(0, block, panel, z);
    targets<NV>(block, panel, [&](int64_t row, int64_t i) { z_target[row] = z[i], z[i] = -INF; });
    const auto shrinkage =
        at.softmax[0].from(first).add<NV>(z, block.n, [&](int64_t i, vf e) { store(dz + i, e); });
    targets<NV>(block, panel, [&](int64_t row, int64_t i) { z[i] = z_target[row]; });
    entries.within(panel, block.first, block.n, [&](Entry& entry) {
      const int64_t i = position<NV>(block, panel, entry);
      entry.z = z[i], dz[i] = 0.0f;
    });
    transform.template chain<NV>(z, block.n, dz);
    float* dh = at.dh + gradient_offset(segment, panel);
    shrinkage.apply(dh, D);
    to_operand<NV>(dz, block.n);
    gradient_tile<NV>(scratch.packed, block.n, dz, D, dh, block.ahead[0]);
  }

  // Sweep 1. The target is left out of the sums, so that 1 - q_target never has to be a difference;
  // of the teacher's too, so that equal logits have equal normalisers.
  template <int NV>
  void statistics(int64_t segment, Block& block, int64_t panel, const Layout::Scratch& scratch) {
    const int64_t first = segment * p.rows + panel * PANEL;
    float* z[2] = {};
    for (int s = 0; s < p.streams; s++) {
      z[s] = at.is_stored(block.first) ? stored_tile(s, NV * LANES, block, panel) : scratch.z[s];
      logits<NV>(s, block, panel, z[s]);
    }
    // forward KL needs it only where balance_slopes does
    if (p.streams == 2 && (p.dhidden || p.beta != 0.0))
      at.peak.from(first).add<NV>(z[0], z[1], block.first, block.n);
    if (p.label_smoothing) at.softmax[0].from(first).add_total<NV>(z[0], block.n);
    entries.within(panel, block.first, block.n,
                   [&](Entry& entry) { entry.z = z[0][position<NV>(block, panel, entry)]; });
    for (int s = 0; s < p.streams; s++) {
      float* z_target = at.z_target[s];
      targets<NV>(block, panel,
                  [&](int64_t row, int64_t i) { z_target[row] = z[s][i], z[s][i] = -INF; });
      at.softmax[s].from(first).add<NV>(z[s], block.n);
      targets<NV>(block, panel, [&](int64_t row, int64_t i) { z[s][i] = z_target[row]; });
    }
  }

  // Sweep 2.
  template <int NV>
  void measure(int64_t segment, Block& block, int64_t panel, const Layout::Scratch& scratch) const {
    const float *z = again<NV>(0, block, panel, scratch),
                *z_teacher = again<NV>(1, block, panel, scratch);
    const int64_t first = segment * p.rows + panel * PANEL;
    with_divergence([&](auto divergence) {
      divergence_sums<NV, decltype(divergence)>(z, z_teacher, block.n, rows(panel), mixture,
                                                at.value + first, at.slope + first);
    });
  }

  // Sweep 3.
  template <int NV>
  void gradient(int64_t segment, Block& block, int64_t panel, const Layout::Scratch& scratch) {
    const int64_t D = p.heads[0].D, first = segment * p.rows + panel * PANEL;
    const float* z = again<NV>(0, block, panel, scratch);
    float* dz = scratch.dz;
    if (p.targets) {
      const float weight = float(1.0 - p.alpha), uniform = p.label_smoothing / p.V;
      softmax_gradient<NV>(z, block.n, rows(panel), weight, uniform, dz);
      targets<NV>(block, panel,
                  [&](int64_t row, int64_t i) { dz[i] = weight * (at.dz_target[row] - uniform); });
      entries.within(panel, block.first, block.n, [&](Entry& entry) {
        dz[position<NV>(block, panel, entry)] -= weight * entry.mass;
      });
    }
    if (p.streams == 2) {
      const float* z_teacher = again<NV>(1, block, panel, scratch);
      with_divergence([&](auto divergence) {
        if (!measured_early)
          divergence_sums<NV, decltype(divergence)>(z, z_teacher, block.n, rows(panel), mixture,
                                                    at.value + first, at.slope + first);
        divergence_gradient<NV, decltype(divergence)>(z, z_teacher, block.n, rows(panel), mixture,
                                                      float(p.alpha), p.targets, dz);
      });
    }
    transform.template chain<NV>(z, block.n, dz);
    to_operand<NV>(dz, block.n);
    gradient_tile<NV>(scratch.packed, block.n, dz, D, at.dh + gradient_offset(segment, panel),
                      block.ahead[0]);
  }

  template <class Body>
  void with_divergence(const Body& body) const {
    if (p.beta == 0.0) return body(ForwardKL());
    if (p.beta == 1.0) return body(ReverseKL());
    return body(JensenShannon());
  }

  int64_t gradient_offset(int64_t segment, int64_t panel) const {
    return segment * at.dh_stride() + panel * PANEL * round_up(p.heads[0].D, TILE);
  }

  float largest(const Softmax& sums, int64_t row) const {
    float top = -INF;
    for (int64_t s = 0; s < SEGMENTS; s++) top = std::max(top, sums.top[s * p.rows + row]);
    return top;
  }

  // dz = slope - q * sum of slopes, and forward KL's slopes sum to zero but for rounding. What
  // rounding left is known only now: it is taken off at the largest q, which is most of it in a
  // confident row.
  void balance_slopes() const {
    parallel(panels, p.threads, [&](int64_t panel, int) {
      std::vector<float> row_of_head(p.heads[0].D);
      for (int64_t row = panel * PANEL; row < std::min(count, (panel + 1) * PANEL); row++) {
        const float z = at.rows.peak.z[row];
        const double slope = -p.alpha * over_segments(at.slope, row) * probability(z, row);
        add_entry(row, at.rows.peak.entry[row], slope * transform.slope(z), row_of_head);
      }
    });
  }

  // logsumexp over the segments, in double; -inf where the row has nothing but -inf.
  double logsumexp(const Softmax& sums, int64_t row) const {
    const float largest_z = largest(sums, row), top = largest_z == -INF ? 0.0f : largest_z;
    double sum = 0.0;
    for (int64_t s = 0; s < SEGMENTS; s++)
      sum += sums.sum[s * p.rows + row] * std::exp(double(sums.top[s * p.rows + row]) - top);
    return top + std::log(sum);
  }

  // log(e^a + e^b); NaN where neither is finite
  static double logaddexp(double a, double b) {
    return a > b ? a + std::log1p(std::exp(b - a)) : b + std::log1p(std::exp(a - b));
  }

  double over_segments(const float* sums, int64_t row) const {
    double sum = 0.0;
    for (int64_t s = 0; s < SEGMENTS; s++) sum += sums[s * p.rows + row];
    return sum;
  }

  void finish_softmax() const {
    // Of a distribution on several entries: what lies outside the first, and what that adds to the
    // loss. All is measured from z_target: what the teacher is sure of is exact.
    std::vector<double> rest(count, p.label_smoothing), more(count, 0.0);
    for (int64_t row = 0; row < count && p.masses; row++) {
      const double tail = p.masses[(start + row) * (1 + p.K)];
      rest[row] += tail, more[row] = tail * at.z_target[0][row];
    }
    entries.each([&](const Entry& entry) {
      rest[entry.row] += entry.mass;
      more[entry.row] -= entry.mass * (double(entry.z) - at.z_target[0][entry.row]);
    });
    for (int64_t row = 0; row < round_up(count, LANES); row++) {
      for (int s = 0; s < p.streams; s++) {
        double lse = logsumexp(at.softmax[s], row);
        float top = largest(at.softmax[s], row);
        if (p.targets && row < count) {
          const double z = at.z_target[s][row], others = lse;
          top = std::max(top, at.z_target[s][row]);
          lse = logaddexp(others, z);
          if (s == 0) finish_nll(row, z, others, lse, rest[row], more[row]);
        }
        const Normaliser& softmax = s == 0 ? at.rows.q : at.rows.p;
        softmax.top[row] = top, softmax.log_sum[row] = float(lse - top);
      }
      find_peak(row);
      at.rows.slope_sum[row] = 0.0f;  // forward KL's slopes sum to zero; the others' follow
    }
  }

  // z: the target's logit; others: logsumexp without it
  void finish_nll(int64_t row, double z, double others, double lse, double rest,
                  double more) const {
    // of all others against the target; NaN where the row has no finite normaliser
    const double odds = others - z + (lse - lse);
    const double nll = logaddexp(odds, 0.0);
    const double missing = 1.0 / (1.0 + std::exp(-odds));  // 1 - q_target
    at.dz_target[row] = float(rest - missing);
    double loss = (1.0 - p.label_smoothing) * nll;
    if (p.label_smoothing)
      loss += p.label_smoothing * (lse - over_segments(at.softmax[0].total, row) / p.V);
    at.nll[row] = float(z == -INF ? odds : loss + more);
  }

  void find_peak(int64_t row) const {
    int64_t best = row;
    for (int64_t s = 1; s < SEGMENTS; s++)
      if (at.peak.z[s * p.rows + row] > at.peak.z[best]) best = s * p.rows + row;
    at.rows.peak.z[row] = at.peak.z[best];
    at.rows.peak.z_teacher[row] = at.peak.z_teacher[best];
    at.rows.peak.entry[row] = at.peak.entry[best];
  }

  void finish_slopes() const {
    for (int64_t row = 0; row < count; row++)
      at.rows.slope_sum[row] = float(over_segments(at.slope, row));
  }

  void finish_loss() const {
    for (int64_t row = 0; row < count; row++) {
      double loss = 0.0;
      if (p.targets) loss += (1.0 - p.alpha) * at.nll[row];
      if (p.streams == 2) loss += p.alpha * over_segments(at.value, row);
      p.loss[start + row] = float(loss);
    }
  }

  void finish_gradient() const {
    parallel(panels, p.threads, [&](int64_t panel, int) {
      add_segments(panel, [](int64_t, int64_t) { return 1.0f; });
    });
  }

  // A segment's sum of e^(z - top) W, times e^(top - lse), is one of q W.
  void finish_online_gradient() const {
    const double weight = 1.0 - p.alpha;
    parallel(panels, p.threads, [&](int64_t panel, int) {
      add_segments(panel, [&](int64_t segment, int64_t row) {
        return float(weight * probability(at.softmax[0].top[segment * p.rows + row], row));
      });
      std::vector<float> row_of_head(p.heads[0].D);
      for (int64_t row = panel * PANEL; row < std::min(count, (panel + 1) * PANEL); row++)
        add_entry(row, p.targets[start + row],
                  weight * at.dz_target[row] * transform.slope(at.z_target[0][row]), row_of_head);
      for (const Entry& entry : entries.of(panel))
        add_entry(
            entry.row, entry.v,
            weight * (probability(entry.z, entry.row) - entry.mass) * transform.slope(entry.z),
            row_of_head);
    });
  }

  // q of a logit of the row
  double probability(float z, int64_t row) const {
    return std::exp((double(z) - at.rows.q.top[row]) - at.rows.q.log_sum[row]);
  }

  // dhidden += dz W_v
  void add_entry(int64_t row, int64_t v, double dz, std::vector<float>& row_of_head) const {
    const int64_t D = p.heads[0].D;
    to_float(p.heads[0].weight, p.dtype, v * D, D, row_of_head.data());
    for (int64_t d = 0; d < D; d++) p.dhidden[(start + row) * D + d] += float(dz) * row_of_head[d];
  }

  // The segments' gradients in order, each times scale(segment, row), and back from lanes to rows.
  template <class Scale>
  void add_segments(int64_t panel, const Scale& scale) const {
    const int64_t D = p.heads[0].D, lanes = vectors(panel) * LANES, first = panel * PANEL;
    const int64_t here = std::min(lanes, count - first);
    float factor[SEGMENTS][PANEL];
    for (int64_t s = 0; s < SEGMENTS; s++)
      for (int64_t lane = 0; lane < here; lane++) factor[s][lane] = scale(s, first + lane);
    for (int64_t d = 0; d < D; d++)
      for (int64_t lane = 0; lane < here; lane++) {
        float sum = 0.0f;
        for (int64_t s = 0; s < SEGMENTS; s++)
          sum += factor[s][lane] * at.dh[gradient_offset(s, panel) + d * lanes + lane];
        p.dhidden[(start + first + lane) * D + d] = sum;
      }
  }
};

static int64_t workspace_floats(const TokenLoss& p) { return Layout(p, nullptr).size; }

static void run(const TokenLoss& p, ParallelFor parallel) {
  const Layout layout(p, p.workspace);
  expect_to_fill(layout.stored, p.streams * layout.stored_stride() * sizeof(float));
  for (int64_t start = 0; start < p.T; start += p.rows) Chunk(p, layout, parallel, start).run();
}
