// Runs any operator on the device: the CPU's kernel on aliases of the same memory.
//
// Operators that torch composes of others are taken apart before they come here, as on a card. What comes here counts
// as one kernel, although CUDA takes several for some (sorting, factorizations); the CPU kernel's own scratch memory is
// not the device's.
#pragma once

#include "aliases.h"
#include "guard.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <unordered_set>

namespace simulated_gpu {

// Operators that take CPU tensors beside the device's: indices, and values of one element.
inline bool takes_cpu_indices(const std::string& name) {
  static const std::unordered_set<std::string> names{"aten::index",         "aten::index_put",
                                                     "aten::index_put_",    "aten::_index_put_impl_",
                                                     "aten::_unsafe_index", "aten::_unsafe_index_put"};
  return names.count(name);
}
// torch tags most elementwise operators; the names are those that it does not tag.
inline bool takes_cpu_numbers(const c10::OperatorHandle& op, const std::string& name) {
  static const std::unordered_set<std::string> untagged{
      "aten::fill",        "aten::fill_",        "aten::masked_fill",   "aten::masked_fill_", "aten::index_fill",
      "aten::index_fill_", "aten::floor_divide", "aten::floor_divide_", "aten::where"};
  return op.hasTag(at::Tag::pointwise) || takes_cpu_indices(name) || untagged.count(name) ||
         name.compare(0, 15, "aten::_foreach_") == 0;
}

// The host has to read the result before it can go on: a number for Python, or a shape that depends on values.
inline bool waits_for_values(const c10::OperatorHandle& op, const std::string& name, bool has_mask) {
  if (takes_cpu_indices(name)) return has_mask;  // a mask is turned into indices, whose number the host must know
  return op.hasTag(at::Tag::dynamic_output_shape) || op.hasTag(at::Tag::data_dependent_output);
}

// Floating-point operations of a product of matrices; 0 for everything else.
inline int64_t flops_of(const std::string& name, const std::vector<at::Tensor>& inputs) {
  static const std::unordered_map<std::string, size_t> first_factor{{"aten::mm", 0},      {"aten::bmm", 0},
                                                                    {"aten::addmm", 1},   {"aten::addmm_", 1},
                                                                    {"aten::baddbmm", 1}, {"aten::baddbmm_", 1}};
  auto found = first_factor.find(name);
  if (found == first_factor.end() || inputs.size() < found->second + 2) return 0;
  return 2 * inputs[found->second].numel() * inputs[found->second + 1].size(-1);
}

class FallbackCall {
 public:
  FallbackCall(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : op_(op), stack_(*stack), schema_(op.schema()), name_(op.schema().name()) {}

  void run() {
    replace_arguments();
    OnDevice guard(device_);
    op_.callBoxed(stack_);
    take_over_resized();
    const size_t before = uses_.size();
    replace_results();
    const bool has_new = uses_.size() > before;
    const bool writes = std::any_of(uses_.begin(), uses_.end(), [](const Use& use) { return use.writes; });
    if (!writes && !has_new && !returns_value_) return;  // a view
    Lock lock(mutex());
    Launch launch(device_.index(), name_);
    for (const Use& use : uses_) launch.uses(use.own, use.writes);
    launch.count();
    counters().add("flops", flops_of(name_, inputs_));
    if (returns_value_ || waits_for_values(op_, name_, has_mask_)) launch.synchronize(name_);
  }

 private:
  struct Use {
    at::Tensor own, alias;
    bool writes;
  };

  void replace_arguments() {
    const auto& arguments = schema_.arguments();
    const size_t first = stack_.size() - arguments.size();
    for (size_t i = 0; i < arguments.size(); i++) {
      auto* alias_info = arguments[i].alias_info();
      const bool writes = alias_info && alias_info->isWrite();
      auto& value = stack_[first + i];
      if (value.isDevice() && value.toDevice().is_cuda()) {
        device_ = value.toDevice();
        value = c10::Device(c10::DeviceType::CPU);
      } else {
        value = map_tensors(value, [&](const at::Tensor& tensor) { return alias_of(tensor, writes); });
      }
    }
    if (!device_.has_index()) device_ = guard().getDevice();
  }

  at::Tensor alias_of(const at::Tensor& tensor, bool writes) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      check_cpu_argument(tensor);
      return tensor;
    }
    check_device(tensor.device());
    has_mask_ |= tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte;
    inputs_.push_back(tensor);
    uses_.push_back({tensor, aliases_.of(tensor), writes});
    return uses_.back().alias;
  }

  void check_device(c10::Device device) {
    if (!device_.has_index()) device_ = device;
    TORCH_CHECK(device == device_, "Expected all tensors to be on the same device, but found at least two devices, ",
                device_, " and ", device, "! (when checking the arguments of ", name_, ")");
  }

  void check_cpu_argument(const at::Tensor& tensor) {
    const bool is_number =
        tensor.dim() == 0 && (tensor.unsafeGetTensorImpl()->is_wrapped_number() || takes_cpu_numbers(op_, name_));
    TORCH_CHECK(is_number || takes_cpu_indices(name_),
                "Expected all tensors to be on the same device, but found at least two devices, cuda and ",
                tensor.device(), "! (when checking the arguments of ", name_, ")");
    if (is_number) return;
    Lock lock(mutex());
    count_copy_to_device(static_cast<int64_t>(tensor.nbytes()), /*is_pinned=*/false);
  }

  // An output that the CPU kernel has resized lies in other memory now.
  void take_over_resized() {
    for (Use& use : uses_) {
      if (!use.writes) continue;
      if (use.alias.storage().data() != use.own.storage().data()) {
        auto* storage = use.own.storage().unsafeGetStorageImpl();
        storage->set_data_ptr_noswap(allocator().adopt(use.alias.storage(), device_.index()));
        storage->set_nbytes(use.alias.storage().nbytes());
      }
      auto* impl = use.own.unsafeGetTensorImpl();
      if (use.alias.sizes() != use.own.sizes() || use.alias.strides() != use.own.strides())
        impl->set_sizes_and_strides(use.alias.sizes(), use.alias.strides());
    }
  }

  void replace_results() {
    const size_t first = stack_.size() - schema_.returns().size();
    for (size_t i = first; i < stack_.size(); i++) {
      auto& value = stack_[i];
      returns_value_ |= value.isBool() || value.isDouble() || value.isInt() || value.isScalar();
      value = map_tensors(value, [&](const at::Tensor& tensor) { return device_tensor_of(tensor); });
    }
  }

  at::Tensor device_tensor_of(const at::Tensor& result) {
    if (!result.defined() || !result.is_cpu()) return result;
    for (const Use& use : uses_)
      if (use.alias.is_same(result)) return use.own;
    for (const Use& use : uses_)
      if (use.alias.storage().is_alias_of(result.storage())) {
        return Aliases::like(result, use.own.storage(), c10::DispatchKey::CUDA);
      }
    auto own = adopted(result, device_.index());
    uses_.push_back({own, result, true});
    return own;
  }

  template <class Map>
  static c10::IValue map_tensors(const c10::IValue& value, const Map& map) {
    if (value.isTensor()) return map(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> mapped;
      for (const at::Tensor& tensor : value.toTensorList()) mapped.push_back(map(tensor));
      return mapped;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> mapped;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList())
        mapped.push_back(tensor ? std::optional<at::Tensor>(map(*tensor)) : std::nullopt);
      return mapped;
    }
    return value;
  }

  const c10::OperatorHandle& op_;
  torch::jit::Stack& stack_;
  const c10::FunctionSchema& schema_;
  const std::string& name_;
  c10::Device device_{c10::DeviceType::CUDA, -1};
  Aliases aliases_;
  std::vector<Use> uses_;
  std::vector<at::Tensor> inputs_;
  bool has_mask_ = false, returns_value_ = false;
};

inline void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) { FallbackCall(op, stack).run(); }

}  // namespace simulated_gpu
