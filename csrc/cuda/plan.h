// How a row is divided over thread blocks, and what of it they hold in shared memory. Known from
// the sizes and the device alone: a row's result never depends on how many others there are.
#pragma once

#include <algorithm>
#include <cstdint>

namespace softprompt_fast::cuda {

constexpr int WARP = 32;
constexpr int MAX_THREADS = 1024;  // of a block
constexpr int MAX_BLOCKS = 8;      // of a cluster that any device takes
constexpr int OCTET = 8;           // entries a thread handles at once
constexpr int OCTET_BYTES = OCTET * sizeof(float);

struct Device {
  bool clusters;        // blocks that write each other's shared memory: sm_90 and later
  int64_t block_bytes;  // shared memory that one block may have
  int64_t multiprocessor_bytes;
  int64_t reserved_bytes;  // taken from the multiprocessor with each block
};

struct Plan {
  int blocks;        // of the cluster that works on a row
  int threads;       // of a block
  int slice;         // octets of the row in each block
  int held[2];       // of them in shared memory: student, teacher
  int shared_bytes;  // of a block: what is held, and `row_bytes`
};

// most_threads: for whose registers a multiprocessor has room without spilling, one block's or two
// blocks'. static_bytes: what the kernel itself takes of a block's shared memory. row_bytes: what
// it needs beside the logits.
inline Plan plan_rows(int64_t V, int streams, int most_threads, const Device& device,
                      int64_t static_bytes, int64_t row_bytes) {
  const int64_t octets = (V + OCTET - 1) / OCTET;
  // A block is one of two on a multiprocessor, so that one loads while the other computes; or
  // alone. Room in octets:
  enum { ALONE = 1, PAIRED = 2 };
  auto room = [&](int64_t bytes) {
    return std::max<int64_t>(0, (bytes - static_bytes - row_bytes) / OCTET_BYTES);
  };
  const int64_t alone = room(device.block_bytes);
  const int64_t paired =
      std::min(alone, room(device.multiprocessor_bytes / 2 - device.reserved_bytes));

  auto plan = [&](int blocks, int sharing) {
    const int64_t slice = (octets + blocks - 1) / blocks,
                  capacity = sharing == PAIRED ? paired : alone;
    const int64_t student = std::min(slice, capacity);
    const int64_t teacher = streams == 2 ? std::min(slice, capacity - student) : 0;
    const int64_t threads =
        std::min<int64_t>(most_threads / sharing, (slice + WARP - 1) / WARP * WARP);
    return Plan{blocks,
                int(threads),
                int(slice),
                {int(student), int(teacher)},
                int((student + teacher) * OCTET_BYTES + row_bytes)};
  };
  auto holds_all = [&](const Plan& p) { return p.held[0] + p.held[1] == streams * p.slice; };

  const int most = device.clusters ? MAX_BLOCKS : 1;
  for (int blocks = 1; blocks <= most; blocks *= 2)
    if (Plan p = plan(blocks, PAIRED); holds_all(p)) return p;
  // Reading a quarter of the teacher's logits again costs less than a multiprocessor that waits.
  if (Plan p = plan(most, PAIRED); p.held[0] == p.slice && 4 * p.held[1] >= 3 * p.slice) return p;
  if (Plan p = plan(most, ALONE); p.held[0] == p.slice) return p;
  // The gradient may lie over logits that are read again: their order must be that of one block.
  return plan(1, ALONE);
}

}  // namespace softprompt_fast::cuda
