// Streams, and which work is known to come after which: vector clocks.
//
// Every stream counts its own kernels. A stream's clock holds, for each stream, how many of that stream's kernels are
// certain to have run before the next kernel of this one. Events carry clocks from stream to stream; the host has a
// clock as well, because a kernel starts after everything that the host has waited for.
//
// All host threads share one clock. Work handed from one thread to another is ordered by whatever hands it over (a
// queue, a future), which cannot be seen from here.
#pragma once

#include <c10/core/Stream.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <string>

namespace simulated_gpu {

constexpr int kMostDevices = 4;
constexpr int kStreamsPerDevice = 33;  // the default stream, and as many as torch's pool of one priority has
constexpr int kStreams = kMostDevices * kStreamsPerDevice;

using Clock = std::array<uint64_t, kStreams>;

// One lock for all bookkeeping. It is recursive because freeing a tensor may happen inside a call that holds it.
inline std::recursive_mutex& mutex() {
  static std::recursive_mutex instance;
  return instance;
}
using Lock = std::lock_guard<std::recursive_mutex>;

inline int device_count() {
  static const int count = [] {
    const char* text = std::getenv("SIMULATED_GPU_DEVICES");
    return std::clamp(text ? std::atoi(text) : 1, 1, kMostDevices);
  }();
  return count;
}

// What a host thread has chosen, as with the CUDA runtime: a device, and on each device a stream.
struct HostThread {
  int device = 0;
  std::array<int, kMostDevices> stream = [] {
    std::array<int, kMostDevices> numbers{};
    for (int device = 0; device < kMostDevices; device++) numbers[device] = device * kStreamsPerDevice;
    return numbers;
  }();
};
inline HostThread& this_thread() {
  static thread_local HostThread instance;
  return instance;
}

// c10 numbers streams within a device; the clocks need one number for each stream of all devices.
inline int stream_number(const c10::Stream& stream) {
  return stream.device_index() * kStreamsPerDevice + static_cast<int>(stream.id());
}
inline c10::Stream stream_at(int number) {
  c10::Device device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(number / kStreamsPerDevice));
  return c10::Stream(c10::Stream::UNSAFE, device, number % kStreamsPerDevice);
}
inline std::string stream_name(int number) {
  int within = number % kStreamsPerDevice;
  std::string device = "cuda:" + std::to_string(number / kStreamsPerDevice);
  return (within ? "stream " + std::to_string(within) : std::string("the default stream")) + " of " + device;
}

class Timeline {
 public:
  // Puts a kernel into a stream's queue; returns what is certain to come before it, the kernel itself included.
  const Clock& launch(int stream) {
    merge(streams_[stream], host_);
    streams_[stream][stream]++;
    return streams_[stream];
  }
  const Clock& of_stream(int stream) const { return streams_[stream]; }
  const Clock& of_host() const { return host_; }
  void let_stream_wait(int stream, const Clock& clock) { merge(streams_[stream], clock); }
  void let_host_wait(const Clock& clock) { merge(host_, clock); }
  void let_host_wait_for_device(int device) {
    for (int within = 0; within < kStreamsPerDevice; within++)
      merge(host_, streams_[device * kStreamsPerDevice + within]);
  }

 private:
  static void merge(Clock& into, const Clock& from) {
    for (int i = 0; i < kStreams; i++) into[i] = std::max(into[i], from[i]);
  }
  std::array<Clock, kStreams> streams_{};
  Clock host_{};
};
inline Timeline& timeline() {
  static Timeline instance;
  return instance;
}

}  // namespace simulated_gpu
