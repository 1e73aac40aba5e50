// The memory itself: host memory behind every block that the model of the allocator hands out, and pinned memory.
#pragma once

#include "allocator.h"

#include <ATen/ATen.h>

#include <cstdlib>
#include <cstring>
#include <unordered_map>

namespace simulated_gpu {

// Address of host memory -> its block on the simulated device.
inline std::unordered_map<const void*, Block*>& live_blocks() {
  static auto* instance = new std::unordered_map<const void*, Block*>();  // tensors may outlive static objects
  return *instance;
}

inline void* aligned_host_memory(size_t alignment, size_t bytes) {
  void* memory = nullptr;
  TORCH_CHECK(posix_memalign(&memory, alignment, bytes) == 0, "the host has no memory left for the simulated GPU");
  return memory;
}

class Allocator final : public c10::DeviceAllocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const int device = this_thread().device;
    if (bytes == 0) return nothing(device);
    Lock lock(mutex());
    Block* block = memory_of(device).allocate(device, this_thread().stream[device], bytes);
    void* memory = aligned_host_memory(kRounding, bytes);
    std::memset(memory, 0xFF, bytes);  // NaN: whoever reads what nothing has written shall notice
    return owned(memory, new Owner{block, memory, {}}, device);
  }

  // Makes the memory of a CPU tensor the device's: that of a result which a CPU kernel has allocated.
  c10::DataPtr adopt(const c10::Storage& result, int device) {
    if (!result.data() || !result.nbytes()) return nothing(device);
    Lock lock(mutex());
    Block* block = memory_of(device).allocate(device, this_thread().stream[device], result.nbytes());
    void* memory = const_cast<void*>(result.data());
    return owned(memory, new Owner{block, memory, result}, device);
  }

  void recordStream(const c10::DataPtr& pointer, c10::Stream stream) override {
    Lock lock(mutex());
    auto found = live_blocks().find(pointer.get());
    if (found != live_blocks().end() && found->second->stream != stream_number(stream))
      found->second->recorded_streams.insert(stream_number(stream));
  }
  void emptyCache(c10::MempoolId_t = {0, 0}) override {
    Lock lock(mutex());
    for (int device = 0; device < device_count(); device++) memory_of(device).empty_cache();
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    Lock lock(mutex());
    return memory_of(or_current(device)).stats;
  }
  void resetPeakStats(c10::DeviceIndex device) override {
    Lock lock(mutex());
    memory_of(or_current(device)).reset_peaks();
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    Lock lock(mutex());
    const auto& memory = memory_of(or_current(device));
    return {memory.total_bytes - memory.reserved_bytes(), memory.total_bytes};
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  bool initialized() override { return true; }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  struct Owner {
    Block* block;
    void* memory;
    c10::Storage adopted;  // empty: the memory is our own
  };
  static int or_current(c10::DeviceIndex device) { return device < 0 ? this_thread().device : device; }
  static c10::Device device_at(int index) { return {c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index)}; }
  static c10::DataPtr nothing(int device) { return {nullptr, nullptr, &c10::detail::deleteNothing, device_at(device)}; }
  static c10::DataPtr owned(void* memory, Owner* owner, int device) {
    live_blocks()[memory] = owner->block;
    return {memory, owner, &release, device_at(device)};
  }
  static void release(void* context) {
    auto* owner = static_cast<Owner*>(context);
    {
      Lock lock(mutex());
      live_blocks().erase(owner->memory);
      memory_of(owner->block->device).free(owner->block);
    }
    if (!owner->adopted) std::free(owner->memory);
    delete owner;
  }
};
inline Allocator& allocator() {
  static auto* instance = new Allocator();
  return *instance;
}

// Pinned host memory. torch rounds its blocks up to powers of two (aten/src/ATen/core/CachingHostAllocator.h).
class PinnedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    c10::Device cpu(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, nullptr, &c10::detail::deleteNothing, cpu};
    void* memory = aligned_host_memory(4096, bytes);
    size_t block_bytes = 1;
    while (block_bytes < bytes) block_bytes *= 2;
    Lock lock(mutex());
    blocks()[memory] = {bytes, block_bytes};
    in_use_bytes += block_bytes;
    peak_bytes = std::max(peak_bytes, in_use_bytes);
    return {memory, memory, &release, cpu};
  }
  bool holds(const void* address) {
    Lock lock(mutex());
    auto next = blocks().upper_bound(address);
    if (next == blocks().begin()) return false;
    auto [start, block] = *std::prev(next);
    return address < static_cast<const char*>(start) + block.bytes;
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  size_t in_use_bytes = 0, peak_bytes = 0;

 private:
  struct PinnedBlock {
    size_t bytes, block_bytes;
  };
  static std::map<const void*, PinnedBlock>& blocks() {
    static auto* instance = new std::map<const void*, PinnedBlock>();
    return *instance;
  }
  static void release(void* memory);
};
inline PinnedAllocator& pinned_allocator() {
  static auto* instance = new PinnedAllocator();
  return *instance;
}
inline void PinnedAllocator::release(void* memory) {
  Lock lock(mutex());
  auto found = blocks().find(memory);
  pinned_allocator().in_use_bytes -= found->second.block_bytes;
  blocks().erase(found);
  std::free(memory);
}

}  // namespace simulated_gpu
