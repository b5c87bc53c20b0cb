// The entries of a chunk's target distributions besides each row's first, by panel and in the
// vocabulary's order, so that a tile of logits finds its own by bisection.

struct Entry {
  int64_t v, row;  // in the vocabulary, in the chunk
  float mass, z;   // z is filled when the logits come by
};

class Entries {
 public:
  Entries(const TokenLoss& p, int64_t start, int64_t count) : panels((count + PANEL - 1) / PANEL) {
    if (!p.more_targets) return;
    for (int64_t row = 0; row < count; row++) {
      const float* masses = p.masses + (start + row) * (1 + p.K);
      for (int64_t k = 0; k < p.K; k++)
        if (masses[1 + k] > 0)
          panels[row / PANEL].push_back(
              {p.more_targets[(start + row) * p.K + k], row, masses[1 + k], 0.0f});
    }
    for (auto& panel : panels)
      std::sort(panel.begin(), panel.end(), [](const Entry& a, const Entry& b) {
        return a.v != b.v ? a.v < b.v : a.row < b.row;
      });
  }

  // Calls body(entry) for each entry of the panel in [first, first + n) of the vocabulary.
  template <class Body>
  void within(int64_t panel, int64_t first, int64_t n, const Body& body) {
    auto& entries = panels[panel];
    auto at = std::lower_bound(entries.begin(), entries.end(), first,
                               [](const Entry& entry, int64_t v) { return entry.v < v; });
    for (; at != entries.end() && at->v < first + n; ++at) body(*at);
  }

  template <class Body>
  void each(const Body& body) const {
    for (const auto& panel : panels)
      for (const Entry& entry : panel) body(entry);
  }

  const std::vector<Entry>& of(int64_t panel) const { return panels[panel]; }

 private:
  std::vector<std::vector<Entry>> panels;
};
