// Who has read and written a piece of memory, and what was not ordered: findings.
//
// Memory keeps its history when the allocator gives it to another tensor. That shows what a real card shows only now
// and then: a kernel that overwrites memory which another stream is still reading for a tensor that is already gone.
#pragma once

#include "clocks.h"

#include <map>
#include <string>
#include <unordered_set>
#include <vector>

namespace simulated_gpu {

class Findings {
 public:
  void add(const std::string& text) {
    if (seen_.insert(text).second) texts_.push_back(text);
  }
  const std::vector<std::string>& all() const { return texts_; }
  void clear() {
    texts_.clear();
    seen_.clear();
  }

 private:
  std::vector<std::string> texts_;  // in the order in which they were found
  std::unordered_set<std::string> seen_;
};
inline Findings& findings() {
  static Findings instance;
  return instance;
}

struct Access {
  uint64_t time = 0;  // the kernel's number in its stream
  std::string operation;
  uint64_t tenant = 0;  // which tensor's, counted by the allocator
};

class Accesses {
 public:
  // Notes that `stream` reads or writes; compares with what other streams did.
  void add(int stream, bool writes, const std::string& operation, uint64_t tenant, const Clock& now) {
    compare(written_, stream, operation, tenant, now, writes ? "overwrites" : "reads", "wrote");
    if (writes) compare(read_, stream, operation, tenant, now, "overwrites", "may still read");
    Access access{now[stream], operation, tenant};
    (writes ? written_ : read_)[stream] = std::move(access);
  }
  // Memory that is handed out belongs to the stream from what that stream has queued by then.
  void hand_out(int stream, uint64_t time, uint64_t tenant) { written_[stream] = {time, "its allocation", tenant}; }

  // Says which streams still use the memory as far as its owner and the host know, those in `recorded` aside.
  template <class Recorded>
  void check_free(int owner, const Recorded& recorded, uint64_t tenant) const {
    for (const auto* accesses : {&written_, &read_})
      for (const auto& [stream, access] : *accesses) {
        bool is_ordered = stream == owner || timeline().of_host()[stream] >= access.time ||
                          timeline().of_stream(owner)[stream] >= access.time;
        if (access.tenant != tenant || is_ordered || recorded.count(stream)) continue;
        findings().add("memory of " + stream_name(owner) + " is freed while " + stream_name(stream) +
                       " may still use it (" + access.operation + "): record_stream was not called");
      }
  }
  void merge(const Accesses& other) {
    for (auto [own, others] : {std::pair{&written_, &other.written_}, std::pair{&read_, &other.read_}})
      for (const auto& [stream, access] : *others) {
        auto& there = (*own)[stream];
        if (there.time < access.time) there = access;
      }
  }

 private:
  static void compare(const std::map<int, Access>& earlier, int stream, const std::string& operation, uint64_t tenant,
                      const Clock& now, const char* does, const char* did) {
    for (const auto& [other, access] : earlier) {
      if (other == stream || now[other] >= access.time) continue;
      findings().add(operation + " on " + stream_name(stream) + " " + does + " what " + stream_name(other) + " " + did +
                     " (" + access.operation +
                     (access.tenant == tenant ? "" : ", for an earlier tensor in the same memory") +
                     "), without waiting for it");
    }
  }
  std::map<int, Access> written_, read_;  // by stream: the last of each
};

}  // namespace simulated_gpu
