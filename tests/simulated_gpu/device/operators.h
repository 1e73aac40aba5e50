// torch.ops.simulated_gpu: what the Python part asks, and what torch.cuda asks of its C extension.
#pragma once

#include "kernels.h"

#include <torch/library.h>

namespace simulated_gpu {

using Numbers = c10::Dict<std::string, int64_t>;

inline Numbers as_dict(const std::map<std::string, int64_t>& numbers) {
  Numbers dict;
  for (const auto& [name, number] : numbers) dict.insert(name, number);
  return dict;
}
inline Numbers totals() {
  Lock lock(mutex());
  auto numbers = as_dict(counters().totals());
  numbers.insert("pinned_peak_bytes", static_cast<int64_t>(pinned_allocator().peak_bytes));
  return numbers;
}
inline Numbers launches_by_operation() {
  Lock lock(mutex());
  return as_dict(counters().launches());
}
inline Numbers synchronizations_by_reason() {
  Lock lock(mutex());
  return as_dict(counters().synchronizations());
}
inline void reset_counters() {
  Lock lock(mutex());
  counters().reset();
  pinned_allocator().peak_bytes = pinned_allocator().in_use_bytes;
}
inline c10::List<std::string> all_findings() {
  Lock lock(mutex());
  c10::List<std::string> texts;
  for (const auto& text : findings().all()) texts.push_back(text);
  return texts;
}
inline void clear_findings() {
  Lock lock(mutex());
  findings().clear();
}

// As torch._C._cuda_memoryStats, with the path to each number joined by dots.
inline Numbers memory_stats(int64_t device) {
  Lock lock(mutex());
  const auto& stats = memory_of(static_cast<int>(device)).stats;
  Numbers numbers;
  auto add = [&](const std::string& name, const c10::CachingAllocator::StatArray& array) {
    const char* pools[] = {"all", "small_pool", "large_pool"};
    for (size_t kind = 0; kind < 3; kind++) {
      const std::string path = name + "." + pools[kind] + ".";
      numbers.insert(path + "current", array[kind].current);
      numbers.insert(path + "peak", array[kind].peak);
      numbers.insert(path + "allocated", array[kind].allocated);
      numbers.insert(path + "freed", array[kind].freed);
    }
  };
  add("allocation", stats.allocation);
  add("segment", stats.segment);
  add("allocated_bytes", stats.allocated_bytes);
  add("reserved_bytes", stats.reserved_bytes);
  add("active_bytes", stats.active_bytes);
  add("requested_bytes", stats.requested_bytes);
  numbers.insert("num_alloc_retries", stats.num_alloc_retries);
  numbers.insert("num_ooms", stats.num_ooms);
  return numbers;
}
inline void set_memory_fraction(double fraction, int64_t device) {
  Lock lock(mutex());
  memory_of(static_cast<int>(device)).fraction = fraction;
}
inline double memory_fraction(int64_t device) { return memory_of(static_cast<int>(device)).fraction; }
inline void set_total_bytes(int64_t bytes, int64_t device) {
  Lock lock(mutex());
  memory_of(static_cast<int>(device)).total_bytes = static_cast<size_t>(bytes);
}

inline at::Tensor cpu_alias(const at::Tensor& tensor) {
  if (!tensor.is_cuda()) return tensor;
  Aliases aliases;
  return aliases.of(tensor);
}
// Keeps the books for a kernel that does not go through torch, such as one of Triton's.
inline void count_launch(const std::string& operation, at::TensorList reads, at::TensorList writes, int64_t device) {
  Lock lock(mutex());
  Launch launch(static_cast<int>(device), operation);
  for (const auto& tensor : reads) launch.uses(tensor, false);
  for (const auto& tensor : writes) launch.uses(tensor, true);
  launch.count();
}

}  // namespace simulated_gpu
