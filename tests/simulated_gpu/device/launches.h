// The books that are kept for each kernel and each wait of the host.
#pragma once

#include "counters.h"
#include "memory.h"

namespace simulated_gpu {

// One kernel in the queue of the device's current stream. Make it with the lock held.
class Launch {
 public:
  Launch(int device, std::string operation)
      : operation_(std::move(operation)), stream_(this_thread().stream[device]), now_(timeline().launch(stream_)) {}

  void uses(const at::Tensor& tensor, bool writes) {
    if (!tensor.has_storage()) return;
    auto found = live_blocks().find(tensor.storage().data());
    if (found == live_blocks().end()) return;
    Block* block = found->second;
    block->accesses.add(stream_, writes, operation_, block->tenant, now_);
  }
  void count() const { counters().launch(operation_); }
  // Lets the host wait for this kernel and all that is before it in the stream.
  void synchronize(const std::string& reason) const {
    counters().synchronization(reason);
    timeline().let_host_wait(now_);
  }

 private:
  std::string operation_;
  int stream_;
  const Clock& now_;
};

inline void count_copy(const std::string& direction, int64_t bytes) {
  counters().add(direction + "_copies");
  counters().add(direction + "_bytes", bytes);
}
inline void count_copy_to_device(int64_t bytes, bool is_pinned) {
  count_copy("host_to_device", bytes);
  if (!is_pinned) count_copy("pageable_host_to_device", bytes);
}

}  // namespace simulated_gpu
