// csrc/cuda/rows.cu as a shared library for a CPU, with its launchers in C for ctypes.
#include "rows.cu"

namespace sc = softprompt_fast::cuda;

extern "C" {

void set_device(int major, int block_bytes, int multiprocessor_bytes, int descending) {
  settings.major = major;
  settings.block_bytes = block_bytes;
  settings.multiprocessor_bytes = multiprocessor_bytes;
  emulation::descending = descending;
}

// blocks, threads, slice, held[2], shared_bytes for a row on this device
void plan(int64_t V, int streams, int* out) {
  sc::Device device;
  sc::current_device(device);
  const sc::Plan plan =
      sc::plan_rows(V, streams, sc::MAX_THREADS / streams, device, sizeof(sc::Exchange), 0);
  memcpy(out, &plan, sizeof plan);
}

int exchange_bytes() { return sizeof(sc::Exchange); }
int sparse_target_rows(const sc::Rows* rows) { return sc::sparse_target_rows(*rows, nullptr); }
int divergence_rows(const sc::Rows* rows) { return sc::divergence_rows(*rows, nullptr); }
const char* error_string(int error) { return sc::error_string(error); }
}
