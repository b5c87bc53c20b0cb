// Threads, blocks and clusters of CUDA on a CPU; see cuda_runtime.h beside this.
//
// A thread of CUDA is a fiber: it runs until it waits at a barrier, for a shuffle, or ends. A block
// is a thread of the operating system, so that __shared__ is thread_local. What would hang or be
// undefined on a device is an error: a barrier that some threads never reach, shared memory beyond
// what was asked for. Fibers run in ascending or in descending order: a missing barrier shows in
// one of them.
#pragma once

#include <condition_variable>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <ucontext.h>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

// Dynamic shared memory, declared again by the kernel.
namespace softprompt_fast::cuda {
inline thread_local float4 row_memory[232448 / sizeof(float4) + 64];
}  // namespace softprompt_fast::cuda

namespace emulation {

constexpr unsigned char POISON = 0xff;  // NaN in every float

inline bool descending = false;

enum class Scope { none, warp, block, cluster };

struct Fiber {
  jmp_buf at;
  ucontext_t start;
  std::unique_ptr<char[]> stack;
  bool started = false, ended = false;
  Scope waits = Scope::none;
  int line = 0;  // of the barrier
  int posted[2], shuffles = 0;
  std::vector<std::function<void()>> copies;
};

// What the blocks of a cluster share.
struct Cluster {
  int blocks, arrived = 0, rounds = 0, ended = 0;
  std::vector<char*> shared;  // row_memory of each block
  std::mutex mutex;
  std::condition_variable changed;

  void sync() {
    std::unique_lock lock(mutex);
    const int round = rounds;
    if (++arrived == blocks) arrived = 0, rounds++, changed.notify_all();
    changed.wait(lock, [&] { return rounds != round || ended > 0; });
    if (rounds == round) throw std::runtime_error("a block ended while others waited for it");
  }
  void end() {
    std::lock_guard lock(mutex);
    ended++, changed.notify_all();
  }
};

struct Block {
  int rank;
  Cluster* cluster;
  std::vector<Fiber> fibers;
  std::function<void()> kernel;
  jmp_buf scheduler;
  Fiber* now = nullptr;
};
inline thread_local Block* block = nullptr;

inline void wait(Scope scope, int line) {
  Fiber& fiber = *block->now;
  fiber.waits = scope, fiber.line = line;
  if (!_setjmp(fiber.at)) _longjmp(block->scheduler, 1);
}

inline void fiber_main() {
  block->kernel();
  block->now->ended = true;
  _longjmp(block->scheduler, 1);
}

inline void resume(Fiber& fiber) {
  block->now = &fiber;
  threadIdx.x = unsigned(&fiber - block->fibers.data());
  if (_setjmp(block->scheduler)) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  fiber.stack.reset(new char[65536]);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get(), fiber.start.uc_stack.ss_size = 65536;
  makecontext(&fiber.start, fiber_main, 0);
  setcontext(&fiber.start);
}

// Lets [first, last) go on if all of them wait at the same barrier.
inline bool release(Scope scope, size_t first, size_t last) {
  auto& fibers = block->fibers;
  for (size_t i = first; i < last; i++)
    if (fibers[i].waits != scope || fibers[i].line != fibers[first].line) return false;
  if (scope == Scope::cluster) block->cluster->sync();
  for (size_t i = first; i < last; i++) fibers[i].waits = Scope::none;
  return true;
}

inline void run_fibers() {
  auto& fibers = block->fibers;
  const size_t n = fibers.size();
  for (;;) {
    bool ran = false, ended = true;
    for (size_t k = 0; k < n; k++) {
      Fiber& fiber = fibers[descending ? n - 1 - k : k];
      if (fiber.ended || fiber.waits != Scope::none) continue;
      resume(fiber);
      ran = true;
    }
    for (const Fiber& fiber : fibers) ended &= fiber.ended;
    if (ended) return;
    for (size_t first = 0; first < n; first += 32) ran |= release(Scope::warp, first, first + 32);
    if (release(Scope::block, 0, n) || release(Scope::cluster, 0, n) || ran) continue;
    throw std::runtime_error("threads wait at different barriers: line " +
                             std::to_string(fibers[0].line));
  }
}

inline void run_block(int rank, Cluster& cluster, unsigned index, dim3 grid, dim3 threads,
                      size_t shared_bytes, const std::function<void()>& kernel) {
  char* memory = reinterpret_cast<char*>(softprompt_fast::cuda::row_memory);
  const size_t size = sizeof softprompt_fast::cuda::row_memory;
  memset(memory, POISON, size);
  blockIdx = dim3(index), blockDim = threads, gridDim = grid;
  Block here{rank, &cluster, std::vector<Fiber>(threads.x), kernel, {}, nullptr};
  cluster.shared[rank] = memory;
  block = &here;
  run_fibers();
  for (size_t i = shared_bytes; i < size; i++)
    if (static_cast<unsigned char>(memory[i]) != POISON)
      throw std::runtime_error("wrote beyond its shared memory");
}

inline void run_grid(dim3 grid, dim3 threads, size_t shared_bytes, int cluster_blocks,
                     const std::function<void()>& kernel) {
  for (unsigned first = 0; first < grid.x; first += cluster_blocks) {
    Cluster cluster;
    cluster.blocks = cluster_blocks, cluster.shared.resize(cluster_blocks);
    std::mutex mutex;
    std::string error;
    auto body = [&](int rank) {
      try {
        run_block(rank, cluster, first + rank, grid, threads, shared_bytes, kernel);
      } catch (const std::exception& problem) {
        std::lock_guard lock(mutex);
        error = problem.what();
      }
      cluster.end();
    };
    std::vector<std::thread> others;
    for (int rank = 1; rank < cluster_blocks; rank++) others.emplace_back(body, rank);
    body(0);
    for (auto& other : others) other.join();
    if (!error.empty()) throw std::runtime_error(error);
  }
}

}  // namespace emulation
