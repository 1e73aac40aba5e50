// The same memory seen twice: as a tensor of the device, and as one of the CPU, on which the CPU's kernels work.
#pragma once

#include "memory.h"

#include <c10/core/CPUAllocator.h>

#include <unordered_map>

namespace simulated_gpu {

// CPU tensors on the memory of device tensors. Tensors that share a storage get aliases that share one.
class Aliases {
 public:
  at::Tensor of(const at::Tensor& tensor) {
    auto* storage = tensor.storage().unsafeGetStorageImpl();
    auto found = storages_.find(storage);
    if (found == storages_.end()) {
      c10::DataPtr pointer(const_cast<void*>(tensor.storage().data()), c10::Device(c10::DeviceType::CPU));
      c10::Storage alias(c10::Storage::use_byte_size_t(), tensor.storage().nbytes(), std::move(pointer),
                         c10::GetCPUAllocator(), /*resizable=*/true);
      found = storages_.emplace(storage, std::move(alias)).first;
    }
    return like(tensor, found->second, c10::DispatchKey::CPU);
  }

  static at::Tensor like(const at::Tensor& tensor, c10::Storage storage, c10::DispatchKey key) {
    auto result =
        at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), tensor.dtype());
    auto* impl = result.unsafeGetTensorImpl();
    impl->set_storage_offset(tensor.storage_offset());
    impl->set_sizes_and_strides(tensor.sizes(), tensor.strides());
    result._set_conj(tensor.is_conj());
    result._set_neg(tensor.is_neg());
    return result;
  }

 private:
  std::unordered_map<c10::StorageImpl*, c10::Storage> storages_;
};

inline at::Tensor adopted(const at::Tensor& result, int device) {
  c10::Storage storage(c10::Storage::use_byte_size_t(), result.storage().nbytes(),
                       allocator().adopt(result.storage(), device), &allocator(), /*resizable=*/true);
  return Aliases::like(result, std::move(storage), c10::DispatchKey::CUDA);
}

}  // namespace simulated_gpu
