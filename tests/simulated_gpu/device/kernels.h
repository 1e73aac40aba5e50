// Operators that need more than the CPU's kernel: they allocate, cross devices, make the host wait, or stand for a
// kernel of CUDA's own.
#pragma once

#include "fallback.h"

#include <ATen/EmptyTensor.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>

namespace simulated_gpu {

inline const c10::DispatchKeySet kCudaKey(c10::DispatchKey::CUDA);

inline at::Tensor empty(at::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                        std::optional<c10::Device> device, std::optional<bool>,
                        std::optional<at::MemoryFormat> format) {
  OnDevice on(device.value_or(guard().getDevice()));
  return at::detail::empty_generic(sizes, &allocator(), kCudaKey, at::dtype_or_default(dtype), format);
}

inline at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<at::ScalarType> dtype,
                                std::optional<at::Layout>, std::optional<c10::Device> device, std::optional<bool>) {
  OnDevice on(device.value_or(guard().getDevice()));
  return at::detail::empty_strided_generic(sizes, strides, &allocator(), kCudaKey, at::dtype_or_default(dtype));
}

// One block of bytes that needs neither a cast nor another order: what a copy between host and device can move.
inline bool moves_as_bytes(const at::Tensor& to, const at::Tensor& from) {
  if (to.scalar_type() != from.scalar_type() || to.is_conj() != from.is_conj() || to.is_neg() != from.is_neg())
    return false;
  if (to.is_contiguous() && from.is_contiguous()) return true;
  return to.sizes() == from.sizes() && to.strides() == from.strides() && to.is_non_overlapping_and_dense();
}

inline at::Tensor& copy_within_devices(at::Tensor& to, const at::Tensor& from) {
  Aliases aliases;
  {
    Lock lock(mutex());
    const int there = this_thread().stream[to.device().index()], here = this_thread().stream[from.device().index()];
    // Between devices torch copies on the source's stream, and lets each of the two wait for the other.
    if (there != here) timeline().let_stream_wait(here, timeline().of_stream(there));
    Launch launch(from.device().index(), "aten::copy_");
    launch.uses(from, false);
    launch.uses(to, true);
    launch.count();
    counters().add("device_to_device_copies");
    if (there != here) timeline().let_stream_wait(there, timeline().of_stream(here));
  }
  aliases.of(to).copy_(aliases.of(from));
  return to;
}

inline void copy_from_host(const at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  Lock lock(mutex());
  const bool is_pinned = from.has_storage() && pinned_allocator().holds(from.storage().data());
  Launch launch(to.device().index(), "copy from the host");
  launch.uses(to, true);
  count_copy_to_device(to.numel() * to.element_size(), is_pinned);
  if (!(is_pinned && non_blocking)) launch.synchronize("copy from the host");
}

inline void copy_to_host(const at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  Lock lock(mutex());
  const bool is_pinned = to.has_storage() && pinned_allocator().holds(to.storage().data());
  Launch launch(from.device().index(), "copy to the host");
  launch.uses(from, false);
  count_copy("device_to_host", to.numel() * to.element_size());
  if (!(is_pinned && non_blocking)) launch.synchronize("copy to the host");
}

// As aten/src/ATen/native/cuda/Copy.cu: the source is cast where it is, and what is not one block of bytes goes through
// a contiguous copy on the device.
inline at::Tensor& copy_(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  if (to.is_same(from) || to.numel() == 0) return to;
  if (to.is_cuda() && from.is_cuda()) {
    if (to.device() == from.device() || moves_as_bytes(to, from)) return copy_within_devices(to, from);
    auto cast = from.to(to.scalar_type()).expand_as(to).contiguous();
    if (to.is_contiguous()) return copy_within_devices(to, cast);
    auto arrived = at::empty_like(to, at::MemoryFormat::Contiguous);
    copy_within_devices(arrived, cast);
    return copy_within_devices(to, arrived);
  }
  Aliases aliases;
  if (moves_as_bytes(to, from)) {
    to.is_cuda() ? copy_from_host(to, from, non_blocking) : copy_to_host(to, from, non_blocking);
    if (to.is_cuda())
      aliases.of(to).copy_(from);
    else
      to.copy_(aliases.of(from));
    return to;
  }
  auto cast = from.to(to.scalar_type()).expand_as(to).contiguous().resolve_conj().resolve_neg();
  if (to.is_contiguous() && !to.is_conj() && !to.is_neg()) return copy_(to, cast, non_blocking);
  auto arrived = at::empty(to.sizes(), to.options());
  copy_(arrived, cast, non_blocking);
  return to.copy_(arrived);
}

inline at::Scalar item(const at::Tensor& tensor) {
  Aliases aliases;
  Lock lock(mutex());
  Launch launch(tensor.device().index(), "item");
  launch.uses(tensor, false);
  count_copy("device_to_host", static_cast<int64_t>(tensor.element_size()));
  launch.synchronize("item");
  return aliases.of(tensor).item();
}

inline void record_stream(at::Tensor& tensor, c10::Stream stream) {
  allocator().recordStream(tensor.storage().data_ptr(), stream);
}

inline at::Tensor& set_to_storage(at::Tensor& tensor, at::Storage storage) {
  const auto elements = static_cast<int64_t>(storage.nbytes() / tensor.itemsize());
  return at::native::set_storage_cpu_(tensor, std::move(storage), 0, {elements}, {});
}

inline at::Tensor& set_to_nothing(at::Tensor& tensor) {
  c10::Storage storage(c10::Storage::use_byte_size_t(), 0, c10::DataPtr(nullptr, tensor.device()), &allocator(), true);
  return at::native::set_storage_cpu_(tensor, std::move(storage), 0, {0}, {});
}

// Attention: one kernel that has nothing on the device but its output, unless a gradient is wanted.
inline int64_t choose_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                const std::optional<at::Tensor>&, double, bool, std::optional<double>, bool) {
  const bool has_gradient =
      at::GradMode::is_enabled() && (query.requires_grad() || key.requires_grad() || value.requires_grad());
  return static_cast<int64_t>(has_gradient ? at::SDPBackend::math : at::SDPBackend::overrideable);
}

using AttentionResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, c10::SymInt, c10::SymInt, at::Tensor,
                                   at::Tensor, at::Tensor>;
inline AttentionResult attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                 const std::optional<at::Tensor>& mask, double dropout, bool is_causal, bool,
                                 std::optional<double> scale) {
  const bool has_mask = mask && mask->defined();
  std::vector<at::Tensor> inputs{query, key, value};
  if (has_mask) inputs.push_back(*mask);
  for (const auto& input : inputs)
    TORCH_CHECK(input.device() == query.device(),
                "Expected all tensors to be on the same device, but found at least two devices, ", query.device(),
                " and ", input.device(), "! (when checking the arguments of scaled_dot_product_attention)");
  OnDevice on(query.device());
  Aliases aliases;
  auto output = at::scaled_dot_product_attention(aliases.of(query), aliases.of(key), aliases.of(value),
                                                 has_mask ? std::optional(aliases.of(*mask)) : std::nullopt, dropout,
                                                 is_causal, scale, /*enable_gqa=*/query.size(1) != key.size(1));
  auto result = adopted(output, query.device().index());
  auto unused = at::empty({0}, query.options());
  Lock lock(mutex());
  Launch launch(query.device().index(), "scaled_dot_product_attention");
  for (const auto& input : inputs) launch.uses(input, false);
  launch.uses(result, true);
  launch.count();
  counters().add("flops", 4 * query.numel() * key.size(2));
  return {result, unused, unused, unused, 0, 0, unused, unused, unused};
}

}  // namespace simulated_gpu
