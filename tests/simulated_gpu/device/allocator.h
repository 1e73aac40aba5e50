// A model of torch's caching allocator for CUDA: which bytes it would reserve, and when it would run out of memory.
//
// Sizes are rounded up to 512 bytes. Blocks of at most 1 MiB are cut from segments of 2 MiB; larger ones from segments
// of 20 MiB, or from 10 MiB on from one of their own, rounded up to 2 MiB. A request takes the smallest free block of
// its stream that is large enough; the rest is split off if it is worth it. Whole free segments go back to the device
// with empty_cache, and before an out-of-memory error. Source: c10/cuda/CUDACachingAllocator.cpp of torch 2.13, with
// its default settings.
//
// On a card, memory that was recorded on other streams is free again once the card has reached their events. Here that
// is when the host has waited for them: the latest moment possible, so peaks are upper bounds.
#pragma once

#include "hazards.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/util/Exception.h>

#include <iomanip>
#include <limits>
#include <list>
#include <set>
#include <sstream>

namespace simulated_gpu {

constexpr size_t kMiB = size_t(1) << 20;
constexpr size_t kRounding = 512;
constexpr size_t kMostOfSmallPool = 1 * kMiB;
constexpr size_t kSmallSegment = 2 * kMiB;
constexpr size_t kLargeSegment = 20 * kMiB;
constexpr size_t kOwnSegmentFrom = 10 * kMiB;
constexpr size_t kOwnSegmentRounding = 2 * kMiB;
constexpr size_t kDefaultDeviceBytes = size_t(80) << 30;

inline size_t rounded_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

struct Block {
  Block(int device, int stream, size_t bytes) : device(device), stream(stream), bytes(bytes) {}
  int device, stream;
  size_t bytes, offset = 0;  // the offset is within the segment, and orders blocks of equal size
  uint64_t segment = 0;
  bool is_small = false, is_allocated = false;
  size_t requested_bytes = 0;
  Block *before = nullptr, *after = nullptr;  // neighbours in the segment
  uint64_t tenant = 0;
  Accesses accesses;
  std::set<int> recorded_streams;
};

class DeviceMemory {
 public:
  Block* allocate(int device, int stream, size_t requested_bytes) {
    reclaim_recorded(/*wait=*/false);
    const size_t bytes = std::max(kRounding, rounded_up(requested_bytes, kRounding));
    const bool is_small = bytes <= kMostOfSmallPool;
    Block* block = take_cached(stream, bytes, is_small);
    if (!block) block = new_segment(device, stream, bytes, is_small, requested_bytes);
    split(block, bytes);
    block->is_allocated = true;
    block->requested_bytes = requested_bytes;
    block->tenant = ++tenants_;
    block->accesses.hand_out(stream, timeline().of_stream(stream)[stream], block->tenant);
    change(stats.allocated_bytes, is_small, block->bytes);
    change(stats.active_bytes, is_small, block->bytes);
    change(stats.requested_bytes, is_small, requested_bytes);
    change(stats.allocation, is_small, 1);
    return block;
  }

  void free(Block* block) {
    block->accesses.check_free(block->stream, block->recorded_streams, block->tenant);
    block->is_allocated = false;
    change(stats.allocated_bytes, block->is_small, -static_cast<int64_t>(block->bytes));
    change(stats.requested_bytes, block->is_small, -static_cast<int64_t>(block->requested_bytes));
    change(stats.allocation, block->is_small, -1);
    if (block->recorded_streams.empty()) return make_available(block);
    std::map<int, uint64_t> events;  // what those streams have queued by now
    for (int stream : block->recorded_streams) events[stream] = timeline().of_stream(stream)[stream];
    recorded_.emplace_back(block, std::move(events));
  }

  // Gives whole free segments back to the device.
  bool empty_cache() {
    reclaim_recorded(/*wait=*/true);
    bool has_freed = false;
    for (auto* pool : {&small_, &large_})
      for (auto at = pool->begin(); at != pool->end();) {
        Block* block = *at;
        if (block->before || block->after) {
          ++at;
          continue;
        }
        at = pool->erase(at);
        change(stats.reserved_bytes, block->is_small, -static_cast<int64_t>(block->bytes));
        change(stats.segment, block->is_small, -1);
        delete block;
        has_freed = true;
      }
    return has_freed;
  }

  size_t reserved_bytes() const { return static_cast<size_t>(stats.reserved_bytes[0].current); }

  void reset_peaks() {
    for (auto* array : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes,
                        &stats.allocation, &stats.segment})
      for (auto& stat : *array) stat.reset_peak();
  }

  c10::CachingDeviceAllocator::DeviceStats stats;
  size_t total_bytes = [] {
    const char* text = std::getenv("SIMULATED_GPU_BYTES");
    return text ? static_cast<size_t>(std::strtoull(text, nullptr, 10)) : kDefaultDeviceBytes;
  }();
  double fraction = 1.0;  // torch.cuda.set_per_process_memory_fraction

 private:
  struct SmallestFirst {
    bool operator()(const Block* a, const Block* b) const {
      return std::tie(a->stream, a->bytes, a->segment, a->offset) <
             std::tie(b->stream, b->bytes, b->segment, b->offset);
    }
  };
  using Pool = std::set<Block*, SmallestFirst>;

  Pool& pool_of(const Block* block) { return block->is_small ? small_ : large_; }

  static void change(c10::CachingAllocator::StatArray& array, bool is_small, int64_t by) {
    for (size_t kind : {size_t(0), size_t(is_small ? 1 : 2)})
      by >= 0 ? array[kind].increase(static_cast<size_t>(by)) : array[kind].decrease(static_cast<size_t>(-by));
  }

  Block* take_cached(int stream, size_t bytes, bool is_small) {
    Pool& pool = is_small ? small_ : large_;
    Block smallest(0, stream, bytes);
    auto at = pool.lower_bound(&smallest);
    if (at == pool.end() || (*at)->stream != stream) return nullptr;
    Block* block = *at;
    pool.erase(at);
    return block;
  }

  Block* new_segment(int device, int stream, size_t bytes, bool is_small, size_t requested_bytes) {
    const size_t size = is_small                  ? kSmallSegment
                        : bytes < kOwnSegmentFrom ? kLargeSegment
                                                  : rounded_up(bytes, kOwnSegmentRounding);
    const size_t allowed = std::min(total_bytes, static_cast<size_t>(fraction * static_cast<double>(total_bytes)));
    if (reserved_bytes() + size > allowed) {
      stats.num_alloc_retries++;
      stats.num_sync_all_streams++;
      empty_cache();
    }
    if (reserved_bytes() + size > allowed) {
      stats.num_ooms++;
      throw_out_of_memory(device, requested_bytes, allowed);
    }
    Block* block = new Block(device, stream, size);
    block->segment = ++segments_;
    block->is_small = is_small;
    change(stats.reserved_bytes, is_small, size);
    change(stats.segment, is_small, 1);
    stats.num_device_alloc++;
    return block;
  }

  void split(Block* block, size_t bytes) {
    const size_t rest = block->bytes - bytes;
    if (block->is_small ? rest < kRounding : rest <= kMostOfSmallPool) return;
    Block* remaining = new Block(*block);
    remaining->bytes = rest;
    remaining->offset += bytes;
    remaining->recorded_streams.clear();
    remaining->before = block;
    if (block->after) block->after->before = remaining;
    block->after = remaining;
    block->bytes = bytes;
    pool_of(remaining).insert(remaining);
  }

  // Puts a block into its pool, joined with free neighbours.
  void make_available(Block* block) {
    change(stats.active_bytes, block->is_small, -static_cast<int64_t>(block->bytes));
    block->recorded_streams.clear();
    Pool& pool = pool_of(block);
    for (Block* neighbour : {block->before, block->after}) {
      if (!neighbour || !pool.erase(neighbour)) continue;  // in use, or waiting for another stream
      if (neighbour == block->before) {
        block->offset = neighbour->offset;
        block->before = neighbour->before;
        if (block->before) block->before->after = block;
      } else {
        block->after = neighbour->after;
        if (block->after) block->after->before = block;
      }
      block->bytes += neighbour->bytes;
      block->accesses.merge(neighbour->accesses);
      delete neighbour;
    }
    pool.insert(block);
  }

  void reclaim_recorded(bool wait) {
    for (auto at = recorded_.begin(); at != recorded_.end();) {
      auto& [block, events] = *at;
      if (wait)
        for (auto& [stream, time] : events) timeline().let_host_wait(timeline().of_stream(stream));
      bool is_reached = std::all_of(events.begin(), events.end(), [](const auto& event) {
        return timeline().of_host()[event.first] >= event.second;
      });
      if (!is_reached) {
        ++at;
        continue;
      }
      make_available(block);
      at = recorded_.erase(at);
    }
  }

  [[noreturn]] void throw_out_of_memory(int device, size_t requested_bytes, size_t allowed) const {
    auto readable = [](size_t bytes) {
      std::ostringstream text;
      text << std::fixed << std::setprecision(2);
      if (bytes >= size_t(1) << 30)
        text << static_cast<double>(bytes) / (size_t(1) << 30) << " GiB";
      else
        text << static_cast<double>(bytes) / kMiB << " MiB";
      return text.str();
    };
    const size_t allocated = static_cast<size_t>(stats.allocated_bytes[0].current);
    std::ostringstream text;
    text << "CUDA out of memory. Tried to allocate " << readable(requested_bytes) << ". GPU " << device
         << " has a total capacity of " << readable(total_bytes) << " of which "
         << readable(total_bytes - reserved_bytes()) << " is free. ";
    if (allowed < total_bytes) text << readable(allowed) << " allowed; ";
    text << readable(allocated) << " is allocated by PyTorch, and " << readable(reserved_bytes() - allocated)
         << " is reserved by PyTorch but unallocated. (simulated GPU)";
    TORCH_CHECK_WITH(OutOfMemoryError, false, text.str());
    std::abort();
  }

  Pool small_, large_;
  std::list<std::pair<Block*, std::map<int, uint64_t>>> recorded_;  // freed blocks, and what other streams had queued
  uint64_t segments_ = 0, tenants_ = 0;
};

inline DeviceMemory& memory_of(int device) {
  static std::array<DeviceMemory, kMostDevices> instances;
  return instances.at(device);
}

}  // namespace simulated_gpu
