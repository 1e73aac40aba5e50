// What a profiler would count.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace simulated_gpu {

class Counters {
 public:
  void add(const std::string& name, int64_t amount = 1) { totals_[name] += amount; }
  void launch(const std::string& operation) {
    add("launches");
    launches_[operation]++;
  }
  void synchronization(const std::string& reason) {
    add("synchronizations");
    synchronizations_[reason]++;
  }
  const std::map<std::string, int64_t>& totals() const { return totals_; }
  const std::map<std::string, int64_t>& launches() const { return launches_; }
  const std::map<std::string, int64_t>& synchronizations() const { return synchronizations_; }
  void reset() { *this = Counters(); }

 private:
  std::map<std::string, int64_t> totals_{
      {"launches", 0},
      {"synchronizations", 0},
      {"host_to_device_copies", 0},
      {"host_to_device_bytes", 0},
      {"pageable_host_to_device_copies", 0},
      {"pageable_host_to_device_bytes", 0},
      {"device_to_host_copies", 0},
      {"device_to_host_bytes", 0},
      {"device_to_device_copies", 0},
      {"flops", 0},
  };
  std::map<std::string, int64_t> launches_, synchronizations_;  // by operation, by reason
};
inline Counters& counters() {
  static Counters instance;
  return instance;
}

}  // namespace simulated_gpu
