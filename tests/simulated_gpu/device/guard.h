// What torch asks of a device type: devices, streams, events (DeviceGuardImplInterface), and what only CUDA has
// (hooks).
#pragma once

#include "launches.h"

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace simulated_gpu {

struct RecordedEvent {
  Clock clock{};  // what was in the stream's queue when the event was recorded
};

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(device_count()); }
  c10::Device getDevice() const override {
    return {c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(this_thread().device)};
  }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < device_count(), "CUDA error: invalid device ordinal: ", device, " of ",
                device_count());
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) this_thread().device = device.index();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }

  c10::Stream getStream(c10::Device device) const override {
    return stream_at(this_thread().stream[or_current(device)]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return stream_at(or_current(device) * kStreamsPerDevice);
  }
  // Streams come from a pool and are handed out in turn, as torch does.
  c10::Stream getNewStream(c10::Device device, int) const override {
    Lock lock(mutex());
    static std::array<int, kMostDevices> handed_out{};
    int index = or_current(device);
    return stream_at(index * kStreamsPerDevice + 1 + handed_out[index]++ % (kStreamsPerDevice - 1));
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto before = getStream(stream.device());
    this_thread().stream[stream.device_index()] = stream_number(stream);
    return before;
  }
  void* getStreamNativeHandle(c10::Stream stream) const override {
    return reinterpret_cast<void*>(static_cast<uintptr_t>(stream_number(stream)));
  }
  // Whether work is done is asked to save a wait. Work is done here when the host has waited for it.
  bool queryStream(const c10::Stream& stream) const override {
    Lock lock(mutex());
    return has_waited_for(timeline().of_stream(stream_number(stream)));
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    Lock lock(mutex());
    counters().synchronization("stream");
    timeline().let_host_wait(timeline().of_stream(stream_number(stream)));
  }
  void synchronizeDevice(c10::DeviceIndex device) const override {
    Lock lock(mutex());
    counters().synchronization("device");
    timeline().let_host_wait_for_device(device < 0 ? this_thread().device : device);
  }

  void record(void** event, const c10::Stream& stream, c10::DeviceIndex, c10::EventFlag) const override {
    Lock lock(mutex());
    if (!*event) *event = new RecordedEvent();
    static_cast<RecordedEvent*>(*event)->clock = timeline().of_stream(stream_number(stream));
  }
  void block(void* event, const c10::Stream& stream) const override {
    Lock lock(mutex());
    if (event) timeline().let_stream_wait(stream_number(stream), static_cast<RecordedEvent*>(event)->clock);
  }
  bool queryEvent(void* event) const override {
    Lock lock(mutex());
    return !event || has_waited_for(static_cast<RecordedEvent*>(event)->clock);
  }
  void synchronizeEvent(void* event) const override {
    Lock lock(mutex());
    counters().synchronization("event");
    if (event) timeline().let_host_wait(static_cast<RecordedEvent*>(event)->clock);
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
    delete static_cast<RecordedEvent*>(event);
  }
  double elapsedTime(void*, void*, c10::DeviceIndex) const override { return 0.0; }

  void recordDataPtrOnStream(const c10::DataPtr& pointer, const c10::Stream& stream) const override {
    allocator().recordStream(pointer, stream);
  }

 private:
  static int or_current(c10::Device device) { return device.has_index() ? device.index() : this_thread().device; }
  static bool has_waited_for(const Clock& clock) {
    for (int stream = 0; stream < kStreams; stream++)
      if (timeline().of_host()[stream] < clock[stream]) return false;
    return true;
  }
};
inline Guard& guard() {
  static auto* instance = new Guard();
  return *instance;
}

// Makes a device the current one for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(c10::Device device) : before_(guard().exchangeDevice(device)) {}
  ~OnDevice() { guard().uncheckedSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;

 private:
  c10::Device before_;
};

class Hooks final : public at::CUDAHooksInterface {
 public:
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return device_count(); }
  c10::DeviceIndex deviceCount() const override { return guard().deviceCount(); }
  c10::DeviceIndex current_device() const override { return guard().getDevice().index(); }
  c10::DeviceIndex getCurrentDevice() const override { return guard().getDevice().index(); }
  void setCurrentDevice(c10::DeviceIndex device) const override { guard().setDevice({c10::DeviceType::CUDA, device}); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return guard().exchangeDevice({c10::DeviceType::CUDA, device}).index();
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchangeDevice(device); }
  bool isPinnedPtr(const void* address) const override { return pinned_allocator().holds(address); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator(); }
  c10::Allocator* getCUDADeviceAllocator() const override { return &allocator(); }
  c10::Device getDeviceFromPtr(void* address) const override {
    Lock lock(mutex());
    auto found = live_blocks().find(address);
    TORCH_CHECK(found != live_blocks().end(), "The pointer is not the start of memory on the simulated GPU.");
    return {c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(found->second->device)};
  }
  void deviceSynchronize(c10::DeviceIndex device) const override { guard().synchronizeDevice(device); }
};

}  // namespace simulated_gpu
