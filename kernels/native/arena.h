// Memory for one call.

#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace PINRANK_ISA {
namespace {

// Memory split into arrays that start on cache lines. Without memory it counts the floats needed.
class Arena {
 public:
  explicit Arena(float* memory = nullptr) : memory_(memory) {}
  float* take(size_t floats) {
    float* taken = memory_ ? memory_ + used_ : nullptr;
    used_ += (floats + 15) / 16 * 16;
    return taken;
  }
  size_t used() const { return used_; }

 private:
  float* memory_;
  size_t used_ = 0;
};

// A thread's memory stays its own from call to call: fresh pages would cost a fault each.
float* thread_memory(size_t floats) {
  struct Freed {
    void operator()(float* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<float, Freed> memory;
  thread_local size_t size = 0;
  if (size < floats) {
    memory.reset(static_cast<float*>(std::aligned_alloc(64, floats * 4)));
    size = memory ? floats : 0;
    // Blocks compute a few rows past the last one. The values there must not be slow to compute with (denormals).
    if (memory) std::memset(memory.get(), 0, floats * 4);
  }
  return memory.get();
}

}  // namespace
}  // namespace PINRANK_ISA
